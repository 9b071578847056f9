"""Which examples make up a batch, and who gets which part of it.

The order of a run is a function of the seed and the step alone. Processes take
consecutive slices of the global batch, so that neither stopping and resuming nor
another number of processes changes what is trained on.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
import itertools
from typing import Any

import jax
import numpy as np

Batch = dict[str, np.ndarray]


class Batches(Iterator[Batch]):
  """Endless training batches; their state is the number of the next step.

  A checkpoint may hold `get_state()`. A trainer that fetches ahead knows the step
  better, and restores `{'step': step}`.
  """

  def __init__(self, start_at: Callable[[int], Iterator[Batch]], step: int = 0):
    """`start_at(step)` returns the batches from a step on."""
    self._start_at = start_at
    self._iterator = None
    self.set_state({'step': step})

  def __next__(self) -> Batch:
    if self._iterator is None:
      self._iterator = self._start_at(self._step)
    batch = next(self._iterator)
    self._step += 1
    return batch

  def map(self, function: Callable[[Any, int], Any]) -> 'Batches':
    """These batches as `function(batch, step)` makes them.

    As with `lambda batch, step: augment(batch, jax.random.fold_in(key, step))`,
    which is resumed like the batches themselves.
    """

    def start_at(step: int):
      return map(function, self._start_at(step), itertools.count(step))

    return Batches(start_at, self._step)

  def get_state(self) -> dict[str, int]:
    """The step of the batch that comes next."""
    return {'step': self._step}

  def set_state(self, state: Mapping[str, int]):
    """Continues with the batch of this step, whatever came before."""
    step = int(state['step'])
    if step < 0:
      raise ValueError(f'step={step}: must be at least 0.')
    self.close()
    self._step = step

  def close(self):
    """Ends the worker processes, if there are any; `next` starts them again."""
    close = getattr(self._iterator, 'close', None)
    self._iterator = None
    if close is not None:
      close()


def order(
  examples: int, batch_size: int, *, seed: int, step: int
) -> tuple[int, np.ndarray]:
  """The epoch of a step, and the examples of its global batch `[batch_size]`.

  Every epoch is a new permutation; the remainder that fills no batch is left out
  of it.
  """
  epoch, i = divmod(step, examples // batch_size)
  permutation = _permutation(examples, seed, epoch)
  return epoch, permutation[i * batch_size : (i + 1) * batch_size]


def check_batch_size(batch_size: int, examples: int):
  """Raises ValueError if a batch does not fit into an epoch."""
  if not 1 <= batch_size <= examples:
    raise ValueError(
      f'batch_size={batch_size}: must be in [1, {examples}], the number of '
      'examples.'
    )


def part(
  batch_size: int, process_index: int | None, process_count: int | None
) -> slice:
  """This process's part of a global batch; by default JAX says which it is.

  Raises:
    ValueError: the batch does not divide, or there is no such process.
  """
  if (process_index is None) != (process_count is None):
    raise ValueError(
      'process_index and process_count go together: pass both or neither.'
    )
  if process_count is None:
    process_index, process_count = jax.process_index(), jax.process_count()
  if not 0 <= process_index < process_count:
    raise ValueError(
      f'process_index={process_index}: must be in [0, {process_count}), the '
      'number of processes.'
    )
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f'batch_size={batch_size}: must be a multiple of {process_count}, the '
      'number of processes.'
    )
  size = batch_size // process_count
  return slice(process_index * size, (process_index + 1) * size)


def padded(
  examples: int, batch_size: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
  """Examples of a batch of an evaluation, and its mask: 0 where it is padding."""
  index = np.arange(step * batch_size, (step + 1) * batch_size)
  mask = (index < examples).astype(np.float32)
  return np.minimum(index, examples - 1), mask


# Two, because workers that prefetch are at the end of one epoch and the start of
# the next: a permutation of ImageNet takes 10 MB, and 20 ms to draw.
@functools.lru_cache(maxsize=2)
def _permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
  permutation = np.random.default_rng([seed, epoch]).permutation(examples)
  permutation.flags.writeable = False
  return permutation
