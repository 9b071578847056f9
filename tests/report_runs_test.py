"""Tests of reading workdirs, intact and damaged."""

import json
import random
import re

import pytest

from oialr_jax import report
from oialr_jax.report import plots
from oialr_jax.report import rows
from oialr_jax.report import runs
from tests import report_test

CONFIG = {'steps': 40, 'oialr': {'cutoff': 0.1, 'every': 10}, 'name': 'x'}
RESULT = {'dense': [{'accuracy': 0.9}], 'oialr': [{'accuracy': 0.8}] * 2}


def lines(records):
  return ''.join(json.dumps(r) + '\n' for r in records)


def workdir(folder, metrics=None):
  """As a binary leaves it; `metrics` of the low-rank run may be bytes."""
  for name in ('dense-0', 'oialr-0'):
    (folder / name).mkdir(parents=True)
    text = lines(report_test.records(name != 'dense-0'))
    (folder / name / 'metrics.jsonl').write_text(text)
  if metrics is not None:
    (folder / 'oialr-0' / 'metrics.jsonl').write_bytes(metrics)
  (folder / 'config.json').write_text(json.dumps(CONFIG))
  (folder / 'result.json').write_text(json.dumps(RESULT))
  return folder


def test_reads_runs_settings_and_results(tmp_path):
  read = report.read(workdir(tmp_path))
  assert [run.name for run in read.runs] == ['dense-0', 'oialr-0']
  assert list(read.runs[1].records) == sorted(
    report_test.records(), key=lambda r: r['step']
  )
  assert read.settings == {
    'steps': '40',
    'oialr.cutoff': '0.1',
    'oialr.every': '10',
    'name': 'x',
  }
  assert read.results == (
    {'method': 'dense', 'accuracy': [0.9]},
    {'method': 'oialr', 'accuracy': [0.8, 0.8]},
  )
  assert read.missing == read.runs[0].missing == read.runs[1].missing == ()


def test_results_may_be_rows(tmp_path):
  rows = [{'method': 'dense', 'horizon': 96, 'mse': 0.3, 'more': [1]}]
  path = workdir(tmp_path) / 'result.json'
  path.write_text(json.dumps({'rows': rows, 'flags': {}}))
  (row,) = report.read(tmp_path).results
  assert row == {'method': 'dense', 'horizon': 96, 'mse': 0.3}


def test_a_run_by_itself_needs_no_settings(tmp_path):
  read = report.read(workdir(tmp_path) / 'oialr-0')
  assert [run.name for run in read.runs] == ['oialr-0']
  assert read.missing == ()


WHOLE = lines(report_test.records()).encode()
GOES_ON = lines(report_test.records(ended=False)).encode()
DAMAGED = {
  'cut off': (WHOLE[:-9], 15, ['line 16 .no JSON, perhaps cut', "No 'end'"]),
  'goes on': (GOES_ON, 15, ["No 'end'.*step 40"]),
  'a loss': (
    WHOLE.replace(b'losses": [', b'losses": ["x",'),
    16,
    ["'losses' is not"],
  ),
  'ranks': (WHOLE.replace(b'"ranks": {', b'"ranks": 3, "_": {'), 16, []),
  'no records': (b'[1]\n{"kind": 3}\n\n' + WHOLE, 16, ['1 .no record., 2 ']),
  'no step': (b'{"kind": "end", "step": 1e99}', 0, ["no 'step'", 'no record']),
  'empty': (b' \n', 0, ['metrics.jsonl: empty']),
  'binary': (bytes(range(256)) * 9, 0, ['damaged in line 1', 'no record']),
  'deep': (b'[' * 100_000, 0, ['damaged in line 1', 'no record']),
}


@pytest.mark.parametrize('case', DAMAGED)
def test_damage_is_named_and_the_rest_is_read(tmp_path, case):
  metrics, kept, missing = DAMAGED[case]
  read = report.read(workdir(tmp_path, metrics))
  run = read.runs[1]
  assert len(run.records) == kept
  for sentence in missing:
    assert re.search(sentence, ' '.join(run.missing))
  assert read.runs[0].missing == ()


