"""MLP-Mixer (arXiv 2105.01601), with the names of timm."""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from oialr_jax.models import common

Array = jax.Array


class Mixer(nn.Module):
  """An MLP-Mixer; its MLPs over tokens are of the size of its input.

  The head starts at zero and computes in `param_dtype`.

  Attributes:
    num_classes: of the output.
    patch_size: height and width of a patch, in pixels.
    embed_dim: features of a token.
    depth: number of blocks.
    mlp_ratio: widths of the hidden layers of the MLPs over tokens and over
      features, in units of embed_dim.
    dropout: rate after every dense layer of the MLPs.
    drop_path: rate of stochastic depth, the same in all blocks (as in timm).
    dtype: to compute in.
    param_dtype: of the parameters.

  Raises:
    ValueError: when built, of a rate outside of [0, 1).
  """

  num_classes: int = 1000
  patch_size: int = 16
  embed_dim: int = 768
  depth: int = 12
  mlp_ratio: tuple[float, float] = (0.5, 4.0)
  dropout: float = 0.0
  drop_path: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    common.check_rates(dropout=self.dropout, drop_path=self.drop_path)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Logits `[batch, classes]` of images `[batch, height, width, channels]`.

    Training with a dropout or drop_path above 0 draws from the rng 'dropout'.

    Raises:
      ValueError: these are no images, or their sides no multiples of the patch
        size.
    """
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    norm = functools.partial(common.LayerNorm, epsilon=1e-6, **types)
    dense = functools.partial(
      nn.Dense,
      kernel_init=nn.initializers.xavier_uniform(),
      bias_init=nn.initializers.normal(1e-6),
      **types,
    )
    x = common.PatchEmbed(
      self.patch_size,
      self.embed_dim,
      nn.initializers.lecun_normal(),
      **types,
      name='stem',
    )(x)
    widths = tuple(int(ratio * self.embed_dim) for ratio in self.mlp_ratio)
    for i in range(self.depth):
      block = Block(
        widths, dense, norm, self.dropout, self.drop_path, name=f'blocks_{i}'
      )
      x = block(x, train)
    x = norm(name='norm')(x).mean(1)
    return nn.Dense(
      self.num_classes,
      dtype=self.param_dtype,
      param_dtype=self.param_dtype,
      kernel_init=nn.initializers.zeros,
      name='head',
    )(x)


class Block(nn.Module):
  """An MLP over tokens and one over features, each behind a norm.

  Attributes:
    widths: of the hidden layers of the two.
    dense: makes a dense layer of so many features.
    norm: makes a norm.
    dropout: rate after dense layers.
    drop_path: rate of stochastic depth.
  """

  widths: tuple[int, int]
  dense: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]
  dropout: float = 0.0
  drop_path: float = 0.0

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """`[batch, tokens, features]` of `[batch, tokens, features]`."""
    mlp_tokens, mlp_channels = (
      common.MlpBlock(width, self.dense, self.dropout, name=name)
      for width, name in zip(self.widths, ('mlp_tokens', 'mlp_channels'))
    )
    drop_path = common.DropPath(self.drop_path)
    y = self.norm(name='norm1')(x).swapaxes(1, 2)
    x = x + drop_path(mlp_tokens(y, train).swapaxes(1, 2), train)
    y = self.norm(name='norm2')(x)
    return x + drop_path(mlp_channels(y, train), train)
