"""The settings of `sglfast serve`: one dataclass is the source of flags, help and validation.

Runs in: control (from the command line), index and shards (handed over as JSON through an inherited descriptor).
Contract: units are in the names. A setting that cannot work raises ConfigError at start and names itself.
"""

import argparse
import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from sglfast.errors import ConfigError

POLICIES = ("auto", "cache_aware", "round_robin", "random", "power_of_two", "least_load")


def _setting(default: Any, help_text: str, **extra: Any) -> Any:
    metadata = {"help": help_text, **extra}
    if isinstance(default, (list, tuple)):
        return dataclasses.field(default=tuple(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of the router. Field `a_b` is the flag `--a-b`."""

    worker_urls: tuple[str, ...] = _setting((), "base URLs of the workers, such as http://10.0.0.5:30000", group="workers")
    host: str = _setting("127.0.0.1", "address to listen on (0.0.0.0 for all)", group="server")
    port: int = _setting(30000, "port to listen on; 0 picks a free one", group="server", low=0, high=65535)
    shards: int = _setting(0, "serving processes; 0 = one a core", group="server", low=0, high=256)
    max_payload_size: int = _setting(64 << 20, "largest request body in bytes", group="server", low=1)
    max_header_bytes: int = _setting(64 << 10, "largest request head in bytes", group="server", low=1024, high=1 << 20)
    header_timeout_secs: float = _setting(10.0, "a request head must arrive within this time", group="server", low=0.1)
    body_timeout_secs: float = _setting(30.0, "longest pause inside a request body", group="server", low=0.1)
    idle_timeout_secs: float = _setting(75.0, "an idle client connection is closed after this time", group="server", low=0.1)
    send_timeout_secs: float = _setting(120.0, "a client that takes nothing of its answer for this long is cut", group="server", low=0.1)
    shutdown_grace_secs: float = _setting(30.0, "at SIGTERM, time for requests in flight to finish", group="server", low=0.0, high=3600.0)
    policy: str = _setting(
        "auto", "how a worker is chosen; auto = cache_aware as soon as a worker publishes KV events, else least_load",
        group="routing", choices=POLICIES,
    )  # fmt: skip
    tokenizer_path: str | None = _setting(
        None,
        "folder with tokenizer.json and tokenizer_config.json of the model; without it cache_aware goes by what was sent where",
        group="routing",
    )
    prompt_cache_bytes: int = _setting(
        32 << 20, "memory of each shard for tokenized pieces of prompts, so that a conversation pays for its newest message only; "
        "0 = none", group="routing", low=0,
    )  # fmt: skip
    cache_threshold: float = _setting(
        0.5, "share of the prompt that a worker must hold (or, without KV events, was sent) for its cache to decide alone", group="routing",
        low=0.0, high=1.0,
    )  # fmt: skip
    balance_abs_threshold: int = _setting(
        32, "cache is ignored when in-flight requests of workers differ by more than this ...", group="routing", low=0
    )
    balance_rel_threshold: float = _setting(1.1, "... and the busiest has more than this times the idlest", group="routing", low=1.0)
    kv_listen: str | None = _setting(
        None, "where to listen for the KV events of workers that connect out, such as tcp://0.0.0.0:5557; rank r arrives at its port + r, "
        "workers are told apart by their topics", group="routing",
    )  # fmt: skip
    kv_index_blocks: int = _setting(
        2 << 20, "blocks that the KV index holds at most (about 45 bytes each at 64 ranks)", group="routing",
        low=1024, high=1 << 32,
    )  # fmt: skip
    prediction_blocks: int = _setting(
        1 << 18, "beginnings of prompts that are remembered as sent to a worker (32 bytes each at 64 ranks): until its KV events tell "
        "more, or instead of them where it publishes none; 0 = none", group="routing", low=0, high=1 << 28,
    )  # fmt: skip
    prediction_worker_blocks: int = _setting(
        1 << 16, "... of which a rank that publishes no KV events has so many at most, about what its cache can hold (one stands for 128 "
        "bytes of text or more)", group="routing", low=1,
    )  # fmt: skip
    max_ranks: int = _setting(
        0, "ranks (workers x data-parallel size) in the KV index: multiple of 64 up to 1024; 0 = by the workers", group="routing",
        low=0, high=1024,
    )  # fmt: skip
    max_workers: int = _setting(1024, "workers at most", group="workers", low=1, high=65536)
    connect_timeout_secs: float = _setting(5.0, "time to connect to a worker", group="upstream", low=0.05)
    request_timeout_secs: float = _setting(300.0, "time until a worker begins its answer", group="upstream", low=0.05)
    stream_idle_timeout_secs: float = _setting(180.0, "longest pause inside a worker's answer", group="upstream", low=0.05)
    upstream_keepalive_secs: float = _setting(
        3.0, "an idle connection to a worker is closed after this time; keep it below the workers' own limit (5 s in uvicorn)",
        group="upstream", low=0.0,
    )  # fmt: skip
    health_check_interval_secs: float = _setting(5.0, "time between health checks of a worker", group="workers", low=0.1)
    health_check_timeout_secs: float = _setting(5.0, "a health check must answer within this time", group="workers", low=0.1)
    health_failure_threshold: int = _setting(3, "failed checks in a row that take a worker out", group="workers", low=1)
    health_success_threshold: int = _setting(1, "good checks in a row that bring it back", group="workers", low=1)
    health_check_endpoint: str = _setting("/health", "path of the health check", group="workers")
    introspect_timeout_secs: float = _setting(2.0, "time for a worker's /server_info", group="workers", low=0.05)
    log_level: str = _setting("info", "log level", group="logs", choices=("debug", "info", "warning", "error"))
    log_format: str = _setting("text", "log format", group="logs", choices=("text", "json"))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each setting, grouped as the fields say."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in dataclasses.fields(ServeConfig):
        meta = setting.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        kwargs: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS}
        text = meta["help"].replace("%", "%%")
        if setting.name == "worker_urls":
            kwargs |= {"nargs": "+", "metavar": "URL"}
        elif "choices" in meta:
            kwargs |= {"choices": meta["choices"]}
            text += f" (default: {setting.default})"
        else:
            kind = type(setting.default) if setting.default is not None else str
            kwargs |= {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
            text += f" (default: {setting.default})" if setting.default not in (None, "") else ""
        group.add_argument("--" + setting.name.replace("_", "-"), help=text, **kwargs)


def from_args(namespace: argparse.Namespace) -> ServeConfig:
    """The checked settings of a parsed command line. Raises ConfigError."""
    known = {setting.name for setting in dataclasses.fields(ServeConfig)}
    values = {name: value for name, value in vars(namespace).items() if name in known}
    if "worker_urls" in values:
        values["worker_urls"] = tuple(values["worker_urls"])
    config = ServeConfig(**values)
    return check(config)


def check(config: ServeConfig) -> ServeConfig:
    """Refuse what cannot work; fill in what depends on the machine (`shards`, `max_ranks`). Raises ConfigError."""
    for setting in dataclasses.fields(ServeConfig):
        value, meta = getattr(config, setting.name), setting.metadata
        flag = "--" + setting.name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag} {value}: must be a finite number")
        if "low" in meta and value < meta["low"]:
            raise ConfigError(f"{flag} {value}: must be at least {meta['low']}")
        if "low" in meta and value > (high := meta.get("high", sys.maxsize)):
            raise ConfigError(f"{flag} {value}: must be at most {high}")
        if "choices" in meta and value not in meta["choices"]:
            raise ConfigError(f"{flag} {value}: must be one of {', '.join(meta['choices'])}")
    urls = tuple(_worker_url(text) for text in config.worker_urls)
    if not urls:
        raise ConfigError("--worker-urls: give at least one worker URL, such as --worker-urls http://127.0.0.1:30001")
    places = [url.removesuffix(":80") for url in urls]
    for url, place in zip(urls, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"--worker-urls: {url} is given twice")
    if len(urls) > config.max_workers:
        raise ConfigError(f"--worker-urls: {len(urls)} workers are more than --max-workers {config.max_workers}")
    if config.policy == "cache_aware" and config.tokenizer_path is None and not config.prediction_blocks:
        raise ConfigError(
            "--policy cache_aware with --prediction-blocks 0 needs --tokenizer-path: without the model's tokenizer and without predictions "
            "nothing is known of the workers' caches"
        )
    if config.tokenizer_path is not None and not os.path.exists(config.tokenizer_path):
        raise ConfigError(f"--tokenizer-path {config.tokenizer_path}: no such file or folder")
    if config.kv_listen is not None and not _is_tcp_address(config.kv_listen):
        raise ConfigError(f"--kv-listen {config.kv_listen}: must look like tcp://0.0.0.0:5557")
    if not config.health_check_endpoint.startswith("/"):
        raise ConfigError(f"--health-check-endpoint {config.health_check_endpoint}: must begin with /")
    max_ranks = config.max_ranks or min(1024, max(64, -(-4 * len(urls) // 64) * 64))
    if max_ranks % 64:
        raise ConfigError(f"--max-ranks {max_ranks}: must be a multiple of 64")
    shards = config.shards or len(os.sched_getaffinity(0))
    return dataclasses.replace(config, worker_urls=urls, max_ranks=max_ranks, shards=shards)


def _is_tcp_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme == "tcp" and bool(parts.hostname and parts.port) and not parts.path
    except ValueError:
        return False


def _worker_url(text: str) -> str:
    text = text.strip().rstrip("/")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"--worker-urls {text}: {error}") from None
    if parts.scheme == "https":
        raise ConfigError(f"--worker-urls {text}: TLS to workers is not supported yet; use http://")
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(f"--worker-urls {text}: must look like http://host:port")
    if port == 0:
        raise ConfigError(f"--worker-urls {text}: port 0 is no port that a worker can listen on")
    # Also what is empty: `http://host?`, `http://@host`, `http://host:`; and blanks and control characters.
    if text.partition("://")[2] != parts.netloc or not set(parts.netloc).isdisjoint("@ ") or parts.netloc.endswith(":"):
        raise ConfigError(f"--worker-urls {text}: give only scheme, host and port, such as http://{parts.hostname}:{port or 80}")
    return f"http://{parts.netloc.lower()}"


def to_json(config: ServeConfig) -> bytes:
    """The settings as JSON, for a child process."""
    return msgspec.json.encode(config)


def from_json(data: bytes) -> ServeConfig:
    """The settings that `to_json` wrote; they were checked by the parent."""
    return msgspec.json.decode(data, type=ServeConfig)
