"""What the settings of the binaries mean, and which values they take.

A configuration is an `ml_collections.ConfigDict` of settings and of sections;
a section is what a class of the package is built from. All of it is checked
before anything is loaded, by `check` and by what a binary checks besides.
"""

from collections.abc import Callable, Mapping
import dataclasses
import difflib
import pkgutil
from typing import Any, TypeVar

import docstring_parser
import ml_collections

Config = ml_collections.ConfigDict
T = TypeVar('T')

_RULES: Mapping[str, Callable[[Any], bool]] = {
  'at least 0': lambda x: x >= 0,
  'at least 1': lambda x: x >= 1,
  'positive': lambda x: x > 0,
  'in (0, 1]': lambda x: 0 < x <= 1,
  'in [0, 1)': lambda x: 0 <= x < 1,
  'true or false': lambda x: isinstance(x, bool),
  "'float32' or 'bfloat16'": lambda x: x in ('float32', 'bfloat16'),
  'known': lambda x: True,  # to the binary, which says what it knows
}
# Of every setting: what it is, with its unit, and what it must be. Tuples are
# given by commas, and each of their values must be that.
SETTINGS: Mapping[str, tuple[str, str]] = {
  'accumulate': ('parts that a batch is cut into', 'at least 1'),
  'activation': ('where it is not varied', 'known'),
  'activations': ('of the layers, runs for each', 'known'),
  'augment': ('augment training images as published', 'true or false'),
  'batch_size': ('examples of a step', 'at least 1'),
  'binary': ('whose settings are searched, said with --config', 'known'),
  'batch_sizes': ('examples of a step, runs for each', 'at least 1'),
  'characters': ('of the text, at most', 'at least 1'),
  'clip': ('largest norm of the gradients', 'positive'),
  'constant_epochs': ('epochs before the rate is halved', 'positive'),
  'context': ('characters that the language model sees', 'at least 1'),
  'cooldown_epochs': ('epochs at end_rate, at the end', 'at least 0'),
  'cutoffs': ('beta, relative to the largest singular value', 'in [0, 1)'),
  'data': ('which images', 'known'),
  'delays': ('of the transition as a share of the run', 'in [0, 1)'),
  'depths': ('numbers of hidden layers, runs for each', 'at least 1'),
  'dtype': ('to compute in', "'float32' or 'bfloat16'"),
  'end_rate': ('least learning rate', 'at least 0'),
  'epochs': ('length of the run in passes over the data', 'positive'),
  'eval_batch_size': ('examples at once in evaluations', 'at least 1'),
  'eval_epochs': ('epochs between evaluations', 'positive'),
  'eval_windows': (
    'windows of a split to evaluate on; all by default',
    'at least 1',
  ),
  'grace': (
    'seconds without a sign of life until a trial is given to another worker',
    'positive',
  ),
  'examples': ('of the training split, at most; all by default', 'at least 1'),
  'halving_epochs': (
    'epochs from one halving of the rate to the next',
    'positive',
  ),
  'horizons': ('steps to forecast, a run for each', 'at least 1'),
  'image_size': ('height and width in pixels', 'at least 1'),
  'k_decay': ("exponent of the cosine's k-decay", 'positive'),
  'label_len': ('steps of the past that the decoder is given', 'at least 0'),
  'label_smoothing': ('share of a label for all classes', 'in [0, 1)'),
  'learning_rate': ('the highest', 'positive'),
  'learning_rates': ('the highest, runs for each', 'positive'),
  'loss': ('of errors squared, mse, or of absolute ones, mae', 'known'),
  'methods': ('runs for each, on the same batches', 'known'),
  'networks': ('of the section models, runs for each', 'known'),
  'patience': (
    'evaluations without improvement that end a run; 0 ends none',
    'at least 0',
  ),
  'prune': (
    'share of the trials before that have to be better, half way, to stop one',
    'in (0, 1]',
  ),
  'remat': ('compute activations again, to save memory', 'true or false'),
  'rewarmup': ('steps of a warm-up after every event', 'at least 0'),
  'rungs': ('evaluations during a trial, at which it may stop', 'at least 0'),
  'schedule': ('of the learning rate, where it is not varied', 'known'),
  'schedules': ('of the learning rate, runs for each', 'known'),
  'seed': ('of the data, the parameters and the batches', 'at least 0'),
  'seeds': ('of parameters and batches, runs for each', 'at least 0'),
  'seq_len': ('steps of the past that the model sees', 'at least 1'),
  'sets': ('data sets, runs for each', 'known'),
  'steps': ('length of the run in optimiser steps', 'at least 1'),
  'stop_epochs': (
    'stop after so many epochs, with nothing else changed',
    'positive',
  ),
  'storage': (
    "of trials: an SQLAlchemy URL, or 'journal:FILE'; by default a file of "
    'SQLite in --workdir',
    'known',
  ),
  'test_seeds': ('of the runs that are tested at the end', 'at least 0'),
  'track_every': (
    "steps between measurements of the bases' turn",
    'at least 1',
  ),
  'trials': ('settings to try, by all workers together', 'at least 1'),
  'upscale': ('pixels that a pixel becomes, in height and width', 'at least 1'),
  'val_share': ('of the training split that is for validation', 'in [0, 1)'),
  'warmup': ('steps of linear warm-up', 'at least 0'),
  'warmup_epochs': ('epochs of linear warm-up', 'at least 0'),
  'warmup_rate': ('learning rate at step 0', 'at least 0'),
  'weight_decay': ("AdamW's", 'at least 0'),
  'width': ('of the hidden layers', 'at least 1'),
  'workers': (
    'processes: that decode images, where 0 takes threads; or that search, '
    'where 0 shows what there is',
    'at least 0',
  ),
}
# Of every section: what it is, and the class whose attributes it gives, if it
# is one, which says what they are.
SECTIONS: Mapping[str, tuple[str, str | None]] = {
  'augmentation': ('of training images', 'oialr_jax.data.Augmentation'),
  'base': (
    'of the binary whose settings are searched, of a trial without change',
    None,
  ),
  'compaction': ('when ranks are sliced', 'oialr_jax.training.Compaction'),
  'model': ('its name and attributes, see oialr_jax.models', None),
  'models': ('names and attributes of several, see oialr_jax.models', None),
  'oialr': ('of the method', 'oialr_jax.Schedule'),
  'fixed_rank': ('of that method', 'experiments.methods.FixedRank'),
  'svd_prune': ('of that method', 'experiments.methods.SvdPrune'),
  'svd_init': ('of that method', 'experiments.methods.SvdInit'),
  'galore': ('of that method', 'experiments.methods.Galore'),
  'lora_style': ('of that method', 'experiments.lora.Lora'),
  'dlrt': ('of that method', 'experiments.dlrt.Dlrt'),
  'space': ('least and largest values to try, see experiments.search', None),
}


