"""Runs that are interrupted at any moment end as if they had not been."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oialr_jax as oialr
from oialr_jax import checkpoint
from oialr_jax import data
from oialr_jax import training
from tests import training_test

STEPS = training_test.STEPS
# Events are at 9, 16 and 23; what is decided at 16 is sliced at 23.
POLICY = training.Compaction(
  min_saving=0, multiple_of=1, payback=0, reproducible=True
)


class Stop(training.Callback):
  """Fails after a step, as a machine does."""

  def __init__(self, step):
    self.step = step

  def on_step(self, step):
    if step == self.step:
      raise KeyboardInterrupt


class Steps(training.Callback):
  """Those that were done."""

  def __init__(self):
    self.done = []

  def on_step(self, step):
    self.done.append(step)


def batches():
  """Of 14 a epoch: the test stops in the middle of one."""
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(70, 12)).astype(np.float32)
  labels = np.argmax(inputs[:, :3], axis=1)

  def start_at(step):
    while True:
      epoch, i = divmod(step, 14)
      order = np.random.default_rng([1, epoch]).permutation(70)
      index = order[5 * i : 5 * i + 5]
      yield {'x': inputs[index], 'y': labels[index]}
      step += 1

  return data.Batches(start_at)


def fit(workdir=None, **options):
  defaults = dict(
    net=training_test.Net(norm=True),
    compaction=POLICY,
    data=batches(),
    optimizer=optax.adamw(1e-2),
    workdir=workdir,
    eval_every=10,
    track_every=10,
  )
  return training_test.fit(**(defaults | options))


def interrupt(folder, stop, run=fit, **options):
  """Leaves a run there that failed after a step."""
  with pytest.raises(KeyboardInterrupt):
    run(folder, callbacks=[Stop(stop)], **options)


@pytest.fixture(scope='module')
def whole():
  return fit()


def assert_same(result, other):
  jax.tree.map(np.testing.assert_array_equal, result.state, other.state)
  assert oialr.ranks(result.params) == oialr.ranks(other.params)
  losses = lambda run: np.concatenate(
    [r['losses'] for r in run.select('train')]
  )
  np.testing.assert_array_equal(losses(result), losses(other))
  assert result.select('stability') == other.select('stability')
  kinds = lambda run: [
    (r['kind'], r['step']) for r in run.records if r['kind'] != 'train'
  ]
  assert kinds(result) == kinds(other)


# At and after the transition, an update, and a switch.
@pytest.mark.parametrize('stop', [9, 10, 16, 17, 23, 24])
def test_a_resumed_run_is_the_same_run(whole, tmp_path, stop):
  interrupt(tmp_path, stop, checkpoint_every=stop - 1)
  done = Steps()
  result = fit(tmp_path, resume=True, callbacks=[done])
  assert done.done[0] == stop
  assert_same(result, whole)
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(x)['kind'] for x in lines] == [
    r['kind'] for r in result.records
  ]


def cut(params, layers):
  return oialr.to_factors(oialr.to_lowrank(params, layers, rank=3))


# Each by what it says to `fit`; the first is that of `fit` here.
METHODS = [
  {},
  {'schedule': oialr.Schedule(steps=STEPS, delay=12, every=5, policy='reset')},
  {'schedule': None, 'conversion': training.Conversion(step=9, convert=cut)},
  {'schedule': None},
]


@functools.cache
def uninterrupted(method):
  return fit(track_every=None, **METHODS[method])


# At 9 there is an event next.
@pytest.mark.parametrize('stop, first', [(4, METHODS[1]), (9, METHODS[3])])
def test_methods_share_a_dense_phase(tmp_path, stop, first):
  options = dict(track_every=None, checkpoint_every=stop)
  interrupt(tmp_path / 'first', stop + 1, **options, **first)
  for i, method in enumerate(METHODS):
    done = Steps()
    workdir = shutil.copytree(tmp_path / 'first', tmp_path / str(i))
    shared = fit(workdir, resume=True, callbacks=[done], **(options | method))
    assert done.done[0] == stop + 1
    assert_same(shared, uninterrupted(i))


def test_what_is_no_dense_phase_is_not_shared(tmp_path):
  options = dict(track_every=None)
  dense = fit(tmp_path / 'dense', schedule=None, stop_at=10, **options)
  assert int(dense.state.step) == 10
  for method in METHODS[0], METHODS[2]:  # their first steps after it are done
    with pytest.raises(ValueError, match='another run; different in its'):
      fit(tmp_path / 'dense', resume=True, **(options | method))
  measured = oialr.Schedule(steps=STEPS, delay=4, every=9, stability=0.9999)
  begun = {
    'low rank': ({}, METHODS[1:]),
    'converted': (METHODS[2], METHODS[1::2]),
    'measured': ({'schedule': measured}, METHODS[1::2]),
  }
  for name, (first, others) in begun.items():
    fit(tmp_path / name, stop_at=10, **(options | first))
    for method in others:
      with pytest.raises(ValueError, match='another run; different in its'):
        fit(tmp_path / name, resume=True, **(options | method))
  # What is tracked is compared with what was measured of the layers.
  fit(tmp_path / 'tracked', stop_at=5, track_every=2)
  with pytest.raises(ValueError, match='in its schedule'):
    fit(tmp_path / 'tracked', resume=True, track_every=2, **METHODS[1])


def moved(old, new, layers):
  """By what is to be measured besides."""
  dense = lambda p: oialr.tree.flatten(jax.device_get(oialr.to_dense(p)))
  old, new = dense(old), dense(new)
  distance = lambda path: np.linalg.norm(old[path] - new[path])
  return {'moved': {x.path: distance(x.path) for x in layers}}


def test_what_else_is_measured_goes_on(tmp_path):
  """Against parameters of before the transition, or before a compaction."""
  options = dict(
    track_every=8,
    track_more=moved,
    compaction=training.Compaction(
      min_saving=0, multiple_of=1, background=False, reproducible=True
    ),
  )
  interrupt(tmp_path, 14, checkpoint_every=12, **options)
  interrupt(tmp_path, 28, checkpoint_every=9, resume=True, **options)
  result = fit(tmp_path, resume=True, **options)
  assert_same(result, fit(**options))
  assert all(len(r['moved']) == 2 for r in result.select('stability'))


def test_a_switch_is_taken_where_nothing_compiles_in_the_background(tmp_path):
  interrupt(tmp_path, 19, checkpoint_every=18)
  policy = dataclasses.replace(POLICY, background=False, reproducible=False)
  result = fit(tmp_path, resume=True, compaction=policy)
  slicings = [
    (r['step'], r.get('decided')) for r in result.select('compaction')
  ]
  assert slicings == [(18, 16)]


@pytest.mark.parametrize('track_every', [10, None])
def test_checkpoints_hold_a_measurement_where_there_is_one(
  tmp_path, track_every
):
  fit(tmp_path, schedule=None, stop_at=12, track_every=track_every)
  text = (tmp_path / 'checkpoints/12/arrays/_METADATA').read_text()
  assert ('tracked' in text) == (track_every is not None)


def test_data_that_cannot_be_set_are_read_again(whole, tmp_path):
  interrupt(tmp_path, 18, checkpoint_every=5)
  anew = map(lambda batch: batch, batches())
  result = fit(tmp_path, data=anew, resume=True)
  assert_same(result, whole)


class Stateful:
  """Data whose state is what a test says, of the number of the next step."""

  def __init__(self, save, load):
    self._data, self._save, self._load = batches(), save, load

  def __iter__(self):
    return self

  def __next__(self):
    return next(self._data)

  def get_state(self):
    return self._save(self._data.get_state()['step'])

  def set_state(self, state):
    self._data.set_state({'step': self._load(state)})


def test_the_state_of_data_may_be_bytes(whole, tmp_path):
  """As that of Grain's loaders is."""
  data = lambda: Stateful(
    lambda step: bytes([255, step]), lambda state: state[1]
  )
  interrupt(tmp_path, 18, data=data(), checkpoint_every=5)
  assert_same(fit(tmp_path, data=data(), resume=True), whole)


