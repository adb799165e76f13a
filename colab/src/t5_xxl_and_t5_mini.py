# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/specjax/specjax/blob/main/colab/t5_xxl_and_t5_mini.ipynb)
#
# # T5 XXL and a T5 of one's own
#
# [Leviathan, Kalman and Matias (2022)](https://arxiv.org/abs/2211.17192) sped up T5 v1.1 XXL, 11B parameters, by up to
# 3.4 times, with T5-small as its draft. This notebook recomputes the tables of the paper from its formulas, repeats the
# experiment at small scale, with a target and drafts that are trained here, plans the real models on one TPU v4, and
# says how to run them.

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
# ## Table 1: what the formulas promise
#
# Two numbers decide. **alpha** is the mean probability that a draft token is accepted, and **c** is the time of a draft
# call over that of a target call. With K draft tokens per step (the paper's gamma), a call of the target gives $(1 -
# \alpha^{K+1}) / (1 - \alpha)$ tokens (equation 1), and the speedup is that, divided by $K c + 1$ (Theorem 3.8). The
# price is arithmetic: operations grow by the factor of Theorem 3.11. The paper's Table 1 takes c = 0.

# %%
from IPython.display import display
from specjax import theory
from specjax.experiments.reports import leviathan, notebook, plots

rows = [
    [alpha, k, f"{theory.operations_factor(alpha, k, 0):.2f}x", f"{theory.walltime_factor(alpha, k, 0):.2f}x"]
    for alpha, k in ((0.6, 2), (0.7, 3), (0.8, 2), (0.8, 5), (0.9, 2), (0.9, 10))
]
display(notebook.table(["alpha", "K", "operations", "speed"], rows))

# %%
figure, (left, right) = plots.panels(2, 4.7, 3.4)
ks = range(13)
for alpha, color in zip((0.6, 0.7, 0.8, 0.9), plots.COLORS, strict=False):
    left.plot(
        ks,
        [theory.walltime_factor(alpha, k, 0.05) for k in ks],
        "o-",
        markersize=3,
        color=color,
        label=f"alpha = {alpha}",
    )
    right.plot(ks, [theory.operations_factor(alpha, k, 0.05) for k in ks], "o-", markersize=3, color=color)
plots.finish(left, "Speedup at c = 0.05", "draft tokens K", "times plain", legend=True)
plots.finish(right, "Operations", "draft tokens K", "times plain")
display(notebook.figure(figure, "Speedup and operations by K, for four values of alpha."))

# %%
# @title Numbers of your own
ALPHA = 0.75  # @param {type: "slider", min: 0, max: 0.99, step: 0.01}
C = 0.05  # @param {type: "slider", min: 0, max: 1, step: 0.01}
DRAFT_TOKENS = 5  # @param {type: "slider", min: 1, max: 20, step: 1}
tokens, speed = theory.expected_tokens(ALPHA, DRAFT_TOKENS), theory.walltime_factor(ALPHA, DRAFT_TOKENS, C)
best = max(range(21), key=lambda k: theory.walltime_factor(ALPHA, k, C))
print(f"K = {DRAFT_TOKENS}: {tokens:.2f} tokens per call of the target, {speed:.2f} times as fast as plain decoding.")
print(f"The best K is {best}: {theory.walltime_factor(ALPHA, best, C):.2f} times as fast." if best else "Do not draft.")

# %% [markdown]
# ## Tables 2 and 3: what the paper measured
#
# Table 2 has K, alpha and the measured speedup of T5 XXL with three drafts on one TPU v4. The last two columns are
# computed here: the speedup of Theorem 3.8 for c = 0, and the c that would explain the measurement. Where this c is
# negative, more was measured than the theorem allows: it takes the acceptances of a step as independent, which is an
# approximation, and a measured speedup also has in it how well both sides are implemented.

# %%
rows = []
for task, name in (("ende", "English to German"), ("cnndm", "summaries")):
    for temperature, drafts in leviathan.PAPER_SPEEDUP[task].items():
        for draft, (k, alpha, speedup) in drafts.items():
            bound = theory.walltime_factor(alpha, k, 0)
            explained = (theory.expected_tokens(alpha, k) / speedup - 1) / k
            rows.append(
                [
                    name,
                    f"T5-{draft}",
                    f"{temperature:g}",
                    k,
                    alpha,
                    f"{speedup}x",
                    f"{bound:.2f}x",
                    f"{explained:.2f}".replace("-0.00", "0.00"),
                ]
            )
header = ["task", "draft", "T", "K", "alpha", "the paper measured", "Theorem 3.8 at c = 0", "c that explains it"]
display(notebook.table(header, rows))

