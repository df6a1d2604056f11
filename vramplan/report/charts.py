"""The charts: numbers in, SVG out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vramplan.report.drawing import INK, SMALL, Chart, canvas, finish, plain
from vramplan.report.series import Stretch
from vramplan.units import GIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
        parts: Bytes by kind, cache, context and paged state as in ``comparing.parts_of``.
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


LONGEST_NAME = 22
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
    with canvas(title, _height(bars)) as (figure, (axes,)):
        text, tips = _draw_bars(axes, bars, lines)
        _legend(figure, [name for bar in bars for name, size in grouped(bar.parts).items() if size])
        return finish(figure, name, title, text, tips)


def job_chart(
    name: str, title: str, bar: Bar, parts: Sequence[Stretch], lines: Sequence[Line]
) -> Chart:
    """One job: where its bytes go on the card, and how full its step is.

    Args:
        name: Unique on its page.
        title: What it shows.
        bar: The job.
        parts: Its step, from ``stretches``.
        lines: Cards to compare with.
    """
    with canvas(title, _height([bar]), 2.4) as (figure, (above, below)):
        text, tips = _draw_bars(above, [bar], lines)
        text += " " + _draw_step(below, parts)
        _legend(figure, [name for name, size in grouped(bar.parts).items() if size])
        return finish(figure, name, title, text, tips)


def shortened(name: str) -> str:
    """A name that leaves room for its bar; the table beside the chart has all of it."""
    name = plain(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _height(bars: Sequence[Bar]) -> float:
    """Inches for so many bars, their axis and a legend."""
    return 1.15 + 0.42 * len(bars)


def _edge(bars: Sequence[Bar], lines: Sequence[Line]) -> float:
    """Where the axis ends, in bytes."""
    sizes = sorted(bar.nbytes for bar in bars)
    top = sizes[-1]
    if len(sizes) > 1 and top > LONE_BAR * sizes[-2]:
        top = sizes[-2]
    if lines:
        top = min(top, max(line.nbytes for line in lines))
        top = min(line.nbytes for line in lines if line.nbytes >= top)
    return top * 1.16


def _draw_bars(
    axes: Axes, bars: Sequence[Bar], lines: Sequence[Line]
) -> tuple[str, dict[str, str]]:
    """Draw them; what one sees, in words, and what each part says when pointed at."""
    edge = _edge(bars, lines)
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
        range(len(bars)), [f"{shortened(bar.name)}\n{format_bytes(bar.nbytes, 1)}" for bar in bars]
    )
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("GiB on the card")
    text = "; ".join(
        f"{bar.name} takes {format_bytes(bar.nbytes)}: "
        + ", ".join(f"{k} {format_bytes(n)}" for k, n in grouped(bar.parts).items() if n)
        for bar in bars
    )
    across = ", ".join(f"{line.name} {format_bytes(line.nbytes)}" for line in drawn)
    return text + (f". Across: {across}." if across else "."), tips


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


def _legend(figure: Figure, names: Iterable[str]) -> None:
    """Below everything, in three columns."""
    from matplotlib.patches import Patch  # noqa: PLC0415 - an optional extra

    named = set(names)
    handles = [
        Patch(facecolor=g.colour, hatch=g.hatch, edgecolor="#ffffff", label=g.name)
        for g in GROUPS
        if g.name in named
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, handlelength=1.2, columnspacing=1.2,
        labelcolor=INK, fontsize=SMALL,
    )  # fmt: skip


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
    with canvas(title, 2.9) as (figure, (axes,)):
        text = _draw_step(axes, parts, room)
        kinds = {kind.value for part in parts for m in part.moments for kind in m.by_kind}
        _legend(figure, [group.name for group in GROUPS if kinds & set(group.parts)])
        return finish(figure, name, title, text)


def _draw_step(axes: Axes, parts: Sequence[Stretch], room: Line | None = None) -> str:
    """Draw it; what one sees, in words."""
    fullest = max(parts, key=lambda part: part.fullest.nbytes)
    peak, high = fullest.fullest, fullest.fullest.nbytes / GIB
    xs, marked = _draw_phases(axes, parts, fullest)
    moments = [moment for part in parts for moment in part.moments]
    moments.append(moments[-1])
    low = [0.0] * len(moments)
    for group in GROUPS:
        sizes = [sum(n for k, n in m.by_kind.items() if k.value in group.parts) for m in moments]
        if any(sizes):
            top = [below + size / GIB for below, size in zip(low, sizes, strict=True)]
            axes.fill_between(xs, low, top, step="post", color=group.colour, linewidth=0)
            low = top
    axes.plot([marked], [high], marker="v", color=INK, markersize=6, clip_on=False, zorder=5)
    axes.annotate(
        f"peak {format_bytes(peak.nbytes)}, {peak.phase.value}", (marked, high), (0, 7),
        textcoords="offset points", ha="left" if marked < 0.3 else "right", fontweight="bold",
    )  # fmt: skip
    axes.set_ylim(0, high * 1.2)
    if room is not None and room.nbytes / GIB < high * 1.2:
        axes.axhline(room.nbytes / GIB, color=INK, linewidth=0.7, linestyle=(0, (4, 2)))
        axes.text(0.005, room.nbytes / GIB, plain(room.name), va="bottom", fontsize=SMALL)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.set_xlabel("allocations and releases in their order →")
    axes.set_ylabel("GiB allocated")
    each = ", ".join(f"{part.phase.value} {format_bytes(part.fullest.nbytes)}" for part in parts)
    return f"Peak {format_bytes(peak.nbytes)} in {peak.phase.value}. Fullest in each phase: {each}."


def _draw_phases(
    axes: Axes, parts: Sequence[Stretch], fullest: Stretch
) -> tuple[list[float], float]:
    """Name the phases; where each moment lies, the end included, and where the peak does."""
    count = sum(len(part.moments) for part in parts)
    shares = [max(LEAST_SHARE, len(part.moments) / count) for part in parts]
    start, xs, marked = 0.0, [], 0.0
    for number, (part, own) in enumerate(zip(parts, shares, strict=True)):
        share = own / sum(shares)
        step = share / len(part.moments)
        if part is fullest:
            marked = start + step * (part.moments.index(part.fullest) + 0.5)
        xs += [start + step * index for index in range(len(part.moments))]
        if number % 2:
            axes.axvspan(start, start + share, color=INK, alpha=0.06, linewidth=0)
        axes.text(
            start + share / 2, 1.02, part.phase.value, ha="center", va="bottom",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
        start += share
    return [*xs, 1.0], marked
