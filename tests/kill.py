"""Kills a training run at random moments, and sees that it ends the same.

  python -m tests.kill --kills=20

A process trains the small network of the tests with a checkpoint after every
step, and is killed by SIGKILL at a random moment; the next one resumes. The
moments are spread over the whole run. After so many kills one is left to
finish, and its weights, records and ranks are compared with those of a run that
was never interrupted.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

import oialr_jax as oialr
from oialr_jax import training
from tests import resume_test

ROOT = pathlib.Path(__file__).parent.parent
# A transition, three updates, and what they make worth slicing.
STEPS = 60
SCHEDULE = oialr.Schedule(
  steps=STEPS, delay=15, every=12, cutoff=0.4, progressive=1.0
)
# Seconds: of a step, and the longest from the step of a kill to the kill.
PAUSE, LIFE = 0.02, 0.2


class Slow(training.Callback):
  """Says how far training is, and takes its time."""

  def __init__(self, progress: pathlib.Path):
    self._progress = progress

  def on_step(self, step):
    self._progress.write_text(str(step))
    time.sleep(PAUSE)


def digest(result) -> dict:
  """What must be the same: all bytes of the state, the losses, the events."""
  state = hashlib.sha256()
  for leaf in jax.tree.leaves(result.state):
    state.update(np.asarray(leaf).tobytes())
  losses = [loss for r in result.select('train') for loss in r['losses']]
  kinds = [(r['kind'], r['step']) for r in result.records]
  kinds = [kind for kind in kinds if kind[0] != 'train']
  return {'state': state.hexdigest(), 'losses': losses, 'records': kinds}


def fit(workdir: pathlib.Path | None = None, **options):
  return resume_test.fit(workdir, steps=STEPS, schedule=SCHEDULE, **options)


def child(workdir: pathlib.Path):
  """One process: starts or resumes, and writes its digest at the end."""
  slow = Slow(workdir / 'progress')
  result = fit(workdir, checkpoint_every=1, resume=True, callbacks=[slow])
  (workdir / 'digest.json').write_text(json.dumps(digest(result)))


def killed(kills: int, seed: int) -> tuple[list[str], dict]:
  """What was happening at every kill, and the digest of the last run."""
  rng = random.Random(seed)
  steps = sorted(rng.choices(range(1, STEPS), k=kills))
  moments = []
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder)
    command = [sys.executable, '-m', 'tests.kill', '--workdir', folder]
    while True:
      (workdir / 'progress').write_text('0')
      process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True
      )
      while len(moments) < kills and process.poll() is None:
        if _progress(workdir) >= steps[len(moments)]:
          time.sleep(rng.uniform(0, LIFE))
          process.send_signal(signal.SIGKILL)
          break
        time.sleep(0.001)
      _, errors = process.communicate()
      if process.returncode == -signal.SIGKILL:
        moments.append(_moment(workdir))
        continue
      assert process.returncode == 0, errors
      return moments, json.loads((workdir / 'digest.json').read_text())


def _progress(workdir: pathlib.Path) -> int:
  # Empty at the moment at which it is written.
  return int((workdir / 'progress').read_text() or 0)


def _moment(workdir: pathlib.Path) -> str:
  """What the folder of a run that was killed says."""
  folders = {p.name for p in (workdir / 'checkpoints').iterdir()}
  sealed = {p.parent.name for p in workdir.glob('checkpoints/*/digests.json')}
  newest = max(map(int, sealed), default='none')
  writing = ', '.join(sorted(folders - sealed)) or 'nothing'
  return (
    f'in step {_progress(workdir) + 1}, newest checkpoint {newest}, being '
    f'written: {writing}'
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--workdir', help='of a child; used by this script')
  arguments = parser.parse_args()
  if arguments.workdir:
    child(pathlib.Path(arguments.workdir))
    return
  moments, found = killed(arguments.kills, arguments.seed)
  for i, moment in enumerate(moments, 1):
    print(f'kill {i}: {moment}')
  expected = json.loads(json.dumps(digest(fit())))
  for name, value in expected.items():
    print(f'{name}: {"the same" if found[name] == value else "DIFFERS"}')
  sys.exit(found != expected)


if __name__ == '__main__':
  os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
  main()
