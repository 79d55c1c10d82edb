"""Who may begin: a limit on requests in flight, a rate, a queue for those who must wait, in order of priority and fair between tenants.

Runs in: shards, event loop; only when a limit is set, else requests never come here. Contract: `ask` ends in exactly one of admitted
    (`Exchange.choose`), refused (429) or waiting; who waits is admitted, answered 408 after `--queue-timeout-secs`, or
    forgotten because its client left. Limits hold over all shards (sglfast._admission); each shard has a queue of its own, and the
    longest waiting request of the highest priority goes first, in whichever shard it is: a shard shows the others the order of its
    first, and leaves a free place to a shard whose order is lower. It does so for _DEFER_SECS at most, in case that shard hangs.
    Who was admitted and finds all workers of its model full gives its permit back and waits in a line of that model, so that it
    holds up no other model and is not looked at again before a worker has room. Lines of one model are one over all shards in the
    same way; the order of a shard's first stands in the words of the pool's first worker.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Iterable
from heapq import heappop, heappush
from time import monotonic
from typing import TYPE_CHECKING

from sglfast import _counters, errors
from sglfast._admission import Limits
from sglfast.edge.header_lines import value_of

if TYPE_CHECKING:
    from sglfast.edge.exchange import Exchange
    from sglfast.edge.pools import Route
    from sglfast.edge.shard import Shard

_POLL_SECS = 0.002  # while somebody waits: places that other shards' requests leave are not announced
_DEFER_SECS = 0.02
_TRIES = 4  # two shards that take the last place at once both step back
_PRIORITY_MAX = 1000
_QUEUE = -1  # where a place becomes free: here, or for a pool, whose first worker's row stands for it
_TIME_BITS = 52  # microseconds of the monotonic clock: 142 years


class Ticket:
    """A request that waits. order: lower goes first, and in time (since_s: when the request was there) for equal priorities."""

    __slots__ = ("begun_s", "exchange", "is_in_line", "is_void", "order", "priority", "since_s", "tenant")

    def __init__(self, exchange: Exchange, priority: int, tenant: bytes) -> None:
        self.exchange = exchange
        self.priority = priority
        self.tenant = tenant
        self.begun_s = monotonic()
        self.since_s = exchange.started_s
        self.order = (_PRIORITY_MAX - priority) << _TIME_BITS | int(self.since_s * 1e6)
        self.is_in_line = False  # of a model whose workers are full
        self.is_void = False

    def __lt__(self, other: Ticket) -> bool:
        return self.order < other.order


class Admission:
    """The admission of one shard. It stays when the limits are taken away: permits and those who wait are its own."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._queues: dict[int, OrderedDict[bytes, deque[Ticket]]] = {}  # priority -> tenant -> those who wait
        self._lines: dict[str | None, list[Ticket]] = {}  # model whose workers are full -> those who wait, by order
        self._by_age: list[tuple[float, int, Ticket]] = []  # a heap
        self._count = 0
        self._waiting = 0
        self._is_polling = False
        # Another shard's first, and since when a free place has been left to it; by row, or _QUEUE.
        self._deferred: dict[int, tuple[int, float]] = {}
        self._shown: dict[str | None, int] = {}  # model -> row that tells the other shards of its line
        self.apply()

    def apply(self) -> None:
        """Take the limits of the shard's settings from now on. Who has a permit keeps it, who waits goes on waiting, under the new ones."""
        config = self._shard.config
        self._timeout_s = config.queue_timeout_secs
        self._has_queue = config.queue_size > 0 and config.queue_timeout_secs > 0
        self._worker_limit: int = config.worker_max_in_flight
        self._priority_header = config.priority_header.lower().encode() if config.priority_header else None
        self._is_fair = config.tenant_fairness
        in_flight = max(0, config.max_concurrent_requests)
        rate = config.rate_limit_tokens_per_second or 0
        self._limits = Limits(
            self._shard.segment,
            self._shard.shard,
            max_in_flight=in_flight,
            max_waiting=config.queue_size,
            rate_per_s=rate,
            burst=in_flight or rate,
        )
        self.is_limiting: bool = config.is_limited

    def count_running(self, exchanges: Iterable[Exchange | None]) -> None:
        """Requests that began while nothing was limited count from now on, so that the bound holds at once."""
        for exchange in exchanges:
            if exchange is not None and not exchange.holds_permit and exchange.ticket is None:
                exchange.holds_permit = True
                self._limits.hold()

    # ---- what exchanges say ----

    def ask(self, exchange: Exchange) -> None:
        """A request would like to begin."""
        if not self.is_limiting:
            exchange.choose()
        elif not self._limits.first_order() and self._take():
            self._admit(exchange)
        else:
            self._wait(exchange)

    def take_worker(self, exchange: Exchange, route: Route) -> Route | None:
        """The route, or another where the chosen worker is full; None when all are: the request waits again.

        That holds for further attempts too. One that has failed at some workers waits for the others, also while those have room.
        Shards that choose at the same moment do not see each other here: a worker may get one request too many from each.
        """
        if not self._worker_limit:
            return route
        tried, router = exchange.tried, self._shard.router

        def untried(route: Route) -> bool:
            return set(tried).isdisjoint(route.rows)

        model = route.pool.model
        ticket, first = Ticket(exchange, self._priority_of(exchange.head.kept), b""), self._first_to_go(model)
        if first is None or ticket < first:
            if not untried(route):
                route = router.next_choice(route, tried) or route  # chosen anew, after it had to wait
            free: Route | None = route
            if full := self._full(route):
                free = router.next_choice(route, (*tried, *full))
                if free is not None and (self._full(free) or (untried(route) and not untried(free))):
                    free = None
            if free is not None and not self._stands_back(self._row_of(model), ticket):
                return free
        exchange.holds_permit = False
        self._limits.give_back()
        self._wait(exchange, model, is_admitted=True)
        return None

    def _full(self, route: Route) -> tuple[int, ...]:
        """Rows of those workers of a route that have as many requests as they may."""
        return tuple(row for row in route.rows if self._shard.loads.requests(row) >= self._worker_limit)

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

    def _wait(self, exchange: Exchange, model: str | None = None, *, is_admitted: bool = False) -> None:
        """Line up: for a permit, or, with that, for a worker of the model."""
        if not self._has_queue or not any(self._limits.line_up() for _ in range(_TRIES)):
            exchange.give_up(errors.QUEUE_FULL)
            return
        kept = exchange.head.kept
        tenant = value_of(kept, b"authorization") or b"" if self._is_fair else b""
        ticket = Ticket(exchange, self._priority_of(kept), tenant)
        exchange.ticket = ticket
        self._waiting += 1
        self._count += 1
        self._shard.column.add(_counters.S_QUEUED)
        # An attempt may have lasted for long, and that is no wait: a further one waits from now on.
        heappush(self._by_age, (ticket.begun_s if exchange.failed_attempts is not None else ticket.since_s, self._count, ticket))
        if is_admitted:
            ticket.is_in_line = True
            insort(self._lines.setdefault(model, []), ticket)
            self._show_line_head(model)
        else:
            self._queues.setdefault(ticket.priority, OrderedDict()).setdefault(tenant, deque()).append(ticket)
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

    def _drop(self, ticket: Ticket) -> Exchange:
        """Nobody waits with this ticket any more. Returns who did."""
        exchange = ticket.exchange
        exchange.ticket = None
        del ticket.exchange  # the ticket itself may stay in its places for a while
        ticket.is_void = True
        self._waiting -= 1
        self._limits.step_out()
        self._shard.column.add(_counters.S_QUEUE_WAIT_US, int((monotonic() - ticket.begun_s) * 1e6))
        if not ticket.is_in_line:
            self._show_head()
        return exchange

    def _show_head(self) -> None:
        first = self._first()
        self._limits.show_head(first.order if first is not None else 0)

    def _admit_waiting(self) -> None:
        """Admit those for whom there is room now."""
        for model in [*self._lines]:
            self._admit_line(model)
        while (first := self._first()) is not None:
            # Only what is free can be left to another: no time of standing back is spent before.
            if not self._limits.has_room() or self._stands_back(_QUEUE, first) or not self._take():
                break
            tenants = self._queues[first.priority]
            tenants.move_to_end(first.tenant)
            self._admit(self._drop(first))

    def _admit_line(self, model: str | None) -> None:
        """Admit those who wait for a worker of this model, one for each place."""
        row = self._row_of(model)
        while (first := self._first_to_go(model)) is not None:
            if self._is_full(model, first) or self._stands_back(row, first) or not self._take():
                break
            exchange = self._drop(first)
            self._admit(exchange)
            if exchange.ticket is not None:
                break  # full after all
        self._show_line_head(model)

    def _row_of(self, model: str | None) -> int:
        """Where shards tell each other who waits for a worker of this model; _QUEUE when it has none any more."""
        pool = self._shard.router.pools.get(model)
        return pool.view.worker_idxs[0] if pool is not None else _QUEUE

    def _show_line_head(self, model: str | None) -> None:
        first, row = self._first_to_go(model), self._row_of(model)
        shown = self._shown.pop(model, _QUEUE)
        if shown not in (_QUEUE, row) or (shown == row and first is None):
            self._limits.show_line_head(shown, 0)
        if first is not None and row != _QUEUE:
            self._limits.show_line_head(row, first.order)
            self._shown[model] = row

    def _first_to_go(self, model: str | None) -> Ticket | None:
        """Who is next for a worker of this model. Who has failed at some waits for the others and lets pass who comes behind."""
        place = 0
        while (ticket := self._in_line(model, place)) is not None and ticket.exchange.tried and self._is_full(model, ticket):
            place += 1
        return ticket

    def _is_full(self, model: str | None, ticket: Ticket) -> bool:
        """Whether no worker has room for a request; a model without a pool has, and whoever chooses is told so."""
        pool = self._shard.router.pools.get(model)
        return bool(self._worker_limit) and pool is not None and pool.is_full(self._shard.loads, self._worker_limit, ticket.exchange.tried)

    def _in_line(self, model: str | None, place: int) -> Ticket | None:
        """Who waits at this place of a model's line. Empties what is void there."""
        line = self._lines.get(model)
        while line and place < len(line):
            if not line[place].is_void:
                return line[place]
            line.pop(place)
        if line is not None and not line:
            del self._lines[model]
        return None

    def _stands_back(self, row: int, first: Ticket) -> bool:
        """Whether a place that is free now is for another shard's request. row: of the pool, or _QUEUE."""
        lowest = self._limits.first_order() if row == _QUEUE else self._limits.first_in_line(row)
        if not 0 < lowest < first.order:
            return False
        now_s = monotonic()
        if row not in self._deferred or self._deferred[row][0] != lowest:
            self._deferred[row] = (lowest, now_s)
        return now_s - self._deferred[row][1] < _DEFER_SECS

    def _poll_later(self) -> None:
        if not self._is_polling:
            self._is_polling = True
            self._shard.loop.call_later(_POLL_SECS, self._poll)

    def _poll(self) -> None:
        self._is_polling = False
        if self._waiting:
            self._poll_later()  # first: an error below must not stop the clock
        before_s = monotonic() - self._timeout_s
        while self._by_age and (self._by_age[0][2].is_void or self._by_age[0][0] < before_s):
            ticket = heappop(self._by_age)[2]
            if not ticket.is_void:
                ticket.exchange.give_up(errors.QUEUE_TIMEOUT)
        self._admit_waiting()
