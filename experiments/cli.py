"""What the binaries share: flags, the configuration, and how they start."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import importlib
import pathlib
import re
import sys
import time
from typing import Any

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from experiments import settings
from oialr_jax import sharding

# Flags belong to the binary that calls `run`: its --help lists them.
flags.disclaim_key_flags()

Config = settings.Config
_CONFIGS = pathlib.Path(__file__).parent / 'configs'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Of a run, but of no consequence for its result.

  Attributes:
    workdir: folder for all that is written.
    data_dir: folder of the data; None for the default.
    quiet: print the result only.
    resume: go on with what workdir holds.
    checkpoint_every: steps between checkpoints; None for those at ends alone.
    max_seconds: after which to save and stop, from `started` on.
    probe: say how much every event changes the loss of the next batch.
    started: on the clock of `time.monotonic`.
  """

  workdir: pathlib.Path
  data_dir: str | None = None
  quiet: bool = False
  resume: bool = False
  checkpoint_every: int | None = None
  max_seconds: float | None = None
  probe: bool = False
  started: float = dataclasses.field(default_factory=time.monotonic)

  def fit(self) -> dict[str, Any]:
    """What `training.fit` is to know of it, with the seconds that are left."""
    left = None
    if self.max_seconds is not None:
      left = max(0.0, self.started + self.max_seconds - time.monotonic())
    return dict(
      resume=self.resume,
      checkpoint_every=self.checkpoint_every,
      max_seconds=left,
      probe=self.probe,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binary:
  """A binary, as its module describes it.

  Attributes:
    name: of its module, and of its file of settings in `configs`.
    main: runs it.
    check: raises ValueError if the settings make no sense; loads nothing.
    data: what --data_dir is; '' where there is no data to be found.
    checkpoint_every: the default of that flag.
    explain: what --explain prints of the settings, loading nothing; None for no
      such flag.
  """

  name: str
  main: Callable[[Config, Options], None]
  check: Callable[[Config], None]
  data: str = ''
  checkpoint_every: int | None = None
  explain: Callable[[Config], str] | None = None

  def config(self) -> Config:
    """The settings by default."""
    module = importlib.import_module(f'experiments.configs.{self.name}')
    return module.get_config()


def run(binary: Binary):
  """Starts a binary, with the flags of the command line."""
  parsed = []

  def parser(argv: list[str]) -> list[str]:
    with _exiting():
      _read(flags.FLAGS, argv)
      _join(flags.FLAGS)  # before the checks, which use JAX
      parsed.extend(_checked(binary, flags.FLAGS))
    return argv[:1]

  with _exiting():
    _define(binary, flags.FLAGS, sys.argv)
  app.run(lambda _: _main(binary, *parsed), flags_parser=parser)


def parse(binary: Binary, argv: Sequence[str]) -> tuple[Config, Options]:
  """The settings and options that flags say, checked; absl's own are not known.

  Args:
    binary: whose flags they are.
    argv: flags only.

  Raises:
    flags.Error: a flag is unknown, or its value is not of its type.
    ValueError: a setting is unknown or out of range.
  """
  values = flags.FlagValues()
  argv = [binary.name, *argv]
  _define(binary, values, argv)
  _read(values, argv)
  return _checked(binary, values)


def _read(values: flags.FlagValues, argv: Sequence[str]):
  with _naming_settings():
    rest = values(argv)[1:]
  if rest:
    raise flags.Error(f'unexpected arguments: {" ".join(rest)}')


def _join(values: flags.FlagValues):
  """Of several processes, joins the others."""
  sharding.initialize(values.coordinator, values.processes, values.process)


def _checked(
  binary: Binary, values: flags.FlagValues
) -> tuple[Config, Options]:
  config = values.config
  settings.split_tuples(config)
  settings.check(config, binary.config())
  binary.check(config)
  return config, Options(
    workdir=pathlib.Path(values.workdir),
    data_dir=values.data_dir if binary.data else None,
    quiet=values.quiet,
    resume=values.resume,
    checkpoint_every=values.checkpoint_every,
    max_seconds=values.max_seconds,
    probe=values.probe,
  )


@contextlib.contextmanager
def _exiting() -> Iterator[None]:
  """As in absl, what is wrong with flags is told in a line, and no traceback."""
  try:
    yield
  except (flags.Error, ValueError, OSError) as e:
    print(
      f'FATAL Flags parsing error: {e}\n'
      'Pass --help to see the flags and settings.',
      file=sys.stderr,
    )
    sys.exit(1)


@contextlib.contextmanager
def _naming_settings() -> Iterator[None]:
  """An unknown --config.KEY is an AttributeError in ml_collections."""
  try:
    yield
  except AttributeError as e:
    near = re.search(r'Did you mean.*\?', str(e))
    raise ValueError(
      f'the configuration has no setting {str(e).strip(chr(34))}.'
      if near is None
      else f'the configuration has no such setting. {near[0]}'
    ) from e


def _main(binary: Binary, config: Config, options: Options):
  # Warnings only, unless --verbosity says otherwise: Orbax logs every file.
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)
  if binary.explain is not None and flags.FLAGS.explain:
    print(binary.explain(config))
    return
  binary.main(config, options)


