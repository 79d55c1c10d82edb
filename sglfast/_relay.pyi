import asyncio
from collections.abc import Callable, Iterator
from typing import Any, final

from typing_extensions import disjoint_base

from sglfast._counters import Column
from sglfast._httphead import Chunks, RequestHead, ResponseHead
from sglfast._segment import Segment

HEAD: int
BODY: int
CHUNKED: int
BUSY: int
UNUSUAL: int
CLOSED: int
IDLE: int
ANSWER_HEAD: int
LENGTH: int
ANSWER_CHUNKED: int
UNTIL_CLOSE: int

def rid_place(body: bytes) -> int: ...
def spliced(body: bytes, keys: bytes) -> bytes | None: ...
def may_be_batch(body: bytes, kind: int) -> bool: ...
def names_rank(body: bytes) -> bool: ...
def retarget(head: RequestHead, target: bytes) -> None: ...

# Attributes that hold an object of sglfast.edge are Any here: its classes name them by their own types.

@disjoint_base
class ShardBase:
    column: Column
    config: Any
    router: Any
    admission: Any
    request_log: Any
    loop: asyncio.AbstractEventLoop
    endpoints: dict[bytes, Any]
    now_s: float
    is_draining: bool
    is_gated: bool
    def configure(self, config: Any) -> None: ...
    def new_request_id(self) -> bytes: ...

@disjoint_base
class RouterBase:
    seen_version: int
    plain_routes: list[Any] | None
    plain_choose: Callable[..., tuple[int, int]]
    plain_rank: Callable[[int], Any] | None
    plain_arguments: tuple[Any, ...]
    def __init__(self, segment: Segment) -> None: ...

@disjoint_base
class ExchangeBase:
    client: Any
    shard: Any
    endpoint: Any
    head: RequestHead
    body: bytes
    request_id: bytes
    kept: bytes
    makes_id: bool
    route: Any
    connection: Any
    started_s: float
    deadline_s: float
    tokens: int
    failed_attempts: Any
    pair: Any
    probe: int
    rank: int
    dp_rank: int
    rid: bytes | None
    bytes_out: int
    predicted_tokens: int
    cached_tokens: int
    status: int
    ttft_us: int
    has_answer: bool
    has_body: bool
    keeps_alive: bool
    is_event_stream: bool
    decodes_chunks: bool
    is_resent: bool
    is_over: bool
    was_active: bool
    holds_permit: bool
    ticket: Any
    held_bytes: int
    is_choosing: bool
    last_route: Any
    bytes_in: int
    outcome: int
    def __init__(self, client: ClientBase, endpoint: Any, head: RequestHead, body: bytes) -> None: ...
    @property
    def is_told_rank(self) -> bool: ...
    def dispatch(self, route: Any) -> None: ...
    def on_connected(self, connection: WorkerConnectionBase) -> None: ...
    def begin_answer(self, head: ResponseHead, payload: bytes) -> None: ...
    def leave_worker(self, outcome_word: int) -> None: ...
    def count_body(self, n_bytes: int) -> None: ...
    def drop_body(self) -> None: ...
    def finish(self) -> None: ...

@disjoint_base
class PrefillLegBase(ExchangeBase):
    exchange: Any
    heir: Any
    first: Any
    decode: Any
    held: ResponseHead | None
    plain_body: bytes
    plain_kept: bytes
    def __init__(self, exchange: ExchangeBase, route: Any, body: bytes, kept: bytes) -> None: ...

@disjoint_base
class ClientBase:
    shard: Any
    transport: asyncio.Transport | None
    exchange: Any
    head: RequestHead | None
    chunks: Chunks | None
    unusual: Any
    task: asyncio.Task[None] | None
    pieces: list[bytes | bytearray]
    pending: bytes
    state: int
    body_left: int
    body_size: int
    held_bytes: int
    quiet_since_s: float
    fresh_since_s: float
    fresh_bytes: int
    unsent_bytes: int
    was_active: bool
    closes: bool
    is_http10: bool
    is_write_paused: bool
    lingers: bool
    cors: bytes | None
    def __init__(self, shard: ShardBase) -> None: ...
    def data_received(self, data: bytes) -> None: ...
    def read(self, data: bytes) -> None: ...
    def read_body(self, data: bytes) -> bytes: ...
    def hold(self, n_bytes: int) -> bool: ...
    def let_go(self) -> None: ...
    def keep(self, data: bytes) -> bool: ...
    def end_body(self) -> None: ...
    def write_head(self, opening: bytes, request_id: bytes | None, extra: bytes, body: bytes = b"") -> None: ...
    def write(self, data: bytes) -> None: ...
    def on_exchange_end(self) -> None: ...
    def go_on(self) -> None: ...
    def tick(self, now_s: float) -> None: ...

@final
class Clients:
    def add(self, client: ClientBase) -> None: ...
    def discard(self, client: ClientBase) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def sweep(self, turn: int, now_s: float) -> None: ...

@disjoint_base
class WorkerConnectionBase:
    upstream: Any
    transport: asyncio.Transport | None
    exchange: Any
    chunks: Chunks | None
    partial: bytes
    state: int
    left: int
    uses: int
    has_spoken: bool
    idle_since_s: float
    def __init__(self, upstream: UpstreamBase) -> None: ...
    def data_received(self, data: bytes) -> None: ...
    def end_at_close(self, exchange: ExchangeBase) -> None: ...
    def close(self) -> None: ...

@disjoint_base
class UpstreamBase:
    shard: Any
    worker_idx: int
    host_header: bytes
    key_line: bytes | None
    log_label: bytes
    idle: list[Any]
    is_removed: bool
    needs_probe: bool
    takes_rid: bool
    rank_ways: bytes | None
    def take_idle(self) -> Any: ...
    def give_back(self, connection: WorkerConnectionBase) -> None: ...

@disjoint_base
class RequestLogBase:
    is_json: bool
    only_errors: bool
    lines: list[bytes]
    size_bytes: int
    def __init__(self, is_json: bool, only_errors: bool, opening: bytes, decisions: tuple[bytes, ...]) -> None: ...
    def note(self, exchange: ExchangeBase) -> None: ...
