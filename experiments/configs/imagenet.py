"""ImageNet-2012: ViT-B/16 (the default), ResNet-RS-101, ResNet-50.

Paper row: 300 epochs, AdamW, mixup 0.1, label smoothing 0.1; OIALR comparable to
dense with about 16 % of the parameters trainable, for ViT-B/16 and ResNet-RS-101
(160 pixels). ResNet-50 is not in the paper.
Command: python -m experiments.imagenet --data_dir=FOLDER_OF_TFDS
  --config=experiments/configs/imagenet.py:resnetrs101
Hardware and minutes: GPUs or TPUs, not measured; a full run was not done here.
Fifty steps of 8 images on a CPU core take 6 to 15 minutes (BUILD_NOTES.md).
Expected: the dense run and OIALR within noise of each other, as published; not
measured.

ResNet-RS-101 has the rates, decay and clipping of the authors' configuration,
configs/experiment/imagenet-resnetrs.yaml, ResNet-50 the same. For ViT-B/16 none
is published: it has those of their ViT for CIFAR-10. The transition is that of
the paper's algorithm, after a third of the run; its frequency is not published.
"""

import ml_collections

from experiments import runs
from experiments import settings

_VIT = dict(
  embed_dim=768,
  depth=12,
  num_heads=12,
  patch_size=16,
  dropout=0.0,
  drop_path=0.0,
)
_RESNET = dict(width=64, drop_path=0.0)
_SMALLER_DECAY = dict(learning_rate=1e-3, weight_decay=1e-3, clip=1.0)

_VARIANTS = {
  'vit_base_patch16_224': dict(image_size=224, model=_VIT),
  'resnetrs101': dict(
    image_size=160,
    model=dict(depths=(3, 4, 23, 3), dropout=0.25, **_RESNET),
    **_SMALLER_DECAY,
  ),
  'resnet50': dict(
    image_size=224,
    model=dict(depths=(3, 4, 6, 3), dropout=0.0, **_RESNET),
    **_SMALLER_DECAY,
  ),
}


def get_config(
  variant: str = 'vit_base_patch16_224',
) -> ml_collections.ConfigDict:
  settings.check_names([variant], _VARIANTS, 'variant')
  config = ml_collections.ConfigDict(
    dict(
      methods=('dense', 'oialr'),
      seeds=(0,),
      epochs=300.0,
      steps=settings.optional(int),  # instead of those of the epochs
      eval_epochs=5.0,
      batch_size=1024,
      eval_batch_size=512,
      accumulate=1,
      remat=False,
      workers=8,
      image_size=224,
      learning_rate=3e-4,
      warmup_epochs=10.0,
      warmup_rate=1e-5,
      cooldown_epochs=0.0,
      end_rate=1e-5,
      k_decay=0.34,
      rewarmup=0,
      weight_decay=0.01,
      clip=5.0,
      track_every=settings.optional(int),
      model=dict(name=variant, dtype='float32'),
      augmentation=dict(
        scale=(0.08, 1.0),
        flip=0.5,
        operations=2,
        magnitude=10.0,
        magnitude_std=0.0,
        erase=0.25,
        mixup=0.1,
        cutmix=0.0,
        label_smoothing=0.1,
      ),
      compaction=dict(min_saving=0.25, background=True, reproducible=False),
      oialr=runs.oialr_section(
        delay=1 / 3,  # steps, or a share of the run
        every=1000,
        cutoff=0.15,
        progressive=0.1,
      ),
      **runs.sections(),
    )
  )
  config.update(_VARIANTS[variant])
  return config
