"""Writes the API reference: a page a public module, from its docstrings.

python -m tests.reference FOLDER
"""

import importlib
import inspect
import pathlib
import sys
import types

import pdoc

MODULES = (
  'oialr_jax',
  'oialr_jax.training',
  'oialr_jax.sharding',
  'oialr_jax.checkpoint',
  'oialr_jax.export',
  'oialr_jax.models',
  'oialr_jax.models.convert',
  'oialr_jax.data',
  'oialr_jax.report',
  'oialr_jax.report.plots',
)


def public(module: types.ModuleType) -> list[str]:
  """Of a package, what it gathers; of another module, what it defines."""
  names = [name for name in vars(module) if not name.startswith('_')]
  if hasattr(module, '__path__'):
    return [n for n in names if not inspect.ismodule(getattr(module, n))]
  here = lambda x: getattr(x, '__module__', None) == module.__name__
  return [name for name in names if here(getattr(module, name))]


def main(folder: str):
  """Writes the pages."""
  specs = []
  for name in MODULES:
    module = importlib.import_module(name)
    inside = [m for m in MODULES if m.rpartition('.')[0] == name]
    # pdoc would list what a module defines, and nothing that it gathers.
    module.__all__ = public(module) + [m.rpartition('.')[2] for m in inside]
    specs += [name, rf'!{name}\..'] if hasattr(module, '__path__') else [name]
  pdoc.render.configure(docformat='google')
  pdoc.pdoc(*specs, output_directory=pathlib.Path(folder))


if __name__ == '__main__':
  main(*sys.argv[1:])
