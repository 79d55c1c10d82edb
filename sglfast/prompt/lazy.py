"""Block keys of a prompt as far as anybody owns its blocks: tokenize forward, piece by piece, and stop there.

Runs in: shards (the loop and the tokenizer's thread). A Keying belongs to one thread at a time; LazyKeyer may be used from any.
Theory: the overlap of every rank ends at the first block that nobody owns, so no key behind it can change a choice. A key depends on
    the tokens before it only, so a text can be tokenized forward and left where it is. What an earlier prompt had in common up to a
    message border is not tokenized, nor hashed, again (prompt/prefixes.py).
Contract: for any tree, matching `Keys.keys` gives the overlap that matching all keys would give, provided the tree holds still. `tokens`
    is exact unless `is_estimated`; then it counts what was tokenized and estimates the rest by characters per token, as this
    tokenizer's pieces had them so far. At most (tokens - 1) // block_size blocks count, because an engine computes a prompt's last
    token itself; where a text is left in the middle that changes nothing.
"""

import time
from array import array
from collections.abc import Iterator, Sequence

from sglfast._blockhash import KeyChain
from sglfast.errors import PromptError
from sglfast.prompt.adapters import starts_of
from sglfast.prompt.ids import IdsKeying, Keys, Probe, pages_max
from sglfast.prompt.keys import PromptText
from sglfast.prompt.pieces import PieceTokenizer
from sglfast.prompt.prefixes import Name, Prefix, PrefixCache
from sglfast.prompt.tokenizer import Tokenizer
from sglfast.shm import Variant

_LAST_BORDERS = 8  # message borders from the end at which a known beginning is looked for
_UNBOUNDED_CHARS = 1 << 62
# The first piece shall fill a block, but not much more: that one tells whether anybody owns anything.
_CHARS_PER_TOKEN = 5
_FIRST_CHARS = (64, 640)


