"""How far bases turn, against how far their kernels move.

Small steps turn a basis little, whatever else they do: a learning rate that
falls makes every basis stable. Hence every interval between two measurements is
compared with chance, the stability that a kernel would have after a random step
of the same length: Gaussian noise as far from the kernel, in the Frobenius
norm, as the kernel is at the end of the interval.

    turn / chance = (1 - stability) / (1 - stability of the random step)

Of a run that is the median over layers and intervals: where a singular value
passes through zero, its direction changes sign, and a basis of rank k turns by
2 / k at once, though the kernel hardly moves.

Records are those of kind 'stability' of a run that tracked with `measure`.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import oialr_jax as oialr
from oialr_jax import tree
from oialr_jax.report import series

Array = jax.Array
PyTree = Any
Records = Sequence[Mapping[str, Any]]

THRESHOLDS = (0.95, 0.98)
# Of the run, what is early and what is late.
_EARLY, _LATE = 0.25, 0.5
# 1 - stability in float32 is not more exact than that.
_ROUNDING = 1e-5


@functools.partial(jax.jit, static_argnums=2)
def measure(
  old: PyTree, new: PyTree, layers: tuple[oialr.Layer, ...]
) -> dict[str, dict[str, Array]]:
  """What `training.fit` is to track besides, of dense kernels.

  Args:
    old: parameters at the measurement before.
    new: parameters now.
    layers: of which kernels.

  Returns:
    By path, the 'norm' ||W_old||_F, the 'change' ||W_new - W_old||_F in units
    of it, and 'chance', the stability of a random step of that length.
  """
  before, after = _kernels(old, layers), _kernels(new, layers)
  norm = {path: jnp.linalg.norm(w.ravel()) for path, w in before.items()}
  length = {
    path: jnp.linalg.norm((after[path] - w).ravel())
    for path, w in before.items()
  }
  random = {
    layer.path: before[layer.path]
    + length[layer.path] * _direction(jax.random.key(i), layer.shape)
    for i, layer in enumerate(layers)
  }
  bases = oialr.basis(before, layers), oialr.basis(random, layers)
  return {
    'norm': norm,
    'change': {path: length[path] / norm[path] for path in before},
    'chance': oialr.stability(*bases),
  }


def kind(layer: oialr.Layer) -> str:
  """The type of a layer, by its path."""
  if layer.kind == 'conv':
    return 'conv'
  return next((t for part, t in _TYPES.items() if part in layer.path), 'dense')


def settled(
  ends: np.ndarray, values: np.ndarray, steps: int, threshold: float
) -> float | None:
  """The share of the run after which no value is below a threshold.

  Args:
    ends: of the intervals, in steps.
    values: of the intervals.
    steps: of the run.
    threshold: for the values.

  Returns:
    The end of the last interval below it as a share of the run; 0 if there is
    none, None if that is the last one.
  """
  below = np.flatnonzero(values < threshold)
  if not below.size:
    return 0.0
  return None if below[-1] == len(ends) - 1 else float(ends[below[-1]] / steps)


def summary(records: Records, steps: int) -> dict[str, Any]:
  """The numbers of a run: stability, distances, and what they are by chance.

  'early' is the first quarter of the run, 'late' its second half.

  Args:
    records: of the run.
    steps: of the run.
  """
  ends, _, stability = series.grid(records, 'stability', 'stability')
  distance, norm, change, chance = (
    series.grid(records, 'stability', field)[2]
    for field in ('r_distance', 'norm', 'change', 'chance')
  )
  mean = stability.mean(axis=0)
  found = {f'from {x}': settled(ends, mean, steps, x) for x in THRESHOLDS}
  found |= {'lowest': float(mean.min()), 'final': float(mean[-1])}
  parts = {'early': ends <= _EARLY * steps, 'late': ends > _LATE * steps}
  for name, at in parts.items():
    mixed = distance[:, at] / (change * norm)[:, at]
    found |= {
      f'change % {name}': 100 * float(change[:, at].mean()),
      f'turn / chance {name}': _against(stability[:, at], chance[:, at]),
      f'R-distance / change {name}': float(np.median(mixed)),
    }
  return found | {'shows': _verdict(found)}


def by_type(
  records: Records, steps: int, types: Mapping[str, str]
) -> dict[str, dict[str, float | None]]:
  """Of every type of layer, when its mean stability settles, and its turn.

  Args:
    records: of the run.
    steps: of the run.
    types: of the layers, by path.
  """
  ends, paths, stability = series.grid(records, 'stability', 'stability')
  chance = series.grid(records, 'stability', 'chance')[2]
  late, found = ends > _LATE * steps, {}
  for name in dict.fromkeys(types[path] for path in paths):
    of = [types[path] == name for path in paths]
    mean = stability[of].mean(axis=0)
    found[name] = {
      **{f'from {x}': settled(ends, mean, steps, x) for x in THRESHOLDS},
      'final': float(mean[-1]),
      'turn / chance late': _against(
        stability[of][:, late], chance[of][:, late]
      ),
    }
  return found


def between_random_bases(
  shape: tuple[int, int], count: int = 20
) -> tuple[float, float]:
  """Mean and deviation of the stability between random orthonormal bases.

  Args:
    shape: of the bases, (m, n).
    count: pairs of them.
  """
  draws = jax.random.normal(jax.random.key(0), (2, count, *shape))
  layer = oialr.Layer('w', (count, *shape), rows=(1,), cols=(2,), batch=(0,))
  old, new = (oialr.basis({'w': w}, [layer])['w'] for w in draws)
  each = jax.vmap(lambda a, b: jnp.sum(a * b) / min(shape))(old, new)
  return float(each.mean()), float(each.std())


def _against(stability: np.ndarray, chance: np.ndarray) -> float | None:
  """The median of turn / chance, where there is more than rounding."""
  moved = chance < 1 - _ROUNDING
  if not moved.any():
    return None
  return float(np.median((1 - stability[moved]) / (1 - chance[moved])))


def _verdict(found: Mapping[str, Any]) -> str:
  """Whether the bases settle: at all, and beyond what shorter steps explain."""
  settles = found[f'from {THRESHOLDS[0]}']
  early, late = (found[f'turn / chance {x}'] for x in ('early', 'late'))
  if settles is None or settles > _LATE:
    return 'no'
  if early is None or late is None:
    return 'no motion'
  return 'yes' if late < min(1.0, early) else 'by short steps'


def _kernels(params: PyTree, layers: Sequence[oialr.Layer]) -> dict[str, Array]:
  leaves = tree.flatten(params)
  paths = {layer.path for layer in layers}
  return {path: x for path, x in leaves.items() if path in paths}


def _direction(key: Array, shape: tuple[int, ...]) -> Array:
  noise = jax.random.normal(key, shape)
  return noise / jnp.linalg.norm(noise.ravel())


# By a part of their paths, as `oialr_jax.models` names them.
_TYPES = {'attn/qkv': 'qkv', 'attn/proj': 'attention out', 'mlp': 'mlp'}
