"""Optax for low-rank parameters: frozen bases, and moments that follow them.

`train_sigma` shows the inner transformation `trainable(params)` only, a tree of
one structure before and after the transition, so that U and V have neither
state nor updates. `transport` carries the inner state over a change of basis:
with M = U_new^T U_old and N = V_old^T V_new (I for a dense kernel's side), a
moment mu that is linear in the gradient becomes M mu N, exactly as the gradient
does; one that is quadratic becomes (M*M) nu (N*N), which is the variance of a
rotated gradient of uncorrelated entries.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from oialr_jax import lowrank
from oialr_jax import transforms
from oialr_jax import tree

Array = jax.Array
PyTree = Any

TRANSPORT = 'transport'
RESET = 'reset'
REFERENCE = 'reference'
POLICIES = (TRANSPORT, RESET, REFERENCE)

# What a field of an optimiser's state holds.
LINEAR = 'linear'  # a tree like the parameters, linear in the gradient
QUADRATIC = 'quadratic'  # likewise, quadratic in it
MAGNITUDE = 'magnitude'  # likewise, an absolute value: its square is quadratic
CENTRED = 'centred'  # quadratic, with the mean beside it in the field `mu`
FOLLOW = 'follow'  # linear, but no moment: iterates and sums, never zeroed
COUNTER = 'counter'  # counts the steps that the moments beside it have seen
STATE = 'state'  # holds states: looked into
KEEP = 'keep'  # belongs to no parameter's coordinates
_TREES = (LINEAR, QUADRATIC, MAGNITUDE, CENTRED, FOLLOW)
KINDS = (*_TREES, COUNTER, STATE, KEEP)


def train_sigma(
  tx: optax.GradientTransformation, *, sigma_scale: float | None = None
) -> optax.GradientTransformationExtraArgs:
  """Lets `tx` train Sigma and the dense leaves, and nothing move U and V.

  Adam and its like give all entries of a parameter steps of about one size, so
  that a step of a kernel W `[m, n]` has a Frobenius norm of about the rate times
  sqrt(m n), and that of its Sigma `[r, r]` one of the rate times r: the fewer
  directions are left, the slower W moves. `sigma_scale` makes up for it: a step
  of Sigma is multiplied by sigma_scale sqrt(m n) / r, with the r that is live.
  The paper does not; it is for optimisers whose updates do not grow with the
  gradient, and not for those that keep iterates, such as
  `optax.contrib.schedule_free`.

  Args:
    tx: any Optax chain, with decay, clipping, masks and schedules inside.
    sigma_scale: of Sigma's updates, decay included, see above; None leaves them
      as tx gives them.

  Returns:
    A transformation for params with `LowRank` leaves. Its `update` takes
    gradients (and params) in the structure of `params`, giving zeros to U and
    V, or gradients in that of `trainable(params)`, which needs no array of a
    basis's size and is what a training loop should do. With `sigma_scale`, the
    params must come with their U and V.

  Raises:
    TypeError: tx is not a gradient transformation.
    ValueError: sigma_scale is not positive; in `update`, it has no params.
  """
  if not isinstance(tx, optax.GradientTransformation):
    raise TypeError(
      f'tx={tx!r}: must be an optax.GradientTransformation, such as '
      'optax.adamw(3e-4).'
    )
  check_sigma_scale(sigma_scale)
  tx = optax.with_extra_args_support(tx)

  def init(params):
    return tx.init(transforms.trainable(params))

  def update(updates, state, params=None, **extra):
    inner = None if params is None else transforms.trainable(params)
    new, state = tx.update(transforms.trainable(updates), state, inner, **extra)
    if sigma_scale is not None:
      new = _scaled(new, params, sigma_scale)
    return _frozen_bases(updates, new), state

  return optax.GradientTransformationExtraArgs(init, update)


def check_sigma_scale(sigma_scale: float | None):
  """Raises ValueError for what is no factor, nor None."""
  if sigma_scale is not None and not 0 < sigma_scale < float('inf'):
    raise ValueError(
      f'sigma_scale={sigma_scale}: must be positive and finite, or None for '
      'the updates as the optimiser gives them.'
    )


def transport(
  opt_state: PyTree,
  old_params: PyTree,
  new_params: PyTree,
  *,
  policy: str = TRANSPORT,
) -> PyTree:
  """The optimiser's state for new_params, from that for old_params.

  For any Optax chain whose states are known (`register_rule` adds to them),
  any change: dense to low-rank, basis update, prune, compaction, and back to
  dense. Traceable.

  A transformation that treats a parameter by its shape may treat Sigma otherwise
  than it treated the kernel: label parameters for `optax.contrib.muon` by path,
  not by `ndim`, and pass `factored=False` to `optax.adafactor`.

  Args:
    opt_state: state of `train_sigma(tx)` or of tx alone, for old_params.
    old_params: parameters before the change.
    new_params: parameters after it.
    policy: 'transport', as above; 'reset', every moment zero and the counter of
      its bias correction with it (schedules go on); 'reference', what the
      published code does: zero moments at the transition with the counter kept,
      moments sliced but not rotated at a prune.

  Returns:
    The state, with the structure that `init(new_params)` gives.

  Raises:
    ValueError: an unknown policy; parameters of different structures; a state
      of an unknown type that holds something of a changed kernel's shape.
  """
  if policy not in POLICIES:
    raise ValueError(
      f'policy={policy!r}: must be one of {", ".join(POLICIES)}.'
    )
  return _Transport(old_params, new_params, policy).state(
    opt_state, 'opt_state'
  )


def register_rule(state_type: type, **fields: str):
  """Tells `transport` what the fields of an optimiser's state hold.

  Args:
    state_type: the NamedTuple class of the state.
    **fields: for each field, 'linear', 'quadratic', 'magnitude', 'centred'
      (quadratic, and its mean is the field `mu`) or 'follow' (linear under
      every policy), all trees like the parameters; 'counter', 'state' (holds
      other states) or 'keep'. Fields that are left out are kept.

  Raises:
    TypeError: state_type is no NamedTuple class.
    ValueError: a field or a kind is unknown; 'centred' without `mu`.
  """
  names = getattr(state_type, '_fields', None)
  if not isinstance(state_type, type) or names is None:
    raise TypeError(f'{state_type!r}: must be a NamedTuple class.')
  for field, kind in fields.items():
    if field not in names:
      raise ValueError(
        f'{state_type.__name__} has no field {field!r}, only '
        f'{", ".join(names)}.'
      )
    if kind not in KINDS:
      raise ValueError(
        f'{state_type.__name__}.{field}={kind!r}: must be one of '
        f'{", ".join(KINDS)}.'
      )
    if kind == CENTRED and 'mu' not in names:
      raise ValueError(
        f'{state_type.__name__}.{field}={kind!r}: needs its mean in a field '
        "named 'mu'."
      )
  _RULES[state_type] = dict(fields)


_RULES: dict[type, Mapping[str, str]] = {}
_MOMENTS = {'count': COUNTER, 'mu': LINEAR, 'nu': QUADRATIC}
# With bias correction it has a state of its own, whose class is not public. That
# of `scale_by_stddev` has no rule: its variance is nu - mu^2 / (1 - decay^count),
# and the state does not know the decay.
_CORRECTED_RMS = type(
  jax.eval_shape(optax.scale_by_rms(bias_correction=True).init, ())
)

for _type, _fields in {
  # `optax.adamax` shares this class; its nu is a maximum, for which the
  # quadratic rule is an estimate from below.
  optax.ScaleByAdamState: _MOMENTS,
  optax.ScaleByAmsgradState: _MOMENTS | {'nu_max': QUADRATIC},
  optax.ScaleByBeliefState: _MOMENTS,
  optax.ScaleByLionState: {'count': COUNTER, 'mu': LINEAR},
  optax.ScaleByRmsState: {'nu': QUADRATIC},
  optax.ScaleByRStdDevState: {'mu': LINEAR, 'nu': CENTRED},
  _CORRECTED_RMS: {'count': COUNTER, 'nu': QUADRATIC},
  optax.ScaleByRssState: {'sum_of_squares': QUADRATIC},
  optax.ScaleByAdaDeltaState: {'e_g': QUADRATIC, 'e_x': QUADRATIC},
  optax.ScaleByAdanState: {
    'm': LINEAR,
    'v': LINEAR,
    'n': QUADRATIC,
    'g': LINEAR,
    't': COUNTER,
  },
  optax.ScaleByNovogradState: {'count': COUNTER, 'mu': LINEAR},
  optax.ScaleByRpropState: {
    'step_sizes': MAGNITUDE,
    'prev_updates': LINEAR,
  },
  optax.TraceState: {'trace': LINEAR},
  optax.EmaState: {'count': COUNTER, 'ema': LINEAR},
  optax.FactoredState: {'count': COUNTER, 'v': QUADRATIC},
  optax.MultiStepsState: {'inner_opt_state': STATE, 'acc_grads': FOLLOW},
  optax.ApplyIfFiniteState: {'inner_state': STATE},
  optax.InjectHyperparamsState: {'inner_state': STATE},
  optax.InjectStatefulHyperparamsState: {'inner_state': STATE},
  optax.MaskedState: {'inner_state': STATE},
  optax.ConditionallyMaskState: {'inner_state': STATE},
  optax.ConditionallyTransformState: {'inner_state': STATE},
  optax.PartitionState: {'inner_states': STATE},
  contrib.MuonState: {'count': COUNTER, 'mu': LINEAR},
  contrib.ScaleByAdemamixState: {
    'count': COUNTER,
    'count_m2': COUNTER,
    'm1': LINEAR,
    'm2': LINEAR,
    'nu': QUADRATIC,
  },
  contrib.ScheduleFreeState: {'base_optimizer_state': STATE, 'z': FOLLOW},
}.items():
  register_rule(_type, **_fields)


@dataclasses.dataclass(frozen=True)
class _Change:
  """A parameter before and after: a leaf in a tree like the parameters."""

  old: Any
  new: Any


class _Transport:
  """One change of the parameters, applied to one optimiser's state."""

  def __init__(self, old_params: PyTree, new_params: PyTree, policy: str):
    self._policy = policy
    old, old_def = jax.tree.flatten(old_params, is_leaf=lowrank.is_low_rank)
    new, new_def = jax.tree.flatten(new_params, is_leaf=lowrank.is_low_rank)
    if old_def != new_def:
      raise ValueError(
        'old_params and new_params differ in more than their kernels: '
        f'{old_def} and {new_def}.'
      )
    self._pairs = list(zip(old, new))
    self._changes = jax.tree.unflatten(old_def, map(_Change, old, new))
    paths = tree.flatten(old_params, lowrank.is_low_rank)
    self._changed = {
      path: a
      for path, (a, b) in zip(paths, self._pairs)
      if a is not b and (lowrank.is_low_rank(a) or lowrank.is_low_rank(b))
    }

  def state(self, x: PyTree, name: str) -> PyTree:
    rule = _RULES.get(type(x))
    if rule is not None:
      return self._known(x, rule, name)
    if type(x) in (tuple, list):
      return type(x)(self.state(y, f'{name}[{i}]') for i, y in enumerate(x))
    if isinstance(x, dict):
      # A tree like the parameters in a state that nobody described is found
      # below, leaf by leaf.
      # The union is of x's own type: `optax.named_chain` has an OrderedDict.
      return x | {k: self.state(y, f'{name}[{k!r}]') for k, y in x.items()}
    self._check_unknown(x, name)
    return x

  def _known(self, x, rule: Mapping[str, str], name: str):
    new = {}
    for field in x._fields:
      value, kind = getattr(x, field), rule.get(field, KEEP)
      if kind == STATE:
        new[field] = self.state(value, f'{name}.{field}')
      elif kind in _TREES:
        mean = x.mu if kind == CENTRED else value
        new[field] = self._moments(value, mean, kind, f'{name}.{field}')
      elif kind == COUNTER and self._policy == RESET:
        new[field] = jax.tree.map(jnp.zeros_like, value)
      else:
        new[field] = value
    return x._replace(**new)

  def _moments(self, moments: PyTree, means: PyTree, kind: str, name: str):
    leaves, treedef = jax.tree.flatten(moments, is_leaf=_is_masked)
    unlike = (
      f'{name}: does not have the structure of the parameters that transport '
      'was given: '
    )
    try:
      means = treedef.flatten_up_to(means)
      changes = treedef.flatten_up_to(self._changes)
    except ValueError:
      # JAX's own message shows the arrays of both.
      raise ValueError(unlike + _apart(moments, self._changes)) from None
    for x, change in zip(leaves, changes):
      if not (_is_masked(x) or isinstance(change, _Change)):
        raise ValueError(
          f'{unlike}an array of shape {jnp.shape(x)} for a branch.'
        )
    moved = [
      x if _is_masked(x) else self._moment(x, mean, kind, change, name)
      for x, mean, change in zip(leaves, means, changes, strict=True)
    ]
    return jax.tree.unflatten(treedef, moved)

  def _moment(self, x, mean, kind: str, change: '_Change', name: str):
    policy = TRANSPORT if kind == FOLLOW else self._policy
    old, new = change.old, change.new
    if old is new or not (lowrank.is_low_rank(old) or lowrank.is_low_rank(new)):
      return jnp.zeros_like(x) if policy == RESET else x
    self._check_shape(x, old, name)
    if policy == RESET:
      like = new.s if lowrank.is_low_rank(new) else new
      return jnp.zeros(like.shape, x.dtype)
    if policy == REFERENCE:
      return _as_published(x, old, new)
    if kind == CENTRED:
      return _rotated_about(x, mean, old, new)
    return _rotated(x, kind, old, new)

  def _check_shape(self, x, old, name: str):
    shape = old.s.shape if lowrank.is_low_rank(old) else old.shape
    if x.shape != shape:
      raise ValueError(
        f'{name}: a moment of shape {x.shape} for a parameter of shape '
        f'{shape} cannot follow its basis. Factored second moments are such: '
        'use optax.adafactor(..., factored=False) or a large '
        'min_dim_size_to_factor.'
      )

  def _check_unknown(self, x: PyTree, name: str):
    shapes = {
      a.s.shape if lowrank.is_low_rank(a) else a.shape: path
      for path, a in self._changed.items()
    }
    total = sum(
      getattr(a.s if lowrank.is_low_rank(a) else a, 'size', 0)
      for a, _ in self._pairs
    )
    for leaf_path, leaf in tree.flatten(x).items():
      shape, size = getattr(leaf, 'shape', ()), getattr(leaf, 'size', 0)
      stacked = [p for s, p in shapes.items() if s and shape[-len(s) :] == s]
      if not stacked and not (self._changed and size >= total > 1):
        continue
      kernel = stacked[0] if stacked else next(iter(self._changed))
      raise ValueError(
        f'{name}: a {type(x).__name__} holds {leaf_path!r} of shape '
        f'{tuple(shape)}, which may belong to {kernel!r}; transport does not '
        'know how it changes with the basis. Say so once with '
        f'oialr.register_rule({type(x).__name__}, field=...), each field one '
        f'of {", ".join(KINDS)}.'
      )


