"""Tests of updates that begin at one step and are applied some steps later."""

from concurrent import futures
import dataclasses
import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oialr_jax as oialr
from oialr_jax import checkpoint
from oialr_jax import training
from oialr_jax import transforms
from oialr_jax.training import programs
from tests import kernels
from tests import optimizer_test
from tests import resume_test
from tests import training_test

LAYERS = tuple(
  kernels.BY_PATH[path] for path in ('tall', 'wide', 'conv', 'stack', 'qkv')
)
STEPS = training_test.STEPS
# The transition is at 9; updates begin at 16 and 23 and are due at 19 and 26.
SCHEDULE = oialr.Schedule(
  steps=STEPS, delay=9, every=7, cutoff=0.4, progressive=1.0, lag=3
)
NEVER = training_test.NEVER

fit = functools.partial(resume_test.fit, schedule=SCHEDULE)


@pytest.fixture(scope='module')
def low():
  """Low-rank parameters whose Sigma is full, with pruned directions."""
  params = oialr.to_lowrank(kernels.random_params(LAYERS), LAYERS)
  return kernels.trained(oialr.prune_sigma(params, cutoff=0.5))


@pytest.fixture(scope='module')
def later(low):
  return kernels.trained(low, seed=5)


# The schedule.


def test_an_update_begins_when_it_did_and_is_due_later():
  plain = dataclasses.replace(SCHEDULE, lag=0)
  assert [(e.step, e.due) for e in SCHEDULE.events()] == [
    (9, 9),
    (16, 19),
    (23, 26),
  ]
  for event, other in zip(SCHEDULE.events(), plain.events(), strict=True):
    assert dataclasses.replace(event, lag=0) == other


@pytest.mark.parametrize('steps, begins', [(26, [9, 16]), (27, [9, 16, 23])])
def test_what_would_be_due_at_the_end_does_not_begin(steps, begins):
  schedule = dataclasses.replace(SCHEDULE, steps=steps)
  assert [e.step for e in schedule.events()] == begins


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(lag=-1), r'lag=-1: must be a number of steps in \[0, 7\)'),
    (dict(lag=7), r'lag=7: .*after every=7 steps the next update begins'),
    (dict(lag=0.5), r'lag=0.5: must be a number of steps'),
    (dict(lag=1, stability=0.9), r'lag=1: where stability decides.*drop one'),
  ],
)
def test_a_bad_lag_says_what_is_wrong(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SCHEDULE, **changes)


# The transforms.


def test_the_halves_of_an_update_are_the_update(low):
  whole = oialr.update_basis(low)
  halves = transforms.rotate(low, transforms.decompose(transforms.sigmas(low)))
  for layer in LAYERS:
    actual, desired = (kernels.factors(x[layer.path]) for x in (halves, whole))
    for x, y in zip(actual, desired, strict=True):
      np.testing.assert_allclose(x, y, atol=2e-5, err_msg=layer.path)


def test_a_decomposition_is_that_of_the_live_block(low):
  taken = transforms.sigmas(low)
  found = transforms.decompose(taken)
  for path, x in found.items():
    u, s, vt = map(kernels.float64, x)
    sigma, live = map(np.asarray, taken[path])
    assert not live.all()
    np.testing.assert_allclose(u * s[:, None] @ vt, sigma, atol=1e-5)
    eye = np.eye(s.shape[-1]) * live[:, None]
    np.testing.assert_allclose(np.swapaxes(u, 1, 2) @ u, eye, atol=1e-5)
    np.testing.assert_allclose(vt @ np.swapaxes(vt, 1, 2), eye, atol=1e-5)
    assert (s == -np.sort(-s)).all() and x.u.dtype == sigma.dtype
    largest = np.take_along_axis(u, np.abs(u).argmax(1)[:, None], 1)
    assert (largest >= 0).all()


def test_an_earlier_rotation_keeps_every_kernel(low, later):
  rotations = transforms.decompose(transforms.sigmas(low))
  for rotate in kernels.modes(transforms.rotate).values():
    turned = rotate(later, rotations)
    for layer in LAYERS:
      old, new = later[layer.path], turned[layer.path]
      assert kernels.live_rank(new) == kernels.live_rank(old)
      assert (
        kernels.error(kernels.product(new, layer), kernels.product(old, layer))
        < 1e-5
      )
    drift = jax.device_get(oialr.drift(turned))
    assert max(drift.values()) < 1e-5


