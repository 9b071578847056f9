"""The host's side of a run: state, clocks, programs, records.

The step is compiled when shapes change, and never else: at the start, at the
transition, at a compaction; where that can be foreseen, while the training goes
on. Nothing is read from the device while steps run, except the metrics of steps
that are done.
"""

from collections.abc import Hashable, Iterator
import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oialr_jax import checkpoint
from oialr_jax import layers as layers_lib
from oialr_jax import metrics as metrics_lib
from oialr_jax import optimizer as optimizer_lib
from oialr_jax import schedule as schedule_lib
from oialr_jax import transforms
from oialr_jax import tree
from oialr_jax.training import compaction as compaction_lib
from oialr_jax.training import programs as programs_lib
from oialr_jax.training import recorder as recorder_lib
from oialr_jax.training import steps as steps_lib

PyTree = Any
Record = recorder_lib.Record
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
    recorder,
    tracking,
  ):
    self._recorder = recorder
    self._data = data
    self._position = None  # of the data, before the batch that is next
    self._key = jax.random.key(seed)
    self._steps = steps
    self._schedule = schedule
    self._compaction = compaction
    self._eval_data = eval_data
    self._next = self._fetch()
    if self._next is None:
      raise ValueError('data is empty: pass one batch for every step.')
    self._batch = _shapes(self._next)
    step = steps_lib.train_step(loss_fn, optimizer, contraction)
    self._step = jax.jit(step, donate_argnums=0)
    self._eval = eval_fn and jax.jit(steps_lib.eval_step(eval_fn, contraction))
    self._optimizer = optimizer
    self._seed = seed
    self._dense = _shapes(params)
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
    self._compilations = 0
    self._since = 0, 0.0  # of this program: the step, and the training clock
    # Of the program before: seconds a step, and seconds to compile it.
    self._pace, self._compile_seconds = 0.0, 0.0

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
    with self._recorder.clock('training'):
      self.state, metrics = self._program(self.state, batch, self._key)
      # The next batch is made while the device works on this one.
      self._next = self._fetch()
    if fresh:
      self._foresee(step)
    self._recorder.step(step + 1, metrics)

  def _fetch(self):
    if hasattr(self._data, 'get_state'):
      self._position = self._data.get_state()
    return next(self._data, None)

  # Programs.

  def _step_program(self, state) -> programs_lib.Program:
    with self._recorder.clock('compiling'):
      return self._programs.get(*self._to_step(state))

  def _to_step(self, state) -> tuple[Hashable, programs_lib.Lower]:
    """The key of the step's program for this state, and how it is lowered."""
    lower = lambda: self._step.lower(state, self._batch, self._key)
    return ('step', programs_lib.shapes(state)), lower

  def _use(self, step: int, program: programs_lib.Program):
    self._pace = self._step_seconds(step)
    self._compile_seconds = program.seconds
    self._program = program
    self._compilations += 1
    self._since = step, self._recorder.clock.seconds['training']

  def _step_seconds(self, steps: int) -> float:
    """Of a step with this program, or the one before where it has not run."""
    step, seconds = self._since
    if steps == step:
      return self._pace
    return (self._recorder.clock.seconds['training'] - seconds) / (steps - step)

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
    with self._recorder.clock('compiling'):
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
    with self._recorder.clock('compiling'):
      program = plan and self._programs.get(*self._to_event(plan, old))
    with self._recorder.clock('events'):
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
    self._compact(event.step, anew=bool(report.converted))
    if self._program is not None:
      self._foresee(event.step)

  def _record_event(self, report: schedule_lib.Report, before: dict[str, int]):
    numbers = lambda values: {k: float(v) for k, v in values.items()}
    self._recorder.record(
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

  def _compact(self, step: int, anew: bool):
    """Has what was pruned sliced away, where the policy finds it worth it.

    With `anew`, the step has to be compiled anyway.
    """
    if self._switch is not None:
      return
    params, policy = self.state.params, self._compaction
    ranks = transforms.rounded_up(params, self._ranks, policy.multiple_of)
    work = lambda r: compaction_lib.multiply_adds(params, self._layers, r)
    pays = policy.pays(
      work({}),
      work(ranks),
      steps=self._steps - step,
      step_seconds=1.0 if anew else self._step_seconds(step),
      step_flops=self._program and self._program.flops,
      compile_seconds=0.0 if anew else self._compile_seconds,
    )
    if not pays:
      return
    if anew:
      self._slice(step, ranks)
      return
    self._prepare_switch(step, ranks)
    if not policy.background:
      self._take_switch(step)

  def _prepare_switch(self, step: int, ranks: dict[str, int]):
    with self._recorder.clock('compiling'):
      small = jax.eval_shape(functools.partial(_sliced, ranks), self.state)
      needs = self._to_slice(ranks), self._to_step(small)
      self._switch = _Switch(step, ranks, needs)
      for key, lower in needs:
        self._programs.prepare(key, lower)

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
    with self._recorder.clock('compiling'):
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
    with self._recorder.clock('compiling'):
      program = self._programs.get(*self._to_slice(ranks))
    with self._recorder.clock('events'):
      self.state = program(self.state)
    counts = metrics_lib.count(self.state.params)
    self._recorder.record(
      'compaction', step, stored_before=before, **details, **counts._asdict()
    )

  def track(self, step: int):
    """Measures how far the bases have turned since the last measurement."""
    self._settle()
    with self._recorder.clock('tracking'):
      params = self.state.params
      bases = metrics_lib.basis(params, self._layers)
      mixing = metrics_lib.mixing(params, self._layers)
      if self._tracked is not None:
        old_bases, old_mixing = self._tracked
        turned = metrics_lib.stability(old_bases, bases)
        moved = metrics_lib.r_distance(old_mixing, mixing)
        self._recorder.record(
          'stability',
          step,
          stability={k: float(v) for k, v in turned.items()},
          r_distance={k: float(v) for k, v in moved.items()},
        )
      self._tracked = bases, mixing

  def evaluate(self, step: int):
    if self._eval is None:
      return
    self._settle()
    sums, count = {}, 0
    for batch in self._eval_data():
      args = self.state.params, self.state.model_state, batch
      with self._recorder.clock('compiling'):
        program = self._programs.get(
          ('eval', programs_lib.shapes(args)),
          functools.partial(self._eval.lower, *args),
        )
      with self._recorder.clock('evaluating'):
        more, n = jax.device_get(program(*args))
      sums = {k: sums.get(k, 0) + float(v) for k, v in more.items()}
      count += int(n)
    means = {k: v / count for k, v in sums.items()}
    self._recorder.record('eval', step, **means, examples=count)

  # Checkpoints.

  def snapshot(self) -> tuple[PyTree, checkpoint.Manifest]:
    """All that `resume` needs: arrays, and a manifest."""
    self._settle()
    self._recorder.log(settled=True)
    bases = self._bases or {}
    switch = self._switch and [self._switch.decided, self._switch.ranks]
    nodes = transforms.low_rank_leaves(self.state.params)
    return {'state': self.state, 'bases': list(bases.values())}, {
      'run': self._identity(),
      'ranks': {path: node.rank for path, node in nodes.items()},
      'live_ranks': self._ranks,
      'switch': switch,
      'bases': list(bases),
      'data': self._position,
      'records': len(self._recorder.records),
      'seconds': self._recorder.clock.total(),
      'compilations': self._compilations,
      'pace': self._step_seconds(int(self.state.step)),
      'compile_seconds': self._compile_seconds,
    }

  def _identity(self) -> dict[str, Any]:
    """What has to be the same where a run is resumed."""
    leaves = tree.flatten(self._dense)
    return {
      'parameters': {p: f'{x.dtype}{list(x.shape)}' for p, x in leaves.items()},
      'layers': {x.path: [*x.matrix, x.stack] for x in self._layers},
      'schedule': dataclasses.asdict(self._schedule) if self._schedule else {},
      'seed': {'seed': self._seed},
    }

  def like(self, manifest: checkpoint.Manifest) -> PyTree:
    """Shapes of the arrays of a snapshot.

    Raises:
      ValueError: it is of another run; says what differs.
    """
    # As JSON has it: tuples are lists there.
    mine = json.loads(json.dumps(self._identity()))
    for what, values in mine.items():
      theirs = manifest['run'][what]
      differing = [
        f'{k!r}: {theirs.get(k)} there, {values.get(k)} here'
        for k in {**values, **theirs}
        if theirs.get(k) != values.get(k)
      ]
      if differing:
        raise ValueError(
          f'the checkpoint is of another run, its {what} differ: '
          + '; '.join(differing[:5])
          + ('; ...' if len(differing) > 5 else '')
        )
    ranks = manifest['ranks']
    layers = {x.path: x for x in self._layers}
    convert = lambda p: transforms.to_lowrank(
      p, [layers[path] for path in ranks], rank=ranks
    )
    params = jax.eval_shape(convert, self._dense) if ranks else self._dense
    state = steps_lib.TrainState(
      self.state.step,
      params,
      jax.eval_shape(self._optimizer.init, params),
      self.state.model_state,
    )
    measured = [layers[path] for path in manifest['bases']]
    bases = jax.eval_shape(lambda p: metrics_lib.basis(p, measured), params)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
      {'state': _shapes(state), 'bases': list(bases.values())},
    )

  def resume(self, step: int, arrays: PyTree, manifest: checkpoint.Manifest):
    """Goes on from a snapshot."""
    self.state = arrays['state']
    self._bases = dict(zip(manifest['bases'], arrays['bases'], strict=True))
    self._ranks = manifest['live_ranks']
    self._compilations = manifest['compilations']
    self._pace = manifest['pace']
    self._compile_seconds = manifest['compile_seconds']
    self._recorder.clock.add(manifest['seconds'])
    self._since = step, self._recorder.clock.seconds['training']
    if manifest['switch']:
      self._prepare_switch(*manifest['switch'])
    if hasattr(self._data, 'set_state'):
      self._data.set_state(manifest['data'])
      self._next = self._fetch()
    else:
      for _ in range(step):  # there is nothing but to read them again
        self._next = self._fetch()

  def _settle(self):
    """Waits for the steps under way, on the training clock."""
    with self._recorder.clock('training'):
      jax.block_until_ready(self.state)

  def finish(self, step: int):
    """Evaluates, slices what is pruned, and writes the last record."""
    self._settle()
    self._recorder.log(settled=True)
    rate = 1 / self._step_seconds(step)
    # The function is that of the sliced kernels, for which nothing is compiled.
    self.evaluate(step)
    self._slice(step, self._ranks)
    self._recorder.record(
      'end',
      step,
      seconds=self._recorder.clock.total(),
      compilations=self._compilations,
      steps_per_second=rate,
      optimizer_bytes=sum(
        x.nbytes for x in jax.tree.leaves(self.state.opt_state)
      ),
      **metrics_lib.count(self.state.params)._asdict(),
    )

  def result(self) -> Result:
    """Of a run that is at its end."""
    end = self._recorder.records[-1]
    return Result(
      state=self.state,
      layers=self._layers,
      records=tuple(self._recorder.records),
      seconds=end['seconds'],
      compilations=end['compilations'],
      steps_per_second=end['steps_per_second'],
    )


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


def _shapes(arrays: PyTree) -> PyTree:
  """Shapes and dtypes, as JAX sees the leaves: without values."""
  return jax.eval_shape(lambda x: x, arrays)
