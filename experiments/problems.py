"""What the benchmarks train: any model, on a loss that costs nothing."""

from typing import Any

import jax.numpy as jnp

from oialr_jax import training


def mean_square(model: Any) -> training.LossFn:
  """The mean square of what the model returns: its cost does not matter."""

  def loss(params, model_state, batch, key):
    out, model_state = model.apply(
      {'params': params, **model_state},
      *batch,
      train=True,
      mutable=list(model_state),
      rngs={'dropout': key},
    )
    mean = jnp.mean(jnp.square(out.astype(jnp.float32)))
    return mean, (dict(model_state), {})

  return loss
