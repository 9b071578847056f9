"""The step and the event, lowered for accelerators that are not at hand.

Nothing is computed and nothing compiled: parameters are shapes, so that ViT-B/16
takes no memory. `jax.export` lowers as the accelerator's own process would, and
refuses what it has no rule for.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import oialr_jax as oialr
from oialr_jax import linalg
from oialr_jax import models
from oialr_jax import sharding
from oialr_jax import spread
from oialr_jax import training

PLATFORMS = ('cuda', 'tpu')
BATCH = 8
MODELS = ('mini_vit', 'vit_base_patch16_224')
# Of min(m, n); None is dense.
RANKS = {'dense': None, 'full': 1.0, 'reduced': 0.3}
# At other ranks ViT-B/16 lowers as the small one does, and takes longer.
CASES = [(MODELS[0], rank) for rank in RANKS] + [(MODELS[1], 'reduced')]
MESHES = {'data': (8, 1, 1), 'fsdp': (2, 4, 1)}

SCHEDULE = oialr.Schedule(steps=100, delay=10, every=10, progressive=1.0)
TRANSITION, UPDATE = map(SCHEDULE.event, (10, 20))

TX = oialr.train_sigma(
  optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(1e-3))
)
KEY = jax.eval_shape(lambda: jax.random.key(0))


class Case:
  """A model's shapes, at a rank."""

  def __init__(self, name: str, rank: str):
    self.batch = models.inputs(name, BATCH)
    self.model = models.create(name, dtype=jnp.bfloat16)
    variables = jax.eval_shape(self.model.init, KEY, *self.batch)
    self.params = variables['params']
    found = oialr.find_layers(self.loss, self.params, {}, self.batch, KEY)
    self.layers = oialr.select(found)
    self.ranks = {x.path: _rounded(x, RANKS[rank] or 1.0) for x in self.layers}
    if RANKS[rank]:
      convert = functools.partial(
        oialr.to_lowrank, layers=self.layers, rank=self.ranks
      )
      self.params = jax.eval_shape(convert, self.params)
    self.opt_state = jax.eval_shape(TX.init, self.params)

  @property
  def state(self) -> training.TrainState:
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return training.TrainState(step, self.params, self.opt_state, {})

  def loss(self, params, model_state, batch, key):
    out = self.model.apply(
      {'params': params}, *batch, train=True, rngs={'dropout': key}
    )
    return jnp.mean(jnp.square(out.astype(jnp.float32))), (model_state, {})

  def event(self, event, params, opt_state):
    params, opt_state, report = oialr.apply_event(
      event, params, opt_state, self.layers, SCHEDULE
    )
    return params, opt_state, report.ranks, report.spectra, report.truncation


@functools.cache
def case(name: str, rank: str) -> Case:
  return Case(name, rank)


def _rounded(layer, share: float) -> int:
  """Up to a multiple of 8, as the trainer does."""
  return min(layer.max_rank, math.ceil(share * layer.max_rank / 8) * 8)


@dataclasses.dataclass(frozen=True)
class Exported:
  """A program that was lowered, and its text, which takes time to print."""

  program: jax.export.Exported
  text: str

  @property
  def out(self):
    return jax.tree.unflatten(self.program.out_tree, self.program.out_avals)


def export(fn, *args, platforms=PLATFORMS) -> Exported:
  program = jax.export.export(jax.jit(fn), platforms=platforms)(*args)
  assert program.platforms == platforms
  assert shapes(program.in_avals) == shapes(args)
  return Exported(program, program.mlir_module())


def shapes(tree):
  return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def custom_calls(exported) -> set[str]:
  """Names of the libraries' functions that the program calls."""
  return {*re.findall(r'custom_call @([\w.$]+)', exported.text)}


def products(exported) -> set[tuple[int, ...]]:
  """Shapes of the results of all dots and convolutions."""
  found = set()
  for line in exported.text.splitlines():
    if 'stablehlo.dot_general' in line or 'stablehlo.convolution' in line:
      *_, result = re.findall(r'tensor<([\dx]+)x\w+>', line)
      found.add(tuple(map(int, result.split('x'))))
  return found


def kernels(layers) -> set[tuple[int, ...]]:
  """The shapes that a kernel or its gradient might have."""
  turned = {x.matrix[::-1] for x in layers}
  return {x.matrix for x in layers} | {x.shape for x in layers} | turned


def check_no_cpu(exported):
  names = custom_calls(exported)
  assert not [x for x in names if re.match('lapack|blas|xla_cpu', x)]


@pytest.mark.parametrize('name, rank', CASES)
def test_the_step_lowers(name, rank):
  of = case(name, rank)
  step = training.train_step(of.loss, TX)
  exported = export(step, of.state, of.batch, KEY)
  check_no_cpu(exported)
  state, metrics = exported.out
  assert shapes(state) == shapes(of.state) and shapes(metrics) == [((), 'f')]
  if rank == 'dense':
    assert kernels(of.layers) & products(exported)
  if rank == 'reduced':
    assert not kernels(of.layers) & products(exported)


