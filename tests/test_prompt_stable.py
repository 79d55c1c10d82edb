"""sglfast.prompt.stable, orderly and frames: what is rendered from the middle is what the whole has there, with whatever template."""

from typing import Any

import pytest
from chat_paths import behind
from chat_templates import MIDDLE, NEVER, TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st

from sglfast.errors import PromptError
from sglfast.prompt import stable as stable_module
from sglfast.prompt.frames import FrameMaker
from sglfast.prompt.kept import NotStableError
from sglfast.prompt.stable import Border, Run, StableTemplate
from sglfast.prompt.template import ChatTemplate
from sglfast.prompt.texts import shape_of
from sglfast.prompt.train import CHAT_TEMPLATE

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ALL = TEMPLATES | {"demo": CHAT_TEMPLATE}
CHATS = {name: ChatTemplate(source, SPECIAL) for name, source in ALL.items()}
STABLE = {name: StableTemplate.of(chat) for name, chat in CHATS.items()}

Message = dict[str, Any]
TEXT = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", " ", " padded \n", "<|im_end|>\n", "{{ x }}", "</think>", "é 🎉", "<tool_response>x", "<tool_response>x</tool_response>"]
    ),
    st.sampled_from(["<think>\nhm\n</think>\n\nso", "a</think>b</think>c", "/nothink"]),
)
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": TEXT}),
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXT, "tool_calls": st.just([CALL])}),
    st.fixed_dictionaries({"role": st.just("tool"), "content": TEXT, "name": TEXT}),
    st.fixed_dictionaries({"role": st.just("assistant"), "thinking": TEXT, "tool_calls": st.just([CALL])}),
    st.fixed_dictionaries({"role": st.just("developer"), "content": TEXT}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": TEXT, "reasoning_content": TEXT}, optional={"tool_calls": st.just([CALL])}
    ),
    st.fixed_dictionaries({"role": st.just("user"), "content": st.just([{"type": "text", "text": "part"}])}),
)


