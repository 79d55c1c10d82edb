"""What every test has: seeds, the golden folder, and a guard against what a test leaves behind.

Chance is the same on every run, so that a change is judged by what it changes; `make soak` looks for more, with new seeds.

The guard fails a test that ends with a new child process or an open socket of its own, and the run if at its end any
process is alive that descends from it, whoever its parent is by then. Fixtures of a wider scope may keep theirs until
their own end.
"""

import contextlib
import gc
import os
import random
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# Before anything imports grpc: its own handler of fork starts a thread in the child whose epoll descriptor Popen has closed, and the
# child is aborted before it becomes the program that was wanted (grpc issue 43055).
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

pytest_plugins = ("edge_harness", "pair_scripts")
GOLDEN = Path(__file__).parent / "golden"
RUN_MARK = f"PYTEST_RUN_MARK={os.getpid()}-{time.time_ns()}-"
GRACE_S = 2.0

SEED = os.environ.get("SGLFAST_TEST_SEED", "")  # a number, `new`, or nothing: each test has its own

# Other people use this machine: no example is failed for being slow.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("new", deadline=None, print_blob=True)
hypothesis.settings.load_profile("new" if SEED == "new" else "same")


class SeededRandom(random.Random):
    """Random whose repr is its seed, so that the report of a failed test shows it."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.first_seed = seed

    def __repr__(self) -> str:
        return f"SeededRandom({self.first_seed})  # SGLFAST_TEST_SEED={self.first_seed} repeats it"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> SeededRandom:
    """The test's own seed, or what SGLFAST_TEST_SEED says."""
    if SEED == "new":
        return SeededRandom(random.SystemRandom().getrandbits(32))
    return SeededRandom(int(SEED) if SEED else zlib.crc32(request.node.nodeid.encode()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what new seeds may tell something of."""
    for item in items:
        if "rng" in getattr(item, "fixturenames", ()) or hypothesis.is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker("chance")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden vectors, see its README.md."""
    return GOLDEN


def _children() -> set[int]:
    """Pids of this process's direct children, zombies included."""
    pids: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        try:
            text = Path(f"/proc/self/task/{thread}/children").read_text()
        except OSError:  # the thread has ended
            continue
        pids.update(map(int, text.split()))
    return {pid for pid in pids if "multiprocessing.resource_tracker" not in _command(pid)}


def _command(pid: int) -> str:
    """Command line; of a zombie, its name and state."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return line or Path(f"/proc/{pid}/stat").read_text().split(") ")[0] + ") ended, but nobody waited for it"
    except OSError:
        return "gone"


def _marked() -> set[int]:
    """Pids of all living processes that carry this run's mark, also those whose parent is gone."""
    found: set[int] = set()
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        try:
            environment = Path(f"/proc/{entry}/environ").read_bytes()
        except OSError:
            continue
        if RUN_MARK.encode() in environment and "multiprocessing.resource_tracker" not in _command(int(entry)):
            found.add(int(entry))
    return found


def _sockets() -> set[str]:
    """Open sockets of this process, as `socket:[inode]`."""
    found: set[str] = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def _left(now: Callable[[], set[int]], before: set[int]) -> set[int]:
    """What `now` shows beyond `before`, once it had GRACE_S to end."""
    deadline = time.monotonic() + GRACE_S
    while (extra := now() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    return extra


@pytest.fixture(autouse=True, scope="session")
def _guard_run() -> Iterator[None]:
    name, _, value = RUN_MARK.partition("=")
    os.environ[name] = value
    yield
    left = {pid: _command(pid) for pid in sorted(_left(_marked, set()))}
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if left:
        lines = "\n".join(f"  {pid}: {command}" for pid, command in left.items())
        pytest.fail(f"the run left processes behind, now killed:\n{lines}")


@pytest.fixture(autouse=True)
def _guard_test(_guard_run: None) -> Iterator[None]:
    children, sockets = _children(), _sockets()
    yield
    problems = [f"process {pid}: {_command(pid)}" for pid in sorted(_left(_children, children))]
    if _sockets() - sockets:
        gc.collect()  # a socket in a garbage cycle is not this guard's matter: it raises ResourceWarning
        problems += sorted(_sockets() - sockets)
    if problems:
        pytest.fail("the test left behind:\n  " + "\n  ".join(problems))
