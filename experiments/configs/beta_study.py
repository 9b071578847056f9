"""Compression against accuracy over beta, the cutoff of singular values.

Paper row: none; beta is what its search varies between 0.01 and 0.9.
Command: python -m experiments.beta_study
Hardware and minutes: any CPU; 2 minutes on one core.
Expected: fewer trainable parameters with every larger beta; up to 0.4, at
9.2 % trainable, at most 0.8 points of test accuracy behind dense (97.6 %), at
0.8 it falls to 80 %.

The variant `mnist` is the CNN of `mnist_cnn`, with its settings.
"""

import ml_collections

from experiments import settings

_VARIANTS = {
  '': {},
  'mnist': dict(
    data='mnist',
    val_share=0.1,
    steps=4200,
    eval_batch_size=500,
    learning_rate=2e-3,
    warmup=100,
    oialr=dict(every=210, progressive=1.0),
  ),
}
_MODELS = {
  '': dict(name='mlp', widths=(256, 256, 256), dtype='float32'),
  'mnist': dict(name='mnist_cnn', dtype='float32'),
}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  settings.check_names([variant], _VARIANTS, 'variant')
  config = ml_collections.ConfigDict(
    dict(
      cutoffs=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
      seeds=(0, 1, 2),
      data='digits',
      examples=settings.optional(int),
      val_share=0.2,
      upscale=1,
      augment=False,
      steps=600,
      batch_size=128,
      eval_batch_size=450,
      learning_rate=1e-3,
      warmup=50,
      weight_decay=0.01,
      clip=5.0,
      model=_MODELS[variant],
      # Sliced at the end alone: between, a run of seconds would compile.
      compaction=dict(min_saving=1.0, background=False, reproducible=True),
      oialr=dict(
        delay=settings.either(1 / 3),  # steps, or a share of the run
        every=40,
        progressive=0.5,
      ),
    )
  )
  config.update(_VARIANTS[variant])
  return config
