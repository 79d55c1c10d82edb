"""sglfast.config.sources: flag before environment before file before default; what means nothing is refused by name."""

import argparse
import re
from pathlib import Path

import pytest

from sglfast.config.fields import FIELDS
from sglfast.config.flags import add_flags, given_in
from sglfast.config.idle import DEFAULT
from sglfast.config.sglang_router import FOREIGN
from sglfast.config.sources import OTHER_VARIABLES, PREFIX, Loaded, load, without_settings
from sglfast.errors import ConfigError
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH

ROOT = Path(__file__).parent.parent
STEERING = "--policy cache_aware (or auto) with --tokenizer-path: nothing else chooses a rank"
LIMITS = "--max-concurrent-requests, --rate-limit-tokens-per-second, --worker-max-in-flight"
SUFFIXES = {".py", ".c", ".h", ".pyx", ".pxi", ".pxd"}


def loaded(*args: str, **environment: str) -> Loaded:
    parser = argparse.ArgumentParser(prog="sglfast serve")
    add_flags(parser)
    return load(given_in(parser.parse_args(args)), environment)


def refusal(*args: str, **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(*args, **environment)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "router.yaml"
    path.write_text("port: 1\nqueue_size: 11\nshards: 3\n")
    return path


def test_flag_before_environment_before_file_before_default(file: Path) -> None:
    settings = loaded("--config", str(file), "--port", "3", SGLFAST_PORT="2", SGLFAST_QUEUE_SIZE="12")
    config, origins = settings.config, settings.origins
    assert (config.port, origins["port"]) == (3, "--port")
    assert (config.queue_size, origins["queue_size"]) == (12, "SGLFAST_QUEUE_SIZE")
    assert (config.shards, origins["shards"]) == (3, f"{file}: shards")
    assert (config.host, origins["host"]) == ("0.0.0.0", DEFAULT)
    assert loaded(SGLFAST_CONFIG=str(file)).config.port == 1
    assert loaded("--config", str(file), SGLFAST_CONFIG="/no/such").config.port == 1, "a flag wins here too"
    assert set(origins) == set(FIELDS)


def test_the_same_command_line_can_be_read_twice() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert given_in(parser.parse_args(["--port", "5"])) != given_in(parser.parse_args([])) == {}


def test_variables_of_every_form() -> None:
    config = loaded(
        SGLFAST_WORKER_URLS="http://a:1, http://b:2\nhttp://c:3",
        SGLFAST_REQUEST_TIMEOUT_SECS="7",
        SGLFAST_DISABLE_RETRIES="true",
        SGLFAST_PASSTHROUGH="0",
        SGLFAST_CONTROL_PLANE_API_KEYS="k1:Service Account:admin:one, k2:Read Only:user:two",
        SGLFAST_SHUTDOWN_GRACE_PERIOD_SECS="9",
        SGLFAST_LOG_LEVEL="warn",
        SGLFAST_API_KEY="",  # as if it were not there
    ).config
    assert config.worker_urls == ("http://a:1", "http://b:2", "http://c:3")
    assert config.request_timeout_secs == 7.0
    assert config.disable_retries
    assert not config.passthrough
    assert config.control_plane_api_keys == ("k1:Service Account:admin:one", "k2:Read Only:user:two")
    assert config.shutdown_grace_secs == 9.0
    assert config.log_level == "warning"
    assert config.api_key is None


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("SGLFAST_PROT", "1", "SGLFAST_PROT: there is no such setting; the closest is SGLFAST_PORT"),
        ("SGLFAST_port", "1", "SGLFAST_port: there is no such setting; the closest is SGLFAST_PORT"),
        ("SGLFAST_", "1", "SGLFAST_: there is no such setting"),
        ("SGLFAST_XQZ", "1", "SGLFAST_XQZ: there is no such setting"),
        ("SGLFAST_PORT", "eighty", "SGLFAST_PORT eighty: must be a whole number"),
        ("SGLFAST_DISABLE_RETRIES", "maybe", "SGLFAST_DISABLE_RETRIES maybe: must be true or false"),
        ("SGLFAST_ENABLE_TRACE", "true", f"SGLFAST_ENABLE_TRACE: {FOREIGN['enable_trace'].why}"),
    ],
)
def test_wrong_variables(name: str, value: str, text: str) -> None:
    assert refusal(**{name: value}) == text


