"""Signals as KeyboardInterrupt: in plain code, in callbacks of the loop, before and after it."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import pytest
from conftest import SeededRandom

from sglfast.load.interrupts import Interrupts

SIGNALS = (signal.SIGTERM, signal.SIGINT)
TRIES = 20


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def killed(after_s: float, number: int, what: Callable[[], object]) -> None:
    """Do something while the signal comes."""
    threading.Timer(after_s, os.kill, (os.getpid(), number)).start()
    what()


@pytest.mark.parametrize("number", SIGNALS)
def test_plain_code(number: int) -> None:
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        killed(0.05, number, lambda: time.sleep(20))


class Busy(asyncio.Protocol):
    """Sends what comes back, and is nearly always inside this callback."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        end_s = time.perf_counter() + 0.0005
        while time.perf_counter() < end_s:
            pass
        self.transport.write(data)


async def busy(log: list[str]) -> None:
    loop = asyncio.get_running_loop()
    ends = socket.socketpair()
    transports = []
    try:
        for end in ends:
            transports.append((await loop.create_connection(Busy, sock=end))[0])
        transports[0].write(b"x")
        await asyncio.sleep(10)
        log.append("nobody ended it")
    finally:
        for transport in transports:
            transport.abort()
        for end in ends:  # one that a signal left without a transport
            end.close()
        await asyncio.sleep(0)
        log.append("cleaned")


def run_busy(interrupts: Interrupts, log: list[str]) -> None:
    interrupts.run(busy(log))


def test_callbacks_of_the_loop_lose_no_signal(rng: SeededRandom, capfd: pytest.CaptureFixture[str]) -> None:
    for attempt in range(TRIES):
        log: list[str] = []
        with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
            killed(rng.uniform(0.0, 0.1), SIGNALS[attempt % 2], partial(run_busy, interrupts, log))
        assert log in ([], ["cleaned"])
    assert capfd.readouterr().err == ""


def test_interrupt_that_was_swallowed_is_remembered() -> None:
    with Interrupts() as interrupts:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        log: list[str] = []
        start_s = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            interrupts.run(busy(log))
        assert log == []
        assert time.monotonic() - start_s < 5


def test_cancellation_that_was_swallowed_ends_with_the_coroutine() -> None:
    async def stubborn() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(20)
        return 1

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        interrupts.run(stubborn())


def test_without_a_signal() -> None:
    async def fine() -> int:
        await asyncio.sleep(0)
        return 7

    async def cancelled() -> None:
        raise asyncio.CancelledError

    async def wrong() -> None:
        raise ValueError("wrong")

    with Interrupts() as interrupts:
        assert interrupts.run(fine()) == 7
        with pytest.raises(asyncio.CancelledError):
            interrupts.run(cancelled())
        with pytest.raises(ValueError, match="wrong"):
            interrupts.run(wrong())
        assert interrupts.run(fine()) == 7


def test_sigint_that_the_parent_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            interrupts.run(asyncio.sleep(0.01))
            with pytest.raises(KeyboardInterrupt):
                killed(0.05, signal.SIGTERM, lambda: interrupts.run(asyncio.sleep(20)))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
