"""Run by test_sharding: decodes the same prompts on one device and on meshes, and prints both sides' texts as JSON.

mesh_text_program.py                      eight virtual devices of one process, every mesh of `MESHES`
mesh_text_program.py slow                 eight virtual devices of one process, every mesh of `SLOW`
mesh_text_program.py PORT INDEX           one of two processes of two devices each, on a mesh of all four
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import specjax
from specjax import drafters
from specjax.api.pretrained import Pretrained
from specjax.decoding import verify
from specjax.drafters.parallel_heads import Heads
from specjax.models import eagle, families, parallel_heads
from specjax.models.config import DecoderConfig, Experts, ModelConfig, T5Config
from specjax.models.parallel_heads import ParallelHeadsConfig
from specjax.parallel import sharding
from specjax.planning import hlo
from specjax.types import Batch, Block, Draft

DECODER = DecoderConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=1,
    num_heads=16,
    num_kv_heads=8,
    head_dim=8,
    max_position=256,
)
T5 = T5Config(
    vocab_size=256,
    hidden_size=64,
    head_dim=8,
    intermediate_size=128,
    num_encoder_layers=1,
    num_layers=1,
    num_heads=8,
    gated=True,
    activation="gelu_new",
)
CONFIGS: dict[str, ModelConfig] = {
    "decoder": DECODER,
    "scanned": dataclasses.replace(DECODER, num_layers=2, scan_layers=True),
    "int8": DECODER,
    "int4": dataclasses.replace(DECODER, head_dim=32),
    "experts": dataclasses.replace(DECODER, experts=Experts(8, 2), qk_norm=True),
    "olmo2": dataclasses.replace(DECODER, pre_norms=False, post_norms=True, qk_norm=True, qk_norm_whole=True),
    "t5": T5,
    "t5-int4": dataclasses.replace(T5, head_dim=32),
}
QUANTISED = {"int8": "int8", "int4": "int4:32", "t5-int4": "int4:32:offset,head=int8"}
PROMPTS = [[1, 2, 3, 4, 1, 2], [9], [5, 6, 7, 8, 5, 6, 7], [11, 12, 13] * 4, [1, 2, 3, 4, 1, 2], [3] * 9, [7, 8], [200]]
TEMPERATURES = [0.0, 1.0, 0.7, 1.0, 1.3, 0.0, 1.0, 1.0]
CORPUS = [[1, 2, 3, 4, 1, 2, 5, 6, 7, 8], [11, 12, 13, 11, 12, 13], [9, 10, 9, 10]] * 3

RULES = {
    "rejection": verify.rejection,
    "block": verify.block,
    "traversal": verify.traversal,
    "coupled": verify.coupled,
    "lenient": verify.lenient(0.3),
    "typical": verify.typical(),
    "top_k": verify.top_k(2),
    "top_k_gap": verify.top_k(3, gap=1.0),
    "distance": verify.distance(2),
}
DRAFTERS = (
    *("none", "ngram", "model", "tree", "table", "retrieval", "jacobi", "lookahead", "mask_tokens"),
    *("parallel_masks", "trained_masks", "pard", "slots", "skip", "suffix", "aggressive", "merged"),
    *("medusa", "medusa tree", "blockwise", "eagle", "eagle tree"),
)

Case = tuple[str, str, str]
Meshes = dict[str, tuple[dict[str, int], sharding.Rules, sharding.Rules, list[Case]]]

BEAMS = "beam search"

DECODERS: list[Case] = [("decoder", "tree", "coupled")]
BOTH: list[Case] = [*DECODERS, ("decoder", "model", "rejection"), ("t5", "model", "rejection")]
MAIN: list[Case] = [
    *BOTH,
    ("decoder", "model", "coupled"),
    ("scanned", "model", "rejection"),
    ("int8", "model", "rejection"),
    ("int4", "model", "rejection"),
    ("experts", "model", "rejection"),
    ("olmo2", "model", "rejection"),
    ("decoder", "model", BEAMS),
]
REST: list[Case] = (
    [("decoder", "model", rule) for rule in ("block", "lenient", "typical", "top_k", "top_k_gap", "distance")]
    + [("decoder", drafter, "rejection") for drafter in ("none", "ngram", "table", "retrieval")]
    + [("decoder", drafter, "coupled") for drafter in ("jacobi", "lookahead", "mask_tokens")]
    + [("decoder", "tree", rule) for rule in ("rejection", "traversal")]
    + [("decoder", drafter, "coupled") for drafter in ("suffix", "aggressive")]
    + [("decoder", drafter, "rejection") for drafter in ("parallel_masks", "trained_masks", "pard", "skip", "merged")]
    + [("decoder", "medusa", "rejection"), ("decoder", "medusa tree", "coupled"), ("t5", "blockwise", "rejection")]
    + [("decoder", drafter, "rejection") for drafter in ("eagle", "eagle tree")]
    + [("decoder", "eagle tree", "coupled")]
    + [
        ("t5", "pard", "rejection"),
        ("t5", "slots", "rejection"),
        ("t5", "skip", "rejection"),
        ("t5-int4", "model", "rejection"),
    ]
    + [("decoder", "ngram", "block"), ("t5", "ngram", "block"), ("t5", "retrieval", "coupled")]
)
SPLIT, REPLICATED, TWICE, APART = sharding.RULES, sharding.REPLICATED, sharding.RULES_2D, sharding.EXPERT_PARALLEL
MESHES: Meshes = {
    "2x2x2": ({"data": 2, "model": 2, "width": 2}, TWICE, TWICE, DECODERS),
}
ON_TWO_AXES: list[Case] = [*BOTH[1:], ("t5", "tree", "coupled")]
SLOW: Meshes = {
    "2x4": ({"data": 2, "model": 4}, SPLIT, SPLIT, MAIN + REST),
    "1x8": ({"model": 8}, SPLIT, SPLIT, BOTH),
    "8x1": ({"data": 8}, SPLIT, SPLIT, BOTH),
    "2x2x2": (
        {"data": 2, "model": 2, "width": 2},
        TWICE,
        TWICE,
        [("t5", "model", "rejection"), ("t5", "tree", "coupled")],
    ),
    "2x4, whole experts": ({"data": 2, "model": 4}, APART, APART, [("experts", "model", "rejection")]),
    "2x4, replicated draft": ({"data": 2, "model": 4}, SPLIT, REPLICATED, BOTH),
}


def params(family: str, seed: int) -> Any:
    """Random parameters; those of another seed are a little different."""
    config, scale = CONFIGS[family], {"t5": 2, "t5-int4": 2}.get(family, 6)
    scaled = jax.tree.map(lambda x: scale * x if x.ndim > 1 else x, families.init_params(config, jax.random.key(0)))
    noise = jax.random.key(seed)
    return jax.tree.map(lambda x: x + 0.02 * seed * jax.random.normal(noise, x.shape) if x.ndim > 1 else x, scaled)


def load(family: str, seed: int, mesh: jax.sharding.Mesh | None, rules: sharding.Rules) -> Pretrained:
    config, tree = CONFIGS[family], params(family, seed)
    if how := QUANTISED.get(family):
        config, tree = families.quantise(config, tree, how)
    if mesh is not None:
        tree = sharding.shard(tree, families.param_axes(config), mesh, rules)
    return Pretrained(families.model(config, rules), tree, None, config)


def heads(kind: str) -> Heads:
    """Random parallel heads; Medusa's have output matrices of their own."""
    inner, output = (32, 0) if kind == "blockwise" else (0, 256)
    config = ParallelHeadsConfig(kind, 3, 64, inner_size=inner, output_size=output)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), parallel_heads.abstract(config))
    return Heads(config, params)


