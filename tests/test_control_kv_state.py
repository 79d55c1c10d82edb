"""What is shown of a rank: index's own reason, else the parity loop's."""

import msgspec
import pytest
from shared_memory import shared_segment

from sglfast import _counters as words
from sglfast._counters import RANK_BLIND, RANK_DEGRADED, RANK_EXACT, RANK_SYNCING, RankTable
from sglfast._workers import READY
from sglfast.control.kv_state import RankState, rank_states, shown
from sglfast.shm import PARITY_LOW, RANK_REASONS, WorkerRecord, WorkerView
from sglfast.shm import REASON_FORGOTTEN as FORGOTTEN
from sglfast.shm import REASON_LOST as LOST
from sglfast.shm import REASON_NO_EVENTS as NO_EVENTS
from sglfast.shm import REASON_PAIRS as PAIRS
from sglfast.shm import REASON_REPLAYING as REPLAYING
from sglfast.shm import REASON_UNKNOWN_HISTORY as UNKNOWN

VIEW = WorkerView(
    worker_idx=0, generation=1, state=READY, rank_base=2, dp_size=2, block_size=64, bigram=False, record=WorkerRecord(url="http://w")
)
DOUBTED = msgspec.structs.replace(VIEW, parity=PARITY_LOW)


@pytest.mark.parametrize(
    ("state", "reason", "told"),
    [
        (RANK_EXACT, 0, (RANK_DEGRADED, "the template")),
        (RANK_DEGRADED, UNKNOWN, (RANK_DEGRADED, "the template")),
        (RANK_DEGRADED, LOST, (RANK_DEGRADED, "the template")),
        (RANK_DEGRADED, FORGOTTEN, (RANK_DEGRADED, "the template")),
        (RANK_DEGRADED, PAIRS, (RANK_DEGRADED, RANK_REASONS[PAIRS])),
        (RANK_SYNCING, REPLAYING, (RANK_SYNCING, RANK_REASONS[REPLAYING])),
        (RANK_BLIND, NO_EVENTS, (RANK_BLIND, RANK_REASONS[NO_EVENTS])),
    ],
)
def test_a_bad_verdict_shows_unless_index_knows_more(state: int, reason: int, told: tuple[int, str]) -> None:
    with shared_segment() as (_, segment):
        ranks = RankTable(segment)
        ranks.set(3, words.R_STATE, state)
        ranks.set(3, words.R_REASON, reason)
        ranks.set(3, words.R_OWNED_BLOCKS, 7)
        ranks.set(3, words.R_MISSING, 9)
        found = rank_states(ranks, DOUBTED, "the template")[1]
        assert (found.rank, found.state, found.reason, found.blocks, found.missing_batches) == (1, *told, 7, 9)
        plain = rank_states(ranks, VIEW)[1]
        assert (plain.state, plain.reason) == (state, RANK_REASONS[reason])


def test_the_worker_is_as_its_worst_rank() -> None:
    of = [RankState(0, RANK_EXACT, "", 5, 0), RankState(1, RANK_SYNCING, "replaying", 3, 8), RankState(2, RANK_DEGRADED, "why", 1, 0)]
    assert shown(of[:1]) == {
        "state": "EXACT", "reason": "", "ranks": [{"rank": 0, "state": "EXACT", "reason": "", "blocks": 5, "missing_batches": 0}],
    }  # fmt: skip
    assert (shown(of[:2])["state"], shown(of[:2])["reason"]) == ("SYNCING", "replaying")
    assert (shown(of)["state"], shown(of)["reason"]) == ("DEGRADED", "why")
    assert shown([])["state"] == "BLIND"
    assert shown([RankState(0, RANK_BLIND, "", 0, 0)])["reason"] == "is not followed yet"
    assert "--max-ranks" in shown([])["reason"]
