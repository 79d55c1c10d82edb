"""Which of its stores a simulated worker keeps to itself on request: it caches them, and its events never tell.

Runs in: sim. Contract: what is kept back has no sequence number and is in no replay, so the stream itself is whole: only who compares it
    with `cached_tokens` can notice. Removals are published all the same. The same seed keeps back the same events.

Why only the end of an event by blocks: a first block left out would make the next one look like a root with another hash, which is
    another fault.
"""

import random
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sglfast.wire.kv_events import EventOut

Unit = Literal["event", "block"]


@dataclass(frozen=True, slots=True)
class Silence:
    """share (0..1): of the BlockStored events that are left out, or, by "block", of the blocks at the end of each of them."""

    share: float = 0.0
    unit: Unit = "event"


def parse_silence(body: dict[str, Any]) -> Silence:
    """Return what a JSON body asks for. Raises ValueError with what would be right."""
    unknown = sorted(body.keys() - {"share", "unit"})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}: there are share, unit")
    silence = Silence(**body)
    if isinstance(silence.share, bool) or not isinstance(silence.share, int | float) or not 0 <= silence.share <= 1:
        raise ValueError("share must be a number from 0 (publish everything) to 1")
    if silence.unit not in get_args(Unit):
        raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}")
    return silence


class StoreFilter:
    """One rank's. silence: as it was set; kept_back: blocks so far that were not published."""

    __slots__ = ("_chance", "kept_back", "silence")

    def __init__(self, seed: int) -> None:
        self.silence = Silence()
        self.kept_back = 0
        self._chance = random.Random(seed)

    def published(self, events: list[EventOut]) -> list[EventOut]:
        """Those events of a batch, or parts of them, that are to be published."""
        if not self.silence.share:
            return events
        left = [self._part(event) if event.tag == "BlockStored" else event for event in events]
        return [event for event in left if event is not None]

    def _part(self, event: EventOut) -> EventOut | None:
        hashes = event.fields["block_hashes"]
        chance = self._chance.random()
        if self.silence.unit == "event":
            n_told = len(hashes) if chance >= self.silence.share else 0
        else:
            n_told = int(len(hashes) * (1 - self.silence.share) + chance)  # rounded by chance, so that single blocks have their share, too
        self.kept_back += len(hashes) - n_told
        if not n_told:
            return None
        tokens = event.fields["token_ids"][: n_told * event.fields["block_size"]]
        return EventOut(event.tag, event.fields | {"block_hashes": hashes[:n_told], "token_ids": tokens})
