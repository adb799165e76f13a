"""Mixtures of experts: what is computed, what is read, and that a token's neighbours change nothing."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import usual

from specjax.models import experts, families, modules
from specjax.models.config import DecoderConfig, Experts
from specjax.training import prune
from specjax.types import Block

TINY = DecoderConfig(
    vocab_size=61, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_position=64, experts=Experts(6, 2),
)  # fmt: skip


def choices(rows: int, number: int, chosen: int, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Matrices of experts, rows, and the weights and numbers of what each row chose."""
    rng = np.random.default_rng(seed)
    matrices = jnp.asarray(rng.normal(size=(number, 8, 8)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(rows, 8)), jnp.float32)
    # Popular experts, and some that nobody chooses.
    liked = rng.gumbel(size=(rows, number)) + np.linspace(-2, 2, number)
    numbers = jnp.asarray(np.argsort(-liked, axis=-1)[:, :chosen])
    return matrices, x, jnp.asarray(rng.uniform(0.1, 1, (rows, chosen)), jnp.float32), numbers


def of_all(matrices: Any, x: Any, weights: Any, numbers: Any) -> Any:
    """Every expert for every row."""
    outputs = jnp.einsum("rd,edf->ref", x, matrices)
    return jnp.einsum("rc,rcf->rf", weights, jnp.take_along_axis(outputs, numbers[..., None], axis=1))


FORMS = {"together": experts._together, "sorted": experts._sorted}


@functools.partial(jax.jit, static_argnames=("form", "skips"))
def mixed(form: str, skips: bool, matrices: Any, x: Any, weights: Any, numbers: Any) -> Any:
    def run(expert: Any, rows: Any) -> Any:
        return rows @ matrices[expert]

    return FORMS[form](run, len(matrices), skips, x, weights, numbers)


SHAPES = [(1, 8, 2, True), (5, 4, 4, False), (40, 3, 1, False), (33, 16, 3, True), (33, 16, 3, False)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "number", "chosen", "skips"), usual(SHAPES, *SHAPES[:4]))
def test_both_forms_are_the_sum_of_what_was_chosen(rows: int, number: int, chosen: int, form: str, skips: bool):
    given = choices(rows, number, chosen)
    np.testing.assert_allclose(mixed(form, skips, *given), of_all(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_experts_that_nobody_chose_are_not_computed(form: str):
    matrices, x, weights, numbers = choices(20, 8, 2)
    numbers = jnp.asarray([2, 5])[jnp.argsort(numbers, axis=-1)]
    broken = jnp.full_like(matrices, jnp.nan).at[jnp.asarray([2, 5])].set(matrices[jnp.asarray([2, 5])])
    np.testing.assert_allclose(
        mixed(form, True, broken, x, weights, numbers), of_all(matrices, x, weights, numbers), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_all_experts(form: str):
    matrices, x, weights, numbers = choices(18, 5, 2)

    def loss(how: Any, matrices: Any, x: Any, weights: Any) -> Any:
        return jnp.sum(jnp.sin(how(matrices, x, weights, numbers)))

    wanted = jax.jit(jax.grad(functools.partial(loss, of_all), argnums=(0, 1, 2)))(matrices, x, weights)
    got = jax.jit(jax.grad(functools.partial(loss, functools.partial(mixed, form, True)), argnums=(0, 1, 2)))(
        matrices, x, weights
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), got, wanted)


def test_a_row_of_few_does_not_depend_on_its_neighbours_to_the_last_bit():
    matrices, x, weights, numbers = choices(6, 8, 2)
    others = choices(6, 8, 2, seed=1)
    one = mixed("together", True, matrices, x, weights, numbers)
    # The first row among other neighbours, one of which overflows.
    x, weights, numbers = (a.at[1:].set(b[1:]) for a, b in zip((x, weights, numbers), others[1:], strict=True))
    x = x.at[1].set(jnp.inf)
    np.testing.assert_array_equal(mixed("together", True, matrices, x, weights, numbers)[0], one[0])


def test_the_router_takes_the_most_probable():
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3]]))
    weights, numbers = experts.route(logits, jnp.eye(4), 2, renormalise=True)
    assert numbers.tolist() == [[1, 3]]
    np.testing.assert_allclose(weights, [[4 / 7, 3 / 7]], rtol=1e-5)
    weights, _ = experts.route(logits, jnp.eye(4), 2, renormalise=False)
    np.testing.assert_allclose(weights, [[0.4, 0.3]], rtol=1e-5)


