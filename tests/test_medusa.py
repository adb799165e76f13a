"""Medusa's and blockwise heads: the papers' maps, published files, exact text, training that sees what is drafted."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular_heads
import torch
from helpers import (
    Group,
    Pair,
    assert_exact,
    compiled,
    random_prompts,
    right_pad,
    sample,
    texts,
    usual,
)
from tabular_heads import HEAD_TABLE, HEADS, TABLE, TAPPED
from test_distill import make_target
from test_training import copies, write_texts
from torch import nn

import specjax
from specjax import decoding, drafters, launch, sampling, testing, theory
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.drafters.parallel_heads import Heads
from specjax.models import families
from specjax.models import parallel_heads as models
from specjax.models.config import DecoderConfig, T5Config
from specjax.models.parallel_heads import ParallelHeadsConfig
from specjax.models.weights import medusa as published
from specjax.models.weights import torch_file
from specjax.training import data, fit
from specjax.training import parallel_heads as training
from specjax.training.config import TrainConfig
from specjax.training.data import Encoded, Example
from specjax.types import Batch, Context, Draft, Feedback, Inputs, ModelOutput, Params

D, V, K = 16, 13, 3
CONFIGS = {
    "decoder": DecoderConfig(V, D, 32, 2, 2, 1, 8, max_position=128, tie_embeddings=True, logit_softcap=20.0),
    "t5": T5Config(V, D, 8, 32, 1, 1, 2),
}
SHAPES = {
    "medusa": ParallelHeadsConfig("medusa", K, D, num_layers=2),
    "medusa, own output": ParallelHeadsConfig("medusa", K, D, output_size=V),
    "blockwise": ParallelHeadsConfig("blockwise", K, D, inner_size=24),
}


@functools.cache
def target(name: str = "decoder") -> Pretrained:
    """A random target in which attention matters."""
    config = CONFIGS[name]
    rng = np.random.default_rng(0)
    shapes = families.abstract_params(config)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes)
    return Pretrained(families.model(config), params, None, config)


@functools.cache
def heads(name: str = "medusa") -> Heads:
    """Random heads, whose states differ from what they read."""
    config, rng = SHAPES[name], np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), models.abstract(config))
    return Heads(config, params)


def draft(name: str = "medusa", of: str = "decoder", **shape: Any) -> Draft:
    make = drafters.blockwise if heads(name).config.kind == "blockwise" else drafters.medusa
    return make(heads(name), target(of), **shape)


# The maps.


class ResBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.silu(self.linear(x))


def reference(config: ParallelHeadsConfig) -> nn.ModuleList:
    """Medusa's heads as they are published, with random weights."""
    torch.manual_seed(0)
    made = []
    for _ in range(config.num_heads):
        blocks: list[nn.Module] = [ResBlock() for _ in range(config.num_layers)]
        made.append(nn.Sequential(*blocks, *([nn.Linear(D, V, bias=False)] if config.output_size else [])))
    return nn.ModuleList(made)


def head_logits(ours: Heads, hidden: np.ndarray) -> np.ndarray:
    run = jax.jit(lambda params, own, x: models.logits(ours.config, params, target().config, own, x))
    return np.asarray(run(ours.params, target().params, jnp.asarray(hidden)))


