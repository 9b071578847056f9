"""The transforms between dense and low-rank parameters: pure, pytree to pytree.

Every transform maps `LowRank` leaves and hands all other leaves on as the same
objects. All are traceable, except `compact`, which changes shapes by values, and
`decompose`, which works on the host. Decompositions and rotations are in
float32 or wider whatever the parameters' dtype, and batched over kernels of
equal shapes. On concrete arrays, a kernel that is not finite or an SVD that
fails is a `ValueError` with its path; under a trace, where nothing can be
raised, the kernel is kept as it was.
"""

from collections.abc import Collection, Mapping, Sequence
import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oialr_jax import layers as layers_lib
from oialr_jax import linalg
from oialr_jax import lowrank
from oialr_jax import spread
from oialr_jax import tree

Array = jax.Array
LowRank = lowrank.LowRank
PyTree = Any
Rank = layers_lib.Rank

# Beyond this departure of U^T U from I, bases are orthonormalised anew.
DRIFT_TOLERANCE = 1e-5
# Keeps 0.65 * 180 from falling short of 117 in float32, and 0.29 * 100 of 29.
_NUDGE = 1e-4


class Sigma(NamedTuple):
  """What `decompose` wants of a low-rank kernel.

  Attributes:
    s: a copy of Sigma, `[b, r, r]`.
    live: which of its directions are not pruned, `[b, r]`.
  """

  s: Array
  live: Array


class Rotation(NamedTuple):
  """The SVD of a Sigma, U' diag(s) V'^T, with pruned directions last and zero.

  Attributes:
    u: `[b, r, r]`.
    s: falling, `[b, r]`.
    vt: `[b, r, r]`.
  """

  u: Array
  s: Array
  vt: Array


def to_lowrank(
  params: PyTree,
  layers: Sequence[layers_lib.Layer],
  *,
  rank: Rank | None = None,
  basis_dtype: Any = None,
) -> PyTree:
  """Replaces kernels by W = U Sigma V^T, Sigma starting as diag(S).

  Args:
    params: pytree of dense parameters.
    layers: which kernels, from `find_layers` and `select`.
    rank: None keeps all min(m, n) directions, so that the function stays the
      same. An int is the rank of every layer, a float in (0, 1] the share of
      min(m, n), a mapping gives the rank of each path (missing: all).
    basis_dtype: that U and V^T are stored in, by default the kernel's. In
      bfloat16 they take half of the memory, and W is rounded with them: by
      2^-9 relative, here and at every update.

  Returns:
    params with a `LowRank` in the place of every kernel in layers (paper,
    Section 3, "step = d").

  Raises:
    ValueError: a path is unknown, low-rank already or of another shape; a rank
      is out of range; a kernel is not finite; an SVD fails.
    TypeError: a kernel, a rank or a basis_dtype is not of a type that this can
      be done with.
  """
  check_basis_dtype(basis_dtype)
  layers = tuple(layers)
  leaves = tree.flatten(params, lowrank.is_factored)
  if not layers:
    raise ValueError('layers is empty: pass the layers of find_layers(...).')
  paths = [layer.path for layer in layers]
  tree.check_known(paths, leaves, 'parameter')
  for path in paths:
    if paths.count(path) > 1:
      raise ValueError(f'{path!r}: is in layers twice; leave one out.')
  ranks = layers_lib.ranks_of(layers, rank)
  kernels = {}
  for layer in layers:
    _check_kernel(layer, leaves[layer.path])
    kernels[layer.path] = layer.view.to_matrix(leaves[layer.path])
  check_finite(kernels)
  found = spread.by_shape(
    _decompose, {path: (w,) for path, w in kernels.items()}
  )
  check_decomposed({path: out[-1] for path, out in found.items()})
  nodes = {}
  for layer in layers:
    u, s, vt, _ = found[layer.path]
    dtype = kernels[layer.path].dtype
    nodes[layer.path] = _assemble(
      layer, dtype, basis_dtype or dtype, u, s, vt, ranks[layer.path]
    )
  return tree.map_with_path(
    lambda path, x: nodes.get(path, x), params, is_leaf=lowrank.is_factored
  )


