"""Lists of numbers are checked when flags are parsed."""

from absl import flags
import pytest

from experiments import ranges


def parse(text):
  values = flags.FlagValues()
  flags.DEFINE_list('ranks', ['0.5'], 'Shares.', flag_values=values)
  ranges.check('ranks', float, 0.1, 1.0, values)
  values(['binary', f'--ranks={text}'])
  return values.ranks


def test_what_is_in_the_range_is_taken():
  assert parse('1.0,0.1') == ['1.0', '0.1']


@pytest.mark.parametrize('text', ['', 'a', '0.5,1.5', '0'])
def test_what_is_not_is_refused_before_anything_is_loaded(text):
  with pytest.raises(flags.Error, match='at least 0.1 and at most 1'):
    parse(text)
