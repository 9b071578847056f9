"""Learning-rate schedules by name, for studies of their effect."""

from collections.abc import Callable, Mapping

import optax

from experiments import classification
from experiments import settings

Config = settings.Config

_CYCLES = 3
# Of the highest rate: of the control that hardly moves.
_TINY = 1e-3


def _constant(config: Config) -> optax.Schedule:
  return optax.constant_schedule(config.learning_rate)


def _tiny(config: Config) -> optax.Schedule:
  return optax.constant_schedule(_TINY * config.learning_rate)


def _cosine(config: Config) -> optax.Schedule:
  return optax.cosine_decay_schedule(config.learning_rate, config.steps)


def _restarts(config: Config) -> optax.Schedule:
  """Cosines from the highest rate to zero, of equal length (1608.03983)."""
  cycle = -(-config.steps // _CYCLES)
  cosine = optax.cosine_decay_schedule(config.learning_rate, cycle)
  return lambda step: cosine(step % cycle)


SCHEDULES: Mapping[str, Callable[[Config], optax.Schedule]] = {
  'constant': _constant,
  'cosine': _cosine,
  'warmup': classification.cosine,  # a linear warm-up, and a cosine
  'restarts': _restarts,
  'tiny': _tiny,
}


def make(name: str, config: Config) -> optax.Schedule:
  """The schedule of a name.

  Args:
    name: one of `SCHEDULES`.
    config: with `learning_rate`, `steps` and `warmup`.

  Raises:
    ValueError: there is no such schedule, or not with these settings.
  """
  settings.check_names([name], SCHEDULES, 'config.schedules')
  return SCHEDULES[name](config)
