from typing import final

from sglfast._segment import Segment

FREE: int
JOINING: int
READY: int
UNHEALTHY: int
DRAINING: int
FLAG_BIGRAM: int
BLOB_BYTES: int

@final
class WorkerTable:
    max_workers: int
    def __init__(self, segment: Segment) -> None: ...
    def version(self) -> int: ...
    def put(
        self,
        worker_idx: int,
        *,
        state: int,
        rank_base: int,
        dp_size: int,
        block_size: int,
        flags: int,
        blob: bytes,
        is_new: bool,
    ) -> None: ...
    def set_state(self, worker_idx: int, state: int) -> None: ...
    def state(self, worker_idx: int) -> int: ...
    def read(self, worker_idx: int) -> tuple[int, int, int, int, int, int, bytes] | None: ...
