"""Searches the settings of a binary: accurate, with few trainable parameters.

  python -m experiments.search --config.workers=2
  python -m experiments.search --data_dir=FOLDER_OF_TFDS \\
    --config=experiments/configs/search.py:cifar10_vit:small

Trains the binary's model by OIALR, trial by trial of an Optuna study, on a part
of its training data, and looks for a high accuracy on the rest and a low share
of trainable parameters. Then prints and plots what is best by both, writes it as
files of settings that the binary takes, and tests these and the default once.

Trial 0 is the default, and what a parameter is in units of:

  learning_rate, weight_decay, clip: times that of the default.
  warmup, warmup_epochs, every, delay: share of the run.
  end_rate: share of the learning rate.
  k_decay, cutoff, progressive: as the setting.

A parameter is left alone by equal bounds. --config.base.KEY=VALUE changes what
all trials have in common.

With --resume it joins the search that --workdir or --config.storage holds:
started again after a kill, or beside others, on one machine or on several with a
database. Every trial is done once, see `experiments.trials`. Of accelerators,
give every worker its own, as by CUDA_VISIBLE_DEVICES, and start it by hand. See
experiments/configs/search.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import copy
import dataclasses
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import shutil
import statistics
import threading
from types import ModuleType

import filelock
from matplotlib import figure as mpl
from matplotlib import ticker
import optuna

from experiments import classification
from experiments import cli
from experiments import runs
from experiments import settings
from experiments import tables
from experiments import trials as trials_lib
from experiments.configs import search as configs
from oialr_jax import data
from oialr_jax import training

Config = settings.Config
Params = Mapping[str, float]
Frozen = optuna.trial.FrozenTrial

# What a parameter of a trial is in units of, and whether it is drawn by its
# logarithm.
_PARAMETERS = {
  'learning_rate': ('base', True),  # before end_rate, its share
  'weight_decay': ('base', True),
  'clip': ('base', True),
  'warmup': ('run', False),
  'warmup_epochs': ('run', False),
  'end_rate': ('rate', True),
  'k_decay': ('one', True),
  'cutoff': ('one', True),
  'every': ('run', True),
  'delay': ('run', False),
  'progressive': ('one', False),
}
# Of the chosen: marker and size, so that one may lie upon another.
_MARKERS = (('*', 13), ('s', 11), ('o', 15))
# At a rung, no trial stops before so many were there.
_LEAST = 8
# Settings that may differ where a search goes on.
_FREE = ('trials', 'test_seeds', 'workers', 'storage', 'grace')


@dataclasses.dataclass(frozen=True)
class Problem:
  """What a binary learns, and from which data.

  Attributes:
    binary: its module.
    train: to learn from.
    test: to evaluate on.
  """

  binary: ModuleType
  train: data.Split
  test: data.Split

  def held_out(self, share: float, seed: int) -> 'Problem':
    """With a part of the training data to evaluate on, as many of each class."""
    return Problem(
      self.binary, *classification.held_out(self.train, share, seed)
    )

  def steps(self, config: Config) -> int:
    """Of a run."""
    return self.binary.plan(config, len(self.train))[0]

  def values(
    self,
    config: Config,
    options: cli.Options,
    seed: int,
    *,
    rungs: int = 0,
    stopping: training.Callback | None = None,
  ) -> tuple[float, float]:
    """Accuracy, and % that is trainable, after a run by OIALR.

    Args:
      config: of the binary.
      options: of the binary.
      seed: of parameters and batches.
      rungs: evaluations before that at the end.
      stopping: hears of them.

    Raises:
      TrialPruned: stopping does, or training diverges.
    """
    steps, rate = self.binary.plan(config, len(self.train))
    try:
      result = classification.run(
        self.binary.task(config, self.train, self.test),
        config,
        options,
        'oialr',
        seed,
        steps=steps,
        rate=rate,
        eval_every=max(1, steps // (rungs + 1)),
        callbacks=() if stopping is None else (stopping,),
      )
    except FloatingPointError as e:
      raise optuna.TrialPruned(str(e)) from e
    end = result.select('end')[-1]
    accuracy = result.select('eval')[-1]['accuracy']
    return accuracy, runs.trainable_percent(end)


def main(config: Config, options: cli.Options):
  study, _ = _opened(config, options)
  _check_same(study, config, options)
  spawn = multiprocessing.get_context('spawn')
  helpers = [
    spawn.Process(target=_help, args=(config, options), daemon=True)
    for _ in range(config.workers - 1)
  ]
  for helper in helpers:
    helper.start()
  if config.workers:
    work(config, options)
  for helper in helpers:
    helper.join()
  report(study, config, options)


def check(config: Config):
  """Raises ValueError if a trial cannot be as configured; loads nothing."""
  module, base = _module(config), config.base
  settings.split_tuples(base)
  try:
    settings.check(base, module.BINARY.config())
    module.BINARY.check(base)
  except ValueError as e:
    raise ValueError(f'config.base, of {config.binary}: {e}') from e
  settings.check_held_out(config, 'trials are compared by it')
  settings.check_names(config.space, _PARAMETERS, 'config.space')
  for name, bounds in config.space.items():
    if len(bounds) != 2 or bounds[0] > bounds[1]:
      raise ValueError(
        f'config.space.{name}={bounds}: must be the least and the largest value.'
      )
  steps = module.plan(base)[0]
  for name, value in _first(config).items():
    low, high = config.space[name]
    if not low <= value <= high:
      raise ValueError(
        f'config.space.{name}={low},{high}: is without {value:.4g}, the '
        'default; widen it.'
      )
  for i in (0, 1):
    corner = {name: bounds[i] for name, bounds in config.space.items()}
    try:
      module.BINARY.check(settings_of(corner, base, steps))
    except ValueError as e:
      raise ValueError(f'config.space, at its ends: {e}') from e


def work(config: Config, options: cli.Options):
  """Does trials until all are done: one of the workers."""
  optuna.logging.set_verbosity(
    optuna.logging.WARNING if options.quiet else optuna.logging.INFO
  )
  study, storage = _opened(config, options)
  problem = _problem(config, options).held_out(config.val_share, config.seed)

  def objective(trial: optuna.Trial) -> Sequence[float]:
    folder = options.workdir / 'trials' / f'{trial.number:04}'
    changed = settings_of(trial.params, config.base, problem.steps(config.base))
    found = []
    with _shedding(folder):
      for seed in config.seeds:
        rungs = None if found else Rungs(trial, config.prune)
        found.append(
          problem.values(
            changed,
            _within(options, folder),
            seed,
            rungs=config.rungs,
            stopping=rungs,
          )
        )
    return [statistics.fmean(values) for values in zip(*found)]

  trials_lib.Trials(
    study,
    storage,
    {k: _distribution(k, bounds) for k, bounds in config.space.items()},
    count=config.trials,
    grace=config.grace,
  ).run(objective)


class Rungs(training.Callback):
  """Stops a trial at an evaluation, if it is behind too many others."""

  def __init__(self, trial: optuna.Trial, share: float):
    """Of a trial; for `share`, see `trials.is_hopeless`."""
    self._trial, self._share = trial, share

  def on_start(self, start: training.Start):
    self._steps, self._trainable = start.steps, 100.0
    for record in start.records:
      if record['kind'] == 'event':
        self.on_event(record)

  def on_event(self, record: training.Record):
    self._trainable = runs.trainable_percent(record)

  def on_evaluation(self, record: training.Record):
    if record['step'] == self._steps:
      return
    rung = f'rung {record["step"]}'
    found = [-record['accuracy'], self._trainable]
    others = [
      t.user_attrs[rung]
      for t in self._trial.study.get_trials(deepcopy=False)
      if rung in t.user_attrs and t.number != self._trial.number
    ]
    self._trial.set_user_attr(rung, found)
    # The default is what others are compared with.
    if self._trial.number and trials_lib.is_hopeless(
      found, others, share=self._share, least=_LEAST
    ):
      raise optuna.TrialPruned(f'behind at step {record["step"]}')


def params_of(base: Config, names: Sequence[str], steps: int) -> Params:
  """The parameters of a trial that has these settings."""
  found = {}
  for name in names:
    unit = _unit(name, base, steps)
    found[name] = float(_section(base, name)[name] / unit if unit else 1.0)
  return found


def settings_of(params: Params, base: Config, steps: int) -> Config:
  """The settings of a trial."""
  config = copy.deepcopy(base)
  for name in [name for name in _PARAMETERS if name in params]:
    section = _section(config, name)
    unit = _unit(name, config, steps)
    # A delay may be a share, as the parameter is.
    if name == 'delay':
      section[name] = float(params[name])
    elif isinstance(section[name], int):
      section[name] = round(params[name] * unit)
    else:
      section[name] = params[name] * unit
  return config


def write_settings(file: pathlib.Path, config: Config, binary: str, about: str):
  """Writes a file of settings, as `--config=FILE` of the binary takes it.

  Args:
    file: to write.
    config: the settings.
    binary: its name, or that of one of its variants, as 'cifar10_vit:small'.
    about: the first line of the file's docstring.
  """
  name, _, variant = binary.partition(':')
  default = settings.flat(configs.of(binary))
  changes = [
    f'      {key!r}: {value!r},\n'
    for key, value in settings.flat(config).items()
    if value != default[key]
  ]
  file.write_text(
    f'"""{about}\n\n'
    f'Command: python -m experiments.{name} --config={file}\n"""\n\n'
    f'from experiments.configs import {name}\n\n\n'
    'def get_config():\n'
    f'  config = {name}.get_config({repr(variant) if variant else ""})\n'
    '  config.update_from_flattened_dict(\n    {\n'
    f'{"".join(changes)}    }}\n  )\n  return config\n'
  )


