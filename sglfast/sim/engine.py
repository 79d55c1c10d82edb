"""The engine of one simulated rank: waiting queue, chunked prefill, continuous batching and radix cache, step by step.

Runs in: sim. Knows no clock, no loop and no socket: times come in as seconds of any monotonic clock, so that tests step it
    through simulated time exactly. `pacer.Pacer` runs it in real time.

Contract: a step begins with everything that arrived until then, and is planned whole:

    prefill   up to `chunked_prefill_tokens` uncached prompt tokens, first come first served; one prompt at most is left
              unfinished, cut at a page, and goes first in the next step; `max_running_requests` bounds who is let in
    decode    one token for every request that was running when the step began
    duration  prefill tokens / prefill rate, plus one decode interval when anything decodes

    At its end the new full pages of the prefilled prompts are in the cache and in the event log, prompts that are complete
    have their first token, and every request that moved is told. A finished request leaves its full pages of prompt and
    answer in the cache; the last token of an answer has no KV, as in SGLang.

Prefill/decode: a request that `keeps_kv` holds its blocks when it is finished until `free` or `abort`, because a decode worker has yet
    to copy them. One whose prompt `is_transferred` has its prompt computed by another engine: it takes no prefill time and leaves
    nothing in the cache, as a decode worker of SGLang has no radix cache.

Why not parallel prefill and decode: in an engine both take turns on one GPU, and that a long prefill delays everybody's next
    token is what a router has to see.

Simplification: only cached blocks count against the cache; a batch whose blocks do not fit runs all the same, it just leaves
    fewer blocks behind (SGLang would make requests wait).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sglfast._blockhash import page_keys
from sglfast._radix import RadixCache
from sglfast.sim.events import EventLog, all_cleared
from sglfast.sim.output import OutputText, TokenIds
from sglfast.sim.settings import SimSettings
from sglfast.wire.kv_events import EventOut


class Sink(Protocol):
    """Who is told about a request's progress; may not raise and may not call the engine back."""

    def progress(self) -> None:
        """One or more tokens came, or the request is finished."""


@dataclass(slots=True, eq=False)
class Generation:
    """One request inside an engine.

    token_ids: the prompt, prompt_tokens long; keys: its full blocks; max_new_tokens: 0 = prefill only; start: see
    output.OutputText; keeps_kv, is_transferred: see the module. The engine writes the rest: prefilled_tokens counts cached ones too
    (cached_tokens of a transferred prompt is the owner's); is_finished is set with the last token.
    """

    token_ids: TokenIds
    prompt_tokens: int
    keys: bytes
    max_new_tokens: int
    start: int
    sink: Sink
    cache_salt: str = ""
    keeps_kv: bool = False
    is_transferred: bool = False
    arrival_s: float = 0.0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    locked_blocks: int = 0
    is_finished: bool = False
    is_aborted: bool = False


