"""The tools that bodies offer to the model: parsed, prepared and printed once for all bodies that write them in the same bytes.

Runs in: shards (the loop and the tokenizer's thread); any thread may use an Offer, which the memory of prompt/prefixes.py holds.
Contract: what a template gets is what it would get of the parsed body. Texts that it makes of whole tools as JSON are remembered, up to
    a bound, by the object, the form and nothing else: no template can change one (the sandbox is immutable).
Why: agents send the same list with each request, often more than they send besides; to print it costs more than all that is new.
"""

import sys
from typing import Any

import orjson
import xxhash
from jinja2 import Environment, pass_context
from jinja2.runtime import Context

from sglfast.prompt import vllm_chat
from sglfast.prompt.chat import tools_input
from sglfast.prompt.prefixes import PrefixCache
from sglfast.prompt.template import tojson
from sglfast.shm import Dialect

OFFER_VARIABLE = "sglfast_offer"  # among those of a template
_TEXT_SHARE = 4  # of the tools' own bytes, for texts


class Offer:
    """What `tools` of a body are to a template: `tools`, None for none; key: 16 bytes that are the same for equal ones."""

    __slots__ = ("_ids", "_left_bytes", "_texts", "key", "name", "size_bytes", "tools")

    def __init__(self, raw: bytes, tools: list[dict[str, Any]] | None, seed: int, name: object = None) -> None:
        """raw: as the body has them; seed: of keys; name: by which it is remembered."""
        self.name = name
        self.tools = tools
        self.key = xxhash.xxh3_128_digest(orjson.dumps(tools), seed)
        self._ids = frozenset(map(id, (tools, *tools))) if tools else frozenset()
        self._texts: dict[tuple[object, ...], str] = {}
        self._left_bytes = _TEXT_SHARE * len(raw)
        self.size_bytes = 1000 + 12 * len(raw) + self._left_bytes

    def text_of(self, value: object, form: tuple[Any, ...]) -> str:
        """`tojson` of a value; form: its other arguments."""
        if id(value) not in self._ids:
            return tojson(value, *form)
        name = (id(value), *map(repr, form))
        text = self._texts.get(name)
        if text is None:
            text = tojson(value, *form)
            size_bytes = sys.getsizeof(text) + 100
            if size_bytes <= self._left_bytes:
                self._left_bytes -= size_bytes
                self._texts[name] = text
        return text


def offer_of(prefixes: PrefixCache, raw: bytes, choice: object, dialect: Dialect, *, is_made: bool = True) -> Offer | None:
    """The tools of a body; most bodies have none, or the same as others. raw: empty for none; choice: its `tool_choice`; is_made: whether
    those that are not known may be parsed now, else None.

    Raises UnkeyableError, JSONDecodeError.
    """
    name = (xxhash.xxh3_128_digest(raw, prefixes.seed), orjson.dumps(choice), dialect)
    offer = prefixes.get(name)
    if not isinstance(offer, Offer):
        if not is_made:
            return None
        fields = {"tools": orjson.loads(raw) if raw else None, "tool_choice": choice}
        tools = vllm_chat.tools_input(fields) if dialect.engine == "vllm" else tools_input(fields, dialect.tools)
        offer = Offer(raw, tools, prefixes.seed, name)
        prefixes.put(name, offer)
    return offer


def keep(prefixes: PrefixCache, offer: Offer) -> bool:
    """Let the memory use an Offer, so that it goes after all that is there already; False: it is too big to be remembered.

    Who is remembered and holds one calls this behind each use of itself: else the Offer would go first, and what is still held of it
    would count nowhere.
    """
    if prefixes.get(offer.name) is None:
        prefixes.put(offer.name, offer)
        return prefixes.get(offer.name) is not None
    return True


@pass_context
def _tojson_of(
    context: Context, value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    form = (ensure_ascii, indent, separators, sort_keys)
    offer: Offer | None = context.parent.get(OFFER_VARIABLE)
    return tojson(value, *form) if offer is None else offer.text_of(value, form)


def add_offers(environment: Environment) -> None:
    """Let the templates of an environment find what was printed of an Offer among their variables."""
    environment.filters["tojson"] = _tojson_of