def test_every_expert_begins_with_weights_of_its_own():
    params = families.init_params(TINY, jax.random.key(0))["layers"][0]["mlp"]
    for matrix in params["experts"].values():
        assert len({float(x) for x in matrix["values"][:, 0].reshape(6, -1)[:, 0]}) == 6
    assert params["router"].shape == (32, 6)
    axes = families.param_axes(TINY)["layers"][0]["mlp"]
    assert axes["experts"]["gate_up"]["values"] == ("experts", "embed", "gate_up", "mlp")
    assert axes["experts"]["down"]["values"] == ("experts", "mlp", "embed")


@pytest.mark.parametrize("how", ["int8", "int4:32,head=int8"])
def test_quantised_experts_are_each_one_rounded(how: str):
    params = families.init_params(TINY, jax.random.key(0))
    config, small = families.quantise(TINY, params, how)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), small) == jax.tree.map(
        lambda x: (x.shape, x.dtype), families.abstract_params(config)
    )
    # The mixture of one expert is a feed-forward, rounded as that is.
    dense = dataclasses.replace(TINY, experts=None)
    third = jax.tree.map(lambda x: x[2], params["layers"][0]["mlp"]["experts"])
    alone = params | {"layers": {i: layer | {"mlp": third} for i, layer in params["layers"].items()}}
    _, wanted = families.quantise(dense, alone, how)
    got = jax.tree.map(lambda x: x[2], small["layers"][0]["mlp"]["experts"])
    jax.tree.map(np.testing.assert_array_equal, got, wanted["layers"][0]["mlp"])
    assert small["layers"][0]["mlp"]["router"].dtype == jnp.float32


def test_casting_there_and_back_keeps_every_matrix():
    params = families.init_params(TINY, jax.random.key(0))
    config, narrow = families.cast(TINY, params, "bfloat16")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), narrow) == jax.tree.map(
        lambda x: (x.shape, x.dtype), families.abstract_params(config)
    )
    back = families.cast(config, narrow, "float32")[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), params, back)
    assert modules.num_stacked(("layers", "experts", "embed", "experts")) == 2


def test_no_call_of_few_tokens_copies_the_stack():
    config = dataclasses.replace(TINY, num_layers=1, hidden_size=64, experts=Experts(32, 2))
    model, params = families.model(config), families.abstract_params(config)

    def read(params: Any, tokens: Any, cache: Any) -> Any:
        return model.apply(params, Block(tokens), cache)

    cache = jax.eval_shape(lambda: model.init_cache(1, 32))
    compiled = jax.jit(read).lower(params, jax.ShapeDtypeStruct((1, 4), jnp.int32), cache).compile()
    stack = params["layers"][0]["mlp"]["experts"]["gate_up"]["values"]
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < stack.size * 4 / 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": Experts(4, 2), "mlp_bias": True}, r"mlp_bias=True.*no biases"),
        ({"qk_norm_whole": True}, r"set qk_norm=True too"),
        ({"pre_norms": False}, r"pre_norms=False with post_norms=False"),
    ],
)
def test_shapes_that_make_no_model_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match=r"experts.chosen=3: a layer has 2 experts"):
        Experts(2, 3)
    with pytest.raises(ValueError, match=r"without '\+int8'"):
        families.with_quantisation(TINY, "int8+int8")


def test_a_mixture_is_not_pruned():
    with pytest.raises(ValueError, match=r"experts.*not pruned"):
        prune.check(TINY)
