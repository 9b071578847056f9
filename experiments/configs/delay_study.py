"""Transition time x depth x learning rate: when may a network go low-rank?

Paper row: its third open question; it goes low-rank after a third of the run.
Command: python -m experiments.delay_study
Hardware and minutes: any CPU; some minutes on 2 cores, not measured
on a quiet machine.
Expected: the later the better, within the deviations; after a third of the run
at most 1 point of test accuracy behind dense at rates of 1e-3 and above, and
2 to 4 points at 3e-4, where dense has not finished learning either.
"""

import ml_collections

from experiments import settings


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(
      delays=(0.0, 0.1, 1 / 3, 2 / 3),  # shares of the run; 0 starts low-rank
      depths=(2, 4, 8),
      learning_rates=(3e-4, 1e-3, 3e-3),
      seeds=(0, 1),
      width=128,
      data='digits',
      examples=settings.optional(int),
      val_share=0.2,
      upscale=1,
      augment=False,
      steps=300,
      batch_size=128,
      eval_batch_size=450,
      warmup=30,
      weight_decay=0.01,
      clip=5.0,
      # Sliced at the end alone: between, a run of seconds would compile.
      compaction=dict(min_saving=1.0, background=False, reproducible=True),
      oialr=dict(every=30, cutoff=0.4, progressive=1.0),
    )
  )