@dataclass(slots=True)
class EngineTotals:
    """Counters of one rank, which outlive its engines.

    prompt_tokens: of prompts whose prefill began; cached_tokens: their share that was in the cache.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    evicted_blocks: int = 0
    steps: int = 0


class Engine:
    """See the module. publish: takes the events of a step, in order, before the step's sinks are told."""

    def __init__(self, settings: SimSettings, output: OutputText, publish: Callable[[list[EventOut]], None], totals: EngineTotals) -> None:
        self._page_size = settings.page_size
        self._prefill_s_per_token = 1.0 / settings.prefill_tokens_per_s
        self._decode_s = 1.0 / settings.decode_tokens_per_s_per_request
        self._max_running = settings.max_running_requests
        self._chunk_tokens = settings.chunked_prefill_tokens
        self._output = output
        self._publish = publish
        self._log = EventLog(settings.page_size)
        self._waiting: deque[Generation] = deque()
        self._partial: Generation | None = None  # its prefill is cut; never in _waiting nor in _running
        self._running: list[Generation] = []
        self._prefilling: list[tuple[Generation, int]] = []  # with the tokens of this step
        self._kept: set[Generation] = set()  # finished, and their blocks are still held
        self._now_s = 0.0
        self._step_end_s: float | None = None
        self.cache = RadixCache(settings.cache_blocks)
        self.totals = totals

    @property
    def waiting_requests(self) -> int:
        """Requests whose prefill has not begun."""
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of those requests."""
        return sum(generation.prompt_tokens for generation in self._waiting)

    @property
    def running_requests(self) -> int:
        """Requests in prefill or decode."""
        is_partial_in_step = bool(self._prefilling) and self._prefilling[-1][0] is self._partial
        return len(self._running) + len(self._prefilling) + (self._partial is not None and not is_partial_in_step)

    @property
    def is_busy(self) -> bool:
        """Whether any request is inside."""
        return bool(self._waiting or self._running or self._prefilling or self._partial or self._kept)

    def submit(self, generation: Generation, now_s: float) -> None:
        """Queue a request that arrives now."""
        generation.arrival_s = now_s
        self._waiting.append(generation)

    def abort(self, generation: Generation) -> None:
        """Let a request go; its sink hears nothing any more. A request in a batch leaves it when the step ends."""
        if generation in self._kept:
            self.free(generation)
            generation.is_aborted = True
        if generation.is_finished or generation.is_aborted:
            return
        generation.is_aborted = True
        if generation in self._waiting:
            self._waiting.remove(generation)

    def free(self, generation: Generation) -> None:
        """Let go of the blocks of a finished request that kept them."""
        self._kept.discard(generation)
        self._release(generation)

    def flush(self) -> bool:
        """Empty the cache and publish that; False, and nothing done, while any request is inside."""
        if self.is_busy:
            return False
        self.cache.clear()
        self._publish(all_cleared())
        return True

    def start_step(self) -> float | None:
        """Plan the next step, unless one is under way; return when it ends, None when there is nothing to do."""
        if self._step_end_s is not None:
            return self._step_end_s
        begin_s = self._now_s
        if not self._running and self._partial is None:
            if not self._waiting:
                return None
            begin_s = max(begin_s, self._waiting[0].arrival_s)
        duration_s = self._plan_prefill(begin_s) * self._prefill_s_per_token
        if self._running:
            duration_s += self._decode_s
        self._step_end_s = begin_s + duration_s
        return self._step_end_s

    def _plan_prefill(self, begin_s: float) -> int:
        """Choose this step's prefill; return its tokens."""
        planned = 0
        while planned < self._chunk_tokens:
            if self._partial is not None:
                generation = self._partial
            elif self._waiting and self._waiting[0].arrival_s <= begin_s and len(self._running) + len(self._prefilling) < self._max_running:
                generation = self._waiting.popleft()
                self._admit(generation)
            else:
                break
            left = generation.prompt_tokens - generation.prefilled_tokens
            tokens = min(left, self._chunk_tokens - planned)
            if tokens < left:
                tokens -= tokens % self._page_size  # a prefix in the cache ends at a page, so what was prefilled does
                self._partial = generation
                if tokens:
                    self._prefilling.append((generation, tokens))
                return planned + tokens
            self._partial = None
            self._prefilling.append((generation, tokens))
            planned += tokens
        return planned

    def _admit(self, generation: Generation) -> None:
        if generation.is_transferred:
            generation.prefilled_tokens = generation.prompt_tokens
            return
        # The last token of a prompt is always computed: its logits are the first thing asked for.
        matchable_blocks = (generation.prompt_tokens - 1) // self._page_size
        blocks = self.cache.match(generation.keys, matchable_blocks)
        self.cache.lock(generation.keys, blocks)
        generation.locked_blocks = blocks
        generation.cached_tokens = generation.prefilled_tokens = blocks * self._page_size
        self.totals.prompt_tokens += generation.prompt_tokens
        self.totals.cached_tokens += generation.cached_tokens

    def end_step(self) -> None:
        """Do what the step under way leads to: cache, events, tokens. Raises ValueError when there is none."""
        if self._step_end_s is None:
            raise ValueError("no step is under way")
        self._now_s, self._step_end_s = self._step_end_s, None
        self.totals.steps += 1
        prefilling, self._prefilling = self._prefilling, []
        decoding, self._running = self._running, []
        moved: list[Generation] = []
        for generation in decoding:
            self._advance(generation, moved)
        for generation, tokens in prefilling:
            generation.prefilled_tokens += tokens
            self._store(generation, generation.token_ids, generation.keys, generation.prefilled_tokens // self._page_size)
            if generation is not self._partial:
                self._advance(generation, moved)
        if self._partial is not None and self._partial.is_aborted:
            self._release(self._partial)
            self._partial = None
        events = self._log.take()
        if events:
            self._publish(events)
        for generation in moved:
            generation.sink.progress()

    def _advance(self, generation: Generation, moved: list[Generation]) -> None:
        """Give a request whose prompt is complete its next token, and keep it running or finish it."""
        if not generation.is_aborted:
            if generation.max_new_tokens:
                generation.generated_tokens += 1
                self.totals.generated_tokens += 1
            moved.append(generation)
            if generation.generated_tokens < generation.max_new_tokens:
                self._running.append(generation)
                return
            generation.is_finished = True
        self._store_answer(generation)
        if generation.keeps_kv and generation.is_finished:
            self._kept.add(generation)
        else:
            self._release(generation)

    def _store_answer(self, generation: Generation) -> None:
        if generation.is_transferred:
            return
        answer_tokens = max(0, generation.generated_tokens - 1)
        blocks = (generation.prompt_tokens + answer_tokens) // self._page_size
        if blocks > len(generation.keys) // 8:
            token_ids = generation.token_ids[:]
            token_ids.extend(self._output.token_ids(generation.start, answer_tokens))
            salt = generation.cache_salt.encode()
            generation.keys = page_keys(token_ids, self._page_size, cache_salt=salt)
            self._store(generation, token_ids, generation.keys, blocks)

    def _store(self, generation: Generation, token_ids: TokenIds, keys: bytes, n_blocks: int) -> None:
        """Put the first blocks of a request into the cache and hold them until it is released."""
        if n_blocks <= generation.locked_blocks or generation.is_transferred:
            return
        start, stop, evicted = self.cache.insert(keys, n_blocks)
        if evicted:
            self._log.remove(evicted)
            self.totals.evicted_blocks += len(evicted) // 8
        if stop > start:
            self._log.store(keys, start, stop, token_ids, generation.cache_salt)
        self.cache.lock(keys, stop)
        self.cache.unlock(keys, generation.locked_blocks)
        generation.locked_blocks = stop

    def _release(self, generation: Generation) -> None:
        self.cache.unlock(generation.keys, generation.locked_blocks)
        generation.locked_blocks = 0
