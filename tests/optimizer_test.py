"""Tests of frozen bases and of moments that follow them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
import pytest

import oialr_jax as oialr
from oialr_jax import lowrank
from oialr_jax import optimizer
from oialr_jax import tree
from tests import kernels

POLICIES = optimizer.POLICIES

# All of them are 6 x 4 matrices or the transpose, so that little is compiled.
LAYERS = {
  'tall': oialr.Layer('tall', (6, 4), (0,), (1,)),
  'wide': oialr.Layer('wide', (4, 6), (0,), (1,)),
  'out_in': oialr.Layer('out_in', (4, 6), (1,), (0,)),
  'conv': oialr.Layer('conv', (1, 3, 2, 4), (0, 1, 2), (3,), kind='conv'),
  'query': oialr.Layer('query', (6, 2, 2), (0,), (1, 2)),
  'attention_out': oialr.Layer('attention_out', (2, 3, 4), (0, 1), (2,)),
  'stack': oialr.Layer('stack', (2, 6, 4), (1,), (2,), (0,)),
  'inner_stack': oialr.Layer('inner_stack', (6, 2, 4), (0,), (2,), (1,)),
  'qkv': oialr.Layer('qkv', (6, 12), (0,), (1,), blocks=3),
  'heads': oialr.Layer('heads', (6, 2, 2, 4), (0,), (1, 2, 3), blocks=4),
  'grouped': oialr.Layer('grouped', (8, 3, 2), (1, 2), (0,), blocks=2),
}
CHANGES = ('transition', 'update', 'prune', 'compact', 'to_dense')


def _swap(x):
  return np.swapaxes(x, -1, -2)


def _wide(x):
  return np.asarray(x).astype(np.float64)


def _changed(change, layer, dtype=jnp.float32, seed=0):
  """The parameter before and after a change, with random orthonormal bases."""
  rng = np.random.default_rng(seed)
  b, (m, n), r = layer.stack, layer.matrix, layer.max_rank
  basis = lambda *shape: np.linalg.qr(rng.normal(size=shape))[0]
  u, v = basis(b, m, r), basis(b, n, r)
  dense = jnp.asarray(rng.normal(size=layer.shape), dtype)
  node = functools.partial(kernels.node, layer, dtype=dtype)
  low = node(u, rng.normal(size=(b, r, r)), _swap(v))
  if change == 'transition':
    return dense, low
  if change == 'to_dense':
    return low, dense
  turned_u, turned_v = u @ basis(b, r, r), v @ basis(b, r, r)
  s = np.broadcast_to(np.diag(np.arange(r, 0.0, -1)), (b, r, r)).copy()
  if change == 'update':
    return low, node(turned_u, s, _swap(turned_v))
  pruned_u, pruned_v, pruned_s = turned_u.copy(), turned_v.copy(), s.copy()
  for x in (pruned_u, pruned_v, pruned_s):
    x[..., -1] = 0
  pruned = node(pruned_u, pruned_s, _swap(pruned_v))
  if change == 'prune':
    return low, pruned
  sliced = turned_u[..., :-1], s[..., :-1, :-1], _swap(turned_v)[:, :-1]
  return pruned, node(*sliced)


def _matrix(x, like, layer):
  """The moment of a parameter as [b, ., .], in float64."""
  if oialr.is_low_rank(like):
    return _wide(x).reshape(layer.stack, *x.shape[-2:])
  return kernels.matrices(x, layer)


def _bases(x, layer):
  """U and V as [b, m, r] and [b, n, r]; the identity of a dense kernel."""
  m, n = layer.matrix
  if not oialr.is_low_rank(x):
    return np.eye(m)[None], np.eye(n)[None]
  u = _wide(x.u).reshape(layer.stack, m, -1)
  return u, _swap(_wide(x.vt).reshape(layer.stack, -1, n))


def _oracle(kind, x, old, new, layer, mean=None):
  """What becomes of the moment: NumPy, float64, the formulas of the module."""
  (u_old, v_old), (u_new, v_new) = _bases(old, layer), _bases(new, layer)
  left, right = _swap(u_new) @ u_old, _swap(v_old) @ v_new
  linear = lambda x: left @ x @ right
  quadratic = lambda x: left**2 @ x @ right**2
  x = _matrix(x, old, layer)
  if kind == 'linear':
    return linear(x)
  if kind == 'quadratic':
    return quadratic(x)
  if kind == 'magnitude':
    return np.sqrt(quadratic(x**2))
  mean = _matrix(mean, old, layer)
  return quadratic(x - mean**2) + linear(mean) ** 2


def _like(x):
  return x.s if oialr.is_low_rank(x) else x


def _random(like, seed, dtype=None):
  """A random tree like `trainable(params)`: gradients."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), dtype or x.dtype),
    oialr.trainable(like),
  )


