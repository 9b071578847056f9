"""One of the processes of a run on several hosts, started by `cluster_test`.

  python -m tests.cluster PORT PROCESSES PROCESS WORKDIR LAG [slow | late]

Every process has the devices of XLA_FLAGS. The run is that of `parallel_cases`,
with such a lag, split over `fsdp`; every process writes what came out of it.
"""

import dataclasses
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


def fit(lag, **options):
  """The run, split over all devices there are, and what is compared of it."""
  from tests import parallel_cases as cases  # uses devices

  placement = cases.place(jax.device_count(), data=1, fsdp=jax.device_count())
  schedule = dataclasses.replace(cases.SCHEDULE, lag=lag)
  result = cases.fit(placement, schedule=schedule, **options)
  whole = jax.jit(oialr.to_dense, out_shardings=placement.replicated)
  events = result.select('event')
  return {
    'events': [[e['step'], e.get('decided')] for e in events],
    'ranks': [e['ranks'] for e in events],
    'evaluations': [list(x) for x in cases.evaluations(result)],
    'losses': cases.losses(result).tolist(),
    'kernels': {
      path: np.asarray(x).ravel().tolist()
      for path, x in tree.flatten(jax.device_get(whole(result.params))).items()
    },
  }


def main(port, processes, process, workdir, lag, how=''):
  """Trains, and writes the result."""
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  sharding.initialize(f'localhost:{port}', int(processes), int(process))
  workdir = pathlib.Path(workdir)
  found = fit(
    int(lag),
    workdir=workdir,
    checkpoint_every=10,
    resume=True,
    callbacks=[Slow()] if how == 'slow' else (),
    # The clock of the first process is that of all.
    max_seconds=(0, 1e6)[int(process)] if how == 'late' else None,
  )
  found['refused'] = refused()
  (workdir / f'result-{process}.json').write_text(json.dumps(found))


if __name__ == '__main__':
  main(*sys.argv[1:])
