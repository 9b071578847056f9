"""Pytrees by path: the one way in which this package names a leaf.

A path is `jax.tree_util.keystr(key_path, simple=True, separator='/')`, for
example 'encoder/block_0/mlp/kernel'. It is written so for dicts, FrozenDicts,
`nnx.State`, Equinox modules, dataclasses: any pytree.
"""

from collections.abc import Callable, Collection
import re
from typing import Any

import jax

PyTree = Any


def flatten(
  tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
  """Returns the leaves by path, in the order of the tree.

  Raises:
    ValueError: two leaves share one path, as in {'a': {'b': 1}, 'a/b': 2}.
  """
  leaves = {}
  values = jax.tree.leaves(tree, is_leaf=is_leaf)
  for path, leaf in zip(paths(tree, is_leaf), values, strict=True):
    if path in leaves:
      raise ValueError(
        f'{path!r}: two leaves of the tree have this path; rename one of '
        'the keys.'
      )
    leaves[path] = leaf
  return leaves


def paths(
  tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[str]:
  """Returns the paths of the leaves, in the order of the tree."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
  return [_name(key_path) for key_path, _ in leaves]


def map_with_path(
  f: Callable[..., Any],
  tree: PyTree,
  *rest: PyTree,
  is_leaf: Callable[[Any], bool] | None = None,
) -> PyTree:
  """`jax.tree.map` of `f(path, leaf, *leaves_of_rest)`."""
  return jax.tree_util.tree_map_with_path(
    lambda key_path, *leaves: f(_name(key_path), *leaves),
    tree,
    *rest,
    is_leaf=is_leaf,
  )


def check_known(paths: Collection[str], known: Collection[str], what: str):
  """Raises ValueError when a path is not among the known ones."""
  for path in paths:
    if path not in known:
      shown = ', '.join(repr(p) for p in list(known)[:5]) or 'none'
      raise ValueError(
        f'{path!r}: no such {what}; the tree has {len(known)}: {shown}'
        f'{", ..." if len(known) > 5 else ""}.'
      )


def pattern(name: str, regex: str) -> re.Pattern[str]:
  """Compiles the regular expression that the argument `name` was given.

  Raises:
    ValueError: it is none.
  """
  try:
    return re.compile(regex)
  except re.error as e:
    raise ValueError(f'{name}={regex!r}: not a regular expression: {e}.') from e


def is_concrete(tree: PyTree) -> bool:
  """Whether every leaf has a value now: none is traced or only a shape."""
  return not any(
    isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct))
    for x in jax.tree.leaves(tree)
  )


def is_array(x: Any) -> bool:
  """Whether a leaf is an array, traced or only a shape."""
  # NumPy arrays are as good as traced values to a JAX function. Types are not:
  # `np.float32` has a shape and a dtype, which are those of its instances.
  return not isinstance(x, type) and hasattr(x, 'shape') and hasattr(x, 'dtype')


def arrays(tree: PyTree) -> PyTree:
  """The tree with None, which `jax.jit` takes, for all that is no array."""
  if all(map(is_array, jax.tree.leaves(tree))):
    return tree
  return jax.tree.map(lambda x: x if is_array(x) else None, tree)


def with_others(arrays: PyTree, tree: PyTree) -> PyTree:
  """The arrays, with what is no array in the tree put back in its place."""
  if all(map(is_array, jax.tree.leaves(tree))):
    return arrays
  return jax.tree.map(
    lambda other, x: x if other is None else other,
    jax.tree.map(lambda x: None if is_array(x) else x, tree),
    arrays,
    is_leaf=lambda x: x is None,
  )


def _name(key_path) -> str:
  return jax.tree_util.keystr(key_path, simple=True, separator='/')
