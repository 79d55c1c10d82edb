"""sglfast.boot: what a child process of control gets, and that it never outlives control. Real processes throughout."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from descriptors import is_readable
from shared_memory import HEADER, Words, forked, shared_segment

from sglfast.boot import SETTINGS, STOP, die_with_parent, hear
from sglfast.config import ServeConfig, check, to_json

WAIT_S = 20.0
CONFIG = check(ServeConfig(worker_urls=("http://10.0.0.5:30000",), shards=3, port=0))

# A child as index and shards are: boots, tells what it got, then sleeps. Its report goes to the descriptor of $REPORT_FD.
CHILD = """
import json, os, signal, sys, time
from sglfast.boot import SETTINGS, STOP, hear, boot_child
boot = boot_child(sys.argv[1:])
boot.segment.process_start(boot.process_slot, os.getpid(), 1)
report = {
    "pid": os.getpid(), "config": json.loads(__import__("sglfast.config").config.to_json(boot.config)), "shard": boot.shard,
    "slot": boot.process_slot, "address": boot.control_address, "ranks": boot.segment.max_ranks,
    "blocking": [boot.control.getblocking(), boot.listener.getblocking() if boot.listener else None],
    "port": boot.listener.getsockname()[1] if boot.listener else None,
    "sigint": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
    "open": [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")],
}
os.write(int(os.environ["REPORT_FD"]), json.dumps(report).encode() + b"\\n")
while True:
    try:
        if boot.control.recv(10) == b"":
            os._exit(33)
    except BlockingIOError:
        pass
    time.sleep(0.005)
"""
# A parent that stands for control: starts the child with the flags of argv, then sleeps.
PARENT = f"""
import os, subprocess, sys, time
fds = [int(fd) for fd in sys.argv[1].split(",")]
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}, *sys.argv[2:], "--parent-pid", str(os.getpid())], pass_fds=fds)
time.sleep(600)
"""


@contextlib.contextmanager
def memfd(content: bytes) -> Iterator[int]:
    fd = os.memfd_create("config")
    try:
        os.write(fd, content)
        yield fd
    finally:
        os.close(fd)


class Stage:
    """All that a child needs, and where its report arrives."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.shm_fd, self.segment = stack.enter_context(shared_segment())
        self.config_fd = stack.enter_context(memfd(to_json(CONFIG)))
        self.control, self.theirs = socket.socketpair()
        stack.enter_context(self.control)
        stack.enter_context(self.theirs)
        self.report_fd, self.report_writer = os.pipe()
        stack.callback(os.close, self.report_fd)
        self.listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.environment = {**os.environ, "REPORT_FD": str(self.report_writer)}
        stack.callback(self.close_writer)

    def flags(self, *more: str) -> list[str]:
        fds = {"--shm-fd": self.shm_fd, "--config-fd": self.config_fd, "--control-fd": self.theirs.fileno()}
        return [*(part for flag, fd in fds.items() for part in (flag, str(fd))), *more]

    @property
    def fds(self) -> list[int]:
        return [self.shm_fd, self.config_fd, self.theirs.fileno(), self.listener.fileno(), self.report_writer]

    def started(self) -> None:
        """Close our copies of what only the children should hold now."""
        self.close_writer()
        self.theirs.close()

    def close_writer(self) -> None:
        if self.report_writer >= 0:
            os.close(self.report_writer)
        self.report_writer = -1

    def report(self) -> bytes:
        """The next bytes of the report pipe; empty when no process holds its other end any more."""
        assert is_readable(self.report_fd, WAIT_S), "the child said nothing"
        return os.read(self.report_fd, 1 << 16)


@pytest.fixture
def stage() -> Iterator[Stage]:
    with contextlib.ExitStack() as stack:
        yield Stage(stack)


@contextlib.contextmanager
def process(stage: Stage, code: str, *args: str) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", code, *args],
        pass_fds=stage.fds,
        env=stage.environment,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    ) as started:
        stage.started()
        try:
            yield started
        finally:
            started.kill()


def child(stage: Stage, *more: str, parent_pid: int | None = None) -> "contextlib.AbstractContextManager[subprocess.Popen[str]]":
    return process(stage, CHILD, *stage.flags(*more), "--parent-pid", str(parent_pid or os.getpid()))


