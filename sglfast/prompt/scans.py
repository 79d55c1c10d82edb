"""What a chat template finds out about a whole conversation before it prints: followed, so that borders hold in spite of it.

Runs in: shards (the loop and the tokenizer's thread). What is here belongs to one Run (prompt/stable.py).
Contract: two runs that come to their loop over the messages with the same `form_of`, and whose Slots have values within the same ranges,
    go the same way through the loop as long as the messages they read in it are the same.
Why it holds. Many templates look for the last question, or check the roles, before they print anything. That scan is done anew in
    each run, over messages that are read only where it asks for them (Glance). What it leaves behind is all in top-level variables and
    namespaces, so these are compared. Numbers that it has set, mostly the place of a message, are another one in each turn of a
    conversation: the loop gets them as Slots, which note how they compared. Whatever else is done with a Slot takes its value, and
    is told to the Run, which has no more borders then.
"""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, NoReturn

from jinja2 import Environment
from jinja2.utils import Namespace

from sglfast.prompt.kept import NotStableError, form_of

Message = dict[str, Any]
Range = tuple[int, int]

_FAR = 1 << 62
_DICT_ATTRIBUTES = frozenset(dir(dict))


class Glance:
    """A message as a scan sees it, asked for when something of it is wanted. It answers as the dict would, or not at all."""

    __slots__ = ("_at", "_message_at", "_roles")

    def __init__(self, message_at: Callable[[int], Message], at: int, roles: list[str | None]) -> None:
        """roles: of messages, from the first on; gets this one's."""
        self._message_at = message_at
        self._at = at
        self._roles = roles

    def get(self, key: Any, default: Any = None) -> Any:
        """As of a dict."""
        return self._message_at(self._at).get(key, default)

    def __getitem__(self, key: Any) -> Any:
        at, roles = self._at, self._roles
        if type(key) is str and key == "role":
            known = roles[at] if at < len(roles) else None
            if known is not None:
                return known
            role = self._message_at(at)["role"]
            if type(role) is str:
                roles.extend([None] * (at + 1 - len(roles)))  # many go through a conversation from its end
                roles[at] = role
            return role
        return self._message_at(at)[key]

    def __contains__(self, key: Any) -> bool:
        return key in self._message_at(self._at)

    def __iter__(self) -> Iterator[str]:
        return iter(self._message_at(self._at))

    def __len__(self) -> int:
        return len(self._message_at(self._at))

    def __getattr__(self, name: str) -> NoReturn:
        if name in _DICT_ATTRIBUTES and not name.startswith("__"):
            raise NotStableError(f"message.{name}")
        raise AttributeError(name)

    def _refuse(self, *_: object) -> NoReturn:
        raise NotStableError("a message is used as a whole")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __or__ = __ror__ = _refuse
    __str__ = __repr__ = __format__ = __hash__ = _refuse


