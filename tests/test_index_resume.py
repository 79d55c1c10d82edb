"""An index after one that was killed: which blocks it keeps, and what it takes for a stream to be exact again."""

import logging
import time
from collections.abc import Iterator

import pytest
from kv_publisher import removed, stored, wait_until
from test_index_main import EXACT, House

from sglfast import _counters as words
from sglfast._counters import RANK_SYNCING
from sglfast._workers import FREE
from sglfast.index.main import Index
from sglfast.shm import RANK_REASONS
from sglfast.wire import kv_events

RESUMED = (RANK_SYNCING, RANK_REASONS.index("kept from before the index process started again, not confirmed by the event stream yet"))


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.close()


def killed(house: House) -> None:
    """The index is gone as after kill -9: its threads stop, the shared memory stays as it is. Another one takes its place."""
    memory = house.control.segment_bytes()
    house.index.close()
    house.control.write_bytes(memory)
    house.index = Index(house.control.segment, logging.getLogger("test.index"))


@pytest.mark.parametrize("has_replay", [True, False])
def test_successor_keeps_what_the_stream_confirms(house: House, has_replay: bool) -> None:
    control = house.control
    engine = house.publisher(has_replay=has_replay)
    engine.seq = 200  # not a number of an engine that has just started
    control.put(0, engine, rank_base=3)
    house.index.sync()
    wait_until(lambda: engine.n_subscriptions == 1, engine)
    engine.publish(kv_events.cleared(), stored(1, 4))
    house.wait_exact(3, 1, engine)
    engine.publish(stored(2, 4))
    house.wait_exact(3, 2, engine)
    killed(house)
    wait_until(lambda: engine.n_subscriptions == 0, engine)
    house.index.sync()
    assert control.overlap(3, 1) == control.overlap(3, 2) == 4
    assert control.state(3) == RESUMED
    wait_until(lambda: engine.n_subscriptions == 1, engine)
    if has_replay:
        wait_until(lambda: control.state(3) == EXACT, engine)
        assert engine.requests[-1] == 201
    else:
        time.sleep(0.05)
        assert control.state(3) == RESUMED
    engine.publish(removed(1, 4))
    wait_until(lambda: control.state(3) == EXACT and control.overlap(3, 1) == 0, engine)
    assert control.overlap(3, 2) == 4
    assert control.reader.stats()["live_blocks"] == 4


def test_successor_replays_what_it_missed(house: House) -> None:
    control, engine = house.control, house.publisher()
    engine.publish(stored(1, 4), stored(2, 4))
    control.put(0, engine, rank_base=3)
    house.index.sync()
    house.wait_exact(3, 1, engine)
    killed(house)
    engine.publish(removed(1, 4))
    engine.publish(stored(3, 4))
    house.index.sync()
    house.wait_exact(3, 3, engine)
    assert (control.overlap(3, 1), control.overlap(3, 2)) == (0, 4)
    assert engine.requests == [0, 0]


@pytest.mark.parametrize("has_replay", [True, False])
@pytest.mark.parametrize("change", ["gap", "restart"])
def test_successor_clears_what_the_stream_refutes(house: House, change: str, has_replay: bool) -> None:
    control, engine = house.control, house.publisher(has_replay=has_replay)
    engine.seq = 200
    control.put(0, engine, rank_base=3)
    house.index.sync()
    wait_until(lambda: engine.n_subscriptions == 1, engine)
    engine.publish(kv_events.cleared(), stored(1, 4))
    house.wait_exact(3, 1, engine)
    killed(house)
    wait_until(lambda: engine.n_subscriptions == 0, engine)
    if change == "restart":
        engine.seq = 3
    engine.buffer.clear()
    engine.seq += 2  # lost for ever
    house.index.sync()
    wait_until(lambda: engine.n_subscriptions == 1, engine)
    engine.publish(stored(2, 4))
    wait_until(lambda: control.overlap(3, 2) == 4, engine)
    assert control.overlap(3, 1) == 0
    assert control.state(3) != EXACT


@pytest.mark.parametrize("change", ["gone", "startup_time", "tokens", "endpoint", "adapters", "unknown"])
def test_successor_clears_what_is_not_the_same_stream(house: House, change: str) -> None:
    control = house.control
    engine, other = house.publisher(), house.publisher()
    engine.publish(stored(1, 4))
    if change == "adapters":
        fields = {**stored(2, 4).fields, "lora_name": "ad"}
        engine.publish(kv_events.EventOut("BlockStored", fields))
    control.put(0, engine, rank_base=3, key_route="tokens" if change == "tokens" else "sha256")
    house.index.sync()
    if change == "tokens":
        wait_until(lambda: control.state(3) == EXACT and control.reader.stats()["live_blocks"] == 4, engine)
    else:
        house.wait_exact(3, 1, engine)
    if change == "unknown":
        control.ranks.set(3, words.R_NEXT_SEQ, 0)
    killed(house)
    if change == "gone":
        control.table.set_state(0, FREE)
    elif change in ("startup_time", "endpoint"):
        control.put(0, other if change == "endpoint" else engine, rank_base=3, startup_time=2.0, is_new=False)
    house.index.sync()
    live_blocks = control.reader.stats()["live_blocks"]
    assert live_blocks == 0 or control.state(3) == EXACT  # replayed already
    if change != "gone":
        wait_until(lambda: control.state(3) == EXACT, engine, other)
        assert control.reader.stats()["live_blocks"] == {"endpoint": 0, "adapters": 8}.get(change, 4)
