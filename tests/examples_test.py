"""The examples do what they are for, and are as short as they say."""

import ast
import contextlib
import io
import pathlib
import re
import runpy

import pytest

import experiments.examples

FOLDER = pathlib.Path(experiments.examples.__file__).parent


def statements(path):
  """Lines of code without imports, docstrings and comments."""
  body = ast.parse(path.read_text()).body
  kept = [
    x for x in body[1:] if not isinstance(x, (ast.Import, ast.ImportFrom))
  ]
  return ''.join(map(ast.unparse, kept)), sum(
    len(ast.unparse(x).splitlines()) for x in kept
  )


@pytest.mark.parametrize(
  'name, most', [('fit_your_model', 20), ('own_loop', 30)]
)
def test_an_example_is_short_and_learns_with_lower_ranks(name, most):
  path = FOLDER / f'{name}.py'
  source, lines = statements(path)
  assert lines < most, source
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    runpy.run_path(str(path))
  ranks, loss = re.fullmatch(r'(\{.*\}) (\S+)\n', printed.getvalue()).groups()
  assert max(ast.literal_eval(ranks).values()) < 48
  assert float(loss) < 0.1  # that of a constant is 0.5
