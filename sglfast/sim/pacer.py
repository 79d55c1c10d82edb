"""Runs an engine in real time: each step ends at its own moment, however late the loop was for the one before.

Runs in: sim, on the event loop. Contract: one timer at most, whatever the number of streams. A loop that was held up finishes
    the steps it missed at once, with the times they should have had; the engine lets no request into a step before its arrival,
    so catching up never makes an answer faster than the model says. The owner calls `stop` before it drops the engine.
"""

import asyncio
import time

from sglfast.sim.engine import Engine, Generation

# Timers of uvloop have milliseconds; a step that is due within half of one is done now. No error adds up: the next step
# begins when this one should have ended.
SLACK_S = 0.0005
# Steps done in one go before other callbacks get their turn.
STEPS_PER_TURN = 32


class Pacer:
    """Owns the timer of one engine."""

    __slots__ = ("_engine", "_handle", "_loop")

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._handle: asyncio.Handle | None = None

    def submit(self, generation: Generation) -> None:
        """Hand a request to the engine; its sink is told from the loop, never from within this call."""
        self._engine.submit(generation, time.monotonic())
        if self._handle is None:
            self._arm()

    def stop(self) -> None:
        """End all progress: no sink is told after this."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _arm(self) -> None:
        """Wait for the end of the next step, if there is one."""
        end_s = self._engine.start_step()
        if end_s is None:
            self._handle = None
            return
        delay_s = end_s - time.monotonic()
        self._handle = self._loop.call_later(delay_s, self._wake) if delay_s > SLACK_S else self._loop.call_soon(self._wake)

    def _wake(self) -> None:
        due_s = time.monotonic() + SLACK_S
        for _ in range(STEPS_PER_TURN):
            end_s = self._engine.start_step()
            if end_s is None or end_s > due_s:
                break
            self._engine.end_step()
        self._arm()
