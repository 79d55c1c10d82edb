"""Pieces: the ids of a text are the ids of its pieces, for every tokenizer that is cut at all, and the cache stays in its bounds."""

import json
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import all_kinds
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from unicode_texts import cjk_texts, unicode_texts

from sglfast.errors import PromptError
from sglfast.prompt import pieces as pieces_module
from sglfast.prompt.pieces import PIECE_CHARS, PieceCache, PieceTokenizer, clean_tokens
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, Tokenizer, load_tokenizer, single_token_words


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return all_kinds(tmp_path_factory.mktemp("tokenizers"))


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
@given(parts=st.lists(part | cjk_texts | unicode_texts, min_size=1, max_size=30), times=st.integers(1, 60), special=st.booleans())
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
    for times in (1, 5, 60):
        text = turn * times
        borders = {at for at in range(len(text) + 1) if text.endswith("<|im_end|>", 0, at)}
        assert borders <= set(pieces.ends(text))
        assert max(map(len, pieces.cut(text))) <= 1.5 * PIECE_CHARS
    assert pieces.border == "<|im_end|>"
    assert pieces.last_borders(turn * 5, 2) == [len(turn), 4 * len(turn), 5 * len(turn)]
    assert pieces.last_borders(turn * 2, 8) == [len(turn), 2 * len(turn)]


def test_pieces_begin_short_and_start_again_behind_a_known_beginning(tokenizers: dict[str, Tokenizer]) -> None:
    pieces = PieceTokenizer(tokenizers["demo"], 1 << 20)
    text = "hello there " * 4000
    sizes = [len(piece) for piece in pieces.cut(text)]
    assert max(sizes[:2]) < 270
    assert max(sizes) >= PIECE_CHARS
    assert next(pieces.ends(text, sum(sizes[:20]))) - sum(sizes[:20]) < 270
    middle = len(text) // 2 + 3  # in the middle of a word, so no cut of its own
    assert middle in pieces.ends(text, 0, [middle])


def test_a_token_that_overlaps_another_is_no_border(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(DEMO_TOKENIZER_PATH) / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for extra, border in (["<|other|>"], "<|im_end|>"), (["x<|im_e"], ""), (["<|im_end|>x"], ""):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"additional_special_tokens": extra}))
        assert PieceTokenizer(load_tokenizer(str(tmp_path)), 1 << 20).border == border