def test_bases_that_have_drifted_are_made_orthonormal(low, later):
  rotations = transforms.decompose(transforms.sigmas(low))
  drifted = {
    path: dataclasses.replace(x, u=x.u * 1.001) if oialr.is_low_rank(x) else x
    for path, x in later.items()
  }
  turned = transforms.rotate(drifted, rotations)
  assert max(jax.device_get(oialr.drift(drifted)).values()) > 1e-3
  assert max(jax.device_get(oialr.drift(turned)).values()) < 1e-5
  for layer in LAYERS:
    old, new = drifted[layer.path], turned[layer.path]
    products = kernels.product(new, layer), kernels.product(old, layer)
    assert kernels.error(*products) < 1e-5


def test_a_step_may_donate_what_is_being_decomposed(low):
  params = jax.tree.map(jnp.array, low)
  for take in kernels.modes(transforms.sigmas).values():
    taken = take(params)
    before = jax.tree.map(jnp.array, taken)
    step = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    old, params = params, step(params)
    assert jax.tree.leaves(old)[0].is_deleted()
    jax.tree.map(np.testing.assert_array_equal, taken, before)


def test_directions_pruned_before_can_be_compacted_meanwhile(low, later):
  rotations = transforms.decompose(transforms.sigmas(low))
  compacted = oialr.compact(later)
  actual = transforms.rotate(compacted, rotations)
  desired = oialr.compact(transforms.rotate(later, rotations))
  assert oialr.ranks(actual) == oialr.ranks(desired)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=2e-5), actual, desired
  )
  assert any(compacted[x.path].rank < low[x.path].rank for x in LAYERS)
  (small, _, report), (whole, _, _) = (
    _apply(16, params, rotations=rotations) for params in (compacted, later)
  )
  for layer in LAYERS:
    path = layer.path
    products = (kernels.product(x[path], layer) for x in (small, whole))
    assert kernels.error(*products) < 1e-5
    assert report.spectra[path].shape[-1] == compacted[path].rank


def test_rotations_of_other_parameters_are_refused(low):
  small = transforms.decompose(transforms.sigmas(oialr.compact(low)))
  with pytest.raises(ValueError, match=r"'conv': has rank 5, but .* rank 3"):
    transforms.rotate(low, small)
  with pytest.raises(ValueError, match="'bias': no such low-rank leaf"):
    transforms.rotate(low, {'bias': small['tall']})


def test_a_sigma_that_is_not_finite_is_named(low):
  node = low['conv']
  spoilt = low | {
    'conv': dataclasses.replace(node, s=node.s.at[0, 1].set(jnp.inf))
  }
  with pytest.raises(ValueError, match="'conv': Sigma holds NaN or infinity"):
    transforms.decompose(transforms.sigmas(spoilt))


@pytest.fixture
def failing_svd(monkeypatch):
  def fail(x):
    raise np.linalg.LinAlgError('SVD did not converge')

  monkeypatch.setattr(np.linalg, 'svd', fail)


def test_an_svd_that_fails_is_an_error(low, failing_svd):
  with pytest.raises(np.linalg.LinAlgError, match="'tall': the SVD did not"):
    transforms.decompose(transforms.sigmas(low, paths=['tall']))


# The event.


def _apply(step, params, schedule=SCHEDULE, **options):
  event = schedule.event(step)
  return oialr.apply_event(event, params, None, LAYERS, schedule, **options)


def test_ranks_are_those_of_the_step_at_which_the_update_began(low, later):
  schedule = dataclasses.replace(SCHEDULE, cutoff=0.5, max_drop=1.0)
  rotations = transforms.decompose(transforms.sigmas(low))
  params, _, report = _apply(16, later, schedule, rotations=rotations)
  plain = dataclasses.replace(schedule, lag=0)
  began, now = (_apply(16, p, plain)[2] for p in (low, later))
  ranks = lambda report: {k: int(v) for k, v in report.ranks.items()}
  assert ranks(report) == ranks(began) == oialr.ranks(params)
  assert ranks(began) != ranks(now)
  for path, values in began.spectra.items():
    np.testing.assert_allclose(report.spectra[path], values, atol=1e-5)


def test_what_is_lost_is_reported(low, later):
  schedule = dataclasses.replace(SCHEDULE, cutoff=0.7)
  rotations = transforms.decompose(transforms.sigmas(low))
  params, _, report = _apply(16, later, schedule, rotations=rotations)
  for layer in LAYERS:
    before, after = (
      kernels.product(p[layer.path], layer) for p in (later, params)
    )
    assert kernels.error(after, before) > 0.1
    np.testing.assert_allclose(
      report.truncation[layer.path], kernels.error(after, before), rtol=1e-4
    )


