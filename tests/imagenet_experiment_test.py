"""The binary for ImageNet, end to end on a generated folder."""

import json

import numpy as np
import pytest

from experiments import cli
from experiments import imagenet
from oialr_jax import training
from tests import tfds_folders

# How ml_collections loads a file of settings.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

COMMON = (
  '--config.steps=6',
  '--config.epochs=6',
  '--config.warmup_epochs=2',
  '--config.eval_epochs=3',
  '--config.batch_size=8',
  '--config.eval_batch_size=8',
  '--config.image_size=32',
  '--config.workers=0',
  '--config.compaction.background=false',
  '--config.compaction.min_saving=0',
  '--config.oialr.delay=2',
  '--config.oialr.every=2',
  '--config.oialr.progressive=1',
  '--config.oialr.cutoff=0.3',
  '--quiet',
)
VIT = (
  '--config.methods=oialr',
  '--config.model.embed_dim=16',
  '--config.model.depth=1',
  '--config.model.num_heads=2',
)
RESNET = (
  '--config=experiments/configs/imagenet.py:resnet50',
  '--config.model.depths=1,1',
  '--config.model.width=8',
  '--config.augmentation.mixup=0',
  '--config.augmentation.erase=0',
  '--config.augmentation.operations=0',  # compiles for long
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  tfds_folders.imagenet(folder)
  return folder


def run(folder, workdir, *changes):
  # A file of settings is named before what changes them.
  variant = [flag for flag in changes if flag.startswith('--config=')]
  rest = [flag for flag in changes if flag not in variant]
  places = f'--data_dir={folder}', f'--workdir={workdir}'
  flags = (*variant, *places, *COMMON, *rest)
  config, options = cli.parse(imagenet.BINARY, flags)
  imagenet.main(config, options)


def records(workdir, name='oialr-0'):
  lines = (workdir / name / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_vision_transformer_goes_on_after_an_interruption(folder, tmp_path):
  with pytest.raises(training.Interrupted):
    run(folder, tmp_path, *VIT, '--max_seconds=0')
  run(folder, tmp_path, *VIT, '--resume', '--checkpoint_every=3')
  *_, row = json.loads((tmp_path / 'result.json').read_text())['rows']
  assert row['method'] == 'oialr' and row['trainable %'] < 100
  found = records(tmp_path)
  events = [x['event'] for x in found if x['kind'] == 'event']
  assert events == ['transition', 'update']
  assert 'compaction' in {x['kind'] for x in found}
  evaluated = [x for x in found if x['kind'] == 'eval']
  assert [x['step'] for x in evaluated] == [3, 6]
  assert all(x['examples'] == 10 for x in evaluated)
  losses = sum((x['losses'] for x in found if x['kind'] == 'train'), [])
  assert len(losses) == 6 and np.all(np.isfinite(losses))
  # Of a thousand classes, of which nothing has been learnt.
  assert losses[0] == pytest.approx(np.log(1000), rel=0.1)


def test_a_resnet_keeps_its_batch_statistics(folder, tmp_path):
  run(folder, tmp_path, *RESNET, '--config.steps=2', '--config.methods=dense')
  end = records(tmp_path, 'dense-0')[-1]
  assert (end['kind'], end['step']) == ('end', 2)


def test_missing_data_end_with_how_to_prepare_them(tmp_path):
  with pytest.raises(FileNotFoundError, match='download_and_prepare'):
    run(tmp_path, tmp_path / 'workdir', *VIT)


@pytest.mark.parametrize(
  'variant, parameters',
  [('vit_base_patch16_224', '86,567,656'), ('resnet50', '25,557,032')],
)
def test_explain_tells_of_the_model_at_full_size(variant, parameters):
  flag = f'--config=experiments/configs/imagenet.py:{variant}'
  config, _ = cli.parse(imagenet.BINARY, (flag,))
  text = imagenet.explain(config)
  assert f'{parameters} parameters' in text
  *_, dense, full, half, third, tenth = text.splitlines()
  assert dense.split() == ['dense', '100', '100', '100', *_memory(parameters)]
  shares = [
    [float(x) for x in line.split()[1:]] for line in (full, half, third, tenth)
  ]
  assert np.all(np.diff(shares, axis=0) < 0)
  assert shares[0][0] < 100 < shares[0][1]  # of full rank it stores more


def _memory(parameters):
  count = 4e-9 * int(parameters.replace(',', ''))
  return f'{count:.3g}', f'{2 * count:.3g}'
