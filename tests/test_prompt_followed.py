"""sglfast.prompt.stable, frames and seen: templates that are followed message by message print what they print of the whole.

Named conversations that once had keys of another text, and templates that template_grammar.py makes, from seeds that never change.
"""

from collections.abc import Sequence
from typing import Any

import orjson
import pytest
from chat_paths import Chats, everybody, plain
from conftest import SeededRandom
from template_grammar import Conversation, Grammar, Message

from sglfast.errors import PromptError
from sglfast.prompt.frames import Frame
from sglfast.prompt.ids import Probe
from sglfast.prompt.seen import SeenKeying
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer
from sglfast.shm import Dialect, Variant

Body = dict[str, Any]  # messages and tools
SEEDS = range(1, 9)
TEMPLATES_PER_SEED = 24
FAILURES_MAX = 12  # a template that has refused so many conversations refuses most
TOKEN_KEYS = [Variant(1)]  # a key for each token


@pytest.fixture(scope="module")
def path() -> Chats:
    return Chats(load_tokenizer(DEMO_TOKENIZER_PATH), 1 << 22)


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def users(*texts: str) -> Conversation:
    return [message("user", text) for text in texts]


class Seen:
    """How many conversations had keys, and of how many of those a beginning was known."""

    def __init__(self) -> None:
        self.keyed = self.known = 0


