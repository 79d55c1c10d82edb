"""What the router itself sent where: the answer for a prompt that no KV event speaks of, yet or ever.

Runs in: shards, event loop. Of workers with events a prediction tells what is on its way into their cache, from the choice to the first
    token: of siblings that come together all but the first find it. Of workers without events it is all that is known of their cache.
Contract: a choice says what there is to note, an attempt that is made notes it, and settles it; a choice that leads to none does neither.
    A prompt is told by the raw text of its body (sglfast._predicted), so neither template nor tokenizer is needed, and a beginning
    is found whatever its length: block keys of tokens are made no further than somebody owns the blocks, and those of a new prompt
    would say nothing of what two siblings share. What is found is a share of the prompt, not blocks; counted as tokens of the prompt it is
    marked as guessed. Only what events say counts as overlap towards users and in the parity loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
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
_FIRST_CUT_BYTES = text_cut(1)


class Found(NamedTuple):
    """What is known of a body's prompt. keys: of its text; shares: position in the pool -> (rank, share of the text that it was sent);
    by_rank: rank -> (position, share), of workers whose ranks are chosen too; None = there are none."""

    keys: bytes = b""
    n_bytes: int = 0
    shares: Mapping[int, tuple[int, float]] = MappingProxyType({})
    by_rank: Mapping[int, tuple[int, float]] | None = None


class Prediction(NamedTuple):
    """A prompt that goes to a rank. op: SENT or KEEP; generation: of the rank's worker."""

    op: int
    rank: int
    generation: int
    keys: bytes


NOTHING = Found()


def predicted(worker: WorkerView, rank: int, keys: bytes, *, is_kept: bool) -> Prediction:
    """What there will be to note when a prompt goes to a worker. is_kept: no event will tell what became of it."""
    return Prediction(KEEP if is_kept else SENT, rank, worker.generation, keys)


class Predictor:
    """A shard's predictions. Of the event loop's thread."""

    def __init__(self, segment: Segment, shard: int) -> None:
        self._table = Predictions(segment, shard)

    def look_up(self, pool: Pool, body: bytes) -> Found:
        """Which workers of the pool were sent how much of the body's prompt. Cost: 6 us for 32 KB."""
        keys, n_bytes = text_keys(body)
        # Of workers with events a prompt that short is no block that could be missed, and a crowd of equal ones is better spread.
        if not keys or (n_bytes < _FIRST_CUT_BYTES and not pool.is_approximate):
            return NOTHING
        shares: dict[int, tuple[int, float]] = {}
        ranks = pool.ranks
        by_rank: dict[int, tuple[int, float]] | None = {} if ranks is not None else None
        if self._table.match(keys):
            for rank, n_keys in self._table.hits():
                position = pool.positions.get(rank)
                if position is not None:
                    share = min(1.0, text_cut(n_keys) / n_bytes)
                    if by_rank is not None and ranks is not None and rank in ranks.owned:
                        by_rank[rank] = (position, share)
                    if position not in shares or share > shares[position][1]:
                        shares[position] = (rank, share)
        return Found(keys, n_bytes, shares, by_rank)

    def is_in_flight(self, worker: WorkerView, rank: int | None = None) -> bool:
        """Whether what the worker, or that rank of it, was sent of the prompt looked up last still waits for its first token."""
        if rank is not None:
            return self._table.is_in_flight(rank)
        return any(self._table.is_in_flight(worker.rank_base + rank) for rank in range(worker.dp_size))

    def note(self, prediction: Prediction) -> None:
        """The prompt goes to that rank now."""
        self._table.put(*prediction)

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
        tokens = _tokens_of(share, prompt)
        known_tokens = known.overlap_tokens if known is not None else 0
        if tokens > known_tokens:
            blocks = prompt.prompt_blocks * tokens // prompt.prompt_tokens
            hits[position] = Hit(position, known.rank if known is not None else rank, blocks, tokens, tokens - known_tokens)
    by_rank = _by_rank(prompt, found.by_rank) if found.by_rank is not None else None
    return Prompt(prompt.prompt_tokens, prompt.prompt_blocks, tuple(hits.values()), True, prompt.is_estimated, by_rank, prompt.is_looked_up)


def _tokens_of(share: float, prompt: Prompt) -> int:
    # An engine computes at least one token itself.
    return min(int(share * prompt.prompt_tokens), prompt.prompt_tokens - 1)


def _by_rank(prompt: Prompt, sent: Mapping[int, tuple[int, float]]) -> dict[int, Hit]:
    """The same for single ranks. sent: see Found."""
    hits = dict(prompt.by_rank or ())
    for rank, (position, share) in sent.items():
        known = hits.get(rank)
        tokens = _tokens_of(share, prompt)
        known_tokens = known.overlap_tokens if known is not None else 0
        if tokens > known_tokens:
            hits[rank] = Hit(position, rank, prompt.prompt_blocks * tokens // prompt.prompt_tokens, tokens, tokens - known_tokens)
    return hits
