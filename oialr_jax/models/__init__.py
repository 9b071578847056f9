"""Models in flax.linen. They know nothing of low rank: any model will do."""

from oialr_jax.models import convert
from oialr_jax.models.autoformer import Autoformer
from oialr_jax.models.convnext import ConvNext
from oialr_jax.models.gpt import Gpt
from oialr_jax.models.mixer import Mixer
from oialr_jax.models.registry import create
from oialr_jax.models.registry import inputs
from oialr_jax.models.registry import NAMES
from oialr_jax.models.resnet import ResNet
from oialr_jax.models.small import Mlp
from oialr_jax.models.small import MnistCnn
from oialr_jax.models.vit import Vit
