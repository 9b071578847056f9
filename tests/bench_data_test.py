"""The benchmark of the pipeline, run as a user would, on generated images."""

import json
import pathlib
import subprocess
import sys

from tests import tfds_folders

ROOT = pathlib.Path(__file__).parent.parent


def test_the_benchmark_writes_what_it_measured(tmp_path):
  tfds_folders.write(
    tmp_path,
    'cifar10',
    '3.0.2',
    {'train': [tfds_folders.shard(range(20), 32)]},
    classes=10,
    shape=(32, 32, 3),
  )
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.bench_data',
      f'--data_dir={tmp_path}',
      f'--workdir={tmp_path / "run"}',
      '--model=mnist_cnn',
      '--batch=4',
      '--rounds=2',
      '--images=8',
      '--workers=1',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / 'run' / 'result.json').read_text())
  assert result == json.loads(done.stdout)
  assert result['model'] == 'mnist_cnn' and result['batch'] == 4
  assert all(x > 0 for x in result.values() if isinstance(x, float))
  assert 70 < result['JPEGs, kB'] < 150
  ratio = (
    result['decoding and augmentation, images/s/core']
    / (result['Pillow decoding and resizing, images/s/core'])
  )
  assert abs(ratio - result['augmented / plain']) < 1e-9
