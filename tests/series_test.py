"""Tests of time series: splits, windows, batches, files that are not right.

tests/data/ettm2_windows.{json,npz} hold what the authors' PyTorch program of
Autoformer makes of ETTm2.csv, with seq_len 96 and label_len 48: the number of
windows per split and horizon; mean and deviation; the first and the last window
of every split at horizon 96.
"""

import json
import pathlib

import jax
import numpy as np
import pytest

from oialr_jax import data
from oialr_jax.data import series as series_lib

DATA = pathlib.Path(__file__).parent / 'data'
ETT_COLUMNS = ('HUFL', 'HULL', 'MUFL', 'MULL', 'LUFL', 'LULL', 'OT')
LENGTHS = dict(seq_len=4, label_len=2, pred_len=3)


@pytest.fixture(scope='module')
def golden():
  with np.load(DATA / 'ettm2_windows.npz') as arrays:
    return dict(arrays)


@pytest.fixture(scope='module')
def made_up(tmp_path_factory):
  """ETTm2 with the dates that it has, and other numbers."""
  folder = tmp_path_factory.mktemp('data')
  write(folder / 'ETTm2.csv', 57_700, columns=ETT_COLUMNS)
  return data.load_series('ETTm2', data_dir=folder)


def numbers(rows, columns):
  """Each column of a mean and a deviation of its own."""
  x = np.random.default_rng(0).standard_normal((rows, columns))
  return x * np.linspace(1, 30, columns) + np.arange(columns)


def write(path, rows=60, *, columns=('a', 'b'), minutes=15, edit=None):
  """A file with `numbers`; `edit(lines)` changes lines[i], line i + 1 of it."""
  step = np.timedelta64(minutes, 'm')
  dates = np.datetime64('2016-07-01T00:00:00') + step * np.arange(rows)
  lines = [','.join(['date', *columns])]
  cells = numbers(rows, len(columns)).tolist()
  for date, row in zip(dates.tolist(), cells):
    lines.append(','.join([str(date), *map(repr, row)]))
  if edit:
    edit(lines)
  path.write_text('\n'.join(lines) + '\n')
  return path


def real(name):
  """The real series, where OIALR_DATA_DIR leads to it."""
  try:
    return data.load_series(name)
  except FileNotFoundError as e:
    pytest.skip(str(e))


def check_golden_windows(series, golden, names):
  for split in series_lib.SPLITS:
    windows = series.windows(split)
    for i in (0, len(windows) - 1):
      batch = windows.take(np.array([i]))
      known = batch['x_dec'][:, : windows.label_len]
      found = dict(
        x=batch['x_enc'],
        y=np.concatenate([known, batch['target']], axis=1),
        x_mark=batch['x_mark_enc'],
        y_mark=batch['x_mark_dec'],
      )
      for name in names:
        assert found[name].dtype == np.float32
        expected = golden[f'{split}/{i}/{name}']
        np.testing.assert_allclose(found[name][0], expected, atol=1e-6)


def check_golden_counts(series):
  expected = json.loads((DATA / 'ettm2_windows.json').read_text())['windows']
  found = {
    f'{split}/{horizon}': len(series.windows(split, pred_len=horizon))
    for split in ('train', 'val', 'test')
    for horizon in (96, 192, 336, 720)
  }
  assert found == expected


def test_splits_and_time_features_are_the_original_ones(made_up, golden):
  check_golden_counts(made_up)
  check_golden_windows(made_up, golden, ('x_mark', 'y_mark'))


def test_windows_of_ettm2_are_the_original_ones(golden):
  series = real('ETTm2')
  np.testing.assert_allclose(series.mean, golden['scaler/mean'], rtol=1e-12)
  np.testing.assert_allclose(series.std, golden['scaler/scale'], rtol=1e-12)
  check_golden_counts(series)
  check_golden_windows(series, golden, ('x', 'y', 'x_mark', 'y_mark'))


def test_etth1_is_split_by_the_hour():
  series = real('ETTh1')
  assert series.values.shape == (17_420, 7) and series.marks.shape[1] == 4
  months = np.array([12, 4, 4]) * 30 * 24
  past = [96, 0, 0]  # of the later splits, it lies in the split before
  found = [len(series.windows(s, pred_len=24)) for s in series_lib.SPLITS]
  assert found == list(months - past - 24 + 1)


