"""Programs of many kinds, with the layers that are theirs.

What `find_layers` must say of each is written down by hand, and what `factored`
computes of each is compared with the same program on dense kernels.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import flax.linen as nn
import jax
from jax import ad_checkpoint
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr

Shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Program:
  """A function of parameters, and what there is to find in it.

  Attributes:
    fn: called as `fn(params, *args)`.
    params: of shapes.
    args: arrays, and what else fn takes.
    layers: those that can be low-rank.
    reasons: of the other kernels, patterns of what is said of them.
    low_rank: layers that make the low-rank kernels of a test of values; by
      default `layers`. With others, kernels are low-rank that had better not.
    has_gradient: false with a `while`.
  """

  fn: Callable[..., Any]
  params: Any
  args: tuple[Any, ...]
  layers: tuple[oialr.Layer, ...] = ()
  reasons: dict[str, str] = dataclasses.field(default_factory=dict)
  low_rank: tuple[oialr.Layer, ...] = ()
  has_gradient: bool = True


PROGRAMS: dict[str, Callable[[], Program]] = {}
ODD_PROGRAMS: dict[str, Callable[[], Program]] = {}


def program(make: Callable[[], Program]) -> Callable[[], Program]:
  """Registers a program whose kernels can all be low-rank."""
  PROGRAMS[make.__name__] = functools.cache(make)
  return PROGRAMS[make.__name__]


def odd(make: Callable[[], Program]) -> Callable[[], Program]:
  """Registers a program with a kernel that cannot be, each for one reason."""
  ODD_PROGRAMS[make.__name__] = functools.cache(make)
  return ODD_PROGRAMS[make.__name__]


def shapes(dtype: Any = jnp.float32, **params: tuple[int, ...]) -> Any:
  return {path: Shape(shape, dtype) for path, shape in params.items()}


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> Any:
  """Standard normal values, as a NumPy array."""
  rng = np.random.default_rng([seed, *shape])
  return rng.normal(size=shape).astype(dtype)


def values(params: Any, seed: int = 0) -> Any:
  """Arrays for shapes, scaled so that activations are neither tiny nor huge."""
  rng = np.random.default_rng(seed)

  def of(x):
    if not isinstance(x, Shape):
      return x
    fan_in = math.prod(x.shape[:-1]) ** 0.5 if x.ndim > 1 else 1.0
    return _array(rng.normal(size=x.shape) / fan_in, x.dtype)

  return jax.tree.map(of, params)


def with_low_rank(
  params: Any,
  layers: tuple[oialr.Layer, ...],
  rank: Callable[[oialr.Layer], int],
  *,
  pruned: int = 0,
  seed: int = 1,
) -> Any:
  """params with a random `LowRank`, Sigma full, for every kernel in layers.

  The last `pruned` directions are zero.
  """
  rng = np.random.default_rng(seed)
  by_path = {layer.path: layer for layer in layers}

  def of(path, x):
    layer = by_path.get(path)
    return x if layer is None else node(layer, x.dtype, rank(layer))

  def node(layer, dtype, r):
    batch, rows, cols = layer.view.split(layer.shape)
    live = np.arange(r) < r - pruned
    u = rng.normal(size=(*batch, *rows, r)) / math.prod(rows) ** 0.5
    s = rng.normal(size=(*batch, r, r)) / r**0.5
    vt = rng.normal(size=(*batch, r, *cols))
    vt = vt * live.reshape(r, *[1] * len(cols))
    return oialr.LowRank(
      _array(u * live, dtype),
      _array(s * live * live[:, None], dtype),
      _array(vt, dtype),
      layer.view,
    )

  leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
  name = lambda p: jax.tree_util.keystr(p, simple=True, separator='/')
  return jax.tree.unflatten(treedef, [of(name(p), x) for p, x in leaves])


def _array(x, dtype):
  return jnp.asarray(x.astype(dtype))  # cast by NumPy: nothing is compiled


def dot(path, shape, rows, cols, tokens, order=0, batch=()) -> oialr.Layer:
  return oialr.Layer(path, shape, rows, cols, batch, 'dot', tokens, order)


def conv(
  path, shape, rows, cols, tokens, order=0, batch=(), blocks=1
) -> oialr.Layer:
  return oialr.Layer(
    path, shape, rows, cols, batch, 'conv', tokens, order, blocks
  )


# Functions written by hand.


@program
def mlp():
  def fn(p, x):
    for name in ('a', 'b', 'c'):
      x = jnp.tanh(x @ p[name]['w'] + p[name]['b'])
    return x

  layer = lambda m, n: shapes(w=(m, n), b=(n,))
  return Program(
    fn,
    {'a': layer(8, 9), 'b': layer(9, 7), 'c': layer(7, 5)},
    (normal(2, 3, 8),),
    (
      dot('a/w', (8, 9), (0,), (1,), 6, 0),
      dot('b/w', (9, 7), (0,), (1,), 6, 1),
      dot('c/w', (7, 5), (0,), (1,), 6, 2),
    ),
  )


@program
def from_both_sides():
  """Transposed on the way, and multiplied from the left."""

  def fn(p, x):
    return jnp.tanh(p['left'] @ jnp.tanh(x @ p['out_in'].T).T)

  return Program(
    fn,
    shapes(out_in=(9, 8), left=(7, 9)),
    (normal(5, 8),),
    (
      dot('out_in', (9, 8), (1,), (0,), 5, 0),
      dot('left', (7, 9), (1,), (0,), 5, 1),
    ),
  )


@program
def used_twice():
  """By two calls in one role: their tokens add up. Used in order b, a."""

  def fn(p, x, y):
    shared = lambda x: jnp.tanh(x @ p['b'])
    return shared(shared(x)) @ p['a'], shared(y)

  return Program(
    fn,
    shapes(a=(8, 6), b=(8, 8)),
    (normal(5, 8), normal(2, 2, 8)),
    (
      dot('b', (8, 8), (0,), (1,), 5 + 5 + 4, 0),
      dot('a', (8, 6), (0,), (1,), 5, 1),
    ),
  )


@program
def fused_heads():
  """Kernels whose axes are split or merged before the product."""

  def fn(p, x):
    qkv = p['qkv'].reshape(8, 3, 2, 4)
    q, k, v = jnp.einsum('te,eqhd->qthd', x, qkv)
    y = jnp.einsum('thd,thd,thd->thd', jnp.tanh(q), k, v)
    y = jnp.einsum('thd,hde->te', y, p['split_rows'].reshape(2, 4, 9))
    return y @ p['merged'].reshape(9, 6)

  return Program(
    fn,
    shapes(qkv=(8, 24), split_rows=(8, 9), merged=(9, 2, 3)),
    (normal(5, 8),),
    (
      dot('qkv', (8, 24), (0,), (1,), 5, 0),
      dot('split_rows', (8, 9), (0,), (1,), 5, 1),
      dot('merged', (9, 2, 3), (0,), (1, 2), 5, 2),
    ),
  )


@program
def mixed_precision():
  """float32 parameters, bfloat16 activations, sums in float32."""

  def fn(p, x):
    x = jnp.tanh(x.astype(jnp.bfloat16) @ p['a'].astype(jnp.bfloat16))
    x = lax.dot_general(
      x,
      p['b'].astype(jnp.bfloat16),
      (((1,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    return x, x.astype(jnp.bfloat16) @ p['c']

  return Program(
    fn,
    shapes(a=(8, 9), b=(9, 7)) | shapes(jnp.bfloat16, c=(7, 6)),
    (normal(5, 8),),
    (
      dot('a', (8, 9), (0,), (1,), 5, 0),
      dot('b', (9, 7), (0,), (1,), 5, 1),
      dot('c', (7, 6), (0,), (1,), 5, 2),
    ),
  )


@program
def experts():
  """Stacked kernels, by `vmap` and by einsum, their batch axis anywhere."""

  def fn(p, x):
    y = jax.vmap(lambda w, x: jnp.tanh(x @ w))(p['leading'], x)
    return jnp.einsum('btm,mbn->btn', y, p['inner'])

  return Program(
    fn,
    shapes(leading=(3, 8, 9), inner=(9, 3, 5)),
    (normal(3, 4, 8),),
    (
      dot('leading', (3, 8, 9), (1,), (2,), 4, 0, batch=(0,)),
      dot('inner', (9, 3, 5), (0,), (2,), 4, 1, batch=(1,)),
    ),
  )


@program
def one_head():
  """Axes of size 1 are rows or columns like any other, and may go missing."""

  def fn(p, x):
    q = jnp.tanh(jnp.einsum('te,ehd->thd', x, p['query']))
    q += (x @ lax.squeeze(p['query'], [1]))[:, None]
    x = jnp.einsum('thd,hde->te', q, p['out'])
    return lax.conv_general_dilated(
      x.reshape(1, 1, 5, 8),
      p['pointwise'],
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )

  return Program(
    fn,
    shapes(query=(8, 1, 6), out=(1, 6, 8), pointwise=(1, 1, 8, 7)),
    (normal(5, 8),),
    (
      dot('query', (8, 1, 6), (0,), (1, 2), 5 + 5, 0),
      dot('out', (1, 6, 8), (0, 1), (2,), 5, 1),
      conv('pointwise', (1, 1, 8, 7), (0, 1, 2), (3,), 5, 2),
    ),
  )


def _stack(p, x):
  def layer(x, p):
    return jnp.tanh(x @ p['w'] + p['b']), x.sum()

  return lax.scan(layer, x, p)


@program
def scanned_stack():
  """Layers in a scan: the leading axis of their kernel is a batch axis."""
  return Program(
    _stack,
    shapes(w=(3, 8, 8), b=(3, 8)),
    (normal(5, 8),),
    (dot('w', (3, 8, 8), (1,), (2,), 5, 0, batch=(0,)),),
  )


@program
def scanned_stack_of_one():
  return Program(
    _stack,
    shapes(w=(1, 8, 8), b=(1, 8)),
    (normal(5, 8),),
    (dot('w', (1, 8, 8), (1,), (2,), 5, 0, batch=(0,)),),
  )


@program
def recurrent_stack():
  """A stack of recurrent layers: a scan over time in a scan over layers."""

  def fn(p, xs):
    def layer(xs, p):
      def step(h, x):
        h = jnp.tanh(h @ p['h'] + x @ p['x'])
        return h, h

      return lax.scan(step, jnp.zeros_like(xs[0]), xs)[1], None

    xs, _ = lax.scan(layer, xs, {'h': p['h'], 'x': p['x']})
    return lax.scan(lambda c, x: (c + x @ p['read'], None), 0 * xs[0], xs)[0]

  return Program(
    fn,
    shapes(h=(3, 8, 8), x=(3, 8, 8), read=(8, 8)),
    (normal(5, 3, 8),),
    (
      dot('h', (3, 8, 8), (1,), (2,), 5 * 3, 0, batch=(0,)),
      dot('x', (3, 8, 8), (1,), (2,), 5 * 3, 1, batch=(0,)),
      dot('read', (8, 8), (0,), (1,), 5 * 3, 2),
    ),
  )


@program
def two_stacks():
  """A scan in a scan, each over its own axis of the kernel, one in reverse."""

  def fn(p, x):
    inner = lambda x, w: (jnp.tanh(x @ w), x.sum())
    outer = lambda x, w: lax.scan(inner, x, w, reverse=True)
    return lax.scan(outer, x, p['w'], unroll=2)

  return Program(
    fn,
    shapes(w=(2, 3, 8, 8)),
    (normal(5, 8),),
    (dot('w', (2, 3, 8, 8), (2,), (3,), 5, 0, batch=(0, 1)),),
  )


@program
def rematerialised():
  """`jax.checkpoint` with policies, around a scan and inside of it."""
  policies = jax.checkpoint_policies
  named = policies.save_only_these_names('sum')

  @functools.partial(jax.checkpoint, policy=policies.dots_saveable)
  def layer(x, w):
    return jnp.tanh(x @ w), None

  @functools.partial(jax.checkpoint, policy=named)
  def fn(p, x):
    x, _ = lax.scan(layer, x, p['stack'])
    x = ad_checkpoint.checkpoint_name(x + x.sum(), 'sum')
    return jax.checkpoint(jnp.dot, prevent_cse=False)(x, p['out'])

  return Program(
    fn,
    shapes(stack=(3, 8, 8), out=(8, 7)),
    (normal(5, 8),),
    (
      dot('stack', (3, 8, 8), (1,), (2,), 5, 0, batch=(0,)),
      dot('out', (8, 7), (0,), (1,), 5, 1),
    ),
  )


@program
def branches():
  """Every branch of a `cond` counts."""

  def fn(p, x):
    return lax.switch(
      jnp.argmax(x[0, :3]),
      [
        lambda x: jnp.tanh(x @ p['a']) @ p['b'],
        lambda x: x[:, :6] + 1.0,
        lambda x: x @ p['b'],
      ],
      x,
    )

  return Program(
    fn,
    shapes(a=(8, 8), b=(8, 6)),
    (normal(5, 8, seed=3),),
    (
      dot('a', (8, 8), (0,), (1,), 5, 0),
      dot('b', (8, 6), (0,), (1,), 10, 1),
    ),
  )


@program
def custom_rules():
  """Kernels that pass through functions with derivatives of their own.

  There, and where a checkpoint hands one on, it is needed as it is.
  """

  @jax.custom_jvp
  def dense(x, w):
    return x @ w

  @dense.defjvp
  def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, dx @ w + 2.0 * (x @ dw)  # not the derivative, to be seen

  @jax.custom_vjp
  def clipped(x, w):
    return x @ w

  clipped.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, g: (0.5 * (g @ saved[1].T), 3.0 * (saved[0].T @ g)),
  )

  @jax.custom_vjp
  def slower(w):
    return w

  slower.defvjp(lambda w: (w, None), lambda _, g: (0.1 * g,))
  cast = jax.checkpoint(lambda w: w.T.astype(jnp.float32))

  def fn(p, x):
    x = clipped(jax.nn.relu(dense(x, p['a'])), p['b'])
    return jnp.tanh(x @ slower(p['c'])) @ cast(p['d']), x @ p['e']

  x, w = Shape((5, 8), jnp.float32), Shape((8, 9), jnp.float32)
  name = lambda fn, *args: jax.make_jaxpr(fn)(*args).eqns[0].primitive.name
  layer = lambda path, shape, tokens, order, within: dataclasses.replace(
    dot(path, shape, (0,), (1,), tokens, order), multiplied_out=within
  )
  return Program(
    fn,
    shapes(a=(8, 9), b=(9, 6), c=(6, 7), d=(8, 7), e=(6, 4)),
    (normal(5, 8),),
    (
      layer('a', (8, 9), 5, 0, name(dense, x, w)),
      layer('b', (9, 6), 5, 1, name(clipped, x, w)),
      layer('c', (6, 7), 5, 2, name(slower, w)),
      dataclasses.replace(
        dot('d', (8, 7), (1,), (0,), 5, 3), multiplied_out=name(cast, w)
      ),
      layer('e', (6, 4), 5, 4, ''),
    ),
  )


@program
def dilated_convs():
  """Strides, paddings, dilations of image and kernel, any order of axes."""

  def fn(p, x):
    x = lax.conv_general_dilated(
      x,
      p['hwio'],
      (2, 1),
      [(1, 2), (0, 1)],
      rhs_dilation=(1, 2),
      dimension_numbers=('NHWC', 'HWIO', 'NCHW'),
    )
    return lax.conv_general_dilated(
      jnp.tanh(x),
      p['oihw'],
      (1, 2),
      [(0, 0), (0, 0)],
      lhs_dilation=(2, 1),
      dimension_numbers=('NCHW', 'OIHW', 'NHWC'),
    )

  return Program(
    fn,
    shapes(hwio=(3, 2, 4, 7), oihw=(5, 7, 2, 1)),
    (normal(2, 6, 7, 4),),
    (
      conv('hwio', (3, 2, 4, 7), (0, 1, 2), (3,), 2 * 4 * 6, 0),
      conv('oihw', (5, 7, 2, 1), (1, 2, 3), (0,), 2 * 6 * 3, 1),
    ),
  )


@program
def reordered_conv():
  """A kernel whose rows and columns come in another order than its own."""

  def fn(p, x):
    w = p['w'].transpose(3, 1, 0, 2)  # columns 3 and 1, rows 0 and 2
    return lax.conv_general_dilated(
      x,
      w.reshape(10, 4, 3),
      (1,),
      'SAME',
      dimension_numbers=('NWC', 'OIW', 'NWC'),
    )

  return Program(
    fn,
    shapes(w=(4, 2, 3, 5)),
    (normal(2, 7, 4),),
    (conv('w', (4, 2, 3, 5), (0, 2), (1, 3), 14),),
  )


@program
def grouped_convs():
  """Each group of channels has a matrix of its own."""

  def fn(p, x, image):
    x = lax.conv_general_dilated(
      x,
      p['wio'],
      (2,),
      'SAME',
      dimension_numbers=('NWC', 'WIO', 'NWC'),
      feature_group_count=2,
    )
    image = lax.conv_general_dilated(
      image,
      p['hwio'],
      (2, 1),
      [(1, 2), (0, 1)],
      rhs_dilation=(1, 2),
      dimension_numbers=('NHWC', 'HWIO', 'NCHW'),
      feature_group_count=2,
    )
    return x, lax.conv_general_dilated(
      jnp.tanh(image),
      p['oihw'],
      (1, 2),
      [(0, 0), (0, 0)],
      lhs_dilation=(2, 1),
      dimension_numbers=('NCHW', 'OIHW', 'NHWC'),
      feature_group_count=3,
    )

  return Program(
    fn,
    shapes(wio=(3, 3, 10), hwio=(3, 2, 2, 6), oihw=(15, 2, 3, 1)),
    (normal(2, 5, 6), normal(2, 6, 7, 4)),
    (
      conv('wio', (3, 3, 10), (0, 1), (2,), 2 * 3, 0, blocks=2),
      conv('hwio', (3, 2, 2, 6), (0, 1, 2), (3,), 2 * 4 * 6, 1, blocks=2),
      conv('oihw', (15, 2, 3, 1), (1, 2, 3), (0,), 2 * 5 * 3, 2, blocks=3),
    ),
  )


@program
def depthwise_convs():
  """As many groups as channels, each with several of its own."""

  def fn(p, x):
    for name in ('hwio', 'iohw'):
      x = lax.conv_general_dilated(
        jnp.tanh(x),
        p[name],
        (1, 1),
        'SAME',
        dimension_numbers=('NHWC', name.upper(), 'NHWC'),
        feature_group_count=x.shape[-1],
      )
    return x

  return Program(
    fn,
    shapes(hwio=(3, 3, 1, 12), iohw=(1, 36, 2, 2)),
    (normal(2, 5, 3, 4),),
    (
      conv('hwio', (3, 3, 1, 12), (0, 1, 2), (3,), 30, 0, blocks=4),
      conv('iohw', (1, 36, 2, 2), (0, 2, 3), (1,), 30, 1, blocks=12),
    ),
  )


@program
def vmapped_convs():
  """One kernel for each image: a convolution of as many groups."""

  def convolved(layout, groups=1):
    return lambda w, x: lax.conv_general_dilated(
      x,
      w,
      (1,),
      'SAME',
      dimension_numbers=layout,
      feature_group_count=groups,
    )

  oiw, wio = ('NCW', 'OIW', 'NCW'), ('NWC', 'WIO', 'NWC')

  def fn(p, x):
    y = x.swapaxes(-1, -2)
    return (
      jax.vmap(convolved(oiw))(p['first'], x),
      jax.vmap(convolved(wio), (2, 0))(p['inner'], y),
      jax.vmap(convolved(wio, groups=2))(p['grouped'], y),
      jax.vmap(convolved(wio), (0, None))(p['ensemble'], y[0]),
    )

  return Program(
    fn,
    shapes(
      first=(3, 5, 4, 2),
      inner=(4, 4, 3, 7),
      grouped=(3, 4, 2, 10),
      ensemble=(2, 3, 4, 7),
    ),
    (normal(3, 1, 4, 5),),
    (
      conv('first', (3, 5, 4, 2), (2, 3), (1,), 5, 0, batch=(0,)),
      conv('inner', (4, 4, 3, 7), (0, 1), (3,), 5, 1, batch=(2,)),
      conv('grouped', (3, 4, 2, 10), (1, 2), (3,), 5, 2, batch=(0,), blocks=2),
      # All see the same image: their channels are columns, side by side.
      conv('ensemble', (2, 3, 4, 7), (1, 2), (0, 3), 5, 3),
    ),
  )


# Kernels whose columns fall into blocks because someone asked for it.


@program
def split_qkv():
  """A fused qkv as one dense kernel or with axes of its own, in 3 or by head."""

  def fn(p, x):
    def attention(q, k, v):
      return jnp.einsum('thd,thd,thd->td', jnp.tanh(q), k, v)

    for name in ('dense_chunks', 'dense_heads'):
      qkv = (x @ p[name]).reshape(5, 3, 2, -1)
      x = attention(*jnp.moveaxis(qkv, 1, 0))
    for name in ('general_chunks', 'general_heads'):
      x = attention(*jnp.einsum('te,eqhd->qthd', x, p[name]))
    return x

  layers = (
    dot('dense_chunks', (8, 24), (0,), (1,), 5, 0),
    dot('dense_heads', (4, 36), (0,), (1,), 5, 1),
    dot('general_chunks', (6, 3, 2, 4), (0,), (1, 2, 3), 5, 2),
    dot('general_heads', (4, 3, 2, 7), (0,), (1, 2, 3), 5, 3),
  )
  return Program(
    fn,
    {layer.path: Shape(layer.shape, jnp.float32) for layer in layers},
    (normal(5, 8),),
    layers,
    low_rank=oialr.split(layers, {'chunks': 3, 'heads': 6}),
  )


@program
def split_out_in():
  """As Equinox lays kernels out: the columns come first."""

  def fn(p, x):
    x = jnp.tanh(x @ p['dense'].T)
    return lax.conv_general_dilated(
      x.reshape(1, 5, 3, 4),
      p['oihw'],
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'OIHW', 'NHWC'),
    )

  layers = (
    dot('dense', (12, 8), (1,), (0,), 5, 0),
    conv('oihw', (10, 4, 2, 2), (1, 2, 3), (0,), 15, 1),
  )
  return Program(
    fn,
    {layer.path: Shape(layer.shape, jnp.float32) for layer in layers},
    (normal(5, 8),),
    layers,
    low_rank=oialr.split(layers, {'dense': 3, 'oihw': 2}),
  )


@program
def split_stack():
  """Blocks of stacked kernels: in a scan, or with a batch axis of an einsum."""

  @jax.checkpoint
  def layer(x, p):
    q, k, v = jnp.split(0.3 * x @ p['in_out'].astype(x.dtype), 3, axis=-1)
    x = jnp.tanh(q * k + v)
    return x + jnp.tanh(p['out_in'] @ x.T).T.reshape(5, 2, 6).sum(1), None

  def fn(p, x):
    x, _ = lax.scan(layer, x, {k: p[k] for k in ('in_out', 'out_in')})
    return jnp.einsum('tm,mbn->btn', x, p['experts'])

  layers = (
    dot('in_out', (3, 6, 18), (1,), (2,), 5, 0, batch=(0,)),
    dot('out_in', (3, 12, 6), (2,), (1,), 5, 1, batch=(0,)),
    dot('experts', (6, 2, 10), (0,), (1, 2), 5, 2),
  )
  return Program(
    fn,
    {layer.path: Shape(layer.shape, jnp.float32) for layer in layers},
    (normal(5, 6),),
    layers,
    low_rank=oialr.split(layers, {'in_out': 3, 'out_in': 2, 'experts': 4}),
  )


# Flax Linen.


def _linen(model, *args, **kwargs):
  """Shapes of the parameters, and the function of them."""
  init = functools.partial(model.init, **kwargs)
  variables = jax.eval_shape(init, jax.random.key(0), *args)
  fn = lambda p, *args: model.apply({'params': p}, *args, **kwargs)
  return fn, nn.unbox(variables)['params']


@program
def linen_dense():
  model = nn.Sequential(
    [
      nn.Dense(9),
      nn.tanh,
      nn.DenseGeneral((2, 3)),
      nn.tanh,
      nn.DenseGeneral(7, axis=(-2, -1)),
      nn.LayerNorm(),
      nn.Einsum((7, 2, 4), 'ta,abc->tbc'),
    ]
  )
  x = normal(5, 8)
  return Program(
    *_linen(model, x),
    (x,),
    (
      dot('layers_0/kernel', (8, 9), (0,), (1,), 5, 0),
      dot('layers_2/kernel', (9, 2, 3), (0,), (1, 2), 5, 1),
      dot('layers_4/kernel', (2, 3, 7), (0, 1), (2,), 5, 2),
      dot('layers_6/kernel', (7, 2, 4), (0,), (1, 2), 5, 3),
    ),
  )


@program
def linen_attention():
  """Dropout by a key, which is an argument."""
  model = nn.MultiHeadDotProductAttention(2, qkv_features=6, dropout_rate=0.5)

  def fn(p, x, key, deterministic):
    return model.apply(
      {'params': p}, x, deterministic=deterministic, rngs={'dropout': key}
    )

  x = normal(2, 5, 8)
  _, params = _linen(model, x, deterministic=True)
  qkv = lambda name, i: dot(f'{name}/kernel', (8, 2, 3), (0,), (1, 2), 10, i)
  return Program(
    fn,
    params,
    (x, jax.random.key(1), False),
    (
      qkv('query', 0),
      qkv('key', 1),
      qkv('value', 2),
      dot('out/kernel', (2, 3, 8), (0, 1), (2,), 10, 3),
    ),
  )


@program
def linen_convs():
  """1D, 2D and 3D, and statistics that change."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Conv(6, (3,), strides=2, padding='SAME')(x)
      x = nn.BatchNorm(use_running_average=False)(x)
      x = nn.Conv(5, (2, 2), padding='VALID', kernel_dilation=2)(
        x.reshape(2, 2, 4, 6).repeat(2, axis=1)
      )
      x = nn.Conv(7, (1, 2, 1), padding=1)(x[:, None])
      return x

  x = normal(2, 16, 3)
  variables = jax.eval_shape(Model().init, jax.random.key(0), x)
  stats = jax.tree.map(
    lambda x: jnp.ones(x.shape, x.dtype), variables['batch_stats']
  )

  def fn(p, stats, x):
    variables = {'params': p, 'batch_stats': stats}
    return Model().apply(variables, x, mutable=['batch_stats'])

  return Program(
    fn,
    variables['params'],
    (stats, x),
    (
      conv('Conv_0/kernel', (3, 3, 6), (0, 1), (2,), 16, 0),
      conv('Conv_1/kernel', (2, 2, 6, 5), (0, 1, 2), (3,), 2 * 2 * 2, 1),
      conv('Conv_2/kernel', (1, 2, 1, 5, 7), (0, 1, 2, 3), (4,), 2 * 36, 2),
    ),
  )