def _assert_like(actual, expected):
  """The same tree of the same types, so that no step is compiled anew."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, a), b in zip(
    tree.flatten(actual).items(), jax.tree.leaves(expected), strict=True
  ):
    assert (a.shape, a.dtype) == (b.shape, b.dtype), path
    assert a.weak_type == b.weak_type, path


def _assert_finite(x):
  for path, leaf in tree.flatten(x).items():
    assert np.all(np.isfinite(_wide(leaf))), path


def _init_params(seed=0):
  """A model of every kind of parameter, at rank 3, in NumPy's hands."""
  rng = np.random.default_rng(seed)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  dense = {
    'a': {'kernel': array(5, 12), 'bias': array(12)},
    'norm': {'scale': array(12)},
    'b': {'kernel': array(12, 8)},
    'head': {'kernel': array(8, 2)},
  }
  layers = (
    oialr.Layer('a/kernel', (5, 12), (0,), (1,), order=0),
    oialr.Layer('b/kernel', (12, 8), (0,), (1,), order=1),
  )
  return dense, layers


def _loss(params, x, y):
  x = jnp.tanh(x @ params['a']['kernel'] + params['a']['bias'])
  x = jnp.tanh((x * params['norm']['scale']) @ params['b']['kernel'])
  return jnp.mean((x @ params['head']['kernel'] - y) ** 2)


def _train_100_steps(whole_tree: bool):
  """AdamW with decay and clipping; gradients of params, or of what trains."""
  dense, layers = _init_params()
  start = oialr.to_lowrank(dense, layers, rank=3)
  tx = oialr.train_sigma(
    optax.chain(
      optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1)
    )
  )
  loss = oialr.factored(_loss)
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(16, 5)), rng.normal(size=(16, 2))

  @jax.jit
  def step(params, state):
    if whole_tree:
      grads = jax.grad(loss)(params, x, y)
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state
    trained = oialr.trainable(params)
    grads = jax.grad(lambda t: loss(oialr.with_trainable(params, t), x, y))(
      trained
    )
    updates, state = tx.update(grads, state, params)
    trained = optax.apply_updates(trained, updates)
    return oialr.with_trainable(params, trained), state

  params, state = start, tx.init(start)
  for _ in range(100):
    params, state = step(params, state)
  return start, params, state


train_100_steps = functools.cache(_train_100_steps)


@pytest.mark.parametrize('whole_tree', [False, True])
def test_bases_are_bit_identical_after_100_steps_of_adamw(whole_tree):
  start, params, _ = train_100_steps(whole_tree)

  for name in ('a', 'b'):
    before, after = start[name]['kernel'], params[name]['kernel']
    assert np.asarray(after.u).tobytes() == np.asarray(before.u).tobytes()
    assert np.asarray(after.vt).tobytes() == np.asarray(before.vt).tobytes()
    assert np.min(np.abs(after.s - before.s)) > 0


@pytest.mark.parametrize('whole_tree', [False, True])
def test_biases_norms_and_dense_layers_keep_training(whole_tree):
  start, params, _ = train_100_steps(whole_tree)

  for name, leaf in (('a', 'bias'), ('norm', 'scale'), ('head', 'kernel')):
    assert np.min(np.abs(params[name][leaf] - start[name][leaf])) > 1e-3


def test_both_ways_of_giving_gradients_train_the_same():
  _, one, state = train_100_steps(False)
  _, other, other_state = train_100_steps(True)

  _assert_like(other_state, state)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_state_holds_nothing_of_a_bases_size():
  start, _, state = train_100_steps(True)

  trained = {x.shape for x in jax.tree.leaves(oialr.trainable(start))}
  assert {x.shape for x in jax.tree.leaves(state)} == {(), *trained}
  frozen = [
    x for n in 'ab' for x in (start[n]['kernel'].u, start[n]['kernel'].vt)
  ]
  assert not trained & {x.shape for x in frozen}


def test_train_sigma_gives_zeros_to_bases_and_keeps_the_trees():
  dense, layers = _init_params()
  params = oialr.to_lowrank(dense, layers, rank=3)
  tx = oialr.train_sigma(optax.sgd(1.0))
  state = tx.init(params)
  grads = jax.tree.map(jnp.ones_like, params)

  whole, _ = tx.update(grads, state, params)
  trained, _ = tx.update(oialr.trainable(grads), state, params)
  without_params, _ = tx.update(grads, state)

  _assert_like(whole, params)
  _assert_like(without_params, params)
  _assert_like(trained, oialr.trainable(params))
  for name in ('a', 'b'):
    assert not np.any(whole[name]['kernel'].u)
    assert not np.any(whole[name]['kernel'].vt)
    np.testing.assert_array_equal(whole[name]['kernel'].s, -1)