def eagle_head(target: Pretrained, rules: sharding.Rules, **shape: Any) -> Draft:
    """A random EAGLE-3 head that drafts half of the tokens, read from its files onto the target's mesh."""
    config = eagle.EagleConfig(dataclasses.replace(DECODER, vocab_size=128), (0, 1, 1), DECODER.hidden_size)
    tree = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, eagle.initial(config, jax.random.key(0)))
    head = drafters.EagleHead(config, tree, np.arange(0, 256, 2, dtype=np.int32))
    with tempfile.TemporaryDirectory() as directory:
        drafters.save_eagle(head, target, directory)
        return specjax.load_draft(directory, target, rules=rules, **shape)


def text(
    case: Case, mesh: jax.sharding.Mesh | None, rules: sharding.Rules, draft_rules: sharding.Rules
) -> tuple[list[list[int]], int]:
    """The texts of a case, and how many draft tokens were accepted."""
    family, drafter, rule = case
    if rule == BEAMS:
        # In one process, the draft lies where a checkpoint is loaded without a mesh: on the first device.
        draft_mesh = mesh if jax.process_count() > 1 else None
        found = specjax.beam_search(
            load(family, 0, mesh, rules),
            PROMPTS,
            draft=load(family, 1, draft_mesh, draft_rules),
            num_beams=2,
            num_draft_tokens=2,
            max_new_tokens=8,
        )
        return [texts[0] for texts in found.tokens], sum(i * n for row in found.histogram for i, n in enumerate(row))
    made = {
        "none": lambda: drafters.none(),
        "ngram": lambda: drafters.ngram(num_draft_tokens=3, min_match=1),
        "model": lambda: drafters.model(load(family, 1, mesh, draft_rules), num_draft_tokens=3),
        "tree": lambda: drafters.model(load(family, 1, mesh, draft_rules), topology=(2, 2)),
        "jacobi": lambda: drafters.jacobi(num_draft_tokens=3),
        "lookahead": lambda: drafters.lookahead(window=3, ngram=3, guesses=2, num_buckets=8),
        "mask_tokens": lambda: drafters.mask_tokens(mask_token=0, num_draft_tokens=2),
        "parallel_masks": lambda: drafters.parallel_masks(
            load(family, 0, mesh, rules), mask_token=0, num_draft_tokens=3
        ),
        "trained_masks": lambda: drafters.parallel_masks(
            load(family, 0, mesh, rules), embeddings=jnp.linspace(-1, 1, 2 * 64).reshape(2, 64)
        ),
        "pard": lambda: drafters.pard(load(family, 1, mesh, draft_rules), mask_token=0, num_draft_tokens=3),
        "slots": lambda: drafters.nonautoregressive(
            load(family, 1, mesh, draft_rules), mask_token=0, num_draft_tokens=3
        ),
        "skip": lambda: drafters.skip(load(family, 0, mesh, rules), mlp=(0,), num_draft_tokens=3),
        "medusa": lambda: drafters.medusa(heads("medusa"), load(family, 0, mesh, rules)),
        "medusa tree": lambda: drafters.medusa(heads("medusa"), load(family, 0, mesh, rules), topology=(2, 2)),
        "blockwise": lambda: drafters.blockwise(heads("blockwise"), load(family, 0, mesh, rules)),
        "eagle": lambda: eagle_head(load(family, 0, mesh, rules), draft_rules, num_draft_tokens=3),
        "eagle tree": lambda: eagle_head(load(family, 0, mesh, rules), draft_rules, topology=(3, 2)),
        "suffix": lambda: drafters.suffix(num_draft_tokens=3, min_match=1),
        "aggressive": lambda: drafters.aggressive(num_draft_tokens=3),
        "merged": lambda: drafters.merged(
            [drafters.model(load(family, 1, mesh, draft_rules), num_draft_tokens=2), drafters.ngram(num_draft_tokens=2)]
        ),
        "table": lambda: drafters.table(drafters.count_ngrams(CORPUS, vocab_size=256), num_draft_tokens=3),
        "retrieval": lambda: drafters.retrieval(drafters.index_corpus(CORPUS, vocab_size=256), num_draft_tokens=3),
    }[drafter]()
    out = specjax.generate(
        load(family, 0, mesh, rules),
        PROMPTS,
        drafter=made,
        verify=RULES[rule],
        max_new_tokens=[14, 12, 16, 11, 14, 9, 16, 13],
        temperature=TEMPERATURES,
        step_cost=0.0,
    )
    return out.tokens, sum(map(sum, out.from_draft))


