"""What the prompt path costs as a fraction of tokenizing everything, measured in the same run.

    .venv/bin/python bench/prompt_path.py           32 KB chat prompts of 20 messages, page 64

`calls` are chats of an agent: 10 KB of tools with each request, and rounds of a call and its answer, of which the last one is new.

From the bytes of a body to the answer of the KV index. plain: parse, render, tokenize all, hash all, match. seen: all but the newest
message was seen before and is owned. cold: nothing of this conversation was seen and nobody owns anything of it. Each figure is the
median over prompts of the best of several rounds, because the machine is not ours alone; a round begins with an empty memory, and
goes through all three kinds, so that a clock that changes its speed changes it for all of them. Time is that of the thread on its core:
nothing here waits, and a plain prompt takes so long that on a busy machine it is nearly always interrupted. What stands in brackets is the
lowest and the highest ratio that a single round had, of medians over its prompts.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import orjson
from drawing import Bars, add_plot, draw_bars
from prompt_texts import KINDS, TOOLS, Messages, agent_chat, agent_round, source, tokenizer_of_chinese

from sglfast import shm
from sglfast._blockhash import kernel
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast.prompt.keys import PromptReader, RequestKind
from sglfast.prompt.lazy import LazyKeyer
from sglfast.prompt.raw import RawReader
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, Tokenizer, load_tokenizer
from sglfast.shm import Variant

VARIANTS = (Variant(64),)
BYTES, MESSAGES = 32_768, 20
PROMPTS, ROUNDS = 40, 11
WANTED = {"seen": 300, "cold": 60}
CALLS = "calls"


def round_us(call: Callable[[bytes], object], bodies: list[bytes]) -> list[float]:
    """How long each body takes, given once."""
    times = []
    for sent in bodies:
        body = bytes(bytearray(sent))  # it has just come in
        began = time.thread_time()
        call(body)
        times.append((time.thread_time() - began) * 1e6)
    return times


def best_us(rounds: list[list[float]]) -> float:
    """Median over the bodies of the best of the rounds."""
    best: float = statistics.median([min(times) for times in zip(*rounds, strict=True)])
    return best


class Ratio(NamedTuple):
    """Plain to another, of the bests; the lowest and the highest of single rounds."""

    best: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.best:.0f} ({self.lowest:.0f}..{self.highest:.0f})"


def ratio(plain: list[list[float]], other: list[list[float]]) -> Ratio:
    single = [statistics.median(whole) / statistics.median(short) for whole, short in zip(plain, other, strict=True)]
    return Ratio(best_us(plain) / best_us(other), min(single), max(single))


def conversation(text: str, number: int, newest: str) -> Messages:
    """MESSAGES messages of BYTES bytes together; another conversation for another number."""
    size = BYTES * len(text) // len(text.encode()) // (MESSAGES - 1)
    begin = number * 4999
    turns = (text[begin + n * size : begin + (n + 1) * size] for n in range(MESSAGES - 1))
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    return [*messages, {"role": "user", "content": newest}]


def body_of(messages: Messages, **more: object) -> bytes:
    """A chat request with these messages."""
    return orjson.dumps({"model": "demo", "messages": messages, "temperature": 0.7, "stream": True, **more})


def bodies_of(kind: str) -> tuple[bytes, list[bytes], list[bytes]]:
    """A chat but for its end, with PROMPTS ends, and as many other chats."""
    text = source("prose" if kind == CALLS else kind)
    if kind == CALLS:
        size, rounds = BYTES - len(orjson.dumps(TOOLS)), MESSAGES // 2 - 2
        base = agent_chat(text, size, rounds, 0)
        ends = [agent_round(f"docs/new/{number}.txt", f"There is nothing in number {number}.") for number in range(PROMPTS)]
        others = [agent_chat(text, size, rounds + 1, number * 4999) for number in range(1, PROMPTS + 1)]
        more = {"tools": TOOLS, "tool_choice": "auto"}
        return body_of(base, **more), [body_of([*base, *end], **more) for end in ends], [body_of(other, **more) for other in others]
    question = "and what of {}?" if text.isascii() else "那么{}呢？"
    base = conversation(text, 0, "")[:-1]
    newest = [body_of([*base, {"role": "user", "content": question.format(number)}]) for number in range(PROMPTS)]
    strangers = [body_of(conversation(text, number, question.format("now"))) for number in range(1, PROMPTS + 1)]
    return body_of(base), newest, strangers


def measure(kind: str, tokenizer: Tokenizer, writer: TreeWriter, tree: TreeReader) -> dict[str, Ratio]:
    """Print a line of the table; returns its ratios, of `seen` and `cold`."""
    reader = PromptReader(tokenizer)
    base, newest, strangers = bodies_of(kind)

    def keys_of(body: bytes) -> tuple[int, bytes]:
        ids = reader.tokens_of(reader.text_of(RequestKind.CHAT, orjson.loads(body)))
        return len(ids), reader.keys_of(ids, 64)

    def plain(body: bytes) -> None:
        tree.match(keys_of(body)[1])

    def fresh() -> Callable[[bytes], None]:
        raw = RawReader(LazyKeyer(tokenizer, 32 << 20))

        def lazy(body: bytes) -> None:
            keying = raw.begin(body, VARIANTS, 1024)
            assert keying is not None
            assert keying.run(tree.match)

        return lazy

    tokens, keys = keys_of(base)
    writer.reset()
    writer.store(0, 0, keys)
    times: dict[str, list[list[float]]] = {"plain": [], "seen": [], "cold": []}
    for _ in range(ROUNDS):
        warm = fresh()
        warm(base)
        for name, call, bodies in (("plain", plain, newest), ("seen", warm, newest), ("cold", fresh(), strangers)):
            times[name].append(round_us(call, bodies))
    figures = [best_us(rounds) for rounds in times.values()]
    ratios = {name: ratio(times["plain"], times[name]) for name in WANTED}
    ends = "".join(f"{each!s:>18}" for each in ratios.values())
    print(f"{kind:8}{tokens:8,}{figures[0]:10,.0f}{figures[1]:8.1f}{figures[2]:8.1f}{ends}", flush=True)
    return ratios


def draw(path: str, ratios: dict[str, dict[str, Ratio]]) -> None:
    panels = [
        Bars(
            f"{name}: times as fast as tokenizing everything",
            {kind: row[name].best for kind, row in ratios.items()},
            {kind: (row[name].lowest, row[name].highest) for kind, row in ratios.items()},
            ("at least", wanted),
        )
        for name, wanted in WANTED.items()
    ]
    draw_bars(path, f"{BYTES >> 10} KB chat through the prompt path", panels)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the prompt path costs as a fraction of tokenizing everything.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"only these of {', '.join((*KINDS, CALLS))}")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of a model, instead of the demo's and the one trained here for Chinese")
    add_plot(parser)
    options = parser.parse_args()
    _, segment = shm.create(max_workers=64, max_ranks=64, max_shards=1, capacity_blocks=1 << 16)
    writer, tree = TreeWriter(segment), TreeReader(segment)
    print(f"page 64, SHA-256 kernel {kernel()}; microseconds\n")
    print(f"{'text':8}{'tokens':>8}{'plain':>10}{'seen':>8}{'cold':>8}{'plain/seen':>18}{'plain/cold':>18}")
    with tempfile.TemporaryDirectory() as folder:
        ratios: dict[str, dict[str, Ratio]] = {}
        for kind in options.kinds or (*KINDS, CALLS):
            path = options.tokenizer or (DEMO_TOKENIZER_PATH if kind in ("prose", "code", CALLS) else tokenizer_of_chinese(Path(folder)))
            ratios[kind] = measure(kind, load_tokenizer(path), writer, tree)
    print(f"{'wanted':42}{WANTED['seen']:18}{WANTED['cold']:18}")
    if options.plot:
        draw(options.plot, ratios)


if __name__ == "__main__":
    main()
