"""Does a chat template walk over the parts of a message? As vLLM finds out, which looks further into the template than SGLang does.

Runs in: shard, once for a template. Pure.
Contract: follows vLLM 0.33 (renderers/hf.py). Lists of messages are `messages` and what is set to it or to a part of it, also in a
    namespace; a loop over one of them names a message; a template walks over parts if a loop goes over the content of a message, over
    a variable of the name `content`, or in a macro over what is called with such a content. It is "string" where none does.
"""

from collections.abc import Callable, Iterator
from typing import Literal

from jinja2 import nodes

ContentFormat = Literal["string", "openai"]


def content_format_of_vllm(tree: nodes.Template) -> ContentFormat:
    """Return the form of message content that the template gets from vLLM."""
    lists = _lists(tree)
    loops = list(tree.find_all(nodes.For))
    messages = {
        loop.target.name for loop in loops if isinstance(loop.target, nodes.Name) and _of(loop.iter, lambda node: _path(node) in lists)
    }

    def is_content(node: nodes.Node) -> bool:
        return _of(node, lambda inner: _is_content(inner, messages))

    in_macros: dict[int, set[str]] = {}
    for macro in tree.find_all(nodes.Macro):
        names = _contents_of(macro, tree, is_content)
        in_macros.update((id(loop), names) for loop in macro.find_all(nodes.For))
    for loop in loops:
        name = loop.iter.name if isinstance(loop.iter, nodes.Name) else None
        if is_content(loop.iter) or (name is not None and name in in_macros.get(id(loop), {"content"})):
            return "openai"
    return "string"


def _of(node: nodes.Node | None, is_it: Callable[[nodes.Node], bool]) -> bool:
    """Whether a node, without filters, tests and slices around it, is it."""
    while node is not None:
        if isinstance(node, nodes.Filter | nodes.Test) or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)):
            node = node.node
        else:
            return is_it(node)
    return False


def _path(node: nodes.Node) -> str | None:
    """`name` or `name.attribute` that a node reads or sets, None for anything else."""
    if isinstance(node, nodes.Name):
        return str(node.name)
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    if isinstance(node, nodes.Getattr):
        base = _path(node.node)
        return None if base is None else f"{base}.{node.attr}"
    return None


def _lists(tree: nodes.Template) -> set[str]:
    lists = {"messages"}
    assigned = [(path, value) for path, value in _assigned(tree) if path is not None]
    n_before = 0
    while n_before != len(lists):
        n_before = len(lists)
        lists.update(path for path, value in assigned if _of(value, lambda node: _path(node) in lists))
    return lists


def _assigned(tree: nodes.Template) -> Iterator[tuple[str | None, nodes.Node]]:
    for assignment in tree.find_all(nodes.Assign):
        target, value = assignment.target, assignment.node
        yield _path(target), value
        if isinstance(target, nodes.Name) and isinstance(value, nodes.Call) and _path(value.node) == "namespace":
            for keyword in value.kwargs:
                yield f"{target.name}.{keyword.key}", keyword.value


def _is_content(node: nodes.Node, messages: set[str]) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "content" and _path(node.node) in messages
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content" and _path(node.node) in messages
    return False


def _contents_of(macro: nodes.Macro, tree: nodes.Template, is_content: Callable[[nodes.Node], bool]) -> set[str]:
    """Parameters of a macro that some call gives the content of a message."""
    names = [argument.name for argument in macro.args]
    found: set[str] = set()
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            found.update(name for name, value in zip(names, call.args, strict=False) if is_content(value))
            found.update(keyword.key for keyword in call.kwargs if keyword.key in names and is_content(keyword.value))
    return found
