"""sglfast.config: flags, help, every refusal with its message, and the way to a child process."""

import argparse
import dataclasses
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglfast.config import POLICIES, ServeConfig, check, from_json, to_json
from sglfast.config import fields as meanings
from sglfast.config.flags import add_flags, given_in
from sglfast.config.sources import load
from sglfast.errors import ConfigError
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH

URL = "http://10.0.0.5:30000"
FIELDS = {field.name: field for field in dataclasses.fields(ServeConfig)}
NUMBERS = {name: field for name, field in FIELDS.items() if "low" in field.metadata}
_PORTS = ("port", "admin_port", "prometheus_port")


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind_of(name: str) -> type:
    return meanings.FIELDS[name].kind


def parse(*args: str) -> ServeConfig:
    parser = argparse.ArgumentParser(prog="sglfast serve")
    add_flags(parser)
    return load(given_in(parser.parse_args(args)), {}).config


def serve(*args: str) -> ServeConfig:
    return parse("--worker-urls", URL, *args)


def with_setting(name: str, value: Any) -> ServeConfig:
    return dataclasses.replace(ServeConfig(worker_urls=(URL,)), **{name: value})


FOLDER = DEMO_TOKENIZER_PATH
TESTS = os.path.dirname(__file__)
SPECIAL: dict[str, tuple[list[str], Any]] = {
    "worker_urls": ([URL], (URL,)),
    "prefill": (["http://p:1", "9000"], ("http://p:1 9000",)),
    "decode": (["http://d:1"], ("http://d:1",)),
    "host": (["127.0.0.1"], "127.0.0.1"),
    "tokenizer_path": ([FOLDER], FOLDER),
    "model_path": ([FOLDER], FOLDER),
    "chat_template": ([__file__], __file__),
    "health_check_endpoint": (["/v1/models"], "/v1/models"),
    "max_ranks": (["128"], 128),
    "max_workers": (["77"], 77),
    "kv_listen": (["tcp://0.0.0.0:5557"], "tcp://0.0.0.0:5557"),
    "kv_endpoint": (["tcp://*:5557"], ("tcp://*:5557",)),
    "request_id_headers": (["X-Trace", "my-id"], ("x-trace", "my-id")),
    "priority_header": (["X-Priority"], "x-priority"),
    "api_keys": (["team:secret"], ("team:secret",)),
    "control_plane_api_keys": (["id:A Name:admin:sec:ret"], ("id:A Name:admin:sec:ret",)),
    "cors_allowed_origins": (["https://a.example", "https://b.example"], ("https://a.example", "https://b.example")),
    "ca_cert_paths": ([__file__, __file__], (__file__, __file__)),
    "api_key_file": ([os.devnull], os.devnull),
    "log_dir": ([FOLDER], FOLDER),
}
# What else a setting needs, or brings with it.
NEEDS = {
    "admin_host": ["--admin-port", "31000"],
    "chat_template": ["--tokenizer-path", FOLDER],
    "priority_header": ["--max-concurrent-requests", "9"],
    "prefill": ["--decode", "http://d:1"],
    "decode": ["--prefill", "http://p:1"],
    "prefill_policy": ["--pd-disaggregation"],
    "decode_policy": ["--pd-disaggregation"],
    "tenant_fairness": ["--max-concurrent-requests", "9"],
    "main_port_paths": ["--prometheus-port", "29000"],
    "log_files_kept": ["--log-dir", FOLDER],
    "disable_dp_steering": ["--tokenizer-path", FOLDER],
} | {
    one: [flag_of(other), __file__]
    for pair in (("tls_cert_path", "tls_key_path"), ("client_cert_path", "client_key_path"))
    for one, other in (pair, pair[::-1])
}  # fmt: skip
BRINGS = {"model_path": {"tokenizer_path"}, "prometheus_host": {"prometheus_port"}, "prometheus_port": {"prometheus_host"},
          "disable_retries": {"retry_max_retries"}}  # fmt: skip


def another_value(name: str) -> tuple[list[str], Any]:
    """(words of the command line, value) of a setting, valid and not its default."""
    field = meanings.FIELDS[name]
    if name in SPECIAL:
        return SPECIAL[name]
    if "choices" in field.meta:
        value = next(choice for choice in field.meta["choices"] if choice not in (field.default, "cache_aware"))
        return [value], value
    if field.kind is bool:
        return ["true"], True
    if field.kind is str:
        text = __file__ if name.endswith("_path") else "a-value"
        return [text], text
    low, high, default = field.meta["low"], field.meta.get("high"), field.default if field.default is not None else field.meta["low"]
    value = field.kind((low + default) / 2 if low != default else high if high is not None else low + 1)
    if value == field.default:
        value += 1
    return [str(value)], value


