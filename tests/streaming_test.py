"""Tests of streamed images, from a generated folder in ImageNet's format."""

import collections
import contextlib
import itertools
import math

import numpy as np
import PIL.Image
import pytest

from oialr_jax import data
from oialr_jax.data import streaming
from tests import tfds_folders

CONFIG = data.Augmentation.imagenet()
SIZE = 24


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('tfds')
  tfds_folders.imagenet(path)
  return path


@pytest.fixture(scope='module')
def train(folder):
  return data.source('imagenet2012', 'train', data_dir=folder)


@pytest.fixture(scope='module')
def validation(folder):
  return data.source('imagenet2012', 'validation', data_dir=folder)


def stream(source, batch_size=6, **options):
  options = {'config': CONFIG, 'size': SIZE, 'seed': 5} | options
  return data.stream(source, batch_size, **options)


def take(batches, steps):
  with contextlib.closing(batches):
    return list(itertools.islice(batches, steps))


def assert_same(found, wanted):
  assert len(found) == len(wanted)
  for a, b in zip(found, wanted):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def by_hand(source, steps, batch_size=6, seed=5):
  """The batches as they are promised: by the seed, the epoch, the example."""
  per_epoch = len(source) // batch_size
  for step in range(steps):
    epoch, i = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(source))
    index = order[i * batch_size : (i + 1) * batch_size]
    images = [
      streaming.train_image(
        streaming.decode(source.read([i])[0]['image']),
        np.random.default_rng([seed, epoch, i]),
        config=CONFIG,
        size=SIZE,
      )
      for i in index
    ]
    labels = [source.read([i])[0]['label'] for i in index]
    yield {'image': np.stack(images), 'label': np.array(labels)}


def test_the_folder_is_read_as_imagenet(train):
  assert len(train) == 24 and train.classes == 1000
  assert train.shape == (None, None, 3)
  assert len(train.files) == 2
  assert train.where(8) == (train.files[1][0], 0)
  with pytest.raises(IndexError, match='has 24 examples'):
    train.where(24)


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_are_a_function_of_seed_epoch_and_example(train, workers):
  found = take(stream(train, workers=workers), 6)
  assert found[0]['image'].shape == (6, SIZE, SIZE, 3)
  assert found[0]['image'].dtype == np.uint8
  assert all(type(x) is np.ndarray for x in found[0].values())
  assert_same(found, list(by_hand(train, 6)))


def test_an_example_is_distorted_anew_in_every_epoch(train):
  batches = take(stream(train, batch_size=24), 2)
  (a, b) = (dict(zip(x['label'], x['image'])) for x in batches)
  assert len(a) == 24  # labels tell these examples apart
  # Posterised to no bit, a picture is black twice.
  assert all(np.any(a[x] != b[x]) or not a[x].any() for x in a)


def test_a_stream_that_stops_anywhere_goes_on_as_if_it_had_not(train):
  whole = take(stream(train), 6)
  for step in range(6):
    assert_same(take(stream(train, start=step), 6 - step), whole[step:])
    resumed = stream(train)
    next(resumed)
    resumed.set_state({'step': step})
    assert resumed.get_state() == {'step': step}
    assert_same(take(resumed, 6 - step), whole[step:])


@pytest.mark.parametrize('count', [2, 3])
def test_processes_share_the_same_global_batches(train, count):
  whole = take(stream(train), 5)
  parts = [
    take(stream(train, process_index=i, process_count=count), 5)
    for i in range(count)
  ]
  joined = [
    {k: np.concatenate([b[k] for b in batch]) for k in batch[0]}
    for batch in zip(*parts)
  ]
  assert_same(joined, whole)


def test_finishing_makes_model_inputs_of_a_streamed_batch(train):
  import jax

  (batch,) = take(stream(train), 1)
  new = jax.eval_shape(
    lambda x: data.finish(x, jax.random.key(0), config=CONFIG, classes=1000),
    batch,
  )
  assert new['image'].shape == (6, SIZE, SIZE, 3)
  assert new['label'].shape == (6, 1000)


def test_an_image_that_is_not_distorted_is_resized():
  image = PIL.Image.fromarray(tfds_folders.picture(50, 70))
  plain = data.Augmentation(mean=CONFIG.mean, std=CONFIG.std)
  kinds = PIL.Image.Resampling
  wanted = [
    np.asarray(image.resize((SIZE, SIZE), kind))
    for kind in (kinds.BILINEAR, kinds.BICUBIC)
  ]
  seen = set()
  for seed in range(8):
    found = streaming.train_image(
      image, np.random.default_rng(seed), config=plain, size=SIZE
    )
    (kind,) = (i for i, x in enumerate(wanted) if np.array_equal(found, x))
    seen.add(kind)
  assert seen == {0, 1}


