"""Chat bodies to keys from their raw bytes: what was seen before is neither parsed, nor rendered, nor tokenized again.

Runs in: shards (the loop and the tokenizer's thread). A RawReader may be used from any thread, what it begins by one at a time.
Contract: the keys are those of the plain way (prompt/keys.py, prompt/lazy.py), for every body that the engine takes. `begin` says None
    where it cannot vouch for that or has nothing to gain, and the plain way decides. Of a long conversation that nobody owns only the
    beginning is read: what is wrong behind it is the engine's to find.
How: cext/sf_json.h splits the body into messages and names each beginning of them by its bytes. A beginning that was seen leads to the
    state of its key chains at the last message border (prompt/seen.py), and to the place in the template where the text behind it
    begins (prompt/stable.py). Other bytes for the same text are not found; then the text's own digest may be (prompt/prefixes.py).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
import xxhash

from sglfast._jsonscan import ChatScan, scan_chat
from sglfast.errors import PromptError
from sglfast.prompt import vllm_chat
from sglfast.prompt.adapters import asked_for
from sglfast.prompt.budgets import Budget, is_much, is_too_much
from sglfast.prompt.chat import closed, is_open, kwargs_input, message_input
from sglfast.prompt.frames import Frame, FrameMaker
from sglfast.prompt.kept import NotStableError
from sglfast.prompt.keys import PromptText, cache_salt_of, given_of, text_of_chat
from sglfast.prompt.lazy import Keying, LazyKeyer
from sglfast.prompt.offers import Offer, keep, offer_of
from sglfast.prompt.prefixes import Prefix
from sglfast.prompt.scans import Message
from sglfast.prompt.seen import Kind, SeenKeying, Turn, Turns
from sglfast.prompt.stable import Run, StableTemplate
from sglfast.prompt.template import RESERVED_KWARGS
from sglfast.prompt.texts import Messages, Shape, shape_of
from sglfast.shm import Dialect, Engine, Variant, dialect_of

_LAST_NAMES = 8  # beginnings that are looked for, from the longest down; then those of the first messages, which many share
_FIRST_NAMES = 2
_FRESH_MESSAGES = 10  # of more of them only the beginning may be wanted
_FRAME_MESSAGES = 6  # more new messages than that have no frame
_FRAMES = 32  # for each kind of place in a conversation
_MESSAGE_BYTES = 32  # around the text of a message: {"role":"user","content":""},
_UNBOUNDED = 1 << 62
_PARTS = (b'"content":[', b'"content": [')  # as those who write JSON begin them


@dataclass(slots=True)
class Context:
    """All of a body but its messages. key: the same for all that lead to the same text and keys; asked: see LazyKeyer.begin."""

    key: bytes
    asked: tuple[str, str]
    variables: dict[str, Any]
    cache_salt: str
    is_continued: bool
    offer: Offer
    size_bytes: int
    _last_kind: Kind | None = None

    def kind(self, variants: tuple[Variant, ...], stamp: tuple[str, ...], seed: int) -> Kind:
        """This context with variants, at a time; the last one is remembered."""
        kind = self._last_kind
        if kind is None or kind.variants != variants or kind.stamp != stamp:
            kind = self._last_kind = Kind.of(self.key, variants, stamp, seed)
        return kind


class _Early(NamedTuple):
    """A conversation's first message, which most templates look at again and again, or another one that a scan looks at."""

    message: Message
    size_bytes: int


