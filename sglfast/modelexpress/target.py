"""The target side: which READY workers hold the wanted weights, freshest first, and their records.

Runs in: the process of a worker that starts, on its asyncio loop (blocking.py for programs without one). Contract: candidates come one
    by one, so that a caller whose copy from one fails simply takes the next; a candidate whose record cannot be had is passed over. What
    went wrong is in the error that ends the search.
READY does not prove that a worker lives: it may have died less than the server's heartbeat timeout (90 s) ago. So a copy needs a
timeout and this generator's next element, and the caller leaves out ids of its own.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass

from sglfast.modelexpress.client import BackOff, CallFailed, MetadataClient, ModelExpressError
from sglfast.modelexpress.schema import p2p

CANDIDATES = 3  # a fourth dead peer in a row says that something else is wrong


class NoSource(ModelExpressError):
    """Nobody offers the weights, or no candidate's record could be had; the text says which."""


class WrongRecord(ModelExpressError):
    """A record that does not fit: another transport, or other tensors than the target's."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A READY worker that holds the weights. updated_at_ms: unix milliseconds of its last heartbeat by the server's clock, 0 = not told."""

    source_id: str
    worker_id: str
    updated_at_ms: int
    worker: p2p.WorkerMetadata

    @property
    def tensors(self) -> Sequence[p2p.TensorDescriptor]:
        """Names, addresses and sizes in bytes; empty when the worker itself must be asked for them (worker_grpc_endpoint)."""
        if self.worker.WhichOneof("source_payload") == "tensor_source":
            return self.worker.tensor_source.tensors
        return self.worker.tensors

    @property
    def session_id(self) -> str:
        """TransferEngine's session, ip:port. Raises WrongRecord when the worker has another transport."""
        kind = self.worker.WhichOneof("backend_metadata")
        if kind != "transfer_engine_session_id":
            raise WrongRecord(f"ModelExpress worker {self.worker_id} has {kind or 'no transport'}, not transfer_engine_session_id")
        return self.worker.transfer_engine_session_id

    def check_tensors(self, local: Mapping[str, int]) -> None:
        """Compare with the target's own tensors: name -> size in bytes. Raises WrongRecord that names the first that differs.

        Total bytes decide, not shapes or dtypes: quantised weights are compared after their processing (SGLang PR #21222).
        """
        theirs = {tensor.name: tensor.size for tensor in self.tensors}
        for name, size_bytes in local.items():
            if name not in theirs:
                raise WrongRecord(f"ModelExpress worker {self.worker_id} does not list {name}, one of {len(local)} tensors needed here")
            if theirs[name] != size_bytes:
                raise WrongRecord(
                    f"ModelExpress worker {self.worker_id} has {name} with {theirs[name]} bytes (seed), here it has {size_bytes} (local)"
                )


async def find_candidates(
    client: MetadataClient,
    identity: p2p.SourceIdentity,
    worker_rank: int,
    *,
    limit: int = CANDIDATES,
    wait_s: float = 0.0,
    exclude: Collection[str] = (),
    back_off: BackOff | None = None,
) -> AsyncGenerator[Candidate]:
    """Yield up to `limit` workers of the same identity and rank, freshest first.

    wait_s: how long to ask again while nobody offers the weights; exclude: worker ids to pass over, as the caller's own.
    Raises CallFailed when the service cannot be asked, NoSource when it knows none, or when no record at all could be had.
    """
    back_off = back_off or BackOff()
    references = await _wait_for_references(client, identity, worker_rank, wait_s, exclude, back_off)
    failures: list[str] = []
    for reference in references[:limit]:
        try:
            answer = await client.get_metadata(reference.mx_source_id, reference.worker_id)
        except CallFailed as error:
            failures.append(str(error))
            continue
        if answer is None:
            failures.append(f"source_id={reference.mx_source_id} worker_id={reference.worker_id} has no record any more")
        elif answer.worker.status == p2p.SOURCE_STATUS_STALE:
            failures.append(f"worker_id={reference.worker_id} became STALE")
        elif answer.worker.worker_rank != worker_rank:
            failures.append(f"worker_id={reference.worker_id} has the record of rank {answer.worker.worker_rank}")
        else:
            yield Candidate(reference.mx_source_id, reference.worker_id, reference.updated_at, answer.worker)
    if len(failures) == len(references[:limit]):
        raise NoSource(f"{_wanted(client, identity, worker_rank)}: no record could be had: {'; '.join(failures)}")


async def _wait_for_references(
    client: MetadataClient, identity: p2p.SourceIdentity, worker_rank: int, wait_s: float, exclude: Collection[str], back_off: BackOff
) -> list[p2p.SourceInstanceRef]:
    """Ask until somebody offers the weights. Raises CallFailed, NoSource."""
    end_s = time.monotonic() + wait_s
    asked = 0
    while True:
        # All ranks are asked for: servers before 0.5 know no filter, and the number of others tells the operator what is wrong.
        ready = await back_off.run(lambda: client.list_sources(identity, status=p2p.SOURCE_STATUS_READY))
        found = [one for one in ready if one.worker_rank == worker_rank and one.worker_id not in exclude]
        if found:
            return sorted(found, key=lambda one: one.updated_at, reverse=True)
        asked += 1
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            seen = f"{len(ready)} READY of other ranks or excluded" if ready else "none READY with this identity"
            raise NoSource(
                f"{_wanted(client, identity, worker_rank)}: {seen}. A seed must run and have published under the same model name, "
                "parallelism, dtype and quantization"
            )
        await asyncio.sleep(min(left_s, back_off.pause_s(asked)))


def _wanted(client: MetadataClient, identity: p2p.SourceIdentity, worker_rank: int) -> str:
    return f"ModelExpress server {client.address} has no source for model={identity.model_name}, rank={worker_rank}"
