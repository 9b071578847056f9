"""Tests of the trainer on a small network and random, learnable data."""

import functools
import gc
import itertools
import json
import pathlib
import subprocess
import sys
import threading
import time

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
import pytest

import oialr_jax as oialr
from oialr_jax import checkpoint
from oialr_jax import training
from oialr_jax.training import programs
from oialr_jax.training import recorder

STEPS = 30


class Net(nn.Module):
  """Two hidden layers, one of them normalised over the batch, and a head."""

  norm: bool = False
  names: tuple[str, str] = ('first', 'second')

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Dense(16, name=self.names[0])(x))
    if self.norm:
      x = nn.BatchNorm(not train, momentum=0.5, name='norm')(x)
    x = nn.relu(nn.Dense(16, name=self.names[1])(x))
    return nn.Dense(3, name='head')(x)


def problem(net):
  """Parameters, model state, loss, evaluation and batches."""
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(70, 12)).astype(np.float32)
  labels = np.argmax(inputs[:, :3], axis=1)
  variables = net.init(jax.random.key(0), inputs[:1])

  def loss(params, model_state, batch, key):
    del key
    logits, model_state = net.apply(
      {'params': params, **model_state},
      batch['x'],
      train=True,
      mutable=list(model_state),
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['y'])
    return losses.mean(), (dict(model_state), {})

  def evaluate(params, model_state, batch):
    logits = net.apply({'params': params, **model_state}, batch['x'])
    return {'accuracy': (jnp.argmax(logits, -1) == batch['y']).astype(float)}

  def batches():
    order = np.random.default_rng(1)
    while True:
      index = order.permutation(70)[:32]
      yield {'x': inputs[index], 'y': labels[index]}

  def eval_batches():
    for i in range(0, 70, 32):
      index = np.arange(i, i + 32)
      taken = np.minimum(index, 69)
      yield {'x': inputs[taken], 'y': labels[taken], 'mask': index < 70}

  state = {k: v for k, v in variables.items() if k != 'params'}
  return variables['params'], state, loss, evaluate, batches, eval_batches


def fit(net=Net(), schedule=True, **options):  # noqa: B008 (frozen)
  params, state, loss, evaluate, batches, eval_batches = problem(net)
  if schedule is True:
    schedule = oialr.Schedule(
      steps=STEPS, delay=9, every=7, cutoff=0.4, progressive=1.0
    )
  options = {
    'optimizer': optax.adam(1e-2),
    'steps': STEPS,
    'schedule': schedule,
    'model_state': state,
    'eval_fn': evaluate,
    'eval_data': eval_batches,
    'log_every': 10,
    'compaction': training.Compaction(
      min_saving=0, multiple_of=1, background=False, reproducible=True
    ),
  } | options
  data = options.pop('data', None) or batches()
  return training.fit(loss, params, data, **options)


# Slices nothing before the end.
NEVER = training.Compaction(min_saving=1)
# A run that several tests look at.
once = functools.cache(fit)


def losses(result):
  return np.concatenate([r['losses'] for r in result.select('train')])


def test_dense_training_learns_and_records_every_step():
  result = once(schedule=None)
  assert losses(result).shape == (STEPS,)
  assert losses(result)[-5:].mean() < 0.7 * losses(result)[:5].mean()
  assert result.compilations == 1
  assert int(result.state.step) == STEPS
  assert not result.select('event')


def test_oialr_converts_prunes_and_keeps_learning():
  result = once()
  kinds = [e['event'] for e in result.select('event')]
  assert kinds == ['transition', 'update', 'update']
  assert result.select('event')[0]['step'] == 9
  assert set(oialr.ranks(result.params)) == {'first/kernel', 'second/kernel'}
  assert max(oialr.ranks(result.params).values()) < 12
  assert losses(result)[-5:].mean() < 0.7 * losses(result)[:5].mean()
  (end,) = result.select('end')
  assert end['trainable'] == oialr.count(result.params).trainable
  assert end['dense'] == 12 * 16 + 16 + 16 * 16 + 16 + 16 * 3 + 3


