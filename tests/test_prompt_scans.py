"""sglfast.prompt.scans, kept and views: what a template finds out about the whole conversation, and what it may do with that."""

from typing import Any

import pytest
from chat_paths import behind
from chat_templates import TEMPLATES

from sglfast.prompt.frames import FrameMaker
from sglfast.prompt.kept import NotStableError
from sglfast.prompt.stable import Border, Run, StableTemplate
from sglfast.prompt.template import ChatTemplate

Message = dict[str, Any]
NAMES = ["qwen3", "thinker", "forward", "last_by_range", "deepseek"]
CHATS = {name: ChatTemplate(TEMPLATES[name], {"bos_token": "<s>"}) for name in NAMES}
STABLE = {name: StableTemplate.of(chat) for name, chat in CHATS.items()}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
LONGER = [{"role": role, "content": f"{role} says {n}"} for n, role in enumerate(["user", "assistant"] * 4 + ["user"])]


def run_of(name: str, messages: list[Message], start: Border | None = None) -> Run:
    template = STABLE[name]
    assert template is not None
    return template.run(len(messages), messages.__getitem__, template.variables(None, {}), start)


def text_of(run: Run) -> str | None:
    """The text of a run, None when the template refuses or cannot be followed."""
    try:
        assert run.go_on()
    except Exception:
        return None
    return "".join(run.parts)


