"""Pieces: the ids of a text are the ids of its pieces, for every tokenizer that is cut at all, and the cache stays in its bounds."""

import json
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

from sglfast.prompt.pieces import PIECE_CHARS, PieceCache, PieceTokenizer
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, Tokenizer, load_tokenizer, single_token_words

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    "the quick brown fox jumps over the lazy dog's back",
    "def f(x):\n    return x + 1\n",
    "été à la plage, naïve café",
    "漢字かな交じり文",
] * 20


def build(kind: str, folder: Path) -> Tokenizer:
    """A small real tokenizer of a kind, through the same loader as a model's."""
    specials = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "[UNK]"]
    if kind == "wordpiece":
        rust = RustTokenizer(models.WordPiece(unk_token="[UNK]"))
        rust.normalizer = normalizers.BertNormalizer(lowercase=True)
        rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials)
    elif kind == "unigram":
        rust = RustTokenizer(models.Unigram())
        rust.pre_tokenizer = pre_tokenizers.Metaspace()
        rust.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=specials, unk_token="[UNK]")
    elif kind == "llama2":  # a marker before every text, no pre-tokenizer: must be taken whole
        rust = RustTokenizer(models.BPE(unk_token="[UNK]", byte_fallback=True))
        rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials)
    else:
        rust = RustTokenizer(models.BPE())
        rust.normalizer = normalizers.NFC()
        rust.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    rust.train_from_iterator(CORPUS, trainer)
    rust.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "tokenizer_class": "LlamaTokenizerFast"}))
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    kinds = ("byte_level", "wordpiece", "unigram", "llama2")
    return {"demo": load_tokenizer(DEMO_TOKENIZER_PATH)} | {kind: build(kind, tmp_path_factory.mktemp(kind)) for kind in kinds}


def test_cutting_is_used_where_the_tokenizer_allows_it(tokenizers: dict[str, Tokenizer]) -> None:
    is_cutting = {kind: PieceTokenizer(tokenizer, 1 << 20).is_cutting for kind, tokenizer in tokenizers.items()}
    assert is_cutting["demo"]
    assert is_cutting["byte_level"]
    assert not is_cutting["llama2"]


word = st.text(alphabet="abcDEF'éß漢0 .\n\t🙂\u0301<|>_-", max_size=12)
part = st.one_of(
    word, st.sampled_from(["<|im_end|>\n", "<|im_start|>user\n", "<s>", "</s>", "the quick brown fox ", "x = f(y)\n", "a" * 300])
)


@settings(max_examples=60)
@given(parts=st.lists(part, min_size=1, max_size=30), times=st.integers(1, 60), special=st.booleans())
def test_ids_equal_those_of_the_whole_text(tokenizers: dict[str, Tokenizer], parts: list[str], times: int, special: bool) -> None:
    text = "".join(parts) * times
    for kind, tokenizer in tokenizers.items():
        pieces = PieceTokenizer(tokenizer, 1 << 20)
        if pieces.is_cutting:
            assert "".join(pieces.cut(text)) == text
        expected = tokenizer.encode(text, special)
        assert list(pieces.encode(text, special)) == expected, kind
        assert list(pieces.encode(text, special)) == expected, kind  # from the cache


def test_texts_that_begin_alike_share_their_pieces(tokenizers: dict[str, Tokenizer]) -> None:
    pieces = PieceTokenizer(tokenizers["demo"], 1 << 20)
    words = single_token_words(tokenizers["demo"])
    text = " " + " ".join(words * 3)
    pieces.encode(text, False)
    misses = pieces.cache.misses
    pieces.encode(text + " and one more sentence", False)
    assert misses > 10
    assert pieces.cache.misses - misses <= 2
    first, second = pieces.cut(text), pieces.cut(text + " and")
    assert first[:-1] == second[: len(first) - 1]


def test_a_message_border_is_a_cut(tokenizers: dict[str, Tokenizer]) -> None:
    pieces = PieceTokenizer(tokenizers["demo"], 1 << 20)
    turn = "<|im_start|>user\n" + "hello there " * 40 + "<|im_end|>"
    cut = pieces.cut(turn * 5)
    assert all(piece.endswith("<|im_end|>") for piece in cut)
    assert max(map(len, cut)) <= PIECE_CHARS + len(turn)


def test_a_long_run_without_a_place_to_cut_stays_whole(tokenizers: dict[str, Tokenizer]) -> None:
    pieces = PieceTokenizer(tokenizers["demo"], 1 << 20)
    text = "漢" * (3 * PIECE_CHARS)
    assert pieces.cut(text) == [text]
    assert list(pieces.encode(text, False)) == tokenizers["demo"].encode(text, False)


def test_the_cache_is_bounded_and_drops_the_least_recently_used() -> None:
    cache = PieceCache(limit_bytes=3000)
    for i in range(100):
        cache.put(f"{i:0100d}", array("I", range(10)))
        assert cache.get(f"{0:0100d}") is not None or i == 0  # kept alive by use
        assert cache.size_bytes <= 3000
    assert cache.get(f"{1:0100d}") is None
    assert cache.get(f"{99:0100d}") is not None
    cache.put("x" * 10_000, array("I"))  # larger than all: not kept, nothing breaks
    assert cache.size_bytes <= 3000
