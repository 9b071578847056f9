"""Tests of who hears what of a run, and whose error it is."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from oialr_jax import training
from oialr_jax.training import callbacks
from oialr_jax.training import recorder as recorder_lib
from tests import training_test

STEPS = training_test.STEPS


class Spy(training.Callback):
  """Ten lines: all that there is to hear."""

  def __init__(self):
    self.heard = []

  def on_start(self, start):
    self.heard.append(('start', start))

  def on_step(self, step):
    self.heard.append(('step', step))

  def on_record(self, record):
    self.heard.append(('record', record['kind']))

  def on_event(self, record):
    self.heard.append(('event', record['event']))

  def on_evaluation(self, record):
    self.heard.append(('evaluation', record['step']))

  def on_checkpoint(self, step, folder):
    self.heard.append(('checkpoint', step, folder, folder.exists()))

  def close(self):
    self.heard.append(('close',))

  def of(self, what):
    return [heard[1:] for heard in self.heard if heard[0] == what]


class Everywhere(Spy):
  everywhere = True


@pytest.fixture
def recorder():
  """One that a spy listens to, as its attribute."""
  recorder = recorder_lib.Recorder()
  recorder.spy = Spy()
  recorder.add(recorder.spy)
  return recorder


# In a run.


def test_a_callback_hears_of_everything_in_order(tmp_path):
  spy = Spy()
  training_test.fit(
    workdir=tmp_path, checkpoint_every=15, eval_every=20, callbacks=[spy]
  )
  ((start,),) = spy.of('start')
  assert start == training.Start(steps=STEPS, first=0, examples=32)
  assert spy.of('step') == [(step,) for step in range(1, STEPS + 1)]
  assert spy.of('event') == [('transition',), ('update',), ('update',)]
  assert spy.of('evaluation') == [(20,), (STEPS,)]
  folder = tmp_path / 'checkpoints'
  assert spy.of('checkpoint') == [
    (step, folder / str(step), True) for step in (15, STEPS)
  ]
  kinds = {kind for (kind,) in spy.of('record')}
  assert kinds >= {'train', 'event', 'compaction', 'eval', 'end'}
  # The record, then what is about records of its kind.
  at = spy.heard.index(('event', 'transition'))
  assert spy.heard[at - 1] == ('record', 'event')
  assert spy.heard[0][0] == 'start' and spy.heard[-1] == ('close',)


def test_a_resumed_run_says_where_it_goes_on(tmp_path):
  training_test.fit(workdir=tmp_path, stop_at=20)
  spy = Spy()
  result = training_test.fit(workdir=tmp_path, resume=True, callbacks=[spy])
  ((start,),) = spy.of('start')
  assert (start.steps, start.first) == (STEPS, 20)
  assert start.records == result.records[: len(start.records)]
  assert start.records[-1]['step'] == 20
  assert spy.of('step')[0] == (21,)
  # Not of the one that it came from.
  assert [step for step, *_ in spy.of('checkpoint')] == [STEPS]


def test_callbacks_are_closed_when_the_run_fails():
  spy = Spy()
  batch = next(training_test.problem(training_test.Net())[4]())
  with pytest.raises(ValueError, match='data ended'):
    training_test.fit(callbacks=[spy], data=[batch])
  assert spy.heard[-1] == ('close',)


@pytest.mark.parametrize(
  'method', ['on_start', 'on_step', 'on_record', 'on_event', 'close']
)
def test_the_error_of_a_callback_names_it(method):
  def fail(self, *_):
    raise KeyError('mine')

  broken = type('Broken', (training.Callback,), {method: fail})()
  other = Spy()
  with pytest.raises(KeyError, match='mine') as caught:
    training_test.fit(callbacks=[broken, other])
  assert caught.value.__notes__ == [
    f'raised by Broken.{method}, a callback of the run'
  ]
  assert other.heard[-1] == ('close',)


class StopAt(training.Callback):
  """Stops at a record of some kind, or after a step."""

  def __init__(self, step, kind=None):
    self.step, self.kind = step, kind

  def on_step(self, step):
    if self.kind is None and step >= self.step:
      raise training.Stop('enough')

  def on_record(self, record):
    if record['kind'] == self.kind and record['step'] >= self.step:
      raise training.Stop('enough')


@pytest.mark.parametrize(
  'stop, at',
  [
    (StopAt(13), 13),
    (StopAt(19, 'train'), 20),  # which is read a step late
    (StopAt(1, 'eval'), 15),
    (StopAt(10, 'event'), 17),  # after the step that follows
  ],
)
def test_a_run_that_a_callback_stops_is_one_of_that_length(tmp_path, stop, at):
  listeners = spy, _ = Spy(), stop
  options = dict(eval_every=15, checkpoint_every=12)
  stopped = training_test.fit(
    workdir=tmp_path / 'a', callbacks=listeners, **options
  )
  told = training_test.fit(workdir=tmp_path / 'b', stop_at=at, **options)
  for a, b in zip(jax.tree.leaves(stopped.state), jax.tree.leaves(told.state)):
    np.testing.assert_array_equal(a, b)
  assert training_test.losses(stopped).size == at
  for kind in ('eval', 'event', 'compaction'):
    steps = lambda result, k=kind: [r['step'] for r in result.select(k)]
    assert steps(stopped) == steps(told)
  end = stopped.records[-1]
  assert (end['kind'], end['step'], end['stopped']) == ('end', at, 'enough')
  assert 'stopped' not in told.records[-1]
  assert (
    spy.of('checkpoint')[-1][0] == at
  )  # who stops keeps others from nothing


class AtOnce(Spy):
  """Stops whatever goes on."""

  def on_start(self, start):
    super().on_start(start)
    raise training.Stop('at once')


def test_a_run_that_stopped_is_done_and_may_go_on(tmp_path):
  run = lambda *callbacks, **more: training_test.fit(
    workdir=tmp_path, eval_every=10, callbacks=callbacks, resume=True, **more
  )
  first = run(StopAt(20, 'eval'))
  again = run(AtOnce())  # at a run that has its end: nothing is done
  assert again.records == first.records
  longer = run(stop_at=25)
  assert [r['step'] for r in longer.select('end')] == [20, 25]
  whole = training_test.fit(eval_every=10, stop_at=25)
  np.testing.assert_array_equal(
    training_test.losses(longer), training_test.losses(whole)
  )


def test_who_stops_before_the_first_step_stops_after_it(tmp_path):
  spy = AtOnce()
  result = training_test.fit(callbacks=[spy])
  assert spy.of('step') == [(1,)] and result.records[-1]['step'] == 1
  # Of one that goes on, not even that.
  training_test.fit(workdir=tmp_path, checkpoint_every=5, stop_at=12)
  checkpoint = tmp_path / 'checkpoints' / '12'
  shutil.rmtree(checkpoint)
  spy = AtOnce()
  result = training_test.fit(workdir=tmp_path, resume=True, callbacks=[spy])
  assert spy.of('step') == [] and result.records[-1]['step'] == 10
  assert result.records[-1]['stopped'] == 'at once'


def test_early_stopping_counts_what_is_worse_than_the_best():
  stopping = training.EarlyStopping('val', 2)
  record = lambda step, val: {'kind': 'eval', 'step': step, 'val': val}
  stopping.on_start(training.Start(steps=60))
  for step, value in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.0), (50, 2.1)):
    stopping.on_evaluation(record(step, value))
  # A run that goes on knows of the evaluations before.
  before = (record(10, 2.0), {'kind': 'train', 'step': 15}, record(20, 2.5))
  stopping.on_start(training.Start(steps=60, first=20, records=before))
  with pytest.raises(training.Stop, match='val did not improve in 2'):
    stopping.on_evaluation(record(30, 2.4))
  with pytest.raises(ValueError, match='patience=0: must be at least 1'):
    training.EarlyStopping('val', 0)


def test_early_stopping_takes_what_is_not_finite_for_worse():
  stopping = training.EarlyStopping('val', 3)
  stopping.on_start(training.Start(steps=60))
  values = 2.0, np.nan, 2.5
  for i, value in enumerate(values):
    stopping.on_evaluation({'kind': 'eval', 'step': i, 'val': value})
  with pytest.raises(training.Stop):
    stopping.on_evaluation({'kind': 'eval', 'step': 3, 'val': np.nan})


@pytest.mark.parametrize('wrong', [Spy, print])
def test_what_is_no_callback_is_refused(wrong):
  with pytest.raises(TypeError, match='is not a callback: pass an instance'):
    training_test.fit(callbacks=[wrong])


# The recorder.


def test_of_several_processes_the_first_one_hears(monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  recorder = recorder_lib.Recorder()
  quiet, loud = Spy(), Everywhere()
  with recorder:
    recorder.add(quiet)
    recorder.add(loud)
    recorder.start(steps=1)
  assert not quiet.heard
  assert [heard[0] for heard in loud.heard] == ['start', 'close']


def test_every_checkpoint_is_told_of_once(recorder):
  folder = pathlib.Path('some')
  recorder.start(steps=9, first=3)
  for steps in ([3, 2], [5, 3], [6, 5], [6, 5]):
    recorder.checkpoints(folder, steps)
  assert [step for step, *_ in recorder.spy.of('checkpoint')] == [5, 6]
  # Written again, after going back.
  recorder.start(steps=9, first=5)
  recorder.checkpoints(folder, [6, 5])
  assert [step for step, *_ in recorder.spy.of('checkpoint')] == [5, 6, 6]


def test_train_records_have_the_pace_of_their_own_steps(recorder, monkeypatch):
  """At 32 examples a step: 4 steps in 2 seconds, then 2 steps in half of one.

  The run has been interrupted after 100 seconds.
  """
  now = 0.0
  monkeypatch.setattr(recorder_lib.time, 'perf_counter', lambda: now)
  recorder.clock = recorder_lib.Clock()

  def steps(numbers, seconds):
    nonlocal now
    with recorder.clock('training'):
      now += seconds
    for step in numbers:
      recorder.step(step, {'loss': np.float32(step)})
    recorder.log(settled=True)

  recorder.clock.add({'training': 100.0})
  recorder.start(steps=6, examples=32)
  steps([1, 2, 3, 4], 2.0)
  with recorder.clock('events'):
    now += 10.0
  steps([5, 6], 0.5)
  first, last = recorder.records
  assert (first['seconds'], last['seconds']) == (102.0, 112.5)
  assert first['examples_per_second'] == 64
  assert last['examples_per_second'] == 128
  assert last['losses'] == [5, 6] and last['loss'] == 5.5


# When the second to last of ten steps is done, and the last one, in seconds:
# where the device is what takes the time, and where the batches are.
@pytest.mark.parametrize('read, settled', [(9, 10), (10, 10)])
def test_a_step_that_is_read_by_itself_has_no_pace(
  recorder, monkeypatch, read, settled
):
  """As at a checkpoint where it is time for a record, too."""
  now = 0.0
  monkeypatch.setattr(recorder_lib.time, 'perf_counter', lambda: now)
  recorder.clock = recorder_lib.Clock()
  recorder.start(steps=30, examples=32)
  for first in (0, 10, 20):
    for step in range(first + 1, first + 11):
      recorder.step(step, {'loss': np.float32(step)})
    with recorder.clock('training'):
      now = first + read
    recorder.log()
    with recorder.clock('training'):
      now = first + settled
    recorder.log(settled=True)
  assert [len(r['losses']) for r in recorder.records] == [9, 1] * 3
  paces = [r.get('examples_per_second') for r in recorder.records]
  assert paces == [320 / read, None, 32, None, 32, None]


def test_without_the_examples_of_a_step_there_is_no_pace(recorder):
  recorder.start(steps=1)
  recorder.step(1, {'loss': np.float32(0)})
  recorder.log(settled=True)
  assert 'examples_per_second' not in recorder.records[0]


def test_rewinding_forgets_records_and_steps_under_way(recorder):
  recorder.start(steps=9)
  for step in (1, 2):
    recorder.record('eval', step, loss=0.0)
  recorder.step(3, {'loss': np.float32(np.nan)})
  recorder.rewind(1)
  recorder.log(settled=True)
  assert [r['step'] for r in recorder.records] == [1]


@pytest.mark.parametrize('name', ['seconds', 'step', 'losses'])
def test_a_metric_may_not_be_called_like_the_rest_of_its_record(recorder, name):
  recorder.start(steps=1)
  recorder.step(1, {'loss': np.float32(0), name: np.float32(0)})
  with pytest.raises(ValueError, match=f'the metric {name!r} of loss_fn has'):
    recorder.log(settled=True)


def test_numbers_are_named_by_where_they_are():
  record = {
    'kind': 'event',
    'step': 3,
    'event': 'update',
    'converted': [],
    'ranks': {'a/kernel': 4, 'b/kernel': 5},
    'spectra': {'a/kernel': [1.0]},
    'stability': {},
    'seconds': 0.5,
    'change': None,
    'pays': True,
  }
  assert callbacks.numbers(record) == {
    'ranks/a/kernel': 4,
    'ranks/b/kernel': 5,
    'seconds': 0.5,
  }
