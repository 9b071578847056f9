"""Tests of ResNets: timm's names and shapes, and its arithmetic in NumPy.

The reference has the names and layouts of PyTorch, so that the conversion is
tested along with the model. It computes in float64.
"""

import dataclasses
import functools
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import models
from oialr_jax.models import convert
from oialr_jax.models import resnet
from tests import oracles

_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Net:
  """The sizes of a network, as `resnet.ResNet` takes them."""

  num_classes: int = 1000
  depths: tuple[int, ...] = (3, 4, 6, 3)
  bottleneck: bool = True
  width: int = 64
  stem: str = 'conv7'
  avg_down: bool = False
  se_ratio: float = 0.0

  @property
  def expansion(self) -> int:
    return 4 if self.bottleneck else 1

  @property
  def blocks(self):
    """(name, input channels, channels, stride) of every block."""
    inputs = self.width
    for stage, depth in enumerate(self.depths, 1):
      channels = self.width * 2 ** (stage - 1)
      for i in range(depth):
        stride = 2 if stage > 1 and i == 0 else 1
        yield f'layer{stage}.{i}', inputs, channels, stride
        inputs = channels * self.expansion


_RS = dict(stem='deep', avg_down=True, se_ratio=0.25)
_BASIC = dict(depths=(2, 2, 2, 2), bottleneck=False)
# With the numbers of entries of the state dicts: 5 a batch norm, 1 a
# convolution, 4 a squeeze-excitation, 2 the head.
NETS = {
  'resnet18': (Net(**_BASIC), 20 * 6 + 2),
  'resnet18_cifar': (Net(10, **_BASIC, stem='conv3'), 20 * 6 + 2),
  'resnet50': (Net(), 53 * 6 + 2),
  'resnetrs50': (Net(**_RS), 56 * 6 + 16 * 4 + 2),
  'resnetrs101': (
    Net(depths=(3, 4, 23, 3), **_RS),
    107 * 6 + 33 * 4 + 2,
  ),
}
_TINY = {
  'basic': Net(3, (2, 1), bottleneck=False, width=8, stem='conv3'),
  'bottleneck': Net(3, (2, 1), width=8),
  'rs': Net(3, (2, 1), width=16, **_RS),
}
# One side is odd and one is even in the stem, and again in the last stage.
_IMAGES = jax.ShapeDtypeStruct((3, 20, 23, 3), jnp.float32)


# Names, shapes and numbers.


def _conv_norm_shapes(conv, norm, out, inputs, size):
  shapes = {f'{conv}.weight': (out, inputs, size, size)}
  for entry in ('weight', 'bias', 'running_mean', 'running_var'):
    shapes[f'{norm}.{entry}'] = (out,)
  return shapes | {f'{norm}.num_batches_tracked': ()}


def _stem_shapes(net):
  n, half = net.width, net.width // 2
  if net.stem == 'deep':
    return (
      _conv_norm_shapes('conv1.0', 'conv1.1', half, 3, 3)
      | _conv_norm_shapes('conv1.3', 'conv1.4', half, half, 3)
      | _conv_norm_shapes('conv1.6', 'bn1', n, half, 3)
      | _conv_norm_shapes('maxpool.0', 'maxpool.1', n, n, 3)
    )
  size = {'conv7': 7, 'conv3': 3}[net.stem]
  return _conv_norm_shapes('conv1', 'bn1', n, 3, size)


def _block_shapes(net, name, inputs, channels, stride):
  out = channels * net.expansion
  convs = [(channels, inputs, 3), (channels, channels, 3)]
  if net.bottleneck:
    convs = [(channels, inputs, 1), (channels, channels, 3), (out, channels, 1)]
  shapes = {}
  for i, sizes in enumerate(convs, 1):
    shapes |= _conv_norm_shapes(f'{name}.conv{i}', f'{name}.bn{i}', *sizes)
  if net.se_ratio:
    inner = out // 4
    shapes |= {
      f'{name}.se.fc1.weight': (inner, out, 1, 1),
      f'{name}.se.fc1.bias': (inner,),
      f'{name}.se.fc2.weight': (out, inner, 1, 1),
      f'{name}.se.fc2.bias': (out,),
    }
  if stride > 1 or inputs != out:
    # The average pooling is a module too, the first of them.
    i = int(net.avg_down)
    down = f'{name}.downsample'
    names = f'{down}.{i}', f'{down}.{i + 1}'
    shapes |= _conv_norm_shapes(*names, out, inputs, 1)
  return shapes


