"""sglfast.edge.policy.approximate: each branch at the edge of its threshold, and whole runs against the gateway's algorithm."""

import random

import pytest
from policy_bench import CHI_SQUARE_LIMIT, Pool, chi_square
from shared_memory import shared_segment

from sglfast._predicted import KEEP, Predictions, PredictionWriter, text_cut, text_keys
from sglfast.edge.policy import CACHE_HIT, CACHE_MISS, IMBALANCED, UNKEYED, Hit, Prompt
from sglfast.edge.policy.approximate import ApproximateCacheAware
from sglfast.edge.predict import Found, with_guesses

POLICY = ApproximateCacheAware(cache_threshold=0.3, balance_abs_threshold=64, balance_rel_threshold=1.5)


def prompt(**tokens: int) -> Prompt:
    """A prompt of 1,000 tokens of which the worker at position `pN` was sent so many."""
    hits = tuple(Hit(int(name[1:]), int(name[1:]), count // 64, count, count) for name, count in tokens.items())
    return Prompt(1000, 15, hits, True, True)


@pytest.mark.parametrize(("tokens", "decision"), [(300, CACHE_MISS), (301, CACHE_HIT), (999, CACHE_HIT)])
def test_a_hit_is_more_than_the_threshold(tokens: int, decision: int) -> None:
    pool = Pool(3)
    pool.load(1, 1)
    picks = pool.picks(POLICY, prompt=prompt(p1=tokens))
    assert set(picks) == ({(1, CACHE_HIT)} if decision == CACHE_HIT else {(0, CACHE_MISS), (2, CACHE_MISS)})


def test_below_the_threshold_what_was_sent_counts_for_nothing() -> None:
    """Requests decide, not tokens: what a worker was sent may be out of its cache."""
    pool = Pool(3)
    pool.load(0, 2)
    pool.load(1, 1, tokens=90_000)
    pool.load(2, 2)
    assert pool.picks(POLICY, prompt=prompt(p0=290, p2=100)) == {(1, CACHE_MISS): 400}


def test_the_longest_wins_and_among_equals_the_least_loaded() -> None:
    pool = Pool(4)
    pool.load(0, 5)
    pool.load(1, 1)
    assert pool.picks(POLICY, prompt=prompt(p0=800, p1=799)) == {(0, CACHE_HIT): 400}
    assert pool.picks(POLICY, prompt=prompt(p0=800, p1=800, p2=700)) == {(1, CACHE_HIT): 400}
    picks = pool.picks(POLICY, 4000, prompt(p2=800, p3=800))
    assert set(picks) == {(2, CACHE_HIT), (3, CACHE_HIT)}
    assert chi_square(picks, 2) < CHI_SQUARE_LIMIT[2]


def test_imbalance_needs_both_thresholds() -> None:
    pool = Pool(2)
    pool.load(0, 64)
    assert pool.picks(POLICY, prompt=prompt(p0=900)) == {(0, CACHE_HIT): 400}
    pool.load(0, 1)
    assert pool.picks(POLICY, prompt=prompt(p0=900)) == {(1, IMBALANCED): 400}
    pool.load(1, 131)
    pool.load(0, 131)  # 196 : 131, not more than one and a half times
    assert pool.picks(POLICY, prompt=prompt(p0=900)) == {(0, CACHE_HIT): 400}
    pool.load(0, 1)
    assert pool.picks(POLICY, prompt=prompt(p0=900)) == {(1, IMBALANCED): 400}


def test_a_prompt_without_keys_goes_by_load() -> None:
    pool = Pool(2)
    pool.load(0, 1)
    assert pool.picks(POLICY) == {(1, UNKEYED): 400}
    assert POLICY.score(3, 900) == 3


class Gateway:
    """The gateway's cache_aware as spec/gateway.md 1.2 tells it: which workers it could choose, given that ties are free.

    Its tree knows, for each worker, the texts that it was sent; a prefix match finds the worker that has most of the text.
    """

    def __init__(self, n: int, threshold: float, abs_threshold: int, rel_threshold: float) -> None:
        self.texts: list[list[bytes]] = [[] for _ in range(n)]
        self.loads = [0] * n
        self.thresholds = threshold, abs_threshold, rel_threshold

    def choices(self, text: bytes) -> set[int]:
        threshold, abs_threshold, rel_threshold = self.thresholds
        low, high = min(self.loads), max(self.loads)
        idlest = {worker for worker, load in enumerate(self.loads) if load == low}
        if high - low > abs_threshold and high > low * rel_threshold:
            return idlest
        matched = [max((common_bytes(text, sent) for sent in texts), default=0) for texts in self.texts]
        best = max(matched)
        if best / len(text) > threshold:
            return {worker for worker, found in enumerate(matched) if found == best}
        return idlest


def common_bytes(one: bytes, other: bytes) -> int:
    n = min(len(one), len(other))
    while one[:n] != other[:n]:
        n -= 128
    return n


@pytest.mark.parametrize(("abs_threshold", "rel_threshold"), [(64, 1.5), (4, 1.5), (0, 1.0), (2, 1.01)])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_whole_runs_choose_as_the_gateway_does(threshold: float, abs_threshold: int, rel_threshold: float, rng: random.Random) -> None:
    """400 prompts that share beginnings of whole pieces of 128 bytes, requests come and go: each choice is one of the gateway's."""
    pool, gateway = Pool(5), Gateway(5, threshold, abs_threshold, rel_threshold)
    policy = ApproximateCacheAware(cache_threshold=threshold, balance_abs_threshold=abs_threshold, balance_rel_threshold=rel_threshold)
    with shared_segment(prediction_blocks=40_000) as (_, segment):
        shard, writer = Predictions(segment, 0), PredictionWriter(segment)
        for rank in range(5):
            writer.own(rank, 1)
        pieces = [bytes(rng.choices(b"abcdefgh", k=128)) for _ in range(6)]
        seen: set[int] = set()
        for _ in range(400):
            text = b"".join(rng.choices(pieces[:2], k=1) + rng.choices(pieces, k=rng.randrange(0, 12)))
            # As many bytes as the pieces, so that both count the same: the quotes are part of the raw value.
            text = b'"' + text[1:-1] + b'"'
            keys, n_bytes = text_keys(b'{"prompt":%b}' % text)
            assert n_bytes == len(text)
            shard.match(keys)
            shares = {rank: (rank, text_cut(n) / n_bytes) for rank, n in shard.hits()}
            position, decision = policy.choose(pool.view, pool.loads, with_guesses(Prompt(), Found(keys, n_bytes, shares)))
            legal = gateway.choices(text)
            assert position in legal, (decision, shares, gateway.loads)
            seen.add(decision)
            shard.put(KEEP, position, 1, keys)
            writer.drain()
            gateway.texts[position].append(text)
            pool.load(position, 1)
            gateway.loads[position] += 1
            for worker in range(5):
                if gateway.loads[worker] and rng.random() < 0.25:
                    pool.columns[0].end(worker, 0, 4, 0)
                    gateway.loads[worker] -= 1
        assert seen >= ({CACHE_MISS} if threshold == 1.0 else {CACHE_HIT, CACHE_MISS} if abs_threshold > 2 else {CACHE_MISS})
