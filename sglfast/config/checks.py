"""What settings cannot work, alone or together; what depends on the machine is filled in.

Runs in: control, at start and at SIGHUP. Contract: a refusal names the flag and what would be right. `check` is idempotent.
"""

import dataclasses
import errno
import os
from urllib.parse import urlsplit

from sglfast.config.fields import FIELDS, check_limits, flag_of
from sglfast.config.settings import ServeConfig
from sglfast.config.sglang_router import OTHER_POLICIES
from sglfast.config.worker_urls import NamedWorker, named_workers, prefill_text
from sglfast.errors import ConfigError
from sglfast.wire.kv_endpoint import parse_kv_settings

_PROMETHEUS_HOST, _PROMETHEUS_PORT = "0.0.0.0", 29000
# Of workers that come later nothing is known. A block costs 128 bytes at 256 ranks, 32 at 64; too few ranks cost the KV awareness of
# whoever comes last, until a new start.
_RANKS_WITHOUT_WORKERS = 256
_FILES = ("chat_template", "api_key_file", "tls_cert_path", "tls_key_path", "client_cert_path", "client_key_path", "ca_cert_paths")
_PAIRS = (("tls_cert_path", "tls_key_path"), ("client_cert_path", "client_key_path"))
_HEADER_NAME_BYTES = frozenset("abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~")  # RFC 9110 5.6.2, lower case
_ROLES = ("admin", "user")


