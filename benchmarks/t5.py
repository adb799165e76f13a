"""T5 against transformers, greedy, batch 1: whole calls, encoder included, with the same weights, measured in turn.

    python benchmarks/t5.py --target=runs/mini_ende/models/target/model \\
        --draft=runs/mini_ende/models/base/model --data=ende.test.jsonl.xz

The target is a T5 that `specjax.load` reads; transformers gets the same weights. It reports milliseconds per new token
of plain decoding, of drafting with `--draft` and with lookup in source and text, and of transformers' `generate`, as
medians of `--repeats` calls after one that compiles.
"""

import datetime
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags

import specjax
from specjax import decoding
from specjax.experiments import prompts
from specjax.models.config import T5Config
from specjax.models.weights import t5_mapping
from specjax.types import AnyDrafter

_TARGET = flags.DEFINE_string("target", None, "Source of a T5.", required=True)
_DRAFT = flags.DEFINE_string("draft", None, "Source of a smaller model.", required=True)
_DATA = flags.DEFINE_string("data", None, "JSONL file of inputs.", required=True)
_NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 12, "Inputs, evenly spread over the file.")
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "New tokens of each; no stop token ends a text.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Precision of both sides.")
_DRAFT_TOKENS = flags.DEFINE_list("num_draft_tokens", ["1", "2", "3", "5"], "Values of K to measure.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed calls of each prompt and mode.")

Run = Callable[[list[int]], list[int]]


def reference(model: specjax.Pretrained):
    """The same model in transformers."""
    import torch
    import transformers

    c = model.config
    if not isinstance(c, T5Config) or c.bias_per_layer:
        raise ValueError("This benchmark knows T5 v1.0 and v1.1 only.")
    activation = "gelu" if c.activation == "gelu_new" and c.gated else c.activation
    make: Any = transformers.T5Config
    config = make(
        vocab_size=c.vocab_size,
        d_model=c.hidden_size,
        d_kv=c.head_dim,
        d_ff=c.intermediate_size,
        num_layers=c.num_encoder_layers,
        num_decoder_layers=c.num_layers,
        num_heads=c.num_heads,
        relative_attention_num_buckets=c.num_buckets,
        relative_attention_max_distance=c.max_distance,
        layer_norm_epsilon=c.norm_eps,
        feed_forward_proj=f"gated-{activation}" if c.gated else activation,
        tie_word_embeddings=c.scale_outputs,
        decoder_start_token_id=c.start_token,
        eos_token_id=None,
    )
    torch_model = transformers.T5ForConditionalGeneration(config).to(getattr(torch, c.dtype)).eval()
    tensors = {k: torch.tensor(v) for k, v in t5_mapping.to_huggingface(c, model.params).items()}
    if not c.tie_embeddings:
        torch_model.lm_head.weight = torch.nn.Parameter(tensors["lm_head.weight"].to(getattr(torch, c.dtype)))
    missing, unexpected = torch_model.load_state_dict(tensors, strict=False)
    assert not unexpected, unexpected
    assert all("embed_tokens" in name or name == "lm_head.weight" for name in missing), missing
    return torch_model


def torch_run(model, new_tokens: int) -> Run:
    """A call of transformers with a growing cache, since its default has as many layers as the encoder (5.23)."""
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    def run(source: list[int]) -> list[int]:
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([source]),
                past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
            )
        return out[0, 1:].tolist()

    return run


def main(argv: list[str]) -> None:
    """Prints a Markdown table."""
    del argv
    target, draft = (specjax.load(source, dtype=_DTYPE.value) for source in (_TARGET.value, _DRAFT.value))
    if target.tokenizer is None:
        raise ValueError("The target has no tokenizer.")
    read = prompts.read(_DATA.value)
    chosen = [
        target.tokenizer.encode(read[i * len(read) // _NUM_PROMPTS.value].text)[:128] for i in range(_NUM_PROMPTS.value)
    ]
    ks = [int(k) for k in _DRAFT_TOKENS.value]
    options = {
        "max_new_tokens": _NEW_TOKENS.value,
        "stop_tokens": [],
        "max_len": decoding.buffer_length(1 + _NEW_TOKENS.value, max(8, *ks)),
        "prompt_width": max(map(len, chosen)),
    }

    def ours(drafter: AnyDrafter) -> Run:
        return lambda source: specjax.generate(target, [source], drafter=drafter, **options).tokens[0]

    modes: dict[str, Run] = {
        "transformers": torch_run(reference(target), _NEW_TOKENS.value),
        "specjax plain": ours(specjax.drafters.none()),
        "specjax lookup, K = 5": ours(specjax.drafters.ngram(num_draft_tokens=5)),
    }
    for k in ks:
        modes[f"specjax draft, K = {k}"] = ours(specjax.drafters.model(draft, num_draft_tokens=k))
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    texts: dict[str, list[list[int]]] = {name: [run(source) for source in chosen] for name, run in modes.items()}
    for source in chosen:
        runs: dict[str, list[float]] = {name: [] for name in modes}
        for _ in range(_REPEATS.value):
            for name, run in modes.items():
                begin = time.perf_counter()
                run(source)
                runs[name].append(time.perf_counter() - begin)
        for name, values in runs.items():
            seconds[name].append(float(np.median(values)))
    base = np.asarray(seconds["transformers"])
    plain = np.asarray(seconds["specjax plain"])
    place = f"{_DTYPE.value}, {jax.devices()[0].device_kind}, jax {jax.__version__}, {datetime.date.today()}"
    print(f"{len(chosen)} inputs, {_NEW_TOKENS.value} new tokens each, {place}\n")
    print("| mode | ms/token | over transformers | over specjax plain | text as specjax plain |\n|---|---|---|---|---|")
    for name, values in seconds.items():
        took = np.asarray(values)
        ratios = [float(np.exp(np.mean(np.log(other / took)))) for other in (base, plain)]
        same = sum(a == b for a, b in zip(texts[name], texts["specjax plain"], strict=True))
        per_token = 1e3 * float(np.exp(np.mean(np.log(took)))) / _NEW_TOKENS.value
        print(f"| {name} | {per_token:.2f} | {ratios[0]:.2f}x | {ratios[1]:.2f}x | {same} of {len(chosen)} |")


if __name__ == "__main__":
    app.run(main)
