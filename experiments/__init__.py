"""Binaries, one an experiment: absl flags and a config file each."""

import os
import sys

# LAPACK's threads wait by spinning, at the cost of everything else that runs:
# on 2 busy cores an SVD of 512 x 512 takes 30 times as long with them.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')


def _use_huge_pages():
  """Starts the binary anew, with glibc's allocator asking for huge pages.

  XLA's CPU runtime allocates its temporary memory anew for every step, and the
  kernel clears it a page at a time. With pages of 2 MB instead of 4 kB a step of
  the mini ViT takes 0.93 of the time, and one at a tenth of the rank 0.7. glibc
  reads the setting when a process starts, and never again.
  """
  module = sys.orig_argv[sys.orig_argv.index('-m') + 1]
  if module.startswith('experiments.') and 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, sys.orig_argv)


if sys.platform == 'linux' and '-m' in sys.orig_argv[:-1]:
  _use_huge_pages()
