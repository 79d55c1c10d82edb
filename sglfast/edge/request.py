"""Request bytes to facts: which endpoint, which model, and the block keys of the prompt.

Runs in: shards; `PromptKeyer` also in its own threads. Contract: the body is parsed only when somebody needs to know: the model's name
    when the workers serve more than one, the prompt when the policy compares KV caches. A body that cannot be parsed is no
    error here: the worker owns the schema and answers 400 itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from sglfast.errors import PromptError

if TYPE_CHECKING:
    from sglfast.prompt.keys import PromptReader, RequestKind

_log = logging.getLogger(__name__)

# A body up to this size is rendered and tokenized on the loop (about 0.2 us a byte: under a millisecond); above, in a thread.
_INLINE_BYTES = 4096
# Prompts that wait for a thread. Beyond it a request is routed by load: a late best choice is worse than a good one now.
_MAX_WAITING = 256


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A path of the data plane that is relayed to a worker. kind: value of prompt.keys.RequestKind."""

    path: bytes
    kind: int


ENDPOINTS: dict[bytes, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint(b"/v1/chat/completions", 0),
        Endpoint(b"/v1/completions", 1),
        Endpoint(b"/generate", 2),
        Endpoint(b"/v1/embeddings", 3),
    )
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a policy knows of a prompt. prompt_tokens: 0 = unknown; keys: (block_size, bigram) -> block keys, 8 bytes each.

    why_unkeyed: "" or why the prompt has no keys.
    """

    prompt_tokens: int
    keys: dict[tuple[int, bool], bytes]
    why_unkeyed: str = ""


class _ModelPeek(msgspec.Struct):
    model: str | None = None


_decode_model = msgspec.json.Decoder(_ModelPeek).decode


def model_of(body: bytes) -> str | None:
    """The `model` of a JSON body; None when it has none or is no JSON object. Skips all else without making objects."""
    try:
        return _decode_model(body).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # no JSON, no text, nested too deeply to be skipped
        return None


class PromptKeyer:
    """Turns bodies into Facts with the model's tokenizer: short ones at once, long ones in a bounded pool of threads."""

    def __init__(self, reader: PromptReader, kinds: type[RequestKind], loop: asyncio.AbstractEventLoop) -> None:
        self._reader = reader
        self._kinds = kinds
        self._loop = loop
        # The tokenizer releases the GIL; one thread a shard keeps the machine's cores for all shards.
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")
        self._waiting = 0

    def key(self, kind: int, body: bytes, variants: tuple[tuple[int, bool], ...], then: Callable[[Facts], None]) -> None:
        """Call `then` with the facts: before this returns for a short body, later on the loop for a long one."""
        if len(body) <= _INLINE_BYTES:
            then(self._facts(kind, body, variants))
        elif self._waiting >= _MAX_WAITING:
            then(Facts(0, {}, "too many prompts wait for the tokenizer"))
        else:
            self._waiting += 1
            future = self._threads.submit(self._facts, kind, body, variants)
            future.add_done_callback(lambda done: self._loop.call_soon_threadsafe(self._landed, done, then))

    def _landed(self, done: Future[Facts], then: Callable[[Facts], None]) -> None:
        self._waiting -= 1
        if not done.cancelled():  # else the shard stops
            then(done.result())

    def _facts(self, kind: int, body: bytes, variants: tuple[tuple[int, bool], ...]) -> Facts:
        try:
            parsed: Any = orjson.loads(body)
            prompt = self._reader.text_of(self._kinds(kind), parsed)
            if prompt.text is None and prompt.token_ids is None:
                return Facts(0, {}, prompt.detail or str(prompt.reason))
            tokens = self._reader.tokens_of(prompt)
            keys = {
                (block_size, bigram): self._reader.keys_of(tokens, block_size, bigram=bigram, cache_salt=prompt.cache_salt)
                for block_size, bigram in variants
            }
        except orjson.JSONDecodeError:
            return Facts(0, {}, "the body is no JSON")
        except PromptError as error:
            return Facts(0, {}, str(error))
        except Exception as error:  # whatever it is, the request must go on; its text may quote the prompt, so only its kind is told
            _log.error("a prompt could not be read, routed by load", extra={"fields": {"error": type(error).__name__}})
            return Facts(0, {}, "the prompt could not be read")
        return Facts(len(tokens), keys)

    def close(self) -> None:
        """Forget what waits; the thread ends after its present prompt."""
        self._threads.shutdown(wait=False, cancel_futures=True)
