"""What is compiled ahead is what later calls need."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from jax._src import test_util
from jax.experimental.compilation_cache import compilation_cache

import specjax
from specjax import api, drafters, files
from specjax.models import families
from specjax.models.config import DecoderConfig, T5Config


def tiny(config: DecoderConfig | T5Config) -> specjax.Pretrained:
    params = families.init_params(config, jax.random.key(0))
    return specjax.Pretrained(families.model(config), params, None, config)


DECODER = tiny(DecoderConfig(61, 16, 32, 2, 2, 1, 8, max_position=256))
T5 = tiny(T5Config(61, 16, 8, 32, 1, 1, 2))


@pytest.mark.parametrize(
    ("target", "shapes"),
    [
        pytest.param(DECODER, [(16, 64), (48, 128)], id="decoder"),
        pytest.param(T5, [(16, 64), (48, 64)], id="t5", marks=pytest.mark.slow),
    ],
)
def test_calls_of_warm_lengths_compile_nothing(target, shapes, capsys):
    options = {"drafter": drafters.ngram(num_draft_tokens=3), "max_new_tokens": 40, "stop_tokens": ()}
    warmed = specjax.warm(target, prompt_lengths=[3, 40, 9, 12, 41], **options)
    assert sorted(warmed) == [api.Shape(*shape) for shape in shapes]
    assert min(warmed.values()) > 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert re.fullmatch(r"\[2/2\] prompts padded to 48 tokens, in a buffer of \d+: \d+\.\d s", said[1])
    with test_util.count_jit_compilation_cache_miss() as count:
        for length in (3, 40, 12):
            prompt = [int(token) for token in np.arange(length) % 7]
            out = specjax.generate(target, [prompt], temperature=0.7, seed=3, **options)
            assert len(out.tokens[0]) == 40
    assert count() == 0


def test_fixed_shapes_are_one_program_and_mistakes_are_named(capsys):
    options = {"prompt_width": 32, "max_len": 128, "max_new_tokens": 40, "stop_tokens": (), "progress": False}
    assert list(specjax.warm(DECODER, prompt_lengths=range(1, 33), **options)) == [api.Shape(32, 128)]
    assert not capsys.readouterr().err
    wrong: dict[str, Any]
    for wrong in ({"prompt_lengths": []}, {"prompt_lengths": [0, 3]}, {"prompt_lengths": [3], "batch_size": 0}):
        with pytest.raises(ValueError, match=r"prompt_lengths=\[.*at least one length, and only whole numbers from 1"):
            specjax.warm(DECODER, **wrong)
    with pytest.raises(ValueError, match="up to 250 tokens with max_new_tokens=40 do not fit the 256 positions"):
        specjax.warm(DECODER, prompt_lengths=[250], max_new_tokens=40)


def test_programs_are_kept_where_jax_keeps_them_or_in_our_cache(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        api.keep_programs()
        assert jax.config.values["jax_compilation_cache_dir"] == str(files.cache_directory() / "jax")
        specjax.warm(DECODER, prompt_lengths=[70], max_new_tokens=3, progress=False)
        assert any((tmp_path / "jax").iterdir())
        jax.config.update("jax_compilation_cache_dir", "elsewhere")
        api.keep_programs()
        assert jax.config.values["jax_compilation_cache_dir"] == "elsewhere"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
