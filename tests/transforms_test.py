"""Tests of the transforms, against NumPy in float64."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import linalg
from oialr_jax import transforms
from tests import kernels

_DATA = pathlib.Path(__file__).parent / 'data'
_TO_LOWRANK = kernels.modes(lambda p: oialr.to_lowrank(p, kernels.LAYERS))
_TO_DENSE = kernels.modes(oialr.to_dense)
_UPDATE = kernels.modes(oialr.update_basis)
_PRUNE = kernels.modes(lambda p: oialr.prune_sigma(p, cutoff=0.5))
_STATES = (
  'fresh',
  'trained',
  'deficient',
  'pruned',
  'pruned_trained',
  'pruned_deficient',
)


@pytest.fixture(params=['eager', 'jit'])
def mode(request) -> str:
  return request.param


@pytest.fixture(params=['float32', 'bfloat16'], scope='module')
def dtype(request) -> str:
  return request.param


@pytest.fixture(scope='module')
def states(dtype):
  """One tree of low-rank parameters in every state that it can be in."""
  fresh = _TO_LOWRANK['eager'](kernels.random_params(dtype=dtype))
  pruned = _PRUNE['eager'](fresh)
  return {
    'fresh': fresh,
    'trained': kernels.trained(fresh),
    'deficient': kernels.deficient(fresh),
    'pruned': pruned,
    'pruned_trained': kernels.trained(pruned),
    'pruned_deficient': kernels.deficient(pruned),
  }


def _single(m=12, n=5, *, dtype='float32', seed=0):
  """A tree of one kernel and one bias, and the kernel's layer."""
  layer = kernels.layer('kernel', (m, n), (0,), (1,))
  return kernels.random_params([layer], dtype=dtype, seed=seed), layer


def _assert_same_product(actual, desired, tolerance):
  for path, layer in kernels.BY_PATH.items():
    error = kernels.error(
      kernels.product(actual[path], layer),
      kernels.product(desired[path], layer),
    )
    assert error < tolerance, path


def _assert_orthonormal(node, atol, path):
  """U^T U = V^T V = I, with zeros for the directions that are pruned."""
  u, _, vt = kernels.factors(node)
  eye = np.eye(node.rank) * np.any(u != 0, axis=-2)[:, None, :]
  for gram in (u.swapaxes(-1, -2) @ u, vt @ vt.swapaxes(-1, -2)):
    np.testing.assert_allclose(gram, eye, atol=atol, err_msg=path)


def _assert_equal_trees(actual, desired):
  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  jax.tree.map(np.testing.assert_array_equal, actual, desired)


def test_to_dense_is_the_inverse_of_to_lowrank(mode, dtype):
  params = kernels.random_params(dtype=dtype)
  low = _TO_LOWRANK[mode](params)
  dense = _TO_DENSE[mode](low)
  assert jax.tree.structure(dense) == jax.tree.structure(params)
  for path, layer in kernels.BY_PATH.items():
    assert oialr.is_low_rank(low[path]), path
    assert low[path].shape == dense[path].shape == layer.shape, path
    assert low[path].dtype == dense[path].dtype == dtype, path
    assert {x.dtype for x in jax.tree.leaves(low[path])} == {jnp.dtype(dtype)}
    for kernel in (dense[path], kernels.product(low[path], layer)):
      error = kernels.error(kernel, params[path])
      assert error < kernels.TOLERANCE[dtype], path


def test_to_lowrank_gives_the_thin_svd(mode, dtype):
  params = kernels.random_params(dtype=dtype)
  low = _TO_LOWRANK[mode](params)
  for path, layer in kernels.BY_PATH.items():
    u, s, vt = kernels.factors(low[path])
    b, (m, n), r = layer.stack, layer.matrix, min(layer.matrix)
    assert (u.shape, vt.shape) == ((b, m, r), (b, r, n)), path
    values = kernels.singular_values(kernels.matrices(params[path], layer))
    np.testing.assert_allclose(
      s,
      np.stack([np.diag(x) for x in values]),
      atol=kernels.TOLERANCE[dtype] * np.max(values),
      err_msg=path,
    )
    _assert_orthonormal(low[path], kernels.TOLERANCE[dtype], path)


def test_the_factors_keep_the_axes_of_the_kernel():
  low = jax.eval_shape(_TO_LOWRANK['eager'], kernels.random_params())
  shapes = lambda x: (x.u.shape, x.s.shape, x.vt.shape)
  assert shapes(low['conv']) == ((3, 2, 2, 5), (5, 5), (5, 5))
  assert shapes(low['query']) == ((5, 5), (5, 5), (5, 3, 4))
  assert shapes(low['out_in']) == ((5, 5), (5, 5), (5, 12))
  assert shapes(low['stack']) == ((3, 12, 5), (3, 5, 5), (3, 5, 5))
  assert shapes(low['both_batches']) == (
    (2, 3, 12, 5),
    (2, 3, 5, 5),
    (2, 3, 5, 5),
  )
  # Blocks are an axis of their own, in front of what is left of the columns.
  assert shapes(low['qkv']) == ((3, 12, 5), (3, 5, 5), (3, 5, 5))
  assert shapes(low['heads']) == (
    (3, 2, 12, 5),
    (3, 2, 5, 5),
    (3, 2, 5, 1, 1, 5),
  )
  assert shapes(low['half_heads']) == ((2, 5, 5), (2, 5, 5), (2, 5, 2, 6))
  assert shapes(low['grouped']) == ((2, 3, 2, 2, 5), (2, 5, 5), (2, 5, 5))
  assert shapes(low['split_stack']) == (
    (2, 3, 2, 12, 5),
    (2, 3, 2, 5, 5),
    (2, 3, 2, 5, 5),
  )


