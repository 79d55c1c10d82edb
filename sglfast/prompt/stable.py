"""Rendering of a conversation from the middle: the text behind its first messages alone, when what comes before them is known.

Runs in: shards (the loop and the tokenizer's thread). A StableTemplate may be used from any thread, a Run by one at a time.
Contract: the text of a Run that was started at a border of an earlier Run is what the whole text has behind that border, exactly, for
    every conversation whose first `needed` messages and other variables are the same. Where that cannot be vouched for there is no
    border, or NotStableError, and the caller renders the whole.
Why it holds. A template is a program without input but its variables, so two runs go the same way as long as all they have read is
    the same. Here it gets its messages from a View, which notes what is read: `needed` counts the messages that any step so far has
    looked at, and a run that has asked for their number, or come to their end, has no more borders. What stands before a border
    was printed by steps that read no more than that. To begin at the border, the same program runs again on the whole conversation,
    but its loop over the messages starts in the middle: everything before the loop is set anew (only what it would print is left
    out), and the one thing that jinja2 carries from one turn of a loop to the next, the attributes of namespaces, is put back as
    it was. Templates with any other memory are refused (prompt/orderly.py).
    The clock is read through the Run: its words are part of what must be the same (`stamp`).
"""

from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any, NamedTuple, NoReturn

from jinja2 import Environment, Template
from jinja2.runtime import Context, LoopContext
from jinja2.utils import Namespace

from sglfast.prompt.orderly import KNOWN_TEST, LOOP_FILTER, is_orderly, mark_loops
from sglfast.prompt.template import ChatTemplate, make_environment, strftime_now

Message = dict[str, Any]

_OF_THE_RUN = object()  # stands for a function that each run has of its own
_CLOCK_FORMATS = 8
_VALUES = 64  # plain values in one namespace attribute that holds a list or a dict


class NotStableError(Exception):
    """The template does something with the conversation that cannot be followed here."""


class Border(NamedTuple):
    """A place between two messages of a rendered conversation.

    at: number of the message behind it; needed: messages, from the first, that decide about all text before it; chars: of the run's text
    before it; loop: which loop over which rest of the messages; state: what each namespace has that it had not before the loop.
    """

    at: int
    needed: int
    chars: int
    loop: tuple[int, int]
    state: tuple[dict[str, Any], ...]

    @property
    def size_bytes(self) -> int:
        """What it costs to remember."""
        if not self.state:
            return 200
        return 200 + sum(200 + sum(100 + len(name) + _size_bytes(value) for name, value in values.items()) for values in self.state)


