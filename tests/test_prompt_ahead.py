"""sglfast.prompt.ahead: what a template looks for behind a message in its loop, and what depends on it."""

from typing import Any

import pytest
from chat_paths import behind
from chat_templates import TEMPLATES

from sglfast.prompt.ahead import Ahead
from sglfast.prompt.frames import FrameMaker
from sglfast.prompt.kept import NotStableError
from sglfast.prompt.stable import Border, Run, StableTemplate
from sglfast.prompt.template import ChatTemplate

Message = dict[str, Any]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"role": "tool", "content": "42"}
HARMONY = ChatTemplate(TEMPLATES["harmony"], {})


def called(content: str) -> Message:
    return {"role": "assistant", "content": content, "tool_calls": [CALL]}


def stable(chat: ChatTemplate) -> StableTemplate:
    template = StableTemplate.of(chat)
    assert template is not None
    return template


STABLE = stable(HARMONY)


def run_of(messages: list[Message], start: Border | None = None, template: StableTemplate = STABLE) -> Run:
    run = template.run(len(messages), messages.__getitem__, template.variables(None, {}), start)
    assert run.go_on()
    return run


def text_of(run: Run) -> str:
    return "".join(run.parts)


QUESTION = {"role": "user", "content": "q"}
ANSWERED: list[Message] = [{"role": "assistant", "content": "so"}, {"role": "user", "content": "why?"}]


def test_calls_without_thoughts_depend_on_nothing_behind_them() -> None:
    messages = [QUESTION, *(message for _ in range(5) for message in (called(""), TOOL))]
    first = run_of(messages)
    assert [(border.at, border.needed, border.absent) for border in first.borders] == [(0, 1, ()), *((n, n, ()) for n in range(1, 12))]
    more = [*messages, *ANSWERED]
    again = run_of(more, first.borders[-1])
    assert text_of(first)[: first.borders[-1].chars] + text_of(again) == HARMONY.render(more)


def test_thoughts_before_a_call_are_printed_until_there_is_an_answer() -> None:
    messages = [QUESTION, called("hm"), TOOL]
    first = run_of(messages)
    assert "hm" in text_of(first)
    late = first.borders[-1]
    assert (late.at, late.needed) == (3, 3)
    assert late.absent
    assert not late.is_sure
    more = [*messages, called("still"), TOOL]
    again = run_of(more, late)
    assert text_of(first)[: late.chars] + text_of(again) == HARMONY.render(more)
    later = again.borders[-1]
    assert later.at == 5
    longest = [*more, called(""), TOOL]
    assert text_of(first)[: late.chars] + text_of(again)[: later.chars] + text_of(run_of(longest, later)) == HARMONY.render(longest)
    for seen, border in ((messages, late), (more, late), (more, later)):
        with pytest.raises(NotStableError):
            run_of([*seen, *ANSWERED], border)
    early = first.borders[1]
    assert early.is_sure
    answered = [*more, *ANSWERED]
    assert text_of(first)[: early.chars] + text_of(run_of(answered, early)) == HARMONY.render(answered)


def test_an_answer_that_was_found_is_needed() -> None:
    messages = [QUESTION, called("hm"), TOOL, *ANSWERED]
    first = run_of(messages)
    assert "hm" not in text_of(first)
    border = next(border for border in first.borders if border.at == 2)
    assert (border.needed, border.is_sure) == (4, True)
    last = first.borders[-1]
    assert (last.at, last.needed, last.is_sure) == (5, 5, True)


def test_each_message_is_looked_at_once() -> None:
    asked = [0] * 201
    messages = [QUESTION, *(message for _ in range(100) for message in (called("hm"), TOOL))]

    def message_at(at: int) -> Message:
        asked[at] += 1
        return messages[at]

    run = STABLE.run(len(messages), message_at, STABLE.variables(None, {}))
    run.go_on()
    assert max(asked[2:]) <= 3
    assert text_of(run) == HARMONY.render(messages)


FOUND = "{% if x.role == 'user' %}{% set a.f = true %}"
LOOK = "{% set a = namespace(f=false) %}{% for x in messages[loop.index:] %}" + FOUND + "{% endif %}{% endfor %}"
# What may be asked of what was found: the answer is right, or there is none.
USES = [
    "a.f", "a.f | string", "a.f ~ ''", "not a.f", "a.f and 'x'", "a.f or 'x'", "'y' if a.f else 'n'", "a.f == true", "a.f != false",
    "a.f == 1", "1 == a.f", "a.f is true", "a.f is false", "a.f is boolean", "a.f is none", "a.f is defined", "a.f is number",
    "a.f is integer", "a.f is float", "a.f is string", "a.f is iterable", "a.f is sequence", "a.f is mapping", "a.f is callable",
    "a.f is sameas true", "a.f is sameas a.f", "a.f is eq true", "a.f is ne true", "a.f is in [true]", "a.f in [true, 2]",
    "a.f in {true: 1}", "{a.f: 1}", "[a.f, true] | max", "[a.f] | sort", "[a.f] | select | list | length",
    "[a.f, a.f] | unique | list | length", "a.f | int", "a.f | float", "a.f | abs", "a.f | tojson", "a.f | default(7)",
    "a.f | default(7, true)", "a.f | length", "a.f | list", "a.f + 1", "1 - a.f", "-a.f", "a.f * 2", "a.f > 0", "2 > a.f", "'%s' % a.f",
    "'%d' % a.f", "'{}'.format(a.f)", "range(a.f) | list", "[1, 2][a.f]", "'ab'[a.f:]", "a.f.real", "a.f.bit_length()", "a.f._run",
    "a.f.__class__", "a.f | attr('real')", "a.f | e", "a.f | pprint", "[a.f] | join", "[a.f] | sum", "[a.f] | string", "a | string",
    "a.f | random", "a.f.run",
]  # fmt: skip


