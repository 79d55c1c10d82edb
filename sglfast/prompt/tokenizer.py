"""A model's tokenizer folder -> token ids, exactly as the engine's Hugging Face tokenizer makes them.

Runs in: shard, simulator, load generator; also in control, to check the folder before anything starts.

Contract: `load_tokenizer` reads `tokenizer.json` (needed), `tokenizer_config.json` and `chat_template.jinja` (both may be
    missing) and raises ConfigError for what cannot work. A Tokenizer never changes after it is built: any thread may use
    it, and `encode` releases the GIL while it works.

Why not `transformers`: it costs seconds of start and hundreds of megabytes in every shard, for rules that fit here. They
    are those of its generic fast tokenizer (version 5): `tokenizer.json` decides, tokens that only `tokenizer_config.json`
    names are added; its Llama class marks the beginning of a text in its own way; and SGLang 0.5.23 gives classes of the Llama
    family their BOS back (srt/utils/hf_transformers).
    tests/test_prompt_tokenizer.py compares with transformers.
"""

import json
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from tokenizers import AddedToken, models, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from sglfast.errors import ConfigError, PromptError
from sglfast.prompt.scripts import scripts_of
from sglfast.prompt.template import ChatTemplate
from sglfast.prompt.word_patterns import word_pattern_of

DEMO_TOKENIZER_PATH: str = str(Path(__file__).parent / "demo_tokenizer")

# The token names that Hugging Face knows, in its order; templates see those that are set.
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# For these classes `add_bos_token` of the config counts (default: true), whatever tokenizer.json puts around a text.
BOS_FLAG_CLASSES = frozenset(f"{family}Tokenizer{suffix}" for family in ("Llama", "CodeLlama", "Gemma") for suffix in ("", "Fast")) | {
    "CohereTokenizerFast"
}
# Their marks of a beginning are those of the class; whether `legacy` of the config counts.
LLAMA_CLASSES = {f"{family}Tokenizer{suffix}": family == "Llama" for family in ("Llama", "CodeLlama") for suffix in ("", "Fast")}
# How byte-level tokenizers write the bytes in their vocabulary: printable Latin-1 as it is, the others from U+0100 on.
_AS_THEY_ARE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _AS_THEY_ARE]
_BYTE_OF = {byte: byte for byte in _AS_THEY_ARE} | {256 + place: byte for place, byte in enumerate(_OTHERS)}
_WRITTEN = {byte: chr(code) for code, byte in _BYTE_OF.items()}
_NO_TOKEN = 2**32 - 1
# A letter and what stands for a space in a vocabulary: of bytes, of SentencePiece, of none.
_SPANNING = re.compile("[A-Za-z][Ġ▁ ]")
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Merges(NamedTuple):
    """A model of byte-pair encoding, as a WordTable wants it (sglfast/_wordtable.pyi).

    joins: of each token that is a part of a character at its begin or end, the rank of the first merge by which it joins bytes outside
    of it that are no ASCII; 2^32 - 1 of all others. whole: texts that are one token if they are a whole word, whatever the merges say,
    with its id.
    """

    letters: "array[int]"
    merges: "array[int]"
    joins: "array[int]"
    whole: dict[str, int]


