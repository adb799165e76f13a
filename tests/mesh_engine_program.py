"""Run by test_sharding: an engine on a mesh of eight virtual devices; prints its texts beside those of one device."""

import json

import jax
from mesh_text_program import DECODER, PROMPTS, TEMPERATURES

import specjax
from specjax.models import families
from specjax.parallel import sharding


def main() -> None:
    """Decodes the prompts alone on one device, and together in an engine on the mesh."""
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, families.init_params(DECODER, jax.random.key(0)))
    target = specjax.Pretrained(families.model(DECODER), params, None, DECODER)
    mesh = sharding.make_mesh(data=2, model=4)
    placed = target._replace(params=sharding.shard(params, families.param_axes(DECODER), mesh))
    drafter = specjax.drafters.ngram(num_draft_tokens=3, min_match=1)
    alone = [
        specjax.generate(
            target, [prompt], drafter=drafter, verify="coupled", max_new_tokens=10, temperature=temperature, seed=i
        ).tokens[0]
        for i, (prompt, temperature) in enumerate(zip(PROMPTS, TEMPERATURES, strict=True))
    ]
    sizes = {
        "num_slots": 4,
        "max_len": 48,
        "batch_sizes": (2, 4),
        "chunk_widths": (8,),
        "score_prompts": False,
        "step_cost": 0,
    }
    with specjax.Engine(placed, drafter=drafter, **sizes) as engine:
        requests = [
            engine.submit(prompt, max_new_tokens=10, temperature=temperature, seed=i)
            for i, (prompt, temperature) in enumerate(zip(PROMPTS, TEMPERATURES, strict=True))
        ]
        together = [request.result()[0] for request in requests]
        accepted = sum(one.usage.accepted for one in together)
        compilations = engine.snapshot().compilations
    texts = [one.tokens for one in together]
    print(json.dumps({"alone": alone, "mesh": texts, "accepted": accepted, "compilations": compilations}))


if __name__ == "__main__":
    main()
