"""Tests of following a kernel's axes through the equations that move them."""

import math

import hypothesis
from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from oialr_jax import views

Atom = views.Atom


def _follow(fn, shape, dtype=jnp.float32):
  """The view of a kernel after fn, or None where it gets lost."""
  view = views.View.of(shape)
  jaxpr = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct(shape, dtype)).jaxpr
  for eqn in jaxpr.eqns:
    assert eqn.primitive.name not in ('jit', 'pjit')
    view = view and views.follow(view, eqn)
  return view


def _gather(kernel, view):
  """What a view says that the travelling kernel is, one entry at a time."""
  out = np.empty(view.shape, kernel.dtype)
  for index in np.ndindex(*view.shape):
    place = [0] * kernel.ndim
    for i, group in zip(index, view.axes):
      for atom in reversed(group):
        i, digit = divmod(i, atom.size)
        place[atom.axis] += digit * atom.stride
    out[index] = kernel[tuple(place)]
  return out


@st.composite
def _journeys(draw):
  """A shape and what happens to it: `[(operation, argument), ...]`."""
  sizes = st.sampled_from([1, 2, 3, 4, 6])
  now = shape = tuple(draw(st.lists(sizes, min_size=1, max_size=4)))
  steps = []
  for _ in range(draw(st.integers(1, 5))):
    kind = draw(
      st.sampled_from(['transpose', 'merge', 'split', 'expand', 'squeeze'])
    )
    if kind == 'transpose':
      arg = tuple(draw(st.permutations(range(len(now)))))
      now = tuple(now[i] for i in arg)
    elif kind == 'squeeze':
      ones = [i for i, n in enumerate(now) if n == 1]
      arg = tuple(draw(st.sets(st.sampled_from(ones)))) if ones else ()
      now = tuple(n for i, n in enumerate(now) if i not in arg)
    elif kind == 'expand':
      arg = draw(st.integers(0, len(now)))
      now = (*now[:arg], 1, *now[arg:])
    elif not now:
      continue
    else:
      i = draw(st.integers(0, len(now) - 1))
      divisors = [k for k in range(1, now[i] + 1) if now[i] % k == 0]
      if kind == 'split':
        part = draw(st.sampled_from(divisors))
        now = (*now[:i], part, now[i] // part, *now[i + 1 :])
      else:
        now = (*now[:i], math.prod(now[i : i + 2]), *now[i + 2 :])
      arg = now
    steps.append((kind, arg))
  return shape, steps


_STEPS = {
  'transpose': (lax.transpose, np.transpose),
  'merge': (jnp.reshape, np.reshape),
  'split': (jnp.reshape, np.reshape),
  'expand': (jnp.expand_dims, np.expand_dims),
  'squeeze': (lax.squeeze, np.squeeze),
}


def _travel(x, steps, numpy=False):
  for kind, arg in steps:
    x = _STEPS[kind][numpy](x, arg)
  return x


@hypothesis.settings(
  deadline=None, derandomize=True, max_examples=150, database=None
)
@hypothesis.given(_journeys())
def test_follow_says_where_every_entry_is(journey):
  shape, steps = journey
  view = _follow(lambda w: _travel(w, steps), shape)
  if view is None:  # only what was merged can be split where it cannot be
    kinds = [kind for kind, _ in steps]
    assert 'merge' in kinds and 'split' in kinds[kinds.index('merge') :]
    return
  kernel = np.arange(math.prod(shape)).reshape(shape)
  moved = _travel(kernel, steps, numpy=True)
  np.testing.assert_array_equal(_gather(kernel, view), moved)


def test_a_kernel_that_was_not_touched():
  view = views.View.of((2, 1, 3))
  assert view.axes == ((Atom(0, 1, 2),), (Atom(1, 1, 1),), (Atom(2, 1, 3),))
  assert view.shape == (2, 1, 3)
  assert view.atoms() == (Atom(0, 1, 2), Atom(1, 1, 1), Atom(2, 1, 3))
  assert view.atoms([2, 0]) == (Atom(2, 1, 3), Atom(0, 1, 2))


def test_a_split_axis_is_major_and_minor_atoms():
  view = _follow(lambda w: w.reshape(2, 3, 4), (2, 12))
  assert view.axes[1:] == ((Atom(1, 4, 3),), (Atom(1, 1, 4),))
  again = _follow(lambda w: w.reshape(2, 3, 4).reshape(2, 3, 2, 2), (2, 12))
  assert again.axes[2:] == ((Atom(1, 2, 2),), (Atom(1, 1, 2),))


@pytest.mark.parametrize('order', [(2, 0, 1), (1, 2, 0), (0, 1, 2)])
def test_a_reshape_may_transpose_first(order):
  """As `vmap` of a convolution does with its kernel."""
  kernel = np.arange(24).reshape(2, 3, 4)
  moved = kernel.transpose(order)
  shape = (moved.shape[0], 24 // moved.shape[0])
  view = _follow(lambda w: lax.reshape(w, shape, order), (2, 3, 4))
  np.testing.assert_array_equal(_gather(kernel, view), moved.reshape(shape))


def test_a_merged_axis_is_several_atoms():
  view = _follow(lambda w: w.reshape(6, 4), (2, 3, 4))
  assert view.axes == ((Atom(0, 1, 2), Atom(1, 1, 3)), (Atom(2, 1, 4),))


def test_a_reshape_across_the_axes_is_not_followed():
  assert _follow(lambda w: w.reshape(3, 2), (2, 3)) is None
  assert _follow(lambda w: w.reshape(4, 9), (6, 6)) is None


def test_casts_between_floats_are_followed():
  for dtype in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn):
    assert _follow(lambda w, dtype=dtype: w.astype(dtype), (2, 3))
  for dtype in (jnp.int32, jnp.int8, jnp.int4, jnp.bool, jnp.complex64):
    assert not _follow(lambda w, dtype=dtype: w.astype(dtype), (2, 3))


@pytest.mark.parametrize(
  'name, fn',
  [
    ('copy', jnp.copy),
    ('optimization_barrier', lax.optimization_barrier),
    (
      'sharding_constraint',
      lambda w: lax.with_sharding_constraint(
        w, jax.sharding.SingleDeviceSharding(jax.devices()[0])
      ),
    ),
    ('broadcast_in_dim', lambda w: lax.broadcast_in_dim(w, (1, 2, 3), (1, 2))),
  ],
)
def test_what_changes_nothing_is_followed(name, fn):
  del name
  kernel = np.arange(6).reshape(2, 3)
  view = _follow(fn, (2, 3))
  moved = np.asarray(fn(jnp.asarray(kernel)))
  np.testing.assert_array_equal(_gather(kernel, view), moved)


@pytest.mark.parametrize(
  'fn',
  [
    lambda w: w + 1,
    lambda w: w[::-1],
    lambda w: w[:1],
    lambda w: jnp.sin(w),
    lambda w: jnp.broadcast_to(w[None], (2, 2, 3)),
    lambda w: jnp.concatenate([w, w]),
    lambda w: lax.reduce_precision(w, 5, 2),
  ],
)
def test_what_changes_values_or_repeats_them_is_not_followed(fn):
  assert _follow(fn, (2, 3)) is None


def test_peel_takes_the_first_axis_whatever_its_size():
  view = views.View.of((1, 2, 3)).peel()
  assert view.stacked == (Atom(0, 1, 1),)
  assert view.axes == ((Atom(1, 1, 2),), (Atom(2, 1, 3),))
  view = view.peel()
  assert view.stacked == (Atom(0, 1, 1), Atom(1, 1, 2))
  assert view.shape == (3,)
  assert view.peel().peel() is None


def test_peel_after_a_transposition():
  view = _follow(lambda w: w.transpose(2, 0, 1), (2, 3, 4)).peel()
  assert view.stacked == (Atom(2, 1, 4),)
  assert view.shape == (2, 3)
