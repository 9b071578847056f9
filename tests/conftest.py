"""What all tests share: how the machine is used."""

import os

# LAPACK's threads wait by spinning: tests run in parallel instead.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
