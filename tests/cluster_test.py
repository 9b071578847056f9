"""Runs on several hosts: processes that talk over the loopback interface."""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np

from tests import cluster
from tests import parallel_test

PROCESSES, DEVICES = 2, 2


def start(workdir, lag, *options, processes=PROCESSES):
  """Starts the processes of a run."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = str(s.getsockname()[1])
  variables = {
    'XLA_FLAGS': parallel_test.with_devices(DEVICES),
    'JAX_PLATFORMS': 'cpu',
  }
  numbers = [str(processes)], [str(i) for i in range(processes)]
  return [
    subprocess.Popen(
      [sys.executable, '-m', 'tests.cluster', port, *numbers[0], i, workdir]
      + [str(lag), *options],
      cwd=parallel_test.ROOT,
      env={**os.environ, **variables},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in numbers[1]
  ]


def finish(running, status=0):
  """Waits; every process has to end with this status."""
  said = [process.communicate(timeout=300)[0] for process in running]
  for process, text in zip(running, said, strict=True):
    assert process.returncode == status, text


def assert_as_alone(found, lag):
  """It is the same run on one device of this process."""
  expected = cluster.fit(lag)
  np.testing.assert_allclose(found['losses'], expected['losses'], rtol=1e-5)
  for key in ('events', 'ranks', 'evaluations'):
    assert found[key] == expected[key], key
  for path, x in expected['kernels'].items():
    apart = np.linalg.norm(np.subtract(found['kernels'][path], x))
    assert apart < 1e-5 * np.linalg.norm(x), path


def saved_steps(workdir):
  return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())


def test_two_hosts_train_as_one_does(tmp_path):
  finish(start(tmp_path, 0))
  first, second = (
    json.loads((tmp_path / f'result-{i}.json').read_text())
    for i in range(PROCESSES)
  )
  assert_as_alone(first, 0)
  assert second == first
  assert 'devices of the processes [0, 1] would share' in first['refused']
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(x)['kind'] for x in lines].count('event') == 4


def test_what_stops_one_of_them_saves_and_stops_all(tmp_path):
  """And both turn by the same rotations, found some steps before."""
  # The time of the first is up, of which they speak every 16 steps.
  finish(start(tmp_path, 4, 'late'), 75)
  assert saved_steps(tmp_path)[-1] == 16
  # SIGTERM to the second, after the update that is due at 34.
  running = start(tmp_path, 4, 'slow')
  for line in running[1].stdout:
    if line.strip() == '36':
      running[1].send_signal(signal.SIGTERM)
      break
  finish(running, 75)
  assert not (tmp_path / 'result-0.json').exists()
  assert 36 <= saved_steps(tmp_path)[-1] < 60
  # What is left is done by one host: on half of the devices.
  finish(start(tmp_path, 4, processes=1))
  found = json.loads((tmp_path / 'result-0.json').read_text())
  assert found['events'] == [[20, None], [34, 30], [44, 40], [54, 50]]
  assert_as_alone(found, 4)
