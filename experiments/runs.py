"""One run of a binary: by which method, how far, and what is said of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import os
from typing import Any

from flax import linen as nn
import jax
import optax

from experiments import cli
from experiments import dlrt
from experiments import lora
from experiments import memory
from experiments import methods
from experiments import settings
import oialr_jax as oialr
from oialr_jax import optimizer as optimizer_lib
from oialr_jax import training
from oialr_jax.training import rates

Config = settings.Config
Rate = optax.Schedule

# OIALR by the policy of `transport` for the optimiser's state.
_POLICIES = {'oialr': 'transport', 'reset': 'reset', 'reference': 'reference'}
# The methods that it is compared with; each has a section in the settings.
BASELINES: Mapping[str, type[methods.Method]] = {
  'fixed_rank': methods.FixedRank,
  'svd_prune': methods.SvdPrune,
  'svd_init': methods.SvdInit,
  'galore': methods.Galore,
  'lora_style': lora.Lora,
  'dlrt': dlrt.Dlrt,
}
METHODS = ('dense', *_POLICIES, *BASELINES)


def oialr_section(**changes: Any) -> dict[str, Any]:
  """The section 'oialr' of a configuration: every attribute of the schedule.

  Args:
    **changes: what is otherwise than by default.
  """
  found = {}
  for field in dataclasses.fields(oialr.Schedule):
    if field.name not in ('steps', 'policy'):  # of the run, and of the method
      value = changes.pop(field.name, field.default)
      several = value is None or field.name in ('delay', 'latest', 'rank')
      found[field.name] = settings.either(value) if several else value
  settings.check_names(changes, found, 'oialr')
  return found


def sections(**changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """The sections of `BASELINES` for a configuration.

  Args:
    **changes: by section, what is otherwise than by default.
  """
  settings.check_names(changes, BASELINES, 'section')
  found = {
    name: dataclasses.asdict(make(**changes.get(name, {})))
    for name, make in BASELINES.items()
  }
  for values in found.values():
    for key in ('rank', 'delay'):  # a number, or a share
      if key in values:
        values[key] = settings.either(values[key])
  return found


@dataclasses.dataclass(frozen=True)
class Oialr(methods.Method):
  """The method of this package, by the schedule."""

  def arguments(self, schedule: oialr.Schedule) -> dict[str, Any]:
    return {'schedule': schedule}


def arguments(method: str, config: Config, steps: int) -> dict[str, Any]:
  """What makes a method: arguments of `training.fit` beside model and data.

  Args:
    method: one of `METHODS`.
    config: with the sections 'oialr' and 'compaction', and that of the method.
    steps: of the run.

  Raises:
    ValueError: there is no such method, or a section is not right.
  """
  if method == 'dense':
    return {}
  if method == 'dlrt':
    dlrt.check_accumulate(config.get('accumulate', 1))
  found = _method(method, config).arguments(_schedule(method, config, steps))
  if found:
    found['compaction'] = settings.build(
      training.Compaction, config, 'compaction'
    )
  return found


def check(config: Config, steps: int, methods: Sequence[str]):
  """Raises ValueError if a method cannot be run as configured."""
  settings.check_names(methods, METHODS, 'config.methods')
  for method in methods:
    arguments(method, config, steps)


def check_model(model: nn.Module, where: str, *inputs: jax.ShapeDtypeStruct):
  """Raises ValueError, saying `where`, if a model cannot take such inputs."""
  try:
    jax.eval_shape(model.init, jax.random.key(0), *inputs)
  except ValueError as e:  # such as sides that are no multiple of the patches
    raise ValueError(f'{where}: {e}') from e


def _method(name: str, config: Config) -> methods.Method:
  settings.check_names([name], METHODS, 'method')
  if name in BASELINES:
    return settings.build(BASELINES[name], config, name)
  return methods.Method() if name == 'dense' else Oialr()


def _schedule(name: str, config: Config, steps: int) -> oialr.Schedule:
  policy = _POLICIES.get(name, optimizer_lib.TRANSPORT)
  return settings.build(
    oialr.Schedule, config, 'oialr', steps=steps, policy=policy
  )


def fit(
  method: str,
  config: Config,
  options: cli.Options,
  *,
  name: str,
  steps: int,
  loss_fn: training.LossFn,
  params: Any,
  data: Callable[[], Iterable[Any]],
  rate: Rate,
  optimizer: methods.Adam,
  model_state: Any | None = None,
  eval_fn: training.EvalFn | None = None,
  callbacks: Sequence[training.Callback] = (),
  **more: Any,
) -> training.Result:
  """`training.fit` of a method, in a folder of its own.

  Args:
    method: one of `METHODS`.
    config: its settings; if it has them, `accumulate`, `remat` and `rewarmup`.
    options: of the binary.
    name: of the run, and of its folder in the workdir.
    steps: of the run.
    loss_fn: see `training.fit`, as of params, model_state and eval_fn.
    params: see there.
    data: returns the batches, from the first one on.
    rate: the learning rate, without the warm-ups after events.
    optimizer: made with the rate.
    model_state: see there.
    eval_fn: see there.
    callbacks: that listen, besides the progress lines.
    **more: see there.

  Returns:
    The result; its last record has what `memory.peak` says, besides.
  """
  how = _method(method, config)
  method_arguments = arguments(method, config, steps)
  if config.get('rewarmup'):
    events = _events(method_arguments)
    rate = rates.rewarmed(rate, events, steps=config.rewarmup)
  progress = () if options.quiet else (training.Progress(name),)

  def layers() -> tuple[oialr.Layer, ...]:
    key, rules = jax.random.key(0), _schedule(method, config, steps)
    batch = next(iter(data()))
    return oialr.select(
      oialr.find_layers(loss_fn, params, model_state or {}, batch, key),
      keep_first=rules.keep_first,
      keep_last=rules.keep_last,
    )

  memory.reset()
  result = training.fit(
    how.wrapped(loss_fn),
    params,
    data(),
    optimizer=how.optimizer(optimizer, rate, layers),
    steps=steps,
    model_state=model_state,
    eval_fn=eval_fn and how.wrapped(eval_fn),
    workdir=options.workdir / name,
    callbacks=(*progress, *callbacks),
    **(_of_the_step(config) | more | method_arguments | options.fit()),
  )
  end = result.records[-1] | memory.peak()
  return dataclasses.replace(result, records=(*result.records[:-1], end))


def summary(result: training.Result) -> dict[str, Any]:
  """What is said of a run whatever its task: sizes and seconds."""
  end = result.select('end')[-1]
  seconds = end['seconds']
  return {
    'trainable %': trainable_percent(end),
    'stored %': 100 * end['stored'] / end['dense'],
    'optimiser state kB': end['optimizer_bytes'] / 1000,
    f'peak memory of the {end["peak_of"]} MB': end['peak_bytes'] / 1e6,
    'steps/s at the end': end['steps_per_second'],
    'training s': seconds['training'],
    'compiling s': seconds['compiling'],
    'SVDs s': seconds['events'],
    'total s (no tracking)': sum(seconds.values()) - seconds['tracking'],
  }


def trainable_percent(record: Mapping[str, Any]) -> float:
  """Of an event, a conversion, a compaction or the end."""
  return 100 * record['trainable'] / record['dense']


def machine() -> dict[str, Any]:
  """Where a result is from."""
  return {
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'cores': os.cpu_count(),
    'jax': jax.__version__,
  }


def _events(method_arguments: Mapping[str, Any]) -> Sequence[Any]:
  """What happens between steps; each has its `step`."""
  if 'schedule' in method_arguments:
    return method_arguments['schedule'].events()
  converted = method_arguments.get('conversion')
  return () if converted is None else (converted,)


def _of_the_step(config: Config) -> dict[str, Any]:
  return {k: config[k] for k in ('accumulate', 'remat') if k in config}
