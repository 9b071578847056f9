"""Weights of PyTorch models, of timm's above all, for the models here.

Nothing is listed by hand: the shapes of the Flax variables say which entries
there must be. The models name their submodules as PyTorch's do, so that a path
gives the name, `blocks_3/attn/qkv/kernel` -> `blocks.3.attn.qkv.weight`; a
kernel `[*window, in, out]` is PyTorch's `[out, in, *window]`, be it of a dense
layer or of a convolution.
"""

from collections.abc import Mapping, Sequence
import os
import pathlib
import re
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from oialr_jax.models import registry

_Path = tuple[str, ...]

_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'embedding': 'weight',
  'mean': 'running_mean',
  'var': 'running_var',
}
# Nothing depends on them: the batches that PyTorch's batch norm has seen, and
# the positions that the original Autoformer holds without a use.
_IGNORED = re.compile(r'(^|\.)(num_batches_tracked|position_embedding\.pe)$')


def from_torch(
  model_name: str,
  state_dict: Mapping[str, Any] | str | os.PathLike,
  *,
  inputs: Sequence[jax.ShapeDtypeStruct] | None = None,
  **overrides: Any,
) -> dict[str, Any]:
  """Flax variables of the weights of a PyTorch model.

  Args:
    model_name: one of `models.NAMES`.
    state_dict: arrays by PyTorch's names, or the path of a `.safetensors` file
      of them. See `torch_names` for what it must hold.
    inputs: what the model takes, where it differs from
      `models.inputs(model_name)`: a position embedding, say, is of the size
      of the image.
    **overrides: attributes of the model, as for `models.create`.

  Returns:
    The variables of `models.create(model_name, **overrides)`: a dict with
    'params', and 'batch_stats' where there is batch norm, in the model's
    types.

  Raises:
    ValueError: there is no such model; an entry is missing, unknown or of
      another shape; or the file is of another kind.
    TypeError: the model has no such attribute.
    FileNotFoundError: there is no such file.
    ImportError: safetensors is not installed.
  """
  if isinstance(state_dict, (str, os.PathLike)):
    state_dict = _read(state_dict)
  leaves = _leaves(model_name, inputs, overrides)
  arrays = {
    name: np.asarray(x)
    for name, x in state_dict.items()
    if not _IGNORED.search(name)
  }
  _check(model_name, arrays, leaves)
  flat = {
    path: jnp.asarray(_to_flax(path, arrays[name]), leaf.dtype)
    for name, (path, leaf) in leaves.items()
  }
  return traverse_util.unflatten_dict(flat)


def torch_names(
  model_name: str,
  *,
  inputs: Sequence[jax.ShapeDtypeStruct] | None = None,
  **overrides: Any,
) -> dict[str, tuple[int, ...]]:
  """The shapes of the entries that `from_torch` wants, by PyTorch's names.

  Args:
    model_name: one of `models.NAMES`.
    inputs: as for `from_torch`.
    **overrides: attributes of the model, as for `models.create`.

  Returns:
    Shapes in PyTorch's layout.

  Raises:
    ValueError: there is no such model.
    TypeError: the model has no such attribute.
  """
  leaves = _leaves(model_name, inputs, overrides)
  return {name: _torch_shape(*leaf) for name, leaf in leaves.items()}


def _leaves(
  model_name: str,
  inputs: Sequence[jax.ShapeDtypeStruct] | None,
  overrides: Mapping[str, Any],
) -> dict[str, tuple[_Path, jax.ShapeDtypeStruct]]:
  """Paths and shapes of the model's variables, by PyTorch's names."""
  model = registry.create(model_name, **overrides)
  inputs = registry.inputs(model_name) if inputs is None else inputs
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  return {
    _torch_name(path): (path, leaf)
    for path, leaf in traverse_util.flatten_dict(shapes).items()
  }


def _torch_name(path: _Path) -> str:
  """`('params', 'blocks_3', 'attn', 'kernel')`: 'blocks.3.attn.weight'."""
  *modules, leaf = path[1:]
  modules = [re.sub(r'_(\d+)$', r'.\1', name) for name in modules]
  return '.'.join([*modules, _LEAVES.get(leaf, leaf)])


def _torch_shape(path: _Path, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
  if path[-1] != 'kernel':
    return leaf.shape
  *window, rows, cols = leaf.shape
  return cols, rows, *window


def _to_flax(path: _Path, x: np.ndarray) -> np.ndarray:
  if path[-1] != 'kernel':
    return x
  return x.transpose(*range(2, x.ndim), 1, 0)


def _check(
  model_name: str,
  arrays: Mapping[str, np.ndarray],
  leaves: Mapping[str, tuple[_Path, jax.ShapeDtypeStruct]],
) -> None:
  missing = [name for name in leaves if name not in arrays]
  unknown = [name for name in arrays if name not in leaves]
  if missing or unknown:
    raise ValueError(
      f'these are not the entries of {model_name!r}: '
      + (f'missing {_listed(missing)}; ' if missing else '')
      + (f'unknown {_listed(unknown)}; ' if unknown else '')
      + 'see torch_names(...). Models that differ take the same overrides as '
      'for models.create, such as qkv_bias=False.'
    )
  for name, (path, leaf) in leaves.items():
    wanted, shape = _torch_shape(path, leaf), arrays[name].shape
    if shape != wanted:
      raise ValueError(
        f'{name!r} is of shape {shape}, of {model_name!r} it is {wanted}. '
        'Models of other sizes take overrides, such as num_classes=10; of '
        'other images, inputs=....'
      )


def _listed(names: Sequence[str]) -> str:
  """Up to three of them, and how many more there are."""
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(map(repr, names[:3])) + more


def _read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  path = pathlib.Path(path).expanduser()
  if path.suffix != '.safetensors':
    raise ValueError(
      f'{path}: only .safetensors files are read here. In PyTorch, write one '
      'by safetensors.torch.save_file(model.state_dict(), path).'
    )
  if not path.exists():
    raise FileNotFoundError(f'{path}: there is no such file.')
  try:
    from safetensors import numpy as safetensors
  except ImportError as e:
    raise ImportError(
      f'{path}: reading it takes `pip install safetensors`.'
    ) from e
  return safetensors.load_file(path)
