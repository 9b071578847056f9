"""Tests of when what happens to which layers, and of its happening."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oialr_jax as oialr
from oialr_jax import linalg
from oialr_jax import schedule as schedule_lib
from oialr_jax import transforms
from oialr_jax import tree

# Execution order is that of the names; the parameters lie the other way round.
NAMES = ('first', 'second', 'third', 'fourth')
LAYERS = tuple(
  oialr.Layer(f'{name}/kernel', (6, 4), (0,), (1,), order=3 * i)
  for i, name in enumerate(NAMES)
)
PATHS = tuple(layer.path for layer in LAYERS)


def _schedule(**changes):
  """Transition at 2, updates at 4, 6, 8; all layers at once."""
  defaults = dict(steps=10, delay=2, every=2, cutoff=0.3, progressive=1.0)
  return oialr.Schedule(**(defaults | changes))


def _params(seed=0, names=NAMES):
  rng = np.random.default_rng(seed)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    name: {'kernel': array(6, 4), 'bias': array(4)} for name in reversed(names)
  }


def _low_rank_params(seed=0, names=NAMES):
  """Random orthonormal bases with a Sigma that is trained, not aligned."""
  rng = np.random.default_rng(seed)
  basis = lambda m: np.linalg.qr(rng.normal(size=(m, 4)))[0]
  low = lambda: oialr.LowRank(
    jnp.asarray(basis(6), jnp.float32),
    jnp.asarray(np.diag([4, 2, 1, 0.2]) @ basis(4).T, jnp.float32),
    jnp.asarray(basis(4), jnp.float32),
    oialr.MatrixView((0,), (1,)),
  )
  params = _params(seed, names)
  return {name: x | {'kernel': low()} for name, x in params.items()}


def _apply(schedule, step, params, opt_state=None, layers=LAYERS, **kwargs):
  event = schedule.event(step)
  return oialr.apply_event(event, params, opt_state, layers, schedule, **kwargs)


def _plan(schedule, step, params, layers=LAYERS, **kwargs):
  """What the event would do, without doing it: traced, not compiled."""
  apply = lambda p: _apply(schedule, step, p, layers=layers, **kwargs)[2]
  return jax.eval_shape(apply, params)


def _dense(params):
  full = oialr.to_dense(params)
  return {
    f'{name}/kernel': np.asarray(x['kernel'], np.float64)
    for name, x in full.items()
  }


def _names(paths):
  return tuple(path.split('/')[0] for path in paths)


def _bits(x):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(x)]


@pytest.mark.parametrize(
  ('delay', 'expected'),
  [
    (0, 0),
    (0.0, 0),
    (1, 1),
    (30, 30),
    (0.3, 30),
    (1 / 3, 33),
    (0.999, 100),
    (99, 99),
    (np.int64(30), 30),
    (np.float32(1 / 3), 33),
  ],
)
def test_delay_is_a_step_or_a_share_of_the_run(delay, expected):
  schedule = oialr.Schedule(steps=100, delay=delay, every=10)

  assert schedule.delay_steps == expected
  assert isinstance(schedule.delay_steps, int)


def test_events_come_at_exact_steps():
  schedule = oialr.Schedule(steps=100, delay=20, every=30, progressive=0.4)

  found = {step: schedule.event(step) for step in range(200)}

  assert [step for step, event in found.items() if event] == [20, 50, 80]
  assert [found[s].index for s in (20, 50, 80)] == [0, 1, 2]
  kinds = [found[s].kind for s in (20, 50, 80)]
  assert kinds == ['transition', 'update', 'update']
  assert [found[s].share for s in (20, 50, 80)] == pytest.approx([0.4, 0.8, 1])
  assert all(e.last_transition and e.step == s for s, e in found.items() if e)


@pytest.mark.parametrize(
  'options',
  [
    dict(steps=100, delay=20, every=30),
    dict(steps=101, delay=0.5, every=10),
    dict(steps=100, delay=0, every=1, last=7),
    dict(steps=100, delay=99, every=1),
    dict(steps=100, delay=10, every=5, stability=0.9),
    dict(steps=1, delay=0, every=1),
  ],
  ids=str,
)
def test_events_are_all_that_event_gives(options):
  schedule = oialr.Schedule(**options)
  one_by_one = [schedule.event(step) for step in range(schedule.steps + 50)]

  assert schedule.events() == tuple(e for e in one_by_one if e is not None)


@pytest.mark.parametrize(
  ('last', 'expected'),
  [
    (None, [20, 50, 80]),
    (80, [20, 50, 80]),
    (79, [20, 50]),
    (20, [20]),
  ],
)
def test_no_update_comes_after_the_last(last, expected):
  schedule = oialr.Schedule(steps=100, delay=20, every=30, last=last)

  assert [event.step for event in schedule.events()] == expected


def test_no_event_comes_at_the_end_of_the_run():
  schedule = oialr.Schedule(steps=80, delay=20, every=30)

  assert schedule.event(80) is None
  assert [event.step for event in schedule.events()] == [20, 50]


def test_stability_moves_the_last_transition_to_latest():
  schedule = oialr.Schedule(
    steps=100, delay=10, every=10, stability=0.9, latest=0.35
  )

  assert schedule.latest_steps == 35
  last = {event.step: event.last_transition for event in schedule.events()}
  assert [step for step, is_last in last.items() if not is_last] == [10, 20, 30]
  assert min(step for step, is_last in last.items() if is_last) == 40


def test_paper_is_algorithm_1():
  schedule = oialr.Schedule.paper(900, every=200)

  assert [e.step for e in schedule.events()] == [300, 500, 700]
  assert {e.share for e in schedule.events()} == {1.0}
  assert schedule.policy == 'transport'
  assert schedule.cutoff == 0.15
  assert not schedule.prune_at_transition
  assert oialr.Schedule.paper(900, cutoff=0.2).cutoff == 0.2


def test_reference_is_the_published_code():
  schedule = oialr.Schedule.reference(900, delay=100, every=100)

  assert schedule.policy == 'reference'
  assert schedule.prune_at_transition
  shares = [event.share for event in schedule.events()]
  assert shares == pytest.approx(np.arange(1, 9) / 10)
  assert (schedule.keep_first, schedule.keep_last) == (False, True)
  assert (schedule.max_drop, schedule.floor) == (0.5, 0.01)
  assert oialr.Schedule.reference(900, policy='reset').policy == 'reset'


def test_a_schedule_is_frozen_and_can_be_changed_by_replace():
  schedule = _schedule()

  with pytest.raises(dataclasses.FrozenInstanceError):
    schedule.every = 3
  assert dataclasses.replace(schedule, every=4).events()[1].step == 6
  with pytest.raises(ValueError, match='every=0'):
    dataclasses.replace(schedule, every=0)


def test_layers_are_taken_in_from_the_back():
  schedule = _schedule(steps=12, progressive=0.25)
  params = _low_rank_params()

  taken = [_names(_plan(schedule, s, params).updated) for s in range(2, 12, 2)]

  assert list(map(set, taken)) == [
    {'fourth'},
    {'third', 'fourth'},
    {'second', 'third', 'fourth'},
    set(NAMES),
    set(NAMES),
  ]


@pytest.mark.parametrize(
  ('progressive', 'expected'),
  [(0.01, 1), (0.1, 1), (0.25, 1), (0.26, 2), (0.7, 3), (0.75, 3), (1, 4)],
)
def test_a_share_is_rounded_up_to_whole_layers(progressive, expected):
  schedule = _schedule(progressive=progressive)

  plan = _plan(schedule, 2, _low_rank_params())

  assert len(plan.updated) == expected


def test_shares_that_add_up_do_not_take_in_a_layer_too_many():
  names = tuple(f'layer_{i}' for i in range(10))
  layers = [
    oialr.Layer(f'{name}/kernel', (6, 4), (0,), (1,), order=i)
    for i, name in enumerate(names)
  ]
  schedule = _schedule(steps=30, progressive=0.1)
  params = _low_rank_params(names=names)

  taken = [
    len(_plan(schedule, step, params, layers).updated)
    for step in range(2, 30, 2)
  ]

  assert taken == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10, 10]


def test_the_transition_converts_every_layer_and_prunes_none():
  plan = _plan(_schedule(progressive=0.25), 2, _params())

  assert set(plan.converted) == set(PATHS)
  assert plan.updated == plan.pruned == ()
  assert set(plan.ranks) == set(plan.spectra) == set(PATHS)


def test_prune_at_transition_prunes_the_layers_of_its_share():
  schedule = _schedule(progressive=0.5, prune_at_transition=True)

  plan = _plan(schedule, 2, _params())

  assert set(plan.converted) == set(PATHS)
  assert set(_names(plan.pruned)) == {'third', 'fourth'}
  assert plan.updated == ()


def test_a_layer_that_is_still_dense_follows_at_the_next_event():
  params = _low_rank_params()
  params['second'] = _params()['second']

  plan = _plan(_schedule(), 4, params)

  assert _names(plan.converted) == ('second',)
  assert set(_names(plan.updated)) == {'first', 'third', 'fourth'}
  assert set(_names(plan.pruned)) == {'first', 'third', 'fourth'}


def test_the_order_of_the_layers_argument_does_not_matter():
  schedule, params = _schedule(progressive=0.25), _low_rank_params()

  plans = [
    _plan(schedule, 4, params, layers).updated
    for layers in (LAYERS, LAYERS[::-1], iter(LAYERS))
  ]

  assert set(map(frozenset, plans)) == {
    frozenset({'third/kernel', 'fourth/kernel'})
  }


@pytest.mark.parametrize('rank', [3, 0.75])
def test_a_fixed_rank_never_prunes(rank):
  schedule = _schedule(rank=rank)
  params = jax.eval_shape(lambda: _params())

  for step in (2, 4, 6, 8):
    apply = functools.partial(_apply, schedule, step)
    params, _, report = jax.eval_shape(apply, params)
    assert report.pruned == ()
    assert set(report.updated) == (set(PATHS) if step > 2 else set())
    assert {x['kernel'].rank for x in params.values()} == {3}


@functools.cache
def _pruning_update():
  """An update that prunes two of four layers, with Adam's state."""
  schedule = _schedule(steps=20, progressive=0.25)
  params = _low_rank_params()
  tx = oialr.train_sigma(optax.adam(0.1))
  grads = jax.tree.map(
    lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape),
    oialr.trainable(params),
  )
  _, state = tx.update(grads, tx.init(params), params)
  event = schedule.event(4)
  return event, params, state, schedule


