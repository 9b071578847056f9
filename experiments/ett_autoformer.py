"""Autoformer on the ETT series, by every method, at every horizon.

  python -m experiments.ett_autoformer --data_dir=FOLDER --config.horizons=96,192

Trains a run for every set, horizon, seed and method, evaluating on validation
and test data after every epoch, or every eval_epochs of one, and prints the
test errors of the evaluation that was best on validation data, next to the
published ones. result.json has a row a run, with all its evaluations, and is
written after every run. With --resume, runs that are in it are left out and
the others go on, and so do those that are to go further than they did. See
experiments/configs/ett_autoformer.py.
"""

from collections.abc import Iterable, Sequence
import itertools
import math
import statistics

import optax

from experiments import cli
from experiments import forecasting
from experiments import methods
from experiments import rows as rows_lib
from experiments import runs
from experiments import settings
from experiments import tables
from oialr_jax import data
from oialr_jax import training

Config = settings.Config
Row = rows_lib.Row

# Rows of the training split: 12 months of 30 days.
SETS = {'ETTh1': 8640, 'ETTh2': 8640, 'ETTm1': 34560, 'ETTm2': 34560}
# Test MSE by set and horizon: the best epoch of the means over the runs of the
# method's authors (analysis/af-*-mse.csv of their repository).
PUBLISHED = {
  ('ETTm2', 192): {'dense': 0.274, 'oialr': 0.268},
  ('ETTm2', 720): {'dense': 0.420, 'oialr': 0.420},
}
# Which run a row is of, and the settings that say which runs there are.
_KEYS = ('set', 'horizon', 'method', 'seed')
_GRID = ('sets', 'horizons', 'methods', 'seeds')
# How far a run goes: it may go on.
_LENGTH = ('stop_epochs', 'patience')


def main(config: Config, options: cli.Options):
  rows = rows_lib.Rows(
    options.workdir,
    config,
    keys=_KEYS,
    free=(*_GRID, *_LENGTH),
    resume=options.resume,
  )
  grid = itertools.product(
    config.sets, config.horizons, config.seeds, config.methods
  )
  try:
    for name, horizon, seed, method in grid:
      row = rows.find(name, horizon, method, seed)
      _check_patience(row, config)
      if row is None or any(row[key] != config[key] for key in _LENGTH):
        rows.add(_run(config, options, name, horizon, method, seed))
  finally:
    if rows:
      print(table(rows))


def check(config: Config):
  settings.check_names(config.sets, SETS, 'config.sets')
  settings.check_names([config.loss], forecasting.LOSSES, 'config.loss')
  if config.label_len > config.seq_len:
    raise ValueError(
      f'config.label_len={config.label_len}: must be at most seq_len='
      f'{config.seq_len}.'
    )
  for name, horizon in itertools.product(config.sets, config.horizons):
    windows = SETS[name] - config.seq_len - horizon + 1
    if windows < config.batch_size:
      raise ValueError(
        f'config.horizons={horizon}: {name} has {max(windows, 0)} windows for '
        f'training, less than batch_size={config.batch_size}.'
      )
    forecasting.check(config, horizon)
    _, steps = _length(config, windows)
    runs.check(config, steps, config.methods)


def table(rows: Iterable[Row]) -> str:
  """A line for every set, horizon and method: means over the seeds."""
  groups = {}
  for row in rows:
    which = row['set'], row['horizon'], row['method']
    groups.setdefault(which, []).append(row)
  lines = [['set', 'horizon', 'method', 'seeds', *_COLUMNS, 'MSE, published']]
  for (name, horizon, method), group in sorted(groups.items()):
    published = PUBLISHED.get((name, horizon), {}).get(method)
    lines.append(
      [name, str(horizon), method, str(len(group))]
      + [_mean([row[key] for row in group], n) for key, n in _COLUMNS.values()]
      + [f'{published:.3f}' if published else '-']
    )
  return tables.aligned(lines)


def best_epoch(epochs: Sequence[Row]) -> Row:
  """The one with the least error on validation data, of equals the first."""
  return min(epochs, key=lambda found: found['val_mse'])


