"""`sglfast modelexpress sources`: a table of what a metadata service knows.

Runs in: the process of the command. Contract: asks with the API's own calls only, so it works against any server; what an older server does
    not tell (identity, times) is shown as `-`. A server that cannot be asked raises SglfastError with the gRPC code and details.
Asked: the listing as it is and once for each status, then one record of each source for its identity.
"""

import argparse
import time
from collections import Counter
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from sglfast.errors import SglfastError
from sglfast.modelexpress.roster import STATUS_NAMES
from sglfast.modelexpress.schema import DEFAULT_PORT, P2P_SERVICE, p2p

A = TypeVar("A", bound=Message)
_PIPE_COLUMNS = 200  # width where there is no terminal
_MISSING_SHOWN = 8
_RANKS_MAX = 100_000  # an identity may say anything
EXPIRED = "EXPIRED"  # READY, but not heard of for so long that no READY listing shows it


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--url", default=f"localhost:{DEFAULT_PORT}", metavar="HOST:PORT", help="the service (default: %(default)s)")
    parser.add_argument("--model", metavar="TEXT", help="only models whose name contains this")
    parser.add_argument("--timeout-secs", type=float, default=10.0, metavar="X", help="time for each call (default: %(default)s)")


def show(arguments: argparse.Namespace) -> int:
    """Print the table; return the exit code. Raises SglfastError when the service cannot be asked."""
    address = arguments.url.removeprefix("http://").rstrip("/")
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        try:
            table = _table(_Asker(channel, arguments.timeout_secs), arguments.model or "")
        except grpc.RpcError as error:
            told = f"{error.code()}: {error.details()}" if isinstance(error, grpc.Call) else str(error)
            raise SglfastError(f"cannot ask the service at {address}: {told}") from None
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_COLUMNS)
    console.print(table)
    return 0


class _Asker:
    """Calls of the API, one after the other."""

    def __init__(self, channel: grpc.Channel, timeout_s: float) -> None:
        self._channel, self._timeout_s = channel, timeout_s

    def list(self, status: int | None = None) -> list[p2p.SourceInstanceRef]:
        """All workers, or those of one status."""
        request = p2p.ListSourcesRequest() if status is None else p2p.ListSourcesRequest(status_filter=status)  # type: ignore[arg-type]
        return list(self._ask("ListSources", request, p2p.ListSourcesResponse).instances)

    def identity(self, ref: p2p.SourceInstanceRef) -> p2p.SourceIdentity | None:
        """What the worker's source is, if the server tells it."""
        request = p2p.GetMetadataRequest(mx_source_id=ref.mx_source_id, worker_id=ref.worker_id)
        answer = self._ask("GetMetadata", request, p2p.GetMetadataResponse)
        return answer.identity if answer.HasField("identity") else None

    def _ask(self, method: str, request: Message, answer: type[A]) -> A:
        call = self._channel.unary_unary(
            f"/{P2P_SERVICE}/{method}", request_serializer=type(request).SerializeToString, response_deserializer=answer.FromString
        )
        result: A = call(request, timeout=self._timeout_s)
        return result


def _table(asker: _Asker, model: str) -> Table:
    table = Table(title="ModelExpress sources")
    for name in ("model", "mx_source_id", "engine", "tp/pp/ep", "dtype", "quantization", "ranks READY", "workers", "updated", "status"):
        table.add_column(name, overflow="fold", justify="right" if name in ("workers", "updated") else "left")
    status_of: dict[tuple[str, str], str] = {}
    for status, name in STATUS_NAMES.items():
        status_of |= {(ref.mx_source_id, ref.worker_id): name for ref in asker.list(status)}
    sources: dict[str, list[p2p.SourceInstanceRef]] = {}
    for ref in asker.list():
        if model in ref.model_name:
            sources.setdefault(ref.mx_source_id, []).append(ref)
    for refs in sorted(sources.values(), key=lambda refs: (refs[0].model_name, refs[0].mx_source_id)):
        statuses = [status_of.get((ref.mx_source_id, ref.worker_id), EXPIRED) for ref in refs]
        ready = {ref.worker_rank for ref, status in zip(refs, statuses, strict=True) if status == "READY"}
        tally = Counter(statuses)
        table.add_row(
            refs[0].model_name,
            refs[0].mx_source_id,
            *_described(asker.identity(refs[0]), ready),
            str(len(refs)),
            _age(max(ref.updated_at for ref in refs)),
            ", ".join(f"{name} {tally[name]}" for name in (*STATUS_NAMES.values(), EXPIRED) if tally[name]),
        )
    return table


def _described(identity: p2p.SourceIdentity | None, ready: set[int]) -> tuple[str, str, str, str, str]:
    """Engine, parallelism, dtype, quantization, ranks."""
    if identity is None:
        return "-", "-", "-", "-", str(len(ready))
    tp, pp, ep = identity.tensor_parallel_size or 1, identity.pipeline_parallel_size or 1, identity.expert_parallel_size or 1
    engines = {number: name.removeprefix("BACKEND_FRAMEWORK_").lower() for name, number in p2p.BackendFramework.items()}
    # Rank = pp_rank * tp_size + tp_rank, spec/modelexpress.md 3.2.
    missing = [str(rank) for rank in range(min(tp * pp, _RANKS_MAX)) if rank not in ready]
    shown = ", ".join(missing[:_MISSING_SHOWN]) + (", ..." if len(missing) > _MISSING_SHOWN else "")
    ranks = f"{tp * pp - len(missing)}/{tp * pp}" + (f", missing {shown}" if missing else ", complete")
    engine = engines.get(int(identity.backend_framework), str(int(identity.backend_framework)))
    return engine, f"{tp}/{pp}/{ep}", identity.dtype or "-", identity.quantization or "-", ranks


def _age(updated_at_ms: int) -> str:
    if updated_at_ms <= 0:
        return "-"
    seconds = max(0, round(time.time() - updated_at_ms / 1000))
    for unit, length_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds // length_s} {unit} ago"
    return f"{seconds} s ago"
