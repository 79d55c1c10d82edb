"""Drives a real `modelexpress` package in a process of its own: a command a line on standard input, an answer a line on standard output.

Loads nothing of sglfast. The package's own __init__ imports torch; a bare package of the same name is put in its place, the modules
below it are the real ones. Usage: python modelexpress_remote.py FOLDER HOST:PORT
"""

import importlib
import json
import sys
import types

folder, address = sys.argv[1:]
sys.path.insert(0, folder)
package = types.ModuleType("modelexpress")
package.__path__ = [f"{folder}/modelexpress"]
sys.modules["modelexpress"] = package
client_module = importlib.import_module("modelexpress.client")
pb2 = importlib.import_module("modelexpress.p2p_pb2")
assert client_module.__file__.startswith(folder), client_module.__file__
assert importlib.import_module("google.protobuf").__file__.startswith(folder)
assert "torch" not in sys.modules

client = client_module.MxClient(address)
beats = None


class HealthyManager:
    """Stands for NIXL, which is not here."""

    def is_healthy(self):
        return True


def worker(rank, tensors, name_bytes, status=0):
    """A record with that many tensors; name_bytes makes it as large as a test wants."""
    made = pb2.WorkerMetadata(worker_rank=rank, transfer_engine_session_id="10.0.0.1:4711", status=status)
    for i in range(tensors):
        made.tensors.add(name=f"{i:0{name_bytes}d}", addr=0x7F0000000000 + i, size=4096, device_id=rank, dtype="bfloat16")
    return made


def publish(identity, rank, worker_id, tensors=3, name_bytes=8):
    made = worker(rank, tensors, name_bytes)
    return {"source_id": client.publish_metadata(pb2.SourceIdentity(**identity), made, worker_id), "bytes": made.ByteSize()}


def list_sources(identity=None, status=None):
    found = client.list_sources(identity and pb2.SourceIdentity(**identity), status)
    return [
        {"source_id": one.mx_source_id, "worker_id": one.worker_id, "model": one.model_name, "rank": one.worker_rank}
        for one in found.instances
    ]


def get(source_id, worker_id):
    answer = client.get_metadata(source_id, worker_id)
    tensors = answer.worker.tensors
    return {
        "found": answer.found,
        "status": answer.worker.status,
        "rank": answer.worker.worker_rank,
        "session": answer.worker.transfer_engine_session_id,
        "tensors": len(tensors),
        "payload_tensors": len(answer.worker.tensor_source.tensors)
        if "tensor_source" in pb2.WorkerMetadata.DESCRIPTOR.fields_by_name
        else None,
        "last": [tensors[-1].name, tensors[-1].addr, tensors[-1].size, tensors[-1].device_id, tensors[-1].dtype] if tensors else None,
    }


def update(source_id, worker_id, rank, status):
    return client.update_status(source_id, worker_id, rank, status)


def start_beats(source_id, worker_id, rank):
    """Begin the package's own heartbeat thread: PublisherThread of 0.7.0, HeartbeatThread of 0.3.0."""
    global beats
    try:
        publisher = importlib.import_module("modelexpress.metadata.publisher")
    except ModuleNotFoundError:
        heartbeat = importlib.import_module("modelexpress.heartbeat")
        beats = heartbeat.HeartbeatThread(client, source_id, worker_id, rank, HealthyManager())
    else:
        identity = pb2.SourceIdentity(**source_id)  # of this one the thread wants to do the publishing itself
        beats = publisher.PublisherThread(
            client, worker_id=worker_id, worker_rank=rank, interval_secs=1,
            publish_fn=lambda: client.publish_metadata(identity, worker(rank, 3, 8), worker_id),
        )  # fmt: skip
    beats.start()


def beats_source_id():
    return beats.mx_source_id


def stop_beats():
    beats.stop()


for line in sys.stdin:
    name, arguments = json.loads(line)
    try:
        answer = {"value": globals()[name](**arguments)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
client.close()