def test_an_event_with_a_lag_is_applied_under_a_trace(low, later):
  rotations = transforms.decompose(transforms.sigmas(low))
  plain = _apply(16, later, rotations=rotations)
  traced = jax.jit(lambda p, r: _apply(16, p, rotations=r))(later, rotations)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5), plain, traced
  )


def test_an_event_says_which_rotations_it_wants(low):
  rotations = transforms.decompose(transforms.sigmas(low))
  with pytest.raises(
    ValueError, match='update of step 16 is due after step 19'
  ):
    _apply(16, low)
  del rotations['conv']
  with pytest.raises(ValueError, match="'conv': no such rotation"):
    _apply(16, low, rotations=rotations)
  with pytest.raises(ValueError, match='transition of step 9 has no lag'):
    _apply(9, kernels.random_params(LAYERS), rotations=rotations)


@pytest.mark.parametrize('chain', optimizer_test.MOMENTUM)
def test_a_loop_of_ones_own_follows_the_dense_trajectory(chain):
  """Momentum, too, is that of dense training: nothing is pruned here."""
  params, state, step = optimizer_test._training(chain)
  layers = optimizer_test.SQUARE
  schedule = oialr.Schedule(
    steps=optimizer_test.STEPS,
    delay=15,
    every=15,
    cutoff=1e-6,
    progressive=1.0,
    lag=4,
  )
  seen, applied, began = [], [], None
  with futures.ThreadPoolExecutor(1) as pool:
    for i in range(schedule.steps):
      event = schedule.event(i)
      if event and event.lag:
        taken = transforms.sigmas(params)
        began = event, pool.submit(transforms.decompose, taken)
      elif event:
        params, state, _ = oialr.apply_event(
          event, params, state, layers, schedule
        )
      if began and began[0].due == i:
        event, rotations = began
        applied.append(i)
        params, state, _ = oialr.apply_event(
          event, params, state, layers, schedule, rotations=rotations.result()
        )
      params, state = step(params, state)
      full = jax.device_get(oialr.to_dense(params))
      seen.append([full[name]['kernel'] for name in optimizer_test.KERNELS])
  assert applied == [34, 49]
  dense = optimizer_test._trajectory(chain, None)
  np.testing.assert_allclose(np.stack(seen), dense, rtol=0, atol=1e-4)


# The trainer.


@pytest.fixture(scope='module')
def whole():
  return fit()


def _events(result):
  return [(e['step'], e.get('decided')) for e in result.select('event')]


def test_updates_are_recorded_when_they_are_applied(whole):
  assert _events(whole) == [(9, None), (19, 16), (26, 23)]
  update = whole.select('event')[1]
  assert update['updated'] == update['pruned'] == list(update['ranks'])
  assert sum(update['ranks'].values()) < sum(update['ranks_before'].values())
  # What an update decides takes over when the next one begins.
  slices = [(c['decided'], c['step']) for c in whole.select('compaction')[:1]]
  assert slices == [(19, 23)]


def test_the_function_stays_where_nothing_is_pruned():
  schedule = dataclasses.replace(SCHEDULE, rank=1.0)
  changes = lambda lag: [
    e['change']
    for e in fit(
      schedule=dataclasses.replace(schedule, lag=lag), probe=True
    ).select('event')
  ]
  assert max(changes(3)) < 1e-5


def test_a_lag_without_learning_is_no_lag():
  options = dict(optimizer=optax.sgd(0.0, momentum=0.9), compaction=NEVER)
  late, now = (
    fit(schedule=dataclasses.replace(SCHEDULE, lag=lag), **options)
    for lag in (1, 0)
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5),
    late.params,
    now.params,
  )
  for one, other in zip(late.select('event'), now.select('event'), strict=True):
    assert one['ranks'] == other['ranks']
    for path, lost in other['truncation'].items():
      np.testing.assert_allclose(one['truncation'][path], lost, atol=1e-6)
  assert now.select('event')[1]['truncation']['first/kernel'] > 0.01


class At(training.Callback):
  """Does something after a step."""

  def __init__(self, step, do):
    self.step = step
    self.do = do

  def on_step(self, step):
    if step == self.step:
      self.do()


