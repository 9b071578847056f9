"""Tests of the low-rank node and its matrix view."""

import copy
import dataclasses
import math
import pickle

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import lowrank
from tests import kernels

_KINDS = pytest.mark.parametrize(
  'layer', kernels.LAYERS, ids=lambda layer: layer.path
)


def _node(layer, rank=None, *, dtype='float32', seed=0) -> oialr.LowRank:
  rng, (m, n), b = np.random.default_rng(seed), layer.matrix, layer.stack
  r = rank or layer.max_rank
  return kernels.node(
    layer,
    rng.normal(size=(b, m, r)),
    rng.normal(size=(b, r, r)),
    rng.normal(size=(b, r, n)),
    dtype=dtype,
  )


def _factors(layer, rank, *, dtype='float32') -> oialr.Factors:
  x = _node(layer, rank, dtype=dtype)
  return oialr.Factors(x.u, x.vt, x.view)


@_KINDS
def test_a_matrix_view_splits_a_kernel_into_its_matrices(layer):
  kernel = kernels.random_params([layer])[layer.path]
  matrix = layer.view.to_matrix(kernel)
  np.testing.assert_array_equal(matrix, kernels.matrices(kernel, layer))
  back = layer.view.from_matrix(matrix, layer.shape)
  np.testing.assert_array_equal(back, kernel)


def test_a_matrix_view_names_no_leading_batch_axes():
  view = oialr.MatrixView.of(rows=(3, 1), cols=(4,), batch=(0, 2))
  assert view == oialr.MatrixView(rows=(0, 2), cols=(3,), batch=(1,))
  assert view.ndim == 4
  assert view.order(lead=1) == (0, 2, 1, 3, 4)
  assert view.split((7, 2, 3, 4, 5)) == ((7, 3), (2, 4), (5,))


def test_a_matrix_view_counts_an_axis_in_blocks_as_two():
  view = oialr.MatrixView.of(
    rows=(3, 1), cols=(4, 2), batch=(0,), blocks={2: 3}
  )
  assert view == oialr.MatrixView(
    rows=(0, 3), cols=(2, 4), batch=(1,), blocks=(1, 3, 1, 1)
  )
  assert view.ndim == 4
  assert view.order(lead=1) == (0, 2, 1, 4, 3, 5)
  assert view.cut((7, 2, 6, 4, 5)) == (7, 2, 3, 2, 4, 5)
  assert view.split((7, 2, 6, 4, 5)) == ((7, 3), (2, 4), (2, 5))
  # Whole axes have no blocks, and those of the batch no name.
  whole = oialr.MatrixView.of(rows=(1,), cols=(2,), batch=(0,), blocks={2: 1})
  assert whole == oialr.MatrixView(rows=(0,), cols=(1,))


@st.composite
def _views(draw):
  """A view, and the shape of a kernel that it is of."""
  roles = draw(
    st.lists(st.sampled_from(['row', 'col', 'batch']), min_size=2, max_size=5)
  )
  blocks, shape = {}, []
  for axis, role in enumerate(roles):
    blocks[axis] = draw(st.integers(1, 3)) if role == 'col' else 1
    shape.append(blocks[axis] * draw(st.integers(1, 3)))
  of = lambda role: tuple(a for a, r in enumerate(roles) if r == role)
  axes = map(of, ('row', 'col', 'batch'))
  return oialr.MatrixView.of(*axes, blocks), tuple(shape)


_EXAMPLES = hypothesis.settings(
  deadline=None, derandomize=True, max_examples=40, database=None
)


@_EXAMPLES
@hypothesis.given(_views())
def test_to_and_from_matrices_of_any_view(example):
  view, shape = example
  kernel = np.arange(math.prod(shape)).reshape(shape)
  matrices = _matrices(view, kernel)
  assert view.whole(view.cut(shape)) == shape
  sizes = tuple(math.prod(part) for part in view.split(shape))
  assert sizes == matrices.shape
  np.testing.assert_array_equal(view.to_matrix(kernel), matrices)
  back = view.from_matrix(matrices, shape)
  np.testing.assert_array_equal(back, kernel)


