"""RandAugment (arXiv 1909.13719), as timm has it, in JAX and in Pillow.

Both ways draw from one table of operations, of the kind that grows with the
magnitude ('inc1' of timm), and share one function that turns random numbers into
a choice. Worker processes use Pillow. On the device an operation is one of three
things, which are done in turn, all but one of them to no effect: a table from
grey value to grey value, an affine map, a blend. So a whole batch is augmented
without a branch. Pixels are whole numbers in [0, 255], in floating point on the
device.
"""

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps

Array = Any  # of JAX or of NumPy


class Op(NamedTuple):
  """How an operation's argument follows from the level, in [0, 1].

  It is base + slope * level; with a random sign of the slope if `signed`, with
  the change truncated to an integer if `whole`.
  """

  base: float = 0.0
  slope: float = 0.0
  signed: bool = False
  whole: bool = False


TABLE = {
  'AutoContrast': Op(),
  'Equalize': Op(),
  'Invert': Op(),
  'Rotate': Op(0, 30, signed=True),  # degrees
  # Bits that are kept: none at the highest level, a black picture, as in timm.
  'Posterize': Op(4, -4, whole=True),
  'Solarize': Op(256, -256, whole=True),  # grey values from here on
  'SolarizeAdd': Op(0, 110, whole=True),  # to grey values below 128
  'Color': Op(1, 0.9, signed=True),  # 0: none, 1: as it is
  'Contrast': Op(1, 0.9, signed=True),
  'Brightness': Op(1, 0.9, signed=True),
  'Sharpness': Op(1, 0.9, signed=True),
  'ShearX': Op(0, 0.3, signed=True),  # of the height
  'ShearY': Op(0, 0.3, signed=True),
  'TranslateX': Op(0, 0.45, signed=True),  # of the width
  'TranslateY': Op(0, 0.45, signed=True),
  'Identity': Op(),
}
NAMES = tuple(TABLE)
INDEX = {name: i for i, name in enumerate(NAMES)}
MAX_MAGNITUDE = 10
# Pillow's `a` of the cubic kernel, where it resizes and where it transforms.
RESIZE, _TRANSFORM = -0.5, -1.0
# An operation that was chosen is done with this probability.
PROBABILITY = 0.5

_BASE, _SLOPE, _SIGNED, _WHOLE = (np.array(x) for x in zip(*TABLE.values()))


class Choice(NamedTuple):
  """One operation: its index in NAMES, its argument, and how it resamples."""

  op: Array
  argument: Array
  cubic: Array


def choose(
  uniform: Array,
  normal: Array,
  *,
  magnitude: float,
  magnitude_std: float,
  xp: ModuleType,
) -> Choice:
  """An operation from random numbers, of any leading axes.

  Args:
    uniform: `[..., 4]`, in [0, 1): which, whether, sign, interpolation.
    normal: `[...]`, standard normal: the magnitude's deviation.
    magnitude: 0 to 10, of which the table's `level` is a tenth.
    magnitude_std: of the magnitude, which is clipped to [0, 10].
    xp: jax.numpy or numpy, whichever the numbers are of.
  """
  which, whether, sign, cubic = (uniform[..., i] for i in range(4))
  op = xp.floor(which * INDEX['Identity']).astype(int)
  op = xp.where(whether < PROBABILITY, op, INDEX['Identity'])
  level = xp.clip(magnitude + magnitude_std * normal, 0, MAX_MAGNITUDE)
  table = lambda values: xp.asarray(values)[op]
  sign = xp.where(table(_SIGNED) & (sign < 0.5), -1, 1)
  change = sign * table(_SLOPE) * level / MAX_MAGNITUDE
  change = xp.where(table(_WHOLE), xp.trunc(change), change)
  return Choice(op, table(_BASE) + change, cubic < 0.5)


def apply(image: jax.Array, choices: Choice, fill: jax.Array) -> jax.Array:
  """Does operations to a batch on the device, one after the other.

  Args:
    image: `[batch, height, width, channels]`, of 1 or 3 channels.
    choices: of `[operations, batch]`.
    fill: `[channels]`, the colour of what was outside of the image.
  """

  def one(image, choice):
    # The warp comes last: XLA would compute it anew for every pixel that the
    # 3 x 3 mean of `_enhance` reads (on CPUs 8 times as slow).
    image = _enhance(_look_up(image, choice), choice)
    matrix = affine(choice, *image.shape[:2], xp=jnp)
    return _warp(image, matrix, choice, fill)

  def step(image, choice):
    return jax.vmap(one)(image, choice).astype(image.dtype), None

  return jax.lax.scan(step, image, choices)[0]