class LazyKeyer:
    """Makes block keys with one model's tokenizer. cache_bytes: for what it remembers (pieces and prefixes); 0 = nothing."""

    def __init__(self, tokenizer: Tokenizer, cache_bytes: int) -> None:
        self.tokenizer = tokenizer
        self.pieces = PieceTokenizer(tokenizer, cache_bytes - cache_bytes // 4)
        self.prefixes = PrefixCache(cache_bytes // 4)
        self._bytes_per_token = tokenizer.normalized_growth
        self._around = len(self.pieces.before) + len(self.pieces.after) + 4  # 4: markers before a text and its parts

    def begin(self, prompt: PromptText, variants: Sequence[Variant], asked: tuple[str, str] = ("", "")) -> "Keying | IdsKeying":
        """Begin with a prompt that has text or token ids; raises PromptError for one that has neither, or is no Unicode.

        asked: the model and the adapter that the request names (adapters.asked_for).
        """
        if prompt.token_ids is not None:
            return IdsKeying(prompt.token_ids, prompt.cache_salt, tuple(variants), asked)
        if prompt.text is None:
            raise PromptError(prompt.detail or "this prompt has no text and no token ids")
        return Keying(self, prompt, tuple(variants), asked)

    def cannot_fill_a_block(self, chains: Sequence[KeyChain], live: list[bool], text: str, start: int, continuation: str = "") -> bool:
        """Whether even one token a byte of text[start:] would not complete a block of a chain whose overlap goes on."""
        if not self._bytes_per_token:
            return False
        missing = _UNBOUNDED_CHARS
        for chain, is_live in zip(chains, live, strict=True):
            if is_live:
                behind = chain.tokens - chain.bigram - chain.pages * chain.page_size
                if behind < 1:
                    return False  # with no token behind a full block, the rest decides whether that block counts
                missing = min(missing, chain.page_size - behind)
        if len(text) - start + len(continuation) + self._around >= missing:
            return False
        rest_bytes = len(text[start:].encode()) + len(continuation.encode())
        return rest_bytes * self._bytes_per_token + self._around < missing


class Keying:
    """One text on its way to its keys: `run` until it says True, then `keys`."""

    __slots__ = (
        "_chains",
        "_cuts",
        "_end",
        "_ends",
        "_first_chars",
        "_is_headed",
        "_is_open",
        "_keyer",
        "_keys",
        "_kind",
        "_live",
        "_names",
        "_pos",
        "_probed",
        "_prompt",
        "_result",
        "_saved",
        "_saved_cuts",
        "_starts",
        "_text",
        "_variants",
    )

    def __init__(self, keyer: LazyKeyer, prompt: PromptText, variants: tuple[Variant, ...], asked: tuple[str, str]) -> None:
        self._keyer = keyer
        self._prompt = prompt
        self._variants = variants
        self._result: Keys | None = None
        self._text = prompt.text or ""
        self._pos = 0  # characters that are in the chains
        self._is_headed = False  # the rendered beginning was gone through
        self._is_open = False  # the whole text is rendered and looked up
        self._end = 0  # of the next piece, once it is known
        self._saved: tuple[int, Prefix] | None = None
        self._cuts: list[int] = []  # places to remember besides those behind the tokens that end messages
        self._saved_cuts: list[tuple[int, Prefix]] = []
        self._starts = starts_of(variants, *asked, prompt.cache_salt)
        self._live = [True] * len(variants)
        least = min([variant.block_size for variant in variants], default=0)
        self._first_chars = max(_FIRST_CHARS[0], min(_FIRST_CHARS[1], least * _CHARS_PER_TOKEN))
        self._kind = (variants, self._starts, prompt.cache_salt, prompt.add_special_tokens)
        self._names: list[Name] = []
        self._ends: Iterator[int] = iter(())
        try:
            salt = prompt.cache_salt.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the cache salt is not valid Unicode text: {error}") from error
        self._chains = [
            KeyChain(variant.block_size, bigram=variant.bigram, cache_salt=salt)
            if start is None
            else KeyChain(variant.block_size, bigram=variant.bigram, seed=start.seed, parent=start.parent)
            for variant, start in zip(variants, self._starts, strict=True)
        ]
        self._keys = [b""] * len(variants)
        if prompt.add_special_tokens:
            self._keys = [chain.extend(keyer.pieces.before) for chain in self._chains]
        self._probed = [0] * len(variants)  # keys in bytes that the probe has seen

    @property
    def keys(self) -> Keys:
        """The result, after `run` has returned True."""
        assert self._result is not None
        return self._result

    def run(self, probe: Probe | None, budget_chars: int = _UNBOUNDED_CHARS) -> bool:
        """Go on until the keys are known (True), or until more than `budget_chars` would have to be tokenized (False: call again).

        probe: of the calling thread; None = all keys of the prompt, whoever owns them. Without a budget other threads get their turn
        after each piece. Raises PromptError.
        """
        try:
            return self._run_text(probe, budget_chars)
        except (TypeError, ValueError) as error:  # UnicodeError is a ValueError
            raise PromptError(f"no block keys can be made of this prompt: {error}") from error

    def _run_head(self, probe: Probe, budget_chars: int) -> bool:
        """Go through the beginning of the text that is rendered already; True: no overlap goes on behind it."""
        pieces, head = self._keyer.pieces, self._text
        # A token that is cut off at the end of the beginning could reach back so far.
        limit = len(head) - pieces.longest_token if pieces.is_cutting else 0
        for end in pieces.ends(head, first_chars=self._first_chars):
            if end > limit:
                break
            piece = head[self._pos : end]
            ids = pieces.cache.get(piece)
            if ids is None:
                budget_chars -= len(piece)
                if budget_chars < 0:
                    break
                ids = pieces.encode_piece(piece)
            self._extend(ids)
            self._pos = end
            if self._ask(probe):
                return True
            if all(self._probed):
                break  # somebody owns something: now what is known of the whole text may save all further steps
        return False

    def _open(self) -> None:
        """The whole text is there: find the longest beginning of it that is known."""
        pieces, prefixes, text = self._keyer.pieces, self._keyer.prefixes, self._text
        borders = pieces.last_borders(text, _LAST_BORDERS) if pieces.is_cutting else []
        first = 0
        if borders:
            self._names = prefixes.names(text, borders, self._kind)
            known = prefixes.longest(self._names)
            if known is not None and known[0] > self._pos:
                first = self._pos = known[0]
                self._chains = [chain.copy() for chain in known[1].chains]
                self._keys = list(known[1].keys)
                self._probed = [0] * len(self._keys)
        last = borders[-1] if borders else -1
        self._cuts = [cut for cut in self._places_of_cuts(last) if cut > self._pos]
        ends = sorted({*self._cuts, last}) if self._cuts else (last,)
        self._ends = pieces.ends(text, self._pos, ends, first, self._first_chars)
        self._is_open = True

    def _places_of_cuts(self, last_border: int) -> Sequence[int]:
        """Where to remember the chains besides at `last_border`, ascending; below 1 is nowhere. For those who know more of the text than
        is in it."""
        return ()

    def _remember_cut(self, end: int, prefix: Prefix) -> None:
        """The chains are at such a place."""

    def _begin_behind(self, chains: Sequence[KeyChain], keys: Sequence[bytes], cut: int) -> None:
        """The text is what stands behind a known beginning, which is looked for no more. cut: as one of _places_of_cuts."""
        self._chains = [chain.copy() for chain in chains]
        self._keys = list(keys)
        borders = self._keyer.pieces.last_borders(self._text, 1)
        self._cuts = [cut] if cut > 0 and cut not in borders else []
        self._ends = self._keyer.pieces.ends(self._text, 0, self._cuts or borders, first_chars=self._first_chars)
        self._is_open = True

    def _estimated(self, rest_chars: int) -> bool:
        tokens = self._chains[0].tokens if self._chains else 0
        tokens += max(1, self._keyer.pieces.tokens_estimate(rest_chars + len(self._prompt.continuation)))
        self._result = Keys(tokens, True, dict(zip(self._variants, self._keys, strict=True)))
        return True

    def _run_text(self, probe: Probe | None, budget_chars: int) -> bool:
        if not self._is_open:
            rest = self._prompt.rest
            if rest is not None:
                if probe is not None and not self._is_headed and self._run_head(probe, budget_chars):
                    return self._estimated(len(self._text) - self._pos + self._prompt.rest_chars)
                self._is_headed = True
                if self._prompt.is_rest_long and budget_chars < _UNBOUNDED_CHARS:
                    return False
                self._text += rest()
            self._open()
        pieces, text, size = self._keyer.pieces, self._text, len(self._text)
        cache = pieces.cache
        gives_way = budget_chars >= _UNBOUNDED_CHARS
        is_over = self._ask(probe)
        while not is_over and self._pos < size:
            if probe is not None and self._keyer.cannot_fill_a_block(self._chains, self._live, text, self._pos, self._prompt.continuation):
                is_over = True
                break
            if not self._end:
                self._end = next(self._ends)
            piece = text[self._pos : self._end]
            ids = cache.get(piece)
            if ids is None:
                budget_chars -= len(piece)
                if budget_chars < 0:
                    return False
                ids = pieces.encode_piece(piece)
                if gives_way:
                    time.sleep(0)  # lets the loop have the GIL, which it would else wait for until the switch interval is over
            self._extend(ids)
            self._pos, self._end = self._end, 0
            border = pieces.border
            if border and text.startswith(border, self._pos - len(border)):
                self._saved = (self._pos, Prefix(tuple(chain.copy() for chain in self._chains), tuple(self._keys)))
            if self._pos in self._cuts:
                self._saved_cuts.append((self._pos, Prefix(tuple(chain.copy() for chain in self._chains), tuple(self._keys))))
            is_over = self._ask(probe)
        if self._saved is not None:
            self._remember(*self._saved)
            self._saved = None
        while self._saved_cuts:
            self._remember_cut(*self._saved_cuts.pop())
        tail_chars = len(self._prompt.continuation)
        if is_over and (self._pos < size or tail_chars):
            return self._estimated(size - self._pos)
        if tail_chars > budget_chars:
            return False
        if self._prompt.add_special_tokens:
            self._extend(pieces.after)
        if tail_chars:
            # SGLang encodes it as a text of its own and drops a BOS.
            tail = self._keyer.tokenizer.encode(self._prompt.continuation, True)
            self._extend(array("I", tail[1:] if tail and tail[0] == self._keyer.tokenizer.bos_token_id else tail))
        tokens = self._chains[0].tokens if self._chains else 0
        capped = {variant: keys[: 8 * pages_max(tokens, variant)] for variant, keys in zip(self._variants, self._keys, strict=True)}
        self._result = Keys(tokens, False, capped)
        return True

    def _extend(self, ids: "array[int]") -> None:
        for i, chain in enumerate(self._chains):
            fresh = chain.extend(ids)
            if fresh:
                self._keys[i] += fresh

    def _ask(self, probe: Probe | None) -> bool:
        """Whether the overlap of every variant has ended. Only the keys that came since are asked for: the cost stays linear.

        One rank may own what came before and another what comes after: then the text is followed further than needed, never less.
        """
        if probe is None:
            return False
        for i, keys in enumerate(self._keys):
            if self._live[i] and len(keys) > self._probed[i]:
                fresh = keys[self._probed[i] :]
                self._probed[i] = len(keys)
                self._live[i] = probe(fresh) == len(fresh) >> 3
        return not any(self._live)

    def _remember(self, end: int, prefix: Prefix) -> None:
        name = next((name for name in self._names if name[1] == end), None)
        if name is None:
            name = self._keyer.prefixes.names(self._text, [end], self._kind)[0]
        self._keyer.prefixes.put(name, prefix)
