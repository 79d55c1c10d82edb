"""From a publish to what is stored and back to an answer: what is kept, what is refused, what fits."""

import pytest

from sglfast.modelexpress.records import ID_BYTES_MAX, MalformedError, Payload, Publication, peer_host, read_publish, write_found
from sglfast.modelexpress.roster import READY, Entry, Key, State
from sglfast.modelexpress.schema import p2p

MIB = 1 << 20


def read(**worker: object) -> Publication:
    request = p2p.PublishMetadataRequest(
        identity=p2p.SourceIdentity(model_name="M", extra_parameters={"b": "2", "a": "1"}),
        worker_id="w",
        worker=p2p.WorkerMetadata(**worker),  # type: ignore[arg-type]
    )
    found = read_publish(request.SerializeToString())
    assert isinstance(found, Publication)
    return found


def answer(found: Publication, limit_bytes: int = 100 * MIB) -> p2p.GetMetadataResponse:
    state = State(READY, 1_800_000_000_000, 1, 1, None)
    entry = Entry(Key("0123456789abcdef", found.worker_id, found.rank), found.static, state)
    return p2p.GetMetadataResponse.FromString(write_found(entry, found.static.identity, found.payload, limit_bytes))


def test_everything_published_is_answered_but_what_the_server_knows_better() -> None:
    sent = p2p.WorkerMetadata(
        worker_rank=5, nixl_metadata=b"\x00agent", status=p2p.SOURCE_STATUS_STALE, updated_at=7, metadata_endpoint="10.0.0.1:5555",
        agent_name="a", worker_grpc_endpoint="10.0.0.1:6555", accelerator="H100", topology={"node": "n"},
        tensor_source=p2p.TensorSourceMetadata(tensors=[p2p.TensorDescriptor(name="t", addr=2**64 - 1, size=3)]),
    )  # fmt: skip
    request = p2p.PublishMetadataRequest(identity=p2p.SourceIdentity(model_name="M"), worker_id="w", worker=sent)
    found = read_publish(request.SerializeToString())
    assert isinstance(found, Publication)
    assert (found.rank, found.status, found.n_tensors) == (5, p2p.SOURCE_STATUS_STALE, 1)
    assert (found.static.accelerator, found.static.topology, found.static.peer_host) == ("H100", {"node": "n"}, "10.0.0.1")
    got = answer(found)
    assert got.identity == request.identity
    sent.status, sent.updated_at = p2p.SOURCE_STATUS_READY, 1_800_000_000_000
    sent.tensors.extend(sent.tensor_source.tensors)
    assert got.worker == sent


def test_fields_of_a_later_schema_are_kept() -> None:
    later = b"\xf2\x7f\x05later"  # field 2046
    data = p2p.PublishMetadataRequest(identity=p2p.SourceIdentity(model_name="M"), worker_id="w").SerializeToString()
    found = read_publish(data + b"\x12" + bytes([len(later)]) + later)
    assert isinstance(found, Publication)
    assert later in answer(found).worker.SerializeToString()


@pytest.mark.parametrize("form", ["tensors", "tensor_source"])
def test_what_does_not_fit_twice_is_answered_as_it_was_published(form: str) -> None:
    tensors = [p2p.TensorDescriptor(name=f"{'layer' * 20}.{i}", addr=i, size=1) for i in range(5000)]
    worker = {"tensors": tensors} if form == "tensors" else {"tensor_source": p2p.TensorSourceMetadata(tensors=tensors)}
    found = read(**worker)
    size = len(found.payload.tensors)
    both = answer(found, 2 * size + 1000).worker
    assert list(both.tensors) == list(both.tensor_source.tensors) == tensors
    one = answer(found, 2 * size - 1)
    assert one.ByteSize() < 2 * size
    assert list(one.worker.tensors) == (tensors if form == "tensors" else [])
    assert list(one.worker.tensor_source.tensors) == ([] if form == "tensors" else tensors)


@pytest.mark.parametrize("data", [b"\x12", b"\x0a\x03\x1a\x01\xff", b"\xff" * 20])
def test_what_is_no_request_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedError, match=r"."):
        read_publish(data)


def test_a_worker_id_has_a_limit() -> None:
    request = p2p.PublishMetadataRequest(identity=p2p.SourceIdentity(model_name="M"), worker=p2p.WorkerMetadata())
    request.worker_id = "é" * (ID_BYTES_MAX // 2)
    assert isinstance(read_publish(request.SerializeToString()), Publication)
    request.worker_id += "x"
    assert read_publish(request.SerializeToString()) == f"worker_id is longer than {ID_BYTES_MAX} bytes"


def test_an_identity_has_one_spelling_in_bytes() -> None:
    """Two publishers of one identity must not look like a change of it."""
    other = p2p.SourceIdentity(model_name="M")
    for key, value in (("a", "1"), ("b", "2")):
        other.extra_parameters[key] = value
    request = p2p.PublishMetadataRequest(identity=other, worker_id="w", worker=p2p.WorkerMetadata())
    found = read_publish(request.SerializeToString())
    assert isinstance(found, Publication)
    assert found.static.identity == read().static.identity


def test_size_is_that_of_what_is_stored() -> None:
    assert Payload(b"abc", b"de", True).size_bytes == 5


@pytest.mark.parametrize(
    ("worker", "host"),
    [({}, ""), ({"transfer_engine_session_id": "10.0.0.1:12345"}, "10.0.0.1"), ({"metadata_endpoint": "node-7:5555"}, "node-7"),
     ({"worker_grpc_endpoint": "[fd00::1]:6555"}, "fd00::1"), ({"metadata_endpoint": "tcp://10.0.0.2:1"}, "10.0.0.2"),
     ({"transfer_engine_session_id": "[broken", "worker_grpc_endpoint": "10.0.0.3:6555"}, "10.0.0.3")],
)  # fmt: skip
def test_the_peers_host_is_taken_from_its_addresses(worker: dict[str, str], host: str) -> None:
    assert peer_host(p2p.WorkerMetadata(**worker)) == host  # type: ignore[arg-type]
