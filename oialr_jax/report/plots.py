"""The pictures of a run, from its records (see `training.callbacks`).

Every function takes records, of one run or of several by name, and returns a
Matplotlib figure. Layers are named by their paths, time is optimiser steps. What
the records do not hold is not drawn.
"""

from collections.abc import Container, Mapping, Sequence
import pathlib
import re
from typing import Any

from matplotlib import figure as mpl
from matplotlib import ticker
import numpy as np

from oialr_jax.report import drawing
from oialr_jax.report import series

Records = Sequence[Mapping[str, Any]]
Figure = mpl.Figure

# So many layers are told apart as lines; of more, heat maps are drawn.
LINES = 10
# What `end` records count the seconds of, and what that is for a reader.
CLOCKS = {
  'training': 'steps',
  'compiling': 'compiling',
  'events': 'SVDs and slicing',
  'evaluating': 'evaluation',
  'tracking': 'tracking stability',
  'saving': 'checkpoints',
  'other': 'other',
}

_WIDE = {'linewidth': 4, 'alpha': 0.4}  # what another line lies upon
_DASHED = {'color': '#808080', 'linestyle': '--', 'linewidth': 1}


def of_runs(
  runs: Mapping[str, Records], seeded: Container[str] | None = None
) -> dict[str, Figure]:
  """The pictures that compare runs, by name: those with something to show.

  Args:
    runs: their records, by name.
    seeded: names whose number at the end is a seed, so that 'oialr-0' and
      'oialr-1' are drawn alike; None: all.
  """
  figures = {}
  if any(series.holding(r, 'train', 'losses') for r in runs.values()):
    figures['loss'] = loss(runs, seeded)
  names = dict.fromkeys(n for r in runs.values() for n in series.metrics(r))
  for name in names:
    often = any(len(series.of(r, 'eval')) > 1 for r in runs.values())
    if often and name != 'loss':
      word = re.sub('[^a-zA-Z0-9]+', '_', name)
      figures[f'metric_{word}'] = metric(runs, name, seeded)
  if any(series.end(r).get('seconds') for r in runs.values()):
    figures['time'] = time(runs)
  return figures


def of_run(
  records: Records, names: Container[str] | None = None
) -> dict[str, Figure]:
  """The pictures of what the method did in a run, by name: likewise.

  Args:
    records: of the run.
    names: draws these alone; None: all.
  """
  there = {
    stability: series.holding(records, 'stability', 'stability'),
    r_distance: series.holding(records, 'stability', 'r_distance'),
    ranks: series.holding(records, 'event', 'ranks'),
    sizes: series.of(records, 'event') and _carried(records),
    spectra: series.spectra(records)[0],
  }
  return {
    draw.__name__: draw(records)
    for draw, x in there.items()
    if x and (names is None or draw.__name__ in names)
  }


