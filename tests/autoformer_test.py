"""Tests of Autoformer: against the original, and its parts against NumPy.

tests/data/autoformer_small.npz is of the authors' PyTorch program: weights,
inputs, forecasts in both modes, and the gradients of the mean square of the
forecast in training. The model is `SMALL`, with 2 heads, in float32.
"""

import pathlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import models
from oialr_jax.models import autoformer
from oialr_jax.models import common
from tests import oracles

GOLDEN = pathlib.Path(__file__).parent / 'data' / 'autoformer_small.npz'
SMALL = dict(label_len=12, d_model=16, d_ff=32, moving_avg=5, dropout=0.0)
INPUTS = ('x_enc', 'x_mark_enc', 'x_dec', 'x_mark_dec')


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN) as arrays:
    return dict(arrays)


def inputs(golden):
  return [golden[f'in/{name}'] for name in INPUTS]


def state_dict(golden, what):
  prefix = f'{what}/'
  return {
    name.removeprefix(prefix): x
    for name, x in golden.items()
    if name.startswith(prefix)
  }


def from_torch(golden, what):
  return models.convert.from_torch(
    'autoformer', state_dict(golden, what), **SMALL
  )


@oracles.jit
def forecast(model, variables, inputs, train=False, seed=0):
  rngs = {'dropout': jax.random.key(seed)}
  return model.apply(variables, *inputs, train=train, rngs=rngs)


def series(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_dense(features, name):
  return flax.linen.Dense(features, name=name)


def make_inputs(batch=2, past=20, label=8, horizon=10, *, variables=3):
  """Random inputs of a model with label_len=label."""
  steps = (past, past, label + horizon, label + horizon)
  sizes = (variables, 4, variables, 4)
  return [
    series(batch, *shape, seed=i) for i, shape in enumerate(zip(steps, sizes))
  ]


TINY = dict(c_out=3, label_len=8, d_model=8, d_ff=12, e_layers=1, moving_avg=5)


# The whole model.


@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_forecasts_are_those_of_the_original(golden, mode):
  model = models.create('autoformer', **SMALL)
  variables = from_torch(golden, 'param')
  out = forecast(model, variables, inputs(golden), train=mode == 'train')
  np.testing.assert_allclose(out, golden[f'out/{mode}'], atol=1e-5)
  other = golden['out/eval' if mode == 'train' else 'out/train']
  assert abs(out - other).max() > 1e-2  # there are two forms


def test_loss_and_gradients_are_those_of_the_original(golden):
  model = models.create('autoformer', **SMALL)

  @oracles.jit
  def loss_and_gradients(variables, inputs):
    loss = lambda v: jnp.mean(model.apply(v, *inputs, train=True) ** 2)
    return jax.value_and_grad(loss)(variables)

  loss, found = loss_and_gradients(from_torch(golden, 'param'), inputs(golden))
  np.testing.assert_allclose(loss, golden['out/loss'], rtol=1e-5)
  expected = flax.traverse_util.flatten_dict(
    from_torch(golden, 'grad'), sep='/'
  )
  found = flax.traverse_util.flatten_dict(found, sep='/')
  assert len(found) == 49 and found.keys() == expected.keys()
  for path, gradient in expected.items():
    np.testing.assert_allclose(
      found[path], gradient, atol=1e-6, rtol=1e-4, err_msg=path
    )


def test_the_position_embedding_of_the_original_is_left_out(golden):
  state = state_dict(golden, 'param')
  state['enc_embedding.position_embedding.pe'] = np.zeros((1, 5000, 16))
  variables = models.convert.from_torch('autoformer', state, **SMALL)
  jax.tree.map(
    np.testing.assert_array_equal, variables, from_torch(golden, 'param')
  )


@pytest.mark.parametrize('horizon', [96, 192, 336, 720])
def test_one_set_of_weights_is_for_every_horizon(horizon):
  model = models.create('autoformer')
  x_enc, x_mark_enc, *_ = models.inputs('autoformer', 2)
  shape = lambda features: jax.ShapeDtypeStruct(
    (2, 48 + horizon, features), jnp.float32
  )
  out, variables = jax.eval_shape(
    model.init_with_output,
    jax.random.key(0),
    x_enc,
    x_mark_enc,
    shape(7),
    shape(5),
  )
  assert (out.shape, out.dtype) == ((2, horizon, 7), jnp.float32)
  assert oialr.count(variables['params']).dense == 10_536_967


def test_the_forecast_starts_from_the_mean():
  """Which is all of it if the layers add nothing."""
  model = models.Autoformer(**TINY, d_layers=0)
  args = make_inputs()
  variables = oracles.variables(model, *args)
  projection = variables['params']['decoder']['projection']
  projection = {k: np.zeros_like(x) for k, x in projection.items()}
  variables['params']['decoder']['projection'] = projection
  out = forecast(model, variables, args)
  mean = args[0].mean(1, keepdims=True)
  np.testing.assert_allclose(out, np.repeat(mean, 10, axis=1), atol=1e-6)


def test_values_of_the_decoders_input_do_not_count():
  """The horizon cannot leak by them."""
  model = models.Autoformer(**TINY)
  x_enc, x_mark_enc, x_dec, x_mark_dec = make_inputs()
  variables = oracles.variables(model, x_enc, x_mark_enc, x_dec, x_mark_dec)
  out = [
    forecast(model, variables, (x_enc, x_mark_enc, x, x_mark_dec))
    for x in (x_dec, x_dec * np.nan)
  ]
  np.testing.assert_array_equal(*out)


def test_only_training_looks_at_the_other_series_of_a_batch():
  module, x = autoformer.AutoCorrelation(make_dense), series(4, 12, 3)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x, x)
  variables = oracles.values(shapes)
  for train in (False, True):
    together = module.apply(variables, x, x, train)[:1]
    alone = module.apply(variables, x[:1], x[:1], train)
    assert np.allclose(together, alone, atol=1e-5) == (not train)


