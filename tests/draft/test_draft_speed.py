"""`draft speed`, random models and synthetic acceptance: taking turns, arithmetic by hand, rates as asked for."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from gpt_fast import generate
from gpt_fast.checkpoint.safetensors_file import CheckpointError
from gpt_fast.config import ConfigError
from gpt_fast.convert.hf import open_job
from gpt_fast.convert.run import convert
from gpt_fast.draft import speed
from gpt_fast.draft.__main__ import main
from gpt_fast.draft.assess import assess_draft
from gpt_fast.draft.prompts import Prompt
from gpt_fast.draft.random_model import write_random_model
from gpt_fast.draft.synthetic import force_acceptance
from gpt_fast.load.checkpoint import load_checkpoint
from gpt_fast.serve.archive_files import write_sums
from gpt_fast.speculative.controller import Controller
from gpt_fast.speculative.costs import PLAIN, BatchShape, Choice
from gpt_fast.speculative.draft_model import DraftProposer
from gpt_fast.speculative.ngram import NGramProposer
from gpt_fast.speculative.speculator import Speculator
from handler import GptFastHandler
from support.letters import letters_tokenizer
from support.tiny_engine import tiny_engine
from support.tiny_models import save

PROMPTS = [Prompt(c, list(f"{c} number {i} number {i} number".encode())) for c in ("code", "chat") for i in range(2)]


def turn(variant, tokens, seconds, *, category="code", cpu=1.0, foreign=0.0, drafted=0, accepted=0, temperature=0.0):
    return speed.Turn(category, temperature, variant, tokens, seconds, cpu, 10, 2, drafted, accepted, foreign)


# ---------------------------------------------------------------------------------------- arithmetic


def test_ratios_are_of_pairs_and_noisy_pairs_do_not_count():
    rounds = [
        [turn("plain", 100, 2.0), turn("ngram", 100, 1.0, cpu=0.5, drafted=8, accepted=6)],
        [turn("ngram", 100, 2.0, drafted=2, accepted=0), turn("plain", 100, 2.0)],
        [turn("plain", 100, 9.0, foreign=0.5), turn("ngram", 100, 1.0)],
        [turn("plain", 50, 1.0, category="chat"), turn("ngram", 50, 1.25, category="chat")],
    ]
    chat, code, everything = speed.compare(rounds, limit=0.1)
    assert (code.category, code.pairs, code.noisy) == ("code", 2, 1)
    assert code.plain_tokens_per_s == 50 and code.tokens_per_s == pytest.approx(200 / 3)
    assert code.overall == pytest.approx(4 / 3) and code.cpu == pytest.approx(2 / 1.5)
    assert (code.low, code.median, code.high) == pytest.approx((1.1, 1.5, 1.9))
    assert code.acceptance == 0.6 and code.blocks_per_step == 0.2
    assert chat.overall == pytest.approx(0.8)
    assert everything.temperature is None and everything.overall == pytest.approx((250 / 4.25) / (250 / 5.0))


def test_batches_are_full_and_of_one_category():
    prompts = [Prompt("a", [i]) for i in range(3)] + [Prompt("b", [9])]
    assert speed.batches(prompts, 2) == [("a", [[0], [1]]), ("a", [[2], [0]]), ("b", [[9], [9]])]


# ------------------------------------------------------------------------------------------ by turns


@pytest.fixture
def core(make_core):
    engine = tiny_engine()
    draft = make_core(engine.core.runner.decode, slots=4).runner
    proposers = {"draft": DraftProposer(draft), "ngram": NGramProposer(torch.device("cpu"))}
    controller = Controller([1, 2])
    for choice in (PLAIN, *(Choice(arm, k) for arm in proposers for k in (1, 2))):
        # Worth a try, whatever the machine does.
        controller.costs.learn(choice, BatchShape(2), 1.0 if choice == PLAIN else 0.5)
    engine.core.runner.speculator = Speculator(proposers, controller, max_seq_len=128)
    return engine.core


@pytest.mark.slow
def test_every_variant_answers_every_batch_in_changing_order(core):
    loaded = core.runner.speculator
    ways = speed.variants(core, ["ngram", "auto"])
    assert set(ways["ngram"].proposers) == {"ngram"} and set(ways["auto"].proposers) == {"ngram", "draft"}
    assert ways["ngram"].controller is not ways["auto"].controller
    rounds = speed.take_turns(core, ways, PROMPTS, rows=2, temperatures=[0.0, 0.8], max_new_tokens=12, repeat=2)
    assert len(rounds) == 2 * 2 * 2  # rounds, categories, temperatures
    for turns in rounds:
        assert sorted(t.variant for t in turns) == ["auto", "ngram", "plain"]
        assert {t.tokens for t in turns} <= set(range(18, 23))  # less what came while the second row's prompt ran
        assert next(t for t in turns if t.variant == "plain").drafted == 0
    assert len({tuple(t.variant for t in turns) for turns in rounds}) == 3
    assert core.runner.speculator is loaded and core.idle
    assert any(t.drafted for turns in rounds for t in turns)
    ratios = speed.compare(rounds, limit=99)
    assert len(ratios) == 2 * (4 + 1)
    json.dumps(speed.json_of(ratios))


def test_variants_that_are_not_there_are_refused(core):
    del core.runner.speculator.proposers["draft"]
    with pytest.raises(ConfigError, match="no such proposer"):
        speed.variants(core, ["draft"])
    core.runner.speculator = None
    with pytest.raises(ConfigError, match="without a proposer"):
        speed.variants(core, ["auto"])


# -------------------------------------------------------------------------------- synthetic acceptance


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 1.0])
def test_measured_acceptance_is_the_rate_that_was_asked_for(make_core, tiny_model, rate):
    """An unrelated draft, whose own acceptance would be low: the report shows the forced one, and its tau."""
    engine = tiny_engine()
    draft = make_core(tiny_model(seed=5, vocab_size=257), slots=4).runner
    engine.core.runner.speculator = Speculator({"draft": DraftProposer(draft)}, Controller([1, 4]), max_seq_len=128)
    force_acceptance(engine.core, rate)
    assessed = assess_draft(engine.core, "forced", PROMPTS, batch_sizes=[2], temperatures=[1.0], max_new_tokens=60)
    for row in assessed.acceptance:
        for found, low, high in row.rates:
            assert low - 0.12 <= rate <= high + 0.12 and (found == rate or 0 < rate < 1)
    k = assessed.speeds[0].k
    assert assessed.speeds[0].tau_measured == pytest.approx(sum(rate**i for i in range(k + 1)), rel=0.2)


def test_only_a_share_and_only_drafts_can_be_forced(core):
    with pytest.raises(ConfigError, match=r"synthetic_acceptance: .*got 1.5"):
        force_acceptance(core, 1.5)
    del core.runner.speculator.proposers["draft"]
    with pytest.raises(ConfigError, match="needs a draft model"):
        force_acceptance(core, 0.5)


# --------------------------------------------------------------------------- random models, commands


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    save("llama-gqa", folder / "hf")
    (folder / "hf" / "tokenizer.json").write_bytes(letters_tokenizer())
    convert(open_job(folder / "hf"), folder / "target", progress=False)
    return folder / "target"


def test_a_random_model_has_the_vocabulary_and_its_own_depth(target, tmp_path):
    made = load_checkpoint(write_random_model(target, tmp_path / "draft", layers=1, seed=3), device="cpu")
    assert (made.config.n_layer, made.config.vocab_size) == (1, 160)
    assert made.model.norm.weight.dtype == torch.bfloat16
    assert (tmp_path / "draft" / "tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()
    again = load_checkpoint(write_random_model(target, tmp_path / "again", layers=1, seed=3), device="cpu")
    assert torch.equal(made.model.output.weight, again.model.output.weight)
    with pytest.raises(CheckpointError, match="is not empty"):
        write_random_model(target, tmp_path / "draft", layers=1)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return ended.value.code, capsys.readouterr().out


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"category": c, "prompt": "abcabcabca"}) for c in ("code", "chat")))
    return path


@pytest.mark.slow
def test_the_speed_command_prints_ratios_and_json(target, prompts, tmp_path, capsys):
    turns = "--useless_draft 1 --speculate draft auto --repeat 1 --max_new_tokens 20 --max_seq_len 64 --threads 1"
    files = "--prompts", prompts, "--out", tmp_path / "out.json"
    code, out = run(capsys, "speed", "--checkpoint_path", target, *turns.split(), "--foreign_limit", 99, *files)
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert {r["variant"] for r in result["ratios"]} == {"draft", "auto"} and len(result["ratios"]) == 2 * (4 + 1)
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert "ratio" in out and "commit" in result and result["engine"]["speculate"] == "draft+ngram"


@pytest.mark.parametrize(
    ("command", "flags", "line"),
    [
        ("report", ["--batch_sizes", "0"], "--batch_sizes: must be a whole number (got '0', allowed 1 or more)"),
        ("report", ["--plot", "figure"], "--plot: unknown format (got 'figure', allowed a name in .png, .svg, .pdf)"),
        ("report", ["--prompts", "/nowhere"], "error: /nowhere: cannot be read as UTF-8 text"),
        ("report", ["--max_new_tokens", "96"], "error: max_new_tokens: must be a whole number in range (got 96"),
        ("verify", ["--top_p", "3"], "error: top_p: must be a number in range (got 3.0, allowed 0.0..1.0)"),
        ("speed", ["--useless_draft", "1", "--draft_checkpoint_path", "x"], "--draft_checkpoint_path: has no effect"),
        ("speed", ["--checkpoint_path", "/nowhere"], "error: /nowhere: no such file"),
    ],
)
def test_a_wrong_command_is_one_line(command, flags, line, target, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main([command, "--checkpoint_path", str(target), "--max_seq_len", "96", "--threads", "1", *flags])
    last = capsys.readouterr().err.splitlines()[-1]
    assert line in last


@pytest.mark.slow
def test_several_drafts_in_one_table_with_forced_acceptance(target, prompts, tmp_path, capsys):
    for layers in (1, 2):
        assert run(capsys, "random", "--like", target, "--layers", layers, "--out_dir", tmp_path / f"{layers}")[0] == 0
    models = "--checkpoint_path", target, "--draft_checkpoint_path", tmp_path / "1", tmp_path / "2"
    turns = "--batch_sizes 1 2 --speculate_k 2 --repeat 1 --max_new_tokens 24 --max_seq_len 64 --threads 1"
    forced = "--synthetic_acceptance", 0.7, "--prompts", prompts, "--plot", tmp_path / "plot.png"
    code, out = run(capsys, "report", *models, *turns.split(), *forced)
    assert code == 0 and (tmp_path / "plot.png").is_file()
    lines = out.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "verdict" in line and "draft" in line) + 1 : -1]
    assert [int(line.split()[0]) for line in table] == [1, 1, 2, 2]
    assert all("synthetic acceptance 0.7" in line and ("agrees" in line or "is off by" in line) for line in table)
    drafts = json.loads(lines[-1])["drafts"]
    assert len(drafts) == 2 and all(s["verdict"] for d in drafts for s in d["speeds"])


# ---------------------------------------------------------------------------------- other vocabularies


@pytest.fixture
def other_vocabulary(target, tmp_path):
    """A draft of 161 tokens for a target of 160."""
    draft = write_random_model(target, tmp_path / "like", layers=1)
    values = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**values, "vocab_size": 161}))
    (draft / "manifest.json").write_text(json.dumps({"version": 1, "source": {}, "files": {}}))
    return write_random_model(draft, tmp_path / "other", layers=1)


MISMATCH = r"draft_checkpoint_path: .*vocabulary is not the target's.*got 161, allowed 160"


def test_generate_refuses_a_draft_of_another_vocabulary(target, other_vocabulary, capfd):
    with pytest.raises(SystemExit, match="2"):
        generate.main(["--checkpoint_path", str(target), "--draft_checkpoint_path", str(other_vocabulary)])
    assert re.search(MISMATCH, capfd.readouterr().err)


def test_a_server_refuses_a_draft_of_another_vocabulary(target, other_vocabulary, caplog):
    """The handler's start: a ValueError, and one line for the log that TorchServe and `make serve` show."""
    write_sums(target, {"config.json": target / "config.json"})
    handler = {"checkpoint_path": str(target), "draft_checkpoint_path": str(other_vocabulary), "max_seq_len": 64}
    context = SimpleNamespace(
        system_properties={"model_dir": str(target)},
        manifest={"model": {"modelName": "m"}},
        model_yaml_config={"batchSize": 64, "continuousBatching": True, "responseTimeout": 60, "handler": handler},
    )
    with pytest.raises(ValueError, match=MISMATCH):
        GptFastHandler().initialize(context)
    assert re.search(MISMATCH, caplog.text) and "Traceback" not in caplog.text
