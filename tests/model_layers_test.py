"""Tests of what is found to be low-rank in every model there is.

What is expected comes from the parameters' names and shapes, from published
counts of multiply-adds, and from sizes of images worked out by hand.
"""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

import oialr_jax as oialr
from oialr_jax import models

_BATCH = 2
_VIT = {r'consumed by (broadcast_in_dim|concatenate)': 1, 'consumed by add': 1}

# Kernels by kind, other parameters of two axes by reason; the first and the
# last kernel to be used.
FOUND = {
  'mlp': (dict(dot=4), {}, 'dense_0', 'head'),
  'mnist_cnn': (dict(conv=2, dot=2), {}, 'conv_0', 'head'),
  'mini_vit': (dict(conv=1, dot=25), _VIT, 'patch_embed/proj', 'head'),
  'vit_small_patch16_224': (
    dict(conv=1, dot=49),
    _VIT,
    'patch_embed/proj',
    'head',
  ),
  'vit_base_patch16_224': (
    dict(conv=1, dot=49),
    _VIT,
    'patch_embed/proj',
    'head',
  ),
  'vit_large_patch16_224': (
    dict(conv=1, dot=97),
    _VIT,
    'patch_embed/proj',
    'head',
  ),
  'mixer_b16_224': (dict(conv=1, dot=49), {}, 'stem/proj', 'head'),
  # A matrix of 49 x 1 for every channel.
  'convnext_tiny': (
    dict(conv=4, dot=37),
    {r'\d groups': 18},
    'stem_0',
    'head/fc',
  ),
  'resnet18': (dict(conv=20, dot=1), {}, 'conv1', 'fc'),
  'resnet18_cifar': (dict(conv=20, dot=1), {}, 'conv1', 'fc'),
  'resnet50': (dict(conv=53, dot=1), {}, 'conv1', 'fc'),
  # The squeeze-excitation of 16 and 33 blocks is two convolutions each.
  'resnetrs50': (dict(conv=56 + 32, dot=1), {}, 'conv1_0', 'fc'),
  'resnetrs101': (dict(conv=107 + 66, dot=1), {}, 'conv1_0', 'fc'),
  'autoformer': (
    dict(conv=9, dot=19),
    {},
    'enc_embedding/value_embedding/tokenConv',
    'decoder/projection',
  ),
}

# Of one example, rows of activations.
TOKENS = {
  'mlp': {'dense_0': 1, 'head': 1},
  'mnist_cnn': {'conv_0': 14 * 14, 'conv_1': 7 * 7, 'hidden': 1},
  'mini_vit': {
    'patch_embed/proj': 4 * 4,
    'blocks_0/attn/qkv': 4 * 4 + 1,
    'blocks_5/mlp/fc2': 4 * 4 + 1,
    'head': 1,
  },
  'vit_small_patch16_224': {'blocks_3/mlp/fc1': 14 * 14 + 1},
  'vit_base_patch16_224': {
    'patch_embed/proj': 14 * 14,
    'blocks_11/attn/proj': 14 * 14 + 1,
    'head': 1,
  },
  'vit_large_patch16_224': {'blocks_23/attn/qkv': 14 * 14 + 1},
  # One MLP goes over the tokens of each of 768 features, one the other way.
  'mixer_b16_224': {
    'stem/proj': 14 * 14,
    'blocks_0/mlp_tokens/fc1': 768,
    'blocks_0/mlp_tokens/fc2': 768,
    'blocks_11/mlp_channels/fc1': 14 * 14,
  },
  'convnext_tiny': {
    'stem_0': 56 * 56,
    'stages_0/blocks_2/mlp/fc2': 56 * 56,
    'stages_1/downsample_1': 28 * 28,
    'stages_2/blocks_8/mlp/fc1': 14 * 14,
    'stages_3/blocks_0/mlp/fc1': 7 * 7,
    'head/fc': 1,
  },
  'resnet18': {'conv1': 112 * 112, 'layer1_0/conv1': 56 * 56},
  'resnet18_cifar': {'conv1': 32 * 32, 'layer4_1/conv2': 4 * 4},
  # The stride is that of the 3 x 3 convolution.
  'resnet50': {
    'conv1': 112 * 112,
    'layer1_0/conv1': 56 * 56,
    'layer2_0/conv1': 56 * 56,
    'layer2_0/conv2': 28 * 28,
    'layer2_0/downsample_0': 28 * 28,
    'layer4_2/conv3': 7 * 7,
    'fc': 1,
  },
  'resnetrs50': {'conv1_6': 80 * 80, 'maxpool_0': 40 * 40},
  'resnetrs101': {
    'conv1_0': 96 * 96,
    'conv1_6': 96 * 96,
    'maxpool_0': 48 * 48,
    'layer1_0/conv2': 48 * 48,
    'layer1_0/se/fc1': 1,
    'layer2_0/downsample_1': 24 * 24,
    'layer3_22/conv3': 12 * 12,
    'layer4_0/se/fc2': 1,
    'fc': 1,
  },
  'autoformer': {
    'enc_embedding/value_embedding/tokenConv': 96,
    'encoder/attn_layers_1/conv1': 96,
    'decoder/layers_0/self_attention/key_projection': 48 + 96,
    'decoder/layers_0/cross_attention/query_projection': 48 + 96,
    'decoder/layers_0/cross_attention/key_projection': 96,
    'decoder/layers_0/projection': 48 + 96,
    'decoder/projection': 48 + 96,
  },
}

