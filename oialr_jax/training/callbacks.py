"""Who listens to a run.

A run is a stream of records, each a dict of plain values with a 'kind' and a
'step': 'train' (means since the last one), 'eval', 'event', 'conversion',
'stability', 'compaction', 'rollback', and one 'end'. `metrics.jsonl` is that
stream, a line each.
"""

import dataclasses
import pathlib
from typing import Any

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
  """What is known before the first step.

  Attributes:
    steps: of the whole run.
    first: steps that are done: 0, or more where a run goes on.
    examples: of a step, over all processes; None where nobody can tell.
    records: of the steps that are done.
  """

  steps: int
  first: int = 0
  examples: int | None = None
  records: tuple[Record, ...] = ()


class Stop(Exception):
  """Raised by a callback: the run ends after this step, as at its last one.

  It evaluates, slices what is pruned, saves, and `fit` returns its result.
  """


class Callback:
  """Listens to a run: override what is of interest.

      class Alarm(training.Callback):
        def on_event(self, record):
          if max(record['truncation'].values(), default=0) > 0.1:
            print('more than a tenth of a kernel is gone at', record['step'])

  Of several processes the first one alone calls it, unless its `everywhere` is
  True, as it has to be where all of them shall stop. What it raises ends the
  run, with its name in the error; `Stop` ends it as if that were its length.
  """

  everywhere: bool = False

  def on_start(self, start: Start):
    """Before the first step; again where a run goes back to an earlier one."""

  def on_step(self, step: int):
    """After every step, which may still be under way on the device."""

  def on_record(self, record: Record):
    """At every record, whatever its kind."""

  def on_event(self, record: Record):
    """At the record of a transition or an update."""

  def on_evaluation(self, record: Record):
    """At the record of an evaluation."""

  def on_checkpoint(self, step: int, folder: pathlib.Path):
    """When a checkpoint is complete, which is some time after its step."""

  def close(self):
    """At the end, also when the run failed."""


class EarlyStopping(Callback):
  """Ends a run when a metric of its evaluations stays worse than it was.

  Args:
    metric: that is to fall.
    patience: evaluations in a row that are worse than the best before them, as
      NaN always is; an equal one is not.

  Raises:
    ValueError: patience is not positive.
  """

  everywhere = True  # all processes stop at the same step

  def __init__(self, metric: str, patience: int):
    if patience < 1:
      raise ValueError(f'patience={patience}: must be at least 1.')
    self._metric = metric
    self._patience = patience

  def on_start(self, start: Start):
    self._best, self._worse = float('inf'), 0
    for record in start.records:
      if record['kind'] == 'eval':
        self.on_evaluation(record)

  def on_evaluation(self, record: Record):
    value = record[self._metric]
    if value <= self._best:
      self._best, self._worse = value, 0
    else:
      self._worse += 1
    if self._worse >= self._patience:
      raise Stop(
        f'{self._metric} did not improve in {self._patience} evaluations'
      )


def numbers(record: Record) -> dict[str, float]:
  """The numbers of a record by name, those in its dicts as 'name/key'."""
  flat = {}
  for name, value in record.items():
    inner = value if isinstance(value, dict) else {}
    flat |= {f'{name}/{k}': v for k, v in inner.items()} or {name: value}
  return {k: v for k, v in flat.items() if k != 'step' and _is_number(v)}


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)