@pytest.mark.parametrize(
    ("own", "layers", "file"),
    usual(
        [(own, layers, file) for own in (True, False) for layers in (1, 2) for file in ("pt", "safetensors")],
        (True, 1, "pt"),
        (False, 2, "safetensors"),
    ),
)
def test_published_heads_give_the_logits_of_the_reference(own: bool, layers: int, file: str, tmp_path: Any):
    """As uploaded: `config.json` names two heads, but three are stored."""
    theirs = reference(ParallelHeadsConfig("medusa", K, D, num_layers=layers, output_size=V * own))
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    if file == "pt":
        torch.save(theirs.state_dict(), tmp_path / "medusa_lm_head.pt")
    else:
        from safetensors.torch import save_file

        save_file(theirs.state_dict(), tmp_path / "medusa_lm_head.safetensors")
    read = drafters.load_medusa(tmp_path)
    assert (read.config.num_heads, read.config.num_layers, read.config.output_size) == (K, layers, V * own)
    hidden = np.random.default_rng(2).normal(size=(2, 5, D)).astype(np.float32)
    with torch.no_grad():
        wanted = torch.stack([head(torch.tensor(hidden)) for head in theirs], dim=2).numpy()
    if not own:
        states = jnp.asarray(wanted.reshape(2, 5 * K, D))
        wanted = np.asarray(models.bind_target(target().config, target().params).logits(states)).reshape(2, 5, K, V)
    np.testing.assert_allclose(head_logits(read, hidden), wanted, atol=2e-4)
    stored = drafters.load_medusa(tmp_path, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(stored.params)} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(head_logits(stored, hidden), wanted, atol=0.3)


def test_blockwise_heads_are_one_feed_forward_layer():
    """Stern et al. 2018, section 6: hidden size k d_hidden, output size k d_model, a residual around each output."""
    ours, hidden = heads("blockwise"), np.random.default_rng(2).normal(size=(2, 5, D)).astype(np.float32)
    p = jax.tree.map(np.asarray, ours.params["states"])
    inner = np.maximum(hidden @ p["up"]["values"] + p["up_bias"], 0)
    added = inner @ p["down"]["values"] + p["down_bias"]
    states = hidden[:, :, None] + added.reshape(2, 5, K, D)
    own = models.bind_target(target().config, target().params).logits(jnp.asarray(states.reshape(2, -1, D)))
    np.testing.assert_allclose(head_logits(ours, hidden), np.asarray(own).reshape(2, 5, K, V), atol=2e-4)


@pytest.mark.parametrize("of", ["decoder", pytest.param("t5", marks=pytest.mark.slow)])
def test_every_head_begins_as_the_targets_own(of: str):
    config, hidden = target(of).config, jnp.asarray(np.random.default_rng(2).normal(size=(1, 4, D)), jnp.float32)
    shape = dataclasses.replace(SHAPES["medusa, own output"], num_heads=2)
    for found in (shape, dataclasses.replace(shape, output_size=0), SHAPES["blockwise"]):
        params = models.initial(found, jax.random.key(0), config, target(of).params)
        logits = models.logits(found, params, config, target(of).params, hidden)
        own = models.bind_target(config, target(of).params).logits(hidden)
        if found.output_size and isinstance(config, DecoderConfig):
            own = 20.0 * jnp.arctanh(own / 20.0)  # Their matrices have no cap.
        np.testing.assert_allclose(logits, jnp.repeat(own[:, :, None], found.num_heads, axis=2), atol=2e-4)


# Files.


