"""What is released: the sdist and the wheel, their content, and the wheel in an environment of its own."""

import os
import pathlib
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import specjax

ROOT = pathlib.Path(__file__).parents[1]

OF_THE_PACKAGE = {
    "specjax/py.typed",
    "specjax/models/cpu_products.c",
    "specjax/serving/page.html",
    "specjax/drafters/trained/smollm2-135m-instruct/draft.safetensors",
    "specjax/drafters/trained/smollm2-135m-instruct/README.md",
}
"""Files that are not Python, and that the package needs or has to come with."""


def test_every_directory_of_configs_is_released():
    released = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    files = {path for globs in released.values() for glob in globs for path in ROOT.glob(glob)}
    configs = {path for path in (ROOT / "configs").rglob("*") if path.suffix in (".py", ".jsonl")}
    assert files == configs
    for place, globs in released.items():
        assert {f"share/specjax/{pathlib.Path(glob).parent}" for glob in globs} == {place}


def test_every_file_of_the_package_is_released():
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["specjax"]
    released = {path for glob in globs for path in (ROOT / "specjax").glob(glob)}
    there = {path for path in (ROOT / "specjax").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    others = {path for path in there if path.suffix != ".py"}
    assert others == released
    assert {str(path.relative_to(ROOT)) for path in others} == OF_THE_PACKAGE


def test_notices_name_what_is_shipped():
    notice = (ROOT / "NOTICE").read_text()
    shipped = [path.relative_to(ROOT) for path in ROOT.rglob("specjax/drafters/trained/*/*.safetensors")]
    shipped += [path.relative_to(ROOT) for path in (ROOT / "configs").glob("*.jsonl")]
    assert len(shipped) >= 3
    for path in shipped:
        assert str(path) in notice
        if path.suffix == ".safetensors":
            assert "Licence" in (ROOT / path.parent / "README.md").read_text()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> pathlib.Path:
    """The directory of a new sdist, and of the wheel that is built from it."""
    pytest.importorskip("build")
    directory = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(directory), str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return directory


@pytest.mark.slow
def test_sdist_and_wheel_have_what_they_need(built: pathlib.Path):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    stem = f"specjax-{specjax.__version__}"
    assert (wheel.name, sdist.name) == (f"{stem}-py3-none-any.whl", f"{stem}.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    python = {str(path.relative_to(ROOT)) for path in (ROOT / "specjax").rglob("*.py")}
    assert python | OF_THE_PACKAGE <= names
    assert {f"{stem}.dist-info/licenses/{name}" for name in ("LICENSE", "NOTICE")} <= names
    assert f"{stem}.data/data/share/specjax/configs/quickstart.py" in names
    assert not [name for name in names if name.startswith("tests/") or "__pycache__" in name]
    with tarfile.open(sdist) as file:
        assert {f"{stem}/{name}" for name in python | OF_THE_PACKAGE | {"LICENSE", "NOTICE"}} <= set(file.getnames())


def run(directory: pathlib.Path, *command: str) -> str:
    """What a command prints in a directory, without the paths of this process."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "XLA_FLAGS", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_wheel_works_alone(built: pathlib.Path, tmp_path):
    """In a clean environment, in a directory without a clone. It downloads the dependencies and the default model."""
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(elsewhere, sys.executable, "-m", "venv", str(environment))
    python, command = str(environment / "bin" / "python"), str(environment / "bin" / "specjax")
    (wheel,) = built.glob("*.whl")
    run(elsewhere, python, "-m", "pip", "install", "--quiet", str(wheel))
    said = run(
        elsewhere, python, "-c", "import specjax; specjax.generate; print(specjax.__version__, specjax.__file__)"
    )
    assert said.split()[0] == specjax.__version__
    assert pathlib.Path(said.split()[1]).is_relative_to(environment)
    assert "specjax generate" in run(elsewhere, command, "--help")
    listed = run(elsewhere, command, "list")
    assert f"{environment}/share/specjax/configs/quickstart.py" in listed
    assert "Keys of " in run(elsewhere, command, "compare", "--help")
    flags = ["--config.num_prompts=1", "--config.max_new_tokens=16", "--config.repeats=1", "--workdir=out"]
    run(elsewhere, command, "quickstart", *flags)
    assert "speedup" in (elsewhere / "out" / "summary.md").read_text()
    head = "import specjax; print(len(specjax.drafters.load_feature_head('smollm2-135m-instruct').tokens))"
    assert run(elsewhere, python, "-c", head).split() == ["6144"]
