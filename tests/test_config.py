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

from sglfast.config import POLICIES, ServeConfig, add_flags, check, from_args, from_json, to_json
from sglfast.errors import ConfigError

URL = "http://10.0.0.5:30000"
FIELDS = {field.name: field for field in dataclasses.fields(ServeConfig)}
NUMBERS = {name: field for name, field in FIELDS.items() if "low" in field.metadata}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind_of(name: str) -> type:
    return type(FIELDS[name].default)


def parse(*args: str) -> ServeConfig:
    parser = argparse.ArgumentParser(prog="sglfast serve")
    add_flags(parser)
    return from_args(parser.parse_args(args))


def serve(*args: str) -> ServeConfig:
    return parse("--worker-urls", URL, *args)


def with_setting(name: str, value: Any) -> ServeConfig:
    return dataclasses.replace(ServeConfig(worker_urls=(URL,)), **{name: value})


def another_value(name: str) -> tuple[str, Any]:
    """(command line text, value) of a setting, valid and not its default."""
    field = FIELDS[name]
    special = {
        "worker_urls": (URL, (URL,)),
        "host": ("0.0.0.0", "0.0.0.0"),
        "tokenizer_path": (os.path.dirname(__file__), os.path.dirname(__file__)),
        "health_check_endpoint": ("/v1/models", "/v1/models"),
        "max_ranks": ("128", 128),
        "max_workers": ("77", 77),
        "kv_listen": ("tcp://0.0.0.0:5557", "tcp://0.0.0.0:5557"),
    }
    if name in special:
        return special[name]
    if "choices" in field.metadata:
        value = next(choice for choice in field.metadata["choices"] if choice not in (field.default, "cache_aware"))
        return value, value
    low, high = field.metadata["low"], field.metadata.get("high")
    value = kind_of(name)((low + field.default) / 2 if low != field.default else high if high is not None else low + 1)
    assert value != field.default
    return str(value), value


# ---- flags and fields ----


@pytest.mark.parametrize("name", list(FIELDS))
def test_each_field_is_a_flag(name: str) -> None:
    text, value = another_value(name)
    before, after = serve(), parse("--worker-urls", URL) if name == "worker_urls" else serve(flag_of(name), text)
    assert getattr(after, name) == value
    assert type(getattr(after, name)) is type(value)
    if name != "worker_urls":
        assert dataclasses.replace(after, **{name: getattr(before, name)}) == before, "no other setting changes"


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
    assert set(entries) == {flag_of(name) for name in FIELDS}
    for name, field in FIELDS.items():
        text = entries[flag_of(name)]
        assert field.metadata["help"] in text
        has_default = field.default not in (None, (), "")
        assert text.endswith(f"(default: {field.default})") == has_default, text
        assert "choices" not in field.metadata or f"{flag_of(name)} {{{','.join(field.metadata['choices'])}}}" in out


def test_names_tell_units_and_help_is_no_sentence_fragment() -> None:
    for name, field in FIELDS.items():
        if "timeout" in name or "interval" in name or "grace" in name:
            assert name.endswith("_secs")
        assert field.metadata["help"].strip() == field.metadata["help"] != ""
        assert field.metadata["group"]


@pytest.mark.parametrize(
    "args",
    [
        ["--no-such-flag"],
        ["--shards", "two"],
        ["--shards", "1.5"],
        ["--header-timeout-secs", "soon"],
        ["--policy", "fastest"],
        ["--log-format", "xml"],
        ["--worker-urls"],
        ["--port"],
    ],
)
def test_unknown_flags_and_wrong_types_end_with_usage(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*args)
    assert caught.value.code == 2
    assert args[0] in capsys.readouterr().err


def test_other_names_of_the_command_line_are_left_alone() -> None:
    assert from_args(argparse.Namespace(worker_urls=[URL], shards=3, command="serve")).shards == 3


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
        config = ServeConfig(worker_urls=(URL,), tokenizer_path=os.path.dirname(__file__))
        assert getattr(check(dataclasses.replace(config, **{name: choice})), name) == choice
    for wrong in ("", "Info", "nonsense"):
        with pytest.raises(ConfigError, match=f"^{flag_of(name)} {wrong}: must be one of {', '.join(choices)}$"):
            check(with_setting(name, wrong))


def test_the_policies_of_the_design_are_there() -> None:
    assert set(POLICIES) == {"auto", "cache_aware", "round_robin", "random", "power_of_two", "least_load"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"worker_urls": ()}, "--worker-urls: give at least one worker URL, such as --worker-urls http://127.0.0.1:30001"),
        ({"worker_urls": (URL, URL + "/")}, f"--worker-urls: {URL} is given twice"),
        ({"worker_urls": ("http://a:80", "http://A")}, "--worker-urls: http://a:80 is given twice"),
        (
            {"worker_urls": ("http://a", "http://b", "http://c"), "max_workers": 2},
            "--worker-urls: 3 workers are more than --max-workers 2",
        ),
        (
            {"policy": "cache_aware", "prediction_blocks": 0},
            "--policy cache_aware with --prediction-blocks 0 needs --tokenizer-path: without the model's tokenizer and without predictions "
            "nothing is known of the workers' caches",
        ),
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


