"""What a run says of itself: records, clocks, and the metrics of its steps."""

import contextlib
import time
from typing import Any

import jax
import numpy as np

from oialr_jax.training import callbacks as callbacks_lib

Record = callbacks_lib.Record


class Recorder:
  """Collects records and tells the callbacks.

  Metrics are read a step late, so that nothing waits for the device. As a
  context it closes the callbacks at its end.
  """

  def __init__(self):
    self.clock = Clock()
    self.records: list[Record] = []
    self._callbacks: list[callbacks_lib.Callback] = []
    self._pending: list[tuple[int, Any]] = []

  def __enter__(self) -> 'Recorder':
    return self

  def __exit__(self, *_):
    with contextlib.ExitStack() as stack:
      for callback in self._callbacks:
        stack.callback(callback.close)

  def add(self, callback: callbacks_lib.Callback):
    """Adds a listener."""
    self._callbacks.append(callback)

  def start(self, steps: int):
    """Tells the listeners the length of the run."""
    for callback in self._callbacks:
      callback.on_start(steps)

  def record(self, kind: str, step: int, **values: Any):
    """Adds a record."""
    record = {'kind': kind, 'step': step, **values}
    self.records.append(record)
    for callback in self._callbacks:
      callback.on_record(record)

  def step(self, step: int, metrics: Any):
    """Takes the metrics of a step that may still be under way."""
    self._pending.append((step, metrics))
    for callback in self._callbacks:
      callback.on_step(step)

  def log(self, settled: bool = False):
    """Records the means over the steps that are done: all but the last one.

    Raises:
      FloatingPointError: a loss is not finite; says at which step.
    """
    done = self._pending if settled else self._pending[:-1]
    self._pending = self._pending[len(done) :]
    with self.clock('training'):
      read = jax.device_get(done)
    if not read:
      return
    for at, metrics in read:
      if not np.isfinite(metrics['loss']):
        raise FloatingPointError(
          f'the loss is {metrics["loss"]} at step {at}: training diverged. '
          'Lower the learning rate or clip the gradients.'
        )
    names = read[0][1]
    means = {k: float(np.mean([m[k] for _, m in read])) for k in names}
    losses = [float(m['loss']) for _, m in read]
    self.record('train', read[-1][0], **means, losses=losses)


class Clock:
  """Seconds by what they were spent on."""

  def __init__(self):
    self._start = time.perf_counter()
    self.seconds = {
      'training': 0.0,
      'compiling': 0.0,
      'events': 0.0,
      'evaluating': 0.0,
      'tracking': 0.0,
      'saving': 0.0,
    }

  @contextlib.contextmanager
  def __call__(self, name: str):
    start = time.perf_counter()
    try:
      yield
    finally:
      self.seconds[name] += time.perf_counter() - start

  def total(self) -> dict[str, float]:
    """Also 'other': what is left of the wall clock."""
    wall = time.perf_counter() - self._start
    return {**self.seconds, 'other': wall - sum(self.seconds.values())}

  def add(self, seconds: dict[str, float]):
    """Goes on from where the clock of a run that was interrupted stood."""
    for name, value in seconds.items():
      self._start -= value
      if name in self.seconds:
        self.seconds[name] += value
