"""Tests of evaluation in factors: always against the dense kernels."""

import contextlib
import copy
import dataclasses
import functools
import inspect
import logging
import math
import pickle
import re
import string

import flax
import flax.linen as nn
import hypothesis
from hypothesis import strategies as st
import jax
from jax import lax
from jax.extend import core as jex
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import cost
from tests import programs

CONTRACTIONS = ('auto', 'factors', 'precontract', 'materialise')

# Of every kind of product one; on these, everything is tried.
CORE = (
  'mlp',
  'from_both_sides',
  'fused_heads',
  'mixed_precision',
  'experts',
  'used_twice',
  'scanned_stack',
  'recurrent_stack',
  'dilated_convs',
  'grouped_convs',
  'depthwise_convs',
  'vmapped_convs',
  'split_qkv',
  'split_out_in',
  'split_stack',
  'tied_blocks',
  'scanned_blocks',
)
# By the narrowest dtype among what is compared, in bytes.
TOLERANCE = {2: 3e-2, 4: 1e-5}


def _values(name, state='reduced'):
  """The program and its parameters, with low-rank kernels."""
  p = (programs.PROGRAMS | programs.ODD_PROGRAMS)[name]()
  half = lambda layer: max(2, layer.max_rank // 2)
  rank = (lambda layer: layer.max_rank) if state == 'full' else half
  params = programs.with_low_rank(
    programs.values(p.params),
    p.low_rank or p.layers,
    rank,
    pruned=int(state == 'reduced'),
  )
  return p, _compressed(params) if state == 'compressed' else params


def _compressed(params):
  """`to_factors`, even of a kernel that takes less memory when it is dense."""

  def of(x):
    if not oialr.is_low_rank(x):
      return x
    s = x.s.reshape(
      *x.s.shape[:-2], *[1] * (len(x.view.rows) - 1), *x.s.shape[-2:]
    )
    return oialr.Factors(x.u @ s, x.vt, x.view)

  return jax.tree.map(of, params, is_leaf=oialr.is_low_rank)


def _run(fn, params, args, has_gradient=True):
  """What fn returns, and gradients of a mix of it by all that is a float.

  Gradients are a tree like `(params, args)`, with None for all else.
  """
  leaves, treedef = jax.tree.flatten((params, args))
  arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, 'dtype')}
  is_float = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
  floats = {i: x for i, x in arrays.items() if is_float(x)}
  rest = {i: x for i, x in arrays.items() if i not in floats}

  def of(floats, rest):
    filled = {**dict(enumerate(leaves)), **floats, **rest}
    params, args = jax.tree.unflatten(treedef, filled.values())
    out = fn(params, *args)
    return _mix(out), out

  if not has_gradient:
    return jax.jit(of)(floats, rest)[1], (params, args)
  (_, out), grads = jax.jit(jax.value_and_grad(of, has_aux=True))(floats, rest)
  return out, jax.tree.unflatten(treedef, map(grads.get, range(len(leaves))))


def _mix(out):
  """A scalar that every entry of every float of out has a part in."""
  total = 0.0
  for i, x in enumerate(jax.tree.leaves(out)):
    if jnp.issubdtype(x.dtype, jnp.floating):
      weights = programs.normal(*x.shape, seed=i)
      total += jnp.sum(x.astype(jnp.float32) * weights)
  return total


@functools.cache
def _oracle(name, state='reduced'):
  p, params = _values(name, state)
  fn = lambda params, *args: p.fn(oialr.to_dense(params), *args)
  return _run(fn, params, p.args, p.has_gradient)


def _assert_close(actual, desired):
  """Same structure, shapes and dtypes, and the same values to rounding.

  Relative to the largest entry of each array, and a fifth as much to that of
  all of them: gradients may cancel to zero.
  """
  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  types = lambda t: [(x.shape, x.dtype) for x in jax.tree.leaves(t)]
  assert types(actual) == types(desired)
  wide = lambda t: [np.complex128(x) for x in jax.tree.leaves(t)]
  largest = lambda arrays: max(np.max(np.abs(x), initial=0) for x in arrays)
  tolerance = TOLERANCE[min(x.dtype.itemsize for x in jax.tree.leaves(desired))]
  actual, desired = wide(actual), wide(desired)
  for a, b in zip(actual, desired):
    scale = largest([b]) + largest(desired) / 5
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def _trained(grads):
  params, args = grads
  return oialr.trainable(params), args


def _check(name, state, contraction):
  p, params = _values(name, state)
  fn = oialr.factored(p.fn, contraction=contraction)
  out, grads = _run(fn, params, p.args, p.has_gradient)
  dense_out, dense_grads = _oracle(name, state)
  _assert_close(out, dense_out)
  _assert_close(_trained(grads), _trained(dense_grads))
  return grads


@pytest.mark.parametrize('contraction', CONTRACTIONS)
@pytest.mark.parametrize('name', CORE)
def test_factored_computes_what_the_dense_kernels_do(name, contraction):
  _check(name, 'reduced', contraction)


@pytest.mark.parametrize('state', ['full', 'compressed'])
@pytest.mark.parametrize('name', CORE)
def test_factored_computes_at_every_rank(name, state):
  _check(name, state, 'auto')


@pytest.mark.parametrize('name', sorted({*programs.PROGRAMS} - {*CORE}))
def test_factored_computes_any_program(name):
  _check(name, 'reduced', 'factors')


@pytest.mark.parametrize('name', sorted({*programs.ODD_PROGRAMS} - {*CORE}))
def test_factored_falls_back_to_the_kernel(name):
  _check(name, 'reduced', 'factors')


