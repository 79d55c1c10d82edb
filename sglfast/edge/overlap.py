"""What the workers of a pool hold of a prompt, by the KV index.

Runs in: shards, event loop. Contract: one hit a worker, that of its rank which holds most; the hits of all ranks only where one of them
    is to be chosen (edge/ranks), so that nothing grows with ranks elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglfast.edge.policy import NO_PROMPT, Hit, Prompt

if TYPE_CHECKING:
    from sglfast._hashtree import TreeReader
    from sglfast.edge.pools import Pool
    from sglfast.edge.request import Facts


def look_up(tree: TreeReader, pool: Pool, facts: Facts) -> Prompt:
    """Ask the KV index. Cost: one walk per way of cutting blocks, then the few ranks that hold something."""
    if not facts.keys:
        return NO_PROMPT
    best: dict[int, Hit] = {}
    ranks = pool.ranks
    by_rank: dict[int, Hit] | None = {} if ranks is not None else None
    prompt_blocks = 0
    for variant, keys in facts.keys.items():
        block_size = variant.block_size
        prompt_blocks = max(prompt_blocks, facts.prompt_tokens // block_size)
        if not keys or not tree.match(keys):
            continue
        for rank, overlap_blocks in tree.hits():
            owner = pool.by_rank.get(rank)
            if owner is None or owner[1] != variant:
                continue
            position = owner[0]
            known = best.get(position)
            if known is None or overlap_blocks > known.overlap_blocks:
                best[position] = Hit(position, rank, overlap_blocks, overlap_blocks * block_size)
            if by_rank is not None and ranks is not None and rank in ranks.owned:
                by_rank[rank] = Hit(position, rank, overlap_blocks, overlap_blocks * block_size)
    return Prompt(facts.prompt_tokens, prompt_blocks, tuple(best.values()), True, facts.is_estimated, by_rank, True)