def test_training_drops_out_by_its_key():
  args = make_inputs()
  model = models.Autoformer(**TINY, dropout=0.5)
  variables = oracles.variables(model, *args)

  @oracles.jit
  def dropped(seed):
    _, state = model.apply(
      variables,
      *args,
      train=True,
      rngs={'dropout': jax.random.key(seed)},
      capture_intermediates=lambda m, _: isinstance(m, common.Dropout),
      mutable=['intermediates'],
    )
    return flax.traverse_util.flatten_dict(state['intermediates'], sep='/')

  found, again, other = (dropped(seed) for seed in (0, 0, 1))
  assert {path: len(outs) for path, outs in found.items()} == {
    'enc_embedding/Dropout_0/__call__': 1,
    'encoder/attn_layers_0/Dropout_0/__call__': 3,
    'dec_embedding/Dropout_0/__call__': 1,
    'decoder/layers_0/Dropout_0/__call__': 4,
  }
  for path, outs in found.items():
    for x, same, different in zip(outs, again[path], other[path]):
      np.testing.assert_array_equal(x, same)
      assert ((x == 0) != (different == 0)).any()
      assert 0.4 < (x == 0).mean() < 0.6


def test_bfloat16_computes_near_float32():
  args = make_inputs()
  model = models.Autoformer(**TINY, dropout=0.0)
  variables = oracles.variables(model, *args)
  expected = forecast(model, variables, args, train=True)
  half = model.clone(dtype=jnp.bfloat16)
  args = [jnp.asarray(x, jnp.bfloat16) for x in args]
  out = forecast(half, variables, args, train=True)
  assert out.dtype == jnp.float32
  error = abs(out - expected).max() / abs(expected).max()
  assert 1e-5 < error < 0.05


def test_parameters_are_of_the_type_that_is_asked_for():
  model = models.Autoformer(**TINY, param_dtype=jnp.bfloat16)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *make_inputs())
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype('bfloat16')}


