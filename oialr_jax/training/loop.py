"""`fit`: the training loop, steps on one clock, events on the other."""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from oialr_jax import checkpoint
from oialr_jax import layers as layers_lib
from oialr_jax import optimizer as optimizer_lib
from oialr_jax import schedule as schedule_lib
from oialr_jax import transforms
from oialr_jax import tree
from oialr_jax.training import callbacks as callbacks_lib
from oialr_jax.training import compaction as compaction_lib
from oialr_jax.training import interruptions
from oialr_jax.training import programs
from oialr_jax.training import recorder as recorder_lib
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
  checkpoint_every: int | None = None,
  keep: checkpoint.Keep = checkpoint.Keep(),  # noqa: B008 (frozen)
  resume: bool = False,
  max_seconds: float | None = None,
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
    workdir: for metrics.jsonl, TensorBoard events and checkpoints.
    checkpoint_every: steps between checkpoints; there is one at the end anyway,
      and one when the run is told to stop.
    keep: which checkpoints stay.
    resume: go on from the newest intact checkpoint of workdir, if there is one.
      Data that have `set_state` continue where they were, of others the batches
      of the steps that are done are read again. The same arguments give the
      same run as without the interruption, bit for bit on a CPU if compaction
      is reproducible.
    max_seconds: stop after so many, by the wall clock.
    callbacks: further listeners.

  Returns:
    A `Result`; the parameters in it are compacted.

  Raises:
    ValueError: an argument is out of range, data ends early, the checkpoint is
      of another run (says what differs), no checkpoint is intact.
    FloatingPointError: the loss is not finite (with the step).
    OSError: a checkpoint cannot be written, as on a full disk; those that are
      there are as they were.
    Interrupted: SIGTERM, preemption or max_seconds ended the run, which has
      saved; a `SystemExit`, so that a program ends with it.
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
  if workdir is None and (checkpoint_every or resume):
    raise ValueError('checkpoint_every and resume want a workdir: pass one.')
  stop = stop_at or steps
  recorder = recorder_lib.Recorder()
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
    recorder=recorder,
    tracking=track_every is not None,
  )
  with contextlib.ExitStack() as stack:
    stack.callback(run.close)
    stack.enter_context(recorder)
    saved, start = None, 0
    if workdir is not None:
      workdir = pathlib.Path(workdir)
      saved = checkpoint.Checkpoints(workdir / 'checkpoints', keep)
      stack.enter_context(saved)
      start = _resume(run, recorder, saved, workdir) if resume else 0
      if not start:
        saved.clear()
    if start >= stop:
      return run.result()
    if workdir is not None:
      file = workdir / 'metrics.jsonl'
      recorder.add(callbacks_lib.Jsonl(file, keep=len(recorder.records)))
      recorder.add(callbacks_lib.TensorBoard(workdir / 'tensorboard', start))
    for callback in callbacks:
      recorder.add(callback)
    recorder.start(stop)
    watch = interruptions.Watch(max_seconds)
    stack.enter_context(watch.signals())
    if saved is not None:
      stack.enter_context(_naming(saved))
    for step in range(start, stop):
      event = schedule.event(step) if schedule is not None else None
      if event is not None:
        run.event(event)
      if track_every and step % track_every == 0:
        run.track(step)
      run.step(step)
      done = step + 1
      if done % log_every == 0 or done == stop:
        recorder.log()
      if eval_every and done % eval_every == 0 and done < stop:
        run.evaluate(done)
      reason = watch.reason(done) if done < stop else ''
      due = checkpoint_every and done % checkpoint_every == 0 and done < stop
      if saved is not None and (reason or due):
        _save(run, recorder, saved, done)
      if reason:
        raise interruptions.Interrupted(reason, done)
    if track_every:
      run.track(stop)
    run.finish(stop)
    if saved is not None:
      _save(run, recorder, saved, stop)
    return run.result()


def _save(
  run: run_lib.Run,
  recorder: recorder_lib.Recorder,
  saved: checkpoint.Checkpoints,
  step: int,
):
  arrays, manifest = run.snapshot()
  _check_finite(arrays['state'].params, step)
  evaluations = [r for r in recorder.records if r['kind'] == 'eval']
  with recorder.clock('saving'):
    saved.save(step, arrays, manifest, evaluations[-1] if evaluations else None)


def _check_finite(params: PyTree, step: int):
  """A step may have spoilt the parameters, which the next loss would tell."""
  leaves = tree.flatten(transforms.trainable(params))
  finite = {path: jnp.all(jnp.isfinite(x)) for path, x in leaves.items()}
  for path, ok in jax.device_get(finite).items():
    if not ok:
      raise FloatingPointError(
        f'{path!r} is not finite after step {step}: training diverged. Lower '
        'the learning rate or clip the gradients.'
      )


@contextlib.contextmanager
def _naming(saved: checkpoint.Checkpoints):
  """Tells who diverged which checkpoint to go back to."""
  try:
    yield
  except FloatingPointError as e:
    saved.wait()
    steps = saved.steps()
    last = f'that of step {steps[0]}' if steps else 'none'
    raise FloatingPointError(
      f'{e} The last good checkpoint in {saved.folder} is {last}.'
    ) from e


def _resume(
  run: run_lib.Run,
  recorder: recorder_lib.Recorder,
  saved: checkpoint.Checkpoints,
  workdir: pathlib.Path,
) -> int:
  """Goes on from the newest intact checkpoint; returns its step, 0 for none."""
  found = saved.restore(run.like)
  if found is None:
    return 0
  step, arrays, manifest = found
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  recorder.records += map(json.loads, lines[: manifest['records']])
  run.resume(step, arrays, manifest)
  return step
