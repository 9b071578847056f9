"""Checks of lists of numbers that are given by flags."""

from collections.abc import Callable

from absl import flags


def check(
  name: str,
  kind: Callable[[str], float],
  low: float,
  high: float,
  values: flags.FlagValues = flags.FLAGS,
):
  """Has the values of a list flag checked when flags are parsed.

  Args:
    name: of the flag.
    kind: makes a number of a text: int or float.
    low: the least of the numbers.
    high: the largest.
    values: where the flag is defined.
  """
  limit = '' if high == float('inf') else f' and at most {high:g}'
  rule = f'must be numbers ({kind.__name__}), at least {low:g}{limit}'

  def fine(given: list[str]) -> bool:
    try:
      return bool(given) and all(low <= kind(x) <= high for x in given)
    except ValueError:
      return False

  flags.register_validator(name, fine, rule, flag_values=values)
