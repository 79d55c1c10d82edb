"""sglfast.control.reload: what SIGHUP changes, what it leaves and names; then a real router that is told to."""

import dataclasses
import http.client
import json
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from control_doubles import WAIT_S, remembering_log
from router_process import Router, engine, get, running

from sglfast.config import ServeConfig
from sglfast.config.fields import FIELDS
from sglfast.config.sources import Loaded, load
from sglfast.control.reload import Reloader
from sglfast.errors import ConfigError
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH


def loaded(**settings: object) -> Loaded:
    """What a file with these settings means."""
    file = {name: [("--" + name.replace("_", "-"), [str(value)])] for name, value in settings.items()}
    return load(file, {})


class Program:
    """Applies settings to nothing but itself."""

    def __init__(self, **settings: object) -> None:
        self.now = loaded(**settings)
        self.applied: list[ServeConfig] = []
        self.running = dataclasses.replace(self.now.config, port=45678)  # as --port 0 becomes a port
        self.log, self.seen = remembering_log()
        self.reloader = Reloader(self.running, self.now, lambda: self.now, self.applied.append, self.log)

    def reload(self, **settings: object) -> list[str]:
        """Lines of the log."""
        self.now = loaded(**settings)
        return self.again(lambda: self.now)

    def again(self, read: Callable[[], Loaded]) -> list[str]:
        self.reloader._read = read
        self.seen.lines.clear()
        self.reloader.reload()
        return list(self.seen.lines)


def test_live_settings_are_applied_and_others_named() -> None:
    program = Program(port=0, request_timeout_secs=10)
    lines = program.reload(port=1, shards=7, max_workers=9, request_timeout_secs=20, health_failure_threshold=4)
    (config,) = program.applied
    assert config == dataclasses.replace(program.running, request_timeout_secs=20.0, health_failure_threshold=4)
    assert lines == [
        "WARNING SIGHUP: these settings change only with a new start {'settings': '--max-workers, --port, --shards'}",
        "INFO SIGHUP: settings were read again {'changed': '--health-failure-threshold, --request-timeout-secs'}",
    ]
    # What waits for a new start is named as long as it waits; what is in force is not applied again.
    lines = program.reload(port=1, shards=7, request_timeout_secs=20, health_failure_threshold=4)
    assert len(program.applied) == 1
    assert lines[0].endswith("{'settings': '--port, --shards'}")
    assert lines[1].endswith("{'changed': 'nothing'}")
    # Taking a setting out of the file brings its default back.
    program.reload()
    assert program.applied[-1] == program.running.__class__(**{**dataclasses.asdict(program.running), "request_timeout_secs": 1800.0})


def test_settings_that_cannot_work_change_nothing() -> None:
    program = Program(request_timeout_secs=10)

    def read() -> Loaded:
        raise ConfigError("router.yaml: prot: there is no such setting")

    assert program.again(read) == ["ERROR SIGHUP: router.yaml: prot: there is no such setting; the settings stay as they were {}"]
    assert not program.applied


def test_what_a_live_setting_needs_may_be_missing_in_the_running_program() -> None:
    """--policy cache_aware is live, the tokenizer that comes with it is not: it goes on, and says what is missing."""
    folder = DEMO_TOKENIZER_PATH
    program = Program()
    lines = program.reload(policy="cache_aware", tokenizer_path=folder)
    assert program.applied[0].policy == "cache_aware"
    assert program.applied[0].tokenizer_path is None
    assert lines[0].endswith("{'settings': '--tokenizer-path'}")


def test_notes_are_told_again() -> None:
    program = Program()
    lines = program.reload(policy="round_robin", cache_threshold=0.3)
    assert lines[0] == "WARNING --cache-threshold changes nothing: --policy round_robin does not look at caches {}"


def test_what_shapes_the_start_is_not_live() -> None:
    for name in (
        "host",
        "port",
        "shards",
        "max_workers",
        "max_ranks",
        "kv_index_blocks",
        "kv_listen",
        "tokenizer_path",
        "prompt_cache_bytes",
    ):
        assert "live" not in FIELDS[name].meta


# ---- a real router ----


def limit_seen(router: Router) -> set[int]:
    """Statuses of a request of 2000 bytes over many connections, so that each shard is asked."""
    body = b"x" * 2000
    found = set()
    for _ in range(24):
        connection = http.client.HTTPConnection("127.0.0.1", router.port, timeout=WAIT_S)
        try:
            connection.request("POST", "/v1/completions", b'{"prompt": "%b"}' % body)
            found.add(connection.getresponse().status)
        finally:
            connection.close()
    return found


