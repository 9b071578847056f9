"""The main job: scikit-learn's 8 x 8 handwritten digits, nothing to download.

Command: python -m experiments.digits
Hardware and minutes: any CPU; under a minute on 2 cores.
Expected: OIALR at most 0.5 points below dense with at most 20 % trainable.
"""

import ml_collections

from experiments import runs


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(
      methods=('dense', 'oialr'),  # see experiments/runs.py
      seed=0,
      width=512,  # of the three hidden layers
      steps=900,
      batch_size=128,
      eval_batch_size=450,
      learning_rate=1e-3,
      warmup=50,
      weight_decay=0.01,
      clip=5.0,
      label_smoothing=0.0,
      track_every=60,
      compaction=dict(min_saving=0.25, background=True, reproducible=False),
      oialr=runs.oialr_section(
        delay=1 / 3,  # steps, or a share of the run
        every=60,
        cutoff=0.4,
        progressive=0.5,
      ),
      # Numbers, because a small share of the 64 inputs would be a bottleneck.
      # About 5 % are trainable by fixed_rank, and 9 % by those with factors.
      **runs.sections(
        fixed_rank=dict(rank=96),
        svd_prune=dict(rank=16),
        svd_init=dict(rank=16),
        lora_style=dict(rank=16),
        dlrt=dict(rank=64),
      ),
    )
  )
