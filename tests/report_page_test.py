"""Tests of report.html and of the command that writes it."""

import json
import re
import subprocess
import sys

import pytest

from oialr_jax import report
from oialr_jax.report import tables
from tests import report_runs_test
from tests import report_test

HOSTILE = '<script>hacked=1</script>&"'


def rows(text, heading):
  """Cells of the table below a heading, row by row."""
  table = text.split(f'{heading}</h')[1].split('</table>')[0]
  cells = [re.findall(r'<t[hd].*?</t[hd]>', x) for x in table.split('<tr>')[1:]]
  return [[re.sub('<.*?>', '', cell) for cell in row] for row in cells]


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  """The page of two intact runs."""
  folder = tmp_path_factory.mktemp('page', numbered=False)
  report_runs_test.workdir(folder)
  return report.write(folder).read_text()


def hostile(folder):
  """A workdir that has markup wherever it may have text."""
  records = report_test.records(paths=[HOSTILE, 'b'])
  for record in records:
    if record['kind'] == 'event':
      record['event'] = HOSTILE
    if record['kind'] == 'eval':
      record[HOSTILE] = record['step']
  records.append({'kind': 'rollback', 'step': 40, 'reason': HOSTILE})
  name = HOSTILE.replace('/', '|')
  (folder / name).mkdir()
  metrics = report_runs_test.lines(records) + HOSTILE
  (folder / name / 'metrics.jsonl').write_text(metrics)
  (folder / 'config.json').write_text(json.dumps({HOSTILE: HOSTILE + '\ud800'}))
  (folder / 'result.json').write_text(json.dumps({HOSTILE: [{HOSTILE: 1}]}))
  return folder


def test_page_has_the_numbers_of_the_runs(text):
  assert rows(text, 'Results')[0] == ['method', 'accuracy']
  assert rows(text, 'Results')[1:] == [
    ['dense', '0.9'],
    ['oialr', '0.8 \u00b1 0'],
  ]
  head, dense, oialr = rows(text, 'Runs')
  run = dict(zip(head, oialr))
  assert run['run'] == 'oialr-0' and run['ended'] == 'yes'
  assert run['last accuracy'] == '0.8' and run['steps'] == '40'
  assert run['trainable %'] == '40' and run['stored %'] == '75'
  assert run['mean rank'] == '2' and run['seconds'] == '6'
  assert dict(zip(head, dense))['mean rank'] == '\u2013'
  assert rows(text, 'Seconds')[2][:3] == ['oialr-0', '3', '2']
  assert ['oialr.cutoff', '0.1'] in rows(text, 'Settings')
  assert 'class="missing"' not in text


def test_page_has_the_layers_and_events(text):
  head, first, _ = rows(text, 'Layers')
  layer = dict(zip(head, first))
  assert layer['layer'] == report_test.PATHS[0]
  assert (layer['first rank'], layer['rank'], layer['rank %']) == (
    '8',
    '2',
    '25',
  )
  assert layer['stability at the transition'] == '0.9'
  assert layer['largest truncation %'] == '30'
  head, transition, update, _ = rows(text, 'Events')
  assert dict(zip(head, transition))['mean rank before'] == '\u2013'
  event = dict(zip(head, update))
  assert event['event'] == 'update' and event['layers'] == '2'
  assert event['mean rank before'] == '8' and event['mean rank'] == '4'
  assert event['change of the loss %'] == '2' and event['seconds'] == '0.5'


def test_page_draws_every_plot(text):
  labels = re.findall(r'aria-label="([^"]*)"', text)
  of_run = ['stability', 'r_distance', 'ranks', 'sizes', 'spectra']
  assert labels == [
    *('loss', 'metric_accuracy', 'time'),
    *(f'{name} dense-0' for name in of_run[:2]),
    *(f'{name} oialr-0' for name in of_run),
  ]


