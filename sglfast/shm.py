"""Create or attach the shared-memory segment, and the worker records that live in it; create the file of index's own maps.

Runs in: control (create), index and shards (attach by file descriptor; nothing has a name in a file system).
Contract: the layout is cext/sf_shm.h; a Segment of another layout version raises ShmLayoutError. Worker rows are read again only
    when `WorkerTable.version()` has moved.
"""

import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import msgspec

from sglfast._segment import Segment, segment_bytes
from sglfast._workers import FLAG_BIGRAM, FLAG_PARITY_SHIFT, FLAG_TOKENS, WorkerTable
from sglfast.errors import ShmLayoutError

# Why a rank's KV index state is not EXACT; position = word R_REASON of the rank table, so append only.
RANK_REASONS: tuple[str, ...] = (
    "",
    "publishes no KV events",
    "no event has arrived yet",
    "replaying missed events",
    "history before the subscription is unknown",
    "events were lost and could not be replayed",
    "block hashes differ from the SHA-256 chain of the event's tokens",
    "the event stream is disconnected",
    "the index is being started again",
    "kept from before the index process started again, not confirmed by the event stream yet",
    "connects its event socket to the router, which does not listen there (--kv-listen)",
    "connects out with the topic of another worker: each needs a topic of its own",
    "its blocks hold another number of tokens than the worker says",
    "its blocks are keyed by pairs of tokens (EAGLE), the worker says single tokens",
    "its blocks are keyed by single tokens, the worker says pairs of tokens (EAGLE)",
    "events were lost, and the worker's replay buffer does not reach back to them",
    "the index may not open enough files to follow it (ulimit -n)",
    "events were lost and could not be replayed: only what was stored since then is known",
)

# The same positions by name.
(
    REASON_NONE,
    REASON_NO_EVENTS,
    REASON_NO_EVENT_YET,
    REASON_REPLAYING,
    REASON_UNKNOWN_HISTORY,
    REASON_LOST,
    REASON_HASH_MISMATCH,
    REASON_DISCONNECTED,
    REASON_INDEX_RESTARTS,
    REASON_RESUMED,
    REASON_NOT_LISTENING,
    REASON_SAME_TOPIC,
    REASON_BLOCK_SIZE,
    REASON_PAIRS,
    REASON_SINGLES,
    REASON_NOT_KEPT,
    REASON_NO_DESCRIPTORS,
    REASON_FORGOTTEN,
) = range(len(RANK_REASONS))
# Those of the past: they explain for a while that too little is predicted, and stay until the rank is cleared.
PASSING_REASONS = (REASON_UNKNOWN_HISTORY, REASON_LOST, REASON_NOT_KEPT, REASON_FORGOTTEN)

# Names of the RANK_* states.
RANK_STATES = ("BLIND", "SYNCING", "EXACT", "DEGRADED")

# Why a worker was chosen: label `decision` of the metric; position = word after S_DECISIONS in a shard's column, so append only.
DECISIONS: tuple[str, ...] = (
    "round_robin",
    "random",
    "power_of_two",
    "least_load",
    "cache_hit",
    "cache_miss",
    "imbalanced",
    "unkeyed",
    "failover",
)

# Whether predictions agree with what the worker reports (control/parity); two bits of the worker's flags.
PARITY_OK, PARITY_HIGH, PARITY_LOW = range(3)


# How a worker's block keys are made: the engine's own SHA-256 chain, or ours over the tokens of its events.
KeyRoute = Literal["sha256", "tokens"]
# How LoRA adapters show in a worker's events: under the name that requests give it ("base:adapter", `lora_path`), as the base model's
# blocks (SGLang before 0.5.23), or under the name that requests give as their model (vLLM).
Adapters = Literal["named", "shared", "models"]
# How the engine gives a request's tools to the chat template, in the order of SGLang's versions: the functions alone (before 0.5.9), in
# their wrapper (0.5.9), with `defer_loading` (0.5.11), and what the client wrote in the client's order (0.5.23).
ToolForm = Literal["flat", "wrapped", "deferrable", "kept"]
# What a worker does of a request: all of it, or the prompt, or the tokens behind it.
Role = Literal["regular", "prefill", "decode"]


