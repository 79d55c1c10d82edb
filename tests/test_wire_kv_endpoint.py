"""sglfast.wire.kv_endpoint: what `--kv-endpoint` says, and of which worker it is true."""

import pytest

from sglfast.errors import ConfigError
from sglfast.wire.kv_endpoint import KvSetting, parse_kv_settings, with_setting
from sglfast.wire.server_info import KvEndpoint, WorkerFacts, parse_server_info

SGLANG = b'{"version":"0.5.12","page_size":32,"kv_events":{"publisher":"zmq","endpoint_host":"*","endpoint_port_base":1,"block_size":64}}'


def endpoint_of(facts: WorkerFacts | None) -> KvEndpoint:
    assert facts is not None
    assert facts.kv is not None
    return facts.kv


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("tcp://*:5557", KvSetting(None, "*", 5557)),
        ("http://W:8000/=tcp://10.0.0.1:5557", KvSetting("http://w:8000", "10.0.0.1", 5557)),
        ("tcp://*:1,replay=2,topic=kv@a=b,block_size=32,dp_size=4", KvSetting(None, "*", 1, "kv@a=b", 2, 32, 4)),
        ("tcp://[::1]:1,replay=tcp://*:9", KvSetting(None, "[::1]", 1, replay_port_base=9)),
    ],
)
def test_forms(text: str, setting: KvSetting) -> None:
    assert parse_kv_settings([text]) == [setting]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["5557"], "must look like"),
        (["tcp://h"], "must look like"),
        (["ftp://w=tcp://*:1"], "must look like"),
        (["tcp://*:1,size=3"], "no option 'size'"),
        (["tcp://*:1,replay=99999"], "replay must be a number from 1 to 65535, not '99999'"),
        (["tcp://*:1,block_size=x"], "block_size must be a number"),
        (["tcp://*:1,dp_size="], "dp_size must be a number"),
        (["tcp://*:1", "tcp://*:2"], "two endpoints are without a URL"),
        (["http://w=tcp://*:1", "http://w/=tcp://*:2"], "http://w has two endpoints"),
    ],
)
def test_what_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match="--kv-endpoint") as error:
        parse_kv_settings(texts)
    assert message in str(error.value)


def test_a_worker_that_tells_nothing() -> None:
    facts = with_setting(None, "http://10.0.0.7:8000", parse_kv_settings(["tcp://*:5557,replay=5657,dp_size=2"]))
    assert endpoint_of(facts) == KvEndpoint("zmq", "10.0.0.7", 5557, "", 16, 2, 5657)
    assert facts is not None
    assert (facts.key_route, facts.adapters, facts.dp_size, facts.engine) == ("tokens", "models", 2, "vllm")


def test_an_engine_that_tells_its_page_size_but_no_endpoint() -> None:
    facts = with_setting(
        parse_server_info(b'{"version":"0.5.12","page_size":32}', "http://w:1"), "http://w:1", parse_kv_settings(["tcp://[::1]:5557"])
    )
    assert endpoint_of(facts) == KvEndpoint("zmq", "::1", 5557, "", 32, 1, None)
    assert facts is not None
    assert (facts.key_route, facts.engine) == ("sha256", "sglang")


def test_who_is_meant() -> None:
    everyone, one = parse_kv_settings(["tcp://*:5557", "http://w:1=tcp://*:6000"])
    told = parse_server_info(SGLANG, "http://w:1")
    assert with_setting(told, "http://w:1", [everyone]) is told, "what a worker says is better than what holds for all"
    assert endpoint_of(with_setting(told, "http://W:1/", [everyone, one])).port_base == 6000
    assert endpoint_of(with_setting(None, "http://v:1", [everyone, one])).port_base == 5557
    assert with_setting(None, "http://v:1", [one]) is None
    assert with_setting(told, "http://w:1", []) is told
