"""Reports: what there is to see of a run."""

from oialr_jax.report import plots
