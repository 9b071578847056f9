"""The host's side of a run: state, clocks, programs, records.

The step is compiled when shapes change, and never else: at the start, at the
transition, at a compaction; where that can be foreseen, while the training goes
on. Nothing is read from the device while steps run, except the metrics of steps
that are done.
"""

from collections.abc import Hashable, Iterator
import contextlib
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oialr_jax import layers as layers_lib
from oialr_jax import metrics as metrics_lib
from oialr_jax import optimizer as optimizer_lib
from oialr_jax import schedule as schedule_lib
from oialr_jax import transforms
from oialr_jax.training import callbacks as callbacks_lib
from oialr_jax.training import compaction as compaction_lib
from oialr_jax.training import programs as programs_lib
from oialr_jax.training import steps as steps_lib

PyTree = Any
Record = callbacks_lib.Record
Layers = tuple[layers_lib.Layer, ...]


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run leaves.

  Attributes:
    state: after the last step.
    layers: that the method was used on; empty for a dense run.
    records: the stream of records (see `callbacks`).
    seconds: by what the run waited for: 'training', 'compiling' (what was
      compiled beside the training is not in it), 'events', 'evaluating',
      'tracking' and 'other'; together, those of the wall clock.
    compilations: of the training step that were used.
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


@dataclasses.dataclass(frozen=True)
class _Switch:
  """Smaller shapes that programs are being compiled for.

  Attributes:
    decided: the step at which.
    ranks: of the low-rank leaves then.
    programs: of the slicing and of the step, keys and how to lower them.
  """

  decided: int
  ranks: dict[str, int]
  programs: tuple[tuple[Hashable, programs_lib.Lower], ...]


