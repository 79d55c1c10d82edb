"""sglfast.prompt.adapters: which adapter a request asks for, by the kinds of workers."""

from typing import Any

import pytest

from sglfast._blockhash import chain_seed
from sglfast.prompt.adapters import asked_for, lora_name_of, seeds_of
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


def test_seeds_of() -> None:
    sha, by_tokens = Variant(4, True), Variant(4, True, "tokens", "m", "models")
    plain, salted = chain_seed("m", 4, bigram=True), chain_seed("m", 4, bigram=True, cache_salt="s")
    assert seeds_of((sha, by_tokens), "m", "", "") == seeds_of((sha, by_tokens), "", "", "") == (None, plain)
    assert seeds_of((sha, by_tokens), "m", "", "s") == (None, salted)
    assert seeds_of((sha, by_tokens), "m", "ad", "s") == (chain_seed("", 4, bigram=True, lora_name="ad", cache_salt="s"), salted)
    assert seeds_of((by_tokens,), "ad", "", "s") == (chain_seed("m", 4, bigram=True, lora_name="ad", cache_salt="s"),)