def test_train_sigma_of_dense_params_is_the_inner_transformation():
  dense, _ = _init_params()
  inner = optax.adamw(1e-2)
  tx = oialr.train_sigma(inner)
  grads = _random(dense, 1)

  updates, state = tx.update(grads, tx.init(dense), dense)
  expected, expected_state = inner.update(grads, inner.init(dense), dense)

  for a, b in zip(
    jax.tree.leaves((updates, state)),
    jax.tree.leaves((expected, expected_state)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def test_train_sigma_hands_extra_arguments_on():
  def update(updates, state, params=None, *, value, **extra):
    del params, extra
    return jax.tree.map(lambda g: g * value, updates), state

  inner = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )
  dense, layers = _init_params()
  params = oialr.to_lowrank(dense, layers, rank=3)
  tx = oialr.train_sigma(inner)
  grads = jax.tree.map(jnp.ones_like, params)

  updates, _ = tx.update(grads, tx.init(params), params, value=3.0)

  np.testing.assert_array_equal(updates['b']['kernel'].s, 3)


@pytest.mark.parametrize('name', LAYERS)
def test_sigma_scale_makes_up_for_the_rank_that_is_live(name):
  layer = LAYERS[name]
  m, n = layer.matrix
  node, pruned = _changed('prune', layer)
  params = {'kernel': pruned, 'bias': jnp.ones(3)}
  u, _, _ = lowrank.matrices(pruned)
  live = np.sum(np.any(np.asarray(u) != 0, axis=1), axis=-1)
  assert live.shape == (layer.stack,) and 0 < live.min() < node.rank
  tx = oialr.train_sigma(optax.sgd(0.5), sigma_scale=3.0)
  grads = jax.tree.map(jnp.ones_like, params)

  whole, _ = tx.update(grads, tx.init(params), params)
  trained, _ = tx.update(oialr.trainable(grads), tx.init(params), params)

  _assert_like(whole, params)
  np.testing.assert_array_equal(whole['bias'], -0.5)
  assert not np.any(whole['kernel'].u) and not np.any(whole['kernel'].vt)
  r = pruned.rank
  expected = -0.5 * 3 * np.sqrt(m * n) / live
  for found in whole['kernel'].s, trained['kernel']:
    np.testing.assert_allclose(
      found.reshape(layer.stack, r, r) * np.ones((r, r)),
      expected[:, None, None] * np.ones((r, r)),
      rtol=1e-6,
    )


def test_sigma_scale_leaves_dense_kernels_and_dtypes_alone():
  dense, layers = _init_params()
  tx = oialr.train_sigma(optax.sgd(1.0), sigma_scale=3.0)
  updates, _ = tx.update(dense, tx.init(dense), dense)
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x, -y), updates, dense
  )
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dense)
  params = oialr.to_lowrank(half, layers, rank=3)
  updates, _ = tx.update(params, tx.init(params), params)
  _assert_like(updates, params)


def test_a_sigma_scale_that_cannot_be_is_refused():
  for scale in 0.0, -1.0, float('inf'), float('nan'):
    with pytest.raises(ValueError, match='sigma_scale.*positive'):
      oialr.train_sigma(optax.sgd(1.0), sigma_scale=scale)
  dense, layers = _init_params()
  params = oialr.to_lowrank(dense, layers, rank=3)
  tx = oialr.train_sigma(optax.sgd(1.0), sigma_scale=1.0)
  with pytest.raises(ValueError, match='params'):
    tx.update(params, tx.init(params))


KERNELS = ('first', 'second', 'third')
SQUARE = tuple(
  oialr.Layer(f'{name}/kernel', (8, 8), (0,), (1,), order=i)
  for i, name in enumerate(KERNELS)
)
STEPS = 50
MOMENTUM = {
  'momentum': optax.sgd(0.1, momentum=0.9),
  'nesterov': optax.chain(
    optax.clip_by_global_norm(0.3),
    optax.add_decayed_weights(1e-3),
    optax.sgd(0.1, momentum=0.9, nesterov=True),
  ),
}


def _mlp(params, x):
  for name in KERNELS:
    x = jnp.tanh(x @ params[name]['kernel'] + params[name]['bias'])
  return x


@functools.cache
def _training(chain: str):
  """The parameters to start from and the jitted step."""
  rng = np.random.default_rng(3)
  x, y = rng.normal(size=(16, 8)), np.tanh(rng.normal(size=(16, 8)))
  params = {
    name: {
      'kernel': jnp.asarray(rng.normal(size=(8, 8)) / 3, jnp.float32),
      'bias': jnp.zeros(8),
    }
    for name in KERNELS
  }
  tx = oialr.train_sigma(MOMENTUM[chain])
  forward = oialr.factored(_mlp)

  @jax.jit
  def step(params, state):
    grads = jax.grad(lambda p: jnp.mean((forward(p, x) - y) ** 2))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return params, tx.init(params), step


@functools.cache
def _trajectory(chain: str, policy: str | None):
  """Weights as dense arrays after every step; dense throughout for None."""
  params, state, step = _training(chain)
  schedule = oialr.Schedule(
    steps=STEPS,
    delay=15,
    every=15,
    cutoff=1e-6,
    progressive=1.0,
    policy=policy or 'transport',
  )
  seen = []
  for i in range(STEPS):
    event = schedule.event(i) if policy else None
    if event:
      params, state, report = oialr.apply_event(
        event, params, state, SQUARE, schedule
      )
      assert set(map(int, report.ranks.values())) == {8}
    params, state = step(params, state)
    full = jax.device_get(oialr.to_dense(params) if policy else params)
    seen.append(np.stack([full[name]['kernel'] for name in KERNELS]))
  return np.stack(seen)


@pytest.mark.parametrize('chain', MOMENTUM)
def test_transport_follows_the_dense_trajectory(chain):
  dense, low = _trajectory(chain, None), _trajectory(chain, 'transport')

  assert np.max(np.abs(dense[-1] - dense[14])) > 0.1  # it moves at all
  np.testing.assert_allclose(low, dense, rtol=0, atol=1e-4)


