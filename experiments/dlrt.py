"""Dynamical low-rank training: bases that turn, and ranks that adapt.

W = U S V^T. A step of the rank-adaptive integrator (arXiv 2205.13571,
Algorithm 1) is, for all layers at once,

  K-step   U' = orth [U, K - h dL/dK],   K = U S,    dL/dK = (dL/dW) V
  L-step   V' = orth [V, L - h dL/dL],   L = V S^T,  dL/dL = (dL/dW)^T U
  S-step   S' = (U'^T U) S (V^T V'), then a step of the optimiser by dL/dS'
  then     P Q R^T = svd(S'), of which as many directions are kept as
           ||(q_{r+1}, ...)||_2 > tau ||q||_2 demands:  U = U' P,  V = V' R

so that the rank may double in a step. span [U, K - h dL/dK] = span [U, dL/dK],
whatever the step h, so that K and L want neither rate nor moments. K = U S and
L = V S^T make the same network, so that one backward pass gives both gradients.

Shapes never change: U `[m, R]` and V^T `[R, n]` are buffers of the largest rank
R, with the live directions first and zeros behind, and the bases of the S-step
have 2 R directions, or what there is. So a step takes as long at any rank.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import methods
import oialr_jax as oialr
from oialr_jax import linalg
from oialr_jax import lowrank
from oialr_jax import training
from oialr_jax import transforms

Array = jax.Array
PyTree = Any
Pair = tuple[Array, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dlrt(methods.Method):
  """Dynamical low-rank training of the layers that OIALR takes, from step 0.

  Attributes:
    tau: the share of ||S||_F that a step may cut off.
    rank: the largest, with which it begins, a number or a share of min(m, n).

  Raises:
    ValueError: a value is out of range.
  """

  tau: float = 0.1
  rank: methods.Rank = 0.25

  def __post_init__(self):
    methods.check_rank(self.rank)
    if not 0 <= self.tau < 1:
      raise ValueError(f'tau={self.tau}: must be in [0, 1).')

  def arguments(self, schedule: oialr.Schedule) -> dict[str, Any]:
    convert = lambda params, layers: oialr.to_lowrank(
      params, layers, rank=methods.ranks(layers, self.rank)
    )
    make_step = functools.partial(train_step, tau=self.tau)
    more = dict(make_step=make_step, count=_count)
    return {'conversion': methods.conversion(schedule, 0, convert, **more)}


def train_step(
  loss_fn: training.LossFn,
  tx: optax.GradientTransformation,
  contraction: Any = 'auto',
  *,
  tau: float,
  accumulate: int = 1,
  remat: bool | Callable[..., Any] = False,
  shards: int = 1,
  gather: Callable[[PyTree], PyTree] | None = None,
) -> Callable[..., Any]:
  """Returns the step for parameters with `LowRank` leaves; see the module.

  Moments follow the bases, as in `oialr.transport`; those of new directions are
  zero.

  Args:
    loss_fn: see `training.train_step`, as of all but tau.
    tx: see there; it does the S-step.
    contraction: see there.
    tau: the share of ||S||_F that a step may cut off.
    accumulate: must be 1.
    remat: see there; of the S-step.
    shards: see there.
    gather: see there.

  Raises:
    ValueError: accumulate is not 1.
  """
  check_accumulate(accumulate)
  s_step = training.train_step(
    loss_fn, tx, contraction, remat=remat, shards=shards, gather=gather
  )
  low_rank = oialr.factored(loss_fn, contraction=contraction, shards=shards)
  loss = low_rank
  if gather is not None:
    loss = lambda params, *rest: low_rank(gather(params), *rest)

  def step(state: training.TrainState, batch: Any, key: Array):
    old = state.params
    args = state.model_state, batch, jax.random.fold_in(key, state.step)
    state = _moved_to(state, augmented(old, _directions(loss, old, args)))
    state, metrics = s_step(state, batch, key)
    state = _moved_to(state, truncated(state.params, old, tau))
    nodes = transforms.low_rank_leaves(state.params).values()
    rank = jnp.stack([transforms.live_rank(x) for x in nodes])
    return state, metrics | {'rank': jnp.mean(rank.astype(jnp.float32))}

  return step


def check_accumulate(accumulate: int):
  """Raises ValueError if a batch is not to be taken as a whole."""
  if accumulate != 1:
    raise ValueError(
      f'accumulate={accumulate}: a step of dynamical low-rank training takes a '
      'batch as a whole; pass 1.'
    )


def _moved_to(
  state: training.TrainState, params: PyTree
) -> training.TrainState:
  """The state with the same kernels in other bases."""
  opt_state = oialr.transport(state.opt_state, state.params, params)
  return dataclasses.replace(state, params=params, opt_state=opt_state)


def augmented(params: PyTree, more: Mapping[str, Pair]) -> PyTree:
  """The same kernels in bases that contain further directions.

  Args:
    params: parameters with `LowRank` leaves, live directions first.
    more: by path, columns for U in the shape of U, and rows for V^T likewise.

  Returns:
    params with R' = min(2 R, max(m, n)) directions, orthonormal where there are
    so many, and zero behind.
  """
  nodes = transforms.low_rank_leaves(params)
  operands = {}
  for path, node in nodes.items():
    left, right = more[path]
    b, m, n = lowrank.matrix_shape(node)
    operands[path] = (
      *lowrank.matrices(node),
      lowrank.wide(left).reshape(b, m, node.rank),
      lowrank.wide(right).reshape(b, node.rank, n),
    )
  return _mapped(params, _augmented, operands)


def truncated(params: PyTree, like: PyTree, tau: float) -> PyTree:
  """The kernels with the fewest directions, in the buffers of another tree.

  Args:
    params: parameters with `LowRank` leaves.
    like: parameters with the buffers.
    tau: the share of ||S||_F that may be cut off.
  """
  sizes = transforms.low_rank_leaves(like)
  nodes = transforms.low_rank_leaves(params)
  operands = {
    # The size of a buffer is that of an array, so that `by_shape` sees it.
    path: (*lowrank.matrices(node), lowrank.matrices(sizes[path])[1])
    for path, node in nodes.items()
  }
  return _mapped(params, functools.partial(_truncated, tau=tau), operands)


def _directions(loss_fn, params: PyTree, args: tuple) -> dict[str, Pair]:
  """dL/dK and (dL/dL)^T by path, at K = U S and L = V S^T."""
  nodes = transforms.low_rank_leaves(params)

  def loss_of(deltas):
    moved = {path: _perturbed(nodes[path], *deltas[path]) for path in nodes}
    return loss_fn(transforms.replaced(params, moved), *args)[0]

  zeros = {
    p: (jnp.zeros_like(x.u), jnp.zeros_like(x.vt)) for p, x in nodes.items()
  }
  return jax.grad(loss_of)(zeros)


def _perturbed(node: oialr.LowRank, dk: Array, dlt: Array) -> oialr.Factors:
  """(U S + dK) V^T + U dL^T, as two factors of twice the rank."""
  u, s, _ = lowrank.matrices(node)
  k = lowrank.matmul(u, s).reshape(node.u.shape).astype(node.dtype)
  a = jnp.concatenate([k + dk, node.u], axis=-1)
  b = jnp.concatenate([node.vt, dlt], axis=node.s.ndim - 2)
  return oialr.Factors(a, b, node.view)


def _augmented(u, s, vt, k, lt):
  size = min(2 * s.shape[-1], max(u.shape[-2], vt.shape[-1]))
  right = _basis(lowrank.transpose(vt), lowrank.transpose(lt), size)
  # One QR after the other, see there.
  left = _basis(*linalg.after(right, (u, k)), size)
  # U' begins with U and V' with V: S' is S, and zero for what is new.
  return left, _padded(s, size, size), lowrank.transpose(right)


def _basis(q: Array, more: Array, size: int) -> Array:
  """An orthonormal basis `[b, m, size]` of both, q first and zeros last."""
  columns = jnp.concatenate([q, more], axis=-1)
  order = jnp.argsort(~lowrank.live(columns), axis=-1, stable=True)
  columns = jnp.take_along_axis(columns, order[:, None], axis=-1)
  # Of more columns than rows the first span everything.
  basis, _ = linalg.qr_live(columns[..., : q.shape[-2]])
  return _padded(basis, q.shape[-2], size)


def _truncated(u, s, vt, like, tau):
  rank, size = like.shape[-1], max(u.shape[-2], vt.shape[-1])
  p, values, qt = linalg.svd(s)
  # ||(q_i, q_{i+1}, ...)||_2
  rest = jnp.sqrt(jnp.cumsum(jnp.square(values)[:, ::-1], axis=-1)[:, ::-1])
  keep = (rest > tau * rest[:, :1]) & linalg.above_rounding(values, size)
  keep = keep.at[:, 0].set(True)[:, :rank]
  return (
    jnp.where(keep[:, None, :], lowrank.matmul(u, p)[..., :rank], 0),
    linalg.diagonal_matrix(jnp.where(keep, values[:, :rank], 0)),
    jnp.where(keep[:, :, None], lowrank.matmul(qt, vt)[:, :rank], 0),
  )


def _mapped(
  params: PyTree,
  fn: Callable[..., Any],
  operands: Mapping[str, tuple[Array, ...]],
) -> PyTree:
  """params with what fn makes of matrices, by path."""
  nodes = transforms.low_rank_leaves(params)
  found = linalg.by_shape(fn, operands)
  return transforms.replaced(
    params,
    {p: lowrank.from_matrices(nodes[p], *out) for p, out in found.items()},
  )


def _padded(x: Array, rows: int, cols: int) -> Array:
  pad = rows - x.shape[-2], cols - x.shape[-1]
  return jnp.pad(x, [(0, 0), (0, pad[0]), (0, pad[1])])


def _count(params: PyTree) -> oialr.Counts:
  """All of U, S and V^T trains."""
  counts = oialr.count(params)
  return counts._replace(trainable=counts.stored)
