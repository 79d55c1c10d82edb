"""ZMQ frames around a KV event batch: live (PUB to SUB) and replay (ROUTER to DEALER), both directions.

Runs in: index (parse), sim (build). No I/O.
Contract: frames are lists of bytes, outermost first, as `recv_multipart` gives and `send_multipart` takes them; at the ROUTER
    the identity frame is the caller's. `parse_*` raise KvEventError on anything that is not of the shape; sequence numbers are
    0 .. 2**63-1. Two replay shapes exist (sglang <= 0.5.21 sends no topic), so replay answers are parsed from the right.
Source: spec/kv_events.md 1.2, 1.6.
"""

from collections.abc import Sequence
from typing import Literal

from sglfast.errors import KvEventError

END_SEQ = b"\xff" * 8
_SEQ_LIMIT = 1 << 63


def live_frames(topic: bytes, seq: int, payload: bytes) -> list[bytes]:
    """Frames of one live batch; an empty topic is still a frame."""
    return [topic, seq.to_bytes(8, "big"), payload]


def parse_live(frames: Sequence[bytes]) -> tuple[int, bytes]:
    """(sequence number, payload) of a live message. Raises: KvEventError."""
    if len(frames) != 3:
        raise KvEventError(f"a live KV event message has 3 frames (topic, sequence, payload), not {len(frames)}")
    return _seq_of(frames[1]), frames[2]


def replay_request(start_seq: int) -> list[bytes]:
    """Frames that ask for every buffered batch from `start_seq` on."""
    return [b"", start_seq.to_bytes(8, "big")]


def parse_replay_request(frames: Sequence[bytes]) -> int | None:
    """First sequence number asked for, or None when SGLang would leave the request unanswered. `frames` without the identity.

    As SGLang does: unsigned big-endian of however many bytes, so an empty frame asks from 0 and ff*8 asks for nothing.
    """
    if len(frames) != 2 or frames[0] != b"":
        return None
    return int.from_bytes(frames[1], "big")


def replay_data(topic: bytes, seq: int, payload: bytes, *, shape: Literal["new", "old"] = "new") -> list[bytes]:
    """One replayed batch; `old` is sglang <= 0.5.21."""
    middle = [b"", topic] if shape == "new" else [b""]
    return [*middle, seq.to_bytes(8, "big"), payload]


def replay_end(shape: Literal["new", "old"] = "new") -> list[bytes]:
    """The end marker of a replay."""
    return [b"", b"", END_SEQ, b""] if shape == "new" else [b"", END_SEQ, b""]


def parse_replay(frames: Sequence[bytes]) -> tuple[int, bytes] | None:
    """(sequence number, payload) of a replayed batch, None for the end marker. Raises: KvEventError."""
    if len(frames) < 2:
        raise KvEventError(f"a replay message ends with sequence and payload, this one has {len(frames)} frame(s)")
    if frames[-2] == END_SEQ:
        return None
    return _seq_of(frames[-2]), frames[-1]


def _seq_of(frame: bytes) -> int:
    if len(frame) != 8:
        raise KvEventError(f"a sequence number has 8 bytes, not {len(frame)}")
    seq = int.from_bytes(frame, "big")
    if seq >= _SEQ_LIMIT:
        raise KvEventError(f"sequence number {seq - 2 * _SEQ_LIMIT} is negative")
    return seq
