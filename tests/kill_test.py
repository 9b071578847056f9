"""A few of the kills of `python -m tests.kill`."""

import json

from tests import kill


def test_a_run_that_is_killed_ends_the_same():
  moments, found = kill.killed(2, seed=0)
  assert len(moments) == 2
  assert found == json.loads(json.dumps(kill.digest(kill.fit())))
