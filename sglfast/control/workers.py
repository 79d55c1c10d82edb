"""The owner of the worker table: who has which slot and which ranks, and what index and shards get to see of a worker.

Runs in: control, the table's only writer. Contract: a worker's ranks are contiguous; ranks that it gives back are used again only in a
    later write of the table, and index clears them before (index/main). A worker that finds no ranks is routed without KV
    awareness: its slot says dp_size 0 and block_size 0. The slot and the ranks of a removed worker are nobody's until `release`:
    while a shard may still count a request there, the next owner would inherit it.
"""

import heapq
import logging
from collections.abc import Sequence

import msgspec

from sglfast._workers import BLOB_BYTES, DRAINING, JOINING, WorkerTable
from sglfast.control.introspect import Findings
from sglfast.control.rank_ranges import RankRanges
from sglfast.control.roles import Found, Named, Traits, mismatches, resolve
from sglfast.errors import ConfigError
from sglfast.shm import KeyRoute, WorkerRecord, WorkerView, put_worker
from sglfast.wire.kv_endpoint import KvSetting, with_setting
from sglfast.wire.server_info import WorkerFacts

_NAME_LIMIT_CHARACTERS = 512
_URL_LIMIT_BYTES = 1024
_BLOCK_SIZE_LIMIT = 1 << 20


# Whether its blocks are keyed by pairs, its version, its start time: another engine may be another matter.
_Said = tuple[bool, str | None, float | None]


class TableFullError(ConfigError):
    """There is no slot for one more worker."""