# ---- flags and fields ----


@pytest.mark.parametrize("name", list(FIELDS))
def test_each_field_is_a_flag(name: str) -> None:
    words, value = another_value(name)
    needed = NEEDS.get(name, [])
    assert getattr(serve(), name) != value or name == "worker_urls"
    for spelled in meanings.FIELDS[name].names:
        after = parse("--worker-urls", URL) if name == "worker_urls" else serve(flag_of(spelled), *words, *needed)
        assert getattr(after, name) == value
        assert type(getattr(after, name)) is type(value)
        if name != "worker_urls" and needed[:1] != [flag_of("tokenizer_path")]:
            before = serve() if "_cert_" in name or "_key_" in name or name in ("prefill", "decode") else serve(*needed)
            changed = {field for field in FIELDS if getattr(before, field) != getattr(after, field)}
            assert changed - {name} <= BRINGS.get(name, set()) | {flag[2:].replace("-", "_") for flag in needed[:1]}


def test_switches_stand_alone_or_with_a_word() -> None:
    assert serve("--passthrough", "--port", "7").passthrough
    for word, value in (("true", True), ("on", True), ("1", True), ("False", False), ("no", False)):
        assert serve("--passthrough", word).passthrough is value
    with pytest.raises(ConfigError, match=r"^--passthrough maybe: must be true or false$"):
        serve("--passthrough", "maybe")


def test_the_last_one_counts_and_abbreviations_work() -> None:
    assert serve("--port", "1", "--port", "2").port == 2
    assert serve("--worker-urls", "http://b:1").worker_urls == ("http://b:1",)
    assert serve("--max-concurrent", "3").max_concurrent_requests == 3


def test_without_worker_urls_they_come_later() -> None:
    assert parse().worker_urls == parse("--worker-urls").worker_urls == ()
    assert parse().max_ranks == 256


def test_log_level_of_sglang_router() -> None:
    assert serve("--log-level", "warn").log_level == "warning"
    assert serve("--policy", "cache_aware_zmq").policy == "cache_aware"


def test_without_flags_all_is_the_default() -> None:
    config = serve()
    expected = {name: field.default for name, field in FIELDS.items()}
    expected |= {"worker_urls": (URL,), "shards": len(os.sched_getaffinity(0)), "max_ranks": 64}
    assert dataclasses.asdict(config) == expected


def test_help_names_every_flag_its_default_and_its_unit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100000")  # one line an entry
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    entries = dict(re.findall(r"^  (--[a-z-]+)[^\n]*?(?:  |\n {10,}) *(\S[^\n]*)$", out, re.MULTILINE))
    assert set(entries) == {flag_of(name) for name in FIELDS} | {"--config"}
    for name, field in FIELDS.items():
        text = entries[flag_of(name)]
        assert field.metadata["help"] in text
        has_default = field.default not in (None, (), "") and kind_of(name) is not bool
        default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
        assert text.endswith(f"(default: {default})") == has_default, text
        assert "choices" not in field.metadata or f"{flag_of(name)} {{{','.join(field.metadata['choices'])}}}" in out


def test_names_tell_units_and_help_is_no_sentence_fragment() -> None:
    for name, field in FIELDS.items():
        if ("timeout" in name or "interval" in name or "grace" in name) and name != "worker_startup_check_interval":
            assert name.endswith("_secs")  # sglang-router's own name lacks the unit there
        assert field.metadata["help"].strip() == field.metadata["help"] != ""
        assert field.metadata["group"]