def check(config: ServeConfig) -> ServeConfig:
    """Refuse what cannot work; fill in what depends on the machine (`shards`, `max_ranks`) or on others. Raises ConfigError."""
    for name in ("policy", "prefill_policy", "decode_policy"):
        policy = getattr(config, name)
        if policy in OTHER_POLICIES:
            raise ConfigError(f"{flag_of(name)} {policy}: is not offered, {OTHER_POLICIES[policy]}")
    for field in FIELDS.values():
        check_limits(field, getattr(config, field.name))
    if config.dp_aware and config.disable_dp_steering:
        raise ConfigError("--dp-aware and --disable-dp-steering: choose the data-parallel rank, or leave it to the workers, not both")
    workers = _check_workers(config)
    config = dataclasses.replace(
        config,
        worker_urls=tuple(worker.url for worker in workers if worker.role == "regular"),
        prefill=tuple(prefill_text(worker) for worker in workers if worker.role == "prefill"),
        decode=tuple(worker.url for worker in workers if worker.role == "decode"),
        tokenizer_path=_check_model(config),
        request_id_headers=tuple(name.lower() for name in config.request_id_headers),
        retry_max_retries=1 if config.disable_retries else max(1, config.retry_max_retries),
        priority_header=config.priority_header.lower() if config.priority_header else None,
        cors_allowed_origins=tuple(_origin(text) for text in config.cors_allowed_origins),
    )
    _check_addresses(config)
    _check_files(config)
    _check_headers(config)
    _check_keys(config)
    max_ranks = config.max_ranks or (min(1024, max(64, -(-4 * len(workers) // 64) * 64)) if workers else _RANKS_WITHOUT_WORKERS)
    if max_ranks % 64:
        raise ConfigError(f"--max-ranks {max_ranks}: must be a multiple of 64")
    has_metrics_port = config.prometheus_port is not None or config.prometheus_host is not None
    return dataclasses.replace(
        config,
        max_ranks=max_ranks,
        shards=config.shards or len(os.sched_getaffinity(0)),
        prometheus_host=(config.prometheus_host or _PROMETHEUS_HOST) if has_metrics_port else None,
        prometheus_port=(_PROMETHEUS_PORT if config.prometheus_port is None else config.prometheus_port) if has_metrics_port else None,
    )


def _check_workers(config: ServeConfig) -> tuple[NamedWorker, ...]:
    workers = named_workers(config.worker_urls, config.prefill, config.decode)
    places = [worker.url.removesuffix(":80") for worker in workers]
    flags = {"regular": "--worker-urls", "prefill": "--prefill", "decode": "--decode"}
    for worker, place in zip(workers, places, strict=True):
        if places.count(place) > 1:
            given = dict.fromkeys(flags[other.role] for other, its_place in zip(workers, places, strict=True) if its_place == place)
            raise ConfigError(f"{', '.join(given)}: {worker.url} is given twice")
    if len(workers) > config.max_workers:
        given = dict.fromkeys(flags[worker.role] for worker in workers)
        raise ConfigError(f"{', '.join(given)}: {len(workers)} workers are more than --max-workers {config.max_workers}")
    if not config.health_check_endpoint.startswith("/"):
        raise ConfigError(f"--health-check-endpoint {config.health_check_endpoint}: must begin with /")
    return workers


def _check_model(config: ServeConfig) -> str | None:
    """Where the tokenizer is, None without one."""
    if config.tokenizer_path is not None and not os.path.exists(config.tokenizer_path):
        raise ConfigError(f"--tokenizer-path {config.tokenizer_path}: no such file or folder")
    if config.tokenizer_path is not None and os.path.isdir(config.tokenizer_path) and not _has_tokenizer(config.tokenizer_path):
        raise ConfigError(f"--tokenizer-path {config.tokenizer_path}: there is no tokenizer.json in this folder")
    if config.model_path is not None and not os.path.isdir(config.model_path):
        raise ConfigError(f"--model-path {config.model_path}: no such folder; give the folder that holds the model's tokenizer.json")
    if config.tokenizer_path is None and config.model_path is not None and not _has_tokenizer(config.model_path):
        raise ConfigError(f"--model-path {config.model_path}: there is no tokenizer.json in this folder; or name it with --tokenizer-path")
    where = config.tokenizer_path or config.model_path
    if where is None and config.chat_template is not None:
        raise ConfigError("--chat-template needs --tokenizer-path: without a tokenizer no prompt is rendered")
    return where


def _has_tokenizer(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "tokenizer.json"))


def _check_addresses(config: ServeConfig) -> None:
    if config.kv_listen is not None and not _is_tcp_address(config.kv_listen):
        raise ConfigError(f"--kv-listen {config.kv_listen}: must look like tcp://0.0.0.0:5557")
    parse_kv_settings(config.kv_endpoint)
    ports = [("port", config.port), ("admin_port", config.admin_port), ("prometheus_port", config.prometheus_port)]
    for place, (name, port) in enumerate(ports):
        for other, other_port in ports[:place]:
            if port and port == other_port:
                raise ConfigError(f"{flag_of(name)} {port}: is the same as {flag_of(other)}")


def _check_files(config: ServeConfig) -> None:
    for one, other in (*_PAIRS, *(pair[::-1] for pair in _PAIRS)):
        if getattr(config, one) is not None and getattr(config, other) is None:
            raise ConfigError(f"{flag_of(one)} needs {flag_of(other)}: a certificate and its private key work only together")
    for name in _FILES:
        value = getattr(config, name)
        for path in value if isinstance(value, tuple) else (value,):
            if path is not None and not os.access(path, os.R_OK):
                reason = os.strerror(errno.EACCES if os.path.exists(path) else errno.ENOENT)
                raise ConfigError(f"{flag_of(name)} {path}: cannot be read ({reason})")
            if path is not None and os.path.isdir(path):
                raise ConfigError(f"{flag_of(name)} {path}: is a folder, not a file")
    if config.log_dir is not None and os.path.exists(config.log_dir) and not os.path.isdir(config.log_dir):
        raise ConfigError(f"--log-dir {config.log_dir}: is no folder")


def _check_headers(config: ServeConfig) -> None:
    named = [("request_id_headers", name) for name in config.request_id_headers]
    if config.priority_header is not None:
        named.append(("priority_header", config.priority_header))
    for field, name in named:
        if not name or not _HEADER_NAME_BYTES.issuperset(name.lower()):
            raise ConfigError(f"{flag_of(field)} {name}: is no name of a header")


def _origin(text: str) -> str:
    """An origin as browsers write it (RFC 6454 6.2), `*` or `null`."""
    origin = text.strip().lower().removesuffix("/")
    try:
        parts = urlsplit(origin)
        is_origin = bool(parts.scheme and parts.hostname) and origin == f"{parts.scheme}://{parts.netloc}" and "@" not in parts.netloc
    except ValueError:
        is_origin = False
    if not is_origin and origin not in ("*", "null"):
        raise ConfigError(f"--cors-allowed-origins {text}: must look like https://page.example.com, without a path; * means any")
    return origin


def _check_keys(config: ServeConfig) -> None:
    """Never show a key: a message gets into logs."""
    for name in ("api_key", "worker_api_key", "admin_api_key"):
        key = getattr(config, name)
        if key is not None and not is_key(key):
            raise ConfigError(f"{flag_of(name)}: must be visible ASCII characters without blanks")
    for place, entry in enumerate(config.api_keys, 1):
        name, colon, key = entry.partition(":")
        if not (name and colon and is_key(key)):
            raise ConfigError(f"--api-keys: entry {place} must look like NAME:KEY")
    for place, entry in enumerate(config.control_plane_api_keys, 1):
        parts = entry.split(":", 3)
        if len(parts) != 4 or not parts[0] or not is_key(parts[3]):
            raise ConfigError(f"--control-plane-api-keys: entry {place} must look like ID:NAME:ROLE:KEY")
        if parts[2].lower() not in _ROLES:
            raise ConfigError(f"--control-plane-api-keys: the role of entry {place} must be one of {', '.join(_ROLES)}")


def is_key(text: str) -> bool:
    """Whether a key can be sent in a header (RFC 6750: visible ASCII)."""
    return bool(text) and all("!" <= letter <= "~" for letter in text)


def _is_tcp_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme == "tcp" and bool(parts.hostname and parts.port) and not parts.path
    except ValueError:
        return False
