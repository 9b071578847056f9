"""Tests of conversion from PyTorch: names, layouts, and what is refused."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from oialr_jax import models
from oialr_jax.models import convert
from tests import oracles

_TINY = dict(num_classes=5, embed_dim=12, num_heads=3, depth=2, mlp_ratio=2.0)


def _linear(name, cols, rows):
  return {f'{name}.weight': (cols, rows), f'{name}.bias': (cols,)}


def _conv(name, cols, rows, side):
  return {f'{name}.weight': (cols, rows, side, side), f'{name}.bias': (cols,)}


def _norm(name, size):
  return {f'{name}.weight': (size,), f'{name}.bias': (size,)}


def _mlp(name, size, hidden):
  fc1, fc2 = _linear(f'{name}.fc1', hidden, size), f'{name}.fc2'
  return fc1 | _linear(fc2, size, hidden)


def _vit(dim=768, depth=12, tokens=197, patch=16, hidden=3072, classes=1000):
  """`{k: v.shape for k, v in model.state_dict().items()}`, in timm."""
  names = {'cls_token': (1, 1, dim), 'pos_embed': (1, tokens, dim)}
  names |= _conv('patch_embed.proj', dim, 3, patch)
  for i in range(depth):
    names |= _norm(f'blocks.{i}.norm1', dim)
    names |= _linear(f'blocks.{i}.attn.qkv', 3 * dim, dim)
    names |= _linear(f'blocks.{i}.attn.proj', dim, dim)
    names |= _norm(f'blocks.{i}.norm2', dim)
    names |= _mlp(f'blocks.{i}.mlp', dim, hidden)
  return names | _norm('norm', dim) | _linear('head', classes, dim)


def _mini_vit():
  names = _vit(depth=6, tokens=17, patch=8, classes=10)
  return {k: v for k, v in names.items() if not k.endswith('qkv.bias')}


def _mixer():
  names = _conv('stem.proj', 768, 3, 16)
  for i in range(12):
    names |= _norm(f'blocks.{i}.norm1', 768)
    names |= _mlp(f'blocks.{i}.mlp_tokens', 196, 384)
    names |= _norm(f'blocks.{i}.norm2', 768)
    names |= _mlp(f'blocks.{i}.mlp_channels', 768, 3072)
  return names | _norm('norm', 768) | _linear('head', 1000, 768)


def _convnext():
  names = _conv('stem.0', 96, 3, 4) | _norm('stem.1', 96)
  stages = enumerate(zip((3, 3, 9, 3), (96, 192, 384, 768)))
  for i, (depth, dim) in stages:
    if i:
      names |= _norm(f'stages.{i}.downsample.0', dim // 2)
      names |= _conv(f'stages.{i}.downsample.1', dim, dim // 2, 2)
    for j in range(depth):
      block = f'stages.{i}.blocks.{j}'
      names |= _conv(f'{block}.conv_dw', dim, 1, 7)
      names |= _norm(f'{block}.norm', dim)
      names |= _mlp(f'{block}.mlp', dim, 4 * dim)
      names |= {f'{block}.gamma': (dim,)}
  return names | _norm('head.norm', 768) | _linear('head.fc', 1000, 768)


@pytest.mark.parametrize(
  'name, expected, entries',
  [
    ('vit_base_patch16_224', _vit(), 152),
    ('mini_vit', _mini_vit(), 74),
    ('mixer_b16_224', _mixer(), 150),
    ('convnext_tiny', _convnext(), 182),
  ],
)
def test_names_and_shapes_are_timms(name, expected, entries):
  assert convert.torch_names(name) == expected
  assert len(expected) == entries


def test_batch_norm_has_statistics():
  names = convert.torch_names('mnist_cnn', batch_norm=True)
  assert {k: v for k, v in names.items() if k.startswith('norm.0')} == {
    'norm.0.weight': (32,),
    'norm.0.bias': (32,),
    'norm.0.running_mean': (32,),
    'norm.0.running_var': (32,),
  }


def _state_dict(name, **options):
  shapes = convert.torch_names(name, **options)
  return {
    k: oracles.images(*s, seed=i) for i, (k, s) in enumerate(shapes.items())
  }


@pytest.mark.parametrize('name', models.NAMES)
def test_every_variable_has_an_entry_of_its_own(name):
  model = models.create(name)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *models.inputs(name))
  names = convert.torch_names(name)
  assert len(names) == len(jax.tree.leaves(shapes))
  size = lambda shapes: sum(int(np.prod(s)) for s in shapes)
  assert size(names.values()) == size(x.shape for x in jax.tree.leaves(shapes))


def test_a_vit_is_converted_to_its_variables():
  state_dict = _state_dict('mini_vit', **_TINY)
  variables = convert.from_torch('mini_vit', state_dict, **_TINY)
  model, inputs = models.create('mini_vit', **_TINY), models.inputs('mini_vit')
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  of = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert of(variables) == of(shapes)
  p = variables['params']
  qkv = state_dict['blocks.1.attn.qkv.weight']
  np.testing.assert_array_equal(p['blocks_1']['attn']['qkv']['kernel'], qkv.T)
  patch = state_dict['patch_embed.proj.weight']
  kernel = p['patch_embed']['proj']['kernel']
  for out, i, y, x in [(0, 0, 0, 0), (3, 2, 5, 1), (11, 1, 7, 6)]:
    assert kernel[y, x, i, out] == patch[out, i, y, x]
  for name in ('cls_token', 'pos_embed'):
    np.testing.assert_array_equal(p[name], state_dict[name])
  norm = p['blocks_0']['norm2']
  np.testing.assert_array_equal(
    norm['scale'], state_dict['blocks.0.norm2.weight']
  )
  np.testing.assert_array_equal(norm['bias'], state_dict['blocks.0.norm2.bias'])


def test_depthwise_kernels_keep_their_window():
  options = dict(depths=(1,), dims=(4,), num_classes=3)
  state_dict = _state_dict('convnext_tiny', **options)
  variables = convert.from_torch('convnext_tiny', state_dict, **options)
  block = variables['params']['stages_0']['blocks_0']
  weight = state_dict['stages.0.blocks.0.conv_dw.weight']
  assert weight.shape == (4, 1, 7, 7)
  for c, y, x in [(0, 0, 1), (3, 6, 2), (1, 4, 5)]:
    assert block['conv_dw']['kernel'][y, x, 0, c] == weight[c, 0, y, x]
  gamma = state_dict['stages.0.blocks.0.gamma']
  np.testing.assert_array_equal(block['gamma'], gamma)


def test_a_converted_model_computes_what_pytorchs_would():
  """A layer of each kind, in PyTorch's layouts and in NumPy: `x @ w.T + b`."""
  options = dict(depths=(1,), dims=(4,), num_classes=3)
  w = oracles.float64(_state_dict('convnext_tiny', **options))
  variables = convert.from_torch('convnext_tiny', w, **options)
  x = oracles.images(2, 8, 12, 3)
  model = models.create('convnext_tiny', **options)
  out = oracles.run(model, variables, x)
  linear = lambda name, x: x @ w[f'{name}.weight'].T + w[f'{name}.bias']
  norm = lambda name, x: oracles.layer_norm(
    dict(scale=w[f'{name}.weight'], bias=w[f'{name}.bias']), x
  )
  patches = x.reshape(2, 2, 4, 3, 4, 3).astype(np.float64)
  x = np.einsum('nhywxi,oiyx->nhwo', patches, w['stem.0.weight'])
  x = norm('stem.1', x + w['stem.0.bias'])
  block = 'stages.0.blocks.0'
  padded = np.pad(x, [(0, 0), (3, 3), (3, 3), (0, 0)])
  y = sum(
    padded[:, i : i + 2, j : j + 3] * w[f'{block}.conv_dw.weight'][:, 0, i, j]
    for i, j in np.ndindex(7, 7)
  )
  y = norm(f'{block}.norm', y + w[f'{block}.conv_dw.bias'])
  y = linear(f'{block}.mlp.fc2', oracles.gelu(linear(f'{block}.mlp.fc1', y)))
  x = x + w[f'{block}.gamma'] * y
  expected = linear('head.fc', norm('head.norm', x.mean((1, 2))))
  oracles.check_close(out, expected)


