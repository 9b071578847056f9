"""Tests of the cost model, against what the compiler counts."""

import math
import re

import jax
from jax import lax
import jax.numpy as jnp
import pytest

import oialr_jax as oialr
from oialr_jax import cost
from tests import programs

# tokens, m, n, r; one a bias of T, one of r, tall and wide.
_SHAPES = [(64, 48, 40, 8), (16, 24, 72, 20), (96, 80, 32, 32), (8, 64, 64, 3)]


def _flops(step, *args) -> float:
  analysis = jax.jit(step).lower(*args).compile().cost_analysis()
  return analysis['flops']


def _step(fn):
  """Forward and backward, by all arguments, for any gradient dy."""

  def step(params, x, dy):
    y, vjp = jax.vjp(fn, params, x)
    return y, vjp(dy)

  return step


def _low_rank_step(fn, node, way):
  forward = oialr.factored(fn, contraction=way)

  def of(s, x):
    return forward(oialr.LowRank(node.u, s, node.vt, node.view), x)

  return _step(of)


def _node(layer, r):
  params = {'w': programs.normal(*layer.shape)}
  return programs.with_low_rank(params, (layer,), lambda layer: r)['w']


@pytest.mark.parametrize('tokens, m, n, r', _SHAPES)
def test_flops_of_a_dense_step(tokens, m, n, r):
  del r
  args = [
    programs.Shape(s, jnp.float32) for s in ((m, n), (tokens, m), (tokens, n))
  ]
  flops = _flops(_step(lambda w, x: x @ w), *args)
  assert flops == pytest.approx(2 * cost.dense(tokens, m, n), rel=0.05)


@pytest.mark.parametrize('way', cost.WAYS)
@pytest.mark.parametrize('tokens, m, n, r', _SHAPES)
def test_flops_of_a_low_rank_step(tokens, m, n, r, way):
  node = _node(programs.dot('w', (m, n), (0,), (1,), tokens), r)
  x, dy = (programs.Shape((tokens, k), jnp.float32) for k in (m, n))
  flops = _flops(_low_rank_step(lambda w, x: x @ w, node, way), node.s, x, dy)
  assert flops == pytest.approx(
    2 * cost.low_rank(way, tokens, m, n, r), rel=0.05
  )