# Of a round of calls: their answers, then the one to the question, and the next question.
STEPS = st.one_of(
    st.tuples(MESSAGE.filter(lambda message: "tool_calls" in message), st.just({"role": "tool", "content": "42"})),
    st.tuples(st.just({"role": "assistant", "content": "so"}), st.just({"role": "user", "content": "why?"})),
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Some that most templates take, and some that few do."""
    if draw(st.booleans()):
        return draw(st.lists(MESSAGE, min_size=1, max_size=7))
    if draw(st.booleans()):
        return [{"role": "user", "content": draw(TEXT)}, *(step for _ in range(draw(st.integers(1, 4))) for step in draw(STEPS))]
    texts = draw(st.lists(TEXT, min_size=1, max_size=9))
    first = draw(st.booleans())
    roles = ["system"] * first + ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


ROLES = st.lists(st.sampled_from(["user", "assistant", "tool"]), max_size=4)
TOOLS = st.none() | st.just([{"type": "function", "function": {"name": "f", "parameters": {}}}])
KWARGS = st.sampled_from(
    [
        {},
        {},
        {"enable_thinking": False},
        {"date_string": "today"},
        {"namespace": None},
        {"strftime_now": "x"},
        {"reasoning_effort": "high", "builtin_tools": ["browser"]},
    ]
)


def whole(name: str, messages: list[Message], tools: Any, kwargs: dict[str, Any]) -> str | None:
    try:
        return CHATS[name].render(messages, tools=tools, kwargs=kwargs)
    except PromptError:
        return None


def run_of(name: str, messages: list[Message], tools: Any, kwargs: dict[str, Any], start: Border | None = None) -> Run:
    template = STABLE[name]
    assert template is not None
    return template.run(len(messages), messages.__getitem__, template.variables(tools, kwargs), start)


def text_of(run: Run) -> str | None:
    """The text of a run, None when the template refuses or cannot be followed."""
    try:
        assert run.go_on()
    except Exception:
        return None
    return "".join(run.parts)


def test_expectations_name_every_template() -> None:
    assert {*MIDDLE, *NEVER, "remembers_messages"} == set(TEMPLATES)


PLAIN = [{"role": role, "content": f"{role} says {n}"} for n, role in enumerate(["user", "assistant"] * 4)]


@pytest.mark.parametrize("name", [*MIDDLE, "demo"])
def test_plain_conversations_are_rendered_from_the_middle(name: str) -> None:
    """The properties below must not hold for the reason alone that there are no borders."""
    run = run_of(name, PLAIN, None, {})
    assert text_of(run) == whole(name, PLAIN, None, {})
    late = [border for border in run.borders if border.at >= len(PLAIN) - 2]
    assert late
    assert all(border.needed - border.at <= 1 for border in run.borders if border.at)


LONGER = [*PLAIN, {"role": "user", "content": "and now?"}]


@pytest.mark.parametrize("name", NEVER)
def test_what_depends_on_the_end_has_no_borders_for_a_longer_one(name: str) -> None:
    if STABLE[name] is not None:
        run = run_of(name, PLAIN, None, {})
        text_of(run)
        for border in run.borders:
            if border.at and border.chars:
                with pytest.raises(NotStableError):
                    run_of(name, LONGER, None, {}, border).go_on()


@settings(max_examples=150)
@given(st.sampled_from(sorted(ALL)), conversations(), st.lists(MESSAGE, max_size=3), conversations(), TOOLS, KWARGS)
def test_the_rest_is_what_the_whole_has_behind_the_border(
    name: str, messages: list[Message], more: list[Message], others: list[Message], tools: Any, kwargs: dict[str, Any]
) -> None:
    if STABLE[name] is None:
        return
    first = run_of(name, messages, tools, kwargs)
    text = text_of(first)
    expected = whole(name, messages, tools, kwargs)
    assert text == expected or text is None
    printed = "".join(first.parts)
    for border in first.borders:
        assert border.needed >= border.at
        for after in (messages[border.needed :] + more, others, [*more, *others], messages[border.needed :]):
            second = messages[: border.needed] + after
            wanted = whole(name, second, tools, kwargs)
            try:
                run = run_of(name, second, tools, kwargs, border)
                run.go_on()
            except NotStableError:
                continue
            except Exception:
                assert wanted is None, "the rest is refused, the whole is not"
                continue
            if wanted is not None:
                assert printed[: border.chars] + "".join(run.parts) == wanted
            # From a border of the resumed run one can go on as well.
            for later in run.borders:
                again = run_of(name, second, tools, kwargs, later)
                if text_of(again) is not None and wanted is not None:
                    assert printed[: border.chars] + "".join(run.parts)[: later.chars] + "".join(again.parts) == wanted


SHAPED = st.lists(MESSAGE.filter(lambda message: shape_of(message) is not None), max_size=4)


@settings(max_examples=300)
@given(st.sampled_from(sorted(ALL)), conversations(), SHAPED, st.lists(TEXT, min_size=6, max_size=6), TOOLS)
def test_frames_are_what_is_printed_whatever_the_texts_are(
    name: str, messages: list[Message], more: list[Message], texts: list[str], tools: Any
) -> None:
    """Frames of the shapes of `more`, which is made of texts and calls, filled with others of those shapes."""
    template = STABLE[name]
    if template is None:
        return
    variables = template.variables(tools, {})
    first = run_of(name, messages, tools, {})
    text_of(first)
    maker = FrameMaker(template)
    opening = shape_of(messages[0])
    role = opening if isinstance(opening, str) else None
    shapes = [shape for message in more if (shape := shape_of(message)) is not None]
    for border in first.borders:
        before = shape_of(messages[border.at - 1]) if border.at else None
        frame = maker.make(border, role, before, shapes, variables, messages.__getitem__)
        if frame is None or border.needed > border.at:
            continue
        for shift in range(3):
            tail = [retold(message, texts[(n + shift) % 6]) for n, message in enumerate(more)]
            if [shape_of(message) for message in tail] != shapes:
                continue
            longer = messages[: border.at] + tail
            parts = frame.fill(behind(border, longer))
            if parts is None:
                said = str(longer)
                assert any(not text.strip() or any(word in said for word in ASKED) for text in [*texts, *texts_in(longer)])
                continue
            run = run_of(name, longer, tools, {}, border)
            run.go_on()
            assert "".join(parts) == "".join(run.parts)
            borders = frame.filled_borders(behind(border, longer))
            assert len(borders) == len(run.borders)
            for made, found in zip(borders, run.borders, strict=True):
                assert (made.at, made.needed, len("".join(parts[: made.chars]))) == (found.at, found.needed, found.chars)
                # A text that is what the attribute was before may stand in one of them only.
                assert all(kept | values == kept for kept, values in zip(made.state, found.state, strict=True))


def retold(value: Any, text: str, key: str = "") -> Any:
    """Another message of the same shape, if the text is not empty where the other's was not."""
    if isinstance(value, dict):
        return {"a": [text], text: 1} if key == "arguments" and value else {name: retold(item, text, name) for name, item in value.items()}
    if isinstance(value, list):
        return [retold(item, text) for item in value]
    return text + key if isinstance(value, str) and value and key not in ("role", "type") else value


def texts_in(value: Any) -> list[str]:
    """All strings and dicts in it; of dicts what they hold, too, or none."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts_in(item)] if value else [""]
    return [text for item in value for text in texts_in(item)] if isinstance(value, list) else [str(value)]


ASKED = ("</think>", "<tool_response>", "/nothink")  # what some of the templates look for in a text
FRAMED = [
    "demo",
    "chatml",
    "llama3",
    "gemma",
    "gemma3",
    "phi3",
    "mistral",
    "command_r",
    "granite",
    "zephyr",
    "qwen25",
    "clock",
    "thinker",
    "forward",
    "deepseek",
    "harmony",
    "whole_messages",
    "remembered",
    "remembers_messages",
]


@pytest.mark.parametrize("name", FRAMED)
def test_plain_messages_have_frames(name: str) -> None:
    template = STABLE[name]
    assert template is not None
    run = run_of(name, LONGER, None, {})
    run.go_on()
    border = run.borders[-1 if name != "zephyr" else -2]
    frame = FrameMaker(template).make(
        border, "user", None, ("user", "assistant", "user")[border.at % 2 :], template.variables(None, {}), PLAIN.__getitem__
    )
    assert frame is not None
    assert frame.borders


@pytest.mark.parametrize("chars", [1500, 3000])
def test_a_frame_holds_little_besides_the_texts(chars: int) -> None:
    """Frames are kept by their number, so what is printed around a text must not be long."""
    source = "{% for m in messages %}<|im_start|>{{ m.role }}" + "x" * chars + "{{ m.content }}<|im_end|>\n{% endfor %}"
    template = StableTemplate.of(ChatTemplate(source, {}))
    assert template is not None
    run = template.run(2, PLAIN.__getitem__, template.variables(None, {}))
    run.go_on()
    frame = FrameMaker(template).make(run.borders[-1], "user", None, ("user",), template.variables(None, {}), PLAIN.__getitem__)
    assert (frame is None) == (chars > 2048)


# What a template may ask of a text, with the value of a string and that of a Text: it is refused, or the same.
QUESTIONS = [
    "m.content == 'a'", "m.content != 'a'", "m.content | length", "m.content | int", "m.content | float", "m.content[0]",
    "m.content[1:]", "'a' in m.content", "m.content in 'abc'", "m.content in ['a']", "m.content is string", "m.content is iterable",
    "m.content is sequence", "m.content is mapping", "m.content is none", "m.content is defined", "m.content is number",
    "m.content is callable", "m.content | upper", "m.content | tojson", "m.content | list", "m.content | first", "m.content | string",
    "m.content | safe", "m.content | e", "m.content | replace('a', 'b')", "m.content | default('x')", "m.content | default('x', true)",
    "m.content | indent", "m.content | trim('a')", "m.content.strip('a')", "m.content.startswith('a')", "m.content.split('a')",
    "m.content ~ 1", "1 ~ m.content", "m.content + 'x'", "'x' + m.content", "m.content * 2", "m.content % 2", "'%s' % m.content",
    "'{}'.format(m.content)", "'-'.join([m.content])", "[m.content] | join('-')", "{m.content: 1}", "not m.content",
    "m.content or 'none'", "m.content and 'some'", "'yes' if m.content else 'no'", "m.content < 'b'", "m | string",
    "m.content | batch(2) | list", "m.content | wordcount", "m.content | truncate(3)", "m.content.upper()", "m.content | attr('x')",
    "m.content is eq 'a'", "m.content is in 'abc'", "m.content is lower", "(m.content | trim) or 'blank'", "m.content | trim | trim",
    "(m.content + ' ') | trim", "m.content | reverse", "m.content | sort", "m.content | unique | list", "m.content | select | list",
    "m.content == messages[0].content", "m == messages[0]", "m in messages", "messages | string", "messages == []", "messages + []",
    "messages | sort", "messages.index(m)", "messages.copy()", "messages is sequence", "messages is iterable", "messages is mapping",
    "messages is string", "messages[0] is defined", "messages[99] is defined", "messages['x'] is defined", "messages.x is defined",
    "messages | first | length", "messages | map(attribute='role') | join", "messages[:1] | length", "messages[0:2:1] | length",
    "messages[true].role", "messages | tojson",
]  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_to_a_text_is_answered_right_or_not_at_all(question: str) -> None:
    source = "{% for m in messages %}{{ m.role }}{{ " + question + " }}<|im_end|>\n{% endfor %}"
    chat = ChatTemplate(source, {})
    template = StableTemplate.of(chat)
    if template is None:
        return
    start = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "ab"}]
    first = template.run(2, start.__getitem__, template.variables(None, {}))
    text_of(first)
    for border in first.borders:
        frame = FrameMaker(template).make(border, "user", None, ("user", "user"), template.variables(None, {}), start.__getitem__)
        for content in ("a", "", " a ", "2", "[]", "0"):
            tail = [{"role": "user", "content": content}, {"role": "user", "content": "x" + content}]
            messages = start[: border.at] + tail
            try:
                wanted: str | None = chat.render(messages)
            except PromptError:
                wanted = None
            parts = frame.fill(behind(border, messages)) if frame is not None and border.needed <= border.at else None
            before = "".join(first.parts)[: border.chars]
            if parts is not None:
                assert before + "".join(parts) == wanted
            if messages[: border.needed] == start[: border.needed]:
                rest = text_of(template.run(len(messages), messages.__getitem__, template.variables(None, {}), border))
                assert rest is None or before + rest == wanted


def test_the_clock_is_part_of_what_must_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    now = ["Monday"]
    monkeypatch.setattr(stable_module, "strftime_now", lambda format: f"{now[0]} {format}")
    template = StableTemplate.of(CHATS["clock"])
    assert template is not None
    assert template.stamp() == ()
    run = template.run(len(PLAIN), PLAIN.__getitem__, template.variables(None, {}))
    assert not run.go_on(40)
    assert template.stamp() == ("Monday %Y", "Monday %j")
    assert run.is_stamped(template.stamp())
    now[0] = "Tuesday"
    assert not run.is_stamped(template.stamp())
    with pytest.raises(NotStableError, match="time"):
        run.go_on()


def test_a_template_with_too_many_clocks_is_not_followed() -> None:
    source = "{% for n in range(9) %}{{ strftime_now('%Y' ~ n) }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    template = StableTemplate.of(ChatTemplate(source, {}))
    assert template is not None
    with pytest.raises(NotStableError, match="too many"):
        template.run(len(PLAIN), PLAIN.__getitem__, template.variables(None, {})).go_on()


NAMES_OF_TOOLS = "{% macro names(all) %}{% for tool in all %}{{ one(tool) }}{% endfor %}{% endmacro %}"
NAMES_OF_TOOLS += "{% macro one(tool) %}{% for key, value in tool.items() %}{{ value }}{% endfor %}{% endmacro %}{{ names(tools) }}"


@pytest.mark.parametrize("before", ["{{ tools | tojson }}", NAMES_OF_TOOLS])
def test_what_is_printed_before_the_loop_is_not_printed_again(before: str) -> None:
    template = StableTemplate.of(ChatTemplate(before + "{% for m in messages %}{{ m.content }}{% endfor %}", {}))
    assert template is not None
    tools = [{"name": "f"}]
    first = template.run(8, PLAIN.__getitem__, template.variables(tools, {}))
    first.go_on()

    class Unprintable(list[object]):
        def __iter__(self) -> Any:
            raise AssertionError("printed again")

    again = template.run(8, PLAIN.__getitem__, template.variables(Unprintable(), {}), first.borders[5])
    again.go_on()
    assert again.parts == [str(message["content"]) for message in PLAIN[5:]]


def test_messages_are_asked_for_when_they_are_needed() -> None:
    asked: list[int] = []

    def message_at(at: int) -> Message:
        asked.append(at)
        return PLAIN[at]

    template = STABLE["chatml"]
    assert template is not None
    run = template.run(8, message_at, template.variables(None, {}))
    assert not run.go_on(60)
    assert set(asked) == {0, 1}
    run.go_on()
    asked.clear()
    template.run(8, message_at, template.variables(None, {}), run.borders[6]).go_on()
    assert set(asked) == {6, 7}


def test_shapes_are_small() -> None:
    call: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x" * 9999: 1}}}
    assert shape_of({"role": "assistant", "content": "x" * 9999, "tool_calls": [call] * 10}) is not None
    many = [[[1] * 9] * 9] * 9
    for odd in ({**call, "type": "x" * 65}, {**call, "x" * 65: 1}, {**call, "index": many}):
        assert shape_of({"role": "assistant", "content": "", "tool_calls": [odd]}) is None
