"""Reads what runs left on disk, however little of it there is or is intact.

A workdir holds runs: `metrics.jsonl` in it or in folders below it (see
`training.callbacks` for what the records are), beside `config.json` and
`result.json`. Nothing here raises because of what a file holds; what cannot be
read is named in `missing`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

from oialr_jax.report import series

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
  """A run, as far as it can be read.

  Attributes:
    name: of its folder.
    records: in the order of their steps; a field that is there has its type.
    missing: what is not there or cannot be read, a sentence each.
    seeded: it is one of a binary's, and its name ends in its seed.
  """

  name: str
  records: tuple[Record, ...]
  missing: tuple[str, ...]
  seeded: bool = False

  def select(self, kind: str) -> list[Record]:
    """The records of one kind."""
    return [r for r in self.records if r['kind'] == kind]


@dataclasses.dataclass(frozen=True)
class Workdir:
  """What a binary left.

  Attributes:
    folder: where.
    runs: by their names.
    settings: of config.json, as text; 'oialr.cutoff' for what is nested, as flags have it.
    results: of result.json, rows of texts and numbers; of a method with
      several runs, the numbers of all of them.
    missing: as of `Run`.
  """

  folder: pathlib.Path
  runs: tuple[Run, ...]
  settings: Mapping[str, str]
  results: tuple[Mapping[str, Any], ...]
  missing: tuple[str, ...]


def read(workdir: str | pathlib.Path) -> Workdir:
  """Reads a workdir.

  Args:
    workdir: a folder that a run or a binary wrote to.

  Raises:
    FileNotFoundError: there is no such folder, or nothing of ours in it.
    OSError: the folder cannot be listed.
  """
  folder = pathlib.Path(workdir)
  if not folder.is_dir():
    kind = 'a file' if folder.exists() else 'no such folder'
    raise FileNotFoundError(
      f'{str(folder)!r}: {kind}; pass the workdir of a run.'
    )
  found = [p for p in (folder, *sorted(folder.iterdir())) if _is_run(p)]
  config, result = folder / 'config.json', folder / 'result.json'
  if not found and not config.exists() and not result.exists():
    raise FileNotFoundError(
      f'{str(folder)!r}: neither metrics.jsonl, here or one folder below, nor '
      'config.json or result.json; pass the workdir of a run.'
    )
  missing: list[str] = []
  if not found:
    missing.append('metrics.jsonl: not there, nor one folder below.')
  # Binaries write them; `fit` alone does not.
  load = lambda path, take: (
    {} if folder in found and not path.exists() else _json(path, take, missing)
  )
  return Workdir(
    folder=folder,
    settings=load(config, lambda values: dict(_flat(values))),
    results=tuple(load(result, _table)),
    runs=tuple(_run(path, seeded=config.exists()) for path in found),
    missing=tuple(missing),
  )


def named(
  workdirs: Sequence[Workdir],
) -> tuple[dict[str, Workdir], dict[str, Run]]:
  """Workdirs, and their runs, by names that tell them apart.

  Those are the last parts of their paths, or all of them where these are the
  same; runs have their workdir's before their own where there are several, if
  they are not all that it is.
  """
  names = [w.folder.resolve().name for w in workdirs]
  if len(set(names)) < len(names):
    names = [str(w.folder) for w in workdirs]
  by_name = dict(zip(names, workdirs))
  runs = {}
  for name, workdir in by_name.items():
    alone = [run.name for run in workdir.runs] == [
      workdir.folder.resolve().name
    ]
    for run in workdir.runs:
      if len(by_name) == 1:
        runs[run.name] = run
      else:
        runs[name if alone else f'{name}/{run.name}'] = run
  return by_name, runs


def number(value: Any) -> int | float | None:
  """The value, if it is a number that a float32 or a counter may have been."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return None
  # Compared before it is converted: an int may be too large for a float.
  if not -3.5e38 < value < 3.5e38:
    return None
  return value if abs(value) < 2**53 else float(value)


def _is_run(folder: pathlib.Path) -> bool:
  return any(
    (folder / name).exists()
    for name in ('metrics.jsonl', 'checkpoints', 'tensorboard')
  )


def _run(folder: pathlib.Path, seeded: bool) -> Run:
  missing: list[str] = []
  text = _text(folder / 'metrics.jsonl', missing)
  records = []
  if text is not None:
    records, missing = _records(text)
    missing += _lacking(records)
  return Run(folder.resolve().name, tuple(records), tuple(missing), seeded)


def _records(text: str) -> tuple[list[Record], list[str]]:
  """The records of the lines that are intact, and what the others are."""
  records, damaged = [], []
  for i, line in enumerate(text.split('\n'), 1):
    if not line.strip():
      continue
    record, wrong = _record(line)
    if record:
      records.append(record)
    damaged += [f'{i} ({what})' for what in wrong]
  missing = []
  if damaged:
    shown = ', '.join(damaged[:5]) + (', ...' if len(damaged) > 5 else '')
    missing.append(f'metrics.jsonl: damaged in line {shown}.')
  return sorted(records, key=lambda r: r['step']), missing


