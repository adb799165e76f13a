"""Published EAGLE heads: every layout computes what a reference in torch computes, and no text changes."""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import eagle_heads
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from eagle_heads import LAYOUTS, Reference
from helpers import compiled, random_prompts, right_pad, texts

import specjax
from specjax import decoding, drafters, launch, sampling, testing
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.decoding.verify import Rule
from specjax.drafters import head_rollout
from specjax.drafters.eagle import functions as functions_of
from specjax.experiments import head as experiment
from specjax.experiments.reports.display import View
from specjax.experiments.settings import parse
from specjax.models import eagle, families
from specjax.models.config import DecoderConfig, T5Config
from specjax.models.weights import eagle_files as reader
from specjax.training import heads
from specjax.training.harvest import Texts
from specjax.types import Block, Draft, Feedback, Inputs, Model, ModelOutput, Params

TARGET = DecoderConfig(
    eagle_heads.VOCAB, eagle_heads.WIDTH, 32, eagle_heads.LAYERS, 2, 1, 8, max_position=128, rope_theta=500_000.0
)


@functools.cache
def target() -> Pretrained:
    """A random target in which attention matters; its rotary base is not that of the heads."""
    rng = np.random.default_rng(0)
    shapes = families.abstract_params(TARGET)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes)
    return Pretrained(families.model(TARGET), params, None, TARGET)


def tapped(taps: tuple[int, ...]) -> Model:
    with_taps = target().model.with_taps
    assert with_taps is not None
    return with_taps(taps)


@functools.cache
def hidden_states() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two texts of 9 and 6 tokens, right-padded, and the target's hidden states `[2, 9, 1 + layers, D]`."""
    tokens = np.random.default_rng(3).integers(0, TARGET.vocab_size, (2, 9)).astype(np.int32)
    length = np.asarray([9, 6], np.int32)
    model = compiled(tapped(tuple(range(TARGET.num_layers + 1))))
    inputs = Inputs(jnp.asarray(tokens), jnp.asarray(length))
    output, _ = model.prefill(target().params, inputs, model.init_cache(2, 16))
    return tokens, length, np.asarray(output.features)


DRAFTS = (5, 2, 17)


def reference_logits(name: str, tensors: eagle_heads.Tensors) -> np.ndarray:
    """`[2, 1 + drafts, V]` after both texts."""
    layout, (tokens, length, hidden) = LAYOUTS[name], hidden_states()
    table = torch.tensor(np.asarray(target().params["embedding"]))
    head = torch.tensor(np.asarray(target().params["head"]["values"])).T
    found = []
    for row, n in enumerate(length):
        states = torch.tensor(hidden[row][:, list(layout.taps)])
        found.append(Reference(layout, tensors, table, head).chain(states, tokens[row, :n].tolist(), DRAFTS))
    return np.asarray(found)


def our_logits(draft: Draft, head: drafters.EagleHead, shift: int = 0) -> np.ndarray:
    """The same of our head: a prompt in `update`, then a chain; `shift` is a planted bug."""
    tokens, length, hidden = hidden_states()
    functions = functions_of(head.config, TARGET, specjax.sharding.RULES)
    model = head_rollout.as_model(head_rollout.Plan(functions, 1))
    params = Params(target().params, draft.params)
    features = np.roll(hidden[:, :, list(head.config.taps)], -shift, axis=1)
    inputs = Inputs(jnp.asarray(tokens), jnp.asarray(length))
    output = ModelOutput(jnp.zeros((2, 1, 1)), jnp.asarray(features))

    @jax.jit
    def read(params: Params, drafts: Any) -> Any:
        feedback = Feedback(inputs.tokens, inputs.length, inputs.length, output.features, output, inputs)
        cache = draft.drafter.update(params, draft.drafter.init(2, 24), feedback)
        found = [functions.logits(params, cache.states[:, :1])]
        for i in range(len(DRAFTS)):
            step, cache = model.apply(params, Block(drafts[:, i : i + 1]), cache)
            cache = model.commit(cache, None, jnp.ones(2, jnp.int32))
            found.append(step.logits)
        return jnp.concatenate(found, axis=1)

    return np.asarray(read(params, jnp.broadcast_to(jnp.asarray(DRAFTS, jnp.int32), (2, len(DRAFTS)))))


@functools.cache
def files() -> pathlib.Path:
    import tempfile

    return pathlib.Path(tempfile.mkdtemp())


