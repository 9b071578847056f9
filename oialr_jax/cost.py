"""What a layer costs, dense and low-rank: the model that plans are made by.

One layer with T rows of activations (tokens), a kernel W (m x n) of rank r.
Costs are multiply-adds of one training step, forward and backward; two flops
each. See BUILD_NOTES.md for the derivation and what was measured.
"""

import math

# The ways to multiply x by U Sigma V^T.
FACTORS = 'factors'  # ((x U) Sigma) V^T
PRECONTRACT = 'precontract'  # (x U) (Sigma V^T), Sigma V^T once a step
MATERIALISE = 'materialise'  # x W, W = U Sigma V^T once a step
WAYS = (FACTORS, PRECONTRACT, MATERIALISE)


def dense(tokens: int, m: int, n: int) -> int:
  """Of a dense kernel: x W, then dx and dW."""
  return 3 * tokens * m * n


def low_rank(way: str, tokens: int, m: int, n: int, r: int) -> int:
  """Of a low-rank kernel, multiplied in one of `WAYS`.

  Backward, only dx and dSigma are wanted: dSigma = (x U)^T (dy V), so that
  x U is all that is kept of x, and dW is formed by `MATERIALISE` alone.
  """
  if way == FACTORS:
    return 2 * tokens * r * (m + r + n) + tokens * r * r
  if way == PRECONTRACT:
    return tokens * r * (2 * m + 3 * n) + 2 * r * r * n
  if way == MATERIALISE:
    # Sigma joins the smaller side first.
    build = r * r * min(m, n) + m * r * n
    return 3 * tokens * m * n + 2 * build
  raise ValueError(f'way={way!r}: must be one of {", ".join(WAYS)}.')


def cheapest(tokens: int, m: int, n: int, r: int) -> str:
  """The way with the fewest multiply-adds."""
  return min(WAYS, key=lambda way: low_rank(way, tokens, m, n, r))


def break_even_time(m: int, n: int) -> int:
  """The rank up to which factors need no more flops than the dense kernel.

  T r (2m + 2n + 3r) <= 3 T m n.
  """
  root = math.isqrt((m + n) ** 2 + 9 * m * n)
  return min(m, n, (root - (m + n)) // 3)


def break_even_storage(m: int, n: int) -> int:
  """The rank up to which U, Sigma and V^T are no more numbers than W.

  r (m + r + n) <= m n.
  """
  root = math.isqrt((m + n) ** 2 + 4 * m * n)
  return (root - (m + n)) // 2
