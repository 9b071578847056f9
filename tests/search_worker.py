"""A worker of `search_test`, to be killed: python -m tests.search_worker URL LOG.

Trials of a sum that takes its time; LOG has a line for every one that is begun.
"""

import pathlib
import sys
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


def main(url: str, log: str):
  def objective(trial: optuna.Trial) -> tuple[float, float]:
    with pathlib.Path(log).open('a') as file:
      file.write(f'{trial.number} {trial.params["x"]}\n')
    time.sleep(SECONDS)
    return trial.params['x'], 1 - trial.params['x']

  worker(url).run(objective)


if __name__ == '__main__':
  main(*sys.argv[1:])
