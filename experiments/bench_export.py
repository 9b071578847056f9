"""Size and CPU latency of exported models: dense, and in two factors.

  python -m experiments.bench_export --model=mini_vit

Writes a model to --workdir as it is and with all kernels at every rank, reads
the files as any program would, and times them in one process, in turn, a call of
each per round. The table shows medians over the rounds: of the time of a call,
and of its ratio to the dense call of the same round. The weights are random:
neither size nor time depends on them.
"""

from collections.abc import Iterator
import dataclasses
import json
import math
import pathlib
import statistics
import time
from typing import Any

from absl import app
from absl import flags
import jax
from safetensors import numpy as safetensors

from experiments import ranges
from experiments import tables
import oialr_jax as oialr
from oialr_jax import export
from oialr_jax import models
from oialr_jax import transforms

_MODEL = flags.DEFINE_enum(
  'model', 'mini_vit', models.NAMES, 'The model, by its name in the registry.'
)
_BATCHES = flags.DEFINE_list(
  'batches', ['1', '16'], 'Numbers of examples a call.'
)
_RANKS = flags.DEFINE_list(
  'ranks', ['0.5', '0.3', '0.1'], 'Ranks, as shares of min(m, n).'
)
_MULTIPLE_OF = flags.DEFINE_integer(
  'multiple_of',
  8,
  'Ranks are rounded up to a multiple of this, as the trainer does.',
  lower_bound=1,
)
_ROUNDS = flags.DEFINE_integer(
  'rounds', 15, 'How often every program is timed.', lower_bound=1
)
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/bench_export', 'Folder for the files and result.json.'
)

ranges.check('ranks', float, 1e-6, 1.0)
ranges.check('batches', int, 1, float('inf'))


@dataclasses.dataclass
class Case:
  """An exported model as its user has it, and what was measured.

  Attributes:
    rank: relative to min(m, n); None of the dense model.
    sizes: of its files in bytes: arrays, program.
    arrays: that were read.
    program: jitted, of arrays and inputs.
    seconds: of calls, by the size of the batch.
  """

  rank: float | None
  sizes: tuple[int, int]
  arrays: dict[str, jax.Array]
  program: Any
  seconds: dict[int, list[float]]

  def run(self, inputs: tuple) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    jax.block_until_ready(self.program(self.arrays, *inputs))
    return time.perf_counter() - start


def cases(
  name: str,
  ranks: list[float],
  multiple: int,
  inputs: tuple,
  folder: pathlib.Path,
) -> Iterator[Case]:
  """The dense model, then that of every rank, written and read."""
  model = models.create(name)
  params = model.init(jax.random.key(0), *inputs)
  yield _case(None, model.apply, params, inputs, folder)
  layers = oialr.find_layers(model.apply, params, *inputs)
  layers = oialr.select(layers, min_rank=2)
  full = oialr.to_lowrank(params, layers)
  for rank in ranks:
    low = oialr.to_factors(_sliced(full, rank, multiple))
    yield _case(rank, model.apply, low, inputs, folder)


def _sliced(params: Any, rank: float, multiple: int) -> Any:
  """Kernels at a share of their rank, up to a multiple of a number."""

  def of(x):
    if not oialr.is_low_rank(x):
      return x
    return transforms.sliced(x, math.ceil(rank * x.rank / multiple) * multiple)

  return jax.tree.map(of, params, is_leaf=oialr.is_low_rank)


def _case(rank, fn, params, inputs, folder) -> Case:
  path = folder / ('dense' if rank is None else f'rank_{rank:g}')
  arrays, program = (
    path.with_name(path.name + suffix)
    for suffix in ('.safetensors', '.stablehlo')
  )
  return Case(
    rank,
    (
      export.safetensors(arrays, params),
      export.stablehlo(program, fn, params, inputs),
    ),
    jax.device_put(safetensors.load_file(arrays)),
    jax.jit(jax.export.deserialize(program.read_bytes()).call),
    {},
  )


def measure(timed: list[Case], inputs: dict[int, tuple], rounds: int):
  """Times every program with every batch, in turn."""
  for case in timed:
    case.seconds = {batch: [] for batch in inputs}
    for x in inputs.values():
      case.run(x)  # compiles
  for round_ in range(rounds):
    for batch, x in inputs.items():
      # From both ends in turn, so that no case always follows the same one.
      for case in timed[:: 1 if round_ % 2 else -1]:
        case.seconds[batch].append(case.run(x))


def table(timed: list[Case]) -> list[dict[str, Any]]:
  """One row a case: sizes, and medians over the rounds."""
  dense = timed[0]
  rows = []
  for case in timed:
    row = {
      'model': 'dense' if case.rank is None else 'two factors',
      'r / min(m, n)': case.rank,
      'arrays MB': 1e-6 * case.sizes[0],
      'vs dense': case.sizes[0] / dense.sizes[0],
      'program kB': 1e-3 * case.sizes[1],
    }
    for batch, seconds in case.seconds.items():
      ratios = (a / b for a, b in zip(seconds, dense.seconds[batch]))
      row[f'batch {batch}, ms'] = 1e3 * statistics.median(seconds)
      row[f'batch {batch}, vs dense'] = statistics.median(ratios)
    rows.append(row)
  return rows


def show(rows: list[dict[str, Any]]) -> str:
  """The rows as a table."""
  cell = lambda v: '' if v is None else v if isinstance(v, str) else f'{v:.4g}'
  lines = [[*rows[0]], *([cell(v) for v in row.values()] for row in rows)]
  return tables.aligned(lines)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  workdir = pathlib.Path(_WORKDIR.value)
  cpu = jax.local_devices(backend='cpu')[0]
  with jax.default_device(cpu):
    inputs = {
      batch: tuple(
        jax.random.normal(jax.random.key(batch), x.shape, x.dtype)
        for x in models.inputs(_MODEL.value, batch)
      )
      for batch in map(int, _BATCHES.value)
    }
    ranks = [float(r) for r in _RANKS.value]
    timed = [
      *cases(
        _MODEL.value,
        ranks,
        _MULTIPLE_OF.value,
        next(iter(inputs.values())),
        workdir,
      )
    ]
    measure(timed, inputs, _ROUNDS.value)
  rows = table(timed)
  print(f'{_MODEL.value}, {cpu.device_kind}', show(rows), sep='\n')
  result = {
    'flags': {
      f.name: f.value for f in (_MODEL, _BATCHES, _RANKS, _MULTIPLE_OF, _ROUNDS)
    },
    'device': cpu.device_kind,
    'jax': jax.__version__,
    'rows': rows,
    'seconds': [case.seconds for case in timed],
  }
  (workdir / 'result.json').write_text(json.dumps(result, indent=2))
  print(f'\nThe models and result.json are in {workdir}')


if __name__ == '__main__':
  app.run(main)
