"""Trials of an Optuna study, each done once, by workers that may be killed.

Trials 0 to N - 1 are done, by their numbers, and no others. A worker takes one
that waits, or makes the next; a number beyond N is put back to wait. Meanwhile
it gives signs of life. A trial whose signs cease is put back, with its number
and its parameters, for whoever comes next; of a trial that two finish, since one
was thought dead, the first result counts. All of that are changes of a trial's
state, which are atomic in every storage of Optuna.

Optuna's own heartbeats want a database, know nothing of a trial that was killed
before its first one, and put a copy back under another number in two steps: a
kill between them loses it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import threading
import time
from typing import Any

from absl import logging
import optuna
from optuna.trial import TrialState

Objective = Callable[[optuna.Trial], Sequence[float]]
Space = Mapping[str, optuna.distributions.BaseDistribution]

DONE = (TrialState.COMPLETE, TrialState.PRUNED)
_SIGN = 'sign of life'
# Signs in the time after which there should have been one; seconds between two
# looks at what others do.
_SIGNS, _PAUSE = 5, 0.5


def storage(url: str) -> optuna.storages.BaseStorage:
  """Where trials are kept.

  Args:
    url: of a database, as SQLAlchemy takes it ('sqlite:///FILE',
      'mysql://...'), or 'journal:FILE', a file that several machines share.
  """
  kind, _, file = url.partition(':')
  if kind == 'journal':
    backend = optuna.storages.journal.JournalFileBackend(file)
    return optuna.storages.JournalStorage(backend)
  # Seconds to wait while another worker writes.
  patient = {'connect_args': {'timeout': 60}} if kind == 'sqlite' else None
  return optuna.storages.RDBStorage(url, engine_kwargs=patient)


class Trials:
  """The first `count` trials of a study, for one of its workers to do."""

  def __init__(
    self,
    study: optuna.Study,
    storage: optuna.storages.BaseStorage,
    space: Space,
    *,
    count: int,
    grace: float,
  ):
    """Does nothing yet.

    Args:
      study: of any number of objectives.
      storage: that it is in.
      space: distributions of all parameters.
      count: trials to do, by all workers together.
      grace: seconds without a sign of life after which a trial is put back.
    """
    self._study, self._storage, self._space = study, storage, space
    self._count, self._grace = count, grace
    self._study_id = storage.get_study_id_from_name(study.study_name)
    self._seen: dict[int, tuple[Any, float]] = {}

  def run(self, objective: Objective):
    """Does trials until all are done, by this worker or by others.

    An error ends the worker, and its trial waits for another one.

    Args:
      objective: returns the values of a trial, or raises `TrialPruned`.
    """
    for trial in self._taken():
      values, state = None, TrialState.PRUNED
      try:
        with self._putting_back(trial.number), self._giving_signs(trial):
          try:
            values, state = objective(trial), TrialState.COMPLETE
          except optuna.TrialPruned as e:
            trial.set_user_attr('stopped', str(e))
        if self._get(trial.number).state == TrialState.WAITING:
          logging.warning('trial %s was thought dead', trial.number)
        else:
          self._study.tell(trial, values, state=state, skip_if_finished=True)
      except optuna.exceptions.UpdateFinishedTrialError:
        # What the objective notes, too, comes after another worker's result, and
        # that may come between the looking and the telling.
        logging.warning('trial %s was done by another', trial.number)

  def _taken(self) -> Iterator[optuna.Trial]:
    """Trials for this worker, one after the other."""
    while True:
      found = self._study.get_trials(deepcopy=False)[: self._count]
      if sum(t.state in DONE for t in found) == self._count:
        return
      self._put_back_the_dead(found)
      waiting = any(t.state == TrialState.WAITING for t in found)
      if not waiting and len(found) == self._count:
        time.sleep(_PAUSE)  # others are at work, or dead
        continue
      trial = self._study.ask(self._space)
      if trial.number < self._count:
        yield trial
      else:
        self._put_back(trial.number)

  def _put_back_the_dead(self, found: Sequence[optuna.trial.FrozenTrial]):
    # By one's own clock: those of several machines may differ.
    now, before = time.monotonic(), self._seen
    self._seen = {}
    for trial in found:
      if trial.state != TrialState.RUNNING:
        continue
      sign = trial.datetime_start, trial.user_attrs.get(_SIGN)
      last, since = before.get(trial.number, (None, now))
      self._seen[trial.number] = sign, since if sign == last else now
      if sign == last and now - since > self._grace:
        logging.warning('trial %s is put back: no sign of life', trial.number)
        self._put_back(trial.number)

  def _put_back(self, number: int):
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
      self._storage.set_trial_state_values(self._id(number), TrialState.WAITING)

  @contextlib.contextmanager
  def _putting_back(self, number: int):
    try:
      yield
    except BaseException:
      self._put_back(number)
      raise

  @contextlib.contextmanager
  def _giving_signs(self, trial: optuna.Trial):
    ended = threading.Event()

    def give():
      count = 0
      while not ended.wait(self._grace / _SIGNS if count else 0):
        count += 1
        try:
          trial.set_user_attr(_SIGN, count)
        except Exception as e:  # of any storage: it may be back for the next
          logging.warning('no sign of life of trial %s: %s', trial.number, e)
      self._storage.remove_session()

    thread = threading.Thread(target=give)
    thread.start()
    try:
      yield
    finally:
      ended.set()
      thread.join()

  def _id(self, number: int) -> int:
    return self._storage.get_trial_id_from_study_id_trial_number(
      self._study_id, number
    )

  def _get(self, number: int) -> optuna.trial.FrozenTrial:
    return self._storage.get_trial(self._id(number))


class Sampler(optuna.samplers.BaseSampler):
  """TPE, seeded by the number of the trial; trial 0 has given parameters.

  So that a worker that is started again does not draw the same ones again.
  """

  def __init__(self, seed: int, first: Mapping[str, Any]):
    """Of a seed, and the parameters of trial 0."""
    self._seed, self._first = seed, first
    self._number, self._tpe = None, None

  def infer_relative_search_space(self, study, trial):
    if trial.number == 0:
      return {}
    return self._of(trial).infer_relative_search_space(study, trial)

  def sample_relative(self, study, trial, search_space):
    if trial.number == 0:
      return {}
    return self._of(trial).sample_relative(study, trial, search_space)

  def sample_independent(self, study, trial, param_name, param_distribution):
    if trial.number == 0:
      return self._first[param_name]
    return self._of(trial).sample_independent(
      study, trial, param_name, param_distribution
    )

  def _of(self, trial: optuna.trial.FrozenTrial) -> optuna.samplers.TPESampler:
    if trial.number != self._number:
      self._number = trial.number
      self._tpe = optuna.samplers.TPESampler(
        seed=1_000_003 * self._seed + trial.number, multivariate=True
      )
    return self._tpe


def is_hopeless(
  found: Sequence[float],
  others: Sequence[Sequence[float]],
  *,
  share: float,
  least: int,
) -> bool:
  """Whether a trial is to be stopped at a rung: too many others are better.

  Optuna's pruners know one objective. As long as trials are equal in the others,
  as before the transition, a share of 0.5 does what its `MedianPruner` does.

  Args:
    found: what is to be small, measured at the rung.
    others: likewise, of the trials that were there before.
    share: of these that may dominate it, by being as small in all and smaller
      in one.
    least: how many there have to be.
  """
  if len(others) < least:
    return False
  found = tuple(found)
  dominate = lambda x: (
    tuple(x) != found and all(a <= b for a, b in zip(x, found))
  )
  return sum(map(dominate, others)) > share * len(others)