# Whose way of preparing a chat a worker has.
Engine = Literal["sglang", "vllm"]


class Dialect(NamedTuple):
    """What an engine makes of a chat before its template. template_kwargs: its own variables of the template, a JSON object; "" = none.

    tools, template_kwargs: SGLang's.
    """

    tools: ToolForm = "kept"
    template_kwargs: str = ""
    engine: Engine = "sglang"


class Variant(NamedTuple):
    """A way in which workers prepare prompts, cut them into blocks and name these.

    model: the served name where it is hashed, or where a name of an adapter could be taken for it; "" otherwise and when it is unknown.
    """

    block_size: int
    bigram: bool = False
    route: KeyRoute = "sha256"
    model: str = ""
    adapters: Adapters = "named"
    dialect: Dialect = Dialect()


_TOOL_FORMS = get_args(ToolForm)


def dialect_of(variants: Sequence[Variant]) -> Dialect:
    """The dialect of workers of these variants; where they differ, SGLang's before vLLM's, and that with the newest form of tools."""
    if len(variants) == 1:
        return variants[0].dialect  # nearly always
    return max((variant.dialect for variant in variants), key=_rank_of_dialect, default=Dialect())


def _rank_of_dialect(dialect: Dialect) -> tuple[bool, int]:
    return dialect.engine == "sglang", _TOOL_FORMS.index(dialect.tools)


class WorkerRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is read of a worker only when the table changes: the blob of its slot.

    adapter_models: names of LoRA adapters that requests give as their model.
    rank_ways: how a request tells which data-parallel rank is to serve it, a letter for each prompt.keys.RequestKind: h = by the header
        x-data-parallel-rank, r = by `routed_dp_rank` in the body, d = by `data_parallel_rank` there, - = not at all (as beyond the last).
    ranks_asked: how often its ranks have been asked for again, because it had refused one; until then shards name none.
    api_key: what the router shows the worker. No secret that the worker tells of itself is ever here.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    version: str | None = None
    disaggregation_mode: str | None = None
    startup_time: float | None = None
    kv_host: str | None = None
    kv_port_base: int = 0
    kv_topic: str = ""
    kv_replay_port_base: int | None = None
    kv_connects_out: bool = False
    adapters: Adapters = "named"
    adapter_models: tuple[str, ...] = ()
    tools: ToolForm = "kept"
    template_kwargs: str = ""  # see Dialect
    engine: Engine = "sglang"
    takes_rid: bool = False  # requests may carry a `rid` by which /abort_request ends them
    role: Role = "regular"
    rank_ways: str = ""
    ranks_asked: int = 0
    bootstrap_port: int | None = None  # where a prefill worker meets its decode workers; None = it has told none

    def __repr__(self) -> str:
        """Without the key: what is shown in an error or a log must not hold it."""
        shown = {name: value for name, value in msgspec.structs.asdict(self).items() if name != "api_key" and value}
        return f"WorkerRecord({', '.join(f'{name}={value!r}' for name, value in shown.items())}, has_key={self.api_key is not None})"


class WorkerView(msgspec.Struct, frozen=True):
    """One worker as index and shards see it. rank r of the worker is rank `rank_base + r` of the tree."""

    worker_idx: int
    generation: int
    state: int
    rank_base: int
    dp_size: int
    block_size: int
    bigram: bool
    record: WorkerRecord
    parity: int = PARITY_OK
    key_route: KeyRoute = "sha256"

    @property
    def variant(self) -> Variant:
        """How this worker's blocks are found. Meaningful only with a block_size."""
        model = self.record.model or ""
        if self.key_route == "sha256" and ":" not in model:
            model = ""
        return Variant(
            self.block_size,
            self.bigram,
            self.key_route,
            model,
            self.record.adapters,
            Dialect(self.record.tools, self.record.template_kwargs, self.record.engine),
        )