def _apart(moments: PyTree, params: PyTree) -> str:
  """What tells the structure of moments from that of the parameters."""
  nodes = jax.tree.leaves(moments, is_leaf=lowrank.is_low_rank)
  if any(map(lowrank.is_low_rank, nodes)):
    return (
      'it has moments of U and V, which do not train. What keeps a state goes '
      'inside of train_sigma, such as optax.MultiSteps: oialr.train_sigma('
      'optax.MultiSteps(tx, k).gradient_transformation()).'
    )
  ours, theirs = tree.paths(moments, _is_masked), tree.paths(params)
  for path in (*ours, *theirs):
    if (path in ours) != (path in theirs):
      return f'{path!r} is in one of the two alone.'
  return 'their containers are of other types.'


def _is_masked(x: Any) -> bool:
  # A mask may be a prefix of the parameters: one node for a whole branch.
  return x is None or isinstance(x, optax.MaskedNode)


def _rotated(x: Array, kind: str, old, new) -> Array:
  """M x N, in the coordinates of the old node, to those of the new one."""
  view = new.view if lowrank.is_low_rank(new) else old.view
  left = _side(old, new, 'u')
  right = _side(old, new, 'vt')
  x_wide = lowrank.wide(x)
  if kind == MAGNITUDE:
    x_wide = jnp.square(x_wide)
  if kind in (QUADRATIC, MAGNITUDE):
    left, right = jnp.square(left), jnp.square(right)
  if lowrank.is_low_rank(old):
    x_wide = x_wide.reshape(-1, *x.shape[-2:])
  else:
    x_wide = view.to_matrix(x_wide)
  moved = lowrank.matmul(lowrank.matmul(left, x_wide), right)
  if kind == MAGNITUDE:
    moved = jnp.sqrt(moved)
  if lowrank.is_low_rank(new):
    return moved.reshape(new.s.shape).astype(x.dtype)
  return view.from_matrix(moved, new.shape).astype(x.dtype)


