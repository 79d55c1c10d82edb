"""When a failed attempt is followed by another: how many there may be, the pauses between them, and the answer kept meanwhile.

Runs in: shards, event loop. Contract: an attempt may be followed by another as long as no byte of an answer has gone to the client. A
    worker's answer of RETRYABLE is held back until a further attempt has done better; when none does, the client gets it as it was,
    unless it was too long to be held: then what the last attempt comes to.
    A request that a worker answered with 5xx, or whose connection broke, may have been executed there, in part or whole: it is sent
    again all the same, as sgl-router does, because a completion that is computed twice costs time and nothing else. Who cannot
    have that turns retries off.
    429 and 503 mean "busy": another worker is asked, and nobody holds it against the one that said so.
Defaults and meaning of the settings are sgl-router's (spec/gateway.md 1.3), but for the choice of the worker: one that has failed
    this request is asked again only when no other is left. As there, no attempt has a time of its own: a worker that hangs uses up
    the request's, unless health checks find it out (`Exchange._flee`).
"""

from __future__ import annotations

import random
from time import monotonic
from typing import TYPE_CHECKING

from sglfast import _counters, errors
from sglfast.edge.breaker import NO_PROBE
from sglfast.edge.rank_refusal import REFUSED

if TYPE_CHECKING:
    import asyncio

    from sglfast._httphead import ResponseHead
    from sglfast.config import ServeConfig
    from sglfast.edge.exchange import Exchange
    from sglfast.edge.pools import Route
    from sglfast.edge.upstream import Upstream

RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
# Of an answer that is held back; a longer one is dropped for the next attempt, or, where there is none, goes to the client.
HELD_BYTES = 65536
# What a worker's answer says of it, as at its end (cext/relay.pyx: on_end); all others that are retried are errors.
_OUTCOMES = {408: _counters.W_CLIENT_ERRORS, 429: _counters.W_BUSY, 503: _counters.W_BUSY}


class RetryPolicy:
    """max_attempts: for one request, the first included."""

    __slots__ = ("_first_s", "_jitter", "_longest_s", "_multiplier", "max_attempts")

    def __init__(self, config: ServeConfig) -> None:
        self.max_attempts = 1 if config.disable_retries else max(1, config.retry_max_retries)
        self._first_s = config.retry_initial_backoff_ms / 1000
        self._longest_s = config.retry_max_backoff_ms / 1000
        self._multiplier = config.retry_backoff_multiplier
        self._jitter = config.retry_jitter_factor

    def pause_s(self, failures: int) -> float:
        """Seconds to wait after so many failed attempts (1 or more): growing, bounded, and spread by chance."""
        try:
            pause_s = min(self._longest_s, self._first_s * self._multiplier ** (failures - 1))
        except OverflowError:
            pause_s = self._longest_s
        return pause_s * random.uniform(1 - self._jitter, 1 + self._jitter)


class HeldAnswer:
    """A worker's answer that may be dropped. body: as it came, framing included; is_complete: its end has come."""

    __slots__ = ("_pieces", "head", "is_complete", "size_bytes")

    def __init__(self, head: ResponseHead, payload: bytes) -> None:
        self.head = head
        self._pieces = [payload]
        self.size_bytes = len(payload)
        self.is_complete = False

    def add(self, data: bytes) -> bool:
        """Take more of the body; returns whether it may still be held."""
        self._pieces.append(data)
        self.size_bytes += len(data)
        return self.size_bytes <= HELD_BYTES

    @property
    def body(self) -> bytes:
        """What has come of it."""
        return b"".join(self._pieces)


