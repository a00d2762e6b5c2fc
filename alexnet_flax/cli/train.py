"""`python train.py --config=FILE --workdir=DIR [--config.KEY=VALUE ...]`: reads the flags and trains."""

import difflib
import os
import pathlib
import re
import runpy
import sys
import traceback
import typing
from collections.abc import Callable

from alexnet_flax import config as configuration
from alexnet_flax.cli import start
from alexnet_flax.cli.compilation_cache import use_compilation_cache
from alexnet_flax.config import Config, from_dict, idle_keys, with_values
from alexnet_flax.errors import DivergedError, PreemptedError, UsageError, needs_extra, one_line, unknown_name
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.training import distributed
from alexnet_flax.training.cpu_memory import has_cpus_alone, keep_cpu_memory
from alexnet_flax.training.distributed import Cluster

if typing.TYPE_CHECKING:
  from absl import flags

USAGE = """\
usage: python train.py --config=FILE[:VARIANT] [--workdir=DIR] [--show_batch=PNG] [--config.KEY=VALUE ...]

  python train.py --config=configs/digits.py                    embedded digits, under a minute
  python train.py --config=configs/imagenet.py --workdir=runs/imagenet
  python train.py --config=configs/imagenet.py:torchvision --config.total_epochs=30
  python train.py --config=configs/digits.py --show_batch=out.png    draws what the network will see
  python train.py --config=... --coordinator=HOST:PORT --processes=N --process_id=I
      [--join_within=SECONDS] [--lost_after=SECONDS]
      one of several processes; under SLURM, MPI, Kubernetes and on TPU pods the first three are found out

recipes: {recipes}
variants: {variants}
A run goes on from the last checkpoint in its --workdir (default: runs/RECIPE)."""
_TEXTS = ('workdir', 'show_batch', 'coordinator')
_NUMBERS = {
  'processes': None,
  'process_id': None,
  'lost_after': Cluster.lost_after,
  'join_within': Cluster.join_within,
}


def main(argv: list[str], run: Callable[[Config, str], object] | None = None) -> int:
  """Trains, or calls `run` instead, and returns the exit code; a foreseeable error is one line."""
  if {'-h', '--help', '--helpfull'} & set(argv):
    print(_usage())
    return 0
  if len(argv) == 1:
    print(f'error: {_usage()}', file=sys.stderr)
    return 2
  try:
    start.set_up()
    with needs_extra('train.py'):
      code = _main(argv, run or train_and_report)
  except (UsageError, DivergedError, PreemptedError) as error:
    code = start.tell(error)
  except Exception:  # printed before the parent knows: it shows nothing after that
    traceback.print_exc()
    code = 1
  return distributed.tell_parent(code)


def _main(argv: list[str], run: Callable[[Config, str], object]) -> int:
  values = flags_of(argv)
  config, workdir = parse(argv, values)
  cluster = Cluster(values.coordinator, **{name: getattr(values, name) for name in _NUMBERS})
  if distributed.IS_CHILD:
    distributed.initialize(cluster)
  elif cluster.coordinator or distributed.is_in_cluster():
    return distributed.supervise(argv, cluster)
  else:
    keep_cpu_memory()
  if config.compilation_cache:
    use_compilation_cache()
  if values.show_batch:
    from alexnet_flax.diagnostics.preview_batch import show_batch

    show_batch(config, values.show_batch)
    return 0
  with distributed.lost_processes(cluster):
    run(config, workdir)
  return 0


def train_and_report(config: Config, workdir: str) -> None:
  """Trains, then draws report.html if the configuration asks for it; a failure there is only a warning."""
  import jax

  from alexnet_flax.training.bucket_run import run_folder
  from alexnet_flax.training.logger import steady_output
  from alexnet_flax.training.seeds import run_folders
  from alexnet_flax.training.train import train
  from alexnet_flax.training.watchdog import ends_if_it_hangs

  with run_folder(workdir) as folder, steady_output(folder):
    with ends_if_it_hangs(config.hang_seconds, folder):
      train(config, folder)
    if not config.report or jax.process_index():
      return
    if jax.process_count() > 1:  # the others would wait for this one, and take it for lost
      print(f'alexnet-flax report {workdir} draws what it learned')
      return
    try:
      with needs_extra('report.html'):
        from alexnet_flax.viz.report import FILE, load_results, write_report

      path, runs = folder / FILE, run_folders(folder, config)
      trained = max((run / 'metrics.jsonl').stat().st_mtime_ns for run in runs)
      if path.is_file() and path.stat().st_mtime_ns >= trained:  # nothing has been trained
        return
      write_report([load_results(str(run), config.data.data_dir) for run in runs], path)
      print(one_line(f'{path} shows what it learned'), flush=True)
    except Exception as error:
      print(one_line(f'warning: no report: {error}'), flush=True)


