"""modelexpress/client.py against the real service: the four calls, what fails and how it is said, repeating."""

import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from modelexpress_running import HOST, Service, record, run, running_service

from sglfast.errors import ConfigError
from sglfast.modelexpress.client import BackOff, CallFailed, MetadataClient, Refused, parse_address
from sglfast.modelexpress.identity import ServerArguments, arguments_identity
from sglfast.modelexpress.schema import P2P_SERVICE, p2p

IDENTITY = arguments_identity(ServerArguments(model_path="m"))
CLOSED = "127.0.0.1:1"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service() as running:
        yield running


def test_a_record_from_publish_to_ready(service: Service) -> None:
    async def test() -> None:
        async with MetadataClient(f"http://{service.address}/") as client:
            source_id = await client.publish(IDENTITY, record(rank=2), "w1")
            assert len(source_id) == 16
            assert await client.list_sources(IDENTITY, status=p2p.SOURCE_STATUS_READY) == []
            await client.update_status(source_id, "w1", 2, p2p.SOURCE_STATUS_READY)
            (reference,) = await client.list_sources(IDENTITY, status=p2p.SOURCE_STATUS_READY, worker_rank=2)
            assert (reference.mx_source_id, reference.worker_id, reference.model_name, reference.worker_rank) == (source_id, "w1", "m", 2)
            assert await client.list_sources(IDENTITY, worker_rank=1) == []
            answer = await client.get_metadata(source_id, "w1")
            assert answer is not None
            assert answer.worker.tensor_source == record(rank=2).tensor_source
            assert answer.worker.status == p2p.SOURCE_STATUS_READY
            assert await client.get_metadata(source_id, "w2") is None

    run(test())


def test_what_the_server_refuses(service: Service) -> None:
    async def test() -> None:
        async with MetadataClient(service.address) as client:
            with pytest.raises(Refused, match=rf"{service.address} refused PublishMetadata: worker_id is required") as refused:
                await client.publish(IDENTITY, record(), "")
            assert refused.value.message == "worker_id is required"
            with pytest.raises(Refused, match=r"refused UpdateStatus: .*rank 7 not found in source '0123456789abcdef' worker 'gone'"):
                await client.update_status("0123456789abcdef", "gone", 7, p2p.SOURCE_STATUS_READY)

    run(test())


def test_nobody_listens() -> None:
    async def test() -> None:
        async with MetadataClient(CLOSED) as client:
            with pytest.raises(CallFailed, match=r"127.0.0.1:1 did not answer ListSources: StatusCode.UNAVAILABLE: .*connect") as failed:
                await client.list_sources()
            error = failed.value
            assert (error.code, error.method, error.address) == (grpc.StatusCode.UNAVAILABLE, "ListSources", CLOSED)
            assert error.details in str(error)
            assert error.is_worth_repeating

    run(test())


def test_a_server_that_does_not_answer_runs_into_the_deadline() -> None:
    async def test() -> None:
        with socket.create_server((HOST, 0)) as silent:  # the kernel takes connections, nobody reads them
            address = f"{HOST}:{silent.getsockname()[1]}"
            async with MetadataClient(address, timeout_s=0.3) as client:
                with pytest.raises(CallFailed) as failed:
                    await client.get_metadata("s", "w")
            assert failed.value.code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)

    run(test())


def test_a_message_larger_than_the_limit_is_not_repeated(service: Service) -> None:
    async def test() -> None:
        async with MetadataClient(service.address, max_message_bytes=10_000) as client:
            with pytest.raises(CallFailed, match=r"RESOURCE_EXHAUSTED.*larger than max") as failed:
                await client.publish(IDENTITY, record(count=1000), "large")
            assert not failed.value.is_worth_repeating

    run(test())


def test_the_token_of_the_service_account_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read anew for each call; without the file none is sent."""
    file = tmp_path / "token"
    seen: list[object] = []

    async def answer(request: p2p.ListSourcesRequest, context: grpc.aio.ServicerContext) -> p2p.ListSourcesResponse:
        seen.append(dict(context.invocation_metadata() or ()).get("authorization"))
        return p2p.ListSourcesResponse()

    async def test() -> None:
        server = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(answer, p2p.ListSourcesRequest.FromString, p2p.ListSourcesResponse.SerializeToString)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(P2P_SERVICE, {"ListSources": handler}),))
        address = f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}"
        await server.start()
        async with MetadataClient(address, token_path=str(file)) as given, MetadataClient(address) as named:
            await given.list_sources()
            for token in ("first", "renewed"):
                file.write_text(f"{token}\n")
                await given.list_sources()
            await named.list_sources()
        await server.stop(None)

    monkeypatch.setenv("MX_AUTH_TOKEN_PATH", str(file))
    run(test())
    assert seen == [None, "Bearer first", "Bearer renewed", "Bearer renewed"]


class Call:
    """Fails so many times, then answers."""

    def __init__(self, code: grpc.StatusCode, times: int) -> None:
        self._error = CallFailed("h:1", "ListSources", code, "")
        self._times = times
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self._times:
            raise self._error
        return "done"


def test_back_off_repeats_what_may_succeed() -> None:
    async def test() -> None:
        call = Call(grpc.StatusCode.UNAVAILABLE, 2)
        assert await BackOff(attempts=3, first_s=0.001).run(call) == "done"
        assert call.calls == 3
        for code, times, wanted in ((grpc.StatusCode.DEADLINE_EXCEEDED, 9, 3), (grpc.StatusCode.INVALID_ARGUMENT, 1, 1)):
            call = Call(code, times)
            with pytest.raises(CallFailed, match=f"{code}: no details"):
                await BackOff(attempts=3, first_s=0.001).run(call)
            assert call.calls == wanted

    run(test())


def test_pauses_double_to_a_limit_and_differ_by_chance() -> None:
    back_off = BackOff(first_s=1.0, limit_s=10.0)
    for failures, whole_s in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 10.0), (10_000, 10.0)):
        pauses = [back_off.pause_s(failures) for _ in range(50)]
        assert all(whole_s / 2 <= pause <= whole_s for pause in pauses)
        assert len(set(pauses)) > 10


@pytest.mark.parametrize(
    ("given", "address"),
    [("h:8001", "h:8001"), ("http://10.0.0.5:80", "10.0.0.5:80"), ("http://h:1/", "h:1"), ("[::1]:8001", "[::1]:8001")],
)
def test_addresses(given: str, address: str) -> None:
    assert parse_address(given) == address


@pytest.mark.parametrize("given", ["", "h", ":8001", "h:", "h:0", "h:65536", "h:http", "https://h:8001", "grpc://h:1", "h:1/path"])
def test_addresses_that_cannot_be(given: str) -> None:
    with pytest.raises(ConfigError, match="must be host:port"):
        parse_address(given)
