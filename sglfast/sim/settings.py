"""The settings of the simulator: how many workers there are, how fast they are, and where they listen.

Runs in: sim. Contract: units are in the names; `check` refuses what cannot work with a ConfigError that names the flag.
"""

from dataclasses import dataclass
from typing import Literal

from sglfast.errors import ConfigError
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH

PORT_LIMIT = 65_535
RATE_LIMIT = 1e12
MODEL_BYTES_LIMIT = 1 << 40
TIMEOUT_LIMIT_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimSettings:
    """What `sglfast sim` is told. Field `a_b` is the flag `--a-b`; all workers are alike.

    base_port: worker i listens on base_port + i, 0 = free ports; kv_base_port: worker i's rank r publishes KV events on
    kv_base_port + i * 2 * dp_size + r and answers replays dp_size ports higher, 0 = free ports.
    kv_events: whether /server_info tells of them. cache_tokens: KV cache of one rank. seed: chooses the answers' text.
    mx_server: host:port of a ModelExpress metadata service, "" = no weights are played; mx_role: `seed` has them and offers them,
    `target` copies mx_model_bytes of them from a peer, at most mx_bandwidth_bytes_per_s, before it listens, then offers them too.
    disaggregation_mode: `null` is a regular worker; disaggregation_bootstrap_port: prefill worker i listens there + i, 0 = free ports; a
    decode worker takes it for requests that name none. disaggregation_bootstrap_timeout: seconds that either half waits for the other.
    """

    workers: int = 4
    host: str = "127.0.0.1"
    base_port: int = 30001
    model: str = "demo-model"
    tokenizer_path: str = DEMO_TOKENIZER_PATH
    page_size: int = 64
    cache_tokens: int = 500_000
    prefill_tokens_per_s: float = 20_000.0
    decode_tokens_per_s_per_request: float = 80.0
    max_running_requests: int = 256
    chunked_prefill_tokens: int = 8192
    kv_base_port: int = 0
    kv_events: bool = True
    replay: bool = True
    event_shape: Literal["map", "array"] = "map"
    dp_size: int = 1
    instant: bool = False
    seed: int = 0
    mx_server: str = ""
    mx_role: Literal["seed", "target"] = "seed"
    mx_model_bytes: int = 64 << 20
    mx_bandwidth_bytes_per_s: float = float(64 << 20)
    disaggregation_mode: Literal["null", "prefill", "decode"] = "null"
    disaggregation_bootstrap_port: int = 8998
    disaggregation_bootstrap_timeout: float = 30.0

    @property
    def cache_blocks(self) -> int:
        """Capacity of one rank's cache in blocks."""
        return self.cache_tokens // self.page_size

    @property
    def context_tokens(self) -> int:
        """The longest prompt that a worker takes: what fits into its cache."""
        return self.cache_blocks * self.page_size


def check(settings: SimSettings) -> SimSettings:
    """Return the settings. Raises ConfigError for a value that cannot work."""
    at_least_one = ("workers", "page_size", "max_running_requests", "chunked_prefill_tokens", "dp_size", "mx_model_bytes")
    for name in at_least_one:
        if getattr(settings, name) < 1:
            raise ConfigError(f"{_flag(name)} {getattr(settings, name)}: must be at least 1")
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s_per_request", "mx_bandwidth_bytes_per_s", "disaggregation_bootstrap_timeout"):
        if not 0 < getattr(settings, name) <= RATE_LIMIT:
            raise ConfigError(f"{_flag(name)} {getattr(settings, name)}: must be above 0 and at most {RATE_LIMIT:g}")
    if settings.chunked_prefill_tokens < settings.page_size:
        raise ConfigError(
            f"--chunked-prefill-tokens {settings.chunked_prefill_tokens}: must be at least one page "
            f"(--page-size {settings.page_size}), prompts are cut at pages"
        )
    if settings.cache_tokens < settings.page_size:
        raise ConfigError(f"--cache-tokens {settings.cache_tokens}: must hold at least one page (--page-size {settings.page_size})")
    if settings.disaggregation_bootstrap_timeout > TIMEOUT_LIMIT_S:
        raise ConfigError(
            f"--disaggregation-bootstrap-timeout {settings.disaggregation_bootstrap_timeout}: must be at most {TIMEOUT_LIMIT_S:g} seconds"
        )
    if settings.mx_model_bytes > MODEL_BYTES_LIMIT:
        raise ConfigError(f"--mx-model-bytes {settings.mx_model_bytes}: must be at most {MODEL_BYTES_LIMIT}")
    _check_ports("base_port", settings.base_port, settings.workers)
    _check_ports("kv_base_port", settings.kv_base_port, 2 * settings.workers * settings.dp_size)
    ranges = [("base_port", settings.workers), ("kv_base_port", 2 * settings.workers * settings.dp_size)]
    if settings.disaggregation_mode == "prefill":
        _check_ports("disaggregation_bootstrap_port", settings.disaggregation_bootstrap_port, settings.workers)
        ranges.append(("disaggregation_bootstrap_port", settings.workers))
    else:
        _check_ports("disaggregation_bootstrap_port", settings.disaggregation_bootstrap_port, 1)
    for index, (name, n) in enumerate(ranges):
        for other, n_others in ranges[:index]:
            first, its_first = getattr(settings, name), getattr(settings, other)
            if first and its_first and -n < first - its_first < n_others:
                raise ConfigError(
                    f"{_flag(name)} {first}: its ports overlap those from {_flag(other)} {its_first}; "
                    "choose them further apart, or 0 for free ports"
                )
    return settings


def _check_ports(name: str, base: int, n: int) -> None:
    if base and not 1 <= base <= PORT_LIMIT - n + 1:
        raise ConfigError(f"{_flag(name)} {base}: must be 0 (free ports) or 1..{PORT_LIMIT - n + 1}, {n} ports are needed")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
