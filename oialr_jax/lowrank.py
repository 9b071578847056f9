r"""The low-rank kernel: one node type that takes the place of an array.

A kernel's axes are split into rows (contracted with the activations) and
columns (free), so that it is a matrix `W [m, n]`, and W = U Sigma V^T with
U^T U = I and V^T V = I (arXiv 2401.08505, Section 3). The factors keep the
kernel's axes apart: `u [*batch, *rows, r]`, `s [*batch, r, r]`,
`vt [*batch, r, *cols]`. In matrix form, `[b, m, n]`, all batch axes are one.

Rank is logical before it is physical: a pruned direction is a column of U and
a row of V^T that are exactly zero, behind the live ones.
"""

from collections.abc import Mapping
import dataclasses
import functools
import itertools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Axes = tuple[int, ...]

# Matrix products of the transforms: a TPU's and a GPU's default would round
# float32 operands to bfloat16 or TF32.
PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class MatrixView:
  """Which axes of a kernel are its rows, its columns and its batch.

  The axes, ascending, are those of the core kernel. Further leading axes, as
  `vmap` and `scan` peel off, are batch axes that need no name.

  An axis may be cut into equal blocks, each a matrix of its own: the chunks of
  a fused qkv, the groups of a convolution. It then counts as two axes, that of
  the blocks, a batch axis, and that of the places within a block.

  Attributes:
    rows: contracted axes.
    cols: free axes.
    batch: axes of stacked matrices.
    blocks: of every axis of the core kernel, the number of blocks that it is
      cut into, 1 where it is whole; empty when all are.
  """

  rows: Axes
  cols: Axes
  batch: Axes = ()
  blocks: Axes = ()

  @classmethod
  def of(
    cls,
    rows: Axes,
    cols: Axes,
    batch: Axes = (),
    blocks: Mapping[int, int] = types.MappingProxyType({}),
  ) -> 'MatrixView':
    """From axes of the whole kernel: leading batch axes become nameless.

    Args:
      rows: contracted axes.
      cols: free axes.
      batch: axes of stacked matrices.
      blocks: of the columns that are cut, into how many blocks.
    """
    lead = 0
    while lead in batch:
      lead += 1
    core = range(lead, len(rows) + len(cols) + len(batch))
    cut = [a for a in core if blocks.get(a, 1) > 1]
    # A cut axis is followed by its places: all axes behind it move up by one.
    place = lambda a: a - lead + sum(c < a for c in cut)
    named = lambda axes: [place(a) for a in axes if a >= lead]
    return cls(
      tuple(sorted(named(rows))),
      tuple(sorted(place(a) + (a in cut) for a in cols)),
      tuple(sorted(named(batch) + named(cut))),
      tuple(blocks.get(a, 1) for a in core) if cut else (),
    )

  @property
  def ndim(self) -> int:
    """The number of axes of the core kernel."""
    return len(self.blocks) or len(self.order(0))

  def order(self, lead: int) -> Axes:
    """The permutation from the axes of `cut` to (lead, batch, rows, cols)."""
    core = (*self.batch, *self.rows, *self.cols)
    return (*range(lead), *(a + lead for a in core))

  def cut(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a kernel with every axis that is cut counted as two."""
    lead = len(shape) - self.ndim
    blocks = self.blocks or (1,) * self.ndim
    sizes = [
      (n,) if b == 1 else (b, n // b)
      for n, b in zip(shape[lead:], blocks, strict=True)
    ]
    return (*shape[:lead], *itertools.chain(*sizes))

  def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The inverse of `cut`."""
    lead = len(shape) - len(self.order(0))
    sizes = iter(shape[lead:])
    blocks = self.blocks or (1,) * self.ndim
    join = lambda b: next(sizes) * (1 if b == 1 else next(sizes))
    return (*shape[:lead], *map(join, blocks))

  def split(self, shape: tuple[int, ...]) -> tuple[Axes, Axes, Axes]:
    """Sizes of the batch, row and column axes of a kernel of this shape."""
    lead = len(shape) - self.ndim
    shape = self.cut(shape)
    sizes = lambda axes: tuple(shape[lead + a] for a in axes)
    return (
      (*shape[:lead], *sizes(self.batch)),
      sizes(self.rows),
      sizes(self.cols),
    )

  def to_matrix(self, kernel: Array) -> Array:
    """The kernel as `[b, m, n]`."""
    batch, rows, cols = self.split(kernel.shape)
    order = self.order(kernel.ndim - self.ndim)
    kernel = jnp.transpose(kernel.reshape(self.cut(kernel.shape)), order)
    return kernel.reshape(math.prod(batch), math.prod(rows), math.prod(cols))

  def from_matrix(self, matrix: Array, shape: tuple[int, ...]) -> Array:
    """The kernel of this shape from its matrix `[b, m, n]`."""
    batch, rows, cols = self.split(shape)
    order = self.order(len(shape) - self.ndim)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    kernel = jnp.transpose(matrix.reshape(*batch, *rows, *cols), inverse)
    return kernel.reshape(shape)

  def unstacked(self) -> 'MatrixView':
    """The view without its first batch axis, as an iteration of a scan sees.

    Raises:
      ValueError: there is no such axis.
    """
    if not self.batch:
      raise ValueError(f'{self}: has no batch axis to take away.')
    gone = self.batch[0]
    down = lambda axes: tuple(a - (a > gone) for a in axes if a != gone)
    blocks = list(self.blocks)
    if blocks:  # no axis in front of the first of the batch is cut
      blocks[gone : gone + 1] = [1] if blocks[gone] > 1 else []
    if max(blocks, default=1) == 1:
      blocks = []
    return MatrixView(
      down(self.rows), down(self.cols), down(self.batch), tuple(blocks)
    )


class _NotAnArray:
  """A node in the place of an array: its sizes, and what it is not good for.

  Used as the array that it stands for, it says what is wrong.
  """

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  def _refuse(self, *_, **__):
    raise TypeError(_UNWRAPPED.format(type(self).__name__, self.shape))

  # A property, so that `lax` names the type and not this method.
  __jax_array__ = property(_refuse)
  __array__ = __getitem__ = __neg__ = _refuse
  __matmul__ = __rmatmul__ = __mul__ = __rmul__ = _refuse
  __add__ = __radd__ = __sub__ = __rsub__ = _refuse
  __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _refuse

  def __getattr__(self, name: str):
    # Only reached for what the class lacks. A model that was not wrapped asks
    # an array for `.T` or `.reshape`: say what is wrong, not what is missing.
    if name.startswith('__'):
      raise AttributeError(name)
    raise AttributeError(
      f'{name!r}: ' + _UNWRAPPED.format(type(self).__name__, 'without it')
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(_NotAnArray):
  """A kernel W = U Sigma V^T.

  Attributes:
    u: frozen basis, `[*batch, *rows, r]`.
    s: Sigma, `[*batch, r, r]`, the part that trains.
    vt: frozen basis, `[*batch, r, *cols]`.
    view: which axes of the dense kernel are rows, columns and batch.
  """

  u: Array
  s: Array
  vt: Array
  view: MatrixView = dataclasses.field(metadata={'static': True})

  @property
  def rank(self) -> int:
    """The physical rank r, the number of columns that U stores."""
    return self.s.shape[-1]

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the dense kernel."""
    lead = self.s.ndim - 2 - len(self.view.batch)
    batch = self.s.shape[:-2]
    rows = self.u.shape[len(batch) : -1]
    return _dense_shape(self.view, lead, batch, rows, self.vt.shape)

  @property
  def dtype(self) -> Any:
    """Of the dense kernel, which is Sigma's: the bases may be narrower."""
    return self.s.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors(_NotAnArray):
  """A kernel W = A B, compressed: what a trained `LowRank` is shipped as.

  Attributes:
    a: `[*batch, *rows, r]`, U Sigma.
    b: `[*batch, r, *cols]`, V^T.
    view: which axes of the dense kernel are rows, columns and batch.
  """

  a: Array
  b: Array
  view: MatrixView = dataclasses.field(metadata={'static': True})

  @property
  def rank(self) -> int:
    return self.a.shape[-1]

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the dense kernel."""
    lead = self.a.ndim - len(self.view.batch) - len(self.view.rows) - 1
    batch = self.a.shape[: lead + len(self.view.batch)]
    rows = self.a.shape[len(batch) : -1]
    return _dense_shape(self.view, lead, batch, rows, self.b.shape)

  @property
  def dtype(self) -> Any:
    return self.a.dtype


_UNWRAPPED = (
  'a {} kernel {} reached a function that computes with arrays. Wrap the '
  'function: oialr.factored(fn)(params, ...), or pass it '
  'oialr.to_dense(params).'
)


def is_low_rank(x: Any) -> bool:
  """Whether x is a `LowRank` node: the `is_leaf` of every transform."""
  return isinstance(x, LowRank)


def is_factored(x: Any) -> bool:
  """Whether x is a `LowRank` or a `Factors` node."""
  return isinstance(x, (LowRank, Factors))


def matrices(node: LowRank) -> tuple[Array, Array, Array]:
  """U `[b, m, r]`, Sigma `[b, r, r]` and V^T `[b, r, n]`, in float32 or wider.

  Traceable, and exact: nothing is rounded.
  """
  b, m, n = matrix_shape(node)
  r = node.rank
  return (
    wide(node.u).reshape(b, m, r),
    wide(node.s).reshape(b, r, r),
    wide(node.vt).reshape(b, r, n),
  )


def from_matrices(like: LowRank, u: Array, s: Array, vt: Array) -> LowRank:
  """The inverse of `matrices`, in the dtypes and axes of `like`, rank free."""
  batch, rows, cols = like.view.split(like.shape)
  r = s.shape[-1]
  return LowRank(
    u.reshape(*batch, *rows, r).astype(like.u.dtype),
    s.reshape(*batch, r, r).astype(like.s.dtype),
    vt.reshape(*batch, r, *cols).astype(like.vt.dtype),
    like.view,
  )


def matrix_shape(node: LowRank | Factors) -> tuple[int, int, int]:
  """(b, m, n) of the dense kernel."""
  batch, rows, cols = node.view.split(node.shape)
  return math.prod(batch), math.prod(rows), math.prod(cols)


def materialise(
  node: LowRank | Factors, precision: jax.lax.PrecisionLike = PRECISION
) -> Array:
  """The dense kernel, multiplied out in float32 or wider."""
  matmul = functools.partial(jnp.matmul, precision=precision)
  if isinstance(node, LowRank):
    left, s, right = matrices(node)
    # Sigma joins the smaller side.
    if left.shape[-2] < right.shape[-1]:
      left = matmul(left, s)
    else:
      right = matmul(s, right)
  else:
    b, m, n = matrix_shape(node)
    left = wide(node.a).reshape(b, m, node.rank)
    right = wide(node.b).reshape(b, node.rank, n)
  kernel = node.view.from_matrix(matmul(left, right), node.shape)
  return kernel.astype(node.dtype)


def live(u: Array) -> Array:
  """Which columns of U `[b, m, r]` are not pruned, as bool `[b, r]`."""
  return jnp.any(u != 0, axis=-2)


def matmul(a: Array, b: Array) -> Array:
  """a b at full precision on every device."""
  return jnp.matmul(a, b, precision=PRECISION)


def transpose(a: Array) -> Array:
  """Of the matrices in the last two axes."""
  return jnp.swapaxes(a, -1, -2)


def wide(x: Array) -> Array:
  """In float32 or, where it is wider already, as it is."""
  return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def _dense_shape(view, lead, batch, rows, vt_shape) -> tuple[int, ...]:
  cols = vt_shape[len(batch) + 1 :]
  sizes = dict(zip(view.batch, batch[lead:], strict=True))
  sizes |= dict(zip(view.rows, rows, strict=True))
  sizes |= dict(zip(view.cols, cols, strict=True))
  return view.whole((*batch[:lead], *(sizes[a] for a in range(len(sizes)))))