@pytest.mark.parametrize("name", SHAPES)
def test_heads_that_are_saved_are_read_back(name: str, tmp_path: Any):
    ours = heads(name)._replace(vocabulary="abc")
    if ours.config.kind == "medusa":
        drafters.save_medusa(ours, tmp_path, base_model="some/model")
        read = drafters.load_medusa(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["medusa_num_heads"] == K
    else:
        drafters.save_blockwise(ours, tmp_path)
        read = drafters.load_blockwise(tmp_path)
    assert (read.config, read.vocabulary) == (ours.config, "abc")
    jax.tree.map(np.testing.assert_array_equal, read.params, ours.params)


def test_load_draft_knows_heads_of_medusa(tmp_path: Any):
    drafters.save_medusa(heads(), tmp_path)
    found = specjax.load_draft(tmp_path, target(), num_draft_tokens=2)
    assert found.drafter.topology.num_nodes == 2
    jax.tree.map(np.testing.assert_array_equal, found.params, draft(num_draft_tokens=2).params)


def test_files_that_are_broken_are_named(tmp_path: Any):
    path = tmp_path / "medusa_lm_head.pt"
    torch.save({"0.0.linear.weight": torch.arange(6.0).reshape(2, 3).T, "half": torch.ones(3).bfloat16()}, path)
    read = torch_file.read(path)
    assert read["0.0.linear.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert read["half"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="Tensor 'half' is not one of Medusa's heads"):
        drafters.load_medusa(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is no zip archive"):
        drafters.load_medusa(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither medusa_lm_head\.safetensors nor medusa_lm_head\.pt"):
        published.find(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="give the directory of Medusa heads, or a hub id"):
        drafters.load_medusa("./nowhere")


def test_tensors_that_do_not_fit_together_are_named():
    whole = {"0.0.linear.weight": np.ones((4, 4)), "0.0.linear.bias": np.ones(4), "0.1.weight": np.ones((9, 4))}
    assert published.shape(whole, "float32") == ParallelHeadsConfig("medusa", 1, 4, output_size=9)
    with pytest.raises(ValueError, match=r"Tensor 0\.0\.linear\.bias is missing"):
        published.shape({name: x for name, x in whole.items() if "bias" not in name}, "float32")
    with pytest.raises(ValueError, match=r"The output matrix of head 0 has shape \(9, 5\)"):
        published.shape(whole | {"0.1.weight": np.ones((9, 5))}, "float32")
    with pytest.raises(ValueError, match="1 of 2 heads have output matrices"):
        published.shape(whole | {"1.0.linear.weight": np.ones((4, 4)), "1.0.linear.bias": np.ones(4)}, "float32")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"give them to drafters\.blockwise"):
        drafters.medusa(heads("blockwise"), target())
    with pytest.raises(TypeError, match=r"give what drafters\.load_medusa"):
        drafters.medusa("runs/heads", target())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="these are 3 heads"):
        draft(num_draft_tokens=4)
    with pytest.raises(ValueError, match="4 deep, but there are 3 heads"):
        draft(topology="mc_sim_7b_63")
    with pytest.raises(ValueError, match="leave out num_draft_tokens"):
        draft(topology=(2, 2), num_draft_tokens=2)
    wide = DecoderConfig(V, 32, 32, 2, 2, 1, 8, max_position=128)
    with pytest.raises(ValueError, match="width 16, but the target's have 32"):
        drafters.medusa(heads(), target()._replace(config=wide))


# The text.

PROMPTS = [p if len(p) > 1 else [*p, 1] for p in random_prompts(5, V)]


def start(name: str, given: Draft | None, temperature: float, rows: int = 5) -> Any:
    """The request, and the functions that decode it."""
    given = given or Draft(drafters.none(), ())
    model = target(name).model
    if given.drafter.taps:
        assert model.with_taps is not None
        model = model.with_taps(given.drafter.taps)
    params, inputs = Params(target(name).params, given.params), right_pad(PROMPTS[:rows], 16)
    if model.start_token is not None:
        begun = right_pad([[model.start_token]] * rows, 1)
        inputs = begun._replace(source=inputs.tokens, source_length=inputs.length)
    state = decoding.prefill(
        model,
        given.drafter,
        params,
        inputs,
        max_new_tokens=[20, 20, 3, 20, 11][:rows],
        options=sampling.options(rows, temperature=temperature),
        seeds=list(range(rows)),
        step_cost=0.0,
        max_len=64,
    )
    return model, given.drafter, params, state


def decode(name: str, given: Draft | None, temperature: float) -> Any:
    model, drafter, params, state = start(name, given, temperature)
    return decoding.generate(model, drafter, verify.coupled, params, state)


@functools.cache
def plain(name: str, temperature: float) -> list[list[int]]:
    return texts(decode(name, None, temperature))


TREE: dict[str, Any] = {"topology": (2, 2, 1)}
CASES = [
    (kind, of, shape, temperature)
    for kind in SHAPES
    for of in CONFIGS
    for shape in ("chain", "tree")
    for temperature in (0.0, 1.0)
]


@pytest.mark.parametrize(
    ("kind", "of", "shape", "temperature"),
    usual(CASES, ("medusa", "decoder", "tree", 0.0)),
)
def test_the_text_is_plain_decodings(kind: str, of: str, shape: str, temperature: float):
    state = decode(of, draft(kind, of, **(TREE if shape == "tree" else {})), temperature)
    assert texts(state) == plain(of, temperature)
    accepted, proposed = (np.asarray(x).sum() for x in (state.rows.stats.accepted, state.rows.stats.proposed))
    assert 0 < accepted < proposed


# Which hidden state.


def hidden_states(name: str, tokens: Any, length: Any, inputs: Inputs) -> Any:
    """The target's last hidden states at all tokens of some texts."""
    model = target(name).model
    assert model.with_taps is not None
    model = compiled(model.with_taps((-1,)))
    read = inputs._replace(tokens=tokens, length=length)
    return model.prefill(target(name).params, read, model.init_cache(len(length), 64, 16))[0].features[:, :, 0]


def assert_follows(name: str, state: Any) -> None:
    """The heads read the hidden state of the token before the last one of every text."""
    rows, inputs = state.rows, right_pad(PROMPTS, 16)
    if target(name).model.start_token is not None:
        inputs = inputs._replace(source=inputs.tokens, source_length=inputs.length)
    found = hidden_states(name, rows.tokens[:, :48], rows.length, inputs)
    at = (rows.length - 2)[:, None, None]
    np.testing.assert_allclose(
        rows.drafter.feature, jnp.take_along_axis(found, at, axis=1)[:, 0], atol=2e-4, err_msg="another token's"
    )


@pytest.mark.parametrize(
    ("of", "shape"), usual([(of, shape) for of in CONFIGS for shape in ("chain", "tree")], ("decoder", "tree"))
)
def test_heads_read_the_hidden_state_of_the_token_before_the_last(of: str, shape: str):
    given = draft(of=of, **(TREE if shape == "tree" else {}))
    assert_follows(of, decode(of, given, 1.0))


def test_after_a_prompt_it_is_that_of_the_last_token_but_one_in_whatever_chunks_it_is_read():
    given = draft()
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, V, (2, 9)), jnp.int32)
    found = hidden_states("decoder", tokens, jnp.full(2, 9), Inputs(tokens, jnp.full(2, 9)))
    update, params = jax.jit(given.drafter.update), Params(target().params, given.params)

    def read(state: Any, begin: int, end: int) -> Any:
        chunk = Inputs(tokens[:, begin:end], jnp.full(2, end - begin))
        features = found[:, begin:end, None]
        output = ModelOutput(jnp.zeros((2, 1, V)), features)
        return update(params, state, Feedback(chunk.tokens, chunk.length, jnp.full(2, end), features, output, chunk))

    for ends in ((9,), (4, 9), (8, 9), (1, 2, 9)):
        state = given.drafter.init(2, 64)
        for begin, end in zip((0, *ends), ends, strict=False):
            state = read(state, begin, end)
        np.testing.assert_array_equal(state.feature, found[:, 7], err_msg=f"chunks that end at {ends}")


