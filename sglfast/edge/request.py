"""Request bytes to facts: which endpoint, which model, and the block keys of the prompt.

Runs in: shards; `PromptKeyer` also in its own threads. Contract: the body is parsed only when somebody needs to know: the model's name
    when the workers serve more than one, the prompt when the policy compares KV caches. A body that cannot be parsed is no
    error here: the worker owns the schema and answers 400 itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import re
from array import array
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec
import orjson

from sglfast.errors import PromptError
from sglfast.prompt.adapters import asked_for
from sglfast.shm import dialect_of

if TYPE_CHECKING:
    from sglfast.prompt.ids import IdsKeyer, IdsKeying, Probe
    from sglfast.prompt.keys import PromptReader, RequestKind
    from sglfast.prompt.lazy import Keying, LazyKeyer
    from sglfast.prompt.raw import RawReader
    from sglfast.prompt.seen import SeenKeying
    from sglfast.prompt.tokenizer import Tokenizer
    from sglfast.shm import Variant

    Begun = Keying | SeenKeying | IdsKeying  # a prompt that is looked at

T = TypeVar("T")
_log = logging.getLogger(__name__)

# What the loop does itself, in about half a millisecond at worst: split a body of so many bytes into its messages (0.1 us a KiB, 1 us at
# worst), parse and render so much of it (30 us) with so many objects and arrays (2 us each), and tokenize so many characters (0.2 us each):
# all that a known or an unowned prompt needs. More goes to a thread.
_SCANNED_BYTES = 1 << 19
INLINE_BYTES = 65536
_INLINE_OBJECTS = 150
_INLINE_CHARS = 1500
# A chat is rendered so far at first: enough for the first blocks, which tell whether anybody owns anything.
_HEAD_CHARS = 1024
# Prompts that wait for a thread. Beyond it a request is routed by load: a late best choice is worse than a good one now.
_MAX_WAITING = 256
# Who waits is served by age, and a prompt counts as if it had come later by ten times what its tokens may cost (0.2 us a byte): short
# prompts do not wait for long ones, and these have their turn in the end.
_LATER_S_A_BYTE = 2e-6


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A path of the data plane that is relayed to a worker. kind: value of prompt.keys.RequestKind.

    takes_rid: SGLang reads a `rid` in its bodies. Not those of embeddings: a list of inputs with one rid is answered 500 there.
    worker_path: under which workers have it, where that is another one.
    """

    path: bytes
    kind: int
    takes_rid: bool = False
    worker_path: bytes = b""


ENDPOINTS: dict[bytes, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint(b"/v1/chat/completions", 0, takes_rid=True),
        Endpoint(b"/v1/completions", 1, takes_rid=True),
        Endpoint(b"/generate", 2, takes_rid=True),
        Endpoint(b"/v1/embeddings", 3),
        Endpoint(b"/v1/responses", 4),
        Endpoint(b"/v1/classify", 3),  # its input is an embedding's
        Endpoint(b"/v1/rerank", 5),
        Endpoint(b"/rerank", 5, worker_path=b"/v1/rerank"),  # SGLang has the latter only, vLLM both
    )
}


# Paths that are relayed although nothing is known of them (--passthrough).
_OTHERS_UNDER = b"/v1/"
OTHER_KIND = 5
_SEGMENT_ENDS = re.compile(rb"[/\\]")


