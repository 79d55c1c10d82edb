"""What a request is at one worker, whether it is alone there or one of two halves: its key, its probe, its end.

Runs in: shards, event loop. The state is the compiled base's; this is what an Exchange and the prefill half of a pair have in common.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglfast import _counters
from sglfast._relay import ExchangeBase
from sglfast.edge.abort import abort
from sglfast.edge.breaker import NO_PROBE, PROBE, PROBE_ANSWERED
from sglfast.edge.header_lines import without
from sglfast.edge.parity import cached_tokens_in, is_impossible, outcome_word
from sglfast.edge.rank_refusal import doubt_rank, refuses_in_stream

if TYPE_CHECKING:
    from sglfast.edge.pools import Route
    from sglfast.edge.retry import Attempts
    from sglfast.edge.shard import Shard
    from sglfast.edge.upstream import Upstream, UpstreamConnection


class Leg(ExchangeBase):
    """A request at one worker."""

    __slots__ = ()

    shard: Shard
    route: Route | None
    connection: UpstreamConnection | None
    failed_attempts: Attempts | None

    def on_unreachable(self, error: BaseException) -> None:
        """The worker took no connection: nothing was sent."""
        raise NotImplementedError

    def on_no_room(self) -> None:
        """We have no socket for one more connection, to any worker."""
        raise NotImplementedError

    def on_mishap(self, error: Exception) -> None:
        """Our own code has failed for bytes of the worker."""
        raise NotImplementedError

    def kept_with_key(self, upstream: Upstream) -> bytes:
        """The header lines with the worker's key in the place of the client's."""
        return without(self.kept, b"authorization") + (upstream.key_line or b"")

    def probe_answered(self) -> None:
        """A good answer to the probe of a half-open worker begins."""
        if self.probe == PROBE and self.route is not None:
            self.probe = PROBE_ANSWERED
            self.shard.breakers.answered(self.route.upstream)

    def tell_breaker(self, route: Route, outcome_word: int) -> None:
        """The request has left this worker in a way that its breaker has to hear of.

        One request charges a worker once, however often it is tried there: it may be the request that is at fault.
        """
        attempts = self.failed_attempts
        if self.probe or outcome_word != _counters.W_ERRORS or attempts is None or not attempts.has_tried(route):
            self.shard.breakers.left(route.upstream, outcome_word, self.probe)
        self.probe = NO_PROBE

    def resends(self, connection: UpstreamConnection) -> bool:
        """Send once more on a fresh connection, if the lost one had been idle: the worker closed it while the request was on its way."""
        route = self.route
        if route is None or connection.has_spoken or connection.uses <= 1 or self.is_resent or route.upstream.is_removed:
            return False
        self.is_resent = True
        self.shard.column.add(_counters.S_RESENDS)
        route.upstream.open(self)
        return True

    def abandon(self) -> UpstreamConnection | None:
        """Leave the worker in the middle: it learns it at once by the end of the connection, and by name if it takes names."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()
            if self.rid:
                abort(connection.upstream, self.head, self.rid)
        return connection

    def look_for_refused_rank(self, piece: bytes) -> None:
        """The first piece of a stream that comes from a worker that was told a rank in the body: it may refuse that there."""
        route = self.route
        if route is not None and refuses_in_stream(piece) and route.upstream.doubt.heeds(self.shard.loop.time()):
            doubt_rank(self.shard, route, self.dp_rank)

    def look_for_cached_tokens(self, piece: bytes) -> None:
        """What a piece of an answer reports of the worker's cache is kept for `count_parity`."""
        found = cached_tokens_in(piece)
        if found >= 0:
            self.cached_tokens = found

    def count_parity(self) -> None:
        """Count the worker's report against the prediction."""
        route = self.route
        assert route is not None
        word = outcome_word(self.predicted_tokens, self.cached_tokens)
        shard = self.shard
        if word != _counters.W_PARITY_EXACT:
            if shard.router.is_overtaken(route, word, self.cached_tokens):
                word = _counters.W_PARITY_CAME if word == _counters.W_PARITY_LOW else _counters.W_PARITY_WENT
            elif word == _counters.W_PARITY_LOW:
                if is_impossible(shard.tree, route, self.cached_tokens):
                    shard.column.add_worker(route.upstream.worker_idx, _counters.W_PARITY_OVER)
                elif route.upstream.dp_size == 1 or self.rank >= 0:  # else nobody knows whose blocks it found
                    shard.untold.note(route)
        shard.column.add_worker(route.upstream.worker_idx, word)
