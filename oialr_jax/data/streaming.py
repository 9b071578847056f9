"""Images that do not fit in memory: read, decoded, distorted by workers.

A batch is a function of its step. Grain runs that function ahead, in worker
processes or in threads, so that neither their number nor stopping and resuming
changes a batch. What happens to an example is random by the seed, the epoch and
the example; the rest of the augmentation, `finish`, is done on the device.
"""

import atexit
from collections.abc import Callable, Iterator
import dataclasses
import functools
import io
import math
import os
import sys
import weakref

from absl import flags
import numpy as np
import PIL.Image

from oialr_jax.data import augmentation
from oialr_jax.data import batching
from oialr_jax.data import boxes
from oialr_jax.data import randaugment
from oialr_jax.data import sources

Batch = batching.Batch

# Batches that every worker process has ready.
_AHEAD = 2
# Without workers there are as many threads as cores but no more than this: each
# of them makes a batch, and has another one ready.
_THREADS = 16


def stream(
  source: sources.Source,
  batch_size: int,
  *,
  config: augmentation.Augmentation,
  size: int,
  seed: int,
  start: int = 0,
  workers: int = 0,
  process_index: int | None = None,
  process_count: int | None = None,
) -> batching.Batches:
  """Endless training batches of distorted images, for `finish` on the device.

  Args:
    source: the examples.
    batch_size: of all processes together.
    config: of which cropping, flipping and RandAugment are done here.
    size: height and width of the images.
    seed: of the order and of the distortion.
    start: the step of the first batch.
    workers: processes that read and decode; 0 takes threads of this one.
    process_index: which part of every batch to give; by default JAX's.
    process_count: of how many parts.

  Returns:
    Batches: 'image' `[batch, size, size, 3]`, uint8, and 'label' `[batch]`.

  Raises:
    ValueError: the configuration is for grey images; the batch is larger than
      the source or does not divide; while iterating, a record is damaged (says
      which).
  """
  if len(config.mean) != 3:
    raise ValueError(
      f'mean={config.mean}: streamed images are RGB, give three numbers.'
    )
  batching.check_batch_size(batch_size, len(source))
  part = batching.part(batch_size, process_index, process_count)
  make = _TrainBatch(source, batch_size, part, config, size, seed)
  return batching.Batches(
    lambda step: _run(make, step, sys.maxsize, workers), start
  )