def shards_of(router: Router) -> list[int]:
    return [pid for pid in router.children() if b"edge.main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_sighup_reaches_every_process_and_later_ones(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"router.{suffix}"

    def write(limit: int, level: str, shards: int = 2) -> None:
        pairs = {"max_payload_size": limit, "log_level": f'"{level}"', "shards": shards, "health_check_interval_secs": 0.2}
        sign = ":" if suffix == "yaml" else " ="
        file.write_text("".join(f"{name}{sign} {value}\n" for name, value in pairs.items()))

    write(100_000, "info")
    argv = [sys.executable, "-m", "sglfast", "serve", "--config", str(file)]
    with engine() as url, running(tmp_path, argv, worker=url) as router:
        router.until_listening()
        router.until(lambda: get(router.port, "/readyz")[0] == 200, "ready")
        assert limit_seen(router) == {200}

        write(1000, "debug", shards=5)
        router.signal(signal.SIGHUP)
        router.until(lambda: "settings were read again" in router.err, "it says so")
        assert 'changed="--max-payload-size, --log-level"' in router.err
        assert "these settings change only with a new start settings=--shards" in router.err
        router.until(lambda: limit_seen(router) == {413}, "all shards have the new limit")
        assert len(shards_of(router)) == 2

        victim = shards_of(router)[0]
        os.kill(victim, signal.SIGKILL)
        router.until(lambda: victim not in router.children() and len(shards_of(router)) == 2, "a new shard")
        router.until(lambda: " DEBUG   shard" in router.err and "serving" in router.err, "the new shard logs at the new level")
        assert limit_seen(router) == {413}, "a shard that was started later has the new limit"

        file.write_text("max_payload_size: [\n" if suffix == "yaml" else "max_payload_size = \n")
        router.signal(signal.SIGHUP)
        router.until(lambda: "the settings stay as they were" in router.err, "it refuses the file")
        assert limit_seen(router) == {413}

        write(100_000, "info")
        router.signal(signal.SIGHUP)
        router.until(lambda: limit_seen(router) == {200}, "the old limit is back")
        router.signal(signal.SIGTERM)
        assert router.end() == 0


def test_sighup_follows_the_list_of_workers(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"

    def workers(router: Router) -> set[str]:
        return {worker["url"] for worker in json.loads(get(router.port, "/workers")[1])["workers"]}

    def write(*urls: str) -> None:
        file.write_text(json.dumps({"discovery": {"backend": "static_urls", "static_urls": {"urls": urls}}}))

    argv = [sys.executable, "-m", "sglfast", "serve", "--shards", "2", "--config", str(file)]
    with engine() as first, engine() as second:
        write(first)
        with running(tmp_path, argv, worker=None) as router:
            router.until_listening()
            router.until(lambda: get(router.port, "/readyz")[0] == 200, "ready")
            assert workers(router) == {first}
            write(second)
            router.signal(signal.SIGHUP)
            router.until(lambda: workers(router) == {second}, "the new worker alone")
            router.until(lambda: get(router.port, "/readyz")[0] == 200, "ready again")
            assert {get(router.port, "/v1/completions", {"prompt": "x"})[0] for _ in range(8)} == {200}
            write(second, first, second + "/")
            router.signal(signal.SIGHUP)
            router.until(lambda: f"{second} is given twice; the settings stay as they were" in router.err, "it refuses the list")
            assert workers(router) == {second}
            router.signal(signal.SIGTERM)
            assert router.end() == 0


def test_secrets_are_in_no_command_line_no_environment_and_no_log(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text('api_keys: ["team:s3cret-one"]\nlog_level: debug\n')
    argv = ["env", "SGLFAST_ADMIN_API_KEY=s3cret-two", sys.executable, "-m", "sglfast", "serve", "--shards", "1", "--config", str(file)]
    with engine() as url, running(tmp_path, argv, worker=url) as router:
        router.until_listening()
        router.until(lambda: len(router.children()) == 2, "children")
        for pid in router.children():
            assert b"s3cret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert b"s3cret" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert b"s3cret" not in Path(f"/proc/{router.process.pid}/cmdline").read_bytes(), "env is replaced by python"
        file.write_text('api_keys: ["s3cret-three"]\n')
        router.signal(signal.SIGHUP)
        router.until(lambda: "entry 1 must look like NAME:KEY" in router.err, "it refuses the key")
        router.signal(signal.SIGTERM)
        assert router.end() == 0
        assert "s3cret" not in router.err


def test_sighup_reads_certificates_again(tmp_path: Path) -> None:
    """A certificate is renewed under the same name of its file, long before the router is started again."""

    def put(ca: trustme.CA) -> None:
        issued = ca.issue_cert("localhost")
        issued.private_key_pem.write_to_path(tmp_path / "key")
        issued.cert_chain_pems[0].write_to_path(tmp_path / "cert")

    def is_trusted(ca: trustme.CA, port: int) -> bool:
        context = ssl.create_default_context()
        ca.configure_trust(context)
        with socket.create_connection(("127.0.0.1", port), WAIT_S) as plain:
            try:
                context.wrap_socket(plain, server_hostname="localhost").close()
            except ssl.SSLCertVerificationError:
                return False
        return True

    old, new = trustme.CA(), trustme.CA()
    put(old)
    with socket.create_server(("127.0.0.1", 0)) as free:
        admin_port = free.getsockname()[1]
    argv = [sys.executable, "-m", "sglfast", "serve", "--shards", "1", "--tls-cert-path", str(tmp_path / "cert")]
    with running(tmp_path, argv, "--tls-key-path", str(tmp_path / "key"), "--admin-port", str(admin_port)) as router:
        assert router.process.stdout is not None
        router.port = int(router.process.stdout.readline().split()[2].rpartition(":")[2])
        ports = (router.port, admin_port)
        assert all(is_trusted(old, port) for port in ports)
        put(new)
        router.signal(signal.SIGHUP)
        router.until(lambda: all(is_trusted(new, port) for port in ports), "the new certificate is served")
        assert 'settings were read again changed="nothing but certificates"' in router.err
        (tmp_path / "cert").write_text("half a certificate")
        router.signal(signal.SIGHUP)
        router.until(lambda: "the settings stay as they were" in router.err, "it refuses the file")
        assert all(is_trusted(new, port) for port in ports)
        router.signal(signal.SIGTERM)
        assert router.end() == 0
