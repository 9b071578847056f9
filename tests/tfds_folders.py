"""Prepared TFDS folders of generated images, in the format of the real ones."""

import io
import json
import pathlib

from array_record.python import array_record_module
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

IMAGENET = 'imagenet2012', '5.1.0'


def picture(height, width, seed=0, channels=3):
  """A smooth picture with some noise, `[height, width, channels]`, uint8."""
  rng = np.random.default_rng([seed, height, width])
  y, x = np.mgrid[:height, :width]
  waves = [
    np.sin(x / (3 + i) + seed) * np.cos(y / (5 - i) + i)
    for i in range(channels)
  ]
  noise = rng.normal(0, 15, (height, width, channels))
  image = 120 + 90 * np.stack(waves, -1) + noise
  return np.clip(image, 0, 255).astype(np.uint8)


def encode(image, kind='JPEG', mode=None):
  """The bytes of an image file."""
  file = io.BytesIO()
  image = PIL.Image.fromarray(image)
  (image.convert(mode) if mode else image).save(file, kind)
  return file.getvalue()


def shard(indices, size, channels=3):
  """Square pictures for `write`, PNGs of ten classes in turn."""
  image = lambda i: picture(size, size, i, channels).squeeze()
  return [(encode(image(i), 'PNG'), i % 10) for i in indices]


def write(folder, name, version, splits, *, classes, shape=(None, None, 3)):
  """Writes `{split: shards}`, shards being lists of (encoded image, label).

  Files are as `download_and_prepare` leaves them: compare mnist/3.0.1.
  """
  folder = pathlib.Path(folder) / name / version
  folder.mkdir(parents=True)
  features = tfds.features.FeaturesDict(
    {
      'file_name': tfds.features.Text(),
      'image': tfds.features.Image(shape=shape),
      'label': tfds.features.ClassLabel(num_classes=classes),
    }
  )
  features.save_config(folder)
  for split, shards in splits.items():
    for i, shard in enumerate(shards):
      path = folder / f'{name}-{split}.array_record-{i:05}-of-{len(shards):05}'
      writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
      for j, (image, label) in enumerate(shard):
        example = dict(
          file_name=f'{split}_{i}_{j}', image=io.BytesIO(image), label=label
        )
        writer.write(features.serialize_example(example))
      writer.close()
  info = {
    'name': name,
    'version': version,
    'fileFormat': 'array_record',
    'moduleName': 'tensorflow_datasets.image_classification',
    'splits': [
      {
        'name': split,
        'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        'numBytes': str(sum(len(x) for shard in shards for x, _ in shard)),
        'shardLengths': [str(len(shard)) for shard in shards],
      }
      for split, shards in splits.items()
    ],
  }
  (folder / 'dataset_info.json').write_text(json.dumps(info))
  return folder


def imagenet(folder, train=24, validation=10):
  """A small `imagenet2012`: JPEGs of many sizes, and what the real one has.

  Two shards a split. The second training image is grey, the third CMYK, the
  fourth a PNG.
  """
  rng = np.random.default_rng(0)

  def examples(count, seed):
    sizes = rng.integers(40, 130, (count, 2))
    images = [picture(*size, seed + i) for i, size in enumerate(sizes)]
    encoded = [encode(image) for image in images]
    if seed == 0:
      encoded[1] = encode(images[1], mode='L')
      encoded[2] = encode(images[2], mode='CMYK')
      encoded[3] = encode(images[3], 'PNG')
    rows = list(zip(encoded, rng.integers(0, 1000, count).tolist()))
    return [rows[: count // 3], rows[count // 3 :]]

  splits = {
    'train': examples(train, 0),
    'validation': examples(validation, 1000),
  }
  return write(folder, *IMAGENET, splits, classes=1000)
