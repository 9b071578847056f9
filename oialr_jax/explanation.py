"""What the method would do to a model, said before anything is trained."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import math
import numbers
from typing import Any

from oialr_jax import cost
from oialr_jax import layers as layers_lib
from oialr_jax import lowrank
from oialr_jax import tree


@dataclasses.dataclass(frozen=True)
class Explanation:
  """What `explain` found; its `str` is a table and a summary.

  Attributes:
    layers: the eligible layers, in order of use.
    reasons: of every other parameter of two axes or more, why not.
    parameters: numbers in all parameters; where layers alone were explained,
      in their kernels.
    ranks: by path, that were asked for; None where none were. Layers that are
      not among them stay dense.
    kept: paths of layers that `select` keeps dense, unless it is told not to;
      none where layers alone were explained.
  """

  layers: tuple[layers_lib.Layer, ...]
  reasons: dict[str, str]
  parameters: int
  ranks: dict[str, int] | None = None
  kept: frozenset[str] = frozenset()

  @functools.cached_property
  def totals(self) -> dict[str, int]:
    """Numbers of parameters, and multiply-adds of a training step.

    'parameters' and 'eligible' (in kernels that can be low-rank);
    'multiply_adds' of these kernels' products, forward and backward; with
    ranks also 'trainable', 'stored' and 'multiply_adds_low_rank'.
    """
    layers = self.layers
    eligible = sum(math.prod(x.shape) for x in layers)
    totals = {
      'parameters': self.parameters,
      'eligible': eligible,
      'multiply_adds': sum(x.multiply_adds() for x in layers),
    }
    if self.ranks is not None:
      kept = [(x, self.ranks.get(x.path)) for x in layers]
      rest = self.parameters - eligible
      totals |= {
        'trainable': rest + sum(_trainable(x, r) for x, r in kept),
        'stored': rest + sum(_stored(x, r) for x, r in kept),
        'multiply_adds_low_rank': sum(x.multiply_adds(r) for x, r in kept),
      }
    return totals

  def __str__(self) -> str:
    columns = _COLUMNS if self.ranks is None else _COLUMNS | _AT_RANK
    rank_of = (self.ranks or {}).get
    rows = [(*columns, 'low-rank')]
    for layer in self.layers:
      cells = (f(layer, rank_of(layer.path)) for f in columns.values())
      note = (
        layer.multiplied_out and f', multiplied out: {layer.multiplied_out}'
      )
      kept = ', but not by default' if layer.path in self.kept else ''
      rows.append((*cells, f'yes{kept}{note}'))
    for path, why in self.reasons.items():
      rows.append((path, *[''] * (len(columns) - 1), why))
    widths = [max(map(len, column)) for column in zip(*rows)]
    line = lambda row: '  '.join(c.ljust(w) for c, w in zip(row, widths))
    return '\n'.join([*(line(row).rstrip() for row in rows), self._summary()])

  def _summary(self) -> str:
    totals = self.totals
    share = lambda n, of: f'{100 * n / of:.3g} %' if of else '-'
    text = (
      f'{totals["parameters"]:,} parameters, '
      f'{share(totals["eligible"], totals["parameters"])} of them in '
      f'{len(self.layers)} kernels that can be low-rank.'
    )
    if self.ranks is None:
      return text
    of_parameters = lambda name: share(totals[name], totals['parameters'])
    work = share(totals['multiply_adds_low_rank'], totals['multiply_adds'])
    return (
      f'{text}\nAt these ranks: {of_parameters("trainable")} trainable, '
      f'{of_parameters("stored")} stored; training steps take {work} of these '
      "kernels' multiply-adds."
    )


def explain(
  layers_or_fn: Iterable[layers_lib.Layer] | Callable[..., Any],
  params: Any = None,
  *args: Any,
  ranks: layers_lib.Rank | None = None,
  **kwargs: Any,
) -> Explanation:
  """Says of every kernel what it is, what it costs, or why it stays dense.

  Nothing is computed: with `jax.ShapeDtypeStruct`s, a model of any size can be
  planned on any machine.

  Args:
    layers_or_fn: layers, or a function to read with the following arguments.
    params: as for `find_layers`; beside layers, what they are a part of.
    *args: as for `find_layers`.
    ranks: what the layers would cost at these: an int (at most what a layer
      has), a float in (0, 1], the share of min(m, n), or a mapping by path
      (the others stay dense), such as `ranks(params)` of a trained model.
    **kwargs: as for `find_layers`.

  Returns:
    An `Explanation`, to be printed. Break-even is the rank below which the
    factors take fewer multiplications (time) or fewer numbers (storage) than
    the dense kernel. Time and stored are relative to the dense kernel, time
    being multiply-adds of a training step, done in the cheapest way.

  Raises:
    ValueError: ranks are out of range, or name a path that is no layer's;
      layers are not those of params.
    TypeError: layers_or_fn or ranks are of another type.
  """
  if callable(layers_or_fn):
    layers, reasons = layers_lib.read(layers_or_fn, params, args, kwargs)
    kept = _kept(layers)
  else:
    layers, reasons, kept = _checked(layers_or_fn), {}, frozenset()
  leaves = {layer.path: layer for layer in layers}
  if params is not None:
    leaves = tree.flatten(params, lowrank.is_factored)
    tree.check_known([layer.path for layer in layers], leaves, 'parameter')
  shapes = [x.shape for x in leaves.values() if hasattr(x, 'shape')]
  if ranks is not None:
    ranks = _fitted(layers, ranks)
  parameters = sum(map(math.prod, shapes))
  return Explanation(layers, reasons, parameters, ranks, kept)


def _kept(layers: Sequence[layers_lib.Layer]) -> frozenset[str]:
  try:
    chosen = layers_lib.select(layers)
  except ValueError:  # none is left
    chosen = ()
  return frozenset(x.path for x in layers) - {x.path for x in chosen}


def _checked(
  layers: Iterable[layers_lib.Layer],
) -> tuple[layers_lib.Layer, ...]:
  found = tuple(layers) if isinstance(layers, Iterable) else (layers,)
  for x in found:
    if not isinstance(x, layers_lib.Layer):
      raise TypeError(
        f'layers_or_fn: {x!r} is neither a function nor a layer; pass '
        'the model with its arguments, or what find_layers returns.'
      )
  return found


def _fitted(layers, ranks: layers_lib.Rank) -> dict[str, int]:
  whole = isinstance(ranks, numbers.Integral) and not isinstance(ranks, bool)
  if whole and ranks >= 1:
    return {x.path: min(int(ranks), x.max_rank) for x in layers}
  found = layers_lib.ranks_of(layers, ranks)
  if isinstance(ranks, Mapping):
    return {path: found[path] for path in ranks}
  return found


def _trainable(layer: layers_lib.Layer, rank: int | None) -> int:
  if rank is None:
    return math.prod(layer.shape)
  return layer.stack * rank * rank


def _stored(layer: layers_lib.Layer, rank: int | None) -> int:
  if rank is None:
    return math.prod(layer.shape)
  m, n = layer.matrix
  return layer.stack * rank * (m + rank + n)


def _matrix(layer, _) -> str:
  m, n = layer.matrix
  return (f'{layer.stack} x ' if layer.stack > 1 else '') + f'{m} x {n}'


def _break_even(layer, _) -> str:
  shape = layer.matrix
  return f'{cost.break_even_time(*shape)}, {cost.break_even_storage(*shape)}'


def _relative(n: int, of: int) -> str:
  """A layer may lack tokens, when nobody said how many, or matrices."""
  return f'{n / of:.2f}' if of else '-'


_COLUMNS = {
  'path': lambda layer, _: layer.path,
  'shape': lambda layer, _: str(layer.shape),
  'matrix': _matrix,
  'kind': lambda layer, _: layer.kind,
  'tokens': lambda layer, _: str(layer.tokens),
  'Mflop': lambda layer, _: f'{1e-6 * layer.flops:.3g}',
  'break-even rank (time, storage)': _break_even,
}
_AT_RANK = {
  'rank': lambda layer, rank: 'dense' if rank is None else str(rank),
  'computed as': lambda layer, rank: '' if rank is None else layer.way(rank),
  'time': lambda layer, rank: _relative(
    layer.multiply_adds(rank), layer.multiply_adds()
  ),
  'stored': lambda layer, rank: _relative(
    _stored(layer, rank), math.prod(layer.shape)
  ),
}
