"""Why predictions and reports differ: what was seen of a worker, and the words for an operator.

Runs in: control. Pure. Contract: `likely_cause` never guesses where index knows; of what remains it names the likeliest first and
    the others behind it. What the counters mean: edge/parity, edge/untold.
"""

from dataclasses import dataclass, field

from sglfast.shm import PARITY_HIGH, PASSING_REASONS, RANK_REASONS, Engine


@dataclass(frozen=True, slots=True)
class Counts:
    """Samples of a worker: right, predicted too much, predicted too little; of the last ones those whose missing block no event has
    told, and those that report more than is possible. Fractions where they are weighted."""

    exact: float = 0
    high: float = 0
    low: float = 0
    untold: float = 0
    over: float = 0

    @property
    def samples(self) -> float:
        """How many answers were compared."""
        return self.exact + self.high + self.low

    def plus(self, other: "Counts", weight: float = 1) -> "Counts":
        """The sum with so many times the other's."""
        return Counts(
            self.exact + weight * other.exact,
            self.high + weight * other.high,
            self.low + weight * other.low,
            self.untold + weight * other.untold,
            self.over + weight * other.over,
        )

    def minus(self, other: "Counts") -> "Counts":
        """The difference."""
        return self.plus(other, -1)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a worker. counts: of the judge's window; reasons: of its ranks that are DEGRADED, by index; has_stored: it has
    published blocks since the window began; has_overlap: since then the index knew blocks of its prompts; is_steered: requests tell
    it which of its ranks they are for; is_index_full: the index has dropped blocks for want of room."""

    counts: Counts = field(default_factory=Counts)
    reasons: tuple[str, ...] = ()
    n_ranks: int = 1
    has_stored: bool = True
    has_overlap: bool = False
    is_steered: bool = False
    is_index_full: bool = False
    engine: Engine = "sglang"


_PASSING = {RANK_REASONS[reason] for reason in PASSING_REASONS}
_PROMPTS = "the router's prompts differ from the worker's: compare --tokenizer-path and its chat template with the worker's model"


def likely_cause(verdict: int, evidence: Evidence) -> str:
    """What an operator should look at. verdict: PARITY_HIGH or PARITY_LOW."""
    told = "; ".join(evidence.reasons)  # index knows better than any guess
    if told and (verdict == PARITY_HIGH or not _PASSING.issuperset(evidence.reasons)):
        return told
    if verdict == PARITY_HIGH:
        return _too_much(evidence)
    found = _too_little(evidence)
    return f"{told}; if that lasts, {found}" if told else found


def _too_much(evidence: Evidence) -> str:
    if evidence.is_steered:
        return (
            "the engine ignores X-Data-Parallel-Rank (in /generate the body's rank): requests are computed on other ranks than those "
            "that hold the prompt; --disable-dp-steering leaves the choice to the worker"
        )
    if evidence.n_ranks > 1:
        ranks = f"{evidence.n_ranks} data-parallel ranks"
        return f"the worker spreads requests over its {ranks} itself, also to ranks that do not hold the prompt"
    dropped = "the worker dropped blocks without an event, its prefix cache is off"
    return f"{dropped}, or prompts with other salts or adapters are taken for the same"


def _too_little(evidence: Evidence) -> str:
    counts = evidence.counts
    if evidence.is_index_full:
        return f"the KV index is full and has dropped blocks that workers still have: raise --kv-index-blocks; else {_PROMPTS}"
    if counts.over > counts.low / 2:
        return (
            "it reports whole prompts as cached, whose last token an engine always computes: its cached_tokens are not those of its "
            "prefix cache"
        )
    if not evidence.has_stored and not evidence.reasons:
        return f"the worker has published no stored blocks meanwhile: its KV events do not come; else {_PROMPTS}"
    if not (evidence.has_overlap or counts.exact):
        return _PROMPTS
    # Blocks of the router's prompts are the worker's; some are missing.
    is_looked_for = not evidence.reasons and (evidence.n_ranks == 1 or evidence.is_steered)  # see edge/untold
    if is_looked_for and not counts.untold:
        return (
            "its KV events are applied long after its answers: the worker publishes them late, or the router's index process gets too "
            "little CPU time; or it prepares a part of the prompts otherwise than the router (chat template, tools, thoughts, images)"
        )
    more = ", or tells the removal of one copy of a block while it keeps another" if evidence.engine == "vllm" else ""
    return (
        f"the worker leaves stored blocks out of its KV events{more}: it finds blocks in its cache that they never told; or it prepares "
        "a part of the prompts otherwise than the router (chat template, tools, thoughts, images)"
    )
