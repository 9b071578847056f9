"""Tests of the plots, from made-up records."""

from matplotlib import image
import numpy as np
import pytest

from oialr_jax.report import plots

PATHS = ['encoder/conv/kernel', 'encoder/dense/kernel']


def records(events=True):
  """A run of 40 steps with a transition at 10, updates at 20 and 30."""
  run = []
  for step in (10, 20, 30, 40):
    losses = (1 / np.arange(step - 9, step + 1)).tolist()
    run.append({'kind': 'train', 'step': step, 'loss': 0.1, 'losses': losses})
    stable = dict.fromkeys(PATHS, 1 - 1 / step)
    run.append({'kind': 'stability', 'step': step, 'stability': stable})
    if events and step < 40:
      values = np.linspace(3, 0.1, 8).tolist()
      run.append(
        {
          'kind': 'event',
          'step': step,
          'ranks': dict.fromkeys(PATHS, 80 // step),
          'spectra': dict.fromkeys(PATHS, values),
        }
      )
  run.append({'kind': 'eval', 'step': 40, 'loss': 0.2, 'accuracy': 0.9})
  return run


def texts(axes):
  return [t.get_text() for t in axes.get_legend().get_texts()]


def test_loss_shows_every_run_and_the_transition():
  (axes,) = plots.loss({'dense': records(False), 'oialr': records()}).axes
  assert {'dense, training', 'oialr, test', 'transition'} <= set(texts(axes))
  assert axes.get_ylabel() == 'loss'
  assert axes.get_xlabel() == 'optimiser steps'


def test_ranks_draws_a_line_a_layer_by_its_path():
  (axes,) = plots.ranks(records()).axes
  assert texts(axes) == PATHS
  steps, values = axes.get_lines()[0].get_data()
  np.testing.assert_array_equal(steps, [10, 20, 30, 40])
  np.testing.assert_array_equal(values, [8, 4, 2, 2])


def test_stability_has_a_row_a_layer_and_the_mean_below():
  top, below, _ = plots.stability(records()).axes
  assert [t.get_text() for t in top.get_yticklabels()] == PATHS
  (mesh,) = top.collections
  assert mesh.get_array().shape == (2, 4)
  np.testing.assert_allclose(
    below.get_lines()[0].get_ydata(), [1 - 1 / s for s in (10, 20, 30, 40)]
  )


def test_spectra_show_the_first_and_the_last_kept():
  first, second = plots.spectra(records()).axes[:2]
  assert [first.get_title(), second.get_title()] == PATHS
  assert [len(line.get_xdata()) for line in first.get_lines()] == [8, 2]


@pytest.mark.parametrize('events', [True, False])
def test_write_makes_pictures_of_what_there_is(tmp_path, events):
  paths = plots.write(tmp_path, {'run': records(events)})
  names = {'loss', 'stability'} | ({'ranks', 'spectra'} if events else set())
  assert {p.stem for p in paths} == names
  for path in paths:
    assert image.imread(path).std() > 0.01  # not blank