@functools.cache
def tensors(name: str) -> eagle_heads.Tensors:
    return eagle_heads.tensors_of(LAYOUTS[name])


@functools.cache
def directory(name: str) -> pathlib.Path:
    return eagle_heads.save(files() / name, LAYOUTS[name], tensors(name))


@functools.cache
def head_of(name: str) -> drafters.EagleHead:
    return drafters.load_eagle(directory(name), target())


def assert_same_logits(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=2e-4)


SLOW = pytest.mark.slow
CASES = [name if name in ("EAGLE-3", "EAGLE") else pytest.param(name, marks=SLOW) for name in LAYOUTS]


@pytest.mark.parametrize("name", CASES)
def test_a_chain_has_the_logits_of_the_published_computation(name):
    draft = specjax.load_draft(directory(name), target(), num_draft_tokens=3)
    assert_same_logits(our_logits(draft, head_of(name)), reference_logits(name, tensors(name)))


def start(draft: Draft | None, temperature: float) -> Any:
    """The functions that decode five ragged rows, and their state."""
    draft = Draft(drafters.none(), ()) if draft is None else draft
    model = tapped(draft.drafter.taps)
    params = Params(target().params, draft.params)
    state = decoding.prefill(
        model,
        draft.drafter,
        params,
        right_pad([[4], *random_prompts(4, TARGET.vocab_size)], 16),
        max_new_tokens=[20, 20, 3, 20, 11],
        options=sampling.options(5, temperature=temperature),
        seeds=list(range(5)),
        step_cost=0.0,
        max_len=64,
    )
    return model, draft.drafter, params, state


def decode(draft: Draft | None, rule: Rule = verify.coupled, temperature: float = 0.0) -> Any:
    model, drafter, params, state = start(draft, temperature)
    return decoding.generate(model, drafter, rule, params, state)


@functools.cache
def plain(temperature: float) -> list[list[int]]:
    return texts(decode(None, temperature=temperature))


SHAPES: dict[str, dict[str, Any]] = {
    "chain": {"num_draft_tokens": 3},
    "sure chain": {"num_draft_tokens": 3, "min_confidence": 0.2},
    "tree": {"topology": (3, 2, 1)},
    "dynamic tree": {"dynamic": drafters.Dynamic(width=3, depth=3, num_nodes=8)},
}


def draft_of(name: str = "EAGLE-3", shape: str = "chain") -> Draft:
    return drafters.eagle(head_of(name), target(), **SHAPES[shape])


TEXTS = [("EAGLE-3", "chain", 1.0)]
MORE_TEXTS = [case for case in itertools.product(("EAGLE-3", "EAGLE"), SHAPES, (0.0, 1.0)) if case not in TEXTS]


@pytest.mark.parametrize(
    ("name", "shape", "temperature"), [*TEXTS, *(pytest.param(*c, marks=SLOW) for c in MORE_TEXTS)]
)
def test_the_text_is_plain_decodings_and_the_cache_follows_it(name, shape, temperature):
    draft = draft_of(name, shape)
    state = decode(draft, temperature=temperature)
    assert texts(state) == plain(temperature)
    proposed = np.asarray(state.rows.stats.proposed).sum()
    assert 0 < np.asarray(state.rows.stats.accepted).sum() < proposed
    assert_follows(draft, state)


def assert_follows(draft: Draft, state: Any) -> None:
    """The cache invariant: the entries of the text are those that a prompt of the same tokens has."""
    model = compiled(tapped(draft.drafter.taps))
    inputs = Inputs(state.rows.tokens[:, :48], state.rows.length)
    output, _ = model.prefill(target().params, inputs, model.init_cache(5, 64))
    feedback = Feedback(inputs.tokens, inputs.length, inputs.length, output.features, output, inputs)
    params = Params(target().params, draft.params)
    ours, theirs = state.rows.drafter, jax.jit(draft.drafter.update)(params, draft.drafter.init(5, 64), feedback)
    np.testing.assert_array_equal(ours.length, theirs.length)
    within = np.arange(64) < np.asarray(state.rows.length)[:, None]
    for a, b in ((ours.keys[0], theirs.keys[0]), (ours.values[0], theirs.values[0])):
        a, b = (np.where(within[:, None, :, None], x[:, :, :64], 0) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=2e-4)
    np.testing.assert_allclose(ours.states[:, 0], theirs.states[:, 0], atol=2e-4)