@functools.cache
def _pruning_update_done():
  event, params, state, schedule = _pruning_update()
  return oialr.apply_event(event, params, state, LAYERS, schedule)


def test_an_update_reports_what_it_did():
  event, before, _, _ = _pruning_update()
  after, _, report = _pruning_update_done()

  assert report.event == event
  touched = {'third/kernel', 'fourth/kernel'}
  assert set(report.updated) == set(report.pruned) == touched
  assert report.converted == ()
  assert dict(report.stability) == dict(report.bases) == {}
  assert {p: int(r) for p, r in report.ranks.items()} == oialr.ranks(after)
  assert set(report.spectra) == set(report.truncation) == touched
  old, new = _dense(before), _dense(after)
  for path in touched:
    # Sigma's singular values are 4, 2, 1, 0.2; cutoff 0.3 drops two of them.
    values = np.linalg.svd(old[path], compute_uv=False)
    assert int(report.ranks[path]) == 2
    np.testing.assert_allclose(report.spectra[path], values[None], atol=1e-5)
    lost = np.sqrt(np.sum(values[2:] ** 2) / np.sum(values**2))
    np.testing.assert_allclose(report.truncation[path], lost, rtol=1e-5)
    distance = np.linalg.norm(old[path] - new[path])
    np.testing.assert_allclose(
      distance / np.linalg.norm(old[path]), lost, rtol=1e-4
    )
    u = np.asarray(after[path.split('/')[0]]['kernel'].u)
    drift = np.max(np.abs(u[:, :2].T @ u[:, :2] - np.eye(2)))
    assert drift <= report.drift[path] < 1e-6
  assert set(report.drift) == set(PATHS)


