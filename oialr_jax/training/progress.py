"""What is said of a run on a terminal: lines and a table, of its records."""

import collections
from collections.abc import Iterable, Mapping, Sequence
import shutil
import statistics
import sys
import textwrap

import tqdm

from oialr_jax.training import callbacks

Record = callbacks.Record

# What a line of metrics leaves out.
_ASIDE = ('examples', 'seconds')


class Progress(callbacks.Callback):
  """A live line, a line for every event and evaluation, a table at the end.

  Where standard error is no terminal, the live line is printed now and then.

  Args:
    name: of the run, at the beginning of every line.
    every: seconds between two such lines.
  """

  def __init__(self, name: str = '', every: float = 30.0):
    self._name = name
    self._every = every
    self._bar: tqdm.tqdm | None = None

  def on_start(self, start: callbacks.Start):
    self.close()
    self._start = start
    self._records: list[Record] = []
    self._latest: dict[str, Record] = {}
    for record in start.records:
      self._keep(record)
    # Steps and seconds of the last 'train' records.
    self._marks = collections.deque(maxlen=20)
    self._due = 0.0
    name = self._name.replace('{', '{{').replace('}', '}}')
    self._bar = tqdm.tqdm(
      total=start.steps,
      initial=start.first,
      # The bar comes last: it takes what is left, and nothing where that is.
      bar_format=f'{name} {{n_fmt}}/{{total_fmt}}{{desc}} |{{bar}}|'.lstrip(),
      disable=None,
      file=sys.stderr,
      dynamic_ncols=True,
      leave=False,
    )
    of = f' of {start.examples:,} examples' if start.examples else ''
    begins = 'goes on' if start.first else 'begins'
    self._say(_line(start.first, begins, [f'{start.steps:,} steps{of}']))

  def on_step(self, step: int):
    self._bar.update(step - self._bar.n)

  def on_record(self, record: Record):
    self._keep(record)
    if record['kind'] == 'train':
      self._on_train(record)
    elif record['kind'] == 'end':
      tqdm.tqdm.write(summary(self._records, self._name), file=sys.stderr)
    elif line := describe(record):
      self._say(line)

  def close(self):
    if self._bar is not None:
      self._bar.close()

  def _keep(self, record: Record):
    self._records.append(record)
    before = self._latest.pop(record['kind'], {})  # so that they are in order
    # What one of them does not say, such as a pace, is as it was.
    self._latest[record['kind']] = before | record

  def _on_train(self, record: Record):
    self._marks.append((record['step'], record['seconds']))
    line = status(self._latest, self._left())
    if not self._bar.disable:
      self._bar.set_description_str(f', {line}')
    elif record['seconds'] >= self._due:
      self._due = record['seconds'] + self._every
      done = f'{record["step"] / self._start.steps:.0%} done'
      self._say(_line(record['step'], 'training', [done, line]))

  def _left(self) -> float | None:
    """Seconds to go: at the pace of late, with what comes between steps."""
    (step, seconds), (now, until) = self._marks[0], self._marks[-1]
    if now == step:
      return None
    return (self._start.steps - now) * (until - seconds) / (now - step)

  def _say(self, line: str):
    line = f'{self._name} {line}'.lstrip()
    if not self._bar.disable:
      width = shutil.get_terminal_size().columns
      line = textwrap.fill(
        line, width, subsequent_indent=' ' * 8, break_on_hyphens=False
      )
    tqdm.tqdm.write(line, file=sys.stderr)


def status(latest: Mapping[str, Record], left: float | None = None) -> str:
  """What a live line says.

  Args:
    latest: record of every kind, in the order in which they came.
    left: seconds to go, where that is known.
  """
  train, event = latest['train'], latest.get('event')
  parts = []
  if left is not None:
    parts.append(f'{tqdm.tqdm.format_interval(left)} left')
  if 'examples_per_second' in train:
    rate = tqdm.tqdm.format_sizeof(train['examples_per_second'])
    parts.append(f'{rate} ex/s')
  parts.append(f'loss {train["loss"]:.3g}')
  if event and event['ranks']:
    counts = [r for r in latest.values() if 'trainable' in r][-1]
    share = _percent(counts['trainable'] / counts['dense'])
    parts += [f'rank {_mean(event["ranks"].values())}', f'{share} trainable']
  return ', '.join(parts)


