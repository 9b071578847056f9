"""Tests of dynamical low-rank training: of its steps, and of its ranks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import dlrt
import oialr_jax as oialr
from oialr_jax import lowrank
from oialr_jax import training
from oialr_jax import transforms
from tests import oracles
from tests import programs

KEY = jax.random.key(0)
RATE = 0.1


def float64(x):
  return np.asarray(x, np.float64)


def normal(*shape, seed=0):
  return programs.normal(*shape, seed=seed)


def initial(params, layers, rank, tx):
  params = oialr.to_lowrank(params, layers, rank=rank)
  return training.TrainState(
    jnp.int32(0), params, tx.init(params), {'calls': jnp.zeros(())}
  )


def bases(params):
  """U, diag(S) and V of every kernel, `[b, ...]` in float64, by path."""
  for path, node in transforms.low_rank_leaves(params).items():
    u, s, vt = map(float64, lowrank.matrices(node))
    yield path, u, s, np.swapaxes(vt, -1, -2)


def check_buffers(params):
  """Orthonormal bases with the live directions first, and a falling S."""
  for path, u, s, v in bases(params):
    live = np.any(u != 0, axis=-2)
    np.testing.assert_array_equal(live, np.any(v != 0, axis=-2), path)
    assert np.all(live[:, :-1] >= live[:, 1:]), path
    eye = np.eye(u.shape[-1]) * live[:, None]
    for q in (u, v):
      np.testing.assert_allclose(np.swapaxes(q, -1, -2) @ q, eye, atol=3e-6)
    values = np.diagonal(s, axis1=-2, axis2=-1)
    np.testing.assert_array_equal(s, values[:, None] * np.eye(s.shape[-1]))
    assert np.all(values[:, :-1] >= values[:, 1:]) and np.all(values >= 0)
    assert np.all((values > 0) == live)


def resized(node, rank):
  """The leaf in a larger buffer."""
  more = rank - node.rank
  pad = lambda x, *axes: jnp.pad(
    x, [(0, more if i - x.ndim in axes else 0) for i in range(x.ndim)]
  )
  u, s, vt = lowrank.matrices(node)
  return lowrank.from_matrices(node, pad(u, -1), pad(s, -1, -2), pad(vt, -2))


# A network whose kernels differ in kind.


@functools.cache
def network():
  """A tall, a wide, a convolution's, a stack of kernels, and biases."""
  params = {
    'conv': normal(3, 3, 4) / 3,
    'tall': normal(20, 6) / 4,
    'wide': normal(6, 15, seed=1) / 3,
    'stack': normal(2, 15, 15) / 4,
    'bias': np.zeros(15, np.float32),
  }

  def loss(params, model_state, batch, key):
    x = jax.lax.conv_general_dilated(
      batch['x'],
      params['conv'],
      (1,),
      'SAME',
      dimension_numbers=('NWC', 'WIO', 'NWC'),
    )
    x = jnp.tanh(x).reshape(len(x), -1)
    x = jnp.tanh(jnp.tanh(x @ params['tall']) @ params['wide'] + params['bias'])
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    x, _ = jax.lax.scan(layer, x, params['stack'])
    x += 0.01 * jax.random.normal(key, x.shape)
    state = {'calls': model_state['calls'] + 1}
    return jnp.mean((x - batch['y']) ** 2), (state, {'mean': jnp.mean(x)})

  batch = {'x': normal(16, 5, 3), 'y': normal(16, 15, seed=2)}
  state = {'calls': jnp.zeros(())}
  layers = oialr.find_layers(loss, params, state, batch, KEY)
  assert {x.path for x in layers} == {'conv', 'tall', 'wide', 'stack'}
  return jax.tree.map(jnp.asarray, params), loss, batch, layers


def step_of(tx, tau=0.0, loss=None, **options):
  step = dlrt.train_step(loss or network()[1], tx, tau=tau, **options)
  return oracles.jit(step)


def dense_step(params, key):
  """Of gradient descent; the parameters and their gradient."""
  _, loss, batch, _ = network()
  key = jax.random.fold_in(key, 0)
  state = {'calls': jnp.zeros(())}
  grads = jax.grad(lambda p: loss(p, state, batch, key)[0])(params)
  return jax.tree.map(lambda x, g: x - RATE * g, params, grads), grads


