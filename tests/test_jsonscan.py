"""sglfast._jsonscan: splits of chat bodies, held against a parser; names of beginnings; nothing hurts."""

import json
from typing import Any

import orjson
import pytest
import xxhash
from conftest import SeededRandom
from hypothesis import given, settings
from hypothesis import strategies as st

from sglfast._jsonscan import ChatScan, scan_chat, string_end

SEED = 0x9E3779B97F4A7C15


def split(body: bytes, seed: int = SEED) -> ChatScan:
    scan = scan_chat(body, seed)
    assert scan is not None, body
    return scan


def is_json(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


# ---- where a string ends ----


@settings(max_examples=600)
@given(st.lists(st.sampled_from([b"\\", b"\\", b"a", b"b" * 31, b"c" * 64, b"\\" * 63, b"\\" * 64]), max_size=60), st.booleans())
def test_a_string_ends_at_the_first_quote_that_is_not_escaped(parts: list[bytes], has_more: bool) -> None:
    text = b"".join(parts) + b'"' + b'\\"' * 50 * has_more
    want, at = -1, 0
    while at < len(text) and want < 0:
        if text[at : at + 1] == b'"':
            want = at
        at += 2 if text[at : at + 1] == b"\\" else 1
    assert string_end(text) == string_end(text, is_narrow=True) == want


# ---- every split is the parser's ----

TEXT = st.text(max_size=40) | st.sampled_from(
    ['"', "\\", '\\"', "\\\\" * 40 + '"', "[{", "}]", '"messages":[', "\n\t\x7f", "é漢🙂", "x" * 200]
)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(st.dictionaries(TEXT | st.sampled_from(["role", "content", "messages"]), VALUE, max_size=4), min_size=1, max_size=8)
MEMBERS = st.dictionaries(st.just("tools") | TEXT.filter(lambda key: key.isalnum() and key != "messages"), VALUE, max_size=3)
SPACE = st.sampled_from(["", "", " ", "\n", "\t\r\n  "])


@st.composite
def written(draw: st.DrawFn) -> tuple[bytes, dict[str, Any]]:
    """A body in one of the many ways in which its JSON can be written, and what it means."""
    space = draw(SPACE)
    is_ascii = draw(st.booleans())

    def dumps(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=is_ascii, separators=(f"{space},{space}", f"{space}:{space}"))
        return text.replace("/", "\\/") if is_ascii else text

    body = draw(MEMBERS)
    messages = draw(MESSAGES)
    members = [f"{dumps(key)}{space}:{space}{dumps(value)}" for key, value in body.items()]
    array = f"{space},{space}".join(dumps(message) for message in messages)
    members.insert(draw(st.integers(0, len(members))), f'"messages"{space}:{space}[{space}{array}{space}]')
    text = f"{space}{{{space}" + f"{space},{space}".join(members) + f"{space}}}{space}"
    return text.encode("utf-8", "surrogatepass"), body | {"messages": messages}


@settings(max_examples=400)
@given(written())
def test_a_split_is_the_parsers(case: tuple[bytes, dict[str, Any]]) -> None:
    body, value = case
    if not all(key.isascii() for key in value):
        return  # may be written with an escape
    scan = split(body)
    assert scan.body is body
    assert len(scan) == len(value["messages"])
    assert [json.loads(scan.message(i)) for i in range(len(scan))] == value["messages"]
    assert [body[scan.start(i) : scan.end(i)] for i in range(len(scan))] == [scan.message(i) for i in range(len(scan))]
    assert json.loads(scan.context) == value | {"messages": []} | ({"tools": None} if "tools" in value else {})
    assert scan.tools == b"" if "tools" not in value else json.loads(scan.tools) == value["tools"]
    flat = [not any(isinstance(item, dict | list) for item in message.values()) for message in value["messages"]]
    assert [scan.is_flat(i) for i in range(len(scan))] == [all(flat[i:]) for i in range(len(scan))]


@settings(max_examples=600)
@given(
    written(),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.sampled_from([*b'"\\{}[],: x0\x00\n\xff', None])), min_size=1, max_size=3),
)
def test_a_broken_body_is_no_sum_of_sound_pieces(case: tuple[bytes, Any], changes: list[tuple[int, int | None]]) -> None:
    """If it is split and all pieces are JSON, so is the body; and then the split is the parser's."""
    body = bytearray(case[0])
    for place, byte in changes:
        if byte is None:
            del body[place % len(body)]
        else:
            body[place % len(body)] = byte
        if not body:
            return
    scan = scan_chat(bytes(body), SEED)
    if scan is None:
        return
    pieces = [scan.message(i) for i in range(len(scan))]
    sound = all(is_json(piece) for piece in [*pieces, scan.context, scan.tools or b"null"])
    assert sound == is_json(bytes(body))
    if sound:
        assert orjson.loads(body)["messages"] == [orjson.loads(piece) for piece in pieces]
        assert orjson.loads(body).get("tools") == orjson.loads(scan.tools or b"null")


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"null", b"[]", b"{}", b"{", b'{"messages"', b'{"messages":', b'{"messages":[', b'{"messages":[]}',
        b'{"messages":[ ]}', b'{"messages":[{}', b'{"messages":[{}]', b'{"messages":[{}]}x', b'{"messages":[{}],}', b'{"messages":[{},]}',
        b'{"messages":[{} {}]}', b'{"messages":[{}5]}', b'{"messages":[5]}', b'{"messages":["x"]}', b'{"messages":[null]}',
        b'{"messages":[[]]}', b'{"messages":{}}', b'{"messages":[{}],"messages":[{}]}', b'{"messages":5,"messages":[{}]}',
        b'{"messages":[{}],"messages":5}', b'{"messages":[{}],"\\u006dessages":[{}]}', b'{"a\\"b":1,"messages":[{}]}',
        b"{'messages':[{}]}", b'{messages:[{}]}', b'{"messages":[{"a":"b]}', b'{"messages":[{"a":"b\\"}]}',
        b'\xef\xbb\xbf{"messages":[{}]}', b'{"messages":[{}]}\0', b'{"x":1 "messages":[{}]}', b'{"x":{"messages":[{}]}}',
        b'["messages",[{}]]', b'{,"messages":[{}]}', b'{"messages":[{}],"a"}',
        b'{"tools":,"messages":[{}]}', b'{"tools":1,"messages":[{}],"tools":1}',
        b'{"messages":[{}],"tools"}', b'{"messages":[{}],"tools":}',
    ],
)  # fmt: skip
def test_what_is_not_split(body: bytes) -> None:
    assert scan_chat(body, SEED) is None


