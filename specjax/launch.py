"""Runs an experiment: `python -m specjax.launch --config=configs/quickstart.py [--config.KEY=VALUE] [--workdir=DIR]`.

Every key of the config file can be overridden; `--config=FILE --help` says what each means, `--list` names all configs.
An interrupted run is continued by the same command. Exit codes: 0, 1 for an error caused by flags or files, 2 for a bug
of specjax, 130 and 143 after an interrupt (Ctrl-C, SIGTERM).
"""

import ast
import contextlib
import difflib
import importlib.metadata
import importlib.util
import inspect
import os
import pathlib
import re
import runpy
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from specjax.experiments import failures, keys


class UsageError(Exception):
    """A command line that cannot be run."""


def _define() -> flags.FlagValues:
    """The flags, separate from the global ones, so that `main` can be called more than once in a process."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "Where the results go; by default runs/CONFIG-HASH, by file and values.", flag_values=values
    )
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
        "Cloud TPU, SLURM and Open MPI number them; elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT of the first, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID (0, 1, ...). SPECJAX_JOIN_TIMEOUT: seconds to wait for the others (300).",
        flag_values=values,
    )
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=values)
    flags.DEFINE_bool("list", False, "List the configs, with a line for each.", flag_values=values)
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
    return values


def _names(values: flags.FlagValues) -> list[str]:
    """Flags to show to a user: neither the one-letter names nor those for keys of the config."""
    return sorted(name for name in values if len(name) > 1 and "." not in name and name != "config")


def _list_flags(values: flags.FlagValues) -> str:
    return ", ".join(f"--{name}" for name in ("config", *_names(values)))


def _help(values: flags.FlagValues, config: ConfigDict | None, path: str) -> str:
    lines = [__doc__ or "", "Flags:", "  --config: The config file; --config.KEY=VALUE overrides one of its keys."]
    lines += [f"  --{name}: {values[name].help}" for name in _names(values)]
    if config is not None:
        lines += ["", f"Keys of {path}:", *keys.describe(config, path)]
    return "\n".join(lines)


def _split(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the other arguments."""
    for i, arg in enumerate(argv):
        name, has_value, value = arg.partition("=")
        if name in ("--config", "-config"):
            after = i + (1 if has_value else 2)
            return value if has_value else " ".join(argv[i + 1 : after]), [*argv[:i], *argv[after:]]
    return None, list(argv)


def _from_wheel() -> pathlib.Path | None:
    """The directory of the configs that a wheel has installed, None where specjax comes from elsewhere."""
    try:
        installed = importlib.metadata.files("specjax") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [path for path in installed if path.parts[-4:] == ("share", "specjax", "configs", "quickstart.py")]
    return pathlib.Path(str(found[0].locate())).resolve().parent if found else None


def configs() -> pathlib.Path:
    """The directory of the configs: the current directory's, the repository's, or the one that a wheel has installed.

    Raises:
      UsageError: where there is none.
    """
    for place in (pathlib.Path("configs"), pathlib.Path(__file__).parents[1] / "configs", _from_wheel()):
        if place is not None and (place / "quickstart.py").is_file():
            return place
    raise UsageError("There is no directory `configs` here: change to a clone of the repository, which has it.")


def _list() -> str:
    """A line for each config: its path, and the first line of its docstring."""
    lines, place = [], configs()
    for path in sorted(place.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(part, ast.FunctionDef) and part.name == "get_config" for part in tree.body):
            first = (ast.get_docstring(tree) or "").split("\n\n")[0]
            lines.append(f"{path}\n    {' '.join(first.split())}")
    return "\n".join([*lines, "", "Run one: python -m specjax.launch --config=FILE; --config=FILE --help says more."])


def _similar(file: str) -> str:
    """A question about the config whose name is similar to that of a file which does not exist, or nothing."""
    try:
        by_name = {path.stem: path for path in configs().rglob("*.py")}
    except UsageError:
        return ""
    near = difflib.get_close_matches(pathlib.Path(file).stem, by_name, n=1)
    return f" Did you mean {str(by_name[near[0]])!r}?" if near else ""


