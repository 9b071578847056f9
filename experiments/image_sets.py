"""Images with a validation split of their own, for studies that compare runs.

By one pass over both, a run is measured on validation data, by which settings
are chosen, and on test data, which are reported.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any

from flax import linen as nn
import numpy as np

from experiments import classification
from experiments import cli
from experiments import settings
from oialr_jax import data

Config = settings.Config

NAMES = ('digits', 'mnist', 'cifar10')
# Where else images are, and --data_dir means nothing.
FLAG = (
  'Folder of prepared TFDS sets, for data=mnist and data=cifar10; by default '
  '$OIALR_DATA_DIR, else ~/tensorflow_datasets.'
)
_SHAPES = {'digits': (8, 8, 1), 'mnist': (28, 28, 1), 'cifar10': (32, 32, 3)}
_SPLIT_SEED = 0  # of which examples are which: the same in all runs


@dataclasses.dataclass(frozen=True)
class Images:
  """Training, validation and test images."""

  train: data.Split
  val: data.Split
  test: data.Split


def load(config: Config, options: cli.Options) -> Images:
  """The data as configured.

  Of the training split a share `val_share` is for validation, and of the rest
  the first `examples` are taken, if that is given, of a permutation.

  Args:
    config: with `data`, `examples`, `val_share` and `upscale`.
    options: of the binary.

  Raises:
    FileNotFoundError: the data are not there.
  """
  if config.data == 'digits':
    train, test = data.digits(seed=_SPLIT_SEED)
  else:
    train, test = (
      data.load(config.data, split, data_dir=options.data_dir)
      for split in ('train', 'test')
    )
  order = np.random.default_rng(_SPLIT_SEED).permutation(len(train))
  held_out = round(config.val_share * len(train))
  rest = order[held_out:][: config.examples]
  found = train.part(rest), train.part(order[:held_out]), test
  return Images(*(_upscaled(split, config.upscale) for split in found))


def shape(config: Config) -> tuple[int, int, int]:
  """Of an image, with nothing loaded."""
  height, width, channels = _SHAPES[config.data]
  return config.upscale * height, config.upscale * width, channels


def check(config: Config):
  """Raises ValueError if there are no such data, or none to validate with."""
  settings.check_names([config.data], NAMES, 'config.data')
  settings.check_held_out(config, 'validation accuracy is reported')
  if config.augment and config.data != 'cifar10':
    raise ValueError(
      f'config.augment: is for data=cifar10, not for {config.data}.'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(classification.Task):
  """Measured as 'val_accuracy', 'val_loss', 'test_accuracy', 'test_loss'."""

  @classmethod
  def of_images(cls, model: nn.Module, images: Images, config: Config):
    """The task of learning the images, augmented if `config.augment`."""
    augmentation = data.Augmentation.cifar() if config.augment else None
    train = images.train.on_device() if config.augment else images.train
    raw = augmentation is not None
    task = cls.of_splits(model, train, images.test, config, augmentation)
    splits = {'val': images.val, 'test': images.test}
    batches = lambda: _weighted(splits, config.eval_batch_size, raw)
    return dataclasses.replace(task, test=batches)

  def evaluate(self, params, model_state, batch):
    found = super().evaluate(params, model_state, batch)
    return {
      f'{split}_{name}': weight * value
      for split, weight in batch['weights'].items()
      for name, value in found.items()
    }


def _weighted(
  splits: dict[str, data.Split], batch_size: int, raw: bool
) -> Iterator[Any]:
  """The batches of several splits.

  A trainer takes means over all of them. With these weights, they are means
  over the examples of one of the splits.
  """
  total = sum(map(len, splits.values()))
  for name, split in splits.items():
    for batch in data.eval_batches(split, batch_size, raw=raw)():
      count = len(batch['mask'])
      weights = {n: np.zeros(count, np.float32) for n in splits}
      weights[name] += total / len(split)
      yield batch | {'weights': weights}


def _upscaled(split: data.Split, factor: int) -> data.Split:
  """Every pixel as a square of pixels."""
  image = split.image.repeat(factor, 1).repeat(factor, 2)
  return dataclasses.replace(split, image=image)