def test_statistics_are_variables_beside_the_parameters():
  state_dict = _state_dict('mnist_cnn', batch_norm=True)
  counts = {'norm.0.num_batches_tracked': np.int64(3)}
  variables = convert.from_torch(
    'mnist_cnn', state_dict | counts, batch_norm=True
  )
  assert variables.keys() == {'params', 'batch_stats'}
  stats = variables['batch_stats']['norm_1']
  for ours, theirs in {'mean': 'running_mean', 'var': 'running_var'}.items():
    np.testing.assert_array_equal(stats[ours], state_dict[f'norm.1.{theirs}'])


def test_weights_are_cast_to_the_types_of_the_model():
  state_dict = _state_dict('mini_vit', **_TINY)
  half = {k: v.astype(np.float16) for k, v in state_dict.items()}
  variables = convert.from_torch('mini_vit', half, **_TINY)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype('float32')}


def test_other_images_are_other_inputs():
  inputs = (jax.ShapeDtypeStruct((1, 64, 32, 3), jnp.float32),)
  names = convert.torch_names('mini_vit', inputs=inputs, **_TINY)
  assert names['pos_embed'] == (1, 8 * 4 + 1, 12)
  state_dict = _state_dict('mini_vit', inputs=inputs, **_TINY)
  variables = convert.from_torch('mini_vit', state_dict, inputs=inputs, **_TINY)
  assert variables['params']['pos_embed'].shape == (1, 33, 12)


