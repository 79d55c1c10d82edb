"""The index as control starts it: a process that is killed, follows the worker table, and ends when it should."""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from kv_publisher import WAIT_S, Publisher, stored, wait_until
from test_index_main import EXACT, SIZES, Control

from sglfast import shm
from sglfast._workers import FREE
from sglfast.config import ServeConfig, to_json

ROOT = Path(__file__).parent.parent


class Process:
    """`python -m sglfast.index.main` as control starts it; `log` is its standard error."""

    def __init__(self, shm_fd: int) -> None:
        config_fd = os.memfd_create("config", 0)
        os.write(config_fd, to_json(ServeConfig()))
        self.control, child = socket.socketpair()
        fds = (shm_fd, config_fd, child.fileno())
        flags = [f"--{name}-fd={fd}" for name, fd in zip(("shm", "config", "control"), fds, strict=True)]
        argv = [sys.executable, "-W", "error", "-m", "sglfast.index.main", *flags, f"--parent-pid={os.getpid()}"]
        self.popen = subprocess.Popen(argv, cwd=ROOT, pass_fds=fds, stderr=subprocess.PIPE)
        child.close()
        os.close(config_fd)

    def end(self, timeout_s: float = WAIT_S) -> tuple[int, str]:
        """Wait for its end; exit code and log."""
        _, log = self.popen.communicate(timeout=timeout_s)
        self.control.close()
        return self.popen.returncode, log.decode()


@contextlib.contextmanager
def started(shm_fd: int) -> Iterator[Process]:
    process = Process(shm_fd)
    try:
        yield process
    finally:
        if process.popen.returncode is None:
            process.popen.kill()
            process.end()


@pytest.fixture
def shared() -> Iterator[tuple[int, Control, Publisher]]:
    fd, segment = shm.create(**SIZES)
    fcntl.fcntl(fd, fcntl.F_SETFD, 0)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    engine = Publisher(context, has_replay=True)
    yield fd, Control(segment), engine
    engine.close()
    context.term()
    os.close(fd)


def test_killed_index_comes_back_exact(shared: tuple[int, Control, Publisher]) -> None:
    fd, control, engine = shared
    engine.publish(stored(1, 4))
    control.put(0, engine, rank_base=0)

    def is_exact() -> bool:
        pid, _, _, _, is_ready = control.segment.process_info(0)
        return is_ready and pid == process.popen.pid and control.state(0) == EXACT and control.overlap(0, 1) == 4

    with started(fd) as process:
        wait_until(is_exact, engine)
        assert control.reader.stats()["generation"] == 1
        before_ms = control.segment.process_info(0)[2]
        wait_until(lambda: control.segment.process_info(0)[2] > before_ms, engine, what="the heartbeat")
        process.popen.kill()
        _, log = process.end()
    assert "goes on" not in log
    assert control.overlap(0, 1) == 4  # shards go on with the last tree
    with started(fd) as process:
        wait_until(is_exact, engine)
        assert control.reader.stats()["generation"] == 1  # the tree was not emptied
        assert engine.requests == [0, 0]  # batch 0 was the last one: it is asked for again, and compared
        assert control.reader.stats()["live_blocks"] == 4
        process.popen.send_signal(signal.SIGTERM)
        code, log = process.end()
    assert code == 0
    assert "goes on with the 4 blocks of the process before this one" in log
    assert "Traceback" not in log
    assert not control.segment.process_info(0)[4]


def test_follows_changes_of_the_table(shared: tuple[int, Control, Publisher]) -> None:
    fd, control, engine = shared
    engine.publish(stored(1, 4))
    with started(fd) as process:
        wait_until(lambda: control.segment.process_info(0)[4], engine)
        control.put(3, engine, rank_base=5)
        wait_until(lambda: control.state(5) == EXACT and control.overlap(5, 1) == 4, engine)
        control.table.set_state(3, FREE)
        wait_until(lambda: control.overlap(5, 1) == 0, engine)
        assert process.popen.poll() is None


def test_ends_with_control(shared: tuple[int, Control, Publisher]) -> None:
    fd, control, engine = shared
    control.put(0, engine, rank_base=0)
    with started(fd) as process:
        wait_until(lambda: control.segment.process_info(0)[4], engine)
        process.popen.send_signal(signal.SIGINT)  # a terminal sends it to all; control decides
        time.sleep(0.2)
        assert process.popen.poll() is None
        process.control.close()
        code, log = process.end()
    assert code == 0
    assert "control is gone" in log
