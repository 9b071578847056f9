"""What records hold, as arrays to draw and numbers to tabulate.

Records are those of `training.callbacks`, of one run, in the order of their
steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]
Records = Sequence[Record]

_POINTS = 200  # of a curve


def of(records: Records, kind: str) -> list[Record]:
  """Those of a kind."""
  return [r for r in records if r['kind'] == kind]


def holding(records: Records, kind: str, field: str) -> list[Record]:
  """Those of a kind with something in a field."""
  return [r for r in of(records, kind) if r.get(field) not in (None, [], {})]


def end(records: Records) -> Record:
  """What a run said at its end; nothing, where it has gone on since."""
  last = records[-1] if records else {}
  return last if last.get('kind') == 'end' else {}


def transition(records: Records) -> int | None:
  """The step at which the run went low-rank: the first layers of it did."""
  converting = holding(records, 'event', 'converted')
  return next((r['step'] for r in converting), None)


def metrics(records: Records) -> list[str]:
  """Names of what evaluations measured."""
  aside = {'kind', 'step', 'examples', 'seconds'}
  names = dict.fromkeys(k for r in of(records, 'eval') for k in r)
  return [name for name in names if name not in aside]


def losses(records: Records) -> tuple[list[float], list[float]]:
  """Steps and training losses, means of as many as make a curve."""
  train = holding(records, 'train', 'losses')
  if not train:
    return [], []
  ends = [(r['step'], len(r['losses'])) for r in train]
  steps = np.concatenate([np.arange(e - n + 1, e + 1) for e, n in ends])
  values = np.concatenate([r['losses'] for r in train])
  mean = lambda x: [p.mean() for p in np.array_split(x, min(len(x), _POINTS))]
  return mean(steps), mean(values)


def grid(
  records: Records, kind: str, field: str
) -> tuple[np.ndarray, list[str], np.ndarray]:
  """Steps, paths, and the numbers `[paths, steps]` of a field by path."""
  measured = {r['step']: r[field] for r in holding(records, kind, field)}
  paths = list(dict.fromkeys(p for m in measured.values() for p in m))
  rows = [[m.get(p, np.nan) for m in measured.values()] for p in paths]
  return np.array([*measured]), paths, np.array(rows, float)


def intervals(steps: np.ndarray) -> np.ndarray:
  """Edges of those that end at these steps, the first as long as the second."""
  gap = steps[1] - steps[0] if len(steps) > 1 else steps[0]
  return np.concatenate([[steps[0] - max(1, gap)], steps])


def carried(
  records: Records, field: str
) -> tuple[list[int], list[float]] | None:
  """Steps and values of what changes now and then, up to the last record."""
  points = {r['step']: r[field] for r in records if field in r}
  dense = next((r['dense'] for r in records if 'dense' in r), None)
  if dense is not None and field in ('trainable', 'stored'):
    points = {0: dense, **points}  # until the transition all is both
  if len(points) < 2:
    return None
  points.setdefault(records[-1]['step'], [*points.values()][-1])
  return [*points], [*points.values()]


def spectra(records: Records) -> tuple[dict[str, Any], dict[str, Any]]:
  """Steps and singular values by path: the first ones, and the last kept."""
  first, last = {}, {}
  for event in holding(records, 'event', 'spectra'):
    for path, values in event['spectra'].items():
      kept = event.get('ranks', {}).get(path, len(values))
      if values and kept >= 1:
        first.setdefault(path, (event['step'], values))
        last[path] = event['step'], values[: int(kept)]
  return first, last
