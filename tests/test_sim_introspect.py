"""sim/introspect.py: the router's own parsers read what the worker tells, and the secrets are where an engine's are."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer
from sglfast.sim import introspect
from sglfast.sim.engine import Engine, EngineTotals, Generation
from sglfast.sim.output import OutputText
from sglfast.sim.settings import SimSettings
from sglfast.wire.server_info import KvEndpoint, parse_model_info, parse_models, parse_server_info

SETTINGS = SimSettings(model="m/x", page_size=32, cache_tokens=3200, dp_size=2)
URL = "http://10.1.2.3:30000"


@pytest.fixture(scope="module")
def engines() -> list[Engine]:
    output = OutputText(load_tokenizer(DEMO_TOKENIZER_PATH), 0)
    return [Engine(SETTINGS, output, lambda events: None, EngineTotals()) for _ in range(2)]


def server_info(engines: list[Engine], replay_port: int | None, settings: SimSettings = SETTINGS) -> dict[str, Any]:
    publisher: Any = SimpleNamespace(live_port=5557, replay_port=replay_port)
    return introspect.server_info(settings, 30000, 8998, 12.5, engines, publisher)


@pytest.mark.parametrize("replay_port", [None, 5600])
def test_server_info_is_read_by_the_router(engines: list[Engine], replay_port: int | None) -> None:
    facts = parse_server_info(orjson.dumps(server_info(engines, replay_port)), URL)
    assert facts.kv == KvEndpoint("zmq", "10.1.2.3", 5557, "", 32, 2, replay_port)
    assert (facts.model, facts.version, facts.startup_time) == ("m/x", introspect.SGLANG_VERSION, 12.5)
    assert (facts.dp_size, facts.page_size, facts.bigram, facts.disaggregation_mode) == (2, 32, False, "null")


def test_a_worker_that_tells_of_no_events(engines: list[Engine]) -> None:
    info = server_info(engines, None, dataclasses.replace(SETTINGS, kv_events=False))
    assert (info["kv_events_config"], info["kv_events"]) == (None, None)
    facts = parse_server_info(orjson.dumps(info), URL)
    assert (facts.kv, facts.model) == (None, "m/x")


def test_secrets_are_there_and_can_be_searched_for(engines: list[Engine]) -> None:
    info = server_info(engines, None)
    secrets = [info[name] for name in ("api_key", "admin_api_key", "ssl_keyfile_password", "launch_command")]
    assert all(introspect.SECRET_MARK in secret for secret in secrets)
    assert len(set(secrets)) == 4


def test_model_routes(engines: list[Engine]) -> None:
    assert parse_model_info(orjson.dumps(introspect.model_info(SETTINGS))) == "m/x"
    assert parse_models(orjson.dumps(introspect.models(SETTINGS, 12.5))) == ("m/x", ())
    assert introspect.models(SETTINGS, 12.5)["data"][0]["max_model_len"] == 3200


def test_loads_tell_of_each_rank(engines: list[Engine]) -> None:
    sink: Any = SimpleNamespace(progress=lambda: None)
    engines[1].submit(Generation(list(range(100)), 100, b"", 5, 0, sink), 0.0)
    loads = introspect.loads(SETTINGS, engines)
    assert loads["dp_rank_count"] == 2
    assert [load["dp_rank"] for load in loads["loads"]] == [0, 1]
    assert [load["num_waiting_reqs"] for load in loads["loads"]] == [0, 1]
    assert [load["num_total_tokens"] for load in loads["loads"]] == [0, 100]
    assert loads["aggregate"]["total_waiting_reqs"] == 1
    assert all(load["max_total_num_tokens"] == 3200 for load in loads["loads"])
