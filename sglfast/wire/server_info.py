"""What a worker says about itself: `/server_info`, its `kv_events` descriptor, `/model_info`, `/v1/models`.

Runs in: control (parse), sim (produce the descriptor). No I/O.
Contract: `/server_info` carries api_key, admin_api_key, ssl_keyfile_password and launch_command in clear. Only the fields named
    below are ever decoded (the rest stays an undecoded view of the body), and no error text quotes the body. A field of a wrong
    type counts as absent. block_size and dp_size come from the descriptor, which is right under DCP and DP attention where the
    top level is not. Engines before 0.5.13 have no descriptor, those before 0.5.22 none of the replay: there `kv_events_config`, the
    setting itself, tells what a descriptor would.
Source: spec/kv_events.md 3; spec/router.md 3.4.
"""

import re
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec

from sglfast.errors import WorkerInfoError

_WILDCARD_HOSTS = frozenset({"*", "0.0.0.0", "::", "[::]"})
# Their draft models key pairs of tokens; NEXTN is resolved to EAGLE by the engine, but older ones may still show it.
_BIGRAM_ALGORITHMS = frozenset({"EAGLE", "EAGLE3", "NEXTN", "FROZEN_KV_MTP"})
_PORT_LIMIT = 65_535
# Versions of SGLang: block hashes are the SHA-256 chain; events name LoRA adapters.
_FIRST_CHAINED = (0, 5, 6)
_FIRST_ADAPTERS, _FIRST_ADAPTERS_DYNAMO = (0, 5, 23), (0, 5, 22)
# Tools of a request as the chat template gets them, see shm.ToolForm.
_FIRST_WRAPPED, _FIRST_DEFERRABLE, _FIRST_KEPT = (0, 5, 9), (0, 5, 11), (0, 5, 23)
# How requests of SGLang tell the data-parallel rank that they want, see shm.WorkerRecord.rank_ways: read in the releases 0.5.7, 0.5.9,
# 0.5.10, 0.5.18, 0.5.20, 0.5.23 and PR #38729. The header came with PR #19832, never for /generate; with 0.5.20 for /v1/responses.
# A client's header wins over its body there. vLLM (PR #24945) has the header, no field.
_RANK_WAYS: tuple[tuple[tuple[int, ...], str], ...] = (((0, 5, 20), "hhr-h"), ((0, 5, 10), "hhr"), ((0, 5, 7), "ddd"))
RANK_WAYS_OF_VLLM = "hh"
_FIRST_RID = (0, 5, 0)  # of SGLang: one `rid` also names a batch, and chats take it

T = TypeVar("T")


class KvEndpoint(msgspec.Struct, frozen=True):
    """Where a worker publishes KV events. Rank r uses port_base + r (and replay_port_base + r, None = no replay).

    host: name or address without brackets; topic: prefix of the first frame; block_size: tokens a block; dp_size: ranks.
    """

    publisher: str
    host: str
    port_base: int
    topic: str
    block_size: int
    dp_size: int
    replay_port_base: int | None

    def live_endpoint(self, rank: int) -> str | None:
        """ZMQ endpoint of a rank's PUB socket, None when its port does not exist."""
        return zmq_endpoint(self.host, self.port_base + rank)

    def replay_endpoint(self, rank: int) -> str | None:
        """ZMQ endpoint of a rank's ROUTER socket, None when there is none."""
        return None if self.replay_port_base is None else zmq_endpoint(self.host, self.replay_port_base + rank)


class WorkerFacts(msgspec.Struct, frozen=True):
    """What we keep of `/server_info`. kv: None when the worker publishes no KV events over ZMQ; startup_time: unix seconds.

    key_route: whether the engine's block hashes can be recomputed ("sha256"), or keys are to be made of the events' tokens.
    takes_rid: an SGLang whose requests may carry a `rid` in their body, and which has /abort_request to end them by it.
    kv_connects_out: the engine connects its event socket to whoever listens; nothing is heard by connecting to it.
    adapters, tools: how LoRA adapters show in its events and how its chat template gets tools, see shm.Adapters and shm.ToolForm.
    template_kwargs: its default_chat_template_kwargs, a JSON object, "" when it has none.
    load_balance_method: how its data-parallel ranks get their requests; rank_ways: see shm.WorkerRecord.
    """

    model: str | None
    kv: KvEndpoint | None
    dp_size: int
    disaggregation_mode: str | None
    disaggregation_bootstrap_port: int | None
    bigram: bool
    version: str | None
    startup_time: float | None
    page_size: int | None
    key_route: Literal["sha256", "tokens"] = "sha256"
    kv_connects_out: bool = False
    adapters: Literal["named", "shared", "models"] = "named"
    tools: Literal["flat", "wrapped", "deferrable", "kept"] = "kept"
    template_kwargs: str = ""
    takes_rid: bool = False
    tp_size: int | None = None
    load_balance_method: str | None = None
    rank_ways: str = ""
    engine: Literal["sglang", "vllm"] = "sglang"  # whose way of preparing a chat it has


