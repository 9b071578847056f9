"""Who listens to a run: writers and the progress bar.

A run is a stream of records, each a dict of plain values with a 'kind' and a
'step': 'train' (means since the last one), 'eval', 'event', 'stability',
'compaction', and one 'end'. `metrics.jsonl` is that stream, a line each.
"""

import json
import pathlib
import sys
from typing import Any

import tqdm

Record = dict[str, Any]


class Callback:
  """Override what is of interest; every method may be left out."""

  def on_start(self, steps: int):
    """Before the first step of a run of so many."""

  def on_record(self, record: Record):
    """At every record, whatever its kind."""

  def on_step(self, step: int):
    """After every step, which may still be under way on the device."""

  def close(self):
    """At the end, also when the run failed."""


class Jsonl(Callback):
  """Writes the records to a file, a JSON object a line.

  Of what the file holds already, the first `keep` lines stay.
  """

  def __init__(self, path: str | pathlib.Path, keep: int = 0):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = path.read_text().splitlines(True)[:keep] if keep else []
    self._file = open(path, 'w', buffering=1)
    self._file.writelines(kept)

  def on_record(self, record: Record):
    self._file.write(json.dumps(record) + '\n')

  def close(self):
    self._file.close()


class TensorBoard(Callback):
  """Writes every number of the records as a TensorBoard scalar.

  What the folder holds of a run that was interrupted after step `start` is
  shown up to there.
  """

  def __init__(self, folder: str | pathlib.Path, start: int = 0):
    # Not clu.metric_writers: those import TensorFlow.
    import tensorboardX

    self._writer = tensorboardX.SummaryWriter(
      str(folder), purge_step=start + 1 if start else None
    )

  def on_record(self, record: Record):
    for name, value in _numbers(record):
      self._writer.add_scalar(f'{record["kind"]}/{name}', value, record['step'])

  def close(self):
    self._writer.close()


class Progress(Callback):
  """A progress bar, and a line for every event and evaluation.

  Where standard error is no terminal there are only the lines.
  """

  def __init__(self, name: str = ''):
    self._name = name
    self._bar = None

  def on_start(self, steps: int):
    self._bar = tqdm.tqdm(
      total=steps,
      desc=self._name,
      unit='step',
      disable=None,
      file=sys.stderr,
      dynamic_ncols=True,
    )

  def on_step(self, step: int):
    self._bar.update(step - self._bar.n)  # it may start in the middle

  def on_record(self, record: Record):
    if record['kind'] == 'train':
      self._bar.set_postfix(loss=f'{record["loss"]:.3f}')
    line = describe(record)
    if line:
      tqdm.tqdm.write(f'{self._name:>10} {line}', file=sys.stderr)

  def close(self):
    if self._bar is not None:
      self._bar.close()


def describe(record: Record) -> str:
  """The line that a record deserves on a terminal; '' for none."""
  kind, head = record['kind'], f'step {record["step"]:>6}  '
  if kind == 'eval':
    shown = (f'{k} {v:.4f}' for k, v in _numbers(record))
    return f'{head}{"evaluation":<11} ' + ', '.join(shown)
  if kind == 'event':
    ranks = ', '.join(
      f'{path} {record["ranks_before"].get(path, "dense")}->{rank}'
      for path, rank in record['ranks'].items()
      if record['ranks_before'].get(path) != rank
    )
    return f'{head}{record["event"]:<11} {ranks or "ranks unchanged"}'
  if kind == 'compaction':
    return (
      f'{head}{"compaction":<11} stored {record["stored_before"]:,} -> '
      f'{record["stored"]:,} numbers'
    )
  return ''


def _numbers(record: Record):
  for name, value in record.items():
    if name in ('kind', 'step'):
      continue
    if isinstance(value, dict):
      yield from ((f'{name}/{k}', v) for k, v in value.items() if _is_number(v))
    elif _is_number(value):
      yield name, value


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)
