"""The main job: handwritten digits, dense and by OIALR, in a minute on a CPU.

  python -m experiments.digits

Trains the same network twice from the same seed on the same batches, prints one
table, and writes to --workdir: metrics, plots, the compressed model,
`config.json` and `result.json`. See experiments/configs/digits.py.
"""

import pathlib

from absl import app
from absl import flags
from ml_collections import config_flags

from experiments import classification
from oialr_jax import data
from oialr_jax import models

_CONFIG = config_flags.DEFINE_config_file(
  'config', str(pathlib.Path(__file__).parent / 'configs' / 'digits.py')
)
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/digits', 'Folder for all that the run writes.'
)
_QUIET = flags.DEFINE_bool('quiet', False, 'Print the result only.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  classification.quiet_libraries()
  config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value)
  train, test = data.digits(seed=config.seed)
  task = classification.Task(
    model=models.Mlp(widths=(config.width,) * 3),
    train=train,
    test=test,
    batch_size=config.batch_size,
    label_smoothing=config.label_smoothing,
  )
  results = {
    name: classification.run(
      task,
      config,
      name,
      config.seed,
      workdir,
      quiet=_QUIET.value,
      track_every=config.track_every,
    )
    for name in ('dense', 'transport')
  }
  rows = {
    classification.label(name): [classification.summary(result)]
    for name, result in results.items()
  }
  print(classification.table(rows))
  classification.write_report(workdir, results)
  classification.save(workdir, config, rows)


if __name__ == '__main__':
  app.run(main)
