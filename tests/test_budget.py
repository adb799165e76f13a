"""The tests' own budget of CPU time, and the cache of what they compile."""

import os
import shutil
import subprocess
import sys

import conftest

TESTS = """
import subprocess, sys, time
import pytest

BURN = "import time\\nend = time.process_time() + 0.5\\nwhile time.process_time() < end: pass"

@pytest.fixture(scope="module")
def heavy():
    exec(BURN)
    exec(BURN)

def test_light(): time.sleep(0.5)
def test_in_this_process(): exec(BURN)
def test_in_a_child(): subprocess.run([sys.executable, "-S", "-c", BURN])
def test_in_a_fixture(heavy): pass
def test_that_finds_the_fixture(heavy): pass
@pytest.mark.slow
def test_marked(): exec(BURN)
"""


def test_a_test_that_takes_too_much_fails_unless_it_is_marked(tmp_path):
    shutil.copy(conftest.__file__, tmp_path)
    (tmp_path / "test_them.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\ncpu_seconds = 60\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:jaxtyping"],
        cwd=tmp_path,
        # The environment has the last word.
        env=os.environ | {"PYTEST_ADDOPTS": "", "SPECJAX_TEST_CPU_SECONDS": "0.3"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    short = [line.split() for line in done.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "ERROR"))]
    heavy = {"in_this_process": "FAILED", "in_a_child": "FAILED", "in_a_fixture": "ERROR"}
    light = dict.fromkeys(("light", "that_finds_the_fixture", "marked"), "PASSED")
    assert {words[1].partition("::test_")[2]: words[0] for words in short} == heavy | light, done.stdout
    assert "and has 0.3 s in the default run" in done.stdout
    assert "@pytest.mark.slow" in done.stdout


def test_the_cache_of_programs_begins_anew_where_it_has_grown_too_large(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(conftest, "CACHE_BYTES", 100)
    kept = conftest.programs()
    kept.mkdir(parents=True)
    (kept / "small").write_bytes(bytes(60))
    conftest.bound_cache()
    assert (kept / "small").exists()
    (kept.parent / "of another jaxlib").mkdir()
    (kept.parent / "of another jaxlib" / "more").write_bytes(bytes(60))
    conftest.bound_cache()
    assert not kept.exists()


def test_the_default_run_compiles_cheaply_in_every_process(request):
    flags = os.environ.get("XLA_FLAGS", "")
    other_level = conftest.OPTIMISATION in flags and f"--{conftest.OPTIMISATION}=0" not in flags.split()
    assert request.config.stash[conftest.CHEAP] == (request.config.option.markexpr == "not slow" and not other_level)