def test_steps_go_on_while_the_host_decomposes(whole, monkeypatch):
  """It is held up until a step that the training has to reach first."""
  decompose, go_on, held = transforms.decompose, threading.Event(), []

  def slow(sigmas):
    assert threading.current_thread() is not threading.main_thread()
    held.append(go_on.wait(60))
    return decompose(sigmas)

  monkeypatch.setattr(transforms, 'decompose', slow)
  result = fit(callbacks=[At(18, go_on.set)])
  assert held and all(held)
  resume_test.assert_same(result, whole)


def test_how_long_it_takes_changes_nothing(whole, monkeypatch):
  decompose = transforms.decompose

  def slow(sigmas):
    time.sleep(0.1)
    return decompose(sigmas)

  monkeypatch.setattr(transforms, 'decompose', slow)
  resume_test.assert_same(fit(), whole)


def test_what_can_be_foreseen_is_not_compiled_by_the_training(monkeypatch):
  waited_for = []
  compile_ = programs._compile

  def spy(lowered):
    if threading.current_thread() is threading.main_thread():
      waited_for.append(lowered)
    return compile_(lowered)

  monkeypatch.setattr(programs, '_compile', spy)
  fit(compaction=NEVER, eval_fn=None, eval_data=None, eval_every=None)
  # The dense step, and the slicing at the end.
  assert len(waited_for) == 2


def test_an_svd_that_fails_is_an_error_of_the_run(failing_svd):
  message = "'first/kernel': the SVD did not converge"
  with pytest.raises(np.linalg.LinAlgError, match=message):
    fit()


# Those of 17 to 19 hold what is being decomposed.
@pytest.mark.parametrize('step', [16, 17, 19, 20])
def test_a_resumed_run_is_the_same_run(whole, tmp_path, step):
  resume_test.interrupt(tmp_path, step + 1, fit, checkpoint_every=step)
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as saved:
    at, arrays, manifest = saved.restore(lambda _: None)
  under_way = 17 <= step <= 19
  assert at == step and manifest['update'] == (16 if under_way else None)
  assert ('sigmas' in arrays) == under_way
  result = fit(tmp_path, resume=True)
  resume_test.assert_same(result, whole)
  assert _events(result) == _events(whole)


def test_a_run_that_stops_in_between_goes_on(whole, tmp_path):
  # At its end it slices what is pruned, and applies nothing any more.
  part = fit(tmp_path, stop_at=26, track_every=20, compaction=NEVER)
  assert _events(part) == _events(whole)[:2]
  nodes = transforms.low_rank_leaves(part.params)
  assert {p: x.rank for p, x in nodes.items()} == oialr.ranks(part.params)
  result = fit(tmp_path, resume=True)
  assert _events(result) == _events(whole)
  assert oialr.ranks(result.params) == oialr.ranks(whole.params)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-4),
    result.params,
    whole.params,
  )


def test_going_back_takes_the_update_up_again(whole, tmp_path):
  spoil = resume_test.SpoilOnce(18)
  result = fit(
    tmp_path,
    data=resume_test.batches().map(spoil.apply),
    checkpoint_every=17,
    rollbacks=1,
    log_every=1,
  )
  (back,) = result.select('rollback')
  assert back['step'] == 17
  assert _events(result) == _events(whole)
  # Which was that of step 16, before the batches differed.
  for name in ('ranks', 'spectra'):
    assert result.select('event')[1][name] == whole.select('event')[1][name]


def test_a_switch_may_come_in_between(whole, monkeypatch):
  """Smaller shapes are held up until an update is under way."""
  compile_, go_on, finished = programs._compile, threading.Event(), []
  pruned = threading.Event()

  def slow(lowered):
    if threading.current_thread() is threading.main_thread():
      return compile_(lowered)
    held = pruned.is_set()
    assert not held or go_on.wait(60)
    program = compile_(lowered)
    finished.extend([program] * held)
    return program

  def wait():
    go_on.set()
    while len(finished) < 2:  # the slicing, and the step
      time.sleep(0.01)
    time.sleep(0.1)  # for the thread to hand it over

  monkeypatch.setattr(programs, '_compile', slow)
  result = fit(
    compaction=dataclasses.replace(resume_test.POLICY, reproducible=False),
    callbacks=[At(18, pruned.set), At(24, wait)],
  )
  switch = result.select('compaction')[0]
  assert switch['decided'] == 19 and switch['step'] == 24
  assert _events(result) == _events(whole)
  assert oialr.ranks(result.params) == oialr.ranks(whole.params)
  np.testing.assert_allclose(
    training_test.losses(result), training_test.losses(whole), rtol=1e-4
  )