def test_time_features_are_those_of_the_calendar():
  rng = np.random.default_rng(0)
  start = np.datetime64('1963-02-01T00:00:00')
  dates = start + rng.integers(0, 80 * 365 * 86400, 500).astype('m8[s]')
  dates[0] = np.datetime64('2024-12-31T23:59:59')
  rows = [(date, date.timetuple()) for date in dates.tolist()]
  expected = [
    [
      date.minute / 59,
      date.hour / 23,
      date.weekday() / 6,
      (date.day - 1) / 30,
      (whole.tm_yday - 1) / 365,
    ]
    for date, whole in rows
  ]
  features = data.time_features(dates, 'minute')
  np.testing.assert_allclose(features, np.array(expected) - 0.5, atol=1e-6)
  np.testing.assert_array_equal(
    data.time_features(dates, 'hour'), features[:, 1:]
  )
  with pytest.raises(ValueError, match="resolution='day': must be .*'minute'"):
    data.time_features(dates, 'day')


@pytest.mark.parametrize('rows', [60, 97, 101])
def test_other_files_are_split_by_shares(tmp_path, rows):
  series = data.load_series(write(tmp_path / 'x.csv', rows))
  train, test = int(rows * 0.7), int(rows * 0.2)
  assert series.ends == (train, rows - test, rows)
  assert series.columns == ('a', 'b')
  values = numbers(rows, 2)
  expected = (values - values[:train].mean(0)) / values[:train].std(0)
  np.testing.assert_allclose(series.values, expected, atol=1e-6)
  before = [0, train - 4, rows - test - 4]
  for i, split in enumerate(series_lib.SPLITS):
    rows_of_split = expected[before[i] : series.ends[i]]
    windows = series.windows(split, **LENGTHS)
    assert len(windows) == len(rows_of_split) - 4 - 3 + 1
    batch = windows.take(np.arange(len(windows)))
    for j in range(len(windows)):
      window = rows_of_split[j : j + 7]
      np.testing.assert_allclose(batch['x_enc'][j], window[:4], atol=1e-6)
      np.testing.assert_allclose(batch['target'][j], window[4:], atol=1e-6)
      np.testing.assert_allclose(batch['x_dec'][j, :2], window[2:4], atol=1e-6)
      assert not batch['x_dec'][j, 2:].any()


def test_columns_are_chosen_and_ordered(tmp_path):
  path = write(tmp_path / 'x.csv', columns=('a', 'b', 'c'))
  every = data.load_series(path)
  chosen = data.load_series(path, columns=('c', 'a'))
  assert chosen.columns == ('c', 'a')
  np.testing.assert_array_equal(chosen.values, every.values[:, [2, 0]])


def test_a_column_that_does_not_change_is_zero(tmp_path):
  def edit(lines):
    lines[1:] = [f'{line},7.5' for line in lines[1:]]
    lines[0] += ',c'

  series = data.load_series(write(tmp_path / 'x.csv', edit=edit))
  assert series.std[2] == 1 and not series.values[:, 2].any()


@pytest.mark.parametrize(
  'minutes, features', [(10, 5), (15, 5), (60, 4), (24 * 60, 4)]
)
def test_the_resolution_is_that_of_the_rows(tmp_path, minutes, features):
  path = write(tmp_path / 'x.csv', minutes=minutes)
  assert data.load_series(path).marks.shape == (60, features)
  for resolution, features in (('hour', 4), ('minute', 5)):
    series = data.load_series(path, resolution=resolution)
    assert series.marks.shape == (60, features)


def test_dates_with_slashes_byte_order_marks_and_blank_lines(tmp_path):
  path = tmp_path / 'x.csv'
  rows = [f'1990/1/{i} 0:00,{i}' for i in range(1, 31)]
  path.write_text('\n'.join(['\ufeffdate,a', '', *rows, '']), 'utf-8')
  series = data.load_series(path)
  np.testing.assert_allclose(
    series.marks[:, 2], np.arange(30) / 30 - 0.5, atol=1e-6
  )


