"""sim/rooms.py: the protocol byte by byte, and ends at every moment."""

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from sim_peers import run

from sglfast.errors import ConfigError
from sglfast.sim.rooms import Rooms, TransferError, fetch

IDS = [5, 6, 2**40]
HOST = "127.0.0.1"


class Kept:
    """A request that keeps something in a room."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def transferred(self) -> None:
        self.heard.append("transferred")

    def transfer_failed(self, cause: str) -> None:
        self.heard.append(cause)


@asynccontextmanager
async def opened() -> AsyncIterator[Rooms]:
    rooms = Rooms(HOST, 0)
    await rooms.open()
    try:
        yield rooms
    finally:
        rooms.close()
        await nobody(rooms)


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


async def nobody(rooms: Rooms) -> None:
    await until(lambda: not rooms.callers)


async def until_heard(kept: Kept) -> str:
    await until(lambda: kept.heard)
    (heard,) = kept.heard
    return heard


def test_the_bytes() -> None:
    async def test() -> None:
        async with opened() as rooms:
            kept = Kept()
            rooms.enter(2**63 - 1, kept)
            rooms.fill(2**63 - 1, IDS, 2)
            reader, writer = await asyncio.open_connection(HOST, rooms.port)
            number = struct.pack("<Q", 2**63 - 1)
            for byte in number:  # however it is cut
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.001)
            assert await reader.readexactly(17 + 24) == struct.pack("<BQQ3Q", 0, 2, 3, *IDS)
            assert (kept.heard, rooms.kept) == ([], 1)
            writer.write(b"\x01")
            assert await until_heard(kept) == "transferred"
            assert (rooms.kept, rooms.transfers, rooms.failed) == (0, 1, 0)
            writer.close()

    run(test())


def test_a_failure_is_told_and_remembered() -> None:
    async def test() -> None:
        async with opened() as rooms:
            rooms.enter(4, Kept())
            waiting = asyncio.create_task(fetch(HOST, rooms.port, 4, IDS, 5))
            await until(lambda: rooms.callers)
            rooms.leave(4, "gone fishing")
            for asked in (waiting, fetch(HOST, rooms.port, 4, IDS, 5)):
                with pytest.raises(TransferError, match="gone fishing"):
                    await asked
            rooms.enter(4, Kept())  # a further try of the same request
            rooms.fill(4, IDS, 1)
            assert await fetch(HOST, rooms.port, 4, IDS, 5) == 1

    run(test())


@pytest.mark.parametrize("filled", [False, True])
def test_a_caller_that_hangs_up(filled: bool) -> None:
    async def test() -> None:
        async with opened() as rooms:
            kept = Kept()
            rooms.enter(9, kept)
            if filled:
                rooms.fill(9, IDS, 0)
            reader, writer = await asyncio.open_connection(HOST, rooms.port)
            writer.write(struct.pack("<Q", 9))
            if filled:
                await reader.readexactly(17 + 24)
            else:
                await writer.drain()
                await asyncio.sleep(0.02)
            writer.close()
            assert "closed its connection" in await until_heard(kept)
            assert (rooms.kept, rooms.failed) == (0, 1)

    run(test())


@pytest.mark.parametrize("sent", [b"\x02", b"\x01\x01", b"\x01"])
def test_an_acknowledgement_that_can_be_none(sent: bytes) -> None:
    async def test() -> None:
        async with opened() as rooms:
            kept = Kept()
            rooms.enter(9, kept)  # nothing is computed yet
            reader, writer = await asyncio.open_connection(HOST, rooms.port)
            writer.write(struct.pack("<Q", 9) + sent)
            assert await reader.read() == b""
            writer.close()
            assert "closed its connection" in await until_heard(kept)

    run(test())


def test_a_room_is_asked_for_once() -> None:
    async def test() -> None:
        async with opened() as rooms:
            first = asyncio.create_task(fetch(HOST, rooms.port, 1, IDS, 5))
            await until(lambda: rooms._rooms)
            with pytest.raises(TransferError, match="asked for twice"):
                await fetch(HOST, rooms.port, 1, IDS, 5)
            rooms.enter(1, Kept())
            with pytest.raises(ValueError, match="taken"):
                rooms.enter(1, Kept())
            rooms.fill(1, IDS, 0)
            assert await first == 0

    run(test())


def test_a_room_that_nobody_keeps_is_forgotten_with_its_caller() -> None:
    async def test() -> None:
        async with opened() as rooms:
            with pytest.raises(TransferError, match=r"did not give room 1 within 0\.05 s"):
                await fetch(HOST, rooms.port, 1, IDS, 0.05)
            await nobody(rooms)
            assert not rooms._rooms

    run(test())


def test_a_port_that_is_taken() -> None:
    async def test() -> None:
        async with opened() as rooms:
            with pytest.raises(ConfigError, match="--disaggregation-bootstrap-port"):
                await Rooms(HOST, rooms.port).open()

    run(test())


def test_the_memory_of_past_rooms_is_bounded() -> None:
    rooms = Rooms(HOST, 0)
    for number in range(3000):
        rooms.enter(number, Kept())
        rooms.leave(number, "over")
    assert (len(rooms._past), rooms.kept) == (1024, 0)
