"""Computing with the factors: the model's own program, without its kernels.

`factored(fn)` traces fn as if every kernel were dense and evaluates the program
with the factors in the place of the kernels. A product with one becomes two or
three smaller products, in the cheapest order (`cost`); casts, transposes and
reshapes act on the factors' axes; whatever else meets a kernel gets it
multiplied out, which is always right.

U and V are constants of differentiation, so that of a layer's input only
x U [tokens, r] is kept for the backward pass, and dW is never formed.
"""

from collections.abc import Callable
import dataclasses
import functools
import logging
import math
import string
from typing import Any

import jax
from jax import lax
from jax.extend import core as jex
import jax.numpy as jnp

from oialr_jax import cost
from oialr_jax import jaxprs
from oialr_jax import lowrank
from oialr_jax import views

Array = jax.Array
_log = logging.getLogger(__name__)


def factored(
  fn: Callable[..., Any], *, contraction: str = 'auto'
) -> Callable[..., Any]:
  """Returns fn with `LowRank` and `Factors` leaves allowed in any argument.

  It computes what `fn(to_dense(...))` computes, to rounding, and composes with
  `jit`, `grad`, `vmap`, `jax.checkpoint`, `lax.scan`, inside and outside.

  Args:
    fn: any JAX function that `jax.jit` could trace. Leaves of its arguments
      that are no arrays (flags, strings, functions) reach it as they are.
    contraction: 'auto' (the cheapest by `cost`, per layer), or one of
      'factors', 'precontract', 'materialise' for all layers.

  Returns:
    A function with the signature of fn. Gradients reach Sigma, not U and V.

  Raises:
    ValueError: contraction has another value.
    TypeError: fn is not callable.
  """
  if not callable(fn):
    raise TypeError(f'fn={fn!r}: must be a function of the parameters.')
  if contraction not in ('auto', *cost.WAYS):
    raise ValueError(
      f'contraction={contraction!r}: must be one of auto, '
      f'{", ".join(cost.WAYS)}.'
    )

  @functools.wraps(fn)
  def wrapped(*args, **kwargs):
    leaves = jax.tree.leaves((args, kwargs), is_leaf=lowrank.is_factored)
    if not any(map(lowrank.is_factored, leaves)):
      return fn(*args, **kwargs)
    jaxpr, operands, out = jaxprs.trace(fn, args, kwargs, lowrank.is_factored)
    evaluator = _Evaluator(contraction)
    results = evaluator.run(jaxpr, list(map(_enter, operands.values())))
    return jax.tree.unflatten(out, results)

  return wrapped


@dataclasses.dataclass(frozen=True)
class _Kernel:
  """A kernel on its way to the equation that consumes it.

  Attributes:
    node: the factors, as they came.
    view: the axes of the kernel now.
    dtype: the kernel's dtype now.
  """

  node: lowrank.LowRank | lowrank.Factors
  view: views.View
  dtype: Any

  @property
  def lead(self) -> int:
    """The number of leading batch axes that have no name in the node."""
    return self.node.ndim - self.node.view.ndim

  def role(self, atom: views.Atom) -> str:
    """Of an axis: 'row', 'col' or 'batch'."""
    axis = atom.axis - self.lead
    names = self.node.view
    return (
      'row' if axis in names.rows else 'col' if axis in names.cols else 'batch'
    )

  def roles(self, axes) -> set[str]:
    return {self.role(a) for a in self.view.atoms(axes) if a.size > 1}

  def parts(self, role: str) -> list[views.Atom]:
    """The atoms of this role, as they lie in the factors."""
    return sorted(
      (a for a in self.view.atoms() if self.role(a) == role), key=_place
    )

  def chain(self) -> list[tuple[str, Array]]:
    """The factors in the kernel's dtype, each with its place."""
    node = self._constant_bases()
    if isinstance(node, lowrank.Factors):
      chain = [('row', node.a), ('col', node.b)]
    else:
      chain = [('row', node.u), ('mix', node.s), ('col', node.vt)]
    return [(place, factor.astype(self.dtype)) for place, factor in chain]

  def dense(self, precision: lax.PrecisionLike = None) -> Array:
    """The kernel multiplied out, as the program would see it here."""
    kernel = lowrank.materialise(self._constant_bases(), precision)
    atoms = self.view.atoms()
    parts = sorted(atoms, key=_place)
    kernel = kernel.reshape([a.size for a in parts])
    kernel = kernel.transpose([parts.index(a) for a in atoms])
    return kernel.reshape(self.view.shape).astype(self.dtype)

  def _constant_bases(self):
    node = self.node
    if isinstance(node, lowrank.Factors):
      return node
    return dataclasses.replace(
      node, u=lax.stop_gradient(node.u), vt=lax.stop_gradient(node.vt)
    )


