"""Tests of the flags and settings that the binaries share."""

import re
import subprocess
import sys
import time

from absl import flags
import ml_collections
import pytest

from experiments import architectures
from experiments import beta_study
from experiments import cifar10_vit
from experiments import cli
from experiments import delay_study
from experiments import digits
from experiments import ett_autoformer
from experiments import imagenet
from experiments import mnist_cnn
from experiments import settings
from experiments import stability_study

# How ml_collections loads a file of settings.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

BINARIES = [
  x.BINARY
  for x in (
    digits,
    mnist_cnn,
    ett_autoformer,
    cifar10_vit,
    imagenet,
    stability_study,
    beta_study,
    delay_study,
    architectures,
  )
]
_FILE = 'experiments/configs/{}.py:{}'
VARIANTS = [
  (ett_autoformer, 'cpu'),
  (cifar10_vit, 'small'),
  (imagenet, 'vit_base_patch16_224'),
  (imagenet, 'resnetrs101'),
  (imagenet, 'resnet50'),
  (stability_study, 'cifar10'),
  (beta_study, 'mnist'),
  (architectures, 'cifar10'),
]


def start(*argv):
  return subprocess.run(
    [sys.executable, '-m', *argv], capture_output=True, text=True, timeout=600
  )


def parse(*argv, binary=digits.BINARY):
  return cli.parse(binary, argv)


@pytest.mark.parametrize('binary', BINARIES, ids=lambda x: x.name)
def test_defaults_are_right_and_every_setting_is_described(binary):
  config, options = parse(binary=binary)
  assert config.to_dict() == binary.config().to_dict()
  assert str(options.workdir) == f'runs/{binary.name}'
  assert not options.resume and not options.quiet
  described = settings.describe(config)
  for key, value in config.items():
    known = settings.SECTIONS if key in settings.SECTIONS else settings.SETTINGS
    assert key in known and key in described
    if key in settings.SECTIONS:
      made = settings.SECTIONS[key][1]
      for name in settings.flat(value):
        line = re.search(f'^{key}.{name} = [^:\n]*(.*)$', described, re.M)
        assert line and (made is None or len(line[1]) > 5)


@pytest.mark.parametrize('module, variant', VARIANTS)
def test_variants_are_right(module, variant):
  path = _FILE.format(module.BINARY.name, variant)
  config, _ = parse(f'--config={path}', binary=module.BINARY)
  assert {*config} == {*module.BINARY.config()}


def test_flags_and_settings_are_set():
  config, options = parse(
    '--workdir=a/b',
    '--quiet',
    '--resume',
    '--checkpoint_every=7',
    '--max_seconds=60',
    '--probe',
    '--config.steps=80',
    '--config.oialr.delay=20',
    '--config.oialr.every=9',
  )
  assert (options.workdir.name, options.quiet) == ('b', True)
  assert config.steps == 80 and config.oialr.every == 9
  # Steps or a share of the run, whatever the default is.
  assert config.oialr.delay == 20 and isinstance(config.oialr.delay, int)
  assert parse('--config.oialr.delay=0.5')[0].oialr.delay == 0.5
  fit = options.fit()
  assert fit['resume'] and fit['probe'] and fit['checkpoint_every'] == 7
  assert 0 < fit['max_seconds'] <= 60


def test_tuples_are_given_by_commas():
  config, _ = parse(
    '--config.methods=oialr,dense',
    '--config.seeds=3,1',
    '--config.horizons=720',
    binary=ett_autoformer.BINARY,
  )
  assert config.methods == ('oialr', 'dense')
  assert config.seeds == (3, 1) and config.horizons == (720,)


def test_runs_share_the_seconds_that_they_have():
  started = time.monotonic() - 50
  options = cli.Options(workdir=None, max_seconds=60.0, started=started)
  assert 0 < options.fit()['max_seconds'] < 10
  options = cli.Options(workdir=None, max_seconds=40.0, started=started)
  assert options.fit()['max_seconds'] == 0
  assert cli.Options(workdir=None).fit()['max_seconds'] is None


@pytest.mark.parametrize(
  'flag, error, message',
  [
    ('--wrkdir=x', flags.Error, "'wrkdir'. Did you mean: workdir"),
    ('--config.stesp=3', ValueError, 'Did you mean "steps" instead of'),
    ('--config.oialr.cutof=0.1', ValueError, 'Did you mean "cutoff" instead'),
    ('--config.qqq=1', ValueError, "has no setting 'qqq'"),
    ('--config.steps=many', flags.Error, 'config.steps=many: invalid literal'),
    ('--config.steps=0', ValueError, r'config.steps=0: must be at least 1'),
    ('--config.clip=nan', ValueError, 'config.clip=nan: must be positive'),
    ('--config.warmup=900', ValueError, 'must be less than config.steps=900'),
    ('--config.oialr.cutoff=3', ValueError, 'config.oialr: cutoff=3.0: must'),
    ('--config.oialr.delay=x', ValueError, 'of a wrong type'),
    (
      '--config.compaction.min_saving=2',
      ValueError,
      r'config.compaction: min_saving=2.0: must be in \[0, 1\]',
    ),
    ('--max_seconds=-1', flags.Error, 'not a non-negative number'),
    ('--checkpoint_every=0', flags.Error, 'positive integer'),
    ('--data_dir=x', flags.Error, 'data_dir'),
    ('more', flags.Error, 'unexpected arguments: more'),
  ],
)
def test_what_is_wrong_is_said(flag, error, message):
  with pytest.raises(error, match=message):
    parse(flag)


