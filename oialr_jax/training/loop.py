"""`fit`: the training loop, steps on one clock, events on the other."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import json
import pathlib
import re
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import optax

from oialr_jax import checkpoint
from oialr_jax import layers as layers_lib
from oialr_jax import optimizer as optimizer_lib
from oialr_jax import schedule as schedule_lib
from oialr_jax import sharding
from oialr_jax import transforms
from oialr_jax import tree
from oialr_jax.training import callbacks as callbacks_lib
from oialr_jax.training import compaction as compaction_lib
from oialr_jax.training import conversion as conversion_lib
from oialr_jax.training import interruptions
from oialr_jax.training import programs
from oialr_jax.training import recorder as recorder_lib
from oialr_jax.training import run as run_lib
from oialr_jax.training import steps as steps_lib
from oialr_jax.training import writers

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
  conversion: conversion_lib.Conversion | None = None,
  layers: Sequence[layers_lib.Layer] | None = None,
  model_state: PyTree | None = None,
  eval_fn: steps_lib.EvalFn | None = None,
  eval_data: Callable[[], Iterable[PyTree]] | None = None,
  eval_every: int | None = None,
  eval_params: steps_lib.EvalParams | None = None,
  track_every: int | None = None,
  track_more: run_lib.TrackFn | None = None,
  log_every: int = 50,
  seed: int = 0,
  compaction: compaction_lib.Compaction = compaction_lib.Compaction(),  # noqa: B008 (frozen)
  contraction: steps_lib.Contraction = 'auto',
  placement: sharding.Placement | None = None,
  accumulate: int = 1,
  remat: bool | Callable[..., Any] = False,
  probe: bool = False,
  compilation_cache: bool = True,
  workdir: str | pathlib.Path | None = None,
  checkpoint_every: int | None = None,
  keep: checkpoint.Keep = checkpoint.Keep(),  # noqa: B008 (frozen)
  resume: bool = False,
  max_seconds: float | None = None,
  rollbacks: int = 0,
  callbacks: Sequence[callbacks_lib.Callback] = (),
) -> run_lib.Result:
  """Trains a model, dense or by OIALR.

  Args:
    loss_fn: `(params, model_state, batch, key) -> loss, (model_state, metrics)`
      for dense parameters, as one would write it without this package.
    params: parameters to start from; dense, as a rule. Low-rank ones stay so,
      and updates take them in.
    data: batches, one a step.
    optimizer: any Optax chain; it is wrapped by `train_sigma`. What asks for
      `value`, such as `optax.contrib.reduce_on_plateau`, gets the loss.
    steps: optimiser steps of the whole run.
    stop_at: end after this many of them, as after the last one, with nothing
      else changed; the run may go on from there.
    schedule: of OIALR; None trains dense.
    conversion: what another method does once; in the place of a schedule.
    layers: for the method; by default those that `find_layers` finds in loss_fn
      and `select` chooses by keep_first and keep_last, of the schedule or the
      conversion.
    model_state: what else the model carries, such as batch statistics.
    eval_fn: `(params, model_state, batch) -> metrics`, one number an example.
    eval_data: returns the batches of an evaluation; 'mask' 0 marks padding.
    eval_every: steps between evaluations; there is one at the end anyway.
    eval_params: `(opt_state, trainable(params)) -> the same tree`, what is
      evaluated in the place of what trains, where an optimiser has such, as by
      `optax.contrib.schedule_free_eval_params`; the result has what trains.
    track_every: steps between measurements of every layer's stability, against
      the measurement before, which is in the checkpoints, too.
    track_more: `(old_params, params, layers) -> {name: {path: number}}`: what
      is to be measured besides, for the same records.
    log_every: steps between 'train' records.
    seed: of the key, which is folded with the step.
    compaction: when pruned directions are sliced away.
    contraction: see `factored`; 'materialise' multiplies the kernels out.
    placement: on which devices what is; by default every device of every
      process has all parameters, and its share of every batch.
    accumulate: parts that a batch is cut into, see `train_step`.
    remat: what is computed again in the backward pass, see `train_step`.
    probe: measure how much every event changes the loss of the next batch.
    compilation_cache: keep compiled programs on disk for later runs, where
      `jax_compilation_cache_dir` is not set already.
    workdir: folder for metrics.jsonl, TensorBoard events and checkpoints. What
      it holds of another run is deleted, unless `resume` is given.
    checkpoint_every: steps between checkpoints; there is one at the end anyway,
      and one when the run is told to stop.
    keep: which checkpoints stay.
    resume: go on from the newest intact checkpoint of workdir, if there is one,
      with the same devices or others. As long as a run is dense and tracks no
      layers, it may go on by another schedule or conversion: a copy of its
      workdir shares its steps.
      Data that have `set_state` continue where they were, of others the batches
      of the steps that are done are read again. The same arguments give the
      same run as without the interruption, bit for bit on a CPU if compaction
      is reproducible. Records that metrics.jsonl has lost stay lost, with a
      warning.
    max_seconds: stop after so many, by the wall clock.
    rollbacks: how often, when the loss is not finite, to go back to the last
      checkpoint and on with the batches behind those that led there.
    callbacks: further listeners, see `Callback`.

  Returns:
    A `Result`; the parameters in it are compacted.

  Raises:
    ValueError: an argument is out of range, data ends early, the checkpoint is
      of another run (says what differs) or of a later step, no checkpoint is
      intact, an evaluation has no example, a metric is called like something
      else in the records. Where an evaluation fails, the run has saved.
    TypeError: the state of data cannot be saved; a callback is none.
    FloatingPointError: the loss is not finite (with the step), and there is no
      rollback left.
    OSError: a checkpoint cannot be written, as on a full disk; those that are
      there are as they were.
    Interrupted: SIGTERM, Ctrl-C, preemption or max_seconds ended the run, which
      has saved; a `SystemExit`, so that a program ends with it. An evaluation
      that a signal ended is done anew when the run goes on.
  """
  if steps < 1:
    raise ValueError(f'steps={steps}: must be at least 1.')
  if stop_at is not None and not 1 <= stop_at <= steps:
    raise ValueError(f'stop_at={stop_at}: must be in [1, {steps}].')
  if (eval_fn is None) != (eval_data is None):
    raise ValueError('eval_fn and eval_data go together: pass both or neither.')
  if eval_data is not None and not callable(eval_data):
    raise ValueError(
      f'eval_data={type(eval_data).__name__}: must be a function that returns '
      'the batches of an evaluation, such as lambda: batches.'
    )
  if workdir is not None and re.match(r'\w+:/', str(workdir)):
    raise ValueError(
      f'workdir={str(workdir)!r}: must be a folder; mount the bucket, such as '
      'by gcsfuse, and pass where it is.'
    )
  if schedule is not None and schedule.steps != steps:
    raise ValueError(
      f'schedule.steps={schedule.steps} is not steps={steps}: the delay and '
      'the events would be those of another run.'
    )
  if conversion is not None and schedule is not None:
    raise ValueError(
      'schedule and conversion: a run is of one method; pass one of the two.'
    )
  if conversion is not None and conversion.step >= steps:
    raise ValueError(
      f'conversion.step={conversion.step}: must be less than steps={steps}.'
    )
  if rollbacks and not checkpoint_every:
    raise ValueError(
      f'rollbacks={rollbacks}: there is nothing to go back to; pass '
      'checkpoint_every.'
    )
  if track_more is not None and track_every is None:
    raise ValueError('track_more wants to know how often: pass track_every.')
  if workdir is None and (checkpoint_every or resume):
    raise ValueError('checkpoint_every and resume want a workdir: pass one.')
  if compilation_cache:
    programs.use_compilation_cache()
  if placement is None:
    placement = sharding.Placement(sharding.make_mesh())
  if jax.process_count() > 1:
    # Processes take the same decisions, but do not measure the same seconds.
    compaction = dataclasses.replace(compaction, reproducible=True)
  if schedule is not None:
    _warn_if_short(schedule)
  stop = stop_at or steps
  recorder = recorder_lib.Recorder()
  run = run_lib.Run(
    loss_fn,
    params,
    model_state if model_state is not None else {},
    iter(data),
    optimizer=optimizer_lib.train_sigma(
      optimizer, sigma_scale=schedule and schedule.sigma_scale
    ),
    steps=stop,
    schedule=schedule,
    conversion=conversion,
    layers=layers,
    eval_fn=eval_fn,
    eval_data=eval_data,
    eval_params=eval_params,
    compaction=compaction,
    contraction=contraction,
    seed=seed,
    recorder=recorder,
    tracking=track_every is not None,
    track_more=track_more,
    placement=placement,
    accumulate=accumulate,
    remat=remat,
    probe=probe,
  )
  with contextlib.ExitStack() as stack:
    stack.callback(run.close)
    stack.enter_context(recorder)
    saved, start = None, 0
    if workdir is not None:
      workdir = pathlib.Path(workdir)
      run.position()  # what cannot be saved is refused before the first step
      saved = stack.enter_context(
        checkpoint.Checkpoints(workdir / 'checkpoints', keep)
      )
      start = _resume(run, recorder, saved, workdir) if resume else 0
      if not start:
        saved.clear()
    if start > stop:
      raise ValueError(
        f'{"steps" if stop_at is None else "stop_at"}={stop}: the checkpoint '
        f'in {saved.folder} is of step {start}.'
      )
    if start == stop and recorder.ended:
      return run.result()
    if workdir is not None:
      recorder.add(writers.Jsonl(workdir / 'metrics.jsonl'))
      recorder.add(writers.TensorBoard(workdir / 'tensorboard'))
    for callback in callbacks:
      recorder.add(callback)
    watch = interruptions.Watch(max_seconds)
    stack.enter_context(watch.signals())
    _Loop(
      run=run,
      recorder=recorder,
      saved=saved,
      watch=watch,
      schedule=schedule,
      conversion=conversion,
      stop=stop,
      track_every=track_every,
      log_every=log_every,
      eval_every=eval_every if eval_fn else None,
      checkpoint_every=checkpoint_every,
    ).train(start, rollbacks)
    return run.result()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loop:
  """The steps of a run and what comes between them; see `fit`."""

  run: run_lib.Run
  recorder: recorder_lib.Recorder
  saved: checkpoint.Checkpoints | None
  watch: interruptions.Watch
  schedule: schedule_lib.Schedule | None
  conversion: conversion_lib.Conversion | None
  stop: int
  track_every: int | None
  log_every: int
  eval_every: int | None
  checkpoint_every: int | None

  def train(self, start: int, rollbacks: int):
    self._announce(start)
    while True:
      try:
        return self._train(start)
      except FloatingPointError as e:
        if self.saved is None:
          raise
        self.saved.wait()
        if not rollbacks or not self.saved.steps():
          raise self._naming(e) from e
        start, rollbacks = self._go_back(e), rollbacks - 1

  def _train(self, start: int):
    done = start
    if self._was_evaluating(start):
      self._evaluate(start)
      self._save(start)
    while not self._is_last(done):
      with self._diverging(done):
        event = self.schedule.event(done) if self.schedule else None
        if event is not None:
          self.run.event(event)
        if self.conversion is not None and done == self.conversion.step:
          _check_finite(self.run.state.params, done)
          self.run.convert(done)
        if self.track_every and done % self.track_every == 0:
          self.run.track(done)
        self.run.step(done)
      done += 1
      self._after(done)
    if done == start and self.recorder.ended:
      return  # it stopped there before
    if self.track_every:
      self.run.track(done)
    self.recorder.log(settled=True)
    # The function is that of the sliced kernels, for which nothing is compiled.
    if not self.recorder.at('eval', done):
      self._evaluate(done)
    self.run.finish(done)
    self._save(done)
    self._tell()

  @contextlib.contextmanager
  def _diverging(self, done: int) -> Iterator[None]:
    """Of an error, says where training diverged, if it is because of that.

    Such as at an event, whose SVDs are the first to read what is not finite.
    """
    try:
      yield
    except ValueError:
      self.recorder.log(settled=True)
      if jax.process_count() == 1:  # else the others may be elsewhere
        _check_finite(self.run.state.params, done)
      raise

  def _is_last(self, done: int) -> bool:
    """Whether to end here; after a step at least, a callback may say so."""
    return done == self.stop or bool(done and self.recorder.stopped)

  def _after(self, done: int):
    """Logs, evaluates and saves, where it is time for it."""
    if done == self.stop or self._is_due(self.log_every, done):
      self.recorder.log()
    if self._is_due(self.eval_every, done):
      self._evaluate(done)
    if self._is_last(done):
      return
    if reason := self.watch.reason(done):
      self._interrupt(done, reason)
    if self._is_due(self.checkpoint_every, done):
      self._save(done)

  def _is_due(self, every: int | None, done: int) -> bool:
    return bool(every) and done % every == 0 and done < self.stop

  def _was_evaluating(self, start: int) -> bool:
    """Whether the run was stopped in an evaluation."""
    due = self._is_due(self.eval_every, start)
    return bool(start) and due and not self.recorder.at('eval', start)

  def _evaluate(self, done: int):
    try:
      whole = self.run.evaluate(done, self.watch.is_told)
    except Exception:
      # It costs no step: that an eval_fn is wrong may be seen at the end alone.
      if jax.process_count() == 1:  # else the others may be elsewhere
        self._save(done)
      raise
    if not whole:
      self._interrupt(done, self.watch.reason(done))

  def _interrupt(self, done: int, reason: str):
    """Saves and stops."""
    self._save(done)
    self._tell()
    stopped = interruptions.Interrupted(reason, done)
    goes_on = 'it goes on from there with resume=True, of a binary --resume'
    logging.warning('%s; %s', stopped, goes_on if self.saved else 'not saved')
    raise stopped

  def _save(self, step: int):
    if self.saved is None:
      return
    arrays, manifest = self.run.snapshot()
    _check_finite(arrays['state'].params, step)
    # Of another step, they would say of these parameters what is not so.
    metrics = self.recorder.at('eval', step)
    with self.recorder.clock('saving'):
      self.saved.save(step, arrays, manifest, metrics)
    self.recorder.checkpoints(self.saved.folder, self.saved.steps())

  def _tell(self):
    """Tells who listens of the last checkpoint, too."""
    if self.saved is not None:
      self.saved.wait()
      self.recorder.checkpoints(self.saved.folder, self.saved.steps())

  def _announce(self, step: int):
    self.recorder.start(steps=self.stop, first=step, examples=self.run.examples)

  def _go_back(self, error: FloatingPointError) -> int:
    """To the last checkpoint, leaving out the batches since; its step."""
    step, arrays, manifest = self.saved.restore(self.run.like)
    logging.warning('going back to step %s: %s', step, error)
    self.recorder.rewind(manifest['records'])
    self.run.go_back(step, arrays, manifest)
    self._announce(step)
    self.recorder.record('rollback', step, reason=str(error))
    return step

  def _naming(self, error: FloatingPointError) -> FloatingPointError:
    """Tells who diverged which checkpoint to go back to."""
    steps = self.saved.steps()
    last = f'that of step {steps[0]}' if steps else 'none'
    return FloatingPointError(
      f'{error} The last good checkpoint in {self.saved.folder} is {last}.'
    )


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


def _warn_if_short(schedule: schedule_lib.Schedule):
  """Says so, where the method has hardly a place in the run."""
  delay, count = schedule.delay_steps, len(schedule.events())
  if not count:  # a share of the run may round to all of it
    logging.warning(
      'the transition, at step %s, never comes: the run stays dense', delay
    )
  elif count == 1:
    logging.warning(
      'the run ends before the first update, at step %s: nothing is pruned',
      delay + schedule.every,
    )


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
  recorder.records += _records(workdir / 'metrics.jsonl', manifest['records'])
  run.resume(step, arrays, manifest)
  return step


def _records(file: pathlib.Path, count: int) -> list[recorder_lib.Record]:
  """The first records of a file, without what was lost of it."""
  try:
    lines = file.read_bytes().splitlines()[:count]
  except FileNotFoundError:
    logging.warning('%s is missing: its records are lost', file)
    return []
  found = []
  for i, line in enumerate(lines, 1):
    try:
      found.append(json.loads(line))
    except ValueError:
      logging.warning('%s: line %s is damaged', file, i)
  return found