def choose(done: Sequence[Frozen]) -> dict[str, Frozen]:
  """The default, and what is better by both values, as far as there is.

  'best' is the most accurate with no more trainable parameters than the
  default, 'small' has the fewest with no less accuracy.
  """
  default = next((t for t in done if t.number == 0), None)
  if default is None:
    return {}
  accuracy, trainable = default.values
  best = max(
    (t for t in done if t.values[1] <= trainable),
    key=lambda t: (t.values[0], -t.values[1]),
  )
  small = min(
    (t for t in done if t.values[0] >= accuracy),
    key=lambda t: (t.values[1], -t.values[0]),
  )
  return {'default': default, 'best': best, 'small': small}


def report(study: optuna.Study, config: Config, options: cli.Options):
  """Prints and plots what there is; tests what is chosen once all is done."""
  trials = study.get_trials()[: config.trials]
  states = [t.state for t in trials]
  counts = ', '.join(
    f'{states.count(s)} {s.name.lower()}' for s in sorted({*states})
  )
  print(f'Of {config.trials} trials: {counts or "none"}.')
  done = [t for t in trials if t.state == optuna.trial.TrialState.COMPLETE]
  chosen = choose(done)
  if not chosen:
    return
  problem = _problem(config, options)
  changed = lambda trial: settings_of(
    trial.params, config.base, problem.steps(config.base)
  )
  front = [t for t in study.best_trials if t.number < config.trials]
  print(_front_table(front, chosen, changed, [*config.space]))
  draw(done, front, chosen).savefig(options.workdir / 'front.png', dpi=150)
  for name, trial in chosen.items():
    file = options.workdir / f'{name}.py'
    write_settings(file, changed(trial), config.binary, f'{_said(trial)}.')
    print(f'{file}: {_said(trial)}')
  rows = {}
  if all(state in trials_lib.DONE for state in states) and trials:
    # Of searches that share a folder, the others find what the first one ran.
    with filelock.FileLock(options.workdir / 'tests.lock'):
      for name, trial in chosen.items():
        folder = options.workdir / 'tests' / f'{trial.number:04}'
        rows[name] = [
          problem.values(changed(trial), _within(options, folder), seed)
          for seed in config.test_seeds
        ]
    print(_test_table(chosen, rows))
  _save(options.workdir, trials, chosen, rows)