class Workers:
    """The workers. `views` is what the table says; only this class changes both."""

    def __init__(
        self,
        table: WorkerTable,
        max_ranks: int,
        log: logging.Logger,
        *,
        key_route: str = "auto",
        kv_settings: Sequence[KvSetting] = (),
        dp_aware: bool = False,
    ) -> None:
        self._table = table
        self._key_route = key_route  # --key-route
        self._kv_settings = kv_settings
        self.dp_aware = dp_aware  # --dp-aware: ranks are needed without KV events, too
        self._max_ranks = max_ranks
        self._ranks = RankRanges(max_ranks)
        self._log = log
        self._views: dict[int, WorkerView] = {}
        self._health: dict[int, int] = {}  # state by health alone
        self._draining: set[int] = set()
        self._models: dict[int, str] = {}  # names that were given, and not to be asked for
        self._named: dict[int, Named] = {}  # what the operator said of those whose role he named
        self._said_pairs: dict[int, _Said] = {}
        self._seen_pairs: dict[int, tuple[_Said, bool]] = {}  # what its blocks showed it to be, while it said that
        self._lacking_port: set[int] = set()
        self._traits: dict[int, Traits] = {}  # of prefill and decode workers
        self._parity_causes: dict[int, str] = {}
        self._unplaced: dict[int, Findings] = {}  # of workers that publish events and have found no ranks
        self._told: dict[int, str] = {}  # the last problem with a worker's role that was logged
        self._mismatches: dict[str, list[str]] = {}  # by model, as they were logged
        self._removed: dict[int, tuple[int, int]] = {}  # slot -> (first rank, ranks) until `release`
        self._free_slots = list(range(table.max_workers))  # a heap: the lowest is taken first, which keeps pools in order

    @property
    def views(self) -> Sequence[WorkerView]:
        """All workers in slot order."""
        return [self._views[worker_idx] for worker_idx in sorted(self._views)]

    def view(self, worker_idx: int) -> WorkerView:
        """One worker. Raises KeyError for a slot that nobody has."""
        return self._views[worker_idx]

    def health(self, worker_idx: int) -> int:
        """The state that the worker's health alone gives it, whether it drains or not."""
        return self._health[worker_idx]

    @property
    def version(self) -> int:
        """Of the table; it moves with every change."""
        return self._table.version()

    def lacks_port(self, worker_idx: int) -> bool:
        """Whether it is a prefill worker whose bootstrap port neither the operator nor itself has told."""
        return worker_idx in self._lacking_port

    def register(self, url: str, *, model: str | None = None, api_key: str | None = None, named: Named | None = None) -> int:
        """Give the worker a slot, in state JOINING and with nothing known of it but what is given; returns its worker_idx.

        model: its model's name, whatever it says itself; named: what it is there for, unless it says something else.
        Raises ConfigError when the URL does not fit, TableFullError.
        """
        found = resolve(named or Named(), None)
        record = WorkerRecord(url=url, model=model, api_key=api_key, role=found.role, bootstrap_port=found.bootstrap_port)
        if len(url.encode()) > _URL_LIMIT_BYTES:
            raise ConfigError(f"--worker-urls: a URL of {len(url)} characters is longer than {_URL_LIMIT_BYTES} bytes")
        if not self._free_slots:
            raise TableFullError(f"--max-workers {self._table.max_workers}: there is no slot for {url}")
        worker_idx = heapq.heappop(self._free_slots)
        # Its rank is taken like any other's, so that the rank table can say that it publishes no events.
        rank_base = self._ranks.take(1, is_last=True)
        view = WorkerView(
            worker_idx=worker_idx,
            generation=self._table.generation(worker_idx) + 1,
            state=JOINING,
            rank_base=rank_base or 0,
            dp_size=0 if rank_base is None else 1,
            block_size=0,
            bigram=False,
            record=record,
        )
        put_worker(self._table, view, is_new=True)
        self._views[worker_idx] = view
        self._health[worker_idx] = JOINING
        if model is not None:
            self._models[worker_idx] = model
        if named is not None:
            self._named[worker_idx] = named
        if found.lacks_port:
            self._lacking_port.add(worker_idx)
        return worker_idx

    def remove(self, worker_idx: int) -> None:
        """Take the worker out of the table; its slot and ranks stay taken until `release`."""
        view = self._views.pop(worker_idx)
        del self._health[worker_idx]
        self._draining.discard(worker_idx)
        self._lacking_port.discard(worker_idx)
        of_workers = (self._models, self._named, self._traits, self._told, self._said_pairs, self._seen_pairs)
        for of_worker in (*of_workers, self._parity_causes, self._unplaced):
            of_worker.pop(worker_idx, None)
        self._removed[worker_idx] = (view.rank_base, view.dp_size)
        self._table.remove(worker_idx)

    def release(self, worker_idx: int) -> None:
        """Give a removed worker's slot and ranks to whoever comes: no shard counts or sends there any more."""
        self._ranks.give_back(*self._removed.pop(worker_idx))
        heapq.heappush(self._free_slots, worker_idx)
        for waiting_idx, findings in list(self._unplaced.items()):
            if self.learn(waiting_idx, findings) and waiting_idx not in self._unplaced:
                self._log.info("worker has ranks in the KV index now", extra={"fields": {"worker": self._views[waiting_idx].record.url}})

    def set_state(self, worker_idx: int, state: int) -> None:
        """Change what the worker's health says. state: a word of sglfast._workers; READY is routed to unless it drains."""
        self._health[worker_idx] = state
        self._show_state(worker_idx)

    def set_draining(self, worker_idx: int, is_draining: bool) -> None:
        """Begin or end that the worker gets no new requests, whatever its health."""
        if is_draining:
            self._draining.add(worker_idx)
        else:
            self._draining.discard(worker_idx)
        self._show_state(worker_idx)

    def _show_state(self, worker_idx: int) -> None:
        state = DRAINING if worker_idx in self._draining else self._health[worker_idx]
        if self._views[worker_idx].state != state:
            self._views[worker_idx] = msgspec.structs.replace(self._views[worker_idx], state=state)
            self._table.set_state(worker_idx, state)

    def set_api_key(self, worker_idx: int, api_key: str | None) -> None:
        """Change the key that the worker is shown."""
        old = self._views[worker_idx]
        self._put(msgspec.structs.replace(old, record=msgspec.structs.replace(old.record, api_key=api_key)))

    def _put(self, view: WorkerView) -> None:
        self._views[view.worker_idx] = view
        put_worker(self._table, view, is_new=False)

    def set_parity(self, worker_idx: int, parity: int, cause: str = "") -> None:
        """Change whether the worker's reports agree with the predictions. parity: shm.PARITY_*; cause: why they do not."""
        self._parity_causes[worker_idx] = cause
        self._put(msgspec.structs.replace(self._views[worker_idx], parity=parity))

    def set_pairs(self, worker_idx: int, are_pairs: bool) -> bool:
        """Believe the worker's blocks, not its word, about pairs of tokens (EAGLE); once for each word. Returns whether that is new."""
        said = self._said_pairs.get(worker_idx)
        view = self._views[worker_idx]
        if said is None or worker_idx in self._seen_pairs or view.bigram == are_pairs:
            return False
        self._seen_pairs[worker_idx] = said, are_pairs
        self._put(msgspec.structs.replace(view, bigram=are_pairs))
        return True

    def _has_pairs(self, worker_idx: int, facts: WorkerFacts) -> bool:
        """Whether the worker's blocks are keyed by pairs of tokens: as it says, unless its blocks have shown something else since."""
        said = self._said_pairs[worker_idx] = facts.bigram, facts.version, facts.startup_time
        seen = self._seen_pairs.get(worker_idx)
        if seen is not None and seen[0] == said:
            return seen[1]
        self._seen_pairs.pop(worker_idx, None)
        return facts.bigram

    def confirm_ranks(self, worker_idx: int) -> None:
        """Say that the worker has been asked for its ranks again, and what it said is in the table."""
        old = self._views[worker_idx]
        self._put(msgspec.structs.replace(old, record=msgspec.structs.replace(old.record, ranks_asked=old.record.ranks_asked + 1)))

    def parity_cause(self, worker_idx: int) -> str:
        """Why the worker's reports do not agree with the predictions; "" when they do."""
        return self._parity_causes.get(worker_idx, "")

    def learn(self, worker_idx: int, findings: Findings) -> bool:
        """Take over what an introspection found; returns whether the table changed.

        What a worker that did not speak said earlier is kept: a slow `/server_info` must not cost its KV awareness.
        """
        old = self._views[worker_idx]
        model = self._models.get(worker_idx) or self._usable_name(old.record.url, findings.model)
        if not findings.has_spoken:
            new = msgspec.structs.replace(old, record=msgspec.structs.replace(old.record, model=model or old.record.model))
            if not _fits(new.record):
                return False
        else:
            found = self._role_of(worker_idx, findings.facts)
            facts = with_setting(findings.facts, old.record.url, self._kv_settings)
            was_unplaced = self._unplaced.pop(worker_idx, None) is not None
            new = self._place(old, model, facts, found, was_unplaced=was_unplaced)
            if facts is not None and not new.dp_size and (facts.kv is not None or (self.dp_aware and new.record.rank_ways)):
                self._unplaced[worker_idx] = findings
            new = self._with_adapters(new, findings.adapters)
            self._note_traits(new, findings.facts)
        if new == old:
            return False
        self._put(new)
        return True

    def _with_adapters(self, view: WorkerView, adapters: tuple[str, ...]) -> WorkerView:
        """The same with the names of its adapters, as many as fit into its record."""
        names = [name for name in adapters if name.isprintable() and len(name) <= _NAME_LIMIT_CHARACTERS]
        for count in range(len(names), 0, -1):
            record = msgspec.structs.replace(view.record, adapter_models=tuple(names[:count]))
            if _fits(record):
                break
        else:
            count, record = 0, view.record
        if count < len(adapters):
            self._log.warning(
                "not all adapters of the worker can be told from other models",
                extra={"fields": {"worker": record.url, "adapters": len(adapters), "known": count}},
            )
        return msgspec.structs.replace(view, record=record)

    def _role_of(self, worker_idx: int, facts: WorkerFacts | None) -> Found:
        found = resolve(self._named.get(worker_idx, Named()), facts)
        if found.problem and self._told.get(worker_idx) != found.problem:
            self._log.warning(found.problem, extra={"fields": {"worker": self._views[worker_idx].record.url, "role": found.role}})
        self._told[worker_idx] = found.problem
        if found.lacks_port:
            self._lacking_port.add(worker_idx)
        else:
            self._lacking_port.discard(worker_idx)
        return found

    def _note_traits(self, view: WorkerView, facts: WorkerFacts | None) -> None:
        """Say when the prefill and decode workers of a model do not fit together, once for each way."""
        self._traits.pop(view.worker_idx, None)
        if facts is None or view.record.role == "regular":
            return
        told = Traits(view.record.url, view.record.role, facts.tp_size, facts.dp_size, facts.load_balance_method)
        self._traits[view.worker_idx] = told
        model = view.record.model or ""
        others = [
            traits for idx, traits in self._traits.items() if idx != view.worker_idx and (self._views[idx].record.model or "") == model
        ]
        found = mismatches([*others, told])
        for text in found:
            if text not in self._mismatches.get(model, ()):
                self._log.warning(text, extra={"fields": {"model": model}})
        self._mismatches[model] = found

    def _usable_name(self, url: str, model: str | None) -> str | None:
        if model is None or (model.isprintable() and len(model) <= _NAME_LIMIT_CHARACTERS):
            return model
        self._log.warning(
            f"the worker's model name is not used: it is longer than {_NAME_LIMIT_CHARACTERS} characters or not printable",
            extra={"fields": {"worker": url}},
        )
        return None

    def _place(self, old: WorkerView, model: str | None, facts: WorkerFacts | None, found: Found, *, was_unplaced: bool) -> WorkerView:
        """The worker with these facts and in this role, its ranks taken."""
        url = old.record.url
        asked = old.record.ranks_asked
        record = WorkerRecord(
            url=url, model=model, api_key=old.record.api_key, ranks_asked=asked, role=found.role, bootstrap_port=found.bootstrap_port
        )
        kv = facts.kv if facts else None
        if facts is not None:
            full = WorkerRecord(
                url=url,
                model=model,
                api_key=old.record.api_key,
                version=facts.version,
                disaggregation_mode=facts.disaggregation_mode,
                startup_time=facts.startup_time,
                kv_host=kv.host if kv else None,
                kv_port_base=kv.port_base if kv else 0,
                kv_topic=kv.topic if kv else "",
                kv_replay_port_base=kv.replay_port_base if kv else None,
                kv_connects_out=facts.kv_connects_out,
                adapters=facts.adapters,
                tools=facts.tools,
                template_kwargs=facts.template_kwargs,
                engine=facts.engine,
                takes_rid=facts.takes_rid,
                rank_ways=facts.rank_ways if facts.dp_size > 1 else "",
                ranks_asked=asked,
                role=found.role,
                bootstrap_port=found.bootstrap_port,
            )
            if _fits(full) and (kv is None or kv.block_size <= _BLOCK_SIZE_LIMIT):
                record = full
            else:
                kv = None
                self._log.warning("what the worker says of itself does not fit and is not used", extra={"fields": {"worker": url}})
        dp_size = facts.dp_size if facts else 1
        must_have = kv is not None or (self.dp_aware and bool(record.rank_ways))
        rank_base = self._take_ranks(old, dp_size, must_have=must_have, is_told=was_unplaced)
        if rank_base is None:
            dp_size = 0
            if kv is not None:
                kv = None
                record = msgspec.structs.replace(record, kv_host=None, kv_port_base=0, kv_topic="", kv_replay_port_base=None)
        return msgspec.structs.replace(
            old,
            rank_base=rank_base or 0,
            dp_size=dp_size,
            block_size=kv.block_size if kv else 0,
            bigram=bool(kv and facts and self._has_pairs(old.worker_idx, facts)),
            key_route=self._route(facts),
            record=record,
        )

    def _route(self, facts: WorkerFacts | None) -> KeyRoute:
        if self._key_route == "auto":
            return facts.key_route if facts else "sha256"
        return "tokens" if self._key_route == "tokens" else "sha256"

    def _take_ranks(self, old: WorkerView, count: int, *, must_have: bool, is_told: bool) -> int | None:
        """First of `count` ranks for the worker, those of `old` given back or kept; None when there are none. is_told: of that already."""
        if old.dp_size == count:
            return old.rank_base
        self._ranks.give_back(old.rank_base, old.dp_size)
        rank_base = self._ranks.take(count, is_last=count == 1)
        if rank_base is None and must_have:
            self._free_idle_ranks(except_idx=old.worker_idx)
            rank_base = self._ranks.take(count)
        if rank_base is None and must_have and not is_told:
            what = f"{count} contiguous ranks" if count > 1 else "a rank"
            remedy = "raise --max-ranks (at most 1024)" if self._max_ranks < 1024 else "an index has no more than that"
            self._log.warning(
                f"worker is routed as a whole, without KV awareness: it needs {what}, --max-ranks {self._max_ranks} "
                f"leaves {self._ranks.free}; {remedy}",
                extra={"fields": {"worker": old.record.url}},
            )
        return rank_base

    def _free_idle_ranks(self, except_idx: int) -> None:
        """Take the ranks of workers without KV events back: they serve nothing but display."""
        for view in self.views:
            is_idle = not view.block_size and not (self.dp_aware and view.record.rank_ways)
            if view.worker_idx != except_idx and view.dp_size and is_idle:
                self._ranks.give_back(view.rank_base, view.dp_size)
                self._put(msgspec.structs.replace(view, rank_base=0, dp_size=0))


def _fits(record: WorkerRecord) -> bool:
    return len(msgspec.msgpack.encode(record)) <= BLOB_BYTES
