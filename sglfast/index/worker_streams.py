"""What a worker's row says of its event streams: where they are, and what makes them the ones that they are.

Runs in: index, main thread. Pure.
"""

from urllib.parse import urlsplit

from sglfast.shm import WorkerView
from sglfast.wire.server_info import KvEndpoint


def endpoint_of(view: WorkerView) -> KvEndpoint | None:
    """Where a worker publishes, None when it does not."""
    record = view.record
    if record.kv_host is None or view.block_size < 1:
        return None
    return KvEndpoint(
        publisher="zmq",
        # An engine that connects out names our host; what it binds itself (replay) is at its own.
        host=(urlsplit(record.url).hostname or record.kv_host) if record.kv_connects_out else record.kv_host,
        port_base=record.kv_port_base,
        topic=record.kv_topic,
        block_size=view.block_size,
        dp_size=view.dp_size,
        replay_port_base=record.kv_replay_port_base,
    )


def stream_of(view: WorkerView) -> tuple[object, ...]:
    """What makes a worker's event streams the ones we follow; another start time is another engine process."""
    # The model's name is in the token route's keys; on the SHA route it may become known later without harm.
    model = view.record.model if view.key_route == "tokens" else None
    place = view.generation, view.rank_base, view.dp_size
    # Pairs or single tokens: on the SHA route the engine's hashes are the keys either way.
    is_bigram = view.bigram and view.key_route == "tokens"
    return *place, is_bigram, view.record.startup_time, endpoint_of(view), view.record.kv_connects_out, view.key_route, model
