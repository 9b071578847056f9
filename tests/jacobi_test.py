"""Tests of the SVD by rotations, against NumPy in float64."""

import functools

import jax
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import jacobi
from oialr_jax import linalg
from tests import kernels

SHAPES = [(40, 40), (70, 33), (33, 70), (5, 5), (3, 2), (1, 4), (1, 1)]
# In eps of the matrix's norm: the most that is found is 10, 18 and 5.
RESIDUAL, ORTHONORMAL, VALUES = 30, 40, 15
_SVD = jax.jit(jacobi.svd)


def _families(m: int, n: int, tiny: float) -> dict[str, np.ndarray]:
  """Matrices that are hard in different ways; tiny is a square of eps."""
  rng, k = np.random.default_rng(0), min(m, n)
  spectra = {
    'equal': np.ones(k),
    'falling': np.linspace(1, 0.01, k),
    'graded': np.geomspace(1, tiny, k),
    'steep': np.geomspace(1, tiny**2, k),
    'clusters': np.repeat([1, 0.1, 1e-3], -(-k // 3))[:k],
    'one_large': np.r_[1, np.full(k - 1, 1e-4)],
    'deficient': np.arange(k) < k // 2,
    'small': np.full(k, 1e-25),
    'large': np.geomspace(1e25, 1e20, k),
  }
  u, v = kernels.orthonormal(rng, m, k), kernels.orthonormal(rng, n, k)
  noise = rng.normal(size=(m, n))
  scales = np.geomspace(tiny, 1, max(m, n))
  return {name: u * s @ v.T for name, s in spectra.items()} | {
    'gauss': noise,
    'ones': np.ones((m, n)),
    'diagonal': np.eye(m, n) * np.linspace(2, 1, n),
    'rising': np.eye(m, n) * scales[:n],
    'one_column': np.eye(m, n) * (np.arange(n) == n // 2),
    'trained': np.eye(m, n) * np.linspace(2, 1, n) + 0.01 * noise,
    'columns': noise * scales[:n],
    'rows': noise * scales[:m, None],
    'triangle': np.triu(np.ones((m, n))),
    'hilbert': 1 / (1.0 + np.arange(m)[:, None] + np.arange(n)),
    'zero': np.zeros((m, n)),
  }


def _in_eps(found, desired, eps: float) -> float:
  return np.linalg.norm(kernels.float64(found) - desired, 2) / eps


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize(('m', 'n'), SHAPES)
def test_it_is_backward_stable_and_its_factors_are_orthonormal(m, n, dtype):
  eps = np.finfo(dtype).eps
  families = _families(m, n, tiny=eps**2)
  with jax.enable_x64(dtype == 'float64'):
    stack = np.stack([x.astype(dtype) for x in families.values()])
    found = tuple(map(np.asarray, _SVD(stack)))
  assert {x.dtype for x in found} == {np.dtype(dtype)}
  k, eye = min(m, n), np.eye(min(m, n))
  for name, w, u, s, vt in zip(
    families, *map(kernels.float64, (stack, *found))
  ):
    norm = np.linalg.norm(w, 2) or 1
    assert (u.shape, s.shape, vt.shape) == ((m, k), (k,), (k, n))
    assert np.all(s[:-1] >= s[1:]), name
    assert np.all(s >= 0), name
    values = np.linalg.svd(w / norm, compute_uv=False)
    assert _in_eps(u * (s / norm) @ vt, w / norm, eps) < RESIDUAL, name
    assert _in_eps(u.T @ u, eye, eps) < ORTHONORMAL, name
    assert _in_eps(vt @ vt.T, eye, eps) < ORTHONORMAL, name
    assert np.max(np.abs(s / norm - values)) / eps < VALUES, name


def test_what_is_diagonal_is_decomposed_exactly():
  values = np.array([[5, 3, 0.7, 0.1, 0], [1, 1, 1, 0, 0]], np.float32)
  u, s, vt = _SVD(np.stack([np.diag(x) for x in values]))
  np.testing.assert_array_equal(s, values)
  np.testing.assert_array_equal(np.abs(u), np.stack([np.eye(5)] * 2))
  np.testing.assert_array_equal(u, np.swapaxes(vt, -1, -2))


def test_what_is_not_finite_is_nan_and_spoils_no_other():
  w = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)
  alone = _SVD(w[:1])
  w[1, 2, 1], w[2, 0, 3] = np.nan, np.inf
  together = _SVD(w)
  assert np.all(np.isnan(together[1][1:]))
  for x, y in zip(together, alone):
    np.testing.assert_allclose(x[:1], y, atol=1e-6)


def test_what_takes_too_many_sweeps_is_nan(monkeypatch):
  monkeypatch.setattr(jacobi, 'SWEEPS', 2)
  w = np.random.default_rng(0).normal(size=(2, 6, 6)).astype(np.float32)
  w[1] = np.eye(6)
  s = jax.jit(lambda w: jacobi.svd(w)[1])(w)
  assert np.all(np.isnan(s[0]))
  np.testing.assert_array_equal(s[1], np.ones(6))


def test_rows_of_equal_length_are_turned_by_half_a_right_angle():
  turns, ok = jacobi._orthogonal_rows(np.float32([[[1, 0.5], [0.5, 1]]]))
  assert ok[0]
  np.testing.assert_allclose(np.abs(turns[0]), np.full((2, 2), 0.5**0.5))


def test_transforms_built_on_it_keep_the_product(monkeypatch):
  monkeypatch.setattr(linalg, 'svd', jacobi.svd)
  # What was traced with it stays in JAX's caches: no other test has these.
  layers = [
    kernels.layer('wide', (6, 23), (0,), (1,)),
    kernels.layer('stack', (3, 19, 6), (1,), (2,), (0,)),
  ]
  params = kernels.random_params(layers)
  convert = functools.partial(oialr.to_lowrank, layers=layers)
  low = kernels.trained(jax.jit(convert)(params))
  new = jax.jit(oialr.update_basis)(low)
  pruned = jax.jit(functools.partial(oialr.prune_sigma, cutoff=0.5))(new)
  for layer in layers:
    product = functools.partial(kernels.product, like=layer)
    before = kernels.matrices(product(low[layer.path]), layer)
    after = kernels.matrices(product(new[layer.path]), layer)
    assert kernels.error(after, before) < 4e-6
    values = kernels.singular_values(before)
    _, s, _ = kernels.factors(new[layer.path])
    np.testing.assert_allclose(
      np.diagonal(s, axis1=-2, axis2=-1), values, atol=4e-6 * np.max(values)
    )
    # Eckart and Young: what is lost are the singular values that were dropped.
    kept = np.any(kernels.factors(pruned[layer.path])[0] != 0, axis=-2)
    lost = kernels.matrices(product(pruned[layer.path]), layer) - before
    np.testing.assert_allclose(
      np.linalg.norm(lost, axis=(-2, -1)),
      np.linalg.norm(np.where(kept, 0, values), axis=-1),
      atol=4e-6 * np.max(values),
    )
    assert 0 < np.sum(kept) < kept.size
  jaxpr = jax.make_jaxpr(oialr.update_basis)(low)
  assert not [*kernels.equations(jaxpr, 'svd')], 'not the rotations'
  assert [*kernels.equations(jaxpr, 'while')]
