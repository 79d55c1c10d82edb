"""What a simulated worker keeps back of its stores: whole events or their ends, always the same share, and nothing else."""

from typing import Any

import pytest

from sglfast.sim.silence import Silence, StoreFilter, parse_silence
from sglfast.wire.kv_events import EventOut, cleared, removed, stored

PAGE = 4


def store(n_blocks: int, first: int = 1) -> EventOut:
    hashes = list(range(first, first + n_blocks))
    return stored(block_hashes=hashes, parent_block_hash=None, token_ids=list(range(PAGE * n_blocks)), block_size=PAGE)


def told(share: float, unit: Any, events: list[EventOut], seed: int = 0) -> tuple[list[EventOut], int]:
    stores = StoreFilter(seed)
    stores.silence = Silence(share, unit)
    return stores.published(events), stores.kept_back


def test_without_a_share_everything_is_published() -> None:
    events = [store(3), removed(block_hashes=[1])]
    assert StoreFilter(0).published(events) is events


def test_a_share_of_the_events_is_left_out_whole_and_the_same_ones_each_time() -> None:
    events = [store(3, first) for first in range(1, 4000, 3)]
    left, kept_back = told(0.25, "event", events)
    assert left == told(0.25, "event", events)[0]
    assert left != told(0.25, "event", events, seed=1)[0]
    assert all(event in events for event in left)
    assert 0.7 * len(events) < len(left) < 0.8 * len(events)
    assert kept_back == 3 * (len(events) - len(left))


def test_of_each_event_the_end_is_left_out() -> None:
    left, kept_back = told(0.5, "block", [store(10)])
    assert [event.fields["block_hashes"] for event in left] == [[1, 2, 3, 4, 5]]
    assert left[0].fields["token_ids"] == list(range(5 * PAGE))
    assert left[0].fields["block_size"] == PAGE
    assert kept_back == 5


def test_of_single_blocks_a_share_is_left_out_too() -> None:
    left, kept_back = told(0.5, "block", [store(1, first) for first in range(1, 1001)])
    assert 400 < len(left) < 600
    assert kept_back == 1000 - len(left)


@pytest.mark.parametrize("unit", ["event", "block"])
def test_all_may_be_left_out_but_removals_never(unit: str) -> None:
    events = [removed(block_hashes=[1]), store(3), cleared(), store(1)]
    assert told(1, unit, events) == ([events[0], events[2]], 4)


@pytest.mark.parametrize(
    ("body", "silence"),
    [({}, Silence()), ({"share": 0.5}, Silence(0.5)), ({"share": 1, "unit": "block"}, Silence(1, "block"))],
)
def test_what_can_be_asked_for(body: dict[str, Any], silence: Silence) -> None:
    assert parse_silence(body) == silence


@pytest.mark.parametrize(
    ("body", "word"),
    [({"share": 2}, "share"), ({"share": True}, "share"), ({"share": "1"}, "share"), ({"unit": "batch"}, "unit"), ({"rate": 1}, "'rate'")],
)
def test_what_cannot_be_done_is_named(body: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        parse_silence(body)
