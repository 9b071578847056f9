"""Tests of the in-memory image sets."""

import os

import numpy as np
import pytest

from oialr_jax import data


def test_digits_are_split_by_class_and_by_seed():
  train, test = data.digits(seed=0)
  assert len(train) + len(test) == 1797
  assert train.image.shape[1:] == (8, 8, 1) and train.image.dtype == np.uint8
  shares = np.bincount(test.label) / np.bincount(
    np.concatenate([train.label, test.label])
  )
  np.testing.assert_allclose(shares, 0.25, atol=0.01)
  assert np.array_equal(data.digits(seed=0)[1].label, test.label)
  assert not np.array_equal(data.digits(seed=1)[1].label, test.label)


def split(n=10):
  return data.Split(
    np.arange(n, dtype=np.uint8)[:, None, None, None], np.arange(n), 10
  )


def test_batches_hold_every_example_of_an_epoch_once():
  source = data.batches(split(), 5, seed=3)
  epochs = [np.concatenate([next(source)['label'] for _ in '12']) for _ in '12']
  for epoch in epochs:
    assert sorted(epoch) == list(range(10))
  assert list(epochs[0]) != list(epochs[1])


def test_batches_repeat_by_seed_and_are_scaled():
  first, again = (
    data.batches(split(), 4, seed=3),
    data.batches(split(), 4, seed=3),
  )
  for _ in range(5):
    a, b = next(first), next(again)
    np.testing.assert_array_equal(a['label'], b['label'])
    np.testing.assert_allclose(a['image'].ravel(), a['label'] / 10, rtol=1e-6)


@pytest.mark.parametrize('size', [0, 11])
def test_a_batch_must_fit(size):
  with pytest.raises(ValueError, match=rf'batch_size={size}: .*\[1, 10\]'):
    next(data.batches(split(), size, seed=0))


def test_eval_batches_pad_the_last_one():
  batches = list(data.eval_batches(split(), 4)())
  assert [b['label'].shape for b in batches] == [(4,)] * 3
  real = np.concatenate([b['label'][b['mask'] > 0] for b in batches])
  np.testing.assert_array_equal(real, np.arange(10))


def test_missing_data_say_where_and_how(tmp_path):
  with pytest.raises(FileNotFoundError) as e:
    data.load('mnist', 'train', data_dir=tmp_path)
  for part in (str(tmp_path / 'mnist'), 'download_and_prepare', '--data_dir'):
    assert part in str(e.value)


@pytest.mark.skipif(
  not os.environ.get('OIALR_DATA_DIR'),
  reason='OIALR_DATA_DIR does not name a folder of prepared TFDS sets',
)
@pytest.mark.parametrize(
  'name, shape', [('mnist', (28, 28, 1)), ('cifar10', (32, 32, 3))]
)
def test_real_images_are_read_without_tensorflow(name, shape):
  test = data.load(name, 'test[:500]')
  assert test.image.shape == (500, *shape)
  assert test.image.dtype == np.uint8 and test.image.max() == 255
  assert set(test.label) == set(range(10))
