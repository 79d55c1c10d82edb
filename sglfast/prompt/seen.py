"""Conversations of which a beginning was seen: what is kept of it, and the short way from there to the keys.

Runs in: shards (the loop and the tokenizer's thread). Turns may be used from any thread, a SeenKeying by one at a time.
Contract: as prompt/lazy.py. A Turn is the state of the key chains at a cut shortly before a message border, the text between the two,
    and the border of the template (prompt/stable.py); it is found by the name of the messages that decide about all of that.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import xxhash

from sglfast._blockhash import KeyChain
from sglfast._jsonscan import ChatScan
from sglfast.errors import PromptError
from sglfast.prompt.frames import Frame
from sglfast.prompt.ids import Keys, Probe, pages_max
from sglfast.prompt.keys import PromptText
from sglfast.prompt.lazy import Keying, LazyKeyer
from sglfast.prompt.prefixes import Prefix
from sglfast.prompt.stable import Border, Run, StableTemplate
from sglfast.prompt.texts import Shape, shape_of
from sglfast.shm import Variant

# Shapes of messages -> what is printed around them; None: it cannot be told; False: they came once.
Frames = dict[tuple[Shape, ...], Frame | bool | None]

_REST_CHARS = 256  # more text between a cut and the next message border is not worth remembering
_HEAD_CHARS = 1024  # less before the first question is not worth a place of its own
_SHORT_CHARS = 512  # so much is tokenized in one go
_FAMILIES = 1024  # Turns whose frames are the same, remembered
_STATE_CHARS = 1000
_ENDINGS, _ENDING_CHARS = 64, 64
_TURN_BYTES = 700  # objects and names around one
_UNBOUNDED_CHARS = 1 << 62


class Kind(NamedTuple):
    """What decides about text and keys besides the messages: key of the context, variants, what the clock says. name: 16 bytes for it."""

    context: bytes
    variants: tuple[Variant, ...]
    stamp: tuple[str, ...]
    name: bytes

    @classmethod
    def of(cls, context: bytes, variants: tuple[Variant, ...], stamp: tuple[str, ...], seed: int) -> "Kind":
        """seed: as for the names of messages."""
        return cls(context, variants, stamp, xxhash.xxh3_128_digest(repr((context, variants, stamp)).encode(), seed))


class Turn:
    """What is known of a beginning; never changed, so chains are copied before use.

    opening_role, before: see FrameMaker.make; chain_bytes: what the chains cost to remember; size_bytes: what all of it does.
    """

    __slots__ = ("before", "border", "chain_bytes", "chains", "frames", "keys", "opening_role", "rest", "size_bytes")

    def __init__(
        self, chains: tuple[KeyChain, ...], keys: tuple[bytes, ...], border: Border, rest: str, frames: Frames, opening_role: str | None,
        before: Shape | None, chain_bytes: int,
    ) -> None:  # fmt: skip
        self.chains = chains
        self.keys = keys
        self.border = border
        self.rest = rest
        self.frames = frames
        self.opening_role = opening_role
        self.before = before
        self.chain_bytes = chain_bytes
        self.size_bytes = _TURN_BYTES + chain_bytes + sum(map(len, keys)) + border.size_bytes + 4 * len(rest)


class Turns:
    """Remembers Turns in a LazyKeyer's memory."""

    def __init__(self, keyer: LazyKeyer, template: StableTemplate) -> None:
        self.keyer = keyer
        self._template = template
        self._families: OrderedDict[object, Frames] = OrderedDict()
        self._endings: dict[str, array[int]] = {}
        self.has_marks = self._finds_marks()

    def _finds_marks(self) -> bool:
        """Whether the template prints the token that ends messages shortly before its borders, also before the last one."""
        mark = self.keyer.pieces.border
        messages = [{"role": role, "content": "words"} for role in ("user", "assistant", "user")]
        run = self._template.run(3, messages.__getitem__, self._template.variables(None, {}))
        try:
            run.go_on()
        except Exception:  # a template can raise anything
            return True
        if not run.borders:
            return True
        at = "".join(run.parts).rfind(mark) + len(mark) if mark else -1
        return run.borders[-1].chars - _REST_CHARS <= at <= run.borders[-1].chars

    def place_of_cut(self, run: Run, limit: int, last_border: int, text: str) -> int:
        """Where to remember a whole text, if that is not at the last token that ends a message; -1 for nowhere.

        A template may look for what follows a message before it ends it, as many do with answers of tools: then an earlier one counts.
        """
        chars = next((border.chars for border in reversed(run.borders) if 0 < border.needed <= limit), 0)
        if chars - _REST_CHARS <= last_border <= chars:
            return -1
        return self.keyer.pieces.last_cut(text, max(0, chars - _REST_CHARS), chars) or -1

    def place_of_head(self, scan: ChatScan, limit: int, kind: Kind, run: Run, text: str) -> int:
        """Where to remember what stands before all questions, tools among it, if conversations share that; -1 for nowhere."""
        for head in reversed(run.borders[:2]):
            if head.at <= head.needed == 1 <= limit:
                break
        else:
            return -1
        if head.chars < _HEAD_CHARS or run.message(0)["role"] in ("user", "assistant"):
            return -1
        if self.keyer.prefixes.get(scan.name(1, kind.name)) is not None:
            return -1
        return self.keyer.pieces.last_cut(text, head.chars - _REST_CHARS, head.chars) or -1

    def least_border(self, text: str, end: int) -> int:
        """Where the first border is behind which text may go on in any way, if its chains are those of text[:end]: a cut between words is
        one only with the two characters that follow it, one behind the token that ends messages with any."""
        mark = self.keyer.pieces.border
        return end if mark and text.startswith(mark, end - len(mark)) else end + 2

    def remember(self, scan: ChatScan, limit: int, kind: Kind, run: Run, end: int, prefix: Prefix, text: str) -> bool:
        """Remember the first border of a whole text that is not before text[:end]; False when none is sure to be used again."""
        least = self.least_border(text, end)
        border = next((border for border in run.borders if border.chars >= least), None)
        stamp = self._template.stamp()
        if border is not None:  # messages that print nothing are not gone through again
            border = [other for other in run.borders if (other.chars, other.needed) == (border.chars, border.needed)][-1]
        if border is None or not 0 < border.needed <= limit or border.chars > end + _REST_CHARS or not run.is_stamped(stamp):
            return False
        opening = shape_of(run.message(0))
        role = opening if isinstance(opening, str) else None
        before = shape_of(run.message(border.at - 1)) if border.at else None
        chain_bytes = sum(12 * chain.page_size + 150 for chain in prefix.chains)
        if stamp != kind.stamp:
            kind = Kind.of(kind.context, kind.variants, stamp, self.keyer.prefixes.seed)
        self.put(scan, kind, prefix.chains, prefix.keys, border, text[end : border.chars], role, before, chain_bytes)
        return border.is_sure

    def ending(self, text: str) -> "array[int]":
        """Token ids of what stands behind the last message: nearly always the same few characters."""
        ids = self._endings.get(text)
        if ids is None:
            ids = self.keyer.pieces.cache.get(text)
            if ids is None:
                ids = self.keyer.pieces.encode_piece(text)
            if len(text) <= _ENDING_CHARS:
                if len(self._endings) == _ENDINGS:
                    self._endings.clear()
                self._endings[text] = ids
        return ids

    def is_now(self, kind: Kind) -> bool:
        """Whether the clock says what it said when the conversation was looked up."""
        return self._template.stamp() == kind.stamp

    def put(
        self, scan: ChatScan, kind: Kind, chains: tuple[KeyChain, ...], keys: tuple[bytes, ...], border: Border, rest: str,
        opening_role: str | None, before: Shape | None, chain_bytes: int,
    ) -> None:  # fmt: skip
        """Remember a border under the name of the messages that it needs."""
        at, needed, _, loop, values, form, ranges, roles, absent, prints = border
        state = repr(values) if values else ""
        if len(state) <= _STATE_CHARS:
            family: tuple[object, ...] = (kind.name, at, loop, state, opening_role, before)
            if form:
                family += (form, ranges, prints, *roles[:at])
            if absent:
                family += (absent,)
            frames = self._families.get(family)
            if frames is None:
                frames = self._families[family] = {}
                if len(self._families) > _FAMILIES:
                    self._families.popitem(last=False)
        else:
            frames = {}
        turn = Turn(chains, keys, border, rest, frames, opening_role, before, chain_bytes)
        self.keyer.prefixes.put(scan.name(needed, kind.name), turn)


