"""sim/simulator.py: several workers in one process, what they share, and what is left when they end."""

import asyncio

import aiohttp
import pytest
from sim_peers import FAST, INFERENCE, WAIT_S, run, running

from sglfast.errors import ConfigError
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer
from sglfast.sim import introspect
from sglfast.sim import simulator as simulator_module
from sglfast.sim import worker as worker_module
from sglfast.sim.settings import SimSettings
from sglfast.sim.simulator import Simulator
from sglfast.wire.server_info import parse_server_info


def test_workers_differ_in_their_ports_only() -> None:
    async def test() -> None:
        settings = SimSettings(workers=3, base_port=0, page_size=4, cache_tokens=400, **FAST)
        async with Simulator(settings) as simulator, aiohttp.ClientSession() as session:
            announced = simulator.announcement()["workers"]
            assert [entry["url"] for entry in announced] == [worker.url for worker in simulator.workers]
            ports = {entry[name] for entry in announced for name in ("kv_port", "replay_port")}
            ports |= {int(entry["url"].rpartition(":")[2]) for entry in announced}
            assert len(ports) == 9
            texts = set()
            for entry in announced:
                async with session.post(entry["url"] + "/generate", json=INFERENCE["/generate"]) as response:
                    texts.add((await response.json())["text"])
                async with session.get(entry["url"] + "/server_info") as response:
                    info = await response.read()
                facts = parse_server_info(info, entry["url"])
                assert facts.kv is not None
                assert (facts.kv.host, facts.kv.port_base, facts.kv.replay_port_base) == (
                    "127.0.0.1",
                    entry["kv_port"],
                    entry["replay_port"],
                )
                assert introspect.SECRET_MARK.encode() in info
            assert len(texts) == 1

    run(test())


def test_a_port_that_is_taken_is_named_and_nothing_is_left_open() -> None:
    async def test() -> None:
        async with running() as worker:
            settings = SimSettings(workers=1, base_port=worker.worker.port)
            with pytest.raises(ConfigError, match=f"port {worker.worker.port}.*--base-port"):
                async with Simulator(settings):
                    raise AssertionError("both listen on one port")

    run(test())  # the guard of conftest.py looks for sockets


def test_idle_connections_are_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_module, "SWEEP_S", 0.01)
    monkeypatch.setattr(worker_module, "KEEP_ALIVE_S", 0.05)

    async def test() -> None:
        async with running() as worker:
            reader, writer = await asyncio.open_connection("127.0.0.1", worker.worker.port)
            writer.write(b"GET /health HTTP/1.1\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)
            assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
            writer.close()
            await writer.wait_closed()

    run(test())


def test_the_demo_tokenizer_is_the_default() -> None:
    assert SimSettings().tokenizer_path == DEMO_TOKENIZER_PATH
    load_tokenizer(SimSettings().tokenizer_path)
