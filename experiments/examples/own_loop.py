"""A loop of one's own, with the transforms alone.

python -m experiments.examples.own_loop
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

import oialr_jax as oialr

model = nn.Sequential(
  [nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh, nn.Dense(1)]
)
x = jax.random.normal(jax.random.key(0), (512, 16))
y = jnp.sin(x.sum(axis=1, keepdims=True))
params = model.init(jax.random.key(1), x)

forward = oialr.factored(model.apply)  # takes dense and low-rank kernels alike
layers = oialr.select(oialr.find_layers(model.apply, params, x))
schedule = oialr.Schedule(steps=300, delay=100, every=50, cutoff=0.2)
tx = oialr.train_sigma(optax.adamw(3e-3))
opt_state = tx.init(params)


@jax.jit
def step(params, opt_state):
  def loss(t):
    return jnp.mean((forward(oialr.with_trainable(params, t), x) - y) ** 2)

  t = oialr.trainable(params)  # Sigma, biases, dense kernels
  value, grads = jax.value_and_grad(loss)(t)
  updates, opt_state = tx.update(grads, opt_state, params)
  new = oialr.with_trainable(params, optax.apply_updates(t, updates))
  return new, opt_state, value


for i in range(schedule.steps):
  if event := schedule.event(i):
    params, opt_state, _ = oialr.apply_event(
      event, params, opt_state, layers, schedule
    )
  params, opt_state, value = step(params, opt_state)
print(oialr.ranks(params), float(value))
