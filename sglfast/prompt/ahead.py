"""Looks ahead of a chat template in its loop over the messages: answered when they are used, so that borders hold in spite of them.

Runs in: shards (the loop and the tokenizer's thread); the marks are put when the tokenizer is loaded. What is here belongs to one Run
    (prompt/stable.py).
Contract: an Ahead says what the attribute would have been, or raises NotStableError. A border that depends on one holds for all
    conversations in which it says the same.
Why it holds. gpt-oss prints the thoughts before a call as long as no answer follows: at each call it goes through all messages behind it,
    and sets an attribute of a namespace if one of them is an answer. A loop of exactly this form asks whether there is such a message, and
    the question is about each message alone. So it can be asked later, or not at all where nobody reads the attribute. Where the
    answer was yes, text depends on messages up to one that proves it. Where it was no, it depends on there being none in what follows
    either: this stands in the border (`absent`), and is asked of the messages behind it when a run begins there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import Environment, nodes

from sglfast.prompt.kept import NotStableError
from sglfast.prompt.views import View

if TYPE_CHECKING:
    from sglfast.prompt.stable import Run

AHEAD_FILTER = "sglfast_ahead"
# Whether a message is what is looked for: a macro of the template, which prints something if it is.
Question = Callable[[Any], str]


class Ahead:
    """Whether there is a message of some kind from one of them on; True or False for all that a template can ask of it."""

    __slots__ = ("_answer", "_name", "_question", "_run", "_start")

    def __init__(self, run: Run, start: int, name: str, question: Question) -> None:
        self._run = run
        self._start = start
        self._name = name
        self._question = question
        self._answer: bool | None = None

    def __bool__(self) -> bool:
        if self._answer is None:
            self._answer = self._run.is_ahead(self._start, self._name, self._question)
        return self._answer

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotStableError(f"bool.{name}")

    def _refuse(self, *_: object) -> NoReturn:
        raise NotStableError("more is done with a look ahead than to ask for it")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse
    __str__ = __repr__ = __format__ = __int__ = __float__ = __index__ = _refuse


def ahead(value: Any, before: Any, name: str, question: Question) -> Any:
    """What the attribute is behind a loop over `value`. before: what it was."""
    if type(value) is not View:
        found = False
        for item in value:  # all of them, since one may be refused
            found = bool(question(item)) or found
        return True if found else before
    if type(before) is not bool:
        raise NotStableError("it was no bool before")
    return before or Ahead(value._run, value._offset, name, question)


def add_ahead(environment: Environment) -> None:
    """Let an environment know the filter, and its tests answer for Aheads as for bools; what cannot be answered raises."""
    environment.filters[AHEAD_FILTER] = ahead
    tests: dict[str, Any] = environment.tests
    for name in ("boolean", "true", "false", "number"):
        tests[name] = _test_of(tests[name])
    same = tests["sameas"]

    def is_same(value: Any, other: Any) -> bool:
        if type(value) is Ahead or type(other) is Ahead:
            raise NotStableError("it is asked what an object is")
        return bool(same(value, other))

    tests["sameas"] = is_same


def _test_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: test(bool(value) if type(value) is Ahead else value)


# ---- at load ----


def mark_looks(tree: nodes.Template, loops: list[nodes.For]) -> None:
    """Put the filter in place of each loop in these loops that looks ahead and does nothing else; its questions become macros."""
    questions: list[nodes.Node] = []
    for loop in loops:
        _mark(loop.body, questions)
    tree.body[:0] = questions


def _mark(body: list[nodes.Node], questions: list[nodes.Node]) -> None:
    for place, node in enumerate(body):
        if isinstance(node, nodes.If):
            for branch in (node.body, *(inner.body for inner in node.elif_), node.else_):
                _mark(branch, questions)
        elif isinstance(node, nodes.For) and (found := _look(node)) is not None:
            item, test, flag = found
            name, line = f"sglfast_question{len(questions)}", node.lineno
            answer = nodes.If(test, [nodes.Output([nodes.TemplateData("1")])], [], [])
            questions.append(nodes.Macro(name, [nodes.Name(item, "param")], [], [answer]).set_lineno(line))
            before = nodes.Getattr(nodes.Name(flag.name, "load"), flag.attr, "load")
            arguments: list[nodes.Expr] = [before, nodes.Const(name), nodes.Name(name, "load")]
            body[place] = nodes.Assign(flag, nodes.Filter(node.iter, AHEAD_FILTER, arguments, [], None, None)).set_lineno(line)


def _look(node: nodes.For) -> tuple[str, nodes.Node, nodes.NSRef] | None:
    """The item's name, the question and the attribute of `for item in ... if question set attribute = true`; None of any other loop."""
    if node.recursive or node.test is not None or node.else_ or not isinstance(node.target, nodes.Name) or len(node.body) != 1:
        return None
    item, asked = node.target.name, node.body[0]
    if not isinstance(asked, nodes.If) or asked.elif_ or asked.else_ or len(asked.body) != 1:
        return None
    flag = asked.body[0]
    if not (
        isinstance(flag, nodes.Assign)
        and isinstance(flag.target, nodes.NSRef)
        and isinstance(flag.node, nodes.Const)
        and flag.node.value is True
        and item not in (flag.target.name, "caller", "kwargs", "varargs")  # the latter are something else in a macro
        and all(name == item for name in _names(asked.test))
    ):
        return None
    return item, asked.test, flag.target


def _names(node: nodes.Node) -> Iterator[str]:
    if isinstance(node, nodes.Name):
        yield node.name
    for name in node.find_all(nodes.Name):
        yield name.name