def to_dense(params: PyTree) -> PyTree:
  """Multiplies every low-rank kernel out: the original model's parameters.

  The inverse of `to_lowrank` up to rounding, with the original tree structure;
  `Factors` are multiplied out as well.
  """
  return jax.tree.map(
    lambda x: lowrank.materialise(x) if lowrank.is_factored(x) else x,
    params,
    is_leaf=lowrank.is_factored,
  )


def update_basis(
  params: PyTree, *, paths: Collection[str] | None = None
) -> PyTree:
  """Aligns the bases with an SVD of Sigma; every W stays what it is.

  Sigma = U' S' V'^T;  U <- U U',  V^T <- V'^T V^T,  Sigma <- diag(S')  (paper,
  Section 3). Bases that have drifted from orthonormality by more than
  `DRIFT_TOLERANCE` are first made orthonormal by QR, the triangles going into
  Sigma. Pruned directions stay pruned.

  Args:
    params: pytree with `LowRank` leaves.
    paths: of the leaves to update; all by default.

  Raises:
    ValueError: a path is not that of a low-rank leaf; a kernel is not finite.
  """
  nodes = _chosen(params, paths)
  parts = {path: lowrank.matrices(node) for path, node in nodes.items()}
  for i, name in enumerate(('U', 'Sigma', 'V^T')):
    check_finite({path: p[i] for path, p in parts.items()}, name)
  aligned = spread.by_shape(_align, parts)
  check_decomposed({path: out[-1] for path, out in aligned.items()})
  return _rebuilt(params, nodes, aligned)


def sigmas(
  params: PyTree, *, paths: Collection[str] | None = None
) -> dict[str, Sigma]:
  """Copies of Sigma, for `decompose` to work on while params are trained.

  `update_basis` in two halves is `rotate(params, decompose(sigmas(params)))`;
  steps may come between them, and may donate params.

  Args:
    params: pytree with `LowRank` leaves.
    paths: of the leaves to decompose; all by default.

  Raises:
    ValueError: a path is not that of a low-rank leaf.
  """
  return _sigmas(_chosen(params, paths))


def decompose(sigmas: Mapping[str, Sigma]) -> dict[str, Rotation]:
  """SVDs by LAPACK on the host, which leave the devices alone.

  NumPy lets go of Python's lock meanwhile: call it in a thread.

  Returns:
    Per path, NumPy arrays by the conventions of `linalg.svd_live`.

  Raises:
    ValueError: a Sigma is not finite; an SVD fails.
  """
  taken = jax.device_get(dict(sigmas))
  check_flags({p: np.all(np.isfinite(x.s)) for p, x in taken.items()}, 'Sigma')
  found = {}
  for path, sigma in taken.items():
    try:
      matrices = [_svd_on_host(*x) for x in zip(*sigma, strict=True)]
    except np.linalg.LinAlgError:
      check_decomposed({path: False})
    found[path] = Rotation(*map(np.stack, zip(*matrices)))
  return found


def rotate(params: PyTree, rotations: Mapping[str, Rotation]) -> PyTree:
  """Turns bases by the SVD of an earlier Sigma; every W stays what it is.

  U <- U U',  V^T <- V'^T V^T,  Sigma <- U'^T Sigma V', which is diagonal but for
  what it has learnt since. Bases that have drifted are made orthonormal first,
  as by `update_basis`.

  Args:
    params: pytree with `LowRank` leaves.
    rotations: from `decompose`, by path.

  Raises:
    ValueError: a path is not that of a low-rank leaf; a rank has grown since.
  """
  nodes = _chosen(params, rotations)
  rotations = cut(rotations, params)
  parts = {
    path: (*lowrank.matrices(node), rotations[path].u, rotations[path].vt)
    for path, node in nodes.items()
  }
  return _rebuilt(params, nodes, linalg.by_shape(_rotate, parts))


