"""Step time, flops and memory: dense, low-rank, and low-rank multiplied out.

  python -m experiments.bench_step --model=mini_vit --batch=64

All programs are timed in one process, in turn, a step of each per round, and
the table shows medians over the rounds: of the time of a step, and of its ratio
to the dense step of the same round. Works on a CPU and on an accelerator; with
--model=vit_base_patch16_224 --batch=256 --dtype=bfloat16 it wants about 40 GiB.

`factors` computes with the factors in the order that the cost model finds the
cheapest; `multiplied out` rebuilds every kernel, as the published code does.
"""

from collections.abc import Iterator, Sequence
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
import jax.numpy as jnp
from matplotlib import figure as mpl
import optax

from experiments import problems
from experiments import ranges
from experiments import tables
import oialr_jax as oialr
from oialr_jax import models
from oialr_jax import training

_MODEL = flags.DEFINE_enum(
  'model', 'mini_vit', models.NAMES, 'The model, by its name in the registry.'
)
_BATCH = flags.DEFINE_integer('batch', 64, 'Examples a step.', lower_bound=1)
_IMAGE = flags.DEFINE_integer(
  'image',
  None,
  'Pixels of an image, in height and width; by default as published.',
  lower_bound=1,
)
_RANKS = flags.DEFINE_list(
  'ranks', ['1.0', '0.5', '0.3', '0.1'], 'Ranks, as shares of min(m, n).'
)
_MULTIPLE_OF = flags.DEFINE_integer(
  'multiple_of',
  8,
  'Ranks are rounded up to a multiple of this, as the trainer does.',
  lower_bound=1,
)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'To compute in.'
)
_ROUNDS = flags.DEFINE_integer(
  'rounds', 7, 'How often every program is timed.', lower_bound=1
)
_STEPS = flags.DEFINE_integer(
  'steps', 1, 'Steps that are timed together, for fast ones.', lower_bound=1
)
WAYS = {'factors': 'auto', 'multiplied out': 'materialise'}
_WAYS = flags.DEFINE_multi_enum(
  'way',
  list(WAYS),
  list(WAYS),
  'What to compare with the dense step; may be repeated. Every program compiles '
  'for minutes where an accelerator tries out its convolutions.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/bench_step', 'Folder for result.json and step_time.png.'
)

ranges.check('ranks', float, 1e-6, 1.0)


@dataclasses.dataclass
class Case:
  """A compiled training step with the state that it works on."""

  name: str
  rank: float | None
  compiled: Any
  state: training.TrainState
  numbers: dict[str, float]
  seconds: list[float] = dataclasses.field(default_factory=list)

  def run(self, batch: tuple, key: jax.Array, steps: int) -> float:
    """Seconds a step, and of no other than these steps."""
    start = time.perf_counter()
    for _ in range(steps):
      self.state, metrics = self.compiled(self.state, batch, key)
    jax.block_until_ready((self.state, metrics))
    return (time.perf_counter() - start) / steps


def cases(
  model: Any,
  batch: tuple,
  ranks: list[float],
  multiple: int,
  key: jax.Array,
  ways: Sequence[str] = tuple(WAYS),
) -> Iterator[Case]:
  """The dense step, then at every rank all ways, compiled."""
  variables = model.init(key, *batch)
  params = variables.pop('params')
  loss = problems.mean_square(model)
  layers = oialr.select(
    oialr.find_layers(loss, params, variables, batch, key), min_rank=2
  )
  yield _case('dense', None, 'auto', loss, params, variables, batch, key)
  for rank in ranks:
    rounded = {
      layer.path: min(
        layer.max_rank, math.ceil(rank * layer.max_rank / multiple) * multiple
      )
      for layer in layers
    }
    low = oialr.to_lowrank(params, layers, rank=rounded)
    for name in ways:
      yield _case(name, rank, WAYS[name], loss, low, variables, batch, key)


def _case(name, rank, way, loss, params, model_state, batch, key) -> Case:
  tx = oialr.train_sigma(optax.adamw(1e-4))
  step = training.train_step(loss, tx, way)
  # Every case has arrays of its own: a step donates what it is given.
  state = jax.tree.map(
    jnp.array,
    training.TrainState(
      jnp.zeros((), jnp.int32), params, tx.init(params), model_state
    ),
  )
  start = time.perf_counter()
  lowered = jax.jit(step, donate_argnums=0).lower(state, batch, key)
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  counts = oialr.count(params)
  memory = compiled.memory_analysis()
  numbers = {
    'trainable %': 100 * counts.trainable / counts.dense,
    'Gflop': 1e-9 * compiled.cost_analysis()['flops'],
    'state MB': 1e-6 * sum(x.nbytes for x in jax.tree.leaves(state)),
    'temporary MB': 1e-6 * memory.temp_size_in_bytes if memory else math.nan,
    'saved MB': 1e-6
    * saved_bytes(
      oialr.factored(loss, contraction=way), params, model_state, batch, key
    ),
    'compile s': seconds,
  }
  return Case(name, rank, compiled, state, numbers)


