"""ImageNet-2012: ViT-B/16, ResNet-RS-101 or ResNet-50, dense and by OIALR.

  python -m experiments.imagenet --data_dir=FOLDER_OF_TFDS \\
    --config=experiments/configs/imagenet.py:resnetrs101 --checkpoint_every=1000
  python -m experiments.imagenet --explain

Streams a prepared `imagenet2012` folder of TFDS through timm's augmentation.
--explain prints of the model at full size what the method can do to it. See
experiments/configs/imagenet.py.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import classification
from experiments import cli
from experiments import recipe
from experiments import settings
from experiments import tables
import oialr_jax as oialr
from oialr_jax import data

TRAINING_EXAMPLES = 1_281_167
CLASSES = 1000
# Shares of min(m, n) that --explain shows.
_SHARES = (1.0, 0.5, 0.3, 0.1)


def main(config: settings.Config, options: cli.Options):
  train, test = (
    data.source('imagenet2012', split, data_dir=options.data_dir)
    for split in ('train', 'validation')
  )
  size, workers = config.image_size, config.workers
  augmentation = _augmentation(config)

  def batches(seed: int) -> data.Batches:
    distorted = data.stream(
      train,
      config.batch_size,
      config=augmentation,
      size=size,
      seed=seed,
      workers=workers,
    )
    return classification.augmented(
      distorted, data.finish, augmentation, CLASSES, seed=seed
    )

  task = classification.Task(
    model=recipe.model(config),
    image=(size, size, 3),
    train=batches,
    test=data.eval_stream(
      test, config.eval_batch_size, size=size, workers=workers
    ),
    augmentation=augmentation,
  )
  recipe.compare(task, config, options, examples=len(train))


def check(config: settings.Config):
  _augmentation(config)
  size = config.image_size
  recipe.check(config, examples=TRAINING_EXAMPLES, image=(size, size, 3))


def explain(config: settings.Config) -> str:
  """What the method can do to the model: its layers, numbers, and work."""
  model, size = recipe.model(config), config.image_size
  image = jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.float32)
  state = dict(jax.eval_shape(model.init, jax.random.key(0), image))
  params = state.pop('params')

  def forward(params, state, image):
    return model.apply(
      {'params': params, **state}, image, train=False, mutable=list(state)
    )

  rules = settings.build(oialr.Schedule, config, 'oialr', steps=_length(config))
  layers = oialr.select(
    oialr.find_layers(forward, params, state, image),
    keep_first=rules.keep_first,
    keep_last=rules.keep_last,
  )
  work = 1e-12 * oialr.explain(layers, params).totals['multiply_adds']
  return (
    f'{oialr.explain(forward, params, state, image)}\n\n'
    f'A training step of {config.batch_size} images of {size} x {size}: '
    f'{work:.3g} T multiply-adds in the {len(layers)} kernels that OIALR is '
    'for. Memory is that of float32 parameters and of AdamW, without '
    f'activations.\n{_by_rank(layers, params)}'
  )


def _by_rank(layers: Sequence[oialr.Layer], params: Any) -> str:
  lines = [
    ['rank / min(m, n)', 'trainable %', 'stored %', 'multiply-adds %']
    + ['parameters GB', 'optimiser state GB'],
    ['dense', '100', '100', '100', *_memory(params)],
  ]
  for share in _SHARES:
    ranks = {x.path: max(1, round(share * x.max_rank)) for x in layers}
    totals = oialr.explain(layers, params, ranks=ranks).totals
    low = functools.partial(oialr.to_lowrank, layers=layers, rank=ranks)
    percent = lambda n, of, totals=totals: f'{100 * totals[n] / totals[of]:.3g}'
    lines.append(
      [
        str(share),
        percent('trainable', 'parameters'),
        percent('stored', 'parameters'),
        percent('multiply_adds_low_rank', 'multiply_adds'),
        *_memory(jax.eval_shape(low, params)),
      ]
    )
  return tables.aligned(lines)


def _length(config: settings.Config) -> int:
  return recipe.length(config, TRAINING_EXAMPLES)


def _memory(params: Any) -> list[str]:
  tx = oialr.train_sigma(optax.adamw(1e-3))
  state = jax.eval_shape(tx.init, params)
  size = lambda tree: sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
  return [f'{1e-9 * size(tree):.3g}' for tree in (params, state)]


def _augmentation(config: settings.Config) -> data.Augmentation:
  return recipe.augmentation(data.Augmentation.imagenet, config)


BINARY = cli.Binary(
  name='imagenet',
  main=main,
  check=check,
  data='Folder of prepared TFDS sets, holding imagenet2012/VERSION/; by default '
  '$OIALR_DATA_DIR, else ~/tensorflow_datasets.',
  checkpoint_every=5000,
  explain=explain,
)

if __name__ == '__main__':
  cli.run(BINARY)
