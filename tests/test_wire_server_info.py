"""`/server_info` and its kv_events descriptor, from both sides, against 63 recorded configurations."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sglfast.errors import WorkerInfoError
from sglfast.wire import server_info

GOLDEN = Path(__file__).parent / "golden" / "kv_events" / "server_info" / "kv_events_descriptor.json"
CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_text())
DESCRIPTOR = {
    "publisher": "zmq",
    "endpoint_host": "*",
    "endpoint_port_base": 5557,
    "topic": "kv",
    "block_size": 64,
    "dp_size": 2,
    "replay_endpoint_port_base": 5657,
}
SECRETS = {
    "api_key": "sk-very-secret-1",
    "admin_api_key": "sk-very-secret-2",
    "ssl_keyfile_password": "very-secret-3",
    "launch_command": "sglang --api-key very-secret-4",
}


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_all_cases_are_here() -> None:
    assert len(CASES) == 63


@pytest.mark.parametrize("case", CASES, ids=range(63))
def test_producer(case: dict[str, Any]) -> None:
    given = case["input"]
    descriptor = server_info.kv_events_descriptor(
        given["kv_events_config"],
        page_size=given["page_size"],
        dp_size=given["dp_size"],
        dcp_size=given["dcp_size"],
        attn_dp_size=given["attn_dp_size"],
        load_publish_endpoint=given["load_publish_endpoint"],
    )
    assert descriptor == case["expected"]["0.5.23"]
    if descriptor is not None:  # the order of keys is what a reader sees
        assert list(descriptor) == list(case["expected"]["0.5.23"])


@pytest.mark.parametrize("version", ["0.5.13", "0.5.18", "0.5.23"])
@pytest.mark.parametrize("case", CASES, ids=range(63))
def test_consumer(case: dict[str, Any], version: str) -> None:
    described = case["expected"][version]
    facts = server_info.parse_server_info(body(kv_events=described, dp_size=9, page_size=9), "http://worker-3:30000")
    if described is None or described["publisher"] != "zmq":
        assert facts.kv is None
        assert facts.dp_size == 9
        return
    host = described["endpoint_host"]
    is_wildcard = host in ("*", "0.0.0.0", "::", "[::]")
    assert facts.kv == server_info.KvEndpoint(
        publisher="zmq",
        host="worker-3" if is_wildcard else host.strip("[]"),
        port_base=described["endpoint_port_base"],
        topic=described["topic"],
        block_size=described["block_size"],
        dp_size=described["dp_size"],
        replay_port_base=described.get("replay_endpoint_port_base"),
    )
    assert facts.dp_size == described["dp_size"]


SETTING = {"publisher": "zmq", "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5657", "topic": "kv"}


@pytest.mark.parametrize("version", ["0.5.6", "0.5.9", "0.5.12.post1"])
def test_without_a_descriptor_the_setting_itself_tells(version: str) -> None:
    facts = server_info.parse_server_info(
        body(kv_events_config=json.dumps(SETTING), page_size=64, dp_size=2, version=version), "http://worker-3:30000"
    )
    assert facts.kv == server_info.KvEndpoint("zmq", "worker-3", 5557, "kv", 64, 2, 5657)
    assert (facts.dp_size, facts.key_route, facts.kv_connects_out) == (2, "sha256", False)


def test_an_engine_without_descriptor_connects_to_0000() -> None:
    setting = json.dumps(SETTING | {"endpoint": "tcp://0.0.0.0:5557"})
    for described, connects_out in ({}, True), ({"kv_events": DESCRIPTOR}, False):
        facts = server_info.parse_server_info(body(kv_events_config=setting, page_size=64, version="0.5.12", **described), "http://h:1")
        assert facts.kv_connects_out is connects_out


@pytest.mark.parametrize(
    "fields",
    [
        {"version": "0.5.5"},  # its hashes stand for a page alone, wherever that is
        {"version": None},
        {"kv_events": None},  # the engine itself says that it publishes nothing
        {"page_size": None},
        {"kv_events_config": None},
        {"kv_events_config": "{"},
        {"kv_events_config": json.dumps(SETTING | {"publisher": "null"})},
        {"kv_events_config": json.dumps(SETTING | {"endpoint": "ipc:///tmp/kv"})},
        {"vllm_config": {}},
    ],
)
def test_a_setting_that_tells_nothing(fields: dict[str, Any]) -> None:
    known = {"kv_events_config": json.dumps(SETTING), "page_size": 64, "version": "0.5.9"}
    assert server_info.parse_server_info(body(**known), "http://h:1").kv is not None
    assert server_info.parse_server_info(body(**known | fields), "http://h:1").kv is None


def test_replay_that_the_descriptor_does_not_know_yet() -> None:
    described = {name: value for name, value in DESCRIPTOR.items() if name != "replay_endpoint_port_base"}
    for endpoint, port in ("tcp://*:5657", 5657), ("ipc:///tmp/replay", None), (None, None), ("tcp://10.0.0.9:6000", 6000):
        setting = json.dumps(SETTING | {"replay_endpoint": endpoint})
        facts = server_info.parse_server_info(body(kv_events=described, kv_events_config=setting, version="0.5.18"), "http://h:1")
        assert facts.kv is not None
        assert facts.kv.replay_port_base == port


@pytest.mark.parametrize(
    ("version", "form"),
    [("0.5.6", "flat"), ("0.5.8.post1", "flat"), ("0.5.9", "wrapped"), ("0.5.10", "wrapped"), ("0.5.11", "deferrable"),
     ("0.5.22", "deferrable"), ("0.5.23", "kept"), ("0.6.0", "kept"), (None, "kept"), ("0.0.0.dev1", "kept")],
)  # fmt: skip
def test_how_tools_come_to_the_template(version: str | None, form: str) -> None:
    assert server_info.parse_server_info(body(version=version), "http://h:1").tools == form
    assert server_info.parse_server_info(body(version="0.5.9", vllm_config={}), "http://h:1").tools == "kept"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"enable_thinking": False}, '{"enable_thinking":false}'),
        ('{"enable_thinking": false, "a": "é"}', '{"enable_thinking":false,"a":"é"}'),
        ({}, ""), (None, ""), ("", ""), ("{", ""), ("[1]", ""), ([1], ""), (5, ""),
    ],
)  # fmt: skip
def test_the_engines_own_variables_of_the_template(given: object, kept: str) -> None:
    assert server_info.parse_server_info(body(default_chat_template_kwargs=given), "http://h:1").template_kwargs == kept


def test_endpoints() -> None:
    facts = server_info.parse_server_info(body(kv_events=DESCRIPTOR), "http://[fd00::7]:30000")
    assert facts.kv is not None
    assert facts.kv.host == "fd00::7"
    assert facts.kv.live_endpoint(1) == "tcp://[fd00::7]:5558"
    assert facts.kv.replay_endpoint(1) == "tcp://[fd00::7]:5658"
    high = msgspec.structs.replace(facts.kv, port_base=65535, replay_port_base=None, host="h")
    assert high.live_endpoint(0) == "tcp://h:65535"
    assert high.live_endpoint(1) is None
    assert high.replay_endpoint(0) is None


def test_facts() -> None:
    facts = server_info.parse_server_info(
        body(
            served_model_name="m",
            kv_events=DESCRIPTOR,
            disaggregation_mode="prefill",
            disaggregation_bootstrap_port=8998,
            speculative_algorithm="EAGLE3",
            version="0.5.23",
            startup_time=1700000000,
            page_size=64,
            dp_size=1,
            **SECRETS,
        ),
        "http://10.0.0.5:30000",
    )
    assert facts.model == "m"
    assert facts.kv is not None
    assert facts.kv.host == "10.0.0.5"
    assert (facts.dp_size, facts.page_size) == (2, 64)
    assert (facts.disaggregation_mode, facts.disaggregation_bootstrap_port) == ("prefill", 8998)
    assert facts.bigram
    assert (facts.version, facts.startup_time) == ("0.5.23", 1700000000.0)
    assert "secret" not in repr(facts)


def test_wrong_types_cost_only_their_field() -> None:
    facts = server_info.parse_server_info(
        body(
            served_model_name="",
            kv_events=[1],
            disaggregation_mode=5,
            disaggregation_bootstrap_port=70000,
            speculative_algorithm=None,
            version={"a": 1},
            startup_time="late",
            page_size=-1,
            dp_size="4",
            attn_dp_size=4,
        ),
        "http://h:1",
    )
    assert facts == server_info.WorkerFacts(None, None, 4, None, None, False, None, None, None, "tokens", rank_ways="hhr-h")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("publisher", "other"),
        ("publisher", None),
        ("endpoint_host", ""),
        ("endpoint_host", 5),
        ("endpoint_port_base", 0),
        ("endpoint_port_base", 65536),
        ("endpoint_port_base", "5557"),
        ("block_size", 0),
        ("block_size", None),
    ],
)
def test_descriptor_that_cannot_be_used(field: str, value: Any) -> None:
    facts = server_info.parse_server_info(body(kv_events=DESCRIPTOR | {field: value}), "http://h:1")
    assert facts.kv is None


@pytest.mark.parametrize(
    ("field", "value", "name", "expected"),
    [
        ("topic", None, "topic", ""),
        ("dp_size", 0, "dp_size", 1),
        ("replay_endpoint_port_base", "x", "replay_port_base", None),
        ("replay_endpoint_port_base", 99999, "replay_port_base", None),
    ],
)
def test_descriptor_with_an_odd_extra(field: str, value: Any, name: str, expected: Any) -> None:
    facts = server_info.parse_server_info(body(kv_events=DESCRIPTOR | {field: value}), "http://h:1")
    assert getattr(facts.kv, name) == expected


@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "eagle", "FROZEN_KV_MTP", "NEXTN"])
def test_bigram_algorithms(algorithm: str) -> None:
    assert server_info.parse_server_info(body(speculative_algorithm=algorithm), "http://h:1").bigram


@pytest.mark.parametrize("algorithm", ["", "NGRAM", "STANDALONE", "DFLASH", None])
def test_unigram_algorithms(algorithm: str | None) -> None:
    assert not server_info.parse_server_info(body(speculative_algorithm=algorithm), "http://h:1").bigram


@pytest.mark.parametrize("bad", [b"", b"[]", b"null", b"<html>", b'{"api_key":"very-secret"', b"\xff{}", b"[" * 100_000])
@pytest.mark.parametrize(
    "parse",
    [lambda text: server_info.parse_server_info(text, "http://h:1"), server_info.parse_model_info, server_info.parse_models],
)
def test_body_that_is_no_object(bad: bytes, parse: Callable[[bytes], object]) -> None:
    with pytest.raises(WorkerInfoError) as caught:
        parse(bad)
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None  # the decoder's error, which may know the body, is not carried along


def test_model_names() -> None:
    assert server_info.parse_model_info(body(model_path="/m", served_model_name="name")) == "name"
    assert server_info.parse_model_info(body(model_path="/m")) is None
    models = [
        {"id": "lo", "object": "model", "parent": "m"},
        {"id": "ad", "object": "adapter"},
        5,
        {"id": 7, "object": "model"},
        {"id": "m", "object": "model"},
        {"id": "n"},
    ]
    assert server_info.parse_models(body(object="list", data=models)) == ("m", ("lo",))
    assert server_info.parse_models(body(object="list", data=[])) == (None, ())
    assert server_info.parse_models(body(object="list")) == (None, ())


@pytest.mark.parametrize(
    ("version", "route"),
    [
        ("0.5.6", "sha256"),
        ("0.5.6.post2", "sha256"),
        ("0.5.23", "sha256"),
        ("v0.5.10rc0", "sha256"),
        ("0.6.0.dev12+gabc", "sha256"),
        ("1.0.0", "sha256"),
        ("0.5.5", "tokens"),
        ("0.4.9.post1", "tokens"),
        ("0.0.0.dev1", "tokens"),
        ("main", "tokens"),
        ("", "tokens"),
        (None, "tokens"),
        (7, "tokens"),
    ],
)
def test_key_route_follows_the_version(version: Any, route: str) -> None:
    assert server_info.parse_server_info(body(version=version), "http://w:1").key_route == route


@pytest.mark.parametrize(
    ("fields", "takes_rid"),
    [({"version": "0.5.23"}, True), ({"version": "0.5.0.post1"}, True), ({"version": "0.4.9"}, False), ({"version": "0.0.0.dev1"}, False),
     ({}, False), ({"version": "0.9.2", "vllm_config": {}}, False), ({"version": "0.5.23", "disaggregation_mode": "null"}, True),
     ({"version": "0.5.23", "disaggregation_mode": "prefill"}, True)],
)  # fmt: skip
def test_who_takes_a_rid(fields: dict[str, Any], takes_rid: bool) -> None:
    """Only an SGLang that is new enough, whatever it does of a request."""
    assert server_info.parse_server_info(body(**fields), "http://w:1").takes_rid is takes_rid


@pytest.mark.parametrize(
    ("fields", "rank_ways"),
    [({"version": "0.5.23"}, "hhr-h"), ({"version": "0.5.20"}, "hhr-h"), ({"version": "0.5.19"}, "hhr"),
     ({"version": "v0.5.10.post1"}, "hhr"), ({"version": "0.5.9"}, "ddd"), ({"version": "0.5.7"}, "ddd"), ({"version": "0.5.6"}, ""),
     ({"version": "0.0.0.dev1+g12"}, "hhr-h"), ({}, "hhr-h"), ({"version": "0.12.0", "vllm_config": {}}, "hh")],
)  # fmt: skip
def test_how_a_rank_is_told(fields: dict[str, Any], rank_ways: str) -> None:
    """A version that nobody knows counts as new: it publishes a descriptor, as no old one does."""
    assert server_info.parse_server_info(body(**fields), "http://w:1").rank_ways == rank_ways


def test_key_route_of_a_worker_that_describes_its_events_and_tells_no_version() -> None:
    """Gateways and stand-ins between us and an engine hand on what they know; only an SGLang with the chain has that descriptor."""
    described = {"publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": 5557, "topic": "", "block_size": 64, "dp_size": 1}

    def route(**fields: Any) -> str:
        return server_info.parse_server_info(body(kv_events=described, **fields), "http://w:1").key_route

    assert route() == "sha256"
    assert route(version="0.0.0.dev1") == route(version="0.5.5") == "tokens"
    assert route(vllm_config={}) == "tokens"
    assert route(kv_events_config=json.dumps({"publisher": "zmq", "format": "dynamo"})) == "tokens"


def test_key_route_of_other_formats_and_engines() -> None:
    def route(**fields: Any) -> str:
        return server_info.parse_server_info(body(version="0.5.23", **fields), "http://w:1").key_route

    assert route(kv_events_config=json.dumps({"publisher": "zmq", "format": "dynamo"})) == "tokens"
    assert route(kv_events_config=json.dumps({"publisher": "zmq", "format": "default"})) == "sha256"
    assert route(kv_events_config="{") == "sha256"
    assert route(vllm_config={}) == "tokens"


@pytest.mark.parametrize(
    ("fields", "adapters"),
    [
        ({"version": "0.5.23"}, "named"),
        ({"version": "0.5.22.post1"}, "shared"),
        ({"version": "0.5.22", "kv_events_config": json.dumps({"publisher": "zmq", "format": "dynamo"})}, "named"),
        ({"version": "0.5.5"}, "shared"),
        ({"version": "0.0.0.dev1+g123"}, "named"),
        ({}, "named"),
        ({"version": "0.11.2", "vllm_config": {}}, "models"),
    ],
)
def test_how_adapters_show_in_events(fields: dict[str, Any], adapters: str) -> None:
    assert server_info.parse_server_info(body(**fields), "http://w:1").adapters == adapters


@pytest.mark.parametrize(
    ("config", "connects_out"),
    [
        ({"endpoint": "tcp://*:5557"}, False),
        ({"endpoint": "tcp://0.0.0.0:5557"}, False),
        ({"endpoint": "tcp://10.0.0.5:5557"}, True),
        ({"endpoint": "tcp://10.0.0.5:5557", "bind": True}, False),
        ({"endpoint": "tcp://*:5557", "bind": False}, True),
        ({"endpoint": "ipc:///tmp/x"}, False),
        ({}, False),
    ],
)
def test_engines_that_connect_out(config: dict[str, Any], connects_out: bool) -> None:
    text = json.dumps({"publisher": "zmq", **config})
    facts = server_info.parse_server_info(body(kv_events=DESCRIPTOR, kv_events_config=text), "http://w:1")
    assert facts.kv_connects_out == connects_out
    assert not server_info.parse_server_info(body(kv_events_config=text), "http://w:1").kv_connects_out


def test_whose_way_of_preparing_chats_a_worker_has() -> None:
    def engine(**fields: object) -> str:
        return server_info.parse_server_info(body(**fields), "http://h:1").engine

    assert engine(version="0.5.23") == engine() == "sglang"
    assert engine(vllm_config="VllmConfig(...)") == "vllm"