@pytest.mark.parametrize(("workers", "ranks"), [(1, 64), (16, 64), (17, 128), (32, 128), (33, 192), (256, 1024), (257, 1024), (1024, 1024)])
def test_ranks_follow_the_workers(workers: int, ranks: int) -> None:
    """Room for four ranks a worker, in steps of 64, up to 1024; unless the flag says otherwise."""
    urls = tuple(f"http://w{number}" for number in range(workers))
    assert check(ServeConfig(worker_urls=urls)).max_ranks == ranks
    assert check(ServeConfig(worker_urls=urls, max_ranks=640)).max_ranks == 640


def test_shards_follow_the_machine() -> None:
    assert serve().shards == len(os.sched_getaffinity(0))
    assert serve("--shards", "7").shards == 7


# ---- worker URLs ----


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://10.0.0.5:30000", "http://10.0.0.5:30000"),
        (" http://10.0.0.5:30000/ ", "http://10.0.0.5:30000"),
        ("http://worker", "http://worker"),
        ("HTTP://Worker-1.Pool:8000", "http://worker-1.pool:8000"),
        ("http://[::1]:30000", "http://[::1]:30000"),
        ("http://[fe80::1]", "http://[fe80::1]"),
    ],
)
def test_worker_urls(text: str, url: str) -> None:
    assert check(ServeConfig(worker_urls=(text,))).worker_urls == (url,)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("https://w:1", "TLS to workers is not supported yet; use http://"),
        ("w:30000", "must look like http://host:port"),
        ("10.0.0.5:30000", "must look like http://host:port"),
        ("grpc://w:1", "must look like http://host:port"),
        ("", "must look like http://host:port"),
        ("http://", "must look like http://host:port"),
        ("http://:30000", "must look like http://host:port"),
        ("http://w:70000", "Port out of range 0-65535"),
        ("http://w:http", "Port could not be cast"),
        ("http://w:0", "port 0 is no port that a worker can listen on"),
        ("http://[::1", "Invalid IPv6 URL"),
        ("http://w:1/v1", "give only scheme, host and port, such as http://w:1"),
        ("http://w:1?x=1", "give only scheme, host and port, such as http://w:1"),
        ("http://w:1?", "give only scheme, host and port, such as http://w:1"),
        ("http://w#", "give only scheme, host and port, such as http://w:80"),
        ("http://user:secret@w:1", "give only scheme, host and port, such as http://w:1"),
        ("http://:secret@w:1", "give only scheme, host and port, such as http://w:1"),
        ("http://@w:1", "give only scheme, host and port, such as http://w:1"),
        ("http://w:", "give only scheme, host and port, such as http://w:80"),
        ("http://w w:1", "give only scheme, host and port"),
        ("http://w\n.x:1", "give only scheme, host and port"),
    ],
)
def test_wrong_worker_urls_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(ServeConfig(worker_urls=("http://ok", text)))
    message = str(caught.value)
    assert message.startswith("--worker-urls ")
    assert problem in message


# ---- to a child process ----


def test_a_child_gets_all_settings() -> None:
    config = serve(*(part for name in FIELDS if name != "worker_urls" for part in (flag_of(name), another_value(name)[0])))
    assert from_json(to_json(config)) == config
    assert from_json(to_json(serve())) == serve()


def checkable(name: str) -> st.SearchStrategy[Any]:
    meta, default = FIELDS[name].metadata, FIELDS[name].default
    low, high = meta["low"], meta.get("high", sys.maxsize)
    if name == "max_ranks":
        return st.integers(0, 16).map(lambda words: words * 64)
    return st.integers(low, high) if type(default) is int else st.floats(low, min(float(high), 1e18))


@given(st.fixed_dictionaries({}, optional={name: checkable(name) for name in NUMBERS}))
def test_whatever_passes_the_check_survives_the_way(values: dict[str, Any]) -> None:
    config = check(ServeConfig(worker_urls=(URL,), **values))
    assert from_json(to_json(config)) == config
    assert check(config) == config, "a checked configuration passes again, unchanged"


def test_settings_cannot_be_changed() -> None:
    config = serve()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 1  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        config.prot = 1  # type: ignore[attr-defined]


def test_tokenizer_path_may_be_a_folder_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    for path in (tmp_path, file):
        assert serve("--policy", "cache_aware", "--tokenizer-path", str(path)).tokenizer_path == str(path)
