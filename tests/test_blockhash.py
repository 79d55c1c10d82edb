"""sglfast._blockhash against SGLang's own hashes, a hashlib model and bad input, with both SHA-256 kernels."""

import array
import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model import page_hashes

from sglfast._blockhash import KeyChain, kernel, page_keys, token_keys

GOLDEN = Path(__file__).parent / "golden" / "kv_events" / "sglang_hashes"
# The cases of namespaces.json that concern a router: what a LoRA adapter or the dynamo format does to hashes, it cannot know.
NAMESPACES = ("plain", "salt_tenant-a", "salt_empty", "salt_unicode", "extra_key_only", "extra_key_empty", "extra+salt")
U64 = 2**64 - 1


def keys_of(packed: bytes) -> list[int]:
    return list(struct.unpack(f"={len(packed) // 8}Q", packed))


def golden_cases(file: str) -> Iterator[dict[str, Any]]:
    for case in json.loads((GOLDEN / file).read_bytes())["cases"]:
        if file == "chains.json" or case["case"] in NAMESPACES:
            yield case


def check_golden() -> int:
    """Compare every golden case, given as a list and as a buffer; returns how many pages were compared."""
    pages = 0
    for file in ("chains.json", "namespaces.json"):
        for case in golden_cases(file):
            salt = (case.get("cache_salt") or "").encode()
            want = [key & U64 for key in case["block_hashes"]]
            forms = [case["token_ids"], tuple(case["token_ids"])]
            if max(case["token_ids"], default=0) < 2**32:
                forms.append(array.array("I", case["token_ids"]))
            for tokens in forms:
                got = page_keys(tokens, case["page_size"], bigram=case["is_bigram"], cache_salt=salt)
                assert keys_of(got) == want, (file, case.get("name"), case["page_size"], case["is_bigram"])
            pages += len(want)
    return pages


def in_portable_kernel(code: str) -> str:
    """Run Python code in a process that uses the portable kernel; returns what it prints."""
    here = Path(__file__).parent
    paths = os.pathsep.join((str(here), str(here.parent)))
    environment = {**os.environ, "SGLFAST_SHA": "portable", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestGolden:
    def test_default_kernel(self) -> None:
        assert check_golden() > 10_000

    def test_portable_kernel(self) -> None:
        code = "import test_blockhash as t; print(t.kernel(), t.check_golden())"
        name, pages = in_portable_kernel(code).split()
        assert name == "portable"
        assert int(pages) > 10_000

    def test_sha_instructions_are_used_where_the_processor_has_them(self) -> None:
        flags = re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        has_them = bool(flags) and "sha_ni" in flags[0].split()
        assert kernel() == ("shani" if has_them and os.environ.get("SGLFAST_SHA") != "portable" else "portable")


# Ids of each width, with the edges; a prompt of mixed pages must switch the page's form page by page.
BORDERS = [0, 2**15, 2**30 - 1, 2**30, 2**31, 2**32 - 1, 2**32, 2**60, 2**62, 2**63, U64]  # of ids in memory and of an int's digits
TOKEN = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1), st.sampled_from(BORDERS))
TOKENS = st.one_of(st.lists(st.integers(0, 2**32 - 1), max_size=90), st.lists(TOKEN, max_size=60))


@given(TOKENS, st.integers(1, 40), st.booleans(), st.integers(-1, 5), st.sampled_from([b"", b"a", b"x" * 200]))
def test_model(tokens: list[int], page_size: int, bigram: bool, max_pages: int, cache_salt: bytes) -> None:
    want = page_hashes(tokens, page_size, bigram=bigram, max_pages=max_pages, cache_salt=cache_salt)
    options: dict[str, Any] = {"bigram": bigram, "max_pages": max_pages, "cache_salt": cache_salt}
    assert keys_of(page_keys(tokens, page_size, **options)) == want
    if all(token < 2**32 for token in tokens):
        assert keys_of(page_keys(array.array("I", tokens), page_size, **options)) == want


def test_model_with_the_portable_kernel() -> None:
    in_portable_kernel("import test_blockhash as t; assert t.kernel() == 'portable'; t.test_model()")


@pytest.mark.parametrize("size", [1, 13, 14, 15, 16, 17, 31, 32, 47, 48, 1000])
def test_every_fill_of_the_last_sha_block(size: int) -> None:
    # A page of `size` ids ends at another place of SHA-256's 64-byte block: 13, 14 and 15 are those around the length field.
    tokens = list(range(7, 7 + 3 * size))
    assert keys_of(page_keys(tokens, size)) == page_hashes(tokens, size)