def eval_stream(
  source: sources.Source,
  batch_size: int,
  *,
  size: int,
  share: float = 0.9,
  workers: int = 0,
  process_index: int | None = None,
  process_count: int | None = None,
) -> Callable[[], Iterator[Batch]]:
  """All examples once, in order; the last batch is padded, with 'mask' 0.

  Images are resized so that their shorter side is `size / share`, and the
  centre is kept. Processes get as many batches each.

  Args:
    source: the examples.
    batch_size: of all processes together.
    size: height and width of the images.
    share: of the shorter side that is kept.
    workers: processes that read and decode; 0 takes threads of this one.
    process_index: which part of every batch to give; by default JAX's.
    process_count: of how many parts.

  Raises:
    ValueError: the batch does not divide, or `share` is not in (0, 1].
  """
  if not 0 < share <= 1:
    raise ValueError(f'share={share}: must be in (0, 1].')
  part = batching.part(batch_size, process_index, process_count)
  make = _EvalBatch(source, batch_size, part, size, share)
  steps = -(-len(source) // batch_size)
  return lambda: _run(make, 0, steps, workers)


def train_image(
  image: PIL.Image.Image,
  rng: np.random.Generator,
  *,
  config: augmentation.Augmentation,
  size: int,
) -> np.ndarray:
  """Does in Pillow what `distort` does, and resizes to `[size, size, 3]`."""
  if config.scale:
    u = rng.random((boxes.ATTEMPTS, 4))
    box = boxes.crop_box(
      u, image.height, image.width, scale=config.scale, xp=np
    )
    top, left, height, width = map(int, box)
    image = image.crop((left, top, left + width, top + height))
  image = image.resize((size, size), randaugment.resampling(rng.random() < 0.5))
  if rng.random() < config.flip:
    image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
  for _ in range(config.operations):
    choice = randaugment.choose(
      rng.random(4),
      rng.standard_normal(),
      magnitude=config.magnitude,
      magnitude_std=config.magnitude_std,
      xp=np,
    )
    image = randaugment.apply_pil(image, choice, config.fill)
  return np.asarray(image)


def eval_image(
  image: PIL.Image.Image, *, size: int, share: float
) -> np.ndarray:
  """Resizes an image and takes the centre, `[size, size, 3]`."""
  short = math.floor(size / share)
  width, height = (short * x // min(image.size) for x in image.size)
  image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
  left, top = round((width - size) / 2), round((height - size) / 2)
  return np.asarray(image.crop((left, top, left + size, top + size)))


def decode(encoded: bytes) -> PIL.Image.Image:
  """An RGB image: of ImageNet's files some are grey, CMYK, or PNG."""
  image = PIL.Image.open(io.BytesIO(encoded))
  image.load()
  return image if image.mode == 'RGB' else image.convert('RGB')


@dataclasses.dataclass(frozen=True)
class _TrainBatch:
  """A training batch by its step; an object, to be sent to workers."""

  source: sources.Source
  batch_size: int
  part: slice
  config: augmentation.Augmentation
  size: int
  seed: int

  def __call__(self, step: int) -> Batch:
    epoch, index = batching.order(
      len(self.source), self.batch_size, seed=self.seed, step=step
    )

    def distort(i: int, image: PIL.Image.Image) -> np.ndarray:
      rng = np.random.default_rng([self.seed, epoch, i])
      return train_image(image, rng, config=self.config, size=self.size)

    return _batch(self.source, index[self.part], distort)


@dataclasses.dataclass(frozen=True)
class _EvalBatch:
  """A batch of an evaluation by its step."""

  source: sources.Source
  batch_size: int
  part: slice
  size: int
  share: float

  def __call__(self, step: int) -> Batch:
    index, mask = batching.padded(len(self.source), self.batch_size, step)

    def centre(i: int, image: PIL.Image.Image) -> np.ndarray:
      return eval_image(image, size=self.size, share=self.share)

    batch = _batch(self.source, index[self.part], centre)
    return batch | {'mask': mask[self.part]}


def _batch(
  source: sources.Source,
  index: np.ndarray,
  transform: Callable[[int, PIL.Image.Image], np.ndarray],
) -> Batch:
  images, labels = [], []
  for i, example in zip(index, source.read(index)):
    with source.at(i):
      image = decode(example['image'])
    images.append(transform(i, image))
    labels.append(example['label'])
  return {'image': np.stack(images), 'label': np.array(labels, np.int32)}


def _run(
  make: Callable[[int], Batch], start: int, stop: int, workers: int
) -> Iterator[Batch]:
  """Batches of the steps from `start` to `stop`, made ahead by Grain."""
  import grain

  # Whole batches are what workers take turns with: were it examples, batches
  # would depend on the number of workers.
  steps = grain.MapDataset.range(start, stop).map(make)
  threads = 1 if workers else min(os.cpu_count(), _THREADS)
  dataset = steps.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  )
  if workers:
    if not flags.FLAGS.is_parsed():
      # Grain reads flags here, also in a program that is none of absl's.
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=_AHEAD
      )
    )
  batches = _iterate(dataset, copy=workers > 0)
  # Workers and the memory shared with them must go before the interpreter does.
  close = functools.partial(_close, weakref.ref(batches))
  atexit.register(close)
  weakref.finalize(batches, atexit.unregister, close).atexit = False
  return batches


def _iterate(dataset, *, copy: bool) -> Iterator[Batch]:
  iterator = iter(dataset)
  try:
    for batch in iterator:
      # Arrays in memory that is shared with workers must not outlive them.
      yield {k: np.array(x) for k, x in batch.items()} if copy else batch
  finally:
    iterator.close()


def _close(batches: weakref.ref):
  if batches() is not None:
    batches().close()
