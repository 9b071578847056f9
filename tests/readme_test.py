"""README.md's own example runs as it is written."""

import pathlib
import re

import jax
import numpy as np

README = pathlib.Path(__file__).parent.parent / 'README.md'


def test_the_story_from_dense_to_low_rank_and_back(capsys):
  (code,) = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
  names = {}
  exec(compile(code, str(README), 'exec'), names)
  assert 'layers_0/kernel' in capsys.readouterr().out
  before = names['model'].init(jax.random.key(1), names['x'])
  jax.tree.map(
    lambda a, b: np.testing.assert_equal(a.shape, b.shape),
    names['dense'],
    before,
  )
  loss = lambda p: np.mean(
    (names['model'].apply(p, names['x']) - names['y']) ** 2
  )
  assert loss(names['dense']) < 0.5 * loss(before)
