"""Where the ranks' maps of engine hashes lie: a region each, of a file that all index processes get; none where there is no such file."""

import logging
import os
from collections.abc import Iterator

import pytest
from shared_memory import shared_segment

from sglfast import shm
from sglfast._segment import Segment
from sglfast.index.key_maps import KeyMaps

LOG = logging.getLogger("test.maps")
ONE, TWO = (1).to_bytes(8, "little"), (2).to_bytes(8, "little")


@pytest.fixture
def memory() -> Iterator[tuple[int, Segment]]:
    with shared_segment() as (_, segment):
        fd = shm.create_maps(max_ranks=segment.max_ranks, capacity_blocks=segment.capacity_blocks)
        yield fd, segment
        os.close(fd)


def test_each_rank_has_its_own(memory: tuple[int, Segment]) -> None:
    fd, segment = memory
    maps = KeyMaps(fd, segment, LOG)
    for rank in (0, 1, 63):
        key_map, is_left = maps.take(rank, 100 + rank, is_left=True)
        assert not is_left
        key_map.put(ONE, rank.to_bytes(8, "little"))
    assert os.fstat(fd).st_blocks * 512 == 3 * 8192
    for rank in (0, 1, 63):
        key_map, is_left = KeyMaps(fd, segment, LOG).take(rank, 100 + rank, is_left=True)
        assert (is_left, key_map.get(1)) == (True, rank)


@pytest.mark.parametrize(("owner", "is_left"), [(7, False), (8, True)])
def test_what_is_not_taken_over_is_released(memory: tuple[int, Segment], owner: int, is_left: bool) -> None:
    fd, segment = memory
    KeyMaps(fd, segment, LOG).take(5, 7, is_left=False)[0].put(ONE, TWO)
    key_map, was_left = KeyMaps(fd, segment, LOG).take(5, owner, is_left=is_left)
    assert (was_left, len(key_map), os.fstat(fd).st_blocks) == (False, 0, 0)


def test_an_abandoned_region_is_not_used_again(memory: tuple[int, Segment]) -> None:
    fd, segment = memory
    maps = KeyMaps(fd, segment, LOG)
    before, _ = maps.take(5, 7, is_left=False)
    maps.abandon(5)
    after, _ = maps.take(5, 8, is_left=False)
    after.put(TWO, TWO)
    before.put(ONE, ONE)
    assert (before.get(2), after.get(1)) == (None, None)
    assert not KeyMaps(fd, segment, LOG).take(5, 8, is_left=True)[1]


def test_without_a_file_a_map_dies_with_its_process(memory: tuple[int, Segment], caplog: pytest.LogCaptureFixture) -> None:
    _, segment = memory
    other = shm.create_maps(max_ranks=128, capacity_blocks=1000)
    for place in (None, other):
        maps = KeyMaps(place, segment, LOG)
        key_map, is_left = maps.take(0, 7, is_left=True)
        key_map.put(ONE, TWO)
        assert (is_left, key_map.get(1)) == (False, 2)
        assert not maps.take(0, 7, is_left=True)[1]
    assert [record.getMessage() for record in caplog.records] == [
        "the file of the engine-hash maps is of another build of sglfast: what is in it is not used"
    ]
    assert os.fstat(other).st_blocks == 0
    os.close(other)


def test_regions_have_room_for_what_a_rank_can_have() -> None:
    for capacity_blocks in (1, 1000, 1 << 20, 1 << 31):
        n_bytes = shm.map_region_bytes(capacity_blocks)
        assert n_bytes % 65536 == 0
        assert n_bytes // 32 * 3 // 4 >= 2 * capacity_blocks + 1024 + 1_000_000
    fd = shm.create_maps(max_ranks=1024, capacity_blocks=1 << 31)
    os.close(fd)
