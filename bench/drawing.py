"""Pictures of what the benchmarks print (`--plot FILE`): bars beside their goal, and distributions of times.

Needs matplotlib (extra `plot`), as `sglfast replay --plot` does, whose colours these have.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sglfast.errors import ConfigError
from sglfast.load.plot import COLORS, check_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BAR_INCHES, _PANEL_INCHES = 0.38, 1.3
_SHARES = 400  # points of a distribution
_GOAL_COLOR = "#555555"


@dataclass(frozen=True, slots=True)
class Bars:
    """One row of a picture. values: name -> length; ranges: name -> lowest and highest of all rounds; goal: "at least 5" as a pair."""

    title: str
    values: Mapping[str, float]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    goal: tuple[str, float] | None = None
    form: str = "{:,.0f}"


def add_plot(parser: argparse.ArgumentParser) -> None:
    """The flag, checked before a benchmark begins and not after it."""

    def path(text: str) -> str:
        try:
            check_plot(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"--plot {text}: ")) from error
        return text

    parser.add_argument("--plot", type=path, metavar="FILE", help="draw the result, too: .svg, .png or .pdf")


def draw_bars(path: str, title: str, panels: Sequence[Bars]) -> None:
    """Panels one below the other, each with a scale of its own that begins at 0."""
    heights = [_PANEL_INCHES + _BAR_INCHES * len(panel.values) for panel in panels]
    figure = _figure(title, sum(heights))
    for panel, axes in zip(panels, figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0], strict=True):
        places, values = range(len(panel.values)), list(panel.values.values())
        axes.barh(places, values, height=0.62, color=COLORS[0])
        ends = [max(value, panel.ranges.get(name, (0, value))[1]) for name, value in panel.values.items()]
        for place, (name, value), end in zip(places, panel.values.items(), ends, strict=True):
            if name in panel.ranges:
                axes.plot(panel.ranges[name], (place, place), color="#000000", linewidth=1.2, marker="|", markersize=7)
            axes.annotate(panel.form.format(value), (end, place), (6, 0), textcoords="offset points", va="center", fontsize=10)
        if panel.goal is not None:
            line = axes.axvline(panel.goal[1], color=_GOAL_COLOR, linestyle="--", linewidth=1.5)
            axes.legend(
                [line],
                [f"goal: {panel.goal[0]} {panel.goal[1]:,.10g}"],
                fontsize=9,
                loc="lower right",
                bbox_to_anchor=(1, 1),
                frameon=False,
                borderaxespad=0,
            )
        axes.set_title(panel.title, fontsize=10.5, loc="left")
        axes.set_yticks(places, list(panel.values), fontsize=10)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * max(*ends, panel.goal[1] if panel.goal else 0.0))
        _clear(axes)
    _save(figure, path)


def draw_times(path: str, title: str, times_us: Mapping[str, Sequence[float]], goals_us: Mapping[str, float]) -> None:
    """Which share of calls took longer than a time, both logarithmic. goals_us: "p50" and the like -> the time."""
    figure = _figure(title, 4.6)
    axes = figure.subplots()
    for (name, times), color in zip(times_us.items(), COLORS, strict=False):
        in_order = sorted(times)
        shares = [10 ** (-6 * point / _SHARES) for point in range(_SHARES + 1) if 10 ** (-6 * point / _SHARES) * len(in_order) >= 1]
        axes.plot([in_order[int((1 - share) * (len(in_order) - 1))] for share in shares], shares, color=color, linewidth=2, label=name)
    for place, (name, goal_us) in enumerate(goals_us.items()):
        share = 1 - float(name.removeprefix("p")) / 100
        label = "goals: " + ", ".join(f"{each} {value:g} us" for each, value in goals_us.items())
        axes.plot([goal_us], [share], color=_GOAL_COLOR, marker="<", markersize=9, linestyle="", label=None if place else label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes.set_xlabel("microseconds", fontsize=10.5)
    axes.set_ylabel("calls that took longer", fontsize=10.5)
    axes.grid(visible=True, which="major", color="#dddddd")
    axes.legend(fontsize=10, loc="upper right")
    _clear(axes)
    _save(figure, path)


def _figure(title: str, height: float) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, height), layout="constrained")
    figure.suptitle(title, fontsize=11.5, x=0.01, ha="left")
    return figure


def _clear(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: "Figure", path: str) -> None:
    from matplotlib import rc_context

    # Text stays text; the same figures make the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sglfast"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)
    print(f"drawn to {path}")