EXPERTS: dict[str, tuple[str, dict[str, int], sharding.Rules]] = {
    "experts, each split": ("experts", {"data": 2, "model": 4}, SPLIT),
    "experts, whole": ("experts", {"data": 2, "model": 4}, APART),
    "experts, split twice": ("experts", {"data": 2, "model": 2, "width": 2}, TWICE),
    "experts, replicated": ("experts", {"data": 2, "model": 4}, REPLICATED),
    "olmo2": ("olmo2", {"data": 2, "model": 4}, SPLIT),
}


LARGER = ((4, 12), (3, 2))
"""More tokens, and rows that do not divide over a mesh."""

DEFAULT_LOGITS = ("experts, whole",)


def logits_on_a_mesh(
    family: str, sizes: dict[str, int], rules: sharding.Rules, shapes: Sequence[tuple[int, int]] = ((4, 2),)
) -> dict[str, float]:
    """How far the logits of blocks of these rows and tokens are on a mesh from those on one device."""
    config, mesh = CONFIGS[family], sharding.make_mesh(**sizes)
    one = params(family, 1)
    many = sharding.shard(one, families.param_axes(config), mesh, rules)
    found: list[list[np.ndarray]] = []
    all_reduces = 0
    for where, tree, how in ((None, one, sharding.RULES), (mesh, many, rules)):
        model = families.model(config, how)
        found.append([])
        for rows, width in shapes:
            tokens = jnp.asarray([[i + 7 * row for i in range(width)] for row in range(rows)])

            def read(tree: Any, tokens: Any, model: Any = model) -> Any:
                return model.apply(tree, Block(tokens), model.init_cache(tokens.shape[0], 32))[0].logits

            with sharding.on_mesh(where):
                compiled = jax.jit(read).lower(tree, tokens).compile()
            found[-1].append(np.asarray(compiled(tree, tokens)))
            all_reduces = sum(c.kind == "all-reduce" for c in hlo.collectives(compiled.as_text() or ""))
    error = max(float(abs(a - b).max()) for a, b in zip(*found, strict=True))
    leaves = [(x, names) for x, names in zip(jax.tree.leaves(many), _axes(config, many), strict=True)]
    stacks = [x for x, names in leaves if names[:1] == ("experts",)] or [many["layers"][0]["mlp"]["down"]["values"]]
    held = sum(x.addressable_shards[0].data.size for x in stacks) / sum(x.size for x in stacks)
    return {"error": error, "deviation": float(found[0][0].std()), "held": held, "all_reduces": all_reduces}