@pytest.mark.parametrize('way', cost.WAYS)
def test_flops_of_a_convolution(way):
  """Tokens are places in the image that comes out; m = height width channels.

  Without overlap of the windows all of the image is used, so that dx, too, is
  what the model takes it for.
  """
  fn = lambda w, x: lax.conv_general_dilated(
    x, w, (2, 2), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  layer = programs.conv('w', (2, 2, 12, 40), (0, 1, 2), (3,), 4 * 16)
  node = _node(layer, 8)
  x = programs.Shape((4, 8, 8, 12), jnp.float32)
  dy = programs.Shape((4, 4, 4, 40), jnp.float32)
  flops = _flops(_low_rank_step(fn, node, way), node.s, x, dy)
  expected = 2 * cost.low_rank(way, layer.tokens, 48, 40, 8)
  assert flops == pytest.approx(expected, rel=0.05)


def _grouped(w, x):
  """No window overlaps with another, as above."""
  return lax.conv_general_dilated(
    x,
    w,
    (2, 2),
    'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=x.shape[-1] // w.shape[2],
  )


# A function, what it takes, and the one layer that it has.
_IN_BLOCKS = {
  'grouped': (
    _grouped,
    (4, 8, 8, 36),
    programs.conv('w', (2, 2, 12, 120), (0, 1, 2), (3,), 64, blocks=3),
  ),
  'depthwise': (
    _grouped,
    (4, 8, 8, 6),
    programs.conv('w', (2, 2, 1, 24), (0, 1, 2), (3,), 64, blocks=6),
  ),
  'chunks': (
    lambda w, x: x @ w,
    (64, 48),
    oialr.Layer('w', (48, 120), (0,), (1,), tokens=64, blocks=3),
  ),
  'heads': (
    lambda w, x: jnp.einsum('te,eqhd->tqhd', x, w),
    (64, 48),
    oialr.Layer('w', (48, 3, 2, 20), (0,), (1, 2, 3), tokens=64, blocks=6),
  ),
  'out_in': (
    lambda w, x: x @ w.T,
    (64, 48),
    oialr.Layer('w', (120, 48), (1,), (0,), tokens=64, blocks=3),
  ),
  'experts': (
    lambda w, x: jnp.einsum('btm,bmn->btn', x, w),
    (2, 64, 48),
    oialr.Layer('w', (2, 48, 80), (1,), (2,), (0,), tokens=64, blocks=2),
  ),
}


def _block_step(kind, way, r):
  fn, x, layer = _IN_BLOCKS[kind]
  node = _node(layer, r)
  x, w = (programs.Shape(s, jnp.float32) for s in (x, layer.shape))
  dy = jax.eval_shape(fn, w, x)
  return _low_rank_step(fn, node, way), (node.s, x, dy), layer


@pytest.mark.parametrize('kind', _IN_BLOCKS)
def test_layers_in_blocks_are_what_is_found(kind):
  fn, x, layer = _IN_BLOCKS[kind]
  params = {'w': programs.Shape(layer.shape, jnp.float32)}
  read = lambda p, x: fn(p['w'], x)
  (found,) = oialr.find_layers(read, params, programs.Shape(x, jnp.float32))
  if found.blocks == 1:
    (found,) = oialr.split([found], {'w': layer.blocks})
  assert found == layer


@pytest.mark.parametrize('kind', _IN_BLOCKS)
def test_factored_goes_the_way_that_a_layer_says(kind):
  fn, x, layer = _IN_BLOCKS[kind]
  x = programs.Shape(x, jnp.float32)
  program = lambda way, node: str(
    jax.make_jaxpr(oialr.factored(fn, contraction=way))(node, x)
  )
  for r in (1, layer.max_rank // 2, layer.max_rank):
    node = _node(layer, r)
    ways = {way: program(way, node) for way in cost.WAYS}
    assert len({*ways.values()}) == 3
    assert program('auto', node) == ways[layer.way(r)]


def _recurrent(w, xs):
  def step(h, x):
    h = jnp.tanh(h @ w + x)
    return h, h

  return lax.scan(step, jnp.zeros_like(xs[0]), xs)[1]


def _recurrent_stack(w, xs):
  return lax.scan(lambda xs, w: (_recurrent(w, xs), None), xs, w)[0]


def _siamese(w, xs):
  return jnp.tanh(xs[0] @ w), jnp.tanh(xs[1:] @ w)


def _transposed(w, xs):
  return lax.scan(lambda x, _: (jnp.tanh(x @ w.T), None), xs, length=3)[0]


def _shared_in_blocks(w, x):
  """Each of the layers of a scan uses its kernel twice."""
  return lax.scan(lambda x, w: (jnp.tanh(jnp.tanh(x @ w) @ w), None), x, w)[0]


@jax.custom_vjp
def _clipped(x, w):
  return x @ w


_clipped.defvjp(
  lambda x, w: (x @ w, (x, w)),
  lambda saved, dy: (0.5 * (dy @ saved[1].T), saved[0].T @ dy),
)


def _partly_custom(w, xs):
  """One of the two products wants the kernel as it is."""
  return _clipped(xs[0], w), xs[1:] @ w


# Kernels that several products use: the program, the kernel, x, and all tokens.
_SHARED = {
  'recurrent': (_recurrent, (32, 32), (50, 2, 32), 100),
  'recurrent_stack': (_recurrent_stack, (3, 32, 32), (50, 2, 32), 100),
  'siamese': (_siamese, (32, 24), (5, 20, 32), 100),
  'transposed': (_transposed, (32, 32), (40, 32), 120),
  'shared_in_blocks': (_shared_in_blocks, (3, 32, 32), (50, 32), 100),
  'partly_custom': (_partly_custom, (32, 24), (5, 20, 32), 100),
}


def _multiply_adds(jaxpr) -> int:
  """In the products of a program, as often as scans make them."""
  total = 0
  for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    if eqn.primitive.name == 'dot_general':
      contracted, _ = eqn.params['dimension_numbers'][0]
      shape = eqn.invars[0].aval.shape
      total += eqn.outvars[0].aval.size * math.prod(
        shape[i] for i in contracted
      )
    for inner in jax.tree.leaves(list(eqn.params.values())):
      if hasattr(getattr(inner, 'jaxpr', inner), 'eqns'):
        total += eqn.params.get('length', 1) * _multiply_adds(inner)
  return total


@pytest.mark.parametrize('rank', [4, 20, 24, 30, 32])
@pytest.mark.parametrize('kind', _SHARED)
def test_products_that_share_a_kernel_cost_what_its_layer_says(kind, rank):
  fn, shape, x, tokens = _SHARED[kind]
  w, x = (programs.Shape(s, jnp.float32) for s in (shape, x))
  read = lambda p, x: fn(p['w'], x)
  (layer,) = oialr.find_layers(read, {'w': w}, x)
  assert layer.tokens == tokens
  rank = min(rank, layer.max_rank)
  node, dy = _node(layer, rank), jax.eval_shape(fn, w, x)
  count = lambda step, *args: _multiply_adds(jax.make_jaxpr(step)(*args, x, dy))
  found = oialr.explain([layer], ranks=rank).totals
  assert count(_step(fn), w) == found['multiply_adds']
  auto = _low_rank_step(fn, node, 'auto')
  assert count(auto, node.s) == found['multiply_adds_low_rank']
  # Whatever is asked for is done once, where it can be done.
  for way in [cost.MATERIALISE] if layer.multiplied_out else cost.WAYS:
    expected = layer.stack * cost.low_rank(way, tokens, *layer.matrix, rank)
    assert count(_low_rank_step(fn, node, way), node.s) == expected


@pytest.mark.parametrize('kind', _IN_BLOCKS)
def test_flops_of_a_dense_kernel_in_blocks(kind):
  fn, x, layer = _IN_BLOCKS[kind]
  x, w = (programs.Shape(s, jnp.float32) for s in (x, layer.shape))
  flops = _flops(_step(fn), w, x, jax.eval_shape(fn, w, x))
  assert flops == pytest.approx(2 * layer.multiply_adds(), rel=0.05)
  forward = _flops(fn, w, x)
  assert forward == pytest.approx(layer.flops, rel=0.05)


@pytest.mark.parametrize('way', cost.WAYS)
@pytest.mark.parametrize('kind', _IN_BLOCKS)
def test_flops_of_a_kernel_in_blocks(kind, way):
  r = 2 if kind == 'depthwise' else 8
  step, args, layer = _block_step(kind, way, r)
  work = cost.low_rank(way, layer.tokens, *layer.matrix, r)
  flops = _flops(step, *args)
  assert flops == pytest.approx(2 * layer.stack * work, rel=0.05)


@pytest.mark.parametrize('kind', _IN_BLOCKS)
def test_a_compiled_step_holds_no_kernel_in_blocks(kind):
  def sizes(way):
    step, args, _ = _block_step(kind, way, 2)
    text = jax.jit(step).lower(*args).compile().as_text()
    shapes = re.findall(r'f32\[([\d,]+)\]', text)
    return {math.prod(map(int, shape.split(','))) for shape in shapes}

  kernel = math.prod(_IN_BLOCKS[kind][-1].shape)
  assert kernel not in sizes('factors')
  assert kernel not in sizes('precontract')
  assert kernel in sizes('materialise')


def test_a_low_rank_step_saves_what_the_model_says():
  """The ranks of the paper: a quarter of min(m, n) takes under half."""
  tokens, m, n, r = 64, 64, 64, 16
  low_rank = cost.low_rank(cost.cheapest(tokens, m, n, r), tokens, m, n, r)
  assert low_rank < 0.5 * cost.dense(tokens, m, n)


@pytest.mark.parametrize('tokens', [1, 7, 64, 5000])
@pytest.mark.parametrize('m, n', [(12, 40), (40, 12), (32, 32)])
def test_cheapest_is_the_least(tokens, m, n):
  for r in range(1, min(m, n) + 1):
    costs = [cost.low_rank(way, tokens, m, n, r) for way in cost.WAYS]
    way = cost.cheapest(tokens, m, n, r)
    assert cost.low_rank(way, tokens, m, n, r) == min(costs)


def test_every_way_is_the_cheapest_of_some_layer():
  """Few tokens or a low rank: factors. Near full rank: the kernel."""
  assert cost.cheapest(10**4, 512, 512, 32) == cost.FACTORS
  assert cost.cheapest(10**4, 512, 512, 512) == cost.MATERIALISE
  assert cost.cheapest(10**4, 768, 256, 192) == cost.PRECONTRACT
  assert cost.cheapest(4, 512, 512, 512) == cost.FACTORS


# At (15, 19) and (30, 38) the two sides are equal for some rank.
_MATRICES = [(m, n) for m in (1, 2, 8, 15, 30, 147) for n in (1, 2, 5, 19, 38)]


def _largest(fits, upper) -> int:
  return max((r for r in range(upper + 1) if fits(r)), default=0)


@pytest.mark.parametrize('m, n', _MATRICES)
def test_break_even_of_time(m, n):
  """Up to it, and not beyond it, factors take no more than the kernel."""
  fits = lambda r: (
    cost.low_rank(cost.FACTORS, 1, m, n, r) <= cost.dense(1, m, n)
  )
  assert cost.break_even_time(m, n) == _largest(fits, min(m, n))


@pytest.mark.parametrize('m, n', _MATRICES)
def test_break_even_of_storage(m, n):
  fits = lambda r: r * (m + r + n) <= m * n
  assert cost.break_even_storage(m, n) == _largest(fits, max(m, n))


def test_an_unknown_way_is_refused():
  with pytest.raises(ValueError, match="way='fast': must be one of factors, "):
    cost.low_rank('fast', 1, 2, 3, 1)
