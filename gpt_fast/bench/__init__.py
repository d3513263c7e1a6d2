"""python -m gpt_fast.bench: speed of the engine, of a server and of other engines, measured in turn.

A target (engine_target.py, over_http.py, peers/) runs one Case and returns one Sample; each lives in a process of its
own (remote.py). interleave.py takes the targets in turn, summary.py turns samples into figures, report.py shows them.
docs/performance.md says how to read them.
"""