class Tokenizer:
    """Text to token ids and back, with the chat template that belongs to the model.

    chat: the template, None when the folder has none; special_tokens: name -> text, such as {"eos_token": "<|im_end|>"};
    bos_token_id: None when the model has no BOS; vocab_size: added tokens included.
    """

    __slots__ = ("_rust", "bos_token_id", "chat", "special_tokens", "vocab_size")

    def __init__(self, rust: RustTokenizer, chat: ChatTemplate | None, special_tokens: Mapping[str, str]) -> None:
        self._rust = rust
        self.chat = chat
        self.special_tokens = dict(special_tokens)
        self.bos_token_id: int | None = rust.token_to_id(special_tokens["bos_token"]) if "bos_token" in special_tokens else None
        self.vocab_size: int = rust.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`; `add_special_tokens` adds what the model's post-processor puts around it.

        Raises PromptError for a text at which the library panics, TypeError for one that is no Unicode.
        """
        try:
            # The batch call is a third faster than `encode`: it keeps no character offsets.
            encoding = self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except BaseException as error:
            raise _without_panic(error) from None
        ids: list[int] = encoding.ids
        return ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text by itself, without special tokens; raises as `encode`."""
        try:
            return [encoding.ids for encoding in self._rust.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:
            raise _without_panic(error) from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of `token_ids`; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        text: str = self._rust.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    @property
    def has_pre_tokenizer(self) -> bool:
        """Whether text is cut into words before it is tokenized; without it a token may span any two characters."""
        return self._rust.pre_tokenizer is not None

    @property
    def normalized_growth(self) -> int:
        """UTF-8 bytes that normalizing makes of one at most; 0 = unknown. No token holds less than a byte of normalized text."""
        match self._normalizers():
            case []:
                return 1
            case ["NFC"]:
                return 3  # UAX #15, table 6
        return 0

    def _normalizers(self) -> list[str]:
        """What is done to a text before it is cut, step by step."""
        if self._rust.normalizer is None:
            return []
        state = json.loads(self._rust.normalizer.__getstate__())
        steps = state["normalizers"] if state["type"] == "Sequence" else [state]
        return [step["type"] for step in steps]

    @property
    def word_pattern(self) -> int | None:
        """How text is cut into words, when that is one of the patterns of _wordtable and nothing else is done to it but NFC; else None."""
        if self._rust.pre_tokenizer is None or self.normalized_growth == 0:
            return None
        return word_pattern_of(json.loads(self._rust.pre_tokenizer.__getstate__()))

    def scripts(self) -> bytes | None:
        """What each character is to a tokenizer with a `word_pattern` (prompt/scripts.py)."""
        pattern = self.word_pattern
        return None if pattern is None else scripts_of(pattern, bool(self._normalizers()))

    def merges(self) -> Merges | None:
        """The model of a tokenizer that has a `word_pattern`, when what it does inside of a word is to merge and nothing else."""
        if not isinstance(self._rust.model, models.BPE):
            return None
        model = orjson.loads(self._rust.model.__getstate__())
        if any(model.get(field) for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
            return None
        vocab = model["vocab"]
        letters = array("I", (vocab.get(_WRITTEN[byte], _NO_TOKEN) for byte in range(256)))
        pairs = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]]
        merges = array("I", bytes(12 * len(pairs)))
        lefts, rights = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        for place, texts in enumerate((lefts, rights, map(str.__add__, lefts, rights))):
            merges[place::3] = array("I", map(vocab.__getitem__, texts))
        whole: dict[str, int] = {}
        if model.get("ignore_merges"):
            whole = {text: token_id for entry, token_id in vocab.items() if (text := _text_of(entry)) is not None}
        return Merges(letters, merges, _joins(vocab, pairs), whole)

    def first_words(self, count: int) -> list[str]:
        """Return the texts of the first `count` entries of the vocabulary, which are the most frequent where merges are learned."""
        size = min(count, self._rust.get_vocab_size(with_added_tokens=False))
        return [text for text in self._rust.decode_batch([[token_id] for token_id in range(size)]) if text.isascii()]

    def added_tokens(self) -> dict[str, bool]:
        """Texts that are taken out before all else -> whether the token stands alone: strips no spaces, needs no word border.

        Those that are looked for in the normalized text stand alone where nothing is normalized and none of the others, which are
        taken out before them, may begin inside.
        """
        tokens = self._rust.get_added_tokens_decoder().values()
        firsts = {token.content for token in tokens if not token.normalized}
        begins = {text[:size] for text in firsts for size in range(1, len(text) + 1)}
        is_normalizing = bool(self._normalizers())

        def is_late(text: str) -> bool:
            return (
                is_normalizing
                or any(text[at:] in begins for at in range(1, len(text)))
                or any(text[at:end] in firsts for at in range(len(text)) for end in range(at + 1, len(text) + 1))
            )

        return {
            token.content: not (token.lstrip or token.rstrip or token.single_word or (token.normalized and is_late(token.content)))
            for token in tokens
        }

    @property
    def takes_spaces(self) -> bool:
        """Whether an added token takes a space that stands behind an ASCII letter: it holds one, or ends in a letter and strips."""
        tokens = self._rust.get_added_tokens_decoder().values()
        return any(re.search("[A-Za-z] ", token.content) or (token.rstrip and re.search("[A-Za-z]$", token.content)) for token in tokens)

    def spanning_entries(self, count: int) -> list[str]:
        """Texts with at most `count` entries of the vocabulary that hold a space behind an ASCII letter, from all parts of it."""
        names = sorted(name for name in self._rust.get_vocab(with_added_tokens=False) if _SPANNING.search(name))
        texts = (re.sub("[Ġ▁]", " ", name) for name in names[:: len(names) // count + 1])
        return [text + "a" if text.endswith(" ") else text for text in texts]

    def plain_words(self) -> list[str]:
        """Return every lowercase ASCII word w of two or more letters whose " w" is an entry of the vocabulary, sorted."""
        entries = (self._rust.decode([token_id]) for token_id in range(self._rust.get_vocab_size(with_added_tokens=False)))
        return sorted({entry[1:] for entry in entries if re.fullmatch(" [a-z]{2,}", entry)})


def _text_of(entry: str) -> str | None:
    """The text of a byte-level tokenizer's entry; None when it is not one by itself."""
    codes = entry.translate(_BYTE_OF)
    if codes.isascii():
        return codes
    try:
        return codes.encode("latin-1").decode()
    except UnicodeError:
        return None


def _joins(vocab: dict[str, int], pairs: list[list[str]]) -> "array[int]":
    """Merges.joins of a byte-level model: a merge counts where it joins bytes across a border between two characters."""
    joins = array("I", [_NO_TOKEN]) * (max(vocab.values(), default=0) + 1)
    broken = {entry for entry in vocab if not entry.isascii() and ((text := _text_of(entry)) is None or len(text) == 1)}
    for rank, (left, right) in enumerate(pairs):
        if left not in broken and right not in broken:
            continue
        outer, inner = _BYTE_OF.get(ord(left[-1]), 0), _BYTE_OF.get(ord(right[0]), 0)
        if inner & 0xC0 == 0x80 or outer < 0x80 or inner < 0x80:
            continue  # inside of a character, or beside ASCII
        for entry in (left, right):
            if entry in broken:
                joins[vocab[entry]] = min(joins[vocab[entry]], rank)
    return joins


def _without_panic(error: BaseException) -> BaseException:
    """The error to raise: a panic of the library, which no `except Exception` would stop, becomes a refusal of this one prompt."""
    if type(error).__name__ != "PanicException":
        return error
    return PromptError(f"the tokenizer library failed on this text: {error}")


def load_tokenizer(path: str, chat_template: str | None = None) -> Tokenizer:
    """Read a tokenizer. `path`: a folder with `tokenizer.json`, or that file itself (then its folder is read too).

    chat_template: file with the template to use instead of the folder's own.

    Raises ConfigError: nothing there, broken JSON, a file that the `tokenizers` library refuses, a broken chat template.
    """
    given = Path(path)
    file = given / "tokenizer.json" if given.is_dir() else given
    if not file.is_file():
        raise ConfigError(f"tokenizer path {path!r}: {file} is not a file; give a folder that holds tokenizer.json, or that file")
    # One shard is one core: the library's own thread pool would only take time from the other shards.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        rust = RustTokenizer.from_buffer(file.read_bytes())
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"tokenizer file {file}: not a tokenizer.json of Hugging Face `tokenizers`: {error}") from error
    config = _read_config(file.parent / "tokenizer_config.json")
    if rust.padding is not None:
        config.setdefault("pad_token", rust.padding["pad_token"])
    # The engine asks for neither, whatever the file says.
    rust.no_padding()
    rust.no_truncation()
    special_tokens = {name: text for name in SPECIAL_TOKEN_NAMES if (text := _token_text(config.get(name))) is not None}
    _set_llama_marks(rust, config)
    _add_tokens(rust, config, special_tokens)
    _set_post_processor(rust, config, special_tokens)
    return Tokenizer(rust, _read_template(file.parent, config, special_tokens, chat_template), special_tokens)


def single_token_words(tokenizer: Tokenizer) -> list[str]:
    """Return the words w, sorted, for which " w" is one token and " w v" is two for every other v of the list.

    Joining n of them with a leading space each gives exactly n tokens: what a load generator needs to write a prompt of a
    given length. Holds for tokenizers that split text before spaces, as all byte-level BPE ones do; checked here on the
    whole list at once, in both directions.
    """
    words = [word for word in tokenizer.plain_words() if len(tokenizer.encode(" " + word, False)) == 1]
    ids = [tokenizer.encode(" " + word, False)[0] for word in words]
    for step in (1, -1):
        if tokenizer.encode("".join(" " + word for word in words[::step]), False) != ids[::step]:
            raise ConfigError("this tokenizer merges words across spaces: no prompt of an exact length can be written")
    return words


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"tokenizer file {file}: broken JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"tokenizer file {file}: must be a JSON object, is a {type(config).__name__}")
    return config


def _token_text(value: object) -> str | None:
    """Return the text of a token that is written as a string or as {"content": ..., flags}; None when it is not set."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _added_token(value: object, special: bool) -> AddedToken | None:
    text = _token_text(value)
    if text is None:
        return None
    flags = {"special": special}
    if isinstance(value, dict):
        flags.update((flag, bool(value[flag])) for flag in ADDED_TOKEN_FLAGS if flag in value)
    return AddedToken(text, **flags)


def _add_tokens(rust: RustTokenizer, config: dict[str, Any], special_tokens: Mapping[str, str]) -> None:
    """Add the tokens that only tokenizer_config.json knows, in the order in which transformers adds them."""
    by_id = config.get("added_tokens_decoder")
    if isinstance(by_id, dict) and all(token_id.isdecimal() for token_id in by_id):
        known = {repr(token) for token in rust.get_added_tokens_decoder().values()}
        tokens = (_added_token(by_id[token_id], False) for token_id in sorted(by_id, key=int))
        rust.add_tokens([token for token in tokens if token is not None and repr(token) not in known])
    named: list[object] = [config[name] for name in special_tokens]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        extra = config.get(key)
        if isinstance(extra, list):
            named.extend(extra)
    # One that is an ordinary entry of the vocabulary keeps its id, but from now on is never split or merged.
    added = {token.content for token in rust.get_added_tokens_decoder().values()}
    wanted = (_added_token(value, True) for value in named)
    rust.add_special_tokens([token for token in wanted if token is not None and token.content not in added])


def _set_llama_marks(rust: RustTokenizer, config: dict[str, Any]) -> None:
    """Make a SentencePiece tokenizer of a Llama class mark beginnings as that class does.

    The class (transformers 5, tokenization_llama.py) builds its own pre-tokenizer, where older versions took the normalizer of
    tokenizer.json: behind a special token there is no mark any more, unless `legacy` is set. Byte-level tokenizers under that name
    keep theirs (SGLang sees to it).
    """
    has_legacy = LLAMA_CLASSES.get(str(config.get("tokenizer_class")))
    cutter = rust.pre_tokenizer
    if has_legacy is None or not isinstance(rust.model, models.BPE) or not (cutter is None or isinstance(cutter, pre_tokenizers.Metaspace)):
        return
    is_everywhere = has_legacy and config.get("legacy")
    scheme = "never" if config.get("add_prefix_space") is False else "always" if is_everywhere else "first"
    rust.normalizer = None
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)


def _set_post_processor(rust: RustTokenizer, config: dict[str, Any], special_tokens: Mapping[str, str]) -> None:
    """Make a tokenizer of a BOS_FLAG_CLASSES class put its BOS before a text, unless the config says it must not."""
    bos = special_tokens.get("bos_token")
    if bos is None or config.get("tokenizer_class") not in BOS_FLAG_CLASSES or config.get("add_bos_token") is False:
        return
    rust.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, rust.token_to_id(bos))])


def _read_template(folder: Path, config: dict[str, Any], special_tokens: Mapping[str, str], named: str | None) -> ChatTemplate | None:
    """Build the chat template: the file `named`, else chat_template.jinja, else `chat_template` of the config, which may hold several."""
    file = folder / "chat_template.jinja" if named is None else Path(named)
    if named is not None or file.is_file():
        try:
            return ChatTemplate(file.read_text("utf-8"), special_tokens)
        except OSError as error:
            raise ConfigError(f"chat template {file}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"chat template {file}: must be UTF-8: {error}") from error
    source = config.get("chat_template")
    if source is None:
        return None
    if isinstance(source, str):
        return ChatTemplate(source, special_tokens)
    where = f"tokenizer file {folder / 'tokenizer_config.json'}: chat_template"
    if not isinstance(source, list):
        raise ConfigError(f"{where} must be a string or a list of named templates, is a {type(source).__name__}")
    entries = [entry for entry in source if isinstance(entry, dict)]
    templates = [entry["template"] for entry in entries if isinstance(entry.get("template"), str)]
    if not templates:
        raise ConfigError(f"{where} is a list without a template; each entry must hold a name and a template")
    # SGLang takes the first one whatever the request holds (transformers would take "tool_use" for tools).
    return ChatTemplate(templates[0], special_tokens)