@pytest.mark.parametrize(
    "bug", ["the last token of the path but one", pytest.param("the first token of the path", marks=pytest.mark.slow)]
)
def test_a_hidden_state_of_another_token_is_found(bug: str):
    """Planted: off by one after a step, and the feature of the token that the step began with."""
    right = draft()

    def update(params: Params, state: Any, feedback: Feedback) -> Any:
        if feedback.context is not None:
            late = jnp.roll(feedback.features, 1, axis=1)
            moved = late if bug == "the last token of the path but one" else feedback.features[:, :1] + 0 * late
            feedback = feedback._replace(features=moved)
        return right.drafter.update(params, state, feedback)

    wrong = right._replace(drafter=right.drafter._replace(update=update))
    with pytest.raises(AssertionError, match="another token's"):
        assert_follows("decoder", decode("decoder", wrong, 1.0))


def test_training_sees_what_drafting_computes():
    """The logits that a head is trained with at a token are those from which it drafts behind the next one."""
    _, drafter, params, state = start("decoder", draft(num_draft_tokens=2), 1.0)
    rows, depth = state.rows, 2
    keys, _ = decoding.step_keys(rows.seed, rows.length, depth)

    def propose(params: Params, state: Any) -> Any:
        context = Context(decoding.history_of(state), keys, jnp.full(5, 2), state.rows.sampling, V)
        return drafter.propose(params, state.rows.drafter, state.rows.cache, context)[0]

    proposal = jax.jit(propose)(params, state)
    assert proposal.probs is not None
    length, width = np.asarray(rows.length), 16
    tokens = np.zeros((5, width + 1), np.int32)
    for i, n in enumerate(length):
        tokens[i, :n], tokens[i, n : n + 2] = np.asarray(rows.tokens)[i, :n], np.asarray(proposal.tokens)[i]
    place = np.arange(width)
    batch = batch_of(tokens, place < (length + 1)[:, None])
    loss = training.HeadLoss(heads().config, target().config, training.TEXT)
    for k in (1, 2):
        known = training.shifted(batch, k)
        # Head k learns at the token before the last one what it has drafted behind the text.
        np.testing.assert_array_equal(known.targets[np.arange(5), length - 2], proposal.tokens[:, k - 1])
        assert np.asarray(known.weight)[np.arange(5), length - 2].all()
    found = np.asarray(of_batch(loss, heads().params, batch))
    for k in (1, 2):
        log_q = jax.nn.log_softmax(found[np.arange(5), length - 2, k - 1])
        np.testing.assert_allclose(proposal.probs[:, k - 1], np.exp(log_q), atol=1e-4)


