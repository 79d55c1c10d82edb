"""Processes of a comparison: started on one core, waited for, measured as a tree, stopped by pid.

CPU time is user plus system time from /proc/<pid>/stat of a process and all its living descendants, with the time of the
children that they have waited for: what the kernel charges for the work in sockets is in it, what it does for others is not.
"""

import os
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


class BenchError(Exception):
    """The comparison cannot run or its numbers would mean nothing; the text says why."""


def require(tool: str, package: str) -> str:
    """Path of a program. Raises BenchError that names the package."""
    found = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise BenchError(f"{tool} is not installed (apt-get install {package})")
    return found


class PinnedProcess:
    """A program and its descendants on one core; its output goes to `log`. Use as a context manager."""

    def __init__(self, name: str, command: list[str], core: int, log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )

    def __enter__(self) -> "PinnedProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, url: str) -> None:
        """Return when GET `url` answers 200. Raises BenchError with the end of the log if it never does."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise BenchError(f"{self.name} ended with code {self._process.returncode}:\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(url, timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:  # refused, reset, timed out, or an HTTP error status
                pass
            time.sleep(0.05)
        raise BenchError(f"{self.name} does not answer {url} with 200 within {START_TIMEOUT_S:.0f} s:\n{self.log_tail()}")

    def log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])

    def cpu_s(self) -> float:
        """User plus system time so far of the whole tree. Resolution: one clock tick, 10 ms on Linux."""
        if self._process.poll() is not None:
            raise BenchError(f"{self.name} died with code {self._process.returncode}:\n{self.log_tail()}")
        return sum(_cpu_ticks(pid) for pid in tree(self._process.pid)) / TICKS_PER_S

    def memory_kb(self) -> int:
        """Resident memory of the tree; pages shared inside the tree count for each process."""
        pages = 0
        for pid in tree(self._process.pid):
            try:
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except OSError:
                continue
        return pages * os.sysconf("SC_PAGE_SIZE") // 1024

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for what is left of the tree."""
        if self._process.poll() is not None:
            return
        members = tree(self._process.pid)
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for pid in members:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self._process.wait()


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the third (state) on; see proc(5). Empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def _cpu_ticks(pid: int) -> int:
    fields = _stat(pid)
    return sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime


def tree(root: int) -> list[int]:
    """`root` and its living descendants."""
    parents = {pid: int(fields[1]) for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if (fields := _stat(pid))}
    members = [root]
    for member in members:  # grows while it is walked
        members += [pid for pid, parent in parents.items() if parent == member]
    return members
