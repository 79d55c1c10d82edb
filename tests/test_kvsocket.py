"""Runs of live events out of real ZMQ sockets: what is of a run, what ends one, and that nothing is lost between."""

import gc
import re
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import zmq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglfast._kvsocket import RUN_MESSAGES, LiveSocket
from sglfast.wire.frames import live_frames

WAIT_MS = 20_000


class Wire:
    """A publisher and a SUB that has subscribed, in one process: what is sent is there at once."""

    def __init__(self, topic: bytes = b"", endpoint: str = "inproc://live") -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.live = self.context.socket(zmq.XPUB)
        self.source = self.context.socket(zmq.SUB)
        for made in (self.live, self.source):
            made.setsockopt(zmq.LINGER, 0)
            made.set_hwm(0)
        self.live.bind(endpoint)
        self.source.setsockopt(zmq.SUBSCRIBE, topic)
        self.source.connect(self.live.getsockopt_string(zmq.LAST_ENDPOINT))
        assert self.live.poll(WAIT_MS)
        self.live.recv()

    def send(self, *messages: list[bytes]) -> None:
        for frames in messages:
            self.live.send_multipart(frames)

    def close(self) -> None:
        self.source.close()
        self.live.close()
        self.context.term()


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


def batch(seq: int, topic: bytes = b"") -> list[bytes]:
    return live_frames(topic, seq, b"payload %d" % seq)


def run_of(payloads: bytes, ends: bytes) -> list[bytes]:
    starts = [0, *struct.unpack(f"{len(ends) // 8}Q", ends)]
    assert starts[-1] == len(payloads)
    return [payloads[starts[i] : starts[i + 1]] for i in range(len(starts) - 1)]


def test_nothing_is_there(wire: Wire) -> None:
    assert LiveSocket(wire.source).read(0) == (b"", b"", None, 0, True)


def test_a_run_of_what_is_there(wire: Wire) -> None:
    reader = LiveSocket(wire.source)
    wire.send(*map(batch, range(7, 17)))
    payloads, ends, frames, n_messages, is_empty = reader.read(7)
    assert run_of(payloads, ends) == [b"payload %d" % seq for seq in range(7, 17)]
    assert (frames, n_messages, is_empty) == (None, 10, True)
    wire.send(batch(17))
    assert reader.read(17)[0] == b"payload 17"


def test_payloads_of_any_size(wire: Wire) -> None:
    """In the message itself, on the heap, and none."""
    sizes = [0, 1, 29, 30, 33, 34, 100, 0, 70_000, 0]
    wire.send(*(live_frames(b"", seq, bytes([seq]) * size) for seq, size in enumerate(sizes)))
    payloads, ends, *_ = LiveSocket(wire.source).read(0)
    assert run_of(payloads, ends) == [bytes([seq]) * size for seq, size in enumerate(sizes)]


def test_limits_of_a_run(wire: Wire) -> None:
    reader = LiveSocket(wire.source)
    wire.send(*(live_frames(b"", seq, b"12345") for seq in range(1000)))
    assert reader.read(0, 0)[3:] == (0, False)
    assert reader.read(0, 3)[3:] == (3, False)
    payloads, _, frames, n_messages, is_empty = reader.read(3, 100, 12)
    assert (len(payloads), frames, n_messages, is_empty) == (15, None, 3, False)  # the third one brings it to 12 bytes
    assert reader.read(6, 10_000)[3:] == (RUN_MESSAGES, False)
    seq = 6 + RUN_MESSAGES
    while not (n_messages := reader.read(seq))[4]:
        seq += n_messages[3]
    assert seq + n_messages[3] == 1000


@pytest.mark.parametrize("other", [batch(0), batch(1), batch(3), batch(2**63 - 1), live_frames(b"", 2, b"")[:2], [b"alone"], [b""]])
def test_what_is_not_next_ends_the_run(wire: Wire, other: list[bytes]) -> None:
    reader = LiveSocket(wire.source)
    wire.send(batch(0), batch(1), other, batch(2), batch(3))
    payloads, ends, frames, n_messages, is_empty = reader.read(0)
    assert run_of(payloads, ends) == [b"payload 0", b"payload 1"]
    assert (frames, n_messages, is_empty) == (other, 3, False)
    payloads, ends, frames, n_messages, is_empty = reader.read(2)
    assert run_of(payloads, ends) == [b"payload 2", b"payload 3"]
    assert (frames, n_messages, is_empty) == (None, 2, True)


