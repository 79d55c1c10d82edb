"""modelexpress/seed.py against the real service: publish, heartbeat, lost records, a service that comes and goes, the end."""

import asyncio
import logging
import socket

import grpc
import pytest
from modelexpress_running import HOST, Service, record, run, running_service, until

from sglfast.modelexpress.client import BackOff, CallFailed, MetadataClient, ModelExpressError
from sglfast.modelexpress.identity import ServerArguments, arguments_identity
from sglfast.modelexpress.schema import p2p
from sglfast.modelexpress.seed import Seed

IDENTITY = arguments_identity(ServerArguments(model_path="m"))
QUICK = BackOff(first_s=0.05, limit_s=0.2)
STALE_FLAGS = ("--heartbeat-timeout-secs", "1", "--scan-interval-secs", "0.2")


async def status_of(client: MetadataClient, seed: Seed) -> p2p.SourceStatus | None:
    answer = await client.get_metadata(seed.source_id, seed.worker_id)
    return answer.worker.status if answer is not None else None


async def ready_ids(client: MetadataClient) -> list[str]:
    return [one.worker_id for one in await client.list_sources(IDENTITY, status=p2p.SOURCE_STATUS_READY)]


def test_published_ready_and_stale_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async def test(service: Service) -> None:
        async with MetadataClient(service.address) as client:
            async with Seed(client, IDENTITY, record()) as seed:
                await seed.wait_ready(10)
                assert seed.is_ready
                assert len(seed.worker_id) == 32
                assert await ready_ids(client) == [seed.worker_id]
            assert not seed.is_ready
            assert await status_of(client, seed) == p2p.SOURCE_STATUS_STALE
            assert await ready_ids(client) == []
            await seed.stop()  # twice does nothing

    caplog.set_level(logging.INFO, "modelexpress")
    with running_service() as service:
        run(test(service))
    assert [one.message for one in caplog.records] == ["record READY", "record STALE: this worker ends"]
    assert {one.fields["worker_rank"] for one in caplog.records} == {0}  # type: ignore[attr-defined]


def test_heartbeats_keep_it_and_their_end_makes_it_stale() -> None:
    async def test(service: Service) -> None:
        async with MetadataClient(service.address) as client:
            beating = Seed(client, IDENTITY, record(), interval_s=0.2)
            silent = Seed(client, IDENTITY, record(), interval_s=3600)
            for seed in (beating, silent):
                seed.start()
                await seed.wait_ready(10)

            async def is_alone() -> bool:
                return await ready_ids(client) == [beating.worker_id]

            await until(is_alone, "the silent one becomes STALE, the other stays")
            assert beating.heartbeats > silent.heartbeats == 1
            assert beating.publishes == 1
            for seed in (beating, silent):
                await seed.stop()

    with running_service(*STALE_FLAGS) as service:
        run(test(service))


def test_a_service_that_lost_its_store_gets_the_record_again() -> None:
    """Two refusals in a row, then a publish; not after one."""

    async def test(service: Service) -> None:
        async with MetadataClient(service.address) as client, Seed(client, IDENTITY, record(), interval_s=0.1, back_off=QUICK) as seed:
            await seed.wait_ready(10)
            await asyncio.to_thread(service.stop)
            await asyncio.to_thread(service.start)

            async def is_back() -> bool:
                return seed.publishes == 2 and await ready_ids(client) == [seed.worker_id]

            await until(is_back, "published again")
            assert seed.is_ready
            assert seed.last_error is None

    with running_service() as service:
        run(test(service))


def test_one_refusal_is_not_yet_a_loss() -> None:
    async def test(service: Service) -> None:
        async with MetadataClient(service.address) as client, Seed(client, IDENTITY, record(), interval_s=0.05, back_off=QUICK) as seed:
            await seed.wait_ready(10)
            source_id, seed.source_id = seed.source_id, "0123456789abcdef"

            async def is_refused() -> bool:
                return seed.last_error is not None

            await until(is_refused, "a heartbeat for another source is refused")
            assert not seed.is_ready
            seed.source_id = source_id
            await seed.wait_ready(10)
            assert seed.publishes == 1

    with running_service() as service:
        run(test(service))


def test_a_service_that_comes_later_is_found() -> None:
    async def test(service: Service) -> None:
        async with MetadataClient(service.address) as client, Seed(client, IDENTITY, record(), back_off=QUICK) as seed:
            with pytest.raises(CallFailed, match=r"did not answer PublishMetadata: StatusCode.UNAVAILABLE") as failed:
                await seed.wait_ready(0.5)
            assert failed.value.code == grpc.StatusCode.UNAVAILABLE
            await asyncio.to_thread(service.start)
            await seed.wait_ready(20)

    with running_service() as service:
        service.stop()
        run(test(service))


def test_an_end_without_a_service_is_bounded_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def test(service: Service) -> None:
        async with MetadataClient(service.address) as client:
            seed = Seed(client, IDENTITY, record())
            seed.start()
            await seed.wait_ready(10)
            await asyncio.to_thread(service.stop)
            await asyncio.wait_for(seed.stop(grace_s=0.3), 10)

    with running_service() as service:
        run(test(service))
    assert "record could not be marked STALE" in caplog.text


def test_a_server_that_says_nothing_is_named() -> None:
    async def test() -> None:
        with socket.create_server((HOST, 0)) as silent:  # the kernel takes connections, nobody reads them
            address = f"{HOST}:{silent.getsockname()[1]}"
            async with MetadataClient(address) as client:
                seed = Seed(client, IDENTITY, record())
                seed.start()
                with pytest.raises(ModelExpressError, match=f"{address} did not answer within 0.2 s"):
                    await seed.wait_ready(0.2)
                await seed.stop(grace_s=0.1)
                assert seed.source_id == ""

    run(test())