def batch_of(tokens: np.ndarray, known: np.ndarray) -> Batch:
    positions = np.broadcast_to(np.arange(known.shape[1], dtype=np.int32), known.shape)
    weights = known.astype(np.float32)
    arrays: Any = (tokens[:, :-1], tokens[:, 1:], known.astype(np.int32), positions, weights)
    return Batch(*map(jnp.asarray, arrays), None, None)  # pyright: ignore[reportCallIssue]


def of_batch(loss: training.HeadLoss, params: Any, batch: Batch) -> Any:
    """The logits of all heads at every token of a batch."""
    model = target().model
    assert model.with_taps is not None
    features = model.with_taps((-1,)).features
    assert features is not None

    def run(params: Any, own: Any) -> Any:
        return models.logits(loss.heads, params, loss.target, own, features(own, batch)[:, :, 0])

    return jax.jit(run)(params, target().params)


# Distributions.

GROUPS = [Group((0, 1, 2, 0), 12_000, budget=3), Group((2, 1), 8_000, budget=3, temperature=0.7, top_k=3)]
CHILDREN = {
    "without replacement": drafters.children.without_replacement,
    "with replacement": drafters.children.with_replacement,
    "most probable": drafters.children.most_probable,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHILDREN)
def test_trees_of_one_draw_a_depth_are_exact(kind: str):
    """Against an enumeration of all texts, where three nodes of a depth share one draw; the matrix has more options."""
    pair = Pair(TAPPED, TABLE, tabular_heads.tree(CHILDREN[kind], (3, 2)), HEAD_TABLE)
    result = sample(pair, GROUPS)
    assert_exact(result)
    assert np.asarray(result.state.rows.stats.accepted).sum(axis=0).min() > 100