def _enter(x: Any) -> Any:
  if not lowrank.is_factored(x):
    return x
  return _Kernel(x, views.View.of(x.shape), x.dtype)


def _leave(x: Any, precision: lax.PrecisionLike = None) -> Any:
  return x.dense(precision) if isinstance(x, _Kernel) else x


def _place(atom: views.Atom) -> tuple[int, int]:
  """Orders atoms as they lie in the kernel's memory."""
  return atom.axis, -atom.stride


_ROWS = {'row', 'batch'}
_COLS = {'col', 'batch'}
_CONV_PARAMS = (
  'window_strides',
  'padding',
  'lhs_dilation',
  'rhs_dilation',
  'dimension_numbers',
  'precision',
)


class _Evaluator:
  """Evaluates a program in which some values are kernels in factors."""

  def __init__(self, contraction: str):
    self._contraction = contraction

  def run(self, jaxpr: jex.ClosedJaxpr, operands: list) -> list[Array]:
    out = jaxprs.run(jaxpr.jaxpr, jaxpr.consts, operands, self._rule)
    return [_leave(x) for x in out]

  def _rule(self, eqn: jex.JaxprEqn, operands: list) -> list:
    if not any(isinstance(x, _Kernel) for x in operands):
      return jaxprs.bind(eqn, operands)
    name = eqn.primitive.name
    program = jaxprs.called(eqn)
    if program is not None:
      # Kernels may come out as kernels: a cast is often a program of its own.
      return jaxprs.run(program.jaxpr, program.consts, operands, self._rule)
    if jaxprs.rematerialised(eqn) is not None:
      return self._remat(eqn, operands)
    if name == 'scan':
      return self._scan(eqn, operands)
    if name == 'cond':
      return self._cond(eqn, operands)
    product = None
    if name == 'dot_general':
      product = self._dot(eqn, operands)
    elif name == 'conv_general_dilated':
      product = self._conv(eqn, operands)
    elif isinstance(operands[0], _Kernel) and len(operands) == 1:
      product = self._follow(eqn, operands[0])
    if product is not None:
      return [product]
    _log.debug('a low-rank kernel is multiplied out for %s', name)
    precision = eqn.params.get('precision')
    return jaxprs.bind(eqn, [_leave(x, precision) for x in operands])

  def _follow(self, eqn, kernel: _Kernel) -> _Kernel | None:
    view = views.follow(kernel.view, eqn)
    if view is None:
      return None
    node = kernel.node
    if eqn.primitive.name == views.VARY:
      vary = lambda x: lax.pcast(x, eqn.params['axes'], to='varying')
      node = jax.tree.map(vary, node)
    return _Kernel(node, view, eqn.outvars[0].aval.dtype)

  # Equations that hold a program.

  def _remat(self, eqn, operands) -> list:
    program = jaxprs.rematerialised(eqn)
    enter, nodes = _packed(operands)
    run = jax.checkpoint(
      lambda nodes: self.run(program, enter(nodes)),
      prevent_cse=eqn.params['prevent_cse'],
      policy=eqn.params['policy'],
    )
    return run(nodes)

  def _cond(self, eqn, operands) -> list:
    index, *operands = operands
    enter, nodes = _packed(operands)
    branches = [
      lambda nodes, program=program: self.run(program, enter(nodes))
      for program in eqn.params['branches']
    ]
    return lax.switch(index, branches, nodes)

  def _scan(self, eqn, operands) -> list:
    params = eqn.params
    program, consts, carries = jaxprs.scanned(eqn)
    closed = operands[:consts]
    carry = [_leave(x) for x in operands[consts : consts + carries]]
    enter, xs = _packed(operands[consts + carries :], sliced=True)

    def body(carry, xs):
      out = self.run(program, [*closed, *carry, *enter(xs)])
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

  # Products.

  def _dot(self, eqn, operands) -> Array | None:
    """x W or x W^T as a chain of contractions; None when it cannot be one."""
    if all(isinstance(x, _Kernel) for x in operands):
      return None
    side = 0 if isinstance(operands[0], _Kernel) else 1
    kernel, x = operands[side], operands[1 - side]
    contract, batch = eqn.params['dimension_numbers']
    meets = [*zip(contract[1 - side], contract[side], strict=True)]
    meets += zip(batch[1 - side], batch[side], strict=True)
    x_free = [i for i in range(x.ndim) if i not in dict(meets)]
    taken = {j for _, j in meets}
    free = [j for j in range(len(kernel.view.axes)) if j not in taken]
    tokens = math.prod(x.shape[i] for i in x_free)
    chain = self._chain(
      kernel, contract[side], batch[side], free, tokens, eqn.params
    )
    if chain is None:
      return None
    letters = iter(string.ascii_letters)
    names = {atom: next(letters) for atom in kernel.view.atoms()}
    axes = {i: kernel.view.axes[j] for i, j in meets}
    x_names = {i: next(letters) for i in x_free}
    group = lambda j: [names[atom] for atom in kernel.view.axes[j]]
    kernel_out = [c for j in free for c in group(j)]
    sides = [kernel_out, list(x_names.values())][:: 1 if side == 0 else -1]
    shape, spec = [], []
    for i, n in enumerate(x.shape):
      shape += [atom.size for atom in axes[i]] if i in axes else [n]
      spec += [names[atom] for atom in axes[i]] if i in axes else x_names[i]
    y = _contract(
      (x.reshape(shape), spec),
      _labelled(kernel, chain, names, letters),
      [*(c for j in batch[side] for c in group(j)), *sides[0], *sides[1]],
      eqn.params,
    )
    aval = eqn.outvars[0].aval
    return y.reshape(aval.shape).astype(aval.dtype)

  def _conv(self, eqn, operands) -> Array | None:
    """A convolution with U as its kernel, then products along the channels."""
    params = eqn.params
    x, kernel = operands
    groups = params['feature_group_count'] * params['batch_group_count']
    if isinstance(x, _Kernel) or groups != 1:
      return None
    if kernel.lead or kernel.node.view.batch:
      return None
    numbers = params['dimension_numbers']
    out_axis, *in_axes = numbers.rhs_spec
    if kernel.roles(in_axes) - {'row'}:
      return None
    aval = eqn.outvars[0].aval
    channel = numbers.out_spec[1]
    tokens = math.prod(aval.shape) // aval.shape[channel]
    chain = self._chain(kernel, in_axes, (), [out_axis], tokens, params)
    if chain is None or chain[0][0] != 'row':
      return None
    (_, first), *rest = chain
    y = lax.conv_general_dilated(
      x,
      _conv_kernel(kernel, first, out_axis),
      **{k: params[k] for k in _CONV_PARAMS},
    )
    letters = string.ascii_letters[: y.ndim]
    spare = iter(string.ascii_letters[y.ndim :])
    links, shared = [], letters[channel]
    for place, factor in rest:
      if place == 'col':
        factor = _conv_channels(kernel, factor, out_axis)
      new = next(spare)
      links.append((factor, [shared, new]))
      shared = new
    out = [*letters[:channel], shared, *letters[channel + 1 :]]
    return _contract((y, [*letters]), links, out, params).astype(aval.dtype)

  def _chain(self, kernel, contracted, batch, free, tokens, params):
    """The factors in the order in which they meet x, each with its place.

    None when the contraction is not along the kernel's rows (x W) or its
    columns (x W^T), or when multiplying the kernel out is cheaper.
    """
    roles = kernel.roles
    if roles(batch) - {'batch'}:
      return None
    if roles(contracted) <= _ROWS and roles(free) <= _COLS:
      forward = True
    elif roles(contracted) <= _COLS and roles(free) <= _ROWS:
      forward = False
    else:
      return None
    places, chain = zip(*kernel.chain())
    if len(chain) == 3:
      way = self._way(kernel, forward, tokens)
      if way == cost.MATERIALISE:
        return None
      if way == cost.PRECONTRACT:
        places = ('row', 'col')
        chain = _precontract(*chain, forward, params['precision'])
    return list(zip(places, chain))[:: 1 if forward else -1]

  def _way(self, kernel: _Kernel, forward: bool, tokens: int) -> str:
    if self._contraction != 'auto':
      return self._contraction
    _, m, n = lowrank.matrix_shape(kernel.node)
    m, n = (m, n) if forward else (n, m)
    return cost.cheapest(tokens, m, n, kernel.node.rank)


