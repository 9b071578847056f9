"""Tests of kernels on their way to a product, and of the chain that it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import lowrank
from oialr_jax import products
from oialr_jax import views
from tests import kernels

_KINDS = pytest.mark.parametrize(
  'layer', kernels.LAYERS, ids=lambda layer: layer.path
)


def _node(layer, rank=2, dtype='float32'):
  rng, (m, n), b = np.random.default_rng(0), layer.matrix, layer.stack
  shapes = (b, m, rank), (b, rank, rank), (b, rank, n)
  return kernels.node(
    layer, *map(rng.normal, [0] * 3, [1] * 3, shapes), dtype=dtype
  )


def _kernel(path, way=products.AUTO, **kwargs):
  return products.enter(_node(kernels.BY_PATH[path], **kwargs), way)


@_KINDS
def test_a_kernel_enters_with_the_axes_that_it_has(layer):
  x = _node(layer)
  kernel = products.enter(x, products.AUTO)
  assert kernel.view.shape == layer.shape
  sizes = lambda role: {a.size for a in kernel.parts(role)} - {1}
  for role in ('row', 'col', 'batch'):
    assert sizes(role) == {n for r, n in kernels.cut(layer) if r == role} - {1}
  product = kernels.product(x, layer)
  assert kernels.error(products.leave(kernel), product) < 1e-6


@pytest.mark.parametrize(
  'path, order, shape',
  [
    ('tall', (1, 0), (5, 3, 4)),
    ('qkv', (0, 1), (12, 3, 5)),
    ('qkv', (1, 0), (3, 5, 12)),
    ('qkv', (0, 1), (12, 15, 1)),
    ('heads', (1, 2, 0, 3), (6, 12, 5)),
    ('half_heads', (2, 0, 1), (6, 5, 2, 2)),
    ('grouped', (2, 3, 1, 0), (2, 2, 3, 10)),
    ('split_stack', (2, 0, 3, 1), (3, 2, 2, 5, 12)),
    ('both_batches', (3, 2, 1, 0), (15, 12, 2)),
  ],
)
def test_dense_is_the_kernel_as_it_lies_now(path, order, shape):
  kernel = _kernel(path)
  product = kernels.product(kernel.node, kernels.BY_PATH[path])
  view = kernel.view.transpose(order).reshape(shape)
  found = dataclasses.replace(kernel, view=view, dtype=jnp.bfloat16).dense()
  assert (found.shape, found.dtype) == (shape, jnp.bfloat16)
  expected = product.transpose(order).reshape(shape)
  assert kernels.error(found, expected) < 2.5e-3


def test_a_reshape_that_tears_blocks_apart_is_none():
  kernel = _kernel('qkv')
  assert kernel.view.reshape((12, 3, 5))
  assert kernel.view.reshape((12, 5, 3)) is None


def test_roles_are_those_of_axes_of_more_than_one():
  qkv, heads = _kernel('qkv'), _kernel('heads')
  assert (qkv.roles([0]), qkv.roles([1])) == ({'row'}, {'batch', 'col'})
  # All of these axes of the heads are blocks, and nothing is left of them.
  assert heads.roles([1, 2]) == {'batch'}
  assert heads.roles([3]) == {'col'}
  assert _kernel('pointwise').roles([0, 1]) == set()


def test_leading_axes_without_a_name_are_a_batch():
  kernel = _kernel('split_stack')
  assert (kernel.lead, kernel.node.view.batch) == (1, (1, 2))
  assert kernel.roles([0]) == {'batch'}
  assert [a.size for a in kernel.parts('batch')] == [2, 3, 2]


def test_what_is_no_node_passes_by():
  x = jnp.ones(3)
  assert products.enter(x, products.AUTO) is x
  assert products.leave(x) is x


@pytest.mark.parametrize('path', ['tall', 'heads'])
def test_bases_are_constants_and_factors_are_not(path):
  x = _node(kernels.BY_PATH[path])
  pair = oialr.Factors(x.u, x.vt, x.view)
  total = lambda x: jnp.sum(products.enter(x, products.AUTO).dense() ** 2)
  low, pair = jax.grad(total)(x), jax.grad(total)(pair)
  assert not np.any(low.u) and not np.any(low.vt)
  assert np.all(low.s != 0)
  assert np.all(pair.a != 0) and np.all(pair.b != 0)


def test_a_chain_is_in_the_dtype_of_the_kernel_now():
  kernel = dataclasses.replace(_kernel('conv'), dtype=jnp.bfloat16)
  places, factors = zip(*kernel.chain())
  assert places == ('row', 'mix', 'col')
  assert {x.dtype for x in factors} == {jnp.dtype(jnp.bfloat16)}
  pair = oialr.Factors(kernel.node.u, kernel.node.vt, kernel.node.view)
  places, _ = zip(*products.enter(pair, products.AUTO).chain())
  assert places == ('row', 'col')


@pytest.mark.parametrize(
  'groups, blocks, fit',
  [(1, 1, True), (1, 2, True), (2, 2, True), (2, 1, False), (2, 4, False)],
)
def test_convolutions_need_a_block_for_every_group(groups, blocks, fit):
  layer = kernels.layer('w', (3, 4, 8), (0, 1), (2,), blocks=blocks)
  node, x = _node(layer), np.ones((2, 5, 4 * groups), np.float32)
  convolve = lambda w, x: jax.lax.conv_general_dilated(
    x,
    w,
    (1,),
    'SAME',
    dimension_numbers=('NWC', 'WIO', 'NWC'),
    feature_group_count=groups,
  )
  (eqn,) = jax.make_jaxpr(convolve)(lowrank.materialise(node), x).eqns
  kernel = products.enter(node, 'factors')
  found = products.conv(eqn, [x, kernel])
  assert (found is not None) == fit
  if not fit:
    return
  expected = convolve(products.leave(kernel), x)
  assert kernels.error(found, expected) < 1e-6
  chain = jax.make_jaxpr(lambda x: products.conv(eqn, [x, kernel]))(x)
  assert len([*kernels.equations(chain, 'dot_general')]) == 2
  (first,) = kernels.equations(chain, 'conv_general_dilated')
  assert first.outvars[0].aval.shape == (2, 5, blocks * node.rank)


@pytest.mark.parametrize('path', ['tall', 'qkv', 'stack'])
def test_products_of_two_kernels_are_no_chain(path):
  kernel = _kernel(path)
  dense = kernel.dense()
  axes = list(range(dense.ndim))
  multiply = lambda a, b: jax.lax.dot_general(a, b, ((axes, axes), ((), ())))
  (eqn,) = jax.make_jaxpr(multiply)(dense, dense).eqns
  assert products.dot(eqn, [kernel, kernel]) is None
  # Nor is one that is along rows and columns at once.
  assert products.dot(eqn, [kernel, dense]) is None


def test_views_of_blocks_are_atoms_of_the_cut_kernel():
  kernel = _kernel('qkv')
  atom = views.Atom
  assert kernel.view.axes == (
    (atom(0, 1, 12),),
    (atom(1, 1, 3), atom(2, 1, 5)),
  )
