"""The charts: numbers in, SVG out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vramplan.report.drawing import INK, Chart, canvas, finish, plain
from vramplan.report.series import Stretch
from vramplan.units import GIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Group(NamedTuple):
    """What a chart draws in one colour.

    Attributes:
        name: Its name in legends.
        parts: Kinds of memory it adds up.
        colour: From the palette of Okabe and Ito, which the colour-blind can tell apart.
        hatch: A pattern where colours run out.
    """

    name: str
    parts: tuple[str, ...]
    colour: str
    hatch: str = ""


GROUPS = (
    Group("weights", ("weights",), "#0072B2"),
    Group("adapters", ("adapters",), "#56B4E9"),
    Group("optimizer", ("optimizer", "paged_optimizer"), "#CC79A7"),
    Group("gradients", ("gradients",), "#D55E00"),
    Group("activations", ("activations", "activation_gradients"), "#009E73"),
    Group("logits", ("logits",), "#E69F00"),
    Group("workspace, batch, rounding", ("workspace", "batch", "rounding"), "#F0E442"),
    Group("cached, reusable", ("cached",), "#B8BDC4", "///"),
    Group("CUDA context, kernels", ("context",), "#7A7F87"),
)


def grouped(parts: Mapping[str, int]) -> dict[str, int]:
    """Bytes by group of the charts; they sum to the same.

    Args:
        parts: Bytes by kind, cache, context and paged state as in ``comparison.parts_of``.
    """
    found = {group.name: sum(parts.get(part, 0) for part in group.parts) for group in GROUPS}
    assert sum(found.values()) == sum(parts.values()), "every kind has a group"
    return found


class Bar(NamedTuple):
    """One job: its name, and bytes by kind."""

    name: str
    parts: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(self.parts.values())


class Line(NamedTuple):
    """A size to compare with: its short name, and bytes."""

    name: str
    nbytes: int


LONE_BAR = 2.5  # times the next longest


def bytes_chart(name: str, title: str, bars: Sequence[Bar], lines: Sequence[Line]) -> Chart:
    """Where the bytes go: one stacked bar per job, each card's memory across.

    Bars that are longer than every card are cut and say their length, and so is one that is far
    longer than all others: the others' parts could not be told apart beside it.

    Args:
        name: Unique on its page.
        title: What it shows.
        bars: The jobs.
        lines: The cards; lines that would lie on one another are one.
    """
    with canvas(1.15 + 0.42 * len(bars), title) as (figure, axes):
        sizes = sorted(bar.nbytes for bar in bars)
        top = sizes[-1]
        if len(sizes) > 1 and top > LONE_BAR * sizes[-2]:
            top = sizes[-2]
        if lines:
            top = min(top, max(line.nbytes for line in lines))
            top = min([line.nbytes for line in lines if line.nbytes >= top])
        edge = top * 1.16
        tips: dict[str, str] = {}
        for row, bar in enumerate(bars):
            _stack(axes, row, bar, edge, tips, f"bar-{row}")
            if bar.nbytes > edge:
                axes.text(edge / GIB, row, " →", va="center", ha="left", fontweight="bold")
        drawn = sorted((line for line in set(lines) if line.nbytes <= edge), key=lambda x: x.nbytes)
        for line in drawn:
            axes.axvline(line.nbytes / GIB, color=INK, linewidth=0.7, linestyle=(0, (4, 2)))
        for label in labelled(drawn, edge):
            axes.text(
                label.nbytes / GIB, 1.01, label.name, ha="center", va="bottom",
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
        axes.set_xlim(0, edge / GIB)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_yticks(
            range(len(bars)), [f"{plain(bar.name)}\n{format_bytes(bar.nbytes, 1)}" for bar in bars]
        )
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("GiB on the card")
        _legend(
            axes,
            [group.name for group in GROUPS if any(grouped(b.parts)[group.name] for b in bars)],
        )
        text = "; ".join(
            f"{bar.name} takes {format_bytes(bar.nbytes)}: "
            + ", ".join(f"{k} {format_bytes(n)}" for k, n in grouped(bar.parts).items() if n)
            for bar in bars
        )
        across = ", ".join(f"{line.name} {format_bytes(line.nbytes)}" for line in drawn)
        return finish(figure, name, title, text + (f". Across: {across}." if across else "."), tips)


CHARACTER = 0.019  # of the chart's width


def labelled(lines: Sequence[Line], edge: float) -> list[Line]:
    """Names for lines, in the middle of those that lie too near one another to have their own.

    Args:
        lines: In the order of their size; each name a number and its unit.
        edge: Where the chart ends, in bytes.
    """
    found: list[list[Line]] = []
    for line in lines:
        found.append([line])
        while len(found) > 1 and _overlap(found[-2], found[-1], edge):
            last = found.pop()
            found[-1] += last
    return [_label(lines) for lines in found]


def _label(lines: Sequence[Line]) -> Line:
    names = list(dict.fromkeys(line.name for line in lines))
    name = names[0] if len(names) == 1 else f"{names[0].split()[0]}\u2013{names[-1]}"
    return Line(name, (lines[0].nbytes + lines[-1].nbytes) // 2)


def _overlap(left: Sequence[Line], right: Sequence[Line], edge: float) -> bool:
    a, b = _label(left), _label(right)
    return b.nbytes - a.nbytes < (len(a.name) + len(b.name) + 2) / 2 * CHARACTER * edge


def _stack(
    axes: Axes, row: int, bar: Bar, edge: int | float, tips: dict[str, str], gid: str
) -> None:
    left = 0
    sizes = grouped(bar.parts)
    for number, group in enumerate(GROUPS):
        size = sizes[group.name]
        if size and left < edge:
            shown = axes.barh(
                row, min(size, edge - left) / GIB, left=left / GIB, height=0.62,
                color=group.colour, hatch=group.hatch, edgecolor="#ffffff", linewidth=0.4,
            )  # fmt: skip
            shown.patches[0].set_gid(f"{gid}-{number}")
            tips[f"{gid}-{number}"] = f"{bar.name}: {group.name} {format_bytes(size)}"
        left += size


def _legend(axes: Axes, names: Sequence[str]) -> None:
    """Below the chart, in three columns."""
    from matplotlib.patches import Patch  # noqa: PLC0415 - an optional extra

    shown = [group for group in GROUPS if group.name in names]
    axes.figure.legend(  # type: ignore[union-attr]
        handles=[
            Patch(facecolor=g.colour, hatch=g.hatch, edgecolor="#ffffff", label=g.name)
            for g in shown
        ],
        loc="outside lower center",
        ncols=3,
        handlelength=1.2,
        columnspacing=1.2,
        labelcolor=INK,
        fontsize=7.5,
    )


LEAST_SHARE = 0.17  # of the width that a phase gets, to have room for its name


def timeline_chart(
    name: str, title: str, parts: Sequence[Stretch], room: Line | None = None
) -> Chart:
    """How full the card is through one step, by kind, phases and peak marked.

    Phases with few allocations are drawn wider than their share.

    Args:
        name: Unique on its page.
        title: What it shows.
        parts: The step, from ``stretches``.
        room: What there is for it.
    """
    with canvas(2.9, title) as (figure, axes):
        peak_part = max(parts, key=lambda part: part.fullest.nbytes)
        peak = peak_part.fullest
        count = sum(len(part.moments) for part in parts)
        shares = [max(LEAST_SHARE, len(part.moments) / count) for part in parts]
        shares = [share / sum(shares) for share in shares]
        start = 0.0
        xs: list[float] = []
        moments = []
        marked = 0.0
        for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
            step = share / len(part.moments)
            own = [start + step * index for index in range(len(part.moments))]
            if part is peak_part:
                marked = own[part.moments.index(peak)] + step / 2
            xs += own
            moments += part.moments
            if number % 2:
                axes.axvspan(start, start + share, color=INK, alpha=0.06, linewidth=0)
            axes.text(
                start + share / 2, 1.02, part.phase.value, ha="center", va="bottom",
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
            start += share
        xs.append(1.0)
        moments.append(moments[-1])
        tops = [[0.0] * len(moments)]
        names = []
        for group in GROUPS:
            sizes = [
                sum(m.by_kind.get(k, 0) for k in m.by_kind if k.value in group.parts)
                for m in moments
            ]
            if not any(sizes):
                continue
            names.append(group.name)
            tops.append([low + size / GIB for low, size in zip(tops[-1], sizes, strict=True)])
            axes.fill_between(
                xs,
                tops[-2],
                tops[-1],
                step="post",
                color=group.colour,
                hatch=group.hatch,
                linewidth=0,
            )
        high = peak.nbytes / GIB
        axes.plot([marked], [high], marker="v", color=INK, markersize=6, clip_on=False, zorder=5)
        axes.annotate(
            f"peak {format_bytes(peak.nbytes)}, {peak.phase.value}", (marked, high), (0, 7),
            textcoords="offset points", ha="left" if marked < 0.3 else "right",
            fontweight="bold",
        )  # fmt: skip
        axes.set_ylim(0, high * 1.2)
        if room is not None and room.nbytes / GIB < high * 1.2:
            axes.axhline(room.nbytes / GIB, color=INK, linewidth=1, linestyle=(0, (4, 2)))
            axes.text(0.005, room.nbytes / GIB, plain(room.name), va="bottom", fontsize=7.5)
        axes.set_xlim(0, 1)
        axes.set_xticks([])
        axes.set_xlabel("allocations and releases in their order →")
        axes.set_ylabel("GiB allocated")
        _legend(axes, names)
        text = (
            f"Peak {format_bytes(peak.nbytes)} in {peak.phase.value}. Fullest in each phase: "
            + ", ".join(f"{part.phase.value} {format_bytes(part.fullest.nbytes)}" for part in parts)
            + "."
        )
        return finish(figure, name, title, text)


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
    with canvas(2.9, title) as (figure, axes):
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
        axes.figure.legend(  # type: ignore[union-attr]
            loc="outside lower center", ncols=3, labelcolor=INK, fontsize=7.5, handletextpad=0.2
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
    with canvas(0.9 + 0.42 * len(bars), title) as (figure, axes):
        tips: dict[str, str] = {}
        labels = ("allocated", "reserved", "allocated, predicted")
        for row, bar in enumerate(bars):
            both = (
                (bar.reserved, "#B8BDC4", 0.7, labels[1]),
                (bar.allocated, "#0072B2", 0.42, labels[0]),
            )
            for size, colour, height, what in both:
                if size is not None:
                    drawn = axes.barh(row, size / GIB, height=height, color=colour,
                                      label=what if row == 0 else None)  # fmt: skip
                    drawn.patches[0].set_gid(f"{what}-{row}")
                    tips[f"{what}-{row}"] = f"{bar.phase}: {what} {format_bytes(size)}"
            if bar.predicted is not None:
                axes.plot([bar.predicted / GIB], [row], marker="D", color="#E69F00", markersize=6,
                          markeredgecolor="#000000", markeredgewidth=0.6, linestyle="none",
                          label=labels[2] if row == 0 else None)  # fmt: skip
        if room is not None:
            axes.axvline(room.nbytes / GIB, color=INK, linewidth=1, linestyle=(0, (4, 2)))
            axes.text(room.nbytes / GIB, 1.01, room.name, ha="right", va="bottom",
                      transform=axes.get_xaxis_transform())  # fmt: skip
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_yticks(range(len(bars)), [bar.phase for bar in bars])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("GiB, the fullest moment of the phase")
        axes.figure.legend(  # type: ignore[union-attr]
            loc="outside lower center", ncols=3, labelcolor=INK, fontsize=7.5
        )
        text = "; ".join(
            f"{bar.phase}: allocated {format_bytes(bar.allocated)}, reserved "
            f"{format_bytes(bar.reserved)}, predicted {format_bytes(bar.predicted)}"
            for bar in bars
        )
        return finish(figure, name, title, text + ".", tips)
