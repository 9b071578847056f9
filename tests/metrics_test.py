"""Tests of the metrics, against NumPy in float64."""

import dataclasses
import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import linalg
from tests import kernels

_STATES = ('dense', 'fresh', 'trained', 'pruned', 'deficient')
_BASIS = kernels.modes(lambda p: oialr.basis(p, kernels.LAYERS))


@pytest.fixture(params=['eager', 'jit'])
def mode(request) -> str:
  return request.param


@pytest.fixture(scope='module')
def states():
  """Parameters in every state, made without the package's own transforms."""
  dense = kernels.random_params()
  fresh = dense | {x.path: _svd(dense[x.path], x) for x in kernels.LAYERS}
  return {
    'dense': dense,
    'fresh': fresh,
    'trained': kernels.trained(fresh),
    'pruned': {p: _pruned(x, 3) for p, x in kernels.trained(fresh).items()},
    'deficient': kernels.deficient(fresh),
  }


def _svd(kernel, layer) -> oialr.LowRank:
  u, s, vt = np.linalg.svd(kernels.matrices(kernel, layer), full_matrices=False)
  return kernels.node(layer, u, np.stack([np.diag(x) for x in s]), vt)


def _pruned(x, rank):
  """Only the first `rank` directions of a low-rank kernel are live."""
  if not oialr.is_low_rank(x):
    return x
  live = jnp.arange(x.rank) < rank
  over_columns = (-1,) + (1,) * len(x.view.cols)
  return dataclasses.replace(
    x,
    u=x.u * live,
    s=x.s * live * live[:, None],
    vt=x.vt * live.reshape(over_columns),
  )


def _dense_matrices(params, layer) -> np.ndarray:
  x = params[layer.path]
  if oialr.is_low_rank(x):
    x = kernels.product(x, layer)
  return kernels.matrices(x, layer)


def _rank(state, layer) -> int:
  return min({'pruned': 3, 'deficient': 2}.get(state, 99), layer.max_rank)


def test_ranks_are_logical_and_the_largest_of_a_stack():
  rng = np.random.default_rng(0)
  layer = kernels.BY_PATH['stack']
  u = kernels.orthonormal(rng, 3, 12, 5)
  u[0, :, 1:], u[1, :, 4:], u[2, :, 2:] = 0, 0, 0
  s, vt = np.zeros((3, 5, 5)), kernels.orthonormal(rng, 3, 5, 5)
  params = {'a': {'stack': kernels.node(layer, u, s, vt)}, 'b': jnp.ones(3)}
  assert oialr.ranks(params) == {'a/stack': 4}
  assert oialr.ranks({'dense': jnp.ones((3, 3))}) == {}


def test_count_in_every_form():
  layer = kernels.layer('kernel', (12, 5), (0,), (1,))
  dense = kernels.random_params([layer])
  assert oialr.count(dense) == (65, 65, 65)
  low = oialr.to_lowrank(dense, [layer], rank=2)
  assert oialr.count(low) == oialr.Counts(
    trainable=2 * 2 + 5, stored=12 * 2 + 2 * 2 + 2 * 5 + 5, dense=65
  )
  pruned = low | {'kernel': _pruned(low['kernel'], 1)}
  assert oialr.count(pruned) == oialr.count(low)  # as they are stored
  by_ranks = oialr.count(pruned, oialr.ranks(pruned))
  assert by_ranks == oialr.count(low)._replace(trainable=1 + 5)
  factors = oialr.to_factors(low)
  assert oialr.count(factors) == (12 * 2 + 2 * 5 + 5, 12 * 2 + 2 * 5 + 5, 65)


def test_count_by_ranks_of_a_stack():
  layer = kernels.BY_PATH['stack']
  dense = kernels.random_params([layer])
  low = oialr.to_lowrank(dense, [layer])
  assert layer.stack > 1 and low['stack'].rank > 2
  found = oialr.count(low, {'stack': 2})
  assert found.trainable == oialr.count(dense).dense - (
    math.prod(layer.shape) - layer.stack * 2**2
  )


def test_count_needs_no_values_and_counts_only_arrays(states):
  shapes = jax.eval_shape(lambda: states['fresh'])
  assert oialr.count(shapes) == oialr.count(states['fresh'])
  assert oialr.count(shapes).dense == 5 + sum(
    math.prod(x.shape) for x in kernels.LAYERS
  )
  assert oialr.count({'w': jnp.ones(3), 'name': 'a name'}) == (3, 3, 3)


@pytest.mark.parametrize('state', _STATES)
def test_the_basis_is_the_polar_factor(states, state, mode):
  params = states[state]
  found = _BASIS[mode](params)
  assert set(found) == set(kernels.BY_PATH)
  for path, layer in kernels.BY_PATH.items():
    rank = _rank(state, layer)
    w = _dense_matrices(params, layer)
    np.testing.assert_allclose(
      found[path], kernels.polar(w, rank), atol=2e-4, err_msg=path
    )
    np.testing.assert_allclose(
      np.linalg.norm(found[path], axis=(-2, -1)), rank**0.5, rtol=1e-4
    )


