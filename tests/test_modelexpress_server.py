"""The gRPC server: sizes, limits, malformed requests, health, metrics, stopping."""

import asyncio
import logging
import urllib.error
import urllib.request
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from mx_harness import Client, Clock, publication, serving, settings, until

from sglfast import __version__
from sglfast.errors import ConfigError
from sglfast.modelexpress import server as server_module
from sglfast.modelexpress.roster import READY, UNKNOWN
from sglfast.modelexpress.schema import HEALTH_SERVICE, P2P_SERVICE, health, p2p
from sglfast.modelexpress.server import Server
from sglfast.modelexpress.sqlite_storage import SqliteStorage
from sglfast.modelexpress.storage import StorageError

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def refusal(call: Awaitable[object]) -> tuple[str, str]:
    """Code and details with which a call ends."""
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details()


async def standard_health(client: Client, service: str) -> int:
    answer = await client.raw("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(service=service).SerializeToString())
    return int(health_pb2.HealthCheckResponse.FromString(answer).status)


def fetch(server: Server, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def samples(text: str) -> dict[str, float]:
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("sglfast_modelexpress_"): float(value) for name, value in rows}


@pytest.mark.parametrize("mebibytes", [8, 64])
def test_large_records(tmp_path: Path, mebibytes: int) -> None:
    """As NIXL metadata, and as tensors: these do not fit twice into a message at 64 MiB, so they come as they were sent."""
    size = mebibytes << 20

    async def main() -> None:
        async with serving(settings(tmp_path / "db")) as (_, client):
            blob = bytes(range(256)) * (size // 256)
            answer = await client.publish(publication(worker_id="nixl", nixl_metadata=blob, n_tensors=0))
            assert (await client.get(answer.mx_source_id, "nixl")).worker.nixl_metadata == blob
            tensors = [p2p.TensorDescriptor(name=f"{i:0>1000}", addr=i, size=i) for i in range(size // 1020)]
            answer = await client.publish(publication(worker_id="te", tensors=tensors))
            assert answer.message.endswith(f" {len(tensors)} tensors)")
            worker = (await client.get(answer.mx_source_id, "te")).worker
            assert list(worker.tensors) == tensors
            assert list(worker.tensor_source.tensors) == (tensors if mebibytes == 8 else [])

    asyncio.run(main())


def test_100_000_tensors_in_one_publish_leave_the_loop_free(tmp_path: Path) -> None:
    """While such records come in, small calls are answered: many in the time of each publish, not one after it."""

    async def main() -> None:
        async with serving(settings(tmp_path / "db")) as (server, client):
            request = publication(worker_id="large", n_tensors=100_000)
            data = request.SerializeToString()
            beats, publishing = 0, True

            async def beat() -> None:
                nonlocal beats
                while publishing:
                    await client.list(limit=1)
                    beats += 1

            beating = asyncio.create_task(beat())
            async with Client(f"127.0.0.1:{server.port}") as other:
                for _ in range(5):
                    answer = p2p.PublishMetadataResponse.FromString(await other.raw("PublishMetadata", data))
                    assert answer.message.endswith(" 100000 tensors)")
                publishing = False
                await beating
                found = await other.get(answer.mx_source_id, "large")
            assert list(found.worker.tensors) == list(found.worker.tensor_source.tensors) == list(request.worker.tensors)
            assert beats >= 10

    asyncio.run(main())


def test_a_message_above_the_limit_is_refused_with_both_sizes(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(settings(tmp_path / "db", max_message_bytes=4096)) as (_, client):
            code, details = await refusal(client.publish(publication(nixl_metadata=bytes(5000), n_tensors=0)))
            assert code == "RESOURCE_EXHAUSTED"
            assert "4096" in details
            assert (await client.publish(publication(nixl_metadata=bytes(3000), n_tensors=0))).success

    asyncio.run(main())


@pytest.mark.parametrize(
    ("method", "data"),
    [("PublishMetadata", b"\x12\x05"), ("PublishMetadata", b"\x0a\x03\x1a\x01\xff"), ("ListSources", b"\x0a\x05"), ("GetMetadata", b"\x0a"),
     ("UpdateStatus", b"\xff" * 12)],
)  # fmt: skip
def test_malformed_requests_are_named(tmp_path: Path, method: str, data: bytes) -> None:
    async def main() -> None:
        async with serving(settings(tmp_path / "db")) as (server, client):
            code, details = await refusal(client.raw(method, data))
            assert code == "INVALID_ARGUMENT"
            assert details.startswith(f"the request is no {method}Request: ")
            assert server.meters.refusals.labels("malformed")._value.get() == 1
            assert await client.list() == []

    asyncio.run(main())


def test_an_unknown_method_is_unimplemented(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(settings(tmp_path / "db")) as (_, client):
            assert (await refusal(client.raw("PublishReady", b"")))[0] == "UNIMPLEMENTED"

    asyncio.run(main())


def test_a_client_has_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that the storage holds up count until they are answered."""
    gate = asyncio.Event()

    class SlowStorage(SqliteStorage):
        async def publish(self, *arguments: Any) -> None:
            await gate.wait()
            await super().publish(*arguments)

    monkeypatch.setattr(server_module, "open_storage", lambda where, prefix: SlowStorage(where))
    config = settings(tmp_path / "db", max_calls_per_client=3, max_inflight_bytes_per_client=20_000)

    async def main() -> None:
        async with serving(config) as (server, client):
            waiting = [asyncio.create_task(client.publish(publication(worker_id=f"w{i}", agent_name="x" * 7000))) for i in range(2)]
            await until(lambda: server._limits._inflight.get("127.0.0.1", (0, 0))[0] == 2, "two calls in flight")
            code, details = await refusal(client.publish(publication(agent_name="x" * 7000)))
            assert (code, "--max-inflight-bytes-per-client" in details) == ("RESOURCE_EXHAUSTED", True)
            waiting.append(asyncio.create_task(client.publish(publication(worker_id="w2"))))
            await until(lambda: server._limits._inflight["127.0.0.1"][0] == 3, "three calls in flight")
            code, details = await refusal(client.list())
            assert (code, "--max-calls-per-client" in details) == ("RESOURCE_EXHAUSTED", True)
            gate.set()
            assert all([(await task).success for task in waiting])
            assert len(await client.list()) == 3
            assert len(server._limits) == 0

    asyncio.run(main())


def test_the_number_of_records_has_a_limit(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(settings(tmp_path / "db", max_records=2)) as (_, client):
            for worker_id in ("a", "b", "a"):
                assert (await client.publish(publication(worker_id=worker_id))).success
            answer = await client.publish(publication(worker_id="c"))
            assert (answer.success, answer.mx_source_id) == (False, "")
            assert answer.message == "Failed to publish metadata: 2 records are stored, the limit is 2 (--max-records)"

    asyncio.run(main())


def test_april_ids_by_switch(tmp_path: Path) -> None:
    async def main(form: str) -> str:
        async with serving(settings(tmp_path / form, source_id_form=form)) as (_, client):
            answer = await client.publish(publication(model="Qwen/Qwen2.5-7B-Instruct"))
            assert len(await client.list(identity=publication(model="qwen/qwen2.5-7b-instruct").identity)) == 1
            return answer.mx_source_id

    assert asyncio.run(main("april")) != asyncio.run(main("current"))


def test_both_health_services(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(settings(tmp_path / "db")) as (_, client):
            answer = await client.ask("/" + HEALTH_SERVICE + "/GetHealth", health.HealthRequest(), health.HealthResponse)
            assert (answer.version, answer.status, answer.uptime < 60) == (__version__, "ok", True)
            for name in ("", P2P_SERVICE, HEALTH_SERVICE):
                assert await standard_health(client, name) == SERVING
            assert (await refusal(standard_health(client, "no.such.Service")))[0] == "NOT_FOUND"

    asyncio.run(main())


def test_while_the_storage_fails_only_its_service_is_not_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    class Failing(SqliteStorage):
        is_failing = False

        async def roster(self) -> Any:
            if self.is_failing:
                raise StorageError("disk on fire")
            return await super().roster()

    storages: list[Failing] = []

    def open_it(where: str, prefix: str) -> Failing:
        storages.append(Failing(where))
        return storages[0]

    monkeypatch.setattr(server_module, "open_storage", open_it)

    async def main() -> None:
        async with serving(settings(tmp_path / "db", metrics_port=0)) as (server, client):
            await client.publish(publication())
            storages[0].is_failing = True
            for _ in range(3):
                assert await client.list() == []
            assert [await standard_health(client, name) for name in (P2P_SERVICE, "")] == [NOT_SERVING, SERVING]
            assert await asyncio.to_thread(fetch, server, "/healthz") == (503, "storage: disk on fire\n")
            code, text = await asyncio.to_thread(fetch, server, "/metrics")
            assert (code, samples(text)['lists_total{result="error"}']) == (200, 3)
            storages[0].is_failing = False
            assert len(await client.list()) == 1
            assert await standard_health(client, P2P_SERVICE) == SERVING
            assert await asyncio.to_thread(fetch, server, "/healthz") == (200, "ok\n")

    with caplog.at_level(logging.INFO, "test.modelexpress"):
        asyncio.run(main())
    told = [record.getMessage() for record in caplog.records if "storage" in record.getMessage()]
    assert told == ["storage fails; calls are answered with failures until it works again", "storage works again"]


def test_metrics_count_what_happens(tmp_path: Path) -> None:
    clock = Clock()

    async def main() -> None:
        async with serving(settings(tmp_path / "db", metrics_port=0), clock) as (server, client):
            for rank in range(3):
                source = (await client.publish(publication(worker_id=f"w{rank}", rank=rank))).mx_source_id
                await client.update(source, f"w{rank}", rank, READY)
            await client.publish(p2p.PublishMetadataRequest())
            await client.update(source, "w0", 0, READY)
            await client.update("none", "w0", 0, READY)
            await client.update(source, "w0", 0, 99)
            await client.get(source, "w0")
            await client.get(source, "none")
            await client.list()
            clock.pass_secs(91)
            await client.update(source, "w2", 2, READY)
            await server.reaper.scan()
            _, text = await asyncio.to_thread(fetch, server, "/metrics")
            found = samples(text)
            wanted = {
                'publishes_total{result="ok"}': 3, 'publishes_total{result="refused"}': 1, 'gets_total{result="found"}': 1,
                'gets_total{result="missing"}': 1, 'lists_total{result="ok"}': 1, 'status_updates_total{result="ok"}': 5,
                'status_updates_total{result="missing"}': 1, 'status_updates_total{result="refused"}': 1,
                'transitions_total{to="UNKNOWN"}': 3, 'transitions_total{to="READY"}': 3, 'transitions_total{to="STALE"}': 2,
                "stale_transitions_total": 2, 'records{status="READY"}': 1, 'records{status="STALE"}': 2, "sources": 1,
                'call_duration_seconds_count{method="UpdateStatus"}': 7, 'refused_calls_total{reason="malformed"}': 0,
            }  # fmt: skip
            assert {name: found[name] for name in wanted} == wanted
            assert found["published_bytes_total"] > 0
            assert not [name for name in found if "_created" in name]

    asyncio.run(main())


def test_one_log_line_a_transition(tmp_path: Path, caplog: Any) -> None:
    clock = Clock()

    async def main() -> None:
        async with serving(settings(tmp_path / "db"), clock) as (server, client):
            source = (await client.publish(publication(model="M", n_tensors=2))).mx_source_id
            for _ in range(4):
                await client.update(source, "w", 0, READY)
            clock.pass_secs(100)
            await server.reaper.scan()
            clock.pass_secs(4000)
            await server.reaper.scan()

    with caplog.at_level(logging.INFO, "test.modelexpress"):
        asyncio.run(main())
    lines = [(record.getMessage(), record.__dict__["fields"]) for record in caplog.records]
    assert [text for text, _ in lines] == ["UNKNOWN, published", "READY, told by the worker", "STALE, no heartbeat", "DELETED, collected"]
    assert {(fields["worker"], fields["rank"]) for _, fields in lines} == {("w", 0)}
    assert lines[0][1]["model"] == "M"
    assert lines[2][1] | {"source": ""} == {"source": "", "worker": "w", "rank": 0, "before": "READY", "silent_secs": 100.0}


def test_a_port_that_is_taken_is_named_and_nothing_stays_open(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(settings(tmp_path / "db", metrics_port=0)) as (server, _):
            for flag, taken in (("port", server.port), ("metrics_port", server.metrics_port)):
                other = Server(settings(tmp_path / "other", **{"metrics_port": -1, flag: taken}), logging.getLogger("test"))
                with pytest.raises(ConfigError, match=rf"--{flag.replace('_', '-')} {taken}: "):
                    await other.start()
            async with serving(settings(tmp_path / "other")) as (_, client):
                assert await client.list() == []

    asyncio.run(main())


def test_stop_waits_for_calls_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, gate = asyncio.Event(), asyncio.Event()

    class SlowStorage(SqliteStorage):
        async def publish(self, *arguments: Any) -> None:
            entered.set()
            await gate.wait()
            await super().publish(*arguments)

    monkeypatch.setattr(server_module, "open_storage", lambda where, prefix: SlowStorage(where))

    async def main() -> None:
        server = Server(settings(tmp_path / "db", shutdown_grace_secs=30.0), logging.getLogger("test"))
        await server.start()
        async with Client(f"127.0.0.1:{server.port}") as client:
            call = asyncio.create_task(client.publish(publication()))
            await entered.wait()
            stopping = asyncio.create_task(server.stop())
            await asyncio.sleep(0.05)
            assert not stopping.done()
            gate.set()
            assert (await call).success
            await stopping
        async with serving(settings(tmp_path / "db2")):
            pass
        storage = SqliteStorage(str(tmp_path / "db"))
        await storage.open()
        assert [entry.state.status for entry in await storage.roster()] == [UNKNOWN]
        await storage.close()

    asyncio.run(main())
