"""The charts of measured runs: numbers in, SVG out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vramplan.report.charts import GROUPS, Line
from vramplan.report.drawing import INK, SMALL, Chart, canvas, finish
from vramplan.units import GIB, format_bytes


class Point(NamedTuple):
    """One figure of one run, in bytes."""

    run: str
    figure: str
    measured: int
    predicted: int

    @property
    def error(self) -> float:
        """Predicted over measured, minus one."""
        return self.predicted / self.measured - 1


MARKERS = ("o", "s", "^", "D", "P", "X", "v", "*")


def residual_chart(name: str, title: str, points: Sequence[Point]) -> Chart:
    """Measured size against the relative error of its prediction, a marker per figure.

    Args:
        name: Unique on its page.
        title: What it shows.
        points: Every figure of every run.
    """
    with canvas(title, 2.9) as (figure, (axes,)):
        names = list(dict.fromkeys(point.figure for point in points))
        tips: dict[str, str] = {}
        for number, what in enumerate(names):
            own = [point for point in points if point.figure == what]
            colour = GROUPS[number % 6].colour
            for index, point in enumerate(own):
                axes.plot(
                    [point.measured / GIB], [100 * point.error], linestyle="none",
                    marker=MARKERS[number % len(MARKERS)], color=colour, markersize=5,
                    markeredgecolor="#ffffff", markeredgewidth=0.4,
                    label=what if index == 0 else None, gid=f"point-{number}-{index}",
                )  # fmt: skip
                tips[f"point-{number}-{index}"] = (
                    f"{point.run}: {what} {format_bytes(point.measured)} measured, "
                    f"{format_bytes(point.predicted)} predicted ({point.error:+.2%})"
                )
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        widest = max(0.5, *(abs(100 * point.error) for point in points)) * 1.15
        axes.set_ylim(-widest, widest)
        axes.set_xlabel("measured, GiB (logarithmic)")
        axes.set_ylabel("predicted is off by, %")
        figure.legend(
            loc="outside lower center", ncols=3, labelcolor=INK, fontsize=SMALL, handletextpad=0.2
        )
        worst = max(points, key=lambda point: abs(point.error))
        text = (
            f"{len(points)} figures of {len({p.run for p in points})} runs; the largest error is "
            f"{worst.error:+.2%}, {worst.figure} of {worst.run}."
        )
        return finish(figure, name, title, text, tips)


class PhaseBar(NamedTuple):
    """A phase of a measured run, in bytes; None where it was not measured or is not predicted."""

    phase: str
    allocated: int | None
    reserved: int | None
    predicted: int | None


def phases_chart(name: str, title: str, bars: Sequence[PhaseBar], room: Line | None) -> Chart:
    """The peaks of a measured run's phases, with what was predicted of them.

    Args:
        name: Unique on its page.
        title: What it shows.
        bars: The phases in their order.
        room: What the allocator might reserve.
    """
    with canvas(title, 0.9 + 0.42 * len(bars)) as (figure, (axes,)):
        tips: dict[str, str] = {}
        for what, colour, height in (("reserved", "#B8BDC4", 0.7), ("allocated", "#0072B2", 0.42)):
            sizes = {row: size for row, bar in enumerate(bars) if (size := getattr(bar, what))}
            drawn = axes.barh(
                list(sizes), [size / GIB for size in sizes.values()], height, color=colour,
                label=what,
            )  # fmt: skip
            for patch, (row, size) in zip(drawn.patches, sizes.items(), strict=True):
                patch.set_gid(f"{what}-{row}")
                tips[f"{what}-{row}"] = f"{bars[row].phase}: {what} {format_bytes(size)}"
        told = {row: bar.predicted / GIB for row, bar in enumerate(bars) if bar.predicted}
        if told:
            axes.plot(
                list(told.values()), list(told), linestyle="none", marker="D", color="#E69F00",
                markersize=6, markeredgecolor="#000000", markeredgewidth=0.6,
                label="allocated, predicted",
            )  # fmt: skip
        if room is not None:
            axes.axvline(room.nbytes / GIB, color=INK, linewidth=1, linestyle=(0, (4, 2)))
            axes.text(room.nbytes / GIB, 1.01, room.name, ha="right", va="bottom",
                      transform=axes.get_xaxis_transform())  # fmt: skip
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_yticks(range(len(bars)), [bar.phase for bar in bars])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("GiB, the fullest moment of the phase")
        figure.legend(loc="outside lower center", ncols=3, labelcolor=INK, fontsize=SMALL)
        text = "; ".join(
            f"{bar.phase}: allocated {format_bytes(bar.allocated)}, reserved "
            f"{format_bytes(bar.reserved)}, predicted {format_bytes(bar.predicted)}"
            for bar in bars
        )
        return finish(figure, name, title, text + ".", tips)
