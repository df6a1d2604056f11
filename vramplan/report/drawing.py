"""matplotlib figures as SVG text: the same bytes every time, readable in light, dark and print.

Text stays text. What is drawn in ``INK`` takes the colour of the page's text. Every chart has a
title and a description for those who do not see it, and its parts say their figure when pointed at,
without script.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.sax.saxutils import escape

from vramplan.report import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # becomes the colour of the text around the chart
POINTS_PER_INCH = 72
WIDTH = 5.2  # inches; about 375 points, so that text keeps its size on a phone
FONT_POINTS = 8.5
SMALL = 7.5  # points, for legends
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vramplan",
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.family": "sans-serif",
    "font.size": FONT_POINTS,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "hatch.linewidth": 0.5,
    "hatch.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
STANDALONE_CSS = (
    "svg{color:#1a1d21;background:#fff}"
    "@media (prefers-color-scheme:dark){svg{color:#e6e8eb;background:#14171b}}"
)


class Chart(NamedTuple):
    """One chart.

    Attributes:
        name: Unique on a page; letters, digits and hyphens.
        title: What it shows.
        text: What one sees in it, for those who do not.
        svg: An ``<svg>`` element without namespace, as HTML wants it.
    """

    name: str
    title: str
    text: str
    svg: str

    def standalone(self) -> str:
        """The chart as a file of its own."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" style="max-width:{WIDTH * 2}in"'
        style = f"<style>{STANDALONE_CSS}</style>"
        text = self.svg.replace("<svg", head, 1).replace("</desc>", f"</desc>{style}", 1)
        return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def plain(text: str) -> str:
    """A name in one line, without characters that XML has no place for."""
    return "".join(c if c.isprintable() else " " for c in text)


@contextlib.contextmanager
def canvas(what: str, *heights: float) -> Iterator[tuple[Figure, list[Axes]]]:
    """An empty figure of the usual width, and matplotlib in our style while it is drawn on.

    Args:
        heights: Of each of its rows, in inches.
        what: What needs matplotlib, for the error.

    Raises:
        EnvironmentProblem: If matplotlib is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415 - an optional extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise missing(what, "matplotlib") from None
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's fonts decide
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        grid = figure.subplots(len(heights), squeeze=False, height_ratios=heights)
        yield figure, list(grid[:, 0])


def finish(
    figure: Figure, name: str, title: str, text: str, tips: Mapping[str, str] | None = None
) -> Chart:
    """The figure as a Chart; to be called within ``canvas``.

    Args:
        figure: What was drawn.
        name: Unique on its page.
        title: What it shows.
        text: What one sees in it.
        tips: By the ``gid`` of an artist, what to say when it is pointed at.
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return Chart(name, title, text, _own(out.getvalue(), name, title, text, tips or {}))


def _own(svg: str, name: str, title: str, text: str, tips: Mapping[str, str]) -> str:
    """The file of matplotlib as an element of a page."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = "".join(c if c.isprintable() else " " for c in svg)  # XML has no place for the others
    svg = svg.replace("xlink:href", "href")
    for gid, tip in tips.items():
        mark = f'<g id="{gid}">'
        svg = svg.replace(mark, f"{mark}<title>{escape(plain(tip))}</title>", 1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    svg = svg.replace(INK, "currentColor")
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    head = (
        f'<svg {view[0]} role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(plain(title))}</title>'
        f'<desc id="{name}-desc">{escape(plain(text))}</desc>'
    )
    return head + svg[svg.index(">") + 1 :]