def is_under_v1(path: bytes) -> bool:
    """Whether a path stays under /v1/, also for a server that decodes it and follows its dots: what lies outside is not for clients."""
    if not path.startswith(_OTHERS_UNDER):
        return False
    segments = _SEGMENT_ENDS.split(unquote_to_bytes(path))
    return not any(segment.partition(b";")[0] in (b".", b"..") for segment in segments)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a policy knows of a prompt. prompt_tokens: 0 = unknown; keys: block keys, 8 bytes each, by the workers' way to make them.

    keys end where no rank's overlap goes on; is_estimated: so the rest of the prompt was not tokenized, and prompt_tokens counts it by
    its characters; why_unkeyed: "" or why the prompt has no keys.
    """

    prompt_tokens: int
    keys: dict[Variant, bytes]
    why_unkeyed: str = ""
    is_estimated: bool = False


class _ModelPeek(msgspec.Struct):
    model: str | None = None


_decode_model = msgspec.json.Decoder(_ModelPeek).decode


def model_of(body: bytes) -> str | None:
    """The `model` of a JSON body; None when it has none or is no JSON object. Skips all else without making objects."""
    try:
        return _decode_model(body).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # no JSON, no text, nested too deeply to be skipped
        return None


class _Waiting(NamedTuple):
    """Work that waits for the thread."""

    begin: Callable[[], None]
    leave_out: Callable[[], None]
    is_wanted: Callable[[], bool] | None


class PromptKeyer:
    """Turns bodies into Facts with the model's tokenizer: short work at once, long work in a bounded pool of threads.

    raw: reads chats that were seen, and begins those that were not, without parsing them; None = all are parsed.
    here, there: what the KV index owns, asked by the loop and by the thread: each by a TreeReader of its own.
    """

    has_tokenizer = True

    def __init__(
        self,
        reader: PromptReader,
        keyer: LazyKeyer | IdsKeyer,
        kinds: type[RequestKind],
        loop: asyncio.AbstractEventLoop,
        *,
        here: Probe,
        there: Probe,
        raw: RawReader | None = None,
    ) -> None:
        self._reader = reader
        self._keyer = keyer
        self._kinds = kinds
        self._loop = loop
        self._raw = raw
        self._here = here
        self._there = there
        # The tokenizer releases the GIL; one thread a shard keeps the machine's cores for all shards.
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")
        self._waiting: list[tuple[float, int, _Waiting]] = []  # a heap
        self._order = itertools.count()
        self._is_busy = False

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, where there is one."""
        assert self._keyer.tokenizer is not None
        return self._keyer.tokenizer

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
        """Call `then` with the facts: before this returns when that takes no time, else later on the loop.

        is_whole: all keys of the prompt and its exact number of tokens, whoever owns them; is_wanted: asked before the thread begins.
        """
        here, there = (None, None) if is_whole else (self._here, self._there)
        keying: Begun | None = None
        if here is not None and len(body) <= _SCANNED_BYTES:
            keying = self._begin_raw(kind, body, variants, (INLINE_BYTES, _INLINE_OBJECTS))
        if keying is None and len(body) <= INLINE_BYTES and body.count(b"{") + body.count(b"[") <= _INLINE_OBJECTS:
            found = self._begin(kind, body, variants)
            if isinstance(found, Facts):
                then(found)
                return
            keying = found
        if keying is not None:
            facts = self._run(keying, here, _INLINE_CHARS)
            if facts is not None:
                then(facts)
                return
        waits = self.submit(
            lambda: self._finish(keying, kind, body, variants, there),
            lambda facts: then(facts or _FAILED),
            n_bytes=len(body),
            is_wanted=is_wanted,
        )
        if not waits:
            then(Facts(0, {}, "too many prompts wait for the tokenizer"))

    def chat_tokens(self, body: bytes, variants: tuple[Variant, ...]) -> list[int] | array[int]:
        """Token ids of a chat body's prompt, as the workers with these variants make it.

        For the thread: takes as long as it takes. Raises PromptError, JSONDecodeError.
        """
        return self._reader.tokens_of(self._reader.text_of(self._kinds(0), orjson.loads(body), 0, dialect_of(variants)))

    def submit(
        self, work: Callable[[], T], then: Callable[[T | None], None], *, n_bytes: int, is_wanted: Callable[[], bool] | None = None
    ) -> bool:
        """Do `work` in the thread and call `then` on the loop with its result, None if it raised; False: too much waits already.

        n_bytes: how much there is to tokenize; is_wanted: False when it is to be left out, then `then` gets None.
        """
        if len(self._waiting) + self._is_busy >= _MAX_WAITING:
            self._leave_out_unwanted()
            if len(self._waiting) + self._is_busy >= _MAX_WAITING:
                return False

        def land(done: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the shard has ended meanwhile
                self._loop.call_soon_threadsafe(self._landed, done, then)

        def begin() -> None:
            self._threads.submit(work).add_done_callback(land)

        waiting = _Waiting(begin, lambda: then(None), is_wanted)
        heapq.heappush(self._waiting, (self._loop.time() + n_bytes * _LATER_S_A_BYTE, next(self._order), waiting))
        if not self._is_busy:
            self._begin_next()
        return True

    def _leave_out_unwanted(self) -> None:
        """Give their places to others. Cost: a look at each of _MAX_WAITING at most."""
        left = [entry for entry in self._waiting if (is_wanted := entry[2].is_wanted) is not None and not is_wanted()]
        if left:
            numbers = {number for _, number, _ in left}
            self._waiting = [entry for entry in self._waiting if entry[1] not in numbers]
            heapq.heapify(self._waiting)
            for _, _, waiting in left:
                waiting.leave_out()

    def _begin_next(self) -> None:
        """Give the thread its next work. It has one at a time, so that what comes meanwhile finds its place in the line."""
        self._is_busy = False
        while self._waiting and not self._is_busy:
            _, _, waiting = heapq.heappop(self._waiting)
            if waiting.is_wanted is None or waiting.is_wanted():
                self._is_busy = True
                waiting.begin()
            else:
                waiting.leave_out()

    def _landed(self, done: Future[T], then: Callable[[T | None], None]) -> None:
        if done.cancelled():
            return  # the shard stops
        self._begin_next()
        if error := done.exception():
            # Its text may quote a prompt, so only its kind is told.
            _log.error("the tokenizer's thread failed", extra={"fields": {"error": type(error).__name__}})
            then(None)
        else:
            then(done.result())

    def _begin_raw(
        self, kind: int, body: bytes, variants: tuple[Variant, ...], budget: tuple[int, int] | None
    ) -> Keying | SeenKeying | None:
        """Begin with a chat from its bytes. budget: bytes, and objects and arrays, that may be parsed now; None = all."""
        if self._raw is None or kind != 0:
            return None
        return self._raw.begin(body, variants, _HEAD_CHARS, budget)

    def _begin(self, kind: int, body: bytes, variants: tuple[Variant, ...]) -> Keying | IdsKeying | Facts:
        try:
            fields = orjson.loads(body)
            prompt = self._reader.text_of(self._kinds(kind), fields, _HEAD_CHARS, dialect_of(variants))
            if prompt.text is None and prompt.token_ids is None:
                return Facts(0, {}, prompt.detail or str(prompt.reason))
            return self._keyer.begin(prompt, variants, asked_for(fields))
        except orjson.JSONDecodeError:
            return Facts(0, {}, "the body is no JSON")
        except PromptError as error:
            return Facts(0, {}, str(error))
        except Exception as error:
            return _unread(error)

    def _run(self, keying: Begun, probe: Probe | None, budget_chars: int) -> Facts | None:
        try:
            if not keying.run(probe, budget_chars):
                return None
        except PromptError as error:
            return Facts(0, {}, str(error))
        except Exception as error:
            return _unread(error)
        keys = keying.keys
        return Facts(keys.tokens, keys.keys, is_estimated=keys.is_estimated)

    def _finish(self, keying: Begun | None, kind: int, body: bytes, variants: tuple[Variant, ...], probe: Probe | None) -> Facts | None:
        if keying is None and probe is not None:
            keying = self._begin_raw(kind, body, variants, None)
        if keying is None:
            found = self._begin(kind, body, variants)
            if isinstance(found, Facts):
                return found
            keying = found
        return self._run(keying, probe, 1 << 62)

    def close(self) -> None:
        """Forget what waits; the thread ends after its present prompt."""
        self._waiting.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)


_FAILED = Facts(0, {}, "the tokenizer failed")


def _unread(error: Exception) -> Facts:
    """Whatever it is, the request must go on."""
    # Its text may quote the prompt, so only its kind is told.
    _log.error("a prompt could not be read, routed by load", extra={"fields": {"error": type(error).__name__}})
    return Facts(0, {}, "the prompt could not be read")
