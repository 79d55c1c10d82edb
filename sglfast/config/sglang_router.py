"""sglang-router 0.3.2: its flags that are no settings here, and what happens when a script gives them; what its other ones do differently.

Runs in: control, at start and at SIGHUP. Contract: the words behind such a flag are taken in sglang-router's own form, then it is either
    refused with what to do instead, or let pass with a note; never silently. docs/sglang-router.md is made of these tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sglfast.config.fields import is_true
from sglfast.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Foreign:
    """words: how many follow the flag, 0 = switch, 1, "+" or "*"; fine: values that ask for what happens here anyway."""

    name: str
    words: int | str
    is_refused: bool
    why: str
    fine: tuple[str, ...] = ()


_KUBERNETES = "service discovery is not offered; give the workers to --worker-urls, or add them with POST /workers"
_STICKY = "it belongs to the policy `manual`, which is not offered"
_PARSER = "answers are relayed as the worker gives them; give this flag to the workers instead"
_HISTORY = "conversations and responses are not stored here; leave it out, or give --history-backend none"
_TRACE = "traces are not exported; the headers traceparent and tracestate go on to the workers"
_JWT = "tokens of an identity provider are not checked; use --control-plane-api-keys"
_CACHE = "tokenized prompts are always remembered; --prompt-cache-bytes is the memory for it"
_INDEX = "the KV index holds what the workers' caches hold; --kv-index-blocks is its limit"


def _foreign() -> Mapping[str, Foreign]:
    rows: list[Foreign] = []

    def refuse(why: str, words: int | str, *names: str, fine: tuple[str, ...] = ()) -> None:
        rows.extend(Foreign(name, words, True, why, fine) for name in names)

    def let_pass(why: str, words: int | str, *names: str) -> None:
        rows.extend(Foreign(name, words, False, why) for name in names)

    refuse(_KUBERNETES, 0, "service_discovery")
    refuse(_KUBERNETES, "+", "selector", "prefill_selector", "decode_selector")
    refuse(_KUBERNETES, 1, "service_discovery_port", "service_discovery_namespace")
    refuse(_STICKY, 1, "assignment_mode", "max_idle_secs")
    refuse("it belongs to the policy `bucket`, which is not offered", 1, "bucket_adjust_interval_secs")
    refuse("the buckets of the histograms are fixed", "+", "prometheus_duration_buckets")
    refuse(_PARSER, 1, "reasoning_parser", "tool_call_parser")
    refuse("MCP servers are not called by the router; leave it out", 1, "mcp_config_path")
    refuse(
        "only workers that speak the OpenAI API themselves are served, without names and keys of a provider", 1, "backend", fine=("sglang",)
    )
    refuse(_HISTORY, 1, "history_backend", fine=("none",))
    refuse(_HISTORY, 1, *(f"oracle_{part}" for part in ("wallet_path", "tns_alias", "connect_descriptor", "username", "password")))
    refuse(_HISTORY, 1, "oracle_pool_min", "oracle_pool_max", "oracle_pool_timeout_secs", "postgres_db_url", "postgres_pool_max")
    refuse(_HISTORY, 1, "redis_url", "redis_pool_max", "redis_retention_days")
    refuse(_TRACE, 0, "enable_trace")
    refuse(_TRACE, 1, "otlp_traces_endpoint")
    refuse(_JWT, 1, "jwt_issuer", "jwt_audience", "jwt_jwks_uri")
    refuse(_JWT, "*", "jwt_role_mapping")
    let_pass("several models behind one router always work; --worker-urls are kept", 0, "enable_igw")
    let_pass("the router itself spreads requests over prefill and decode workers", 0, "mini_lb")
    let_pass(_INDEX, 1, "eviction_interval_secs", "max_tree_size")
    let_pass(_CACHE, 0, "tokenizer_cache_enable_l0", "tokenizer_cache_enable_l1")
    let_pass(_CACHE, 1, "tokenizer_cache_l0_max_entries")
    let_pass("every change that administration makes is logged", 0, "control_plane_audit_enabled")
    return {row.name: row for row in rows}


FOREIGN = _foreign()

# Policies of sglang-router that are not offered -> what comes nearest.
_NO_KEYS = "requests are not bound to a worker by a key of the client's; cache_aware keeps a conversation where its KV cache is"
OTHER_POLICIES: Mapping[str, str] = {
    "manual": _NO_KEYS,
    "bucket": "requests are not sorted by their length; least_load spreads them",
    "prefix_hash": "cache_aware follows the prefixes that workers really hold",
    "consistent_hashing": _NO_KEYS,
}

# Settings that it has too -> what is not the same here.
DIFFERS: Mapping[str, str] = {
    "health_check_interval_secs": "5 s instead of 60: a worker that hangs is out sooner",
    "health_success_threshold": "1 instead of 2: a worker that is well gets requests at once",
    "worker_startup_timeout_secs": "afterwards the log calls the worker failed; it is asked on",
    "worker_startup_check_interval": "5 s instead of 30, and five times a second at first",
    "max_payload_size": "64 MiB instead of 512: a body is held in memory while it arrives",
    "policy": "`auto` instead of `cache_aware`; `cache_aware` follows what the workers' KV caches hold where they publish events and "
    "`--tokenizer-path` is given, else the text that each was sent, as there; `manual` is not offered",
    "dp_aware": "a worker with ranks stays one worker, and the rank is chosen behind it; told by the header `X-Data-Parallel-Rank`, or in "
    "front of the body where the worker does not read that; `cache_aware` chooses ranks without the flag, too, see "
    "`--disable-dp-steering`",
    "prefill": "without a port it is the one that the worker tells of itself, there it is none",
    "decode_policy": "without it one on the prefill worker's host, or the least loaded, instead of by `--policy`",
    "model_path": "only the tokenizer is taken from there",
    "prompt_cache_bytes": "32 MiB for each shard instead of 50 MiB, and always on",
    "cache_threshold": "0.5 instead of 0.3: it counts KV blocks that the worker holds, not characters that it was once sent",
    "balance_abs_threshold": "32 instead of 64, as sgl-router has it for exact KV indexes",
    "balance_rel_threshold": "1.1 instead of 1.5, as sgl-router has it for exact KV indexes",
    "request_timeout_secs": "ends when the answer begins; a stream may go on for `--stale-request-timeout-secs`",
    "max_concurrent_requests": "counts requests in flight over all shards, no token bucket: a place is free again when its answer ends",
    "rate_limit_tokens_per_second": "no limit unless given, instead of `--max-concurrent-requests`",
    "retry_max_retries": "a worker that failed is left out of the further attempts",
    "cb_failure_threshold": "answers 4xx and 503 do not count as failures",
    "cb_success_threshold": "a circuit that is half open lets one probe through at a time",
    "cb_window_duration_secs": "takes effect; there it does not",
    "control_plane_api_keys": "the role `user` may read, there it may do nothing",
    "cors_allowed_origins": "none given means none allowed, instead of any",
    "prometheus_host": "the main port has `/metrics` too (see `--main-port-paths`); this one only when it or `--prometheus-port` is given",
    "prometheus_port": "the main port has `/metrics` too (see `--main-port-paths`); this one only when it or `--prometheus-host` is given",
}


def note_foreign(foreign: Foreign, words: Sequence[str], where: str) -> str | None:
    """What to tell of such a flag, None when nothing. where: what the message names. Raises ConfigError when it is refused."""
    if foreign.words == 0 and words and not is_true(words[0], where):
        return None  # switched off, which is how it is
    if words and all(word in foreign.fine for word in words):
        return None
    if foreign.is_refused:
        raise ConfigError(f"{where}: {foreign.why}")
    return f"{where} changes nothing: {foreign.why}"
