"""Tests of the sets in memory, of their order, and of finding and reading them."""

import collections
import os
import pickle

import numpy as np
import pytest

from oialr_jax import data
from oialr_jax.data import batching
from tests import tfds_folders

REAL = pytest.mark.skipif(
  not os.environ.get('OIALR_DATA_DIR'),
  reason='OIALR_DATA_DIR does not name a folder of prepared TFDS sets',
)


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
  assert train.classes == 10


def split(n=10, white=10):
  image = np.arange(n, dtype=np.uint8)[:, None, None, None]
  return data.Split(image, np.arange(n), white)


def labels(batches, steps):
  return [next(batches)['label'].tolist() for _ in range(steps)]


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
  other = data.batches(split(), 4, seed=4)
  assert labels(other, 5) != labels(data.batches(split(), 4, seed=3), 5)


def test_raw_batches_are_what_lies_in_memory():
  batch = next(data.batches(split(white=255), 4, seed=3, raw=True))
  assert batch['image'].dtype == np.uint8
  np.testing.assert_array_equal(batch['image'].ravel(), batch['label'])


def test_batches_on_the_device_are_the_same():
  here, there = split(white=255), split(white=255).on_device()
  for raw in (False, True):
    a, b = (next(data.batches(s, 4, seed=0, raw=raw)) for s in (here, there))
    assert b['image'].dtype == a['image'].dtype
    np.testing.assert_allclose(a['image'], b['image'], rtol=1e-6)
    np.testing.assert_array_equal(a['label'], b['label'])
  assert not isinstance(b['image'], np.ndarray)


def test_a_run_that_stops_anywhere_goes_on_as_if_it_had_not():
  whole = labels(data.batches(split(), 3, seed=1), 9)  # three epochs
  for step in range(9):
    stopped = data.batches(split(), 3, seed=1)
    labels(stopped, step)
    state = pickle.loads(pickle.dumps(stopped.get_state()))
    assert state == {'step': step}
    resumed = data.batches(split(), 3, seed=1)
    resumed.set_state(state)
    assert labels(resumed, 9 - step) == whole[step:]
    started = data.batches(split(), 3, seed=1, start=step)
    assert labels(started, 9 - step) == whole[step:]
    stopped.set_state({'step': 0})  # and back
    assert labels(stopped, 9) == whole


def test_what_is_done_to_batches_by_their_step_is_resumed_with_them():
  make = lambda **start: data.batches(split(), 3, seed=1, **start).map(
    lambda batch, step: {'label': 100 * step + batch['label']}
  )
  whole = labels(make(), 6)
  plain = np.array(labels(data.batches(split(), 3, seed=1), 6))
  np.testing.assert_array_equal(whole, plain + 100 * np.arange(6)[:, None])
  resumed = make(start=2)
  assert labels(resumed, 2) == whole[2:4]
  assert resumed.get_state() == {'step': 4}
  resumed.set_state({'step': 1})
  assert labels(resumed, 5) == whole[1:]


@pytest.mark.parametrize('count', [1, 2, 3, 6])
def test_processes_share_the_same_global_batches(count):
  whole = labels(data.batches(split(20), 6, seed=1), 7)
  parts = [
    labels(
      data.batches(split(20), 6, seed=1, process_index=i, process_count=count),
      7,
    )
    for i in range(count)
  ]
  assert [sum(p, []) for p in zip(*parts)] == whole


@pytest.mark.parametrize('count', [1, 2, 4])
@pytest.mark.parametrize('examples', [9, 12, 16])
def test_an_evaluation_counts_every_example_once(examples, count):
  seen, steps = collections.Counter(), set()
  for i in range(count):
    batches = list(
      data.eval_batches(
        split(examples), 4, process_index=i, process_count=count
      )()
    )
    steps.add(len(batches))
    for batch in batches:
      assert batch['image'].shape[0] == batch['mask'].size == 4 // count
      seen.update(batch['label'][batch['mask'] > 0].tolist())
  assert seen == {i: 1 for i in range(examples)}
  assert len(steps) == 1  # a process that ends early would hang the others


def test_eval_batches_pad_the_last_one():
  batches = list(data.eval_batches(split(), 4)())
  assert [b['label'].shape for b in batches] == [(4,)] * 3
  real = np.concatenate([b['label'][b['mask'] > 0] for b in batches])
  np.testing.assert_array_equal(real, np.arange(10))
  (raw, *_) = data.eval_batches(split(white=255), 4, raw=True)()
  assert raw['image'].dtype == np.uint8


@pytest.mark.parametrize('size', [0, 11])
def test_a_batch_must_fit(size):
  with pytest.raises(ValueError, match=rf'batch_size={size}: .*\[1, 10\]'):
    data.batches(split(), size, seed=0)


@pytest.mark.parametrize(
  'process, message',
  [
    ((0, 3), 'batch_size=4: must be a multiple of 3'),
    ((2, 2), r'process_index=2: must be in \[0, 2\)'),
    ((-1, 2), r'process_index=-1: must be in \[0, 2\)'),
    ((0, None), 'process_index and process_count go together'),
  ],
)
def test_wrong_shares_say_what_is_wrong(process, message):
  index, count = process
  for make in (
    lambda **share: data.batches(split(), 4, seed=0, **share),
    lambda **share: data.eval_batches(split(), 4, **share),
  ):
    with pytest.raises(ValueError, match=message):
      make(process_index=index, process_count=count)


def test_raw_images_are_of_eight_bits():
  for make in (
    lambda: data.batches(split(white=16), 4, seed=0, raw=True),
    lambda: data.eval_batches(split(white=16), 4, raw=True),
  ):
    with pytest.raises(ValueError, match='raw=True: these pixels go to 16'):
      make()


