"""modelexpress/blocking.py against the real service: seeds and targets of programs without a loop, and how such a program ends."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from modelexpress_running import Service, record, running_service, tensors

from sglfast.errors import ConfigError
from sglfast.modelexpress.blocking import BlockingSeed, blocking_candidates
from sglfast.modelexpress.client import CallFailed, MetadataClient, ModelExpressError
from sglfast.modelexpress.identity import ServerArguments, arguments_identity
from sglfast.modelexpress.schema import p2p
from sglfast.modelexpress.target import NoSource

ROOT = Path(__file__).parent.parent
WAIT_S = 30


def identity(model: str) -> p2p.SourceIdentity:
    return arguments_identity(ServerArguments(model_path=model))


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service() as running:
        yield running


def status_of(service: Service, source_id: str, worker_id: str) -> p2p.SourceStatus:
    async def ask() -> p2p.SourceStatus:
        async with MetadataClient(service.address) as client:
            answer = await client.get_metadata(source_id, worker_id)
            assert answer is not None
            return answer.worker.status

    return asyncio.run(ask())


def test_seed_and_target(service: Service) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with (
        BlockingSeed(service.address, identity("plain"), record(), worker_id="w0") as first,
        BlockingSeed(service.address, identity("plain"), record(session="10.0.0.2:1")) as second,
    ):
        for seed in (first, second):
            seed.wait_ready(WAIT_S)
        found = list(blocking_candidates(service.address, identity("plain"), 0))
        assert {one.worker_id for one in found} == {"w0", second.worker_id}
        assert {one.session_id for one in found} == {"10.0.0.1:4711", "10.0.0.2:1"}
        assert list(found[0].tensors) == tensors()
        (other,) = blocking_candidates(service.address, identity("plain"), 0, exclude=["w0"])
        assert other.worker_id == second.worker_id
        for one in blocking_candidates(service.address, identity("plain"), 0):
            assert one.source_id == first.source_id
            break  # the second one is never asked for
    assert [status_of(service, seed.source_id, seed.worker_id) for seed in (first, second)] == [p2p.SOURCE_STATUS_STALE] * 2
    assert signal.getsignal(signal.SIGTERM) is before
    first.stop()  # twice does nothing
    with pytest.raises(NoSource):
        list(blocking_candidates(service.address, identity("plain"), 0))


def test_what_fails_is_raised_where_it_was_asked_for() -> None:
    with pytest.raises(ConfigError, match="must be host:port"):
        BlockingSeed("nowhere", identity("m"), record()).start()
    with pytest.raises(CallFailed, match="UNAVAILABLE"):
        list(blocking_candidates("127.0.0.1:1", identity("m"), 0))
    with (
        BlockingSeed("127.0.0.1:1", identity("m"), record()) as seed,
        pytest.raises(ModelExpressError, match=r":1 did not answer"),
    ):
        seed.wait_ready(0.2)


PROGRAM = """
import signal, sys, time
from modelexpress_running import record
from sglfast.modelexpress.blocking import BlockingSeed
from sglfast.modelexpress.identity import ServerArguments, arguments_identity

def own(number, frame):
    print("own handler", flush=True)
    sys.exit(3)

address, how = sys.argv[1:]
if how == "handled":
    signal.signal(signal.SIGTERM, own)
seed = BlockingSeed(address, arguments_identity(ServerArguments(model_path=how)), record())
seed.start()
seed.wait_ready(30)
print(seed.source_id, seed.worker_id, flush=True)
if how != "exit":
    while True:
        time.sleep(1)
"""


@pytest.mark.parametrize(("how", "code", "said"), [("default", -signal.SIGTERM, ""), ("handled", 3, "own handler\n"), ("exit", 0, "")])
def test_a_program_that_ends_takes_its_record_back(service: Service, how: str, code: int, said: str) -> None:
    """By SIGTERM with and without a handler of its own, and at the end of its text."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, service.address, how], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        source_id, worker_id = process.stdout.readline().split()
        if how != "exit":
            assert status_of(service, source_id, worker_id) == p2p.SOURCE_STATUS_READY
            process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=WAIT_S)
        assert (process.returncode, rest) == (code, said)
        assert status_of(service, source_id, worker_id) == p2p.SOURCE_STATUS_STALE
    finally:
        process.kill()
        process.communicate()
