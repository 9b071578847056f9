"""Tests of rectangles: against timm's loops, of the same random numbers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from oialr_jax.data import boxes


def timm_crop(u, height, width, scale, ratio=(3 / 4, 4 / 3)):
  """RandomResizedCropAndInterpolation.get_params, of given random numbers."""
  for area, aspect, top, left in u:
    target = (scale[0] + (scale[1] - scale[0]) * area) * height * width
    low, high = (math.log(x) for x in ratio)
    aspect = math.exp(low + (high - low) * aspect)
    w = int(round(math.sqrt(target * aspect)))
    h = int(round(math.sqrt(target / aspect)))
    if w <= width and h <= height:
      return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
  if width / height < ratio[0]:
    w, h = width, int(round(width / ratio[0]))
  elif width / height > ratio[1]:
    w, h = int(round(height * ratio[1])), height
  else:
    w, h = width, height
  return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize('xp', [np, jnp])
@pytest.mark.parametrize('size', [(32, 32), (375, 500), (20, 90), (90, 20)])
def test_crops_are_timms(xp, size):
  u = np.random.default_rng(1).random((200, 10, 4)).astype(np.float32)
  u[::2] = u[::2, :1]  # ten times the same: often none of them fits
  for scale in ((0.08, 1.0), (0.8, 1.0)):
    box = boxes.crop_box(xp.asarray(u), *size, scale=scale, xp=xp)
    found = np.stack(box, -1)
    wanted = np.array([timm_crop(x, *size, scale) for x in u.astype(float)])
    # float32 may round the other way where a half decides.
    assert (found == wanted).all(axis=1).mean() > 0.98
    assert np.abs(found - wanted).max() <= 1


def timm_erased(u, height, width):
  """RandomErasing._erase, of given random numbers."""
  for area, aspect, top, left in u:
    target = (0.02 + (1 / 3 - 0.02) * area) * height * width
    # timm's aspect is height by width: the same distribution.
    aspect = math.exp(math.log(0.3) + math.log(1 / 0.3 / 0.3) * aspect)
    w = int(round(math.sqrt(target * aspect)))
    h = int(round(math.sqrt(target / aspect)))
    if w < width and h < height:
      return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
  return None


def test_erased_rectangles_are_timms():
  u = np.random.default_rng(2).random((300, 10, 4))
  u[::2] = u[::2, :1]
  found, box = boxes.erased_box(u, 9, 12, xp=np)
  wanted = [timm_erased(x, 9, 12) for x in u]
  np.testing.assert_array_equal(found, [x is not None for x in wanted])
  for i, rectangle in enumerate(wanted):
    if rectangle:
      assert tuple(x[i] for x in box) == rectangle
  assert 0.5 < found.mean() < 1


def timm_cut(u, share, height, width):
  """rand_bbox and its corrected lambda, of a given random centre."""
  ratio = math.sqrt(1 - share)
  cut_h, cut_w = int(height * ratio), int(width * ratio)
  y, x = int(u[0] * height), int(u[1] * width)
  low = max(y - cut_h // 2, 0), max(x - cut_w // 2, 0)
  high = min(y + cut_h // 2, height), min(x + cut_w // 2, width)
  return (*low, high[0] - low[0], high[1] - low[1])


@pytest.mark.parametrize('share', [0.0, 0.31, 0.77, 0.999])
def test_cut_boxes_are_timms(share):
  for u in np.random.default_rng(3).random((20, 2)).astype(np.float32):
    box = boxes.cut_box(u, np.float32(share), 12, 17)
    assert tuple(map(int, box)) == timm_cut(u, np.float32(share), 12, 17)


def test_a_pixel_is_inside_or_outside():
  mask = np.zeros((5, 6), bool)
  mask[1:4, 2:3] = True
  np.testing.assert_array_equal(boxes.inside(boxes.Box(1, 2, 3, 1), 5, 6), mask)