def test_a_tree_of_shared_draws_is_not_judged_from_its_leaves():
    drawn = tabular_heads.tree(drafters.children.without_replacement)
    with pytest.raises(ValueError, match="would bias the text"):
        verify.check(verify.traversal, drawn.topology)
    verify.check(verify.traversal, tabular_heads.tree(drafters.children.most_probable).topology)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{}, {"topology": (2, 2)}])
def test_heads_keep_the_contract_of_a_drafter(shape: Any):
    testing.check_drafter(draft(**shape), target(), num_texts=2048)


def planted(bug: str) -> Pair:
    """Heads whose proposals are stated wrongly."""
    kind = drafters.children.most_probable if bug == "chosen, with soft q" else drafters.children.without_replacement
    right = tabular_heads.tree(kind, (3, 2))

    def propose(params: Params, state: Any, cache: Any, context: Context) -> Any:
        proposal, state, cache = right.propose(params, state, cache, context)
        soft = jax.nn.softmax(HEADS.read(params, state.feature), axis=-1)
        of_node = jnp.concatenate([jnp.repeat(soft[:, :1], 3, axis=1), jnp.repeat(soft[:, 1:2], 6, axis=1)], axis=1)
        return proposal._replace(probs=of_node), state, cache

    return Pair(TAPPED, TABLE, right._replace(propose=propose), HEAD_TABLE)


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["chosen, with soft q", "drawn without replacement, stated with"])
def test_children_that_are_stated_wrongly_are_found(bug: str):
    """Planted: Medusa's top-k judged by the heads' probabilities, and draws whose elder siblings stay in q."""
    with pytest.raises(AssertionError, match="not distributed as the target"):
        assert_exact(sample(planted(bug), [group._replace(rows=40_000) for group in GROUPS]))


# Training.


@functools.cache
def run_of(kind: str = "medusa", of: str = "decoder", steps: int = 40) -> training.Run:
    """Texts in which every token is the one before it plus one, so that the tokens that come are known."""
    rng, is_t5 = np.random.default_rng(5), of == "t5"
    examples = []
    for _ in range(24):
        text = (rng.integers(V) + np.arange(13)).astype(np.int32) % V
        text[0] = 0 if is_t5 else text[0]
        examples.append(Example(text, 0, text[1:4] if is_t5 else np.zeros(0, np.int32)))
    shape = {"target_length": 24, "source_length": 8}
    packed = functools.partial(data.dataset, start_token=0 if is_t5 else None, seed=0, **shape)
    config = TrainConfig(
        num_steps=steps, batch_size=4, num_microbatches=2, learning_rate=0.02, eval_every=20, save_every=10, log_every=5
    )
    loss = training.HeadLoss(SHAPES[kind], target(of).config, training.TEXT)
    save = drafters.save_blockwise if kind == "blockwise" else drafters.save_medusa
    whole, held_out = (packed(Encoded(part, 0, 0)) for part in (examples[4:], examples[:4]))
    return training.Run(SHAPES[kind], target(of), config, loss, whole, held_out, save)


@pytest.mark.parametrize(
    ("kind", "of"), usual([(kind, of) for kind in SHAPES for of in CONFIGS], ("medusa", "decoder"))
)
def test_heads_learn_and_are_saved_as_they_are_loaded(kind: str, of: str, tmp_path: Any):
    lines: list[Any] = []
    curve = training.fit_heads(run_of(kind, of), tmp_path, lines.extend)
    first, last = curve.valid[0], curve.valid[-1]
    assert [line["step"] for line in curve.valid] == [0, 20, 40]
    assert curve.steps[-1]["loss"] < 0.9 * curve.steps[0]["loss"]
    assert last["valid_loss"] < first["valid_loss"]
    assert len(last["greedy"]) == len(last["overlap"]) == K
    assert all(0 <= rate <= 1 for rate in (*last["greedy"], *last["overlap"]))
    load = drafters.load_blockwise if kind == "blockwise" else drafters.load_medusa
    read = load(tmp_path / fit.MODEL)
    assert all(len(ranks) == training.RANKS and sum(ranks) <= 1 + 1e-6 for ranks in last["ranks"])
    assert [ranks[0] for ranks in last["ranks"]] == pytest.approx(last["greedy"], abs=1e-6)
    grown = theory.best_tree(last["ranks"], draft_cost=0.01, max_nodes=12)
    if len(set(grown.paths)) > len({len(path) for path in grown.paths}):
        draft(kind, of, topology=grown.paths)
    best = training.evaluate(run_of(kind, of), read.params)
    assert best["valid_loss"] == pytest.approx(curve.best["valid_loss"], rel=1e-5)
    assert lines == curve.lines


