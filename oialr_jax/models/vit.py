"""Vision transformers (arXiv 2010.11929), with the names of timm."""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from oialr_jax.models import common

Array = jax.Array


class Vit(nn.Module):
  """A vision transformer; the position embedding is of the size of its input.

  Norms are in front of attention and MLP, and query, key and value are one
  dense layer. The head computes in `param_dtype`.

  Attributes:
    num_classes: of the output.
    patch_size: height and width of a patch, in pixels.
    embed_dim: features of a token.
    depth: number of blocks.
    num_heads: of attention; they share embed_dim.
    mlp_ratio: width of the MLP's hidden layer, in units of embed_dim.
    qkv_bias: whether query, key and value have a bias.
    class_token: whether a learned token precedes the patches.
    global_pool: what is classified: 'token', the class token, or 'avg', the
      mean of the patches, normalised after the mean.
    dropout: rate after the position embedding, after the projection of
      attention, and after both layers of the MLP.
    attn_dropout: rate for the weights of attention.
    drop_path: rate of stochastic depth in the last block, rising linearly
      from 0 in the first.
    activation: of the MLPs, one of `common.ACTIVATIONS`; the gelu is exact.
    dtype: to compute in.
    param_dtype: of the parameters.

  Raises:
    ValueError: when built, of heads that do not share the features evenly, a
      pooling that is unknown or wants a class token that is not there, an
      activation that is unknown, or a rate outside of [0, 1).
  """

  num_classes: int = 1000
  patch_size: int = 16
  embed_dim: int = 768
  depth: int = 12
  num_heads: int = 12
  mlp_ratio: float = 4.0
  qkv_bias: bool = True
  class_token: bool = True
  global_pool: str = 'token'
  dropout: float = 0.0
  attn_dropout: float = 0.0
  drop_path: float = 0.0
  activation: str = 'gelu'
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    if self.embed_dim % self.num_heads:
      raise ValueError(
        f'num_heads={self.num_heads} does not divide embed_dim='
        f'{self.embed_dim}: every head has embed_dim / num_heads features.'
      )
    if self.global_pool not in ('token', 'avg'):
      raise ValueError(
        f"global_pool={self.global_pool!r}: must be 'token' or 'avg'."
      )
    if self.global_pool == 'token' and not self.class_token:
      raise ValueError(
        "global_pool='token' classifies the class token, but class_token="
        "False: pass global_pool='avg'."
      )
    common.check_rates(
      dropout=self.dropout,
      attn_dropout=self.attn_dropout,
      drop_path=self.drop_path,
    )
    common.check_activation(self.activation)
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
    block = functools.partial(
      Block,
      num_heads=self.num_heads,
      mlp_width=int(self.mlp_ratio * self.embed_dim),
      qkv_bias=self.qkv_bias,
      dense=functools.partial(
        nn.Dense, kernel_init=common.normal_init, **types
      ),
      norm=norm,
      dropout=self.dropout,
      attn_dropout=self.attn_dropout,
      activation=self.activation,
    )
    x = self._embed(x, train)
    for i, rate in enumerate(common.rising(self.drop_path, self.depth)):
      x = block(drop_path=rate, name=f'blocks_{i}')(x, train)
    if self.global_pool == 'token':
      x = norm(name='norm')(x[:, 0])
    else:
      x = norm(name='fc_norm')(x[:, int(self.class_token) :].mean(1))
    return nn.Dense(
      self.num_classes,
      dtype=self.param_dtype,
      param_dtype=self.param_dtype,
      kernel_init=common.normal_init,
      name='head',
    )(x)

  def _embed(self, x: Array, train: bool) -> Array:
    """Tokens `[batch, tokens, embed_dim]` of images, class token first."""
    x = common.PatchEmbed(
      self.patch_size,
      self.embed_dim,
      # PyTorch's default for a convolution, which timm leaves alone here.
      nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform'),
      self.dtype,
      self.param_dtype,
      name='patch_embed',
    )(x)
    if self.class_token:
      shape = (1, 1, self.embed_dim)
      init = nn.initializers.normal(1e-6)
      token = self.param('cls_token', init, shape, self.param_dtype)
      token = jnp.broadcast_to(token, (x.shape[0], *shape[1:]))
      x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
    shape = (1, *x.shape[1:])
    pos = self.param('pos_embed', common.normal_init, shape, self.param_dtype)
    x = x + pos.astype(x.dtype)
    return common.Dropout(self.dropout, deterministic=not train)(x)


class Block(nn.Module):
  """Attention and an MLP, each a residual branch behind a norm.

  Attributes:
    num_heads: of attention.
    mlp_width: of the MLP's hidden layer.
    qkv_bias: whether query, key and value have a bias.
    dense: makes a dense layer of so many features.
    norm: makes a norm.
    dropout: rate after dense layers.
    attn_dropout: rate for the weights of attention.
    drop_path: rate of stochastic depth.
    activation: of the MLP.
    causal: whether a token sees itself and those before it alone.
  """

  num_heads: int
  mlp_width: int
  qkv_bias: bool
  dense: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]
  dropout: float = 0.0
  attn_dropout: float = 0.0
  drop_path: float = 0.0
  activation: str = 'gelu'
  causal: bool = False

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """`[batch, tokens, features]` of `[batch, tokens, features]`."""
    attention = Attention(
      self.num_heads,
      self.qkv_bias,
      self.dense,
      self.dropout,
      self.attn_dropout,
      self.causal,
      name='attn',
    )
    mlp = common.MlpBlock(
      self.mlp_width, self.dense, self.dropout, self.activation, name='mlp'
    )
    drop_path = common.DropPath(self.drop_path)
    x = x + drop_path(attention(self.norm(name='norm1')(x), train), train)
    return x + drop_path(mlp(self.norm(name='norm2')(x), train), train)


class Attention(nn.Module):
  """Self-attention with one dense layer for query, key and value.

  The columns of that layer are in the order [3, num_heads, head features].

  Attributes:
    num_heads: of attention.
    qkv_bias: whether query, key and value have a bias.
    dense: makes a dense layer of so many features.
    dropout: rate after the projection.
    attn_dropout: rate for the weights of attention.
    causal: whether a token sees itself and those before it alone.
  """

  num_heads: int
  qkv_bias: bool
  dense: Callable[..., nn.Module]
  dropout: float = 0.0
  attn_dropout: float = 0.0
  causal: bool = False

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """`[batch, tokens, features]` of `[batch, tokens, features]`."""
    features = x.shape[-1]
    qkv = self.dense(3 * features, use_bias=self.qkv_bias, name='qkv')(x)
    qkv = qkv.reshape(*x.shape[:2], 3, self.num_heads, -1)
    random = train and self.attn_dropout > 0
    attention = self._dropping if random else common.attention
    x = attention(*jnp.unstack(qkv, axis=2), self.causal)
    x = self.dense(features, name='proj')(x.reshape(*x.shape[:2], features))
    return common.Dropout(self.dropout, deterministic=not train)(x)

  def _dropping(self, query: Array, key: Array, value: Array, causal: bool):
    """As `common.attention`, with weights dropped at random."""
    return nn.dot_product_attention(
      query,
      key,
      value,
      mask=nn.make_causal_mask(jnp.ones(query.shape[:2])) if causal else None,
      broadcast_dropout=False,
      dropout_rng=self.make_rng('dropout'),
      dropout_rate=self.attn_dropout,
      force_fp32_for_softmax=True,
    )
