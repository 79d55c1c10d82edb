"""Text to token ids piece by piece, with a bounded cache of pieces: a conversation pays for its newest message only.

Runs in: shards (the loop and the tokenizer's thread), simulator; any thread may use it.
Theory: a tokenizer first takes added tokens (such as <|im_end|>) out of the text, then cuts the rest into words (pre-tokenizer), and
    merges inside a word only. So the ids of a text are the ids of its pieces, when every cut lies behind an added token that no other
    can overlap, or before a space that stands between two ASCII letters: nearly every word pattern in use ends a word there.
    Of a tokenizer that cuts text by a pattern that is known, the ids of a piece are put together from those of its words
    (cext/wordtable.pyx), which most texts share; a new word is merged there too, so that the tokenizer is asked for little. All of these
    patterns end a word behind a letter that no letter and no mark follows, so text without spaces is cut before its punctuation.
    Cuts depend on the text before them alone, so texts that begin alike are cut alike and share pieces. The first pieces are short:
    most prompts are known, or known to be unknown, after a few hundred characters (prompt/lazy.py).
Contract: `encode` equals the tokenizer's own result, always. Whether a tokenizer keeps the theory is tried once, at construction, with
    texts made to break it, entries of its own vocabulary that would span a cut among them; one that does not (no pre-tokenizer, a
    marker put before every text, tokens of several words) is given whole texts.
"""

from __future__ import annotations

import os
import random
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sglfast._wordtable import WordTable
from sglfast.errors import PromptError
from sglfast.prompt.hard_texts import hard_text, hard_texts

if TYPE_CHECKING:
    from sglfast.prompt.tokenizer import Tokenizer

# The longest pieces: long enough that the cost of a look-up is nothing, short enough that a new message seldom makes an old piece new.
PIECE_CHARS = 2048
# (characters behind the first cut, length of pieces up to there)
_SHORTEST_CHARS = 64  # less is not worth a look-up: short messages go together
FIRST_CHARS = 256
_SIZES = ((512, 256), (2048, 512), (8192, 1024))
# Before anything was tokenized; English prose and code have 3 to 5 with the vocabularies of today.
_CHARS_PER_TOKEN = 4.0
_WORDS_SHARE = 8  # of the cache: for words
_LEAST_WORDS_BYTES = 65536
_FIRST_WORDS = 8192  # entries of the vocabulary that are entered before any text comes
_WORDS_LEFT = 4096  # more words of a vocabulary that no merges lead to would take too many others with them
_CACHED_CHARS = 128  # shorter pieces are as cheap by words as by a look-up
_STATISTICS_CHARS = 1 << 22  # what was learned longer ago counts half
# Without a place to cut for this long, the piece goes on: correctness before size.
_CUT = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
# Of tokenizers with a known word pattern: letters of scripts of today, none of which NFC changes with what may stand behind the cut.
_LETTERS = "A-Za-zÀ-ÖØ-öø-ɏΑ-ΡΣ-ωЁА-яёא-תء-غف-يぁ-ゔァ-ヺ一-龥가-힣"
_WIDE_CUT = re.compile(f"(?<=[{_LETTERS}])(?: (?=[{_LETTERS}])|(?=[，。、！？；：（）「」『』《》【】“”‘’…—]))")
_STRETCH_CHARS = 1 << 16
_SPANNING_TRIED = 256  # entries of the vocabulary


def _next_cut(pattern: re.Pattern[str], text: str, start: int, stop: int) -> int:
    """The first place to cut in text[start:stop], `stop` when there is none. In stretches: a search holds the GIL to its end."""
    while start < stop:
        space = pattern.search(text, start, min(start + _STRETCH_CHARS, stop))
        if space is not None:
            return space.start()
        start += _STRETCH_CHARS - 1  # what stands behind the cut must be seen, too
    return stop


