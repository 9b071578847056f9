"""Tests of what is read from a model's own jaxpr."""

import dataclasses
import math
import re

from flax import nnx
import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oialr_jax as oialr
from oialr_jax import cost
from oialr_jax import layers as layers_lib
from tests import programs


@pytest.mark.parametrize('name', programs.PROGRAMS)
def test_find_layers_reads_the_program(name):
  """Paths, axes, kinds, tokens, order: all that is said."""
  p = programs.PROGRAMS[name]()
  assert oialr.find_layers(p.fn, p.params, *p.args) == p.layers


@pytest.mark.parametrize('name', programs.ODD_PROGRAMS)
def test_explain_says_why_a_kernel_stays_dense(name):
  p = programs.ODD_PROGRAMS[name]()
  found = oialr.explain(p.fn, p.params, *p.args)
  assert found.layers == p.layers
  assert set(found.reasons) == set(p.reasons)
  for path, pattern in p.reasons.items():
    assert re.search(pattern, found.reasons[path]), path


def test_find_layers_on_arrays_shapes_and_low_rank_leaves_alike():
  p = programs.PROGRAMS['rematerialised']()
  arrays = programs.values(p.params)
  low_rank = programs.with_low_rank(arrays, p.layers, lambda layer: 2)
  for params in (arrays, low_rank):
    assert oialr.find_layers(p.fn, params, *p.args) == p.layers
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p.args
  )
  assert oialr.find_layers(p.fn, p.params, *shapes) == p.layers


def test_find_layers_of_a_model_that_fits_no_memory():
  """175 billion parameters, of which not one is allocated."""
  layers, width, vocabulary, tokens = 96, 12288, 50257, 2048
  params = {
    'embedding': programs.Shape((vocabulary, width), jnp.float32),
    'blocks': programs.shapes(
      qkv=(layers, width, 3, 96, 128),
      out=(layers, 96, 128, width),
      up=(layers, width, 4 * width),
      down=(layers, 4 * width, width),
    ),
    'head': programs.Shape((width, vocabulary), jnp.float32),
  }

  def block(x, p):
    q, k, v = jnp.einsum('te,eqhd->qthd', x, p['qkv'])
    scores = jax.nn.softmax(jnp.einsum('thd,shd->hts', q, k))
    x += jnp.einsum('hts,shd,hde->te', scores, v, p['out'])
    return x + jax.nn.gelu(x @ p['up']) @ p['down'], None

  def fn(p, tokens):
    x = p['embedding'][tokens].astype(jnp.bfloat16)
    blocks = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p['blocks'])
    return lax.scan(jax.checkpoint(block), x, blocks)[0] @ p['head']

  found = oialr.find_layers(fn, params, programs.Shape((tokens,), jnp.int32))
  assert [layer.path.split('/')[-1] for layer in found] == [
    *('qkv', 'out', 'up', 'down', 'head')
  ]
  assert {layer.tokens for layer in found} == {tokens}
  assert [layer.stack for layer in found] == 4 * [layers] + [1]
  assert sum(layer.stack * math.prod(layer.matrix) for layer in found) > 174e9
  assert found[0].matrix == (width, 3 * width)
  assert found[1].rows == (1, 2)


def test_find_layers_reads_a_partitioned_model_under_a_mesh():
  """Flax puts sharding constraints on such kernels, which are hints."""
  init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, 'data'))
  model = nn.Dense(9, kernel_init=init)
  x = programs.normal(5, 8)
  auto = jax.sharding.AxisType.Auto
  with jax.set_mesh(jax.make_mesh((1,), ('data',), axis_types=(auto,))):
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    (layer,) = oialr.find_layers(model.apply, params, x)
  assert layer.path == 'params/kernel/value'
  assert (layer.rows, layer.cols, layer.tokens) == ((0,), (1,), 5)


def test_find_layers_by_keyword_and_by_position():
  fn = lambda p, x, *, y, twice: (x @ p['a'], y @ p['b'] if twice else y)
  params = programs.shapes(a=(8, 6), b=(7, 6))
  args = programs.normal(5, 8)
  kwargs = {'y': programs.normal(3, 7), 'twice': True}
  found = oialr.find_layers(fn, params, args, **kwargs)
  assert [(layer.path, layer.tokens) for layer in found] == [('a', 5), ('b', 3)]
  kwargs['twice'] = False
  assert oialr.explain(fn, params, args, **kwargs).reasons == {
    'b': 'not used by the function'
  }


