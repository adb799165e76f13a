"""The target drafts with part of itself: which sublayers are left out, and that nothing of the text changes."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    EMITTERS_OF_USERS,
    assert_always_accepted,
    compiled,
    random_prompts,
    right_pad,
    texts,
    usual,
)

from specjax import decoding, drafters, sampling, testing
from specjax.decoding import verify
from specjax.drafters.skip import Threshold, learn
from specjax.models import families
from specjax.models.config import DecoderConfig, T5Config
from specjax.planning import hlo
from specjax.types import Block, Inputs, Model, ModelOutput, Params, Skips

CONFIGS = {
    "decoder": DecoderConfig(61, 16, 32, 3, 2, 1, 8, max_position=128),
    "parallel": DecoderConfig(
        61, 16, 32, 3, 2, 1, 8, max_position=128, parallel=True, mlp_bias=True, norm="layer", gated=False
    ),
    "post_norms": DecoderConfig(61, 16, 32, 3, 2, 1, 8, max_position=128, post_norms=True, norm="rms_plus_one"),
    "t5": T5Config(61, 16, 8, 32, 1, 3, 2),
}


@functools.cache
def tiny(name: str) -> tuple[Model, Any]:
    """A random model in which every sublayer matters."""
    config = CONFIGS[name]
    params = families.init_params(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    return families.model(config), jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), params)


def without(name: str, params: Any, skips: Skips) -> Any:
    """The parameters with zeros wherever a skipped sublayer is added to the residual stream."""
    decoder = "decoder" if name == "t5" else "layers"
    outputs = {
        "attention": [("attention", "out"), ("attention", "out_bias"), ("cross", "out"), ("attention_post_norm",)],
        "mlp": [("mlp", "down"), ("mlp", "down_bias"), ("mlp_post_norm",)],
    }
    layers = dict(params[decoder])
    for kind, numbers in skips._asdict().items():
        for number in numbers:
            for path in outputs[kind]:
                layer = layers[number]
                if path[-1] == "attention_post_norm" or path[-1] == "mlp_post_norm":
                    if path[0] in layer:
                        layers[number] = layer | {path[0]: jnp.full_like(layer[path[0]], -1.0)}  # 1 + w is the factor.
                elif path[0] in layer and path[1] in layer[path[0]]:
                    zeros = jax.tree.map(jnp.zeros_like, layer[path[0]][path[1]])
                    layers[number] = layers[number] | {path[0]: layers[number][path[0]] | {path[1]: zeros}}
    return params | {decoder: layers}


SKIPS = Skips(attention=(1, 2), mlp=(0, 1))


def read(model: Model, params: Any, tokens: Any) -> tuple[ModelOutput, Any]:
    """What the model makes of a block after a prompt, and its cache."""
    source = (tokens, jnp.asarray([5, 3])) if model.start_token is not None else (None, None)
    cache = model.init_cache(2, 16, tokens.shape[1])
    _, cache = model.prefill(params, Inputs(tokens[:, :3], jnp.asarray([3, 2]), *source), cache)
    return model.apply(params, Block(tokens), cache)


@pytest.mark.parametrize("name", usual(CONFIGS, "parallel", "t5"))
def test_a_skipped_sublayer_adds_nothing_and_writes_nothing(name: str):
    model, params = tiny(name)
    assert model.with_skips is not None
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 61, (2, 5)), jnp.int32)
    skipped = compiled(model.with_skips(SKIPS))
    ours, cache = read(skipped, params, tokens)
    zeroed, _ = read(compiled(model), without(name, params, SKIPS), tokens)
    np.testing.assert_allclose(ours.logits, zeroed.logits, atol=2e-4, rtol=2e-4)
    whole, _ = read(compiled(model), params, tokens)
    assert np.abs(np.asarray(whole.logits - ours.logits)).max() > 0.1
    written = [bool(np.asarray(keys).any()) for keys in cache.keys]
    assert written == [True, False, False]
    assert model.with_skips(SKIPS) is model.with_skips(Skips((2, 1, 1), (1, 0)))


def decode(drafter: Any, model: Model, params: Any, temperature: float = 0.0, **options: Any) -> Any:
    """The state after a ragged batch; `step_cost` lets rows pause and return."""
    both = Params(params, options.pop("draft_params", ()))
    rule = options.pop("rule", verify.coupled)
    prompts = random_prompts(5, 61)
    state = decoding.prefill(
        model,
        drafter,
        both,
        right_pad(prompts, 16),
        max_new_tokens=[20, 20, 3, 20, 11],
        options=sampling.options(5, temperature=temperature),
        seeds=list(range(5)),
        step_cost=1.2,
        max_len=64,
        **options,
    )
    return decoding.generate(model, drafter, rule, both, state)


@functools.cache
def target() -> tuple[Model, Any]:
    return testing.tiny_decoder(0, num_layers=3)


@functools.cache
def plain(temperature: float) -> list[list[int]]:
    return texts(decode(drafters.none(), *target(), temperature))


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("adaptive", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_text_is_plain_decodings(temperature: float, adaptive: bool):
    model, params = target()
    drafter = drafters.skip(model, attention=(1,), mlp=(2,), num_draft_tokens=3, adaptive=adaptive)
    state = decode(drafter, model, params, temperature)
    assert texts(state) == plain(temperature)
    accepted, proposed = (np.asarray(x).sum() for x in (state.rows.stats.accepted, state.rows.stats.proposed))
    assert 0 < accepted < proposed


@pytest.mark.slow
def test_a_draft_without_sublayers_that_add_nothing_is_the_target():
    """Every draft token is accepted, also after rejections of other rows, pauses and unequal budgets."""
    model, params = target()
    skips = Skips(attention=(1,), mlp=(1, 2))
    params = without("decoder", params, skips)
    drafter = drafters.skip(model, attention=skips.attention, mlp=skips.mlp, num_draft_tokens=3)
    assert_always_accepted(decode(drafter, model, params, 1.0, rule=verify.rejection))


@pytest.mark.slow
def test_an_early_exit_may_have_a_norm_of_its_own():
    model, params = target()
    drafter = drafters.early_exit(model, 2, num_draft_tokens=3)
    assert texts(decode(drafter, model, params)) == plain(0.0)
    other = drafters.early_exit(model, 2, num_draft_tokens=3, norm=np.asarray(params["norm"]) * -1)
    one, two = decode(drafter, model, params), decode(other.drafter, model, params, draft_params=other.params)
    assert texts(one) == texts(two)
    assert np.asarray(one.rows.stats.accepted).sum() > np.asarray(two.rows.stats.accepted).sum()


def test_the_threshold_follows_the_acceptance_rate():
    """Against Draft & Verify's update, in plain Python."""
    rng = np.random.default_rng(0)
    drafted = rng.integers(0, 5, 200)
    accepted = np.minimum(rng.integers(0, 5, 200), drafted)
    threshold, rate = 0.6, 0.9
    state = Threshold(jnp.full(1, 0.6), jnp.full(1, 0.9), jnp.zeros(1, jnp.int32))
    follow = jax.jit(lambda state, n: learn(state, n, 4))
    for d, n in zip(drafted, accepted, strict=True):
        state = follow(state._replace(drafted=jnp.asarray([d], jnp.int32)), jnp.asarray([n], jnp.int32))
        if d:
            rate = 0.5 * rate + 0.5 * n / d
            step = 0.01 if rate < 0.9 else (0 if d == 4 else -0.01)
            threshold = 0.9 * threshold + 0.1 * (threshold + step)
        np.testing.assert_allclose([state.threshold[0], state.rate[0]], [threshold, rate], rtol=1e-4)
    assert threshold > 0.7  # The rate was mostly below .9.


