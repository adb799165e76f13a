"""Run by test_sharding in a process with 8 virtual CPU devices: decodes on one device and on a mesh, prints JSON."""

import collections
import json
import sys

import jax
import jax.numpy as jnp

import specjax
from specjax import decode, drafters, hlo, sampling, sharding, verify
from specjax.api import on_mesh
from specjax.models import families
from specjax.models.config import DecoderConfig, ModelConfig, T5Config
from specjax.pretrained import Pretrained
from specjax.types import Params

CONFIG = DecoderConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    max_position=256,
)
T5 = T5Config(
    vocab_size=256,
    hidden_size=64,
    head_dim=16,
    intermediate_size=128,
    num_encoder_layers=2,
    num_layers=2,
    num_heads=4,
    gated=True,
    activation="gelu_new",
)
PROMPTS = [[1, 2, 3, 4, 1, 2], [9], [5, 6, 7, 8, 5, 6, 7], [11, 12, 13] * 4]


def params(seed: int, config: ModelConfig = CONFIG, scale: float = 6):
    """Random parameters; those of another seed are a little different."""
    scaled = jax.tree.map(lambda x: scale * x if x.ndim > 1 else x, families.init_params(config, jax.random.key(0)))
    noise = jax.random.key(seed)
    return jax.tree.map(lambda x: x + 0.02 * seed * jax.random.normal(noise, x.shape) if x.ndim > 1 else x, scaled)


def texts(target: Pretrained, drafter, temperature: float) -> list[list[int]]:
    out = specjax.generate(
        target, PROMPTS, drafter=drafter, max_new_tokens=[24, 20, 24, 17], temperature=temperature, step_cost=0.0
    )
    return out.tokens


def main() -> None:
    model, axes = families.model(CONFIG), families.param_axes(CONFIG)
    target, draft = params(0), params(1)
    mesh = sharding.make_mesh(data=2, model=4)
    placed, placed_draft = sharding.shard(target, axes, mesh), sharding.shard(draft, axes, mesh)
    report: dict = {"devices": jax.device_count(), "cases": {}}
    for name in ("none", "ngram", "model"):
        for temperature in (0.0, 1.0):
            both = []
            for t, d in ((target, draft), (placed, placed_draft)):
                drafter = {
                    "none": drafters.none(),
                    "ngram": drafters.ngram(num_draft_tokens=3),
                    "model": drafters.model(Pretrained(model, d, None, CONFIG), num_draft_tokens=3),
                }[name]
                both.append(texts(Pretrained(model, t, None, CONFIG), drafter, temperature))
            report["cases"][f"{name} {temperature}"] = both

    for temperature in (0.0, 1.0):
        both = []
        for place in (lambda x: x, lambda x: sharding.shard(x, families.param_axes(T5), mesh)):
            t, d = (Pretrained(families.model(T5), place(params(i, T5, 2)), None, T5) for i in (0, 1))
            both.append(texts(t, drafters.model(d, num_draft_tokens=3), temperature))
        report["cases"][f"t5 {temperature}"] = both

    drafter = drafters.model(model, num_draft_tokens=3)
    inputs = decode.pad_prompts(PROMPTS)
    put = lambda x, a: jax.device_put(x, sharding.named_sharding(mesh, x.shape, a))  # noqa: E731
    inputs = inputs._replace(tokens=put(inputs.tokens, ("batch", None)), length=put(inputs.length, ("batch",)))
    both_params = Params(placed, placed_draft)
    with on_mesh(mesh):
        state = decode.prefill(model, drafter, both_params, inputs, max_new_tokens=20, options=sampling.options(4))
        compiled = decode.advance.lower(model, drafter, verify.rejection, both_params, state, jnp.int32(9)).compile()
    text = compiled.as_text() or ""
    shard = state.cache.keys[0].addressable_shards[0].data.shape
    report["cache_shape"] = state.cache.keys[0].shape
    report["cache_shard"] = shard
    report["cache_copies"] = len(hlo.copies(text, [shard]))
    found = hlo.collectives(text)
    report["gathered_bytes"] = max((c.size_in_bytes for c in found if c.kind != "all-reduce"), default=0)
    report["cache_layer_bytes"] = state.cache.keys[0].nbytes
    report["collectives"] = dict(collections.Counter(c.kind for c in found))
    with on_mesh(mesh):
        state = decode.generate(model, drafter, verify.rejection, both_params, state)
    report["cache_shard_after"] = state.cache.keys[0].addressable_shards[0].data.shape
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