def draw(
  done: Sequence[Frozen],
  front: Sequence[Frozen],
  chosen: Mapping[str, Frozen],
) -> mpl.Figure:
  """Accuracy against trainable parameters: all trials, the front, the chosen.

  Args:
    done: trials with values.
    front: those that no other is better than by both.
    chosen: some of them by name.
  """
  figure = mpl.Figure(figsize=(7, 4.5), layout='constrained')
  axes = figure.add_subplot()
  front = sorted(front, key=lambda t: t.values[1])
  shown = [100 * t.values[0] for t in (*front, *chosen.values())]
  # A trial that has failed shall not press all others together.
  least = min(shown) - max(0.2 * (max(shown) - min(shown)), 0.5)
  points = lambda trials: (
    [t.values[1] for t in trials],
    [max(least, 100 * t.values[0]) for t in trials],
  )
  below = [t for t in done if 100 * t.values[0] < least]
  above = [t for t in done if t not in below]
  axes.plot(*points(above), 'o', color='#b0b0b0', label='trials')
  if below:
    axes.plot(
      *points(below), 'v', color='#b0b0b0', label=f'below {least:.4g} %'
    )
  axes.plot(
    *points(front),
    'o-',
    drawstyle='steps-post',
    color='#1f77b4',
    label='Pareto front',
  )
  for (name, trial), (marker, size) in zip(chosen.items(), _MARKERS):
    axes.plot(
      *points([trial]),
      marker,
      markersize=size,
      markerfacecolor='none' if name != 'default' else '#d62728',
      markeredgecolor='#d62728',
      markeredgewidth=1.5,
      label=f'{name}: trial {trial.number}',
    )
  if max(t.values[1] for t in done) > 5 * min(t.values[1] for t in done):
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
  axes.xaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  axes.set_xlabel('trainable parameters at the end, % of the dense model')
  axes.set_ylabel('validation accuracy, %')
  axes.grid(alpha=0.3)
  figure.legend(loc='outside lower center', ncols=3)
  return figure


