"""Singular value decompositions, as the transforms need them.

Batches of matrices `[b, m, n]`, float32 or wider, traceable. Matrices of equal
shapes are decomposed in one batched call, which is what an accelerator needs.
The decomposition is LAPACK's or cuSOLVER's; on TPUs, which have neither, it is
`jacobi.svd`.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.extend
from jax.interpreters import batching
from jax.interpreters import mlir
import jax.numpy as jnp

from oialr_jax import jacobi
from oialr_jax import lowrank
from oialr_jax import tree

Array = jax.Array
PyTree = Any


def svd(w: Array) -> tuple[Array, Array, Array]:
  """Thin SVD with signs made unique: `u [b, m, k], s [b, k], vt [b, k, n]`.

  In every column of U the entry of the largest magnitude is positive, so that
  the SVD of a falling diagonal is the identity and devices agree. Of a matrix
  that could not be decomposed, s is NaN.
  """
  u, s, vt = _svd_p.bind(w, vectors=True)
  largest = jnp.argmax(jnp.abs(u), axis=-2, keepdims=True)
  sign = jnp.where(jnp.take_along_axis(u, largest, axis=-2) < 0, -1, 1)
  sign = sign.astype(u.dtype)
  return u * sign, s, vt * jnp.swapaxes(sign, -1, -2)


def singular_values(w: Array) -> Array:
  """The singular values of `w [b, m, n]`, falling: `[b, k]`."""
  return _svd_p.bind(w, vectors=False)[0]


def svd_live(s: Array, live: Array) -> tuple[Array, Array, Array]:
  """SVD of sigma's live block, as matrices of sigma's full size.

  The pruned directions `~live [b, r]` are the last ones, and stay so: singular
  vectors of tiny singular values must not mix with them. They are given the
  largest singular values for the decomposition, then rolled to the end.
  """
  r = s.shape[-1]
  both = live[:, :, None] & live[:, None, :]
  s = jnp.where(both, s, 0)
  top = 2 * jnp.linalg.norm(s, axis=(-2, -1), keepdims=True)
  pad = jnp.where(live[:, :, None], 0, jnp.eye(r, dtype=s.dtype)[None])
  u, sv, vt = svd(s + pad * jnp.where(top > 0, top, 1))
  order = jnp.arange(r)[None] + r - jnp.sum(live, axis=-1, keepdims=True)
  keep = order < r
  order = jnp.where(keep, order, order - r)
  roll = functools.partial(jnp.take_along_axis, mode='promise_in_bounds')
  u = jnp.where(keep[:, None], roll(u, order[:, None], axis=-1), 0)
  rows = jnp.concatenate([vt, sv[:, :, None]], axis=-1)
  rows = jnp.where(keep[..., None], roll(rows, order[..., None], axis=-2), 0)
  return u, rows[..., -1], rows[..., :-1]


def diagonal(s: Array) -> Array:
  """The diagonals of `s [..., r, r]`, `[..., r]`: a slice, and no gather."""
  *batch, r, _ = s.shape
  return s.reshape(*batch, r * r)[..., :: r + 1]


def diagonal_matrix(values: Array) -> Array:
  """Of `values [..., r]` the matrices `[..., r, r]` that have this diagonal."""
  eye = jnp.eye(values.shape[-1], dtype=bool)
  return jnp.where(eye, values[..., None], 0)


def polar(w: Array) -> Array:
  """The orthogonal polar factor U V^T of `w [b, m, n]`."""
  u, s, vt = svd(w)
  # A direction with no length has no basis: it counts as pruned.
  found = above_rounding(s, max(w.shape[-2:]))
  return lowrank.matmul(jnp.where(found[:, None, :], u, 0), vt)


def above_rounding(s: Array, size: int) -> Array:
  """Which `s [b, k]` are more than the rounding errors of a size x size SVD.

  The rule of `np.linalg.matrix_rank`.
  """
  return s > s[:, :1] * size * jnp.finfo(s.dtype).eps


def drift(u: Array) -> Array:
  """max |U^T U - I| over the live columns of `u [b, m, r]`, as `[b]`."""
  gram = lowrank.matmul(lowrank.transpose(u), u)
  eye = jnp.eye(u.shape[-1], dtype=u.dtype)[None]
  # A pruned column has no product with any, a live one has one with itself.
  apart = jnp.where(gram == 0, 0, jnp.abs(gram - eye))
  return jnp.max(apart, axis=(-2, -1), initial=0)


def qr_live(u: Array) -> tuple[Array, Array]:
  """QR with pruned columns left at zero: `q [b, m, r], triangle [b, r, r]`.

  The triangle's diagonal is positive, so that q is close to a u that has
  drifted only a little, with no sign flipped.
  """
  q, triangle = jnp.linalg.qr(u)
  live = lowrank.live(u)
  sign = jnp.where(diagonal(triangle) < 0, -1, 1).astype(u.dtype)
  return (
    jnp.where(live[:, None, :], q * sign[:, None, :], 0),
    jnp.where(live[:, :, None], triangle * sign[:, :, None], 0),
  )


def by_shape(
  f: Callable[..., tuple[Array, ...]],
  operands: Mapping[str, tuple[Array, ...]],
  *,
  decomposes: bool = True,
) -> dict[str, tuple[Array, ...]]:
  """Calls f once for all the operands of equal shapes, joined along axis 0.

  Args:
    f: from arrays `[b, ...]` to a tuple of arrays `[b, ...]`.
    operands: per path, the arguments of f; the same b in all of them.
    decomposes: whether f has SVDs or QRs, so that one call must be `after` the
      other. Of f's results the first depends on all of them.

  Returns:
    Per path, what f returned for its part of the batch.
  """
  groups = {}
  for path, arrays in operands.items():
    key = tuple((a.shape[1:], str(a.dtype)) for a in arrays)
    groups.setdefault(key, []).append(path)
  results, out = {}, None
  for paths in groups.values():
    joined = [jnp.concatenate(xs) for xs in zip(*(operands[p] for p in paths))]
    wait = decomposes and out is not None
    out = f(*(after(out[0], joined) if wait else joined))
    start = 0
    for path in paths:
      stop = start + operands[path][0].shape[0]
      results[path] = tuple(x[start:stop] for x in out)
      start = stop
  return {path: results[path] for path in operands}


def after(done: PyTree, arrays: PyTree) -> PyTree:
  """The arrays, in a program not to be had before all of `done` is.

  Two SVDs or QRs that XLA's CPU runtime runs at once can wait for each other for
  ever: each holds threads of the pool, and wants those of the other. Neither
  `optimization_barrier` nor flags keep it from doing so.
  """
  if tree.is_concrete((done, arrays)):
    return arrays
  # No entry of a decomposition is there before it is done.
  entry = lambda x: jax.lax.slice(x, [0] * x.ndim, [min(n, 1) for n in x.shape])
  never = sum(jnp.count_nonzero(entry(x)) for x in jax.tree.leaves(done)) < 0
  return jax.tree.map(lambda x: jnp.where(never, 0, x), arrays)


# An SVD whose algorithm is chosen when a program is lowered for its platform.
# `platform_dependent` would do, but traces what is not taken as well: 30 ms for
# every new shape, and events are full of new shapes.
_svd_p = jax.extend.core.Primitive('svd')
_svd_p.multiple_results = True
_compiled = jax.jit(_svd_p.bind, static_argnames='vectors')


@_svd_p.def_impl
def _eager(w, *, vectors):
  # Under `jax.disable_jit` the compiled function would come back here for ever.
  with jax.disable_jit(False):
    return _compiled(w, vectors=vectors)


@_svd_p.def_abstract_eval
def _shapes(w, *, vectors):
  *batch, m, n = w.shape
  k = min(m, n)

  def of(*shape):
    spec = jax.P(*w.sharding.spec[: len(batch)], *(None for _ in shape))
    return w.update(
      shape=(*batch, *shape),
      weak_type=False,
      sharding=w.sharding.update(spec=spec),
    )

  return (of(m, k), of(k), of(k, n)) if vectors else (of(k),)


def _by_library(w, *, vectors):
  found = jnp.linalg.svd(w, full_matrices=False, compute_uv=vectors)
  return tuple(found) if vectors else (found,)


def _by_rotations(w, *, vectors):
  found = jacobi.svd(w.reshape(-1, *w.shape[-2:]))
  found = [x.reshape(*w.shape[:-2], *x.shape[1:]) for x in found]
  return found if vectors else found[1:2]


def _batched(arrays, axes, *, vectors):
  found = _svd_p.bind(jnp.moveaxis(*arrays, *axes, 0), vectors=vectors)
  return found, [0] * len(found)


_rule = functools.partial(mlir.lower_fun, multiple_results=True)
mlir.register_lowering(_svd_p, _rule(_by_library))
mlir.register_lowering(_svd_p, _rule(_by_rotations), platform='tpu')
batching.primitive_batchers[_svd_p] = _batched
