"""Roofline plot of measured speed against the limits of memory and arithmetic (Williams et al., 2009)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grok1.errors import Grok1Error

if TYPE_CHECKING:
    from grok1.diagnose.bench import Limits, Measurement


class PlotError(Grok1Error):
    """A plot cannot be drawn."""


def require_matplotlib() -> None:
    """Raise PlotError if matplotlib cannot be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PlotError(
            f"--plot requires matplotlib, which cannot be imported ({error}): install it with pip install 'grok1[plot]'"
        ) from error


def draw_roofline(name: str, limits: Limits, measured: Sequence[Measurement], kind: str) -> bytes:
    """Draw a roofline plot with two points per measurement, one for prefill and one for decode.

    Args:
        name: name of the model.
        limits: measured limits of the devices.
        measured: the measurements.
        kind: "png" or "svg".

    Returns:
        the content of the image file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bandwidth, peak = limits.read_bytes_per_second, limits.matrix_operations_per_second
    ridge = peak / bandwidth
    points = []
    for m in measured:
        what = f"{m.batch} x {m.prompt_tokens}"
        decode = m.decode_operations_per_step / m.decode_bytes_per_step
        points.append((decode, m.decode_operations_per_step / m.decode_step_seconds, f"decode, {what}", "o"))
        points.append(
            (m.prefill_operations / m.prefill_bytes, m.prefill_operations / m.prefill_seconds, f"prefill, {what}", "s")
        )
    intensities = [ridge, *(point[0] for point in points)]
    left, right = min(intensities) / 3, max(intensities) * 8
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.loglog([left, ridge], [left * bandwidth, peak], color="0.3")
    axes.loglog([ridge, right], [peak, peak], color="0.3")
    axes.annotate(
        f"memory bandwidth,\n{bandwidth / 1e9:.3g} GB/s",
        (ridge / 3, ridge / 3 * bandwidth),
        xytext=(-8, 2),
        textcoords="offset points",
        horizontalalignment="right",
    )
    axes.annotate(
        f"{limits.matrix_product}, {peak / 1e12:.3g} TOP/s",
        (right, peak),
        xytext=(-4, 6),
        textcoords="offset points",
        horizontalalignment="right",
    )
    for x, y, _, marker in points:
        axes.plot(x, y, marker, markersize=8, color="C0" if marker == "o" else "C1")
    axes.set(
        title=f"{name}: measured speed and limits (batch size x prompt tokens)",
        xlabel="operations per byte read",
        ylabel="operations per second",
        xlim=(left, right),
    )
    axes.grid(True, which="major", alpha=0.3)
    figure.canvas.draw()  # determines the position of the axes
    _label(axes, points)
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=150)
    return picture.getvalue()


def _label(axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Label each point on its right, or lower if labels would overlap, with a line to the point."""
    line, width = 15.0, 170.0  # size of a label in pixels
    taken: list[tuple[float, float]] = []
    for x, y, label, _ in sorted(points, key=lambda point: -point[1]):
        at_x, at_y = axes.transData.transform((x, y))
        low = at_y
        while any(abs(other_x - at_x) < width and abs(other_y - low) < line for other_x, other_y in taken):
            low -= 1
        taken.append((at_x, low))
        scale = 72 / axes.figure.dpi  # from pixels to points
        axes.annotate(
            label,
            (x, y),
            xytext=(14, (low - at_y) * scale - 3),
            textcoords="offset points",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "0.6"} if at_y - low > line / 2 else None,
        )
