"""Tests of what is written where, read back by other means."""

import json
import struct
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from oialr_jax import training
from oialr_jax.training import writers
from tests import progress_test

RECORDS = [
  {'kind': 'train', 'step': 10, 'loss': 0.5, 'losses': [0.5]},
  {'kind': 'event', 'step': 10, 'ranks': {'a/kernel': 4, 'b/kernel': 5}},
  {'kind': 'eval', 'step': 20, 'accuracy': 0.75},
]


def long():
  """A run with three events, measured before each of them."""
  records = []
  for step in (10, 20, 30):
    of = lambda value: {'a/kernel': value, 'b/kernel': value}
    ranks = {'ranks_before': of(80), 'ranks': of(80 // step), 'spectra': {}}
    records += [
      {'kind': 'stability', 'step': step, 'stability': of(1 - 1 / step)},
      {'kind': 'event', 'event': 'update', 'step': step, **ranks},
    ]
  return [*records, progress_test.END]


def write(writer, records, first=0, done=()):
  writer.on_start(training.Start(steps=40, first=first, records=tuple(done)))
  for record in records:
    writer.on_record(record)
  writer.close()


def read(folder):
  """The events of all files of a folder, in order: length, crc, data, crc."""
  events = []
  for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack('<Q', data[:8])
      events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return events


def scalars(events):
  return {
    (value.tag, event.step): value.simple_value
    for event in events
    for value in event.summary.value
    if value.HasField('simple_value')
  }


class Memory(training.Writer):
  """A service that keeps what it is given."""

  def open(self, start):
    self.values, self.drawn = {}, []

  def numbers(self, values, step):
    self.values |= {(name, step): value for name, value in values.items()}

  def picture(self, name, pixels, step):
    self.drawn.append((name, step))
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
    assert pixels.std() > 1  # not blank


# A file.


def test_a_file_has_a_record_a_line(tmp_path):
  path = tmp_path / 'folder' / 'metrics.jsonl'
  write(training.Jsonl(path), RECORDS)
  assert [*map(json.loads, path.read_text().splitlines())] == RECORDS


def test_a_file_keeps_the_lines_of_the_steps_that_are_done(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  write(training.Jsonl(path), RECORDS)
  kept = path.read_text().splitlines()[:1]
  write(training.Jsonl(path), RECORDS[2:], first=10, done=RECORDS[:1])
  lines = path.read_text().splitlines()
  assert lines == [*kept, json.dumps(RECORDS[2])]
  write(training.Jsonl(path), [])
  assert path.read_text() == ''


def test_a_run_that_goes_back_takes_its_lines_back(tmp_path):
  file = training.Jsonl(tmp_path / 'metrics.jsonl')
  file.on_start(training.Start(steps=40))
  for record in RECORDS:
    file.on_record(record)
  write(file, RECORDS[1:2], first=10, done=RECORDS[:1])
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [*map(json.loads, lines)] == RECORDS[:2]


@pytest.mark.parametrize('kind', [training.Jsonl, training.TensorBoard])
def test_a_writer_that_was_never_started_touches_nothing(tmp_path, kind):
  path = tmp_path / 'there'
  path.write_text('mine')
  kind(path).close()
  assert path.read_text() == 'mine'


# Services.


def test_a_writer_is_given_every_number_and_the_mean_rank():
  memory = Memory()
  write(memory, RECORDS)
  assert memory.values == {
    ('train/loss', 10): 0.5,
    ('event/ranks/a/kernel', 10): 4,
    ('event/ranks/b/kernel', 10): 5,
    ('event/mean_rank', 10): 4.5,
    ('eval/accuracy', 20): 0.75,
  }


def test_pictures_are_drawn_at_events_and_the_end_of_long_runs(monkeypatch):
  now = 0.0
  monkeypatch.setattr(writers.time, 'monotonic', lambda: now)
  memory = Memory(pictures_every=100.0)
  memory.on_start(training.Start(steps=40))
  # Events are at 10, 20 and 30, and 60 seconds apart.
  for record in long():
    now += 60.0 * (record['kind'] == 'event')
    memory.on_record(record)
  drawn = [('ranks', 20), ('stability', 20), ('ranks', 400), ('stability', 400)]
  assert memory.drawn == drawn


def test_a_short_run_draws_nothing(monkeypatch):
  monkeypatch.setattr(writers, 'pictures', None)
  write(Memory(), long())


def test_pictures_are_of_what_there_is():
  assert not writers.pictures(RECORDS[:1])
  assert list(writers.pictures(long()[:1])) == ['stability']
  # Of a run whose layers were converted, and that has no events.
  converted = {'kind': 'conversion', 'step': 0, 'ranks': {'a': 3}}
  assert not writers.pictures([converted, *RECORDS[:1]])


def test_tensorboard_holds_numbers_and_pictures(tmp_path):
  writer = training.TensorBoard(tmp_path, pictures_every=0.0)
  write(writer, RECORDS[:1] + long()[:-1])
  events = read(tmp_path)
  assert scalars(events)['train/loss', 10] == 0.5
  assert scalars(events)['event/mean_rank', 30] == 2
  images = [
    (value.tag, event.step, value.image.encoded_image_string[:4])
    for event in events
    for value in event.summary.value
    if value.HasField('image')
  ]
  assert images == [
    (name, step, b'\x89PNG')
    for step in (10, 20, 30)
    for name in ('ranks', 'stability')
  ]


def test_tensorboard_shows_an_interrupted_run_up_to_its_checkpoint(tmp_path):
  write(training.TensorBoard(tmp_path), RECORDS)
  write(training.TensorBoard(tmp_path), RECORDS[2:], first=15)
  starts = [e.step for e in read(tmp_path) if e.HasField('session_log')]
  assert starts == [16]  # what is later, of before, is hidden


def test_tensorboard_shows_nothing_of_another_run(tmp_path):
  write(training.TensorBoard(tmp_path), RECORDS)
  (old,) = tmp_path.iterdir()
  old.rename(tmp_path / 'events.out.tfevents.1.host')  # of an earlier second
  (tmp_path / 'notes').mkdir()
  write(training.TensorBoard(tmp_path), RECORDS[:1])
  (tmp_path / 'notes').rmdir()
  assert {step for _, step in scalars(read(tmp_path))} == {10}


class FakeWandB(types.ModuleType):
  """The part of wandb that is used, and what it was told."""

  def __init__(self):
    super().__init__('wandb')
    self.told = []

  def init(self, **options):
    self.told.append(('init', options))
    return self

  def define_metric(self, name, **options):
    self.told.append(('metric', name, options))

  def log(self, values):
    self.told.append(('log', values))

  def finish(self, exit_code):
    self.told.append(('finish', exit_code))

  def Image(self, pixels):  # noqa: N802 (theirs)
    return pixels.ndim


@pytest.fixture
def wandb(monkeypatch):
  fake = FakeWandB()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  return fake


def test_wandb_is_told_numbers_and_pictures_by_their_step(wandb):
  writer = training.WandB('oialr', pictures_every=0.0, name='mine')
  assert not wandb.told  # of several processes only the first one starts
  write(writer, [*RECORDS[:2], progress_test.END])
  init, step, others, *logged, finish = wandb.told
  assert init == ('init', {'project': 'oialr', 'name': 'mine'})
  assert step == ('metric', 'step', {})
  assert others == ('metric', '*', {'step_metric': 'step'})
  assert logged[0] == ('log', {'step': 10, 'train/loss': 0.5})
  assert logged[1][1]['event/mean_rank'] == 4.5
  assert logged[2] == ('log', {'step': 10, 'ranks': 3})
  assert logged[3][1]['end/stored'] == 600
  assert finish == ('finish', 0)


def test_wandb_goes_back_within_one_run_and_knows_of_a_failure(wandb):
  writer = training.WandB('oialr')
  writer.on_start(training.Start(steps=40))
  write(writer, RECORDS[:1], first=5)
  assert [told[0] for told in wandb.told].count('init') == 1
  assert wandb.told[-1] == ('finish', 1)


def test_without_wandb_the_error_has_the_command(monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ImportError, match=r"pip install 'oialr_jax\[wandb\]'"):
    training.WandB('oialr')
