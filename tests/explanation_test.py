"""Tests of what is said of a model before anything is trained."""

import functools
import math
import re
import time

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import cost
from tests import programs

LAYERS = (
  programs.dot('stem', (12, 120), (0,), (1,), 50, 0),
  oialr.Layer(
    'stack/qkv', (2, 64, 192), (1,), (2,), (0,), 'dot', 50, 1, blocks=3
  ),
  programs.dot('head', (64, 10), (0,), (1,), 1, 2),
)


def _cells(row):
  return re.split(r'  +', row)


def _table(explanation):
  """The columns by name, without the summary."""
  header, *rows = str(explanation).splitlines()
  rows = rows[: len(explanation.layers) + len(explanation.reasons)]
  return _cells(header), [_cells(row) for row in rows]


def test_explain_prints_a_table():
  p = programs.PROGRAMS['experts']()
  params = p.params | programs.shapes(unused=(3, 4), bias=(4,))
  columns, rows = _table(oialr.explain(p.fn, params, *p.args))
  assert columns == [
    *('path', 'shape', 'matrix', 'kind', 'tokens', 'Mflop'),
    *('break-even rank (time, storage)', 'low-rank'),
  ]
  leading, inner, unused = rows
  even = f'{cost.break_even_time(8, 9)}, {cost.break_even_storage(8, 9)}'
  mflop = f'{2e-6 * 3 * 4 * 8 * 9:.3g}'
  assert leading == [
    *('leading', '(3, 8, 9)', '3 x 8 x 9', 'dot', '4', mflop, even, 'yes')
  ]
  assert inner[:3] == ['inner', '(9, 3, 5)', '3 x 9 x 5']
  assert unused == ['unused', 'not used by the function']


def test_explain_prints_a_summary():
  p = programs.PROGRAMS['experts']()
  params = p.params | programs.shapes(unused=(3, 4), bias=(4,))
  found = oialr.explain(p.fn, params, *p.args)
  total, eligible = 3 * 8 * 9 + 9 * 3 * 5 + 12 + 4, 3 * 8 * 9 + 9 * 3 * 5
  assert str(found).splitlines()[3 + 1 :] == [
    f'{total} parameters, {100 * eligible / total:.3g} % of them in 2 kernels '
    'that can be low-rank.'
  ]
  at_ranks = oialr.explain(p.fn, params, *p.args, ranks=2)
  *_, summary = str(at_ranks).splitlines()
  trainable = 3 * 2 * 2 + 3 * 2 * 2 + 12 + 4
  stored = 3 * 2 * (8 + 2 + 9) + 3 * 2 * (9 + 2 + 5) + 12 + 4
  work = cost.low_rank(cost.cheapest(4, 8, 9, 2), 4, 8, 9, 2)
  work += cost.low_rank(cost.cheapest(4, 9, 5, 2), 4, 9, 5, 2)
  share = 100 * work / (cost.dense(4, 8, 9) + cost.dense(4, 9, 5))
  assert summary == (
    f'At these ranks: {100 * trainable / total:.3g} % trainable, '
    f'{100 * stored / total:.3g} % stored; training steps take {share:.3g} % '
    "of these kernels' multiply-adds."
  )


def test_explain_says_what_is_multiplied_out():
  p = programs.PROGRAMS['custom_rules']()
  found = oialr.explain(p.fn, p.params, *p.args, ranks=2)
  columns, rows = _table(found)
  ways = [row[columns.index('computed as')] for row in rows]
  notes = [row[-1] for row in rows]
  for layer, way, note in zip(found.layers, ways, notes, strict=True):
    yes = 'yes, but not by default' if layer.path in found.kept else 'yes'
    if layer.multiplied_out:
      assert way == 'materialise'
      assert note == f'{yes}, multiplied out: {layer.multiplied_out}'
    else:
      assert (way, note) == ('factors', yes)
  assert ['multiplied' in note for note in notes] == [True] * 4 + [False]