def test_events_list_the_layers_as_they_are_executed():
  result = fit(Net(names=('layer_9', 'layer_10')))
  _, update, _ = result.select('event')
  for field in ('ranks', 'ranks_before', 'spectra', 'truncation'):
    assert list(update[field]) == ['layer_9/kernel', 'layer_10/kernel'], field


def test_the_step_is_compiled_only_when_shapes_change():
  result = once()
  assert _compactions(result)
  assert result.compilations == 2 + len(_compactions(result))
  never = once(compaction=NEVER)
  assert never.compilations == 2
  # What is sliced at the end alone was carried by all steps.
  last, end = never.select('train')[-1], never.select('end')[-1]
  assert end['optimizer_bytes'] == last['optimizer_bytes']
  assert end['optimizer_bytes'] > 8 * end['trainable'] + 8


def test_records_count_what_trains_sliced_or_not():
  never = once(compaction=NEVER)
  often = once()
  assert _compactions(often) and not _compactions(never)
  at_end = oialr.count(never.params).trainable
  for result in never, often:
    counts = [r['trainable'] for r in result.records if 'trainable' in r]
    assert counts[0] > counts[-1] == at_end
    assert result.select('event')[-1]['trainable'] == at_end


def test_the_host_is_a_step_ahead_of_the_device_and_no_more(monkeypatch):
  params, state, loss, _, batches, _ = problem(Net())
  metrics, ahead = [], []

  def slow(params, *args):
    x = jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(x @ x), jnp.eye(200))
    value, more = loss(params, *args)
    return value + 0 * x[0, 0], more

  def step(self, at, found):
    metrics.append(found['loss'])
    ahead.append(sum(not x.is_ready() for x in metrics))
    take(self, at, found)

  take = recorder.Recorder.step
  monkeypatch.setattr(recorder.Recorder, 'step', step)
  training.fit(
    slow,
    params,
    batches(),
    optimizer=optax.adam(1e-2),
    steps=STEPS,
    model_state=state,
  )
  assert len(ahead) == STEPS
  assert max(ahead) <= 1


def test_compaction_changes_nothing_but_shapes():
  never = once(compaction=NEVER)
  np.testing.assert_allclose(losses(never), losses(once()), rtol=2e-4)


def test_sigma_scale_changes_the_steps_of_sigma_alone():
  # From the same gradients the first step of Sigma tells its scale.
  def run(steps, **more):
    schedule = oialr.Schedule(steps=steps, delay=9, **more)
    return fit(schedule=schedule, steps=steps, optimizer=optax.sgd(1e-3)).params

  before, after = run(9 + 1), run(9 + 1, sigma_scale=2.0)
  start = run(9 + 1, sigma_scale=1e-30)
  for name, (m, n) in {'first': (12, 16), 'second': (16, 16)}.items():
    stays = start[name]['kernel'].s
    step = before[name]['kernel'].s - stays
    scaled = after[name]['kernel'].s - stays
    assert np.any(step)
    np.testing.assert_allclose(
      scaled, 2 * np.sqrt(m * n) / min(m, n) * step, rtol=0.02, atol=2e-6
    )
    np.testing.assert_array_equal(before[name]['bias'], after[name]['bias'])


def test_compaction_changes_nothing_of_scaled_steps():
  scaled = oialr.Schedule(
    steps=STEPS, delay=9, every=7, cutoff=0.4, progressive=1.0, sigma_scale=2.0
  )
  never = fit(schedule=scaled, compaction=NEVER)
  often = fit(schedule=scaled)
  assert _compactions(often)
  np.testing.assert_allclose(losses(never), losses(often), rtol=2e-4)
  assert np.any(np.abs(losses(often) - losses(once())) > 1e-3)


# Compiling beside the training.


def _compactions(result):
  return [c for c in result.select('compaction') if c['step'] < STEPS]


def _policy(**changes):
  defaults = dict(min_saving=0, multiple_of=1, payback=0)
  return training.Compaction(**(defaults | changes))


