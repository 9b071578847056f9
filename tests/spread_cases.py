"""What is tested on eight devices, by `spread_test`."""

import functools
import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import hlo
import oialr_jax as oialr
from oialr_jax import linalg
from oialr_jax import metrics
from oialr_jax import schedule as schedule_lib
from oialr_jax import sharding
from oialr_jax import spread
from tests import kernels

P = jax.sharding.PartitionSpec
LAYERS = [kernels.BY_PATH[path] for path in ('wide', 'square', 'stack', 'qkv')]
SCHEDULE = oialr.Schedule(steps=9, delay=2, every=2, progressive=1.0)
MESHES = {
  'eight': ((8,), ('data',)),
  'two_by_four': ((2, 4), ('data', 'fsdp')),
}


@pytest.fixture(autouse=True, scope='module')
def _on_eight_devices():
  assert len(jax.devices()) == 8, 'run by spread_test'


def _mesh(name, kind=jax.sharding.AxisType.Auto):
  sizes, names = MESHES[name]
  return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))


def _placed(params, where):
  """The mesh, and the parameters on it."""
  if where == 'fsdp':
    place = sharding.Placement(sharding.make_mesh(data=2, fsdp=4), min_size=16)
    return place.mesh, jax.device_put(params, place.shardings(params))
  mesh = _mesh(where)
  return mesh, jax.device_put(params, jax.NamedSharding(mesh, P()))


