"""Which kernels can be low-rank: read from the model's own jaxpr.

`find_layers` traces the function on shapes alone and follows every parameter
to the equation that consumes it. The axes contracted with the activations are
the rows of its matrix, the free ones the columns. Names, modules and libraries
play no part, so that any JAX function will do.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
import dataclasses
import math
import numbers
from typing import Any

from jax.extend import core as jex
import jax.numpy as jnp

from oialr_jax import cost
from oialr_jax import jaxprs
from oialr_jax import lowrank
from oialr_jax import tree
from oialr_jax import views

Axes = tuple[int, ...]
Rank = int | float | Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Layer:
  """A kernel that can be low-rank.

  Attributes:
    path: of the kernel in the parameters, 'encoder/block_0/mlp/kernel'.
    shape: of the dense kernel.
    rows: its axes that are contracted with the activations.
    cols: its free axes.
    batch: axes of stacked kernels, each with a matrix of its own.
    kind: 'dot' or 'conv'.
    tokens: rows of activations that one call of the function sends through
      each matrix.
    order: position among the layers of `find_layers`, in order of execution.
    blocks: the columns fall into so many equal blocks, in the order of the
      kernel's memory, each with a matrix of its own: the groups of a
      convolution, or what `split` asked for.
    multiplied_out: why `factored` multiplies the kernel out, at whatever rank;
      empty where it does not.
    before_head: it is the last one, but a matrix without rank, such as a head
      of one output, is used behind it.

  Raises:
    ValueError: the columns do not fall into so many blocks.
  """

  path: str
  shape: tuple[int, ...]
  rows: Axes
  cols: Axes
  batch: Axes = ()
  kind: str = 'dot'
  tokens: int = 0
  order: int = 0
  blocks: int = 1
  multiplied_out: str = ''
  before_head: bool = False

  def __post_init__(self):
    cut = math.prod(self._cuts().values())
    if self.blocks < 1 or cut != self.blocks:
      raise ValueError(
        f'{self.path!r}: columns of sizes '
        f'{tuple(self.shape[a] for a in self.cols)} do not fall into '
        f'{self.blocks} equal blocks.'
      )

  @property
  def matrix(self) -> tuple[int, int]:
    """(m, n): rows and columns of each matrix."""
    return self._size(self.rows), self._size(self.cols) // self.blocks

  @property
  def stack(self) -> int:
    """The number of matrices."""
    return self._size(self.batch) * self.blocks

  @property
  def max_rank(self) -> int:
    """min(m, n)."""
    return min(self.matrix)

  @property
  def flops(self) -> int:
    """Of the products with the dense kernel in one call, forward only."""
    m, n = self.matrix
    return 2 * self.stack * self.tokens * m * n

  @property
  def view(self) -> lowrank.MatrixView:
    """Which axes are rows, columns and batch, as `LowRank` has it."""
    return lowrank.MatrixView.of(self.rows, self.cols, self.batch, self._cuts())

  def way(self, rank: int) -> str:
    """How `factored` multiplies by the kernel at this rank, see `cost`."""
    if self.multiplied_out:
      return cost.MATERIALISE
    return cost.cheapest(self.tokens, *self.matrix, rank)

  def multiply_adds(self, rank: int | None = None) -> int:
    """Of a training step at this rank, of the dense kernel by default."""
    shape = self.tokens, *self.matrix
    if rank is None:
      return self.stack * cost.dense(*shape)
    return self.stack * cost.low_rank(self.way(rank), *shape, rank)

  def _size(self, axes: Axes) -> int:
    return math.prod(self.shape[a] for a in axes)

  def _cuts(self) -> dict[int, int]:
    """Of the columns that blocks cut, into how many parts each."""
    cuts, left = {}, self.blocks
    for axis in self.cols:
      if left == 1:
        break
      cuts[axis] = math.gcd(left, self.shape[axis])
      left //= cuts[axis]
      if left > 1 and cuts[axis] != self.shape[axis]:
        break  # a part of this axis and of the next: no block of memory
    return cuts


def find_layers(
  fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> tuple[Layer, ...]:
  """Finds the kernels of `fn(params, *args, **kwargs)` that can be low-rank.

  Nothing is computed: `jax.ShapeDtypeStruct`s do in the place of arrays. A kernel
  is eligible if it is used in products, always of the same axes. It may be summed
  up besides, each entry by itself, as in a penalty or a norm that is logged; for
  that `factored` multiplies it out.

  Args:
    fn: any JAX function whose first argument holds the parameters.
    params: pytree of arrays or shapes.
    *args: further arguments of fn.
    **kwargs: keyword arguments of fn.

  Returns:
    The eligible layers, in the order in which fn uses them. `explain` says of
    the others why they are not among them.

  Raises:
    ValueError: params is empty, or has no eligible kernel.
  """
  layers, reasons = read(fn, params, args, kwargs)
  if not layers:
    why = '; '.join(f'{p!r}: {r}' for p, r in list(reasons.items())[:3])
    raise ValueError(
      'fn has no kernel that can be low-rank'
      + (f' ({why}).' if why else ': it uses no parameter of two axes.')
    )
  return layers


def select(
  layers: Sequence[Layer],
  *,
  keep_first: bool = False,
  keep_last: bool = True,
  include: str = r'.*',
  exclude: str = r'(?!)',
  min_rank: int = 8,
  max_aspect: float | None = None,
) -> tuple[Layer, ...]:
  """Chooses the layers that become low-rank; the others stay dense.

  Args:
    layers: from `find_layers`, all of them: first and last are decided before
      anything else is filtered, so that a small head is still the last layer.
    keep_first: keep the first layer full-rank.
    keep_last: keep the last layer full-rank (the published runs do). A head of
      one output has no rank and is the last one all the same.
    include: a regular expression that a path must match (`re.search`).
    exclude: one that it must not; the default matches nothing.
    min_rank: the least min(m, n) worth factoring.
    max_aspect: the largest max(m, n) / min(m, n), exclusive; the published code
      uses 10 for linear layers. No limit by default.

  Raises:
    ValueError: nothing is left, or an argument makes no sense.
  """
  layers = tuple(layers)
  if not layers:
    raise ValueError('layers is empty: there is nothing to select from.')
  if min_rank < 1:
    raise ValueError(f'min_rank={min_rank}: must be at least 1.')
  if max_aspect is not None and max_aspect <= 1:
    raise ValueError(f'max_aspect={max_aspect}: must be greater than 1.')
  wanted = tree.pattern('include', include)
  unwanted = tree.pattern('exclude', exclude)
  ordered = sorted(layers, key=lambda layer: layer.order)
  drop_last = keep_last and not ordered[-1].before_head
  kept = ordered[int(keep_first) : len(ordered) - int(drop_last)]
  chosen = tuple(
    layer
    for layer in kept
    if wanted.search(layer.path)
    and not unwanted.search(layer.path)
    and layer.max_rank >= min_rank
    and (max_aspect is None or _aspect(layer) < max_aspect)
  )
  if not chosen:
    raise ValueError(
      f'none of the {len(layers)} layers is selected: keep_first='
      f'{keep_first}, keep_last={keep_last}, include={include!r}, '
      f'exclude={exclude!r}, min_rank={min_rank}, max_aspect={max_aspect}; '
      'loosen one of these (`Schedule` has keep_first and keep_last). `explain` '
      'says why other kernels are no layers.'
    )
  return chosen


def ranks_of(layers: Sequence[Layer], rank: Rank | None) -> dict[str, int]:
  """The rank of every layer, by path, see `rank_of`; a mapping gives each.

  Raises:
    ValueError: a rank is out of range, or of a path that is no layer's.
    TypeError: a rank is no number.
  """
  if isinstance(rank, Mapping):
    tree.check_known(rank, [layer.path for layer in layers], 'layer')
  return {
    layer.path: rank_of(
      layer, rank.get(layer.path) if isinstance(rank, Mapping) else rank
    )
    for layer in layers
  }


def rank_of(layer: Layer, rank: int | float | None) -> int:
  """The rank that `rank` (None: full, int: itself, float: share) means here.

  Raises:
    ValueError: it is out of range for this layer's matrix.
    TypeError: it is no number.
  """
  m, n = layer.matrix
  if rank is None:
    return layer.max_rank
  if isinstance(rank, bool) or not isinstance(rank, numbers.Real):
    raise TypeError(
      f'{layer.path!r}: rank={rank!r} must be an int, a float or a mapping '
      'from paths to ints.'
    )
  if not isinstance(rank, numbers.Integral):
    if not 0 < rank <= 1:
      raise ValueError(
        f'{layer.path!r}: rank={rank} as a share of min(m, n) must be in '
        '(0, 1]; pass an int for a number of directions.'
      )
    return max(1, round(rank * layer.max_rank))
  if rank < 1:
    raise ValueError(f'{layer.path!r}: rank={rank} must be at least 1.')
  if rank > layer.max_rank:
    raise ValueError(
      f'{layer.path!r}: rank {rank} exceeds min(m, n) = {layer.max_rank} of '
      f'its ({m}, {n}) matrix; pass rank <= {layer.max_rank} or exclude the '
      'path.'
    )
  return int(rank)


def split(
  layers: Iterable[Layer], blocks: Mapping[str, int]
) -> tuple[Layer, ...]:
  """Gives the parts of fused kernels factors and ranks of their own.

  A fused qkv kernel `[embed, 3 heads head_dim]` in 3 blocks has one matrix
  each for q, k and v; in 3 heads blocks it has one for every head. Blocks are
  of columns, one after the other in the kernel's memory.

  Args:
    layers: from `find_layers` or `select`.
    blocks: number of blocks by regular expression of the path (`re.search`, the
      first that matches); the other layers stay what they are.

  Returns:
    The layers, in the same order.

  Raises:
    ValueError: a pattern matches no layer; a layer is in blocks already, or its
      columns do not fall into so many.
    TypeError: blocks is no mapping to ints.
  """
  layers = tuple(layers)
  if not isinstance(blocks, Mapping):
    raise TypeError(
      f'blocks={blocks!r}: must be a mapping from patterns of paths to numbers '
      'of blocks.'
    )
  rules = {tree.pattern('blocks', p): n for p, n in blocks.items()}
  for rule, n in rules.items():
    if isinstance(n, bool) or not isinstance(n, numbers.Integral):
      raise TypeError(f'blocks[{rule.pattern!r}]={n!r}: must be an int.')
    if not any(rule.search(layer.path) for layer in layers):
      raise ValueError(
        f'blocks={rule.pattern!r}: matches none of the {len(layers)} layers.'
      )

  def of(layer: Layer) -> Layer:
    for rule, n in rules.items():
      if rule.search(layer.path):
        if layer.blocks > 1:
          raise ValueError(
            f'{layer.path!r}: is in {layer.blocks} blocks already.'
          )
        return dataclasses.replace(layer, blocks=n)
    return layer

  return tuple(map(of, layers))


def _aspect(layer: Layer) -> float:
  return max(layer.matrix) / min(layer.matrix)


# What changes entries each by itself; what sums over them; what wants a kernel as
# it is.
_ENTRYWISE = frozenset(
  'abs add div integer_pow max min mul neg sign sqrt square sub'.split()
)
_SUMS = frozenset(['reduce_sum', 'reduce_max', 'reduce_min'])
_CONSUMERS = frozenset(['dot_general', 'conv_general_dilated', 'scan', 'cond'])


@dataclasses.dataclass(frozen=True)
class _Kernel:
  """A parameter on its way through the program.

  `through` names the equation that it has come out of multiplied out, `entries`
  one that has changed its entries, each by itself: it may be summed up then, as
  in a penalty, and no more.
  """

  path: Hashable
  view: views.View
  through: str = ''
  entries: str = ''


@dataclasses.dataclass(frozen=True)
class Use:
  """What one equation does with a kernel.

  Attributes:
    kind: 'dot' or 'conv'.
    roles: of the kernel's axes: 'row', 'col' or 'batch'.
    tokens: of all the products that the equation makes.
    why_not: it is no product, or not one of a matrix.
    blocks: groups of a convolution.
    within: what keeps `factored` from a chain: an equation around it whose
      derivative is its own, or a parameter of its own.
    products: with each matrix, more than one in a scan.
    peeled: by scans over the kernel.
    precision: of the product.
  """

  kind: str
  roles: dict[int, str] | None
  tokens: int
  why_not: str = ''
  blocks: int = 1
  within: str = ''
  products: int = 1
  peeled: bool = False
  precision: Any = None


def read(
  fn: Callable[..., Any], params: Any, args: tuple, kwargs: dict
) -> tuple[tuple[Layer, ...], dict[str, str]]:
  """The layers of `find_layers`, and of other parameters why they are none."""
  if not callable(fn):
    raise TypeError(f'fn={fn!r}: must be a function of the parameters.')
  shapes = tree.flatten(params, lowrank.is_factored)
  if not shapes:
    raise ValueError("params has no leaves: pass the model's parameters.")
  jaxpr, dynamic, _ = jaxprs.trace(
    fn, (params, *args), kwargs, lowrank.is_factored
  )
  kernels = dict(enumerate(shapes))  # the leaves of params come first
  reader = _reader(
    jaxpr,
    [
      (kernels[i], views.View.of(x.shape)) if i in kernels else None
      for i, x in dynamic.items()
    ],
  )
  found = reader.uses
  matrices, reasons = {}, {}
  for path, leaf in shapes.items():
    if getattr(leaf, 'ndim', 0) < 2:
      continue
    unused = reader.summed.get(path, 'not used by the function')
    layer = _judge(path, leaf, found.get(path, []), unused)
    if isinstance(layer, str):
      reasons[path] = layer
      continue
    if layer.max_rank < 2:
      reasons[path] = _without_rank(layer)
    if layer.max_rank > 1 or layer.blocks == 1:
      matrices[path] = layer
  used = [matrices[path] for path in found if path in matrices]
  ordered = [x for x in used if x.max_rank > 1]
  layers = [dataclasses.replace(x, order=i) for i, x in enumerate(ordered)]
  if ordered and used[-1] is not ordered[-1]:
    layers[-1] = dataclasses.replace(layers[-1], before_head=True)
  return tuple(layers), reasons


def uses(
  jaxpr: jex.ClosedJaxpr, operands: Sequence[tuple[Hashable, views.View] | None]
) -> dict[Hashable, list[Use]]:
  """What a program does with its operands, by their names, in order of use.

  Operands without a name are no kernels. Sums over a kernel are no uses.
  """
  return _reader(jaxpr, operands).uses


def _reader(jaxpr: jex.ClosedJaxpr, operands) -> '_Reader':
  reader = _Reader()
  for out in reader.read(jaxpr, [x and _Kernel(*x) for x in operands]):
    reader.other(out, 'it is returned as it is')
  return reader


def _judge(path: str, leaf: Any, uses: list[Use], unused: str) -> Layer | str:
  """The layer that these uses make of a kernel, or why there is none."""
  if not uses:
    return unused
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    return f'dtype {leaf.dtype} is not real floating point'
  for use in uses:
    if use.why_not:
      return use.why_not
  # The role of an axis of size 1 makes no difference.
  roles = lambda use: {a: r for a, r in use.roles.items() if leaf.shape[a] > 1}
  if any(
    (roles(use), use.blocks) != (roles(uses[0]), uses[0].blocks) for use in uses
  ):
    return 'used in different roles (tied)'
  axes = lambda role: tuple(
    a for a in range(leaf.ndim) if uses[0].roles.get(a, 'row') == role
  )
  return Layer(
    path,
    tuple(leaf.shape),
    axes('row'),
    axes('col'),
    axes('batch'),
    uses[0].kind,
    sum(use.tokens for use in uses),
    blocks=uses[0].blocks,
    multiplied_out=next((u.within for u in uses if u.within), ''),
  )


def _without_rank(layer: Layer) -> str:
  m, n = layer.matrix
  grouped = f' in each of {layer.blocks} groups' if layer.blocks > 1 else ''
  return f'a matrix of {m} x {n}{grouped} has no rank'


class _Reader:
  """Records what the equations do with the kernels."""

  def __init__(self):
    self.uses: dict[Hashable, list[Use]] = {}
    self.summed: dict[Hashable, str] = {}  # by what
    self._repeats = 1
    self._within = ''

  def read(self, jaxpr: jex.ClosedJaxpr, operands: list) -> list:
    consts = [None] * len(jaxpr.consts)
    return jaxprs.run(jaxpr.jaxpr, consts, operands, self._rule)

  def other(self, kernel: _Kernel | None, why_not: str = ''):
    if isinstance(kernel, _Kernel):
      if kernel.entries:
        why_not = f'consumed by {kernel.entries}'
      self._record(kernel, Use('', None, 0, why_not))

  def _record(self, kernel: _Kernel, use: Use):
    self.uses.setdefault(kernel.path, []).append(use)

  def _rule(self, eqn: jex.JaxprEqn, operands: list) -> list:
    # Literals and constants are no kernels.
    operands = [x if isinstance(x, _Kernel) else None for x in operands]
    nothing = [None] * len(eqn.outvars)
    if not any(operands):
      return nothing
    name = eqn.primitive.name
    program = jaxprs.called(eqn)
    if program is not None:
      return self.read(program, operands)
    program = jaxprs.rematerialised(eqn)
    if program is not None:
      return _through(name, self.read(program, operands))
    program = jaxprs.custom_derivative(eqn)
    if program is not None:
      outer, self._within = self._within, self._within or name
      out = self.read(program, operands)
      self._within = outer
      return _through(name, out)
    if name in _CONSUMERS:
      operands = [self._unchanged(x) for x in operands]
      if not any(operands):
        return nothing
    if name == 'scan':
      return self._scan(eqn, operands)
    if name == 'cond':
      return self._cond(eqn, operands)
    if name == 'dot_general':
      self._dot(eqn, operands)
      return nothing
    if name == 'conv_general_dilated':
      self._conv(eqn, operands)
      return nothing
    return self._follow(eqn, operands)

  def _follow(self, eqn, operands) -> list:
    out, name = [None] * len(eqn.outvars), eqn.primitive.name
    kernels = [x for x in operands if x is not None]
    alone = len({kernel.path for kernel in kernels}) == 1
    for kernel in kernels:
      view = views.follow(kernel.view, eqn)
      if view is not None:
        out[0] = dataclasses.replace(kernel, view=view)
      elif alone and _is_entrywise(eqn, kernel):
        out[0] = dataclasses.replace(kernel, entries=kernel.entries or name)
      elif name in _SUMS:
        self._sum(kernel, name)
      else:
        self.other(kernel, f'consumed by {name}')
    return out

  def _unchanged(self, kernel: _Kernel | None) -> _Kernel | None:
    """The kernel; one whose entries have been changed ends here."""
    if kernel is None or not kernel.entries:
      return kernel
    self.other(kernel)
    return None

  def _sum(self, kernel: _Kernel, name: str):
    self.summed.setdefault(kernel.path, f'consumed by {kernel.entries or name}')

  def _scan(self, eqn, operands) -> list:
    body, consts, carry = jaxprs.scanned(eqn)
    inner = list(operands)
    for i, kernel in enumerate(operands):
      if kernel is None or i < consts:
        continue
      view = kernel.view.peel() if i >= consts + carry else None
      if view is None:
        self.other(kernel, 'carried through a scan')
        inner[i] = None
      else:
        inner[i] = dataclasses.replace(kernel, view=view)
    outer, self._repeats = self._repeats, eqn.params['length'] * self._repeats
    for out in self.read(body, inner):
      self.other(out, 'returned by the body of a scan')
    self._repeats = outer
    return [None] * len(eqn.outvars)

  def _cond(self, eqn, operands) -> list:
    # Every branch counts: tokens are those of all of them together.
    for branch in eqn.params['branches']:
      for out in self.read(branch, operands[1:]):
        self.other(out, 'returned by a branch')
    return [None] * len(eqn.outvars)

  def _dot(self, eqn, operands):
    contract, batch = eqn.params['dimension_numbers']
    if all(operands):
      one, other = operands
      if one.path == other.path and not eqn.outvars[0].aval.shape:
        self._sum(one, 'dot_general')  # such as of its squares
        return
      for kernel in operands:
        self.other(kernel, 'multiplied with another parameter')
      return
    side = 0 if operands[0] is not None else 1
    kernel, x = operands[side], eqn.invars[1 - side].aval.shape
    used = {*contract[1 - side], *batch[1 - side]}
    tokens = math.prod(n for i, n in enumerate(x) if i not in used)
    if eqn.params.get('out_sharding') is not None:
      kernel = dataclasses.replace(kernel, through='out_sharding')
    self._matrix('dot', kernel, eqn, contract[side], batch[side], tokens)

  def _conv(self, eqn, operands):
    kernel = operands[1]
    if operands[0] is not None:
      self.other(operands[0], 'convolved as an image')
    if kernel is None:
      return
    if eqn.params['batch_group_count'] != 1:
      self.other(kernel, 'a convolution of groups of the batch')
      return
    numbers = eqn.params['dimension_numbers']
    out = eqn.outvars[0].aval.shape
    tokens = math.prod(out) // out[numbers.out_spec[1]]
    groups = eqn.params['feature_group_count']
    channels = kernel.view.axes[numbers.rhs_spec[0]]
    channels = [a for a in channels if a.size > 1]
    blocks, stacked = groups, None
    if len(channels) > 1 and groups % channels[0].size == 0:
      stacked, *channels = channels  # convolutions under `vmap`
      blocks //= stacked.size
    in_order = stacked is None or stacked.axis < channels[0].axis
    if blocks > 1 and not (len(channels) == 1 and in_order):
      # Groups need not lie as blocks do in the kernel's memory.
      self.other(kernel, f'{groups} groups of channels made of several axes')
      return
    inputs = numbers.rhs_spec[1:]
    self._matrix('conv', kernel, eqn, inputs, (), tokens, blocks, stacked)

  def _matrix(
    self, kind, kernel, eqn, contracted, batch, tokens, blocks=1, stacked=None
  ):
    """Records a product, if it takes every axis of the kernel as a whole."""
    view = kernel.view
    parts = {i: 'row' for i in contracted} | {i: 'batch' for i in batch}
    roles = {atom.axis: {'batch'} for atom in view.stacked}
    for i, group in enumerate(view.axes):
      for atom in group:
        role = 'batch' if atom == stacked else parts.get(i, 'col')
        roles.setdefault(atom.axis, set()).add(role)
    mixed = [a for a, r in roles.items() if len(r) > 1]
    if mixed:
      self.other(kernel, f'axis {mixed[0]} has parts in different roles')
      return
    # Scans over the stack itself do not send more through each matrix.
    stack = math.prod(a.size for a in view.stacked)
    repeats = self._repeats // max(1, stack)
    roles = {a: r.pop() for a, r in roles.items()}
    use = Use(
      kind,
      roles,
      tokens * repeats,
      blocks=blocks,
      within=self._within or kernel.through,
      products=repeats,
      peeled=bool(view.stacked),
      precision=eqn.params['precision'],
    )
    self._record(kernel, use)


def _is_entrywise(eqn: jex.JaxprEqn, kernel: _Kernel) -> bool:
  same_shape = eqn.outvars[0].aval.shape == kernel.view.shape
  return eqn.primitive.name in _ENTRYWISE and same_shape


def _through(name: str, out: list) -> list:
  """Kernels that come out of an equation, which is where they are needed."""
  return [
    dataclasses.replace(x, through=x.through or name)
    if isinstance(x, _Kernel)
    else x
    for x in out
  ]
