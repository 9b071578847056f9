"""The binaries, run as a user would, for a few steps."""

import json
import pathlib
import subprocess
import sys

import pytest
import safetensors.numpy

from experiments import cli
from experiments import digits
from experiments import mnist_cnn
from oialr_jax import training
from tests import tfds_folders

# How ml_collections loads a file of settings.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

ROOT = pathlib.Path(__file__).parent.parent


def run(name, *flags):
  done = subprocess.run(
    [sys.executable, '-m', f'experiments.{name}', *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  return done


def call(module, *flags):
  """The binary within this process, which takes less long to start."""
  module.main(*cli.parse(module.BINARY, flags))


def test_digits_prints_a_table_and_leaves_a_report(tmp_path):
  done = run(
    'digits',
    f'--workdir={tmp_path}',
    '--config.steps=60',
    '--config.track_every=30',
    '--config.oialr.every=20',
  )
  for row in ('test accuracy %', 'trainable %', 'steps/s', 'SVDs s'):
    assert row in done.stdout
  assert 'transition' in done.stderr and 'update' in done.stderr
  names = {'loss', 'ranks', 'stability', 'spectra', 'sizes', 'time'}
  assert {p.stem for p in (tmp_path / 'report').glob('*.png')} >= names
  page = (tmp_path / 'report.html').read_text()
  assert 'flops of a step' in page and 'optimiser bytes' in page
  dense, low = json.loads((tmp_path / 'result.json').read_text())['rows']
  assert dense['method'] == 'dense' and dense['trainable %'] == 100
  assert low['method'] == 'oialr' and low['trainable %'] < 100
  file = tmp_path / 'report' / 'compressed.safetensors'
  arrays = safetensors.numpy.load_file(file)
  assert arrays['params/head/kernel'].shape == (512, 10)
  assert (tmp_path / 'report' / 'compressed.stablehlo').exists()
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['steps'] == 60


def test_digits_go_on_after_an_interruption(tmp_path):
  flags = [
    f'--workdir={tmp_path}',
    '--quiet',
    '--config.width=16',
    '--config.steps=20',
    '--config.warmup=5',
    '--config.oialr.every=100',  # what compiles takes the time
    '--config.svd_prune.rank=4',
  ]
  with pytest.raises(training.Interrupted):
    call(digits, *flags, '--max_seconds=0')
  assert not (tmp_path / 'result.json').exists()
  call(digits, *flags, '--resume')
  rows = json.loads((tmp_path / 'result.json').read_text())['rows']
  assert [row['method'] for row in rows] == ['dense', 'oialr']
  # Another method later on: what is finished is not done again.
  call(digits, *flags, '--resume', '--config.methods=dense,svd_prune')
  *same, cut = json.loads((tmp_path / 'result.json').read_text())['rows']
  assert same == rows and cut['method'] == 'svd_prune'
  assert cut['trainable %'] == cut['stored %'] < 100
  lines = (tmp_path / 'dense-0' / 'metrics.jsonl').read_text().splitlines()
  losses = [json.loads(line).get('losses', []) for line in lines]
  assert len(sum(losses, [])) == 20


def test_mnist_compares_methods_and_policies(tmp_path, capsys):
  splits = {
    'train': [tfds_folders.shard(range(64), 28, channels=1)],
    'test': [tfds_folders.shard(range(20), 28, channels=1)],
  }
  tfds_folders.write(
    tmp_path, 'mnist', '3.0.1', splits, classes=10, shape=(28, 28, 1)
  )
  call(
    mnist_cnn,
    f'--data_dir={tmp_path}',
    f'--workdir={tmp_path}',
    '--quiet',
    '--config.warmup=10',
    '--config.batch_size=16',
    '--config.eval_batch_size=20',
    '--config.seeds=0',
    '--config.methods=oialr,reference',
    '--config.steps=60',
    '--config.track_every=30',
    '--config.oialr.every=20',
  )
  rows = json.loads((tmp_path / 'result.json').read_text())['rows']
  names = ['oialr', 'reference']
  assert [row['method'] for row in rows] == names
  for row in rows:
    assert row['loss after transition'] > 0
    assert ('test accuracy %' in row) == (row['method'] == 'oialr')
  assert 'loss after transition' in capsys.readouterr().out


def test_missing_data_end_with_the_command_that_prepares_them(tmp_path):
  with pytest.raises(FileNotFoundError, match='download_and_prepare'):
    call(mnist_cnn, f'--data_dir={tmp_path}', f'--workdir={tmp_path / "run"}')


def test_bench_step_takes_images_of_any_size_and_one_way(tmp_path):
  run(
    'bench_step',
    '--model=mnist_cnn',
    '--batch=16',
    '--image=8',
    '--ranks=0.5',
    '--rounds=1',
    '--way=factors',
    f'--workdir={tmp_path}',
  )
  result = json.loads((tmp_path / 'result.json').read_text())
  dense, low = result['rows']
  assert low['program'] == 'factors'
  # Of 28 x 28 pixels it is 0.84.
  assert dense['saved MB'] < 0.2


def test_bench_step_compares_programs_and_draws(tmp_path):
  done = run(
    'bench_step',
    '--model=mlp',
    '--batch=512',
    '--ranks=1.0,0.1',
    '--rounds=2',
    f'--workdir={tmp_path}',
  )
  assert 'vs dense' in done.stdout
  result = json.loads((tmp_path / 'result.json').read_text())
  assert result['flags']['batch'] == 512
  dense, *rows = result['rows']
  names = ['factors', 'multiplied out'] * 2
  assert [row['program'] for row in rows] == names
  full, _, low, rebuilt = rows
  assert dense['vs dense'] == 1 and dense['trainable %'] == 100
  assert low['Gflop vs dense'] < 0.4 < 1 < rebuilt['Gflop vs dense']
  # Of the input of a layer, rank / width is kept; without factors all of it.
  assert low['saved MB'] < 0.8 * dense['saved MB']
  assert rebuilt['saved MB'] == pytest.approx(dense['saved MB'], rel=0.01)
  assert full['state MB'] > low['state MB']
  assert all(len(seconds) == 2 for seconds in result['seconds'])
  assert (tmp_path / 'step_time.png').stat().st_size > 10_000
