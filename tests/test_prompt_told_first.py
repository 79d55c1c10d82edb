"""sglfast.prompt.told_first: which templates have told the tools before they go through the messages."""

import pytest
from chat_templates import TEMPLATES

from sglfast.prompt.template import make_environment
from sglfast.prompt.told_first import is_told_first

LOOP = "{% for m in messages %}{{ m.content }}{{ x }}<|im_end|>{% endfor %}"


def told_first(source: str) -> bool:
    return is_told_first(make_environment().parse(source))


@pytest.mark.parametrize("name", ["qwen25", "thinker", "llama3", "harmony", "granite", "chatml"])
def test_well_known_ones_have(name: str) -> None:
    assert told_first(TEMPLATES[name])


@pytest.mark.parametrize(
    "source",
    [
        "{% if tools %}{{ tools | tojson }}{% endif %}" + LOOP,
        "{% for tool in tools %}{{ tool.name }}{% set y = tool %}{% endfor %}{% set x = tools | length > 1 %}" + LOOP,
        "{% for tool in tools %}{{ tool.name }}{% endfor %}" + LOOP + "{% if tools and not tools is none %}.{% endif %}",
        "{% set ns = namespace(a=false) %}{% for tool in tools %}{{ tool.name }}{% endfor %}{% if tools %}{% set ns.a = true %}{% endif %}"
        + LOOP.replace("x", "ns.a"),
        "{% for tool in tools or [] %}{% for name in tool.function.parameters %}{{ name }}{% endfor %}{% endfor %}" + LOOP,
        "{% if custom_tools is defined %}{% set tools = custom_tools %}{% else %}{% set tools = none %}{% endif %}" + LOOP,
        "{% macro one(tool) %}{{ tool.name }}{% endmacro %}{% for tool in tools %}{{ one(tool) }}{% endfor %}" + LOOP,
    ],
)
def test_what_is_told_first(source: str) -> None:
    assert told_first(source)


@pytest.mark.parametrize(
    "before",
    [
        "{% set x = tools[0].name %}", "{% set x = tools | tojson %}", "{% set x %}{{ tools[0] }}{% endset %}",
        "{% if tools[0].name %}{% set x = 1 %}{% endif %}", "{% set y = tools[0] %}{% set x = y.name %}",
        "{% set x = namespace() %}{% for tool in tools %}{% set x.a = tool.name %}{% endfor %}",
        "{% set x = namespace() %}{% for tool in tools %}{% if tool.name %}{% set x.a = 1 %}{% endif %}{% endfor %}",
        "{% set x = 'a' if tools[0].name else 'b' %}", "{% macro x() %}{{ tools[0].name }}{% endmacro %}",
        "{% macro mac(t) %}{% set x.a = t %}{% endmacro %}{% set x = namespace() %}{{ mac(tools[0]) }}",
        "{% macro mac(n, t) %}{% set n.a = t %}{% endmacro %}{% set x = namespace() %}{{ mac(x, tools[0]) }}",
        "{% set x = namespace() %}{% set y = x %}{% for tool in tools %}{% set y.a = tool %}{% endfor %}",
        "{% set y = namespace() %}{% set x = [y] %}{% set z = x[0] %}{% if tools[0].name %}{% set z.a = 1 %}{% endif %}",
        "{% with y = tools[0] %}{% set x = 1 %}{% if y.name %}{% set ns.x = 1 %}{% endif %}{% endwith %}{% set x = ns %}",
        "{% set tools = tools[0].function %}{% if tools %}{% set x = 1 %}{% endif %}",
        "{% set tools = messages %}", "{% set y = messages %}{% set tools = y[1:] %}",
        "{% for m in (messages if tools[0].name else messages) %}{{ tools[0].name }}{% endfor %}",
        "{% set y = messages if tools[0].name else messages %}{% for m in y %}{{ tools[0].name }}{% endfor %}",
        "{% if false %}{% elif tools == [] %}{% set x = 1 %}{% endif %}", "{% set x, y = tools[0].name, 1 %}",
        "{% for tool in tools if tool.name %}{% else %}{% set y.x = 1 %}{% endfor %}{% set x = y %}",
    ],
)  # fmt: skip
def test_what_is_kept_of_them_is_told_late(before: str) -> None:
    assert not told_first(before + LOOP)


@pytest.mark.parametrize(
    "late", ["{{ tools[0].name }}", "{% if tools[0].name %}{{ 1 }}{% endif %}", "{% for tool in tools %}.{% endfor %}"]
)
def test_what_stands_in_the_loop_or_behind_it_is_told_late(late: str) -> None:
    assert not told_first(LOOP.replace("{{ x }}", late))
    assert not told_first(LOOP + late)
    assert told_first(late + LOOP)
