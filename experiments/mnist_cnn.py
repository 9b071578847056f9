"""MNIST: a CNN, dense and by OIALR, with the stability of every layer tracked.

  python -m experiments.mnist_cnn --data_dir=FOLDER_OF_TFDS

Trains with every method and seed on the same batches; OIALR with the optimiser
policies `reset` and `reference` only for the first steps after the transition,
to compare the loss there. Writes metrics, plots, compressed model, `result.json`
to --workdir. With --resume, runs that are in it are left out. See
experiments/configs/mnist_cnn.py.
"""

from typing import Any

import optax

from experiments import classification
from experiments import cli
from experiments import results
from experiments import runs
from experiments import settings
from oialr_jax import data
from oialr_jax import models
from oialr_jax import training

_POLICIES = ('reset', 'reference')


def main(config: settings.Config, options: cli.Options):
  delay = classification.delay(config)
  partly = dict(stop_at=delay + results.WINDOW, track_every=None)

  def summary(method: str, result: training.Result) -> dict[str, Any]:
    whole = {} if method in _POLICIES else results.summary(result)
    after = results.after_transition(result, delay)
    return whole | {'loss after transition': after}

  classification.compare(
    task(config, *splits(config, options.data_dir)),
    config,
    options,
    methods=config.methods,
    seeds=config.seeds,
    summary=summary,
    only=dict.fromkeys(_POLICIES, partly),
    steps=config.steps,
    rate=classification.cosine(config),
    track_every=config.track_every,
  )


def splits(
  config: settings.Config, data_dir: str | None
) -> tuple[data.Split, data.Split]:
  """Training and test data."""
  del config  # there is one set
  train, test = (
    data.load('mnist', split, data_dir=data_dir) for split in ('train', 'test')
  )
  return train, test


def task(
  config: settings.Config, train: data.Split, test: data.Split
) -> classification.Task:
  """What is learnt from the one, and tested on the other."""
  return classification.Task.of_splits(models.MnistCnn(), train, test, config)


def plan(
  config: settings.Config, examples: int | None = None
) -> tuple[int, optax.Schedule]:
  """Steps, and the learning rate over them, with so many examples to learn."""
  del examples  # steps are not counted in epochs
  return config.steps, classification.cosine(config)


def check(config: settings.Config):
  classification.cosine(config)
  runs.check(config, config.steps, config.methods)
  window = classification.delay(config) + results.WINDOW
  if window > config.steps:
    raise ValueError(
      f'config.steps={config.steps}: losses are compared until step {window}.'
    )


BINARY = cli.Binary(
  name='mnist_cnn',
  main=main,
  check=check,
  data='Folder of prepared TFDS sets, holding mnist/VERSION/; by default '
  '$OIALR_DATA_DIR, else ~/tensorflow_datasets.',
)

if __name__ == '__main__':
  cli.run(BINARY)