def test_at_full_rank_a_step_is_that_of_gradient_descent():
  params, _, batch, layers = network()
  tx = oialr.train_sigma(optax.sgd(RATE))
  state, metrics = step_of(tx)(initial(params, layers, None, tx), batch, KEY)
  expected, grads = dense_step(params, KEY)
  found = oialr.to_dense(state.params)
  for path, w in expected.items():
    moved = np.max(abs(RATE * grads[path]))
    assert moved > 1e-4
    np.testing.assert_allclose(found[path], w, atol=3e-6)
  assert metrics['rank'] == np.mean([min(x.matrix) for x in layers])
  check_buffers(state.params)


@pytest.mark.parametrize('rank', [2])
def test_below_it_a_step_is_one_projected_onto_what_the_gradient_adds(rank):
  """W - h P G Q: P onto span [U, G V], Q onto span [V, G^T U]."""
  params, _, batch, layers = network()
  tx = oialr.train_sigma(optax.sgd(RATE))
  start = initial(params, layers, rank, tx)
  wide = {
    path: resized(x, min(2 * x.rank, min(lowrank.matrix_shape(x)[1:])))
    if oialr.is_low_rank(x)
    else x
    for path, x in start.params.items()
  }
  state = training.TrainState(
    start.step, wide, tx.init(wide), start.model_state
  )
  state, _ = step_of(tx)(state, batch, KEY)
  dense = oialr.to_dense(start.params)
  _, grads = dense_step(dense, KEY)
  found = oialr.to_dense(state.params)
  by_path = {x.path: x for x in layers}
  for path, u, _, v in bases(start.params):
    view = by_path[path].view
    matrix = lambda x: float64(view.to_matrix(x))  # noqa: B023
    g = matrix(grads[path])
    left = _projection(np.concatenate([u, g @ v], -1))
    right = _projection(np.concatenate([v, np.swapaxes(g, -1, -2) @ u], -1))
    expected = matrix(dense[path]) - RATE * left @ g @ right
    np.testing.assert_allclose(matrix(found[path]), expected, atol=3e-6)


def _projection(columns):
  q, s, _ = np.linalg.svd(columns, full_matrices=False)
  q = q * (s > 1e-6 * s[:, :1])[:, None]
  return q @ np.swapaxes(q, -1, -2)


@pytest.mark.parametrize('tau', [0.02])
def test_bases_stay_orthonormal_and_the_loss_falls(tau):
  params, _, batch, layers = network()
  tx = oialr.train_sigma(optax.adam(1e-2))
  state, step = initial(params, layers, 0.5, tx), step_of(tx, tau)
  found = []
  for _ in range(25):
    state, metrics = step(state, batch, KEY)
    found.append(float(metrics['loss']))
    check_buffers(state.params)
  assert found[-1] < 0.9 * found[0]
  assert step._cache_size() == 1
  assert state.model_state['calls'] == 25 and set(metrics) >= {'mean', 'rank'}


def test_augmented_bases_hold_the_old_and_the_new():
  params, loss, batch, layers = network()
  low = oialr.to_lowrank(params, layers, rank=2)
  args = {'calls': jnp.zeros(())}, batch, KEY
  more = dlrt._directions(oialr.factored(loss), low, args)
  wide = dlrt.augmented(low, more)
  before = oialr.to_dense(low)
  for path, w in oialr.to_dense(wide).items():
    np.testing.assert_allclose(w, before[path], atol=2e-6)
  old = {path: (u, v) for path, u, _, v in bases(low)}
  for path, u, _, v in bases(wide):
    size = min(4, max(u.shape[-2], v.shape[-2]))
    assert u.shape[-1] == v.shape[-1] == size
    left, right = map(float64, more[path])
    left = left.reshape(*u.shape[:2], -1)
    right = right.reshape(u.shape[0], -1, v.shape[-2])
    for q, columns in (
      (u, np.concatenate([old[path][0], left], -1)),
      (v, np.concatenate([old[path][1], np.swapaxes(right, -1, -2)], -1)),
    ):
      gram = np.swapaxes(q, -1, -2) @ q
      np.testing.assert_allclose(gram, gram * 0 + np.eye(size), atol=2e-6)
      inside = q @ (np.swapaxes(q, -1, -2) @ columns)
      np.testing.assert_allclose(inside, columns, atol=2e-6)


