"""Tests of checkpoints: what is kept, and that no damage goes unnoticed."""

import errno
import logging
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import checkpoint


def _arrays(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  view = oialr.MatrixView((0,), (1,))
  node = oialr.LowRank(draw(6, 2), draw(2, 2), draw(2, 5), view)
  return {'w': node, 'b': draw(300).astype(jnp.bfloat16), 'n': jnp.int32(seed)}


def _like(_):
  return jax.eval_shape(_arrays)


def _save(folder, steps, keep=checkpoint.Keep(), metrics=None):  # noqa: B008
  with checkpoint.Checkpoints(folder, keep) as saved:
    for step in steps:
      saved.save(
        step,
        _arrays(step),
        {'ranks': {'w': 2}},
        metrics and {'loss': metrics[step], 'kind': 'eval'},
      )


def _restore(folder, **kwargs):
  with checkpoint.Checkpoints(folder) as saved:
    return saved.restore(_like, **kwargs)


def test_what_was_saved_is_read_back(tmp_path):
  _save(tmp_path, [3])
  step, arrays, manifest = _restore(tmp_path)
  assert (step, manifest) == (3, {'ranks': {'w': 2}})
  jax.tree.map(np.testing.assert_array_equal, arrays, _arrays(3))
  dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
  assert dtypes(arrays) == dtypes(_arrays(3))


def test_arrays_may_be_donated_after_saving(tmp_path):
  arrays = _arrays(1)
  with checkpoint.Checkpoints(tmp_path) as saved:
    saved.save(1, arrays, {})
    jax.tree.map(lambda x: x.delete(), arrays)
  _, read, _ = _restore(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, read, _arrays(1))


def test_of_nothing_nothing_is_read(tmp_path):
  assert _restore(tmp_path / 'new') is None


def test_the_newest_stay(tmp_path):
  _save(tmp_path, range(1, 6), checkpoint.Keep(last=3))
  with checkpoint.Checkpoints(tmp_path) as saved:
    assert saved.steps() == [5, 4, 3]
    assert saved.restore(_like, step=4)[0] == 4


@pytest.mark.parametrize('highest, best', [(False, 2), (True, 1)])
def test_the_best_stay_as_well(tmp_path, highest, best):
  losses = {1: 0.9, 2: 0.1, 3: 0.5, 4: 0.6, 5: 0.7}
  keep = checkpoint.Keep(last=2, best=1, highest=highest)
  _save(tmp_path, losses, keep, losses)
  with checkpoint.Checkpoints(tmp_path) as saved:
    assert saved.steps() == [5, 4, best]


def test_the_best_want_their_metric(tmp_path):
  keep = checkpoint.Keep(best=1, metric='accuracy')
  message = r"^keep.metric='accuracy': evaluations have \['loss'\]"
  with pytest.raises(ValueError, match=message):
    _save(tmp_path, [1], keep, {1: 0.5})
  _save(tmp_path, [1], keep)  # one that was not evaluated


def test_a_step_is_saved_anew(tmp_path):
  """After a restart from an older checkpoint, steps come again."""
  _save(tmp_path, [1, 2, 3])
  _save(tmp_path, [2])
  with checkpoint.Checkpoints(tmp_path) as saved:
    assert saved.steps() == [2]


def _files(folder):
  return sorted(
    p for p in folder.rglob('*') if p.is_file() and p.stat().st_size
  )


def _flip(path, rng):
  data = bytearray(path.read_bytes())
  data[rng.integers(len(data))] ^= 1 << rng.integers(8)
  path.write_bytes(data)


def _truncate(path, rng):
  path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


DAMAGE = {'flip': _flip, 'truncate': _truncate, 'miss': lambda p, _: p.unlink()}


@pytest.mark.parametrize('kind', DAMAGE)
def test_no_damaged_checkpoint_is_ever_loaded(tmp_path, kind, caplog):
  """Whatever file of the newest one is hit, the one before is taken."""
  _save(tmp_path, [1, 2])
  rng = np.random.default_rng(0)
  files = _files(tmp_path / '2')
  assert len(files) > 5
  with checkpoint.Checkpoints(tmp_path) as saved:
    for path in files:
      whole = path.read_bytes()
      DAMAGE[kind](path, rng)
      caplog.clear()
      with caplog.at_level(logging.WARNING):
        step, arrays, _ = saved.restore(_like)
      assert step == 1, path
      jax.tree.map(np.testing.assert_array_equal, arrays, _arrays(1))
      if path.name != 'digests.json':
        assert 'is damaged' in caplog.text and path.name in caplog.text
      path.write_bytes(whole)
    assert saved.restore(_like)[0] == 2


def test_when_none_is_intact_it_is_an_error(tmp_path):
  _save(tmp_path, [1, 2])
  rng = np.random.default_rng(0)
  for step in (1, 2):
    _flip(
      max(_files(tmp_path / f'{step}'), key=lambda p: p.stat().st_size), rng
    )
  with pytest.raises(ValueError, match=r'no checkpoint is intact: 2 \(.*1 \('):
    _restore(tmp_path)
  with pytest.raises(ValueError, match=r'no checkpoint is intact: 1 \('):
    _restore(tmp_path, step=1)


def test_what_was_not_finished_is_not_loaded(tmp_path):
  _save(tmp_path, [1, 2])
  (tmp_path / '2' / 'digests.json').unlink()
  assert _restore(tmp_path)[0] == 1
  _save(tmp_path, [2])
  assert _restore(tmp_path)[0] == 2


def test_until_a_checkpoint_is_sealed_there_is_another(tmp_path, monkeypatch):
  """With the fewest that may be kept, whenever the run is killed."""
  digests, go_on = checkpoint._digests, threading.Event()
  _save(tmp_path, [1, 2])

  def slow(folder):
    assert folder.name != '3' or go_on.wait(60)
    return digests(folder)

  monkeypatch.setattr(checkpoint, '_digests', slow)
  with checkpoint.Checkpoints(tmp_path, checkpoint.Keep(last=2)) as saved:
    saved.save(3, _arrays(3), {})
    saved._manager.wait_until_finished()
    assert saved.steps() == [2]  # 1 is gone by then
    go_on.set()
    saved.wait()
    assert saved.steps() == [3, 2]


def test_a_checkpoint_is_sealed_while_nobody_waits_for_it(tmp_path):
  """A run that is killed long after a checkpoint has that checkpoint."""
  with checkpoint.Checkpoints(tmp_path) as saved:
    saved.save(1, _arrays(1), {})
    for _ in range(600):
      if saved.steps():
        break
      time.sleep(0.05)
    assert saved.steps() == [1] and saved.restore(_like)[0] == 1


def test_reading_seals_nothing(tmp_path):
  """What has lost its seal may have lost more, unseen."""
  _save(tmp_path, [1, 2])
  (tmp_path / '2' / 'digests.json').unlink()
  for _ in range(2):
    assert _restore(tmp_path)[0] == 1
  _save(tmp_path, [3])
  assert not (tmp_path / '2' / 'digests.json').exists()


@pytest.mark.parametrize('at', ['save', 'wait_until_finished'])
def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch, at):
  full = OSError(errno.ENOSPC, 'No space left on device')

  def fails(*_, **__):
    raise full

  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(1, _arrays(1), {})
  saved.wait()
  with monkeypatch.context() as patch:
    patch.setattr(saved._manager, at, fails)
    message = 'could not be written.*No space left.*last good one is of step 1'
    with pytest.raises(OSError, match=message):
      saved.save(2, _arrays(2), {})
  assert saved.restore(_like)[0] == 1
  saved.close()


def test_all_can_be_deleted(tmp_path):
  _save(tmp_path, [1, 2])
  with checkpoint.Checkpoints(tmp_path) as saved:
    saved.clear()
    assert saved.restore(_like) is None
    saved.save(1, _arrays(1), {})
  assert _restore(tmp_path)[0] == 1


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'last': 0}, 'last=0'),
    ({'last': 1}, 'last=1: must be at least 2. Of one alone nothing is left'),
    ({'best': -1}, 'best=-1'),
  ],
)
def test_policies_that_make_no_sense(changes, message):
  with pytest.raises(ValueError, match=message):
    checkpoint.Keep(**changes)