def _matrices(view, kernel):
  """`to_matrix`, one entry at a time."""
  lead = kernel.ndim - view.ndim
  blocks = (1,) * lead + (view.blocks or (1,) * view.ndim)
  out = {}
  for index in np.ndindex(*kernel.shape):
    digits = []
    for i, n, b in zip(index, kernel.shape, blocks):
      digits += [i] if b == 1 else divmod(i, n // b)
    named = lambda axes, digits=digits: tuple(digits[lead + a] for a in axes)
    batch = (*digits[:lead], *named(view.batch))
    out[batch, named(view.rows), named(view.cols)] = kernel[index]
  sizes = [len({key[i] for key in out}) for i in range(3)]
  return np.array([out[key] for key in sorted(out)]).reshape(sizes)


@_EXAMPLES
@hypothesis.given(_views())
def test_unstacked_is_what_a_scan_sees(example):
  view, shape = example
  if not view.batch:
    with pytest.raises(ValueError, match='has no batch axis to take away'):
      view.unstacked()
    return
  shape = shape[len(shape) - view.ndim :]  # nameless axes are no concern of it
  kernel = np.arange(math.prod(shape)).reshape(shape)
  inner = view.unstacked()
  cut = kernel.reshape(view.cut(shape))
  slices = np.moveaxis(cut, view.batch[0], 0)
  # The shape of a slice: without the axis, or with what a block has of it.
  seen = [inner.to_matrix(x.reshape(inner.whole(x.shape))) for x in slices]
  np.testing.assert_array_equal(np.concatenate(seen), view.to_matrix(kernel))


@_KINDS
@pytest.mark.parametrize('rank', [1, None])
def test_a_node_has_the_shape_of_the_dense_kernel(layer, rank):
  x = _node(layer, rank, dtype='bfloat16')
  assert x.shape == layer.shape
  assert x.ndim == len(layer.shape)
  assert x.size == np.prod(layer.shape)
  assert x.dtype == jnp.bfloat16
  assert x.rank == rank or x.rank == layer.max_rank
  assert lowrank.matrix_shape(x) == (layer.stack, *layer.matrix)
  factors = _factors(layer, rank, dtype='bfloat16')
  for name in ('shape', 'ndim', 'size', 'dtype', 'rank'):
    assert getattr(factors, name) == getattr(x, name)
  assert lowrank.matrix_shape(factors) == lowrank.matrix_shape(x)


def test_the_dtype_of_a_node_is_that_of_sigma():
  x = _node(kernels.BY_PATH['tall'])
  x = dataclasses.replace(x, u=x.u.astype(jnp.bfloat16))
  assert x.dtype == lowrank.materialise(x).dtype == jnp.float32


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_materialise_multiplies_out(dtype):
  nodes = {x.path: _node(x, dtype=dtype) for x in kernels.LAYERS}
  pairs = {x.path: _factors(x, None, dtype=dtype) for x in kernels.LAYERS}
  dense = jax.jit(oialr.to_dense)([nodes, pairs])
  for path, layer in kernels.BY_PATH.items():
    x = nodes[path]
    ones = jnp.broadcast_to(jnp.eye(x.rank, dtype=dtype), x.s.shape)
    for found, node in (
      (dense[0][path], x),
      (dense[1][path], dataclasses.replace(x, s=ones)),
    ):
      assert found.dtype == dtype
      # One rounding to the kernel's dtype, none in between.
      error = kernels.error(found, kernels.product(node, layer))
      assert error < {'float32': 1e-6, 'bfloat16': 2.5e-3}[dtype], path


@pytest.mark.parametrize('path, cheap', [('tall', 'right'), ('wide', 'left')])
def test_materialise_joins_sigma_to_the_smaller_side(path, cheap):
  x = _node(kernels.BY_PATH[path], 3)
  m, n = kernels.BY_PATH[path].matrix
  jaxpr = jax.make_jaxpr(lowrank.materialise)(x)
  dots = [
    eqn.outvars[0].aval.shape[-2:]
    for eqn in kernels.equations(jaxpr, 'dot_general')
  ]
  assert dots == [{'left': (m, 3), 'right': (3, n)}[cheap], (m, n)]


def test_matrices_and_from_matrices_are_inverse():
  for layer in kernels.LAYERS:
    x = _node(layer, dtype='bfloat16')
    parts = lowrank.matrices(x)
    for found, expected in zip(parts, kernels.factors(x)):
      assert found.dtype == jnp.float32
      np.testing.assert_array_equal(found, expected)
    back = lowrank.from_matrices(x, *parts)
    assert jax.tree.structure(back) == jax.tree.structure(x)
    jax.tree.map(np.testing.assert_array_equal, back, x)
    assert back.s.dtype == jnp.bfloat16


def test_from_matrices_may_change_the_rank():
  x = _node(kernels.BY_PATH['both_batches'])
  u, s, vt = lowrank.matrices(x)
  small = lowrank.from_matrices(x, u[..., :2], s[:, :2, :2], vt[:, :2])
  assert (small.rank, small.shape) == (2, x.shape)


def test_live_columns_are_those_that_are_not_zero():
  u = np.ones((2, 3, 4), np.float32)
  u[0, :, 2:] = 0
  u[1, :2, 3] = 0
  np.testing.assert_array_equal(
    lowrank.live(u), [[True, True, False, False], [True] * 4]
  )


@pytest.mark.parametrize('path', ['both_batches', 'split_stack'])
def test_vmap_and_scan_peel_batch_axes_off(path):
  layer = kernels.BY_PATH[path]
  x = _node(layer)
  seen = []

  def core(_, node):
    seen.append(node.shape)
    return None, lowrank.materialise(node)

  expected = kernels.product(x, layer)
  for dense in (
    jax.vmap(lambda node: core(None, node)[1])(x),
    jax.lax.scan(core, None, x)[1],
  ):
    assert kernels.error(dense, expected) < 1e-6
  assert set(seen) == {layer.shape[1:]}


def test_a_node_is_a_pytree_of_its_factors():
  x = _node(kernels.BY_PATH['conv'])
  leaves, treedef = jax.tree.flatten(x)
  assert [y is z for y, z in zip(leaves, (x.u, x.s, x.vt))] == [True] * 3
  assert jax.tree.unflatten(treedef, leaves).view == x.view
  for twin in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
    assert jax.tree.structure(twin) == treedef
    jax.tree.map(np.testing.assert_array_equal, twin, x)


def test_is_low_rank_and_is_factored():
  layer = kernels.BY_PATH['tall']
  x, pair, dense = _node(layer), _factors(layer, 2), jnp.ones((12, 5))
  assert [oialr.is_low_rank(y) for y in (x, pair, dense)] == [
    True,
    False,
    False,
  ]
  assert [lowrank.is_factored(y) for y in (x, pair, dense)] == [
    True,
    True,
    False,
  ]


_WRAP = r'oialr.factored\(fn\)\(params, ...\), or pass it oialr.to_dense'


@pytest.mark.parametrize('make', [_node, lambda x: _factors(x, 2)])
@pytest.mark.parametrize(
  'use',
  [
    pytest.param(lambda w: jnp.ones((3, 12)) @ w, id='matmul'),
    pytest.param(lambda w: jnp.dot(jnp.ones((3, 12)), w), id='dot'),
    pytest.param(lambda w: w + 1.0, id='add'),
    pytest.param(lambda w: 2.0 * w, id='multiply'),
    pytest.param(jnp.asarray, id='asarray'),
    pytest.param(lambda w: jnp.einsum('ij,kj', w, w), id='einsum'),
    pytest.param(lambda w: w[0], id='index'),
    pytest.param(np.asarray, id='numpy'),
  ],
)
def test_a_node_used_as_an_array_says_what_to_do(make, use):
  x = make(kernels.BY_PATH['tall'])
  with pytest.raises(TypeError, match=f'{type(x).__name__}.*{_WRAP}'):
    use(x)


def test_lax_names_the_type_of_a_node():
  with pytest.raises(TypeError, match='LowRank'):
    jax.lax.neg(_node(kernels.BY_PATH['tall']))


@pytest.mark.parametrize('make', [_node, lambda x: _factors(x, 2)])
@pytest.mark.parametrize('name', ['T', 'reshape', 'astype'])
def test_a_node_lacks_what_arrays_have_and_says_why(make, name):
  x = make(kernels.BY_PATH['tall'])
  with pytest.raises(AttributeError, match=f"'{name}': .*{_WRAP}"):
    getattr(x, name)
  assert not hasattr(x, '__len__')
