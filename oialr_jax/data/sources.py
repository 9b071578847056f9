"""Prepared TFDS folders: finding them, and reading encoded examples by index.

`tfds.data_source` reads array_record files without TensorFlow.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import os
import pathlib
from typing import Any

DATA_DIR = 'OIALR_DATA_DIR'

# What a data set wants besides a network, where TFDS cannot download it.
_BY_HAND = {
  'imagenet2012': (
    'It is not downloaded: first put ILSVRC2012_img_train.tar and '
    'ILSVRC2012_img_val.tar, from image-net.org, into '
    '{folder}/downloads/manual.'
  )
}


@dataclasses.dataclass(frozen=True)
class Source:
  """Encoded examples, read by index; it can be sent to other processes.

  Attributes:
    name: of the data set.
    records: of TFDS, with a 'label' and 'image' left encoded.
    files: `(path, first row, rows)`, in the order of the examples.
    shape: of an image, with None for a size that varies.
    classes: number of labels.
  """

  name: str
  records: Any
  files: tuple[tuple[str, int, int], ...]
  shape: tuple[int | None, ...]
  classes: int

  def __len__(self) -> int:
    return len(self.records)

  def read(self, index: Sequence[int]) -> list[dict[str, Any]]:
    """Examples: 'image', the bytes of a JPEG or PNG file, and 'label'.

    Raises:
      ValueError: a record is damaged; says which.
    """
    index = [int(i) for i in index]
    try:
      return self.records.__getitems__(index)
    except Exception:  # one by one, to find the record: what is raised varies
      return [self._read(i) for i in index]

  def _read(self, i: int) -> dict[str, Any]:
    with self.at(i):
      return self.records[i]

  @contextlib.contextmanager
  def at(self, i: int) -> Iterator[None]:
    """Makes any error within one about the record of example `i`."""
    try:
      yield
    except Exception as e:
      path, row = self.where(i)
      raise ValueError(
        f'{self.name!r}: row {row} of {path} cannot be read '
        f'({type(e).__name__}: {e}). If the file is damaged, copy it again or '
        'prepare the data set anew.'
      ) from e

  def where(self, i: int) -> tuple[str, int]:
    """The file of example `i`, and its row there."""
    for path, first, rows in self.files:
      if i < rows:
        return path, first + i
      i -= rows
    raise IndexError(f'{self.name!r} has {len(self)} examples.')


def source(
  name: str, split: str, *, data_dir: str | os.PathLike | None = None
) -> Source:
  """A split of a TFDS image-classification set, to be read by index.

  Args:
    name: 'mnist', 'cifar10', 'cifar100', 'imagenet2012', ...
    split: of TFDS: 'train', 'test', 'train[:90%]', ...
    data_dir: the folder that holds `NAME/VERSION/`; by default that of the
      environment variable OIALR_DATA_DIR, else TFDS's own.

  Raises:
    FileNotFoundError: it is not there; says where it was looked for and how to
      prepare it.
    ValueError: examples have no image and label, or there is no such split.
  """
  import tensorflow_datasets as tfds

  data_dir = data_dir or os.environ.get(DATA_DIR)
  folder = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
  try:
    records = tfds.data_source(
      name,
      split=split,
      data_dir=folder,
      download=False,
      decoders={'image': tfds.decode.SkipDecoding()},
    )
  except (
    tfds.core.DatasetNotFoundError,
    AssertionError,
    NotImplementedError,
    OSError,
  ) as e:
    raise FileNotFoundError(_missing(name, split, folder)) from e
  info = records.dataset_info
  files = tuple(
    (os.fspath(f.filename), f.skip, f.take)
    for f in info.splits[split].file_instructions
  )
  lost = [path for path, *_ in files if not pathlib.Path(path).exists()]
  if lost:
    raise FileNotFoundError(
      f'{len(lost)} of {len(files)} files are not there, the first of them '
      f'{lost[0]}.\n{_missing(name, split, folder)}'
    )
  features = info.features
  if not {'image', 'label'} <= set(features):
    raise ValueError(
      f'{name!r}: examples have {sorted(features)}; an image-classification '
      "set has 'image' and 'label'."
    )
  return Source(
    name=name,
    records=records,
    files=files,
    shape=tuple(features['image'].shape),
    classes=features['label'].num_classes,
  )


def _missing(name: str, split: str, folder: pathlib.Path) -> str:
  by_hand = _BY_HAND.get(name.partition('/')[0], '').format(folder=folder)
  return (
    f'{name!r} (split {split!r}) was not found as {folder / name}/VERSION/ '
    f'in array_record files. {by_hand}\nPrepare it where there is a network '
    'with\n'
    f'  python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder('{name}', data_dir='{folder}', "
    "file_format='array_record').download_and_prepare()\"\n"
    f'or pass another folder with --data_dir or ${DATA_DIR}.'
  )
