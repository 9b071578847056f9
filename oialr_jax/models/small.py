"""The small models of the main job and of MNIST."""

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from oialr_jax.models import common

Array = jax.Array


class Mlp(nn.Module):
  """A multi-layer perceptron over flattened inputs.

  Attributes:
    widths: of the hidden layers.
    num_classes: of the output.
    activation: one of `common.ACTIVATIONS`.
    dtype: to compute in.

  Raises:
    ValueError: when built, of an activation that is unknown.
  """

  widths: Sequence[int] = (512, 512, 512)
  num_classes: int = 10
  activation: str = 'relu'
  dtype: Any = jnp.float32

  def __post_init__(self):
    common.check_activation(self.activation)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Logits `[batch, classes]` of inputs `[batch, ...]`."""
    del train
    activate = common.ACTIVATIONS[self.activation]
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.widths):
      x = activate(nn.Dense(width, dtype=self.dtype, name=f'dense_{i}')(x))
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)


class MnistCnn(nn.Module):
  """Strided convolutions and two dense layers, quick on a CPU.

  Attributes:
    channels: of the convolutions, each `kernel` wide with stride 2.
    kernel: the convolutions' height and width.
    width: of the hidden dense layer.
    num_classes: of the output.
    batch_norm: normalise after every layer but the last.
    dropout: rate after the hidden layer.
    activation: one of `common.ACTIVATIONS`.
    dtype: to compute in.

  Raises:
    ValueError: when built, of an activation that is unknown or a rate that is
      not in [0, 1).
  """

  channels: Sequence[int] = (32, 64)
  kernel: int = 5
  width: int = 256
  num_classes: int = 10
  batch_norm: bool = False
  dropout: float = 0.5
  activation: str = 'relu'
  dtype: Any = jnp.float32

  def __post_init__(self):
    common.check_activation(self.activation)
    common.check_rates(dropout=self.dropout)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Logits `[batch, classes]` of images `[batch, height, width, channels]`."""
    activate = common.ACTIVATIONS[self.activation]
    for i, channels in enumerate(self.channels):
      window = (self.kernel, self.kernel)
      conv = nn.Conv(
        channels, window, strides=2, dtype=self.dtype, name=f'conv_{i}'
      )
      x = activate(self._norm(conv(x), f'norm_{i}', train))
    x = x.reshape(x.shape[0], -1)
    x = nn.Dense(self.width, dtype=self.dtype, name='hidden')(x)
    x = activate(self._norm(x, 'norm_hidden', train))
    x = common.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)

  def _norm(self, x: Array, name: str, train: bool) -> Array:
    if not self.batch_norm:
      return x
    return nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, name=name)(x)
