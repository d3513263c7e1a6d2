"""python -m gpt_fast.bench --gpu: how near decoding comes to the memory limit of this GPU.

Random weights of known shapes, made on the device (models.py); the card's own ceilings (ceilings.py); one function a
kind of row (rows.py); other engines in the same process (peers.py). A row that fails says why, and the rest go on.
"""