def test_explain_says_what_select_keeps_dense():
  shapes = {
    'head': jnp.ones((16, 10)),
    'stem': jnp.ones((20, 12)),
    'thin': jnp.ones((12, 7)),
    'wide': jnp.ones((7, 16)),
    'last': jnp.ones((10, 10)),
  }
  chain = ('stem', 'thin', 'wide', 'head', 'last')
  forward = lambda p, x: functools.reduce(lambda x, k: x @ p[k], chain, x)
  found = oialr.explain(forward, shapes, jnp.ones((4, 20)))
  assert found.kept == {'thin', 'wide', 'last'}
  _, rows = _table(found)
  notes = {row[0]: row[-1] for row in rows}
  assert notes['stem'] == notes['head'] == 'yes'
  assert notes['thin'] == notes['last'] == 'yes, but not by default'
  layers = oialr.find_layers(forward, shapes, jnp.ones((4, 20)))
  assert 'but not' not in str(oialr.explain(layers))


def test_explain_at_ranks_prints_what_they_cost():
  found = oialr.explain(LAYERS, ranks={'stem': 4, 'stack/qkv': 16})
  columns, (stem, qkv, head) = _table(found)
  assert columns[7:] == ['rank', 'computed as', 'time', 'stored', 'low-rank']
  time_of = lambda m, n, r: (
    min(cost.low_rank(way, 50, m, n, r) for way in cost.WAYS) / (3 * 50 * m * n)
  )
  assert stem[7:] == [
    '4',
    cost.cheapest(50, 12, 120, 4),
    f'{time_of(12, 120, 4):.2f}',
    f'{4 * (12 + 4 + 120) / (12 * 120):.2f}',
    'yes',
  ]
  assert qkv[2] == '6 x 64 x 64'
  assert qkv[7:] == [
    '16',
    cost.cheapest(50, 64, 64, 16),
    f'{time_of(64, 64, 16):.2f}',
    f'{16 * (64 + 16 + 64) / (64 * 64):.2f}',
    'yes',
  ]
  assert head[7:] == ['dense', '1.00', '1.00', 'yes']


def test_totals_add_up():
  found = oialr.explain(LAYERS, ranks={'stem': 4, 'stack/qkv': 16})
  assert found.parameters == 12 * 120 + 2 * 64 * 192 + 64 * 10
  low_rank = lambda m, n, r: cost.low_rank(
    cost.cheapest(50, m, n, r), 50, m, n, r
  )
  assert found.totals == {
    'parameters': found.parameters,
    'eligible': found.parameters,
    'multiply_adds': 3 * (50 * (12 * 120 + 2 * 64 * 192) + 64 * 10),
    'trainable': 4 * 4 + 6 * 16 * 16 + 64 * 10,
    'stored': 4 * (12 + 4 + 120) + 6 * 16 * (64 + 16 + 64) + 64 * 10,
    'multiply_adds_low_rank': low_rank(12, 120, 4)
    + 6 * low_rank(64, 64, 16)
    + 3 * 64 * 10,
  }
  without = oialr.explain(LAYERS).totals
  assert [*without] == ['parameters', 'eligible', 'multiply_adds']
  assert without.items() <= found.totals.items()


@pytest.mark.parametrize('name', ['mlp', 'split_stack', 'grouped_convs'])
def test_totals_are_those_of_the_low_rank_model(name):
  """What `count` says when it is done, and for the ranks that there are."""
  p = programs.PROGRAMS[name]()
  layers = p.low_rank or p.layers
  ranks = {layer.path: 1 + i for i, layer in enumerate(layers)}
  low = jax.eval_shape(
    lambda params: oialr.to_lowrank(params, layers, rank=ranks), p.params
  )
  counts = oialr.count(low)
  for found in (
    oialr.explain(layers, p.params, ranks=ranks),
    oialr.explain(layers, low, ranks=ranks),
  ):
    totals = found.totals
    assert totals['parameters'] == counts.dense
    assert (totals['trainable'], totals['stored']) == counts[:2]
  if not p.low_rank:
    found = oialr.explain(p.fn, p.params, *p.args, ranks=ranks)
    assert found.totals == totals


