"""README.md's own programs run as they are written."""

import pathlib
import re

import jax
import numpy as np

import oialr_jax as oialr
from oialr_jax import report

README = pathlib.Path(__file__).parent.parent / 'README.md'


def run(tmp_path, monkeypatch):
  """The programs of README.md, one after the other; what they define."""
  monkeypatch.chdir(tmp_path)
  names = {}
  for code in re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL):
    if '...' not in code:
      exec(compile(code, str(README), 'exec'), names)
  return names


def test_its_programs_do_what_it_says(tmp_path, monkeypatch, capsys):
  names = run(tmp_path, monkeypatch)
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
  result = names['result']
  assert loss(oialr.to_dense(result.params)) < 0.5 * loss(before)
  assert max(oialr.ranks(result.params).values()) < 64
  assert (tmp_path / 'runs' / 'mine' / 'checkpoints' / '300').exists()
  assert report.write('runs/mine').exists()
  count = oialr.count(names['params'])
  assert count.trainable < 0.5 * count.dense
  assert 'batch_stats' in names['statistics']