def _module(config: Config) -> ModuleType:
  name = config.binary.partition(':')[0]
  return importlib.import_module(f'experiments.{name}')


def _problem(config: Config, options: cli.Options) -> Problem:
  module = _module(config)
  return Problem(module, *module.splits(config.base, options.data_dir))


def _first(config: Config) -> Params:
  return params_of(
    config.base, config.space, _module(config).plan(config.base)[0]
  )


def _opened(
  config: Config, options: cli.Options
) -> tuple[optuna.Study, optuna.storages.BaseStorage]:
  options.workdir.mkdir(parents=True, exist_ok=True)
  url = config.storage or f'sqlite:///{options.workdir.resolve()}/search.db'
  storage = trials_lib.storage(url)
  study = optuna.create_study(
    storage=storage,
    study_name=options.workdir.name,
    sampler=trials_lib.Sampler(config.seed, _first(config)),
    directions=['maximize', 'minimize'],
    load_if_exists=True,
  )
  return study, storage


def _check_same(study: optuna.Study, config: Config, options: cli.Options):
  if study.trials and not options.resume:
    raise ValueError(
      f'{study.study_name!r}: is there, with {len(study.trials)} trials; pass '
      '--resume to go on with it, or another --workdir.'
    )
  mine = json.loads(config.to_json_best_effort())
  theirs = study.user_attrs.get('settings', mine)
  for key, value in mine.items():
    if key not in _FREE and value != theirs[key]:
      raise ValueError(
        f'{study.study_name!r}: {key} is {theirs[key]} there and {value} here; '
        'pass the same settings, or another --workdir.'
      )
  study.set_user_attr('settings', mine)