@pytest.mark.parametrize('reproducible', [True, False])
def test_compiled_in_the_background_it_is_the_same_run(reproducible):
  now = once()
  behind = fit(compaction=_policy(reproducible=reproducible))
  np.testing.assert_allclose(losses(behind), losses(now), rtol=1e-4)
  assert oialr.ranks(behind.params) == oialr.ranks(now.params)
  dense = lambda result: jax.tree.leaves(oialr.to_dense(result.params))
  for a, b in zip(dense(behind), dense(now), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_reproducible_runs_are_equal_bit_for_bit():
  one, other = (fit(compaction=_policy(reproducible=True)) for _ in range(2))
  np.testing.assert_array_equal(losses(one), losses(other))
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
  # What is decided at an event takes over at the next one.
  assert [(c['decided'], c['step']) for c in _compactions(one)] == [(16, 23)]


def test_training_goes_on_while_smaller_shapes_compile(monkeypatch):
  """They are held up until a step that the training has to reach first."""
  compile_ = programs._compile
  pruned, go_on, finished = threading.Event(), threading.Event(), []

  def slow(lowered):
    if threading.current_thread() is threading.main_thread():
      return compile_(lowered)
    held = pruned.is_set()
    assert not held or go_on.wait(60)
    program = compile_(lowered)
    finished.extend([program] * held)
    return program

  class Watch(training.Callback):
    def on_record(self, record):
      if record['kind'] == 'event' and record['event'] == 'update':
        pruned.set()

    def on_step(self, step):
      if step == 20:
        go_on.set()
        while len(finished) < 2:  # the slicing, and the step
          time.sleep(0.01)
        time.sleep(0.1)  # for the thread to hand it over

  monkeypatch.setattr(programs, '_compile', slow)
  result = fit(compaction=_policy(), callbacks=[Watch()])
  (compaction, *_) = _compactions(result)
  assert compaction['decided'] == 16 and compaction['step'] >= 20
  np.testing.assert_allclose(losses(result), losses(once()), rtol=1e-4)


def test_what_can_be_foreseen_is_not_compiled_by_the_training(monkeypatch):
  waited_for = []
  compile_ = programs._compile

  def spy(lowered):
    if threading.current_thread() is threading.main_thread():
      waited_for.append(lowered)
    return compile_(lowered)

  monkeypatch.setattr(programs, '_compile', spy)
  fit(compaction=_policy(min_saving=1), eval_fn=None, eval_data=None)
  # The dense step, and the slicing at the end.
  assert len(waited_for) == 2
  waited_for.clear()
  fit(
    compaction=_policy(min_saving=1, background=False),
    eval_fn=None,
    eval_data=None,
  )
  # Also the transition, the low-rank step and the updates.
  assert len(waited_for) == 5


def test_a_run_leaves_none_of_its_programs_behind():
  # A process that trains many networks would come to Linux's limit of mappings.
  def programs_after_a_run():
    fit()
    gc.collect()
    return len(jax.devices()[0].client.live_executables())

  programs_after_a_run()  # what is jitted for good
  assert programs_after_a_run() == programs_after_a_run()


def test_a_program_that_fails_to_compile_is_an_error_of_the_run(monkeypatch):
  compile_ = programs._compile

  def fails(lowered):
    if threading.current_thread() is threading.main_thread():
      return compile_(lowered)
    raise RuntimeError('out of memory, say')

  monkeypatch.setattr(programs, '_compile', fails)
  with pytest.raises(RuntimeError, match='out of memory, say'):
    fit(compaction=_policy())


@pytest.mark.parametrize(
  'changes, pays',
  [
    ({}, True),
    ({'after': 95}, False),  # saves less than min_saving
    ({'after': 100}, False),
    ({'steps': 7}, False),  # 7 steps save 0.7 s x 3/4, and compiling takes 1 s
    ({'steps': 14}, True),
    ({'step_flops': 400.0, 'steps': 14}, False),  # the rest is not saved
    ({'step_flops': 400.0, 'steps': 28}, True),
    ({'compile_seconds': 8.0}, False),
  ],
)
def test_slicing_pays_when_it_saves_more_than_it_costs(changes, pays):
  case = dict(
    before=100,
    after=25,
    step_seconds=0.1,
    step_flops=None,
    steps=100,
    compile_seconds=1.0,
  )
  assert training.Compaction().pays(**(case | changes)) == pays


def test_payback_weighs_seconds_and_reproducible_leaves_them_out():
  case = dict(before=100, after=25, step_seconds=0.1, step_flops=None, steps=14)
  pays = lambda **policy: training.Compaction(**policy).pays(
    compile_seconds=1.0, **case
  )
  assert pays() and not pays(payback=2.0)
  assert pays(payback=2.0, reproducible=True)
  assert not pays(min_saving=0.8, reproducible=True)


def test_programs_are_kept_on_disk(monkeypatch, tmp_path):
  option = 'jax_compilation_cache_dir'
  before = getattr(jax.config, option)
  try:
    jax.config.update(option, None)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    training.use_compilation_cache()
    folder = pathlib.Path(getattr(jax.config, option))
    assert folder.is_relative_to(tmp_path / 'oialr_jax')
    # What is set already stays.
    training.use_compilation_cache(tmp_path / 'elsewhere')
    assert getattr(jax.config, option) == str(folder)
  finally:
    jax.config.update(option, before)
  run = """
import sys
import jax
from oialr_jax import training
training.use_compilation_cache(sys.argv[1])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
f = jax.jit(lambda x: jax.numpy.linalg.svd(jax.numpy.sin(x @ x @ x)))
f.lower(jax.numpy.ones((64, 64))).compile()
"""
  names = lambda: {p.name for p in (tmp_path / 'kept').glob('*-cache')}
  command = [sys.executable, '-c', run, str(tmp_path / 'kept')]
  subprocess.run(command, check=True)
  found = names()
  assert found
  subprocess.run(command, check=True)
  assert names() == found


def test_materialised_and_factored_training_agree():
  np.testing.assert_allclose(
    losses(fit(contraction='materialise')),
    losses(fit(contraction='factors')),
    rtol=2e-4,
  )


def test_the_same_seed_gives_the_same_run():
  np.testing.assert_array_equal(losses(fit()), losses(once()))


def test_dense_and_oialr_are_the_same_run_until_the_transition():
  dense, low = losses(once(schedule=None)), losses(once())
  np.testing.assert_array_equal(dense[:9], low[:9])
  assert np.any(dense[10:] != low[10:])


def test_the_callers_parameters_survive():
  params, state, loss, *_, batches, _ = problem(Net())
  before = jax.tree.map(np.array, params)
  training.fit(loss, params, batches(), optimizer=optax.sgd(0.1), steps=2)
  jax.tree.map(np.testing.assert_array_equal, before, params)


def test_batch_statistics_are_carried():
  result = fit(Net(norm=True))
  mean = result.state.model_state['batch_stats']['norm']['mean']
  assert np.abs(mean).max() > 0


def test_evaluation_counts_every_example_once():
  result = fit(schedule=None, eval_every=10)
  evaluations = result.select('eval')
  assert [r['step'] for r in evaluations] == [10, 20, 30]
  assert all(r['examples'] == 70 for r in evaluations)
  _, state, _, evaluate, _, eval_batches = problem(Net())
  whole = np.concatenate(
    [
      np.asarray(evaluate(result.params, state, b)['accuracy'])[b['mask']]
      for b in eval_batches()
    ]
  )
  np.testing.assert_allclose(evaluations[-1]['accuracy'], whole.mean())


def test_evaluations_take_the_iterate_that_the_optimiser_has_for_them():
  """schedule_free's average, through all events, and not where it trains."""

  def size(params, model_state, batch):
    squares = [jnp.sum(x**2) for x in jax.tree.leaves(params)]
    return {'size': jnp.full(len(batch['x']), sum(squares))}

  run = functools.partial(
    fit,
    optimizer=contrib.schedule_free(optax.sgd(0.1), 0.1),
    eval_fn=size,
    eval_every=10,
  )
  eval_params = contrib.schedule_free_eval_params
  result, plain = run(eval_params=eval_params), run()

  params = result.params
  average = eval_params(result.state.opt_state, oialr.trainable(params))
  average = oialr.to_dense(oialr.with_trainable(params, average))
  trained = oialr.to_dense(plain.params)
  last = lambda found: found.select('eval')[-1]['size']
  of = lambda dense: size(dense, {}, {'x': [0]})['size'][0]
  np.testing.assert_allclose(last(result), of(average), rtol=1e-5)
  np.testing.assert_allclose(last(plain), of(trained), rtol=1e-5)
  assert abs(last(result) / last(plain) - 1) > 1e-4
  np.testing.assert_array_equal(losses(result), losses(plain))


@pytest.mark.parametrize('case', ['used up', 'all padding'])
def test_an_evaluation_without_examples_is_an_error(case):
  batches = [*problem(Net())[5]()]
  padding = [{**b, 'mask': np.zeros(32)} for b in batches]
  once = iter(batches)
  calls = iter([once, once] if case == 'used up' else [batches, padding])
  message = 'eval_data: there is no example at step 20; it must return'
  with pytest.raises(ValueError, match=message):
    fit(eval_data=lambda: next(calls), eval_every=10)


def test_tracking_measures_every_chosen_layer():
  result = fit(track_every=10)
  measured = result.select('stability')
  assert [r['step'] for r in measured] == [10, 20, 30]
  for record in measured:
    assert list(record['stability']) == ['first/kernel', 'second/kernel']
    assert all(-1 <= v <= 1.0001 for v in record['stability'].values())
    assert all(v >= 0 for v in record['r_distance'].values())


def test_tracking_measures_what_else_is_asked_for():
  def moved(old, new, layers):
    kernel = lambda p, layer: oialr.tree.flatten(p)[layer.path]
    sums = {x.path: jnp.sum(kernel(new, x) - kernel(old, x)) for x in layers}
    return {'moved': sums}

  result = fit(schedule=None, track_every=10, track_more=moved)
  params = problem(Net())[0]
  for path in ('first/kernel', 'second/kernel'):
    before, after = (
      oialr.tree.flatten(p)[path].sum() for p in (params, result.params)
    )
    steps = [r['moved'][path] for r in result.select('stability')]
    assert len(steps) == 3 and all(steps)
    assert sum(steps) == pytest.approx(float(after - before), abs=1e-4)
  with pytest.raises(ValueError, match='track_more wants to know how often'):
    fit(track_more=moved)


def test_workdir_holds_metrics_events_and_a_checkpoint(tmp_path):
  result = fit(workdir=tmp_path)
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    json.loads(json.dumps(r)) for r in result.records
  ]
  assert list((tmp_path / 'tensorboard').iterdir())
  like = jax.tree.map(jnp.zeros_like, result.state)
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as saved:
    step, arrays, _ = saved.restore(lambda _: {'state': like, 'bases': []})
  assert step == STEPS
  jax.tree.map(np.testing.assert_array_equal, arrays['state'], result.state)


