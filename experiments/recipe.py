"""What runs by timm's recipe share: its augmentation, its schedule, epochs."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments import classification
from experiments import cli
from experiments import results
from experiments import runs
from experiments import settings
from oialr_jax import data
from oialr_jax import models
from oialr_jax.training import rates

Config = settings.Config


def model(config: Config) -> nn.Module:
  """The model as configured, see `network`."""
  return network(config.model, 'config.model')


def network(section: Mapping[str, Any], where: str) -> nn.Module:
  """The model of a section: its name, attributes and dtype.

  Args:
    section: of the configuration.
    where: it is, for errors.

  Raises:
    ValueError: there is no such model, it has no such attribute, or not with
      such a value.
  """
  attributes = dict(section)
  settings.check_names([attributes['name']], models.NAMES, where)
  dtype = attributes.pop('dtype')
  if dtype not in ('float32', 'bfloat16'):
    raise ValueError(
      f"{where}.dtype={dtype!r}: must be 'float32' or 'bfloat16'."
    )
  try:
    return models.create(**attributes, dtype=jnp.dtype(dtype))
  except (TypeError, ValueError) as e:
    raise ValueError(f'{where}: {e}') from e


def augmentation(
  preset: Callable[..., data.Augmentation], config: Config
) -> data.Augmentation:
  """A preset of `data.Augmentation`, changed as configured.

  Raises:
    ValueError: a setting is unknown or out of range.
  """
  known = [field.name for field in dataclasses.fields(data.Augmentation)]
  settings.check_names(config.augmentation, known, 'config.augmentation')
  mixed = config.augmentation.mixup or config.augmentation.cutmix
  if mixed and config.batch_size % 2:
    raise ValueError(
      f'config.batch_size={config.batch_size}: is mixed in pairs, and must be '
      'even.'
    )
  try:
    return preset(**config.augmentation)
  except ValueError as e:
    raise ValueError(f'config.augmentation: {e}') from e


def length(config: Config, examples: int) -> int:
  """Steps of a run: those of its epochs, where it is not given in steps."""
  epoch = max(1, examples // config.batch_size)
  return config.steps or max(1, round(config.epochs * epoch))


def rate(config: Config, steps: int) -> optax.Schedule:
  """timm's schedule on updates; where there are other steps than the epochs',
  squeezed into them.

  Raises:
    ValueError: a setting is out of range.
  """
  epoch = steps / config.epochs
  try:
    return rates.warmup_cosine(
      config.learning_rate,
      steps=steps,
      warmup=round(config.warmup_epochs * epoch),
      start=config.warmup_rate,
      end=config.end_rate,
      k_decay=config.k_decay,
      cooldown=round(config.cooldown_epochs * epoch),
      prefix=True,
    )
  except ValueError as e:
    raise ValueError(f'config, by its {config.epochs} epochs: {e}') from e


def compare(
  task: classification.Task,
  config: Config,
  options: cli.Options,
  *,
  examples: int,
  tested_on: str = 'test',
):
  """Runs the methods and seeds of the configuration, see `classification`.

  Args:
    task: what is learnt.
    config: the settings.
    options: of the binary.
    examples: of an epoch.
    tested_on: the split of the evaluations, by its name.
  """
  steps = length(config, examples)
  classification.compare(
    task,
    config,
    options,
    methods=config.methods,
    seeds=config.seeds,
    steps=steps,
    rate=rate(config, steps),
    eval_every=max(1, round(config.eval_epochs * steps / config.epochs)),
    track_every=config.track_every,
    summary=lambda _, result: results.summary(result, tested_on),
  )


def check(config: Config, *, examples: int, image: tuple[int, ...]):
  """Raises ValueError if a run cannot be as configured; loads nothing.

  Args:
    config: the settings.
    examples: of an epoch.
    image: shape of an image.
  """
  steps = length(config, examples)
  rate(config, steps)
  runs.check(config, steps, config.methods)
  images = jax.ShapeDtypeStruct((1, *image), jnp.float32)
  runs.check_model(model(config), 'config.model', images)
