"""sglfast._wordtable with text of any script: words against the patterns themselves, ids against tokenizers."""

from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import DEEPSEEK3, LLAMA3, O200K, TEKKEN, build
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer
from unicode_texts import HAN, MARKS, cjk_texts, unicode_texts

from sglfast import _wordtable
from sglfast._wordtable import FOREIGN, GPT2, QWEN2, SCRIPT_CHARS, WordTable, words_of
from sglfast.prompt.pieces import PieceTokenizer
from sglfast.prompt.scripts import scripts_of
from sglfast.prompt.tokenizer import Tokenizer

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {
    GPT2: (GPT2_WORDS,),
    _wordtable.LLAMA3: (LLAMA3,),
    QWEN2: (LLAMA3.replace("{1,3}", ""),),
    _wordtable.DEEPSEEK3: DEEPSEEK3,
    _wordtable.O200K: (O200K,),
    _wordtable.TEKKEN: (TEKKEN,),
}
SPLITS = {
    kind: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns])
    for kind, patterns in PATTERNS.items()
}


def without_foreign(text: str, table: bytes) -> str:
    return "".join(char for char in text if ord(char) < len(table) and not table[ord(char)] & FOREIGN)


@settings(max_examples=1500)
@given(unicode_texts | cjk_texts, st.sampled_from(sorted(PATTERNS)))
def test_words_are_what_the_patterns_match(text: str, kind: int) -> None:
    table = scripts_of(kind, False)
    text = without_foreign(text, table)
    assert words_of(text, kind, table) == [part for part, _ in SPLITS[kind].pre_tokenize_str(text)]


@pytest.mark.parametrize("kind", sorted(PATTERNS))
def test_all_neighbours_of_all_sorts(kind: int) -> None:
    """Of each sort of character that a pattern tells apart one at least, in all orders of up to four."""
    table = scripts_of(kind, False)
    has_cases = any(byte & _wordtable.FRONT for byte in table)
    told_apart = "asB'1!/\n\r\t \u3000字éǅ\u0301０" if has_cases else "as'1!\n\r\t \u00a0\u3000字ー゛・。０é\u0301\u3099\u3097\u200d\x00😀"
    sorts = without_foreign(told_apart, table)
    for first in sorts:
        for second in sorts:
            # One text for many: what stands between two of them is a letter, a digit or an ideograph, never the same in a row.
            parts = [f"{first}{second}{third}{fourth}" for third in sorts for fourth in sorts]
            for between in ("|", "x", "字"):
                text = between.join(parts)
                assert words_of(text, kind, table) == [part for part, _ in SPLITS[kind].pre_tokenize_str(text)], (first, second, between)
            for part in parts[:: len(sorts) - 1]:
                assert words_of(part, kind, table) == [word for word, _ in SPLITS[kind].pre_tokenize_str(part)]


@pytest.mark.parametrize("kind", sorted(PATTERNS))
def test_each_character_is_cut_from_its_neighbours_as_the_patterns_do_it(kind: int) -> None:
    table = scripts_of(kind, False)
    for begin in range(0, len(table), 256):
        for around in ("a{}b", "字{}字", "、{}1", " {} ", "'{}", "{}'s", "B{}c", "\u0301{}\u200d", "\u0301{}B", "\x00{}\x00"):
            text = without_foreign(
                "|".join(around.format(chr(code)) for code in range(begin, begin + 256) if not 0xD800 <= code < 0xE000), table
            )
            assert words_of(text, kind, table) == [part for part, _ in SPLITS[kind].pre_tokenize_str(text)], (hex(begin), around)


@settings(max_examples=600)
@given(unicode_texts, unicode_texts)
def test_text_without_foreign_characters_is_not_changed_by_nfc(left: str, right: str) -> None:
    table, nfc = scripts_of(QWEN2, True), normalizers.NFC()
    own = without_foreign(left, table)
    assert nfc.normalize_str(own) == own
    # ... and is a border for what stands before it.
    assert nfc.normalize_str(right + own) == nfc.normalize_str(right) + own


def test_most_of_what_people_write_is_not_foreign() -> None:
    for table in (scripts_of(GPT2, False), scripts_of(QWEN2, True)):
        assert len(table) == SCRIPT_CHARS
        assert {
            char for char in HAN + MARKS + "あア한éй🙂\ufe0f\u200d\u3000 a1" if ord(char) >= SCRIPT_CHARS or table[ord(char)] & FOREIGN
        } <= {"𠀋", "豈"}
        assert not any(byte & FOREIGN for byte in table[:128])


@pytest.mark.parametrize(("scripts", "pattern"), [(None, _wordtable.DEEPSEEK3), (bytes(100), GPT2)])
def test_a_table_of_scripts_of_another_size_is_refused(scripts: bytes | None, pattern: int) -> None:
    with pytest.raises(ValueError, match="table of scripts"):
        WordTable(1 << 16, 1, pattern, {}, scripts=scripts)
    with pytest.raises(ValueError, match="table of scripts"):
        words_of("a", pattern, scripts)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    return [build(kind, tmp_path_factory.mktemp(kind)) for kind in ("gpt2", "byte_level", "deepseek3", "o200k", "tekken")]


