"""Who may begin: a limit on requests in flight, a rate, a queue for those who must wait, in order of priority and fair between tenants.

Runs in: shards, event loop; only when a limit is set, else requests never come here. Contract: `ask` ends in exactly one of admitted
    (`Exchange.choose`), refused (429) or waiting; who waits is admitted, answered 408 after `--queue-timeout-secs`, or
    forgotten because its client left. Limits hold over all shards (sglfast._admission); each shard has a queue of its own, and the
    longest waiting request of the highest priority goes first, in whichever shard it is: a shard shows the others the order of its
    first, and stands back while another shard's is lower. It stands back for _DEFER_SECS at most, in case that shard hangs.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from time import monotonic
from typing import TYPE_CHECKING

from sglfast import _counters, errors
from sglfast._admission import Limits
from sglfast.edge.header_lines import value_of

if TYPE_CHECKING:
    from sglfast.edge.exchange import Exchange
    from sglfast.edge.route import Route
    from sglfast.edge.shard import Shard

_POLL_SECS = 0.002  # while somebody waits: places that other shards' requests leave are not announced
_DEFER_SECS = 0.02
_TRIES = 4  # two shards that take the last place at once both step back
_PRIORITY_MAX = 1000
_TIME_BITS = 52  # microseconds of the monotonic clock: 142 years


def is_limited(shard: Shard) -> bool:
    """Whether the settings limit anything."""
    config = shard.config
    return config.max_concurrent_requests > 0 or config.rate_limit_tokens_per_second is not None or config.worker_max_in_flight > 0


class Ticket:
    """A request that waits. order: lower goes first."""

    __slots__ = ("exchange", "is_void", "order", "priority", "since_s", "tenant")

    def __init__(self, exchange: Exchange, priority: int, tenant: bytes) -> None:
        self.exchange = exchange
        self.priority = priority
        self.tenant = tenant
        self.since_s = monotonic()
        self.order = (_PRIORITY_MAX - priority) << _TIME_BITS | int(self.since_s * 1e6)
        self.is_void = False


class Admission:
    """The admission of one shard."""

    def __init__(self, shard: Shard) -> None:
        config = shard.config
        self._shard = shard
        self._timeout_s = config.queue_timeout_secs
        self._has_queue = config.queue_size > 0 and config.queue_timeout_secs > 0
        self._worker_limit = config.worker_max_in_flight
        self._priority_header = config.priority_header.lower().encode() if config.priority_header else None
        self._is_fair = config.tenant_fairness
        in_flight = max(0, config.max_concurrent_requests)
        rate = config.rate_limit_tokens_per_second or 0
        self._limits = Limits(
            shard.segment, shard.shard, max_in_flight=in_flight, max_waiting=config.queue_size, rate_per_s=rate, burst=in_flight or rate
        )
        self._queues: dict[int, OrderedDict[bytes, deque[Ticket]]] = {}  # priority -> tenant -> those who wait
        self._by_age: deque[Ticket] = deque()
        self._waiting = 0
        self._is_blocked = False  # the last one admitted found every worker full
        self._is_polling = False
        self._deferred: tuple[int, float] = (0, 0.0)  # another shard's first, and since when it has been before ours

    # ---- what exchanges say ----

    def ask(self, exchange: Exchange) -> None:
        """A request would like to begin."""
        if not self._limits.first_order() and self._take():
            self._admit(exchange)
        else:
            self._wait(exchange)

    def take_worker(self, exchange: Exchange, route: Route) -> Route | None:
        """The route, or another where the chosen worker is full; None when all are: the request waits again.

        Shards that choose at the same moment do not see each other here: a worker may get one request too many from each.
        """
        if not self._worker_limit or self._shard.loads.requests(route.upstream.worker_idx) < self._worker_limit:
            return route
        other: Route | None = self._shard.router.next_choice(route, (*exchange.tried, route.upstream.worker_idx))
        if other is not None and self._shard.loads.requests(other.upstream.worker_idx) < self._worker_limit:
            return other
        exchange.holds_permit = False
        self._limits.give_back()
        self._is_blocked = True
        self._wait(exchange)
        return None

    def leave(self, exchange: Exchange) -> None:
        """A request that was admitted, or that waits, is over."""
        if exchange.ticket is not None:
            self._drop(exchange.ticket)
        if exchange.holds_permit:
            exchange.holds_permit = False
            self._limits.give_back()
            if self._waiting:
                # From the loop: the next one's end may come here again.
                self._shard.loop.call_soon(self._admit_waiting)

    # ---- the queue ----

    def _take(self) -> bool:
        return any(self._limits.take() for _ in range(_TRIES))

    def _admit(self, exchange: Exchange) -> None:
        exchange.holds_permit = True
        exchange.choose()

    def _wait(self, exchange: Exchange) -> None:
        if not self._has_queue or not any(self._limits.line_up() for _ in range(_TRIES)):
            exchange.refuse(errors.QUEUE_FULL)
            return
        kept = exchange.head.kept
        tenant = value_of(kept, b"authorization") or b"" if self._is_fair else b""
        ticket = Ticket(exchange, self._priority_of(kept), tenant)
        exchange.ticket = ticket
        self._waiting += 1
        self._shard.column.add(_counters.S_QUEUED)
        self._queues.setdefault(ticket.priority, OrderedDict()).setdefault(tenant, deque()).append(ticket)
        self._by_age.append(ticket)
        self._show_head()
        self._poll_later()

    def _priority_of(self, kept: bytes) -> int:
        """The number in the priority header, 0 when there is none that can be read."""
        text = value_of(kept, self._priority_header) if self._priority_header is not None else None
        try:
            return max(-_PRIORITY_MAX, min(_PRIORITY_MAX, int(text))) if text and len(text) < 16 else 0
        except ValueError:
            return 0

    def _first(self) -> Ticket | None:
        """Who goes first: the highest priority, there the tenant whose turn it is, there the oldest. Empties what is void on its way."""
        while self._queues:
            priority = max(self._queues)
            tenants = self._queues[priority]
            while tenants:
                tenant, line = next(iter(tenants.items()))
                while line and line[0].is_void:
                    line.popleft()
                if line:
                    return line[0]
                del tenants[tenant]
            del self._queues[priority]
        return None

    def _drop(self, ticket: Ticket) -> None:
        """Nobody waits with this ticket any more."""
        ticket.is_void = True
        ticket.exchange.ticket = None
        self._waiting -= 1
        self._limits.step_out()
        self._shard.column.add(_counters.S_QUEUE_WAIT_US, int((monotonic() - ticket.since_s) * 1e6))
        self._show_head()

    def _show_head(self) -> None:
        first = self._first()
        self._limits.show_head(first.order if first is not None else 0)

    def _admit_waiting(self) -> None:
        """Admit those for whom there is room now."""
        self._is_blocked = False
        while not self._is_blocked and (first := self._first()) is not None:
            if self._stands_back(first.order) or not self._take():
                break
            tenants = self._queues[first.priority]
            tenants.move_to_end(first.tenant)
            self._drop(first)
            self._admit(first.exchange)

    def _stands_back(self, own: int) -> bool:
        """Whether a request of another shard is to go before our first."""
        lowest = self._limits.first_order()
        if not 0 < lowest < own:
            return False
        now_s = monotonic()
        if self._deferred[0] != lowest:
            self._deferred = (lowest, now_s)
        return now_s - self._deferred[1] < _DEFER_SECS

    def _poll_later(self) -> None:
        if not self._is_polling:
            self._is_polling = True
            self._shard.loop.call_later(_POLL_SECS, self._poll)

    def _poll(self) -> None:
        self._is_polling = False
        if self._waiting:
            self._poll_later()  # first: an error below must not stop the clock
        before_s = monotonic() - self._timeout_s
        while self._by_age and (self._by_age[0].is_void or self._by_age[0].since_s < before_s):
            ticket = self._by_age.popleft()
            if not ticket.is_void:
                ticket.exchange.refuse(errors.QUEUE_TIMEOUT)
        self._admit_waiting()
