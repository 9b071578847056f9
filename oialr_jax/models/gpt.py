"""A small decoder-only language model, of the blocks of the ViT."""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from oialr_jax.models import common
from oialr_jax.models import vit

Array = jax.Array


class Gpt(nn.Module):
  """A transformer that predicts the next token of a text.

  Norms are in front of attention and MLP, positions are learned (as in GPT-2).
  The embedding is not tied to the head: a kernel that is both looked up and
  multiplied by stays dense, see `find_layers`. The head computes in
  `param_dtype`.

  Attributes:
    vocabulary: number of tokens that there are.
    context: the longest text.
    embed_dim: features of a token.
    depth: number of blocks.
    num_heads: of attention; they share embed_dim.
    mlp_ratio: width of the MLP's hidden layer, in units of embed_dim.
    dropout: rate after the embedding, the projections and the layers of MLPs.
    dtype: to compute in.
    param_dtype: of the parameters.

  Raises:
    ValueError: when built, of heads that do not share the features evenly, or a
      rate outside of [0, 1).
  """

  vocabulary: int = 128
  context: int = 256
  embed_dim: int = 384
  depth: int = 6
  num_heads: int = 6
  mlp_ratio: float = 4.0
  dropout: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    if self.embed_dim % self.num_heads:
      raise ValueError(
        f'num_heads={self.num_heads} does not divide embed_dim='
        f'{self.embed_dim}: every head has embed_dim / num_heads features.'
      )
    common.check_rates(dropout=self.dropout)
    super().__post_init__()

  @nn.compact
  def __call__(self, tokens: Array, train: bool = False) -> Array:
    """Logits `[batch, length, vocabulary]` of tokens `[batch, length]`.

    Those at a position are of the token that follows it.

    Raises:
      ValueError: the text is longer than the context.
    """
    length = tokens.shape[1]
    if length > self.context:
      raise ValueError(
        f'a text of {length} tokens is longer than context={self.context}.'
      )
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    norm = functools.partial(common.LayerNorm, **types)
    init = common.normal_init
    dense = functools.partial(nn.Dense, kernel_init=init, **types)
    embed = nn.Embed(
      self.vocabulary, self.embed_dim, embedding_init=init, **types, name='wte'
    )
    shape = self.context, self.embed_dim
    positions = self.param('wpe', init, shape, self.param_dtype)
    x = embed(tokens) + positions[:length].astype(self.dtype)
    x = common.Dropout(self.dropout, deterministic=not train)(x)
    for i in range(self.depth):
      block = vit.Block(
        num_heads=self.num_heads,
        mlp_width=int(self.mlp_ratio * self.embed_dim),
        qkv_bias=True,
        dense=dense,
        norm=norm,
        dropout=self.dropout,
        causal=True,
        name=f'blocks_{i}',
      )
      x = block(x, train)
    head = functools.partial(dense, dtype=self.param_dtype, use_bias=False)
    return head(self.vocabulary, name='head')(norm(name='norm')(x))
