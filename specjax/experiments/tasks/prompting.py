"""Prompts that show a model what to do, and the part of its text that counts."""

from collections.abc import Sequence

INPUT, TARGET = "{input}", "{target}"
"""The placeholders of a template for the two texts of a pair."""


def few_shot(template: str, shots: Sequence[tuple[str, str]], text: str) -> str:
    """A prompt: solved examples, pairs of input and target as the template has them, then the input to be solved.

    Raises:
      ValueError: for a template without `{input}` and, after it, `{target}`.
    """
    if not 0 <= template.find(INPUT) < template.find(TARGET):
        raise ValueError(f"The template {template!r} needs {INPUT} and, after it, {TARGET}.")
    begin, _, rest = template.partition(INPUT)
    middle, _, end = rest.partition(TARGET)
    solved = [f"{begin}{source}{middle}{target}{end}\n\n" for source, target in shots]
    # A token of the text may begin with the space that ends a prompt.
    return "".join(solved) + f"{begin}{text}{middle}".rstrip(" ")


def truncate(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first of some strings."""
    ends = [begin for begin in (text.find(string) for string in stop_strings) if begin >= 0]
    return text[: min(ends)] if ends else text
