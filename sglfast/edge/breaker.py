"""What a shard tells the workers' circuit breakers, and what it does about them.

Runs in: shards, event loop. Contract: the state itself is in shared memory (_breaker); this adds the settings, the counters and one log
    line a transition, by the shard that made it. Good requests on a closed breaker without failures never come here. 4xx answers and
    busy ones (429, 503) are no verdict: a probe that ends so, or is cancelled, gives its slot back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglfast import _counters
from sglfast._breaker import CLAIMED, CLOSED, NEEDLESS, OPEN, Breakers

if TYPE_CHECKING:
    from sglfast.edge.shard import Shard
    from sglfast.edge.upstream import Upstream

# What a request is to the breaker of its worker. PROBE_ANSWERED: it was the probe, and a good answer's head has given the slot back.
NO_PROBE, PROBE, PROBE_ANSWERED = range(3)


class BreakerDesk:
    """The breakers as one shard uses them."""

    def __init__(self, shard: Shard) -> None:
        config = shard.config
        self._shard = shard
        self.is_on = not config.disable_circuit_breaker
        self.table = Breakers(
            shard.segment,
            shard.shard,
            failure_threshold=config.cb_failure_threshold,
            success_threshold=config.cb_success_threshold,
            open_secs=config.cb_timeout_duration_secs,
            window_secs=config.cb_window_duration_secs,
        )

    def claim(self, upstream: Upstream) -> int | None:
        """Let a request go to a half-open worker: PROBE, or NO_PROBE because it has closed by now; None: it may not go there."""
        answer = self.table.claim(upstream.worker_idx, upstream.generation)
        if answer == CLAIMED:
            return PROBE
        return NO_PROBE if answer == NEEDLESS else None

    def left(self, upstream: Upstream, outcome_word: int, probe: int) -> None:
        """A request has left the worker. outcome_word: W_OK, W_ERRORS or one that says nothing of the worker."""
        if not self.is_on:
            return
        now_s = self._shard.loop.time()
        if outcome_word == _counters.W_ERRORS:
            if self.table.failed(upstream.worker_idx, upstream.generation, probe != NO_PROBE, now_s) == OPEN:
                self._shard.column.add_worker(upstream.worker_idx, _counters.W_BREAKER_OPENED)
                self._shard.log.warning("worker's circuit is open: its requests fail", extra={"fields": {"worker": upstream.url}})
        elif outcome_word == _counters.W_OK:
            self._succeeded(upstream, probe == PROBE, now_s)
        elif probe == PROBE:
            self.table.release(upstream.worker_idx)

    def answered(self, upstream: Upstream) -> None:
        """The head of a good answer to the probe has come: verdict enough; its body may take minutes."""
        if upstream.is_removed:
            return
        self._succeeded(upstream, True, self._shard.loop.time())

    def wake(self, upstream: Upstream) -> None:
        """From the sweep, for a worker that is shut: half-open when its time has come."""
        if self.table.wake(upstream.worker_idx, self._shard.loop.time()):
            self._shard.column.add_worker(upstream.worker_idx, _counters.W_BREAKER_HALF_OPENED)

    def _succeeded(self, upstream: Upstream, is_probe: bool, now_s: float) -> None:
        if self.table.succeeded(upstream.worker_idx, upstream.generation, is_probe, now_s) == CLOSED:
            self._shard.column.add_worker(upstream.worker_idx, _counters.W_BREAKER_CLOSED)
            self._shard.log.info("worker's circuit is closed again", extra={"fields": {"worker": upstream.url}})