def test_stop_at_leaves_the_rest_of_the_run_as_it_was():
  result = fit(stop_at=12)
  assert int(result.state.step) == 12
  np.testing.assert_array_equal(losses(result), losses(once())[:12])


@pytest.mark.parametrize(
  'options, message',
  [
    ({'steps': 0}, 'steps=0: must be at least 1'),
    ({'stop_at': STEPS + 1}, r'stop_at=31: must be in \[1, 30\]'),
    ({'steps': STEPS + 1}, 'schedule.steps=30 is not steps=31'),
    ({'eval_fn': None}, 'eval_fn and eval_data go together'),
    ({'data': [None]}, 'data is empty'),
    ({'layers': []}, 'layers is empty'),
  ],
)
def test_wrong_calls_say_what_is_wrong(options, message):
  with pytest.raises(ValueError, match=message):
    fit(**options)


def test_wrong_compactions():
  with pytest.raises(ValueError, match='min_saving=2'):
    training.Compaction(min_saving=2)
  with pytest.raises(ValueError, match='payback=-1'):
    training.Compaction(payback=-1)
  with pytest.raises(ValueError, match='multiple_of=0'):
    training.Compaction(multiple_of=0)


def one_step(loss_fn):
  return training.fit(
    loss_fn,
    {'w': jnp.ones((3, 2))},
    [{'x': jnp.ones((8, 3))}],
    optimizer=optax.sgd(1.0),
    steps=1,
  )


