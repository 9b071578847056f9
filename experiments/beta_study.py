"""Compression against accuracy over beta, and dense beside it.

  python -m experiments.beta_study
  python -m experiments.beta_study --data_dir=FOLDER_OF_TFDS \\
    --config=experiments/configs/beta_study.py:mnist

Trains by OIALR for every cutoff and seed, and dense for every seed; prints a
table and draws it in --workdir. result.json has a row a run, and is written
after every run; with --resume, those that are in it are left out. See
experiments/configs/beta_study.py.
"""

from collections.abc import Iterable
import dataclasses
import functools

import jax
import jax.numpy as jnp

from experiments import classification
from experiments import cli
from experiments import image_sets
from experiments import measured
from experiments import recipe
from experiments import rows as rows_lib
from experiments import runs
from experiments import settings
from experiments import study_plots
from experiments import tables

Config = settings.Config
Row = rows_lib.Row

# Of a dense run, the cutoff is None.
_KEYS = ('cutoff', 'seed')
_GRID = ('cutoffs', 'seeds')
_COLUMNS = ('validation %', 'test %', 'trainable %', 'stored %')


def main(config: Config, options: cli.Options):
  rows = rows_lib.Rows(
    options.workdir, config, keys=_KEYS, free=_GRID, resume=options.resume
  )
  images = image_sets.load(config, options)
  task = image_sets.Task.of_images(recipe.model(config), images, config)
  try:
    rows.fill(
      [(x, seed) for seed in config.seeds for x in (None, *config.cutoffs)],
      functools.partial(_run, config, options, task),
    )
  finally:
    if rows:
      print(table(rows))
      _draw(options, rows)


def check(config: Config):
  image_sets.check(config)
  classification.cosine(config)
  image = jax.ShapeDtypeStruct((1, *image_sets.shape(config)), jnp.float32)
  runs.check_model(recipe.model(config), 'config.model', image)
  for cutoff in config.cutoffs:
    runs.check(_with(config, cutoff), config.steps, ['oialr'])


def table(rows: Iterable[Row]) -> str:
  """A line for every cutoff: mean and deviation over the seeds."""
  lines = [['beta', 'seeds', *_COLUMNS]]
  for cutoff, group in _by_cutoff(rows).items():
    name = 'dense' if cutoff is None else f'{cutoff:g}'
    cells = [measured.cell(group, key, 2) for key in _COLUMNS]
    lines.append([name, str(len(group)), *cells])
  return tables.aligned(lines)


def _run(
  config: Config,
  options: cli.Options,
  task: image_sets.Task,
  cutoff: float | None,
  seed: int,
) -> Row:
  dense = cutoff is None
  name = 'dense' if dense else f'beta-{cutoff:g}'
  result = classification.run(
    task,
    config if dense else _with(config, cutoff),
    dataclasses.replace(options, workdir=options.workdir / name),
    'dense' if dense else 'oialr',
    seed,
    steps=config.steps,
    rate=classification.cosine(config),
  )
  return {'cutoff': cutoff, 'seed': seed, **measured.row(result)}


def _with(config: Config, cutoff: float) -> Config:
  mine = config.copy_and_resolve_references()
  with mine.unlocked():
    mine.oialr.cutoff = cutoff
  return mine


def _by_cutoff(rows: Iterable[Row]) -> dict[float | None, list[Row]]:
  """Dense first, then in the order of the cutoffs."""
  groups = measured.grouped(rows, ['cutoff'])
  order = sorted(groups, key=lambda key: (key[0] is not None, key[0] or 0))
  return {key[0]: groups[key] for key in order}


def _draw(options: cli.Options, rows: Iterable[Row]):
  groups = _by_cutoff(rows)
  points = {
    name: {key: measured.moments(group, key) for key in _COLUMNS}
    for name, group in groups.items()
  }
  dense = points.pop(None, None)
  if dense is None or not points:
    return
  file = options.workdir / 'beta.png'
  study_plots.compression(points, dense).savefig(file, dpi=150)
  print(f'\n{file}')


BINARY = cli.Binary(
  name='beta_study', main=main, check=check, data=image_sets.FLAG
)

if __name__ == '__main__':
  cli.run(BINARY)