@program
def linen_grouped_convs():
  model = nn.Sequential(
    [
      nn.Conv(14, (3,), feature_group_count=2),
      nn.tanh,
      nn.Conv(42, (4,), feature_group_count=14),
    ]
  )
  x = normal(2, 5, 6)
  return Program(
    *_linen(model, x),
    (x,),
    (
      conv('layers_0/kernel', (3, 3, 14), (0, 1), (2,), 10, 0, blocks=2),
      conv('layers_2/kernel', (4, 1, 42), (0, 1), (2,), 10, 1, blocks=14),
    ),
  )


@program
def linen_transposed_conv():
  model = nn.ConvTranspose(5, (3,), strides=(2,))
  x = normal(2, 4, 6)
  return Program(
    *_linen(model, x),
    (x,),
    (conv('kernel', (3, 6, 5), (0, 1), (2,), 16),),
  )


class _Block(nn.Module):
  features: int

  @nn.compact
  def __call__(self, x, _=None):
    return jnp.tanh(nn.Dense(self.features, dtype=jnp.bfloat16)(x)), None


@program
def linen_remat_scan():
  """`nn.scan` of `nn.remat`, computing in bfloat16 on float32 parameters."""
  model = nn.scan(
    nn.remat(_Block, policy=jax.checkpoint_policies.dots_saveable),
    variable_axes={'params': 0},
    split_rngs={'params': True},
    length=3,
  )(8)
  x = normal(5, 8).astype(jnp.bfloat16)
  return Program(
    *_linen(model, x),
    (x,),
    (dot('Dense_0/kernel', (3, 8, 8), (1,), (2,), 5, batch=(0,)),),
  )