def either(value: Any) -> ml_collections.FieldReference:
  """A setting that flags may set to a value of any type.

  Such as a number of steps (an int) or a share of the run (a float).
  """
  return ml_collections.FieldReference(value, field_type=object)


def optional(kind: type) -> ml_collections.FieldReference:
  """A setting that is None, unless a flag says otherwise."""
  return ml_collections.config_dict.placeholder(kind)


def describe(config: Config) -> str:
  """A line for every setting: its name, its value here, and what it is."""
  lines = []
  for key, value in config.items():
    if key in SECTIONS:
      text, made = SECTIONS[key]
      lines.append(f'{key}.*: {text}' + (f', see {made}' if made else ''))
      said = _attributes(made) if made else {}
      for k, v in flat(value).items():
        end = f': {said[k]}' if k in said else ''
        lines.append(f'{key}.{k} = {_shown(v)}{end}')
    else:
      lines.append(f'{key} = {_shown(value)}: {SETTINGS[key][0]}')
  return '\n'.join(lines)


def check(config: Config, reference: Config):
  """Checks names and values of the settings that are in no section.

  Args:
    config: the settings.
    reference: what the binary has by default: the settings that it knows.

  Raises:
    ValueError: a setting is unknown (names the nearest one) or missing, or its
      value is out of range.
  """
  check_names(config, reference, 'config')
  lost = [key for key in reference if key not in config]
  if lost:
    raise ValueError(
      f'config.{lost[0]} is missing: add it, as '
      f'{lost[0]}={_shown(reference[lost[0]])}.'
    )
  for key, value in config.items():
    if key not in SECTIONS and not (value is None and reference[key] is None):
      _check_value(key, value)


def check_names(names: Any, known: Any, where: str):
  """Raises ValueError for a name that is not known, with the nearest one."""
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1, cutoff=0)
      raise ValueError(
        f'{where}: there is no {name!r}; did you mean {near[0]!r}? There are '
        f'{", ".join(sorted(known))}.'
      )


def check_held_out(config: Config, why: str):
  """Raises ValueError where no training data are held out, saying why to."""
  if not config.val_share:
    raise ValueError(f'config.val_share=0: must be positive: {why}.')


def build(make: type[T], config: Config, section: str, **more: Any) -> T:
  """What a dataclass makes of a section of the configuration.

  Args:
    make: the dataclass.
    config: the whole configuration.
    section: the name of one of its sections.
    **more: attributes that are in no section.

  Raises:
    ValueError: an attribute is unknown or out of range; says where it is.
  """
  values = dict(config[section])
  where = f'config.{section}'
  known = [f.name for f in dataclasses.fields(make) if f.name not in more]
  check_names(values, known, where)
  try:
    return make(**values, **more)
  except ValueError as e:
    raise ValueError(f'{where}: {e}') from e
  except TypeError as e:
    raise ValueError(f'{where}={values}: of a wrong type ({e}).') from e


def flat(config: Config) -> dict[str, Any]:
  """Settings by name, those of sections as 'section.name'."""
  found = {}
  for key, value in config.items():
    if isinstance(value, Config):
      found |= {f'{key}.{k}': v for k, v in flat(value).items()}
    else:
      found[key] = value
  return found


def split_tuples(config: Config):
  """Makes ('a', 'b') of the ('a,b',) that --config.KEY=a,b is parsed to."""
  for key, value in config.items():
    if isinstance(value, tuple) and any(isinstance(x, str) for x in value):
      config[key] = tuple(
        x.strip() for text in value for x in str(text).split(',') if x.strip()
      )


def _attributes(name: str) -> dict[str, str]:
  """What the docstring of a class, given by its full name, says of them."""
  parsed = docstring_parser.parse(pkgutil.resolve_name(name).__doc__)
  return {
    x.arg_name: ' '.join(x.description.split()).removesuffix('.')
    for x in parsed.params
  }


def _check_value(key: str, value: Any):
  rule = SETTINGS[key][1]
  values = value if isinstance(value, tuple) else (value,)
  if not values:
    raise ValueError(f'config.{key}=(): give one value or more.')
  for x in values:
    try:
      right = _RULES[rule](x)
    except TypeError:
      right = False
    if not right:
      raise ValueError(f'config.{key}={x!r}: must be {rule}.')


def _shown(value: Any) -> str:
  if isinstance(value, tuple):
    return ','.join(map(str, value))
  return f'{value:.4g}' if isinstance(value, float) else str(value)