@pytest.mark.parametrize(
  ('rank', 'expected'),
  [
    pytest.param(None, (5, 6), id='full'),
    pytest.param(3, (3, 3), id='int'),
    pytest.param(np.int64(2), (2, 2), id='numpy_int'),
    pytest.param(0.5, (2, 3), id='share'),
    pytest.param(0.01, (1, 1), id='small_share'),
    pytest.param(1.0, (5, 6), id='whole_share'),
    pytest.param({'tall': 4}, (4, 6), id='mapping'),
  ],
)
def test_a_rank_keeps_the_largest_directions(rank, expected):
  layers = (kernels.BY_PATH['tall'], kernels.BY_PATH['square'])
  params = kernels.random_params(layers)
  low = oialr.to_lowrank(params, layers, rank=rank)
  for layer, r in zip(layers, expected):
    u, s, vt = np.linalg.svd(kernels.float64(params[layer.path]))
    best = (u[:, :r] * s[:r]) @ vt[:r]
    node = low[layer.path]
    assert node.rank == r
    error = kernels.error(kernels.product(node, layer), best)
    assert error < kernels.TOLERANCE['float32']


def test_every_transform_hands_other_leaves_on_as_the_same_objects():
  params, layer = _single()
  params |= {'dense': jnp.ones((3, 2)), 'name': 'not an array'}
  low = oialr.to_lowrank(params, [layer])
  for out in (
    low,
    oialr.update_basis(low),
    oialr.prune_sigma(low),
    oialr.compact(low),
    oialr.to_factors(low),
    oialr.to_dense(low),
    oialr.trainable(low),
    oialr.with_trainable(low, oialr.trainable(low)),
  ):
    for path in ('bias', 'dense', 'name'):
      assert out[path] is params[path]


def test_kernels_of_equal_shapes_are_decomposed_in_one_svd():
  layers = [kernels.layer(f'k{i}', (12, 5), (0,), (1,)) for i in range(4)]
  layers.append(kernels.BY_PATH['conv'])  # 12 | 5 as well
  layers.append(kernels.BY_PATH['stack'])  # three more of them
  layers.append(kernels.BY_PATH['square'])
  params = kernels.random_params(layers)
  convert = functools.partial(oialr.to_lowrank, layers=layers)
  low = jax.eval_shape(convert, params)
  for f, x, sizes in (
    (convert, params, [(1, 6, 6), (8, 12, 5)]),
    (oialr.update_basis, low, [(1, 6, 6), (8, 5, 5)]),
    (oialr.prune_sigma, low, [(1, 6, 6), (8, 5, 5)]),
  ):
    svds = kernels.equations(jax.make_jaxpr(f)(x), 'svd')
    assert sorted(e.invars[0].aval.shape for e in svds) == sizes


@pytest.mark.parametrize(
  'promotion',
  [
    pytest.param(lambda: jax.numpy_dtype_promotion('strict'), id='of_dtypes'),
    pytest.param(lambda: jax.numpy_rank_promotion('raise'), id='of_ranks'),
  ],
)
def test_no_transform_needs_implicit_promotion(promotion, dtype):
  layers = [kernels.BY_PATH[path] for path in ('tall', 'qkv')]
  params = kernels.random_params(layers, dtype=dtype)
  with promotion():
    low = kernels.trained(oialr.to_lowrank(params, layers))
    aligned = oialr.update_basis(low)
    for pruned in (low, aligned):
      pruned = oialr.prune_sigma(pruned, cutoff=0.5)
      oialr.to_dense(oialr.to_factors(oialr.compact(pruned)))
    oialr.drift(aligned)
    oialr.mixing(params, layers)
    oialr.spectra(aligned, layers)
    found = oialr.stability(*(oialr.basis(p, layers) for p in (low, aligned)))
  np.testing.assert_allclose([*found.values()], 1, atol=2e-2)


def test_to_lowrank_takes_numpy_arrays_of_float64():
  rng = np.random.default_rng(0)
  params = {'kernel': rng.normal(size=(12, 5))}
  low = oialr.to_lowrank(params, [_single()[1]])
  assert low['kernel'].dtype == jnp.asarray(params['kernel']).dtype
  error = kernels.error(oialr.to_dense(low)['kernel'], params['kernel'])
  assert error < kernels.TOLERANCE['float32']


@pytest.mark.parametrize('state', _STATES)
def test_update_basis_keeps_the_product(states, state, mode, dtype):
  before = states[state]
  _assert_same_product(_UPDATE[mode](before), before, kernels.TOLERANCE[dtype])


@pytest.mark.parametrize('state', _STATES)
def test_update_basis_makes_sigma_its_singular_values(
  states, state, mode, dtype
):
  before = states[state]
  after = _UPDATE[mode](before)
  for path in kernels.BY_PATH:
    _, s, _ = kernels.factors(before[path])
    values = kernels.singular_values(s)
    found = kernels.factors(after[path])[1]
    np.testing.assert_allclose(
      found,
      np.stack([np.diag(x) for x in values]),
      atol=kernels.TOLERANCE[dtype] * np.max(values),
      err_msg=path,
    )
    assert np.all(np.diff(np.diagonal(found, axis1=-2, axis2=-1)) <= 0), path
    _assert_orthonormal(after[path], kernels.TOLERANCE[dtype], path)


@pytest.mark.parametrize('state', _STATES)
def test_update_basis_keeps_pruned_directions_pruned(states, state, mode):
  before = states[state]
  after = _UPDATE[mode](before)
  for path in kernels.BY_PATH:
    for i, j in ((0, -2), (2, -1)):  # columns of U, rows of V^T
      live = [
        np.any(kernels.factors(x[path])[i] != 0, axis=j)
        for x in (before, after)
      ]
      np.testing.assert_array_equal(*live, err_msg=path)


@pytest.mark.parametrize('state', _STATES)
def test_update_basis_is_idempotent(states, state, mode, dtype):
  once = _UPDATE[mode](states[state])
  twice = _UPDATE[mode](once)
  if dtype == 'float32':
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), twice, once
    )
    return
  # Rounded bases are made orthonormal anew, which may turn the directions of
  # nearly equal singular values: the leading one stands apart.
  for path in kernels.BY_PATH:
    (u, s, vt), (u2, s2, vt2) = map(kernels.factors, (once[path], twice[path]))
    assert kernels.error(s2, s) < kernels.TOLERANCE[dtype], path
    apart = s[:, :1, :1] - (s[:, 1:2, 1:2] if s.shape[-1] > 1 else 0)
    near = kernels.TOLERANCE[dtype] * s[:, 0, 0] / apart[:, 0, 0] + 0.01
    assert np.all(np.abs(u2 - u)[..., 0].max(-1) < near), path
    assert np.all(np.abs(vt2 - vt)[:, 0].max(-1) < near), path