class TestSizes:
    def test_nothing_but_full_pages(self) -> None:
        assert page_keys([], 4) == b""
        assert page_keys([1, 2, 3], 4) == b""
        assert len(page_keys([1] * 11, 4)) == 16
        assert page_keys([1], 1, bigram=True) == b""
        assert page_keys([], 1, bigram=True) == b""
        assert len(page_keys([1] * 5, 4, bigram=True)) == 8
        assert page_keys(array.array("I"), 4) == b""
        assert page_keys([1, 2], 2**62) == b""

    def test_max_pages_is_a_prefix(self) -> None:
        tokens = list(range(100))
        everything = page_keys(tokens, 8)
        assert [len(page_keys(tokens, 8, max_pages=n)) // 8 for n in (0, 1, 11, 12, 13, 2**40)] == [0, 1, 11, 12, 12, 12]
        assert page_keys(tokens, 8, max_pages=5) == everything[:40]

    def test_ids_behind_the_last_page_are_not_looked_at(self) -> None:
        assert page_keys([1, 2, "x"], 2) == page_keys([1, 2], 2)  # type: ignore[list-item]


class TestBuffers:
    def test_misaligned_and_sliced(self) -> None:
        tokens = list(range(2**31, 2**31 + 64))
        raw = b"\0" + np.array(tokens, dtype="<u4").tobytes()
        misaligned: Any = np.frombuffer(raw, dtype="<u4", offset=1)
        assert misaligned.ctypes.data % 4
        assert keys_of(page_keys(misaligned, 16)) == page_hashes(tokens, 16)
        assert page_keys(misaligned[16:], 16) == page_keys(tokens[16:], 16)
        assert page_keys(memoryview(array.array("I", tokens))[1:], 7) == page_keys(tokens[1:], 7)

    def test_read_only(self) -> None:
        frozen: Any = np.arange(32, dtype=np.uint32)
        frozen.setflags(write=False)
        assert page_keys(frozen, 8) == page_keys(list(range(32)), 8)

    @pytest.mark.parametrize(
        "buffer",
        [
            b"12345678",
            bytearray(16),
            np.zeros(8, dtype=np.int32),
            np.zeros(8, dtype=np.uint64),
            np.zeros(8, dtype=np.float32),
            np.zeros(8, dtype=">u4"),
            np.zeros((2, 4), dtype=np.uint32),
            np.zeros(16, dtype=np.uint32)[::2],
            memoryview(bytes(8)).cast("H"),
        ],
        ids=lambda buffer: str(getattr(buffer, "dtype", type(buffer).__name__)),
    )
    def test_other_buffers_are_refused(self, buffer: Any) -> None:
        with pytest.raises(ValueError, match=r"uint32|contiguous"):
            page_keys(buffer, 2)

    def test_a_refused_buffer_is_released(self) -> None:
        buffer = bytearray(16)
        with pytest.raises(ValueError, match="uint32"):
            page_keys(buffer, 2)
        buffer.extend(b"x")  # BufferError while someone holds it


class TestKeyChain:
    @given(
        parts=st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=20), max_size=8),
        page_size=st.integers(1, 9),
        bigram=st.booleans(),
        cache_salt=st.sampled_from([b"", b"tenant"]),
        forks=st.sets(st.integers(0, 7)),
    )
    def test_equals_page_keys_however_the_tokens_come(
        self, parts: list[list[int]], page_size: int, bigram: bool, cache_salt: bytes, forks: set[int]
    ) -> None:
        chain = KeyChain(page_size, bigram=bigram, cache_salt=cache_salt)
        keys, tokens = b"", array.array("I")
        for number, part in enumerate(parts):
            if number in forks:
                left, chain = chain, chain.copy()
                left.extend(array.array("I", range(3 * page_size)))  # the copy does not feel it
            keys += chain.extend(array.array("I", part))
            tokens.extend(part)
            assert keys == page_keys(tokens, page_size, bigram=bigram, cache_salt=cache_salt)
            assert (chain.tokens, 8 * chain.pages) == (len(tokens), len(keys))
            missing = array.array("I", range(chain.missing))
            assert missing
            assert not chain.copy().extend(missing[1:])
            assert len(chain.copy().extend(missing)) == 8
        assert (chain.page_size, chain.bigram) == (page_size, bigram)

    @given(
        parts=st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=90), max_size=8),
        page_size=st.integers(1, 9) | st.integers(50, 70),
        bigram=st.booleans(),
        seed=st.integers(0, U64),
        parent=st.integers(0, U64),
        forks=st.sets(st.integers(0, 7)),
    )
    def test_with_a_seed_it_equals_token_keys(
        self, parts: list[list[int]], page_size: int, bigram: bool, seed: int, parent: int, forks: set[int]
    ) -> None:
        chain = KeyChain(page_size, bigram=bigram, seed=seed, parent=parent)
        keys, tokens = b"", array.array("I")
        for number, part in enumerate(parts):
            if number in forks:
                left, chain = chain, chain.copy()
                left.extend(array.array("I", range(3 * page_size)))
            keys += chain.extend(array.array("I", part))
            tokens.extend(part)
            assert keys == token_keys(tokens, page_size, bigram=bigram, seed=seed, parent=parent)
            assert (chain.tokens, 8 * chain.pages) == (len(tokens), len(keys))

    def test_a_seed_has_its_salt_in_it(self) -> None:
        with pytest.raises(ValueError, match="salt in the seed"):
            KeyChain(4, cache_salt=b"s", seed=1)
        with pytest.raises(OverflowError):
            KeyChain(4, seed=-1)
        with pytest.raises(OverflowError):
            KeyChain(4, seed=1, parent=2**64)
        with pytest.raises(ValueError, match="starts from no key"):
            KeyChain(4, parent=1)

    @pytest.mark.parametrize("page_size", [0, -1, 2**24 + 1])
    def test_page_size(self, page_size: int) -> None:
        with pytest.raises(ValueError, match="page_size"):
            KeyChain(page_size)

    @pytest.mark.parametrize(
        "tokens", [array.array("Q", [1]), b"abcd", np.zeros((2, 2), np.uint32), array.array("I", range(8))[::2].tolist()]
    )
    def test_a_refused_buffer_changes_nothing(self, tokens: Any) -> None:
        chain = KeyChain(2)
        with pytest.raises((ValueError, TypeError)):
            chain.extend(tokens)
        assert chain.tokens == 0
        assert chain.extend(array.array("I", [1, 2])) == page_keys([1, 2], 2)