def test_a_run_that_resumes_has_the_losses_of_one_that_does_not(tmp_path: Any):
    whole = training.fit_heads(run_of(steps=30), tmp_path / "whole")
    stop = 20

    def until(lines: Any) -> None:
        if any(line["step"] >= stop and "loss" in line for line in lines):
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        training.fit_heads(run_of(steps=30), tmp_path / "parts", until)
    rest = training.fit_heads(run_of(steps=30), tmp_path / "parts")
    assert [line["loss"] for line in rest.steps] == [line["loss"] for line in whole.steps]
    other = run_of(steps=30)
    other = other._replace(loss=dataclasses.replace(other.loss, divergence="forward_kl"))
    with pytest.raises(ValueError, match="divergence: 'text' before, 'forward_kl' now"):
        training.fit_heads(other, tmp_path / "parts")


def test_a_head_is_compared_within_its_own_text():
    """Two texts share a row; nothing is learnt across their border, nor beyond the end."""
    tokens = np.arange(1, 8)[None] % V
    batch = batch_of(tokens.astype(np.int32), np.ones((1, 6), bool))
    batch = batch._replace(segments=jnp.asarray([[1, 1, 1, 2, 2, 2]]))
    first, second = training.shifted(batch, 1), training.shifted(batch, 2)
    assert first.weight.tolist() == [[1, 1, 0, 1, 1, 0]]
    assert second.weight.tolist() == [[1, 0, 0, 1, 0, 0]]
    assert first.targets[0, :2].tolist() == [3, 4]
    assert second.targets[0, 0] == 4


def test_the_loss_is_the_weighted_sum_of_all_heads():
    """Against numpy, for cross-entropy and a divergence, with the measures of acceptance."""
    rng = np.random.default_rng(7)
    batch = batch_of(rng.integers(0, V, (2, 9)).astype(np.int32), np.ones((2, 8), bool))
    loss = training.HeadLoss(heads().config, target().config, training.TEXT, measures=True)
    logits = np.asarray(of_batch(loss, heads().params, batch), np.float64)
    log_q = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    score = target().model.score
    assert score is not None
    own = np.asarray(jax.jit(score)(target().params, batch), np.float64)
    p = np.exp(own) / np.exp(own).sum(axis=-1, keepdims=True)
    wanted, kl = 0.0, 0.0
    measures, by_rank = {}, {}
    for k in range(1, K + 1):
        n = 8 - k
        targets, of_head, of_target = np.asarray(batch.targets)[:, k:], log_q[:, :n, k - 1], p[:, k:]
        wanted += 0.8 ** (k - 1) * -np.take_along_axis(of_head, targets[..., None], axis=-1).sum()
        kl += 0.8 ** (k - 1) * (of_target * (np.log(of_target) - of_head)).sum()
        agrees = of_target.argmax(-1) == of_head.argmax(-1)
        measures |= {f"greedy_{k}": agrees.sum(), f"overlap_{k}": np.minimum(of_target, np.exp(of_head)).sum()}
        measures[f"weight_{k}"] = 2 * n
        ranks = (of_head > np.take_along_axis(of_head, of_target.argmax(-1)[..., None], axis=-1)).sum(axis=-1)
        by_rank[k] = [(ranks == r).sum() for r in range(training.RANKS)]
    found = jax.jit(lambda params, own: loss(params, batch, own, None))(heads().params, target().params)
    assert float(found.loss) == pytest.approx(wanted, rel=1e-5)
    ranks = {k: np.asarray(found.measures.pop(f"ranks_{k}")).tolist() for k in by_rank}
    assert ranks == by_rank
    assert {name: float(x) for name, x in found.measures.items()} == pytest.approx(measures, rel=1e-4)
    other = dataclasses.replace(loss, divergence="forward_kl", measures=False)
    found = jax.jit(lambda params, own: other(params, batch, own, None))(heads().params, target().params)
    assert float(found.loss) == pytest.approx(kl, rel=1e-4)
    assert not found.measures


