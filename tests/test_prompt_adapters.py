"""sglfast.prompt.adapters: which adapter a request asks for, by the kinds of workers."""

from typing import Any

import pytest

from sglfast._blockhash import chain_seed
from sglfast.prompt.adapters import Start, asked_for, lora_name_of, parent_of, starts_of
from sglfast.shm import Variant


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({}, ("", "")),
        ({"model": "m", "lora_path": "ad"}, ("m", "ad")),
        ({"model": "m:ad", "lora_path": ["ad"]}, ("m:ad", "ad")),
        ({"model": 3, "lora_path": ["a", "b"]}, ("", "")),
        ({"model": "m" * 513, "lora_path": None}, ("", "")),
    ],
)
def test_asked_for(body: dict[str, Any], asked: tuple[str, str]) -> None:
    assert asked_for(body) == asked


@pytest.mark.parametrize(
    ("model", "lora_path", "named", "models"),
    [
        ("m", "", "", ""),
        ("", "", "", ""),
        ("m", "ad", "ad", ""),
        ("m: ad ", "other", "ad", "m: ad "),
        ("m:", "ad", "ad", "m:"),
        ("ad", "", "", "ad"),
    ],
)
def test_lora_name_of(model: str, lora_path: str, named: str, models: str) -> None:
    assert lora_name_of(Variant(4), model, lora_path) == named
    assert lora_name_of(Variant(4, adapters="shared"), model, lora_path) == ""
    assert lora_name_of(Variant(4, route="tokens", model="m", adapters="models"), model, lora_path) == models
    assert lora_name_of(Variant(4, route="tokens", adapters="models"), model, lora_path) == "", "nobody knows the base's name"


def test_a_colon_in_the_served_name_is_no_adapter() -> None:
    assert lora_name_of(Variant(4, model="llama:8b"), "llama:8b", "") == ""
    assert lora_name_of(Variant(4, model="llama:8b"), "llama:8b:ad", "") == "8b:ad", "SGLang cuts at the first colon"


def test_starts_of() -> None:
    sha, by_tokens, vllm = Variant(4, True), Variant(4, True, "tokens", "m"), Variant(4, True, "tokens", "m", "models")
    plain, salted = (Start(chain_seed("m", 4, bigram=True, cache_salt=salt)) for salt in ("", "s"))
    beside = Start(plain.seed, parent_of(["s"]))
    everybody = (sha, by_tokens, vllm)
    assert starts_of(everybody, "m", "", "") == starts_of(everybody, "", "", "") == (None, plain, plain)
    assert starts_of(everybody, "m", "", "s") == (None, salted, beside)
    assert starts_of(everybody[:2], "m", "ad", "s") == tuple(
        Start(chain_seed(model, 4, bigram=True, lora_name="ad", cache_salt="s")) for model in ("", "m")
    )
    assert starts_of((vllm,), "ad", "", "s") == (Start(chain_seed("m", 4, bigram=True, lora_name="ad"), parent_of(["s"])),)
    assert len({parent_of([salt]) for salt in ("s", "t", "ss")} | {0}) == 4
