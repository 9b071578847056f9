"""Reports: what there is to see of a run."""

from oialr_jax.report import plots
from oialr_jax.report.page import write
from oialr_jax.report.runs import read
from oialr_jax.report.runs import Run
from oialr_jax.report.runs import Workdir
