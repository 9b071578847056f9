"""Tests of what is read from a model's own jaxpr."""

import dataclasses
import math
import re

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import cost
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
    ({'include': 'x'}, r"none of the 4 layers is selected: .*include='x'"),
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


# Explanation.


def test_explain_prints_a_table():
  p = programs.PROGRAMS['experts']()
  params = p.params | programs.shapes(unused=(3, 4), bias=(4,))
  header, *rows = str(oialr.explain(p.fn, params, *p.args)).splitlines()
  columns = re.split(r'  +', header)
  assert columns[0] == 'path' and columns[-1] == 'low-rank'
  leading, inner, unused = (re.split(r'  +', row) for row in rows)
  even = f'{cost.break_even_time(8, 9)}, {cost.break_even_storage(8, 9)}'
  mflop = f'{2e-6 * 3 * 4 * 8 * 9:.3g}'
  assert leading == [
    *('leading', '(3, 8, 9)', '3 x 8 x 9', 'dot', '4', mflop, even, 'yes')
  ]
  assert inner[:3] == ['inner', '(9, 3, 5)', '3 x 9 x 5']
  assert unused == ['unused', 'not used by the function']


def test_explain_of_layers():
  assert oialr.explain(_LAYERS) == oialr.Explanation(_LAYERS, {})
  assert oialr.explain(iter(_LAYERS)).layers == _LAYERS
  assert len(str(oialr.explain(_LAYERS)).splitlines()) == 5


def test_explain_of_a_stack_without_layers():
  fn = lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p['w'])[0]
  (layer,) = oialr.explain(
    fn, programs.shapes(w=(0, 8, 8)), programs.normal(5, 8)
  ).layers
  assert (layer.stack, layer.tokens) == (0, 0)


def test_explain_finds_nothing_without_an_error():
  found = oialr.explain(lambda p, x: x + p['w'], {'w': np.ones((3, 4))}, 1.0)
  assert found == oialr.Explanation((), {'w': 'consumed by add'})


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