class TestBadInput:
    @pytest.mark.parametrize("page_size", [0, -1, -(2**62)])
    def test_page_size(self, page_size: int) -> None:
        with pytest.raises(ValueError, match="page_size must be at least 1"):
            page_keys([1, 2], page_size)

    @pytest.mark.parametrize("token", [-1, -2, -(2**63), -(2**64), 2**64, 2**100])
    @pytest.mark.parametrize("position", [0, 3])
    def test_id_out_of_range(self, token: int, position: int) -> None:
        tokens = [1, 2, 3, 4]
        tokens[position] = token
        with pytest.raises(ValueError, match=rf"token id {position} must be from 0 to"):
            page_keys(tokens, 2)

    @pytest.mark.parametrize("token", [None, 1.0, "1", [1], np.uint32(1)])
    def test_id_of_another_type(self, token: Any) -> None:
        with pytest.raises(TypeError, match="token id 1 must be an int"):
            page_keys([1, token], 2)

    @pytest.mark.parametrize("position", [0, 3])
    def test_subclasses_of_int_are_ints(self, position: int) -> None:
        for token in (True, signal.SIGKILL, *BORDERS):
            tokens: list[int] = [1, 2, 3, 4]
            tokens[position] = token
            plain = [int(token) for token in tokens]
            assert page_keys(tokens, 2) == page_keys(tuple(plain), 2)
            if token < 2**32:
                assert page_keys(tokens, 2) == page_keys(array.array("I", plain), 2)

    @pytest.mark.parametrize("tokens", [None, 5, object()])
    def test_no_sequence(self, tokens: Any) -> None:
        with pytest.raises(TypeError, match="sequence of int"):
            page_keys(tokens, 2)

    def test_unknown_kernel_name(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", "import sglfast._blockhash"],
            env={**os.environ, "SGLFAST_SHA": "fast", "PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode != 0
        assert "SGLFAST_SHA must be 'portable' or unset" in done.stderr
