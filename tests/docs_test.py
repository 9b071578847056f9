"""The API reference is complete, and its pages say what the docstrings say."""

import ast
import html
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

from tests import conventions_test
from tests import reference

_RAW = re.compile(r'<p>(Args|Attributes|Raises|Returns):')


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
  """The pages by module, built with warnings as errors."""
  folder = tmp_path_factory.mktemp('reference')
  command = [sys.executable, '-W', 'error', '-m', 'tests.reference', folder]
  built = subprocess.run(command, capture_output=True, text=True)
  assert built.returncode == 0, built.stderr
  assert built.stdout + built.stderr == ''
  paths = {m: f'{m.replace(".", "/")}.html' for m in reference.MODULES}
  return {m: (folder / p).read_text('utf-8') for m, p in paths.items()}


def names(module):
  """What a package's file imports; what another file defines, unless private."""
  body = ast.parse(pathlib.Path(module.__file__).read_text()).body
  if hasattr(module, '__path__'):
    imports = [x for x in body if isinstance(x, ast.ImportFrom)]
    return [alias.name for x in imports for alias in x.names]
  defined = [x for x in body if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
  return [x.name for x in defined if not x.name.startswith('_')]


def docstrings(page):
  """The HTML that docstrings have become."""
  return re.findall(r'<div class="docstring">(.*?)</div>', page, re.DOTALL)


@pytest.mark.parametrize('name', reference.MODULES)
def test_every_public_name_is_on_the_page_of_its_module(name, pages):
  module = importlib.import_module(name)
  for public in names(module):
    page = f'{name}.{public}'
    if page not in pages:
      assert f'<section id="{public}">' in pages[name], page


def test_no_public_module_is_left_out():
  """What is not core is used by its module's name."""
  levels = conventions_test.LEVELS
  used = {f'oialr_jax.{name}' for name, level in levels.items() if level > 3}
  assert used <= {*reference.MODULES}


@pytest.mark.parametrize('name', reference.MODULES)
def test_docstrings_are_shown_as_they_are_meant(name, pages):
  shown = docstrings(pages[name])
  assert shown
  for text in shown:
    assert not _RAW.search(text), 'a section that was not recognised'
    for tag, inner in re.findall(r'<(em|strong|s)>(.*?)</', text, re.DOTALL):
      # Bold are the names in a list of arguments; an asterisk that is part of
      # an equation would begin an emphasis, which is of a word here.
      meant = r'\w+(, \w+)*:' if tag == 'strong' else '[a-z]+'
      assert re.fullmatch(meant, html.unescape(inner)), text


@pytest.mark.parametrize('name', reference.MODULES)
def test_an_example_is_indented_so_that_it_is_shown_as_code(name):
  module = importlib.import_module(name)
  for x in (module, *(getattr(module, public) for public in names(module))):
    for paragraph in (inspect.getdoc(x) or '').split('\n\n'):
      if re.match(' {1,3}[^ ]', paragraph):
        with pytest.raises(SyntaxError):  # else: indent it by four
          ast.parse(textwrap.dedent(paragraph))


@pytest.mark.parametrize('name', reference.MODULES)
def test_a_page_needs_no_network(name, pages):
  assert not re.search(r'<(script|img|link)[^>]*(src|href)="http', pages[name])
