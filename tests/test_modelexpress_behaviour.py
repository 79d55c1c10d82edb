"""35 of the 41 rules of the upstream server, request -> answer, over gRPC, on both storages.

Where ours differs on purpose, the test says so: times are stamped by the server at a publish (as upstream does on Kubernetes), and what
never said READY is collected. The rules of a failing storage and of tokens are in test_modelexpress_behaviour_failures.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mx_harness import NO_REDIS, REDIS, Client, Clock, RedisServer, publication, redis_server, serving, settings

from sglfast.modelexpress.roster import INITIALIZING, READY, STALE, UNKNOWN
from sglfast.modelexpress.schema import p2p
from sglfast.modelexpress.server import Server

GOLDEN = Path(__file__).parent / "golden" / "modelexpress" / "service_behaviour.json"
RULES: dict[str, dict[str, Any]] = {rule["id"]: rule for rule in json.loads(GOLDEN.read_text())["cases"]}
TIMEOUT_SECS, GC_SECS = 90.0, 3600.0


class Room:
    """A service with a clock that stands still, and a client."""

    def __init__(self, server: Server, client: Client, clock: Clock) -> None:
        self.server, self.client, self.clock = server, client, clock

    async def put(self, worker_id: str = "w", status: int = UNKNOWN, rank: int = 0, **more: Any) -> str:
        """Publish, then set the status, a second later than what was before; returns the source's id."""
        self.clock.pass_secs(1)
        answer = await self.client.publish(publication(worker_id=worker_id, rank=rank, **more))
        assert answer.success, answer.message
        if status != UNKNOWN:
            assert (await self.client.update(answer.mx_source_id, worker_id, rank, status)).success
        return answer.mx_source_id

    async def names(self, **fields: Any) -> list[str]:
        return [ref.worker_id for ref in await self.client.list(**fields)]

    async def status(self, source_id: str, worker_id: str = "w") -> int | None:
        answer = await self.client.get(source_id, worker_id)
        return int(answer.worker.status) if answer.found else None


Test = Callable[[Room, dict[str, Any]], Awaitable[None]]
TESTS: dict[str, Test] = {}


def rule(*ids: str) -> Callable[[Test], Test]:
    def register(test: Test) -> Test:
        TESTS.update(dict.fromkeys(ids, test))
        return test

    return register


@pytest.fixture(scope="module", autouse=True)
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer | None]:
    if REDIS is None:
        yield None
        return
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["sqlite", "redis"])
def where(request: pytest.FixtureRequest, tmp_path: Path, shared_redis: RedisServer | None) -> dict[str, Any]:
    if request.param == "redis" and shared_redis is None:
        pytest.skip(NO_REDIS)
    storage = shared_redis.url if request.param == "redis" and shared_redis else tmp_path / "records.sqlite3"
    return {"storage": storage, "redis_prefix": str(tmp_path)}


@pytest.mark.parametrize("rule_id", [name for name in RULES if not name.startswith("auth-") and "backend-error" not in name])
def test_rule(rule_id: str, where: dict[str, Any]) -> None:
    async def main() -> None:
        clock = Clock()
        config = settings(heartbeat_timeout_secs=TIMEOUT_SECS, gc_timeout_secs=GC_SECS, **where)
        async with serving(config, clock) as (server, client):
            await TESTS[rule_id](Room(server, client, clock), RULES[rule_id])

    asyncio.run(main())


def filled(request: dict[str, Any]) -> p2p.PublishMetadataRequest:
    """The request of a rule; what it does not name is there and good."""
    whole = {"identity": {"model_name": "m"}, "worker_id": "w", "worker": {}} | request
    return p2p.PublishMetadataRequest(**{name: value for name, value in whole.items() if value is not None})


@rule("pub-no-identity", "pub-empty-model", "pub-no-worker-id", "pub-no-worker")
async def refused(room: Room, told: dict[str, Any]) -> None:
    expect = told["expect"]
    answer = await room.client.publish(filled(told["request"]))
    assert not answer.success
    assert (answer.message, answer.mx_source_id, answer.worker_id) == (expect["message"], "", "")
    assert await room.names() == []


