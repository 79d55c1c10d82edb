"""ListSources: from filters to the encoded answer.

Runs in: the metadata service. Contract: pure; a roster, a request and the time go in, a serialised ListSourcesResponse comes out,
    newest first.
Rules: spec/modelexpress.md 2.4. The limit cuts before freshness does, as upstream: fewer than `limit` may come back.
"""

from collections.abc import Iterable
from operator import attrgetter

from sglfast.modelexpress.roster import READY, STATUS_NAMES, Roster, Source, Worker
from sglfast.modelexpress.schema import p2p

_updated_at_ms = attrgetter("listed.state.updated_at_ms")


def select(roster: Roster, request: p2p.ListSourcesRequest, source_id: str | None, now_ms: int, fresh_ms: int) -> list[Worker]:
    """The workers that a request asks for, the last updated first.

    source_id: only this source, None = all; fresh_ms: a READY listing leaves out what was not updated for longer.
    """
    workers: list[Worker] = []
    for source in _sources(roster, source_id):
        if request.HasField("model_name_filter") and source.model_name != request.model_name_filter:
            continue
        if request.HasField("min_training_step") and (source.training_step is None or source.training_step < request.min_training_step):
            continue
        workers += source.workers.values()
    # A number that the enum does not know filters nothing, as upstream.
    status = request.status_filter if request.HasField("status_filter") and request.status_filter in STATUS_NAMES else None
    if status is not None:
        workers = [worker for worker in workers if worker.listed.state.status == status or _any_rank(worker, status)]
    if request.HasField("worker_rank_filter"):
        rank = request.worker_rank_filter
        workers = [worker for worker in workers if worker.listed.key.rank == rank]
    if request.HasField("min_updated_at"):
        oldest = request.min_updated_at
        workers = [worker for worker in workers if worker.listed.state.updated_at_ms >= oldest]
    workers.reverse()  # a source has its last changed worker last: of two in one millisecond it comes first
    workers.sort(key=_updated_at_ms, reverse=True)
    if request.limit:
        del workers[request.limit :]
    if status == READY:
        oldest = max(1, now_ms - fresh_ms)
        workers = [worker for worker in workers if worker.listed.state.updated_at_ms >= oldest]
    return workers


def encode(workers: Iterable[Worker]) -> bytes:
    """A ListSourcesResponse."""
    return b"".join([worker.line or worker.encoded() for worker in workers])


def _sources(roster: Roster, source_id: str | None) -> Iterable[Source]:
    if source_id is None:
        return roster.sources.values()
    source = roster.sources.get(source_id)
    return () if source is None else (source,)


def _any_rank(worker: Worker, status: int) -> bool:
    return len(worker.ranks) > 1 and any(entry.state.status == status for entry in worker.ranks.values())
