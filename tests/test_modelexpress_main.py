"""`sglfast modelexpress serve` and `sources` as processes."""

import asyncio
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mx_harness import ROOT, Client, ServeProcess, publication

from sglfast.modelexpress.roster import READY, STALE
from sglfast.modelexpress.schema import p2p


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sglfast", "modelexpress", *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_serve_until_sigterm_and_again(tmp_path: Path) -> None:
    for number, held in ((signal.SIGTERM, 0), (signal.SIGINT, 1)):
        service = ServeProcess("--storage", str(tmp_path / "db"), log=tmp_path / "log")

        async def main(address: str, held: int) -> None:
            async with Client(address) as client:
                assert len(await client.list()) == held
                await client.publish(publication())

        try:
            asyncio.run(main(service.address, held))
        finally:
            assert service.end(number) == 0
    assert "stopping" in (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    """A health watch never ends by itself: it holds a stop up for its grace."""
    service = ServeProcess("--storage", str(tmp_path / "db"), "--shutdown-grace-secs", "300", log=tmp_path / "log")

    async def main() -> None:
        async with Client(service.address) as client:
            watch = client.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
            assert await watch.read() == b"\x08\x01"
            service.process.send_signal(signal.SIGTERM)
            assert await watch.read() == b"\x08\x02", "not serving any more"
            assert service.process.poll() is None
            service.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(service.process.wait, 30)

    try:
        asyncio.run(main())
    finally:
        assert service.end() == 0


def test_sources_shows_what_the_service_knows(tmp_path: Path) -> None:
    service = ServeProcess("--storage", str(tmp_path / "db"), log=tmp_path / "log")

    async def main() -> None:
        async with Client(service.address) as client:
            for rank in range(2):
                answer = await client.publish(publication(model="Org/Whole", worker_id=f"w{rank}", rank=rank))
                await client.update(answer.mx_source_id, f"w{rank}", rank, READY)
            request = publication(model="Org/Half", worker_id="h")
            request.identity.MergeFrom(
                p2p.SourceIdentity(tensor_parallel_size=8, pipeline_parallel_size=2, quantization="fp8", dtype="bfloat16")
            )
            answer = await client.publish(request)
            await client.update(answer.mx_source_id, "h", 0, READY)
            request.worker_id = "gone"
            await client.publish(request)
            await client.update(answer.mx_source_id, "gone", 0, STALE)

    try:
        asyncio.run(main())
        done = run("sources", "--url", service.address)
        half_only = run("sources", "--url", f"http://{service.address}/", "--model", "Half")
    finally:
        service.end()
    assert (done.returncode, done.stderr) == (0, "")
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in done.stdout.splitlines() if line.startswith("│")]
    half, whole = rows
    assert half[0] == "Org/Half"
    assert half[2:8] == ["sglang", "8/2/1", "bfloat16", "fp8", "1/16, missing 1, 2, 3, 4, 5, 6, 7, 8, ...", "2"]
    assert half[9] == "READY 1, STALE 1"
    assert (whole[0], whole[3], whole[6], whole[7], whole[9]) == ("Org/Whole", "2/1/1", "2/2, complete", "2", "READY 2")
    assert whole[8].endswith(" s ago")
    assert "Org/Half" in half_only.stdout
    assert "Org/Whole" not in half_only.stdout


def test_sources_of_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        done = run("sources", "--url", f"127.0.0.1:{taken.getsockname()[1]}", "--timeout-secs", "5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sglfast modelexpress: cannot ask the service at 127.0.0.1:")
    assert "StatusCode.UNAVAILABLE" in done.stderr


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["serve", "--port", "70000"], "--port 70000: must be at most 65535"),
        (["serve", "--storage", "/nonexistent/db", "--port", "0", "--metrics-port", "-1"], "/nonexistent/db: "),
        (["serve", "--storage", "redis://127.0.0.1:x/0"], "--storage: "),
        (["nonsense"], "invalid choice"),
    ],
)
def test_what_cannot_work_ends_with_one_sentence(argv: list[str], text: str) -> None:
    done = run(*argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_help_names_both_commands() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "serve" in done.stdout
    assert "sources" in done.stdout


@pytest.mark.parametrize("missing", ["grpc", "grpc_health", "google.protobuf"])
def test_without_the_extra_it_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom sglfast import cli\nsys.exit(cli.main(['modelexpress', 'serve']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("sglfast modelexpress: ")
    assert done.stderr.endswith("pip install 'sglfast[modelexpress]'\n")
