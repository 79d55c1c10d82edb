"""At load: whether what a chat template makes of the tools decides about nothing once it goes through the messages.

Runs in: shard, when the tokenizer is loaded.
Contract: where `is_told_first` says yes, two lists of equally many tools that a template takes up to its first loop over something else
    than tools are the same to all that follows: it fails for both or for none. A no costs speed, not exactness.
Why: SGLang gives the tools in another form to a template that has refused them in the first (chat.second_try). Of a prompt that nobody
    owns only the beginning is printed, so it must be known by then that no refusal to come is one of the tools' form.
How: names are followed that hold something of the tools. To ask whether there are any, or how many, is not to look at them.
"""

from collections.abc import Iterable
from typing import NamedTuple

from jinja2 import nodes

_TOOLS = "tools"
_OF_THE_LIST = frozenset({"defined", "undefined", "none", "iterable", "sequence", "mapping", "string", "boolean"})
_COUNTS = frozenset({"length", "count"})


def is_told_first(tree: nodes.Template) -> bool:
    """Whether a template, not marked yet, looks at the tools before it goes through the messages only."""
    set_names = frozenset(name.name for name in tree.find_all(nodes.Name) if name.ctx == "store") | {"messages"}
    namespaces = _Namespaces.in_tree(tree)
    names = {_TOOLS}
    while True:
        reading = _Reading(names, set_names, namespaces)
        reading.follow(tree.body, is_told=False)
        if reading.found <= names:
            return not (reading.is_late or reading.is_replaced)
        names |= reading.found


class _Namespaces(NamedTuple):
    """Names of namespaces in a template. others: those that may be one more name of any, as arguments of macros are."""

    all: frozenset[str]
    others: frozenset[str]

    @classmethod
    def in_tree(cls, tree: nodes.Template) -> "_Namespaces":
        made = [node.target for node in tree.find_all(nodes.Assign) if _is_namespace(node.node)]
        made_at = set(map(id, made))
        used = {name.name for name in tree.find_all(nodes.NSRef)}
        given = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load" and id(name) not in made_at}
        return cls(frozenset(used.union(*map(_names_in, made))), frozenset(used & given))

    def set_with(self, names: set[str]) -> set[str]:
        """Those of which an attribute may be set where these names are used for that."""
        return names if self.others.isdisjoint(names) else names | self.all


class _Reading:
    """One pass over a template. names: those that hold something of the tools; set_names: those that the template sets, and the messages;
    found: as names, as this pass sees it."""

    def __init__(self, names: set[str], set_names: frozenset[str], namespaces: _Namespaces) -> None:
        self._names = names
        self._set_names = set_names
        self._namespaces = namespaces
        self._has_begun = False  # a loop that may be one over messages
        self._is_in_tools = False  # in a loop over tools: there is none over the messages that counts
        self.found = set(names)
        self.is_late = False
        self.is_replaced = False  # by something of themselves, then even their number may be of their form, or by messages

    def follow(self, body: Iterable[nodes.Node], *, is_told: bool) -> None:
        """is_told: whether this is done, or how often, depends on the tools."""
        for node in body:
            if isinstance(node, nodes.If):
                self._if(node, is_told)
            elif isinstance(node, nodes.For):
                self._for(node, is_told)
            elif isinstance(node, nodes.Macro):
                self._macro(node)
            elif isinstance(node, nodes.Assign):
                self._set(node.target, self._note(self._reads(node.node)) or is_told)
                self.is_replaced |= _names_in(node.target) >= {_TOOLS} and not _names_in(node.node).isdisjoint(self._set_names)
            elif isinstance(node, nodes.AssignBlock):
                self._set(node.target, self._note(any(map(self._reads, node.body))) or is_told)
                self.follow(node.body, is_told=is_told)
            else:
                names = node.targets if isinstance(node, nodes.With) else node.args if isinstance(node, nodes.CallBlock) else ()
                is_read = self._note(self._reads(node)) or is_told
                for name in names:
                    self._set(name, is_read)
                self.follow((child for child in node.iter_child_nodes() if isinstance(child, nodes.Stmt)), is_told=is_told)

    def _note(self, reads: bool) -> bool:
        self.is_late |= reads and self._has_begun
        return reads

    def _set(self, target: nodes.Node, is_told: bool) -> None:
        if is_told:
            names = _names_in(target)
            self.is_replaced |= _TOOLS in names
            self.found |= self._namespaces.set_with(names)

    def _if(self, node: nodes.If, is_told: bool) -> None:
        branches = (node, *node.elif_)
        is_told |= self._note(any(self._decides(branch.test) for branch in branches))
        for body in (*(branch.body for branch in branches), node.else_):
            self.follow(body, is_told=is_told)

    def _for(self, node: nodes.For, is_told: bool) -> None:
        is_of_tools = self._reads(node.iter) or (node.test is not None and self._reads(node.test))
        was_in_tools = self._is_in_tools
        self._is_in_tools = was_in_tools or (is_of_tools and _names_in(node.iter) == {_TOOLS})
        self._has_begun |= not self._is_in_tools
        self._note(is_of_tools)
        self._set(node.target, is_of_tools)
        self.follow((*node.body, *node.else_), is_told=is_told or is_of_tools)
        self._is_in_tools = was_in_tools

    def _macro(self, node: nodes.Macro) -> None:
        # It is made here and called anywhere: with tools, or because of them.
        if any(map(self._reads, (*node.defaults, *node.body))):
            self.found.add(node.name)
        self.found |= self._namespaces.set_with({name.name for name in node.find_all(nodes.NSRef)})

    def _decides(self, test: nodes.Node) -> bool:
        """Whether the truth of a condition depends on what stands in the tools."""
        if isinstance(test, nodes.Name) and test.name == _TOOLS:
            return False
        if isinstance(test, nodes.Not):
            return self._decides(test.node)
        if isinstance(test, nodes.And | nodes.Or):
            return self._decides(test.left) or self._decides(test.right)
        return self._reads(test)

    def _reads(self, node: nodes.Node) -> bool:
        """Whether something of the tools comes out of a part of a template."""
        if isinstance(node, nodes.Name):
            return node.name in self._names
        if isinstance(node, nodes.Not):
            return self._decides(node)
        if isinstance(node, nodes.CondExpr):
            return self._decides(node.test) or self._reads(node.expr1) or (node.expr2 is not None and self._reads(node.expr2))
        if isinstance(node, nodes.If):
            return self._decides(node.test) or any(map(self._reads, (*node.body, *node.elif_, *node.else_)))
        if isinstance(node, nodes.Test | nodes.Filter) and node.name in (_OF_THE_LIST if isinstance(node, nodes.Test) else _COUNTS):
            asked = node.node
            if isinstance(asked, nodes.Name) and asked.name == _TOOLS:
                return False
        return any(map(self._reads, node.iter_child_nodes()))


def _is_namespace(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name == "namespace"


def _names_in(node: nodes.Node) -> set[str]:
    """Names that are read or set in a part of a template."""
    return {part.name for part in (node, *node.find_all((nodes.Name, nodes.NSRef))) if isinstance(part, nodes.Name | nodes.NSRef)}
