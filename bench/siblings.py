"""Bursts of requests that share their beginning: how many land on one worker, and how much of their prompts was cached there.

    .venv/bin/python bench/siblings.py                 with predictions, without, and without events
    .venv/bin/python bench/siblings.py --gap-ms 5      one request of a burst every 5 ms

Each burst is new: 16 prompts of 4,000 tokens in common and 100 of their own, over two shards and four simulated workers that take 20,000
tokens/s each. `together` is the largest number of a burst on one worker, `cached` the share of prompt tokens that workers report as
cached (15/16 of the common part is the most there is), `done` the time to a burst's last answer.
"""

import argparse
import asyncio
import time
from collections import Counter

import orjson

from sglfast.load.client import Answer, LoadClient
from sglfast.load.stack import SimSettings, Stack
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer, single_token_words

COMMON_TOKENS, OWN_TOKENS = 4000, 100
CASES: dict[str, tuple[bool, bool, tuple[str, ...]]] = {  # name -> (workers publish events, the router has a tokenizer, its flags)
    "events, predictions": (True, True, ()),
    "events, no predictions": (True, True, ("--prediction-blocks", "0")),
    "no events, by text": (False, False, ()),
}


WORDS = single_token_words(load_tokenizer(DEMO_TOKENIZER_PATH))


def text(seed: int, tokens: int) -> str:
    """So many tokens, the same for the same seed."""
    return "".join(" " + WORDS[(seed * 7919 + i * (1 + seed % 97)) % len(WORDS)] for i in range(tokens))


def completion(prompt: str, host: str) -> bytes:
    """A whole request, which also asks where it went."""
    options = {"max_tokens": 2, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    data = orjson.dumps({"model": "demo-model", "prompt": prompt, **options})
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nx-sglfast-kv: 1\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n%b" % (len(data), data)


async def burst(client: LoadClient, number: int, size: int, gap_s: float) -> tuple[list[Answer], float]:
    common = text(1000 + number, COMMON_TOKENS)

    async def one(sibling: int) -> Answer:
        await asyncio.sleep(sibling * gap_s)
        prompt = common + text(100_000 + number * 100 + sibling, OWN_TOKENS)
        return await client.send(completion(prompt, client.host), timeout_s=60)

    begun_s = time.monotonic()
    answers = await asyncio.gather(*(one(sibling) for sibling in range(size)))
    return list(answers), time.monotonic() - begun_s


async def measure(url: str, options: argparse.Namespace) -> list[tuple[int, float, float]]:
    client = LoadClient(url)
    rows: list[tuple[int, float, float]] = []
    # Connections first, spread over the shards.
    await burst(client, 999, options.size, 0)
    for number in range(options.bursts):
        answers, took_s = await burst(client, number, options.size, options.gap_ms / 1000)
        assert not any(answer.error for answer in answers), [answer.error for answer in answers]
        workers = Counter(answer.kv.split(";")[0] for answer in answers)
        cached = sum(answer.usage.cached_tokens for answer in answers) / sum(answer.usage.prompt_tokens for answer in answers)
        rows.append((max(workers.values()), cached, took_s))
        await asyncio.sleep(0.5)
    await client.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bursts", type=int, default=10)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--gap-ms", type=float, default=0.0)
    options = parser.parse_args()
    print(f"{'':26}{'together':>10}{'cached':>10}{'done':>10}   ({options.bursts} bursts of {options.size}, {options.gap_ms:g} ms apart)")
    for name, (has_events, has_tokenizer, flags) in CASES.items():
        sim = SimSettings(workers=4, prefill_tokens_per_s=20_000.0, decode_tokens_per_s=200.0, kv_events=has_events)
        with Stack(sim, policy="cache_aware", serve_flags=["--shards", "2", *flags], has_tokenizer=has_tokenizer) as stack:
            rows = asyncio.run(measure(stack.url, options))
        together, cached, done_s = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        print(f"{name:26}{together:10.1f}{cached:10.2f}{done_s:9.2f}s")


if __name__ == "__main__":
    main()
