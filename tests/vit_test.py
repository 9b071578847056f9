"""Tests of the vision transformer, and of what it shares with other models."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import models
from oialr_jax.models import common
from oialr_jax.models import vit
from tests import oracles

_TINY = dict(
  num_classes=5, patch_size=4, embed_dim=12, depth=2, num_heads=3, mlp_ratio=2.0
)
_BLOCK = dict(
  num_heads=3, mlp_width=20, qkv_bias=True, dense=nn.Dense, norm=nn.LayerNorm
)
_KEY = jax.random.key(0)


def _attention(p, x, heads):
  """Head after head, example after example."""
  features = x.shape[-1] // heads
  q, k, v = np.split(oracles.dense(p['qkv'], x), 3, axis=-1)
  out = np.empty_like(x)
  for i, h in np.ndindex(len(x), heads):
    at = slice(h * features, (h + 1) * features)
    weights = np.exp(q[i, :, at] @ k[i, :, at].T / np.sqrt(features))
    weights /= weights.sum(1, keepdims=True)
    out[i, :, at] = weights @ v[i, :, at]
  return oracles.dense(p['proj'], out)


def _block(p, x, heads):
  x = x + _attention(p['attn'], oracles.layer_norm(p['norm1'], x), heads)
  return x + oracles.mlp(p['mlp'], oracles.layer_norm(p['norm2'], x))


def _vit(p, x, model):
  x = oracles.patches(p['patch_embed']['proj'], x)
  if model.class_token:
    token = np.broadcast_to(p['cls_token'], (len(x), 1, x.shape[-1]))
    x = np.concatenate([token, x], 1)
  x = x + p['pos_embed']
  for i in range(model.depth):
    x = _block(p[f'blocks_{i}'], x, model.num_heads)
  if model.global_pool == 'token':
    x = oracles.layer_norm(p['norm'], x)[:, 0]
  else:
    x = x[:, 1:] if model.class_token else x
    x = oracles.layer_norm(p['fc_norm'], x.mean(1))
  return oracles.dense(p['head'], x)


@pytest.mark.parametrize(
  'options',
  [
    dict(),
    dict(qkv_bias=False),
    dict(global_pool='avg'),
    dict(global_pool='avg', class_token=False),
  ],
  ids=str,
)
@pytest.mark.parametrize('size', [1, 1e-3])
def test_the_model_is_the_one_written_out(options, size):
  """On images that are not square, so that no axis passes for another."""
  model = models.Vit(**_TINY | options)
  x = oracles.images(3, 8, 12, 3)
  variables = oracles.variables(model, x, size=size)
  out = oracles.run(model, variables, x)
  assert out.shape == (3, 5)
  expected = _vit(*oracles.float64((variables['params'], x)), model)
  oracles.check_close(out, expected)


def test_a_block_is_the_one_written_out():
  norm = functools.partial(nn.LayerNorm, epsilon=1e-6)
  block = vit.Block(**_BLOCK | dict(norm=norm))
  x = oracles.images(2, 7, 12)
  variables = oracles.variables(block, x)
  expected = _block(*oracles.float64((variables['params'], x)), 3)
  out = oracles.run(block, variables, x)
  oracles.check_close(out, expected)


def test_every_kernel_of_the_mini_vit_is_found_with_its_matrix():
  model, inputs = models.create('mini_vit'), models.inputs('mini_vit', 2)
  variables = jax.eval_shape(model.init, _KEY, *inputs)
  layers = oialr.find_layers(
    lambda p, x: model.apply({'params': p}, x), variables['params'], *inputs
  )
  block = {
    'attn/qkv': (768, 2304),
    'attn/proj': (768, 768),
    'mlp/fc1': (768, 3072),
    'mlp/fc2': (3072, 768),
  }
  assert {layer.path: layer.matrix for layer in layers} == {
    'patch_embed/proj/kernel': (192, 768),
    **{
      f'blocks_{i}/{name}/kernel': matrix
      for i in range(6)
      for name, matrix in block.items()
    },
    'head/kernel': (768, 10),
  }


def test_initial_values_are_timms():
  model = models.Vit(
    num_classes=100, patch_size=8, embed_dim=192, depth=1, num_heads=3
  )
  flat = oracles.init(model, jnp.zeros((1, 64, 64, 3)))
  for path, x in flat.items():
    if path.endswith('bias'):
      assert (x == 0).all(), path
    elif path.endswith('scale'):
      assert (x == 1).all(), path
  bound = 1 / np.sqrt(8 * 8 * 3)
  patch = flat.pop('patch_embed/proj/kernel')
  assert abs(patch).max() <= bound
  assert patch.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
  assert flat.pop('cls_token').std() == pytest.approx(1e-6, rel=0.2)
  rest = [k for k in flat if k.endswith(('kernel', 'pos_embed'))]
  assert len(rest) == 6
  for path in rest:
    assert flat[path].std() == pytest.approx(0.02, rel=0.03), path


@pytest.mark.parametrize('rate', ['dropout', 'attn_dropout', 'drop_path'])
def test_randomness_is_for_training_alone(rate):
  x = oracles.images(4, 8, 8, 3)
  model = models.Vit(**_TINY, **{rate: 0.5})
  variables = oracles.variables(model, x)
  run = functools.partial(oracles.run, model, variables, x)
  expected = oracles.run(models.Vit(**_TINY), variables, x)
  np.testing.assert_array_equal(run(), expected)
  np.testing.assert_array_equal(run(train=True), run(train=True))
  assert not np.allclose(run(train=True), expected, atol=1e-3)
  assert not np.allclose(run(train=True), run(train=True, seed=1), atol=1e-3)


def test_training_without_a_rate_takes_no_key():
  x = oracles.images(4, 8, 8, 3)
  model = models.Vit(**_TINY)
  variables = oracles.variables(model, x)
  out = jax.eval_shape(lambda x: model.apply(variables, x, train=True), x)
  assert out.shape == (4, 5)


def test_dropout_follows_the_position_embedding():
  x = oracles.images(64, 8, 8, 3)
  model = models.Vit(**_TINY | dict(depth=1), dropout=0.5)
  variables = oracles.variables(model, x)
  # A block of zeros leaves its input alone.
  block = variables['params']['blocks_0']
  variables['params']['blocks_0'] = jax.tree.map(jnp.zeros_like, block)
  tokens, expected = (
    oracles.captured(model, variables, x, train)['blocks_0/__call__'][0]
    for train in (True, False)
  )
  oracles.check_dropout(tokens, expected, 0.5)


def test_dropout_follows_both_layers_of_the_mlp():
  """With constant layers: each of the two halves or doubles what is there."""
  x = jnp.ones((2000, 3))
  mlp = common.MlpBlock(3, nn.Dense, dropout=0.5)
  layer = lambda kernel, bias: dict(kernel=kernel, bias=jnp.full(3, bias))
  fc1, fc2 = layer(jnp.zeros((3, 3)), 1.0), layer(jnp.eye(3), 0.0)
  params = dict(fc1=fc1, fc2=fc2)
  out = oracles.run(mlp, {'params': params}, x, train=True)
  expected = np.full(x.shape, oracles.gelu(1.0))
  # Dropped by the one, the other or both: a rate of 3/4, hence a factor of 4.
  oracles.check_dropout(out, expected, 0.75)


def test_the_activation_is_that_of_the_mlps():
  x = oracles.images(2, 8, 8, 3)
  outputs = {}
  for name in ('gelu', 'relu'):
    model = vit.Vit(
      num_classes=4,
      patch_size=4,
      embed_dim=8,
      depth=1,
      num_heads=2,
      activation=name,
    )
    variables = oracles.variables(model, x)
    captured = oracles.captured(model, variables, x, False)
    hidden = captured['blocks_0/mlp/fc1/__call__'][0]
    fc2 = variables['params']['blocks_0']['mlp']['fc2']
    activate = {'gelu': oracles.gelu, 'relu': lambda x: np.maximum(x, 0)}[name]
    outputs[name] = captured['blocks_0/mlp/__call__'][0]
    expected = activate(np.asarray(hidden)) @ fc2['kernel'] + fc2['bias']
    np.testing.assert_allclose(outputs[name], expected, atol=1e-5)
  assert np.any(np.abs(outputs['gelu'] - outputs['relu']) > 1e-3)


def test_dropout_follows_the_projection_of_attention():
  x = oracles.images(100, 4, 12)
  attention = vit.Attention(3, True, nn.Dense, dropout=0.3)
  variables = oracles.variables(attention, x)
  out, expected = (
    oracles.run(attention, variables, x, train) for train in (True, False)
  )
  oracles.check_dropout(out, expected, 0.3)


def test_dropout_of_attention_is_drawn_for_every_weight():
  """Values of one and uniform weights: sums count the weights that are left."""
  tokens, rate = 8, 0.5
  attention = vit.Attention(3, True, nn.Dense, attn_dropout=rate)
  params = dict(
    qkv=dict(kernel=jnp.zeros((12, 36)), bias=jnp.ones(36)),
    proj=dict(kernel=jnp.eye(12), bias=jnp.zeros(12)),
  )
  x = jnp.zeros((50, tokens, 12))
  out = oracles.run(attention, {'params': params}, x, train=True)
  left = np.asarray(out).reshape(50, tokens, 3, 4) * tokens * (1 - rate)
  np.testing.assert_allclose(left, left.round(), atol=1e-4)
  # Features of a head share their weights; examples, queries and heads do not.
  assert (np.ptp(left, axis=3) < 1e-4).all()
  for axis in (0, 1, 2):
    assert (np.ptp(left, axis=axis) > 0.5).mean() > 0.5, axis
  assert left.mean() / tokens == pytest.approx(1 - rate, abs=0.03)


def test_drop_path_drops_whole_examples_and_rescales_the_others():
  x = oracles.images(4000, 2, 3)
  drop = functools.partial(oracles.run, common.DropPath(0.3), {}, x)
  np.testing.assert_array_equal(drop(train=False), x)
  out = np.asarray(drop(train=True))
  dropped = oracles.dropped(out)
  assert dropped.mean() == pytest.approx(0.3, abs=0.03)
  np.testing.assert_allclose(out[~dropped], x[~dropped] / 0.7, rtol=1e-6)


def test_drop_path_rises_from_block_to_block():
  assert common.rising(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
  assert common.rising(0.3, 1) == [0]
  x = oracles.images(1000, 4, 4, 3)
  model = models.Vit(**_TINY | dict(depth=3), drop_path=0.8)
  variables = oracles.variables(model, x)
  outputs = oracles.captured(model, variables, x, train=True)
  for i, rate in enumerate([0, 0.4, 0.8]):
    branches = outputs[f'blocks_{i}/DropPath_0/__call__']
    attention, mlp = map(oracles.dropped, branches)
    assert attention.mean() == pytest.approx(rate, abs=0.06)
    assert mlp.mean() == pytest.approx(rate, abs=0.06)
    # The two branches are drawn independently.
    assert (attention & mlp).mean() == pytest.approx(rate**2, abs=0.06)


def test_it_computes_in_bfloat16_with_parameters_in_float32():
  x = oracles.images(2, 8, 8, 3)
  model = models.Vit(**_TINY, dtype=jnp.bfloat16)
  variables = oracles.variables(model, x)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype('float32')}
  outputs = oracles.captured(model, variables, x)
  for name in ('patch_embed', 'blocks_0', 'blocks_1/attn', 'norm'):
    assert outputs[f'{name}/__call__'][0].dtype == jnp.bfloat16, name
  out = outputs['__call__'][0]
  assert out.dtype == jnp.float32
  expected = oracles.run(models.Vit(**_TINY), variables, x)
  np.testing.assert_allclose(out, expected, atol=0.1)
  assert not np.allclose(out, expected, atol=1e-5)


def test_the_backward_pass_is_handed_neither_attention_nor_norms():
  """Of bfloat16, these in float32 would be the most of what it keeps."""
  x = oracles.images(2, 16, 16, 3)
  model = models.Vit(**_TINY, dtype=jnp.bfloat16)
  params = oracles.variables(model, x)['params']

  def kept(params):
    forward = lambda p: model.apply({'params': p}, x)
    return jax.tree.leaves(jax.vjp(forward, params)[1])

  found = {(x.shape, str(x.dtype)) for x in jax.eval_shape(kept, params)}
  tokens, features = 1 + 4 * 4, _TINY['embed_dim']
  assert ((2, tokens, features), 'bfloat16') in found
  assert ((2, tokens, features), 'float32') not in found
  assert not [shape for shape, _ in found if shape[-2:] == (tokens, tokens)]


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(num_heads=5), r'num_heads=5 does not divide embed_dim=12'),
    (dict(global_pool='max'), r"global_pool='max': must be 'token' or 'avg'"),
    (dict(class_token=False), r"class_token=False: pass global_pool='avg'"),
    (dict(dropout=1.0), r'dropout=1.0: must be in \[0, 1\)'),
    (dict(attn_dropout=-0.1), r'attn_dropout=-0.1: must be in \[0, 1\)'),
    (dict(drop_path=2), r'drop_path=2: must be in \[0, 1\)'),
  ],
)
def test_attributes_are_checked_when_built(options, message):
  with pytest.raises(ValueError, match=message):
    models.Vit(**_TINY | options)


@pytest.mark.parametrize(
  'shape, message',
  [
    ((8, 8, 3), r'shape \(8, 8, 3\): pass \[batch, height, width, channels\]'),
    ((1, 8, 10, 3), r'shape \(1, 8, 10, 3\): .* multiples of 4, the patch'),
  ],
)
def test_images_are_checked(shape, message):
  with pytest.raises(ValueError, match=message):
    models.Vit(**_TINY).init(_KEY, jnp.zeros(shape))