@pytest.mark.parametrize('state', ['pruned', 'deficient'])
def test_dense_and_low_rank_kernels_of_one_product_have_one_basis(
  states, state
):
  params = states[state]
  dense = oialr.to_dense(params)
  found = oialr.stability(_BASIS['eager'](params), _BASIS['eager'](dense))
  for path in kernels.BY_PATH:
    np.testing.assert_allclose(found[path], 1, atol=1e-5, err_msg=path)


@pytest.mark.parametrize('size, rank', [(64, 32), (160, 20)])
def test_the_basis_leaves_rounding_errors_out(size, rank):
  rng = np.random.default_rng(0)
  layer = kernels.layer('w', (size, size), (0,), (1,))
  u, v = (kernels.orthonormal(rng, size, rank) for _ in range(2))
  found = oialr.basis({'w': kernels.array(u @ v.T, 'float32')}, [layer])
  np.testing.assert_allclose(np.linalg.norm(found['w']), rank**0.5, rtol=1e-4)


def test_a_change_of_basis_is_perfectly_stable(states):
  low = states['trained']
  found = oialr.stability(
    _BASIS['eager'](low), _BASIS['eager'](oialr.update_basis(low))
  )
  assert set(found) == set(kernels.BY_PATH)
  np.testing.assert_allclose(list(found.values()), 1, atol=1e-5)


def test_stability_is_the_papers_measure_at_full_rank():
  old, new = (
    _BASIS['eager'](kernels.random_params(seed=seed)) for seed in (0, 1)
  )
  found = oialr.stability(old, new)
  for path, layer in kernels.BY_PATH.items():
    a, b = kernels.float64(old[path]), kernels.float64(new[path])
    trace = np.trace(a.swapaxes(-1, -2) @ b, axis1=-2, axis2=-1)
    expected = np.mean(trace / layer.max_rank)
    np.testing.assert_allclose(found[path], expected, atol=1e-5)
    # In the tall orientation: the mean cosine of the columns.
    axis = -2 if a.shape[-2] >= a.shape[-1] else -1
    cosine = np.sum(a * b, axis) / (
      np.linalg.norm(a, axis=axis) * np.linalg.norm(b, axis=axis)
    )
    np.testing.assert_allclose(found[path], np.mean(cosine), atol=1e-5)
    assert abs(found[path]) < 0.9, path


def test_stability_is_one_of_the_same_and_minus_one_of_the_opposite(states):
  for state in ('dense', 'pruned'):
    b = _BASIS['eager'](states[state])
    opposite = {path: -x for path, x in b.items()}
    for other, expected in ((b, 1), (opposite, -1)):
      found = list(oialr.stability(b, other).values())
      np.testing.assert_allclose(found, expected, atol=1e-6)


def test_stability_of_pruned_bases_is_that_of_the_directions_left():
  rng = np.random.default_rng(0)
  u, other = (kernels.orthonormal(rng, 2, 7, 4) for _ in range(2))
  v = kernels.orthonormal(rng, 2, 5, 4)
  basis = lambda u, rank: {'w': u[..., :rank] @ v[..., :rank].swapaxes(-1, -2)}
  for old, new in ((2, 4), (4, 2), (3, 3)):
    found = oialr.stability(basis(u, old), basis(u, new))
    np.testing.assert_allclose(found['w'], 1, atol=1e-6)
  # In a stack, each matrix counts by its own ranks.
  old, new = basis(u, 4)['w'], basis(other, 3)['w']
  new[0] = basis(other, 1)['w'][0]
  trace = np.trace(old.swapaxes(-1, -2) @ new, axis1=-2, axis2=-1)
  found = oialr.stability({'w': old}, {'w': new})
  np.testing.assert_allclose(found['w'], np.mean(trace / [1, 3]), atol=1e-6)


def test_stability_compares_what_both_have():
  x, y = jnp.ones((1, 2, 2)), jnp.eye(2)[None]
  assert set(oialr.stability({'a': x, 'b': y}, {'b': y, 'c': x})) == {'b'}


def test_the_stability_of_nothing_is_zero():
  x = jnp.zeros((1, 2, 2))
  assert oialr.stability({'a': x}, {'a': x}) == {'a': 0}


def test_basis_compiles_once(monkeypatch):
  traced, polar = [], linalg.polar
  monkeypatch.setattr(
    linalg, 'polar', lambda w: traced.append(w.shape) or polar(w)
  )
  layer = kernels.layer('kernel', (11, 3), (0,), (1,))
  for seed in range(3):
    oialr.basis(kernels.random_params([layer], seed=seed), [layer])
  assert traced == [(1, 11, 3)]


@pytest.mark.parametrize('state', ['dense', 'trained'])
def test_mixing_is_the_triangle_of_the_tall_orientation(states, state):
  found = oialr.mixing(states[state], kernels.LAYERS)
  for path, layer in kernels.BY_PATH.items():
    w = _dense_matrices(states[state], layer)
    w = w if layer.matrix[0] >= layer.matrix[1] else w.swapaxes(-1, -2)
    r = np.linalg.qr(w, mode='r')
    r *= np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None]
    np.testing.assert_allclose(found[path], r, atol=2e-5, err_msg=path)