def test_a_setting_under_two_names_is_refused() -> None:
    text = "SGLFAST_SHUTDOWN_GRACE_SECS: is the same setting as SGLFAST_SHUTDOWN_GRACE_PERIOD_SECS; give one of them"
    assert refusal(SGLFAST_SHUTDOWN_GRACE_SECS="1", SGLFAST_SHUTDOWN_GRACE_PERIOD_SECS="1") == text


def test_variables_that_are_no_settings() -> None:
    for name in OTHER_VARIABLES:
        assert loaded(**{name: "1"}).config == loaded().config
    assert loaded(SGLFASTER="1", PORT="1").config == loaded().config


def test_all_variables_that_the_tree_reads_are_known() -> None:
    """The build, the tests and the compiled modules have a few, commands read settings of the router; a new one would end every start."""
    sources = [path for folder in ("sglfast", "cext", "tests", "bench") for path in (ROOT / folder).rglob("*.*") if path.suffix in SUFFIXES]
    read = {
        name
        for path in [*sources, ROOT / "setup.py"]
        for name in re.findall(r"(?:environ\.get|getenv)\(\"(SGLFAST_\w+)\"", path.read_text())
    }
    assert len(read) >= 4
    assert read <= OTHER_VARIABLES | {PREFIX + name.upper() for name in FIELDS}


def test_what_kubernetes_sets_beside_a_service_of_our_name() -> None:
    """https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables"""
    links = {
        "SGLFAST_SERVICE_HOST": "10.0.0.11",
        "SGLFAST_SERVICE_PORT": "30000",
        "SGLFAST_SERVICE_PORT_HTTP": "30000",
        "SGLFAST_PORT": "tcp://10.0.0.11:30000",
        "SGLFAST_PORT_30000_TCP": "tcp://10.0.0.11:30000",
        "SGLFAST_PORT_30000_TCP_PROTO": "tcp",
        "SGLFAST_PORT_30000_TCP_PORT": "30000",
        "SGLFAST_PORT_30000_TCP_ADDR": "10.0.0.11",
        "SGLFAST_ROUTER_SERVICE_HOST": "10.0.0.12",
        "SGLFAST_ADMIN_PORT": "tcp://10.0.0.12:1",
    }
    settings = loaded(**links)
    assert settings.config == loaded().config
    assert set(settings.origins.values()) == {DEFAULT}
    assert loaded(SGLFAST_PORT="31000").config.port == 31000


def test_what_changes_nothing_is_noted() -> None:
    notes = loaded(
        "--policy", "round_robin", "--cache-threshold", "0.4", "--queue-size", "3", "--disable-retries", "--retry-max-retries", "4",
        "--disable-circuit-breaker", "--disable-health-check", "--enable-igw", "--max-tree-size", "5",
        SGLFAST_CB_SUCCESS_THRESHOLD="2", SGLFAST_HEALTH_CHECK_INTERVAL_SECS="3", SGLFAST_EVICTION_INTERVAL_SECS="4",
    ).notes  # fmt: skip
    assert notes == (
        "--enable-igw changes nothing: several models behind one router always work; --worker-urls are kept",
        "--max-tree-size changes nothing: the KV index holds what the workers' caches hold; --kv-index-blocks is its limit",
        "SGLFAST_EVICTION_INTERVAL_SECS changes nothing: the KV index holds what the workers' caches hold; --kv-index-blocks is its limit",
        "--cache-threshold changes nothing: --policy round_robin does not look at caches",
        f"--queue-size changes nothing: without one of {LIMITS} nobody waits",
        "--retry-max-retries changes nothing: --disable-retries is given",
        "SGLFAST_CB_SUCCESS_THRESHOLD changes nothing: --disable-circuit-breaker is given",
        "SGLFAST_HEALTH_CHECK_INTERVAL_SECS changes nothing: --disable-health-check is given",
    )
    assert loaded().notes == loaded("--policy", "auto", "--port", "4").notes == ()
    assert loaded("--policy", "cache_aware").notes == ()
    assert loaded("--policy", "cache_aware", "--prediction-blocks", "0").notes == (
        "--policy cache_aware chooses by load: without --tokenizer-path no prompt is matched to KV blocks, and --prediction-blocks 0 "
        "leaves nothing else",
    )


