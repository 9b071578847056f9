"""Decompositions spread over all devices of the mesh, each done on one of them.

The mesh is the ambient one, `jax.set_mesh(mesh)`. After a compaction nearly
every Sigma has a shape of its own, so that no axis of a batch could be split
evenly: which matrix is whose is decided by cost. What a device has found is
added to the zeros of all others, which rounds nothing, so that afterwards all
devices, and hosts, hold the very same numbers.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import heapq
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oialr_jax import linalg

Array = jax.Array
Operands = Mapping[str, tuple[Array, ...]]


def by_shape(
  f: Callable[..., tuple[Array, ...]], operands: Operands
) -> dict[str, tuple[Array, ...]]:
  """`linalg.by_shape` for an f that costs more than sending its arguments.

  Without a mesh, on one of a single device, and inside of a `shard_map` it is
  `linalg.by_shape`. On more devices f has one matrix at a time, b = 1, and is
  in the program once per shape, whatever the number of devices.

  Args:
    f: from arrays `[b, ...]` to a tuple of arrays `[b, ...]`, all of whose
      entries depend on the same entries of the arguments alone.
    operands: per path, the arguments of f; the same b in all of them.

  Returns:
    Per path, what f returned for its part of the batch: all of it on every
    device.
  """
  if devices() == 1 or not operands:
    return linalg.by_shape(f, _whole(operands))
  found = _spread(f, dict(operands))
  return {path: found[path] for path in operands}


def devices() -> int:
  """How many devices `by_shape` would use here: those of the ambient mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty or mesh.manual_axes else mesh.size


def assign(costs: Sequence[float], workers: int) -> list[int]:
  """A worker for each task: the costliest first, to whom has least to do.

  None has more than 4/3 of what the busiest has under the best assignment
  (Graham 1969).
  """
  loads = [(0, worker) for worker in range(workers)]
  owners = [0] * len(costs)
  for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
    load, owners[i] = loads[0]
    heapq.heapreplace(loads, (load + costs[i], owners[i]))
  return owners


def _whole(operands: Operands) -> Operands:
  """Split by no explicit axis, which on one device are in the types as well."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.manual_axes or not mesh.explicit_axes:
    return operands
  return jax.sharding.reshard(dict(operands), jax.sharding.PartitionSpec())


@functools.partial(jax.jit, static_argnums=0)
def _spread(f, operands):
  mesh = jax.sharding.get_abstract_mesh()
  axes, whole = mesh.axis_names, jax.sharding.PartitionSpec()
  owners = _owners(operands, mesh.size)

  # Unchecked: an f with loops of its own does not say what differs where.
  @functools.partial(
    jax.shard_map, in_specs=whole, out_specs=whole, check_vma=False
  )
  def here(operands):
    me = jax.lax.axis_index(axes)
    mine = {path: (*x, owners[path] == me) for path, x in operands.items()}
    found = linalg.by_shape(functools.partial(_where_mine, f), mine)
    return jax.tree.map(lambda x: jax.lax.psum(x, axes).astype(x.dtype), found)

  return here(jax.sharding.reshard(operands, whole))


def _owners(operands: Operands, devices: int) -> dict[str, np.ndarray]:
  """By path, the device of each matrix of its batch: `[b]`."""
  # An SVD or a QR of m x n matrices costs some m n min(m, n).
  cost = lambda x: math.prod(x.shape[1:]) * min(x.shape[1:], default=1)
  paths = [path for path, (x, *_) in operands.items() for _ in range(len(x))]
  costs = {path: sum(map(cost, arrays)) for path, arrays in operands.items()}
  owners = np.asarray(assign([costs[path] for path in paths], devices))
  return {path: owners[np.asarray(paths) == path] for path in operands}


def _where_mine(f, *arrays: Any) -> tuple[Array, ...]:
  """f of one matrix after the other, zeros for those that others have."""

  def one(arrays):
    *matrix, mine = arrays
    matrix = [x[None] for x in matrix]
    shapes = jax.eval_shape(f, *matrix)
    zeros = lambda *_: jax.tree.map(jnp.zeros_like, shapes)
    return jax.tree.map(lambda x: x[0], jax.lax.cond(mine, f, zeros, *matrix))

  return jax.lax.map(one, arrays)
