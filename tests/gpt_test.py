"""Tests of the language model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import models


def model(**changes):
  sizes = dict(vocabulary=11, context=6, embed_dim=8, depth=1, num_heads=2)
  return models.Gpt(**(sizes | changes))


def test_parameters_are_those_counted_by_hand():
  shapes = jax.eval_shape(
    model().init, jax.random.key(0), jnp.zeros((1, 6), jnp.int32)
  )
  norm = 2 * 8
  block = 8 * 24 + 24 + 8 * 8 + 8 + 8 * 32 + 32 + 32 * 8 + 8 + 2 * norm
  expected = 11 * 8 + 6 * 8 + block + norm + 8 * 11
  assert oialr.count(shapes['params']).dense == expected


def test_no_token_sees_those_after_it():
  tokens = jnp.array([[1, 2, 3, 4, 5]])
  variables = jax.jit(model().init)(jax.random.key(0), tokens)
  apply = jax.jit(model().apply)
  before = apply(variables, tokens)
  after = apply(variables, tokens.at[0, 3].set(9))
  np.testing.assert_allclose(after[0, :3], before[0, :3], atol=1e-6)
  assert np.all(np.abs(after[0, 3:] - before[0, 3:]).max(-1) > 1e-4)
  # A shorter text is the beginning of a longer one.
  short = apply(variables, tokens[:, :2])
  np.testing.assert_allclose(short, before[:, :2], atol=1e-6)


def test_all_kernels_but_the_embeddings_can_be_low_rank():
  tokens = jnp.zeros((2, 6), jnp.int32)
  params = jax.eval_shape(model().init, jax.random.key(0), tokens)['params']
  forward = lambda p, x: model().apply({'params': p}, x)
  found = oialr.explain(forward, params, tokens)
  names = ('attn/qkv', 'attn/proj', 'mlp/fc1', 'mlp/fc2')
  assert [layer.path for layer in found.layers] == [
    *(f'blocks_{i}/{name}/kernel' for i in (0,) for name in names),
    'head/kernel',
  ]
  assert 'gather' in found.reasons['wte/embedding']


def test_what_cannot_be_is_said():
  with pytest.raises(ValueError, match='num_heads=3 does not divide'):
    model(num_heads=3)
  with pytest.raises(ValueError, match='7 tokens is longer than context=6'):
    jax.eval_shape(
      model().init, jax.random.key(0), jnp.zeros((1, 7), jnp.int32)
    )
