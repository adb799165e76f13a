"""Products of a few rows with large matrices on CPUs: a small C library, compiled on the machine on first use.

XLA:CPU multiplies few rows by bfloat16 or float32 matrices at a third to two thirds of the speed at which memory
delivers the weights, which is what a decoding step waits for, and writes a float32 copy of a matrix in groups or in
int4. `cpu_products.c` comes closer, and each row of its
results is, to the last bit, what it would be alone; `docs/results/speed.md` has the figures. It needs a C compiler
(`cc`, or what `$CC` names); without one, or with `SPECJAX_CPU_PRODUCTS=0`, XLA makes all products. Nothing here affects
what TPUs and GPUs compile.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax import files
from specjax.models.quantisation import Rounded

MAX_ROWS = {"bfloat16": 8, "float32": 16, "int8": 16, "int4": 16}
"""The most rows, by the dtype of the matrix: XLA multiplies more of them about as fast, or faster."""

_NAME = "specjax_product"
_SOURCE = pathlib.Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-ffp-contract=fast", "-shared", "-fPIC")
_lock = threading.Lock()


def is_supported(rows: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether this process can multiply so many rows by a matrix of this dtype here.

    It can on one CPU device with a compiler. The first question on a machine compiles the library, in a few seconds.
    """
    if rows > MAX_ROWS.get(jnp.dtype(dtype).name, 0) or jax.default_backend() != "cpu":
        return False
    # XLA does not split a foreign function's work over a mesh: it would gather the matrix.
    mesh = jax.sharding.get_abstract_mesh()
    return (mesh.empty or mesh.size == 1) and _registered()


@jax.custom_jvp
def product(x: Float[Array, "R I"], weight: Float[Array, "..."]) -> Float[Array, "R O"]:
    """The product with a matrix in the layout of `linear.outputs_first`, accumulated and returned in float32.

    Args:
      x: in the weight's dtype; at most `MAX_ROWS` rows.
      weight: bfloat16 `[O, I]` or float32 `[I, O]`.
    """
    outputs = weight.shape[0 if weight.dtype == jnp.bfloat16 else 1]
    call = jax.ffi.ffi_call(_NAME, jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32), vmap_method="sequential")
    return call(x.astype(jnp.float32), weight)


def product_rounded(x: Float[Array, "R I"], weight: Rounded) -> Float[Array, "R O"]:
    """The product with a matrix of small integers, `[O, I]`, in float32.

    Args:
      x: in float32; at most `MAX_ROWS` rows.
      weight: with scales `[O, G]`, for G groups of a multiple of 32 inputs, or for one; int4 of an even
        number of inputs.
    """
    outputs = jax.ShapeDtypeStruct((x.shape[0], weight.values.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call(_NAME, outputs, vmap_method="sequential")
    return call(x, *(part for part in weight if part is not None))


@product.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, weight), (dx, dweight) = primals, tangents
    contracted = (((1,), (1 if weight.dtype == jnp.bfloat16 else 0,)), ((), ()))
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=contracted, preferred_element_type=jnp.float32)
    return product(x, weight), dot(dx, weight) + dot(x, dweight)


def _registered() -> bool:
    with _lock:
        return _register()


@functools.cache
def _register() -> bool:
    """Makes the library known to XLA; False where there is none."""
    if os.environ.get("SPECJAX_CPU_PRODUCTS") == "0" or sys.byteorder != "little":
        return False
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or ""]
    if not shutil.which(compiler[0]):
        return False
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except OSError as error:
        warnings.warn(
            f"{_SOURCE.name} could not be compiled or loaded, so XLA multiplies, up to twice as slowly ({error}). "
            "SPECJAX_CPU_PRODUCTS=0 says that this is meant.",
            stacklevel=2,
        )
        return False
    jax.ffi.register_ffi_target(_NAME, jax.ffi.pycapsule(library.specjax_product), platform="cpu")
    return True


def _processor() -> str:
    """What identifies this kind of processor: a home directory may be shared by several."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    kind = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return repr([platform.system(), platform.machine(), platform.processor(), *sorted(kind)])


def _built(compiler: list[str]) -> pathlib.Path:
    """The compiled library, in the cache directory of specjax.

    Raises:
      OSError: where it cannot be compiled or written; the message has the compiler's first error.
    """
    parts = _SOURCE.read_text(encoding="utf-8"), jax.__version__, _processor(), shlex.join([*compiler, *_FLAGS])
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = files.cache_directory() / "libraries" / f"cpu_products-{key}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Compiled elsewhere and then renamed: several processes may do this at once.
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        made, native = pathlib.Path(directory) / path.name, "-march=native"
        command = [*compiler, *_FLAGS, native, f"-I{jax.ffi.include_dir()}", "-o", str(made), str(_SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:  # Some compilers do not know `native` on some processors.
            command.remove(native)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise OSError(f"{shlex.join(compiler)}: {lines[0] if lines else f'exit status {done.returncode}'}")
        made.replace(path)
    return path
