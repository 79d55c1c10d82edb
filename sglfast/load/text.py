"""From a trace request to the bytes of an HTTP request: prompt text of an exact number of tokens, spliced into a JSON body.

Runs in: `sglfast replay`, `sglfast demo`.
Contract: a block id always gives the same 512 tokens of text: its words come from a generator seeded with the id, and each
    word is one token of the given tokenizer. The first n words of an id do not depend on n, so a cut block is the beginning
    of the full one.
    Words are ASCII letters and need no JSON escaping: a body is joined from bytes and never passes a JSON encoder, because a run
    of the Mooncake trace is hundreds of megabytes of prompts.
"""

import random
from collections import OrderedDict

import orjson

from sglfast.errors import ConfigError
from sglfast.load.trace import BLOCK_TOKENS, TraceRequest
from sglfast.prompt.tokenizer import Tokenizer, single_token_words

# The shortest words only: about 4.5 bytes a token, as English has. 64 drawn from 1,024 never repeat by chance.
VOCABULARY_WORDS = 1024
MIN_VOCABULARY_WORDS = 64
DEFAULT_CACHE_BYTES = 64 << 20

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions", "generate": "/generate"}


class PromptWriter:
    """Makes prompt text. Keeps the text of full blocks in a least-recently-used cache of at most `cache_bytes`.

    Raises ConfigError when the tokenizer has too few words of one token.
    """

    def __init__(self, tokenizer: Tokenizer, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        words = sorted(single_token_words(tokenizer), key=lambda word: (len(word), word))[:VOCABULARY_WORDS]
        if len(words) < MIN_VOCABULARY_WORDS:
            raise ConfigError(
                f"the tokenizer has {len(words)} words that are one token; prompts of an exact length need {MIN_VOCABULARY_WORDS}"
            )
        self._words = [b" " + word.encode() for word in words]
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._used_bytes = 0

    def block(self, block_id: int, tokens: int = BLOCK_TOKENS) -> bytes:
        """The first `tokens` (1..512) words of a block, each with a space before it."""
        if tokens < BLOCK_TOKENS:  # the end of one prompt: hardly ever asked for again
            return self._make(block_id, tokens)
        text = self._cache.get(block_id)
        if text is not None:
            self._cache.move_to_end(block_id)
            return text
        text = self._make(block_id, BLOCK_TOKENS)
        self._cache[block_id] = text
        self._used_bytes += len(text)
        while self._used_bytes > self._cache_bytes:
            self._used_bytes -= len(self._cache.popitem(last=False)[1])
        return text

    def prompt_parts(self, request: TraceRequest) -> list[bytes]:
        """The prompt of a request as one piece of text a block: `input_length` tokens in all."""
        parts = [self.block(block_id) for block_id in request.hash_ids[:-1]]
        parts.append(self.block(request.hash_ids[-1], request.input_length - BLOCK_TOKENS * len(parts)))
        return parts

    def _make(self, block_id: int, tokens: int) -> bytes:
        return b"".join(random.Random(block_id).choices(self._words, k=tokens))


class RequestWriter:
    """Makes whole HTTP requests (head and body) that ask for a streamed answer with usage and for the router's prediction.

    endpoint: "completions" (the prompt as it is), "chat" (as one user message), "generate" (SGLang's own API).
    max_output_tokens: upper bound of a request's output_length; 0 = none.
    """

    def __init__(self, prompts: PromptWriter, endpoint: str, model: str, host: str, max_output_tokens: int = 0) -> None:
        self._prompts = prompts
        self._max_output_tokens = max_output_tokens
        self._head = (
            f"POST {PATHS[endpoint]} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\naccept: text/event-stream\r\n"
            "x-sglfast-kv: 1\r\ncontent-length: "
        ).encode()
        name = orjson.dumps(model)
        usage = b'"ignore_eos":true,"temperature":0,"stream":true,"stream_options":{"include_usage":true}}'
        if endpoint == "generate":
            self._before = b'{"text":"'
            self._between = b'","stream":true,"sampling_params":{"ignore_eos":true,"temperature":0,"max_new_tokens":'
            self._after = b"}}"
        elif endpoint == "chat":
            self._before = b'{"model":' + name + b',"messages":[{"role":"user","content":"'
            self._between = b'"}],"max_tokens":'
            self._after = b"," + usage
        else:
            self._before = b'{"model":' + name + b',"prompt":"'
            self._between = b'","max_tokens":'
            self._after = b"," + usage

    def request(self, request: TraceRequest) -> bytes:
        """The bytes to send for a request of the trace. An output_length of 0 is sent as 1: engines refuse 0."""
        output_tokens = max(1, request.output_length)
        if self._max_output_tokens:
            output_tokens = min(output_tokens, self._max_output_tokens)
        parts = self._prompts.prompt_parts(request)
        tail = b"%b%d%b" % (self._between, output_tokens, self._after)
        length_bytes = len(self._before) + sum(map(len, parts)) + len(tail)
        return b"".join((self._head, b"%d\r\n\r\n" % length_bytes, self._before, *parts, tail))
