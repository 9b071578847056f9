"""When what happens to which layers: the schedule, its events, their doing.

Steps are optimiser steps; an event of step t happens after t of them, before
the next. The first event is the transition, the others are updates, `every`
steps apart (paper, Section 3). `Schedule.event` only reads; `apply_event` is
the pure function that does what the event says.

With a lag, an update begins after step t, when its Sigmas are taken, and is due
`lag` steps later; meanwhile the host decomposes them. In a loop of one's own:

  event = schedule.event(step)
  if event and event.lag:
    begun = event, threads.submit(decompose, sigmas(params))  # of transforms
  elif event:
    params, opt_state, report = apply_event(event, ...)
  if begun and begun[0].due == step:
    event, found = begun
    params, opt_state, report = apply_event(
      event, ..., rotations=found.result()
    )
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from oialr_jax import layers as layers_lib
from oialr_jax import linalg
from oialr_jax import lowrank
from oialr_jax import metrics
from oialr_jax import optimizer
from oialr_jax import transforms
from oialr_jax import tree

Array = jax.Array
PyTree = Any
Layers = Sequence[layers_lib.Layer]


@dataclasses.dataclass(frozen=True)
class Event:
  """Something that happens to the parameters between two steps.

  Attributes:
    step: optimiser steps done so far.
    index: 0 for the transition, then 1, 2, ... for the updates.
    last_transition: every layer that is still dense becomes low-rank now.
    share: the share of the layers, from the back, whose bases are updated.
    lag: steps until it is due; of a transition 0.
  """

  step: int
  index: int
  last_transition: bool
  share: float
  lag: int = 0

  @property
  def due(self) -> int:
    """The optimiser steps after which it is applied."""
    return self.step + self.lag

  @property
  def kind(self) -> str:
    return 'transition' if self.index == 0 else 'update'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """The schedule of OIALR over a run, validated when it is built.

  Attributes:
    steps: length of the run.
    delay: the step of the transition: an int of steps, or a float in [0, 1),
      the share of the run (paper: 1/3). 0 starts low-rank.
    every: steps between updates, nu of the paper.
    cutoff: relative to the largest singular value, beta of the paper.
    max_drop: the largest share of a layer's directions that one update drops.
    floor: the share of min(m, n) below which no rank falls.
    progressive: updates take in the last `progressive` of the layers first and
      as many more each time; 1 takes all at once.
    prune_at_transition: prune the layers in the transition's share at once.
    rank: fixed-rank mode: the rank (int) or share of min(m, n) (float) from the
      transition on; bases are still updated, nothing is pruned.
    last: no updates after this step (None: until the end).
    stability: transition by measurement: a layer goes low-rank when its
      stability over `every` steps is at least this, from `delay` on.
    latest: with `stability`, the step (or share) at which the others follow.
    keep_first: keep the first layer full-rank, see `select`.
    keep_last: keep the last layer full-rank, see `select`.
    policy: what becomes of the optimiser's state, see `transport`.
    basis_dtype: that bases are stored in, see `to_lowrank`, such as 'bfloat16';
      kept as its name.
    lag: steps that an update is applied after it began, its SVDs being done on
      the host meanwhile. Ranks are then those of the step at which it began.
    sigma_scale: of Sigma's steps, so that they do not shrink with its rank; None
      leaves them as the optimiser gives them, as published. `fit` passes it on
      to `train_sigma`, which is where a loop of one's own has to say it.

  Raises:
    ValueError: a value is out of range, or two contradict each other.
    TypeError: basis_dtype is no floating dtype.
  """

  steps: int
  delay: int | float = 1 / 3
  every: int = 500
  cutoff: float = 0.1
  max_drop: float = 0.5
  floor: float = 0.01
  progressive: float = 0.1
  prune_at_transition: bool = False
  rank: int | float | None = None
  last: int | None = None
  stability: float | None = None
  latest: int | float = 0.5
  keep_first: bool = False
  keep_last: bool = True
  policy: str = optimizer.TRANSPORT
  basis_dtype: str | None = None
  lag: int = 0
  sigma_scale: float | None = None

  def __post_init__(self):
    self._make_plain()
    optimizer.check_sigma_scale(self.sigma_scale)
    if self.steps < 1:
      raise ValueError(f'steps={self.steps}: must be at least 1.')
    if self.every < 1:
      raise ValueError(f'every={self.every}: must be at least 1 step.')
    self._resolve('delay')
    transforms.check_fraction('cutoff', self.cutoff)
    transforms.check_fraction('max_drop', self.max_drop, upper_open=False)
    transforms.check_fraction('floor', self.floor, lower_open=False)
    transforms.check_fraction('progressive', self.progressive, upper_open=False)
    if self.last is not None and self.last < self.delay_steps:
      raise ValueError(
        f'last={self.last}: is before the transition at step '
        f'{self.delay_steps}.'
      )
    if not _is_whole(self.lag) or not 0 <= self.lag < self.every:
      raise ValueError(
        f'lag={self.lag}: must be a number of steps in [0, {self.every}), for '
        f'after every={self.every} steps the next update begins.'
      )
    if self.lag and self.stability is not None:
      raise ValueError(
        f'lag={self.lag}: where stability decides, an event may convert layers '
        'and update others, which has to be done at once; drop one of the two.'
      )
    if self.stability is not None:
      transforms.check_fraction('stability', self.stability)
      self._resolve('latest')
      if self.latest_steps < self.delay_steps + self.every:
        raise ValueError(
          f'latest={self.latest}: stability is measured over {self.every} '
          f'steps from step {self.delay_steps} on; latest must be at least '
          f'{self.delay_steps + self.every}.'
        )
      if not any(event.last_transition for event in self.events()):
        raise ValueError(
          f'latest={self.latest}: no event comes at step {self.latest_steps} '
          'or after it, so that unstable layers would stay dense; lower '
          'latest or every, or raise last.'
        )
    if self.rank is not None:
      _check_rank(self.rank)
    if self.rank is not None and self.prune_at_transition:
      raise ValueError(
        f'rank={self.rank} fixes the rank, but prune_at_transition=True '
        'prunes; drop one of the two.'
      )
    if self.policy not in optimizer.POLICIES:
      raise ValueError(
        f'policy={self.policy!r}: must be one of '
        f'{", ".join(optimizer.POLICIES)}.'
      )

  @classmethod
  def paper(cls, steps: int, **changes: Any) -> 'Schedule':
    """The paper's Algorithm 1: d = T/3, all layers at every update."""
    return cls(**(dict(steps=steps, cutoff=0.15, progressive=1.0) | changes))

  @classmethod
  def reference(cls, steps: int, **changes: Any) -> 'Schedule':
    """When the published code prunes, and what it does to moments.

    Pruning starts at the transition, with the last tenth of the layers, and
    moments are zeroed and sliced instead of transported (D1 and D3 in
    BUILD_NOTES.md; the others are done as everywhere here).
    """
    preset = dict(
      steps=steps,
      prune_at_transition=True,
      policy=optimizer.REFERENCE,
    )
    return cls(**(preset | changes))

  @property
  def delay_steps(self) -> int:
    return self._resolve('delay')

  @property
  def latest_steps(self) -> int:
    return self._resolve('latest')

  def event(self, step: int) -> Event | None:
    """What begins after `step` optimiser steps, or None.

    An update that would be due at the end of the run, or after it, does not.

    Raises:
      ValueError: step is negative.
    """
    if step < 0:
      raise ValueError(f'step={step}: must not be negative.')
    since = step - self.delay_steps
    lag = self.lag if since > 0 else 0
    if since < 0 or since % self.every or step + lag >= self.steps:
      return None
    if self.last is not None and step > self.last:
      return None
    index = since // self.every
    return Event(
      step=step,
      index=index,
      last_transition=self.stability is None or step >= self.latest_steps,
      share=min(1.0, self.progressive * (index + 1)),
      lag=lag,
    )

  def events(self) -> tuple[Event, ...]:
    """All events of the run, in order."""
    steps = range(self.delay_steps, self.steps, self.every)
    return tuple(e for e in map(self.event, steps) if e is not None)

  def _make_plain(self):
    """Makes NumPy's numbers and dtypes what a checkpoint's manifest can hold."""
    transforms.check_basis_dtype(self.basis_dtype)
    plain = {k: x.item() for k, x in vars(self).items() if hasattr(x, 'item')}
    if self.basis_dtype is not None:
      plain['basis_dtype'] = jnp.dtype(self.basis_dtype).name
    for name, value in plain.items():
      object.__setattr__(self, name, value)

  def _resolve(self, name: str) -> int:
    """A number of steps from an int of steps or a share of the run."""
    value = getattr(self, name)
    share = not _is_whole(value)
    if not (0 <= value < 1 if share else 0 <= value < self.steps):
      raise ValueError(
        f'{name}={value}: must be a step of the run, in [0, {self.steps}), '
        'or, as a float, a share of it in [0, 1).'
      )
    return round(value * self.steps) if share else int(value)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['ranks', 'spectra', 'truncation', 'drift', 'stability', 'bases'],
  meta_fields=['event', 'converted', 'updated', 'pruned'],
)
@dataclasses.dataclass(frozen=True)
class Report:
  """What an event did.

  Attributes:
    event: the event.
    converted: paths of the layers that became low-rank.
    updated: paths of the layers whose bases were aligned.
    pruned: paths of the layers that were pruned (their rank may stay).
    ranks: of every low-rank layer now, by path.
    spectra: singular values `[b, r]` before pruning, of what was converted or
      updated; with a lag, when the update began.
    truncation: ||W - W'||_F / ||W||_F of what was pruned or cut to a rank.
    drift: max |U^T U - I| of every low-rank layer after the event.
    stability: of the layers that were measured, over `every` steps.
    bases: for the next event, where stability decides; else empty.
  """

  event: Event
  converted: tuple[str, ...]
  updated: tuple[str, ...]
  pruned: tuple[str, ...]
  ranks: Mapping[str, Array]
  spectra: Mapping[str, Array]
  truncation: Mapping[str, Array]
  drift: Mapping[str, Array]
  stability: Mapping[str, Array]
  bases: Mapping[str, Array]


