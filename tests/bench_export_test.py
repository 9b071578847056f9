"""The benchmark of exported models, run as a user would, on a small one."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_the_benchmark_writes_models_and_what_it_measured(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.bench_export',
      '--model=mlp',
      '--batches=1,64',
      '--ranks=0.5,0.1',
      '--rounds=3',
      f'--workdir={tmp_path}',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  assert 'batch 64, vs dense' in done.stdout
  result = json.loads((tmp_path / 'result.json').read_text())
  dense, half, tenth = result['rows']
  assert dense['vs dense'] == dense['batch 1, vs dense'] == 1
  # 64-512-512-512-10: a kernel of 512 x 512 at rank 56 is 2 * 512 * 56 numbers.
  numbers = 64 * 512 + 2 * 512 * 512 + 512 * 10 + 3 * 512 + 10
  assert dense['arrays MB'] == pytest.approx(4e-6 * numbers, rel=0.01)
  low = 8 * (64 + 512) + 4 * 512 * 56 + 512 * 10 + 3 * 512 + 10
  assert tenth['arrays MB'] == pytest.approx(4e-6 * low, rel=0.02)
  assert tenth['vs dense'] < half['vs dense'] < 1.05
  for seconds in result['seconds']:
    assert {k: len(v) for k, v in seconds.items()} == {'1': 3, '64': 3}
  names = {
    f'{x}.{y}'
    for x in ('dense', 'rank_0.5', 'rank_0.1')
    for y in ('safetensors', 'stablehlo')
  }
  assert names <= {p.name for p in tmp_path.iterdir()}
