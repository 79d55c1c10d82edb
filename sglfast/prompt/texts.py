"""What stands in messages, as a template sees it while a frame is made: places whose content is not known, and questions about it.

Runs in: shards (the loop and the tokenizer's thread). What is here belongs to one FrameMaker.make (prompt/frames.py), but for Holes, which
    a Frame keeps, and shapes.
Contract: a Text or a Data answers only what would be answered the same whatever stands in its place, and notes what was taken for
    granted; whatever else is done to it raises. Two messages of one `shape_of` differ in texts and arguments only.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from sglfast.prompt.kept import NotStableError
from sglfast.prompt.scans import Message
from sglfast.prompt.template import tojson

# Of a message that has a text and nothing else its role, else tuples.
Shape = str | tuple[Any, ...]
# Messages by their place behind a border; those before it have negative ones.
Messages = Sequence[Message] | Mapping[int, Message]
Form = tuple[Any, ...]  # a method of strings or `tojson`, and what it is called with

_TEXT, _DATA, _NOTHING = ("text",), ("data",), ("is", None)
_WORDS = frozenset({"role", "type"})  # of these there are few, and templates ask which one it is
_DATA_KEY = "arguments"
_DEPTH, _ITEMS, _LEAVES = 5, 16, 256  # of one message
_WORD_CHARS = 64


def shape_of(message: Message) -> Shape | None:
    """All of a message but its texts and the arguments of its calls; None where it is an unusual one."""
    if len(message) == 2 and type(message["content"]) is str:
        return str(message["role"])
    try:
        return _shape(message, _DEPTH, [_LEAVES])
    except NotStableError:
        return None


def _shape(value: Any, depth: int, left: list[int]) -> tuple[Any, ...]:
    """left: how many more items there may be."""
    kind = type(value)
    if kind in (dict, list):
        left[0] -= len(value)
        if not depth or len(value) > _ITEMS or left[0] < 0:
            raise NotStableError("a message with much in it")
    if kind is dict:
        shape: list[Any] = ["dict"]
        for name, item in value.items():
            if len(name) > _WORD_CHARS or (name in _WORDS and type(item) is str and len(item) > _WORD_CHARS):
                raise NotStableError("a long word")  # shapes are remembered, and not by their bytes
            if type(item) is str:
                shape += (name, _TEXT if item and name not in _WORDS else ("is", item))
            elif name == _DATA_KEY and type(item) is dict:
                shape += (name, _DATA)
            else:
                shape += (name, _NOTHING if item is None else _shape(item, depth - 1, left))
    elif kind is list:
        shape = ["list", *[_shape(item, depth - 1, left) for item in value]]
    elif kind is str:
        return _TEXT if value else ("is", value)
    elif kind in (bool, int, float):
        return ("is", value, repr(value))  # True is 1 to a dict of frames
    else:
        raise NotStableError("a message with something in it that JSON has not")
    return tuple(shape)


def message_of(shape: Shape, at: int, noted: "list[Hole | Asked]") -> Message:
    """A message of this shape, with Texts and Data in it."""
    if isinstance(shape, str):
        return {"role": shape, "content": Text((Hole(at, ("content",)),), noted)}
    message: Message = _made(shape, at, (), noted)
    return message


def _made(shape: tuple[Any, ...], at: int, path: tuple[str | int, ...], noted: "list[Hole | Asked]") -> Any:
    if shape == _TEXT:
        return Text((Hole(at, path),), noted)
    if shape == _DATA:
        return Data(Hole(at, path), noted)
    kind, *parts = shape
    if kind == "is":
        return parts[0]
    if kind == "list":
        return [_made(part, at, (*path, place), noted) for place, part in enumerate(parts)]
    return {name: _made(part, at, (*path, name), noted) for name, part in zip(parts[::2], parts[1::2], strict=True)}


class Hole:
    """The place of what a path leads to in message `at`; form: what is made of it, None: it is taken as it is.

    key: the whole way where that is a single step, and nothing is made of it; else "".
    """

    __slots__ = ("at", "form", "key", "path")

    def __init__(self, at: int, path: tuple[str | int, ...], form: Form | None = None) -> None:
        self.at = at
        self.path = path
        self.form = form
        self.key = str(path[0]) if len(path) == 1 and form is None else ""

    def of(self, messages: Messages) -> Any:
        """What goes there."""
        value: Any = messages[self.at]
        for key in self.path:
            value = value[key]
        form = self.form
        if form is None:
            return value
        return tojson(value, *form[1:]) if form[0] == "tojson" else getattr(value, form[0])(*form[1:])


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


class _Unknown:
    """What a template cannot look at. What it can, a subclass says."""

    __slots__ = ()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotStableError(f"text.{name}")

    def _refuse(self, *_: object) -> NoReturn:
        raise NotStableError("what a template prints depends on a text")

    # jinja2 takes a TypeError of these for an answer, or Python has one of its own.
    __eq__ = __ne__ = __hash__ = __getitem__ = __iter__ = __len__ = __int__ = __float__ = __index__ = _refuse
    __str__ = __repr__ = __format__ = __mod__ = __rmod__ = __mul__ = __rmul__ = _refuse


class Text(_Unknown):
    """Strings and holes, as a template sees them: a text of which nothing is known."""

    __slots__ = ("_noted", "_parts")

    _is_plain = True  # for kept.is_plain: a Frame puts the text in its place

    def __init__(self, parts: tuple[str | Hole, ...], noted: list[Hole | Asked]) -> None:
        """noted: gets holes that were asked whether they are empty, and were taken not to be, and other questions."""
        self._parts = parts
        self._noted = noted

    def _joined(self, others: Sequence[object], *, is_before: bool) -> "Text":
        """With strings and other Texts put before or behind it."""
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

    def strip(self, chars: object = None) -> "Text":
        """A method of strings that templates use."""
        return self._formed("strip", chars)

    def lstrip(self, chars: object = None) -> "Text":
        """As `strip`."""
        return self._formed("lstrip", chars)

    def rstrip(self, chars: object = None) -> "Text":
        """As `strip`."""
        return self._formed("rstrip", chars)

    def startswith(self, word: object) -> bool:
        """As `strip`."""
        return self._ask("begin", word)

    def endswith(self, word: object) -> bool:
        """As `strip`."""
        return self._ask("end", word)

    def __contains__(self, word: object) -> bool:
        return self._ask("in", word)

    def _hole(self) -> Hole:
        """The one that this is; raises NotStableError when it is more than that."""
        hole = self._parts[0] if len(self._parts) == 1 else ""
        if isinstance(hole, str):
            raise NotStableError("a text with something around it is looked at")
        return hole

    def _formed(self, *form: object) -> "Text":
        hole = self._hole()
        if hole.form not in (None, form) or type(form[1]) not in (str, type(None)):
            raise NotStableError("a text is changed twice")
        return Text((Hole(hole.at, hole.path, form),), self._noted)

    def _ask(self, where: str, word: object) -> bool:
        if type(word) is not str:
            raise NotStableError("what a template prints depends on a text")
        self._noted.append(Asked(self._hole(), where, word))
        return False


class Data(_Unknown):
    """A dict of which a template can see no more than that it is one, and not empty."""

    __slots__ = ("_hole", "_noted")

    def __init__(self, hole: Hole, noted: list[Hole | Asked]) -> None:
        self._hole = hole
        self._noted = noted

    def __bool__(self) -> bool:
        self._noted.append(self._hole)
        return True

    __contains__ = _Unknown._refuse


def concat(values: Iterable[Any]) -> Any:
    """Values one behind the other as `str` has them: a string, or a Text where there is one among them."""
    parts: list[Any] = [value if type(value) is Text else str(value) for value in values]
    for place, part in enumerate(parts):
        if type(part) is Text:
            whole = part._joined(parts[:place], is_before=True) if place else part
            return whole._joined(parts[place + 1 :], is_before=False)
    return "".join(parts)


def as_json(value: Any, form: Form) -> Any:
    """What `tojson` of a value prints, as `concat`; form: its other arguments."""
    if type(value) in (Text, Data):
        hole = value._hole() if type(value) is Text else value._hole
        if hole.form is not None:
            raise NotStableError("a text is changed twice")
        return Text((Hole(hole.at, hole.path, ("tojson", *form)),), value._noted)
    if type(value) not in (dict, list):
        return tojson(value, *form)
    if form[1:] != (None, None, False):
        raise NotStableError("texts are written in an unusual form")
    parts: list[Any] = []
    for name in value:
        parts.append(", " if parts else "")
        if type(value) is list:
            parts.append(as_json(name, form))
        elif type(name) is str:
            parts += (tojson(name, *form), ": ", as_json(value[name], form))
        else:
            raise NotStableError("a name that is no string")
    return concat(("[", *parts, "]") if type(value) is list else ("{", *parts, "}"))