def test_a_shard_gets_all_that_control_passed(stage: Stage) -> None:
    listen_fd, expected_port = stage.listener.fileno(), stage.listener.getsockname()[1]
    flags = ("--shard", "1", "--listen-fd", str(listen_fd), "--control-address", "@control-7")
    theirs = stage.theirs.fileno()
    with child(stage, *flags) as started:
        report: dict[str, Any] = json.loads(stage.report())
        assert report.pop("pid") == started.pid
        assert {stage.shm_fd, stage.config_fd} & set(report["open"]) == set(), "used descriptors are closed"
        assert {theirs, listen_fd} <= set(report.pop("open"))
        assert report == {
            "config": json.loads(to_json(CONFIG)),
            "shard": 1,
            "slot": 2,
            "address": "@control-7",
            "ranks": 64,
            "blocking": [False, False],
            "port": expected_port,
            "sigint": True,
        }
        assert stage.segment.process_info(2)[0] == started.pid, "it is the same memory"


def test_index_has_slot_0_and_no_listener(stage: Stage) -> None:
    with child(stage) as started:
        report = json.loads(stage.report())
        assert (report["shard"], report["slot"], report["port"], report["address"]) == (-1, 0, None, "")
        assert stage.segment.process_info(0)[0] == started.pid


def test_the_terminal_s_sigint_is_control_s_business(stage: Stage) -> None:
    with child(stage) as started:
        stage.report()
        started.send_signal(signal.SIGINT)
        time.sleep(0.05)
        assert started.poll() is None
        stage.control.close()
        assert started.wait(WAIT_S) == 33, "the control socket's end tells that control is gone"


def test_the_child_dies_when_control_is_killed(stage: Stage) -> None:
    """kill -9 of the parent: the kernel kills the child at once, whatever it is doing."""
    with process(stage, PARENT, ",".join(map(str, stage.fds)), *stage.flags()) as parent:
        pid = json.loads(stage.report())["pid"]
        assert pid != parent.pid
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
        parent.wait(WAIT_S)
        assert stage.report() == b"", "only the child held the pipe"


def test_a_child_whose_control_died_before_it_asked_leaves_at_once(stage: Stage) -> None:
    with child(stage, parent_pid=os.getppid()) as started:
        assert started.wait(WAIT_S) == 1
        assert started.stderr is not None
        assert started.stderr.read() == "control is gone\n"
        assert stage.report() == b""
        assert stage.segment.process_info(0)[0] == 0, "it touched nothing"


def test_another_layout_is_refused(stage: Stage) -> None:
    Words(stage.shm_fd).memory[HEADER["layout_major"]] = 99
    with child(stage) as started:
        assert started.wait(WAIT_S) == 1
        assert started.stderr is not None
        message = started.stderr.read().splitlines()[-1]
        assert message.startswith("sglfast.errors.ShmLayoutError: the segment has layout version 99, this build reads version ")
        assert stage.report() == b""


@pytest.mark.parametrize("missing", ["--shm-fd", "--config-fd", "--control-fd", "--parent-pid"])
def test_a_start_by_hand_is_refused(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    from sglfast.boot import boot_child

    flags = {"--shm-fd": "3", "--config-fd": "4", "--control-fd": "5", "--parent-pid": "6"}
    del flags[missing]
    with pytest.raises(SystemExit) as caught:
        boot_child([part for pair in flags.items() for part in pair])
    assert caught.value.code == 2
    assert missing in capsys.readouterr().err


def test_die_with_parent_refuses_another_parent() -> None:
    def work() -> str:
        try:
            die_with_parent(os.getpid())  # nobody is their own parent
        except SystemExit as error:
            return str(error)
        return "stayed"

    with forked(work) as started:
        assert started.result() == "control is gone"


def test_what_control_says() -> None:
    def settings_fd(config: ServeConfig) -> int:
        fd = os.memfd_create("settings")
        os.write(fd, to_json(config))
        return fd

    mine, its = socket.socketpair()
    with mine, its:
        its.setblocking(False)
        with pytest.raises(BlockingIOError):
            hear(its)
        configs = [CONFIG, check(ServeConfig(port=7, api_key="key"))]
        for config in configs:
            fd = settings_fd(config)
            socket.send_fds(mine, [SETTINGS], [fd])
            os.close(fd)
        mine.send(STOP)
        before = len(os.listdir("/proc/self/fd"))
        assert [hear(its), hear(its)] == configs, "one message at a time, in order"
        assert len(os.listdir("/proc/self/fd")) == before, "the descriptors are closed"
        assert hear(its) == "told to stop"
        mine.close()
        assert hear(its) == "control is gone"
