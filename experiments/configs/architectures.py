"""OIALR on MLP-Mixer, ConvNeXt, ResNet and a decoder-only language model.

Paper row: none; its networks are ViTs, ResNet-RS and Autoformer.
Command: python -m experiments.architectures
Hardware and minutes: any CPU; 12 minutes on one core with 2 seeds.
Expected: dense and OIALR in test accuracy 96.8 and 97.1 % (Mixer), 96.7 and
96.9 % (ConvNeXt), 98.4 and 98.8 % (ResNet), 2.63 and 2.76 bits a character
(language model), with 27, 7, 8 and 18 % trainable; seeds 0 and 1.

Images are the digits, every pixel as 2 x 2; the text is the source of Python's
standard library. The variant `cifar10` has CIFAR-10 and networks of eight times
the size, for a GPU.
"""

import ml_collections

from experiments import runs
from experiments import settings

_MODELS = dict(
  mixer=dict(
    name='mixer_b16_224',
    num_classes=10,
    patch_size=4,
    embed_dim=64,
    depth=4,
    dtype='float32',
  ),
  convnext=dict(
    name='convnext_tiny',
    num_classes=10,
    depths=(1, 1, 2),
    dims=(32, 64, 128),
    dtype='float32',
  ),
  resnet=dict(name='resnet18_cifar', width=16, dtype='float32'),
  gpt=dict(embed_dim=64, depth=3, num_heads=4),
)
_VARIANTS = {
  '': {},
  'cifar10': dict(
    data='cifar10',
    upscale=1,
    augment=True,
    val_share=0.1,
    steps=20_000,
    batch_size=128,
    eval_batch_size=500,
    warmup=1000,
    context=256,
    characters=10_000_000,  # all
    models=dict(
      mixer=dict(embed_dim=256, depth=8),
      convnext=dict(depths=(3, 3, 9), dims=(96, 192, 384)),
      resnet=dict(width=64),
      gpt=dict(embed_dim=384, depth=6, num_heads=6),
    ),
    oialr=dict(every=500),
  ),
}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  settings.check_names([variant], _VARIANTS, 'variant')
  config = ml_collections.ConfigDict(
    dict(
      networks=('mixer', 'convnext', 'resnet', 'gpt'),
      methods=('dense', 'oialr'),
      seeds=(0, 1),
      data='digits',
      examples=settings.optional(int),
      val_share=0.2,
      upscale=2,
      augment=False,
      characters=400_000,
      context=48,
      steps=400,
      batch_size=64,
      eval_batch_size=450,
      learning_rate=4e-3,  # the best of four for gpt, dense
      warmup=40,
      weight_decay=0.01,
      clip=5.0,
      models=_MODELS,
      # Sliced at the end alone: between, a run of seconds would compile.
      compaction=dict(min_saving=1.0, background=False, reproducible=True),
      oialr=runs.oialr_section(
        delay=1 / 3,  # steps, or a share of the run
        every=40,
        cutoff=0.2,
        progressive=0.5,
        sigma_scale=2.0,
      ),
    )
  )
  config.update(_VARIANTS[variant])
  return config
