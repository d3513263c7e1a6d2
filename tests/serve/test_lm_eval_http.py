"""lm-evaluation-harness's `local-completions` over a real server: the scores of the harness in this process."""

from __future__ import annotations

import os

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"  # before the harness is imported

import pytest
import yaml

from support.server import ROOT, shared_server

pytestmark = [pytest.mark.server, pytest.mark.model]
TASKS = ["basics", "basics_perplexity"]


def scores(model):
    """The accuracy and perplexity of some documents, and every log-likelihood with whether it is the greedy one."""
    from gpt_fast.eval.harness import evaluate

    results = evaluate(model, TASKS, limit=6, num_fewshot=0)
    told = [sample["filtered_resps"] for task in TASKS for sample in results["samples"][task]]
    return results["results"], [each for row in told for each in row]


def test_loglikelihoods_are_those_of_the_harness_in_process(default_checkpoint):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from gpt_fast.eval.harness import EngineLM
    from gpt_fast.llm import Engine

    weights = yaml.safe_load((ROOT / "model_config.yaml").read_text())["handler"]["checkpoint_path"]
    local, local_rows = scores(EngineLM(Engine.load(ROOT / weights, max_num_seqs=4)))
    remote = LocalCompletionsAPI(
        base_url=f"{shared_server().base_url}/completions",
        model="gpt-fast",
        tokenizer=str(default_checkpoint),
        tokenizer_backend="huggingface",
        batch_size=8,
    )
    served, served_rows = scores(remote)
    assert len(served_rows) == len(local_rows) == 6 * 4 + 6
    for ours, theirs in zip(local_rows, served_rows, strict=True):
        if isinstance(ours, tuple):
            assert theirs[0] == pytest.approx(ours[0], abs=1e-3) and theirs[1] is ours[1]
        else:
            assert float(theirs) == pytest.approx(float(ours), abs=1e-3)
    for task in TASKS:
        assert served[task] == pytest.approx(local[task], abs=1e-3)
