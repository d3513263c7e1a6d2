"""An Engine as a model of lm-evaluation-harness 0.4 (github.com/EleutherAI/lm-evaluation-harness, MIT).

Importing this module needs the harness: pip install 'lm-eval>=0.4.9'.
"""

from __future__ import annotations

from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gpt_fast.config import ConfigError, SamplingParams
from gpt_fast.eval.score import Scorer
from gpt_fast.eval.tasks import find_tasks, task_manager
from gpt_fast.llm import Engine

DEFAULT_GENERATION = 256  # tokens, where a task does not say: the harness's own default
GENERATION_KEYS = {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


class EngineLM(TemplateLM):
    """Log-likelihoods through the model's own prefill forward, generation through its engine; both in batches.

    Tokens are counted and cut as the harness's transformers backend does, so that scores can be compared.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine, self.tokens = engine, engine.tokenizer
        self.scorer = Scorer.beside(engine.core.runner)

    @property
    def eot_token_id(self) -> int:
        return min(self.tokens.eos_ids)

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is conditioned on."""
        return self.eot_token_id if self.tokens.bos_id is None else self.tokens.bos_id

    @property
    def max_length(self) -> int:
        return self.scorer.max_seq_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.tokens.encode(string, add_bos=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation after its context, cut at the left to fit; is it the greedy one?"""
        limit = self.max_length + 1
        longest = max((len(request[2]) for request in requests), default=1)
        if longest > self.max_length:
            raise ConfigError(
                "max_seq_len", "a continuation does not fit", got=longest, allowed=f"at most {self.max_length} tokens"
            )
        rows = [((context + continuation)[-limit:], len(continuation)) for (_text, context, continuation) in requests]
        with tqdm(total=len(rows), desc="scoring", disable=disable_tqdm) as bar:
            scores = self.scorer.score(rows, done=bar.update)
        return [(score.logprob, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, window by window where they are long."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            pairs = [make_disjoint_window(pair) for pair in rolling]
            windows += [(None, *pair) for pair in pairs]
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each context's continuation up to the first stop string. All run together, a slot each as one is free."""
        prompts: list[str | list[int]] = []
        params = []
        for seed, (context, arguments) in enumerate(request.args for request in requests):
            sampling = sampling_params(arguments, seed=seed)
            room = self.engine.core.max_seq_len - sampling.max_new_tokens
            if room < 1:
                raise ConfigError(
                    "max_gen_toks",
                    "leaves no room for a context",
                    got=sampling.max_new_tokens,
                    allowed=f"at most {self.engine.core.max_seq_len - 1}",
                )
            prompts.append(self.tok_encode(context)[-room:])
            params.append(sampling)
        return [answer.text for answer in self.engine.generate(prompts, params)]


def sampling_params(arguments: dict[str, Any], *, seed: int | None = None) -> SamplingParams:
    """A task's generation_kwargs as ours. ConfigError on one that has no counterpart here.

    seed: what samples are drawn from; one that is given comes out the same in every run.
    """
    values: dict[str, Any] = {**normalize_gen_kwargs(arguments, DEFAULT_GENERATION)}
    stop = handle_stop_sequences(values.pop("until", None), eos=None)
    count = values.pop("max_gen_toks")
    for key in values.keys() - GENERATION_KEYS:
        raise ConfigError(f"generation_kwargs.{key}", "unknown key", allowed=", ".join(sorted(GENERATION_KEYS)))
    if not values.pop("do_sample", False):
        values = {"temperature": 0.0}
    return SamplingParams(max_new_tokens=count, stop=tuple(s for s in stop if s), seed=seed, **values)


def evaluate(model: LM, tasks: list[str], *, limit: int | None, num_fewshot: int | None) -> dict[str, Any]:
    """The harness's results: {"results": {task: {metric: value}}, "samples": {task: [...]}, ...}."""
    found: list[Any] = find_tasks(tasks)
    results = simple_evaluate(
        model=model,
        tasks=found,
        task_manager=task_manager(found),
        limit=limit,
        num_fewshot=num_fewshot,
        log_samples=True,
        bootstrap_iters=1000,
    )
    return dict(results or {})
