"""Tests of the plots, from made-up records."""

from matplotlib import image
import numpy as np
import pytest

from oialr_jax.report import plots
from oialr_jax.report import series
from oialr_jax.report import svg

PATHS = ['encoder/conv/kernel', 'encoder/dense/kernel']


def records(events=True, paths=PATHS, ended=True):
  """A run of 40 steps with a transition at 10, updates at 20 and 30."""
  run = []
  for step in (10, 20, 30, 40):
    losses = (1 / np.arange(step - 9, step + 1)).tolist()
    run.append({'kind': 'train', 'step': step, 'loss': 0.1, 'losses': losses})
    run.append(
      {
        'kind': 'stability',
        'step': step,
        'stability': dict.fromkeys(paths, 1 - 1 / step),
        'r_distance': {p: (i + 1) / step for i, p in enumerate(paths)},
      }
    )
    if events and step < 40:
      run.append(event(step, paths))
    run.append(
      {'kind': 'eval', 'step': step, 'loss': 2 / step, 'accuracy': step / 50}
    )
  if ended:
    clocks = {'training': 3.0, 'compiling': 2.0, 'events': float(events)}
    run.append(
      {
        'kind': 'end',
        'step': 40,
        'seconds': clocks,
        'optimizer_bytes': 4000,
        **counts(30 if events else 0),
      }
    )
  return run


def counts(step):
  return {'trainable': 1000 - 20 * step, 'stored': 1500 - 25 * step} | {
    'dense': 1000
  }