def test_update_basis_takes_the_paths_that_it_is_given(states):
  before = states['trained']
  after = oialr.update_basis(before, paths=['square', 'column'])
  changed = [path for path in before if after[path] is not before[path]]
  assert sorted(changed) == ['column', 'square']


@pytest.mark.parametrize('pruned', [False, True])
def test_update_basis_makes_drifted_bases_orthonormal(states, mode, pruned):
  before = _drifted(states['pruned_trained' if pruned else 'trained'], 1e-2)
  after = _UPDATE[mode](before)
  dtype = str(before['tall'].dtype)
  _assert_same_product(after, before, kernels.TOLERANCE[dtype])
  for path in kernels.BY_PATH:
    _assert_orthonormal(after[path], kernels.TOLERANCE[dtype], path)
    w = kernels.matrices(
      kernels.product(before[path], kernels.BY_PATH[path]),
      kernels.BY_PATH[path],
    )
    s = np.diagonal(kernels.factors(after[path])[1], axis1=-2, axis2=-1)
    values = kernels.singular_values(w)[..., : s.shape[-1]]
    atol = kernels.TOLERANCE[dtype] * np.max(values)
    np.testing.assert_allclose(s, values, atol=atol, err_msg=path)


def _drifted(params, size, seed=3):
  """Adds noise to the live directions of U and V."""
  rng = np.random.default_rng(seed)

  def noisy(x):
    noise = size * rng.normal(size=x.shape) * (kernels.float64(x) != 0)
    return kernels.array(kernels.float64(x) + noise, x.dtype)

  return {
    p: dataclasses.replace(x, u=noisy(x.u), vt=noisy(x.vt))
    if oialr.is_low_rank(x)
    else x
    for p, x in params.items()
  }


def test_bases_in_bfloat16_do_not_drift_over_many_updates():
  params, layer = _single()
  low = oialr.to_lowrank(params, [layer])
  x = low['kernel']
  narrow = lambda a: a.astype(jnp.bfloat16)
  x = dataclasses.replace(x, u=narrow(x.u), vt=narrow(x.vt))
  start = kernels.product(x, layer)
  low = low | {'kernel': x}
  for _ in range(10):
    low = oialr.update_basis(low)
  x = low['kernel']
  assert (x.u.dtype, x.s.dtype) == (jnp.bfloat16, jnp.float32)
  assert x.dtype == jnp.float32
  _assert_orthonormal(x, 1e-2, 'kernel')
  assert kernels.error(kernels.product(x, layer), start) < 2e-2


@pytest.mark.parametrize('state', ['fresh', 'trained', 'pruned_trained'])
def test_the_error_of_pruning_is_the_dropped_singular_values(
  states, state, mode, dtype
):
  before = _UPDATE['eager'](states[state])
  after = _PRUNE[mode](before)
  dropped_some = False
  for path, layer in kernels.BY_PATH.items():
    u, s, _ = kernels.factors(after[path])
    kept = np.any(u != 0, axis=-2)
    values = np.diagonal(kernels.factors(before[path])[1], axis1=-2, axis2=-1)
    dropped = np.where(kept, 0, values)
    dropped_some |= bool(np.any(dropped))
    change = kernels.matrices(
      kernels.product(before[path], layer)
      - kernels.product(after[path], layer),
      layer,
    )
    atol = kernels.TOLERANCE[dtype] * np.max(values)
    for order, expected in (
      ('fro', np.linalg.norm(dropped, axis=-1)),
      (2, np.max(dropped, axis=-1)),
    ):
      norm = np.linalg.norm(change, order, axis=(-2, -1))
      np.testing.assert_allclose(norm, expected, atol=atol, err_msg=path)
    np.testing.assert_array_equal(
      np.diagonal(s, axis1=-2, axis2=-1), np.where(kept, values, 0)
    )
  assert dropped_some


def test_prune_sigma_aligns_what_is_not_aligned(states, mode, dtype):
  before = states['trained']
  _assert_same_product(
    _PRUNE[mode](before),
    _PRUNE[mode](_UPDATE[mode](before)),
    kernels.TOLERANCE[dtype],
  )


@pytest.mark.parametrize(
  'sigma',
  [
    pytest.param(np.diag([1.0, 2, 9, 3, 8]), id='unsorted'),
    pytest.param(np.diag([9.0, 8, 3, 2, -7]), id='negative'),
    pytest.param(np.diag([9.0, 8, 3, 2, 1]) + np.eye(5, k=2), id='triangle'),
  ],
)
def test_prune_sigma_aligns_what_is_nearly_aligned(sigma):
  params, layer = _single()
  low = oialr.to_lowrank(params, [layer])
  low = kernels.with_sigma(low, lambda s: sigma)
  pruned = oialr.prune_sigma(low, cutoff=0.5)
  values = kernels.singular_values(sigma)
  kept = np.where(values >= 0.5 * values[0], values, 0)
  kept[:3] = values[:3]  # not more than half at once
  _, s, _ = kernels.factors(pruned['kernel'])
  np.testing.assert_allclose(s[0], np.diag(kept), atol=1e-5)


def test_pruning_zeroes_and_changes_no_shape(states, mode):
  after = _PRUNE[mode](states['fresh'])
  shapes = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype), t)
  assert shapes(after) == shapes(states['fresh'])
  assert kernels.live_rank(after['square']) < 6
  for path in kernels.BY_PATH:
    u, s, vt = kernels.factors(after[path])
    kept = np.any(u != 0, axis=-2)
    np.testing.assert_array_equal(kept, np.any(vt != 0, axis=-1))
    np.testing.assert_array_equal(kept, np.any(s != 0, axis=-1))
    # Pruned directions are the last ones.
    assert np.all(np.diff(kept.astype(int)) <= 0), path


