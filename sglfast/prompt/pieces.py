"""Text to token ids piece by piece, with a bounded cache of pieces: a conversation pays for its newest message only.

Runs in: shards (the loop and the tokenizer's thread), simulator; any thread may use it.
Theory: a tokenizer first takes added tokens (such as <|im_end|>) out of the text, then cuts the rest into words (pre-tokenizer), and
    merges inside a word only. So the ids of a text are the ids of its pieces, when every cut lies behind an added token or before
    a space that stands between two ASCII letters: every word pattern in use ends a word there, whatever stands around it.
    Cuts depend on the text before them alone, so texts that begin alike are cut alike and share pieces.
Contract: `encode` equals the tokenizer's own result, always. Whether a tokenizer keeps the theory is tried once, at construction, with
    texts made to break it; one that does not (no pre-tokenizer, a marker put before every text) is given whole texts.
"""

import random
import re
import threading
from array import array
from collections import OrderedDict

from sglfast.prompt.tokenizer import Tokenizer

# Long enough that the cost of a look-up is nothing, short enough that a new message seldom makes an old piece new.
PIECE_CHARS = 2048
# Without a place to cut for this long, the piece goes on: correctness before size.
_CUT = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")


class PieceCache:
    """Least recently used pieces, bounded by the bytes of their texts and ids."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._ids: OrderedDict[str, array[int]] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0

    def get(self, text: str) -> "array[int] | None":
        """The ids of a piece, or None."""
        with self._lock:
            ids = self._ids.get(text)
            if ids is None:
                self.misses += 1
                return None
            self.hits += 1
            self._ids.move_to_end(text)
            return ids

    def put(self, text: str, ids: "array[int]") -> None:
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


def _cost_bytes(text: str, ids: "array[int]") -> int:
    return 200 + 4 * len(text) + 4 * len(ids)  # 4: a text may hold any character; 200: the objects around them


class PieceTokenizer:
    """A tokenizer that remembers pieces. is_cutting: the tokenizer keeps the theory; else every text is one piece."""

    def __init__(self, tokenizer: Tokenizer, cache_bytes: int) -> None:
        self._tokenizer = tokenizer
        self.cache = PieceCache(cache_bytes)
        bare, dressed = tokenizer.encode("a", False), tokenizer.encode("a", True)
        start = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
        self._before = array("I", dressed[:start])
        self._after = array("I", dressed[start + len(bare) :])
        added = tokenizer.added_tokens()
        tokens = sorted((text for text, is_alone in added.items() if is_alone and text), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        spans_a_cut = any(_CUT.search(text) for text in added)
        self.is_cutting = tokenizer.has_pre_tokenizer and not spans_a_cut and self._keeps_theory(tokens)

    def encode(self, text: str, add_special_tokens: bool) -> "array[int]":
        """Token ids of a text. Raises what the tokenizer raises for text that is no Unicode."""
        ids = array("I")
        if add_special_tokens:
            ids += self._before
        for piece in self.cut(text) if self.is_cutting else (text,):
            known = self.cache.get(piece)
            if known is None:
                known = array("I", self._tokenizer.encode(piece, False))
                self.cache.put(piece, known)
            ids += known
        if add_special_tokens:
            ids += self._after
        return ids

    def cut(self, text: str) -> list[str]:
        """The pieces of a text, in order; joined they are the text. One pass, whatever stands in it."""
        pieces = []
        start, size = 0, len(text)
        shortest = PIECE_CHARS // 8  # a piece of a few characters is not worth a look-up
        border = -1  # end of the first added token behind a piece of at least the shortest length
        while size - start > shortest:
            if border < start + shortest:
                token = self._added.search(text, start + shortest) if self._added is not None else None
                border = token.end() if token is not None else size
            end = border
            if border - start > PIECE_CHARS:
                # No message border in reach: a space between letters, looked for before the border only.
                space = _CUT.search(text, start + PIECE_CHARS, border)
                end = space.start() if space is not None else border
            pieces.append(text[start:end])
            start = end
        if start < size:
            pieces.append(text[start:])
        return pieces

    def _keeps_theory(self, tokens: list[str]) -> bool:
        rng = random.Random(1)
        parts = [
            "a",
            "B",
            "don't",
            " ",
            "  ",
            "\n",
            "\t",
            "'s",
            "'LL",
            "é",
            "e\u0301",
            "ß",
            "漢字",
            "12",
            "3.4",
            "!?",
            "_x",
            "🙂",
            "\u200d",
            "ﬁ",
        ]
        parts += ["word", "Word", "x y", "the", "ing", *rng.sample(tokens, min(len(tokens), 8))]
        for _ in range(300):
            left = "".join(rng.choice(parts) for _ in range(rng.randrange(8))) + rng.choice("azAZ")
            right = " " + rng.choice("azAZ") + "".join(rng.choice(parts) for _ in range(rng.randrange(8)))
            if tokens and rng.random() < 0.5:
                left += rng.choice(tokens)
                right = "".join(rng.choice(parts) for _ in range(rng.randrange(8)))
            whole = self._tokenizer.encode(left + right, False)
            if whole != self._tokenizer.encode(left, False) + self._tokenizer.encode(right, False):
                return False
        return True