def cut(
  parts: Mapping[str, Sigma] | Mapping[str, Rotation], params: PyTree
) -> dict[str, Any]:
  """Sigmas or rotations at the ranks that params were compacted to since.

  Nothing is lost: what `compact` slices away was pruned before.

  Raises:
    ValueError: a path is not that of a low-rank leaf; a rank has grown since.
  """
  nodes = _chosen(params, parts)
  for path, node in nodes.items():
    rank = parts[path].s.shape[1]
    if node.rank > rank:
      raise ValueError(
        f'{path!r}: has rank {node.rank}, but what was decomposed had rank '
        f'{rank}: it was of other parameters.'
      )
  small = lambda x, r: x[(slice(None), *[slice(r)] * (x.ndim - 1))]
  return {
    path: jax.tree.map(functools.partial(small, r=nodes[path].rank), part)
    for path, part in parts.items()
  }


def prune_sigma(
  params: PyTree,
  *,
  cutoff: float = 0.1,
  max_drop: float = 0.5,
  floor: float = 0.01,
  paths: Collection[str] | None = None,
) -> PyTree:
  """Zeroes the singular directions of every Sigma below a relative cutoff.

  Of k live directions with singular values s_1 >= s_2 >= ..., it keeps

    k' = min(k, max(1, #{i: s_i >= cutoff s_1}, ceil((1 - max_drop) k),
                    int(floor min(m, n))))

  and zeroes the others' columns of U, rows of V^T and entries of Sigma. No
  shape changes. The error is that of Eckart and Young: ||W - W'||_F^2 is the
  sum of the dropped s_i^2, ||W - W'||_2 the largest of them. A Sigma that is
  not diag(s_1, s_2, ...) is aligned first, as by `update_basis`.

  Args:
    params: pytree with `LowRank` leaves.
    cutoff: beta of the paper, in (0, 1).
    max_drop: the largest share of the live directions that one call drops.
    floor: the share of min(m, n) below which no rank falls.
    paths: of the leaves to prune; all by default.

  Raises:
    ValueError: an argument is out of range; a path is not that of a low-rank
      leaf; a kernel is not finite.
  """
  check_fraction('cutoff', cutoff)
  check_fraction('max_drop', max_drop, upper_open=False)
  check_fraction('floor', floor, lower_open=False)
  nodes = _chosen(params, paths)
  check_finite({path: node.s for path, node in nodes.items()}, 'Sigma')
  parts = {path: lowrank.matrices(node) for path, node in nodes.items()}
  aligned = spread.by_shape(_align_unless_aligned, parts)
  check_decomposed({path: out[-1] for path, out in aligned.items()})
  return prune_aligned(
    _rebuilt(params, nodes, aligned),
    cutoff=cutoff,
    max_drop=max_drop,
    floor=floor,
    paths=paths,
  )


def prune_aligned(
  params: PyTree,
  *,
  cutoff: float,
  max_drop: float,
  floor: float,
  paths: Collection[str] | None = None,
  values: Mapping[str, Array] = types.MappingProxyType({}),
) -> PyTree:
  """`prune_sigma` for what is known to be aligned: no check, no SVD.

  Args:
    params: pytree with `LowRank` leaves.
    cutoff: see `prune_sigma`.
    max_drop: likewise.
    floor: likewise.
    paths: of the leaves to prune; all by default.
    values: by path, the singular values `[b, r]` that decide where Sigma is not
      diagonal, as after `rotate`; elsewhere its diagonal does.
  """
  nodes = _chosen(params, paths)
  prune = lambda u, s, vt, values: _prune(
    u,
    s,
    vt,
    values,
    cutoff,
    max_drop,
    int(floor * min(u.shape[-2], vt.shape[-1]) + _NUDGE),
  )
  parts = {}
  for path, node in nodes.items():
    u, s, vt = lowrank.matrices(node)
    decisive = values[path] if path in values else _diagonal(s)
    parts[path] = u, s, vt, decisive
  pruned = linalg.by_shape(prune, parts, decomposes=False)
  return _rebuilt(params, nodes, pruned)


