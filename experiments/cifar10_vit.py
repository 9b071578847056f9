"""CIFAR-10: the paper's mini ViT, dense and by OIALR.

  python -m experiments.cifar10_vit --data_dir=FOLDER_OF_TFDS
  python -m experiments.cifar10_vit --data_dir=FOLDER_OF_TFDS \\
    --config=experiments/configs/cifar10_vit.py:small --resume

Trains with timm's augmentation and schedule, prints a table of all methods, and
writes metrics, plots, the compressed model and `result.json` to --workdir. The
variant `small` is for a CPU: four methods, three seeds. With --resume, runs that
are in result.json are left out, and the one that was interrupted goes on. See
experiments/configs/cifar10_vit.py.
"""

from experiments import classification
from experiments import cli
from experiments import recipe
from experiments import settings
from oialr_jax import data

TRAINING_EXAMPLES = 50_000


def main(config: settings.Config, options: cli.Options):
  train = data.load('cifar10', 'train', data_dir=options.data_dir)
  task = classification.Task.of_splits(
    recipe.model(config),
    train.on_device(),
    data.load('cifar10', 'test', data_dir=options.data_dir),
    config,
    recipe.augmentation(data.Augmentation.cifar, config),
  )
  recipe.compare(task, config, options, examples=len(train))


def check(config: settings.Config):
  recipe.augmentation(data.Augmentation.cifar, config)
  recipe.check(config, examples=TRAINING_EXAMPLES, image=(32, 32, 3))


BINARY = cli.Binary(
  name='cifar10_vit',
  main=main,
  check=check,
  data='Folder of prepared TFDS sets, holding cifar10/VERSION/; by default '
  '$OIALR_DATA_DIR, else ~/tensorflow_datasets.',
)

if __name__ == '__main__':
  cli.run(BINARY)
