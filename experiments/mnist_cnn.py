"""MNIST: a CNN, dense and by OIALR, with the stability of every layer tracked.

  python -m experiments.mnist_cnn --data_dir=FOLDER_OF_TFDS

For every seed it trains dense and with OIALR on the same batches, and for the
first steps after the transition with the optimiser policies `reset` and
`reference`, to compare the loss there. Writes metrics, plots, compressed model,
`result.json` to --workdir. See experiments/configs/mnist_cnn.py.
"""

import pathlib

from absl import app
from absl import flags
from ml_collections import config_flags

from experiments import classification
from oialr_jax import data
from oialr_jax import models

_CONFIG = config_flags.DEFINE_config_file(
  'config', str(pathlib.Path(__file__).parent / 'configs' / 'mnist_cnn.py')
)
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/mnist_cnn', 'Folder for all that the run writes.'
)
_DATA_DIR = flags.DEFINE_string(
  'data_dir',
  None,
  'Folder of prepared TFDS sets, holding mnist/VERSION/; by default '
  '$OIALR_DATA_DIR, else ~/tensorflow_datasets.',
)
_QUIET = flags.DEFINE_bool('quiet', False, 'Print the result only.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  classification.quiet_libraries()
  config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value)
  task = classification.Task(
    model=models.MnistCnn(),
    train=data.load('mnist', 'train', data_dir=_DATA_DIR.value),
    test=data.load('mnist', 'test', data_dir=_DATA_DIR.value),
    batch_size=config.batch_size,
    label_smoothing=config.label_smoothing,
  )
  rows = {}
  for seed in range(config.seeds):
    results = {}
    for name in ('dense', 'transport', 'reset', 'reference'):
      full = name in ('dense', 'transport')
      delay = classification.delay(config)
      result = classification.run(
        task,
        config,
        name,
        seed,
        workdir,
        quiet=_QUIET.value,
        track_every=config.track_every if full else None,
        stop_at=None if full else delay + classification.WINDOW,
      )
      row = classification.summary(result) if full else {}
      row['loss after transition'] = classification.after_transition(
        result, delay
      )
      results[name] = result
      rows.setdefault(classification.label(name), []).append(row)
    if seed == 0:
      compared = {n: results[n] for n in ('dense', 'transport')}
      classification.write_report(workdir, compared)
  print(classification.table(rows))
  classification.save(workdir, config, rows)


if __name__ == '__main__':
  app.run(main)
