"""What a run says of itself: records, clocks, and the metrics of its steps."""

from collections.abc import Iterable, Sequence
import contextlib
import pathlib
import time
from typing import Any

import jax
import numpy as np

from oialr_jax.training import callbacks as callbacks_lib

Record = callbacks_lib.Record

# By whose metrics, what is in a record besides, which no metric may be called.
_OWN = {
  'loss_fn': {
    'kind',
    'step',
    'loss',
    'losses',
    'seconds',
    'examples_per_second',
    'flops',
    'optimizer_bytes',
  },
  'eval_fn': {'kind', 'step', 'examples'},
}
# Who hears of what kind, besides on_record.
_HEARS = {'event': 'on_event', 'eval': 'on_evaluation'}


class Recorder:
  """Collects records and tells the callbacks.

  Metrics are read a step late, so that nothing waits for the device. As a
  context it closes the callbacks at its end.
  """

  def __init__(self):
    self.clock = Clock()
    self.records: list[Record] = []
    self.facts: dict[str, Any] = {}  # of the step: in every 'train' record
    self.stopped: callbacks_lib.Stop | None = None  # the run, by a callback
    self._callbacks: list[callbacks_lib.Callback] = []
    self._pending: list[tuple[int, Any]] = []
    self._examples: int | None = None
    # The training clock at the last pace, and the steps taken since.
    self._mark, self._since = 0.0, 0
    self._told = 0  # the last checkpoint that the listeners know of

  def __enter__(self) -> 'Recorder':
    return self

  def __exit__(self, *_):
    with contextlib.ExitStack() as stack:
      for callback in self._callbacks:
        stack.callback(_call, callback, 'close')

  def add(self, callback: callbacks_lib.Callback):
    """Adds a listener; of several processes, on the first one.

    Raises:
      TypeError: it is not a callback.
    """
    if not isinstance(callback, callbacks_lib.Callback):
      raise TypeError(
        f'{callback!r} is not a callback: pass an instance of a subclass of '
        'training.Callback.'
      )
    if callback.everywhere or jax.process_index() == 0:
      self._callbacks.append(callback)

  def start(self, *, steps: int, first: int = 0, examples: int | None = None):
    """Tells the listeners what is about to begin; see `callbacks.Start`."""
    self._examples = examples
    self._mark, self._since = self.clock.seconds['training'], 0
    self._told = first
    self.stopped = None
    self._tell(
      'on_start',
      callbacks_lib.Start(
        steps=steps,
        first=first,
        examples=examples,
        records=tuple(self.records),
      ),
    )

  def rewind(self, records: int):
    """Forgets all but the first records; `start` has to follow."""
    del self.records[records:]
    self._pending = []

  def record(self, kind: str, step: int, **values: Any):
    """Adds a record."""
    record = {'kind': kind, 'step': step, **values}
    self.records.append(record)
    self._tell('on_record', record)
    if kind in _HEARS:
      self._tell(_HEARS[kind], record)

  @property
  def ended(self) -> bool:
    """Whether nothing has been recorded since an 'end'."""
    return bool(self.records) and self.records[-1]['kind'] == 'end'

  def at(self, kind: str, step: int) -> Record | None:
    """The last record of a kind, if it is of this step."""
    last = next((r for r in reversed(self.records) if r['kind'] == kind), None)
    return last if last and last['step'] == step else None

  def step(self, step: int, metrics: Any):
    """Takes the metrics of a step that may still be under way."""
    self._pending.append((step, metrics))
    self._since += 1
    self._tell('on_step', step)

  def checkpoints(self, folder: pathlib.Path, steps: Sequence[int]):
    """Tells of those that are complete, each once."""
    for step in sorted(step for step in steps if step > self._told):
      self._tell('on_checkpoint', step, folder / str(step))
      self._told = step

  def log(self, settled: bool = False):
    """Records the means over the steps that are done: all but the last one.

    Raises:
      FloatingPointError: a loss is not finite; says at which step.
      ValueError: a metric has the name of something else in the record.
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
    # Of doubles: NumPy would add bfloat16 up in bfloat16.
    means = {k: float(np.mean([float(m[k]) for _, m in read])) for k in names}
    check_names(names.keys() - {'loss'})
    self.record(
      'train',
      read[-1][0],
      **means,
      losses=[float(m['loss']) for _, m in read],
      seconds=self.clock.wall(),
      **self._pace(),
      **self.facts,
    )

  def _pace(self) -> dict[str, float]:
    """Of the steps taken since the last one.

    Not of those that were read: the last one's time is over by then, or it
    passes before the next pace. Of that step alone there is none.
    """
    if self._examples is None or not self._since:
      return {}
    now = self.clock.seconds['training']
    rate = self._since * self._examples / (now - self._mark)
    self._mark, self._since = now, 0
    return {'examples_per_second': rate}

  def _tell(self, method: str, *args: Any):
    for callback in self._callbacks:
      try:
        _call(callback, method, *args)
      except callbacks_lib.Stop as e:
        self.stopped = e


def check_names(metrics: Iterable[str], function: str = 'loss_fn'):
  """Raises ValueError if a metric of a function has a name of its records."""
  taken = sorted(_OWN[function].intersection(metrics))
  if taken:
    raise ValueError(
      f'the metric {taken[0]!r} of {function} has the name of something else '
      'in the records: give it another.'
    )


def _call(callback: callbacks_lib.Callback, method: str, *args: Any):
  """Whose error it is, is in the error."""
  try:
    getattr(callback, method)(*args)
  except Exception as e:
    name = type(callback).__qualname__
    e.add_note(f'raised by {name}.{method}, a callback of the run')
    raise


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

  def wall(self) -> float:
    """Of the run so far, without the time between interruptions."""
    return time.perf_counter() - self._start

  def total(self) -> dict[str, float]:
    """Also 'other': what is left of the wall clock."""
    other = self.wall() - sum(self.seconds.values())
    return {**self.seconds, 'other': other}

  def add(self, seconds: dict[str, float]):
    """Goes on from where the clock of a run that was interrupted stood."""
    for name, value in seconds.items():
      self._start -= value
      if name in self.seconds:
        self.seconds[name] += value