@rule("pub-check-order")
async def check_order(room: Room, told: dict[str, Any]) -> None:
    request, messages = p2p.PublishMetadataRequest(), []
    for repair in (
        {"identity": p2p.SourceIdentity(revision="r")},
        {"identity": p2p.SourceIdentity(model_name="m")},
        {"worker_id": "w"},
        {},
    ):
        messages.append((await room.client.publish(request)).message)
        request.MergeFrom(p2p.PublishMetadataRequest(**repair))
    assert messages == ["identity is required", "identity.model_name is required", "worker_id is required", "worker is required"]


@rule("pub-ok")
async def published(room: Room, told: dict[str, Any]) -> None:
    worker = {"worker_rank": 3, "tensors": [{"name": "a"}, {"name": "b"}]}
    answer = await room.client.publish(filled({"worker": worker}))
    assert answer.success
    assert re.fullmatch("[0-9a-f]{16}", answer.mx_source_id)
    assert answer.message == told["expect"]["message"].replace("<sid>", answer.mx_source_id)
    assert answer.worker_id == "w"


@rule("pub-tensor-count")
async def tensor_count(room: Room, told: dict[str, Any]) -> None:
    five, one = [{"name": str(i)} for i in range(5)], {"tensors": [{"name": "x"}]}
    assert " 1 tensors)" in (await room.client.publish(filled({"worker": {"tensors": five, "tensor_source": one}}))).message
    assert " 5 tensors)" in (await room.client.publish(filled({"worker": {"tensors": five}}))).message
    assert (
        " 0 tensors)" in (await room.client.publish(filled({"worker": {"tensors": five, "artifact_source": {"artifact_id": "a"}}}))).message
    )


@rule("pub-again")
async def published_again(room: Room, told: dict[str, Any]) -> None:
    source = await room.put(status=READY)
    assert await room.names(status_filter=READY) == ["w"]
    await room.put(n_tensors=4)
    assert await room.names(status_filter=READY) == []
    answer = await room.client.get(source, "w")
    assert (answer.worker.status, len(answer.worker.tensors)) == (UNKNOWN, 4)
    assert answer.worker.updated_at == room.clock.now_ms, "the server's time, whatever was sent"
    await room.put(status=UNKNOWN)
    sent = publication(worker_id="w", status=INITIALIZING, updated_at=5)
    assert (await room.client.publish(sent)).success
    assert await room.status(source) == INITIALIZING, "the status as sent"
    assert (await room.client.get(source, "w")).worker.updated_at == room.clock.now_ms
    await room.client.update(source, "w", 0, READY)
    assert await room.names(status_filter=READY) == ["w"]


@rule("pub-second-rank")
async def second_rank(room: Room, told: dict[str, Any]) -> None:
    source = await room.put(rank=0)
    await room.put(rank=1)
    assert [(ref.worker_id, ref.worker_rank) for ref in await room.client.list()] == [("w", 1)]
    assert (await room.client.get(source, "w")).worker.worker_rank == 0
    await room.put(rank=0)
    assert [(ref.worker_id, ref.worker_rank) for ref in await room.client.list()] == [("w", 0)]


@rule("list-no-identity", "list-empty-model", "list-unknown-status-number")
async def all_of_them(room: Room, told: dict[str, Any]) -> None:
    await room.put("a", READY)
    await room.put("b", STALE, model="other")
    await room.put("c")
    request = {name: value for name, value in told["request"].items() if value is not None}
    assert await room.names(**request) == ["c", "b", "a"]
    assert await room.names(identity=publication().identity) == ["c", "a"], "while an identity filters"


@rule("list-status-unknown-explicit")
async def explicit_unknown(room: Room, told: dict[str, Any]) -> None:
    await room.put("w1")
    await room.put("w2", READY)
    assert await room.names(**told["request"]) == told["expect"]["instances"]


@rule("list-any-rank-status")
async def any_rank(room: Room, told: dict[str, Any]) -> None:
    await room.put("w1", INITIALIZING, rank=0)
    await room.put("w1", READY, rank=1)
    for status in (READY, INITIALIZING):
        assert [(ref.worker_id, ref.worker_rank) for ref in await room.client.list(status_filter=status)] == [("w1", 1)]
    assert await room.names(status_filter=STALE) == []


@rule("list-ready-freshness")
async def freshness(room: Room, told: dict[str, Any]) -> None:
    await room.put(status=READY)
    room.clock.pass_secs(TIMEOUT_SECS)
    assert await room.names(status_filter=READY) == ["w"], "the border is inside"
    room.clock.pass_secs(0.001)
    assert await room.names(status_filter=READY) == []
    room.clock.pass_secs(-10_000)
    assert await room.names(status_filter=READY) == ["w"], "a time in the future is fresh"