def joint(prompt: list[int], num_tokens: int) -> np.ndarray:
    """The distribution of the next tokens under the target, by scoring all texts."""
    every = np.asarray(list(itertools.product(range(TARGET.vocab_size), repeat=num_tokens)))
    rows = np.concatenate([np.tile(prompt, (len(every), 1)), every], axis=1)
    model = target().model
    output, _ = compiled(model).apply(
        target().params, Block(jnp.asarray(rows[:, :-1], jnp.int32)), model.init_cache(len(rows), 16)
    )
    log_probs = np.asarray(jax.nn.log_softmax(output.logits[:, len(prompt) - 1 :], axis=-1), np.float64)
    return np.exp(np.take_along_axis(log_probs, every[..., None], axis=-1)[..., 0].sum(axis=1))


def p_value_of_texts(draft: Draft, rows: int = 6000) -> float:
    """Of the hypothesis that two sampled tokens are distributed as the target's."""
    model = tapped(draft.drafter.taps)
    params, prompt = Params(target().params, draft.params), [1, 3, 2, 0]
    state = decoding.prefill(
        model,
        draft.drafter,
        params,
        right_pad([prompt] * rows, 8),
        max_new_tokens=2,
        options=sampling.options(rows, temperature=1.0),
        seeds=list(range(rows)),
        step_cost=0.0,
        max_len=24,
    )
    state = decoding.generate(model, draft.drafter, verify.rejection, params, state)
    assert np.asarray(state.rows.stats.accepted).sum() > 100
    counts = np.bincount(np.asarray(state.rows.tokens)[:, 4:6] @ [TARGET.vocab_size, 1], minlength=TARGET.vocab_size**2)
    return testing.g_test(counts, joint(prompt, 2))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_text_is_distributed_as_the_targets(shape):
    assert p_value_of_texts(draft_of("EAGLE-3", shape)) > 1e-5


def sorted_by_id(logits: Any, number: int, keys: Any, options: Any) -> Any:
    """The planted bug: drawn without replacement, then put in the order of their ids."""
    tokens, probs = drafters.children.without_replacement(logits, number, keys, options)
    order = jnp.argsort(tokens, axis=-1)
    return jnp.take_along_axis(tokens, order, axis=-1), probs


@pytest.mark.slow
def test_draws_that_are_sorted_again_are_found():
    draft = drafters.eagle(head_of("EAGLE-3"), target(), topology=(3,), children=sorted_by_id)
    right = drafters.eagle(head_of("EAGLE-3"), target(), topology=(3,))
    assert p_value_of_texts(right) > 1e-5
    assert p_value_of_texts(draft) < 1e-9


def wrong_pairing(head: drafters.EagleHead, monkeypatch: Any) -> np.ndarray:
    """Each token with the hidden states at the token itself, in the place of the one before it."""
    return our_logits(draft_of(), head, shift=1)


def absolute_ids(head: drafters.EagleHead, monkeypatch: Any) -> np.ndarray:
    """`d2t` read as ids, not as offsets from the head's ids."""
    wrong = head._replace(tokens=np.asarray(tensors("EAGLE-3")["d2t"], np.int32))
    return our_logits(drafters.eagle(wrong, target(), num_draft_tokens=3), wrong)


def targets_theta(head: drafters.EagleHead, monkeypatch: Any) -> np.ndarray:
    """The rotary base of the target."""
    layer = dataclasses.replace(head.config.layer, rope_theta=TARGET.rope_theta)
    wrong = head._replace(config=dataclasses.replace(head.config, layer=layer))
    return our_logits(drafters.eagle(wrong, target(), num_draft_tokens=3), wrong)


def a_first_pair(head: drafters.EagleHead, monkeypatch: Any) -> np.ndarray:
    """The first token with a feature of zeros, as a pair that others attend to."""
    monkeypatch.setattr(eagle.EagleHead, "sees_first", True)
    functions_of.cache_clear()
    found = our_logits(draft_of(), head)
    functions_of.cache_clear()
    return found


BUGS: list[Callable[..., np.ndarray]] = [wrong_pairing, absolute_ids, targets_theta, a_first_pair]


@pytest.mark.parametrize("bug", [BUGS[0], *(pytest.param(bug, marks=SLOW) for bug in BUGS[1:])])
def test_planted_bugs_are_found(bug, monkeypatch):
    found = bug(head_of("EAGLE-3"), monkeypatch)
    with pytest.raises(AssertionError):
        assert_same_logits(found, reference_logits("EAGLE-3", tensors("EAGLE-3")))


