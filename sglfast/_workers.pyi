from typing import Self, final

from sglfast._segment import Segment

FREE: int
JOINING: int
READY: int
UNHEALTHY: int
DRAINING: int
FLAG_BIGRAM: int
FLAG_TOKENS: int
FLAG_PARITY_SHIFT: int
BLOB_BYTES: int

@final
class WorkerTable:
    def __new__(cls, segment: Segment) -> Self: ...
    @property
    def max_workers(self) -> int: ...
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
    def remove(self, worker_idx: int) -> None: ...
    def generation(self, worker_idx: int) -> int: ...
    def state(self, worker_idx: int) -> int: ...
    def read(self, worker_idx: int) -> tuple[int, int, int, int, int, int, bytes] | None: ...
