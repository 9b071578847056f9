"""The page `report.html`: tables and plots of workdirs, in one file."""

from collections.abc import Iterator, Mapping, Sequence
import pathlib
import string

from matplotlib import figure as mpl
from matplotlib import style

from oialr_jax.report import plots
from oialr_jax.report import rows
from oialr_jax.report import runs as runs_lib
from oialr_jax.report import series
from oialr_jax.report import svg
from oialr_jax.report import tables

Records = series.Records

_CAPTIONS = {
  'loss': 'Training: means over equal parts of the run.',
  'time': 'By what the run waited for; what was compiled beside the training '
  'is not in it.',
  'stability': 'How much of the basis UV\u1d40 of a kernel is that of the '
  'measurement before; below, the mean over the layers.',
  'r_distance': 'Euclidean distance of the mixing R of a kernel to that of the '
  'measurement before.',
  'ranks': 'What is pruned counts no more, whether it is sliced away or not.',
  'sizes': 'What is pruned counts until it is sliced away; below, the last '
  'values.',
  'spectra': 'At the transition, and what was kept at the last update.',
}


def write(
  workdirs: str | pathlib.Path | Sequence[str | pathlib.Path],
  output: str | pathlib.Path | None = None,
) -> pathlib.Path:
  """Writes a page about one workdir, or one that compares several.

  Args:
    workdirs: folders that a run or a binary wrote to; unfinished or damaged
      ones are shown as far as they can be read.
    output: the file; by default `report.html` in the workdir, of several in
      the current folder.

  Returns:
    The path of the file.

  Raises:
    FileNotFoundError: there is no such folder, or no run in it.
    OSError: the file cannot be written.
  """
  if isinstance(workdirs, (str, pathlib.Path)):
    workdirs = [workdirs]
  read = [*map(runs_lib.read, workdirs)]
  if output is None:
    folder = read[0].folder if len(read) == 1 else pathlib.Path()
    output = folder / 'report.html'
  output = pathlib.Path(output)
  # Half a surrogate pair is JSON, but no text.
  output.write_bytes(render(read).encode('utf-8', 'replace'))
  return output


def render(workdirs: Sequence[runs_lib.Workdir]) -> str:
  """The page as HTML."""
  named, runs = runs_lib.named(workdirs)
  records = {name: run.records for name, run in runs.items()}
  # The page would not know the colours of a user's own style.
  with style.context('default'):
    body = [
      *_missing({**named, **runs}),
      *_results(named),
      *_compared(records, {n for n, run in runs.items() if run.seeded}),
      *_each(records),
      *_settings(named),
    ]
  template = (
    pathlib.Path(__file__).with_name('template.html').read_text('utf-8')
  )
  return string.Template(template).substitute(
    title=tables.text(', '.join(named)), body='\n'.join(body)
  )


def _missing(
  read: Mapping[str, runs_lib.Workdir | runs_lib.Run],
) -> Iterator[str]:
  items = [
    f'<li><b>{tables.text(name)}</b>: {tables.text(sentence)}</li>'
    for name, part in read.items()
    for sentence in part.missing
  ]
  if items:
    yield f'<div class="missing"><h2>Missing</h2><ul>{"".join(items)}</ul></div>'


def _results(workdirs: Mapping[str, runs_lib.Workdir]) -> Iterator[str]:
  results = [
    {**({'workdir': name} if len(workdirs) > 1 else {}), **row}
    for name, workdir in workdirs.items()
    for row in workdir.results
  ]
  if results:
    yield '<h2>Results</h2>'
    yield '<p>Of several runs, means and standard deviations.</p>'
    yield tables.table(results)


def _compared(runs: Mapping[str, Records], seeded: set[str]) -> Iterator[str]:
  if not runs:
    return
  yield '<h2>Runs</h2>'
  yield tables.table([{'run': n, **rows.run(r)} for n, r in runs.items()])
  yield _plots('', plots.of_runs(runs, seeded))
  spent = {name: rows.seconds(records) for name, records in runs.items()}
  if any(spent.values()):
    yield '<h3>Seconds</h3>'
    yield tables.table([{'run': n, **s} for n, s in spent.items() if s])


def _each(runs: Mapping[str, Records]) -> Iterator[str]:
  """What the method did in every run, the first one unfolded."""
  first = next((n for n, r in runs.items() if series.of(r, 'event')), None)
  for name, records in runs.items():
    parts = [*_one(name, records)]
    if parts:
      yield f'<details{" open" if name == first else ""}>'
      yield f'<summary>{tables.text(name)}</summary>'
      yield from parts
      yield '</details>'


def _one(name: str, records: Records) -> Iterator[str]:
  figures = plots.of_run(records)
  if figures:
    yield _plots(name, figures)
  layers = [*rows.layers(records)]
  if layers:
    yield '<h3>Layers</h3>'
    yield tables.table(layers, 'layers')
  kinds = 'event', 'conversion', 'compaction', 'rollback'
  events = [rows.event(r) for r in records if r['kind'] in kinds]
  if events:
    yield '<h3>Events</h3>'
    yield tables.table(events)


def _settings(workdirs: Mapping[str, runs_lib.Workdir]) -> Iterator[str]:
  names = dict.fromkeys(s for w in workdirs.values() for s in w.settings)
  if names:
    yield '<h2>Settings</h2>'
    yield tables.table(
      [
        {'setting': s, **{n: w.settings.get(s) for n, w in workdirs.items()}}
        for s in names
      ],
      'settings',
    )


def _plots(run: str, figures: Mapping[str, mpl.Figure]) -> str:
  drawn = (
    f'<figure>{svg.inline(figure, f"{name} {run}".strip())}'
    f'<figcaption>{_CAPTIONS.get(name, "")}</figcaption></figure>'
    for name, figure in figures.items()
  )
  return f'<div class="plots">{"".join(drawn)}</div>'
