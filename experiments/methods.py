"""The methods that OIALR is compared with, on the same model, data and rate.

Each is a frozen dataclass, made from the section of the configuration that has
its name. They take the layers that OIALR takes and, unless they say otherwise,
begin at OIALR's transition. A rank is the same thing for all of them: an int,
the number of directions of every layer (of a smaller one all that it has), or a
float, the share of min(m, n).
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import oialr_jax as oialr
from oialr_jax import training
from oialr_jax import tree

PyTree = Any
Rank = int | float
Layers = Sequence[oialr.Layer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam:
  """The optimiser of all methods, made with a rate.

  Attributes:
    clip: the largest norm of all gradients; None for any.
    weight_decay: of AdamW; None is Adam.
  """

  clip: float | None = None
  weight_decay: float | None = None

  def __call__(
    self,
    rate: optax.ScalarOrSchedule,
    scale_by: optax.GradientTransformation | None = None,
  ) -> optax.GradientTransformation:
    """The optimiser.

    Args:
      rate: the learning rate.
      scale_by: takes the place of `optax.scale_by_adam`.
    """
    parts = [optax.scale_by_adam() if scale_by is None else scale_by]
    if self.weight_decay is not None:
      parts.append(optax.add_decayed_weights(self.weight_decay))
    adam = optax.chain(*parts, optax.scale_by_learning_rate(rate))
    if self.clip is None:
      return adam
    return optax.chain(optax.clip_by_global_norm(self.clip), adam)


class Method:
  """How a network is trained: what is said to `training.fit`."""

  def arguments(self, schedule: oialr.Schedule) -> dict[str, Any]:
    """Arguments beside model, data and optimiser.

    Args:
      schedule: OIALR's on the same run.

    Raises:
      ValueError: the settings make no sense for this run.
    """
    del schedule
    return {}

  def wrapped(self, fn: Callable[..., Any]) -> Callable[..., Any]:
    """The loss, or the evaluation, as the method wants it."""
    return fn

  def optimizer(
    self, adam: Adam, rate: optax.Schedule, layers: Callable[[], Layers]
  ) -> optax.GradientTransformation:
    """The optimiser.

    Args:
      adam: that of the run.
      rate: the learning rate.
      layers: finds those that OIALR takes.
    """
    del layers
    return adam(rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedRank(Method):
  """U Sigma V^T of a rank that never changes; Sigma trains.

  As by OIALR, bases are updated every so often, but nothing is pruned.

  Attributes:
    rank: of every layer, a number or a share of min(m, n).
  """

  rank: Rank = 0.5

  def __post_init__(self):
    check_rank(self.rank)

  def arguments(self, schedule: oialr.Schedule) -> dict[str, Any]:
    fixed = dict(rank=self.rank, prune_at_transition=False)
    return {'schedule': dataclasses.replace(schedule, **fixed)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SvdPrune(Method):
  """Low-rank pruning: dense training, one truncated SVD, then A and B train.

  Attributes:
    rank: of every layer, a number or a share of min(m, n).
  """

  rank: Rank = 0.07

  def __post_init__(self):
    check_rank(self.rank)

  def arguments(self, schedule: oialr.Schedule) -> dict[str, Any]:
    cut = functools.partial(compress, rank=self.rank)
    return {'conversion': conversion(schedule, schedule.delay_steps, cut)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SvdInit(Method):
  """A B from the first step on, of the SVD of what a kernel is initialised to.

  The spectral initialisation of arXiv 2105.01029.

  Attributes:
    rank: of every layer, a number or a share of min(m, n).
  """

  rank: Rank = 0.07

  def __post_init__(self):
    check_rank(self.rank)

  def arguments(self, schedule: oialr.Schedule) -> dict[str, Any]:
    cut = functools.partial(compress, rank=self.rank)
    return {'conversion': conversion(schedule, 0, cut)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Galore(Method):
  """Dense kernels, with Adam's moments of projected gradients alone.

  By `optax.contrib.scale_by_galore` (arXiv 2403.03507). It knows no stacks of
  matrices: those, and what is no kernel of a layer, Adam trains.

  Attributes:
    rank: of the projections, a number or a share of min(m, n).
    every: steps between projections.
    scale: of the updates, alpha of the paper.

  Raises:
    ValueError: a value is out of range.
  """

  rank: Rank = 0.25
  every: int = 200
  scale: float = 0.25

  def __post_init__(self):
    check_rank(self.rank)
    if self.every < 1:
      raise ValueError(f'every={self.every}: must be at least 1 step.')
    if not self.scale > 0:
      raise ValueError(f'scale={self.scale}: must be positive.')

  def optimizer(
    self, adam: Adam, rate: optax.Schedule, layers: Callable[[], Layers]
  ) -> optax.GradientTransformation:
    return adam(rate, scale_by=self.scale_by(layers()))

  def scale_by(self, layers: Layers) -> optax.GradientTransformation:
    """What takes the place of `optax.scale_by_adam`."""
    layers = {x.path: x for x in layers if x.stack == 1}
    rank_of = ranks(layers.values(), self.rank)
    numbers = lambda params: tree.map_with_path(
      lambda path, _: contrib.GaLoreDimensionNumbers(
        layers[path].rows, layers[path].cols
      ),
      params,
    )
    projected = {
      f'rank {rank}': contrib.scale_by_galore(
        rank, self.every, self.scale, weight_dimension_numbers=numbers
      )
      for rank in rank_of.values()
    }
    # What is not projected is kept apart: scale_by_galore would give it empty
    # projections, which Orbax refuses to save.
    label = lambda path: f'rank {rank_of[path]}' if path in rank_of else 'rest'
    return optax.partition(
      projected | {'rest': optax.scale_by_adam()},
      lambda params: tree.map_with_path(lambda path, _: label(path), params),
    )


def conversion(
  schedule: oialr.Schedule,
  step: int,
  convert: Callable[[PyTree, Layers], PyTree],
  **more: Any,
) -> training.Conversion:
  """A conversion of the layers that OIALR takes."""
  return training.Conversion(
    step=step,
    convert=convert,
    keep_first=schedule.keep_first,
    keep_last=schedule.keep_last,
    **more,
  )


def check_rank(rank: Rank):
  """Raises ValueError for what is no rank."""
  if not (0 < rank <= 1 if isinstance(rank, float) else rank >= 1):
    raise ValueError(
      f'rank={rank}: must be a number of directions, at least 1, or, as a '
      'float, a share of min(m, n) in (0, 1].'
    )


def ranks(layers: Layers, rank: Rank) -> dict[str, int]:
  """Of every layer: so many, but at most what it has, or that share of it."""
  share = isinstance(rank, float)
  return {
    x.path: max(1, round(rank * x.max_rank)) if share else min(rank, x.max_rank)
    for x in layers
  }


def compress(params: PyTree, layers: Layers, rank: Rank) -> PyTree:
  """Kernels as A B, A = U sqrt(S) and B = sqrt(S) V^T of a truncated SVD.

  A kernel whose factors would be no smaller stays dense, of the rank.

  Args:
    params: dense parameters.
    layers: whose kernels are compressed.
    rank: of every layer, a number or a share of min(m, n).
  """
  low = oialr.to_lowrank(params, layers, rank=ranks(layers, rank))
  is_factors = lambda x: isinstance(x, oialr.Factors)
  return jax.tree.map(
    lambda x: _balanced(x) if is_factors(x) else x,
    oialr.to_factors(low),
    is_leaf=is_factors,
  )


def _balanced(x: oialr.Factors) -> oialr.Factors:
  """(A / c) (c B), with columns and rows of equal norms; A = U S, B = V^T."""
  rows = tuple(range(x.a.ndim - 1 - len(x.view.rows), x.a.ndim - 1))
  root = jnp.sqrt(jnp.sqrt(jnp.sum(jnp.square(x.a), axis=rows)))
  root = jnp.where(root > 0, root, 1)
  return oialr.Factors(
    x.a / jnp.expand_dims(root, rows),
    x.b * root.reshape(*root.shape, *(1,) * (x.b.ndim - root.ndim)),
    x.view,
  )