@program
def linen_scan_last():
  """A stack whose axis is not the first: each step sees what it would."""
  model = nn.scan(
    _Block,
    variable_axes={'params': 1},
    split_rngs={'params': True},
    length=3,
  )(8)
  x = normal(5, 8).astype(jnp.bfloat16)
  return Program(
    *_linen(model, x),
    (x,),
    (dot('Dense_0/kernel', (8, 3, 8), (0,), (2,), 5, batch=(1,)),),
  )


@program
def linen_rnn():
  """A kernel of a recurrent cell sees every step's tokens."""
  model = nn.RNN(nn.SimpleCell(6))
  x = normal(2, 5, 4)
  return Program(
    *_linen(model, x),
    (x,),
    (
      dot('cell/i/kernel', (4, 6), (0,), (1,), 10, 0),
      dot('cell/h/kernel', (6, 6), (0,), (1,), 10, 1),
    ),
  )


# Other libraries.


@program
def nnx_module():
  """Functional, by `nnx.split` and `nnx.merge`; its statistics change."""

  class Model(nnx.Module):
    def __init__(self, rngs):
      self.conv = nnx.Conv(3, 6, (3,), padding='SAME', rngs=rngs)
      self.norm = nnx.BatchNorm(6, rngs=rngs)
      self.dense = nnx.LinearGeneral(6, (2, 5), rngs=rngs)
      self.out = nnx.Linear(5, 7, rngs=rngs)

    def __call__(self, x):
      return self.out(jnp.tanh(self.dense(self.norm(self.conv(x)))))

  model = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
  graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  stats = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), stats)

  def fn(params, stats, x):
    model = nnx.merge(graph, params, stats)
    return model(x), nnx.state(model, nnx.BatchStat)

  return Program(
    fn,
    params,
    (stats, normal(2, 4, 3)),
    (
      conv('conv/kernel/value', (3, 3, 6), (0, 1), (2,), 8, 0),
      dot('dense/kernel/value', (6, 2, 5), (0,), (1, 2), 8, 1),
      dot('out/kernel/value', (5, 7), (0,), (1,), 16, 2),
    ),
  )


