"""sglfast.prompt.template against transformers' apply_chat_template, for templates in the style of real models."""

import copy
import datetime
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sglfast.errors import ConfigError, PromptError
from sglfast.prompt.template import ChatTemplate
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH
from sglfast.prompt.train import CHAT_TEMPLATE

SPECIAL = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}

CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Indentation, trims, strftime_now, tools with tojson(indent), set, namespace, nested macros, special tokens.
LLAMA3 = """\
{{- bos_token }}
{%- macro header(role) %}
    {{- "<|start_header_id|>" + role + "<|end_header_id|>\\n\\n" }}
{%- endmacro %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y") %}
    {%- else %}
        {%- set date_string = "26 Jul" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- header("system") }}
{{- "Today: " + date_string + "\\n" + system_message + "<|eot_id|>" }}
{% set ns = namespace(tool_shown=false, turns=0) %}
    {% for message in messages %}
      {%- set ns.turns = ns.turns + 1 %}
      {%- if message.role == 'user' and tools is not none and not ns.tool_shown %}
        {%- set ns.tool_shown = true %}
        {{- header("user") }}
        {%- for t in tools %}
            {{- t | tojson(indent=4) }}
            {{- "\\n\\n" }}
        {%- endfor %}
        {{- message['content'] | trim + "<|eot_id|>" }}
      {%- elif message.tool_calls is defined %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("only single tool calls") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- header("assistant") + '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + "}<|eot_id|>" }}
      {%- elif message.content is mapping or message.content is iterable and message.content is not string %}
        {{- message.content | tojson }}
      {%- else %}
        {{- header(message['role']) + message['content'] | trim + '<|eot_id|>' }}
      {%- endif %}
    {% endfor %}
{%- if add_generation_prompt %}
    {{- header("assistant") }}
{%- endif %}
turns: {{ ns.turns }}
"""

# Walks over content parts; break and continue of the loop controls; a generation block with a variable inside.
PARTS = """\
{% for message in messages %}
  {% if message.role == 'skip' %}{% continue %}{% endif %}
[{{ message.role }}]
  {%- if message.content is string %}
    {{- message.content }}
  {%- else %}
    {%- for part in message.content %}
      {%- if part.type == 'text' %}{{ part.text }}{% else %}<{{ part.type }}>{% endif %}
    {%- endfor %}
  {%- endif %}
  {%- if message.role == 'assistant' %}
    {% generation %}
    {% set inside = 'x' %}
    {{- inside + eos_token }}
    {% endgeneration %}
  {%- endif %}
  {{- inside | default('unset') }}
  {% if loop.index > 4 %}{% break %}{% endif %}
{% endfor %}
{% for d in documents or [] %}{{ d.title | upper }}: {{ d.text }}
{% endfor %}{{ custom | default('none') }}{{ pad_token | default('no pad') }}"""

