"""Models by name."""

from collections.abc import Callable
import dataclasses
import difflib
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from oialr_jax.models import autoformer
from oialr_jax.models import convnext
from oialr_jax.models import mixer
from oialr_jax.models import resnet
from oialr_jax.models import small
from oialr_jax.models import vit

_IMAGE = (224, 224, 3)


@dataclasses.dataclass(frozen=True)
class _Entry:
  """A model's class with its attributes, and the shapes of its inputs.

  The shapes are those of one example.
  """

  make: functools.partial[nn.Module]
  inputs: tuple[tuple[int, ...], ...]


def _entry(
  module: Callable[..., nn.Module], *inputs: tuple[int, ...], **attributes: Any
) -> _Entry:
  return _Entry(functools.partial(module, **attributes), inputs)


# What ResNet-RS changes, with the dropout of its shallower networks.
_RS = dict(stem='deep', avg_down=True, se_ratio=0.25, dropout=0.25)

_MODELS = {
  'mlp': _entry(small.Mlp, (8, 8, 1)),
  'mnist_cnn': _entry(small.MnistCnn, (28, 28, 1)),
  # The ViT of arXiv 2401.08505 for CIFAR-10.
  'mini_vit': _entry(
    vit.Vit,
    (32, 32, 3),
    num_classes=10,
    patch_size=8,
    depth=6,
    num_heads=6,
    qkv_bias=False,
  ),
  'vit_small_patch16_224': _entry(vit.Vit, _IMAGE, embed_dim=384, num_heads=6),
  'vit_base_patch16_224': _entry(vit.Vit, _IMAGE),
  'vit_large_patch16_224': _entry(
    vit.Vit, _IMAGE, embed_dim=1024, depth=24, num_heads=16
  ),
  'mixer_b16_224': _entry(mixer.Mixer, _IMAGE),
  'convnext_tiny': _entry(convnext.ConvNext, _IMAGE),
  'resnet18': _entry(
    resnet.ResNet, _IMAGE, depths=(2, 2, 2, 2), bottleneck=False
  ),
  # For CIFAR-10, as is usual: nothing is halved before the second stage.
  'resnet18_cifar': _entry(
    resnet.ResNet,
    (32, 32, 3),
    num_classes=10,
    depths=(2, 2, 2, 2),
    bottleneck=False,
    stem='conv3',
  ),
  'resnet50': _entry(resnet.ResNet, _IMAGE),
  'resnetrs50': _entry(resnet.ResNet, (160, 160, 3), **_RS),
  'resnetrs101': _entry(
    resnet.ResNet, (192, 192, 3), depths=(3, 4, 23, 3), **_RS
  ),
  # For ETTm2: 96 steps of the past, the last 48 of them again with 96 to come.
  'autoformer': _entry(
    autoformer.Autoformer, (96, 7), (96, 5), (144, 7), (144, 5)
  ),
}

NAMES = tuple(_MODELS)


def create(name: str, **overrides: Any) -> nn.Module:
  """A model by its name; where timm has it, by timm's.

  Args:
    name: one of `NAMES`.
    **overrides: attributes of the model that are not to be as published:
      num_classes=10, drop_path=0.1, dtype=jnp.bfloat16, ...

  Returns:
    The module, to be called as `model.apply(variables, *inputs, train=...)`.

  Raises:
    ValueError: there is no such model.
    TypeError: the model has no such attribute.
  """
  make = _find(name).make
  fields = {f.name for f in dataclasses.fields(make.func)}
  fields -= {'parent', 'name'}
  for key in overrides:
    if key not in fields:
      raise TypeError(
        f'{name!r} has no attribute {key!r}, only {", ".join(sorted(fields))}.'
      )
  return make(**overrides)


def inputs(name: str, batch_size: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
  """What a model takes, with the shapes that it was published for.

  `jax.eval_shape(create(name).init, jax.random.key(0), *inputs(name))` gives
  the shapes of its variables.

  Args:
    name: one of `NAMES`.
    batch_size: the number of examples, the first axis.

  Returns:
    Shapes and types of the positional arguments.

  Raises:
    ValueError: there is no such model.
  """
  return tuple(
    jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)
    for shape in _find(name).inputs
  )


def _find(name: str) -> _Entry:
  if name not in _MODELS:
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)[0]
    raise ValueError(
      f'there is no model {name!r}; did you mean {near!r}? There are '
      f'{", ".join(NAMES)}.'
    )
  return _MODELS[name]
