"""What binaries that classify print and write: tables, reports, numbers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import runs
from experiments import tables
from oialr_jax import export
from oialr_jax import report
from oialr_jax import training

# The steps after the transition in which the policies are compared.
WINDOW = 20


def summary(result: training.Result, tested_on: str = 'test') -> dict[str, Any]:
  """The numbers of a run that the table shows."""
  final = result.select('eval')[-1]
  accuracy = {f'{tested_on} accuracy %': 100 * final['accuracy']}
  return accuracy | runs.summary(result)


def losses(result: training.Result) -> np.ndarray:
  """The training loss of every step."""
  return np.concatenate([r['losses'] for r in result.select('train')])


def after_transition(result: training.Result, delay: int) -> float:
  """The mean training loss of the steps after the transition."""
  return float(losses(result)[delay : delay + WINDOW].mean())


def table(rows: Iterable[Mapping[str, Any]]) -> str:
  """One column a method: the mean over its runs, +- the deviation."""
  by_method, names = {}, {}
  for row in rows:
    by_method.setdefault(row['method'], []).append(row)
    names |= {k: None for k, x in row.items() if isinstance(x, float)}
  lines = [['', *by_method]]
  lines.append(['runs', *(str(len(group)) for group in by_method.values())])
  for name in names:
    cells = [[row.get(name) for row in group] for group in by_method.values()]
    lines.append([name, *map(_cell, cells)])
  return tables.aligned(lines)


def write_report(
  workdir: pathlib.Path,
  results: Mapping[str, training.Result],
  forward: Callable[..., jax.Array],
  inputs: Sequence[Any],
  dtype: Any,
):
  """Writes report.html; pictures and OIALR's model as files to `report`.

  Of several processes the first one does, all of whose arrays are whole.

  Args:
    workdir: of the binary.
    results: by method.
    forward: the model, `forward(variables, *inputs)`, see `export.write`.
    inputs: examples.
    dtype: that the model computes in.
  """
  if jax.process_index() > 0:
    return
  folder = workdir / 'report'
  records = {method: result.records for method, result in results.items()}
  paths = report.plots.write(folder, records)
  print(f'\nReport: {report.write(workdir)}')
  if 'oialr' not in results:
    return
  state = results['oialr'].state
  variables = jax.device_get({'params': state.params, **state.model_state})
  # The factors are multiplied in another order, which rounds otherwise.
  tolerance = max(1e-5, 8 * float(jnp.finfo(dtype).eps))
  sizes = export.write(folder, forward, variables, inputs, tolerance=tolerance)
  files = [p.name for p in paths]
  files += [f'{name} ({1e-6 * n:.3g} MB)' for name, n in sizes.items()]
  print(f'{", ".join(files)} in {folder}')


def _cell(values: list[float | None]) -> str:
  values = [v for v in values if v is not None]
  if not values:
    return '-'
  mean = statistics.fmean(values)
  # Four significant digits, of the mean and of the deviation likewise.
  digits = max(0, 3 - math.floor(math.log10(abs(mean)))) if mean else 0
  return tables.spread(values, digits)
