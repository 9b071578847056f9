"""What tests of the vision models share.

Layers written out in NumPy, in float64; values for variables; runs of a model.
"""

import inspect

import flax
import jax
import numpy as np
from scipy import special


def values(shapes, seed=0, size=1.0):
  """Random variables in the place of shapes: nothing is zero, or one.

  Kernels keep the size of activations, scales are around one; then all is
  multiplied by size. With a small one, the epsilon of norms matters.
  """
  rng = np.random.default_rng(seed)
  flat = flax.traverse_util.flatten_dict(shapes)
  for path, leaf in flat.items():
    x = rng.standard_normal(leaf.shape)
    if path[-1] == 'kernel':
      x /= np.sqrt(np.prod(leaf.shape[:-1]))
    elif path[-1] == 'scale':
      x = 1 + 0.3 * x
    elif path[-1] == 'var':
      x = 0.5 + x**2
    flat[path] = (size * x).astype(leaf.dtype)
  return flax.traverse_util.unflatten_dict(flat)


def variables(model, *inputs, seed=0, size=1.0):
  """Random variables of a model; see `values`."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  return values(shapes, seed, size)


def jit(fn):
  """`jax.jit` of a function of a model."""
  names = [
    n for n in ('model', 'train') if n in inspect.signature(fn).parameters
  ]
  return jax.jit(fn, static_argnames=names)


@jit
def init(model, x, seed=0):
  """Initial parameters, by their paths."""
  params = model.init(jax.random.key(seed), x)['params']
  return flax.traverse_util.flatten_dict(params, sep='/')


@jit
def run(model, variables, x, train=False, seed=0):
  """What the model returns."""
  rngs = {'dropout': jax.random.key(seed)} if train else {}
  return model.apply(variables, x, train, rngs=rngs)


@jit
def captured(model, variables, x, train=False, seed=0):
  """What its submodules return, of each call: 'blocks_0/attn/__call__'."""
  rngs = {'dropout': jax.random.key(seed)} if train else {}
  _, state = model.apply(
    variables,
    x,
    train,
    rngs=rngs,
    capture_intermediates=True,
    mutable=['intermediates'],
  )
  return flax.traverse_util.flatten_dict(state['intermediates'], sep='/')


def check_close(out, expected):
  """Errors are small beside the largest entry."""
  largest = abs(expected).max()
  np.testing.assert_allclose(out / largest, expected / largest, atol=1e-5)


def dropped(x):
  """Which examples are zero."""
  return np.asarray(x == 0).all(tuple(range(1, x.ndim)))


def check_dropout(out, expected, rate):
  """Each entry is zero, or rescaled; the share of zeros is the rate."""
  zero = np.asarray(out == 0)
  assert abs(zero.mean() - rate) < 0.03
  np.testing.assert_allclose(
    out[~zero], expected[~zero] / (1 - rate), rtol=1e-5
  )


def images(*shape, seed=1):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def dense(p, x):
  return x @ p['kernel'] + p.get('bias', 0.0)


def layer_norm(p, x):
  mean = x.mean(-1, keepdims=True)
  var = ((x - mean) ** 2).mean(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + 1e-6) * p['scale'] + p['bias']


def gelu(x):
  return x / 2 * (1 + special.erf(x / np.sqrt(2)))


def mlp(p, x):
  return dense(p['fc2'], gelu(dense(p['fc1'], x)))


def conv(p, x, *, stride=1, padding=0):
  """A convolution in the sense of networks, one output pixel after the other.

  A kernel `[height, width, 1, channels]` on more channels than one is
  depthwise.
  """
  kernel = p['kernel']
  h, w, rows, cols = kernel.shape
  x = np.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
  n, height, width, channels = x.shape
  depthwise = rows == 1 and channels > 1
  equation = 'nhwc,hwc->nc' if depthwise else 'nhwi,hwio->no'
  kernel = kernel[:, :, 0] if depthwise else kernel
  out = np.empty(
    (n, (height - h) // stride + 1, (width - w) // stride + 1, cols)
  )
  for i, j in np.ndindex(out.shape[1:3]):
    window = x[:, i * stride : i * stride + h, j * stride : j * stride + w]
    out[:, i, j] = np.einsum(equation, window, kernel)
  return out + p.get('bias', 0.0)


def patches(p, x):
  """Tokens: row after row of patches, projected."""
  size = p['kernel'].shape[0]
  n, height, width, _ = x.shape
  tokens = [
    x[:, i : i + size, j : j + size].reshape(n, -1)
    for i in range(0, height, size)
    for j in range(0, width, size)
  ]
  kernel = p['kernel'].reshape(-1, p['kernel'].shape[-1])
  return np.stack(tokens, 1) @ kernel + p['bias']
