"""The messages as a chat template sees them, and jinja2's `loop` over them: what is read is noted, and a loop may begin in the middle.

Runs in: shards (the loop and the tokenizer's thread). Belongs to one Run (prompt/stable.py), which is told.
Contract: as a list of messages answers, or NotStableError.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2.runtime import LoopContext

from sglfast.prompt.kept import NotStableError
from sglfast.prompt.scans import Message

if TYPE_CHECKING:
    from sglfast.prompt.stable import Run


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
        begun = run.place
        for index in range(self._offset, run.count):
            yield run.take(index, begun)
        run.see_end(begun)

    def __getitem__(self, key: Any) -> Any:
        run = self._run
        if type(key) is int and key >= 0:
            if self._offset + key < run.count:
                return run.take(self._offset + key)
        elif type(key) is slice and key.stop is None and key.step in (None, 1) and (key.start is None or _is_place(key.start)):
            return View(run, self._offset + (key.start or 0))
        # Anything else depends on the end, or is what a list refuses too.
        run.see_end()
        if type(key) is slice and run.is_scanning:
            return run.glances(range(self._offset, run.count)[key])
        return [run.take(index) for index in range(self._offset, run.count)][key]

    def __reversed__(self) -> Iterator[Any]:
        return iter(self[::-1])

    def _form(self) -> tuple[str, str]:
        """See kept.form_of."""
        return "messages", str(self._offset)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotStableError(f"messages.{name}")

    def _refuse(self, *_: object) -> NoReturn:
        raise NotStableError("the messages are used as a whole")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __contains__ = _refuse
    __str__ = __repr__ = __format__ = __hash__ = _refuse


class Walk:
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


class WatchedLoop(LoopContext):
    """jinja2's `loop`, begun in the middle where a Walk says so."""

    _walk: Walk | None = None

    def __init__(self, iterable: Any, undefined: Any, recurse: Any = None, depth0: int = 0) -> None:
        super().__init__(iterable, undefined, recurse, depth0)
        if type(iterable) is Walk:
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


def enter(value: Any, loop: int) -> Any:
    return value._run.enter(value, loop) if type(value) is View else value


def scan(value: Any, _: int) -> Any:
    """What a loop that prints nothing walks over."""
    if type(value) is not View:
        return value
    run = value._run
    run.see_end()
    return run.glances(range(value._offset, run.count)) if run.is_scanning else value


def is_known(value: Any, *walked: Any) -> bool:
    """Whether what is printed now is known. walked: what a loop that prints goes through; one over messages is made in any case."""
    return type(value) is View and View not in map(type, walked) and value._run.is_print_known()


def _is_place(value: object) -> bool:
    return type(value) is int and value >= 0
