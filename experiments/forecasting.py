"""What is learnt where series are forecast: the model, windows, errors."""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import runs
from experiments import settings
from oialr_jax import data
from oialr_jax import models

Config = settings.Config

# What can be trained on: errors squared, as published, or not.
LOSSES = {'mse': jnp.square, 'mae': jnp.abs}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """Autoformer and the windows of a series, as `training.fit` takes them.

  Attributes:
    model: of the past, the end of the past with what is to come, and the time
      features of both.
    train: windows to train on.
    val: windows by which an epoch is chosen.
    test: windows for the result.
    batch_size: windows of a step.
    eval_batch_size: windows at once in evaluations.
    trained_on: which of `LOSSES`, its mean over a batch being the loss.
  """

  model: nn.Module
  train: data.Windows
  val: data.Windows
  test: data.Windows
  batch_size: int
  eval_batch_size: int
  trained_on: str = 'mse'

  @classmethod
  def of_series(
    cls, series: data.Series, config: Config, horizon: int
  ) -> 'Task':
    """Of a series, as published but for limits that the settings have.

    As in the authors' program, validation and test windows that fill no batch
    are left out.
    """
    windows = functools.partial(
      series.windows,
      seq_len=config.seq_len,
      label_len=config.label_len,
      pred_len=horizon,
    )

    def full_batches(split: str) -> data.Windows:
      found = windows(split)
      count = min(len(found), config.eval_windows or len(found))
      full = count - count % config.batch_size
      return dataclasses.replace(found, count=full or count)

    return cls(
      model=model(config),
      train=windows('train'),
      val=full_batches('val'),
      test=full_batches('test'),
      batch_size=config.batch_size,
      eval_batch_size=config.eval_batch_size,
      trained_on=config.loss,
    )

  def init(self, seed: int) -> Any:
    """Parameters."""
    inputs = jax.eval_shape(_inputs, self.train.take(np.arange(1)))
    # Lazy: nothing but the parameters is computed, or compiled.
    return self.model.lazy_init(jax.random.key(seed), *inputs)['params']

  def batches(self, seed: int) -> data.Batches:
    """Windows for training, by the seed."""
    return data.window_batches(self.train, self.batch_size, seed=seed)

  def evaluation(self) -> Iterator[Any]:
    """The windows of validation and test.

    A trainer takes means over all of them. With these weights, they are means
    over the windows of one of the two.
    """
    splits = {'val': self.val, 'test': self.test}
    total = sum(map(len, splits.values()))
    for split, windows in splits.items():
      batches = data.eval_window_batches(windows, self.eval_batch_size)
      for batch in batches():
        count = len(batch['mask'])
        weights = {name: np.zeros(count, np.float32) for name in splits}
        weights[split] += total / len(windows)
        yield batch | {'weights': weights}

  def loss(self, params, model_state, batch, key):
    forecast = self.model.apply(
      {'params': params}, *_inputs(batch), train=True, rngs={'dropout': key}
    )
    errors = LOSSES[self.trained_on](forecast - batch['target'])
    return jnp.mean(errors), (model_state, {})

  def evaluate(self, params, model_state, batch):
    del model_state
    forecast = self.model.apply({'params': params}, *_inputs(batch))
    errors = data.forecast_errors(forecast, batch['target'])
    return {
      f'{split}_{name}': weight * error
      for split, weight in batch['weights'].items()
      for name, error in errors.items()
    }


def model(config: Config) -> nn.Module:
  """Autoformer as configured.

  Raises:
    ValueError: it has no such attribute, or not with such a value.
  """
  try:
    return models.create(
      'autoformer', label_len=config.label_len, **config.model
    )
  except (TypeError, ValueError) as e:
    raise ValueError(f'config.model: {e}') from e


def check(config: Config, horizon: int, features: int = 5):
  """Raises ValueError if the model cannot be as configured; loads nothing.

  Args:
    config: the settings.
    horizon: steps to forecast.
    features: of the time.
  """
  past, ahead = config.seq_len, config.label_len + horizon
  shapes = [
    (1, length, width)
    for length in (past, ahead)
    for width in (model(config).c_out, features)
  ]
  inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  runs.check_model(model(config), 'config.model', *inputs)


def _inputs(batch: Mapping[str, Any]) -> tuple[Any, ...]:
  return tuple(
    batch[key] for key in ('x_enc', 'x_mark_enc', 'x_dec', 'x_mark_dec')
  )
