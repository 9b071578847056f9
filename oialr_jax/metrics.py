"""What there is to see of a network's bases: stability, ranks, counts, spectra.

Bases are matrices `[b, m, n]` (b = 1 unless kernels are stacked), in float32.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from oialr_jax import layers as layers_lib
from oialr_jax import linalg
from oialr_jax import lowrank
from oialr_jax import spread
from oialr_jax import transforms
from oialr_jax import tree

Array = jax.Array
PyTree = Any


class Counts(NamedTuple):
  """Numbers of parameters.

  Attributes:
    trainable: Sigma, biases, norms, dense kernels.
    stored: in all arrays as they are, bases and zeroed directions included.
    dense: of the dense model.
  """

  trainable: int
  stored: int
  dense: int


def ranks(params: PyTree) -> dict[str, int]:
  """The logical rank of every low-rank leaf; of a stack, the largest one."""
  return transforms.compact_ranks(params)


def count(params: PyTree, ranks: Mapping[str, int] | None = None) -> Counts:
  """Counts parameters; shapes (without values) will do.

  Args:
    params: pytree of parameters.
    ranks: of low-rank leaves by path, where directions are zeroed that are not
      sliced away yet: then r x r of a Sigma are trainable, whatever its size.

  Raises:
    KeyError: a path is not that of a low-rank leaf.
  """
  size = lambda t: sum(x.size for x in jax.tree.leaves(t) if hasattr(x, 'size'))
  leaves = jax.tree.leaves(params, is_leaf=lowrank.is_factored)
  nodes, idle = transforms.low_rank_leaves(params), 0
  for path, rank in (ranks or {}).items():
    sigma = nodes[path].s
    idle += sigma.size - math.prod(sigma.shape[:-2]) * rank**2
  return Counts(
    trainable=size(transforms.trainable(params)) - idle,
    stored=size(params),
    dense=sum(x.size for x in leaves if hasattr(x, 'size')),
  )


def basis(
  params: PyTree, layers: Sequence[layers_lib.Layer]
) -> dict[str, Array]:
  """U V^T of every layer, dense or low-rank: the polar factor of W.

  Args:
    params: pytree of parameters.
    layers: of which kernels.

  Returns:
    `[b, m, n]` by path (paper, Section 3). Pruned directions are left out, so
    that a basis of rank r has Frobenius norm sqrt(r).

  Raises:
    ValueError: a path is unknown.
  """
  leaves = _leaves(params, layers)
  dense, mixing = {}, {}
  for layer in layers:
    x = leaves[layer.path]
    if lowrank.is_low_rank(x):
      mixing[layer.path] = lowrank.matrices(x)
    else:
      dense[layer.path] = (_matrix(x, layer),)
  found = spread.by_shape(_dense_basis, dense)
  found |= spread.by_shape(_low_rank_basis, mixing)
  return {layer.path: found[layer.path][0] for layer in layers}


def stability(
  old: Mapping[str, Array], new: Mapping[str, Array]
) -> dict[str, Array]:
  """How little the bases have turned: in [-1, 1], 1 for the same basis.

  tr(B_old^T B_new) / min(r_old, r_new), with r = ||B||_F^2 the rank of a basis,
  the mean over a stack. At full rank that is the paper's measure (Section 3);
  where directions were pruned, it is that of the ones that are left (D8).

  Args:
    old: from `basis`.
    new: likewise; paths that only one of them has are left out.

  Returns:
    A scalar by path.

  Raises:
    ValueError: the two have no path in common, or a shape differs.
  """
  return {path: _turned(old[path], new[path]) for path in _common(old, new)}


def mixing(
  params: PyTree, layers: Sequence[layers_lib.Layer]
) -> dict[str, Array]:
  """The factor R of W = Q R, in the tall orientation, by path: `[b, k, k]`.

  k = min(m, n); the diagonal of R is positive, so that R is unique.

  Raises:
    ValueError: a path is unknown.
  """
  leaves = _leaves(params, layers)
  kernels = {x.path: (_matrix(leaves[x.path], x),) for x in layers}
  found = spread.by_shape(_triangle, kernels)
  return {path: out[0] for path, out in found.items()}


def r_distance(
  old: Mapping[str, Array], new: Mapping[str, Array]
) -> dict[str, Array]:
  """||R_old - R_new||_F by path, of `mixing`: how much the mixing has moved.

  Raises:
    ValueError: as `stability`.
  """
  return {
    path: jnp.linalg.norm((old[path] - new[path]).ravel())
    for path in _common(old, new)
  }


def spectra(
  params: PyTree, layers: Sequence[layers_lib.Layer] | None = None
) -> dict[str, Array]:
  """Singular values, descending, `[b, k]` by path.

  Args:
    params: pytree of parameters.
    layers: of which kernels, dense or low-rank; by default of all that are
      low-rank.

  Raises:
    ValueError: a path is unknown.
  """
  values = {}
  if layers is None:
    nodes = transforms.low_rank_leaves(params)
    values = {p: (lowrank.matrices(x)[1],) for p, x in nodes.items()}
  else:
    leaves = _leaves(params, layers)
    for layer in layers:
      x = leaves[layer.path]
      low = lowrank.is_low_rank(x)
      w = lowrank.matrices(x)[1] if low else _matrix(x, layer)
      values[layer.path] = (w,)
  found = spread.by_shape(_singular_values, values)
  return {path: out[0] for path, out in found.items()}


def drift(params: PyTree) -> dict[str, Array]:
  """max |U^T U - I| and |V^T V - I| of every low-rank leaf, a scalar by path."""

  def of(node):
    u, _, vt = lowrank.matrices(node)
    return jnp.maximum(
      jnp.max(linalg.drift(u)), jnp.max(linalg.drift(lowrank.transpose(vt)))
    )

  nodes = transforms.low_rank_leaves(params)
  return {path: of(node) for path, node in nodes.items()}


def _common(old: Mapping[str, Array], new: Mapping[str, Array]) -> list[str]:
  """The paths of both, after a check that they can be compared."""
  both = [path for path in old if path in new]
  if not both:
    raise ValueError('old and new have no path in common: nothing to compare.')
  for path in both:
    if old[path].shape != new[path].shape:
      raise ValueError(
        f'{path!r}: matrices of shapes {old[path].shape} and '
        f'{new[path].shape} cannot be compared.'
      )
  return both


def _leaves(params, layers):
  leaves = tree.flatten(params, lowrank.is_factored)
  tree.check_known([layer.path for layer in layers], leaves, 'parameter')
  return leaves


def _matrix(x, layer) -> Array:
  """The kernel as `[b, m, n]`, multiplied out where it has to be."""
  dense = lowrank.materialise(x) if lowrank.is_factored(x) else x
  return lowrank.wide(layer.view.to_matrix(dense))


@jax.jit
def _dense_basis(w: Array):
  return (linalg.polar(w),)


@jax.jit
def _low_rank_basis(u, s, vt):
  pu, sv, pvt = linalg.svd_live(s, lowrank.live(u))
  found = linalg.above_rounding(sv, max(u.shape[-2], vt.shape[-1]))
  pu = jnp.where(found[:, None, :], pu, 0)
  turned = lowrank.matmul(lowrank.matmul(u, pu), pvt)
  return (lowrank.matmul(turned, vt),)


@jax.jit
def _turned(old: Array, new: Array) -> Array:
  dot = jnp.sum(old * new, axis=(-2, -1))
  rank = lambda basis: jnp.sum(jnp.square(basis), axis=(-2, -1))
  smaller = jnp.minimum(rank(old), rank(new))
  return jnp.mean(dot / jnp.where(smaller > 0, smaller, 1))


@jax.jit
def _triangle(w: Array):
  tall = w if w.shape[-2] >= w.shape[-1] else lowrank.transpose(w)
  r = jnp.linalg.qr(tall, mode='r')
  sign = jnp.where(linalg.diagonal(r) < 0, -1, 1)
  return (r * sign[..., None].astype(r.dtype),)


@jax.jit
def _singular_values(w: Array):
  return (linalg.singular_values(w),)
