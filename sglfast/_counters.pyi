from collections.abc import Iterable
from typing import Any, Self, final

from sglfast._segment import Segment

W_INFLIGHT_REQUESTS: int
W_INFLIGHT_TOKENS: int
W_CONNECTIONS: int
W_REQUESTS: int
W_OK: int
W_CLIENT_ERRORS: int
W_BUSY: int
W_ERRORS: int
W_CANCELLED: int
W_BYTES_OUT: int
W_PROMPT_BLOCKS: int
W_OVERLAP_BLOCKS: int
W_CONNECT_ERRORS: int
W_PARITY_EXACT: int
W_PARITY_HIGH: int
W_PARITY_LOW: int
W_PARITY_CAME: int
W_PARITY_WENT: int
W_RANK_REFUSED: int
W_PARITY_UNTOLD: int
W_PARITY_OVER: int
W_BREAKER_OPENED: int
W_BREAKER_HALF_OPENED: int
W_BREAKER_CLOSED: int
W_WAITING_HEAD: int
S_CONNECTIONS: int
S_INFLIGHT: int
S_CONNECTIONS_TOTAL: int
S_REQUESTS: int
S_BYTES_IN: int
S_BYTES_OUT: int
S_UPSTREAM_CONNECTS: int
S_RESENDS: int
S_CLIENT_GONE: int
S_STREAMS_CUT: int
S_RESPONSES_2XX: int
S_RESPONSES_3XX: int
S_RESPONSES_4XX: int
S_RESPONSES_5XX: int
S_UNUSUAL_HEADS: int
S_PROMPTS_KEYED: int
S_PROMPTS_UNKEYED: int
S_PROMPT_TOKENS: int
S_PREDICTED: int
S_RETRIES: int
S_RETRIES_EXHAUSTED: int
S_STALE: int
S_ABORTS: int
S_DECISIONS: int
S_PERMITS: int
S_WAITING: int
S_WAITING_HEAD: int
S_QUEUED: int
S_QUEUE_WAIT_US: int
S_LOG_LINES_LOST: int
S_AFFINITY_SAME_HOST: int
S_AFFINITY_BREAKER: int
S_AFFINITY_LOAD: int
S_BODY_BYTES: int
S_REASONS: int
S_TTFT: int
S_DURATION: int
R_STATE: int
R_LAST_SEQ: int
R_BATCHES: int
R_EVENTS: int
R_BLOCKS_STORED: int
R_BLOCKS_REMOVED: int
R_GAPS: int
R_DUPLICATES: int
R_RESTARTS: int
R_UNDECODED: int
R_REPLAYS: int
R_GIVE_UPS: int
R_OWNED_BLOCKS: int
R_LAST_EVENT_MS: int
R_REASON: int
R_GENERATION: int
R_ORPHANS: int
R_STREAM: int
R_NEXT_SEQ: int
R_LAST_PRINT: int
R_LOSS: int
R_MAPPED_BLOCKS: int
R_MAIN_GROUP: int
R_MISSING: int
L_INFLIGHT_REQUESTS: int
L_INFLIGHT_TOKENS: int
RANK_HIT: int
RANK_LEAST: int
RANK_OVERLOADED: int
RANK_BLIND: int
RANK_SYNCING: int
RANK_EXACT: int
RANK_DEGRADED: int
BUCKETS_US: tuple[int, ...]
HISTOGRAM_BUCKETS: int
GAUGES_WORKER: tuple[int, ...]
GAUGES_SHARD: tuple[int, ...]

@final
class Column:
    def __new__(cls, segment: Segment, shard: int) -> Self: ...
    def begin(self, worker_idx: int, tokens: int, decision: int, bytes_in: int = 0) -> None: ...
    def prefilled(self, worker_idx: int, tokens: int) -> None: ...
    def end(self, worker_idx: int, tokens: int, outcome_word: int, bytes_out: int) -> bool: ...
    def begin_rank(self, rank: int, tokens: int) -> None: ...
    def prefilled_rank(self, rank: int, tokens: int) -> None: ...
    def end_rank(self, rank: int, tokens: int) -> None: ...
    def hold_body(self, n_bytes: int) -> int: ...
    def add(self, word: int, n: int = 1) -> None: ...
    def add_worker(self, worker_idx: int, word: int, n: int = 1) -> None: ...
    def answered(self, status_class: int) -> None: ...
    def observe(self, ttft_us: int, duration_us: int) -> None: ...
    def get(self, word: int) -> int: ...

@final
class Loads:
    def __new__(cls, segment: Segment) -> Self: ...
    def requests(self, worker_idx: int) -> int: ...
    def tokens(self, worker_idx: int) -> int: ...
    def random_below(self, n: int) -> int: ...
    def least(self, pool: Any, word: int = 0) -> tuple[int, int]: ...
    def span(self, pool: Any, word: int = 0) -> tuple[int, int]: ...
    def lighter_of_two(self, pool: Any) -> int: ...
    def count_below(self, pool: Any, load: int) -> int: ...

@final
class RankLoads:
    def __new__(cls, segment: Segment, loads: Loads) -> Self: ...
    def of(self, rank: int) -> tuple[int, int]: ...
    def pick(
        self,
        first: int,
        count: int,
        overlaps: Iterable[tuple[int, int]],
        prompt_tokens: int,
        enough_tokens: float,
        abs_threshold: int,
        rel_threshold: float,
    ) -> tuple[int, int]: ...

@final
class Totals:
    def __new__(cls, segment: Segment) -> Self: ...
    def shard(self) -> list[int]: ...
    def worker(self, worker_idx: int) -> list[int]: ...
    def rank(self, rank: int) -> list[int]: ...
    def retire(self, shard: int) -> None: ...

@final
class RankTable:
    def __new__(cls, segment: Segment) -> Self: ...
    def set(self, rank: int, word: int, value: int) -> None: ...
    def get(self, rank: int, word: int) -> int: ...
    def row(self, rank: int) -> list[int]: ...
    def clear(self, rank: int) -> None: ...
