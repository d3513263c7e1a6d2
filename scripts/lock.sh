#!/usr/bin/env bash
# Write requirements.lock: the versions of every extra's packages. Run by `make lock` (PIP and TORCH_SPEC are its).
# A pip constraints file (`pip install -c`), so it pins what is installed and installs nothing by itself.
set -euo pipefail
$PIP -q pip-tools
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "$TORCH_SPEC" > "$work/torch.txt"
.venv/bin/pip-compile -q --all-extras --strip-extras --allow-unsafe --no-annotate --no-header \
  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
  --constraint "$work/torch.txt" --output-file "$work/lock.txt" pyproject.toml
{
  cat <<'NOTE'
# Made by `make lock` for Python 3.11 on Linux; used as constraints: pip install -c requirements.lock -e '.[serve]'
# torch stands without a local version (+cpu, +cu130): one lock serves the CPU and the CUDA build. The CUDA build's
# own nvidia-* packages are not here because torch pins them exactly itself.
NOTE
  # Without our own line and the build tag of the torch that this machine has.
  sed -e '/^gpt-fast/d' -e '/^#/d' -e '/^$/d' -e '/^torch==/s/+.*//' "$work/lock.txt"
} > "$work/requirements.lock"
mv "$work/requirements.lock" requirements.lock
echo "lock: wrote requirements.lock ($(grep -c == requirements.lock) packages)"

# The same versions with the sha256 of every file that the index has of them.
.venv/bin/pip-compile -q --generate-hashes --strip-extras --allow-unsafe --no-annotate --no-header \
  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
  --output-file "$work/hashed.txt" requirements.lock
{
  cat <<'NOTE'
# Made by `make lock`: the files that requirements.lock's versions had then, by sha256, for every platform. To install
# nothing else: torch first, then pip install --no-deps --require-hashes -r requirements-hashed.lock
# torch is not here, since its build is the machine's: pip has its hash checked by the index alone.
NOTE
  sed -e '/^torch==/,/[^\\]$/d' "$work/hashed.txt"
} > "$work/requirements-hashed.lock"
mv "$work/requirements-hashed.lock" requirements-hashed.lock
echo "lock: wrote requirements-hashed.lock"