@rule("list-no-freshness-without-ready")
async def no_freshness(room: Room, told: dict[str, Any]) -> None:
    await room.put(status=READY)
    room.clock.pass_secs(10 * TIMEOUT_SECS)
    assert await room.names() == ["w"]


@rule("list-order")
async def newest_first(room: Room, told: dict[str, Any]) -> None:
    for name in "abc":
        source = await room.put(name, READY)
    room.clock.pass_secs(1)
    await room.client.update(source, "a", 0, READY)
    assert await room.names() == ["a", "c", "b"]
    await room.client.update(source, "b", 0, READY)
    assert await room.names(status_filter=READY) == ["b", "a", "c"], "of one time, the last told comes first"


@rule("list-limit")
async def limited(room: Room, told: dict[str, Any]) -> None:
    for name in "abcde":
        await room.put(name, READY)
    assert await room.names(limit=2) == ["e", "d"]
    assert await room.names(limit=0) == ["e", "d", "c", "b", "a"]
    room.clock.pass_secs(TIMEOUT_SECS)
    source = await room.put("new")
    assert await room.names(limit=2, identity=publication().identity) == ["new", "e"]
    await room.client.update(source, "new", 0, READY)
    assert await room.names(limit=2, status_filter=READY) == ["new"], "the limit took e, freshness dropped it"


@rule("list-min-training-step")
async def training_step(room: Room, told: dict[str, Any]) -> None:
    await room.put("without")
    steps = {"x": {"training_step": "7"}, "y": {"version": "9"}, "z": {"training_step": "seven", "version": "9"}}
    for name, extra in steps.items():
        request = publication(worker_id=name)
        request.identity.extra_parameters.update(extra)
        assert (await room.client.publish(request)).success
    assert set(await room.names(**told["request"])) == {"x", "y"}
    assert await room.names(min_training_step=8) == ["y"]
    refs = {ref.worker_id: ref for ref in await room.client.list()}
    assert [refs[name].training_step if refs[name].HasField("training_step") else None for name in ("x", "y", "z")] == [7, 9, None]


@rule("get-empty-ids", "get-missing")
async def not_found(room: Room, told: dict[str, Any]) -> None:
    expect = told["expect"]
    await room.put()
    answer = await room.client.get(**{{"mx_source_id": "source_id"}.get(name, name): value for name, value in told["request"].items()})
    assert not answer.found
    assert (answer.mx_source_id, answer.worker_id) == (expect["mx_source_id"], expect["worker_id"])
    assert not answer.HasField("worker")


@rule("get-empty-record")
async def no_ranks_left(room: Room, told: dict[str, Any]) -> None:
    """A record without ranks cannot come to be here: it goes with its last one."""
    source = await room.put(status=STALE)
    room.clock.pass_secs(GC_SECS + 1)
    await room.server.reaper.scan()
    answer = await room.client.get(source, "w")
    assert (answer.found, answer.mx_source_id, answer.worker_id) == (False, source, "w")


@rule("get-dual-write")
async def both_fields(room: Room, told: dict[str, Any]) -> None:
    tensors = [{"name": "a", "addr": 1 << 63, "size": 5, "dtype": "torch.bfloat16"}, {"name": "b", "device_id": 2}]
    wanted = [p2p.TensorDescriptor(**tensor) for tensor in tensors]
    for worker in (
        {"tensors": tensors},
        {"tensor_source": {"tensors": tensors}},
        {"tensors": [{"name": "z"}], "tensor_source": {"tensors": tensors}},
    ):
        source = (await room.client.publish(filled({"worker": worker}))).mx_source_id
        found = (await room.client.get(source, "w")).worker
        assert list(found.tensors) == list(found.tensor_source.tensors) == wanted
    await room.client.publish(filled({"worker": {}}))
    found = (await room.client.get(source, "w")).worker
    assert found.WhichOneof("source_payload") == "tensor_source"
    assert (len(found.tensors), len(found.tensor_source.tensors)) == (0, 0)
    await room.client.publish(filled({"worker": {"artifact_source": {"artifact_id": "a", "total_size": 7}}}))
    found = (await room.client.get(source, "w")).worker
    assert found.WhichOneof("source_payload") == "artifact_source"
    assert (found.artifact_source.total_size, len(found.tensors)) == (7, 0)


