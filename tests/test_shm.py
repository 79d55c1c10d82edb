"""sglfast.shm: the sealed memfd, attach by descriptor, worker records."""

import errno
import fcntl
import gc
import mmap
import os
import string

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_memory import shared_segment

from sglfast import shm
from sglfast._workers import BLOB_BYTES, DRAINING, FREE, JOINING, READY, WorkerTable
from sglfast.errors import ShmLayoutError
from sglfast.shm import WorkerRecord, WorkerView, put_worker, read_workers

# Position = word R_REASON of the rank table: rows may be added at the end, never moved.
FROZEN_RANK_REASONS = (
    "",
    "publishes no KV events",
    "no event has arrived yet",
    "replaying missed events",
    "history before the subscription is unknown",
    "events were lost and could not be replayed",
    "block hashes differ from the SHA-256 chain of the event's tokens",
    "the event stream is disconnected",
)


def test_rank_reasons_keep_their_positions() -> None:
    assert shm.RANK_REASONS[: len(FROZEN_RANK_REASONS)] == FROZEN_RANK_REASONS
    assert len(set(shm.RANK_REASONS)) == len(shm.RANK_REASONS)


def test_rank_reasons_have_the_names_of_their_positions() -> None:
    named = {
        shm.REASON_NONE: "",
        shm.REASON_NO_EVENTS: "publishes no KV events",
        shm.REASON_UNKNOWN_HISTORY: "history before the subscription",
        shm.REASON_LOST: "events were lost and could not be replayed",
        shm.REASON_DISCONNECTED: "disconnected",
        shm.REASON_INDEX_RESTARTS: "the index is being started again",
        shm.REASON_NOT_LISTENING: "--kv-listen",
        shm.REASON_PAIRS: "keyed by pairs of tokens (EAGLE), the worker says single",
        shm.REASON_NOT_KEPT: "replay buffer does not reach back",
        shm.REASON_NO_DESCRIPTORS: "ulimit -n",
    }
    assert all(text in shm.RANK_REASONS[position] for position, text in named.items())
    assert len(shm.RANK_REASONS) == len([name for name in vars(shm) if name.startswith("REASON_")])


# ---- create and attach ----


def test_the_memfd_is_sealed_and_private() -> None:
    with shared_segment() as (fd, segment):
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        assert seals == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        for size_bytes in (0, segment.total_bytes - 4096, segment.total_bytes + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size_bytes)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert not os.get_inheritable(fd), "a child gets it by intent only"
        assert os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:sglfast"), "it has no name in a file system"


def test_both_mappings_are_the_same_memory() -> None:
    with shared_segment() as (fd, segment):
        other = shm.attach(fd)
        segment.state = 1
        assert other.state == 1
        other.state = 2
        assert segment.state == 2


@pytest.mark.parametrize("content", [b"", b"x", b"SGLFAST1", b"\0" * 4096, b"SGLFAST2" * 2048], ids=len)
def test_attach_refuses_other_files(content: bytes) -> None:
    fd = os.memfd_create("other")
    try:
        os.write(fd, content)
        with pytest.raises(ShmLayoutError):
            shm.attach(fd)
    finally:
        os.close(fd)


def test_attach_refuses_what_cannot_be_mapped() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(ShmLayoutError, match=rf"^file descriptor {reading} cannot be mapped as a segment: "):
            shm.attach(reading)
    finally:
        os.close(reading)
        os.close(writing)
    with pytest.raises(ShmLayoutError, match=r"cannot be mapped as a segment: .*Bad file descriptor"):
        shm.attach(reading)


def descriptors() -> int:
    gc.collect()  # those of other tests' garbage do not count
    return len(os.listdir("/proc/self/fd"))


