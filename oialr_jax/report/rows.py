"""What tables say of runs, layers and events: rows of numbers by column."""

from collections.abc import Iterator, Mapping
import statistics

import numpy as np

from oialr_jax.report import plots
from oialr_jax.report import series
from oialr_jax.report import tables

Records = series.Records
Row = dict[str, tables.Value]


def run(records: Records) -> Row:
  """What a run has come to."""
  latest = {}
  for record in records:
    latest |= record
  end = series.end(records)
  row: Row = {
    'steps': latest.get('step'),
    'ended': 'yes' if end else 'no',
  }
  for name in series.metrics(records):
    row[f'last {name}'] = series.holding(records, 'eval', name)[-1][name]
  row |= _shares(latest)
  events = series.holding(records, 'event', 'ranks')
  row['mean rank'] = _mean(events[-1]['ranks']) if events else None
  if 'optimizer_bytes' in latest:
    row['optimiser state kB'] = latest['optimizer_bytes'] / 1000
  row['steps/s at the end'] = end.get('steps_per_second')
  row['seconds'] = sum(seconds(records).values()) or _elapsed(records)
  return row


def seconds(records: Records) -> dict[str, float]:
  """What the seconds of a run that has ended were spent on."""
  spent = series.end(records).get('seconds', {})
  return {label: spent[c] for c, label in plots.CLOCKS.items() if c in spent}


def layers(records: Records) -> Iterator[Row]:
  """What became of every low-rank layer."""
  steps, paths, ranks = series.grid(records, 'event', 'ranks')
  lost = series.holding(records, 'event', 'truncation')
  measured = [
    r['stability']
    for r in series.holding(records, 'stability', 'stability')
    if r['step'] <= min(steps, default=0)
  ]
  for path, row in zip(paths, ranks):
    known = row[np.isfinite(row)]
    yield {
      'layer': path,
      'first rank': int(known[0]),
      'rank': int(known[-1]),
      'rank %': 100 * known[-1] / known[0] if known[0] else None,
      'stability at the transition': measured[-1].get(path)
      if measured
      else None,
      'largest truncation %': _percent(
        max((r['truncation'].get(path, 0) for r in lost), default=None)
      ),
    }


def event(record: series.Record) -> Row:
  """What an event did; also slicing, or going back to a checkpoint."""
  done = record.get('converted') or record.get('updated')
  largest = lambda field: max(record.get(field, {}).values(), default=None)
  return {
    'step': record['step'],
    'event': record.get('event', record['kind']),
    'layers': len(done) if done else None,
    'mean rank before': _mean(record.get('ranks_before')),
    'mean rank': _mean(record.get('ranks')),
    'largest truncation %': _percent(largest('truncation')),
    'change of the loss %': _percent(record.get('change')),
    'largest drift': largest('drift'),
    'seconds': record.get('seconds'),
    **_shares(record),
    'reason': record.get('reason'),
  }


def _shares(counts: Mapping[str, float]) -> Row:
  """Of the dense model's parameters."""
  dense = counts.get('dense')
  return {
    f'{name} %': 100 * counts[name] / dense
    for name in ('trainable', 'stored')
    if dense and name in counts
  }


def _elapsed(records: Records) -> float | None:
  """Seconds up to the last losses, of a run that has not ended."""
  train = series.holding(records, 'train', 'seconds')
  return train[-1]['seconds'] if train else None


def _mean(values: Mapping[str, float] | None) -> float | None:
  return statistics.fmean(values.values()) if values else None


def _percent(value: float | None) -> float | None:
  return None if value is None else 100 * value
