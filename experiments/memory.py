"""The most memory that a run has taken, where somebody counts it."""

import pathlib
import resource
import sys
from typing import Any

import jax

_PROCESS = pathlib.Path('/proc/self')


def reset():
  """Begins to count anew, where that can be done: of processes on Linux."""
  try:
    (_PROCESS / 'clear_refs').write_text('5')
  except OSError:
    return


def peak() -> dict[str, Any]:
  """The most bytes so far, and of what.

  Of a device, that is since the process began: one process a run is what tells
  two runs apart. Where devices do not count, as CPUs do not, it is the resident
  memory of the process, with data, programs and Python in it.
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return {'peak_bytes': stats['peak_bytes_in_use'], 'peak_of': 'device'}
  return {'peak_bytes': _resident(), 'peak_of': 'process'}


def _resident() -> int:
  try:
    for line in (_PROCESS / 'status').read_text().splitlines():
      if line.startswith('VmHWM:'):
        return 1024 * int(line.split()[1])
  except OSError:
    pass
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return most if sys.platform == 'darwin' else 1024 * most
