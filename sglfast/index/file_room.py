"""Which ranks there are open files for, and when those that had none are tried again.

Runs in: index, main thread. Contract: a rank that is not followed for lack of open files is tried again as soon as another one's stream
    was closed, and otherwise after pauses that double, from a second to a minute: the limit may be raised while the index runs
    (prlimit), and what else has files open in the process may close them.
"""

import errno
from collections.abc import Callable, Iterable

# Open files of a rank: what wakes its thread and those sockets up, its connection, and another one during a replay. Of the process
# otherwise: ZMQ's own, listeners, the segment, the log.
_FILES_A_RANK, _OTHER_FILES = 8, 64
_FIRST_PAUSE_S, _LAST_PAUSE_S = 1.0, 60.0

# Position of the worker, and the number of its rank.
Waiting = tuple[int, int]


def files_of(n_ranks: int) -> int:
    """How many open files an index needs that follows so many ranks."""
    return n_ranks * _FILES_A_RANK + _OTHER_FILES


def is_for_lack_of_files(error: Exception) -> bool:
    """Whether something was refused because the process, or the machine, has too many files open."""
    return getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)


class FileRoom:
    """limit: how many files the process may have open now, None = as many as it likes; itself None = there is no limit."""

    def __init__(self, limit: Callable[[], int | None] | None) -> None:
        self._limit = limit
        self._waiting: dict[Waiting, None] = {}  # in the order in which they came
        self._pause_s = _FIRST_PAUSE_S
        self._at_s: float | None = None  # None: at once

    @property
    def limit(self) -> int | None:
        """How many files the process may have open now; None = as many as it likes."""
        return None if self._limit is None else self._limit()

    def has_for(self, n_ranks: int) -> bool:
        """Whether so many ranks can be followed."""
        limit = self.limit
        return limit is None or files_of(n_ranks) <= limit

    def wait(self, rank: Waiting, now_s: float) -> None:
        """There is no room for this rank."""
        if not self._waiting:
            self._at_s = now_s + self._pause_s
        self._waiting[rank] = None

    def forget(self, worker_idx: int) -> None:
        """The worker is not followed any more."""
        self._waiting = {rank: None for rank in self._waiting if rank[0] != worker_idx}

    def freed(self) -> None:
        """A stream was closed."""
        self._pause_s = _FIRST_PAUSE_S
        self._at_s = None

    def due(self, now_s: float) -> Iterable[Waiting]:
        """Those that are to be tried now, which wait no more unless somebody says so again."""
        if not self._waiting:
            self._pause_s = _FIRST_PAUSE_S
            return ()
        if self._at_s is not None and now_s < self._at_s:
            return ()
        self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)
        tried, self._waiting = self._waiting, {}
        return tried