@pytest.mark.parametrize('place', ['.', 'ETT', '../ETT'])
def test_ett_is_found_in_the_folder_in_it_or_beside_it(
  tmp_path, monkeypatch, place
):
  folder = tmp_path / 'sets'
  (folder / place).mkdir(parents=True, exist_ok=True)
  path = folder / place / 'ETTh2.csv'
  write(path, 14_400, columns=ETT_COLUMNS, minutes=60)
  monkeypatch.setenv('OIALR_DATA_DIR', str(folder))
  series = data.load_series('ETTh2', columns=['OT'])
  assert series.columns == ('OT',)
  assert series.ends == (8640, 11520, 14400)


# Windows and batches.


@pytest.fixture
def windows(tmp_path):
  series = data.load_series(write(tmp_path / 'x.csv'))
  return series.windows('train', **LENGTHS)  # 42 rows, 36 windows


def which(batch, windows):
  """The windows in a batch, by the row with which they start."""
  rows = {tuple(row): i for i, row in enumerate(windows.series.values.tolist())}
  return [rows[tuple(x[0].tolist())] for x in np.asarray(batch['x_enc'])]


def test_windows_on_the_device_are_the_same(windows):
  index = np.array([3, 0, 35])
  expected = windows.take(index)
  on_device = windows.on_device()
  traces = []

  @jax.jit
  def take(windows, index):
    traces.append(index)
    return windows.take(index)

  for found in (on_device.take(index), take(on_device, index)):
    assert found.keys() == expected.keys()
    for name, x in found.items():
      assert isinstance(x, jax.Array)
      np.testing.assert_array_equal(x, expected[name])
  take(windows.on_device(), index[::-1])
  assert len(traces) == 1
  (batch,) = data.eval_window_batches(on_device, 36)()
  assert isinstance(batch['target'], jax.Array)
  assert which(batch, windows) == [*range(36)]


@pytest.mark.parametrize('index', [[-1], [36], [0, 99]])
def test_windows_of_another_split_are_not_given(windows, index):
  with pytest.raises(IndexError, match='there are 36 windows'):
    windows.take(np.array(index))


def test_batches_hold_every_window_of_an_epoch_once(windows):
  source = data.window_batches(windows, 12, seed=3)
  epochs = [[*map(lambda _: next(source), range(3))] for _ in range(2)]
  found = [
    [i for batch in epoch for i in which(batch, windows)] for epoch in epochs
  ]
  assert sorted(found[0]) == sorted(found[1]) == [*range(36)]
  assert found[0] != found[1]


def test_batches_go_on_where_they_were(windows):
  first = data.window_batches(windows, 10, seed=3)
  seen = [which(next(first), windows) for _ in range(8)]
  again = data.window_batches(windows, 10, seed=3, start=2)
  assert [which(next(again), windows) for _ in range(6)] == seen[2:]
  again.set_state({'step': 5})
  assert which(next(again), windows) == seen[5]
  assert again.get_state() == {'step': 6}
  other = data.window_batches(windows, 10, seed=4)
  assert which(next(other), windows) != seen[0]


def test_processes_share_a_batch(windows):
  whole = which(next(data.window_batches(windows, 10, seed=3)), windows)
  parts = [
    data.window_batches(windows, 10, seed=3, process_index=i, process_count=2)
    for i in range(2)
  ]
  assert sum((which(next(p), windows) for p in parts), []) == whole
  parts = [
    data.eval_window_batches(windows, 10, process_index=i, process_count=2)()
    for i in range(2)
  ]
  masks = [np.concatenate([b['mask'] for b in part]) for part in parts]
  assert [len(m) for m in masks] == [20, 20]
  assert sum(m.sum() for m in masks) == 36


@pytest.mark.parametrize('size', [0, 37])
def test_a_batch_must_fit(windows, size):
  with pytest.raises(ValueError, match=rf'batch_size={size}: must be'):
    data.window_batches(windows, size, seed=0)
  if size:
    with pytest.raises(ValueError, match=rf'batch_size={size}: must be'):
      data.eval_window_batches(windows, size, drop_last=True)


