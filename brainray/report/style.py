"""Shared style of all figures: colour-blind safe colours, plain axes, PNG output."""

import textwrap
from collections.abc import Sequence
from io import BytesIO
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image

# Okabe and Ito, "Color universal design", 2008; yellow and black, least legible as dots, come last.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, ORANGE, YELLOW, BLACK = "#56B4E9", "#E69F00", "#F0E442", "#000000"
_CLASS_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE, YELLOW, BLACK)

# Tol, "Colour schemes", 2021, "muted": differs from the class colours, so that clusters are not
# mistaken for classes.
_CLUSTER_COLOURS = (
    "#CC6677",
    "#332288",
    "#DDCC77",
    "#117733",
    "#88CCEE",
    "#882255",
    "#44AA99",
    "#999933",
    "#AA4499",
)

GREY = "#8C8C8C"

_DOTS_PER_INCH = 120
_MAX_LINE = 24  # characters


def class_colours(classes: Sequence[str]) -> dict[str, str]:
    """Colours by position of the class, the same in every figure; they repeat from the ninth on."""
    return {name: _CLASS_COLOURS[i % len(_CLASS_COLOURS)] for i, name in enumerate(classes)}


def cluster_colour(cluster: int) -> str:
    """Colour by cluster number; colours repeat from the tenth on."""
    return _CLUSTER_COLOURS[cluster % len(_CLUSTER_COLOURS)]


def wrapped(name: str) -> str:
    """A class name in lines that leave room for the figure."""
    return textwrap.fill(name, _MAX_LINE)


def new_figure(
    width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
) -> Figure:
    """An empty figure outside pyplot's global state; sizes in inches.

    Square panels need a compressed layout: a constrained one cuts names beside them.
    """
    return Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout=layout)


def tidy(axes: Axes, *, grid: Literal["x", "y"]) -> None:
    """Draw a light grid behind the data, across one axis, and remove the frame."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#E0E0E0", linewidth=0.8)
    axes.set_axisbelow(True)


def count_epochs(axes: Axes, unit: str = "epoch") -> None:
    """Put the ticks of the horizontal axis at whole epochs, or other ``unit``s."""
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def plain_text(figure: Figure) -> None:
    """Draw names with dollar signs as they are, not as formulas."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG on white in 256 colours: a third of the size without visible loss."""
    plain_text(figure)
    drawn, stored = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", facecolor="white")
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
            stored, format="png", optimize=True
        )
    return stored.getvalue()