def test_layers_that_are_not_included_stay_the_same_bits():
  _, before, _, _ = _pruning_update()
  after, _, _ = _pruning_update_done()

  for name in ('first', 'second'):
    assert _bits(after[name]) == _bits(before[name])
  for name in ('third', 'fourth'):
    assert _bits(after[name]['bias']) == _bits(before[name]['bias'])
    assert _bits(after[name]['kernel']) != _bits(before[name]['kernel'])


def test_the_optimisers_state_is_transported():
  _, before, state, _ = _pruning_update()
  after, moved, _ = _pruning_update_done()

  expected = oialr.transport(state, before, after)
  assert jax.tree.structure(moved) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, atol=1e-6)
  kernel = lambda s: np.asarray(s[0].mu['fourth']['kernel'])
  assert np.max(np.abs(kernel(moved) - kernel(state))) > 0.01
  # What is not included keeps its coordinates, and its bits.
  assert _bits(moved[0].nu['first']) == _bits(state[0].nu['first'])


def test_an_update_is_the_same_under_jit():
  event, params, state, schedule = _pruning_update()
  eager = _pruning_update_done()

  jitted = jax.jit(
    lambda p, s: oialr.apply_event(event, p, s, LAYERS, schedule)
  )(params, state)

  assert jax.tree.structure(jitted) == jax.tree.structure(eager)
  for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(eager)):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_allclose(a, b, atol=1e-6)


def _shapes(x):
  return jax.eval_shape(lambda: x)


def _program(event, params, state, layers, schedule):
  """As a trainer has it compiled ahead: from shapes alone."""
  plan = schedule_lib.foresee(event, _shapes(params), layers, schedule)
  return plan.lower(_shapes(params), _shapes(state)).compile()


def test_an_update_by_a_program_compiled_ahead_is_the_same():
  event, params, state, schedule = _pruning_update()
  desired = _pruning_update_done()

  program = _program(event, params, state, LAYERS, schedule)
  actual = oialr.apply_event(
    event, params, state, LAYERS, schedule, program=program
  )

  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  assert _bits(actual) == _bits(desired)


def test_a_transition_by_a_program_compiled_ahead_is_the_same():
  schedule = _schedule(prune_at_transition=True, cutoff=0.9)
  params, layers = {'fourth': _params()['fourth']}, LAYERS[-1:]
  state = oialr.train_sigma(optax.adam(0.1)).init(params)
  event = schedule.event(2)

  apply = functools.partial(
    oialr.apply_event, event, params, state, layers, schedule
  )
  desired = apply()
  actual = apply(program=_program(event, params, state, layers, schedule))

  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  assert _bits(actual) == _bits(desired)
  assert int(actual[2].ranks['fourth/kernel']) < 4


def test_a_program_is_the_one_that_runs():
  """And where nothing is known yet, under a trace, it has no part."""
  event, params, state, schedule = _pruning_update()
  *_, report = _pruning_update_done()
  ran = []

  def program(params, state):
    ran.append(True)
    finite = dict.fromkeys(PATHS, jnp.array(True))
    found = {k: getattr(report, k) for k in ('ranks', 'spectra', 'truncation')}
    return params, state, finite, {}, found | {'drift': {}}

  apply = lambda p: oialr.apply_event(
    event, p, state, LAYERS, schedule, program=program
  )
  after, _, _ = apply(params)
  assert ran and after is params
  traced, _, _ = jax.eval_shape(apply, params)
  assert len(ran) == 1 and jax.tree.structure(traced)