@pytest.mark.parametrize(
  'size, drop_last, batches, real',
  [
    (10, False, 4, 36),
    (10, True, 3, 30),
    (12, True, 3, 36),
    (12, False, 3, 36),
  ],
)
def test_an_evaluation_has_every_window_once(
  windows, size, drop_last, batches, real
):
  source = data.eval_window_batches(windows, size, drop_last=drop_last)
  for _ in range(2):  # it can be iterated again
    found = list(source())
    assert [len(b['target']) for b in found] == [size] * batches
    index = [
      i
      for batch in found
      for i, mask in zip(which(batch, windows), batch['mask'])
      if mask
    ]
    assert index == [*range(real)]


def test_errors_are_means_over_a_forecast():
  rng = np.random.default_rng(0)
  forecast, target = rng.standard_normal((2, 5, 3, 2))
  errors = data.forecast_errors(forecast, target)
  for i in range(5):
    e = (forecast[i] - target[i]).ravel()
    np.testing.assert_allclose(errors['mse'][i], sum(e * e) / 6)
    np.testing.assert_allclose(errors['mae'][i], sum(abs(e)) / 6)


# What is refused.


def set_line(number, text):
  return lambda lines: lines.__setitem__(number - 1, text)


def swap(lines):
  lines[5], lines[6] = lines[6], lines[5]


@pytest.mark.parametrize(
  'edit, message',
  [
    (
      set_line(1, 'time,a,b'),
      r"no column 'date' in its first line, only 'time', 'a', 'b'",
    ),
    (set_line(1, ''), r"no column 'date' in its first line, only nothing"),
    (
      set_line(5, '2016-07-01 00:45:00,1.5,n/a'),
      r"line 5, column 'b': 'n/a' is no finite number",
    ),
    (
      set_line(5, '2016-07-01 00:45:00,,2'),
      r"line 5, column 'a': '' is no finite number",
    ),
    (
      set_line(61, '2016-07-01 14:45:00,nan,2'),
      r"line 61, column 'a': 'nan' is no finite number",
    ),
    (
      set_line(5, '2016-07-01 00:45:00,1'),
      r'line 5: has 2 cells, the header 3',
    ),
    (
      set_line(5, '01.07.2016 00:45,1,2'),
      r"line 5, column 'date': '01.07.2016 00:45' is no date like 2016-07-01",
    ),
    (
      lambda lines: lines.pop(5),
      r'line 6: 2016-07-01 01:15:00 comes 0:30:00 after the row before, others '
      r'0:15:00: fill the gap, or pass allow_gaps=True',
    ),
    (
      lambda lines: lines.insert(1, '2016-06-30 00:00:00,1,2'),
      r'line 3: 2016-07-01 00:00:00 comes 1 day, 0:00:00 after',
    ),
    (
      lambda lines: lines.insert(2, '2016-07-01 00:07:00,1,2'),
      r'line 3: 2016-07-01 00:07:00 comes 0:07:00 after .* others 0:15:00',
    ),
    (
      swap,
      r'line 7: 2016-07-01 01:00:00 is not after 2016-07-01 01:15:00 of the '
      r'row before: sort the rows',
    ),
    (
      lambda lines: lines.insert(5, lines[5]),
      r'line 7: 2016-07-01 01:00:00 is not after 2016-07-01 01:00:00',
    ),
    (lambda lines: lines.__delitem__(slice(2, None)), '1 rows are no series'),
    (
      lambda lines: lines.__setitem__(
        slice(None), [line[:19].split(',')[0] for line in lines]
      ),
      "there is no variable beside 'date'",
    ),
  ],
)
def test_what_is_wrong_in_a_file_is_said_by_line(tmp_path, edit, message):
  path = write(tmp_path / 'x.csv', edit=edit)
  with pytest.raises(ValueError, match=message) as e:
    data.load_series(path)
  assert str(path) in str(e.value)


