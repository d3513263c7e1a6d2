"""Windows of a text, as GPTQ calibrates on them."""

from __future__ import annotations

from pathlib import Path

import torch

from gpt_fast.convert.quantized import Calibration
from gpt_fast.measure.texts import Text, calibration_part, default_text, windows
from gpt_fast.text.load_tokenizer import load_tokenizer

WINDOWS = 64
LENGTH = 512  # tokens of one


def calibration(
    directory: Path, text: Text | None = None, *, limit: int = WINDOWS, length: int = LENGTH
) -> Calibration:
    """At most `limit` windows of the text, by the checkpoint's own tokenizer; unless given, of what is built in."""
    text = calibration_part(default_text()) if text is None else text
    tokenizer = load_tokenizer(directory)
    rows = windows(
        tokenizer.encode(text.content, add_bos=False),
        length=length,
        limit=limit,
        prefix=tokenizer.encode("", add_bos=True),
    )
    return Calibration(torch.tensor(rows), text.source, text.sha256)
