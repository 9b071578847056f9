"""Tests of the methods on a small network and random, learnable data."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from experiments import cli
from experiments import lora
from experiments import memory
from experiments import methods
from experiments import runs
import oialr_jax as oialr
from tests import oracles
from tests import programs
from tests import resume_test

STEPS, DELAY, RANK = 30, 9, 4
SHAPES = {'first': (12, 16), 'second': (16, 16), 'head': (16, 3)}
KERNELS = {'first/kernel': (12, 16), 'second/kernel': (16, 16)}
# Of the other parameters, and of all.
OTHERS = 16 + 16 + 16 * 3 + 3
DENSE = OTHERS + 12 * 16 + 16 * 16
NAMES = ('dense', *runs.BASELINES)


def initial():
  keys = jax.random.split(jax.random.key(0), len(SHAPES))
  return {
    name: {
      'kernel': jax.random.normal(key, shape) / np.sqrt(shape[0]),
      'bias': jnp.zeros(shape[1]),
    }
    for key, (name, shape) in zip(keys, SHAPES.items())
  }


def logits(params, x):
  for name in ('first', 'second'):
    x = jax.nn.relu(x @ params[name]['kernel'] + params[name]['bias'])
  return x @ params['head']['kernel'] + params['head']['bias']


def loss(params, model_state, batch, key):
  """With noise by the key, and what the model carries: how often it was run."""
  noise = 0.1 * jax.random.normal(key, batch['x'].shape)
  found = logits(params, batch['x'] + noise)
  losses = optax.softmax_cross_entropy_with_integer_labels(found, batch['y'])
  state = {'calls': model_state['calls'] + 1}
  return losses.mean(), (state, {})


def evaluate(params, model_state, batch):
  del model_state
  hits = jnp.argmax(logits(params, batch['x']), -1) == batch['y']
  return {'accuracy': hits.astype(jnp.float32)}


def examples():
  inputs = np.random.default_rng(0).normal(size=(70, 12))
  return inputs.astype(np.float32), np.argmax(inputs[:, :3], axis=1)


def batches():
  x, y = examples()
  order = np.random.default_rng(1)
  while True:
    taken = order.permutation(len(x))[:32]
    yield {'x': x[taken], 'y': y[taken]}


def eval_batches():
  x, y = examples()
  yield {'x': x, 'y': y}


def rate(step):
  return 3e-2 * (1 - step / (2 * STEPS))


def config(**changes):
  found = runs.sections(
    fixed_rank=dict(rank=RANK),
    svd_prune=dict(rank=RANK),
    svd_init=dict(rank=RANK),
    galore=dict(rank=RANK, every=7),
    lora_style=dict(rank=RANK),
    dlrt=dict(rank=10, tau=0.3),
  )
  found['oialr'] = dict(delay=DELAY, every=7, cutoff=0.4, progressive=1.0)
  found['compaction'] = dict(min_saving=0.0, reproducible=True)
  found = ml_collections.ConfigDict(found)
  found.update(changes)
  return found


def fit(method, workdir=None, settings=None, **options):
  workdir = workdir or tempfile.mkdtemp()
  flags = [f'--workdir={workdir}', '--quiet']
  flags += ['--resume'] if options.pop('resume', False) else []
  every = options.pop('checkpoint_every', None)
  flags += [f'--checkpoint_every={every}'] if every else []
  _, binary = cli.parse(
    cli.Binary(name='digits', main=None, check=lambda config: None), flags
  )
  defaults = dict(
    name='run',
    steps=STEPS,
    loss_fn=loss,
    params=initial(),
    data=batches,
    rate=rate,
    optimizer=methods.Adam(clip=5.0, weight_decay=0.01),
    model_state={'calls': jnp.zeros(())},
    eval_fn=evaluate,
    eval_data=eval_batches,
  )
  return runs.fit(method, settings or config(), binary, **(defaults | options))


# How ml_collections loads a file of settings.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')
result = functools.cache(fit)


def end(name):
  return result(name).records[-1]


def losses(found):
  return np.concatenate([r['losses'] for r in found.select('train')])


@pytest.mark.parametrize('name', NAMES)
def test_it_learns_in_all_steps(name):
  found = result(name)
  assert found.state.model_state['calls'] == found.state.step == STEPS
  values = losses(found)
  assert values.shape == (STEPS,)
  assert values[-5:].mean() < 0.8 * values[:5].mean()
  assert [r['step'] for r in found.select('eval')] == [STEPS]
  row = runs.summary(found)
  assert all(isinstance(x, float) for x in row.values())
  assert end(name)['peak_bytes'] > 2**20


def factors(more=0):
  """The numbers of A and B, or of U, V^T and what is between them."""
  return sum(RANK * (m + n + more) for m, n in KERNELS.values())


COUNTS = {
  'dense': (DENSE, DENSE),
  'fixed_rank': (OTHERS + 2 * RANK**2, OTHERS + factors(RANK)),
  'svd_prune': (OTHERS + factors(),) * 2,
  'svd_init': (OTHERS + factors(),) * 2,
  'galore': (DENSE, DENSE),
  'lora_style': (OTHERS + factors(), DENSE + factors()),
}


@pytest.mark.parametrize('name', COUNTS)
def test_its_counts_are_those_by_hand(name):
  found = end(name)
  assert (found['trainable'], found['stored']) == COUNTS[name]
  assert found['dense'] == DENSE
  # Adam's two moments, and the counters of Adam and of the rate.
  if name != 'galore':
    assert found['optimizer_bytes'] == 2 * 4 * found['trainable'] + 2 * 4


def test_counts_of_dlrt_are_those_of_its_final_ranks():
  ranks = oialr.ranks(result('dlrt').params)
  assert 1 < min(ranks.values()) and max(ranks.values()) < 10
  numbers = OTHERS + sum(
    r * (sum(KERNELS[path]) + r) for path, r in ranks.items()
  )
  assert end('dlrt')['trainable'] == end('dlrt')['stored'] == numbers


@pytest.mark.parametrize('name', ['svd_prune', 'lora_style', 'fixed_rank'])
def test_a_run_is_dense_until_the_transition(name):
  found, dense = losses(result(name)), losses(result('dense'))
  np.testing.assert_allclose(found[:DELAY], dense[:DELAY], rtol=1e-6)
  assert np.all(found[DELAY + 1 :] != dense[DELAY + 1 :])


def test_layers_are_those_of_oialr():
  for name in ('fixed_rank', 'svd_prune', 'dlrt'):
    assert [x.path for x in result(name).layers] == [*KERNELS]
  assert set(result('dlrt').select('conversion')[0]['ranks']) == set(KERNELS)


def test_at_full_rank_from_the_first_step_training_is_dense():
  found = fit('svd_init', settings=config(svd_init=dict(rank=1.0)))
  np.testing.assert_allclose(
    losses(found), losses(result('dense')), rtol=2e-3, atol=1e-4
  )


@pytest.mark.parametrize('name', ['galore', 'lora_style', 'dlrt'])
def test_a_run_that_was_killed_goes_on(name, tmp_path):
  with pytest.raises(KeyboardInterrupt):
    fit(name, tmp_path, callbacks=[resume_test.Stop(13)], checkpoint_every=6)
  found = fit(name, tmp_path, resume=True)
  jax.tree.map(np.testing.assert_array_equal, found.state, result(name).state)
  np.testing.assert_array_equal(losses(found), losses(result(name)))


# GaLore.


def test_moments_of_galore_are_of_the_projected_shapes():
  shapes = [x.shape for x in jax.tree.leaves(result('galore').state.opt_state)]
  # The longer side is projected, and the projection is kept.
  for m, n in KERNELS.values():
    moments = (RANK, n) if m >= n else (m, RANK)
    assert shapes.count(moments) == 2 + (moments == (max(m, n), RANK))
    assert (max(m, n), RANK) in shapes and (m, n) not in shapes
  numbers = 2 * (OTHERS + RANK * (12 + 16)) + RANK * (16 + 16)
  # Besides, counters of GaLore, of Adam twice, and of the rate.
  assert end('galore')['optimizer_bytes'] == 4 * numbers + 4 * 4


@pytest.mark.parametrize('steps, rank', [(7, RANK), (8, 2 * RANK)])
def test_galore_moves_kernels_within_its_projections(steps, rank):
  """There is a new one after 7 steps."""
  found = fit('galore', stop_at=steps, optimizer=methods.Adam())
  kernel = lambda params: np.asarray(params['second']['kernel'])
  moved = kernel(found.params) - kernel(initial())
  assert np.linalg.matrix_rank(moved, tol=1e-4) == rank


@pytest.mark.parametrize('clip', [None, 1.0])
def test_adam_is_that_of_optax(clip):
  params = initial()
  mine = methods.Adam(clip=clip, weight_decay=0.1)(rate)
  theirs = optax.adamw(rate, weight_decay=0.1)
  if clip:
    theirs = optax.chain(optax.clip_by_global_norm(clip), theirs)
  states = mine.init(params), theirs.init(params)
  # Checkpoints of one can be read as of the other.
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
  for i in range(3):
    grads = jax.tree.map(lambda x: jnp.cos(x + i), params)  # noqa: B023
    updates, states = zip(
      *(tx.update(grads, s, params) for tx, s in zip((mine, theirs), states))
    )
    jax.tree.map(np.testing.assert_array_equal, *updates)


# SVD: pruning and initialisation.


@pytest.fixture(scope='module')
def kernels():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {'tall': draw(20, 8), 'stack': draw(3, 2, 9, 16)}
  layers = (
    oialr.Layer('tall', (20, 8), (0,), (1,)),
    oialr.Layer('stack', (3, 2, 9, 16), (1, 2), (3,), (0,)),
  )
  return params, layers


def test_truncation_is_that_of_eckart_and_young(kernels):
  params, layers = kernels
  compressed = methods.compress(params, layers, 3)
  dense = oialr.to_dense(compressed)
  for layer in layers:
    assert compressed[layer.path].rank == 3
    w, ab = (
      np.asarray(layer.view.to_matrix(p[layer.path]), np.float64)
      for p in (params, dense)
    )
    spectra = np.linalg.svd(w, compute_uv=False)
    np.testing.assert_allclose(
      np.linalg.svd(w - ab, compute_uv=False)[:, :-3],
      spectra[:, 3:],
      rtol=1e-4,
      atol=1e-5,
    )


def test_factors_share_the_singular_values_evenly(kernels):
  params, layers = kernels
  compressed = methods.compress(params, layers, 3)
  for layer in layers:
    x = compressed[layer.path]
    a = np.asarray(x.a).reshape(layer.stack, -1, 3)
    b = np.asarray(x.b).reshape(layer.stack, 3, -1)
    gram = np.einsum('bmr,bms->brs', a, a)
    np.testing.assert_allclose(gram, np.einsum('brn,bsn->brs', b, b), atol=2e-5)
    np.testing.assert_allclose(gram, gram * np.eye(3), atol=2e-5)


def test_what_factors_would_not_shrink_stays_dense(kernels):
  params, layers = kernels
  assert isinstance(methods.compress(params, layers, 8)['tall'], jax.Array)


def test_ranks_are_of_what_there_is():
  layers = (
    oialr.Layer('a', (12, 16), (0,), (1,)),
    oialr.Layer('b', (40, 64), (0,), (1,)),
  )
  assert methods.ranks(layers, 20) == {'a': 12, 'b': 20}
  assert methods.ranks(layers, 0.25) == {'a': 3, 'b': 10}
  assert methods.ranks(layers, 0.01) == {'a': 1, 'b': 1}


# LoRA.


def merged(params):
  """The dense parameters W + s A B, and W."""
  is_leaf = lambda x: isinstance(x, lora.Adapted)
  add = lambda x: x.w + x.scale * oialr.to_dense(x.d) if is_leaf(x) else x
  return jax.tree.map(add, params, is_leaf=is_leaf)


def test_the_frozen_kernels_never_move():
  trained = fit('dense', stop_at=DELAY).params
  for name in ('first', 'second'):
    found = result('lora_style').params[name]['kernel']
    np.testing.assert_array_equal(found.w, trained[name]['kernel'])
    assert np.any(np.asarray(found.d.b) != 0)


def test_lora_may_freeze_what_was_initialised():
  settings = config(lora_style=dict(delay=0, scale=0.5))
  found = fit('lora_style', settings=settings)
  assert found.select('conversion')[0]['step'] == 0
  kernel = found.params['second']['kernel']
  np.testing.assert_array_equal(kernel.w, initial()['second']['kernel'])
  # B is zero: it begins with the same function.
  np.testing.assert_allclose(
    losses(found)[0], losses(result('dense'))[0], rtol=1e-6
  )
  x, y = examples()
  hits = np.mean(np.argmax(logits(merged(found.params), x), -1) == y)
  np.testing.assert_allclose(found.select('eval')[-1]['accuracy'], hits)


@pytest.mark.parametrize(
  'name', ['fused_heads', 'rematerialised', 'grouped_convs']
)
def test_the_sum_of_products_is_the_product_with_the_sum(name):
  p = (programs.PROGRAMS | programs.ODD_PROGRAMS)[name]()
  layers = p.low_rank or p.layers
  params = lora.adapt(programs.values(p.params), layers, rank=2, scale=0.7)
  # As after some training: B is not zero any more.
  params = jax.tree.map(lambda x: x + 0.1 * np.cos(x), params)
  fn = lambda params: p.fn(params, *p.args)
  mine = oialr.factored(lora.distributed(fn))

  @oracles.jit
  def values_and_gradients(params):
    of = lambda fn: jax.value_and_grad(
      lambda params: sum(
        jnp.sum(jnp.sin(x.astype(jnp.float32)))
        for x in jax.tree.leaves(fn(params))
      )
    )(params)
    return of(mine), of(lambda params: fn(merged(params)))

  frozen = lambda grads: jax.tree.map(
    lambda label, g: g * (label == 'trained'), lora._labels(params), grads
  )
  (value, grads), (expected, others) = values_and_gradients(params)
  found = [value, *jax.tree.leaves(grads)]
  for x, y in zip(found, [expected, *jax.tree.leaves(frozen(others))]):
    assert np.max(abs(x - y)) <= 2e-5 * max(1, np.max(abs(y)))


def test_no_gradient_of_a_frozen_kernel_is_formed():
  """Of 3 T m n, dense, 2 T m n are left; the factors are small beside."""
  m, tokens = 256, 512
  params = {'a': jnp.ones((m, m)) / m, 'b': jnp.ones((m, m)) / m}
  x = jnp.ones((tokens, m))
  fn = lambda params, x: jnp.tanh(x @ params['a']) @ params['b']
  layers = oialr.find_layers(fn, params, x)
  adapted = lora.adapt(params, layers, rank=4, scale=1.0)
  mine = oialr.factored(lora.distributed(fn))

  def flops(fn, params):
    grad = jax.grad(lambda p, x: jnp.sum(fn(p, x) ** 2))
    return jax.jit(grad).lower(params, x).compile().cost_analysis()['flops']

  # The first layer's input wants no gradient: 5 products, and 3.
  assert flops(fn, params) == pytest.approx(5 * 2 * tokens * m * m, rel=0.02)
  assert flops(mine, adapted) == pytest.approx(3 * 2 * tokens * m**2, rel=0.15)


# What is not right.


@pytest.mark.parametrize(
  'name, changes, message',
  [
    ('svd_prnue', {}, "there is no 'svd_prnue'; did you mean 'svd_prune'"),
    ('svd_prune', dict(rnak=3), "config.svd_prune: there is no 'rnak'"),
    ('svd_prune', dict(rank=1.5), r'config.svd_prune: rank=1.5.*\(0, 1\]'),
    ('svd_init', dict(rank=0), 'config.svd_init: rank=0.*at least 1'),
    ('fixed_rank', dict(rank=0), 'config.fixed_rank: rank=0.*at least 1'),
    ('galore', dict(every=0), 'every=0.*at least 1'),
    ('galore', dict(scale=0.0), 'scale=0.0.*positive'),
    ('lora_style', dict(scale=-1.0), 'scale=-1.0.*positive'),
    ('lora_style', dict(delay=STEPS), r'delay=30.*\[0, 30\)'),
    ('dlrt', dict(tau=1.0), r'tau=1.0.*\[0, 1\)'),
  ],
)
def test_settings_are_checked_before_anything_is_run(name, changes, message):
  settings = config()
  settings.update({name: changes} if changes else {})
  with pytest.raises(ValueError, match=message):
    runs.check(settings, STEPS, [name])


def test_dlrt_takes_batches_as_a_whole():
  with pytest.raises(ValueError, match='accumulate=2.*pass 1'):
    runs.check(config(accumulate=2), STEPS, ['dlrt'])


def test_sections_are_of_methods():
  with pytest.raises(ValueError, match="no 'lora'; did you mean"):
    runs.sections(lora={})


def test_rates_rise_again_after_a_conversion():
  found = fit('svd_prune', settings=config(rewarmup=5), stop_at=DELAY + 1)
  plain = fit('svd_prune', stop_at=DELAY + 1)
  bias = lambda run: run.params['head']['bias']
  assert np.max(abs(bias(found) - bias(plain))) > 1e-4
  np.testing.assert_array_equal(losses(found), losses(plain))


# Memory.


def test_the_peak_is_that_since_the_reset():
  memory.reset()
  before = memory.peak()
  assert before['peak_of'] in ('process', 'device')
  block = np.ones(100 * 2**20, np.uint8)
  del block
  after = memory.peak()['peak_bytes']
  if before['peak_of'] == 'process':
    assert after - before['peak_bytes'] > 50 * 2**20
