"""The worker table's owner: slots, rank ranges, and what is kept of a worker when it says little, much or nonsense."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from control_doubles import Remembered, remembering_log
from shared_memory import shared_segment

from sglfast._workers import DRAINING, FREE, JOINING, READY, UNHEALTHY, WorkerTable
from sglfast.control.introspect import Findings
from sglfast.control.workers import TableFullError, Workers
from sglfast.errors import ConfigError
from sglfast.shm import Dialect, Variant, WorkerRecord, WorkerView, read_workers
from sglfast.wire.kv_endpoint import parse_kv_settings
from sglfast.wire.server_info import KvEndpoint, WorkerFacts


def facts(*, ranks: int = 1, kv: bool = True, block_size: int = 64, **fields: Any) -> WorkerFacts:
    endpoint = KvEndpoint("zmq", "10.0.0.9", 5557, "t", block_size, ranks, 5657)
    known: dict[str, Any] = {
        "model": "m1", "kv": endpoint if kv else None, "dp_size": ranks, "disaggregation_mode": "null",
        "disaggregation_bootstrap_port": None, "bigram": True, "version": "0.5.23", "startup_time": 1.5, "page_size": 64,
    }  # fmt: skip
    return WorkerFacts(**known | fields)


def spoken(known: WorkerFacts | None, model: str | None = "m1") -> Findings:
    return Findings(facts=known, model=model, has_spoken=True, problem="")


SILENT = Findings(facts=None, model=None, has_spoken=False, problem="/server_info: no answer within 2 s")


@contextlib.contextmanager
def pool(count: int, *, max_ranks: int = 64, max_workers: int = 70, **settings: Any) -> Iterator[tuple[Workers, WorkerTable, Remembered]]:
    with shared_segment(max_workers=max_workers, max_ranks=max_ranks) as (_, segment):
        log, seen = remembering_log()
        table = WorkerTable(segment)
        workers = Workers(table, max_ranks, log, **settings)
        for i in range(count):
            assert workers.register(f"http://10.0.0.{i}:30000") == i
        yield workers, table, seen
        assert read_workers(table) == list(workers.views), "what control believes is not what the others read"
        owned = [rank for view in workers.views for rank in range(view.rank_base, view.rank_base + view.dp_size)]
        assert len(owned) == len(set(owned)), "two workers share a rank"
        assert all(view.dp_size for view in workers.views if view.block_size), "KV awareness without a rank"


def test_a_registered_worker_is_joining_and_unknown() -> None:
    with pool(2) as (workers, table, _):
        record = WorkerRecord(url="http://10.0.0.1:30000")
        expected = WorkerView(
            worker_idx=1, generation=1, state=JOINING, rank_base=62, dp_size=1, block_size=0, bigram=False, record=record
        )  # fmt: skip
        assert workers.views[1] == expected
        assert table.state(1) == JOINING


def test_facts_become_the_view_of_the_others() -> None:
    with pool(2) as (workers, table, _):
        assert workers.learn(1, spoken(facts(ranks=8)))
        workers.set_state(1, READY)
        view = read_workers(table)[1]
        assert (view.state, view.dp_size, view.block_size, view.bigram, view.generation) == (READY, 8, 64, True, 1)
        assert view.record == WorkerRecord(
            url="http://10.0.0.1:30000", model="m1", version="0.5.23", disaggregation_mode="null", startup_time=1.5,
            kv_host="10.0.0.9", kv_port_base=5557, kv_topic="t", kv_replay_port_base=5657,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "known", "route"),
    [
        ("auto", facts(), "sha256"),
        ("auto", facts(key_route="tokens"), "tokens"),
        ("auto", None, "sha256"),
        ("tokens", facts(), "tokens"),
        ("sha256", facts(key_route="tokens"), "sha256"),
    ],
)
def test_the_key_route_is_the_settings_or_what_the_engine_allows(setting: str, known: WorkerFacts | None, route: str) -> None:
    with pool(1, key_route=setting) as (workers, table, _):
        workers.learn(0, spoken(known))
        assert read_workers(table)[0].key_route == route


def test_an_engine_without_server_info_gets_its_endpoint_from_the_settings() -> None:
    with pool(2, kv_settings=parse_kv_settings(["tcp://*:5557,replay=5657,topic=kv,dp_size=2"])) as (workers, table, _):
        workers.learn(1, spoken(None))
        view = read_workers(table)[1]
        assert (view.dp_size, view.block_size, view.key_route) == (2, 16, "tokens")
        assert view.record == WorkerRecord(
            url="http://10.0.0.1:30000", model="m1", kv_host="10.0.0.1", kv_port_base=5557, kv_topic="kv", kv_replay_port_base=5657,
            adapters="models", rank_ways="hh", engine="vllm",
        )  # fmt: skip
        assert view.variant == Variant(16, False, "tokens", "m1", "models", Dialect(engine="vllm"))
        workers.learn(0, spoken(facts()))
        assert workers.views[0].record.kv_port_base == 5557
        assert workers.views[0].variant == Variant(64, True)


def test_the_table_moves_only_when_something_changed() -> None:
    """Every version of the table costs each shard a new look at all workers."""
    with pool(1) as (workers, table, _):
        assert workers.learn(0, spoken(facts()))
        workers.set_state(0, READY)
        version = table.version()
        assert not workers.learn(0, spoken(facts()))
        assert not workers.learn(0, SILENT)
        workers.set_state(0, READY)
        assert table.version() == version


def test_a_silent_worker_keeps_what_it_said_before() -> None:
    with pool(1) as (workers, _, _):
        workers.learn(0, spoken(facts()))
        before = workers.views[0]
        workers.learn(0, SILENT)
        assert workers.views[0] == before
        workers.learn(0, Findings(facts=None, model="m2", has_spoken=False, problem="status 503"))
        assert workers.views[0].record.model == "m2"
        assert workers.views[0].block_size == 64


def test_another_engine_behind_the_url_replaces_all() -> None:
    with pool(1) as (workers, _, _):
        workers.learn(0, spoken(facts(ranks=4)))
        workers.learn(0, spoken(None, "vllm-model"))
        assert workers.views[0].record == WorkerRecord(url="http://10.0.0.0:30000", model="vllm-model")
        assert (workers.views[0].dp_size, workers.views[0].block_size, workers.views[0].bigram) == (1, 0, False)


def test_out_of_ranks_is_routed_without_kv_and_names_the_flag() -> None:
    with pool(3) as (workers, _, seen):
        workers.learn(0, spoken(facts(ranks=60)))
        workers.learn(1, spoken(facts(ranks=8)))
        assert (workers.views[0].dp_size, workers.views[0].block_size) == (60, 64)
        view = workers.views[1]
        assert (view.dp_size, view.block_size, view.record.kv_host, view.record.model) == (0, 0, None, "m1")
        assert len(seen.lines) == 1
        assert "needs 8 contiguous ranks, --max-ranks 64 leaves 4; raise --max-ranks" in seen.text
        # The large one goes: there is room at the next look.
        workers.learn(0, spoken(facts(ranks=2)))
        workers.learn(1, spoken(facts(ranks=8)))
        assert (workers.views[1].dp_size, workers.views[1].block_size) == (8, 64)


def test_a_worker_without_ranks_gets_those_of_one_that_goes() -> None:
    with pool(3) as (workers, table, seen):
        workers.learn(0, spoken(facts(ranks=40)))
        workers.learn(1, spoken(facts(ranks=20)))
        workers.learn(2, spoken(facts(ranks=40)))
        workers.learn(2, spoken(facts(ranks=40)))
        assert workers.views[2].dp_size == 0
        assert len(seen.lines) == 1, "told once"
        workers.remove(1)
        workers.release(1)
        assert workers.views[1].dp_size == 0
        workers.remove(0)
        assert read_workers(table)[0].dp_size == 0, "shards may still count requests there"
        workers.release(0)
        view = read_workers(table)[0]
        assert (view.worker_idx, view.dp_size, view.block_size, view.record.kv_host) == (2, 40, 64, facts().kv.host)
        assert len(seen.lines) == 2
        assert "has ranks in the KV index now" in seen.text


def test_as_many_ranks_as_the_workers_have_are_enough() -> None:
    with pool(4) as (workers, _, seen):
        for number in range(4):
            workers.learn(number, spoken(facts(ranks=16)))
        assert [view.dp_size for view in workers.views] == [16] * 4
        assert not seen.lines


def test_ranks_of_workers_without_events_go_to_one_that_has_events() -> None:
    with pool(64) as (workers, _, seen):
        assert all(view.dp_size == 1 for view in workers.views)
        workers.learn(5, spoken(facts(ranks=1)))
        workers.learn(63, spoken(facts(ranks=32)))
        assert (workers.views[63].dp_size, workers.views[63].block_size) == (32, 64)
        assert (workers.views[5].dp_size, workers.views[5].block_size) == (1, 64)
        assert workers.views[0].dp_size == 0
        assert not seen.lines


def test_how_ranks_are_told_is_noted_of_workers_that_have_some() -> None:
    with pool(3) as (workers, table, _):
        workers.learn(0, spoken(facts(ranks=1, rank_ways="hhr")))
        workers.learn(1, spoken(facts(ranks=4, rank_ways="hhr")))
        workers.learn(2, spoken(facts(ranks=4, kv=False, rank_ways="hh")))
        assert [(view.dp_size, view.record.rank_ways) for view in read_workers(table)] == [(1, ""), (4, "hhr"), (4, "hh")]


def test_under_dp_aware_ranks_are_needed_without_events_too() -> None:
    with pool(64, dp_aware=True) as (workers, _, seen):
        workers.learn(0, spoken(facts(ranks=8, kv=False, rank_ways="hhr")))
        assert (workers.views[0].dp_size, workers.views[0].block_size) == (8, 0)
        workers.learn(1, spoken(facts(ranks=40)))
        assert (workers.views[0].dp_size, workers.views[1].dp_size) == (8, 40), "they are not taken for idle"
        assert not seen.lines
        workers.learn(2, spoken(facts(ranks=32, kv=False, rank_ways="hhr")))
        assert workers.views[2].dp_size == 0
        assert "routed as a whole" in seen.text
        assert "raise --max-ranks" in seen.text


@pytest.mark.parametrize("ranks", [65, 10**30])
def test_more_ranks_than_there_can_be(ranks: int) -> None:
    with pool(1) as (workers, _, seen):
        workers.learn(0, spoken(facts(ranks=ranks)))
        assert (workers.views[0].dp_size, workers.views[0].block_size) == (0, 0)
        assert "--max-ranks" in seen.text


@pytest.mark.parametrize("name", ["x" * 600, "two\nlines", "nul\0", "\u202eright-to-left", "lone\ud800"])
def test_a_name_that_would_spoil_logs_or_the_slot_is_not_used(name: str) -> None:
    with pool(1) as (workers, _, seen):
        workers.learn(0, spoken(facts(), name))
        assert workers.views[0].record.model is None
        assert workers.views[0].block_size == 64
        assert "model name is not used" in seen.text
        assert name not in seen.text


def test_adapters_as_many_as_fit() -> None:
    with pool(1) as (workers, _, seen):
        workers.learn(0, dataclasses.replace(spoken(facts()), adapters=("ad", "b:c")))
        assert workers.views[0].record.adapter_models == ("ad", "b:c")
        assert workers.views[0].block_size == 64
        workers.learn(0, SILENT)
        assert workers.views[0].record.adapter_models == ("ad", "b:c")
        assert seen.text == ""
        workers.learn(0, dataclasses.replace(spoken(facts()), adapters=(*(f"adapter-{i:03}" for i in range(1000)), "bad\nname")))
        found = workers.views[0].record.adapter_models
        assert found == tuple(f"adapter-{i:03}" for i in range(len(found)))
        assert 200 < len(found) < 400
        assert f"'adapters': 1001, 'known': {len(found)}" in seen.text
        workers.learn(0, spoken(facts()))
        assert workers.views[0].record.adapter_models == ()


@pytest.mark.parametrize("fields", [{"version": "v" * 5000}, {"block_size": 1 << 40}])
def test_facts_that_fit_no_slot_leave_a_worker_that_can_be_routed_to(fields: dict[str, Any]) -> None:
    with pool(1) as (workers, _, seen):
        workers.learn(0, spoken(facts(**fields)))
        assert workers.views[0].record == WorkerRecord(url="http://10.0.0.0:30000", model="m1")
        assert workers.views[0].block_size == 0
        assert "does not fit" in seen.text


def test_the_longest_url_and_name_fit_together() -> None:
    with pool(0) as (workers, _, _):
        workers.register("http://" + "h" * 1017)
        workers.learn(0, spoken(None, "\U00020000" * 512))
        assert workers.views[0].record.model == "\U00020000" * 512


def test_a_removed_worker_leaves_its_slot_and_ranks_only_when_they_are_released() -> None:
    with pool(2, max_workers=3) as (workers, table, _):
        workers.learn(0, spoken(facts(ranks=4)))
        free = workers._ranks.free
        workers.remove(0)
        assert [view.worker_idx for view in workers.views] == [1]
        assert table.state(0) == FREE
        assert workers._ranks.free == free
        assert workers.register("http://10.0.0.7:1") == 2
        with pytest.raises(TableFullError):
            workers.register("http://10.0.0.8:1")
        workers.release(0)
        assert workers._ranks.free == free + 4 - 1
        assert workers.register("http://10.0.0.8:1") == 0
        assert workers.view(0).generation == 2
        with pytest.raises(KeyError):
            workers.release(0)


def test_a_drained_worker_is_draining_whatever_its_health() -> None:
    with pool(1) as (workers, table, _):
        workers.set_draining(0, True)
        for state in (READY, UNHEALTHY, READY):
            workers.set_state(0, state)
            assert (table.state(0), workers.view(0).state, workers.health(0)) == (DRAINING, DRAINING, state)
        workers.set_draining(0, False)
        assert table.state(0) == READY
        workers.set_draining(0, True)
        workers.remove(0)
        workers.release(0)
        assert workers.register("http://10.0.0.9:1") == 0
        assert table.state(0) == JOINING, "the next one is not draining"


def test_a_given_name_and_key_outlive_every_introspection() -> None:
    with pool(0) as (workers, table, _):
        workers.register("http://10.0.0.1:1", model="given", api_key="sk-1")
        for findings in (SILENT, spoken(facts()), spoken(None), spoken(facts(version="v" * 5000)), spoken(facts(ranks=70))):
            workers.learn(0, findings)
            record = read_workers(table)[0].record
            assert (record.model, record.api_key) == ("given", "sk-1"), findings
        workers.set_api_key(0, None)
        assert read_workers(table)[0].record.api_key is None


def test_the_longest_key_fits_beside_the_longest_url_and_name() -> None:
    with pool(0) as (workers, _, _):
        workers.register("http://" + "h" * 1017, model="\U00020000" * 512, api_key="k" * 800)
        workers.learn(0, spoken(facts()))
        assert workers.view(0).record.api_key == "k" * 800


def test_refused_registrations() -> None:
    with pool(2, max_workers=2) as (workers, _, _), pytest.raises(ConfigError, match="--max-workers 2"):
        workers.register("http://10.0.0.3:1")
    with pool(0) as (workers, _, _), pytest.raises(ConfigError, match="URL of 2000 characters"):
        workers.register("http://" + "h" * 1993)


@pytest.mark.parametrize("order", ["as named", "backwards", "shuffled"])
@pytest.mark.parametrize("ranks", [2, 8, 16])
def test_a_pool_that_fills_the_index_to_the_last_rank(rng: Any, order: str, ranks: int) -> None:
    count = 1024 // ranks
    with pool(count, max_ranks=1024, max_workers=count) as (workers, _, seen):
        idxs = list(range(count))
        if order != "as named":
            idxs.sort(key=lambda idx: -idx if order == "backwards" else rng.random())
        for idx in idxs:
            workers.learn(idx, spoken(facts(ranks=ranks)))
        assert [view.dp_size for view in workers.views] == [ranks] * count
        assert not seen.lines


def test_random_pools_never_share_or_lose_a_rank(rng: Any) -> None:
    with pool(20, max_ranks=64) as (workers, _, _):
        for _ in range(300):
            idx, ranks, has_kv = rng.randrange(20), rng.choice([1, 1, 2, 4, 8, 16]), rng.random() < 0.7
            workers.learn(idx, rng.choice([spoken(facts(ranks=ranks, kv=has_kv)), spoken(None), SILENT]))
            owned = [rank for view in workers.views for rank in range(view.rank_base, view.rank_base + view.dp_size)]
            assert len(owned) == len(set(owned))
            assert workers._ranks.free == 64 - len(owned)