def test_wrong_states_say_what_is_wrong():
  with pytest.raises(ValueError, match='step=-1: must be at least 0'):
    data.batches(split(), 4, seed=0).set_state({'step': -1})
  with pytest.raises(ValueError, match='step=-2: must be at least 0'):
    data.batches(split(), 4, seed=0, start=-2)


def test_the_order_is_kept_from_release_to_release():
  """Of `np.random.default_rng([seed, epoch]).permutation`, as written down."""
  epoch, index = batching.order(50, 8, seed=7, step=13)
  assert epoch == 2
  wanted = np.random.default_rng([7, 2]).permutation(50)[8:16]
  np.testing.assert_array_equal(index, wanted)


def test_moments_are_those_of_the_pixels():
  image = np.stack([tfds_folders.picture(9, 7, seed) for seed in range(5)])
  mean, std = data.Split(image, np.zeros(5, int)).moments()
  pixels = image.reshape(-1, 3) / 255
  np.testing.assert_allclose(mean, pixels.mean(axis=0))
  np.testing.assert_allclose(std, pixels.std(axis=0))
  config = data.Augmentation(mean=mean, std=std)
  new = np.asarray(data.normalize(image, config)).reshape(-1, 3)
  np.testing.assert_allclose(new.mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(new.std(axis=0), 1, atol=1e-5)


def grey_set(folder, damage=None):
  """A generated `mnist`: 12 examples in two files, one of them damaged."""
  images = [tfds_folders.picture(28, 28, i, channels=1) for i in range(12)]
  rows = tfds_folders.shard(range(12), 28, channels=1)
  if damage is not None:
    rows[damage] = rows[damage][0][:60], 0
  tfds_folders.write(
    folder,
    'mnist',
    '3.0.1',
    {'train': [rows[:5], rows[5:]]},
    classes=10,
    shape=(28, 28, 1),
  )
  return np.stack(images)


def test_sets_are_loaded_pixel_by_pixel(tmp_path, monkeypatch):
  images = grey_set(tmp_path)
  train = data.load('mnist', 'train', data_dir=tmp_path)
  np.testing.assert_array_equal(train.image, images)
  np.testing.assert_array_equal(train.label, np.arange(12) % 10)
  assert train.classes == 10
  monkeypatch.setenv('OIALR_DATA_DIR', str(tmp_path))
  some = data.load('mnist', 'train[25%:75%]')
  np.testing.assert_array_equal(some.image, images[3:9])


def test_a_damaged_record_is_named_by_file_and_row(tmp_path):
  grey_set(tmp_path, damage=7)
  for part in ('train', 'train[6:]'):
    with pytest.raises(
      ValueError, match=r"'mnist': row 2 of .*-00001-of-00002 cannot be read"
    ):
      data.load('mnist', part, data_dir=tmp_path)
  assert len(data.load('mnist', 'train[:7]', data_dir=tmp_path)) == 7


def test_a_damaged_file_is_named_with_a_row(tmp_path):
  grey_set(tmp_path)
  path = next(tmp_path.glob('mnist/*/*-00001-of-00002'))
  content = bytearray(path.read_bytes())
  middle = len(content) // 2
  content[middle : middle + 40] = bytes(b ^ 255 for b in content[middle:][:40])
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r'row \d of .*-00001-of-00002 cannot'):
    data.load('mnist', 'train', data_dir=tmp_path)


def test_missing_data_say_where_and_how(tmp_path):
  with pytest.raises(FileNotFoundError) as e:
    data.load('mnist', 'train', data_dir=tmp_path)
  for part in (str(tmp_path / 'mnist'), 'download_and_prepare', '--data_dir'):
    assert part in str(e.value)
  with pytest.raises(FileNotFoundError, match='ILSVRC2012_img_train.tar'):
    data.source('imagenet2012', 'train', data_dir=tmp_path)


def test_a_missing_file_of_several_is_named(tmp_path):
  grey_set(tmp_path)
  next(tmp_path.glob('mnist/*/*-00001-of-00002')).unlink()
  with pytest.raises(
    FileNotFoundError,
    match=r'1 of 2 files are not there.*-00001-of-00002(.|\n)*prepare',
  ):
    data.load('mnist', 'train', data_dir=tmp_path)


def test_an_unknown_split_is_named(tmp_path):
  grey_set(tmp_path)
  with pytest.raises(ValueError, match="Unknown split 'validation'"):
    data.load('mnist', 'validation', data_dir=tmp_path)


def test_images_of_several_sizes_are_sent_to_stream(tmp_path):
  tfds_folders.imagenet(tmp_path)
  with pytest.raises(ValueError, match=r'shape \(None, None, 3\).*`stream`'):
    data.load('imagenet2012', 'train', data_dir=tmp_path)


@REAL
@pytest.mark.parametrize(
  'name, shape', [('mnist', (28, 28, 1)), ('cifar10', (32, 32, 3))]
)
def test_real_images_are_read_without_tensorflow(name, shape):
  import tensorflow_datasets as tfds

  test = data.load(name, 'test[:500]')
  assert test.image.shape == (500, *shape)
  assert test.image.dtype == np.uint8 and test.image.max() == 255
  assert set(test.label) == set(range(10)) and test.classes == 10
  # As TFDS itself decodes them.
  source = tfds.data_source(
    name,
    split='test[:500]',
    data_dir=os.environ['OIALR_DATA_DIR'],
    download=False,
  )
  for i in (0, 123, 499):
    np.testing.assert_array_equal(test.image[i], source[i]['image'])
    assert test.label[i] == source[i]['label']
  whole = data.source(name, 'train')
  assert len(whole) == {'mnist': 60_000, 'cifar10': 50_000}[name]
