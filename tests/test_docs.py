"""What the documentation says to type or computes, held to the code."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import types

import pytest

import specjax
from specjax import cli

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def blocks(page: str, language: str = "sh") -> list[str]:
    """The commands of a page, each on one line."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [line for block in found for line in block.replace("\\\n", " ").splitlines()]


def test_files_that_commands_name_exist():
    """Configs, examples, benchmarks and scripts. Files in `data/` and `runs/` are made by other commands."""
    named = re.compile(r"\b((?:configs|examples|benchmarks|launch|colab)/[\w/]+\.(?:py|sh|jsonl))")
    found = {(page, path) for page in PAGES for path in named.findall(page.read_text()) if "NAME" not in path}
    assert len(found) > 50
    missing = [f"{page.name}: {path}" for page, path in found if not (ROOT / path).is_file()]
    assert not missing


def test_every_public_name_is_in_the_reference():
    pages = (page.read_text() for page in (DOCS / "reference").glob("*.md"))
    documented = {path for page in pages for path in re.findall(r"^::: (\S+)", page, re.MULTILINE)}

    def is_there(owner: types.ModuleType, name: str) -> bool:
        value = getattr(owner, name)
        own = value.__name__ if isinstance(value, types.ModuleType) else f"{getattr(value, '__module__', '')}.{name}"
        # On a page itself, as a part of something, or, as a module, by its parts.
        return any(
            path == known or path.startswith(f"{known}.") or known.startswith(f"{path}.")
            for path in (f"{owner.__name__}.{name}", own)
            for known in documented
        )

    rooms = (specjax, specjax.drafters, specjax.verify, specjax.sampling, specjax.decode)
    missing = [f"{room.__name__}.{name}" for room in rooms for name in room.__all__ if not is_there(room, name)]
    assert not missing


def test_included_code_exists():
    included = [(page, path) for page in PAGES for path in re.findall(r'--8<-- "([^"]+)"', page.read_text())]
    assert len(included) >= 3
    for page, path in included:
        assert (ROOT / path).is_file(), f"{page.name} includes {path}"
        # GitHub shows no included code, so there is a link to it.
        assert f"(../{path})" in page.read_text()


def test_the_slice_of_the_page_is_one_that_the_script_accepts(tmp_path):
    (command,) = [line for line in blocks("tpu_vm.md") if line.startswith("launch/tpu_vm.sh")]
    words = [word.replace("runs/tpu", str(tmp_path / "out")) for word in shlex.split(command)]
    assert "--dry-run" in words
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)}
    done = subprocess.run(["bash", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # By hand it is made as the script makes it, and deleted.
    by_hand = "\n".join(blocks("tpu_vm.md"))
    for option in ("--accelerator-type=v6e-8", "--version=v2-alpha-tpuv6e", "tpu-vm delete"):
        assert option in done.stdout
        assert option in by_hand


def test_the_costs_of_the_page_follow_its_formulas():
    page = (DOCS / "tpu_vm.md").read_text()
    chips, price, rows = 16, 1.0, 1
    found = re.findall(r"^\| \w+[^|]*\| ([\d.]+) \| (\d+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(found) == 2
    plan = (DOCS / "results" / "plan.md").read_text()
    for ms, speed, cost in found:
        assert round(1000 * rows / float(ms)) == int(speed)
        assert round(price * chips * float(ms) / (3.6 * rows), 2) == float(cost)
        # By the formula's own words: a second costs `price * chips / 3600`.
        assert float(cost) == pytest.approx(1e6 / (1000 * rows / float(ms)) * price * chips / 3600, abs=0.01)
        assert ms in plan
    assert "placeholder" in page


@pytest.mark.slow
@pytest.mark.parametrize("line", [x for x in blocks("sweep.md") if x.startswith("python")], ids=lambda x: x[:60])
def test_the_sweeps_of_the_page_are_accepted(line, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "one"}\n')
    line = line.replace("data/prompts.jsonl", str(data)).replace("runs/sweep", str(tmp_path / "sweep"))
    command = [sys.executable, *shlex.split(line)[1:]]
    command += [] if "write_jobs" in line else ["--dry_run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout + "".join(path.read_text() for path in tmp_path.rglob("jobs.*"))
    assert "num_draft_tokens=8" in said or "num_draft_tokens=1,2,4,8" in said


COMPLETE = """
specjax() {{ printf '%s\n' "  --config.draft=''" "  --config.draft_quantise=''" "      or --config.drafter"; }}
{completion}
COMP_LINE='{line}' COMP_POINT=${{#COMP_LINE}}
COMP_WORDS=({line}) COMP_CWORD={place}
_specjax
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("line", "place", "expected"),
    [
        ("specjax co", 1, ["compare"]),
        ("specjax compare --config.dr", 2, ["--config.draft=", "--config.draft_quantise="]),
        ("specjax compare --config.draft=mo", 2, []),
        ("specjax compare --work", 2, []),
    ],
)
def test_commands_and_keys_are_completed(line, place, expected):
    completion = re.search(r"```bash\n(.*?)```", (DOCS / "install.md").read_text(), re.DOTALL)
    assert completion
    script = COMPLETE.format(completion=completion[1], line=line, place=place)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.split() == expected
    assert all(command in completion[1] for command in cli.COMMANDS)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    """`--quiet` would hide warnings from `--strict`."""
    pytest.importorskip("mkdocs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Included code is there.
    assert "def successors" in re.sub("<[^>]*>", "", (tmp_path / "write_a_drafter" / "index.html").read_text())
