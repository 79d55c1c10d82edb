"""sglfast._relay.rid_place: where a JSON body takes a rid, and the bodies that cannot have one."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sglfast._relay import rid_place

RID = b"0123456789abcdef0123456789abcdef"


def spliced(body: bytes) -> bytes | None:
    place = rid_place(body)
    return None if place < 0 else b'{"rid":"' + RID + b'",' + body[place:]


@pytest.mark.parametrize("body", [b'{"model":"m"}', b' \r\n\t{ \n "model" : [{}]}  ', b'{"a":"' + b"x" * 20_000 + b'"}', b'{"r":1}'])
def test_it_is_the_first_field_and_nothing_else_changes(body: bytes) -> None:
    found = spliced(body)
    assert found is not None
    assert found == b'{"rid":"' + RID + b'",' + body.lstrip()[1:]
    assert json.loads(found) == {"rid": RID.decode(), **json.loads(body)}


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"{", b"{}", b"{ \n}", b"[1]", b'"a"', b"null", b"not json", b'\xef\xbb\xbf{"a":1}', '{"a":1}'.encode("utf-16"),
     b"\x1f\x8b\x08", b'{"rid":"x"}', b'{"a":1,"rid":null}', b'{"tools":[{"rid":1}]}', b'{"a":"rid"}'],
)  # fmt: skip
def test_bodies_that_stay_as_they_are(body: bytes) -> None:
    assert rid_place(body) == -1


@pytest.mark.parametrize("at", range(11, 260))
def test_a_rid_is_found_wherever_it_stands(at: int) -> None:
    """At every place of the blocks that are looked at together, and in what is left behind them."""
    front = b'{"a":"' + b"x" * (at - 8) + b'",'
    assert rid_place(front + b'"rid":1}') == -1
    assert rid_place(front + b'"rid":1,"b":"' + b"y" * 300 + b'"}') == -1
    for near in (b'"rib":1}', b'"rad":1}', b'"aid":1}', b'"ride":1}', b'"\\"rid\\"":1}'):
        assert rid_place(front + near) == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["rid", "r", "model"]) | st.text(max_size=5), inner),
    max_leaves=12,
)  # fmt: skip


def names_rid(value: object) -> bool:
    if isinstance(value, dict):
        return "rid" in value or any(map(names_rid, value.values()))
    return value == "rid" if not isinstance(value, list) else any(map(names_rid, value))


@given(VALUES, st.booleans())
@example({"a": 'x"rid'}, True)
def test_any_json(value: object, is_compact: bool) -> None:
    body = json.dumps(value, separators=(",", ":") if is_compact else None).encode()
    found = spliced(body)
    if not isinstance(value, dict) or not value or names_rid(value):
        assert found is None
    elif found is None:
        assert b'"rid"' in body, "refused for nothing"
    else:
        assert json.loads(found) == {"rid": RID.decode(), **value}
