"""Searching settings: trials that survive kills, what is stopped and chosen."""

import contextlib
import json
import pathlib
import signal
import subprocess
import sys
import time

import filelock
import numpy as np
import optuna
from optuna.trial import TrialState
import pytest

from experiments import cifar10_vit
from experiments import cli
from experiments import digits
from experiments import search
from experiments import trials
from tests import search_worker

ROOT = pathlib.Path(__file__).parent.parent
# How ml_collections loads a file of settings.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')


def parse(*argv, binary=search.BINARY):
  return cli.parse(binary, argv)


def study(url):
  return optuna.load_study(study_name='study', storage=trials.storage(url))


def states(url):
  return [t.state for t in study(url).trials]


@contextlib.contextmanager
def two_workers(*args):
  """Two processes of tests.search_worker, killed at the end of the block."""
  command = [sys.executable, '-m', 'tests.search_worker', *map(str, args)]
  workers = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
  try:
    yield workers
  finally:
    for worker in workers:
      worker.kill()
      worker.wait()


@pytest.fixture
def url(tmp_path):
  return f'journal:{tmp_path}/journal'


def test_no_trial_is_lost_or_doubled_by_kills(tmp_path):
  url, log = f'sqlite:///{tmp_path / "trials"}', tmp_path / 'log'
  search_worker.worker(url)  # both begin with the same empty study
  with two_workers(url, log, '2') as workers:
    deadline = time.monotonic() + 60
    while states(url)[2:] != 2 * [TrialState.RUNNING]:
      assert time.monotonic() < deadline
  assert [w.returncode for w in workers] == 2 * [-signal.SIGKILL]
  killed = [t for t in study(url).trials if t.state == TrialState.RUNNING]
  with two_workers(url, log) as workers:
    assert [w.wait(60) for w in workers] == [0, 0]
  done = study(url).trials[: search_worker.COUNT]
  assert [t.number for t in done] == [*range(search_worker.COUNT)]
  assert all(t.state == TrialState.COMPLETE for t in done)
  assert all(t.values == [t.params['x'], 1 - t.params['x']] for t in done)
  # Those that were killed were begun twice, as what they were; no other was.
  lines = log.read_text().splitlines()
  twice = {line for line in lines if lines.count(line) == 2}
  assert {int(line.split()[0]) for line in twice} <= {t.number for t in killed}
  assert len({*lines}) == len({line.split()[0] for line in lines})
  assert len({*lines}) == search_worker.COUNT


def test_an_error_leaves_the_trial_to_others(url):
  def fails(trial):
    raise OSError('no space left on device')

  with pytest.raises(OSError, match='no space'):
    search_worker.worker(url, count=2).run(fails)
  assert states(url) == [TrialState.WAITING]
  search_worker.worker(url, count=2).run(lambda trial: (0.0, trial.number))
  assert [t.values for t in study(url).trials] == [[0, 0], [0, 1]]


def test_a_result_that_comes_between_looking_and_telling_counts(
  url, monkeypatch
):
  worker = search_worker.worker(url, count=1)
  storage = worker._study._storage
  note = storage.set_trial_state_values

  def second(trial_id, state, values=None):
    if state == TrialState.COMPLETE:
      note(trial_id, state, [7.0, 7.0])  # another worker's
    return note(trial_id, state, values)

  monkeypatch.setattr(storage, 'set_trial_state_values', second)
  worker.run(lambda trial: (0.0, 0.0))
  assert [t.values for t in study(url).trials] == [[7, 7]]


def _note(trial):
  trial.set_user_attr('rung 5', [-1.0, 1.0])


def _stop(trial):
  raise optuna.TrialPruned('behind at step 5')


@pytest.mark.parametrize('ending', [lambda trial: None, _note, _stop])
def test_the_first_result_counts_of_a_trial_that_two_finish(url, ending):
  late = search_worker.worker(url, count=2)

  def slow(trial):
    if trial.number:
      return 3.0, 3.0
    late._put_back(trial.number)  # as by one who has seen no sign of life
    search_worker.worker(url, count=1).run(lambda trial: (1.0, 1.0))
    ending(trial)
    return 2.0, 2.0

  late.run(slow)
  assert [t.values for t in study(url).trials] == [[1, 1], [3, 3]]


