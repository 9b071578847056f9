"""Tables over time in CSV files: read, with the line of whatever is wrong."""

import array
import collections
from collections.abc import Sequence
import contextlib
import csv
import dataclasses
import datetime
import math
import pathlib
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Table:
  """Variables over time.

  Attributes:
    path: of the file.
    columns: names of the variables.
    dates: `[rows]`, datetime64[s].
    values: `[rows, variables]`, float64, finite.
    lines: of the file, from which the rows are.
  """

  path: pathlib.Path
  columns: tuple[str, ...]
  dates: np.ndarray
  values: np.ndarray
  lines: Sequence[int]

  def where(self, row: int) -> str:
    """File, line and date of a row."""
    return f'{self.path}, line {self.lines[row]}: {self.dates[row].item()}'


def read(path: pathlib.Path, columns: Sequence[str] | None = None) -> Table:
  """Reads a file with a header, a column 'date' and columns of numbers.

  Args:
    path: of the file.
    columns: the variables, in this order; by default all but 'date'.

  Raises:
    ValueError: a column is missing, or a line is not what it should be; says
      which.
  """
  try:
    with path.open(newline='', encoding='utf-8-sig') as file:
      return _parse(path, csv.reader(file), columns)
  except (UnicodeDecodeError, csv.Error) as e:
    raise ValueError(f'{path} is no CSV file: {e}.') from e


def step(table: Table, *, allow_gaps: bool = False) -> int:
  """Seconds from row to row: from most rows to the next, if there are gaps.

  Args:
    table: of two rows at least.
    allow_gaps: whether other steps are accepted; backwards there is none.

  Raises:
    ValueError: there is a gap, or a row not after the one before; says which.
  """
  steps = np.diff(table.dates).astype(int)
  backwards = np.flatnonzero(steps <= 0)
  if backwards.size:
    i = backwards[0] + 1
    raise ValueError(
      f'{table.where(i)} is not after {table.dates[i - 1].item()} of the row '
      'before: sort the rows, and leave out what is there twice.'
    )
  ((usual, _),) = collections.Counter(steps.tolist()).most_common(1)
  gaps = np.flatnonzero(steps != usual)
  if gaps.size and not allow_gaps:
    i = gaps[0] + 1
    raise ValueError(
      f'{table.where(i)} comes {duration(steps[i - 1])} after the row before, '
      f'others {duration(usual)}: fill the gap, or pass allow_gaps=True to take '
      'rows as equally spaced.'
    )
  return usual


def duration(seconds: int) -> str:
  """As hours, minutes and seconds, '0:15:00'."""
  return str(datetime.timedelta(seconds=int(seconds)))


def _parse(
  path: pathlib.Path, reader: Any, columns: Sequence[str] | None
) -> Table:
  header = next(reader, [])
  columns = _check_header(path, header, columns)
  at, pick = header.index('date'), [header.index(c) for c in columns]
  # Row by row: the text of a wide table takes ten times the memory of numbers.
  dates, numbers, lines = [], array.array('d'), []
  for row in filter(None, reader):  # blank lines are empty rows
    where = f'{path}, line {reader.line_num}'
    if len(row) != len(header):
      raise ValueError(
        f'{where}: has {len(row)} cells, the header {len(header)}.'
      )
    dates.append(_date(row[at], where))
    numbers.extend(_number(row[i], where, header[i]) for i in pick)
    lines.append(reader.line_num)
  if len(dates) < 2:
    raise ValueError(f'{path}: {len(dates)} rows are no series.')
  values = np.array(numbers).reshape(len(dates), -1)
  return Table(path, columns, np.array(dates, 'M8[s]'), values, lines)


def _check_header(
  path: pathlib.Path, header: Sequence[str], columns: Sequence[str] | None
) -> tuple[str, ...]:
  if columns is None:
    columns = [c for c in header if c != 'date']
  for column in ('date', *columns):
    if column not in header:
      raise ValueError(
        f'{path}: there is no column {column!r} in its first line, only '
        f'{", ".join(map(repr, header)) or "nothing"}.'
      )
  if not columns:
    raise ValueError(f"{path}: there is no variable beside 'date'.")
  return tuple(columns)


def _date(cell: str, where: str) -> datetime.datetime:
  for parse in (datetime.datetime.fromisoformat, _with_slashes):
    with contextlib.suppress(ValueError):
      # Time zones are dropped: features are of the hour on the spot.
      return parse(cell).replace(tzinfo=None)
  raise ValueError(
    f"{where}, column 'date': {cell!r} is no date like 2016-07-01 00:15:00."
  )


def _with_slashes(cell: str) -> datetime.datetime:
  return datetime.datetime.strptime(cell, '%Y/%m/%d %H:%M')


def _number(cell: str, where: str, column: str) -> float:
  try:
    number = float(cell)
  except ValueError:
    number = math.nan
  if math.isfinite(number):
    return number
  raise ValueError(
    f'{where}, column {column!r}: {cell!r} is no finite number; mend the file, '
    'or choose other columns.'
  )
