"""`python -m gpt_fast.eval`: task scores, and how far a quantized model is from its source."""
