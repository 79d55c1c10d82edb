"""sglfast._wordtable: words against the patterns themselves, ids against a tokenizer, whatever was seen before; bounded memory."""

import threading
import time
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import LLAMA3, O200K, TEKKEN, build
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from sglfast import _wordtable
from sglfast._wordtable import GPT2, QWEN2, WordTable, words_of
from sglfast._wordtable import LLAMA3 as LLAMA3_WORDS
from sglfast.prompt.pieces import PieceTokenizer
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, Tokenizer, load_tokenizer

PATTERNS = {
    GPT2: r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    LLAMA3_WORDS: LLAMA3,
    QWEN2: LLAMA3.replace("{1,3}", ""),
    _wordtable.O200K: O200K,
    _wordtable.TEKKEN: TEKKEN,
}
SPLITS = {kind: pre_tokenizers.Split(Regex(pattern), "isolated") for kind, pattern in PATTERNS.items()}

ASCII = st.one_of(
    st.text(alphabet=[chr(code) for code in range(128)], max_size=40),
    st.lists(
        st.sampled_from([*"' \n\ta._/\x00\x1c", "'s", "'LL", "'v", "re", "  ", "\r\n", "Word", "XMLIs", "12", "3456", "!?"]),
        max_size=25,
    ).map("".join),
)  # fmt: skip


@settings(max_examples=1500)
@given(ASCII, st.sampled_from(sorted(PATTERNS)))
def test_words_are_what_the_pattern_matches(text: str, kind: int) -> None:
    assert words_of(text, kind) == [part for part, _ in SPLITS[kind].pre_tokenize_str(text)]


@pytest.mark.parametrize(("text", "kind"), [("é", GPT2), ("a", -1), ("a", _wordtable.DEEPSEEK3 + 1)])
def test_only_ascii_is_cut_without_a_table_of_scripts(text: str, kind: int) -> None:
    with pytest.raises(ValueError, match="ASCII"):
        words_of(text, kind)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    return [load_tokenizer(DEMO_TOKENIZER_PATH), *(build(kind, tmp_path_factory.mktemp(kind)) for kind in ("byte_level", "o200k"))]


UNICODE = st.lists(
    ASCII | st.text(max_size=6) | st.sampled_from([" the", " words", " été", "naïve", "漢字", " x", "e\u0301", "<s>", "<|im_end|>", "<|"]),
    max_size=8,
)


@settings(max_examples=150)
@given(st.lists(UNICODE.map("".join), min_size=1, max_size=12), st.data())
def test_ids_are_those_of_the_tokenizer(tokenizers: list[Tokenizer], texts: list[str], data: st.DataObject) -> None:
    for tokenizer in tokenizers:
        pattern = tokenizer.word_pattern
        assert pattern is not None
        table = WordTable(
            1 << 16,
            data.draw(st.integers(0, 2**64 - 1)),
            pattern,
            {text: tokenizer.encode(text, False)[0] for text in tokenizer.added_tokens()},
        )
        asked: list[str] = []

        def encode_all(runs: list[str], asked: list[str] = asked, tokenizer: Tokenizer = tokenizer) -> list[list[int]]:
            asked.extend(runs)
            return tokenizer.encode_all(runs)

        for text in texts * 3:
            assert table.encode(text, encode_all) == array("I", tokenizer.encode(text, False))
        asked.clear()
        short = [text for text in texts if text.isascii() and len(text) <= 32]
        for text in short:
            table.encode(text, encode_all)
        assert not asked, "what came three times is known"


@pytest.mark.parametrize("text", ["0\r\n\n0", "0 \n\n0", "0\t\n0", "0  0", "0\n  0", "0\r\n \n0", "'  '", "0\n\n\n 0 \n\n0"])
def test_white_space_before_a_word_that_came_is_cut_as_in_the_whole_text(tokenizers: list[Tokenizer], text: str) -> None:
    """What is new ends inside of it, and at the end of a text white space is one word."""
    for tokenizer in tokenizers:
        pattern = tokenizer.word_pattern
        assert pattern is not None
        for known in words_of(text, pattern):
            table = WordTable(1 << 16, 0, pattern, {})
            table.learn(known, tokenizer.encode(known, False))
            assert table.encode(text, tokenizer.encode_all) == array("I", tokenizer.encode(text, False)), known


