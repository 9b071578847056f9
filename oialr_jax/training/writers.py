"""Where the records of a run are written to: a file, TensorBoard, a service.

Nothing is opened before `on_start`: of several processes only the first one
starts its writers, and the others must not touch its files.
"""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import statistics
import time
from typing import Any

import numpy as np

from oialr_jax.training import callbacks

Record = callbacks.Record


class Jsonl(callbacks.Callback):
  """Writes the records to a file, a JSON object a line.

  Where a run goes on, the lines of the steps that are done stay, without what
  was damaged: the file is the run's records, line by line.
  """

  def __init__(self, path: str | pathlib.Path):
    self._path = pathlib.Path(path)
    self._file = None

  def on_start(self, start: callbacks.Start):
    self.close()
    self._path.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, and then in its place: a process may be killed at any moment.
    anew = self._path.with_name(f'{self._path.name}.tmp')
    anew.write_text(''.join(map(_line, start.records)))
    os.replace(anew, self._path)
    self._file = open(self._path, 'a', buffering=1)

  def on_record(self, record: Record):
    self._file.write(_line(record))

  def close(self):
    if self._file is not None:
      self._file.close()


class Writer(callbacks.Callback):
  """Shows a run in a service: every number of its records, and pictures.

  A subclass says how, by `open`, `numbers`, `picture` and `close`.

  Args:
    pictures_every: seconds from one drawing of ranks and stability, which is
      done at events, to the next; a run that is shorter has none. A drawing of
      75 layers takes 3 seconds.
  """

  def __init__(self, pictures_every: float = 300.0):
    self._pictures_every = pictures_every

  def open(self, start: callbacks.Start):
    """Begins; again where a run goes back to an earlier step."""

  def numbers(self, values: Mapping[str, float], step: int):
    """Takes numbers by name, as 'train/loss'."""

  def picture(self, name: str, pixels: np.ndarray, step: int):
    """Takes a picture `[height, width, 3]` of bytes."""

  def on_start(self, start: callbacks.Start):
    self._records = list(start.records)
    self._started = self._drawn = time.monotonic()
    self.open(start)

  def on_record(self, record: Record):
    self._records.append(record)
    kind, step = record['kind'], record['step']
    values = callbacks.numbers(record)
    if record.get('ranks'):
      values['mean_rank'] = statistics.fmean(record['ranks'].values())
    self.numbers({f'{kind}/{name}': x for name, x in values.items()}, step)
    if self._due(kind):
      for name, pixels in pictures(self._records).items():
        self.picture(name, pixels, step)
      self._drawn = time.monotonic()

  def _due(self, kind: str) -> bool:
    since = {'event': self._drawn, 'end': self._started}.get(kind)
    if since is None:
      return False
    return time.monotonic() - since >= self._pictures_every


class TensorBoard(Writer):
  """Writes event files for TensorBoard.

  Where a run goes on, those of the interrupted one are shown up to there; where
  it begins, those of another one in the folder are deleted.
  """

  def __init__(self, folder: str | pathlib.Path, pictures_every: float = 300.0):
    super().__init__(pictures_every)
    self._folder = pathlib.Path(folder)
    self._writer = None

  def open(self, start: callbacks.Start):
    # Not clu.metric_writers: those import TensorFlow.
    import tensorboardX

    self.close()
    if not start.first:
      for old in self._folder.glob('events.out.tfevents.*'):
        old.unlink()
    self._writer = tensorboardX.SummaryWriter(
      str(self._folder), purge_step=start.first + 1 if start.first else None
    )

  def numbers(self, values: Mapping[str, float], step: int):
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def picture(self, name: str, pixels: np.ndarray, step: int):
    self._writer.add_image(name, pixels, step, dataformats='HWC')

  def close(self):
    if self._writer is not None:
      self._writer.close()


class WandB(Writer):
  """Shows the run in Weights & Biases.

  Args:
    project: where the run belongs.
    pictures_every: see `Writer`.
    **init: for `wandb.init`, such as `name`, `config`, `mode='offline'`; a run
      that may be interrupted wants an `id` and `resume='allow'`.

  Raises:
    ImportError: wandb is not installed; says how to install it.
  """

  def __init__(
    self, project: str, *, pictures_every: float = 300.0, **init: Any
  ):
    super().__init__(pictures_every)
    try:
      import wandb
    except ImportError as e:
      raise ImportError(
        "training.WandB wants the package wandb: pip install 'oialr_jax[wandb]'"
      ) from e
    self._wandb = wandb
    self._init = {'project': project, **init}
    self._run = None

  def open(self, start: callbacks.Start):
    if self._run is None:
      self._run = self._wandb.init(**self._init)
      # Not W&B's own steps, which may not go back.
      self._run.define_metric('step')
      self._run.define_metric('*', step_metric='step')

  def numbers(self, values: Mapping[str, float], step: int):
    self._run.log({'step': step, **values})

  def picture(self, name: str, pixels: np.ndarray, step: int):
    self._run.log({'step': step, name: self._wandb.Image(pixels)})

  def close(self):
    if self._run is not None:
      ended = any(r['kind'] == 'end' for r in self._records[-1:])
      self._run.finish(exit_code=0 if ended else 1)


def _line(record: Record) -> str:
  return json.dumps(record) + '\n'


def pictures(records: Sequence[Record]) -> dict[str, np.ndarray]:
  """Ranks and stability as far as they are known, pixels `[h, w, 3]` by name."""
  # Matplotlib takes its time to load, and short runs draw nothing.
  from matplotlib.backends import backend_agg

  from oialr_jax.report import plots

  figures = plots.of_run(records, ('ranks', 'stability'))
  drawn = {}
  for name, figure in sorted(figures.items()):
    canvas = backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    drawn[name] = np.array(canvas.buffer_rgba())[..., :3]
  return drawn
