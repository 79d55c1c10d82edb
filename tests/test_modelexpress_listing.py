"""The roster and the listing against a plain model: every filter, in any mixture, after any history."""

from typing import Any

import pytest
from conftest import SeededRandom

from sglfast.modelexpress.listing import encode, select
from sglfast.modelexpress.roster import READY, STALE, UNKNOWN, Key, Roster, State, Static, training_step
from sglfast.modelexpress.schema import p2p
from sglfast.modelexpress.varint import varint

FRESH_MS, NOW_MS = 90_000, 1_800_000_000_000


def static(model: str, **extra: str) -> Static:
    identity = p2p.SourceIdentity(model_name=model, extra_parameters=extra)
    return Static(identity.SerializeToString(deterministic=True), "H100", {"rack": model}, "")


def refs(roster: Roster, source_id: str | None = None, now_ms: int = NOW_MS, **filters: Any) -> list[p2p.SourceInstanceRef]:
    request = p2p.ListSourcesRequest(**filters)
    return list(p2p.ListSourcesResponse.FromString(encode(select(roster, request, source_id, now_ms, FRESH_MS))).instances)


def expected(model: dict[Key, tuple[Static, State]], source_id: str | None, filters: dict[str, Any]) -> list[p2p.SourceInstanceRef]:
    """The rules, one by one, as spec/modelexpress.md 2.4 lists them."""
    found = []
    for source, worker_id in {(key.source_id, key.worker_id) for key in model}:
        ranks = {key: value for key, value in model.items() if key[:2] == (source, worker_id)}
        key, (_, state) = max(ranks.items(), key=lambda item: item[1][1].order)
        newest = max((value for other, value in model.items() if other.source_id == source), key=lambda value: value[1].order)
        identity = p2p.SourceIdentity.FromString(newest[0].identity)
        step = training_step(identity)
        status = filters.get("status_filter")
        if (
            (source_id is not None and source != source_id)
            or (status is not None and status < 4 and status not in {value[1].status for value in ranks.values()})
            or filters.get("model_name_filter", identity.model_name) != identity.model_name
            or filters.get("worker_rank_filter", key.rank) != key.rank
            or ("min_training_step" in filters and (step is None or step < filters["min_training_step"]))
            or filters.get("min_updated_at", 0) > state.updated_at_ms
        ):
            continue
        found.append(
            p2p.SourceInstanceRef(
                mx_source_id=source, worker_id=worker_id, model_name=identity.model_name, worker_rank=key.rank, accelerator="H100",
                updated_at=state.updated_at_ms, training_step=step, topology=model[key][0].topology, source_load=state.source_load,
                layout_signature=identity.extra_parameters.get("layout_signature"),
            )
        )  # fmt: skip
    found.sort(key=lambda ref: -ref.updated_at)
    if filters.get("limit"):
        del found[filters["limit"] :]
    return [ref for ref in found if filters.get("status_filter") != READY or ref.updated_at >= NOW_MS - FRESH_MS]


def test_random_histories_are_listed_as_the_rules_say(rng: SeededRandom) -> None:
    roster, model, order = Roster(), dict[Key, tuple[Static, State]](), 0
    times = iter(rng.sample(range(NOW_MS - 2 * FRESH_MS, NOW_MS + 1000), 800))  # no two alike: the order is certain
    for _ in range(800):
        source = rng.choice("abc")
        key = Key(source, f"w{rng.randrange(5)}", rng.choice([0, 0, 0, 1]))
        action = rng.choice(["put", "put", "state", "state", "state", "drop", "list", "list"])
        load = rng.choice([None, 0.0, 0.5])
        if action == "put":
            order += 1
            extra = {"a": {"training_step": "5"}, "b": {"version": "9", "layout_signature": "x"}, "c": {}}[source]
            said = static(rng.choice([f"Model-{source}", f"model-{source}"]), **extra)
            model[key] = said, State(rng.choice([UNKNOWN, READY]), next(times), 0, order, load)
            roster.put(key, *model[key])
        elif action == "state" and key in model:
            said, state = model[key]
            model[key] = said, state._replace(status=rng.choice([READY, READY, STALE]), updated_at_ms=next(times), source_load=load)
            roster.set_state(key, model[key][1])
        elif action == "drop":
            others = [value for other, value in model.items() if other.source_id == source and other != key]
            if key in model and others and max(value[1].order for value in others) < model[key][1].order:
                continue  # the spelling of the last publisher stays with the source; the model above has forgotten it
            model.pop(key, None)
            roster.drop(key)
        else:
            filters: dict[str, Any] = {}
            for name, values in {
                "status_filter": [0, READY, STALE, 99], "model_name_filter": ["Model-a", "model-b"], "worker_rank_filter": [0, 1],
                "min_training_step": [0, 6], "min_updated_at": [NOW_MS - FRESH_MS], "limit": [0, 1, 4],
            }.items():  # fmt: skip
                if rng.random() < 0.25:
                    filters[name] = rng.choice(values)
            asked = rng.choice([None, *"abc", "none"])
            assert refs(roster, asked, **filters) == expected(model, asked, filters)
        assert {entry.key: (entry.static, entry.state) for entry in roster} == model
        assert len(roster) == len(model)
        assert set(roster.sources) == {key.source_id for key in model}
        lowest = roster.lowest_rank(key.source_id, key.worker_id)
        ranks = [other.rank for other in model if other[:2] == key[:2]]
        assert (lowest.key.rank if lowest else None) == min(ranks, default=None)


def test_a_line_is_made_once_until_it_changes() -> None:
    roster, key = Roster(), Key("s", "w", 0)
    roster.put(key, static("M"), State(READY, NOW_MS, 0, 1, None))
    (worker,) = roster.sources["s"].workers.values()
    line = worker.encoded()
    assert worker.encoded() is line
    roster.set_state(key, State(READY, NOW_MS + 1, 1, 1, 0.5))
    assert worker.encoded() != line
    roster.put(Key("s", "other", 0), static("m"), State(READY, NOW_MS, 0, 2, None))
    assert {ref.model_name for ref in refs(roster)} == {"m"}, "another spelling reaches the lines that were made before"


@pytest.mark.parametrize(
    ("extra", "step"),
    [({}, None), ({"training_step": "7"}, 7), ({"version": "8"}, 8), ({"training_step": "7", "version": "8"}, 7), ({"version": "+3"}, 3),
     ({"version": "-3"}, None), ({"version": ""}, None), ({"version": " 3"}, None), ({"version": "3.0"}, None), ({"version": "٣"}, None),
     ({"version": str(2**64 - 1)}, 2**64 - 1), ({"version": str(2**64)}, None), ({"version": "0" * 5000 + "1"}, 1),
     ({"version": "9" * 5000}, None), ({"training_step": "x", "version": "8"}, None)],
)  # fmt: skip
def test_training_step_is_a_decimal_uint64(extra: dict[str, str], step: int | None) -> None:
    assert training_step(p2p.SourceIdentity(extra_parameters=extra)) == step


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**32, 2**63 - 1])
def test_varint(value: int) -> None:
    assert b"\x30" + varint(value) == (p2p.SourceInstanceRef(updated_at=value).SerializeToString() or b"\x30\x00")
