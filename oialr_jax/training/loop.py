"""The training loop: steps on one clock, events on the other.

The step is compiled when shapes change, and never else: at the start, at the
transition, at a compaction. Nothing is read from the device while steps run,
except the metrics of steps that are done.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from oialr_jax import checkpoint
from oialr_jax import cost
from oialr_jax import layers as layers_lib
from oialr_jax import lowrank
from oialr_jax import metrics as metrics_lib
from oialr_jax import optimizer as optimizer_lib
from oialr_jax import schedule as schedule_lib
from oialr_jax import transforms
from oialr_jax import tree
from oialr_jax.training import callbacks as callbacks_lib
from oialr_jax.training import steps as steps_lib

PyTree = Any
Record = callbacks_lib.Record
Layers = tuple[layers_lib.Layer, ...]


@dataclasses.dataclass(frozen=True)
class Compaction:
  """When pruned directions are sliced away, which compiles the step anew.

  Attributes:
    min_saving: the share of the low-rank layers' multiply-adds that slicing
      must save, by the cost model; 0 slices at every chance, 1 never.
    multiple_of: ranks are rounded up to a multiple of this.
  """

  min_saving: float = 0.1
  multiple_of: int = 8

  def __post_init__(self):
    if not 0 <= self.min_saving <= 1:
      raise ValueError(f'min_saving={self.min_saving}: must be in [0, 1].')
    if self.multiple_of < 1:
      raise ValueError(f'multiple_of={self.multiple_of}: must be at least 1.')


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run leaves.

  Attributes:
    state: after the last step.
    layers: that the method was used on; empty for a dense run.
    records: the stream of records (see `callbacks`).
    seconds: by what they were spent on: 'training', 'compiling', 'events',
      'evaluating', 'tracking'.
    compilations: of the training step.
    steps_per_second: since the step was last compiled.
  """

  state: steps_lib.TrainState
  layers: Layers
  records: tuple[Record, ...]
  seconds: dict[str, float]
  compilations: int
  steps_per_second: float

  @property
  def params(self) -> PyTree:
    return self.state.params

  def select(self, kind: str) -> list[Record]:
    """The records of one kind."""
    return [r for r in self.records if r['kind'] == kind]


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
  compaction: Compaction = Compaction(),  # noqa: B008 (frozen)
  contraction: str = 'auto',
  workdir: str | pathlib.Path | None = None,
  callbacks: Sequence[callbacks_lib.Callback] = (),
) -> Result:
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
  if workdir is not None:
    callbacks = [
      *callbacks,
      callbacks_lib.Jsonl(pathlib.Path(workdir) / 'metrics.jsonl'),
      callbacks_lib.TensorBoard(pathlib.Path(workdir) / 'tensorboard'),
    ]
  run = _Run(
    loss_fn,
    params,
    model_state if model_state is not None else {},
    iter(data),
    optimizer=optimizer_lib.train_sigma(optimizer),
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
  steps = stop_at or steps
  with contextlib.ExitStack() as stack:
    for callback in callbacks:
      stack.callback(callback.close)
      callback.on_start(steps)
    for step in range(steps):
      event = schedule.event(step) if schedule is not None else None
      if event is not None:
        run.event(event)
      if track_every and step % track_every == 0:
        run.track(step)
      run.step(step)
      if (step + 1) % log_every == 0 or step + 1 == steps:
        run.log()
      if eval_every and (step + 1) % eval_every == 0 and step + 1 < steps:
        run.evaluate(step + 1)
    if track_every:
      run.track(steps)
    result = run.finish(steps)
  if workdir is not None:
    checkpoint.save(pathlib.Path(workdir) / 'checkpoint', result.state)
  return result


class _Run:
  """The host's side of a run: state, clocks, compiled steps, records."""

  def __init__(
    self,
    loss_fn,
    params,
    model_state,
    data: Iterator,
    *,
    optimizer,
    schedule,
    layers,
    eval_fn,
    eval_data,
    compaction,
    contraction,
    seed,
    callbacks,
    tracking,
  ):
    self._data = data
    self._key = jax.random.key(seed)
    self._schedule = schedule
    self._compaction = compaction
    self._callbacks = callbacks
    self._eval_data = eval_data
    self._next = self._fetch()
    if self._next is None:
      raise ValueError('data is empty: pass one batch for every step.')
    step = steps_lib.train_step(loss_fn, optimizer, contraction)
    self._step = jax.jit(step, donate_argnums=0)
    self._eval = eval_fn and jax.jit(steps_lib.eval_step(eval_fn, contraction))
    self._layers: Layers = ()
    if schedule is not None or tracking:
      self._layers = self._choose(loss_fn, params, model_state, layers)
    # Copied, because steps donate their state and params are the caller's.
    self.state = jax.tree.map(
      jnp.array,
      steps_lib.TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params), model_state
      ),
    )
    self._compiled = self._compiled_eval = None
    self._bases, self._tracked = None, None
    self._pending: list[tuple[int, Any]] = []
    self._records: list[Record] = []
    self._clock = _Clock()
    self._compilations = 0
    self._compiled_at = 0, 0.0  # the step, and the training clock

  def _choose(self, loss_fn, params, model_state, layers) -> Layers:
    if layers is None:
      found = layers_lib.find_layers(
        loss_fn, params, model_state, self._next, self._key
      )
      rules = self._schedule
      layers = layers_lib.select(
        found,
        keep_first=rules.keep_first if rules else False,
        keep_last=rules.keep_last if rules else False,
      )
    return tuple(layers)

  def step(self, step: int):
    batch = self._next
    if batch is None:
      raise ValueError(
        f'data ended after {step} batches: pass an iterable of one batch for '
        'every step.'
      )
    if self._compiled is None:
      self._compile(step, batch)
    with self._clock('training'):
      self.state, metrics = self._compiled(self.state, batch, self._key)
      self._pending.append((step + 1, metrics))
      # The next batch is made while the device works on this one.
      self._next = self._fetch()
    for callback in self._callbacks:
      callback.on_step(step + 1)

  def _fetch(self):
    return next(self._data, None)

  def _compile(self, step: int, batch: PyTree):
    with self._clock('compiling'):
      lowered = self._step.lower(self.state, batch, self._key)
      self._compiled = lowered.compile()
    self._compilations += 1
    self._compiled_at = step, self._clock.seconds['training']

  def _rate(self, steps: int) -> float:
    """Steps per second since the step was last compiled."""
    step, seconds = self._compiled_at
    return (steps - step) / (self._clock.seconds['training'] - seconds)

  def _shapes_changed(self):
    self._compiled = self._compiled_eval = None

  def event(self, event: schedule_lib.Event):
    self._settle()
    before = metrics_lib.ranks(self.state.params)
    old = self.state
    with self._clock('events'):
      params, opt_state, report = schedule_lib.apply_event(
        event,
        old.params,
        old.opt_state,
        self._layers,
        self._schedule,
        bases=self._bases,
      )
      jax.block_until_ready(params)
    self._bases = report.bases
    self.state = dataclasses.replace(old, params=params, opt_state=opt_state)
    if report.converted:
      self._shapes_changed()
    numbers = lambda values: {k: float(v) for k, v in values.items()}
    counts = metrics_lib.count(params)
    self._record(
      'event',
      event.step,
      event=event.kind,
      converted=list(report.converted),
      updated=list(report.updated),
      pruned=list(report.pruned),
      ranks_before=before,
      ranks={k: int(v) for k, v in report.ranks.items()},
      spectra={k: np.asarray(v)[0].tolist() for k, v in report.spectra.items()},
      truncation=numbers(report.truncation),
      drift=numbers(report.drift),
      stability=numbers(report.stability),
      **counts._asdict(),
    )
    self._compact(event.step)

  def _compact(self, step: int):
    """Slices what was pruned away, where the policy finds it worth it."""
    rounded = self._compaction.multiple_of
    params = self.state.params
    sizes = transforms.compact_ranks(params, multiple_of=rounded)
    now = self._multiply_adds(params, {})
    saving = 1 - self._multiply_adds(params, sizes) / now if now else 0
    if saving <= 0 or saving < self._compaction.min_saving:
      return
    self._slice(step, rounded)
    self._shapes_changed()

  def _slice(self, step: int, multiple_of: int):
    params = self.state.params
    before = metrics_lib.count(params).stored
    with self._clock('events'):
      small = transforms.compact(params, multiple_of=multiple_of)
      # What `reference` does to moments at a prune, slicing, is exact here.
      opt_state = optimizer_lib.transport(
        self.state.opt_state, params, small, policy=optimizer_lib.REFERENCE
      )
    counts = metrics_lib.count(small)
    if counts.stored == before:
      return
    self.state = dataclasses.replace(
      self.state, params=small, opt_state=opt_state
    )
    self._record('compaction', step, stored_before=before, **counts._asdict())

  def _multiply_adds(self, params, ranks: dict[str, int]) -> int:
    """Of the low-rank layers in a step, at these ranks or those they have."""
    leaves = tree.flatten(params, lowrank.is_low_rank)
    total = 0
    for layer in self._layers:
      if lowrank.is_low_rank(leaves[layer.path]):
        shape = layer.tokens, *layer.matrix
        rank = ranks.get(layer.path, leaves[layer.path].rank)
        way = cost.cheapest(*shape, rank)
        total += layer.stack * cost.low_rank(way, *shape, rank)
    return total

  def track(self, step: int):
    """Measures how far the bases have turned since the last measurement."""
    self._settle()
    with self._clock('tracking'):
      params = self.state.params
      bases = metrics_lib.basis(params, self._layers)
      mixing = metrics_lib.mixing(params, self._layers)
      if self._tracked is not None:
        old_bases, old_mixing = self._tracked
        turned = metrics_lib.stability(old_bases, bases)
        moved = metrics_lib.r_distance(old_mixing, mixing)
        self._record(
          'stability',
          step,
          stability={k: float(v) for k, v in turned.items()},
          r_distance={k: float(v) for k, v in moved.items()},
        )
      self._tracked = bases, mixing

  def log(self, settled: bool = False):
    """Reads the metrics of the steps that are done: all but the last one."""
    done = self._pending if settled else self._pending[:-1]
    self._pending = self._pending[len(done) :]
    with self._clock('training'):
      read = jax.device_get(done)
    if not read:
      return
    for at, metrics in read:
      if not np.isfinite(metrics['loss']):
        raise ValueError(
          f'the loss is {metrics["loss"]} at step {at}: training diverged. '
          'Lower the learning rate or clip the gradients.'
        )
    names = read[0][1]
    means = {k: float(np.mean([m[k] for _, m in read])) for k in names}
    losses = [float(m['loss']) for _, m in read]
    self._record('train', read[-1][0], **means, losses=losses)

  def evaluate(self, step: int):
    if self._eval is None:
      return
    self._settle()
    sums, count = {}, 0
    for batch in self._eval_data():
      args = self.state.params, self.state.model_state, batch
      if self._compiled_eval is None:
        with self._clock('compiling'):
          self._compiled_eval = self._eval.lower(*args).compile()
      with self._clock('evaluating'):
        more, n = jax.device_get(self._compiled_eval(*args))
      sums = {k: sums.get(k, 0) + float(v) for k, v in more.items()}
      count += int(n)
    means = {k: v / count for k, v in sums.items()}
    self._record('eval', step, **means, examples=count)

  def _settle(self):
    """Waits for the steps under way, on the training clock."""
    with self._clock('training'):
      jax.block_until_ready(self.state)

  def finish(self, steps: int) -> Result:
    self._settle()
    self.log(settled=True)
    rate = self._rate(steps)
    if transforms.low_rank_leaves(self.state.params):
      self._slice(steps, 1)
      self._compiled_eval = None
    self.evaluate(steps)
    seconds = dict(self._clock.seconds)
    counts = metrics_lib.count(self.state.params)
    self._record(
      'end',
      steps,
      seconds=seconds,
      compilations=self._compilations,
      steps_per_second=rate,
      optimizer_bytes=sum(
        x.nbytes for x in jax.tree.leaves(self.state.opt_state)
      ),
      **counts._asdict(),
    )
    return Result(
      state=self.state,
      layers=self._layers,
      records=tuple(self._records),
      seconds=seconds,
      compilations=self._compilations,
      steps_per_second=rate,
    )

  def _record(self, kind: str, step: int, **values: Any):
    record = {'kind': kind, 'step': step, **values}
    self._records.append(record)
    for callback in self._callbacks:
      callback.on_record(record)


class _Clock:
  """Seconds by what they were spent on."""

  def __init__(self):
    self.seconds = {
      'training': 0.0,
      'compiling': 0.0,
      'events': 0.0,
      'evaluating': 0.0,
      'tracking': 0.0,
    }

  @contextlib.contextmanager
  def __call__(self, name: str):
    start = time.perf_counter()
    try:
      yield
    finally:
      self.seconds[name] += time.perf_counter() - start