def apply_event(
  event: Event,
  params: PyTree,
  opt_state: PyTree,
  layers: Layers,
  schedule: Schedule,
  *,
  bases: Mapping[str, Array] | None = None,
  rotations: Mapping[str, transforms.Rotation] | None = None,
  program: Callable[..., Any] | None = None,
) -> tuple[PyTree, PyTree, Report]:
  """Does what the event says to the parameters and the optimiser's state.

  Traceable, unless stability decides, which needs values.

  Args:
    event: from `schedule.event(step)`.
    params: pytree of parameters. What is no array (functions, flags) stays
      what it is, there and in the optimiser's state.
    opt_state: of `train_sigma(tx)`; None when there is none to carry along.
    layers: those that the method is for, from `select`.
    schedule: the schedule that the event is from.
    bases: where stability decides, `bases` of the last event's report.
    rotations: of an event with a lag, what `transforms.decompose` found for
      the parameters of `event.step`; those of now are of `event.due`.
    program: what `foresee(event, ...).lower(params, opt_state)` compiled to,
      for these shapes; compiled now by default.

  Returns:
    The parameters, the optimiser's state, and a `Report`.

  Raises:
    ValueError: layers do not fit params; a kernel is not finite; an SVD fails;
      an event with a lag lacks rotations, or another has some.
  """
  layers, leaves, dense = _looked_up(params, layers)
  stability, measured = {}, {}
  converting = dense
  if schedule.stability is not None and dense:
    measured = metrics.basis(params, dense)
    if bases:
      stability = metrics.stability(bases, measured)
    if not event.last_transition:
      converting = [
        x for x in dense if stability.get(x.path, -1) >= schedule.stability
      ]
  plan = Plan.of(event, layers, leaves, converting, schedule)
  _check_rotations(event, plan, rotations)
  given = params, opt_state
  args = tree.arrays(given)
  if plan.lags:
    args += ({path: rotations[path] for path in plan.updated},)
  if tree.is_concrete((params, opt_state)):
    run = program or functools.partial(_jitted(), plan)
    # Checked afterwards, so that it is a part of the same program.
    params, opt_state, finite, aligned, found = run(*args)
    transforms.check_flags(finite)
    transforms.check_decomposed(aligned)
  else:
    params, opt_state, _, _, found = _do(plan, *args)
  params, opt_state = tree.with_others((params, opt_state), given)
  gone = set(plan.converted)
  return (
    params,
    opt_state,
    Report(
      event=event,
      converted=plan.converted,
      updated=plan.updated,
      pruned=plan.pruned,
      stability=stability,
      bases={p: b for p, b in measured.items() if p not in gone},
      **found,
    ),
  )


