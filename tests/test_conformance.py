"""`testing.check_drafter` passes sound drafters, and names what is wrong with planted ones."""

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers import usual

from specjax import conformance, drafters, testing
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.drafters import contract
from specjax.types import Context, Drafter, Proposal, Topology

K, V = 2, 5
TARGET = testing.tabular(0, vocab_size=V)


def _drafter(propose, update=None, init=None, k: int = K) -> Drafter:
    """A drafter with no state but a counter of steps."""

    def count(params, state, feedback):
        return state + 1

    return Drafter(
        init or (lambda batch_size, max_len, max_source=0: jnp.int32(0)), propose, update or count, Topology.chain(k)
    )


def _probs(context: Context) -> jax.Array:
    rows = context.max_draft.shape[0]
    return jnp.broadcast_to(jnp.asarray([0.4, 0.3, 0.1, 0.1, 0.1]), (rows, K, V))


def _sampled(context: Context) -> Proposal:
    """A sound proposal from one distribution, whatever the text."""
    probs = _probs(context)
    tokens = jax.vmap(jax.vmap(lambda key, p: jax.random.categorical(key, jnp.log(p))))(context.keys, probs)
    # One-hot at temperature 0, as the target's distribution is.
    return Proposal(tokens.astype(jnp.int32), context.max_draft, probs)


def _changed(change, **rest) -> Drafter:
    """A drafter whose sound proposal is changed."""
    return _drafter(lambda params, state, cache, context: (change(_sampled(context), context), state, cache), **rest)


def _last(context: Context) -> jax.Array:
    return jnp.take_along_axis(context.history.tokens, context.history.length[:, None] - 1, axis=1)


def _copies(tokens, context: Context) -> Proposal:
    return Proposal(
        jnp.broadcast_to(tokens, (context.max_draft.shape[0], K)).astype(jnp.int32), context.max_draft, None
    )


def _drop_unlikely(proposal: Proposal, context: Context) -> Proposal:
    assert proposal.probs is not None
    likely = jnp.take_along_axis(proposal.probs, proposal.tokens[..., None], axis=-1)[..., 0] > 0.2
    return proposal._replace(length=jnp.minimum(proposal.length, jnp.sum(jnp.cumprod(likely, axis=1), axis=1)))


def _neighbours(proposal: Proposal, context: Context) -> Proposal:
    first = context.history.tokens[0, 0]
    return _copies(jnp.where(first == _last(context)[-1], first, (first + 1) % V), context)