@rule("get-identity")
async def identity(room: Room, told: dict[str, Any]) -> None:
    source = await room.put(model="Org/Model-7B")
    answer = await room.client.get(source, "w")
    assert answer.identity == publication(model="Org/Model-7B").identity
    assert await room.put("w2", model="ORG/model-7b") == source, "an id knows no case"
    assert (await room.client.get(source, "w")).identity.model_name == "ORG/model-7b", "the last publisher's spelling"
    assert [ref.model_name for ref in await room.client.list()] == ["ORG/model-7b"] * 2
    assert await room.names(model_name_filter="Org/Model-7B") == []
    assert await room.names(model_name_filter="ORG/model-7b") == ["w2", "w"]


@rule("get-stale")
async def stale_is_found(room: Room, told: dict[str, Any]) -> None:
    assert await room.status(await room.put(status=STALE)) == STALE


@rule("upd-no-sid", "upd-no-wid", "upd-bad-enum", "upd-missing", "upd-ok")
async def update(room: Room, told: dict[str, Any]) -> None:
    request, expect = dict(told["request"]), told["expect"]
    source = await room.put(rank=3)
    if told["id"] == "upd-ok":
        request["mx_source_id"] = source
        expect["message"] = expect["message"].replace("'s'", f"'{source}'")
        room.clock.pass_secs(5)
    answer = await room.client.ask("UpdateStatus", p2p.UpdateStatusRequest(**request), p2p.UpdateStatusResponse)
    assert (answer.success, answer.message) == (expect["success"], expect["message"])
    worker = (await room.client.get(source, "w")).worker
    assert (worker.status, worker.updated_at == room.clock.now_ms) == ((READY, True) if answer.success else (UNKNOWN, True))


@rule("upd-any-transition")
async def any_transition(room: Room, told: dict[str, Any]) -> None:
    source = await room.put(status=STALE)
    for status in (READY, UNKNOWN, STALE, INITIALIZING, READY):
        assert (await room.client.update(source, "w", 0, status)).success
        assert await room.status(source) == status


@rule("upd-source-load")
async def source_load(room: Room, told: dict[str, Any]) -> None:
    source = await room.put()
    seen = []
    for load in (0.5, 0.0, None, 0.25, float("nan")):
        await room.client.update(source, "w", 0, READY, load)
        (ref,) = await room.client.list()
        seen.append(ref.source_load if ref.HasField("source_load") else None)
    assert seen == [0.5, 0.0, None, 0.25, None], "no number is no reading"
    await room.client.update(source, "w", 0, READY, 0.5)
    room.clock.pass_secs(TIMEOUT_SECS + 1)
    await room.server.reaper.scan()
    (ref,) = await room.client.list(status_filter=STALE)
    assert not ref.HasField("source_load")


@rule("reaper-active-expired")
async def expired(room: Room, told: dict[str, Any]) -> None:
    source = await room.put("ready", READY)
    await room.put("starting", INITIALIZING)
    room.clock.pass_secs(TIMEOUT_SECS)
    await room.server.reaper.scan()
    assert await room.names(status_filter=STALE) == ["ready"]
    assert (await room.client.get(source, "ready")).worker.updated_at == room.clock.now_ms
    room.clock.pass_secs(1)
    await room.server.reaper.scan()
    assert await room.names(status_filter=STALE) == ["starting", "ready"]


@rule("reaper-stale-gc")
async def collected(room: Room, told: dict[str, Any]) -> None:
    source = await room.put(status=READY)
    room.clock.pass_secs(GC_SECS + TIMEOUT_SECS)
    await room.server.reaper.scan()
    assert await room.status(source) == STALE, "the clock of collection starts here"
    room.clock.pass_secs(GC_SECS)
    await room.server.reaper.scan()
    assert await room.status(source) == STALE
    room.clock.pass_secs(1)
    await room.server.reaper.scan()
    assert await room.status(source) is None
    assert not (await room.client.update(source, "w", 0, READY)).success, "the worker learns that it must publish again"


@rule("reaper-unknown")
async def unknown(room: Room, told: dict[str, Any]) -> None:
    """Never STALE, as upstream; but collected, where upstream keeps it for ever."""
    source = await room.put()
    room.clock.pass_secs(GC_SECS)
    await room.server.reaper.scan()
    assert await room.status(source) == UNKNOWN
    room.clock.pass_secs(1)
    await room.server.reaper.scan()
    assert await room.status(source) is None
