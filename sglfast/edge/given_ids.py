"""Prompts that clients have cut into tokens themselves, in a shard without a tokenizer: those are looked up all the same.

Runs in: shards; long bodies in the keyer's own thread. Contract: a body that does not look as if its prompt were token ids is not
    parsed, and has no keys; no library for text is loaded.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from sglfast.edge.request import INLINE_BYTES, Facts, PromptKeyer
from sglfast.prompt.ids import IdsKeyer
from sglfast.prompt.keys import PromptReader, RequestKind

if TYPE_CHECKING:
    import asyncio

    from sglfast.edge.request import Begun
    from sglfast.prompt.ids import Probe
    from sglfast.shm import Variant

_LONGEST_BYTES = 256  # of what is searched for: nobody writes a hundred blanks there, and who does is routed as by a text
_INPUT_IDS, _PROMPT, _INPUT = (re.compile(rb'"%b"\s{0,99}:\s{0,99}\[' % field) for field in (b"input_ids", b"prompt", b"input"))
_PATTERNS: dict[int, re.Pattern[bytes]] = {
    RequestKind.CHAT: _INPUT_IDS,
    RequestKind.GENERATE: _INPUT_IDS,
    RequestKind.COMPLETIONS: _PROMPT,
    RequestKind.EMBEDDINGS: _INPUT,
}
_FACTS_OF_TEXT = Facts(0, {}, "no tokenizer is loaded")


class IdsPromptKeyer(PromptKeyer):
    """A PromptKeyer for token ids only."""

    has_tokenizer = False

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(PromptReader(None), IdsKeyer(), RequestKind, loop, here=_ask_nobody, there=_ask_nobody)

    def key(
        self,
        kind: int,
        body: bytes,
        variants: tuple[Variant, ...],
        then: Callable[[Facts], None],
        *,
        is_whole: bool = False,
        is_wanted: Callable[[], bool] | None = None,
    ) -> None:
        """As PromptKeyer.key; a prompt of text has no facts. Cost of such: a search of the body, 1 to 1.7 us a KB; above INLINE_BYTES in
        the thread."""
        if kind in _PATTERNS and (len(body) > INLINE_BYTES or may_be_ids(kind, body)):
            super().key(kind, body, variants, then, is_whole=is_whole, is_wanted=is_wanted)
        else:
            then(_FACTS_OF_TEXT)

    def _finish(self, keying: Begun | None, kind: int, body: bytes, variants: tuple[Variant, ...], probe: Probe | None) -> Facts | None:
        return super()._finish(keying, kind, body, variants, probe) if keying is not None or may_be_ids(kind, body) else _FACTS_OF_TEXT


def may_be_ids(kind: int, body: bytes) -> bool:
    """Whether the prompt of a body for this kind of endpoint (value of prompt.keys.RequestKind) may be token ids.

    Of more than INLINE_BYTES so many are searched at a time: a search lets no other thread run, and the loop is one.
    """
    pattern = _PATTERNS.get(kind)
    if pattern is None:
        return False
    for start in range(0, len(body), INLINE_BYTES):
        if start:
            time.sleep(0)
        if pattern.search(body, start, start + INLINE_BYTES + _LONGEST_BYTES) is not None:
            return True
    return False


def _ask_nobody(_keys: bytes) -> int:
    return 0  # ids are hashed to their end
