"""Where arrays live: a mesh of devices, and which axes are split over it.

A mesh has three axes. Batches are split over `data` and `fsdp`; parameters and
the optimiser's state over `fsdp`, and over `tensor` where a rule says so. What
is split is found by `jax.jit`'s partitioner, so that the function computed is
the same on any mesh, to rounding. Nothing of a low-rank kernel but Sigma has a
gradient, hence nothing else is reduced over `data`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import math
import re
import sys
from typing import Any

import jax
from jax import ad_checkpoint
import numpy as np

from oialr_jax import lowrank
from oialr_jax import transforms
from oialr_jax import tree

PyTree = Any
Mesh = jax.sharding.Mesh
NamedSharding = jax.sharding.NamedSharding
Spec = jax.sharding.PartitionSpec

DATA, FSDP, TENSOR = AXES = ('data', 'fsdp', 'tensor')
# Of the first axis of a batch.
BATCH = Spec((DATA, FSDP))
# The name, for policies of `jax.checkpoint`, of what was put together for use.
GATHERED = 'gathered'


def make_mesh(
  *,
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh with the axes `data`, `fsdp` and `tensor`.

  Args:
    data: replicas of the parameters; -1 takes all devices that are left.
    fsdp: devices that parameters and the optimiser's state are split over.
    tensor: devices that the rules of a `Placement` split kernels over.
    devices: to use; by default all, those of other hosts included.

  Raises:
    ValueError: the sizes do not make up the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  rest = fsdp * tensor
  if data == -1 and rest > 0:
    data = len(devices) // rest
  if min(data, fsdp, tensor) < 1 or data * rest != len(devices):
    raise ValueError(
      f'data={data}, fsdp={fsdp}, tensor={tensor}: must be at least 1 and '
      f'multiply to {len(devices)}, the number of devices.'
    )
  return jax.make_mesh(
    (data, fsdp, tensor),
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=devices,
  )


def initialize(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
):
  """Joins the processes of a run; call it before anything else of JAX.

  On a Cloud TPU pod, under Slurm, Open MPI and on GKE nothing needs to be said.
  Without arguments, where no such cluster is found, nothing is done: the run is
  that of one process.

  Args:
    coordinator: 'host:port' of process 0.
    processes: how many there are.
    process: which of them this one is.

  Raises:
    ValueError: only some of the three are given.
    RuntimeError: the processes do not find each other, or JAX was used before.
  """
  given = [x is not None for x in (coordinator, processes, process)]
  if any(given) and not all(given):
    raise ValueError(
      f'coordinator={coordinator}, processes={processes}, process={process}: '
      'pass all three, or none where the cluster knows them.'
    )
  if jax.distributed.is_initialized():
    return
  if all(given):
    jax.distributed.initialize(coordinator, processes, process)
    return
  try:
    jax.distributed.initialize()
  except ValueError:  # no cluster was detected: coordinator_address is missing
    return


@dataclasses.dataclass(frozen=True)
class Placement:
  """Says of every array of a run on which devices which part of it is.

  Attributes:
    mesh: from `make_mesh`.
    rules: (pattern, spec) pairs for parameters: the first pattern that is found
      in the path (`re.search`) says how the *dense* kernel is split over
      `tensor`. In a low-rank kernel U is split as the rows are and V^T as the
      columns.
    min_size: arrays with fewer numbers are not split over `fsdp`.

  Raises:
    ValueError: the mesh lacks an axis; `tensor` goes across processes; a pattern
      is no regular expression; a rule names another axis than `tensor`.
  """

  mesh: Mesh
  rules: tuple[tuple[str, Spec], ...] = ()
  min_size: int = 1024

  def __post_init__(self):
    if self.mesh.axis_names != AXES:
      raise ValueError(
        f'mesh has the axes {self.mesh.axis_names}: must be {AXES}; see '
        'make_mesh.'
      )
    if isinstance(self.mesh, Mesh):  # one that is abstract has no devices
      _check_processes(self.mesh)
    object.__setattr__(self, 'rules', tuple(map(tuple, self.rules)))
    for pattern, spec in self.rules:
      tree.pattern('rules', pattern)
      for axis in _axes(spec):
        if axis != TENSOR:
          raise ValueError(
            f'rules[{pattern!r}]={spec}: rules split over {TENSOR!r} alone, not '
            f'{axis!r}; over {FSDP!r} what is large enough is split by itself.'
          )

  @property
  def replicas(self) -> int:
    """Parts that a batch is split into."""
    return self.mesh.shape[DATA] * self.mesh.shape[FSDP]

  @property
  def replicated(self) -> NamedSharding:
    """Of what every device has a whole copy of."""
    return NamedSharding(self.mesh, Spec())

  def shardings(self, params: PyTree, *others: PyTree) -> Any:
    """Shardings of parameters, and of trees that hold arrays like theirs.

    Args:
      params: arrays or shapes.
      *others: such as the optimiser's state: a leaf whose path ends in that of
        a trainable leaf of the same shape is split as that one is.

    Returns:
      A tree like params, or a tuple of trees like all of the arguments.
    """
    nodes = tree.flatten(params, lowrank.is_factored)
    placed = {path: self._node(path, x) for path, x in nodes.items()}
    mine = tree.map_with_path(
      lambda path, _: placed[path], params, is_leaf=lowrank.is_factored
    )
    if not others:
      return mine
    placed = tree.flatten(transforms.trainable(mine))
    shapes = tree.flatten(transforms.trainable(params))

    def place(path, x):
      for name in _suffixes(path):
        if name in shapes and shapes[name].shape == x.shape:
          return placed[name]
      return self._filled(x.shape)

    return mine, *(tree.map_with_path(place, t) for t in others)

  @property
  def gather(self) -> Callable[[PyTree], PyTree] | None:
    """Puts parameters together again, where they are used; see `train_step`.

    None where nothing is split over `fsdp`. Left alone, the partitioner might
    move activations instead, which are larger.
    """
    return self._gathered if self.mesh.shape[FSDP] > 1 else None

  def _gathered(self, params: PyTree) -> PyTree:
    unsplit = dataclasses.replace(self, min_size=sys.maxsize)
    params = jax.lax.with_sharding_constraint(params, unsplit.shardings(params))
    name = lambda x: ad_checkpoint.checkpoint_name(x, GATHERED)
    return jax.tree.map(name, params)

  def constrain(
    self, params: PyTree, opt_state: PyTree, others: PyTree
  ) -> tuple[PyTree, PyTree, PyTree]:
    """Inside of a program: these as `shardings` says, all others replicated."""
    placed = (
      *self.shardings(params, opt_state),
      jax.tree.map(lambda _: self.replicated, others),
    )
    return jax.lax.with_sharding_constraint((params, opt_state, others), placed)

  def put(self, arrays: PyTree, shardings: PyTree) -> PyTree:
    """The arrays where they belong; those that are there stay.

    Args:
      arrays: of the host, the same in every process, or of the mesh's devices.
      shardings: a tree like it.
    """
    if jax.process_count() == 1:
      return jax.device_put(arrays, shardings)
    return jax.tree.map(_put_globally, arrays, shardings)

  def batch(self, batch: PyTree) -> PyTree:
    """A batch on the devices, split along its first axis.

    Args:
      batch: arrays, the first axis of each being that of the examples; of
        several processes each gives its part, in the order of the processes.

    Raises:
      ValueError: the examples do not divide by the devices.
    """
    placed = tree.map_with_path(self._of_examples, batch)
    if jax.process_count() == 1:
      return jax.device_put(batch, placed)  # one call: each takes a while
    return jax.tree.map(_put_part, batch, placed)

  def padded(self, batch: PyTree) -> PyTree:
    """A batch of an evaluation, filled up to what `batch` can split.

    The examples that are added are copies of the last one.

    Args:
      batch: as `batch` takes it. What is no mapping has no place for a mask,
        and is returned as it is.

    Returns:
      The batch, where it is filled up with a 'mask' that is 0 there.
    """
    arrays = [x for x in jax.tree.leaves(batch) if np.ndim(x) and _is_local(x)]
    count = len(arrays[0]) if arrays else 0
    missing = -count % self._shares
    if not missing or not isinstance(batch, Mapping):
      return batch

    def fill(x):
      if not np.ndim(x) or not _is_local(x):
        return x
      x = np.asarray(x)
      return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])

    filled = jax.tree.map(fill, {'mask': np.ones(count, np.float32), **batch})
    filled['mask'][count:] = 0
    return filled

  @property
  def _shares(self) -> int:
    """Parts that what a process has of a batch is split into."""
    return max(1, self.replicas // jax.process_count())

  def _of_examples(self, path: str, x: Any) -> NamedSharding:
    """The sharding of an array of a batch."""
    if not np.ndim(x):
      return self.replicated
    here = self._shares
    if _is_local(x) and len(x) % here:
      raise ValueError(
        f'batch[{path!r}]: {len(x)} examples do not divide by the {here} '
        'devices that share them; pass a multiple, or a smaller mesh '
        '(sharding.make_mesh(devices=jax.devices()[:1])).'
      )
    return NamedSharding(self.mesh, BATCH)

  def _node(self, path: str, leaf: Any) -> Any:
    """The sharding of a leaf of the parameters, of each part of a node."""
    spec = self._rule(path, leaf)
    if not lowrank.is_factored(leaf):
      return self._filled(leaf.shape, spec)
    size = self.mesh.shape[TENSOR]
    batch, rows, cols = _split_spec(leaf.view, spec, leaf.ndim, size)
    left, right = (*batch, *rows), (*batch, None, *cols)
    if lowrank.is_low_rank(leaf):
      parts = {'u': left, 's': batch, 'vt': right}
    else:
      parts = {'a': left, 'b': right}
    place = lambda name: self._filled(getattr(leaf, name).shape, parts[name])
    return dataclasses.replace(leaf, **{name: place(name) for name in parts})

  def _rule(self, path: str, leaf: Any) -> Spec:
    for pattern, spec in self.rules:
      if re.search(pattern, path):
        if len(spec) > len(leaf.shape):
          raise ValueError(
            f'rules[{pattern!r}]={spec}: {path!r} has {len(leaf.shape)} axes.'
          )
        return spec
    return Spec()

  def _filled(
    self, shape: tuple[int, ...], spec: Sequence[Any] = ()
  ) -> NamedSharding:
    """Splits the largest axis that divides over `fsdp`, where no rule does."""
    parts = [*spec, *[None] * (len(shape) - len(spec))]
    size = self.mesh.shape[FSDP]
    wanted = size > 1 and FSDP not in _axes(spec)
    if wanted and math.prod(shape) >= self.min_size:
      fits = [
        i for i, n in enumerate(shape) if parts[i] is None and n % size == 0
      ]
      if fits:
        parts[max(fits, key=lambda i: shape[i])] = FSDP
    return NamedSharding(self.mesh, Spec(*parts))


def _check_processes(mesh: Mesh):
  for group in mesh.devices.reshape(-1, mesh.shape[TENSOR]):
    processes = sorted({device.process_index for device in group})
    if len(processes) > 1:
      raise ValueError(
        f'tensor={len(group)}: devices of the processes {processes} would '
        'share examples, but every process reads its own; tensor must divide '
        'the devices of one process.'
      )


def _is_local(x: Any) -> bool:
  """Whether it is of this process, and not of all of them together."""
  return not isinstance(x, jax.Array) or x.is_fully_addressable


def _put_part(x: Any, where: NamedSharding) -> jax.Array:
  """The global array of which every process gives its examples."""
  if not _is_local(x):
    return x  # somebody has made a global array of it
  if not np.ndim(x):
    return _put_globally(x, where)
  return jax.make_array_from_process_local_data(where, np.asarray(x))


def _put_globally(x: Any, where: NamedSharding) -> jax.Array:
  """Of what every process has the whole, each puts what its devices hold."""
  if not _is_local(x):
    return jax.device_put(x, where)
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    data = _put_globally(jax.random.key_data(x), where)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, where, x.__getitem__)


def _split_spec(
  view: lowrank.MatrixView, spec: Spec, ndim: int, size: int
) -> tuple[list, list, list]:
  """A kernel's spec as those of its batch, row and column axes.

  Of an axis that is cut it is the blocks that are split over so many devices,
  if they divide by them, else each of them.
  """
  lead = ndim - view.ndim
  whole = [*spec, *[None] * (ndim - len(spec))]
  blocks = view.blocks or (1,) * view.ndim
  cut = lambda name, count: (None, name) if count % size else (name, None)
  core = [
    part
    for name, count in zip(whole[lead:], blocks, strict=True)
    for part in ((name,) if count == 1 else cut(name, count))
  ]
  pick = lambda axes: [core[a] for a in axes]
  return [*whole[:lead], *pick(view.batch)], pick(view.rows), pick(view.cols)


def _axes(spec: Sequence[Any]) -> list[str]:
  """The names in a spec, those in groups as well."""
  groups = (x if isinstance(x, tuple) else (x,) for x in spec)
  return [name for group in groups for name in group if name is not None]


def _suffixes(path: str) -> Iterator[str]:
  """The path, then without its first key, and so on."""
  keys = path.split('/')
  return ('/'.join(keys[i:]) for i in range(len(keys)))
