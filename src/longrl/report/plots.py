"""Charts as SVG text to put inside a page, in the colours of the page's CSS variables: light and dark alike."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("ink", "muted", "line", "base", "sft", "rl", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
"""CSS variables a chart may use. Matplotlib is handed a stand-in of each, which `_finish` replaces."""
PARTS = COLOURS[6:]
"""For the parts of a whole, in this order."""
MOST_POINTS = 240
"""A longer curve is averaged down to this many points: more cannot be seen, and the page stays small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve, one colour of bars or one layer of an area."""

    label: str
    colour: str
    """One of `COLOURS`."""
    ys: Sequence[float]
    errors: Sequence[float] = ()
    """Bars: half the length of the error bar, one for each y."""


def line_chart(
    xs: Sequence[float], series: Sequence[Series], label: str, log: bool = False, bound: float | None = None
) -> str:
    """Curves over steps: pale as measured, strong as their moving mean.

    Args:
        xs: [S] steps.
        series: Each with S values; NaN leaves a gap.
        label: What the chart shows, for readers who cannot see it.
        log: A logarithmic y axis.
        bound: A dashed line at this height.

    Returns:
        An <svg> element.
    """
    figure, axes = _figure(3.9, 2.05)
    window = smoothing(len(xs))
    for one in series:
        if window > 1:
            axes.plot(_thin(xs), _thin(one.ys), color=_stand_in(one.colour), alpha=0.25, linewidth=0.9)
        axes.plot(_thin(xs), _thin(moving_mean(one.ys, window)), color=_stand_in(one.colour), linewidth=1.8)
    if bound is not None:
        axes.axhline(bound, color=_stand_in("muted"), linewidth=0.9, linestyle=(0, (4, 3)))
    if log:
        axes.set_yscale("log")
        axes.minorticks_off()
    axes.margins(x=0.02, y=0.12)
    axes.set_xlabel("step", fontsize=8.5, color=_stand_in("muted"))
    return _finish(figure, label)


def bar_chart(groups: Sequence[str], series: Sequence[Series], label: str, chance: Sequence[float | None] = ()) -> str:
    """Groups of bars from 0 to 1 with error bars, each with its value in per cent above.

    Args:
        groups: [N] names under the axis.
        series: Each with N values and errors; NaN leaves the place empty.
        label: What the chart shows, for readers who cannot see it.
        chance: Of each group the height of a dashed line; None: it has none.

    Returns:
        An <svg> element.
    """
    figure, axes = _figure(4.5, 2.55)
    width = 0.78 / len(series)
    for index, one in enumerate(series):
        places = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(places, one.ys, width=width * 0.9, color=_stand_in(one.colour))
        axes.errorbar(places, one.ys, yerr=one.errors, fmt="none", ecolor=_stand_in("ink"), elinewidth=1, capsize=2)
        for place, value, error in zip(places, one.ys, one.errors, strict=True):
            if value == value:  # not NaN
                text = f"{100 * value:.0f}"
                axes.text(place, value + error + 0.025, text, ha="center", fontsize=8.5, color=_stand_in("ink"))
    for group, height in enumerate(chance):
        if height is not None:
            ends = group - 0.45, group + 0.45
            axes.hlines(height, *ends, color=_stand_in("muted"), linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 1.12)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100%"])
    axes.set_xticks(range(len(groups)), list(groups))
    axes.tick_params(axis="x", labelcolor=_stand_in("ink"), labelsize=9.5)
    axes.set_xlim(-0.55, len(groups) - 0.45)
    return _finish(figure, label)


def area_chart(xs: Sequence[float], series: Sequence[Series], label: str) -> str:
    """Layers on top of one another: parts of a whole over steps.

    Args:
        xs: [S] steps.
        series: From the lowest layer up, each with S values.
        label: What the chart shows, for readers who cannot see it.

    Returns:
        An <svg> element.
    """
    figure, axes = _figure(4.5, 2.55)
    colours = [_stand_in(one.colour) for one in series]
    axes.stackplot(_thin(xs), [_thin(one.ys) for one in series], colors=colours, linewidth=0)
    axes.margins(x=0, y=0.05)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step", fontsize=8.5, color=_stand_in("muted"))
    axes.set_ylabel("seconds", fontsize=8.5, color=_stand_in("muted"))
    return _finish(figure, label)


def smoothing(num_points: int) -> int:
    """Points that the moving mean of a curve of this length spans; 1: it is drawn as it is."""
    return max(num_points // 15, 1) if num_points >= 30 else 1


def moving_mean(ys: Sequence[float], window: int) -> list[float]:
    """Mean of the `window` values around each (those that exist; fewer at the ends); NaN where there are none.

    Centred, so that a falling curve is not drawn late.
    """
    means = []
    for index in range(len(ys)):
        recent = [y for y in ys[max(index - (window - 1) // 2, 0) : index + window // 2 + 1] if y == y]
        means.append(sum(recent) / len(recent) if recent else float("nan"))
    return means


def _thin(ys: Sequence[float]) -> list[float]:
    """Means of equal runs of neighbours, so that at most `MOST_POINTS` remain."""
    size = -(-len(ys) // MOST_POINTS)
    return (
        [sum(run := ys[start : start + size]) / len(run) for start in range(0, len(ys), size)] if size > 1 else list(ys)
    )


def _stand_in(colour: str) -> str:
    return f"#fe00{COLOURS.index(colour):02x}"


def _figure(width_in: float, height_in: float) -> tuple[Any, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_stand_in("line"))
    axes.grid(axis="y", color=_stand_in("line"), linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=_stand_in("muted"))
    axes.locator_params(axis="both", nbins=5)
    return figure, axes


def _finish(figure: Any, label: str) -> str:
    import matplotlib as mpl

    out = io.StringIO()
    # Text stays text, in the page's font; a fixed salt and no date make equal charts equal bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "longrl"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    # Metadata, a style that would reach the whole page, and fonts, which are the page's business.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;\"]+; ", "", svg, flags=re.DOTALL)
    # Several charts share a page: ids that nothing refers to would only repeat.
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)
    svg = re.sub(r"#fe00([0-9a-f]{2})", lambda match: f"var(--{COLOURS[int(match[1], 16)]})", svg)
    svg = re.sub(
        r'^<svg [^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{escape(label)}">', svg
    )
    return svg.strip()
