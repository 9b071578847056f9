"""Tests of what a binary keeps of its runs."""

import ml_collections
import pytest

from experiments import rows


def opened(workdir, resume, **settings):
  config = ml_collections.ConfigDict(dict(rate=0.1) | settings)
  return rows.Rows(workdir, config, keys=('seed',), free=(), resume=resume)


def write(*files):
  for file in files:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('')


def test_without_resume_the_runs_that_were_there_are_deleted(tmp_path):
  """A later --resume would take them for runs of the new settings."""
  runs = tmp_path / 'oialr-0/metrics.jsonl', tmp_path / 'dense-0/checkpoints/5'
  others = tmp_path / 'notes/one.txt', tmp_path / 'two.txt'
  write(*runs, *others)
  opened(tmp_path, resume=False)  # not of a binary: nothing says what they are
  opened(tmp_path, resume=True)
  assert all(file.exists() for file in (*runs, *others))
  opened(tmp_path, resume=False, rate=0.2)
  assert not (tmp_path / 'oialr-0').exists()
  assert not (tmp_path / 'dense-0').exists()
  assert all(file.exists() for file in others)


def test_rows_are_read_again_where_settings_are_the_same(tmp_path):
  opened(tmp_path, resume=False).add({'seed': 0, 'x': 1.0})
  again = opened(tmp_path, resume=True)
  assert again.find(0) == {'seed': 0, 'x': 1.0} and again.find(1) is None
  with pytest.raises(ValueError, match=r'rate is 0\.1 there and 0\.2 here'):
    opened(tmp_path, resume=True, rate=0.2)
  assert not len(opened(tmp_path, resume=False))
