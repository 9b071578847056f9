"""What ends a run before its time: signals, preemption, a limit."""

from collections.abc import Iterator
import contextlib
import signal
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils
import numpy as np


class Interrupted(SystemExit):
  """A run has saved and stopped as it was told to; a program ends with it.

  With exit status 75, EX_TEMPFAIL of sysexits.h, so that what is to follow the
  whole run does not take it for done, and a scheduler may start it again.

  Attributes:
    step: optimiser steps done.
  """

  def __init__(self, reason: str, step: int):
    super().__init__(75)
    self.reason = reason
    self.step = step

  def __str__(self) -> str:
    return f'stopped after step {self.step}: {self.reason}'


# Steps between the times when several processes agree on what the clock says.
_AGREE_EVERY = 16


class Watch:
  """Says whether to stop; of several processes, the same to all.

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
    if self._late(step):
      return f'max_seconds={self._limit} have passed'
    # JAX catches SIGTERM and agrees on a step, where there is somebody to.
    several = jax.process_count() > 1
    if several and multihost_utils.reached_preemption_sync_point(step):
      return 'SIGTERM or a notice of preemption was received'
    return ''

  def is_told(self) -> bool:
    """Whether a signal came; by which to stop within an evaluation, too.

    Not so by `max_seconds`: if they are fewer than an evaluation takes, a run
    that goes on again and again would never have one.
    """
    return self._signal is not None

  def _late(self, step: int) -> bool:
    if self._deadline is None:
      return False
    late = time.monotonic() >= self._deadline
    if jax.process_count() == 1:
      return late
    if step % _AGREE_EVERY:
      return False
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(late)))

  @contextlib.contextmanager
  def signals(self) -> Iterator[None]:
    """Catches SIGTERM and Ctrl-C; a second one does what it did before."""
    # Only a main thread can have handlers, and of several processes none may.
    main = threading.current_thread() is threading.main_thread()
    if not main or jax.process_count() > 1:
      yield
      return
    before = {x: signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)}
    # What is started in the background by a shell's script ignores Ctrl-C.
    before = {x: h for x, h in before.items() if h is not signal.SIG_IGN}

    def restore():
      for number, handler in before.items():
        signal.signal(number, handler)

    def handle(number, _):
      self._signal = number
      restore()
      name = signal.Signals(number).name
      print(
        f'{name}: stops after this step or batch; again to stop now',
        file=sys.stderr,
      )

    for number in before:
      signal.signal(number, handle)
    try:
      yield
    finally:
      restore()