def apply_pil(
  image: PIL.Image.Image, choice: Choice, fill: tuple[int, ...]
) -> PIL.Image.Image:
  """Does one operation to a Pillow image, of mode L or RGB."""
  name = NAMES[int(choice.op)]
  if name in _PIL:
    return _PIL[name](image, choice.argument)
  if name not in _AFFINE:
    return image
  matrix = affine(choice, image.height, image.width, xp=np)
  return image.transform(
    image.size,
    PIL.Image.Transform.AFFINE,
    [float(x) for row in matrix for x in row],
    resample=resampling(choice.cubic),
    fillcolor=tuple(fill) if len(fill) > 1 else fill[0],
  )


def affine(
  choice: Choice, height: int, width: int, *, xp: ModuleType
) -> tuple[tuple[Array, ...], ...]:
  """Rows (a, b, c) and (d, e, f): a pixel at x, y is taken from a x + b y + c,
  d x + e y + f; the identity for an operation of another kind."""
  amount = lambda name: xp.where(choice.op == INDEX[name], choice.argument, 0.0)
  angle = amount('Rotate') * (np.pi / 180)  # counter-clockwise about the centre
  cos, sin = xp.cos(angle), xp.sin(angle)
  x, y = width / 2, height / 2
  left = amount('TranslateX') * width
  top = amount('TranslateY') * height
  return (
    (cos, amount('ShearX') - sin, x - (cos * x - sin * y) + left),
    (sin + amount('ShearY'), cos, y - (sin * x + cos * y) + top),
  )


def resampling(cubic: Array) -> PIL.Image.Resampling:
  """Pillow's name for the interpolation."""
  kinds = PIL.Image.Resampling
  return kinds.BICUBIC if cubic else kinds.BILINEAR


def kernel(distance: jax.Array, cubic: jax.Array, a: float) -> jax.Array:
  """The weight of a pixel at that distance: Keys' cubic with `a`, or a tent."""
  x = jnp.abs(distance)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  keys = jnp.where(x < 1, near, jnp.where(x < 2, far, 0))
  return jnp.where(cubic, keys, jnp.maximum(1 - x, 0))


_AFFINE = ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')
_PIL = {
  'AutoContrast': lambda image, _: PIL.ImageOps.autocontrast(image),
  'Equalize': lambda image, _: PIL.ImageOps.equalize(image),
  'Invert': lambda image, _: PIL.ImageOps.invert(image),
  # Not ImageOps.posterize, which refuses to keep no bit at all.
  'Posterize': lambda image, bits: _point(
    image, lambda i: i & -(1 << 8 - int(bits))
  ),
  'Solarize': lambda image, x: PIL.ImageOps.solarize(image, int(x)),
  'SolarizeAdd': lambda image, x: _point(
    image, lambda i: np.where(i < 128, np.minimum(i + int(x), 255), i)
  ),
  'Color': lambda image, x: PIL.ImageEnhance.Color(image).enhance(x),
  'Contrast': lambda image, x: PIL.ImageEnhance.Contrast(image).enhance(x),
  'Brightness': lambda image, x: PIL.ImageEnhance.Brightness(image).enhance(x),
  'Sharpness': lambda image, x: PIL.ImageEnhance.Sharpness(image).enhance(x),
}


def _point(image: PIL.Image.Image, function) -> PIL.Image.Image:
  table = function(np.arange(256)).tolist()
  return image.point(table * len(image.getbands()))


