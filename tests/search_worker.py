"""A worker of `search_test`, to be killed.

Command: python -m tests.search_worker URL LOG [HELD]

Trials of a sum that takes its time; LOG has a line for every one that is begun.
From trial HELD on they never end.
"""

import pathlib
import sys
import threading
import time

import optuna

from experiments import trials

COUNT, SECONDS = 6, 0.3
SPACE = {'x': optuna.distributions.FloatDistribution(0, 1)}


def worker(url: str, **changes) -> trials.Trials:
  storage = trials.storage(url)
  study = optuna.create_study(
    storage=storage,
    study_name='study',
    directions=['minimize', 'minimize'],
    sampler=trials.Sampler(0, {'x': 0.5}),
    load_if_exists=True,
  )
  known = dict(count=COUNT, grace=1.0) | changes
  return trials.Trials(study, storage, SPACE, **known)


def main(url: str, log: str, held: str | None = None):
  def objective(trial: optuna.Trial) -> tuple[float, float]:
    with pathlib.Path(log).open('a') as file:
      file.write(f'{trial.number} {trial.params["x"]}\n')
    if held is not None and trial.number >= int(held):
      threading.Event().wait()
    time.sleep(SECONDS)
    return trial.params['x'], 1 - trial.params['x']

  worker(url, grace=3.0).run(objective)  # signs are late on a busy machine


if __name__ == '__main__':
  main(*sys.argv[1:])