def test_a_secret_on_the_command_line_is_noted_and_not_shown() -> None:
    (note,) = loaded("--api-key", "s3cret").notes
    assert note == "--api-key on a command line can be read by every user of this machine; SGLFAST_API_KEY or a file cannot"
    assert loaded(SGLFAST_API_KEY="s3cret").notes == ()
    for args in (["--api-key", "s3cret blank"], ["--api-keys", "s3cret"], ["--control-plane-api-keys", "a:b:s3cret:s3cret"]):
        assert "s3cret" not in refusal(*args)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--admin-host", "10.0.0.1"], "--admin-host needs --admin-port"),
        (["--priority-header", "x-p"], f"--priority-header needs one of {LIMITS}: without a limit nobody waits"),
        (["--main-port-paths", "no-metrics"], "--main-port-paths needs --prometheus-port or --admin-port"),
        (["--main-port-paths", "data", "--prometheus-port", "29000"], "--main-port-paths needs --admin-port"),
        (["--log-files-kept", "3"], "--log-files-kept needs --log-dir"),
        *(
            (args, f"--disable-dp-steering needs {STEERING}")
            for args in (
                ["--disable-dp-steering"],
                ["--disable-dp-steering", "--policy", "cache_aware"],
                ["--disable-dp-steering", "--policy", "random", "--tokenizer-path", DEMO_TOKENIZER_PATH],
            )
        ),
        (["--tenant-fairness"], f"--tenant-fairness needs one of {LIMITS}: without a limit nobody waits"),
    ],
)
def test_a_flag_that_needs_another(args: list[str], text: str) -> None:
    assert refusal(*args) == text


def test_who_chooses_a_rank_is_said_once() -> None:
    text = "--dp-aware and --disable-dp-steering: choose the data-parallel rank, or leave it to the workers, not both"
    assert refusal("--dp-aware", "--disable-dp-steering", "--tokenizer-path", DEMO_TOKENIZER_PATH) == text
    assert refusal("--disable-dp-steering", "--tokenizer-path", DEMO_TOKENIZER_PATH, SGLFAST_DP_AWARE="true") == text
    for args in (
        ["--dp-aware"],
        ["--dp-aware", "--policy", "round_robin"],
        ["--disable-dp-steering", "--tokenizer-path", DEMO_TOKENIZER_PATH],
    ):
        assert loaded(*args).notes == ()


@pytest.mark.parametrize("limit", ["--max-concurrent-requests", "--rate-limit-tokens-per-second", "--worker-max-in-flight"])
def test_each_limit_makes_a_queue(limit: str) -> None:
    assert loaded(limit, "5", "--queue-size", "3", "--priority-header", "x-p", "--tenant-fairness").notes == ()


def test_the_metrics_port_of_sglang_router() -> None:
    """Naming either turns it on, with sglang-router's default for the other."""
    assert (loaded().config.prometheus_host, loaded().config.prometheus_port) == (None, None)
    for args, host, port in (
        (["--prometheus-port", "29001"], "0.0.0.0", 29001),
        (["--prometheus-host", "127.0.0.1"], "127.0.0.1", 29000),
        (["--prometheus-host", "127.0.0.1", "--prometheus-port", "0"], "127.0.0.1", 0),
    ):
        config = loaded(*args).config
        assert (config.prometheus_host, config.prometheus_port) == (host, port)


def test_a_file_of_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# who may come\nred:one\n\n  blue:t:wo  \n")
    settings = loaded("--api-keys", "green:zero", "--api-key-file", str(keys))
    assert settings.config.api_keys == settings.given.api_keys == ("green:zero", "red:one", "blue:t:wo")
    keys.write_text("red:one\ns3cret\n")
    assert refusal("--api-key-file", str(keys)) == f"--api-key-file {keys}: line 2 must look like NAME:KEY"
    keys.write_bytes("red:\u00fc".encode())
    assert refusal("--api-key-file", str(keys)) == f"--api-key-file {keys}: must be ASCII text"
    keys.unlink()
    assert refusal("--api-key-file", str(keys)) == f"--api-key-file {keys}: cannot be read (No such file or directory)"


def test_children_get_no_settings_in_their_environment() -> None:
    environment = {"PATH": "/bin", "SGLFAST_API_KEY": "s3cret", "SGLFAST_CONFIG": "x.yaml", "SGLFAST_SHA": "portable"}
    assert without_settings(environment) == {"PATH": "/bin", "SGLFAST_SHA": "portable"}
