"""The settings of `sglfast modelexpress serve`: one dataclass is the source of flags, help and validation.

Runs in: the metadata service. Contract: units are in the names. A setting that cannot work raises ConfigError and names itself.
Defaults of the timers are upstream's (spec/modelexpress.md 2.7).
"""

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sglfast.errors import ConfigError
from sglfast.modelexpress.schema import DEFAULT_PORT
from sglfast.modelexpress.source_id import FORMS
from sglfast.modelexpress.storage import DEFAULT_STORAGE

DEFAULT_METRICS_PORT = 9401


def _setting(default: Any, help_text: str, **extra: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text, **extra})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Settings of the service. Field `a_b` is the flag `--a-b`."""

    host: str = _setting("127.0.0.1", "address to listen on (0.0.0.0 for all)", group="server")
    port: int = _setting(DEFAULT_PORT, "gRPC port, without TLS; 0 picks a free one", group="server", low=0, high=65535)
    metrics_port: int = _setting(
        DEFAULT_METRICS_PORT, "HTTP port of /metrics and /healthz; 0 picks a free one, -1 = none", group="server", low=-1, high=65535
    )
    shutdown_grace_secs: float = _setting(10.0, "at SIGTERM, time for calls in flight to finish", group="server", low=0.0, high=3600.0)
    storage: str = _setting(
        DEFAULT_STORAGE, "where records live: the path of an SQLite file of this service's own, or redis://host:6379/0 (also rediss://, "
        "unix://) for several services that share one Redis or Valkey, which loses nothing with `appendonly yes` and "
        "`appendfsync always`", group="storage",
    )  # fmt: skip
    redis_prefix: str = _setting(
        "sglfast-mx", "what names of keys in Redis begin with; services with the same one are one", group="storage"
    )
    max_records: int = _setting(100_000, "records (ranks of workers) at most; a publish beyond is refused", group="storage", low=1)
    source_id_form: str = _setting(
        "current", "how mx_source_id is computed: current = servers since 0.5.0, april = 0.3.x (April 2026)", group="sources", choices=FORMS
    )
    heartbeat_timeout_secs: float = _setting(
        90.0, "a source that was not heard of for longer is STALE, and no READY listing shows it", group="sources", low=0.1
    )
    scan_interval_secs: float = _setting(30.0, "time between looks for such sources; the first is at start", group="sources", low=0.05)
    gc_timeout_secs: float = _setting(
        3600.0, "a STALE source is deleted after this time, and so is one that never said READY", group="sources", low=0.1
    )
    keep_alive: tuple[str, ...] = _setting(
        (), "sources whose seeds send no heartbeat and stay READY without (SGLang of April 2026): model names, mx_source_ids, or `all`; "
        "a seed that did send a second READY is not among them", group="sources",
    )  # fmt: skip
    keep_alive_health_url: str | None = _setting(
        None, "they stay READY only while this URL answers 200, such as http://{host}:30000/health; {host} is taken from the worker's "
        "published addresses; of one host, source and rank only the newest stays", group="sources",
    )  # fmt: skip
    max_message_bytes: int = _setting(100 << 20, "largest message, in and out", group="limits", low=1024, high=1 << 30)
    max_calls: int = _setting(4096, "calls in flight at most, of all clients", group="limits", low=1)
    max_calls_per_client: int = _setting(512, "calls in flight at most, of one client address", group="limits", low=1)
    max_inflight_bytes_per_client: int = _setting(
        1 << 30, "bytes of requests in flight at most, of one client address", group="limits", low=1024
    )
    allowed_service_accounts: tuple[str, ...] = _setting(
        (), "Kubernetes service accounts that may call, as namespace:name; giving any makes every call but health need a token",
        group="tokens",
    )  # fmt: skip
    token_audiences: tuple[str, ...] = _setting((), "audiences that such a token must be made for", group="tokens")
    token_cache_secs: float = _setting(60.0, "time for which a token that was found good is not asked about again", group="tokens", low=0.0)
    kubernetes_api: str = _setting("https://kubernetes.default.svc", "where tokens are reviewed", group="tokens")
    log_level: str = _setting("info", "log level", group="logs", choices=("debug", "info", "warning", "error"))
    log_format: str = _setting("text", "log format", group="logs", choices=("text", "json"))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each setting, grouped as the fields say."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in dataclasses.fields(ServeSettings):
        meta = setting.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        text, kwargs = meta["help"].replace("%", "%%"), dict[str, Any](dest=setting.name, default=argparse.SUPPRESS)
        if isinstance(setting.default, tuple):
            kwargs |= {"nargs": "+", "metavar": "NAME"}
        elif "choices" in meta:
            kwargs |= {"choices": meta["choices"]}
        else:
            kind = str if setting.default is None else type(setting.default)
            kwargs |= {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
        if setting.default not in (None, ()):
            text += f" (default: {setting.default})"
        group.add_argument("--" + setting.name.replace("_", "-"), help=text, **kwargs)


def from_args(namespace: argparse.Namespace) -> ServeSettings:
    """The checked settings of a parsed command line. Raises ConfigError."""
    known = {setting.name for setting in dataclasses.fields(ServeSettings)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(namespace).items() if name in known
    }
    return check(ServeSettings(**values))


def check(settings: ServeSettings) -> ServeSettings:
    """Return the settings. Raises ConfigError for what cannot work."""
    for setting in dataclasses.fields(ServeSettings):
        value, meta = getattr(settings, setting.name), setting.metadata
        flag = "--" + setting.name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag} {value}: must be a finite number")
        if "low" in meta and value < meta["low"]:
            raise ConfigError(f"{flag} {value}: must be at least {meta['low']}")
        if "low" in meta and value > (high := meta.get("high", sys.maxsize)):
            raise ConfigError(f"{flag} {value}: must be at most {high}")
        if "choices" in meta and value not in meta["choices"]:
            raise ConfigError(f"{flag} {value}: must be one of {', '.join(meta['choices'])}")
    if settings.scan_interval_secs > settings.heartbeat_timeout_secs and settings.keep_alive:
        raise ConfigError(
            f"--scan-interval-secs {settings.scan_interval_secs}: must not be above --heartbeat-timeout-secs with --keep-alive, "
            "seeds are renewed at each scan"
        )
    if not settings.storage:
        raise ConfigError("--storage: give the path of a file or the URL of a Redis")
    if not settings.redis_prefix or set(settings.redis_prefix) & set("{}"):
        raise ConfigError(f"--redis-prefix {settings.redis_prefix}: must be some text without braces")
    if settings.keep_alive_health_url is not None:
        _check_health_url(settings)
    for name in settings.allowed_service_accounts:
        if name.count(":") != 1 or not all(name.split(":")):
            raise ConfigError(f"--allowed-service-accounts {name}: must look like namespace:name")
    if settings.token_audiences and not settings.allowed_service_accounts:
        raise ConfigError("--token-audiences needs --allowed-service-accounts: without it no token is asked for")
    return settings


def _check_health_url(settings: ServeSettings) -> None:
    url = settings.keep_alive_health_url or ""
    if not settings.keep_alive:
        raise ConfigError("--keep-alive-health-url needs --keep-alive: it says which seeds it is for")
    try:
        parts = urlsplit(url.replace("{host}", "host"))
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or set(url.replace("{host}", "")) & set("{} "):
        raise ConfigError(f"--keep-alive-health-url {url}: must look like http://{{host}}:30000/health")
