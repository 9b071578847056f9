"""What a training step sends between devices, and what each of them holds.

  python -m experiments.bench_mesh

Compiles the step of --model for --devices virtual CPU devices, by shapes alone,
and reads from the programs how many bytes are reduced and gathered: with data
parallelism and with parameters split over `fsdp`, dense and with low-rank
kernels of such ranks that --shares of the parameters train. Nothing is run.
Prints the result, and writes it to --workdir as result.json.

Any CPU, a few minutes. Expected: what is reduced is what trains, and a number.
"""

from collections.abc import Sequence
import dataclasses
import json
import math
import os
import pathlib
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import optax

from experiments import hlo
from experiments import problems
from experiments import tables
import oialr_jax as oialr
from oialr_jax import models
from oialr_jax import sharding
from oialr_jax import training

_MODEL = flags.DEFINE_enum(
  'model', 'mini_vit', models.NAMES, 'A model by its name in the registry.'
)
_DEVICES = flags.DEFINE_integer(
  'devices', 8, 'How many virtual CPU devices.', lower_bound=2
)
_BATCH = flags.DEFINE_integer(
  'batch', 64, 'Examples a step, on all devices together.', lower_bound=2
)
_SHARES = flags.DEFINE_multi_float(
  'shares',
  [0.16, 0.05],
  'Share of the parameters that train, at most 1',
  lower_bound=1e-6,
  upper_bound=1.0,
)
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/bench_mesh', 'Folder for result.json.'
)


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled training step.

  Attributes:
    program: the compiled program.
    params: shapes and shardings of the parameters.
    opt_state: likewise, of the optimiser's state.
  """

  program: Any
  params: Any
  opt_state: Any

  def bytes_of(self, kind: str) -> int:
    """Of the results of all collectives of a kind."""
    return hlo.sent(self.program, kind)

  @property
  def state(self) -> tuple[int, int]:
    """Bytes of parameters and optimiser: in all, and on one device."""
    leaves = jax.tree.leaves((self.params, self.opt_state))
    size = lambda x, shape: math.prod(shape) * x.dtype.itemsize
    return sum(size(x, x.shape) for x in leaves), sum(
      size(x, x.sharding.shard_shape(x.shape)) for x in leaves
    )


class Problem:
  """The training step of a model by shapes: nothing of it has a value."""

  def __init__(self, name: str, batch: int, **changes: Any):
    model = models.create(name, **changes)
    self._batch = models.inputs(name, batch)
    key = jax.random.key(0)
    variables = dict(jax.eval_shape(model.init, key, *self._batch))
    self._dense = variables.pop('params')
    self._model_state = variables
    self._loss = problems.mean_square(model)
    found = oialr.find_layers(
      self._loss, self._dense, variables, self._batch, key
    )
    self._layers = oialr.select(found, keep_last=True)
    self._tx = oialr.train_sigma(optax.adamw(1e-3))

  def params(self, share: float | None) -> Any:
    """Shapes of parameters of which at most this share trains; None: dense."""
    if share is None:
      return self._dense
    dense = oialr.count(self._dense).trainable
    for rank in range(100, 0, -1):
      low = self._low_rank(rank / 100)
      if oialr.count(low).trainable <= share * dense:
        return low
    raise ValueError(f'share={share}: less than what is trained at any rank.')

  def _low_rank(self, share: float) -> Any:
    ranks = {
      x.path: min(x.max_rank, 8 * math.ceil(share * x.max_rank / 8))
      for x in self._layers
    }
    convert = lambda p: oialr.to_lowrank(p, self._layers, rank=ranks)
    return jax.eval_shape(convert, self._dense)

  def step(self, placement: sharding.Placement, share: float | None) -> Step:
    """The step, compiled for a mesh."""
    params = self.params(share)
    opt_state = jax.eval_shape(self._tx.init, params)
    parts = params, opt_state, self._model_state
    placed = placement.shardings(*parts)
    parts = _placed(parts, placed)
    examples = jax.sharding.NamedSharding(placement.mesh, sharding.BATCH)
    batch = _placed(self._batch, (examples,) * len(self._batch))
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=placement.replicated)
    step = training.train_step(
      self._loss, self._tx, shards=placement.replicas, gather=placement.gather
    )
    where = training.TrainState(placement.replicated, *placed)
    program = jax.jit(
      step, donate_argnums=0, out_shardings=(where, placement.replicated)
    )
    state = training.TrainState(count, *parts)
    lowered = program.lower(state, batch, jax.random.key(0))
    return Step(lowered.compile(), *parts[:2])


def main(argv: Sequence[str]):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  # Read when JAX looks for devices, which is later.
  os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} '
    f'--xla_force_host_platform_device_count={_DEVICES.value}'
  )
  os.environ['JAX_PLATFORMS'] = 'cpu'
  problem = Problem(_MODEL.value, _BATCH.value)
  rows = []
  for name, sizes in (('data', {}), ('fsdp', {'data': 1, 'fsdp': -1})):
    sizes = {k: _DEVICES.value if v == -1 else v for k, v in sizes.items()}
    placement = sharding.Placement(sharding.make_mesh(**sizes))
    for share in (None, *_SHARES.value):
      step = problem.step(placement, share)
      whole, each = step.state
      counts = oialr.count(step.params)
      rows.append(
        {
          'mesh': f'{name} = {_DEVICES.value}',
          'trainable %': 100 * counts.trainable / counts.dense,
          'trainable MB': 4e-6 * counts.trainable,
          'all-reduced MB': 1e-6 * step.bytes_of('all-reduce'),
          'all-gathered MB': 1e-6 * step.bytes_of('all-gather'),
          'state MB': 1e-6 * whole,
          'state MB a device': 1e-6 * each,
        }
      )
  lines = [[*rows[0]]]
  lines += [
    [f'{x:.2f}' if isinstance(x, float) else x for x in row.values()]
    for row in rows
  ]
  print(tables.aligned(lines))
  workdir = pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'result.json').write_text(json.dumps(rows, indent=2))


def _placed(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


if __name__ == '__main__':
  app.run(main)