def write(
  folder: str | pathlib.Path, runs: Mapping[str, Records]
) -> list[pathlib.Path]:
  """Writes the pictures of some runs as PNGs; returns their paths.

  Those that compare runs are of all; the others, where there is something to
  show, are of the run that had events, or the first one.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  main = next(
    (r for r in runs.values() if series.of(r, 'event')),
    next(iter(runs.values()), ()),
  )
  paths = []
  for name, figure in {**of_runs(runs), **of_run(main)}.items():
    paths.append(folder / f'{name}.png')
    figure.savefig(paths[-1], dpi=150)
  return paths


# Of several runs.


def loss(
  runs: Mapping[str, Records], seeded: Container[str] | None = None
) -> Figure:
  """Training loss of several runs, averaged, and their test loss where known.

  See `of_runs`.
  """
  figure, axes = drawing.single('Loss (line: training; marker: test)')
  shown = {}
  for i, (method, several) in enumerate(_methods(runs, seeded).items()):
    look, dots = drawing.look(i), drawing.dots(i)
    for records in several:
      tests = series.holding(records, 'eval', 'loss')
      points = [r['step'] for r in tests], [r['loss'] for r in tests]
      (marks,) = axes.plot(*points, **{**look, **dots, 'linestyle': 'none'})
      (line,) = axes.plot(*series.losses(records), **look)
      if len(line.get_xdata()) or tests:
        shown[method] = line, marks
  drawing.scale(axes, _drawn(axes))
  shown |= _mark_transition(axes, *runs.values())
  axes.set_ylabel('loss')
  drawing.legend(figure, shown)
  return figure


def metric(
  runs: Mapping[str, Records], name: str, seeded: Container[str] | None = None
) -> Figure:
  """What evaluations measured under a name, over time; see `of_runs`."""
  figure, axes = drawing.single(f'{drawing.plain(name)} at evaluations')
  shown = {}
  for i, (method, several) in enumerate(_methods(runs, seeded).items()):
    for records in several:
      tests = series.holding(records, 'eval', name)
      points = [r['step'] for r in tests], [r[name] for r in tests]
      if tests:
        look = drawing.look(i) | drawing.dots(i)
        (shown[method],) = axes.plot(*points, **look)
  shown |= _mark_transition(axes, *runs.values())
  axes.set_ylabel(drawing.plain(name))
  drawing.legend(figure, shown)
  return figure


def time(runs: Mapping[str, Records]) -> Figure:
  """What every run spent its seconds on; only runs that have ended know."""
  ends = {name: series.end(r).get('seconds') for name, r in runs.items()}
  spent = {name: seconds for name, seconds in ends.items() if seconds}
  figure = drawing.figure(1.0 + 0.32 * len(spent))
  axes = figure.subplots()
  rows, left, shown = np.arange(len(spent)), np.zeros(len(spent)), {}
  for i, (clock, label) in enumerate(CLOCKS.items()):
    seconds = np.array([max(0, s.get(clock, 0)) for s in spent.values()])
    if seconds.any():
      shown[label] = axes.barh(rows, seconds, 0.6, left, color=f'C{i}')
    left += seconds
  for row, total in zip(rows, left):
    axes.annotate(
      f'{total:,.4g} s',
      (total, row),
      (4, 0),
      textcoords='offset points',
      va='center',
      fontsize=9,
    )
  axes.set_yticks(rows, map(drawing.plain, spent))
  axes.invert_yaxis()
  axes.set_xlim(0, 1.2 * max(left, default=0) or 1)
  axes.xaxis.set_major_formatter(lambda x, _: f'{x:,g}')
  axes.set_xlabel('seconds')
  axes.set_title('Time', fontsize=11)
  drawing.legend(figure, shown)
  return figure


# Of one run.


def stability(records: Records) -> Figure:
  """The stability of every layer over time, and the mean below.

  As the paper's figure: a row a layer, in the order of execution from the top;
  the measure is between neighbouring measurements.
  """
  steps, paths, grid = series.grid(records, 'stability', 'stability')
  edges = series.intervals(steps)
  top = drawing.tall(len(paths))
  figure = drawing.figure(top + 1.7)
  above, below = figure.subplots(2, 1, sharex=True, height_ratios=[top, 1.3])
  mesh = drawing.heat_map(
    above, edges, paths, grid, vmin=min(0.99, np.nanmin(grid)), vmax=1
  )
  drawing.colour_bar(figure, mesh, [above, below], 'stability (1: not turned)')
  gap = f'{np.median(np.diff(edges)):,.0f}'
  figure.suptitle(f'Stability of the bases over {gap} steps', fontsize=11)
  below.plot(steps, np.nanmean(grid, axis=0), '.-')
  below.set_ylabel('mean')
  below.grid(alpha=0.3)
  drawing.over_steps(below, 4)
  _mark_transition(above, records)
  _say_transition(below, records)
  return figure


def r_distance(records: Records) -> Figure:
  """How far the mixing of every layer moved between measurements."""
  steps, paths, grid = series.grid(records, 'stability', 'r_distance')
  title, label = 'R-distance between measurements', '||R - R before||'
  if len(paths) > LINES:
    return _map(records, series.intervals(steps), paths, grid, title, label)
  lines = {path: (steps, row) for path, row in zip(paths, grid)}
  return _lines(records, lines, title, label, marker='.')


def ranks(records: Records) -> Figure:
  """The rank of every layer over time."""
  steps, paths, grid = series.grid(records, 'event', 'ranks')
  edges = np.append(steps, max(records[-1]['step'], steps[-1] + 1))
  title = 'Rank of every low-rank layer'
  if len(paths) > LINES:
    return _map(records, edges, paths, grid, title, 'rank')
  # The last rank lasts to the end.
  grid = np.append(grid, grid[:, -1:], axis=1)
  lines = {path: (edges, row) for path, row in zip(paths, grid)}
  return _lines(records, lines, title, 'rank', drawstyle='steps-post')


def sizes(records: Records) -> Figure:
  """Parameters, bytes of optimiser state and flops of a step, over time."""
  curves = _carried(records)
  figure = drawing.figure(0.6 + 1.9 * len(curves))
  column = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
  shown = {}
  for axes, (label, lines) in zip(column, curves.items()):
    for field, (steps, values) in lines.items():
      last = ticker.EngFormatter(places=1, sep='')(values[-1])
      name = f'{field if len(lines) > 1 else label}: {last}'
      look = drawing.look(len(shown)) | {'where': 'post'}
      (shown[name],) = axes.step(steps, values, **look)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=''))
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    transition = _mark_transition(axes, records)
  column[0].set_title('What the run carries', fontsize=11)
  drawing.over_steps(column[-1])
  drawing.legend(figure, shown | transition)
  return figure


def spectra(records: Records) -> Figure:
  """Singular values of every layer: at the transition, and when last aligned."""
  first, last = series.spectra(records)
  draw = _spectra if len(first) <= LINES else _spectra_maps
  return draw(first, last)


def _spectra(first, last) -> Figure:
  columns = min(2, len(first))
  rows = -(-len(first) // columns)
  figure = drawing.figure(2.2 * rows + 0.4)
  grid = figure.subplots(rows, columns, squeeze=False).ravel()
  for axes, path in zip(grid, first):
    for (step, values), style in ((first[path], _WIDE), (last[path], {})):
      index = np.arange(1, len(values) + 1)
      axes.plot(index, values, label=f'step {step:,}', **style)
    title = drawing.plain(path, 42)
    axes.set_title(title, fontsize=9 if len(title) <= 30 else 7)
    axes.set_xlabel('index', fontsize=9)
    axes.set_ylabel('singular value', fontsize=9)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
  for axes in grid[len(first) :]:
    axes.set_axis_off()
  figure.suptitle('Singular values: at first, and last kept', fontsize=11)
  return figure


def _spectra_maps(first, last) -> Figure:
  """A row a layer, relative to its largest value and its full rank."""
  figure = drawing.figure(drawing.tall(len(first)) + 0.9)
  pair = figure.subplots(1, 2, sharey=True)
  share = np.arange(100) / 100
  for axes, spectrum in zip(pair, (first, last)):
    grid = np.full((len(first), 100), np.nan)
    for row, path in enumerate(first):
      values = np.asarray(spectrum[path][1], float)
      at = (share * len(first[path][1])).astype(int)
      kept = at < len(values)
      grid[row, kept] = values[at[kept]] / (np.nanmax(values) or 1)
    mesh = drawing.heat_map(
      axes, np.linspace(0, 1, 101), [*first], grid, vmin=0, vmax=1
    )
    axes.set_xlabel('index / full rank', fontsize=9)
  pair[0].set_title('at first', fontsize=9)
  pair[1].set_title('last kept', fontsize=9)
  pair[1].invert_yaxis()  # shared, so it was inverted twice
  drawing.colour_bar(figure, mesh, pair, 'singular value / largest')
  figure.suptitle('Singular values (blank: pruned)', fontsize=11)
  return figure


def _lines(records, lines, title, label, **style) -> Figure:
  """A line a layer, thinner ones upon wider ones, as some may coincide."""
  figure, axes = drawing.single(title)
  shown = {}
  for i, (path, points) in enumerate(lines.items()):
    width = 1.5 + 3 * (len(lines) - 1 - i) / max(1, len(lines) - 1)
    (shown[path],) = axes.plot(*points, linewidth=width, **style)
  axes.set_ylabel(label)
  drawing.scale(axes, _drawn(axes))
  shown |= _mark_transition(axes, records)
  drawing.legend(figure, shown)
  return figure


def _map(records, edges, paths, grid, title, label) -> Figure:
  figure = drawing.figure(drawing.tall(len(paths)) + 0.6)
  axes = figure.subplots()
  limits = drawing.magnitudes(grid)
  mesh = drawing.heat_map(axes, edges, paths, grid, **limits)
  drawing.colour_bar(figure, mesh, [axes], label)
  figure.suptitle(title, fontsize=11)
  drawing.over_steps(axes, 4)
  _say_transition(axes, records)
  return figure


def _carried(records: Records) -> dict[str, dict[str, Any]]:
  """Steps and values by field, for every axis that has any."""
  panels = {
    'parameters': ('trainable', 'stored'),
    'optimiser bytes': ('optimizer_bytes',),
    'flops of a step': ('flops',),
  }
  curves = {
    label: {f: x for f in fields if (x := series.carried(records, f))}
    for label, fields in panels.items()
  }
  return {label: lines for label, lines in curves.items() if lines}


def _methods(
  runs: Mapping[str, Records], seeded: Container[str] | None
) -> dict[str, list[Records]]:
  """Runs that differ in their seeds alone, 'oialr-0' and 'oialr-1', as one."""
  seeds = {}
  for name in (n for n, records in runs.items() if records):
    has_seed = seeded is None or name in seeded
    method = re.sub(r'-[0-9]+$', '', name) if has_seed else name
    seeds.setdefault(method, []).append(name)
  return {
    f'{method} ({len(names)} runs)' if len(names) > 1 else names[0]: [
      runs[name] for name in names
    ]
    for method, names in seeds.items()
  }


def _mark_transition(axes, *runs: Records) -> dict[str, Any]:
  """Draws where the first of the runs went low-rank; for the legend."""
  for at in map(series.transition, runs):
    if at is not None:
      return {'transition': axes.axvline(at, **_DASHED)}
  return {}


def _say_transition(axes, records: Records):
  if _mark_transition(axes, records):
    axes.set_xlabel('optimiser steps\n(dashed: the transition)')


def _drawn(axes) -> np.ndarray:
  return np.concatenate([line.get_ydata() for line in axes.get_lines()])