@pytest.mark.parametrize('policy', ['reset', 'reference'])
def test_without_transport_the_trajectory_is_another(policy):
  dense, low = (_trajectory('momentum', p) for p in (None, policy))

  np.testing.assert_allclose(low[:15], dense[:15], rtol=0, atol=1e-4)
  assert np.max(np.abs(low[15] - dense[15])) > 1e-3
  assert np.max(np.abs(low[-1] - dense[-1])) > 1e-3


def _states(x, mean):
  """One state of every kind of moment, and the kind of each of its trees."""
  t = lambda a: {'kernel': a}
  square = jnp.square(x)
  count = jnp.zeros([], jnp.int32)
  return {
    'linear': (optax.TraceState(t(x)), 'trace'),
    'quadratic': (optax.ScaleByAdamState(count, t(x), t(square)), 'nu'),
    'magnitude': (optax.ScaleByRpropState(t(jnp.abs(x)), t(x)), 'step_sizes'),
    'centred': (
      optax.ScaleByRStdDevState(t(mean), t(square + jnp.square(mean))),
      'nu',
    ),
  }


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize(
  ('name', 'dtype'),
  [
    *[(name, 'float32') for name in LAYERS],
    ('tall', 'bfloat16'),
    ('stack', 'bfloat16'),
  ],
)
def test_moments_match_float64(name, dtype, change):
  layer, dtype = LAYERS[name], jnp.dtype(dtype)
  old, new = _changed(change, layer, dtype)
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=_like(old).shape), dtype)
  mean = jnp.asarray(rng.normal(size=x.shape), dtype)
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2

  for kind, (state, field) in _states(x, mean).items():
    moved = oialr.transport(state, {'kernel': old}, {'kernel': new})

    actual = getattr(moved, field)['kernel']
    before = getattr(state, field)['kernel']
    assert (actual.shape, actual.dtype) == (_like(new).shape, dtype), kind
    np.testing.assert_allclose(
      _matrix(actual, new, layer),
      _oracle(kind, before, old, new, layer, mean),
      rtol=tolerance,
      atol=tolerance,
      err_msg=kind,
    )
    if kind != 'linear':
      assert np.min(_wide(actual)) >= 0, kind


@pytest.mark.parametrize('change', CHANGES)
def test_transport_keeps_the_dtypes_of_mixed_moments(change):
  layer = LAYERS['tall']
  old, new = _changed(change, layer)
  tx = oialr.train_sigma(optax.adam(0.1, mu_dtype=jnp.bfloat16))
  state = tx.init({'kernel': old})
  _, state = tx.update(_random({'kernel': old}, 0), state)

  moved = oialr.transport(state, {'kernel': old}, {'kernel': new})

  _assert_like(moved, tx.init({'kernel': new}))
  assert moved[0].mu['kernel'].dtype == jnp.bfloat16
  assert moved[0].nu['kernel'].dtype == jnp.float32


