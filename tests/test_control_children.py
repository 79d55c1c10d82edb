"""One child process: what it inherits, what is heard of it, and that nothing of it is left."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence

import pytest
from control_doubles import WAIT_S, is_there, no_task_is_left

from sglfast.control.children import Child, Inheritance

# Tells its arguments and the descriptors that are open in it.
SHOW = """
import json, os, sys
fds = [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
print(json.dumps({"argv": sys.argv[1:], "fds": fds}), file=sys.stderr)
"""


TAKEN: list[bytes] = []  # what the children wrote to standard error


async def run_child(code: str, *, listener: socket.socket | None = None, kill: bool = False) -> Child:
    """Start, wait for the end, return it."""
    gone = asyncio.Event()
    child = start(["-c", code], gone, listener=listener)
    if kill:
        child.send_signal(signal.SIGKILL)
    async with asyncio.timeout(WAIT_S):
        await gone.wait()
    return child


def start(arguments: Sequence[str], gone: asyncio.Event, *, listener: socket.socket | None = None) -> Child:
    with open(os.devnull) as shm, open(os.devnull) as config, open(os.devnull) as maps:
        inheritance = Inheritance(shm.fileno(), config.fileno(), "@name", 2, lambda lines: TAKEN.append(lines), maps.fileno())
        return Child([sys.executable, *arguments], inheritance, 7, listener, lambda _: gone.set())


def open_fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def test_a_child_inherits_what_its_command_line_names_and_nothing_else() -> None:
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            child = await run_child(SHOW, listener=listener)
        told = json.loads(child.last_line)
        argv = dict(zip(told["argv"][::2], told["argv"][1::2], strict=True))
        assert argv["--parent-pid"] == str(os.getpid())
        assert (argv["--shard"], argv["--control-address"]) == ("7", "@name")
        named = {int(argv[name]) for name in ("--shm-fd", "--config-fd", "--control-fd", "--listen-fd")}
        assert len(named) == 4
        assert argv["--log-fd"] == "2"
        assert "--maps-fd" not in argv, "index alone writes there"
        assert set(told["fds"]) == {0, 1, 2} | named
        index = await run_child(SHOW)
        assert "--shard" not in index.last_line
        assert "--listen-fd" not in index.last_line
        told = json.loads(index.last_line)
        argv = dict(zip(told["argv"][::2], told["argv"][1::2], strict=True))
        named = {int(argv[name]) for name in ("--shm-fd", "--config-fd", "--control-fd", "--maps-fd")}
        assert set(told["fds"]) == {0, 1, 2} | named

    asyncio.run(run())


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("raise ValueError('no such file')", "exit code 1: ValueError: no such file"),
        ("import sys; sys.stderr.write('first\\nwithout a newline'); sys.exit(4)", "exit code 4: without a newline"),
        ("import sys; sys.stderr.write('words\\n\\n  \\n')", "exit code 0: words"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import sys; sys.stderr.buffer.write(b'\\xff' * 3 + b'x' * 200000 + b'end\\n')", "exit code 0: " + "x" * 497 + "end"),
    ],
)
def test_how_it_ended_with_its_last_words(code: str, end: str) -> None:
    assert asyncio.run(run_child(code)).describe_end() == end


def test_standard_error_comes_through_in_whole_lines() -> None:
    """Lines of several children must not be mixed within a line, nor lost at the end of a child."""
    TAKEN.clear()

    async def run() -> None:
        code = "import os, sys\nfor i in range(300): os.write(2, b'%s%d ' % (sys.argv[0].encode(), i)); os.write(2, b'x' * 50 + b'\\n')"
        await asyncio.gather(*(run_child(code.replace("sys.argv[0].encode()", repr(name))) for name in (b"a", b"b")))

    asyncio.run(run())
    assert all(lines.endswith(b"\n") for lines in TAKEN)
    lines = b"".join(TAKEN).decode().splitlines()
    assert sorted(lines) == sorted(f"{name}{i} {'x' * 50}" for name in "ab" for i in range(300))


def test_nothing_is_left_of_a_child() -> None:
    async def run() -> None:
        before = open_fds()
        async with no_task_is_left():
            child = await run_child("import time; time.sleep(60)", kill=True)
        assert child.describe_end() == "killed by SIGKILL"
        assert open_fds() == before
        assert not is_there(child.pid)
        # Its descriptors are closed, its pid may be another's: both are without effect now.
        child.tell_to_stop()
        child.send_signal(signal.SIGKILL)

    asyncio.run(run())


def test_a_program_that_cannot_be_started_leaves_nothing() -> None:
    async def run() -> None:
        before = open_fds()
        with pytest.raises(FileNotFoundError):
            Child(["/no/such/program"], Inheritance(0, 0, "", 2, TAKEN.append), -1, None, lambda _: None)
        assert open_fds() == before

    asyncio.run(run())


def test_a_child_is_out_of_reach_of_the_terminals_ctrl_c() -> None:
    async def run() -> None:
        gone = asyncio.Event()
        child = start(["-c", "import time; time.sleep(60)"], gone)
        assert os.getpgid(child.pid) != os.getpgid(0)
        child.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WAIT_S):
            await gone.wait()
        assert child.describe_end() == "killed by SIGTERM"

    asyncio.run(run())
