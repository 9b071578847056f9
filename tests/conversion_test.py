"""Tests of runs that change once what they train."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oialr_jax as oialr
from oialr_jax import training
from oialr_jax.training import conversion as conversion_lib
from tests import resume_test
from tests import training_test

STEPS, DELAY, RANK = training_test.STEPS, 9, 4
PATHS = {'first/kernel', 'second/kernel'}


def cut(params, layers, rank=RANK):
  return oialr.to_factors(oialr.to_lowrank(params, layers, rank=rank))


def conversion(**changes):
  return training.Conversion(**(dict(step=DELAY, convert=cut) | changes))


def fit(workdir=None, **options):
  return resume_test.fit(
    workdir, **(dict(schedule=None, conversion=conversion()) | options)
  )


@pytest.fixture(scope='module')
def whole():
  return fit()


@pytest.fixture(scope='module')
def dense():
  return fit(conversion=None)


losses = training_test.losses


def test_a_conversion_that_changes_nothing_is_dense_training(dense):
  found = fit(conversion=conversion(step=0, convert=lambda params, _: params))
  jax.tree.map(np.testing.assert_array_equal, found.state, dense.state)
  np.testing.assert_array_equal(losses(found), losses(dense))


def test_training_is_dense_until_then(whole, dense):
  np.testing.assert_array_equal(losses(whole)[:DELAY], losses(dense)[:DELAY])
  assert np.all(losses(whole)[DELAY:] != losses(dense)[DELAY:])
  for name in ('first', 'second'):
    kernel = whole.params[name]['kernel']
    assert isinstance(kernel, oialr.Factors) and kernel.rank == RANK
  assert isinstance(whole.params['head']['kernel'], jax.Array)


def test_what_was_done_is_recorded(whole):
  (record,) = whole.select('conversion')
  assert record['step'] == DELAY and record['seconds'] > 0
  assert record['ranks'] == dict.fromkeys(PATHS, RANK)
  before = fit(conversion=None, stop_at=DELAY).params
  for path in PATHS:
    w = np.asarray(before[path.split('/')[0]]['kernel'], np.float64)
    squares = np.linalg.svd(w, compute_uv=False) ** 2
    lost = np.sqrt(np.sum(squares[RANK:]) / np.sum(squares))
    np.testing.assert_allclose(record['truncation'][path], lost, rtol=1e-4)
  counts = oialr.count(whole.params)
  assert record['stored'] == counts.stored < counts.dense == record['dense']
  (end,) = whole.select('end')
  assert end['trainable'] == counts.trainable == counts.stored


@pytest.mark.parametrize('stop', [DELAY, DELAY + 1])
def test_a_resumed_run_is_the_same_run(whole, tmp_path, stop):
  resume_test.interrupt(tmp_path, stop, fit, checkpoint_every=stop - 1)
  result = fit(tmp_path, resume=True)
  resume_test.assert_same(result, whole)
  assert len(result.select('conversion')) == 1
  resume_test.assert_same(fit(tmp_path, resume=True), whole)


def test_a_run_that_goes_back_converts_again(tmp_path):
  spoil = resume_test.SpoilOnce(11)
  result = fit(
    tmp_path,
    data=resume_test.batches().map(spoil.apply),
    checkpoint_every=8,
    rollbacks=1,
    log_every=5,
  )
  assert [r['step'] for r in result.select('rollback')] == [8]
  assert [r['step'] for r in result.select('conversion')] == [DELAY]
  assert np.isfinite(losses(result)).all()


def test_another_conversion_is_another_run(tmp_path):
  fit(tmp_path, stop_at=12)
  with pytest.raises(ValueError, match="in its conversion: 'step': 9 there, 8"):
    fit(tmp_path, resume=True, conversion=conversion(step=8))
  fewer = functools.partial(cut, rank=2)
  with pytest.raises(ValueError, match='in its conversion'):
    fit(tmp_path, resume=True, conversion=conversion(convert=fewer))
  with pytest.raises(ValueError, match='another run'):
    fit(tmp_path, resume=True, conversion=None)


@pytest.mark.parametrize('background', [True, False])
def test_the_step_is_compiled_twice(whole, background):
  policy = training.Compaction(background=background)
  found = fit(compaction=policy)
  assert found.compilations == 2
  np.testing.assert_array_equal(losses(found), losses(whole))


def test_moments_begin_anew_and_the_rate_goes_on():
  params = {'w': jnp.eye(8), 'b': jnp.ones(8)}
  layer = oialr.Layer('w', (8, 8), (0,), (1,))
  tx = oialr.train_sigma(optax.adamw(lambda step: 0.1 / (1 + step)))
  opt_state = tx.init(params)
  for _ in range(3):
    _, opt_state = tx.update(params, opt_state, params)
  state = training.TrainState(jnp.int32(3), params, opt_state, {})
  new, _ = conversion(convert=functools.partial(cut, rank=2)).apply(
    state, layers=[layer], tx=tx
  )
  adam, *_, schedule = new.opt_state
  assert adam.count == 0 and schedule.count == 3 and new.step == 3
  like = jax.tree.structure(new.params)
  assert jax.tree.structure(adam.mu) == jax.tree.structure(adam.nu) == like
  for x in jax.tree.leaves((adam.mu, adam.nu)):
    np.testing.assert_array_equal(x, 0)


def test_iterates_of_what_was_converted_begin_anew():
  """A Sigma of full rank has the kernel's shape, and not its coordinates."""
  rng = np.random.default_rng(0)
  kernel = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
  params = {'w': kernel, 'b': jnp.ones(8)}
  layer = oialr.Layer('w', (8, 8), (0,), (1,))
  tx = oialr.train_sigma(optax.contrib.schedule_free_sgd(0.1))
  _, opt_state = tx.update(params, tx.init(params), params)
  state = training.TrainState(jnp.int32(1), params, opt_state, {})
  new, _ = conversion(convert=oialr.to_lowrank).apply(
    state, layers=[layer], tx=tx
  )
  np.testing.assert_array_equal(new.opt_state.z['w'], new.params['w'].s)
  np.testing.assert_array_equal(new.opt_state.z['b'], opt_state.z['b'])
  assert np.any(opt_state.z['b'] != params['b'])