@pytest.mark.parametrize(
  'loss_fn',
  [
    lambda p, s, batch, key: jnp.mean(batch['x'] @ p['w']),
    lambda p, s, batch, key: (jnp.mean(batch['x'] @ p['w']), {}),
    lambda p, s, batch, key: (jnp.mean(batch['x'] @ p['w']), (s, 1.0)),
    lambda p, s, batch, key: (batch['x'] @ p['w'], (s, {})),
  ],
)
def test_what_a_loss_has_to_return_is_said(loss_fn):
  with pytest.raises(
    ValueError, match=r'must return `loss, \(model_state, met'
  ):
    one_step(loss_fn)


@pytest.mark.parametrize('name', ['loss', 'seconds'])
def test_no_metric_of_a_loss_takes_its_place(name):
  def loss(params, model_state, batch, key):
    del key
    found = jnp.mean(batch['x'] @ params['w'])
    return found * jnp.nan, (model_state, {name: found})

  with pytest.raises(ValueError, match=f'the metric {name!r} of loss_fn has'):
    one_step(loss)


def test_metrics_are_one_number_an_example():
  batch = {'x': jnp.ones((8, 3))}
  step = training.eval_step(lambda p, s, b: {'mse': jnp.mean(b['x'])})
  with pytest.raises(ValueError, match=r"'mse' is of shape \(\); must be one"):
    step({}, {}, batch)
  step = training.eval_step(lambda p, s, b: {'mse': b['x']})
  with pytest.raises(ValueError, match=r"'mse' is of shape \(8, 3\)"):
    step({}, {}, batch)


