"""Checkpoints: any pytree of arrays, low-rank leaves included, by Orbax."""

import pathlib
from typing import Any

import orbax.checkpoint as ocp

PyTree = Any


def save(path: str | pathlib.Path, tree: PyTree) -> None:
  """Writes a pytree of arrays, atomically; what was there is replaced."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(pathlib.Path(path).absolute(), tree, force=True)


def restore(path: str | pathlib.Path, like: PyTree) -> PyTree:
  """Reads a pytree back.

  Args:
    path: that was given to `save`.
    like: a pytree of arrays or shapes, of the same structure: low-rank leaves
      have the ranks of the saved ones.

  Raises:
    FileNotFoundError: there is no checkpoint.
    ValueError: structure or shapes differ.
  """
  path = pathlib.Path(path).absolute()
  if not path.exists():
    raise FileNotFoundError(f'{path}: there is no checkpoint.')
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(path, like)
