"""What the image pipeline costs: augmentation beside a step, decoding a core.

  python -m experiments.bench_data --data_dir=FOLDER_OF_TFDS

Trains --model on CIFAR-10 as published, a step on a constant batch and a step
on the pipeline's in turn, in one program, and compares medians. Nothing of the
pipeline overlaps with the step here: training is faster. Then decodes generated
JPEGs of ImageNet's usual size, with all of its augmentation that workers do, in
turn with plain decoding and resizing by Pillow, on one core; and in --workers
processes. Prints the result, and writes it to --workdir as result.json.

Two CPU cores, some minutes. Expected: the pipeline's steps at most 1.05 times as
long.
"""

from collections.abc import Callable, Sequence
import functools
import io
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
import PIL.Image

import oialr_jax as oialr
from oialr_jax import data
from oialr_jax import models
from oialr_jax import training
from oialr_jax.data import streaming

_DATA_DIR = flags.DEFINE_string(
  'data_dir',
  None,
  'Folder of prepared TFDS sets, holding cifar10/VERSION/; by default '
  '$OIALR_DATA_DIR, else ~/tensorflow_datasets.',
)
_MODEL = flags.DEFINE_enum(
  'model',
  'mini_vit',
  models.NAMES,
  'A model of ten classes, by its name in the registry.',
)
_SPLIT = flags.DEFINE_enum(
  'split', 'train', ['train', 'test'], 'Of CIFAR-10: the images to train on.'
)
_BATCH = flags.DEFINE_integer('batch', 64, 'Examples a step.', lower_bound=2)
_ROUNDS = flags.DEFINE_integer(
  'rounds', 9, 'How often every kind of step is timed.', lower_bound=1
)
_IMAGES = flags.DEFINE_integer(
  'images', 200, 'JPEGs that are decoded.', lower_bound=1
)
_WORKERS = flags.DEFINE_integer(
  'workers',
  2,
  'Processes that decode in the last part; 0 leaves it out.',
  lower_bound=0,
)
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/bench_data', 'Folder for result.json.'
)

# As usual in ImageNet: 500 x 375 pixels in about 110 kB.
_HEIGHT, _WIDTH, _QUALITY = 375, 500, 92
_SIZE = 224


def main(argv: Sequence[str]):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  result = {
    'device': jax.devices()[0].device_kind,
    'cores': os.cpu_count(),
    'model': _MODEL.value,
    'batch': _BATCH.value,
    **bench_steps(),
    **bench_decoding(),
  }
  workdir = pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  text = json.dumps(result, indent=2)
  (workdir / 'result.json').write_text(text)
  print(text)


def bench_steps() -> dict[str, float]:
  """Medians of a step on a constant batch and on the pipeline's, in turn."""
  train = data.load('cifar10', _SPLIT.value, data_dir=_DATA_DIR.value)
  key = jax.random.key(0)
  augment = jax.jit(
    functools.partial(
      data.augment, config=data.Augmentation.cifar(), classes=train.classes
    )
  )
  batches = data.batches(train.on_device(), _BATCH.value, seed=0, raw=True).map(
    lambda batch, step: augment(batch, jax.random.fold_in(key, step))
  )
  constant = jax.block_until_ready(next(batches))
  step, state = _training(constant, key)

  def run(batch):
    nonlocal state
    state, metrics = step(state, batch, key)
    return state, metrics

  run(constant)
  run(next(batches))
  fixed, fed, alone = [], [], []
  for _ in range(_ROUNDS.value):
    fixed.append(_seconds(lambda: run(constant)))
    fed.append(_seconds(lambda: run(next(batches))))
    alone.append(_seconds(lambda: next(batches)))
  return {
    'constant batch, s/step': statistics.median(fixed),
    'pipeline, s/step': statistics.median(fed),
    'batching and augmentation alone, s': statistics.median(alone),
    'pipeline / constant': statistics.median(fed) / statistics.median(fixed),
    'pipeline / constant, median of rounds': statistics.median(
      a / b for a, b in zip(fed, fixed)
    ),
  }


