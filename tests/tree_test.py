"""Tests of paths, and of every container that parameters come in."""

import dataclasses

from flax import nnx
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax import tree
from tests import kernels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Mlp:
  """Parameters of a hand-written model."""

  kernels: tuple[jax.Array, ...]
  bias: jax.Array
  name: str = dataclasses.field(metadata={'static': True}, default='mlp')


class _NnxMlp(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.first = nnx.Linear(12, 5, rngs=rngs)
    self.blocks = nnx.List([nnx.Linear(5, 5, rngs=rngs)])


def _kernel(*shape, seed=0) -> jax.Array:
  rng = np.random.default_rng(seed)
  return kernels.array(rng.normal(size=shape), 'float32')


def _as_dict():
  params = {'first': {'kernel': _kernel(12, 5)}, 'bias': jnp.zeros(5)}
  return params, ['first/kernel'], ['bias']


def _as_frozen_dict():
  params, *paths = _as_dict()
  return flax.core.freeze(params), *paths


def _as_lists_and_tuples():
  params = [(_kernel(12, 5), jnp.zeros(5)), {'out': _kernel(5, 12)}]
  return params, ['0/0', '1/out'], ['0/1']


def _as_dataclass():
  params = _Mlp((_kernel(12, 5), _kernel(5, 12, seed=1)), jnp.zeros(5))
  return params, ['kernels/0', 'kernels/1'], ['bias']


def _as_nnx_state():
  return (
    nnx.state(_NnxMlp(), nnx.Param),
    ['first/kernel/value', 'blocks/0/kernel/value'],
    ['first/bias/value', 'blocks/0/bias/value'],
  )


def _as_nnx_pure_dict():
  state, kernel_paths, other_paths = _as_nnx_state()
  no_value = lambda paths: [p.removesuffix('/value') for p in paths]
  return (
    nnx.to_pure_dict(state),
    no_value(kernel_paths),
    no_value(other_paths),
  )


def _as_equinox():
  eqx = pytest.importorskip('equinox')
  model = eqx.nn.MLP(5, 5, 12, depth=1, key=jax.random.key(0))
  return (
    model,
    ['layers/0/weight', 'layers/1/weight'],
    ['layers/0/bias', 'layers/1/bias', 'activation', 'final_activation'],
  )


_CONTAINERS = pytest.mark.parametrize(
  'container',
  [
    _as_dict,
    _as_frozen_dict,
    _as_lists_and_tuples,
    _as_dataclass,
    _as_nnx_state,
    _as_nnx_pure_dict,
    _as_equinox,
  ],
  ids=lambda f: f.__name__.removeprefix('_as_'),
)


@_CONTAINERS
def test_paths_are_written_one_way(container):
  params, kernel_paths, other_paths = container()
  leaves = tree.flatten(params)
  assert set(leaves) == {*kernel_paths, *other_paths}
  for x, y in zip(leaves.values(), jax.tree.leaves(params), strict=True):
    assert x is y
  named = tree.map_with_path(lambda path, x: path, params)
  assert jax.tree.leaves(named) == list(leaves)


@_CONTAINERS
def test_every_container_goes_low_rank_and_back(container):
  params, kernel_paths, other_paths = container()
  leaves = tree.flatten(params)
  layers = [
    kernels.layer(path, leaves[path].shape, (0,), (1,)) for path in kernel_paths
  ]
  low = oialr.to_lowrank(params, layers)
  assert type(low) is type(params)
  by_path = tree.flatten(low, oialr.is_low_rank)
  assert [p for p, x in by_path.items() if oialr.is_low_rank(x)] == [
    p for p in leaves if p in kernel_paths
  ]
  low = oialr.update_basis(low, paths=kernel_paths)
  low = oialr.with_trainable(low, oialr.trainable(low))
  assert oialr.ranks(low) == {path: 5 for path in kernel_paths}
  dense = oialr.to_dense(oialr.compact(low))
  assert jax.tree.structure(dense) == jax.tree.structure(params)
  assert jax.tree.structure(oialr.trainable(low)) == jax.tree.structure(params)
  back = tree.flatten(dense)
  for path in kernel_paths:
    assert kernels.error(back[path], leaves[path]) < 4e-6
  for path in other_paths:
    assert back[path] is leaves[path]
  pruned = oialr.prune_sigma(low, cutoff=0.99)
  assert max(oialr.ranks(pruned).values()) < 5


def test_the_leaf_of_a_bare_array_has_an_empty_path():
  assert list(tree.flatten(1.0)) == ['']


def test_flatten_stops_at_nodes():
  layer = kernels.BY_PATH['tall']
  low = oialr.to_lowrank(kernels.random_params([layer]), [layer])
  assert list(tree.flatten(low)) == ['bias', 'tall/u', 'tall/s', 'tall/vt']
  assert list(tree.flatten(low, oialr.is_low_rank)) == ['bias', 'tall']


def test_paths_are_those_of_flatten_where_they_are_unique():
  nested = {'b': [1, {'c': 2}], 'a': None, 'd': (np.ones(2),)}
  assert (
    tree.paths(nested) == [*tree.flatten(nested)] == ['b/0', 'b/1/c', 'd/0']
  )
  assert tree.paths({'a': {'b': 1}, 'a/b': 2}) == ['a/b', 'a/b']
  is_leaf = lambda x: isinstance(x, list)
  assert tree.paths(nested, is_leaf) == ['b', 'd/0']


def test_map_with_path_keeps_the_structure():
  params = {'a': [1, 2], 'b': {'c': 3}}
  found = tree.map_with_path(
    lambda path, x, y: f'{path}: {x + y}', params, {'a': [3, 4], 'b': {'c': 5}}
  )
  assert found == {'a': ['a/0: 4', 'a/1: 6'], 'b': {'c': 'b/c: 8'}}
  found = tree.map_with_path(
    lambda path, x: path, params, is_leaf=lambda x: isinstance(x, list)
  )
  assert found == {'a': 'a', 'b': {'c': 'b/c'}}


def test_paths_that_are_not_unique_are_refused():
  with pytest.raises(ValueError, match="'a/b': two leaves of the tree have"):
    tree.flatten({'a': {'b': 1.0}, 'a/b': 2.0})


@pytest.mark.parametrize(
  ('known', 'message'),
  [
    pytest.param([], r"'x': no such layer; the tree has 0: none\.$", id='none'),
    pytest.param(
      ['a', 'b'], r"'x': no such layer; the tree has 2: 'a', 'b'\.$", id='few'
    ),
    pytest.param(
      list('abcdefg'),
      r"'x': no such layer; the tree has 7: 'a', 'b', 'c', 'd', 'e', \.\.\.\.$",
      id='many',
    ),
  ],
)
def test_check_known_shows_what_there_is(known, message):
  with pytest.raises(ValueError, match=message):
    tree.check_known([*known, 'x'], known, 'layer')
  tree.check_known(known, known, 'layer')


def test_a_pattern_that_is_none_is_named():
  assert tree.pattern('include', 'b.0$').search('blocks/b_0')
  message = r"include='\[': not a regular expression: unterminated"
  with pytest.raises(ValueError, match=message):
    tree.pattern('include', '[')


def test_is_concrete():
  seen = []
  jax.jit(lambda x: seen.append(tree.is_concrete({'a': x, 'b': 1.0})))(1.0)
  assert seen == [False]
  assert not tree.is_concrete([jax.ShapeDtypeStruct((2,), jnp.float32)])
  assert tree.is_concrete([jnp.ones(2), np.ones(2), 1.0, 'name', None])


def test_what_is_no_array_can_be_left_out_and_put_back():
  arrays = {'a': jnp.ones(3), 'b': np.float32(2), 'c': jnp.zeros((2, 2))}
  others = {'f': jnp.tanh, 'flag': True, 'type': np.float32, 'none': None}
  given = arrays | others
  found = tree.arrays(given)
  assert found == arrays | dict.fromkeys(others)
  doubled = jax.tree.map(lambda x: 2 * x, found)
  joined = tree.with_others(doubled, given)
  assert joined == doubled | others
  assert all(joined[name] is x for name, x in others.items())
  # Arrays may become nodes, as kernels do.
  nodes = doubled | {'c': (doubled['c'], None)}
  assert tree.with_others(nodes, given)['c'] is not None
  assert tree.with_others(nodes, given)['c'][0] is doubled['c']
  # Where there is nothing to put back, nothing is built anew.
  assert tree.arrays(arrays) is tree.with_others(arrays, arrays) is arrays
