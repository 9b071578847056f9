"""What the trainer costs beside its step: `fit` against a bare loop.

  python -m experiments.bench_loop

The bare loop calls the same jitted step on the same batches and waits for it at
the end. `fit` logs, writes metrics.jsonl and TensorBoard events, and shows its
progress. Both are done in turn; the ratio is that of a round. Once it trains
dense, once with low-rank kernels. Prints the result, and writes it to --workdir
as result.json.

Any CPU or accelerator, two minutes. Expected: fit at most 1.03 times as long.
"""

from collections.abc import Sequence
import itertools
import json
import os
import pathlib
import statistics
import time
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import tables
import oialr_jax as oialr
from oialr_jax import models
from oialr_jax import training

_STEPS = flags.DEFINE_integer(
  'steps', 150, 'Steps that are timed, of each kind and round.', lower_bound=1
)
_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Rounds.', lower_bound=1)
_BATCH = flags.DEFINE_integer('batch', 128, 'Examples a step.', lower_bound=1)
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/bench_loop', 'Folder for result.json and the runs.'
)

_WARM = 10  # steps before the clock starts


class _Stopwatch(training.Callback):
  """Seconds from a step on until all of them are done."""

  def on_step(self, step: int):
    if step == _WARM:
      self.start = time.perf_counter()

  def on_record(self, record: training.Record):
    if record['kind'] == 'end':
      self.seconds = time.perf_counter() - self.start


def main(argv: Sequence[str]):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  result = {'device': jax.devices()[0].device_kind, 'cores': os.cpu_count()}
  lines = [['', 'bare ms a step', 'fit ms a step', 'fit / bare']]
  for name, rank in (('dense', None), ('low rank', 0.2)):
    bare, whole = _Loops(rank).rounds()
    ratio = statistics.median(w / b for w, b in zip(whole, bare, strict=True))
    result[name] = {'bare': bare, 'fit': whole, 'ratio': ratio}
    per_step = (
      f'{1000 * statistics.median(x) / _STEPS.value:.2f}' for x in (bare, whole)
    )
    lines.append([name, *per_step, f'{ratio:.3f}'])
  print(tables.aligned(lines))
  workdir = pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'result.json').write_text(json.dumps(result, indent=2))


class _Loops:
  """Both loops on the network of the MNIST binary, from the same parameters."""

  def __init__(self, rank: float | None):
    rng = np.random.default_rng(0)
    self._batch = {
      'image': rng.normal(size=(_BATCH.value, 28, 28, 1)).astype(np.float32),
      'label': rng.integers(10, size=_BATCH.value),
    }
    self._model = models.create('mnist_cnn')
    params = self._model.init(jax.random.key(0), self._batch['image'])['params']
    if rank is not None:
      layers = oialr.select(
        oialr.find_layers(
          self._loss, params, {}, self._batch, jax.random.key(0)
        )
      )
      params = oialr.to_lowrank(params, layers, rank=rank)
    self._params = params
    self._tx = optax.adamw(1e-3)
    tx = oialr.train_sigma(self._tx)
    self._init = tx.init
    self._step = jax.jit(training.train_step(self._loss, tx), donate_argnums=0)

  def rounds(self) -> tuple[list[float], list[float]]:
    """Seconds of the bare loop, and of fit, by round; the first is left out."""
    pairs = [(self._bare(), self._fit()) for _ in range(_ROUNDS.value + 1)]
    bare, whole = zip(*pairs[1:])
    return [*bare], [*whole]

  def _loss(self, params: Any, state: Any, batch: Any, key: jax.Array):
    logits = self._model.apply(
      {'params': params}, batch['image'], train=True, rngs={'dropout': key}
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']
    )
    return losses.mean(), (state, {})

  def _bare(self) -> float:
    params = jax.tree.map(jnp.array, self._params)
    state = training.TrainState(
      jnp.zeros((), jnp.int32), params, self._init(params), {}
    )
    key = jax.random.key(0)
    for i in range(_WARM + _STEPS.value):
      if i == _WARM:
        start = time.perf_counter()
      state, _ = self._step(state, self._batch, key)
    jax.block_until_ready(state)
    return time.perf_counter() - start

  def _fit(self) -> float:
    watch = _Stopwatch()
    training.fit(
      self._loss,
      self._params,
      itertools.repeat(self._batch),
      optimizer=self._tx,
      steps=_WARM + _STEPS.value,
      workdir=pathlib.Path(_WORKDIR.value) / 'run',
      callbacks=[training.Progress(), watch],
    )
    return watch.seconds


if __name__ == '__main__':
  app.run(main)