def edited(tmp_path: pathlib.Path, name: str = "EAGLE-3", raw: Any = (), **changed: Any) -> pathlib.Path:
    """A head whose file has other entries or tensors; None: without it."""
    layout = LAYOUTS[name]
    now = {key: x for key, x in (tensors(name) | changed).items() if x is not None}
    return eagle_heads.save(tmp_path, layout._replace(raw=layout.raw | dict(raw)), now)


OTHER_IDS = torch.arange(eagle_heads.KNOWN)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"raw": {"vocab_size": 128256}}, "vocab_size=128256, but the target has 24 tokens.*one that it was trained"),
        ({"fc.weight": torch.zeros(16, 40)}, "reads 40 numbers of each token, but the target's hidden states have 16"),
        ({"fc.weight": torch.zeros(16, 80)}, "reads 5 hidden states of width 16, those with the indices"),
        (
            {"raw": {"eagle_aux_hidden_state_layer_ids": [2, 16, 29]}},
            r"indices \(2, 16, 29\); this target has.* 0 to 7",
        ),
        ({"d2t": OTHER_IDS}, "d2t and t2d do not name the same tokens"),
        ({"d2t": OTHER_IDS + 30}, "d2t names 9 tokens from 30 to 46; the head drafts 9, and the target has 24"),
        ({"d2t": None, "lm_head.weight": torch.zeros(2000, 16)}, "drafts 2000 tokens, the target has 24, .* no d2t"),
        ({"raw": {"num_attention_heads": 5}}, "num_attention_heads=5 and head_dim=3, but the tensors have 16"),
        ({"raw": {"rope_scaling": {"type": "dynamic", "factor": 2.0}}}, "rope type 'dynamic' is not supported"),
        ({"raw": {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.5}}}, "have mscale=0.5, which specjax"),
        ({"raw": {"rope_scaling": {"type": "yarn", "factor": "x"}}}, "factor='x'"),
        ({"norm.weight": None}, "lacks tensors norm.weight"),
        ({"norm.weight": torch.ones(3)}, r"'norm.weight' has shape \(3,\)"),
        ({"unknown.weight": torch.ones(3)}, "has unexpected tensors unknown.weight"),
        ({"layers.1.mlp.up_proj.weight": torch.ones(3)}, "more than one layer"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(changes, words, tmp_path):
    raw = changes.get("raw", {})
    path = edited(tmp_path, raw=raw, **{key: x for key, x in changes.items() if key != "raw"})
    with pytest.raises(ValueError, match=words):
        specjax.load_draft(path, target())


def test_a_head_of_the_whole_vocabulary_has_no_map(tmp_path):
    whole: dict[str, Any] = {"lm_head.weight": torch.randn(eagle_heads.VOCAB, eagle_heads.WIDTH)}
    unfilled = {"d2t": torch.zeros(eagle_heads.VOCAB).long(), "t2d": torch.zeros(eagle_heads.VOCAB).bool()}
    for name, maps in {"zeros": unfilled, "none": {"d2t": None, "t2d": None}}.items():
        head = drafters.load_eagle(edited(tmp_path / name, **whole, **maps), target())
        assert head.tokens is None
        assert drafters.eagle(head, target()).params.place is None


def test_what_is_asked_for_has_to_fit(tmp_path):
    wide = target()._replace(config=dataclasses.replace(TARGET, hidden_size=32, num_heads=2))
    with pytest.raises(ValueError, match="width 16, but the target has 0 to 7 of width 32"):
        drafters.eagle(head_of("EAGLE-3"), wide)
    with pytest.raises(ValueError, match="encoder-decoder"):
        drafters.eagle(head_of("EAGLE-3"), target()._replace(config=T5Config(24, 16, 8, 32, 1, 1, 2)))
    with pytest.raises(ValueError, match="topology or dynamic, not both"):
        drafters.eagle(head_of("EAGLE-3"), target(), topology=(2, 1), dynamic=drafters.Dynamic())
    with pytest.raises(ValueError, match=r"taps=\(1, 2\): the head reads 3 hidden states"):
        specjax.load_draft(directory("EAGLE-3"), target(), taps=(1, 2))
    assert specjax.load_draft(directory("EAGLE-3"), target(), taps=(1, 2, 3)).drafter.taps == (1, 2, 3)


def test_a_head_that_is_saved_is_read_back_bit_for_bit(tmp_path):
    for name in ("EAGLE-3", "Model-Optimizer", "EAGLE-3.1", "EAGLE"):
        head = head_of(name)
        drafters.save_eagle(head, target(), tmp_path / name)
        again = drafters.load_eagle(tmp_path / name, target())
        assert again.config == head.config
        jax.tree.map(np.testing.assert_array_equal, again.params, head.params)
        assert (again.tokens is None) == (head.tokens is None)
        np.testing.assert_array_equal(again.tokens, head.tokens)
    raw = json.loads((tmp_path / "EAGLE-3" / "config.json").read_text())
    assert (raw["rope_theta"], raw["draft_vocab_size"], raw["eagle_aux_hidden_state_layer_ids"]) == (1e4, 9, [2, 3, 4])
    half = drafters.load_eagle(tmp_path / "EAGLE-3", target(), dtype="bfloat16")
    assert half.config.layer.dtype == "bfloat16"
    drafters.save_eagle(half, target(), tmp_path / "half")
    jax.tree.map(
        np.testing.assert_array_equal,
        drafters.load_eagle(tmp_path / "half", target(), dtype="bfloat16").params,
        half.params,
    )
    with pytest.raises(ValueError, match="biases or norms of queries"):
        drafters.save_eagle(head_of("speculators"), target(), tmp_path / "no")


def test_a_hub_repository_gives_its_torch_file_where_it_has_no_safetensors(monkeypatch):
    asked: list[list[str]] = []

    def snapshot(repo_id: str, allow_patterns: list[str]) -> str:
        assert repo_id == "owner/head"
        asked.append(allow_patterns)
        return str(directory("EAGLE-3"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert specjax.load_draft("owner/head", target()).drafter.taps == (2, 3, 4)
    assert [reader.BIN in patterns for patterns in asked] == [False, True]


def test_load_draft_knows_models_and_heads_of_specjax(tmp_path):
    specjax.save(target(), tmp_path / "model")
    draft = specjax.load_draft(tmp_path / "model", target(), num_draft_tokens=2)
    assert draft.model == target().model
    assert draft.num_draft_tokens == 2
    assert not reader.is_eagle(tmp_path / "model")
    with pytest.raises(ValueError, match="target that the head was trained for"):
        specjax.load_draft("smollm2-135m-instruct", target())
    with pytest.raises(FileNotFoundError, match="does not exist: give a directory"):
        specjax.load_draft(tmp_path / "nowhere", target())
    with pytest.raises(TypeError, match="num_draft_token"):
        specjax.load_draft(directory("EAGLE-3"), target(), num_draft_token=2)


def frozen_of(head: drafters.EagleHead) -> heads.Frozen:
    table = jnp.asarray(head.params.get("embedding", target().params["embedding"]))
    output = jnp.asarray(target().params["head"]["values"]).T
    return heads.Frozen(table, output, output if head.tokens is None else output[head.tokens])


def harvested(head: drafters.EagleHead) -> Texts:
    """The two texts with the hidden states that a head reads, and the last one, which EAGLE reads too."""
    tokens, length, hidden = hidden_states()
    taps = [*head.config.taps, TARGET.num_layers][: 1 if head.config.version == 1 else None]
    return Texts(tokens, np.minimum(length, 2), length, hidden[:, :, taps])


@pytest.mark.parametrize("name", ["EAGLE-3", "EAGLE"])
def test_training_sees_what_drafting_computes(name: str):
    """The training-time test: the logits of each draft token behind a text are those of the published computation."""
    head = head_of(name)
    texts, known = harvested(head), slice(None) if head.tokens is None else head.tokens
    wanted = reference_logits(name, tensors(name))[..., known]
    tokens, length = np.zeros((2, 16), np.int32), texts.length
    tokens[:, :9] = texts.tokens
    for row, n in enumerate(length):
        tokens[row, n : n + len(DRAFTS)] = DRAFTS
    wide = texts._replace(tokens=tokens, features=np.pad(texts.features, ((0, 0), (0, 7), (0, 0), (0, 0))))
    frozen = frozen_of(head)
    read = jax.jit(lambda texts: tuple(heads.drafted(head.config, head.params, frozen, texts, 1 + len(DRAFTS))))
    for k, (_, logits) in enumerate(read(wide)):
        np.testing.assert_allclose(logits[np.arange(2), length - 1], wanted[:, k], rtol=1e-5, atol=2e-4)


@pytest.mark.slow
def test_training_lowers_the_loss_and_goes_on_where_it_stopped():
    head = head_of("EAGLE-3")
    frozen, texts = frozen_of(head), harvested(head)
    recipe = heads.Recipe(3e-3, 6, 2, depth=3, prompt_weight=0.0, clip=0.5, only_known=True)
    begin = heads.initial(head.config, frozen.rows, jax.random.key(0))
    losses: list[float] = []

    def report(state: heads.TrainState, loss: float) -> bool:
        losses.append(loss)
        return len(losses) != 3

    stopped = heads.train(head.config, begin, frozen, [texts], recipe, report)
    heads.train(head.config, stopped, frozen, [texts], recipe, report)
    whole: list[float] = []
    heads.train(head.config, begin, frozen, [texts], recipe, lambda state, loss: not whole.append(loss))
    assert losses == whole
    assert losses[-1] < losses[0] - 0.05


def test_eagle_is_to_make_the_next_hidden_state():
    """The loss of EAGLE and EAGLE-2 (arXiv 2401.15077, section 4.2) is the smooth L1 distance and cross-entropy."""
    head = head_of("EAGLE")
    frozen, texts = frozen_of(head), harvested(head)

    @jax.jit
    def read(texts: Texts) -> Any:
        losses = [
            heads.judge(head.config, head.params, frozen, texts, depth=1, prompt_weight=0.0, weights=weights).loss
            for weights in ((1.0, 0.0), (0.1, 0.0), (0.1, 1.0))
        ]
        return losses, next(iter(heads.drafted(head.config, head.params, frozen, texts, 1)))[0]

    (whole, tenth, both), states = jax.device_get(read(texts))
    away = np.abs(states - texts.features[:, :, -1])
    smooth = np.where(away < 1, away**2 / 2, away - 0.5).mean(axis=-1)
    # After the last token of the prompt, and those of the answer but for the last, whose next token is not known.
    place = np.arange(9)
    counts = (place >= texts.prompt_length[:, None] - 1) & (place < texts.length[:, None] - 1)
    assert (away < 1).any()
    assert (away > 1).any()
    np.testing.assert_allclose(tenth, 0.1 * whole, rtol=1e-5)
    np.testing.assert_allclose(both - tenth, smooth[counts].mean(), rtol=1e-4)


def test_noise_is_uniform_and_of_what_is_read_alone():
    head = head_of("EAGLE")
    texts = harvested(head)
    read = heads.noisy(head.config, texts, 0.2, jax.random.key(0))
    width, noise = 0.2 * 512 / 9, np.asarray(read - texts.features)
    assert 0.45 * width < np.abs(noise).max() <= 0.5 * width
    assert abs(noise.mean()) < 0.1 * width
    assert not np.allclose(heads.noisy(head.config, texts, 0.2, jax.random.key(1)), read)


def test_a_new_head_of_version_1_is_read_back_as_it_was(tmp_path: pathlib.Path):
    config = eagle.like(TARGET, (TARGET.num_layers,), version=1)
    params = heads.initial(config, jnp.zeros((TARGET.vocab_size, TARGET.hidden_size)), jax.random.key(0))
    drafters.save_eagle(drafters.EagleHead(config, params), target(), tmp_path)
    again = drafters.load_eagle(tmp_path, target())
    assert (again.config, again.tokens) == (config, None)
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 3])
def test_a_run_writes_a_head_that_drafts(version: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(experiment, "_load", lambda chosen, dtype: (target(), TARGET))
    flags = {"version": version, "taps": "(2,3,7)", "vocab_size": 9, "steps": 4, "rows": 2, "batch_size": 2}
    arguments = [f"--config.{key}={value}" for key, value in (flags | {"eval_every": 2, "depth": 2}).items()]
    _, config = launch.parse(["launch", "--config=configs/eagle.py", *arguments])
    chosen, told = parse(experiment.Settings, config), []
    tokens, length, hidden = hidden_states()
    texts = Texts(tokens, np.minimum(length, 2), length, hidden[:, :, [2, 3, 7]])
    experiment._train(chosen, [texts] * 3, tmp_path, View(), told.extend)
    head = drafters.load_eagle(tmp_path, target())
    assert (head.config.version, head.config.taps) == {1: (1, (7,)), 3: (3, (2, 3))}[version]
    assert (head.tokens is None) == (version == 1)
    losses = [line["loss"] for line in told if "loss" in line]
    assert len(losses) == 4
    assert all(np.isfinite(losses))
    draft = drafters.eagle(head, target(), num_draft_tokens=2)
    assert draft.drafter.taps == head.config.taps