# Made by chance.


@st.composite
def _shape_changes(draw, shape, most=3):
  """Functions that each lay a kernel out anew, and the shape that results."""
  changes = []
  for _ in range(draw(st.integers(0, most))):
    kind = draw(st.sampled_from(['transpose', 'merge', 'split', 'expand']))
    if kind == 'transpose':
      order = draw(st.permutations(range(len(shape))))
      changes.append(functools.partial(jnp.transpose, axes=order))
      shape = tuple(shape[i] for i in order)
      continue
    i = draw(st.integers(0, len(shape) - 1))
    if kind == 'merge':
      shape = (*shape[:i], math.prod(shape[i : i + 2]), *shape[i + 2 :])
    elif kind == 'split':
      n = shape[i]
      part = draw(st.sampled_from([k for k in range(1, n + 1) if n % k == 0]))
      shape = (*shape[:i], part, n // part, *shape[i + 1 :])
    else:
      shape = (*shape[:i], 1, *shape[i:])
    changes.append(functools.partial(jnp.reshape, shape=shape))
  return changes, shape


@st.composite
def _products(draw):
  """A kernel that is laid out anew, cast, and multiplied in an einsum."""
  shape = tuple(
    draw(st.lists(st.sampled_from([2, 3, 4, 6, 1]), min_size=2, max_size=4))
  )
  changes, now = draw(_shape_changes(shape))
  letters = string.ascii_lowercase[: len(now)]
  role = st.sampled_from(['contracted', 'free', 'contracted', 'free', 'batch'])
  roles = {a: draw(role) for a in letters}
  tokens = 'yz'[: draw(st.integers(0, 2))]
  in_x = [a for a in letters if roles[a] != 'free'] + [*tokens]
  x = ''.join(draw(st.permutations(in_x)))
  in_out = [a for a in letters if roles[a] != 'contracted'] + [*tokens]
  out = ''.join(draw(st.permutations(in_out)))
  specs = [letters, x] if draw(st.booleans()) else [x, letters]
  dtype = draw(st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16]))
  sizes = dict(zip(letters, now)) | {'y': 3, 'z': 2}

  def fn(p, x):
    w = functools.reduce(lambda w, change: change(w), changes, p['w'])
    operands = [w.astype(dtype), x.astype(dtype)]
    if specs[0] != letters:
      operands.reverse()
    return jnp.einsum(f'{",".join(specs)}->{out}', *operands)

  return fn, shape, programs.normal(*(sizes[a] for a in x))


@st.composite
def _convolutions(draw):
  """Strides, padding, dilations, groups, axes in any order."""
  space = draw(st.integers(1, 2))
  small = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * space))
  groups = draw(st.sampled_from([1, 1, 1, 2]))
  window, image = small(1, 3), small(4, 5)
  features = draw(st.integers(2, 3)), draw(st.integers(2, 3))
  order = lambda: tuple(draw(st.permutations(range(space + 2))))
  numbers = lax.ConvDimensionNumbers(order(), order(), order())
  kernel = (features[0] * 2, features[1], *window)  # as the numbers have them
  x = (2, features[1] * groups, *image)
  place = lambda shape, spec: tuple(
    shape[spec.index(i)] for i in range(space + 2)
  )
  padding = st.sampled_from(['SAME', 'VALID', [(1, 2), (0, 1)][:space]])
  lhs_dilation = small(1, 2)
  padding = draw(padding) if lhs_dilation == (1,) * space else [(1, 0)] * space
  changes, shape = [], place(kernel, numbers.rhs_spec)
  changes, now = draw(_shape_changes(shape, 2))
  options = {
    'window_strides': small(1, 2),
    'padding': padding,
    'lhs_dilation': lhs_dilation,
    'rhs_dilation': small(1, 2),
    'dimension_numbers': numbers,
    'feature_group_count': groups,
  }

  def fn(p, x):
    # Whatever the changes do is undone by a reshape at the end.
    w = functools.reduce(lambda w, change: change(w), changes, p['w'])
    return lax.conv_general_dilated(x, w.reshape(shape), **options)

  return fn, shape, programs.normal(*place(x, numbers.lhs_spec))


def _check_example(fn, shape, x, pick, rank=2):
  """Compares values and gradients; a kernel that is found stays in factors.

  The columns fall into blocks, `pick` says which, unless they do already.
  """
  params = programs.shapes(w=shape)
  found = oialr.explain(fn, params, x).layers
  k = len(shape) // 2
  rest = programs.dot('w', shape, (*range(k),), (*range(k, len(shape)),), 0)
  (layer,) = found or (rest,)
  if layer.blocks == 1:
    counts = _block_counts([shape[a] for a in layer.cols])
    (layer,) = oialr.split([layer], {'w': counts[pick % len(counts)]})
  params = programs.with_low_rank(
    programs.values(params), (layer,), lambda layer: rank
  )
  factored = oialr.factored(fn, contraction='factors')

  @jax.jit
  def both(params, x):
    def of(fn):
      of = lambda t, x: fn(oialr.with_trainable(params, t), x)
      out, vjp = jax.vjp(of, oialr.trainable(params), x)
      weights = programs.normal(*out.shape, seed=9).astype(out.dtype)
      return out, vjp(jnp.asarray(weights))

    return of(factored), of(lambda p, x: fn(oialr.to_dense(p), x))

  with _log() as records:
    actual, desired = both(params, x)
  _assert_close(actual, desired)
  # A program may tear blocks apart that nobody but this test has asked for.
  assert not (found == (layer,) and records), (found, records)


