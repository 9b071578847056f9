"""Writes report.html: what there is to see of a run, or of several to compare.

  python -m oialr_jax.report WORKDIR [WORKDIR ...]

A workdir is a folder that a binary of `experiments` or `training.fit` wrote to,
finished or not. The page is one file, which needs no network.
"""

from collections.abc import Sequence
import sys

from absl import app
from absl import flags

from oialr_jax.report import page
from oialr_jax.report import plots
from oialr_jax.report import runs

_OUTPUT = flags.DEFINE_string(
  'output',
  None,
  'The file; by default report.html in the workdir, of several workdirs in the '
  'current folder.',
)
_PNG = flags.DEFINE_string(
  'png', None, 'Also write the plots as PNGs to this folder.'
)


def main(argv: Sequence[str]):
  """Writes the page, and the plots where they are asked for."""
  _, *workdirs = argv
  if not workdirs:
    raise app.UsageError('pass the workdir of a run, or several.')
  try:
    print(page.write(workdirs, _OUTPUT.value))
    if _PNG.value:
      _, found = runs.named([*map(runs.read, workdirs)])
      plots.write(_PNG.value, {k: run.records for k, run in found.items()})
  except OSError as e:
    sys.exit(f'oialr_jax.report: {e}')


if __name__ == '__main__':
  app.run(main)
