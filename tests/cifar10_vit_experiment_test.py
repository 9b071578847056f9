"""The binary for CIFAR-10, end to end on generated images."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cifar10_vit
from experiments import classification
from experiments import cli
from experiments import recipe
from experiments import runs
from oialr_jax import data
from oialr_jax import models
from oialr_jax import training
from tests import tfds_folders

# How ml_collections loads a file of settings.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

TINY = (
  '--config.steps=4',
  '--config.batch_size=8',
  '--config.eval_batch_size=4',
  '--config.eval_epochs=150',
  '--config.model.embed_dim=16',
  '--config.model.num_heads=2',
  '--config.model.depth=1',
  '--config.augmentation.operations=0',  # compiles for long
  '--config.augmentation.erase=0',
  '--config.compaction.reproducible',
  '--config.compaction.min_saving=1',  # which would compile more
  '--config.rewarmup=1',
  '--config.oialr.delay=1',
  '--config.oialr.every=2',
  '--config.oialr.progressive=1',
  '--config.oialr.cutoff=0.5',
  '--quiet',
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  splits = {
    'train': [tfds_folders.shard(range(20), 32)],
    'test': [tfds_folders.shard(range(20, 30), 32)],
  }
  tfds_folders.write(
    folder, 'cifar10', '3.0.2', splits, classes=10, shape=(32, 32, 3)
  )
  return folder


def run(folder, workdir, *changes):
  flags = (f'--data_dir={folder}', f'--workdir={workdir}', *TINY, *changes)
  config, options = cli.parse(cifar10_vit.BINARY, flags)
  cifar10_vit.main(config, options)
  return json.loads((workdir / 'result.json').read_text())['rows']


def test_methods_are_compared_after_an_interruption(folder, tmp_path, capsys):
  with pytest.raises(training.Interrupted):
    run(folder, tmp_path, '--max_seconds=0')
  rows = run(folder, tmp_path, '--resume')
  names = [row['method'] for row in rows]
  assert names == ['dense', 'oialr']
  dense, low = rows
  assert dense['trainable %'] == 100 > low['trainable %']
  assert 'test accuracy %' in capsys.readouterr().out
  report = {path.name for path in (tmp_path / 'report').iterdir()}
  assert {'loss.png', 'ranks.png', 'compressed.safetensors'} <= report
  for method in names:
    lines = (tmp_path / f'{method}-0' / 'metrics.jsonl').read_text()
    records = [json.loads(line) for line in lines.splitlines()]
    evaluated = [x['step'] for x in records if x['kind'] == 'eval']
    assert evaluated == [2, 4]
    losses = sum((x['losses'] for x in records if 'losses' in x), [])
    assert len(losses) == 4 and np.all(np.isfinite(losses))


def test_an_epoch_is_what_the_published_run_has():
  config, _ = cli.parse(cifar10_vit.BINARY, ())
  steps = recipe.length(config, cifar10_vit.TRAINING_EXAMPLES)
  assert steps == 300 * 48
  rate = recipe.rate(config, steps)
  assert rate(0) == pytest.approx(1e-5) and rate(480) == pytest.approx(3e-4)
  assert rate(steps - 1) == pytest.approx(1e-5, rel=1e-3)
  model = recipe.model(config)
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
  )
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert count == 42_684_682
  published = data.Augmentation.cifar()
  assert recipe.augmentation(data.Augmentation.cifar, config) == published


def test_the_small_variant_trains_longer_steps_of_sigma():
  flag = '--config=experiments/configs/cifar10_vit.py:small'
  config, _ = cli.parse(cifar10_vit.BINARY, (flag,))
  steps = recipe.length(config, cifar10_vit.TRAINING_EXAMPLES)
  assert steps == 20 * 390
  # As often as published, which is 500 of 14,700 steps.
  assert config.oialr.every / steps == pytest.approx(500 / 14_700, rel=0.01)
  for method in 'oialr', 'fixed_rank':
    schedule = runs.arguments(method, config, steps)['schedule']
    assert schedule.delay_steps == steps // 3
    assert schedule.sigma_scale == 2
    assert (schedule.rank or schedule.floor) == 0.45  # the same in the end
  assert recipe.model(config).embed_dim == 256
  assert config.methods == ('dense', 'oialr', 'svd_prune', 'fixed_rank')
  assert config.seeds == (0, 1, 2)


def task(**options):
  split = data.Split(
    np.arange(6 * 64, dtype=np.uint8).reshape(6, 8, 8, 1) % 255,
    np.arange(6, dtype=np.int32) % 3,
    classes=3,
  )
  config, _ = cli.parse(cifar10_vit.BINARY, ())
  config.batch_size, config.eval_batch_size = 4, 4
  model = models.Mlp(widths=(8,), num_classes=3)
  return classification.Task.of_splits(model, split, split, config, **options)


def test_the_loss_takes_numbers_and_distributions():
  plain = task()
  batch = next(plain.train(0))
  params, state = plain.init(0)
  key = jax.random.key(0)
  assert batch['label'].ndim == 1
  hard, _ = plain.loss(params, state, batch, key)
  soft = batch | {'label': jax.nn.one_hot(batch['label'], 3)}
  np.testing.assert_allclose(plain.loss(params, state, soft, key)[0], hard)
  mixed = batch | {'label': jnp.full((4, 3), 1 / 3)}
  logits = plain.model.apply({'params': params}, batch['image'])
  expected = -jax.nn.log_softmax(logits).mean()
  np.testing.assert_allclose(
    plain.loss(params, state, mixed, key)[0], expected, rtol=1e-6
  )


def test_augmented_batches_are_soft_and_a_function_of_the_step():
  augmentation = data.Augmentation(
    mean=(0.5,), std=(0.5,), flip=0.5, mixup=0.2, label_smoothing=0.1
  )
  augmented = task(augmentation=augmentation)
  batches = augmented.train(3)
  first, second = next(batches), next(batches)
  assert first['label'].shape == (4, 3)
  np.testing.assert_allclose(first['label'].sum(1), 1, rtol=1e-6)
  batches.set_state({'step': 1})
  np.testing.assert_array_equal(next(batches)['image'], second['image'])
  # Of equal images, steps and seeds make different ones.
  image = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None], (6, 8, 8, 1))
  split = data.Split(image, np.zeros(6, np.int32), classes=3)
  of = lambda seed, step: next(
    classification.augmented(
      data.batches(split, 4, seed=0, raw=True, start=step),
      data.augment,
      augmentation,
      3,
      seed=seed,
    )
  )['image']
  np.testing.assert_array_equal(of(0, 0), of(0, 0))
  assert np.any(of(0, 0) != of(0, 1)) and np.any(of(0, 0) != of(1, 0))


def test_test_images_are_normalised_as_training_images_are():
  augmentation = data.Augmentation(mean=(0.25,), std=(0.5,))
  normal, plain = task(augmentation=augmentation), task()
  params, state = plain.init(0)
  batch, raw = next(plain.test()), next(normal.test())
  assert raw['image'].dtype == np.uint8
  same = {**batch, 'image': (batch['image'] - 0.25) / 0.5}
  for name, values in plain.evaluate(params, state, same).items():
    found = normal.evaluate(params, state, raw)[name]
    np.testing.assert_allclose(found, values, rtol=1e-5)


def test_a_part_held_out_is_evaluated_on_in_place_of_test_data(
  folder, tmp_path
):
  flags = '--config.val_share=0.5', '--config.methods=dense'
  (row,) = run(folder, tmp_path, *flags)
  assert 'validation accuracy %' in row
  assert 'test accuracy %' not in row
  config = cifar10_vit.BINARY.config()
  config.val_share = 0.5
  train, held_out = cifar10_vit.splits(config, str(folder))
  whole = data.load('cifar10', 'train', data_dir=folder)
  both = np.concatenate([train.image, held_out.image])
  as_rows = lambda x: sorted(map(bytes, x.reshape(len(x), -1)))
  assert len(train) == len(held_out) == 10
  assert as_rows(both) == as_rows(whole.image)


def test_a_model_that_computes_in_bfloat16_is_exported(folder, tmp_path):
  flags = '--config.model.dtype=bfloat16', '--config.methods=oialr'
  run(folder, tmp_path, *flags)
  report = {path.name for path in (tmp_path / 'report').iterdir()}
  assert {'dense.stablehlo', 'compressed.stablehlo'} <= report