def test_prune_sigma_takes_the_paths_that_it_is_given(states):
  before = states['fresh']
  after = oialr.prune_sigma(before, cutoff=0.9, paths=['square'])
  changed = [path for path in before if after[path] is not before[path]]
  assert changed == ['square']
  assert kernels.live_rank(after['square']) == 3


def test_every_block_is_pruned_by_its_own_singular_values(mode):
  rng, layer = np.random.default_rng(0), kernels.BY_PATH['qkv']
  u, v = (kernels.orthonormal(rng, 3, n, 5) for n in (12, 5))
  values = np.array([[5.0, 4, 3, 2.6, 2.5], [9, 8, 1, 1, 1], [1, 1, 1, 1, 0.9]])
  w = (u * values[:, None]) @ v.swapaxes(-1, -2)  # q, k and v
  params = {'qkv': kernels.array(np.concatenate([*w], axis=-1), 'float32')}
  prune = lambda p: oialr.prune_sigma(
    oialr.to_lowrank(p, [layer]), cutoff=0.55, max_drop=1.0
  )
  low = kernels.modes(prune)[mode](params)
  _, s, _ = kernels.factors(low['qkv'])
  kept = np.where(values >= 0.55 * values[:, :1], values, 0)
  assert np.sum(kept > 0, axis=-1).tolist() == [3, 2, 5]
  np.testing.assert_allclose(s, [np.diag(x) for x in kept], atol=2e-5)
  assert oialr.ranks(low) == {'qkv': 5}  # of blocks as of a stack, the largest
  error = kernels.error(
    oialr.to_dense(low)['qkv'],
    np.concatenate([*(u * kept[:, None]) @ v.swapaxes(-1, -2)], axis=-1),
  )
  assert error < kernels.TOLERANCE['float32']


def test_a_rank_is_that_of_every_block():
  layers = [kernels.BY_PATH['qkv'], kernels.BY_PATH['heads']]
  params = kernels.random_params(layers)
  low = oialr.to_lowrank(params, layers, rank={'qkv': 2, 'heads': 1})
  for layer, r in zip(layers, (2, 1)):
    w = kernels.matrices(params[layer.path], layer)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    best = (u[..., :r] * s[:, None, :r]) @ vt[:, :r]
    found = kernels.matrices(kernels.product(low[layer.path], layer), layer)
    assert low[layer.path].rank == r
    assert kernels.error(found, best) < kernels.TOLERANCE['float32']


_GOLDEN = json.loads((_DATA / 'oialr_rank_rule.json').read_text())


@pytest.fixture(scope='module')
def golden_runs():
  """Each case of the golden file after no, one, two, ... calls."""
  runs = [{str(c['case']): _with_singular_values(c) for c in _GOLDEN}]
  rule = dict(max_drop=0.5, floor=0.01)
  cutoffs = {str(c['case']): c['beta'] for c in _GOLDEN}
  prune = kernels.modes(
    lambda params: {
      case: oialr.prune_sigma({'kernel': x}, cutoff=cutoffs[case], **rule)
      for case, x in params.items()
    }
  )['jit']
  for _ in range(9):
    pruned = prune(runs[-1])
    runs.append({case: x['kernel'] for case, x in pruned.items()})
  return runs


@pytest.mark.parametrize('case', _GOLDEN, ids=lambda c: f'case_{c["case"]}')
def test_ranks_are_those_of_the_published_code(case, golden_runs):
  nodes = [run[str(case['case'])] for run in golden_runs]
  assert list(map(kernels.live_rank, nodes)) == [
    case['rank_before'],
    case['rank_after'],
    *case['rank_after_repeated_updates'],
  ]
  layer = kernels.layer('', tuple(case['kernel_rows_cols']), (0,), (1,))
  before, after = (kernels.product(x, layer) for x in nodes[:2])
  expected = case['relative_change_of_W']
  np.testing.assert_allclose(
    kernels.error(after, before), expected, rtol=1e-4, atol=3e-6
  )


def _with_singular_values(case) -> oialr.LowRank:
  """A kernel whose Sigma, full as after training, has the case's values."""
  (m, n), rng = case['kernel_rows_cols'], np.random.default_rng(case['case'])
  values = np.array(case['singular_values_of_sigma'])
  r = len(values)
  left, right = kernels.orthonormal(rng, r, r), kernels.orthonormal(rng, r, r)
  return kernels.node(
    kernels.layer('', (m, n), (0,), (1,)),
    kernels.orthonormal(rng, m, r),
    left * values @ right.T,
    kernels.orthonormal(rng, n, r).T,
  )


@pytest.mark.parametrize(
  ('live', 'max_drop', 'floor', 'kept'),
  [
    pytest.param(10, 1.0, 0, 3, id='cutoff_alone'),
    pytest.param(10, 0.5, 0, 5, id='half_at_most'),
    pytest.param(9, 0.5, 0, 5, id='half_of_an_odd_rank'),
    pytest.param(180, 0.65, 0, 63, id='a_share_that_floats_miss'),
    pytest.param(10, 0.2, 9, 9, id='floor'),
    pytest.param(2, 1.0, 9, 2, id='floor_above_the_rank'),
    pytest.param(2, 0.5, 0, 2, id='none_below_the_cutoff'),
    pytest.param(1, 1.0, 0, 1, id='the_last_one_stays'),
    pytest.param(0, 1.0, 4, 0, id='nothing_is_left'),
  ],
)
def test_kept_rank(live, max_drop, floor, kept):
  values = jnp.array([[8.0, 5.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.2, 0.1]])
  found = transforms.kept_rank(
    values, jnp.array([live]), cutoff=0.5, max_drop=max_drop, floor=floor
  )
  assert found.tolist() == [kept]


def test_the_floor_is_the_share_that_it_says():
  """Of 100 directions 0.29 are 29, where floats have 28.999999999999996."""
  layer = kernels.layer('kernel', (100, 100), (0,), (1,))
  values = np.geomspace(1, 1e-9, 100)
  params = {
    'kernel': kernels.node(layer, np.eye(100), np.diag(values), np.eye(100))
  }
  pruned = oialr.prune_sigma(params, cutoff=0.5, max_drop=1.0, floor=0.29)
  assert oialr.ranks(pruned) == {'kernel': 29}