def _first_chars(text: str, start: int, first_chars: int) -> int:
    """Length of a first piece that has about as many tokens as `first_chars` of ASCII: half of it where most is written in signs."""
    least = max(_SHORTEST_CHARS, first_chars // 2)
    is_dense = len(text[start : start + least].encode("utf-8", "surrogatepass")) > 2 * least  # a sign is three bytes long
    return least if is_dense else first_chars


class PieceCache:
    """Least recently used pieces, bounded by the bytes of their texts and ids."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._ids: OrderedDict[str, array[int]] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0

    def get(self, text: str) -> array[int] | None:
        """The ids of a piece, or None."""
        with self._lock:
            ids = self._ids.get(text)
            if ids is None:
                self.misses += 1
                return None
            self.hits += 1
            self._ids.move_to_end(text)
            return ids

    def put(self, text: str, ids: array[int]) -> None:
        """Remember a piece, dropping the least recently used ones when there is no room."""
        with self._lock:
            if text in self._ids:
                return
            self._ids[text] = ids
            self._size_bytes += _cost_bytes(text, ids)
            while self._size_bytes > self._limit_bytes:
                self._size_bytes -= _cost_bytes(*self._ids.popitem(last=False))

    @property
    def size_bytes(self) -> int:
        """Bytes of all texts and ids held now."""
        return self._size_bytes


def _cost_bytes(text: str, ids: array[int]) -> int:
    return 200 + 4 * len(text) + 4 * len(ids)  # 4: a text may hold any character; 200: the objects around them


class PieceTokenizer:
    """A tokenizer that remembers pieces.

    is_cutting: the tokenizer keeps the theory; else every text is one piece. before, after: ids around a text with special tokens;
    border: the added token that ends messages in the chat template, "" for none;
    longest_token: characters of the longest added one. Any thread may use it; what the estimate has learned may then be a little off.
    """

    def __init__(self, tokenizer: Tokenizer, cache_bytes: int) -> None:
        self._tokenizer = tokenizer
        self.cache = PieceCache(cache_bytes - cache_bytes // _WORDS_SHARE)
        bare, dressed = tokenizer.encode("a", False), tokenizer.encode("a", True)
        start = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
        self.before = array("I", dressed[:start])
        self.after = array("I", dressed[start + len(bare) :])
        self._chars = 0
        self._tokens = 0
        added = tokenizer.added_tokens()
        tokens = sorted((text for text, is_alone in added.items() if is_alone and text), key=len, reverse=True)
        clean = clean_tokens(tokens, list(added))
        self._added = _any_of(clean)
        border = _message_end(tokenizer, _any_of(tokens))
        self.longest_token = max(map(len, added), default=0)
        self.border = border if border in clean else ""
        self._words: WordTable | None = None
        self._cut_at = _CUT if tokenizer.word_pattern is None else _WIDE_CUT
        try:
            self.is_cutting = tokenizer.has_pre_tokenizer and not tokenizer.takes_spaces and self._keeps_theory(clean)
        except PromptError:  # the library fails on some texts
            self.is_cutting = False
        if self.is_cutting and all(added.values()):
            self._words = self._word_table(cache_bytes // _WORDS_SHARE, tokens)

    @property
    def has_words(self) -> bool:
        """Whether short texts cost next to nothing, as their words are known."""
        return self._words is not None

    def encode(self, text: str, add_special_tokens: bool) -> array[int]:
        """Token ids of a text. Raises what the tokenizer raises for text that is no Unicode."""
        ids = array("I")
        if add_special_tokens:
            ids += self.before
        for piece in self.cut(text):
            known = self.cache.get(piece)
            ids += self.encode_piece(piece) if known is None else known
        if add_special_tokens:
            ids += self.after
        return ids

    def encode_piece(self, piece: str) -> array[int]:
        """Token ids of a piece that is not in the cache, where it is put."""
        words = self._words
        ids = words.encode(piece, self._tokenizer.encode_all) if words is not None else array("I", self._tokenizer.encode(piece, False))
        if words is None or len(piece) >= _CACHED_CHARS:
            self.cache.put(piece, ids)
        self._chars += len(piece)
        self._tokens += len(ids)
        if self._chars > _STATISTICS_CHARS:
            self._chars //= 2
            self._tokens //= 2
        return ids

    def tokens_estimate(self, chars: int) -> int:
        """Tokens that a text of so many characters probably has, by what was tokenized so far: at least 1 for any text."""
        per_token = self._chars / self._tokens if self._tokens else _CHARS_PER_TOKEN
        return max(1, round(chars / per_token)) if chars else 0

    def cut(self, text: str) -> list[str]:
        """The pieces of a text, in order; joined they are the text."""
        pieces, start = [], 0
        for end in self.ends(text):
            pieces.append(text[start:end])
            start = end
        return pieces

    def ends(
        self, text: str, start: int = 0, borders: Sequence[int] = (), first: int | None = None, first_chars: int = FIRST_CHARS
    ) -> Iterator[int]:
        """Where the pieces of text[start:] end. `start` must be a cut. One pass, whatever stands in the text.

        borders: ascending cuts that end a piece in any case; first: the cut from which pieces grow, `start` if None; first_chars: about the
        length of the piece there.
        """
        for border in borders:
            if start < border:
                yield from self._ends(text, start, border, start if first is None else first, first_chars)
                start, first = border, None
        yield from self._ends(text, start, len(text), start if first is None else first, first_chars)

    def _ends(self, text: str, start: int, size: int, first: int, first_chars: int) -> Iterator[int]:
        border = -1  # end of the first added token behind a piece of at least the shortest length
        while start < size:
            behind = start - first
            if behind:
                piece_chars = next((chars for limit, chars in _SIZES if behind < limit), PIECE_CHARS)
            else:
                piece_chars = first_chars if text.isascii() else _first_chars(text, start, first_chars)
            if size - start <= _SHORTEST_CHARS or not self.is_cutting:
                yield size
                return
            if border < start + _SHORTEST_CHARS:
                token = self._added.search(text, start + _SHORTEST_CHARS, size) if self._added is not None else None
                border = token.end() if token is not None else size
            end = border
            if border - start > piece_chars + piece_chars // 2:
                # No message border in reach: a place between words, looked for before the border only.
                end = _next_cut(self._cut_at, text, start + piece_chars, border)
            yield end
            start = end

    def last_cut(self, text: str, low: int, high: int) -> int:
        """A cut in text[low : high + 1], behind the last added token if one ends there; 0 for none."""
        if self._added is not None:
            ends = [token.end() for token in self._added.finditer(text, max(0, low - self.longest_token), high)]
            if ends and ends[-1] > low:
                return ends[-1]
        cut = _next_cut(self._cut_at, text, low, high)
        return cut if cut < high else 0

    def last_borders(self, text: str, count: int) -> list[int]:
        """Cuts of a text from left to right: ends of the first and of at most `count` last tokens of the kind that ends messages."""
        border = self.border
        found: list[int] = []
        at = len(text)
        if border:
            size = len(border)
            while len(found) < count and (at := text.rfind(border, 0, at)) >= 0:
                found.append(at + size)
            if len(found) == count and (first := text.find(border) + size) < found[-1]:
                found.append(first)
            found.reverse()
        return found

    def _word_table(self, size_bytes: int, tokens: list[str]) -> WordTable | None:
        """The table of words for a tokenizer that can have one, tried with texts made to break it."""
        tokenizer, pattern = self._tokenizer, self._tokenizer.word_pattern
        if pattern is None or size_bytes < _LEAST_WORDS_BYTES:
            return None
        ids_of_tokens = tokenizer.encode_all(tokens)
        if any(len(ids) != 1 for ids in ids_of_tokens):
            return None
        token_ids = {token: ids[0] for token, ids in zip(tokens, ids_of_tokens, strict=True)}
        seed = int.from_bytes(os.urandom(8))
        merges, scripts = tokenizer.merges(), tokenizer.scripts()
        table = None
        if merges is not None:
            table = WordTable(size_bytes, seed, pattern, token_ids, merges.letters, merges.merges, merges.joins, scripts)
            if not _leave_others(table, merges.whole) or not self._keeps_words(table, tokens):
                table = None
        if table is None:
            table = WordTable(size_bytes, seed, pattern, token_ids, scripts=scripts)
            if not self._keeps_words(table, tokens):
                return None
        words = tokenizer.first_words(min(_FIRST_WORDS, size_bytes // 256))
        for word, ids in zip(reversed(words), reversed(tokenizer.encode_all(words)), strict=True):
            table.learn(word, ids)  # the most frequent last, so that they stay longest
        return table

    def _keeps_words(self, table: WordTable, tokens: list[str]) -> bool:
        encode, encode_all = self._tokenizer.encode, self._tokenizer.encode_all
        for text in hard_texts(tokens):
            ids = encode(text, False)
            if any(table.encode(text, encode_all).tolist() != ids for _ in range(3)):  # unknown, to be known, known
                return False
        return True

    def _keeps_theory(self, tokens: list[str]) -> bool:
        rng = random.Random(1)
        for _ in range(300):
            left = hard_text(rng, tokens, 8) + rng.choice("azAZ")
            right = " " + rng.choice("azAZ") + hard_text(rng, tokens, 8)
            if self._cut_at is _WIDE_CUT and rng.random() < 0.3:
                left += rng.choice("字なア한éй")
                right = rng.choice("，。、！（「…") + hard_text(rng, tokens, 8)
            elif tokens and rng.random() < 0.5:
                left += rng.choice(tokens)
                right = hard_text(rng, tokens, 8)
            whole = self._tokenizer.encode(left + right, False)
            if whole != self._tokenizer.encode(left, False) + self._tokenizer.encode(right, False):
                return False
        return self._tokenizer.word_pattern is not None or all(map(self._may_be_cut, self._tokenizer.spanning_entries(_SPANNING_TRIED)))

    def _may_be_cut(self, text: str) -> bool:
        """Whether a text keeps its ids when it is cut at every place where texts are cut."""
        pieces = _CUT.sub("\0 ", text).split("\0")
        encode = self._tokenizer.encode
        return encode(text, False) == [token for piece in pieces for token in encode(piece, False)]


def _leave_others(table: WordTable, whole: dict[str, int]) -> bool:
    """Leave the words to the tokenizer that are one token and do not come out so by merges; False when they are too many."""
    others = [word for word, token_id in whole.items() if (ids := table.merged(word)) is not None and ids != [token_id]]
    for word in others:
        table.leave(word)
    return len(others) <= _WORDS_LEFT


def _message_end(tokenizer: Tokenizer, added: re.Pattern[str] | None) -> str:
    """The first added token that the chat template prints behind a user's message; "" for none."""
    if tokenizer.chat is None or added is None:
        return ""
    roles_and_texts = (("user", "first words"), ("assistant", "second words"), ("user", "third words"))
    try:
        text = tokenizer.chat.render([{"role": role, "content": content} for role, content in roles_and_texts])
    except PromptError:
        return ""
    place = text.find("first words")
    found = added.search(text, place) if place >= 0 else None
    return found.group() if found is not None else ""


def _any_of(tokens: list[str]) -> re.Pattern[str] | None:
    """Finds any of the tokens, the longest first where several begin at one place; `tokens` are in that order."""
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def clean_tokens(tokens: list[str], added: list[str]) -> list[str]:
    """Those of `tokens` that are taken out of a text wherever they stand in it, in their order.

    added: all added tokens. One that another holds, or in which another may end (itself, too: three spaces hold two spaces twice), is
    not always taken out; white space at an end may be taken by a neighbour that strips it.
    """
    sizes = sorted({len(token) for token in tokens})
    wanted = set(tokens)
    held = {
        part
        for text in added
        for size in sizes
        for at in range(len(text) - size + 1)
        if size < len(text) and (part := text[at : at + size]) in wanted
    }
    ends = {text[-size:] for text in added for size in range(1, len(text) + 1)}
    return [
        token
        for token in tokens
        if token not in held and token == token.strip() and not any(token[:n] in ends for n in range(1, len(token)))
    ]
