"""Models in flax.linen. They know nothing of low rank: any model will do."""

from oialr_jax.models.small import Mlp
from oialr_jax.models.small import MnistCnn
