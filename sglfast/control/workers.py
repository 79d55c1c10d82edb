"""The owner of the worker table: who has which slot and which ranks, and what index and shards get to see of a worker.

Runs in: control, the table's only writer. Contract: a worker's ranks are contiguous; ranks that it gives back are used again only in a
    later write of the table, and index clears them before (index/main). A worker that finds no ranks is routed without KV
    awareness: its slot says dp_size 0 and block_size 0.
"""

import logging
from collections.abc import Sequence

import msgspec

from sglfast._workers import BLOB_BYTES, JOINING, WorkerTable
from sglfast.control.introspect import Findings
from sglfast.errors import ConfigError
from sglfast.shm import KeyRoute, WorkerRecord, WorkerView, put_worker
from sglfast.wire.kv_endpoint import KvSetting, with_setting
from sglfast.wire.server_info import WorkerFacts

_NAME_LIMIT_CHARACTERS = 512
_URL_LIMIT_BYTES = 1024
_BLOCK_SIZE_LIMIT = 1 << 20


class RankRanges:
    """Which ranks are taken. First fit; ranks are few (1024 at most), so a byte each is the simplest map."""

    def __init__(self, max_ranks: int) -> None:
        self._taken = bytearray(max_ranks)

    @property
    def free(self) -> int:
        """Ranks that nobody has."""
        return self._taken.count(0)

    def take(self, count: int) -> int | None:
        """First of `count` contiguous free ranks, now taken; None when there is no such gap. count: 1 or more."""
        if count > len(self._taken):
            return None
        base = self._taken.find(bytes(count))
        if base < 0:
            return None
        self._taken[base : base + count] = b"\1" * count
        return base

    def give_back(self, base: int, count: int) -> None:
        """Free the ranks base .. base + count - 1."""
        self._taken[base : base + count] = bytes(count)