def test_momentum_is_that_of_the_rotated_history_of_gradients():
  layer = LAYERS['tall']
  dense, low = _changed('transition', layer)
  _, updated = _changed('update', layer)
  pruned, compacted = _changed('compact', layer)
  # One run: a change's first parameter is the last change's second one.
  np.testing.assert_array_equal(low.u, _changed('update', layer)[0].u)
  gradients = np.random.default_rng(2).normal(size=(9, 6, 4))
  tx = optax.trace(0.9)
  state = tx.init({'kernel': dense})
  stages = (dense, low, updated, pruned, compacted)
  for i, g in enumerate(gradients):
    now = stages[min(i // 2, 4)]
    before = stages[min(max(i - 1, 0) // 2, 4)]
    if now is not before:
      state = oialr.transport(state, {'kernel': before}, {'kernel': now})
    u, v = _bases(now, layer)
    g = (_swap(u) @ g @ v).reshape(_like(now).shape)
    _, state = tx.update({'kernel': jnp.asarray(g, jnp.float32)}, state)

  u, v = _bases(compacted, layer)
  trace = sum(0.9 ** (8 - i) * g for i, g in enumerate(gradients))
  np.testing.assert_allclose(
    state.trace['kernel'], (_swap(u) @ trace @ v)[0], atol=1e-5
  )


def test_a_pruned_direction_keeps_no_moments():
  old, new = _changed('prune', LAYERS['tall'])
  tx = oialr.train_sigma(optax.adam(0.1))
  state = tx.init({'kernel': old})
  _, state = tx.update(_random({'kernel': old}, 0), state)

  moved = oialr.transport(state, {'kernel': old}, {'kernel': new})

  for moment in (moved[0].mu['kernel'], moved[0].nu['kernel']):
    assert not np.any(moment[-1]) and not np.any(moment[:, -1])
    assert np.all(moment[:-1, :-1] != 0)


def test_transport_leaves_unchanged_parameters_moments_alone():
  old, new = _changed('update', LAYERS['tall'])
  bias, other = jnp.ones(4), _changed('update', LAYERS['wide'])[0]
  before = {'bias': bias, 'kernel': old, 'other': other}
  after = {'bias': bias, 'kernel': new, 'other': other}
  tx = oialr.train_sigma(optax.rmsprop(0.1, centered=True))
  _, state = tx.update(_random(before, 0), tx.init(before))

  moved = oialr.transport(state, before, after)

  for field in ('mu', 'nu'):
    for name in ('bias', 'other'):
      assert getattr(moved[0], field)[name] is getattr(state[0], field)[name]


@pytest.mark.parametrize('change', CHANGES)
def test_transport_is_the_same_under_jit(change):
  old, new = ({'kernel': x} for x in _changed(change, LAYERS['tall']))
  tx = oialr.train_sigma(optax.adam(0.1))
  _, state = tx.update(_random(old, 0), tx.init(old))

  eager = oialr.transport(state, old, new)
  jitted = jax.jit(oialr.transport)(state, old, new)

  _assert_like(jitted, eager)
  for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted)):
    np.testing.assert_allclose(a, b, atol=1e-6)


def _by_path(params):
  return tree.map_with_path(lambda path, _: 'kernel' in path, params)


def _by_ndim(params):
  return jax.tree.map(lambda x: x.ndim > 1, params)


def _labels(params):
  return tree.map_with_path(
    lambda path, _: 'matrix' if 'kernel' in path else 'vector', params
  )


CHAINS = {
  'sgd': lambda: optax.sgd(0.1),
  'momentum': lambda: optax.sgd(0.1, momentum=0.9),
  'nesterov': lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
  'bfloat16_momentum': lambda: optax.sgd(
    0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16
  ),
  'adam': lambda: optax.adam(0.1),
  'adamw': lambda: optax.adamw(0.1),
  'adamax': lambda: optax.adamax(0.1),
  'nadam': lambda: optax.nadam(0.1),
  'nadamw': lambda: optax.nadamw(0.1, mask=_by_path),
  'amsgrad': lambda: optax.amsgrad(0.1),
  'adabelief': lambda: optax.adabelief(0.1),
  'yogi': lambda: optax.yogi(0.1),
  'radam': lambda: optax.radam(0.1),
  'lion': lambda: optax.lion(0.1),
  'rmsprop': lambda: optax.rmsprop(0.1),
  'rmsprop_centred': lambda: optax.rmsprop(0.1, centered=True),
  'rmsprop_corrected': lambda: optax.rmsprop(0.1, bias_correction=True),
  'rmsprop_momentum': lambda: optax.rmsprop(0.1, momentum=0.9),
  'adagrad': lambda: optax.adagrad(0.1),
  'adadelta': lambda: optax.adadelta(0.1),
  'adan': lambda: optax.adan(0.1),
  'novograd': lambda: optax.novograd(0.1),
  'lamb': lambda: optax.lamb(0.1),
  'lars': lambda: optax.lars(0.1),
  'rprop': lambda: optax.rprop(0.1),
  'adafactor': lambda: optax.adafactor(0.1, factored=False, momentum=0.9),
  'adafactor_of_small_kernels': lambda: optax.adafactor(0.1),
  'ema': lambda: optax.chain(optax.ema(0.9), optax.scale(-0.1)),
  'clip': lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
  'schedule': lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 100)),
  'named_chain': lambda: optax.named_chain(('adam', optax.adam(0.1))),
  'multi_steps': lambda: optax.MultiSteps(
    optax.adam(0.1), 2
  ).gradient_transformation(),
  'inject_hyperparams': lambda: optax.inject_hyperparams(optax.adamw)(
    learning_rate=optax.linear_schedule(0.1, 0.0, 100)
  ),
  'masked_by_path': lambda: optax.masked(optax.adam(0.1), _by_path),
  'masked_by_ndim': lambda: optax.masked(optax.adam(0.1), _by_ndim),
  'partition': lambda: optax.partition(
    {'matrix': optax.adam(0.1), 'vector': optax.sgd(0.1, momentum=0.9)},
    _labels,
  ),
  'masked_by_prefix': lambda: optax.masked(
    optax.adam(0.1), {'layer': True, 'head': False}
  ),
  'partition_by_prefix': lambda: optax.partition(
    {'matrix': optax.adam(0.1), 'vector': optax.sgd(0.1, momentum=0.9)},
    {'layer': 'matrix', 'head': 'vector'},
  ),
  'apply_if_finite': lambda: optax.apply_if_finite(optax.adam(0.1), 3),
  'conditionally': lambda: optax.conditionally_transform(
    optax.adam(0.1), lambda step: step > 1
  ),
  'schedule_free': lambda: contrib.schedule_free(optax.adamw(0.1, b1=0.0), 0.1),
  'ademamix': lambda: contrib.ademamix(0.1),
  'muon': lambda: contrib.muon(0.1),
}


@functools.cache
def _stages():
  """Parameters through a life: dense, low-rank, pruned, compacted, dense."""
  layer = LAYERS['tall']
  rng = np.random.default_rng(5)
  dense, low = _changed('transition', layer)
  pruned, compacted = _changed('compact', layer)
  bias = jnp.asarray(rng.normal(size=4), jnp.float32)
  head = jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)
  return tuple(
    {'layer': {'kernel': x, 'bias': bias}, 'head': {'kernel': head}}
    for x in (dense, low, pruned, compacted, dense)
  )


def _stepped(tx, state, params, seeds):
  # The mean of the gradients is not zero, as in training.
  for seed in seeds:
    grads = jax.tree.map(lambda g: g + 3, _random(params, seed))
    # Not a program for each `lax.cond` of Optax: that is most of the time.
    with jax.disable_jit():
      updates, state = tx.update(grads, state, params)
  return updates, state


