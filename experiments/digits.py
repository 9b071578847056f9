"""The main job: handwritten digits, dense and by OIALR, in a minute on a CPU.

  python -m experiments.digits
  python -m experiments.digits --config.methods=dense,oialr,svd_prune

Trains the same network by every method from the same seed on the same batches,
prints one table, and writes to --workdir: metrics, plots, the compressed model,
`config.json` and `result.json`. See experiments/configs/digits.py.
"""

import optax

from experiments import classification
from experiments import cli
from experiments import runs
from experiments import settings
from oialr_jax import data
from oialr_jax import models


def main(config: settings.Config, options: cli.Options):
  classification.compare(
    task(config, *splits(config, options.data_dir)),
    config,
    options,
    methods=config.methods,
    seeds=[config.seed],
    steps=config.steps,
    rate=classification.cosine(config),
    track_every=config.track_every,
  )


def splits(
  config: settings.Config, data_dir: str | None
) -> tuple[data.Split, data.Split]:
  """Training and test data."""
  del data_dir  # comes with scikit-learn
  return data.digits(seed=config.seed)


def task(
  config: settings.Config, train: data.Split, test: data.Split
) -> classification.Task:
  """What is learnt from the one, and tested on the other."""
  return classification.Task.of_splits(
    models.Mlp(widths=(config.width,) * 3), train, test, config
  )


def plan(
  config: settings.Config, examples: int | None = None
) -> tuple[int, optax.Schedule]:
  """Steps, and the learning rate over them, with so many examples to learn."""
  del examples  # steps are not counted in epochs
  return config.steps, classification.cosine(config)


def check(config: settings.Config):
  classification.cosine(config)
  runs.check(config, config.steps, config.methods)


BINARY = cli.Binary(name='digits', main=main, check=check)

if __name__ == '__main__':
  cli.run(BINARY)
