"""The machine's CPU time."""

import os
import time
from pathlib import Path

from sglfast.load.machine import CpuTicks, read_cpu_ticks


def test_ticks_of_proc_stat(tmp_path: Path) -> None:
    file = tmp_path / "stat"
    file.write_text("cpu  100 20 30 800 40 5 6 7 90 0\ncpu0 50 10 15 400 20 2 3 4 45 0\n")
    assert read_cpu_ticks(str(file)) == CpuTicks(busy=168, total=1008)


def test_share() -> None:
    assert CpuTicks(150, 300).busy_since(CpuTicks(100, 200)) == 0.5
    assert CpuTicks(100, 200).busy_since(CpuTicks(100, 200)) == -1.0


def test_work_is_seen() -> None:
    before, end_s = read_cpu_ticks(), time.monotonic() + 0.3
    start_s = time.process_time()
    while time.monotonic() < end_s:
        pass
    worked_s = time.process_time() - start_s
    after = read_cpu_ticks()
    # Others may work too, so only the lower bound is known; ticks are coarse.
    assert (after.busy - before.busy) / os.sysconf("SC_CLK_TCK") >= worked_s - 0.1
    assert 0 < after.busy_since(before) <= 1
