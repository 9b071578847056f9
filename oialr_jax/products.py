"""Products of activations with a kernel in factors: dots and convolutions.

x U Sigma V^T is multiplied from the left, as a chain of small products, along
whichever axes the program contracts. The axes of the factors are those of the
kernel as it was when it entered the program; a `views.View` says how they lie
in the value that has travelled to the product.
"""

import dataclasses
import functools
import math
import string
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from oialr_jax import cost
from oialr_jax import lowrank
from oialr_jax import views

Array = jax.Array

# What `cost` decides.
AUTO = 'auto'

_ROWS = {'row', 'batch'}
_COLS = {'col', 'batch'}
_CONV_PARAMS = (
  'window_strides',
  'padding',
  'lhs_dilation',
  'rhs_dilation',
  'dimension_numbers',
  'feature_group_count',
  'precision',
)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel on its way to the equation that consumes it.

  Attributes:
    node: the factors, as they came.
    view: the axes of the kernel now.
    dtype: the kernel's dtype now.
    way: to multiply by it, or 'auto'.
    shards: devices that the rows of activations are split over.
  """

  node: lowrank.LowRank | lowrank.Factors
  view: views.View
  dtype: Any
  way: str
  shards: int = 1

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

  def forward(
    self, contracted: set[str], free: set[str], batch: set[str]
  ) -> bool | None:
    """Whether a product along these roles is x W; no if x W^T, or None."""
    if batch - {'batch'}:
      return None
    if contracted <= _ROWS and free <= _COLS:
      return True
    return False if contracted <= _COLS and free <= _ROWS else None

  def way_of(self, forward: bool, tokens: int) -> str:
    """To multiply so many rows of activations by it."""
    if self.way != AUTO:
      return self.way
    _, m, n = lowrank.matrix_shape(self.node)
    m, n = (m, n) if forward else (n, m)
    return cost.cheapest(tokens // self.shards, m, n, self.node.rank)

  def precontracted(
    self, forward: bool, precision: lax.PrecisionLike
  ) -> 'Kernel':
    """With Sigma multiplied into the factor that x meets last."""
    _, factors = zip(*self.chain())
    pair = _precontract(*factors, forward, precision)
    node = lowrank.Factors(*pair, self.node.view)
    return dataclasses.replace(self, node=node)

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


def enter(x: Any, way: str, shards: int = 1) -> Any:
  """What takes the place of a node in the program; x itself if it is none."""
  if not lowrank.is_factored(x):
    return x
  view = views.View.of(x.view.cut(x.shape))
  if x.view.blocks:
    view = view.reshape(x.shape)
  return Kernel(x, view, x.dtype, way, shards)


def leave(x: Any, precision: lax.PrecisionLike = None) -> Any:
  """The kernel multiplied out; x itself if it is none."""
  return x.dense(precision) if isinstance(x, Kernel) else x


def dot(eqn, operands) -> Array | None:
  """x W or x W^T as a chain of contractions; None when it cannot be one."""
  if all(isinstance(x, Kernel) for x in operands):
    return None
  if eqn.params.get('out_sharding') is not None:
    # Said of the one product that there was. Of those in a chain, some have
    # another shape, and to where they should go nobody has said.
    return None
  side = 0 if isinstance(operands[0], Kernel) else 1
  kernel, x = operands[side], operands[1 - side]
  contract, batch = eqn.params['dimension_numbers']
  meets = [*zip(contract[1 - side], contract[side], strict=True)]
  meets += zip(batch[1 - side], batch[side], strict=True)
  x_free = [i for i in range(x.ndim) if i not in dict(meets)]
  taken = {j for _, j in meets}
  free = [j for j in range(len(kernel.view.axes)) if j not in taken]
  tokens = math.prod(x.shape[i] for i in x_free)
  chain = _chain(kernel, contract[side], batch[side], free, tokens, eqn.params)
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


def conv(eqn, operands) -> Array | None:
  """A convolution with U as its kernel, then products along the channels."""
  x, kernel = operands
  chain = None if isinstance(x, Kernel) else _conv_chain(eqn, kernel)
  if chain is None:
    return None
  params, aval = eqn.params, eqn.outvars[0].aval
  numbers = params['dimension_numbers']
  out_axis, channel = numbers.rhs_spec[0], numbers.out_spec[1]
  letters = iter(string.ascii_letters)
  names = {atom: next(letters) for atom in kernel.view.atoms()}
  (u, labels), *links = _labelled(kernel, chain, names, letters)
  y = lax.conv_general_dilated(
    x,
    _conv_kernel(kernel, u, out_axis),
    **{k: params[k] for k in _CONV_PARAMS},
  )
  # Its channels are (block, r).
  blocks, r = kernel.parts('batch'), kernel.node.rank
  before, after = aval.shape[:channel], aval.shape[channel + 1 :]
  y = y.reshape(*before, *(a.size for a in blocks), r, *after)
  before, after = ([next(letters) for _ in shape] for shape in (before, after))
  named = lambda atoms: [names[a] for a in atoms]
  y = _contract(
    (y, [*before, *named(blocks), labels[-1], *after]),
    links,
    [*before, *named(_big(kernel.view.axes[out_axis])), *after],
    params,
  )
  return y.reshape(aval.shape).astype(aval.dtype)


def _conv_chain(eqn, kernel: Kernel):
  """The factors of x W, U first; None when a convolution cannot use them."""
  params, out = eqn.params, eqn.outvars[0].aval
  numbers = params['dimension_numbers']
  out_axis, *in_axes = numbers.rhs_spec
  if params['batch_group_count'] != 1 or kernel.roles(in_axes) - {'row'}:
    return None
  groups = params['feature_group_count']
  if groups > 1:
    # The major part of the channels, and every block is one of them.
    blocks, channels = kernel.parts('batch'), kernel.view.axes[out_axis]
    sizes = math.prod(a.size for a in blocks)
    major = _big(channels)[: len(_big(blocks))]
    if sizes != groups or major != _big(blocks):
      return None
  tokens = math.prod(out.shape) // out.shape[numbers.out_spec[1]]
  chain = _chain(kernel, in_axes, (), [out_axis], tokens, params)
  return chain if chain and chain[0][0] == 'row' else None


def _chain(kernel, contracted, batch, free, tokens, params):
  """The factors in the order in which they meet x, each with its place.

  None when the contraction is not along the kernel's rows (x W) or its
  columns (x W^T), or when multiplying the kernel out is cheaper.
  """
  forward = kernel.forward(*map(kernel.roles, (contracted, free, batch)))
  if forward is None:
    return None
  if lowrank.is_low_rank(kernel.node):
    way = kernel.way_of(forward, tokens)
    if way == cost.MATERIALISE:
      return None
    if way == cost.PRECONTRACT:
      kernel = kernel.precontracted(forward, params['precision'])
  return kernel.chain()[:: 1 if forward else -1]


def _place(atom: views.Atom) -> tuple[int, int]:
  """Orders atoms as they lie in the kernel's memory."""
  return atom.axis, -atom.stride