def test_flips_and_crops_are_as_configured():
  """Of a picture whose red grows to the right and whose green grows downwards."""
  y, x = np.mgrid[:60, :80]
  ramp = np.stack([x * 3, y * 4, 0 * x], -1).astype(np.uint8)
  image = PIL.Image.fromarray(ramp)
  config = data.Augmentation(
    mean=CONFIG.mean, std=CONFIG.std, scale=(0.25, 0.25), flip=0.5
  )
  flips = []
  for seed in range(40):
    new = streaming.train_image(
      image, np.random.default_rng(seed), config=config, size=SIZE
    ).astype(int)
    left, right = new[:, 2, 0].mean() / 3, new[:, -3, 0].mean() / 3
    top, bottom = new[2, :, 1].mean() / 4, new[-3, :, 1].mean() / 4
    flips.append(left > right)
    width, height = abs(right - left), bottom - top
    # From the middle of the third pixel to that of the last but two.
    width, height = (v * SIZE / (SIZE - 5) for v in (width, height))
    assert math.isclose(width * height, 0.25 * 60 * 80, rel_tol=0.15)
    assert 0.65 < width / height < 1.5
  assert 0.25 < np.mean(flips) < 0.75


@pytest.mark.parametrize('size, share', [(20, 0.9), (32, 1.0), (33, 0.875)])
def test_evaluation_resizes_and_takes_the_centre(size, share):
  """torchvision's Resize and CenterCrop, which timm composes."""
  for height, width in [(60, 90), (91, 64), (50, 50)]:
    image = PIL.Image.fromarray(tfds_folders.picture(height, width))
    short = math.floor(size / share)
    if width <= height:
      new_width, new_height = short, int(short * height / width)
    else:
      new_width, new_height = int(short * width / height), short
    wanted = np.asarray(
      image.resize((new_width, new_height), PIL.Image.Resampling.BICUBIC)
    )
    top = int(round((new_height - size) / 2.0))
    left = int(round((new_width - size) / 2.0))
    found = streaming.eval_image(image, size=size, share=share)
    np.testing.assert_array_equal(
      found, wanted[top : top + size, left : left + size]
    )


@pytest.mark.parametrize('count', [1, 2, 4])
def test_an_evaluation_counts_every_example_once(validation, count):
  seen = collections.Counter()
  for i in range(count):
    batches = data.eval_stream(
      validation, 4, size=SIZE, process_index=i, process_count=count
    )
    for _ in '12':  # it can be had again
      found = list(batches())
    assert [b['image'].shape for b in found] == [(4 // count, 24, 24, 3)] * 3
    for batch in found:
      seen.update(batch['label'][batch['mask'] > 0].tolist())
  labels = [x['label'] for x in validation.read(range(10))]
  assert seen == collections.Counter(labels)


def test_workers_evaluate_alike(validation):
  here, there = (
    list(data.eval_stream(validation, 4, size=SIZE, workers=workers)())
    for workers in (0, 1)
  )
  assert_same(here, there)


def test_grey_cmyk_and_png_files_are_decoded(train):
  modes = []
  for example in train.read(range(4)):
    image = streaming.decode(example['image'])
    assert image.mode == 'RGB'
    modes.append(np.ptp(np.asarray(image, int), axis=-1).max())
  assert modes[1] == 0 and min(modes[0], modes[2], modes[3]) > 50


@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_record_is_named_by_file_and_row(tmp_path, workers):
  rows = [(tfds_folders.encode(tfds_folders.picture(40, 50)), 1)] * 4
  broken = rows[0][0][:-300], 1  # a JPEG that ends too early
  tfds_folders.write(
    tmp_path,
    *tfds_folders.IMAGENET,
    {'train': [rows, [*rows[:2], broken, *rows]]},
    classes=1000,
  )
  source = data.source('imagenet2012', 'train', data_dir=tmp_path)
  assert source.where(6)[1] == 2
  batches = stream(source, batch_size=11, workers=workers)
  with (
    contextlib.closing(batches),
    pytest.raises(
      ValueError,
      match=r"'imagenet2012': row 2 of .*train.*-00001-of-00002 cannot be read",
    ),
  ):
    next(batches)


def test_wrong_calls_say_what_is_wrong(train):
  with pytest.raises(ValueError, match=r'batch_size=25: must be in \[1, 24\]'):
    stream(train, batch_size=25)
  with pytest.raises(ValueError, match='batch_size=6: must be a multiple of 4'):
    stream(train, process_index=0, process_count=4)
  with pytest.raises(ValueError, match=r'mean=\(0.5,\): .* RGB'):
    stream(train, config=data.Augmentation(mean=(0.5,), std=(0.5,)))
  with pytest.raises(ValueError, match=r'share=0: must be in \(0, 1\]'):
    data.eval_stream(train, 4, size=SIZE, share=0)
