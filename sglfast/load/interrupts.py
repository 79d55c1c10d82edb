"""SIGTERM and Ctrl-C as one KeyboardInterrupt that is never lost, so that the owner of a Stack always leaves it.

Runs in: `sglfast demo`, `sglfast replay`; main thread. Contract: within an Interrupts either signal ends what runs: plain code by
    KeyboardInterrupt where it is, a coroutine of `run` by being cancelled, whereupon `run` raises KeyboardInterrupt. A SIGINT that
    the parent had ignored (a job in the background) stays ignored.
Why: Python raises from a signal's handler into whatever code runs. In a callback of uvloop that exception is printed and gone, and the
    program goes on; so while a loop runs the handler raises nothing. The request is remembered too, for code that swallowed it.
"""

import asyncio
import signal
from collections.abc import Coroutine
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import uvloop

T = TypeVar("T")


class Interrupts:
    """A context manager; within it coroutines are run by `run`, one at a time."""

    def __init__(self) -> None:
        self._is_asked = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._before: dict[int, Any] = {}  # signal -> its handler outside

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True
        if self._loop is None:
            raise KeyboardInterrupt
        if self._task is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)  # it also wakes a loop that waits

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in a loop of its own to its end. Raises KeyboardInterrupt when a signal has come, whenever it came."""
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                self._loop = runner.get_loop()
                result = runner.run(self._cancellable(work))
        except asyncio.CancelledError:
            if not self._is_asked:
                raise
        finally:
            self._loop = self._task = None
            work.close()  # does nothing unless a signal came before it began
        if self._is_asked:
            raise KeyboardInterrupt
        return result

    async def _cancellable(self, work: Coroutine[Any, Any, T]) -> T:
        self._task = asyncio.current_task()
        if self._is_asked:
            raise asyncio.CancelledError
        return await work