def test_trials_beyond_the_count_wait_until_there_are_more(url):
  first = search_worker.worker(url, count=1)
  extra = (
    first._study.ask(search_worker.SPACE),
    first._study.ask(search_worker.SPACE),
  )
  for trial in extra:
    first._put_back(trial.number)
  ran = []

  def objective(trial):
    ran.append((trial.number, trial.params['x']))
    return 0.0, 0.0

  first.run(objective)
  assert [number for number, _ in ran] == [0]
  assert states(url) == [TrialState.COMPLETE, TrialState.WAITING]
  search_worker.worker(url, count=2).run(objective)
  assert ran[1] == (1, extra[1].params['x'])


def test_parameters_depend_on_the_number_not_on_the_worker(url, tmp_path):
  search_worker.worker(url, count=3).run(lambda trial: (0.0, 0.0))
  once = [t.params['x'] for t in study(url).trials]
  other = f'journal:{tmp_path}/other'
  for count in (1, 2, 3):  # a new worker, and sampler, for every trial
    search_worker.worker(other, count=count).run(lambda trial: (0.0, 0.0))
  assert [t.params['x'] for t in study(other).trials] == once
  assert once[0] == 0.5 and len({*once}) == 3


def test_one_objective_is_pruned_as_by_the_median():
  rng = np.random.default_rng(0)
  pruner = optuna.pruners.MedianPruner(n_startup_trials=3)
  verdicts = set()
  for others, value in zip(rng.uniform(size=(20, 5)), rng.uniform(size=20)):
    one = optuna.create_study(pruner=pruner)
    for x in others:
      trial = one.ask()
      trial.report(x, 1)
      one.tell(trial, x)
    trial = one.ask()
    trial.report(value, 1)
    found = trials.is_hopeless(
      [value, 100.0], [[x, 100.0] for x in others], share=0.5, least=3
    )
    assert found == trial.should_prune()
    verdicts.add(found)
  assert verdicts == {True, False}


def test_who_is_small_in_one_objective_is_not_pruned():
  behind = [[0.1 * i, 50.0] for i in range(10)]
  hopeless = lambda found, **changes: trials.is_hopeless(
    found, behind, **(dict(share=0.5, least=8) | changes)
  )
  assert hopeless([2.0, 50.0])
  assert not hopeless([2.0, 49.0])
  assert not hopeless([2.0, 50.0], least=11)  # too few to compare with
  assert not hopeless([2.0, 50.0], share=1.0)
  assert not hopeless([0.45, 50.0]) and hopeless([0.55, 50.0])


@pytest.mark.parametrize(
  'variant, binary',
  [('digits', digits.BINARY), ('cifar10_vit:small', cifar10_vit.BINARY)],
)
def test_settings_that_are_found_are_those_that_the_binary_takes(
  tmp_path, variant, binary
):
  config, _ = parse(
    f'--config=experiments/configs/search.py:{variant}',
    '--config.base.batch_size=64',
  )
  rng = np.random.default_rng(0)
  params = {k: rng.uniform(*bounds) for k, bounds in config.space.items()}
  found = search.settings_of(params, config.base, steps=1000)
  assert found.oialr.every == round(1000 * params['every'])
  assert found.learning_rate == params['learning_rate'] * (
    config.base.learning_rate
  )
  file = tmp_path / 'best.py'
  search.write_settings(file, found, variant, 'Found.')
  taken, _ = parse(
    f'--config={file}', '--config.oialr.cutoff=0.02', binary=binary
  )
  assert taken.batch_size == 64
  with found.unlocked():
    found.oialr.cutoff = 0.02
  assert taken.to_dict() == found.to_dict()


@pytest.mark.parametrize(
  'variant', ['digits', 'mnist_cnn', 'cifar10_vit', 'cifar10_vit:small']
)
def test_the_default_is_a_point_of_the_space(variant):
  config, _ = parse(f'--config=experiments/configs/search.py:{variant}')
  params = search.params_of(config.base, config.space, steps=14_400)
  again = search.settings_of(params, config.base, steps=14_400)
  for name in config.space:
    section = 'oialr' if name in config.base.oialr else None
    value = lambda c, s=section, n=name: (c[s] if s else c)[n]
    expected = value(config.base)
    if name == 'delay' and isinstance(expected, int):
      expected /= 14_400
    assert value(again) == pytest.approx(expected)


