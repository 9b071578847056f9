"""What the image-classification binaries share: the task, runs, the table."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import pathlib
import statistics
from typing import Any

from absl import flags
from absl import logging
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import tables
import oialr_jax as oialr
from oialr_jax import data
from oialr_jax import report
from oialr_jax import training

# The steps after the transition in which the policies are compared.
WINDOW = 20


@dataclasses.dataclass(frozen=True)
class Task:
  """A Flax model and its data, as `training.fit` takes them."""

  model: nn.Module
  train: data.Split
  test: data.Split
  batch_size: int
  label_smoothing: float = 0.0

  def init(self, seed: int) -> tuple[Any, Any]:
    """Parameters and batch statistics."""
    image = self.train.take(np.arange(1))['image']
    variables = self.model.init(jax.random.key(seed), image)
    return variables['params'], dict(
      batch_stats=variables.get('batch_stats', {})
    )

  def loss(self, params, model_state, batch, key):
    logits, model_state = self.model.apply(
      {'params': params, **model_state},
      batch['image'],
      train=True,
      mutable=list(model_state),
      rngs={'dropout': key},
    )
    labels = optax.smooth_labels(
      jax.nn.one_hot(batch['label'], logits.shape[-1]), self.label_smoothing
    )
    loss = optax.softmax_cross_entropy(logits, labels).mean()
    return loss, (dict(model_state), {})

  def evaluate(self, params, model_state, batch):
    logits = self.model.apply({'params': params, **model_state}, batch['image'])
    hit = jnp.argmax(logits, -1) == batch['label']
    loss = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']
    )
    return {'accuracy': hit.astype(jnp.float32), 'loss': loss}


def optimizer(config: Any) -> optax.GradientTransformation:
  """AdamW with clipping, on a linear warm-up and a cosine to zero."""
  rate = optax.warmup_cosine_decay_schedule(
    init_value=config.learning_rate / 10,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup,
    decay_steps=config.steps,
  )
  return optax.chain(
    optax.clip_by_global_norm(config.clip),
    optax.adamw(rate, weight_decay=config.weight_decay),
  )


def quiet_libraries():
  """Warnings only, unless --verbosity says otherwise: Orbax logs every file."""
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)


def run(
  task: Task,
  config: Any,
  name: str,
  seed: int,
  workdir: pathlib.Path,
  *,
  quiet: bool = False,
  **options: Any,
) -> training.Result:
  """One run: the dense one, or OIALR by the policy that is its name."""
  schedule = None
  if name != 'dense':
    schedule = oialr.Schedule(
      steps=config.steps, policy=name, **config.oialr.to_dict()
    )
  params, model_state = task.init(seed)
  return training.fit(
    task.loss,
    params,
    data.batches(task.train, task.batch_size, seed=seed),
    optimizer=optimizer(config),
    steps=config.steps,
    schedule=schedule,
    model_state=model_state,
    eval_fn=task.evaluate,
    eval_data=data.eval_batches(task.test, config.eval_batch_size),
    seed=seed,
    compaction=training.Compaction(**config.compaction.to_dict()),
    workdir=workdir / f'{label(name)}-{seed}',
    callbacks=() if quiet else (training.Progress(label(name)),),
    **options,
  )


def label(name: str) -> str:
  """What a run is called: transport is what OIALR is here."""
  return {'transport': 'oialr'}.get(name, name)


def summary(result: training.Result) -> dict[str, Any]:
  """The numbers of a run that the table shows."""
  (end,) = result.select('end')
  final = result.select('eval')[-1]
  seconds = end['seconds']
  return {
    'test accuracy %': 100 * final['accuracy'],
    'trainable %': 100 * end['trainable'] / end['dense'],
    'stored %': 100 * end['stored'] / end['dense'],
    'optimiser state kB': end['optimizer_bytes'] / 1000,
    'steps/s at the end': end['steps_per_second'],
    'training s': seconds['training'],
    'compiling s': seconds['compiling'],
    'SVDs s': seconds['events'],
    'total s (no tracking)': sum(seconds.values()) - seconds['tracking'],
  }


def delay(config: Any) -> int:
  """The step of the transition."""
  rules = config.oialr.to_dict()
  return oialr.Schedule(steps=config.steps, **rules).delay_steps


def losses(result: training.Result) -> np.ndarray:
  """The training loss of every step."""
  return np.concatenate([r['losses'] for r in result.select('train')])


def after_transition(result: training.Result, delay: int) -> float:
  """The mean training loss of the steps after the transition."""
  return float(losses(result)[delay : delay + WINDOW].mean())


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
  """One column a method: the mean over its runs, +- the deviation."""
  names = list(next(iter(rows.values()))[0])
  lines = [['', *rows]]
  for name in names:
    cells = [[run.get(name) for run in runs] for runs in rows.values()]
    lines.append([name, *map(_cell, cells)])
  return tables.aligned(lines)


def write_report(workdir: pathlib.Path, results: Mapping[str, training.Result]):
  """Writes the pictures and the compressed model to `workdir/report`."""
  runs = {label(name): result.records for name, result in results.items()}
  paths = report.plots.write(workdir / 'report', runs)
  final = results['transport'].params
  numbers = save_compressed(workdir / 'report' / 'compressed.npz', final)
  dense = oialr.count(final).dense
  print(
    f'\nReport: {", ".join(p.name for p in paths)} and compressed.npz '
    f'({100 * numbers / dense:.1f} % of the dense numbers) in '
    f'{workdir / "report"}'
  )


def save(workdir: pathlib.Path, config: Any, result: Mapping[str, Any]):
  """Writes config.json and result.json."""
  (workdir / 'config.json').write_text(config.to_json_best_effort(indent=2))
  (workdir / 'result.json').write_text(json.dumps(result, indent=2))


def save_compressed(path: pathlib.Path, params: Any) -> int:
  """Writes the two-factor model as a .npz of arrays by path; its numbers."""
  factors = oialr.to_factors(params)
  arrays = {
    jax.tree_util.keystr(key, simple=True, separator='/'): np.asarray(x)
    for key, x in jax.tree_util.tree_leaves_with_path(factors)
  }
  np.savez(path, **arrays)
  return sum(x.size for x in arrays.values())


def _cell(values: list[float | None]) -> str:
  values = [v for v in values if v is not None]
  if not values:
    return '-'
  mean = statistics.fmean(values)
  # Four significant digits, of the mean and of the deviation likewise.
  digits = max(0, 3 - math.floor(math.log10(abs(mean)))) if mean else 0
  if len(values) == 1:
    return f'{mean:.{digits}f}'
  return f'{mean:.{digits}f} +- {statistics.stdev(values):.{digits}f}'
