"""Runs, in processes of their own, what wants several devices."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def with_devices(count):
  """XLA_FLAGS of a process that has so many virtual devices."""
  flags = os.environ.get('XLA_FLAGS', '')
  return f'{flags} --xla_force_host_platform_device_count={count}'


def run(*command, devices, **variables):
  """Runs a module in a process that has so many virtual devices."""
  return subprocess.run(
    [sys.executable, '-m', *command],
    cwd=ROOT,
    env={
      **os.environ,
      'XLA_FLAGS': with_devices(devices),
      'JAX_PLATFORMS': 'cpu',
      **variables,
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_on_eight_devices():
  done = run('pytest', '-q', '-x', 'tests/parallel_cases.py', devices=8)
  assert done.returncode == 0, done.stdout