def _shapes(net):
  """timm's state dict."""
  shapes = _stem_shapes(net)
  for block in net.blocks:
    shapes |= _block_shapes(net, *block)
  features = net.width * 2 ** (len(net.depths) - 1) * net.expansion
  return shapes | {
    'fc.weight': (net.num_classes, features),
    'fc.bias': (net.num_classes,),
  }


@pytest.mark.parametrize('name', NETS)
def test_the_state_dict_is_timms(name):
  net, entries = NETS[name]
  shapes = _shapes(net)
  assert len(shapes) == entries
  ours = convert.torch_names(name)
  counters = {n for n in shapes if n.endswith('num_batches_tracked')}
  assert ours == {n: s for n, s in shapes.items() if n not in counters}


@pytest.mark.parametrize(
  'name, entries',
  [
    (
      'resnet50',
      {
        'conv1': (64, 3, 7, 7),
        'bn1': (64,),
        'layer1.0.conv1': (64, 64, 1, 1),
        'layer1.0.conv2': (64, 64, 3, 3),
        'layer1.0.conv3': (256, 64, 1, 1),
        'layer1.0.bn3': (256,),
        'layer1.0.downsample.0': (256, 64, 1, 1),
        'layer1.0.downsample.1': (256,),
        'layer2.0.conv1': (128, 256, 1, 1),
        'layer2.0.conv2': (128, 128, 3, 3),
        'layer2.0.conv3': (512, 128, 1, 1),
        'layer2.0.downsample.0': (512, 256, 1, 1),
        'layer3.0.conv1': (256, 512, 1, 1),
        'layer3.0.downsample.0': (1024, 512, 1, 1),
        'layer4.0.conv2': (512, 512, 3, 3),
        'layer4.0.downsample.0': (2048, 1024, 1, 1),
        'layer4.2.conv1': (512, 2048, 1, 1),
        'fc': (1000, 2048),
      },
    ),
    (
      'resnetrs101',
      {
        'conv1.0': (32, 3, 3, 3),
        'conv1.1': (32,),
        'conv1.3': (32, 32, 3, 3),
        'conv1.4': (32,),
        'conv1.6': (64, 32, 3, 3),
        'bn1': (64,),
        'maxpool.0': (64, 64, 3, 3),
        'maxpool.1': (64,),
        'layer1.0.se.fc1': (64, 256, 1, 1),
        'layer1.0.se.fc2': (256, 64, 1, 1),
        'layer1.0.downsample.1': (256, 64, 1, 1),
        'layer1.0.downsample.2': (256,),
        'layer2.0.conv2': (128, 128, 3, 3),
        'layer2.0.downsample.1': (512, 256, 1, 1),
        'layer3.0.se.fc1': (256, 1024, 1, 1),
        'layer3.22.conv3': (1024, 256, 1, 1),
        'layer4.0.se.fc1': (512, 2048, 1, 1),
        'layer4.0.downsample.1': (2048, 1024, 1, 1),
        'fc': (1000, 2048),
      },
    ),
    (
      'resnet18',
      {
        'conv1': (64, 3, 7, 7),
        'layer1.0.conv1': (64, 64, 3, 3),
        'layer2.0.conv1': (128, 64, 3, 3),
        'layer2.0.downsample.0': (128, 64, 1, 1),
        'layer4.1.conv2': (512, 512, 3, 3),
        'fc': (1000, 512),
      },
    ),
  ],
)
def test_weights_of_the_stem_the_first_blocks_and_the_head(name, entries):
  """Written down, unlike those above."""
  ours = convert.torch_names(name)
  assert {n: ours[f'{n}.weight'] for n in entries} == entries