@pytest.mark.parametrize('name', CHAINS)
def test_transport_gives_the_state_that_init_would(name):
  tx = oialr.train_sigma(CHAINS[name]())
  stages = _stages()
  _, state = _stepped(tx, tx.init(stages[0]), stages[0], range(3))

  for old, new in zip(stages[:-1], stages[1:]):
    moved = oialr.transport(state, old, new)

    _assert_like(moved, tx.init(new))
    _assert_finite(moved)
    updates, state = _stepped(tx, moved, new, [7])
    _assert_like(updates, oialr.trainable(new))
    _assert_finite(updates)
    _assert_like(state, tx.init(new))


@pytest.mark.parametrize('policy', ['reset', 'reference'])
@pytest.mark.parametrize('name', ['adamw', 'multi_steps', 'partition', 'adan'])
def test_the_other_policies_give_the_state_that_init_would(name, policy):
  tx = oialr.train_sigma(CHAINS[name]())
  stages = _stages()
  _, state = _stepped(tx, tx.init(stages[0]), stages[0], range(3))

  for old, new in zip(stages[:-1], stages[1:]):
    state = oialr.transport(state, old, new, policy=policy)
    _assert_like(state, tx.init(new))
    updates, state = _stepped(tx, state, new, [7])
    _assert_finite(updates)


@pytest.mark.parametrize('policy', POLICIES)
def test_a_gradient_in_accumulation_is_finished(policy):
  dense, low = _stages()[:2]
  tx = oialr.train_sigma(
    optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
  )
  first, second = _random(dense, 1), _random(dense, 2)
  u, v = _bases(low['layer']['kernel'], LAYERS['tall'])
  turn = lambda g: (_swap(u) @ _wide(g) @ v)[0]
  rotated = jax.tree.map(lambda g: g, second)
  rotated['layer']['kernel'] = jnp.asarray(
    turn(second['layer']['kernel']), jnp.float32
  )

  _, state = tx.update(first, tx.init(dense), dense)
  state = oialr.transport(state, dense, low, policy=policy)
  updates, _ = tx.update(rotated, state, low)

  mean = jax.tree.map(lambda a, b: -(_wide(a) + _wide(b)) / 2, first, second)
  np.testing.assert_allclose(
    updates['layer']['kernel'], turn(mean['layer']['kernel']), atol=1e-6
  )
  np.testing.assert_allclose(
    updates['layer']['bias'], mean['layer']['bias'], atol=1e-6
  )


@pytest.mark.parametrize('policy', POLICIES)
def test_schedule_free_keeps_its_iterates(policy):
  dense = _stages()[0]
  low = oialr.to_lowrank(dense, [_path(LAYERS['tall'], 'layer/kernel')])
  tx = oialr.train_sigma(CHAINS['schedule_free']())
  _, state = _stepped(tx, tx.init(dense), dense, range(3))

  moved = oialr.transport(state, dense, low, policy=policy)

  def averaged(state, params):
    found = contrib.schedule_free_eval_params(state, oialr.trainable(params))
    return oialr.to_dense(oialr.with_trainable(params, found))

  # Full rank, but 6 x 4: what is in the kernel's row space is kept.
  before = averaged(state, dense)
  after = averaged(moved, low)
  u, _ = _bases(low['layer']['kernel'], LAYERS['tall'])
  kernel = u[0] @ _swap(u[0]) @ _wide(before['layer']['kernel'])
  np.testing.assert_allclose(after['layer']['kernel'], kernel, atol=1e-5)
  np.testing.assert_array_equal(after['layer']['bias'], before['layer']['bias'])


def _path(layer, path):
  return oialr.Layer(path, layer.shape, layer.rows, layer.cols)


def test_reset_zeroes_moments_and_their_counters_and_lets_schedules_go_on():
  dense, low = _stages()[:2]
  tx = oialr.train_sigma(
    optax.inject_hyperparams(
      lambda learning_rate: optax.chain(
        optax.scale_by_adam(),
        optax.ema(0.9),
        optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 100)),
        optax.scale(learning_rate),
      )
    )(learning_rate=optax.linear_schedule(0.1, 0.0, 100))
  )
  _, state = _stepped(tx, tx.init(dense), dense, range(3))

  moved = oialr.transport(state, dense, low, policy='reset')

  adam, ema, schedule, _ = moved.inner_state
  for moment in (adam.mu, adam.nu, ema.ema):
    assert not any(np.any(x) for x in jax.tree.leaves(moment))
  assert (int(adam.count), int(ema.count)) == (0, 0)
  assert (int(schedule.count), int(moved.count)) == (3, 3)
  kept = state.hyperparams['learning_rate']
  assert moved.hyperparams['learning_rate'] == kept
  _assert_like(moved, tx.init(low))


@pytest.mark.parametrize('policy', ['transport', 'reference'])
def test_the_other_policies_keep_every_counter(policy):
  dense, low = _stages()[:2]
  tx = oialr.train_sigma(optax.adamw(optax.linear_schedule(1.0, 0.0, 100)))
  _, state = _stepped(tx, tx.init(dense), dense, range(3))

  moved = oialr.transport(state, dense, low, policy=policy)

  assert [int(moved[0].count), int(moved[2].count)] == [3, 3]