def _precontract(u: Array, s: Array, vt: Array, forward: bool, precision):
  """(U, Sigma V^T) or, for x W^T, (U Sigma, V^T)."""
  batch, r = s.shape[:-2], s.shape[-1]
  matmul = functools.partial(jnp.matmul, precision=precision)
  if forward:
    return u, matmul(s, vt.reshape(*batch, r, -1)).reshape(vt.shape)
  return matmul(u.reshape(*batch, -1, r), s).reshape(u.shape), vt


def _labelled(kernel: Kernel, chain, names, letters):
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


def _conv_kernel(kernel: Kernel, u: Array, out_axis: int) -> Array:
  """U laid out as the convolution wants its kernel, with (block, r) out."""
  atoms, r = _big(kernel.parts('row')), u.shape[-1]
  u = u.reshape([-1, *(a.size for a in atoms), r])
  order, shape = [], []
  for axis, group in enumerate(kernel.view.axes):
    if axis == out_axis:
      order += [0, len(atoms) + 1]
      shape.append(u.shape[0] * r)
    else:
      order += [1 + atoms.index(a) for a in _big(group)]
      shape.append(math.prod(a.size for a in group))
  return u.transpose(order).reshape(shape)


def _big(atoms) -> list[views.Atom]:
  return [a for a in atoms if a.size > 1]
