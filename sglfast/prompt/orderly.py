"""At load: whether a chat template is of the kind that prompt/stable.py can follow, and marks at its loops.

Runs in: shard, when the tokenizer is loaded.
Contract: in a template that `is_orderly` takes, nothing is carried from one turn of a loop to the next but attributes of namespaces, and
    nothing decides about the text but its variables and the clock. `mark_loops` changes a syntax tree so that each loop that may be
    the one over the messages asks the filter LOOP_FILTER what to walk over, or SCAN_FILTER where it prints nothing; and what is printed
    before it is left out where the test KNOWN_TEST says so; loops in it that look ahead are prompt/ahead.py's; nothing else changes. A
    template that is refused costs speed, not exactness.
Why a list of what is refused is enough for the first: jinja2's own `set` does not outlive a turn, its sandbox lets no template change
    a list or a dict, and what else has a memory is few: iterators that were begun, `loop.changed`, cyclers and joiners, chance.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jinja2 import nodes

from sglfast.prompt.ahead import mark_looks

LOOP_FILTER, SCAN_FILTER, KNOWN_TEST = "sglfast_loop", "sglfast_scan", "sglfast_known"

_FOREIGN = (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.Block, nodes.EvalContextModifier)
_MEMORIES = frozenset({"cycler", "joiner", "lipsum", "changed"})
# Filters whose result is an iterator, which is empty when it is read again.
_ITERATORS = frozenset({"map", "select", "reject", "selectattr", "rejectattr", "batch", "slice", "unique", "reverse", "items"})
_PURE_CALLS = frozenset({"raise_exception", "strftime_now", "range", "dict"})
# Of data, which is all that a template has besides macros; the sandbox lets none of them change anything.
_PURE_METHODS = frozenset({"items", "keys", "values", "get", "split", "strip", "lstrip", "rstrip", "startswith", "endswith", "replace"})


def is_orderly(tree: nodes.Template) -> bool:
    """Whether nothing in a template keeps a memory but namespaces, and nothing comes from elsewhere."""
    words = {name.name for name in tree.find_all(nodes.Name)} | {item.attr for item in tree.find_all(nodes.Getattr)}
    words.update(const.value for const in tree.find_all(nodes.Const) if isinstance(const.value, str))
    if words & _MEMORIES or next(tree.find_all(_FOREIGN), None) is not None:
        return False
    filters = list(tree.find_all(nodes.Filter))
    at_once = {id(item.node) for item in filters} | {id(loop.iter) for loop in tree.find_all(nodes.For)}
    return not any(item.name == "random" or (item.name in _ITERATORS and id(item) not in at_once) for item in filters)


def mark_loops(tree: nodes.Template) -> int:
    """Put the marks into a tree; returns how many loops got one. The filter is given the loop's number, from 0."""
    loops = list(_loops(tree.body))
    marked = _Marking(len(loops), _pure_in(tree)).mark(tree.body)
    mark_looks(tree, loops)
    return marked


def _branches(node: nodes.If) -> list[list[nodes.Node]]:
    return [node.body, *(inner.body for inner in node.elif_), node.else_]


def _loops(body: list[nodes.Node]) -> Iterator[nodes.For]:
    """The loops that may be the one over the messages: not inside anything whose text is collected first, or another loop."""
    for node in body:
        if isinstance(node, nodes.If):
            for branch in _branches(node):
                yield from _loops(branch)
        elif isinstance(node, nodes.For) and _is_plain(node):
            yield node


def _is_plain(node: nodes.For) -> bool:
    return not node.recursive and node.test is None and not node.else_ and isinstance(node.target, nodes.Name)


def _prints(node: nodes.Output) -> bool:
    """Whether it is there to print something: what raises is not, nor is the space around other things."""
    return any(child.data.strip() if isinstance(child, nodes.TemplateData) else not _raises(child) for child in node.nodes)


def _raises(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name == "raise_exception"


class _Pure(NamedTuple):
    """What may be called without a trace but what it returns: functions and macros by name, methods by theirs."""

    calls: frozenset[str]
    methods: frozenset[str]

    def has_all(self, node: nodes.Node) -> bool:
        """Whether a part of a template calls nothing else and sets no attribute."""
        return next(node.find_all(nodes.NSRef), None) is None and all(map(self._has, node.find_all(nodes.Call)))

    def _has(self, call: nodes.Call) -> bool:
        called = call.node
        if isinstance(called, nodes.Name):
            return called.name in self.calls
        return isinstance(called, nodes.Getattr) and called.attr in self.methods


def _pure_in(tree: nodes.Template) -> _Pure:
    """What is pure in a template: of its macros those that set no attribute, make no namespace, and call only what is pure."""
    macros = list(tree.find_all(nodes.Macro))
    names = {macro.name for macro in macros}
    callees = {id(call.node) for call in tree.find_all(nodes.Call)}
    if any(name.name in names and name.ctx == "load" and id(name) not in callees for name in tree.find_all(nodes.Name)):
        return _Pure(_PURE_CALLS - names, frozenset())  # a macro that is a value may be called by any name
    pure = _Pure(_PURE_CALLS | names, _PURE_METHODS)
    while impure := {macro.name for macro in macros if macro.name in pure.calls and not pure.has_all(macro)}:
        pure = _Pure(pure.calls - impure, _PURE_METHODS)
    return pure


def _unless_known(node: nodes.Stmt, walked: list[Any]) -> nodes.If:
    """The print or the loop, left out where what it prints is known. walked: what a loop goes through."""
    messages = nodes.Name("messages", "load", lineno=node.lineno)
    known = nodes.Test(messages, KNOWN_TEST, walked, [], None, None, lineno=node.lineno)
    return nodes.If(nodes.Not(known, lineno=node.lineno), [node], [], [], lineno=node.lineno)


class _Marking:
    def __init__(self, n_loops: int, pure: _Pure) -> None:
        self._n_loops = n_loops
        self._pure = pure
        self._marked = 0

    def mark(self, body: list[nodes.Node]) -> int:
        for place, node in enumerate(body):
            if self._marked == self._n_loops:
                break  # what is printed behind the last loop is always wanted
            if isinstance(node, nodes.If):
                for branch in _branches(node):
                    self.mark(branch)
            elif isinstance(node, nodes.For) and _is_plain(node):
                name = LOOP_FILTER if any(map(_prints, node.find_all(nodes.Output))) else SCAN_FILTER
                walked = node.iter
                node.iter = nodes.Filter(walked, name, [nodes.Const(self._marked)], [], None, None, lineno=node.lineno)
                self._marked += 1
                if name == LOOP_FILTER and self._pure.has_all(node):
                    body[place] = _unless_known(node, [walked])  # tools, most often
            elif isinstance(node, nodes.Output) and self._pure.has_all(node):  # a macro might set an attribute
                body[place] = _unless_known(node, [])
        return self._marked
