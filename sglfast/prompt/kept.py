"""Values that a template's variables have, kept from one conversation to the next or compared between two.

Runs in: shards (the loop and the tokenizer's thread).
Contract: what `is_plain` can be put back as it is. Two values of one `form_of` are the same to a template.
"""

from typing import Any

from jinja2 import Undefined
from jinja2.runtime import Macro
from jinja2.utils import Namespace

_VALUES = 64  # plain values in one namespace attribute that holds a list or a dict
_DEPTH = 4


class NotStableError(Exception):
    """The template does something with the conversation that cannot be followed here."""


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is data that nothing can change: lists and dicts too, since the sandbox lets no template change them.

    A class of ours says it with `_is_plain`.
    """
    if value is None or type(value) in (str, int, bool, float):
        return True
    if type(value) in (list, tuple):
        return depth < 3 and len(value) <= _VALUES and all(is_plain(item, depth + 1) for item in value)
    if type(value) is dict:
        return depth < 3 and len(value) <= _VALUES and all(is_plain(item, depth + 1) for pair in value.items() for item in pair)
    return getattr(type(value), "_is_plain", False) is True


def size_bytes(value: Any) -> int:
    """What a plain value costs to remember."""
    if type(value) is str:
        return 50 + 4 * len(value)
    if type(value) in (list, tuple):
        return 60 + sum(8 + size_bytes(item) for item in value)
    if type(value) is dict:
        return 100 + sum(size_bytes(key) + size_bytes(item) for key, item in value.items())
    return 32


def form_of(value: Any, namespaces: dict[int, int], depth: int = 0) -> Any:
    """Strings, and tuples of them, that tell a value from all that a template could tell it from; raises NotStableError.

    namespaces: place by the id of each; their attributes are not looked at. A class of ours says its own with `_form`.
    """
    kind = type(value)
    if kind is str:
        return value
    if value is None or kind in (int, bool, float):
        return (repr(value),)
    if kind is Namespace and id(value) in namespaces:
        return ("namespace", str(namespaces[id(value)]))
    if kind is Macro:
        return ("macro", str(id(value._func.__code__)))
    if isinstance(value, Undefined):
        return ("undefined",)
    if depth < _DEPTH and kind in (list, tuple):
        return (kind.__name__, *(form_of(item, namespaces, depth + 1) for item in value))
    if depth < _DEPTH and kind is dict:
        return ("dict", *(form_of(item, namespaces, depth + 1) for pair in value.items() for item in pair))
    own = getattr(kind, "_form", None)
    if own is None:
        raise NotStableError("a variable that cannot be compared")
    return own(value)