def compact(
  params: PyTree,
  *,
  multiple_of: int = 1,
  ranks: Mapping[str, int] | None = None,
) -> PyTree:
  """Slices the pruned directions away; host side, because shapes change.

  Args:
    params: pytree with `LowRank` leaves, concrete.
    multiple_of: ranks are rounded up to a multiple of this (at most the rank
      there is), the spare directions staying zero. 8 or 128 suit the hardware.
    ranks: what to leave, by path, instead of the smallest: those of an earlier
      `compact_ranks`, which pruning since then can only have lowered. Leaves
      that it does not name keep what they have.

  Returns:
    params with the smallest buffers; the function is the same. A kernel whose
    buffers do not shrink is the same object.

  Raises:
    ValueError: multiple_of is less than 1, or something else beside ranks; a
      path is not that of a low-rank leaf; a rank is less than the live one.
    TypeError: params are traced: call it outside `jax.jit`.
  """
  if ranks is not None and multiple_of != 1:
    raise ValueError(
      f'multiple_of={multiple_of}: ranks say already what to leave; drop one '
      'of the two.'
    )
  sizes = compact_ranks(params, multiple_of=multiple_of)
  if ranks is not None:
    tree.check_known(ranks, sizes, 'low-rank leaf')
    for path, rank in ranks.items():
      if rank < sizes[path]:
        raise ValueError(
          f'{path!r}: rank {rank} is less than the {sizes[path]} directions '
          'that are live; prune_sigma first.'
        )
    sizes = ranks
  return tree.map_with_path(
    lambda path, x: sliced(x, sizes[path]) if path in sizes else x,
    params,
    is_leaf=lowrank.is_low_rank,
  )


def compact_ranks(params: PyTree, *, multiple_of: int = 1) -> dict[str, int]:
  """The rank that `compact` would leave in every low-rank leaf, by path.

  Raises:
    ValueError: multiple_of is less than 1.
    TypeError: params are traced.
  """
  if multiple_of < 1:
    raise ValueError(f'multiple_of={multiple_of}: must be at least 1.')
  nodes = low_rank_leaves(params)
  if not tree.is_concrete(nodes):
    raise TypeError(
      'compact and ranks read values: call them outside jax.jit, on arrays.'
    )
  ranks = jax.device_get(_live_ranks(nodes))
  return rounded_up(params, ranks, multiple_of)


