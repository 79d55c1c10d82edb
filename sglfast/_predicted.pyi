from collections.abc import Iterable
from typing import Any, Self, TypedDict, final, type_check_only

from sglfast._segment import Segment

SENT: int
KEEP: int
SETTLED: int
KEYS_MAX: int
GRACE_MS: int

def text_keys(body: bytes) -> tuple[bytes, int]:
    """Return (keys of the prompt in a raw JSON body, 8 bytes each; bytes of the prompt's raw value).

    Key i stands for the first `text_cut(i)` bytes of the prompt, or for the whole of a shorter one, and for all else in the body that
    decides about a KV cache. (b"", 0): the body has no prompt that a key could be made of. Format: cext/sf_prompttext.h.
    """

def text_cut(n_keys: int) -> int:
    """Return how many bytes of a prompt its first `n_keys` keys stand for. Raises ValueError above KEYS_MAX."""

@type_check_only
class Totals(TypedDict):
    records: int
    refused: int
    evicted: int
    trimmed: int

def totals(segment: Segment) -> Totals:
    """Return what index has counted: records applied and refused, keys that made room for others, keys trimmed; 0 without predictions."""

def dropped_total(segment: Segment) -> int:
    """Return how many records of all shards found no room in their ring; 0 without predictions."""

@final
class Predictions:
    """A shard's view of what was routed where, and its ring to index. Of one thread."""

    def __new__(cls, segment: Segment, shard: int) -> Self:
        """Raises ValueError for a segment without predictions, or a shard that it does not have."""

    @property
    def dropped_total(self) -> int: ...
    def match(self, keys: Any, now_ms: int = 0) -> int: ...
    def hits(self) -> list[tuple[int, int]]: ...
    def is_in_flight(self, rank: int) -> bool: ...
    def put(self, op: int, rank: int, generation: int, keys: Any, now_ms: int = 0) -> bool: ...

@final
class PredictionWriter:
    """The index process's hold on the table: one in the program, used by one thread at a time."""

    def __new__(cls, segment: Segment) -> Self: ...
    def own(self, rank: int, generation: int) -> None: ...
    def drain(self, now_ms: int = 0) -> int: ...
    def wait(self, timeout_ms: int, nap_us: int = 0) -> None: ...
    def wake(self) -> None: ...
    def clear(self, ranks: Iterable[int]) -> None: ...
    def kept_blocks(self) -> list[int]: ...
    def trim(self, cap: int) -> int: ...
