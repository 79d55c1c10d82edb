"""sglfast._keymap against a dict."""

import pytest
from conftest import SeededRandom
from hypothesis import given
from hypothesis import strategies as st

from sglfast._keymap import KeyMap


def packed(values: list[int]) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)


def unpacked(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]


SMALL = st.integers(0, 40) | st.integers(2**64 - 3, 2**64 - 1)
STEPS = st.lists(st.tuples(st.sampled_from(("put", "drop", "keep", "clear")), st.lists(SMALL, max_size=12)), max_size=60)


@given(STEPS)
def test_map_is_a_dict(steps: list[tuple[str, list[int]]]) -> None:
    map_, model = KeyMap(), dict[int, int]()
    for n, (step, hashes) in enumerate(steps):
        if step == "put":
            keys = [n * 100 + i for i in range(len(hashes))]
            map_.put(packed(hashes), packed(keys))
            model.update(zip(hashes, keys, strict=True))
        elif step == "clear":
            map_.clear()
            model.clear()
        else:
            marks = bytes(i % 2 for i in range(len(hashes))) if step == "keep" else b""
            map_.drop(packed(hashes), marks)
            for i, hash_ in enumerate(hashes):
                if not marks or not marks[i]:
                    model.pop(hash_, None)
        assert len(map_) == len(model)
        found, keys_ = map_.find(packed(list(range(42))))
        assert dict(zip(unpacked(found), unpacked(keys_), strict=True)) == {h: k for h, k in model.items() if h < 42}
        assert map_.get(0) == model.get(0)
    hashes_, keys_ = map_.items()
    assert dict(zip(unpacked(hashes_), unpacked(keys_), strict=True)) == model


def test_map_of_many(rng: SeededRandom) -> None:
    model = {rng.getrandbits(64): rng.getrandbits(64) for _ in range(20_000)}
    map_ = KeyMap()
    map_.put(packed(list(model)), packed(list(model.values())))
    gone = rng.sample(list(model), 15_000)
    map_.drop(packed(gone))
    for hash_ in gone:
        del model[hash_]
    hashes, keys = map_.items()
    assert dict(zip(unpacked(hashes), unpacked(keys), strict=True)) == model
    assert map_.find(packed(gone)) == (b"", b"")


def test_map_refuses_what_does_not_go_together() -> None:
    map_ = KeyMap()
    for bad in (lambda: map_.put(b"12345678", b""), lambda: map_.find(b"1"), lambda: map_.drop(bytes(16), b"\1")):
        with pytest.raises(ValueError, match="bytes"):
            bad()
