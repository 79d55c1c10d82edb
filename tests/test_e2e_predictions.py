"""Predictions, as a user has them: bursts of siblings land together, and cache_aware works without events; whole processes, two shards."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence

import pytest
from e2e import Prompts, completion, explained, metric, process_of, send_all, small_stack, wait_events, wait_until

from sglfast.load.client import Answer, LoadClient
from sglfast.load.stack import SimSettings, Stack

COMMON_TOKENS = 3000
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts()


def worker_of(answer: Answer) -> str:
    return answer.kv.split(";")[0]


def first_then_siblings(stack: Stack, first: str, siblings: Sequence[str], pause_s: float) -> list[Answer]:
    """Send one request and, while it is being worked on, the others at once."""

    async def run() -> list[Answer]:
        client = LoadClient(stack.url)
        going = asyncio.create_task(client.send(completion(first, client.host), timeout_s=TIMEOUT_S))
        await asyncio.sleep(pause_s)
        assert not going.done(), "the first was to take longer"
        answers = await asyncio.gather(*(client.send(completion(text, client.host), timeout_s=TIMEOUT_S) for text in siblings))
        answers.insert(0, await going)
        await client.close()
        return answers

    return asyncio.run(run())


@pytest.mark.parametrize("predicts", [True, False])
def test_siblings_land_together_before_the_first_event(prompts: Prompts, predicts: bool) -> None:
    """The first prompt takes a second and a half to compute; 15 others come in its midst."""
    flags = [] if predicts else ["--prediction-blocks", "0"]
    with small_stack(serve_flags=flags, prefill_tokens_per_s=2_000.0) as stack:
        common = prompts.text(1, COMMON_TOKENS)
        texts = [common + prompts.text(100 + n, 50) for n in range(16)]
        answers = first_then_siblings(stack, texts[0], texts[1:], 0.3)
        assert [answer.error for answer in answers] == [""] * 16
        places = Counter(map(worker_of, answers))
        cached = [answer.usage.cached_tokens for answer in answers]
        if not predicts:
            assert len(places) == 4
            return
        assert len(places) == 1
        assert cached[0] == 0
        assert all(tokens >= COMMON_TOKENS - 64 for tokens in cached[1:]), "each found what the first had left"
        assert all("overlap_blocks=0;" in answer.kv for answer in answers), "but no event had said so"
        assert metric(stack, "sglfast_predicted_choices_total") == 15
        assert metric(stack, "sglfast_predictions_total", result="dropped") == 0
        # The first's is a sample: nobody owned anything. The others' say nothing of the events.
        assert metric(stack, "sglfast_worker_kv_predictions_total", result="too_low") == 0
        assert metric(stack, "sglfast_worker_kv_predictions_total", result="too_high") == 0
        # When all is over, events alone are left.
        wait_events(stack)
        row = max(explained(stack, "/v1/completions", {"prompt": texts[0]})["candidates"], key=lambda row: row["overlap_blocks"])
        assert row["overlap_blocks"] == row["overlap_blocks_by_tier"]["device"] == (COMMON_TOKENS + 49) // 64

        def is_over() -> bool:
            rows = explained(stack, "/v1/completions", {"prompt": common + prompts.text(999, 2000)})["candidates"]
            return all(row["overlap_blocks_by_tier"]["predicted"] == 0 for row in rows)

        wait_until(is_over, "no prediction is left")


@pytest.fixture
def silent() -> Stack:
    """Workers that publish nothing, and a router that knows no tokenizer."""
    sim = SimSettings(prefill_tokens_per_s=500_000.0, decode_tokens_per_s=2_000.0, kv_events=False)
    return Stack(sim, policy="cache_aware", serve_flags=["--shards", "2", "--cache-threshold", "0.3"], has_tokenizer=False)


def test_conversations_stay_where_they_were_without_events(silent: Stack, prompts: Prompts) -> None:
    with silent as stack:
        sizes_tokens = [800, 1400, 2000, 2600]
        places: list[str] = []
        for turn, size in enumerate(sizes_tokens):
            texts = [prompts.text(user, size) for user in range(1, 25)]
            answers = send_all(stack.url, texts, connections=8)
            assert [answer.error for answer in answers] == [""] * len(texts)
            assert all("state=APPROXIMATE" in answer.kv for answer in answers)
            cached = sum(answer.usage.cached_tokens for answer in answers) / sum(answer.usage.prompt_tokens for answer in answers)
            if turn:
                assert cached > 0.9 * (sizes_tokens[turn - 1] - 64) / size, f"turn {turn}: {cached:.2f} of the prompts were cached"
            else:
                assert cached == 0
            places = [worker_of(answer) for answer in answers]
            time.sleep(0.05)
        assert len(set(places)) == 4, "and all workers have some"
        assert metric(stack, "sglfast_decisions_total", decision="cache_hit") == 24 * 3
        assert metric(stack, "sglfast_worker_kv_predictions_total") == 0, "no parity: these are no exact predictions"


def test_what_is_known_of_silent_workers_outlives_the_index(silent: Stack, prompts: Prompts) -> None:
    with silent as stack:
        texts = [prompts.text(user, 800) for user in range(1, 25)]
        send_all(stack.url, texts, connections=8)
        wait_until(lambda: metric(stack, "sglfast_predictions_total", result="applied") == 24, "all are known")
        os.kill(process_of(stack, "sglfast.index.main"), signal.SIGKILL)
        answers = send_all(stack.url, texts, connections=8)
        assert all(answer.usage.cached_tokens >= 704 for answer in answers), "the table serves while nobody writes it"
        wait_until(lambda: metric(stack, "sglfast_process_up", process="index") == 1, "index is back")
        wait_until(lambda: metric(stack, "sglfast_predictions_total", result="applied") == 48, "it has read what was sent meanwhile")
        answers = send_all(stack.url, texts, connections=8)
        assert all(answer.usage.cached_tokens >= 704 for answer in answers)
        assert [answer.error for answer in answers] == [""] * 24
