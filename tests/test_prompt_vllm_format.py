"""sglfast.prompt.vllm_format against what vLLM finds out about the same templates."""

import json
from pathlib import Path

import pytest

from sglfast.prompt.template import ChatTemplate

GOLDEN = json.loads((Path(__file__).parent / "golden" / "vllm_recorded" / "content_formats_0.33.0.json").read_bytes())["cases"]


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_golden(case: dict[str, str]) -> None:
    template = ChatTemplate(case["template"], {})
    assert template.format_for("vllm") == case["content_format"]


def test_golden_is_worth_something() -> None:
    found = [case["content_format"] for case in GOLDEN]
    assert min(found.count("openai"), found.count("string")) >= 5


def test_sglang_finds_out_in_its_own_way() -> None:
    template = ChatTemplate("{# image #}{% for m in messages %}{{ m.content }}{% endfor %}", {})
    assert (template.format_for("sglang"), template.format_for("vllm")) == ("openai", "string")
