"""How far the KV index may be trusted, rank by rank, in words: for /metrics and /workers.

Runs in: control. Theory: index tells what it knows of a rank's event stream and blocks; the parity loop (control/parity) tells whether what
    follows from them agrees with the worker. A rank whose stream is EXACT and whose predictions are wrong is DEGRADED, for the cause
    that the parity loop has found; where index itself knows a reason, that one stands.
"""

from dataclasses import dataclass, replace
from typing import Any

from sglfast import _counters as words
from sglfast._counters import RANK_BLIND, RANK_DEGRADED, RANK_EXACT, RankTable
from sglfast.shm import PARITY_OK, PASSING_REASONS, RANK_REASONS, RANK_STATES, WorkerView

_NO_RANKS = "has no ranks in the KV index: it publishes no KV events, or --max-ranks is too low"
_NOT_FOLLOWED = "is not followed yet"
# A bad verdict names them, too, if they may be its cause.
_OF_THE_PAST = tuple(RANK_REASONS[reason] for reason in PASSING_REASONS)
# What an operator has to look at first comes first.
_URGENCY = (RANK_DEGRADED, RANK_BLIND, words.RANK_SYNCING, RANK_EXACT)


@dataclass(frozen=True, slots=True)
class RankState:
    """state: RANK_*; reason: "" when EXACT; missing_batches: known to have been published and not applied yet."""

    rank: int
    state: int
    reason: str
    blocks: int
    missing_batches: int


def rank_states(ranks: RankTable, view: WorkerView, parity_cause: str = "") -> list[RankState]:
    """The ranks of a worker; none when it has found no place in the index. parity_cause: of the worker's verdict, if it is a bad one."""
    found = []
    for rank in range(view.dp_size):
        row = ranks.row(view.rank_base + rank)
        state, reason = row[words.R_STATE], row[words.R_REASON]
        text = RANK_REASONS[reason] if reason < len(RANK_REASONS) else ""
        if view.parity != PARITY_OK and (state == RANK_EXACT or (state == RANK_DEGRADED and text in _OF_THE_PAST)):
            state, text = RANK_DEGRADED, parity_cause
        found.append(RankState(rank, state, text, row[words.R_OWNED_BLOCKS], row[words.R_MISSING]))
    return found


def shown(states: list[RankState]) -> dict[str, Any]:
    """The same as JSON: the worker's state is that of the rank that needs most attention."""
    if not states:
        return {"state": RANK_STATES[RANK_BLIND], "reason": _NO_RANKS, "ranks": []}
    states = [replace(rank, reason=_NOT_FOLLOWED) if rank.state == RANK_BLIND and not rank.reason else rank for rank in states]
    worst = min(states, key=lambda rank: _URGENCY.index(rank.state))
    rows = [
        {"rank": of.rank, "state": RANK_STATES[of.state], "reason": of.reason, "blocks": of.blocks, "missing_batches": of.missing_batches}
        for of in states
    ]
    return {"state": RANK_STATES[worst.state], "reason": worst.reason, "ranks": rows}