@pytest.mark.parametrize(
  'ranks, expected',
  [
    (6, (6, 6, 6)),
    (30, (12, 30, 10)),  # what a layer has, at most
    (np.int64(30), (12, 30, 10)),
    (0.5, (6, 32, 5)),
    (1.0, (12, 64, 10)),
    ({'head': 3}, (None, None, 3)),
    ({}, (None, None, None)),
    (None, None),
  ],
)
def test_ranks_of_every_kind(ranks, expected):
  found = oialr.explain(LAYERS, ranks=ranks).ranks
  if expected is None:
    assert found is None
    return
  paths = [layer.path for layer in LAYERS]
  assert found == {p: r for p, r in zip(paths, expected) if r is not None}


def test_explain_at_the_ranks_of_a_trained_model():
  p = programs.PROGRAMS['mlp']()
  params = programs.with_low_rank(
    programs.values(p.params), p.layers[:2], lambda layer: 4, pruned=1
  )
  found = oialr.explain(p.fn, params, *p.args, ranks=oialr.ranks(params))
  assert found.ranks == {'a/w': 3, 'b/w': 3}
  assert found.layers == p.layers
  assert found.parameters == oialr.count(p.params).dense


def test_explain_of_layers():
  found = oialr.explain(LAYERS)
  sizes = sum(math.prod(layer.shape) for layer in LAYERS)
  assert found == oialr.Explanation(LAYERS, {}, sizes)
  assert oialr.explain(iter(LAYERS)) == found
  assert len(str(found).splitlines()) == 1 + 3 + 1


def test_explain_of_a_stack_without_layers():
  fn = lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p['w'])[0]
  found = oialr.explain(
    fn, programs.shapes(w=(0, 8, 8)), programs.normal(5, 8), ranks=2
  )
  (layer,) = found.layers
  assert (layer.stack, layer.tokens) == (0, 0)
  assert 'can be low-rank' in str(found)


def test_explain_of_layers_whose_tokens_nobody_counted():
  layer = oialr.Layer('w', (8, 6), (0,), (1,))
  columns, (row,) = _table(oialr.explain([layer], ranks=2))
  assert row[columns.index('time')] == '-'
  assert row[columns.index('stored')] == f'{2 * (8 + 2 + 6) / 48:.2f}'


def test_explain_finds_nothing_without_an_error():
  found = oialr.explain(lambda p, x: x + p['w'], {'w': np.ones((3, 4))}, 1.0)
  assert found == oialr.Explanation((), {'w': 'consumed by add'}, 12)
  header, row, summary = str(found).splitlines()
  assert _cells(row) == ['w', 'consumed by add']
  assert summary.startswith('12 parameters, 0 % of them in 0 kernels')
  at_ranks = oialr.explain(lambda p: p['b'], {'b': np.ones(0)}, ranks=3)
  assert '0 parameters, - of them' in str(at_ranks)
  assert at_ranks.totals['multiply_adds_low_rank'] == 0


def _transformer(depth, width, heads, vocabulary, tokens):
  """A decoder whose blocks are scanned: its shapes, and what it computes."""
  params = {
    'embedding': programs.Shape((vocabulary, width), jnp.float32),
    'blocks': programs.shapes(
      scale=(depth, 2, width),
      qkv=(depth, width, 3 * width),
      out=(depth, heads, width // heads, width),
      up=(depth, width, 4 * width),
      down=(depth, 4 * width, width),
    ),
    'head': programs.Shape((width, vocabulary), jnp.float32),
  }

  def block(x, p):
    y = jax.nn.standardize(x) * p['scale'][0]
    q, k, v = jnp.split((y @ p['qkv']).reshape(tokens, 3 * heads, -1), 3, 1)
    scores = jax.nn.softmax(jnp.einsum('thd,shd->hts', q, k))
    x += jnp.einsum('hts,shd,hde->te', scores, v, p['out'])
    y = jax.nn.standardize(x) * p['scale'][1]
    return x + jax.nn.gelu(y @ p['up']) @ p['down'], None

  def fn(p, ids):
    x = p['embedding'][ids].astype(jnp.bfloat16)
    blocks = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p['blocks'])
    return lax.scan(jax.checkpoint(block), x, blocks)[0] @ p['head']

  return fn, params, programs.Shape((tokens,), jnp.int32)