def zmq_endpoint(host: str, port: int) -> str | None:
    """`tcp://host:port`, an IPv6 address in brackets; None when the port is outside 1..65535."""
    if not 1 <= port <= _PORT_LIMIT:
        return None
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def parse_server_info(body: bytes, worker_url: str) -> WorkerFacts:
    """Facts of a worker from the body of its `/server_info`; a wildcard event host becomes the host of `worker_url`.

    Raises: WorkerInfoError when the body is no JSON object.
    """
    fields = _object_of(body, "/server_info")
    algorithm = _take(fields, "speculative_algorithm", str) or ""
    version = _take(fields, "version", str) or None
    config_json = _take(fields, "kv_events_config", str)
    config = _load_config(config_json)
    is_dynamo = config is not None and config.format == "dynamo"
    # vLLM answers this path, too, with its own version numbers.
    sglang_version = None if "vllm_config" in fields else version
    ranks = (_positive(fields, "dp_size") or 1) * (_positive(fields, "attn_dp_size") or 1)
    described = _take(fields, "kv_events", dict[str, msgspec.Raw])
    is_undescribed = "kv_events" not in fields and _numbers_of(sglang_version) >= _FIRST_CHAINED
    if is_undescribed:
        descriptor = kv_events_descriptor(config_json, page_size=_positive(fields, "page_size"), dp_size=ranks)
        described = None if descriptor is None else msgspec.json.decode(msgspec.json.encode(descriptor), type=dict[str, msgspec.Raw])
    kv = _parse_descriptor(described, worker_url)
    if kv is not None and kv.replay_port_base is None and config is not None and config.replay_endpoint:
        replay = split_tcp(config.replay_endpoint)
        kv = msgspec.structs.replace(kv, replay_port_base=replay[1] if replay else None)
    dp_size = kv.dp_size if kv else ranks
    return WorkerFacts(
        model=_take(fields, "served_model_name", str) or None,
        kv=kv,
        dp_size=dp_size,
        disaggregation_mode=_take(fields, "disaggregation_mode", str) or None,
        disaggregation_bootstrap_port=_port(fields, "disaggregation_bootstrap_port"),
        bigram=algorithm.upper() in _BIGRAM_ALGORITHMS,
        version=version,
        startup_time=_take(fields, "startup_time", float),
        page_size=_positive(fields, "page_size"),
        key_route=key_route_of(sglang_version, is_dynamo=is_dynamo, is_described=described is not None and "vllm_config" not in fields),
        kv_connects_out=kv is not None and config is not None and not _binds(config, is_undescribed),
        adapters="models" if "vllm_config" in fields else "named" if _tells_adapters(version, is_dynamo=is_dynamo) else "shared",
        tools=_tool_form(sglang_version),
        template_kwargs=_object_text(fields, "default_chat_template_kwargs"),
        takes_rid=_numbers_of(sglang_version) >= _FIRST_RID,
        tp_size=_positive(fields, "tp_size"),
        load_balance_method=_take(fields, "load_balance_method", str) or None,
        rank_ways=RANK_WAYS_OF_VLLM if "vllm_config" in fields else rank_ways_of(version),
        engine="vllm" if "vllm_config" in fields else "sglang",
    )


def rank_ways_of(version: str | None) -> str:
    """How requests tell this SGLang version the rank that they want, see shm.WorkerRecord. One that nobody knows counts as new."""
    numbers = _numbers_of(version)
    return next((ways for first, ways in _RANK_WAYS if numbers >= first or numbers <= (0, 0, 0)), "")


def key_route_of(version: str | None, *, is_dynamo: bool = False, is_described: bool = False) -> Literal["sha256", "tokens"]:
    """The way to block keys for an engine that gives this SGLang version: "sha256" from 0.5.6 on in the default format.

    Development versions count as the release they lead to; a version that is none (`0.0.0...`) gets "tokens", and so does its absence,
    unless the worker describes its events (is_described): of all engines only SGLang from 0.5.13 on does.
    """
    if is_dynamo:
        return "tokens"
    is_chained = _numbers_of(version) >= _FIRST_CHAINED or (version is None and is_described)
    return "sha256" if is_chained else "tokens"


