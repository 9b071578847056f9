"""Computing with the factors: the model's own program, without its kernels.

`factored(fn)` traces fn as if every kernel were dense and evaluates the program
with the factors in the place of the kernels. A product with one becomes two or
three smaller products, in the cheapest order (`cost`); casts, transposes and
reshapes act on the factors' axes; whatever else meets a kernel gets it
multiplied out, which is always right. What several products with one kernel
would each do to its factors is done once.

U and V are constants of differentiation, so that of a layer's input only
x U [tokens, r] is kept for the backward pass, and dW is never formed.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import logging
import re
from typing import Any

import jax
from jax import lax
from jax.extend import core as jex

from oialr_jax import cost
from oialr_jax import jaxprs
from oialr_jax import layers as layers_lib
from oialr_jax import lowrank
from oialr_jax import products
from oialr_jax import tree
from oialr_jax import views

Array = jax.Array
Contraction = str | Mapping[str, str]

_log = logging.getLogger(__name__)


def factored(
  fn: Callable[..., Any],
  *,
  contraction: Contraction = products.AUTO,
  shards: int = 1,
) -> Callable[..., Any]:
  """Returns fn with `LowRank` and `Factors` leaves allowed in any argument.

  It computes what `fn(to_dense(...))` computes, to rounding, and composes with
  `jit`, `grad`, `vmap`, `jax.checkpoint`, `lax.scan`, inside and outside.

  Args:
    fn: any JAX function that `jax.jit` could trace. Leaves of its arguments
      that are no arrays (flags, strings, functions) reach it as they are.
    contraction: 'auto' (the cheapest by `cost`, per layer), or one of
      'factors', 'precontract', 'materialise' for all layers. A mapping gives
      one of the four to the paths that a regular expression matches
      (`re.search`, the first that does; 'auto' where none does).
    shards: devices that a batch is split over: of the rows of activations each
      has a part, of what is done to factors alone nothing.

  Returns:
    A function with the signature of fn. Gradients reach Sigma, not U and V.

  Raises:
    ValueError: contraction or shards has another value, or a pattern is none;
      when called, a pattern matches no leaf of the arguments.
    TypeError: fn is not callable.
  """
  if not callable(fn):
    raise TypeError(f'fn={fn!r}: must be a function of the parameters.')
  if shards < 1:
    raise ValueError(f'shards={shards}: must be at least 1.')
  ways = _ways(contraction)

  @functools.wraps(fn)
  def wrapped(*args, **kwargs):
    leaves = jax.tree.leaves((args, kwargs), is_leaf=lowrank.is_factored)
    if not any(map(lowrank.is_factored, leaves)):
      return fn(*args, **kwargs)
    jaxpr, operands, out = jaxprs.trace(fn, args, kwargs, lowrank.is_factored)
    # A leaf's path is that within the argument that it is in.
    paths = [
      path
      for argument in (*args, *(kwargs[k] for k in sorted(kwargs)))
      for path in tree.paths(argument, lowrank.is_factored)
    ]
    ways_of = _by_path(ways, paths)
    entered = [
      products.enter(x, ways_of[i], shards) for i, x in operands.items()
    ]
    return jax.tree.unflatten(out, _run(jaxpr, entered))

  return wrapped


def _ways(contraction: Contraction) -> dict[re.Pattern[str], str]:
  """The ways by pattern of the path."""
  ways = contraction
  if not isinstance(contraction, Mapping):
    ways = {'': contraction}
  for way in ways.values():
    if way not in (products.AUTO, *cost.WAYS):
      raise ValueError(
        f'contraction={contraction!r}: must be one of {products.AUTO}, '
        f'{", ".join(cost.WAYS)}, or a mapping from patterns to these.'
      )
  return {tree.pattern('contraction', p): way for p, way in ways.items()}


def _by_path(ways: dict[re.Pattern[str], str], paths: list[str]) -> list[str]:
  """The way of every path; the first pattern that matches says it."""
  for pattern in ways:
    if not any(map(pattern.search, paths)):
      shown = ', '.join(map(repr, paths[:5]))
      raise ValueError(
        f'contraction={pattern.pattern!r}: matches none of {len(paths)} leaves '
        f'of the arguments: {shown}{", ..." if len(paths) > 5 else ""}.'
      )
  matching = lambda path: (w for p, w in ways.items() if p.search(path))
  return [next(matching(path), products.AUTO) for path in paths]


def _run(jaxpr: jex.ClosedJaxpr, operands: list) -> list[Array]:
  operands = _contracted_once(jaxpr, operands)
  out = jaxprs.run(jaxpr.jaxpr, jaxpr.consts, operands, _rule)
  return [products.leave(x) for x in out]


def _contracted_once(jaxpr: jex.ClosedJaxpr, operands: list) -> list:
  """Does once what several products with a kernel would each do by themselves.

  Else a step of a recurrent network, of a few tokens, would build W anew, or
  not at all, where that pays for all its steps. Each program looks at what it
  is given, so that a kernel that scans run over is contracted inside of them.
  """
  waiting = [
    isinstance(x, products.Kernel)
    and lowrank.is_low_rank(x.node)
    and x.way != cost.FACTORS
    for x in operands
  ]
  if not any(waiting):
    return operands
  uses = layers_lib.uses(
    jaxpr,
    [(i, x.view) if waiting[i] else None for i, x in enumerate(operands)],
  )
  return [
    _contracted(x, uses.get(i, [])) if waiting[i] else x
    for i, x in enumerate(operands)
  ]


def _contracted(
  kernel: products.Kernel, uses: list[layers_lib.Use]
) -> products.Kernel | Array:
  """The kernel as all products want it; as it is if they do not agree."""
  uses = [use for use in uses if not use.why_not]
  one_by_one = sum(use.products for use in uses) < 2
  if one_by_one or any(use.peeled for use in uses):
    return kernel
  ways = {(_forward(kernel, use), use.precision) for use in uses}
  if len(ways) > 1:
    return kernel
  ((forward, precision),) = ways
  way = cost.MATERIALISE
  if forward is not None and not any(use.within for use in uses):
    way = kernel.way_of(forward, sum(use.tokens for use in uses))
  if way == cost.MATERIALISE:
    return kernel.dense(precision)
  if way == cost.PRECONTRACT:
    return kernel.precontracted(forward, precision)
  return dataclasses.replace(kernel, way=way)


def _forward(kernel: products.Kernel, use: layers_lib.Use) -> bool | None:
  """Whether the use is x W; no if it is x W^T, None if it is neither."""
  atoms = [a for a in kernel.view.atoms() if a.size > 1]
  roles = lambda role: {
    kernel.role(a) for a in atoms if use.roles[a.axis] == role
  }
  return kernel.forward(*map(roles, ('row', 'col', 'batch')))


def _rule(eqn: jex.JaxprEqn, operands: list) -> list:
  if not any(isinstance(x, products.Kernel) for x in operands):
    return jaxprs.bind(eqn, operands)
  # What takes its place is of the scope that a profile knows the equation by.
  scope = str(eqn.source_info.name_stack)
  with jax.named_scope(scope) if scope else contextlib.nullcontext():
    return _with_kernels(eqn, operands)


def _with_kernels(eqn: jex.JaxprEqn, operands: list) -> list:
  name = eqn.primitive.name
  program = jaxprs.called(eqn)
  if program is not None:
    # Kernels may come out as kernels: a cast is often a program of its own.
    return jaxprs.run(program.jaxpr, program.consts, operands, _rule)
  if jaxprs.rematerialised(eqn) is not None:
    return _remat(eqn, operands)
  if name == 'scan':
    return _scan(eqn, operands)
  if name == 'cond':
    return _cond(eqn, operands)
  product = None
  if name == 'dot_general':
    product = products.dot(eqn, operands)
  elif name == 'conv_general_dilated':
    product = products.conv(eqn, operands)
  elif isinstance(operands[0], products.Kernel) and len(operands) == 1:
    product = _follow(eqn, operands[0])
  if product is not None:
    return [product]
  _log.debug('a low-rank kernel is multiplied out for %s', name)
  precision = eqn.params.get('precision')
  return jaxprs.bind(eqn, [products.leave(x, precision) for x in operands])


def _follow(eqn, kernel: products.Kernel) -> products.Kernel | None:
  view = views.follow(kernel.view, eqn)
  if view is None:
    return None
  node = kernel.node
  if eqn.primitive.name == views.VARY:
    vary = lambda x: lax.pcast(x, eqn.params['axes'], to='varying')
    node = jax.tree.map(vary, node)
  dtype = eqn.outvars[0].aval.dtype
  return dataclasses.replace(kernel, node=node, view=view, dtype=dtype)


# Equations that hold a program.


def _remat(eqn, operands) -> list:
  program = jaxprs.rematerialised(eqn)
  enter, nodes = _packed(operands)
  run = jax.checkpoint(
    lambda nodes: _run(program, enter(nodes)),
    prevent_cse=eqn.params['prevent_cse'],
    policy=eqn.params['policy'],
  )
  return run(nodes)


def _cond(eqn, operands) -> list:
  index, *operands = operands
  enter, nodes = _packed(operands)
  branches = [
    lambda nodes, program=program: _run(program, enter(nodes))
    for program in eqn.params['branches']
  ]
  # Of `lax.platform_dependent`: a switch would be lowered with all branches,
  # on platforms that know nothing of what is in some of them.
  platforms = eqn.params.get('branches_platforms')
  if platforms is not None:
    named = zip(platforms, branches, strict=True)
    per_platform = {n: f for ns, f in named for n in ns or ('default',)}
    return lax.platform_dependent(nodes, **per_platform)
  return lax.switch(index, branches, nodes)


def _scan(eqn, operands) -> list:
  params = eqn.params
  program, consts, carries = jaxprs.scanned(eqn)
  closed = operands[:consts]
  carry = [products.leave(x) for x in operands[consts : consts + carries]]
  enter, xs = _packed(operands[consts + carries :], sliced=True)

  def body(carry, xs):
    out = _run(program, [*closed, *carry, *enter(xs)])
    return out[:carries], out[carries:]

  carry, ys = lax.scan(
    body,
    carry,
    xs,
    length=params['length'],
    reverse=params['reverse'],
    unroll=params['unroll'],
  )
  return [*carry, *ys]


def _packed(operands: list, sliced: bool = False):
  """Splits kernels into a pytree of arrays and the way back from it.

  With `sliced`, the way back is from the nodes that an iteration of a scan
  sees; a kernel whose first axis now is not its factors' is multiplied out.
  """
  if sliced:
    operands = [
      x if not isinstance(x, products.Kernel) or _leads(x) else x.dense()
      for x in operands
    ]
  nodes = [x.node if isinstance(x, products.Kernel) else x for x in operands]

  def enter(nodes):
    out = []
    for x, node in zip(operands, nodes, strict=True):
      if isinstance(x, products.Kernel):
        node = _sliced(x, node) if sliced else dataclasses.replace(x, node=node)
      out.append(node)
    return out

  return enter, nodes


def _leads(kernel: products.Kernel) -> bool:
  axis = _first_stored(kernel)
  if axis is None:
    return False
  size = kernel.node.view.cut(kernel.node.shape)[axis]
  return kernel.view.axes[0] == (views.Atom(axis, 1, size),)


def _first_stored(kernel: products.Kernel) -> int | None:
  """The axis of the kernel that is the first axis of all its factors."""
  return 0 if kernel.lead else next(iter(kernel.node.view.batch), None)


def _sliced(kernel: products.Kernel, node) -> products.Kernel:
  """The kernel without that axis, in the factors that a scan has sliced."""
  gone = _first_stored(kernel)
  down = lambda a: a._replace(axis=a.axis - (a.axis > gone))
  axes = (tuple(map(down, group)) for group in kernel.view.axes[1:])
  if not kernel.lead:
    node = dataclasses.replace(node, view=node.view.unstacked())
  return dataclasses.replace(kernel, node=node, view=views.View(tuple(axes)))
