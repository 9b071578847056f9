"""What is tested on eight devices, by `parallel_test`."""

import collections
import functools
import re
import shutil

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import bench_mesh
from experiments import hlo
import oialr_jax as oialr
from oialr_jax import data
from oialr_jax import models
from oialr_jax import sharding
from oialr_jax import training
from tests import resume_test

P = jax.sharding.PartitionSpec
STEPS = 60
SCHEDULE = oialr.Schedule(
  steps=STEPS, delay=20, every=10, cutoff=0.3, progressive=1.0
)
POLICY = training.Compaction(min_saving=0, multiple_of=8, reproducible=True)
# All of them share what is split over fsdp: the arrays here are small.
SMALL = 16


class Net(nn.Module):
  """A convolution, a norm over the batch, two hidden layers, and a head."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Conv(16, (3, 3), strides=2, name='conv')(x))
    x = nn.BatchNorm(not train, momentum=0.5, name='norm')(x)
    x = x.reshape(len(x), -1)
    x = nn.relu(nn.Dense(64, name='first')(x))
    x = nn.Dropout(0.1, deterministic=not train)(x)
    x = nn.relu(nn.Dense(48, name='second')(x))
    return nn.Dense(5, name='head')(x)


NET = Net()
INPUTS = np.random.default_rng(0).normal(size=(96, 8, 8, 3)).astype(np.float32)
LABELS = np.argmax(
  INPUTS.mean((1, 2)) @ np.ones((3, 5)) + INPUTS[:, 0, :5, 0], 1
)


def loss(params, model_state, batch, key):
  logits, model_state = NET.apply(
    {'params': params, **model_state},
    batch['x'],
    train=True,
    mutable=list(model_state),
    rngs={'dropout': key},
  )
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['y'])
  return losses.mean(), (dict(model_state), {})


def evaluate(params, model_state, batch):
  logits = NET.apply({'params': params, **model_state}, batch['x'])
  return {'accuracy': (jnp.argmax(logits, -1) == batch['y']).astype(float)}


def batches():
  def start_at(step):
    mine = np.arange(32).reshape(jax.process_count(), -1)[jax.process_index()]
    while True:
      index = np.random.default_rng([1, step]).permutation(96)[mine]
      yield {'x': INPUTS[index], 'y': LABELS[index]}
      step += 1

  return data.Batches(start_at)


def eval_batches():
  # 90 do not divide by the devices.
  mine = np.arange(90).reshape(jax.process_count(), -1)[jax.process_index()]
  return [{'x': INPUTS[mine], 'y': LABELS[mine]}]


def fit(placement, **options):
  variables = NET.init(jax.random.key(0), INPUTS[:1])
  defaults = dict(
    optimizer=optax.adamw(1e-3),
    steps=STEPS,
    schedule=SCHEDULE,
    model_state={'batch_stats': variables['batch_stats']},
    eval_fn=evaluate,
    eval_data=eval_batches,
    eval_every=25,
    log_every=20,
    compaction=POLICY,
    placement=placement,
  )
  return training.fit(
    loss, variables['params'], batches(), **(defaults | options)
  )


def place(count=8, rules=(), **sizes):
  mesh = sharding.make_mesh(devices=jax.devices()[:count], **sizes)
  return sharding.Placement(mesh, rules, min_size=SMALL)


PLACEMENTS = {
  'data': dict(),
  'fsdp': dict(data=1, fsdp=8),
  'tensor': dict(
    data=2,
    fsdp=2,
    tensor=2,
    rules=(
      ('first/kernel', P(None, 'tensor')),
      ('second/kernel', P('tensor')),
    ),
  ),
}


@pytest.fixture(scope='module')
def alone():
  return fit(place(1))


def losses(result):
  return np.concatenate([r['losses'] for r in result.select('train')])


def evaluations(result):
  """Shares of examples, which do not round, and of how many."""
  return [(r['accuracy'], r['examples']) for r in result.select('eval')]


def assert_close(result, other, rtol=1e-5):
  np.testing.assert_allclose(losses(result), losses(other), rtol=rtol)
  ranks = lambda run: [(e['step'], e['ranks']) for e in run.select('event')]
  assert ranks(result) == ranks(other)
  assert evaluations(result) == evaluations(other)
  assert oialr.ranks(result.params) == oialr.ranks(other.params)
  apart = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)
  dense = [jax.device_get(oialr.to_dense(x.params)) for x in (result, other)]
  assert max(jax.tree.leaves(jax.tree.map(apart, *dense))) < rtol
  accuracies = lambda run: [r['accuracy'] for r in run.select('eval')]
  np.testing.assert_allclose(accuracies(result), accuracies(other))


@functools.cache
def run_on(name):
  """What a run on this mesh ends with."""
  return fit(place(**PLACEMENTS[name]))


@pytest.mark.parametrize('name', PLACEMENTS)
def test_a_run_is_the_same_on_any_mesh(alone, name):
  result = run_on(name)
  assert_close(result, alone)
  kinds = [r['event'] for r in result.select('event')]
  assert kinds == ['transition', 'update', 'update', 'update']
  assert result.select('compaction')


def test_fsdp_splits_what_is_there_to_split():
  result = run_on('fsdp')
  node = result.params['first']['kernel']
  assert oialr.is_low_rank(node)
  for x in (node.u, node.s, node.vt):
    assert x.addressable_shards[0].data.size == x.size // 8
  moments = result.state.opt_state[0].mu['first']['kernel']
  assert moments.sharding == node.s.sharding


def test_rules_split_rows_and_columns():
  params = run_on('tensor').params
  first, second = params['first']['kernel'], params['second']['kernel']
  assert first.vt.sharding.spec[1] == 'tensor'
  assert 'tensor' not in jax.tree.leaves(tuple(first.u.sharding.spec))
  assert second.u.sharding.spec[0] == 'tensor'
  assert 'tensor' not in jax.tree.leaves(tuple(second.vt.sharding.spec))


TRACKED = dict(track_every=16, track_more=resume_test.moved)


def wide(count):
  return place(count, data=1, fsdp=count) if count == 8 else place(count)


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
  """The folder of a run on so many devices, interrupted after step 37."""

  @functools.cache
  def folder(count):
    workdir = tmp_path_factory.mktemp('interrupted')
    with pytest.raises(KeyboardInterrupt):
      fit(
        wide(count),
        workdir=workdir,
        checkpoint_every=7,
        callbacks=[resume_test.Stop(37)],
        **TRACKED,
      )
    return workdir

  return folder


@pytest.mark.parametrize('saved, restored', [(8, 1), (8, 4), (1, 8)])
def test_a_run_goes_on_with_another_number_of_devices(
  alone, tmp_path, interrupted, saved, restored
):
  shutil.copytree(interrupted(saved), tmp_path, dirs_exist_ok=True)
  result = fit(wide(restored), workdir=tmp_path, resume=True, **TRACKED)
  assert_close(result, alone)
  measured = result.select('stability')
  assert [r['step'] for r in measured] == [16, 32, 48, STEPS]
  assert all(min(r['moved'].values()) > 0 for r in measured)


def test_accumulated_steps_and_what_is_evaluated_instead_are_split_likewise():
  shrunk = lambda _, trained: jax.tree.map(lambda x: 0.9 * x, trained)
  options = dict(accumulate=2, eval_params=shrunk, stop_at=25)
  found = fit(place(4, data=2, fsdp=2), **options)
  assert_close(found, fit(place(1), **options))


def test_the_flops_of_a_step_are_those_of_all_devices():
  flops = lambda count: fit(
    place(count), optimizer=optax.sgd(1e-3), schedule=None, stop_at=1
  ).select('train')[-1]['flops']
  assert flops(8) == pytest.approx(flops(1), rel=0.15)


def test_examples_that_do_not_divide_are_an_error():
  few = [{'x': INPUTS[:12], 'y': LABELS[:12]}]
  with pytest.raises(ValueError, match=r"batch\['x'\]: 12 examples do not"):
    training.fit(
      loss, {}, few, optimizer=optax.sgd(1.0), steps=1, placement=place()
    )


# The step, by its compiled program.


def test_the_partitioner_and_shard_map_agree():
  """`shard_map` says by hand what is reduced: gradients and the loss."""
  placement = place()
  model = models.create('mlp', widths=(64, 64))
  x, y = INPUTS[:64].reshape(64, -1), LABELS[:64]
  params = model.init(jax.random.key(0), x[:1])['params']

  def loss_of(params, batch):
    logits = model.apply({'params': params}, batch['x'])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['y']
    ).mean()

  full = lambda params, state, batch, key: (
    loss_of(params, batch),
    (state, {}),
  )
  layers = oialr.select(oialr.find_layers(loss_of, params, {'x': x, 'y': y}))
  params = oialr.to_lowrank(params, layers, rank=0.3)
  tx = oialr.train_sigma(optax.adam(1e-2))
  forward = oialr.factored(loss_of)

  @jax.jit
  @functools.partial(
    jax.shard_map,
    mesh=placement.mesh,
    in_specs=(P(), P(), P('data')),
    out_specs=(P(), P(), P()),
  )
  def by_hand(params, opt_state, batch):
    t = oialr.trainable(params)
    # Varying over the devices, so that nothing is reduced unasked.
    mine = jax.tree.map(lambda x: jax.lax.pcast(x, 'data', to='varying'), t)
    value, grads = jax.value_and_grad(
      lambda t: forward(oialr.with_trainable(params, t), batch)
    )(mine)
    value, grads = jax.lax.pmean((value, grads), 'data')
    updates, opt_state = tx.update(grads, opt_state, t)
    new = oialr.with_trainable(params, optax.apply_updates(t, updates))
    return new, opt_state, value

  step = jax.jit(training.train_step(full, tx, shards=8))
  state = training.TrainState(
    jnp.zeros((), jnp.int32), params, tx.init(params), {}
  )
  state = jax.device_put(state, placement.replicated)
  mine, opt_state = state.params, state.opt_state
  batch = placement.batch({'x': x, 'y': y})
  for _ in range(5):
    state, metrics = step(state, batch, jax.random.key(0))
    mine, opt_state, value = by_hand(mine, opt_state, batch)
    np.testing.assert_allclose(metrics['loss'], value, rtol=1e-6)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    state.params,
    mine,
  )


@functools.cache
def vit():
  """A mini ViT of two blocks."""
  return bench_mesh.Problem('mini_vit', 64, depth=2)


SHARES = {'dense': None, '16 %': 0.16, '5 %': 0.05}


@pytest.mark.parametrize('name', SHARES)
def test_what_is_reduced_is_what_trains(name):
  """Bytes all-reduced in a step: trainable ones and a scalar, the loss."""
  placement = sharding.Placement(sharding.make_mesh())
  step = vit().step(placement, SHARES[name])
  trains = collections.Counter(
    4 * x.size for x in jax.tree.leaves(oialr.trainable(step.params))
  )
  found = hlo.collectives(step.program)
  reduced = collections.Counter(size for _, size in found['all-reduce'])
  assert reduced == trains + collections.Counter([4])
  assert not any(found[kind] for kind in found if kind != 'all-reduce')
  counts = oialr.count(step.params)
  if SHARES[name]:
    assert 0.8 * SHARES[name] < counts.trainable / counts.dense <= SHARES[name]


@pytest.mark.parametrize('name', SHARES)
def test_fsdp_divides_the_memory_and_reduces_no_basis(name):
  placement = sharding.Placement(sharding.make_mesh(data=1, fsdp=8))
  step = vit().step(placement, SHARES[name])
  whole, each = step.state
  assert whole / 8 <= each <= 1.1 * whole / 8
  # As compiled: the arguments of a device are its parts, and of the batch.
  batch = (64 // 8) * 32 * 32 * 3 * 4
  arguments = step.program.memory_analysis().argument_size_in_bytes
  np.testing.assert_allclose(arguments, each + batch, rtol=0.01)
  trainable = oialr.count(step.params).trainable
  assert step.bytes_of('all-reduce') == 4 * trainable + 4
  # Every array is put together once or twice, nothing else is sent.
  stored = sum(4 * x.size for x in jax.tree.leaves(step.params))
  assert 0.9 * stored < step.bytes_of('all-gather') <= 2 * stored
  assert not step.bytes_of('all-to-all') + step.bytes_of('collective-permute')


@pytest.mark.parametrize('blocks', [2, 3])
def test_blocks_are_split_or_else_each_of_them(blocks):
  layer = oialr.Layer('qkv', (8, 24), (0,), (1,), blocks=blocks)
  kernel = np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32)
  params = oialr.to_lowrank({'qkv': jnp.asarray(kernel)}, [layer])
  rules = (('qkv', P(None, 'tensor')),)
  mesh = sharding.make_mesh(data=4, tensor=2)
  placement = sharding.Placement(mesh, rules=rules)
  placed = placement.put(params, placement.shardings(params))
  spec = placed['qkv'].vt.sharding.spec
  whole = 'tensor', None, None
  assert tuple(spec) == (whole if blocks == 2 else (None, None, 'tensor'))
  found = jax.jit(oialr.to_dense)(placed)['qkv']
  np.testing.assert_allclose(found, kernel, atol=1e-5)


def test_a_mesh_says_what_is_wrong_with_it():
  with pytest.raises(ValueError, match=r'data=3.*multiply to 8'):
    sharding.make_mesh(data=3)
  with pytest.raises(ValueError, match=re.escape("mesh has the axes ('x',)")):
    sharding.Placement(jax.make_mesh((8,), ('x',)))
  mesh = sharding.make_mesh()
  with pytest.raises(ValueError, match="not 'model'"):
    sharding.Placement(mesh, rules=(('kernel', P('model')),))
  with pytest.raises(ValueError, match='not a regular expression'):
    sharding.Placement(mesh, rules=(('*', P('tensor')),))
