"""Tests of what is decomposed where; on eight devices, in `spread_cases`."""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oialr_jax import linalg
from oialr_jax import spread
from tests import parallel_test


def _loads(costs, owners, workers):
  return np.bincount(owners, costs, minlength=workers)


def test_nobody_has_more_than_a_third_too_much():
  rng = np.random.default_rng(0)
  for workers in (1, 2, 3):
    costs = rng.pareto(1, size=8).tolist()
    owners = spread.assign(costs, workers)
    everything = itertools.product(range(workers), repeat=len(costs))
    best = min(np.max(_loads(costs, x, workers)) for x in everything)
    assert np.max(_loads(costs, owners, workers)) <= 4 / 3 * best


def test_as_many_as_there_are_workers_are_one_for_each():
  assert sorted(spread.assign([3, 1, 2], 3)) == [0, 1, 2]
  assert sorted(spread.assign([5, 5], 256)) == [0, 1]
  assert spread.assign([], 4) == []


def test_ranks_after_a_compaction_are_balanced():
  """Of a ViT-B on 8 devices, every Sigma with a rank of its own."""
  ranks = np.random.default_rng(0).integers(40, 400, size=72)
  loads = _loads(ranks**3, spread.assign((ranks**3).tolist(), 8), 8)
  assert np.max(loads) < 1.05 * np.mean(loads)


_OPERANDS = {
  str(n): (np.ones((2, n, 3), np.float32), np.ones((2, n), bool))
  for n in (3, 4)
}


def _first(w, live):
  return (jnp.where(live[..., None], w, 0), *linalg.svd(w))


def test_axes_of_one_device_may_be_explicit():
  explicit = jax.sharding.AxisType.Explicit
  mesh = jax.make_mesh((1,), ('data',), axis_types=(explicit,))
  w = np.random.default_rng(0).normal(size=(1, 6, 4)).astype(np.float32)
  with jax.set_mesh(mesh):
    for spec in [(), (None, 'data'), (None, None, 'data')]:
      split = jax.device_put(w, jax.P(*spec))
      found = spread.by_shape(linalg.svd, {'w': (split,)})['w']
      for x, y in zip(found, linalg.svd(jnp.asarray(w))):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('meshed', [False, True])
def test_on_one_device_it_is_linalgs(meshed):
  auto = jax.sharding.AxisType.Auto
  mesh = jax.make_mesh((1,), ('data',), axis_types=(auto,))
  jaxpr = lambda f: str(jax.make_jaxpr(functools.partial(f, _first))(_OPERANDS))
  with jax.set_mesh(mesh) if meshed else contextlib.nullcontext():
    assert spread.devices() == 1
    assert jaxpr(spread.by_shape) == jaxpr(linalg.by_shape)


def test_of_nothing_is_nothing():
  assert spread.by_shape(_first, {}) == {}


def test_on_eight_devices():
  done = parallel_test.run(
    'pytest',
    '-q',
    '-x',
    'tests/spread_cases.py',
    devices=8,
    # Where there are fewer cores, what several executions of one program send
    # each other takes all threads of XLA's pool, which then wait for each other.
    PJRT_NPROC='32',
  )
  assert done.returncode == 0, done.stdout