def event(step, paths=PATHS):
  return {
    'kind': 'event',
    'step': step,
    'event': 'transition' if step == 10 else 'update',
    'converted': list(paths) if step == 10 else [],
    'updated': [] if step == 10 else list(paths),
    'ranks_before': {} if step == 10 else dict.fromkeys(paths, 80 // step * 2),
    'ranks': dict.fromkeys(paths, 80 // step),
    'spectra': dict.fromkeys(paths, np.linspace(3, 0.1, 8).tolist()),
    'truncation': dict.fromkeys(paths, 0.01 * step),
    'drift': dict.fromkeys(paths, 1e-6),
    'seconds': 0.5,
    'change': 0.02,
    **counts(step),
  }


def many(n):
  return [f'blocks_{i // 6}/attention/dense_{i % 6}/kernel' for i in range(n)]


def texts(figure):
  (legend,) = figure.legends
  return [t.get_text() for t in legend.get_texts()]


def names(axes):
  return [t.get_text() for t in axes.get_yticklabels()]


def test_loss_shows_every_run_and_the_transition():
  figure = plots.loss({'dense': records(False), 'oialr': records()})
  (axes,) = figure.axes
  assert texts(figure) == ['dense', 'oialr', 'transition']
  assert axes.get_ylabel() == 'loss'
  assert axes.get_xlabel() == 'optimiser steps'
  assert axes.get_yscale() == 'log'  # from 1 to 1/40


def test_the_transition_is_where_the_first_layers_go_low_rank():
  """Where stability decides, that may be after the first event."""
  run = records()
  assert series.transition(run) == 10
  measured = {**event(5), 'event': 'transition', 'converted': [], 'ranks': {}}
  assert series.transition([measured, *run]) == 10
  assert series.transition([measured]) is None


def test_loss_is_at_its_steps_where_records_are_lost():
  whole = records()
  kept = [r for r in whole if (r['kind'], r['step']) != ('train', 20)]
  lines = [
    {
      tuple(point)
      for point in plots.loss({'run': r}).axes[0].lines[1].get_xydata()
    }
    for r in (whole, kept)
  ]
  assert lines[1] < lines[0] and len(lines[0]) - len(lines[1]) == 10


def test_long_runs_are_averaged_to_curves():
  run = [
    {'kind': 'train', 'step': s + 50, 'losses': [2.0, 4.0] * 25}
    for s in range(0, 10_000, 50)
  ]
  steps, losses = plots.loss({'run': run}).axes[0].lines[1].get_data()
  assert len(steps) == 200 and set(losses) == {3.0}
  assert steps[0] == 25.5 and steps[-1] == 10_000 - 24.5


def test_seeds_of_a_method_look_the_same():
  runs = {'dense-0': records(False), 'oialr-0': records(), 'oialr-1': records()}
  figure = plots.metric(runs, 'accuracy')
  assert texts(figure) == ['dense-0', 'oialr (2 runs)', 'transition']
  dense, first, second, _ = figure.axes[0].get_lines()
  assert first.get_color() == second.get_color() != dense.get_color()
  assert figure.axes[0].get_ylabel() == 'accuracy'


def test_a_number_at_the_end_of_a_name_need_not_be_a_seed():
  runs = {'rank-8': records(), 'rank-64': records()}
  figures = plots.of_runs(runs, seeded=())
  for name in ('loss', 'metric_accuracy'):
    assert texts(figures[name])[:2] == ['rank-8', 'rank-64']


def test_time_is_that_of_the_clocks():
  figure = plots.time({'dense': records(False), 'oialr': records()})
  (axes,) = figure.axes
  assert names(axes) == ['dense', 'oialr']
  assert [t.get_text() for t in axes.texts] == ['5 s', '6 s']
  assert texts(figure) == ['steps', 'compiling', 'SVDs and slicing']
  ends = {p.get_x() + p.get_width() for p in axes.patches}
  assert ends == {3, 5, 6}
  assert axes.get_xlabel() == 'seconds'


def test_ranks_draws_a_line_a_layer_by_its_path():
  figure = plots.ranks(records())
  assert texts(figure) == [*PATHS, 'transition']
  steps, values = figure.axes[0].get_lines()[0].get_data()
  np.testing.assert_array_equal(steps, [10, 20, 30, 40])
  np.testing.assert_array_equal(values, [8, 4, 2, 2])


@pytest.mark.parametrize('draw', [plots.ranks, plots.r_distance])
def test_many_layers_are_rows_of_a_map(draw):
  paths = many(75)
  axes = draw(records(paths=paths)).axes[0]
  assert names(axes) == paths
  (mesh,) = axes.collections
  assert mesh.get_array().shape == (75, 3 if draw is plots.ranks else 4)


def test_stability_has_a_row_a_layer_and_the_mean_below():
  top, below, _ = plots.stability(records()).axes
  assert names(top) == PATHS
  assert top.get_ylim() == (2, 0)  # the first layer is on top
  (mesh,) = top.collections
  assert mesh.get_array().shape == (2, 4)
  np.testing.assert_allclose(
    below.get_lines()[0].get_ydata(), [1 - 1 / s for s in (10, 20, 30, 40)]
  )


def test_sizes_begin_dense_and_last_to_the_end():
  figure = plots.sizes(records())
  (axes,) = figure.axes
  trainable, stored, _ = axes.get_lines()
  np.testing.assert_array_equal(trainable.get_xdata(), [0, 10, 20, 30, 40])
  np.testing.assert_array_equal(
    trainable.get_ydata(), [1000, 800, 600, 400, 400]
  )
  np.testing.assert_array_equal(stored.get_ydata()[:2], [1000, 1250])
  assert axes.get_ylabel() == 'parameters'
  assert texts(figure) == ['trainable: 400.0', 'stored: 750.0', 'transition']


def test_sizes_have_axes_for_bytes_and_flops_where_they_are_known():
  run = [r | {'optimizer_bytes': 8, 'flops': 5e9} for r in records()]
  labels = [axes.get_ylabel() for axes in plots.sizes(run).axes]
  assert labels == ['parameters', 'optimiser bytes', 'flops of a step']


def test_spectra_show_the_first_and_the_last_kept():
  first, second = plots.spectra(records()).axes[:2]
  assert [first.get_title(), second.get_title()] == PATHS
  assert [len(line.get_xdata()) for line in first.get_lines()] == [8, 2]


def test_spectra_of_layers_without_a_rank_are_left_out():
  run = records(paths=many(12))
  for record in run:
    if record['kind'] == 'event':
      record['ranks'][many(12)[0]] = 0
  assert names(plots.spectra(run).axes[0]) == many(12)[1:]


def test_spectra_of_many_layers_are_two_maps():
  before, after, _ = plots.spectra(records(paths=many(12))).axes
  assert names(before) == many(12)
  assert before.get_ylim() == (12, 0)
  maps = [axes.collections[0].get_array() for axes in (before, after)]
  assert not np.ma.getmaskarray(maps[0]).any()
  # Two of eight directions are left, of a hundred columns 25.
  assert (~np.ma.getmaskarray(maps[1])).sum(axis=1).tolist() == [25] * 12


def test_paths_are_no_formulas():
  paths = ['_hidden/$x$', 'a\nb/kernel', 'x' * 60 + '/kernel']
  figure = plots.ranks(records(paths=paths))
  assert texts(figure)[:2] == [r' _hidden/\$x\$', 'a\ufffdb/kernel']
  assert len(texts(figure)[2]) <= 48
  assert '>\u00a0_hidden/$x$<' in svg.inline(figure, 'ranks').replace(
    '> ', '>\u00a0'
  )


@pytest.mark.parametrize('events', [True, False])
def test_write_makes_pictures_of_what_there_is(tmp_path, events):
  paths = plots.write(tmp_path, {'run': records(events)})
  found = {'loss', 'metric_accuracy', 'time', 'stability', 'r_distance'}
  found |= {'ranks', 'sizes', 'spectra'} if events else set()
  assert {p.stem for p in paths} == found
  for path in paths:
    assert image.imread(path).std() > 0.01  # not blank


def test_svg_has_the_colours_of_the_page_and_its_own_names():
  figures = [plots.ranks(records()), plots.stability(records())]
  drawn = [svg.inline(f, f'plot {i}') for i, f in enumerate(figures)]
  for text in drawn:
    assert text.startswith('<svg ') and text.endswith('</svg>')
    assert '#000000' not in text and 'var(--c0)' in text
  ids = [
    set(part.split('"')[0] for part in d.split(' id="')[1:]) for d in drawn
  ]
  assert ids[0] and ids[1] and not ids[0] & ids[1]
