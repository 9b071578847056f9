"""When pruned directions are sliced away, which compiles the step anew."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from oialr_jax import layers as layers_lib
from oialr_jax import lowrank
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

  min_saving: float = 0.1
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
