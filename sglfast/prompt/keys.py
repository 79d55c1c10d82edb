"""Request body -> prompt text -> token ids -> block keys: the three steps of KV-aware routing on the SHA route.

Runs in: shard (each step once per request, the long ones off the event loop), simulator, load generator.

Contract: `text_of` never raises on a client's body; what cannot be keyed comes back as a PromptText without text and ids
    that names the reason. `tokens_of` and `keys_of` raise PromptError. All three are pure and may run in any thread.

Why a request has at most (n - 1) // block_size keys: SGLang computes at least the last token of a prompt itself, so it
    looks up the first n - 1 tokens only (spec/kv_events.md 2.8, schedule_batch.py `_compute_max_prefix_len`).
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sglfast._blockhash import page_keys
from sglfast.errors import PromptError
from sglfast.prompt import vllm_chat
from sglfast.prompt.chat import ChatInput, Reason, UnkeyableError, chat_input, malformed, second_try
from sglfast.prompt.pieces import PieceTokenizer
from sglfast.prompt.responses import as_chat
from sglfast.shm import Dialect

if TYPE_CHECKING:
    from sglfast.prompt.template import ChatTemplate
    from sglfast.prompt.tokenizer import Tokenizer


class RequestKind(enum.IntEnum):
    """The endpoint of a request, which decides where its prompt stands."""

    CHAT = 0
    COMPLETIONS = 1
    GENERATE = 2
    EMBEDDINGS = 3
    RESPONSES = 4
    OTHER = 5  # no prompt that an engine caches


class PromptText(NamedTuple):
    """A prompt on its way to tokens: either text, or the client's own token ids, or neither.

    add_special_tokens: for text, whether the model's BOS or EOS goes around it (a chat template prints its own);
    continuation: text tokenized apart and put after `text`; cache_salt: "" for none; reason: why there is neither text nor
    ids, "" else; detail: the same as a sentence, for logs.
    rest: `text` is only the beginning, and this makes what follows it, once (it can raise PromptError); rest_chars: about how much;
    is_rest_long: it is no work for an event loop.
    """

    text: str | None = None
    token_ids: list[int] | None = None
    add_special_tokens: bool = False
    continuation: str = ""
    cache_salt: str = ""
    reason: Reason | None = None
    detail: str = ""
    rest: Callable[[], str] | None = None
    rest_chars: int = 0
    is_rest_long: bool = False


class PromptReader:
    """Reads prompts with one model's tokenizer; without one, only prompts that are token ids already (and then loads no library for more).

    cache_bytes: what the cache of tokenized pieces may take (prompt/pieces.py); 0 = none. Any thread may use it.
    """

    __slots__ = ("_pieces", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer | None, cache_bytes: int = 0) -> None:
        self._tokenizer = tokenizer
        self._pieces = PieceTokenizer(tokenizer, cache_bytes) if tokenizer is not None and cache_bytes else None

    def text_of(self, kind: RequestKind, body: Mapping[str, Any], head_chars: int = 0, dialect: Dialect = Dialect()) -> PromptText:  # noqa: B008 (immutable)
        """Return the prompt of a decoded JSON body, in the form in which the engine hands it to its tokenizer.

        head_chars: of a chat, render only so many characters (at least), if the rest can follow later; dialect: of the
        workers that the keys are for.
        """
        try:
            if not isinstance(body, Mapping):
                raise malformed("the body must be a JSON object")
            if kind == RequestKind.CHAT:
                return self._chat(body, head_chars, dialect)
            if kind == RequestKind.COMPLETIONS:
                return self._completion(body, dialect)
            if kind == RequestKind.GENERATE:
                return self._generate(body)
            if kind == RequestKind.RESPONSES:
                return self._responses(body, head_chars, dialect)
            if kind == RequestKind.OTHER:
                raise UnkeyableError("no_prompt", "this path carries no prompt that a KV cache holds")
            # SGLang's embedding requests have no cache_salt.
            return self._plain(body.get("input"), "input", "")
        except UnkeyableError as error:
            return PromptText(reason=error.reason, detail=str(error))
        except RecursionError:
            return PromptText(reason="malformed", detail="the body is nested too deeply")

    def tokens_of(self, prompt: PromptText) -> list[int] | array[int]:
        """Return the token ids; raises PromptError for a prompt without text and ids, or text that is no valid Unicode."""
        if prompt.token_ids is not None:
            return prompt.token_ids
        tokenizer = self._tokenizer
        if prompt.text is None or tokenizer is None:
            raise PromptError(prompt.detail or "this prompt has no text and no token ids")
        try:
            encode = self._pieces.encode if self._pieces is not None else tokenizer.encode
            ids = encode(prompt.text, prompt.add_special_tokens)
            if prompt.continuation:
                # SGLang encodes it as a text of its own and drops a BOS.
                tail = tokenizer.encode(prompt.continuation, True)
                ids.extend(tail[1:] if tail and tail[0] == tokenizer.bos_token_id else tail)
        except (TypeError, UnicodeError) as error:  # half of a surrogate pair
            raise PromptError(f"the prompt is not valid Unicode text: {error}") from error
        return ids

    def keys_of(self, token_ids: Sequence[int], block_size: int, *, bigram: bool = False, cache_salt: str = "") -> bytes:
        """Return the keys of the leading blocks that an engine can have: 8 bytes each, native uint64.

        block_size: tokens per KV page of the worker; bigram: the worker's pages hold pairs of tokens (EAGLE).
        Raises PromptError for token ids or a salt that no engine accepts, ValueError for a block size below 1.
        """
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, not {block_size}")
        units = len(token_ids) - 1 - bigram
        try:
            return page_keys(
                token_ids,
                block_size,
                bigram=bigram,
                max_pages=max(0, units // block_size),
                cache_salt=cache_salt.encode(),
            )
        except (ValueError, TypeError) as error:
            raise PromptError(f"no block keys can be made of this prompt: {error}") from error

    def _chat(self, body: Mapping[str, Any], head_chars: int, dialect: Dialect) -> PromptText:
        salt = cache_salt_of(body)
        is_sglang = dialect.engine == "sglang"
        if is_sglang and body.get("input_ids") is not None:
            return self._plain(body["input_ids"], "input_ids", salt)
        if self._tokenizer is None:
            raise UnkeyableError("no_tokenizer", "no tokenizer is loaded for this model")
        template = self._tokenizer.chat
        if template is None:
            raise UnkeyableError("no_chat_template", "the tokenizer has no chat template")
        given = given_of(body, template, dialect)
        if head_chars and not given.tools and given.is_plain:
            return _head(template, given, head_chars, salt)
        try:
            text = text_of_chat(template, given)
        except PromptError as error:
            if not (given.tools and is_sglang):
                raise UnkeyableError("template", str(error)) from error
            try:
                text = template.render(given.messages, tools=second_try(given.tools, dialect.tools), kwargs=given.kwargs)
            except PromptError as again:
                raise UnkeyableError("template", str(again)) from again
        return PromptText(text=text, add_special_tokens=given.add_special_tokens, continuation=given.continuation, cache_salt=salt)

    def _completion(self, body: Mapping[str, Any], dialect: Dialect) -> PromptText:
        prompt = self._plain(body.get("prompt"), "prompt", cache_salt_of(body))
        if dialect.engine == "vllm":
            vllm_chat.refuse_unknowable(body)
            if body.get("prompt_embeds") is not None:
                raise UnkeyableError("media", "the prompt is given as embeddings, too")
            if body.get("add_special_tokens") is False:
                return prompt._replace(add_special_tokens=False)
        return prompt

    def _responses(self, body: Mapping[str, Any], head_chars: int, dialect: Dialect) -> PromptText:
        template = self._tokenizer.chat if self._tokenizer is not None else None
        if template is not None and template.is_harmony:
            raise UnkeyableError("template", "the engine writes this prompt without the chat template (harmony)")
        try:
            chat = as_chat(body, lambda: template is not None and template.takes_inline_system)
        except (TypeError, KeyError) as error:
            raise malformed("a field of the input has another type than it may") from error
        return self._chat(chat, head_chars, dialect)

    def _generate(self, body: Mapping[str, Any]) -> PromptText:
        if any(body.get(field) for field in ("image_data", "video_data", "audio_data", "input_embeds")):
            raise UnkeyableError("media", "the engine makes token ids of its own for media and embeddings")
        if body.get("session_params"):
            raise UnkeyableError("session", "the engine puts the session's earlier turns before this prompt")
        field = "text" if body.get("text") is not None else "input_ids"
        return self._plain(body.get(field), field, cache_salt_of(body))

    def _plain(self, prompt: object, field: str, salt: str) -> PromptText:
        """Return a prompt that is text or token ids, or a list of one of either; text gets the special tokens."""
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if not prompt:
            raise malformed(f"{field} must not be empty")
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise UnkeyableError("no_tokenizer", "no tokenizer is loaded for this model")
            return PromptText(text=prompt, add_special_tokens=True, cache_salt=salt)
        if isinstance(prompt, list):
            if isinstance(prompt[0], str | list):
                raise UnkeyableError("several_prompts", f"{field} holds {len(prompt)} prompts")
            if isinstance(prompt[0], dict):
                raise UnkeyableError("media", f"{field} holds objects of text and media")
            if isinstance(prompt[0], int):
                return PromptText(token_ids=prompt, cache_salt=salt)
        raise malformed(f"{field} must be a string or an array of token ids")


def given_of(body: Mapping[str, Any], template: ChatTemplate, dialect: Dialect) -> ChatInput:
    """Return what the template gets for a chat body from workers of this dialect; raises UnkeyableError."""
    if dialect.engine == "vllm":
        return vllm_chat.chat_input(body, template.format_for("vllm"))
    return chat_input(body, template.content_format, dialect)


def text_of_chat(template: ChatTemplate, given: ChatInput) -> str:
    """Return the prompt text; raises PromptError when the template refuses the conversation."""
    return template.render(
        given.messages,
        tools=given.tools,
        kwargs=given.kwargs,
        add_generation_prompt=given.add_generation_prompt,
        continue_final_message=given.continues,
    )


def _head(template: ChatTemplate, given: ChatInput, head_chars: int, salt: str) -> PromptText:
    """Return a prompt whose text is rendered only as far as it is wanted at first. Without tools there is no second try."""
    text = ""
    try:
        parts = template.parts(given.messages, kwargs=given.kwargs)
        for part in parts:
            text += part
            if len(text) >= head_chars:
                break
        else:
            return PromptText(text=text, continuation=given.continuation, cache_salt=salt)
    except Exception as error:  # a template can raise anything
        raise UnkeyableError("template", f"the chat template refuses the conversation: {error}") from error

    def rest() -> str:
        try:
            return "".join(parts)
        except Exception as error:
            raise PromptError(f"the chat template refuses the conversation: {error}") from error

    contents = (message["content"] for message in given.messages)
    chars = sum(len(content) if isinstance(content, str) else sum(len(item.get("text", "")) for item in content) for content in contents)
    return PromptText(text=text, continuation=given.continuation, cache_salt=salt, rest=rest, rest_chars=max(0, chars - len(text)))


def cache_salt_of(body: Mapping[str, Any]) -> str:
    """Return the request's cache salt, "" for none."""
    salt = body.get("cache_salt")
    if isinstance(salt, list) and len(salt) == 1:
        salt = salt[0]
    if salt is None:
        return ""
    if not isinstance(salt, str):
        raise malformed("cache_salt must be a string")
    return salt