def _numbers_of(version: str | None) -> tuple[int, ...]:
    """The three numbers of a version, () when there are none."""
    found = re.match(r"v?(\d{1,9})\.(\d{1,9})\.(\d{1,9})", version or "", re.ASCII)
    return () if found is None else tuple(map(int, found.groups()))


def _tool_form(version: str | None) -> Literal["flat", "wrapped", "deferrable", "kept"]:
    """What this SGLang makes of tools. One that nobody knows counts as new."""
    numbers = _numbers_of(version)
    if numbers <= (0, 0, 0) or numbers >= _FIRST_KEPT:
        return "kept"
    return "deferrable" if numbers >= _FIRST_DEFERRABLE else "wrapped" if numbers >= _FIRST_WRAPPED else "flat"


def _tells_adapters(version: str | None, *, is_dynamo: bool) -> bool:
    """Do the events of this SGLang version name LoRA adapters? One that nobody knows counts as new."""
    numbers = _numbers_of(version)
    return numbers <= (0, 0, 0) or numbers >= (_FIRST_ADAPTERS_DYNAMO if is_dynamo else _FIRST_ADAPTERS)


def _binds(config: "_KvEventsConfig", is_undescribed: bool) -> bool:
    """Does the engine bind its event socket? As its publisher decides (spec/kv_events.md 1.1).

    is_undescribed: it is so old that it connects to 0.0.0.0.
    """
    if config.bind is not None:
        return config.bind
    endpoint = config.endpoint
    wildcards = ("*", "::") if is_undescribed else ("*", "::", "0.0.0.0")
    return any(part in endpoint for part in wildcards) or endpoint.startswith(("ipc://", "inproc://"))


def parse_model_info(body: bytes) -> str | None:
    """Model name in the body of `/model_info` (sglang 0.5.23 and later has one), else None.

    `model_path` is not taken for it: a worker may serve under another name, and `/v1/models` tells that one.
    Raises: WorkerInfoError when the body is no JSON object.
    """
    return _take(_object_of(body, "/model_info"), "served_model_name", str) or None


def parse_models(body: bytes) -> tuple[str | None, tuple[str, ...]]:
    """(served model, adapters) of `/v1/models`: the id of the first entry whose object is "model" and that has no parent, None when
    there is none; the ids of those that have one.

    Raises: WorkerInfoError when the body is no JSON object.
    """
    served, adapters = None, []
    for raw in _take(_object_of(body, "/v1/models"), "data", list[msgspec.Raw]) or []:
        try:
            entry = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, RecursionError):
            continue
        name = _take(entry, "id", str)
        if _take(entry, "object", str) != "model" or not name:
            continue
        if _take(entry, "parent", str):
            adapters.append(name)
        else:
            served = served or name
    return served, tuple(adapters)


def _object_of(body: bytes, path: str) -> dict[str, msgspec.Raw]:
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        pass
    # Outside the except block: the decoder's error knows the body, ours must not.
    raise WorkerInfoError(f"the answer to {path} is no JSON object ({len(body)} bytes)")


def _take(fields: dict[str, msgspec.Raw], name: str, type_: type[T]) -> T | None:
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=type_)
    except (msgspec.DecodeError, RecursionError):
        return None


def _object_text(fields: dict[str, msgspec.Raw], name: str) -> str:
    """A field that is a JSON object, or JSON text of one, as JSON in one spelling; "" for all else and for an empty one."""
    value = _take(fields, name, dict[str, Any]) or _take(fields, name, str)
    try:
        decoded = msgspec.json.decode(value, type=dict[str, Any]) if isinstance(value, str) else value
    except (msgspec.DecodeError, RecursionError):
        return ""
    return msgspec.json.encode(decoded).decode() if decoded else ""


def _positive(fields: dict[str, msgspec.Raw], name: str) -> int | None:
    value = _take(fields, name, int)
    return value if value is not None and 0 < value < 1 << 31 else None  # what is larger is no count of anything here


def _port(fields: dict[str, msgspec.Raw], name: str) -> int | None:
    value = _positive(fields, name)
    return value if value is not None and value <= _PORT_LIMIT else None


