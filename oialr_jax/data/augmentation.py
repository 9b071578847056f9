"""Augmentation of batches on the device, inside or beside the jitted step.

Images come as uint8 and leave normalised, labels come as numbers and leave as
distributions over the classes. Everything is batched, and random by the key
alone: fold the step into it. Under `jit` the batch may be spread over devices;
what an example gets depends on its place in the global batch only.

In the order of timm: random resized crop, flip, RandAugment (`distort`), then
normalisation, erasing, mixup or cutmix (`finish`). Streamed images are distorted
by worker processes, in Pillow (see `streaming`), from the same configuration.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from oialr_jax.data import boxes
from oialr_jax.data import randaugment

Array = Any  # of JAX or of NumPy
Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """What is done to training images; by default they are normalised only.

  Attributes:
    mean: of the pixels, for every channel, in [0, 1].
    std: the standard deviation of the pixels, for every channel.
    scale: the least and the largest share of the image that a random resized
      crop keeps, by area; None does not crop.
    flip: probability to be mirrored, left to right.
    operations: of RandAugment, each of which is done with probability 1/2.
    magnitude: of RandAugment, 0 to 10.
    magnitude_std: its standard deviation.
    erase: probability that a rectangle is replaced by normal noise.
    mixup: alpha of its beta distribution; 0 does not mix.
    cutmix: alpha of its beta distribution; with both, every batch does either.
    label_smoothing: share of a label that all classes get alike.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  scale: tuple[float, float] | None = None
  flip: float = 0.0
  operations: int = 0
  magnitude: float = 9.0
  magnitude_std: float = 0.5
  erase: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0
  label_smoothing: float = 0.0

  def __post_init__(self):
    for name in ('mean', 'std', 'scale'):  # lists come from configuration files
      value = getattr(self, name)
      object.__setattr__(self, name, value if value is None else tuple(value))
    if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
      raise ValueError(
        f'mean={self.mean}, std={self.std}: give one number for every channel, '
        'of which there are 1 or 3.'
      )
    if min(self.std) <= 0 or not 0 <= min(self.mean) <= max(self.mean) <= 1:
      raise ValueError(
        f'mean={self.mean}, std={self.std}: they are of pixels in [0, 1], and '
        'std must be positive.'
      )
    if self.scale is not None:
      ordered = 0 < self.scale[0] <= self.scale[-1] <= 1
      if len(self.scale) != 2 or not ordered:
        raise ValueError(
          f'scale={self.scale}: must be 0 < least <= largest <= 1.'
        )
    for name, top in dict(
      flip=1,
      erase=1,
      label_smoothing=1,
      magnitude=randaugment.MAX_MAGNITUDE,
    ).items():
      if not 0 <= getattr(self, name) <= top:
        raise ValueError(
          f'{name}={getattr(self, name)}: must be in [0, {top}].'
        )
    for name in ('operations', 'magnitude_std', 'mixup', 'cutmix'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)}: must be at least 0.')

  @classmethod
  def cifar(cls, **changes: Any) -> 'Augmentation':
    """As in the published run: timm's rand-m9-mstd0.5-inc1, erasing, no mixing.

    The published configuration leaves timm's colour jitter at 0.4, and timm does
    no colour jitter where there is RandAugment.
    """
    published = dict(
      mean=(0.4914, 0.4822, 0.4465),
      std=(0.2023, 0.1994, 0.2010),
      scale=(0.8, 1.0),
      flip=0.5,
      operations=2,
      magnitude=9.0,
      magnitude_std=0.5,
      erase=0.25,
      label_smoothing=0.1,
    )
    return cls(**published | changes)

  @classmethod
  def imagenet(cls, **changes: Any) -> 'Augmentation':
    """As in the published runs, with the paper's mixup.

    Their rand-m15-mstd0.5-inc1 is magnitude 10: timm does not go beyond. Their
    configuration also names cutmix 1.0, in a call that cannot take it.
    """
    published = dict(
      mean=(0.485, 0.456, 0.406),
      std=(0.229, 0.224, 0.225),
      scale=(0.08, 1.0),
      flip=0.5,
      operations=2,
      magnitude=10.0,
      magnitude_std=0.0,
      erase=0.25,
      mixup=0.1,
      label_smoothing=0.1,
    )
    return cls(**published | changes)

  @property
  def fill(self) -> tuple[int, ...]:
    """The mean colour: of what RandAugment takes from outside of an image."""
    return tuple(round(255 * x) for x in self.mean)


