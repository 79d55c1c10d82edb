"""What the prompt path costs as a fraction of tokenizing everything, measured in the same run.

    .venv/bin/python bench/prompt_path.py           32 KB chat prompts of 20 messages, page 64

From the bytes of a body to the answer of the KV index. plain: parse, render, tokenize all, hash all, match. seen: all but the newest
message was seen before and is owned. cold: nothing of this conversation was seen and nobody owns anything of it. Each figure is the
median over prompts of the best of several rounds, because the machine is not ours alone; a round begins with an empty memory.
"""

import argparse
import inspect
import statistics
import tarfile
import time
import typing
import zipfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import orjson

from sglfast import shm
from sglfast._blockhash import kernel
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast.prompt.keys import PromptReader, RequestKind
from sglfast.prompt.lazy import LazyKeyer
from sglfast.prompt.raw import RawReader
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer
from sglfast.shm import Variant

VARIANTS = (Variant(64),)
CHARS, MESSAGES = 32_768, 20
PROMPTS, ROUNDS = 40, 7
WANTED = {"seen": 300, "cold": 60}
Messages = list[dict[str, str]]


def best_us(prepare: Callable[[], Callable[[bytes], object]], bodies: list[bytes]) -> float:
    """Median over the bodies of the best of ROUNDS; each round prepares anew and gives each body once."""
    best = [float("inf")] * len(bodies)
    for _ in range(ROUNDS):
        call = prepare()
        for number, sent in enumerate(bodies):
            body = bytes(bytearray(sent))  # it has just come in
            began = time.perf_counter()
            call(body)
            best[number] = min(best[number], time.perf_counter() - began)
    return statistics.median(best) * 1e6


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


def body_of(messages: Messages) -> bytes:
    """A chat request with these messages."""
    return orjson.dumps({"model": "demo", "messages": messages, "temperature": 0.7, "stream": True})


def main() -> None:
    _, segment = shm.create(max_workers=64, max_ranks=64, max_shards=1, capacity_blocks=1 << 16)
    writer, tree = TreeWriter(segment), TreeReader(segment)
    tokenizer = load_tokenizer(DEMO_TOKENIZER_PATH)
    reader = PromptReader(tokenizer)
    print(f"page 64, SHA-256 kernel {kernel()}; microseconds\n")
    print(f"{'text':8}{'tokens':>8}{'plain':>10}{'seen':>8}{'cold':>8}{'plain/seen':>12}{'plain/cold':>12}")
    for kind in ("prose", "code"):
        text = source(kind)
        base = conversation(text, 0, "")[:-1]
        newest = [body_of([*base, {"role": "user", "content": f"and what of {number}?"}]) for number in range(PROMPTS)]
        strangers = [body_of(conversation(text, number, "and now?")) for number in range(1, PROMPTS + 1)]

        def keys_of(body: bytes) -> tuple[int, bytes]:
            ids = reader.tokens_of(reader.text_of(RequestKind.CHAT, orjson.loads(body)))
            return len(ids), reader.keys_of(ids, 64)

        def plain() -> Callable[[bytes], object]:
            return lambda body: tree.match(keys_of(body)[1])

        def fresh() -> Callable[[bytes], object]:
            raw = RawReader(LazyKeyer(tokenizer, 32 << 20))

            def lazy(body: bytes) -> None:
                keying = raw.begin(body, VARIANTS, 1024)
                assert keying is not None
                assert keying.run(tree.match)

            return lazy

        def warm(base: Messages = base) -> Callable[[bytes], object]:
            lazy = fresh()
            lazy(body_of(base))
            return lazy

        tokens, keys = keys_of(body_of(base))
        plain_us = best_us(plain, newest)
        writer.reset()
        cold_us = best_us(fresh, strangers)
        writer.store(0, 0, keys)
        seen_us = best_us(warm, newest)
        ratios = plain_us / seen_us, plain_us / cold_us
        print(f"{kind:8}{tokens:8,}{plain_us:10,.0f}{seen_us:8.1f}{cold_us:8.1f}{ratios[0]:12.0f}{ratios[1]:12.0f}")
    print(f"{'wanted':42}{WANTED['seen']:12}{WANTED['cold']:12}")


if __name__ == "__main__":
    main()
