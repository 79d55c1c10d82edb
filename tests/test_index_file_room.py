"""Ranks for which there were too few open files: told, and followed by themselves when there is room."""

import errno
import logging
import os
from collections.abc import Iterator

import pytest
from kv_publisher import Publisher, stored, two_in_a_row, wait_until
from test_index_main import House

from sglfast._counters import R_GENERATION, RANK_BLIND
from sglfast._workers import FREE
from sglfast.index import file_room
from sglfast.index.file_room import FileRoom, files_of, is_for_lack_of_files
from sglfast.index.main import Index
from sglfast.shm import RANK_REASONS

BLIND = (RANK_BLIND, next(i for i, why in enumerate(RANK_REASONS) if "ulimit -n" in why))


class SmallHouse(House):
    """A house whose index may open `limit` files, and whose time passes as the test says."""

    def start_index(self) -> None:
        self.limit: int | None = files_of(2)
        self.index = Index(self.control.segment, logging.getLogger("test.index"), maps_fd=self.maps_fd, file_limit=lambda: self.limit)

    def three_ranks(self) -> tuple[Publisher, Publisher]:
        """Worker 0 with a rank, and worker 1 with two, of which there is no room for the second, whose publisher is returned behind 0's."""
        alone, pair = self.publisher(has_replay=False), two_in_a_row(self.context)
        self.publishers += pair
        self.control.put(0, alone, rank_base=0)
        self.control.put(1, pair[0], rank_base=4, dp_size=2)
        self.index.sync()
        assert self.control.state(5) == BLIND
        self.hear(alone, 0)
        self.hear(pair[0], 4)
        return alone, pair[1]

    def hear(self, publisher: Publisher, rank: int) -> None:
        """The rank is followed: what it says next is heard."""

        def is_followed() -> bool:
            self.index.retry()
            return publisher.n_subscriptions == 1

        wait_until(is_followed, *self.publishers)
        publisher.publish(stored(rank + 1, 4))
        self.wait_exact(rank, rank + 1, *self.publishers)


@pytest.fixture
def house() -> Iterator[SmallHouse]:
    house = SmallHouse()
    yield house
    house.close()


def test_the_limit_is_named(house: SmallHouse, caplog: pytest.LogCaptureFixture) -> None:
    house.three_ranks()
    assert "rank 1 of http://worker-1:1 is not followed: 64 ranks need 576 open files, this process may have 80" in caplog.text
    house.index.retry()
    assert caplog.text.count("is not followed") == 1
    assert house.control.state(5) == BLIND


def test_it_is_followed_when_another_worker_leaves(house: SmallHouse) -> None:
    _, second = house.three_ranks()
    house.control.table.set_state(0, FREE)
    assert house.index.sync()
    assert house.control.state(5) != BLIND
    house.hear(second, 5)
    house.control.table.set_state(1, FREE)
    house.index.sync()
    assert house.control.reader.stats()["live_blocks"] == 0, "it goes with its worker like any other"
    assert house.control.ranks.row(5) == [0] * 32


def test_whoever_changes_keeps_his_place(house: SmallHouse) -> None:
    alone, _ = house.three_ranks()
    house.control.put(0, alone, rank_base=0, startup_time=2.0)
    house.index.sync()
    assert house.control.state(0) != BLIND
    assert house.control.state(5) == BLIND


def test_it_is_followed_when_the_limit_is_raised(house: SmallHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_room, "_FIRST_PAUSE_S", 0.0)
    _, second = house.three_ranks()
    house.index._room.freed()  # the pause that was set before
    for _ in range(3):
        house.index.retry()
        assert house.control.state(5) == BLIND
    house.limit = None
    house.hear(second, 5)


def test_a_worker_that_is_gone_is_not_tried(house: SmallHouse) -> None:
    house.three_ranks()
    house.control.table.set_state(1, FREE)
    house.index.sync()
    house.index.retry()
    assert house.control.ranks.row(5) == [0] * 32


def test_a_file_that_cannot_be_opened_is_no_end(house: SmallHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count is an estimate: the kernel may say no before."""
    engine = house.publisher(has_replay=False)
    house.control.put(0, engine, rank_base=0)
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        patch.setattr(os, "eventfd", refuse)
        house.index.sync()
        assert house.control.state(0) == BLIND
        generation = house.control.ranks.get(0, R_GENERATION)
        house.index._room.freed()
        house.index.retry()
        assert (house.control.state(0), house.control.ranks.get(0, R_GENERATION)) == (BLIND, generation), "in vain, and still told"
    house.hear(engine, 0)


def test_pauses_double_up_to_a_minute_and_begin_anew_when_a_stream_is_closed() -> None:
    room, now_s, pauses = FileRoom(lambda: 0), 100.0, []
    room.wait((0, 1), now_s)
    for _ in range(8):
        began_s = now_s
        while not (due := list(room.due(now_s))):
            now_s += 0.5
        pauses.append(now_s - began_s)
        assert due == [(0, 1)]
        room.wait((0, 1), now_s)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert not room.due(now_s)
    room.freed()
    room.wait((2, 0), now_s)
    assert list(room.due(now_s)) == [(0, 1), (2, 0)], "at once, in the order in which they came"
    room.wait((0, 1), now_s)
    room.wait((2, 0), now_s)
    room.forget(0)
    assert not room.due(now_s + 1.9)
    assert list(room.due(now_s + 2)) == [(2, 0)]
    assert not room.due(now_s + 1000)
    room.wait((0, 1), now_s)
    assert list(room.due(now_s + 1)) == [(0, 1)]


def test_what_is_for_lack_of_files() -> None:
    assert is_for_lack_of_files(OSError(errno.EMFILE, ""))
    assert is_for_lack_of_files(OSError(errno.ENFILE, ""))
    assert not is_for_lack_of_files(OSError(errno.EINVAL, ""))
    assert not is_for_lack_of_files(ValueError())
    assert FileRoom(None).has_for(1 << 40)
