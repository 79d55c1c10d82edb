"""What a simulated worker tells about itself: /server_info, /model_info, /v1/models, /v1/loads and their old names.

Runs in: sim. Contract: field names, nesting and types of sglang 0.5.23 (spec/kv_events.md 3), a realistic selection of its
    several hundred; `kv_events` is what the engine builds from its own configuration. The secrets are made up and stand where
    the engine's stand, so that a router that keeps or logs them can be caught: search for SECRET_MARK.
"""

import time
from typing import Any

import orjson

from sglfast.sim.engine import Engine
from sglfast.sim.publisher import BUFFER_STEPS, LIVE_HWM, KvPublisher
from sglfast.sim.settings import SimSettings
from sglfast.wire.server_info import kv_events_descriptor

SGLANG_VERSION = "0.5.23"
SECRET_MARK = "sim-secret"
API_KEY = f"sk-{SECRET_MARK}-api-key"
ADMIN_API_KEY = f"sk-{SECRET_MARK}-admin-key"
KEYFILE_PASSWORD = f"{SECRET_MARK}-keyfile-password"


def server_info(
    settings: SimSettings, port: int, bootstrap_port: int, startup_time: float, engines: list[Engine], publisher: KvPublisher
) -> dict[str, Any]:
    """Return the body of /server_info. port: of the HTTP server; startup_time: unix seconds, another after every restart."""
    has_cache = settings.disaggregation_mode != "decode"
    config = kv_events_config(publisher) if settings.kv_events and has_cache else None
    return {
        "model_path": settings.model,
        "served_model_name": settings.model,
        "tokenizer_path": settings.tokenizer_path,
        "host": settings.host,
        "port": port,
        "api_key": API_KEY,
        "admin_api_key": ADMIN_API_KEY,
        "ssl_keyfile": None,
        "ssl_certfile": None,
        "ssl_keyfile_password": KEYFILE_PASSWORD,
        "launch_command": f"python -m sglang.launch_server --model-path {settings.model} --api-key {API_KEY}",
        "page_size": settings.page_size,
        "chunked_prefill_size": settings.chunked_prefill_tokens,
        "max_running_requests": settings.max_running_requests,
        "context_length": settings.context_tokens,
        "schedule_policy": "fcfs",
        "radix_eviction_policy": "lru",
        "disable_radix_cache": not has_cache,
        "enable_hierarchical_cache": False,
        "enable_cache_report": True,
        "enable_metrics": False,
        "enable_http2": False,
        "enable_dp_attention": False,
        "tp_size": 1,
        "pp_size": 1,
        "dp_size": settings.dp_size,
        "attn_dp_size": 1,
        "dcp_size": 1,
        "nnodes": 1,
        "grpc_port": None,
        "chat_template": None,
        "speculative_algorithm": None,
        "disaggregation_mode": settings.disaggregation_mode,
        "disaggregation_bootstrap_port": bootstrap_port,
        "random_seed": settings.seed,
        "weight_version": "default",
        "kv_events_config": config,
        "status": "ready",
        "max_total_num_tokens": settings.context_tokens,
        "max_req_input_len": settings.context_tokens,
        "startup_time": startup_time,
        "internal_states": [_internal_state(settings, engine) for engine in engines],
        "version": SGLANG_VERSION,
        "kv_events": kv_events_descriptor(config, page_size=settings.page_size, dp_size=settings.dp_size),
    }


def kv_events_config(publisher: KvPublisher) -> str:
    """Return the worker's `--kv-events-config`: an engine binds all addresses, whatever host its clients use."""
    config: dict[str, Any] = {
        "publisher": "zmq",
        "endpoint": f"tcp://*:{publisher.live_port}",
        "topic": "",
        "buffer_steps": BUFFER_STEPS,
        "hwm": LIVE_HWM,
    }
    if publisher.replay_port is not None:
        config["replay_endpoint"] = f"tcp://*:{publisher.replay_port}"
    return orjson.dumps(config).decode()


def _internal_state(settings: SimSettings, engine: Engine) -> dict[str, Any]:
    return {
        "last_gen_throughput": 0.0,
        "memory_usage": {"weight": 0.0, "kvcache": 0.0, "token_capacity": settings.context_tokens, "graph": 0.0},
        "effective_max_running_requests_per_dp": settings.max_running_requests,
        "num_running_reqs": engine.running_requests,
        "num_waiting_reqs": engine.waiting_requests,
    }


def model_info(settings: SimSettings) -> dict[str, Any]:
    """Return the body of /model_info."""
    return {
        "model_path": settings.model,
        "tokenizer_path": settings.tokenizer_path,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": "simulated",
        "architectures": ["SimulatedForCausalLM"],
        "served_model_name": settings.model,
        "load_format": "dummy",
        "disaggregation_mode": settings.disaggregation_mode,
        "tool_call_parser": None,
        "reasoning_parser": None,
    }


def models(settings: SimSettings, startup_time: float) -> dict[str, Any]:
    """Return the body of /v1/models."""
    card = {
        "id": settings.model,
        "object": "model",
        "created": int(startup_time),
        "owned_by": "sglang",
        "root": settings.model,
        "parent": None,
        "max_model_len": settings.context_tokens,
    }
    return {"object": "list", "data": [card]}


def loads(settings: SimSettings, engines: list[Engine]) -> dict[str, Any]:
    """Return the body of /v1/loads."""
    ranks = [_load(settings, rank, engine) for rank, engine in enumerate(engines)]
    summed = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens", "num_total_tokens")
    return {
        "timestamp": time.time(),
        "version": SGLANG_VERSION,
        "dp_rank_count": len(ranks),
        "loads": ranks,
        "aggregate": {f"total_{name.removeprefix('num_')}": sum(rank[name] for rank in ranks) for name in summed},
    }


def _load(settings: SimSettings, rank: int, engine: Engine) -> dict[str, Any]:
    # As in SGLang, cached blocks that nobody uses count as free.
    used_tokens = engine.cache.locked_blocks * settings.page_size
    prompt_tokens = engine.totals.prompt_tokens
    return {
        "dp_rank": rank,
        "num_running_reqs": engine.running_requests,
        "num_waiting_reqs": engine.waiting_requests,
        "num_used_tokens": used_tokens,
        "num_total_tokens": used_tokens + engine.waiting_tokens,
        "max_total_num_tokens": settings.context_tokens,
        "max_running_requests": settings.max_running_requests,
        "token_usage": used_tokens / settings.context_tokens,
        "cache_hit_rate": engine.totals.cached_tokens / prompt_tokens if prompt_tokens else 0.0,
        "gen_throughput": 0.0,
        "utilization": engine.running_requests / settings.max_running_requests,
    }
