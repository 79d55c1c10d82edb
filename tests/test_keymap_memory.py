"""A map of engine hashes outlives its process: whole, torn in every way that a kill can tear it, or damaged."""

import mmap
import os
import signal
import struct
import time
from collections.abc import Iterator

import pytest
from conftest import SeededRandom
from test_keymap import packed, unpacked

from sglfast._keymap import KeyMap

REGION = 1 << 20  # room for 32,768 slots
OWNER = 0xFEED
Op = tuple[str, list[int]]


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("maps")
    os.ftruncate(fd, 3 * REGION)
    yield fd
    os.close(fd)


def opened(fd: int, owner: int = OWNER) -> KeyMap:
    """The map of the file's middle region."""
    return KeyMap(fd, REGION, REGION, owner)


def successor(fd: int) -> KeyMap:
    map_ = opened(fd)
    assert map_.adopt()
    return map_


def key_of(hash_: int) -> int:
    """Every test gives a hash always the same key, so that a pair that nobody made shows."""
    return hash_ * 7 + 1 & 2**64 - 1


def put(map_: KeyMap, hashes: list[int]) -> None:
    map_.put(packed(hashes), packed([key_of(hash_) for hash_ in hashes]))


def contents(map_: KeyMap) -> set[int]:
    """The hashes that the map lists, and finds, each with its own key."""
    hashes, keys = map(unpacked, map_.items())
    assert len(map_) == len(hashes) == len(set(hashes))
    assert keys == [key_of(hash_) for hash_ in hashes]
    assert map_.find(packed(hashes)) == (packed(hashes), packed(keys))
    return set(hashes)


def header(fd: int) -> tuple[int, int, int]:
    """(magic, owner, slots of the table)"""
    magic, owner, n_slots = struct.unpack("<QQQ", os.pread(fd, 24, REGION))
    return magic, owner, n_slots


