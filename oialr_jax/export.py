"""Trained models as files that are read without this package.

`write` leaves a model twice, dense and compressed, each as arrays and a program:

    dense.safetensors       the original model's parameters, by path
    compressed.safetensors  kernels as W = A B where that is smaller
    dense.stablehlo, compressed.stablehlo
                            the forward pass, of any size of batch, for CPU, GPU
                            and TPU; its first argument is what the file of
                            arrays of the same name holds
    SHA256SUMS              for `sha256sum --check`

All that it takes to run one is JAX and safetensors:

    program = pathlib.Path('compressed.stablehlo').read_bytes()
    arrays = safetensors.numpy.load_file('compressed.safetensors')
    y = jax.export.deserialize(program).call(arrays, x)

A file gets its name after it was read back and found to be right.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np
import safetensors as safetensors_lib
from safetensors import numpy as safetensors_numpy

from oialr_jax import lowrank
from oialr_jax import transforms
from oialr_jax import tree
from oialr_jax.factored import factored  # the package's `factored` is this

PyTree = Any
Path = str | os.PathLike
Arrays = dict[str, np.ndarray]

PLATFORMS = ('cpu', 'cuda', 'tpu')

_SUMS = 'SHA256SUMS'
_METADATA = 'oialr_jax'
_NODES = {cls.__name__: cls for cls in (lowrank.LowRank, lowrank.Factors)}


def write(
  folder: Path,
  fn: Callable[..., PyTree],
  params: PyTree,
  inputs: Sequence[PyTree],
  *,
  tolerance: float = 1e-5,
  platforms: Sequence[str] = PLATFORMS,
) -> dict[str, int]:
  """Writes a trained model, dense and compressed, as the module says.

  Args:
    folder: for the files; it is made where it is missing.
    fn: the forward pass, `fn(params, *inputs)`, written for dense parameters:
      `model.apply` of a Flax model whose params are its variables.
    params: as trained; pruned directions are sliced away.
    inputs: examples to check the files on: arrays, or pytrees of them, with the
      batch as axis 0.
    tolerance: see `stablehlo`; the compressed model's outputs are compared to
      those of the trained one, too.
    platforms: see `stablehlo`.

  Returns:
    The size of every file in bytes, by its name.

  Raises:
    ValueError: as `stablehlo`.
    TypeError: as `safetensors`.
  """
  folder, sizes = pathlib.Path(folder), {}
  params = _rebuilt(params, _arrays(params))
  expected = _outputs(fn, params, inputs, platforms)
  with _one_device(platforms):
    forms = {
      'dense': transforms.to_dense(params),
      'compressed': transforms.to_factors(transforms.compact(params)),
    }
  for name, form in forms.items():
    arrays, program = f'{name}.safetensors', f'{name}.stablehlo'
    sizes[arrays] = safetensors(folder / arrays, form)
    sizes[program] = _stablehlo(
      folder / program, fn, form, inputs, expected, tolerance, platforms
    )
  with _named_at_last(folder / _SUMS) as temporary:
    sums = (f'{_sha256(folder / name)}  {name}\n' for name in sizes)
    temporary.write_text(''.join(sums))
  return sizes


def safetensors(path: Path, params: PyTree) -> int:
  """Writes parameters as arrays by path, low-rank kernels as their factors.

  A kernel W = A B (`Factors`) is two arrays, 'PATH/a' and 'PATH/b'; `LowRank`,
  W = U Sigma V^T, is 'PATH/u', 'PATH/s' and 'PATH/vt'. How they make up the
  kernel is in the file's metadata, under 'oialr_jax', as JSON. With

      k = json.loads(metadata['oialr_jax'])['kernels'][PATH]
      b, m, n = k['matrix']

  W is, by NumPy,

      w = A.reshape(b, m, -1) @ B.reshape(b, -1, n)
      w.reshape(k['split']).transpose(k['order']).reshape(k['shape'])

  and x W of a dense layer is x.reshape(-1, m) @ A.reshape(m, -1) @
  B.reshape(-1, n).

  Args:
    path: of the file.
    params: pytree of arrays, with or without low-rank kernels.

  Returns:
    The size of the file in bytes.

  Raises:
    ValueError: two leaves have the same path.
    TypeError: a leaf is no array.
  """
  arrays = _arrays(params)
  leaves = tree.flatten(params, lowrank.is_factored)
  kernels = {
    p: _described(x) for p, x in leaves.items() if lowrank.is_factored(x)
  }
  about = {'kernels': kernels, 'sha256': _digest(arrays, kernels)}
  with _named_at_last(path) as temporary:
    metadata = {_METADATA: json.dumps(about)}
    temporary.write_bytes(safetensors_numpy.save(arrays, metadata))
    _read(temporary)
  return pathlib.Path(path).stat().st_size


def load(path: Path, like: PyTree | None = None) -> PyTree:
  """Reads what `safetensors` has written.

  Args:
    path: of the file.
    like: a tree of arrays or of their shapes, of the original model as
      `jax.eval_shape(model.init, ...)` gives it: the structure to return.

  Returns:
    The parameters; low-rank kernels are the nodes that they were, for
    `factored(fn)` or `to_dense`. By default they are a dict by path.

  Raises:
    ValueError: the file is damaged or of another origin, or does not hold what
      `like` says.
    FileNotFoundError: there is no such file.
  """
  arrays, kernels = _read(path)
  leaves = {}
  for at, described in kernels.items():
    cls = _NODES[described['kind']]
    fields = [f.name for f in dataclasses.fields(cls) if f.name != 'view']
    inside = f'{at}/' if at else ''  # parameters may be one kernel
    factors = (jnp.asarray(arrays.pop(inside + name)) for name in fields)
    view = {k: tuple(axes) for k, axes in described['view'].items()}
    leaves[at] = cls(*factors, lowrank.MatrixView(**view))
  leaves |= {at: jnp.asarray(x) for at, x in arrays.items()}
  if like is None:
    return leaves
  _check_like(path, leaves, tree.flatten(like, lowrank.is_factored))
  return tree.map_with_path(
    lambda at, _: leaves[at], like, is_leaf=lowrank.is_factored
  )


def stablehlo(
  path: Path,
  fn: Callable[..., PyTree],
  params: PyTree,
  inputs: Sequence[PyTree],
  *,
  tolerance: float = 1e-5,
  platforms: Sequence[str] = PLATFORMS,
) -> int:
  """Writes a forward pass as a program, to be read by `jax.export.deserialize`.

  Its first argument is a dict of arrays by path, as `safetensors` writes these
  params and `safetensors.numpy.load_file` reads them. The other arguments are
  those of fn, with a batch of any size.

  Args:
    path: of the file.
    fn: `fn(params, *inputs)`, written for dense parameters.
    params: pytree of arrays, with or without low-rank kernels.
    inputs: examples to check the program on: arrays, or pytrees of them, with
      the batch as axis 0.
    tolerance: how far outputs may be from those of fn, relative to the largest
      of them, where both run on the first of the platforms that is at hand.
      1e-5 is for float32.
    platforms: to lower for.

  Returns:
    The size of the file in bytes.

  Raises:
    ValueError: inputs have no batch in common; the program that was read back
      computes something else; no platform is at hand.
    TypeError: a leaf of params is no array.
  """
  expected = _outputs(fn, params, inputs, platforms)
  return _stablehlo(path, fn, params, inputs, expected, tolerance, platforms)


def _stablehlo(path, fn, params, inputs, expected, tolerance, platforms) -> int:
  arrays = _arrays(params)
  # The cost model's choice would depend on the size of the batch.
  forward = factored(fn, contraction='factors')

  def program(arrays, *inputs):
    return forward(_rebuilt(params, arrays), *inputs)

  with _one_device(platforms), _named_at_last(path) as temporary:
    export = jax_export.export(jax.jit(program), platforms=platforms)
    exported = export(_shapes(arrays), *_shapes(inputs, 'batch'))
    temporary.write_bytes(exported.serialize())
    again = jax_export.deserialize(bytearray(temporary.read_bytes()))
    found = again.call(arrays, *jax.device_get(inputs))
    _check_close(path, found, expected, tolerance)
  return pathlib.Path(path).stat().st_size


def _outputs(fn, params, inputs, platforms) -> PyTree:
  """What the trained model computes, on the device of the checks."""
  if not isinstance(inputs, (tuple, list)):
    raise TypeError(
      f'inputs is a {type(inputs).__name__}: pass a tuple of what follows '
      'params, such as (x,).'
    )
  shapes = [np.shape(x) for x in jax.tree.leaves(inputs)]
  if len({shape[:1] for shape in shapes}) != 1 or () in shapes:
    raise ValueError(
      f'inputs are of shapes {shapes}: axis 0 of them all has to be the batch. '
      'Close over what has none: fn=lambda params, x: fn(params, x, mask).'
    )
  params, inputs = _rebuilt(params, _arrays(params)), jax.device_get(inputs)
  with _one_device(platforms):
    return jax.jit(factored(fn))(params, *inputs)


@contextlib.contextmanager
def _one_device(platforms: Sequence[str]) -> Iterator[None]:
  """Works on the first platform that is at hand, whatever mesh is set."""
  for platform in platforms:
    with contextlib.suppress(RuntimeError):
      device = jax.local_devices(backend=platform)[0]
      break
  else:
    raise ValueError(
      f'platforms={tuple(platforms)}: none of them is at hand to check the '
      f'program on; add {jax.default_backend()!r}.'
    )
  # A program that is traced under a mesh runs on as many devices alone.
  mesh = jax.sharding.Mesh(np.array(device), ())
  with jax.default_device(device), jax.set_mesh(mesh):
    yield


def _shapes(arrays: PyTree, *batch: str) -> PyTree:
  """Shapes of arrays; with a name for the batch, axis 0 is of any size."""
  sizes = jax_export.symbolic_shape(','.join(batch))
  of = lambda x: (*sizes, *x.shape[len(sizes) :])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(of(x), x.dtype), arrays)


def _check_close(path: Path, found: PyTree, expected: PyTree, tolerance: float):
  wide = lambda x: np.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
  wanted = tree.flatten(expected)
  for name, y in tree.flatten(found).items():
    y, z = wide(y), wide(wanted[name])
    scale = np.max(np.abs(z), where=np.isfinite(z), initial=0)
    limit = tolerance * scale
    if not np.isclose(y, z, rtol=0, atol=limit, equal_nan=True).all():
      with np.errstate(invalid='ignore', divide='ignore'):
        error = np.max(np.abs(y - z)) / scale
      raise ValueError(
        f'{path}: output {name!r} is {error:.2g} away from that of the trained '
        f'model, relative to its largest value; tolerance={tolerance:.2g}. '
        'It was not written. If the model computes or is stored in less than '
        'float32, pass the tolerance that suits its type.'
      )


def _arrays(params: PyTree) -> Arrays:
  """The leaves by path, factors each as one, as NumPy arrays in C's order."""
  leaves = tree.flatten(params)
  for path, x in leaves.items():
    array = isinstance(x, (jax.Array, np.ndarray))
    if not array or jnp.issubdtype(x.dtype, jax.dtypes.extended):
      kind = x.dtype if array else type(x).__name__
      raise TypeError(
        f'{path!r}: a {kind} cannot be written as an array; leave it out of '
        'params, as by equinox.filter(params, equinox.is_inexact_array).'
      )
  # Safetensors writes other orders as they lie in memory: wrong.
  return {
    k: np.asarray(x, order='C') for k, x in jax.device_get(leaves).items()
  }