def foresee(
  event: Event, params: PyTree, layers: Layers, schedule: Schedule
) -> 'Plan | None':
  """What the event is going to do, as far as shapes alone say so.

  Args:
    event: from `schedule.event(step)`.
    params: pytree of parameters, or of their shapes.
    layers: those that the method is for.
    schedule: the schedule that the event is from.

  Returns:
    The plan, or None where stability decides.

  Raises:
    ValueError: layers do not fit params.
  """
  layers, leaves, dense = _looked_up(params, layers)
  if dense and not event.last_transition:
    return None
  return Plan.of(event, layers, leaves, dense, schedule)


@dataclasses.dataclass(frozen=True)
class Plan:
  """An event's doing with all decisions taken: static, one program each.

  Attributes:
    paths: of all layers that the method is for.
    converting: layers that become low-rank.
    updated: paths of the layers whose bases are aligned.
    pruned: paths of the layers that are pruned.
    rank: see `Schedule`, as are all that follow.
    cutoff: the relative one.
    max_drop: the largest share that is dropped.
    floor: the share of min(m, n) below which no rank falls.
    policy: what becomes of the optimiser's state.
    basis_dtype: that bases are stored in.
    lags: the bases are aligned by rotations that were found before.
  """

  paths: tuple[str, ...]
  converting: tuple[layers_lib.Layer, ...]
  updated: tuple[str, ...]
  pruned: tuple[str, ...]
  rank: int | float | None
  cutoff: float
  max_drop: float
  floor: float
  policy: str
  basis_dtype: str | None
  lags: bool

  @property
  def converted(self) -> tuple[str, ...]:
    return tuple(layer.path for layer in self.converting)

  @property
  def ranks(self) -> dict[str, int]:
    """What layers become low-rank with; of a fixed one, at most all they have."""
    fits = lambda x: (
      min(self.rank, x.max_rank) if _is_whole(self.rank) else self.rank
    )
    return {x.path: layers_lib.rank_of(x, fits(x)) for x in self.converting}

  @classmethod
  def of(
    cls,
    event: Event,
    layers: Layers,
    leaves: Mapping[str, Any],
    converting: Layers,
    schedule: Schedule,
  ) -> 'Plan':
    """Of parameters by path, when these layers become low-rank."""
    new = {layer.path for layer in converting}
    ordered = sorted(layers, key=lambda layer: layer.order)
    taken = math.ceil(event.share * len(ordered) - 1e-9)
    included = [layer.path for layer in ordered[len(ordered) - taken :]]
    low = [p for p in included if lowrank.is_low_rank(leaves[p])]
    pruned = low + [
      p for p in included if p in new and schedule.prune_at_transition
    ]
    return cls(
      paths=tuple(layer.path for layer in layers),
      converting=tuple(converting),
      updated=tuple(low),
      pruned=tuple(pruned) if schedule.rank is None else (),
      rank=schedule.rank,
      cutoff=schedule.cutoff,
      max_drop=schedule.max_drop,
      floor=schedule.floor,
      policy=schedule.policy,
      basis_dtype=schedule.basis_dtype,
      lags=event.lag > 0,
    )

  def rotations(self, params: PyTree) -> dict[str, transforms.Rotation]:
    """Shapes of those that the event's program takes."""
    take = functools.partial(transforms.sigmas, paths=self.updated)
    like = lambda x: transforms.Rotation(x.s, x.s[..., 0], x.s)
    shapes = lambda p: {path: like(x) for path, x in take(p).items()}
    return jax.eval_shape(shapes, tree.arrays(params))

  def lower(
    self,
    params: PyTree,
    opt_state: PyTree,
    rotations: PyTree | None = None,
    *,
    place: Callable[..., Any] | None = None,
  ) -> jax.stages.Lowered:
    """The event's program, to be compiled.

    Args:
      params: parameters, or their shapes.
      opt_state: likewise.
      rotations: likewise; where the event lags, by default those of `rotations`.
      place: constrains where the results are, `(params, opt_state, others) ->
        params, opt_state, others`.
    """
    args = tree.arrays((params, opt_state))
    if self.lags:
      args += (rotations or self.rotations(params),)
    # A function of its own: JAX keeps what it compiles as long as the function.
    do = functools.partial(_do, self, place=place)
    return jax.jit(do, compiler_options=_quick_to_compile()).lower(*args)