class Table:
    """The pairs of the middle region's table as they lie there."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.n_slots = header(fd)[2]
        self.at = REGION + 16 * self.n_slots

    def read(self) -> list[tuple[int, int]]:
        words = struct.unpack(f"<{2 * self.n_slots}Q", os.pread(self.fd, 16 * self.n_slots, self.at))
        return list(zip(words[::2], words[1::2], strict=True))

    def write(self, i: int, pair: tuple[int, int]) -> None:
        os.pwrite(self.fd, struct.pack("<QQ", *pair), self.at + 16 * i)


def used_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_an_empty_map_takes_no_memory(fd: int) -> None:
    map_ = opened(fd)
    assert (len(map_), map_.get(1), map_.find(packed([1]))) == (0, None, (b"", b""))
    map_.drop(packed([1]))
    map_.put(b"", b"")
    assert used_bytes(fd) == 0
    put(map_, list(range(20_000)))
    assert used_bytes(fd) == 4096 + 16 * 32_768, "no table but the one in use"
    map_.clear()
    assert used_bytes(fd) == 4096
    assert contents(successor(fd)) == set()
    put(map_, [1, 2])
    assert contents(map_) == {1, 2}
    map_.release()
    assert used_bytes(fd) == 0
    put(map_, [1, 2])
    assert contents(map_) == {1, 2}


def test_map_goes_on_under_a_new_process(fd: int, rng: SeededRandom) -> None:
    map_, model = opened(fd), set[int]()
    for n in range(40):
        new = [rng.getrandbits(64) for _ in range(rng.randrange(800))]
        put(map_, [0, *new])
        gone = rng.sample(sorted(model), len(model) // 3)
        map_.drop(packed(gone))
        model = (model | {0, *new}) - set(gone)
        map_ = successor(fd)
        assert contents(map_) == model
        if n == 20:
            map_.release()
            model.clear()
            assert not opened(fd).adopt()
    assert os.pread(fd, REGION, 0) == os.pread(fd, REGION, 2 * REGION) == bytes(REGION), "the neighbours' regions"


def test_nobody_else_takes_it_over(fd: int) -> None:
    assert not opened(fd).adopt()
    assert not KeyMap().adopt()
    put(opened(fd), [1])
    other = opened(fd, owner=OWNER + 1)
    assert not other.adopt()
    other.release()
    put(other, [2])
    assert not opened(fd).adopt()
    assert contents(other) == {2}


def test_a_full_region_changes_nothing(fd: int) -> None:
    map_ = opened(fd)
    put(map_, list(range(24_000)))
    with pytest.raises(MemoryError, match="no room"):
        put(map_, list(range(24_000, 25_000)))
    assert contents(map_) == set(range(24_000))
    put(map_, [24_001])
    assert contents(successor(fd)) == {*range(24_000), 24_001}


@pytest.mark.parametrize(("offset", "n_bytes"), [(1, 1 << 20), (4096, 1 << 20), (0, 8191), (1 << 63, 1 << 20)])
def test_regions_that_cannot_be(fd: int, offset: int, n_bytes: int) -> None:
    with pytest.raises(ValueError, match="a map cannot have"):
        KeyMap(fd, offset, n_bytes)


def test_half_done_deletions_are_completed(fd: int, rng: SeededRandom) -> None:
    """Every stage of every copy that a deletion makes."""
    n_moved = 0
    for _ in range(300):
        map_ = opened(fd)
        map_.release()
        hashes = [rng.getrandbits(64) for _ in range(190)]
        put(map_, hashes)
        table = Table(fd)
        assert table.n_slots == 256
        before = table.read()
        victim = rng.choice(hashes)
        map_.drop(packed([victim]))
        after = table.read()
        start = before.index((victim, key_of(victim)))
        # Places in the order in which they changed; each lost its hash, got another's key, and then that hash (the last: nothing).
        changed = sorted((i for i in range(256) if before[i] != after[i]), key=lambda i: (i - start) % 256)
        n_moved += len(changed) - 1
        n_done, stage = rng.randrange(len(changed)), rng.randrange(3)
        for i in changed[n_done:]:
            table.write(i, before[i])
        at = changed[n_done]
        if stage:
            table.write(at, (0, after[at][1] if stage == 2 else before[at][1]))
        expected = set(hashes) if not n_done and not stage else set(hashes) - {victim}
        assert contents(successor(fd)) == expected, rng
    assert n_moved > 100


def test_what_a_cut_change_of_size_left_is_not_there(fd: int) -> None:
    map_ = opened(fd)
    put(map_, list(range(1, 300)))
    for n_slots in (256, 1024, 2048):
        os.pwrite(fd, struct.pack("<QQ", 5000 + n_slots, 1) * n_slots, REGION + 16 * n_slots)
    map_ = successor(fd)
    assert used_bytes(fd) == 4096 + 16 * 512
    put(map_, list(range(300, 1400)))
    assert contents(map_) == set(range(1, 1400))


@pytest.mark.parametrize("damage", ["magic", "none", "odd", "huge", "full"])
def test_damage_is_no_map_of_ours(fd: int, damage: str) -> None:
    map_ = opened(fd)
    put(map_, list(range(1, 100)))
    if damage == "full":
        for i in range(256):
            Table(fd).write(i, (i + 1, 1))
    else:
        word, value = {"magic": (0, 1), "none": (16, 0), "odd": (16, 300), "huge": (16, 1 << 40)}[damage]
        os.pwrite(fd, struct.pack("<Q", value), REGION + word)
    map_ = opened(fd)
    assert not map_.adopt()
    assert len(map_) == 0
    map_.release()
    put(map_, [7])
    assert contents(successor(fd)) == {7}


def random_op(rng: SeededRandom) -> Op:
    name = rng.choices(("put", "drop", "clear"), (6, 5, 0.1))[0]
    return name, [rng.randrange(1, 600) for _ in range(rng.randrange(40))]


def apply(map_: KeyMap, op: Op) -> None:
    name, hashes = op
    if name == "put":
        put(map_, hashes)
    elif name == "drop":
        map_.drop(packed(hashes))
    else:
        map_.clear()


def model_of(ops: list[Op]) -> set[int]:
    model = set[int]()
    for name, hashes in ops:
        model = model | set(hashes) if name == "put" else model - set(hashes) if name == "drop" else set()
    return model


@pytest.mark.parametrize("round_", range(10))
def test_killed_writer(fd: int, rng: SeededRandom, round_: int) -> None:
    """kill -9 at any moment: what was done is there, what was not begun is not, and the successor can go on."""
    progress = mmap.mmap(-1, 8)
    ops = [random_op(rng) for _ in range(3000)]
    pid = os.fork()
    if pid == 0:
        try:
            map_ = opened(fd)
            n = 0
            while True:
                apply(map_, ops[n % len(ops)])
                n += 1
                progress[:8] = n.to_bytes(8, "little")
        finally:
            os._exit(1)
    try:
        end_s = time.monotonic() + 20
        while progress[:8] == bytes(8):
            assert time.monotonic() < end_s
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    done = int.from_bytes(progress[:8], "little")
    ops = ops * (done // len(ops) + 2)
    before, (name, hashes) = model_of(ops[:done]), ops[done]
    map_ = opened(fd)
    if not map_.adopt():
        assert not before
        return
    found = contents(map_)
    sure, possible = (before - set(hashes), before) if name == "drop" else (before, before | set(hashes))
    assert (sure if name != "clear" else set()) <= found <= possible, rng
    for op in ops[done : done + 200]:
        apply(map_, op)
    assert contents(map_) == model_of(ops[: done + 200])
