"""CIFAR-10: the paper's mini ViT, dense and by OIALR.

  python -m experiments.cifar10_vit --data_dir=FOLDER_OF_TFDS
  python -m experiments.cifar10_vit --data_dir=FOLDER_OF_TFDS \\
    --config=experiments/configs/cifar10_vit.py:small --resume

Trains with timm's augmentation and schedule, prints a table of all methods, and
writes metrics, plots, the compressed model and `result.json` to --workdir. The
variant `small` is for a CPU: four methods, three seeds. To tune, hold out a part
of the training data by --config.val_share=0.1: it takes the place of the test
data. With --resume, runs that are in result.json are left out, and the one that
was interrupted goes on. See experiments/configs/cifar10_vit.py.
"""

import optax

from experiments import classification
from experiments import cli
from experiments import recipe
from experiments import settings
from oialr_jax import data

TRAINING_EXAMPLES = 50_000


def main(config: settings.Config, options: cli.Options):
  train, test = splits(config, options.data_dir)
  recipe.compare(
    task(config, train, test),
    config,
    options,
    examples=len(train),
    tested_on='validation' if config.val_share else 'test',
  )


def splits(
  config: settings.Config, data_dir: str | None
) -> tuple[data.Split, data.Split]:
  """What is learnt from, and test data, or what is held out instead."""
  load = lambda split: data.load('cifar10', split, data_dir=data_dir)
  if config.val_share:
    return classification.held_out(load('train'), config.val_share)
  return load('train'), load('test')


def task(
  config: settings.Config, train: data.Split, test: data.Split
) -> classification.Task:
  """What is learnt from the one, and tested on the other."""
  return classification.Task.of_splits(
    recipe.model(config),
    train.on_device(),
    test,
    config,
    recipe.augmentation(data.Augmentation.cifar, config),
  )


def plan(
  config: settings.Config, examples: int = TRAINING_EXAMPLES
) -> tuple[int, optax.Schedule]:
  """Steps, and the learning rate over them, with so many examples to learn."""
  steps = recipe.length(config, examples)
  return steps, recipe.rate(config, steps)


def check(config: settings.Config):
  recipe.augmentation(data.Augmentation.cifar, config)
  examples = round((1 - config.val_share) * TRAINING_EXAMPLES)
  recipe.check(config, examples=examples, image=(32, 32, 3))


BINARY = cli.Binary(
  name='cifar10_vit',
  main=main,
  check=check,
  data='Folder of prepared TFDS sets, holding cifar10/VERSION/; by default '
  '$OIALR_DATA_DIR, else ~/tensorflow_datasets.',
)

if __name__ == '__main__':
  cli.run(BINARY)