def test_a_program_that_meets_what_is_not_finite_says_so_too():
  event, params, state, schedule = _pruning_update()
  program = _program(event, params, state, LAYERS, schedule)
  kernel = params['fourth']['kernel']
  spoilt = dataclasses.replace(kernel, s=kernel.s.at[1, 0].set(jnp.nan))
  bad = params | {'fourth': params['fourth'] | {'kernel': spoilt}}

  with pytest.raises(ValueError, match="'fourth/kernel'.*NaN or infinity"):
    oialr.apply_event(event, bad, state, LAYERS, schedule, program=program)


@pytest.mark.parametrize(
  'promotion',
  [
    pytest.param(lambda: jax.numpy_dtype_promotion('strict'), id='of_dtypes'),
    pytest.param(lambda: jax.numpy_rank_promotion('raise'), id='of_ranks'),
  ],
)
def test_no_event_needs_implicit_promotion(promotion):
  schedule = _schedule(prune_at_transition=True)
  params = {'fourth': _params()['fourth']}
  state = oialr.train_sigma(optax.adam(0.1)).init(params)

  with promotion():
    for step in (2, 4):
      params, state, report = _apply(
        schedule, step, params, state, layers=LAYERS[-1:]
      )

  assert report.updated == report.pruned == PATHS[-1:]


@pytest.mark.parametrize('ahead', [False, True])
@pytest.mark.parametrize('lag', [0, 1])
def test_what_is_no_array_goes_through_events_as_it_is(ahead, lag):
  """As Equinox modules hold activation functions and flags."""
  others = {
    'activation': jnp.tanh,
    'inference': True,
    'name': 'net',
    'no': None,
  }
  params = {'fourth': _params()['fourth']} | others
  state = oialr.train_sigma(optax.adam(0.1)).init(tree.arrays(params))
  schedule, layers = _schedule(lag=lag), LAYERS[-1:]

  for step in (2, 4):
    event, kwargs = schedule.event(step), {}
    if event.lag:
      found = transforms.decompose(transforms.sigmas(params))
      kwargs['rotations'] = found
    if ahead:
      plan = schedule_lib.foresee(event, params, layers, schedule)
      kwargs['program'] = plan.lower(params, state).compile()
    before = jax.tree.structure(state)
    params, state, _ = oialr.apply_event(
      event, params, state, layers, schedule, **kwargs
    )
    assert jax.tree.structure(state) == before
    assert all(params[name] is x for name, x in others.items())

  assert oialr.ranks(params) == {'fourth/kernel': 3}


def test_foresee_says_what_the_event_is_going_to_do():
  mixed = _low_rank_params() | {'second': _params()['second']}
  for schedule, step, params in (
    (_schedule(progressive=0.25), 2, _params()),
    (_schedule(progressive=0.5, prune_at_transition=True), 2, _params()),
    (_schedule(progressive=0.25), 4, _low_rank_params()),
    (_schedule(rank=3), 4, _low_rank_params()),
    (_schedule(), 4, mixed),
    (_measured(), 8, _params()),  # the last transition: stable or not
    (_measured(), 4, _low_rank_params()),  # nothing is left to decide
  ):
    event = schedule.event(step)
    plan = schedule_lib.foresee(event, _shapes(params), LAYERS[::-1], schedule)
    report = _plan(schedule, step, params)
    for name in ('converted', 'updated', 'pruned'):
      assert {*getattr(plan, name)} == {*getattr(report, name)}, name
    assert hash(plan) == hash(dataclasses.replace(plan))
    assert plan == schedule_lib.foresee(event, params, LAYERS[::-1], schedule)


def test_foresee_knows_nothing_where_stability_decides():
  schedule = _measured()
  for step in (2, 4, 6):
    event = schedule.event(step)
    assert schedule_lib.foresee(event, _params(), LAYERS, schedule) is None


_SCALES = {'q': [4, 2, 1, 0.1], 'k': [4, 3, 0.2, 0.1], 'v': [4, 4, 3, 3]}
_APART = tuple(
  oialr.Layer(name, (6, 4), (0,), (1,), order=i)
  for i, name in enumerate(_SCALES)
)
_FUSED = (oialr.Layer('qkv', (6, 12), (0,), (1,), blocks=3),)


def _fused(t):
  """Kernels side by side, or Sigmas one behind the other."""
  q, k, v = (t[name] for name in _SCALES)
  if q.shape == (6, 4):
    return {'qkv': jnp.concatenate([q, k, v], axis=1)}
  return {'qkv': jnp.stack([q, k, v])}


def _trained(tx, params, state, grads):
  updates, state = tx.update(grads, state, params)
  new = optax.apply_updates(oialr.trainable(params), updates)
  return oialr.with_trainable(params, new), state


