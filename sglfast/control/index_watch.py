"""Is the index process alive, or does it only exist? One that hangs is killed, and its successor goes on from what it left.

Runs in: control, once a second. Why: shards go on without an index, and what it said of its ranks' streams stays in shared memory: an
    index that hangs would freeze the KV index without anybody noticing, each rank EXACT for ever. One that dies costs a second.
Contract: time is counted in looks, so neither a clock that is set nor a machine that slept kills anybody; an index that has not beaten
    yet is still starting and is left alone.
"""

import asyncio
import logging
from collections.abc import Callable

from sglfast._segment import Segment

_INDEX_SLOT = 0
_PERIOD_S = 1.0
SILENT_LOOKS = 10  # twenty heartbeats


class IndexWatch:
    """`run` until cancelled. kill: ends the index process; it is started again because it has died."""

    def __init__(self, segment: Segment, kill: Callable[[], None], log: logging.Logger) -> None:
        self._segment = segment
        self._kill = kill
        self._log = log
        self._seen = (0, 0)  # pid, time of its last heartbeat
        self._has_beaten = False
        self._silent_looks = 0

    async def run(self) -> None:
        """Look once a second."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            self.look()

    def look(self) -> None:
        """Kill the index if it has been silent for SILENT_LOOKS looks."""
        pid, _started_ms, beat_ms, _restarts, is_ready = self._segment.process_info(_INDEX_SLOT)
        seen, self._seen = self._seen, (pid, beat_ms)
        if seen != self._seen:
            self._has_beaten = seen[0] == pid
            self._silent_looks = 0
        elif is_ready and self._has_beaten:
            self._silent_looks += 1
            if self._silent_looks == SILENT_LOOKS:
                self._log.error(
                    f"the index process has given no sign of life for {SILENT_LOOKS * _PERIOD_S:g} s: it is killed and started again"
                )
                self._kill()