def _block_counts(sizes):
  """How many equal blocks of memory columns of these sizes can fall into."""
  counts = [1]
  for i, n in enumerate(sizes):
    major = math.prod(sizes[:i])
    counts += [major * k for k in range(2, n + 1) if n % k == 0]
  return counts


@contextlib.contextmanager
def _log():
  """What the package logs, at every level."""
  records = []
  handler = logging.Handler()
  handler.emit = records.append
  logger = logging.getLogger('oialr_jax')
  level = logger.level
  logger.addHandler(handler)
  logger.setLevel(logging.DEBUG)
  try:
    yield records
  finally:
    logger.removeHandler(handler)
    logger.setLevel(level)


_FEW = hypothesis.settings(
  deadline=None,
  derandomize=True,
  max_examples=25,
  database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
)


_PICKS = st.integers(0, 11)  # one of the ways to fall into blocks


@_FEW
@hypothesis.given(_products(), _PICKS)
def test_factored_computes_any_product(example, pick):
  _check_example(*example, pick)


@_FEW
@hypothesis.given(_convolutions(), _PICKS)
def test_factored_computes_any_convolution(example, pick):
  _check_example(*example, pick)


# What is not computed.


def _equations(jaxpr, name=None):
  """The equations of a program and of all that are inside; of one primitive."""
  for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    if name in (None, eqn.primitive.name):
      yield eqn
    for inner in jax.tree.leaves(list(eqn.params.values())):
      if hasattr(getattr(inner, 'jaxpr', inner), 'eqns'):
        yield from _equations(inner, name)


def _arrays(jaxpr):
  """The types of all that a program computes."""
  return [v.aval for eqn in _equations(jaxpr) for v in eqn.outvars]


def _step_sizes(fn, params, args):
  """The sizes of all arrays of the program that trains on `fn`."""
  leaves, treedef = jax.tree.flatten(oialr.trainable(params))
  arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, 'dtype')}

  def loss(arrays):
    t = jax.tree.unflatten(
      treedef, ({**dict(enumerate(leaves)), **arrays}).values()
    )
    return _mix(fn(oialr.with_trainable(params, t), *args))

  jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(arrays)
  return {x.size for x in _arrays(jaxpr)}


@pytest.mark.parametrize(
  'name', sorted({*programs.PROGRAMS} - {'custom_rules'})
)
def test_a_step_holds_nothing_of_a_kernels_size(name):
  p, params = _values(name)
  # Of a stack, or of what a scan sees of it; blocks are not seen one by one.
  seen = lambda layer: layer.blocks * math.prod(layer.matrix)
  sizes = lambda layer: {seen(layer), math.prod(layer.shape)}
  kernels = set.union(*map(sizes, p.layers))
  step = lambda contraction: _step_sizes(
    oialr.factored(p.fn, contraction=contraction), params, p.args
  )
  assert not step('factors') & kernels
  assert step('materialise') & kernels


@pytest.mark.parametrize('name', ['tied_blocks', 'scanned_blocks'])
def test_blocks_stay_in_factors_from_any_side(name):
  p, params = _values(name)
  matrices = {math.prod(layer.matrix) for layer in p.low_rank}
  kernels = {math.prod(layer.shape) for layer in p.low_rank}
  sizes = _step_sizes(
    oialr.factored(p.fn, contraction='factors'), params, p.args
  )
  assert not sizes & (kernels | matrices)


def test_what_layers_say_is_multiplied_out_is():
  p = programs.PROGRAMS['custom_rules']()
  forward = oialr.factored(p.fn, contraction='factors')
  for layer in p.layers:
    params = programs.with_low_rank(
      programs.values(p.params), (layer,), lambda layer: 2
    )
    jaxpr = jax.make_jaxpr(forward)(params, *p.args)
    found = math.prod(layer.shape) in {x.size for x in _arrays(jaxpr)}
    assert found == bool(layer.multiplied_out), layer.path


def test_the_compiled_step_holds_no_kernel():
  kernel = re.compile(r'\[(?:\d,)?(17,19|19,17|17,17)\]')

  def compiled(contraction):
    fn = oialr.factored(_unique, contraction=contraction)
    step = jax.grad(lambda p, x: jnp.sum(fn(p, x) ** 2), argnums=(0, 1))
    return jax.jit(step).lower(params, x).compile().as_text()

  layers = oialr.find_layers(_unique, _UNIQUE, x := programs.normal(5, 17))
  params = programs.with_low_rank(
    programs.values(_UNIQUE), layers, lambda layer: 3
  )
  assert not kernel.search(compiled('factors'))
  assert kernel.search(compiled('materialise'))


_UNIQUE = programs.shapes(stack=(2, 17, 17), w=(17, 19))


def _unique(p, x):
  layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
  return lax.scan(layer, x, p['stack'])[0] @ p['w']


def _unrolled(p, x):
  for layer in p:
    x = x @ layer['w'] + layer['b']
  return x


def _scanned(p, x):
  return lax.scan(lambda x, layer: (_unrolled([layer], x), None), x, p)[0]


def _convolved(p, x):
  for layer in p:
    x = lax.conv(x, layer['w'], (1,), 'SAME') + layer['b']
  return x


