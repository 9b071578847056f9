"""Pictures of the studies that compare OIALR with dense."""

from collections.abc import Mapping
from typing import Any

from matplotlib import figure as mpl
from matplotlib import ticker
import numpy as np

from oialr_jax.report import drawing

# Mean and deviation over the seeds, by name.
Point = Mapping[str, tuple[float, float]]


def compression(points: Mapping[float, Point], dense: Point) -> mpl.Figure:
  """Error over the trainable share, and both sizes over beta.

  Args:
    points: by beta, 'validation %', 'test %' (accuracies), 'trainable %' and
      'stored %'.
    dense: likewise, drawn as a line in a band of its deviation.
  """
  whole = drawing.figure(6.0)
  above, below = whole.subplots(2, 1)
  shown = _errors(above, points, dense) | _sizes(below, points)
  above.set_title(
    'Error over compression (bars, bands: deviation)', fontsize=11
  )
  for axes in (above, below):
    axes.grid(alpha=0.3)
  drawing.legend(whole, shown)
  return whole


def _errors(axes, points, dense) -> dict[str, Any]:
  x, dx = np.array([p['trainable %'] for p in points.values()]).T
  shown = {}
  for i, key in enumerate(('test %', 'validation %')):
    split, colour = key.removesuffix(' %'), f'C{i}'
    y, dy = np.array([p[key] for p in points.values()]).T
    look = dict(color=colour, marker='os'[i], markersize=4, linewidth=1)
    shown[f'OIALR, {split} error'] = axes.errorbar(
      x, 100 - y, dy, dx, capsize=2, **look
    )
    mean, deviation = dense[key]
    shown[f'dense, {split} error'] = axes.axhline(
      100 - mean, linestyle='--', color=colour, linewidth=1
    )
    band = 100 - mean - deviation, 100 - mean + deviation
    axes.axhspan(*band, color=colour, alpha=0.12)
  axes.set_xscale('log')
  axes.set_yscale('log')
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(lambda x, _: f'{x:g}')
  axes.set_xlabel('trainable parameters, % of dense')
  axes.set_ylabel('error, %')
  return shown


def _sizes(axes, points) -> dict[str, Any]:
  shown = {}
  for key, marker, style in (
    ('trainable %', 'o', '-'),
    ('stored %', 's', ':'),
  ):
    y, dy = np.array([p[key] for p in points.values()]).T
    look = dict(color='C2', marker=marker, markersize=4, linestyle=style)
    shown[f'{key.removesuffix(" %")} parameters'] = axes.errorbar(
      list(points), y, dy, capsize=2, linewidth=1, **look
    )
  axes.set_xlabel('beta (cutoff of singular values)')
  axes.set_ylabel('parameters, % of dense')
  axes.set_ylim(bottom=0)
  return shown


def grids(
  maps: Mapping[tuple[str, str], Mapping[tuple[str, str], float]],
  *,
  rows: str,
  columns: str,
) -> mpl.Figure:
  """Heat maps with their numbers: a line a quantity, a column a panel.

  Args:
    maps: by quantity and panel, numbers by row and column.
    rows: what the rows are.
    columns: what the columns are.
  """
  quantities = list(dict.fromkeys(quantity for quantity, _ in maps))
  panels = list(dict.fromkeys(panel for _, panel in maps))
  size = (3.0 * len(panels) + 1.0, 2.3 * len(quantities) + 0.4)
  whole = mpl.Figure(figsize=size, layout='constrained')
  axes = whole.subplots(len(quantities), len(panels), squeeze=False)
  for line, quantity in zip(axes, quantities):
    values = [x for panel in panels for x in maps[quantity, panel].values()]
    # Colours from a quantile on: one failed run would hide all else.
    limits = dict(vmin=np.quantile(values, 0.1), vmax=max(values))
    for one, panel in zip(line, panels):
      mesh = _grid(one, maps[quantity, panel], limits)
      one.set_title(panel, fontsize=9)
    line[0].set_ylabel(rows, fontsize=9)
    whole.colorbar(mesh, ax=list(line), label=quantity, extend='min')
  for one in axes[-1]:
    one.set_xlabel(columns, fontsize=9)
  return whole


def _grid(axes, cells: Mapping[tuple[str, str], float], limits):
  rows = list(dict.fromkeys(row for row, _ in cells))
  columns = list(dict.fromkeys(column for _, column in cells))
  values = np.array(
    [[cells.get((r, c), np.nan) for c in columns] for r in rows]
  )
  mesh = axes.pcolormesh(values, **limits)
  for (i, j), value in np.ndenumerate(values):
    bright = (value - limits['vmin']) > 0.6 * (limits['vmax'] - limits['vmin'])
    axes.text(
      j + 0.5,
      i + 0.5,
      f'{value:.1f}',
      ha='center',
      va='center',
      fontsize=8,
      color='black' if bright else 'white',
    )
  axes.set_xticks(np.arange(len(columns)) + 0.5, columns, fontsize=8)
  axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8)
  axes.tick_params(length=0)
  return mesh
