"""What the router itself sent where: the answer for a prompt that no KV event speaks of, yet or ever.

Runs in: shards, event loop. Of workers with events a prediction tells what is on its way into their cache, from the choice to the first
    token: of siblings that come together all but the first find it. Of workers without events it is all that is known of their cache.
Contract: a prompt is told by the raw text of its body (sglfast._predicted), so neither template nor tokenizer is needed, and a beginning
    is found whatever its length: block keys of tokens are made no further than somebody owns the blocks, and those of a new prompt
    would say nothing of what two siblings share. What is found is a share of the prompt, not blocks; counted as tokens of the prompt it is
    marked as guessed. Only what events say counts as overlap towards users and in the parity loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from sglfast._predicted import KEEP, SENT, SETTLED, Predictions, text_cut, text_keys
from sglfast.edge.policy import Hit, Prompt

if TYPE_CHECKING:
    from sglfast._segment import Segment
    from sglfast.edge.pools import Pool
    from sglfast.shm import WorkerView

# For prompts that nobody tokenizes: about what English text and code have, and the unit in which their overlap is reported.
BYTES_PER_TOKEN = 4
BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a body's prompt. keys: of its text; shares: position in the pool -> (rank, share of the text that it was sent)."""

    keys: bytes = b""
    n_bytes: int = 0
    shares: dict[int, tuple[int, float]] = field(default_factory=dict)


class Prediction(NamedTuple):
    """A prompt that was sent to a rank. op: SENT or KEEP; generation: of the rank's worker."""

    op: int
    rank: int
    generation: int
    keys: bytes


NOTHING = Found()


class Predictor:
    """A shard's predictions. Of the event loop's thread."""

    def __init__(self, segment: Segment, shard: int) -> None:
        self._table = Predictions(segment, shard)

    def look_up(self, pool: Pool, body: bytes) -> Found:
        """Which workers of the pool were sent how much of the body's prompt. Cost: 6 us for 32 KB."""
        keys, n_bytes = text_keys(body)
        if not keys:
            return NOTHING
        shares: dict[int, tuple[int, float]] = {}
        if self._table.match(keys):
            for rank, n_keys in self._table.hits():
                position = pool.positions.get(rank)
                if position is not None:
                    share = text_cut(n_keys) / n_bytes
                    if position not in shares or share > shares[position][1]:
                        shares[position] = (rank, share)
        return Found(keys, n_bytes, shares)

    def is_in_flight(self, worker: WorkerView) -> bool:
        """Whether what the worker was sent of the prompt looked up last still waits for its first token."""
        return any(self._table.is_in_flight(worker.rank_base + rank) for rank in range(worker.dp_size))

    def sent(self, worker: WorkerView, rank: int, keys: bytes, *, is_kept: bool) -> Prediction:
        """A prompt goes to a worker. is_kept: no event will tell what became of it."""
        prediction = Prediction(KEEP if is_kept else SENT, rank, worker.generation, keys)
        self._table.put(*prediction)
        return prediction

    def settle(self, prediction: Prediction) -> None:
        """The prompt's first token is there, or will never be: from here on events tell."""
        if prediction.op == SENT:
            self._table.put(SETTLED, *prediction[1:])


def with_guesses(prompt: Prompt, found: Found) -> Prompt:
    """The prompt as policies are to see it: what a worker was sent counts as overlap, as far as it is more than its events say."""
    if not found.shares and prompt.is_keyed:
        return prompt
    if not prompt.is_keyed:
        tokens = max(1, found.n_bytes // BYTES_PER_TOKEN)
        prompt = Prompt(tokens, tokens // BLOCK_TOKENS, (), True, True)
    hits = {hit.position: hit for hit in prompt.hits}
    for position, (rank, share) in found.shares.items():
        known = hits.get(position)
        known_tokens = known.overlap_tokens if known is not None else 0
        # An engine computes at least one token itself.
        tokens = min(int(share * prompt.prompt_tokens), prompt.prompt_tokens - 1)
        if tokens > known_tokens:
            blocks = prompt.prompt_blocks * tokens // prompt.prompt_tokens
            hits[position] = Hit(position, known.rank if known is not None else rank, blocks, tokens, tokens - known_tokens)
    return Prompt(prompt.prompt_tokens, prompt.prompt_blocks, tuple(hits.values()), True, prompt.is_estimated)