class RawReader:
    """Reads chat bodies for a LazyKeyer, in whose memory it keeps what it has seen."""

    def __init__(self, keyer: LazyKeyer) -> None:
        self.keyer = keyer
        chat = keyer.tokenizer.chat
        self._content_format = chat.content_format if chat is not None else "string"
        self._format_of_vllm = chat.format_for("vllm") if chat is not None else "string"
        self._template = StableTemplate.of(chat) if chat is not None and keyer.pieces.is_cutting else None
        if self._template is not None:
            self._turns = Turns(keyer, self._template)
            self._frames = FrameMaker(self._template)

    def begin(
        self, body: bytes, variants: Sequence[Variant], head_chars: int, budget: Budget | None = None
    ) -> "RawKeying | SeenKeying | None":
        """Begin with a chat body, rendered to `head_chars` at least; None: not this way. budget: None = as much as it takes."""
        if self._template is None:
            return None
        scan = scan_chat(body, self.keyer.prefixes.seed)
        if scan is None:
            return None
        try:
            return self._begin(self._template, scan, tuple(variants), head_chars, budget)
        except Exception:  # a template can raise anything; the plain way finds out what it is, and gives it its name
            return None

    def _begin(
        self, template: StableTemplate, scan: ChatScan, variants: tuple[Variant, ...], head_chars: int, budget: Budget | None
    ) -> "RawKeying | SeenKeying | None":
        dialect = dialect_of(variants)
        context = self.keyer.prefixes.get((scan.context_name, dialect))
        if not isinstance(context, Context):
            context = self._context(template, scan, dialect, budget)
            if context is None:
                return None
        elif context.offer.tools:
            keep(self.keyer.prefixes, context.offer)
        count = limit = len(scan)
        if budget is not None and is_too_much(scan, count - 1, budget):
            return None
        engine = dialect.engine
        # What every request does is spared the call.
        last = (
            message_input(orjson.loads(scan.message(count - 1)), self._content_format)
            if engine == "sglang"
            else self.message(scan.message(count - 1), engine)
        )
        continuation = ""
        if engine == "sglang" and is_open(last):
            limit -= 1
            if not context.is_continued:
                last = closed(last)
            elif limit:
                count = limit
                continuation = last["content"]
            else:
                return None
        kind = context.kind(variants, template.stamp(), self.keyer.prefixes.seed)
        names = scan.beginnings(limit, _LAST_NAMES, _FIRST_NAMES, kind.name)
        turn = self.keyer.prefixes.first(names)
        while turn is not None:
            assert isinstance(turn, Turn)
            if count - turn.border.at > _FRESH_MESSAGES:
                break
            if budget is not None and is_too_much(scan, turn.border.at, budget):
                return None
            try:
                return self._seen(template, scan, limit, context, turn, kind, [last] if count == len(scan) else [], continuation, engine)
            except NotStableError:
                if turn.border.is_sure:
                    raise
                # What a look at the whole found may have changed what was printed before the border, but not before an earlier one.
                place = next((at for at, name in enumerate(names) if self.keyer.prefixes.get(name) is turn), len(names))
                names = names[place + 1 :]
                turn = self.keyer.prefixes.first(names)
        messages = _Messages(self, scan, budget, last, engine)
        run = template.run(count, messages.at, context.variables)
        has_second_try = bool(context.offer.tools) and engine == "sglang"
        is_whole = has_second_try and not template.tells_tools_first
        if is_whole or _may_have_parts(scan):
            # What comes late may be the tools' other form, or media: then all must be known at once.
            if is_too_much(scan, 0, budget):
                return None
            for at in range(count):
                messages.at(at)
        is_all = run.go_on(None if is_whole else head_chars, is_begun=has_second_try)
        prompt = PromptText(
            text="".join(run.parts),
            continuation=continuation,
            cache_salt=context.cache_salt,
            rest=None if is_all else _rest(self, scan, run, messages, dialect),
            rest_chars=0 if is_all else messages.chars_behind(run),
            is_rest_long=not is_all and is_too_much(scan, 0, budget),
        )
        return RawKeying(self, prompt, scan, limit, kind, context.asked, run)

    def _seen(
        self, template: StableTemplate, scan: ChatScan, limit: int, context: Context, turn: Turn, kind: Kind, last: list[Message],
        continuation: str, engine: Engine,
    ) -> SeenKeying:  # fmt: skip
        """Only what stands behind a border is read. last: the last message, if it is printed."""
        at = turn.border.at
        fresh = len(scan) - 1  # messages before the last
        count = fresh + len(last)
        tail = last if at < count else []
        if at < fresh:
            content_format = self._content_format
            if engine == "sglang":
                tail = [message_input(orjson.loads(scan.message(place)), content_format) for place in range(at, fresh)] + last
            else:
                tail = [self.message(scan.message(place), engine) for place in range(at, fresh)] + last
        shapes: tuple[Shape, ...] | None = () if len(tail) <= _FRAME_MESSAGES else None
        for message in tail:
            # Plain messages are spared the call.
            shape = message["role"] if len(message) == 2 and type(message["content"]) is str else shape_of(message)
            if shape is None or shapes is None:
                shapes = None
                break
            shapes += (shape,)
        frame = self._frame(turn, shapes, context, scan, engine) if shapes is not None else None
        if frame is not None:
            known = self._with_early(frame, turn, tail, scan, engine) if frame.early else tail
            if known is not None and (parts := frame.fill(known)) is not None:
                borders = frame.filled_borders(known) if frame.has_open_state else frame.borders
                return SeenKeying(
 self._turns, scan, limit, kind, turn, shapes, parts, borders,
counts_chars=False, continuation=continuation, salt=context.cache_salt, asked=context.asked,
)  # fmt: skip
        messages = _Messages(self, scan, None, None, engine)
        messages.known.update(zip(range(at, count), tail, strict=True))
        run = template.run(count, messages.at, context.variables, turn.border)
        run.go_on()
        return SeenKeying(
 self._turns, scan, limit, kind, turn, shapes, run.parts, run.borders,
counts_chars=True, continuation=continuation, salt=context.cache_salt, asked=context.asked,
)  # fmt: skip

    def _frame(self, turn: Turn, shapes: tuple[Shape, ...], context: Context, scan: ChatScan, engine: Engine) -> Frame | None:
        frames = turn.frames
        frame = frames.get(shapes)
        if frame is None and shapes not in frames:
            if len(frames) == _FRAMES:
                frames.clear()
            frames[shapes] = False  # what comes once is not worth one
        elif frame is False:
            early_at = functools.partial(self._early_of, scan, engine)
            frame = frames[shapes] = self._frames.make(turn.border, turn.opening_role, turn.before, shapes, context.variables, early_at)
        if not isinstance(frame, Frame):
            return None
        if frame.opening is None:
            return frame
        opening = self._early_of(scan, engine, 0)
        # Not `==`: to that 1, 1.0 and True are one, and so are the same items in another order.
        return frame if frame.opening is opening or repr(frame.opening) == repr(opening) else None

    def _with_early(self, frame: Frame, turn: Turn, tail: list[Message], scan: ChatScan, engine: Engine) -> Messages | None:
        """The messages behind a border and those before it that a frame asks for; None when one has another shape."""
        messages = dict(enumerate(tail))
        for place, shape in frame.early:
            message = messages[place] = self._early_of(scan, engine, turn.border.at + place)
            if shape_of(message) != shape:
                return None
        return messages

    def _early_of(self, scan: ChatScan, engine: Engine, at: int) -> Message:
        return self.early(scan, at, lambda at: self.message(scan.message(at), engine), engine)

    def _context(self, template: StableTemplate, scan: ChatScan, dialect: Dialect, budget: Budget | None) -> Context | None:
        text = scan.context
        fields = orjson.loads(text)
        if dialect.engine == "vllm":
            if not vllm_chat.is_plain(fields):
                return None
            vllm_chat.refuse_unknowable(fields)
            kwargs = vllm_chat.kwargs_input(fields)
        else:
            kwargs = kwargs_input(fields, dialect.template_kwargs)
        is_little = budget is None or not is_much(scan.tools, budget)
        offer = offer_of(self.keyer.prefixes, scan.tools, fields.get("tool_choice"), dialect, is_made=is_little)
        if offer is None:
            return None
        if fields.get("input_ids") is not None or not RESERVED_KWARGS.isdisjoint(kwargs):
            return None
        salt, asked = cache_salt_of(fields), asked_for(fields)
        context = Context(
            key=xxhash.xxh3_128_digest(orjson.dumps([kwargs, salt, asked]) + offer.key, self.keyer.prefixes.seed),
            asked=asked,
            variables=template.variables(offer.tools, kwargs, offer),
            cache_salt=salt,
            is_continued=bool(fields.get("continue_final_message")),
            offer=offer,
            size_bytes=1000 + 12 * len(text),
        )
        if keep(self.keyer.prefixes, offer):
            self.keyer.prefixes.put((scan.context_name, dialect), context)
            keep(self.keyer.prefixes, offer)
        return context

    def message(self, text: bytes, engine: Engine) -> Message:
        """One message as the template sees it; raises UnkeyableError, JSONDecodeError."""
        if engine == "sglang":
            return message_input(orjson.loads(text), self._content_format)
        return vllm_chat.message_input(orjson.loads(text), self._format_of_vllm)

    def early(self, scan: ChatScan, at: int, parse: Callable[[int], Message], engine: Engine) -> Message:
        """A message that turn after turn is looked at."""
        name = scan.name(at + 1) if engine == "sglang" else (scan.name(at + 1), engine)
        known = self.keyer.prefixes.get(name)
        if isinstance(known, _Early):
            return known.message
        message = parse(at)
        self.keyer.prefixes.put(name, _Early(message, 500 + 12 * (scan.end(at) - scan.start(at))))
        return message