def outcome(run: Run) -> str | None:
    try:
        assert run.go_on()
    except Exception:  # a template can raise anything; then nothing is answered
        return None
    return text_of(run)


@pytest.mark.parametrize("use", USES)
def test_what_was_found_is_answered_right_or_not_at_all(use: str) -> None:
    chat = ChatTemplate("{% for m in messages %}" + LOOK + "{{ m.role }}{{ " + use + " }}{{ m.content }}<|im_end|>\n{% endfor %}", {})
    template = StableTemplate.of(chat)
    if template is None:
        return
    variables = template.variables(None, {})
    start: list[Message] = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant", "tool")]
    for begun in range(1, len(start) + 1):
        first = template.run(begun, start.__getitem__, variables)
        text = outcome(first)
        assert text is None or text == chat.render(start[:begun])
        for border in first.borders:
            for roles in ((), ("assistant",), ("user",), ("assistant", "user"), ("tool", "tool", "user")):
                messages = [*start[: border.needed], *({"role": role, "content": "new"} for role in roles)]
                rest = outcome(template.run(len(messages), messages.__getitem__, variables, border)) if messages else None
                assert rest is None or text_of(first)[: border.chars] + rest == chat.render(messages)
                if border.needed == border.at and roles:
                    frame = FrameMaker(template).make(border, "user", None, roles, variables, start.__getitem__)
                    parts = None if frame is None else frame.fill(behind(border, messages))
                    assert parts is None or text_of(first)[: border.chars] + "".join(parts) == chat.render(messages)


def test_only_bool_uses_are_looked_up() -> None:
    """The property above must not hold for the reason alone that nothing is answered."""
    for use in ("'y' if a.f else 'n'", "not a.f", "a.f is true", "a.f is boolean"):
        chat = ChatTemplate("{% for m in messages %}" + LOOK + "{{ m.role }}{{ " + use + " }}<|im_end|>\n{% endfor %}", {})
        run = run_of([QUESTION, *ANSWERED], template=stable(chat))
        assert text_of(run) == chat.render([QUESTION, *ANSWERED])
        assert len(run.borders) == 4


# Loops that do more than to look for something, or for something that is not about one message alone.
OTHERS = [
    "{% for x in messages[loop.index:] %}{% if x.role == m.role %}{% set a.f = true %}{% endif %}{% endfor %}",
    "{% for x in messages[loop.index:] %}{% if loop.index0 == 1 %}{% set a.f = true %}{% endif %}{% endfor %}",
    "{% for x in messages[loop.index:] %}" + FOUND + "{% else %}{% set a.f = false %}{% endif %}{% endfor %}",
    "{% for x in messages[loop.index:] %}" + FOUND + "{% endif %}{{ x.role }}{% endfor %}",
    "{% for x in messages[loop.index:] %}" + FOUND + "!{% endif %}{% endfor %}",
    "{% for x in messages[loop.index:] %}" + FOUND + "{% break %}{% endif %}{% endfor %}",
    "{% for x in messages[loop.index:] %}{% if x.role == 'user' %}{% set a.f = 'x' %}{% endif %}{% endfor %}",
    "{% for x in messages[loop.index:] %}{% if x.role == 'user' and not a.f %}{% set a.f = true %}{% endif %}{% endfor %}",
    "{% for x in messages[loop.index:] if x.role == 'user' %}{% set a.f = true %}{% else %}{% set a.g = true %}{% endfor %}",
    "{% for x in messages[-1:] %}" + FOUND + "{% endif %}{% endfor %}",
    "{% for x in [{'role': 'user'}] %}" + FOUND + "{% endif %}{% endfor %}",
    "{% set a.f = none %}{% for x in messages[loop.index:] %}" + FOUND + "{% endif %}{% endfor %}",
    "{% set a.f = true %}{% for x in messages[loop.index:] %}" + FOUND + "{% endif %}{% endfor %}",
    "{% for x in messages[loop.index:] %}{% if x.role == 'user' %}{% set kept.f = true %}{% endif %}{% endfor %}",
]


@pytest.mark.parametrize("look", OTHERS)
def test_other_loops_are_what_they_are(look: str) -> None:
    source = "{% set kept = namespace(f=false) %}{% for m in messages %}{% set a = namespace(f=false) %}"
    source += look + "{{ m.role }}{{ 'y' if a.f else 'n' }}{{ 'y' if kept.f else 'n' }}<|im_end|>\n{% endfor %}"
    chat = ChatTemplate(source, {})
    template = stable(chat)
    messages: list[Message] = [QUESTION, *ANSWERED, TOOL]
    first = template.run(len(messages), messages.__getitem__, template.variables(None, {}))
    text = outcome(first)
    assert text is None or text == chat.render(messages)
    for border in first.borders:
        for more in ([QUESTION], [TOOL], ANSWERED, []):
            longer = [*messages[: border.needed], *more]
            rest = outcome(template.run(len(longer), longer.__getitem__, template.variables(None, {}), border)) if longer else None
            assert rest is None or text_of(first)[: border.chars] + rest == chat.render(longer)


def test_a_look_ahead_belongs_to_the_loop_over_the_messages() -> None:
    run = STABLE.run(1, [QUESTION].__getitem__, STABLE.variables(None, {}))
    with pytest.raises(NotStableError, match="before the loop"):
        bool(Ahead(run, 0, "x", lambda message: ""))
