"""sim/weights.py: copying between real sockets, peers that fail, and workers whose directory the test plays."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from sim_peers import FAST, WAIT_S, run

from sglfast.errors import ConfigError
from sglfast.sim.settings import SimSettings
from sglfast.sim.simulator import Simulator
from sglfast.sim.weights import BASE_ADDRESS, TENSOR_BYTES, Copier, Model, Peer, Tensor, WeightsError, WeightServer

RATE = 1e12
HOST = "127.0.0.1"


class FakeDirectory:
    """A WeightDirectory that is a list."""

    def __init__(self, *peers: Peer) -> None:
        self.peers = list(peers)
        self.announced: list[str] = []
        self.asked: list[str] = []
        self.is_closed = False

    async def find(self, model: Model) -> AsyncGenerator[Peer]:
        for peer in list(self.peers):
            self.asked.append(peer.endpoint)
            yield peer

    async def announce(self, model: Model, endpoint: str) -> None:
        self.announced.append(endpoint)
        self.peers.append(peer_of(model, endpoint))

    async def close(self) -> None:
        self.is_closed = True


def peer_of(model: Model, endpoint: str) -> Peer:
    return Peer(endpoint, {tensor.name: tensor for tensor in model.tensors})


def test_a_model_is_cut_into_tensors_and_its_bytes_are_one_pattern() -> None:
    model = Model("m", 2 * TENSOR_BYTES + 5)
    assert [(tensor.address - BASE_ADDRESS, tensor.size_bytes) for tensor in model.tensors] == [
        (0, TENSOR_BYTES), (TENSOR_BYTES, TENSOR_BYTES), (2 * TENSOR_BYTES, 5),
    ]  # fmt: skip
    assert len({tensor.name for tensor in model.tensors}) == 3

    def content(one: Model, address: int, size_bytes: int, piece: int) -> bytes:
        parts = []
        while size_bytes:
            parts.append(bytes(one.chunk(address, min(piece, size_bytes))))
            address, size_bytes = address + len(parts[-1]), size_bytes - len(parts[-1])
        return b"".join(parts)

    whole = content(model, BASE_ADDRESS, model.size_bytes, 1 << 30)
    assert len(whole) == model.size_bytes
    assert content(model, BASE_ADDRESS + 77, 3 << 20, 65_521) == whole[77 : 77 + (3 << 20)]
    assert content(Model("m", model.size_bytes), BASE_ADDRESS, 1 << 20, 1 << 20) == whole[: 1 << 20]
    assert content(Model("other", model.size_bytes), BASE_ADDRESS, 1 << 20, 1 << 20) != whole[: 1 << 20]
    assert whole[:4096] != whole[TENSOR_BYTES : TENSOR_BYTES + 4096]


def copied(
    peers: Callable[[Model, WeightServer], list[Peer]], size_bytes: int = 3 << 20, rate: float = RATE
) -> tuple[FakeDirectory, list[str]]:
    """Copy from peers of which the last is a real server; returns the directory, and what progress was told."""
    seen: list[str] = []
    model = Model("m", size_bytes)
    directory = FakeDirectory()

    async def test() -> None:
        server = WeightServer(model, HOST)
        await server.open()
        try:
            copier = Copier(model, rate, seen.append)
            directory.peers += peers(model, server)
            assert await copier.copy(directory) == server.endpoint
            assert copier.copied_bytes == size_bytes == server.sent_bytes
        finally:
            await server.close()

    run(test())
    return directory, seen


def test_every_byte_is_copied_and_progress_told() -> None:
    _, seen = copied(lambda model, server: [peer_of(model, server.endpoint)], size_bytes=TENSOR_BYTES + 123)
    assert len(seen) > 10
    assert set(seen) == {seen[0]}


def test_bandwidth_is_kept() -> None:
    start_s = time.monotonic()
    copied(lambda model, server: [peer_of(model, server.endpoint)], size_bytes=1 << 20, rate=float(4 << 20))
    assert time.monotonic() - start_s >= 0.24  # a lower bound: a slow machine takes longer


def test_a_peer_that_is_not_there_is_passed_over() -> None:
    directory, _ = copied(lambda model, server: [peer_of(model, f"{HOST}:1"), peer_of(model, server.endpoint)])
    assert directory.asked[0] == f"{HOST}:1"
    assert len(directory.asked) == 2


@pytest.mark.parametrize("kind", ["another size", "a tensor less"])
def test_a_peer_with_other_tensors_is_passed_over_before_a_byte(kind: str) -> None:
    def peers(model: Model, server: WeightServer) -> list[Peer]:
        other = {tensor.name: tensor for tensor in model.tensors}
        last = model.tensors[-1]
        if kind == "another size":
            other[last.name] = Tensor(last.name, last.address, last.size_bytes + 1)
        else:
            del other[last.name]
        return [Peer(server.endpoint, other), peer_of(model, server.endpoint)]

    copied(peers, size_bytes=TENSOR_BYTES + 9)


async def with_peer(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], use: Callable[[str], Awaitable[None]]
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(handle, HOST, 0)
    try:
        await use(f"{HOST}:{server.sockets[0].getsockname()[1]}")
    finally:
        server.close()
        await server.wait_closed()


def test_a_peer_that_dies_half_way_is_continued_elsewhere() -> None:
    """What came whole stays; a torn tensor is read again."""

    async def test() -> None:
        model = Model("m", 2 * TENSOR_BYTES + 100)
        good = WeightServer(model, HOST)
        await good.open()
        copier = Copier(model, RATE, lambda source: None)
        asked: list[bytes] = []

        async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for size_bytes in (TENSOR_BYTES, 1000):
                asked.append(await reader.readexactly(16))
                address = int.from_bytes(asked[-1][:8], "little")
                for start in range(0, size_bytes, 1000):
                    writer.write(bytes(model.chunk(address + start, min(1000, size_bytes - start))))
                await writer.drain()

        async def use(endpoint: str) -> None:
            await copier.copy(FakeDirectory(peer_of(model, endpoint), peer_of(model, good.endpoint)))

        try:
            await with_peer(dies, use)
            assert copier.copied_bytes == model.size_bytes
            assert good.sent_bytes == model.size_bytes - TENSOR_BYTES
        finally:
            await good.close()

    run(test())


def test_wrong_bytes_are_seen() -> None:
    async def test() -> None:
        model = Model("m", 100_000)

        async def lies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(16)
            data = bytearray(model.chunk(BASE_ADDRESS, 100_000))
            data[77_777] ^= 1
            writer.write(data)
            await writer.drain()
            await reader.read()

        async def use(endpoint: str) -> None:
            with pytest.raises(WeightsError, match=rf"no peer gave the weights of m \({endpoint}: model.layers.0.weight differs"):
                await Copier(model, RATE, lambda source: None).copy(FakeDirectory(peer_of(model, endpoint)))

        await with_peer(lies, use)

    run(test())


def test_nobody_has_them() -> None:
    async def test() -> None:
        with pytest.raises(WeightsError, match=r"no peer gave the weights of m \(there is none\)"):
            await Copier(Model("m", 10), RATE, lambda source: None).copy(FakeDirectory())

    run(test())


@pytest.mark.parametrize("request_", [(0, 4), (BASE_ADDRESS - 1, 4), (BASE_ADDRESS, 1 << 63), (BASE_ADDRESS + 999, 2)])
def test_a_read_outside_the_weights_ends_the_connection(request_: tuple[int, int]) -> None:
    async def test() -> None:
        server = WeightServer(Model("m", 1000), HOST)
        await server.open()
        reader, writer = await asyncio.open_connection(HOST, server.port)
        writer.write(request_[0].to_bytes(8, "little") + request_[1].to_bytes(8, "little"))
        assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
        writer.close()
        assert server.sent_bytes == 0
        await server.close()

    run(test())


def test_closing_cuts_whoever_reads() -> None:
    async def test() -> None:
        server = WeightServer(Model("m", 64 << 20), HOST)
        await server.open()
        reader, writer = await asyncio.open_connection(HOST, server.port)
        writer.write(BASE_ADDRESS.to_bytes(8, "little") + (64 << 20).to_bytes(8, "little"))
        await reader.readexactly(1000)
        await asyncio.wait_for(server.close(), WAIT_S)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await asyncio.wait_for(reader.readexactly(64 << 20), WAIT_S)
        writer.close()

    run(test())


# ---- in workers ----


async def stats(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(url + "/sim/stats") as response:
        body: dict[str, Any] = await response.json()
        return body


def test_a_target_copies_listens_and_offers_them_too(rng: random.Random) -> None:
    size_bytes = rng.randrange(1, 3 << 20)

    async def test() -> None:
        directory = FakeDirectory()
        told: list[tuple[int, int]] = []
        seed = SimSettings(workers=1, base_port=0, mx_server="play:1", mx_model_bytes=size_bytes, **FAST)
        target = SimSettings(
            workers=2, base_port=0, mx_server="play:1", mx_role="target", mx_model_bytes=size_bytes, mx_bandwidth_bytes_per_s=1e9, **FAST
        )
        async with Simulator(seed, directory) as seeds, aiohttp.ClientSession() as session:
            assert len(directory.announced) == 1
            assert (await stats(session, seeds.workers[0].url))["weights"] == {
                "role": "seed", "size": size_bytes, "copied": 0, "source": "", "endpoint": directory.announced[0], "sent": 0,
            }  # fmt: skip
            async with Simulator(target, directory, lambda done, size, source: told.append((done, size))) as targets:
                assert len(directory.announced) == 3
                for worker, endpoint in zip(targets.workers, directory.announced[1:], strict=True):
                    assert (await stats(session, worker.url))["weights"] == {
                        "role": "target", "size": size_bytes, "copied": size_bytes, "source": directory.announced[0], "endpoint": endpoint,
                        "sent": 0,
                    }  # fmt: skip
                assert told == sorted(told)
                assert told[-1] == (2 * size_bytes, 2 * size_bytes)
            assert directory.is_closed
            assert (await stats(session, seeds.workers[0].url))["weights"]["sent"] == 2 * size_bytes

    run(test())


def test_workers_without_weights_say_so() -> None:
    async def test() -> None:
        async with Simulator(SimSettings(workers=1, base_port=0, **FAST)) as simulator, aiohttp.ClientSession() as session:
            assert (await stats(session, simulator.workers[0].url))["weights"] is None

    run(test())


def test_a_target_that_finds_nobody_does_not_start() -> None:
    async def test() -> None:
        directory = FakeDirectory()
        settings = SimSettings(workers=2, base_port=0, mx_server="play:1", mx_role="target", **FAST)
        with pytest.raises(WeightsError, match="there is none"):
            async with Simulator(settings, directory):
                raise AssertionError("it has no weights")
        assert directory.is_closed

    run(test())


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="--mx-server: only `sglfast sim`"):
        Simulator(SimSettings(mx_server="h:1"))
    for name, value in (("mx_model_bytes", 0), ("mx_model_bytes", 1 << 41), ("mx_bandwidth_bytes_per_s", 0.0)):
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} {value}"):
            Simulator(SimSettings(**{name: value}))  # type: ignore[arg-type]
