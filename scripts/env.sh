# For the by-hand path:  source scripts/env.sh [--token on]
# Puts the venv, Java, our settings (loopback, token off, quiet logs) and a place for TorchServe's own files into this
# shell, so that the plain torchserve command lines work, and `make stop` finds what they start.
_gpt_fast=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)
if _gpt_fast=$("${VIRTUAL_ENV:-$_gpt_fast/.venv}/bin/python" "$_gpt_fast/scripts/serve.py" env "$@"); then
  eval "$_gpt_fast"
  unset _gpt_fast
else
  unset _gpt_fast
  return 1
fi