@pytest.mark.parametrize('channels, inner', [(16, 8), (40, 8), (52, 16)])
def test_the_inner_width_of_squeeze_excitation_is_rounded(channels, inner):
  """Its quarter, to a multiple of 8 and up from the middle, as in timm."""
  sizes = dict(depths=(1,), width=channels, se_ratio=0.25)
  names = convert.torch_names('resnet18', **sizes)
  assert names['layer1.0.se.fc1.weight'] == (inner, channels, 1, 1)
  assert names['layer1.0.se.fc2.weight'] == (channels, inner, 1, 1)


# Arithmetic.


def _conv(x, w, stride):
  """x `[batch, height, width, in]`, w `[out, in, size, size]`."""
  size = w.shape[-1]
  half = size // 2
  x = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
  out = lambda side: (side - size) // stride + 1
  h, w_ = out(x.shape[1]), out(x.shape[2])
  y = 0.0
  for i in range(size):
    for j in range(size):
      rows = slice(i, i + stride * (h - 1) + 1, stride)
      cols = slice(j, j + stride * (w_ - 1) + 1, stride)
      y = y + x[:, rows, cols] @ w[:, :, i, j].T
  return y


def _pool(x, size, stride, padding, reduce):
  """Over windows cut to the image, which start padding before it."""
  sides = [-(-n // stride) for n in x.shape[1:3]]
  y = np.empty((x.shape[0], *sides, x.shape[3]))
  starts = lambda i: (max(0, i * stride - padding), i * stride - padding + size)
  for i in range(sides[0]):
    for j in range(sides[1]):
      window = x[:, slice(*starts(i)), slice(*starts(j))]
      y[:, i, j] = reduce(window, axis=(1, 2))
  return y


_relu = lambda x: np.maximum(x, 0)


class Reference:
  """The network's forward pass over a state dict.

  Attributes:
    outputs: of every module that has weights, by its name.
    state: the state dict, with the running statistics after the pass.
    pixels: that each batch norm took its statistics from.
  """

  def __init__(self, net, state, train):
    self._net = net
    self._train = train
    self.state = {k: np.asarray(x, np.float64) for k, x in state.items()}
    self.outputs = {}
    self.pixels = {}

  def __call__(self, x):
    x = self._stem(x.astype(np.float64))
    for block in self._net.blocks:
      x = self.outputs[block[0]] = self._block(x, *block)
    return self._dense('fc', x.mean((1, 2)))

  def _stem(self, x):
    if self._net.stem == 'deep':
      x = _relu(self._norm('conv1.1', self._conv('conv1.0', x, 2)))
      x = _relu(self._norm('conv1.4', self._conv('conv1.3', x)))
      x = _relu(self._norm('bn1', self._conv('conv1.6', x)))
      return _relu(self._norm('maxpool.1', self._conv('maxpool.0', x, 2)))
    stride = 2 if self._net.stem == 'conv7' else 1
    x = _relu(self._norm('bn1', self._conv('conv1', x, stride)))
    return x if stride == 1 else _pool(x, 3, 2, 1, np.max)

  def _block(self, x, name, inputs, channels, stride):
    strides = (1, stride, 1) if self._net.bottleneck else (stride, 1)
    y = x
    for i, s in enumerate(strides, 1):
      y = self._conv(f'{name}.conv{i}', y, s)
      y = self._norm(f'{name}.bn{i}', y)
      y = _relu(y) if i < len(strides) else y
    if self._net.se_ratio:
      y = self.outputs[f'{name}.se'] = self._squeeze_excite(f'{name}.se', y)
    if stride > 1 or inputs != channels * self._net.expansion:
      x = self._downsample(f'{name}.downsample', x, stride)
    return _relu(x + y)

  def _squeeze_excite(self, name, x):
    gate = _relu(self._dense(f'{name}.fc1', x.mean((1, 2), keepdims=True)))
    gate = self._dense(f'{name}.fc2', gate)
    return x / (1 + np.exp(-gate))

  def _downsample(self, name, x, stride):
    if not self._net.avg_down:
      return self._norm(f'{name}.1', self._conv(f'{name}.0', x, stride))
    if stride > 1:
      x = _pool(x, 2, 2, 0, np.mean)
    return self._norm(f'{name}.2', self._conv(f'{name}.1', x))

  def _conv(self, name, x, stride=1):
    y = self.outputs[name] = _conv(x, self.state[f'{name}.weight'], stride)
    return y

  def _dense(self, name, x):
    w = self.state[f'{name}.weight']
    y = x @ w.reshape(w.shape[:2]).T + self.state[f'{name}.bias']
    self.outputs[name] = y
    return y

  def _norm(self, name, x):
    mean = self.state[f'{name}.running_mean']
    var = self.state[f'{name}.running_var']
    if self._train:
      batch = x.reshape(-1, x.shape[-1])
      self.pixels[name] = len(batch)
      move = lambda old, new: 0.9 * old + 0.1 * new
      self.state[f'{name}.running_mean'] = move(mean, batch.mean(0))
      self.state[f'{name}.running_var'] = move(var, batch.var(0, ddof=1))
      mean, var = batch.mean(0), batch.var(0)
    y = (x - mean) / np.sqrt(var + _EPSILON)
    y = y * self.state[f'{name}.weight'] + self.state[f'{name}.bias']
    self.outputs[name] = y
    return y


def _state(net, seed=0):
  """A random state dict."""
  rng = np.random.default_rng(seed)
  state = {}
  for name, shape in _shapes(net).items():
    x = rng.normal(size=shape)
    if len(shape) > 1:
      x *= np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith('running_var'):
      x = np.exp(0.3 * x)
    elif name.endswith('.weight'):
      x = 1 + 0.3 * x
    state[name] = np.float32(x)
  return state


def _model(net, **options):
  return resnet.ResNet(**dataclasses.asdict(net), **options)


def _variables(net, state):
  """Flax's variables of a state dict."""
  sizes = dataclasses.asdict(net)
  return convert.from_torch('resnet50', state, inputs=[_IMAGES], **sizes)


def _torch_named(tree):
  """The leaves by their paths, as PyTorch writes those of modules."""
  named = {}
  for path, x in oialr.tree.flatten(tree).items():
    name = re.sub(r'_(\d+)(?=/|$)', r'.\1', path.removesuffix('__call__/0'))
    named[name.strip('/').replace('/', '.')] = x
  return named


def _apply(model, variables, x, train=False):
  """Logits, outputs of the modules and batch statistics, by PyTorch's names."""
  logits, new = model.apply(
    variables,
    x,
    train,
    rngs={'dropout': jax.random.key(0)} if train else {},
    capture_intermediates=True,
    mutable=['intermediates', 'batch_stats'],
  )
  return logits, *map(_torch_named, (new['intermediates'], new['batch_stats']))


_run = oracles.jit(_apply)


@functools.cache
def _both(name, train):
  """What the reference and the model make of the same images in float64."""
  net, x = _TINY[name], oracles.images(*_IMAGES.shape).astype(np.float64)
  reference = Reference(net, _state(net), train)
  logits = reference(x)
  with jax.enable_x64(True):
    variables = oracles.float64(_variables(net, _state(net)))
    model = _model(net, dtype=jnp.float64, param_dtype=jnp.float64)
    ours = _run(model, variables, x, train)
    return reference, logits, jax.device_get(ours)


_assert_close = functools.partial(
  np.testing.assert_allclose, rtol=1e-9, atol=1e-9
)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('name', _TINY)
def test_every_module_computes_what_timms_does(name, train):
  reference, wanted, (logits, outputs, _) = _both(name, train)
  for module, y in reference.outputs.items():
    _assert_close(outputs[module], y, err_msg=module)
  _assert_close(logits, wanted)


@pytest.mark.parametrize('name', _TINY)
def test_running_statistics_are_pytorchs_but_for_bessels_correction(name):
  reference, _, (_, _, stats) = _both(name, True)
  old = oracles.float64(_state(_TINY[name]))
  assert len(stats) == 2 * len(reference.pixels)
  for norm, n in reference.pixels.items():
    mean, var = f'{norm}.running_mean', f'{norm}.running_var'
    _assert_close(stats[f'{norm}.mean'], reference.state[mean])
    batch = reference.state[var] - 0.9 * old[var]
    biased = 0.9 * old[var] + batch * (n - 1) / n
    _assert_close(stats[f'{norm}.var'], biased)


@pytest.mark.parametrize('name', _TINY)
def test_evaluation_leaves_the_running_statistics_alone(name):
  reference, _, (_, _, stats) = _both(name, False)
  for path, x in stats.items():
    norm, _, statistic = path.rpartition('.')
    old = reference.state[f'{norm}.running_{statistic}']
    np.testing.assert_array_equal(x, old)


# Initial values, regularisation, types.


@pytest.mark.parametrize('name', _TINY)
def test_blocks_start_as_their_shortcuts(name):
  """The scale of their last batch norm is zero, those of others one."""
  net = _TINY[name]
  last = f'bn{3 if net.bottleneck else 2}/scale'
  params = oracles.init(_model(net), oracles.images(*_IMAGES.shape))
  scales = {path: x for path, x in params.items() if path.endswith('scale')}
  assert sum(path.endswith(last) for path in scales) == sum(net.depths)
  for path, x in scales.items():
    np.testing.assert_array_equal(x, 0 if path.endswith(last) else 1, path)


def test_initial_kernels_are_timms():
  """Normal of He's deviation; the head uniform within 1 / sqrt(inputs)."""
  net = Net(500, (1,), bottleneck=False, stem='conv3', se_ratio=0.25)
  params = oracles.init(_model(net), oracles.images(*_IMAGES.shape))
  deviation = lambda path: np.std(params[f'{path}/kernel'])
  he = lambda out, size: np.sqrt(2 / (out * size**2))
  close = functools.partial(np.testing.assert_allclose, rtol=0.1)
  close(deviation('conv1'), he(64, 3))
  close(deviation('layer1_0/conv1'), he(64, 3))
  close(deviation('layer1_0/se/fc1'), he(16, 1))
  close(deviation('layer1_0/se/fc2'), he(64, 1))
  head = np.abs(params['fc/kernel'])
  close(head.max(), 1 / 8)
  close(head.mean(), 1 / 16)
  # A normal distribution has a kurtosis of 3; cut at two deviations, 2.4.
  kernel = params['layer1_0/conv1/kernel']
  close(np.mean(kernel**4) / np.mean(kernel**2) ** 2, 3)


def test_drop_path_rises_linearly_over_all_blocks():
  rates = {}

  def note(call, args, kwargs, context):
    if isinstance(context.module, resnet.Block):
      rates[context.module.name] = context.module.drop_path
    return call(*args, **kwargs)

  model = _model(Net(3, (2, 1, 2), width=8), drop_path=0.2)
  with nn.intercept_methods(note):
    jax.eval_shape(model.init, jax.random.key(0), _IMAGES)
  names = 'layer1.0 layer1.1 layer2.0 layer3.0 layer3.1'.replace('.', '_')
  assert [*rates] == names.split()
  np.testing.assert_allclose([*rates.values()], [0, 0.05, 0.1, 0.15, 0.2])


def test_drop_path_drops_branches_and_not_shortcuts():
  """Of some examples; of the others the branch is scaled."""
  net = dataclasses.replace(_TINY['basic'], depths=(1, 1))
  model = _model(net, drop_path=0.25)
  x = oracles.images(64, 6, 6, 3)
  _, outputs, _ = _run(model, _variables(net, _state(net)), x, train=True)
  shortcut, branch = outputs['layer2.0.downsample.1'], outputs['layer2.0.bn2']
  is_ = lambda y: np.isclose(
    outputs['layer2.0'], nn.relu(y), rtol=1e-4, atol=1e-5
  ).all((1, 2, 3))
  kept, gone = is_(shortcut + branch / 0.75), is_(shortcut)
  np.testing.assert_array_equal(kept, ~gone)
  assert 8 <= gone.sum() <= 24


def test_dropout_is_in_front_of_the_head():
  net = dataclasses.replace(_TINY['basic'], num_classes=16)
  state = _state(net) | {
    'layer2.0.bn2.bias': np.full(16, 5.0),  # no feature is zero by itself
    'fc.weight': np.eye(16),
    'fc.bias': np.zeros(16),
  }
  x = oracles.images(256, 4, 4, 3)
  model, variables = _model(net, dropout=0.25), _variables(net, state)
  logits, outputs, _ = _run(model, variables, x, train=True)
  features = np.asarray(outputs['layer2.0']).mean((1, 2))
  oracles.check_dropout(np.asarray(logits), features, 0.25)


def test_published_models_have_the_published_dropout():
  assert models.create('resnet50').dropout == 0
  assert models.create('resnetrs50').dropout == 0.25
  assert models.create('resnetrs101').dropout == 0.25


@pytest.mark.parametrize('train', [False, True])
def test_modules_compute_in_dtype_but_for_head_and_statistics(train):
  model = _model(_TINY['rs'], dtype=jnp.bfloat16)
  variables = jax.eval_shape(model.init, jax.random.key(0), _IMAGES)
  out = jax.eval_shape(
    functools.partial(_apply, model, train=train), variables, _IMAGES
  )
  types = lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree)}
  logits, outputs, stats = out
  assert types([variables, logits, stats]) == {'float32'}
  assert types(outputs.pop('fc')) == types(outputs.pop('')) == {'float32'}
  assert types(outputs) == {'bfloat16'}


