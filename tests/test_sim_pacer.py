"""sim/pacer.py: steps end at their own times, however late the loop is. Time and loop are played, so nothing is waited for."""

import asyncio
import heapq
from collections.abc import Callable
from typing import Any

import pytest

from sglfast._blockhash import page_keys
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer
from sglfast.sim import pacer as pacer_module
from sglfast.sim.engine import Engine, EngineTotals, Generation
from sglfast.sim.output import OutputText
from sglfast.sim.pacer import Pacer
from sglfast.sim.settings import SimSettings

SETTINGS = SimSettings(page_size=4, cache_tokens=400, prefill_tokens_per_s=1000.0, decode_tokens_per_s_per_request=100.0)


class PlayedHandle:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class PlayedLoop:
    """Timers with the clock of the test. late_s: by how much every timer is late; turns: callbacks run so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.late_s = 0.0
        self.queue: list[tuple[float, int, PlayedHandle]] = []
        self.armed = 0
        self.turns = 0
        monkeypatch.setattr(pacer_module.time, "monotonic", lambda: self.now_s)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> PlayedHandle:
        assert delay_s >= 0
        handle = PlayedHandle(callback)
        self.armed += 1
        late_s = self.late_s if delay_s else 0.0
        heapq.heappush(self.queue, (self.now_s + delay_s + late_s, self.armed, handle))
        return handle

    def call_soon(self, callback: Callable[[], None]) -> PlayedHandle:
        return self.call_later(0.0, callback)

    def run(self) -> None:
        while self.queue:
            when_s, _, handle = heapq.heappop(self.queue)
            if not handle.is_cancelled:
                self.now_s = max(self.now_s, when_s)
                self.turns += 1
                handle.callback()


class Watched:
    def __init__(self, loop: PlayedLoop) -> None:
        self.loop = loop
        self.times_s: list[float] = []
        self.turns: list[int] = []

    def progress(self) -> None:
        self.times_s.append(self.loop.now_s - 100.0)
        self.turns.append(self.loop.turns)


@pytest.fixture(scope="module")
def output() -> OutputText:
    return OutputText(load_tokenizer(DEMO_TOKENIZER_PATH), 0)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> PlayedLoop:
    return PlayedLoop(monkeypatch)


def pacer_of(loop: Any, output: OutputText, settings: SimSettings = SETTINGS) -> Pacer:
    return Pacer(Engine(settings, output, lambda events: None, EngineTotals()), loop)


def submit(pacer: Pacer, loop: PlayedLoop, n_tokens: int, answer_tokens: int) -> Watched:
    watched = Watched(loop)
    tokens = list(range(n_tokens))
    pacer.submit(Generation(tokens, n_tokens, page_keys(tokens, 4), answer_tokens, 5, watched))
    return watched


def test_tokens_come_when_the_model_says(loop: PlayedLoop, output: OutputText) -> None:
    watched = submit(pacer_of(loop, output), loop, 50, 4)
    assert watched.times_s == []
    loop.run()
    assert watched.times_s == pytest.approx([0.05, 0.06, 0.07, 0.08])


def test_lateness_does_not_add_up(loop: PlayedLoop, output: OutputText) -> None:
    loop.late_s = 0.004
    watched = submit(pacer_of(loop, output), loop, 50, 100)
    loop.run()
    assert watched.times_s[-1] == pytest.approx(0.05 + 99 * 0.01 + 0.004)


def test_a_held_up_loop_catches_up_in_turns(loop: PlayedLoop, output: OutputText) -> None:
    loop.late_s = 0.5
    watched = submit(pacer_of(loop, output), loop, 50, 100)
    loop.run()
    end_s = 0.05 + 99 * 0.01
    assert end_s - pacer_module.SLACK_S <= watched.times_s[-1] <= end_s + 0.5
    # Few timers for the many steps that were missed, and other callbacks get their turn in between.
    assert loop.armed < 12
    assert max(watched.turns.count(turn) for turn in watched.turns) == pacer_module.STEPS_PER_TURN


def test_one_timer_serves_all_streams(loop: PlayedLoop, output: OutputText) -> None:
    pacer = pacer_of(loop, output)
    watched = [submit(pacer, loop, 4, 50) for _ in range(30)]
    loop.run()
    assert all(len(one.times_s) == 50 for one in watched)
    # The first alone, the other 29 with its second token, then all together.
    assert loop.armed <= 52


def test_very_fast_engines_need_no_timer_a_step(loop: PlayedLoop, output: OutputText) -> None:
    fast = SimSettings(prefill_tokens_per_s=1e12, decode_tokens_per_s_per_request=1e9, page_size=4, cache_tokens=4000)
    watched = submit(pacer_of(loop, output, fast), loop, 50, 320)
    assert watched.times_s == []
    loop.run()
    assert len(watched.times_s) == 320
    assert loop.armed <= 12


def test_stop_ends_all_progress(loop: PlayedLoop, output: OutputText) -> None:
    pacer = pacer_of(loop, output)
    watched = submit(pacer, loop, 50, 4)
    pacer.stop()
    pacer.stop()
    loop.run()
    assert watched.times_s == []


def test_an_idle_engine_has_no_timer_and_starts_again(loop: PlayedLoop, output: OutputText) -> None:
    pacer = pacer_of(loop, output)
    submit(pacer, loop, 50, 1)
    loop.run()
    assert loop.queue == []
    loop.now_s += 10
    again = submit(pacer, loop, 50, 1)
    loop.run()
    assert again.times_s == pytest.approx([10.05 + 0.002])


def test_on_a_real_loop_nothing_comes_early(output: OutputText) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        done = asyncio.Event()
        ends_s: list[float] = []

        class Sink:
            def progress(self) -> None:
                ends_s.append(loop.time() - began_s)
                if len(ends_s) == 5:
                    done.set()

        pacer = pacer_of(loop, output)
        tokens = list(range(20))
        pacer.submit(Generation(tokens, 20, page_keys(tokens, 4), 5, 5, Sink()))
        await asyncio.wait_for(done.wait(), 10)
        assert all(end_s >= 0.02 + i * 0.01 - 0.002 for i, end_s in enumerate(ends_s))

    asyncio.run(run())