@pytest.mark.parametrize('name', ['step', 'examples'])
def test_no_metric_of_an_evaluation_takes_the_place_of_another(name):
  step = training.eval_step(lambda p, s, b: {name: b['x']})
  with pytest.raises(ValueError, match=f'the metric {name!r} of eval_fn has'):
    step({}, {}, {'x': jnp.ones(8)})


@pytest.mark.parametrize('eval_every', [None, 10])
def test_an_evaluation_that_fails_costs_no_step(tmp_path, eval_every):
  mean = lambda params, model_state, batch: {'y': jnp.mean(batch['y'])}
  options = dict(workdir=tmp_path, eval_every=eval_every)
  with pytest.raises(ValueError, match='must be one number an example'):
    fit(eval_fn=mean, **options)
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as saved:
    assert saved.steps() == [eval_every or STEPS]
  result = fit(resume=True, **options)
  np.testing.assert_array_equal(losses(result), losses(once()))
  assert result.select('eval')[0]['step'] == (eval_every or STEPS)


def test_means_are_not_taken_in_low_precision():
  """NumPy would add bfloat16 up in bfloat16, where 256 + 1 is 256."""

  def loss(params, model_state, batch, key):
    del key
    found = {'ones': jnp.ones((), jnp.bfloat16)}
    return jnp.mean(batch['x'] @ params['w']), (model_state, found)

  result = training.fit(
    loss,
    {'w': jnp.ones((3, 1))},
    ({'x': np.ones((8, 3), np.float32)} for _ in range(300)),
    optimizer=optax.sgd(1e-6),
    steps=300,
    log_every=300,
  )
  assert result.select('train')[0]['ones'] == 1
  batch = {'x': jnp.full(1000, 100.0)}
  for dtype in (jnp.float16, jnp.bfloat16):
    step = training.eval_step(lambda p, s, b: {'x': b['x'].astype(dtype)})  # noqa: B023
    sums, count = step({}, {}, batch)
    assert sums['x'] / count == 100


def test_what_is_pruned_at_first_is_sliced_in_the_end():
  params, _, loss, _, batches, _ = problem(Net())
  example = next(batches()), jax.random.key(0)
  layers = oialr.select(oialr.find_layers(loss, params, {}, *example))
  low = oialr.prune_sigma(oialr.to_lowrank(params, layers), cutoff=0.5)
  options = dict(optimizer=optax.adam(1e-3), steps=3)
  result = training.fit(loss, low, batches(), **options)
  live = oialr.ranks(low)
  assert max(live.values()) < 12
  for name in ('first', 'second'):
    assert result.params[name]['kernel'].rank == live[f'{name}/kernel']
  (end,) = result.select('end')
  assert end['trainable'] == oialr.count(result.params).trainable
  small = training.fit(loss, oialr.compact(low), batches(), **options)
  np.testing.assert_allclose(losses(result), losses(small), rtol=1e-5)


