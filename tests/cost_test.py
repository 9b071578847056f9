"""Tests of the cost model, against what the compiler counts."""

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