def test_explain_plans_ten_billion_parameters_within_seconds():
  """Of which not one is allocated."""
  depth, width, heads, vocabulary, tokens = 40, 4480, 35, 50257, 2048
  fn, params, ids = _transformer(depth, width, heads, vocabulary, tokens)
  before, start = len(jax.live_arrays()), time.process_time()
  found = oialr.explain(fn, params, ids)
  # Every head has ranks of its own; the embedding and the head stay dense.
  layers = oialr.split(oialr.select(found.layers), {'qkv': 3 * heads})
  at_ranks = oialr.explain(layers, params, ranks=1 / 8)
  text = str(found) + str(at_ranks)
  assert time.process_time() - start < 10
  assert len(jax.live_arrays()) == before
  assert found.parameters > 10e9
  matrix = width * width
  in_blocks = depth * (3 + 1 + 4 + 4) * matrix
  rest = 2 * vocabulary * width + depth * 2 * width
  assert found.parameters == in_blocks + rest
  assert found.totals['eligible'] == in_blocks + vocabulary * width
  assert found.reasons.keys() == {'embedding', 'blocks/scale'}
  assert found.totals['multiply_adds'] == (
    3 * tokens * found.totals['eligible']
  )
  hd, r, k = width // heads, width // 8, width // heads // 8
  stored = depth * (
    3 * heads * k * (width + k + hd)
    + r * (2 * width + r)
    + 2 * r * (5 * width + r)
  )
  assert at_ranks.totals['stored'] == stored + rest
  assert f'{depth * 3 * heads} x {width} x {hd}' in text


@pytest.mark.parametrize(
  'ranks, error, message',
  [
    (
      {'stem ': 3},
      ValueError,
      "'stem ': no such layer; the tree has 3: 'stem'",
    ),
    ({'head': 11}, ValueError, "'head': rank 11 exceeds .* 10 of its "),
    ({'stem': 0}, ValueError, "'stem': rank=0 must be at least 1"),
    (0, ValueError, "'stem': rank=0 must be at least 1"),
    (-2, ValueError, "'stem': rank=-2 must be at least 1"),
    (0.0, ValueError, "'stem': rank=0.0 as a share"),
    (1.5, ValueError, "'stem': rank=1.5 as a share .* in \\(0, 1\\]"),
    (True, TypeError, "'stem': rank=True must be an int, a float or a mapping"),
    ('all', TypeError, "'stem': rank='all' must be an int, a float"),
    ({'head': '3'}, TypeError, "'head': rank='3' must be an int, a float"),
  ],
  ids=str,
)
def test_explain_refuses_ranks(ranks, error, message):
  with pytest.raises(error, match=message):
    oialr.explain(LAYERS, ranks=ranks)


@pytest.mark.parametrize(
  'given, message',
  [
    (3, 'layers_or_fn: 3 is neither a function nor a layer; pass the model'),
    (None, 'layers_or_fn: None is neither a function nor a layer'),
    ({'w': np.ones((3, 4))}, "layers_or_fn: 'w' is neither"),
    ([LAYERS[0], 'stem'], "layers_or_fn: 'stem' is neither"),
  ],
)
def test_explain_refuses_what_is_neither_model_nor_layers(given, message):
  with pytest.raises(TypeError, match=message):
    oialr.explain(given)


def test_explain_refuses_a_function_without_parameters():
  with pytest.raises(ValueError, match='params has no leaves'):
    oialr.explain(jnp.dot)
  with pytest.raises(ValueError, match="'stem': no such parameter; the tree h"):
    oialr.explain(LAYERS, {'trunk': np.ones((3, 4))})