def test_page_needs_nothing_else(text):
  sources = re.findall(r'(?:href="|src="|url\()([^")]*)', text)
  assert sources and all(s.startswith(('#', 'data:')) for s in sources)
  assert "default-src 'none'" in text
  # What parts of plots refer to is there, and once.
  ids = re.findall(r' id="([^"]*)"', text)
  used = re.findall(r'(?:href="|url\()#([^")]*)', text)
  assert set(used) <= set(ids) and len(set(ids)) == len(ids)


def test_what_files_hold_is_text(tmp_path):
  text = report.write(hostile(tmp_path)).read_text()
  assert '<script>hacked' not in text and '<|script' not in text
  assert text.count('&lt;script&gt;hacked=1&lt;/script&gt;&amp;') > 9
  assert '&quot;?</td>' in text  # half a surrogate pair


def test_unfinished_runs_are_shown_with_what_they_lack(tmp_path):
  metrics = report_runs_test.WHOLE[:-9]
  folder = report_runs_test.workdir(tmp_path, metrics)
  text = report.write(folder).read_text()
  note = text.split('class="missing"')[1].split('</div>')[0]
  assert '<b>oialr-0</b>: metrics.jsonl: damaged in line 16' in note
  assert 'No &#x27;end&#x27;' in note and 'dense-0' not in note
  head, _, oialr = rows(text, 'Runs')
  assert dict(zip(head, oialr))['ended'] == 'no'
  assert len(rows(text, 'Seconds')) == 2
  assert 'aria-label="ranks oialr-0"' in text


def test_several_workdirs_are_compared(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('a', 'b'):
    report_runs_test.workdir(tmp_path / name)
  path = report.write(['a', 'b'])
  assert path.resolve() == tmp_path / 'report.html'
  text = path.read_text()
  assert '<h1>a, b</h1>' in text
  assert [row[:2] for row in rows(text, 'Results')] == [
    ['workdir', 'method'],
    *(['a', 'dense'], ['a', 'oialr'], ['b', 'dense'], ['b', 'oialr']),
  ]
  assert rows(text, 'Runs')[4][0] == 'b/oialr-0'
  assert rows(text, 'Settings')[0] == ['setting', 'a', 'b']


def test_the_same_runs_give_the_same_page(tmp_path, text):
  again = report.write(report_runs_test.workdir(tmp_path / 'page'))
  assert again.read_text() == text


@pytest.mark.parametrize(
  'value, cell',
  [
    (1234567, '<td data-value="1234567.0">1,234,567</td>'),
    (0.123456, '<td data-value="0.123456">0.1235</td>'),
    (12345.6, '<td data-value="12345.6">12,346</td>'),
    (None, '<td class="empty">\u2013</td>'),
    ([], '<td class="empty">\u2013</td>'),
    ([1.0, 2.0], '<td data-value="1.5">1.5 \u00b1 0.71</td>'),
    ('<b>', '<td class="text">&lt;b&gt;</td>'),
  ],
)
def test_cells_show_four_digits_and_sort_by_all(value, cell):
  assert cell in tables.table(
    [{'name': 'x', 'a': 0}, {'name': 'y', 'a': value}]
  )


def run(*args):
  return subprocess.run(
    [sys.executable, '-m', 'oialr_jax.report', *map(str, args)],
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_the_command_writes_the_page_and_pictures(tmp_path):
  folder = report_runs_test.workdir(tmp_path / 'run')
  done = run(folder, f'--png={tmp_path / "plots"}')
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == str(folder / 'report.html')
  assert (folder / 'report.html').stat().st_size > 50_000
  assert (tmp_path / 'plots' / 'ranks.png').exists()


def test_the_command_says_what_is_wrong(tmp_path):
  done = run(tmp_path / 'nowhere')
  assert done.returncode == 1 and not done.stdout
  assert re.fullmatch(
    r"oialr_jax.report: '.*nowhere': no such folder; pass the workdir of a run.",
    done.stderr.strip(),
  )