BUGS = {
    # What is found while the loop is traced.
    "returns no Proposal": (_changed(lambda p, c: tuple(p)), "returns a tuple instead of a Proposal"),
    "forgets the state": (
        _drafter(lambda params, state, cache, context: _sampled(context)),
        r"returns a Proposal instead of \(Proposal, state, cache\)",
    ),
    "tokens of one row": (
        _changed(lambda p, c: p._replace(tokens=p.tokens[0])),
        r"tokens of shape \[2\], not \[B, K\]",
    ),
    "K + 1 tokens": (
        _changed(lambda p, c: p._replace(tokens=jnp.pad(p.tokens, ((0, 0), (0, 1))))),
        r"tokens of shape \[\d+, 3\], not \[B, K\]",
    ),
    "a length for all rows": (
        _changed(lambda p, c: p._replace(length=jnp.int32(K))),
        r"length of shape \[\], not \[B\]",
    ),
    "a Python length": (_changed(lambda p, c: p._replace(length=K)), "length of a int, which is not an array"),
    "float tokens": (
        _changed(lambda p, c: p._replace(tokens=p.tokens.astype(jnp.float32))),
        "tokens of type float32, not int32",
    ),
    "half-precision probs": (
        _changed(lambda p, c: p._replace(probs=p.probs.astype(jnp.bfloat16))),
        "probs of type bfloat16, not float32",
    ),
    "probs of its own vocabulary": (
        _changed(lambda p, c: p._replace(probs=p.probs[..., :-1])),
        r"probs of shape \[\d+, 2, 4\], not \[B, K, V\] = \[\d+, 2, 5\]",
    ),
    "a state that grows": (
        _changed(lambda p, c: p, update=lambda params, state, feedback: jnp.stack([state, state])),
        r"changes state of the state from int32\[\] to int32\[2\]",
    ),
    "a state of another structure": (
        _changed(lambda p, c: p, update=lambda params, state, feedback: (state,)),
        "changes the structure of the state",
    ),
    "a state of another type": (
        _changed(lambda p, c: p, update=lambda params, state, feedback: state + 0.5),
        r"from int32\[\] to float32\[\]",
    ),
    "an exception in propose": (_changed(lambda p, c: p.nope), "propose|<lambda>.*raises AttributeError"),
    "an exception in init": (
        _changed(lambda p, c: p, init=lambda batch_size, max_len, max_source=0: batch_size["weights"]),
        "raises TypeError",
    ),
    # What is found in its proposals.
    "length above K": (_changed(lambda p, c: p._replace(length=p.length + K)), "length 4, which is above K = 2"),
    "length above the room": (
        _changed(lambda p, c: p._replace(length=jnp.full_like(p.length, K))),
        "proposes length 2 where context.max_draft allows [01]: take the minimum",
    ),
    "a negative length": (_changed(lambda p, c: p._replace(length=p.length - 1)), "length -1, which is negative"),
    "an id beyond the vocabulary": (
        _changed(lambda p, c: _copies(c.vocab_size, c)),
        r"ids \[5, 5\], outside the vocabulary \[0, 5\)",
    ),
    "an id of -1": (_changed(lambda p, c: _copies(-1, c)), r"ids \[-1, -1\], outside the vocabulary"),
    "probs that do not sum to 1": (
        _changed(lambda p, c: p._replace(probs=p.probs * 0.9)),
        "probabilities that sum to 0.9, not to 1",
    ),
    "logits for probs": (_changed(lambda p, c: p._replace(probs=jnp.log(p.probs))), "states negative probabilities"),
    "NaN for probs": (_changed(lambda p, c: p._replace(probs=p.probs * jnp.nan)), "sum to nan, not to 1"),
    "a token of probability 0": (
        _changed(lambda p, c: p._replace(probs=jnp.broadcast_to(jnp.eye(V)[0], p.probs.shape))),
        "to which the probabilities that it states give 0",
    ),
    "random tokens without probs": (
        _changed(lambda p, c: p._replace(probs=None)),
        "draws at random, but states no probs",
    ),
    "probs of what was drawn": (
        _changed(lambda p, c: p._replace(probs=jax.nn.one_hot(p.tokens, V))),
        "states probs that depend on the random keys",
    ),
    "reads what is rejected": (
        _changed(lambda p, c: _copies(jnp.take_along_axis(c.history.tokens, c.history.length[:, None], axis=1), c)),
        "reads context.history.tokens at or beyond context.history.length",
    ),
    # What is found in many draws.
    "flatter probs than its own": (
        _changed(lambda p, c: p._replace(probs=jnp.full_like(p.probs, 1 / V))),
        "its tokens are not drawn from the probs that it states",
    ),
    "length by the token drawn": (_changed(_drop_unlikely), "the length depends on the token that was drawn"),
    "one key for all places": (
        _drafter(
            lambda params, state, cache, context: (
                _sampled(context._replace(keys=context.keys[:, :1].repeat(K, 1))),
                state,
                cache,
            )
        ),
        r"biases draft token 1 .* its tokens are not drawn from",
    ),
    # What is found in texts.
    "looks at its neighbours": (_changed(_neighbours), "depends on the other rows of the batch"),
}


@pytest.mark.parametrize("bug", usual(BUGS, *(bug for bug in BUGS if bug != "looks at its neighbours")))
def test_a_planted_bug_is_named(bug: str):
    drafter, words = BUGS[bug]
    with pytest.raises(AssertionError, match=words) as caught:
        testing.check_drafter(drafter, TARGET, num_texts=1024)
    assert "test_conformance.py, line " in str(caught.value)