@pytest.mark.parametrize("args", [["--no-such-flag"], ["--port"], ["--prompt-cache", "1", "stray"], ["--retry", "1"]])
def test_unknown_flags_end_with_usage(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*args)
    assert caught.value.code == 2
    assert args[-1 if "stray" in args else 0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--shards", "two"], "--shards two: must be a whole number"),
        (["--shards", "1.5"], "--shards 1.5: must be a whole number"),
        (["--header-timeout-secs", "soon"], "--header-timeout-secs soon: must be a number"),
        (["--policy", "fastest"], f"--policy fastest: must be one of {', '.join(POLICIES)}"),
        (["--log-format", "xml"], "--log-format xml: must be one of text, json"),
        (["--tokenizer-cache-l1-max-memory", "x"], "--tokenizer-cache-l1-max-memory x: must be a whole number"),
    ],
)
def test_wrong_values_are_our_errors(args: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        serve(*args)


# ---- limits ----


@pytest.mark.parametrize("name", list(NUMBERS))
def test_numbers_have_limits(name: str) -> None:
    meta, kind = NUMBERS[name].metadata, kind_of(name)
    low, high = meta["low"], meta.get("high", sys.maxsize)
    step = 1 if kind is int else 0.01
    for value in (low, high if "high" in meta else low * 1000 + 1000):
        if name == "max_ranks" and value % 64:
            continue
        assert getattr(check(with_setting(name, value)), name) is not None
    for value, text in ((low - step, f"must be at least {low}"), (high * 2 + step, f"must be at most {high}")):
        with pytest.raises(ConfigError, match=f"^{flag_of(name)} {re.escape(str(value))}: {re.escape(text)}$"):
            check(with_setting(name, value))
    if kind is float:
        for value in (math.inf, -math.inf, math.nan):
            with pytest.raises(ConfigError, match=f"^{flag_of(name)} {value}: must be a finite number$"):
                check(with_setting(name, value))


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if "choices" in field.metadata])
def test_choices(name: str) -> None:
    choices = FIELDS[name].metadata["choices"]
    for choice in choices:
        config = ServeConfig(worker_urls=(URL,), tokenizer_path=FOLDER)
        assert getattr(check(dataclasses.replace(config, **{name: choice})), name) == choice
    for wrong in ("", "Info", "nonsense"):
        with pytest.raises(ConfigError, match=f"^{flag_of(name)} {wrong}: must be one of {', '.join(choices)}$"):
            check(with_setting(name, wrong))


def test_the_policies_of_the_design_are_there() -> None:
    assert set(POLICIES) == {"auto", "cache_aware", "round_robin", "random", "power_of_two", "least_load"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"worker_urls": (URL, URL + "/")}, f"--worker-urls: {URL} is given twice"),
        ({"worker_urls": ("http://a:80", "http://A")}, "--worker-urls: http://a:80 is given twice"),
        (
            {"worker_urls": ("http://a", "http://b", "http://c"), "max_workers": 2},
            "--worker-urls: 3 workers are more than --max-workers 2",
        ),
        ({"model_path": "org/model"}, "--model-path org/model: no such folder; give the folder that holds the model's tokenizer.json"),
        ({"chat_template": __file__}, "--chat-template needs --tokenizer-path: without a tokenizer no prompt is rendered"),
        ({"kv_listen": "0.0.0.0:5557"}, "--kv-listen 0.0.0.0:5557: must look like tcp://0.0.0.0:5557"),
        ({"admin_port": 30000}, "--admin-port 30000: is the same as --port"),
        ({"admin_port": 31000, "prometheus_port": 31000}, "--prometheus-port 31000: is the same as --admin-port"),
        (
            {"tls_cert_path": __file__},
            "--tls-cert-path needs --tls-key-path: a certificate and its private key work only together",
        ),
        (
            {"client_key_path": __file__},
            "--client-key-path needs --client-cert-path: a certificate and its private key work only together",
        ),
        ({"ca_cert_paths": (__file__, "/no/ca.pem")}, "--ca-cert-paths /no/ca.pem: cannot be read (No such file or directory)"),
        ({"api_key_file": "/no/keys"}, "--api-key-file /no/keys: cannot be read (No such file or directory)"),
        ({"ca_cert_paths": (TESTS,)}, f"--ca-cert-paths {TESTS}: is a folder, not a file"),
        ({"tokenizer_path": TESTS}, f"--tokenizer-path {TESTS}: there is no tokenizer.json in this folder"),
        ({"model_path": TESTS}, f"--model-path {TESTS}: there is no tokenizer.json in this folder; or name it with --tokenizer-path"),
        ({"log_dir": __file__}, f"--log-dir {__file__}: is no folder"),
        ({"request_id_headers": ("x id",)}, "--request-id-headers x id: is no name of a header"),
        ({"priority_header": "x:y"}, "--priority-header x:y: is no name of a header"),
        ({"api_key": "sec ret"}, "--api-key: must be visible ASCII characters without blanks"),
        ({"admin_api_key": ""}, "--admin-api-key: must be visible ASCII characters without blanks"),
        ({"api_keys": ("a:secret", "secret")}, "--api-keys: entry 2 must look like NAME:KEY"),
        ({"control_plane_api_keys": ("secret",)}, "--control-plane-api-keys: entry 1 must look like ID:NAME:ROLE:KEY"),
        ({"control_plane_api_keys": ("i:n:root:secret",)}, "--control-plane-api-keys: the role of entry 1 must be one of admin, user"),
        ({"tokenizer_path": "/no/such"}, "--tokenizer-path /no/such: no such file or folder"),
        ({"tokenizer_path": ""}, "--tokenizer-path : no such file or folder"),
        ({"health_check_endpoint": "health"}, "--health-check-endpoint health: must begin with /"),
        ({"health_check_endpoint": ""}, "--health-check-endpoint : must begin with /"),
        ({"max_ranks": 65}, "--max-ranks 65: must be a multiple of 64"),
        ({"max_ranks": 1}, "--max-ranks 1: must be a multiple of 64"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        check(ServeConfig(**{"worker_urls": (URL,), **changes}))


def test_errors_of_the_command_line_are_ours() -> None:
    with pytest.raises(ConfigError, match=r"^--port 70000: must be at most 65535$"):
        serve("--port", "70000")


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://Page.example", "https://page.example"),
        ("http://a:3000/", "http://a:3000"),
        ("*", "*"),
        ("null", "null"),
        ("a", None),
        ("http://a/path", None),
        ("http://u@a", None),
        ("http://", None),
        ("http://a?x", None),
        ("http://[::1", None),
    ],
)
def test_origins(text: str, origin: str | None) -> None:
    """One that no browser writes would never match, and nobody would know why."""
    config = ServeConfig(worker_urls=(URL,), cors_allowed_origins=(text,))
    if origin is not None:
        assert check(config).cors_allowed_origins == (origin,)
        return
    with pytest.raises(ConfigError, match=f"^--cors-allowed-origins {re.escape(text)}: must look like https://page.example.com"):
        check(config)


