"""Data sets: in memory or streamed, in an order by seed and step, augmented."""

from oialr_jax.data.augmentation import augment
from oialr_jax.data.augmentation import Augmentation
from oialr_jax.data.augmentation import distort
from oialr_jax.data.augmentation import finish
from oialr_jax.data.augmentation import normalize
from oialr_jax.data.batching import Batches
from oialr_jax.data.images import batches
from oialr_jax.data.images import digits
from oialr_jax.data.images import eval_batches
from oialr_jax.data.images import load
from oialr_jax.data.images import Split
from oialr_jax.data.series import eval_window_batches
from oialr_jax.data.series import forecast_errors
from oialr_jax.data.series import load_series
from oialr_jax.data.series import Series
from oialr_jax.data.series import time_features
from oialr_jax.data.series import window_batches
from oialr_jax.data.series import Windows
from oialr_jax.data.sources import Source
from oialr_jax.data.sources import source
from oialr_jax.data.streaming import eval_stream
from oialr_jax.data.streaming import stream
