"""The KV events of one engine step, merged into the events that SGLang would publish for it.

Runs in: sim. Contract: what is recorded first is published first, because order matters to a consumer. As sglang 0.5.18 and
    later do, neighbours are merged: removals always, stores when the second continues the first (same salt, and its
    parent is the first one's last block). Source: spec/kv_events.md 1.5, golden engine_semantics_0.5.23.json.
"""

import struct
from dataclasses import dataclass, field

from sglfast.sim.output import TokenIds
from sglfast.wire.kv_events import EventOut, cleared, removed, stored


@dataclass(slots=True)
class _Stored:
    parent: int | None
    cache_salt: str
    hashes: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Removed:
    hashes: list[int] = field(default_factory=list)


class EventLog:
    """Events of one rank that wait for publication. page_size: tokens a block."""

    __slots__ = ("_events", "_page_size")

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._events: list[_Stored | _Removed] = []

    def store(self, keys: bytes, start: int, stop: int, token_ids: TokenIds, cache_salt: str) -> None:
        """Record that blocks start..stop of a chain are cached now. token_ids: of the whole prompt, from its beginning."""
        first = max(0, start - 1)
        hashes = _words(keys[8 * first : 8 * stop])
        parent = hashes.pop(0) if start else None
        tail = self._events[-1] if self._events else None
        if not (isinstance(tail, _Stored) and start and tail.cache_salt == cache_salt and tail.hashes[-1] == parent):
            tail = _Stored(parent, cache_salt)
            self._events.append(tail)
        tail.hashes += hashes
        tail.token_ids += token_ids[start * self._page_size : stop * self._page_size]

    def remove(self, keys: bytes) -> None:
        """Record that these blocks are gone."""
        tail = self._events[-1] if self._events else None
        if not isinstance(tail, _Removed):
            tail = _Removed()
            self._events.append(tail)
        tail.hashes += _words(keys)

    def take(self) -> list[EventOut]:
        """Return what was recorded and forget it; an empty list means that nothing is to be published."""
        events, self._events = self._events, []
        return [self._out(event) for event in events]

    def _out(self, event: _Stored | _Removed) -> EventOut:
        if isinstance(event, _Removed):
            return removed(block_hashes=event.hashes, medium="GPU")
        return stored(
            block_hashes=event.hashes,
            parent_block_hash=event.parent,
            token_ids=event.token_ids,
            block_size=self._page_size,
            medium="GPU",
            cache_salt=event.cache_salt or None,
        )


def all_cleared() -> list[EventOut]:
    """Return the events of an emptied cache: an engine's first batch, and what a flush publishes."""
    return [cleared()]


def _words(keys: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(keys) // 8}Q", keys))