@pytest.mark.slow
def test_the_compiled_loop_copies_no_cache():
    model, params = target()
    drafter = drafters.skip(model, attention=(1,), mlp=(2,), num_draft_tokens=3)
    both = Params(params, ())
    state = decoding.prefill(model, drafter, both, right_pad(random_prompts(2, 61), 16), max_new_tokens=20, max_len=64)
    lowered = decoding.advance.lower(model, drafter, verify.rejection, both, state, np.int32(4))
    program: Any = lowered.compile(EMITTERS_OF_USERS)
    copies = hlo.copies(program.as_text(), [state.rows.cache.keys[0].shape])
    assert not copies, f"{len(copies)} copies of a cache, such as {copies[0][:200]}"
    cache = sum(x.nbytes for x in jax.tree.leaves(state.rows.cache))
    assert program.memory_analysis().alias_size_in_bytes >= cache


def test_mistakes_are_named():
    model, _ = target()
    wrong: dict[str, Any]
    for wrong, message in (
        ({}, "nothing is skipped"),
        ({"mlp": (3,)}, r"Skips(mlp=(3,)): a model of 3 layers has 0 to 2"),
        ({"attention": (-1,)}, r"attention=(-1,)"),
        ({"mlp": (1,), "min_confidence": 2.0}, "min_confidence=2.0: a probability"),
        ({"mlp": (1,), "num_draft_tokens": -1}, "num_draft_tokens=-1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            drafters.skip(model, **wrong)
    with pytest.raises(ValueError, match="layer=3: the target has 3 layers; run 1 to 2"):
        drafters.early_exit(model, 3)
    scanned, _ = families.stack_layers(CONFIGS["decoder"], tiny("decoder")[1])
    with pytest.raises(ValueError, match="Load it without scan_layers"):
        drafters.early_exit(families.model(scanned), 1)
    with pytest.raises(ValueError, match="cannot be skipped: it has none"):
        drafters.skip(testing.tabular(0)[0], mlp=(0,))