def owner(keys: bytes) -> Probe:
    """Of a rank that has these blocks."""
    owned = {keys[at : at + 8] for at in range(0, len(keys), 8)}
    return lambda asked: next((at for at in range(len(asked) // 8) if asked[8 * at : 8 * at + 8] not in owned), len(asked) // 8)


def difference(path: Chats, source: str, conversations: Sequence[Conversation | Body], seen: Seen) -> tuple[int, str] | None:
    """Place of the first conversation that has other keys when it is followed, and what is wrong with them."""
    if not path.change_template(source):
        return None
    failures = 0
    for place, messages in enumerate(conversations):
        body = orjson.dumps(messages if isinstance(messages, dict) else {"messages": messages})
        whole = plain(path.tokenizer, body, TOKEN_KEYS)
        if whole is None:
            failures += 1
            if failures > FAILURES_MAX:
                return None
            continue
        half = whole.keys[TOKEN_KEYS[0]][: 8 * (whole.tokens // 2)]
        lazy = path.keys(body, TOKEN_KEYS, owner(half), 1)
        if lazy is None or not lazy.keys[TOKEN_KEYS[0]].startswith(half):
            return place, "not all keys that somebody owns"
        keying = path.begin(body, TOKEN_KEYS, 500)
        if keying is None:
            return place, "no keys"
        seen.keyed += 1
        seen.known += isinstance(keying, SeenKeying)
        try:
            while not keying.run(everybody, 1 << 62):
                pass
        except PromptError as error:
            return place, repr(error)
        found = keying.keys
        if found.keys != whole.keys or (not found.is_estimated and found.tokens != whole.tokens):
            return place, f"{found.tokens} tokens where {whole.tokens} are right" if found.tokens != whole.tokens else "other keys"
    return None


def check(path: Chats, source: str, conversations: Sequence[Conversation | Body], seen: Seen | None = None) -> None:
    """Fails with the fewest of the conversations that show a difference."""
    seen = seen or Seen()
    found = difference(path, source, conversations, seen)
    if found is None:
        return
    shown = list(conversations[: found[0] + 1])
    place = 0
    while place < len(shown) - 1:
        fewer = shown[:place] + shown[place + 1 :]
        again = difference(path, source, fewer, seen)
        if again is None:
            place += 1
        else:
            shown, found = fewer[: again[0] + 1], again
    pytest.fail(f"{found[1]}\n{source}\n" + "\n".join(map(repr, shown)), pytrace=False)


def check_followed(path: Chats, source: str, conversations: Sequence[Conversation]) -> None:
    """For named tests: the template must be one that is followed."""
    seen = Seen()
    check(path, source, conversations, seen)
    assert path.raw._template is not None
    assert seen.keyed == len(conversations)


# ---- conversations that once had keys of another text ----

STATE = "{% set ns = namespace(tool=false) %}"
SCAN = "{% for m in messages %}{% if m.role == 'tool' %}{% set ns.tool = true %}{% endif %}{% endfor %}"
LOOP = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"


def test_what_is_printed_of_the_whole_before_the_scan_is_made_again(path: Chats) -> None:
    """A later message of the system is printed before the loop, in the print that the look at the end began in."""
    texts = "{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join }}"
    begun = [message("user", "q"), message("assistant", "a"), message("user", "b")]
    check_followed(path, STATE + texts + SCAN + LOOP, [begun, [*begun, message("system", "SYS")]])


def test_a_message_that_was_not_there_before_the_scan_may_come(path: Chats) -> None:
    hello = "{% if messages[1] is defined %}Hello{% endif %}"
    check_followed(path, STATE + hello + SCAN + LOOP, [users("q"), users("q", "b")])


def test_a_frame_is_for_the_first_message_that_its_scan_has_read(path: Chats) -> None:
    """A backward scan that goes on to the first message asks for its text; another text may be another answer."""
    source = (
        "{% set ns = namespace(last=messages | length - 1) %}{% for m in messages[::-1] %}"
        "{% if m.role == 'user' and not m.content.startswith('<tool_response>') %}"
        "{% set ns.last = messages | length - 1 - loop.index0 %}{% break %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    calls = [message("assistant", "a"), message("tool", "r")]
    questions = ("q1", "q2", "q3", "<tool_response>1</tool_response>")
    check_followed(path, source, [[message("user", text), *more] for text in questions for more in ([], calls)])


@pytest.mark.parametrize("more", [("q",) * 6, ("y", "z w"), ()], ids=["many", "some", "none"])
def test_a_border_that_follows_a_cut_too_closely_is_none(path: Chats, more: tuple[str, ...]) -> None:
    """A cut between words is one only with the two characters behind it, which another conversation need not have."""
    source = "{% for x in messages[1:] %}{{ x.content }}{% endfor %}txt {% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}"
    begun = users("w", "", "x")
    check_followed(path, source, [[*begun, *users(" sp "), *users(*more)], begun])


def test_a_loop_over_some_messages_looks_at_the_end(path: Chats) -> None:
    """Behind a border, too, what it takes first may be a message that was not there before."""
    source = "{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ m.content }}{% endfor %}"
    source += "{% for m in messages %}{% if m.content %}<|im_end|>{% endif %}{% endfor %}"
    begun = [message("system", "xy hm"), message("assistant", "xy hm"), message("assistant", "q"), message("user", "xy hm")]
    check_followed(path, source, [begun, [*begun, message("user", "xy hm")]])


def test_a_border_behind_a_frame_that_follows_a_cut_too_closely_is_none(path: Chats) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{% for m in messages %}<|im_end|>\n{% endfor %}"
    begun = [message("tool", "words 7"), message("tool", "xy hm")]
    asked = [*begun, message("system", "words 7"), message("user", "the quick brown fo")]
    check_followed(path, source, [begun, asked, asked, asked, [*asked, message("user", " sp ")], [*asked, message("tool", "words 7")]])


def test_a_namespace_with_two_names_is_told_late(path: Chats) -> None:
    """SGLang's other form of the tools must be known before anything is printed, where the first one is refused late."""
    source = "{% set ns = namespace(x=1) %}{% set k = ns %}{% for t in tools %}{% set k.x = t.function %}{% endfor %}"
    source += "{% for m in messages %}{{ m.content }}{{ ns.x.name + '!' }}<|im_end|>{% endfor %}"
    assert path.change_template(source)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    body = orjson.dumps({"messages": users("the quick brown fox " * 40, "x"), "tools": [tool]})
    flat = [Variant(1, dialect=Dialect(tools="flat"))]
    found, whole = path.keys(body, flat, everybody), plain(path.tokenizer, body, flat)
    assert whole is not None
    assert found == whole


def test_a_frame_is_for_a_first_message_whose_numbers_are_of_the_same_kind(path: Chats) -> None:
    source = (
        "{% set ns = namespace(b=false) %}{% for m in messages[::-1] %}{% if m.role != 'user' and messages | length > 2 "
        "and m.tool_calls[0].index is boolean %}{% set ns.b = true %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ m.content }}{{ 'B' if ns.b and loop.index0 > 1 }}<|im_end|>{% endfor %}"
    )
    chats = []
    for index in (1, 2, True, 1.0):
        call = {"id": "1", "type": "function", "index": index, "function": {"name": "f", "arguments": "{}"}}
        begun = [{**message("assistant", "a"), "tool_calls": [call]}, *users(f"b{len(chats)}")]
        chats += [begun, *([*begun, *users(text)] for text in ("c", "d", "e"))]
    check_followed(path, source, chats)


def test_a_text_is_no_object(path: Chats) -> None:
    """Python has one object for an empty string."""
    source = "{% for m in messages %}{{ m.content }}{{ 'S' if loop.previtem and m.content is sameas loop.previtem.content }}"
    source += "<|im_end|>{% endfor %}"
    check_followed(
        path,
        source,
        [users(*texts) for texts in (("a", "b"), ("a", "b", "c"), ("a", "b", "d"), ("a", "", ""), ("a", "", "e"), ("a", "", "", ""))],
    )


# ---- templates of seeds ----


def check_seed(path: Chats, seed: int, templates: int, seen: Seen) -> None:
    grammar = Grammar(SeededRandom(seed))
    for _ in range(templates):
        check(path, grammar.template(), list(grammar.bodies()), seen)


@pytest.mark.parametrize("seed", SEEDS)
def test_made_templates(path: Chats, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = 0
    fill = Frame.fill

    def counted_fill(self: Frame, messages: Sequence[Message]) -> list[str] | None:
        nonlocal frames
        parts = fill(self, messages)
        frames += parts is not None
        return parts

    monkeypatch.setattr(Frame, "fill", counted_fill)
    seen = Seen()
    check_seed(path, seed, TEMPLATES_PER_SEED, seen)
    assert seen.known > 20, "hardly any conversation was followed"
    assert frames


def test_more_made_templates(path: Chats, rng: SeededRandom) -> None:
    """Some more with new seeds (`make soak`)."""
    check_seed(path, rng.first_seed, TEMPLATES_PER_SEED, Seen())
