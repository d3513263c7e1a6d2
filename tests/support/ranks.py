"""Real torchrun ranks for the tests: `run_ranks` starts this file's programs, or a module, on N of them.

A program is called on every rank with the group and a directory; what it returns is that rank's NAME.RANK.json there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIMEOUT = 400  # seconds; each takes a few, on a machine that may be busy


def torchrun(count: int, *command: str, options: Sequence[str] = ("--standalone",)) -> subprocess.Popen[str]:
    """Start `count` ranks of a command that torchrun takes; its output is piped."""
    launch = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc_per_node", str(count)]
    return subprocess.Popen(
        [*launch, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def two_agents(counts: tuple[int, int], port: int, *command: str) -> list[subprocess.Popen[str]]:
    """torchrun twice, as on two machines of so many ranks each, which meet at a port of this one."""
    options = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    return [torchrun(count, *command, options=[*options, "--local-addr", "127.0.0.1"]) for count in counts]


def run_ranks(count: int, *command: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Start them, type what is given and wait for all to end."""
    process = torchrun(count, *command)
    try:
        out, err = process.communicate(given, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # torchrun ends its ranks
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run_program(count: int, name: str, directory: Path) -> list[Any]:
    """What the program returned, rank by rank."""
    done = run_ranks(count, __file__, name, str(directory))
    assert done.returncode == 0, done.stderr
    return [json.loads((directory / f"{name}.{rank}.json").read_text()) for rank in range(count)]


# ------------------------------------------------------------------------------------------ programs

BIASES = {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}
EXPERTS = {"n_expert": 4, "n_expert_per_token": 2}
SIZES = {"head_dim": 32, "intermediate_size": 192, "max_position": 128}
UNTIED = {"tie_embeddings": False}
THREE = {"n_head": 9, "n_kv_head": 3}  # SmolLM2-135M's heads
ODD = {"n_head": 7, "n_kv_head": 1, "head_dim": 24, "intermediate_size": 161, "vocab_size": 97}
# name -> (changes of the small model, quantization (mode, group size), dtype, the cache's dtype)
CASES: Mapping[str, tuple[dict[str, Any], tuple[str, int] | None, str, str]] = {
    "gqa": ({}, None, "float32", "float32"),
    "untied": (UNTIED, None, "float32", "float32"),
    "mha": ({"n_kv_head": 4}, None, "float32", "float32"),
    "biases": (BIASES, None, "float32", "float32"),
    "qk_norm": ({"qk_norm": True}, None, "float32", "float32"),
    "window": ({"sliding_window": 7, "sliding_layers": (1,)}, None, "float32", "float32"),
    "partial_rope": ({"rope_dim": 16}, None, "float32", "float32"),
    "experts": (EXPERTS | UNTIED, None, "float32", "float32"),
    "int8_cache": ({}, None, "float32", "int8"),
    "bfloat16": ({}, None, "bfloat16", "bfloat16"),
    "int8": ({}, ("int8", 0), "float32", "float32"),
    "int8_untied_biases": (UNTIED | BIASES, ("int8", 0), "float32", "float32"),
    "int8_bfloat16": (UNTIED, ("int8", 0), "bfloat16", "bfloat16"),
    "int8_experts": (EXPERTS, ("int8", 0), "float32", "float32"),
    "int4": ({}, ("int4", 32), "float32", "float32"),
    "int4_untied_biases": (UNTIED | BIASES, ("int4", 32), "float32", "float32"),
    "int4_smaller_groups": (UNTIED, ("int4", 64), "float32", "float32"),  # 192 inputs are cut at 96
    "int4_experts": (EXPERTS, ("int4", 32), "float32", "float32"),
}
# Sizes that ranks do not divide, and fewer KV heads than ranks.
ODD_CASES: Mapping[str, tuple[dict[str, Any], tuple[str, int] | None, str, str]] = {
    "three_kv_heads": (THREE | BIASES, None, "float32", "float32"),
    "three_kv_heads_int8": (THREE | {"qk_norm": True}, ("int8", 0), "float32", "int8"),
    "three_kv_heads_int4": (THREE | UNTIED, ("int4", 64), "float32", "float32"),
    "odd": (ODD, None, "float32", "float32"),
    "odd_untied": (ODD | UNTIED | BIASES | {"n_head": 10, "n_kv_head": 5}, None, "float32", "float32"),
    "odd_int8": (ODD | UNTIED | BIASES, ("int8", 0), "float32", "float32"),
    "odd_int8_tied": (ODD, ("int8", 0), "bfloat16", "bfloat16"),
    "odd_int4": (ODD | {"intermediate_size": 166}, ("int4", 32), "float32", "float32"),  # heads of 24: groups are cut
    "odd_experts": (ODD | EXPERTS | UNTIED, None, "float32", "float32"),
}


def built(changes: Mapping[str, Any], quantization: tuple[str, int] | None, dtype: str) -> Any:
    """The same model on every rank, with room for 128 positions."""
    import torch

    from support.quantized import CPU, quantized_model, random_model, small_config

    model = random_model(small_config(**SIZES | changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    if quantization is not None:
        model = quantized_model(model, mode=quantization[0], groupsize=quantization[1])
    model = model.to(getattr(torch, dtype))
    model.setup_rope(128, CPU)
    return model


def small_models(group: Any, _directory: Path) -> dict[str, Any]:
    return whole_and_sharded(group, CASES)


def odd_models(group: Any, _directory: Path) -> dict[str, Any]:
    return whole_and_sharded(group, ODD_CASES)


def whole_and_sharded(group: Any, cases: Mapping[str, Any]) -> dict[str, Any]:
    """Each case's logits and generated tokens, whole and sharded."""
    import torch

    from gpt_fast.model.parallel import shard
    from gpt_fast.quantize.linear import pack

    found = {}
    for name, (changes, quantization, dtype, cache_dtype) in cases.items():
        whole, share, exact = (built(changes, quantization, dtype) for _ in range(3))
        exact = exact.to(torch.float32)  # the same weights
        shard(share, group.ranks)
        for model in (whole, share):
            pack(model)
        found[name] = {
            **logits_figures(whole, share, exact, cache_dtype),
            "tokens": [generated(whole, cache_dtype), generated(share, cache_dtype, group)],
            "elements": [held(model) for model in (whole, share)],
            "config": [share.config.n_head, share.config.n_kv_head, share.config.intermediate_size],
        }
    return found


def logits_figures(whole: Any, share: Any, exact: Any, cache_dtype: str) -> dict[str, Any]:
    """Of a prefill of 60 tokens and a step after it: how far whole and share are apart, whole and float32's logits.

    difference: the largest, relative to the largest logit. apart, rounding: norms, relative to that of all logits.
    """
    import torch

    from gpt_fast.model.cache import KVCache
    from gpt_fast.model.forward import Batch
    from support.quantized import CPU

    tokens_BS = torch.randint(0, 96, (2, 61), generator=torch.Generator().manual_seed(3))
    positions_BS = torch.arange(61).repeat(2, 1)
    found = []
    for model, dtype in ((exact, "float32"), (whole, cache_dtype), (share, cache_dtype)):
        cache = KVCache(model.config, slots=2, max_seq_len=128, dtype=getattr(torch, dtype), device=CPU)
        with torch.inference_mode():
            first_BSV = model(Batch(tokens_BS[:, :60], positions_BS[:, :60], cache, length=64))
            last_B1V = model(Batch(tokens_BS[:, 60:], positions_BS[:, 60:], cache, length=64))
        found.append(torch.cat((first_BSV, last_B1V), dim=1))
    digest = hashlib.sha256(found[2].numpy().tobytes()).hexdigest()
    return {
        "difference": float((found[1] - found[2]).abs().max() / found[1].abs().max()),
        "apart": float((found[1] - found[2]).norm() / found[0].norm()),
        "rounding": float((found[1] - found[0]).norm() / found[0].norm()),
        "sha256": digest,
        "cache_bytes": cache.nbytes,
    }


def generated(model: Any, cache_dtype: str, group: Any = None) -> list[list[int]]:
    """What six requests get from three slots, prompts in chunks beside running rows; the last two are sampled.

    With a group, rank 0 leads and the others, who follow, return nothing.
    """
    import torch

    from gpt_fast.config import SamplingParams
    from gpt_fast.engine.core import EngineCore
    from gpt_fast.engine.runner import Runner
    from gpt_fast.model.cache import KVCache
    from support.quantized import CPU

    cache = KVCache(model.config, slots=3, max_seq_len=100, dtype=getattr(torch, cache_dtype), device=CPU)
    if group is not None and not group.leads:
        follow_once(group, [model], [cache])
        return []
    forward, cache = led(group, model, cache)
    core = EngineCore(Runner(decode=forward, prefill=forward, cache=cache, eos_ids=(), prefill_chunk=16))
    answers: dict[str, list[int]] = {}
    for i in range(6):
        params = SamplingParams(max_new_tokens=6 + 5 * i, temperature=float(i > 3), seed=i)
        core.add(str(i), [(7 * i + j * j) % 96 for j in range(3 + 9 * i)], params)
        answers[str(i)] = []
    while not core.idle:
        for event in core.step():
            answers[event.request_id].append(event.token)
    if group is not None:
        group.plans.end()
    return list(answers.values())


def led(group: Any, model: Any, cache: Any) -> tuple[Any, Any]:
    """A forward and a cache, as they are or rank 0's of a group."""
    from gpt_fast.engine.lead import Leader

    if group is None:
        return model, cache
    leader = Leader(group.plans)
    return leader.forward(model), leader.cache(cache)


def follow_once(group: Any, forwards: list[Any], caches: list[Any]) -> None:
    from gpt_fast.engine.lead import follow

    follow(group.plans, forwards, caches)


def held(model: Any) -> int:
    """Elements of all weights, as they are held."""
    tensors = {t.data_ptr(): t.numel() for t in (*model.parameters(), *model.buffers()) if t is not None}
    return sum(tensors.values())


def evaluation(group: Any, directory: Path) -> list[Any]:
    """The samples of the evaluations that directory/evaluation.json lists; only rank 0 has some."""
    asked = json.loads((directory / "evaluation.json").read_text())
    return [samples(group, **each) for each in asked]


def samples(group: Any, *, tasks: list[str], limit: int, **options: Any) -> Any:
    """task -> document -> [answers of the model, as the harness keeps them]; group None: in this process alone."""
    os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"  # before the harness is imported
    from gpt_fast.eval.harness import EngineLM, evaluate

    with engine_of(group, kernels="plain", max_seq_len=512, threads=1, **options) as engine:
        if engine is None:
            return None
        results = evaluate(EngineLM(engine), tasks, limit=limit, num_fewshot=None)
    return {
        task: {str(row["doc_id"]): [response[0] for response in row["resps"]] for row in rows}
        for task, rows in results.get("samples", {}).items()
    }


def memory(group: Any, directory: Path) -> dict[str, int]:
    """Bytes of this process: its peak before the load of directory/checkpoint and after it, and what its share has.

    The first load of another model brings in what every load does: code, and threads' own memory.
    """
    from gpt_fast.load.engine import load_model
    from gpt_fast.measure.machine import peak_rss_bytes

    load_model(str(directory / "first"), device="cpu", dtype="auto", group=group)
    before = peak_rss_bytes()
    model = load_model(
        json.loads((directory / "memory.json").read_text()), device="cpu", dtype="auto", group=group
    ).model
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return {"before": before, "after": peak_rss_bytes(), "share": sum(tensors.values())}


@contextmanager
def engine_of(group: Any, **options: Any) -> Iterator[Any]:
    """An engine of this process, or of all ranks of a group: on those that follow rank 0 None, after they have."""
    from gpt_fast.config import EngineConfig
    from gpt_fast.llm import Engine
    from gpt_fast.load.engine import load_parts, start_following

    config = EngineConfig(device="cpu", **options)
    if group is not None and not group.leads:
        start_following(config, group)()
        yield None
        return
    yield Engine(load_parts(config, group))
    if group is not None:
        group.plans.end()


def engines(group: Any, directory: Path) -> list[Any]:
    """What the engines that directory/engines.json lists answer; only rank 0 has something."""
    return [company(group, **options) for options in json.loads((directory / "engines.json").read_text())]


class Even:
    """A Guide: every other token may come."""

    def allowed(self, output: Sequence[int]) -> bytes:
        return bytes(i % 2 == 0 for i in range(260))


def company(group: Any, **options: Any) -> Any:
    """Requests of every kind beside each other, in fewer slots: [text, tokens, log-probabilities] of each.

    greedy, sampled, edited, guided; prompts that share a beginning, in chunks; one is dropped on its way.
    """
    from gpt_fast.config import SamplingParams

    with engine_of(group, max_num_seqs=3, prefill_chunk=16, dtype="float32", **options) as engine:
        if engine is None:
            return None
        start = "one two three, one two three, one two three, "
        kinds: list[dict[str, Any]] = [
            {"logprobs": 2}, {"temperature": 0.9, "seed": 7}, {"repetition_penalty": 1.3}, {"guide": Even()},
            {"temperature": 0.7, "seed": 8, "top_k": 20, "logprobs": 0}, {"stop": ("e",)}, {"logit_bias": {101: 50.0}},
        ]  # fmt: skip
        found: dict[str, Any] = {}
        for index, kind in enumerate(kinds):
            prompt = engine.encode(start * (index % 3) + f"{index} one two")
            engine.add(str(index), prompt, SamplingParams(max_new_tokens=24, **kind))
            found[str(index)] = ["", [], []]
        while not engine.idle:
            for event in engine.step():
                text, tokens, logprobs = found[event.request_id]
                found[event.request_id][0] = text + event.text
                tokens.append(event.token)
                logprobs.append([value for _, value in event.logprobs])
                if event.request_id == "2" and len(tokens) == 5:
                    engine.abort("2")
        totals = engine.speculation_totals()
        return {"answers": found, "accepted": totals.accepted if totals else None, "path": engine.description.path}


class Eager:
    """A sharded model as a Startable, which computes at once: what a fused decoder of a share does by and by."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, batch: Any) -> Any:
        return self.model(batch)

    def start(self, batch: Any, *, after: Any = None, best_only: bool = False) -> Any:
        if after is not None:
            batch = dataclasses.replace(batch, tokens_BS=after.best()[:, None])
        return Done(self.model(batch))


class Done:
    latest = True

    def __init__(self, logits: Any) -> None:
        self.logits = logits

    def result(self) -> Any:
        return self.logits

    def best(self) -> Any:
        return self.logits.argmax(-1)


def steps_begun(group: Any, _directory: Path) -> Any:
    """Tokens of a whole model, and of a sharded one whose steps are begun before they are planned."""
    import torch

    from gpt_fast.config import SamplingParams
    from gpt_fast.engine.core import EngineCore
    from gpt_fast.engine.overlap_runner import OverlapRunner
    from gpt_fast.model.cache import KVCache
    from gpt_fast.model.parallel import shard
    from support.quantized import CPU

    whole, share = built({}, None, "float32"), built({}, None, "float32")
    shard(share, group.ranks)
    found = []
    for model, who in ((whole, None), (share, group)):
        cache = KVCache(model.config, slots=3, max_seq_len=100, dtype=torch.float32, device=CPU)
        if who is not None and not who.leads:
            follow_once(who, [Eager(model)], [cache])
            continue
        forward, cache = led(who, Eager(model), cache)
        core = EngineCore(OverlapRunner(decode=forward, prefill=forward, cache=cache, eos_ids=(), prefill_chunk=16))
        answers: dict[str, list[int]] = {}
        for i in range(6):
            answers[str(i)] = []
            prompt = [(j * j) % 96 for j in range(20)] + [i] * (1 + 9 * (i % 3))
            core.add(str(i), prompt, SamplingParams(max_new_tokens=8 + 5 * i, temperature=float(i == 4), seed=i))
        while not core.idle:
            for event in core.step():
                answers[event.request_id].append(event.token)
        found.append(list(answers.values()))
    if group.leads:
        group.plans.end()
    return found


def cache_operations(group: Any, _directory: Path) -> Any:
    """Logits [of a whole model, of a sharded one] after all that can be done to a cache. Token 95 is not a number."""
    import torch

    from gpt_fast.model.cache import KVCache
    from gpt_fast.model.forward import Batch
    from gpt_fast.model.parallel import shard
    from support.quantized import CPU

    whole, share = built(UNTIED, None, "float32"), built(UNTIED, None, "float32")
    for model in (whole, share):
        model.tok_embeddings.weight[95] = float("nan")
    shard(share, group.ranks)
    found = []
    for model, who in ((whole, None), (share, group)):
        cache = KVCache(model.config, slots=3, max_seq_len=100, dtype=torch.float32, device=CPU)
        if who is not None and not who.leads:
            follow_once(who, [model], [cache])
            continue
        forward, cache = led(who, model, cache)
        with torch.inference_mode():
            forward(Batch(torch.arange(80).view(2, 40), torch.arange(40).repeat(2, 1), cache, length=64))
            forward(Batch(torch.full((2, 1), 95), torch.full((2, 1), 40), cache, length=64))
            cache.remove_nan(1, 64)
            cache.copy_prefix(source=1, target=2, length=41)
            cache.clear(0)
            after = Batch(torch.full((3, 1), 5), torch.full((3, 1), 41), cache, length=64)
            seen = [forward(after), forward(dataclasses.replace(after, cache=cache.another())), forward(after)]
        found.append([logits.flatten().tolist() for logits in seen])
    if group.leads:
        group.plans.end()
    return found


def failure(group: Any, _directory: Path) -> None:
    """Rank 1 fails while the others wait for it."""
    import torch

    from gpt_fast.model.parallel import all_reduce

    if group.ranks.rank == 1:
        time.sleep(0.5)
        sys.exit("error: rank 1 has had enough")
    all_reduce(torch.ones(1))


def disagreement(group: Any, directory: Path) -> None:
    """Rank 1 holds a KV cache of other elements than rank 0."""
    from gpt_fast.config import EngineConfig
    from gpt_fast.load.engine import load_parts, start_following

    checkpoint = (directory / "checkpoint").read_text()
    config = EngineConfig(checkpoint_path=checkpoint, device="cpu", kv_cache=("float32", "int8")[group.ranks.rank])
    load_parts(config, group) if group.leads else start_following(config, group)()


def waiting(group: Any, directory: Path) -> None:
    """Every rank notes its process and stays."""
    (directory / f"pid.{group.ranks.rank}").write_text(str(os.getpid()))
    time.sleep(TIMEOUT)


PROGRAMS: Mapping[str, Callable[[Any, Path], Any]] = {
    f.__name__: f
    for f in (
        small_models,
        odd_models,
        evaluation,
        engines,
        steps_begun,
        cache_operations,
        memory,
        failure,
        waiting,
        disagreement,
    )
}


def main() -> None:
    from gpt_fast.engine.ranks import join

    name, directory = sys.argv[1], Path(sys.argv[2])
    group = join()
    with group.one_voice():
        result = PROGRAMS[name](group, directory)
        (directory / f"{name}.{group.ranks.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it, to find support
    main()
