"""What a stream has asked of the engine's replay socket: a replay under way, or a look whether a socket that was mute speaks again.

Runs in: index, inside the rank's subscriber thread. Pure. Contract: see index/stream. A look holds no live batch back; it is repeated
    after pauses that double, because a socket that is down for a minute is worth having again and one that is down for ever is
    not worth much.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Request:
    """A replay under way. front: `next_seq` when it was asked; is_verified: the engine is known to be the one we followed;
    is_late: it is what a socket says that was mute before."""

    front: int | None
    deadline_s: float
    is_verified: bool
    is_late: bool = False
    n_batches: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """Whether anybody answers. start_seq: asked from there on; last_print: of that batch, if nothing but the engine's being the same one is
    in question, else 0."""

    start_seq: int
    last_print: int
    deadline_s: float


class Looks:
    """When to look. at_s: the next time, None = there is no need; under_way: the one that waits for an answer."""

    def __init__(self, first_pause_s: float, last_pause_s: float) -> None:
        self.at_s: float | None = None
        self.under_way: Look | None = None
        self._first_pause_s = first_pause_s
        self._last_pause_s = last_pause_s
        self._pause_s = first_pause_s

    @property
    def deadline_s(self) -> float | None:
        """When something has to be done."""
        return self.at_s if self.under_way is None else self.under_way.deadline_s

    def plan(self, now_s: float) -> None:
        """Look again after a pause, which is longer each time."""
        self.under_way = None
        if self.at_s is None:
            self.at_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, self._last_pause_s)

    def begin(self, look: Look) -> None:
        """It is asked."""
        self.at_s, self.under_way = None, look

    def take(self) -> Look | None:
        """The one under way, which is over."""
        look, self.under_way = self.under_way, None
        return look

    def end(self) -> None:
        """There is no need now."""
        self.at_s = self.under_way = None

    def reset(self) -> None:
        """The socket is as good as any."""
        self.end()
        self._pause_s = self._first_pause_s
