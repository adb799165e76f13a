"""The parts of an experiment: prompts, rows, marks, words."""

import json
import lzma

import pytest
from rich.console import Console
from serving_fakes import byte_tokenizer

from specjax.experiments import prompts, results
from specjax.experiments.reports import accepted_text as marks
from specjax.experiments.reports import compare as report
from specjax.experiments.reports import plots
from specjax.experiments.reports.display import MARKS, View, shorten
from specjax.experiments.store import RowStore
from specjax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token a byte, so that characters beyond ASCII take several."""
    return byte_tokenizer(None)


def row(prompt: int = 0, seconds: float = 0.5, baseline_seconds: float = 0.75, **changes) -> results.Row:
    """Seven tokens in four steps, two of which drafted two tokens and had three accepted together."""
    plain = {
        "task": "kind",
        "prompt": prompt,
        "id": str(prompt),
        "batch": prompt,
        "num_prompts": 1,
        "num_tokens": 7,
        "num_identical": 1,
        "target_calls": 4,
        "draft_steps": 2,
        "overlap": 3.0,
        "proposed_by_position": [2, 2],
        "accepted_by_position": [2, 1],
        "accepted_histogram": [2, 1, 1],
        "steps_by_length": [changes.get("draft_steps", 2)],
        "batch_tokens": 7,
        "baseline_batch_tokens": 7,
        "seconds": seconds,
        "baseline_seconds": baseline_seconds,
        "seconds_of_repeats": [0.99 * seconds, seconds, 1.01 * seconds],
        "baseline_seconds_of_repeats": [1.01 * baseline_seconds, baseline_seconds, 0.99 * baseline_seconds],
        **{f"{side}{what}_seconds": 0.1 for side in ("", "baseline_") for what in ("prefill", "compile")},
    }
    common = dict.fromkeys(results.COMMON, "") | {
        "temperature": 0.0,
        "exact": True,
        "num_draft_tokens": 2,
        "batch_size": 1,
        "cost_ratio": 0.1,
        "score_cost": 1.2,
        "shorter_costs": [],
        "step_cost": 1.4,
        "verify": "rejection",
    }
    return results.derive(plain | common | changes)


def write(path, *lines) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


class TestPrompts:
    def test_every_kind_of_line(self, tmp_path):
        lines = [
            {"prompt": "a", "category": "x", "id": 7},
            {"input": "b", "question_id": 8},
            {"turns": ["c", "d"]},
            {"prompt": "e", "input": "f"},
        ]
        path = write(tmp_path / "p.jsonl", *map(json.dumps, lines), "", "  ")
        found = prompts.read(path)
        assert [(p.number, p.text, p.task, p.id) for p in found] == [
            (0, "a", "x", "7"),
            (1, "b", "", "8"),
            (2, "c", "", ""),
            (3, "e", "", ""),
        ]
        assert [p.name for p in found] == ["x 7", "8", "prompt 2", "prompt 3"]
        assert prompts.read(path, 2) == found[:2]

    def test_xz(self, tmp_path):
        path = tmp_path / "p.jsonl.xz"
        path.write_bytes(lzma.compress('{"prompt": "ü"}\n'.encode()))
        assert prompts.read(path)[0].text == "ü"

    @pytest.mark.parametrize("line", ['{"text": "a"}', '{"prompt": ""}', '{"turns": []}', '{"turns": "a"}', "[1]", "3"])
    def test_lines_without_a_prompt(self, line, tmp_path):
        path = write(tmp_path / "p.jsonl", '{"prompt": "a"}', line)
        with pytest.raises(ValueError, match=r"p\.jsonl, line 2, has no prompt.*'prompt', 'input', 'turns'"):
            prompts.read(path)

    def test_other_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"missing\.jsonl does not exist"):
            prompts.read(tmp_path / "missing.jsonl")
        with pytest.raises(ValueError, match="line 1, is not JSON"):
            prompts.read(write(tmp_path / "p.jsonl", "{"))
        with pytest.raises(ValueError, match="has 1 prompts, but 2"):
            prompts.read(write(tmp_path / "p.jsonl", '{"prompt": "a"}'), 2)
        with pytest.raises(ValueError, match="has 0 prompts"):
            prompts.read(write(tmp_path / "p.jsonl"))
        (tmp_path / "p.jsonl.xz").write_bytes(b"no archive")
        with pytest.raises(ValueError, match="cannot be read"):
            prompts.read(tmp_path / "p.jsonl.xz")


class TestMarks:
    def test_characters_of_several_tokens(self, tokenizer):
        tokens = tokenizer.encode("aé→b")
        assert marks.pieces(tokenizer, tokens) == ["a", "", "é", "", "", "→", "b"]

    def test_segments(self, tokenizer):
        tokens = tokenizer.encode("abcd")
        assert marks.segments(tokenizer, tokens, [False, True, True, False]) == [
            ("a", False),
            ("bc", True),
            ("d", False),
        ]
        assert marks.segments(tokenizer, [], []) == []

    def test_a_stream_prints_the_text_once(self, tokenizer):
        tokens = tokenizer.encode("aé [red]b")
        flags = [False] * 3 + [True] * (len(tokens) - 3)
        console = Console(record=True, force_terminal=False, width=200)
        View(console).stream(tokenizer, [(tokens[:n], flags[:n]) for n in (2, 4, len(tokens))])
        assert console.export_text().replace(MARKS[1] + MARKS[0], "") == f"aé{MARKS[0]} [red]b{MARKS[1]}\n"

    def test_shorten(self):
        assert shorten("a\n b", 10) == "a b"
        assert shorten("abcdefgh", 6) == "abc..."


class TestRows:
    def test_derived_fields(self):
        found = row()
        assert found["acceptance_rate"] == 0.75
        assert found["acceptance_by_position"] == [1.0, 0.5]
        assert found["block_efficiency"] == 7 / 4
        assert found["measured_speedup"] == 1.5
        assert found["identical"] == 1.0
        # Theorem 3.8: (1 + .75 + .75^2) / (2 * .1 + 1).
        assert found["predicted_speedup"] == pytest.approx(2.3125 / 1.2)
        # Seven plain steps, over two plain ones and two that cost 1.2 + 2 * .1 each.
        assert found["accounted_speedup"] == pytest.approx(7 / (2 + 2 * 1.4))

    def test_adding_up(self):
        total = results.combine([row(0), row(1, num_identical=0, seconds=1.0)], "all")
        assert total["num_prompts"] == 2
        assert total["identical"] == 0.5
        assert total["accepted_histogram"] == [4, 2, 2]
        assert total["acceptance_rate"] == 0.75
        assert total["measured_speedup"] == pytest.approx(1.0)
        # One batch of two rows: its time counts once.
        shared = results.combine([row(0, batch=0, batch_tokens=14), row(1, batch=0, batch_tokens=14)], "all")
        assert shared["seconds"] == 0.5
        assert shared["tokens_per_second"] == 28.0

    def test_nothing_was_drafted(self):
        none = row(
            num_draft_tokens=0,
            draft_steps=0,
            overlap=0.0,
            target_calls=7,
            proposed_by_position=[],
            accepted_by_position=[],
            accepted_histogram=[7],
            steps_by_length=[],
        )
        total = results.combine([none, none], "all")
        assert total["acceptance_rate"] is None
        assert total["predicted_speedup"] == total["accounted_speedup"] == 1.0
        assert "none" in report.cells(total)


class TestWorkdir:
    CONFIG = {"seed": 0, "target": "t"}  # noqa: RUF012

    def test_round_trip(self, tmp_path):
        first = RowStore(tmp_path / "a" / "b", self.CONFIG)
        first.add([row(0)], [{"prompt": "p"}])
        again = RowStore(tmp_path / "a" / "b", self.CONFIG)
        assert again.rows == results.judged([row(0)])
        assert again.rows[0]["verdict"] == "gain"
        assert again.samples == [{"prompt": "p"}]
        again.check_resumable(["p"], "")
        with pytest.raises(ValueError, match=r"data file has changed.*--overwrite"):
            again.check_resumable(["q"], "")
        with pytest.raises(ValueError, match="this is moon"):
            again.check_resumable(["p"], "moon")

    def test_another_config(self, tmp_path):
        RowStore(tmp_path, self.CONFIG | {"seed": 1})
        RowStore(tmp_path, self.CONFIG).add([row(0)], [{"prompt": "p"}])
        with pytest.raises(ValueError, match="seed: 0 before, 1 now"):
            RowStore(tmp_path, self.CONFIG | {"seed": 1})
        assert RowStore(tmp_path, self.CONFIG | {"seed": 1}, overwrite=True).rows == []

    def test_a_sample_without_its_row_is_dropped(self, tmp_path):
        RowStore(tmp_path, self.CONFIG).add([row(0)], [{"prompt": "p"}, {"prompt": "q"}])
        assert RowStore(tmp_path, self.CONFIG).samples == [{"prompt": "p"}]

    def test_a_broken_file(self, tmp_path):
        (tmp_path / "results.json").write_text("[")
        (tmp_path / "config.json").write_text(json.dumps(self.CONFIG))
        with pytest.raises(ValueError, match=r"results\.json is broken"):
            RowStore(tmp_path, self.CONFIG)

    def test_what_is_not_finite_is_null(self):
        assert json.loads(results.to_json({"a": [float("nan"), 1.5], "b": (float("inf"),)})) == {
            "a": [None, 1.5],
            "b": [None],
        }


class TestReport:
    def test_a_win(self):
        found = report.findings([row(0), row(1)])
        assert found == [
            ("Text identical to plain decoding on 2 of 2 prompts.", False),
            ("Speculation is 1.50 times as fast as plain decoding over all prompts (1.48 to 1.53).", False),
        ]

    def test_a_loss_is_said_with_a_remedy(self):
        text = report.findings([row(0, seconds=1.5, overlap=0.4, score_cost=3.9)])[1]
        assert text[1]
        assert "SLOWER" in text[0]
        assert "0.50x" in text[0]
        assert "drafter=none" in text[0]

    def test_a_better_number_of_draft_tokens(self):
        assert "num_draft_tokens=8" in report.remedy(row(overlap=4.0, score_cost=1.0, cost_ratio=0.0))

    def test_one_loss_among_wins(self):
        text = report.findings([row(0), row(1, seconds=0.9, target_calls=9, draft_steps=0)])[2][0]
        assert text.startswith("It is SLOWER on kind 1 (0.83x)")
        assert "only 0 of 9 steps drafted" in text

    def test_noise_is_neither_gain_nor_loss(self):
        """The case of a text of 1.00 tokens a call that the clock called 1.32 times as fast."""
        nothing = {"draft_steps": 1, "target_calls": 7, "overlap": 0.0, "accepted_by_position": [0, 0]}
        scattered = {"baseline_seconds_of_repeats": [0.7, 1.0, 1.6], "seconds_of_repeats": [0.6, 0.75, 1.2]}
        rows = [row(0, seconds=0.75, baseline_seconds=1.0, **nothing, **scattered)]
        text = report.findings(rows)[1][0]
        assert text.startswith(
            "Over all prompts, speculation cannot be told from plain decoding: 1.33x is within noise"
        )
        assert report.cells(report.lines(rows)[0])[9] == "1.33x ~"
        # However steady the clock was: the calls do not explain it.
        text, is_bad = report.findings([row(0, seconds=0.75, baseline_seconds=1.0, **nothing)])[1]
        assert is_bad
        assert "that is no gain of speculation" in text
        one = {"baseline_seconds_of_repeats": [1.0], "seconds_of_repeats": [0.75]}
        text, is_bad = report.findings([row(0, seconds=0.75, baseline_seconds=1.0, **nothing, **one)])[1]
        assert is_bad
        assert "no spread" in text
        assert "fast" not in text

    def test_prompts_within_noise_are_named(self):
        found = report.findings([row(0), row(1, seconds=0.745)])
        assert ("Within noise, so neither gain nor loss: kind 1 (1.01x).", False) in found

    @pytest.mark.parametrize(("changes", "word"), [({}, "float32"), ({"exact": False}, "not exact")])
    def test_texts_that_differ(self, changes, word):
        text, is_bad = report.findings([row(num_identical=0, **changes)])[0]
        assert is_bad
        assert "0 of 1" in text
        assert word in text

    def test_sampled(self):
        assert "same distribution" in report.findings([row(temperature=1.0)])[0][0]
        assert "ANOTHER distribution" in report.findings([row(temperature=1.0, exact=False)])[0][0]

    def test_summary(self):
        text = report.summary({"name": "title"}, [row(0), row(1)], ["a.png"])
        table = [line for line in text.splitlines() if line.startswith("|")]
        assert len(table) == 5
        assert len({line.count("|") for line in table}) == 1
        assert "![a](a.png)" in text
        assert text.startswith("# title\n")

    def test_many_prompts_are_shown_by_task(self):
        rows = [row(i, task=f"kind {i % 2}") for i in range(report.MANY + 1)]
        assert [line["task"] for line in report.lines(rows)] == ["kind 0", "kind 1", "all"]
        assert len(report.lines(rows[:-1])) == report.MANY + 1


def test_plots(tmp_path):
    assert plots.write(tmp_path, report.lines([row(0), row(1, seconds=3.0)])) == ["acceptance.png", "speedup.png"]
    assert plots.write(tmp_path, report.lines([row(draft_steps=0)])) == ["speedup.png"]


def test_the_end_of_a_run_on_a_terminal():
    console = Console(record=True, force_terminal=True, width=130, file=open("/dev/null", "w"))  # noqa: SIM115
    view = View(console)
    with view.status("working"), view.progress(2, 0) as bar:
        bar.advance(bar.task_ids[0])
    view.legend()
    view.prompt("title", "text")
    view.row(results.judged([row()])[0])
    view.end([row(0), row(1, seconds=3.0)])
    text = console.export_text()
    assert "identical" in text
    assert "SLOWER" in text
