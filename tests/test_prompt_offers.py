"""sglfast.prompt.offers: tools are prepared and printed once for all bodies that write them in the same bytes."""

from typing import Any

import orjson
import pytest
from chat_paths import TOOL, Chats, everybody, plain

from sglfast.prompt import offers as offers_module
from sglfast.prompt.offers import Offer
from sglfast.prompt.raw import Context
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer
from sglfast.shm import Dialect, Variant

OTHER: dict[str, Any] = {"type": "function", "function": {"name": "g", "description": "é <", "parameters": {"type": "object"}}}
KEY = [Variant(4)]


@pytest.fixture
def path() -> Chats:
    return Chats(load_tokenizer(DEMO_TOKENIZER_PATH), 1 << 22)


def body(tools: Any, **more: Any) -> bytes:
    return orjson.dumps({"messages": [{"role": "user", "content": "hi " * 20}], "tools": tools, **more})


def test_other_fields_of_a_body_leave_the_tools_as_they_are(path: Chats, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, printed = [], []
    prepare, tojson = offers_module.tools_input, offers_module.tojson
    monkeypatch.setattr(offers_module, "tools_input", lambda *args: prepared.append(args) or prepare(*args))
    monkeypatch.setattr(offers_module, "tojson", lambda value, *form: printed.append(value) or tojson(value, *form))
    for number in range(5):
        sent = body([TOOL, OTHER], seed=number, user="u" * number, messages=[{"role": "user", "content": f"{number}"}])
        assert path.keys(sent, KEY, everybody) == plain(path.tokenizer, sent, KEY)
        assert (len(prepared), len(printed)) == (1, 2)


def test_what_decides_about_the_tools_is_kept_apart(path: Chats) -> None:
    choices: list[Any] = [None, "auto", "none", {"type": "function", "function": {"name": "g"}}, {"function": {"name": "x"}}]
    for _ in range(2):
        for tools in ([TOOL, OTHER], [OTHER, TOOL], [OTHER], [], None):
            for choice in choices:
                for dialect in (Dialect("kept"), Dialect("flat"), Dialect(engine="vllm")):
                    variants = [Variant(4, dialect=dialect)]
                    sent = body(tools, tool_choice=choice)
                    assert path.keys(sent, variants, everybody) == plain(path.tokenizer, sent, variants)


def test_texts_are_remembered_by_object_and_form_and_bounded() -> None:
    tools = [TOOL, OTHER]
    offer = Offer(orjson.dumps(tools), tools, 1)
    plain_form, indented = (False, None, None, False), (False, 4, None, False)
    for _ in range(2):
        for form in (plain_form, indented):
            for value in (tools, *tools, dict(TOOL), "a", True, 1):
                assert offer.text_of(value, form) == offers_module.tojson(value, *form)
    assert len(offer._texts) < 6, "all of them would be too much"
    assert sum(map(len, offer._texts.values())) < offer.size_bytes
    assert offer.text_of(TOOL, plain_form) is offer.text_of(TOOL, plain_form)


def test_what_bodies_hold_of_tools_is_no_more_than_the_memory_knows(path: Chats) -> None:
    """However often bodies with few other bytes are used, their tools go with them."""
    prefixes = path.keyer.prefixes
    for number in range(40):
        for latest in range(number + 1):
            assert path.raw.begin(body([TOOL] * 60 + [{**TOOL, "defer_loading": bool(latest % 2)}], user=str(latest // 2)), KEY, 500)
        for place in range(3):
            assert path.raw.begin(body([OTHER] * (60 + number), user=str(place)), KEY, 500)
        held = {id(context.offer): context.offer for context in prefixes._prefixes.values() if isinstance(context, Context)}
        assert sum(offer.size_bytes for offer in held.values() if offer.tools) <= prefixes.size_bytes


def test_tools_that_are_too_many_to_be_remembered_are_not_held(path: Chats) -> None:
    sent = body([TOOL] * 4000)
    for _ in range(2):
        assert path.keys(sent, KEY, everybody) == plain(path.tokenizer, sent, KEY)
    assert not any(isinstance(known, Context) for known in path.keyer.prefixes._prefixes.values())


def test_many_tools_are_first_read_where_that_may_take_long(path: Chats) -> None:
    for tools, budget in (([TOOL] * 10, (1 << 16, 20)), ([TOOL], (40, 150))):
        assert path.raw.begin(body(tools), KEY, 500, budget) is None
        assert path.raw.begin(body(tools), KEY, 500) is not None
        assert path.raw.begin(body(tools), KEY, 500, (1 << 16, 150)) is not None
        assert path.raw.begin(body(tools, user="another"), KEY, 500, (100, 20)) is not None
