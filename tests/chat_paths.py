"""What a shard does with chat bodies, without its loop, and the plain result beside it; tokenizers with many templates."""

import json
from pathlib import Path
from typing import Any

import orjson
from chat_templates import TEMPLATES
from tokenizer_kinds import build
from tokenizers import Tokenizer as RustTokenizer

from sglfast._blockhash import token_keys
from sglfast.errors import PromptError
from sglfast.prompt.adapters import asked_for, starts_of
from sglfast.prompt.ids import IdsKeying, Keys
from sglfast.prompt.keys import PromptReader, RequestKind
from sglfast.prompt.lazy import Keying, LazyKeyer
from sglfast.prompt.pieces import PieceCache
from sglfast.prompt.prefixes import PrefixCache
from sglfast.prompt.raw import RawReader
from sglfast.prompt.seen import SeenKeying, Turns
from sglfast.prompt.stable import Border
from sglfast.prompt.template import ChatTemplate
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, Tokenizer, load_tokenizer
from sglfast.shm import Dialect, Variant, dialect_of

VARIANTS = [Variant(1), Variant(4, True), Variant(16), Variant(64)]
VLLM_VARIANTS = [variant._replace(dialect=Dialect(engine="vllm")) for variant in VARIANTS]
MARKS = ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|END|>", "</s>", "<s>", "<|end_of_sentence|>"]
NAMES = [
    "demo",
    "chatml",
    "qwen25",
    "qwen3",
    "llama3",
    "mistral",
    "gemma",
    "gemma3",
    "phi3",
    "zephyr",
    "deepseek",
    "stateful",
    "neighbours",
]
NAMES += [
    "command_r",
    "granite",
    "counting_macro",
    "whole_messages",
    "clock",
    "remembered",
    "mistral_tools",
    "thinker",
    "forward",
    "last_by_range",
    "harmony",
    "looks",
]
Body = dict[str, Any]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "dict"}}}


def tokenizers_of(folder: Path) -> dict[str, Tokenizer]:
    """By name of the template: the demo tokenizer, and one of another kind, by turns. `folder` takes their files."""
    (folder / "byte_level").mkdir()
    rust: RustTokenizer = build("byte_level", folder / "byte_level")._rust
    found = {"demo": load_tokenizer(DEMO_TOKENIZER_PATH)}
    for number, name in enumerate(NAMES[1:]):
        (folder / name).mkdir()
        if number % 2:
            (folder / name / "tokenizer.json").write_bytes((Path(DEMO_TOKENIZER_PATH) / "tokenizer.json").read_bytes())
        else:
            rust.save(str(folder / name / "tokenizer.json"))
        (folder / name / "chat_template.jinja").write_text(TEMPLATES[name])
        config = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": MARKS}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config))
        found[name] = load_tokenizer(str(folder / name))
    return found


def behind(border: Border, messages: list[Any]) -> dict[int, Any]:
    """Messages as a Frame wants them: by their place behind a border."""
    return {at - border.at: message for at, message in enumerate(messages)}


def everybody(keys: bytes) -> int:
    return len(keys) // 8


def nobody(keys: bytes) -> int:
    return 0


def plain(tokenizer: Tokenizer, body: bytes, variants: list[Variant] = VARIANTS) -> Keys | None:
    """By the tokenize-everything path; None when there are no keys."""
    reader = PromptReader(tokenizer)
    keys: dict[Variant, bytes] = {}
    try:
        fields = orjson.loads(body)
        prompt = reader.text_of(RequestKind.CHAT, fields, 0, dialect_of(variants))
        ids = reader.tokens_of(prompt)
        salt = prompt.cache_salt
        for variant, start in zip(variants, starts_of(tuple(variants), *asked_for(fields), salt), strict=True):
            size, bigram = variant.block_size, variant.bigram
            keys[variant] = reader.keys_of(ids, size, bigram=bigram, cache_salt=salt)
            if start is not None:
                n_max = len(keys[variant]) // 8
                keys[variant] = token_keys(ids, size, bigram=bigram, max_pages=n_max, seed=start.seed, parent=start.parent)
    except (orjson.JSONDecodeError, PromptError):
        return None
    return Keys(len(ids), False, keys)


class Chats:
    """What a shard does with a chat body, without its loop."""

    def __init__(self, tokenizer: Tokenizer, cache_bytes: int) -> None:
        self.tokenizer = tokenizer
        self.reader = PromptReader(tokenizer)
        self.keyer = LazyKeyer(tokenizer, cache_bytes)
        self.raw = RawReader(self.keyer)

    def forget(self) -> "Chats":
        """As a new one; to make one takes a while."""
        self._forget_text()
        if self.raw._template is not None:
            self.raw._turns = Turns(self.keyer, self.raw._template)
        return self

    def change_template(self, source: str) -> bool:
        """As a new one whose tokenizer has this template; whether it is followed. Raises what ChatTemplate does."""
        self.tokenizer.chat = ChatTemplate(source, {})
        self._forget_text()
        self.reader = PromptReader(self.tokenizer)
        self.raw = RawReader(self.keyer)
        return self.raw._template is not None

    def _forget_text(self) -> None:
        limit = self.keyer.prefixes._limit_bytes
        self.keyer.prefixes = PrefixCache(limit)
        self.keyer.pieces.cache = PieceCache(3 * limit)

    def begin(self, body: bytes, variants: list[Variant], head_chars: int) -> Keying | IdsKeying | SeenKeying | None:
        """None: there are no keys."""
        keying = self.raw.begin(body, variants, head_chars)
        if keying is not None:
            return keying
        try:
            fields = orjson.loads(body)
            prompt = self.reader.text_of(RequestKind.CHAT, fields, head_chars, dialect_of(variants))
            return self.keyer.begin(prompt, variants, asked_for(fields))
        except (orjson.JSONDecodeError, PromptError):
            return None

    def keys(self, body: bytes, variants: list[Variant], probe: Any, head_chars: int = 500, budget_chars: int = 1 << 62) -> Keys | None:
        keying = self.begin(body, variants, head_chars)
        if keying is None:
            return None
        try:
            while not keying.run(probe, budget_chars):
                budget_chars += 10_000
        except PromptError:
            return None
        return keying.keys