def _assert_same(found, expected):
  """To rounding, and to the bit on all devices that hold the same part."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert x.dtype == y.dtype
    size = np.max(np.abs(kernels.float64(y)), initial=1e-30)
    np.testing.assert_allclose(
      kernels.float64(x), kernels.float64(y), atol=2e-6 * size
    )
    parts = {}
    for shard in x.addressable_shards:
      part = parts.setdefault(str(shard.index), np.asarray(shard.data))
      np.testing.assert_array_equal(np.asarray(shard.data), part)


@functools.cache
def _trained():
  low = oialr.to_lowrank(kernels.random_params(LAYERS), LAYERS)
  return kernels.trained(low)


@functools.cache
def _drifted():
  """One of its bases is no longer orthonormal, as after bfloat16."""
  low = dict(_trained())
  x = low['wide']
  low['wide'] = oialr.LowRank(1.01 * x.u, x.s, x.vt, x.view)
  return low


def _to_lowrank(params):
  return oialr.to_lowrank(params, LAYERS)


@pytest.mark.parametrize(
  ('f', 'make', 'where'),
  [
    (_to_lowrank, lambda: kernels.random_params(LAYERS), 'eight'),
    (_to_lowrank, lambda: kernels.random_params(LAYERS), 'fsdp'),
    (oialr.update_basis, _trained, 'two_by_four'),
    (oialr.update_basis, _trained, 'fsdp'),
    (oialr.update_basis, _drifted, 'fsdp'),
    (oialr.prune_sigma, _trained, 'two_by_four'),
    (metrics.spectra, _trained, 'eight'),
  ],
)
def test_a_transform_is_the_same_as_without_a_mesh(f, make, where):
  expected = jax.jit(f)(make())
  mesh, params = _placed(make(), where)
  with jax.set_mesh(mesh):
    _assert_same(jax.jit(f)(params), expected)


def test_they_may_be_called_outside_of_jit():
  mesh, params = _placed(kernels.random_params(LAYERS), 'two_by_four')
  expected = _to_lowrank(kernels.random_params(LAYERS))
  with jax.set_mesh(mesh):
    _assert_same(_to_lowrank(params), expected)
    params['wide'] *= np.nan
    with pytest.raises(ValueError, match="'wide': .* NaN"):
      _to_lowrank(params)


@pytest.mark.parametrize('where', ['eight', 'fsdp'])
@pytest.mark.parametrize('step', [2, 4])
def test_an_event_is_the_same_as_without_a_mesh(step, where):
  params = kernels.random_params(LAYERS) if step == 2 else _trained()
  event = SCHEDULE.event(step)
  apply = functools.partial(
    oialr.apply_event, event, opt_state=None, layers=LAYERS, schedule=SCHEDULE
  )
  expected, _, before = apply(params=params)
  mesh, params = _placed(params, where)
  with jax.set_mesh(mesh):
    found, _, report = apply(params=params)
  _assert_same(found, expected)
  _assert_same(report.ranks, before.ranks)
  _assert_same(report.spectra, before.spectra)


def _operands(seed=0):
  rng = np.random.default_rng(seed)
  shapes = [(1, 9, 9), (3, 8, 5), (2, 8, 5), (1, 5, 8), (12, 4, 4), (1, 6, 6)]
  return {
    str(i): (rng.normal(size=shape).astype(np.float32),)
    for i, shape in enumerate(shapes)
  }


def _svds(operands):
  return linalg.by_shape(linalg.svd, operands)


@pytest.mark.parametrize('name', MESHES)
def test_every_matrix_is_decomposed_on_one_device(name):
  mesh, operands = _mesh(name), _operands()

  def who(w):
    me = 1 + jax.lax.axis_index(mesh.axis_names)
    return w, jnp.full(len(w), me)

  with jax.set_mesh(mesh):
    found = jax.jit(lambda x: spread.by_shape(who, x))(operands)
  loads = np.zeros(8)
  for path, (w,) in operands.items():
    # Of two devices it would be the sum.
    np.testing.assert_array_equal(found[path][0], w)
    assert np.all((found[path][1] >= 1) & (found[path][1] <= 8))
    cost = math.prod(w.shape[1:]) * min(w.shape[1:])
    np.add.at(loads, np.asarray(found[path][1]) - 1, cost)
  assert np.max(loads) <= max(9**3, 4 / 3 * np.mean(loads))


def test_types_survive():
  operands = _operands()

  def f(w):
    return (
      w.astype(jnp.bfloat16),
      w[:, 0] > 0,
      jnp.all(jnp.isfinite(w), axis=(1, 2)),
      jnp.argmax(w[:, 0], axis=-1),
      w.astype(jnp.float64) + 1e-12,
    )

  with jax.enable_x64(True), jax.set_mesh(_mesh('eight')):
    found = jax.jit(lambda x: spread.by_shape(f, x))(operands)
    for path, (w,) in operands.items():
      jax.tree.map(np.testing.assert_array_equal, found[path], f(w))
      types_of = lambda xs: [x.dtype for x in xs]
      assert types_of(found[path]) == types_of(f(w))


def test_what_is_not_finite_stays_with_its_matrix():
  operands = _operands()
  operands['1'][0][1, 2, 3] = np.nan
  with jax.set_mesh(_mesh('eight')):
    f = lambda w: (w, jnp.isfinite(w))
    found = jax.jit(lambda x: spread.by_shape(f, x))(operands)
  for path, (w,) in operands.items():
    np.testing.assert_array_equal(found[path][0], w)
    np.testing.assert_array_equal(found[path][1], np.isfinite(w))


def test_the_program_has_one_svd_per_shape_and_sends_results_only():
  operands = _operands()
  f = lambda x: spread.by_shape(linalg.svd, x)
  with jax.set_mesh(_mesh('eight')):
    compiled = jax.jit(f).lower(operands).compile()
    branches = kernels.equations(jax.make_jaxpr(f)(operands), 'cond')
  svds = [list(kernels.equations(x, 'svd')) for x in _jaxprs(branches)]
  assert sorted(map(len, svds)) == [0] * 5 + [1] * 5
  assert compiled.as_text().count('custom_call_target="lapack_sgesdd') == 5
  results = jax.tree.leaves(jax.eval_shape(_svds, operands))
  sent = sum(x.size * x.dtype.itemsize for x in results)
  assert hlo.sent(compiled, 'all-reduce') == sent
  assert not any(
    hlo.sent(compiled, kind) for kind in hlo.KINDS if kind != 'all-reduce'
  )


def _jaxprs(conditions):
  return [branch for x in conditions for branch in x.params['branches']]


def test_axes_may_be_explicit():
  """They are what `jax.make_mesh` makes by default."""
  mesh = _mesh('two_by_four', jax.sharding.AxisType.Explicit)
  operands = _operands()
  expected = jax.jit(_svds)(operands)
  with jax.set_mesh(mesh):
    on_mesh = jax.device_put(operands, jax.NamedSharding(mesh, P()))
    split = P(None, 'fsdp')
    on_mesh['1'] = (jax.device_put(operands['1'][0], split),)
    found = jax.jit(lambda x: spread.by_shape(linalg.svd, x))(on_mesh)
    _assert_same(found, expected)


def test_inside_of_a_shard_map_it_is_linalgs():
  operands = _operands()
  expected = jax.jit(_svds)(operands)

  @functools.partial(
    jax.shard_map, in_specs=P(), out_specs=P(), check_vma=False
  )
  def alone(operands):
    assert spread.devices() == 1
    return spread.by_shape(linalg.svd, operands)

  with jax.set_mesh(_mesh('two_by_four')):
    _assert_same(jax.jit(alone)(operands), expected)


def test_two_hundred_calls_end():
  """XLA's CPU runtime can deadlock where SVDs run at once."""
  update = jax.jit(oialr.update_basis)
  mesh, params = _placed(_trained(), 'eight')
  with jax.set_mesh(mesh):
    for _ in range(200):
      params = jax.block_until_ready(update(params))


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_an_event_is_exported(platform):
  params = _trained()
  plan = schedule_lib.foresee(SCHEDULE.event(4), params, LAYERS, SCHEDULE)
  with jax.set_mesh(_mesh('two_by_four')):
    f = jax.jit(lambda p: schedule_lib._do(plan, p, None))
    exported = jax.export.export(f, platforms=[platform])(params)
  assert exported.nr_devices == 8
  assert 'stablehlo.all_reduce' in exported.mlir_module()
  assert 'lapack' not in exported.mlir_module()
