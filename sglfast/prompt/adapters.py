"""Which LoRA adapter and which salt a request asks for, and what that makes of its block keys.

Runs in: shards. Pure. Contract: an engine keeps the blocks of an adapter apart from those of the base model, so a prompt for an adapter
    must never be compared with the base's keys where the worker's events tell them apart (shm.Adapters). Their hashes are the
    engine's secret even on the SHA route; index keys such blocks by their tokens and the adapter's name, and so do we.
    SGLang tells the salt with every block; vLLM hashes it into a prompt's first block only, and tells it there, among `extra_keys`.
    So it is in the seed of the one's keys and in what stands before the other's first key.
Source: spec/kv_events.md 2.3, 2.7. SGLang takes `"model": "base:adapter"` before `lora_path`; vLLM serves an adapter under a model name.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from sglfast._blockhash import chain_seed, xxh3
from sglfast.shm import Variant

_NAME_LIMIT_CHARACTERS = 512
_encode = msgspec.msgpack.Encoder().encode


def asked_for(body: Mapping[str, Any]) -> tuple[str, str]:
    """(`model`, `lora_path`) of a decoded body, each "" when it is absent or no name."""
    path = body.get("lora_path")
    if isinstance(path, list) and len(path) == 1:
        path = path[0]
    return _name(body.get("model")), _name(path)


def _name(value: object) -> str:
    return value if isinstance(value, str) and len(value) <= _NAME_LIMIT_CHARACTERS else ""


def lora_name_of(variant: Variant, model: str, lora_path: str) -> str:
    """The adapter's name in the events of a worker for a request that names `model` and `lora_path`; "" for the base model."""
    match variant.adapters:
        case "named":
            if ":" in model and model != variant.model:
                return model.partition(":")[2].strip() or lora_path
            return lora_path
        case "models":
            return model if variant.model and model != variant.model else ""
        case "shared":
            return ""


class Start(NamedTuple):
    """Where a chain of the token route begins: `seed` and `parent` of token_keys."""

    seed: int
    parent: int = 0


def parent_of(extra_keys: Sequence[Any]) -> int:
    """What stands in the chain for what an engine hashes beside a block's tokens, at the first block of a prompt."""
    return xxh3(_encode(extra_keys))


def starts_of(variants: tuple[Variant, ...], model: str, lora_path: str, cache_salt: str) -> tuple[Start | None, ...]:
    """For each variant where the token route's keys for such a request begin, None where its keys are the SHA route's."""
    if cache_salt:  # it can be as long as a body: such starts are not worth remembering
        return tuple(_start_of(variant, model, lora_path, cache_salt) for variant in variants)
    return _known_starts(variants, model, lora_path)


@functools.lru_cache(maxsize=1024)
def _known_starts(variants: tuple[Variant, ...], model: str, lora_path: str) -> tuple[Start | None, ...]:
    return tuple(_start_of(variant, model, lora_path, "") for variant in variants)


def _start_of(variant: Variant, model: str, lora_path: str, cache_salt: str) -> Start | None:
    lora_name = lora_name_of(variant, model, lora_path)
    if variant.route == "sha256" and not lora_name:
        return None
    hashed_model = variant.model if variant.route == "tokens" else ""
    is_beside = variant.adapters == "models"
    seed_salt = "" if is_beside else cache_salt
    seed = chain_seed(hashed_model, variant.block_size, bigram=variant.bigram, lora_name=lora_name, cache_salt=seed_salt)
    return Start(seed, parent_of([cache_salt]) if is_beside and cache_salt else 0)