def saved_bytes(loss, params, model_state, batch, key) -> int:
  """Bytes of activations that the backward pass is handed.

  What depends on the parameters alone does not count: it is there anyway.
  """

  def residuals(params, batch):
    of = lambda t: loss(
      oialr.with_trainable(params, t), model_state, batch, key
    )
    _, vjp, _ = jax.vjp(of, oialr.trainable(params), has_aux=True)
    return jax.tree.leaves(vjp)

  jaxpr = jax.make_jaxpr(residuals)(params, batch).jaxpr
  parameters = len(jax.tree.leaves(params))
  active = set(jaxpr.invars[parameters:])
  for eqn in jaxpr.eqns:
    # A literal is no variable: it has no hash.
    if any(v in active for v in eqn.invars if not hasattr(v, 'val')):
      active.update(eqn.outvars)
  saved = {v for v in jaxpr.outvars if not hasattr(v, 'val')} & active
  return sum(v.aval.size * v.aval.dtype.itemsize for v in saved)


def table(timed: list[Case]) -> list[dict[str, Any]]:
  """A row a case: medians over the rounds, and what was counted."""
  dense = timed[0]
  return [
    {
      'program': case.name,
      'r / min(m, n)': case.rank,
      'step ms': 1e3 * statistics.median(case.seconds),
      'vs dense': statistics.median(
        a / b for a, b in zip(case.seconds, dense.seconds, strict=True)
      ),
      'Gflop vs dense': case.numbers['Gflop'] / dense.numbers['Gflop'],
      **case.numbers,
    }
    for case in timed
  ]


def show(rows: list[dict[str, Any]]) -> str:
  """The rows as a table."""
  cell = lambda v: '' if v is None else v if isinstance(v, str) else f'{v:.4g}'
  lines = [[*rows[0]], *([cell(v) for v in row.values()] for row in rows)]
  return tables.aligned(lines)


def plot(rows: list[dict[str, Any]], title: str) -> mpl.Figure:
  """Step time relative to dense over the rank, measured and by flops."""
  figure = mpl.Figure(figsize=(7, 4.4), layout='constrained')
  axes = figure.subplots()
  for i, name in enumerate(WAYS):
    of = [row for row in rows if row['program'] == name]
    if not of:
      continue
    ranks = [row['r / min(m, n)'] for row in of]
    axes.plot(ranks, [r['vs dense'] for r in of], f'C{i}o-', label=name)
    axes.plot(
      ranks,
      [r['Gflop vs dense'] for r in of],
      f'C{i}:',
      label=f'{name}, flops',
    )
  axes.axhline(1, color='grey', linestyle='--', linewidth=1, label='dense')
  axes.set_xlabel('rank / min(m, n)')
  axes.set_ylabel('training step, relative to dense')
  axes.set_ylim(bottom=0)
  axes.set_title(title)
  axes.grid(alpha=0.3)
  axes.legend(fontsize=9)
  return figure


def resized(shape: tuple[int, ...], side: int | None) -> tuple[int, ...]:
  """A shape of inputs, where these are images, of another size."""
  if side is None or len(shape) != 4:
    return shape
  batch, _, _, channels = shape
  return batch, side, side, channels


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  ranks = [float(r) for r in _RANKS.value]
  key = jax.random.key(0)
  batch = tuple(
    jax.random.normal(key, resized(x.shape, _IMAGE.value), x.dtype)
    for x in models.inputs(_MODEL.value, _BATCH.value)
  )
  model = models.create(_MODEL.value, dtype=jnp.dtype(_DTYPE.value))
  timed = list(cases(model, batch, ranks, _MULTIPLE_OF.value, key, _WAYS.value))
  for case in timed:
    case.run(batch, key, 1)  # the first step of a program warms it up
  for round_ in range(_ROUNDS.value):
    # From both ends in turn, so that no case always follows the same one.
    for case in timed[:: 1 if round_ % 2 else -1]:
      case.seconds.append(case.run(batch, key, _STEPS.value))
  rows = table(timed)
  device = jax.devices()[0].device_kind
  title = f'{_MODEL.value}, batch {_BATCH.value}, {_DTYPE.value}, {device}'
  print(title, show(rows), sep='\n')
  workdir = pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  result = {
    'flags': {
      f.name: f.value
      for f in (
        _MODEL,
        _BATCH,
        _IMAGE,
        _RANKS,
        _MULTIPLE_OF,
        _DTYPE,
        _ROUNDS,
        _STEPS,
        _WAYS,
      )
    },
    'device': device,
    'jax': jax.__version__,
    'rows': rows,
    'seconds': [case.seconds for case in timed],
  }
  (workdir / 'result.json').write_text(json.dumps(result, indent=2))
  plot(rows, title).savefig(workdir / 'step_time.png', dpi=120)
  print(f'\nresult.json and step_time.png are in {workdir}')


if __name__ == '__main__':
  app.run(main)
