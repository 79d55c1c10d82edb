"""sglfast.logs: one line an event, as text and as JSON."""

import json
import logging
import re
import sys
import time
from collections.abc import Iterator

import pytest

from sglfast.logs import setup_logs


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    """Logging as it was before the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    chatty = {name: logging.getLogger(name).level for name in ("asyncio", "aiohttp.access")}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, was in chatty.items():
        logging.getLogger(name).setLevel(was)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == "", "logs go to standard error only"
    return err.splitlines()


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    log = setup_logs("shard 3", "info", "text")
    before = time.time()
    log.warning("worker %s is gone", "w1", extra={"fields": {"url": "http://w1:30000", "failures": 3, "model": None}})
    (line,) = lines(capsys)
    found = re.fullmatch(r"(\d\d:\d\d:\d\d)\.\d{3} (.*)", line)
    assert found
    assert found[1] in {time.strftime("%H:%M:%S", time.localtime(before + seconds)) for seconds in range(3)}
    assert found[2] == "WARNING shard 3: worker w1 is gone url=http://w1:30000 failures=3 model=None"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("two words", '"two words"'),
        ("", '""'),
        ('a"b', r'"a\"b"'),
        ("a\nb", r'"a\nb"'),
        ("a\tb", r'"a\tb"'),
        ("\x1b[31mred", r'"\u001b[31mred"'),
        ("line\u2028separator", r'"line\u2028separator"'),
        ("größe", "größe"),
        (1.5, "1.5"),
        (["a", 1], "\"['a', 1]\""),
    ],
)
def test_a_field_s_value_cannot_break_its_line(value: object, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logs("index", "info", "text").info("event", extra={"fields": {"it": value, "then": 1}})
    text = capsys.readouterr().err
    assert text.endswith(f" INFO    index: event it={shown} then=1\n")
    assert text.count("\n") == 1


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    log = setup_logs("control", "debug", "json")
    before = time.time()
    log.debug('say "%s"', "a\nb", extra={"fields": {"workers": 4, "path": ["x", None], "odd": {1}, "of": ValueError("v")}})
    (line,) = lines(capsys)
    entry = json.loads(line)
    assert abs(entry.pop("ts") - before) < 60
    assert entry == {
        "level": "debug",
        "process": "control",
        "message": 'say "a\nb"',
        "workers": 4,
        "path": ["x", None],
        "odd": "{1}",
        "of": "v",
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_exceptions_come_with_their_traceback(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = setup_logs("shard 0", "info", log_format)
    try:
        raise KeyError("inner")
    except KeyError:
        log.exception("failed")
    err = capsys.readouterr().err
    if log_format == "json":
        entry = json.loads(err)
        assert (entry["level"], entry["message"]) == ("error", "failed")
        text = entry["exception"]
    else:
        assert re.match(r"\S+ ERROR   shard 0: failed\nTraceback ", err)
        text = err
    assert "KeyError: 'inner'" in text
    assert "test_logs.py" in text


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_levels(level: str, shown: int, capsys: pytest.CaptureFixture[str]) -> None:
    log = setup_logs("control", level, "text")
    for write in (log.debug, log.info, log.warning, log.error):
        write("once")
    assert len(lines(capsys)) == shown


def test_setting_up_again_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logs("first", "info", "text")
    setup_logs("second", "info", "json").info("once")
    (line,) = lines(capsys)
    assert json.loads(line)["process"] == "second"
    assert [getattr(handler, "stream", None) for handler in logging.getLogger().handlers] == [sys.stderr]


def test_libraries_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logs("control", "debug", "text")
    logging.getLogger("asyncio").info("using selector")
    logging.getLogger("aiohttp.access").info("GET /")
    logging.getLogger("aiohttp.access").error("broken")
    (line,) = lines(capsys)
    assert line.endswith("ERROR   aiohttp.access: broken")
