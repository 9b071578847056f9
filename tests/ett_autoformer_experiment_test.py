"""The binary for the ETT series, end to end on a generated series."""

import dataclasses
import json

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import cli
from experiments import ett_autoformer
from experiments import forecasting
from experiments import runs
from oialr_jax import data
from oialr_jax import training

# How ml_collections loads a file of settings.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

MODEL = forecasting.model
ROWS = 20 * 30 * 24  # what the splits of an hourly set take
# An epoch is 3 steps, and no window of validation or test is left out.
TINY = (
  '--config.sets=ETTh1',
  '--config.horizons=4',
  '--config.seeds=0',
  '--config.seq_len=8',
  '--config.label_len=4',
  '--config.batch_size=2800',
  '--config.eval_batch_size=2800',
  '--config.learning_rate=1e-3',
  '--config.compaction.reproducible',
  '--config.epochs=2',
  '--config.eval_epochs=1',
  '--config.constant_epochs=2',
  '--config.oialr.delay=2',
  '--config.oialr.every=2',
  '--config.oialr.progressive=1',
  '--quiet',
)


class Small(nn.Module):
  """In the place of Autoformer, which takes ten times as long to compile."""

  c_out = 7

  @nn.compact
  def __call__(self, x_enc, x_mark_enc, x_dec, x_mark_dec, train=False):
    batch, horizon = len(x_enc), x_dec.shape[1] - 4
    x = nn.relu(nn.Dense(24)(x_enc.reshape(batch, -1)))
    x = nn.relu(nn.Dense(24)(x))
    return nn.Dense(horizon * 7)(x).reshape(batch, horizon, 7)


@pytest.fixture(autouse=True, scope='module')
def small_model():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(forecasting, 'model', lambda config: Small())
    yield patch


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('ETT')
  rng = np.random.default_rng(0)
  dates = np.datetime64('2016-07-01T00') + np.arange(ROWS)
  day = np.sin(np.arange(ROWS) * 2 * np.pi / 24)
  values = day[:, None] * np.arange(1, 8) + rng.normal(0, 0.5, (ROWS, 7))
  lines = ['date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT']
  for date, row in zip(dates, values):
    lines.append(
      f'{str(date).replace("T", " ")}:00:00,' + ','.join(map(str, row))
    )
  (folder / 'ETTh1.csv').write_text('\n'.join(lines) + '\n')
  return folder


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory):
  """The rows of runs that were not interrupted, and their folder."""
  workdir = tmp_path_factory.mktemp('whole')
  return run(folder, workdir), workdir


def run(folder, workdir, *changes):
  flags = (f'--data_dir={folder}', f'--workdir={workdir}', *TINY, *changes)
  config, options = cli.parse(ett_autoformer.BINARY, flags)
  ett_autoformer.main(config, options)
  return json.loads((workdir / 'result.json').read_text())['rows']


def errors(row):
  return [row['mse'], row['mae'], row['epochs'], row['trainable %']]


def test_autoformer_runs_end_to_end(folder, tmp_path, small_model, capsys):
  with small_model.context() as patch:
    patch.setattr(forecasting, 'model', MODEL)
    (row,) = run(
      folder,
      tmp_path,
      '--config.methods=oialr',
      '--config.model.d_model=8',
      '--config.model.d_ff=16',
      '--config.model.e_layers=1',
      '--config.model.moving_avg=3',
      '--config.steps=2',
      '--config.oialr.delay=0',
      '--config.oialr.every=1',
    )
  assert row['trainable %'] < 100 and np.isfinite(row['mse'])
  assert 'MSE, published' in capsys.readouterr().out
  folder = tmp_path / 'ETTh1-4-oialr-0'
  assert {'metrics.jsonl', 'checkpoints', 'tensorboard'} <= {
    path.name for path in folder.iterdir()
  }


def test_a_row_a_run_and_a_table(whole):
  rows, workdir = whole
  assert [row['method'] for row in rows] == ['dense', 'oialr']
  for row in rows:
    assert (row['set'], row['horizon'], row['seed']) == ('ETTh1', 4, 0)
    assert [x['epoch'] for x in row['epochs']] == [1, 2]
    best = min(row['epochs'], key=lambda x: x['val_mse'])
    assert (row['mse'], row['mae']) == (best['test_mse'], best['test_mae'])
    assert row['epoch'] == best['epoch'] and row['steps'] == 6
    assert row['training s'] > 0 and row['cores'] > 0
  dense, low = rows
  assert dense['trainable %'] == 100 > low['trainable %']
  shares = [x['trainable %'] for x in low['epochs']]
  assert 100 > shares[0] >= shares[1] == pytest.approx(low['trainable %'])
  config = json.loads((workdir / 'config.json').read_text())
  assert config['horizons'] == [4]
  table = ett_autoformer.table(rows).splitlines()
  assert table[0].endswith('MSE, published') and len(table) == 3
  assert table[1].split()[:5] == [
    'ETTh1',
    '4',
    'dense',
    '1',
    f'{dense["mse"]:.4f}',
  ]


