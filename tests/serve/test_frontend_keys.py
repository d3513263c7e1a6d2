"""Every key of model_config.yaml that TorchServe would take for absent, or hang with, is refused by name."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gpt_fast.serve.frontend_keys import KEYS, check_frontend_keys, parse
from support.paths import ROOT

SHIPPED = sorted([ROOT / "model_config.yaml", *(ROOT / "configs").glob("*.yaml")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_fine(path: Path) -> None:
    assert check_frontend_keys(parse(path.read_text())) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("minWorkers", "2"),
        ("minWorkers", "'1'"),
        ("minWorkers", "true"),
        ("maxWorkers", "4"),
        ("batchSize", "0"),
        ("batchSize", "8.0"),
        ("maxBatchDelay", "-1"),
        ("responseTimeout", "0"),
        ("responseTimeout", "60s"),
        ("startupTimeout", "1h"),
        ("maxRetryTimeoutInSec", "0"),
        ("deviceType", "tpu"),
        ("deviceType", "GPU"),
        ("deviceIds", "0"),
        ("continuousBatching", "false"),
        ("continuousBatching", "'true'"),
        ("asyncCommunication", "true"),
        ("sequenceBatching", "true"),
        ("useJobTicket", "true"),
        ("useVenv", "true"),
        ("parallelType", "tp"),
        ("parallelLevel", "2"),
        ("torchrun", "{nproc-per-node: 2}"),
        ("jobQueueSize", "0"),
        ("clientTimeoutInMills", "-1"),
    ],
)
def test_a_value_that_torchserve_would_not_use_is_refused(key: str, value: str) -> None:
    (problem,) = check_frontend_keys(parse(f"{key}: {value}"))
    assert problem.startswith(f"{key}: ") and f"(got {yaml.safe_load(value)!r}, allowed " in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parallelType: tp\ntorchrun: {nproc-per-node: 1}", None),
        ("parallelType: tp\nparallelLevel: 1\ntorchrun: {nproc-per-node: 1}", None),
        ("parallelType: tp\ndeviceType: gpu\ntorchrun: {nproc-per-node: 8}", None),
        (
            "parallelType: pp\ntorchrun: {nproc-per-node: 1}",
            "parallelType: tensor parallelism is the only",
        ),
        (
            "parallelType: tp\ntorchrun: {}",
            "torchrun.nproc-per-node: not as many ranks as can run (got None",
        ),
        ("parallelType: tp\ntorchrun: {nproc-per-node: '2'}", "torchrun.nproc-per-node: not as many ranks as can run"),
        ("parallelType: tp\ntorchrun: {nproc-per-node: 4000}", "torchrun.nproc-per-node: not as many ranks as can run"),
        (
            "parallelType: tp\nparallelLevel: 3\ntorchrun: {nproc-per-node: 1}",
            "parallelLevel: is not torchrun.nproc",
        ),
        ("parallelType: tp\ntorchrun: {nproc-per-node: 1, nnodes: 2}", "torchrun.nnodes: is not used (got 2, allowed "),
    ],
)
def test_ranks_are_asked_for_as_torchserve_starts_them(text: str, message: str | None) -> None:
    problems = check_frontend_keys(parse(text))
    assert len(problems) == (message is not None) and all(message in problem for problem in problems)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("minworkers", "minWorkers"), ("batch_size", "batchSize"), ("startup_timeout", "startupTimeout"), ("xyz", "")],
)
def test_an_unknown_key_is_refused_and_the_nearest_named(name: str, meant: str) -> None:
    (problem,) = check_frontend_keys(parse(f"{name}: 1"))
    assert problem.startswith(f"{name}: no such key") and (f"did you mean {meant}?" in problem) == bool(meant)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchSize: 4\nbatchSize: 8\n", r"batchSize: given twice \(line 2\)"),
        ("handler:\n  dtype: auto\n  dtype: float32\n", r"dtype: given twice \(line 3\)"),
        ("a: [", "not YAML"),
        ("? [a]\n: 1\n", "not YAML"),
        ("- 1", "must be a mapping"),
        ("", "must be a mapping"),
    ],
)
def test_a_text_that_says_two_things_or_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse(text)
    assert "\n" not in str(error.value)


def test_every_key_of_torchserve_is_known() -> None:
    """The names in TorchServe's own ModelConfig class, as its jar has them; those of other transports are refused."""
    import re
    import zipfile

    import ts

    jar = zipfile.ZipFile(next((Path(ts.__file__).parent / "frontend").glob("*.jar")))
    names = set(re.findall(rb"[a-z]\w+", jar.read("org/pytorch/serve/archive/model/ModelConfig.class")))
    assert {key for key in KEYS if key != "handler"} <= {name.decode() for name in names}


@pytest.mark.parametrize(
    ("shipped", "changed", "lines"),
    [
        ("minWorkers: 1", "minWorkers: 2", ["minWorkers: one worker holds the model"]),
        ("continuousBatching: true\n", "", ["continuousBatching: must be on"]),
        ("max_num_seqs: 16", "max_num_seqs: 64", ["batchSize: must be above handler.max_num_seqs"]),
        ("max_num_seqs: 16", "max_num_seq: 16", ["handler.max_num_seq: unknown key"]),
        ("dtype: auto", "dtype: float64", ["dtype: "]),
        (
            "deviceType: cpu",
            "deviceType: tpu\nminworkers: 1\nresponseTimout: 5",
            ["deviceType: ", "minworkers: no such key, did you mean minWorkers?", "responseTimout: no such key"],
        ),
    ],
)
def test_the_archiver_stops_before_anything_is_built(
    tmp_path: Path, shipped: str, changed: str, lines: list[str]
) -> None:
    config = tmp_path / "model_config.yaml"
    text = (ROOT / "model_config.yaml").read_text()
    assert shipped in text
    config.write_text(text.replace(shipped, changed))
    command = [sys.executable, str(ROOT / "scripts/archive.py"), "--config", str(config)]
    command += ["--model-store", str(tmp_path / "store"), "--work-dir", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    said = done.stderr.removeprefix("archive: model_config.yaml: ").split("; ")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == [config]
    assert len(said) == len(lines) and all(map(str.startswith, said, lines))