def test_reference_zeroes_at_the_transition_and_slices_afterwards():
  dense, low, pruned, compacted, _ = _stages()
  tx = oialr.train_sigma(optax.adam(0.1))
  move = functools.partial(oialr.transport, policy='reference')
  _, state = _stepped(tx, tx.init(dense), dense, range(3))

  at_transition = move(state, dense, low)
  _, before = _stepped(tx, at_transition, low, range(3))
  after_prune = move(before, low, pruned)
  after_compact = move(after_prune, pruned, compacted)
  back = move(after_compact, compacted, dense)

  for field in ('mu', 'nu'):
    moment = lambda s, f=field: getattr(s[0], f)['layer']
    assert not np.any(moment(at_transition)['kernel'])
    # What has no basis is not touched.
    assert moment(at_transition)['bias'] is moment(state)['bias']
    kept = np.array(moment(before)['kernel'])
    assert np.all(kept != 0)
    kept[-1], kept[:, -1] = 0, 0
    np.testing.assert_array_equal(moment(after_prune)['kernel'], kept)
    np.testing.assert_array_equal(
      moment(after_compact)['kernel'], kept[:-1, :-1]
    )
    assert not np.any(moment(back)['kernel'])
  assert int(at_transition[0].count) == 3


def test_reference_does_not_rotate_at_an_update():
  old, new = ({'kernel': x} for x in _changed('update', LAYERS['tall']))
  state = optax.TraceState(_random(old, 0))

  sliced = oialr.transport(state, old, new, policy='reference')
  rotated = oialr.transport(state, old, new)

  np.testing.assert_array_equal(sliced.trace['kernel'], state.trace['kernel'])
  difference = rotated.trace['kernel'] - state.trace['kernel']
  assert np.max(np.abs(difference)) > 0.1


class _TotalState(NamedTuple):
  steps: jax.Array
  total: Any


def _total() -> optax.GradientTransformation:
  """Adds all gradients up, as no optimiser of Optax does."""

  def init(params):
    return _TotalState(
      jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params)
    )

  def update(updates, state, params=None):
    del params
    total = jax.tree.map(jnp.add, state.total, updates)
    return total, _TotalState(state.steps + 1, total)

  return optax.GradientTransformation(init, update)


@pytest.fixture
def own_rules(monkeypatch):
  """Rules that are forgotten after the test."""
  monkeypatch.setattr(optimizer, '_RULES', dict(optimizer._RULES))


def test_an_unknown_state_asks_for_a_rule_and_works_with_it(own_rules):
  dense, low = _stages()[:2]
  tx = oialr.train_sigma(optax.chain(optax.scale(0.1), _total()))
  _, state = _stepped(tx, tx.init(dense), dense, range(3))

  with pytest.raises(
    ValueError,
    match=r"opt_state\[1\]: a _TotalState holds 'total/layer/kernel' of shape "
    r'\(6, 4\).*register_rule\(_TotalState',
  ):
    oialr.transport(state, dense, low)
  oialr.register_rule(_TotalState, steps='counter', total='linear')
  moved = oialr.transport(state, dense, low)
  reset = oialr.transport(state, dense, low, policy='reset')

  expected = _oracle(
    'linear',
    state[1].total['layer']['kernel'],
    dense['layer']['kernel'],
    low['layer']['kernel'],
    LAYERS['tall'],
  )
  np.testing.assert_allclose(
    moved[1].total['layer']['kernel'], expected[0], atol=1e-5
  )
  assert (int(moved[1].steps), int(reset[1].steps)) == (3, 0)
  _assert_like(moved, tx.init(low))


def test_a_later_rule_takes_the_place_of_an_earlier_one(own_rules):
  dense, low = _stages()[:2]
  state = _TotalState(jnp.zeros([]), _random(dense, 0))
  oialr.register_rule(_TotalState, total='linear')
  oialr.register_rule(_TotalState)

  assert oialr.transport(state, dense, low).total is state.total


@pytest.mark.parametrize(
  'holds',
  [
    lambda kernel: {'memory': jnp.zeros((1, *kernel))},
    lambda kernel: {'flat': jnp.zeros(100)},
    lambda kernel: [{'x': jnp.zeros(kernel)}],
  ],
  ids=['stacked', 'flat', 'nested'],
)
def test_whatever_may_belong_to_a_kernel_is_refused(holds):
  dense, low = _stages()[:2]
  state = holds(dense['layer']['kernel'].shape)

  with pytest.raises(ValueError, match="'layer/kernel'.*register_rule"):
    oialr.transport(state, dense, low)


def test_a_moment_of_a_sigmas_shape_is_refused():
  _, low, pruned, *_ = _stages()
  state = _TotalState(jnp.zeros([]), jnp.zeros((4, 4)))

  with pytest.raises(ValueError, match='_TotalState.*register_rule'):
    oialr.transport(state, low, pruned)


def test_unknown_states_of_other_shapes_pass():
  dense, low = _stages()[:2]
  state = ({'scale': jnp.ones(4)}, None, _TotalState(jnp.zeros([]), ()))

  moved = oialr.transport(state, dense, low)

  assert moved[0]['scale'] is state[0]['scale']
  assert moved[2] is state[2]


def test_lbfgs_is_refused():
  dense, low = _stages()[:2]
  state = optax.scale_by_lbfgs(memory_size=3).init(dense)

  with pytest.raises(ValueError, match='ScaleByLBFGSState.*register_rule'):
    oialr.transport(state, dense, low)


