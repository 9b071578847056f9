"""Tests of what the stability study measures, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import learning_rates
from experiments import turning
from experiments.configs import stability_study
import oialr_jax as oialr

DENSE = oialr.Layer('a/kernel', (24, 10), rows=(0,), cols=(1,))
CONV = oialr.Layer(
  'b/kernel', (3, 3, 4, 6), rows=(0, 1, 2), cols=(3,), kind='conv'
)
LAYERS = (DENSE, CONV)


def params(seed):
  keys = jax.random.split(jax.random.key(seed))
  return {
    x.path.split('/')[0]: {
      'kernel': jax.random.normal(key, x.shape),
      'bias': jnp.ones(3),
    }
    for x, key in zip(LAYERS, keys)
  }


def moved(old, move):
  return {k: x | {'kernel': move(x['kernel'])} for k, x in old.items()}


def polar(w):
  u, _, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
  return u @ vt


@pytest.mark.parametrize('layer', LAYERS, ids=lambda x: x.path)
def test_chance_is_the_stability_of_a_random_step_of_the_same_length(layer):
  old = params(0)
  new = moved(old, lambda w: 1.01 * w)
  found = turning.measure(old, new, LAYERS)
  w = np.asarray(old[layer.path[0]]['kernel'], np.float64).reshape(layer.matrix)
  assert found['norm'][layer.path] == pytest.approx(np.linalg.norm(w), rel=1e-5)
  assert found['change'][layer.path] == pytest.approx(0.01, rel=1e-3)
  # The mean over such steps, drawn here.
  rng, turns = np.random.default_rng(1), []
  for _ in range(200):
    noise = rng.normal(size=w.shape)
    step = 0.01 * np.linalg.norm(w) / np.linalg.norm(noise) * noise
    turns.append(1 - np.sum(polar(w) * polar(w + step)) / min(w.shape))
  turn = 1 - float(found['chance'][layer.path])
  assert abs(turn - np.mean(turns)) < 5 * np.std(turns) + 1e-6
  assert np.std(turns) < 0.3 * np.mean(turns)


def records(old, new, steps=100, count=8):
  """Of a run whose kernels go from old to new in every interval."""
  bases = oialr.basis(old, LAYERS), oialr.basis(new, LAYERS)
  mixing = oialr.metrics.mixing(old, LAYERS), oialr.metrics.mixing(new, LAYERS)
  fields = turning.measure(old, new, LAYERS) | {
    'stability': oialr.stability(*bases),
    'r_distance': oialr.metrics.r_distance(*mixing),
  }
  fields = {k: {p: float(x) for p, x in v.items()} for k, v in fields.items()}
  every = steps // count
  return [
    {'kind': 'stability', 'step': every * (i + 1), **fields}
    for i in range(count)
  ]


def test_what_only_mixes_does_not_turn_and_what_rotates_does_not_mix():
  old = params(0)
  scaled = turning.summary(records(old, moved(old, lambda w: 1.1 * w)), 96)
  assert scaled['final'] == pytest.approx(1, abs=1e-5)
  assert scaled['turn / chance late'] == pytest.approx(0, abs=1e-2)
  assert scaled['change % late'] == pytest.approx(10, rel=1e-3)
  assert scaled['R-distance / change early'] == pytest.approx(1, rel=1e-3)
  # A rotation of the rows changes nothing but the basis.
  skew = np.random.default_rng(0).normal(size=(36, 36)) * 0.02
  spin = {n: polar(np.eye(n) + (skew - skew.T)[:n, :n]) for n in (24, 36)}

  def rotate(w):
    rows = w.reshape(-1, w.shape[-1])
    return (spin[len(rows)] @ rows).reshape(w.shape).astype(jnp.float32)

  turned = turning.summary(records(old, moved(old, rotate)), 96)
  assert turned['turn / chance late'] > 0.5
  assert turned['R-distance / change late'] < 1e-3


def test_runs_settle_where_they_no_longer_fall_below():
  ends = np.array([10, 20, 30, 40])
  settled = lambda *values: turning.settled(ends, np.array(values), 40, 0.9)
  assert settled(0.95, 0.8, 0.9, 1.0) == 0.5
  assert settled(0.9, 0.95, 0.99, 1.0) == 0
  assert settled(0.95, 0.99, 1.0, 0.8) is None


def verdict(turns, chances, steps=80):
  """Of a run with these in its intervals, a layer of norm 1."""
  at = lambda x: {'w': x}
  return turning.summary(
    [
      {
        'kind': 'stability',
        'step': steps // len(turns) * (i + 1),
        'stability': at(1 - turn),
        'chance': at(1 - chance),
        'r_distance': at(0.1),
        'norm': at(1.0),
        'change': at(0.1),
      }
      for i, (turn, chance) in enumerate(zip(turns, chances))
    ],
    steps,
  )['shows']


def test_a_basis_that_settles_has_to_turn_less_than_by_chance():
  big, small = [0.3] * 2, [0.01] * 6  # a quarter of the run, and the rest
  # Turns shrink more than those of random steps.
  assert verdict(big + small, big + [0.1] * 6) == 'yes'
  # As much as those of random steps: the steps are shorter, that is all.
  assert verdict(big + small, big + small) == 'by short steps'
  assert verdict(small + big, small + big) == 'no'
  assert verdict([0.0] * 8, [1e-7] * 8) == 'no motion'


def test_types_are_told_apart_and_summed_up():
  kinds = {
    'blocks_0/attn/qkv/kernel': 'qkv',
    'blocks_0/attn/proj/kernel': 'attention out',
    'blocks_0/mlp/fc1/kernel': 'mlp',
    'head/kernel': 'dense',
  }
  for path, name in kinds.items():
    layer = oialr.Layer(path, (4, 4), rows=(0,), cols=(1,))
    assert turning.kind(layer) == name
  assert turning.kind(CONV) == 'conv'
  many = [
    {
      'kind': 'stability',
      'step': step,
      'stability': {'a': a, 'b': b, 'c': b},
      'chance': dict.fromkeys('abc', 0.9),
    }
    for step, a, b in ((10, 0.9, 0.99), (20, 0.96, 0.97))
  ]
  found = turning.by_type(many, 20, {'a': 'x', 'b': 'y', 'c': 'y'})
  settled = {'from 0.95': 0.5, 'from 0.98': None, 'final': 0.96}
  assert found['x'] == settled | {'turn / chance late': pytest.approx(0.4)}
  settled = {'from 0.95': 0, 'from 0.98': None, 'final': 0.97}
  assert found['y'] == settled | {'turn / chance late': pytest.approx(0.3)}


def test_random_bases_have_nothing_in_common():
  mean, deviation = turning.between_random_bases((60, 20), count=100)
  expected = 1 / np.sqrt(60 * 20)
  assert deviation == pytest.approx(expected, rel=0.3)
  assert abs(mean) < 4 * expected / 10


def test_schedules_by_name():
  config = stability_study.get_config()
  config.steps, config.warmup, config.learning_rate = 90, 10, 0.5
  rates = {
    name: np.array([make(config)(t) for t in range(90)])
    for name, make in learning_rates.SCHEDULES.items()
  }
  t = np.arange(90)
  np.testing.assert_allclose(rates['constant'], 0.5)
  np.testing.assert_allclose(rates['tiny'], 5e-4)
  cosine = lambda t, n: 0.25 * (1 + np.cos(np.pi * t / n))
  np.testing.assert_allclose(rates['cosine'], cosine(t, 90), atol=1e-6)
  np.testing.assert_allclose(rates['restarts'], cosine(t % 30, 30), atol=1e-6)
  np.testing.assert_allclose(
    rates['warmup'][10:], cosine(t[:80], 80), atol=1e-6
  )
  assert rates['warmup'][0] == pytest.approx(0.05)
  with pytest.raises(ValueError, match="no 'cosin'; did you mean 'cosine'"):
    learning_rates.make('cosin', config)