def test_a_batch_that_differs_is_named():
  *_, batches, _ = problem(Net())
  cut = lambda i, b: {**b, 'x': b['x'][:5]} if i == 12 else b
  data = (cut(i, b) for i, b in enumerate(batches()))
  message = r"the batch of step 12: 'x' is float32\[5,.*at first float32\[32,"
  with pytest.raises(ValueError, match=message):
    fit(data=data)


@pytest.mark.parametrize('resume', [False, True])
def test_no_batch_is_read_that_no_step_needs(tmp_path, resume):
  *_, batches, _ = problem(Net())

  def data():
    yield from itertools.islice(batches(), 12)
    raise OSError('the shard of batch 13 is gone')

  options = dict(workdir=tmp_path, stop_at=12, resume=resume)
  if resume:
    fit(workdir=tmp_path, stop_at=12)
  assert fit(data=data(), **options).records[-1]['step'] == 12
  with pytest.raises(OSError, match='batch 13 is gone'):
    fit(data=data(), stop_at=13)


def test_arguments_that_cannot_be_are_said(caplog):
  with pytest.raises(ValueError, match='eval_data=list: must be a function'):
    fit(eval_data=[1])
  with pytest.raises(ValueError, match='must be a folder; mount the bucket'):
    fit(workdir='gs://bucket/run')
  late = oialr.Schedule(steps=STEPS, delay=9, every=500)
  fit(schedule=late, steps=STEPS, stop_at=1)
  assert 'ends before the first update, at step 509' in caplog.text
  never = oialr.Schedule(steps=STEPS, delay=0.99)
  fit(schedule=never, stop_at=1)
  assert 'the transition, at step 30, never comes: the run stays' in caplog.text


def test_a_diverging_loss_stops_the_run_with_its_step():
  with pytest.raises(FloatingPointError, match='loss is (nan|inf) at step'):
    fit(schedule=None, optimizer=optax.sgd(1e30))


# What a step is made of.


@pytest.mark.parametrize('accumulate', [2, 8])
def test_accumulated_steps_are_steps_of_the_whole_batch(accumulate):
  whole, parts = once(), fit(accumulate=accumulate)
  np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-4)
  assert oialr.ranks(parts.params) == oialr.ranks(whole.params)


def test_accumulating_keeps_one_sum_of_gradients():
  params = {'a': jnp.ones((256, 256)), 'b': jnp.ones((256, 1))}

  def loss(params, model_state, batch, key):
    del key
    x = jnp.tanh(batch['x'] @ params['a'])
    return jnp.mean((x @ params['b']) ** 2), (model_state, {})

  def temporary(accumulate):
    tx = oialr.train_sigma(optax.sgd(0.1))
    step = training.train_step(loss, tx, accumulate=accumulate)
    state = training.TrainState(
      jnp.zeros((), jnp.int32), params, tx.init(params), {}
    )
    batch = {'x': jnp.ones((accumulate, 256))}
    lowered = jax.jit(step).lower(state, batch, jax.random.key(0))
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert temporary(32) < temporary(4) + params['a'].nbytes


def test_gradients_in_low_precision_are_accumulated_in_float32():
  params = {'w': jnp.ones((4, 1), jnp.bfloat16)}

  def loss(params, model_state, batch, key):
    del key
    return jnp.mean(batch['x'] @ params['w']), (model_state, {})

  tx = oialr.train_sigma(optax.sgd(1.0))
  step = training.train_step(loss, tx, accumulate=512)
  state = training.TrainState(
    jnp.zeros((), jnp.int32), params, tx.init(params), {}
  )
  batch = {'x': jnp.ones((512, 4), jnp.bfloat16)}
  state, _ = jax.jit(step)(state, batch, jax.random.key(0))
  np.testing.assert_array_equal(state.params['w'], 0)
  assert state.params['w'].dtype == jnp.bfloat16


