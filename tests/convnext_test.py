"""Tests of ConvNeXt."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import models
from oialr_jax.models import convnext
from tests import oracles

_TINY = dict(num_classes=5, depths=(1, 2), dims=(4, 6))


def _block(p, x):
  y = oracles.conv(p['conv_dw'], x, padding=3)
  y = oracles.mlp(p['mlp'], oracles.layer_norm(p['norm'], y))
  return x + p['gamma'] * y


def _convnext(p, x, depths):
  x = oracles.conv(p['stem_0'], x, stride=4)
  x = oracles.layer_norm(p['stem_1'], x)
  for i, depth in enumerate(depths):
    stage = p[f'stages_{i}']
    if i:
      x = oracles.layer_norm(stage['downsample_0'], x)
      x = oracles.conv(stage['downsample_1'], x, stride=2)
    for j in range(depth):
      x = _block(stage[f'blocks_{j}'], x)
  x = oracles.layer_norm(p['head']['norm'], x.mean((1, 2)))
  return oracles.dense(p['head']['fc'], x)


@pytest.mark.parametrize(
  'sides, size', [((16, 24), 1), ((22, 15), 1), ((16, 24), 1e-3)]
)
def test_the_model_is_the_one_written_out(sides, size):
  """Also on sides that stem and stages round down, as PyTorch's do."""
  model = models.ConvNext(**_TINY)
  x = oracles.images(2, *sides, 3)
  variables = oracles.variables(model, x, size=size)
  out = oracles.run(model, variables, x)
  assert out.shape == (2, 5)
  params, x = oracles.float64((variables['params'], x))
  expected = _convnext(params, x, model.depths)
  oracles.check_close(out, expected)


def test_a_block_is_the_one_written_out():
  norm = functools.partial(nn.LayerNorm, epsilon=1e-6)
  block = convnext.Block(nn.Conv, norm, nn.Dense)
  x = oracles.images(2, 5, 9, 4)
  variables = oracles.variables(block, x)
  expected = _block(*oracles.float64((variables['params'], x)))
  out = oracles.run(block, variables, x)
  oracles.check_close(out, expected)


def test_every_full_convolution_and_dense_kernel_is_found():
  model, inputs = models.create('convnext_tiny'), models.inputs('convnext_tiny')
  variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  layers = oialr.find_layers(
    lambda p, x: model.apply({'params': p}, x), variables['params'], *inputs
  )
  found = {layer.path: layer.matrix for layer in layers}
  found = {k: v for k, v in found.items() if 'conv_dw' not in k}
  assert len(found) == 1 + 3 + 2 * (3 + 3 + 9 + 3) + 1
  assert found['stem_0/kernel'] == (48, 96)
  assert found['stages_3/downsample_1/kernel'] == (4 * 384, 768)
  assert found['stages_2/blocks_8/mlp/fc1/kernel'] == (384, 1536)
  assert found['stages_2/blocks_8/mlp/fc2/kernel'] == (1536, 384)
  assert found['head/fc/kernel'] == (768, 1000)


def test_initial_values_are_timms():
  model = models.ConvNext(num_classes=30, depths=(1, 1), dims=(32, 64))
  params = oracles.init(model, jnp.zeros((1, 16, 16, 3)))
  kernels = [path for path in params if path.endswith('kernel')]
  assert len(kernels) == 1 + 1 + 2 * 3 + 1
  for path, x in params.items():
    if path.endswith('kernel'):
      assert x.std() == pytest.approx(0.02, rel=0.1), path
    elif path.endswith('gamma'):
      assert (x == np.float32(1e-6)).all(), path
    else:
      assert (x == path.endswith('scale')).all(), path


@pytest.mark.parametrize('rate', ['dropout', 'drop_path'])
def test_randomness_is_for_training_alone(rate):
  x = oracles.images(4, 16, 16, 3)
  model = models.ConvNext(**_TINY, **{rate: 0.5})
  variables = oracles.variables(model, x)
  run = functools.partial(oracles.run, model, variables, x)
  expected = oracles.run(models.ConvNext(**_TINY), variables, x)
  np.testing.assert_array_equal(run(), expected)
  np.testing.assert_array_equal(run(train=True), run(train=True))
  assert not np.allclose(run(train=True), expected, atol=1e-3)
  assert not np.allclose(run(train=True), run(train=True, seed=1), atol=1e-3)


def test_dropout_precedes_the_last_layer():
  x = oracles.images(500, 2, 2, 6)
  head = convnext.Head(functools.partial(nn.Dense, 5), nn.LayerNorm, 0.5)
  variables = oracles.variables(head, x)
  # In one program, what dropout is given would be computed anew for it, and
  # rounded otherwise.
  with jax.disable_jit():
    outputs = oracles.captured(head, variables, x, train=True)
  norm, kept, out = (
    np.asarray(outputs[f'{name}__call__'][0])
    for name in ('norm/', 'Dropout_0/', '')
  )
  oracles.check_dropout(kept, norm, 0.5)
  oracles.check_close(out, oracles.dense(variables['params']['fc'], kept))


def test_drop_path_rises_over_all_stages():
  x = oracles.images(400, 8, 8, 3)
  model = models.ConvNext(**_TINY, drop_path=0.8)
  variables = oracles.variables(model, x)
  outputs = oracles.captured(model, variables, x, train=True)
  rates = {
    'stages_0/blocks_0': 0.0,
    'stages_1/blocks_0': 0.4,
    'stages_1/blocks_1': 0.8,
  }
  for block, rate in rates.items():
    (branch,) = outputs[f'{block}/DropPath_0/__call__']
    assert oracles.dropped(branch).mean() == pytest.approx(rate, abs=0.08)


def test_it_computes_in_bfloat16_with_parameters_in_float32():
  x = oracles.images(2, 16, 16, 3)
  model = models.ConvNext(**_TINY, dtype=jnp.bfloat16)
  variables = oracles.variables(model, x)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype('float32')}
  outputs = oracles.captured(model, variables, x)
  for name in ('stem_1', 'stages_0', 'stages_1/blocks_1', 'head/norm'):
    assert outputs[f'{name}/__call__'][0].dtype == jnp.bfloat16, name
  out = outputs['__call__'][0]
  assert out.dtype == jnp.float32
  expected = oracles.run(models.ConvNext(**_TINY), variables, x)
  np.testing.assert_allclose(out, expected, atol=0.1)
  assert not np.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(dims=(4,)), r'depths=\(1, 2\) and dims=\(4,\) must have as many'),
    (dict(dropout=1), r'dropout=1: must be in \[0, 1\)'),
    (dict(drop_path=-1), r'drop_path=-1: must be in \[0, 1\)'),
  ],
)
def test_attributes_are_checked_when_built(options, message):
  with pytest.raises(ValueError, match=message):
    models.ConvNext(**_TINY | options)


@pytest.mark.parametrize(
  'shape, message',
  [
    ((16, 16, 3), r'shape \(16, 16, 3\): pass \[batch, height, width'),
    ((1, 7, 16, 3), r'\(1, 7, 16, 3\): 2 stages take at least 8 x 8 pixels'),
  ],
)
def test_images_are_checked(shape, message):
  with pytest.raises(ValueError, match=message):
    models.ConvNext(**_TINY).init(jax.random.key(0), jnp.zeros(shape))
