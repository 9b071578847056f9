"""Data sets: loaded into NumPy, batched deterministically by seed."""

from oialr_jax.data.images import batches
from oialr_jax.data.images import digits
from oialr_jax.data.images import eval_batches
from oialr_jax.data.images import load
from oialr_jax.data.images import Split