@pytest.mark.parametrize('accumulate', [1, 2])
def test_optimisers_that_ask_for_the_loss_get_it(accumulate):
  """A rate that falls when the loss does not."""
  tx = optax.chain(
    optax.sgd(1e-30), contrib.reduce_on_plateau(patience=2, factor=0.5)
  )
  result = fit(optimizer=tx, accumulate=accumulate)
  plateau = result.state.opt_state[-1]
  assert plateau.scale < 1
  assert 0 < plateau.best_value <= losses(result).min() + 1e-6


def test_the_flops_of_a_step_are_those_of_all_its_parts():
  flops = lambda accumulate: fit(
    steps=1, schedule=None, accumulate=accumulate, optimizer=optax.sgd(0.1)
  ).select('train')[-1]['flops']
  assert flops(4) == pytest.approx(flops(1), rel=0.15)


def test_what_a_model_carries_goes_through_all_parts():
  """Of two parts the running mean has seen both, one after the other."""
  result = fit(Net(norm=True), steps=1, schedule=None, accumulate=2)
  params, state, loss, _, batches, _ = problem(Net(norm=True))
  batch = next(batches())
  for i in range(2):
    part = {k: x[i::2] for k, x in batch.items()}
    _, (state, _) = loss(params, state, part, None)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    result.state.model_state,
    state,
  )


def test_parts_have_to_divide_the_batch():
  with pytest.raises(ValueError, match=r"accumulate=5: .* 32 examples.*'x'"):
    fit(accumulate=5)
  with pytest.raises(ValueError, match='accumulate=0: must be at least 1'):
    fit(accumulate=0)


@pytest.mark.parametrize(
  'remat', [True, jax.checkpoint_policies.nothing_saveable]
)
def test_what_is_computed_again_is_the_same(remat):
  np.testing.assert_allclose(
    losses(fit(remat=remat)), losses(once()), rtol=1e-5
  )


def test_products_with_weights_are_all_that_is_kept():
  def loss(params, model_state, batch, key):
    del key
    x = jnp.tanh(batch['x'] @ params['a'])
    return jnp.mean((x @ params['b']) ** 2), (model_state, {})

  params = {'a': jnp.ones((8, 8)), 'b': jnp.ones((8, 1))}
  tx = oialr.train_sigma(optax.sgd(0.1))
  state = training.TrainState(
    jnp.zeros((), jnp.int32), params, tx.init(params), {}
  )

  def computed(remat):
    step = training.train_step(loss, tx, remat=remat)
    program = jax.make_jaxpr(step)(
      state, {'x': jnp.ones((4, 8))}, jax.random.key(0)
    )
    return [str(program).count(name) for name in ('= tanh', '= dot_general')]

  # Of two products there are two gradients of weights and one of an input.
  assert computed(False) == [1, 5]
  assert computed(True) == [2, 5]
  assert computed(jax.checkpoint_policies.nothing_saveable) == [2, 7]


def test_bases_in_bfloat16_train():
  schedule = oialr.Schedule(
    steps=STEPS, delay=9, every=7, progressive=1.0, basis_dtype='bfloat16'
  )
  result = fit(schedule=schedule)
  node = result.params['first']['kernel']
  assert node.u.dtype == jnp.bfloat16 and node.s.dtype == jnp.float32
  assert losses(result)[-5:].mean() < 0.7 * losses(result)[:5].mean()


def test_the_change_of_the_loss_by_an_event_is_measured():
  events = fit(probe=True).select('event')
  assert events[0]['change'] < 1e-5  # nothing is pruned at the transition
  # Where no rank falls, what is left is rounding, which may be none at all.
  for before, event in itertools.pairwise(events):
    pruned = event['ranks'] != before['ranks']
    assert (1e-3 if pruned else 0) <= event['change'] < (1 if pruned else 1e-5)
  assert events[1]['ranks'] != events[0]['ranks']
  assert all(e['seconds'] > 0 for e in events)
  assert all(e['change'] is None for e in once().select('event'))
