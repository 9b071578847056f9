"""Rows of the studies that compare OIALR with dense, and what they have alike."""

from collections.abc import Iterable, Sequence
import statistics
from typing import Any

from experiments import rows as rows_lib
from experiments import runs
from experiments import tables
from oialr_jax import training

Row = rows_lib.Row


def row(result: training.Result) -> Row:
  """The numbers of a run on `image_sets.Task`, by which rows are compared."""
  final = result.select('eval')[-1]
  sizes = runs.summary(result)
  return {
    'validation %': 100 * final['val_accuracy'],
    'test %': 100 * final['test_accuracy'],
    'trainable %': sizes['trainable %'],
    'stored %': sizes['stored %'],
    **runs.machine(),
  }


def grouped(
  rows: Iterable[Row], keys: Sequence[str]
) -> dict[tuple[Any, ...], list[Row]]:
  """Rows that differ in nothing but their seeds, by their keys."""
  found = {}
  for each in rows:
    found.setdefault(tuple(each[key] for key in keys), []).append(each)
  return found


def moments(rows: Sequence[Row], key: str) -> tuple[float, float]:
  """Mean and deviation of a number; of one row, the deviation is 0."""
  values = [each[key] for each in rows]
  deviation = statistics.stdev(values) if len(values) > 1 else 0.0
  return statistics.fmean(values), deviation


def cell(rows: Sequence[Row], key: str, digits: int) -> str:
  """Mean +- deviation of a number, for a table."""
  return tables.spread([each[key] for each in rows], digits)
