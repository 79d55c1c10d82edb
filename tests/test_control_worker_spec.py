"""What operators say of a worker: what is taken, what is named as without effect, what is refused, and that no key is shown."""

from typing import Any

import msgspec
import pytest

from sglfast.config.worker_urls import NamedWorker, read_prefill
from sglfast.control.roles import Named
from sglfast.control.worker_spec import SpecError, WorkerSpec, changed, read_change, read_spec, spec_of

URL = "http://10.0.0.1:30000"


def body(**fields: Any) -> bytes:
    return msgspec.json.encode(fields)


def test_defaults_of_sglang_router() -> None:
    spec, ignored = read_spec(body(url=URL))
    assert spec == WorkerSpec(url=URL, model_id=None, api_key=None, priority=50, cost=1.0, labels={})
    assert ignored == []


def test_everything_that_has_a_meaning() -> None:
    given = {
        "url": "HTTP://Host:30000/", "model_id": "m", "api_key": "sk-1", "priority": 7, "cost": 2, "labels": {"a": "b"},
        "health_check_timeout_secs": 3, "health_check_interval_secs": 0.5, "health_success_threshold": 2,
        "health_failure_threshold": 4, "disable_health_check": True,
    }  # fmt: skip
    spec, ignored = read_spec(body(**given))
    assert msgspec.structs.asdict(spec) == given | {
        "url": "http://host:30000",
        "cost": 2.0,
        "worker_type": "regular",
        "bootstrap_port": None,
    }
    assert ignored == []


def test_nulls_and_the_name_unknown_mean_not_given() -> None:
    fields = dict.fromkeys(("model_id", "api_key", "priority", "cost", "labels", "health_check_timeout_secs", "disable_health_check"))
    assert read_spec(body(url=URL, **fields)) == read_spec(body(url=URL))
    assert read_spec(body(url=URL, model_id="unknown", api_key=""))[0].model_id is None
    assert read_spec(body(url=URL, api_key=""))[0].api_key is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, Named()),
        ({"worker_type": None}, Named()),
        ({"worker_type": "nonsense"}, Named()),
        ({"worker_type": "decode"}, Named("decode")),
        ({"worker_type": "prefill"}, Named("prefill")),
        ({"worker_type": "prefill", "bootstrap_port": None}, Named("prefill")),
        ({"worker_type": "prefill", "bootstrap_port": 8998}, Named("prefill", 8998, True)),
        ({"worker_type": "prefill", "bootstrap_port": "none"}, Named("prefill", None, True)),
    ],
)
def test_what_a_worker_is_there_for(fields: dict[str, Any], named: Named) -> None:
    assert read_spec(body(url=URL, **fields))[0].named == named


def test_what_flags_ask_for() -> None:
    for text, named in (
        ("http://p:1", Named("prefill")),
        ("http://p:1 7", Named("prefill", 7, True)),
        ("http://p:1 none", Named("prefill", None, True)),
    ):
        spec = spec_of(read_prefill(text))
        assert (spec.url, spec.named) == ("http://p:1", named)
    assert spec_of(NamedWorker("http://d:1", "decode")).named == Named("decode")
    assert spec_of(NamedWorker("http://r:1")) == WorkerSpec(url="http://r:1")