def test_what_is_not_factored_has_lost_nothing():
  old = {'a': jnp.ones((4, 4)), 'b': jnp.ones((4, 4))}
  layer = oialr.Layer('a', (4, 4), (0,), (1,))
  new = oialr.to_lowrank(old, [layer], rank=1)
  assert set(conversion_lib._lost(old, new)) == {'a'}
  assert not conversion_lib._lost(new, new)


def test_steps_and_counts_may_be_other_ones_afterwards():
  made = []

  def make_step(*args, **options):
    made.append(options)
    step = training.train_step(*args, **options)

    def noted(state, batch, key):
      state, metrics = step(state, batch, key)
      return state, metrics | {'after': jnp.ones(())}

    return noted

  found = fit(
    conversion=conversion(
      make_step=make_step,
      count=lambda params: oialr.count(params)._replace(trainable=7),
    ),
    log_every=1,
    stop_at=12,
  )
  after = [r.get('after', 0) for r in found.select('train')]
  assert after == [0] * DELAY + [1] * 3
  assert found.select('conversion')[0]['trainable'] == 7
  assert found.select('end')[0]['trainable'] == 7
  assert len(made) == 1 and made[0]['accumulate'] == 1


def test_layers_are_those_that_it_wants():
  found = fit(conversion=conversion(keep_first=True), stop_at=1)
  assert [x.path for x in found.layers] == ['second/kernel']


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(conversion=conversion(step=STEPS)), 'step=30: must be less than'),
    (dict(schedule=oialr.Schedule(steps=STEPS)), 'pass one of the two'),
  ],
)
def test_errors_name_the_value_and_the_remedy(options, message):
  with pytest.raises(ValueError, match=message):
    fit(**options)


def test_no_step_is_negative():
  with pytest.raises(ValueError, match='step=-1: must not be negative'):
    dataclasses.replace(conversion(), step=-1)


def test_a_run_that_has_diverged_is_not_converted():
  spoil = resume_test.Spoil(DELAY - 1)
  with pytest.raises(FloatingPointError, match='not finite|nan at step'):
    fit(
      data=resume_test.batches().map(spoil.apply),
      callbacks=[spoil],
      log_every=1000,
    )
