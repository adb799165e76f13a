"""An engine's start: every program is compiled once, before it is ready, and a second start finds them on disk."""

import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import specjax
from specjax.models import families
from specjax.models.config import DecoderConfig
from specjax.serving import compilations, warmup

CONFIG = DecoderConfig(61, 16, 32, 1, 2, 1, 8, max_position=64)
SIZES = {"num_slots": 2, "max_len": 32, "chunk_widths": (8,), "grammar_states": 8, "grammar_classes": 8}
# Batches of 1 and of 2 have four programs and an empty state, chunks two, prefixes of 8, 16, 32 and 64 tokens two.
NUMBER = 1 + 2 * (4 + 1) + 2 + 2 * 4
COMPILED = "/jax/core/compile/backend_compile_duration"
FOUND, MISSED = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


def pretrained() -> specjax.Pretrained:
    return specjax.Pretrained(families.model(CONFIG), families.init_params(CONFIG, jax.random.key(0)), None, CONFIG)


def start() -> list[str]:
    """What an engine says until it is ready."""
    said: list[str] = []
    specjax.Engine(pretrained(), say=said.append, **SIZES).close()
    return said


class Heard:
    """What JAX tells of its compilations."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.events: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self.lasted)
        jax.monitoring.register_event_listener(self.happened)

    def lasted(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs
        if event == COMPILED:
            self.names.append(str(kwargs["fun_name"]))

    def happened(self, event: str, **kwargs: str | int) -> None:
        del kwargs
        self.events.append(event)


@pytest.fixture
def heard() -> Iterator[Heard]:
    jax.clear_caches()
    heard = Heard()
    yield heard
    jax.monitoring.unregister_event_duration_listener(heard.lasted)
    jax.monitoring.unregister_event_listener(heard.happened)


@pytest.fixture
def directory(tmp_path) -> Iterator[None]:
    """An empty directory for compiled programs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, (str(tmp_path), 0.0, True), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("directory")
def test_every_program_is_compiled_once_and_a_second_start_finds_it(heard, monkeypatch):
    compiled_before_runs: list[int] = []
    compile_all = warmup.compile_all

    def note(*args) -> None:
        compile_all(*args)
        compiled_before_runs.append(len(heard.names))

    monkeypatch.setattr(warmup, "compile_all", note)
    monkeypatch.setattr(compilations, "_SECONDS", 0.0)
    said = start()
    counted = [re.fullmatch(r"compiled (\d+) of (\d+) programs after \d+\.\d s", line) for line in said]
    numbers = [(int(found[1]), int(found[2])) for found in counted if found]
    assert numbers == [(done, NUMBER) for done in range(1, NUMBER + 1)]
    # What warm-up then ran had been compiled, under the same arguments.
    assert compiled_before_runs == [len(heard.names)]
    for name in ("advance", "insert"):
        assert heard.names.count(f"jit({name})") == 2
    assert heard.events.count(MISSED) >= NUMBER
    heard.events.clear()
    jax.clear_caches()
    start()
    assert heard.events.count(MISSED) == 0
    assert heard.events.count(FOUND) >= NUMBER


def test_what_cannot_be_compiled_is_raised():
    def wrong(x: jax.Array) -> jax.Array:
        raise ValueError("no such program")

    right = compilations.Program(jax.jit(lambda x: x + 1), lambda: (np.ones(3),))
    stages = [[right, compilations.Program(jax.jit(wrong), lambda: (np.ones(3),)), right]]
    said: list[str] = []
    with pytest.raises(ValueError, match="no such program"):
        compilations.compile_all(stages, 3, said.append)
