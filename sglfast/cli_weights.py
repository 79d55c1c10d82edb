"""Where simulated workers announce and find weights: a ModelExpress metadata service, asked with the real client library.

Runs in: the process of `sglfast sim --mx-server`, see cli_sim.py. Contract: records have the form of SGLang's TransferEngine transport; the
    session id is the host:port of the worker's WeightServer, addresses are those that its protocol reads.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator

from sglfast.modelexpress.client import MetadataClient
from sglfast.modelexpress.identity import ServerArguments, loader_identity
from sglfast.modelexpress.schema import p2p
from sglfast.modelexpress.seed import Seed
from sglfast.modelexpress.target import find_candidates
from sglfast.sim.settings import SimSettings
from sglfast.sim.weights import Model, Peer, Tensor

# What the real loader of this package version publishes for a model of the usual dtype.
MX_VERSION = "0.7.0"
DTYPE = "bfloat16"
WORKER_RANK = 0  # a simulated worker has one tensor-parallel rank

log = logging.getLogger("sim")


class ModelExpressDirectory:
    """A WeightDirectory. Make it in a running loop; raises ConfigError for an address that cannot be one."""

    def __init__(self, settings: SimSettings) -> None:
        self._identity = loader_identity(ServerArguments(model_path=settings.model), mx_version=MX_VERSION, dtype=DTYPE)
        self._client = MetadataClient(settings.mx_server)
        self._seeds: list[Seed] = []

    async def find(self, model: Model) -> AsyncGenerator[Peer]:
        """Peers that hold this model, freshest first. Raises ModelExpressError."""
        own = [seed.worker_id for seed in self._seeds]
        async with contextlib.aclosing(find_candidates(self._client, self._identity, WORKER_RANK, exclude=own)) as candidates:
            async for one in candidates:
                tensors = {part.name: Tensor(part.name, part.addr, part.size) for part in one.tensors}
                log.info("weights: %d tensors at %s", len(tensors), one.session_id, extra={"fields": {"worker_id": one.worker_id}})
                yield Peer(one.session_id, tensors)

    async def announce(self, model: Model, endpoint: str) -> None:
        """Publish a worker's record and keep it READY."""
        tensors = [p2p.TensorDescriptor(name=one.name, addr=one.address, size=one.size_bytes, dtype=DTYPE) for one in model.tensors]
        worker = p2p.WorkerMetadata(
            worker_rank=WORKER_RANK, transfer_engine_session_id=endpoint, tensor_source=p2p.TensorSourceMetadata(tensors=tensors)
        )
        seed = Seed(self._client, self._identity, worker)
        seed.start()
        self._seeds.append(seed)

    async def close(self) -> None:
        """Mark every record STALE, close the channel."""
        await asyncio.gather(*(seed.stop() for seed in self._seeds))
        await self._client.close()