def test_directions_without_a_gradient_do_no_harm():
  """A kernel that the loss does not see keeps its bases and its rank."""
  params = {
    'used': jnp.asarray(normal(8, 8)),
    'idle': jnp.asarray(normal(8, 8)),
  }
  loss = lambda p, state, x, key: (
    jnp.mean(jnp.tanh(x @ p['used'] + 0 * (x @ p['idle']))),
    (state, {}),
  )
  x = normal(4, 8)
  layers = oialr.find_layers(loss, params, {}, x, KEY)
  tx = oialr.train_sigma(optax.adam(1e-2))
  state = initial(params, layers, 3, tx)
  before = oialr.to_dense(state.params)['idle']
  step = step_of(tx, 0.01, loss)
  for _ in range(3):
    state, _ = step(state, x, KEY)
    check_buffers(state.params)
  after = oialr.to_dense(state.params)['idle']
  np.testing.assert_allclose(after, before, atol=1e-5)


# Truncation.


@pytest.mark.parametrize(
  'shape, tau', [((2, 9, 6), 0.1), ((1, 6, 9), 0.3), ((3, 7, 7), 0.9)]
)
def test_truncation_keeps_the_fewest_directions_that_tau_allows(shape, tau):
  b, m, n = shape
  layer = oialr.Layer('w', shape, (1,), (2,), (0,))
  w = {'w': jnp.asarray(normal(b, m, n))}
  full = oialr.to_lowrank(w, [layer])
  # In bases that are not aligned.
  turn = np.linalg.qr(normal(b, min(m, n), min(m, n)))[0]
  u, s, vt = lowrank.matrices(full['w'])
  turned = lowrank.from_matrices(
    full['w'], u @ turn, np.swapaxes(turn, -1, -2) @ s, vt
  )
  found = dlrt.truncated({'w': turned}, full, tau)
  check_buffers(found)
  values = np.linalg.svd(float64(w['w']), compute_uv=False)
  rest = lambda k: np.sqrt(np.sum(values[:, k:] ** 2, axis=-1))
  allowed = tau * np.linalg.norm(values, axis=-1)
  (_, u, _, _), *_ = bases(found)
  for i, rank in enumerate(np.sum(np.any(u != 0, axis=-2), axis=-1)):
    assert rest(rank)[i] <= allowed[i] * (1 + 1e-5) + 1e-9
    assert rank == 1 or rest(rank - 1)[i] > allowed[i] * (1 - 1e-5)
    error = float64(oialr.to_dense(found)['w'] - w['w'])[i]
    np.testing.assert_allclose(np.linalg.norm(error), rest(rank)[i], atol=1e-5)


def test_truncation_is_to_the_buffer_where_that_is_less():
  layer = oialr.Layer('w', (9, 7), (0,), (1,))
  w = {'w': jnp.asarray(normal(9, 7))}
  full, small = (oialr.to_lowrank(w, [layer], rank=r) for r in (None, 3))
  found = dlrt.truncated(full, small, 0.0)
  np.testing.assert_allclose(
    oialr.to_dense(found)['w'], oialr.to_dense(small)['w'], atol=1e-5
  )
  assert found['w'].rank == 3


# The textbook problem: ||X W - X W*||^2 / T with W* of a known rank.


def least_squares(rank):
  target = normal(20, rank) @ normal(rank, 16, seed=1) / np.sqrt(20 * rank)
  x = np.linalg.qr(normal(64, 20, seed=2))[0] * 8
  loss = lambda p, state, x, key: (
    jnp.sum((x @ (p['w'] - target)) ** 2) / 64,
    (state, {}),
  )
  return loss, jnp.asarray(x), target