def _rotated_about(x: Array, mean: Array, old, new) -> Array:
  """A second moment whose mean is known: the variance is what rotates.

  With mu' = M mu N, nu' = (M*M)(nu - mu^2)(N*N) + mu'^2 >= mu'^2, without which
  a centred optimiser takes the root of something negative.
  """
  spread = jnp.maximum(lowrank.wide(x) - jnp.square(lowrank.wide(mean)), 0)
  moved = lowrank.wide(_rotated(mean, LINEAR, old, new))
  spread = _rotated(spread, QUADRATIC, old, new)
  return (spread + jnp.square(moved)).astype(x.dtype)


def _side(old, new, side: str) -> Array:
  """M = U_new^T U_old, or N = V_old^T V_new; a dense kernel's basis is I."""

  def basis(node):
    u, _, vt = lowrank.matrices(node)
    return u if side == 'u' else lowrank.transpose(vt)

  if not lowrank.is_low_rank(old):
    turn = basis(new)  # [b, m, r]: M^T, or N
    return lowrank.transpose(turn) if side == 'u' else turn
  if not lowrank.is_low_rank(new):
    turn = basis(old)
    return turn if side == 'u' else lowrank.transpose(turn)
  before, after = basis(old), basis(new)
  if side == 'u':
    return lowrank.matmul(lowrank.transpose(after), before)
  return lowrank.matmul(lowrank.transpose(before), after)


