"""MNIST: a CNN, dense and by OIALR, with the stability of every layer tracked.

  python -m experiments.mnist_cnn --data_dir=FOLDER_OF_TFDS

For every seed it trains dense and with OIALR on the same batches, and for the
first steps after the transition with the optimiser policies `reset` and
`reference`, to compare the loss there. Writes metrics, plots, compressed model,
`result.json` to --workdir. See experiments/configs/mnist_cnn.py.
"""

from experiments import classification
from experiments import cli
from experiments import results
from experiments import runs
from experiments import settings
from oialr_jax import data
from oialr_jax import models

WHOLE = ('dense', 'oialr')
METHODS = (*WHOLE, 'reset', 'reference')


def main(config: settings.Config, options: cli.Options):
  task = classification.Task.of_splits(
    models.MnistCnn(),
    data.load('mnist', 'train', data_dir=options.data_dir),
    data.load('mnist', 'test', data_dir=options.data_dir),
    config,
  )
  delay, rate = classification.delay(config), classification.cosine(config)
  rows = {}
  for seed in config.seeds:
    found = {}
    for method in METHODS:
      whole = method in WHOLE
      result = classification.run(
        task,
        config,
        options,
        method,
        seed,
        steps=config.steps,
        rate=rate,
        track_every=config.track_every if whole else None,
        stop_at=None if whole else delay + results.WINDOW,
      )
      row = results.summary(result) if whole else {}
      row['loss after transition'] = results.after_transition(result, delay)
      found[method] = result
      rows.setdefault(method, []).append(row)
      results.save(options.workdir, config, rows)
    if seed == config.seeds[0]:
      compared = {method: found[method] for method in WHOLE}
      results.write_report(
        options.workdir, compared, task.forward, task.probe()
      )
  print(results.table(rows))


def check(config: settings.Config):
  classification.cosine(config)
  runs.check(config, config.steps, METHODS)
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