# It remembers further than the two tokens that a proposal reads again, so that holes in its cache show.
SOURCE = Pretrained(*testing.tabular(1, vocab_size=V, order=5), None, None)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_a_model_whose_cache_is_not_rolled_back_is_named():
    stale = drafters.model(SOURCE, num_draft_tokens=K).drafter._replace(update=lambda params, state, feedback: state)
    problem = conformance._perfect_problem(SOURCE.model, SOURCE.params, stale, 1)
    assert "does not hold the text that was committed" in problem


@pytest.mark.slow
def test_a_sound_drafter_passes():
    report = testing.check_drafter(_changed(lambda p, c: p), num_texts=1024)
    assert "distributed as the target's" in str(report)
    assert not report.notes


@pytest.mark.slow
@pytest.mark.parametrize(
    "drafter",
    [
        drafters.ngram(num_draft_tokens=3, min_match=1),
        drafters.model(SOURCE, num_draft_tokens=3),
        drafters.model(SOURCE, topology=(2, 2)),
        drafters.model(SOURCE, topology=(2, 1), children=drafters.children.with_replacement),
    ],
)
def test_drafters_of_specjax_pass(drafter: Drafter):
    report = testing.check_drafter(drafter, TARGET)
    assert ("for its own model it is always right" in str(report)) == (getattr(drafter, "model", None) is not None)
    assert not report.notes


@pytest.mark.slow
def test_a_drafter_that_proposes_nothing_is_noted():
    silent = _changed(lambda p, c: p._replace(length=jnp.zeros_like(p.length)))
    assert "what it proposes was not tested" in testing.check_drafter(silent, num_texts=1024).notes[0]


@pytest.mark.parametrize(
    ("drafter", "error", "words"),
    [
        (drafters.ngram, TypeError, r"drafter=drafters.ngram is not called: write drafters.ngram\(\)"),
        (drafters.model, TypeError, r"write drafters.model\(specjax.load\(...\)\)"),
        (drafters.table, TypeError, r"write drafters.table\(drafters.load_table\(...\)\)"),
        (drafters.retrieval, TypeError, r"write drafters.retrieval\(drafters.load_datastore\(...\)\)"),
        (_drafter, TypeError, r"drafter=_drafter \(test_conformance.py, line \d+\) is a function"),
        (None, TypeError, "drafter is None: give a Drafter"),
        ("ngram", TypeError, "drafter is a str: give a Drafter"),
        (
            drafters.ngram()._replace(topology=Topology.chain(-1)),
            ValueError,
            "num_nodes=-1.* give specjax.types.Topology",
        ),
        (drafters.ngram()._replace(topology=2), ValueError, "topology 2; give specjax.types.Topology.chain"),
        (drafters.model(SOURCE), ValueError, "give the target that it drafts for"),
    ],
)
def test_what_is_no_drafter_is_told_what_to_write(drafter, error, words: str):
    with pytest.raises(error, match=words):
        testing.check_drafter(drafter)


def test_functions_are_described_by_their_file_and_line():
    assert contract.describe(drafters.ngram().propose).startswith("propose of ngram (ngram.py, line ")
    assert contract.describe(functools.partial(_probs)).startswith("_probs (test_conformance.py, line ")


@pytest.mark.parametrize(("rule", "warns"), [(verify.rejection, False), (verify.lenient(0.3), False)])
def test_built_in_rules_are_not_replaced_at_zero(rule: verify.Rule, warns: bool):
    assert bool(verify.replaced_at_zero(rule)) is warns


def test_a_rule_without_at_zero_is_replaced_there():
    mine = verify.Rule(verify.rejection.function, "mine", exact=False)
    assert "verify=mine has no `at_zero` of its own: at temperature 0 greedy" in verify.replaced_at_zero(mine)
    assert not verify.replaced_at_zero(verify.Rule(mine.function, "mine", exact=False, at_zero=mine.function))
