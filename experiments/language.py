"""Text by characters: what is learnt where a language model is trained.

The text is Python's own: the source files of its standard library, as they are
installed. Nothing is to be downloaded, and numbers depend on Python's version.
Of ten files one is for validation and one for tests.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import itertools
import pathlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import settings
from oialr_jax import data
from oialr_jax import models

Config = settings.Config

VOCABULARY = 128  # ASCII
_PARTS = 10


@functools.cache
def text(characters: int) -> dict[str, np.ndarray]:
  """Source files of the standard library as `[n]` of uint8: 0 to 127.

  Args:
    characters: at most, of the training text; an eighth of them of the others.

  Returns:
    By split: 'train', 'val' and 'test'.
  """
  folder = pathlib.Path(dataclasses.__file__).parent
  splits = {'train': b'', 'val': b'', 'test': b''}
  for i, file in enumerate(sorted(folder.glob('*.py'))):
    split = {0: 'val', 1: 'test'}.get(i % _PARTS, 'train')
    splits[split] += bytes(x for x in file.read_bytes() if x < VOCABULARY)
  limits = {
    'train': characters,
    'val': characters // 8,
    'test': characters // 8,
  }
  return {
    split: np.frombuffer(found[: limits[split]], np.uint8)
    for split, found in splits.items()
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A language model and its texts, as `training.fit` takes them.

  Attributes:
    model: of tokens.
    texts: by split.
    context: characters that are seen.
    batch_size: windows of a step.
    eval_batch_size: windows at once in evaluations.
  """

  model: nn.Module
  texts: Mapping[str, np.ndarray]
  context: int
  batch_size: int
  eval_batch_size: int

  def init(self, seed: int) -> tuple[Any, Any]:
    """Parameters, and nothing else that the model carries."""
    tokens = jax.ShapeDtypeStruct((1, self.context), jnp.int32)
    variables = self.model.lazy_init(jax.random.key(seed), tokens)
    return variables['params'], {}

  def train(self, seed: int) -> data.Batches:
    """Windows at random, by the seed and the step."""
    windows = _windows(self.texts['train'], self.context, stride=1)

    def batch(step: int) -> np.ndarray:
      draw = np.random.default_rng([seed, step])
      return windows[draw.integers(len(windows), size=self.batch_size)]

    return data.Batches(lambda step: map(batch, itertools.count(step)))

  def test(self) -> Iterator[Any]:
    """The windows of validation and test, one after the other.

    A trainer takes means over all of them. With these weights, they are means
    over the windows of one of the two.
    """
    splits = {
      split: _windows(self.texts[split], self.context, stride=self.context)
      for split in ('val', 'test')
    }
    total = sum(map(len, splits.values()))
    for split, windows in splits.items():
      for start in range(0, len(windows), self.eval_batch_size):
        index = np.arange(start, start + self.eval_batch_size)
        mask = (index < len(windows)).astype(np.float32)
        index = np.minimum(index, len(windows) - 1)
        weights = {name: np.zeros(len(index), np.float32) for name in splits}
        weights[split] += total / len(windows)
        yield {'text': windows[index], 'mask': mask, 'weights': weights}

  def loss(self, params, model_state, batch, key):
    bits = self._bits(params, batch, train=True, rngs={'dropout': key})
    return jnp.log(2.0) * bits.mean(), (model_state, {})

  def evaluate(self, params, model_state, batch):
    del model_state
    bits = self._bits(params, batch['text']).mean(axis=-1)
    return {
      f'{split}_bits': weight * bits
      for split, weight in batch['weights'].items()
    }

  def _bits(self, params, windows, **more) -> jax.Array:
    """Of every character, by those before it."""
    windows = windows.astype(jnp.int32)
    logits = self.model.apply({'params': params}, windows[:, :-1], **more)
    loss = optax.softmax_cross_entropy_with_integer_labels
    return loss(logits, windows[:, 1:]) / jnp.log(2.0)


def network(section: Mapping[str, Any], context: int, where: str) -> nn.Module:
  """The model of a section.

  Args:
    section: of the configuration.
    context: characters that it sees.
    where: the section is, for errors.

  Raises:
    ValueError: there is no such attribute, or not with such a value.
  """
  known = {field.name for field in dataclasses.fields(models.Gpt)}
  settings.check_names(section, known - {'parent', 'name'}, where)
  try:
    return models.Gpt(vocabulary=VOCABULARY, context=context, **section)
  except ValueError as e:
    raise ValueError(f'{where}: {e}') from e


def _windows(text: np.ndarray, context: int, *, stride: int) -> np.ndarray:
  """`[n, context + 1]`: what is seen, and the character after it."""
  windows = np.lib.stride_tricks.sliding_window_view(text, context + 1)
  return windows[::stride]
