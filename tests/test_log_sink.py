"""sglfast.log_sink: lines leave by a thread, whole, bounded, and what is lost is counted and told."""

import fcntl
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from edge_harness import wait_until

from sglfast.log_sink import LineSink, descriptor_writer, loss_line

LOSS = loss_line("control", "text")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    yield reading, writing
    for fd in (reading, writing):
        os.close(fd)


def drain(fd: int, until: bytes) -> bytes:
    """All that comes up to and including this."""
    data = b""
    while not data.endswith(until):
        piece = os.read(fd, 65536)
        assert piece, data[-200:]
        data += piece
    return data


def test_lines_arrive_in_order(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    sink = LineSink(descriptor_writer(writing), LOSS)
    for number in range(100):
        sink.write(f"line {number}\n")
    assert drain(reading, b"line 99\n") == b"".join(b"line %d\n" % number for number in range(100))
    sink.close()
    assert (sink.lost_lines, sink.waiting_bytes) == (0, 0)


def test_a_reader_that_sleeps_costs_lines_not_time(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    sink = LineSink(descriptor_writer(writing), LOSS)
    lines = b"x" * 999 + b"\n"
    begun = time.monotonic()
    for _ in range(6000):
        sink.put(lines)
    assert time.monotonic() - begun < 5
    assert 1500 < sink.lost_lines < 6000
    assert sink.waiting_bytes <= 4 << 20
    kept = 6000 - sink.lost_lines
    seen = b""
    while seen.count(b"\n") < kept:
        seen += os.read(reading, 65536)
    assert set(seen.splitlines()) == {b"x" * 999}
    wait_until(lambda: sink.waiting_bytes == 0, "all is written")
    sink.put(b"after\n")
    told = drain(reading, b"after\n").decode()
    assert re.fullmatch(rf"\d\d:\d\d:\d\d\.\d{{3}} WARNING control: .* lines={6000 - kept}\nafter\n", told), told
    sink.put(b"told once\n")
    assert drain(reading, b"\n") == b"told once\n"
    sink.close()


def test_closing_waits_only_so_long(pipe: tuple[int, int]) -> None:
    sink = LineSink(descriptor_writer(pipe[1]), LOSS)
    sink.put(b"x" * 100_000 + b"\n")
    begun = time.monotonic()
    sink.close(0.2)
    assert time.monotonic() - begun < 2
    drain(pipe[0], b"\n")  # frees its thread


def test_nobody_reads(pipe: tuple[int, int]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    sink = LineSink(descriptor_writer(writing), LOSS)
    sink.put(b"one\ntwo\n")
    wait_until(lambda: sink.lost_lines == 2, "they are counted")
    sink.put(b"three\n")
    sink.close()
    assert sink.lost_lines == 3
    os.close(writing)


def test_lines_of_several_writers_are_not_mixed(pipe: tuple[int, int]) -> None:
    """Two descriptors of one pipe, as two shards have it; a blocking write of more than PIPE_BUF would be cut anywhere."""
    reading, writing = pipe
    writers = [LineSink(descriptor_writer(os.dup(writing)), LOSS) for _ in range(2)]
    for number, sink in enumerate(writers):
        line = b"%d" % number * 299 + b"\n"
        for _ in range(20):
            sink.put(line * 200)
    data = b""
    while data.count(b"\n") < 8000:
        data += os.read(reading, 65536)
    assert set(data.splitlines()) == {b"0" * 299, b"1" * 299}
    for sink in writers:
        sink.close()


def test_a_descriptor_that_does_not_block(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.set_blocking(writing, False)
    sink = LineSink(descriptor_writer(writing), LOSS)
    sink.put(b"y" * 99 + b"\n")
    sink.put((b"y" * 99 + b"\n") * 1000)
    time.sleep(0.05)
    seen = b""
    while len(seen) < 100_100:
        seen += os.read(reading, 65536)
    assert sink.lost_lines == 0
    assert set(seen.splitlines()) == {b"y" * 99}
    sink.close()


def test_a_line_longer_than_a_pipe_is_written_all_the_same() -> None:
    one, other = socket.socketpair()
    with one, other:
        sink = LineSink(descriptor_writer(one.fileno()), LOSS)
        text = b"short\n" + b"z" * 50_000 + b"\nend without a newline"
        sink.put(text)
        data = b""
        while len(data) < len(text):
            data += other.recv(65536)
        assert data == text
        sink.close()


def test_how_a_loss_is_told_as_json() -> None:
    row = json.loads(loss_line("shard1", "json")(7))
    assert (row["level"], row["process"], row["lines"]) == ("warning", "shard1", 7)
    assert abs(row["ts"] - time.time()) < 60


def test_a_sink_without_lines_has_no_thread() -> None:
    before = threading.active_count()
    LineSink(sys.stderr.buffer.write, LOSS).close()  # type: ignore[arg-type]
    assert threading.active_count() == before