def parse(argv: list[str], values: 'flags.FlagValues | None' = None) -> tuple[Config, str]:
  """Returns the configuration and the run's folder; with `deterministic`, XLA gets one thread on CPUs.

  Raises:
    UsageError: A flag, key or name is misspelt, a file is missing, or values are not allowed.
  """
  values, recipe = values or flags_of(argv), _recipe(argv)
  if values.config is None:
    raise UsageError(f'{recipe}: get_config returned None; it must return the configuration')
  tree = values.config.to_dict() if hasattr(values.config, 'to_dict') else values.config
  config = from_dict(tree)
  for key, line in idle_keys(config).items():
    if any(re.match(rf'--?config\.{key}(=|$)', argument) for argument in argv):
      raise UsageError(f'{line}; leave it out')
    print(f"note: {line}; the recipe's is left out", file=sys.stderr)
    config = with_values(config, {key: configuration.value_of(Config(), key)})
  if config.deterministic and has_cpus_alone():  # read by XLA when JAX is first asked for its devices
    os.environ['NPROC'] = '1'
  return config, values.workdir or f'runs/{recipe.stem}'


def flags_of(argv: list[str]) -> 'flags.FlagValues':
  """Returns the flags as absl and ml_collections parse them; their errors become UsageErrors."""
  for argument in argv[1:]:
    match = re.match(r'--?config\.([^=]+)', argument)
    if match and match[1] not in configuration.all_keys():
      raise _unknown_key(match[1])
  recipe = _recipe(argv)
  if recipe.name and not os.path.isfile(recipe):
    raise unknown_name('configuration file', str(recipe), recipes(), adjective='no')
  nothing = UsageError(f'no --config=FILE is given; there are: {", ".join(recipes())}')
  if not recipe.name and any(re.match(r'--?config[.=]', argument) for argument in argv[1:]):
    raise nothing
  from absl import flags
  from ml_collections import config_flags

  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    for name in _TEXTS:
      flags.DEFINE_string(name, None, '', flag_values=values)
    for name, default in _NUMBERS.items():
      flags.DEFINE_integer(name, default, '', flag_values=values)
    rest = values(argv)
    _ = values.config and values.config.items()  # a recipe's own error comes only on use
    if values.config and (complete := runpy.run_path(str(recipe)).get('complete')):
      complete(values.config)
  except flags.UnrecognizedFlagError as error:
    flag, choices = f'--{error.flagname}', [f'--{name}' for name in ('config', *_TEXTS, *_NUMBERS)]
    key = None if difflib.get_close_matches(flag, choices, cutoff=0.8) else _nearest_key(error.flagname)
    if key is not None:
      raise UsageError(f"unknown flag {flag!r}; did you mean '--config.{key}'?") from None
    raise unknown_name('flag', flag, choices) from None
  except UsageError:
    raise
  except flags.Error as error:
    raise UsageError(_last_line(error).removeprefix('flag --config.')) from None
  except Exception as error:  # the recipe is a program, and may fail in any way
    raise UsageError(f'{recipe}: {type(error).__name__}: {_last_line(error)}') from None
  if not recipe.name:
    raise nothing
  if len(rest) > 1:
    raise UsageError(f'unexpected argument {rest[1]!r}; flags are written --NAME=VALUE')
  return values


def _recipe(argv: list[str]) -> pathlib.Path:
  """Returns the path in --config=PATH[:ARGUMENT] or --config PATH; '.' if there is none."""
  joined = '\0'.join(argv[1:])
  match = re.search(r'(?:^|\0)--?config[=\0]([^:\0]*)', joined)
  return pathlib.Path(match[1] if match else '')


# What other programs call our keys.
_ELSEWHERE = {'epochs': 'total_epochs', 'steps': 'total_steps', 'lr': 'optimizer.learning_rate'}


def _unknown_key(key: str) -> UsageError:
  near = _nearest_key(key)
  meant = f'; did you mean {near!r}?' if near else ''
  return UsageError(f'unknown configuration key {key!r}{meant} (all keys: alexnet_flax/config.py)')


def _nearest_key(word: str) -> str | None:
  """Returns the nearest key, also to its last part alone ('batch_size')."""
  if word in _ELSEWHERE:
    return _ELSEWHERE[word]
  known = list(configuration.all_keys())
  last = difflib.get_close_matches(word, [name.rpartition('.')[2] for name in known], n=1, cutoff=0.8)
  ends = [name for name in known if last and name.rpartition('.')[2] == last[0]]
  near = ends if '.' not in word and ends else difflib.get_close_matches(word, known, n=1)
  return near[0] if near else None


def _last_line(error: Exception) -> str:
  """Returns the last line of an error's text: ml_collections puts a traceback before it."""
  lines = str(error).strip().splitlines()
  return lines[-1].strip() if lines else type(error).__name__


def _usage() -> str:
  return USAGE.format(recipes=', '.join(recipes()), variants=', '.join(VARIANTS))


def recipes() -> list[str]:
  """Returns the configuration files below the current folder."""
  return sorted(path.as_posix() for path in pathlib.Path('configs').glob('*.py'))
