"""sglfast.config.flags: what a command line's words become, and what a mistake in them is answered."""

import pytest

from sglfast.config.flags import SettingsParser, given_in


def mistake(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        SettingsParser("sglfast serve", "text").parse_args(args)
    assert caught.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert second == "`sglfast serve --help` lists the flags"
    return first


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--prot", "3"], "--prot: there is no such flag; the closest is --port"),
        (["--prot=s3cret"], "--prot: there is no such flag; the closest is --port"),
        (["--xyzzy"], "--xyzzy: there is no such flag"),
        (["--port", "3", "4"], "4: belongs to no flag"),
        (["--port"], "argument --port: expected one argument"),
    ],
)
def test_a_mistake_is_one_sentence(args: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(capsys, *args) == f"sglfast serve: {text}"


def test_words_are_kept_as_given() -> None:
    given = given_in(SettingsParser("sglfast serve", "text").parse_args(["--port", "1", "--worker-urls", "a", "b", "--port=2"]))
    assert given == {"port": [("--port", ["1"]), ("--port", ["2"])], "worker_urls": [("--worker-urls", ["a", "b"])]}


def test_the_help_is_short_where_it_can_be(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        SettingsParser("sglfast serve", "text").parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["usage: sglfast serve [--worker-urls URL ...] [flags]", "", "text"]
    assert max(map(len, lines)) <= 98
    assert "  --port N                            port to listen on; 0 picks a free one (default: 30000)" in lines
