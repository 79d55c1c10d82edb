"""sglfast check-config: what would run and where it comes from, or why it cannot."""

import subprocess
import sys
from pathlib import Path

import pytest

from sglfast import cli
from sglfast.config.fields import FIELDS
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH

URL = "http://10.0.0.5:30000"


def rows(text: str) -> dict[str, tuple[str, str]]:
    """Flag -> (value, origin)."""
    found = {}
    for line in text.splitlines():
        flag, value, origin = (part.strip() for part in line.split("  ") if part.strip())
        found[flag] = value, origin
    return found


def test_every_setting_with_its_value_and_its_origin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.toml"
    file.write_text("queue_size = 7\n[server]\nport = 31000\n")
    monkeypatch.setenv("SGLFAST_REQUEST_TIMEOUT_SECS", "12.5")
    args = ["--worker-urls", URL, "http://[::1]:2", "--config", str(file), "--disable-retries", "--shutdown-grace-period-secs", "5"]
    assert cli.main(["check-config", *args]) == 0
    out, err = capsys.readouterr()
    found = rows(out)
    assert list(found) == [field.flag for field in FIELDS.values()]
    assert found["--worker-urls"] == (f"{URL} http://[::1]:2", "--worker-urls")
    assert found["--port"] == ("31000", f"{file}: server.port")
    assert found["--request-timeout-secs"] == ("12.5", "SGLFAST_REQUEST_TIMEOUT_SECS")
    assert found["--shutdown-grace-secs"] == ("5", "--shutdown-grace-period-secs")
    assert found["--disable-retries"] == ("true", "--disable-retries")
    assert found["--passthrough"] == ("false", "default")
    assert found["--tokenizer-path"] == ("-", "default")
    assert found["--max-ranks"] == ("64", "default")
    assert err == "note: SGLFAST_QUEUE_SIZE changes nothing".replace("SGLFAST_QUEUE_SIZE", f"{file}: queue_size") + (
        ": without one of --max-concurrent-requests, --rate-limit-tokens-per-second, --worker-max-in-flight nobody waits\n"
    )


def test_secrets_are_stars(capsys: pytest.CaptureFixture[str]) -> None:
    secrets = [name for name, field in FIELDS.items() if "secret" in field.meta]
    values = {"api_keys": ["a:s3cret", "b:s3cret"], "control_plane_api_keys": ["i:n:admin:s3cret"]}
    args = [word for name in secrets for word in (FIELDS[name].flag, *values.get(name, ["s3cret"]))]
    assert cli.main(["check-config", "--worker-urls", URL, *args]) == 0
    out, err = capsys.readouterr()
    assert "s3cret" not in out + err
    found = rows(out)
    assert found["--api-keys"] == ("*** ***", "--api-keys")
    assert all(found[FIELDS[name].flag][0].startswith("***") for name in secrets)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--port", "70000"], "--port 70000: must be at most 65535"),
        (["--service-discovery"], "--service-discovery: service discovery is not offered; "),
        (["--tokenizer-path", "{folder}"], "--tokenizer-path {folder}: there is no tokenizer.json in this folder"),
        (["--tokenizer-path", "{folder}/broken.jinja"], "tokenizer file {folder}/broken.jinja: not a tokenizer.json"),
        (["--tokenizer-path", DEMO_TOKENIZER_PATH, "--chat-template", "{folder}/broken.jinja"], ""),
    ],
)
def test_what_cannot_work_ends_with_2(tmp_path: Path, args: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.jinja").write_text("{% for %}")
    assert cli.main(["check-config", *(arg.replace("{folder}", str(tmp_path)) for arg in args)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"sglfast check-config: {text.replace('{folder}', str(tmp_path))}")
    assert err.count("\n") == 1


def test_as_a_command(tmp_path: Path) -> None:
    """It needs no worker, takes no port and starts nothing."""
    command = [sys.executable, "-m", "sglfast", "check-config", "--worker-urls", URL, "--tokenizer-path", str(DEMO_TOKENIZER_PATH)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(done.stdout)["--tokenizer-path"] == (str(DEMO_TOKENIZER_PATH), "--tokenizer-path")