@pytest.mark.parametrize('wrong', [{1, 2}, np.int64(3), {'at': b'3'}])
def test_a_state_of_data_that_cannot_be_saved_is_refused_at_once(
  tmp_path, wrong
):
  steps = Steps()
  data = lambda: Stateful(lambda step: wrong, None)
  with pytest.raises(
    TypeError, match='returns what no checkpoint can hold .*: return bytes'
  ):
    fit(tmp_path, data=data(), callbacks=[steps])
  assert not steps.done
  fit(data=data(), stop_at=1)  # nothing is to be saved


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp('finished')
  fit(folder)
  return folder


def test_a_finished_run_is_not_trained_again(whole, tmp_path, finished):
  shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
  steps = Steps()
  assert_same(fit(tmp_path, resume=True, callbacks=[steps]), whole)
  assert not steps.done


def test_a_run_that_was_killed_before_its_end_gets_one(tmp_path):
  options = dict(eval_every=None)
  interrupt(tmp_path, 12, checkpoint_every=10, **options)
  again = fit(tmp_path, stop_at=10, resume=True, **options)
  assert_same(again, fit(stop_at=10, **options))
  assert [r['step'] for r in again.select('end')] == [10]


def test_an_end_that_was_torn_is_written_anew(whole, tmp_path, finished):
  shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
  file = tmp_path / 'metrics.jsonl'
  file.write_text(file.read_text()[:-40])
  for _ in range(2):
    again = fit(tmp_path, resume=True)
    assert_same(again, whole)
    lines = file.read_text().splitlines()
    assert [json.loads(x) for x in lines] == list(again.records)


