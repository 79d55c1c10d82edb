"""Prompts that clients have cut into tokens themselves, in a shard without a tokenizer: those are looked up all the same.

Runs in: shards; long bodies in the keyer's own thread. Contract: a body that does not look as if its prompt were token ids is not
    parsed, and has no keys; no library for text is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from sglfast.edge.request import Facts, PromptKeyer
from sglfast.prompt.ids import IdsKeyer
from sglfast.prompt.keys import PromptReader, RequestKind

if TYPE_CHECKING:
    import asyncio

    from sglfast.shm import Variant

_INPUT_IDS, _PROMPT, _INPUT = (re.compile(rb'"%b"\s*:\s*\[' % field) for field in (b"input_ids", b"prompt", b"input"))
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
        """As PromptKeyer.key; a prompt of text has no facts. Cost of such: a search of the body, 15 us for 32 KB."""
        if may_be_ids(kind, body):
            super().key(kind, body, variants, then, is_whole=is_whole, is_wanted=is_wanted)
        else:
            then(_FACTS_OF_TEXT)


def may_be_ids(kind: int, body: bytes) -> bool:
    """Whether the prompt of a body for this kind of endpoint (value of prompt.keys.RequestKind) may be token ids."""
    if kind in (RequestKind.CHAT, RequestKind.GENERATE):
        return _INPUT_IDS.search(body) is not None
    if kind == RequestKind.COMPLETIONS:
        return _PROMPT.search(body) is not None
    return kind == RequestKind.EMBEDDINGS and _INPUT.search(body) is not None


def _ask_nobody(_keys: bytes) -> int:
    return 0  # ids are hashed to their end
