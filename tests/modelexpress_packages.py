"""The real `modelexpress` packages from PyPI, fetched once into build/, each driven in a process of its own (modelexpress_remote.py)."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from descriptors import is_readable

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "modelexpress"
FETCH_TIMEOUT_S = 90
ANSWER_TIMEOUT_S = 60.0
# With the protobuf that the package itself asks for; grpc is that of our own environment.
REQUIREMENTS = {"0.7.0": "protobuf>=5.27.2,<7", "0.3.0": "protobuf>=5.27.0,<6"}
# Status numbers of the wire.
UNKNOWN, INITIALIZING, READY, STALE = range(4)


def package_folder(version: str) -> Path:
    """Folder with the package and its protobuf; skips the test when it is not there and cannot be fetched."""
    problem = _problem(version)
    if problem:
        pytest.skip(f"modelexpress {version} is not in {FOLDER / version}, {problem}")
    return FOLDER / version


@functools.cache  # without a network one test waits for pip, not all
def _problem(version: str) -> str:
    """Fetch the package unless it is there; why that did not work, or nothing."""
    folder = FOLDER / version
    if folder.is_dir():
        return ""
    FOLDER.mkdir(parents=True, exist_ok=True)
    draft = tempfile.mkdtemp(dir=FOLDER)
    try:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*command, "--retries", "1", "--target", draft, f"modelexpress=={version}", REQUIREMENTS[version]],
            capture_output=True,
            text=True,
            timeout=FETCH_TIMEOUT_S,
        )
        if done.returncode != 0:
            return f"and PyPI does not give it: {(done.stderr.strip().splitlines() or ['pip says nothing'])[-1]}"
        os.rename(draft, folder)
    except subprocess.TimeoutExpired:
        return f"and PyPI did not give it within {FETCH_TIMEOUT_S} s"
    except OSError:
        if not folder.is_dir():  # another run was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return ""


class RealClient:
    """A process with the package's MxClient; methods are functions of modelexpress_remote.py."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def __getattr__(self, name: str) -> Any:
        def call(**arguments: Any) -> Any:
            answer = self.ask(name, arguments)
            assert "error" not in answer, answer["error"]
            return answer["value"]

        return call

    def error_of(self, name: str, **arguments: Any) -> str:
        """Call what must fail; `Type: text` of the exception."""
        answer = self.ask(name, arguments)
        assert "error" in answer, answer
        text: str = answer["error"]
        return text

    def ask(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Call; {"value": what it returned} or {"error": `Type: text` of its exception}."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, arguments]) + "\n")
        self._process.stdin.flush()
        assert is_readable(self._process.stdout.fileno(), ANSWER_TIMEOUT_S), f"{name}: no answer within {ANSWER_TIMEOUT_S:.0f} s"
        line = self._process.stdout.readline()
        assert line, "the client's process ended, see its standard error"
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def real_client(version: str, address: str) -> Iterator[RealClient]:
    """Start a real client of the service at host:port; its end is the end of its input."""
    script = str(Path(__file__).with_name("modelexpress_remote.py"))
    environment = os.environ | {"MX_HEARTBEAT_INTERVAL_SECS": "1"}
    process = subprocess.Popen(
        [sys.executable, script, str(package_folder(version)), address],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT / "tests",
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield RealClient(process)
        process.stdin.close()
        assert process.wait(timeout=ANSWER_TIMEOUT_S) == 0
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def until(condition: Any, what: str, timeout_s: float = 30.0) -> None:
    """Poll until a condition holds; fails with `what` when it does not in time."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.05)
