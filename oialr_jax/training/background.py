"""Updates under way: their SVDs are done on the host, while steps go on.

Of several processes the first does them, and the others take what it has found:
on other processors LAPACK may round otherwise.
"""

from collections.abc import Mapping
from concurrent import futures
import functools
import os

import jax
from jax.experimental import multihost_utils
import numpy as np

from oialr_jax import schedule as schedule_lib
from oialr_jax import transforms

Sigmas = Mapping[str, transforms.Sigma]
Rotations = dict[str, transforms.Rotation]


class Update:
  """An update between its beginning and the step at which it is due.

  Args:
    event: of a schedule with a lag.
    sigmas: copies of those of `event.step`, on every device.
    pool: of the threads that decompose them.
  """

  def __init__(
    self, event: schedule_lib.Event, sigmas: Sigmas, pool: futures.Executor
  ):
    self.event = event
    self.sigmas = sigmas
    self._found: dict[str, futures.Future[Rotations]] = {}
    if jax.process_index() == 0:
      for x in jax.tree.leaves(sigmas):
        x.copy_to_host_async()
      for path, sigma in sigmas.items():
        self._found[path] = pool.submit(transforms.decompose, {path: sigma})

  @functools.cached_property
  def rotations(self) -> Rotations:
    """What was found, the same in all processes; waits for it.

    Raises:
      ValueError: a Sigma is not finite; an SVD fails.
      RuntimeError: the first process had such an error.
    """
    if jax.process_count() == 1:
      return self._collected()
    error, found = None, {p: _zeros(x) for p, x in self.sigmas.items()}
    try:
      found |= self._collected()
    except Exception as e:
      error = e
    if multihost_utils.broadcast_one_to_all(np.int32(error is not None)):
      raise error or RuntimeError(
        f'the update of step {self.event.step} failed in the first process, '
        'which says why.'
      )
    return multihost_utils.broadcast_one_to_all(found)

  def _collected(self) -> Rotations:
    """What was found here: nothing but in the first process."""
    return {path: x.result()[path] for path, x in self._found.items()}


def _zeros(sigma: transforms.Sigma) -> transforms.Rotation:
  """In the place of a rotation that another process finds."""
  square = np.zeros(sigma.s.shape, sigma.s.dtype)
  return transforms.Rotation(square, square[..., 0], square)


def threads() -> futures.Executor:
  """For the SVDs: half of the cores, for the others make the batches."""
  count = max(1, (os.cpu_count() or 1) // 2)
  return futures.ThreadPoolExecutor(count, thread_name_prefix='svd')
