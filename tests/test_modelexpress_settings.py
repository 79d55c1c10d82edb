"""The flags of `sglfast modelexpress serve`: every field is one, and what cannot work is refused by name."""

import argparse
import dataclasses

import pytest

from sglfast.errors import ConfigError
from sglfast.modelexpress.settings import ServeSettings, add_flags, from_args


def parsed(*argv: str) -> ServeSettings:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_args(parser.parse_args(argv))


def test_defaults_work_and_are_upstreams() -> None:
    settings = parsed()
    assert settings == ServeSettings()
    assert (settings.port, settings.metrics_port, settings.max_message_bytes) == (8001, 9401, 100 << 20)
    assert (settings.scan_interval_secs, settings.heartbeat_timeout_secs, settings.gc_timeout_secs) == (30.0, 90.0, 3600.0)


def test_every_field_is_a_flag_with_help() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = " ".join(parser.format_help().split())
    for field in dataclasses.fields(ServeSettings):
        assert "--" + field.name.replace("_", "-") in text
        assert " ".join(field.metadata["help"].split())[:30] in text


def test_flags_are_read() -> None:
    settings = parsed(
        "--storage", "redis://db:6379/1", "--keep-alive", "Qwen/X", "all", "--keep-alive-health-url", "http://{host}:30000/health",
        "--port", "0", "--source-id-form", "april", "--allowed-service-accounts", "a:b", "c:d", "--token-audiences", "x",
    )  # fmt: skip
    assert settings.keep_alive == ("Qwen/X", "all")
    assert settings.allowed_service_accounts == ("a:b", "c:d")
    assert (settings.storage, settings.port, settings.source_id_form) == ("redis://db:6379/1", 0, "april")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--port", "70000"], "--port 70000: must be at most 65535"),
        (["--metrics-port", "-2"], "--metrics-port -2: must be at least -1"),
        (["--heartbeat-timeout-secs", "nan"], "--heartbeat-timeout-secs nan: must be a finite number"),
        (["--gc-timeout-secs", "0"], "--gc-timeout-secs 0.0: must be at least 0.1"),
        (["--storage", ""], "--storage: give the path"),
        (["--redis-prefix", "a{b"], "--redis-prefix a{b: must be"),
        (["--keep-alive-health-url", "http://{host}/"], "--keep-alive-health-url needs --keep-alive"),
        (["--keep-alive", "all", "--keep-alive-health-url", "{host}:30000"], "must look like http://{host}:30000/health"),
        (["--keep-alive", "all", "--keep-alive-health-url", "http://{port}/"], "must look like http://{host}:30000/health"),
        (["--keep-alive", "all", "--keep-alive-health-url", "http://{host}:x/"], "must look like http://{host}:30000/health"),
        (["--keep-alive", "all", "--scan-interval-secs", "100"], "--scan-interval-secs 100.0: must not be above"),
        (["--allowed-service-accounts", "seed"], "--allowed-service-accounts seed: must look like namespace:name"),
        (["--token-audiences", "x"], "--token-audiences needs --allowed-service-accounts"),
        (["--max-message-bytes", "5"], "--max-message-bytes 5: must be at least 1024"),
    ],
)
def test_what_cannot_work_is_refused(argv: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(*argv)
    assert text in str(caught.value)
