"""What a compiled program sends between devices, read from its text."""

import math
import re

import numpy as np

KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'collective-permute',
  'all-to-all',
)
_DTYPES = {'pred': 'bool', 'bf16': 'float16', 'f': 'float', 's': 'int'}
_SHAPE = re.compile(r'\b([a-z]+[0-9]*)\[([0-9,]*)\]')


def collectives(compiled) -> dict[str, list[tuple[tuple[int, ...], int]]]:
  """By kind, shape and bytes of all results of the program's collectives.

  Loops are not unrolled: what is inside of one counts once.
  """
  found = {kind: [] for kind in KINDS}
  for line in compiled.as_text().splitlines():
    match = re.search(r'= (.*?) ([a-z-]+?)(-start)?\(', line)
    if match and match[2] in found:
      found[match[2]] += map(_array, _SHAPE.findall(match[1]))
  return found


def sent(compiled, kind: str) -> int:
  """Bytes of all results of one kind."""
  return sum(size for _, size in collectives(compiled)[kind])


def _array(found: tuple[str, str]) -> tuple[tuple[int, ...], int]:
  name, sizes = found
  shape = tuple(int(n) for n in sizes.split(',') if n)
  letter = re.sub(r'^(f|s)(\d+)$', lambda m: _DTYPES[m[1]] + m[2], name)
  letter = re.sub(r'^u(\d+)$', r'uint\1', letter)
  dtype = np.dtype(_DTYPES.get(letter, letter))
  return shape, math.prod(shape) * dtype.itemsize