@pytest.mark.parametrize("n_frames", [1, 2, 4, 5, 300])
@pytest.mark.parametrize("at", [0, 2])
def test_another_number_of_frames(wire: Wire, n_frames: int, at: int) -> None:
    reader = LiveSocket(wire.source)
    other = [*batch(at), *(b"extra %d" % number for number in range(n_frames))][:n_frames]
    wire.send(*map(batch, range(at)), other, batch(at))
    assert reader.read(0)[2:4] == (other, at + 1)
    assert reader.read(at)[0] == b"payload %d" % at


@pytest.mark.parametrize("sequence", [b"", bytes(7), bytes(9), b"\0" * 16])
def test_a_sequence_that_has_not_8_bytes(wire: Wire, sequence: bytes) -> None:
    wire.send([b"", sequence, b"x"])
    assert LiveSocket(wire.source).read(0)[:4] == (b"", b"", [b"", sequence, b"x"], 1)


def test_numbers_at_the_end_of_their_range(wire: Wire) -> None:
    """A number of 2**63 or more is negative to an engine, and no next one."""
    reader = LiveSocket(wire.source)
    wire.send(*map(batch, [2**63 - 2, 2**63 - 1, 2**63, 2**64 - 1]))
    assert reader.read(2**63 - 2)[1:4] == (struct.pack("2Q", 22 + 5, 54), batch(2**63), 3)
    assert reader.read(2**64 - 1)[2] == batch(2**64 - 1)
    for seq in (-1, 2**64):
        with pytest.raises(OverflowError):
            reader.read(seq)


def test_without_a_number_one_message_at_a_time(wire: Wire) -> None:
    reader = LiveSocket(wire.source)
    wire.send(batch(0), batch(1))
    assert reader.read() == (b"", b"", batch(0), 1, False)
    assert reader.read(None) == (b"", b"", batch(1), 1, False)
    assert reader.read() == (b"", b"", None, 0, True)


def test_other_topics_are_passed_over() -> None:
    wire = Wire(b"kv")
    try:
        reader = LiveSocket(wire.source, b"kv@a")
        wire.send(batch(0, b"kv@a"), batch(0, b"kv@b"), [b"kv"], [b"kv@abc", *[b"x"] * 9], batch(1, b"kv@a"), batch(1, b"kv@b"))
        assert run_of(*reader.read(0)[:2]) == [b"payload 0", b"payload 1"]
        wire.send(*[batch(7, b"kv@b")] * 10, batch(2, b"kv@a"), [b"kv@a", b"x"])
        assert reader.read(2, 4) == (b"", b"", None, 4, False)  # those passed over count
        payloads, _, frames, n_messages, is_empty = reader.read(2)
        assert (payloads, frames, n_messages, is_empty) == (b"payload 2", [b"kv@a", b"x"], 8, False)
        assert reader.read(3) == (b"", b"", None, 0, True)
        everyone = LiveSocket(wire.source)
        wire.send(batch(0, b"kv@a"), batch(1, b"kvz"))
        assert run_of(*everyone.read(0)[:2]) == [b"payload 0", b"payload 1"]
    finally:
        wire.close()


def test_an_empty_topic_can_be_the_wanted_one(wire: Wire) -> None:
    wire.send(batch(0, b"kv"), batch(0))
    assert LiveSocket(wire.source, b"").read(0)[0::3] == (b"payload 0", 2)


sequences = st.integers(0, 3) | st.sampled_from([2**63, 2**64 - 1])
odd = st.lists(st.binary(max_size=9), min_size=1, max_size=6)
steps = st.lists(
    st.just("next")
    | st.tuples(st.sampled_from([b"kv", b"kv2"]), sequences.map(lambda seq: seq.to_bytes(8, "big")), st.binary(max_size=60)).map(list)
    | odd.map(lambda frames: [b"kv" + frames[0], *frames[1:]]),
    max_size=40,
)


