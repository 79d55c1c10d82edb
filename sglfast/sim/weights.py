"""Made-up model weights: what a simulated worker holds, lets peers read, and copies from a peer before it serves.

Runs in: sim. Contract: the bytes are real and cross a real socket, in reads of (address, size) as RDMA does them; the reader keeps to
    its bandwidth, checks every byte against what the model must hold, and goes to the next peer, with what it has, when one fails.
    Who holds which weights is asked of a WeightDirectory, which the caller hands in: this room knows no metadata service.
The protocol of a read, on a TCP connection that may carry many: 16 bytes (address and size, unsigned 64-bit little-endian), answered by
    exactly `size` bytes; a range outside the tensors is answered by the end of the connection.
"""

import asyncio
import contextlib
import logging
import random
import struct
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sglfast.errors import SglfastError

TENSOR_BYTES = 4 << 20
BASE_ADDRESS = 0x7F00_0000_0000  # looks like a device address; nothing is mapped there
PEER_TIMEOUT_S = 10.0
_CHUNK_BYTES = 256 << 10
_CHUNK_S = 0.05  # a chunk takes at most this long at the set bandwidth, so that progress is smooth
_PATTERN_BYTES = 1_048_573  # a prime: tensors do not begin alike, so that a read from a wrong place is seen
_READ = struct.Struct("<QQ")

log = logging.getLogger("sim")


class WeightsError(SglfastError):
    """Weights that no peer could give; the text says which peers failed and how."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: where it begins in its holder's memory, and its length."""

    name: str
    address: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker that holds weights. endpoint: host:port of its WeightServer; tensors: by name."""

    endpoint: str
    tensors: Mapping[str, Tensor]


class WeightDirectory(Protocol):
    """Where workers that hold weights are announced and found."""

    def find(self, model: "Model") -> AsyncGenerator[Peer]:
        """Peers that hold this model, the best first. Raises SglfastError when there is none or nobody can be asked."""

    async def announce(self, model: "Model", endpoint: str) -> None:
        """Tell others that a worker here lets them read this model. Must not wait for whoever is told."""

    async def close(self) -> None:
        """Withdraw what was announced and release everything."""


class Model:
    """A made-up model: tensors of TENSOR_BYTES (the last one shorter), their content a pattern chosen by the name."""

    def __init__(self, name: str, size_bytes: int) -> None:
        self.name = name
        self.size_bytes = size_bytes
        starts = range(0, size_bytes, TENSOR_BYTES)
        self.tensors = [
            Tensor(f"model.layers.{i}.weight", BASE_ADDRESS + start, min(TENSOR_BYTES, size_bytes - start))
            for i, start in enumerate(starts)
        ]
        pattern = random.Random(name).randbytes(_PATTERN_BYTES)
        self._pattern = memoryview(pattern + pattern[:_CHUNK_BYTES])

    def holds(self, address: int, size_bytes: int) -> bool:
        """Whether the range lies within the weights."""
        return address >= BASE_ADDRESS and address - BASE_ADDRESS + size_bytes <= self.size_bytes

    def chunk(self, address: int, size_bytes: int) -> memoryview:
        """The content at an address, at most 256 KiB of it."""
        start = (address - BASE_ADDRESS) % _PATTERN_BYTES
        return self._pattern[start : start + min(size_bytes, _CHUNK_BYTES)]


class WeightServer:
    """Lets peers read a model. `open` listens on a free port, `close` cuts whoever reads."""

    def __init__(self, model: Model, host: str) -> None:
        self._model = model
        self._host = host
        self._server: asyncio.Server | None = None
        self._readers: dict[asyncio.Task[None], asyncio.StreamWriter] = {}  # a task serves one peer
        self.port = 0
        self.sent_bytes = 0

    @property
    def endpoint(self) -> str:
        """host:port for peers."""
        return f"[{self._host}]:{self.port}" if ":" in self._host else f"{self._host}:{self.port}"

    async def open(self) -> None:
        """Begin to listen."""
        self._server = await asyncio.start_server(self._serve, self._host, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop; returns when every connection is gone."""
        if self._server is None:
            return
        self._server.close()
        for writer in self._readers.values():
            writer.transport.abort()
        if self._readers:
            await asyncio.wait(list(self._readers))
        await self._server.wait_closed()
        self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._readers[task] = writer
        try:
            while True:
                address, left = _READ.unpack(await reader.readexactly(_READ.size))
                if not self._model.holds(address, left):
                    log.warning("a peer asked for %d bytes at %#x, which are no weights of %s", left, address, self._model.name)
                    return
                while left:
                    chunk = self._model.chunk(address, left)
                    writer.write(chunk)
                    await writer.drain()
                    address, left = address + len(chunk), left - len(chunk)
                    self.sent_bytes += len(chunk)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the peer has what it wanted, or died: its matter
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            del self._readers[task]