def describe(record: Record) -> str:
  """The line that a record deserves on a terminal; '' for none."""
  about = {
    'eval': _evaluation,
    'event': _event,
    'conversion': _conversion,
    'compaction': _compaction,
    'rollback': lambda record: ('rollback', [record['reason']]),
  }
  if record['kind'] not in about:
    return ''
  name, parts = about[record['kind']](record)
  if record.get('seconds') is not None:
    parts.append(f'{record["seconds"]:.2g} s')
  return _line(record['step'], name, parts)


def summary(records: Sequence[Record], name: str = '') -> str:
  """A table of a run that is at its end."""
  end = records[-1]
  stopped = f', for {end["stopped"]}' if 'stopped' in end else ''
  rows = [('steps', f'{end["step"]:,}{stopped}'), *_results(records)]
  for what in ('trainable', 'stored'):
    share = _percent(end[what] / end['dense'])
    rows.append((what, f'{end[what]:,} of {end["dense"]:,} ({share})'))
  rows.append(('optimiser state', f'{end["optimizer_bytes"] / 1e6:,.3f} MB'))
  rows.append(('speed at the end', f'{end["steps_per_second"]:,.4g} steps/s'))
  total = sum(end['seconds'].values())
  rows.append(('time', f'{total:,.1f} s'))
  for what, seconds in end['seconds'].items():
    if seconds >= 0.05:  # what would not be shown as 0.0
      share = f'{seconds / total:.0%}'
      rows.append((f'  {what}', f'{seconds:,.1f} s {share:>5}'))
  width = max(len(what) for what, _ in rows)
  lines = [f'  {what:<{width}}  {value}' for what, value in rows]
  return '\n'.join([name, *lines] if name else lines)


def spread(values: Iterable[float]) -> str:
  """The mean, and from where to where: as short for many as for one."""
  values = list(values)
  if not values:
    return 'dense'
  low, high = min(values), max(values)
  return f'{low}' if low == high else f'{_mean(values)} ({low}-{high})'


def _mean(values: Iterable[float]) -> str:
  mean = statistics.fmean(values)
  return f'{mean:.0f}' if mean >= 100 else f'{mean:.3g}'


def _percent(share: float) -> str:
  return f'{100 * share:.3g}%'


def _line(step: int, what: str, parts: Sequence[str]) -> str:
  return f'step {step:>6}  {what}: {", ".join(parts)}'


def _results(records: Sequence[Record]) -> list[tuple[str, str]]:
  """What the run was for: the loss, the last evaluation, the ranks."""
  of = lambda kind: [r for r in records if r['kind'] == kind]
  losses = [r['loss'] for r in of('train')]
  rows = [('training loss', f'{losses[0]:.3g} -> {losses[-1]:.3g}')]
  for record in of('eval')[-1:]:
    shown = callbacks.numbers(record).items()
    rows += [
      (f'evaluation {k}', f'{v:.4f}') for k, v in shown if k not in _ASIDE
    ]
  ranks = [r['ranks'].values() for r in of('event') if r['ranks']]
  if ranks:
    rows.append(('low-rank layers', f'{len(ranks[-1])}'))
    rows.append(('rank', f'{spread(ranks[0])} -> {spread(ranks[-1])}'))
  return rows


def _evaluation(record: Record) -> tuple[str, list[str]]:
  shown = {
    k: v for k, v in callbacks.numbers(record).items() if k not in _ASIDE
  }
  return 'evaluation', [f'{k} {v:.4f}' for k, v in shown.items()]


def _event(record: Record) -> tuple[str, list[str]]:
  before, after = record['ranks_before'], record['ranks']
  parts = []
  for done in ('converted', 'updated'):
    if record[done]:
      parts.append(f'{len(record[done])} of {len(after)} layers {done}')
  if after:
    ranks = spread(before.values()), spread(after.values())
    change = f'{ranks[0]} -> {ranks[1]}'
    parts.append(f'rank {change if before != after else ranks[1]}')
  if lost := max(record['truncation'].values(), default=0):
    parts.append(f'truncation <= {_percent(lost)}')
  if record.get('change') is not None:
    parts.append(f'loss moved {_percent(record["change"])}')
  return record['event'], parts


def _conversion(record: Record) -> tuple[str, list[str]]:
  ranks, lost = record['ranks'], max(record['truncation'].values(), default=0)
  parts = [f'{len(ranks)} layers of rank {spread(ranks.values())}']
  if lost:
    parts.append(f'truncation <= {_percent(lost)}')
  return 'conversion', parts


def _compaction(record: Record) -> tuple[str, list[str]]:
  stored = f'{record["stored_before"]:,} -> {record["stored"]:,}'
  return 'compaction', [f'stored {stored} numbers']
