"""Tests of the MLP-Mixer."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import models
from oialr_jax.models import mixer
from tests import oracles

_TINY = dict(
  num_classes=5, patch_size=4, embed_dim=12, depth=2, mlp_ratio=(0.5, 2.0)
)


def _block(p, x):
  tokens = np.empty_like(x)
  y = oracles.layer_norm(p['norm1'], x)
  for feature in range(x.shape[2]):
    tokens[:, :, feature] = oracles.mlp(p['mlp_tokens'], y[:, :, feature])
  x = x + tokens
  return x + oracles.mlp(p['mlp_channels'], oracles.layer_norm(p['norm2'], x))


def _mixer(p, x, model):
  x = oracles.patches(p['stem']['proj'], x)
  for i in range(model.depth):
    x = _block(p[f'blocks_{i}'], x)
  return oracles.dense(p['head'], oracles.layer_norm(p['norm'], x).mean(1))


@pytest.mark.parametrize('size', [1, 1e-3])
def test_the_model_is_the_one_written_out(size):
  """With small values too, so that the norms' epsilon matters."""
  model = models.Mixer(**_TINY)
  x = oracles.images(3, 8, 12, 3)
  variables = oracles.variables(model, x, size=size)
  out = oracles.run(model, variables, x)
  assert out.shape == (3, 5)
  expected = _mixer(*oracles.float64((variables['params'], x)), model)
  oracles.check_close(out, expected)


def test_a_block_is_the_one_written_out():
  norm = functools.partial(nn.LayerNorm, epsilon=1e-6)
  block = mixer.Block((5, 20), nn.Dense, norm)
  x = oracles.images(2, 7, 12)
  variables = oracles.variables(block, x)
  expected = _block(*oracles.float64((variables['params'], x)))
  out = oracles.run(block, variables, x)
  oracles.check_close(out, expected)


def test_every_kernel_is_found_with_its_matrix():
  model, inputs = models.create('mixer_b16_224'), models.inputs('mixer_b16_224')
  variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  layers = oialr.find_layers(
    lambda p, x: model.apply({'params': p}, x), variables['params'], *inputs
  )
  found = {layer.path: layer.matrix for layer in layers}
  assert len(found) == 1 + 12 * 4 + 1
  assert found['stem/proj/kernel'] == (768, 768)
  assert found['blocks_11/mlp_tokens/fc1/kernel'] == (196, 384)
  assert found['blocks_11/mlp_tokens/fc2/kernel'] == (384, 196)
  assert found['blocks_11/mlp_channels/fc1/kernel'] == (768, 3072)
  assert found['head/kernel'] == (768, 1000)


def test_initial_values_are_timms():
  model = models.Mixer(
    num_classes=10, patch_size=8, embed_dim=192, depth=1, dropout=0.1
  )
  params = oracles.init(model, jnp.zeros((1, 64, 64, 3)))
  for path, x in params.items():
    rows = np.prod(x.shape[:-1])
    if path.startswith('head'):
      assert (x == 0).all(), path
    elif path == 'stem/proj/kernel':
      # Of LeCun: the fan in alone.
      assert x.std() == pytest.approx(1 / np.sqrt(rows), rel=0.02)
    elif path.endswith('kernel'):
      # Of Glorot, uniform: its largest value is sqrt(3) deviations.
      assert x.std() == pytest.approx(np.sqrt(2 / sum(x.shape)), rel=0.02)
      assert abs(x).max() <= np.sqrt(6 / sum(x.shape))
    elif 'mlp' in path:
      assert x.std() == pytest.approx(1e-6, rel=0.3), path
    else:
      assert (x == path.endswith('scale')).all(), path


@pytest.mark.parametrize('rate', ['dropout', 'drop_path'])
def test_randomness_is_for_training_alone(rate):
  x = oracles.images(4, 8, 8, 3)
  model = models.Mixer(**_TINY, **{rate: 0.5})
  variables = oracles.variables(model, x)
  run = functools.partial(oracles.run, model, variables, x)
  expected = oracles.run(models.Mixer(**_TINY), variables, x)
  np.testing.assert_array_equal(run(), expected)
  np.testing.assert_array_equal(run(train=True), run(train=True))
  assert not np.allclose(run(train=True), expected, atol=1e-3)
  assert not np.allclose(run(train=True), run(train=True, seed=1), atol=1e-3)


def test_drop_path_is_the_same_in_all_blocks():
  x = oracles.images(1000, 4, 4, 3)
  model = models.Mixer(**_TINY, drop_path=0.4)
  variables = oracles.variables(model, x)
  outputs = oracles.captured(model, variables, x, train=True)
  for i in range(2):
    branches = outputs[f'blocks_{i}/DropPath_0/__call__']
    tokens, channels = map(oracles.dropped, branches)
    assert tokens.mean() == pytest.approx(0.4, abs=0.06)
    assert channels.mean() == pytest.approx(0.4, abs=0.06)
    assert (tokens & channels).mean() == pytest.approx(0.16, abs=0.06)


def test_it_computes_in_bfloat16_with_parameters_in_float32():
  x = oracles.images(2, 8, 8, 3)
  model = models.Mixer(**_TINY, dtype=jnp.bfloat16)
  variables = oracles.variables(model, x)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype('float32')}
  outputs = oracles.captured(model, variables, x)
  for name in ('stem', 'blocks_0', 'blocks_1/mlp_tokens', 'norm'):
    assert outputs[f'{name}/__call__'][0].dtype == jnp.bfloat16, name
  out = outputs['__call__'][0]
  assert out.dtype == jnp.float32
  expected = oracles.run(models.Mixer(**_TINY), variables, x)
  np.testing.assert_allclose(out, expected, atol=0.1)
  assert not np.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize('rate', ['dropout', 'drop_path'])
def test_rates_are_checked_when_built(rate):
  with pytest.raises(ValueError, match=rf'{rate}=1.5: must be in \[0, 1\)'):
    models.Mixer(**{rate: 1.5})


def test_images_are_checked():
  with pytest.raises(ValueError, match='multiples of 4, the patch size'):
    models.Mixer(**_TINY).init(jax.random.key(0), jnp.zeros((1, 8, 9, 3)))
