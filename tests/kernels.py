"""Kernels of every kind, and what NumPy makes of them in float64.

The oracles take a kernel's axes from its `Layer` and know nothing of the
package's own matrix views.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
import string
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import oialr_jax as oialr

# Relative to the Frobenius norm: some roundings of the kernels' dtype.
TOLERANCE = {'float32': 4e-6, 'bfloat16': 1.5e-2}


def layer(path, shape, rows, cols, batch=(), blocks=1) -> oialr.Layer:
  return oialr.Layer(path, shape, rows, cols, batch, blocks=blocks)


# Few shapes of matrices, because each compiles a program of its own.
LAYERS = (
  layer('tall', (12, 5), (0,), (1,)),
  layer('wide', (5, 12), (0,), (1,)),
  layer('square', (6, 6), (0,), (1,)),
  layer('column', (6, 1), (0,), (1,)),
  layer('out_in', (12, 5), (1,), (0,)),  # as Equinox has it
  layer('conv', (3, 2, 2, 5), (0, 1, 2), (3,)),  # HWIO
  layer('conv_oihw', (5, 3, 2, 2), (1, 2, 3), (0,)),  # Equinox again
  layer('pointwise', (1, 1, 12, 5), (0, 1, 2), (3,)),
  layer('query', (5, 3, 4), (0,), (1, 2)),  # embed | heads, head_dim
  layer('attention_out', (3, 4, 5), (0, 1), (2,)),  # heads, head_dim | embed
  layer('interleaved', (3, 5, 4), (0, 2), (1,)),
  layer('stack', (3, 12, 5), (1,), (2,), (0,)),
  layer('two_stacks', (2, 1, 5, 12), (2,), (3,), (0, 1)),
  layer('inner_batch', (12, 3, 5), (0,), (2,), (1,)),
  layer('both_batches', (2, 12, 3, 5), (1,), (3,), (0, 2)),
  layer('qkv', (12, 15), (0,), (1,), blocks=3),
  layer('heads', (12, 3, 2, 5), (0,), (1, 2, 3), blocks=6),
  layer('chunks', (5, 3, 4, 3), (0,), (1, 2, 3), blocks=3),
  layer('half_heads', (5, 4, 6), (0,), (1, 2), blocks=2),  # two heads in each
  layer('grouped', (10, 3, 2, 2), (1, 2, 3), (0,), blocks=2),  # OIHW
  layer('split_stack', (2, 12, 3, 10), (1,), (3,), (0, 2), blocks=2),
)
BY_PATH = {x.path: x for x in LAYERS}


def random_params(
  layers=LAYERS, *, dtype: str = 'float32', seed: int = 0
) -> dict[str, jax.Array]:
  """A kernel for each layer, and a bias that is none."""
  rng = np.random.default_rng(seed)
  kernels = {x.path: rng.normal(size=x.shape) for x in layers}
  kernels['bias'] = rng.normal(size=5)
  return {path: array(x, dtype) for path, x in kernels.items()}


def array(x: np.ndarray, dtype: str) -> jax.Array:
  """Cast by NumPy, which compiles nothing."""
  return jnp.asarray(x.astype(jnp.dtype(dtype)))


def cut(like: oialr.Layer) -> list[tuple[str, int]]:
  """Role and size of every axis, one that blocks cut counting as two."""
  roles = dict.fromkeys(like.rows, 'row') | dict.fromkeys(like.cols, 'col')
  axes, left = [], like.blocks
  for axis, size in enumerate(like.shape):
    role = roles.get(axis, 'batch')
    if role == 'col' and left > 1:
      blocks = min(left, size)
      left //= blocks
      axes += [('batch', blocks), ('col', size // blocks)]
    else:
      axes.append((role, size))
  return axes


def node(
  like: oialr.Layer, u, s, vt, *, dtype: str = 'float32'
) -> oialr.LowRank:
  """A `LowRank` from matrices `[b, m, r], [b, r, r], [b, r, n]`."""
  size = lambda role: tuple(n for r, n in cut(like) if r == role)
  batch, r = size('batch'), s.shape[-1]
  return oialr.LowRank(
    array(u.reshape(*batch, *size('row'), r), dtype),
    array(s.reshape(*batch, r, r), dtype),
    array(vt.reshape(*batch, r, *size('col')), dtype),
    like.view,
  )


def orthonormal(rng: np.random.Generator, *shape: int) -> np.ndarray:
  """Columns that are orthonormal, `[*batch, m, r]` with m >= r."""
  return np.linalg.qr(rng.normal(size=shape))[0]


def with_sigma(params: Any, f: Callable[[np.ndarray], np.ndarray]) -> Any:
  """Replaces every Sigma by f(Sigma): what training might have made of it."""

  def of(x):
    if not oialr.is_low_rank(x):
      return x
    return dataclasses.replace(x, s=array(f(float64(x.s)), x.s.dtype))

  return jax.tree.map(of, params, is_leaf=oialr.is_low_rank)


def trained(params: Any, *, seed: int = 1) -> Any:
  """Sigma is full after some steps, and zero still where it was pruned."""
  rng = np.random.default_rng(seed)

  def step(s):
    live = np.diagonal(s, axis1=-2, axis2=-1) != 0
    return s + rng.normal(size=s.shape) * live[..., None] * live[..., None, :]

  return with_sigma(params, step)


def deficient(params: Any, *, seed: int = 2) -> Any:
  """Sigma is full, but its rank is less than the number of live directions."""
  rng = np.random.default_rng(seed)

  def collapse(s):
    live = np.diagonal(s, axis1=-2, axis2=-1) != 0
    low = rng.normal(size=(*s.shape[:-1], 2))
    low = low @ rng.normal(size=(*s.shape[:-2], 2, s.shape[-1]))
    return low * live[..., None] * live[..., None, :]

  return with_sigma(params, collapse)


def float64(x: Any) -> np.ndarray:
  return np.asarray(x, np.float64)


def matrices(kernel: Any, like: oialr.Layer) -> np.ndarray:
  """The kernel as `[b, m, n]`."""
  axes = cut(like)
  place = ('batch', 'row', 'col').index
  order = sorted(range(len(axes)), key=lambda a: place(axes[a][0]))
  x = float64(kernel).reshape([n for _, n in axes]).transpose(order)
  return x.reshape(like.stack, *like.matrix)


def factors(x: oialr.LowRank) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """U `[b, m, r]`, Sigma `[b, r, r]`, V^T `[b, r, n]`."""
  u, s, vt = map(float64, (x.u, x.s, x.vt))
  r, b = s.shape[-1], math.prod(s.shape[:-2])
  return u.reshape(b, -1, r), s.reshape(b, r, r), vt.reshape(b, r, -1)


def live_rank(x: oialr.LowRank) -> int:
  """The columns of U that are not zero; of a stack, the most."""
  return int(np.max(np.sum(np.any(factors(x)[0] != 0, axis=-2), axis=-1)))


def product(x: oialr.LowRank, like: oialr.Layer) -> np.ndarray:
  """The dense kernel U Sigma V^T, in one einsum over its own axes."""
  letters = dict(zip(string.ascii_lowercase, cut(like)))
  name = lambda role: ''.join(c for c, (r, _) in letters.items() if r == role)
  b, m, n = map(name, ('batch', 'row', 'col'))
  return np.einsum(
    f'{b}{m}y,{b}yz,{b}z{n}->{"".join(letters)}',
    *map(float64, (x.u, x.s, x.vt)),
    optimize=True,
  ).reshape(like.shape)


def polar(w: np.ndarray, rank: int | None = None) -> np.ndarray:
  """U V^T of the leading singular directions of `[b, m, n]`."""
  u, _, vt = np.linalg.svd(w, full_matrices=False)
  return u[..., :rank] @ vt[..., :rank, :]


def singular_values(w: np.ndarray) -> np.ndarray:
  return np.linalg.svd(w, compute_uv=False)


def error(actual: Any, desired: Any) -> float:
  """||actual - desired||_F / ||desired||_F."""
  actual, desired = float64(actual), float64(desired)
  assert actual.shape == desired.shape
  return np.linalg.norm(actual - desired) / np.linalg.norm(desired)


def modes(f: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
  return {'eager': f, 'jit': jax.jit(f)}


def equations(jaxpr: Any, name: str) -> Iterator[Any]:
  """The equations of a primitive, in a jaxpr and in all that are inside."""
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == name:
      yield eqn
    for inner in jax.tree.leaves(list(eqn.params.values())):
      if hasattr(getattr(inner, 'jaxpr', inner), 'eqns'):
        yield from equations(inner, name)
