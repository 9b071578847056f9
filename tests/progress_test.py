"""Tests of what is said on a terminal, from made-up records."""

import contextlib
import fcntl
import os
import re
import struct
import termios
import threading

import pytest

from oialr_jax import training
from oialr_jax.training import progress
from tests import training_test

PATHS = [f'block_{i}/kernel' for i in range(75)]


def train(step, **changes):
  record = {
    'kind': 'train',
    'step': step,
    'loss': 2 / step,
    'losses': [2 / step],
    'seconds': step / 10,
    'examples_per_second': 1280.0,
  }
  return record | changes


def event(step, name='update', before=512, after=256, **changes):
  """Of 75 layers; ranks are one less in the last of them."""
  ranks = lambda rank: dict.fromkeys(PATHS, rank) | {PATHS[-1]: rank - 1}
  converted = name == 'transition'
  record = {
    'kind': 'event',
    'step': step,
    'event': name,
    'converted': PATHS if converted else [],
    'updated': [] if converted else PATHS[30:],
    'ranks_before': {} if converted else ranks(before),
    'ranks': ranks(after),
    'truncation': dict.fromkeys(PATHS, 0.001) | {PATHS[3]: 0.0213},
    'seconds': 0.8412,
    'change': 0.00345,
    'trainable': 250,
    'stored': 900,
    'dense': 1000,
  }
  return record | changes


END = {
  'kind': 'end',
  'step': 400,
  'seconds': {'training': 30.0, 'events': 10.0, 'tracking': 0.0},
  'compilations': 3,
  'steps_per_second': 12.5,
  'optimizer_bytes': 2_500_000,
  'trainable': 100,
  'stored': 600,
  'dense': 1000,
}
COMPACTION = {
  'kind': 'compaction',
  'step': 300,
  'stored_before': 1900,
  'stored': 900,
  'trainable': 120,
  'dense': 1000,
}
EVALUATION = {
  'kind': 'eval',
  'step': 400,
  'accuracy': 0.98225,
  'loss': 0.25,
  'examples': 450,
}


# Lines.


@pytest.mark.parametrize(
  'record, line',
  [
    (
      event(300),
      'step    300  update: 45 of 75 layers updated, rank 512 (511-512) -> 256 '
      '(255-256), truncation <= 2.13%, loss moved 0.345%, 0.84 s',
    ),
    (
      event(100, 'transition', after=512, truncation=dict.fromkeys(PATHS, 0.0)),
      'step    100  transition: 75 of 75 layers converted, rank dense -> 512 '
      '(511-512), loss moved 0.345%, 0.84 s',
    ),
    (
      event(300, before=64, after=64, truncation={}, change=None),
      'step    300  update: 45 of 75 layers updated, rank 64 (63-64), 0.84 s',
    ),
    (
      {
        **{'kind': 'conversion', 'step': 9, 'seconds': 0.5},
        **{'ranks': {'a': 4, 'b': 8}, 'truncation': {'a': 0.25, 'b': 0.0}},
      },
      'step      9  conversion: 2 layers of rank 6 (4-8), truncation <= 25%, '
      '0.5 s',
    ),
    (COMPACTION, 'step    300  compaction: stored 1,900 -> 900 numbers'),
    (EVALUATION, 'step    400  evaluation: accuracy 0.9822, loss 0.2500'),
    (
      {'kind': 'rollback', 'step': 7, 'reason': 'the loss is nan'},
      'step      7  rollback: the loss is nan',
    ),
    (train(3), ''),
    (END, ''),
  ],
)
def test_a_record_is_a_line(record, line):
  assert progress.describe(record) == line


def test_an_event_that_found_no_stable_layer_is_a_line():
  record = event(5, converted=[], updated=[], ranks_before={}, ranks={})
  line = progress.describe(record | {'truncation': {}, 'change': None})
  assert line == 'step      5  update: 0.84 s'


def test_the_line_is_as_short_for_many_layers_as_for_one():
  assert len(progress.describe(event(300))) < 140
  one = {'ranks_before': {'a': 8}, 'ranks': {'a': 7}, 'updated': ['a']}
  line = progress.describe(event(300, **one))
  assert '1 of 1 layers updated, rank 8 -> 7,' in line


def test_status_is_of_the_latest_records():
  latest = {'train': train(200)}
  assert progress.status(latest) == '1.28k ex/s, loss 0.01'
  latest |= {'event': event(200)}
  assert progress.status(latest, 75.2) == (
    '01:15 left, 1.28k ex/s, loss 0.01, rank 256, 25% trainable'
  )
  latest |= {'compaction': COMPACTION}
  assert progress.status(latest).endswith('rank 256, 12% trainable')
  unknown = train(1)
  del unknown['examples_per_second']
  assert progress.status({'train': unknown}) == 'loss 2'


def test_summary_goes_from_the_beginning_to_the_end():
  records = [
    train(100),
    event(100, 'transition', after=512),
    event(300),
    train(400),
    EVALUATION,
    END,
  ]
  assert progress.summary(records, 'oialr').splitlines() == [
    'oialr',
    '  steps                400',
    '  training loss        0.02 -> 0.005',
    '  evaluation accuracy  0.9822',
    '  evaluation loss      0.2500',
    '  low-rank layers      75',
    '  rank                 512 (511-512) -> 256 (255-256)',
    '  trainable            100 of 1,000 (10%)',
    '  stored               600 of 1,000 (60%)',
    '  optimiser state      2.500 MB',
    '  speed at the end     12.5 steps/s',
    '  time                 40.0 s',
    '    training           30.0 s   75%',
    '    events             10.0 s   25%',
  ]


