"""When pruned directions are sliced away, which compiles the step anew."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax

from oialr_jax import layers as layers_lib
from oialr_jax import lowrank
from oialr_jax import schedule as schedule_lib
from oialr_jax import transforms
from oialr_jax import tree

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compaction:
  """The policy of the trainer.

  Pruning zeroes; slicing saves time and memory, and costs a compilation. The
  function is the same either way, but for rounding.

  Attributes:
    min_saving: the least share of the low-rank layers' multiply-adds that
      slicing must save, by the cost model; 0 slices at every chance, 1 never.
    payback: the least number of seconds that the rest of the run must save, by
      the measured time of a step, for a second of compiling, as measured when
      the step was compiled last.
    multiple_of: ranks are rounded up to a multiple of this.
    background: compile beside the training, which goes on with what is zeroed
      and switches when that is done. Else the training waits.
    reproducible: seconds have no part in it, so that two runs of one seed are
      equal bit for bit: payback is left out, and what is compiled in the
      background takes over at the next event.

  Raises:
    ValueError: a value is out of range.
  """

  min_saving: float = 0.25
  payback: float = 1.0
  multiple_of: int = 8
  background: bool = True
  reproducible: bool = False

  def __post_init__(self):
    if not 0 <= self.min_saving <= 1:
      raise ValueError(f'min_saving={self.min_saving}: must be in [0, 1].')
    if not self.payback >= 0:
      raise ValueError(f'payback={self.payback}: must not be negative.')
    if self.multiple_of < 1:
      raise ValueError(f'multiple_of={self.multiple_of}: must be at least 1.')

  def target(
    self,
    params: PyTree,
    layers: Sequence[layers_lib.Layer],
    live: Mapping[str, int],
    **circumstances: Any,
  ) -> dict[str, int] | None:
    """The ranks to slice to, by path; None where it is not worth it.

    Args:
      params: parameters, or their shapes.
      layers: that the method is used on.
      live: logical ranks by path.
      **circumstances: see `pays`.
    """
    ranks = transforms.rounded_up(params, live, self.multiple_of)
    before, after = (multiply_adds(params, layers, r) for r in ({}, ranks))
    return ranks if self.pays(before, after, **circumstances) else None

  def pays(
    self,
    before: int,
    after: int,
    *,
    step_seconds: float,
    step_flops: float | None,
    steps: int,
    compile_seconds: float,
  ) -> bool:
    """Whether slicing is worth it.

    Args:
      before: multiply-adds of the low-rank layers in a step now.
      after: likewise, when they are sliced.
      step_seconds: of a step now.
      step_flops: of the whole step; None takes it for the layers' alone.
      steps: that are left.
      compile_seconds: of a step.
    """
    if after >= before or 1 - after / before < self.min_saving:
      return False
    if self.reproducible:
      return True
    share = 2 * (before - after) / max(step_flops or 0, 2 * before)
    saved = share * step_seconds * steps
    return saved > self.payback * compile_seconds


def rehearse(
  params: PyTree,
  layers: Sequence[layers_lib.Layer],
  schedule: schedule_lib.Schedule,
  *,
  ranks: Callable[[schedule_lib.Event, layers_lib.Layer], int],
  compaction: Compaction = Compaction(),  # noqa: B008 (frozen)
) -> tuple[int, ...]:
  """When a run would compile its training step, told by shapes alone.

  Args:
    params: dense parameters, or their shapes.
    layers: that the method is used on.
    schedule: of the run, in which stability decides nothing.
    ranks: the logical rank that a layer has after an update.
    compaction: of the run; seconds are not known, hence have no part in it.

  Returns:
    The steps before which it is compiled, in order; the first is 0.

  Raises:
    ValueError: layers do not fit params.
  """
  policy = dataclasses.replace(compaction, reproducible=True)
  params = jax.eval_shape(lambda p: p, params)
  compiled, live = [0], {}
  for event in schedule.events():
    plan = schedule_lib.foresee(event, params, layers, schedule)
    if plan.converting:
      convert = functools.partial(transforms.to_lowrank, layers=layers)
      params = jax.eval_shape(
        functools.partial(convert, rank=plan.ranks), params
      )
      live = plan.ranks
      compiled.append(event.step)
    live |= {x.path: ranks(event, x) for x in layers if x.path in plan.pruned}
    small = policy.target(
      params,
      layers,
      live,
      step_seconds=0.0,
      step_flops=None,
      steps=schedule.steps - event.due,
      compile_seconds=0.0,
    )
    if small:
      nodes = transforms.low_rank_leaves(params)
      slice_ = lambda n, r: jax.eval_shape(
        functools.partial(transforms.sliced, rank=r), n
      )
      params = transforms.replaced(
        params, {p: slice_(x, small[p]) for p, x in nodes.items()}
      )
      compiled.append(event.due)
  return tuple(dict.fromkeys(s for s in compiled if s < schedule.steps))


def multiply_adds(
  params: PyTree,
  layers: Sequence[layers_lib.Layer],
  ranks: Mapping[str, int],
) -> int:
  """Of the low-rank layers in a step, at these ranks or those they have."""
  leaves = tree.flatten(params, lowrank.is_low_rank)
  return sum(
    layer.multiply_adds(ranks.get(layer.path, leaves[layer.path].rank))
    for layer in layers
    if lowrank.is_low_rank(leaves[layer.path])
  )
