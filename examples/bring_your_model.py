"""A transformer of your own, written in Flax NNX, as a target (or a draft): `as_model` is all that specjax needs.

    python examples/bring_your_model.py

Your module computes logits from tokens and their positions, and calls `attend` in the place of its attention.
`as_model` passes an `attend` that keeps the keys and values in a cache. Here the model is small and random; with real
weights nothing else changes.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import specjax
from specjax.models import cache as caches
from specjax.models.layers import visible
from specjax.types import Block, Inputs, Model, ModelOutput

VOCAB, WIDTH, HEADS, LAYERS, MAX_LEN = 64, 32, 4, 2, 256


class Layer(nnx.Module):
    """Attention and a feed-forward."""

    def __init__(self, rngs: nnx.Rngs):
        """Declares the parameters."""
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.qkv = nnx.LinearGeneral(WIDTH, (3, HEADS, WIDTH // HEADS), rngs=rngs)
        self.out = nnx.LinearGeneral((HEADS, WIDTH // HEADS), WIDTH, axis=(-2, -1), rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, number, attend):
        """`[B, T, WIDTH]` in and out."""
        q, k, v = jnp.moveaxis(self.qkv(self.norms[0](x)), 2, 0)
        x = x + self.out(attend(number, q, k, v))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    """A decoder with learned positions."""

    def __init__(self, rngs: nnx.Rngs):
        """Declares the parameters."""
        self.tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(MAX_LEN, WIDTH, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens, positions, attend):
        """`[B, T]` token ids and positions in, `[B, T, VOCAB]` logits out."""
        x = self.tokens(tokens) + self.positions(positions)
        for number, layer in enumerate(self.layers):
            x = layer(x, number, attend)
        return self.head(x)


def as_model(module: Transformer) -> tuple[Model, nnx.State]:
    """The module as pure functions, and its parameters."""
    definition, params = nnx.split(module)

    def read(params, tokens, depth, sees, cache):
        earlier = 0 if sees is None else sees.shape[-1] - tokens.shape[1]
        positions, start = cache.length[:, None] + depth, cache.length + earlier
        mask, _ = visible(cache.keys[0].shape[-2], positions, cache.length, sees)
        keys, values = list(cache.keys), list(cache.values)

        def attend(number, q, k, v):
            keys[number] = caches.write(keys[number], k, start)
            values[number] = caches.write(values[number], v, start)
            scores = jnp.einsum("bthd,bhsd->bhts", q, keys[number]) / q.shape[-1] ** 0.5
            weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
            return jnp.einsum("bhts,bhsd->bthd", weights, values[number])

        logits = nnx.merge(definition, params)(tokens, positions, attend)
        no_features = jnp.zeros((*tokens.shape, 0, WIDTH))
        return ModelOutput(logits, no_features), cache._replace(keys=tuple(keys), values=tuple(values))

    def init_cache(batch_size, max_len, max_source=0):
        return caches.init(LAYERS, batch_size, HEADS, max_len, WIDTH // HEADS, "float32")

    def prefill(params, inputs: Inputs, cache):
        output, cache = read(params, inputs.tokens, jnp.arange(inputs.tokens.shape[1]), None, cache)
        last = jnp.maximum(inputs.length - 1, 0)[:, None, None]
        output = output._replace(logits=jnp.take_along_axis(output.logits, last, axis=1))
        return output, caches.commit(cache, None, inputs.length)

    def apply(params, block: Block, cache):
        depth = jnp.arange(block.tokens.shape[1]) if block.depth is None else block.depth
        return read(params, block.tokens, depth, block.sees, cache)

    return Model(init_cache, prefill, apply, caches.commit, VOCAB, MAX_LEN), params


def main() -> None:
    """Decodes with and without speculation, and compares."""
    model, params = as_model(Transformer(nnx.Rngs(0)))
    # Nothing but saving, training and planning needs a configuration.
    target = specjax.Pretrained(model, params, None, None)  # pyright: ignore[reportArgumentType]
    prompts = [[1, 2, 3, 1, 2, 3, 1], [5, 6, 7, 8]]
    plain = specjax.generate(target, prompts, max_new_tokens=24)
    drafts = {
        "lookup": specjax.drafters.ngram(num_draft_tokens=4),
        "a chain of its own": specjax.drafters.model(target, num_draft_tokens=3),
        "a tree of its own": specjax.drafters.model(target, topology=(2, 1)),
    }
    for name, drafter in drafts.items():
        out = specjax.generate(target, prompts, drafter=drafter, max_new_tokens=24, step_cost=0.0)
        print(f"{name}: {out.stats.block_efficiency:.2f} tokens per call, same text: {out.tokens == plain.tokens}")


if __name__ == "__main__":
    main()
