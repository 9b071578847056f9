"""`fit`: the training loop, steps on one clock, events on the other."""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import pathlib
from typing import Any

import optax

from oialr_jax import checkpoint
from oialr_jax import layers as layers_lib
from oialr_jax import optimizer as optimizer_lib
from oialr_jax import schedule as schedule_lib
from oialr_jax.training import callbacks as callbacks_lib
from oialr_jax.training import compaction as compaction_lib
from oialr_jax.training import programs
from oialr_jax.training import run as run_lib
from oialr_jax.training import steps as steps_lib

PyTree = Any


def fit(
  loss_fn: steps_lib.LossFn,
  params: PyTree,
  data: Iterable[PyTree],
  *,
  optimizer: optax.GradientTransformation,
  steps: int,
  stop_at: int | None = None,
  schedule: schedule_lib.Schedule | None = None,
  layers: Sequence[layers_lib.Layer] | None = None,
  model_state: PyTree | None = None,
  eval_fn: steps_lib.EvalFn | None = None,
  eval_data: Callable[[], Iterable[PyTree]] | None = None,
  eval_every: int | None = None,
  track_every: int | None = None,
  log_every: int = 50,
  seed: int = 0,
  compaction: compaction_lib.Compaction = compaction_lib.Compaction(),  # noqa: B008 (frozen)
  contraction: steps_lib.Contraction = 'auto',
  compilation_cache: bool = True,
  workdir: str | pathlib.Path | None = None,
  callbacks: Sequence[callbacks_lib.Callback] = (),
) -> run_lib.Result:
  """Trains a model, dense or by OIALR.

  Args:
    loss_fn: `(params, model_state, batch, key) -> loss, (model_state, metrics)`
      for dense parameters, as one would write it without this package.
    params: dense parameters to start from.
    data: batches, one a step.
    optimizer: any Optax chain; it is wrapped by `train_sigma`.
    steps: optimiser steps of the whole run.
    stop_at: stop after this many of them, with nothing else changed.
    schedule: of OIALR; None trains dense.
    layers: for the method; by default those that `find_layers` finds in loss_fn
      and `select` chooses by the schedule's keep_first and keep_last.
    model_state: what else the model carries, such as batch statistics.
    eval_fn: `(params, model_state, batch) -> metrics`, one number an example.
    eval_data: returns the batches of an evaluation; 'mask' 0 marks padding.
    eval_every: steps between evaluations; there is one at the end anyway.
    track_every: steps between measurements of every layer's stability, against
      the measurement before.
    log_every: steps between 'train' records.
    seed: of the key, which is folded with the step.
    compaction: when pruned directions are sliced away.
    contraction: see `factored`; 'materialise' multiplies the kernels out.
    compilation_cache: keep compiled programs on disk for later runs, where
      `jax_compilation_cache_dir` is not set already.
    workdir: for metrics.jsonl, TensorBoard events and the last checkpoint.
    callbacks: further listeners.

  Returns:
    A `Result`; the parameters in it are compacted.

  Raises:
    ValueError: an argument is out of range, data ends early, the loss is not
      finite (with the step).
  """
  if steps < 1:
    raise ValueError(f'steps={steps}: must be at least 1.')
  if stop_at is not None and not 1 <= stop_at <= steps:
    raise ValueError(f'stop_at={stop_at}: must be in [1, {steps}].')
  if (eval_fn is None) != (eval_data is None):
    raise ValueError('eval_fn and eval_data go together: pass both or neither.')
  if schedule is not None and schedule.steps != steps:
    raise ValueError(
      f'schedule.steps={schedule.steps} is not steps={steps}: the delay and '
      'the events would be those of another run.'
    )
  if compilation_cache:
    programs.use_compilation_cache()
  if workdir is not None:
    callbacks = [
      *callbacks,
      callbacks_lib.Jsonl(pathlib.Path(workdir) / 'metrics.jsonl'),
      callbacks_lib.TensorBoard(pathlib.Path(workdir) / 'tensorboard'),
    ]
  stop = stop_at or steps
  run = run_lib.Run(
    loss_fn,
    params,
    model_state if model_state is not None else {},
    iter(data),
    optimizer=optimizer_lib.train_sigma(optimizer),
    steps=stop,
    schedule=schedule,
    layers=layers,
    eval_fn=eval_fn,
    eval_data=eval_data,
    compaction=compaction,
    contraction=contraction,
    seed=seed,
    callbacks=callbacks,
    tracking=track_every is not None,
  )
  with contextlib.ExitStack() as stack:
    stack.callback(run.close)
    for callback in callbacks:
      stack.callback(callback.close)
      callback.on_start(stop)
    for step in range(stop):
      event = schedule.event(step) if schedule is not None else None
      if event is not None:
        run.event(event)
      if track_every and step % track_every == 0:
        run.track(step)
      run.step(step)
      if (step + 1) % log_every == 0 or step + 1 == stop:
        run.log()
      if eval_every and (step + 1) % eval_every == 0 and step + 1 < stop:
        run.evaluate(step + 1)
    if track_every:
      run.track(stop)
    result = run.finish(stop)
  if workdir is not None:
    checkpoint.save(pathlib.Path(workdir) / 'checkpoint', result.state)
  return result
