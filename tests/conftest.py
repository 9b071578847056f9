"""What all tests share: how the machine is used."""

import atexit
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

# LAPACK's threads wait by spinning: tests run in parallel instead.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

# The trainer keeps compiled programs in the user's cache folder.
_caches = tempfile.mkdtemp()
os.environ['XDG_CACHE_HOME'] = _caches
atexit.register(shutil.rmtree, _caches, ignore_errors=True)

# Compiling takes most of the tests' time, and nearly half less by these.
QUICK = '--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0'

_START = 'import jax; assert jax.default_backend() == "cpu"'


def _fits(flags: str) -> bool:
  """Whether tests run on a CPU, by a jaxlib that has these flags.

  Asked of another process: XLA ends one for a flag that it does not know.
  """
  started = subprocess.run(
    [sys.executable, '-c', _START],
    env=os.environ | {'XLA_FLAGS': flags},
    capture_output=True,
  )
  return started.returncode == 0


# pytest-xdist's workers, and processes that tests start, inherit them.
if 'XLA_FLAGS' not in os.environ:
  os.environ['XLA_FLAGS'] = QUICK if _fits(QUICK) else ''

# Linux gives a process so many mappings of memory (vm.max_map_count is 65,530 by
# default). Of XLA's programs for a CPU every one takes up to a few hundred, and
# JAX keeps them: with no mapping left, reading one from its cache on disk is a
# segmentation fault.
_MANY_MAPPINGS = 20_000


@pytest.fixture(autouse=True, scope='module')
def _programs_are_dropped():
  yield
  if _mappings() > _MANY_MAPPINGS:
    import jax  # after the environment is set

    jax.clear_caches()


def _mappings() -> int:
  """That this process has; 0 where that cannot be told."""
  maps = pathlib.Path('/proc/self/maps')
  return len(maps.read_bytes().splitlines()) if maps.exists() else 0
