"""Tests of how often a run compiles, told without running it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cifar10_vit
from experiments import runs
import oialr_jax as oialr
from oialr_jax import models
from oialr_jax import training
from tests import training_test


def paper():
  """Schedule and policy of the paper's 300 epochs, as the binary runs them."""
  config = cifar10_vit.BINARY.config()
  arguments = runs.arguments('oialr', config, cifar10_vit.plan(config)[0])
  return arguments['schedule'], arguments['compaction']


def mini_vit():
  model = models.create('mini_vit')
  x = jax.ShapeDtypeStruct((1024, 32, 32, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), x)
  return params, oialr.select(oialr.find_layers(model.apply, params, x))


@pytest.mark.parametrize('factor', [0.5, 0.7, 0.8, 0.88, 0.95, 1.0])
def test_300_epochs_of_the_mini_vit_compile_at_most_twelve_times(factor):
  """Ranks fall by a factor an update, at most to a twentieth."""
  params, layers = mini_vit()
  schedule, policy = paper()
  shares = {x.path: 0.9 + 0.1 * np.sin(x.order) for x in layers}

  def ranks(event, layer):
    share = max(0.05, shares[layer.path] * factor**event.index)
    return max(1, round(share * layer.max_rank))

  compiled = training.rehearse(
    params, layers, schedule, ranks=ranks, compaction=policy
  )
  assert compiled[:2] == (0, 2500)
  assert len(compiled) <= 12
  if factor == 1.0:
    assert len(compiled) <= 3
  if factor <= 0.8:
    assert len(compiled) >= 5, 'what is saved is worth it'
  often = training.rehearse(
    params,
    layers,
    schedule,
    ranks=ranks,
    compaction=dataclasses.replace(policy, min_saving=0),
  )
  assert len(often) >= len(compiled)


@pytest.mark.parametrize(
  'changes', [dict(cutoff=0.4), dict(cutoff=0.4, lag=3), dict(rank=14)]
)
def test_a_rehearsal_compiles_as_the_run_does(changes):
  net = training_test.Net()
  schedule = oialr.Schedule(
    steps=training_test.STEPS, delay=9, every=7, progressive=1.0, **changes
  )
  result = training_test.fit(net, schedule)
  params, _, loss, _, batches, _ = training_test.problem(net)
  after = {e['step']: e['ranks'] for e in result.select('event')}
  compiled = training.rehearse(
    params,
    result.layers,
    schedule,
    ranks=lambda event, layer: after[event.due][layer.path],
    compaction=training.Compaction(min_saving=0, multiple_of=1),
  )
  assert len(compiled) == result.compilations
  slices = [r['step'] for r in result.select('compaction')]
  assert list(compiled[2:]) == [s for s in slices if s < training_test.STEPS]