def _packed(operands: list, sliced: bool = False):
  """Splits kernels into a pytree of arrays and the way back from it.

  With `sliced`, the way back is from the nodes that an iteration of a scan
  sees; a kernel whose first axis now is not its factors' is multiplied out.
  """
  if sliced:
    operands = [
      x if not isinstance(x, _Kernel) or _leads(x) else x.dense()
      for x in operands
    ]
  nodes = [x.node if isinstance(x, _Kernel) else x for x in operands]

  def enter(nodes):
    out = []
    for x, node in zip(operands, nodes, strict=True):
      if isinstance(x, _Kernel):
        node = _sliced(x, node) if sliced else _Kernel(node, x.view, x.dtype)
      out.append(node)
    return out

  return enter, nodes


def _leads(kernel: _Kernel) -> bool:
  axis = _first_stored(kernel)
  if axis is None:
    return False
  return kernel.view.axes[0] == (views.Atom(axis, 1, kernel.node.shape[axis]),)


def _first_stored(kernel: _Kernel) -> int | None:
  """The axis of the kernel that is the first axis of all its factors."""
  return 0 if kernel.lead else next(iter(kernel.node.view.batch), None)


def _sliced(kernel: _Kernel, node) -> _Kernel:
  """The kernel without that axis, in the factors that a scan has sliced."""
  gone = _first_stored(kernel)
  down = lambda axes: tuple(a - (a > gone) for a in axes)
  view = views.View(
    tuple(
      tuple(a._replace(axis=a.axis - (a.axis > gone)) for a in group)
      for group in kernel.view.axes[1:]
    )
  )
  if not kernel.lead:
    rows, cols, batch = node.view.rows, node.view.cols, node.view.batch[1:]
    names = lowrank.MatrixView(down(rows), down(cols), down(batch))
    node = dataclasses.replace(node, view=names)
  return _Kernel(node, view, kernel.dtype)


