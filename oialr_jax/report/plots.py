"""The pictures of a run, from its records (see `training.callbacks`).

Every function takes records, of one run or of several by name, and returns a
Matplotlib figure. Layers are named by their paths, time is optimiser steps.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from matplotlib import figure as mpl
import numpy as np

Records = Sequence[Mapping[str, Any]]
Figure = mpl.Figure

_WIDE = {'linewidth': 4, 'alpha': 0.4}  # what another line lies upon


def loss(runs: Mapping[str, Records]) -> Figure:
  """Training loss of several runs, smoothed, and their test loss where known."""
  figure, axes = _figure(8, 4)
  for i, (name, records) in enumerate(runs.items()):
    train = _of(records, 'train')
    losses = np.concatenate([r['losses'] for r in train])
    width = max(1, len(losses) // 100)
    means = _smooth(losses, width)
    steps = np.arange(len(means)) + width / 2
    axes.plot(steps, means, color=f'C{i}', label=f'{name}, training')
    tests = _of(records, 'eval')
    axes.plot(
      [r['step'] for r in tests],
      [r['loss'] for r in tests],
      ls='none',
      marker='so^Dv'[i % 5],
      color=f'C{i}',
      markerfacecolor='none',
      markersize=9,
      label=f'{name}, test',
    )
  _mark_transition(axes, runs)
  axes.set_yscale('log')
  axes.set_ylabel('loss')
  axes.set_title('Loss (training: running mean)')
  _legend_beside(axes, 2 * len(runs) + 1)
  return figure


def ranks(records: Records) -> Figure:
  """The rank of every layer over time."""
  events = _of(records, 'event')
  figure, axes = _figure(8, 4)
  end = records[-1]['step']
  paths = list(dict.fromkeys(p for e in events for p in e['ranks']))
  for path in paths:
    seen = [(e['step'], e['ranks'][path]) for e in events if path in e['ranks']]
    steps, values = zip(*seen, (end, seen[-1][1]))
    axes.step(steps, values, where='post', label=path, linewidth=1.8)
  axes.set_xlim(0, end * 1.02)
  axes.set_yscale('log', base=2)
  axes.yaxis.set_major_formatter(lambda y, _: f'{y:g}')
  axes.set_ylabel('rank')
  axes.set_xlabel('optimiser steps')
  axes.set_title('Rank of every low-rank layer')
  _legend_beside(axes, len(paths))
  return figure


def stability(records: Records) -> Figure:
  """The stability of every layer over time, and the mean below.

  As the paper's figure: a row a layer, in the order of execution from the top;
  the measure is between neighbouring measurements.
  """
  measured = _of(records, 'stability')
  paths = list(measured[0]['stability'])
  grid = np.array([[m['stability'][p] for m in measured] for p in paths])
  steps = np.array([m['step'] for m in measured])
  height = 1.6 + 0.28 * len(paths)
  figure = _new(8, height + 1.8)
  top, below = figure.subplots(
    2, 1, sharex=True, gridspec_kw={'height_ratios': [height, 1.8]}
  )
  gap = steps[0] if len(steps) == 1 else steps[-1] - steps[-2]
  edges = np.concatenate([[steps[0] - gap], steps])
  mesh = top.pcolormesh(
    edges, np.arange(len(paths) + 1), grid, cmap='viridis', vmax=1
  )
  top.set_yticks(np.arange(len(paths)) + 0.5, paths)
  top.invert_yaxis()
  top.set_title(f'Stability of the bases over {gap} steps (1: none has turned)')
  figure.colorbar(mesh, ax=[top, below], label='stability')
  below.plot(steps, grid.mean(axis=0), '.-')
  below.set_ylabel('mean')
  below.set_xlabel('optimiser steps')
  below.grid(alpha=0.3)
  at = _transition(records)
  if at is not None:
    for axes in (top, below):
      axes.axvline(at, color='tab:red', linestyle='--', linewidth=1)
    below.set_xlabel('optimiser steps (dashed: the transition)')
  return figure


def spectra(records: Records) -> Figure:
  """Singular values of every layer: at the transition, and when last aligned."""
  events = _of(records, 'event')
  first, last = {}, {}
  for event in events:
    for path, values in event['spectra'].items():
      first.setdefault(path, (event['step'], values))
      kept = event['ranks'][path]
      last[path] = event['step'], values[:kept]
  columns = min(3, len(first))
  rows = -(-len(first) // columns)
  figure = _new(max(5, 3.6 * columns), 2.9 * rows + 0.4)
  grid = figure.subplots(rows, columns, squeeze=False).ravel()
  for axes, path in zip(grid, first):
    for (step, values), style in ((first[path], _WIDE), (last[path], {})):
      ranked = np.arange(1, len(values) + 1)
      axes.plot(ranked, values, label=f'step {step}', **style)
    axes.set_title(path, fontsize=9)
    axes.set_xlabel('index')
    axes.set_ylabel('singular value')
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
  for axes in grid[len(first) :]:
    axes.set_axis_off()
  figure.suptitle('Singular values: at the transition, and last kept')
  return figure


def write(
  folder: str | pathlib.Path, runs: Mapping[str, Records]
) -> list[pathlib.Path]:
  """Writes the pictures of some runs as PNGs; returns their paths.

  The loss is of all runs; the others, where there is something to show, are of
  the run that had events, or the first one.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  main = next(
    (r for r in runs.values() if _of(r, 'event')), next(iter(runs.values()))
  )
  figures = {'loss': loss(runs)}
  if _of(main, 'event'):
    figures |= {'ranks': ranks(main), 'spectra': spectra(main)}
  if _of(main, 'stability'):
    figures['stability'] = stability(main)
  paths = []
  for name, figure in figures.items():
    paths.append(folder / f'{name}.png')
    figure.savefig(paths[-1], dpi=120)
  return paths


def _of(records: Records, kind: str) -> list[Mapping[str, Any]]:
  return [r for r in records if r['kind'] == kind]


def _new(width: float, height: float) -> Figure:
  # Not pyplot: figures made here belong to the caller and need no closing.
  return mpl.Figure(figsize=(width, height), layout='constrained')


def _figure(width: float, height: float):
  figure = _new(width, height)
  axes = figure.subplots()
  axes.set_xlabel('optimiser steps')
  axes.grid(alpha=0.3)
  return figure, axes


def _legend_beside(axes, entries: int):
  """Outside the plot, as long as it may be."""
  axes.legend(
    loc='upper left',
    bbox_to_anchor=(1.01, 1),
    fontsize=8,
    ncols=-(-entries // 24),
  )


def _transition(records: Records) -> int | None:
  events = _of(records, 'event')
  return events[0]['step'] if events else None


def _mark_transition(axes, runs: Mapping[str, Records]):
  for records in runs.values():
    at = _transition(records)
    if at is not None:
      axes.axvline(
        at, color='grey', linestyle='--', linewidth=1, label='transition'
      )
      return


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
  """The running mean over `width` values."""
  return np.convolve(values, np.ones(width) / width, mode='valid')
