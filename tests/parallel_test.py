"""Runs, in processes of their own, what wants several devices."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def run(*command, devices, **variables):
  """Runs a module in a process that has so many virtual devices."""
  flags = f'--xla_force_host_platform_device_count={devices}'
  return subprocess.run(
    [sys.executable, '-m', *command],
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu', **variables},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_on_eight_devices():
  done = run('pytest', '-q', '-x', 'tests/parallel_cases.py', devices=8)
  assert done.returncode == 0, done.stdout