@pytest.mark.parametrize('start, room', [(1, 12), (12, 12)])
def test_the_rank_becomes_that_of_the_target(start, room):
  loss, x, target = least_squares(5)
  layer = oialr.Layer('w', (20, 16), (0,), (1,))
  w = {'w': jnp.asarray(normal(20, 16, seed=5) / 8)}
  tx = oialr.train_sigma(optax.sgd(0.2))
  params = oialr.to_lowrank(w, [layer], rank=start)
  params = {'w': resized(params['w'], room)}
  state = training.TrainState(jnp.int32(0), params, tx.init(params), {})
  step, ranks = step_of(tx, 1e-3, loss), [start]
  for _ in range(80):
    state, metrics = step(state, x, KEY)
    ranks.append(int(metrics['rank']))
  assert ranks[-1] == 5
  assert all(new <= 2 * old for old, new in zip(ranks, ranks[1:]))
  assert max(ranks) <= room
  np.testing.assert_allclose(
    oialr.to_dense(state.params)['w'], target, atol=1e-3
  )
  assert step._cache_size() == 1


def test_moments_follow_the_bases():
  """Momentum of square kernels at full rank is that without factors."""
  params = {
    name: jnp.asarray(normal(6, 6, seed=i)) for i, name in enumerate('ab')
  }
  loss = lambda p, state, x, key: (
    jnp.mean((jnp.tanh(x @ p['a']) @ p['b'] - x) ** 2),
    (state, {}),
  )
  x = jnp.asarray(normal(32, 6, seed=2))
  layers = oialr.find_layers(loss, params, {}, x, KEY)
  tx = optax.sgd(RATE, momentum=0.9)
  sigma = oialr.train_sigma(tx)
  state, step = initial(params, layers, None, sigma), step_of(sigma, loss=loss)
  moments = tx.init(params)
  for _ in range(10):
    state, _ = step(state, x, KEY)
    grads = jax.grad(lambda p: loss(p, {}, x, KEY)[0])(params)
    updates, moments = tx.update(grads, moments)
    params = optax.apply_updates(params, updates)
  for path, w in oialr.to_dense(state.params).items():
    np.testing.assert_allclose(w, params[path], atol=2e-5)


# What is not right, and what might be.


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: dlrt.Dlrt(tau=-0.1), r'tau=-0.1.*\[0, 1\)'),
    (lambda: dlrt.Dlrt(rank=0), 'rank=0.*at least 1'),
    (
      lambda: step_of(oialr.train_sigma(optax.sgd(1.0)), accumulate=2),
      'accumulate=2.*pass 1',
    ),
  ],
)
def test_errors_name_the_value(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  'options',
  [
    dict(
      remat=jax.checkpoint_policies.nothing_saveable,
      gather=lambda params: params,
    ),
  ],
)
def test_options_of_the_step_change_no_result(options):
  params, _, batch, layers = network()
  tx = oialr.train_sigma(optax.sgd(RATE))
  state = initial(params, layers, 3, tx)
  expected, _ = step_of(tx)(state, batch, KEY)
  found, _ = step_of(tx, **options)(state, batch, KEY)
  dense = lambda state: oialr.to_dense(state.params)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6),
    dense(found),
    dense(expected),
  )


def test_decompositions_of_a_step_are_one_after_the_other():
  """XLA's CPU runtime can deadlock where two of them run at once."""
  params, loss, batch, layers = network()
  tx = oialr.train_sigma(optax.sgd(RATE))
  state = initial(params, layers, 2, tx)
  step = dlrt.train_step(loss, tx, tau=0.1)
  jaxpr = jax.make_jaxpr(step)(state, batch, KEY).jaxpr
  found = []
  _wait(jaxpr, [0] * len(jaxpr.invars), found)
  # Two QRs and an SVD for every shape: the n-th waits for n - 1 others.
  assert sorted(found) == list(range(3 * len({x.matrix for x in layers})))


def _wait(jaxpr, waits, found):
  """How many decompositions the results of a program wait for, in turn.

  Appends to found how many every decomposition of it waits for.
  """
  of = dict(zip(jaxpr.invars, waits))
  get = lambda v: 0 if hasattr(v, 'val') else of.get(v, 0)
  for eqn in jaxpr.eqns:
    late = max(map(get, eqn.invars), default=0)
    inner = eqn.params.get('jaxpr')
    if eqn.primitive.name in ('qr', 'svd'):
      found.append(late)
      late += 1
    elif eqn.primitive.name == 'jit':
      inner = getattr(inner, 'jaxpr', inner)
      results = _wait(inner, [get(v) for v in eqn.invars], found)
      of.update(zip(eqn.outvars, results))
      continue
    of.update((v, late) for v in eqn.outvars)
  return [get(v) for v in jaxpr.outvars]