@pytest.mark.parametrize('kind', [str, lambda path: path])
def test_a_file_is_read(tmp_path, kind):
  state_dict = _state_dict('mini_vit', **_TINY)
  path = tmp_path / 'weights.safetensors'
  safetensors.save_file(state_dict, path)
  from_file = convert.from_torch('mini_vit', kind(path), **_TINY)
  expected = convert.from_torch('mini_vit', state_dict, **_TINY)
  jax.tree.map(np.testing.assert_array_equal, from_file, expected)


def _without(*names):
  return lambda x: {k: v for k, v in x.items() if k not in names}


@pytest.mark.parametrize(
  'change, message',
  [
    (
      _without('blocks.0.norm1.bias'),
      r"'mini_vit': missing 'blocks.0.norm1.bias'; see torch_names",
    ),
    (
      lambda x: x | {'blocks.0.attn.qkv.bias': np.ones(36)},
      r"unknown 'blocks.0.attn.qkv.bias'; .*overrides .*qkv_bias=False",
    ),
    (
      lambda x: {f'module.{k}': v for k, v in x.items()},
      r"missing '.*', '.*', '.*' and 27 more; unknown 'module.*' and 27 more;",
    ),
    (
      lambda x: x | {'head.weight': np.ones((7, 12))},
      r"'head.weight' is of shape \(7, 12\), of 'mini_vit' it is \(5, 12\)",
    ),
    (
      lambda x: x | {'patch_embed.proj.weight': np.ones((12, 192))},
      r"'patch_embed.proj.weight' is of shape \(12, 192\), .*\(12, 3, 8, 8\)",
    ),
    (
      lambda x: x | {'pos_embed': np.ones((1, 197, 12))},
      r"'pos_embed' is of shape \(1, 197, 12\), .*\(1, 17, 12\).*inputs=",
    ),
  ],
)
def test_entries_that_do_not_fit_are_refused_by_name(change, message):
  state_dict = change(_state_dict('mini_vit', **_TINY))
  with pytest.raises(ValueError, match=message):
    convert.from_torch('mini_vit', state_dict, **_TINY)


def test_files_that_cannot_be_read_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='w.safetensors: there is no'):
    convert.from_torch('mini_vit', tmp_path / 'w.safetensors')
  with pytest.raises(ValueError, match=r'w.pth: only .safetensors files'):
    convert.from_torch('mini_vit', str(tmp_path / 'w.pth'))


def test_safetensors_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
  path = tmp_path / 'w.safetensors'
  safetensors.save_file({}, path)
  monkeypatch.setitem(sys.modules, 'safetensors', None)
  with pytest.raises(ImportError, match='pip install safetensors'):
    convert.from_torch('mini_vit', path)


def test_attributes_and_models_that_are_not_there_are_refused():
  with pytest.raises(TypeError, match="no attribute 'patch'"):
    convert.from_torch('mini_vit', {}, patch=4)
  with pytest.raises(ValueError, match="did you mean 'mini_vit'"):
    convert.from_torch('mini_vitt', {})
