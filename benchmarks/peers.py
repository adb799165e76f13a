"""Other engines for `speed.py`, on the same weights, token ids and threads: transformers, llama.cpp, OpenVINO GenAI.

None is a dependency of specjax: `pip install torch transformers`, `pip install llama-cpp-python` (which compiles
llama.cpp for this machine), `pip install openvino-genai`. What they would keep of one call for the next is switched
off.
"""

import functools
import hashlib
import importlib.metadata
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Run = Callable[[list[int]], list[int]]
"""From the token ids of a prompt to those of its continuation."""


class Work(NamedTuple):
    """What every engine is given.

    Attributes:
      path: a GGUF file.
      dtype: "float32" or "bfloat16", to which its weights are rounded.
      stop_tokens: end a text.
      max_new_tokens: the budget of a text.
      context: the most tokens of a prompt and its text.
      lookup: the numbers of tokens that prompt lookup may draft; each is a mode of its own.
      threads: of the processor.
    """

    path: pathlib.Path
    dtype: str
    stop_tokens: Sequence[int]
    max_new_tokens: int
    context: int
    lookup: Sequence[int]
    threads: int


def rewritten(path: pathlib.Path, dtype: str, stored: str) -> pathlib.Path:
    """A copy of a GGUF file whose matrices are rounded to a dtype, and then stored in a type of GGUF.

    Args:
      path: the file.
      dtype: "float32" or "bfloat16".
      stored: "F32", "BF16" or "F16".

    Returns:
      the copy, in the cache directory of specjax; one that is there is taken as it is.
    """
    import gguf

    from specjax import files

    key = hashlib.sha256(f"{path.stat().st_size} {path.stat().st_mtime_ns}".encode()).hexdigest()[:8]
    copy = files.cache_directory() / "gguf" / f"{path.stem}-{dtype}-{stored}-{key}.gguf"
    if copy.exists():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(path)
    written = copy.with_suffix(".part")
    writer = gguf.GGUFWriter(written, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, *inner)
    types = gguf.GGMLQuantizationType
    writer.add_file_type({"F32": 0, "F16": 1, "BF16": 32}[stored])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32")
        if dtype == "bfloat16":
            values = gguf.quants.dequantize(gguf.quants.quantize(values, types.BF16), types.BF16)
        # Norms stay float32, as llama.cpp's own converter leaves them.
        kind = types[stored] if values.ndim > 1 else types.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    written.rename(copy)
    return copy


def transformers_model(path: pathlib.Path, dtype: str, threads: int) -> Any:
    """The model of a GGUF file in transformers, its weights unpacked, on so many threads."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype],
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    return model.eval()


def transformers_runs(work: Work) -> dict[str, Run]:
    """`generate` of transformers, plain and with prompt lookup."""
    import torch

    model = transformers_model(work.path, work.dtype, work.threads)

    def mode(**options: Any) -> Run:
        def run(prompt: list[int]) -> list[int]:
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=work.max_new_tokens,
                    do_sample=False,
                    eos_token_id=list(work.stop_tokens),
                    pad_token_id=work.stop_tokens[0],
                    **options,
                )
            return out[0, len(prompt) :].tolist()

        return run

    return {"plain": mode()} | {f"lookup {n}": mode(prompt_lookup_num_tokens=n) for n in work.lookup}


def llama_cpp_runs(work: Work) -> dict[str, Run]:
    """llama.cpp by its Python binding, plain and with the binding's prompt lookup."""
    import llama_cpp  # pyright: ignore[reportMissingImports]
    from llama_cpp import llama_speculative  # pyright: ignore[reportMissingImports]

    path = rewritten(work.path, work.dtype, {"float32": "F32", "bfloat16": "BF16"}[work.dtype])

    def mode(draft: Any) -> Run:
        model = llama_cpp.Llama(
            str(path),
            n_ctx=work.context,
            n_threads=work.threads,
            n_threads_batch=work.threads,
            draft_model=draft,
            logits_all=draft is not None,  # The binding needs it for drafts, and does not see to it for long prompts.
            verbose=False,
        )

        def run(prompt: list[int]) -> list[int]:
            model.reset()  # Else it would keep the prefix that this prompt shares with the last.
            out: list[int] = []
            for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
                out.append(int(token))
                if token in work.stop_tokens or len(out) == work.max_new_tokens:
                    break
            return out

        return run

    lookups = {n: llama_speculative.LlamaPromptLookupDecoding(num_pred_tokens=n) for n in work.lookup}
    return {"plain": mode(None)} | {f"lookup {n}": mode(draft) for n, draft in lookups.items()}


def openvino_runs(work: Work) -> dict[str, Run]:
    """OpenVINO GenAI, plain and with its prompt lookup. It reads matrices of float16, which hold rounded weights."""
    import numpy as np
    import openvino  # pyright: ignore[reportMissingImports]
    import openvino_genai  # pyright: ignore[reportMissingImports]

    path = rewritten(work.path, work.dtype, "F16")
    precision = {"float32": "f32", "bfloat16": "bf16"}[work.dtype]

    def pipeline(**options: Any) -> Any:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = work.context
        own = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": work.threads}
        return openvino_genai.LLMPipeline(str(path), "CPU", scheduler_config=scheduler, **own, **options)

    def mode(pipe: Any, **options: Any) -> Run:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=work.max_new_tokens, do_sample=False, stop_token_ids=set(work.stop_tokens), **options
        )

        def run(prompt: list[int]) -> list[int]:
            ids = np.array([prompt], np.int64)
            inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
            return list(pipe.generate(inputs, config).tokens[0])

        return run

    looking_up = pipeline(prompt_lookup=True) if work.lookup else None
    lookups = {f"lookup {n}": mode(looking_up, num_assistant_tokens=n, max_ngram_size=3) for n in work.lookup}
    return {"plain": mode(pipeline())} | lookups


class Engine(NamedTuple):
    """An engine: the package whose version is recorded, the command that installs it, and its modes."""

    package: str
    install: str
    runs: Callable[[Work], dict[str, Run]]


ENGINES = {
    "transformers": Engine("transformers", "pip install torch transformers", transformers_runs),
    "llama.cpp": Engine("llama-cpp-python", "pip install llama-cpp-python", llama_cpp_runs),
    "openvino": Engine("openvino-genai", "pip install openvino-genai", openvino_runs),
}


def version(name: str) -> str | None:
    """The version of an engine's package; None where it is not installed."""
    try:
        return importlib.metadata.version(ENGINES[name].package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def installed(names: tuple[str, ...]) -> dict[str, str]:
    """The versions of those of the engines that are installed; says of the others, once, how to install them.

    Raises:
      ValueError: for an engine that does not exist.
    """
    found = {}
    for name in names:
        if name not in ENGINES:
            raise ValueError(f"--peers={name}: there is no such engine; choose among {', '.join(ENGINES)}.")
        own = version(name)
        if own is None:
            print(f"{name} is left out: it is not installed ({ENGINES[name].install}).", file=sys.stderr)
        else:
            found[name] = own
    return found