PICKY = """{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate: ' ~ loop.index) }}{% endif %}{{ message.content.strip() }}{% endfor %}"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "parts": PARTS, "picky": PICKY, "demo": CHAT_TEMPLATE}

TEXT = st.one_of(st.text(max_size=20), st.sampled_from(["", " ", "\n", " padded \n", "<|im_end|>", "{{ x }}", "é 日本 🎉", "<b>&"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats(allow_nan=False, allow_infinity=False, width=32) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
PART = st.one_of(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), st.fixed_dictionaries({"type": st.just("image")}))
CALL = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXT, "arguments": st.dictionaries(TEXT, JSON)})}
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool", "skip"]),
        "content": st.one_of(TEXT, TEXT, TEXT, st.none(), st.lists(PART, max_size=3)),
    },
    optional={"tool_calls": st.none() | st.lists(CALL, max_size=2), "name": TEXT},
)
TOOL = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXT, "parameters": st.dictionaries(TEXT, JSON)})}
)
KWARGS = st.fixed_dictionaries(
    {},
    optional={
        "custom": TEXT,
        "date_string": TEXT,
        "eos_token": TEXT,
        "documents": st.lists(st.fixed_dictionaries({"title": TEXT, "text": TEXT}), max_size=2),
    },
)


@pytest.fixture(scope="module", params=list(TEMPLATES))
def pair(request: pytest.FixtureRequest) -> tuple[ChatTemplate, Any]:
    """The same template in our hands and in those of transformers."""
    source = TEMPLATES[request.param]
    transformers_class: Any = PreTrainedTokenizerFast
    theirs = transformers_class(tokenizer_file=f"{DEMO_TOKENIZER_PATH}/tokenizer.json", chat_template=source, **SPECIAL)
    return ChatTemplate(source, SPECIAL), theirs


def compare(pair: tuple[ChatTemplate, Any], messages: list[Any], kwargs: dict[str, Any], **options: Any) -> bool:
    """Assert that both give the same text, or both refuse; returns whether there was a text."""
    ours, theirs = pair
    before = copy.deepcopy((messages, kwargs, options))
    try:
        want = theirs.apply_chat_template(messages, tokenize=False, **options, **kwargs)
    except Exception:
        with pytest.raises(PromptError):
            ours.render(messages, kwargs=kwargs, **options)
        return False
    assert ours.render(messages, kwargs=kwargs, **options) == want
    assert (messages, kwargs, options) == before, "the arguments were changed"
    return True


@settings(max_examples=150)
@given(st.lists(MESSAGE, max_size=4), st.none() | st.lists(TOOL, max_size=2), st.booleans(), KWARGS)
def test_same_text_as_transformers(
    pair: tuple[ChatTemplate, Any],
    messages: list[Any],
    tools: list[Any] | None,
    add_generation_prompt: bool,
    kwargs: dict[str, Any],
) -> None:
    compare(pair, messages, kwargs, tools=tools, add_generation_prompt=add_generation_prompt)


@settings(max_examples=150)
@given(st.lists(MESSAGE, max_size=2), MESSAGE)
def test_same_continuation_as_transformers(pair: tuple[ChatTemplate, Any], messages: list[Any], last: dict[str, Any]) -> None:
    compare(pair, [*messages, last], {}, add_generation_prompt=False, continue_final_message=True)


CONVERSATION = [
    {"role": "user", "content": "What is the weather?\n"},
    {"role": "assistant", "content": " Let me see "},
    {"role": "user", "content": "Thanks <|im_end|>"},
]


def test_plain_conversation_has_a_text(pair: tuple[ChatTemplate, Any]) -> None:
    """The properties above must not hold for the reason alone that every conversation is refused."""
    assert compare(pair, CONVERSATION, {}, add_generation_prompt=True)
    assert compare(pair, CONVERSATION[:2], {}, add_generation_prompt=False, continue_final_message=True)


class TestRefusals:
    @pytest.mark.parametrize("name", sorted(["messages", "tools", "add_generation_prompt", "chat_template", "tokenize"]))
    def test_reserved_variables(self, name: str) -> None:
        with pytest.raises(PromptError, match=name):
            ChatTemplate(CHATML, {}).render(CONVERSATION, kwargs={name: "x"})

    @pytest.mark.parametrize("messages", [[], ["hi"], [None]])
    def test_no_messages(self, messages: list[Any]) -> None:
        with pytest.raises(PromptError, match="message"):
            ChatTemplate(CHATML, {}).render(messages)

    def test_the_template_says_why(self) -> None:
        with pytest.raises(PromptError, match="roles must alternate: 2"):
            ChatTemplate(PICKY, {}).render([CONVERSATION[0]] * 2)

    @pytest.mark.parametrize(
        "source",
        [
            "{{ messages.__class__.__mro__ }}",
            "{{ ''.__class__.__base__.__subclasses__() }}",
            "{% set _ = messages.append(1) %}",
            "{{ messages[0].role.nosuch() }}",
            "{{ messages[0].missing.field }}",
            "{{ messages | map(attribute='missing') | list | tojson }}",
            "{{ 1 / 0 }}",
            "{{ range(999999999) | list }}",
            "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        ],
    )
    def test_whatever_a_template_does(self, source: str) -> None:
        with pytest.raises(PromptError, match="the chat template refuses the conversation"):
            ChatTemplate(source, {}).render(CONVERSATION)

    def test_continue_needs_no_generation_prompt(self) -> None:
        with pytest.raises(PromptError, match="exclude each other"):
            ChatTemplate(CHATML, {}).render(CONVERSATION, continue_final_message=True)

    @pytest.mark.parametrize("source", ["{% for m in messages %}", "{{ x | nosuchfilter }}", "{% generation %}", "{{ 'a"])
    def test_broken_template(self, source: str) -> None:
        with pytest.raises(ConfigError, match="chat template: not valid jinja2"):
            ChatTemplate(source, {})


@pytest.mark.parametrize(
    ("source", "want"),
    [
        (CHATML, "string"),
        (LLAMA3, "string"),
        (CHAT_TEMPLATE, "string"),
        ("{% for message in messages %}{% for part in message.content %}{% endfor %}{% endfor %}", "openai"),
        ("{% for message in messages %}{% for part in message['content'] | list %}{% endfor %}{% endfor %}", "openai"),
        ("{% for m in messages %}{% for part in m.content[1:] %}{% endfor %}{% endfor %}", "openai"),
        ("{% for msg in messages %}{% for part in msg['content'] %}{% endfor %}{% endfor %}", "openai"),
        ("{% for turn in messages %}{% for part in turn.content %}{% endfor %}{% endfor %}", "string"),
        ("{% for message in messages %}{% for part in message.tool_calls %}{% endfor %}{% endfor %}", "string"),
        ("{% for message in messages %}{% for part in message.inner.content %}{% endfor %}{% endfor %}", "string"),
        ("{# vision #}{{ messages[0].content }}", "openai"),
    ],
)
def test_content_format(source: str, want: str) -> None:
    assert ChatTemplate(source, {}).content_format == want


def test_strftime_now_is_local_time() -> None:
    years = {datetime.datetime.now().strftime("%Y-%m-%d")}
    text = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}).render(CONVERSATION)
    assert text in years | {datetime.datetime.now().strftime("%Y-%m-%d")}


def test_tojson_keeps_order_and_characters() -> None:
    value = {"b": "<é>&'", "a": [1.0, None, True]}
    template = ChatTemplate("{{ value | tojson }}|{{ value | tojson(sort_keys=true, separators=(',', ':')) }}", {})
    plain, sorted_keys = template.render(CONVERSATION, kwargs={"value": value}).split("|")
    assert plain == json.dumps(value, ensure_ascii=False)
    assert sorted_keys == """{"a":[1.0,null,true],"b":"<é>&'"}"""
