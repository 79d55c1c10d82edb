"""sglfast.log_file: a file a day with the lines of all processes."""

import signal
import sys
import time
from pathlib import Path

import pytest
from router_process import engine, get, running

from sglfast import log_file
from sglfast.errors import ConfigError
from sglfast.log_file import LogFile


def test_lines_are_appended(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there yet"
    for text in ("one\n", "two\n"):
        file = LogFile(str(folder))
        file.write_lines(text.encode())
        file.write_lines(b"bytes\n")
        file.close()
        file.close()
    (path,) = folder.iterdir()
    assert path.name == time.strftime("sglfast.%Y-%m-%d.log")
    assert path.read_text() == "one\nbytes\ntwo\nbytes\n"
    assert path.stat().st_mode & 0o007 == 0, "not for everybody to read"


def test_a_new_day_is_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    days = ["2026-05-31", "2026-05-31", "2026-06-01"]
    monkeypatch.setattr(log_file.time, "strftime", lambda _: days.pop(0))
    file = LogFile(str(tmp_path))
    file.write_lines(b"may\n")
    file.write_lines(b"june\n")
    file.close()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "sglfast.2026-05-31.log": "may\n",
        "sglfast.2026-06-01.log": "june\n",
    }


def test_old_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = ["sglfast.2026-05-01.log.gz", "other.2026-05-01.log", "sglfast.log", "sglfast.2026-05-1.log"]
    for name in (*others, *(f"sglfast.2026-05-{day:02}.log" for day in range(10, 30))):
        (tmp_path / name).write_text("")
    days = ["2026-05-30", "2026-05-30", "2026-05-31", "2026-05-01"]
    monkeypatch.setattr(log_file.time, "strftime", lambda _: days.pop(0))

    def kept() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir() if path.name not in others)

    file = LogFile(str(tmp_path), 3)
    assert kept() == ["sglfast.2026-05-28.log", "sglfast.2026-05-29.log", "sglfast.2026-05-30.log"]
    file.write_lines(b"the same day\n")
    file.write_lines(b"the next day\n")
    assert kept() == ["sglfast.2026-05-29.log", "sglfast.2026-05-30.log", "sglfast.2026-05-31.log"]
    file.write_lines(b"a clock that was set back\n")
    file.close()
    assert kept() == ["sglfast.2026-05-01.log", "sglfast.2026-05-30.log", "sglfast.2026-05-31.log"]
    assert len([*tmp_path.iterdir()]) == 3 + len(others)


def test_all_files_may_stay(tmp_path: Path) -> None:
    for day in range(10, 30):
        (tmp_path / f"sglfast.2026-05-{day:02}.log").write_text("")
    LogFile(str(tmp_path), 0).close()
    assert len([*tmp_path.iterdir()]) == 21


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--log-dir .*/file/logs: cannot be written \(Not a directory\)"):
        LogFile(str(tmp_path / "file" / "logs"))


def test_a_full_disk_costs_only_its_lines(tmp_path: Path) -> None:
    file = LogFile(str(tmp_path))
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.symlink_to("/dev/full")
    file.close()
    with pytest.raises(OSError, match="No space left"):
        file.write_lines(b"lost\n")
    path.unlink()
    file.write_lines(b"kept\n")
    file.close()
    assert path.read_text() == "kept\n"


def test_it_has_the_lines_of_all_processes(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    argv = [sys.executable, "-m", "sglfast", "serve", "--shards", "1", "--log-level", "debug", "--log-dir", str(folder)]
    with engine() as url, running(tmp_path, argv, worker=url) as router:
        router.until_listening()
        router.until(lambda: get(router.port, "/readyz")[0] == 200, "ready")
        router.signal(signal.SIGTERM)
        assert router.end() == 0
        (path,) = folder.iterdir()
        text = path.read_text()
        assert sorted(text.splitlines()) == sorted(router.err.splitlines())
        for process in ("control", "index", "shard0"):
            assert f" {process}: " in text