def _define(binary: Binary, values: flags.FlagValues, argv: Sequence[str]):
  define = lambda kind, *args, **more: kind(*args, **more, flag_values=values)
  with _naming_settings():  # the default is parsed here
    config_flags.DEFINE_config_file(
      'config',
      str(_CONFIGS / f'{binary.name}.py'),
      'Settings, as a file FILE.py or FILE.py:VARIANT with get_config(); any '
      'of them by --config.KEY=VALUE. By default:\n'
      + settings.describe(binary.config()),
      flag_values=values,
      sys_argv=list(argv),
    )
  define(
    flags.DEFINE_string,
    'workdir',
    f'runs/{binary.name}',
    'Folder for all that is written. What it holds is overwritten, unless '
    '--resume is given.',
  )
  if binary.data:
    define(flags.DEFINE_string, 'data_dir', None, binary.data)
  define(flags.DEFINE_bool, 'quiet', False, 'Print the result only.')
  define(
    flags.DEFINE_bool,
    'resume',
    False,
    'Go on with the runs that --workdir holds: what is finished is not done '
    'again, the rest goes on from the last checkpoint.',
  )
  define(
    flags.DEFINE_integer,
    'checkpoint_every',
    binary.checkpoint_every,
    'Optimiser steps between checkpoints. There is one at the end of every run, '
    'and when it is told to stop (SIGTERM, --max_seconds).',
    lower_bound=1,
  )
  define(
    flags.DEFINE_float,
    'max_seconds',
    None,
    'Seconds after which to save and stop, of all runs together; by default no '
    'limit.',
    lower_bound=0.0,
  )
  define(
    flags.DEFINE_bool,
    'probe',
    False,
    'Say of every event how much it changes the loss of the next batch, for '
    'which the loss is compiled anew whenever shapes have changed.',
  )
  define(
    flags.DEFINE_string,
    'coordinator',
    None,
    'HOST:PORT of process 0, where several processes train together. It and '
    'the next two are not wanted on Cloud TPU, under Slurm or Open MPI, on GKE.',
  )
  define(
    flags.DEFINE_integer,
    'processes',
    None,
    'How many processes there are.',
    lower_bound=1,
  )
  define(
    flags.DEFINE_integer,
    'process',
    None,
    'Which of them this one is, from 0 on.',
    lower_bound=0,
  )
  if binary.explain is not None:
    define(
      flags.DEFINE_bool,
      'explain',
      False,
      'Print what the method would do to the model (layers, parameters, '
      'multiply-adds, memory), and stop: nothing is loaded or trained.',
    )
