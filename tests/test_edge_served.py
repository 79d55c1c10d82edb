"""sglfast.edge.served: the pools follow the worker table, also when it changes, or cannot be read, at that very moment."""

from typing import Any

import pytest
from edge_harness import Memory
from test_edge_route import ENGINES, chosen, routed

from sglfast import _workers, shm
from sglfast.edge.route import Router
from sglfast.edge.shard import Shard


def test_a_change_while_the_table_is_read_is_seen_at_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version that counts is the one before the first slot was read."""
    memory = Memory(ENGINES[:3])

    def test(router: Router, shard: Shard) -> None:
        def read_and_change(table: Any) -> Any:
            views = shm.read_workers(table)
            memory.table.set_state(1, _workers.UNHEALTHY)
            return views

        with monkeypatch.context() as patch:
            patch.setattr("sglfast.edge.served.read_workers", read_and_change)
            router.refresh()
        assert len(router.pools["demo"].workers) == 3
        router.refresh()
        assert [worker.worker_idx for worker in router.pools["demo"].workers] == [0, 2]

    routed(memory, test)


def test_a_table_that_cannot_be_read_leaves_what_is_known(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory(ENGINES[:2])

    def test(router: Router, shard: Shard) -> None:
        router.refresh()
        tries = []

        def torn(table: Any) -> Any:
            tries.append(table)
            raise RuntimeError("worker slot 0 is being written")

        memory.table.set_state(0, _workers.UNHEALTHY)
        with monkeypatch.context() as patch:
            patch.setattr("sglfast.edge.served.read_workers", torn)
            assert {chosen(router) for _ in range(4)} == {0, 1}
        assert len(tries) == 1, "a try that waits for the writer is not repeated by every request"
        assert "cannot be read now: worker slot 0 is being written" in caplog.text
        assert {chosen(router) for _ in range(4)} == {0, 1}
        router._unreadable_until_s = 0.0
        assert {chosen(router) for _ in range(4)} == {1}

    routed(memory, test)
