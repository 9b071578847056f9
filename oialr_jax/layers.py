"""Which kernels can be low-rank: read from the model's own jaxpr.

`find_layers` traces the function on shapes alone and follows every parameter
to the equation that consumes it. The axes contracted with the activations are
the rows of its matrix, the free ones the columns. Names, modules and libraries
play no part, so that any JAX function will do.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import math
import re
from typing import Any

from jax.extend import core as jex
import jax.numpy as jnp

from oialr_jax import cost
from oialr_jax import jaxprs
from oialr_jax import lowrank
from oialr_jax import tree
from oialr_jax import views

Axes = tuple[int, ...]


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
  """

  path: str
  shape: tuple[int, ...]
  rows: Axes
  cols: Axes
  batch: Axes = ()
  kind: str = 'dot'
  tokens: int = 0
  order: int = 0

  @property
  def matrix(self) -> tuple[int, int]:
    """(m, n): rows and columns of each matrix."""
    size = lambda axes: math.prod(self.shape[a] for a in axes)
    return size(self.rows), size(self.cols)

  @property
  def stack(self) -> int:
    """The number of matrices."""
    return math.prod(self.shape[a] for a in self.batch)

  @property
  def max_rank(self) -> int:
    return min(self.matrix)

  @property
  def view(self) -> lowrank.MatrixView:
    return lowrank.MatrixView.of(self.rows, self.cols, self.batch)


def find_layers(
  fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> tuple[Layer, ...]:
  """Finds the kernels of `fn(params, *args, **kwargs)` that can be low-rank.

  Nothing is computed: `jax.ShapeDtypeStruct`s do in the place of arrays.

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
  layers, reasons = _read(fn, params, args, kwargs)
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
  exclude: str = r'$^',
  min_rank: int = 8,
  max_aspect: float | None = None,
) -> tuple[Layer, ...]:
  """Chooses the layers that become low-rank; the others stay dense.

  Args:
    layers: from `find_layers`, all of them: first and last are decided before
      anything else is filtered, so that a small head is still the last layer.
    keep_first: keep the first layer full-rank.
    keep_last: keep the last layer full-rank (the published runs do).
    include: a regular expression that a path must match (`re.search`).
    exclude: one that it must not.
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
  wanted, unwanted = _pattern('include', include), _pattern('exclude', exclude)
  ordered = sorted(layers, key=lambda layer: layer.order)
  kept = ordered[int(keep_first) : len(ordered) - int(keep_last)]
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
      'loosen one of these.'
    )
  return chosen


