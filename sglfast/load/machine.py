"""How busy the whole machine was during a run: on too few cores, workers, router and client measure one another.

Runs in: `sglfast replay`. Source: the first line of /proc/stat (proc_pid_stat(5): user nice system idle iowait irq softirq steal ...,
    in ticks since boot, over all CPUs; guest time is part of user time).
"""

from dataclasses import dataclass
from pathlib import Path

IDLE, IOWAIT, COUNTED = 3, 4, 8


@dataclass(frozen=True, slots=True)
class CpuTicks:
    """CPU time of the machine since it was started, in ticks."""

    busy: int
    total: int

    def busy_since(self, before: "CpuTicks") -> float:
        """Share (0..1) of all CPUs' time that was not idle; -1 when no tick has passed."""
        total = self.total - before.total
        return (self.busy - before.busy) / total if total > 0 else -1.0


def read_cpu_ticks(path: str = "/proc/stat") -> CpuTicks:
    """The ticks up to now."""
    with Path(path).open() as file:
        ticks = [int(text) for text in file.readline().split()[1 : 1 + COUNTED]]
    return CpuTicks(busy=sum(ticks) - ticks[IDLE] - ticks[IOWAIT], total=sum(ticks))
