"""The settings of `sglfast serve`: the one place that says which there are.

Runs in: control (made from flags, environment and file), index and shards (handed over as JSON through an inherited descriptor).
Contract: field `a_b` is the flag `--a-b`, the environment's `SGLFAST_A_B` and the file's `a_b`; its metadata is the help, the limits and
    the documentation. Units are in the names. Names, value forms and defaults are those of sglang-router 0.3.2 where it has
    the same thing, unless docs/sglang-router.md says why not.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import msgspec

POLICIES = ("auto", "cache_aware", "round_robin", "random", "power_of_two", "least_load")
REQUEST_ID_HEADERS = ("x-request-id", "x-correlation-id", "x-trace-id", "request-id")


def _setting(default: Any, help_text: str, group: str, **extra: Any) -> Any:
    """A field. Metadata, all optional but help and group:

    low, high   limits of a number, both allowed
    choices     the values; same_as: other spellings of a value -> the value
    also        other flags that mean this field
    repeats     a list to which the flag adds each time it is given: "words" each of its words, "line" all its words as one entry
    section     where the sgl-router's file has it, such as "server.port"
    metavar     what the help calls the value
    split       how the environment's text is cut into a list, a regular expression (default: commas and white space)
    secret      never printed
    live        SIGHUP changes it in the running program
    """
    metadata = {"help": help_text, "group": group, **extra}
    return dataclasses.field(default=default, metadata=metadata, repr="secret" not in extra)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of the router."""

    # fmt: off
    worker_urls: tuple[str, ...] = _setting(
        (), "base URLs of the workers, such as http://10.0.0.5:30000", "workers", metavar="URL", section="discovery.static_urls.urls",
        live=True)
    pd_disaggregation: bool = _setting(
        False, "there are prefill and decode workers, or will be: named by --prefill and --decode or added by /workers", "workers",
        live=True)
    prefill: tuple[str, ...] = _setting(
        (), "a prefill worker: its URL and the port where decode workers fetch prompts, `none` for none; without one as the worker says "
        "itself; given once for each worker", "workers", metavar="URL [PORT|none]", split=",", repeats="line", live=True)
    decode: tuple[str, ...] = _setting(
        (), "base URL of a decode worker; given once for each worker", "workers", metavar="URL", repeats="words", live=True)
    max_workers: int = _setting(1024, "workers at most", "workers", low=1, high=65536)
    health_check_endpoint: str = _setting("/health", "path of the health check", "workers", live=True)
    health_check_interval_secs: float = _setting(5.0, "time between health checks of a worker", "workers", low=0.1, live=True)
    health_check_timeout_secs: float = _setting(5.0, "a health check must answer within this time", "workers", low=0.1, live=True)
    health_failure_threshold: int = _setting(3, "failed checks in a row that take a worker out", "workers", low=1, live=True)
    health_success_threshold: int = _setting(1, "good checks in a row that bring it back", "workers", low=1, live=True)
    disable_health_check: bool = _setting(False, "take every worker for healthy, without asking", "workers", live=True)
    worker_startup_timeout_secs: float = _setting(
        1800.0, "a worker that is not ready this long after it was added is called failed; it is asked on", "workers", low=1.0, live=True)
    worker_startup_check_interval: float = _setting(
        5.0, "seconds between checks of a worker that was never ready, after the quick ones of its first 10 s", "workers", low=0.1,
        live=True)
    worker_drain_timeout_secs: float = _setting(
        600.0, "a worker that is being removed has this long to finish its requests, then they are cut", "workers", low=0.0, high=86400.0,
        live=True)
    introspect_timeout_secs: float = _setting(2.0, "time for a worker's /server_info", "workers", low=0.05, live=True)

    host: str = _setting("0.0.0.0", "address to listen on (127.0.0.1 for this machine only)", "server", section="server.host")
    port: int = _setting(30000, "port to listen on; 0 picks a free one", "server", low=0, high=65535, section="server.port")
    shards: int = _setting(0, "serving processes; 0 = one a core", "server", low=0, high=256)
    max_connections: int = _setting(
        32768, "client connections of each shard at most; fewer where its limit of open files is lower than that and an eighth", "server",
        low=1, high=1 << 20, live=True)
    max_payload_size: int = _setting(64 << 20, "largest request body in bytes", "server", low=1, live=True)
    max_buffered_bytes: int = _setting(
        1 << 30, "bytes of request bodies that each shard holds at most, whole or not yet; above, bodies are answered 503. Not less than "
        "--max-payload-size", "server", low=1, live=True)
    max_header_bytes: int = _setting(64 << 10, "largest request head in bytes", "server", low=1024, high=1 << 20, live=True)
    max_url_bytes: int = _setting(16 << 10, "longest request target in bytes", "server", low=64, high=1 << 20, live=True)
    header_timeout_secs: float = _setting(10.0, "a request head must arrive within this time", "server", low=0.1, live=True)
    body_timeout_secs: float = _setting(
        30.0, "longest pause inside a request body; 100 bytes a second must come over this time", "server", low=0.1, live=True)
    idle_timeout_secs: float = _setting(75.0, "an idle client connection is closed after this time", "server", low=0.1, live=True)
    send_timeout_secs: float = _setting(
        120.0, "a client that takes nothing of its answer for this long is cut", "server", low=0.1, live=True)
    shutdown_grace_secs: float = _setting(
        180.0, "at SIGTERM, time for requests in flight to finish", "server", low=0.0, high=3600.0, also=("shutdown_grace_period_secs",),
        live=True)
    request_id_headers: tuple[str, ...] = _setting(
        REQUEST_ID_HEADERS, "request headers that may hold the request's id, the first one present counts", "server", metavar="NAME",
        live=True)
    passthrough: bool = _setting(False, "relay POST requests to unknown paths under /v1/ too", "server", live=True)

    policy: str = _setting(
        "auto", "how a worker is chosen; auto = cache_aware as soon as a worker publishes KV events, else least_load",
        "routing", choices=POLICIES, same_as={"cache_aware_zmq": "cache_aware"}, section="models.policy", live=True)
    prefill_policy: str | None = _setting(
        None, "how a prefill worker is chosen, if not by --policy", "routing", choices=POLICIES, same_as={"cache_aware_zmq": "cache_aware"},
        live=True)
    decode_policy: str | None = _setting(
        None, "how a decode worker is chosen; default: one on the prefill worker's host unless it has far more to do than the others, else "
        "the least loaded", "routing", choices=POLICIES, same_as={"cache_aware_zmq": "cache_aware"}, live=True)
    tokenizer_path: str | None = _setting(
        None, "folder with tokenizer.json and tokenizer_config.json of the model; without it cache_aware goes by what was sent, by KV "
        "events only for prompts that are token ids", "routing",
        metavar="PATH", section="models.tokenizer_path")
    model_path: str | None = _setting(
        None, "the model's folder; its tokenizer is used when --tokenizer-path is not given", "routing", metavar="PATH")
    chat_template: str | None = _setting(
        None, "file with the chat template (Jinja) that the workers use instead of the model's own", "routing", metavar="PATH")
    key_route: str = _setting(
        "auto", "how blocks are named: sha256 = by the engines' own chain, tokens = by their tokens, auto = as each worker allows",
        "routing", choices=("auto", "sha256", "tokens"))
    prompt_cache_bytes: int = _setting(
        32 << 20, "memory of each shard for tokenized pieces of prompts, so that a conversation pays for its newest message only; 0 = none",
        "routing", low=0, also=("tokenizer_cache_l1_max_memory",))
    cache_threshold: float = _setting(
        0.5, "share of the prompt that a worker must hold (or, without KV events, was sent) for its cache to decide alone", "routing",
        low=0.0, high=1.0, section="models.cache_aware.cache_threshold", live=True)
    balance_abs_threshold: int = _setting(
        32, "cache is ignored when in-flight requests of workers differ by more than this ...", "routing",
        low=0, section="models.cache_aware.balance_abs_threshold", live=True)
    balance_rel_threshold: float = _setting(
        1.1, "... and the busiest has more than this times the idlest", "routing",
        low=1.0, section="models.cache_aware.balance_rel_threshold", live=True)
    dp_aware: bool = _setting(
        False, "choose the data-parallel rank too, whatever the policy; without it only where cache_aware knows the ranks' KV caches",
        "routing", live=True)
    disable_dp_steering: bool = _setting(
        False, "let workers choose the data-parallel rank, also where cache_aware knows which of them holds the prompt", "routing",
        live=True)
    kv_listen: str | None = _setting(
        None, "where to listen for the KV events of workers that connect out, such as tcp://0.0.0.0:5557; rank r arrives at its port + r, "
        "workers are told apart by their topics", "routing", metavar="ADDRESS")
    kv_endpoint: tuple[str, ...] = _setting(
        (), "where workers publish KV events that do not tell it themselves, such as vLLM's: [URL=]tcp://HOST:PORT"
        "[,replay=PORT][,topic=TEXT][,block_size=N][,dp_size=N]; without a URL for all such workers, HOST * is the worker's own",
        "routing", metavar="ENDPOINT", split=r"\s+")
    kv_index_blocks: int = _setting(
        2 << 20, "blocks that the KV index holds at most (about 45 bytes each at 64 ranks)", "routing", low=1024, high=1 << 31)
    prediction_blocks: int = _setting(
        1 << 18, "beginnings of prompts that are remembered as sent to a worker (32 bytes each at 64 ranks): until its KV events tell "
        "more, or instead of them where it publishes none; 0 = none", "routing", low=0, high=1 << 28)
    prediction_worker_blocks: int = _setting(
        1 << 16, "... of which a rank that publishes no KV events has so many at most, about what its cache can hold (one stands for "
        "128 bytes of text or more)", "routing", low=1)
    max_ranks: int = _setting(
        0, "ranks (workers x data-parallel size) in the KV index: multiple of 64 up to 1024; 0 = by the workers", "routing",
        low=0, high=1024)

    connect_timeout_secs: float = _setting(5.0, "time to connect to a worker", "upstream", low=0.05, live=True)
    request_timeout_secs: float = _setting(
        1800.0, "time until a worker begins its answer", "upstream", low=0.05, section="proxy.request_timeout_secs", live=True)
    stream_idle_timeout_secs: float = _setting(180.0, "longest pause inside a worker's answer", "upstream", low=0.05, live=True)
    stale_request_timeout_secs: float = _setting(
        1800.0, "a request in flight for longer is ended and no longer counted as load", "upstream",
        low=1.0, section="active_load.stale_request_timeout_secs", live=True)
    disable_abort_on_disconnect: bool = _setting(
        False, "do not tell SGLang workers by /abort_request of a client that has left, and put no `rid` into requests", "upstream")
    upstream_keepalive_secs: float = _setting(
        3.0, "an idle connection to a worker is closed after this time; keep it below the workers' own limit (5 s in uvicorn)",
        "upstream", low=0.0, live=True)

    max_concurrent_requests: int = _setting(
        -1, "requests in flight at most, over all shards; -1 or 0 = no limit", "admission", low=-1, high=10**9, live=True)
    queue_size: int = _setting(100, "requests that wait when that limit is reached; 0 = none, 429 at once", "admission", low=0, live=True)
    queue_timeout_secs: float = _setting(60.0, "a request that waited this long is answered 408", "admission", low=0.0, live=True)
    rate_limit_tokens_per_second: int | None = _setting(
        None, "requests admitted a second at most, over all shards", "admission", low=1, high=10**6, live=True)
    worker_max_in_flight: int = _setting(0, "requests in flight to one worker at most; 0 = no limit", "admission", low=0, live=True)
    priority_header: str | None = _setting(
        None, "request header with a whole number; those who wait are admitted in its order, highest first", "admission", metavar="NAME",
        live=True)
    tenant_fairness: bool = _setting(False, "those who wait are admitted in turn by API key", "admission", live=True)

    retry_max_retries: int = _setting(5, "attempts for a request in all, the first one included; 0 is as 1", "retries", low=0, high=1000,
        live=True)
    retry_initial_backoff_ms: int = _setting(50, "pause before the second attempt", "retries", low=0, live=True)
    retry_max_backoff_ms: int = _setting(30000, "longest pause between two attempts", "retries", low=0, live=True)
    retry_backoff_multiplier: float = _setting(1.5, "each further pause is this times the one before", "retries", low=1.0, live=True)
    retry_jitter_factor: float = _setting(0.2, "share of a pause that chance adds or takes", "retries", low=0.0, high=1.0,
        live=True)
    disable_retries: bool = _setting(False, "one attempt for each request", "retries", live=True)

    cb_failure_threshold: int = _setting(
        10, "failures in a row that open a worker's circuit", "circuit breaker", low=1, section="models.circuit_breaker.threshold",
        live=True)
    cb_success_threshold: int = _setting(3, "good probes in a row that close it again", "circuit breaker", low=1, live=True)
    cb_timeout_duration_secs: float = _setting(
        60.0, "an open circuit lets a probe through after this time", "circuit breaker",
        low=0.1, section="models.circuit_breaker.cool_down_secs", live=True)
    cb_window_duration_secs: float = _setting(120.0, "failures older than this do not count", "circuit breaker", low=0.1,
        live=True)
    disable_circuit_breaker: bool = _setting(False, "never stop sending to a worker because its requests fail", "circuit breaker",
        live=True)

    api_key: str | None = _setting(
        None, "key that clients must show (Bearer), and that workers are shown", "security", secret=True, metavar="KEY", live=True)
    api_keys: tuple[str, ...] = _setting(
        (), "further keys that clients may show; the name is the tenant", "security", secret=True, metavar="NAME:KEY", live=True)
    api_key_file: str | None = _setting(
        None, "file with one NAME:KEY a line, added to --api-keys", "security", metavar="PATH", live=True)
    worker_api_key: str | None = _setting(
        None, "key that workers are shown, if not --api-key", "security", secret=True, metavar="KEY", live=True)
    admin_api_key: str | None = _setting(None, "key that administration needs", "security", secret=True, metavar="KEY", live=True)
    control_plane_api_keys: tuple[str, ...] = _setting(
        (), "keys for administration; the role admin may change, user may look", "security",
        secret=True, metavar="ID:NAME:ROLE:KEY", split=",", live=True)
    admin_host: str = _setting("127.0.0.1", "address of administration, with --admin-port", "security")
    admin_port: int | None = _setting(
        None, "port on which administration is served, and then there only; default: on the main port", "security", low=0, high=65535)
    main_port_paths: str = _setting(
        "all", "what the main port serves besides the API, health and models: no-metrics = without /metrics and /engine_metrics, which "
        "are then at --prometheus-port and --admin-port only; data = also without /server_info, /model_info and /health_generate, which "
        "are then at --admin-port only", "security", choices=("all", "no-metrics", "data"))
    tls_cert_path: str | None = _setting(None, "the server's certificate chain (PEM); needs --tls-key-path", "security", metavar="PATH")
    tls_key_path: str | None = _setting(None, "the server's private key (PEM)", "security", metavar="PATH")
    client_cert_path: str | None = _setting(
        None, "certificate that workers are shown (PEM); needs --client-key-path", "security", metavar="PATH")
    client_key_path: str | None = _setting(None, "private key to it (PEM)", "security", metavar="PATH")
    ca_cert_paths: tuple[str, ...] = _setting(
        (), "CA certificates that workers' certificates are checked with (PEM)", "security", metavar="PATH")
    cors_allowed_origins: tuple[str, ...] = _setting(
        (), "origins whose pages may call the router; * = any", "security", metavar="ORIGIN", live=True)

    log_level: str = _setting(
        "info", "log level", "logs", choices=("debug", "info", "warning", "error"), same_as={"warn": "warning"},
        section="observability.log_level", live=True)
    log_format: str = _setting("text", "log format", "logs", choices=("text", "json"), section="observability.log_format")
    request_log: str = _setting(
        "all", "one line for each request, for those that were not answered well (4xx, 5xx, cut, left), or none", "logs",
        choices=("all", "errors", "off"), live=True)
    log_dir: str | None = _setting(None, "folder for log files, one a day, beside standard error", "logs", metavar="PATH")
    log_files_kept: int = _setting(14, "files of --log-dir that are kept, the newest ones; 0 = all", "logs", low=0)
    prometheus_host: str | None = _setting(None, "address of a port for metrics alone (default: 0.0.0.0, with --prometheus-port)", "logs")
    prometheus_port: int | None = _setting(
        None, "port for /metrics and /engine_metrics (default: 29000, with --prometheus-host); the main port has them too, unless "
        "--main-port-paths says otherwise", "logs", low=0, high=65535)
    # fmt: on

    @property
    def is_pd(self) -> bool:
        """Whether the settings speak of prefill and decode workers; some may come without that, by what they say of themselves."""
        return self.pd_disaggregation or bool(self.prefill or self.decode)

    @property
    def is_limited(self) -> bool:
        """Whether a request may have to wait for its turn."""
        return self.max_concurrent_requests > 0 or self.rate_limit_tokens_per_second is not None or self.worker_max_in_flight > 0


def to_json(config: ServeConfig) -> bytes:
    """The settings as JSON, secrets included, for a child process."""
    return msgspec.json.encode(config)


def from_json(data: bytes) -> ServeConfig:
    """The settings that `to_json` wrote; they were checked by the parent."""
    return msgspec.json.decode(data, type=ServeConfig)