class SeenKeying:
    """A prompt whose beginning was seen, on its way to its keys; as a Keying."""

    __slots__ = (
        "_asked", "_borders", "_continuation", "_counts_chars", "_keys", "_kind", "_limit", "_long", "_parts", "_salt", "_scan", "_shapes",
        "_turn", "_turns",
    )  # fmt: skip

    def __init__(
        self, turns: Turns, scan: ChatScan, limit: int, kind: Kind, turn: Turn, shapes: tuple[Shape, ...] | None, parts: list[str],
        borders: Sequence[Border], *, counts_chars: bool, continuation: str, salt: str, asked: tuple[str, str],
    ) -> None:  # fmt: skip
        """Use RawReader.begin. shapes: of the messages behind the turn's border; parts: their text; borders: in it, their `chars`
        being characters or parts; limit: messages that stand in `scan` as they were printed."""
        self._turns = turns
        self._scan = scan
        self._limit = limit
        self._kind = kind
        self._turn = turn
        self._shapes = shapes
        self._parts = parts
        self._borders = borders
        self._counts_chars = counts_chars
        self._continuation = continuation
        self._salt = salt
        self._asked = asked
        self._keys: Keys | None = None
        self._long: Keying | None = None

    @property
    def keys(self) -> Keys:
        """The result, after `run` has returned True."""
        assert self._keys is not None
        return self._keys

    def run(self, probe: Probe | None, budget_chars: int = _UNBOUNDED_CHARS) -> bool:
        """See Keying.run."""
        if self._long is None:
            turn = self._turn
            text = turn.rest + "".join(self._parts)
            if probe is not None and not self._continuation and len(text) <= _SHORT_CHARS and len(text) <= budget_chars:
                self._run_short(probe, text)
                return True
            self._long = _LongKeying(self, text)
        if not self._long.run(probe, budget_chars):
            return False
        self._keys = self._long.keys
        return True

    def _run_short(self, probe: Probe, text: str) -> None:
        turn, turns, variants = self._turn, self._turns, self._kind.variants
        keyer = turns.keyer
        pieces = keyer.pieces
        chains, keys = turn.chains, list(turn.keys)
        live = [not known or probe(known) == len(known) >> 3 for known in keys]
        border = pieces.border
        if turns.has_marks:
            cut = text.rfind(border) + 1 if border else 0
            if cut:
                cut += len(border) - 1
        else:
            cut = self.place_of_cut(text)
        more = 0  # tokens behind those in the chains
        try:
            if cut:
                if True not in live or (not pieces.has_words and keyer.cannot_fill_a_block(chains, live, text, 0)):
                    self._estimate(chains, keys, len(text))
                    return
                chains = _extended(chains, keys, live, pieces.encode_piece(text[:cut]), probe)
                self.remember(cut, chains, tuple(keys), text)
            if cut < len(text):
                if True not in live:
                    self._estimate(chains, keys, len(text) - cut)
                    return
                ids = turns.ending(text[cut:])
                more = len(ids)
                for chain in chains:
                    if chain.missing <= more:
                        chains, more = _extended(chains, keys, live, ids, probe), 0
                        break
        except (TypeError, ValueError) as error:
            raise PromptError(f"no block keys can be made of this prompt: {error}") from error
        tokens = chains[0].tokens + more if chains else 0
        capped = {variant: known[: 8 * pages_max(tokens, variant)] for variant, known in zip(variants, keys, strict=True)}
        self._keys = Keys(tokens, False, capped)

    def place_of_cut(self, text: str) -> int:
        """Where to remember the text behind the turn; 0 for nowhere."""
        for border in reversed(self._borders):
            if border.needed <= self._limit:
                at = len(self._turn.rest) + (border.chars if self._counts_chars else sum(map(len, self._parts[: border.chars])))
                return self._turns.keyer.pieces.last_cut(text, max(0, at - _REST_CHARS), at)
        return 0

    def _estimate(self, chains: tuple[KeyChain, ...], keys: list[bytes], rest_chars: int) -> None:
        tokens = chains[0].tokens if chains else 0
        tokens += max(1, self._turns.keyer.pieces.tokens_estimate(rest_chars))
        self._keys = Keys(tokens, True, dict(zip(self._kind.variants, keys, strict=True)))

    def remember(self, end: int, chains: tuple[KeyChain, ...], keys: tuple[bytes, ...], text: str) -> None:
        """Remember the first border behind the old one that is not before text[:end]."""
        turn = self._turn
        rest_chars = len(turn.rest)
        least = self._turns.least_border(text, end)
        for border in self._borders:
            at = rest_chars + (border.chars if self._counts_chars else sum(map(len, self._parts[: border.chars])))
            if at < least:
                continue
            if border.needed < turn.border.needed:  # of a frame that another turn had made, which needed less
                border = border._replace(needed=turn.border.needed)
            if at <= end + _REST_CHARS and border.needed <= self._limit and self._turns.is_now(self._kind):
                place = border.at - turn.border.at - 1
                before = turn.before if place < 0 else self._shapes[place] if self._shapes else None
                opening_role, chain_bytes = turn.opening_role, turn.chain_bytes
                self._turns.put(self._scan, self._kind, chains, keys, border, text[end:at], opening_role, before, chain_bytes)
            return


