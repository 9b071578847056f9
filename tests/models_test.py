"""Tests of the small models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import models
from oialr_jax.models import common


@pytest.mark.parametrize(
  'model, shape, numbers',
  [
    (models.Mlp(), (2, 8, 8, 1), 563_722),
    (models.MnistCnn(), (2, 28, 28, 1), 857_738),
    (models.MnistCnn(batch_norm=True), (2, 28, 28, 1), 857_738 + 2 * 352),
  ],
)
def test_parameter_counts(model, shape, numbers):
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones(shape))
  assert oialr.count(shapes['params']).dense == numbers


def test_every_kernel_of_the_cnn_is_found_in_order():
  model, x = models.MnistCnn(), jnp.ones((2, 28, 28, 1))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  layers = oialr.find_layers(
    lambda p, x: model.apply({'params': p}, x), variables['params'], x
  )
  assert [layer.path for layer in layers] == [
    'conv_0/kernel',
    'conv_1/kernel',
    'hidden/kernel',
    'head/kernel',
  ]
  assert [layer.matrix for layer in layers] == [
    (25, 32),
    (800, 64),
    (3136, 256),
    (256, 10),
  ]


@pytest.mark.parametrize('name', ['gelu', 'relu', 'silu', 'tanh'])
def test_activations_are_those_of_their_names(name):
  x = jax.random.normal(jax.random.key(1), (3, 5))
  model = models.Mlp(widths=(4,), num_classes=2, activation=name)
  params = model.init(jax.random.key(0), x)['params']
  dense = lambda p, x: x @ p['kernel'] + p['bias']
  exact = {'gelu': lambda x: jax.nn.gelu(x, approximate=False)}
  activate = (
    exact.get(name) or getattr(jnp, name, None) or getattr(jax.nn, name)
  )
  expected = dense(params['head'], activate(dense(params['dense_0'], x)))
  out = model.apply({'params': params}, x)
  assert jnp.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize('make', [models.Mlp, models.MnistCnn, models.Vit])
def test_unknown_activations_are_met_with_those_there_are(make):
  with pytest.raises(
    ValueError, match="activation='elu': must be one of gelu,"
  ):
    make(activation='elu')


@pytest.mark.parametrize('features', [1, 3, 8])
def test_dropout_keeps_the_mean_and_draws_every_element_alone(features):
  rate = 0.25
  x = jnp.ones((30_000, features))
  drop = common.Dropout(rate, deterministic=False)
  out = np.asarray(drop.apply({}, x, rngs={'dropout': jax.random.key(0)}))
  assert set(np.unique(out)) == {0, np.float32(1 / (1 - rate))}
  kept = out != 0
  # Five deviations of a mean over 30,000 draws.
  near = dict(rtol=0, atol=5 * 0.5 / 30_000**0.5)
  np.testing.assert_allclose(kept.mean(0), 1 - rate, **near)
  # Independent of those beside it, as half-words of a word would not be if
  # their bits were shared.
  together = kept[:, :-1] & kept[:, 1:]
  np.testing.assert_allclose(together.mean(0), (1 - rate) ** 2, **near)


@pytest.mark.parametrize('rate', [-0.5, 1.0, 1.5, 25.0])
def test_rates_are_shares(rate):
  """Those of more than 1 would wrap around in 16 bits."""
  x = jnp.ones((2, 32, 32, 3))
  series = jnp.ones((1, 8, 2)), jnp.ones((1, 8, 5))
  for model, inputs in (
    (models.MnistCnn(dropout=0.0), (x,)),
    (models.create('resnet18_cifar', width=8, depths=(1,)), (x,)),
    (models.Autoformer(c_out=2, label_len=4, d_model=8, d_ff=8), 2 * series),
  ):
    with pytest.raises(ValueError, match=rf'dropout={rate}: must be in \[0, 1'):
      model.clone(dropout=rate).init(jax.random.key(0), *inputs)
  with pytest.raises(ValueError, match=f'drop_path={rate}: must be in'):
    models.create('resnet18_cifar', drop_path=rate).init(jax.random.key(0), x)


def test_a_rate_may_be_close_to_one():
  drop = common.Dropout(1 - 1e-6, deterministic=False)
  out = drop.apply({}, jnp.ones(1 << 20), rngs={'dropout': jax.random.key(0)})
  assert np.isfinite(out).all() and 0 < np.count_nonzero(out) < 100


def test_dropout_draws_nothing_that_it_does_not_need():
  x = jnp.ones((2, 3))
  for drop in common.Dropout(0.5, True), common.Dropout(0.0, False):
    np.testing.assert_array_equal(drop.apply({}, x), x)
  drop = common.Dropout(0.5, deterministic=False)
  text = str(
    jax.make_jaxpr(lambda x, k: drop.apply({}, x, rngs={'dropout': k}))(
      jnp.ones((4, 8), jnp.bfloat16), jax.random.key(0)
    )
  )
  assert 'u32[4,4]' in text and 'u32[4,8]' not in text