class Run:
  """What `fit` is made of; see there for the arguments."""

  def __init__(
    self,
    loss_fn,
    params,
    model_state,
    data: Iterator,
    *,
    optimizer,
    steps,
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
    self._clock = _Clock()
    self._data = data
    self._key = jax.random.key(seed)
    self._steps = steps
    self._schedule = schedule
    self._compaction = compaction
    self._callbacks = callbacks
    self._eval_data = eval_data
    self._next = self._fetch()
    if self._next is None:
      raise ValueError('data is empty: pass one batch for every step.')
    self._batch = _shapes(self._next)
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
    self._programs = programs_lib.Programs(compaction.background)
    self._program: programs_lib.Program | None = None  # the step's
    self._switch: _Switch | None = None
    self._bases, self._tracked = None, None
    self._ranks: dict[str, int] = {}  # after the last event
    self._pending: list[tuple[int, Any]] = []
    self._records: list[Record] = []
    self._compilations = 0
    self._since = 0, 0.0  # of this program: the step, and the training clock
    self._pace = 0.0  # seconds a step, of the program before

  def close(self):
    """Ends what is still being compiled."""
    self._programs.close()

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
    if self._ready_to_switch():
      self._take_switch(step)
    fresh = self._program is None
    if fresh:
      self._use(step, self._step_program(self.state))
    with self._clock('training'):
      self.state, metrics = self._program(self.state, batch, self._key)
      self._pending.append((step + 1, metrics))
      # The next batch is made while the device works on this one.
      self._next = self._fetch()
    if fresh:
      self._foresee(step)
    for callback in self._callbacks:
      callback.on_step(step + 1)

  def _fetch(self):
    return next(self._data, None)

  # Programs.

  def _step_program(self, state) -> programs_lib.Program:
    with self._clock('compiling'):
      return self._programs.get(*self._to_step(state))

  def _to_step(self, state) -> tuple[Hashable, programs_lib.Lower]:
    """The key of the step's program for this state, and how it is lowered."""
    lower = lambda: self._step.lower(state, self._batch, self._key)
    return ('step', programs_lib.shapes(state)), lower

  def _use(self, step: int, program: programs_lib.Program):
    self._pace = self._step_seconds(step)
    self._program = program
    self._compilations += 1
    self._since = step, self._clock.seconds['training']

  def _step_seconds(self, steps: int) -> float:
    """Of a step with this program, or the one before where it has not run."""
    step, seconds = self._since
    if steps == step:
      return self._pace
    return (self._clock.seconds['training'] - seconds) / (steps - step)

  def _foresee(self, step: int):
    """Starts compiling what the next event and the step after it need."""
    if self._schedule is None or not self._compaction.background:
      return
    state = self.state
    within = lambda event: step < event.step < self._steps
    event = next(filter(within, self._schedule.events()), None)
    plan = event and schedule_lib.foresee(
      event, state.params, self._layers, self._schedule
    )
    if not plan:
      return
    key, lower = self._to_event(plan, state)
    if self._programs.known(key):
      return
    with self._clock('compiling'):
      lowered = lower()
      self._programs.prepare(key, lambda: lowered)
      if plan.converting:
        params, opt_state, *_ = _shapes(lowered.out_info)
        converted = dataclasses.replace(
          _shapes(state), params=params, opt_state=opt_state
        )
        self._programs.prepare(*self._to_step(converted))

  def _to_event(self, plan, state) -> tuple[Hashable, programs_lib.Lower]:
    parts = state.params, state.opt_state
    key = 'event', plan, programs_lib.shapes(parts)
    return key, functools.partial(plan.lower, *_shapes(parts))

  # Events.

  def event(self, event: schedule_lib.Event):
    self._settle()
    if self._switch and self._compaction.reproducible:
      self._take_switch(event.step)
    before, old = self._ranks, self.state
    plan = schedule_lib.foresee(event, old.params, self._layers, self._schedule)
    with self._clock('compiling'):
      program = plan and self._programs.get(*self._to_event(plan, old))
    with self._clock('events'):
      params, opt_state, report = schedule_lib.apply_event(
        event,
        old.params,
        old.opt_state,
        self._layers,
        self._schedule,
        bases=self._bases,
        program=program,
      )
      jax.block_until_ready(params)
    self._bases = report.bases
    self._ranks = {k: int(v) for k, v in report.ranks.items()}
    self.state = dataclasses.replace(old, params=params, opt_state=opt_state)
    if report.converted:
      self._program = self._switch = None
    self._record_event(report, before)
    self._compact(event.step)
    if self._program is not None:
      self._foresee(event.step)

  def _record_event(self, report: schedule_lib.Report, before: dict[str, int]):
    numbers = lambda values: {k: float(v) for k, v in values.items()}
    self._record(
      'event',
      report.event.step,
      event=report.event.kind,
      converted=list(report.converted),
      updated=list(report.updated),
      pruned=list(report.pruned),
      ranks_before=before,
      ranks=self._ranks,
      spectra={k: np.asarray(v)[0].tolist() for k, v in report.spectra.items()},
      truncation=numbers(report.truncation),
      drift=numbers(report.drift),
      stability=numbers(report.stability),
      **metrics_lib.count(self.state.params)._asdict(),
    )

  # Compaction.

  def _compact(self, step: int):
    """Has what was pruned sliced away, where the policy finds it worth it."""
    if self._switch is not None:
      return
    params, policy = self.state.params, self._compaction
    ranks = transforms.rounded_up(params, self._ranks, policy.multiple_of)
    work = lambda r: compaction_lib.multiply_adds(params, self._layers, r)
    program = self._program
    pays = policy.pays(
      work({}),
      work(ranks),
      steps=self._steps - step,
      # Without a program, one has to be compiled anyway.
      step_seconds=self._step_seconds(step) if program else 1.0,
      step_flops=program and program.flops,
      compile_seconds=program.seconds if program else 0.0,
    )
    if not pays:
      return
    if program is None:
      self._slice(step, ranks)
      return
    with self._clock('compiling'):
      small = jax.eval_shape(functools.partial(_sliced, ranks), self.state)
      needs = self._to_slice(ranks), self._to_step(small)
      self._switch = _Switch(step, ranks, needs)
      for key, lower in needs:
        self._programs.prepare(key, lower)
    if not policy.background:
      self._take_switch(step)

  def _to_slice(self, ranks) -> tuple[Hashable, programs_lib.Lower]:
    key = 'slice', tuple(ranks.items()), programs_lib.shapes(self.state)
    slice_ = jax.jit(functools.partial(_sliced, ranks))
    return key, functools.partial(slice_.lower, _shapes(self.state))

  def _ready_to_switch(self) -> bool:
    if self._switch is None or self._compaction.reproducible:
      return False
    return self._programs.ready(*(key for key, _ in self._switch.programs))

  def _take_switch(self, step: int):
    switch, self._switch = self._switch, None
    with self._clock('compiling'):
      _, program = (self._programs.get(*need) for need in switch.programs)
    self._slice(step, switch.ranks, decided=switch.decided)
    self._use(step, program)
    self._foresee(step)

  def _slice(self, step: int, ranks: dict[str, int], **details: Any):
    nodes = transforms.low_rank_leaves(self.state.params)
    if all(node.rank == ranks[path] for path, node in nodes.items()):
      return
    self._settle()
    before = metrics_lib.count(self.state.params).stored
    with self._clock('compiling'):
      program = self._programs.get(*self._to_slice(ranks))
    with self._clock('events'):
      self.state = program(self.state)
    counts = metrics_lib.count(self.state.params)
    self._record(
      'compaction', step, stored_before=before, **details, **counts._asdict()
    )

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
      with self._clock('compiling'):
        program = self._programs.get(
          ('eval', programs_lib.shapes(args)),
          functools.partial(self._eval.lower, *args),
        )
      with self._clock('evaluating'):
        more, n = jax.device_get(program(*args))
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
    rate = 1 / self._step_seconds(steps)
    # The function is that of the sliced kernels, for which nothing is compiled.
    self.evaluate(steps)
    self._slice(steps, self._ranks)
    seconds = self._clock.total()
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


def _sliced(
  ranks: dict[str, int], state: steps_lib.TrainState
) -> steps_lib.TrainState:
  """The state with buffers of these ranks."""
  nodes = transforms.low_rank_leaves(state.params)
  params = transforms.replaced(
    state.params,
    {p: transforms.sliced(x, ranks[p]) for p, x in nodes.items() if p in ranks},
  )
  # What `reference` does to moments at a prune, slicing, is exact here.
  opt_state = optimizer_lib.transport(
    state.opt_state, state.params, params, policy=optimizer_lib.REFERENCE
  )
  return dataclasses.replace(state, params=params, opt_state=opt_state)


def _shapes(tree: PyTree) -> PyTree:
  """Shapes and dtypes, as JAX sees the leaves: without values."""
  return jax.eval_shape(lambda x: x, tree)


class _Clock:
  """Seconds by what they were spent on."""

  def __init__(self):
    self._start = time.perf_counter()
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

  def total(self) -> dict[str, float]:
    """Also 'other': what is left of the wall clock."""
    wall = time.perf_counter() - self._start
    return {**self.seconds, 'other': wall - sum(self.seconds.values())}
