"""modelexpress/target.py against the real service: who is offered, in which order, and what is passed over."""

import asyncio
from collections.abc import Iterator

import pytest
from modelexpress_running import Service, record, run, running_service, tensors

from sglfast.modelexpress.client import BackOff, CallFailed, MetadataClient
from sglfast.modelexpress.identity import ServerArguments, arguments_identity
from sglfast.modelexpress.schema import p2p
from sglfast.modelexpress.target import Candidate, NoSource, WrongRecord, find_candidates

QUICK = BackOff(attempts=2, first_s=0.02, limit_s=0.1)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service() as running:
        yield running


def identity(model: str, tp_size: int = 1) -> p2p.SourceIdentity:
    return arguments_identity(ServerArguments(model_path=model, tp_size=tp_size))


async def publish(
    client: MetadataClient, model: str, worker_id: str, *, rank: int = 0, status: p2p.SourceStatus = p2p.SOURCE_STATUS_READY
) -> str:
    source_id = await client.publish(identity(model), record(rank=rank, session=f"{worker_id}:1"), worker_id)
    await client.update_status(source_id, worker_id, rank, status)
    await asyncio.sleep(0.005)  # the service's clock has milliseconds, and the next one is to be fresher
    return source_id


async def found(client: MetadataClient, model: str, rank: int = 0, **more: object) -> list[Candidate]:
    return [one async for one in find_candidates(client, identity(model), rank, back_off=QUICK, **more)]  # type: ignore[arg-type]


def test_freshest_first_of_the_same_rank(service: Service) -> None:
    async def test() -> None:
        async with MetadataClient(service.address) as client:
            for worker_id in ("old", "middle", "new", "newest"):
                source_id = await publish(client, "order", worker_id)
            await publish(client, "order", "other-rank", rank=1)
            await publish(client, "order", "not-ready", status=p2p.SOURCE_STATUS_INITIALIZING)
            await publish(client, "order", "stale", status=p2p.SOURCE_STATUS_STALE)
            await client.update_status(source_id, "middle", 0, p2p.SOURCE_STATUS_READY)  # a heartbeat
            offered = await found(client, "order")
            assert [one.worker_id for one in offered] == ["middle", "newest", "new"]
            assert [one.worker_id for one in await found(client, "order", limit=10)] == ["middle", "newest", "new", "old"]
            assert [one.worker_id for one in await found(client, "order", exclude={"middle", "new"})] == ["newest", "old"]
            assert [one.worker_id for one in await found(client, "order", rank=1)] == ["other-rank"]
            first = offered[0]
            assert (first.source_id, first.session_id) == (source_id, "middle:1")
            assert list(first.tensors) == tensors()
            assert first.updated_at_ms == max(one.updated_at_ms for one in offered) > 1_700_000_000_000
            first.check_tensors({f"layer.{i}": 4096 for i in range(3)})

    run(test())


def test_nobody_offers_them(service: Service) -> None:
    async def test() -> None:
        async with MetadataClient(service.address) as client:
            with pytest.raises(NoSource, match=rf"{service.address} has no source for model=absent, rank=3: none READY with this identity"):
                await found(client, "absent", rank=3)
            await publish(client, "ranks", "w0")
            with pytest.raises(NoSource, match=r"model=ranks, rank=1: 1 READY of other ranks or excluded\. A seed must run"):
                await found(client, "ranks", rank=1)
            with pytest.raises(NoSource):
                await found(client, "ranks", exclude=["w0"])

    run(test())


def test_a_seed_that_comes_later_is_waited_for(service: Service) -> None:
    async def test() -> None:
        async with MetadataClient(service.address) as client:
            waiting = asyncio.create_task(found(client, "later", wait_s=20))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            await publish(client, "later", "w0")
            assert [one.worker_id for one in await waiting] == ["w0"]

    run(test())


def test_records_that_cannot_be_had_are_passed_over(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with MetadataClient(service.address) as client:
            for worker_id in ("good", "fails", "gone", "stale"):
                await publish(client, "pass-over", worker_id)
            real = client.get_metadata

            async def get_metadata(source_id: str, worker_id: str) -> p2p.GetMetadataResponse | None:
                """What happens between the list and the record."""
                if worker_id == "stale":
                    await client.update_status(source_id, worker_id, 0, p2p.SOURCE_STATUS_STALE)
                if worker_id == "fails":
                    async with MetadataClient("127.0.0.1:1") as dead:
                        return await dead.get_metadata(source_id, worker_id)
                return await real(source_id, "nobody" if worker_id == "gone" else worker_id)

            monkeypatch.setattr(client, "get_metadata", get_metadata)
            assert [one.worker_id for one in await found(client, "pass-over", limit=4)] == ["good"]
            with pytest.raises(NoSource, match=r"no record could be had: .*gone has no record any more; .*StatusCode.UNAVAILABLE"):
                await found(client, "pass-over", limit=2)

    run(test())


def test_no_server() -> None:
    async def test() -> None:
        async with MetadataClient("127.0.0.1:1") as client:
            with pytest.raises(CallFailed, match=r"did not answer ListSources: StatusCode.UNAVAILABLE"):
                await found(client, "m")

    run(test())


def candidate(worker: p2p.WorkerMetadata) -> Candidate:
    return Candidate("s", "w", 0, worker)


def test_records_of_another_transport_are_named() -> None:
    for worker, kind in ((p2p.WorkerMetadata(nixl_metadata=b"agent"), "nixl_metadata"), (p2p.WorkerMetadata(), "no transport")):
        with pytest.raises(WrongRecord, match=f"worker w has {kind}, not transfer_engine_session_id"):
            _ = candidate(worker).session_id


def test_tensors_of_old_and_new_records() -> None:
    assert list(candidate(p2p.WorkerMetadata(tensors=tensors(2))).tensors) == tensors(2)
    assert list(candidate(p2p.WorkerMetadata(tensor_source=p2p.TensorSourceMetadata(tensors=tensors(2)))).tensors) == tensors(2)
    assert not candidate(p2p.WorkerMetadata(worker_grpc_endpoint="10.0.0.1:6555")).tensors


@pytest.mark.parametrize(
    ("local", "message"),
    [
        ({"layer.0": 4096, "layer.9": 1}, "worker w does not list layer.9"),
        ({"layer.1": 8192}, r"layer.1 with 4096 bytes \(seed\), here it has 8192"),
    ],
)
def test_tensors_that_do_not_fit_are_named(local: dict[str, int], message: str) -> None:
    with pytest.raises(WrongRecord, match=message):
        candidate(record()).check_tensors(local)
