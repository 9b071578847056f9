"""Training: the jitted steps, the loop around them, and who listens."""

from oialr_jax.training.callbacks import Callback
from oialr_jax.training.callbacks import EarlyStopping
from oialr_jax.training.callbacks import Record
from oialr_jax.training.callbacks import Start
from oialr_jax.training.callbacks import Stop
from oialr_jax.training.compaction import Compaction
from oialr_jax.training.compaction import rehearse
from oialr_jax.training.conversion import Conversion
from oialr_jax.training.interruptions import Interrupted
from oialr_jax.training.loop import fit
from oialr_jax.training.programs import use_compilation_cache
from oialr_jax.training.progress import Progress
from oialr_jax.training.run import Result
from oialr_jax.training.steps import eval_step
from oialr_jax.training.steps import EvalFn
from oialr_jax.training.steps import LossFn
from oialr_jax.training.steps import train_step
from oialr_jax.training.steps import TrainState
from oialr_jax.training.writers import Jsonl
from oialr_jax.training.writers import TensorBoard
from oialr_jax.training.writers import WandB
from oialr_jax.training.writers import Writer