def _precontract(u: Array, s: Array, vt: Array, forward: bool, precision):
  """(U, Sigma V^T) or, for x W^T, (U Sigma, V^T)."""
  batch, r = s.shape[:-2], s.shape[-1]
  matmul = functools.partial(jnp.matmul, precision=precision)
  if forward:
    return u, matmul(s, vt.reshape(*batch, r, -1)).reshape(vt.shape)
  return matmul(u.reshape(*batch, -1, r), s).reshape(u.shape), vt


def _labelled(kernel: _Kernel, chain, names, letters):
  """The factors, split into the atoms of their axes, with einsum's letters."""
  r = kernel.node.rank
  left = right = next(letters)
  if len(chain) == 3:
    right = next(letters)
  sizes = {names[a]: a.size for a in names} | {left: r, right: r}
  named = lambda role: [names[a] for a in kernel.parts(role)]
  batch = named('batch')
  labels = {
    'row': [*batch, *named('row'), left],
    'mix': [*batch, left, right],
    'col': [*batch, right, *named('col')],
  }
  return [
    (factor.reshape([sizes[c] for c in labels[place]]), labels[place])
    for place, factor in chain
  ]


def _contract(x, links, out: list[str], params) -> Array:
  """x times the factors, one after the other, as einsums over letters."""
  x, letters = x
  for i, (factor, labels) in enumerate(links):
    later = {c for _, rest in links[i + 1 :] for c in rest} | {*out}
    last = i == len(links) - 1
    y = (
      out
      if last
      else [c for c in dict.fromkeys(letters + labels) if c in later]
    )
    x = jnp.einsum(
      f'{"".join(letters)},{"".join(labels)}->{"".join(y)}',
      x,
      factor,
      precision=params['precision'],
      # What lies between is kept as the program keeps its activations.
      preferred_element_type=params['preferred_element_type'] if last else None,
    )
    letters = y
  return x


def _conv_kernel(kernel: _Kernel, u: Array, out_axis: int) -> Array:
  """U laid out as the convolution wants its kernel, with r channels out."""
  atoms, r = _big(kernel.parts('row')), u.shape[-1]
  u = u.reshape([*(a.size for a in atoms), r])
  order, shape = [], []
  for axis, group in enumerate(kernel.view.axes):
    where = map(atoms.index, _big(group))
    order += [len(atoms)] if axis == out_axis else where
    size = math.prod(a.size for a in group)
    shape.append(r if axis == out_axis else size)
  return u.transpose(order).reshape(shape)


def _conv_channels(kernel: _Kernel, vt: Array, out_axis: int) -> Array:
  """V^T `[r, n]`, its columns in the order of the convolution's channels."""
  atoms, r = _big(kernel.parts('col')), len(vt)
  order = map(atoms.index, _big(kernel.view.axes[out_axis]))
  vt = vt.reshape([r, *(a.size for a in atoms)])
  return vt.transpose([0, *(1 + i for i in order)]).reshape(r, -1)


def _big(atoms) -> list[views.Atom]:
  return [a for a in atoms if a.size > 1]
