"""One change of what a run trains, by a rule of one's own.

OIALR's transition is an event of its schedule. What other methods do once, such
as cutting every kernel to two factors, is a `Conversion`.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from oialr_jax import layers as layers_lib
from oialr_jax import lowrank
from oialr_jax import metrics
from oialr_jax import optimizer as optimizer_lib
from oialr_jax import tree
from oialr_jax.training import steps as steps_lib

Array = jax.Array
PyTree = Any
Layers = Sequence[layers_lib.Layer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
  """Once in a run, kernels become something else; `fit` does it.

      def cut(params, layers):
        return oialr.to_factors(oialr.to_lowrank(params, layers, rank=8))

      training.fit(..., conversion=training.Conversion(step=500, convert=cut))

  The optimiser begins anew, with moments of zero, and with it the count of its
  bias correction; the schedule of its rate goes on, and so do iterates that it
  keeps of parameters that `convert` returns as they are.

  Attributes:
    step: optimiser steps before it: 0 for none.
    convert: `(params, layers) -> params`, pure and traceable: the shapes that
      it returns follow from those that it is given.
    make_step: makes the step from then on; it takes what `train_step` takes.
    count: what there is to say of parameters from then on.
    keep_first: the first layer is not among those for convert, see `select`.
    keep_last: likewise of the last layer.

  Raises:
    ValueError: step is negative.
  """

  step: int
  convert: Callable[[PyTree, Layers], PyTree]
  make_step: Callable[..., Any] = steps_lib.train_step
  count: Callable[[PyTree], metrics.Counts] = metrics.count
  keep_first: bool = False
  keep_last: bool = True

  def __post_init__(self):
    if self.step < 0:
      raise ValueError(f'step={self.step}: must not be negative.')

  def apply(
    self,
    state: steps_lib.TrainState,
    *,
    layers: Layers,
    tx: optax.GradientTransformation,
  ) -> tuple[steps_lib.TrainState, dict[str, Array]]:
    """Does it; traceable.

    Args:
      state: before.
      layers: whose kernels are converted.
      tx: the optimiser, from `train_sigma`.

    Returns:
      The state after it, and ||W - W'||_F / ||W||_F of what is factored then.
    """
    params = self.convert(state.params, layers)
    opt_state = _restarted(tx, state.opt_state, state.params, params)
    new = dataclasses.replace(state, params=params, opt_state=opt_state)
    return new, _lost(state.params, params)


def _restarted(
  tx: optax.GradientTransformation, opt_state: PyTree, old: PyTree, new: PyTree
) -> PyTree:
  """The optimiser's state for new parameters, without what it has seen."""
  reset = optimizer_lib.transport(
    opt_state, old, old, policy=optimizer_lib.RESET
  )
  kept = tree.flatten(reset)  # such as the steps that a schedule has counted
  before = tree.flatten(old, lowrank.is_factored)
  # What is kept of a parameter, such as an iterate, is in its coordinates, and
  # a Sigma of full rank may have the kernel's shape.
  changed = tuple(
    f'/{path}'
    for path, x in tree.flatten(new, lowrank.is_factored).items()
    if not _is_same(x, before.get(path))
  )

  def pick(path, x):
    same = path in kept and kept[path].shape == x.shape
    return kept[path] if same and not path.endswith(changed) else x

  return tree.map_with_path(pick, tx.init(new))


def _is_same(one: Any, other: Any) -> bool:
  """Whether two leaves are of the same arrays."""
  ids = lambda x: [*map(id, jax.tree.leaves(x))]
  return ids(one) == ids(other)


def _lost(old: PyTree, new: PyTree) -> dict[str, Array]:
  """By path, how much of a kernel its factors lack."""
  nodes = tree.flatten(new, lowrank.is_factored)
  lost = {}
  for path, w in tree.flatten(old, lowrank.is_factored).items():
    if not lowrank.is_factored(w) and lowrank.is_factored(nodes.get(path)):
      norm = jnp.linalg.norm(lowrank.wide(w))
      error = lowrank.wide(w) - lowrank.wide(lowrank.materialise(nodes[path]))
      lost[path] = jnp.linalg.norm(error) / jnp.where(norm > 0, norm, 1)
  return lost