@settings(max_examples=150, deadline=None, database=None)
@given(steps, st.lists(st.integers(0, 6), min_size=1, max_size=5), st.booleans())
@example(["next"] * 5, [0, 1], False)
def test_frames_in_are_frames_out(messages: list[list[bytes] | str], limits: list[int], is_exact: bool) -> None:
    """Whatever is sent comes out in its order: as part of a run what continues it, and as it is what does not."""
    wire = Wire(b"kv")
    try:
        seq, sent = 0, []
        for number, step in enumerate(messages):
            frames = live_frames(b"kv", seq, b"batch %d" % number) if isinstance(step, str) else step
            seq += isinstance(step, str)
            sent.append(frames)
        wire.send(*sent)
        expected = [frames for frames in sent if not is_exact or frames[0] == b"kv"]
        reader = LiveSocket(wire.source, b"kv" if is_exact else None)
        seq, at, n_messages = 0, 0, 0
        for turn in range(10 * len(sent) + 10):
            limit = limits[turn % len(limits)]
            payloads, ends, frames, n_read, is_empty = reader.read(seq, limit)
            n_messages += n_read
            assert n_read <= limit
            for payload in run_of(payloads, ends):
                topic, *rest = expected[at]
                assert rest == [seq.to_bytes(8, "big"), payload]
                assert topic.startswith(b"kv")
                seq, at = seq + 1, at + 1
            if frames is not None:
                assert frames == expected[at]
                assert len(frames) != 3 or frames[1] != seq.to_bytes(8, "big")
                at += 1
            assert not (is_empty and at < len(expected))
            if n_messages == len(sent):
                break
            if not any(limits):
                return
        assert at == len(expected)
    finally:
        wire.close()


def test_over_tcp_while_the_publisher_sends() -> None:
    wire = Wire(endpoint="tcp://127.0.0.1:*")
    sender = threading.Thread(target=lambda: wire.send(*map(batch, range(20_000))))
    try:
        reader, seq = LiveSocket(wire.source), 0
        sender.start()
        while seq < 20_000:
            assert wire.source.poll(WAIT_MS), f"nothing came behind {seq}"
            payloads, ends, frames, n_messages, _ = reader.read(seq)
            assert frames is None
            assert run_of(payloads, ends) == [b"payload %d" % number for number in range(seq, seq + n_messages)]
            seq += n_messages
    finally:
        sender.join()
        wire.close()


def test_pyzmq_reads_on_where_a_run_has_ended(wire: Wire) -> None:
    reader = LiveSocket(wire.source)
    wire.send(batch(0), batch(1), batch(2))
    assert reader.read(0, 1)[0] == b"payload 0"
    assert wire.source.recv_multipart(zmq.NOBLOCK) == batch(1)
    assert reader.read(2)[0] == b"payload 2"


def test_a_closed_socket(wire: Wire) -> None:
    reader = LiveSocket(wire.source)
    wire.source.close()
    with pytest.raises(zmq.ZMQError) as raised:
        reader.read(0)
    assert raised.value.errno == zmq.ENOTSOCK


def test_a_context_that_ends() -> None:
    wire = Wire()
    reader = LiveSocket(wire.source)
    wire.send(batch(0))

    def read_on() -> None:
        end_s = time.monotonic() + 20
        while time.monotonic() < end_s:
            reader.read(0)

    ending = threading.Thread(target=wire.context.term)
    ending.start()
    try:
        with pytest.raises(zmq.ContextTerminated):
            read_on()
    finally:
        wire.source.close()
        wire.live.close()
        ending.join()


def test_a_reader_keeps_its_socket(wire: Wire) -> None:
    wire.send(batch(0))
    reader, is_there = LiveSocket(wire.source), weakref.ref(wire.source)
    wire.source = wire.live
    gc.collect()
    assert is_there() is not None
    assert reader.read(0)[0] == b"payload 0"
    source = is_there()
    assert source is not None
    source.close()


def test_what_is_no_socket() -> None:
    with pytest.raises(AttributeError):
        LiveSocket(object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        LiveSocket(zmq.Socket, "topic")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("sys.modules['zmq.backend.cython'] = types.ModuleType('cython')", "pyzmq's compiled backend, and this pyzmq .* has none"),
        ("zmq.backend.cython._zmq.__file__ = _ctypes.__file__", "libzmq's zmq_msg_init, which the libzmq of pyzmq .* does not show"),
        ("zmq.backend.cython._zmq.__file__ = '/no/such/file.so'", "/no/such/file.so cannot be looked into"),
    ],
)
def test_a_pyzmq_that_hides_its_libzmq(change: str, sentence: str) -> None:
    """An error that says so, and no slower way in silence."""
    program = f"import _ctypes, sys, types, zmq, zmq.backend.cython._zmq\n{change}\nimport sglfast._kvsocket"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert re.search(sentence, done.stderr), done.stderr
