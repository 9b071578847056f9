"""Programs compiled ahead of their use, beside the training.

Only XLA works in the background. A program is traced by whoever asks for it,
because what tracing depends on (default precisions, meshes) is a thread's own.
"""

from collections.abc import Callable, Hashable
from concurrent import futures
import dataclasses
import os
import pathlib
import platform
import time
from typing import Any

import jax

PyTree = Any
Lower = Callable[[], jax.stages.Lowered]


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    compiled: to be called with arrays.
    out: shapes and dtypes of what it returns.
    seconds: that XLA took.
  """

  compiled: Callable[..., Any]
  out: PyTree
  seconds: float

  def __call__(self, *args: PyTree) -> PyTree:
    return self.compiled(*args)

  @property
  def flops(self) -> float | None:
    """As XLA counts them; None where it does not.

    They are those of one device, and what a loop repeats is counted once.
    """
    analysis = self.compiled.cost_analysis()
    return analysis.get('flops') if analysis else None


class Programs:
  """Compiles programs, each once, now or ahead of their use.

  Args:
    background: compile what is prepared in a thread; else when it is needed.
  """

  def __init__(self, background: bool = True):
    # One thread: XLA uses the machine's cores by itself.
    self._pool = futures.ThreadPoolExecutor(1) if background else None
    self._known: dict[Hashable, futures.Future[Program]] = {}

  def prepare(self, key: Hashable, lower: Lower):
    """Starts compiling what `get` will be asked for."""
    if self._pool is not None and key not in self._known:
      self._known[key] = self._pool.submit(_compile, lower())

  def known(self, key: Hashable) -> bool:
    """Whether it is compiled, or on its way."""
    return key in self._known

  def ready(self, *keys: Hashable) -> bool:
    """Whether `get` would return at once for all of these."""
    return all(key in self._known and self._known[key].done() for key in keys)

  def get(self, key: Hashable, lower: Lower) -> Program:
    """The program of this key; waits for it, or compiles it here."""
    if key not in self._known:
      # Not in the pool, where others may be waiting in front.
      self._known[key] = futures.Future()
      self._known[key].set_result(_compile(lower()))
    return self._known[key].result()

  def close(self):
    """Drops what has not begun to compile."""
    if self._pool is not None:
      self._pool.shutdown(wait=False, cancel_futures=True)


def shapes(arrays: PyTree) -> Hashable:
  """A key that is the same for trees of equal structure, shapes and dtypes."""
  leaves, treedef = jax.tree.flatten(arrays)
  return treedef, tuple((x.shape, str(x.dtype)) for x in leaves)


def use_compilation_cache(folder: str | os.PathLike | None = None):
  """Keeps compiled programs on disk, so that the next run loads them.

  Nothing is done where `jax_compilation_cache_dir` is set already, as by the
  environment variable JAX_COMPILATION_CACHE_DIR.

  Args:
    folder: for the programs; by default oialr_jax in the user's cache folder,
      apart for every kind of host, whose CPUs may differ.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  if folder is None:
    caches = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    folder = pathlib.Path(caches, 'oialr_jax', 'xla', platform.node())
  jax.config.update('jax_compilation_cache_dir', str(folder))
  # Small models compile in less than jax's default of a second, many times.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def _compile(lowered: jax.stages.Lowered) -> Program:
  start = time.perf_counter()
  compiled = lowered.compile()
  return Program(compiled, lowered.out_info, time.perf_counter() - start)
