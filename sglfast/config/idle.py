"""Settings that change nothing beside the others.

Runs in: control, at start and at SIGHUP. Contract: what sglang-router takes is taken and noted; a flag of ours that needs another is an
    error, because nobody can have meant it. Only what was given counts, not defaults.
"""

from collections.abc import Iterator, Mapping

from sglfast.config.settings import ServeConfig
from sglfast.errors import ConfigError

DEFAULT = "default"
_BACKOFF = ("retry_max_retries", "retry_initial_backoff_ms", "retry_max_backoff_ms", "retry_backoff_multiplier", "retry_jitter_factor")
_BREAKER = ("cb_failure_threshold", "cb_success_threshold", "cb_timeout_duration_secs", "cb_window_duration_secs")
_CHECKS = (
    "health_check_endpoint",
    "health_check_interval_secs",
    "health_check_timeout_secs",
    "health_failure_threshold",
    "health_success_threshold",
)
_CACHE = ("cache_threshold", "balance_abs_threshold", "balance_rel_threshold")
_LIMITS = "--max-concurrent-requests, --rate-limit-tokens-per-second, --worker-max-in-flight"
_NO_PD = "without prefill and decode workers nothing is chosen by it"
_PD_SWITCH = "--pd-disaggregation, which is switched off"
_NO_TOKENIZER = "without --tokenizer-path no prompt is matched to KV blocks"


def check_needs(config: ServeConfig, origins: Mapping[str, str]) -> None:
    """Refuse flags of ours that do nothing without another. origins: see sources.Loaded. Raises ConfigError."""
    # Prefill workers are enough to want it; a switch that is off beside them is a contradiction.
    is_pd_wanted = config.pd_disaggregation or origins["pd_disaggregation"] == DEFAULT
    hidden = ("--admin-port", config.admin_port is not None)
    if config.main_port_paths == "no-metrics":
        hidden = ("--prometheus-port or --admin-port", config.admin_port is not None or config.prometheus_port is not None)
    policies = (config.policy, config.prefill_policy)
    steers = config.tokenizer_path is not None and any(policy in ("auto", "cache_aware") for policy in policies)
    queue = f"one of {_LIMITS}: without a limit nobody waits"
    for name, needed, is_there in (
        ("admin_host", "--admin-port", config.admin_port is not None),
        ("priority_header", queue, config.is_limited),
        ("tenant_fairness", queue, config.is_limited),
        ("prefill", _PD_SWITCH, is_pd_wanted),
        ("decode", _PD_SWITCH, is_pd_wanted),
        ("prefill", "--decode: a prompt that is computed must go on somewhere", bool(config.decode)),
        ("decode", "--prefill: a decode worker computes no prompt", bool(config.prefill)),
        ("prefill_policy", f"--pd-disaggregation: {_NO_PD}", config.is_pd),
        ("decode_policy", f"--pd-disaggregation: {_NO_PD}", config.is_pd),
        ("main_port_paths", *hidden),
        ("disable_dp_steering", "--policy cache_aware (or auto) with --tokenizer-path: nothing else chooses a rank", steers),
        ("log_files_kept", "--log-dir", config.log_dir is not None),
    ):
        if origins[name] != DEFAULT and getattr(config, name) not in (None, "", 0, (), "all") and not is_there:
            raise ConfigError(f"{origins[name]} needs {needed}")


def notes_on(config: ServeConfig, origins: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each setting that was given and does nothing, and for a policy that cannot do what its name says."""
    if config.policy == "cache_aware" and config.tokenizer_path is None and not config.prediction_blocks:
        yield f"--policy cache_aware chooses by load: {_NO_TOKENIZER}, and --prediction-blocks 0 leaves nothing else"
    policies = (config.policy, config.prefill_policy, config.decode_policy)
    is_by_cache = any(policy in ("auto", "cache_aware") for policy in policies)
    other_model = config.model_path is not None and config.tokenizer_path != config.model_path
    idle: tuple[tuple[bool, tuple[str, ...], str], ...] = (
        (not is_by_cache, _CACHE, f"--policy {config.policy} does not look at caches"),
        (config.policy == "auto" and config.tokenizer_path is None, _CACHE, _NO_TOKENIZER),
        (is_by_cache and config.tokenizer_path is None, ("prompt_cache_bytes",), _NO_TOKENIZER),
        (other_model, ("model_path",), "--tokenizer-path says where the tokenizer is"),
        (not config.is_limited, ("queue_size", "queue_timeout_secs"), f"without one of {_LIMITS} nobody waits"),
        (config.disable_retries, _BACKOFF, "--disable-retries is given"),
        (config.disable_circuit_breaker, _BREAKER, "--disable-circuit-breaker is given"),
        (config.disable_health_check, _CHECKS, "--disable-health-check is given"),
    )
    for is_idle, names, why in idle:
        for name in names if is_idle else ():
            if origins[name] != DEFAULT:
                yield f"{origins[name]} changes nothing: {why}"
