"""A slow Llama forward to test the fast one against: float64, one sequence, one head and one token at a time.

Written from the papers: RMSNorm (arXiv:1910.07467), RoPE (2104.09864), GQA (2305.13245), SwiGLU (2002.05202), sliding
windows (2310.06825), mixture of experts (2401.04088). It takes weights by gpt-fast's names, and imports nothing of
the package.
"""

import math

import torch


def reference_logits(weights, config, tokens, *, frequencies=None, rope_scale=1.0):
    """Logits of every token of one sequence: float64 [len(tokens), vocabulary].

    `frequencies`: angle per position of each rotated pair; None means base^(-2i/d).
    """
    w = {name: value.double() for name, value in weights.items()}
    rotary = config.rope_dim or config.head_dim
    if frequencies is None:
        frequencies = [config.rope_base ** (-2 * i / rotary) for i in range(rotary // 2)]
    frequencies = [float(f) for f in frequencies]
    xs = [w["tok_embeddings.weight"][t] for t in tokens]
    for layer in range(config.n_layer):
        mine = {n.removeprefix(f"layers.{layer}."): v for n, v in w.items() if n.startswith(f"layers.{layer}.")}
        window = config.sliding_window if layer in config.sliding_layers else None
        normed = [norm(x, mine["attention_norm.weight"], config.norm_eps) for x in xs]
        attended = attention(mine, config, normed, frequencies, rope_scale, window)
        xs = [x + a for x, a in zip(xs, attended, strict=True)]
        xs = [x + feed_forward(mine, config, norm(x, mine["ffn_norm.weight"], config.norm_eps)) for x in xs]
    head = w["tok_embeddings.weight"] if config.tie_embeddings else w["output.weight"]
    return torch.stack([head @ norm(x, w["norm.weight"], config.norm_eps) for x in xs])


def norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def linear(w, name, x):
    return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)


def rotate(head, position, frequencies, scale):
    """Each pair (2i, 2i+1) turned by position * frequency_i; elements past the pairs stay."""
    out = head.clone()
    for i, frequency in enumerate(frequencies):
        cos, sin = scale * math.cos(position * frequency), scale * math.sin(position * frequency)
        a, b = head[2 * i], head[2 * i + 1]
        out[2 * i], out[2 * i + 1] = a * cos - b * sin, a * sin + b * cos
    return out


def attention(w, config, xs, frequencies, scale, window):
    keys, values, outs = [], [], []
    for position, x in enumerate(xs):
        heads = linear(w, "attention.wqkv", x).view(-1, config.head_dim)
        queries = list(heads[: config.n_head])
        new_keys = list(heads[config.n_head : config.n_head + config.n_kv_head])
        if config.qk_norm:
            queries = [norm(q, w["attention.q_norm.weight"], config.norm_eps) for q in queries]
            new_keys = [norm(k, w["attention.k_norm.weight"], config.norm_eps) for k in new_keys]
        keys.append([rotate(k, position, frequencies, scale) for k in new_keys])
        values.append(heads[config.n_head + config.n_kv_head :])
        first = 0 if window is None else max(0, position + 1 - window)
        out = []
        for h, query in enumerate(queries):
            kv = h // (config.n_head // config.n_kv_head)
            query = rotate(query, position, frequencies, scale)
            scores = torch.stack([query @ keys[t][kv] for t in range(first, position + 1)]) / math.sqrt(config.head_dim)
            seen = torch.stack([values[t][kv] for t in range(first, position + 1)])
            out.append(scores.softmax(0) @ seen)
        outs.append(linear(w, "attention.wo", torch.cat(out)))
    return outs


def swiglu(w, prefix, x):
    gate = linear(w, f"{prefix}w1", x)
    return linear(w, f"{prefix}w2", gate * torch.sigmoid(gate) * linear(w, f"{prefix}w3", x))


def feed_forward(w, config, x):
    if not config.n_expert:
        return swiglu(w, "feed_forward.", x)
    scores = linear(w, "feed_forward.gate", x)
    chosen = sorted(range(config.n_expert), key=lambda e: -scores[e].item())[: config.n_expert_per_token]
    shares = scores[chosen].softmax(0)
    return sum(s * swiglu(w, f"feed_forward.experts.{e}.", x) for s, e in zip(shares, chosen, strict=True))
