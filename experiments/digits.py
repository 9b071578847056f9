"""The main job: handwritten digits, dense and by OIALR, in a minute on a CPU.

  python -m experiments.digits
  python -m experiments.digits --config.methods=dense,oialr,svd_prune

Trains the same network by every method from the same seed on the same batches,
prints one table, and writes to --workdir: metrics, plots, the compressed model,
`config.json` and `result.json`. See experiments/configs/digits.py.
"""

from experiments import classification
from experiments import cli
from experiments import runs
from experiments import settings
from oialr_jax import data
from oialr_jax import models


def main(config: settings.Config, options: cli.Options):
  train, test = data.digits(seed=config.seed)
  task = classification.Task.of_splits(
    models.Mlp(widths=(config.width,) * 3), train, test, config
  )
  classification.compare(
    task,
    config,
    options,
    methods=config.methods,
    seeds=[config.seed],
    steps=config.steps,
    rate=classification.cosine(config),
    track_every=config.track_every,
  )


def check(config: settings.Config):
  classification.cosine(config)
  runs.check(config, config.steps, config.methods)


BINARY = cli.Binary(name='digits', main=main, check=check)

if __name__ == '__main__':
  cli.run(BINARY)