def test_a_name_of_the_messages_elsewhere_counts_for_nothing() -> None:
    body = b'{"a":{"messages":[1,{"b":"]}\\\\"}]},"messages":[{"messages":[{}]},{"c":"\\\\"}],"d":"\\"messages\\":["}'
    scan = split(body)
    assert [scan.message(i) for i in range(len(scan))] == [b'{"messages":[{}]}', b'{"c":"\\\\"}']
    assert scan.context == b'{"a":{"messages":[1,{"b":"]}\\\\"}]},"messages":[],"d":"\\"messages\\":["}'
    assert [scan.is_flat(i) for i in (0, 1)] == [False, True]


@pytest.mark.parametrize("before", range(0, 140, 7))
@pytest.mark.parametrize("slashes", [*range(9), 62, 63, 64, 65, 127, 128, 129, 200])
def test_the_end_of_a_string_behind_backslashes(before: int, slashes: int) -> None:
    """Runs of backslashes that begin and end anywhere in the blocks that are looked at together; behind an odd one the quote is text."""
    content = b"a" * before + b"\\" * slashes + b'"},{' * (slashes % 2)
    message = b'{"c":"' + content + b'","x":"' + b"z" * 90 + b'"}'
    scan = split(b'{"messages":[' + message + b',{"y":2}]}')
    assert [scan.message(i) for i in range(len(scan))] == [message, b'{"y":2}']


