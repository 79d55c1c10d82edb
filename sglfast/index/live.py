"""Batches of the live stream that came one behind the other, and are applied as one.

Runs in: index. Made by `subscriber` of what `sglfast._kvsocket` reads.
Why: a call for each of an engine's messages costs more than the message does.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """first_seq: number of the first batch; payloads: of all of them; ends: where in `payloads` each ends, as native uint64."""

    first_seq: int
    payloads: bytes
    ends: bytes

    def __len__(self) -> int:
        return len(self.ends) // 8

    def payload(self, at: int) -> bytes:
        """Of batch `at`, counted from 0."""
        ends = memoryview(self.ends).cast("Q")
        return self.payloads[ends[at - 1] if at else 0 : ends[at]]
