"""Tests of walking and evaluating programs."""

import weakref

import jax
from jax import lax
from jax.extend import core as jex
import jax.numpy as jnp
import numpy as np
import pytest

from oialr_jax import jaxprs
from tests import programs


def _run(fn, *args, rule=jaxprs.bind):
  jaxpr = jax.make_jaxpr(fn)(*args)
  leaves = jax.tree.leaves(args)
  return jaxprs.run(jaxpr.jaxpr, jaxpr.consts, leaves, rule)


def _only(fn, *args, name=None):
  """The only equation of a program, or the first of this name."""
  eqns = jax.make_jaxpr(fn)(*args).jaxpr.eqns
  if name is None:
    assert len(eqns) == 1
    return eqns[0]
  return next(eqn for eqn in eqns if eqn.primitive.name == name)


X = programs.normal(4, 4)

_PROGRAMS = {
  'literals': lambda x: 2.0 * x + 1.0 - x,
  'literal_output': lambda x: (x, 3.0, 2),
  'inputs_as_outputs': lambda x: (x, x, x + x),
  'constants': lambda x: x + jnp.asarray(X)[::-1],
  'dropped_outputs': lambda x: (jnp.linalg.qr(x)[1], lax.top_k(x, 2)[0]),
  'several_results': lambda x: lax.sort((x, -x), num_keys=1),
  'calls': lambda x: jax.jit(lambda x: jax.jit(jnp.sin)(x) * 2)(x),
  'checkpoint': lambda x: jax.checkpoint(jnp.sin)(x),
  'custom_jvp': lambda x: jax.nn.relu(x),
  'custom_vjp': lambda x: _doubled(x),
  'cond': lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
  'scan': lambda x: lax.scan(lambda c, x: (c + x, c @ x), x[0], x),
  'while': lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x),
  'keys': lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
  'no_equation': lambda x: x,
}


@jax.custom_vjp
def _doubled(x):
  return 2 * x


_doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (7 * g,))


@pytest.mark.parametrize('name', _PROGRAMS)
def test_run_evaluates_what_the_function_does(name):
  fn = _PROGRAMS[name]
  actual = _run(fn, X)
  desired = jax.tree.leaves(jax.jit(fn)(X))
  assert len(actual) == len(desired)
  for a, b in zip(actual, desired):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
  'name', ['literals', 'calls', 'checkpoint', 'custom_jvp', 'custom_vjp']
)
def test_run_can_be_differentiated(name):
  """Derivatives that a program brings with it are those that are used."""
  total = lambda fn: lambda x: jnp.sum(fn(x))
  actual = jax.grad(total(lambda x: _run(_PROGRAMS[name], x)[0]))(X)
  desired = jax.grad(total(_PROGRAMS[name]))(X)
  np.testing.assert_allclose(actual, desired, rtol=1e-6)


def test_run_under_transformations():
  fn = lambda x: jnp.sin(x) @ x
  run = lambda x: _run(fn, x)[0]
  xs = programs.normal(3, 4, 4)
  np.testing.assert_allclose(
    jax.jit(jax.vmap(run))(xs), jax.vmap(fn)(xs), rtol=1e-5
  )


def test_run_gives_the_rule_every_equation_in_order():
  seen = []

  def rule(eqn, operands):
    seen.append((eqn.primitive.name, operands))
    return [eqn.primitive.name]

  out = _run(lambda x: jnp.cos(jnp.sin(x)) * 2.0, X, rule=rule)
  names, operands = zip(*seen)
  assert names == ('sin', 'cos', 'mul') and out == ['mul']
  assert operands[0][0] is X and operands[1] == ['sin']
  assert operands[2][0] == 'cos' and operands[2][1] == 2.0


def test_run_drops_values_after_their_last_use():
  class Value:
    pass

  alive, most = weakref.WeakSet(), 0

  def rule(eqn, operands):
    nonlocal most
    out = [Value() for _ in eqn.outvars]
    alive.update(out)
    most = max(most, len(alive))
    return out

  def fn(x):
    for _ in range(10):
      x = jnp.sin(x)
    return x

  _run(fn, X, rule=rule)
  assert most == 2


def test_bind_is_the_equation_on_other_operands():
  eqn = _only(lambda x: lax.top_k(x, 2), X)
  values, indices = jaxprs.bind(eqn, [-X])
  np.testing.assert_array_equal(values, -np.sort(X, -1)[:, :2])
  np.testing.assert_array_equal(indices, np.argsort(X, -1)[:, :2])


