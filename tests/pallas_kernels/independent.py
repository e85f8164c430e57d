"""The ops in plain numpy loops, float64, written from the definitions and not from the package's code.

Letters as in cases.py.
"""
import numpy as np


def visible(q_segment, k_segment, q_order, k_order, causal=True) -> bool:
  same_sample = q_segment // 256 == k_segment // 256
  branch = k_segment % 256
  return bool(same_sample and branch in (0, q_segment % 256) and (not causal or k_order <= q_order))


def scores(case, b, t) -> np.ndarray:
  iq, ik, gate = (np.asarray(x, np.float64) for x in (case.iq[b, t], case.ik[b], case.gate[b, t]))
  return np.array([sum(gate[i] * max(iq[i] @ ik[s], 0) for i in range(len(gate))) for s in range(len(ik))]) + 0.0


def seen(case, b, t, causal=True) -> list[int]:
  return [s for s in range(case.k.shape[1])
          if visible(case.q_segment[b, t], case.k_segment[b, s], case.q_order[b, t], case.k_order[b, s], causal)]


def chosen(case, b, t, topk) -> list[int]:
  """Best scores first, among equals the lowest order."""
  value = scores(case, b, t)
  return sorted(sorted(seen(case, b, t), key=lambda s: (-value[s], case.k_order[b, s]))[:topk])


def attention(case, keys, causal=True, scale=None):
  """keys(b, t) -> key indices. Returns (o, lse, p [B, T, S] head mean)."""
  q, k, v = (np.asarray(x, np.float64) for x in case[:3])
  B, T, H, K = q.shape
  S, G = k.shape[1:3]
  scale = K ** -0.5 if scale is None else scale
  o, lse, mean = np.zeros(q.shape), np.full((B, T, H), -1e30), np.zeros((B, T, S))
  for b in range(B):
    for t in range(T):
      index = keys(b, t)
      for h in range(H):
        if index:
          x = k[b, index, h * G // H] @ q[b, t, h] * scale
          lse[b, t, h] = np.log(np.exp(x - x.max()).sum()) + x.max()
          p = np.exp(x - lse[b, t, h])
          o[b, t, h] = p @ v[b, index, h * G // H]
          mean[b, t, index] += p / H
  return o, lse, mean


def kl(case, mean, keys) -> np.ndarray:
  B, T = case.q_order.shape
  out = np.zeros((B, T))
  for b in range(B):
    for t in range(T):
      index = keys(b, t)
      if index:
        x = scores(case, b, t)[index]
        log_q = x - x.max() - np.log(np.exp(x - x.max()).sum())
        p = mean[b, t, index]
        out[b, t] = sum(a * (np.log(a) - c) for a, c in zip(p, log_q) if a > 0)
  return out
