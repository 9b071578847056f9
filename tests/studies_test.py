"""The studies, from flags to pictures, with runs of a few steps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import architectures
from experiments import beta_study
from experiments import classification
from experiments import cli
from experiments import delay_study
from experiments import image_sets
from experiments import language
from experiments import stability_study
from oialr_jax import models

# How ml_collections loads a file of settings.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')


SHORT = (
  '--quiet',
  '--config.steps=16',
  '--config.warmup=2',
  '--config.batch_size=16',
)


def run(module, workdir, *flags):
  """The binary, within this process; returns its rows."""
  flags = (f'--workdir={workdir}', *SHORT, *flags)
  module.main(*cli.parse(module.BINARY, flags))
  return json.loads((workdir / 'result.json').read_text())['rows']


def rerun(module, workdir, monkeypatch, *flags):
  """With --resume, where nothing is left to train."""

  def fail(*_, **__):
    raise AssertionError('a finished run was trained again')

  monkeypatch.setattr(classification, 'run', fail)
  return run(module, workdir, '--resume', *flags)


def records(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_stability_study(tmp_path, capsys, monkeypatch):
  flags = (
    '--config.networks=mlp',
    '--config.activation=relu',
    '--config.activations=relu',
    '--config.schedules=tiny',
    '--config.batch_sizes=16',
    '--config.track_every=2',
    '--config.models.mlp.widths=8,8',
  )
  rows = run(stability_study, tmp_path, *flags)
  names = [(r['activation'], r['schedule'], r['batch_size']) for r in rows]
  assert names == [
    ('relu', 'warmup', 16),
    ('relu', 'tiny', 16),
  ]
  base, tiny = rows
  # The control hardly moves, so that its bases cannot turn.
  assert tiny['change % late'] < 0.02 < base['change % late']
  assert tiny['lowest'] > 0.9999 and tiny['shows'] != 'yes'
  kept = records(tmp_path / 'mlp-relu-warmup-16' / 'dense-0')
  assert [r for r in kept if r['kind'] == 'stability'] == base['records']
  assert [r['step'] for r in base['records']] == [*range(2, 17, 2)]
  means = [np.mean(list(r['stability'].values())) for r in base['records']]
  assert base['final'] == pytest.approx(means[-1])
  assert base['lowest'] == pytest.approx(min(means))
  assert (tmp_path / 'stability.png').stat().st_size > 10_000
  printed = capsys.readouterr().out
  assert 'turn / chance' in printed and 'Between random bases' in printed
  assert rerun(stability_study, tmp_path, monkeypatch, *flags) == rows


def test_beta_study(tmp_path, capsys, monkeypatch):
  flags = (
    '--config.cutoffs=0.1,0.9',
    '--config.seeds=0',
    '--config.model.widths=12,12',
    '--config.oialr.delay=0.25',
    '--config.oialr.every=8',
    '--config.oialr.progressive=1',
  )
  rows = run(beta_study, tmp_path, *flags)
  assert [row['cutoff'] for row in rows] == [None, 0.1, 0.9]
  dense, low, lowest = (row['trainable %'] for row in rows)
  assert dense == 100 > low > lowest
  assert (tmp_path / 'beta.png').stat().st_size > 10_000
  assert 'beta' in capsys.readouterr().out
  assert rerun(beta_study, tmp_path, monkeypatch, *flags) == rows


def test_delay_study(tmp_path, capsys, monkeypatch):
  flags = (
    '--config.delays=0,0.5',
    '--config.depths=1',
    '--config.learning_rates=0.01',
    '--config.seeds=0',
    '--config.width=12',
    '--config.oialr.every=8',
  )
  rows = run(delay_study, tmp_path, *flags)
  assert [row['delay'] for row in rows] == [None, 0, 0.5]
  at = {
    name: [
      r['step']
      for r in records(tmp_path / f'{name}-depth-1-rate-0.01' / run_name)
      if r.get('event') == 'transition'
    ]
    for name, run_name in (
      ('dense', 'dense-0'),
      ('0', 'oialr-0'),
      ('0.5', 'oialr-0'),
    )
  }
  assert at == {'dense': [], '0': [0], '0.5': [8]}
  assert (tmp_path / 'delay.png').stat().st_size > 10_000
  assert 'delay' in capsys.readouterr().out
  assert rerun(delay_study, tmp_path, monkeypatch, *flags) == rows


def test_architectures(tmp_path, capsys, monkeypatch):
  flags = (
    '--config.networks=gpt',
    '--config.seeds=0',
    '--config.characters=4000',
    '--config.context=8',
    '--config.models.gpt.embed_dim=16',
    '--config.models.gpt.depth=1',
    '--config.oialr.delay=0.25',
    '--config.oialr.every=99',  # what compiles takes the time
    '--config.oialr.progressive=1',
  )
  rows = run(architectures, tmp_path, *flags)
  assert [row['method'] for row in rows] == ['dense', 'oialr']
  dense, low = rows
  assert dense['trainable %'] == 100 > low['trainable %']
  # Not far from a guess, log2(128) = 7 bits.
  assert 4 < dense['test'] < 7.5
  printed = capsys.readouterr().out
  assert 'bits a character' in printed
  assert rerun(architectures, tmp_path, monkeypatch, *flags) == rows


def config_of(*flags):
  return cli.parse(beta_study.BINARY, flags)


def test_splits_share_no_image_and_are_measured_apart():
  config, options = config_of('--config.eval_batch_size=100')
  images = image_sets.load(config, options)
  sizes = {
    name: len(getattr(images, name)) for name in ('train', 'val', 'test')
  }
  assert sizes == {'train': 1078, 'val': 269, 'test': 450}
  config.examples = 50
  some = image_sets.load(config, options)
  np.testing.assert_array_equal(some.train.image, images.train.image[:50])
  np.testing.assert_array_equal(some.val.image, images.val.image)
  model = models.Mlp(widths=(8,))
  task = image_sets.Task.of_images(model, images, config)
  params, state = task.init(0)
  found, count = {}, 0
  for batch in task.test():
    mask = batch['mask']
    count += mask.sum()
    for name, values in task.evaluate(params, state, batch).items():
      found[name] = found.get(name, 0) + float((values * mask).sum())
  for name in ('val', 'test'):
    split = getattr(images, name)
    logits = model.apply({'params': params}, jnp.asarray(split.image) / 16)
    hit = np.argmax(logits, -1) == split.label
    assert found[f'{name}_accuracy'] / count == pytest.approx(hit.mean())
    logs = jax.nn.log_softmax(logits)[np.arange(len(split)), split.label]
    assert found[f'{name}_loss'] / count == pytest.approx(
      float(-logs.mean()), rel=1e-5
    )


def test_images_are_upscaled_pixel_by_pixel():
  config, options = config_of('--config.upscale=3', '--config.examples=2')
  small, _ = config_of('--config.examples=2')
  large = image_sets.load(config, options).train.image
  original = image_sets.load(small, options).train.image
  assert large.shape[1:] == image_sets.shape(config) == (24, 24, 1)
  for i in range(3):
    np.testing.assert_array_equal(large[:, i::3, 2 - i :: 3], original)


def test_text_is_cut_by_files_and_windows_follow_the_seed():
  texts = language.text(4000)
  assert {k: len(x) for k, x in texts.items()} == {
    'train': 4000,
    'val': 500,
    'test': 500,
  }
  assert max(x.max() for x in texts.values()) < language.VOCABULARY
  model = models.Gpt(context=8, embed_dim=8, depth=1, num_heads=2)
  task = language.Task(
    model=model, texts=texts, context=8, batch_size=4, eval_batch_size=40
  )
  first = next(task.train(0))
  assert first.shape == (4, 9) and bytes(first[0]) in bytes(texts['train'])
  np.testing.assert_array_equal(first, next(task.train(0)))
  assert np.any(first != next(task.train(1)))
  # Bits over the test windows alone, by hand.
  params, state = task.init(0)
  evaluate = jax.jit(task.evaluate)
  found, count = 0, 0
  for batch in task.test():
    count += batch['mask'].sum()
    bits = evaluate(params, state, batch)['test_bits']
    found += float((bits * batch['mask']).sum())
  windows = np.stack(
    [texts['test'][i : i + 9] for i in range(0, 500 - 8, 8)]
  ).astype(np.int32)
  logits = jax.jit(model.apply)({'params': params}, windows[:, :-1])
  logits = np.asarray(logits)
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  rows, columns = np.indices(windows[:, 1:].shape)
  expected = -logs[rows, columns, windows[:, 1:]].mean() / np.log(2)
  assert found / count == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
  'binary, flag, message',
  [
    (
      stability_study,
      '--config.networks=vitt',
      "no 'vitt'; did you mean 'vit'",
    ),
    (stability_study, '--config.activations=rel', "activation='rel'"),
    (stability_study, '--config.schedules=cos', "no 'cos'; did you mean 'cosi"),
    (stability_study, '--config.data=mnits', "did you mean 'mnist'"),
    (stability_study, '--config.augment', 'is for data=cifar10'),
    (stability_study, '--config.val_share=0', 'val_share=0: must be positive'),
    (stability_study, '--config.batch_sizes=2000', 'more than there are'),
    (stability_study, '--config.track_every=100', 'quarters of the 480 steps'),
    (stability_study, '--config.models.vit.patch_size=3', 'config.models.vit'),
    (beta_study, '--config.cutoffs=1.5', 'config.cutoffs=1.5: must be in'),
    (beta_study, '--config.oialr.evry=3', 'Did you mean "every"'),
    (beta_study, '--config.model.name=mpl', "did you mean 'mlp'"),
    (delay_study, '--config.delays=2', 'config.delays=2'),
    (delay_study, '--config.warmup=300', 'must be less than config.steps=300'),
    (architectures, '--config.methods=olr', "no 'olr'; did you mean 'oialr'"),
    (
      architectures,
      '--config.models.gpt.num_heads=3',
      'config.models.gpt: num',
    ),
    (architectures, '--config.upscale=1', 'config.models.convnext: images of'),
  ],
)
def test_studies_check_what_is_theirs(binary, flag, message):
  with pytest.raises(ValueError, match=message):
    cli.parse(binary.BINARY, [flag])
