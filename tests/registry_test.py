"""Tests of the models by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import models
from tests import oracles

# Of timm and of the paper's program; the small ones by hand.
COUNTS = {
  'mlp': 563_722,
  'mnist_cnn': 857_738,
  'mini_vit': 42_684_682,
  'vit_small_patch16_224': 22_050_664,
  'vit_base_patch16_224': 86_567_656,
  'vit_large_patch16_224': 304_326_632,
  'mixer_b16_224': 59_880_472,
  'convnext_tiny': 28_589_128,
  'resnet18': 11_689_512,
  'resnet18_cifar': 11_173_962,
  'resnet50': 25_557_032,
  'resnetrs50': 35_691_912,
  'resnetrs101': 63_618_696,
  'autoformer': 10_536_967,
}


@pytest.mark.parametrize('name', models.NAMES)
def test_parameter_counts_are_the_published_ones(name):
  model = models.create(name)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *models.inputs(name))
  assert oialr.count(shapes['params']).dense == COUNTS[name]


def test_overrides_replace_attributes():
  model = models.create('mini_vit', num_classes=7, dtype=jnp.bfloat16)
  assert isinstance(model, models.Vit)
  assert (model.num_classes, model.dtype) == (7, jnp.bfloat16)
  assert (model.patch_size, model.depth, model.qkv_bias) == (8, 6, False)


@pytest.mark.parametrize('name', ['mini_vit', 'mixer_b16_224', 'convnext_tiny'])
def test_parameters_and_logits_are_of_the_type_that_is_asked_for(name):
  model = models.create(name, param_dtype=jnp.bfloat16)
  out, variables = jax.eval_shape(
    model.init_with_output, jax.random.key(0), *models.inputs(name)
  )
  assert {x.dtype for x in jax.tree.leaves(variables)} == {out.dtype}
  assert out.dtype == jnp.bfloat16


def test_inputs_have_the_batch_in_front():
  (image,) = models.inputs('mini_vit', 4)
  assert (image.shape, image.dtype) == ((4, 32, 32, 3), jnp.float32)
  (image,) = models.inputs('vit_base_patch16_224')
  assert image.shape == (1, 224, 224, 3)


@pytest.mark.parametrize(
  'call', [models.create, models.inputs, models.convert.torch_names]
)
def test_unknown_names_are_met_with_the_nearest(call):
  message = r"no model 'vit_base_patch16'; did you mean 'vit_base_patch16_224'"
  with pytest.raises(ValueError, match=message) as e:
    call('vit_base_patch16')
  assert all(name in str(e.value) for name in models.NAMES)


def test_unknown_attributes_are_met_with_those_there_are():
  message = r"'mini_vit' has no attribute 'head_dim', only .*depth, .*num_heads"
  with pytest.raises(TypeError, match=message):
    models.create('mini_vit', head_dim=3)
  # What Flax adds to a module is none of the model's.
  with pytest.raises(TypeError, match="no attribute 'parent'"):
    models.create('mini_vit', parent=None)


_SMALL = {
  'mini_vit': dict(embed_dim=24, depth=1, num_heads=2),
  'mixer_b16_224': dict(num_classes=10, patch_size=8, embed_dim=24, depth=1),
  'convnext_tiny': dict(num_classes=10, depths=(1, 1), dims=(16, 24)),
}


@pytest.mark.parametrize('name', _SMALL)
def test_outputs_in_factors_are_those_of_the_dense_model(name):
  model = models.create(name, **_SMALL[name])
  x = oracles.images(2, 16, 24, 3)
  dense = oracles.variables(model, x)['params']
  fn = lambda params, x: model.apply({'params': params}, x)
  layers = oialr.find_layers(fn, dense, x)

  @oracles.jit
  def outputs(dense, x):
    params = oialr.to_lowrank(dense, layers, rank=4)
    truncated = fn(oialr.to_dense(params), x)
    return oialr.factored(fn)(params, x), truncated, fn(dense, x)

  out, expected, full = outputs(dense, x)
  oracles.check_close(out, expected)
  assert not np.allclose(expected, full, atol=1e-3)
