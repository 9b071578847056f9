"""Tests of RandAugment: against Pillow, and against timm's rules written out."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from oialr_jax.data import randaugment
from tests import tfds_folders

APPLY = jax.jit(randaugment.apply)
FILL = 125, 122, 114
LEVELS = 0.0, 0.37, 1.0


def pictures(channels):
  """Pictures whose histograms differ in kind, `[n, 20, 26, channels]`."""
  full = tfds_folders.picture(20, 26, channels=channels)
  rare = np.zeros_like(full)
  rare[::3, 1::2] = 200  # two grey values: equalisation leaves [0, 255]
  return np.stack([full, full // 4 + 90, np.full_like(full, 77), rare])


def argument(name, level, sign):
  """timm's arguments, of the kind 'increasing'."""
  return {
    'Rotate': 30 * level * sign,
    'Posterize': 4 - int(level * 4),
    'Solarize': 256 - int(level * 256),
    'SolarizeAdd': int(level * 110),
    'Color': max(0.1, 1 + 0.9 * level * sign),
    'Contrast': max(0.1, 1 + 0.9 * level * sign),
    'Brightness': max(0.1, 1 + 0.9 * level * sign),
    'Sharpness': max(0.1, 1 + 0.9 * level * sign),
    'ShearX': 0.3 * level * sign,
    'ShearY': 0.3 * level * sign,
    'TranslateX': 0.45 * level * sign,
    'TranslateY': 0.45 * level * sign,
  }.get(name, 0.0)


CASES = [
  (name, level, sign, cubic)
  for name in randaugment.NAMES
  for level in LEVELS
  for sign in (1, -1)
  for cubic in (False, True)
]


def choice(name, level, sign, cubic):
  index = randaugment.INDEX[name]
  return randaugment.Choice(
    np.int32(index), np.float32(argument(name, level, sign)), np.bool_(cubic)
  )


@functools.cache
def on_device(channels):
  """Every case of every picture, `[cases, pictures, ...]`, in one program."""
  images = pictures(channels)
  count = len(CASES) * len(images)
  choices = jax.tree.map(
    lambda *x: np.repeat(np.stack(x), len(images))[None],
    *(choice(*case) for case in CASES),
  )
  batch = np.broadcast_to(images, (len(CASES), *images.shape))
  batch = batch.reshape(count, *images.shape[1:]).astype(np.float32)
  new = APPLY(batch, choices, jnp.array(FILL[:channels], jnp.float32))
  return np.asarray(new).reshape(len(CASES), *images.shape)


@pytest.mark.parametrize('channels', [3, 1])
@pytest.mark.parametrize('name', randaugment.NAMES)
def test_the_device_does_what_pillow_does(name, channels):
  for case, new in zip(CASES, on_device(channels)):
    if case[0] != name:
      continue
    for image, found in zip(pictures(channels), new):
      pil = PIL.Image.fromarray(image if channels == 3 else image[..., 0])
      wanted = randaugment.apply_pil(pil, choice(*case), FILL[:channels])
      wanted = np.asarray(wanted).reshape(image.shape)
      difference = np.abs(found - wanted)
      assert difference.max() <= 1, case
      # Rounding where Pillow truncates would change half of the pixels.
      assert (difference > 0).mean() < 0.25, case


@pytest.mark.parametrize('name', randaugment.NAMES)
def test_every_operation_but_one_does_something(name):
  new = on_device(3)[CASES.index((name, 1.0, -1, True))]
  changed = [np.any(a != b) for a, b in zip(pictures(3), new)]
  assert any(changed) == (name != 'Identity')


def test_what_pillow_does_is_what_timm_does():
  """`apply_pil` against the calls that timm makes."""
  image = PIL.Image.fromarray(pictures(3)[0])
  turned = image.rotate(17.5, PIL.Image.Resampling.BICUBIC, fillcolor=FILL)
  moved = image.transform(
    image.size,
    PIL.Image.Transform.AFFINE,
    (1, 0, -0.2 * image.width, 0, 1, 0),
    resample=PIL.Image.Resampling.BILINEAR,
    fillcolor=FILL,
  )
  sheared = image.transform(
    image.size,
    PIL.Image.Transform.AFFINE,
    (1, 0, 0, 0.2, 1, 0),
    resample=PIL.Image.Resampling.BILINEAR,
    fillcolor=FILL,
  )
  for name, x, cubic, wanted in [
    ('Rotate', 17.5, True, turned),
    ('TranslateX', -0.2, False, moved),
    ('ShearY', 0.2, False, sheared),
    ('Posterize', 0.0, False, PIL.Image.new('RGB', image.size)),
  ]:
    index = randaugment.INDEX[name]
    found = randaugment.apply_pil(
      image, randaugment.Choice(index, x, cubic), FILL
    )
    # Pillow rounds the rotation's cosine to 15 digits.
    gap = np.asarray(found, int) - np.asarray(wanted, int)
    assert np.abs(gap).max() <= 1, name


def test_operations_are_done_one_after_the_other():
  image = pictures(3)[:1]
  steps = [('Invert', 1.0, 1, False), ('TranslateX', 1.0, 1, False)]
  for order in (steps, steps[::-1]):
    choices = jax.tree.map(
      lambda *x: np.stack(x)[:, None], *(choice(*case) for case in order)
    )
    found = APPLY(
      image.astype(np.float32), choices, jnp.array(FILL, jnp.float32)
    )
    wanted = PIL.Image.fromarray(image[0])
    for case in order:
      wanted = randaugment.apply_pil(wanted, choice(*case), FILL)
    assert np.abs(found[0] - np.asarray(wanted)).max() <= 1
    border = np.asarray(wanted)[0, -1]  # of the fill, inverted or not
    assert tuple(border) == (FILL if order == steps else (130, 133, 141))


@pytest.mark.parametrize('xp', [np, jnp])
@pytest.mark.parametrize('magnitude, std', [(9, 0.5), (10, 0), (3, 4), (0, 0)])
def test_choices_follow_timm(xp, magnitude, std):
  rng = np.random.default_rng(0)
  uniform = rng.random((300, 4)).astype(np.float32)
  normal = rng.normal(size=300).astype(np.float32)
  found = randaugment.choose(
    xp.asarray(uniform),
    xp.asarray(normal),
    magnitude=magnitude,
    magnitude_std=std,
    xp=xp,
  )
  for i, (which, whether, sign, cubic) in enumerate(uniform):
    name = randaugment.NAMES[int(which * 15)]
    level = min(max(magnitude + std * normal[i], 0), 10) / 10
    if whether >= 0.5:
      name = 'Identity'
    assert randaugment.NAMES[int(found.op[i])] == name
    wanted = argument(name, level, -1 if sign < 0.5 else 1)
    assert math.isclose(found.argument[i], wanted, rel_tol=1e-5, abs_tol=1e-5)
    assert bool(found.cubic[i]) == (cubic < 0.5)


def test_every_operation_is_drawn_alike():
  uniform = np.random.default_rng(0).random((30_000, 4))
  found = randaugment.choose(
    uniform, np.zeros(30_000), magnitude=9, magnitude_std=0.5, xp=np
  )
  share = np.bincount(found.op, minlength=16) / 30_000
  np.testing.assert_allclose(share[:15], 1 / 30, atol=0.005)
  np.testing.assert_allclose(share[15], 1 / 2, atol=0.01)