def test_blocks_go_through_the_events_like_kernels_of_their_own():
  """A transition, updates that prune, and Adam's moments on the way."""
  rng = np.random.default_rng(5)
  basis = lambda m: np.linalg.qr(rng.normal(size=(m, 4)))[0]
  kernel = lambda scale: basis(6) * scale @ basis(4).T
  apart = {k: jnp.asarray(kernel(s), jnp.float32) for k, s in _SCALES.items()}
  fused = _fused(apart)
  tx = oialr.train_sigma(optax.adam(0.05))
  state, fused_state = tx.init(apart), tx.init(fused)
  schedule = _schedule(cutoff=0.5, max_drop=1.0)
  for step in (2, 4, 6):
    grads = jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
      oialr.trainable(apart),
    )
    apart, state = _trained(tx, apart, state, grads)
    fused, fused_state = _trained(tx, fused, fused_state, _fused(grads))
    apart, state, report = _apply(schedule, step, apart, state, _APART)
    fused, fused_state, fused_report = _apply(
      schedule, step, fused, fused_state, _FUSED
    )
    alike = functools.partial(np.testing.assert_allclose, atol=2e-5)
    for moment in ('mu', 'nu'):
      a, b = (getattr(s[0], moment) for s in (state, fused_state))
      alike(b['qkv'], _fused(a)['qkv'])
    for part in ('u', 's', 'vt'):
      a = np.stack([getattr(apart[name], part) for name in _SCALES])
      alike(getattr(fused['qkv'], part), a)
    spectra = np.concatenate([report.spectra[name] for name in _SCALES])
    alike(fused_report.spectra['qkv'], spectra)

  ranks = [int(report.ranks[name]) for name in _SCALES]
  assert min(ranks) < max(ranks) == int(fused_report.ranks['qkv'])
  dense = _fused(oialr.to_dense(apart))['qkv']
  alike(oialr.to_dense(fused)['qkv'], dense)


def test_the_transition_keeps_the_function():
  schedule, params = _schedule(steps=20, prune_at_transition=False), _params()

  low, state, report = _apply(schedule, 2, params)

  assert state is None
  assert oialr.ranks(low) == dict.fromkeys(PATHS, 4)
  before = _dense(params)
  for path, kernel in _dense(low).items():
    np.testing.assert_allclose(kernel, before[path], atol=1e-5)
    np.testing.assert_allclose(
      report.spectra[path][0],
      np.linalg.svd(before[path], compute_uv=False),
      atol=1e-5,
    )
    assert report.truncation[path] == 0
    assert report.drift[path] < 1e-6


def test_prune_at_transition_prunes_at_once():
  schedule = _schedule(
    progressive=0.5, prune_at_transition=True, cutoff=0.9, max_drop=0.75
  )
  params = _params()

  low, _, report = _apply(schedule, 2, params)

  values = np.linalg.svd(_dense(params)['fourth/kernel'], compute_uv=False)
  kept = max(1, np.sum(values >= 0.9 * values[0]))
  assert kept < 4
  assert int(report.ranks['fourth/kernel']) == kept
  assert int(report.ranks['first/kernel']) == 4
  assert report.truncation['first/kernel'] == 0
  lost = np.linalg.norm(values[kept:]) / np.linalg.norm(values)
  np.testing.assert_allclose(
    report.truncation['fourth/kernel'], lost, rtol=1e-4
  )
  assert oialr.ranks(low)['fourth/kernel'] == kept


@pytest.mark.parametrize(
  ('options', 'expected'),
  [
    (dict(cutoff=0.9), 2),  # one above the cutoff, but half may go
    (dict(cutoff=0.9, max_drop=1.0), 1),
    (dict(cutoff=0.9, max_drop=1.0, floor=0.8), 3),
    (dict(cutoff=0.04), 4),
  ],
)
def test_cutoff_max_drop_and_floor_decide_the_rank(options, expected):
  params = {'fourth': _low_rank_params()['fourth']}
  schedule = _schedule(**options)

  after, _, report = _apply(schedule, 4, params, layers=LAYERS[-1:])

  assert int(report.ranks['fourth/kernel']) == expected
  kernel = _dense(params)['fourth/kernel']
  lost = np.linalg.norm(kernel - _dense(after)['fourth/kernel'])
  np.testing.assert_allclose(
    report.truncation['fourth/kernel'],
    lost / np.linalg.norm(kernel),
    atol=1e-6,
  )


@pytest.mark.parametrize(
  ('rank', 'expected'),
  [
    (3, (3, 2)),
    (0.5, (2, 1)),
    (4, (4, 2)),
    (100, (4, 2)),
    (np.int64(5), (4, 2)),
    (np.float32(0.5), (2, 1)),
  ],
)
def test_a_fixed_rank_fits_every_layer(rank, expected):
  layers = (LAYERS[0], oialr.Layer('small', (5, 2), (0,), (1,), order=1))
  params = {'first': _params()['first'], 'small': jnp.eye(5, 2)}
  schedule = _schedule(rank=rank)

  low, _, report = _apply(schedule, 2, params, layers=layers)

  assert (low['first']['kernel'].rank, low['small'].rank) == expected
  values = np.linalg.svd(params['first']['kernel'], compute_uv=False)
  np.testing.assert_allclose(
    report.truncation['first/kernel'],
    np.linalg.norm(values[expected[0] :]) / np.linalg.norm(values),
    atol=1e-6,
  )
  np.testing.assert_allclose(
    report.spectra['first/kernel'][0], values, atol=1e-5
  )


