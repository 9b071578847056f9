"""Tests of exported models: read by others, checked, refused when damaged."""

import dataclasses
import functools
import hashlib
import itertools
import subprocess
import sys

import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

import oialr_jax as oialr
from oialr_jax import export
from oialr_jax import lowrank
from oialr_jax import models
from tests import kernels
from tests import programs

BATCHES = (1, 5)
FORMS = ('dense', 'compressed')

# A linen MLP, a CNN with batch statistics, a mini ViT; all of them small.
MODELS = {
  'mlp': (models.Mlp(widths=(48, 40)), (8, 8, 1)),
  'cnn': (
    models.MnistCnn(channels=(8, 12), width=24, batch_norm=True),
    (14, 14, 1),
  ),
  'vit': (
    models.create('mini_vit', embed_dim=48, depth=1, patch_size=4),
    (8, 8, 3),
  ),
}

# What another program does: it has neither this package nor what it builds on.
_RUN = """
import sys
sys.modules.update(dict.fromkeys(('oialr_jax', 'flax', 'optax')))
import pathlib
import jax
import numpy as np
import safetensors.numpy
for folder in map(pathlib.Path, sys.argv[1:]):
  outputs = {}
  for form in ('dense', 'compressed'):
    program = (folder / f'{form}.stablehlo').read_bytes()
    arrays = safetensors.numpy.load_file(folder / f'{form}.safetensors')
    for batch, x in np.load(folder / 'inputs.npz').items():
      y = jax.export.deserialize(program).call(arrays, x)
      outputs[f'{form} {batch}'] = y
  np.savez(folder / 'outputs.npz', **outputs)
"""

_REBUILD = """
import sys
sys.modules.update(dict.fromkeys(('oialr_jax', 'jax', 'ml_dtypes')))
import json
import numpy as np
import safetensors
with safetensors.safe_open(sys.argv[1], framework='np') as file:
  kernels = json.loads(file.metadata()['oialr_jax'])['kernels']
  rebuilt = {}
  for path, k in kernels.items():
    a, b = file.get_tensor(f'{path}/a'), file.get_tensor(f'{path}/b')
    n, rows, cols = k['matrix']
    w = a.reshape(n, rows, -1) @ b.reshape(n, -1, cols)
    w = w.reshape(k['split']).transpose(k['order']).reshape(k['shape'])
    rebuilt[path] = w
np.savez(sys.argv[2], **rebuilt)
"""

_UNDER_A_MESH = """
import sys
import jax
import numpy as np
from oialr_jax import export
jax.config.update('jax_num_cpu_devices', 8)
auto = jax.sharding.AxisType.Auto
with jax.set_mesh(jax.make_mesh((8,), ('data',), axis_types=(auto,))):
  params = {'w': np.ones((3, 4), 'f')}
  fn = jax.jit(lambda params, x: x @ params['w'])
  x = np.ones((8, 3), 'f')
  assert jax.export.export(fn)(params, x).nr_devices == 8
  export.write(sys.argv[1], fn, params, (x,))
"""


def fresh(script, *args):
  """Runs a script in an interpreter of its own."""
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', script, *map(str, args)],
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr


@functools.cache
def model(name):
  """A network, its variables' shapes, values as if trained, and images."""
  net, shape = MODELS[name]
  x = programs.normal(max(BATCHES), *shape)
  like = jax.eval_shape(net.init, jax.random.key(0), x)
  layers = oialr.find_layers(net.apply, like, x)
  layers = oialr.select(layers, min_rank=2)
  variables = jax.tree.map(np.abs, programs.values(like))  # some are variances
  low = programs.with_low_rank(
    variables, layers, lambda layer: layer.max_rank // 3, pruned=1
  )
  return net, like, low, x


