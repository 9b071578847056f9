"""Walking a jaxpr: one interpreter for the readers and the evaluators.

Only public JAX (`jax.extend.core`): it has to run on many releases.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex
import jax.numpy as jnp

from oialr_jax import tree

# Equations that hold a program of their own and call it once, on their
# operands, without a meaning of their own for derivatives.
_CALLS = ('jit', 'pjit', 'closed_call', 'core_call', 'call')
_REMAT = ('checkpoint', 'remat', 'remat2')

Rule = Callable[[jex.JaxprEqn, list[Any]], Sequence[Any]]


def run(
  jaxpr: jex.Jaxpr, consts: Sequence[Any], args: Sequence[Any], rule: Rule
) -> list[Any]:
  """Evaluates a jaxpr, `rule(eqn, operands)` giving each equation's results.

  Values are dropped after their last use, as a program would.
  """
  env = {}
  last_use = {}
  for i, eqn in enumerate(jaxpr.eqns):
    for v in eqn.invars:
      if not isinstance(v, jex.Literal):
        last_use[v] = i
  for v in jaxpr.outvars:
    if not isinstance(v, jex.Literal):
      last_use[v] = len(jaxpr.eqns)

  def read(v):
    return v.val if isinstance(v, jex.Literal) else env[v]

  env.update(zip(jaxpr.constvars, consts, strict=True))
  env.update(zip(jaxpr.invars, args, strict=True))
  for i, eqn in enumerate(jaxpr.eqns):
    env.update(
      zip(eqn.outvars, rule(eqn, [read(v) for v in eqn.invars]), strict=True)
    )
    for v in {v for v in eqn.invars if not isinstance(v, jex.Literal)}:
      if last_use[v] == i:
        del env[v]
  return [
    jnp.asarray(v.val, v.aval.dtype) if isinstance(v, jex.Literal) else env[v]
    for v in jaxpr.outvars
  ]


def bind(eqn: jex.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
  """Evaluates one equation, unchanged, on new operands.

  The equation is wrapped as a program, because how a primitive is bound to its
  parameters changes from release to release.
  """
  by_var = {
    v: x
    for v, x in zip(eqn.invars, operands, strict=True)
    if not isinstance(v, jex.Literal)
  }
  program = jex.Jaxpr(
    (),
    list(by_var),
    eqn.outvars,
    [eqn],
    eqn.effects,
    jex.DebugInfo('bind', eqn.primitive.name, None, None),
  )
  return jex.jaxpr_as_fun(jex.ClosedJaxpr(program, ()))(*by_var.values())


def called(eqn: jex.JaxprEqn) -> jex.ClosedJaxpr | None:
  """The program of an equation that calls one once (jit and the like)."""
  if eqn.primitive.name not in _CALLS:
    return None
  return closed(eqn.params.get('jaxpr', eqn.params.get('call_jaxpr')))


def rematerialised(eqn: jex.JaxprEqn) -> jex.ClosedJaxpr | None:
  """The program of a `jax.checkpoint` equation."""
  if eqn.primitive.name not in _REMAT:
    return None
  return closed(eqn.params['jaxpr'])


def custom_derivative(eqn: jex.JaxprEqn) -> jex.ClosedJaxpr | None:
  """The primal program of a `custom_jvp` or `custom_vjp` equation."""
  if not eqn.primitive.name.startswith('custom_'):
    return None
  program = eqn.params.get('call_jaxpr', eqn.params.get('fun_jaxpr'))
  return None if program is None else closed(program)


def scanned(eqn: jex.JaxprEqn) -> tuple[jex.ClosedJaxpr, int, int]:
  """The body of a `scan` equation, the numbers of its constants and carries.

  Counted by shapes, as their parameters differ from release to release: what
  is scanned over, in or out, has one axis more outside of the body.
  """
  body = closed(eqn.params['jaxpr'])
  sliced = lambda outer, inner: sum(
    v.aval.ndim > w.aval.ndim for v, w in zip(outer, inner, strict=True)
  )
  carries = len(eqn.outvars) - sliced(eqn.outvars, body.jaxpr.outvars)
  xs = sliced(eqn.invars, body.jaxpr.invars)
  return body, len(eqn.invars) - xs - carries, carries


def closed(jaxpr: jex.Jaxpr | jex.ClosedJaxpr) -> jex.ClosedJaxpr:
  """A `ClosedJaxpr` of either kind."""
  return jaxpr if hasattr(jaxpr, 'consts') else jex.ClosedJaxpr(jaxpr, ())


def trace(fn: Callable[..., Any], args: tuple, kwargs: dict, is_leaf=None):
  """Traces `fn(*args, **kwargs)`, with what is not an array held as it is.

  Args:
    fn: any JAX function.
    args: pytrees. A leaf that has a shape and a dtype is traced, whatever else
      there is (flags, names, functions) stays what it is.
    kwargs: likewise.
    is_leaf: of nodes that stand for an array and have its shape and dtype.

  Returns:
    The `ClosedJaxpr`, the leaves that are its arguments, by their position
    among the leaves of `(args, kwargs)`, and the tree of what fn returns.
  """
  leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf)
  dynamic = {i: x for i, x in enumerate(leaves) if tree.is_array(x)}

  def flat(*arrays):
    filled = list(leaves)
    for i, x in zip(dynamic, arrays, strict=True):
      filled[i] = x
    args, kwargs = jax.tree.unflatten(treedef, filled)
    return fn(*args, **kwargs)

  shapes = [_shape_of(x, is_leaf) for x in dynamic.values()]
  jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(*shapes)
  return jaxpr, dynamic, jax.tree.structure(out)


def _shape_of(x, is_leaf):
  """What `make_jaxpr` is given: a node that stands for an array, as shape.

  Inside `shard_map` its type says also over which devices the node varies.
  """
  if is_leaf is None or not is_leaf(x):
    return x
  total = lambda leaves: sum(jnp.sum(a, dtype=x.dtype) for a in leaves)
  fill = lambda leaves: jnp.full(x.shape, total(leaves), x.dtype)
  return jax.eval_shape(fill, jax.tree.leaves(x))
