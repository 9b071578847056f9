"""Tests of the package's own rules: layering, imports, docstrings, types."""

import ast
import inspect
import os
import pathlib
import subprocess
import sys
import types

import pytest

import oialr_jax as oialr

_ROOT = pathlib.Path(oialr.__file__).parent

# A module imports from levels below its own, and from its own where the order
# within it allows that; never from above. Directories are one module each.
LEVELS = {
  'tree': 0,
  'lowrank': 1,
  'linalg': 1,
  'jacobi': 1,
  'spread': 1,
  'jaxprs': 1,
  'views': 1,
  'cost': 1,
  'explanation': 2,
  'layers': 2,
  'factored': 2,
  'transforms': 2,
  'metrics': 2,
  'products': 2,
  'optimizer': 3,
  'schedule': 3,
  'models': 4,
  'data': 4,
  'sharding': 4,
  'checkpoint': 4,
  'export': 4,
  'report': 4,
  'training': 5,
}
# What a level may import from outside of the package and of Python.
ALLOWED = {
  0: {'jax', 'numpy'},
  1: {'jax', 'numpy'},
  2: {'jax', 'numpy'},
  3: {'jax', 'numpy', 'optax'},
}

_FILES = sorted(p for p in _ROOT.rglob('*.py') if p != _ROOT / '__init__.py')
_PUBLIC = {
  name: x
  for name, x in vars(oialr).items()
  if not name.startswith('_') and not isinstance(x, types.ModuleType)
}
_FUNCTIONS = {k: x for k, x in _PUBLIC.items() if inspect.isfunction(x)}
_CLASSES = {k: x for k, x in _PUBLIC.items() if inspect.isclass(x)}


def _name(path: pathlib.Path) -> str:
  return path.relative_to(_ROOT).with_suffix('').as_posix()


def _module(path: pathlib.Path) -> str:
  """The module of a file: of a directory, all of it."""
  return path.relative_to(_ROOT).with_suffix('').parts[0]


def _imports(path: pathlib.Path) -> set[str]:
  """The modules that a file imports, with what it takes from packages."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{_name(path)}: a relative import'
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return found


@pytest.mark.parametrize('path', _FILES, ids=_name)
def test_no_module_imports_from_a_level_above_its_own(path):
  assert _module(path) in LEVELS, 'give the new module a level'
  for name in _imports(path):
    package, _, rest = name.partition('.')
    if package != 'oialr_jax':
      continue
    # The package itself, `import oialr_jax`, is what its users see: level 3.
    module = rest.partition('.')[0]
    level = LEVELS.get(module, 3)
    assert level <= LEVELS[_module(path)], name


@pytest.mark.parametrize('path', _FILES, ids=_name)
def test_the_core_imports_jax_alone(path):
  level = LEVELS[_module(path)]
  if level not in ALLOWED:
    return
  outside = {name.partition('.')[0] for name in _imports(path)}
  outside -= sys.stdlib_module_names | {'oialr_jax'}
  assert outside <= ALLOWED[level]


@pytest.mark.parametrize('path', _FILES, ids=_name)
def test_nothing_private_of_jax_is_used(path):
  assert 'jax._src' not in path.read_text()


def test_importing_starts_no_device():
  """Else no processes could be joined, nor devices chosen, afterwards."""
  names = sorted({_module(path) for path in _FILES})
  code = (
    f'import {", ".join(f"oialr_jax.{name}" for name in names)}\n'
    'import experiments.cli, experiments.classification, jax\n'
    "jax.config.update('jax_num_cpu_devices', 3)\n"  # refused when it has begun
    'assert jax.device_count() == 3\n'
  )
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=_ROOT.parent,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert not done.returncode, done.stderr


def test_imports_within_the_core_have_no_cycle():
  """Importing any module first, in a fresh interpreter, would do."""
  edges = {}
  for path in _FILES:
    names = {
      x.split('.')[1] for x in _imports(path) if x.startswith('oialr_jax.')
    }
    edges.setdefault(_module(path), set()).update(names & {*LEVELS})
  done = set()

  def visit(module, above):
    assert module not in above, f'{above} -> {module}'
    if module not in done:
      for other in edges.get(module, set()) - {module}:
        visit(other, (*above, module))
      done.add(module)

  for module in edges:
    visit(module, ())


@pytest.mark.parametrize('name', sorted(_PUBLIC))
def test_every_public_name_has_a_docstring(name):
  if name not in _FUNCTIONS and name not in _CLASSES:
    pytest.fail(f'{name} is neither a function nor a class')
  doc = _PUBLIC[name].__doc__
  # A dataclass or a NamedTuple without one is given its signature.
  assert doc and not doc.startswith(f'{name}('), name
  assert doc.splitlines()[0].rstrip().endswith('.'), 'one line, then the rest'


@pytest.mark.parametrize('name', sorted(_FUNCTIONS))
def test_every_public_function_is_annotated(name):
  signature = inspect.signature(_FUNCTIONS[name])
  for parameter in signature.parameters.values():
    assert parameter.annotation is not parameter.empty, parameter


@pytest.mark.parametrize('name', sorted(_FUNCTIONS))
def test_docstrings_name_their_arguments_and_no_others(name):
  """Where there is a list of arguments, it is that of the signature."""
  doc = inspect.getdoc(_FUNCTIONS[name])
  if 'Args:' not in doc:
    return
  section = doc.split('Args:\n')[1].split('\n\n')[0]
  listed = [
    line.strip().split(':')[0].lstrip('*')
    for line in section.splitlines()
    if line.startswith('  ') and not line.startswith('   ')
  ]
  assert listed == [*inspect.signature(_FUNCTIONS[name]).parameters]


@pytest.mark.parametrize('path', _FILES, ids=_name)
def test_every_module_and_public_function_says_what_it_is_for(path):
  tree = ast.parse(path.read_text())
  assert ast.get_docstring(tree) or not tree.body
  for node in tree.body:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      public = not node.name.startswith('_')
      assert ast.get_docstring(node) or not public, node.name


def test_names_of_the_design_are_there():
  """Other code is written against them."""
  names = """find_layers select explain to_lowrank to_dense to_factors factored
  update_basis prune_sigma compact train_sigma transport trainable
  with_trainable ranks count basis stability Schedule apply_event Layer LowRank
  """
  assert {*names.split()} <= {*_PUBLIC}