class Workers:
    """The workers in slot order. `views` is what the table says; only this class changes both."""

    def __init__(
        self,
        table: WorkerTable,
        max_ranks: int,
        log: logging.Logger,
        *,
        key_route: str = "auto",
        kv_settings: Sequence[KvSetting] = (),
    ) -> None:
        self._table = table
        self._key_route = key_route  # --key-route
        self._kv_settings = kv_settings
        self._max_ranks = max_ranks
        self._ranks = RankRanges(max_ranks)
        self._log = log
        self._views: list[WorkerView] = []

    @property
    def views(self) -> Sequence[WorkerView]:
        """All workers; position = worker_idx."""
        return self._views

    def register(self, url: str) -> int:
        """Give the worker a slot, in state JOINING and with nothing known of it; returns its worker_idx.

        Raises ConfigError when the table is full or the URL does not fit.
        """
        worker_idx = len(self._views)
        record = WorkerRecord(url=url)
        if worker_idx >= self._table.max_workers:
            raise ConfigError(f"--max-workers {self._table.max_workers}: there is no slot for {url}")
        if len(url.encode()) > _URL_LIMIT_BYTES:
            raise ConfigError(f"--worker-urls: a URL of {len(url)} characters is longer than {_URL_LIMIT_BYTES} bytes")
        # Its rank is taken like any other's, so that the rank table can say that it publishes no events.
        rank_base = self._ranks.take(1)
        view = WorkerView(
            worker_idx=worker_idx,
            generation=1,
            state=JOINING,
            rank_base=rank_base or 0,
            dp_size=0 if rank_base is None else 1,
            block_size=0,
            bigram=False,
            record=record,
        )
        put_worker(self._table, view, is_new=True)
        self._views.append(view)
        return worker_idx

    def set_state(self, worker_idx: int, state: int) -> None:
        """Change whether the worker is routed to. state: a word of sglfast._workers."""
        if self._views[worker_idx].state != state:
            self._views[worker_idx] = msgspec.structs.replace(self._views[worker_idx], state=state)
            self._table.set_state(worker_idx, state)

    def set_parity(self, worker_idx: int, parity: int) -> None:
        """Change whether the worker's reports agree with the predictions. parity: shm.PARITY_*."""
        self._views[worker_idx] = msgspec.structs.replace(self._views[worker_idx], parity=parity)
        put_worker(self._table, self._views[worker_idx], is_new=False)

    def learn(self, worker_idx: int, findings: Findings) -> bool:
        """Take over what an introspection found; returns whether the table changed.

        What a worker that did not speak said earlier is kept: a slow `/server_info` must not cost its KV awareness.
        """
        old = self._views[worker_idx]
        model = self._usable_name(old.record.url, findings.model)
        if not findings.has_spoken:
            new = msgspec.structs.replace(old, record=msgspec.structs.replace(old.record, model=model or old.record.model))
            if not _fits(new.record):
                return False
        else:
            new = self._place(old, model, with_setting(findings.facts, old.record.url, self._kv_settings))
        if new == old:
            return False
        self._views[worker_idx] = new
        put_worker(self._table, new, is_new=False)
        return True

    def _usable_name(self, url: str, model: str | None) -> str | None:
        if model is None or (model.isprintable() and len(model) <= _NAME_LIMIT_CHARACTERS):
            return model
        self._log.warning(
            f"the worker's model name is not used: it is longer than {_NAME_LIMIT_CHARACTERS} characters or not printable",
            extra={"fields": {"worker": url}},
        )
        return None

    def _place(self, old: WorkerView, model: str | None, facts: WorkerFacts | None) -> WorkerView:
        """The worker with these facts, its ranks taken."""
        url = old.record.url
        record = WorkerRecord(url=url, model=model)
        kv = facts.kv if facts else None
        if facts is not None:
            full = WorkerRecord(
                url=url,
                model=model,
                version=facts.version,
                disaggregation_mode=facts.disaggregation_mode,
                startup_time=facts.startup_time,
                kv_host=kv.host if kv else None,
                kv_port_base=kv.port_base if kv else 0,
                kv_topic=kv.topic if kv else "",
                kv_replay_port_base=kv.replay_port_base if kv else None,
                kv_connects_out=facts.kv_connects_out,
                adapters=facts.adapters,
            )
            if _fits(full) and (kv is None or kv.block_size <= _BLOCK_SIZE_LIMIT):
                record = full
            else:
                kv = None
                self._log.warning("what the worker says of itself does not fit and is not used", extra={"fields": {"worker": url}})
        dp_size = facts.dp_size if facts else 1
        rank_base = self._take_ranks(old, dp_size, must_have=kv is not None)
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
            bigram=bool(kv and facts and facts.bigram),
            key_route=self._route(facts),
            record=record,
        )

    def _route(self, facts: WorkerFacts | None) -> KeyRoute:
        if self._key_route == "auto":
            return facts.key_route if facts else "sha256"
        return "tokens" if self._key_route == "tokens" else "sha256"

    def _take_ranks(self, old: WorkerView, count: int, *, must_have: bool) -> int | None:
        """First of `count` ranks for the worker, those of `old` given back or kept; None when there are none."""
        if old.dp_size == count:
            return old.rank_base
        self._ranks.give_back(old.rank_base, old.dp_size)
        rank_base = self._ranks.take(count)
        if rank_base is None and must_have:
            self._free_idle_ranks(except_idx=old.worker_idx)
            rank_base = self._ranks.take(count)
        if rank_base is None and must_have:
            self._log.warning(
                f"worker is routed without KV awareness: it needs {count} contiguous ranks, --max-ranks {self._max_ranks} "
                f"leaves {self._ranks.free}; raise --max-ranks (at most 1024)",
                extra={"fields": {"worker": old.record.url}},
            )
        return rank_base

    def _free_idle_ranks(self, except_idx: int) -> None:
        """Take the ranks of workers without KV events back: they serve nothing but display."""
        for worker_idx, view in enumerate(self._views):
            if worker_idx != except_idx and view.dp_size and not view.block_size:
                self._ranks.give_back(view.rank_base, view.dp_size)
                self._views[worker_idx] = msgspec.structs.replace(view, rank_base=0, dp_size=0)
                put_worker(self._table, self._views[worker_idx], is_new=False)


def _fits(record: WorkerRecord) -> bool:
    return len(msgspec.msgpack.encode(record)) <= BLOB_BYTES