def rounded_up(
  params: PyTree, ranks: Mapping[str, int], multiple_of: int
) -> dict[str, int]:
  """Ranks up to a multiple of a number, but not above what the leaves have."""
  return {
    path: min(node.rank, -(-int(ranks[path]) // multiple_of) * multiple_of)
    for path, node in low_rank_leaves(params).items()
  }


def to_factors(params: PyTree) -> PyTree:
  """The compressed model: W = (U Sigma) V^T, or dense where that is smaller.

  A `LowRank` becomes a `Factors` where r < m n / (m + n), and the dense kernel
  otherwise. Ranks are the physical ones: `compact` first.
  """

  def convert(x):
    if not lowrank.is_low_rank(x):
      return x
    _, m, n = lowrank.matrix_shape(x)
    if x.rank >= m * n / (m + n):
      return lowrank.materialise(x)
    u, s, _ = lowrank.matrices(x)
    a = lowrank.matmul(u, s).reshape(x.u.shape)
    return lowrank.Factors(a.astype(x.dtype), x.vt.astype(x.dtype), x.view)

  return jax.tree.map(convert, params, is_leaf=lowrank.is_low_rank)


def trainable(params: PyTree) -> PyTree:
  """What trains: Sigma of every low-rank kernel, and all other leaves.

  The tree is that of the dense model, before and after the transition.
  """
  return jax.tree.map(
    lambda x: x.s if lowrank.is_low_rank(x) else x,
    params,
    is_leaf=lowrank.is_low_rank,
  )


def with_trainable(params: PyTree, t: PyTree) -> PyTree:
  """params with `trainable(params)` replaced by t; bases are the same objects.

  Raises:
    ValueError: t has another structure than `trainable(params)`.
  """
  leaves, treedef = jax.tree.flatten(params, is_leaf=lowrank.is_low_rank)
  try:
    new = treedef.flatten_up_to(t)
  except ValueError as e:
    raise ValueError(
      f't does not have the structure of trainable(params): {e}'
    ) from e
  for path, y in zip(tree.flatten(params, lowrank.is_low_rank), new):
    if not jax.tree_util.all_leaves([y]):
      raise ValueError(
        f't does not have the structure of trainable(params): {path!r} is a '
        f'{type(y).__name__}, not an array; pass it through trainable.'
      )
  return jax.tree.unflatten(
    treedef,
    [
      LowRank(x.u, y, x.vt, x.view) if lowrank.is_low_rank(x) else y
      for x, y in zip(leaves, new, strict=True)
    ],
  )


def low_rank_leaves(params: PyTree) -> dict[str, LowRank]:
  """The low-rank leaves by path."""
  leaves = tree.flatten(params, lowrank.is_low_rank)
  return {p: x for p, x in leaves.items() if lowrank.is_low_rank(x)}


def sliced(node: LowRank, rank: int) -> LowRank:
  """The first `rank` directions of a leaf; traceable, nothing is checked."""
  if rank >= node.rank:
    return node
  u, s, vt = lowrank.matrices(node)
  return lowrank.from_matrices(
    node, u[..., :rank], s[..., :rank, :rank], vt[:, :rank]
  )


@jax.jit
def _live_ranks(nodes: dict[str, LowRank]) -> dict[str, Array]:
  return {path: live_rank(node) for path, node in nodes.items()}


def live_rank(node: LowRank) -> Array:
  """The logical rank of a leaf: the largest in its stack, an int scalar."""
  u, _, _ = lowrank.matrices(node)
  return jnp.max(jnp.sum(lowrank.live(u), axis=-1))


def is_aligned(s: Array) -> Array:
  """Whether Sigma `[..., r, r]` is diag(s_1 >= s_2 >= ... >= 0): `[...]`."""
  *batch, r, _ = s.shape
  # By one reduction: s_i is at least s_{i + 1}, the last at least 0.
  following = jnp.pad(s[..., 1:, 1:], [(0, 0)] * len(batch) + [(0, 1)] * 2)
  falling = (s >= following) & (s < jnp.inf)
  fits = jnp.where(jnp.eye(r, dtype=bool), falling, s == 0)
  return jnp.all(fits, axis=(-2, -1))


def check_basis_dtype(dtype: Any):
  """Raises TypeError for what no basis can be stored in."""
  if dtype is None:
    return
  try:
    fits = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError:
    fits = False
  if not fits:
    raise TypeError(
      f"basis_dtype={dtype!r}: must be a floating dtype, such as 'bfloat16'."
    )


def check_fraction(
  name: str, value: float, lower_open: bool = True, upper_open: bool = True
):
  """Raises ValueError when the value is not in the unit interval."""
  above = value > 0 if lower_open else value >= 0
  below = value < 1 if upper_open else value <= 1
  if not (above and below):
    interval = f'{"(["[not lower_open]}0, 1{")]"[not upper_open]}'
    raise ValueError(f'{name}={value}: must be in {interval}.')


def check_finite(arrays: Mapping[str, Array], what: str = 'the kernel'):
  """Raises ValueError with the path of an array that is not finite.

  Traced arrays pass: nothing is known of them.
  """
  if not tree.is_concrete(arrays):
    return
  check_flags(_all_finite(dict(arrays)), what)


def check_flags(finite: Mapping[str, Array], what: str = 'the kernel'):
  """`check_finite` of what is known to be finite or not."""
  for path, ok in jax.device_get(dict(finite)).items():
    if not ok:
      raise ValueError(
        f'{path!r}: {what} holds NaN or infinity; it cannot be decomposed. '
        'Go back to a checkpoint before the training diverged.'
      )


@jax.jit
def _all_finite(arrays):
  return {path: jnp.all(jnp.isfinite(x)) for path, x in arrays.items()}


def check_decomposed(ok: Mapping[str, Array]):
  """Raises LinAlgError, a ValueError, with the path of an SVD that failed.

  Traced flags pass: nothing is known of them.
  """
  if not tree.is_concrete(ok):
    return
  for path, flags in jax.device_get(dict(ok)).items():
    if not np.all(flags):
      raise np.linalg.LinAlgError(  # a ValueError
        f'{path!r}: the SVD did not converge. The parameters are unchanged.'
      )


def _check_kernel(layer: layers_lib.Layer, leaf: Any):
  if lowrank.is_factored(leaf):
    raise ValueError(
      f'{layer.path!r}: is low-rank already; leave it out of layers, or '
      'start from to_dense(params).'
    )
  if not hasattr(leaf, 'dtype'):
    raise TypeError(f'{layer.path!r}: {leaf!r} is not an array.')
  if tuple(leaf.shape) != layer.shape:
    raise ValueError(
      f'{layer.path!r}: has shape {tuple(leaf.shape)}, but its layer says '
      f'{layer.shape}; run find_layers on these parameters.'
    )
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    raise TypeError(
      f'{layer.path!r}: dtype {leaf.dtype} is not real floating point; '
      'exclude the path.'
    )


@jax.jit
def _decompose(w: Array) -> tuple[Array, Array, Array, Array]:
  """U, S, V^T in float32, and whether the SVD succeeded; by QR where not."""
  w = lowrank.wide(w)
  u, s, vt = linalg.svd(w)
  ok = _succeeded(s)
  s = linalg.diagonal_matrix(s)

  def by_qr():
    # Exact and without iteration: W = Q R, V = I, or the transpose of that.
    tall = w.shape[-2] >= w.shape[-1]
    q, triangle = jnp.linalg.qr(w if tall else lowrank.transpose(w))
    eye = jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=s.dtype), s.shape)
    if tall:
      return q, triangle, eye
    return eye, lowrank.transpose(triangle), lowrank.transpose(q)

  pick = lambda good, bad: jnp.where(ok[:, None, None], good, bad)
  u, s, vt = jax.lax.cond(
    jnp.all(ok),
    lambda: (u, s, vt),
    lambda: tuple(map(pick, (u, s, vt), by_qr())),
  )
  return u, s, vt, ok


