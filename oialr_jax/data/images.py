"""Images that fit in memory: digits, and any TFDS image-classification set."""

from collections.abc import Callable, Iterator
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]

DATA_DIR = 'OIALR_DATA_DIR'


@dataclasses.dataclass(frozen=True)
class Split:
  """Examples in memory.

  Attributes:
    image: `[n, height, width, channels]`, uint8, 0 to `white`.
    label: `[n]`, int32.
    white: the largest value of a pixel.
  """

  image: np.ndarray
  label: np.ndarray
  white: int = 255

  def __len__(self) -> int:
    return len(self.label)

  def take(self, index: np.ndarray) -> Batch:
    """A batch of these examples, with images as float32 in [0, 1]."""
    image = self.image[index].astype(np.float32) / self.white
    return {'image': image, 'label': self.label[index]}


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
  return Split(train_x, train_y, 16), Split(test_x, test_y, 16)


def load(
  name: str, split: str, *, data_dir: str | os.PathLike | None = None
) -> Split:
  """A split of a TFDS image-classification set, decoded into memory.

  Reads the prepared folder through `tfds.data_source`: TensorFlow is not used.

  Args:
    name: 'mnist', 'cifar10', ...
    split: of TFDS: 'train', 'test', 'train[:90%]', ...
    data_dir: the folder that holds `NAME/VERSION/`; by default that of the
      environment variable OIALR_DATA_DIR, else TFDS's own.

  Raises:
    FileNotFoundError: it is not there; says where it was looked for and how to
      prepare it.
    ValueError: examples have no image and label, or images of several sizes.
  """
  import tensorflow_datasets as tfds

  data_dir = data_dir or os.environ.get(DATA_DIR)
  folder = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
  try:
    source = tfds.data_source(
      name, split=split, data_dir=folder, download=False
    )
  except (
    tfds.core.DatasetNotFoundError,
    AssertionError,
    NotImplementedError,
    OSError,
  ) as e:
    raise FileNotFoundError(
      f'{name!r} (split {split!r}) was not found as {folder / name}/VERSION/ '
      'in array_record files. Prepare it where there is a network with\n'
      f'  python -c "import tensorflow_datasets as tfds; '
      f"tfds.builder('{name}', data_dir='{folder}', "
      "file_format='array_record').download_and_prepare()\"\n"
      f'or pass another folder with --data_dir or ${DATA_DIR}.'
    ) from e
  return _in_memory(name, source)


def _in_memory(name: str, source: Any) -> Split:
  examples = source[0]
  if not {'image', 'label'} <= set(examples):
    raise ValueError(
      f'{name!r}: examples have {sorted(examples)}; an image-classification '
      "set has 'image' and 'label'."
    )
  n, shape = len(source), examples['image'].shape
  image = np.empty((n, *shape), np.uint8)
  label = np.empty(n, np.int32)
  for i, example in enumerate(source):
    if example['image'].shape != shape:
      raise ValueError(
        f'{name!r}: example {i} is of shape {example["image"].shape}, example '
        f'0 of {shape}: images of several sizes do not fit in one array.'
      )
    image[i], label[i] = example['image'], example['label']
  return Split(image, label)


def batches(split: Split, batch_size: int, *, seed: int) -> Iterator[Batch]:
  """Endless batches for training: every epoch is a new permutation.

  The same seed gives the same batches. The remainder of an epoch that fills no
  batch is left out of it.

  Raises:
    ValueError: the batch is larger than the split.
  """
  if not 1 <= batch_size <= len(split):
    raise ValueError(
      f'batch_size={batch_size}: must be in [1, {len(split)}], the number of '
      'examples.'
    )
  epoch = 0
  while True:
    order = np.random.default_rng([seed, epoch]).permutation(len(split))
    for i in range(0, len(order) - batch_size + 1, batch_size):
      yield split.take(order[i : i + batch_size])
    epoch += 1


def eval_batches(
  split: Split, batch_size: int
) -> Callable[[], Iterator[Batch]]:
  """All examples once, in order; the last batch is padded, with 'mask' 0."""

  def iterate():
    for i in range(0, len(split), batch_size):
      index = np.arange(i, i + batch_size)
      batch = split.take(np.minimum(index, len(split) - 1))
      yield batch | {'mask': (index < len(split)).astype(np.float32)}

  return iterate
