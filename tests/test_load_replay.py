"""The command `sglfast replay` against a scripted router; with a real one it is tested in test_load_demo.py."""

import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from test_load_client import Seen, serving, whole_stream
from test_load_report import sample
from test_load_run import a_run

from sglfast.errors import ConfigError
from sglfast.load.interrupts import Interrupts
from sglfast.load.replay import ReplaySettings, main, replay
from sglfast.load.run import load_run, save_run
from sglfast.load.trace import TraceRequest

ROOT = Path(__file__).parent.parent
MODELS = b'{"object":"list","data":[{"id":"x","object":"other"},{"id":"some-model","object":"model"}]}'


def json_answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body


class Router:
    """A scripted router that is its own worker: half of every prompt is cached, predictions are right but for one request."""

    def __init__(self, *, fails: int | None = None, wrong: int | None = None) -> None:
        self.fails, self.wrong = fails, wrong
        self.url = ""
        self.bodies: list[dict[str, object]] = []

    def __call__(self, seen: Seen) -> Iterator[bytes]:
        if seen.path == "/v1/models":
            yield json_answer(MODELS)
        elif seen.path == "/server_info":
            yield json_answer(json.dumps({"page_size": 64, "dp_size": 1}).encode())
        else:
            number = len(self.bodies)
            self.bodies.append(json.loads(seen.body))
            if number == self.fails:
                yield b"HTTP/1.1 503 X\r\ncontent-length: 2\r\nx-router-error-code: no_healthy_workers\r\n\r\nno"
                return
            words = str(self.bodies[-1]["prompt"]).count(" ")
            blocks = words // 128
            usage = {"prompt_tokens": words, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 64 * blocks}}
            predicted = blocks + (number == self.wrong)
            header = f"x-sglfast-kv: worker={self.url}; rank=0; overlap_blocks={predicted}; prompt_blocks=9; state=EXACT\r\n"
            yield whole_stream(header.encode(), usage)


@pytest.fixture
def trace_file(tmp_path: Path) -> str:
    file = tmp_path / "t.jsonl"
    rows = [{"timestamp": 20 * n, "input_length": 1100, "output_length": 40, "hash_ids": [0, 1, 2 + n]} for n in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_replay_reports_and_saves(trace_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    router = Router(wrong=5)
    saved, picture = tmp_path / "run.json", tmp_path / "run.png"
    with serving(router) as server:
        router.url = server.url
        code = main([
            "--url", server.url, "--trace", trace_file, "--speed-up", "4", "--warmup", "2", "--max-output-tokens", "16",
            "--json", str(saved), "--plot", str(picture), "--settled-checks", "2",
        ])  # fmt: skip
    shown = capsys.readouterr().out
    assert code == 0
    assert "t.jsonl: 8 requests, 8,800 prompt tokens" in shown
    assert {body["model"] for body in router.bodies} == {"some-model"}
    assert [body["max_tokens"] for body in router.bodies] == [16] * 8 + [1] * 2
    assert router.bodies[8]["prompt"] == router.bodies[6]["prompt"]

    run = load_run(str(saved))
    assert (len(run.samples), run.warmup, run.page_tokens, len(run.settled)) == (6, 2, 64, 2)
    assert run.infinite_blocks == pytest.approx(2 / 3)
    numbers = json.loads(saved.read_text())["summary"]
    assert numbers["hit_tokens"] == pytest.approx(512 / 1100)
    assert numbers["hit_blocks"] == pytest.approx(1 / 3)
    assert numbers["predictions"] == {"checked": 6, "exact": 5, "too_high": 1, "too_low": 0}
    assert numbers["settled"] == {"checked": 2, "exact": 2, "too_high": 0, "too_low": 0}
    assert numbers["requests_per_worker"] == {router.url: 6}
    assert picture.read_bytes().startswith(b"\x89PNG")
    for words in ("46.5 %", "33.3 %", "83.3 %", "TTFT p99", str(saved)):
        assert words in shown


def test_errors_are_shown_and_change_the_exit_code(trace_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Router(fails=3)) as server:
        code = main(["--url", server.url, "--trace", trace_file, "--requests", "5", "--speed-up", "10"])
    assert code == 1
    assert "1 x http_503 no_healthy_workers, such as: no" in capsys.readouterr().out


def test_made_up_conversations_are_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    router = Router()
    with serving(router) as server:
        code = main(["--url", server.url, "--users", "3", "--turns", "2", "--arrivals-per-s", "100", "--speed-up", "1000"])
    assert code == 0
    assert len(router.bodies) >= 3
    assert "made-up conversations (seed 1)" in capsys.readouterr().out


def test_bar_on_a_terminal() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    trace = [TraceRequest(0, 600, 1, [1, 2])] * 3
    with serving(Router()) as server, Interrupts() as interrupts:
        run = replay(server.url, trace, "t", "a label", ReplaySettings(), console, interrupts)
    assert len(run.samples) == 3
    assert "3/3" in output.getvalue()
    assert "a label" in output.getvalue()


def test_router_that_is_not_there(trace_file: str) -> None:
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:1/v1/models does not answer \(.*refused.*\); is a router running there"):
        main(["--url", "http://127.0.0.1:1", "--trace", trace_file])


def test_router_without_a_model(trace_file: str) -> None:
    with (
        serving(lambda _: [json_answer(b'{"object":"list","data":[]}')]) as server,
        pytest.raises(ConfigError, match="names no model; name it: --model"),
    ):
        main(["--url", server.url, "--trace", trace_file])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(trace_file: str, number: int) -> None:
    came, never = threading.Event(), threading.Event()

    def script(seen: Seen) -> Iterator[bytes | threading.Event]:
        if seen.path == "/v1/models":
            yield json_answer(MODELS)
        else:
            came.set()
            yield never

    with serving(script) as server:
        command = [sys.executable, "-m", "sglfast", "replay", "--url", server.url, "--trace", trace_file]
        with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert came.wait(60)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_compare_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for label, ttft in (("round_robin", 400.0), ("cache_aware", 100.0)):
        files.append(str(tmp_path / f"{label}.json"))
        save_run(files[-1], a_run([sample(512, ttft=ttft)], label=label), {})
    picture = tmp_path / "both.svg"
    assert main(["--compare-files", ",".join(files), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "100 ms (-75 %)" in shown
    assert "gets 40.0 % of the block references" in shown
    assert "cache_aware" in picture.read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--compare", "round_robin,best"], "--compare best: there is no such policy; there are: auto, cache_aware"),
        (["--compare", "random", "--url", "http://x"], "exclude one another"),
        (["--requests", "0"], "--requests 0: must be at least 1"),
        (["--speed-up", "0"], "--speed-up 0.0: must be more than 0"),
        (["--speed-up", "nan"], "--speed-up nan: must be more than 0"),
        (["--requests", "5", "--warmup", "5", "--url", "http://x"], "--warmup 5: leaves nothing to count of 5 requests"),
        (["--plot", "x.gif"], "--plot x.gif: must end in"),
        (["--trace", "/no/such"], "trace /no/such: cannot be read"),
        (["--compare-files", "/no/such"], "run /no/such: cannot be read"),
        (["--url", "https://x"], "must look like http://host:port"),
        (["--url", "http://x", "--tokenizer-path", "/no/such"], "tokenizer path '/no/such'"),
    ],
)
def test_settings_that_cannot_work(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(argv)