def test_an_end_before_the_end_is_none(tmp_path):
  """A run stopped at step 20, went on, and failed."""
  records = report_test.records(ended=False)
  steps = [r['step'] for r in records]
  stopped = {'kind': 'end', 'step': 20, 'seconds': {'training': 9.0}}
  stopped['steps_per_second'] = 5.0
  records.insert(steps.index(30), stopped)
  train = next(r for r in reversed(records) if r['kind'] == 'train')
  train['seconds'] = 12.0
  _, run = report.read(workdir(tmp_path, lines(records).encode())).runs
  assert re.search("No 'end'.*step 40", ' '.join(run.missing))
  row = rows.run(run.records)
  assert (row['ended'], row['seconds']) == ('no', 12.0)
  assert row['steps/s at the end'] is None
  assert 'time' not in plots.of_runs({'it': run.records})


def test_what_a_field_may_not_hold_is_left_out(tmp_path):
  _, run = report.read(
    workdir(tmp_path, WHOLE.replace(b'"ranks": {', b'"ranks": 3, "_": {'))
  ).runs
  events = [r for r in run.records if r['kind'] == 'event']
  assert len(events) == 3 and not any('ranks' in r for r in events)
  assert "3 ('ranks' is not what it should be)" in run.missing[0]


@pytest.mark.parametrize(
  'value', [None, True, '1', [], float('nan'), float('inf'), 1e39, -(10**400)]
)
def test_numbers_are_those_of_a_float32(value):
  assert runs.number(value) is None
  assert runs.number(3e38) == 3e38 and runs.number(10**30) == 1e30


@pytest.mark.parametrize(
  'name, text, sentence',
  [
    ('config.json', '{"a": ', 'config.json: Expecting value'),
    ('config.json', '[]', 'config.json: not an object'),
    ('config.json', '', 'config.json: empty'),
    ('result.json', '{"a": 1}', 'result.json: neither rows nor rows by method'),
    ('result.json', '[' * 100_000, 'result.json: .*recursion'),
    ('result.json', None, 'result.json: No such file'),
  ],
)
def test_settings_and_results_may_be_damaged(tmp_path, name, text, sentence):
  path = workdir(tmp_path) / name
  path.unlink()
  if text is not None:
    path.write_text(text)
  read = report.read(tmp_path)
  assert re.search(sentence, ' '.join(read.missing))
  assert len(read.runs) == 2
  assert not (read.settings and read.results)


def test_a_run_without_metrics_is_named(tmp_path):
  (workdir(tmp_path) / 'oialr-1' / 'checkpoints').mkdir(parents=True)
  *_, run = report.read(tmp_path).runs
  assert run.records == ()
  assert run.missing == ('metrics.jsonl: No such file or directory.',)


def test_folders_without_a_run_are_errors(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere': no such folder; pass"):
    report.read(tmp_path / 'nowhere')
  with pytest.raises(FileNotFoundError, match='neither metrics.jsonl, here or'):
    report.read(tmp_path)
  (tmp_path / 'report.html').touch()
  with pytest.raises(FileNotFoundError, match="report.html': a file; pass"):
    report.read(tmp_path / 'report.html')


def test_names_tell_workdirs_and_their_runs_apart(tmp_path):
  folders = [tmp_path / 'a' / 'digits', tmp_path / 'b' / 'digits']
  read = [report.read(workdir(f)) for f in folders]
  assert [*runs.named(read[:1])[1]] == ['dense-0', 'oialr-0']
  by_name, found = runs.named(read)
  assert [*by_name] == [str(f) for f in folders]
  assert f'{folders[1]}/oialr-0' in found and len(found) == 4
  alone = [report.read(folders[0] / run) for run in ('dense-0', 'oialr-0')]
  assert [*runs.named(alone)[1]] == ['dense-0', 'oialr-0']


ODD = [None, 'x', -1, 0, 1e308, -7.5, [], {}, [1], ['a'], {'a': 1}, True]
ODD += [{'$a_\n\x00\ud800': 7, '_b': 3, '\u65e5': 2}, 10**400, float('nan')]


@pytest.mark.parametrize('seed', range(4))
def test_there_is_a_page_whatever_the_files_hold(tmp_path, seed):
  """Fields are exchanged, lines lost, and bytes turned."""
  draw = random.Random(seed)
  records = [r for r in report_test.records() if draw.random() < 0.9]
  for record in draw.sample(records, seed * 2):
    record[draw.choice(list(record))] = draw.choice(ODD)
  metrics = bytearray(lines(records).encode())
  for _ in range(draw.choice([0, 1, 20])):
    metrics[draw.randrange(len(metrics))] = draw.randrange(256)
  folder = workdir(tmp_path, bytes(metrics))
  (folder / 'config.json').write_text(json.dumps({'a': draw.choice(ODD)}))
  text = report.write(folder).read_text()
  assert text.count('<svg') >= 6 and text.endswith('</html>\n')