@st.composite
def models_of_merges(draw: st.DrawFn) -> Tokenizer:
    """A tokenizer with merges that nobody has learned: in any order, twice, some to tokens that other merges make too."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made, merges = list("abcĠ"), []
    for _ in range(draw(st.integers(0, 25))):
        left, right = draw(st.sampled_from(made)), draw(st.sampled_from(made))
        if len(left + right) <= 12:
            merges.append((left, right))
            made.append(left + right)
    merges = draw(st.permutations(merges))
    alone = draw(st.lists(st.text("abc", min_size=2, max_size=6), max_size=5))  # tokens that no merge makes
    vocab = {text: 7 * place for place, text in enumerate(dict.fromkeys([*letters, *made, *alone]))}
    rust = RustTokenizer(models.BPE(vocab, merges, ignore_merges=draw(st.booleans())))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Tokenizer(rust, None, {})


@settings(max_examples=200, deadline=None)
@given(models_of_merges(), st.lists(st.text("aaabbcc  d\n", max_size=40), min_size=1, max_size=8))
def test_merges_are_those_of_the_tokenizer(tokenizer: Tokenizer, texts: list[str]) -> None:
    model = tokenizer.merges()
    assert model is not None
    table = WordTable(1 << 16, 1, GPT2, {}, model.letters, model.merges)
    asked: list[str] = []

    def encode_all(runs: list[str]) -> list[list[int]]:
        asked.extend(runs)
        return tokenizer.encode_all(runs)

    if not model.whole:
        for text in texts * 3:
            assert table.encode(text, encode_all).tolist() == tokenizer.encode(text, False)
        assert not asked
        for word in {word for text in texts for word in words_of(text, GPT2)}:
            assert table.merged(word) == tokenizer.encode(word, False)
    pieces = PieceTokenizer(tokenizer, 1 << 20)
    assert pieces.has_words
    for text in [*texts, *model.whole] * 2:
        assert pieces.encode(text, False).tolist() == tokenizer.encode(text, False)


def test_a_tokenizer_that_learned_its_merges_is_asked_for_foreign_words_only(tokenizers: list[Tokenizer]) -> None:
    for tokenizer in tokenizers:
        model, pattern = tokenizer.merges(), tokenizer.word_pattern
        assert model is not None
        assert pattern is not None
        table = WordTable(1 << 16, 1, pattern, {}, model.letters, model.merges)
        asked: list[str] = []

        def encode_all(runs: list[str], asked: list[str] = asked, tokenizer: Tokenizer = tokenizer) -> list[list[int]]:
            asked.extend(runs)
            return tokenizer.encode_all(runs)

        text = "Unseen words, 1234 of them:\n\tx\x00\x7f = " + "z" * 40 + " and naïve words"
        for _ in range(3):
            assert table.encode(text, encode_all).tolist() == tokenizer.encode(text, False)
            assert asked == [" naïve"]
            asked.clear()


def test_a_byte_without_a_token_and_a_word_that_is_left_go_to_the_tokenizer() -> None:
    letters = array("I", [2**32 - 1] * 256)
    letters[ord("a")], letters[ord("b")] = 1, 2
    table, tokenizer = WordTable(1 << 16, 1, GPT2, {}, letters, array("I", [1, 2, 5])), Letters()
    assert table.merged("abab") == [5, 5]
    assert [table.merged(word) for word in ("abc", "", "a" * 4097, "é")] == [None] * 4
    assert table.encode("ab,ab", tokenizer).tolist() == [5, ord(","), 5]
    table.leave("abab")
    assert table.encode("abab", tokenizer).tolist() == list(map(ord, "abab"))
    assert tokenizer.asked == [",", "abab"]


@pytest.mark.parametrize(("letters", "merges"), [(255, 3), (256, 4)])
def test_merges_of_another_form_are_refused(letters: int, merges: int) -> None:
    with pytest.raises(ValueError, match="256 ids"):
        WordTable(1 << 16, 1, GPT2, {}, array("I", [0] * letters), array("I", [0] * merges))
    with pytest.raises(ValueError, match="256 ids"):
        WordTable(1 << 16, 1, GPT2, {}, array("Q", [0] * 256), array("I", [0] * 3))


class Letters:
    """A tokenizer whose ids are the characters, one each; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, runs: list[str]) -> list[list[int]]:
        self.asked += runs
        return [list(map(ord, run)) for run in runs]


def test_a_word_is_tokenized_twice_in_its_life() -> None:
    table, letters = WordTable(1 << 16, 1, GPT2, {}), Letters()
    asked = []
    for text in ("one two", "one three", "one two three", "one two three"):
        assert table.encode(text, letters).tolist() == list(map(ord, text))
        asked.append(letters.asked)
        letters.asked = []
    assert asked == [["one two"], ["one", " three"], [" two", " three"], []]


def test_what_is_not_known_goes_together() -> None:
    table, letters = WordTable(1 << 16, 1, GPT2, {}), Letters()
    for word in ("known", " known"):
        table.learn(word, [1, 2])
    text = "some new words known a été and more known x" + "y" * 50 + " known"
    assert table.encode(text, letters).tolist().count(2) == 3
    assert letters.asked == ["some new words", " a été and more", " x" + "y" * 50]