# %% [markdown]
# Table 3 has alpha for more drafts. The last column is computed: a bigram table costs next to nothing, so with many
# draft tokens it can bring $1 / (1 - \alpha)$ tokens per call, and that much speedup where scoring them is free.

# %%
columns = ("unigram", "bigram", "small", "base", "large")
rows = []
for task, by_temperature in leviathan.PAPER_ALPHA.items():
    for temperature, alphas in by_temperature.items():
        shown = [f"{alphas[draft]:.2f}" if draft in alphas else "-" for draft in columns]
        rows.append([task, f"{temperature:g}", *shown, f"{theory.oracle_tokens(alphas['bigram']):.2f}x"])
display(notebook.table(["task", "T", *columns, "at most, by bigrams"], rows))

# %% [markdown]
# ## A small T5, trained here
#
# Every model of this experiment is trained by it: a T5 as the target, two smaller ones as drafts, and tables of
# unigrams and bigrams. The task is to write the first line of a docstring from what follows it, with texts of Python's
# standard library, which are on this machine already. The models are tiny and trained for minutes, so the texts are
# poor; what is measured is how acceptance, cost and speedup hang together.

# %%
notebooks.run("data.py", "data", sets=("pairs",))
trained = {
    "train": "data/pairs.train.jsonl",
    "valid": "data/pairs.valid.jsonl",
    "test": "data/pairs.test.jsonl",
}
# Table 5 of the paper, on lenience, is left out.
trained |= {"lenience": (), "tables": (2,), "num_draft_tokens": (1,), "temperatures": (0.0,), "timed_drafts": ("base",)}
if not runtime.is_small:
    steps = runtime.pick(small=0, cpu=200, accelerator=2000)
    trained |= {f"models__{name}__num_steps": steps for name in ("target", "base", "small")}
    trained |= {"models__target__model__hidden_size": 96, "models__target__model__num_layers": 4}
    trained |= {
        "models__target__model__intermediate_size": 256,
        "training__eval_every": 100,
        "training__save_every": steps,
    }
    trained |= {"num_draft_tokens": (1, 2, 4), "num_prompts": 4, "alpha_tokens": 1000, "max_new_tokens": 32}
    trained |= runtime.pick(
        small={},
        cpu={"timed_drafts": ("base", "bigram")},
        accelerator={"timed_drafts": ("base", "small", "bigram"), "temperatures": (0.0, 1.0)},
    )
run = notebooks.run("leviathan/mini_synopsis.py:tiny", "runs/mini", **trained)

# %%
display(*notebook.results(run))

# %% [markdown]
# The points are measured, the lines are the theorem: the solid one as published, the dashed one with the measured cost
# of scoring K + 1 tokens, which the paper takes as that of one. On an accelerator that is nearly true. On a CPU, and
# with models as small as these, scoring and drafting are expensive, and a draft may lose however often it is accepted.
#
# ## The plan for T5 XXL
#
# What would the library do with the real models? Their shapes are known, and the time of a call is at least what it
# takes to read the weights. The prediction is made beside what the paper measured at its alpha and K. (From shapes, in
# seconds; without `compile=False` the real programs are compiled and read, which takes half an hour.)

# %%
plan = notebooks.run("leviathan/plan_xxl.py", "runs/plan_xxl", compile=False)

# %%
display(*notebook.results(plan))

# %% [markdown]
# ## The real pair, on a TPU
#
# With 32 GiB on a device, T5 XXL in bfloat16 (22 GB) and T5-small run as in the paper. The models on the hub are the
# pre-trained ones, which have not learnt to translate or to summarise: with them the speed of the calls is that of the
# paper, alpha is not. `configs/leviathan/t5_xxl_ende.py` is the whole experiment, with your fine-tuned models.

# %%
import jax
import specjax

memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0) * jax.device_count() / 2**30
if runtime.kind == "tpu" and memory > 28:
    mesh = specjax.sharding.make_mesh(model=jax.device_count())
    xxl = specjax.load("google/t5-v1_1-xxl", dtype="bfloat16", mesh=mesh)
    small = specjax.load("google/t5-v1_1-small", dtype="bfloat16", mesh=mesh, rules=specjax.sharding.REPLICATED)
    drafter = specjax.drafters.model(small, num_draft_tokens=7)
    source = "translate English to German: The house is wonderful."
    for name, chosen in (("plain", None), ("T5-small", drafter)):
        out = specjax.generate(xxl, [source], drafter=chosen, max_new_tokens=64, step_cost=0.0)
        print(f"{name}: {out.stats.block_efficiency:.2f} tokens per call, alpha {out.stats.acceptance_rate}")
else:
    print("This runtime is no TPU with 28 GiB or more, so the real pair is left out.")