def test_parameters_are_of_their_type():
  model = _model(_TINY['rs'], param_dtype=jnp.bfloat16)
  variables = jax.eval_shape(model.init, jax.random.key(0), _IMAGES)
  types = lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree)}
  assert types(variables['params']) == {'bfloat16'}
  assert types(variables['batch_stats']) == {'float32'}


def test_training_in_factors_is_that_of_the_dense_model():
  """Logits, and the batch statistics, which other models do not have."""
  net = dataclasses.replace(_TINY['rs'], depths=(1, 1))
  model, variables = _model(net), _variables(net, _state(net))
  x = oracles.images(*_IMAGES.shape)

  def fn(params, stats, x):
    variables = {'params': params, 'batch_stats': stats}
    return model.apply(variables, x, True, mutable=['batch_stats'])

  args = variables['batch_stats'], x
  layers = oialr.find_layers(fn, variables['params'], *args)
  # Few, for each shape's SVD takes its time to compile.
  layers = oialr.select(layers, include='maxpool|layer2_0/(conv2|se)')
  params = oialr.to_lowrank(variables['params'], layers, rank=0.5)

  @oracles.jit
  def outputs(params, truncated, full, *args):
    return (
      oialr.factored(fn)(params, *args),
      fn(truncated, *args),
      fn(full, *args),
    )

  out, expected, full = outputs(
    params, oialr.to_dense(params), variables['params'], *args
  )
  jax.tree.map(oracles.check_close, out, expected)
  assert not np.allclose(expected[0], full[0], atol=1e-3)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'depths': ()}, r'depths=\(\): every stage needs a block'),
    ({'depths': (2, 0)}, r'depths=\(2, 0\): every stage needs a block'),
    ({'stem': 'conv5'}, r"stem='conv5': must be one of \('conv7', 'deep'"),
    ({'se_ratio': -0.1}, 'se_ratio=-0.1: must not be negative'),
  ],
)
def test_impossible_networks_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    resnet.ResNet(**options).init(jax.random.key(0), np.zeros((1, 8, 8, 3)))


def test_what_is_no_image_is_refused():
  with pytest.raises(ValueError, match=r'images of shape \(8, 8, 3\): pass'):
    resnet.ResNet().init(jax.random.key(0), np.zeros((8, 8, 3)))