@pytest.mark.parametrize(
  'flag, message',
  [
    (
      '--config.space.cutoff=0.5,0.9',
      'config.space.cutoff=0.5,0.9: is without',
    ),
    ('--config.space.cutoff=0.2', 'must be the least and the largest'),
    ('--config.space.delay=0.1,1.0', 'config.space, at its ends.*delay=1.0'),
    ('--config.base.steps=0', 'config.base, of digits: config.steps=0'),
    ('--config.base.oialr.cutoff=2', 'config.base, of digits: config.oialr'),
    ('--config.val_share=0', 'config.val_share=0: must be positive'),
    ('--config.prune=0', r'config.prune=0.0: must be in \(0, 1\]'),
  ],
)
def test_what_is_wrong_is_said(flag, message):
  with pytest.raises(ValueError, match=message):
    parse(flag)


def _numbered(number, accuracy, trainable):
  trial = optuna.trial.create_trial(values=[accuracy, trainable])
  trial.number = number
  return trial


def test_what_is_chosen_is_better_than_the_default_by_both():
  done = [
    _numbered(0, 0.9, 10.0),
    _numbered(1, 0.99, 11.0),  # more to train
    _numbered(2, 0.95, 9.0),
    _numbered(3, 0.95, 8.0),
    _numbered(4, 0.9, 5.0),
    _numbered(5, 0.89, 1.0),  # less accurate
  ]
  chosen = {k: t.number for k, t in search.choose(done).items()}
  assert chosen == {'default': 0, 'best': 3, 'small': 4}
  chosen = {k: t.number for k, t in search.choose(done[:2]).items()}
  assert chosen == {'default': 0, 'best': 0, 'small': 0}
  assert search.choose(done[1:]) == {}


def test_digits_are_searched_and_the_search_goes_on(
  tmp_path, capsys, monkeypatch
):
  values, tested = search.Problem.values, []

  def alone(problem, config, options, seed, **kwargs):
    if options.workdir.parent.name == 'tests':
      # Another search that shares the folder would have to wait.
      lock = filelock.FileLock(tmp_path / 'tests.lock', timeout=0)
      with pytest.raises(filelock.Timeout):
        lock.acquire()
      tested.append(options.workdir.name)
    return values(problem, config, options, seed, **kwargs)

  monkeypatch.setattr(search.Problem, 'values', alone)
  flags = [
    f'--workdir={tmp_path}',
    '--quiet',
    '--config.base.width=16',
    '--config.base.steps=20',
    '--config.base.warmup=2',
    '--config.base.oialr.every=4',
    '--config.rungs=1',
    '--config.test_seeds=0',
    # What compiles takes the time: one program for all.
    *(
      f'--config.space.{name}={x},{x}'
      for name, x in (
        ('every', 0.2),
        ('delay', 1 / 3),
        ('progressive', 0.5),
        ('cutoff', 0.4),
      )
    ),
  ]
  search.main(*parse(*flags, '--config.trials=1'))
  assert tested == ['0000'] * 3
  with pytest.raises(ValueError, match='pass --resume to go on with it'):
    search.main(*parse(*flags, '--config.trials=2'))
  with pytest.raises(ValueError, match='val_share is 0.25 there and 0.5 here'):
    search.main(*parse(*flags, '--resume', '--config.val_share=0.5'))
  search.main(*parse(*flags, '--resume', '--config.trials=2'))
  assert 'Of 2 trials: 2 complete' in capsys.readouterr().out
  result = json.loads((tmp_path / 'result.json').read_text())
  assert [t['number'] for t in result['trials']] == [0, 1]
  assert (
    {*result['chosen']}
    == {*result['tested']}
    == {
      'default',
      'best',
      'small',
    }
  )
  config, _ = parse(f'--config={tmp_path}/default.py', binary=digits.BINARY)
  assert config.width == 16 and config.oialr.every == 4
  assert (tmp_path / 'front.png').stat().st_size > 10_000
  assert not [*tmp_path.glob('trials/*/*/checkpoints')]