def test_r_distance_is_the_frobenius_norm_of_the_change():
  a, b = np.arange(12.0).reshape(3, 2, 2), np.ones((3, 2, 2))
  found = oialr.r_distance({'a': a, 'b': a}, {'a': b, 'c': b})
  assert set(found) == {'a'}
  np.testing.assert_allclose(found['a'], np.linalg.norm((a - b).ravel()))


@pytest.mark.parametrize('state', _STATES)
def test_spectra_are_the_singular_values(states, state):
  params = states[state]
  found = oialr.spectra(params, kernels.LAYERS)
  for path, layer in kernels.BY_PATH.items():
    values = kernels.singular_values(_dense_matrices(params, layer))
    atol = 1e-5 * np.max(values)
    np.testing.assert_allclose(found[path], values, atol=atol, err_msg=path)
  if state != 'dense':
    by_default = oialr.spectra(params)
    assert set(by_default) == set(found)
    jax.tree.map(np.testing.assert_array_equal, by_default, found)


def test_the_spectra_of_dense_params_are_none_by_default(states):
  assert oialr.spectra(states['dense']) == {}


def test_spectra_on_a_tpu_are_by_rotations():
  """The library's decomposition takes minutes to compile there."""
  layer = kernels.BY_PATH['tall']
  spectra = jax.jit(lambda p: oialr.spectra(p, [layer]))
  shapes = {'tall': jax.ShapeDtypeStruct(layer.shape, jnp.float32)}
  text = jax.export.export(spectra, platforms=['tpu'])(shapes).mlir_module()
  assert 'Eigh' not in text
  assert text.count('stablehlo.while') == 2, 'sweeps of rounds, no more'


def test_factors_have_the_metrics_of_their_product(states):
  layer = kernels.BY_PATH['tall']
  low = {'tall': _pruned(states['trained']['tall'], 2)}
  factors = oialr.to_factors(oialr.compact(low))
  assert isinstance(factors['tall'], oialr.Factors)
  for metric in (oialr.basis, oialr.mixing, oialr.spectra):
    expected = metric(oialr.to_dense(low), [layer])['tall']
    found = metric(factors, [layer])['tall']
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_drift_is_the_departure_from_orthonormality(states):
  low = {p: states['pruned'][p] for p in ('square', 'query', 'bias')}
  small = oialr.drift(low)
  assert set(small) == {'square', 'query'}
  assert max(small.values()) < 1e-6  # pruned directions are no drift
  x = low['square']
  longer = dataclasses.replace(x, u=x.u * jnp.array([1, 1, 1.1, 1, 1, 1]))
  turned = dataclasses.replace(x, vt=x.vt.at[1].add(0.1 * x.vt[0]))
  for node, expected in ((longer, 0.21), (turned, 0.1)):
    found = oialr.drift(low | {'square': node})
    np.testing.assert_allclose(found['square'], expected, atol=1e-5)
    assert found['query'] == small['query']


def test_bases_in_bfloat16_have_drifted(states):
  x = states['fresh']['square']
  x = dataclasses.replace(x, u=x.u.astype(jnp.bfloat16))
  u, _, _ = kernels.factors(x)
  expected = np.max(np.abs(u.swapaxes(-1, -2) @ u - np.eye(6)))
  np.testing.assert_allclose(oialr.drift({'a': x})['a'], expected, rtol=1e-3)
  assert 1e-4 < expected < 1e-2


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    *(
      pytest.param(
        lambda metric=metric: metric(
          kernels.random_params([kernels.BY_PATH['wide']]),
          [kernels.BY_PATH['tall']],
        ),
        r"'tall': no such parameter; the tree has 2: 'bias', 'wide'",
        id=f'{metric.__name__}_of_an_unknown_path',
      )
      for metric in (oialr.basis, oialr.mixing, oialr.spectra)
    ),
    pytest.param(
      lambda: oialr.stability({'a': jnp.ones(1)}, {'b': jnp.ones(1)}),
      r'old and new have no path in common: nothing to compare',
      id='stability_of_disjoint_paths',
    ),
    pytest.param(
      lambda: oialr.stability({}, {}),
      r'old and new have no path in common',
      id='stability_of_nothing',
    ),
    pytest.param(
      lambda: oialr.stability(
        {'a/b': jnp.ones((1, 3, 2))}, {'a/b': jnp.ones((1, 2, 3))}
      ),
      r"'a/b': matrices of shapes \(1, 3, 2\) and \(1, 2, 3\) cannot be compared",
      id='stability_of_other_shapes',
    ),
    pytest.param(
      lambda: oialr.r_distance({'a': jnp.ones(1)}, {'b': jnp.ones(1)}),
      r'old and new have no path in common: nothing to compare',
      id='r_distance_of_disjoint_paths',
    ),
  ],
)
def test_bad_calls_say_what_is_wrong(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_ranks_need_values():
  layer = kernels.BY_PATH['tall']
  low = {'tall': _svd(kernels.random_params([layer])['tall'], layer)}
  with pytest.raises(TypeError, match='outside jax.jit'):
    jax.jit(oialr.ranks)(low)
