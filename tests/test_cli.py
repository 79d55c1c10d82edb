"""sglfast.cli: the command `sglfast`, its subcommands, and what it says when it cannot."""

import importlib
import subprocess
import sys
import types

import pytest

from sglfast import __version__, cli
from sglfast.errors import ConfigError

COMMANDS = {"serve", "demo", "sim", "replay"}


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_names_every_command(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([flag]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"sglfast {__version__}" in out
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("  ")}
    assert rows == {name: text for name, (_, text) in cli.COMMANDS.items()}
    assert set(rows) >= COMMANDS


def test_without_a_command_it_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().out == cli.usage() + "\n"


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([flag]) == 0
    assert capsys.readouterr() == (f"sglfast {__version__}\n", "")


@pytest.mark.parametrize("name", ["server", "", "sglfast.cli"])
def test_unknown_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--port", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"sglfast: there is no command {name!r}; there are: {', '.join(cli.COMMANDS)}\n"


def test_flags_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--port", "1"]) == 2
    assert capsys.readouterr() == ("", "sglfast: --port: flags follow a command, such as `sglfast serve --port`\n")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Makes `serve` record its arguments and end as the first of them says."""
    seen: list[list[str]] = []
    fake = types.ModuleType("sglfast_fake_command")

    def main(argv: list[str]) -> int:
        seen.append(argv)
        if argv[:1] == ["fail"]:
            raise ConfigError("--port 70000: must be at most 65535")
        if argv[:1] == ["crash"]:
            raise RuntimeError("a bug")
        return int(argv[0])

    fake.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglfast_fake_command", fake)
    monkeypatch.setitem(cli.COMMANDS, "serve", ("sglfast_fake_command", "fake"))
    return seen


def test_a_command_gets_its_flags_and_gives_its_exit_code(calls: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["serve", "7", "--help"]) == 7
    monkeypatch.setattr(sys, "argv", ["sglfast", "serve", "0"])
    assert cli.main() == 0
    assert calls == [["7", "--help"], ["0"]]


def test_our_errors_end_with_one_line(calls: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "fail"]) == 2
    assert capsys.readouterr() == ("", "sglfast serve: --port 70000: must be at most 65535\n")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["serve", "crash"])
    assert len(calls) == 2


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_is_there(name: str) -> None:
    assert callable(importlib.import_module(cli.COMMANDS[name][0]).main)


def run(*args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=60, check=False)


def test_as_a_module() -> None:
    done = run("-m", "sglfast", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"sglfast {__version__}\n", "")
    done = run("-m", "sglfast", "nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no command 'nonsense'" in done.stderr


def test_the_command_loads_nothing_but_itself() -> None:
    code = "import sys; before = set(sys.modules); import sglfast.cli; print(*sorted(set(sys.modules) - before))"
    loaded = {name for name in run("-c", code).stdout.split() if name.startswith("sglfast")}
    assert loaded == {"sglfast", "sglfast.cli", "sglfast.errors"}
