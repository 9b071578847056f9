"""What the image-classification binaries share: task, optimiser, runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import itertools
import types
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import cli
from experiments import methods
from experiments import results
from experiments import rows as rows_lib
from experiments import runs
from experiments import settings
import oialr_jax as oialr
from oialr_jax import data
from oialr_jax import training

Config = settings.Config

# What the key of a run is folded with for augmentation: never a step.
_AUGMENTATION = 2**32 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A Flax model and its data, as `training.fit` takes them.

  Attributes:
    model: of images.
    image: shape of an image.
    train: batches for training, by the seed. Labels are numbers, or, as after
      augmentation, distributions.
    test: batches of an evaluation.
    augmentation: by which test images, then raw, are normalised.
    label_smoothing: of labels that are numbers.
  """

  model: nn.Module
  image: tuple[int, ...]
  train: Callable[[int], Iterable[Any]]
  test: Callable[[], Iterable[Any]]
  augmentation: data.Augmentation | None = None
  label_smoothing: float = 0.0

  @classmethod
  def of_splits(
    cls,
    model: nn.Module,
    train: data.Split,
    test: data.Split,
    config: Config,
    augmentation: data.Augmentation | None = None,
  ) -> 'Task':
    """Of images in memory, augmented on the device if at all."""
    raw = augmentation is not None
    size = config.batch_size

    def batches(seed: int) -> data.Batches:
      plain = data.batches(train, size, seed=seed, raw=raw)
      if not raw:
        return plain
      return augmented(
        plain, data.augment, augmentation, train.classes, seed=seed
      )

    return cls(
      model=model,
      image=train.image.shape[1:],
      train=batches,
      test=data.eval_batches(test, config.eval_batch_size, raw=raw),
      augmentation=augmentation,
      label_smoothing=config.get('label_smoothing', 0.0),
    )

  def init(self, seed: int) -> tuple[Any, Any]:
    """Parameters and batch statistics."""
    image = jax.ShapeDtypeStruct((1, *self.image), jnp.float32)
    # Lazy: nothing but the parameters is computed, or compiled.
    variables = self.model.lazy_init(jax.random.key(seed), image)
    return variables['params'], dict(
      batch_stats=variables.get('batch_stats', {})
    )

  def loss(self, params, model_state, batch, key):
    logits, model_state = self.model.apply(
      {'params': params, **model_state},
      batch['image'],
      train=True,
      mutable=list(model_state),
      rngs={'dropout': key},
    )
    labels = batch['label']
    if labels.ndim == 1:
      labels = optax.smooth_labels(
        jax.nn.one_hot(labels, logits.shape[-1]), self.label_smoothing
      )
    loss = optax.softmax_cross_entropy(logits, labels).mean()
    return loss, (dict(model_state), {})

  def forward(self, variables, image):
    """Logits of test images."""
    if self.augmentation is not None:
      image = data.normalize(image, self.augmentation)
    return self.model.apply(variables, image)

  def probe(self) -> tuple[Any, ...]:
    """A few test images, as `forward` takes them."""
    return (next(iter(self.test()))['image'][:8],)

  def evaluate(self, params, model_state, batch):
    logits = self.forward({'params': params, **model_state}, batch['image'])
    hit = jnp.argmax(logits, -1) == batch['label']
    loss = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']
    )
    return {'accuracy': hit.astype(jnp.float32), 'loss': loss}


def held_out(
  split: data.Split, share: float, seed: int = 0
) -> tuple[data.Split, data.Split]:
  """The rest, and a share of the examples, as many of each class.

  Args:
    split: of training data.
    share: in (0, 1).
    seed: of which examples are which.
  """
  from sklearn import model_selection

  rest, held = model_selection.train_test_split(
    np.arange(len(split)),
    test_size=share,
    random_state=seed,
    stratify=split.label,
  )
  return split.part(rest), split.part(held)


def augmented(
  batches: data.Batches,
  augment: Callable[..., Any],
  config: data.Augmentation,
  classes: int,
  *,
  seed: int,
) -> data.Batches:
  """Batches after `data.augment` or `data.finish`, beside the training step.

  Within the step they would be compiled anew with it at every compaction, which
  takes longer than the step of a small network itself.
  """
  augment = jax.jit(functools.partial(augment, config=config, classes=classes))
  key = jax.random.fold_in(jax.random.key(seed), _AUGMENTATION)
  # Processes have parts of a batch: their examples are not to be treated alike.
  key = jax.random.fold_in(key, jax.process_index())
  return batches.map(
    lambda batch, step: augment(batch, jax.random.fold_in(key, step))
  )


def cosine(config: Config) -> optax.Schedule:
  """A linear warm-up from a tenth of the rate, and a cosine to zero."""
  if config.warmup >= config.steps:
    raise ValueError(
      f'config.warmup={config.warmup}: must be less than config.steps='
      f'{config.steps}.'
    )
  return optax.warmup_cosine_decay_schedule(
    init_value=config.learning_rate / 10,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup,
    decay_steps=config.steps,
  )


def compare(
  task: Task,
  config: Config,
  options: cli.Options,
  *,
  methods: Sequence[str],
  seeds: Sequence[int],
  summary: Callable[..., dict[str, Any]] | None = None,
  only: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
  **more: Any,
):
  """Runs every method with every seed; prints the table and leaves a report.

  result.json has a row a run, and is written after every run. With --resume,
  runs that are in it are left out. The report is of the first seed.

  Args:
    task: what is learnt.
    config: the settings.
    options: of the binary.
    methods: see `runs.arguments`.
    seeds: of parameters and batches.
    summary: `(method, result) -> numbers` of a row; by default
      `results.summary`.
    only: by method, what is otherwise than in `more`: the run is no whole one,
      and not in the report.
    **more: see `run`.
  """
  rows = rows_lib.Rows(
    options.workdir,
    config,
    keys=('method', 'seed'),
    free=('methods', 'seeds'),
    resume=options.resume,
  )
  first = {}
  try:
    for seed, method in itertools.product(seeds, methods):
      known = rows.find(method, seed) is not None
      reported = seed == seeds[0] and method not in only
      if known and not reported:
        continue
      # One that is finished is only read again, for the report.
      settings_of = more | only.get(method, {})
      result = run(task, config, options, method, seed, **settings_of)
      if not known:
        numbers = (
          summary(method, result) if summary else results.summary(result)
        )
        which = {'method': method, 'seed': seed}
        rows.add(which | numbers | runs.machine())
      if reported:
        first[method] = result
  finally:
    if rows:
      print(results.table(rows))
  if first:
    results.write_report(
      options.workdir,
      first,
      task.forward,
      task.probe(),
      getattr(task.model, 'dtype', jnp.float32),
    )


def run(
  task: Task,
  config: Config,
  options: cli.Options,
  method: str,
  seed: int,
  **more: Any,
) -> training.Result:
  """One run; `more` has steps, rate, and what else `training.fit` takes."""
  params, model_state = task.init(seed)
  return runs.fit(
    method,
    config,
    options,
    name=f'{method}-{seed}',
    loss_fn=task.loss,
    params=params,
    data=lambda: task.train(seed),
    optimizer=methods.Adam(clip=config.clip, weight_decay=config.weight_decay),
    model_state=model_state,
    eval_fn=task.evaluate,
    eval_data=task.test,
    seed=seed,
    **more,
  )


def delay(config: Config) -> int:
  """The step of the transition."""
  return settings.build(
    oialr.Schedule, config, 'oialr', steps=config.steps
  ).delay_steps
