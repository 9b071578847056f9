"""Tests of augmentation on the device: against Pillow, timm's rules, NumPy."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from oialr_jax import data
from oialr_jax.data import augmentation
from oialr_jax.data import boxes
from oialr_jax.data import streaming
from tests import tfds_folders

PLAIN = data.Augmentation(mean=(0.0,) * 3, std=(1.0,) * 3)
KEY = jax.random.key(0)


def config(**changes):
  fields = dict(mean=(0.0,) * 3, std=(1.0,) * 3)
  return data.Augmentation(**fields | changes)


def images(count, height=12, width=16):
  return np.stack(
    [tfds_folders.picture(height, width, seed) for seed in range(count)]
  )


def augment(options, batch, key=KEY, classes=4):
  function = functools.partial(data.augment, config=options, classes=classes)
  return jax.tree.map(np.asarray, jax.jit(function)(batch, key))


def distort(options, image, key=KEY):
  function = functools.partial(data.distort, config=options)
  return np.asarray(jax.jit(function)(image, key))


def test_presets_are_the_published_settings():
  cifar, imagenet = data.Augmentation.cifar(), data.Augmentation.imagenet()
  assert cifar.scale == (0.8, 1.0) and imagenet.scale == (0.08, 1.0)
  assert (cifar.operations, cifar.magnitude, cifar.magnitude_std) == (2, 9, 0.5)
  assert (cifar.mixup, cifar.cutmix) == (0, 0) and imagenet.mixup == 0.1
  for preset in (cifar, imagenet):
    assert (preset.flip, preset.erase, preset.label_smoothing) == (
      0.5,
      0.25,
      0.1,
    )
  assert cifar.fill == (125, 123, 114)
  assert data.Augmentation.cifar(mixup=0.2).mixup == 0.2
  assert hash(data.Augmentation(mean=[0.5], std=[0.5])) is not None


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'mean': (0.5, 0.5)}, r'mean=\(0.5, 0.5\).*one number for every channel'),
    ({'std': (0.2, 0.2, 0.0)}, 'std must be positive'),
    ({'mean': (125.0, 122.0, 114.0)}, r'pixels in \[0, 1\]'),
    ({'scale': (0.5, 0.2)}, r'scale=\(0.5, 0.2\): must be 0 < least'),
    ({'scale': (0.0, 1.0)}, r'scale=\(0.0, 1.0\)'),
    ({'scale': (0.5,)}, r'scale=\(0.5,\)'),
    ({'flip': 1.5}, r'flip=1.5: must be in \[0, 1\]'),
    ({'erase': -0.1}, r'erase=-0.1: must be in \[0, 1\]'),
    ({'label_smoothing': 2}, r'label_smoothing=2: must be in \[0, 1\]'),
    ({'magnitude': 15}, r'magnitude=15: must be in \[0, 10\]'),
    ({'operations': -1}, 'operations=-1: must be at least 0'),
    ({'mixup': -1.0}, 'mixup=-1.0: must be at least 0'),
  ],
)
def test_wrong_configurations_say_what_is_wrong(changes, message):
  with pytest.raises(ValueError, match=message):
    config(**changes)


def test_wrong_batches_say_what_is_wrong():
  raw, label = images(3), np.zeros(3, np.int32)
  with pytest.raises(TypeError, match='images are float32: pass them as uint8'):
    data.distort(raw.astype(np.float32), KEY, config=PLAIN)
  with pytest.raises(ValueError, match=r'of shape \(3, 12, 16, 1\).*, 3\]'):
    data.normalize(raw[..., :1], PLAIN)
  with pytest.raises(ValueError, match='a batch of 3 .* must be even'):
    finish = functools.partial(data.finish, config=config(mixup=1.0), classes=4)
    jax.eval_shape(finish, {'image': raw, 'label': label}, KEY)


def test_nothing_configured_is_normalisation_only():
  options = data.Augmentation(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
  raw = images(4)
  batch = {'image': raw, 'label': np.arange(4), 'mask': np.ones(4)}
  found = augment(options, batch)
  wanted = (raw.astype(float) / 255 - [0.4, 0.5, 0.6]) / [0.1, 0.2, 0.3]
  np.testing.assert_allclose(found['image'], wanted, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(found['label'], np.eye(4))
  np.testing.assert_array_equal(found['mask'], np.ones(4))
  assert found['image'].dtype == np.float32
  np.testing.assert_array_equal(
    found['image'], jax.jit(lambda x: data.normalize(x, options))(raw)
  )


@pytest.mark.parametrize('cubic', [False, True])
def test_crops_are_resized_as_pillow_does(cubic):
  image = tfds_folders.picture(24, 32)
  kind = (
    PIL.Image.Resampling.BICUBIC if cubic else PIL.Image.Resampling.BILINEAR
  )
  resize = jax.jit(augmentation._resized_crop)
  for box in [(0, 0, 24, 32), (3, 5, 17, 20), (10, 0, 3, 32), (23, 31, 1, 1)]:
    top, left, height, width = box
    wanted = PIL.Image.fromarray(image).crop(
      (left, top, left + width, top + height)
    )
    wanted = np.asarray(wanted.resize((32, 24), kind)).astype(int)
    found = resize(image.astype(np.float32), boxes.Box(*box), np.bool_(cubic))
    assert np.abs(found - wanted).max() <= 1
    assert (np.abs(found - wanted) > 0).mean() < 0.02


def test_flips_are_of_whole_images_and_as_frequent_as_asked():
  raw = images(400, 2, 3)
  found = distort(config(flip=0.3), raw)
  same = (found == raw).all(axis=(1, 2, 3))
  mirrored = (found == raw[:, :, ::-1]).all(axis=(1, 2, 3))
  assert np.all(same | mirrored)
  assert abs(mirrored.mean() - 0.3) < 0.07


def test_crops_are_of_the_size_that_is_asked_for():
  """Of a picture whose red grows to the right and whose green grows downwards."""
  y, x = np.mgrid[:32, :40]
  ramp = np.stack([x * 6, y * 6, 0 * x], -1).astype(np.uint8)
  raw = np.broadcast_to(ramp, (50, *ramp.shape))
  new = distort(config(scale=(0.25, 0.25)), raw).astype(float) / 6
  # Between the middles of the third pixels from the borders.
  width = (new[:, 16, -3, 0] - new[:, 16, 2, 0]) * 40 / 35
  height = (new[:, -3, 20, 1] - new[:, 2, 20, 1]) * 32 / 27
  np.testing.assert_allclose(width * height, 0.25 * 32 * 40, rtol=0.15)
  aspect = width / height
  assert 0.65 < aspect.min() < 0.9 and 1.1 < aspect.max() < 1.5


@pytest.mark.parametrize(
  'magnitude, std, share',
  [
    # At level 0 four operations change a picture, beyond it all of the fifteen:
    (0.0, 0.0, 4 / 30),
    (10.0, 0.0, 15 / 30),
    # a normal number is positive every other time.
    (0.0, 50.0, (4 + 11 / 2) / 30),
  ],
)
def test_magnitudes_are_as_configured(magnitude, std, share):
  raw = images(600, 20, 20) // 2 + 40
  options = config(operations=1, magnitude=magnitude, magnitude_std=std)
  changed = (distort(options, raw) != raw).any(axis=(1, 2, 3))
  assert abs(changed.mean() - share) < 0.05
  changed = [
    np.any(
      streaming.train_image(
        PIL.Image.fromarray(image),
        np.random.default_rng(i),
        config=options,
        size=20,
      )
      != image
    )
    for i, image in enumerate(raw)
  ]
  assert abs(np.mean(changed) - share) < 0.05


def test_augmentation_is_a_function_of_the_key():
  raw = images(6)
  batch = {'image': raw, 'label': np.arange(6) % 4}
  options = data.Augmentation.cifar(mixup=0.5, cutmix=0.5)
  function = jax.jit(functools.partial(data.augment, config=options, classes=4))
  first, again, other = (
    function(batch, jax.random.fold_in(KEY, i)) for i in (1, 1, 2)
  )
  for name in ('image', 'label'):
    np.testing.assert_array_equal(first[name], again[name])
    assert np.any(np.asarray(first[name]) != other[name])
  assert np.isfinite(first['image']).all()


def test_a_batch_is_augmented_without_branches():
  """All examples at once, whatever was drawn for them, and only once compiled."""
  batch = {'image': images(4), 'label': np.arange(4)}
  options = data.Augmentation.cifar(operations=3)
  program = str(
    jax.make_jaxpr(functools.partial(data.augment, config=options, classes=4))(
      batch, KEY
    )
  )
  assert 'cond[' not in program and 'while[' not in program
  assert program.count(' scan[') == 1 and 'length=3' in program


def test_the_parts_make_up_the_whole():
  batch = {'image': images(4), 'label': np.arange(4)}
  options = config(flip=0.5, erase=0.5, label_smoothing=0.1)

  def parts(batch, key):
    first, second = jax.random.split(key)
    image = data.distort(batch['image'], first, config=options)
    batch = batch | {'image': image}
    return data.finish(batch, second, config=options, classes=4)

  jax.tree.map(
    np.testing.assert_array_equal,
    jax.jit(parts)(batch, KEY),
    augment(options, batch),
  )


def test_labels_are_smoothed_as_timm_does():
  batch = {'image': images(2), 'label': np.array([3, 0])}
  found = augment(config(label_smoothing=0.1), batch)['label']
  off, on = 0.1 / 4, 1 - 0.1 + 0.1 / 4
  np.testing.assert_allclose(
    found, [[off, off, off, on], [on, off, off, off]], rtol=1e-6
  )


def test_erasing_puts_noise_into_a_rectangle_and_leaves_the_rest():
  raw = images(300)
  options = config(erase=0.4)
  batch = {'image': raw, 'label': np.zeros(300, int)}
  new = augment(options, batch)['image']
  changed = (new != augment(PLAIN, batch)['image']).any(axis=-1)
  erased = changed.any(axis=(1, 2))
  assert abs(erased.mean() - 0.4) < 0.08
  for mask in changed[erased]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert 0.01 < mask.mean() < 0.4
  noise = new[changed]
  assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_mixing_against_numpy():
  rng = np.random.default_rng(4)
  image = rng.normal(size=(4, 6, 8, 3))
  label = rng.dirichlet(np.ones(5), 4)
  partner = [1, 0, 3, 2]
  # mixup
  found = augmentation.mix(
    jnp.asarray(image), jnp.asarray(label), jnp.full((6, 8), 0.3)
  )
  for new, old in zip(found, (image, label)):
    wanted = 0.3 * old + 0.7 * old[partner]
    np.testing.assert_allclose(new, wanted, rtol=1e-5, atol=1e-6)
  # cutmix
  keep = np.ones((6, 8))
  keep[1:4, 2:8] = 0
  wanted = image.copy()
  for i, j in enumerate(partner):
    wanted[i, 1:4, 2:8] = image[j, 1:4, 2:8]
  share = 1 - 3 * 6 / 48
  new_image, new_label = augmentation.mix(
    jnp.asarray(image), jnp.asarray(label), jnp.asarray(keep)
  )
  np.testing.assert_allclose(new_image, wanted, rtol=1e-6)
  np.testing.assert_allclose(
    new_label, share * label + (1 - share) * label[partner], rtol=1e-5
  )


@pytest.mark.parametrize(
  'mixup, cutmix, kinds',
  [
    (0.7, 0.0, {'blended'}),
    (0.0, 0.7, {'cut'}),
    (0.7, 0.7, {'blended', 'cut'}),
  ],
)
def test_labels_are_mixed_as_much_as_images_are(mixup, cutmix, kinds):
  """Pictures of one grey each show in their mean what was taken of whom."""
  options = config(mixup=mixup, cutmix=cutmix)
  grey = np.array([255, 0, 0, 255], np.uint8)
  raw = np.broadcast_to(grey[:, None, None, None], (4, 12, 16, 3))
  batch = {'image': raw, 'label': np.arange(4)}
  finish = jax.jit(functools.partial(data.finish, config=options, classes=4))
  shares, seen = [], set()
  for i in range(25):
    found = finish(batch, jax.random.fold_in(KEY, i))
    image, label = np.asarray(found['image']), np.asarray(found['label'])
    share = label[0, 0]
    wanted = share * np.eye(4) + (1 - share) * np.eye(4)[[1, 0, 3, 2]]
    np.testing.assert_allclose(label, wanted, atol=1e-6)
    np.testing.assert_allclose(
      image.mean(axis=(1, 2, 3)), wanted @ (grey / 255), atol=1e-5
    )
    shares.append(share)
    if 0.02 < share < 0.98:
      seen.add('cut' if np.ptp(image[0]) > 0.5 else 'blended')
  assert seen == kinds
  assert np.std(shares) > 0.1


def test_a_batch_on_two_devices_is_augmented_as_on_one():
  """And no example moves from one device to the other to be mixed."""
  program = """
import functools
import jax
jax.config.update('jax_num_cpu_devices', 2)
import numpy as np
from oialr_jax import data

config = data.Augmentation.cifar(mixup=0.5, cutmix=0.5)
raw = np.random.default_rng(0).integers(0, 256, (8, 10, 10, 3), np.uint8)
batch = {'image': raw, 'label': np.arange(8)}
augment = jax.jit(functools.partial(data.augment, config=config, classes=8))
key = jax.random.key(3)
mesh = jax.make_mesh((2,), ('data',), (jax.sharding.AxisType.Auto,))
over = jax.NamedSharding(mesh, jax.P('data'))
spread = jax.device_put(batch, over)
alone, shared = augment(batch, key), augment(spread, key)
assert len(shared['image'].sharding.device_set) == 2
assert not shared['image'].is_fully_replicated
jax.tree.map(
  lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), alone, shared
)
text = augment.lower(spread, key).compile().as_text()
for name in ('all-gather', 'all-to-all', 'collective-permute'):
  assert name not in text, name
"""
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
