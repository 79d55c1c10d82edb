"""sim/engine.py, stepped through simulated time: durations, order, cache and events are exact."""

import dataclasses
from typing import Any

import pytest

from sglfast._blockhash import page_keys
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer
from sglfast.sim.engine import Engine, EngineTotals, Generation
from sglfast.sim.output import OutputText
from sglfast.sim.settings import SimSettings
from sglfast.wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, EventOut, decode_batch, encode_batch

PAGE = 4
SETTINGS = SimSettings(
    page_size=PAGE,
    cache_tokens=400,
    prefill_tokens_per_s=1000.0,
    decode_tokens_per_s_per_request=100.0,
    chunked_prefill_tokens=64,
    max_running_requests=8,
)
PREFILL_S, DECODE_S = 1 / 1000, 1 / 100


@pytest.fixture(scope="module")
def output() -> OutputText:
    return OutputText(load_tokenizer(DEMO_TOKENIZER_PATH), 0)


class Bench:
    """An engine with a clock of its own, a set that follows its events, and the times of every token."""

    def __init__(self, output: OutputText, **changes: Any) -> None:
        self.now_s = 0.0
        self.output = output
        self.batches: list[list[Any]] = []
        self.held: set[int] = set()
        settings = dataclasses.replace(SETTINGS, **changes)
        self.engine = Engine(settings, output, self.publish, EngineTotals())

    def publish(self, events: list[EventOut]) -> None:
        batch = decode_batch(encode_batch(0.0, events, 0)).events
        self.batches.append(batch)
        for event in batch:
            match event:
                case BlockStored():
                    assert event.parent_block_hash is None or event.parent_block_hash in self.held
                    assert not self.held & set(event.block_hashes)
                    self.held |= set(event.block_hashes)
                case BlockRemoved():
                    assert self.held >= set(event.block_hashes)
                    self.held -= set(event.block_hashes)
                case AllBlocksCleared():
                    self.held.clear()

    def submit(self, tokens: list[int], answer_tokens: int = 1, at_s: float | None = None) -> "Watched":
        watched = Watched(self, tokens, answer_tokens)
        self.engine.submit(watched.generation, self.now_s if at_s is None else at_s)
        return watched

    def step(self) -> bool:
        end_s = self.engine.start_step()
        if end_s is None:
            return False
        assert end_s >= self.now_s
        self.now_s = end_s
        self.engine.end_step()
        keys = self.engine.cache.keys()
        assert self.held == {int.from_bytes(keys[i : i + 8], "little") for i in range(0, len(keys), 8)}
        return True

    def run(self) -> None:
        while self.step():
            pass
        assert not self.engine.is_busy
        assert self.engine.cache.locked_blocks == 0


class Watched:
    """A request and when each of its tokens came."""

    def __init__(self, bench: Bench, tokens: list[int], answer_tokens: int) -> None:
        self.bench = bench
        self.times_s: list[float] = []
        self.generation = Generation(tokens, len(tokens), page_keys(tokens, PAGE), answer_tokens, sum(tokens), self)

    def progress(self) -> None:
        self.times_s.append(self.bench.now_s)
        assert len(self.times_s) == max(1, self.generation.generated_tokens)


def prompt(n_tokens: int, first: int = 0) -> list[int]:
    return list(range(first, first + n_tokens))


def near(value: float) -> Any:
    return pytest.approx(value, abs=1e-9)


def test_prefill_takes_its_tokens_and_decode_its_interval(output: OutputText) -> None:
    bench = Bench(output)
    one = bench.submit(prompt(50), 4, at_s=2.0)
    bench.run()
    first = 2.0 + 50 * PREFILL_S
    assert one.times_s == [near(first + i * DECODE_S) for i in range(4)]
    assert one.generation.is_finished


def test_a_cached_prefix_is_free_but_its_last_page_is_not(output: OutputText) -> None:
    bench = Bench(output)
    bench.submit(prompt(48))
    bench.run()
    start = bench.now_s
    again = bench.submit(prompt(48))
    longer = bench.submit(prompt(50), at_s=start + 1.0)
    bench.run()
    # 48 tokens are 12 pages; the engine computes the last token itself, so 11 pages can be used.
    assert again.generation.cached_tokens == 44
    assert again.times_s == [near(start + 4 * PREFILL_S)]
    assert longer.generation.cached_tokens == 48
    assert longer.times_s == [near(start + 1.0 + 2 * PREFILL_S)]
    assert bench.engine.totals == EngineTotals(146, 92, 3, 0, 3)


def test_the_chunk_budget_is_shared_and_the_first_come_go_first(output: OutputText) -> None:
    bench = Bench(output)
    one, two, three = bench.submit(prompt(30)), bench.submit(prompt(40, 1000)), bench.submit(prompt(10, 2000))
    bench.run()
    # 30 + 32 of the second (34 left of 64, cut at a page); then its last 8 and the third.
    assert one.times_s == [near(62 * PREFILL_S)]
    assert two.times_s == three.times_s == [near((62 + 18) * PREFILL_S)]


