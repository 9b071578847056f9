"""The jitted steps: pure functions of a state and a batch."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from oialr_jax import transforms
from oialr_jax.factored import Contraction
from oialr_jax.factored import factored  # the package's `factored` is this

Array = jax.Array
PyTree = Any
Batch = PyTree
Metrics = Mapping[str, Array]
# (params, model_state, batch, key) -> loss, (model_state, metrics)
LossFn = Callable[
  [PyTree, PyTree, Batch, Array], tuple[Array, tuple[PyTree, Metrics]]
]
# (params, model_state, batch) -> metrics, one number an example
EvalFn = Callable[[PyTree, PyTree, Batch], Metrics]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['step', 'params', 'opt_state', 'model_state'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step changes.

  Attributes:
    step: optimiser steps done, an int32 scalar.
    params: parameters, dense or low-rank.
    opt_state: of the optimiser, for `trainable(params)`.
    model_state: what else the model carries, such as batch statistics.
  """

  step: Array
  params: PyTree
  opt_state: PyTree
  model_state: PyTree


def train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  contraction: Contraction = 'auto',
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]:
  """Returns `step(state, batch, key) -> state, metrics`, to be jitted.

  Differentiated is with respect to `trainable(params)` alone, so that no
  gradient of a basis's size exists.

  Args:
    loss_fn: written for dense parameters; it is evaluated with the factors.
    tx: from `train_sigma`.
    contraction: see `factored`.
  """
  loss_fn = factored(loss_fn, contraction=contraction)

  def step(state: TrainState, batch: Batch, key: Array):
    key = jax.random.fold_in(key, state.step)
    old = transforms.trainable(state.params)

    def loss_of(t):
      params = transforms.with_trainable(state.params, t)
      return loss_fn(params, state.model_state, batch, key)

    grad = jax.value_and_grad(loss_of, has_aux=True)
    (loss, (model_state, metrics)), grads = grad(old)
    updates, opt_state = tx.update(grads, state.opt_state, old)
    new = optax.apply_updates(old, updates)
    state = TrainState(
      step=state.step + 1,
      params=transforms.with_trainable(state.params, new),
      opt_state=opt_state,
      model_state=model_state,
    )
    return state, {'loss': loss, **metrics}

  return step


def eval_step(
  eval_fn: EvalFn, contraction: Contraction = 'auto'
) -> Callable[[PyTree, PyTree, Batch], tuple[Metrics, Array]]:
  """Returns `step(params, model_state, batch) -> sums, count`, to be jitted.

  Examples whose `batch['mask']` is 0 are padding: they count as none.
  """
  eval_fn = factored(eval_fn, contraction=contraction)

  def step(params: PyTree, model_state: PyTree, batch: Batch):
    metrics = eval_fn(params, model_state, batch)
    mask = batch.get('mask') if isinstance(batch, Mapping) else None
    if mask is None:
      mask = jnp.ones(next(iter(metrics.values())).shape[:1])
    sums = {k: jnp.sum(jnp.where(mask > 0, v, 0)) for k, v in metrics.items()}
    return sums, jnp.sum(mask > 0)

  return step
