"""The memory of the ranks' engine-hash maps: a region a rank in a file that control made, so that a map outlives the index process.

Runs in: index, main thread. Contract: `take` gives out a rank's map, empty or as the process before this one left it; whoever asks for it
    answers for a rank having one at a time. A rank whose last thread did not end (`abandon`) gets maps of their own memory from then
    on, as all do where there is no file: such a map dies with the process.
Source: cext/keymapmemory.pxi.
"""

import logging
import os

from sglfast._keymap import KeyMap
from sglfast._segment import Segment
from sglfast.shm import map_region_bytes


class KeyMaps:
    """The regions. fd: of the file (shm.create_maps), owned by the caller for as long as any of its maps lives; None = there is none."""

    def __init__(self, fd: int | None, segment: Segment, log: logging.Logger) -> None:
        self._fd = fd
        self._region_bytes = map_region_bytes(segment.capacity_blocks)
        self._abandoned: set[int] = set()
        if fd is not None and os.fstat(fd).st_size != segment.max_ranks * self._region_bytes:
            log.error("the file of the engine-hash maps is of another build of sglfast: what is in it is not used")
            self._fd = None

    def take(self, rank: int, owner: int, *, is_left: bool) -> tuple[KeyMap, bool]:
        """(the rank's map, True when it is the one that a former process left for this owner, else it is empty).

        owner: 64 bits, what makes the rank's stream the one that it is; is_left: look for a former one at all.
        """
        if self._fd is None or rank in self._abandoned:
            return KeyMap(owner=owner), False
        key_map = KeyMap(self._fd, rank * self._region_bytes, self._region_bytes, owner)
        if is_left and key_map.adopt():
            return key_map, True
        key_map.release()
        return key_map, False

    def abandon(self, rank: int) -> None:
        """A thread may still write to the rank's region."""
        self._abandoned.add(rank)