def test_a_long_prompt_goes_in_chunks_and_publishes_each(output: OutputText) -> None:
    bench = Bench(output)
    long = bench.submit(prompt(150))
    bench.step()
    assert len(bench.held) == 16
    assert bench.engine.running_requests == 1
    assert bench.engine.cache.locked_blocks == 16
    bench.run()
    assert long.times_s == [near(150 * PREFILL_S)]
    assert [len(batch) for batch in bench.batches] == [1, 1, 1]
    assert len(bench.held) == 37


def test_a_prefill_delays_every_running_answer(output: OutputText) -> None:
    bench = Bench(output)
    answer = bench.submit(prompt(4), 4)
    bench.submit(prompt(60, 1000), at_s=0.005)
    bench.run()
    # 4 tokens of prefill; a decode step during which the other prompt arrives; decode and its prefill in one step.
    expected = [0.004, 0.014, 0.014 + DECODE_S + 60 * PREFILL_S, 0.014 + 2 * DECODE_S + 60 * PREFILL_S]
    assert answer.times_s == [near(time_s) for time_s in expected]


def test_a_request_waits_for_the_step_under_way_and_never_starts_before_it_came(output: OutputText) -> None:
    bench = Bench(output)
    bench.submit(prompt(60))
    # The loop was held up: these came while the first step should long have ended.
    late = bench.submit(prompt(10, 1000), at_s=0.030)
    later = bench.submit(prompt(10, 2000), at_s=5.0)
    bench.run()
    assert late.times_s == [near(0.070)]
    assert later.times_s == [near(5.010)]


def test_max_running_requests_bounds_the_batch(output: OutputText) -> None:
    bench = Bench(output, max_running_requests=2)
    watched = [bench.submit(prompt(4, 1000 * i), 3) for i in range(3)]
    bench.step()
    assert (bench.engine.running_requests, bench.engine.waiting_requests, bench.engine.waiting_tokens) == (2, 1, 4)
    bench.run()
    ends = [one.times_s[-1] for one in watched]
    assert ends[0] == ends[1] == near(0.008 + 2 * DECODE_S)
    assert watched[2].times_s[0] == near(ends[1] + 0.004)


def test_decode_rate_does_not_depend_on_the_batch(output: OutputText) -> None:
    bench = Bench(output)
    watched = [bench.submit(prompt(8, 1000 * i), 11) for i in range(8)]
    bench.run()
    for one in watched:
        assert one.times_s[-1] - one.times_s[0] == near(10 * DECODE_S)


def test_a_cached_answer_is_hit_by_the_next_turn(output: OutputText) -> None:
    bench = Bench(output)
    tokens = prompt(10)
    answer = bench.submit(tokens, 20)
    bench.run()
    # The last of the 20 tokens has no KV: 29 tokens are 7 full pages.
    assert len(bench.held) == 7
    next_turn = tokens + output.token_ids(answer.generation.start, 20) + prompt(5, 9000)
    follow_up = bench.submit(next_turn)
    bench.run()
    assert follow_up.generation.cached_tokens == 28


def test_prefill_only_requests_finish_without_a_token(output: OutputText) -> None:
    bench = Bench(output)
    embedding = bench.submit(prompt(20), 0)
    bench.run()
    assert embedding.times_s == [near(0.020)]
    assert (embedding.generation.is_finished, embedding.generation.generated_tokens) == (True, 0)


def test_a_full_cache_evicts_the_oldest_and_says_so_before_it_stores(output: OutputText) -> None:
    bench = Bench(output, cache_tokens=20 * PAGE)
    for i in range(3):
        bench.submit(prompt(10 * PAGE, 1000 * i))
        bench.run()
    assert [type(event) for event in bench.batches[-1]] == [BlockRemoved, BlockStored]
    assert len(bench.batches[-1][0].block_hashes) == 10
    assert len(bench.held) == 20
    assert bench.engine.totals.evicted_blocks == 10
    # The second and third prompt are there, the first is not.
    for i, cached in ((1, 36), (2, 36), (0, 0)):
        again = bench.submit(prompt(10 * PAGE, 1000 * i))
        bench.run()
        assert again.generation.cached_tokens == cached


def test_blocks_in_use_are_not_evicted_and_what_does_not_fit_is_not_cached(output: OutputText) -> None:
    bench = Bench(output, cache_tokens=10 * PAGE)
    holder = bench.submit(prompt(8 * PAGE), 50)
    bench.step()
    other = bench.submit(prompt(9 * PAGE, 1000))
    while not other.generation.is_finished:
        bench.step()
    assert holder.generation.locked_blocks == 8
    assert bench.engine.cache.used_blocks == 10
    bench.run()
    again = bench.submit(prompt(8 * PAGE))
    bench.run()
    assert again.generation.cached_tokens == 7 * PAGE


