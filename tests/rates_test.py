"""Tests of learning rates, against what timm computes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oialr_jax as oialr
from oialr_jax.training import rates

# Of timm 1.0.31, `CosineLRScheduler(optimizer, **arguments)`, to 7 digits: the
# rate after `step_update(t)`, t = 1, 2, ..., or, for hold=3, `step(t // 3)`.
# Its t_initial is steps - cooldown here (- warmup too, with warmup_prefix), in
# units of hold; the others are lr, warmup_t, warmup_lr_init, lr_min, k_decay.
_USUAL = dict(peak=1.0, steps=14, warmup=3, start=0.1, end=0.01, cooldown=2)
TIMM = {
  'default': (
    _USUAL,
    [0.1, 0.4, 0.7, 0.8550179, 0.7525, 0.6331154, 0.505, 0.3768846, 0.2575]
    + [0.1549821, 0.07631743, 0.02686672, 0.01, 0.01],
  ),
  'prefix': (
    _USUAL | dict(prefix=True),
    [0.1, 0.4, 0.7, 1.0, 0.9701478, 0.884192, 0.7525, 0.5909558, 0.4190442]
    + [0.2575, 0.125808, 0.03985215, 0.01, 0.01],
  ),
  'k-decay': (
    _USUAL | dict(prefix=True, k_decay=0.34),
    [0.1, 0.4, 0.7, 1.0, 0.5457607, 0.3525341, 0.2289571, 0.1451967]
    + [0.08801392, 0.04995993, 0.02629392, 0.01375936, 0.01, 0.01],
  ),
  'no warm-up': (
    dict(peak=0.5, steps=12, cooldown=2, k_decay=2.0),
    [0.5, 0.4998766, 0.4980287, 0.4900734, 0.4690767, 0.4267767, 0.3564448]
    + [0.2578527, 0.1435552, 0.04322986, 0.0, 0.0],
  ),
  'by the epoch': (
    dict(peak=1.0, steps=18, warmup=3, start=0.1, end=0.05, cooldown=6, hold=3),
    np.repeat([0.1, 0.8608757, 0.525, 0.1891243, 0.05, 0.05], 3),
  ),
  'by the epoch, prefix and k-decay': (
    dict(peak=1.0, steps=21, warmup=6, start=0.1, end=0.05, cooldown=3, hold=3)
    | dict(prefix=True, k_decay=0.34),
    np.repeat([0.1, 0.55, 1, 0.3443768, 0.1496386, 0.07020739, 0.05], 3),
  ),
}


@pytest.mark.parametrize('arguments, expected', TIMM.values(), ids=TIMM)
def test_warmup_cosine_is_that_of_timm(arguments, expected):
  rate = rates.warmup_cosine(**arguments)
  eager = [rate(t) for t in range(len(expected))]
  np.testing.assert_allclose(eager, expected, rtol=1e-5, atol=1e-7)
  jitted = jax.jit(jax.vmap(rate))(np.arange(len(expected)))
  np.testing.assert_allclose(jitted, expected, rtol=1e-5, atol=1e-7)


def test_the_rate_stays_at_its_end_beyond_the_run():
  rate = rates.warmup_cosine(1.0, steps=10, end=0.25)
  assert rate(10) == rate(1000) == 0.25


def test_an_optimiser_takes_it():
  tx = optax.sgd(rates.warmup_cosine(2.0, steps=4, warmup=2, prefix=True))
  gradient, updates = jnp.array(-1.0), []
  state = tx.init(gradient)
  for _ in range(4):
    update, state = tx.update(gradient, state)
    updates.append(update)
  np.testing.assert_allclose(updates, [0, 1, 2, 1], atol=1e-6)


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(peak=0.0), 'peak=0.0: must be positive'),
    (dict(k_decay=-1.0), 'k_decay=-1.0: must be positive'),
    (dict(end=-0.1), 'end=-0.1: a rate must not be negative'),
    (dict(hold=0), 'hold=0: must be at least 0, 0 and 1 steps'),
    (dict(warmup=12), 'warmup=12 and cooldown=2; shorten'),
    (dict(cooldown=14), 'nothing is left for the cosine'),
    (dict(warmup=7, cooldown=7, prefix=True), 'nothing is left'),
  ],
)
def test_warmup_cosine_refuses(changes, message):
  with pytest.raises(ValueError, match=message):
    rates.warmup_cosine(**(_USUAL | changes))


def test_rewarmed_rises_after_every_event():
  # Events at 4, 8 and 12.
  events = oialr.Schedule(steps=16, delay=4, every=4).events()
  rate = rates.rewarmed(lambda t: 0.5 * t, events, steps=2, start=0.2)
  share = [1, 1, 1, 1, *3 * [0.2, 0.6, 1, 1]]
  expected = 0.5 * np.arange(16) * share
  eager = [rate(t) for t in range(16)]
  np.testing.assert_allclose(eager, expected, rtol=1e-6)
  np.testing.assert_allclose(
    jax.jit(jax.vmap(rate))(np.arange(16)), expected, rtol=1e-6
  )


def test_events_that_come_before_the_rise_is_over_begin_it_anew():
  events = oialr.Schedule(steps=9, delay=0, every=3).events()
  rate = rates.rewarmed(lambda t: 1.0, events, steps=10, start=0.0)
  rising = [rate(t) for t in range(9)]
  np.testing.assert_allclose(rising, 3 * [0, 0.1, 0.2], atol=1e-6)


def test_with_a_lag_the_rise_begins_when_the_update_is_applied():
  schedule = oialr.Schedule(steps=100, delay=10, every=40, lag=15)
  rate = rates.rewarmed(lambda step: 1.0, schedule.events(), steps=10)
  steps = np.array([9, 10, 20, 50, 64, 65, 70, 75])
  expected = [1, 0.1, 1, 1, 1, 0.1, 0.55, 1]
  np.testing.assert_allclose([rate(t) for t in steps], expected, rtol=1e-6)


def test_without_events_rewarmed_is_the_rate():
  rate = lambda t: t
  assert rates.rewarmed(rate, (), steps=3) is rate


@pytest.mark.parametrize('changes', [dict(steps=0), dict(start=1.5)])
def test_rewarmed_refuses(changes):
  with pytest.raises(ValueError, match=next(iter(changes))):
    rates.rewarmed(lambda t: t, (), **(dict(steps=1) | changes))