class Slot:
    """A whole number that a scan has set, which notes between which numbers it would have compared as it did."""

    __slots__ = ("_high", "_low", "_take", "_value")

    def __init__(self, value: int, within: Range, take: Callable[[], None]) -> None:
        """take: is told that the value itself makes a difference."""
        self._value = value
        self._low, self._high = within
        self._take = take

    def _whole(self) -> int:
        """The number itself, which is told."""
        self._take()
        return self._value

    def _is_least(self, limit: int) -> bool:
        """Whether it is `limit` at least."""
        if self._value >= limit:
            self._low = max(self._low, limit)
            return True
        self._high = min(self._high, limit - 1)
        return False

    def __gt__(self, other: object) -> bool:
        return self._is_least(other + 1) if type(other) is int else NotImplemented

    def __ge__(self, other: object) -> bool:
        return self._is_least(other) if type(other) is int else NotImplemented

    def __lt__(self, other: object) -> bool:
        return not self._is_least(other) if type(other) is int else NotImplemented

    def __le__(self, other: object) -> bool:
        return not self._is_least(other + 1) if type(other) is int else NotImplemented

    def __eq__(self, other: object) -> bool:
        if type(other) is int:
            return self._is_least(other) and not self._is_least(other + 1)
        return bool(self._whole() == other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        return self != 0

    def __hash__(self) -> int:
        return hash(self._whole())

    def __index__(self) -> int:
        return self._whole()

    def __str__(self) -> str:
        return str(self._whole())

    def __format__(self, form: str) -> str:
        return format(self._whole(), form)

    def __repr__(self) -> str:
        return repr(self._whole())

    def __add__(self, other: Any) -> Any:
        return self._whole() + other

    def __radd__(self, other: Any) -> Any:
        return other + self._whole()

    def __sub__(self, other: Any) -> Any:
        return self._whole() - other

    def __rsub__(self, other: Any) -> Any:
        return other - self._whole()

    def __mod__(self, other: Any) -> Any:
        return self._whole() % other

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotStableError(f"number.{name}")


def range_of(slot: Slot) -> Range:
    """The least and the greatest number that would have compared as this one did."""
    return slot._low, slot._high


class Scan:
    """The part of a run behind the first step that depends on the conversation's end, up to the loop over its messages."""

    __slots__ = ("_before", "_namespaces", "form", "parts", "roles", "slots")

    def __init__(self, namespaces: list[Namespace], parts: int, roles: list[str | None]) -> None:
        """namespaces: those of the run, which may get more; parts: how many were printed before; roles: see Glance."""
        self._namespaces = namespaces
        self._before = [dict(attributes_of(made)) for made in namespaces]
        self.parts = parts
        self.roles = roles
        self.form = b""
        self.slots: list[Slot] = []

    def end(self, variables: dict[str, Any], printed: list[str], ranges: tuple[Range, ...], take: Callable[[], None]) -> None:
        """The loop begins: numbers become slots, `form` is 16 bytes for all else. Raises NotStableError when that cannot be told.

        variables: all that were set; printed: so far; ranges: what is known already about slots; see Slot.
        """
        whole: list[Any] = ["".join(printed[self.parts :])]
        places = {id(made): place for place, made in enumerate(self._namespaces)}
        for place, made in enumerate(self._namespaces):
            attributes = attributes_of(made)
            before = self._before[place] if place < len(self._before) else {}
            for name in sorted(attributes):
                value = attributes[name]
                if type(value) is int and (name not in before or before[name] != value):
                    within = ranges[len(self.slots)] if len(self.slots) < len(ranges) else (-_FAR, _FAR)
                    if not within[0] <= value <= within[1]:
                        raise NotStableError("not what led to the border")
                    attributes[name] = slot = Slot(value, within, take)
                    self.slots.append(slot)
                    whole.append((place, name))
                else:
                    whole.append((place, name, form_of(value, places)))
        whole.append(sorted((name, form_of(value, places)) for name, value in variables.items()))
        self.form = blake2b(repr(whole).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def attributes_of(namespace: Namespace) -> dict[str, Any]:
    """The attributes themselves."""
    found: dict[str, Any] = namespace._Namespace__attrs
    return found


def add_tests(environment: Environment) -> None:
    """Let the tests of an environment answer for Slots as for numbers, for Glances as for dicts; what cannot be answered raises."""
    tests: dict[str, Any] = environment.tests
    for name in ("number", "integer"):
        tests[name] = _test_of(tests[name], lambda value: 0 if type(value) is Slot else value)
    tests["mapping"] = _test_of(tests["mapping"], lambda value: {} if type(value) is Glance else value)
    same = tests["sameas"]

    def is_same(value: Any, other: Any) -> bool:
        if type(value) in (Slot, Glance) or type(other) in (Slot, Glance):
            raise NotStableError("it is asked what an object is")
        return bool(same(value, other))

    tests["sameas"] = is_same


def _test_of(test: Callable[[Any], bool], plain: Callable[[Any], Any]) -> Callable[[Any], bool]:
    return lambda value: test(plain(value))
