"""The jitted steps: pure functions of a state and a batch."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from oialr_jax import lowrank
from oialr_jax import sharding
from oialr_jax import transforms
from oialr_jax import tree
from oialr_jax.factored import Contraction
from oialr_jax.factored import factored  # the package's `factored` is this
from oialr_jax.training import recorder

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
# (opt_state, trainable(params)) -> what is evaluated in its place
EvalParams = Callable[[PyTree, PyTree], PyTree]


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
  *,
  accumulate: int = 1,
  remat: bool | Callable[..., Any] = False,
  shards: int = 1,
  gather: Callable[[PyTree], PyTree] | None = None,
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]:
  """Returns `step(state, batch, key) -> state, metrics`, to be jitted.

  Differentiated is with respect to `trainable(params)` alone, so that no
  gradient of a basis's size exists.

  Args:
    loss_fn: written for dense parameters; it is evaluated with the factors.
    tx: from `train_sigma`; its `update` is given the loss as `value`.
    contraction: see `factored`.
    accumulate: parts that a batch is cut into, one after the other: the step is
      that of the means of their losses and gradients. What the model carries
      goes from one to the next.
    remat: what of the forward pass is not kept but computed again: nothing, or,
      with True, all but the results of products with weights; or a policy of
      `jax.checkpoint_policies`. A model's own `jax.checkpoint` saves more.
    shards: see `factored`.
    gather: `Placement.gather`, for parameters that are split: they are put
      together for the forward pass and again for the backward pass.

  Raises:
    ValueError: accumulate is less than 1, or does not divide the batch.
  """
  if accumulate < 1:
    raise ValueError(f'accumulate={accumulate}: must be at least 1.')
  tx = optax.with_extra_args_support(tx)
  loss_fn = factored(loss_fn, contraction=contraction, shards=shards)
  if gather is not None:
    whole = loss_fn
    loss_fn = lambda params, *rest: whole(gather(params), *rest)
  if remat or gather is not None:
    loss_fn = jax.checkpoint(loss_fn, policy=_policy(remat))

  def gradients(
    state: TrainState, model_state: PyTree, batch: Batch, key: Array
  ):
    def loss_of(t):
      params = transforms.with_trainable(state.params, t)
      return loss_fn(params, model_state, batch, key)

    grad = jax.value_and_grad(loss_of, has_aux=True)
    out, grads = grad(transforms.trainable(state.params))
    loss, (model_state, metrics) = out
    return model_state, (grads, {'loss': loss, **metrics})

  def accumulated(state: TrainState, batch: Batch, key: Array):
    def one(carry, part):
      model_state, sums = carry
      found = gradients(state, model_state, part[0], part[1])
      model_state, (grads, metrics) = found
      return (model_state, jax.tree.map(jnp.add, sums, grads)), metrics

    parts = _parts(batch, accumulate), jax.random.split(key, accumulate)
    like = transforms.trainable(state.params)
    zeros = jax.tree.map(lambda x: jnp.zeros_like(lowrank.wide(x)), like)
    init = state.model_state, zeros
    (model_state, sums), metrics = jax.lax.scan(one, init, parts)
    mean = lambda total, x: (total / accumulate).astype(x.dtype)
    grads = jax.tree.map(mean, sums, like)
    metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics)
    return model_state, (grads, metrics)

  def step(state: TrainState, batch: Batch, key: Array):
    key = jax.random.fold_in(key, state.step)
    if accumulate == 1:
      found = gradients(state, state.model_state, batch, key)
    else:
      found = accumulated(state, batch, key)
    model_state, (grads, metrics) = found
    updates, opt_state = tx.update(
      grads, state.opt_state, state.params, value=metrics['loss']
    )
    new = optax.apply_updates(transforms.trainable(state.params), updates)
    state = TrainState(
      step=state.step + 1,
      params=transforms.with_trainable(state.params, new),
      opt_state=opt_state,
      model_state=model_state,
    )
    return state, metrics

  return step


def checked(loss_fn: LossFn) -> LossFn:
  """The loss; what it returns is checked when it is traced."""

  @functools.wraps(loss_fn)
  def checked_loss(params, model_state, batch, key):
    out = loss_fn(params, model_state, batch, key)
    match out:
      case (loss, (_, Mapping() as metrics)) if jnp.shape(loss) == ():
        recorder.check_names(metrics)
        return out
    found = jax.tree.map(lambda x: f'{jnp.shape(x)}', out)
    raise ValueError(
      'loss_fn must return `loss, (model_state, metrics)`: a scalar, what the '
      f'model carries and a dict of scalars; of these shapes it is: {found}.'
    )

  return checked_loss


def eval_step(
  eval_fn: EvalFn, contraction: Contraction = 'auto', *, shards: int = 1
) -> Callable[[PyTree, PyTree, Batch], tuple[Metrics, Array]]:
  """Returns `step(params, model_state, batch) -> sums, count`, to be jitted.

  Examples whose `batch['mask']` is 0 are padding: they count as none.

  Raises:
    ValueError: a metric is not one number an example, or has the name of
      something else in the records.
  """
  eval_fn = factored(eval_fn, contraction=contraction, shards=shards)

  def step(params: PyTree, model_state: PyTree, batch: Batch):
    metrics = eval_fn(params, model_state, batch)
    recorder.check_names(metrics, 'eval_fn')
    for name, values in metrics.items():
      if jnp.ndim(values) != 1:
        raise ValueError(
          f'eval_fn: {name!r} is of shape {jnp.shape(values)}; must be one '
          'number an example, of shape (examples,): means are taken here.'
        )
    mask = batch.get('mask') if isinstance(batch, Mapping) else None
    if mask is None:
      mask = jnp.ones(next(iter(metrics.values())).shape[:1])
    total = lambda v: jnp.sum(jnp.where(mask > 0, lowrank.wide(v), 0))
    return {k: total(v) for k, v in metrics.items()}, jnp.sum(mask > 0)

  return step


def loss_step(
  loss_fn: LossFn, contraction: Contraction = 'auto', *, shards: int = 1
) -> Callable[[TrainState, Batch, Array], Array]:
  """Returns `loss(state, batch, key)`, the loss alone, to be jitted."""
  loss_fn = factored(loss_fn, contraction=contraction, shards=shards)
  return lambda state, batch, key: loss_fn(
    state.params, state.model_state, batch, key
  )[0]


def _parts(batch: Batch, count: int) -> Batch:
  """The batch as `[count, examples, ...]`, every count-th example in a part.

  So each device has its share of every part in what it has of the batch.
  """

  def cut(path, x):
    if not jnp.ndim(x):
      return jnp.broadcast_to(x, (count,))
    if len(x) % count:
      raise ValueError(
        f'accumulate={count}: does not divide the {len(x)} examples of '
        f'batch[{path!r}].'
      )
    return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)

  return tree.map_with_path(cut, batch)


def _policy(remat: bool | Callable[..., Any]) -> Callable[..., Any]:
  """What of the forward pass is kept."""
  if not remat:
    policies = jax.checkpoint_policies
    return policies.save_anything_except_these_names(sharding.GATHERED)
  return remat if callable(remat) else _products_with_weights


def _products_with_weights(primitive, *operands: Any, **params: Any) -> bool:
  """The policy of `jax.checkpoint` that keeps these alone."""
  if primitive.name == 'conv_general_dilated':
    return True
  dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return dots(primitive, *operands, **params)
