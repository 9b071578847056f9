"""Learning rates as Optax takes them: functions of the step.

Of a step `t` the schedules give the rate of the update that follows `t` others.
Lengths are in optimiser steps.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from oialr_jax import schedule as schedule_lib


def warmup_cosine(
  peak: float,
  *,
  steps: int,
  warmup: int = 0,
  start: float = 0.0,
  end: float = 0.0,
  k_decay: float = 1.0,
  cooldown: int = 0,
  prefix: bool = False,
  hold: int = 1,
) -> optax.Schedule:
  """timm's schedule: a linear warm-up, a cosine with k-decay, a cooldown.

      t < warmup:  start + (peak - start) t / warmup
      otherwise:   end + (peak - end) (1 + cos(pi (s / decay)^k_decay)) / 2

  With `prefix` the cosine begins after the warm-up, s = t - warmup. Without, as
  by default in timm, both begin at step 0, s = t, so that the rate drops at the
  end of the warm-up to where the cosine is by then. The cosine ends after
  `decay` steps, those of the run without the cooldown (and without the warm-up,
  if that is a prefix); from there on the rate is `end`.

  Args:
    peak: the rate that the warm-up leads to.
    steps: of the run: warm-up, cosine and cooldown.
    warmup: steps of the warm-up.
    start: the rate of step 0, if there is a warm-up.
    end: the least rate of the cosine, and that of the cooldown.
    k_decay: exponent of arXiv 2004.05909. Less than 1 goes down sooner.
    cooldown: steps at the end of the run.
    prefix: let the cosine begin after the warm-up.
    hold: change the rate every so many steps: 1 is timm's schedule on updates,
      the steps of an epoch are timm's schedule on epochs.

  Raises:
    ValueError: a value is out of range, or nothing is left for the cosine.
  """
  for name, value in dict(start=start, end=end).items():
    if value < 0:
      raise ValueError(f'{name}={value}: a rate must not be negative.')
  for name, value in dict(peak=peak, k_decay=k_decay).items():
    if not value > 0:
      raise ValueError(f'{name}={value}: must be positive.')
  if warmup < 0 or cooldown < 0 or hold < 1:
    raise ValueError(
      f'warmup={warmup}, cooldown={cooldown}, hold={hold}: must be at least 0, '
      '0 and 1 steps.'
    )
  decay = steps - cooldown - (warmup if prefix else 0)
  if decay < 1 or warmup + cooldown >= steps:
    raise ValueError(
      f'steps={steps}: nothing is left for the cosine after warmup={warmup} '
      f'and cooldown={cooldown}; shorten them.'
    )

  def rate(step: jax.typing.ArrayLike) -> jax.Array:
    step = jnp.asarray(step)
    step = step - step % hold
    since = step - warmup if prefix else step
    share = jnp.clip(since / decay, 0, 1)
    cosine = (1 + jnp.cos(jnp.pi * share**k_decay)) / 2
    rising = start + (peak - start) * step / max(warmup, 1)
    return jnp.where(step < warmup, rising, end + (peak - end) * cosine)

  return rate


def rewarmed(
  rate: optax.Schedule,
  events: Sequence[schedule_lib.Event],
  *,
  steps: int,
  start: float = 0.1,
) -> optax.Schedule:
  """A rate that is taken back at every event, and rises again.

      rate(t) (start + (1 - start) min(1, (t - e) / steps))

  e being the step at which the last event was due; before the first one it is
  the rate alone. Moments that were transported (see `transport`) want no such
  thing; those that were reset or zeroed may.

  Args:
    rate: the schedule without events.
    events: `Schedule.events()`, or some of them; or conversions.
    steps: of the linear rise.
    start: the share of the rate that it starts from.

  Raises:
    ValueError: a value is out of range.
  """
  if steps < 1:
    raise ValueError(f'steps={steps}: must be at least 1.')
  if not 0 <= start <= 1:
    raise ValueError(f'start={start}: must be in [0, 1].')
  if not events:
    return rate
  at = jnp.array(sorted(getattr(e, 'due', e.step) for e in events))

  def again(step: jax.typing.ArrayLike) -> jax.Array:
    last = jnp.searchsorted(at, step, side='right') - 1
    risen = jnp.clip((step - at[last]) / steps, 0, 1)
    share = start + (1 - start) * risen
    return rate(step) * jnp.where(last < 0, 1.0, share)

  return again
