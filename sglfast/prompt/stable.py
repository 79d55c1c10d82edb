"""Rendering of a conversation from the middle: the text behind its first messages alone, when what comes before them is known.

Runs in: shards (the loop and the tokenizer's thread). A StableTemplate may be used from any thread, a Run by one at a time.
Contract: the text of a Run that was started at a border of an earlier Run is what the whole text has behind that border, exactly, for
    every conversation whose first `needed` messages and other variables are the same. Where that cannot be vouched for there is no
    border, or NotStableError, and the caller renders the whole.
Why it holds. A template is a program without input but its variables, so two runs go the same way as long as all they have read is
    the same. Here it gets its messages from a View, which notes what is read: `needed` counts the messages that any step so far has
    looked at, and a run that has asked for their number, or come to their end, in its loop has no more borders; what it has found out
    about them before the loop is compared (prompt/scans.py), what it looks for ahead is looked for again (prompt/ahead.py).
    What stands before a border was printed by steps that read no more than that. To begin at the border, the same program runs again on
    the whole conversation, but its loop over the messages starts in the middle: everything before the loop is set anew (only what it
    would print is left out), and the one thing that jinja2 carries from one turn of a loop to the next, the attributes of namespaces,
    is put back as it was. Templates with any other memory are refused (prompt/orderly.py).
    The clock is read through the Run: its words are part of what must be the same (`stamp`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any, NamedTuple

from jinja2 import Environment, Template
from jinja2.runtime import Context
from jinja2.utils import Namespace

from sglfast.prompt.ahead import Question, add_ahead
from sglfast.prompt.kept import NotStableError, is_plain, size_bytes
from sglfast.prompt.offers import OFFER_VARIABLE, Offer, add_offers
from sglfast.prompt.orderly import KNOWN_TEST, LOOP_FILTER, SCAN_FILTER, is_orderly, mark_loops
from sglfast.prompt.scans import Glance, Message, Range, Scan, add_tests, attributes_of, range_of
from sglfast.prompt.template import ChatTemplate, make_environment, strftime_now
from sglfast.prompt.told_first import is_told_first
from sglfast.prompt.views import View, Walk, WatchedLoop, enter, is_known, scan

_OF_THE_RUN = object()  # stands for a function that each run has of its own
_CLOCK_FORMATS = 8


class Border(NamedTuple):
    """A place between two messages of a rendered conversation.

    at: number of the message behind it; needed: messages, from the first, that decide about all text before it; chars: of the run's text
    before it; loop: which loop over which rest of the messages; state: what each namespace has that it had not before the loop; form,
    ranges: with what a scan of the whole conversation came to the loop (Scan.end), and within what its numbers must be; roles: those that
    the scan has asked for, of this conversation's messages from the first on, else None; they save parsing where messages[:at] are
    the same;
    absent: questions that no message behind it may answer with yes (prompt/ahead.py); prints: how many before the loop had begun when the
    scan did: it may have begun in the last of them, so that one is made again.
    """

    at: int
    needed: int
    chars: int
    loop: tuple[int, int]
    state: tuple[dict[str, Any], ...]
    form: bytes = b""
    ranges: tuple[Range, ...] = ()
    roles: Sequence[str | None] = ()
    absent: tuple[str, ...] = ()
    prints: int = 0

    @property
    def is_sure(self) -> bool:
        """Whether it holds for all conversations that begin with the messages that it needs."""
        return not self.form and not self.absent

    @property
    def size_bytes(self) -> int:
        """What it costs to remember."""
        if not self.state:
            return 200 + 8 * len(self.roles)
        return (
            200
            + 100 * len(self.ranges)
            + 8 * len(self.roles)
            + sum(200 + sum(100 + len(name) + size_bytes(value) for name, value in values.items()) for values in self.state)
        )


class StableTemplate:
    """A chat template, compiled a second time so that its loop over the messages can be watched and begun in the middle."""

    def __init__(
        self, code: CodeType, chat: ChatTemplate, tells_tools_first: bool,
        change: Callable[[Environment, dict[str, Any]], None] | None = None,
    ) -> None:  # fmt: skip
        """Use `of`."""
        environment = _watching_environment()
        template = Template.from_code(environment, code, environment.make_globals(None))
        words = template.root_render_func.__globals__
        words["LoopContext"] = WatchedLoop
        if change is not None:
            change(environment, words)
        self._code = code
        self._chat = chat
        self._environment = environment
        self._render = template.root_render_func
        self._globals = {**template.globals, "documents": None}
        self.has_previtem = "previtem" in chat.source
        self.tells_tools_first = tells_tools_first  # told_first.is_told_first
        self.clock_formats: list[str] = []

    @classmethod
    def of(cls, chat: ChatTemplate) -> "StableTemplate | None":
        """The same template, None when no conversation can be rendered from the middle with it."""
        environment = _watching_environment()
        tree = environment.parse(chat.source)
        tells_tools_first = is_told_first(tree)
        if not is_orderly(tree) or not mark_loops(tree):
            return None
        tree.set_environment(environment)
        return cls(environment.compile(tree), chat, tells_tools_first)

    def twin(self, change: Callable[[Environment, dict[str, Any]], None]) -> "StableTemplate":
        """The same program with other ways: `change` gets its own environment and the global words of its code."""
        other = StableTemplate(self._code, self._chat, self.tells_tools_first, change)
        other.clock_formats = self.clock_formats
        return other

    def stamp(self) -> tuple[str, ...]:
        """What the clock says now in every format in which the template has asked it."""
        return tuple(map(strftime_now, self.clock_formats)) if self.clock_formats else ()

    def variables(self, tools: object, kwargs: Mapping[str, Any], offer: Offer | None = None) -> dict[str, Any]:
        """What a template sees besides messages; as long as it is the same, Runs may begin at borders of each other.

        offer: what remembers the texts of the tools.
        """
        own = {"add_generation_prompt": True, "tools": tools, "messages": None, OFFER_VARIABLE: offer}
        functions = dict.fromkeys(("namespace", "strftime_now"), _OF_THE_RUN)
        return {**self._globals, **functions, **self._chat.special_tokens, **kwargs, **own}

    def run(
        self, count: int, message_at: Callable[[int], Message], variables: Mapping[str, Any], start: Border | None = None,
        glance_at: Callable[[int], Message] | None = None,
    ) -> "Run":  # fmt: skip
        """Render `count` messages, or what stands behind a border. message_at: is asked for messages when they are needed; glance_at: the
        same for scans of the whole conversation."""
        run = Run(self, count, message_at, start, glance_at)
        mine = dict(variables)
        mine["messages"] = View(run, 0)
        if mine["namespace"] is _OF_THE_RUN:
            mine["namespace"] = run.namespace
        if mine["strftime_now"] is _OF_THE_RUN:
            mine["strftime_now"] = run.strftime_now
        run.context = Context(self._environment, mine, None, {})
        run.rendering = self._render(run.context)
        return run


class Run:
    """One rendering, as far as it was asked for: its text bit by bit in `parts`, and the borders that it has passed."""

    __slots__ = (
        "_absent", "_attributes", "_before", "_glance_at", "_is_whole", "_looks", "_loop", "_message_at", "_namespaces", "_needed",
        "_prints", "_scan", "_start", "borders", "chars", "clock", "context", "count", "has_lost_borders", "parts", "rendering", "template",
    )  # fmt: skip

    def __init__(
        self, template: StableTemplate, count: int, message_at: Callable[[int], Message], start: Border | None,
        glance_at: Callable[[int], Message] | None,
    ) -> None:  # fmt: skip
        """Use StableTemplate.run."""
        self.template = template
        self.count = count
        self.rendering: Iterator[str] = iter(())
        self.context: Context
        self.parts: list[str] = []
        self.chars = 0
        self.borders: list[Border] = []
        self.clock: dict[str, str] = {}
        self.has_lost_borders = False  # by something in a namespace that cannot be kept
        self._message_at = message_at
        self._glance_at = glance_at or message_at
        self._start = start
        self._needed = start.needed if start is not None else 0
        self._is_whole = False  # the number of messages has made a difference in the loop
        self._scan: Scan | None = None  # it has made one before the loop
        self._loop: tuple[int, int] | None = None
        self._prints = 0  # that have begun before the scan, or the loop
        self._namespaces: list[Namespace] = []
        self._attributes: list[dict[str, Any]] = []  # of the namespaces that were there before the loop
        self._before: list[dict[str, Any]] = []
        self._absent: tuple[str, ...] = ()
        self._looks: dict[str, tuple[int, int]] = {}  # by question: from where on was looked, where the first was, or the end

    def go_on(self, chars: int | None = None, *, is_begun: bool = False) -> bool:
        """Render until there are so many characters; True: there is no more. Whatever a template raises comes out.

        is_begun: not to stop before the loop over the messages has begun.
        """
        parts = self.parts
        for part in self.rendering:
            parts.append(part)
            self.chars += len(part)
            if chars is not None and self.chars >= chars and (not is_begun or self._loop is not None):
                return False
        self.check_end()
        return True

    def check_end(self) -> None:
        """All is rendered. Raises NotStableError when it is not what stands behind the border."""
        if self._start is not None and self._loop is None:
            raise NotStableError("the loop over the messages was not reached")

    def message(self, at: int) -> Message:
        """One of the messages, which the template need not have looked at."""
        return self._message_at(at)

    def is_stamped(self, stamp: tuple[str, ...]) -> bool:
        """Whether all that the clock has said in this run is what it says in `stamp`, which is new."""
        return not self.clock or self.clock.items() <= dict(zip(self.template.clock_formats, stamp, strict=False)).items()

    # ---- what the template calls ----

    def namespace(self, *args: Any, **kwargs: Any) -> Namespace:
        """jinja2's `namespace`, noted."""
        made = Namespace(*args, **kwargs)
        self._namespaces.append(made)
        return made

    def strftime_now(self, format: str) -> str:
        """The clock, noted."""
        text = strftime_now(format)
        formats = self.template.clock_formats
        if format not in formats:
            if len(formats) == _CLOCK_FORMATS:
                raise NotStableError("the template asks for the time in too many ways")
            formats.append(format)
        if self.clock.setdefault(format, text) != text:
            raise NotStableError("the time has changed")
        return text

    def is_ahead(self, start: int, name: str, question: Question) -> bool:
        """Whether a message from `start` on answers a question with yes."""
        if self._loop is None:
            raise NotStableError("a look ahead from before the loop")
        count = self.count
        begun, found = self._looks.get(name, (count, count))
        if not begun <= start <= found:
            found = next((index for index in range(start, count) if question(self._message_at(index))), count)
            self._looks[name] = start, found
        if found < count:
            self._needed = max(self._needed, found + 1)
            return True
        if name not in self._absent:
            self._absent += (name,)
        return False

    # ---- what Views and loops note ----

    def take(self, index: int, begun: tuple[int, int] | None = None) -> Message:
        """A message that the template looks at. begun: as of `see_end`."""
        if index >= self._needed:
            if self._loop is not None or (self._scan is None and self._start is None):
                self._needed = index + 1
            elif self._scan is None:
                self.see_end(begun)  # what led to the border found no such message, or had a scan behind it
        return self._message_at(index)

    def glances(self, indexes: range) -> list[Glance]:
        """Messages that a scan, which has begun, may look at."""
        assert self._scan is not None
        roles = self._scan.roles
        return [Glance(self._glance_at, index, roles) for index in indexes]

    @property
    def place(self) -> tuple[int, int]:
        """Where the run is: messages needed, and how much is printed."""
        return self._needed, len(self.parts)

    def see_end(self, begun: tuple[int, int] | None = None) -> None:
        """The template has learned how many messages there are. begun: `place` where it began to go through them, if that was earlier."""
        if self._loop is not None:
            self._is_whole = True
        elif self._scan is None:
            # What was read meanwhile is of the scan, too, and what was printed.
            self._needed, printed = begun or self.place
            start = self._start
            self._scan = Scan(self._namespaces, printed, list(start.roles[: start.at]) if start is not None else [])

    @property
    def is_scanning(self) -> bool:
        """The template has looked at the end, and its loop has not begun."""
        return self._scan is not None and self._loop is None

    def is_print_known(self) -> bool:
        """A print begins: what it prints is known."""
        if self._loop is not None or self._scan is not None:
            return False
        self._prints += 1
        start = self._start
        return start is not None and (not start.form or self._prints < start.prints)

    def enter(self, view: View, loop: int) -> View | Walk:
        """A loop over messages begins: the first one is the one with borders."""
        if self._loop is not None:
            return view
        offset = view._offset
        self._loop = (loop, offset)
        self._attributes = [attributes_of(made) for made in self._namespaces]
        start = self._start
        if self._scan is not None:
            self._end_scan(self._scan, start)
        self._before = [dict(attributes) for attributes in self._attributes]
        if start is None:
            return Walk(self, offset, offset)
        if (
            start.loop != self._loop
            or len(start.state) != len(self._attributes)
            or start.form != (b"" if self._scan is None else self._scan.form)
        ):
            raise NotStableError("not the way that led to the border")
        for name in start.absent:
            self._looks[name] = start.at, self.count
            if any(self.context.vars[name](self._message_at(index)) for index in range(start.at, self.count)):
                raise NotStableError("what was not there when it was looked for is there now")
        self._absent = start.absent
        for attributes, values in zip(self._attributes, start.state, strict=True):
            attributes.update(values)
        self.parts.clear()
        self.chars = 0
        return Walk(self, offset, start.at)

    def _end_scan(self, scan: Scan, start: Border | None) -> None:
        try:
            scan.end(self.context.vars, self.parts, () if start is None else start.ranges, self.see_end)
        except NotStableError:
            if start is not None:
                raise
            self._is_whole = True

    def pass_border(self, index: int) -> None:
        """All turns of the loop before message `index` are over."""
        if self._is_whole or self._loop is None:
            return
        state: tuple[dict[str, Any], ...] = ()
        for attributes, before in zip(self._attributes, self._before, strict=True):
            changed = {name: value for name, value in attributes.items() if name not in before or before[name] is not value}
            if changed and not all(map(is_plain, changed.values())):
                self.has_lost_borders = True
                return
            state += (changed,)
        needed = self._needed
        if needed < index:
            needed = index
        scan = self._scan
        if scan is None:
            self.borders.append(Border(index, needed, self.chars, self._loop, state, b"", (), (), self._absent))
        else:
            ranges = tuple(map(range_of, scan.slots))
            self.borders.append(
                Border(index, needed, self.chars, self._loop, state, scan.form, ranges, scan.roles, self._absent, self._prints)
            )


def _watching_environment() -> Environment:
    environment = make_environment()
    environment.filters[LOOP_FILTER] = enter
    environment.filters[SCAN_FILTER] = scan
    add_tests(environment)
    add_ahead(environment)
    add_offers(environment)
    environment.tests[KNOWN_TEST] = is_known
    return environment