_encode_record = msgspec.msgpack.Encoder().encode
_decode_record = msgspec.msgpack.Decoder(WorkerRecord).decode


def create(*, max_workers: int, max_ranks: int, max_shards: int, capacity_blocks: int, prediction_blocks: int = 0) -> tuple[int, Segment]:
    """Make a sealed memfd with an empty segment; returns its file descriptor (inheritable by intent only) and the segment.

    Memory is taken from the kernel as it is touched: an empty index of a million blocks costs next to nothing.
    """
    sizes = {
        "max_workers": max_workers, "max_ranks": max_ranks, "max_shards": max_shards, "capacity_blocks": capacity_blocks,
        "prediction_blocks": prediction_blocks,
    }  # fmt: skip
    size_bytes = segment_bytes(**sizes)
    fd = os.memfd_create("sglfast", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        # Nobody can make it shorter below a reader (SIGBUS) or change its seals.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        mapping = mmap.mmap(fd, size_bytes)
    except OSError:
        os.close(fd)
        raise
    return fd, Segment.format(mapping, **sizes)


def map_region_bytes(capacity_blocks: int) -> int:
    """Bytes of a rank's region in the file of the maps: room for its engine hashes (cext/keymapmemory.pxi), far more than it ever takes.

    A rank has at most twice the tree's blocks and what the batches of one round brought.
    """
    n_slots = 1 << (4 * capacity_blocks + (1 << 22) - 1).bit_length()
    return 32 * n_slots


def create_maps(*, max_ranks: int, capacity_blocks: int) -> int:
    """Make the file of the token route's maps, a region a rank; returns its descriptor (inheritable by intent only). All of it is a hole:
    only ranks whose blocks are keyed by tokens take memory. Raises OSError when a file of that size is refused.
    """
    fd = os.memfd_create("sglfast-maps", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, max_ranks * map_region_bytes(capacity_blocks))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


def attach(fd: int) -> Segment:
    """Map an existing segment. Raises ShmLayoutError when it is no segment, or one of another layout version or size."""
    try:
        mapping = mmap.mmap(fd, os.fstat(fd).st_size)
    except (OSError, ValueError) as error:
        raise ShmLayoutError(f"file descriptor {fd} cannot be mapped as a segment: {error}") from None
    try:
        return Segment(mapping)
    except ValueError as error:
        raise ShmLayoutError(str(error)) from None


def put_worker(table: WorkerTable, view: WorkerView, *, is_new: bool) -> None:
    """Write a worker's slot (control only)."""
    table.put(
        view.worker_idx,
        state=view.state,
        rank_base=view.rank_base,
        dp_size=view.dp_size,
        block_size=view.block_size,
        flags=(FLAG_BIGRAM if view.bigram else 0) | (FLAG_TOKENS if view.key_route == "tokens" else 0) | view.parity << FLAG_PARITY_SHIFT,
        blob=_encode_record(view.record),
        is_new=is_new,
    )


def read_workers(table: WorkerTable) -> list[WorkerView]:
    """All workers of the table, in slot order."""
    views = []
    for worker_idx in range(table.max_workers):
        row = table.read(worker_idx)
        if row is not None:
            generation, state, rank_base, dp_size, block_size, flags, blob = row
            views.append(
                WorkerView(
                    worker_idx=worker_idx,
                    generation=generation,
                    state=state,
                    rank_base=rank_base,
                    dp_size=dp_size,
                    block_size=block_size,
                    bigram=bool(flags & FLAG_BIGRAM),
                    record=_decode_record(blob),
                    parity=flags >> FLAG_PARITY_SHIFT & 3,
                    key_route="tokens" if flags & FLAG_TOKENS else "sha256",
                )
            )
    return views