def augment(
  batch: Batch, key: jax.Array, *, config: Augmentation, classes: int
) -> dict[str, Array]:
  """Augments a batch of raw images: `distort`, then `finish`.

  Args:
    batch: 'image' `[batch, height, width, channels]`, uint8, 'label' `[batch]`,
      integers, and anything else, which stays.
    key: of this step; other random numbers of the step need another one.
    config: what to do.
    classes: of the labels.

  Returns:
    The batch, with 'image' float32 and normalised, 'label' `[batch, classes]`.

  Raises:
    TypeError: images are not uint8.
    ValueError: channels do not fit; the batch is odd and is to be mixed.
  """
  first, second = jax.random.split(key)
  image = distort(batch['image'], first, config=config)
  return finish(
    {**batch, 'image': image}, second, config=config, classes=classes
  )


def distort(image: Array, key: jax.Array, *, config: Augmentation) -> jax.Array:
  """Random resized crop to the same size, flip, and RandAugment; uint8."""
  _check(image, config)
  count, height, width, _ = image.shape
  cut, interpolation, mirrored, which, strength = jax.random.split(key, 5)
  image = jnp.asarray(image).astype(jnp.float32)
  if config.scale:
    u = jax.random.uniform(cut, (count, boxes.ATTEMPTS, 4))
    box = boxes.crop_box(u, height, width, scale=config.scale, xp=jnp)
    cubic = jax.random.bernoulli(interpolation, 0.5, (count,))
    image = jax.vmap(_resized_crop)(image, box, cubic)
  if config.flip:
    flip = jax.random.bernoulli(mirrored, config.flip, (count, 1, 1, 1))
    image = jnp.where(flip, image[:, :, ::-1], image)
  if config.operations:
    choices = randaugment.choose(
      jax.random.uniform(which, (config.operations, count, 4)),
      jax.random.normal(strength, (config.operations, count)),
      magnitude=config.magnitude,
      magnitude_std=config.magnitude_std,
      xp=jnp,
    )
    fill = jnp.array(config.fill, image.dtype)
    image = randaugment.apply(image, choices, fill)
  return image.astype(jnp.uint8)


def finish(
  batch: Batch, key: jax.Array, *, config: Augmentation, classes: int
) -> dict[str, Array]:
  """Normalises, erases, turns labels into distributions, and mixes."""
  erased, noise, mixed = jax.random.split(key, 3)
  image = normalize(batch['image'], config)
  label = jax.nn.one_hot(batch['label'], classes)
  label = (1 - config.label_smoothing) * label
  label += config.label_smoothing / classes
  if config.erase:
    image = _erase(image, erased, noise, config.erase)
  if config.mixup or config.cutmix:
    image, label = mix(image, label, _kept(image, mixed, config))
  return {**batch, 'image': image, 'label': label}


def normalize(image: Array, config: Augmentation) -> jax.Array:
  """Raw images as float32 with the configured mean and deviation taken out."""
  _check(image, config)
  mean, std = (jnp.array(x, jnp.float32) for x in (config.mean, config.std))
  return (jnp.asarray(image).astype(jnp.float32) / 255 - mean) / std


