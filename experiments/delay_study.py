"""Accuracy and size over transition time, depth and learning rate.

  python -m experiments.delay_study

Trains MLPs by OIALR for every delay, depth, learning rate and seed, and dense
for every depth, learning rate and seed; prints a table and draws heat maps in
--workdir. result.json has a row a run, and is written after every run; with
--resume, those that are in it are left out. See
experiments/configs/delay_study.py.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import itertools
from typing import Any

from experiments import classification
from experiments import cli
from experiments import image_sets
from experiments import measured
from experiments import rows as rows_lib
from experiments import runs
from experiments import settings
from experiments import study_plots
from experiments import tables
from oialr_jax import models

Config = settings.Config
Row = rows_lib.Row

# Which run a row is of. Of a dense one, the delay is None.
_KEYS = ('depth', 'learning_rate', 'delay')
_GRID = ('depths', 'learning_rates', 'delays', 'seeds')
_COLUMNS = ('validation %', 'test %', 'trainable %', 'stored %')
_DRAWN = {
  'validation %': 'validation accuracy, %',
  'test %': 'test accuracy, %',
  'trainable %': 'trainable, % of dense',
}


def main(config: Config, options: cli.Options):
  rows = rows_lib.Rows(
    options.workdir,
    config,
    keys=(*_KEYS, 'seed'),
    free=_GRID,
    resume=options.resume,
  )
  images = image_sets.load(config, options)
  try:
    rows.fill(
      [(*key, seed) for key in _keys(config) for seed in config.seeds],
      functools.partial(_run, config, options, images),
    )
  finally:
    if rows:
      print(table(rows))
      _draw(options, rows)


def check(config: Config):
  image_sets.check(config)
  for key in _keys(config):
    mine = _with(config, key)
    classification.cosine(mine)
    runs.check(mine, config.steps, ['oialr'])


def table(rows: Iterable[Row]) -> str:
  """A line for every depth, rate and delay: mean and deviation over seeds."""
  lines = [['depth', 'rate', 'delay', 'seeds', *_COLUMNS]]
  for (depth, rate, delay), group in measured.grouped(rows, _KEYS).items():
    cells = [measured.cell(group, key, 1) for key in _COLUMNS]
    line = [f'{depth}', f'{rate:g}', _name(delay), f'{len(group)}', *cells]
    lines.append(line)
  return tables.aligned(lines)


def _keys(config: Config) -> list[tuple[Any, ...]]:
  return list(
    itertools.product(
      config.depths, config.learning_rates, (None, *config.delays)
    )
  )


def _run(
  config: Config,
  options: cli.Options,
  images: image_sets.Images,
  depth: int,
  rate: float,
  delay: float | None,
  seed: int,
) -> Row:
  key = depth, rate, delay
  mine = _with(config, key)
  model = models.Mlp(widths=(config.width,) * depth)
  name = f'{_name(delay)}-depth-{depth}-rate-{rate:g}'
  result = classification.run(
    image_sets.Task.of_images(model, images, config),
    mine,
    dataclasses.replace(options, workdir=options.workdir / name),
    'dense' if delay is None else 'oialr',
    seed,
    steps=config.steps,
    rate=classification.cosine(mine),
  )
  return {**dict(zip(_KEYS, key)), 'seed': seed, **measured.row(result)}


def _with(config: Config, key: Sequence[Any]) -> Config:
  """The settings of a run."""
  _, rate, delay = key
  mine = config.copy_and_resolve_references()
  with mine.unlocked():
    mine.learning_rate = rate
    mine.oialr.delay = 0.0 if delay is None else delay
  return mine


def _name(delay: float | None) -> str:
  return 'dense' if delay is None else f'{delay:.2g}'


def _draw(options: cli.Options, rows: Iterable[Row]):
  groups = measured.grouped(rows, _KEYS)
  # By quantity and depth, the means by learning rate and delay.
  maps = {
    (label, f'{depth} hidden layers'): {
      (f'{rate:g}', _name(delay)): measured.moments(group, quantity)[0]
      for (d, rate, delay), group in groups.items()
      if d == depth and (delay is not None or quantity != 'trainable %')
    }
    for quantity, label in _DRAWN.items()
    for depth in dict.fromkeys(key[0] for key in groups)
  }
  file = options.workdir / 'delay.png'
  study_plots.grids(
    maps, rows='learning rate', columns='delay, as a share of the run'
  ).savefig(file, dpi=150)
  print(f'\n{file}')


BINARY = cli.Binary(
  name='delay_study', main=main, check=check, data=image_sets.FLAG
)

if __name__ == '__main__':
  cli.run(BINARY)
