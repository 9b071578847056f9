"""What several models share: stochastic depth, the MLP block, patches.

Names of submodules and parameters are timm's throughout the package: an index
follows an underscore, `blocks_3/attn/qkv` for `blocks.3.attn.qkv`.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array

# timm draws from a normal of deviation 0.02 that is cut at +-2, a hundred
# deviations: JAX's truncated_normal cuts at two deviations, hence is narrower.
normal_init = nn.initializers.normal(0.02)


@jax.checkpoint  # computed anew, erf costs less than the memory that it takes
def gelu(x: Array) -> Array:
  """x Phi(x), exactly, in PyTorch's form: 0.5 x (1 + erf(x / sqrt(2))).

  JAX's own is by erfc, more exact in the far tail and, on CPUs, twice as slow.
  """
  return 0.5 * x * (1 + lax.erf(x * jnp.array(0.5**0.5, x.dtype)))


# Of each norm autodiff keeps three arrays of its input's size, in float32. Here
# it keeps the input.
LayerNorm = nn.remat(nn.LayerNorm)


@functools.partial(jax.checkpoint, static_argnums=3)
def attention(query: Array, key: Array, value: Array, causal: bool) -> Array:
  """softmax(q k^T / sqrt(features)) v, all `[batch, tokens, heads, features]`.

  The weights, one for every two tokens, are computed anew in the backward pass:
  kept in float32, those of a ViT would be a third of all that it keeps.

  Args:
    query: of the tokens that look.
    key: of those that are looked at.
    value: likewise.
    causal: whether a token sees itself and those before it alone.
  """
  return jax.nn.dot_product_attention(query, key, value, is_causal=causal)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
  'gelu': gelu,
  'relu': nn.relu,
  'silu': nn.silu,
  'tanh': nn.tanh,
}


def check_activation(name: str) -> None:
  """Raises ValueError unless it is one of `ACTIVATIONS`."""
  if name not in ACTIVATIONS:
    raise ValueError(
      f'activation={name!r}: must be one of {", ".join(ACTIVATIONS)}.'
    )


class Dropout(nn.Module):
  """Sets elements to zero at random, each by 16 bits.

  flax's `nn.Dropout` draws 32 bits for each. What is kept is scaled by
  1 / (1 - rate), of the rate rounded to 2^-16. Draws from the rng 'dropout'.

  Attributes:
    rate: the probability of an element to be dropped, below 1.
    deterministic: drops nothing.
  """

  rate: float
  deterministic: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """`x`, `[..., features]`, with some elements set to zero.

    Raises:
      ValueError: the rate is not in [0, 1).
    """
    check_rates(dropout=self.rate)
    if self.deterministic or self.rate == 0:
      return x
    *outer, features = x.shape
    # Halves of a word lie side by side, so that no sharding of x is in the way.
    words = jax.random.bits(
      self.make_rng('dropout'), (*outer, -(-features // 2))
    )
    bits = lax.bitcast_convert_type(words, jnp.uint16)
    bits = bits.reshape(*outer, -1)[..., :features]
    dropped = min(round(self.rate * 2**16), 2**16 - 1)
    return jnp.where(bits < dropped, 0, x / (1 - dropped / 2**16))


class DropPath(nn.Module):
  """Stochastic depth: drops a residual branch, an example at a time.

  What is kept is scaled by 1 / (1 - rate). Draws from the rng 'dropout'.

  Attributes:
    rate: the probability of a drop.
  """

  rate: float

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """`x`, with the examples `x[i]` that are dropped set to zero."""
    within = tuple(range(1, x.ndim))
    drop = nn.Dropout(self.rate, broadcast_dims=within, deterministic=not train)
    return drop(x)


def check_rates(**rates: float) -> None:
  """Raises ValueError unless all of these are probabilities below 1."""
  for name, rate in rates.items():
    if not 0 <= rate < 1:
      raise ValueError(f'{name}={rate}: must be in [0, 1).')


def rising(rate: float, depth: int) -> list[float]:
  """Rates of stochastic depth: from 0 in the first block to `rate`."""
  return [rate * i / max(depth - 1, 1) for i in range(depth)]


class MlpBlock(nn.Module):
  """Two dense layers over the last axis, with an activation between them.

  Attributes:
    width: of the hidden layer.
    dense: makes a dense layer of so many features.
    dropout: rate after each of the two.
    activation: one of `ACTIVATIONS`.
  """

  width: int
  dense: Callable[..., nn.Module]
  dropout: float = 0.0
  activation: str = 'gelu'

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """`[..., features]` of `[..., features]`."""
    drop = Dropout(self.dropout, deterministic=not train)
    hidden = self.dense(self.width, name='fc1')(x)
    hidden = drop(ACTIVATIONS[self.activation](hidden))
    return drop(self.dense(x.shape[-1], name='fc2')(hidden))


class PatchEmbed(nn.Module):
  """Cuts images into patches, each a token.

  Attributes:
    patch_size: height and width of a patch, in pixels.
    features: of a token.
    kernel_init: of the projection.
    dtype: to compute in.
    param_dtype: of the parameters.
  """

  patch_size: int
  features: int
  kernel_init: nn.initializers.Initializer
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """`[batch, tokens, features]` of images `[batch, height, width, channels]`.

    Raises:
      ValueError: these are no images, or their sides no multiples of the patch.
    """
    p = self.patch_size
    check_images(x, p)
    conv = nn.Conv(
      self.features,
      (p, p),
      strides=p,
      padding='VALID',
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=self.kernel_init,
      name='proj',
    )
    return conv(x).reshape(x.shape[0], -1, self.features)


def check_images(x: Array, multiple: int = 1) -> None:
  """Raises ValueError unless x is a batch of images of such sides."""
  if x.ndim != 4:
    raise ValueError(
      f'images of shape {x.shape}: pass [batch, height, width, channels].'
    )
  if any(side % multiple for side in x.shape[1:3]):
    raise ValueError(
      f'images of shape {x.shape}: height and width must be multiples of '
      f'{multiple}, the patch size; pad, resize or crop them.'
    )