def assert_same(actual, expected):
  """Equal bit for bit, types and structure included."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """All models as files, and the sizes that `write` returned."""
  folder, sizes = tmp_path_factory.mktemp('exported'), {}
  for name in MODELS:
    net, _, low, x = model(name)
    sizes[name] = export.write(folder / name, net.apply, low, (x[:2],))
  return folder, sizes


def test_files_run_in_a_fresh_process_without_this_package(written):
  folder, _ = written
  for name in MODELS:
    x = model(name)[-1]
    np.savez(folder / name / 'inputs.npz', **{f'{b}': x[:b] for b in BATCHES})
  fresh(_RUN, *(folder / name for name in MODELS))
  for name in MODELS:
    net, _, low, x = model(name)
    found = np.load(folder / name / 'outputs.npz')
    assert len(found.files) == len(FORMS) * len(BATCHES)
    trained = np.asarray(jax.jit(oialr.factored(net.apply))(low, x))
    limit = 1e-5 * np.abs(trained).max()
    assert limit > 1e-6
    for form, batch in itertools.product(FORMS, BATCHES):
      y = found[f'{form} {batch}']
      np.testing.assert_allclose(y, trained[:batch], rtol=0, atol=limit)


@pytest.mark.parametrize('name', MODELS)
def test_the_compressed_model_is_smaller_and_sizes_are_said(written, name):
  folder, sizes = written
  of = lambda form, kind: sizes[name][f'{form}.{kind}']
  assert of('compressed', 'safetensors') < 0.7 * of('dense', 'safetensors')
  # Programs hold no parameters.
  assert of('compressed', 'stablehlo') < 40_000 > of('dense', 'stablehlo')
  for file, size in sizes[name].items():
    assert (folder / name / file).stat().st_size == size


def test_the_sums_are_those_of_the_files(written):
  folder, sizes = written
  lines = (folder / 'mlp' / 'SHA256SUMS').read_text().splitlines()
  assert len(lines) == len(sizes['mlp']) == 4
  for line in lines:
    digest, name = line.split('  ')
    content = (folder / 'mlp' / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest


@pytest.mark.parametrize('form', FORMS)
def test_a_program_is_for_all_platforms_and_any_batch(written, form):
  folder, _ = written
  content = (folder / 'vit' / f'{form}.stablehlo').read_bytes()
  program = jax_export.deserialize(content)
  assert program.platforms == ('cpu', 'cuda', 'tpu')
  batch, *image = program.in_avals[-1].shape
  assert jax_export.is_symbolic_dim(batch) and image == [8, 8, 3]
  assert program.out_avals[0].shape == (batch, 10)


def test_dense_files_hold_the_original_models_parameters(written):
  folder, _ = written
  _, like, low, _ = model('cnn')
  loaded = export.load(folder / 'cnn' / 'dense.safetensors', like)
  assert_same(loaded, oialr.to_dense(low))
  arrays = safetensors_numpy.load_file(folder / 'cnn' / 'dense.safetensors')
  assert 'params/conv_0/kernel' in arrays and 'batch_stats/norm_0/var' in arrays


def test_compressed_files_are_loaded_as_factors(written):
  folder, _ = written
  _, like, low, _ = model('cnn')
  path = folder / 'cnn' / 'compressed.safetensors'
  loaded = export.load(path, like)
  assert_same(loaded, oialr.to_factors(oialr.compact(low)))
  assert isinstance(loaded['params']['hidden']['kernel'], oialr.Factors)
  by_path = export.load(path)
  assert_same(
    by_path['params/hidden/kernel'], loaded['params']['hidden']['kernel']
  )


def test_numpy_alone_multiplies_every_kind_of_kernel_out(tmp_path):
  low = _random_low_rank('float32')
  export.safetensors(tmp_path / 'x.safetensors', {'net': _two_factors(low)})
  fresh(_REBUILD, tmp_path / 'x.safetensors', tmp_path / 'rebuilt.npz')
  rebuilt = np.load(tmp_path / 'rebuilt.npz')
  assert {*rebuilt.files} == {f'net/{x.path}' for x in kernels.LAYERS}
  for layer in kernels.LAYERS:
    expected = kernels.product(low[layer.path], layer)
    assert kernels.error(rebuilt[f'net/{layer.path}'], expected) < 1e-6


def _random_low_rank(dtype):
  params = kernels.random_params(dtype=dtype)
  return programs.with_low_rank(params, kernels.LAYERS, lambda layer: 2)


def _two_factors(params):
  """What `to_factors` does, by NumPy, which compiles nothing."""

  def of(x):
    if not oialr.is_low_rank(x):
      return x
    u, s, _ = kernels.factors(x)
    a = kernels.array((u @ s).reshape(x.u.shape), x.dtype)
    return oialr.Factors(a, x.vt, x.view)

  return jax.tree.map(of, params, is_leaf=oialr.is_low_rank)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_what_is_loaded_is_what_was_written(tmp_path, dtype):
  dense = kernels.random_params(dtype=dtype)
  others = {'step': jnp.int32(3), 'empty': jnp.zeros((0, 3)), 'none': None}
  dense, low = dense | others, _random_low_rank(dtype) | others
  for params in (dense, low, _two_factors(low)):
    size = export.safetensors(tmp_path / 'x.safetensors', params)
    assert size == (tmp_path / 'x.safetensors').stat().st_size
    assert_same(export.load(tmp_path / 'x.safetensors', dense), params)


def test_parameters_may_be_one_kernel(tmp_path):
  file = tmp_path / 'x.safetensors'
  dense = programs.normal(12, 9)
  (layer,) = oialr.find_layers(lambda w, x: x @ w, dense, np.ones((4, 12)))
  low = oialr.to_lowrank(dense, [layer], rank=3)
  for params in (dense, low, _two_factors(low)):
    export.safetensors(file, params)
    assert_same(export.load(file, dense), params)
    assert [*export.load(file)] == ['']


def test_arrays_in_fortrans_order_are_written_as_they_are(tmp_path):
  params = {'w': np.asfortranarray(programs.normal(3, 4)).T[::2]}
  export.safetensors(tmp_path / 'x.safetensors', params)
  arrays = safetensors_numpy.load_file(tmp_path / 'x.safetensors')
  np.testing.assert_array_equal(arrays['w'], params['w'])


def test_nnx_modules_are_written_by_their_state(tmp_path):
  program = programs.PROGRAMS['nnx_module']()
  params = programs.with_low_rank(
    programs.values(program.params), program.layers, lambda layer: 1
  )
  stats, x = program.args
  # NNX changes its statistics: they have to be of the trace that calls it.
  fn = lambda params, x: program.fn(params, jax.tree.map(jnp.copy, stats), x)[0]
  export.write(tmp_path, fn, params, (x,))
  content = (tmp_path / 'compressed.stablehlo').read_bytes()
  arrays = safetensors_numpy.load_file(tmp_path / 'compressed.safetensors')
  assert 'conv/bias/value' in arrays and 'out/kernel/value/a' in arrays
  y = jax_export.deserialize(content).call(arrays, x)
  expected = fn(oialr.to_dense(params), x)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_equinox_modules_are_written_without_their_functions(tmp_path):
  eqx = pytest.importorskip('equinox')
  program = programs.PROGRAMS['equinox_module']()
  module = programs.values(program.params)
  low = programs.with_low_rank(module, program.layers, lambda x: 2)
  with pytest.raises(
    TypeError, match=r"'attention/dropout/p': a float .* leave it"
  ):
    export.write(tmp_path, program.fn, low, program.args)
  arrays, rest = eqx.partition(low, eqx.is_array)
  fn = lambda arrays, x: program.fn(eqx.combine(arrays, rest), x)
  export.write(tmp_path, fn, arrays, program.args)
  loaded = export.load(tmp_path / 'dense.safetensors', arrays)
  assert_same(loaded, oialr.to_dense(arrays))


def test_under_a_mesh_too_a_program_is_for_one_device(tmp_path):
  fresh(_UNDER_A_MESH, tmp_path)
  for path in tmp_path.glob('*.stablehlo'):
    assert jax_export.deserialize(path.read_bytes()).nr_devices == 1


def test_inputs_and_outputs_may_be_trees(tmp_path):
  fn = lambda params, x: {'sum': x['a'] + x['b'], 'of': (x['a'] @ params['w'],)}
  x = {'a': programs.normal(2, 3), 'b': programs.normal(2, 3)}
  export.write(tmp_path, fn, {'w': programs.normal(3, 4)}, (x,))
  content = (tmp_path / 'dense.stablehlo').read_bytes()
  arrays = safetensors_numpy.load_file(tmp_path / 'dense.safetensors')
  y = jax_export.deserialize(content).call(arrays, x)
  np.testing.assert_allclose(y['of'][0], x['a'] @ arrays['w'], rtol=1e-5)


def test_low_rank_kernels_of_any_rank_are_exported_as_they_are(tmp_path):
  """The cheapest contraction at full rank would depend on the batch."""
  net, like, _, x = model('mlp')
  layers = oialr.find_layers(net.apply, like, x)
  full = programs.with_low_rank(
    programs.values(like), layers, lambda layer: layer.max_rank
  )
  export.stablehlo(tmp_path / 'full.stablehlo', net.apply, full, (x,))
  content = (tmp_path / 'full.stablehlo').read_bytes()
  export.safetensors(tmp_path / 'full.safetensors', full)
  arrays = safetensors_numpy.load_file(tmp_path / 'full.safetensors')
  assert 'params/dense_0/kernel/vt' in arrays
  y = jax_export.deserialize(content).call(arrays, x[:5])
  expected = net.apply(oialr.to_dense(full), x[:5])
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


# Refusals.


def _spoilt(to_factors):
  """The compressed model with one number in a thousand too large."""

  def spoil(x):
    if not isinstance(x, oialr.Factors):
      return x
    return dataclasses.replace(x, a=x.a.at[(0,) * x.a.ndim].multiply(1.01))

  return lambda params: jax.tree.map(
    spoil, to_factors(params), is_leaf=lowrank.is_factored
  )


def test_another_function_is_not_written(tmp_path, monkeypatch):
  net, _, low, x = model('mlp')
  spoilt = _spoilt(oialr.to_factors)
  monkeypatch.setattr(export.transforms, 'to_factors', spoilt)
  with pytest.raises(ValueError, match=r'compressed.stablehlo: output .* away'):
    export.write(tmp_path, net.apply, low, (x,))
  assert [p.name for p in tmp_path.glob('*.stablehlo*')] == ['dense.stablehlo']


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
def test_outputs_that_are_not_finite_are_compared_too(tmp_path, bad):
  path = tmp_path / 'x.stablehlo'
  x = programs.normal(4, 3)
  fn = lambda params, x: jnp.where(x > 0, x @ params['w'], bad)
  params = {'w': programs.normal(3, 3)}
  export.stablehlo(path, fn, params, (x,))
  once = iter([bad])
  other = lambda params, x: jnp.where(x > 0, x @ params['w'], next(once, 0.0))
  with pytest.raises(ValueError, match='nan|inf'):
    export.stablehlo(path, other, params, (x,))


def test_less_than_float32_wants_a_tolerance(tmp_path):
  *_, low, x = model('mlp')
  net = models.Mlp(widths=(48, 40), dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match='tolerance=1e-05.*float32'):
    export.write(tmp_path, net.apply, low, (x,))
  sizes = export.write(tmp_path, net.apply, low, (x,), tolerance=0.05)
  assert len(sizes) == 4


@pytest.mark.parametrize(
  'inputs, error, message',
  [
    (np.ones((2, 3)), TypeError, r'ndarray: pass a tuple .* \(x,\)'),
    ((np.ones((2, 3)), np.ones((4, 3))), ValueError, 'axis 0 of them all'),
    ((np.ones((2, 3)), 1.0), ValueError, r'\(\)\]: axis 0 .* Close over'),
    ((), ValueError, 'axis 0'),
  ],
)
def test_inputs_without_a_common_batch(tmp_path, inputs, error, message):
  fn = lambda params, x, *_: x @ params['w']
  with pytest.raises(error, match=message):
    export.write(tmp_path, fn, {'w': np.ones((3, 3))}, inputs)
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('leaf', [jnp.tanh, 'text', 1.0, jax.random.key(0)])
def test_leaves_that_are_no_arrays_are_named(tmp_path, leaf):
  params = {'net': {'w': np.ones((3, 3)), 'x': leaf}}
  with pytest.raises(TypeError, match="'net/x': a .* leave it out"):
    export.safetensors(tmp_path / 'x.safetensors', params)
  assert not [*tmp_path.iterdir()]


def test_there_must_be_a_device_to_check_on(tmp_path):
  call = functools.partial(
    export.stablehlo,
    tmp_path / 'x.stablehlo',
    lambda params, x: x @ params['w'],
    {'w': np.ones((3, 3), 'f')},
    (np.ones((2, 3), 'f'),),
  )
  with pytest.raises(ValueError, match=r"\('rocm',\): none .* add 'cpu'"):
    call(platforms=('rocm',))
  assert call(platforms=('rocm', 'cpu')) > 0


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'x.safetensors'
  params = {'w': programs.normal(5, 5), 'b': programs.normal(5)}
  layer = oialr.Layer('w', (5, 5), (0,), (1,))
  export.safetensors(path, oialr.to_lowrank(params, [layer], rank=2))
  return path


def test_no_damage_goes_unnoticed(file):
  """Of the header, of the metadata, of the numbers: every byte counts."""
  content, before = file.read_bytes(), export.load(file)
  noticed = 0
  for i in range(len(content)):
    spoilt = bytearray(content)
    spoilt[i] ^= 0x01
    file.write_bytes(spoilt)
    try:
      assert_same(export.load(file), before)  # such as another space
    except ValueError as e:
      assert str(file) in str(e)
      noticed += 1
  assert noticed > 0.98 * len(content)


@pytest.mark.parametrize('size', [0, 4, 100, -1])
def test_a_truncated_file_is_an_error(file, size):
  file.write_bytes(file.read_bytes()[:size])
  with pytest.raises(ValueError, match='x.safetensors: is damaged, or no'):
    export.load(file)


def test_a_missing_file_and_one_of_another_origin(file):
  with pytest.raises(FileNotFoundError, match='nothing.safetensors'):
    export.load(file.with_name('nothing.safetensors'))
  safetensors_numpy.save_file({'w': np.ones(3)}, file)
  with pytest.raises(ValueError, match='was not written by oialr_jax'):
    export.load(file)


def test_what_the_disk_makes_of_a_file_is_read_back(tmp_path, monkeypatch):
  save = safetensors_numpy.save
  spoilt = lambda *args: save(*args)[:-1] + b'!'
  monkeypatch.setattr(export.safetensors_numpy, 'save', spoilt)
  with pytest.raises(ValueError, match='SHA-256'):
    export.safetensors(tmp_path / 'x.safetensors', {'w': np.ones(3)})
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
  'like, message',
  [
    ({'b': np.ones(5, 'f')}, "'w': is in .*x.safetensors but not in li"),
    (
      {'w': np.ones((5, 5), 'f'), 'b': np.ones(5, 'f'), 'c': np.ones(1, 'f')},
      "'c': is in like but not in .*x.safetensors",
    ),
    (
      {'w': np.ones((5, 6), 'f'), 'b': np.ones(5, 'f')},
      r"'w': is float32\[5, 5\] in .*, float32\[5, 6\] in like",
    ),
    (
      {'w': np.ones((5, 5), 'f'), 'b': np.ones(5, 'e')},
      r"'b': is float32\[5\] in .*, float16\[5\] in like",
    ),
  ],
)
def test_another_models_parameters_are_refused(file, like, message):
  with pytest.raises(ValueError, match=message):
    export.load(file, like)
