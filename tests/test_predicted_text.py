"""sglfast._predicted.text_keys: a prompt in raw JSON bytes and its keys, against a reading of the whole body by a parser."""

import array
import itertools
import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model import CONTEXT_FIELDS, PROMPT_FIELDS, text_cuts
from model import text_keys as model_keys

from sglfast._predicted import KEYS_MAX, text_cut, text_keys


def read(body: bytes) -> tuple[list[int], int]:
    keys, n_bytes = text_keys(body)
    return array.array("Q", keys).tolist(), n_bytes


def members_of(body: bytes) -> dict[str, bytes]:
    return {name: bytes(raw) for name, raw in msgspec.json.decode(body, type=dict[str, msgspec.Raw]).items()}


def chat(text: str, **more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": text}], **more}).encode()


def test_cuts() -> None:
    cuts = text_cuts(1 << 30)
    assert [text_cut(i + 1) for i in range(KEYS_MAX)] == cuts
    assert (text_cut(0), cuts[0], cuts[15], cuts[16], cuts[31], cuts[32], cuts[-1]) == (0, 128, 2048, 2176, 4096, 4352, 4 << 20)
    assert all(later - earlier <= max(128, earlier / 16) for earlier, later in itertools.pairwise(cuts))
    with pytest.raises(ValueError, match="at most 192 keys, not 193"):
        text_cut(KEYS_MAX + 1)


@pytest.mark.parametrize("size", [0, 99, 100, 127, 128, 129, 2048, 4000, 40_000, 1_000_000, 5_000_000])
@pytest.mark.parametrize("field", PROMPT_FIELDS)
def test_keys_by_length(field: str, size: int, rng: random.Random) -> None:
    text = "".join(rng.choices('ab "\\\nä€', k=64)) * (size // 64) + "x" * (size % 64)
    value: Any = [{"role": "user", "content": text}] if field == "messages" else text if field != "input_ids" else [1234567] * (size // 9)
    body = json.dumps({"temperature": 0.5, "model": "m", field: value, "stream": True}, ensure_ascii=False).encode()
    members = members_of(body)
    keys, n_bytes = read(body)
    expected = model_keys(members)
    if len(body) <= 4 << 20:
        assert (keys, n_bytes) == expected
    else:  # not looked at to its end
        assert keys == expected[0]
        assert n_bytes == len(body) - body.index(f'"{field}": '.encode()) - len(field) - 4


names = st.sampled_from([*PROMPT_FIELDS, *CONTEXT_FIELDS, "stream", "max_tokens", "modell", "tex", ""])
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=60)
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=8), inner, max_size=4))
spaces = st.sampled_from(["", " ", "\n\t "])


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Objects of these members in any order, with any white space, all text escaped or none; a name comes once."""
    parts = []
    for name in draw(st.lists(names, unique=True, max_size=8)):
        value = json.dumps(draw(values), ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 2])))
        if draw(st.booleans()):
            value = json.dumps(value * draw(st.integers(1, 30)))
        parts.append(f'{draw(spaces)}"{name}"{draw(spaces)}:{draw(spaces)}{value}{draw(spaces)}')
    return f"{draw(spaces)}{{{','.join(parts)}}}{draw(spaces)}".encode("utf-8", "surrogatepass")


@settings(max_examples=400)
@given(bodies())
def test_keys_are_the_model_s(body: bytes) -> None:
    try:
        members = members_of(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        read(body)  # half of a surrogate pair
        return
    assert read(body) == model_keys(members)


@settings(max_examples=400)
@given(bodies(), st.data())
def test_no_body_is_too_broken(body: bytes, data: st.DataObject) -> None:
    """Cut anywhere, bytes changed anywhere: an answer, of no more bytes than there are."""
    broken = bytearray(body)
    for _ in range(data.draw(st.integers(0, 3))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.sampled_from(b'{}[]",:\\ a\0\xff'))
    broken = broken[: data.draw(st.integers(0, len(broken)))]
    # In a buffer of exactly its size, so that the sanitizer sees a byte too far.
    keys, n_bytes = read(bytes(broken))
    assert n_bytes <= len(broken)
    assert len(keys) == (len(text_cuts(n_bytes)) or int(n_bytes >= 16))


def test_deep_nesting_is_stepped_over() -> None:
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    assert read(b'{"tools":' + deep + b',"prompt":"' + b"x" * 300 + b'"}')[1] == 302
    assert read(b'{"messages":' + b"[" * 300_000) == ([], 0)


def test_a_short_prompt_is_one_piece() -> None:
    assert read(b'{"prompt":"' + b"x" * 13 + b'"}') == ([], 15)
    short = [read(b'{"prompt":"' + b"x" * (size - 2) + b'"}') for size in (16, 17, 127)]
    assert [(len(keys), n_bytes) for keys, n_bytes in short] == [(1, 16), (1, 17), (1, 127)]
    assert len({keys[0] for keys, _ in short}) == 3, "it is found again as a whole only"
    assert read(b'{"model":"m","prompt":"' + b"x" * 14 + b'"}')[0] != short[0][0]


def test_a_longer_conversation_shares_the_keys_of_its_beginning(rng: random.Random) -> None:
    """At most a sixteenth of what two prompts share is not seen as shared."""
    messages = [{"role": "user", "content": "".join(rng.choices("abcdef ", k=rng.randrange(50, 4000)))} for _ in range(30)]
    previous, shared_bytes = [], 0
    for n in range(1, 31):
        keys, n_bytes = read(json.dumps({"messages": messages[:n], "model": "m"}).encode())
        common = next((i for i, (a, b) in enumerate(zip(previous, keys, strict=False)) if a != b), min(len(previous), len(keys)))
        assert text_cut(common) >= shared_bytes * 15 // 16 - 128
        assert text_cut(common) <= shared_bytes
        previous, shared_bytes = keys, n_bytes - 1  # all but the closing bracket


def test_context_keeps_prompts_apart() -> None:
    plain = read(chat("x" * 1000))[0]
    assert read(chat("x" * 1000, stream=True, max_tokens=7, temperature=0.1))[0] == plain
    seen = {tuple(plain)}
    for name in CONTEXT_FIELDS:
        keys = tuple(read(chat("x" * 1000, **{name: "other"}))[0])
        assert len(keys) == len(plain)
        assert not set(keys) & {key for other in seen for key in other}
        seen.add(keys)
    one = b'{"model":"m","cache_salt":"s","prompt":"%b"}' % (b"x" * 500)
    other = b'{"cache_salt": "s", "prompt":"%b","model" :"m"}' % (b"x" * 500)
    assert read(one) == read(other), "the order of names does not count"
    swapped = b'{"model":"s","cache_salt":"m","prompt":"%b"}' % (b"x" * 500)
    assert read(one) != read(swapped)


def test_what_counts_as_the_prompt() -> None:
    texts = {name: name * 100 for name in PROMPT_FIELDS}
    for i, name in enumerate(PROMPT_FIELDS):
        rest = {key: texts[key] for key in PROMPT_FIELDS[i:]}
        for items in (rest, dict(reversed(rest.items()))):
            assert read(json.dumps(items).encode())[0] == read(json.dumps({name: texts[name]}).encode())[0]
    for empty in (b"", b"[]", b"17", b'{"model":"m"}', b'{"Prompt":"x"}', b'{"prompt"'):
        assert read(empty) == ([], 0)