def _as_published(x: Array, old, new) -> Array:
  """Zeros at the transition; sliced to the live directions afterwards."""
  if not lowrank.is_low_rank(new):
    return jnp.zeros(new.shape, x.dtype)
  if not lowrank.is_low_rank(old):
    return jnp.zeros(new.s.shape, x.dtype)
  u, s, _ = lowrank.matrices(new)
  r = min(old.rank, new.rank)
  kept = x.reshape(-1, *x.shape[-2:])[:, :r, :r]
  pad = [(0, 0)] + [(0, new.rank - r)] * 2
  live = lowrank.live(u)
  both = live[:, :, None] & live[:, None, :]
  return jnp.where(both, jnp.pad(kept, pad), 0).reshape(new.s.shape)


def _scaled(updates: PyTree, params: PyTree, scale: float) -> PyTree:
  """Updates of `trainable(params)`, Sigma's times scale sqrt(m n) / r."""
  if params is None:
    raise ValueError(
      'train_sigma: sigma_scale asks for the ranks; call update(updates, state, '
      'params) with the parameters, U and V included.'
    )

  def scaled(node, x):
    if not lowrank.is_low_rank(node):
      return x
    _, m, n = lowrank.matrix_shape(node)
    u, _, _ = lowrank.matrices(node)
    rank = jnp.sum(lowrank.live(u), axis=-1).reshape(*x.shape[:-2], 1, 1)
    # A whole matrix may be pruned; its update is zero.
    factor = scale * math.sqrt(m * n) / jnp.maximum(rank, 1)
    return (lowrank.wide(x) * factor).astype(x.dtype)

  return jax.tree.map(scaled, params, updates, is_leaf=lowrank.is_low_rank)


def _frozen_bases(updates: PyTree, new: PyTree) -> PyTree:
  """`new`, with zeros for U and V where the updates came with them."""

  def expand(x, y):
    if not lowrank.is_low_rank(x):
      return y
    return lowrank.LowRank(jnp.zeros_like(x.u), y, jnp.zeros_like(x.vt), x.view)

  return jax.tree.map(expand, updates, new, is_leaf=lowrank.is_low_rank)
