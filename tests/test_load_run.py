"""Saved runs and the router's prediction header."""

import json
from pathlib import Path

import pytest

from sglfast.errors import ConfigError
from sglfast.load.run import Run, Sample, load_run, read_prediction, save_run


def a_run(samples: list[Sample], **values: object) -> Run:
    """A run with the given samples and plain other values."""
    settings: dict[str, object] = {
        "label": "round_robin", "trace": "t.jsonl", "endpoint": "completions", "speed_up": 10.0, "warmup": 0, "wall_s": 1.5,
        "infinite_blocks": 0.4, "infinite_tokens": 0.3, "delayed": 0, "resends": 0, "machine_busy": 0.5,
        "page_tokens": 64, "error_texts": {}, "settled": [],
    }  # fmt: skip
    return Run(samples=samples, **(settings | values))  # type: ignore[arg-type]


def test_saved_run_comes_back(tmp_path: Path) -> None:
    file = str(tmp_path / "run.json")
    run = a_run([Sample(0.5, 0.1, 700, 2, ttft_ms=3.25, worker="http://w"), Sample(1, 0, 5, 1, error="timeout")])
    save_run(file, run, {"requests": 2})
    assert load_run(file) == run
    assert json.loads(Path(file).read_text())["summary"] == {"requests": 2}


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"label": 5}', "\xff"])
def test_file_that_is_no_run(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"x\.json: not a run that `sglfast replay --json` saved"):
        load_run(str(file))


def test_run_of_another_format(tmp_path: Path) -> None:
    file = str(tmp_path / "x.json")
    save_run(file, a_run([], format=2), {})
    with pytest.raises(ConfigError, match="has format 2"):
        load_run(file)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_run(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
        save_run(str(tmp_path), a_run([]), {})


def test_prediction() -> None:
    sample = Sample(0, 0, 1, 1)
    read_prediction("worker=http://10.0.0.1:30000; rank=3; overlap_blocks=12; prompt_blocks=20; state=EXACT", sample)
    assert (sample.worker, sample.rank, sample.overlap_blocks, sample.prompt_blocks) == ("http://10.0.0.1:30000", 3, 12, 20)
    assert sample.state == "EXACT"


def test_broken_prediction_leaves_the_sample() -> None:
    sample = Sample(0, 0, 1, 1)
    read_prediction("", sample)
    read_prediction("rank=x; overlap_blocks=-4; samples=3; prompt_blocks; error=bad", sample)
    assert sample == Sample(0, 0, 1, 1)