@program
def equinox_module():
  """Weights (out, in) and OIHW, functions among the leaves, `vmap`."""
  eqx = pytest.importorskip('equinox')

  class Model(eqx.Module):
    conv: eqx.nn.Conv2d
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
      self.conv = eqx.nn.Conv2d(4, 6, 2, stride=2, groups=2, key=key)
      self.attention = eqx.nn.MultiheadAttention(2, 6, key=key)
      self.mlp = eqx.nn.MLP(6, 5, 7, 1, key=key)

    def __call__(self, x):
      x = jnp.tanh(self.conv(x)).reshape(6, 4).T
      return jax.vmap(self.mlp)(self.attention(x, x, x))

  weight = lambda name, n, i: dot(
    f'attention/{name}_proj/weight', (6, 6), (1,), (0,), n, i
  )
  return Program(
    lambda model, xs: jax.vmap(model)(xs),
    eqx.filter_eval_shape(Model, jax.random.key(0)),
    (normal(5, 4, 4, 4),),
    (
      conv('conv/weight', (6, 2, 2, 2), (1, 2, 3), (0,), 20, 0, blocks=2),
      weight('query', 20, 1),
      weight('key', 20, 2),
      weight('value', 20, 3),
      weight('output', 20, 4),
      dot('mlp/layers/0/weight', (7, 6), (1,), (0,), 20, 5),
      dot('mlp/layers/1/weight', (5, 7), (1,), (0,), 20, 6),
    ),
  )