def test_long_words_and_words_of_many_tokens_are_not_kept() -> None:
    table, letters = WordTable(1 << 16, 1, GPT2, {}), Letters()
    table.learn("a" * 33, [1])
    table.learn("many", list(range(33)))
    table.learn("a" * 32, list(range(32)))
    assert table.encode("a" * 33, letters).tolist() == [97] * 33
    assert table.encode("many", letters).tolist() == list(map(ord, "many"))
    assert table.encode("a" * 32, letters).tolist() == list(range(32))


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_the_memory_is_bounded_and_what_is_used_stays(seed: int) -> None:
    table, letters = WordTable(1 << 16, seed, LLAMA3_WORDS, {}), Letters()
    table.learn(" often", [7])
    for number in range(30_000):
        table.learn(f"x{number:x}y".translate(str.maketrans("0123456789", "ghijklmnop")), [number])
        if number % 100 == 0:
            assert table.encode(" often", letters).tolist() == [7]
    assert not letters.asked
    table.encode("xgy", letters)
    assert letters.asked == ["xgy"], "the oldest are gone"


def test_the_longest_token_of_the_first_place_is_taken_out() -> None:
    tokens = {"<a>": 1, "<a>b": 2, "a>": 3, "<b>": 4, "\u2581x": 5, "<a>c": 6, "<": 7}
    table, letters = WordTable(1 << 16, 1, GPT2, tokens), Letters()
    for text, ids in {
        "<a>": [1], "<a>b<a>c<a>d": [2, 6, 1, 100], "a>>": [3, 62], "<<b>": [7, 4], "x\u2581x\u2581": [120, 5, 0x2581], "<a": [7, 97],
        "<a><a>b>": [1, 2, 62], "a<a": [97, 7, 97],

    }.items():  # fmt: skip
        assert table.encode(text, letters).tolist() == ids
    with pytest.raises(ValueError, match="must have a text"):
        WordTable(1 << 16, 1, GPT2, {"": 1})
    with pytest.raises(OverflowError):
        WordTable(1 << 16, 1, GPT2, {"x": -1})


def test_no_text_is_no_tokens() -> None:
    assert WordTable(1 << 16, 1, GPT2, {}).encode("", Letters()) == array("I")


def test_what_the_tokenizer_does_wrong_comes_out() -> None:
    table = WordTable(1 << 16, 1, GPT2, {})

    def failing(runs: list[str]) -> list[list[int]]:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        table.encode("some text", failing)
    with pytest.raises(ValueError, match="1 texts gave 2 lists"):
        table.encode("other words", lambda runs: [[1], [2]])
    with pytest.raises(OverflowError):
        table.encode("third thing", lambda runs: [[-1]])
    with pytest.raises(UnicodeEncodeError):
        table.encode("half \ud800", Letters())
    assert table.encode("some text", Letters()).tolist() == list(map(ord, "some text"))


@pytest.mark.parametrize(("size_bytes", "pattern", "why"), [(1000, 0, "64 KiB"), (1 << 40, 0, "64 KiB"), (1 << 16, 9, "pattern 9")])
def test_limits(size_bytes: int, pattern: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        WordTable(size_bytes, 0, pattern, {})


def test_patterns_of_tokenizers(tmp_path: Path) -> None:
    kinds = {kind: build(kind, _folder(tmp_path, kind)).word_pattern for kind in ("byte_level", "wordpiece", "unigram", "llama2")}
    assert kinds == {"byte_level": LLAMA3_WORDS, "wordpiece": None, "unigram": None, "llama2": None}
    assert load_tokenizer(DEMO_TOKENIZER_PATH).word_pattern == GPT2


def test_other_models_have_no_merges(tmp_path: Path) -> None:
    assert [build(kind, _folder(tmp_path, kind)).merges() for kind in ("wordpiece", "unigram")] == [None, None]
    rust = RustTokenizer(models.BPE({"a": 0, "##a": 1, "aa": 2}, [("a", "##a")], continuing_subword_prefix="##"))
    assert Tokenizer(rust, None, {}).merges() is None


def _folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def test_other_threads_go_on_while_a_long_text_is_encoded() -> None:
    pieces = PieceTokenizer(load_tokenizer(DEMO_TOKENIZER_PATH), 8 << 20)
    text = " ".join(str(number * 7919 % 100_003) for number in range(800_000))  # no place to cut, no word that goes to the tokenizer
    encoding = threading.Thread(target=pieces.encode_piece, args=(text,))
    encoding.start()
    turns = 0
    while encoding.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 5, "the GIL was held from the first word to the last"