def test_initial_parameters_are_distributed_as_in_pytorch():
  model = models.Autoformer(**TINY | dict(d_model=64, d_ff=96, e_layers=0))
  init = oracles.jit(lambda *args: model.init(jax.random.key(0), *args))
  params = init(*make_inputs())['params']
  for path, x in flax.traverse_util.flatten_dict(params, sep='/').items():
    if 'layernorm' in path:
      np.testing.assert_array_equal(x, float(path.endswith('scale')))
      continue
    bias = path.endswith('bias')
    fan_in = 64 if bias else np.prod(x.shape[:-1])
    if 'tokenConv' in path:
      np.testing.assert_allclose(x.std(), (2 / fan_in) ** 0.5, rtol=0.1)
      assert abs(x).max() > 2.5 * x.std()
      continue
    bound = fan_in**-0.5
    assert abs(x).max() <= bound, path
    if x.size > 50:
      np.testing.assert_allclose(x.std(), bound / 3**0.5, rtol=0.15)


def test_every_kernel_is_found_in_order():
  model = models.create('autoformer')
  args = models.inputs('autoformer')
  shapes = jax.eval_shape(model.init, jax.random.key(0), *args)['params']
  layers = oialr.find_layers(
    lambda p, *args: model.apply({'params': p}, *args), shapes, *args
  )
  kernels = {
    path: x.shape
    for path, x in flax.traverse_util.flatten_dict(shapes, sep='/').items()
    if path.endswith('kernel')
  }
  matrices = {layer.path: layer.matrix for layer in layers}
  assert matrices == {
    path: (np.prod(shape[:-1]), shape[-1]) for path, shape in kernels.items()
  }
  places = [layer.path.split('/')[0] for layer in layers]
  names = ('enc_embedding', 'encoder', 'dec_embedding', 'decoder')
  assert [*dict.fromkeys(places)] == [*names]


def test_attention_in_factors_is_that_of_the_dense_kernels():
  """There are rules of ours for derivatives: they hold in factors, too."""
  module, x = autoformer.AutoCorrelation(make_dense), series(2, 12, 6)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x, x)
  dense = oracles.values(shapes)['params']

  def loss(params, x):
    out = module.apply({'params': params}, x, x, train=True)
    return jnp.mean(out**2)

  layers = oialr.find_layers(loss, dense, x)
  params = oialr.to_lowrank(dense, layers, rank=3)
  assert len(oialr.ranks(params)) == 4

  def gradients(fn):
    by_sigma = lambda t, x: fn(oialr.with_trainable(params, t), x)
    both = oracles.jit(jax.value_and_grad(by_sigma, (0, 1)))
    return both(oialr.trainable(params), x)

  # Biases of queries and keys have no gradient: what there is of it is the
  # rounding of terms whose sums are up to 1.6 elsewhere.
  expected = gradients(lambda params, x: loss(oialr.to_dense(params), x))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=4e-6),
    gradients(oialr.factored(loss)),
    expected,
  )


# Its parts.


@pytest.mark.parametrize('window', [1, 3, 25])
@pytest.mark.parametrize('length', [1, 12, 30])
def test_the_trend_is_a_moving_average_with_repeated_ends(window, length):
  x = series(2, length, 3)
  half = window // 2
  padded = np.pad(
    x.astype(np.float64), ((0, 0), (half, half), (0, 0)), mode='edge'
  )
  trend = np.lib.stride_tricks.sliding_window_view(padded, window, 1).mean(-1)
  for fn in (
    autoformer.decompose,
    jax.jit(autoformer.decompose, static_argnums=1),
  ):
    season, found = fn(x, window)
    np.testing.assert_allclose(found, trend, atol=1e-6)
    np.testing.assert_allclose(season, x - trend, atol=1e-6)


