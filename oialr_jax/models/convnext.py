"""ConvNeXt (arXiv 2201.03545), with the names of timm."""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from oialr_jax.models import common

Array = jax.Array


class ConvNext(nn.Module):
  """A ConvNeXt: depthwise convolutions and MLPs over channels, in stages.

  The stem cuts patches of 4 x 4 pixels; every later stage starts by halving
  height and width. The head computes in `param_dtype`.

  Attributes:
    num_classes: of the output.
    depths: number of blocks of each stage.
    dims: channels of each stage.
    layer_scale: initial scale of the residual branches, a parameter `gamma` a
      channel.
    dropout: rate in front of the last dense layer.
    drop_path: rate of stochastic depth in the last block, rising linearly
      from 0 in the first.
    dtype: to compute in.
    param_dtype: of the parameters.

  Raises:
    ValueError: when built, of depths and dims for different numbers of stages,
      or a rate outside of [0, 1).
  """

  num_classes: int = 1000
  depths: tuple[int, ...] = (3, 3, 9, 3)
  dims: tuple[int, ...] = (96, 192, 384, 768)
  layer_scale: float = 1e-6
  dropout: float = 0.0
  drop_path: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    if len(self.depths) != len(self.dims):
      raise ValueError(
        f'depths={self.depths} and dims={self.dims} must have as many entries, '
        'one a stage.'
      )
    common.check_rates(dropout=self.dropout, drop_path=self.drop_path)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Logits `[batch, classes]` of images `[batch, height, width, channels]`.

    Training with a dropout or drop_path above 0 draws from the rng 'dropout'.

    Raises:
      ValueError: these are no images, or too small ones for so many stages.
    """
    self._check(x)
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    init = dict(kernel_init=common.normal_init)
    conv = functools.partial(nn.Conv, padding='VALID', **init, **types)
    norm = functools.partial(common.LayerNorm, epsilon=1e-6, **types)
    dense = functools.partial(nn.Dense, **init, **types)
    block = functools.partial(
      Block,
      conv=conv,
      norm=norm,
      dense=dense,
      layer_scale=self.layer_scale,
      param_dtype=self.param_dtype,
    )
    x = conv(self.dims[0], (4, 4), strides=4, name='stem_0')(x)
    x = norm(name='stem_1')(x)
    rates = iter(common.rising(self.drop_path, sum(self.depths)))
    for i, (depth, dim) in enumerate(zip(self.depths, self.dims)):
      drop_path = tuple(next(rates) for _ in range(depth))
      stage = Stage(
        dim, drop_path, i > 0, conv, norm, block, name=f'stages_{i}'
      )
      x = stage(x, train)
    head = functools.partial(dense, self.num_classes, dtype=self.param_dtype)
    return Head(head, norm, self.dropout, name='head')(x, train)

  def _check(self, x: Array):
    common.check_images(x)
    smallest = 4 * 2 ** (len(self.dims) - 1)
    if min(x.shape[1:3]) < smallest:
      raise ValueError(
        f'images of shape {x.shape}: {len(self.dims)} stages take at least '
        f'{smallest} x {smallest} pixels.'
      )


class Stage(nn.Module):
  """Blocks of one size, behind a strided convolution but in the first stage.

  Attributes:
    dim: channels.
    drop_path: rate of stochastic depth for each block.
    downsample: whether to halve height and width first, rounding down.
    conv: makes a convolution.
    norm: makes a norm.
    block: makes a block.
  """

  dim: int
  drop_path: tuple[float, ...]
  downsample: bool
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]
  block: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """`[batch, height, width, dim]` of `[batch, height', width', channels]`."""
    if self.downsample:
      x = self.norm(name='downsample_0')(x)
      x = self.conv(self.dim, (2, 2), strides=2, name='downsample_1')(x)
    for i, rate in enumerate(self.drop_path):
      x = self.block(drop_path=rate, name=f'blocks_{i}')(x, train)
    return x


class Block(nn.Module):
  """A depthwise 7 x 7 convolution, a norm and an MLP as a residual branch.

  Attributes:
    conv: makes a convolution.
    norm: makes a norm.
    dense: makes a dense layer of so many features.
    layer_scale: initial scale of the branch.
    drop_path: rate of stochastic depth.
    param_dtype: of the scale.
  """

  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]
  dense: Callable[..., nn.Module]
  layer_scale: float = 1e-6
  drop_path: float = 0.0
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """`[batch, height, width, dim]` of `[batch, height, width, dim]`."""
    dim = x.shape[-1]
    y = self.conv(
      dim, (7, 7), padding=3, feature_group_count=dim, name='conv_dw'
    )(x)
    y = self.norm(name='norm')(y)
    y = common.MlpBlock(4 * dim, self.dense, name='mlp')(y, train)
    init = nn.initializers.constant(self.layer_scale)
    gamma = self.param('gamma', init, (dim,), self.param_dtype)
    y = y * gamma.astype(y.dtype)
    return x + common.DropPath(self.drop_path)(y, train)


class Head(nn.Module):
  """The mean over all pixels, a norm, dropout and a dense layer.

  Attributes:
    dense: makes the dense layer.
    norm: makes a norm.
    dropout: rate in front of the dense layer.
  """

  dense: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Logits `[batch, classes]` of `[batch, height, width, channels]`."""
    x = self.norm(name='norm')(x.mean((1, 2)))
    x = common.Dropout(self.dropout, deterministic=not train)(x)
    return self.dense(name='fc')(x)
