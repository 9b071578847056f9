"""Autoformer: a transformer that decomposes time series.

Wu et al., 2021 (arXiv 2106.13008). Submodules have the names of the authors'
PyTorch program, with `_` before a number: 'encoder.attn_layers.0.conv1' there
is 'encoder/attn_layers_0/conv1' here. Series are `[batch, time, variables]`,
what is inside of the model `[batch, time, d_model]`.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from oialr_jax.models import common

Array = jax.Array
Make = Callable[..., nn.Module]

# PyTorch's: He et al.'s for the embedding, uniform in +-1 / sqrt(fan in) for
# all else.
_EMBED_INIT = nn.initializers.variance_scaling(
  2 / (1 + 0.01**2), 'fan_in', 'normal'
)
_INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class Autoformer(nn.Module):
  """Forecasts series from their past; of any horizon, with one set of weights.

  The heads of the original are not to be seen: every head is rolled by the
  same delays, found from the mean over heads and channels, so that the
  function is the same for any number of them. Gelu is exact.

  Attributes:
    c_out: variables, of the input as well as of the forecast.
    label_len: steps at the end of the past that the decoder is given.
    d_model: features inside of the model.
    d_ff: features of the feed-forward layers.
    e_layers: of the encoder.
    d_layers: of the decoder.
    factor: series of length L are rolled by int(factor log L) delays.
    moving_avg: window of the moving average that is the trend, odd.
    dropout: rate after the embeddings, the attention and both feed-forward
      layers.
    dtype: to compute in; correlations, averages over time, the trend and the
      forecast are at least float32.
    param_dtype: of the parameters.
  """

  c_out: int = 7
  label_len: int = 48
  d_model: int = 512
  d_ff: int = 2048
  e_layers: int = 2
  d_layers: int = 1
  factor: float = 1
  moving_avg: int = 25
  dropout: float = 0.05
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x_enc: Array,
    x_mark_enc: Array,
    x_dec: Array,
    x_mark_dec: Array,
    train: bool = False,
  ) -> Array:
    """The forecast `[batch, horizon, c_out]`.

    Args:
      x_enc: the past, `[batch, seq_len, c_out]`.
      x_mark_enc: its time features, `[batch, seq_len, features]`.
      x_dec: `[batch, label_len + horizon, c_out]`. Only its shape counts: the
        decoder starts from the end of `x_enc`.
      x_mark_dec: time features of the last label_len steps of the past and of
        the horizon, `[batch, label_len + horizon, features]`.
      train: draws from the rng 'dropout', and rolls all series of the batch by
        the same delays, those of the greatest mean correlation. Otherwise each
        has its own.

    Raises:
      ValueError: a shape or an attribute does not fit; says which.
    """
    self._check(x_enc, x_mark_enc, x_dec, x_mark_dec)
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    embed = functools.partial(Embedding, self.d_model, self.dropout, **types)
    dense = functools.partial(
      nn.Dense, kernel_init=_INIT, bias_init=_uniform(self.d_model), **types
    )
    norm = functools.partial(SeasonalNorm, **types)
    layer = dict(
      attention=functools.partial(AutoCorrelation, dense, self.factor),
      conv=functools.partial(_conv, kernel_init=_INIT, **types),
      d_ff=self.d_ff,
      moving_avg=self.moving_avg,
      dropout=self.dropout,
    )
    encode = Encoder(
      functools.partial(EncoderLayer, **layer),
      norm,
      self.e_layers,
      name='encoder',
    )
    decode = Decoder(
      functools.partial(DecoderLayer, **layer),
      norm,
      dense,
      self.d_layers,
      name='decoder',
    )
    x_enc = x_enc.astype(_wide(x_enc.dtype))
    seasonal, trend = self._start(x_enc, x_dec.shape[1] - self.label_len)
    x = embed(name='enc_embedding')(x_enc, x_mark_enc, train)
    memory = encode(x, train)
    x = embed(name='dec_embedding')(seasonal, x_mark_dec, train)
    seasonal, trend = decode(x, memory, trend, train)
    return (seasonal + trend)[:, self.label_len :]

  def _start(self, x: Array, horizon: int) -> tuple[Array, Array]:
    """What the decoder starts from: the season ends, the trend is the mean."""
    seasonal, trend = decompose(x, self.moving_avg)
    given = x.shape[1] - self.label_len
    seasonal = jnp.pad(seasonal[:, given:], ((0, 0), (0, horizon), (0, 0)))
    mean = jnp.repeat(x.mean(1, keepdims=True), horizon, axis=1)
    return seasonal, jnp.concatenate([trend[:, given:], mean], axis=1)

  def _check(self, x_enc, x_mark_enc, x_dec, x_mark_dec):
    if self.moving_avg < 1 or self.moving_avg % 2 == 0:
      raise ValueError(
        f'moving_avg={self.moving_avg}: must be odd, for a window has as many '
        'steps before its middle as after it.'
      )
    pairs = dict(enc=(x_enc, x_mark_enc), dec=(x_dec, x_mark_dec))
    for name, (x, mark) in pairs.items():
      fits = mark.ndim == 3 and mark.shape[:2] == x.shape[:2]
      if not fits or x.shape[2:] != (self.c_out,):
        raise ValueError(
          f'x_{name} has the shape {x.shape}, x_mark_{name} {mark.shape}: they '
          f'must be [batch, time, c_out={self.c_out}] and [batch, time, '
          'features].'
        )
    past, future = x_enc.shape[1], x_dec.shape[1]
    if not 0 <= self.label_len <= past or self.label_len >= future:
      raise ValueError(
        f'label_len={self.label_len}: must be in [0, {past}], the length of '
        f'x_enc, and less than {future}, that of x_dec, whose other steps are '
        'the horizon.'
      )


def decompose(x: Array, window: int) -> tuple[Array, Array]:
  """Season and trend: `x - trend`, and the moving average over time.

  The first and the last step are repeated, so that lengths stay the same.

  Args:
    x: `[batch, time, variables]`.
    window: steps of the average, odd.
  """
  half = window // 2
  # Partial sums in bfloat16 would lose what the season is made of.
  wide = x.astype(_wide(x.dtype))
  # As np.pad's 'edge', whose gradient takes thrice as long on a CPU.
  first, last = (
    jnp.repeat(end, half, 1) for end in (wide[:, :1], wide[:, -1:])
  )
  padded = jnp.concatenate([first, wide, last], axis=1)
  trend = nn.avg_pool(padded, (window,))
  return (wide - trend).astype(x.dtype), trend.astype(x.dtype)


def correlate(query: Array, key: Array) -> Array:
  """Circular correlation over time, averaged over the features.

  `out[b, lag] = mean_d sum_t query[b, t + lag, d] key[b, t, d]`, by FFTs
  (section 3.2 of the paper).

  Args:
    query: `[batch, time, features]`.
    key: likewise.

  Returns:
    `[batch, time]`, at least float32.
  """
  # One transform of both: of two side by side, the gradients' can wait for each
  # other for ever on a CPU (jax 0.11.2; as `linalg.after` says of SVDs).
  both = jnp.stack([query, key]).astype(_wide(query.dtype))
  query_spectrum, key_spectrum = jnp.fft.rfft(jnp.moveaxis(both, 2, -1))
  # The mean commutes with the inverse transform, which so is one a series.
  product = jnp.mean(query_spectrum * jnp.conj(key_spectrum), axis=1)
  # Odd lengths are not told from even ones by the number of frequencies.
  return jnp.fft.irfft(product, n=query.shape[1])


@jax.custom_vjp
def aggregate(values: Array, weights: Array, delays: Array) -> Array:
  """A weighted sum of rolled series (section 3.2 of the paper).

  `out[b, t] = sum_i weights[b, i] values[b, (t + delays[b, i]) mod time]`.

  Args:
    values: `[batch, time, features]`.
    weights: `[batch, k]`.
    delays: `[batch, k]`, integers; there is no gradient of them.
  """
  terms = (
    _rolled(values, delay) * weight[:, None, None]
    for weight, delay in _columns(weights, delays)
  )
  return sum(terms).astype(values.dtype)


# A derivative of its own, for JAX's of a gather is a scatter, with which this
# takes twice as long on a CPU as by rolling the other way.
def _aggregate_fwd(values, weights, delays):
  return aggregate(values, weights, delays), (values, weights, delays)


def _aggregate_bwd(saved, grad):
  values, weights, delays = saved
  wide = grad.astype(weights.dtype)
  by_weight = [
    jnp.sum(wide * _rolled(values, delay), (1, 2))
    for _, delay in _columns(weights, delays)
  ]
  return aggregate(grad, weights, -delays), jnp.stack(by_weight, 1), None


aggregate.defvjp(_aggregate_fwd, _aggregate_bwd)


class AutoCorrelation(nn.Module):
  """Attention to delays: a series is what it was some periods ago.

  Attributes:
    dense: makes a dense layer of so many features.
    factor: the number of delays is int(factor log time).
  """

  dense: Make
  factor: float = 1

  @nn.compact
  def __call__(self, x: Array, memory: Array, train: bool = False) -> Array:
    """`[batch, time, d_model]` of `x`, with keys and values of `memory`.

    A longer memory is cut off to the length of `x`, a shorter one padded with
    zeros.

    Raises:
      ValueError: the number of delays is not in [1, time].
    """
    _, length, features = x.shape
    count = int(self.factor * math.log(length))
    if not 1 <= count <= length:
      raise ValueError(
        f'factor={self.factor}: gives int(factor log {length}) = {count} '
        f'delays for series of length {length}; must be in [1, {length}].'
      )
    project = lambda name, x: self.dense(features, name=f'{name}_projection')(x)
    query = project('query', x)
    key = _of_length(project('key', memory), length)
    value = _of_length(project('value', memory), length)
    correlation = correlate(query, key)
    if train:
      _, delays = lax.top_k(correlation.mean(0), count)
      delays = jnp.broadcast_to(delays, (x.shape[0], count))
    else:
      _, delays = lax.top_k(correlation, count)
    weights = nn.softmax(jnp.take_along_axis(correlation, delays, axis=1))
    return project('out', aggregate(value, weights, delays))


class EncoderLayer(nn.Module):
  """Attention and feed-forward layers; of either, only the season goes on.

  Attributes:
    attention: makes an `AutoCorrelation`.
    conv: makes a convolution over time of so many features and steps.
    d_ff: features of the hidden feed-forward layer.
    moving_avg: window of the trend.
    dropout: rate after the attention and both feed-forward layers.
  """

  attention: Make
  conv: Make
  d_ff: int
  moving_avg: int
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """`[batch, time, d_model]` of the same."""
    drop = common.Dropout(self.dropout, deterministic=not train)
    x = x + drop(self.attention(name='attention')(x, x, train))
    x, _ = decompose(x, self.moving_avg)
    x = x + _feed_forward(self.conv, self.d_ff, drop, x)
    return decompose(x, self.moving_avg)[0]


class DecoderLayer(nn.Module):
  """Attention to itself and to the past, and feed-forward layers.

  Attributes:
    attention: makes an `AutoCorrelation`.
    conv: makes a convolution over time of so many features and steps.
    d_ff: features of the hidden feed-forward layer.
    moving_avg: window of the trend.
    dropout: rate after the attentions and both feed-forward layers.
  """

  attention: Make
  conv: Make
  d_ff: int
  moving_avg: int
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self, x: Array, memory: Array, c_out: int, train: bool = False
  ) -> tuple[Array, Array]:
    """The season `[batch, time, d_model]`, and a trend `[batch, time, c_out]`.

    The trend is what the three decompositions took out of `x`, projected.
    """
    drop = common.Dropout(self.dropout, deterministic=not train)
    x = x + drop(self.attention(name='self_attention')(x, x, train))
    x, trend_1 = decompose(x, self.moving_avg)
    x = x + drop(self.attention(name='cross_attention')(x, memory, train))
    x, trend_2 = decompose(x, self.moving_avg)
    x = x + _feed_forward(self.conv, self.d_ff, drop, x)
    x, trend_3 = decompose(x, self.moving_avg)
    trend = trend_1 + trend_2 + trend_3
    return x, self.conv(c_out, 3, name='projection')(trend)


class Encoder(nn.Module):
  """Layers and a norm.

  Attributes:
    layer: makes an `EncoderLayer`.
    norm: makes a norm.
    depth: number of layers.
  """

  layer: Make
  norm: Make
  depth: int

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """`[batch, time, d_model]` of the same."""
    for i in range(self.depth):
      x = self.layer(name=f'attn_layers_{i}')(x, train)
    return self.norm(name='norm')(x)


class Decoder(nn.Module):
  """Layers that refine the trend, and a norm and a projection of the season.

  Attributes:
    layer: makes a `DecoderLayer`.
    norm: makes a norm.
    dense: makes a dense layer of so many features.
    depth: number of layers.
  """

  layer: Make
  norm: Make
  dense: Make
  depth: int

  @nn.compact
  def __call__(
    self, x: Array, memory: Array, trend: Array, train: bool = False
  ) -> tuple[Array, Array]:
    """Season and trend, `[batch, time, c_out]`; trend is where to start."""
    c_out = trend.shape[-1]
    for i in range(self.depth):
      x, more = self.layer(name=f'layers_{i}')(x, memory, c_out, train)
      trend = trend + more
    return self.dense(c_out, name='projection')(
      self.norm(name='norm')(x)
    ), trend


class Embedding(nn.Module):
  """A convolution of the values plus a linear map of the time features.

  Attributes:
    features: of a step.
    dropout: rate after the sum.
    dtype: to compute in.
    param_dtype: of the parameters.
  """

  features: int
  dropout: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, mark: Array, train: bool = False) -> Array:
    """`[batch, time, features]` of series and their time features."""
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    conv = functools.partial(
      _conv, self.features, 3, kernel_init=_EMBED_INIT, **types
    )
    dense = functools.partial(
      nn.Dense, self.features, use_bias=False, kernel_init=_INIT, **types
    )
    value = _Within(conv, 'tokenConv', name='value_embedding')(x)
    time = _Within(dense, 'embed', name='temporal_embedding')(mark)
    return common.Dropout(self.dropout, deterministic=not train)(value + time)


class SeasonalNorm(nn.Module):
  """Layer norm, minus its mean over time.

  Attributes:
    dtype: to compute in.
    param_dtype: of the parameters.
  """

  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """`[batch, time, features]` of the same."""
    x = common.LayerNorm(
      epsilon=1e-5,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name='layernorm',
    )(x)
    return x - x.mean(1, keepdims=True)


class _Within(nn.Module):
  """A layer one scope further in, where the original has it.

  Attributes:
    make: makes the layer.
    inner: its name.
  """

  make: Make
  inner: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return self.make(name=self.inner)(x)


def _feed_forward(conv: Make, d_ff: int, drop: Make, x: Array) -> Array:
  """Two layers, each a convolution of one step, in the caller's scope."""
  hidden = common.gelu(conv(d_ff, 1, name='conv1')(x))
  return drop(conv(x.shape[-1], 1, name='conv2')(drop(hidden)))


def _conv(features: int, steps: int, **options: Any) -> nn.Module:
  return nn.Conv(
    features, (steps,), padding='CIRCULAR', use_bias=False, **options
  )


def _uniform(fan_in: int) -> nn.initializers.Initializer:
  """PyTorch's initialisation of a bias."""
  bound = fan_in**-0.5
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
    key, shape, dtype, -bound, bound
  )


def _of_length(x: Array, length: int) -> Array:
  x = x[:, :length]
  return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))


def _rolled(x: Array, delay: Array) -> Array:
  """`[batch, time, features]`, the series `i` from step `delay[i]` on."""
  steps = (jnp.arange(x.shape[1]) + delay[:, None]) % x.shape[1]
  return jnp.take_along_axis(
    x, steps[..., None], axis=1, mode='promise_in_bounds'
  )


def _columns(*arrays: Array):
  return zip(*(jnp.unstack(x, axis=1) for x in arrays))


def _wide(dtype: Any) -> Any:
  """At least float32, which FFTs need."""
  return jnp.promote_types(dtype, jnp.float32)