def _help(config: Config, options: cli.Options):
  """Works, but not longer than the process that has started this one."""
  parent = multiprocessing.parent_process()

  def follow():
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
  work(config, options)


def _within(options: cli.Options, folder: pathlib.Path) -> cli.Options:
  return dataclasses.replace(options, workdir=folder, resume=True, quiet=True)


@contextlib.contextmanager
def _shedding(folder: pathlib.Path) -> Iterator[None]:
  """Removes the checkpoints of a trial that ends; an interrupted one goes on."""
  try:
    yield
  except optuna.TrialPruned:
    _remove_checkpoints(folder)
    raise
  _remove_checkpoints(folder)


def _remove_checkpoints(folder: pathlib.Path):
  for checkpoints in folder.glob('*/checkpoints'):
    shutil.rmtree(checkpoints)


def _section(config: Config, name: str) -> Config:
  return config.oialr if name in config.oialr else config


def _unit(name: str, config: Config, steps: int) -> float:
  """What a parameter of 1 is as a setting."""
  value = _section(config, name)[name]
  match _PARAMETERS[name][0]:
    case 'base':
      return value
    case 'rate':
      return config.learning_rate
    case 'run' if name == 'warmup_epochs':
      return config.epochs
    case 'run' if not isinstance(value, float):
      return steps
    case _:
      return 1.0


def _distribution(
  name: str, bounds: Sequence[float]
) -> optuna.distributions.FloatDistribution:
  return optuna.distributions.FloatDistribution(
    *map(float, bounds), log=_PARAMETERS[name][1]
  )


def _said(trial: Frozen) -> str:
  accuracy, trainable = trial.values
  return (
    f'trial {trial.number}, validation accuracy {100 * accuracy:.2f} %, '
    f'{trainable:.3g} % trainable'
  )


def _front_table(
  front: Sequence[Frozen],
  chosen: Mapping[str, Frozen],
  changed: Callable[[Frozen], Config],
  names: Sequence[str],
) -> str:
  lines = [['trial', 'validation %', 'trainable %', *names]]
  shown = {t.number: t for t in (*front, *chosen.values())}.values()
  for trial in sorted(shown, key=lambda t: t.values[1]):
    roles = [name for name, t in chosen.items() if t.number == trial.number]
    config = changed(trial)
    lines.append(
      [
        ' '.join([str(trial.number), *roles]),
        f'{100 * trial.values[0]:.2f}',
        f'{trial.values[1]:.3g}',
        *(f'{_section(config, name)[name]:.3g}' for name in names),
      ]
    )
  return tables.aligned(lines)


def _test_table(
  chosen: Mapping[str, Frozen], rows: Mapping[str, Sequence[Sequence[float]]]
) -> str:
  lines = [['', 'validation %', 'test %', 'trainable %', 'seeds']]
  for name, found in rows.items():
    accuracy, trainable = zip(*found)
    lines.append(
      [
        f'{name} (trial {chosen[name].number})',
        f'{100 * chosen[name].values[0]:.2f}',
        tables.spread([100 * x for x in accuracy], 2),
        tables.spread(trainable, 2),
        str(len(found)),
      ]
    )
  return tables.aligned(lines)


def _save(
  workdir: pathlib.Path,
  trials: Sequence[Frozen],
  chosen: Mapping[str, Frozen],
  tested: Mapping[str, Sequence[Sequence[float]]],
):
  found = {
    'trials': [
      {
        'number': t.number,
        'state': t.state.name,
        'values': t.values,
        'params': t.params,
        'stopped': t.user_attrs.get('stopped'),
      }
      for t in trials
    ],
    'chosen': {name: t.number for name, t in chosen.items()},
    'tested': tested,
    **runs.machine(),
  }
  (workdir / 'result.json').write_text(json.dumps(found, indent=2))


BINARY = cli.Binary(
  name='search',
  main=main,
  check=check,
  data='Folder of prepared TFDS sets, see the binary.',
)

if __name__ == '__main__':
  cli.run(BINARY)
