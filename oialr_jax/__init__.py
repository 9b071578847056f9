"""Orthogonality-informed adaptive low-rank training of any JAX model.

A network trains full-rank until the orthogonal bases U V^T of its kernels stop
turning; then W = U Sigma V^T, and only Sigma trains (arXiv 2401.08505). Here a
parameter is low-rank because of its type, and everything that happens to it is
a pure function from pytree to pytree.
"""

from oialr_jax.explanation import explain
from oialr_jax.explanation import Explanation
from oialr_jax.factored import factored
from oialr_jax.layers import find_layers
from oialr_jax.layers import Layer
from oialr_jax.layers import select
from oialr_jax.layers import split
from oialr_jax.lowrank import Factors
from oialr_jax.lowrank import is_low_rank
from oialr_jax.lowrank import LowRank
from oialr_jax.lowrank import MatrixView
from oialr_jax.metrics import basis
from oialr_jax.metrics import count
from oialr_jax.metrics import Counts
from oialr_jax.metrics import drift
from oialr_jax.metrics import mixing
from oialr_jax.metrics import r_distance
from oialr_jax.metrics import ranks
from oialr_jax.metrics import spectra
from oialr_jax.metrics import stability
from oialr_jax.optimizer import register_rule
from oialr_jax.optimizer import train_sigma
from oialr_jax.optimizer import transport
from oialr_jax.schedule import apply_event
from oialr_jax.schedule import Event
from oialr_jax.schedule import Report
from oialr_jax.schedule import Schedule
from oialr_jax.transforms import compact
from oialr_jax.transforms import prune_sigma
from oialr_jax.transforms import to_dense
from oialr_jax.transforms import to_factors
from oialr_jax.transforms import to_lowrank
from oialr_jax.transforms import trainable
from oialr_jax.transforms import update_basis
from oialr_jax.transforms import with_trainable

__version__ = '0.1.0'