@program
def haiku_transform():
  hk = pytest.importorskip('haiku')

  def forward(x):
    x = jax.nn.relu(hk.Conv2D(5, 3, stride=2)(x))
    return hk.nets.MLP([6, 4])(hk.Flatten()(x))

  model = hk.without_apply_rng(hk.transform(forward))
  x = normal(2, 4, 4, 3)
  name = 'mlp/~/linear_'
  return Program(
    model.apply,
    jax.eval_shape(model.init, jax.random.key(0), x),
    (x,),
    (
      conv('conv2_d/w', (3, 3, 3, 5), (0, 1, 2), (3,), 8, 0),
      dot(f'{name}0/w', (20, 6), (0,), (1,), 2, 1),
      dot(f'{name}1/w', (6, 4), (0,), (1,), 2, 2),
    ),
  )


# Programs with kernels that cannot be low-rank.


def _odd(fn, params, args, reasons, layers=(), low_rank=(), **kwargs):
  """By default every kernel of two axes is low-rank, (in, out)."""
  if not low_rank:
    low_rank = tuple(
      dot(path, x.shape, tuple(range(x.ndim - 1)), (x.ndim - 1,), 0)
      for path, x in params.items()
      if x.ndim > 1
    )
  return Program(fn, params, args, tuple(layers), reasons, low_rank, **kwargs)