def test_bind_keeps_literals_and_repeated_operands():
  eqn = _only(lambda x: x - 2.0, X)
  assert isinstance(eqn.invars[1], jex.Literal)
  np.testing.assert_allclose(jaxprs.bind(eqn, [2 * X, 5.0])[0], 2 * X - 2.0)
  eqn = _only(lambda x: x * x, X)
  np.testing.assert_allclose(jaxprs.bind(eqn, [2 * X, 2 * X])[0], 4 * X * X)


def test_bind_of_an_equation_with_effects(capsys):
  def fn(x):
    jax.debug.print('x is {}', x)
    return x + 1

  assert _run(fn, 1.0) == [2.0]
  jax.effects_barrier()
  assert capsys.readouterr().out == 'x is 1.0\n'


def test_the_programs_of_equations():
  def only(program, eqn):
    """The one reader that knows the equation."""
    readers = jaxprs.called, jaxprs.rematerialised, jaxprs.custom_derivative
    found = [reader(eqn) for reader in readers]
    assert [x is not None for x in found] == [r is program for r in readers]
    jaxpr = next(filter(None, found), None)
    return jaxpr and [e.primitive.name for e in jaxpr.jaxpr.eqns]

  assert only(jaxprs.called, _only(jax.jit(jnp.tanh), X)) == ['tanh']
  remat = _only(jax.checkpoint(jnp.tanh), X)
  assert only(jaxprs.rematerialised, remat) == ['tanh']
  assert only(jaxprs.custom_derivative, _only(_doubled, X)) == ['mul']
  softplus = jax.custom_jvp(jnp.exp)
  softplus.defjvp(lambda p, t: (p[0], t[0]))
  assert only(jaxprs.custom_derivative, _only(softplus, X)) == ['exp']
  assert only(None, _only(jnp.tanh, X)) is None
  assert only(None, _only(_PROGRAMS['while'], X)) is None


@pytest.mark.parametrize('consts', [0, 1, 2])
@pytest.mark.parametrize('carries', [0, 1, 2])
@pytest.mark.parametrize('xs', [0, 1, 3])
def test_scanned_counts_constants_and_carries(consts, carries, xs):
  """Of any shapes, scalars too."""
  closed = [programs.normal(4), programs.normal()][:consts]
  init = [programs.normal(), programs.normal(2)][:carries]
  over = [programs.normal(5), programs.normal(5, 2), programs.normal(5, 1)][:xs]

  total = lambda x: sum(jnp.sum(a) for a in jax.tree.leaves(x))

  def fn(closed, init, over):
    body = lambda c, x: ([a + 1 for a in c], (total(c), total((closed, x))))
    return lax.scan(body, init, over, length=5)

  eqn = _only(fn, closed, init, over, name='scan')
  body, *counts = jaxprs.scanned(eqn)
  assert counts == [consts, carries]
  assert len(body.jaxpr.invars) == consts + carries + xs


def test_trace_holds_what_is_no_array():
  def fn(p, x, flag, *, name, scale):
    assert flag is True and name == 'name'
    return {'out': p['w'] @ x * scale, 'none': None}

  args = (
    {'w': np.eye(4, dtype=np.float32)},
    jax.ShapeDtypeStruct((4,), 'float32'),
  )
  kwargs = {'name': 'name', 'scale': np.float32(2)}
  jaxpr, dynamic, out = jaxprs.trace(fn, (*args, True), kwargs)
  # By their positions among the leaves, of which True and 'name' are two.
  assert dynamic == {0: args[0]['w'], 1: args[1], 4: kwargs['scale']}
  shapes = [(v.aval.shape, v.aval.dtype) for v in jaxpr.jaxpr.invars]
  assert shapes == [(x.shape, x.dtype) for x in dynamic.values()]
  assert out == jax.tree.structure({'out': 0, 'none': None})


def test_trace_takes_types_for_what_they_are():
  """`np.float32` has a shape and a dtype, like every instance of it."""
  fn = lambda x, dtype: x.astype(dtype)
  jaxpr, dynamic, _ = jaxprs.trace(fn, (X, np.float16), {})
  assert list(dynamic) == [0]
  assert jaxpr.out_avals[0].dtype == np.float16


def test_trace_takes_a_node_for_the_array_it_stands_for():
  node = programs.with_low_rank(
    {'w': jnp.zeros((3, 6, 5), jnp.bfloat16)},
    (programs.dot('w', (3, 6, 5), (1,), (2,), 1, batch=(0,)),),
    lambda layer: 2,
  )['w']
  is_node = lambda x: x is node
  jaxpr, dynamic, _ = jaxprs.trace(lambda x: x, (node,), {}, is_node)
  assert dynamic == {0: node}
  (aval,) = jaxpr.in_avals
  assert (aval.shape, aval.dtype) == ((3, 6, 5), jnp.bfloat16)
