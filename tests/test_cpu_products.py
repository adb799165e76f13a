"""Products of few rows on CPUs: right, each row as it would be alone, and left to XLA without a compiler."""

import concurrent.futures
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax.models import cpu_products, linear
from specjax.parallel import sharding

DTYPES = ["bfloat16", "float32"]


@pytest.fixture(autouse=True)
def _with_a_compiler() -> None:
    if not cpu_products.is_supported(1, "float32"):
        pytest.skip("there is no C compiler (cc or gcc, or $CC) here, or SPECJAX_CPU_PRODUCTS=0")


def arrays(seed: int, rows: int, inputs: int, outputs: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    shape = (outputs, inputs) if dtype == "bfloat16" else (inputs, outputs)
    return jnp.asarray(rng.normal(size=(rows, inputs)), dtype), jnp.asarray(rng.normal(size=shape), dtype)


def expected(x: jax.Array, weight: jax.Array) -> np.ndarray:
    matrix = np.asarray(weight, np.float64)
    return np.asarray(x, np.float64) @ (matrix.T if weight.dtype == jnp.bfloat16 else matrix)


SHAPES = st.tuples(st.integers(1, 16), st.integers(1, 150), st.integers(1, 150))
LARGE = [(1, 576, 960), (3, 576, 49152), (4, 1536, 576), (5, 4100, 70), (16, 2048, 1100), (1, 1, 1), (7, 33, 17)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_products_are_those_of_float64(dtype, shape):
    rows, inputs, outputs = shape
    x, weight = arrays(0, rows, inputs, outputs, dtype)
    np.testing.assert_allclose(cpu_products.product(x, weight), expected(x, weight), rtol=1e-4, atol=1e-3)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), SHAPES, st.sampled_from(DTYPES))
def test_any_shape_is_multiplied_and_each_row_is_what_it_would_be_alone(seed, shape, dtype):
    num_rows, inputs, outputs = shape
    x, weight = arrays(seed, num_rows, inputs, outputs, dtype)
    compiled, rows = jax.jit(cpu_products.product), np.asarray(x)
    got = np.asarray(compiled(rows, weight))
    np.testing.assert_allclose(got, expected(x, weight), rtol=1e-5, atol=1e-4)
    for row in range(num_rows):
        np.testing.assert_array_equal(compiled(rows[row : row + 1], weight)[0], got[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_nan_is_its_own(dtype):
    x, weight = arrays(1, 6, 100, 40, dtype)
    got = np.asarray(cpu_products.product(x.at[2].set(jnp.nan), weight))
    assert np.isnan(got[2]).all()
    np.testing.assert_array_equal(np.delete(got, 2, axis=0), cpu_products.product(jnp.delete(x, 2, axis=0), weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_derivatives_are_those_of_xla(dtype):
    x, weight = arrays(2, 4, 24, 40, dtype)

    def loss(x, weight, product):
        return jnp.sum(jnp.sin(product(x[None], weight, 1)))

    for argument in (0, 1):
        got = jax.grad(loss, argument)(x, weight, linear.product)
        want = jax.grad(loss, argument)(x, weight, linear._dot)
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=2e-2, atol=2e-2)
    both = jax.vmap(cpu_products.product, (0, None))(jnp.stack([x, x + 1]), weight)
    np.testing.assert_array_equal(both[0], cpu_products.product(x, weight))


def test_many_at_once_do_not_disturb_each_other():
    cases = [arrays(seed, 1 + seed % 8, 64 + seed, 200, DTYPES[seed % 2]) for seed in range(32)]
    compiled = jax.jit(cpu_products.product)
    alone = [np.asarray(compiled(*case)) for case in cases]

    def run(number: int) -> bool:
        return all(np.array_equal(compiled(*cases[i]), alone[i]) for i in range(number % 5, len(cases), 5))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(100)))


def program(rows: int, dtype: str, platform: str = "cpu", mesh: jax.sharding.Mesh | None = None) -> str:
    x, weight = arrays(3, rows, 32, 48, dtype)
    with sharding.on_mesh(mesh):
        traced = jax.jit(lambda x, weight: linear.product(x, weight, 1)).trace(x[None], weight)
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_few_rows_on_one_cpu_use_it(dtype):
    most = cpu_products.MAX_ROWS[dtype]
    assert cpu_products._NAME in program(most, dtype)
    assert cpu_products._NAME not in program(most + 1, dtype)
    for platform in ("tpu", "cuda"):
        assert cpu_products._NAME not in program(1, dtype, platform)


def test_a_mesh_does_not_use_it():
    assert not cpu_products.is_supported(1, "float16")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("model",))):
        assert not cpu_products.is_supported(1, "float32")
    assert cpu_products._NAME in program(1, "float32", mesh=sharding.make_mesh())


PROGRAM = """
import jax.numpy as jnp
from specjax.models import cpu_products, linear
print(cpu_products.is_supported(1, "float32"), linear.product(jnp.ones((1, 1, 8)), jnp.ones((8, 4))).tolist())
"""


@pytest.mark.parametrize(
    ("change", "supported", "message"),
    [
        ({"SPECJAX_CPU_PRODUCTS": "0"}, False, ""),
        pytest.param({"CC": "no-such-compiler"}, False, "", marks=pytest.mark.slow),
        ({"CC": f"{sys.executable} -c raise(SystemExit('error:no'))"}, False, "could not be compiled or loaded"),
        pytest.param({}, True, "", marks=pytest.mark.slow),
    ],
    ids=["switched off", "no compiler", "a broken compiler", "a compiler"],
)
def test_without_a_compiler_xla_multiplies_and_a_failure_is_said(tmp_path, monkeypatch, change, supported, message):
    monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path))
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{supported} [[[8.0, 8.0, 8.0, 8.0]]]"
    assert message in done.stderr
    assert bool(message) or "cpu_products" not in done.stderr
    assert len(list(tmp_path.glob("libraries/*.so"))) == supported


def test_the_source_compiles_without_a_warning_and_has_room_for_all_rows(tmp_path):
    assert f" MAX_ROWS = {max(cpu_products.MAX_ROWS.values())}," in cpu_products._SOURCE.read_text()
    compiler = shutil.which("cc") or "gcc"
    flags = [
        *cpu_products._FLAGS,
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
        f"-I{jax.ffi.include_dir()}",
    ]
    command = [compiler, *flags, "-o", str(tmp_path / "library.so"), str(cpu_products._SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
