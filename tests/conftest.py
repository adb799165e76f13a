"""Tests run on the CPU, keep what they compile, and have a budget of CPU time.

The end of a run prints where its CPU time went, and the catalogue of planted bugs: which check caught which.
"""

import collections
import contextlib
import gc
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
from collections.abc import Callable, Generator, Iterator

# Before JAX starts, and for processes that tests start: libtpu is here to compile, and there need be no TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import pytest

CACHE_BYTES = 1 << 30
"""A run that finds more compiled programs than this begins anew."""

MAPS = 20_000
"""A process with more memory maps than this drops its programs; Linux allows 65,530."""

OPTIMISATION = "xla_backend_optimization_level"

OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
"""XLA:CPU's emitters before those of MLIR compile in half the time. An unknown flag ends the process: 0.10 knows it."""

CHEAP = pytest.StashKey[bool]()
"""Whether this process compiles at the lowest level, as the default run does; `-m slow` compiles as users do."""

Catches = Callable[..., contextlib.AbstractContextManager[None]]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The budget, which a slower machine may raise: `-o cpu_seconds=60`, or in the environment."""
    parser.addini("cpu_seconds", "CPU seconds that a test may take unless it is marked slow; 0: any", default="20")


def pytest_configure(config: pytest.Config) -> None:
    """How programs are compiled and kept, here and in the processes that tests start."""
    config.stash[CHEAP] = _compile_cheaply() if config.option.markexpr == "not slow" else False
    if os.environ.get("SPECJAX_TEST_CACHE") != "0":
        for name, value in {
            "jax_compilation_cache_dir": str(programs()),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }.items():
            if name.upper() not in os.environ:
                os.environ[name.upper()] = str(value)
                jax.config.update(name, value)


def _compile_cheaply() -> bool:
    """Compiles this process's programs at XLA's lowest level and by its older emitters, which takes far less time.

    A level of the user's own, in XLA_FLAGS, is kept. Workers of a parallel run inherit that of this function.
    """
    flags, level = os.environ.get("XLA_FLAGS", ""), f"--{OPTIMISATION}=0"
    if OPTIMISATION in flags and level not in flags.split():
        return False
    flags = flags if level in flags.split() else f"{flags} {level}".strip()
    os.environ["XLA_FLAGS"] = flags
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] = f"{flags} {OLDER_EMITTERS}"
        jax.jit(lambda: 0)()  # XLA reads its flags once. libtpu, which reads them later, does not know this one.
        os.environ["XLA_FLAGS"] = flags
    return True


def programs() -> pathlib.Path:
    """Where compiled programs are kept from run to run: they serve one jaxlib and one kind of processor."""
    cpu = pathlib.Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    kind = {platform.machine(), *(line for line in lines if line.startswith(("model name", "flags", "Features")))}
    name = f"{importlib.metadata.version('jaxlib')}-{hashlib.sha256(repr(sorted(kind)).encode()).hexdigest()[:8]}"
    root = pathlib.Path(os.environ.get("SPECJAX_CACHE") or "~/.cache/specjax").expanduser()
    return root / "tests" / name


def pytest_sessionstart(session: pytest.Session) -> None:
    """Once a run, not once a worker."""
    if not hasattr(session.config, "workerinput"):
        bound_cache()


def pytest_collection_finish() -> None:
    """Python's collector leaves alone what lives as long as the run, and looks less often.

    Traces of programs are many small objects, at which it would spend a seventh of the run.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


def bound_cache() -> None:
    """Empties the cache where it has grown too large; jax's own bound would list it at every compilation."""
    kept = programs().parent
    size = 0
    for file in kept.rglob("*"):
        with contextlib.suppress(OSError):  # Another run may begin anew at this moment.
            size += file.stat().st_size if file.is_file() else 0
    if size > CACHE_BYTES:
        shutil.rmtree(kept, ignore_errors=True)


def _cpu_seconds() -> float:
    """Of this process, with all its threads, and of the children that it has waited for."""
    return sum(os.times()[:4])


def _within_budget(item: pytest.Item, phase: str, share: float) -> Generator[None, object, object]:
    """Runs a phase of a test, and fails it where it took more than a share of the budget."""
    begin = _cpu_seconds()
    result = yield
    seconds = _cpu_seconds() - begin
    item.user_properties.append(("cpu", seconds))
    seconds_each = float(os.environ.get("SPECJAX_TEST_CPU_SECONDS") or item.config.getini("cpu_seconds"))
    own = item.get_closest_marker("budget")
    budget = share * (max(seconds_each, own.args[0]) if own and seconds_each else seconds_each)
    if 0 < budget < seconds and item.get_closest_marker("slow") is None:
        pytest.fail(
            f"{phase} took {seconds:.1f} s of CPU time, and has {budget:g} s in the default run. "
            "Make it smaller (fewer programs to compile, fewer cases), or mark it slow: @pytest.mark.slow. "
            "On a slow machine: SPECJAX_TEST_CPU_SECONDS=60, or -o cpu_seconds=60; 0 for any.",
            pytrace=False,
        )
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Fixtures have twice the budget: a module's are set up once, by the first test that asks for them."""
    return (yield from _within_budget(item, "The setup of its fixtures", 2))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test has the budget for itself."""
    return (yield from _within_budget(item, "It", 1))


@pytest.fixture(autouse=True, scope="module")
def forgetprograms() -> Iterator[None]:
    """Drops what was compiled once there is much of it: XLA:CPU's programs take memory maps, of which there are few.

    Small operations are the same in all files, so dropping them after each would compile or read them again in each.
    """
    yield
    if _num_maps() > MAPS:
        jax.clear_caches()
        gc.collect()


def _num_maps() -> int:
    """How many memory maps this process has; where that is not known, too many."""
    try:
        return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return MAPS + 1


@pytest.fixture
def catches(request: pytest.FixtureRequest) -> Catches:
    """`with catches(bug, check, match): ...`: the check must fail, and the run's summary names both."""

    @contextlib.contextmanager
    def context(bug: str, check: str, match: str) -> Iterator[None]:
        with pytest.raises(AssertionError, match=match):
            yield
        # Reports bring their properties from the workers of a parallel run.
        request.node.user_properties.append(("caught", (check, bug)))

    return context


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the CPU time by file, and the bugs that were planted in this run."""
    reports = [report for name in ("passed", "failed") for report in terminalreporter.stats.get(name, [])]
    seconds: collections.Counter[str] = collections.Counter()
    for report in reports:
        seconds[report.nodeid.split("::")[0]] += sum(value for name, value in report.user_properties if name == "cpu")
    if seconds.total() > 60:
        terminalreporter.section(f"{seconds.total():.0f} s of CPU time")
        for name, used in seconds.most_common(10):
            terminalreporter.line(f"{used:6.0f} s {name}")
    passed = terminalreporter.stats.get("passed", [])
    found = sorted({tuple(value) for report in passed for name, value in report.user_properties if name == "caught"})
    if found:
        terminalreporter.section(f"{len(found)} planted bugs, each caught")
        for check, bug in found:
            terminalreporter.line(f"{check:<22} caught: {bug}")