def test_a_fixed_rank_outlives_its_updates():
  schedule = _schedule(rank=3, cutoff=0.99)
  params, layers = {'fourth': _params()['fourth']}, LAYERS[-1:]

  for step in (2, 4, 6):
    params, _, report = _apply(schedule, step, params, layers=layers)
    assert int(report.ranks['fourth/kernel']) == 3
    assert (report.truncation['fourth/kernel'] == 0) == (step > 2)


def test_delay_0_starts_low_rank():
  schedule = _schedule(delay=0)
  params = _params()
  tx = oialr.train_sigma(optax.adam(0.1))

  low, state, report = _apply(schedule, 0, params, tx.init(params))

  assert report.event.kind == 'transition'
  assert set(report.converted) == set(PATHS)
  assert _bits(state) == _bits(tx.init(low))
  assert jax.tree.structure(state) == jax.tree.structure(tx.init(low))


def test_the_schedules_policy_is_that_of_transport():
  params, layers = {'fourth': _params()['fourth']}, LAYERS[-1:]
  state = optax.TraceState(jax.tree.map(jnp.ones_like, params))

  for policy in ('transport', 'reset', 'reference'):
    schedule = _schedule(policy=policy)
    low, moved, _ = _apply(schedule, 2, params, state, layers=layers)
    expected = oialr.transport(state, params, low, policy=policy)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(expected)):
      np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_report_goes_through_jit_and_tree_map():
  _, _, report = _pruning_update_done()

  doubled = jax.tree.map(lambda x: 2 * x, report)

  assert doubled.event == report.event
  assert doubled.pruned == report.pruned
  path = 'fourth/kernel'
  assert doubled.truncation[path] == 2 * report.truncation[path]


def _turned(params, names):
  """Other mixing for all kernels; other bases for those with these names."""
  rng = np.random.default_rng(9)

  def turn(name, x):
    u, s, vt = np.linalg.svd(_dense({name: x})[f'{name}/kernel'], False)
    if name in names:
      u = np.linalg.qr(rng.normal(size=u.shape))[0]
    # V S V^T from the right keeps the polar factor U V^T.
    kernel = u @ vt @ (vt.T * (1 + s[::-1])) @ vt
    return x | {'kernel': jnp.asarray(kernel, jnp.float32)}

  return {name: turn(name, x) for name, x in params.items()}


def _measured(stability=0.95, **changes):
  return _schedule(steps=20, stability=stability, latest=7, **changes)


def test_the_first_event_measures_and_converts_nothing():
  params = _params()

  after, _, report = _apply(_measured(), 2, params)

  assert report.converted == ()
  assert set(report.bases) == set(PATHS)
  assert dict(report.stability) == dict(report.ranks) == {}
  assert _bits(after) == _bits(params)
  for path, kernel in _dense(params).items():
    u, _, vt = np.linalg.svd(kernel, full_matrices=False)
    np.testing.assert_allclose(report.bases[path][0], u @ vt, atol=1e-5)


def test_each_layer_goes_when_its_own_basis_is_stable():
  schedule, params = _measured(progressive=0.25), _params()
  _, _, first = _apply(schedule, 2, params)
  params = _turned(params, {'second', 'fourth'})

  params, _, report = _apply(schedule, 4, params, bases=first.bases)

  assert set(_names(report.converted)) == {'first', 'third'}
  assert set(_names(report.stability)) == set(NAMES)
  for path, value in report.stability.items():
    stable = path in report.converted
    assert abs(value - 1) < 1e-5 if stable else value < 0.95
  assert set(_names(report.bases)) == {'second', 'fourth'}
  assert set(oialr.ranks(params)) == set(report.converted)

  # One of the two has turned on, the other has come to rest. What is low-rank
  # is updated, if its turn has come, and measured no more.
  params = params | _turned(
    {name: params[name] for name in ('second', 'fourth')}, {'second'}
  )
  params, _, report = _apply(schedule, 6, params, bases=report.bases)

  assert _names(report.converted) == ('fourth',)
  assert set(_names(report.stability)) == {'second', 'fourth'}
  assert set(_names(report.bases)) == {'second'}
  assert set(_names(report.updated)) == {'third'}

  # The step of `latest`, 7, has passed: stable or not.
  assert schedule.event(8).last_transition
  params = params | _turned({'second': params['second']}, {'second'})
  params, _, report = _apply(schedule, 8, params, bases=report.bases)

  assert _names(report.converted) == ('second',)
  assert report.stability['second/kernel'] < 0.95
  assert dict(report.bases) == {}
  assert set(oialr.ranks(params)) == set(PATHS)

  plan = _plan(schedule, 10, params, bases=report.bases)
  assert plan.converted == ()
  assert set(plan.updated) == set(PATHS)