def test_the_trend_is_summed_in_float32():
  x = jnp.full((1, 50, 1), 100.0, jnp.bfloat16) + series(1, 50, 1)
  x = x.astype(jnp.bfloat16)
  season, trend = autoformer.decompose(x, 25)
  assert season.dtype == trend.dtype == jnp.bfloat16
  expected, _ = autoformer.decompose(x.astype(jnp.float32), 25)
  np.testing.assert_allclose(season.astype(jnp.float32), expected, rtol=4e-3)


@pytest.mark.parametrize('length', [7, 12])
def test_correlations_are_circular_and_averaged_over_features(length):
  query, key = series(2, length, 3), series(2, length, 3, seed=1)
  expected = np.zeros((2, length))
  for lag in range(length):
    for t in range(length):
      product = query[:, (t + lag) % length].astype(np.float64) * key[:, t]
      expected[:, lag] += product.mean(-1)
  found = autoformer.correlate(query, key)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  half = autoformer.correlate(*(jnp.bfloat16(x) for x in (query, key)))
  assert half.dtype == jnp.float32


WEIGHTS = np.array([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]], np.float32)
DELAYS = np.array([[0, 5, 11], [3, 3, 7]])


def rolled(x, sign=-1):
  """`[k, batch, time, features]`, by NumPy."""
  return np.stack(
    [
      [np.roll(x[b], sign * DELAYS[b, i], axis=0) for b in range(2)]
      for i in range(3)
    ]
  ).astype(np.float64)


def test_aggregated_are_rolled_series_by_their_weights():
  values = series(2, 12, 4)
  expected = np.einsum('kbtf,bk->btf', rolled(values), WEIGHTS)
  for fn in (autoformer.aggregate, jax.jit(autoformer.aggregate)):
    np.testing.assert_allclose(fn(values, WEIGHTS, DELAYS), expected, atol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_gradients_of_the_aggregation_are_written_out(dtype):
  values, grad = series(2, 12, 4), series(2, 12, 4, seed=1)
  out, vjp = jax.vjp(
    lambda v, w: autoformer.aggregate(v, w, DELAYS),
    jnp.asarray(values, dtype),
    WEIGHTS,
  )
  assert out.dtype == dtype
  by_value, by_weight = vjp(jnp.asarray(grad, dtype))
  assert (by_value.dtype, by_weight.dtype) == (dtype, jnp.float32)
  tolerance = 1e-5 if dtype == jnp.float32 else 0.1
  np.testing.assert_allclose(
    by_value.astype(jnp.float32),
    np.einsum('kbtf,bk->btf', rolled(grad, 1), WEIGHTS),
    atol=tolerance,
  )
  np.testing.assert_allclose(
    by_weight,
    np.einsum('kbtf,btf->bk', rolled(values), grad),
    atol=tolerance,
  )


def test_attention_scatters_no_series_and_makes_no_square():
  """What JAX would do by itself takes twice as long on a CPU."""
  length, features = 256, 8
  module, x = autoformer.AutoCorrelation(make_dense), series(2, 256, 8)
  variables = jax.eval_shape(module.init, jax.random.key(0), x, x)
  loss = lambda v, x: jnp.sum(module.apply(v, x, x, train=True) ** 2)
  program = jax.jit(jax.grad(loss, (0, 1))).lower(variables, x)
  text = program.as_text('hlo')
  assert f'f32[2,{length},{features}]' in text
  assert f'{length},{length}' not in text
  scattered = [line for line in text.splitlines() if ' scatter(' in line]
  assert not [line for line in scattered if f'{length},{features}' in line]


def test_no_two_transforms_run_at_once():
  """They can wait for each other for ever, on the CPU of jax 0.11.2."""
  x = jax.ShapeDtypeStruct((2, 16, 4), jnp.float32)
  loss = lambda q, k: jnp.sum(autoformer.correlate(q, k) ** 2)
  program = jax.jit(jax.grad(loss, (0, 1))).lower(x, x).compile()
  # Of the correlation, and of its gradient, there and back.
  assert program.as_text().count(' fft(') == 4


@pytest.mark.parametrize('more', [5, -5])
def test_memory_is_cut_or_padded_to_the_length(more):
  """After its projection: the bias is not what it is padded with."""
  length, features = 12, 4
  module = autoformer.AutoCorrelation(make_dense)
  x, memory = series(2, length, features), series(2, length + more, features)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x, memory)
  variables = oracles.values(shapes)
  p = oracles.float64(variables['params'])

  def of_length(x):
    x = x[:, :length]
    return np.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))

  query = oracles.dense(p['query_projection'], x)
  key = of_length(oracles.dense(p['key_projection'], memory))
  value = of_length(oracles.dense(p['value_projection'], memory))
  expected = np.empty_like(query)
  for b in range(2):
    correlation = [
      (np.roll(query[b], -lag, 0) * key[b]).mean(1).sum()
      for lag in range(length)
    ]
    best = np.argsort(correlation)[::-1][: int(np.log(length))]
    weights = np.exp(np.array(correlation)[best])
    expected[b] = sum(
      w * np.roll(value[b], -lag, 0)
      for w, lag in zip(weights / weights.sum(), best)
    )
  expected = oracles.dense(p['out_projection'], expected)
  out = module.apply(variables, x, memory)
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_the_seasonal_norm_has_no_mean_over_time():
  module, x = autoformer.SeasonalNorm(), 3 + 2 * series(2, 12, 4)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)
  variables = oracles.values(shapes)
  out = module.apply(variables, x)
  p = oracles.float64(variables['params']['layernorm'])
  expected = oracles.layer_norm(p, x.astype(np.float64))
  expected -= expected.mean(1, keepdims=True)
  np.testing.assert_allclose(out, expected, atol=1e-4)