@pytest.mark.parametrize(
  'binary, flag, message',
  [
    (mnist_cnn, '--config.seeds=', 'config.seeds=.*one value or more'),
    (mnist_cnn, '--config.seeds=-1', 'config.seeds=-1: must be at least 0'),
    (mnist_cnn, '--config.oialr.delay=4190', 'compared until step 4210'),
    (ett_autoformer, '--config.sets=ETTm3', "'ETTm3'; did you mean 'ETTm2'"),
    (ett_autoformer, '--config.methods=olr', "no 'olr'; did you mean 'oialr'"),
    (ett_autoformer, '--config.model.factor=-1', 'config.model: factor'),
    (ett_autoformer, '--config.model.d_mdel=9', 'Did you mean "d_model"'),
    (ett_autoformer, '--config.label_len=97', 'at most seq_len=96'),
    (ett_autoformer, '--config.loss=ma', "no 'ma'; did you mean 'mae'"),
    (ett_autoformer, '--config.horizons=34500', '0 windows for training'),
    (ett_autoformer, '--config.oialr.every=0', 'config.oialr: every=0'),
    (cifar10_vit, '--config.model.name=min_vit', "did you mean 'mini_vit'"),
    (cifar10_vit, '--config.model.num_heads=5', 'num_heads=5 does not divide'),
    (cifar10_vit, '--config.model.patch_size=5', 'config.model'),
    (cifar10_vit, '--config.model.dtype=int8', 'config.model.dtype'),
    (cifar10_vit, '--config.warmup_epochs=300', 'by its 300.0 epochs'),
    (cifar10_vit, '--config.augmentation.flip=2', 'config.augmentation: flip'),
    (imagenet, '--config.batch_size=5', 'batch_size=5: is mixed in pairs'),
    (imagenet, '--config.image_size=100', 'config.model'),
  ],
)
def test_binaries_check_what_is_theirs(binary, flag, message):
  with pytest.raises(ValueError, match=message):
    parse(flag, binary=binary.BINARY)


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(stesp=3), "config: there is no 'stesp'; did you mean 'steps'"),
    (dict(steps='x'), "config.steps='x': must be at least 1"),
    (
      dict(oialr=dict(cutof=0.1)),
      "config.oialr: there is no 'cutof'; did you mean 'cutoff'",
    ),
    (dict(oialr=dict(steps=9)), "config.oialr: there is no 'steps'"),
  ],
)
def test_files_of_settings_are_checked(tmp_path, changes, message):
  reference = digits.BINARY.config()
  values = {k: v for k, v in reference.items() if k not in settings.SECTIONS}
  sections = {k: dict(reference[k]) for k in reference if k not in values}
  for key, value in changes.items():
    values[key] = sections.pop(key, {}) | value if key == 'oialr' else value
  file = tmp_path / 'mine.py'
  file.write_text(
    'import ml_collections\n\ndef get_config():\n'
    f'  return ml_collections.ConfigDict({values | sections!r})\n'
  )
  with pytest.raises(ValueError, match=message):
    parse(f'--config={file}')


def test_a_setting_that_a_file_lacks_is_named():
  config = digits.BINARY.config()
  with config.unlocked():
    del config.batch_size
  with pytest.raises(ValueError, match='config.batch_size is missing: add it'):
    settings.check(config, digits.BINARY.config())


def test_settings_may_be_left_to_their_default_of_none():
  reference = ml_collections.ConfigDict(dict(steps=settings.optional(int)))
  config = reference.copy_and_resolve_references()
  settings.check(config, reference)
  with pytest.raises(ValueError, match='config.clip=None'):
    settings.check(
      ml_collections.ConfigDict(dict(clip=None)),
      ml_collections.ConfigDict(dict(clip=1.0)),
    )


def test_help_lists_flags_and_settings_with_defaults():
  done = start('experiments.digits', '--help')
  text = ' '.join(done.stdout.split())
  for part in (
    'handwritten digits, dense and by OIALR',  # what it does
    '--workdir: Folder for all that is written.',
    "(default: 'runs/digits')",
    'Optimiser steps between checkpoints.',  # units
    'Seconds after which to save and stop',
    'warmup = 50: steps of linear warm-up',
    'oialr.*: of the method, see oialr_jax.Schedule',
    'oialr.cutoff = 0.4',
  ):
    assert part in text


def test_what_is_wrong_with_flags_is_a_line_not_a_traceback(tmp_path):
  done = start(
    'experiments.digits', f'--workdir={tmp_path}', '--config.stesp=3'
  )
  assert done.returncode == 1 and 'Traceback' not in done.stderr
  assert 'Did you mean "steps"' in done.stderr
  assert not [*tmp_path.iterdir()]


def test_processes_join_before_anything_is_checked(monkeypatch):
  said = []
  monkeypatch.setattr(
    cli.sharding, 'initialize', lambda *where: said.append(where)
  )
  monkeypatch.setattr(cli.settings, 'check', lambda *_: said.append('checked'))
  monkeypatch.setattr(cli, '_main', lambda *_: said.append('run'))
  where = ['--coordinator=a:1', '--processes=3', '--process=2', '--quiet']
  with monkeypatch.context() as patch:
    patch.setattr(flags, 'FLAGS', flags.FlagValues())
    patch.setattr(sys, 'argv', ['digits', *where])
    patch.setattr(
      cli.app, 'run', lambda main, flags_parser: main(flags_parser(sys.argv))
    )
    cli.run(digits.BINARY)
  assert said == [('a:1', 3, 2), 'checked', 'run']
