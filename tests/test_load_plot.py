"""Pictures of runs."""

import random
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_load_report import sample
from test_load_run import a_run

from sglfast.errors import ConfigError
from sglfast.load.plot import check_plot, draw
from sglfast.load.run import Run, Sample

pytest.importorskip("matplotlib")


def two_runs() -> list[Run]:
    rng = random.Random(1)
    return [
        a_run([sample(cached, ttft=rng.lognormvariate(mean, 1)) for _ in range(200)], label=label)
        for label, cached, mean in (("round_robin", 512, 7.0), ("cache_aware", 1024, 6.0))
    ]


def test_png(tmp_path: Path) -> None:
    file = tmp_path / "runs.png"
    draw(str(file), two_runs(), "a title")
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert int.from_bytes(data[16:20], "big") > 1500  # pixels wide: labels stay readable


def test_svg_names_what_it_shows(tmp_path: Path) -> None:
    file = tmp_path / "runs.svg"
    draw(str(file), two_runs(), "a title")
    text = " ".join(ElementTree.parse(file).getroot().itertext())
    for word in ("a title", "round_robin", "cache_aware", "time to first token", "33.3 %", "66.7 %", "infinite cache: 40.0 %"):
        assert word in text


def test_run_in_which_nothing_was_answered(tmp_path: Path) -> None:
    file = tmp_path / "runs.svg"
    draw(str(file), [a_run([Sample(0, 0, 5, 1, error="connect")])], "all failed")
    assert file.stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "message"), [("runs.gif", r"must end in \.png, \.svg, \.pdf"), ("no/such/runs.png", "there is no such folder")]
)
def test_what_cannot_be_drawn(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_plot(str(tmp_path / name))


def test_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'sglfast\[plot\]'"):
        check_plot(str(tmp_path / "runs.png"))
