"""The rules by which a worker is taken in and out, and what counts as a good check."""

import asyncio
import dataclasses
from typing import Any

import pytest
from control_doubles import HANG, ScriptedWorker, answer

from sglfast._workers import JOINING, READY, UNHEALTHY
from sglfast.config import ServeConfig
from sglfast.control.fetch import Fetcher
from sglfast.control.health import HealthMachine, HealthRules, Verdict, check, pause_s, rules_of
from sglfast.control.worker_spec import HealthChange

WORDS = {
    Verdict.NOTHING: ".", Verdict.TAKE_IN: "I", Verdict.TAKE_OUT: "O", Verdict.LOOK_AGAIN: "L", Verdict.OVERDUE: "D", Verdict.FAILED: "F",
}  # fmt: skip


def rules(**fields: Any) -> HealthRules:
    return dataclasses.replace(rules_of(ServeConfig()), **fields)


def verdicts(checks: str, *, failures: int = 3, successes: int = 1, age_s: float = 0.0) -> tuple[str, int]:
    """checks: g(ood), b(ad). Returns a letter for each verdict, and the state at the end."""
    machine = HealthMachine(rules(failure_threshold=failures, success_threshold=successes, startup_timeout_s=60.0))
    said = "".join(WORDS[machine.checked(letter == "g", age_s)] for letter in checks)
    return said, machine.state


@pytest.mark.parametrize(
    ("checks", "said", "state"),
    [
        ("g", "I", READY),
        ("ggg", "I..", READY),
        ("bbbbbg", ".....I", READY),  # a worker may take its time to start
        ("gbbg", "I..L", READY),
        ("gbbb", "I..O", UNHEALTHY),
        ("gbbbbbb", "I..O...", UNHEALTHY),
        ("gbbbg", "I..OI", READY),
        ("gbbgbbgbbb", "I..L..L..O", UNHEALTHY),  # only failures in a row count
        ("bbb", "...", JOINING),
    ],
)
def test_three_failures_take_out_and_one_success_takes_in(checks: str, said: str, state: int) -> None:
    assert verdicts(checks) == (said, state)


def test_thresholds_count_in_a_row() -> None:
    assert verdicts("gbggbgbb", failures=2, successes=2) == ("...IbLbO".replace("b", "."), UNHEALTHY)
    assert verdicts("bgbgg", successes=2) == ("....I", READY)


def test_a_worker_that_does_not_come_up_is_reported_once() -> None:
    assert verdicts("bbbb", age_s=10.0) == ("D...", JOINING)
    assert verdicts("bbbb", age_s=9.9) == ("....", JOINING)
    assert verdicts("bbbb", age_s=59.9) == ("D...", JOINING)
    assert verdicts("bbbb", age_s=60.0) == ("F...", JOINING)
    assert verdicts("bbbg", age_s=60.0) == ("F..I", READY), "a worker that is late is taken all the same"


def test_rules_are_the_flags_unless_a_worker_has_its_own() -> None:
    config = ServeConfig(health_check_interval_secs=7.0, health_failure_threshold=9, worker_startup_timeout_secs=11.0)
    plain = rules_of(config)
    assert (plain.interval_s, plain.failure_threshold, plain.startup_timeout_s, plain.is_off) == (7.0, 9, 11.0, False)
    own = rules_of(config, HealthChange(health_check_interval_secs=1.0, health_success_threshold=4, disable_health_check=True))
    assert (own.interval_s, own.failure_threshold, own.success_threshold, own.is_off) == (1.0, 9, 4, True)
    assert rules_of(ServeConfig(disable_health_check=True)).is_off
    assert not rules_of(ServeConfig(disable_health_check=True), HealthChange(disable_health_check=False)).is_off


def test_rules_may_change_while_checks_are_counted() -> None:
    machine = HealthMachine(rules(failure_threshold=3, success_threshold=1))
    assert [machine.checked(good, 0.0) for good in (True, False, False)] == [Verdict.TAKE_IN, Verdict.NOTHING, Verdict.NOTHING]
    machine.rules = rules(failure_threshold=4, success_threshold=2)
    assert [machine.checked(False, 0.0) for _ in range(2)] == [Verdict.NOTHING, Verdict.TAKE_OUT]
    assert [machine.checked(True, 0.0) for _ in range(2)] == [Verdict.NOTHING, Verdict.TAKE_IN]


def test_pauses() -> None:
    usual = rules(interval_s=5.0, startup_interval_s=3.0)
    assert pause_s(JOINING, 1.0, usual, 4) == 0.2
    assert pause_s(JOINING, 1.0, rules(startup_interval_s=0.1), 4) == 0.1
    assert pause_s(JOINING, 10.0, usual, 4) == 3.0
    assert pause_s(READY, 1.0, usual, 4) == pause_s(UNHEALTHY, 1.0, usual, 4) == 5.0
    # However large the pool, all workers together are asked 500 times a second while they join.
    assert 1000 / pause_s(JOINING, 1.0, usual, 1000) <= 500


def test_only_2xx_is_healthy() -> None:
    async def run() -> list[str]:
        scripts = {"/health": [answer(b"ok"), answer(b"", 204), answer(b"", 503), answer(b"", 302), b"nonsense\r\n\r\n", HANG]}
        async with ScriptedWorker(scripts) as worker, Fetcher() as fetcher:
            return [await check(fetcher, worker.url + "/health", 0.3) for _ in range(6)]

    problems = asyncio.run(run())
    assert problems[:4] == ["", "", "/health: status 503", "/health: status 302"]
    assert problems[4].startswith("no valid HTTP answer")
    assert problems[5] == "no answer within 0.3 s"