class Copier:
    """Copies a model from peers at a bandwidth. bytes_per_s: the most it reads; `copied_bytes` is how far it is.

    progress: called with the peer's endpoint after every piece.
    """

    def __init__(self, model: Model, bytes_per_s: float, progress: Callable[[str], None]) -> None:
        self._model = model
        self._rate = bytes_per_s
        self._progress = progress
        self._missing = list(model.tensors)
        self.copied_bytes = 0

    async def copy(self, directory: WeightDirectory) -> str:
        """Copy everything; returns the endpoint of the last peer. Raises WeightsError, or what the directory raises."""
        failures: list[str] = []
        async with contextlib.aclosing(directory.find(self._model)) as peers:
            async for peer in peers:
                try:
                    await self._copy_from(peer)
                    return peer.endpoint
                except (OSError, EOFError, TimeoutError, WeightsError) as error:
                    failures.append(f"{peer.endpoint}: {error or type(error).__name__}")
                    log.warning("weights: %s failed after %d bytes in all: %s", peer.endpoint, self.copied_bytes, failures[-1])
        raise WeightsError(f"no peer gave the weights of {self._model.name} ({'; '.join(failures) or 'there is none'})")

    async def _copy_from(self, peer: Peer) -> None:
        for tensor in self._missing:  # all are compared before the first byte is read
            theirs = peer.tensors.get(tensor.name)
            if theirs is None:
                raise WeightsError(f"the peer does not list {tensor.name}")
            if theirs.size_bytes != tensor.size_bytes:
                raise WeightsError(f"{tensor.name} has {theirs.size_bytes} bytes there and {tensor.size_bytes} here")
        host, _, port = peer.endpoint.rpartition(":")
        async with asyncio.timeout(PEER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        try:
            start_s, before = time.monotonic(), self.copied_bytes
            while self._missing:
                tensor = self._missing[0]
                tensor_start = self.copied_bytes
                try:
                    await self._read(tensor, peer, reader, writer, start_s, before)
                except BaseException:
                    self.copied_bytes = tensor_start  # half a tensor is none
                    raise
                self._missing.pop(0)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _read(
        self, tensor: Tensor, peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, start_s: float, before: int
    ) -> None:
        """Read one tensor. The clock of the bandwidth started at `start_s`, when `before` bytes were there."""
        writer.write(_READ.pack(peer.tensors[tensor.name].address, tensor.size_bytes))
        step = max(1, min(_CHUNK_BYTES, int(self._rate * _CHUNK_S)))
        done = 0
        while done < tensor.size_bytes:
            expected = self._model.chunk(tensor.address + done, min(step, tensor.size_bytes - done))
            async with asyncio.timeout(PEER_TIMEOUT_S):
                data = await reader.readexactly(len(expected))
            if data != expected:
                raise WeightsError(f"{tensor.name} differs from the model at byte {done} or soon after")
            done += len(data)
            self.copied_bytes += len(data)
            self._progress(peer.endpoint)
            await asyncio.sleep(max(0.0, start_s + (self.copied_bytes - before) / self._rate - time.monotonic()))


class Weights:
    """The weights of one simulated worker: copied first when its role is `target`, then announced and readable by peers."""

    def __init__(
        self,
        model: Model,
        directory: WeightDirectory,
        role: Literal["seed", "target"],
        bytes_per_s: float,
        host: str,
        progress: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._model = model
        self._copier = Copier(model, bytes_per_s, progress)
        self._server = WeightServer(model, host)
        self._source = ""
        self.role = role

    @property
    def copied_bytes(self) -> int:
        """How much of them was copied so far."""
        return self._copier.copied_bytes

    async def load(self) -> None:
        """Have the weights: at once as a seed, from peers as a target. Raises SglfastError."""
        if self.role == "target":
            self._source = await self._copier.copy(self._directory)
        await self._server.open()

    async def announce(self) -> None:
        """Let others find them."""
        await self._directory.announce(self._model, self._server.endpoint)

    async def close(self) -> None:
        """Stop serving them."""
        await self._server.close()

    def stats(self) -> dict[str, Any]:
        """What GET /sim/stats tells of them; sizes in bytes, "source" the endpoint they came from."""
        return {
            "role": self.role,
            "size": self._model.size_bytes,
            "copied": self._copier.copied_bytes,
            "source": self._source,
            "endpoint": self._server.endpoint,
            "sent": self._server.sent_bytes,
        }
