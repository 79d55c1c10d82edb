"""A stream under test: a sink that writes down what is asked of it, and a clock that stands still."""

import struct
from dataclasses import dataclass, field

from sglfast.index.held import Limits
from sglfast.index.sink import Outcome, Resume
from sglfast.index.stream import RankStream

LIMITS = Limits(replay_timeout_s=1.0, max_tries=3, max_held_batches=100, max_held_bytes=10_000)


def payload(seq: int, run: int = 0) -> bytes:
    """A batch of engine run `run`: like a real one, its head holds a time that never comes again."""
    return struct.pack(">dqq", 1000.0 * run + seq, run, seq)


def both(first: Outcome, then: Outcome) -> Outcome:
    """Of two batches as of one."""
    is_lossy = then.is_lossy or (first.is_lossy and not then.is_cleared)
    return Outcome(is_cleared=first.is_cleared or then.is_cleared, is_lossy=is_lossy)


@dataclass
class Recorder:
    """A sink that writes down: numbers of applied batches, "clear", and ("ask", from)."""

    done: list[object] = field(default_factory=list)
    clearing: set[int] = field(default_factory=set)
    lossy: set[int] = field(default_factory=set)

    def apply(self, payload: bytes) -> Outcome:
        _, run, seq = struct.unpack(">dqq", payload)
        self.done.append(seq if run == 0 else (run, seq))
        return Outcome(is_cleared=seq in self.clearing, is_lossy=seq in self.lossy)

    def clear(self, why: str) -> None:
        assert why
        self.done.append("clear")

    def ask_replay(self, start_seq: int) -> None:
        self.done.append(("ask", start_seq))

    def take(self) -> list[object]:
        done, self.done = self.done, []
        return done


class Bench:
    """A stream, its sink and a clock that stands still."""

    has_runs = False

    def __init__(self, *, has_replay: bool, limits: Limits = LIMITS, resume: Resume | None = None) -> None:
        self.sink = Recorder()
        self.stream = RankStream(self.sink, has_replay=has_replay, limits=limits, resume=resume)
        self.now_s = 100.0

    def connect(self) -> list[object]:
        self.stream.on_connected(self.now_s)
        return self.sink.take()

    def reconnect(self) -> list[object]:
        self.stream.on_disconnected()
        return self.connect()

    def live(self, *seqs: int, run: int = 0) -> list[object]:
        at = 0
        while at < len(seqs):
            n = 0
            outcome = Outcome()
            if self.has_runs and seqs[at] == self.stream.steady_seq:
                while at + n < len(seqs) and seqs[at + n] == seqs[at] + n:
                    outcome = both(outcome, self.sink.apply(payload(seqs[at + n], run)))
                    n += 1
                self.stream.on_applied(n, payload(seqs[at + n - 1], run), outcome)
            else:
                n = 1
                self.stream.on_live(seqs[at], payload(seqs[at], run), self.now_s)
            at += n
        return self.sink.take()

    def replay(self, *seqs: int, run: int = 0, end: bool = False) -> list[object]:
        for seq in seqs:
            self.stream.on_replay(seq, payload(seq, run), self.now_s)
        if end:
            self.stream.on_replay_end(self.now_s)
        return self.sink.take()

    def timeout(self) -> list[object]:
        assert self.stream.deadline_s is not None
        self.now_s = self.stream.deadline_s
        self.stream.on_time(self.now_s)
        return self.sink.take()

    @property
    def status(self) -> tuple[int, int]:
        return self.stream.status()
