"""One of the processes of a run on several hosts, started by `cluster_test`.

  python -m tests.cluster PORT PROCESSES PROCESS WORKDIR [slow | late]

Every process has the devices of XLA_FLAGS. The run is that of `parallel_cases`,
split over `fsdp`; the first process writes what came out of it.
"""

import json
import pathlib
import sys
import time

import jax
import numpy as np

import oialr_jax as oialr
from oialr_jax import sharding
from oialr_jax import training
from oialr_jax import tree


class Slow(training.Callback):
  """Says how far the run is, and takes its time, to be stopped meanwhile."""

  everywhere = True

  def on_step(self, step):
    print(step, flush=True)
    time.sleep(0.05)


def refused():
  """What is said of a mesh whose `tensor` goes over all devices."""
  try:
    sharding.Placement(sharding.make_mesh(data=1, tensor=jax.device_count()))
  except ValueError as e:
    return str(e)
  return None


def main(port, processes, process, workdir, how=''):
  """Trains, and writes the result."""
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  sharding.initialize(f'localhost:{port}', int(processes), int(process))
  from tests import parallel_cases as cases  # uses devices

  workdir = pathlib.Path(workdir)
  result = cases.fit(
    cases.place(jax.device_count(), data=1, fsdp=jax.device_count()),
    workdir=workdir,
    checkpoint_every=10,
    resume=True,
    callbacks=[Slow()] if how == 'slow' else (),
    # The clock of the first process is that of all.
    max_seconds=(0, 1e6)[int(process)] if how == 'late' else None,
  )
  whole = jax.jit(
    oialr.to_dense, out_shardings=cases.place(jax.device_count()).replicated
  )
  dense = jax.device_get(whole(result.params))
  found = {
    'refused': refused(),
    'ranks': [(e['step'], e['ranks']) for e in result.select('event')],
    'evaluations': cases.evaluations(result),
    'losses': cases.losses(result).tolist(),
    'kernels': {
      k: np.asarray(x).ravel().tolist() for k, x in tree.flatten(dense).items()
    },
  }
  (workdir / f'result-{process}.json').write_text(json.dumps(found))


if __name__ == '__main__':
  main(*sys.argv[1:])