def test_positions_are_checked() -> None:
    scan = split(b'{"messages":[{},{}]}')
    for position in (-1, 2):
        for method in (scan.message, scan.start, scan.end, scan.is_flat):
            with pytest.raises(IndexError):
                method(position)
    for count in (-1, 3):
        with pytest.raises(IndexError):
            scan.name(count)
    with pytest.raises(TypeError):
        scan_chat("{}", SEED)  # type: ignore[arg-type]


def test_as_many_messages_as_there_may_be() -> None:
    def body(count: int) -> bytes:
        return b'{"messages":[' + b",".join([b"{}"] * count) + b"]}"

    assert len(split(body(1 << 12))) == 1 << 12
    assert scan_chat(body((1 << 16) + 1), SEED) is None


# ---- names ----


def test_names_are_those_of_the_bytes_of_the_first_messages() -> None:
    first = split(b'{"messages":[{"a":1},{"b":2},{"c":3}],"x":1}')
    second = split(b' { "y":2,"messages": [ {"a":1} , {"b":2},{"c":4},{"d":5}]}')
    assert [first.name(n) == second.name(n) for n in range(4)] == [True, True, True, False]
    assert len({first.name(n) for n in range(4)} | {second.name(n) for n in range(3, 5)}) == 6
    assert split(b'{"messages":[{"a": 1}]}').name(1) != first.name(1), "other bytes"
    assert split(first.body, SEED + 1).name(3) != first.name(3)
    assert split(first.body).name(3) == first.name(3), "the seed is taken anew each time"
    assert len(first.name(3)) == 16


def test_names_of_a_kind() -> None:
    scan = split(b'{"messages":[{"a":1},{"b":2},{"c":3},{"d":4},{"e":5}]}')
    kind, other = b"0123456789abcdef", b"0123456789abcdeg"
    names = {scan.name(n, of) for n in range(6) for of in (kind, other, None)}
    assert len(names) == 18
    for limit, last, first, counts in (
        (5, 2, 1, [5, 4, 1]),
        (5, 8, 2, [5, 4, 3, 2, 1]),
        (3, 1, 4, [3, 2, 1]),
        (1, 1, 1, [1]),
        (0, 8, 2, []),
    ):
        assert scan.beginnings(limit, last, first, kind) == [scan.name(n, kind) for n in counts]
    for wrong in ((6, 1, 1), (-1, 1, 1), (5, -1, 1), (5, 1, -1)):
        with pytest.raises(IndexError):
            scan.beginnings(*wrong, kind)
    for call in (lambda: scan.name(1, b"short"), lambda: scan.beginnings(1, 1, 1, b"x" * 17)):
        with pytest.raises(ValueError, match="16 bytes"):
            call()


def test_context_names() -> None:
    def name(body: bytes) -> bytes:
        return split(body).context_name

    assert name(b'{"messages":[{}],"x":1}') == name(b'{"messages":[{"a":[2]},{}],"x":1}')
    others = [b'{"messages":[{}],"x":2}', b'{"x":1,"messages":[{}]}', b'{"messages":[{}],"x":1} ', b'{"messages" :[{}],"x":1}']
    assert len({name(body) for body in [b'{"messages":[{}],"x":1}', *others]}) == 5


@pytest.mark.parametrize("size", [241, 300, 1024, 1025, 5000, 100_000])
def test_names_of_long_messages_are_made_with_xxh3_128(size: int, rng: SeededRandom) -> None:
    """The published vectors stand behind the package: a wrong mix could give weak names that no other test would show."""
    message = b'{"content":"' + bytes(rng.choices(b"abc def", k=size - 14)) + b'"}'
    digest = xxhash.xxh3_128(message, seed=SEED).intdigest()
    link = bytes(16) + (digest & (1 << 64) - 1).to_bytes(8, "little") + (digest >> 64).to_bytes(8, "little")
    halves = [xxhash.xxh3_64_intdigest(link, seed=seed) for seed in (SEED, SEED ^ 0x27D4EB2F165667C5)]
    assert split(b'{"messages":[' + message + b"]}").name(1) == b"".join(half.to_bytes(8, "little") for half in halves)