@pytest.mark.parametrize(("workers", "ranks"), [(1, 64), (16, 64), (17, 128), (32, 128), (33, 192), (256, 1024), (257, 1024), (1024, 1024)])
def test_ranks_follow_the_workers(workers: int, ranks: int) -> None:
    """Room for four ranks a worker, in steps of 64, up to 1024; unless the flag says otherwise."""
    urls = tuple(f"http://w{number}" for number in range(workers))
    assert check(ServeConfig(worker_urls=urls)).max_ranks == ranks
    assert check(ServeConfig(worker_urls=urls, max_ranks=640)).max_ranks == 640


def test_shards_follow_the_machine() -> None:
    assert serve().shards == len(os.sched_getaffinity(0))
    assert serve("--shards", "7").shards == 7


# ---- to a child process ----


def test_a_child_gets_all_settings() -> None:
    others = ("worker_urls", "max_concurrent_requests", "disable_dp_steering")  # given otherwise, or not beside --dp-aware
    names = [name for name in FIELDS if name not in others]
    words = [word for name in names for word in (flag_of(name), *another_value(name)[0])]
    config = serve(*words, "--max-concurrent-requests", "9", "--prometheus-port", "9")
    assert from_json(to_json(config)) == config
    assert from_json(to_json(serve())) == serve()


def checkable(name: str) -> st.SearchStrategy[Any]:
    meta = FIELDS[name].metadata
    low, high = meta["low"], meta.get("high", sys.maxsize)
    if name == "max_ranks":
        return st.integers(0, 16).map(lambda words: words * 64)
    return st.integers(low, high) if kind_of(name) is int else st.floats(low, min(float(high), 1e18))


@given(st.fixed_dictionaries({}, optional={name: checkable(name) for name in NUMBERS}))
def test_whatever_passes_the_check_survives_the_way(values: dict[str, Any]) -> None:
    values |= {name: place for place, name in enumerate(_PORTS, 1) if name in values}
    config = check(ServeConfig(worker_urls=(URL,), **values))
    assert from_json(to_json(config)) == config
    assert check(config) == config, "a checked configuration passes again, unchanged"


def test_secrets_are_in_no_representation() -> None:
    config = serve(
        "--api-key", "s3cret", "--api-keys", "a:s3cret", "--control-plane-api-keys", "i:n:admin:s3cret", "--admin-api-key", "s3cret"
    )
    assert "s3cret" not in repr(config)
    assert {name for name, field in FIELDS.items() if "secret" in field.metadata} == {
        "api_key", "api_keys", "worker_api_key", "admin_api_key", "control_plane_api_keys",
    }  # fmt: skip


def test_settings_cannot_be_changed() -> None:
    config = serve()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 1  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        config.prot = 1  # type: ignore[attr-defined]


def test_tokenizer_path_may_be_a_folder_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    for path in (tmp_path, file):  # what is in it is seen when it is loaded
        assert serve("--policy", "cache_aware", "--tokenizer-path", str(path)).tokenizer_path == str(path)
