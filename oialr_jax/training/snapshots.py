"""What a checkpoint's manifest says of a run, and what follows from it."""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
from typing import Any

import jax
import optax

from oialr_jax import checkpoint
from oialr_jax import layers as layers_lib
from oialr_jax import metrics
from oialr_jax import schedule as schedule_lib
from oialr_jax import transforms
from oialr_jax import tree
from oialr_jax.training import conversion as conversion_lib

PyTree = Any

_BYTES = 'base64'
# What of an identity is of the method, and of no dense step.
_OF_METHOD = 'layers', 'schedule', 'conversion'
# What of a manifest is empty as long as nothing was done to layers, or measured.
_SINCE_EVENTS = 'ranks', 'converted', 'bases', 'tracked'


def identity(
  params: PyTree,
  layers: Sequence[layers_lib.Layer],
  schedule: schedule_lib.Schedule | None,
  conversion: conversion_lib.Conversion | None,
  optimizer: optax.GradientTransformation,
  seed: int,
) -> dict[str, Any]:
  """What has to be the same where a run is resumed.

  The mesh is not in it: a run may go on with any number of devices.

  Args:
    params: shapes of the parameters that the run begins with.
    layers: that the method is used on.
    schedule: of the method; None for a dense run.
    conversion: of another method.
    optimizer: of the run.
    seed: of the run's key.
  """
  converted = {}
  if conversion is not None:
    after = jax.eval_shape(lambda p: conversion.convert(p, layers), params)
    converted = {'step': int(conversion.step), **shapes_of(after)}
  found = {
    'parameters': shapes_of(params),
    'layers': {x.path: [*x.matrix, x.stack] for x in layers},
    'schedule': dataclasses.asdict(schedule) if schedule else {},
    'conversion': converted,
    'optimiser': {'states': _states(jax.eval_shape(optimizer.init, params))},
    'seed': {'seed': int(seed)},
  }
  return json.loads(json.dumps(found))  # as it is read again: without tuples


def check_same(mine: Mapping[str, Any], theirs: Mapping[str, Any]):
  """Compares two identities.

  Raises:
    ValueError: they differ; says in what.
  """
  for what, values in mine.items():
    others = theirs.get(what, {})  # an older release says less
    found = [
      f'{name!r}: {there} there, {here} here'
      for name, (here, there) in differing(values, others).items()
    ]
    if found:
      raise ValueError(
        f'the checkpoint is of another run; different in its {what}: '
        + '; '.join(found[:5])
        + ('; ...' if len(found) > 5 else '')
      )


def check_resumable(mine: Mapping[str, Any], manifest: checkpoint.Manifest):
  """Compares an identity with that of a snapshot, as far as it matters there.

  As long as a run is dense it may go on by any method, or by none.

  Args:
    mine: identity of the run that is to go on.
    manifest: of the snapshot.

  Raises:
    ValueError: they differ; says in what.
  """
  if not any(manifest.get(name) for name in _SINCE_EVENTS):
    mine = {k: v for k, v in mine.items() if k not in _OF_METHOD}
  check_same(mine, manifest['run'])


def differing(
  one: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """By name, the values of both where they are not the same."""
  names = {**one, **other}
  pairs = {name: (one.get(name), other.get(name)) for name in names}
  return {name: (x, y) for name, (x, y) in pairs.items() if x != y}


def shapes_of(arrays: PyTree) -> dict[str, str]:
  """Dtype and shape by path, to be read."""
  return {
    p: f'{x.dtype}{list(x.shape)}' for p, x in tree.flatten(arrays).items()
  }


def _states(opt_state: PyTree) -> list[str]:
  """The classes that a state is made of, in order."""
  names = []

  def note(node) -> bool:
    if hasattr(node, '_fields') or dataclasses.is_dataclass(node):
      names.append(type(node).__name__)
    return False

  jax.tree.flatten(opt_state, is_leaf=note)
  return names


def shapes(
  params: PyTree,
  layers: Sequence[layers_lib.Layer],
  manifest: checkpoint.Manifest,
) -> tuple[PyTree, dict[str, jax.ShapeDtypeStruct]]:
  """Of the parameters of a snapshot, and of the bases that it holds by path.

  Args:
    params: shapes of the parameters that the run began with.
    layers: that the method is used on.
    manifest: of the snapshot.
  """
  ranks, by_path = manifest['ranks'], {x.path: x for x in layers}
  there = transforms.low_rank_leaves(params)
  wanted = [by_path[path] for path in ranks if path not in there]

  def convert(params):
    nodes = transforms.low_rank_leaves(params)
    small = {p: transforms.sliced(x, ranks[p]) for p, x in nodes.items()}
    params = transforms.replaced(params, small)
    if not wanted:
      return params
    dtype = manifest['run']['schedule']['basis_dtype']
    rank = {x.path: ranks[x.path] for x in wanted}
    return transforms.to_lowrank(params, wanted, rank=rank, basis_dtype=dtype)

  params = jax.eval_shape(convert, params)
  measured = [by_path[path] for path in manifest['bases']]
  return params, jax.eval_shape(lambda p: metrics.basis(p, measured), params)


def encoded(state: Any) -> Any:
  """The state of data as JSON holds it: itself, or of bytes their base64.

  Raises:
    TypeError: it is neither; says what `get_state` may return.
  """
  if isinstance(state, bytes):
    return {_BYTES: base64.b64encode(state).decode()}
  try:
    json.dumps(state)
  except (TypeError, ValueError) as e:
    raise TypeError(
      f'data.get_state() returns what no checkpoint can hold ({e}): return '
      'bytes, or numbers, texts, lists and dicts with texts as keys.'
    ) from e
  return state


def decoded(state: Any) -> Any:
  """What `encoded` was given."""
  if isinstance(state, dict) and state.keys() == {_BYTES}:
    return base64.b64decode(state[_BYTES])
  return state


def measured(
  params: PyTree, layers: Sequence[layers_lib.Layer]
) -> dict[str, list[jax.Array]]:
  """What tracking compares, of the layers in their order."""
  found = {
    'bases': metrics.basis(params, layers),
    'mixing': metrics.mixing(params, layers),
  }
  return {name: [x[y.path] for y in layers] for name, x in found.items()}


def sigmas(params: PyTree, paths: Sequence[str]) -> list[transforms.Sigma]:
  """Shapes of what an update under way decomposes, in the order of the paths.

  Args:
    params: shapes of a snapshot's parameters.
    paths: from its manifest.
  """
  take = functools.partial(transforms.sigmas, paths=paths)
  found = jax.eval_shape(take, params)
  return [found[path] for path in paths]
