"""What ends a run before its time: signals, preemption, a limit."""

from collections.abc import Iterator
import contextlib
import signal
import threading
import time

import jax
from jax.experimental import multihost_utils


class Interrupted(SystemExit):
  """A run has saved and stopped as it was told to; a program ends with it.

  Attributes:
    step: optimiser steps done.
  """

  def __init__(self, reason: str, step: int):
    super().__init__(0)
    self.reason = reason
    self.step = step

  def __str__(self) -> str:
    return f'stopped after step {self.step}: {self.reason}'


class Watch:
  """Says whether to stop.

  Args:
    max_seconds: of the wall clock, from now on.
  """

  def __init__(self, max_seconds: float | None = None):
    self._deadline = None
    if max_seconds is not None:
      self._deadline = time.monotonic() + max_seconds
    self._limit = max_seconds
    self._signal: int | None = None

  def reason(self, step: int) -> str:
    """Why to stop after this step; '' to go on."""
    if self._signal is not None:
      return f'{signal.Signals(self._signal).name} was received'
    if self._deadline is not None and time.monotonic() >= self._deadline:
      return f'max_seconds={self._limit} have passed'
    several = jax.process_count() > 1
    if several and multihost_utils.reached_preemption_sync_point(step):
      return 'the machine is about to be taken away'
    return ''

  @contextlib.contextmanager
  def signals(self) -> Iterator[None]:
    """Catches SIGTERM within; a second one does what it did before."""
    if threading.current_thread() is not threading.main_thread():
      yield  # only a main thread can have handlers
      return
    before = signal.getsignal(signal.SIGTERM)

    def handle(number, _):
      self._signal = number
      signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, handle)
    try:
      yield
    finally:
      signal.signal(signal.SIGTERM, before)
