"""sglfast.config.file: sgl-router's form and our own names, in YAML and TOML; every mistake is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from sglfast.config import ServeConfig, check
from sglfast.config.fields import FIELDS
from sglfast.config.file import read_file
from sglfast.config.sglang_router import FOREIGN
from sglfast.errors import ConfigError

YAML = """
server: {host: 10.1.2.3, port: 8000}
observability:
  log_level: warn
  log_format: json
models:
  - id: my-model
    tokenizer_path: /models/my-model
    policy: cache_aware_zmq
    circuit_breaker: {threshold: 3, cool_down_secs: 30}
    cache_aware: {cache_threshold: 0.25, balance_abs_threshold: 16, balance_rel_threshold: 2}
discovery:
  backend: static_urls
  static_urls:
    urls: [http://a:1, http://b:2]
proxy: {request_timeout_secs: 300}
active_load: {stale_request_timeout_secs: 600}
max_concurrent_requests: 512
tenant_fairness: true
shutdown_grace_period_secs: 7
api_key: s3cret
admin_port: null
"""
TOML = """
max_concurrent_requests = 512
tenant_fairness = true
shutdown_grace_period_secs = 7
api_key = "s3cret"
[server]
host = "10.1.2.3"
port = 8000
[observability]
log_level = "warn"
log_format = "json"
[[models]]
id = "my-model"
tokenizer_path = "/models/my-model"
policy = "cache_aware_zmq"
circuit_breaker = { threshold = 3, cool_down_secs = 30 }
cache_aware = { cache_threshold = 0.25, balance_abs_threshold = 16, balance_rel_threshold = 2 }
[discovery]
backend = "static_urls"
[discovery.static_urls]
urls = ["http://a:1", "http://b:2"]
[proxy]
request_timeout_secs = 300
[active_load]
stale_request_timeout_secs = 600
"""
VALUES: dict[str, Any] = {
    "host": "10.1.2.3", "port": 8000, "log_level": "warning", "log_format": "json", "tokenizer_path": "/models/my-model",
    "policy": "cache_aware", "cb_failure_threshold": 3, "cb_timeout_duration_secs": 30.0, "cache_threshold": 0.25,
    "balance_abs_threshold": 16, "balance_rel_threshold": 2.0, "worker_urls": ("http://a:1", "http://b:2"),
    "request_timeout_secs": 300.0, "stale_request_timeout_secs": 600.0, "max_concurrent_requests": 512, "tenant_fairness": True,
    "shutdown_grace_secs": 7.0, "api_key": "s3cret",
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [("r.yaml", YAML), ("r.yml", YAML), ("r.TOML", TOML)])
def test_the_form_of_sgl_router_and_our_own_names(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    found, notes = read_file(str(path))
    values = {field: value for field, (_, value) in found.items() if value is not None}
    assert values == VALUES
    assert {field: type(value) for field, value in values.items()} == {field: type(value) for field, value in VALUES.items()}
    assert found["cb_failure_threshold"][0] == f"{path}: models.circuit_breaker.threshold"
    assert found["shutdown_grace_secs"][0] == f"{path}: shutdown_grace_period_secs"
    assert notes == [f"{path}: models.id changes nothing: the workers tell the names of their models"]


def test_every_setting_is_a_key_of_its_own_name(tmp_path: Path) -> None:
    """Whatever runs now can be written into a file, and reads back the same."""
    config = check(ServeConfig(worker_urls=("http://a:1",), api_keys=("a:b",), prometheus_port=9, rate_limit_tokens_per_second=3))
    values = {name: getattr(config, name) for name in FIELDS}
    path = tmp_path / "all.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    found, _ = read_file(str(path))
    assert {name: value for name, (_, value) in found.items()} == values


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    for name in ("e.yaml", "e.toml"):
        (tmp_path / name).write_text("# nothing\n")
        assert read_file(str(tmp_path / name)) == ({}, [])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prot: 1", ": prot: there is no such setting; the closest is port"),
        ("server: {prot: 1}", ": server.prot: there is no such setting; the closest is server.port"),
        ("worker-urls: []", ": worker-urls: there is no such setting; the closest is worker_urls"),
        ("zzz: 1", ": zzz: there is no such setting"),
        ("server: 80", ": server: must hold keys of its own, such as server.host"),
        ("port: '80'", ": port: must be a whole number, is '80' (str)"),
        ("port: true", ": port: must be a whole number, is 'True' (bool)"),
        ("port: 1.5", ": port: must be a whole number, is '1.5' (float)"),
        ("port:", ": port: must be a whole number, is empty"),
        ("passthrough: 1", ": passthrough: must be true or false, is '1' (int)"),
        ("log_level: 5", ": log_level: must be text, is '5' (int)"),
        ("worker_urls: http://a:1", ": worker_urls: must be a list of text, is 'http://a:1' (str)"),
        ("worker_urls: [1]", ": worker_urls: must be text, is '1' (int)"),
        ("api_key: 12345", ": api_key: must be text, is of another type"),
        ("api_keys: [12345]", ": api_keys: must be text, is of another type"),
        ("api_keys: s3cret", ": api_keys: must be a list of text, is of another type"),
        ("port: 1\nserver: {port: 1}", ": server.port: is the same setting as port; give one of them"),
        ("models: {id: x}", ": models: must be a list"),
        ("models: []", ": models: must have one entry; all models share one tokenizer and one policy, their names come from the workers"),
        ("models: [{id: ''}]", ": models.id: must be the name of a model"),
        ("models: [3]", ": models: must hold keys of its own, such as models.cache_aware.balance_abs_threshold"),
        ("models: [{id: a, zmq: 1}]", ": models.zmq: there is no such setting"),
        ("discovery: {backend: dns}", ": discovery.backend: must be one of static_urls, k8s, is 'dns'"),
        ("discovery: {backend: static_urls}", ": discovery.backend: static_urls needs the section discovery.static_urls"),
        (
            "discovery: {backend: k8s, k8s: {namespace: x}}",
            f": discovery.backend: {FOREIGN['service_discovery'].why}",
        ),
        ("prefill_selector: [app=p]", f": prefill_selector: {FOREIGN['prefill_selector'].why}"),
        ("discovery: {k8s: {namespace: x}}", f": discovery.k8s: {FOREIGN['service_discovery'].why}"),
        ("redis_url: redis://u:s3cret@h", f": redis_url: {FOREIGN['redis_url'].why}"),
        ("[1, 2]", ": must hold `name: value` pairs"),
        ("1: 2", ": must hold `name: value` pairs"),
        ("port: 1\nport: 2", ": is no YAML: line 2: the key port stands there twice"),
        ("port: [1\napi_key: s3cret", ": is no YAML: line 2: expected ',' or ']', but got ':'"),
        ("a: !!python/object/apply:os.system [echo s3cret]", ": is no YAML: line 1: could not determine a constructor"),
        ("a: *b", ": is no YAML: line 1: found undefined alias"),
        ("port: 1\n---\nport: 2", ": is no YAML: line 2: but found another document"),
        ("a: \x07", ": is no YAML: ReaderError"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_file(str(path))
    message = str(caught.value)
    assert message.removeprefix("--config ").startswith(f"{path}{problem}"), message
    assert "s3cret" not in message


def test_switches_that_are_off_pass(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("service_discovery: false\nenable_trace: false\nhistory_backend: none\nenable_igw: true\n")
    found, notes = read_file(str(path))
    assert not found
    assert notes == [f"{path}: enable_igw changes nothing: several models behind one router always work; --worker-urls are kept"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def problem(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            read_file(str(path))
        return str(caught.value).removeprefix(f"--config {path}: ")

    (tmp_path / "r.json").write_text("{}")
    (tmp_path / "broken.toml").write_text("port = \n")
    (tmp_path / "twice.toml").write_text("port = 1\nport = 2\n")
    (tmp_path / "latin.yaml").write_bytes(b"host: \xe9")
    (tmp_path / "large.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    assert problem(tmp_path / "r.json") == "the name must end in .yaml, .yml or .toml"
    assert problem(tmp_path / "none.yaml") == "cannot be read (No such file or directory)"
    assert problem(tmp_path / "broken.toml").startswith("is no TOML: Invalid value (at line 1")
    assert problem(tmp_path / "twice.toml").startswith("is no TOML: Cannot overwrite a value")
    assert problem(tmp_path / "latin.yaml") == "must be UTF-8 text"
    assert problem(tmp_path / "large.yaml") == "is larger than 1048576 bytes"