@odd
def tied_embedding():
  def fn(p, tokens):
    x = jnp.tanh(p['embedding'][tokens] + p['position'])
    return jnp.tanh(x @ p['w']) @ p['embedding'].T

  return _odd(
    fn,
    shapes(embedding=(7, 6), w=(6, 6), position=(3, 6)),
    (np.array([[1, 2, 3], [5, 5, 0]]),),
    {
      'embedding': 'consumed by gather',
      'position': 'consumed by broadcast_in_dim|consumed by add',
    },
    [dot('w', (6, 6), (0,), (1,), 6)],
  )


@odd
def tied_by_transposition():
  return _odd(
    lambda p, x: jnp.tanh(x @ p['w']) @ p['w'].T,
    shapes(w=(8, 6)),
    (normal(5, 8),),
    {'w': 'used in different roles'},
  )


@odd
def tied_blocks():
  """In blocks, from both sides: x W, and y W^T."""
  layer = dot('w', (8, 18), (0,), (1,), 0)
  return _odd(
    lambda p, x: jnp.tanh(x @ p['w']) @ p['w'].T,
    shapes(w=(8, 18)),
    (normal(5, 8),),
    {'w': 'used in different roles'},
    low_rank=oialr.split([layer], {'w': 3}),
  )


@odd
def scanned_blocks():
  """A scan over the blocks of one kernel."""

  def fn(p, x):
    add = lambda total, w: (total + jnp.tanh(x @ w), None)
    columns = p['columns'].reshape(8, 3, 6).transpose(1, 0, 2)
    total, _ = lax.scan(add, jnp.zeros((5, 6)), columns)
    add = lambda total, w: (total + jnp.tanh(x @ w.T), None)
    return lax.scan(add, total, p['out_in'].reshape(3, 6, 8))[0]

  layers = (
    dot('columns', (8, 18), (0,), (1,), 0),
    dot('out_in', (18, 8), (1,), (0,), 0),
  )
  return _odd(
    fn,
    shapes(columns=(8, 18), out_in=(18, 8)),
    (normal(5, 8),),
    {
      'columns': 'axis 1 has parts in different roles',
      'out_in': 'axis 0 has parts in different roles',
    },
    low_rank=oialr.split(layers, {'': 3}),
  )