class _Messages:
    """The messages of a body as a template sees them, each parsed when it is first wanted."""

    __slots__ = ("_budget_bytes", "_engine", "_reader", "_scan", "known")

    def __init__(self, reader: RawReader, scan: ChatScan, budget: Budget | None, last: Message | None, engine: Engine) -> None:
        self._reader = reader
        self._scan = scan
        self._engine = engine
        self._budget_bytes = _UNBOUNDED if budget is None else budget[0]
        self.known: dict[int, Message] = {} if last is None else {len(scan) - 1: last}

    def at(self, at: int) -> Message:
        """Message `at`. Raises PromptError for one that the engine refuses, JSONDecodeError."""
        message = self.known.get(at)
        if message is None:
            message = self.known[at] = self._parsed(at) if at else self._reader.early(self._scan, 0, self._parsed, self._engine)
        return message

    def _parsed(self, at: int) -> Message:
        text = self._scan.message(at)
        self._budget_bytes -= len(text)
        if self._budget_bytes < 0:
            raise PromptError("more than may be parsed now")
        return self._reader.message(text, self._engine)

    def take_all(self) -> None:
        """From now on as much may be parsed as it takes."""
        self._budget_bytes = _UNBOUNDED

    def chars_behind(self, run: Run) -> int:
        """About how many characters follow what is rendered: messages that were not read, by what the read ones had for their bytes."""
        scan = self._scan
        read_bytes = read_chars = 0
        for at, message in self.known.items():
            read_bytes += scan.end(at) - scan.start(at) - _MESSAGE_BYTES
            read_chars += _chars(message)
        all_bytes = scan.end(len(scan) - 1) - scan.start(0) - len(scan) * _MESSAGE_BYTES
        return max(0, max(0, all_bytes) * read_chars // max(1, read_bytes) - run.chars)


class RawKeying(Keying):
    """A chat body of which nothing was seen, on its way to its keys."""

    __slots__ = ("_kind_of_turns", "_limit", "_reader", "_rendering", "_scan")

    def __init__(
        self, reader: RawReader, prompt: PromptText, scan: ChatScan, limit: int, kind: Kind, asked: tuple[str, str], run: Run
    ) -> None:
        """Use RawReader.begin. limit: messages that stand in `scan` as they were rendered."""
        super().__init__(reader.keyer, prompt, kind.variants, asked)
        self._reader = reader
        self._scan = scan
        self._limit = limit
        self._kind_of_turns = kind
        self._rendering = run

    def _remember(self, end: int, prefix: Prefix) -> None:
        if not self._reader._turns.remember(self._scan, self._limit, self._kind_of_turns, self._rendering, end, prefix, self._text):
            super()._remember(end, prefix)

    def _places_of_cuts(self, last_border: int) -> list[int]:
        turns, run, text = self._reader._turns, self._rendering, self._text
        return [
            turns.place_of_head(self._scan, self._limit, self._kind_of_turns, run, text),
            turns.place_of_cut(run, self._limit, last_border, text),
        ]

    def _remember_cut(self, end: int, prefix: Prefix) -> None:
        self._reader._turns.remember(self._scan, self._limit, self._kind_of_turns, self._rendering, end, prefix, self._text)


def _rest(reader: RawReader, scan: ChatScan, run: Run, messages: _Messages, dialect: Dialect) -> Callable[[], str]:
    def rest() -> str:
        begun = len(run.parts)
        chars = run.chars
        messages.take_all()
        try:
            run.go_on()
            return "".join(run.parts[begun:])
        except Exception:
            run.borders.clear()
        # The plain way, for what it says or because the template did something that cannot be followed.
        chat = reader.keyer.tokenizer.chat
        assert chat is not None
        try:
            given = given_of(orjson.loads(scan.body), chat, dialect)
        except orjson.JSONDecodeError as error:
            raise PromptError("the body is no JSON") from error
        return text_of_chat(chat, given)[chars:]

    return rest


def _may_have_parts(scan: ChatScan) -> bool:
    """Whether a content may be a list; one written in an unusual way is found when it is read."""
    return not scan.is_flat(0) and any(scan.body.find(begin, scan.start(0)) >= 0 for begin in _PARTS)


def _chars(message: Message) -> int:
    content = message["content"]
    return len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)
