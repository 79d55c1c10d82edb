"""What a worker does of a request: the operator's word and the worker's own, put together; and pairs that do not fit each other.

Runs in: control. Contract: pure; what cannot be used comes back as a sentence for the log. The worker's own word wins, where it says enough
    (spec/router.md 3.4); what pairs must have in common: spec/gateway.md 1.7.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sglfast.shm import Role
from sglfast.wire.server_info import WorkerFacts

_FOLLOWS_ROOM = "follow_bootstrap_room"


@dataclass(frozen=True, slots=True)
class Named:
    """What the operator said of a worker. bootstrap_port: of a prefill worker; is_port_known: None means none, not "unknown"."""

    role: Role = "regular"
    bootstrap_port: int | None = None
    is_port_known: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What holds. lacks_port: a prefill worker whose bootstrap port nobody has told; problem: for the log, empty when there is none."""

    role: Role
    bootstrap_port: int | None
    lacks_port: bool = False
    problem: str = ""


def resolve(named: Named, facts: WorkerFacts | None) -> Found:
    """The role that a worker has. facts: None when it says nothing of itself."""
    mode = facts.disaggregation_mode if facts else None
    port = facts.disaggregation_bootstrap_port if facts else None
    as_named = _as_named(named)
    if mode is None:
        return as_named
    if mode == "null":
        return Found("regular", None)
    if mode == "decode":
        return Found("decode", None)
    if mode != "prefill":
        return _as_named(named, f"its disaggregation_mode {mode[:40]!r} is not one of null, prefill and decode")
    if port is None:
        return _as_named(named, "it says that it is a prefill worker, but not on which bootstrap port")
    problem = ""
    if named.bootstrap_port not in (None, port):
        problem = f"its bootstrap port is {port}, as it says itself, not {named.bootstrap_port}, as it was given"
    return Found("prefill", port, problem=problem)


def _as_named(named: Named, problem: str = "") -> Found:
    if named.role != "prefill":
        return Found(named.role, None, problem=problem)
    return Found("prefill", named.bootstrap_port, lacks_port=named.bootstrap_port is None and not named.is_port_known, problem=problem)


@dataclass(frozen=True, slots=True)
class Traits:
    """What a prefill or decode worker must have in common with the others of its model, None = it does not tell."""

    url: str
    role: Role
    tp_size: int | None
    dp_size: int | None
    load_balance_method: str | None


def mismatches(workers: Sequence[Traits]) -> list[str]:
    """What does not fit among the prefill and decode workers of one model, a sentence each."""
    found = []
    for name in ("tp_size", "dp_size", "load_balance_method"):
        by_value: dict[object, list[str]] = {}
        for worker in workers:
            value = getattr(worker, name)
            # How requests get to ranks is the prefill workers' affair.
            if value is not None and (name != "load_balance_method" or worker.role == "prefill"):
                by_value.setdefault(value, []).append(worker.url)
        if len(by_value) > 1:
            told = "; ".join(f"{value}: {_some(urls)}" for value, urls in sorted(by_value.items(), key=lambda item: str(item[0])))
            found.append(f"prefill and decode workers differ in {name} ({told}); transfers between them may fail")
    off = [
        worker.url
        for worker in workers
        if worker.role == "prefill" and (worker.dp_size or 1) > 1 and worker.load_balance_method not in (None, _FOLLOWS_ROOM)
    ]
    if off:
        found.append(f"prefill workers with several data-parallel ranks need --load-balance-method {_FOLLOWS_ROOM}: {_some(off)}")
    return found


def _some(urls: Sequence[str]) -> str:
    return ", ".join(urls[:3]) + (f" and {len(urls) - 3} more" if len(urls) > 3 else "")