@pytest.mark.parametrize('contraction', ['factors', 'precontract'])
@pytest.mark.parametrize(
  'fn, shapes, x, kept',
  [
    (_unrolled, 2 * [programs.shapes(w=(13, 13), b=(13,))], (5, 13), (5, 2)),
    (_scanned, programs.shapes(w=(2, 13, 13), b=(2, 13)), (5, 13), (5, 2)),
    (
      _convolved,
      2 * [programs.shapes(w=(13, 13, 3), b=(13, 1))],
      (4, 13, 7),
      (4, 2, 7),
    ),
  ],
)
def test_of_an_input_only_its_part_in_u_is_kept(
  fn, shapes, x, kept, contraction
):
  x = programs.normal(*x)
  layers = oialr.find_layers(fn, shapes, x)
  params = programs.with_low_rank(
    programs.values(shapes), layers, lambda layer: 2
  )

  def residuals(fn):
    of = lambda t: fn(oialr.with_trainable(params, t), x)
    _, vjp = jax.vjp(of, oialr.trainable(params))
    return {a.shape[-x.ndim :] for a in jax.tree.leaves(vjp)}

  saved = residuals(oialr.factored(fn, contraction=contraction))
  assert kept in saved
  assert x.shape not in saved
  assert x.shape in residuals(lambda p, x: fn(oialr.to_dense(p), x))


@pytest.mark.parametrize('with_default', [False, True])
def test_of_platform_dependent_branches_only_the_platforms_is_lowered(
  with_default,
):
  _, params, x = _pair()
  # A primitive that no platform knows, as CPUs do not know a TPU's kernels.
  unknown = jex.Primitive('unknown')
  unknown.def_abstract_eval(lambda x: x)
  here, elsewhere = jnp.dot, lambda x, w: unknown.bind(x @ w)
  branches = {'cpu': here, 'cuda': here, 'tpu': elsewhere}
  if with_default:
    branches = {'tpu': elsewhere, 'default': here}
  fn = lambda p, x: jnp.tanh(lax.platform_dependent(x, p['w'], **branches))
  forward = oialr.factored(fn, contraction='factors')
  dense = oialr.to_dense(params)
  _assert_close(jax.jit(forward)(params, x), fn(dense, x))
  _assert_close(forward(params, x), fn(dense, x))
  jaxpr = jax.make_jaxpr(forward)(params, x)
  platforms = lambda jaxpr: [
    eqn.params['branches_platforms'] for eqn in _equations(jaxpr, 'cond')
  ]
  assert platforms(jaxpr) == platforms(jax.make_jaxpr(fn)(dense, x))
  # And the kernel stays in factors.
  assert 8 * 9 not in {a.size for a in _arrays(jaxpr)}


# In company.


def _pair(rank=3, **kwargs):
  """x W and its parameters, dense and low-rank."""
  fn = lambda p, x: jnp.tanh(x @ p['w'] + p['b'])
  shapes = programs.shapes(w=(8, 9), b=(9,))
  params = programs.with_low_rank(
    programs.values(shapes),
    (programs.dot('w', (8, 9), (0,), (1,), 5),),
    lambda layer: rank,
    **kwargs,
  )
  return fn, params, programs.normal(5, 8)