def test_summary_says_what_stopped_the_run():
  ended = END | {'stopped': 'val did not improve'}
  shown = progress.summary([train(1), ended])
  assert shown.startswith('  steps             400, for val did not improve\n')


def test_summary_of_a_dense_run_says_nothing_of_ranks():
  shown = progress.summary([train(1), END])
  assert 'rank' not in shown and shown.startswith('  steps')


# As they are shown.


def feed(listener, start=training.Start(steps=400, examples=128)):  # noqa: B008 (frozen)
  """400 steps, logged at every tenth: a tenth of a second each."""
  listener.on_start(start)
  for step in range(start.first + 1, 401):
    listener.on_step(step)
    if step % 10 == 0:
      listener.on_record(train(step))
    if step == 100:
      listener.on_record(event(step, 'transition', after=512))
    if step == 300:
      listener.on_record(COMPACTION)
      listener.on_record(event(step, trainable=80))
  listener.on_record(EVALUATION)
  listener.on_record(END)
  listener.close()


def test_plain_lines_come_now_and_then(capsys):
  feed(training.Progress('run', every=15.0))
  lines = capsys.readouterr().err.splitlines()
  assert lines[0] == 'run step      0  begins: 400 steps of 128 examples'
  assert [x for x in lines if 'training:' in x] == [
    'run step     10  training: 2% done, 1.28k ex/s, loss 0.2',
    'run step    160  training: 40% done, 00:24 left, 1.28k ex/s, loss 0.0125,'
    ' rank 512, 25% trainable',
    'run step    310  training: 78% done, 00:09 left, 1.28k ex/s, loss 0.00645,'
    ' rank 256, 8% trainable',
  ]
  assert sum('transition:' in x for x in lines) == 1
  assert 'run' in lines and '  stored               600 of 1,000 (60%)' in lines
  assert not any('\r' in x or '\x1b' in x for x in lines)


def test_a_record_without_a_pace_leaves_it_as_it_was(capsys):
  listener = training.Progress(every=0.0)
  listener.on_start(training.Start(steps=400))
  unknown = train(20)
  del unknown['examples_per_second']
  for record in (train(10), unknown):
    listener.on_record(record)
  listener.close()
  last = capsys.readouterr().err.splitlines()[-1]
  assert 'step     20' in last and '1.28k ex/s, loss 0.1' in last


def test_a_run_that_goes_on_knows_what_was(capsys):
  records = (train(100), event(100, 'transition', after=512))
  start = training.Start(steps=400, first=390, records=records)
  feed(training.Progress(), start)
  lines = capsys.readouterr().err.splitlines()
  assert lines[0] == 'step    390  goes on: 400 steps'
  assert 'rank 512, 25% trainable' in lines[1]
  assert '  training loss        0.02 -> 0.005' in lines


def test_the_records_of_a_run_are_those_it_expects(capsys):
  training_test.fit(callbacks=[training.Progress('run')], probe=True)
  shown = capsys.readouterr().err
  assert (
    'transition: 2 of 2 layers converted, rank dense -> 14 (12-16)' in shown
  )
  assert 'update: 2 of 2 layers updated, rank 14 (12-16) -> ' in shown
  assert 'loss moved' in shown and 'evaluation: accuracy' in shown
  assert re.search(r'training: 30% done, \S+ ex/s, loss \d', shown)
  assert '  low-rank layers      2\n' in shown


def on_terminal(columns, name):
  """What a terminal of so many columns is sent."""
  ours, theirs = os.openpty()
  size = struct.pack('HHHH', 40, columns, 0, 0)
  fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
  sent = []

  def read():
    try:
      while block := os.read(ours, 4096):
        sent.append(block)
    except OSError:  # the other end was closed
      os.close(ours)

  reader = threading.Thread(target=read)
  reader.start()
  with os.fdopen(theirs, 'w') as file, contextlib.redirect_stderr(file):
    feed(training.Progress(name))
  reader.join()
  return re.sub(r'\x1b\[\w', '', b''.join(sent).decode())


@pytest.mark.parametrize('columns', [60, 80, 120])
def test_on_a_terminal_there_is_one_live_line(columns, monkeypatch):
  monkeypatch.setenv('COLUMNS', str(columns))
  sent = on_terminal(columns, '{run}')
  lines = re.split(r'[\r\n]+', sent)
  assert max(map(len, lines)) <= columns
  live = '{run} 400/400, 00:00 left, 1.28k ex/s, loss 0.005, rank 256, 8% '
  last = [x for x in lines if x.startswith(live[: columns - 1])][-1]
  assert ('\u2588' in last) == (columns > 60)  # a bar, where there is room
  said = [x.split()[3] for x in lines if x.startswith('{run} step')]
  assert said == [
    'begins:',
    'transition:',
    'compaction:',
    'update:',
    'evaluation:',
  ]
  # The table is the last thing: the live line is wiped away.
  below = sent.rpartition('events             10.0 s   25%')[2]
  assert below.endswith('\r') and not below.split('\r')[-2].strip()
