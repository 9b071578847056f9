"""Images that fit in memory: digits, and any TFDS image-classification set.

Batches are dicts of 'image' and 'label'. Images are float32 in [0, 1], or, with
`raw`, the uint8 that lie in memory, for `augment` and `normalize` to take on the
device. Batch sizes are global: every process is given its part.
"""

from collections.abc import Callable, Iterator
import dataclasses
import io
import itertools
import os

import jax
import numpy as np
import PIL.Image

from oialr_jax.data import batching
from oialr_jax.data import sources

Batch = batching.Batch

# Records that are read at once: one by one takes ten times as long.
_CHUNK = 1000


@dataclasses.dataclass(frozen=True)
class Split:
  """Examples in memory.

  Attributes:
    image: `[n, height, width, channels]`, uint8, 0 to `white`.
    label: `[n]`, int32.
    white: the largest value of a pixel.
    classes: number of labels, where it is known.
  """

  image: np.ndarray | jax.Array
  label: np.ndarray | jax.Array
  white: int = 255
  classes: int | None = None

  def __len__(self) -> int:
    return len(self.label)

  def take(self, index: np.ndarray, *, raw: bool = False) -> Batch:
    """A batch of these examples."""
    image = self.image[index]
    if not raw:
      image = image.astype(np.float32) / self.white
    return {'image': image, 'label': self.label[index]}

  def part(self, index: np.ndarray) -> 'Split':
    """These examples alone."""
    return dataclasses.replace(
      self, image=self.image[index], label=self.label[index]
    )

  def on_device(self) -> 'Split':
    """The same examples on the default device, where batches then are made."""
    image, label = jax.device_put((self.image, self.label))
    return dataclasses.replace(self, image=image, label=label)

  def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of every channel, as `Augmentation` takes them."""
    channels = np.moveaxis(np.asarray(self.image), -1, 0)
    counts = np.stack(
      [np.bincount(c.ravel(), minlength=self.white + 1) for c in channels]
    )
    level = np.arange(counts.shape[1]) / self.white
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ level
    std = np.sqrt((share * (level - mean[:, None]) ** 2).sum(axis=1))
    return tuple(mean.tolist()), tuple(std.tolist())


def digits(seed: int = 0, test_share: float = 0.25) -> tuple[Split, Split]:
  """scikit-learn's handwritten digits: 1,797 images of 8 x 8, no download.

  Args:
    seed: of the split into training and test data, stratified by digit.
    test_share: of the images.

  Returns:
    Training and test data.
  """
  from sklearn import datasets
  from sklearn import model_selection

  images, labels = datasets.load_digits(return_X_y=True)
  parts = model_selection.train_test_split(
    images.reshape(-1, 8, 8, 1).astype(np.uint8),
    labels.astype(np.int32),
    test_size=test_share,
    random_state=seed,
    stratify=labels,
  )
  train_x, test_x, train_y, test_y = parts
  return Split(train_x, train_y, 16, 10), Split(test_x, test_y, 16, 10)


def load(
  name: str, split: str, *, data_dir: str | os.PathLike | None = None
) -> Split:
  """A split of a TFDS image-classification set, decoded into memory.

  Args:
    name: 'mnist', 'cifar10', ...
    split: of TFDS: 'train', 'test', 'train[:90%]', ...
    data_dir: the folder that holds `NAME/VERSION/`; by default that of the
      environment variable OIALR_DATA_DIR, else TFDS's own.

  Raises:
    FileNotFoundError: it is not there; says where it was looked for and how to
      prepare it.
    ValueError: images are of several sizes, or neither grey nor RGB; a record
      is damaged (says which).
  """
  source = sources.source(name, split, data_dir=data_dir)
  if None in source.shape or source.shape[-1] not in (1, 3):
    raise ValueError(
      f'{name!r}: images are of shape {source.shape}. In memory they must be of '
      'one size, with 1 or 3 channels; `stream` takes any.'
    )
  image = np.empty((len(source), *source.shape), np.uint8)
  label = np.empty(len(source), np.int32)
  for start in range(0, len(source), _CHUNK):
    index = range(start, min(start + _CHUNK, len(source)))
    for i, example in zip(index, source.read(index)):
      with source.at(i):
        pixels = np.asarray(PIL.Image.open(io.BytesIO(example['image'])))
        image[i] = pixels.reshape(source.shape)
      label[i] = example['label']
  return Split(image, label, classes=source.classes)


def batches(
  split: Split,
  batch_size: int,
  *,
  seed: int,
  start: int = 0,
  raw: bool = False,
  process_index: int | None = None,
  process_count: int | None = None,
) -> batching.Batches:
  """Endless batches for training: every epoch is a new permutation.

  The same seed gives the same batches, whatever the step to start at and however
  many processes share them. The remainder of an epoch that fills no batch is
  left out of it.

  Args:
    split: the examples.
    batch_size: of all processes together.
    seed: of the order.
    start: the step of the first batch.
    raw: leave images as uint8.
    process_index: which part of every batch to give; by default JAX's.
    process_count: of how many parts.

  Raises:
    ValueError: the batch is larger than the split, or does not divide; raw
      pixels do not go to 255.
  """
  batching.check_batch_size(batch_size, len(split))
  _check_raw(split, raw)
  part = batching.part(batch_size, process_index, process_count)

  def batch(step: int) -> Batch:
    _, index = batching.order(len(split), batch_size, seed=seed, step=step)
    return split.take(index[part], raw=raw)

  return batching.Batches(lambda step: map(batch, itertools.count(step)), start)


def eval_batches(
  split: Split,
  batch_size: int,
  *,
  raw: bool = False,
  process_index: int | None = None,
  process_count: int | None = None,
) -> Callable[[], Iterator[Batch]]:
  """All examples once, in order; the last batch is padded, with 'mask' 0.

  Processes get as many batches each, of which one may be all padding.
  """
  _check_raw(split, raw)
  part = batching.part(batch_size, process_index, process_count)

  def iterate():
    for step in range(-(-len(split) // batch_size)):
      index, mask = batching.padded(len(split), batch_size, step)
      yield split.take(index[part], raw=raw) | {'mask': mask[part]}

  return iterate


def _check_raw(split: Split, raw: bool):
  if raw and split.white != 255:
    raise ValueError(
      f'raw=True: these pixels go to {split.white}, but what takes raw images '
      'divides by 255.'
    )