class StableTemplate:
    """A chat template, compiled a second time so that its loop over the messages can be watched and begun in the middle."""

    def __init__(self, code: CodeType, chat: ChatTemplate, change: Callable[[Environment, dict[str, Any]], None] | None = None) -> None:
        """Use `of`."""
        environment = _watching_environment()
        template = Template.from_code(environment, code, environment.make_globals(None))
        words = template.root_render_func.__globals__
        words["LoopContext"] = _WatchedLoop
        if change is not None:
            change(environment, words)
        self._code = code
        self._chat = chat
        self._environment = environment
        self._render = template.root_render_func
        self._globals = {**template.globals, "documents": None}
        self.has_previtem = "previtem" in chat.source
        self.clock_formats: list[str] = []

    @classmethod
    def of(cls, chat: ChatTemplate) -> "StableTemplate | None":
        """The same template, None when no conversation can be rendered from the middle with it."""
        environment = _watching_environment()
        tree = environment.parse(chat.source)
        if not is_orderly(tree) or not mark_loops(tree):
            return None
        tree.set_environment(environment)
        return cls(environment.compile(tree), chat)

    def twin(self, change: Callable[[Environment, dict[str, Any]], None]) -> "StableTemplate":
        """The same program with other ways: `change` gets its own environment and the global words of its code."""
        other = StableTemplate(self._code, self._chat, change)
        other.clock_formats = self.clock_formats
        return other

    def stamp(self) -> tuple[str, ...]:
        """What the clock says now in every format in which the template has asked it."""
        return tuple(map(strftime_now, self.clock_formats)) if self.clock_formats else ()

    def variables(self, tools: object, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What a template sees besides messages; as long as it is the same, Runs may begin at borders of each other."""
        own = {"add_generation_prompt": True, "tools": tools, "messages": None}
        functions = dict.fromkeys(("namespace", "strftime_now"), _OF_THE_RUN)
        return {**self._globals, **functions, **self._chat.special_tokens, **kwargs, **own}

    def run(self, count: int, message_at: Callable[[int], Message], variables: Mapping[str, Any], start: Border | None = None) -> "Run":
        """Render `count` messages, or what stands behind a border. message_at: is asked for messages when they are needed."""
        run = Run(self, count, message_at, start)
        mine = dict(variables)
        mine["messages"] = View(run, 0)
        if mine["namespace"] is _OF_THE_RUN:
            mine["namespace"] = run.namespace
        if mine["strftime_now"] is _OF_THE_RUN:
            mine["strftime_now"] = run.strftime_now
        run.rendering = self._render(Context(self._environment, mine, None, {}))
        return run


class Run:
    """One rendering, as far as it was asked for: its text bit by bit in `parts`, and the borders that it has passed."""

    __slots__ = (
        "_attributes", "_before", "_is_whole", "_loop", "_message_at", "_namespaces", "_needed", "_start",
        "borders", "chars", "clock", "count", "has_lost_borders", "parts", "rendering", "template",
    )  # fmt: skip

    def __init__(self, template: StableTemplate, count: int, message_at: Callable[[int], Message], start: Border | None) -> None:
        """Use StableTemplate.run."""
        self.template = template
        self.count = count
        self.rendering: Iterator[str] = iter(())
        self.parts: list[str] = []
        self.chars = 0
        self.borders: list[Border] = []
        self.clock: dict[str, str] = {}
        self.has_lost_borders = False  # by something in a namespace that cannot be kept
        self._message_at = message_at
        self._start = start
        self._needed = start.needed if start is not None else 0
        self._is_whole = False  # the number of messages has made a difference
        self._loop: tuple[int, int] | None = None
        self._namespaces: list[Namespace] = []
        self._attributes: list[dict[str, Any]] = []  # of the namespaces that were there before the loop
        self._before: list[dict[str, Any]] = []

    def go_on(self, chars: int | None = None) -> bool:
        """Render until there are so many characters; True: there is no more. Whatever a template raises comes out."""
        parts = self.parts
        for part in self.rendering:
            parts.append(part)
            self.chars += len(part)
            if chars is not None and self.chars >= chars:
                return False
        self.check_end()
        return True

    def check_end(self) -> None:
        """All is rendered. Raises NotStableError when it is not what stands behind the border."""
        if self._start is not None and self._loop is None:
            raise NotStableError("the loop over the messages was not reached")

    def opening(self) -> Message | None:
        """The first message, None when there is none."""
        return self._message_at(0) if self.count else None

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

    # ---- what Views and loops note ----

    def take(self, index: int) -> Message:
        """A message that the template looks at."""
        if index >= self._needed:
            self._needed = index + 1
        return self._message_at(index)

    def see_end(self) -> None:
        """The template has learned how many messages there are."""
        self._is_whole = True

    @property
    def is_before_start(self) -> bool:
        """What is printed now is known."""
        return self._start is not None and self._loop is None

    def enter(self, view: "View", loop: int) -> "View | _Walk":
        """A loop over messages begins: the first one is the one with borders."""
        if self._loop is not None:
            return view
        offset = view._offset
        self._loop = (loop, offset)
        self._attributes = [made._Namespace__attrs for made in self._namespaces]
        self._before = [dict(attributes) for attributes in self._attributes]
        start = self._start
        if start is None:
            return _Walk(self, offset, offset)
        if start.loop != self._loop or len(start.state) != len(self._attributes):
            raise NotStableError("not the way that led to the border")
        for attributes, values in zip(self._attributes, start.state, strict=True):
            attributes.update(values)
        self.parts.clear()
        self.chars = 0
        return _Walk(self, offset, start.at)

    def pass_border(self, index: int) -> None:
        """All turns of the loop before message `index` are over."""
        if self._is_whole or self._loop is None:
            return
        state: tuple[dict[str, Any], ...] = ()
        for attributes, before in zip(self._attributes, self._before, strict=True):
            changed = {name: value for name, value in attributes.items() if name not in before or before[name] is not value}
            if changed and not all(map(_is_plain, changed.values())):
                self.has_lost_borders = True
                return
            state += (changed,)
        needed = self._needed
        self.borders.append(Border(index, needed if needed > index else index, self.chars, self._loop, state))


class View:
    """The messages as a template sees them, from one of them on: a list that notes what is read.

    No list's subclass: what is not spelled out here would be answered by an empty list; so it is refused.
    """

    __slots__ = ("_offset", "_run")

    def __init__(self, run: Run, offset: int) -> None:
        self._run = run
        self._offset = offset

    def __len__(self) -> int:
        self._run.see_end()
        return max(0, self._run.count - self._offset)

    def __bool__(self) -> bool:
        run = self._run
        if self._offset >= run.count:
            run.see_end()
            return False
        run.take(self._offset)
        return True

    def __iter__(self) -> Iterator[Message]:
        run = self._run
        for index in range(self._offset, run.count):
            yield run.take(index)
        run.see_end()

    def __getitem__(self, key: Any) -> Any:
        run = self._run
        if type(key) is int and key >= 0:
            if self._offset + key < run.count:
                return run.take(self._offset + key)
        elif type(key) is slice and key.stop is None and key.step in (None, 1) and (key.start is None or _is_place(key.start)):
            return View(run, self._offset + (key.start or 0))
        # Anything else depends on the end, or is what a list refuses too.
        run.see_end()
        return [run.take(index) for index in range(self._offset, run.count)][key]

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotStableError(f"messages.{name}")

    def _refuse(self, *_: object) -> NoReturn:
        raise NotStableError("the messages are used as a whole")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __contains__ = _refuse
    __str__ = __repr__ = __format__ = __hash__ = _refuse


class _Walk:
    """What the loop over the messages walks over: all of a View, or its rest from message `first` on."""

    __slots__ = ("first", "offset", "run")

    def __init__(self, run: Run, offset: int, first: int) -> None:
        self.run = run
        self.offset = offset
        self.first = first

    def __len__(self) -> int:
        self.run.see_end()
        return max(0, self.run.count - self.offset)

    def __iter__(self) -> Iterator[Message]:
        """For a loop that does not use `loop`: every step is one from turn to turn."""
        run = self.run
        for index in range(self.first, run.count):
            run.pass_border(index)
            yield run.take(index)
        run.pass_border(run.count)
        run.see_end()

    def ahead(self) -> Iterator[Message]:
        """For a loop that may look ahead: borders are passed by the loop itself."""
        run = self.run
        for index in range(self.first, run.count):
            yield run.take(index)
        run.see_end()


class _WatchedLoop(LoopContext):
    """jinja2's `loop`, begun in the middle where a _Walk says so."""

    _walk: _Walk | None = None

    def __init__(self, iterable: Any, undefined: Any, recurse: Any = None, depth0: int = 0) -> None:
        super().__init__(iterable, undefined, recurse, depth0)
        if type(iterable) is _Walk:
            self._walk = iterable
            self._iterator = iterable.ahead()  # type: ignore[assignment]
            self.index0 = iterable.first - iterable.offset - 1
            if self.index0 >= 0 and iterable.run.template.has_previtem:
                self._current = iterable.run.take(iterable.first - 1)

    def __next__(self) -> Any:
        walk = self._walk
        if walk is not None:
            walk.run.pass_border(walk.offset + self.index0 + 1)
        return super().__next__()


def _watching_environment() -> Environment:
    environment = make_environment()
    environment.filters[LOOP_FILTER] = _enter
    environment.tests[KNOWN_TEST] = _is_known
    return environment


def _enter(value: Any, loop: int) -> Any:
    return value._run.enter(value, loop) if type(value) is View else value


def _is_known(value: Any) -> bool:
    return type(value) is View and value._run.is_before_start


def _is_place(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is data that nothing can change: lists and dicts too, since the sandbox lets no template change them."""
    if value is None or type(value) in (str, int, bool, float):
        return True
    if type(value) in (list, tuple):
        return depth < 3 and len(value) <= _VALUES and all(_is_plain(item, depth + 1) for item in value)
    if type(value) is dict:
        return depth < 3 and len(value) <= _VALUES and all(_is_plain(item, depth + 1) for pair in value.items() for item in pair)
    return False


def _size_bytes(value: Any) -> int:
    if type(value) is str:
        return 50 + 4 * len(value)
    if type(value) in (list, tuple):
        return 60 + sum(8 + _size_bytes(item) for item in value)
    if type(value) is dict:
        return 100 + sum(_size_bytes(key) + _size_bytes(item) for key, item in value.items())
    return 32