def test_fields_without_effect_are_named() -> None:
    nothing = {"worker_type": "regular", "runtime": "sglang", "dp_aware": True, "bootstrap_port": None, "connection_mode": "HTTP"}
    assert read_spec(body(url=URL, **nothing))[1] == []
    some = {"bootstrap_port": 8998, "chat_template": "x", "nonsense": [1], "runtime": "trtllm", "worker_type": "other", "x" * 100: 1}
    assert read_spec(body(url=URL, **some))[1] == sorted([*list(some)[:-1], "x" * 64])
    assert read_change(body(priority=1, nonsense=1))[1] == ["nonsense"]
    # A port means something for prefill workers only, and a worker's type is not changed.
    assert read_spec(body(url=URL, worker_type="decode", bootstrap_port=8998))[1] == ["bootstrap_port"]
    assert read_change(body(priority=1, worker_type="prefill", bootstrap_port=1))[1] == ["bootstrap_port", "worker_type"]
    assert read_change(body(priority=1, worker_type="regular"))[1] == []


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b"{", "must be a JSON object"),
        (b"[" * 100_000, "must be a JSON object"),
        (b"\xff", "must be a JSON object"),
        (body(), "missing required field `url`"),
        (body(url=None), r"url"),
        (body(url="ftp://a"), "url ftp://a: must look like http://host:port"),
        (body(url="http://a/path"), "give only scheme, host and port"),
        (body(url=URL, worker_type="prefill", bootstrap_port=0), 'bootstrap_port: must be a number from 1 to 65535, or "none"'),
        (body(url=URL, worker_type="prefill", bootstrap_port=65_536), "bootstrap_port: must be"),
        (body(url=URL, worker_type="prefill", bootstrap_port="x"), "bootstrap_port"),
        (body(url=URL, worker_type="prefill", bootstrap_port=True), "bootstrap_port"),
        (body(url=URL, runtime="external"), "external providers are not offered"),
        (body(url=URL, priority="high"), "Expected `int`, got `str` - at `priority`"),
        (body(url=URL, labels={"a": 1}), "Expected `str`"),
        (body(url=URL, labels={"a": "x" * 300}), "labels: at most 64, each of at most 256"),
        (body(url=URL, labels={str(i): "" for i in range(65)}), "labels: at most 64"),
        (body(url=URL, model_id="two\nlines"), "model_id: must be printable"),
        (body(url=URL, model_id="m" * 513), "at most 512"),
        (body(url=URL, health_success_threshold=0), "health_success_threshold: must be at least 1"),
        (body(url=URL, health_check_timeout_secs=0), "health_check_timeout_secs: must be at least 0.1"),
        (body(url=URL, health_check_interval_secs=1e300), "at most 86400"),
        (body(url=URL, disable_health_check="yes"), "Expected `bool"),
    ],
)
def test_refusals(data: bytes, text: str) -> None:
    with pytest.raises(SpecError, match=text):
        read_spec(data)


@pytest.mark.parametrize("key", ["with blank", "line\r\nx: y", "\u00e4", "k" * 801, 17, ["sk-secret"]])
def test_keys_that_no_header_holds_are_refused_and_not_quoted(key: Any) -> None:
    for read in (read_spec, read_change):
        with pytest.raises(SpecError, match="api_key") as caught:
            read(body(url=URL, api_key=key))
        assert str(key) not in str(caught.value)


def test_no_key_in_any_text() -> None:
    spec, _ = read_spec(body(url=URL, api_key="sk-secret", labels={"k": "sk-secret"}))
    change, _ = read_change(body(api_key="sk-secret"))
    assert "sk-secret" not in f"{spec} {spec!r} {change} {change!r}"


def test_changes() -> None:
    spec, _ = read_spec(body(url=URL, labels={"a": "1", "b": "2"}, api_key="old"))
    after = changed(spec, read_change(body(priority=1, labels={"b": "3", "c": "4"}, state="draining"))[0])
    assert (after.priority, after.cost, after.labels, after.api_key, after.url) == (1, 1.0, {"a": "1", "b": "3", "c": "4"}, "old", URL)
    assert changed(spec, read_change(body(api_key="new"))[0]).api_key == "new"
    assert changed(spec, read_change(body(api_key=""))[0]).api_key is None
    assert changed(spec, read_change(body(api_key=None))[0]) == spec
    with pytest.raises(SpecError, match="Invalid enum value 'gone' - at `state`"):
        read_change(body(state="gone"))
    with pytest.raises(SpecError, match="labels: at most 64"):
        changed(spec, read_change(body(labels={str(i): "" for i in range(63)}))[0])
