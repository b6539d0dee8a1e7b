"""A picture of what was reached against what memory and arithmetic allow (Williams et al., 2009)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grok1.errors import Grok1Error

if TYPE_CHECKING:
    from grok1.bench import Limits, Measurement


class PlotError(Grok1Error):
    """A picture that cannot be drawn."""


def require_matplotlib() -> None:
    """Makes sure that pictures can be drawn.

    Raises:
        PlotError: if not.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PlotError(
            f"--plot needs matplotlib, which cannot be imported ({error}): run pip install 'grok1[plot]', or leave "
            "--plot out"
        ) from error


def draw_roofline(name: str, limits: Limits, measured: Sequence[Measurement], kind: str) -> bytes:
    """The picture, with a point for the prefill and one for the decoding of each measurement.

    Args:
        name: of the model.
        limits: the roofs.
        measured: what was reached.
        kind: "png" or "svg".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bandwidth, peak = limits.read_bytes_per_second, limits.matrix_operations_per_second
    points = []
    for m in measured:
        what = f"{m.batch} x {m.prompt_tokens}"
        decode = m.decode_operations_per_step / m.decode_bytes_per_step
        points.append((decode, m.decode_operations_per_step / m.decode_step_seconds, f"decode, {what}", "o"))
        points.append(
            (m.prefill_operations / m.prefill_bytes, m.prefill_operations / m.prefill_seconds, f"prefill, {what}", "s")
        )
    intensities = [point[0] for point in points] + [peak / bandwidth]
    left, right = min(intensities) / 3, max(intensities) * 8
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.loglog([left, peak / bandwidth], [left * bandwidth, peak], color="0.3")
    axes.loglog([peak / bandwidth, right], [peak, peak], color="0.3")
    axes.annotate(
        f"reading memory, {bandwidth / 1e9:.3g} GB/s",
        (left * 1.3, left * 1.3 * bandwidth),
        xytext=(0, 8),
        textcoords="offset points",
        rotation=0,
    )
    axes.annotate(
        f"matrix product, {peak / 1e12:.3g} TOP/s",
        (right, peak),
        xytext=(0, 6),
        textcoords="offset points",
        horizontalalignment="right",
    )
    for x, y, label, marker in points:
        axes.plot(x, y, marker, markersize=8, color="C0" if marker == "o" else "C1")
        axes.annotate(label, (x, y), xytext=(10, -5), textcoords="offset points")
    axes.set(
        title=f"{name}: reached against limits (sequences x tokens of the prompt)",
        xlabel="operations for each byte that has to be read",
        ylabel="operations a second",
        xlim=(left, right),
    )
    axes.grid(True, which="major", alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=150)
    return picture.getvalue()
