"""sglfast._mxrecord against protobuf: the same messages accepted, the same descriptors found."""

import threading
import time

import pytest
from conftest import SeededRandom
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from sglfast._mxrecord import retag, split

p2p = pytest.importorskip("sglfast.modelexpress.schema").p2p
TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
UINT64 = st.integers(0, 2**64 - 1)
TENSORS = st.builds(
    p2p.TensorDescriptor,
    name=TEXT,
    addr=UINT64,
    size=UINT64,
    device_id=st.integers(0, 7),
    dtype=st.sampled_from(["", "torch.bfloat16"]),
)
DESCRIPTORS = st.lists(TENSORS, max_size=4)


@st.composite
def publishes(draw: st.DrawFn) -> bytes:
    """One request, or several in a row: protobuf reads that as one merged message."""
    return b"".join(draw(publish()) for _ in range(draw(st.integers(1, 2))))


@st.composite
def publish(draw: st.DrawFn) -> bytes:
    worker = p2p.WorkerMetadata(worker_rank=draw(st.integers(0, 9)), agent_name=draw(TEXT), topology={"a": draw(TEXT)})
    worker.tensors.extend(draw(DESCRIPTORS))
    kind = draw(st.sampled_from(("none", "tensors", "artifact", "both", "both back")))
    tensors = p2p.WorkerMetadata(tensor_source=p2p.TensorSourceMetadata(tensors=draw(DESCRIPTORS))).SerializeToString()
    artifact = p2p.WorkerMetadata(artifact_source=p2p.ArtifactSourceMetadata(artifact_id="a")).SerializeToString()
    tail = {"none": b"", "tensors": tensors, "artifact": artifact, "both": tensors + artifact, "both back": tensors + artifact + tensors}
    request = p2p.PublishMetadataRequest(identity=p2p.SourceIdentity(model_name=draw(TEXT)), worker_id=draw(TEXT))
    body = worker.SerializeToString() + tail[kind]
    length = len(body)
    head = bytes([0x12, length & 127 | 128, length >> 7 & 127 | 128, length >> 14])  # not the shortest form of the length
    return head + body + request.SerializeToString()


def tensors_of(records: bytes) -> list[object]:
    return list(p2p.TensorSourceMetadata.FromString(records).tensors)


@given(publishes())
def test_descriptors_come_out_and_nothing_else(request_: bytes) -> None:
    whole = p2p.PublishMetadataRequest.FromString(request_)
    small, legacy, n_legacy, source, n_source = split(request_)
    assert (tensors_of(legacy), n_legacy) == (list(whole.worker.tensors), len(whole.worker.tensors))
    assert (tensors_of(source), n_source) == (list(whole.worker.tensor_source.tensors), len(whole.worker.tensor_source.tensors))
    del whole.worker.tensors[:]
    if whole.worker.WhichOneof("source_payload") == "tensor_source":
        del whole.worker.tensor_source.tensors[:]
    assert p2p.PublishMetadataRequest.FromString(small) == whole


def accepts(request: bytes) -> bool:
    try:
        p2p.PublishMetadataRequest.FromString(request)
    except DecodeError:
        return False
    return True


def split_or_why(request: bytes) -> tuple[bytes | None, str]:
    try:
        return split(request)[0], ""
    except ValueError as error:
        return None, str(error)


@given(publishes(), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3), st.booleans())
def test_damaged_bytes_are_refused_where_protobuf_refuses_them(request_: bytes, damage: list[tuple[int, int]], is_cut: bool) -> None:
    data = bytearray(request_)
    for at, byte in damage:
        data[at % len(data)] = byte
    damaged = bytes(data[: damage[0][0] % len(data)]) if is_cut else bytes(data)
    small, why = split_or_why(damaged)
    if small is None:
        assert not accepts(damaged) or "group" in why
    else:
        assert accepts(small) == accepts(damaged), "what `split` does not look at is left to protobuf, whole"


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (b"\x12\x05\x1a", "middle"),
        (b"\x12", "middle"),
        (b"\x12\x04\x1a\x02\x0a\x07", "middle"),
        (b"\x12\x04\x1a\x02\x0a\x01" + b"x", "middle"),
        (b"\x12\x05\x1a\x03\x0a\x01\xff", "UTF-8"),
        (b"\x12\x08\xa2\x01\x05\x0a\x03\x2a\x01\xc0", "UTF-8"),
        (b"\x00\x00", "number"),
        (b"\x0b\x0c", "group"),
        (b"\x0f", "wire type"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "64 bits"),
    ],
)
def test_what_is_wrong_is_said(request_: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        split(request_)


@pytest.mark.parametrize(
    ("name", "is_good"),
    [(b"\xf4\x8f\xbf\xbf", True), (b"\xf4\x90\x80\x80", False), (b"\xed\xa0\x80", False), (b"\xe0\x80\x80", False), (b"\xc1\x80", False),
     (b"\xf0\x8f\xbf\xbf", False), (b"\xe2\x82", False), ("é€😀".encode(), True)],
)  # fmt: skip
def test_utf8_is_judged_as_python_does(name: bytes, is_good: bool) -> None:
    record = b"\x0a" + bytes([len(name)]) + name
    request = b"\x12" + bytes([len(record) + 2]) + b"\x1a" + bytes([len(record)]) + record
    assert accepts(request) == is_good
    if is_good:
        assert split(request)[2] == 1
    else:
        with pytest.raises(ValueError, match="UTF-8"):
            split(request)


@given(DESCRIPTORS)
def test_retag_turns_a_tensor_source_into_legacy_tensors(tensors: list[object]) -> None:
    records = p2p.TensorSourceMetadata(tensors=tensors).SerializeToString()
    assert list(p2p.WorkerMetadata.FromString(retag(records, 3)).tensors) == tensors
    assert retag(records, 1) == records
    assert p2p.TensorSourceMetadata(tensors=tensors).SerializeToString() == records, "the given records stay as they are"


@pytest.mark.parametrize("records", [b"\x0a", b"\x0a\x02x", b"\x12\x00", b"\x0a\x00\x08\x01"])
def test_retag_refuses_damaged_records(records: bytes) -> None:
    with pytest.raises(ValueError, match=r"middle|wire type"):
        retag(records, 3)


@pytest.mark.parametrize("number", [0, 16, -1])
def test_retag_knows_tags_of_one_byte_only(number: int) -> None:
    with pytest.raises(ValueError, match="1 to 15"):
        retag(b"", number)


def test_other_threads_run_meanwhile(rng: SeededRandom) -> None:
    """The GIL is free while a large request is split: another thread's longest wait is a fraction of the time it takes."""
    worker = p2p.WorkerMetadata(tensors=[p2p.TensorDescriptor(name=f"layer.{i}.{rng.random()}", addr=i, size=i) for i in range(100)])
    request = p2p.PublishMetadataRequest(worker=p2p.WorkerMetadata(tensors=list(worker.tensors) * 8000)).SerializeToString()
    counted, done = [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            counted[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = counted[0]
        assert split(request)[2] == 800_000
        assert counted[0] > before, "no other thread ran"
    finally:
        done.set()
        thread.join()
