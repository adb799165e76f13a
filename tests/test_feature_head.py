"""A head over the target's hidden states: it changes no text, its cache follows the text, and it is trained as used."""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compiled, random_prompts, right_pad, texts

from specjax import decoding, drafters, launch, sampling, testing
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.decoding.verify import Rule
from specjax.drafters.feature_head import TRAINED, Head
from specjax.experiments import head as experiment
from specjax.experiments.settings import parse
from specjax.models import families, feature_head
from specjax.models.config import DecoderConfig, Experts
from specjax.models.feature_head import FeatureHeadConfig
from specjax.training import heads
from specjax.training.harvest import Texts
from specjax.types import Block, Context, Draft, Feedback, Inputs, Params

TAPS = (1, 2, 3)


@functools.cache
def target(vocab_size: int = 13) -> Pretrained:
    """A random target in which attention matters."""
    config = DecoderConfig(vocab_size, 16, 32, 3, 2, 1, 8, max_position=128, tie_embeddings=True)
    rng = np.random.default_rng(0)
    shapes = families.abstract_params(config)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes)
    return Pretrained(families.model(config), params, None, config)


@functools.cache
def head(vocab_size: int = 13, known: int = 9) -> Head:
    """A head whose random layer matters; it knows the tokens from 2 on."""
    layer = DecoderConfig(known, 16, 32, 1, 2, 1, 8, max_position=128)
    config = FeatureHeadConfig(layer, TAPS)
    params = feature_head.initial(config, jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), params)
    return Head(config, params, np.arange(2, 2 + known, dtype=np.int32))


@functools.cache
def chain() -> Draft:
    return drafters.feature_head(head(), target(), num_draft_tokens=2)


@functools.cache
def tree() -> Draft:
    return drafters.feature_head(head(), target(), topology=(3, 2, 1))


def start(draft: Draft | None, temperature: float, max_new_tokens: Any = (20, 20, 3, 20, 11)) -> Any:
    """The request, and the functions that decode it."""
    model = target().model
    if draft is None:
        draft = Draft(drafters.none(), ())
    if draft.drafter.taps:
        assert model.with_taps is not None
        model = model.with_taps(draft.drafter.taps)
    params = Params(target().params, draft.params)
    state = decoding.prefill(
        model,
        draft.drafter,
        params,
        right_pad(random_prompts(5, 13), 16),
        max_new_tokens=list(max_new_tokens),
        options=sampling.options(5, temperature=temperature),
        seeds=list(range(5)),
        step_cost=1.2,
        max_len=64,
    )
    return model, draft.drafter, params, state


def decode(draft: Draft | None, rule: Rule = verify.coupled, temperature: float = 0.0) -> Any:
    model, drafter, params, state = start(draft, temperature)
    return decoding.generate(model, drafter, rule, params, state)


@functools.cache
def plain(temperature: float) -> list[list[int]]:
    return texts(decode(None, temperature=temperature))


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("draft", [chain, pytest.param(tree, marks=pytest.mark.slow)])
def test_the_text_is_plain_decodings(draft: Any, temperature: float):
    state = decode(draft(), temperature=temperature)
    assert texts(state) == plain(temperature)
    accepted, proposed = (np.asarray(x).sum() for x in (state.rows.stats.accepted, state.rows.stats.proposed))
    assert 0 < accepted < proposed


def fresh(draft: Draft, state: Any) -> Any:
    """The drafter's state after reading the whole texts as prompts."""
    model = target().model
    assert model.with_taps is not None
    model = compiled(model.with_taps(TAPS))
    inputs = Inputs(state.rows.tokens[:, :48], state.rows.length)
    output, _ = model.prefill(target().params, inputs, model.init_cache(5, 64))
    feedback = Feedback(inputs.tokens, inputs.length, inputs.length, output.features, output, inputs)
    return jax.jit(draft.drafter.update)(Params(target().params, draft.params), draft.drafter.init(5, 64), feedback)


def assert_follows(draft: Draft, state: Any) -> None:
    """The cache invariant: the entries of the text are those that a prompt of the same tokens has."""
    ours, theirs = state.rows.drafter, fresh(draft, state)
    np.testing.assert_array_equal(ours.length, theirs.length)
    within = np.arange(64) < np.asarray(state.rows.length)[:, None]
    for a, b in ((ours.keys[0], theirs.keys[0]), (ours.values[0], theirs.values[0])):
        a, b = (np.where(within[:, None, :, None], x, 0) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=2e-4)
    np.testing.assert_allclose(ours.states[:, 0], theirs.states[:, 0], atol=2e-4)