def test_an_embedding_is_a_circular_convolution_and_a_linear_map():
  module, x, mark = autoformer.Embedding(4), series(2, 6, 3), series(2, 6, 5)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x, mark)
  variables = oracles.values(shapes)
  p = oracles.float64(variables['params'])
  kernel = p['value_embedding']['tokenConv']['kernel']
  expected = mark @ p['temporal_embedding']['embed']['kernel']
  for i in range(3):
    expected += np.roll(x, 1 - i, axis=1) @ kernel[i]
  np.testing.assert_allclose(
    module.apply(variables, x, mark), expected, atol=1e-5
  )


# What is refused.


@pytest.mark.parametrize(
  'attributes, change, message',
  [
    (dict(moving_avg=4), {}, 'moving_avg=4: must be odd'),
    (dict(moving_avg=-1), {}, 'moving_avg=-1: must be odd'),
    (
      dict(c_out=2),
      {},
      r'x_enc has the shape \(2, 20, 3\), x_mark_enc .*c_out=2\]',
    ),
    ({}, {0: (20, 3)}, r'x_enc has the shape \(20, 3\)'),
    (
      {},
      {1: (2, 19, 4)},
      r'x_mark_enc \(2, 19, 4\): they must be \[batch, time',
    ),
    ({}, {3: (2, 18)}, r'x_mark_dec \(2, 18\): they must be'),
    ({}, {2: (2, 18, 2)}, r'x_dec has the shape \(2, 18, 2\)'),
    (
      dict(label_len=21),
      {},
      r'label_len=21: must be in \[0, 20\], the length of x_enc',
    ),
    (dict(label_len=18), {}, 'label_len=18: .* less than 18, that of x_dec'),
    (dict(label_len=-1), {}, 'label_len=-1: must be in'),
    (
      dict(factor=0.1),
      {},
      r'factor=0.1: gives int\(factor log 20\) = 0 delays .* in \[1, 20\]',
    ),
    (dict(factor=9), {}, r'factor=9: gives .* = 26 delays .* of length 20'),
  ],
)
def test_what_does_not_fit_is_refused(attributes, change, message):
  model = models.Autoformer(**TINY | attributes)
  args = make_inputs()
  for i, shape in change.items():
    args[i] = np.zeros(shape, np.float32)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), *args)
