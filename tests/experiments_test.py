"""The binaries, run as a user would, for a few steps."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

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
  names = {'loss', 'ranks', 'stability', 'spectra'}
  assert {p.stem for p in (tmp_path / 'report').glob('*.png')} == names
  result = json.loads((tmp_path / 'result.json').read_text())
  assert result['dense'][0]['trainable %'] == 100
  assert result['oialr'][0]['trainable %'] < 100
  arrays = np.load(tmp_path / 'report' / 'compressed.npz')
  assert arrays['head/kernel'].shape == (512, 10)
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['steps'] == 60


@pytest.mark.skipif(
  not os.environ.get('OIALR_DATA_DIR'),
  reason='OIALR_DATA_DIR does not name a folder of prepared TFDS sets',
)
def test_mnist_compares_methods_and_policies(tmp_path):
  done = run(
    'mnist_cnn',
    f'--workdir={tmp_path}',
    '--quiet',
    '--config.warmup=10',
    '--config.seeds=1',
    '--config.steps=60',
    '--config.track_every=30',
    '--config.oialr.every=20',
  )
  result = json.loads((tmp_path / 'result.json').read_text())
  assert list(result) == ['dense', 'oialr', 'reset', 'reference']
  for rows in result.values():
    assert rows[0]['loss after transition'] > 0
  assert 'loss after transition' in done.stdout


def test_missing_data_end_with_the_command_that_prepares_them(tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.mnist_cnn', f'--data_dir={tmp_path}'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode != 0
  assert 'download_and_prepare' in done.stderr


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
