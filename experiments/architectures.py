"""OIALR and dense on an MLP-Mixer, a ConvNeXt, a ResNet and a language model.

  python -m experiments.architectures
  python -m experiments.architectures --data_dir=FOLDER_OF_TFDS \\
    --config=experiments/configs/architectures.py:cifar10

Trains every network by every method with every seed, and prints a table.
result.json has a row a run, and is written after every run; with --resume,
those that are in it are left out. See experiments/configs/architectures.py.
"""

from collections.abc import Iterable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments import classification
from experiments import cli
from experiments import image_sets
from experiments import language
from experiments import measured
from experiments import recipe
from experiments import rows as rows_lib
from experiments import runs
from experiments import settings
from experiments import tables

Config = settings.Config
Row = rows_lib.Row

LANGUAGE = 'gpt'

_KEYS = ('network', 'method')
_GRID = ('networks', 'methods', 'seeds')


def main(config: Config, options: cli.Options):
  rows = rows_lib.Rows(
    options.workdir,
    config,
    keys=(*_KEYS, 'seed'),
    free=_GRID,
    resume=options.resume,
  )
  grid = [
    (network, method, seed)
    for network in config.networks
    for seed in config.seeds
    for method in config.methods
  ]
  try:
    rows.fill(grid, functools.partial(_run, config, options))
  finally:
    if rows:
      print(table(rows))


def check(config: Config):
  image_sets.check(config)
  settings.check_names(config.networks, config.models, 'config.networks')
  classification.cosine(config)
  runs.check(config, config.steps, config.methods)
  for network in config.networks:
    shape, dtype = image_sets.shape(config), jnp.float32
    if network == LANGUAGE:
      shape, dtype = (config.context,), jnp.int32
    inputs = jax.ShapeDtypeStruct((1, *shape), dtype)
    model = _model(config, network)
    runs.check_model(model, f'config.models.{network}', inputs)


def table(rows: Iterable[Row]) -> str:
  """A line for every network and method: mean and deviation over the seeds."""
  names = ('validation', 'test', 'trainable %', 'stored %')
  lines = [[*_KEYS, 'seeds', 'metric', *names]]
  for key, group in measured.grouped(rows, _KEYS).items():
    metric, digits = group[0]['metric'], group[0]['digits']
    cells = [
      measured.cell(group, name, digits if name in names[:2] else 1)
      for name in names
    ]
    lines.append([*key, str(len(group)), metric, *cells])
  return tables.aligned(lines)


def _run(
  config: Config, options: cli.Options, network: str, method: str, seed: int
) -> Row:
  result = classification.run(
    _task(config, options, network),
    config,
    dataclasses.replace(options, workdir=options.workdir / network),
    method,
    seed,
    steps=config.steps,
    rate=classification.cosine(config),
  )
  final = result.select('eval')[-1]
  if network == LANGUAGE:
    found = dict(metric='bits a character', digits=3)
    found |= {'validation': final['val_bits'], 'test': final['test_bits']}
  else:
    found = dict(metric='accuracy %', digits=2)
    found['validation'] = 100 * final['val_accuracy']
    found['test'] = 100 * final['test_accuracy']
  sizes = runs.summary(result)
  found |= {key: sizes[key] for key in ('trainable %', 'stored %')}
  identity = dict(network=network, method=method, seed=seed)
  return identity | found | runs.machine()


def _task(config: Config, options: cli.Options, network: str) -> Any:
  model = _model(config, network)
  if network == LANGUAGE:
    return language.Task(
      model=model,
      texts=language.text(config.characters),
      context=config.context,
      batch_size=config.batch_size,
      eval_batch_size=config.eval_batch_size,
    )
  images = image_sets.load(config, options)
  return image_sets.Task.of_images(model, images, config)


def _model(config: Config, network: str) -> Any:
  section, where = config.models[network], f'config.models.{network}'
  if network == LANGUAGE:
    return language.network(section, config.context, where)
  return recipe.network(section, where)


BINARY = cli.Binary(
  name='architectures', main=main, check=check, data=image_sets.FLAG
)

if __name__ == '__main__':
  cli.run(BINARY)
