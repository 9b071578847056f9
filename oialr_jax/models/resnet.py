"""ResNet (arXiv 1512.03385) and ResNet-RS (2103.07579), with the names of timm.

Padding is symmetric, as in PyTorch: with 'SAME', a strided convolution of an
even image would see it shifted by a pixel.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from oialr_jax.models import common

Array = jax.Array

STEMS = ('conv7', 'deep', 'conv3')
# What timm draws from, but for the biases: they start at zero here.
_CONV_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
_HEAD_INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class ResNet(nn.Module):
  """A residual network of convolutions, in stages.

  Every stage but the first halves height and width, rounding up, and doubles
  the channels. The head computes in `param_dtype`.

  Attributes:
    num_classes: of the output.
    depths: number of blocks of each stage.
    bottleneck: whether blocks are a 1 x 1, a 3 x 3 and a 1 x 1 convolution, the
      last one to four times the channels, or two 3 x 3 convolutions.
    width: channels of the first stage, not counting that factor of four.
    stem: 'conv7', a 7 x 7 convolution of stride 2 and max pooling; 'deep',
      three 3 x 3 convolutions, the first of stride 2, and a strided one in
      place of the pooling; 'conv3', one 3 x 3 convolution for small images.
    avg_down: whether a shortcut halves height and width by average pooling
      rather than by a stride, which skips three of four pixels.
    se_ratio: inner width of the squeeze-excitation at the end of every branch,
      in units of its channels; 0 for none.
    dropout: rate in front of the last dense layer.
    drop_path: rate of stochastic depth in the last block, rising linearly
      from 0 in the first.
    dtype: to compute in; the statistics of batch norm are float32.
    param_dtype: of the parameters.
  """

  num_classes: int = 1000
  depths: tuple[int, ...] = (3, 4, 6, 3)
  bottleneck: bool = True
  width: int = 64
  stem: str = 'conv7'
  avg_down: bool = False
  se_ratio: float = 0.0
  dropout: float = 0.0
  drop_path: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Logits `[batch, num_classes]` of images `[batch, height, width, channels]`.

    Training normalises by the batch, with 'batch_stats' mutable, and with a
    dropout or drop_path above 0 draws from the rng 'dropout'.

    Raises:
      ValueError: a stage is empty, the stem is unknown, the squeeze-excitation
        has a negative width, a rate is not in [0, 1), or these are no images.
    """
    self._check(x)
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    conv = functools.partial(_conv, **types)
    # Flax takes the biased variance of the batch into the running one, PyTorch
    # n / (n - 1) of it, n the batch times height times width: 1.0002 in the
    # last stage for 128 images of 224 x 224. That is left as it is.
    norm = functools.partial(
      nn.BatchNorm, not train, momentum=0.9, epsilon=1e-5, **types
    )
    block = functools.partial(
      Block,
      bottleneck=self.bottleneck,
      avg_down=self.avg_down,
      se_ratio=self.se_ratio,
      conv=conv,
      norm=norm,
    )
    x = self._stem(x, conv, norm)
    rates = iter(common.rising(self.drop_path, sum(self.depths)))
    for i, depth in enumerate(self.depths):
      for j in range(depth):
        stride = 2 if i > 0 and j == 0 else 1
        name = f'layer{i + 1}_{j}'
        features = self.width * 2**i
        x = block(features, stride, drop_path=next(rates), name=name)(x, train)
    x = common.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
    return nn.Dense(
      self.num_classes,
      dtype=self.param_dtype,
      param_dtype=self.param_dtype,
      kernel_init=_HEAD_INIT,
      name='fc',
    )(x)

  def _check(self, x: Array):
    if min(self.depths, default=0) < 1:
      raise ValueError(f'depths={self.depths}: every stage needs a block.')
    if self.stem not in STEMS:
      raise ValueError(f'stem={self.stem!r}: must be one of {STEMS}.')
    if self.se_ratio < 0:
      raise ValueError(f'se_ratio={self.se_ratio}: must not be negative.')
    common.check_rates(dropout=self.dropout, drop_path=self.drop_path)
    common.check_images(x)

  def _stem(self, x: Array, conv: Callable, norm: Callable) -> Array:
    if self.stem == 'conv7':
      x = conv(self.width, 7, 2, name='conv1')(x)
      x = nn.relu(norm(name='bn1')(x))
      return nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
    if self.stem == 'conv3':
      x = conv(self.width, 3, name='conv1')(x)
      return nn.relu(norm(name='bn1')(x))
    x = conv(self.width // 2, 3, 2, name='conv1_0')(x)
    x = nn.relu(norm(name='conv1_1')(x))
    x = conv(self.width // 2, 3, name='conv1_3')(x)
    x = nn.relu(norm(name='conv1_4')(x))
    x = conv(self.width, 3, name='conv1_6')(x)
    x = nn.relu(norm(name='bn1')(x))
    x = conv(self.width, 3, 2, name='maxpool_0')(x)
    return nn.relu(norm(name='maxpool_1')(x))


class Block(nn.Module):
  """A branch of convolutions beside a shortcut.

  Attributes:
    features: of the 3 x 3 convolutions.
    stride: of the first of them, and of the shortcut.
    bottleneck: whether the branch is 1 x 1, 3 x 3, 1 x 1, or 3 x 3 twice.
    avg_down: whether the shortcut averages rather than skips pixels.
    se_ratio: inner width of the squeeze-excitation, 0 for none.
    conv: makes a convolution of (features, size, stride).
    norm: makes a batch norm.
    drop_path: rate of stochastic depth.
  """

  features: int
  stride: int
  bottleneck: bool
  avg_down: bool
  se_ratio: float
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]
  drop_path: float = 0.0

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """`[batch, height / stride, width / stride, out]` of a larger image.

    out is features, or four times that with bottleneck.
    """
    n = self.features
    sizes = [(n, 3, self.stride), (n, 3, 1)]
    if self.bottleneck:
      sizes = [(n, 1, 1), (n, 3, self.stride), (4 * n, 1, 1)]
    y, last = x, len(sizes)
    for i, size in enumerate(sizes[:-1], 1):
      y = self.conv(*size, name=f'conv{i}')(y)
      y = nn.relu(self.norm(name=f'bn{i}')(y))
    y = self.conv(*sizes[-1], name=f'conv{last}')(y)
    # With a scale of zero a block starts as its shortcut.
    y = self.norm(scale_init=nn.initializers.zeros, name=f'bn{last}')(y)
    if self.se_ratio:
      y = SqueezeExcite(self.se_ratio, self.conv, name='se')(y)
    y = common.DropPath(self.drop_path)(y, train)
    return nn.relu(y + self._shortcut(x, y.shape[-1]))

  def _shortcut(self, x: Array, features: int) -> Array:
    if self.stride == 1 and x.shape[-1] == features:
      return x
    if not self.avg_down:
      x = self.conv(features, 1, self.stride, name='downsample_0')(x)
      return self.norm(name='downsample_1')(x)
    if self.stride > 1:
      # At an odd edge, the mean of the pixels that there are.
      window = (self.stride, self.stride)
      x = nn.avg_pool(x, window, window, 'SAME', count_include_pad=False)
    x = self.conv(features, 1, name='downsample_1')(x)
    return self.norm(name='downsample_2')(x)


class SqueezeExcite(nn.Module):
  """Scales every channel by a gate, computed from the means of all of them.

  Attributes:
    ratio: of the inner width to the channels; it is rounded to a multiple of 8.
    conv: makes a convolution of (features, size).
  """

  ratio: float
  conv: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """`[batch, height, width, channels]` of the same."""
    channels = x.shape[-1]
    inner = max(8, int(channels * self.ratio + 4) // 8 * 8)
    gate = x.mean((1, 2), keepdims=True)
    gate = nn.relu(self.conv(inner, 1, use_bias=True, name='fc1')(gate))
    gate = self.conv(channels, 1, use_bias=True, name='fc2')(gate)
    return x * nn.sigmoid(gate)


def _conv(
  features: int,
  size: int,
  stride: int = 1,
  *,
  use_bias: bool = False,
  **options: Any,
) -> nn.Conv:
  return nn.Conv(
    features,
    (size, size),
    strides=stride,
    padding=size // 2,
    use_bias=use_bias,
    kernel_init=_CONV_INIT,
    **options,
  )