@odd
def depthwise_without_multiplier():
  """And groups that are not those of the kernel's memory, or of the batch.

  And a kernel that only a transposition would make a column.
  """

  def fn(p, x):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    convolve = lambda x, w, **groups: lax.conv_general_dilated(
      x, w, (1, 1), 'SAME', dimension_numbers=numbers, **groups
    )
    merged = lambda w: w.swapaxes(-1, -2).reshape(*w.shape[:3], -1)
    return (
      convolve(x, p['depthwise'], feature_group_count=4),
      convolve(x, merged(p['shuffled']), feature_group_count=2),
      convolve(jnp.tile(x, 3), merged(p['last']), feature_group_count=6),
      convolve(x, p['batch'], batch_group_count=2),
      convolve(x[..., :1], p['scale']),
    )

  low_rank = (
    conv('depthwise', (3, 3, 1, 4), (0, 1, 2), (3,), 0),
    conv('shuffled', (1, 3, 2, 2, 3), (0, 1, 2), (3, 4), 0),
    conv('last', (1, 3, 2, 4, 3), (0, 1, 2), (3,), 0, batch=(4,), blocks=2),
    conv('batch', (1, 3, 4, 6), (0, 1, 2), (3,), 0),
    conv('scale', (1, 1, 1, 6), (3,), (0, 1, 2), 0),
  )
  return _odd(
    fn,
    {layer.path: Shape(layer.shape, jnp.float32) for layer in low_rank},
    (normal(2, 5, 3, 4),),
    {
      'depthwise': 'a matrix of 9 x 1 in each of 4 groups has no rank',
      'shuffled': '2 groups of channels made of several axes',
      'last': '6 groups of channels made of several axes',
      'batch': 'a convolution of groups of the batch',
      'scale': 'a matrix of 1 x 6 has no rank',
    },
    low_rank=low_rank,
  )


@odd
def turned_kernel():
  """The transpose of a convolution: its kernel is reversed."""
  model = nn.ConvTranspose(5, (3,), strides=(2,), transpose_kernel=True)
  x = normal(2, 4, 6)
  layer = conv('kernel', (3, 5, 6), (0, 2), (1,), 0)
  return _odd(
    *_linen(model, x),
    (x,),
    {'kernel': 'consumed by rev'},
    low_rank=(layer,),
  )


@odd
def routed():
  """Experts that are looked up, and weights rounded straight through."""

  @jax.custom_vjp
  def rounded(w):
    return jnp.round(8 * w) / 8

  rounded.defvjp(lambda w: (rounded(w), None), lambda _, g: (g,))

  def fn(p, x):
    best = jnp.argmax(x @ rounded(p['router']))
    return jnp.tanh(x @ p['experts'][best % 3]) @ rounded(p['rounded'])

  layers = (
    dot('experts', (3, 8, 6), (1,), (2,), 0, batch=(0,)),
    dot('rounded', (6, 7), (0,), (1,), 0),
  )
  return _odd(
    fn,
    shapes(router=(8, 3), experts=(3, 8, 6), rounded=(6, 7)),
    (normal(5, 8),),
    {
      'router': 'consumed by',
      'experts': 'consumed by (gather|dynamic_slice)',
      'rounded': 'consumed by',
    },
    low_rank=layers,
  )


@odd
def stack_as_channels():
  """A stack of low-rank kernels that one convolution sees as one kernel."""

  def fn(p, x):
    return lax.conv_general_dilated(
      x,
      p['w'].transpose(1, 2, 0, 3).reshape(3, 4, 10),
      (1,),
      'SAME',
      dimension_numbers=('NWC', 'WIO', 'NWC'),
    )

  return _odd(
    fn,
    shapes(w=(2, 3, 4, 5)),
    (normal(2, 6, 4),),
    {},
    [conv('w', (2, 3, 4, 5), (1, 2), (0, 3), 12)],
    low_rank=(oialr.Layer('w', (2, 3, 4, 5), (1, 2), (3,), (0,), 'conv'),),
  )


