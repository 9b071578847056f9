"""Tests of the decompositions, against NumPy in float64."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dlrt
from oialr_jax import linalg
from oialr_jax import transforms
from tests import kernels


def _random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# cuSOLVER's Jacobi method rounds more than LAPACK: on an H200 these tests saw
# 1.1e-6, 5e-7 and 1.6e-5 where 1e-6, 0 and 1e-5 are for CPUs.
_ON_CPU = jax.default_backend() == 'cpu'


def _transposed(x):
  return np.swapaxes(x, -1, -2)


@pytest.mark.parametrize('m, n', [(7, 4), (4, 7), (5, 5), (3, 1), (1, 3)])
def test_svd_decomposes_with_unique_signs(m, n):
  w = _random(2, m, n)
  u, s, vt = map(kernels.float64, jax.jit(linalg.svd)(w))
  k = min(m, n)
  assert (u.shape, s.shape, vt.shape) == ((2, m, k), (2, k), (2, k, n))
  assert kernels.error(u * s[:, None] @ vt, w) < (1e-6 if _ON_CPU else 3e-6)
  np.testing.assert_allclose(
    s, kernels.singular_values(kernels.float64(w)), rtol=1e-5
  )
  largest = np.take_along_axis(u, np.argmax(np.abs(u), -2)[:, None], -2)
  assert np.all(largest > 0)


def test_the_svd_of_a_falling_diagonal_is_the_identity():
  values = np.array([[5.0, 3, 2, 1, 0]], np.float32)
  u, s, vt = linalg.svd(np.stack([np.diag(x) for x in values]))
  np.testing.assert_allclose(s, values, rtol=0 if _ON_CPU else 3e-7)
  np.testing.assert_array_equal(u[0], np.eye(5))
  np.testing.assert_array_equal(vt[0], np.eye(5))


@pytest.mark.parametrize('m, n', [(7, 4), (4, 7)])
def test_singular_values_are_those_of_numpy(m, n):
  w = _random(2, m, n)
  found = kernels.modes(linalg.singular_values)
  for f in found.values():
    np.testing.assert_allclose(f(w), kernels.singular_values(w), rtol=1e-5)


def test_an_svd_under_vmap_is_that_of_each():
  w = _random(2, 3, 5, 4)
  expected = [linalg.svd(x) for x in w]
  found = (
    jax.vmap(linalg.svd)(w),
    jax.vmap(linalg.svd, in_axes=1)(np.swapaxes(w, 0, 1)),
  )
  for x in found:
    jax.tree.map(np.testing.assert_array_equal, x, _stacked(expected))


@pytest.mark.parametrize('f', [linalg.svd, linalg.singular_values])
def test_an_svd_needs_no_jit_around_it(f):
  w = _random(2, 5, 4)
  with jax.disable_jit():
    found = f(w)
  jax.tree.map(np.testing.assert_array_equal, found, f(w))


def _stacked(trees):
  return jax.tree.map(lambda *x: np.stack(x), *trees)


def _lowered(f, platform, *shape):
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.export.export(jax.jit(f), platforms=[platform])(x).mlir_module()


def _library(w):
  return tuple(jnp.linalg.svd(w, full_matrices=False))


@pytest.mark.parametrize('platform', ['cpu', 'cuda'])
def test_the_svd_is_the_librarys(platform):
  calls = lambda f: re.findall(
    r'custom_call @(\w+)', _lowered(f, platform, 2, 7, 4)
  )
  assert calls(linalg.svd) == calls(_library) != []


def test_the_compiled_svd_is_the_librarys_and_nothing_else():
  """The rotations leave no trace in a program for CPUs."""
  compiled = lambda f: re.sub(
    r', metadata=\{.*?\}|^HloModule.*$', '', _compiled(f), flags=re.M
  ).split('\nENTRY')[1]
  values = lambda w: jnp.linalg.svd(w, full_matrices=False, compute_uv=False)
  assert compiled(linalg.singular_values) == compiled(values)


def _compiled(f):
  return jax.jit(f).lower(_random(2, 7, 4)).compile().as_text()


@pytest.mark.parametrize('f', [linalg.svd, linalg.singular_values])
def test_on_a_tpu_the_svd_is_a_small_program(f):
  sizes = {}
  for n in (64, 512, 2048):
    text = _lowered(f, 'tpu', 1, n, n)
    sizes[n] = len(text)
    assert 'Eigh' not in text
    assert text.count('stablehlo.while') == 2, 'sweeps of rounds, no more'
  # The library's grows from 54 kB to 502 kB.
  assert sizes[2048] < 1.1 * sizes[64] < 60_000
  assert len(_lowered(_library, 'tpu', 1, 512, 512)) > 4 * sizes[512]


@pytest.mark.parametrize(
  'live',
  [
    pytest.param([1, 1, 1, 1, 1], id='all'),
    pytest.param([1, 1, 1, 0, 0], id='first'),
    pytest.param([0, 1, 0, 1, 1], id='not_first'),
    pytest.param([0, 0, 0, 0, 0], id='none'),
  ],
)
@pytest.mark.parametrize(
  'scale',
  [
    pytest.param(1.0, id='full_rank'),
    pytest.param(0.0, id='zero'),
    pytest.param([1, 0, 0, 0, 0], id='rank_1'),
    pytest.param(1e-6, id='tiny'),
    pytest.param(1e6, id='huge'),
  ],
)
def test_svd_live_decomposes_the_live_block(live, scale):
  live = np.array([live, [1, 1, 0, 0, 0]], bool)
  s = _random(2, 5, 5) * np.asarray(scale, np.float32)
  u, values, vt = map(kernels.float64, jax.jit(linalg.svd_live)(s, live))
  block = kernels.float64(s) * live[:, None, :] * live[:, :, None]
  size = np.linalg.norm(block)
  np.testing.assert_allclose(u * values[:, None] @ vt, block, atol=2e-6 * size)
  np.testing.assert_allclose(
    values, kernels.singular_values(block), atol=2e-6 * size
  )
  for i, k in enumerate(live.sum(axis=-1)):
    # Live directions come first and are orthonormal, without any part in the
    # pruned coordinates; behind them there is nothing.
    eye = np.diag((np.arange(5) < k).astype(float))
    for x in (u[i], vt[i].T):
      np.testing.assert_allclose(x.T @ x, eye, atol=1e-5)
      np.testing.assert_allclose(x[~live[i]], 0, atol=1e-6)
      assert not np.any(x[:, k:])
    assert not np.any(values[i, k:])


@pytest.mark.parametrize('m, n', [(7, 4), (4, 7), (5, 5)])
def test_polar_is_the_orthogonal_factor(m, n):
  w = _random(2, m, n)
  np.testing.assert_allclose(
    linalg.polar(w), kernels.polar(kernels.float64(w)), atol=1e-5
  )


def test_polar_leaves_out_directions_without_length():
  # The largest rounding error of such an SVD is some eps of the spectrum.
  rng = np.random.default_rng(0)
  u, v = (kernels.orthonormal(rng, 3, 64, 32) for _ in range(2))
  u[2] = 0
  w = kernels.array(u @ _transposed(v), 'float32')
  atol = 1e-5 if _ON_CPU else 3e-5
  np.testing.assert_allclose(linalg.polar(w), w, atol=atol)


def test_drift_measures_live_columns_only():
  q = kernels.orthonormal(np.random.default_rng(0), 3, 6, 4)
  q[1, :, 3] = 0
  q[2, :, 2] *= 1.1
  np.testing.assert_allclose(
    linalg.drift(jnp.float32(q)), [0, 0, 0.21], atol=1e-6
  )


def test_qr_live_keeps_pruned_columns_zero():
  u = _random(2, 6, 4)
  u[1, :, 2:] = 0
  q, triangle = map(kernels.float64, linalg.qr_live(u))
  assert kernels.error(q @ triangle, u) < 1e-6
  eye = np.eye(4) * np.any(u != 0, axis=-2)[:, None]
  np.testing.assert_allclose(_transposed(q) @ q, eye, atol=1e-6)
  np.testing.assert_array_equal(np.tril(triangle, -1), 0)
  assert not np.any(q[1, :, 2:])
  assert not np.any(triangle[1, 2:])


def test_qr_live_flips_no_sign():
  u = kernels.orthonormal(np.random.default_rng(0), 2, 6, 4)
  u *= [1, -1, 1, -1]
  q, triangle = linalg.qr_live(jnp.float32(u))
  np.testing.assert_allclose(q, u, atol=1e-6)
  np.testing.assert_allclose(triangle, np.stack([np.eye(4)] * 2), atol=1e-6)


def test_by_shape_calls_once_for_equal_shapes_and_types():
  calls = []

  def f(x, y):
    calls.append((x.shape, str(x.dtype), y.shape))
    return x + y[..., :1], y.sum(-1)

  operands = {
    'a': (_random(1, 3), _random(1, 2)),
    'odd': (_random(2, 4), _random(2, 2)),
    'b': (_random(2, 3, seed=1), _random(2, 2, seed=1)),
    'narrow': (jnp.bfloat16(_random(1, 3)), _random(1, 2)),
    'c': (_random(1, 3, seed=2), _random(1, 2, seed=2)),
    'second': (_random(1, 3), _random(1, 5)),
  }
  found = linalg.by_shape(f, operands)
  assert list(found) == list(operands)
  assert set(calls) == {
    ((4, 3), 'float32', (4, 2)),
    ((2, 4), 'float32', (2, 2)),
    ((1, 3), 'bfloat16', (1, 2)),
    ((1, 3), 'float32', (1, 5)),
  }
  assert len(calls) == 4
  for path, (x, y) in operands.items():
    np.testing.assert_array_equal(found[path][0], x + y[..., :1])
    np.testing.assert_allclose(found[path][1], y.sum(-1), rtol=1e-6)


def test_by_shape_of_nothing_is_nothing():
  assert linalg.by_shape(linalg.svd, {}) == {}


def _at_once(fn, *args):
  """Pairs of the SVDs and QRs of a program, neither of which waits for the other.

  And how many of them the program has.
  """
  before = []  # of each, the earlier ones that it waits for

  def walk(jaxpr, arguments):
    of = dict(zip(jaxpr.invars, arguments, strict=True))
    waits = lambda vars: frozenset().union(
      *(of.get(v, ()) for v in vars if not hasattr(v, 'val'))
    )
    for eqn in jaxpr.eqns:
      found = waits(eqn.invars)
      results = [found] * len(eqn.outvars)
      if eqn.primitive.name in ('svd', 'qr'):
        results = [found | {len(before)}] * len(eqn.outvars)
        before.append(found)
      elif eqn.primitive.name == 'cond':
        arguments = [found] * len(eqn.invars[1:])
        for branch in eqn.params['branches']:
          more = walk(branch.jaxpr, arguments)
          # Its results come together.
          results = [x.union(*more) for x in results]
      elif 'jaxpr' in eqn.params:
        inner = eqn.params['jaxpr']
        inner = getattr(inner, 'jaxpr', inner)
        results = walk(inner, [waits([v]) for v in eqn.invars])
      of.update(zip(eqn.outvars, results, strict=True))
    return [waits([v]) for v in jaxpr.outvars]

  jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
  walk(jaxpr, [frozenset()] * len(jaxpr.invars))
  pairs = [(i, n) for n in range(len(before)) for i in range(n)]
  return sum(i not in before[n] for i, n in pairs), len(before)


def test_qrs_of_drifted_bases_are_one_after_the_other():
  parts = (jnp.ones((1, n, m)) for n, m in ((5, 3), (3, 3), (3, 4)))
  assert _at_once(transforms._orthonormalised, *parts) == (0, 2)


def _parts(*sizes):
  """U, Sigma and V^T of as many kernels as there are sizes."""
  return {
    str(n): (jnp.ones((2, n, 3)), jnp.ones((2, 3, 3)), jnp.ones((2, 3, 4)))
    for n in sizes
  }


def test_what_waits_for_none_is_seen():
  apart = lambda parts: {k: linalg.svd(u)[1] for k, (u, _, _) in parts.items()}
  assert _at_once(apart, _parts(3, 4, 5, 6)) == (6, 4)
  both = lambda u, v: (jnp.linalg.qr(u), jnp.linalg.qr(v))
  assert _at_once(both, jnp.ones((5, 3)), jnp.ones((4, 3))) == (1, 2)


@pytest.mark.parametrize(
  'f, count',
  [
    pytest.param(lambda u, s, vt: linalg.svd(u), 1, id='svd'),
    pytest.param(transforms._align, 3, id='update'),
    pytest.param(
      lambda u, s, vt: transforms._rotate(u, s, vt, s, s), 2, id='rotation'
    ),
    pytest.param(lambda u, s, vt: transforms._decompose(u), 2, id='transition'),
    pytest.param(
      lambda u, s, vt: dlrt._augmented(u, s, vt, u, vt), 2, id='dlrt'
    ),
  ],
)
def test_svds_and_qrs_of_one_program_are_one_after_the_other(f, count):
  """XLA's CPU runtime can deadlock where two of them run at once."""
  chained = lambda parts: linalg.by_shape(f, parts)
  assert _at_once(chained, _parts(5, 6, 7)) == (0, 3 * count)


def test_waiting_changes_nothing():
  rng = np.random.default_rng(0)
  draw = lambda n: (jnp.asarray(rng.normal(size=(2, n, 3)), jnp.float32),)
  kernels = {str(n): draw(n) for n in (3, 4, 7)}
  for path, (x,) in kernels.items():
    expected = jax.jit(linalg.svd)(x)
    found = jax.jit(lambda k: linalg.by_shape(linalg.svd, k))(kernels)[path]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
