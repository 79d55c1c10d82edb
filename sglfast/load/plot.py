"""Draws runs to a picture: the distribution of time to first token, and the prefix hit ratio.

Runs in: `sglfast replay --plot FILE`. Needs matplotlib (extra `plot`), which is imported only here and only when asked for.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from sglfast.errors import ConfigError
from sglfast.load.report import summarize
from sglfast.load.run import Run

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's colours: told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def check_plot(path: str) -> None:
    """Raise ConfigError if a picture cannot be drawn to `path`: to be called before an hour of replay, not after it."""
    if Path(path).suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path}: must end in {', '.join(SUFFIXES)}")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no such folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'sglfast[plot]'")


def draw(path: str, runs: Sequence[Run], title: str) -> None:
    """Write the picture of at least one run. Raises ConfigError."""
    check_plot(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    figure.suptitle(title, fontsize=12)
    cdf, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    colors = [COLORS[place % len(COLORS)] for place in range(len(runs))]
    summaries = [summarize(run) for run in runs]

    for run, summary, color in zip(runs, summaries, colors, strict=True):
        values_ms = sorted(sample.ttft_ms for sample in run.samples if not sample.error and sample.ttft_ms >= 0)
        if values_ms:
            shares = [(place + 1) / len(values_ms) for place in range(len(values_ms))]
            label = f"{run.label} (mean {summary.ttft_ms.mean:,.0f} ms)"
            cdf.step(values_ms, shares, where="post", color=color, linewidth=2, label=label)
    cdf.set_xscale("log")
    cdf.xaxis.set_major_formatter("{x:,g}")
    cdf.set_xlabel("time to first token, ms (log scale)", fontsize=11)
    cdf.set_ylabel("share of requests", fontsize=11)
    cdf.set_ylim(0, 1.02)
    cdf.grid(visible=True, which="major", color="#dddddd")
    if cdf.get_legend_handles_labels()[0]:
        cdf.legend(fontsize=10, loc="upper left")

    ratios = [100 * (summary.hit_blocks or 0.0) for summary in summaries]
    drawn = bars.bar(range(len(runs)), ratios, color=colors, width=0.6)
    # On white, so that the dashed line does not cross a number that stands just below it.
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    bars.bar_label(drawn, [f"{ratio:.1f} %" for ratio in ratios], fontsize=11, padding=4, bbox=box)
    best = 100 * max(run.infinite_blocks for run in runs)
    line = bars.axhline(best, color="#555555", linestyle="--", linewidth=1.5)
    bars.legend([line], [f"one worker with an infinite cache: {best:.1f} %"], fontsize=10, loc="upper left", frameon=False)
    bars.set_ylim(0, max(1.0, best, *ratios) * 1.3)
    bars.set_ylabel("prefix hits, % of block references", fontsize=11)
    bars.set_xticks(range(len(runs)), [run.label for run in runs], fontsize=11, rotation=20 if len(runs) > 3 else 0)
    for axes in (cdf, bars):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        with rc_context({"svg.fonttype": "none"}):  # text stays text: it can be searched and scales with the page
            figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written: {error.strerror}") from error
