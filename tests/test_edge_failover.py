"""sglfast.edge.failover: among which workers a failed request is given again; the whole choice is in test_edge_route_failover.py."""

from __future__ import annotations

from array import array

from edge_harness import Memory

from sglfast._counters import Column, Loads
from sglfast.edge.failover import least_left, rows_left


def rows_below(count: int) -> array[int]:
    return array("i", range(count))


def loaded(*requests: int) -> Loads:
    memory = Memory(["http://h"] * len(requests))
    column = Column(memory.segment, 0)
    for row, load in enumerate(requests):
        for _ in range(load):
            column.begin(row, 0, 16, 0)
    return Loads(memory.segment)


def test_least_left() -> None:
    loads, idxs = loaded(0, 2, 1, 1), rows_below(4)
    assert least_left(idxs, loads, (), 0) == 0
    assert {least_left(idxs, loads, (0, 9), 0) for _ in range(40)} == {2, 3}
    assert least_left(idxs, loads, (1, 2, 3, 0), 0) in (2, 3), "not the one that has just failed"
    assert least_left(rows_below(1), loads, (0,), 0) == 0, "if there is another"
    assert least_left(rows_below(1), loads, (7, 0), 0) == 0


def test_rows_left_have_room_if_any_has() -> None:
    loads, idxs = loaded(0, 2, 2, 1), rows_below(4)
    assert [*rows_left(idxs, loads, (), 2)] == [0, 3]
    assert [*rows_left(idxs, loads, (0, 3), 2)] == [1, 2], "all others are full: one of those is waited for"
    assert [*rows_left(idxs, loads, (0, 1, 2, 3), 2)] == [0], "all were tried"
    assert [*rows_left(idxs, loads, (3, 2, 1, 0), 1)] == [0], "the others are full, so the one that has just failed"
    assert [*rows_left(rows_below(1), loaded(5), (0,), 1)] == [0]
