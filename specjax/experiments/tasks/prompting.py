"""Prompts that show a model what to do, and what of its text counts."""

from collections.abc import Sequence

INPUT, TARGET = "{input}", "{target}"
"""What a template has in the places of a pair's two texts."""


def few_shot(template: str, shots: Sequence[tuple[str, str]], text: str) -> str:
    """A prompt: some solved examples, then the text whose target is to be written.

    Args:
      template: how an example is written, with `{input}` and, behind it, `{target}`.
      shots: inputs and their targets.
      text: the input.

    Raises:
      ValueError: for a template without its two places.
    """
    if not 0 <= template.find(INPUT) < template.find(TARGET):
        raise ValueError(f"The template {template!r} needs {INPUT} and, behind it, {TARGET}.")
    begin, _, rest = template.partition(INPUT)
    middle, _, end = rest.partition(TARGET)
    solved = [f"{begin}{source}{middle}{target}{end}\n\n" for source, target in shots]
    # A token of the text may begin with the space that ends a prompt.
    return "".join(solved) + f"{begin}{text}{middle}".rstrip(" ")


def truncate(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first of some strings."""
    ends = [place for place in (text.find(string) for string in stop_strings) if place >= 0]
    return text[: min(ends)] if ends else text
