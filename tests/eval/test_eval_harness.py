"""lm-evaluation-harness over our engine, offline: scores by hand, shipped tasks, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"  # before the harness is imported

import pytest
import torch
from lm_eval.api.instance import Instance

from gpt_fast.config import ConfigError, SamplingParams
from gpt_fast.convert.quantized import quantize_checkpoint
from gpt_fast.eval.__main__ import main
from gpt_fast.eval.harness import EngineLM, evaluate, sampling_params
from gpt_fast.eval.tasks import SHIPPED, find_tasks, load_tasks, task_text
from gpt_fast.load.checkpoint import load_checkpoint
from support.quantized import random_model, small_config, write_checkpoint
from support.tiny_engine import EOS, tiny_engine

pytestmark = pytest.mark.slow  # imports lm-evaluation-harness


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.fixture(scope="module")
def lm():
    return EngineLM(tiny_engine(slots=3, max_seq_len=64))


def by_hand(lm, tokens, count):
    scorer = lm.scorer
    ((_, logits),) = scorer.logits([tokens[:-1]])
    logprobs = logits[0].log_softmax(-1)
    return sum(float(logprobs[i, tokens[i + 1]]) for i in range(len(tokens) - 1 - count, len(tokens) - 1))


def test_loglikelihoods_in_batches_are_those_of_each_alone(lm):
    pairs = [("The sky is", " blue"), ("a", "b"), ("One two", " three four five"), ("x" * 70, "yz")]
    got = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (logprob, _) in zip(pairs, got, strict=True):
        tokens = list((context + continuation).encode())[-65:]  # cut at the left to what the context holds
        assert logprob == pytest.approx(by_hand(lm, tokens, len(continuation)), abs=1e-3)


def test_an_empty_context_is_the_end_token(lm):
    ((logprob, _),) = lm.loglikelihood([request("loglikelihood", "", "ab")], disable_tqdm=True)
    assert logprob == pytest.approx(by_hand(lm, [EOS, *b"ab"], 2), abs=1e-3)


def test_rolling_windows_predict_every_token_once(lm):
    text = "A text that is longer than the sixty-four tokens which the cache of this engine can hold at once."
    got = lm.loglikelihood_rolling(
        [request("loglikelihood_rolling", text), request("loglikelihood_rolling", "hi")], True
    )
    tokens = [EOS, *text.encode()]
    # The harness's rule: full windows, then one that ends with the text and scores only what is left.
    rest = len(tokens) - 1 - 64
    expected = by_hand(lm, tokens[:65], 64) + by_hand(lm, tokens[-65:], rest)
    assert got[0] == pytest.approx(expected, abs=1e-2)
    assert got[1] == pytest.approx(by_hand(lm, [EOS, *b"hi"], 2), abs=1e-3)


def test_generation_is_the_engines_and_stops_where_told(lm):
    contexts = ["Hello", "Once upon a time", "1 + 1 ="]
    arguments = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    got = lm.generate_until([request("generate_until", c, arguments) for c in contexts], disable_tqdm=True)
    params = SamplingParams(max_new_tokens=12, stop=("\n",))
    assert got == ["".join(lm.engine.stream(c, max_new_tokens=12, stop=("\n",))) for c in contexts]
    assert params == sampling_params(arguments)


def test_generation_arguments():
    assert sampling_params({"until": "x"}) == SamplingParams(max_new_tokens=256, stop=("x",))
    sampled = sampling_params({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 5})
    assert (sampled.temperature, sampled.top_p, sampled.max_new_tokens) == (0.7, 0.9, 5)
    with pytest.raises(ConfigError, match=r"generation_kwargs\.num_beams: unknown key"):
        sampling_params({"num_beams": 4})


def test_a_generation_without_room_for_its_context_is_refused(lm):
    with pytest.raises(ConfigError, match=r"max_gen_toks: leaves no room for a context \(got 64, allowed at most 63\)"):
        lm.generate_until([request("generate_until", "a", {"until": [], "max_gen_toks": 64})])


# -------------------------------------------------------------------------------------------- tasks


def test_shipped_tasks_are_offline_and_well_formed():
    documents = [json.loads(line) for line in (SHIPPED / "basics.jsonl").read_text().splitlines()]
    assert len(documents) == 200
    assert all(len(set(d["choices"])) == 4 and 0 <= d["answer"] < 4 for d in documents)
    assert sorted(load_tasks(["basics", "basics_generate", "basics_perplexity"])) == [
        "basics",
        "basics_generate",
        "basics_perplexity",
    ]


def test_a_task_file_finds_its_data_beside_it(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"q": "2 + 2 =", "a": "4"}\n')
    path = tmp_path / "mine.yaml"
    path.write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: mine.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
    )
    (config,) = find_tasks([str(path)])
    assert config["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "mine.jsonl")}
    assert task_text([str(path)]).content == "2 + 2 = 4"


def test_unknown_tasks_and_bad_files_are_refused_by_name(tmp_path):
    with pytest.raises(
        ConfigError, match=r"tasks: unknown task \(got 'hellaswagg', allowed .* basics, .* or a .yaml file"
    ):
        load_tasks(["hellaswagg"])
    with pytest.raises(ConfigError, match=r"tasks: .*none\.yaml cannot be read"):
        load_tasks([str(tmp_path / "none.yaml")])
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match=r"must be a YAML object with a `task` name"):
        load_tasks([str(tmp_path / "list.yaml")])


def test_a_multiple_choice_task_calibrates_with_its_right_answers():
    text = task_text(["basics"])
    first = json.loads((SHIPPED / "basics.jsonl").read_text().splitlines()[0])
    assert text.content.split("\n\n")[0] == f"{first['question']} {first['choices'][first['answer']]}"
    assert text.source == "basics" and len(text.sha256) == 64


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    model = random_model(small_config(vocab_size=257, max_position=256))
    return write_checkpoint(tmp_path_factory.mktemp("harness"), model, tokenizer=True)


@pytest.mark.parametrize(("mode", "kv_cache"), [(None, "auto"), ("int8", "int8"), ("int4", "auto")])
def test_the_command_scores_all_three_kinds_of_task(mode, kv_cache, checkpoint, capsys):
    path = checkpoint if mode is None else quantize_checkpoint(checkpoint, mode=mode)
    tasks = ["basics", "basics_generate", "basics_perplexity"]
    flags = ["--limit", "6", "--dtype", "float32", "--kv_cache", kv_cache]
    main(["--checkpoint_path", str(path), "--tasks", *tasks, *flags])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sorted(result["results"]) == tasks and result["limit"] == 6
    assert 0 <= result["results"]["basics"]["acc,none"] <= 1
    assert result["results"]["basics_perplexity"]["byte_perplexity,none"] > 1


def test_the_command_needs_a_checkpoint_or_a_quality(capsys):
    with pytest.raises(SystemExit):
        main(["--tasks", "basics"])
    assert "give either --checkpoint_path with --tasks, or --quality" in capsys.readouterr().err


def test_scores_are_those_of_direct_evaluation(checkpoint):
    """Choices by the harness are argmax over log-likelihoods by the model's own logits."""
    from gpt_fast.llm import Engine

    lm = EngineLM(Engine.load(str(checkpoint), dtype="float32", max_num_seqs=4, device="cpu"))
    samples = evaluate(lm, ["basics"], limit=5, num_fewshot=None)["samples"]["basics"]
    for sample in samples:
        document = sample["doc"]
        context = list(document["question"].encode())
        scores = []
        for choice in document["choices"]:
            tokens = [*context, *f" {choice}".encode()]
            scores.append(by_hand(lm, tokens, len(tokens) - len(context)))
        got = torch.tensor([float(r[0][0]) for r in sample["resps"]])
        torch.testing.assert_close(got, torch.tensor(scores), rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------- against the harness's own backend


def transformers_backend(directory: Path):
    """The default model in transformers, behind the harness's own HFLM."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(hugging_face_state(directory), strict=False)
    assert not unexpected and missing in ([], ["lm_head.weight"])
    model.tie_weights()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, max_length=512)


def hugging_face_state(directory: Path) -> dict[str, torch.Tensor]:
    """The converted checkpoint under transformers' names, queries and keys back in half-split RoPE order."""
    loaded = load_checkpoint(directory, device="cpu", dtype=torch.float32)
    config, state = loaded.config, {}
    q, kv = config.n_head * config.head_dim, config.kv_dim

    def half_split(rows):
        return rows.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    for i, layer in enumerate(loaded.model.layers):
        prefix = f"model.layers.{i}."
        three = layer.attention.wqkv.weight.split((q, kv, kv))
        named = {"q": half_split(three[0]), "k": half_split(three[1]), "v": three[2], "o": layer.attention.wo.weight}
        state |= {f"{prefix}self_attn.{name}_proj.weight": weight for name, weight in named.items()}
        mlp = {"gate": "w1", "up": "w3", "down": "w2"}
        state |= {f"{prefix}mlp.{t}_proj.weight": getattr(layer.feed_forward, w).weight for t, w in mlp.items()}
        state[f"{prefix}input_layernorm.weight"] = layer.attention_norm.weight
        state[f"{prefix}post_attention_layernorm.weight"] = layer.ffn_norm.weight
    state["model.norm.weight"] = loaded.model.norm.weight
    return state | {"model.embed_tokens.weight": loaded.model.tok_embeddings.weight}


@pytest.mark.nightly
@pytest.mark.model
def test_the_default_model_answers_200_questions_as_transformers_does(default_checkpoint):
    from gpt_fast.llm import Engine

    options = {"dtype": "float32", "device": "cpu", "max_num_seqs": 16, "max_seq_len": 512}
    ours = evaluate(EngineLM(Engine.load(str(default_checkpoint), **options)), ["basics"], limit=None, num_fewshot=None)
    theirs = evaluate(transformers_backend(default_checkpoint), ["basics"], limit=None, num_fewshot=None)
    rows = [
        {
            sample["doc_id"]: torch.tensor([float(r[0][0]) for r in sample["resps"]])
            for sample in result["samples"]["basics"]
        }
        for result in (ours, theirs)
    ]
    assert rows[0].keys() == rows[1].keys() and len(rows[0]) == 200
    same = [int(rows[0][i].argmax()) == int(rows[1][i].argmax()) for i in rows[0]]
    furthest = max(float((rows[0][i] - rows[1][i]).abs().max()) for i in rows[0])
    print(f"{sum(same)} of 200 choices equal, log-likelihoods within {furthest:.2g}")
    assert sum(same) >= 198 and furthest < 1e-2


def test_data_that_is_nowhere_is_one_line(capfd):
    message = "tasks: the data of hellaswag is not on this machine, and HF_HUB_OFFLINE is set"
    with pytest.raises(ConfigError) as caught:
        load_tasks(["hellaswag"])
    assert str(caught.value) == message
    with pytest.raises(SystemExit):
        main(["--checkpoint_path", "/nowhere", "--tasks", "hellaswag"])
    assert capfd.readouterr().err.splitlines()[-1] == f"error: {message}"