@pytest.mark.parametrize('name', ['steps', 'stop_at'])
def test_a_run_does_not_go_back_to_stop(tmp_path, name):
  fit(tmp_path, schedule=None, stop_at=15)
  with pytest.raises(ValueError, match=f'^{name}=10: .* is of step 15'):
    fit(tmp_path, schedule=None, resume=True, **{name: 10})


def test_resuming_nothing_is_starting(whole, tmp_path):
  assert_same(fit(tmp_path, resume=True), whole)


def test_starting_anew_leaves_nothing_of_an_earlier_run(tmp_path, whole):
  fit(tmp_path, seed=3, checkpoint_every=7)
  assert_same(fit(tmp_path), whole)
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as saved:
    assert saved.steps() == [STEPS]


class Kill(training.Callback):
  """Sends this process a signal at some steps."""

  def __init__(self, number, *steps):
    self.number, self.steps = number, steps

  def on_step(self, step):
    if step in self.steps:
      os.kill(os.getpid(), self.number)


@pytest.fixture
def foreground():
  """Ctrl-C is heard, also where the tests were started in the background."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
@pytest.mark.usefixtures('foreground')
def test_a_signal_saves_and_stops(whole, tmp_path, name, capsys):
  number = signal.Signals[name]
  before = signal.getsignal(number)
  with pytest.raises(training.Interrupted, match=name) as stopped:
    fit(tmp_path, callbacks=[Kill(number, 12)])
  assert stopped.value.step == 12 and stopped.value.code == 75
  assert signal.getsignal(number) is before
  assert f'{name}: stops after this step' in capsys.readouterr().err
  assert_same(fit(tmp_path, resume=True), whole)


@pytest.mark.parametrize('step', [10, STEPS])
def test_a_signal_ends_an_evaluation_which_is_made_up_for(
  whole, tmp_path, step
):
  *_, eval_batches = training_test.problem(training_test.Net(norm=True))
  keep = checkpoint.Keep(best=1, metric='accuracy')  # the lowest: the first
  done, told = Steps(), []

  def batches():
    for i, batch in enumerate(eval_batches()):
      if i == 1 and done.done[-1:] == [step] and len(told) < 2:
        signal.raise_signal(signal.SIGTERM)
        told.append(step)
      yield batch
    assert len(told) in (0, 2) or done.done[-1:] != [step]

  options = dict(
    eval_data=batches, callbacks=[done], keep=keep, checkpoint_every=5
  )
  for _ in range(2):
    with pytest.raises(training.Interrupted, match='SIGTERM') as stopped:
      fit(tmp_path, **options, resume=True)
    assert stopped.value.step == step
  assert_same(fit(tmp_path, **options, resume=True), whole)
  with checkpoint.Checkpoints(tmp_path / 'checkpoints', keep) as saved:
    assert step in saved.steps()


@pytest.mark.usefixtures('foreground')
def test_an_ignored_signal_stays_ignored():
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  fit(callbacks=[Kill(signal.SIGINT, 12)], stop_at=13)
  assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.usefixtures('foreground')
def test_a_second_interrupt_stops_at_once(tmp_path):
  twice = Kill(signal.SIGINT, 12), Kill(signal.SIGINT, 12)
  with pytest.raises(KeyboardInterrupt):
    fit(tmp_path, callbacks=twice)
  assert not any((tmp_path / 'checkpoints').iterdir())


def test_a_limit_of_seconds_saves_and_stops(whole, tmp_path):
  with pytest.raises(training.Interrupted, match='max_seconds=0') as stopped:
    fit(tmp_path, max_seconds=0)
  assert stopped.value.step == 1
  assert_same(fit(tmp_path, resume=True), whole)


def test_where_there_are_no_signals_runs_run(whole):
  results = []
  thread = threading.Thread(target=lambda: results.append(fit()))
  thread.start()
  thread.join()
  assert_same(results[0], whole)


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
  folder = tmp_path_factory.mktemp('begun')
  interrupt(folder, 2, checkpoint_every=1)
  return folder


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'seed': 1}, "in its seed: 'seed': 0 there, 1 here"),
    ({'net': training_test.Net()}, "in its parameters: 'norm/bias': float32"),
    ({'schedule': None, 'track_every': None}, 'in its layers: '),
    (
      {'optimizer': optax.sgd(0.1, momentum=0.9)},
      r"in its optimiser: 'states': \[.*'ScaleByAdamState'.* there, "
      r"\[.*'TraceState'.*\] here",
    ),
    (
      {'schedule': oialr.Schedule(steps=STEPS, delay=8, every=7)},
      "in its schedule: 'delay': 9 there, 8 here; 'cutoff': 0.4 there, 0.1",
    ),
  ],
)
def test_another_run_is_refused(tmp_path, begun, changes, message):
  shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
  with pytest.raises(ValueError, match=message):
    fit(tmp_path, resume=True, **changes)


class Spoil(training.Callback):
  """Makes the data, hence the parameters, infinite from a step on."""

  def __init__(self, step):
    self.step = step
    self.spoilt = False

  def on_step(self, step):
    self.spoilt = step >= self.step

  def apply(self, batch, step):
    del step
    return {**batch, 'x': batch['x'] * (np.inf if self.spoilt else 1)}


def test_divergence_names_the_last_good_checkpoint(tmp_path):
  spoil = Spoil(12)  # the batch of step 13 is fetched by then
  message = r'nan at step 14.*last good checkpoint in .* is that of step 13\.'
  with pytest.raises(FloatingPointError, match=message):
    fit(
      tmp_path,
      data=batches().map(spoil.apply),
      callbacks=[spoil],
      checkpoint_every=1,
    )
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as saved:
    assert saved.steps() == [13, 12]


def test_the_best_checkpoint_is_one_that_was_evaluated(tmp_path):
  values = iter([0.9, 0.5, 0.4])
  fit(
    tmp_path,
    stop_at=12,
    eval_fn=lambda params, model_state, batch: {'value': batch['value']},
    eval_data=lambda: [{'value': np.full(8, next(values), np.float32)}],
    eval_every=4,
    checkpoint_every=1,
    keep=checkpoint.Keep(best=1, metric='value', highest=True),
  )
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as saved:
    assert saved.steps() == [12, 11, 4]


def test_checkpoints_want_a_folder():
  with pytest.raises(ValueError, match='want a workdir'):
    fit(checkpoint_every=3)
  with pytest.raises(ValueError, match='want a workdir'):
    fit(resume=True)


class SpoilOnce(Spoil):
  """Spoils the batch of one step, the first time that it is asked for."""

  def __init__(self, step):
    super().__init__(step)
    self.count = 0

  def apply(self, batch, step):
    del step
    self.count += 1
    spoilt = self.count == self.step
    return {**batch, 'x': batch['x'] * (np.inf if spoilt else 1)}


def test_a_rollback_leaves_the_batches_out_that_led_there(tmp_path):
  spoil = SpoilOnce(13)
  result = fit(
    tmp_path,
    data=batches().map(spoil.apply),
    checkpoint_every=5,
    rollbacks=1,
    log_every=5,
  )
  (back,) = result.select('rollback')
  assert back['step'] == 10 and 'nan at step 13' in back['reason']
  assert int(result.state.step) == STEPS
  # Batches up to that of the step where it was noticed are left out.
  assert spoil.count > STEPS + 4
  losses = np.concatenate([r['losses'] for r in result.select('train')])
  assert len(losses) == STEPS and np.isfinite(losses).all()
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(x) for x in lines] == list(result.records)


@pytest.mark.parametrize('lag', [0, 4])
def test_what_an_event_stumbles_over_is_the_step_before_it(tmp_path, lag):
  """SVDs read what is not finite before the losses are."""
  schedule = oialr.Schedule(steps=STEPS, delay=14, every=8, cutoff=0.4, lag=lag)
  wrong = 13 if lag == 0 else 22  # the update of step 22 reads it at step 26
  options = dict(schedule=schedule, log_every=50)
  with pytest.raises(FloatingPointError, match=f'nan at step {wrong}'):
    fit(data=batches().map(SpoilOnce(wrong).apply), **options)
  result = fit(
    tmp_path,
    data=batches().map(SpoilOnce(wrong).apply),
    checkpoint_every=12,
    eval_every=None,
    rollbacks=1,
    **options,
  )
  (back,) = result.select('rollback')
  assert f'nan at step {wrong}' in back['reason']
  assert int(result.state.step) == STEPS


def test_data_may_end_because_of_a_rollback(tmp_path):
  whole = itertools.islice(batches().map(SpoilOnce(13).apply), STEPS)
  message = f'ended after {STEPS} batches, before step 26: .* where a rollback'
  with pytest.raises(ValueError, match=message):
    fit(tmp_path, data=whole, checkpoint_every=5, rollbacks=1, log_every=5)


def test_a_rollback_from_the_last_step_finds_its_batch(tmp_path):
  data = batches().map(SpoilOnce(STEPS).apply)
  result = fit(tmp_path, data=data, checkpoint_every=12, rollbacks=1)
  (back,) = result.select('rollback')
  assert back['step'] == 24 and int(result.state.step) == STEPS


def test_a_run_that_went_back_can_be_resumed(tmp_path):
  options = dict(checkpoint_every=5, rollbacks=1, log_every=5)
  once = fit(
    tmp_path / 'once', data=batches().map(SpoilOnce(13).apply), **options
  )
  spoil = SpoilOnce(13)
  twice = tmp_path / 'twice'
  interrupt(twice, 22, data=batches().map(spoil.apply), **options)
  again = fit(twice, resume=True, **options)
  assert_same(again, once)


def test_rollbacks_come_to_an_end(tmp_path):
  spoil = Spoil(12)
  with pytest.raises(FloatingPointError, match=r'nan at step 1\d'):
    fit(
      tmp_path,
      data=batches().map(spoil.apply),
      callbacks=[spoil],
      checkpoint_every=5,
      rollbacks=2,
      log_every=5,
    )


def test_rollbacks_want_checkpoints(tmp_path):
  with pytest.raises(ValueError, match='rollbacks=1: there is nothing to go'):
    fit(tmp_path, rollbacks=1)


def test_a_run_that_begins_with_low_ranks_is_resumed(tmp_path):
  params, _, loss, _, _, _ = training_test.problem(training_test.Net())
  example = next(batches())
  layers = oialr.find_layers(loss, params, {}, example, jax.random.key(0))
  low = oialr.to_lowrank(params, oialr.select(layers), rank=0.5)

  def run(folder, **options):
    return training.fit(
      loss,
      low,
      batches(),
      optimizer=optax.adam(1e-2),
      steps=12,
      workdir=folder,
      checkpoint_every=4,
      **options,
    )

  interrupt(tmp_path / 'twice', 7, run)
  assert_same(run(tmp_path / 'twice', resume=True), run(tmp_path / 'once'))


def test_numbers_and_dtypes_may_be_numpys(tmp_path):
  schedule = oialr.Schedule(
    steps=STEPS,
    delay=np.int64(9),
    every=np.int32(7),
    lag=np.int64(2),
    cutoff=np.float32(0.5),
    progressive=jnp.ones(()),
    basis_dtype=jnp.bfloat16,
  )
  run = functools.partial(fit, schedule=schedule, seed=np.int64(3))
  interrupt(tmp_path, 17, run, checkpoint_every=5)
  assert_same(run(tmp_path, resume=True), run())


@pytest.fixture(scope='module')
def often(tmp_path_factory):
  return fit(tmp_path_factory.mktemp('often'), checkpoint_every=5)


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
  folder = tmp_path_factory.mktemp('interrupted')
  interrupt(folder, 17, checkpoint_every=5)
  return folder


@pytest.mark.parametrize(
  'torn, by', [(0, b''), (-1, b''), (0, b'\xff'), (-1, b'\xff')]
)
def test_a_torn_record_does_not_keep_a_run_from_resuming(
  tmp_path, often, interrupted, torn, by
):
  shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
  options = dict(checkpoint_every=5)
  file = tmp_path / 'metrics.jsonl'
  lines = file.read_bytes().splitlines()
  lines[torn] = lines[torn][:20] + by  # 0xff is no UTF-8
  file.write_bytes(b'\n'.join(lines))
  # Interrupted again: what is lost must not cost another one.
  interrupt(tmp_path, 22, resume=True, **options)
  result = fit(tmp_path, resume=True, **options)
  jax.tree.map(np.testing.assert_array_equal, result.state, often.state)
  records = [json.loads(x) for x in file.read_text().splitlines()]
  assert records == list(result.records)
  lost = len(often.records) - len(records)
  assert lost == (torn >= 0)  # of what is behind the checkpoint, nothing is


def test_records_that_are_missing_do_not_keep_a_run_from_resuming(
  tmp_path, often, interrupted, caplog
):
  shutil.copytree(interrupted / 'checkpoints', tmp_path / 'checkpoints')
  file = tmp_path / 'metrics.jsonl'
  result = fit(tmp_path, checkpoint_every=5, resume=True)
  assert f'{file} is missing' in caplog.text
  jax.tree.map(np.testing.assert_array_equal, result.state, often.state)
  records = [json.loads(x) for x in file.read_text().splitlines()]
  assert records == list(result.records)
  later = lambda run: [r['step'] for r in run.select('eval') if r['step'] > 15]
  assert later(result) == later(often)
  assert min(r['step'] for r in records) >= 15
  # And one that has ended.
  file.unlink()
  again = fit(tmp_path, checkpoint_every=5, resume=True)
  jax.tree.map(np.testing.assert_array_equal, again.state, often.state)
  assert [r['kind'] for r in again.records][-1] == 'end'
