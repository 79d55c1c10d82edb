"""What a chat template prints around the texts of messages, as text with holes: to fill one costs no rendering.

Runs in: shards (the loop and the tokenizer's thread). A Frame is immutable.
Contract: for messages of the same shapes (prompt/texts.py), which differ in their texts and in the arguments of calls, filling a Frame
    gives what a Run from the same border prints; `fill` says None where that depends on a text that is empty, or on a word that the
    template looks for in it.
Why it holds: the frame is printed by the template itself, run on Text objects in place of the texts. A Text can be put together with
    strings, trimmed, written as JSON, and asked whether it is empty, or begins with, ends with or has a word (it says no, and that is
    noted); whatever else is done to it raises, and then there is no frame. So no step can have depended on anything else that stands in
    a text, and each hole is where a text goes as it is, or as one such step leaves it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment, pass_context
from jinja2.runtime import Context

from sglfast.prompt.kept import NotStableError
from sglfast.prompt.scans import Message
from sglfast.prompt.stable import Border, Run, StableTemplate
from sglfast.prompt.texts import Asked, Data, Hole, Messages, Shape, Text, as_json, concat, message_of, shape_of

_MAX_PARTS = 64
_MAX_CHARS = 2048  # between the texts; frames are kept by number


class Frame:
    """What is printed behind a border: strings, and holes for texts of messages, counted from the border on.

    opening: the first message, if a scan has read more of it than its role: then the frame is for conversations with that one;
    early: place (negative) and shape of others before the border, of which a scan has read more, or whose texts are asked for.
    """

    __slots__ = ("_asked", "_not_empty", "_parts", "borders", "early", "has_open_state", "opening")

    def __init__(
        self, parts: tuple[str | Hole, ...], noted: list[Hole | Asked], borders: tuple[Border, ...], opening: Message | None,
        early: tuple[tuple[int, Shape], ...],
    ) -> None:  # fmt: skip
        """borders: `chars` of each is the number of parts before it; their states may hold Texts (has_open_state)."""
        self._parts = parts
        self._not_empty = tuple(item for item in noted if isinstance(item, Hole))
        self._asked = tuple(item for item in noted if isinstance(item, Asked))
        self.borders = borders
        self.has_open_state = any(next(_holes_in(border.state), None) for border in borders)
        self.opening = opening
        self.early = early

    def fill(self, messages: Messages) -> list[str] | None:
        """The parts with the texts of the messages behind the border."""
        for hole in self._not_empty:
            if not (messages[hole.at][hole.key] if hole.key else hole.of(messages)):
                return None
        for asked in self._asked:
            if asked.is_wrong(asked.hole.of(messages)):
                return None
        parts = []
        for part in self._parts:
            if isinstance(part, str):
                parts.append(part)
            else:  # of plain messages without a call
                parts.append(messages[part.at][part.key] if part.key else part.of(messages))
        return parts

    def filled_borders(self, messages: Messages) -> Sequence[Border]:
        """The borders with the texts in their states."""
        return [border._replace(state=_filled(border.state, messages)) for border in self.borders]


def _holes_in(value: Any) -> Iterator[Hole]:
    """Holes of the texts that are kept in namespaces."""
    if type(value) is Text:
        yield from (part for part in value._parts if isinstance(part, Hole))
    elif type(value) in (list, tuple, dict):
        for item in value.values() if type(value) is dict else value:
            yield from _holes_in(item)


def _filled(value: Any, messages: Messages) -> Any:
    kind = type(value)
    if kind is Text:
        return "".join(part if isinstance(part, str) else part.of(messages) for part in value._parts)
    if kind is dict:
        return {name: _filled(item, messages) for name, item in value.items()}
    return kind(_filled(item, messages) for item in value) if kind in (list, tuple) else value


class FrameMaker:
    """Makes frames of one template."""

    def __init__(self, template: StableTemplate) -> None:
        self._template = template.twin(_for_texts)

    def make(
        self, border: Border, opening_role: str | None, before: Shape | None, shapes: Sequence[Shape], variables: Mapping[str, Any],
        early_at: Callable[[int], Message],
    ) -> Frame | None:  # fmt: skip
        """The frame of messages of these shapes behind a border; None when there is none.

        opening_role: of the conversation's first message, if that has nothing but a text besides; before: shape of the last message
        before the border; early_at: messages before the border, for scans, whose outcome is the same in all conversations that have the
        border's `form`.
        """
        noted: list[Hole | Asked] = []
        known: dict[int, Message] = {}
        opening: list[Message] = []
        early: dict[int, Shape] = {}
        assured: dict[int, Shape] = {}  # by the turn that the border belongs to

        def message_at(at: int) -> Message:
            if at not in known:
                place = at - border.at
                shape = shapes[place] if place >= 0 else opening_role if at == 0 else before if place == -1 else None
                if shape is None:
                    raise NotStableError("a message that is not known")
                known[at] = message_of(shape, place, noted)
                assured[place] = shape
            return known[at]

        def glance_at(at: int) -> Message:
            if at >= border.at:
                return message_at(at)
            message = early_at(at)
            if at == 0:
                opening[:] = [message]
                return message
            shape = shape_of(message)
            if shape is None:
                raise NotStableError("an unusual message")
            early[at - border.at] = shape
            return message_of(shape, at - border.at, noted)

        run = self._template.run(border.at + len(shapes), message_at, variables, border, glance_at)
        try:
            ends = _go_through(run)
        except Exception:  # a template can raise anything
            return None
        parts: tuple[str | Hole, ...] = tuple(
            part for printed in run.parts for part in (printed._parts if isinstance(printed, Text) else (printed,))
        )
        # Without its borders nothing could be remembered behind a frame.
        chars = sum(len(part) for part in parts if isinstance(part, str))
        if run.has_lost_borders or len(parts) > _MAX_PARTS or chars > _MAX_CHARS:
            return None
        holes = [part for part in parts if not isinstance(part, str)]
        holes += [hole for border in run.borders for hole in _holes_in(border.state)]
        holes += [item.hole if isinstance(item, Asked) else item for item in noted]
        early.update((hole.at, assured[hole.at]) for hole in holes if hole.at < 0 and hole.at not in early)
        borders = tuple(found._replace(chars=ends[found.chars]) for found in run.borders)
        return Frame(parts, noted, borders, opening[0] if opening else None, tuple(early.items()))


def _go_through(run: Run) -> list[int]:
    """Run it, its characters counted as prints; returns how many parts there are before each print."""
    ends = [0]
    for printed in run.rendering:
        if run.chars == 0:  # the loop was entered, or nothing is printed yet
            del ends[1:]
        run.parts.append(printed)
        run.chars += 1
        ends.append(ends[-1] + (len(printed._parts) if isinstance(printed, Text) else 1))
    run.check_end()
    return ends


def _for_texts(environment: Environment, words: dict[str, Any]) -> None:
    """Let a compiled template, whose global words are given, work with Texts."""
    filters: dict[str, Any] = environment.filters
    tests: dict[str, Any] = environment.tests
    trim, tojson = filters["trim"], filters["tojson"]

    @pass_context
    def tojson_of(
        context: Context, value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> Any:
        form = (ensure_ascii, indent, separators, sort_keys)
        try:
            return tojson(context, value, *form)
        except TypeError:  # there is a Text in it
            return as_json(value, form)

    filters["tojson"] = tojson_of
    filters["trim"] = lambda value, chars=None: value.strip(chars) if type(value) is Text else trim(value, chars)
    for name in ("string", "iterable", "sequence"):
        tests[name] = _or_of(Text, tests[name])
    for name in ("mapping", "iterable", "sequence"):
        tests[name] = _or_of(Data, tests[name])
    tests["sameas"] = _same_of(tests["sameas"])
    environment.concat = concat  # type: ignore[method-assign]
    words["str"] = lambda value: value if type(value) is Text else str(value)
    words["str_join"] = concat


def _same_of(test: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def is_same(value: Any, other: Any) -> bool:
        for one, two in ((value, other), (other, value)):
            if type(one) in (Text, Data) and not isinstance(two, bool | None):
                raise NotStableError("it is asked what object a text is")  # short strings are one object
        return test(value, other)

    return is_same


def _or_of(kind: type, test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind or test(value)