def test_aborts_free_everything_at_the_end_of_the_step(output: OutputText) -> None:
    bench = Bench(output, max_running_requests=2)
    running = bench.submit(prompt(8), 100)
    bench.step()
    partial = bench.submit(prompt(200, 1000), 5)
    waiting = bench.submit(prompt(8, 2000), 5)
    bench.step()
    assert bench.engine.cache.locked_blocks == 2 + 16
    seen = len(running.times_s)
    for watched in (running, partial, waiting):
        bench.engine.abort(watched.generation)
        bench.engine.abort(watched.generation)
    assert bench.engine.waiting_requests == 0
    bench.run()
    assert (len(running.times_s), len(partial.times_s), len(waiting.times_s)) == (seen, 0, 0)
    # What was computed until then stays cached.
    assert bench.submit(prompt(200, 1000)).bench is bench
    bench.step()
    assert bench.engine.totals.cached_tokens >= 64


def test_an_abort_in_the_step_that_completes_the_prompt(output: OutputText) -> None:
    bench = Bench(output)
    one = bench.submit(prompt(20), 5)
    assert bench.engine.start_step() is not None
    bench.engine.abort(one.generation)
    bench.run()
    assert one.times_s == []
    assert not one.generation.is_finished


def test_flush_only_when_idle(output: OutputText) -> None:
    bench = Bench(output)
    bench.submit(prompt(20), 3)
    assert bench.engine.flush() is False
    bench.step()
    assert bench.engine.flush() is False
    assert len(bench.held) == 5
    bench.run()
    assert bench.engine.flush() is True
    assert bench.held == set()
    assert [type(event) for event in bench.batches[-1]] == [AllBlocksCleared]
    assert bench.engine.cache.used_blocks == 0


def test_end_step_needs_a_step(output: OutputText) -> None:
    bench = Bench(output)
    assert bench.engine.start_step() is None
    with pytest.raises(ValueError, match="no step"):
        bench.engine.end_step()


def test_any_load_ends_with_events_equal_to_the_cache(output: OutputText, rng: Any) -> None:
    """Random conversations, arrivals and aborts: the invariants of `Bench.step` hold after each step."""
    for _ in range(20):
        bench = Bench(output, cache_tokens=PAGE * rng.randint(1, 60), max_running_requests=rng.randint(1, 6))
        conversations = [prompt(rng.randint(1, 90), 1000 * i) for i in range(5)]
        watched: list[Watched] = []
        for _ in range(60):
            conversation = rng.choice(conversations)
            if rng.random() < 0.5:
                conversation += prompt(rng.randint(1, 20), rng.randint(0, 10**6))
            watched.append(bench.submit(conversation[: rng.randint(1, 200)], rng.randint(0, 30)))
            for _ in range(rng.randint(0, 6)):
                bench.step()
            if rng.random() < 0.2:
                bench.engine.abort(rng.choice(watched).generation)
        bench.run()
        for one in watched:
            generation = one.generation
            assert generation.is_finished != generation.is_aborted
            assert generation.is_aborted or generation.generated_tokens == generation.max_new_tokens
            assert generation.cached_tokens % PAGE == 0
            assert generation.cached_tokens < generation.prompt_tokens


def test_a_prompt_is_kept_until_it_was_copied(output: OutputText) -> None:
    bench = Bench(output)
    one, two = bench.submit(prompt(50)), bench.submit(prompt(20, first=100))
    one.generation.keeps_kv = two.generation.keeps_kv = True
    while bench.step():
        pass
    assert one.generation.is_finished
    assert bench.engine.cache.locked_blocks == 12 + 5
    assert bench.engine.is_busy
    assert not bench.engine.flush()
    bench.engine.free(one.generation)
    assert bench.engine.cache.locked_blocks == 5
    bench.engine.abort(two.generation)
    assert two.generation.is_aborted
    bench.engine.free(two.generation)  # more than once is no error
    bench.run()
    assert bench.engine.flush()


def test_a_transferred_prompt_takes_no_time_and_leaves_nothing(output: OutputText) -> None:
    bench = Bench(output)
    one = Watched(bench, prompt(50), 3)
    one.generation.is_transferred, one.generation.cached_tokens = True, 16
    bench.engine.submit(one.generation, 1.0)
    bench.run()
    assert one.times_s == [near(1.0 + i * DECODE_S) for i in range(3)]
    assert one.generation.cached_tokens == 16
    assert (bench.batches, bench.engine.totals.prompt_tokens, bench.engine.totals.cached_tokens) == ([], 0, 0)
