"""Rectangles of images: what is cropped, erased, cut, by timm's rules.

They are functions of uniform random numbers, in JAX for the device and in NumPy
for worker processes.
"""

import math
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = Any  # of JAX or of NumPy

# timm's, and everyone's.
_ASPECT = 3 / 4, 4 / 3  # of a crop: width by height
_ERASED_AREA = 0.02, 1 / 3
_ERASED_ASPECT = 0.3, 1 / 0.3
# A crop or an erased rectangle is drawn until it fits into the image.
ATTEMPTS = 10


class Box(NamedTuple):
  """Rectangles, in pixels."""

  top: Array
  left: Array
  height: Array
  width: Array


def crop_box(
  u: Array,
  height: int,
  width: int,
  *,
  scale: tuple[float, float],
  xp: ModuleType,
) -> Box:
  """The part of an image that a random resized crop keeps.

  The first of the drawn rectangles that fits; where none does, the largest in
  the centre of an allowed aspect.

  Args:
    u: `[..., attempts, 4]`, uniform in [0, 1): area, aspect, top, left.
    height: of the image.
    width: of the image.
    scale: range of the share of the area.
    xp: jax.numpy or numpy, whichever `u` is of.
  """
  found, box = _rectangle(u, height, width, scale, _ASPECT, 0, xp)
  wide = min(width, round(height * _ASPECT[1]))
  high = min(height, round(width / _ASPECT[0]))
  centre = Box((height - high) // 2, (width - wide) // 2, high, wide)
  return Box(*(xp.where(found, a, b) for a, b in zip(box, centre)))


def erased_box(
  u: Array, height: int, width: int, *, xp: ModuleType
) -> tuple[Array, Box]:
  """Whether a part of an image can be erased, and which.

  The first of the drawn rectangles that is smaller than the image on both sides.

  Args:
    u: as of `crop_box`.
    height: of the image.
    width: of the image.
    xp: jax.numpy or numpy, whichever `u` is of.
  """
  return _rectangle(u, height, width, _ERASED_AREA, _ERASED_ASPECT, 1, xp)


def cut_box(u: jax.Array, share: jax.Array, height: int, width: int) -> Box:
  """The part that cutmix replaces: around a random centre, cut at the border.

  Args:
    u: `[2]`, uniform in [0, 1): the centre.
    share: that would be left of the image without the border.
    height: of the image.
    width: of the image.
  """
  side = jnp.sqrt(1 - share)

  def along(u, size):
    half = jnp.floor(size * side).astype(int) // 2
    centre = jnp.floor(u * size).astype(int)
    low, high = (jnp.clip(centre + x, 0, size) for x in (-half, half))
    return low, high - low

  (top, h), (left, w) = along(u[0], height), along(u[1], width)
  return Box(top, left, h, w)


def inside(box: Box, height: int, width: int) -> jax.Array:
  """`[height, width]`: whether a pixel is in the box."""
  y, x = jnp.arange(height)[:, None], jnp.arange(width)
  rows = (y >= box.top) & (y < box.top + box.height)
  return rows & (x >= box.left) & (x < box.left + box.width)


def _rectangle(
  u: Array, height: int, width: int, scale, aspect, margin: int, xp
) -> tuple[Array, Box]:
  """Whether a drawn rectangle fits, and the first that does, at a random place.

  It fits if it is by `margin` smaller than the image. Aspects, width by height,
  are drawn from a log-uniform distribution.
  """
  area = (scale[0] + (scale[1] - scale[0]) * u[..., 0]) * (height * width)
  low, high = math.log(aspect[0]), math.log(aspect[1])
  ratio = xp.exp(low + (high - low) * u[..., 1])
  w = xp.round(xp.sqrt(area * ratio)).astype(int)
  h = xp.round(xp.sqrt(area / ratio)).astype(int)
  fits = (w <= width - margin) & (h <= height - margin)
  top = xp.floor(u[..., 2] * (height - h + 1)).astype(int)
  left = xp.floor(u[..., 3] * (width - w + 1)).astype(int)
  first = xp.argmax(fits, axis=-1)[..., None]
  take = lambda x: xp.take_along_axis(x, first, axis=-1)[..., 0]
  return fits.any(axis=-1), Box(*map(take, (top, left, h, w)))