@odd
def standardised():
  """Weight standardisation, spectral scaling, masks, low-rank additions."""

  def fn(p, x):
    x = jnp.tanh(x @ jax.nn.standardize(p['standardised'], axis=0))
    x = jnp.tanh(x @ (p['scaled'] / jnp.linalg.norm(p['scaled'])))
    image = lax.conv_general_dilated(
      x.reshape(1, 5, 2, 4),
      jax.nn.standardize(p['conv'], axis=(0, 1, 2)),
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return image, x @ (p['adapted'] + 0.1 * p['down'] @ p['up'])

  reasons = {
    'standardised': 'consumed by ',
    'scaled': 'consumed by ',
    'conv': 'consumed by ',
    'adapted': 'consumed by add',
    'down': 'consumed by mul',
  }
  return _odd(
    fn,
    shapes(
      standardised=(8, 8),
      scaled=(8, 8),
      conv=(2, 3, 4, 5),
      adapted=(8, 6),
      down=(8, 2),
      up=(2, 6),
    ),
    (normal(5, 8),),
    reasons,
    [dot('up', (2, 6), (0,), (1,), 8)],
    (
      dot('standardised', (8, 8), (0,), (1,), 0),
      dot('scaled', (8, 8), (0,), (1,), 0),
      conv('conv', (2, 3, 4, 5), (0, 1, 2), (3,), 0),
    ),
  )


@odd
def linen_weight_norm():
  model = nn.Sequential(
    [nn.WeightNorm(nn.Conv(6, (3,))), nn.tanh, nn.WeightNorm(nn.Dense(7))]
  )
  x = normal(2, 5, 4)
  fn, params = _linen(model, x)
  layers = (
    conv('layers_0/layer_instance/kernel', (3, 4, 6), (0, 1), (2,), 0),
    dot('layers_2/layer_instance/kernel', (6, 7), (0,), (1,), 0),
  )
  reasons = {layer.path: 'consumed by ' for layer in layers}
  return _odd(fn, params, (x,), reasons, low_rank=layers)


@odd
def learned_latents():
  """Parameters multiplied with each other, or convolved."""

  def fn(p, x):
    scores = x @ jnp.tanh(p['latents'] @ p['w']).T
    image = lax.conv(p['image'][None], x[None, :, :3].T[..., :2], (1,), 'SAME')
    return scores, image

  return _odd(
    fn,
    shapes(latents=(6, 8), w=(8, 4), image=(5, 4)),
    (normal(5, 4),),
    {
      'latents': 'multiplied with another parameter',
      'w': 'multiplied with another parameter',
      'image': 'consumed by broadcast_in_dim|convolved as an image',
    },
  )


@odd
def carried():
  """Kernels that a scan changes, takes apart or hands back."""

  def fn(p, x):
    body = lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1] * 0.5), None)
    (x, _), _ = lax.scan(body, (x, p['carried']), None, length=2)
    return lax.scan(lambda x, p: (x + p['row'], p['back'].T), x, p['xs'])

  low_rank = (
    dot('carried', (8, 8), (0,), (1,), 0),
    dot('xs/row', (3, 8), (0,), (1,), 0),
    dot('xs/back', (3, 4, 6), (1,), (2,), 0, batch=(0,)),
  )
  return _odd(
    fn,
    shapes(carried=(8, 8)) | {'xs': shapes(row=(3, 8), back=(3, 4, 6))},
    (normal(5, 8),),
    {
      'carried': 'carried through a scan',
      'xs/row': 'consumed by',
      'xs/back': 'returned by the body of a scan',
    },
    low_rank=low_rank,
  )


@odd
def looped():
  def fn(p, x):
    return lax.while_loop(
      lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] @ p['w']), (0, x)
    )

  return _odd(
    fn,
    shapes(w=(8, 8)),
    (normal(5, 8),),
    {'w': 'consumed by while'},
    has_gradient=False,
  )


@odd
def not_matrices():
  """Unused, returned, sliced, of mixed roles, of rank one, of other types."""

  def fn(p, x):
    mixed = jnp.einsum('ta,abc->tbc', x, p['mixed'].reshape(8, 2, 6))
    mixed = jnp.einsum('tbc,bd->tdc', mixed, jnp.ones((2, 2)))
    halves = jnp.einsum('tab,ac->tbc', x.reshape(5, 2, 4), p['halves'][:2])
    parts = jnp.einsum('ta,ab->tb', x[:, :4], p['parts'].reshape(4, 16))
    return (
      mixed,
      halves,
      parts,
      x @ p['column'],
      x @ p['integers'].astype(x.dtype),
      x @ p['rounded'].astype(jnp.int8).astype(x.dtype),
      x @ p['coarse'].astype(jnp.int4).astype(x.dtype),
      jnp.abs(x @ p['complex']),
      p['returned'],
      lax.cond(x[0, 0] > 9, lambda w: w, jnp.transpose, p['chosen']),
    )

  params = shapes(
    mixed=(8, 12),
    halves=(4, 6),
    parts=(8, 8),
    column=(8, 1),
    rounded=(8, 8),
    coarse=(8, 8),
    returned=(8, 8),
    chosen=(8, 8),
    unused=(8, 8),
  )
  low_rank = tuple(
    dot(path, x.shape, (0,), (1,), 0)
    for path, x in params.items()
    if path not in ('column', 'unused')
  )
  params |= shapes(jnp.int32, integers=(8, 4))
  params |= shapes(jnp.complex64, complex=(8, 4))
  return _odd(
    fn,
    params,
    (normal(5, 8),),
    {
      'halves': 'consumed by',
      'parts': 'axis 0 has parts in different roles',
      'column': '8 x 1 has no rank',
      'integers': 'int32 is not real',
      'rounded': 'consumed by convert_element_type',
      'coarse': 'consumed by convert_element_type',
      'complex': 'complex64 is not real',
      'returned': 'returned as it is',
      'chosen': 'returned by a branch',
      'unused': 'not used by the function',
    },
    [
      dataclasses.replace(
        dot('mixed', (8, 12), (0,), (1,), 5), before_head=True
      )
    ],
    low_rank,
  )
