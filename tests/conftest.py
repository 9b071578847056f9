"""What all tests share: how the machine is used."""

import atexit
import os
import shutil
import tempfile

# LAPACK's threads wait by spinning: tests run in parallel instead.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

# The trainer keeps compiled programs in the user's cache folder.
_caches = tempfile.mkdtemp()
os.environ['XDG_CACHE_HOME'] = _caches
atexit.register(shutil.rmtree, _caches, ignore_errors=True)