@pytest.mark.parametrize('policy', POLICIES)
def test_factored_second_moments_are_refused(policy):
  dense, low = _stages()[:2]
  tx = oialr.train_sigma(optax.adafactor(0.1, min_dim_size_to_factor=2))
  state = tx.init(dense)

  with pytest.raises(
    ValueError, match=r'\.v: a moment of shape \(1,\).*factored=False'
  ):
    oialr.transport(state, dense, low, policy=policy)


def test_moments_of_other_parameters_are_refused():
  dense, low, pruned, compacted, _ = _stages()
  tx = oialr.train_sigma(optax.sgd(0.1, momentum=0.9))

  with pytest.raises(ValueError, match=r'shape \(4, 4\).*shape \(6, 4\)'):
    oialr.transport(tx.init(low), dense, low)
  with pytest.raises(ValueError, match=r'shape \(4, 4\).*shape \(3, 3\)'):
    oialr.transport(tx.init(pruned), compacted, dense)
  without = {'layer': dense['layer']}
  with pytest.raises(
    ValueError, match=r'opt_state\[0\].trace: does not have the structure'
  ):
    oialr.transport(tx.init(without), dense, low)
  with pytest.raises(
    ValueError, match=r'structure of the parameters.*array of shape \(36,\)'
  ):
    oialr.transport(optax.TraceState(jnp.zeros(36)), dense, low)


def test_what_is_wrong_with_a_structure_is_said_without_arrays():
  dense, low, pruned, *_ = _stages()
  multi_steps = lambda tx: optax.MultiSteps(tx, 2).gradient_transformation()
  outside = multi_steps(oialr.train_sigma(optax.adam(0.1)))
  adam = oialr.train_sigma(optax.adam(0.1))
  others = dense | {'more': jnp.zeros(9)}
  listed = dense | {'layer': [*dense['layer'].values()]}
  for state, message in (
    (outside.init(low), r'moments of U and V, .*train_sigma\(optax.MultiSteps'),
    (adam.init(others), "'more' is in one of the two alone"),
    (adam.init(listed), "'layer/0' is in one of the two alone"),
    (adam.init([*low.values()]), "'0/bias' is in one of the two alone"),
  ):
    with pytest.raises(ValueError, match=message) as e:
      oialr.transport(state, low, pruned)
    assert 'structure of the parameters that transport was given' in str(
      e.value
    )
    assert len(str(e.value)) < 400 and e.value.__cause__ is None
    assert e.value.__suppress_context__
  containers = [low], [pruned]
  with pytest.raises(ValueError, match='their containers are of other types'):
    oialr.transport(adam.init((low,)), *containers)
  inside = oialr.train_sigma(multi_steps(optax.adam(0.1)))
  _assert_like(
    oialr.transport(inside.init(low), low, pruned), inside.init(pruned)
  )


DENSE = {'kernel': jnp.zeros((6, 4))}

BAD_CALLS = {
  'no_transformation': (
    lambda: oialr.train_sigma(optax.adamw),
    TypeError,
    r'tx=<function adamw.*must be an optax.GradientTransformation',
  ),
  'learning_rate_for_a_transformation': (
    lambda: oialr.train_sigma(1e-3),
    TypeError,
    r'tx=0.001: must be an optax.GradientTransformation',
  ),
  'unknown_policy': (
    lambda: oialr.transport((), DENSE, DENSE, policy='keep'),
    ValueError,
    r"policy='keep': must be one of transport, reset, reference",
  ),
  'other_structure': (
    lambda: oialr.transport((), DENSE, {**DENSE, 'bias': jnp.zeros(4)}),
    ValueError,
    'old_params and new_params differ in more than their kernels',
  ),
  'rule_for_no_state': (
    lambda: oialr.register_rule(dict, total='linear'),
    TypeError,
    "<class 'dict'>: must be a NamedTuple class",
  ),
  'rule_for_an_instance': (
    lambda: oialr.register_rule(optax.TraceState({}), trace='linear'),
    TypeError,
    'must be a NamedTuple class',
  ),
  'rule_for_an_unknown_field': (
    lambda: oialr.register_rule(_TotalState, sum='linear'),
    ValueError,
    "_TotalState has no field 'sum', only steps, total",
  ),
  'rule_of_an_unknown_kind': (
    lambda: oialr.register_rule(_TotalState, total='cubic'),
    ValueError,
    r"_TotalState.total='cubic': must be one of linear, quadratic, magnitude",
  ),
  'centred_about_nothing': (
    lambda: oialr.register_rule(_TotalState, total='centred'),
    ValueError,
    r"_TotalState.total='centred': needs its mean in a field named 'mu'",
  ),
}


@pytest.mark.parametrize('name', BAD_CALLS)
def test_bad_calls_say_what_is_wrong(name):
  call, error, message = BAD_CALLS[name]
  rules = dict(optimizer._RULES)

  with pytest.raises(error, match=message):
    call()
  assert rules == optimizer._RULES


def test_the_rules_name_fields_that_there_are():
  for state_type, rule in optimizer._RULES.items():
    assert set(rule) <= set(state_type._fields)
    assert set(rule.values()) <= set(optimizer.KINDS)
