"""control/roles.py: whose word counts, and which pairs do not fit."""

import msgspec
import pytest

from sglfast.control.roles import Found, Named, Traits, mismatches, resolve
from sglfast.shm import Role
from sglfast.wire.server_info import WorkerFacts, parse_server_info

PREFILL, PREFILL_9000, PREFILL_NONE = Named("prefill"), Named("prefill", 9000, True), Named("prefill", None, True)
DECODE, REGULAR = Named("decode"), Named()


def said(mode: object, port: object = None) -> WorkerFacts:
    body = {"disaggregation_mode": mode, "disaggregation_bootstrap_port": port}
    return parse_server_info(msgspec.json.encode({name: value for name, value in body.items() if value is not None}), "http://p:1")


@pytest.mark.parametrize(
    ("named", "facts", "found"),
    [
        # nothing is said: as it was named
        (REGULAR, None, Found("regular", None)),
        (DECODE, None, Found("decode", None)),
        (PREFILL, None, Found("prefill", None, lacks_port=True)),
        (PREFILL_9000, None, Found("prefill", 9000)),
        (PREFILL_NONE, None, Found("prefill", None)),
        (PREFILL, said(None, 8998), Found("prefill", None, lacks_port=True)),
        # the worker's own word
        (PREFILL_9000, said("null", 8998), Found("regular", None)),
        (DECODE, said("null"), Found("regular", None)),
        (REGULAR, said("prefill", 8998), Found("prefill", 8998)),
        (PREFILL, said("prefill", 8998), Found("prefill", 8998)),
        (PREFILL_NONE, said("prefill", 8998), Found("prefill", 8998)),
        (REGULAR, said("decode", 8998), Found("decode", None)),
        (PREFILL_9000, said("decode"), Found("decode", None)),
    ],
)
def test_whose_word_counts(named: Named, facts: WorkerFacts | None, found: Found) -> None:
    assert resolve(named, facts) == found


def test_what_cannot_be_used_is_told_and_changes_nothing() -> None:
    for named in (REGULAR, DECODE, PREFILL, PREFILL_9000, PREFILL_NONE):
        before = resolve(named, None)
        for facts, text in (
            (said("prefill"), "not on which bootstrap port"),
            (said("prefill", 70_000), "bootstrap port"),
            (said("x" * 99), "x" * 40),
        ):
            after = resolve(named, facts)
            assert (after.role, after.bootstrap_port, after.lacks_port) == (before.role, before.bootstrap_port, before.lacks_port)
            assert text in after.problem
            assert len(after.problem) < 150
    other = resolve(PREFILL_9000, said("prefill", 8998))
    assert other == Found("prefill", 8998, problem="its bootstrap port is 8998, as it says itself, not 9000, as it was given")


def traits(url: str, role: Role, tp_size: int | None = 8, dp_size: int | None = 1, method: str | None = None) -> Traits:
    return Traits(url, role, tp_size, dp_size, method)


def test_pairs_that_fit() -> None:
    assert mismatches([]) == []
    assert mismatches([traits("p", "prefill"), traits("d", "decode")]) == []
    assert mismatches([traits("p", "prefill", tp_size=None), traits("d", "decode")]) == []
    followed = traits("p", "prefill", dp_size=4, method="follow_bootstrap_room")
    assert mismatches([followed, traits("d", "decode", dp_size=4, method="round_robin")]) == []


def test_pairs_that_do_not() -> None:
    (text,) = mismatches([traits("p", "prefill", 8), traits("d", "decode", 4), traits("e", "decode", 4)])
    assert text == "prefill and decode workers differ in tp_size (4: d, e; 8: p); transfers between them may fail"
    (text,) = mismatches([traits("p", "prefill", dp_size=2), traits("d", "decode", dp_size=1)])
    assert "differ in dp_size (1: d; 2: p)" in text
    (text,) = mismatches([traits("p", "prefill", method="a"), traits("q", "prefill", method="b")])
    assert "differ in load_balance_method (a: p; b: q)" in text
    (text,) = mismatches([traits(f"p{n}", "prefill", dp_size=2, method="round_robin") for n in range(5)])
    assert text.endswith("need --load-balance-method follow_bootstrap_room: p0, p1, p2 and 2 more")