class Attempts:
    """The attempts of one exchange that came to nothing; made when the first does. tried: their workers."""

    __slots__ = ("_exchange", "_failures", "_has_retried", "_held", "_is_rank_refused", "_pause", "_tried")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._failures = 0
        self._has_retried = False
        self._is_rank_refused = False
        self._tried: tuple[int, ...] = ()
        self._held: HeldAnswer | None = None
        self._pause: asyncio.TimerHandle | None = None  # before the next attempt

    @property
    def tried(self) -> tuple[int, ...]:
        """Rows of the workers that have failed, in order."""
        return self._tried

    def _has_more(self) -> bool:
        return self._failures + 1 < self._exchange.shard.retry.max_attempts

    def has_tried(self, route: Route) -> bool:
        """Was this worker asked before."""
        return route.upstream.worker_idx in self._tried

    def names_no_rank(self, route: Route) -> bool:
        """Is the request to leave the rank to this worker: it has failed there, or a worker has refused the rank that it named."""
        return self._is_rank_refused or self.has_tried(route)

    def has_other(self, route: Route, at: Upstream) -> bool:
        """Is there a worker to give the request to instead of this one, which is out of the pool, and may it be."""
        return self._has_more() and self._exchange.shard.router.next_choice(route, (*self._tried, at.worker_idx)) is not None

    def go_elsewhere(self, route: Route, at: Upstream) -> None:
        """The worker is half-open and has its probe: this attempt goes to another. at: which of the route's workers."""
        self._tried += (at.worker_idx,)
        following = self._exchange.shard.router.next_choice(route, self._tried)
        if following is None or at.worker_idx in following.rows:
            self.give_up(errors.BREAKER_OPEN)
        else:
            self._send(following)

    def failed(
        self, route: Route, reason: errors.Reason, *, at: Upstream | None = None, is_quick: bool = False, pause_s: float | None = None
    ) -> None:
        """The attempt by this route came to nothing: make another, maybe after a pause, or tell the client.

        reason: told when there is no further attempt and no worker gave an answer; at: whose fault it is, if not the route's own
        worker's; is_quick: a worker that was not tried yet may be asked without a pause, because this one has done nothing; pause_s: the
        pause, where it is known already.
        """
        exchange = self._exchange
        shard = exchange.shard
        self._failures += 1
        self._tried += ((at or route.upstream).worker_idx,)
        following = shard.router.next_choice(route, self._tried) if self._failures < shard.retry.max_attempts else None
        if pause_s is None:
            pause_s = shard.retry.pause_s(self._failures)
        if following is None or monotonic() + pause_s >= exchange.deadline_s:
            self.give_up(reason)
        elif is_quick and not any(row in self._tried for row in following.rows):
            self._next(following)
        else:
            self._pause = shard.loop.call_later(pause_s, self._go_on, route, reason)

    def _go_on(self, route: Route, reason: errors.Reason) -> None:
        """The pause is over."""
        self._pause = None
        try:
            following = self._exchange.shard.router.next_choice(route, self._tried)
            if following is None:
                self.give_up(reason)
            else:
                self._next(following)
        except Exception as error:
            self._exchange.client.on_broken(error)

    def _next(self, following: Route) -> None:
        exchange = self._exchange
        self._has_retried = True
        exchange.is_resent = exchange.decodes_chunks = False
        exchange.probe = NO_PROBE
        exchange.shard.column.add(_counters.S_RETRIES)
        self._send(following)

    def _send(self, following: Route) -> None:
        """Send it there, or, where `--worker-max-in-flight` holds it back, wait for a worker that has not failed it."""
        exchange = self._exchange
        admission = exchange.shard.admission
        granted = following if admission is None else admission.take_worker(exchange, following)
        if granted is not None:
            exchange.send(granted)

    def give_up(self, reason: errors.Reason) -> None:
        """No further attempt: the client gets the last answer that a worker gave, if one did, else our own."""
        self._note_exhausted()
        if self._held is not None and self._held.is_complete:
            self.answer()
        else:
            self._exchange.refuse(reason)

    def _note_exhausted(self) -> None:
        if self._has_retried:
            self._exchange.shard.column.add(_counters.S_RETRIES_EXHAUSTED)

    # ---- an answer that may be dropped ----

    def may_hold(self) -> bool:
        """May there be an attempt after the present one, which has failed by its answer."""
        if self._has_more():
            return True
        self._note_exhausted()
        return False

    def hold(self, head: ResponseHead, payload: bytes) -> None:
        """Keep an answer from the client, because another attempt may better it."""
        self._held = HeldAnswer(head, payload)

    def hold_more(self, data: bytes) -> None:
        """A further piece of its body."""
        held = self._held
        assert held is not None
        if not held.add(data) and not self._drop(held):
            self.release()

    def _drop(self, held: HeldAnswer) -> bool:
        """Make another attempt without the rest of an answer that is too long to be kept; False: nobody else is there, it is the answer."""
        exchange = self._exchange
        shard, route, connection = exchange.shard, exchange.route, exchange.connection
        if route is None or connection is None or held.head.status not in RETRYABLE or not self._has_more():
            return False
        row, pause_s = route.upstream.worker_idx, shard.retry.pause_s(self._failures + 1)
        following = shard.router.next_choice(route, (*self._tried, row))
        # The only worker may be shut by this very error: then there would be nothing left to tell the client.
        if following is None or (shard.breakers.is_on and row in following.rows) or monotonic() + pause_s >= exchange.deadline_s:
            return False
        self._held = exchange.connection = None
        connection.close()
        exchange.leave_worker(_OUTCOMES.get(held.head.status, _counters.W_ERRORS))
        self.failed(route, errors.UPSTREAM_UNREACHABLE, pause_s=pause_s)
        return True

    def release(self) -> None:
        """What was kept is the answer, with what may still come of it."""
        held, self._held = self._held, None
        assert held is not None
        self._exchange.begin_answer(held.head, held.body)

    def release_refusal(self) -> bool:
        """The same for one that was kept only because it may be for a rank of ours; False: there is none."""
        if self._held is None or self._held.head.status != REFUSED:
            return False
        self.release()
        return True

    def end_held(self, route: Route) -> None:
        """It is complete, and has left its worker."""
        assert self._held is not None
        self._held.is_complete = True
        self.failed(route, errors.UPSTREAM_UNREACHABLE)

    @property
    def held_body(self) -> bytes:
        """What has come of the body of the answer that is kept."""
        return b"" if self._held is None else self._held.body

    def answer(self) -> None:
        """The client gets the answer that was kept, which is complete."""
        exchange = self._exchange
        self.release()
        if not exchange.is_over:  # writing can tell that the client is gone
            exchange.finish()
            exchange.client.on_exchange_end()

    def again(self, route: Route) -> None:
        """The answer that was kept is for what we have added to the request: send it to the same worker as its client wrote it.

        Like any further attempt it may have to wait: the place that the first has left can be another shard's by now.
        """
        exchange, self._held = self._exchange, None
        self._is_rank_refused = True  # the worker has not failed: its breaker is to hear of the first time that it does
        exchange.is_resent = exchange.decodes_chunks = False
        exchange.probe = NO_PROBE
        self._send(route)

    def close(self) -> None:
        """The exchange is over."""
        if self._pause is not None:
            self._pause.cancel()
        self._held = None