def _rebuilt(params: PyTree, arrays: Arrays) -> PyTree:
  return tree.map_with_path(lambda path, _: arrays[path], params)


def _described(node: lowrank.LowRank | lowrank.Factors) -> dict[str, Any]:
  order = node.view.order(node.ndim - node.view.ndim)
  batch, rows, cols = node.view.split(node.shape)
  return {
    'kind': type(node).__name__,
    'shape': node.shape,
    'matrix': lowrank.matrix_shape(node),
    'split': (*batch, *rows, *cols),
    'order': sorted(range(len(order)), key=order.__getitem__),
    'view': dataclasses.asdict(node.view),
  }


def _digest(arrays: Arrays, kernels: Mapping[str, Any]) -> str:
  digest = hashlib.sha256(json.dumps(kernels).encode())
  for name in sorted(arrays):
    x = arrays[name]
    digest.update(f'{name} {x.dtype} {x.shape}'.encode())
    digest.update(x.tobytes())
  return digest.hexdigest()


def _read(path: Path) -> tuple[Arrays, dict[str, Any]]:
  """The arrays as they are in the file, and what kernels they make up."""
  try:
    with safetensors_lib.safe_open(path, framework='np') as file:
      metadata = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}
    about = json.loads(metadata.get(_METADATA, '{}'))
    intact = about and _digest(arrays, about['kernels']) == about['sha256']
  except (safetensors_lib.SafetensorError, KeyError, ValueError) as e:
    raise ValueError(
      f'{path}: is damaged, or no safetensors file ({e}); copy or write it '
      'again.'
    ) from e
  if not about:
    raise ValueError(
      f'{path}: was not written by oialr_jax.export; read it by '
      'safetensors.numpy.load_file.'
    )
  if not intact:
    raise ValueError(
      f'{path}: is damaged: it is not what its SHA-256 was taken of; copy or '
      'write it again.'
    )
  return arrays, about['kernels']


def _check_like(path, leaves: dict[str, Any], like: dict[str, Any]):
  for at in [*leaves, *like]:
    if at not in leaves or at not in like:
      where, other = ('like', path) if at in like else (path, 'like')
      raise ValueError(
        f'{at!r}: is in {where} but not in {other}; pass the variables of the '
        'model that was written.'
      )
    found, wanted = (
      f'{x.dtype}{list(x.shape)}' for x in (leaves[at], like[at])
    )
    if found != wanted:
      raise ValueError(
        f'{at!r}: is {found} in {path}, {wanted} in like; pass the variables '
        'of the model that was written.'
      )


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@contextlib.contextmanager
def _named_at_last(path: Path) -> Iterator[pathlib.Path]:
  """A file beside path, which takes its place when nothing was raised."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'{path.name}.tmp')
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