@pytest.mark.parametrize("name", NAMES)
def test_a_scan_of_the_whole_leaves_borders(name: str) -> None:
    """Those that do not depend on where the last question is."""
    run = run_of(name, LONGER)
    text = text_of(run)
    assert text is not None
    more = [*LONGER, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    border = run.borders[-1 if name != "last_by_range" else -2]  # that one marks the question
    again = run_of(name, more, border)
    assert text_of(again) is not None
    assert text[: border.chars] + "".join(again.parts) == CHATS[name].render(more)


def test_a_scan_asks_for_no_more_messages_than_it_needs() -> None:
    asked: list[int] = []

    def message_at(at: int) -> Message:
        asked.append(at)
        return LONGER[at]

    for name, wanted in (("thinker", {7, 8}), ("forward", {7, 8}), ("deepseek", {7, 8})):
        run = run_of(name, LONGER)
        text_of(run)
        border = next(border for border in run.borders if border.at == 7)
        template = STABLE[name]
        assert template is not None
        asked.clear()
        template.run(9, message_at, template.variables(None, {}), border).go_on()
        assert set(asked) - {0} == wanted


def test_thoughts_behind_the_last_question_are_not_taken_for_those_before_it() -> None:
    calls: list[Message] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "42"},
    ]
    run = run_of("thinker", calls)
    text = text_of(run)
    assert text is not None
    assert "hm" in text
    late = run.borders[-1]
    more: list[Message] = [*calls, {"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [CALL]}, calls[2]]
    again = run_of("thinker", more, late)
    assert text_of(again) is not None
    assert text[: late.chars] + "".join(again.parts) == CHATS["thinker"].render(more)
    asked = [*calls, {"role": "assistant", "content": "42"}, {"role": "user", "content": "why?"}]
    with pytest.raises(NotStableError):
        run_of("thinker", asked, late).go_on()
    early = run.borders[1]
    again = run_of("thinker", asked, early)
    assert text_of(again) is not None
    assert text[: early.chars] + "".join(again.parts) == CHATS["thinker"].render(asked)


# What may be asked of a number or of a message that a scan has found, and what it may keep.
FINDINGS = [
    "ns.n", "ns.n + 1", "1 + ns.n", "ns.n - 1", "1 - ns.n", "ns.n % 2", "ns.n * 2", "-ns.n", "ns.n ~ ''", "ns.n > 2", "2 < ns.n",
    "ns.n >= 2", "ns.n <= loop.index0", "loop.index0 == ns.n", "loop.index0 != ns.n", "ns.n == none", "ns.n == 'x'", "ns.n == 2.0",
    "ns.n > 1.5", "ns.n == true", "not ns.n", "ns.n and 1", "ns.n is number", "ns.n is integer", "ns.n is float", "ns.n is boolean",
    "ns.n is none", "ns.n is string", "ns.n is iterable", "ns.n is sequence", "ns.n is mapping", "ns.n is callable", "ns.n is defined",
    "ns.n is odd", "ns.n is even", "ns.n is divisibleby(2)", "ns.n is sameas 2", "ns.n is eq 2", "ns.n is gt 2", "ns.n is in [1, 2]",
    "ns.n in {2: 1}", "2 in [ns.n]", "{ns.n: 1}", "ns.n | string", "ns.n | int", "ns.n | float", "ns.n | abs", "ns.n | tojson",
    "ns.n | default(7)", "ns.n | default(7, true)", "ns.n | round", "[ns.n, 2] | max", "[ns.n, 2] | sort", "[ns.n, 2] | sum",
    "'%d' % ns.n", "'%s' % ns.n", "'{}'.format(ns.n)", "'%02d' | format(ns.n)", "range(ns.n) | list", "'abcdef'[ns.n]", "'abcdef'[:ns.n]",
    "messages[ns.n].role", "messages[ns.n:] | length", "ns.n.real", "ns.n.bit_length()", "ns.n._value", "ns.n._low", "ns.n is lower",
    "ns", "ns | string", "ns.x.role", "ns.x.role == 'user'", "ns.x | length", "ns.x == m", "ns.x is mapping", "ns.x is sameas m",
    "ns.x.items() | list", "'role' in ns.x", "ns.x | list", "ns.x | tojson", "ns.x", "ns.x.get('role')", "ns.x._roles",
    "ns.x | attr('role')", "ns.x | dictsort", "ns.x is iterable", "ns.x is sequence", "ns.x is string", "kept.role", "kept | length",
    "seen", "seen | length", "count", "ns.s", "ns.b",
]  # fmt: skip
SCANS = [
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.n = loop.index0 %}{% set ns.x = m %}"
    "{% set ns.s = m.content %}{% endif %}{% endfor %}",
    "{% for m in messages[::-1] %}{% if m.role == 'user' and not ns.b %}{% set ns.n = messages | length - loop.index %}"
    "{% set ns.b = true %}{% endif %}{% endfor %}",
    "{% set kept = messages[-1] %}{% set ns.n = messages | selectattr('role', 'equalto', 'user') | list | length %}",
    "{% set seen = messages | map(attribute='role') | list %}{% set ns.n = seen | length %}{% set count = 3 %}",
    "{% set count = messages | length %}{% set ns.n = 2 %}",
    "{% for m in messages | reverse %}{% if m is mapping and 'role' in m and m.get('role') == 'user' %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.b = m is iterable and m is sequence and (m | length) == 2 and m is not string %}{% endif %}{% endfor %}",
]


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("finding", FINDINGS)
def test_what_a_scan_found_is_answered_right_or_not_at_all(scan: str, finding: str) -> None:
    source = "{% set ns = namespace(n=0, b=false) %}" + scan
    source += "{% for m in messages %}{{ m.role }}{{ " + finding + " }}{{ m.content }}<|im_end|>\n{% endfor %}{{ ns.n }}"
    chat = ChatTemplate(source, {})
    template = StableTemplate.of(chat)
    if template is None:
        return
    roles = ["user", "user", "assistant", "user", "assistant", "tool"]
    start = [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]
    tails = [["user"], ["assistant", "user"], ["tool"], ["user"] * 3, []]
    variables = template.variables(None, {})
    for begun in range(1, len(start) + 1):
        first = template.run(begun, start.__getitem__, variables)
        text = text_of(first)
        if text is not None:
            assert text == chat.render(start[:begun])
        for border in first.borders:
            for tail in tails:
                messages = start[: border.needed] + [{"role": role, "content": "new"} for role in tail]
                frame = FrameMaker(template).make(border, "user", None, ["user", *tail], variables, start.__getitem__)
                if frame is not None and border.needed == border.at:
                    longer = [*start[: border.at], {"role": "user", "content": "first"}, *messages[border.at :]]
                    parts = frame.fill(behind(border, longer))
                    assert parts is None or "".join(first.parts)[: border.chars] + "".join(parts) == chat.render(longer)
                rest = text_of(template.run(len(messages), messages.__getitem__, variables, border)) if messages else None
                if rest is not None:
                    assert "".join(first.parts)[: border.chars] + rest == chat.render(messages)