def _looked_up(params: PyTree, layers: Layers):
  """The layers, the leaves by path, and the layers that are still dense."""
  layers = tuple(layers)
  if not layers:
    raise ValueError('layers is empty: no layer is there for the event.')
  leaves = tree.flatten(params, lowrank.is_factored)
  tree.check_known([layer.path for layer in layers], leaves, 'parameter')
  dense = [x for x in layers if not lowrank.is_low_rank(leaves[x.path])]
  return layers, leaves, dense


def _check_rotations(event: Event, plan: Plan, rotations: Any):
  if event.lag and rotations is None:
    raise ValueError(
      f'rotations=None: the update of step {event.step} is due after step '
      f'{event.due}, with the rotations that transforms.decompose found for '
      f'transforms.sigmas(params) of step {event.step}; pass them, or a '
      'schedule with lag=0.'
    )
  if rotations is not None and not event.lag:
    raise ValueError(
      f'rotations: the {event.kind} of step {event.step} has no lag and finds '
      'its own; leave them out.'
    )
  if event.lag:
    tree.check_known(plan.updated, rotations, 'rotation')


def _do(
  plan: Plan, params: PyTree, opt_state: PyTree, rotations=None, *, place=None
):
  """Converts, aligns and prunes; the optimiser's state follows at once."""
  leaves = tree.flatten(params, lowrank.is_factored)
  finite = {p: jnp.all(jnp.isfinite(_values(leaves[p]))) for p in plan.paths}
  new, before = _converted(plan, params)
  turned = transforms.cut(rotations, new) if plan.lags else {}
  new = _aligned(plan, new, before, turned)
  before |= _sigmas(new, plan.updated)
  values = {path: x.s for path, x in turned.items()}
  spectra = {path: linalg.diagonal(s) for path, s in before.items()} | values
  nodes = transforms.low_rank_leaves(new)
  aligned = {
    path: jnp.all(transforms.is_aligned(nodes[path].s))
    for path in before
    if path not in turned
  }
  if plan.pruned:
    new = transforms.prune_aligned(
      new,
      cutoff=plan.cutoff,
      max_drop=plan.max_drop,
      floor=plan.floor,
      paths=plan.pruned,
      values=values,
    )
  if opt_state is not None:
    opt_state = optimizer.transport(opt_state, params, new, policy=plan.policy)
  after = _sigmas(new, before)
  nodes = transforms.low_rank_leaves(new)
  found = dict(
    ranks={p: transforms.live_rank(x) for p, x in nodes.items()},
    spectra=spectra,
    truncation={p: _lost(before[p], after[p]) for p in before},
    drift=metrics.drift(new),
  )
  others = finite, aligned, found
  if place is not None:
    new, opt_state, others = place(new, opt_state, others)
  return new, opt_state, *others


