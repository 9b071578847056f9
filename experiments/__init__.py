"""Binaries, one an experiment: absl flags and a config file each."""

import os

# LAPACK's threads wait by spinning, at the cost of everything else that runs:
# on 2 busy cores an SVD of 512 x 512 takes 30 times as long with them.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