def _extended(chains: Sequence[KeyChain], keys: list[bytes], live: list[bool], ids: "array[int]", probe: Probe) -> tuple[KeyChain, ...]:
    """Copies of the chains with more tokens in them; keys and live are changed."""
    longer = tuple([chain.copy() for chain in chains])
    for place, chain in enumerate(longer):
        fresh = chain.extend(ids)
        if fresh:
            keys[place] += fresh
            if live[place]:
                live[place] = probe(fresh) == len(fresh) >> 3
    return longer


class _LongKeying(Keying):
    """The long way behind a Turn: piece by piece, and maybe with a rest of the assistant's own text."""

    __slots__ = ("_seen",)

    def __init__(self, seen: SeenKeying, text: str) -> None:
        prompt = PromptText(text=text, continuation=seen._continuation, cache_salt=seen._salt)
        super().__init__(seen._turns.keyer, prompt, seen._kind.variants, seen._asked)
        self._seen = seen
        self._begin_behind(seen._turn.chains, seen._turn.keys, seen.place_of_cut(text))

    def _remember(self, end: int, prefix: Prefix) -> None:
        self._seen.remember(end, prefix.chains, prefix.keys, self._text)

    def _remember_cut(self, end: int, prefix: Prefix) -> None:
        self._seen.remember(end, prefix.chains, prefix.keys, self._text)
