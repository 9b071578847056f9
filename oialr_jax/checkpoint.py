"""Checkpoints: arrays by Orbax, what they mean by a manifest, sealed by digests.

A run's folder holds one folder a step. Orbax writes it under another name and
renames it when it is complete; then `digests.json`, the SHA-256 of each of its
files, is put into it as the seal. What has no seal was not finished, what does not
fit its seal is damaged: neither is ever loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import dataclasses
import hashlib
import json
import os
import pathlib
import threading
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

PyTree = Any
Manifest = dict[str, Any]

_SEAL = 'digests.json'
# Orbax tells nobody when a checkpoint has got its name: its callback comes before.
_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Keep:
  """Which checkpoints stay.

  Attributes:
    last: so many of the newest; at least two, for the newest may turn out
      damaged, and the one before it goes before it has its seal.
    best: so many of the best by `metric`, besides; of those that were evaluated
      at their step.
    metric: the name of a metric of the evaluations.
    highest: whether the best is the highest value, else the lowest.

  Raises:
    ValueError: a value is out of range.
  """

  last: int = 2
  best: int = 0
  metric: str = 'loss'
  highest: bool = False

  def __post_init__(self):
    if self.last < 2:
      raise ValueError(
        f'last={self.last}: must be at least 2. Of one alone nothing is left '
        'where a run is killed after the next one is written and before it is '
        'sealed.'
      )
    if self.best < 0:
      raise ValueError(f'best={self.best}: must not be negative.')

  def policy(self) -> checkpoint_managers.PreservationPolicy:
    """For Orbax."""
    last = checkpoint_managers.LatestN(self.last)
    if not self.best:
      return last
    best = checkpoint_managers.BestN(
      get_metric_fn=lambda metrics: metrics[self.metric],
      reverse=not self.highest,
      n=self.best,
      keep_checkpoints_without_metrics=False,
    )
    return checkpoint_managers.AnyPreservationPolicy([last, best])


class Checkpoints:
  """The checkpoints of one run.

  Args:
    folder: of the run's checkpoints; it is made where it is missing.
    keep: which of them stay.
  """

  def __init__(self, folder: str | os.PathLike, keep: Keep = Keep()):  # noqa: B008
    self.folder = pathlib.Path(folder).absolute()
    self._keep = keep
    self._sealer = futures.ThreadPoolExecutor(1, thread_name_prefix='seal')
    self._sealing: futures.Future[None] | None = None
    self._written = threading.Event()  # what was saved last, or it failed
    self._manager = ocp.CheckpointManager(
      self.folder,
      item_names=('arrays', 'manifest'),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=keep.policy(),
        best_fn=(lambda m: m[keep.metric]) if keep.best else None,
        cleanup_tmp_directories=True,
      ),
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_):
    self.close()

  def save(
    self,
    step: int,
    arrays: PyTree,
    manifest: Manifest,
    metrics: Mapping[str, float] | None = None,
  ):
    """Begins to write a checkpoint; the arrays may be donated afterwards.

    It is sealed as soon as it is written, by a thread.

    Args:
      step: optimiser steps done.
      arrays: pytree of arrays.
      manifest: what can be written as JSON.
      metrics: of an evaluation of these arrays, for `Keep.best`.

    Raises:
      ValueError: metrics lack the one by which the best are kept.
      OSError: this or the checkpoint before could not be written, as on a full
        disk. The ones before are as they were.
    """
    wanted = self._keep.metric
    if metrics and self._keep.best and wanted not in metrics:
      raise ValueError(
        f'keep.metric={wanted!r}: evaluations have {sorted(_numbers(metrics))}.'
      )
    # The one before has to be sealed before this one takes its place.
    self.wait()
    try:
      # What an interrupted run had begun to write, or what is damaged.
      for old in self._manager.all_steps():
        if old >= step:
          self._manager.delete(old)
      self._manager.save(
        step,
        args=ocp.args.Composite(
          arrays=ocp.args.StandardSave(arrays),
          manifest=ocp.args.JsonSave(manifest),
        ),
        metrics=_numbers(metrics) if metrics else None,
        force=True,
      )
    except Exception as e:
      raise self._failed(e) from e
    if jax.process_index() == 0:
      self._written.clear()
      self._sealing = self._sealer.submit(self._seal, step)

  def wait(self):
    """Until everything is written and sealed.

    Raises:
      OSError: it could not be.
    """
    try:
      self._manager.wait_until_finished()
      self._written.set()
      if self._sealing is not None:
        self._sealing.result()
    except Exception as e:
      raise self._failed(e) from e
    finally:
      self._written.set()
      self._sealing = None

  def close(self):
    """Waits, and ends Orbax's threads."""
    try:
      self.wait()
    finally:
      self._sealer.shutdown()
      self._manager.close()

  def clear(self):
    """Deletes all checkpoints: those of another run, in the same folder."""
    steps = self._manager.all_steps()
    if steps:
      logging.warning('%s: deleting the checkpoints of %s', self.folder, steps)
    for step in steps:
      self._manager.delete(step)

  def steps(self) -> list[int]:
    """Of the sealed checkpoints, the newest first."""
    found = [
      int(path.parent.name)
      for path in self.folder.glob(f'*/{_SEAL}')
      if path.parent.name.isdigit()
    ]
    return sorted(found, reverse=True)

  def restore(
    self, like: Callable[[Manifest], PyTree], step: int | None = None
  ) -> tuple[int, PyTree, Manifest] | None:
    """Reads the newest checkpoint that is intact.

    Args:
      like: makes of a manifest the shapes, dtypes and shardings to restore to.
      step: of the checkpoint; by default that of the newest intact one.

    Returns:
      The step, the arrays and the manifest; None where nothing was ever saved.

    Raises:
      ValueError: no checkpoint is intact, or that of the step is not; `like`
        says that the manifest is of another run.
    """
    steps = self.steps() if step is None else [step]
    at, damaged = _agreed(self._intact(steps))
    if damaged:
      raise ValueError(
        f'{self.folder}: no checkpoint is intact: {damaged}. Copy one back, or '
        'start in another folder.'
      )
    if at is None:
      return None
    manifest = self._read(at, manifest=ocp.args.JsonRestore()).manifest
    arrays = ocp.args.StandardRestore(like(manifest))
    return at, self._read(at, arrays=arrays).arrays, manifest

  def _intact(self, steps: Sequence[int]) -> tuple[int | None, str]:
    """The first of the steps that is intact; else what is wrong with all."""
    damaged = []
    for step in steps if jax.process_index() == 0 else ():
      why = self._damage(step)
      if not why:
        return step, ''
      logging.warning(
        'checkpoint %s is damaged: %s', self.folder / f'{step}', why
      )
      damaged.append(f'{step} ({why})')
    return None, ', '.join(damaged)

  def _read(self, step: int, **items: Any) -> Any:
    return self._manager.restore(step, args=ocp.args.Composite(**items))

  def _seal(self, step: int):
    """Writes the digests of what was saved here, once Orbax has completed it.

    Nothing else gets a seal: nobody knows whether it still is what was saved.
    """
    path = self.folder / str(step)
    complete = lambda: path.exists() and ocp.utils.is_checkpoint_finalized(path)
    while not complete():
      if self._written.wait(_POLL_SECONDS) and not complete():
        return  # it could not be written
    temporary = path / f'{_SEAL}.tmp'
    temporary.write_text(json.dumps(_digests(path)))
    os.replace(temporary, path / _SEAL)

  def _damage(self, step: int) -> str:
    """What is wrong with a checkpoint; '' if nothing is."""
    path = self.folder / str(step)
    try:
      sealed = json.loads((path / _SEAL).read_text())
      found = _digests(path)
    except (OSError, ValueError) as e:
      return f'{type(e).__name__}: {e}'
    missing = sealed.keys() - found.keys()
    if missing:
      return f'{min(missing)} is missing'
    changed = [name for name, digest in sealed.items() if found[name] != digest]
    return f'{min(changed)} has changed' if changed else ''

  def _failed(self, error: Exception) -> OSError:
    steps = self.steps()
    last = (
      f'the last good one is of step {steps[0]}' if steps else 'there is none'
    )
    return OSError(
      f'{self.folder}: a checkpoint could not be written ({error}); {last}.'
    )


def _agreed(found: tuple[int | None, str]) -> tuple[int | None, str]:
  """What the first process found, in all of them."""
  if jax.process_count() == 1:
    return found
  text = np.zeros(8192, np.uint8)
  mine = json.dumps([found[0], found[1][:1000]]).encode()
  text[: len(mine)] = np.frombuffer(mine, np.uint8)
  text = multihost_utils.broadcast_one_to_all(text)
  return tuple(json.loads(bytes(text).rstrip(b'\0')))


def _digests(folder: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file below, by its path."""
  found = {}
  for path in sorted(folder.rglob('*')):
    if path.is_file() and not path.name.startswith(_SEAL):
      with open(path, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
      found[path.relative_to(folder).as_posix()] = digest
  return found


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
  return {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
