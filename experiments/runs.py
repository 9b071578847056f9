"""One run of a binary: by which method, how far, and what is said of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
import os
from typing import Any

import jax
import optax

from experiments import cli
from experiments import settings
import oialr_jax as oialr
from oialr_jax import training
from oialr_jax.training import rates

Config = settings.Config
Rate = optax.Schedule

# OIALR by the policy of `transport` for the optimiser's state.
_POLICIES = {'oialr': 'transport', 'reset': 'reset', 'reference': 'reference'}
METHODS = ('dense', *_POLICIES)


def arguments(method: str, config: Config, steps: int) -> dict[str, Any]:
  """What makes a method: arguments of `training.fit` beside model and data.

  Args:
    method: one of `METHODS`.
    config: with the sections 'oialr' and 'compaction'.
    steps: of the run.

  Raises:
    ValueError: there is no such method, or a section is not right.
  """
  settings.check_names([method], METHODS, 'method')
  if method == 'dense':
    return {}
  policy = _POLICIES[method]
  build = settings.build
  return dict(
    schedule=build(oialr.Schedule, config, 'oialr', steps=steps, policy=policy),
    compaction=build(training.Compaction, config, 'compaction'),
  )


def check(config: Config, steps: int, methods: Sequence[str]):
  """Raises ValueError if a method cannot be run as configured."""
  for method in methods:
    arguments(method, config, steps)


def fit(
  method: str,
  config: Config,
  options: cli.Options,
  *,
  name: str,
  steps: int,
  loss_fn: training.LossFn,
  params: Any,
  data: Callable[[], Iterable[Any]],
  rate: Rate,
  optimizer: Callable[[Rate], optax.GradientTransformation],
  stopping: 'EarlyStopping | None' = None,
  **more: Any,
) -> training.Result:
  """`training.fit` of a method, in a folder of its own, until it stops.

  Args:
    method: one of `METHODS`.
    config: its settings; if it has them, `accumulate`, `remat` and `rewarmup`.
    options: of the binary.
    name: of the run, and of its folder in the workdir.
    steps: of the run.
    loss_fn: see `training.fit`.
    params: see `training.fit`.
    data: returns the batches, from the first one on.
    rate: the learning rate, without the warm-ups after events.
    optimizer: made with the rate.
    stopping: ends the run before its time.
    **more: see `training.fit`.
  """
  method_arguments = arguments(method, config, steps)
  schedule = method_arguments.get('schedule')
  if schedule is not None and config.get('rewarmup'):
    rate = rates.rewarmed(rate, schedule.events(), steps=config.rewarmup)
  callbacks = () if options.quiet else (training.Progress(name),)

  def until(*listeners: training.Callback, **changes: Any) -> training.Result:
    return training.fit(
      loss_fn,
      params,
      data(),
      optimizer=optimizer(rate),
      steps=steps,
      workdir=options.workdir / name,
      callbacks=(*callbacks, *listeners),
      **(_of_the_step(config) | method_arguments | more | changes),
    )

  if stopping is None:
    return until(**options.fit())
  try:
    return until(stopping, **options.fit())
  except Enough as e:
    # From its last checkpoint to where it is to end, which ends it properly.
    return until(**(options.fit() | dict(resume=True, stop_at=e.step)))


class Enough(Exception):
  """A run is to end after `step` steps."""

  def __init__(self, step: int):
    super().__init__(f'no improvement until step {step}')
    self.step = step


class EarlyStopping(training.Callback):
  """Ends a run when a metric of its evaluations does not get better.

  Args:
    metric: that is to fall.
    patience: evaluations in a row that are worse than the best before them.
  """

  everywhere = True  # all processes stop at the same step

  def __init__(self, metric: str, patience: int):
    self._metric = metric
    self._patience = patience

  def on_start(self, start: training.Start):
    self._steps = start.steps
    self._best, self._worse = float('inf'), 0
    for record in start.records:
      if record['kind'] == 'eval':
        self.on_evaluation(record)

  def on_evaluation(self, record: dict[str, Any]):
    value = record[self._metric]
    self._worse = self._worse + 1 if value > self._best else 0
    self._best = min(value, self._best)
    if self._worse >= self._patience and record['step'] < self._steps:
      raise Enough(record['step'])


def summary(result: training.Result) -> dict[str, Any]:
  """What is said of a run whatever its task: sizes and seconds."""
  end = result.select('end')[-1]
  seconds = end['seconds']
  return {
    'trainable %': 100 * end['trainable'] / end['dense'],
    'stored %': 100 * end['stored'] / end['dense'],
    'optimiser state kB': end['optimizer_bytes'] / 1000,
    'steps/s at the end': end['steps_per_second'],
    'training s': seconds['training'],
    'compiling s': seconds['compiling'],
    'SVDs s': seconds['events'],
    'total s (no tracking)': sum(seconds.values()) - seconds['tracking'],
  }


def trainable_percent(
  event: Mapping[str, Any], layers: Iterable[oialr.Layer]
) -> float:
  """What trains after an event, by its ranks: sliced or not.

  Args:
    event: a record of that kind.
    layers: of the run.
  """
  frozen = 0
  for layer in layers:
    if layer.path in event['ranks']:
      sigma = layer.stack * event['ranks'][layer.path] ** 2
      frozen += math.prod(layer.shape) - sigma
  return 100 * (1 - frozen / event['dense'])


def machine() -> dict[str, Any]:
  """Where a result is from."""
  return {
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'cores': os.cpu_count(),
    'jax': jax.__version__,
  }


def _of_the_step(config: Config) -> dict[str, Any]:
  return {k: config[k] for k in ('accumulate', 'remat') if k in config}