@pytest.mark.parametrize('multiple_of', [1, 2, 8])
def test_compact_keeps_the_function(states, dtype, multiple_of):
  before = states['pruned_trained']
  after = oialr.compact(before, multiple_of=multiple_of)
  _assert_same_product(after, before, 1e-12)  # not even a rounding
  for path in kernels.BY_PATH:
    rank = kernels.live_rank(before[path])
    assert kernels.live_rank(after[path]) == rank, path
    expected = min(-(-rank // multiple_of) * multiple_of, before[path].rank)
    assert after[path].rank == expected, path
    assert after[path].shape == before[path].shape, path
    assert after[path].dtype == dtype, path
    if expected == before[path].rank:
      assert after[path] is before[path]


def test_compact_changes_no_output():
  rng = np.random.default_rng(0)
  layer = kernels.layer('kernel', (24, 20), (0,), (1,))
  u, v = (kernels.orthonormal(rng, n, 20) for n in (24, 20))
  live = np.arange(20) < 10
  s = rng.normal(size=(20, 20)) * live * live[:, None]
  low = {'kernel': kernels.node(layer, u * live, s, (v * live).T)}
  x = rng.normal(size=(7, 24)).astype(np.float32)
  exact = kernels.float64(x) @ kernels.product(low['kernel'], layer)
  forward = lambda params: x @ oialr.to_dense(params)['kernel']
  for multiple_of, rank in ((1, 10), (8, 16), (128, 20)):
    small = oialr.compact(low, multiple_of=multiple_of)
    assert small['kernel'].u.shape == (24, rank)
    assert kernels.error(forward(small), forward(low)) < 1e-6
    assert kernels.error(forward(small), exact) < 1e-6
    u, s, vt = kernels.factors(small['kernel'])
    for spare in (u[..., 10:], s[:, 10:], s[:, :, 10:], vt[:, 10:]):
      assert not np.any(spare)


def test_compact_to_ranks_that_are_given(states):
  before = states['pruned_trained']
  live = oialr.ranks(before)
  assert live['square'] < 5 and live['tall'] < 5
  ranks = {'square': live['square'] + 1, 'tall': live['tall'], 'wide': 9}
  after = oialr.compact(before, ranks=ranks)
  for path, rank in (ranks | {'wide': 5}).items():
    assert after[path].rank == rank
  _assert_same_product(after, before, 1e-12)
  # What there is no more to slice of, and what is not named, stays.
  for path in kernels.BY_PATH:
    assert (after[path] is before[path]) == (path not in ('square', 'tall'))


def test_compact_to_the_ranks_of_before_the_last_pruning(states):
  first = states['pruned_trained']
  ranks = transforms.compact_ranks(first, multiple_of=2)
  later = oialr.prune_sigma(first, cutoff=0.9)
  assert transforms.compact_ranks(later) != ranks
  shapes = lambda t: jax.tree.map(jnp.shape, t)
  sliced = oialr.compact(later, ranks=ranks)
  assert shapes(sliced) == shapes(oialr.compact(first, multiple_of=2))
  _assert_same_product(sliced, later, 1e-12)


def test_rounded_up_is_at_most_the_rank_there_is():
  params = oialr.to_lowrank(
    kernels.random_params(),
    [kernels.BY_PATH['tall'], kernels.BY_PATH['square']],
  )
  live = {'tall': 2, 'square': np.int32(5), 'of another tree': 1}
  for multiple_of, expected in ((1, (2, 5)), (3, (3, 6)), (4, (4, 6))):
    found = transforms.rounded_up(params, live, multiple_of)
    assert found == dict(zip(('tall', 'square'), expected))
    assert {type(x) for x in found.values()} == {int}


def test_sliced_is_traceable(mode):
  for path in ('conv', 'heads', 'split_stack'):
    layer = kernels.BY_PATH[path]
    x = oialr.to_lowrank(kernels.random_params([layer]), [layer])[path]
    small = kernels.modes(lambda x: transforms.sliced(x, 2))[mode](x)
    u, s, vt = kernels.factors(x)
    expected = u[..., :2], s[:, :2, :2], vt[:, :2]
    for a, b in zip(kernels.factors(small), expected, strict=True):
      np.testing.assert_array_equal(a, b)
    assert (small.shape, small.view) == (x.shape, x.view)
    assert transforms.sliced(x, x.rank) is x
    assert transforms.sliced(x, 99) is x


def test_replaced_changes_these_paths_alone():
  low = _low()
  params = {'a': low, 'b': [low['kernel'], low['bias']]}
  new = {'a/kernel': jnp.zeros(3), 'b/1': 'a name', 'c': 1}
  out = transforms.replaced(params, new)
  assert out['a']['kernel'] is new['a/kernel']
  assert out['b'] == [low['kernel'], 'a name']
  assert out['a']['bias'] is low['bias']


def test_check_flags_names_what_is_not_finite():
  transforms.check_flags({'a': jnp.array(True), 'b': np.True_})
  with pytest.raises(ValueError, match="'b': Sigma holds NaN or infinity; it"):
    transforms.check_flags({'a': True, 'b': jnp.array(False)}, 'Sigma')


def test_to_factors_takes_the_smaller_form(states, dtype):
  low = oialr.compact(states['pruned_trained'])
  small = oialr.to_factors(low)
  forms = set()
  dense = oialr.to_dense(small)
  for path, layer in kernels.BY_PATH.items():
    m, n = layer.matrix
    two = low[path].rank < m * n / (m + n)
    forms.add(two)
    assert isinstance(small[path], oialr.Factors) == two, path
    assert small[path].shape == layer.shape, path
    assert small[path].dtype == dtype, path
    stored = sum(x.size for x in jax.tree.leaves(small[path]))
    assert stored == layer.stack * min(low[path].rank * (m + n), m * n), path
    error = kernels.error(dense[path], kernels.product(low[path], layer))
    assert error < kernels.TOLERANCE[dtype], path
  assert forms == {True, False}


def test_to_factors_keeps_the_dense_kernel_at_break_even():
  params, layer = _single(12, 4)  # m n / (m + n) = 3
  forms = {
    rank: oialr.to_factors(oialr.to_lowrank(params, [layer], rank=rank))
    for rank in (2, 3)
  }
  assert isinstance(forms[2]['kernel'], oialr.Factors)
  assert isinstance(forms[3]['kernel'], jax.Array)


def test_trainable_has_the_tree_of_the_dense_model(states):
  low = states['trained']
  t = oialr.trainable(low)
  dense = oialr.to_dense(low)
  assert jax.tree.structure(t) == jax.tree.structure(dense)
  for path in kernels.BY_PATH:
    assert t[path] is low[path].s
  assert oialr.trainable(dense) is not dense
  _assert_equal_trees(oialr.trainable(dense), dense)


def test_with_trainable_is_the_inverse_of_trainable(states):
  low = states['trained']
  new = jax.tree.map(lambda x: 2 * x, oialr.trainable(low))
  out = oialr.with_trainable(low, new)
  assert jax.tree.structure(out) == jax.tree.structure(low)
  assert out['bias'] is new['bias']
  for path in kernels.BY_PATH:
    assert out[path].u is low[path].u
    assert out[path].vt is low[path].vt
    assert out[path].s is new[path]
  _assert_equal_trees(oialr.trainable(out), new)


# What cannot be decomposed. A program that was traced with the broken SVD stays
# in JAX's caches under its shapes, so these tests have shapes to themselves.

_REAL_SVD = linalg.svd


def _breaks_down(w):
  """An SVD that does not converge for matrices of large entries."""
  large = jnp.max(jnp.abs(w), axis=(-2, -1)) > 100
  spoil = lambda x: jnp.where(
    large.reshape(-1, *[1] * (x.ndim - 1)), jnp.nan, x
  )
  return tuple(map(spoil, _REAL_SVD(w)))


def _one_of_two_fails(m, n):
  """Two kernels of one shape, whose SVDs are one call."""
  layers = [kernels.layer(p, (m, n), (0,), (1,)) for p in ('good', 'bad')]
  params = kernels.random_params(layers)
  return params | {'bad': 1000 * params['bad']}, layers


def _one_of_two_sigmas_fails(m, n):
  rng, r = np.random.default_rng(0), min(m, n)
  layer = kernels.layer('', (m, n), (0,), (1,))
  u, v = kernels.orthonormal(rng, m, r), kernels.orthonormal(rng, n, r)
  s = rng.normal(size=(r, r))
  return {
    'good': kernels.node(layer, u, s, v.T),
    'bad': kernels.node(layer, u, 1000 * s, v.T),
  }


def test_an_svd_that_fails_is_an_error(monkeypatch):
  monkeypatch.setattr(linalg, 'svd', _breaks_down)
  params, layers = _one_of_two_fails(11, 7)
  low = _one_of_two_sigmas_fails(11, 7)
  copies = jax.tree.map(np.array, (params, low))
  for f, x in (
    (lambda p: oialr.to_lowrank(p, layers), params),
    (oialr.update_basis, low),
    (oialr.prune_sigma, low),
  ):
    with pytest.raises(np.linalg.LinAlgError, match="'bad': the SVD did not"):
      f(x)
  _assert_equal_trees((params, low), copies)


@pytest.mark.parametrize(('m', 'n'), [(13, 8), (8, 13)])
def test_under_jit_a_kernel_whose_svd_fails_is_kept(monkeypatch, m, n):
  monkeypatch.setattr(linalg, 'svd', _breaks_down)
  params, layers = _one_of_two_fails(m, n)
  low = kernels.modes(lambda p: oialr.to_lowrank(p, layers))['jit'](params)
  for layer in layers:
    product = kernels.product(low[layer.path], layer)
    assert kernels.error(product, params[layer.path]) < 4e-6
    _assert_orthonormal(low[layer.path], 4e-6, layer.path)
  values = kernels.singular_values(kernels.float64(params['good']))
  np.testing.assert_allclose(low['good'].s, np.diag(values), atol=1e-5)


@pytest.mark.parametrize('f', [oialr.update_basis, oialr.prune_sigma])
def test_under_jit_a_sigma_whose_svd_fails_is_kept(monkeypatch, f):
  monkeypatch.setattr(linalg, 'svd', _breaks_down)
  low = _one_of_two_sigmas_fails(14, 9)
  after = kernels.modes(f)['jit'](low)
  _assert_equal_trees(after['bad'], low['bad'])
  s = kernels.float64(after['good'].s)
  np.testing.assert_array_equal(s, np.diag(np.diagonal(s)))


def test_under_jit_a_kernel_that_is_not_finite_spoils_no_other():
  params = kernels.random_params()
  params['tall'] = params['tall'].at[1, 2].set(jnp.nan)
  low = _TO_LOWRANK['jit'](params)
  for path, layer in kernels.BY_PATH.items():
    product = kernels.product(low[path], layer)
    assert np.all(np.isfinite(product)) == (path != 'tall'), path


def test_aligned_is_a_falling_diagonal_of_finite_numbers_from_zero_up():
  off = np.diag([3.0, 2.0, 1.0])
  off[2, 0] = 1e-30
  matrices = {
    'falling': (np.diag([3.0, 2.0, 1.0]), True),
    'equal and zero': (np.diag([3.0, 3.0, 0.0]), True),
    'nothing': (np.zeros((3, 3)), True),
    'rising': (np.diag([3.0, 1.0, 2.0]), False),
    'negative': (np.diag([3.0, 2.0, -1.0]), False),
    'off the diagonal': (off, False),
    'infinite': (np.diag([np.inf, 2.0, 1.0]), False),
    'unknown': (np.where(np.eye(3), np.nan, 0), False),
  }
  s, expected = zip(*matrices.values())
  s = np.stack(s).astype(np.float32)
  found = transforms.is_aligned(s)
  assert dict(zip(matrices, found.tolist())) == dict(zip(matrices, expected))
  assert transforms.is_aligned(s[:1, :1, :1]).tolist() == [True]
  np.testing.assert_array_equal(transforms.is_aligned(s[None]), found[None])


def _low(**changes):
  params, layer = _single()
  return oialr.to_lowrank(params, [layer]) | changes


def _convert(rank=None, layers=None, **changes):
  params, layer = _single()
  layers = [layer] if layers is None else layers
  return oialr.to_lowrank(params | changes, layers, rank=rank)


def _with_nan(**fields):
  low = _low()
  x = low['kernel']
  nan = {f: getattr(x, f).at[0, 0].set(v) for f, v in fields.items()}
  return low | {'kernel': dataclasses.replace(x, **nan)}


_BAD_CALLS = [
  pytest.param(
    lambda: _convert(rank=6),
    ValueError,
    r"'kernel': rank 6 exceeds min\(m, n\) = 5 of its \(12, 5\) matrix; "
    r'pass rank <= 5 or exclude the path',
    id='rank_too_large',
  ),
  pytest.param(
    lambda: _convert(rank={'kernel': 6}),
    ValueError,
    r"'kernel': rank 6 exceeds min\(m, n\) = 5",
    id='rank_too_large_in_a_mapping',
  ),
  pytest.param(
    lambda: oialr.to_lowrank(
      kernels.random_params(), [kernels.BY_PATH['qkv']], rank=6
    ),
    ValueError,
    r"'qkv': rank 6 exceeds min\(m, n\) = 5 of its \(12, 5\) matrix",
    id='rank_too_large_for_a_block',
  ),
  pytest.param(
    lambda: _convert(rank=0),
    ValueError,
    r"'kernel': rank=0 must be at least 1",
    id='rank_zero',
  ),
  pytest.param(
    lambda: _convert(rank=-3),
    ValueError,
    r"'kernel': rank=-3 must be at least 1",
    id='rank_negative',
  ),
  pytest.param(
    lambda: _convert(rank=1.5),
    ValueError,
    r"'kernel': rank=1.5 as a share of min\(m, n\) must be in \(0, 1\]; "
    r'pass an int',
    id='share_above_one',
  ),
  pytest.param(
    lambda: _convert(rank=0.0),
    ValueError,
    r"'kernel': rank=0.0 as a share",
    id='share_zero',
  ),
  pytest.param(
    lambda: _convert(rank=float('nan')),
    ValueError,
    r"'kernel': rank=nan as a share",
    id='share_nan',
  ),
  pytest.param(
    lambda: _convert(rank=True),
    TypeError,
    r"'kernel': rank=True must be an int, a float or a mapping",
    id='rank_bool',
  ),
  pytest.param(
    lambda: _convert(rank='8'),
    TypeError,
    r"'kernel': rank='8' must be an int, a float or a mapping",
    id='rank_str',
  ),
  pytest.param(
    lambda: _convert(rank={'kernal': 2}),
    ValueError,
    r"'kernal': no such layer; the tree has 1: 'kernel'",
    id='unknown_path_in_rank',
  ),
  pytest.param(
    lambda: _convert(layers=[kernels.BY_PATH['tall']]),
    ValueError,
    r"'tall': no such parameter; the tree has 2: 'bias', 'kernel'",
    id='unknown_path_in_layers',
  ),
  pytest.param(
    lambda: _convert(layers=[]),
    ValueError,
    r'layers is empty: pass the layers of find_layers',
    id='no_layers',
  ),
  pytest.param(
    lambda: _convert(layers=[_single()[1]] * 2),
    ValueError,
    r"'kernel': is in layers twice; leave one out",
    id='a_layer_twice',
  ),
  pytest.param(
    lambda: oialr.to_lowrank(_low(), [_single()[1]]),
    ValueError,
    r"'kernel': is low-rank already; leave it out of layers, or start from "
    r'to_dense\(params\)',
    id='low_rank_already',
  ),
  pytest.param(
    lambda: oialr.to_lowrank(
      oialr.to_factors(_convert(rank=2)), [_single()[1]]
    ),
    ValueError,
    r"'kernel': is low-rank already",
    id='factors_already',
  ),
  pytest.param(
    lambda: _convert(kernel=jnp.ones((5, 12))),
    ValueError,
    r"'kernel': has shape \(5, 12\), but its layer says \(12, 5\); run "
    r'find_layers on these parameters',
    id='shape_mismatch',
  ),
  pytest.param(
    lambda: _convert(kernel=jnp.ones((12, 5), jnp.int32)),
    TypeError,
    r"'kernel': dtype int32 is not real floating point; exclude the path",
    id='integer_kernel',
  ),
  pytest.param(
    lambda: _convert(kernel=jnp.ones((12, 5), jnp.complex64)),
    TypeError,
    r"'kernel': dtype complex64 is not real floating point",
    id='complex_kernel',
  ),
  pytest.param(
    lambda: _convert(kernel='weights.npz'),
    TypeError,
    r"'kernel': 'weights.npz' is not an array",
    id='kernel_that_is_no_array',
  ),
  pytest.param(
    lambda: _convert(kernel=jnp.ones((12, 5)).at[3, 1].set(jnp.nan)),
    ValueError,
    r"'kernel': the kernel holds NaN or infinity; it cannot be decomposed. Go "
    r'back to a checkpoint',
    id='kernel_nan',
  ),
  pytest.param(
    lambda: _convert(kernel=jnp.ones((12, 5)).at[3, 1].set(-jnp.inf)),
    ValueError,
    r"'kernel': the kernel holds NaN or infinity",
    id='kernel_infinite',
  ),
  pytest.param(
    lambda: _convert(layers=[_single()[1]], a={'b': 1.0}, **{'a/b': 2.0}),
    ValueError,
    r"'a/b': two leaves of the tree have this path; rename one of the keys",
    id='ambiguous_paths',
  ),
  pytest.param(
    lambda: oialr.update_basis(_single()[0]),
    ValueError,
    r'params has no low-rank leaf: convert some with to_lowrank first',
    id='update_of_dense_params',
  ),
  pytest.param(
    lambda: oialr.update_basis(_low(), paths=['bias']),
    ValueError,
    r"'bias': no such low-rank leaf; the tree has 1: 'kernel'",
    id='update_of_an_unknown_path',
  ),
  pytest.param(
    lambda: oialr.update_basis(_with_nan(s=jnp.nan)),
    ValueError,
    r"'kernel': Sigma holds NaN or infinity",
    id='update_of_sigma_nan',
  ),
  pytest.param(
    lambda: oialr.update_basis(_with_nan(u=jnp.nan)),
    ValueError,
    r"'kernel': U holds NaN or infinity",
    id='update_of_u_nan',
  ),
  pytest.param(
    lambda: oialr.update_basis(_with_nan(vt=jnp.inf)),
    ValueError,
    r"'kernel': V\^T holds NaN or infinity",
    id='update_of_vt_infinite',
  ),
  pytest.param(
    lambda: oialr.prune_sigma(_single()[0]),
    ValueError,
    r'params has no low-rank leaf: convert some with to_lowrank first',
    id='prune_of_dense_params',
  ),
  pytest.param(
    lambda: oialr.prune_sigma(_low(), paths=['head']),
    ValueError,
    r"'head': no such low-rank leaf; the tree has 1: 'kernel'",
    id='prune_of_an_unknown_path',
  ),
  pytest.param(
    lambda: oialr.prune_sigma(_with_nan(s=jnp.nan)),
    ValueError,
    r"'kernel': Sigma holds NaN or infinity",
    id='prune_of_sigma_nan',
  ),
  *(
    pytest.param(
      functools.partial(
        lambda name, value: oialr.prune_sigma(_low(), **{name: value}),
        name,
        value,
      ),
      ValueError,
      rf'{name}={value}: must be in {interval}',
      id=f'{name}_{value}',
    )
    for name, value, interval in (
      ('cutoff', 0, r'\(0, 1\)'),
      ('cutoff', 1, r'\(0, 1\)'),
      ('cutoff', -1, r'\(0, 1\)'),
      ('cutoff', float('nan'), r'\(0, 1\)'),
      ('max_drop', 0, r'\(0, 1\]'),
      ('max_drop', 1.5, r'\(0, 1\]'),
      ('floor', 1, r'\[0, 1\)'),
      ('floor', -0.1, r'\[0, 1\)'),
    )
  ),
  pytest.param(
    lambda: oialr.compact(_low(), multiple_of=0),
    ValueError,
    r'multiple_of=0: must be at least 1',
    id='compact_to_multiples_of_zero',
  ),
  pytest.param(
    lambda: oialr.compact(_low(), ranks={'kernel': 4}),
    ValueError,
    r"'kernel': rank 4 is less than the 5 directions that are live; prune_sig",
    id='compact_to_less_than_is_live',
  ),
  pytest.param(
    lambda: oialr.compact(_low(), ranks={'bias': 4}),
    ValueError,
    r"'bias': no such low-rank leaf; the tree has 1: 'kernel'",
    id='compact_of_an_unknown_path',
  ),
  pytest.param(
    lambda: oialr.compact(_low(), ranks={'kernel': 5}, multiple_of=8),
    ValueError,
    r'multiple_of=8: ranks say already what to leave; drop one of the two',
    id='compact_to_ranks_and_multiples',
  ),
  pytest.param(
    lambda: jax.jit(oialr.compact)(_low()),
    TypeError,
    r'read values: call them outside jax.jit',
    id='compact_under_jit',
  ),
  pytest.param(
    lambda: oialr.with_trainable(_low(), {'kernel': jnp.ones((5, 5))}),
    ValueError,
    r't does not have the structure of trainable\(params\): .*bias',
    id='with_trainable_lacks_a_leaf',
  ),
  pytest.param(
    lambda: oialr.with_trainable(_low(), list(_single()[0].values())),
    ValueError,
    r't does not have the structure of trainable\(params\)',
    id='with_trainable_of_another_container',
  ),
  pytest.param(
    lambda: oialr.with_trainable(_low(), _low()),
    ValueError,
    r't does not have the structure of trainable\(params\): '
    r".*'kernel'.*LowRank",
    id='with_trainable_of_the_params_themselves',
  ),
]


@pytest.mark.parametrize(('call', 'error', 'message'), _BAD_CALLS)
def test_bad_calls_say_what_is_wrong(call, error, message):
  with pytest.raises(error, match=message):
    call()


@pytest.mark.parametrize('jit', [False, True])
def test_bases_may_be_stored_in_bfloat16(jit):
  w = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)
  params = {'w': jnp.asarray(w)}
  layers = oialr.find_layers(lambda p, x: x @ p['w'], params, np.ones((2, 24)))

  def convert(params):
    low = oialr.to_lowrank(params, layers, basis_dtype='bfloat16')
    return low, oialr.update_basis(low), oialr.prune_sigma(low, cutoff=0.3)

  error = lambda p: np.linalg.norm(oialr.to_dense(p)['w'] - w)
  low, updated, pruned = (jax.jit(convert) if jit else convert)(params)
  for x in (low['w'], updated['w'], pruned['w']):
    assert x.u.dtype == x.vt.dtype == jnp.bfloat16
    assert x.s.dtype == x.dtype == jnp.float32
  # Each of U and V^T is rounded by at most 2^-9 of its entries.
  rounding = 2**-8 * np.linalg.norm(w)
  assert 0 < error(low) < rounding
  assert error(updated) < 2 * rounding
  dropped = np.linalg.svd(w, compute_uv=False)
  dropped = dropped[oialr.ranks(pruned)['w'] :]
  assert error(pruned) < np.linalg.norm(dropped) + 2 * rounding
  x = jnp.ones((3, 24))
  np.testing.assert_allclose(
    oialr.factored(lambda p, x: x @ p['w'])(updated, x),
    x @ oialr.to_dense(updated)['w'],
    rtol=1e-4,
    atol=1e-4,
  )


def test_bases_are_of_floating_dtypes():
  for dtype in ('int8', 'bf16', 3):
    with pytest.raises(TypeError, match='basis_dtype=.*floating dtype'):
      oialr.to_lowrank({}, (), basis_dtype=dtype)
  with pytest.raises(TypeError, match='basis_dtype'):
    oialr.Schedule(steps=3, basis_dtype='int8')
