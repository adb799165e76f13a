"""Tests run on the CPU; the catalogue of planted bugs is printed at the end: which check caught which."""

import contextlib
import os
from collections.abc import Callable, Iterator

# Before JAX starts, and for processes that tests start: libtpu is here to compile, and there need be no TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import pytest

Catches = Callable[..., contextlib.AbstractContextManager[None]]


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Drops what a file has compiled: a process with thousands of XLA:CPU programs runs out of memory maps."""
    yield
    jax.clear_caches()


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
    """Prints the bugs that were planted in this run."""
    passed = terminalreporter.stats.get("passed", [])
    found = sorted({tuple(value) for report in passed for name, value in report.user_properties if name == "caught"})
    if found:
        terminalreporter.section(f"{len(found)} planted bugs, each caught")
        for check, bug in found:
            terminalreporter.line(f"{check:<22} caught: {bug}")
