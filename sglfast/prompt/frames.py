"""What a chat template prints around plain messages, as text with holes: to fill one costs no rendering.

Runs in: shards (the loop and the tokenizer's thread). A Frame is immutable.
Contract: for messages of the same roles that have a text and nothing else, filling a Frame gives what a Run from the same border prints,
    whatever the texts are; `fill` says None where that depends on a text that is empty, or on a word that the template looks for in it.
Why it holds: the frame is printed by the template itself, run on Text objects in place of the texts. A Text can be put together with
    strings, trimmed, and asked whether it is empty, or begins with, ends with or has a word (it says no, and that is noted); whatever
    else is done to it raises, and then there is no frame. So no step can have depended on anything else that stands in a text, and each
    hole is where a text goes as it is, or trimmed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from jinja2 import Environment

from sglfast.prompt.kept import NotStableError
from sglfast.prompt.scans import Message
from sglfast.prompt.stable import Border, Run, StableTemplate

_MAX_PARTS = 64


class Hole:
    """The place of a text: of message `at`, trimmed or as it is."""

    __slots__ = ("at", "is_trimmed")

    def __init__(self, at: int, is_trimmed: bool) -> None:
        self.at = at
        self.is_trimmed = is_trimmed


class Asked(NamedTuple):
    """A question of a template that was answered with no: where the text of `hole` has `word`."""

    hole: Hole
    where: str
    word: str

    def is_wrong(self, text: str) -> bool:
        """Whether the answer for this text is yes."""
        if self.where == "begin":
            return text.startswith(self.word)
        return text.endswith(self.word) if self.where == "end" else self.word in text


class Text:
    """Strings and holes, as a template sees them: a text of which nothing is known."""

    __slots__ = ("_noted", "_parts")

    def __init__(self, parts: tuple[str | Hole, ...], noted: list[Hole | Asked]) -> None:
        self._parts = parts
        self._noted = noted  # holes that were asked whether they are empty, and were taken not to be; other questions

    def _joined(self, others: Sequence[object], *, is_before: bool) -> "Text":
        parts: tuple[str | Hole, ...] = ()
        for other in others:
            if type(other) is Text:
                parts += other._parts
            elif type(other) is str:
                parts += (other,) if other else ()
            else:
                raise NotStableError("a text is put together with what is none")
        return Text(parts + self._parts if is_before else self._parts + parts, self._noted)

    def __add__(self, other: object) -> "Text":
        return self._joined((other,), is_before=False)

    def __radd__(self, other: object) -> "Text":
        return self._joined((other,), is_before=True)

    def __bool__(self) -> bool:
        if not any(part for part in self._parts if isinstance(part, str)):
            holes = [part for part in self._parts if isinstance(part, Hole)]
            if len(holes) != 1:
                raise NotStableError("whether a text is empty depends on several")
            self._noted.append(holes[0])
        return True

    def strip(self) -> "Text":
        """A method of strings that templates use."""
        return Text((Hole(self._hole().at, True),), self._noted)

    def startswith(self, word: object) -> bool:
        """As `strip`."""
        return self._ask("begin", word)

    def endswith(self, word: object) -> bool:
        """As `strip`."""
        return self._ask("end", word)

    def __contains__(self, word: object) -> bool:
        return self._ask("in", word)

    def _hole(self) -> Hole:
        hole = self._parts[0] if len(self._parts) == 1 else ""
        if isinstance(hole, str):
            raise NotStableError("a text with something around it is looked at")
        return hole

    def _ask(self, where: str, word: object) -> bool:
        if type(word) is not str:
            raise NotStableError("what a template prints depends on a text")
        self._noted.append(Asked(self._hole(), where, word))
        return False

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotStableError(f"text.{name}")

    def _refuse(self, *_: object) -> NoReturn:
        raise NotStableError("what a template prints depends on a text")

    # jinja2 takes a TypeError of these for an answer, or Python has one of its own.
    __eq__ = __ne__ = __hash__ = __getitem__ = __iter__ = __len__ = __int__ = __float__ = __index__ = _refuse
    __str__ = __repr__ = __format__ = __mod__ = __rmod__ = __mul__ = __rmul__ = _refuse


class Frame:
    """What is printed behind a border: strings, and holes for texts of messages, counted from the border on.

    opening: the first message, if a scan has read more of it than its role: then the frame is for conversations with that one.
    """

    __slots__ = ("_asked", "_not_empty", "_parts", "borders", "opening")

    def __init__(
        self, parts: tuple[str | Hole, ...], noted: list[Hole | Asked], borders: tuple[Border, ...], opening: Message | None
    ) -> None:  # fmt: skip
        """borders: `chars` of each is the number of parts before it."""
        self._parts = parts
        self._not_empty = tuple(item for item in noted if isinstance(item, Hole))
        self._asked = tuple(item for item in noted if isinstance(item, Asked))
        self.borders = borders
        self.opening = opening

    def fill(self, messages: Sequence[Message]) -> list[str] | None:
        """The parts with the texts of the messages behind the border."""
        for hole in self._not_empty:
            content = messages[hole.at]["content"]
            if not (content.strip() if hole.is_trimmed else content):
                return None
        for asked in self._asked:
            content = messages[asked.hole.at]["content"]
            if asked.is_wrong(content.strip() if asked.hole.is_trimmed else content):
                return None
        parts = []
        for part in self._parts:
            if isinstance(part, str):
                parts.append(part)
            else:
                content = messages[part.at]["content"]
                parts.append(content.strip() if part.is_trimmed else content)
        return parts


class FrameMaker:
    """Makes frames of one template."""

    def __init__(self, template: StableTemplate) -> None:
        self._template = template.twin(_for_texts)

    def make(
        self, border: Border, opening_role: str | None, roles: Sequence[str], variables: Mapping[str, Any], opening: Callable[[], Message]
    ) -> Frame | None:
        """The frame of messages of these roles behind a border; None when there is none.

        opening_role: of the conversation's first message, if that has nothing but a text besides; opening: that message, for scans,
        whose outcome is the same in all conversations that have the border's `form`.
        """
        noted: list[Hole | Asked] = []
        known: dict[int, Message] = {}
        read: list[Message] = []

        def message_at(at: int) -> Message:
            if at not in known:
                role = roles[at - border.at] if at >= border.at else opening_role if at == 0 else None
                if role is None:
                    raise NotStableError("a message that is not known")
                known[at] = {"role": role, "content": Text((Hole(at - border.at, False),), noted)}
            return known[at]

        def glance_at(at: int) -> Message:
            if at or not border.at:
                return message_at(at)
            read.append(opening())
            return read[0]

        run = self._template.run(border.at + len(roles), message_at, variables, border, glance_at)
        try:
            ends = _go_through(run)
        except Exception:  # a template can raise anything
            return None
        parts = tuple(part for printed in run.parts for part in (printed._parts if isinstance(printed, Text) else (printed,)))
        # Without its borders nothing could be remembered behind a frame.
        if (
            run.has_lost_borders
            or len(parts) > _MAX_PARTS
            or any(isinstance(part, Hole) and part.at < 0 for part in parts)
            or any((item.hole if isinstance(item, Asked) else item).at < 0 for item in noted)
        ):
            return None
        borders = tuple(found._replace(chars=ends[found.chars]) for found in run.borders)
        return Frame(parts, noted, borders, read[0] if read else None)


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
    trim = filters["trim"]
    filters["trim"] = lambda value, chars=None: value.strip() if type(value) is Text and chars is None else trim(value, chars)
    for name in ("string", "iterable", "sequence"):
        tests[name] = _or_text(tests[name])
    environment.concat = _concat  # type: ignore[method-assign]
    words["str"] = lambda value: value if type(value) is Text else str(value)
    words["str_join"] = _concat


def _or_text(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is Text or test(value)


def _concat(values: Any) -> Any:
    parts: list[Any] = [value if type(value) is Text else str(value) for value in values]
    for place, part in enumerate(parts):
        if type(part) is Text:
            whole = part._joined(parts[:place], is_before=True) if place else part
            return whole._joined(parts[place + 1 :], is_before=False)
    return "".join(parts)