@pytest.mark.parametrize('name', MODELS)
def test_the_transition_lowers(name):
  of = case(name, 'dense')
  event = functools.partial(of.event, TRANSITION)
  exported = export(event, of.params, of.opt_state)
  check_no_cpu(exported)
  params, opt_state, ranks, spectra, _ = exported.out
  low = case(name, 'full')
  assert shapes((params, opt_state)) == shapes((low.params, low.opt_state))
  assert {*ranks} == {x.path for x in of.layers}
  for layer in of.layers:
    assert spectra[layer.path].shape == (1, layer.max_rank)


@pytest.mark.parametrize('name, rank', [x for x in CASES if x[1] != 'dense'])
def test_updates_that_prune_lower(name, rank):
  of = case(name, rank)
  event = functools.partial(of.event, UPDATE)
  exported = export(event, of.params, of.opt_state)
  check_no_cpu(exported)
  params, opt_state, ranks, spectra, truncation = exported.out
  assert shapes((params, opt_state)) == shapes((of.params, of.opt_state))
  assert len(ranks) == len(truncation) == len(of.layers)
  for path, values in spectra.items():
    assert values.shape == (1, of.ranks[path])


@pytest.mark.parametrize('platform', ['cpu', *PLATFORMS])
def test_an_event_calls_the_libraries_of_its_own_platform(platform):
  of = case('mini_vit', 'reduced')
  event = functools.partial(of.event, UPDATE)
  exported = export(event, of.params, of.opt_state, platforms=(platform,))
  libraries = {'cpu': 'lapack_', 'cuda': 'cusolver', 'tpu': ''}
  others = {*libraries.values()} - {libraries[platform], ''}
  names = custom_calls(exported)
  assert any(x.startswith(libraries[platform]) for x in names)
  assert not any(x.startswith(tuple(others)) for x in names)


# Eight devices that are not there.


def placement(mesh: str) -> sharding.Placement:
  types = (jax.sharding.AxisType.Auto,) * 3
  return sharding.Placement(
    jax.sharding.AbstractMesh(MESHES[mesh], sharding.AXES, types)
  )


def placed(tree, shardings):
  of = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  return jax.tree.map(of, tree, shardings)


def splits(exported) -> list[str]:
  """How every argument is split, as the program's text has it."""
  text = exported.text
  main = text[text.index('func.func public @main') :].splitlines()[0]
  return re.findall(r'<@mesh, \[(.*?)\]>', main.split(') -> (')[0])


def check_placed(exported, state, place):
  """Of eight devices, parameters split over as many as the mesh says."""
  assert exported.program.nr_devices == 8
  large = [x for x in jax.tree.leaves(state) if x.size >= place.min_size]
  split = [x for x in splits(exported) if '"fsdp"' in x and '"data"' not in x]
  assert len(split) == (len(large) if place.gather else 0)


@pytest.mark.parametrize(
  'name, rank, mesh',
  [
    ('mini_vit', 'dense', 'fsdp'),
    ('mini_vit', 'reduced', 'data'),
    ('vit_base_patch16_224', 'reduced', 'fsdp'),
  ],
)
def test_the_step_lowers_for_a_mesh(name, rank, mesh):
  of, place = case(name, rank), placement(mesh)
  step = training.train_step(
    of.loss, TX, shards=place.replicas, gather=place.gather
  )
  rest = place.shardings(of.params, of.opt_state)
  where = training.TrainState(place.replicated, *rest, {})
  spec = jax.sharding.PartitionSpec((sharding.DATA, sharding.FSDP))
  examples = jax.sharding.NamedSharding(place.mesh, spec)
  exported = export(
    jax.jit(step, out_shardings=(where, place.replicated)),
    placed(of.state, where),
    placed(of.batch, (examples,)),
    placed(KEY, place.replicated),
  )
  check_no_cpu(exported)
  check_placed(exported, of.state, place)
  assert [x for x in splits(exported) if 'data' in x] == [
    '{"data", "fsdp"}, {}, {}, {}'
  ]
  if rank == 'reduced':
    assert not kernels(of.layers) & products(exported)


@pytest.mark.parametrize(
  'name, event, rank, mesh',
  [
    ('mini_vit', TRANSITION, 'dense', 'fsdp'),
    ('mini_vit', UPDATE, 'reduced', 'data'),
    ('vit_base_patch16_224', UPDATE, 'reduced', 'fsdp'),
  ],
)
def test_events_lower_for_a_mesh(name, event, rank, mesh):
  of, place = case(name, rank), placement(mesh)

  def run(params, opt_state):
    params, opt_state, *others = of.event(event, params, opt_state)
    return place.constrain(params, opt_state, others)

  parts = of.params, of.opt_state
  with jax.sharding.use_abstract_mesh(place.mesh):
    exported = export(run, *placed(parts, place.shardings(*parts)))
  check_no_cpu(exported)
  check_placed(exported, parts, place)


def test_decompositions_that_are_spread_lower_for_a_mesh():
  """Every device has some of its own, and is sent what the others found."""
  place = placement('fsdp')
  of = jax.ShapeDtypeStruct((1, 12, 8), jnp.float32, sharding=place.replicated)
  run = functools.partial(spread.by_shape, linalg.svd)
  with jax.sharding.use_abstract_mesh(place.mesh):
    exported = export(run, {str(i): (of,) for i in range(9)})
  check_no_cpu(exported)
  assert exported.program.nr_devices == 8
  assert 'sdy.manual_computation' in exported.text
  assert 'stablehlo.all_reduce' in exported.text
