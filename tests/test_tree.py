"""Trees of draft tokens: their shape, what each node sees, what is committed of them, and the text that they give."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EMITTERS_OF_USERS, Group, Pair, compiled, random_prompts, sample, texts, usual

import specjax
from specjax import decoding, drafters, sampling, testing
from specjax.decoding import verify
from specjax.drafters import model_tree
from specjax.models import cache as cache_lib
from specjax.models import families
from specjax.models.config import DecoderConfig, T5Config
from specjax.planning import hlo
from specjax.sampling import automaton, tree
from specjax.types import Block, Inputs, Params, Proposal, StepKeys, Topology

PARENTS = (-1, -1, 0, 0, 1, 2, 5)
"""Two nodes, two under the first and one under the second, one under the third, one under that."""
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "head_dim": 8}
DECODER: dict[str, Any] = {**SIZES, "max_position": 64}
CONFIGS = {
    "rotary": DecoderConfig(vocab_size=61, num_kv_heads=2, **DECODER),
    "window": DecoderConfig(vocab_size=61, num_kv_heads=1, sliding_window=5, global_layers=(1,), **DECODER),
    "narrow": DecoderConfig(
        vocab_size=61, num_kv_heads=2, sliding_window=3, global_layers=(1,), local_rope_theta=50.0, **DECODER
    ),
    "scanned": DecoderConfig(vocab_size=61, num_kv_heads=2, scan_layers=True, **DECODER),
    "learned": DecoderConfig(vocab_size=61, num_kv_heads=4, positions="learned", norm="layer", gated=False, **DECODER),
    "t5": T5Config(vocab_size=61, num_encoder_layers=1, num_buckets=8, max_distance=12, **SIZES),
}


def test_each_node_sees_its_ancestors_and_stands_at_its_depth():
    shape = tree.shape(jnp.asarray([PARENTS]), 4)
    assert shape.depth[0].tolist() == [0, 1, 1, 2, 2, 2, 3, 4]
    paths = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5], [0, 1, 3, 6], [0, 1, 3, 6, 7]]
    assert [np.flatnonzero(row).tolist() for row in np.asarray(shape.sees[0])] == paths


def test_the_text_and_the_state_before_each_node_are_those_of_its_path():
    shape = tree.shape(jnp.asarray([PARENTS, PARENTS]), 4)
    drafts = jnp.asarray([[1, 2, 3, 0, 1, 2, 3], [3, 0, 1, 1, 2, 0, 1]])
    committed = [[2, 1, 0], [1, 3]]
    tokens = jnp.asarray([[*text, *[9] * (9 - len(text))] for text in committed])
    length = jnp.asarray([3, 2])
    found = np.asarray(tree.texts(tokens, length, drafts, shape))
    table = automaton.from_table(np.array(((1, 0, 0, 1), (0, 1, 1, -1))))
    states = np.asarray(tree.trace(table, jnp.zeros(2, jnp.int32), drafts, shape, 4))
    for row, text in enumerate(committed):
        block = [None, *drafts[row].tolist()]
        for node, sees in enumerate(np.asarray(shape.sees[row])):
            path = [block[i] for i in np.flatnonzero(sees)[1:]]
            assert found[row, node, : len(text) + len(path)].tolist() == [*text, *path]
            wanted = automaton.trace(table, jnp.zeros(1, jnp.int32), jnp.asarray([path], jnp.int32))[0, -1]
            assert states[row, node] == wanted


@functools.cache
def _model(name: str) -> tuple[Any, Any]:
    config = CONFIGS[name]
    params = families.init_params(config, jax.random.key(0))
    # The default deviation of .02 would leave the logits almost constant; T5 has a larger one.
    scale = 1 if name == "t5" else 8
    return families.model(config), jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, params)


def _inputs(name: str, tokens: Any, length: Any) -> Inputs:
    if name != "t5":
        return Inputs(tokens, length)
    source = jax.random.randint(jax.random.key(7), (tokens.shape[0], 6), 0, 61)
    return Inputs(tokens, length, source, jnp.asarray([6, 4, 5])[: tokens.shape[0]])


@pytest.mark.parametrize(
    ("path", "count"),
    [([0, 1, 2], 3), ([0, 1, 3], 3), ([0, 2, 3], 3), ([0, 2, 2], 2), ([0, 1, 4], 2), ([0, 3, 4], 1), ([0, 3, 4], 0)],
)
def test_the_kept_entries_are_moved_where_one_is_out_of_place(path: list[int], count: int):
    # One row, since a row whose entries have to be moved has those of all rows moved.
    cache = cache_lib.init(2, 1, 2, 12, 3, "float32")
    rng = np.random.default_rng(0)
    keys, values = (
        tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in side) for side in (cache.keys, cache.values)
    )
    cache = cache_lib.Cache(keys, values, jnp.asarray([4]))
    kept = _commit(cache, jnp.asarray([path]), jnp.asarray([count]))
    assert kept.length.tolist() == [4 + count]
    entries = [*range(4), *(4 + node for node in path[:count])]
    for before, after in zip((*keys, *values), (*kept.keys, *kept.values), strict=True):
        np.testing.assert_array_equal(after[:, :, : 4 + count], before[:, :, np.asarray(entries)])


_commit = jax.jit(cache_lib.commit)


@pytest.mark.parametrize("name", usual(CONFIGS, "window"))
def test_a_tree_is_read_as_its_paths_would_be_and_commit_leaves_the_cache_of_a_prefill(name: str):
    model, params = _model(name)
    rng = np.random.default_rng(0)
    prompt = jnp.asarray(rng.integers(0, 61, (3, 8)), jnp.int32)
    length = jnp.asarray([8, 3, 6])
    nodes = jnp.asarray(rng.integers(0, 61, (3, len(PARENTS) + 1)), jnp.int32)
    shape = tree.shape(jnp.broadcast_to(jnp.asarray(PARENTS), (3, len(PARENTS))), 4)
    max_source = 6 if name == "t5" else 0

    @jax.jit
    def read(tokens: Any, count: Any) -> Any:
        return model.prefill(params, _inputs(name, tokens, count), model.init_cache(3, 24, max_source))[1]

    @jax.jit
    def score(cache: Any) -> Any:
        return model.apply(params, Block(nodes, shape.depth, shape.sees), cache)

    output, after = score(read(prompt, length))
    path = jnp.asarray([[0, 1, 3, 6, 7], [0, 2, 5, 5, 5], [0, 0, 0, 0, 0]])
    count = jnp.asarray([5, 3, 1])
    committed = jax.jit(model.commit)(after, path, count)
    # The same tokens as text, in a fresh cache.
    text = np.zeros((3, 16), np.int32)
    for row in range(3):
        kept = np.asarray(nodes)[row, np.asarray(path)[row, : count[row]]]
        text[row, : length[row] + count[row]] = [*np.asarray(prompt)[row, : length[row]], *kept]
    fresh = read(jnp.asarray(text), length + count)
    np.testing.assert_array_equal(committed.length, fresh.length)
    for got, wanted in zip((*committed.keys, *committed.values), (*fresh.keys, *fresh.values), strict=True):
        for row in range(3):
            end = int(fresh.length[row])
            np.testing.assert_allclose(
                np.moveaxis(got[row], -2, 0)[:end], np.moveaxis(wanted[row], -2, 0)[:end], atol=2e-5
            )
    # Each node's logits are those behind its path, read as a chain.
    for leaf in (4, 7):
        on_path = np.flatnonzero(np.asarray(shape.sees[0, leaf]))
        chain, _ = compiled(model).apply(params, Block(nodes[:, on_path]), read(prompt, length))
        np.testing.assert_allclose(output.logits[:, on_path], chain.logits, atol=1e-4)


@pytest.mark.parametrize("name", usual(["window", "narrow"], "narrow"))
def test_a_window_counts_the_positions_of_each_path(name: str):
    """Windows narrower than the text, and than the tree is deep: each path is what a fresh prefill makes of it."""
    model, params = _model(name)
    rng = np.random.default_rng(1)
    prompt, length = rng.integers(0, 61, (2, 9)), np.asarray([9, 2])
    nodes = rng.integers(0, 61, (2, len(PARENTS) + 1))
    shape = tree.shape(jnp.broadcast_to(jnp.asarray(PARENTS), (2, len(PARENTS))), 4)
    prefill = compiled(model).prefill
    _, cache = prefill(params, Inputs(jnp.asarray(prompt), jnp.asarray(length)), model.init_cache(2, 24))
    output, _ = compiled(model).apply(params, Block(jnp.asarray(nodes), shape.depth, shape.sees), cache)
    texts = np.zeros((2, 8, 16), np.int32)
    ends = np.zeros((2, 8), np.int32)
    for row in range(2):
        for node in range(8):
            path = nodes[row, np.flatnonzero(np.asarray(shape.sees[row, node]))]
            text = [*prompt[row, : length[row]], *path]
            texts[row, node, : len(text)], ends[row, node] = text, len(text)
    assert ends.max() > 3 + 9
    fresh, _ = prefill(params, Inputs(jnp.asarray(texts.reshape(16, 16)), jnp.asarray(ends.reshape(16))),
                       model.init_cache(16, 24))  # fmt: skip
    np.testing.assert_allclose(output.logits.reshape(16, -1), fresh.logits[:, 0], atol=1e-4)


def test_entries_that_earlier_blocks_wrote_are_seen_where_the_block_says():
    model, params = _model("window")
    model = compiled(model)
    prompt = jnp.asarray([[5, 9, 2, 7]])
    _, cache = model.prefill(params, Inputs(prompt, jnp.asarray([4])), model.init_cache(1, 24))
    shape = tree.shape(jnp.asarray([PARENTS]), 4)
    nodes = jnp.asarray([[3, 8, 1, 60, 4, 22, 9, 17]])
    whole, _ = model.apply(params, Block(nodes, shape.depth, shape.sees), cache)
    found = []
    for begin, end in ((0, 1), (1, 3), (3, 8)):
        block = Block(nodes[:, begin:end], shape.depth[:, begin:end], shape.sees[:, begin:end, :end])
        output, cache = model.apply(params, block, cache)
        found.append(output.logits)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole.logits, atol=1e-4)


@pytest.mark.parametrize("name", usual(["rotary", "scanned", "t5"], "scanned"))
def test_taps_are_the_hidden_states_that_they_are_called(name: str):
    model, params = _model(name)
    assert model.with_taps is not None
    tapped = compiled(model.with_taps((0, 1, -1)))
    inputs = _inputs(name, jnp.asarray([[1, 2, 3]]), jnp.asarray([3]))
    cache = model.init_cache(1, 16, 6 if name == "t5" else 0)
    output, cache = tapped.prefill(params, inputs, cache)
    assert output.features.shape == (1, 3, 3, 32)
    after, _ = tapped.apply(params, Block(jnp.asarray([[4, 5]])), cache)
    whole, _ = tapped.prefill(
        params,
        inputs._replace(tokens=jnp.asarray([[1, 2, 3, 4, 5]]), length=jnp.asarray([5])),
        model.init_cache(1, 16, 6 if name == "t5" else 0),
    )
    joined = jnp.concatenate([output.features, after.features], axis=1)
    np.testing.assert_allclose(joined, whole.features, atol=1e-4)
    assert not np.allclose(whole.features[:, :, 0], whole.features[:, :, 1])
    plain, _ = compiled(model).prefill(params, inputs, model.init_cache(1, 16, 6 if name == "t5" else 0))
    assert plain.features.shape == (1, 3, 0, 32)
    with pytest.raises(ValueError, match=r"taps=\(5,\).*hidden states 0 to 2"):
        model.with_taps((5,))


@pytest.mark.parametrize(
    ("topology", "parents"),
    [
        ((2, 1), (-1, -1, 0, 1)),
        ((3,), (-1, -1, -1)),
        ([(0,), (1,), (0, 0), (1, 0), (0, 1), (0, 0, 0)], (-1, -1, 0, 0, 1, 2)),
    ],
)
def test_topologies_are_children_by_depth_or_paths(topology: Any, parents: tuple[int, ...]):
    levels = model_tree.parse(topology)
    assert tuple(parent for level in levels for parent in level.parents) == parents


def test_published_trees_have_the_nodes_that_their_papers_say():
    nodes = {
        "mc_sim_7b_63": [10, 28, 23, 2],
        "vicuna_7b_stage2": [10, 23, 23, 7],
        "eagle_25": [4, 8, 8, 3, 2],
    }
    assert list(nodes) == list(drafters.topologies.TOPOLOGIES)
    for name, by_depth in nodes.items():
        assert [len(level.nodes) for level in model_tree.parse(name)] == by_depth
    with pytest.raises(ValueError, match="topology='mc_sim' is not known: give one of mc_sim_7b_63"):
        model_tree.parse("mc_sim")


@pytest.mark.parametrize("topology", [(), (0,), (2, -1), [(0, 0)], [(1,)], [(0,), (0, 1)]])
def test_what_is_no_tree_is_an_error(topology: Any):
    with pytest.raises(ValueError, match="topology="):
        model_tree.parse(topology)


def test_a_topology_goes_with_no_number_of_draft_tokens():
    draft, _ = testing.tabular(1)
    with pytest.raises(ValueError, match="leave out num_draft_tokens"):
        drafters.model(draft, topology=(2, 2), num_draft_tokens=3)
    with pytest.raises(ValueError, match="is a chain"):
        drafters.model(draft, topology=(1, 1))


def test_rules_that_judge_chains_alone_say_so():
    target, table = testing.tabular(0)
    draft, draft_table = testing.tabular(1)
    pair = Pair(target, table, drafters.model(draft, topology=(2, 1)), draft_table)
    with pytest.raises(ValueError, match=r"verify=block judges chains.*choose one of greedy, rejection, traversal"):
        sample(pair, [Group((0, 1), 4)], rule=verify.block)
    pretrained = specjax.Pretrained(*testing.tiny_decoder(0), None, None)  # pyright: ignore[reportArgumentType]
    own = specjax.drafters.model(pretrained, topology=(2, 1))
    with pytest.raises(ValueError, match=r"verify=block judges chains"):
        specjax.generate(pretrained, [[1, 2]], drafter=own, verify="block", temperature=1.0)


def test_a_rule_that_shared_draws_would_bias_is_refused():
    shared = Topology(3, 2, (-1, -1, 0), shares_draws=True)
    with pytest.raises(ValueError, match=r"verify=traversal would bias.*choose verify.rejection or verify.coupled"):
        verify.check(verify.traversal, shared)
    verify.check(verify.rejection, shared)
    verify.check(verify.traversal, shared._replace(shares_draws=False))
    verify.check(verify.traversal, Topology.chain(3))


def test_a_walk_ends_at_the_first_node_that_is_not_the_targets_own():
    proposal = Proposal(jnp.asarray([1, 2, 3, 0, 1, 2, -1]), jnp.int32(7), None, jnp.asarray(PARENTS))
    probs = jnp.eye(4)[jnp.asarray([1, 3, 0, 2, 0, 0, 1, 2])]
    keys = StepKeys(jax.random.key(0), jax.random.split(jax.random.key(1), 5))
    for rule in (verify.greedy, verify.coupled):
        verdict = rule(keys, probs, proposal)
        # 1 (node 0), 3 (node 2), then 2 (node 5), then 1, which node 6 is not.
        assert verdict.num_accepted == 3
        assert verdict.path is not None
        assert verdict.path.tolist()[:4] == [0, 1, 3, 6]
        assert verdict.tokens.tolist() == [1, 3, 2, 1, 0]
    cut = verify.greedy(keys, probs, proposal._replace(length=jnp.int32(2)))
    assert (int(cut.num_accepted), cut.tokens.tolist()) == (1, [1, 3, 0, 0, 0])
    broken = verify.greedy(keys, probs.at[1].set(jnp.nan), proposal)
    assert int(broken.num_accepted) == 1
    nothing = verify.observe(keys, probs, proposal)
    assert (int(nothing.num_accepted), int(nothing.tokens[0])) == (0, 1)


@pytest.mark.slow
def test_a_model_that_drafts_a_tree_for_itself_is_always_accepted():
    model, params = testing.tiny_decoder(0)
    drafter = drafters.model(model, topology=[(0,), (1,), (0, 0)])
    both = Params(params, params)
    prompts = random_prompts(4, 61)
    options = sampling.options(4, temperature=[0.0, 1.0, 0.7, 0.0], repetition_penalty=[1.0, 1.2, 1.0, 1.3])

    def run(chosen: Any) -> Any:
        inputs = decoding.pad_prompts(prompts)
        state = decoding.prefill(
            model, chosen, both, inputs, max_new_tokens=[13, 8, 20, 1], options=options, step_cost=0.0, max_len=64
        )
        return decoding.generate(model, chosen, verify.coupled, both, state)

    state = run(drafter)
    assert texts(state) == texts(run(drafters.none()))
    judged, accepted = (np.asarray(x).sum() for x in (state.rows.stats.proposed, state.rows.stats.accepted))
    assert judged == accepted > 0


@pytest.mark.parametrize(
    ("dtype", "rows"),
    usual([("bfloat16", 1), ("float32", 2), ("float32", 1), ("bfloat16", 2)], ("bfloat16", 1)),
)
def test_the_compiled_loop_moves_the_accepted_path_and_copies_no_cache(dtype: str, rows: int):
    model, params = testing.tiny_decoder(0, dtype=dtype)
    drafter = drafters.model(model, topology=(2, 2))
    both = Params(params, params)
    inputs = decoding.pad_prompts([[1, 2, 3]] * rows)
    state = decoding.prefill(model, drafter, both, inputs, max_new_tokens=8, max_len=64)
    compiled = decoding.advance.lower(model, drafter, verify.coupled, both, state, np.int32(4)).compile(
        EMITTERS_OF_USERS
    )
    copies = hlo.copies(compiled.as_text() or "", [state.rows.cache.keys[0].shape])
    assert not copies, f"{len(copies)} copies of a cache, such as {copies[0][:200]}"


def test_a_chain_is_the_topology_of_as_many_levels_as_nodes():
    assert Topology.chain(3).is_chain
    assert not Topology(3, 2).is_chain
    assert drafters.ngram(num_draft_tokens=5).topology == Topology(5, 5)