def test_factored_under_vmap_of_parameters():
  fn, _, x = _pair()
  many = [_pair(seed=seed)[1] for seed in range(3)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
  forward = oialr.factored(fn, contraction='factors')
  desired = jnp.stack([fn(oialr.to_dense(p), x) for p in many])
  one_by_one = jax.vmap(forward, (0, None))(stacked, x)
  _assert_close(one_by_one, desired)
  # And around it: the kernel that fn sees then has an axis more.
  at_once = oialr.factored(jax.vmap(fn, (0, None)), contraction='factors')
  _assert_close(at_once(stacked, x), desired)


def test_factored_in_the_body_of_a_scan_over_low_rank_leaves():
  fn = lambda p, x: jnp.tanh(x @ p)
  many = [
    programs.with_low_rank(
      {'w': programs.normal(8, 8)},
      (programs.dot('w', (8, 8), (0,), (1,), 5),),
      lambda layer: 3,
      seed=seed,
    )['w']
    for seed in range(3)
  ]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
  forward = oialr.factored(fn, contraction='factors')
  x = programs.normal(5, 8)
  actual, _ = lax.scan(lambda x, p: (forward(p, x), None), x, stacked)
  for p in many:
    x = fn(oialr.to_dense(p), x)
  _assert_close(actual, x)


def test_factored_under_checkpoint_and_forward_mode():
  fn, params, x = _pair()
  forward = jax.checkpoint(oialr.factored(fn, contraction='factors'))
  dense = lambda p, x: fn(oialr.to_dense(p), x)

  def second_order(fn, v):
    """A Hessian times a vector: forward over reverse."""
    of = lambda t: jnp.sum(fn(oialr.with_trainable(params, t), x) ** 2)
    t = oialr.trainable(params)
    return jax.jvp(jax.grad(of), (t,), (v,))

  v = jax.tree.map(
    lambda a: programs.normal(*a.shape, seed=1), oialr.trainable(params)
  )
  _assert_close(second_order(forward, v), second_order(dense, v))


def test_factored_in_a_step_that_donates():
  fn, params, x = _pair()
  forward = oialr.factored(fn, contraction='factors')

  def step(params, x):
    of = lambda t: jnp.sum(forward(oialr.with_trainable(params, t), x) ** 2)
    t = oialr.trainable(params)
    t = jax.tree.map(lambda a, g: a - 0.1 * g, t, jax.grad(of)(t))
    return oialr.with_trainable(params, t)

  desired = step(params, x)
  given = jax.tree.map(jnp.copy, params)
  actual = jax.jit(step, donate_argnums=0)(given, x)
  assert given['w'].s.is_deleted()
  _assert_close(actual, desired)


def _mesh():
  return jax.make_mesh(
    (1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )


@pytest.mark.parametrize('contraction', CONTRACTIONS)
def test_factored_inside_shard_map(contraction):
  """Data-parallel: only the gradients of what trains cross the devices."""
  fn, params, x = _pair()
  forward = oialr.factored(fn, contraction=contraction)

  def step(params, x):
    def of(t):
      y = forward(oialr.with_trainable(params, t), x)
      return lax.pmean(jnp.sum(y**2), 'data')

    return jax.value_and_grad(of)(oialr.trainable(params))

  spec = jax.sharding.PartitionSpec
  specs = {'in_specs': (spec(), spec('data')), 'out_specs': spec()}
  sharded = jax.shard_map(step, mesh=_mesh(), **specs)
  of = lambda t: jnp.sum(
    fn(oialr.to_dense(oialr.with_trainable(params, t)), x) ** 2
  )
  desired = jax.value_and_grad(of)(oialr.trainable(params))
  _assert_close(jax.jit(sharded)(params, x), desired)
  if contraction == 'factors':
    sizes = {a.size for a in _arrays(jax.make_jaxpr(sharded)(params, x))}
    assert 8 * 9 not in sizes


@pytest.mark.parametrize('contraction', CONTRACTIONS)
def test_factored_inside_shard_map_with_factors_that_differ(contraction):
  """Experts, or Sigmas alone, that are not the same on every device."""
  fn = lambda p, x: jnp.einsum('tm,bmn->btn', x, p)
  layer = programs.dot('w', (2, 8, 9), (1,), (2,), 5, batch=(0,))
  params = programs.with_low_rank(
    {'w': programs.normal(2, 8, 9)}, (layer,), lambda layer: 3
  )['w']
  x = programs.normal(5, 8)
  spec = jax.sharding.PartitionSpec
  for node in (
    oialr.LowRank(spec('data'), spec('data'), spec('data'), params.view),
    oialr.LowRank(spec(), spec('data'), spec(), params.view),
  ):
    sharded = jax.shard_map(
      oialr.factored(fn, contraction=contraction),
      mesh=_mesh(),
      in_specs=(node, spec()),
      out_specs=spec('data'),
    )
    _assert_close(jax.jit(sharded)(params, x), fn(oialr.to_dense(params), x))


def test_factored_around_shard_map():
  fn, params, x = _pair()
  spec = jax.sharding.PartitionSpec
  sharded = jax.shard_map(
    fn,
    mesh=_mesh(),
    in_specs=(spec(), spec('data')),
    out_specs=spec('data'),
  )
  actual = jax.jit(oialr.factored(sharded))(params, x)
  _assert_close(actual, fn(oialr.to_dense(params), x))


def test_factored_under_sharding_constraints():
  """Which partitioned models put on their kernels; they are only hints."""
  mesh = _mesh()
  sharding = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec('data')
  )
  constrain = lambda w: lax.with_sharding_constraint(w, sharding)
  fn = lambda p, x: x @ constrain(p['w'])
  _, params, x = _pair()
  assert [a.path for a in oialr.find_layers(fn, params, x)] == ['w']
  forward = oialr.factored(fn, contraction='factors')
  sizes = {a.size for a in _arrays(jax.make_jaxpr(forward)(params, x))}
  assert 8 * 9 not in sizes
  _assert_close(jax.jit(forward)(params, x), x @ oialr.to_dense(params)['w'])


@pytest.mark.parametrize('scanned', [False, True])
def test_a_sharding_that_the_program_asks_for_is_that_of_the_product(scanned):
  """Where shardings are types, whatever else the product has is an error."""
  spec, explicit = jax.sharding.PartitionSpec, jax.sharding.AxisType.Explicit
  mesh = jax.make_mesh((1,), ('data',), axis_types=(explicit,))
  rows, whole = spec('data'), spec()
  put = lambda x, s: jax.device_put(x, jax.sharding.NamedSharding(mesh, s))
  params = programs.with_low_rank(
    {'w': programs.normal(8, 8)},
    (programs.dot('w', (8, 8), (0,), (1,), 5),),
    lambda layer: 3,
  )
  params = jax.tree.map(lambda x: put(x, whole), params)
  x = programs.normal(5, 8)

  def fn(p, x):
    if not scanned:
      return jnp.einsum('tm,mn->tn', x, p['w'], out_sharding=whole)

    def step(x, _):
      x = jax.sharding.reshard(x, whole)
      return jnp.einsum('tm,mn->tn', x, p['w'], out_sharding=rows), None

    return lax.scan(step, x, length=2)[0]

  with jax.set_mesh(mesh):
    if scanned:
      x = put(x, rows)
    else:  # contracted along an axis that both are split over
      node, x = params['w'], put(x, spec(None, 'data'))
      params['w'] = dataclasses.replace(node, u=put(node.u, rows))
    (layer,) = oialr.find_layers(fn, params, x)
    assert layer.multiplied_out == 'out_sharding'
    dense = lambda p, x: fn(oialr.to_dense(p), x)
    actual, grads = _run(oialr.factored(fn), params, (x,))
    desired, dense_grads = _run(dense, params, (x,))
  assert jax.typeof(actual) == jax.typeof(desired)
  _assert_close(actual, desired)
  _assert_close(_trained(grads), _trained(dense_grads))


@pytest.mark.parametrize('contraction', CONTRACTIONS)
def test_products_have_the_name_scopes_of_the_program(contraction):
  """By which a profile is read."""

  def fn(p, x):
    with jax.named_scope('block'):
      with jax.named_scope('up'):
        x = jax.jit(lambda x: jnp.tanh(x @ p['a']))(x)
      with jax.named_scope('down'):
        return jax.checkpoint(lambda x, w: x @ w)(x, p['b'])

  params, x = programs.shapes(a=(8, 9), b=(9, 7)), programs.normal(5, 8)
  layers = oialr.find_layers(fn, params, x)
  params = programs.with_low_rank(
    programs.values(params), layers, lambda layer: 3
  )
  forward = oialr.factored(fn, contraction=contraction)
  text = jax.jit(forward).lower(params, x).as_text(debug_info=True)
  names = re.findall(r'"(jit.*dot_general)"', text)
  assert {'/'.join(name.split('/')[1:3]) for name in names} == {
    'block/up',
    'block/down',
  }


# Arguments.


def test_low_rank_leaves_in_any_argument():
  _, params, x = _pair()
  other = _pair(rank=2, seed=7)[1]['w']
  fn = lambda x, a, *rest, b, scale=1.0: (x @ a, [x @ b['w'], *rest], scale)
  actual = oialr.factored(fn)(x, other, x, b=params, scale=2.0)
  b = oialr.to_dense(params)['w']
  a = oialr.to_dense(other)
  _assert_close(actual, (x @ a, [x @ b, x], jnp.float32(2.0)))
  _assert_close(
    oialr.factored(lambda a, b: a @ b.T)(other, params['w']), a @ b.T
  )


def test_what_is_no_array_reaches_fn_as_it_is():
  _, params, x = _pair()
  given = {
    'flag': True,
    'name': 'relu',
    'count': 3,
    'scale': 0.5,
    'none': None,
    'function': jnp.tanh,
    'type': np.float32,
    'dtype': np.dtype('float32'),
    'scalar_type': jnp.bfloat16,
  }
  seen = {}

  def fn(p, x, **kwargs):
    seen.update(kwargs)
    return kwargs['function'](x @ p['w']).astype(kwargs['type'])

  oialr.factored(fn)(params, x, **given)
  assert seen == given
  assert all(seen[name] is x for name, x in given.items())


def test_arrays_of_any_origin_are_traced():
  """Keys, integers, NumPy's arrays and scalars; gradients pass through them."""
  _, params, x = _pair()

  def fn(p, x, key, index, scale):
    noise = jax.random.normal(key, (5, 9)) + x[index].sum()
    return scale * (x @ p['w']) + noise

  args = (x, jax.random.key(3), np.array([0, 2]), np.float32(0.5))
  forward = jax.jit(oialr.factored(fn))
  _assert_close(forward(params, *args), fn(oialr.to_dense(params), *args))


def test_fn_is_called_as_it_is_without_low_rank_leaves():
  fn = lambda p, name: (name, p['w'])
  params = {'w': programs.normal(8, 9)}
  name, w = oialr.factored(fn)(params, 'no trace')
  assert name == 'no trace' and w is params['w']


def test_factored_keeps_the_name_and_signature():
  def forward(params, x):
    """Docstring."""

  wrapped = oialr.factored(forward)
  assert wrapped.__name__ == 'forward' and wrapped.__doc__ == 'Docstring.'
  assert inspect.signature(wrapped) == inspect.signature(forward)


@pytest.mark.parametrize('contraction', CONTRACTIONS)
def test_bases_get_no_gradient(contraction):
  fn, params, x = _pair()
  forward = oialr.factored(fn, contraction=contraction)
  grads = jax.grad(lambda p: jnp.sum(forward(p, x) ** 2))(params)
  assert not np.any(grads['w'].u) and not np.any(grads['w'].vt)
  assert np.all(grads['w'].s != 0)


def test_pruned_directions_get_no_gradient():
  fn, params, x = _pair(rank=4, pruned=2)
  forward = oialr.factored(fn, contraction='factors')
  s = jax.grad(lambda p: jnp.sum(forward(p, x) ** 2))(params)['w'].s
  assert np.all(s[:2, :2] != 0)
  assert not np.any(s[2:]) and not np.any(s[:, 2:])


# How it is multiplied.


@pytest.mark.parametrize(
  'tokens, m, n, rank, way',
  [
    (64, 40, 32, 4, 'factors'),
    (64, 40, 32, 24, 'precontract'),
    (64, 40, 32, 32, 'materialise'),
    (64, 40, 12, 8, 'precontract'),
    (64, 12, 40, 8, 'factors'),
  ],
)
@pytest.mark.parametrize('backwards', [False, True])
def test_auto_takes_the_cheapest_way(tokens, m, n, rank, way, backwards):
  """Backwards: the kernel is W^T as it was decomposed, and x W is wanted."""
  assert cost.cheapest(tokens, m, n, rank) == way
  shape = (n, m) if backwards else (m, n)
  params = programs.with_low_rank(
    {'w': programs.normal(*shape)},
    (programs.dot('w', shape, (0,), (1,), tokens),),
    lambda layer: rank,
  )
  fn = lambda p, x: x @ (p['w'].T if backwards else p['w'])
  x = programs.Shape((tokens, m), jnp.float32)
  program = lambda contraction: str(
    jax.make_jaxpr(oialr.factored(fn, contraction=contraction))(params, x)
  )
  ways = {other: program(other) for other in cost.WAYS}
  assert program('auto') == ways[way]
  assert len({*ways.values()}) == 3


@pytest.mark.parametrize(
  'contraction, way',
  [
    ({'up$': 'materialise'}, 'materialise'),
    ({'': 'materialise'}, 'materialise'),
    ({'^mlp/': 'factors', 'up': 'materialise'}, 'factors'),  # the first
    ({'up': 'auto', 'mlp': 'materialise'}, 'auto'),
    ({}, 'auto'),
  ],
  ids=str,
)
def test_contraction_by_path(contraction, way):
  layer = programs.dot('mlp/up', (40, 32), (0,), (1,), 64)
  assert layer.way(24) == 'precontract'
  params = programs.with_low_rank(
    {'mlp': {'up': programs.normal(40, 32)}}, (layer,), lambda layer: 24
  )
  fn = lambda x, p: x @ p['mlp']['up']
  program = lambda contraction, *args, **kwargs: str(
    jax.make_jaxpr(oialr.factored(fn, contraction=contraction))(*args, **kwargs)
  )
  x = programs.Shape((64, 40), jnp.float32)
  assert program(contraction, x, params) == program(way, x, params)
  assert program(contraction, x, p=params) == program(way, x, p=params)


def test_contraction_by_path_of_every_layer():
  p, params = _values('mlp')
  rules = {'b/w': 'materialise', 'w$': 'factors'}
  forward = oialr.factored(p.fn, contraction=rules)
  jaxpr = jax.make_jaxpr(forward)(params, *p.args)
  ranks = {layer.path: layer.max_rank // 2 for layer in p.layers}
  a, b, c = ranks.values()
  dots = _equations(jaxpr, 'dot_general')
  assert [e.outvars[0].aval.shape[-2:] for e in dots] == [
    *((3, a), (3, a), (3, 9)),  # x U, then Sigma, then V^T
    *((b, 7), (9, 7), (3, 7)),  # Sigma V^T, U Sigma V^T, x W
    *((3, c), (3, c), (3, 5)),
  ]


@pytest.mark.parametrize('source', ['program', 'configuration'])
@pytest.mark.parametrize('contraction', cost.WAYS)
def test_precision_is_that_of_the_program(contraction, source):
  highest = (lax.Precision.HIGHEST,) * 2
  layers = (
    programs.dot('w', (8, 9), (0,), (1,), 5),
    programs.conv('k', (9, 9, 3), (1, 2), (0,), 5),
  )
  params = programs.with_low_rank(
    {'w': programs.normal(8, 9), 'k': programs.normal(9, 9, 3)},
    layers,
    lambda layer: 3,
  )

  def fn(p, x):
    precision = 'highest' if source == 'program' else None
    y = jnp.dot(x, p['w'], precision=precision)
    y = lax.conv(y.T[None], p['k'], (1,), 'SAME', precision=precision)
    return y, jnp.sin(p['w']) if source == 'configuration' else 0.0

  forward = oialr.factored(fn, contraction=contraction)
  configured = 'highest' if source == 'configuration' else 'default'
  with jax.default_matmul_precision(configured):
    jaxpr = jax.make_jaxpr(forward)(params, programs.normal(5, 8))
  products = [
    eqn.params['precision']
    for name in ('dot_general', 'conv_general_dilated')
    for eqn in _equations(jaxpr, name)
  ]
  assert len(products) == (6 if source == 'program' else 8)
  assert set(products) == {highest}


def test_the_last_product_has_the_programs_element_type():
  """And those before it keep the type of the activations."""
  p, params = _values('mixed_precision')
  forward = oialr.factored(p.fn, contraction='factors')
  jaxpr = jax.make_jaxpr(forward)(params, *p.args)
  types = [e.outvars[0].aval.dtype for e in _equations(jaxpr, 'dot_general')]
  assert types == [
    *(jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    *(jnp.bfloat16, jnp.bfloat16, jnp.float32),
    *(jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
  ]


@pytest.mark.parametrize('contraction', CONTRACTIONS)
def test_bases_may_be_narrower_than_sigma(contraction):
  """They are widened before anything is multiplied."""
  fn, params, x = _pair()
  w = params['w']
  bfloat16 = lambda a: a.astype(jnp.bfloat16)
  params['w'] = dataclasses.replace(w, u=bfloat16(w.u), vt=bfloat16(w.vt))
  actual = oialr.factored(fn, contraction=contraction)(params, x)
  _assert_close(actual, fn(oialr.to_dense(params), x))


def test_checkpoints_stay_what_they_are():
  p, params = _values('rematerialised')
  forward = oialr.factored(p.fn, contraction='factors')
  options = lambda *args: [
    (eqn.params['policy'], eqn.params['prevent_cse'])
    for eqn in _equations(jax.make_jaxpr(*args[:1])(*args[1:]))
    if 'policy' in eqn.params
  ]
  desired = options(p.fn, p.params, *p.args)
  assert options(forward, params, *p.args) == desired
  assert len({*desired}) == 3


def test_axes_of_size_one_may_have_either_role():
  """Whatever a layer calls them, there is no need for the kernel."""
  p = programs.PROGRAMS['one_head']()
  layers = (
    programs.dot('query', (8, 1, 6), (0, 1), (2,), 5),
    programs.dot('out', (1, 6, 8), (1,), (0, 2), 5),
    programs.conv('pointwise', (1, 1, 8, 7), (2,), (0, 1, 3), 5),
  )
  params = programs.with_low_rank(
    programs.values(p.params), layers, lambda layer: 2
  )
  with _log() as records:
    actual = oialr.factored(p.fn, contraction='factors')(params, *p.args)
  assert not records
  _assert_close(actual, p.fn(oialr.to_dense(params), *p.args))


def test_a_fallback_is_logged(caplog):
  fn, params, x = _pair()
  with caplog.at_level(logging.DEBUG, 'oialr_jax'):
    oialr.factored(fn, contraction='factors')(params, x)
    assert not caplog.records
    oialr.factored(lambda p: jnp.sin(p['w']))(params)
  assert 'multiplied out for sin' in caplog.text


# Bad input.


def test_factored_refuses_what_is_no_function():
  with pytest.raises(TypeError, match='fn=3: must be a function'):
    oialr.factored(3)


def test_factored_refuses_an_unknown_contraction():
  with pytest.raises(
    ValueError, match="'fast': must be one of auto, factors, precontract, mat"
  ):
    oialr.factored(jnp.dot, contraction='fast')


@pytest.mark.parametrize(
  'contraction, message',
  [
    (
      {'w': 'fast'},
      r"\{'w': 'fast'\}: must be one of .* or a mapping from pat",
    ),
    ({'w': None}, 'must be one of auto, factors, precontract, materialise'),
    (None, 'contraction=None: must be one of auto, factors'),
    ({'(': 'auto'}, r"contraction='\(': not a regular expression"),
  ],
)
def test_factored_refuses_a_contraction(contraction, message):
  with pytest.raises(ValueError, match=message):
    oialr.factored(jnp.dot, contraction=contraction)


def test_a_pattern_that_matches_nothing_is_refused():
  fn, params, x = _pair()
  forward = oialr.factored(fn, contraction={'w': 'auto', 'kernel': 'factors'})
  message = "contraction='kernel': matches none of 3 leaves .*: 'b', 'w', ''"
  with pytest.raises(ValueError, match=message):
    forward(params, x)
  with pytest.raises(ValueError, match=r"contraction='\^kernel'"):
    nested = oialr.factored(
      lambda p, x: x @ p['a']['kernel'], contraction={'^kernel': 'auto'}
    )
    nested({'a': {'kernel': params['w']}}, x)
  # A kernel that is dense still is there, and so are bases to come.
  oialr.factored(fn, contraction={'b': 'auto'})(params, x)


def test_factored_hands_errors_of_fn_on():
  fn, params, _ = _pair()
  with pytest.raises(TypeError, match='contracting dimensions'):
    oialr.factored(fn)(params, programs.normal(5, 7))


_USES = {
  'x @ w': lambda w, x: x @ w,
  'w @ x': lambda w, x: w @ x.T,
  'numpy @ w': lambda w, x: np.asarray(x) @ w,
  'w @ numpy': lambda w, x: w @ np.asarray(x).T,
  'jnp.dot': lambda w, x: jnp.dot(x, w),
  'jnp.matmul': lambda w, x: jnp.matmul(x, w),
  'jnp.einsum': lambda w, x: jnp.einsum('ab,bc', x, w),
  'jnp.tensordot': lambda w, x: jnp.tensordot(x, w, 1),
  'jnp.sum': lambda w, x: jnp.sum(w),
  'jnp.asarray': lambda w, x: jnp.asarray(w),
  'np.asarray': lambda w, x: np.asarray(w),
  '2 * w': lambda w, x: 2 * w,
  'w * 2': lambda w, x: w * 2,
  'w + 1': lambda w, x: w + 1,
  'w - 1': lambda w, x: w - 1,
  'w / 2': lambda w, x: w / 2,
  '-w': lambda w, x: -w,
  'w[0]': lambda w, x: w[0],
  'jit': lambda w, x: jax.jit(jnp.dot)(x, w),
  'standardize': lambda w, x: jax.nn.standardize(w),
}


@pytest.mark.parametrize('use', _USES)
@pytest.mark.parametrize('kind', ['LowRank', 'Factors'])
def test_a_function_that_is_not_wrapped_says_so(use, kind):
  _, params, x = _pair()
  w = {'LowRank': params, 'Factors': _compressed(params)}[kind]['w']
  pattern = rf'a {kind} kernel \(8, 9\) .* Wrap.*oialr\.factored'
  with pytest.raises(TypeError, match=pattern):
    _USES[use](w, x)


@pytest.mark.parametrize('kind', ['LowRank', 'Factors'])
def test_attributes_of_arrays_say_so_too(kind):
  _, params, _ = _pair()
  w = {'LowRank': params, 'Factors': _compressed(params)}[kind]['w']
  for name in ('T', 'reshape', 'astype', 'sum', 'at'):
    pattern = rf"'{name}': a {kind} kernel .* Wrap.*oialr\.factored"
    with pytest.raises(AttributeError, match=pattern):
      getattr(w, name)
  assert not hasattr(w, '__len__')


def test_lax_and_flax_refuse_a_low_rank_kernel():
  """Before it can say anything; the type or the path is named."""
  _, params, x = _pair()
  with pytest.raises(TypeError, match='LowRank'):
    lax.dot(x, params['w'])
  with pytest.raises(flax.errors.ScopeParamShapeError, match='kernel'):
    variables = {'params': {'kernel': params['w'], 'bias': params['b']}}
    nn.Dense(9).apply(variables, x)


def test_low_rank_nodes_can_be_copied_and_pickled():
  _, params, _ = _pair()
  for clone in (copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))):
    jax.tree.map(np.testing.assert_array_equal, clone(params), params)