def test_gaps_are_allowed_on_demand_but_no_disorder(tmp_path):
  path = write(tmp_path / 'x.csv', edit=lambda lines: lines.pop(5))
  series = data.load_series(path, allow_gaps=True)
  assert len(series.values) == 59 and series.marks.shape[1] == 5
  write(path, edit=swap)
  with pytest.raises(ValueError, match='is not after'):
    data.load_series(path, allow_gaps=True)


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
  path = write(tmp_path / 'x.csv')
  with pytest.raises(ValueError, match=r"no column 'OT' .*'date', 'a', 'b'"):
    data.load_series(path, columns=('a', 'OT'))
  write(tmp_path / 'ETTm1.csv', columns=ETT_COLUMNS[:-1])
  with pytest.raises(ValueError, match=r"no column 'OT' .*'date', 'HUFL'"):
    data.load_series('ETTm1', data_dir=tmp_path)


def test_what_is_no_text_is_no_csv(tmp_path):
  path = tmp_path / 'x.csv'
  path.write_bytes(b'\x89PNG\r\n\x1a\n\xff\xfe')
  with pytest.raises(ValueError, match=r'x\.csv is no CSV file: .*utf-8'):
    data.load_series(path)


def test_another_file_is_no_ett(tmp_path):
  write(tmp_path / 'ETTh1.csv', columns=ETT_COLUMNS)
  message = r'rows are 0:15:00 apart, those of ETTh1 1:00:00'
  with pytest.raises(ValueError, match=message):
    data.load_series('ETTh1', data_dir=tmp_path)
  write(tmp_path / 'ETTh1.csv', 100, columns=ETT_COLUMNS, minutes=60)
  message = r'has 100 rows; the splits of ETTh1 take 14400'
  with pytest.raises(ValueError, match=message):
    data.load_series('ETTh1', data_dir=tmp_path)


def test_missing_ett_says_where_and_how(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError) as e:
    data.load_series('ETTm2', data_dir=tmp_path)
  for part in (
    f'no ETTm2.csv in {tmp_path}, {tmp_path}/ETT, {tmp_path.parent}/ETT.',
    f'curl --create-dirs -o {tmp_path}/ETT/ETTm2.csv https://',
    '--data_dir or $OIALR_DATA_DIR',
  ):
    assert part in str(e.value)
  monkeypatch.delenv('OIALR_DATA_DIR', raising=False)
  message = r"'ETTm2': no folder was given[^$]*curl .*\n.*\$OIALR_DATA_DIR"
  with pytest.raises(FileNotFoundError, match=message):
    data.load_series('ETTm2')


def test_a_missing_file_may_be_a_misspelt_name(tmp_path):
  message = r"'ETTm3' is neither one of ETTh1, .*, nor is there a file /.*ETTm3"
  with pytest.raises(FileNotFoundError, match=message):
    data.load_series('ETTm3', data_dir=tmp_path)


@pytest.mark.parametrize(
  'split, lengths, message',
  [
    ('valid', {}, r"split='valid': must be one of \('train', 'val', 'test'\)"),
    ('train', dict(seq_len=0), 'seq_len=0, .*needs a past'),
    ('train', dict(pred_len=0), 'pred_len=0: .*needs a past and a future'),
    ('train', dict(label_len=5), r'label_len=5, .*label_len in \[0, seq_len\]'),
    (
      'train',
      dict(seq_len=40),
      r"x\.csv': 'train' is rows 0 to 42, too few for windows of seq_len=40 and "
      r'pred_len=3 rows',
    ),
    ('val', dict(pred_len=7), "'val' is rows 42 to 48, too few .*pred_len=7"),
    ('test', dict(pred_len=13), "'test' is rows 48 to 60, too few"),
    ('val', dict(seq_len=43), "'val' is rows 42 to 48, too few .*seq_len=43"),
  ],
)
def test_windows_must_fit_into_a_split(tmp_path, split, lengths, message):
  series = data.load_series(write(tmp_path / 'x.csv'))
  with pytest.raises(ValueError, match=message):
    series.windows(split, **LENGTHS | lengths)


def test_the_longest_windows_fit_once(tmp_path):
  series = data.load_series(write(tmp_path / 'x.csv'))
  assert len(series.windows('train', **LENGTHS | dict(seq_len=39))) == 1
  assert (
    len(series.windows('val', **LENGTHS | dict(seq_len=42, pred_len=6))) == 1
  )
  assert len(series.windows('test', **LENGTHS | dict(pred_len=12))) == 1