@dataclasses.dataclass(frozen=True)
class Explanation:
  """What `explain` found; its `str` is a table.

  Attributes:
    layers: the eligible layers, in order of use.
    reasons: of every other parameter of two axes or more, why not.
  """

  layers: tuple[Layer, ...]
  reasons: dict[str, str]

  def __str__(self) -> str:
    rows = [_HEADER]
    rows += [_row(layer) for layer in self.layers]
    rows += [(path, *[''] * 6, why) for path, why in self.reasons.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    line = lambda row: '  '.join(c.ljust(w) for c, w in zip(row, widths))
    return '\n'.join(line(row).rstrip() for row in rows)


def explain(
  layers_or_fn: Iterable[Layer] | Callable[..., Any],
  params: Any = None,
  *args: Any,
  **kwargs: Any,
) -> Explanation:
  """Says of every kernel what it is, what it costs, or why it stays dense.

  Args:
    layers_or_fn: layers, or a function to read with the following arguments.
    params: as for `find_layers`.
    *args: as for `find_layers`.
    **kwargs: as for `find_layers`.

  Returns:
    An `Explanation`, to be printed. Break-even is the rank below which the
    factors take fewer multiplications (time) or fewer numbers (storage) than
    the dense kernel.
  """
  if not callable(layers_or_fn):
    return Explanation(tuple(layers_or_fn), {})
  return Explanation(*_read(layers_or_fn, params, args, kwargs))


_HEADER = (
  'path',
  'shape',
  'matrix',
  'kind',
  'tokens',
  'Mflop',
  'break-even rank (time, storage)',
  'low-rank',
)


def _row(layer: Layer) -> tuple[str, ...]:
  m, n = layer.matrix
  stack = f'{layer.stack} x ' if layer.batch else ''
  return (
    layer.path,
    str(layer.shape),
    f'{stack}{m} x {n}',
    layer.kind,
    str(layer.tokens),
    f'{2e-6 * layer.stack * layer.tokens * m * n:.3g}',
    f'{cost.break_even_time(m, n)}, {cost.break_even_storage(m, n)}',
    'yes',
  )


def _aspect(layer: Layer) -> float:
  return max(layer.matrix) / min(layer.matrix)


def _pattern(name: str, pattern: str) -> re.Pattern[str]:
  try:
    return re.compile(pattern)
  except re.error as e:
    raise ValueError(
      f'{name}={pattern!r}: not a regular expression: {e}.'
    ) from e


@dataclasses.dataclass(frozen=True)
class _Kernel:
  """A parameter on its way through the program."""

  path: str
  view: views.View


@dataclasses.dataclass(frozen=True)
class _Use:
  """What one equation does with a kernel: `why_not` when it cannot be one."""

  kind: str
  roles: dict[int, str] | None
  tokens: int
  why_not: str = ''


def _read(fn, params, args, kwargs):
  if not callable(fn):
    raise TypeError(f'fn={fn!r}: must be a function of the parameters.')
  shapes = tree.flatten(params, lowrank.is_factored)
  if not shapes:
    raise ValueError("params has no leaves: pass the model's parameters.")
  jaxpr, dynamic, _ = jaxprs.trace(
    fn, (params, *args), kwargs, lowrank.is_factored
  )
  kernels = dict(enumerate(shapes))  # the leaves of params come first
  operands = [
    _Kernel(kernels[i], views.View.of(x.shape)) if i in kernels else None
    for i, x in dynamic.items()
  ]
  reader = _Reader()
  for out in reader.read(jaxpr, operands):
    reader.other(out, 'it is returned as it is')
  found, reasons = {}, {}
  for path, leaf in shapes.items():
    if getattr(leaf, 'ndim', 0) < 2:
      continue
    layer = _judge(path, leaf, reader.uses.get(path, []))
    if isinstance(layer, str):
      reasons[path] = layer
    else:
      found[path] = layer
  ordered = [found[path] for path in reader.uses if path in found]
  layers = (dataclasses.replace(x, order=i) for i, x in enumerate(ordered))
  return tuple(layers), reasons


def _judge(path: str, leaf: Any, uses: list[_Use]) -> Layer | str:
  """The layer that these uses make of a kernel, or why there is none."""
  if not uses:
    return 'not used by the function'
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    return f'dtype {leaf.dtype} is not real floating point'
  for use in uses:
    if use.why_not:
      return use.why_not
  # The role of an axis of size 1 makes no difference.
  roles = lambda use: {a: r for a, r in use.roles.items() if leaf.shape[a] > 1}
  if any(roles(use) != roles(uses[0]) for use in uses):
    return 'used in different roles (tied)'
  axes = lambda role: tuple(
    a for a in range(leaf.ndim) if uses[0].roles.get(a, 'row') == role
  )
  layer = Layer(
    path,
    tuple(leaf.shape),
    axes('row'),
    axes('col'),
    axes('batch'),
    uses[0].kind,
    sum(use.tokens for use in uses),
  )
  if layer.max_rank < 2:
    return f'a matrix of {layer.matrix[0]} x {layer.matrix[1]} has no rank'
  return layer


class _Reader:
  """Records what the equations do with the kernels."""

  def __init__(self):
    self.uses: dict[str, list[_Use]] = {}
    self._repeats = 1

  def read(self, jaxpr: jex.ClosedJaxpr, operands: list) -> list:
    consts = [None] * len(jaxpr.consts)
    return jaxprs.run(jaxpr.jaxpr, consts, operands, self._rule)

  def other(self, kernel: _Kernel | None, why_not: str):
    if isinstance(kernel, _Kernel):
      self._record(kernel, _Use('', None, 0, why_not))

  def _record(self, kernel: _Kernel, use: _Use):
    self.uses.setdefault(kernel.path, []).append(use)

  def _rule(self, eqn: jex.JaxprEqn, operands: list) -> list:
    # Literals and constants are no kernels.
    operands = [x if isinstance(x, _Kernel) else None for x in operands]
    nothing = [None] * len(eqn.outvars)
    if not any(operands):
      return nothing
    name = eqn.primitive.name
    for program in (
      jaxprs.called(eqn),
      jaxprs.rematerialised(eqn),
      jaxprs.custom_derivative(eqn),
    ):
      if program is not None:
        return self.read(program, operands)
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
    out = [None] * len(eqn.outvars)
    for kernel in filter(None, operands):
      view = views.follow(kernel.view, eqn)
      if view is None:
        self.other(kernel, f'consumed by {eqn.primitive.name}')
      else:
        out[0] = dataclasses.replace(kernel, view=view)
    return out

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
      for kernel in operands:
        self.other(kernel, 'multiplied with another parameter')
      return
    side = 0 if operands[0] is not None else 1
    kernel, x = operands[side], eqn.invars[1 - side].aval.shape
    used = {*contract[1 - side], *batch[1 - side]}
    tokens = math.prod(n for i, n in enumerate(x) if i not in used)
    self._matrix('dot', kernel, contract[side], batch[side], tokens)

  def _conv(self, eqn, operands):
    kernel = operands[1]
    if operands[0] is not None:
      self.other(operands[0], 'convolved as an image')
    if kernel is None:
      return
    groups = eqn.params['feature_group_count']
    if groups != 1 or eqn.params['batch_group_count'] != 1:
      self.other(kernel, f'a convolution of {groups} groups')
      return
    numbers = eqn.params['dimension_numbers']
    out = eqn.outvars[0].aval.shape
    tokens = math.prod(out) // out[numbers.out_spec[1]]
    self._matrix('conv', kernel, numbers.rhs_spec[1:], (), tokens)

  def _matrix(self, kind, kernel, contracted, batch, tokens):
    """Records a product, if it takes every axis of the kernel as a whole."""
    view = kernel.view
    parts = {i: 'row' for i in contracted} | {i: 'batch' for i in batch}
    roles = {atom.axis: {'batch'} for atom in view.stacked}
    for i, group in enumerate(view.axes):
      for atom in group:
        roles.setdefault(atom.axis, set()).add(parts.get(i, 'col'))
    mixed = [a for a, r in roles.items() if len(r) > 1]
    if mixed:
      self.other(kernel, f'axis {mixed[0]} has parts in different roles')
      return
    # Scans over the stack itself do not send more through each matrix.
    stack = math.prod(a.size for a in view.stacked)
    repeats = self._repeats // max(1, stack)
    roles = {a: r.pop() for a, r in roles.items()}
    self._record(kernel, _Use(kind, roles, tokens * repeats))
