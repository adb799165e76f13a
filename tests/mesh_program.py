"""Run by test_sharding in a process with 8 virtual CPU devices: compiles and decodes on a mesh, prints JSON."""

import collections
import json
import sys

import jax
import jax.numpy as jnp

from specjax import decoding, drafters, sampling
from specjax.decoding import verify
from specjax.models import families
from specjax.models.config import DecoderConfig
from specjax.parallel import sharding
from specjax.parallel.sharding import on_mesh
from specjax.planning import hlo
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
PROMPTS = [[1, 2, 3, 4, 1, 2], [9], [5, 6, 7, 8, 5, 6, 7], [11, 12, 13] * 4]


def main() -> None:
    model, axes = families.model(CONFIG), families.param_axes(CONFIG)
    mesh = sharding.make_mesh(data=2, model=4)
    placed, placed_draft = (
        sharding.shard(families.init_params(CONFIG, jax.random.key(seed)), axes, mesh) for seed in (0, 1)
    )
    report: dict = {}
    drafter = drafters.model(model, num_draft_tokens=3)
    inputs = decoding.pad_prompts(PROMPTS)
    put = lambda x, a: jax.device_put(x, sharding.named_sharding(mesh, x.shape, a))  # noqa: E731
    inputs = inputs._replace(tokens=put(inputs.tokens, ("batch", None)), length=put(inputs.length, ("batch",)))
    both_params = Params(placed, placed_draft)
    with on_mesh(mesh):
        state = decoding.prefill(model, drafter, both_params, inputs, max_new_tokens=20, options=sampling.options(4))
        compiled = decoding.advance.lower(model, drafter, verify.rejection, both_params, state, jnp.int32(9)).compile()
    text = compiled.as_text() or ""
    shard = state.rows.cache.keys[0].addressable_shards[0].data.shape
    report["cache_shape"] = state.rows.cache.keys[0].shape
    report["cache_shard"] = shard
    report["cache_copies"] = len(hlo.copies(text, [shard]))
    found = hlo.collectives(text)
    report["gathered_bytes"] = max((c.size_in_bytes for c in found if c.kind != "all-reduce"), default=0)
    report["cache_layer_bytes"] = state.rows.cache.keys[0].nbytes
    report["collectives"] = dict(collections.Counter(c.kind for c in found))
    with on_mesh(mesh):
        state = decoding.generate(model, drafter, verify.rejection, both_params, state)
    report["cache_shard_after"] = state.rows.cache.keys[0].addressable_shards[0].data.shape
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
