"""When a worker is taken in and out: the rules, without sockets and without a clock.

Runs in: control, one HealthMachine a worker, fed by pool_watch.

  JOINING    -- success_threshold good checks in a row -->  READY       (however many bad ones came before: it is still starting)
  READY      -- failure_threshold bad checks in a row  -->  UNHEALTHY
  UNHEALTHY  -- success_threshold good checks in a row -->  READY
"""

import enum
from dataclasses import dataclass
from urllib.parse import urlsplit

from sglfast._workers import JOINING, READY, UNHEALTHY
from sglfast.config import ServeConfig
from sglfast.control.fetch import Fetcher, FetchError
from sglfast.control.worker_spec import HealthChange

QUICK_FOR_S = 10.0  # a worker that has just joined is polled quickly for this long
_QUICK_PAUSE_S = 0.2
_CHECKS_PER_S = 500  # of all workers together while they join; a check costs control about 0.3 ms


@dataclass(frozen=True, slots=True)
class HealthRules:
    """How a worker is checked.

    is_off: it counts as healthy without a check; thresholds: checks in a row; startup_timeout_s: a worker that is still not ready
    then is called failed.
    """

    interval_s: float
    startup_interval_s: float
    timeout_s: float
    success_threshold: int
    failure_threshold: int
    startup_timeout_s: float
    is_off: bool = False


def rules_of(config: ServeConfig, wanted: HealthChange | None = None) -> HealthRules:
    """The flags' rules, and what was asked for one worker instead."""
    wanted = wanted or HealthChange()
    return HealthRules(
        interval_s=wanted.health_check_interval_secs or config.health_check_interval_secs,
        startup_interval_s=config.worker_startup_check_interval,
        timeout_s=wanted.health_check_timeout_secs or config.health_check_timeout_secs,
        success_threshold=wanted.health_success_threshold or config.health_success_threshold,
        failure_threshold=wanted.health_failure_threshold or config.health_failure_threshold,
        startup_timeout_s=config.worker_startup_timeout_secs,
        is_off=config.disable_health_check if wanted.disable_health_check is None else wanted.disable_health_check,
    )


class Verdict(enum.Enum):
    """What a check's result changes."""

    NOTHING = enum.auto()
    TAKE_IN = enum.auto()  # now READY
    TAKE_OUT = enum.auto()  # now UNHEALTHY
    LOOK_AGAIN = enum.auto()  # READY as before, but it failed in between: it may be another engine now
    OVERDUE = enum.auto()  # still JOINING after QUICK_FOR_S; said once
    FAILED = enum.auto()  # still JOINING after its time to start; said once


class HealthMachine:
    """The state of one worker. rules: may be replaced at any time; what was counted counts."""

    def __init__(self, rules: HealthRules) -> None:
        self.state: int = JOINING
        self.rules = rules
        self._good = 0
        self._bad = 0
        self._is_overdue = False
        self._has_failed = False

    def checked(self, is_good: bool, age_s: float) -> Verdict:
        """Take a check's result. age_s: time since the worker was registered."""
        if not is_good:
            self._good, self._bad = 0, self._bad + 1
            if self.state == READY and self._bad >= self.rules.failure_threshold:
                self.state = UNHEALTHY
                return Verdict.TAKE_OUT
            if self.state == JOINING and age_s >= self.rules.startup_timeout_s and not self._has_failed:
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
        if self._good < self.rules.success_threshold:
            return Verdict.NOTHING
        self.state = READY
        return Verdict.TAKE_IN


def pause_s(state: int, age_s: float, rules: HealthRules, pool_size: int) -> float:
    """Pause before the next check of a worker, before jitter."""
    if state != JOINING:
        return rules.interval_s
    if age_s < QUICK_FOR_S:
        return min(rules.startup_interval_s, max(_QUICK_PAUSE_S, pool_size / _CHECKS_PER_S))
    return rules.startup_interval_s


async def check(fetcher: Fetcher, url: str, timeout_s: float, api_key: str | None = None) -> str:
    """Ask a health endpoint; returns what is wrong, with the path where the worker does answer, the empty string for a 2xx."""
    try:
        answer = await fetcher.get(url, timeout_s, api_key=api_key)
    except FetchError as error:
        return str(error)
    return "" if answer.is_good else f"{urlsplit(url).path}: status {answer.status}"