def with_tokens(folder: Path, *added: AddedToken, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """The demo tokenizer with more added tokens."""
    rust = RustTokenizer.from_file(f"{DEMO_TOKENIZER_PATH}/tokenizer.json")
    rust.add_tokens(list(added))
    if normalizer is not None:
        rust.normalizer = normalizer
    rust.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_bytes((Path(DEMO_TOKENIZER_PATH) / "tokenizer_config.json").read_bytes())
    return load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("added", "text"),
    [
        # The longer one strips, so it is no place to cut; nor is the shorter one that it holds.
        ([AddedToken("<a>"), AddedToken("<a>b", rstrip=True)], "<a>b   x"),
        ([AddedToken("a  "), AddedToken("  ")], "a    x"),
        ([AddedToken("  ")], "a     b"),  # stands twice in three spaces
        ([AddedToken("\n\n")], "a\n\n\n\n\nb"),
        ([AddedToken("<a>"), AddedToken("b<a")], "b<a>c"),
        ([AddedToken("\n\n"), AddedToken("<u>", rstrip=True)], "<u>\n\n\n b"),
        # The space that a piece would begin with belongs to the word before it.
        ([AddedToken("the ")], "in the house"),
        ([AddedToken("tool", rstrip=True)], "a tool box"),
    ],
)
def test_added_tokens_that_reach_over_a_cut(added: list[AddedToken], text: str, tmp_path: Path) -> None:
    tokenizer = with_tokens(tmp_path, *added)
    for before in range(40, 400):
        long = "x " * (before // 2) + "x" * (before % 2) + " " + text * 40
        pieces = PieceTokenizer(tokenizer, 1 << 20)
        assert list(pieces.encode(long, False)) == tokenizer.encode(long, False), before


@pytest.mark.parametrize(
    ("added", "normalizer", "text"),
    [
        # What is looked for in the normalized text may be no token there, or have gone to one that is looked for before.
        ([AddedToken("<a>", normalized=True)], normalizers.NFC(), "x <a>\u0338 y"),
        ([AddedToken("<tool>", normalized=True), AddedToken(">>", normalized=False)], None, "x <tool>>y"),
        ([AddedToken("<tool>", normalized=True), AddedToken("oo", normalized=False)], None, "x <tool>y"),
    ],
)
def test_tokens_of_the_normalized_text(
    added: list[AddedToken], normalizer: normalizers.Normalizer | None, text: str, tmp_path: Path
) -> None:
    tokenizer = with_tokens(tmp_path, *added, normalizer=normalizer)
    pieces = PieceTokenizer(tokenizer, 1 << 20)
    assert not pieces.has_words
    for long in (text, text * 200, "x" * 300 + text):
        assert list(pieces.encode(long, False)) == tokenizer.encode(long, False)


def test_tokens_that_nothing_overlaps_are_clean() -> None:
    assert clean_tokens(["<|im_start|>", "<|im_end|>"], ["<|im_start|>", "<|im_end|>", "\n\n"]) == ["<|im_start|>", "<|im_end|>"]
    assert clean_tokens(["<1>", "<11>"], ["<1>", "<11>"]) == ["<1>", "<11>"]
    assert clean_tokens(["<a>x", "<a>"], ["<a>x", "<a>"]) == []
    assert clean_tokens(["aba"], ["aba"]) == []
    assert clean_tokens(["<e>"], ["<e>", "x<"]) == []
    assert clean_tokens(["<e>", " <f>"], ["<e>", " <f>"]) == ["<e>"]


def test_tokens_of_several_words_are_never_cut(tmp_path: Path) -> None:
    corpus = ["in the middle of the night at the end of the day", "as a matter of fact it is one of the best"] * 50
    for name, normalizer, cutter in [
        ("bytes", None, pre_tokenizers.Split(Regex("[^\r\n]+|[\r\n]+"), "isolated")),
        ("sentencepiece", normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")),
    ]:
        rust = RustTokenizer(models.BPE())
        if normalizer is not None:
            rust.normalizer = normalizer
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        rust.pre_tokenizer = cutter if normalizer is not None else pre_tokenizers.Sequence([cutter, bytes_of])
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        rust.train_from_iterator(corpus, trainer)
        (tmp_path / name).mkdir()
        rust.save(str(tmp_path / name / "tokenizer.json"))
        tokenizer = load_tokenizer(str(tmp_path / name))
        assert any(" " in text.strip() for text in tokenizer.spanning_entries(1000))
        pieces = PieceTokenizer(tokenizer, 1 << 20)
        text = "one of the best is in the middle of the night " * 60
        assert list(pieces.encode(text, False)) == tokenizer.encode(text, False)
        assert not pieces.is_cutting


def test_entries_that_no_text_reaches_cost_no_cuts(tmp_path: Path) -> None:
    file = json.loads(Path(DEMO_TOKENIZER_PATH, "tokenizer.json").read_text())
    file["model"]["vocab"]["ofĠtheĠ"] = max(file["model"]["vocab"].values()) + 1000
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.spanning_entries(10) == ["of the a"]
    assert PieceTokenizer(tokenizer, 1 << 20).is_cutting


def test_a_tokenizer_that_fails_on_some_texts_is_given_whole_ones(tmp_path: Path) -> None:
    tokenizer = with_tokens(tmp_path, AddedToken(" "), normalizer=normalizers.Strip())
    pieces = PieceTokenizer(tokenizer, 1 << 20)
    assert not pieces.is_cutting
    assert list(pieces.encode("word", False)) == tokenizer.encode("word", False)
    with pytest.raises(PromptError, match="the tokenizer library failed on this text"):
        pieces.encode("é  ", False)


def test_the_estimate_learns(tokenizers: dict[str, Tokenizer]) -> None:
    pieces = PieceTokenizer(tokenizers["demo"], 1 << 20)
    assert pieces.tokens_estimate(400) == 100
    text = "漢字かな交じり文 " * 500
    ids = pieces.encode(text, False)
    assert pieces.tokens_estimate(len(text)) == len(ids)
    assert pieces.tokens_estimate(1) >= 1
    assert pieces.tokens_estimate(0) == 0


def test_a_long_run_without_a_place_to_cut_stays_whole(tokenizers: dict[str, Tokenizer]) -> None:
    pieces = PieceTokenizer(tokenizers["demo"], 1 << 20)
    text = "漢" * (3 * PIECE_CHARS)  # a word
    assert pieces.cut(text) == [text]
    assert list(pieces.encode(text, False)) == tokenizers["demo"].encode(text, False)


def test_text_without_spaces_is_cut_at_its_punctuation(tokenizers: dict[str, Tokenizer]) -> None:
    text = "今天天气很好，我们去公园。下雨了！" * 500
    mixed = "한국어 문장을 씁니다 " * 300 + "По-русски тоже есть слова " * 300 + "ひらがなとカタカナ、" * 300
    for kind in ("demo", "byte_level", "deepseek3"):
        pieces = PieceTokenizer(tokenizers[kind], 1 << 20)
        sizes = [len(piece) for piece in pieces.cut(text)]
        assert sizes[0] < 200, "a first piece of dense text is short"
        assert max(sizes) <= 1.5 * PIECE_CHARS
        assert max(map(len, pieces.cut(mixed))) <= 1.5 * PIECE_CHARS
    # Nobody knows where others may be cut.
    for kind in ("unigram", "llama2"):
        assert max(map(len, PieceTokenizer(tokenizers[kind], 1 << 20).cut(text))) == len(text)


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


def test_a_cut_is_found_wherever_stretches_of_the_search_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "_STRETCH_CHARS", 4)
    for at in range(1, 12):
        text = "1" * at + "a b" + "2" * 9
        assert pieces_module._next_cut(pieces_module._CUT, text, 0, len(text)) == at + 1
        assert pieces_module._next_cut(pieces_module._CUT, text, 0, at + 2) == at + 2, "the letter behind it is not in reach"
        assert pieces_module._next_cut(pieces_module._CUT, text, at + 2, len(text)) == len(text)
        text = "1" * at + "字，" + "2" * 9
        assert pieces_module._next_cut(pieces_module._WIDE_CUT, text, 0, len(text)) == at + 1
