"""What the documentation says to type, shows or computes, held to the code."""

import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import types
import zlib

import pytest
from PIL import Image

import specjax
from specjax import cli

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), ROOT / "colab" / "README.md"])
README_WIDTH = 1250
"""Pixels of the widest plot: a column of some 880 still shows its smallest letters at ten."""


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


def headings(page: pathlib.Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files and headings; those of the site are also checked where it is built, and the web is not asked."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://127.0.0.1", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} does not exist"
        if anchor and file.suffix == ".md" and file.parent.name != "reference":
            assert anchor in headings(file), f"{target}: there is no such heading"


def drawing(name: str) -> dict:
    """What a script of docs/draw defines."""
    return runpy.run_path(str(DOCS / "draw" / f"{name}.py"))


def test_diagrams_are_those_of_their_script():
    drawn = {name: str(draw()) for name, draw in drawing("diagrams")["DIAGRAMS"].items()}
    kept = {path.stem: path.read_text(encoding="utf-8") for path in (DOCS / "images").glob("*.svg")}
    assert drawn == kept, "run python docs/draw/diagrams.py"


def test_plots_are_those_of_their_tables():
    """A plot that does not name its numbers is that of a run, whose page may have been written since."""
    script = drawing("results")
    known = 0
    for name, (read, _) in script["PLOTS"].items():
        numbers = Image.open(DOCS / "results" / name).info.get("numbers")
        known += numbers is not None
        wanted = script["fingerprint"](read())
        assert numbers in (None, wanted), f"the table of {name} has changed: run python docs/draw/results.py {name}"
    assert known >= len(script["PLOTS"]) - 1
    assert {path.name for path in (DOCS / "results").glob("*.png")} >= set(script["PLOTS"])


@pytest.mark.parametrize("path", sorted((DOCS / "results").glob("*.png")), ids=lambda path: path.name)
def test_plots_can_be_read_at_the_width_of_a_page(path):
    width, _ = Image.open(path).size
    assert width <= README_WIDTH, "draw it with specjax.experiments.reports.plots.panels"


def test_a_table_that_a_plot_needs_is_named():
    script = drawing("results")
    with pytest.raises(ValueError, match=r"adaptive\.md has 0 tables with the columns policy, pace"):
        script["table"]("adaptive.md", "policy", "pace")
    with pytest.raises(ValueError, match=r"there is no such plot; choose from adaptive\.png"):
        script["main"](["speed.png"])
    assert [script["value"](cell) for cell in ("**2.68x**", ".59", "8,326", "28.6%")] == [2.68, 0.59, 8326, 28.6]


def test_the_newcomers_commands_run_one_after_another(tmp_path, capsys):
    script = runpy.run_path(str(ROOT / "benchmarks" / "newcomer.py"))
    pages = ("tutorial.md", "install.md", "write_a_drafter.md", "README.md")
    tutorial = "".join((DOCS / page).read_text() for page in pages)
    commands = [command for _, command, _ in script["STEPS"]]
    for words in ("git clone", "specjax generate", "specjax quickstart", "python examples/write_a_drafter.py"):
        assert any(words in command for command in commands)
        assert words in tutorial
    run = script["run"]
    run.__globals__["STEPS"] = (("a first", "PYTHON -c print(1)", "."), ("a second", "PYTHON -c 1/0", "."))
    with pytest.raises(RuntimeError, match=r"(?s)'PYTHON -c 1/0' ended with exit code 1.*ZeroDivisionError"):
        run(tmp_path)
    assert "[2 of 2] a second" in capsys.readouterr().out
    assert script["table"]({"a first": 59.6, "a second": 60.4}).endswith("| a second | 60 | 2.0 min |")


def test_every_public_name_is_in_the_reference():
    pages = (page.read_text() for page in (DOCS / "reference").glob("*.md"))
    documented = {path for page in pages for path in re.findall(r"^::: (\S+)", page, re.MULTILINE)}

    def is_there(owner: types.ModuleType, name: str) -> bool:
        # On a page itself, as a part of something, or, as a module, by its parts.
        return any(
            path == found or path.startswith(f"{found}.") or found.startswith(f"{path}.")
            for path in paths(owner, name)
            for found in documented
        )

    missing = [f"{room.__name__}.{name}" for room in ROOMS for name in room.__all__ if not is_there(room, name)]
    assert not missing


ROOMS = (specjax, specjax.drafters, specjax.verify, specjax.sampling, specjax.decode)
"""The modules whose public names users import."""


def paths(owner: types.ModuleType, name: str) -> tuple[str, str]:
    """Where a public name is: in the module that offers it, and in the one that defines it."""
    value = getattr(owner, name)
    own = value.__name__ if isinstance(value, types.ModuleType) else f"{getattr(value, '__module__', '')}.{name}"
    return f"{owner.__name__}.{name}", own


def inventory(path: pathlib.Path) -> set[str]:
    """The names that the built reference describes, by the file that other sites link with."""
    _, _, packed = path.read_bytes().partition(b"using zlib.\n")
    return {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}


def known(owner: types.ModuleType, name: str, names: set[str]) -> bool:
    """Whether the reference describes a name itself, or, of a module, its parts."""
    return any(path in names or any(found.startswith(f"{path}.") for found in names) for path in paths(owner, name))


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
specjax() {{
  printf '%s\n' "  --config.draft=''" "  --config.draft_quantise=''" "      or --config.drafter" "  --draft: or --this"
}}
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
        ("specjax generate --dr", 2, ["--draft="]),
        ("specjax serve --draft=x", 2, []),
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
    names = inventory(tmp_path / "objects.inv")
    missing = [f"{room.__name__}.{name}" for room in ROOMS for name in room.__all__ if not known(room, name, names)]
    assert not missing
    # Included code is there.
    assert "def successors" in re.sub("<[^>]*>", "", (tmp_path / "write_a_drafter" / "index.html").read_text())
