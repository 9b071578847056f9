"""The picture of a study of stability: all conditions as small multiples."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import figure as mpl
import numpy as np

from oialr_jax.report import drawing
from oialr_jax.report import series

Records = Sequence[Mapping[str, Any]]

_COLUMNS = 4
# Stabilities below this share a colour.
_LOWEST = 0.8
# What is less than this of 1 - stability is the rounding of float32.
_ROUNDING = 1e-7


def small_multiples(groups: Mapping[str, Mapping[str, Records]]) -> mpl.Figure:
  """A heat map of layers over time a run, below 1 - the mean over layers.

  Args:
    groups: records of kind 'stability' by title, of the networks by name; those
      of a network have the same layers, and start on a line of their own.
  """
  lines = [
    list(runs.items())[i : i + _COLUMNS]
    for runs in groups.values()
    for i in range(0, len(runs), _COLUMNS)
  ]
  heights = [x for line in lines for x in (_height(line[0][1]), 1.0)]
  whole = mpl.Figure(
    figsize=(11, sum(heights) + 0.9 * len(lines) + 0.8), layout='constrained'
  )
  grid = whole.subplots(
    len(heights), _COLUMNS, sharey='row', height_ratios=heights, squeeze=False
  )
  for i, line in enumerate(lines):
    above, below = grid[2 * i], grid[2 * i + 1]
    for j, (title, records) in enumerate(line):
      mesh, shown = _panel(above[j], below[j], title, records)
    if len(line) % 2 == 0:  # shared, so it was inverted for every panel
      above[0].invert_yaxis()
    for axes in (*above[len(line) :], *below[len(line) :]):
      axes.set_axis_off()
    below[0].set_ylabel('1 - mean', fontsize=8)
  whole.colorbar(
    mesh,
    ax=grid,
    label='stability of a layer between measurements (1: not turned)',
    location='bottom',
    aspect=60,
    pad=0.01,
    extend='min',
  )
  whole.legend(
    list(shown.values()),
    list(shown),
    loc='outside upper center',
    ncols=2,
    frameon=False,
  )
  return whole


def _height(records: Records) -> float:
  """Inches of the layers."""
  _, paths, _ = series.grid(records, 'stability', 'stability')
  return 0.13 * max(len(paths), 6)


def _panel(above: Any, below: Any, title: str, records: Records) -> Any:
  steps, paths, values = series.grid(records, 'stability', 'stability')
  _, _, chance = series.grid(records, 'stability', 'chance')
  names = [path.removesuffix('/kernel') for path in paths]
  mesh = drawing.heat_map(
    above, series.intervals(steps), names, values, vmin=_LOWEST, vmax=1
  )
  above.tick_params(axis='y', labelsize=6)
  above.tick_params(axis='x', labelbottom=False)
  above.set_title(title, fontsize=8)
  turn = lambda grid: np.maximum(1 - grid.mean(axis=0), _ROUNDING)
  shown = {
    'measured': below.semilogy(steps, turn(values))[0],
    'by chance: after random steps of the same length': below.semilogy(
      steps, turn(chance), '--'
    )[0],
  }
  below.set_xlim(above.get_xlim())
  below.grid(alpha=0.3)
  below.tick_params(labelsize=7)
  drawing.over_steps(below, 4)
  below.xaxis.label.set_size(8)
  return mesh, shown
