"""What the prompt path costs as a fraction of tokenizing everything, measured in the same run.

    .venv/bin/python bench/prompt_path.py           32 KB chat prompts of 20 messages, page 64

plain: render, tokenize all, hash all, match. seen: all but the newest message was seen before and is owned. cold: nothing was seen and
nobody owns anything. JSON is parsed by both and counted by neither; render is counted in both, and shown by itself. Each figure is the
best of many, because the machine is not ours alone.
"""

import argparse
import inspect
import tarfile
import time
import typing
import zipfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

from sglfast import shm
from sglfast._blockhash import kernel
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast.prompt.keys import PromptReader, RequestKind
from sglfast.prompt.lazy import LazyKeyer
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer
from sglfast.shm import Variant

VARIANTS = (Variant(64),)
CHARS, MESSAGES = 32_768, 20
WANTED = {"seen": 300, "cold": 60}
Messages = list[dict[str, str]]


def best_us(call: Callable[[int], object], times: int) -> float:
    """The shortest of so many calls; each gets its number."""
    found = float("inf")
    for number in range(times):
        began = time.perf_counter()
        call(number)
        found = min(found, time.perf_counter() - began)
    return found * 1e6


def source(kind: str) -> str:
    """Text to talk about: Python's own documentation, or its own code."""
    if kind == "prose":
        return "".join(topics.values())
    return "".join(Path(module.__file__ or "").read_text() for module in (argparse, typing, inspect, tarfile, zipfile))


def conversation(text: str, number: int, newest: str) -> Messages:
    """MESSAGES messages of CHARS characters together; another conversation for another number."""
    size = CHARS // (MESSAGES - 1)
    begin = number * 4999
    turns = (text[begin + n * size : begin + (n + 1) * size] for n in range(MESSAGES - 1))
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    return [*messages, {"role": "user", "content": newest}]


def main() -> None:
    _, segment = shm.create(max_workers=64, max_ranks=64, max_shards=1, capacity_blocks=1 << 16)
    writer, tree = TreeWriter(segment), TreeReader(segment)
    tokenizer = load_tokenizer(DEMO_TOKENIZER_PATH)
    reader = PromptReader(tokenizer)
    print(f"page 64, SHA-256 kernel {kernel()}; microseconds\n")
    print(f"{'text':8}{'tokens':>8}{'plain':>10}{'render':>8}{'seen':>8}{'cold':>8}{'plain/seen':>12}{'plain/cold':>12}")
    for kind in ("prose", "code"):
        text = source(kind)
        base = conversation(text, 0, "")[:-1]

        def body(messages: Messages) -> dict[str, Messages]:
            return {"messages": messages}

        def keys_of(messages: Messages) -> tuple[int, bytes]:
            ids = reader.tokens_of(reader.text_of(RequestKind.CHAT, body(messages)))
            return len(ids), reader.keys_of(ids, 64)

        def plain(number: int, base: Messages = base) -> None:
            tree.match(keys_of([*base, {"role": "user", "content": f"and what of {number}?"}])[1])

        keyer = LazyKeyer(tokenizer, 32 << 20)

        def lazy(messages: Messages, keyer: LazyKeyer = keyer) -> None:
            keying = keyer.begin(reader.text_of(RequestKind.CHAT, body(messages), 1024), VARIANTS)
            assert keying.run(tree.match)

        tokens, _ = keys_of(base)
        plain_us = best_us(plain, 20)
        render_us = best_us(lambda _, base=base: reader.text_of(RequestKind.CHAT, body(base)), 200)  # type: ignore[misc]
        writer.reset()
        strangers = [conversation(text, number, "and now?") for number in range(1, 60)]
        cold_us = best_us(lambda number, them=strangers: lazy(them[number]), len(strangers))  # type: ignore[misc]
        writer.store(0, 0, keys_of(base)[1])
        lazy(base)
        newest = [[*base, {"role": "user", "content": f"and what of {number}?"}] for number in range(300)]
        seen_us = best_us(lambda number, them=newest: lazy(them[number]), len(newest))  # type: ignore[misc]
        print(
            f"{kind:8}{tokens:8,}{plain_us:10,.0f}{render_us:8.1f}{seen_us:8.1f}{cold_us:8.1f}"
            f"{plain_us / seen_us:12.0f}{plain_us / cold_us:12.0f}"
        )
    print(f"{'wanted':58}{WANTED['seen']:12}{WANTED['cold']:12}")


if __name__ == "__main__":
    main()