def _look_up(image: jax.Array, choice: Choice) -> jax.Array:
  """The operations that are a table of grey values, one for each channel."""
  pixels = image.astype(jnp.int32).reshape(-1, image.shape[-1])
  channel = jnp.arange(pixels.shape[1])
  counts = jnp.zeros((256, pixels.shape[1]), jnp.int32)
  counts = counts.at[pixels, channel].add(1)
  grey = jnp.arange(256)[:, None]
  x = choice.argument
  tables = {
    'AutoContrast': _auto_contrast(counts),
    'Equalize': _equalize(counts),
    'Invert': 255 - grey,
    'Posterize': grey & -(1 << (8 - x.astype(jnp.int32))),
    'Solarize': jnp.where(grey < x, grey, 255 - grey),
    'SolarizeAdd': jnp.where(grey < 128, grey + x, grey),
    'Contrast': _blend(jnp.floor(_luminance(image).mean() + 0.5), grey, x),
    'Brightness': _blend(0, grey, x),
  }
  table = jnp.select(
    [choice.op == INDEX[name] for name in tables],
    [jnp.broadcast_to(t, counts.shape) for t in tables.values()],
    jnp.broadcast_to(grey, counts.shape),
  )
  table = jnp.clip(table, 0, 255).astype(image.dtype)
  return table[pixels, channel].reshape(image.shape)


def _auto_contrast(counts: jax.Array) -> jax.Array:
  low = jnp.argmax(counts > 0, axis=0)
  high = 255 - jnp.argmax(counts[::-1] > 0, axis=0)
  grey = jnp.arange(256)[:, None]
  stretched = (grey - low) * 255 // jnp.maximum(high - low, 1)
  return jnp.where(high > low, stretched, grey)


def _equalize(counts: jax.Array) -> jax.Array:
  total = counts.sum(axis=0)
  last = 255 - jnp.argmax(counts[::-1] > 0, axis=0)
  step = (total - counts[last, jnp.arange(counts.shape[1])]) // 255
  below = jnp.cumsum(counts, axis=0) - counts
  equal = (below + step // 2) // jnp.maximum(step, 1)
  return jnp.where(step > 0, equal, jnp.arange(256)[:, None])


def _warp(image: jax.Array, matrix, choice: Choice, fill) -> jax.Array:
  """Interpolates the image at the places that the matrix says."""
  height, width, channels = image.shape
  (a, b, c), (d, e, f) = matrix
  y, x = jnp.mgrid[:height, :width] + 0.5
  x, y = a * x + b * y + c, d * x + e * y + f
  inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
  columns, across = _taps(x, width, choice.cubic)
  rows, down = _taps(y, height, choice.cubic)
  flat = image.reshape(-1, channels)
  new = 0
  for i in range(4):
    line = 0
    for j in range(4):
      taken = flat[rows[..., i] * width + columns[..., j]]
      line += across[..., j, None] * taken
    new += down[..., i, None] * line
  # Truncated, as Pillow does, but not below a whole number by a rounding error.
  new = jnp.clip(jnp.floor(new + 1e-3), 0, 255)
  return jnp.where(inside[..., None], new, fill)


def _taps(x: jax.Array, size: int, cubic) -> tuple[jax.Array, jax.Array]:
  """The four pixels around a place along one axis, and their weights."""
  first = jnp.floor(x - 0.5) - 1
  index = first[..., None] + jnp.arange(4)
  weights = kernel(x[..., None] - 0.5 - index, cubic, _TRANSFORM)
  return jnp.clip(index, 0, size - 1).astype(jnp.int32), weights


def _enhance(image: jax.Array, choice: Choice) -> jax.Array:
  """The operations that blend an image with a picture made of it."""
  color = choice.op == INDEX['Color']
  sharpness = choice.op == INDEX['Sharpness']
  other = jnp.where(color, _luminance(image)[..., None], _smooth(image))
  factor = jnp.where(color | sharpness, choice.argument, 1.0)
  return _blend(other, image, factor)


def _blend(start, end, factor) -> jax.Array:
  return jnp.clip(jnp.floor(start + factor * (end - start) + 1e-4), 0, 255)


def _luminance(image: jax.Array) -> jax.Array:
  """`[height, width]`, by Pillow's weights."""
  if image.shape[-1] == 1:
    return image[..., 0]
  weights = jnp.array([19595, 38470, 7471])
  return (image.astype(jnp.int32) @ weights + (1 << 15)) >> 16


def _smooth(image: jax.Array) -> jax.Array:
  """Pillow's SMOOTH: a 3 x 3 mean with a heavier centre; the border is kept."""
  height, width, _ = image.shape
  total = 4 * image[1:-1, 1:-1]
  for i in range(3):
    for j in range(3):
      total += image[i : height - 2 + i, j : width - 2 + j]
  return image.at[1:-1, 1:-1].set(jnp.floor(total / 13 + 0.5))
