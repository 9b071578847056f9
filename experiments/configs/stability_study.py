"""When bases stop turning, over activations, layers, schedules and batch sizes.

Paper row: Section 3 and its figure of the stability of ViT-B/16 and
ResNet-RS-101 on ImageNet; its first open question (other activations and layer
types) and its check on learning-rate schedules.
Command: python -m experiments.stability_study
Hardware and minutes: any CPU; 4 minutes on one core.
Expected: with the base of every network, the mean stability starts below 0.98
and soon stays above it; it turns less than by chance, the less the longer the
run. With the control `tiny` it is 1 throughout and shows nothing, as the
kernels do not move.

One factor is varied at a time: activations and schedules of every network,
batch sizes of the first one. The variant `cifar10` is the paper's mini ViT at
full size, for a GPU, with augmentation.
"""

import ml_collections

from experiments import settings

_MINI_VIT = dict(
  name='mini_vit',
  embed_dim=768,
  depth=6,
  num_heads=6,
  patch_size=8,
  dtype='float32',
)
_VARIANTS = {
  '': {},
  'cifar10': dict(
    data='cifar10',
    augment=True,
    networks=('vit',),
    models=dict(vit=_MINI_VIT),
    batch_size=1024,
    batch_sizes=(256, 4096),
    steps=4800,  # 100 epochs
    warmup=480,
    track_every=80,
    eval_batch_size=1000,
    learning_rate=3e-4,
  ),
}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  settings.check_names([variant], _VARIANTS, 'variant')
  config = ml_collections.ConfigDict(
    dict(
      networks=('vit', 'cnn', 'mlp'),
      activations=('relu', 'gelu', 'silu', 'tanh'),
      schedules=('constant', 'cosine', 'restarts', 'tiny'),
      batch_sizes=(16, 256),
      activation='gelu',
      schedule='warmup',
      batch_size=64,
      seeds=(0,),
      data='digits',
      examples=settings.optional(int),
      val_share=0.2,
      upscale=1,
      augment=False,
      steps=480,
      eval_batch_size=450,
      learning_rate=3e-3,
      warmup=48,
      weight_decay=0.01,
      clip=5.0,
      track_every=32,  # 15 intervals
      models=dict(
        vit=dict(
          name='mini_vit',
          embed_dim=48,
          depth=2,
          num_heads=4,
          patch_size=2,
          dtype='float32',
        ),
        cnn=dict(
          name='mnist_cnn',
          channels=(32, 64),
          kernel=3,
          width=128,
          dropout=0.0,
          dtype='float32',
        ),
        mlp=dict(name='mlp', widths=(128, 128, 128), dtype='float32'),
      ),
    )
  )
  config.update(_VARIANTS[variant])
  return config
