"""The real clients, `modelexpress` 0.7.0 and 0.3.0 from PyPI, against the real service, each a process of its own.

Skipped, with the reason, where the packages are neither in build/modelexpress nor to be had from PyPI.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from modelexpress_packages import READY, REQUIREMENTS, STALE, UNKNOWN, RealClient, real_client, until
from modelexpress_running import Service, running_service

from sglfast.modelexpress.blocking import blocking_candidates
from sglfast.modelexpress.schema import p2p

VERSIONS = sorted(REQUIREMENTS)
QUICK = ("--heartbeat-timeout-secs", "2", "--scan-interval-secs", "0.2")


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service() as running:
        yield running


@pytest.fixture(scope="module", params=VERSIONS)
def client(request: pytest.FixtureRequest, service: Service) -> Iterator[RealClient]:
    with real_client(request.param, service.address) as driven:
        yield driven


def identity(model: str) -> dict[str, Any]:
    """As SGLang's loaders fill it."""
    return {
        "model_name": model, "backend_framework": 2, "tensor_parallel_size": 2, "pipeline_parallel_size": 1, "expert_parallel_size": 1,
        "dtype": "bfloat16",
    }  # fmt: skip


def workers(client: RealClient, model: str, status: int | None = None) -> list[str]:
    return [one["worker_id"] for one in client.list_sources(identity=identity(model), status=status)]


def test_publish_list_get_status(client: RealClient) -> None:
    model = "Org/Scenario"
    published = client.publish(identity=identity(model), rank=1, worker_id="w1")
    source_id = published["source_id"]
    assert len(source_id) == 16
    assert client.list_sources(identity=identity(model)) == [{"source_id": source_id, "worker_id": "w1", "model": model, "rank": 1}]
    assert workers(client, model, READY) == []
    assert workers(client, model, UNKNOWN) == ["w1"]
    assert client.update(source_id=source_id, worker_id="w1", rank=1, status=READY) is True
    assert workers(client, model, READY) == ["w1"]
    record = client.get(source_id=source_id, worker_id="w1")
    assert (record["found"], record["status"], record["rank"], record["session"]) == (True, READY, 1, "10.0.0.1:4711")
    assert record["tensors"] == 3
    assert record["payload_tensors"] in (None, 3)  # 0.3.0 does not know the field
    assert record["last"] == ["00000002", 0x7F0000000002, 4096, 1, "bfloat16"]
    assert client.update(source_id=source_id, worker_id="w1", rank=1, status=STALE) is True
    assert workers(client, model, READY) == []
    assert client.get(source_id=source_id, worker_id="w1")["status"] == STALE
    client.publish(identity=identity(model), rank=1, worker_id="w1", tensors=1)  # again: another record, READY only when it says so
    assert workers(client, model, READY) == []
    assert client.get(source_id=source_id, worker_id="w1")["tensors"] == 1


def test_what_is_not_there(client: RealClient) -> None:
    assert client.list_sources(identity=identity("absent")) == []
    assert client.get(source_id="0123456789abcdef", worker_id="w")["found"] is False
    assert client.update(source_id="0123456789abcdef", worker_id="w", rank=0, status=READY) is False
    refused = client.error_of("publish", identity=identity(""), rank=0, worker_id="w")
    assert refused == "RuntimeError: PublishMetadata failed: identity.model_name is required"


@pytest.mark.parametrize("size_mib", [8, 64])
def test_large_records(client: RealClient, size_mib: int) -> None:
    """Tensors are answered in the old and in the new field; where that exceeds these clients' 100 MiB, in the publisher's alone."""
    tensors = 1 << 12
    name_bytes = (size_mib << 20) // tensors - 64
    source_id, sent_bytes = client.publish(
        identity=identity(f"large-{size_mib}"), rank=0, worker_id="w", tensors=tensors, name_bytes=name_bytes
    ).values()
    assert size_mib << 20 > sent_bytes > (size_mib - 1) << 20
    assert client.update(source_id=source_id, worker_id="w", rank=0, status=READY) is True
    assert workers(client, f"large-{size_mib}", READY) == ["w"]
    record = client.get(source_id=source_id, worker_id="w")
    assert record["tensors"] == tensors
    assert record["payload_tensors"] in (None, tensors if size_mib == 8 else 0)
    assert record["last"][1:] == [0x7F0000000000 + tensors - 1, 4096, 0, "bfloat16"]
    assert len(record["last"][0]) == name_bytes


def test_both_versions_and_ours_see_each_other(service: Service) -> None:
    """Identities without what April did not know are the same source for all."""
    with real_client("0.7.0", service.address) as new, real_client("0.3.0", service.address) as april:
        for number, seed in enumerate((new, april)):
            source_id = seed.publish(identity=identity("shared"), rank=0, worker_id=f"w{number}")["source_id"]
            assert seed.update(source_id=source_id, worker_id=f"w{number}", rank=0, status=READY) is True
        for target in (new, april):
            assert sorted(workers(target, "shared", READY)) == ["w0", "w1"]
            assert [target.get(source_id=source_id, worker_id=worker_id)["tensors"] for worker_id in ("w0", "w1")] == [3, 3]
    found = list(blocking_candidates(service.address, p2p.SourceIdentity(**identity("shared")), 0))
    assert [one.worker_id for one in found] == ["w1", "w0"]
    assert [one.tensors[2].name for one in found] == ["00000002"] * 2


@pytest.mark.parametrize("version", VERSIONS)
def test_stale_without_heartbeats_and_not_with_them(version: str) -> None:
    with running_service(*QUICK) as service, real_client(version, service.address) as client:
        model = "beats"
        source_id = client.publish(identity=identity(model), rank=0, worker_id="beating")["source_id"]
        client.publish(identity=identity(model), rank=0, worker_id="silent")
        client.start_beats(source_id=source_id if version == "0.3.0" else identity(model), worker_id="beating", rank=0)
        until(lambda: "beating" in workers(client, model, READY), "the package's heartbeat thread says READY")
        client.update(source_id=source_id, worker_id="silent", rank=0, status=READY)
        until(lambda: client.get(source_id=source_id, worker_id="silent")["status"] == STALE, "the silent worker becomes STALE")
        assert workers(client, model, READY) == ["beating"]
        client.stop_beats()
        assert client.get(source_id=source_id, worker_id="beating")["status"] == STALE
        assert workers(client, model, READY) == []


def test_the_publisher_thread_publishes_again_after_two_refusals() -> None:
    """0.7.0 only: the service comes back with an empty store and answers heartbeats with success=false."""
    with running_service() as service, real_client("0.7.0", service.address) as client:
        client.start_beats(source_id=identity("lost"), worker_id="w", rank=0)
        until(lambda: workers(client, "lost", READY) == ["w"], "published")
        service.stop()
        service.start()
        listing = {"identity": identity("lost"), "status": READY}
        # For a moment the real client's channel may still say that nobody listens.
        until(lambda: len(client.ask("list_sources", listing).get("value", ())) == 1, "published again, in a store that was empty")
        assert client.get(source_id=client.beats_source_id(), worker_id="w")["tensors"] == 3
        client.stop_beats()
        assert workers(client, "lost", STALE) == ["w"]
