"""POST /v1/tokenize and /v1/detokenize: text to token ids and back, with the tokenizer that routing uses.

Runs in: shards; the work in the tokenizer's thread. Contract: the requests of sgl-router (spec/router.md 1.1), where unknown and missing
    fields are refused (422), as are broken JSON (400), another content type than JSON (415) and bodies above 2 MiB (413); refusals are
    OpenAI error objects as all others of ours. More than there: a chat body (`messages`) is tokenized as its prompt, template and all.
    A text gets the special tokens that the engine puts around the prompt of /v1/completions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import orjson

from sglfast import errors
from sglfast.edge.request import PromptKeyer

if TYPE_CHECKING:
    from sglfast._httphead import RequestHead
    from sglfast.edge.route import Router
    from sglfast.edge.shard import Shard
    from sglfast.shm import Variant

# A JSON body, or a refusal with its text.
Answer = bytes | tuple[errors.Reason, str | None]

LIMIT_BYTES = 2 << 20
_CONTENT_TYPE = re.compile(rb"(?:^|\r\n)content-type:[ \t]*([^\r\n;]*)", re.IGNORECASE)


class _Text(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    prompt: str


class _Ids(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    tokens: list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]]
    skip_special_tokens: bool = False


class _Peek(msgspec.Struct):
    model: str
    messages: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    prompt: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_decode_text = msgspec.json.Decoder(_Text).decode
_decode_ids = msgspec.json.Decoder(_Ids).decode
_decode_peek = msgspec.json.Decoder(_Peek).decode


def tokenize(shard: Shard, head: RequestHead, body: bytes, then: Callable[[Answer], None]) -> None:
    """{model, prompt} or a chat body -> {model, tokens, count}."""
    _answer(shard, head, body, then, _tokenized)


def detokenize(shard: Shard, head: RequestHead, body: bytes, then: Callable[[Answer], None]) -> None:
    """{model, tokens, skip_special_tokens} -> {model, text}."""
    _answer(shard, head, body, then, _detokenized)


class _Models:
    """What the router knows of models now. Made on the loop, asked in the thread: a router's pools are replaced, never changed."""

    def __init__(self, router: Router) -> None:
        router.refresh()
        self._pools = router.pools
        self._names = frozenset(router.models)

    def has(self, name: str) -> bool:
        """Whether requests for this model are served; a worker whose model is not known takes any."""
        return name in self._names or None in self._pools or not self._names

    def variants(self, name: str) -> tuple[Variant, ...]:
        """How the model's workers make prompts and cut them into blocks."""
        pool = self._pools.get(name) or self._pools.get(None)
        return pool.variants if pool is not None else ()


Work = Callable[[PromptKeyer, bytes, _Models], Answer]


def _answer(shard: Shard, head: RequestHead, body: bytes, then: Callable[[Answer], None], work: Work) -> None:
    keyer = shard.router.keyer
    found = _CONTENT_TYPE.search(head.kept)
    content_type = found[1].strip().lower() if found is not None else b""
    if len(body) > LIMIT_BYTES:
        then((errors.PAYLOAD_TOO_LARGE, f"the body has {len(body)} bytes; this path takes at most {LIMIT_BYTES}"))
    elif content_type != b"application/json" and not (content_type.startswith(b"application/") and content_type.endswith(b"+json")):
        then((errors.UNSUPPORTED_MEDIA_TYPE, None))
    elif keyer is None or not keyer.has_tokenizer:
        then((errors.MODEL_NOT_FOUND, "no tokenizer is configured: the router needs --tokenizer-path for this"))
    else:
        models = _Models(shard.router)
        taken = keyer.submit(
            lambda: _guarded(work, keyer, body, models), lambda answer: then(answer or (errors.INTERNAL_ERROR, None)), n_bytes=len(body)
        )
        if not taken:
            then((errors.SERVICE_OVERLOADED, None))


def _guarded(work: Work, keyer: PromptKeyer, body: bytes, models: _Models) -> Answer:
    try:
        return work(keyer, body, models)
    except msgspec.ValidationError as error:
        return errors.UNPROCESSABLE, f"the body does not have the fields of this path: {error}"
    except (msgspec.DecodeError, orjson.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        return errors.BAD_REQUEST, f"the body is no JSON: {error}"
    except errors.PromptError as error:
        return errors.BAD_REQUEST, str(error)


def _tokenized(keyer: PromptKeyer, body: bytes, models: _Models) -> Answer:
    peek = _decode_peek(body)
    is_chat = peek.messages is not msgspec.UNSET and peek.prompt is msgspec.UNSET
    text = None if is_chat else _decode_text(body).prompt
    if not models.has(peek.model):
        return errors.MODEL_NOT_FOUND, f"model not found: {peek.model}"
    if text is None:
        tokens: Any = keyer.chat_tokens(body, models.variants(peek.model))
    else:
        try:
            tokens = keyer.tokenizer.encode(text, True)
        except (TypeError, UnicodeError) as error:  # half of a surrogate pair
            raise errors.PromptError(f"the prompt is not valid Unicode text: {error}") from error
    return orjson.dumps({"model": peek.model, "tokens": tokens, "count": len(tokens)})


def _detokenized(keyer: PromptKeyer, body: bytes, models: _Models) -> Answer:
    given = _decode_ids(body)
    if not models.has(given.model):
        return errors.MODEL_NOT_FOUND, f"model not found: {given.model}"
    return orjson.dumps({"model": given.model, "text": keyer.tokenizer.decode(given.tokens, given.skip_special_tokens)})