_attention = lambda depth, features: 2 * depth * 197**2 * features
_depthwise = lambda *stages: 49 * sum(n * c * s * s for n, c, s in stages)
# Billions of multiply-adds, to the digits published: by torchvision, but for
# ViT-S (arXiv 2012.12877), ResNet-RS (2103.07579, halved) and ResNet-18 for
# CIFAR-10 (kuangliu/pytorch-cifar, as commonly measured). With what of them is
# no product with a kernel that can be low-rank.
PUBLISHED = {
  'vit_small_patch16_224': ('4.6', _attention(12, 384)),
  'vit_base_patch16_224': ('17.564', _attention(12, 768)),
  'vit_large_patch16_224': ('61.555', _attention(24, 1024)),
  'convnext_tiny': (
    '4.456',
    _depthwise((3, 96, 56), (3, 192, 28), (9, 384, 14), (3, 768, 7)),
  ),
  'resnet18': ('1.814', 0),
  'resnet18_cifar': ('0.56', 0),
  'resnet50': ('4.089', 0),
  'resnetrs50': ('2.3', 0),
  'resnetrs101': ('6.0', 0),
}


@functools.cache
def _explained(name, train=False, dtype=jnp.float32):
  """What there is to find, and the parameters of two axes or more by path."""
  model, inputs = models.create(name, dtype=dtype), models.inputs(name, _BATCH)
  variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  state = {k: x for k, x in variables.items() if k != 'params'}

  def fn(params, state, key, *inputs):
    return model.apply(
      {'params': params, **state},
      *inputs,
      train=train,
      rngs={'dropout': key},
      mutable=list(state) if train else False,
    )

  found = oialr.explain(
    fn, variables['params'], state, jax.random.key(0), *inputs
  )
  leaves = oialr.tree.flatten(variables['params'])
  return found, {path: x.shape for path, x in leaves.items() if x.ndim > 1}


def test_every_model_is_here():
  assert {*FOUND} == {*TOKENS} == {*models.NAMES}


@pytest.mark.parametrize('name', models.NAMES)
def test_every_parameter_is_a_layer_or_has_a_reason(name):
  found, shapes = _explained(name)
  paths = [layer.path for layer in found.layers]
  assert sorted([*paths, *found.reasons]) == sorted(shapes)


@pytest.mark.parametrize('name', models.NAMES)
def test_kinds_and_reasons(name):
  found, _ = _explained(name)
  kinds, reasons, _, _ = FOUND[name]
  assert collections.Counter(layer.kind for layer in found.layers) == kinds
  counts = {
    pattern: sum(
      bool(re.search(pattern, why)) for why in found.reasons.values()
    )
    for pattern in reasons
  }
  assert counts == reasons
  assert len(found.reasons) == sum(reasons.values())


@pytest.mark.parametrize('name', models.NAMES)
def test_a_kernel_is_a_layer_unless_it_is_depthwise(name):
  """In Flax its last axis is that of the outputs, with two axes it is dense."""
  found, shapes = _explained(name)
  is_kernel = lambda path: re.search(r'(^|/)kernel$', path)
  depthwise = lambda path: path.endswith('conv_dw/kernel')
  expected = {
    path: (shape, 'dot' if len(shape) == 2 else 'conv', (len(shape) - 1,))
    for path, shape in shapes.items()
    if is_kernel(path) and not depthwise(path)
  }
  assert expected == {x.path: (x.shape, x.kind, x.cols) for x in found.layers}
  for layer in found.layers:
    *rows, cols = layer.shape
    assert layer.rows == tuple(range(len(rows)))
    assert (layer.batch, layer.matrix) == ((), (math.prod(rows), cols))


@pytest.mark.parametrize('name', models.NAMES)
def test_layers_are_in_the_order_of_use_from_stem_to_head(name):
  found, _ = _explained(name)
  _, _, first, last = FOUND[name]
  assert [x.order for x in found.layers] == [*range(len(found.layers))]
  assert found.layers[0].path == f'{first}/kernel'
  assert found.layers[-1].path == f'{last}/kernel'
  blocks = [_block(layer.path) for layer in found.layers]
  blocks = [block for block in blocks if block]
  assert blocks == sorted(blocks)


def _block(path):
  """'stages_2/blocks_8/mlp/fc1/kernel', 'layer3_22/conv1/kernel': numbers."""
  found = re.findall(r'(?:blocks_|stages_|attn_layers_|layer)([\d_]+)/', path)
  return [int(n) for part in found for n in part.split('_')]


@pytest.mark.parametrize('name', models.NAMES)
def test_tokens_are_those_counted_by_hand(name):
  found, _ = _explained(name)
  tokens = {layer.path: layer.tokens for layer in found.layers}
  expected = {f'{k}/kernel': _BATCH * n for k, n in TOKENS[name].items()}
  assert {path: tokens[path] for path in expected} == expected


@pytest.mark.parametrize('name', PUBLISHED)
def test_multiply_adds_are_the_published_ones(name):
  published, other = PUBLISHED[name]
  found, _ = _explained(name)
  products = sum(x.tokens * math.prod(x.shape) for x in found.layers) / _BATCH
  digits = len(published.partition('.')[2])
  assert f'{(products + other) / 1e9:.{digits}f}' == published


@pytest.mark.parametrize('name', models.NAMES)
def test_training_and_casts_change_nothing(name):
  found, _ = _explained(name)
  other, _ = _explained(name, train=True, dtype=jnp.bfloat16)
  assert other.layers == found.layers
  assert {*other.reasons} == {*found.reasons}
