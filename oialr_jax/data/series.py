"""Time series from CSV files: ETT's, or any with a 'date' column.

Read, split and standardised as by the programs of Informer and Autoformer, so
that errors compare with those that are published. Windows are not copied out: a
batch of them is gathered from the table when it is asked for, by NumPy, or on
the device, if the table lies there.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import itertools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from oialr_jax.data import batching
from oialr_jax.data import sources
from oialr_jax.data import tables

Array = np.ndarray | jax.Array
Batch = batching.Batch

SPLITS = ('train', 'val', 'test')
# Seconds from row to row of the ETT sets.
_ETT = {'ETTh1': 3600, 'ETTh2': 3600, 'ETTm1': 900, 'ETTm2': 900}
_ETT_COLUMNS = ('HUFL', 'HULL', 'MUFL', 'MULL', 'LUFL', 'LULL', 'OT')
# Of 30 days, to the end of each split; rows after them are not used.
_ETT_MONTHS = (12, 16, 20)
_ETT_URL = (
  'https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small'
)
_RESOLUTIONS = ('hour', 'minute')


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['values', 'marks', 'mean', 'std'],
  meta_fields=['name', 'columns', 'ends'],
)
@dataclasses.dataclass(frozen=True)
class Series:
  """A standardised table of variables over time.

  Attributes:
    values: `[rows, variables]`, float32: those of the file, minus `mean`, over
      `std`.
    marks: `[rows, features]`, float32, of `time_features`.
    mean: `[variables]`, over the rows of the training split.
    std: likewise; 1 where all those rows are the same.
    name: of the data set, or the path of the file.
    columns: names of the variables.
    ends: rows to the end of the training, validation and test split.
  """

  values: Array
  marks: Array
  mean: Array
  std: Array
  name: str
  columns: tuple[str, ...]
  ends: tuple[int, int, int]

  def windows(
    self,
    split: str,
    *,
    seq_len: int = 96,
    label_len: int = 48,
    pred_len: int = 96,
  ) -> 'Windows':
    """All windows of a split, each one row after the one before.

    The past of the first forecasts of 'val' and 'test' lies in the split before.

    Args:
      split: 'train', 'val' or 'test'.
      seq_len: rows of the past.
      label_len: rows at its end that the decoder is given.
      pred_len: rows to forecast.

    Raises:
      ValueError: a length makes no sense, or the split is too short for it.
    """
    if split not in SPLITS:
      raise ValueError(f'split={split!r}: must be one of {SPLITS}.')
    if seq_len < 1 or pred_len < 1 or not 0 <= label_len <= seq_len:
      raise ValueError(
        f'seq_len={seq_len}, label_len={label_len}, pred_len={pred_len}: a '
        'window needs a past and a future, and label_len in [0, seq_len].'
      )
    i = SPLITS.index(split)
    first = self.ends[i - 1] - seq_len if i else 0
    count = self.ends[i] - first - seq_len - pred_len + 1
    if count < 1 or first < 0:
      starts = (0, *self.ends)
      raise ValueError(
        f'{self.name!r}: {split!r} is rows {starts[i]} to {starts[i + 1]}, too '
        f'few for windows of seq_len={seq_len} and pred_len={pred_len} rows; '
        'pass shorter ones.'
      )
    return Windows(self, seq_len, label_len, pred_len, first, count)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['series'],
  meta_fields=['seq_len', 'label_len', 'pred_len', 'first', 'count'],
)
@dataclasses.dataclass(frozen=True)
class Windows:
  """Windows of a table: seq_len rows of the past, then pred_len to forecast.

  Attributes:
    series: the table.
    seq_len: rows of the past.
    label_len: rows at its end that the decoder is given.
    pred_len: rows to forecast.
    first: the row at which window 0 starts; window i starts i rows after it.
    count: number of windows.
  """

  series: Series
  seq_len: int
  label_len: int
  pred_len: int
  first: int
  count: int

  def __len__(self) -> int:
    return self.count

  def take(self, index: Array) -> Batch:
    """A batch of these windows: what Autoformer takes, and the 'target'.

    It can be jitted, the windows being an argument like the index.

    Args:
      index: `[batch]`, of windows.

    Returns:
      'x_enc' `[batch, seq_len, variables]`, the past; 'x_dec' `[batch, label_len
      + pred_len, variables]`, the end of the past, then zeros; 'x_mark_enc' and
      'x_mark_dec', the time features of both; 'target' `[batch, pred_len,
      variables]`.

    Raises:
      IndexError: there is no such window, which is not seen in a jax.Array.
    """
    if isinstance(index, np.ndarray) and index.size:
      if index.min() < 0 or index.max() >= self.count:
        raise IndexError(f'index {index}: there are {self.count} windows.')
    values, marks = self.series.values, self.series.marks
    start = self.first + index[:, None]
    past = start + np.arange(self.seq_len)
    ahead = start + np.arange(self.seq_len, self.seq_len + self.pred_len)
    known = past[:, self.seq_len - self.label_len :]
    xp = jnp if isinstance(values, jax.Array) else np
    return {
      'x_enc': values[past],
      'x_mark_enc': marks[past],
      'x_dec': xp.pad(values[known], ((0, 0), (0, self.pred_len), (0, 0))),
      'x_mark_dec': marks[xp.concatenate([known, ahead], axis=1)],
      'target': values[ahead],
    }

  def on_device(self) -> 'Windows':
    """The same on the default device, where batches then are made."""
    return dataclasses.replace(self, series=jax.device_put(self.series))


def load_series(
  name: str | os.PathLike,
  *,
  data_dir: str | os.PathLike | None = None,
  columns: Sequence[str] | None = None,
  resolution: str | None = None,
  allow_gaps: bool = False,
) -> Series:
  """Reads a time series from a CSV file with a header and a 'date' column.

  An ETT set is split into 12, 4 and 4 months of 30 days, any other file into
  70, 10 and 20 % of its rows. Dates are like 2016-07-01 00:15:00.

  Args:
    name: 'ETTh1', 'ETTh2', 'ETTm1' or 'ETTm2'; or the path of a `.csv` file,
      which is split as any other, whatever it is called.
    data_dir: where `NAME.csv` of an ETT set is: in this folder, in `ETT` in it,
      or in `ETT` beside it; by default that of the environment variable
      OIALR_DATA_DIR.
    columns: the variables, in this order; by default all but 'date', in that of
      the file.
    resolution: of the time features, 'hour' or 'minute'; by default 'hour' if
      rows are whole hours apart.
    allow_gaps: take rows as equally spaced, whatever their dates, as Informer
      and Autoformer do.

  Raises:
    FileNotFoundError: it is not there; says where it was looked for and how to
      get it.
    ValueError: there is no such data set, or the file is not as described; says
      in which line or column.
  """
  known = os.fspath(name) in _ETT
  path = _ett_path(name, data_dir) if known else _csv_path(name)
  if known and columns is None:
    columns = _ETT_COLUMNS
  table = tables.read(path, columns)
  step = tables.step(table, allow_gaps=allow_gaps)
  ends = _ett_ends(name, table, step) if known else _shares(len(table.dates))
  if resolution is None:
    resolution = 'minute' if step % 3600 else 'hour'
  train = table.values[: ends[0]]
  mean, std = train.mean(0), train.std(0)
  std = np.where(std > 0, std, 1.0)
  return Series(
    values=((table.values - mean) / std).astype(np.float32),
    marks=time_features(table.dates, resolution),
    mean=mean,
    std=std,
    name=os.fspath(name),
    columns=table.columns,
    ends=ends,
  )


def time_features(dates: np.ndarray, resolution: str) -> np.ndarray:
  """What a date says of day, week, month and year, each from -0.5 to 0.5.

  Args:
    dates: `[rows]`, datetime64.
    resolution: 'hour' for hour of the day, day of the week (from Monday), of
      the month and of the year; 'minute' for minute of the hour and these.

  Returns:
    `[rows, 4]` or `[rows, 5]`, float32, in this order.

  Raises:
    ValueError: there is no such resolution.
  """
  if resolution not in _RESOLUTIONS:
    raise ValueError(
      f'resolution={resolution!r}: must be one of {_RESOLUTIONS}.'
    )
  minute, hour, day, month, year = (dates.astype(f'M8[{u}]') for u in 'mhDMY')
  since = lambda part, whole: (part - whole.astype(part.dtype)).astype(int)
  features = [
    since(minute, hour) / 59,
    since(hour, day) / 23,
    # 1970 began on a Thursday.
    (day.astype(int) + 3) % 7 / 6,
    since(day, month) / 30,
    since(day, year) / 365,
  ]
  features = features[resolution == 'hour' :]
  return (np.stack(features, axis=1) - 0.5).astype(np.float32)


def window_batches(
  windows: Windows,
  batch_size: int,
  *,
  seed: int,
  start: int = 0,
  process_index: int | None = None,
  process_count: int | None = None,
) -> batching.Batches:
  """Endless batches for training: every epoch is a new permutation.

  The same seed gives the same batches, whatever the step to start at and however
  many processes share them. The remainder of an epoch that fills no batch is
  left out of it.

  Args:
    windows: of the training split.
    batch_size: of all processes together.
    seed: of the order.
    start: the step of the first batch.
    process_index: which part of every batch to give; by default JAX's.
    process_count: of how many parts.

  Raises:
    ValueError: the batch is larger than the split, or does not divide.
  """
  batching.check_batch_size(batch_size, len(windows))
  part = batching.part(batch_size, process_index, process_count)

  def batch(step: int) -> Batch:
    _, index = batching.order(len(windows), batch_size, seed=seed, step=step)
    return windows.take(index[part])

  return batching.Batches(lambda step: map(batch, itertools.count(step)), start)


def eval_window_batches(
  windows: Windows,
  batch_size: int,
  *,
  drop_last: bool = False,
  process_index: int | None = None,
  process_count: int | None = None,
) -> Callable[[], Iterator[Batch]]:
  """All windows once, in order; the last batch is padded, with 'mask' 0.

  Args:
    windows: of any split.
    batch_size: of all processes together.
    drop_last: leave out the last windows that fill no batch. Informer and
      Autoformer do, with batches of 32, whence their errors are of a few
      windows less.
    process_index: which part of every batch to give; by default JAX's.
    process_count: of how many parts.

  Raises:
    ValueError: the batch does not divide, or drop_last leaves nothing.
  """
  part = batching.part(batch_size, process_index, process_count)
  full, rest = divmod(len(windows), batch_size)
  if drop_last:
    batching.check_batch_size(batch_size, len(windows))

  def iterate():
    for step in range(full if drop_last or not rest else full + 1):
      index, mask = batching.padded(len(windows), batch_size, step)
      yield windows.take(index[part]) | {'mask': mask[part]}

  return iterate


def forecast_errors(forecast: Array, target: Array) -> dict[str, Array]:
  """Mean squared and mean absolute error of every forecast.

  All forecasts being of one size, means of these are those over all numbers.

  Args:
    forecast: `[batch, pred_len, variables]`, standardised.
    target: likewise.

  Returns:
    'mse' and 'mae', `[batch]`.
  """
  error = forecast - target
  return {
    'mse': (error**2).mean((1, 2)),
    'mae': abs(error).mean((1, 2)),
  }


def _ett_path(name: str, data_dir: str | os.PathLike | None) -> pathlib.Path:
  data_dir = data_dir or os.environ.get(sources.DATA_DIR)
  if not data_dir:
    raise FileNotFoundError(
      f'{name!r}: no folder was given to look for it in.\n'
      f'{_how_to_get(name, "FOLDER")}'
    )
  folder = pathlib.Path(data_dir).expanduser().absolute()
  folders = (folder, folder / 'ETT', folder.parent / 'ETT')
  for path in (f / f'{name}.csv' for f in folders):
    if path.is_file():
      return path
  raise FileNotFoundError(
    f'{name!r}: there is no {name}.csv in {", ".join(map(str, folders))}.\n'
    f'{_how_to_get(name, folder)}'
  )


def _how_to_get(name: str, folder: str | os.PathLike) -> str:
  return (
    'Get it (CC BY-ND 4.0) where there is a network with\n'
    f'  curl --create-dirs -o {folder}/ETT/{name}.csv {_ETT_URL}/{name}.csv\n'
    f'and pass the folder with --data_dir or ${sources.DATA_DIR}.'
  )


def _csv_path(name: str | os.PathLike) -> pathlib.Path:
  path = pathlib.Path(name).expanduser()
  if not path.is_file():
    raise FileNotFoundError(
      f'{os.fspath(name)!r} is neither one of {", ".join(_ETT)}, nor is there '
      f'a file {path.absolute()}.'
    )
  return path


def _ett_ends(
  name: str, table: tables.Table, step: int
) -> tuple[int, int, int]:
  if step != _ETT[name]:
    raise ValueError(
      f'{table.path}: rows are {tables.duration(step)} apart, those of {name} '
      f'{tables.duration(_ETT[name])}; is it another file?'
    )
  month = 30 * 24 * 3600 // step
  train, val, test = (months * month for months in _ETT_MONTHS)
  if len(table.dates) < test:
    raise ValueError(
      f'{table.path} has {len(table.dates)} rows; the splits of {name} take '
      f'{test}. Download it again.'
    )
  return train, val, test


def _shares(rows: int) -> tuple[int, int, int]:
  return int(rows * 0.7), rows - int(rows * 0.2), rows
