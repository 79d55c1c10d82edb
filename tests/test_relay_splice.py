"""cext/sf_splice.h: keys at the end of a JSON body without parsing it, and whether a body may be a batch."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sglfast._relay import may_be_batch, spliced

KEYS = b'"bootstrap_host":"h","bootstrap_port":null,"bootstrap_room":7'
ADDED = {"bootstrap_host": "h", "bootstrap_port": None, "bootstrap_room": 7}

blanks = st.text(" \t\r\n", max_size=4)
names = st.one_of(st.text(max_size=6), st.sampled_from(["bootstrap_host", "bootstrap_room", "n", "prompt", "}", '"', "\\", "{", "é"]))
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=8) | st.sampled_from(["}", '"}', "\\", '","'])
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=12)


@st.composite
def written(draw: Any, value: Any) -> str:
    """The value as JSON text, with blanks wherever they may be and letters escaped here and there."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            items = [f"{text(key)}{draw(blanks)}:{draw(blanks)}{text(item)}" for key, item in value.items()]
            return "{" + draw(blanks) + f"{draw(blanks)},{draw(blanks)}".join(items) + draw(blanks) + "}"
        if isinstance(value, list):
            return "[" + draw(blanks) + f"{draw(blanks)},{draw(blanks)}".join(text(item) for item in value) + draw(blanks) + "]"
        return json.dumps(value, ensure_ascii=draw(st.booleans()))

    return draw(blanks) + text(value) + draw(blanks)


@given(st.data(), st.dictionaries(names, values, max_size=5))
def test_as_if_decoded_and_encoded(data: st.DataObject, fields: dict[str, Any]) -> None:
    body = data.draw(written(fields)).encode()
    found = spliced(body, KEYS)
    assert found is not None
    assert orjson.loads(found) == json.loads(found) == {**json.loads(body), **ADDED}, "the last of equal keys counts"
    assert found.replace(b"," + KEYS, b"", 1) == body or found.replace(KEYS, b"", 1) == body, "and nothing else has changed"


@given(st.data(), st.lists(values, max_size=3) | scalars)
def test_what_is_no_object_is_left(data: st.DataObject, value: Any) -> None:
    assert spliced(data.draw(written(value)).encode(), KEYS) is None


@given(st.binary(max_size=40) | st.text('{}[]",:\\ n1\n', max_size=40).map(str.encode))
@example(b'{"a":"}')
@example(b'{"a":1,}')
@example(b"{,}")
@example(b"{{}")
@example(b'{"a"}')
@example(b'{"a":"\\}')
@example(b'{"a":1}{"b":2}')
@example(b"{ \n")
@example(b"{")
@example(b"}")
@example(b"")
def test_what_is_no_json_does_not_become_any(body: bytes) -> None:
    found = spliced(body, KEYS)
    try:
        fields = json.loads(body)
    except (ValueError, UnicodeDecodeError):
        if found is not None:
            with pytest.raises((ValueError, UnicodeDecodeError)):
                json.loads(found)
    else:
        if isinstance(fields, dict) and body.strip()[:1] == b"{":
            assert found is not None
            assert json.loads(found) == {**fields, **ADDED}


@pytest.mark.parametrize("size", [1, 15, 16, 17, 16_000, 1 << 20])
def test_sizes(size: int) -> None:
    body = b'{"a":"' + b"x" * size + b'"}\r\n'
    assert spliced(body, KEYS) == body[:-3] + b"," + KEYS + b"}\r\n"


CHAT, COMPLETIONS, GENERATE, EMBEDDINGS = range(4)


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        (b'{"n":2}', (CHAT, COMPLETIONS, GENERATE)),
        (b'{"n" \n:\t 10}', (CHAT, COMPLETIONS, GENERATE)),
        (b'{"sampling_params":{"n":3}}', (CHAT, COMPLETIONS, GENERATE)),
        (b'{"n":1e3}', (CHAT, COMPLETIONS, GENERATE)),
        (b'{"n":1}', ()),
        (b'{"n":1,"m":2}', ()),
        (b'{"n":0}', ()),
        (b'{"n":null}', ()),
        (b'{"m":"n"}', ()),
        (b'{"text":"say \\"n\\": 5"}', ()),
        (b'{"prompt":["a"]}', (COMPLETIONS,)),
        (b'{"prompt" : [ "a"]}', (COMPLETIONS,)),
        (b'{"prompt":[[1,2],[3]]}', (COMPLETIONS,)),
        (b'{"prompt":[1,2,3]}', ()),
        (b'{"prompt":[]}', ()),
        (b'{"prompt":"[\\"a\\"]"}', ()),
        (b'{"x":"prompt","prompt":["a"]}', (COMPLETIONS,)),
        (b'{"text":["a","b"]}', (GENERATE,)),
        (b'{"text":"a"}', ()),
        (b'{"input_ids":[[1],[2]]}', (GENERATE,)),
        (b'{"input_ids":[1,2]}', ()),
        (b'{"prompt"', ()),
        (b'{"prompt":', ()),
        (b'{"prompt":[', ()),
        (b'"n"', ()),
        (b'"n":', ()),
        (b'"n":1', ()),
        (b"", ()),
    ],
)
def test_may_be_batch(body: bytes, kinds: tuple[int, ...]) -> None:
    assert tuple(kind for kind in (-1, CHAT, COMPLETIONS, GENERATE, EMBEDDINGS, 4, 5) if may_be_batch(body, kind)) == kinds


@given(st.binary(max_size=70), st.binary(max_size=70), st.sampled_from([b'"n":2', b'"n": 12', b'"n"\n: 9']))
def test_n_is_found_wherever_it_is(before: bytes, after: bytes, key: bytes) -> None:
    assert may_be_batch(before + key + after, CHAT)


@given(st.text('"n:12 ', max_size=80))
def test_n_is_found_as_a_plain_reader_finds_it(text: str) -> None:
    def plain() -> bool:
        for at in range(len(text)):
            if text.startswith('"n"', at):
                rest = text[at + 3 :].lstrip(" ")
                if rest[:1] == ":":
                    number = rest[1:].lstrip(" ")
                    if number[:1] == "2" or (number[:1] == "1" and number[1:2] in ("1", "2")):
                        return True
        return False

    assert may_be_batch(text.encode(), CHAT) == plain()
