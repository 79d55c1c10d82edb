"""Who offers what right now: everything about the sources but their tensors, in memory, ready to be listed.

Runs in: the metadata service; touched by its loop only. Contract: a roster is a mirror of a storage and holds nothing that the storage
    does not; storages fill it (`put`, `drop`, `clear`), the service reads it. Times are unix milliseconds of the service's clock.
Why: a list must not cost a look into the storage for every source. 8,000 ranks are listed in milliseconds because the encoded line of
    each is kept until it changes.
Keys: spec/modelexpress.md 2.2. A worker is one worker_id of one source; usually it holds a single rank.
"""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from sglfast.modelexpress.schema import p2p
from sglfast.modelexpress.varint import varint

UNKNOWN, INITIALIZING, READY, STALE = (
    int(p2p.SOURCE_STATUS_UNKNOWN), int(p2p.SOURCE_STATUS_INITIALIZING), int(p2p.SOURCE_STATUS_READY), int(p2p.SOURCE_STATUS_STALE),
)  # fmt: skip
STATUS_NAMES = {UNKNOWN: "UNKNOWN", INITIALIZING: "INITIALIZING", READY: "READY", STALE: "STALE"}

_INSTANCES_TAG = b"\x0a"  # ListSourcesResponse.instances
_UPDATED_AT_FIELD = 6


def status_name(status: int) -> str:
    """The enum's name without its prefix; a number that it does not know stays a number."""
    return STATUS_NAMES.get(status, str(status))


class Key(NamedTuple):
    """Names one record. rank: worker_rank as published."""

    source_id: str
    worker_id: str
    rank: int


class State(NamedTuple):
    """What changes while a record lives.

    updated_at_ms: when the status was last set, never going back; beats: how often the worker itself said READY since it published,
    counted to 2; order: number of the publish, rising; source_load: as last told, None = no reading.
    """

    status: int
    updated_at_ms: int
    beats: int
    order: int
    source_load: float | None

    @property
    def mark(self) -> tuple[int, int, int]:
        """By this it is known again: whoever changes a state that he read before says which one he means."""
        return self.status, self.updated_at_ms, self.order


class Static(msgspec.Struct, frozen=True, gc=False):
    """What a publish says and a listing needs. identity: a serialised SourceIdentity; peer_host: host to reach the worker at, or ""."""

    identity: bytes
    accelerator: str
    topology: dict[str, str]
    peer_host: str


class Entry:
    """One record: its key, what was published, its state."""

    __slots__ = ("key", "state", "static")

    def __init__(self, key: Key, static: Static, state: State) -> None:
        self.key = key
        self.static = static
        self.state = state


class Source:
    """All workers of one mx_source_id, and the identity that the last of them published."""

    __slots__ = ("identity", "model_name", "newest", "spelling", "training_step", "workers")

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}  # the most recently changed one last
        self.newest = -1
        self.spelling = b""

    def adopt(self, entry: Entry) -> None:
        """Take over the identity of the newest publish: letters may be of another case than before."""
        if entry.state.order < self.newest:
            return
        self.newest = entry.state.order
        if entry.static.identity != self.spelling or not self.workers:
            self.spelling = entry.static.identity
            self.identity = p2p.SourceIdentity.FromString(entry.static.identity)
            self.model_name = self.identity.model_name
            self.training_step = training_step(self.identity)
            for worker in self.workers.values():
                worker.line = None
                worker.fixed = None


class Worker:
    """The ranks of one worker_id; `listed` is the last published of them, the one that a listing shows."""

    __slots__ = ("fixed", "line", "listed", "ranks", "source")

    def __init__(self, source: Source) -> None:
        self.source = source
        self.ranks: dict[int, Entry] = {}
        self.fixed: bytes | None = None  # the encoded reference without updated_at and source_load
        self.line: bytes | None = None  # one whole field of a ListSourcesResponse
        self.listed: Entry

    def encoded(self) -> bytes:
        """The worker's line of a listing, as a field of ListSourcesResponse."""
        if self.line is None:
            state = self.listed.state
            if self.fixed is None:
                self.fixed = self._reference().SerializeToString()
            changing = bytes((_UPDATED_AT_FIELD << 3,)) + varint(state.updated_at_ms)
            if state.source_load is not None:
                changing += p2p.SourceInstanceRef(source_load=state.source_load).SerializeToString()
            # protobuf takes fields in any order, and one after another is as good as merged.
            self.line = _INSTANCES_TAG + varint(len(self.fixed) + len(changing)) + self.fixed + changing
        return self.line

    def _reference(self) -> p2p.SourceInstanceRef:
        entry, source = self.listed, self.source
        return p2p.SourceInstanceRef(
            mx_source_id=entry.key.source_id,
            worker_id=entry.key.worker_id,
            model_name=source.model_name,
            worker_rank=entry.key.rank,
            accelerator=entry.static.accelerator,
            training_step=source.training_step,
            layout_signature=source.identity.extra_parameters.get("layout_signature"),
            topology=entry.static.topology,
        )


class Roster:
    """The mirror. Iterating over it gives every entry."""

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}
        self._entries: dict[Key, Entry] = {}

    def __len__(self) -> int:
        """Number of records."""
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, key: Key) -> Entry | None:
        """The record of a key."""
        return self._entries.get(key)

    def lowest_rank(self, source_id: str, worker_id: str) -> Entry | None:
        """The record that GetMetadata answers with."""
        source = self.sources.get(source_id)
        worker = source.workers.get(worker_id) if source else None
        return worker.ranks[min(worker.ranks)] if worker else None

    def put(self, key: Key, static: Static, state: State) -> None:
        """A record was published, or published again."""
        entry = self._entries[key] = Entry(key, static, state)
        source = self.sources.setdefault(key.source_id, Source())
        source.adopt(entry)
        worker = source.workers.pop(key.worker_id, None) or Worker(source)
        source.workers[key.worker_id] = worker
        worker.ranks[key.rank] = entry
        self._choose_listed(worker)

    def set_state(self, key: Key, state: State) -> None:
        """A record that is there changed its state. Raises KeyError when it is not there."""
        entry = self._entries[key]
        entry.state = state
        workers = self.sources[key.source_id].workers
        worker = workers.pop(key.worker_id)
        workers[key.worker_id] = worker
        if worker.listed is entry:
            worker.line = None

    def drop(self, key: Key) -> None:
        """A record is gone, or was never there. A worker goes with its last rank, a source with its last worker."""
        if self._entries.pop(key, None) is None:
            return
        source = self.sources[key.source_id]
        worker = source.workers[key.worker_id]
        del worker.ranks[key.rank]
        if worker.ranks:
            self._choose_listed(worker)
            return
        del source.workers[key.worker_id]
        if not source.workers:
            del self.sources[key.source_id]

    def clear(self) -> None:
        """Forget everything."""
        self.sources.clear()
        self._entries.clear()

    @staticmethod
    def _choose_listed(worker: Worker) -> None:
        worker.listed = max(worker.ranks.values(), key=lambda entry: entry.state.order)
        worker.line = worker.fixed = None


def training_step(identity: p2p.SourceIdentity) -> int | None:
    """extra_parameters["training_step"], else ["version"], where that is a decimal uint64."""
    for name in ("training_step", "version"):
        text = identity.extra_parameters.get(name)
        if text is not None:
            digits = text.removeprefix("+")
            if not (digits.isascii() and digits.isdecimal()):
                return None
            digits = digits.lstrip("0") or "0"
            return int(digits) if len(digits) <= 20 and int(digits) < 1 << 64 else None
    return None
