"""cli_sim.py and cli_weights.py: simulated workers whose weights are announced and found through the real metadata service."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from modelexpress_running import Service, run, running_service

from sglfast import cli_sim
from sglfast.cli_weights import ModelExpressDirectory
from sglfast.modelexpress.client import MetadataClient
from sglfast.modelexpress.schema import p2p
from sglfast.sim.settings import SimSettings
from sglfast.sim.simulator import Simulator

ROOT = Path(__file__).parent.parent
WAIT_S = 60
MODEL_BYTES = 5 << 20


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service() as running:
        yield running


def settings(service: Service, **more: object) -> SimSettings:
    return SimSettings(workers=1, base_port=0, mx_server=service.address, mx_model_bytes=MODEL_BYTES, **more)  # type: ignore[arg-type]


def test_weights_go_from_worker_to_worker(service: Service) -> None:
    async def test() -> None:
        first, second = settings(service), settings(service, mx_role="target", mx_bandwidth_bytes_per_s=1e9)
        async with MetadataClient(service.address) as client, aiohttp.ClientSession() as session:

            async def ready() -> list[str]:
                """Endpoints of READY sources, freshest first."""
                endpoints = []
                for one in await client.list_sources(status=p2p.SOURCE_STATUS_READY):
                    answer = await client.get_metadata(one.mx_source_id, one.worker_id)
                    assert answer is not None
                    assert sum(tensor.size for tensor in answer.worker.tensor_source.tensors) == MODEL_BYTES
                    endpoints.append(answer.worker.transfer_engine_session_id)
                return endpoints

            async with Simulator(first, ModelExpressDirectory(first)) as seeds:
                while not await ready():
                    pass
                async with Simulator(second, ModelExpressDirectory(second)) as targets:
                    async with session.get(targets.workers[0].url + "/sim/stats") as response:
                        weights = (await response.json())["weights"]
                    assert (weights["role"], weights["copied"]) == ("target", MODEL_BYTES)
                    assert [weights["source"]] == [one for one in await ready() if one != weights["endpoint"]]
                    while len(await ready()) < 2:
                        pass
                    assert seeds.workers
                assert await ready() == [weights["source"]]
            assert await ready() == []

    run(test())


def sim(*flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "sglfast", "sim", "--workers", "1", "--base-port", "0", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_target_without_a_seed_ends_with_one_line(service: Service) -> None:
    process = sim("--mx-server", service.address, "--mx-role", "target", "--model", "nobody-has-it")
    out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (2, "")
    assert f"sglfast sim: ModelExpress server {service.address} has no source for model=nobody-has-it, rank=0" in err
    assert "Traceback" not in err


def test_a_signal_ends_a_target_in_the_middle_of_its_weights(service: Service) -> None:
    common = ("--mx-server", service.address, "--model", "slow", "--mx-model-bytes", str(8 << 20))
    seed = sim(*common)
    target = None
    try:
        assert seed.stdout is not None
        assert "1 worker of slow" in seed.stdout.readline()
        target = sim(*common, "--mx-role", "target", "--mx-bandwidth-bytes-per-s", "200000")
        assert target.stdout is not None
        assert target.stdout.readline().startswith("weights: ")
        target.send_signal(signal.SIGTERM)
        out, err = target.communicate(timeout=WAIT_S)
        assert (target.returncode, "Traceback" in err) == (0, False), err
        assert "worker" not in out  # it never listened
        seed.send_signal(signal.SIGTERM)
        _, err = seed.communicate(timeout=WAIT_S)
        assert seed.returncode == 0
        assert "record STALE" in err
    finally:
        for process in filter(None, (seed, target)):
            process.kill()
            process.communicate()


def test_an_address_that_cannot_be_ends_with_one_line() -> None:
    process = sim("--mx-server", "https://10.0.0.1:8001")
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2
    assert err.startswith("sglfast sim: ModelExpress server 'https://10.0.0.1:8001': must be host:port")
    assert err.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglfast.cli_weights", None)
    with pytest.raises(cli_sim.ConfigError, match=r"--mx-server needs grpc .*pip install 'sglfast\[modelexpress\]'"):
        cli_sim.open_directory(SimSettings(mx_server="h:1"))


def test_the_simulator_alone_does_not_load_grpc() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, sglfast.cli_sim; print(*sys.modules)"], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.returncode == 0, done.stderr
    assert not {"grpc", "sglfast.modelexpress", "sglfast.cli_weights"} & set(done.stdout.split())
