"""When the bases of a dense network stop turning, and whether that is chance.

  python -m experiments.stability_study
  python -m experiments.stability_study --data_dir=FOLDER_OF_TFDS \\
    --config=experiments/configs/stability_study.py:cifar10

Trains dense, once for every condition and seed, and tracks the stability and
the R-distance of every layer, and how far its kernel moved: see
`experiments.turning`. Prints two tables and draws all conditions in one
picture, in --workdir. result.json has a row a run, and is written after every
run; with --resume, those that are in it are left out. See
experiments/configs/stability_study.py.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from experiments import classification
from experiments import cli
from experiments import image_sets
from experiments import learning_rates
from experiments import measured
from experiments import recipe
from experiments import rows as rows_lib
from experiments import runs
from experiments import settings
from experiments import stability_plots
from experiments import tables
from experiments import turning

Config = settings.Config
Row = rows_lib.Row

# Which run a row is of, and the settings that say which runs there are.
_FACTORS = ('network', 'activation', 'schedule', 'batch_size')
_GRID = ('networks', 'activations', 'schedules', 'batch_sizes', 'seeds')
_BASE = _FACTORS[1:]


def main(config: Config, options: cli.Options):
  rows = rows_lib.Rows(
    options.workdir,
    config,
    keys=(*_FACTORS, 'seed'),
    free=(*_GRID, *_BASE),
    resume=options.resume,
  )
  images = image_sets.load(config, options)
  try:
    rows.fill(
      [(*which, seed) for which in conditions(config) for seed in config.seeds],
      functools.partial(_run, config, options, images),
    )
  finally:
    if rows:
      print(f'{table(rows)}\n\n{table_of_types(rows)}\n\n{baseline(rows)}')
      _draw(options, rows)


def check(config: Config):
  image_sets.check(config)
  settings.check_names(config.networks, config.models, 'config.networks')
  image = jax.ShapeDtypeStruct((1, *image_sets.shape(config)), jnp.float32)
  for condition in conditions(config):
    network, _, schedule, batch_size = condition
    learning_rates.make(schedule, config)
    if config.data == 'digits' and batch_size > 1000:
      raise ValueError(
        f'config.batch_sizes={batch_size}: more than there are digits.'
      )
    model = _model(config, condition)
    runs.check_model(model, f'config.models.{network}', image)
  if 8 * config.track_every > config.steps:
    raise ValueError(
      f'config.track_every={config.track_every}: quarters of the '
      f'{config.steps} steps are compared, of two measurements at least.'
    )


def conditions(config: Config) -> list[tuple[Any, ...]]:
  """Network, activation, schedule and batch size of every condition.

  One factor at a time differs from the base: activations and schedules of every
  network, batch sizes of the first.
  """
  base = {key: config[key] for key in _BASE}
  changes = [
    (network, factor, value)
    for network in config.networks
    for factor, values in (
      ('activation', (config.activation, *config.activations)),
      ('schedule', config.schedules),
      ('batch_size', config.batch_sizes),
    )
    for value in values
    if factor != 'batch_size' or network == config.networks[0]
  ]
  found = [
    (network, *(base | {factor: value}).values())
    for network, factor, value in changes
  ]
  return list(dict.fromkeys(found))


def table(rows: Iterable[Row]) -> str:
  """A line for every condition: means over the seeds."""
  lines = [[*_FACTORS, 'seeds', *_COLUMNS, 'shows']]
  for condition, group in measured.grouped(rows, _FACTORS).items():
    cells = [
      ' to '.join(_mean(group, key, digits) for key in keys)
      for keys, digits in _COLUMNS.values()
    ]
    shows = ', '.join(dict.fromkeys(row['shows'] for row in group))
    lines.append([*map(str, condition), str(len(group)), *cells, shows])
  return tables.aligned(lines)


def table_of_types(rows: Iterable[Row]) -> str:
  """By condition, of every type of layer: from when on it stays above 0.98,
  and how much it turns late in the run, in units of chance."""
  keys = {f'from {turning.THRESHOLDS[1]}': 2, 'turn / chance late': 2}
  types = list(dict.fromkeys(t for row in rows for t in row['types']))
  lines = [[*_FACTORS, *types]]
  for condition, group in measured.grouped(rows, _FACTORS).items():
    cells = [
      '; '.join(
        _mean([row['types'][t] for row in group], key, digits)
        for key, digits in keys.items()
      )
      if t in group[0]['types']
      else ''
      for t in types
    ]
    lines.append([*map(str, condition), *cells])
  return f'By type: {"; ".join(keys)}\n{tables.aligned(lines)}'


def baseline(rows: Iterable[Row]) -> str:
  """The stability between random bases, of the smallest and largest layers."""
  shapes = {tuple(s) for row in rows for s in row['shapes'].values()}
  found = []
  for shape in sorted({min(shapes, key=min), max(shapes, key=min)}):
    mean, deviation = turning.between_random_bases(shape)
    found.append(f'{shape[0]} x {shape[1]}: {mean:.4f} +- {deviation:.4f}')
  return f'Between random bases: {"; ".join(found)}'


def _run(
  config: Config,
  options: cli.Options,
  images: image_sets.Images,
  *which: Any,
) -> Row:
  *condition, seed = which
  *_, schedule, batch_size = condition
  mine = config.copy_and_resolve_references()
  mine.batch_size = batch_size
  task = image_sets.Task.of_images(_model(config, condition), images, mine)
  name = '-'.join(map(str, condition))
  result = classification.run(
    task,
    mine,
    dataclasses.replace(options, workdir=options.workdir / name),
    'dense',
    seed,
    steps=config.steps,
    rate=learning_rates.make(schedule, config),
    track_every=config.track_every,
    track_more=turning.measure,
  )
  tracked = result.select('stability')
  types = {layer.path: turning.kind(layer) for layer in result.layers}
  return {
    **dict(zip(_FACTORS, condition)),
    'seed': seed,
    **measured.row(result),
    **turning.summary(tracked, config.steps),
    'types': turning.by_type(tracked, config.steps, types),
    'shapes': {layer.path: layer.matrix for layer in result.layers},
    'records': tracked,
  }


def _model(config: Config, condition: Sequence[Any]):
  network, activation, *_ = condition
  section = dict(config.models[network]) | {'activation': activation}
  return recipe.network(section, f'config.models.{network}')


def _draw(options: cli.Options, rows: Iterable[Row]):
  """One picture of all conditions, of each the first seed."""
  groups = {}
  for condition, group in measured.grouped(rows, _FACTORS).items():
    network, activation, schedule, batch_size = condition
    title = f'{network}: {activation}\n{schedule}, batch {batch_size}'
    groups.setdefault(network, {})[title] = group[0]['records']
  file = options.workdir / 'stability.png'
  stability_plots.small_multiples(groups).savefig(file, dpi=150)
  print(f'\n{file}')


# Keys of a cell, and digits.
_COLUMNS = {
  'test %': (('test %',), 1),
  'from 0.95': (('from 0.95',), 2),
  'from 0.98': (('from 0.98',), 2),
  'lowest': (('lowest',), 3),
  'final': (('final',), 4),
  'change %': (('change % early', 'change % late'), 2),
  'turn / chance': (('turn / chance early', 'turn / chance late'), 2),
  'R-distance / change': (
    ('R-distance / change early', 'R-distance / change late'),
    2,
  ),
}


def _mean(rows: Sequence[Row], key: str, digits: int) -> str:
  values = [row[key] for row in rows if row[key] is not None]
  if len(values) < len(rows):
    return 'never' if key.startswith('from') else '-'
  return f'{statistics.fmean(values):.{digits}f}'


BINARY = cli.Binary(
  name='stability_study', main=main, check=check, data=image_sets.FLAG
)

if __name__ == '__main__':
  cli.run(BINARY)