@jax.jit
def _align(u: Array, s: Array, vt: Array):
  """One basis update of matrices `[b, m, r], [b, r, r], [b, r, n]`."""
  old = u, s, vt
  live = lowrank.live(u)
  u, s, vt = _undrifted(u, s, vt)
  pu, sv, pvt = linalg.svd_live(s, live)
  ok = _succeeded(sv)
  new = (
    lowrank.matmul(u, pu),
    linalg.diagonal_matrix(sv),
    lowrank.matmul(pvt, vt),
  )
  keep = lambda x, y: jnp.where(ok[:, None, None], x, y)
  return *map(keep, new, old), ok


@jax.jit
def _align_unless_aligned(u: Array, s: Array, vt: Array):
  return jax.lax.cond(
    jnp.all(is_aligned(s)),
    lambda *parts: (*parts, jnp.ones(s.shape[0], bool)),
    _align,
    u,
    s,
    vt,
  )


@jax.jit
def _rotate(u, s, vt, pu, pvt):
  """`rotate` of matrices; U' and V'^T are `[b, r, r]`."""
  u, s, vt = _undrifted(u, s, vt)
  s = lowrank.matmul(lowrank.transpose(pu), s)
  return (
    lowrank.matmul(u, pu),
    lowrank.matmul(s, lowrank.transpose(pvt)),
    lowrank.matmul(pvt, vt),
  )


@jax.jit
def _sigmas(nodes: dict[str, LowRank]) -> dict[str, Sigma]:
  found = {}
  for path, node in nodes.items():
    u, s, _ = lowrank.matrices(node)
    # Else what is returned may be the very buffer that was given.
    found[path] = Sigma(jnp.array(s, copy=True), lowrank.live(u))
  return found


def _svd_on_host(s: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, ...]:
  """`linalg.svd_live` of one matrix `[r, r]`."""
  u, values, vt = np.zeros_like(s), np.zeros_like(s[0]), np.zeros_like(s)
  k = np.count_nonzero(live)  # the pruned ones are the last
  u[:k, :k], values[:k], vt[:k, :k] = np.linalg.svd(s[:k, :k])
  largest = np.argmax(np.abs(u), axis=0, keepdims=True)
  sign = np.where(np.take_along_axis(u, largest, axis=0) < 0, -1, 1)
  return u * sign.astype(u.dtype), values, vt * sign.T.astype(vt.dtype)


