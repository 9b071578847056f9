"""Settings of digits, mnist_cnn or cifar10_vit, searched.

Command: python -m experiments.search --config.workers=2
  python -m experiments.search --config=experiments/configs/search.py:mnist_cnn
    --data_dir=FOLDER_OF_TFDS
Hardware and minutes: any CPU; 7 minutes on one core for 20 trials of digits and
the tests.
Expected: of digits, settings at the accuracy of the default on test data with
about half of its trainable parameters.
"""

import importlib

import ml_collections

from experiments import settings

BINARIES = ('digits', 'mnist_cnn', 'cifar10_vit')
# Least and largest values, in units that experiments.search says.
_SPACE = dict(
  learning_rate=(0.1, 10.0),
  warmup=(0.0, 0.2),
  warmup_epochs=(0.0, 0.2),
  end_rate=(1e-3, 0.3),
  k_decay=(0.2, 2.0),
  weight_decay=(0.01, 100.0),
  clip=(0.1, 10.0),
  cutoff=(0.02, 0.9),
  every=(0.01, 0.2),
  delay=(0.05, 0.6),
  progressive=(0.1, 1.0),
)


def of(binary: str) -> ml_collections.ConfigDict:
  """The settings of a binary, or of one of its variants: 'cifar10_vit:small'."""
  name, _, variant = binary.partition(':')
  settings.check_names([name], BINARIES, 'variant')
  module = importlib.import_module(f'experiments.configs.{name}')
  return module.get_config(variant) if variant else module.get_config()


def get_config(variant: str = 'digits') -> ml_collections.ConfigDict:
  base = of(variant)
  return ml_collections.ConfigDict(
    dict(
      binary=variant,
      base=base,
      space={k: _SPACE[k] for k in _SPACE if k in base or k in base.oialr},
      trials=40,
      seed=0,
      seeds=(0,),
      val_share=0.25,
      rungs=3,
      prune=0.5,
      test_seeds=(0, 1, 2),
      workers=1,
      storage=settings.optional(str),
      grace=60.0,
    )
  )