def _record(line: str) -> tuple[Record | None, list[str]]:
  """What of a line is a record, and what is wrong with it."""
  try:
    values = json.loads(line)
  except (ValueError, RecursionError):
    return None, ['no JSON, perhaps cut off']
  if not isinstance(values, dict) or not isinstance(values.get('kind'), str):
    return None, ['no record']
  step = number(values.get('step'))
  # Up to there, float64 tells steps apart.
  if not isinstance(step, int) or not 0 <= step < 2**53:
    return None, ["no 'step'"]
  record: Record = {'kind': values['kind'], 'step': step}
  wrong = []
  for name, value in values.items():
    typed = _TYPES.get((record['kind'], name), number)
    fine = typed(value)
    if fine is not None:
      record.setdefault(name, fine)
    elif typed is not number and value is not None:
      wrong.append(f'{name!r} is not what it should be')
  return record, wrong


def _lacking(records: list[Record]) -> Iterator[str]:
  """What a run that has ended would have."""
  if not records:
    yield 'metrics.jsonl: no record in it.'
    return
  if not series.of(records, 'train'):
    yield 'No losses.'
  if not series.end(records):
    yield (
      f"No 'end': the run goes on, or ended early; the last record is of step "
      f'{records[-1]["step"]:,}. Its seconds and the bytes of its optimiser '
      'state are not known.'
    )


# What fields hold. A checker returns None for what is not that.


def _text_only(value: Any) -> str | None:
  return value if isinstance(value, str) else None


def _list(value: Any) -> list[float] | None:
  numbers = [*map(number, value)] if isinstance(value, list) else [None]
  return None if None in numbers else numbers


def _names(value: Any) -> list[str] | None:
  if isinstance(value, list) and all(isinstance(x, str) for x in value):
    return value
  return None


def _by_name(typed: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """Of a dict of what `typed` takes; what it does not take is left out."""

  def check(value):
    if not isinstance(value, dict):
      return None
    fine = ((k, typed(v)) for k, v in value.items())
    return {k: v for k, v in fine if v is not None}

  return check


_TYPES: dict[tuple[str, str], Callable[[Any], Any]] = {
  ('train', 'losses'): _list,
  ('stability', 'stability'): _by_name(number),
  ('stability', 'r_distance'): _by_name(number),
  ('event', 'event'): _text_only,
  ('event', 'converted'): _names,
  ('event', 'updated'): _names,
  ('event', 'pruned'): _names,
  ('event', 'ranks_before'): _by_name(number),
  ('event', 'ranks'): _by_name(number),
  ('event', 'spectra'): _by_name(_list),
  ('event', 'truncation'): _by_name(number),
  ('event', 'drift'): _by_name(number),
  ('event', 'stability'): _by_name(number),
  ('conversion', 'ranks'): _by_name(number),
  ('conversion', 'truncation'): _by_name(number),
  ('end', 'seconds'): _by_name(number),
  ('rollback', 'reason'): _text_only,
}


# Files.


def _text(path: pathlib.Path, missing: list[str]) -> str | None:
  try:
    text = path.read_text(encoding='utf-8', errors='replace')
  except OSError as e:
    missing.append(f'{path.name}: {e.strerror or "cannot be read"}.')
    return None
  if not text.strip():
    missing.append(f'{path.name}: empty.')
    return None
  return text


def _json(
  path: pathlib.Path, take: Callable[[Any], Any], missing: list[str]
) -> Any:
  """What `take` makes of an object in a file; nothing, where it cannot."""
  text = _text(path, missing)
  if text is None:
    return {}
  try:
    return take(json.loads(text))
  except (ValueError, RecursionError) as e:
    missing.append(f'{path.name}: {e}.')
    return {}


def _flat(values: Any, path: str = '') -> Iterator[tuple[str, str]]:
  if not isinstance(values, dict):
    raise ValueError('not an object')
  for name, value in values.items():
    if isinstance(value, dict) and value:
      yield from _flat(value, f'{path}{name}.')
    elif isinstance(value, str):
      yield f'{path}{name}', value
    else:
      yield f'{path}{name}', json.dumps(value)


def _table(values: Any) -> list[dict[str, Any]]:
  """A row a method, with the numbers of its runs; or the rows that there are."""
  values = values if isinstance(values, dict) else {}
  if _are_rows(values.get('rows')):
    typed = lambda x: x if isinstance(x, str) else number(x)
    return [_by_name(typed)(row) for row in values['rows']]
  if not values or not all(map(_are_rows, values.values())):
    raise ValueError('neither rows nor rows by method')
  table = []
  for method, rows in values.items():
    rows = [_by_name(number)(row) for row in rows]
    columns = dict.fromkeys(name for row in rows for name in row)
    numbers = {c: [row[c] for row in rows if c in row] for c in columns}
    table.append({'method': method, **numbers})
  return table


def _are_rows(values: Any) -> bool:
  return isinstance(values, list) and all(isinstance(x, dict) for x in values)
