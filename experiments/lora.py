"""LoRA: frozen kernels, with factors beside them that train.

x (W + s A B) is computed as x W + s (x A) B, with A normal and B zero to begin
with, and W without gradient and without state (arXiv 2106.09685, Section 4).
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import methods
import oialr_jax as oialr
from oialr_jax import jaxprs
from oialr_jax import tree
from oialr_jax import views

Array = jax.Array
PyTree = Any

# The same in every run, whose kernels are not.
_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(methods.Method):
  """Low-rank adaptation of a network that was trained dense, or not at all.

  Biases, norms and the layers that OIALR leaves alone train as they do there.

  Attributes:
    rank: of A B, a number or a share of min(m, n).
    scale: s, alpha / r of the paper.
    delay: the step from which W is frozen, or a share of the run; by default
      that of OIALR's transition. 0 leaves W what it is initialised to.

  Raises:
    ValueError: rank or scale is out of range.
  """

  rank: methods.Rank = 0.07
  scale: float = 1.0
  delay: int | float | None = None

  def __post_init__(self):
    methods.check_rank(self.rank)
    if not self.scale > 0:
      raise ValueError(f'scale={self.scale}: must be positive.')

  def arguments(self, schedule: oialr.Schedule) -> dict[str, Any]:
    if self.delay is not None:
      schedule = dataclasses.replace(schedule, delay=self.delay)
    convert = lambda params, layers: adapt(
      params, layers, rank=self.rank, scale=self.scale
    )
    conversion = methods.conversion(
      schedule, schedule.delay_steps, convert, count=_count
    )
    # There is no basis of W + s A B to be had.
    return {'conversion': conversion, 'track_every': None}

  def wrapped(self, fn: Callable[..., Any]) -> Callable[..., Any]:
    return distributed(fn)

  def optimizer(
    self, adam: methods.Adam, rate: optax.Schedule, layers: Any
  ) -> optax.GradientTransformation:
    parts = {'trained': adam(rate), 'frozen': optax.set_to_zero()}
    return optax.partition(parts, _labels)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
  """A kernel w + scale d.

  Attributes:
    w: that is frozen.
    d: `Factors` that train; on its way through a model, what they make.
    scale: s of the module.
  """

  w: Array
  d: Any
  scale: float = dataclasses.field(metadata={'static': True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.w.shape

  @property
  def dtype(self) -> Any:
    return self.w.dtype


def adapt(
  params: PyTree, layers: methods.Layers, *, rank: methods.Rank, scale: float
) -> PyTree:
  """Puts an `Adapted` of the same function in the place of every kernel.

  Args:
    params: dense parameters.
    layers: whose kernels are frozen.
    rank: of A B. The entries of A have variance 1 / m.
    scale: s.
  """
  keys = jax.random.split(jax.random.key(_SEED), len(layers))
  by_path = {x.path: (x, key) for x, key in zip(layers, keys)}
  ranks = methods.ranks(layers, rank)

  def of(path, w):
    if path not in by_path:
      return w
    layer, key = by_path[path]
    return Adapted(w, _factors(layer, ranks[path], w.dtype, key), scale)

  return tree.map_with_path(of, params)


def _factors(layer, rank: int, dtype: Any, key: Array) -> oialr.Factors:
  batch, rows, cols = layer.view.split(layer.shape)
  a = jax.random.normal(key, (*batch, *rows, rank), dtype)
  b = jnp.zeros((*batch, rank, *cols), dtype)
  return oialr.Factors(a / math.sqrt(math.prod(rows)), b, layer.view)


def _is_adapted(x: Any) -> bool:
  return isinstance(x, Adapted)


def _labels(params: PyTree) -> PyTree:
  """For `optax.partition`."""

  def of(x):
    if not _is_adapted(x):
      return 'trained'
    trained = jax.tree.map(lambda _: 'trained', x.d)
    return Adapted('frozen', trained, x.scale)

  return jax.tree.map(of, params, is_leaf=_is_adapted)


def _count(params: PyTree) -> oialr.Counts:
  counts = oialr.count(params)
  nodes = jax.tree.leaves(params, is_leaf=_is_adapted)
  frozen = sum(x.w.size for x in nodes if _is_adapted(x))
  # The dense model has one kernel where there are w and d.
  return counts._replace(
    trainable=counts.trainable - frozen, dense=counts.dense - frozen
  )


# A sum meets the activations term by term.


def distributed(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Returns fn, computing x w + s (x d) wherever it takes x (w + s d).

  As with any function of parameters, `oialr.factored` puts the factors in.
  """

  def wrapped(*args):
    if not any(map(_is_adapted, jax.tree.leaves(args, is_leaf=_is_adapted))):
      return fn(*args)
    jaxpr, operands, out = jaxprs.trace(fn, args, {}, _is_adapted)
    found = _run(jaxpr, [_with_constant(x) for x in operands.values()])
    return jax.tree.unflatten(out, map(_added, found))

  return wrapped


def _with_constant(x: Any) -> Any:
  if not _is_adapted(x):
    return x
  return Adapted(jax.lax.stop_gradient(x.w), x.d, x.scale)


def _run(program, operands: list) -> list:
  return jaxprs.run(program.jaxpr, program.consts, operands, _rule)


def _rule(eqn, operands: list) -> list:
  sums = [x for x in operands if _is_adapted(x)]
  if not sums:
    return jaxprs.bind(eqn, operands)
  program = jaxprs.called(eqn)
  if program is not None:
    return _run(program, operands)
  program = jaxprs.rematerialised(eqn)
  if program is not None:
    how = {k: eqn.params[k] for k in ('prevent_cse', 'policy')}
    return jax.checkpoint(lambda xs: _run(program, xs), **how)(operands)
  products = ('dot_general', 'conv_general_dilated')
  follows = len(operands) == 1 and _moves_axes(eqn)
  if len(sums) > 1 or not (follows or eqn.primitive.name in products):
    return jaxprs.bind(eqn, list(map(_added, operands)))
  term = lambda name: jaxprs.bind(
    eqn, [getattr(x, name) if _is_adapted(x) else x for x in operands]
  )
  (w,), (d,), scale = term('w'), term('d'), sums[0].scale
  return [Adapted(w, d, scale) if follows else w + scale * d]


def _moves_axes(eqn) -> bool:
  """Whether an equation of one operand hands its values on."""
  view = views.View.of(eqn.invars[0].aval.shape)
  return views.follow(view, eqn) is not None


def _added(x: Any) -> Any:
  return x.w + x.scale * x.d if _is_adapted(x) else x