def test_find_layers_of_the_gradient_too():
  """The backward pass sees W^T: the kernel is then used in two roles."""
  loss = lambda p, x: jnp.sum(jnp.tanh(x @ p['a']) @ p['b'])
  params, x = programs.shapes(a=(8, 6), b=(6, 5)), programs.normal(5, 8)
  step = lambda p, x: jax.grad(loss)(p, x)
  (layer,) = oialr.find_layers(step, params, x)
  assert (layer.path, layer.rows, layer.tokens) == ('a', (0,), 5)


@pytest.mark.parametrize(
  'groups, m, n', [(1, 54, 8), (2, 27, 4), (3, 18, 5), (4, 9, 2)]
)
def test_find_layers_gives_every_group_its_matrix(groups, m, n):
  """A depthwise convolution has as many groups as channels."""
  x = programs.normal(2, 5, 5, m // 9 * groups)
  model = nn.Conv(n * groups, (3, 3), feature_group_count=groups)
  params = jax.eval_shape(model.init, jax.random.key(0), x)
  (layer,) = oialr.find_layers(model.apply, params, x)
  assert layer.path == 'params/kernel'
  assert (layer.blocks, layer.stack, layer.matrix) == (groups, groups, (m, n))
  assert (layer.rows, layer.cols, layer.kind) == ((0, 1, 2), (3,), 'conv')
  assert (layer.tokens, layer.max_rank) == (2 * 5 * 5, n)
  assert layer.flops == 2 * (2 * 5 * 5) * (3 * 3) * (x.shape[-1] // groups) * (
    n * groups
  )


def test_a_kernel_of_two_groupings_has_no_matrix():
  def fn(p, x):
    numbers = ('NWC', 'WIO', 'NWC')
    convolve = lambda x, groups: lax.conv_general_dilated(
      x, p['w'], (1,), 'SAME', (1,), (1,), numbers, feature_group_count=groups
    )
    return convolve(x, 2), convolve(x[..., :2], 1)

  args = programs.shapes(w=(3, 2, 6)), programs.normal(2, 5, 4)
  assert oialr.explain(fn, *args).reasons == {
    'w': 'used in different roles (tied)'
  }


def test_multiplied_out_names_what_is_around_the_product():
  """Also where only one of several products is within a custom rule."""
  custom = jax.custom_jvp(lambda x, w: jnp.tanh(x @ w))
  custom.defjvp(lambda primals, tangents: (custom(*primals), tangents[0]))

  def fn(p, x):
    x = jax.jit(custom)(x, p['a']) @ p['b']
    scan = lambda x, w: (custom(x, w), None)
    return lax.scan(scan, x @ p['a'], p['stack'])[0]

  params = programs.shapes(a=(8, 8), b=(8, 8), stack=(3, 8, 8))
  found = oialr.find_layers(fn, params, programs.normal(5, 8))
  a, b, stack = found
  assert re.match('custom_jvp', a.multiplied_out)
  assert b.multiplied_out == ''
  assert stack.multiplied_out == a.multiplied_out
  assert [layer.way(2) for layer in found] == [
    cost.MATERIALISE,
    cost.FACTORS,
    cost.MATERIALISE,
  ]
  tokens, m, n, r = 5, 8, 8, 2
  assert b.multiply_adds(r) == cost.low_rank('factors', tokens, m, n, r)
  assert stack.multiply_adds(r) == 3 * cost.low_rank(
    'materialise', tokens, m, n, r
  )


def test_a_layer_costs_what_the_model_says_of_all_its_matrices():
  layer = oialr.Layer(
    'w', (3, 40, 64), (1,), (2,), (0,), tokens=500, order=0, blocks=4
  )
  assert (layer.stack, layer.matrix, layer.max_rank) == (12, (40, 16), 16)
  assert layer.flops == 2 * 500 * 3 * 40 * 64
  assert layer.multiply_adds() == 3 * 500 * 3 * 40 * 64
  for rank in (2, 10, 16):
    way = cost.cheapest(500, 40, 16, rank)
    assert layer.way(rank) == way
    assert layer.multiply_adds(rank) == 12 * cost.low_rank(
      way, 500, 40, 16, rank
    )
  assert {layer.way(rank) for rank in (2, 10, 16)} == {*cost.WAYS}


def test_layer_is_a_value():
  layer = programs.dot('w', (2, 3, 8, 4), (0, 3), (2,), 5, batch=(1,))
  assert layer.matrix == (8, 8)
  assert (layer.stack, layer.max_rank) == (3, 8)
  assert layer.view == oialr.MatrixView((0, 3), (2,), (1,))
  assert hash(layer) == hash(dataclasses.replace(layer))
  with pytest.raises(dataclasses.FrozenInstanceError):
    layer.tokens = 1
  leading = programs.dot('w', (3, 2, 8, 4), (2,), (3,), 5, batch=(0, 1))
  assert leading.view == oialr.MatrixView((0,), (1,))
  heads = oialr.Layer('w', (3, 8, 3, 4, 5), (1,), (2, 3, 4), (0,), blocks=6)
  assert heads.view == oialr.MatrixView(
    (0,), (2, 4, 5), (1, 3), blocks=(1, 3, 2, 1)
  )


# Selection.

# In order of use, which is not that of the paths: a wide stem, a square
# kernel, a tall one and a small head.
_LAYERS = (
  programs.dot('stem', (12, 120), (0,), (1,), 1, 0),
  programs.dot('block/attention', (64, 64), (0,), (1,), 1, 1),
  programs.dot('block/mlp', (96, 24), (0,), (1,), 1, 2),
  programs.dot('a_head', (64, 4), (0,), (1,), 1, 3),
)


def _selected(layers=_LAYERS, **kwargs):
  kwargs = {'keep_last': False, 'min_rank': 1} | kwargs
  return [layer.path for layer in oialr.select(layers, **kwargs)]


def test_select_keeps_the_last_layer_dense_by_default():
  stem, attention, mlp, _ = _LAYERS
  assert oialr.select(_LAYERS) == (stem, attention, mlp)
  assert _selected() == [layer.path for layer in _LAYERS]


def test_select_decides_on_first_and_last_before_it_filters():
  """A head too small to be selected is still the last layer."""
  assert _selected(keep_last=True, min_rank=8) == [
    *('stem', 'block/attention', 'block/mlp')
  ]
  assert _selected(keep_last=True, exclude='head') == [
    *('stem', 'block/attention', 'block/mlp')
  ]
  assert _selected(keep_first=True, exclude='stem') == [
    *('block/attention', 'block/mlp', 'a_head')
  ]
  assert _selected(keep_first=True, keep_last=True) == [
    *('block/attention', 'block/mlp')
  ]


def test_a_head_of_one_output_is_the_last_layer():
  def value(params, x):
    return jnp.tanh(jnp.tanh(x @ params['a']) @ params['b']) @ params['head']

  shapes = {'a': (8, 16), 'b': (16, 12), 'head': (12, 1)}
  params = {k: jnp.ones(shape) for k, shape in shapes.items()}
  found = oialr.find_layers(value, params, jnp.ones((4, 8)))
  assert [layer.path for layer in found] == ['a', 'b']
  assert _selected(found, keep_last=True) == ['a', 'b']
  # Without it, b is the last one.
  headless = lambda params, x: jnp.tanh(x @ params['a']) @ params['b']
  found = oialr.find_layers(headless, params, jnp.ones((4, 8)))
  assert _selected(found, keep_last=True) == ['a']


def test_select_goes_by_the_order_of_use():
  shuffled = [_LAYERS[i] for i in (2, 3, 0, 1)]
  assert _selected(shuffled, keep_first=True, keep_last=True) == [
    *('block/attention', 'block/mlp')
  ]
  assert _selected(iter(shuffled)) == [layer.path for layer in _LAYERS]


def test_select_by_path():
  assert _selected(include='block') == ['block/attention', 'block/mlp']
  assert _selected(include='^a_|mlp$') == ['block/mlp', 'a_head']
  assert _selected(exclude='block') == ['stem', 'a_head']
  assert _selected(include='block', exclude='mlp') == ['block/attention']


def test_select_takes_parameters_that_are_one_kernel():
  apply, kernel = lambda w, x: x @ w, programs.normal(9, 8)
  layers = oialr.find_layers(apply, kernel, programs.normal(5, 9))
  assert oialr.select(layers, keep_last=False) == layers


def test_select_by_rank_and_aspect():
  assert _selected(min_rank=5) == ['stem', 'block/attention', 'block/mlp']
  assert _selected(min_rank=24) == ['block/attention', 'block/mlp']
  assert _selected(min_rank=25) == ['block/attention']
  # Exclusive: the stem's is 10, the tall kernel's 4.
  assert _selected(max_aspect=10.1) == ['stem', 'block/attention', 'block/mlp']
  assert _selected(max_aspect=10) == ['block/attention', 'block/mlp']
  assert _selected(max_aspect=4) == ['block/attention']


@pytest.mark.parametrize(
  'kwargs, message',
  [
    ({'include': '('}, r"include='\(': not a regular expression"),
    ({'exclude': '['}, r"exclude='\[': not a regular expression"),
    ({'min_rank': 0}, 'min_rank=0: must be at least 1'),
    ({'max_aspect': 1}, 'max_aspect=1: must be greater than 1'),
    ({'max_aspect': 0.5}, 'max_aspect=0.5: must be greater than 1'),
    (
      {'include': 'x'},
      r"none of the 4 layers is selected: .*include='x'.*`explain`",
    ),
    ({'min_rank': 65}, 'none of the 4 layers is selected: .*min_rank=65'),
    ({'max_aspect': 1.01, 'min_rank': 65}, 'selected: .*max_aspect=1.01'),
  ],
)
def test_select_refuses(kwargs, message):
  with pytest.raises(ValueError, match=message):
    oialr.select(_LAYERS, **kwargs)


def test_select_refuses_to_leave_nothing():
  with pytest.raises(ValueError, match='layers is empty'):
    oialr.select([])
  with pytest.raises(ValueError, match='none of the 1 layers .*keep_last=True'):
    oialr.select(_LAYERS[:1])


# Blocks.

_QKV = (
  programs.dot('0/qkv', (8, 24), (0,), (1,), 5, 0),
  programs.dot('0/out', (8, 8), (0,), (1,), 5, 1),
  programs.dot('1/qkv', (8, 3, 2, 4), (0,), (1, 2, 3), 5, 2),
)


def test_split_gives_the_parts_of_fused_kernels_matrices_of_their_own():
  layers = oialr.split(_QKV, {'qkv': 3})
  assert [layer.blocks for layer in layers] == [3, 1, 3]
  assert [layer.stack for layer in layers] == [3, 1, 3]
  assert [layer.matrix for layer in layers] == [(8, 8)] * 3
  unsplit = [dataclasses.replace(layer, blocks=1) for layer in layers]
  assert (*unsplit,) == _QKV
  assert oialr.split(iter(_QKV), {}) == _QKV


def test_split_takes_the_first_pattern_that_matches():
  layers = oialr.split(_QKV, {'^1/': 6, 'qkv': 3, 'out$': np.int64(2)})
  assert [layer.blocks for layer in layers] == [3, 2, 6]
  assert [layer.matrix for layer in layers] == [(8, 8), (8, 4), (8, 4)]


@pytest.mark.parametrize(
  'sizes, fit',
  [
    ((12,), {1, 2, 3, 4, 6, 12}),
    ((3, 4), {1, 3, 6, 12}),
    ((4, 3), {1, 2, 4, 12}),
    ((1, 6), {1, 2, 3, 6}),
    ((4, 1, 2, 3), {1, 2, 4, 8, 24}),
  ],
)
def test_blocks_are_runs_of_columns_in_memory(sizes, fit):
  """Of equal length, and none with a part of an axis and a part of the next."""
  shape, cols = (8, *sizes), tuple(range(1, len(sizes) + 1))
  layer = programs.dot('w', shape, (0,), cols, 5)
  columns = math.prod(sizes)
  kernel = np.arange(8 * columns).reshape(shape)
  for n in range(1, columns + 2):
    if n not in fit:
      message = rf"'w': columns of sizes {re.escape(str(sizes))} do not fall "
      with pytest.raises(ValueError, match=message + f'into {n} equal blocks'):
        oialr.split([layer], {'w': n})
      continue
    (found,) = oialr.split([layer], {'w': n})
    assert (found.stack, found.matrix) == (n, (8, columns // n))
    blocks = np.split(kernel.reshape(8, columns), n, axis=1)
    np.testing.assert_array_equal(found.view.to_matrix(kernel), blocks)


@pytest.mark.parametrize(
  'blocks, error, message',
  [
    ({'kqv': 3}, ValueError, "blocks='kqv': matches none of the 3 layers"),
    ({'(': 3}, ValueError, r"blocks='\(': not a regular expression"),
    (
      {'0/qkv': 5},
      ValueError,
      r"'0/qkv': .* sizes \(24,\) do not .* into 5 eq",
    ),
    ({'qkv': 0}, ValueError, 'do not fall into 0 equal blocks'),
    ({'qkv': -3}, ValueError, 'do not fall into -3 equal blocks'),
    ({'qkv': 3.0}, TypeError, r"blocks\['qkv'\]=3.0: must be an int"),
    ({'qkv': True}, TypeError, r"blocks\['qkv'\]=True: must be an int"),
    (3, TypeError, 'blocks=3: must be a mapping from patterns of paths'),
  ],
)
def test_split_refuses(blocks, error, message):
  with pytest.raises(error, match=message):
    oialr.split(_QKV, blocks)


def test_split_refuses_what_is_in_blocks_already():
  grouped = programs.conv('w', (3, 2, 8), (0, 1), (2,), 5, blocks=4)
  with pytest.raises(ValueError, match="'w': is in 4 blocks already"):
    oialr.split([grouped], {'w': 2})


def test_select_goes_by_the_matrices_of_blocks():
  layers = oialr.split(_QKV, {'0/qkv': 6, '1/qkv': 3})
  assert _selected(layers, min_rank=5) == ['0/out', '1/qkv']
  assert _selected(layers, max_aspect=2) == ['0/out', '1/qkv']


# Ranks.


def test_ranks_of_layers():
  layers = oialr.split(_QKV, {'0/qkv': 6, '1/qkv': 3})
  of = lambda rank: tuple(layers_lib.ranks_of(layers, rank).values())
  assert [*layers_lib.ranks_of(layers, None)] == ['0/qkv', '0/out', '1/qkv']
  assert of(None) == (4, 8, 8)
  assert of(3) == (3, 3, 3)
  assert of(0.5) == (2, 4, 4)
  assert of(0.01) == (1, 1, 1)
  assert of({'0/out': 5}) == (4, 5, 8)
  for rank, error, message in (
    (5, ValueError, r"'0/qkv': rank 5 exceeds .* 4 of its \(8, 4\) matrix"),
    ({'out': 2}, ValueError, "'out': no such layer; the tree has 3: '0/qkv'"),
    ({'0/out': 'x'}, TypeError, "'0/out': rank='x' must be an int, a float"),
  ):
    with pytest.raises(error, match=message):
      of(rank)


def test_modules_that_change_their_own_state():
  """The recipe of README.md, with what it is for: keys and statistics."""

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.first = nnx.Linear(8, 9, rngs=rngs)
      self.norm = nnx.BatchNorm(9, rngs=rngs)
      self.drop = nnx.Dropout(0.1, rngs=rngs)
      self.head = nnx.Linear(9, 7, rngs=rngs)

    def __call__(self, x):
      return self.head(self.drop(nnx.relu(self.norm(self.first(x)))))

  graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
  apply = lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)
  x = programs.normal(5, 8)
  layers = oialr.find_layers(apply, params, x)
  assert [layer.path.split('/')[0] for layer in layers] == ['first', 'head']
  low = oialr.to_lowrank(params, layers)
  found = jax.jit(oialr.factored(apply))(low, x)
  np.testing.assert_allclose(found, apply(params, x), rtol=1e-4, atol=1e-5)


# What is summed up besides, as in a penalty.

_PENALTIES = {
  'squares': lambda w: jnp.sum(w**2),
  'product': lambda w: jnp.sum(w * w),
  'absolutes': lambda w: jnp.abs(w).sum(),
  'vdot': lambda w: jnp.vdot(w, w),
  'norm': jnp.linalg.norm,
  'of_columns': lambda w: jnp.sqrt(jnp.sum(jnp.square(w), axis=0)).sum(),
  'from_ones': lambda w: jnp.sum(0.5 * (w.T - jnp.ones_like(w.T)) ** 2),
  'largest': lambda w: jnp.max(jnp.abs(w)),
  'under_jit': jax.jit(optax.tree.norm),
}


@pytest.mark.parametrize('penalty', _PENALTIES.values(), ids=_PENALTIES)
def test_kernels_may_be_summed_up_besides(penalty):
  """The penalty comes first, and last the kernel whose product comes first."""

  def loss(p, x):
    other = penalty(p['a']) + penalty(p['b'])
    return jnp.mean(jnp.tanh(x @ p['b']) @ p['a']) + 0.1 * other

  params = {
    'a': programs.normal(9, 8, seed=1),
    'b': programs.normal(8, 9, seed=2),
  }
  x = programs.normal(5, 8)
  layers = oialr.find_layers(loss, params, x)
  assert layers == (
    programs.dot('b', (8, 9), (0,), (1,), 5),
    programs.dot('a', (9, 8), (0,), (1,), 5, order=1),
  )
  low = oialr.to_lowrank(params, layers, rank=3)
  gradient = jax.grad(
    lambda t: oialr.factored(loss)(oialr.with_trainable(low, t), x)
  )(oialr.trainable(low))
  dense = jax.grad(loss)(oialr.to_dense(low), x)
  for path, node in low.items():
    expected = node.u.T @ dense[path] @ node.vt.T
    np.testing.assert_allclose(gradient[path], expected, atol=1e-5)


@pytest.mark.parametrize(
  ('fn', 'why'),
  [
    (lambda p, x: jnp.sum(p['w'] ** 2), 'consumed by integer_pow'),
    (lambda p, x: jnp.sum(p['w']), 'consumed by reduce_sum'),
    (lambda p, x: x @ p['w'] ** 2, 'consumed by integer_pow'),
    (lambda p, x: (x @ p['w'], p['w'] ** 2), 'consumed by integer_pow'),
    (lambda p, x: (x @ p['w'], jnp.tanh(1 + p['w'])), 'consumed by add'),
    (lambda p, x: (x @ p['w'], p['w'] @ p['w'].T), 'multiplied with another'),
    (
      lambda p, x: (x @ p['w'], x @ lax.reduce_precision(p['w'], 5, 4)),
      'consumed by reduce_precision',
    ),
  ],
)
def test_kernels_are_no_layers_where_more_becomes_of_them(fn, why):
  found = oialr.explain(fn, programs.shapes(w=(8, 8)), programs.normal(5, 8))
  assert not found.layers
  assert found.reasons['w'].startswith(why)


# Bad input.


@pytest.mark.parametrize('read', [oialr.find_layers, oialr.explain])
def test_empty_parameters_are_refused(read):
  for params in ({}, None, [{}, ()]):
    with pytest.raises(ValueError, match='params has no leaves'):
      read(lambda p, x: x, params, 1.0)


def test_a_function_without_kernels_is_refused():
  with pytest.raises(ValueError, match='it uses no parameter of two axes'):
    oialr.find_layers(lambda p, x: p['b'] + x, programs.shapes(b=(3,)), 1.0)
  embedding = lambda p, i: p['w'][i]
  message = r"no kernel that can be low-rank \('w': consumed by gather\)"
  with pytest.raises(ValueError, match=message):
    oialr.find_layers(embedding, programs.shapes(w=(7, 6)), np.array([1, 2]))


def test_what_is_no_function_is_refused():
  with pytest.raises(TypeError, match='fn=3: must be a function'):
    oialr.find_layers(3, programs.shapes(w=(8, 6)))


def test_errors_of_the_function_come_through():
  p = programs.PROGRAMS['mlp']()
  wrong = p.params | {'b': programs.shapes(w=(8, 7), b=(7,))}
  with pytest.raises(TypeError, match='contracting dimensions'):
    oialr.find_layers(p.fn, wrong, *p.args)
  with pytest.raises(KeyError, match='b'):
    oialr.find_layers(p.fn, {'a': p.params['a']}, *p.args)