def _asked(get_config: Callable[..., Any], argv: Sequence[str]) -> dict[str, str]:
    """The arguments of `get_config` that flags give: those that are named as keys of the config, such as `kind`."""
    given = [re.fullmatch(r"--?config\.(\w+)=(.*)", arg) for arg in argv]
    return {match[1]: match[2] for match in given if match and match[1] in inspect.signature(get_config).parameters}


def _load_config(path: str, argv: Sequence[str] = ()) -> ConfigDict:
    """The config as its file has it.

    What follows a colon in the path is the argument of its `get_config`; without one, a flag of a key that is named as
    an argument is that argument too, so that a key may choose which others there are.
    """
    file, *arguments = path.split(":", 1)
    if not file:
        raise UsageError("--config is empty: give --config=FILE, such as configs/quickstart.py.")
    if not pathlib.Path(file).is_file():
        what = "is a directory" if pathlib.Path(file).is_dir() else "does not exist"
        raise UsageError(
            f"The config file {file!r} {what}: give --config=FILE, such as configs/quickstart.py.{_similar(file)}"
        )
    try:
        get_config = runpy.run_path(file)["get_config"]
        config = get_config(*arguments) if arguments else get_config(**_asked(get_config, argv))
    except (Exception, SystemExit) as error:  # Whatever the code of the file raises.
        raise UsageError(
            f"{file} is not a config ({type(error).__name__}: {error}): --debug shows where it fails."
        ) from error
    if not isinstance(config, ConfigDict) or "experiment" not in config:
        raise UsageError(f"{file} is not an experiment: its get_config() must return a ConfigDict with `experiment`.")
    return config.lock()


def _check_keys(argv: Sequence[str], config: ConfigDict) -> None:
    known = keys.flatten(config)
    for arg in argv:
        match = re.match(r"--?(?:no)?config\.([^=]*)", arg)
        if match and match[1] not in known:
            near = keys.suggest(match[1], known)
            inside = [key for key in known if key.startswith(f"{match[1]}.")]
            listed = ", ".join(inside or known)
            raise UsageError(f"The config has no key {match[1]!r}.{near} Its keys: {listed}.")


def _check_flags(values: flags.FlagValues) -> None:
    """Refuses values that absl takes but no run can use."""
    workdir = values["workdir"]
    if workdir.present and not (workdir.value or "").strip():
        raise UsageError("--workdir is empty: give a directory, or leave the flag out for runs/NAME_OF_CONFIG.")
    if workdir.value and pathlib.Path(workdir.value).is_file():
        raise UsageError(f"--workdir={workdir.value} is a file: give a directory.")
    if workdir.value and "\0" in workdir.value:
        raise UsageError("--workdir contains a null byte: give a directory.")


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


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
    config, defaults = None, {}
    if path is not None:
        config = _load_config(path, others)
        defaults = keys.flatten(config)
        _check_keys(others, config)
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=others)
    elif any(re.match(r"--?(no)?config\.", arg) for arg in others):
        raise UsageError("--config.KEY=VALUE needs a config file: give --config=FILE.")
    try:
        rest = values(others)[1:]
    except flags.UnrecognizedFlagError as error:
        near = keys.suggest(error.flagname, [name for name in values if len(name) > 1])
        near = near.replace("'", "--", 1).replace("'", "") if near else ""
        raise UsageError(f"Unknown flag --{error.flagname}.{near} The flags: {_list_flags(values)}.") from error
    except Exception as error:  # Whatever absl and ml_collections raise for a value.
        raise UsageError(f"{_words(error)} --config=FILE --help says what a key may be.") from error
    if rest:
        raise UsageError(f"Unexpected argument {rest[0]!r}: write --NAME=VALUE. The flags: {_list_flags(values)}.")
    _check_flags(values)
    if config is not None and (wrong := keys.wrong_tuple(config, defaults)):
        raise UsageError(wrong)
    if path is None and not values.help and not values.list:
        raise UsageError("No config: give --config=FILE, such as --config=configs/quickstart.py; --list names all.")
    return values, config