@settings(max_examples=250, deadline=None)
@given(st.lists(unicode_texts | cjk_texts, min_size=1, max_size=6), st.booleans())
def test_ids_are_those_of_the_tokenizer(tokenizers: list[Tokenizer], texts: list[str], has_merges: bool) -> None:
    for tokenizer in tokenizers:
        pattern, model = tokenizer.word_pattern, tokenizer.merges()
        assert pattern is not None
        assert model is not None
        tokens = {text: tokenizer.encode(text, False)[0] for text in tokenizer.added_tokens()}
        if has_merges:
            table = WordTable(1 << 16, 7, pattern, tokens, model.letters, model.merges, model.joins, tokenizer.scripts())
        else:
            table = WordTable(1 << 16, 7, pattern, tokens, scripts=tokenizer.scripts())
        for text in texts * 3:
            assert table.encode(text, tokenizer.encode_all) == array("I", tokenizer.encode(text, False)), ascii(text)


def test_only_foreign_text_is_asked_for(tokenizers: list[Tokenizer]) -> None:
    for tokenizer in tokenizers:
        pieces = PieceTokenizer(tokenizer, 1 << 20)
        assert pieces.has_words
        asked: list[str] = []
        table = pieces._words
        assert table is not None

        def encode_all(runs: list[str], asked: list[str] = asked, tokenizer: Tokenizer = tokenizer) -> list[list[int]]:
            asked.extend(runs)
            return tokenizer.encode_all(runs)

        text = "今天天气很好，我们去公园。" * 30 + "𠀋也来、" + "한국어 문장 👩\u200d💻 ２０２６年　カタカナ、ひらがな。" * 9
        assert table.encode(text, encode_all).tolist() == tokenizer.encode(text, False)
        assert [len(run) < 20 and "𠀋" in run for run in asked] == [True]


@pytest.mark.parametrize("size", [31, 33, 100, 1365, 1366, 4000])
def test_long_words(tokenizers: list[Tokenizer], size: int) -> None:
    for tokenizer in tokenizers:
        pieces = PieceTokenizer(tokenizer, 1 << 20)
        for text in ("漢" * size, "x" * size, "漢字かな" * (size // 4), "ab" * (3 * size // 2)):
            assert pieces.encode(text, False).tolist() == tokenizer.encode(text, False)


CHARACTERS = "你好，あaé"


@st.composite
def models_of_merges(draw: st.DrawFn) -> Tokenizer:
    """A tokenizer with merges that nobody has learned, of bytes across the borders of characters, too."""
    written = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    text = written.pre_tokenize_str(draw(st.text(CHARACTERS, min_size=2, max_size=30)))[0][0]
    merges = []
    parts = list(text)
    for _ in range(draw(st.integers(0, 60))):
        if len(parts) < 2:
            break
        at = draw(st.integers(0, len(parts) - 2))
        merges.append((parts[at], parts[at + 1]))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if draw(st.booleans()):
            parts = list(text)
            for left, right in merges:
                for place in range(len(parts) - 1):
                    if parts[place : place + 2] == [left, right]:
                        parts[place : place + 2] = [left + right]
                        break
    merges = draw(st.permutations(list(dict.fromkeys(merges)))) if draw(st.booleans()) else merges
    vocab = {entry: 3 * place for place, entry in enumerate(dict.fromkeys([*letters, *(left + right for left, right in merges)]))}
    rust = RustTokenizer(models.BPE(vocab, merges, ignore_merges=draw(st.booleans())))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Tokenizer(rust, None, {})


@settings(max_examples=500, deadline=None)
@given(models_of_merges(), st.lists(st.text(CHARACTERS, max_size=50), min_size=1, max_size=8))
def test_merges_are_those_of_the_tokenizer(tokenizer: Tokenizer, texts: list[str]) -> None:
    model = tokenizer.merges()
    assert model is not None
    table = WordTable(1 << 16, 1, GPT2, {}, model.letters, model.merges, model.joins, tokenizer.scripts())
    if not model.whole:
        for word in {word for text in texts for word in words_of(text, GPT2, tokenizer.scripts())}:
            assert table.merged(word) == tokenizer.encode(word, False), word
    pieces = PieceTokenizer(tokenizer, 1 << 20)
    for text in [*texts, *model.whole] * 2:
        assert pieces.encode(text, False).tolist() == tokenizer.encode(text, False)


def test_a_sign_that_its_neighbour_would_join_too_early_is_no_token_at_first() -> None:
    """The last sign is whole only behind the join of the first two, which so comes before that of the last two."""
    written = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    first, second, third = (written.pre_tokenize_str(sign)[0][0] for sign in "你好我")
    order = [(part[0], part[1]) for part in (first, second)] + [(part[:2], part[2]) for part in (first, second)]
    order += [(third[0], third[1]), (second, third), (first, second), (third[:2], third[2])]
    order = list(dict.fromkeys(order))
    entries = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in order)])
    rust = RustTokenizer(models.BPE({entry: number for number, entry in enumerate(entries)}, order))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = PieceTokenizer(Tokenizer(rust, None, {}), 1 << 20)
    assert pieces.has_words
    assert list(pieces.encode("你好我", False)) == rust.encode("你好我", add_special_tokens=False).ids


def test_a_file_with_line_ends_in_its_pattern_is_known(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    rust = RustTokenizer.from_buffer(build("deepseek3", tmp_path / "a")._rust.to_str().replace(r"\\r\\n", r"\r\n").encode())
    assert Tokenizer(rust, None, {}).word_pattern == _wordtable.DEEPSEEK3


@pytest.mark.parametrize("pattern", [O200K, LLAMA3])
def test_a_file_that_removes_what_is_between_words_is_known(pattern: str) -> None:
    """All text is in words, so nothing is."""
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    rust = RustTokenizer(models.BPE())
    for steps, is_known in (([split], True), ([split, split], False)):
        rust.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        assert (Tokenizer(rust, None, {}).word_pattern is not None) == is_known
    text = "the 'S XMLs' \r\n/ \t １２３4 e\u0301字 x"
    assert split.pre_tokenize_str(text) == pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)