def _converted(plan: Plan, params: PyTree):
  """With the new low-rank kernels; and their Sigmas, before a rank is fixed."""
  if not plan.converting:
    return params, {}
  convert = functools.partial(
    transforms.to_lowrank,
    params,
    plan.converting,
    basis_dtype=plan.basis_dtype,
  )
  full = convert()
  new = full if plan.rank is None else convert(rank=plan.ranks)
  return new, _sigmas(full, plan.converted)


def _aligned(plan: Plan, params: PyTree, before: Any, rotations: Any) -> PyTree:
  """With bases turned by these rotations, or by SVDs after those of `before`."""
  if plan.lags:
    return transforms.rotate(params, rotations)
  if plan.converting and plan.updated:
    nodes = transforms.low_rank_leaves(params)
    waiting = {p: nodes[p] for p in plan.updated}
    params = transforms.replaced(params, linalg.after(before, waiting))
  if plan.updated:
    params = transforms.update_basis(params, paths=plan.updated)
  return params


@functools.cache
def _jitted():
  """`_do`, for loops of one's own: compiled once for a plan and shapes."""
  return jax.jit(_do, static_argnums=0, compiler_options=_quick_to_compile())


@functools.cache
def _quick_to_compile() -> dict[str, Any] | None:
  """Options of XLA for an event's program, which runs a few times at most.

  On CPUs, where LLVM takes ten times as long to optimise it as LAPACK to do the
  work, it is not optimised.
  """
  if jax.default_backend() != 'cpu':
    return None
  options = {
    'xla_backend_optimization_level': 0,
    'xla_cpu_use_fusion_emitters': False,
  }
  return {k: v for k, v in options.items() if _compiles({k: v})} or None