def _run(
  config: Config,
  options: cli.Options,
  name: str,
  horizon: int,
  method: str,
  seed: int,
) -> Row:
  series = data.load_series(name, data_dir=options.data_dir)
  task = forecasting.Task.of_series(series, config, horizon)
  epoch, steps = _length(config, len(task.train))
  stop = steps
  if config.stop_epochs is not None:
    # Rounded down: two thirds of an epoch are not to end a step behind their
    # second evaluation, which would make it a third.
    stop = min(steps, max(1, int(config.stop_epochs * epoch)))
  callbacks = ()
  if config.patience:
    callbacks = (training.EarlyStopping('val_mse', config.patience),)
  result = runs.fit(
    method,
    config,
    options,
    name=f'{name}-{horizon}-{method}-{seed}',
    steps=steps,
    loss_fn=task.loss,
    params=task.init(seed),
    data=lambda: task.batches(seed),
    rate=_halving(config, epoch),
    optimizer=methods.Adam(),
    callbacks=callbacks,
    stop_at=stop,
    eval_fn=task.evaluate,
    eval_data=task.evaluation,
    eval_every=max(1, round(config.eval_epochs * epoch)),
    track_every=config.track_every,
    seed=seed,
  )
  epochs = _epochs(result, epoch)
  best = best_epoch(epochs)
  return {
    **dict(zip(_KEYS, (name, horizon, method, seed))),
    'mse': best['test_mse'],
    'mae': best['test_mae'],
    'epoch': best['epoch'],
    'trainable % then': best['trainable %'],
    **runs.summary(result),
    'steps': result.select('end')[-1]['step'],
    **{key: config[key] for key in _LENGTH},
    'epochs': epochs,
    **runs.machine(),
  }


def _check_patience(row: Row | None, config: Config):
  """A run goes on with more patience, and has not stopped with less."""
  patience_of = lambda settings: settings['patience'] or math.inf
  if row is not None and patience_of(config) < patience_of(row):
    raise ValueError(
      f'config.patience={config.patience}: the run that is there has '
      f'{row["patience"]}, and can go on with more; pass another --workdir.'
    )


def _length(config: Config, windows: int) -> tuple[int, int]:
  """Steps of an epoch, and of the run."""
  epoch = windows // config.batch_size
  return epoch, config.steps or max(1, round(config.epochs * epoch))


def _halving(config: Config, epoch: int) -> optax.Schedule:
  """The rate is constant for some epochs, then halved, and so on."""
  constant = round(config.constant_epochs * epoch)
  interval = max(1, round(config.halving_epochs * epoch))
  halved = optax.exponential_decay(
    config.learning_rate / 2, interval, decay_rate=0.5, staircase=True
  )
  return optax.join_schedules(
    [optax.constant_schedule(config.learning_rate), halved], [constant]
  )


def _epochs(result: training.Result, epoch: int) -> list[Row]:
  """What every evaluation found, and the share that was trainable then."""
  found, share = {}, 100.0
  for record in result.records:
    if 'trainable' in record:
      share = runs.trainable_percent(record)
    if record['kind'] == 'eval':
      errors = {k: v for k, v in record.items() if k.endswith(('mse', 'mae'))}
      at = round(record['step'] / epoch, 4)
      found[at] = {'epoch': at, 'trainable %': share, **errors}
  return list(found.values())


_COLUMNS = {
  'MSE': ('mse', 4),
  'MAE': ('mae', 4),
  'epoch': ('epoch', 2),
  'trainable % then': ('trainable % then', 1),
  'at the end': ('trainable %', 1),
  'total s': ('total s (no tracking)', 0),
}


def _mean(values: Sequence[float], digits: int) -> str:
  mean = f'{statistics.fmean(values):.{digits}f}'
  if len(values) == 1:
    return mean
  return f'{mean} +- {statistics.stdev(values):.{digits}f}'


BINARY = cli.Binary(
  name='ett_autoformer',
  main=main,
  check=check,
  data='Folder that holds ETTm2.csv and the like, or ETT/ with them; by default '
  '$OIALR_DATA_DIR.',
  checkpoint_every=200,
)

if __name__ == '__main__':
  cli.run(BINARY)
