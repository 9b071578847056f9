"""The host's side of a run: state, clocks, programs, records.

The step is compiled when shapes change, and never else: at the start, at the
transition, at a compaction; where that can be foreseen, while the training goes
on. Nothing is read from the device while steps run, except the metrics of steps
that are done.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oialr_jax import checkpoint
from oialr_jax import layers as layers_lib
from oialr_jax import lowrank
from oialr_jax import metrics as metrics_lib
from oialr_jax import optimizer as optimizer_lib
from oialr_jax import schedule as schedule_lib
from oialr_jax import transforms
from oialr_jax import tree
from oialr_jax.training import background
from oialr_jax.training import programs as programs_lib
from oialr_jax.training import recorder as recorder_lib
from oialr_jax.training import snapshots
from oialr_jax.training import steps as steps_lib

PyTree = Any
Record = recorder_lib.Record
Layers = tuple[layers_lib.Layer, ...]
# (params of the measurement before, params, layers) -> numbers by path, by name
TrackFn = Callable[
  [PyTree, PyTree, Layers], Mapping[str, Mapping[str, jax.Array]]
]


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run leaves.

  Attributes:
    state: after the last step.
    layers: that the method was used on; empty for a dense run.
    records: the stream of records (see `callbacks`).
    seconds: by what the run waited for: 'training', 'compiling' (what was
      compiled beside the training is not in it), 'events', 'evaluating',
      'tracking', 'saving' and 'other'; together, those of the wall clock.
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


@dataclasses.dataclass(frozen=True)
class _Tracked:
  """A measurement, which the next one is compared with; as it is saved.

  Attributes:
    about: its step, and what tells the shapes of its params.
    arrays: the bases and the mixing of the layers, in their order; params, a
      copy, where more is measured.
  """

  about: dict[str, Any]
  arrays: dict[str, PyTree]


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
    conversion,
    layers,
    eval_fn,
    eval_data,
    eval_params,
    compaction,
    contraction,
    seed,
    recorder,
    tracking,
    track_more,
    placement,
    accumulate,
    remat,
    probe,
  ):
    loss_fn = steps_lib.checked(loss_fn)
    self._recorder = recorder
    self._place = placement
    self._accumulate = accumulate
    self._data = data
    self._position = None  # of the data, before the batch that is next
    self._taken = 0  # batches, without the one that is next
    self._key = placement.put(jax.random.key(seed), placement.replicated)
    self._steps = steps
    self._schedule = schedule
    self._conversion, self._converted = conversion, False
    self._compaction = compaction
    self._eval_data, self._eval_params = eval_data, eval_params
    self._next = self._fetch()
    if self._next is None:
      raise ValueError('data is empty: pass one batch for every step.')
    self._batch = jax.tree.map(_shape, self._next)
    make_step = lambda make: make(
      loss_fn,
      optimizer,
      contraction,
      accumulate=accumulate,
      remat=remat,
      shards=placement.replicas,
      gather=placement.gather,
    )
    self._step = make_step(steps_lib.train_step)
    if conversion is not None:
      self._step_after = make_step(conversion.make_step)
    evaluate = eval_fn and steps_lib.eval_step(
      eval_fn, contraction, shards=placement.replicas
    )
    self._eval = evaluate and jax.jit(
      evaluate, out_shardings=placement.replicated
    )
    self._probe = None
    if probe:
      loss = steps_lib.loss_step(
        loss_fn, contraction, shards=placement.replicas
      )
      self._probe = jax.jit(loss, out_shardings=placement.replicated)
    self._optimizer = optimizer
    self._seed = seed
    self._dense = jax.eval_shape(lambda x: x, params)
    self._layers: Layers = ()
    if schedule is not None or conversion is not None or tracking:
      self._layers = self._choose(loss_fn, params, model_state, layers)
    self.state = self._start(params, model_state)
    self._programs = programs_lib.Programs(compaction.background)
    self._program: programs_lib.Program | None = None  # the step's
    self._under_way: PyTree = None  # metrics of the last step
    self._switch: _Switch | None = None
    self._threads = background.threads()
    self._update: background.Update | None = None  # that is under way
    self._track_more = track_more
    self._bases = None
    self._tracked: _Tracked | None = None
    # Of the low-rank leaves, after the last event.
    self._ranks = transforms.compact_ranks(self.state.params)
    self._compilations = 0
    self._since = 0, 0.0  # of this program: the step, and the training clock
    # Of the program before: seconds a step, and seconds to compile it.
    self._pace, self._compile_seconds = 0.0, 0.0

  def _start(self, params: PyTree, model_state: PyTree) -> steps_lib.TrainState:
    # Copied, because steps donate their state and params are the caller's.
    params, model_state = jax.tree.map(
      jnp.array,
      self._place.put(
        (params, model_state), self._place.shardings(params, model_state)
      ),
    )
    opt_state = self._optimizer.init(params)
    step = jnp.zeros((), jnp.int32)
    return self._put(steps_lib.TrainState(step, params, opt_state, model_state))

  @property
  def examples(self) -> int:
    """In a batch of all processes."""
    return next((x.shape[0] for x in jax.tree.leaves(self._batch) if x.ndim), 1)

  def close(self):
    """Drops what has not begun to be compiled or decomposed."""
    self._programs.close()
    self._threads.shutdown(wait=False, cancel_futures=True)

  def _choose(self, loss_fn, params, model_state, layers) -> Layers:
    if layers is None:
      found = layers_lib.find_layers(
        loss_fn, params, model_state, self._next, self._key
      )
      rules = self._schedule or self._conversion
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
        f'data ended after {self._taken} batches, before step {step + 1}: pass '
        'an iterable of one batch for every step, and of more where a rollback '
        'uses them up.'
      )
    self._catch_up(step)
    if self._ready_to_switch():
      self._take_switch(step)
    fresh = self._program is None
    if fresh:
      self._use(step, self._step_program())
    with self._recorder.clock('training'):
      try:
        self.state, metrics = self._program(self.state, batch, self._key)
      except TypeError:  # of arguments that it was not compiled for
        self._check(batch, step)
        raise
      self._taken += 1
      # The next batch is made while the device works on this one.
      self._next = self._fetch(wanted=step + 1 < self._steps)
      # No further ahead of the device: a run that is to stop would have to wait
      # for all of these steps, and their batches would fill its memory.
      jax.block_until_ready(self._under_way)
      self._under_way = metrics
    if fresh:
      self._foresee(step)
    self._recorder.step(step + 1, metrics)

  def _check(self, batch: PyTree, step: int):
    """Refuses a batch that is unlike the first one."""
    now, first = map(snapshots.shapes_of, (batch, self._batch))
    differing = '; '.join(
      f'{path!r} is {x}, at first {y}'
      for path, (x, y) in snapshots.differing(now, first).items()
    )
    if differing:
      raise ValueError(
        f'the batch of step {step}: {differing}. Batches must be alike: leave '
        'the remainder of an epoch out, or pad it.'
      )

  def _fetch(self, wanted: bool = True) -> PyTree | None:
    """The batch that is next; None where data end, or no step wants it.

    What no step wants is not read: it may be a remainder, or take forever.
    """
    if hasattr(self._data, 'get_state'):
      self._position = self._data.get_state()
    batch = next(self._data, None) if wanted else None
    return None if batch is None else self._place.batch(batch)

  # Where arrays are.

  def _shardings(self, state: steps_lib.TrainState) -> steps_lib.TrainState:
    """Of a state, or of one of these shapes."""
    parts = state.params, state.opt_state, state.model_state
    return steps_lib.TrainState(
      self._place.replicated, *self._place.shardings(*parts)
    )

  def _put(self, state: steps_lib.TrainState) -> steps_lib.TrainState:
    return self._place.put(state, self._shardings(state))

  def _shapes(self, state: steps_lib.TrainState) -> steps_lib.TrainState:
    """What a program is compiled for."""
    return jax.tree.map(_shape, state, self._shardings(state))

  def _whole(self, shapes: PyTree) -> PyTree:
    """The shapes of what every device has a copy of."""
    return jax.tree.map(lambda x: _shape(x, self._place.replicated), shapes)

  def _spread(self) -> contextlib.AbstractContextManager:
    """Within, SVDs are shared out among the devices."""
    if self._place.mesh.size == 1:
      return contextlib.nullcontext()
    return jax.set_mesh(self._place.mesh)

  # Programs.

  def _step_program(self) -> programs_lib.Program:
    with self._recorder.clock('compiling'):
      return self._programs.get(*self._to_step(self.state, self._converted))

  def _to_step(
    self, state, converted: bool = False
  ) -> tuple[Hashable, programs_lib.Lower]:
    """The key of the step's program for this state, and how it is lowered."""
    step = jax.jit(
      self._step_after if converted else self._step,
      donate_argnums=0,
      out_shardings=(self._shardings(state), self._place.replicated),
    )
    lower = lambda: step.lower(self._shapes(state), self._batch, self._key)
    return ('step', converted, programs_lib.shapes(state)), lower

  def _use(self, step: int, program: programs_lib.Program):
    self._pace = self._step_seconds(step)
    self._compile_seconds = program.seconds
    self._program = program
    self._recorder.facts = {'optimizer_bytes': self._optimizer_bytes()}
    flops = self._step_flops()
    if flops is not None:
      self._recorder.facts['flops'] = flops
    self._compilations += 1
    self._since = step, self._recorder.clock.seconds['training']

  def _step_flops(self) -> float | None:
    """Of a step, on all devices and of all parts of its batch.

    What a model's own scan repeats is counted once.
    """
    flops = self._program and self._program.flops
    return flops and flops * self._place.mesh.size * self._accumulate

  def _step_seconds(self, steps: int) -> float:
    """Of a step with this program, or the one before where it has not run."""
    step, seconds = self._since
    if steps == step:
      return self._pace
    return (self._recorder.clock.seconds['training'] - seconds) / (steps - step)

  def _foresee(self, step: int):
    """Starts compiling what the next event and the step after it need."""
    if not self._compaction.background:
      return
    if self._conversion is not None:
      self._foresee_conversion(step)
    if self._schedule is None:
      return
    state = self.state
    within = lambda event: step < event.due < self._steps
    event = next(filter(within, self._schedule.events()), None)
    plan = event and self._plan(event)
    if not plan:
      return
    key, lower = self._to_event(plan, state)
    with self._recorder.clock('compiling'):
      if plan.lags:
        self._programs.prepare(*self._to_sigmas(plan, state))
      if self._programs.known(key):
        return
      lowered = lower()
      self._programs.prepare(key, lambda: lowered)
      if plan.converting:
        params, opt_state, *_ = jax.tree.map(_shape, lowered.out_info)
        converted = dataclasses.replace(
          state, params=params, opt_state=opt_state
        )
        self._programs.prepare(*self._to_step(converted))

  def _foresee_conversion(self, step: int):
    if not step < self._conversion.step < self._steps:
      return
    with self._recorder.clock('compiling'):
      state, _ = jax.eval_shape(self._convert(), self.state)
      self._programs.prepare(*self._to_conversion())
      self._programs.prepare(*self._to_step(state, converted=True))

  def _convert(self) -> Callable[..., Any]:
    return functools.partial(
      self._conversion.apply, layers=self._layers, tx=self._optimizer
    )

  def _to_conversion(self) -> tuple[Hashable, programs_lib.Lower]:
    def lower():
      convert = self._convert()
      state, _ = jax.eval_shape(convert, self.state)
      out = self._shardings(state), self._place.replicated
      with self._spread():
        return jax.jit(convert, out_shardings=out).lower(
          self._shapes(self.state)
        )

    return 'conversion', lower

  def _to_event(self, plan, state) -> tuple[Hashable, programs_lib.Lower]:
    key = 'event', plan, programs_lib.shapes((state.params, state.opt_state))

    def lower():
      shapes = self._shapes(state)
      with self._spread():
        return plan.lower(
          shapes.params,
          shapes.opt_state,
          self._whole(plan.rotations(state.params)) if plan.lags else None,
          place=self._place.constrain,
        )

    return key, lower

  def _to_sigmas(self, plan, state) -> tuple[Hashable, programs_lib.Lower]:
    key = 'sigmas', plan.updated, programs_lib.shapes(state.params)
    take = jax.jit(
      functools.partial(transforms.sigmas, paths=plan.updated),
      out_shardings=self._place.replicated,
    )
    return key, lambda: take.lower(self._shapes(state).params)

  # Events.

  def event(self, event: schedule_lib.Event):
    """Does what is due now, and begins what is due later."""
    if self._switch and self._compaction.reproducible:
      self._settle()
      self._take_switch(event.step)
    if event.lag:
      self._begin(event)
    else:
      self._apply(event)

  def _begin(self, event: schedule_lib.Event):
    """Has Sigmas decomposed on the host, beside the steps that follow."""
    with self._recorder.clock('compiling'):
      program = self._programs.get(
        *self._to_sigmas(self._plan(event), self.state)
      )
    with self._recorder.clock('events'):
      sigmas = program(self.state.params)
      self._update = background.Update(event, sigmas, self._threads)

  def _catch_up(self, step: int):
    """Applies the update under way, if it is due."""
    if self._update and self._update.event.due == step < self._steps:
      update, self._update = self._update, None
      self._apply(update.event, update)

  def _plan(self, event: schedule_lib.Event) -> schedule_lib.Plan | None:
    return schedule_lib.foresee(
      event, self.state.params, self._layers, self._schedule
    )

  def _apply(
    self,
    event: schedule_lib.Event,
    update: background.Update | None = None,
  ):
    self._settle()
    before, old = self._ranks, self.state
    plan = self._plan(event)
    with self._recorder.clock('compiling'):
      program = plan and self._programs.get(*self._to_event(plan, old))
    loss, start = self._probed(), time.perf_counter()
    with self._recorder.clock('events'), self._spread():
      rotations = update and transforms.cut(update.rotations, old.params)
      params, opt_state, report = schedule_lib.apply_event(
        event,
        old.params,
        old.opt_state,
        self._layers,
        self._schedule,
        bases=self._bases,
        rotations=rotations,
        program=program,
      )
      jax.block_until_ready(params)
    self._bases = report.bases
    self._ranks = {k: int(v) for k, v in report.ranks.items()}
    self.state = self._put(
      dataclasses.replace(old, params=params, opt_state=opt_state)
    )
    seconds = time.perf_counter() - start
    if report.converted:
      self._program = self._switch = None
    change = loss and abs((self._probed() - loss) / loss)
    self._record_event(report, before, seconds=seconds, change=change)
    self._compact(event.due, anew=bool(report.converted))
    if self._program is not None:
      self._foresee(event.due)

  def convert(self, step: int):
    """Does what the conversion says."""
    self._settle()
    with self._recorder.clock('compiling'):
      program = self._programs.get(*self._to_conversion())
    start = time.perf_counter()
    with self._recorder.clock('events'):
      self.state, lost = jax.block_until_ready(program(self.state))
    self._converted, self._program = True, None
    nodes = tree.flatten(self.state.params, lowrank.is_factored)
    nodes = {p: x for p, x in nodes.items() if lowrank.is_factored(x)}
    self._ranks = {
      p: x.rank for p, x in nodes.items() if lowrank.is_low_rank(x)
    }
    self._recorder.record(
      'conversion',
      step,
      ranks=self._in_order({p: x.rank for p, x in nodes.items()}),
      truncation=self._in_order({p: float(x) for p, x in lost.items()}),
      seconds=time.perf_counter() - start,
      **self._counts(),
    )

  def _counts(self) -> dict[str, int]:
    if self._converted:
      return self._conversion.count(self.state.params)._asdict()
    return metrics_lib.count(self.state.params, self._ranks)._asdict()

  def _probed(self) -> float | None:
    """The loss of the batch that is next, where it is asked for."""
    if self._probe is None or self._next is None:
      return None
    args = self.state, self._next, self._key
    with self._recorder.clock('compiling'):
      program = self._programs.get(
        ('probe', programs_lib.shapes(self.state)),
        functools.partial(self._probe.lower, *args),
      )
    with self._recorder.clock('evaluating'):
      return float(program(*args))

  def _record_event(
    self, report: schedule_lib.Report, before: dict[str, int], **details: Any
  ):
    spectra = {k: np.asarray(v)[0].tolist() for k, v in report.spectra.items()}
    numbers = lambda values: self._in_order(
      {k: float(v) for k, v in values.items()}
    )
    if report.event.lag:
      details['decided'] = report.event.step
    self._recorder.record(
      'event',
      report.event.due,
      event=report.event.kind,
      converted=list(report.converted),
      updated=list(report.updated),
      pruned=list(report.pruned),
      ranks_before=self._in_order(before),
      ranks=self._in_order(self._ranks),
      spectra=self._in_order(spectra),
      truncation=numbers(report.truncation),
      drift=numbers(report.drift),
      stability=numbers(report.stability),
      **details,
      **self._counts(),
    )

  def _in_order(self, by_path: dict[str, Any]) -> dict[str, Any]:
    """The layers first to last, as they are executed."""
    order = {x.path: x.order for x in self._layers}
    place = lambda item: order.get(item[0], len(order))
    return dict(sorted(by_path.items(), key=place))

  # Compaction.

  def _compact(self, step: int, anew: bool):
    """Has what was pruned sliced away, where the policy finds it worth it.

    With `anew`, the step has to be compiled anyway.
    """
    if self._switch is not None:
      return
    policy = self._compaction
    ranks = policy.target(
      self.state.params,
      self._layers,
      self._ranks,
      steps=self._steps - step,
      step_seconds=1.0 if anew else self._step_seconds(step),
      step_flops=self._step_flops(),
      compile_seconds=0.0 if anew else self._compile_seconds,
    )
    if ranks is None:
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
    smaller = functools.partial(_sliced, ranks)
    small = jax.eval_shape(smaller, self.state)
    slice_ = jax.jit(smaller, out_shardings=self._shardings(small))
    return key, functools.partial(slice_.lower, self._shapes(self.state))

  def _ready_to_switch(self) -> bool:
    if self._switch is None or self._compaction.reproducible:
      return False
    if not self._compaction.background:
      return True  # it is from a run that had one; here none will be ready
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
    self._recorder.record(
      'compaction', step, stored_before=before, **details, **self._counts()
    )

  def track(self, step: int):
    """Measures how far the bases have turned since the last measurement."""
    self._catch_up(step)
    old = self._tracked
    if old is not None and old.about['step'] == step:
      return  # it was the last thing in the run that this one goes on from
    self._settle()
    with self._recorder.clock('tracking'), self._spread():
      self._tracked = self._measure(step)
      if old is not None:
        changes = self._compare(old.arrays, self._tracked.arrays)
        self._recorder.record('stability', step, **changes)

  def _measure(self, step: int) -> _Tracked:
    params = self.state.params
    arrays: dict[str, PyTree] = snapshots.measured(params, self._layers)
    if self._track_more:
      # A copy, because steps donate their state.
      arrays['params'] = jax.tree.map(jnp.copy, params)
    about = {
      'step': step,
      'params': 'params' in arrays,
      'ranks': _buffer_ranks(params),
      'converted': self._converted,
    }
    # The seconds are tracking's, and no collective of the next step meets them.
    return _Tracked(about, jax.block_until_ready(arrays))

  def _compare(
    self, old: dict[str, PyTree], new: dict[str, PyTree]
  ) -> dict[str, dict[str, float]]:
    """What has changed from one measurement to another, by path, by name."""
    paths = [x.path for x in self._layers]
    by_path = lambda name: [
      dict(zip(paths, x[name], strict=True)) for x in (old, new)
    ]
    numbers = lambda values: {k: float(v) for k, v in values.items()}
    # One after the other: collectives of programs at once may deadlock on CPUs.
    found = {
      'stability': numbers(metrics_lib.stability(*by_path('bases'))),
      'r_distance': numbers(metrics_lib.r_distance(*by_path('mixing'))),
    }
    if 'params' in old and 'params' in new:
      more = self._track_more(old['params'], new['params'], self._layers)
      found |= {name: numbers(values) for name, values in more.items()}
    return found

  def evaluate(self, step: int, stop: Callable[[], bool]) -> bool:
    """Evaluates; False where `stop`, asked before every batch, ended it."""
    if self._eval is None:
      return True
    self._settle()
    params, sums, count = self._evaluated(), {}, 0
    for batch in self._eval_data():
      if stop():
        return False
      batch = self._place.batch(self._place.padded(batch))
      args = params, self.state.model_state, batch
      with self._recorder.clock('compiling'):
        program = self._programs.get(
          ('eval', programs_lib.shapes(args)),
          functools.partial(self._eval.lower, *args),
        )
      with self._recorder.clock('evaluating'):
        more, n = jax.device_get(program(*args))
      sums = {k: sums.get(k, 0) + float(v) for k, v in more.items()}
      count += int(n)
    if not count:
      raise ValueError(
        f'eval_data: there is no example at step {step}; it must return batches '
        'at every call, not an iterator that the first one has used up, and '
        "not all of their 'mask' may be 0."
      )
    means = {k: v / count for k, v in sums.items()}
    self._recorder.record('eval', step, **means, examples=count)
    return True

  def _evaluated(self) -> PyTree:
    """The parameters that an evaluation takes."""
    params = self.state.params
    if self._eval_params is None:
      return params
    args = self.state.opt_state, transforms.trainable(params)

    def lower():
      where = transforms.trainable(self._place.shardings(params))
      return jax.jit(self._eval_params, out_shardings=where).lower(*args)

    with self._recorder.clock('compiling'):
      program = self._programs.get(
        ('eval params', programs_lib.shapes(args)), lower
      )
    with self._recorder.clock('evaluating'):
      return transforms.with_trainable(params, program(*args))

  # Checkpoints.

  def position(self) -> Any:
    """Of the data, before the batch that is next, for a manifest.

    Raises:
      TypeError: it cannot be saved.
    """
    return snapshots.encoded(self._position)

  def snapshot(self) -> tuple[PyTree, checkpoint.Manifest]:
    """All that `resume` needs: arrays, and a manifest."""
    self._settle()
    self._recorder.log(settled=True)
    bases, sigmas = self._bases or {}, {}
    if self._update:
      sigmas = transforms.cut(self._update.sigmas, self.state.params)
    switch = self._switch and [self._switch.decided, self._switch.ranks]
    arrays = {'state': self.state, 'bases': list(bases.values())}
    if sigmas:
      arrays['sigmas'] = list(sigmas.values())
    if self._tracked:
      arrays['tracked'] = self._tracked.arrays
    return arrays, {
      'run': self._identity,
      'ranks': _buffer_ranks(self.state.params),
      'live_ranks': self._ranks,
      'converted': self._converted,
      'switch': switch,
      'bases': list(bases),
      'update': self._update and self._update.event.step,
      'sigmas': list(sigmas),
      'tracked': self._tracked and self._tracked.about,
      'data': self.position(),
      'batches': self._taken,
      'records': len(self._recorder.records),
      'seconds': self._recorder.clock.total(),
      'compilations': self._compilations,
      'pace': self._step_seconds(int(self.state.step)),
      'compile_seconds': self._compile_seconds,
    }

  @functools.cached_property
  def _identity(self) -> dict[str, Any]:
    return snapshots.identity(
      self._dense,
      self._layers,
      self._schedule,
      self._conversion,
      self._optimizer,
      self._seed,
    )

  def like(self, manifest: checkpoint.Manifest) -> PyTree:
    """Shapes and shardings of the arrays of a snapshot.

    Raises:
      ValueError: it is of another run; says what differs.
    """
    snapshots.check_resumable(self._identity, manifest)
    params, bases = self._saved_shapes(manifest)
    state = dataclasses.replace(
      self.state,
      params=params,
      opt_state=jax.eval_shape(self._optimizer.init, params),
    )
    others = {'bases': list(bases.values())}
    if manifest['sigmas']:
      others['sigmas'] = snapshots.sigmas(params, manifest['sigmas'])
    found = {'state': self._shapes(state), **self._whole(others)}
    if manifest.get('tracked'):
      found['tracked'] = self._tracked_shapes(manifest)
    return found

  def _saved_shapes(
    self, manifest: checkpoint.Manifest
  ) -> tuple[PyTree, dict[str, jax.ShapeDtypeStruct]]:
    """Of the parameters, and of the bases by path."""
    params = self._dense
    if manifest.get('converted'):
      convert = functools.partial(self._conversion.convert, layers=self._layers)
      params = jax.eval_shape(convert, params)
    return snapshots.shapes(params, self._layers, manifest)

  def _tracked_shapes(self, manifest: checkpoint.Manifest) -> PyTree:
    about = manifest['tracked']
    measure = functools.partial(snapshots.measured, layers=self._layers)
    found = self._whole(jax.eval_shape(measure, self._dense))
    if about['params']:
      params, _ = self._saved_shapes({**manifest, **about})
      found['params'] = jax.tree.map(
        _shape, params, self._place.shardings(params)
      )
    return found

  def resume(self, step: int, arrays: PyTree, manifest: checkpoint.Manifest):
    """Goes on from a snapshot, with the batches behind it.

    Raises:
      ValueError: it is of another run, and its steps are more than the dense
        ones of this run.
    """
    if step > self._dense_steps():
      snapshots.check_same(self._identity, manifest['run'])
    self._recorder.clock.add(manifest['seconds'])
    self._compilations = manifest['compilations']
    if hasattr(self._data, 'set_state'):
      self._data.set_state(snapshots.decoded(manifest['data']))
    else:  # there is nothing but to read them; the first one is read
      for _ in range(manifest['batches'] - 1):
        next(self._data, None)
    self._taken, self._next = manifest['batches'], None
    self.go_back(step, arrays, manifest)

  def _dense_steps(self) -> float:
    """Steps before the method does anything."""
    if self._conversion is not None:
      return self._conversion.step
    return self._schedule.delay_steps if self._schedule else math.inf

  def go_back(self, step: int, arrays: PyTree, manifest: checkpoint.Manifest):
    """Takes a snapshot's state, and goes on with the batch that is next."""
    self.state = arrays['state']
    if self._next is None:
      self._next = self._fetch(wanted=step < self._steps)
    self._bases = dict(zip(manifest['bases'], arrays['bases'], strict=True))
    self._ranks = manifest['live_ranks']
    self._converted = manifest.get('converted', False)
    self._program = self._switch = self._update = self._tracked = None
    if manifest.get('tracked'):  # an older release has not saved it
      self._tracked = _Tracked(manifest['tracked'], arrays['tracked'])
    self._pace = manifest['pace']
    self._compile_seconds = manifest['compile_seconds']
    self._since = step, self._recorder.clock.seconds['training']
    if manifest['switch']:
      self._prepare_switch(*manifest['switch'])
    if manifest['update'] is not None:
      self._update = background.Update(
        self._schedule.event(manifest['update']),
        dict(zip(manifest['sigmas'], arrays['sigmas'], strict=True)),
        self._threads,
      )

  def _settle(self):
    """Waits for the steps under way, on the training clock."""
    with self._recorder.clock('training'):
      jax.block_until_ready(self.state)

  def finish(self, step: int):
    """Slices what is pruned, and writes the last record."""
    self._settle()
    rate = 1 / self._step_seconds(step)
    if self._converted:  # by whatever its step has done since
      self._ranks = transforms.compact_ranks(self.state.params)
    carried = self._optimizer_bytes()  # by the steps: no state is left behind
    self._slice(step, self._ranks)
    stopped = self._recorder.stopped
    self._recorder.record(
      'end',
      step,
      **({'stopped': str(stopped)} if stopped else {}),
      seconds=self._recorder.clock.total(),
      compilations=self._compilations,
      steps_per_second=rate,
      optimizer_bytes=carried,
      **self._counts(),
    )

  def _optimizer_bytes(self) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(self.state.opt_state))

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


def _buffer_ranks(params: PyTree) -> dict[str, int]:
  """Of the low-rank leaves by path, with what is zeroed."""
  nodes = transforms.low_rank_leaves(params)
  return {path: node.rank for path, node in nodes.items()}


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


def _shape(
  x: Any, where: jax.sharding.Sharding | None = None
) -> jax.ShapeDtypeStruct:
  """Shape, dtype and sharding, without values."""
  return jax.ShapeDtypeStruct(
    x.shape,
    x.dtype,
    sharding=where or getattr(x, 'sharding', None),
    weak_type=getattr(x, 'weak_type', False),
  )