def _run(values: flags.FlagValues, config: ConfigDict, workdir: pathlib.Path) -> None:
    from specjax import experiments
    from specjax.api import keep_programs
    from specjax.experiments import workdir as places

    run = experiments.get(str(config.experiment))
    if values.compilation_cache:
        keep_programs()
    if values.distributed:
        _run_distributed(run, config, workdir, values.overwrite)
    else:
        with places.locked(workdir):
            run(config, workdir, overwrite=values.overwrite)


def _run_distributed(run: Callable[..., Any], config: ConfigDict, workdir: pathlib.Path, overwrite: bool) -> None:
    """Runs as one of several processes."""
    from specjax.experiments import workdir as places
    from specjax.parallel import distributed

    distributed.initialize()
    with contextlib.ExitStack() as stack:
        stack.enter_context(places.locked_by_first(workdir))
        own = distributed.mirror(workdir)
        if not distributed.is_first():
            stack.callback(shutil.rmtree, own, ignore_errors=True)
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        run(config, own, overwrite=overwrite)


def _default_workdir(file: str, config: ConfigDict) -> pathlib.Path:
    """The work directory of this config; prints how to continue there."""
    from specjax.experiments import workdir as places

    found = places.default(file, config.to_dict())
    print(f"Work directory: {found}{os.sep} (the same command goes on there; --workdir=DIR chooses another).")
    return found


def _complain(message: Any, debug: bool = False, code: int = failures.USER) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Prints a warning of specjax as a line, without its location in the code."""

    def line(message: Warning | str, category: type[Warning], *where: Any, **rest: Any) -> str:
        if category is UserWarning:
            return f"warning: {' '.join(str(message).split())}\n"
        return before(message, category, *where, **rest)

    before = warnings.formatwarning
    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _interrupted(interrupt: KeyboardInterrupt, workdir: pathlib.Path) -> int:
    finished = workdir / "results.json"
    where = f"finished rows are in {finished}" if finished.exists() else f"no row was finished in {workdir}{os.sep}"
    terminated = _signals[-1:] == [signal.SIGTERM]
    where = str(interrupt) or where  # Or what the run itself says.
    word = "Terminated" if terminated else "Interrupted"
    print(f"\n{word}: {where}; the same command continues.", file=sys.stderr)
    return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Args:
      argv: the program's name and its arguments; by default the process's own.

    Returns:
      the exit code: 0, 1 after an error, 2 after a bug of specjax, 130 or 143 after an interrupt.
    """
    argv = list(sys.argv if argv is None else argv)
    path = _split(argv)[0] or ""
    file = path.partition(":")[0]
    workdir, debug = pathlib.Path("runs") / pathlib.Path(file).stem, "--debug" in argv
    try:
        values, config = parse(argv)
        debug = bool(values.debug)
        if values.list:
            print(_list())
            return 0
        if values.help or config is None:
            print(_help(values, config, file))
            return 0
        workdir = pathlib.Path(values.workdir or _default_workdir(file, config))
        with _plain_warnings():
            _run(values, config, workdir)
    except KeyboardInterrupt as interrupt:
        return _interrupted(interrupt, workdir)
    except UsageError as error:
        return _complain(error, debug)
    except BrokenPipeError:
        # The reader of the output, such as `head`, has exited.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failures.USER
    except Exception as error:
        message, code = failures.explain(error)
        return _complain(message, debug, code)
    return 0


_signals: list[int] = []
"""The signals that have stopped this process."""


def _stop(number: int, _: Any) -> None:
    _signals.append(number)
    raise KeyboardInterrupt


def quiet() -> None:
    """Silences output of libraries that is of no use to a user, unless the user has set otherwise."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import jax

    devices = pathlib.Path("/dev")
    has_chips = any(any(devices.glob(name)) for name in ("accel*", "vfio/*", "nvidia*", "kfd"))
    if not jax.config.values["jax_platforms"] and importlib.util.find_spec("libtpu") and not has_chips:
        # libtpu, installed to compile for TPUs that you don't have (`configs/plan.py`), complains of their absence.
        jax.config.update("jax_platforms", "cpu")


def prepare_process() -> None:
    """Handles signals and silences libraries, in a process that runs nothing else."""
    # A process that was started in the background may ignore interrupts.
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    quiet()


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