def test_no_descriptor_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    with shared_segment() as (fd, segment):
        del segment
        shm.attach(fd)
        garbage = os.memfd_create("garbage")
        os.write(garbage, bytes(8192))
        with pytest.raises(ShmLayoutError):
            shm.attach(garbage)
        os.close(garbage)
    assert descriptors() == before

    def full(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", full)
        with pytest.raises(OSError, match="no memory"):
            shm.create_maps(max_ranks=64, capacity_blocks=1)
    assert descriptors() == before

    for what in ("ftruncate", "mmap"):
        with monkeypatch.context() as patch:
            patch.setattr(os if what == "ftruncate" else mmap, what, full)
            with pytest.raises(OSError, match="no memory"):
                shm.create(max_workers=1, max_ranks=64, max_shards=1, capacity_blocks=1)
        assert descriptors() == before


def test_create_refuses_impossible_sizes_before_it_makes_anything() -> None:
    before = descriptors()
    with pytest.raises(ValueError, match="max_ranks must be a multiple of 64 from 64 to 1024, not 100"):
        shm.create(max_workers=1, max_ranks=100, max_shards=1, capacity_blocks=1)
    assert descriptors() == before


# ---- worker records ----

names = st.text(string.printable + "äß✓", min_size=1, max_size=40)
ports = st.integers(0, 65535)
records = st.builds(
    WorkerRecord,
    url=names,
    model=st.none() | names,
    version=st.none() | names,
    disaggregation_mode=st.none() | st.sampled_from(["prefill", "decode"]),
    startup_time=st.none() | st.floats(allow_nan=False),
    kv_host=st.none() | names,
    kv_port_base=ports,
    kv_topic=st.just("") | names,
    kv_replay_port_base=st.none() | ports,
)
views = st.builds(
    WorkerView,
    worker_idx=st.integers(0, 3),
    generation=st.just(0),
    state=st.integers(JOINING, DRAINING),
    rank_base=st.integers(0, 32),
    dp_size=st.integers(1, 32),
    block_size=st.integers(0, 1 << 20),
    bigram=st.booleans(),
    record=records,
)


@given(st.lists(views, max_size=8))
def test_what_control_puts_is_what_others_read(puts: list[WorkerView]) -> None:
    with shared_segment(max_workers=4) as (fd, segment):
        control, other = WorkerTable(segment), WorkerTable(shm.attach(fd))
        expected: dict[int, WorkerView] = {}
        for view in puts:
            put_worker(control, view, is_new=True)
            known = expected.get(view.worker_idx)
            expected[view.worker_idx] = msgspec.structs.replace(view, generation=known.generation + 1 if known else 1)
        assert read_workers(other) == [expected[idx] for idx in sorted(expected)]
        assert other.version() == len(puts)


def worker(url: str, idx: int = 0) -> WorkerView:
    return WorkerView(
        worker_idx=idx, generation=0, state=READY, rank_base=0, dp_size=1, block_size=64, bigram=False, record=WorkerRecord(url=url)
    )


def test_free_slots_are_left_out() -> None:
    with shared_segment(max_workers=4) as (_, segment):
        table = WorkerTable(segment)
        assert read_workers(table) == []
        for idx in (3, 1):
            put_worker(table, worker(f"http://w{idx}", idx), is_new=True)
        assert [view.record.url for view in read_workers(table)] == ["http://w1", "http://w3"]
        table.set_state(1, FREE)
        assert [view.worker_idx for view in read_workers(table)] == [3]


def test_a_record_larger_than_its_slot_is_refused() -> None:
    with shared_segment() as (_, segment):
        table = WorkerTable(segment)
        put_worker(table, worker("http://before"), is_new=True)
        version = table.version()
        with pytest.raises(ValueError, match=rf"^worker record of \d+ bytes is larger than {BLOB_BYTES} bytes$"):
            put_worker(table, worker("http://" + "x" * BLOB_BYTES), is_new=True)
        assert read_workers(table)[0].record.url == "http://before"
        assert table.version() == version


def test_a_record_has_no_room_for_the_workers_secrets() -> None:
    """A new field is a decision: `/server_info` also holds api_key, admin_api_key and a key file's password.

    The api_key here is ours: what the router shows the worker.
    """
    assert {field.name for field in msgspec.structs.fields(WorkerRecord)} == {
        "url", "model", "api_key", "version", "disaggregation_mode", "startup_time",
        "kv_host", "kv_port_base", "kv_topic", "kv_replay_port_base", "kv_connects_out", "adapters", "adapter_models", "takes_rid",
        "role", "bootstrap_port", "tools", "template_kwargs", "engine", "rank_ways", "ranks_asked",
    }  # fmt: skip


def test_the_key_is_in_no_text_of_a_record() -> None:
    record = WorkerRecord(url="http://w", api_key="sk-very-secret", kv_topic="t")
    view = msgspec.structs.replace(worker("http://w"), record=record)
    for shown in (repr(record), str(view), f"{view}"):
        assert "sk-very-secret" not in shown
        assert "http://w" in shown
        assert "has_key=True" in shown