def test_the_threshold_decides():
  params = _params(names=NAMES[:2])
  layers = LAYERS[:2]
  old = oialr.basis(params, layers)
  params = _turned(params, {'first'})
  value = float(
    oialr.stability(old, oialr.basis(params, layers))['first/kernel']
  )
  assert 0 < value < 0.9

  for stability, expected in (
    (value - 0.01, {'first', 'second'}),
    (value + 0.01, {'second'}),
  ):
    schedule = _measured(stability=stability)
    _, _, report = _apply(schedule, 4, params, layers=layers, bases=old)
    assert set(_names(report.converted)) == expected


def test_without_the_last_bases_nothing_is_stable():
  schedule, params = _measured(), _params()

  after, _, report = _apply(schedule, 4, params, bases=None)

  assert report.converted == ()
  assert set(report.bases) == set(PATHS)
  assert _bits(after) == _bits(params)


def test_without_stability_no_basis_is_measured():
  plan = _plan(_schedule(), 2, _params())

  assert dict(plan.bases) == dict(plan.stability) == {}


def test_the_step_compiles_once_between_two_compactions():
  rng = np.random.default_rng(4)
  x, y = rng.normal(size=(8, 6)), rng.normal(size=(8, 2))
  array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {'a': array(6, 4), 'b': array(4), 'c': array(4, 2)}
  layers = [oialr.Layer('a', (6, 4), (0,), (1,))]
  tx = oialr.train_sigma(optax.adamw(optax.cosine_decay_schedule(0.1, 50)))
  schedule = _schedule(steps=20, delay=3, every=3, cutoff=0.9, max_drop=0.3)
  forward = oialr.factored(
    lambda params, x: jnp.tanh(x @ params['a'] + params['b']) @ params['c']
  )

  @jax.jit
  def step(params, state):
    loss = lambda p: jnp.mean((forward(p, x) - y) ** 2)
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  state, compiled, seen = tx.init(params), {}, []
  for i in range(16):
    if event := schedule.event(i):
      params, state, _ = oialr.apply_event(
        event, params, state, layers, schedule
      )
      seen.append(oialr.ranks(params)['a'])
    if i == 13:  # after the updates at 6, 9, 12
      before = params
      params = oialr.compact(params)
      state = oialr.transport(state, before, params)
    params, state = step(params, state)
    compiled[i] = step._cache_size()

  assert seen[0] == 4 and seen[3] < 4, 'nothing was pruned'
  assert params['a'].rank == seen[3]
  assert list(compiled.values()) == [1] * 3 + [2] * 10 + [3] * 3


def test_a_kernel_that_is_not_finite_is_named():
  params = _params()
  params['third']['kernel'] = params['third']['kernel'].at[1, 2].set(jnp.nan)

  with pytest.raises(ValueError, match="'third/kernel'.*NaN or infinity"):
    _apply(_schedule(), 2, params)


def test_a_sigma_that_is_not_finite_is_named():
  params = _low_rank_params()
  kernel = params['second']['kernel']
  params['second']['kernel'] = dataclasses.replace(
    kernel, s=kernel.s.at[0, 0].set(jnp.inf)
  )

  with pytest.raises(ValueError, match="'second/kernel'.*NaN or infinity"):
    _apply(_schedule(), 4, params)


@pytest.fixture
def failing_svd(monkeypatch):
  """An SVD that does not converge gives NaN."""
  failed = lambda w: jax.tree.map(
    lambda x: x * jnp.nan, jnp.linalg.svd(w, full_matrices=False)
  )
  monkeypatch.setattr(linalg, 'svd', lambda w: tuple(failed(w)))


# Of a shape that no other test has: what was traced with it stays.
FAILING = (oialr.Layer('kernel', (29, 3), (0,), (1,)),)


def _failing_params(step):
  rng = np.random.default_rng(7)
  if step == 2:
    return {'kernel': jnp.asarray(rng.normal(size=(29, 3)), jnp.float32)}
  basis = lambda m: np.linalg.qr(rng.normal(size=(m, 3)))[0]
  factors = basis(29), rng.normal(size=(3, 3)), basis(3)
  view = oialr.MatrixView((0,), (1,))
  factors = (jnp.asarray(x, jnp.float32) for x in factors)
  return {'kernel': oialr.LowRank(*factors, view)}


@pytest.mark.parametrize('step', [2, 4])
def test_an_svd_that_fails_is_an_error(failing_svd, step):
  schedule = _schedule(prune_at_transition=True)

  with pytest.raises(
    np.linalg.LinAlgError, match="'kernel': the SVD did not converge"
  ):
    _apply(schedule, step, _failing_params(step), layers=FAILING)


@pytest.mark.parametrize('step', [2, 4])
def test_an_svd_that_fails_under_jit_keeps_the_kernel(failing_svd, step):
  schedule = _schedule(prune_at_transition=True, cutoff=0.9)
  params = _failing_params(step)
  apply = jax.jit(lambda p: _apply(schedule, step, p, layers=FAILING)[0])

  after = apply(params)

  np.testing.assert_allclose(
    oialr.to_dense(after)['kernel'], oialr.to_dense(params)['kernel'], atol=1e-5
  )