@pytest.mark.parametrize("draft", [chain, pytest.param(tree, marks=pytest.mark.slow)])
def test_the_cache_follows_the_text(draft: Any):
    assert_follows(draft(), decode(draft(), temperature=1.0))


def test_features_of_the_wrong_token_are_found():
    """The planted bug: a step pairs each token with the hidden states at the token itself, not at the one before."""
    right = chain()

    def update(params: Params, state: Any, feedback: Feedback) -> Any:
        if feedback.context is not None:
            moved = jnp.concatenate([feedback.features[:, 1:], feedback.features[:, -1:]], axis=1)
            feedback = feedback._replace(features=moved)
        return right.drafter.update(params, state, feedback)

    wrong = right._replace(drafter=right.drafter._replace(update=update))
    with pytest.raises(AssertionError):
        assert_follows(right, decode(wrong, temperature=1.0))


def test_a_prompt_in_chunks_is_read_as_a_whole():
    model, drafter, params, _ = start(chain(), 0.0)
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 13, (2, 9)), jnp.int32)
    output, _ = compiled(model).prefill(params.target, Inputs(tokens, jnp.full(2, 9)), model.init_cache(2, 64))
    update = jax.jit(drafter.update)

    def read(state: Any, begin: int, end: int) -> Any:
        chunk = Inputs(tokens[:, begin:end], jnp.full(2, end - begin))
        features = output.features[:, begin:end]
        return update(params, state, Feedback(chunk.tokens, chunk.length, jnp.full(2, end), features, output, chunk))

    whole = read(drafter.init(2, 64), 0, 9)
    parts = read(read(drafter.init(2, 64), 0, 4), 4, 9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)


