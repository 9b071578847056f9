"""Results of many runs: a row for each, kept while the others go on."""

from collections.abc import Callable, Iterable, Sequence
import json
import pathlib
import shutil
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils

from experiments import settings

Row = dict[str, Any]


class Rows:
  """The rows of result.json, and the settings that they are of.

  Both are written by the first process alone, the rows after every one of them.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    config: settings.Config,
    *,
    keys: Sequence[str],
    free: Sequence[str],
    resume: bool,
  ):
    """Writes config.json; with `resume`, reads the rows that are there.

    Else the runs of the settings before are deleted: resumed later, they would
    be taken for runs of these.

    Args:
      workdir: the folder of both files.
      config: the settings.
      keys: of a row: which run it is of.
      free: settings that may differ from those of the rows that are there.
      resume: keep these rows; else they are forgotten.

    Raises:
      ValueError: they are of other settings; says which.
    """
    self._file = workdir / 'result.json'
    self._keys = keys
    self._rows: list[Row] = []
    settings_file = workdir / 'config.json'
    if resume and settings_file.exists():
      _check_same(settings_file, config, free)
      if self._file.exists():
        self._rows = json.loads(self._file.read_text())['rows']
    if jax.process_index() == 0:
      workdir.mkdir(parents=True, exist_ok=True)
      if not resume and settings_file.exists():
        _delete_runs(workdir)
      if not self._rows:
        self._file.unlink(missing_ok=True)
      _write(settings_file, config.to_json_best_effort(indent=2))
    if jax.process_count() > 1:  # none may begin a run that the first deletes
      multihost_utils.sync_global_devices('rows')

  def __iter__(self):
    return iter(self._rows)

  def __len__(self) -> int:
    return len(self._rows)

  def find(self, *key: Any) -> Row | None:
    """The row with these values of the keys."""
    return next((row for row in self if self._of(row) == key), None)

  def add(self, row: Row):
    """Adds a row, or puts it in the place of that of the same run."""
    self._rows = [r for r in self if self._of(r) != self._of(row)] + [row]
    if jax.process_index() == 0:
      _write(self._file, json.dumps({'rows': self._rows}, indent=2))

  def fill(self, keys: Iterable[tuple[Any, ...]], run: Callable[..., Row]):
    """Adds the rows of these keys that are missing, each as `run(*key)`."""
    for key in keys:
      if self.find(*key) is None:
        self.add(run(*key))

  def _of(self, row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in self._keys)


def _check_same(
  file: pathlib.Path, config: settings.Config, free: Sequence[str]
):
  # As JSON has it: tuples are lists there.
  mine = json.loads(config.to_json_best_effort())
  theirs = json.loads(file.read_text())
  for key in {**mine, **theirs}:
    # What an older release did not write has been as it is by default.
    same = key not in theirs or mine.get(key) == theirs[key]
    if key not in free and not same:
      raise ValueError(
        f'{file}: {key} is {theirs.get(key)} there and {mine.get(key)} here; '
        'pass the same settings, or another --workdir.'
      )


def _delete_runs(workdir: pathlib.Path):
  found = [*workdir.glob('*/metrics.jsonl'), *workdir.glob('*/checkpoints')]
  for folder in sorted({path.parent for path in found}):
    logging.warning('%s: deleting the run that was there', folder)
    shutil.rmtree(folder)


def _write(file: pathlib.Path, text: str):
  """Renamed when it is written: a kill leaves what there was."""
  new = file.with_name(file.name + '.new')
  new.write_text(text)
  new.replace(file)
