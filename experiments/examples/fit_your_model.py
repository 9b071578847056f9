"""One's own model, loss and batches, trained by `fit`.

python -m experiments.examples.fit_your_model
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import oialr_jax as oialr
from oialr_jax import training

model = nn.Sequential(
  [nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh, nn.Dense(1)]
)
x = np.random.default_rng(0).normal(size=(512, 16)).astype(np.float32)
y = np.sin(x.sum(axis=1, keepdims=True))
params = model.init(jax.random.key(0), x)


def loss(params, model_state, batch, key):
  error = model.apply(params, batch['x']) - batch['y']
  return jnp.mean(error**2), (model_state, {})


result = training.fit(
  loss,
  params,
  ({'x': x, 'y': y} for _ in range(300)),
  optimizer=optax.adamw(3e-3),
  steps=300,
  schedule=oialr.Schedule(steps=300, delay=100, every=50, cutoff=0.2),
)
print(oialr.ranks(result.params), result.select('train')[-1]['loss'])