BAD_SCHEDULES = [
  (dict(steps=0), r'steps=0: must be at least 1'),
  (dict(steps=-5), r'steps=-5: must be at least 1'),
  (dict(every=0), r'every=0: must be at least 1 step'),
  (dict(delay=100), r'delay=100: must be a step of the run, in \[0, 100\)'),
  (dict(delay=101), r'delay=101: must be a step of the run'),
  (dict(delay=-1), r'delay=-1: must be a step of the run'),
  (dict(delay=1.0), r'delay=1.0: .*as a float, a share of it in \[0, 1\)'),
  (dict(delay=-0.1), r'delay=-0.1: .*a share of it in \[0, 1\)'),
  (dict(delay=float('nan')), r'delay=nan: .*a share of it in \[0, 1\)'),
  (dict(cutoff=0.0), r'cutoff=0.0: must be in \(0, 1\)\.'),
  (dict(cutoff=1.0), r'cutoff=1.0: must be in \(0, 1\)\.'),
  (dict(max_drop=0.0), r'max_drop=0.0: must be in \(0, 1\]\.'),
  (dict(max_drop=1.1), r'max_drop=1.1: must be in \(0, 1\]\.'),
  (dict(floor=-0.1), r'floor=-0.1: must be in \[0, 1\)\.'),
  (dict(floor=1.0), r'floor=1.0: must be in \[0, 1\)\.'),
  (dict(progressive=0.0), r'progressive=0.0: must be in \(0, 1\]\.'),
  (dict(progressive=1.5), r'progressive=1.5: must be in \(0, 1\]\.'),
  (dict(last=19), r'last=19: is before the transition at step 20'),
  (dict(stability=0.0), r'stability=0.0: must be in \(0, 1\)'),
  (dict(stability=1.0), r'stability=1.0: must be in \(0, 1\)'),
  (
    dict(stability=0.9, latest=29),
    r'latest=29: .*over 10 steps from step 20 on; latest must be at least 30',
  ),
  (dict(stability=0.9, latest=0.1), r'latest=0.1: .*at least 30'),
  (dict(stability=0.9, latest=100), r'latest=100: must be a step of the run'),
  (
    dict(stability=0.9, latest=91),
    r'latest=91: no event comes at step 91 or after it.*lower latest or every',
  ),
  (
    dict(stability=0.9, latest=50, last=49),
    r'latest=50: no event comes at step 50.*or raise last',
  ),
  (
    dict(rank=3, prune_at_transition=True),
    r'rank=3 fixes the rank, but prune_at_transition=True prunes; drop one',
  ),
  (dict(rank=0), r'rank=0: must be a number of directions, at least 1'),
  (dict(rank=-2), r'rank=-2: must be a number of directions, at least 1'),
  (dict(rank=1.5), r'rank=1.5: .*a share of min\(m, n\) in \(0, 1\]'),
  (dict(rank=0.0), r'rank=0.0: .*a share of min\(m, n\) in \(0, 1\]'),
  (
    dict(policy='keep'),
    r"policy='keep': must be one of transport, reset, reference",
  ),
]


@pytest.mark.parametrize(('changes', 'message'), BAD_SCHEDULES, ids=str)
def test_a_bad_schedule_says_what_is_wrong(changes, message):
  with pytest.raises(ValueError, match=message):
    oialr.Schedule(**(dict(steps=100, delay=20, every=10) | changes))


def test_latest_counts_only_where_stability_decides():
  assert oialr.Schedule(steps=10, delay=9, every=1, latest=0).stability is None


BAD_CALLS = {
  'negative_step': (
    lambda: _schedule().event(-1),
    r'step=-1: must not be negative',
  ),
  'no_layers': (
    lambda: _apply(_schedule(), 2, _params(), layers=()),
    r'layers is empty: no layer is there for the event',
  ),
  'unknown_path': (
    lambda: _apply(_schedule(), 2, _params(names=NAMES[:2])),
    r"'third/kernel': no such parameter; the tree has 4: ",
  ),
  'other_shape': (
    lambda: _apply(
      _schedule(),
      2,
      _params(),
      layers=[dataclasses.replace(LAYERS[0], shape=(4, 6))],
    ),
    r"'first/kernel': has shape \(6, 4\), but its layer says \(4, 6\)",
  ),
  'other_state': (
    lambda: _apply(
      _schedule(), 2, _params(), optax.TraceState({'first': jnp.zeros(3)})
    ),
    r'opt_state.trace: does not have the structure of the parameters',
  ),
  'foresee_no_layers': (
    lambda: schedule_lib.foresee(_schedule().event(2), {}, (), _schedule()),
    r'layers is empty: no layer is there for the event',
  ),
  'foresee_unknown_path': (
    lambda: schedule_lib.foresee(
      _schedule().event(2), _params(names=NAMES[:2]), LAYERS, _schedule()
    ),
    r"'third/kernel': no such parameter; the tree has 4: ",
  ),
  'other_bases': (
    lambda: _apply(
      _measured(), 4, _params(), bases={'first/kernel': jnp.zeros((1, 4, 6))}
    ),
    r"'first/kernel': matrices of shapes \(1, 4, 6\) and \(1, 6, 4\)",
  ),
}


@pytest.mark.parametrize('name', BAD_CALLS)
def test_bad_calls_say_what_is_wrong(name):
  call, message = BAD_CALLS[name]

  with pytest.raises(ValueError, match=message):
    call()