def _parse_descriptor(described: dict[str, msgspec.Raw] | None, worker_url: str) -> KvEndpoint | None:
    if described is None:
        return None
    publisher = _take(described, "publisher", str)
    host = _take(described, "endpoint_host", str)
    port_base = _port(described, "endpoint_port_base")
    block_size = _positive(described, "block_size")
    if publisher != "zmq" or not host or port_base is None or block_size is None:
        return None
    if host in _WILDCARD_HOSTS:
        host = host_of(worker_url)
        if host is None:
            return None
    return KvEndpoint(
        publisher=publisher,
        host=host.removeprefix("[").removesuffix("]"),
        port_base=port_base,
        topic=_take(described, "topic", str) or "",
        block_size=block_size,
        dp_size=_positive(described, "dp_size") or 1,
        replay_port_base=_port(described, "replay_endpoint_port_base"),
    )


def is_wildcard_host(host: str) -> bool:
    """Does an engine with this host in its endpoint listen on all addresses?"""
    return host in _WILDCARD_HOSTS


def host_of(worker_url: str) -> str | None:
    """Host of a worker's URL without brackets, None when there is none."""
    try:
        return urlsplit(worker_url if "://" in worker_url else f"http://{worker_url}").hostname
    except ValueError:
        return None


# ---- the producer's side ----


def kv_events_descriptor(
    config_json: str | None,
    *,
    page_size: int | None,
    dp_size: int,
    dcp_size: int = 1,
    attn_dp_size: int = 1,
    load_publish_endpoint: str | None = None,
) -> dict[str, Any] | None:
    """The `kv_events` value of `/server_info` as sglang 0.5.23 builds it, None where it publishes null.

    config_json: value of `--kv-events-config`; load_publish_endpoint: None, "off", "auto" or an endpoint.
    """
    config = _load_config(config_json)
    if config is None or config.publisher == "null" or not page_size or page_size < 0:
        return None
    live = split_tcp(config.endpoint)
    if live is None:
        return None
    host, port_base = live
    ranks = dp_size * attn_dp_size
    descriptor: dict[str, Any] = {
        "publisher": config.publisher,
        "endpoint_host": host,
        "endpoint_port_base": port_base,
        "topic": config.topic,
        "block_size": page_size * dcp_size,
        "dp_size": ranks,
    }
    replay = split_tcp(config.replay_endpoint or "")
    load_port_base = _load_port_base(load_publish_endpoint, host, port_base, replay, ranks)
    if load_port_base is not None:
        descriptor.update(load_endpoint_port_base=load_port_base, load_topic="load")
    if replay is not None:
        descriptor["replay_endpoint_port_base"] = replay[1]
    return descriptor


class _KvEventsConfig(msgspec.Struct):
    publisher: str = "null"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""
    format: str = "default"
    bind: bool | None = None


def _load_config(config_json: str | None) -> _KvEventsConfig | None:
    if not config_json:
        return None
    try:
        raw = msgspec.json.decode(config_json, type=dict[str, Any])
        # The engine's validation is as lenient with numbers in strings, and as strict with strings.
        for name in ("buffer_steps", "hwm", "max_queue_size"):
            if isinstance(raw.get(name), str):
                raw[name] = int(raw[name])
        config = msgspec.convert(raw, _KvEventsConfig)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return config if config.format in ("default", "dynamo") else None


def split_tcp(endpoint: str) -> tuple[str, int] | None:
    """(host, port) of `tcp://host:port`, None for whatever SGLang does not advertise."""
    host, colon, port_text = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not colon or not host:
        return None
    is_bracketed = host.startswith("[") and host.endswith("]")
    if ":" in host and not is_bracketed:
        return None
    try:
        port = int(port_text)
    except ValueError:
        return None
    return (host, port) if 1 <= port <= _PORT_LIMIT else None


def _load_port_base(endpoint: str | None, host: str, port_base: int, replay: tuple[str, int] | None, ranks: int) -> int | None:
    """First port of the load publishers; they may not share a port with the KV or the replay range."""
    taken = [port_base] if replay is None else [port_base, replay[1]]

    def is_free(candidate: int) -> bool:
        return all(abs(candidate - base) >= ranks for base in taken)

    if endpoint == "auto":
        if host not in _WILDCARD_HOSTS:
            return None  # such an engine dials out, and "auto" has nobody to dial
        after_kv = port_base + ranks
        if is_free(after_kv):
            return after_kv
        return replay[1] + ranks if replay else None
    explicit = split_tcp(endpoint or "")
    return explicit[1] if explicit is not None and is_free(explicit[1]) else None
