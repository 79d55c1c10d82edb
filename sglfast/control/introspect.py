"""Ask a worker what it is: model, KV events, ranks.

Runs in: control. Contract: never fatal; a worker that tells nothing is routed without KV awareness. Bodies of `/server_info` hold secrets:
    they live as long as the parser needs them and appear in no log and no error.
Attempts as sgl-router makes them (spec/router.md 3.4): three, on transport errors, 5xx and cut bodies only.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sglfast.control.fetch import Answer, Fetcher, FetchError
from sglfast.errors import WorkerInfoError
from sglfast.wire.server_info import WorkerFacts, parse_model_info, parse_models, parse_server_info

T = TypeVar("T")
_BODY_LIMIT_BYTES = 4 << 20
_RETRY_PAUSES_S = (0.1, 0.2)
_RETRY_LATER_FIRST_S = 5.0
_RETRY_LATER_LAST_S = 30.0
_RETRY_LATER_GROWTH = 1.5


@dataclass(frozen=True, slots=True)
class Findings:
    """What one introspection found. facts: None when `/server_info` told nothing; model: the served name, wherever it was found;
    adapters: LoRA adapters that requests ask for as their model, as vLLM has them.

    has_spoken: the worker answered `/server_info`, or has no such path; else what is known of it from before may still be true.
    problem: empty when has_spoken, else why not, without a byte of the worker's answer.
    """

    facts: WorkerFacts | None
    model: str | None
    has_spoken: bool
    problem: str
    adapters: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """There is no point in asking again."""
        return self.has_spoken and self.model is not None


def retry_pause_s(failures: int) -> float:
    """Pause before the next introspection after `failures` >= 1 incomplete ones: 5 s growing to 30 s."""
    # The exponent is bounded: failures count for as long as the router runs.
    return min(_RETRY_LATER_LAST_S, _RETRY_LATER_FIRST_S * _RETRY_LATER_GROWTH ** min(failures - 1, 16))


async def introspect(fetcher: Fetcher, worker_url: str, timeout_s: float, api_key: str | None = None) -> Findings:
    """Ask the worker; timeout_s bounds each single request. Raises nothing but cancellation."""

    async def ask(*paths: str, pauses_s: Sequence[float] = ()) -> Answer:
        """GET the first of `paths` that exists; after each pause once more when the failure is a passing one."""
        answer = Answer(404, b"")
        for path in paths:
            answer = await _ask_one(fetcher, worker_url + path, timeout_s, pauses_s, api_key)
            if answer.status != 404:
                break
        return answer

    async def told(parse: Callable[[bytes], T], *paths: str) -> T | None:
        try:
            answer = await ask(*paths)
            return parse(answer.body) if answer.is_good else None
        except (FetchError, WorkerInfoError):
            return None

    facts: WorkerFacts | None = None
    problem = ""
    try:
        answer = await ask("/server_info", "/get_server_info", pauses_s=_RETRY_PAUSES_S)
        if answer.is_good:
            facts = parse_server_info(answer.body, worker_url)
        elif answer.status != 404:
            problem = f"/server_info is answered with status {answer.status}"
    except (FetchError, WorkerInfoError) as error:
        problem = f"/server_info: {error}"
    model = facts.model if facts else None
    model = model or await told(parse_model_info, "/model_info", "/get_model_info")
    adapters: tuple[str, ...] = ()
    has_adapters = facts.adapters == "models" if facts is not None else not problem
    if model is None or has_adapters:
        served, found = await told(parse_models, "/v1/models") or (None, ())
        model, adapters = model or served, found if has_adapters else ()
    return Findings(facts=facts, model=model, has_spoken=not problem, problem=problem, adapters=adapters)


async def _ask_one(fetcher: Fetcher, url: str, timeout_s: float, pauses_s: Sequence[float], api_key: str | None) -> Answer:
    for pause_s in pauses_s:
        try:
            answer = await fetcher.get(url, timeout_s, _BODY_LIMIT_BYTES, api_key)
            if answer.status < 500:
                return answer
        except FetchError as error:
            if not error.is_transient:
                raise
        await asyncio.sleep(pause_s)
    return await fetcher.get(url, timeout_s, _BODY_LIMIT_BYTES, api_key)
