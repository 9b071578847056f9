"""The singular value decomposition by rotations, for TPUs.

What XLA has for TPUs compiles for minutes where the matrix is large (jax issue
28315): the polar factor's eigendecomposition divides and conquers, and holds
the code of every size down to 256. The program here is small, two loops around
one round of rotations, whatever the size, and it is vectorised over pairs.
"""

import math

import jax
import jax.numpy as jnp

from oialr_jax import lowrank

Array = jax.Array

# Rows are orthogonal when no cosine is above so many eps; that of two rows that
# were made so is some 2 eps. Kernels take about 10 sweeps.
COSINE, SWEEPS = 20, 60


def svd(w: Array) -> tuple[Array, Array, Array]:
  """Thin SVD of `w [b, m, n]` by one-sided Jacobi rotations.

  W = Q R and R^T = P L, which makes L nearly diagonal; rotations G, L = G Z,
  make the rows of Z orthogonal; Z^T = V T with T = diag(+-S) to rounding. So
  W = (Q V) T (P G)^T. It is backward stable, and U and V are orthonormal to
  some eps whatever the rank of W: nothing is divided by a singular value.

  Returns:
    `u [b, m, k], s [b, k], vt [b, k, n]`, s falling. s is NaN of a matrix that
    is not finite, or still not decomposed after `SWEEPS` sweeps.
  """
  if w.shape[-2] < w.shape[-1]:
    u, s, vt = svd(lowrank.transpose(w))
    return lowrank.transpose(vt), s, lowrank.transpose(u)
  # The squares of the entries must not overflow; a power of 2 rounds nothing.
  top = jnp.max(jnp.abs(w), axis=(-2, -1), keepdims=True)
  scale = jax.lax.reduce_precision(top, jnp.finfo(w.dtype).nexp, 0)
  scale = jnp.where(scale > 0, scale, 1)
  q, r = jnp.linalg.qr(w / scale)
  p, lower = jnp.linalg.qr(lowrank.transpose(r))
  turns, ok = _orthogonal_rows(lower)
  z = lowrank.matmul(turns, lower)
  s = jnp.linalg.norm(z, axis=-1)
  order = jnp.argsort(-s, axis=-1)
  falling = lambda rows: jnp.take_along_axis(rows, order[..., None], axis=-2)
  v, t = jnp.linalg.qr(lowrank.transpose(falling(z)))
  sign = jnp.where(jnp.diagonal(t, axis1=-2, axis2=-1) < 0, -1, 1)
  s = jnp.where(ok[:, None], jnp.take_along_axis(s, order, axis=-1), jnp.nan)
  return (
    lowrank.matmul(q, v * sign[:, None, :].astype(v.dtype)),
    s * scale[..., 0],
    lowrank.matmul(falling(turns), lowrank.transpose(p)),
  )


def _orthogonal_rows(a: Array) -> tuple[Array, Array]:
  """Orthonormal G^T, such that the rows of G^T a are orthogonal, by rotations.

  The rows of `a [b, n, n]` meet in pairs, as in a tournament: h pairs in each
  of the 2 h - 1 rounds of a sweep, after which all have met and stand where
  they stood. Sweeps end when the rows of every pair were orthogonal already.

  Returns:
    G^T `[b, n, n]`, and whether it was found `[b]`.
  """
  n, eps = a.shape[-1], jnp.finfo(a.dtype).eps
  half = max(2, -(-n // 2))
  eye = jnp.broadcast_to(jnp.eye(n, dtype=a.dtype), a.shape)
  rows = jnp.concatenate([a, eye], axis=-1)
  rows = jnp.pad(rows, ((0, 0), (0, 2 * half - n), (0, 0)))
  # Shorter rows are rounding errors of the others: no angle is theirs.
  shortest = eps / math.sqrt(n) * jnp.linalg.norm(a, axis=(-2, -1))[:, None]

  def sweep(state):
    count, top, bottom, _ = state
    none = jnp.zeros(a.shape[0], a.dtype)
    meet = lambda _, pairs: _meet(*pairs, n, jnp.square(shortest))
    rounds = 2 * half - 1
    return count + 1, *jax.lax.fori_loop(0, rounds, meet, (top, bottom, none))

  def unfinished(state):
    return (state[0] < SWEEPS) & jnp.any(state[3] > COSINE * eps)

  start = jnp.full(a.shape[0], jnp.inf, a.dtype)
  start = 0, rows[:, :half], rows[:, half:][:, ::-1], start
  _, top, bottom, cosine = jax.lax.while_loop(unfinished, sweep, start)
  g = jnp.concatenate([top, bottom[:, ::-1]], axis=1)[:, :n, n:]
  # The rounding errors of so many rotations add up; this squares their sum.
  gram = lowrank.matmul(g, lowrank.transpose(g))
  return 1.5 * g - 0.5 * lowrank.matmul(gram, g), cosine <= COSINE * eps


def _meet(top, bottom, cosine, n, shortest):
  """Makes top[i] orthogonal to bottom[i], then pairs anew: one round.

  The inner products are those of the first n entries. `cosine [b]` is the
  largest met in the sweep.
  """
  dot = lambda x, y: jnp.sum(x[..., :n] * y[..., :n], axis=-1)
  a, b, c = dot(top, top), dot(bottom, bottom), dot(top, bottom)
  turn = (jnp.minimum(a, b) > shortest) & (c != 0)
  met = jnp.abs(c) / jnp.where(turn, jnp.sqrt(a) * jnp.sqrt(b), 1)
  cosine = jnp.maximum(cosine, jnp.max(jnp.where(turn, met, 0), axis=-1))
  # The smaller of the two angles that do it; its cotangent of twice is z.
  z = (b - a) / jnp.where(turn, 2 * c, 1)
  tan = jnp.where(z < 0, -1, 1) / (jnp.abs(z) + jnp.sqrt(1 + z * z))
  tan = jnp.where(turn, tan, 0)[..., None]
  cos = 1 / jnp.sqrt(1 + tan * tan)
  sin = tan * cos
  top, bottom = cos * top - sin * bottom, sin * top + cos * bottom
  # The first of the top stays, all others go round by one place.
  return (
    jnp.concatenate([top[:, :1], bottom[:, :1], top[:, 1:-1]], axis=1),
    jnp.concatenate([bottom[:, 1:], top[:, -1:]], axis=1),
    cosine,
  )
