"""One record: from a publish to what is stored, and from what is stored to the answer.

Runs in: the metadata service; `read_publish` and `write_found` in a thread when the message is large. Contract: pure, no I/O.
Rules: spec/modelexpress.md 2.3 and 2.5. Tensors are answered in both fields that clients read (the legacy `tensors` and `tensor_source`),
    unless that would make the message larger than its limit: then only in the field that the publisher used, since whoever
    reads a record runs the publisher's version (an identity binds the two together).
"""

from dataclasses import dataclass
from urllib.parse import urlsplit

from sglfast._mxrecord import retag, split
from sglfast.modelexpress.roster import Entry, Static
from sglfast.modelexpress.schema import p2p
from sglfast.modelexpress.varint import varint

ID_BYTES_MAX = 1024
_TENSORS_FIELD = 3  # of WorkerMetadata
_TENSOR_SOURCE_TAG = b"\xa2\x01"  # field 20 of WorkerMetadata
_WORKER_TAG = b"\x12"  # field 2 of GetMetadataResponse
_IDENTITY_TAG = b"\x2a"  # field 5
_TAGS_BYTES = 16  # tag and length of the worker, generously


class MalformedError(ValueError):
    """Bytes that are no message of the schema; the text says why."""


@dataclass(frozen=True, slots=True)
class Payload:
    """The large, unchanging part of a record.

    head: a serialised WorkerMetadata without tensors, status and updated_at; tensors: records of `_mxrecord`; is_legacy: they came in
    the field `tensors`.
    """

    head: bytes
    tensors: bytes
    is_legacy: bool

    @property
    def size_bytes(self) -> int:
        """Bytes to be stored."""
        return len(self.head) + len(self.tensors)


@dataclass(frozen=True, slots=True)
class Publication:
    """A publish that can be stored. status: as sent; n_tensors: as the answer tells it."""

    identity: p2p.SourceIdentity
    worker_id: str
    rank: int
    status: int
    static: Static
    payload: Payload
    n_tensors: int


def read_publish(data: bytes) -> Publication | str:
    """Read a PublishMetadataRequest; returns the sentence for the client when a field that must be there is not.

    Raises MalformedError.
    """
    try:
        small, legacy, n_legacy, source, n_source = split(data)
        request = p2p.PublishMetadataRequest.FromString(small)
    except Exception as error:  # protobuf's DecodeError is no class of its own in every implementation
        raise MalformedError(str(error)) from error
    if not request.HasField("identity"):
        return "identity is required"
    if not request.identity.model_name:
        return "identity.model_name is required"
    if not request.worker_id:
        return "worker_id is required"
    if not request.HasField("worker"):
        return "worker is required"
    if len(request.worker_id.encode()) > ID_BYTES_MAX:
        return f"worker_id is longer than {ID_BYTES_MAX} bytes"
    worker = request.worker
    offered = worker.WhichOneof("source_payload")
    is_legacy = offered is None
    tensors, n_tensors = (legacy, n_legacy) if is_legacy else (source, n_source) if offered == "tensor_source" else (b"", 0)
    static = Static(
        identity=request.identity.SerializeToString(deterministic=True),
        accelerator=worker.accelerator,
        topology=dict(worker.topology),
        peer_host=peer_host(worker),
    )
    rank, status = worker.worker_rank, int(worker.status)
    worker.ClearField("status")
    worker.ClearField("updated_at")
    payload = Payload(head=worker.SerializeToString(), tensors=tensors, is_legacy=is_legacy)
    return Publication(request.identity, request.worker_id, rank, status, static, payload, n_tensors)


def write_found(entry: Entry, identity: bytes, payload: Payload, limit_bytes: int) -> bytes:
    """The serialised GetMetadataResponse of a record. identity: the source's; limit_bytes: the largest message."""
    state, key = entry.state, entry.key
    worker = p2p.WorkerMetadata.FromString(payload.head)
    worker.status = state.status  # type: ignore[assignment]
    worker.updated_at = state.updated_at_ms
    tensors: list[bytes] = []
    if worker.WhichOneof("source_payload") != "artifact_source":
        worker.ClearField("source_payload")
        in_source = b"".join((_TENSOR_SOURCE_TAG, varint(len(payload.tensors)), payload.tensors))
        tensors = [retag(payload.tensors, _TENSORS_FIELD), in_source]
    body = worker.SerializeToString()
    answer = p2p.GetMetadataResponse(found=True, mx_source_id=key.source_id, worker_id=key.worker_id)
    head = b"".join((answer.SerializeToString(), _IDENTITY_TAG, varint(len(identity)), identity))
    if len(head) + len(body) + sum(map(len, tensors)) + _TAGS_BYTES > limit_bytes:
        del tensors[1 if payload.is_legacy else 0 :: 2]
    worker_bytes = len(body) + sum(map(len, tensors))
    return b"".join((head, _WORKER_TAG, varint(worker_bytes), body, *tensors))


def peer_host(worker: p2p.WorkerMetadata) -> str:
    """The host in one of the worker's addresses, or "" when it tells none."""
    for address in (worker.transfer_engine_session_id, worker.metadata_endpoint, worker.worker_grpc_endpoint):
        try:
            host = urlsplit(address if "://" in address else f"//{address}").hostname
        except ValueError:
            continue
        if host:
            return host
    return ""