# The command.


def command(*flags: str, **values: Any) -> list[str]:
    given = [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]
    return ["launch", "--config=configs/heads.py", *flags, *given, "--nocompilation_cache"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "hydra"}, "config.kind='hydra': choose one of medusa, blockwise, eagle, feature_head, pard"),
        ({"mix__draft": 0.5}, "config.mix.draft=0.5: heads write no text of their own"),
        ({"inner_size": 8}, "config.inner_size=8 is that of kind=blockwise"),
        ({"kind": "blockwise", "num_layers": 2}, "config.num_layers=2 is that of kind=medusa"),
        ({"divergence": "words"}, "config.divergence='words': choose one of"),
        ({"dropout": 0.1}, "config.dropout=0.1: heads are trained without"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_anything_is_loaded(values: Any, words: str, tmp_path: Any, capsys: Any):
    (tmp_path / "data.jsonl").write_text('{"prompt": "x"}\n')
    assert launch.main(command(f"--workdir={tmp_path / 'run'}", data=tmp_path / "data.jsonl", **values)) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "of"), [("medusa", "decoder"), ("blockwise", "t5")])
def test_heads_are_trained_by_one_command_and_compared_by_another(kind: str, of: str, tmp_path: Any, capfd: Any):
    target_path, run = tmp_path / "target", tmp_path / "run"
    specjax.save(make_target(of), target_path)
    texts_path = write_texts(tmp_path / "data.jsonl", copies(30))
    values: dict[str, Any] = {"target": target_path, "data": texts_path, "kind": kind, "num_prompts": 16}
    values |= {"num_valid": 6, "max_new_tokens": 8, "write_batch_size": 4, "target_length": 24, "source_length": 24}
    values |= {"batch_size": 4, "num_microbatches": 1, "num_steps": 20, "eval_every": 10, "learning_rate": 0.01}
    values |= {"tensorboard": True, "own_output": kind == "medusa"}
    assert launch.main(command(f"--workdir={run}", **values)) == 0, capfd.readouterr().err
    rows = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    valid = [row for row in rows if "valid_loss" in row]
    assert [row["step"] for row in valid] == [0, 10, 20]
    assert all(len(row["greedy"]) == len(row["overlap"]) == 3 for row in valid)
    assert "tokens per call" in (run / "summary.md").read_text()
    assert (run / "heads.png").stat().st_size > 10_000
    assert list((run / "tensorboard").iterdir())
    assert launch.main(command(f"--workdir={run}", **values)) == 0
    assert "Going on after step 20 of 20." in capfd.readouterr().out
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text.target}) + "\n" for text in copies(3)))
    flags = [f"--config.{key}={value}" for key, value in {"target": target_path, "drafter": kind}.items()]
    flags += [f"--config.draft={run / 'model'}", "--config.num_draft_tokens=3", "--config.max_new_tokens=12"]
    flags += [f"--config.data={prompts}", f"--workdir={tmp_path / 'compared'}", "--nocompilation_cache"]
    assert launch.main(["launch", "--config=configs/compare.py", *flags]) == 0, capfd.readouterr().err
    results = json.loads((tmp_path / "compared" / "results.json").read_text())
    assert results
    assert all(row["identical"] == 1.0 for row in results)