def test_the_best_epoch_is_chosen_by_validation_alone():
  errors = [(0.3, 0.1), (0.2, 0.4), (0.2, 0.2), (0.25, 0.05)]
  epochs = [dict(val_mse=val, test_mse=test) for val, test in errors]
  assert ett_autoformer.best_epoch(epochs) is epochs[1]


def test_published_errors_stand_beside_means_over_seeds():
  row = dict.fromkeys(key for key, _ in ett_autoformer._COLUMNS.values())
  row = {key: 1.0 for key in row} | dict(set='ETTm2', horizon=192)
  rows = [
    row | dict(method='oialr', mse=0.25),
    row | dict(method='oialr', mse=0.27),
    row | dict(method='dense', mse=0.3),
  ]
  _, dense, low = ett_autoformer.table(rows).splitlines()
  assert '0.3000' in dense and dense.endswith('0.274')
  assert '0.2600 +- 0.0141' in low and low.endswith('0.268')


def test_interrupted_runs_go_on_to_the_same_rows(folder, whole, tmp_path):
  rows, _ = whole
  for steps in range(2):  # in the first run, and in the second
    with pytest.raises(training.Interrupted) as stopped:
      run(folder, tmp_path, '--max_seconds=0', '--resume')
    assert stopped.value.step == steps + 1
  resumed = run(folder, tmp_path, '--resume')
  assert list(map(errors, resumed)) == list(map(errors, rows))


def test_finished_runs_are_left_out_and_others_added(
  folder, whole, monkeypatch
):
  rows, workdir = whole

  def nothing(*args, **options):
    raise AssertionError('nothing is to be trained')

  with monkeypatch.context() as patch:
    patch.setattr(training, 'fit', nothing)
    assert run(folder, workdir, '--resume') == rows
    with pytest.raises(AssertionError, match='nothing is to be trained'):
      run(folder, workdir, '--resume', '--config.seeds=0,1')
    with pytest.raises(
      ValueError, match='learning_rate is 0.001 there and 0.1'
    ):
      run(folder, workdir, '--resume', '--config.learning_rate=0.1')
    # With less patience they would have ended earlier.
    with pytest.raises(ValueError, match='config.patience=1: .* there has 3'):
      run(folder, workdir, '--resume', '--config.patience=1')
  assert json.loads((workdir / 'result.json').read_text())['rows'] == rows


def test_stop_epochs_stops_and_a_longer_run_goes_on(folder, whole, tmp_path):
  rows, _ = whole
  flags = ('--config.methods=dense', '--resume')
  (row,) = run(folder, tmp_path, *flags, '--config.stop_epochs=1')
  assert row['steps'] == 3 and row['epochs'] == rows[0]['epochs'][:1]
  (row,) = run(folder, tmp_path, *flags)
  assert row['epochs'] == rows[0]['epochs']


def test_evaluations_within_an_epoch_change_no_other(folder, whole, tmp_path):
  (row,) = run(
    folder,
    tmp_path,
    '--config.methods=dense',
    '--config.stop_epochs=1',
    '--config.eval_epochs=0.34',
  )
  *within, last = row['epochs']
  assert [x['epoch'] for x in within] == [0.3333, 0.6667]
  assert last == whole[0][0]['epochs'][0]