def _training(batch: dict[str, Any], key: jax.Array):
  """The compiled step of the model with AdamW, and the state to start from."""
  model = models.create(_MODEL.value)
  variables = dict(model.init(key, batch['image'][:1]))
  params = variables.pop('params')

  def loss(params, model_state, batch, key):
    logits, model_state = model.apply(
      {'params': params, **model_state},
      batch['image'],
      train=True,
      mutable=list(model_state),
      rngs={'dropout': key},
    )
    losses = optax.softmax_cross_entropy(logits, batch['label'])
    return losses.mean(), (dict(model_state), {})

  tx = oialr.train_sigma(optax.adamw(3e-4, weight_decay=0.01))
  state = training.TrainState(
    jnp.zeros((), jnp.int32), params, tx.init(params), variables
  )
  step = jax.jit(training.train_step(loss, tx), donate_argnums=0)
  return step.lower(state, batch, key).compile(), state


def bench_decoding() -> dict[str, float]:
  """Images a second and core: Pillow alone, the pipeline, its workers."""
  encoded = _jpegs(_IMAGES.value)
  config = data.Augmentation.imagenet()
  rng = np.random.default_rng(0)
  bilinear = PIL.Image.Resampling.BILINEAR

  def plain(image: bytes):
    return np.asarray(streaming.decode(image).resize((_SIZE, _SIZE), bilinear))

  def augmented(image: bytes):
    return streaming.train_image(
      streaming.decode(image), rng, config=config, size=_SIZE
    )

  seconds = {plain: [], augmented: []}
  for image in encoded:
    for function, times in seconds.items():
      times.append(_seconds(lambda: function(image)))  # noqa: B023
  rate = {f: len(encoded) / sum(times) for f, times in seconds.items()}
  result = {
    'JPEGs, kB': statistics.fmean(map(len, encoded)) / 1000,
    'Pillow decoding and resizing, images/s/core': rate[plain],
    'decoding and augmentation, images/s/core': rate[augmented],
    'augmented / plain': rate[augmented] / rate[plain],
  }
  if _WORKERS.value:
    rate = _worker_rate(encoded, config)
    result[f'stream of {_WORKERS.value} workers, images/s'] = rate
  return result


def _worker_rate(encoded: list[bytes], config: data.Augmentation) -> float:
  """Images a second of a stream, after what its workers had ready."""
  size = max(1, len(encoded) // 8)
  source = data.Source(
    name='generated',
    records=_Records([{'image': x, 'label': 0} for x in encoded]),
    files=(('memory', 0, len(encoded)),),
    shape=(None, None, 3),
    classes=1000,
  )
  batches = data.stream(
    source, size, config=config, size=_SIZE, seed=0, workers=_WORKERS.value
  )
  ahead = 4 * _WORKERS.value
  for _ in range(ahead):
    next(batches)
  count = 2 * ahead
  seconds = _seconds(lambda: [next(batches) for _ in range(count)])
  batches.close()
  return count * size / seconds


class _Records:
  """What TFDS reads from a file, in memory."""

  def __init__(self, examples: list[dict[str, Any]]):
    self._examples = examples

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self._examples[i]

  def __getitems__(self, index: Sequence[int]) -> list[dict[str, Any]]:
    return [self._examples[i] for i in index]


def _jpegs(count: int) -> list[bytes]:
  """Pictures of waves and noise at several scales, from a few to all pixels."""
  encoded = []
  for i in range(count):
    rng = np.random.default_rng(i)
    image = np.zeros((_HEIGHT, _WIDTH, 3))
    for scale, strength in ((4, 50), (16, 30), (64, 15), (500, 16)):
      noise = rng.normal(0, strength, (scale * 3 // 4, scale, 3))
      noise = np.clip(128 + noise, 0, 255).astype(np.uint8)
      noise = PIL.Image.fromarray(noise).resize((_WIDTH, _HEIGHT))
      image += np.asarray(noise, float) - 128
    pixels = np.clip(128 + image, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, 'JPEG', quality=_QUALITY)
    encoded.append(file.getvalue())
  return encoded


def _seconds(function: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - start


if __name__ == '__main__':
  app.run(main)
