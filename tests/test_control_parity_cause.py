"""The words for an operator: what index knows, else the likeliest thing first."""

import pytest

from sglfast.control.parity_cause import Counts, Evidence, likely_cause
from sglfast.shm import PARITY_HIGH, PARITY_LOW, RANK_REASONS, REASON_LOST, REASON_NOT_KEPT, REASON_PAIRS, REASON_UNKNOWN_HISTORY

UNKNOWN, LOST, PAIRS = RANK_REASONS[REASON_UNKNOWN_HISTORY], RANK_REASONS[REASON_LOST], RANK_REASONS[REASON_PAIRS]
SOME = Counts(exact=20, low=10, untold=9)


@pytest.mark.parametrize(
    ("verdict", "evidence", "said", "unsaid"),
    [
        (PARITY_LOW, Evidence(), ["the router's prompts", "template"], ["out of its KV events"]),
        (PARITY_LOW, Evidence(has_stored=False), ["events do not come", "template"], []),
        (PARITY_LOW, Evidence(reasons=(LOST,)), ["lost", "if that lasts", "template"], []),
        (PARITY_LOW, Evidence(reasons=(UNKNOWN,), has_stored=False), ["history", "if that lasts", "template"], ["do not come"]),
        (PARITY_LOW, Evidence(SOME), ["leaves stored blocks out of its KV events", "template"], ["--tokenizer-path", "copy"]),
        (PARITY_LOW, Evidence(Counts(low=8), has_overlap=True), ["applied long after", "template"], ["leaves"]),
        (PARITY_LOW, Evidence(Counts(low=8, untold=1), has_overlap=True), ["leaves stored blocks out of its KV events"], ["long after"]),
        (PARITY_LOW, Evidence(Counts(low=8), has_overlap=True, n_ranks=4), ["leaves stored blocks out of its KV events"], ["long after"]),
        (PARITY_LOW, Evidence(Counts(low=8), has_overlap=True, n_ranks=4, is_steered=True), ["applied long after"], ["leaves"]),
        (PARITY_LOW, Evidence(SOME, engine="vllm"), ["out of its KV events", "the removal of one copy"], []),
        (PARITY_LOW, Evidence(SOME, reasons=(LOST,)), ["lost", "if that lasts", "out of its KV events"], []),
        (PARITY_LOW, Evidence(SOME, is_index_full=True), ["--kv-index-blocks", "template"], ["leaves"]),
        (PARITY_LOW, Evidence(Counts(exact=9, low=20, over=15)), ["whole prompts as cached"], ["template", "leaves"]),
        (PARITY_LOW, Evidence(Counts(exact=9, low=20, untold=9, over=2), has_overlap=True), ["leaves"], ["whole prompts"]),
        (PARITY_HIGH, Evidence(reasons=(LOST,)), ["lost"], []),
        (PARITY_HIGH, Evidence(), ["salts", "prefix cache is off"], []),
        (PARITY_HIGH, Evidence(n_ranks=4), ["over its 4 data-parallel ranks"], []),
        (PARITY_HIGH, Evidence(reasons=(LOST,), n_ranks=4), ["lost"], ["spreads"]),
        (PARITY_HIGH, Evidence(n_ranks=4, is_steered=True), ["the engine ignores X-Data-Parallel-Rank"], []),
        (PARITY_HIGH, Evidence(reasons=(LOST,), n_ranks=4, is_steered=True), ["lost"], ["ignores"]),
        (PARITY_LOW, Evidence(n_ranks=4, is_steered=True), ["template"], ["ignores"]),
    ],
)
def test_the_cause_is_named(verdict: int, evidence: Evidence, said: list[str], unsaid: list[str]) -> None:
    cause = likely_cause(verdict, evidence)
    assert all(word in cause for word in said)
    assert not any(word in cause for word in unsaid)


@pytest.mark.parametrize("reasons", [(PAIRS,), (LOST, PAIRS)])
def test_what_index_has_found_out_is_no_guess(reasons: tuple[str, ...]) -> None:
    for counts in (Counts(), SOME):
        assert likely_cause(PARITY_LOW, Evidence(counts, reasons)) == "; ".join(reasons)


def test_losses_of_the_past_are_no_last_word() -> None:
    cause = likely_cause(PARITY_LOW, Evidence(reasons=(LOST, RANK_REASONS[REASON_NOT_KEPT])))
    assert cause.startswith(f"{LOST}; {RANK_REASONS[REASON_NOT_KEPT]}; if that lasts, ")


def test_weighted_samples_add_up() -> None:
    seen = Counts(4, 3, 2, 1, 1).plus(Counts(8, 4, 2, 2, 0), 0.5)
    assert seen == Counts(8, 5, 3, 2, 1)
    assert seen.samples == 16
    assert seen.minus(seen) == Counts()