def joint(vocab_size: int, prompt: list[int], num_tokens: int) -> np.ndarray:
    """The distribution of the next tokens under the target, by scoring all texts."""
    every = np.asarray(list(itertools.product(range(vocab_size), repeat=num_tokens)))
    rows = np.concatenate([np.tile(prompt, (len(every), 1)), every], axis=1)
    model = target(vocab_size).model
    output, _ = compiled(model).apply(
        target(vocab_size).params, Block(jnp.asarray(rows[:, :-1], jnp.int32)), model.init_cache(len(rows), 16)
    )
    log_probs = np.asarray(jax.nn.log_softmax(output.logits[:, len(prompt) - 1 :], axis=-1), np.float64)
    chosen = np.take_along_axis(log_probs, every[..., None], axis=-1)[..., 0].sum(axis=1)
    return np.exp(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("topology", [None, pytest.param((2, 2), marks=pytest.mark.slow)])
def test_the_text_is_distributed_as_the_targets(topology: Any):
    """Rejection with the stated distributions, against all texts of three tokens; one of five is never drafted."""
    known = head(5, 3)._replace(tokens=np.arange(1, 4, dtype=np.int32))
    shape: dict[str, Any] = {"num_draft_tokens": 2} if topology is None else {"topology": topology}
    draft = drafters.feature_head(known, target(5), **shape)
    with_taps = target(5).model.with_taps
    assert with_taps is not None
    model = with_taps(TAPS)
    params, rows, prompt = Params(target(5).params, draft.params), 6000, [1, 3, 2, 0]
    state = decoding.prefill(
        model,
        draft.drafter,
        params,
        right_pad([prompt] * rows, 8),
        max_new_tokens=3,
        options=sampling.options(rows, temperature=1.0),
        seeds=list(range(rows)),
        step_cost=0.0,
        max_len=24,
    )
    state = decoding.generate(model, draft.drafter, verify.rejection, params, state)
    new = np.asarray(state.rows.tokens)[:, 4:7]
    counts = np.bincount(new @ [25, 5, 1], minlength=125)
    assert testing.g_test(counts, joint(5, prompt, 3)) > 1e-5
    assert 0 < np.asarray(state.rows.stats.accepted).sum() < np.asarray(state.rows.stats.proposed).sum()


def test_training_sees_what_drafting_computes():
    """The training-time test: the distributions of both draft tokens behind a text are those that are drafted."""
    model, drafter, params, state = start(chain(), 1.0)
    rows, depth = state.rows, 2
    keys, _ = decoding.step_keys(rows.seed, rows.length, depth)

    def propose(params: Params, state: Any) -> Any:
        context = Context(decoding.history_of(state), keys, jnp.full(5, 2), state.rows.sampling, 13)
        return drafter.propose(params, state.rows.drafter, state.rows.cache, context)[0]

    proposal = jax.jit(propose)(params, state)
    assert proposal.probs is not None
    tokens = np.zeros((5, 16), np.int32)
    for i, n in enumerate(np.asarray(rows.length)):
        tokens[i, :n] = np.asarray(rows.tokens)[i, :n]
        tokens[i, n : n + 2] = np.asarray(proposal.tokens)[i]
    length = np.asarray(rows.length)
    output, _ = compiled(model).prefill(
        params.target, Inputs(jnp.asarray(tokens), jnp.asarray(length)), model.init_cache(5, 64)
    )
    known = head()
    config = target().config
    assert isinstance(config, DecoderConfig)
    table = feature_head.output_rows(config, target().params, np.arange(13))
    frozen = heads.Frozen(table, table, table[known.tokens])
    read = jax.jit(lambda texts: tuple(x for _, x in heads.drafted(known.config, known.params, frozen, texts, 2)))
    for k, logits in enumerate(read(Texts(tokens, length, length, output.features))):
        theirs = np.zeros((5, 13))
        theirs[:, known.tokens] = jax.nn.softmax(logits, axis=-1)[np.arange(5), length - 1]
        np.testing.assert_allclose(proposal.probs[:, k], theirs, atol=1e-4)


def test_the_conditions_that_a_head_makes():
    with pytest.raises(ValueError, match="target that the head was trained for"):
        drafters.feature_head(head(), target()._replace(config=DecoderConfig(13, 32, 32, 3, 2, 1, 8, 128)))
    with pytest.raises(ValueError, match="the target has 5 tokens"):
        drafters.feature_head(head(), target(5))
    with pytest.raises(ValueError, match="leave out num_draft_tokens"):
        drafters.feature_head(head(), target(), num_draft_tokens=2, topology=(2, 1))


def test_a_head_that_is_saved_is_read_back(tmp_path):
    ours = head()
    drafters.save_feature_head(ours, tmp_path)
    read = drafters.load_feature_head(tmp_path)
    stored, params = feature_head.cast(ours.config, ours.params, "bfloat16")
    assert (read.config, read.vocabulary) == (stored, None)
    np.testing.assert_array_equal(read.tokens, ours.tokens)
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    with pytest.raises(FileNotFoundError, match="or the name of a trained head: 'smollm2-135m-instruct'"):
        drafters.load_feature_head("no-such-head")


def test_the_head_in_the_package_is_whole():
    shipped = drafters.load_feature_head("smollm2-135m-instruct")
    assert shipped.config.taps == (20, 27, 30)
    assert shipped.vocabulary
    assert len(shipped.tokens) == shipped.config.layer.vocab_size == 6144
    assert (np.diff(shipped.tokens) > 0).all()
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(shipped.params))
    sizes = [path.stat().st_size for path in (TRAINED / "smollm2-135m-instruct").iterdir()]
    assert sum(sizes) < 12 * 2**20


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rows": 64}, "config.rows=64: at most config.batch_size=48"),
        ({"own_prompts": 1.5}, "config.own_prompts=1.5: from 0 to 1"),
        ({"texts": "/no/such.jsonl"}, "/no/such.jsonl does not exist"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_anything_is_loaded(values, words, tmp_path, capsys):
    arguments = [f"--config.{key}={value}" for key, value in values.items()]
    path = pathlib.Path(__file__).parents[1] / "configs" / "head.py"
    assert launch.main(
        ["launch", f"--config={path}", *arguments, f"--workdir={tmp_path / 'run'}", "--nocompilation_cache"]
    )
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_texts_of_other_settings_are_not_trained_on(tmp_path):
    _, config = launch.parse(["launch", f"--config={pathlib.Path(__file__).parents[1] / 'configs' / 'head.py'}"])
    chosen = parse(experiment.Settings, config)
    experiment.check_texts(chosen, tmp_path)
    experiment.check_texts(dataclasses.replace(chosen, num_batches=80, steps=3), tmp_path)
    with pytest.raises(ValueError, match=r"config.seed=0 before, 1 now.*another --workdir"):
        experiment.check_texts(dataclasses.replace(chosen, seed=1), tmp_path)


def test_a_head_for_experts_and_windows_is_dense_and_sees_all():
    mixture = dataclasses.replace(target().config, experts=Experts(4, 2), mask_token=11)
    windows = dataclasses.replace(target().config, sliding_window=8, global_layers=(2,), local_rope_theta=1e3)
    for config in (mixture, windows):
        assert isinstance(config, DecoderConfig)
        head = experiment.shape(config, TAPS, 9)
        names = {
            name.key
            for path, _ in jax.tree_util.tree_leaves_with_path(feature_head.initial(head, jax.random.key(0)))
            for name in path
        }
        assert "gate_up" in names
        assert "experts" not in names
        assert not any(head.layer.is_windowed(layer) for layer in range(1))