def _undrifted(u, s, vt):
  """The same W, by QR where bases have drifted from orthonormality."""
  drifted = jnp.maximum(linalg.drift(u), linalg.drift(lowrank.transpose(vt)))
  return jax.lax.cond(
    jnp.any(drifted > DRIFT_TOLERANCE),
    _orthonormalised,
    lambda u, s, vt: (u, s, vt),
    u,
    s,
    vt,
  )


def _orthonormalised(u, s, vt):
  u, left = linalg.qr_live(u)
  v, right = linalg.qr_live(lowrank.transpose(linalg.after(u, vt)))
  s = lowrank.matmul(lowrank.matmul(left, s), lowrank.transpose(right))
  return u, s, lowrank.transpose(v)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _prune(u, s, vt, values, cutoff, max_drop, floor):
  """Zeroes what the rule of `prune_sigma` drops, by falling values `[b, r]`."""
  live = jnp.sum(lowrank.live(u), axis=-1)
  kept = kept_rank(values, live, cutoff, max_drop, floor)
  keep = jnp.arange(s.shape[-1])[None] < kept[:, None]
  return (
    jnp.where(keep[:, None, :], u, 0),
    jnp.where(keep[:, None, :] & keep[:, :, None], s, 0),
    jnp.where(keep[:, :, None], vt, 0),
  )


def _diagonal(s: Array) -> Array:
  """The singular values of an aligned Sigma.

  Of one that is not, since its SVD has failed under a trace, equal ones: none is
  below the others, and it is kept as it was.
  """
  return jnp.where(is_aligned(s)[:, None], linalg.diagonal(s), 1)


def kept_rank(
  values: Array, live: Array, cutoff: float, max_drop: float, floor: int
) -> Array:
  """The rule of `prune_sigma`: k' of singular values `[b, r]`, k = live `[b]`."""
  inside = jnp.arange(values.shape[-1])[None] < live[:, None]
  above = jnp.sum(inside & (values >= cutoff * values[:, :1]), axis=-1)
  dropped = jnp.floor(live.astype(jnp.float32) * max_drop + _NUDGE)
  at_least = live - dropped.astype(live.dtype)
  kept = jnp.maximum(jnp.maximum(above, at_least), max(1, floor))
  return jnp.minimum(live, kept)


def _succeeded(values: Array) -> Array:
  """Whether these are singular values `[b, k]` that were found: `[b]`."""
  return jnp.all(jnp.isfinite(values), axis=-1)


def _assemble(layer, dtype, basis_dtype, u, s, vt, rank) -> LowRank:
  batch, rows, cols = layer.view.split(layer.shape)
  return LowRank(
    u[..., :rank].reshape(*batch, *rows, rank).astype(basis_dtype),
    s[..., :rank, :rank].reshape(*batch, rank, rank).astype(dtype),
    vt[..., :rank, :].reshape(*batch, rank, *cols).astype(basis_dtype),
    layer.view,
  )


def _chosen(params, paths) -> dict[str, LowRank]:
  nodes = low_rank_leaves(params)
  if not nodes:
    raise ValueError(
      'params has no low-rank leaf: convert some with to_lowrank first.'
    )
  if paths is None:
    return nodes
  tree.check_known(paths, nodes, 'low-rank leaf')
  return {path: node for path, node in nodes.items() if path in set(paths)}


def _rebuilt(params, nodes, parts) -> PyTree:
  """params with other U, Sigma and V^T in these nodes."""
  return replaced(
    params,
    {
      path: lowrank.from_matrices(nodes[path], *matrices[:3])
      for path, matrices in parts.items()
    },
  )


def replaced(params: PyTree, nodes: Mapping[str, Any]) -> PyTree:
  """params with other nodes at these paths."""
  return tree.map_with_path(
    lambda path, x: nodes.get(path, x), params, is_leaf=lowrank.is_low_rank
  )
