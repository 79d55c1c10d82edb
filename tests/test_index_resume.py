"""An index after one that was killed: which blocks it keeps, and what it takes for a stream to be exact again."""

import os
import time
from collections.abc import Iterator

import pytest
from kv_publisher import removed, stored, wait_until
from test_index_main import EXACT, SIZES, House

from sglfast import _counters as words
from sglfast import shm
from sglfast._counters import RANK_SYNCING
from sglfast._workers import FREE
from sglfast.shm import RANK_REASONS, KeyRoute
from sglfast.wire import kv_events

RESUMED = (RANK_SYNCING, RANK_REASONS.index("kept from before the index process started again, not confirmed by the event stream yet"))
ASKING = (RANK_SYNCING, RANK_REASONS.index("replaying missed events"))


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.close()


def killed(house: House) -> None:
    """The index is gone as after kill -9: its threads stop, the shared memory stays as it is. Another one takes its place."""
    memory, maps = house.control.segment_bytes(), used_parts(house.maps_fd)
    house.index.close()
    assert used_parts(house.maps_fd) == {}, "a process that ends in order gives its maps' memory back"
    house.control.write_bytes(memory)
    for at, data in maps.items():
        os.pwrite(house.maps_fd, data, at)
    house.start_index()


def used_parts(fd: int) -> dict[int, bytes]:
    """What a sparse file holds, by its place there."""
    parts: dict[int, bytes] = {}
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # nothing behind
            return parts
        end = os.lseek(fd, start, os.SEEK_HOLE)
        parts[start] = os.pread(fd, end - start, start)


routes = pytest.mark.parametrize("key_route", ["sha256", "tokens"])


@routes
@pytest.mark.parametrize("has_replay", [True, False])
def test_successor_keeps_what_the_stream_confirms(house: House, has_replay: bool, key_route: KeyRoute) -> None:
    control = house.control
    control.key_route = key_route
    engine = house.publisher(has_replay=has_replay)
    engine.seq = 200  # not a number of an engine that has just started
    control.put(0, engine, rank_base=3, key_route=key_route)
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
    assert control.state(3) in ((RESUMED, ASKING) if has_replay else (RESUMED,))
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


@routes
def test_successor_replays_what_it_missed(house: House, key_route: KeyRoute) -> None:
    control, engine = house.control, house.publisher()
    control.key_route = key_route
    engine.publish(stored(1, 4), stored(2, 4))
    control.put(0, engine, rank_base=3, key_route=key_route)
    house.index.sync()
    house.wait_exact(3, 1, engine)
    killed(house)
    engine.publish(removed(1, 4))
    engine.publish(stored(3, 4))
    house.index.sync()
    house.wait_exact(3, 3, engine)
    assert (control.overlap(3, 1), control.overlap(3, 2)) == (0, 4)
    assert engine.requests == [0, 0]


@routes
@pytest.mark.parametrize("has_replay", [True, False])
@pytest.mark.parametrize("change", ["gap", "restart"])
def test_successor_clears_what_the_stream_refutes(house: House, change: str, has_replay: bool, key_route: KeyRoute) -> None:
    control, engine = house.control, house.publisher(has_replay=has_replay)
    control.key_route = key_route
    engine.seq = 200
    control.put(0, engine, rank_base=3, key_route=key_route)
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


@pytest.mark.parametrize("change", ["gone", "startup_time", "endpoint", "map", "header", "unknown"])
@pytest.mark.parametrize("kind", ["sha256", "adapters", "tokens"])
def test_successor_clears_what_is_not_the_same_stream(house: House, kind: str, change: str) -> None:
    control = house.control
    key_route: KeyRoute = "tokens" if kind == "tokens" else "sha256"
    control.key_route = key_route
    engine, other = house.publisher(has_replay=False), house.publisher(has_replay=False)
    control.put(0, engine, rank_base=3, key_route=key_route)
    house.index.sync()
    wait_until(lambda: engine.n_subscriptions == 1, engine)
    engine.publish(stored(1, 4))
    house.wait_exact(3, 1, engine)
    if kind == "adapters":
        engine.publish(kv_events.EventOut("BlockStored", {**stored(2, 4).fields, "lora_name": "ad"}))
    n_blocks = 8 if kind == "adapters" else 4
    wait_until(lambda: control.reader.stats()["live_blocks"] == n_blocks, engine)
    wait_until(lambda: control.ranks.get(3, words.R_MAPPED_BLOCKS) == {"sha256": 0, "adapters": 4, "tokens": 4}[kind], engine)
    if change == "unknown":
        control.ranks.set(3, words.R_NEXT_SEQ, 0)
    if change == "header":
        for at in used_parts(house.maps_fd):
            os.pwrite(house.maps_fd, bytes(8), at)
    if change == "map":
        os.close(house.maps_fd)
        house.maps_fd = shm.create_maps(max_ranks=SIZES["max_ranks"], capacity_blocks=SIZES["capacity_blocks"])
    killed(house)
    if change == "gone":
        control.table.set_state(0, FREE)
    elif change in ("startup_time", "endpoint"):
        control.put(0, other if change == "endpoint" else engine, rank_base=3, startup_time=2.0, is_new=False, key_route=key_route)
    house.index.sync()
    is_kept = kind == "sha256" and change in ("map", "header")  # there is no map, and none is needed
    assert control.reader.stats()["live_blocks"] == (4 if is_kept else 0)
    assert used_parts(house.maps_fd) == {}
    assert is_kept == (change != "gone" and control.state(3) == RESUMED)


@pytest.mark.parametrize("key_route", ["sha256", "tokens"])
def test_adapters_blocks_are_removed_by_the_successor(house: House, key_route: KeyRoute) -> None:
    """Also behind a hybrid model's cache of another number, which only the first event tells."""
    control, engine = house.control, house.publisher(has_replay=False)
    engine.seq = 200
    control.put(0, engine, rank_base=3, key_route=key_route)
    house.index.sync()
    wait_until(lambda: engine.n_subscriptions == 1, engine)
    more = {"lora_name": "ad", "group_idx": 2}
    root = {**stored(2, 4).fields, **more, "kv_cache_spec_kind": "full_attention"}
    engine.publish(kv_events.cleared(), kv_events.EventOut("BlockStored", root))
    wait_until(lambda: control.ranks.get(3, words.R_NEXT_SEQ) == 202, engine)
    assert control.reader.stats()["live_blocks"] == 4
    killed(house)
    wait_until(lambda: engine.n_subscriptions == 0, engine)
    house.index.sync()
    wait_until(lambda: engine.n_subscriptions == 1, engine)
    engine.publish(kv_events.EventOut("BlockRemoved", {**removed(2, 3).fields, "group_idx": 2}))
    wait_until(lambda: control.state(3) == EXACT, engine)
    assert control.reader.stats()["live_blocks"] == 1
