"""Tables that the binaries print."""

from collections.abc import Sequence
import statistics


def spread(values: Sequence[float], digits: int) -> str:
  """Mean +- deviation, of one value alone the value."""
  mean = f'{statistics.fmean(values):.{digits}f}'
  if len(values) == 1:
    return mean
  return f'{mean} +- {statistics.stdev(values):.{digits}f}'


def aligned(lines: Sequence[Sequence[str]]) -> str:
  """Cells in columns: the first one to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  return '\n'.join(
    '  '.join(
      c.rjust(w) if i else c.ljust(w)
      for i, (c, w) in enumerate(zip(line, widths))
    )
    for line in lines
  )
