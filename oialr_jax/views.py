"""Following a kernel's axes from the parameter to the equation that uses it.

On its way a kernel may be cast, transposed, reshaped, squeezed or sliced by a
scan. Each axis of the travelling value is a product of atoms: contiguous parts
of the kernel's own axes. Two readers share this: `layers` (which axes are rows
and which are columns) and `factored` (how the factors must be laid out).
"""

import dataclasses
import math
from typing import NamedTuple

from jax.extend import core as jex
import jax.numpy as jnp


class Atom(NamedTuple):
  """A part of one axis of the kernel: `size` values, `stride` apart."""

  axis: int
  stride: int
  size: int


Group = tuple[Atom, ...]

# Inside `shard_map`: the same array, as one that may differ between devices.
VARY = 'pvary'

# Equations that hand on what they get. A sharding constraint is a hint, which
# the factors do without: they are small, and the compiler spreads it anyway.
_IDENTITIES = (
  'copy',
  'copy_p',
  'device_put',
  'optimization_barrier',
  'sharding_constraint',
  VARY,
)


@dataclasses.dataclass(frozen=True)
class View:
  """The axes of a travelling kernel, each a product of atoms.

  Attributes:
    axes: for every axis, its atoms, major first; none for one of size 1 that
      the kernel did not have.
    stacked: atoms that scans have peeled off.
  """

  axes: tuple[Group, ...]
  stacked: Group = ()

  @classmethod
  def of(cls, shape: tuple[int, ...]) -> 'View':
    """Of a kernel that has not been touched."""
    return cls(tuple((Atom(i, 1, n),) for i, n in enumerate(shape)))

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(math.prod(a.size for a in group) for group in self.axes)

  def atoms(self, axes=None) -> Group:
    """The atoms of these axes (default: of all) in order."""
    groups = self.axes if axes is None else [self.axes[i] for i in axes]
    return tuple(a for group in groups for a in group)

  def transpose(self, order: tuple[int, ...]) -> 'View':
    """The axes in another order."""
    return View(tuple(self.axes[i] for i in order), self.stacked)

  def reshape(self, shape: tuple[int, ...]) -> 'View | None':
    """Deals the atoms out to new axes; None where they would be torn apart."""
    if math.prod(self.shape) != math.prod(shape):
      return None
    atoms = list(reversed(self.atoms()))  # a stack: the major atom on top
    axes = []
    for size in shape:
      group = []
      while size > 1:
        atom = atoms.pop()
        if size % atom.size == 0:
          group.append(atom)
          size //= atom.size
        elif atom.size % size == 0:
          minor = atom.size // size
          group.append(Atom(atom.axis, atom.stride * minor, size))
          atoms.append(Atom(atom.axis, atom.stride, minor))
          size = 1
        else:
          return None
      axes.append(tuple(group))
    return View(tuple(axes), self.stacked)

  def peel(self) -> 'View | None':
    """What one iteration of a scan sees; None when there is no such axis."""
    if not self.axes:
      return None
    return View(self.axes[1:], self.stacked + self.axes[0])


def follow(view: View, eqn: jex.JaxprEqn) -> View | None:
  """The view after this equation; None if that changes more than the axes."""
  name, params = eqn.primitive.name, eqn.params
  if name == 'convert_element_type':
    floats = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    return view if floats else None
  if name in _IDENTITIES:
    return view if len(eqn.outvars) == 1 else None
  if name == 'transpose':
    return view.transpose(params['permutation'])
  if name == 'reshape':
    # Under `vmap`, a reshape may transpose first.
    order = params['dimensions']
    moved = view if order is None else view.transpose(order)
    return moved.reshape(eqn.outvars[0].aval.shape)
  if name == 'squeeze':
    gone = params['dimensions']
    return dataclasses.replace(
      view, axes=tuple(g for i, g in enumerate(view.axes) if i not in gone)
    )
  if name == 'broadcast_in_dim':
    return _expand(view, eqn.outvars[0].aval.shape, params)
  return None


def _expand(view: View, shape, params) -> View | None:
  if math.prod(shape) != math.prod(view.shape):
    return None
  axes = [()] * len(shape)
  for i, target in enumerate(params['broadcast_dimensions']):
    axes[target] = view.axes[i]
  return View(tuple(axes), view.stacked)
