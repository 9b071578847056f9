"""Autoformer on the ETT series: the paper's forecasting runs, and more sets.

Paper row: ETTm2, horizons 96, 192, 336, 720, with the settings of Autoformer's
authors: Adam 1e-4, which their program halves at the end of every epoch but the
first, batch 32, early stopping with patience 3 of at most 10 epochs.
Command: python -m experiments.ett_autoformer --data_dir=FOLDER
  --config=experiments/configs/ett_autoformer.py:cpu   (horizon 192, one seed)
Hardware and minutes: on 2 CPU cores 40 to 60 minutes an epoch of dense training
at horizon 192 (1,071 steps), 25 to 35 of OIALR's, and 2 to 10 for an
evaluation; on a GPU not measured.
Expected: dense test MSE 0.274 at horizon 192 and 0.420 at 720, OIALR 0.268 and
0.420, as published. See BUILD_NOTES.md for what was measured.

Delay, frequency and cutoff are not published. The cutoff is from spectra: at a
rate of 1e-4 most of a kernel stays what it was initialised to, whose spectrum
has few small values: after 536 dense steps a cutoff of 0.2 would leave 35.5 %
of the parameters trainable, 0.4 19.1 %, 0.5 11.0 %. All layers are pruned from
the transition on: at whole rank, factors take longer than the kernels.
"""

import ml_collections

from experiments import runs
from experiments import settings

_VARIANTS = {
  '': {},
  'cpu': dict(horizons=(192,), seeds=(0,), stop_epochs=4.0),
}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  settings.check_names([variant], _VARIANTS, 'variant')
  config = ml_collections.ConfigDict(
    dict(
      sets=('ETTm2',),  # of ETTh1, ETTh2, ETTm1, ETTm2
      horizons=(96, 192, 336, 720),
      methods=('dense', 'oialr'),
      seeds=(0, 1, 2),
      epochs=10.0,
      steps=settings.optional(int),  # instead of those of the epochs
      stop_epochs=settings.optional(float),
      eval_epochs=1.0,
      patience=3,  # evaluations
      batch_size=32,
      eval_batch_size=128,
      eval_windows=settings.optional(int),
      seq_len=96,
      label_len=48,
      learning_rate=1e-4,
      constant_epochs=2.0,  # their program sets that of epoch 2 to 0.5^0
      halving_epochs=1.0,
      rewarmup=0,
      track_every=settings.optional(int),
      model=dict(
        d_model=512,
        d_ff=2048,
        e_layers=2,
        d_layers=1,
        factor=1.0,
        moving_avg=25,
        dropout=0.05,
      ),
      # What the rows of BUILD_NOTES.md were measured with; by default 0.25.
      compaction=dict(min_saving=0.1, background=True, reproducible=False),
      oialr=runs.oialr_section(
        delay=0.05,  # steps, or a share of the run
        every=250,
        cutoff=0.5,
        progressive=1.0,
        prune_at_transition=True,
      ),
      **runs.sections(),
    )
  )
  config.update(_VARIANTS[variant])
  return config