def mix(
  image: jax.Array, label: jax.Array, keep: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Mixes neighbours, the first example with the second and so on.

  timm pairs the first with the last. Neighbours are on the same device, if it
  has an even number of examples.

  Args:
    image: `[batch, height, width, channels]`.
    label: `[batch, classes]`.
    keep: `[height, width]`, the share of itself that a pixel keeps. A label
      keeps the mean: of mixup its lambda, of cutmix the area that is left.

  Raises:
    ValueError: the batch is odd.
  """
  if image.shape[0] % 2:
    raise ValueError(
      f'a batch of {image.shape[0]} is mixed in pairs: it must be even.'
    )
  pixels, share = keep[..., None], keep.mean()
  return (
    pixels * image + (1 - pixels) * _neighbour(image),
    share * label + (1 - share) * _neighbour(label),
  )


def _resized_crop(
  image: jax.Array, box: boxes.Box, cubic: jax.Array
) -> jax.Array:
  """Cuts a box out of an image, and enlarges it to the image's size.

  As two matrix products, along the rows and along the columns, each of them
  rounded, as in Pillow.
  """
  height, width, _ = image.shape
  across = _interpolation(box.left, box.width, width, cubic)
  down = _interpolation(box.top, box.height, height, cubic)
  whole = lambda x: jnp.clip(jnp.floor(x + 0.5), 0, 255)
  exact = jax.lax.Precision.HIGHEST  # bfloat16 would be off by a grey level
  image = whole(jnp.einsum('ow,hwc->hoc', across, image, precision=exact))
  return whole(jnp.einsum('oh,hwc->owc', down, image, precision=exact))


def _interpolation(start, length, size: int, cubic) -> jax.Array:
  """`[size, size]`: the weight of every pixel in every new one.

  The box is never larger than what it is enlarged to: no averaging is needed.
  """
  place = (jnp.arange(size) + 0.5) * length / size + start
  pixel = jnp.arange(size)
  weights = randaugment.kernel(
    place[:, None] - (pixel + 0.5), cubic, randaugment.RESIZE
  )
  inside = (pixel >= start) & (pixel < start + length)
  weights = jnp.where(inside, weights, 0)
  return weights / weights.sum(axis=1, keepdims=True)


def _erase(image: jax.Array, key, noise, probability: float) -> jax.Array:
  """Replaces a rectangle of some images by normal noise."""
  count, height, width, _ = image.shape
  place, whether = jax.random.split(key)
  u = jax.random.uniform(place, (count, boxes.ATTEMPTS, 4))
  found, box = boxes.erased_box(u, height, width, xp=jnp)
  erased = found & jax.random.bernoulli(whether, probability, (count,))
  mask = jax.vmap(lambda box: boxes.inside(box, height, width))(box)
  mask &= erased[:, None, None]
  return jnp.where(
    mask[..., None], jax.random.normal(noise, image.shape), image
  )


def _kept(image: jax.Array, key, config: Augmentation) -> jax.Array:
  """`[height, width]`: the share of itself that every pixel keeps.

  One lambda for the batch, as in timm's mode 'batch'.
  """
  _, height, width, _ = image.shape
  which, blending, cutting, place = jax.random.split(key, 4)
  if config.mixup:
    share = jax.random.beta(blending, config.mixup, config.mixup)
    blended = jnp.full((height, width), share)
    if not config.cutmix:
      return blended
  share = jax.random.beta(cutting, config.cutmix, config.cutmix)
  box = boxes.cut_box(jax.random.uniform(place, (2,)), share, height, width)
  outside = 1.0 - boxes.inside(box, height, width)
  if not config.mixup:
    return outside
  return jnp.where(jax.random.bernoulli(which), outside, blended)


def _neighbour(x: jax.Array) -> jax.Array:
  pairs = x.reshape(-1, 2, *x.shape[1:])
  return pairs[:, ::-1].reshape(x.shape)


def _check(image: Array, config: Augmentation):
  if image.dtype != jnp.uint8:
    raise TypeError(
      f'images are {image.dtype}: pass them as uint8 (raw=True of the batches).'
    )
  if image.ndim != 4 or image.shape[-1] != len(config.mean):
    raise ValueError(
      f'images are of shape {image.shape}: the mean {config.mean} is for '
      f'[batch, height, width, {len(config.mean)}].'
    )