def _axes(config: ModelConfig, tree: Any) -> list[tuple[str, ...]]:
    return jax.tree.structure(tree).flatten_up_to(families.param_axes(config))


def int4_on_a_mesh(sizes: dict[str, int], rules: sharding.Rules) -> dict[str, float]:
    """How far the logits of an int4 model are on a mesh from those on one device, and what share each device holds."""
    config, rng = families.with_quantisation(CONFIGS["int4"], QUANTISED["int4"]), np.random.default_rng(0)

    def fill(x: Any) -> np.ndarray:
        if x.dtype == jnp.int4:
            return rng.integers(-8, 8, x.shape).astype(x.dtype)
        return (rng.uniform(0.5, 1.5, x.shape) * (1 if x.ndim == 1 else 0.04)).astype(x.dtype)

    one, mesh = jax.tree.map(fill, families.abstract_params(config)), sharding.make_mesh(**sizes)
    many = sharding.shard(one, families.param_axes(config), mesh, rules)
    tokens = jnp.asarray([[*range(16)], [*range(100, 116)]])
    ones = jnp.ones_like(tokens)
    batch = Batch(tokens, tokens, ones, jnp.arange(16) * ones, ones.astype(jnp.float32), None, None)
    found = []
    for where, params, how in ((None, one, sharding.RULES), (mesh, many, rules)):
        score = families.model(config, how).score
        assert score is not None
        with sharding.on_mesh(where):
            found.append(np.asarray(jax.jit(score)(params, batch)))
    leaves = [x for x in jax.tree.leaves(many) if x.dtype == jnp.int4]
    held = sum(x.addressable_shards[0].data.size for x in leaves) / sum(x.size for x in leaves)
    return {"error": float(abs(found[0] - found[1]).max()), "deviation": float(found[0].std()), "held": held}


def main(cases: Meshes) -> None:
    one: dict[Case, Any] = {}
    report: dict[str, Any] = {"devices": jax.device_count(), "processes": jax.process_count(), "cases": {}}
    if cases is MESHES:
        report["int4"] = int4_on_a_mesh({"data": 2, "model": 2, "width": 2}, TWICE)
        report["logits"] = {name: logits_on_a_mesh(*EXPERTS[name]) for name in DEFAULT_LOGITS}
    if cases is SLOW:
        report["logits"] = {name: logits_on_a_mesh(*of, LARGER) for name, of in EXPERTS.items()}
    for name, (sizes, rules, draft_rules, wanted) in cases.items():
        mesh = sharding.make_mesh(**sizes)
        for case in wanted:
            if case not in one:
                one[case] = text(case, None, sharding.RULES, sharding.RULES)
            found = text(case, mesh, rules, draft_rules)
            report["cases"][f"{name}: {', '.join(case)}"] = [one[case], found]
    # On a line of its own: the collectives of CPUs print, too.
    print("\n" + json.dumps(report), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        main(SLOW if sys.argv[1:] == ["slow"] else MESHES)
    else:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
        few: list[Case] = [
            ("decoder", "model", "rejection"),
            ("t5", "retrieval", "coupled"),
            ("decoder", "model", BEAMS),
        ]
        main({"2x2": ({"data": 2, "model": 2}, sharding.RULES, sharding.RULES, few)})