@pytest.mark.parametrize('batch_size', [2100, 1700])  # 4 and 5 steps an epoch
def test_a_run_of_two_thirds_is_evaluated_twice(folder, tmp_path, batch_size):
  (row,) = run(
    folder,
    tmp_path,
    '--config.methods=dense',
    f'--config.batch_size={batch_size}',
    '--config.stop_epochs=0.6667',
    '--config.eval_epochs=0.3333',
  )
  assert len(row['epochs']) == 2
  assert row['epochs'][-1]['epoch'] == row['steps'] / (8629 // batch_size)


def test_without_resume_everything_is_begun_anew(folder, whole, tmp_path):
  (tmp_path / 'result.json').write_text('{"rows": [{}]}')
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(training.Interrupted):
    run(folder, tmp_path, '--max_seconds=0')
  assert not (tmp_path / 'result.json').exists()


class Rising:
  """A loss that falls while what is evaluated rises, from step to step."""

  def __init__(self, workdir):
    self.options = cli.Options(workdir=workdir, quiet=True, checkpoint_every=2)

  def fit(self, *callbacks, **more):
    config, _ = cli.parse(ett_autoformer.BINARY, TINY)
    return runs.fit(
      'dense',
      config,
      self.options,
      name='run',
      steps=20,
      loss_fn=lambda p, s, batch, key: ((p['w'] - batch) ** 2, (s, {})),
      params={'w': jnp.zeros(())},
      data=lambda: iter(np.ones(20, np.float32)),
      rate=lambda step: 0.1,
      optimizer=optax.sgd,
      callbacks=callbacks,
      eval_fn=lambda p, s, batch: {'val': p['w'] + 0 * batch},
      eval_data=lambda: iter(np.ones((1, 1), np.float32)),
      eval_every=3,
      **more,
    )


def test_a_run_without_improvement_ends_as_if_it_had_been_told_to(tmp_path):
  stopped = Rising(tmp_path / 'a').fit(training.EarlyStopping('val', 2))
  assert [r['step'] for r in stopped.select('eval')] == [3, 6, 9]
  assert stopped.select('end')[-1]['step'] == 9
  told = Rising(tmp_path / 'b').fit(stop_at=9)
  np.testing.assert_array_equal(stopped.params['w'], told.params['w'])
  assert stopped.select('eval') == told.select('eval')
  lines = (tmp_path / 'a' / 'run' / 'metrics.jsonl').read_text().splitlines()
  assert json.loads(lines[-1])['kind'] == 'end'


class Last(nn.Module):
  """Forecasts the last value."""

  @nn.compact
  def __call__(self, x_enc, x_mark_enc, x_dec, x_mark_dec, train=False):
    self.param('w', nn.initializers.zeros, ())
    horizon = x_dec.shape[1] - 4
    return jnp.repeat(x_enc[:, -1:], horizon, axis=1)


@pytest.mark.parametrize(
  'loss, of', [('mse', np.square), ('mae', np.abs)], ids=['mse', 'mae']
)
def test_the_loss_is_the_error_of_a_batch(folder, loss, of):
  config, _ = cli.parse(ett_autoformer.BINARY, (*TINY, f'--config.loss={loss}'))
  series = data.load_series('ETTh1', data_dir=folder)
  task = forecasting.Task.of_series(series, config, 4)
  task = dataclasses.replace(task, model=Last())
  batch = next(iter(task.batches(0)))
  found, _ = task.loss(task.init(0), {}, batch, jax.random.key(0))
  errors = np.float64(batch['x_enc'][:, -1:] - batch['target'])
  np.testing.assert_allclose(found, np.mean(of(errors)), rtol=1e-5)


def test_evaluation_is_the_mean_over_each_split(folder):
  series = data.load_series('ETTh1', data_dir=folder)
  windows = lambda split: series.windows(
    split, seq_len=8, label_len=4, pred_len=4
  )
  task = forecasting.Task(
    model=Last(),
    train=windows('train'),
    val=windows('val'),
    test=series.windows('test', seq_len=8, label_len=4, pred_len=4),
    batch_size=32,
    eval_batch_size=1000,
  )
  params = task.init(0)
  evaluate = jax.jit(training.eval_step(task.evaluate))
  sums, count = {}, 0
  for batch in task.evaluation():
    more, n = evaluate(params, {}, batch)
    sums = {k: sums.get(k, 0) + v for k, v in more.items()}
    count += n
  for split in ('val', 'test'):
    batch = windows(split).take(np.arange(len(windows(split))))
    difference = batch['x_enc'][:, -1:] - batch['target']
    expected = {
      f'{split}_mse': np.mean(difference.astype(np.float64) ** 2),
      f'{split}_mae': np.mean(abs(difference).astype(np.float64)),
    }
    for name, value in expected.items():
      np.testing.assert_allclose(sums[name] / count, value, rtol=1e-5)


def test_windows_are_those_of_the_authors_program(folder):
  config, _ = cli.parse(
    ett_autoformer.BINARY, (*TINY, '--config.batch_size=32')
  )
  series = data.load_series('ETTh1', data_dir=folder)
  task = forecasting.Task.of_series(series, config, 4)
  whole = series.windows('val', seq_len=8, label_len=4, pred_len=4)
  assert len(whole) % 32 and len(task.val) == len(whole) // 32 * 32
  assert task.val.first == whole.first
  config.eval_windows = 70
  assert len(forecasting.Task.of_series(series, config, 4).test) == 64
  config.eval_windows = 5  # no batch is full
  assert len(forecasting.Task.of_series(series, config, 4).test) == 5


def test_the_rate_is_halved_at_the_end_of_every_epoch_but_the_first():
  config, _ = cli.parse(ett_autoformer.BINARY, ())
  config.constant_epochs, config.halving_epochs = 2.0, 1.0  # the authors'
  rate = ett_autoformer._halving(config, 10)
  rates = [float(rate(step)) for step in (0, 9, 10, 19, 20, 29, 30, 49)]
  expected = 1e-4 * np.array([1, 1, 1, 1, 0.5, 0.5, 0.25, 0.125])
  np.testing.assert_allclose(rates, expected, rtol=1e-6)
  config.constant_epochs = 1.0
  assert ett_autoformer._halving(config, 10)(10) == pytest.approx(5e-5)
  config.constant_epochs, config.halving_epochs = 0.5, 0.3
  rate = ett_autoformer._halving(config, 10)
  rates = [float(rate(step)) for step in (0, 4, 5, 7, 8, 11)]
  expected = 1e-4 * np.array([1, 1, 0.5, 0.5, 0.25, 0.125])
  np.testing.assert_allclose(rates, expected, rtol=1e-6)
