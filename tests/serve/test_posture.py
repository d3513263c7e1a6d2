"""doctor: each thing that makes a server less safe is one line, and a plain one has none."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt_fast.serve import startup_check
from gpt_fast.serve.startup_check import check_properties
from gpt_fast.torchserve import posture
from gpt_fast.torchserve.posture import check_posture
from support.paths import ROOT

SHIPPED = (ROOT / "deploy" / "config.properties").read_text(encoding="latin-1")


def problems(tmp_path: Path, properties: str = SHIPPED, *, lock: str = "", user: int = 1000) -> list[str]:
    (tmp_path / "requirements.lock").write_text(lock)
    return check_posture(properties, run_dir=tmp_path, lock=tmp_path / "requirements.lock", checkpoint=None, user=user)


def test_what_we_ship_has_none(tmp_path):
    assert problems(tmp_path) == check_properties(SHIPPED) == []


@pytest.mark.parametrize(
    ("added", "named"),
    [
        ("enable_model_api=true\n", ["enable_model_api"]),
        ("allowed_urls=.*\n", ["allowed_urls"]),
        ("allowed_urls=file://.*,https?://.*\n", ["allowed_urls", "allowed_urls"]),
        ("allowed_urls=none,file:///srv/models/.*\n", []),
    ],
)
def test_settings(added, named, tmp_path):
    assert [line.split(":")[0] for line in problems(tmp_path, SHIPPED + "\n" + added)] == named


def test_torchserves_own_default_is_everything(tmp_path):
    assert [line.split(":")[0] for line in problems(tmp_path, "")] == ["allowed_urls"]


def test_the_token_off_beyond_loopback_is_refused_at_every_start():
    (line,) = check_properties(SHIPPED + "\ninference_address=http://0.0.0.0:8080\n")
    assert line.startswith("inference_address: not a loopback address while the token is off")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_keys_that_others_can_read(mode, tmp_path):
    (tmp_path / "key_file.json").write_text("{}")
    (tmp_path / "key_file.json").chmod(mode)
    (line,) = problems(tmp_path)
    assert line.endswith(f"(got mode {mode:o}, allowed 600)")
    (tmp_path / "key_file.json").chmod(0o600)
    assert problems(tmp_path) == []


def test_a_start_closes_an_open_key_file(tmp_path, monkeypatch):
    """TorchServe writes it for its user alone; what a copy or another umask made of it is mended."""
    keys = tmp_path / "key_file.json"
    monkeypatch.setattr(startup_check, "own_frontend", lambda: SimpleNamespace(cwd=lambda: str(tmp_path)))
    startup_check.close_key_file()  # with the token off there is none
    keys.write_text("{}")
    keys.chmod(0o644)
    startup_check.close_key_file()
    assert keys.stat().st_mode & 0o777 == 0o600


def test_root_outside_a_container(tmp_path, monkeypatch):
    mark = tmp_path / ".dockerenv"
    monkeypatch.setattr(posture, "CONTAINER_MARKS", (str(mark),))
    for name in ("container", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    (line,) = problems(tmp_path, user=0)
    assert line.startswith("user: ") and "(got root, allowed any other user)" in line
    mark.touch()
    assert problems(tmp_path, user=0) == []
    mark.unlink()
    monkeypatch.setenv("container", "podman")
    assert problems(tmp_path, user=0) == []


def test_versions_off_the_lock(tmp_path, monkeypatch):
    lock = (ROOT / "requirements.lock").read_text()
    assert problems(tmp_path, lock=lock) == []  # this environment is the lock's
    monkeypatch.setattr(posture, "installed", lambda: {"torch": "2.13.0+cpu", "jinja2": "3.1.0", "mine": "1"})
    (line,) = problems(tmp_path, lock="torch==2.13.0\njinja2==3.1.6\n")
    assert "(got jinja2 3.1.0 for 3.1.6, allowed what make serve installs)" in line


def test_versions_are_of_what_an_import_finds(tmp_path, monkeypatch):
    """setuptools appends its folder of copies to the path; an environment over another one shadows it."""

    def distribution(folder: str, name: str, version: str) -> str:
        made = tmp_path / folder / f"{name}-{version}.dist-info"
        made.mkdir(parents=True)
        (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        return str(tmp_path / folder)

    mine, under = distribution("mine", "some_wheel", "2"), distribution("under", "Some.Wheel", "1")
    copies = distribution("setuptools/_vendor", "only_a_copy", "3")
    monkeypatch.setattr(posture.sys, "path", [mine, under, copies])
    assert posture.installed() == {"some-wheel": "2"}


def test_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(posture, "FREE_BYTES", 1 << 62)
    big = tmp_path / "model.safetensors"
    with open(big, "wb") as file:
        file.truncate(1 << 43)  # sparse
    lines = check_posture(SHIPPED, run_dir=tmp_path / "new", lock=tmp_path / "no", checkpoint=big, user=1)
    assert [line.split(":")[0] for line in lines] == ["disk", "memory"]
