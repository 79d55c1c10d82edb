"""When a worker is taken in and out: the rules, without sockets and without a clock.

Runs in: control, one HealthMachine a worker, fed by pool_watch.

  JOINING    -- success_threshold good checks in a row -->  READY       (however many bad ones came before: it is still starting)
  READY      -- failure_threshold bad checks in a row  -->  UNHEALTHY
  UNHEALTHY  -- success_threshold good checks in a row -->  READY
"""

import enum

from sglfast._workers import JOINING, READY, UNHEALTHY
from sglfast.control.fetch import Fetcher, FetchError

QUICK_FOR_S = 10.0  # a worker that has just joined is polled quickly for this long
_QUICK_PAUSE_S = 0.2
_CHECKS_PER_S = 500  # of all workers together while they join; a check costs control about 0.3 ms


class Verdict(enum.Enum):
    """What a check's result changes."""

    NOTHING = enum.auto()
    TAKE_IN = enum.auto()  # now READY
    TAKE_OUT = enum.auto()  # now UNHEALTHY
    LOOK_AGAIN = enum.auto()  # READY as before, but it failed in between: it may be another engine now
    OVERDUE = enum.auto()  # still JOINING after QUICK_FOR_S; said once
    FAILED = enum.auto()  # still JOINING after its time to start; said once


class HealthMachine:
    """The state of one worker. Thresholds: checks in a row; startup_timeout_s: a worker that is still not ready then is called failed."""

    def __init__(self, *, failure_threshold: int, success_threshold: int, startup_timeout_s: float) -> None:
        self.state: int = JOINING
        self._startup_timeout_s = startup_timeout_s
        self._failure_threshold = failure_threshold
        self._success_threshold = success_threshold
        self._good = 0
        self._bad = 0
        self._is_overdue = False
        self._has_failed = False

    def apply(self, *, failure_threshold: int, success_threshold: int, startup_timeout_s: float) -> None:
        """Go on with other thresholds; what was counted counts."""
        self._failure_threshold = failure_threshold
        self._success_threshold = success_threshold
        self._startup_timeout_s = startup_timeout_s

    def checked(self, is_good: bool, age_s: float) -> Verdict:
        """Take a check's result. age_s: time since the worker was registered."""
        if not is_good:
            self._good, self._bad = 0, self._bad + 1
            if self.state == READY and self._bad >= self._failure_threshold:
                self.state = UNHEALTHY
                return Verdict.TAKE_OUT
            if self.state == JOINING and age_s >= self._startup_timeout_s and not self._has_failed:
                self._has_failed = self._is_overdue = True
                return Verdict.FAILED
            if self.state == JOINING and age_s >= QUICK_FOR_S and not self._is_overdue:
                self._is_overdue = True
                return Verdict.OVERDUE
            return Verdict.NOTHING
        had_failed = self._bad > 0
        self._good, self._bad = self._good + 1, 0
        if self.state == READY:
            return Verdict.LOOK_AGAIN if had_failed else Verdict.NOTHING
        if self._good < self._success_threshold:
            return Verdict.NOTHING
        self.state = READY
        return Verdict.TAKE_IN


def pause_s(state: int, age_s: float, interval_s: float, pool_size: int, startup_interval_s: float) -> float:
    """Pause before the next check of a worker, before jitter. startup_interval_s: for a worker that was never ready."""
    if state != JOINING:
        return interval_s
    if age_s < QUICK_FOR_S:
        return min(startup_interval_s, max(_QUICK_PAUSE_S, pool_size / _CHECKS_PER_S))
    return startup_interval_s


async def check(fetcher: Fetcher, url: str, timeout_s: float) -> str:
    """Ask a health endpoint; returns what is wrong, the empty string for a 2xx."""
    try:
        answer = await fetcher.get(url, timeout_s)
    except FetchError as error:
        return str(error)
    return "" if answer.is_good else f"status {answer.status}"
