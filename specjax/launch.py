"""Runs an experiment: `python -m specjax.launch --config=configs/quickstart.py [--config.KEY=VALUE] [--workdir=DIR]`.

Every key of the config file can be overridden; `--config=FILE --help` lists them with their values. An interrupted run
is continued by the same command.
"""

import contextlib
import os
import pathlib
import re
import runpy
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags


class UsageError(Exception):
    """A command line that cannot be run."""


def _define() -> flags.FlagValues:
    """The flags, apart from the global ones, so that `main` can be called more than once in a process."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Where the results go; by default runs/NAME_OF_CONFIG.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Delete an earlier run in the workdir first.", flag_values=values)
    flags.DEFINE_bool(
        "compilation_cache",
        True,
        "Keep compiled programs in $SPECJAX_CACHE/jax (~/.cache/specjax/jax).",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "Join the processes of this run, one on each host, all with the same command; the first prints and writes. "
        "Cloud TPU, SLURM and Open MPI say who they are; elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT of the first, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID (0, 1, ...). SPECJAX_JOIN_TIMEOUT: seconds to wait for the others (300).",
        flag_values=values,
    )
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=values)
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
    return values


def _names(values: flags.FlagValues) -> list[str]:
    """Flags that a user may know: not the one-letter names, not those that stand for keys of the config."""
    return sorted(name for name in values if len(name) > 1 and "." not in name and name != "config")


def _list_flags(values: flags.FlagValues) -> str:
    return ", ".join(f"--{name}" for name in ("config", *_names(values)))


def _keys(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The keys of a config and their values; those of a config within it with a dot."""
    found: dict[str, Any] = {}
    for key in sorted(config):
        value = config[key]
        found |= _keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {f"{prefix}{key}": value}
    return found


def _help(values: flags.FlagValues, config: ConfigDict | None) -> str:
    lines = [__doc__ or "", "Flags:", "  --config: The config file; --config.KEY=VALUE overrides one of its keys."]
    lines += [f"  --{name}: {values[name].help}" for name in _names(values)]
    if config is not None:
        lines += ["", "Keys of this config:", *(f"  --config.{key}={value!r}" for key, value in _keys(config).items())]
    return "\n".join(lines)


def _split(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the other arguments."""
    for i, arg in enumerate(argv):
        name, has_value, value = arg.partition("=")
        if name in ("--config", "-config"):
            after = i + (1 if has_value else 2)
            return value if has_value else " ".join(argv[i + 1 : after]), [*argv[:i], *argv[after:]]
    return None, list(argv)


def _load_config(path: str) -> ConfigDict:
    """The config as its file has it. What follows a colon in the path is the argument of its `get_config`."""
    file, *arguments = path.split(":", 1)
    if not pathlib.Path(file).is_file():
        raise UsageError(f"The config file {file!r} does not exist: give --config=FILE, such as configs/quickstart.py.")
    try:
        config = runpy.run_path(file)["get_config"](*arguments)
    except Exception as error:  # Whatever the code of the file raises.
        raise UsageError(
            f"{file} is no config ({type(error).__name__}: {error}): --debug shows where it fails."
        ) from error
    if not isinstance(config, ConfigDict) or "experiment" not in config:
        raise UsageError(f"{file} is no experiment: its get_config() has to return a ConfigDict with an `experiment`.")
    return config.lock()


def _check_keys(argv: Sequence[str], config: ConfigDict) -> None:
    for arg in argv:
        match = re.match(r"--?(?:no)?config\.([^=]*)", arg)
        if match and match[1] not in _keys(config):
            raise UsageError(f"The config has no key {match[1]!r}. Its keys: {', '.join(_keys(config))}.")


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, ConfigDict | None]:
    """Reads the command line.

    Args:
      argv: the program's name and its arguments.

    Returns:
      the flags and the resolved config, None where only help was asked for.

    Raises:
      UsageError: in one sentence, naming what is valid.
    """
    values = _define()
    path, others = _split(argv)
    config = None
    if path is not None:
        config = _load_config(path)
        _check_keys(others, config)
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=others)
    elif any(re.match(r"--?(no)?config\.", arg) for arg in others):
        raise UsageError("--config.KEY=VALUE needs a config file: give --config=FILE.")
    try:
        rest = values(others)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UsageError(f"Unknown flag --{error.flagname}. The flags: {_list_flags(values)}.") from error
    except (flags.Error, ValueError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if rest:
        raise UsageError(f"Unexpected argument {rest[0]!r}: write --NAME=VALUE. The flags: {_list_flags(values)}.")
    if path is None and not values.help:
        raise UsageError("No config: give --config=FILE, such as --config=configs/quickstart.py.")
    return values, config


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX has been told of another one."""
    import jax

    from specjax.models.weights import wheel

    if not jax.config.values["jax_compilation_cache_dir"]:
        directory = wheel.cache_directory() / "jax"
        directory.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _run(values: flags.FlagValues, config: ConfigDict, workdir: pathlib.Path) -> None:
    from specjax import experiments

    run = experiments.get(str(config.experiment))
    if values.compilation_cache:
        enable_compilation_cache()
    if values.distributed:
        _run_distributed(run, config, workdir, values.overwrite)
    else:
        run(config, workdir, overwrite=values.overwrite)


def _run_distributed(run: Callable[..., Any], config: ConfigDict, workdir: pathlib.Path, overwrite: bool) -> None:
    """Runs as one of several processes."""
    from specjax import distributed

    distributed.initialize()
    own = distributed.mirror(workdir)
    with contextlib.ExitStack() as stack:
        if not distributed.is_first():
            stack.callback(shutil.rmtree, own, ignore_errors=True)
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        run(config, own, overwrite=overwrite)


def _complain(message: Any, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Args:
      argv: the program's name and its arguments; by default the process's own.

    Returns:
      the exit code: 0, 1 after an error, 130 after an interrupt.
    """
    argv = list(sys.argv if argv is None else argv)
    try:
        values, config = parse(argv)
    except UsageError as error:
        return _complain(error, debug="--debug" in argv)
    if values.help or config is None:
        print(_help(values, config))
        return 0
    file = (_split(argv)[0] or "").split(":")[0]
    workdir = pathlib.Path(values.workdir or pathlib.Path("runs") / pathlib.Path(file).stem)
    try:
        _run(values, config, workdir)
    except KeyboardInterrupt as interrupt:
        finished = workdir / "results.json"
        where = f"finished rows are in {finished}" if finished.exists() else f"no row was finished in {workdir}{os.sep}"
        where = str(interrupt) or where  # A run that knows better says so.
        print(f"\nInterrupted: {where}; the same command continues.", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        return _complain(error, values.debug)
    return 0


if __name__ == "__main__":
    # A process that was started in the background may ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