def _compiles(options: dict[str, Any]) -> bool:
  """Whether this release knows these options: they come and go."""
  try:
    jax.jit(lambda x: x, compiler_options=options).lower(0).compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True


def _check_rank(rank: int | float):
  share = not _is_whole(rank)
  if not (0 < rank <= 1 if share else rank >= 1):
    raise ValueError(
      f'rank={rank}: must be a number of directions, at least 1, or, as a '
      'float, a share of min(m, n) in (0, 1].'
    )


def _is_whole(value: Any) -> bool:
  # NumPy's integers are no ints, and a float32 is no float.
  return isinstance(value, numbers.Integral)


def _sigmas(params, paths) -> dict[str, Array]:
  """Sigmas as matrices."""
  nodes = transforms.low_rank_leaves(params)
  return {p: lowrank.matrices(nodes[p])[1] for p in paths}


def _lost(before: Array, after: Array) -> Array:
  """||Sigma - Sigma'||_F / ||Sigma||_F: that of W, for U and V have no part."""
  rest = before.shape[-1] - after.shape[-1]
  after = jnp.pad(after, ((0, 0), (0, rest), (0, rest)))
  total = jnp.linalg.norm(before)
  return jnp.linalg.norm(before - after) / jnp.where(total > 0, total, 1)


def _values(leaf):
  return leaf.s if lowrank.is_low_rank(leaf) else leaf
