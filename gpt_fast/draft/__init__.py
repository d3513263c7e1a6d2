"""Choose and prove a draft: `python -m gpt_fast.draft verify|report`. See docs/speculation.md."""
