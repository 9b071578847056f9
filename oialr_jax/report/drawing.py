"""How the plots look: what they share of axes, colours, legends, heat maps.

Figures are as wide as a phone shows, and text is never taken for mathematics.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

from matplotlib import axes as mpl_axes
from matplotlib import colors
from matplotlib import figure as mpl
from matplotlib import ticker
import numpy as np

Axes = mpl_axes.Axes
Figure = mpl.Figure

WIDTH = 5.2  # inches


def figure(height: float) -> Figure:
  """An empty figure of so many inches."""
  # Not pyplot: figures made here belong to the caller and need no closing.
  return mpl.Figure(figsize=(WIDTH, height), layout='constrained')


def single(title: str) -> tuple[Figure, Axes]:
  """A figure with one plot over optimiser steps."""
  whole = figure(3.2)
  axes = whole.subplots()
  axes.set_title(title, fontsize=11)
  axes.grid(alpha=0.3)
  over_steps(axes)
  return whole, axes


def over_steps(axes: Axes, ticks: int = 5):
  """Names the axis of time."""
  axes.set_xlabel('optimiser steps')
  axes.xaxis.set_major_locator(ticker.MaxNLocator(ticks, integer=True))
  axes.xaxis.set_major_formatter(lambda x, _: f'{x:,.0f}')


def plain(text: Any, width: int = 48) -> str:
  """Text of a file as Matplotlib shall show it, cut in the middle."""
  text = ''.join(c if c.isprintable() else '\ufffd' for c in str(text))
  if len(text) > width:
    half = (width - 1) // 2
    text = f'{text[:half]}\u2026{text[-half:]}'
  # A legend leaves out what begins with an underscore; $ begins a formula.
  return (' ' if text.startswith('_') else '') + text.replace('$', r'\$')


def look(i: int) -> dict[str, Any]:
  """Colour and style of the line of the i-th run."""
  return {
    'color': f'C{i % 10}',
    'linestyle': ('-', '--', ':', '-.')[i // 10 % 4],
    'linewidth': 1.5,
  }


def dots(i: int) -> dict[str, Any]:
  """The markers of the i-th run, hollow so that none hides another."""
  return {
    'marker': 'so^Dv'[i % 5],
    'markerfacecolor': 'none',
    'markersize': 7,
  }


def legend(whole: Figure, shown: Mapping[str, Any]):
  """Says below the figure, which grows by as much, what is shown."""
  names = list(map(plain, shown))
  if not names:
    return
  columns = max(1, min(3, 60 // (max(map(len, names)) + 8)))
  rows = math.ceil(len(names) / columns)
  whole.set_figheight(whole.get_figheight() + 0.17 * rows + 0.1)
  whole.legend(
    list(shown.values()),
    names,
    loc='outside lower center',
    ncols=columns,
    fontsize=9,
    frameon=False,
  )


def by_magnitude(values: Any) -> bool:
  """Whether values, or those of them that are finite, want a logarithm."""
  values = np.asarray(values, float)
  values = values[np.isfinite(values)]
  return bool(values.size and 0 < 10 * values.min() <= values.max())


def scale(axes: Axes, values: Any):
  """Makes the upright axis logarithmic where its values span decades."""
  if by_magnitude(values):
    axes.set_yscale('log')
    _plain_ticks(axes.yaxis, *axes.get_ylim())


def tall(rows: int) -> float:
  """Inches of a heat map with so many rows."""
  return 0.8 + (0.26 if rows <= 20 else 0.15) * rows


def heat_map(
  axes: Axes,
  edges: Sequence[float],
  names: Sequence[str],
  grid: np.ndarray,
  **limits: Any,
) -> Any:
  """Draws `grid [names, len(edges) - 1]` with a row a name, the first on top.

  Args:
    axes: where.
    edges: of the columns.
    names: of the rows.
    grid: numbers; nothing is drawn where they are NaN.
    **limits: `vmin`, `vmax` or `norm` of the colours.

  Returns:
    What `colour_bar` explains.
  """
  rows = np.arange(len(names) + 1)
  # Cells would be a path each in an SVG.
  mesh = axes.pcolormesh(edges, rows, grid, rasterized=True, **limits)
  labels = [*map(plain, names)]
  large = len(labels) <= 20 and max(map(len, labels)) <= 26
  axes.set_yticks(rows[:-1] + 0.5, labels, fontsize=9 if large else 7)
  axes.tick_params(axis='y', length=0)
  axes.invert_yaxis()
  return mesh


def colour_bar(whole: Figure, mesh: Any, above: Sequence[Axes], label: str):
  """Says below a heat map what its colours are."""
  bar = whole.colorbar(
    mesh, ax=list(above), label=label, location='bottom', aspect=40, pad=0.01
  )
  bar.solids.set_rasterized(True)
  if isinstance(mesh.norm, colors.LogNorm):
    _plain_ticks(bar.ax.xaxis, mesh.norm.vmin, mesh.norm.vmax)


def magnitudes(grid: np.ndarray) -> dict[str, Any]:
  """Limits for colours by magnitude, where all numbers are positive."""
  if not by_magnitude(grid):
    return {}
  return {'norm': colors.LogNorm(np.nanmin(grid), np.nanmax(grid))}


def _plain_ticks(axis: Any, low: float, high: float):
  """Of a logarithmic axis: 0.1 instead of a power of ten, and more of them."""
  steps = (1, 2, 5) if high < 1e4 * low else (1,)
  axis.set_major_locator(ticker.LogLocator(subs=steps, numticks=8))
  axis.set_minor_locator(ticker.NullLocator())
  axis.set_major_formatter(lambda x, _: f'{x:g}')
