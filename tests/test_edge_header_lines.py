"""sglfast.edge.header_lines: one header out of the kept lines."""

import pytest

from sglfast.edge.header_lines import value_of, without

KEPT = b"Accept: */*\r\nX-Priority:  7 \r\nauthorization:Bearer a:b\r\nx-empty:\r\nX-priority: 8\r\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"accept", b"*/*"),
        (b"x-priority", b"7"),
        (b"authorization", b"Bearer a:b"),
        (b"x-empty", b""),
        (b"priority", None),
        (b"bearer a", None),
    ],
)
def test_value(name: bytes, value: bytes | None) -> None:
    assert value_of(KEPT, name) == value


def test_without() -> None:
    assert without(KEPT, b"x-priority") == b"Accept: */*\r\nauthorization:Bearer a:b\r\nx-empty:\r\n"
    assert without(KEPT, b"accept") == KEPT[13:]
    assert without(KEPT, b"host") == KEPT
    assert value_of(b"", b"a") is None
    assert without(b"a: 1\r\n", b"a") == b""
