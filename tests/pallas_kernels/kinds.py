"""What the tests run: every implementation, and the tiled form of `xla` with tiles small enough for small inputs; of
sparse attention also with all its keys gathered.

Kernels for TPUs and GPUs are interpreted, with small tiles too.

Letters as in cases.py.
"""
import contextlib
import functools
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import gpu_call, tiles, tpu_call
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.dense_attention import gpu as dense_gpu
from pallas_kernels.dense_attention import tpu as dense_tpu
from pallas_kernels.dense_attention import xla as dense_xla
from pallas_kernels.dsa_attention import chunks, dsa_attention, gpu_backward, gpu_indexer, gpu_lists, union
from pallas_kernels.dsa_attention import gpu as dsa_gpu
from pallas_kernels.dsa_decode import tpu as decode_tpu
from pallas_kernels.grouped_matmul import gpu as grouped_gpu
from pallas_kernels.grouped_matmul import parts
from pallas_kernels.grouped_matmul import tpu as grouped_tpu
from pallas_kernels.index_select import gpu as index_gpu
from pallas_kernels.index_select import tpu as index_tpu
from pallas_kernels.index_select import xla as index_xla
from pallas_kernels.indexer_warmup import gpu as warmup_gpu
from pallas_kernels.indexer_warmup import indexer_warmup

KINDS = ('reference', 'xla', 'tiles')
GPU = pytest.param('gpu', marks=pytest.mark.slow)     # by default its kernels have test_*_gpu.py
SMALL = ((tiles, 'KEYS', 8), (dense_xla, 'SMALL', 4), (dense_xla, 'FEW', 0), (dense_xla, 'QUERY_ROWS', 32),
         (dense_xla, 'BACKWARD_KEYS', 8),
         (index_xla, 'SMALL', 0), (index_xla, 'QUERIES', 4), (index_xla, 'WIDE', 8), (index_xla, 'LENGTHS', 2),
         (index_tpu, 'GROUPS', (8,)), (index_tpu, 'MANY', 2), (index_tpu, 'WIDE', 16), (tpu_call, 'INTERPRET', True),
         (dense_tpu, 'ROWS', 32), (dense_tpu, 'KEYS', (16, 16)),
         (dense_gpu, 'QUERIES', 16), (dense_gpu, 'KEYS', 16), (dense_gpu, 'STEP', {2: 8, 4: 8}),
         (warmup_gpu, 'TILE', 8), (warmup_gpu, 'SCRATCH', 2048),
         (decode_tpu, 'SCORED', 8), (decode_tpu, 'ATTENDED', 8),
         (index_gpu, 'GROUP', 4), (index_gpu, 'MOST', 16), (index_gpu, 'TILE', 8), (index_gpu, 'ROWS', 8),
         (index_gpu, 'STRIDE', 2), (index_gpu, 'CANDIDATES', 16), (index_gpu, 'BLOCK', 16), (dsa_gpu, 'GATHER', 8),
         (gpu_lists, 'STEP', 8), (gpu_lists, 'KEYS', 8), (gpu_lists, 'WRITERS', 2), (gpu_indexer, 'PARTS', 2),
         (gpu_indexer, 'ROWS', 32), (gpu_backward, 'BUFFER', 2**14), (gpu_call, 'INTERPRET', True))
GATHER = ((chunks, 'GATHERED', 1e9), (union, 'GATHER', 8))


@contextlib.contextmanager
def small(kind: str):
  """Small tiles for the kinds that need them. Sizes are read while tracing, so they are changed only meanwhile; a
  backward pass is traced after its forward pass, so a gradient is taken inside as a whole."""
  changed = () if kind in ('reference', 'xla') else SMALL + (GATHER if kind == 'gathered' else ())
  saved = [(module, name, getattr(module, name)) for module, name, _ in changed]
  try:
    for module, name, value in changed:
      setattr(module, name, value)
    yield
  finally:
    for module, name, value in saved:
      setattr(module, name, value)


def named(kind: str, fn):
  """fn(implementation=...) of a kind."""
  def traced(*args):
    with small(kind):
      return fn(*args, implementation='xla' if kind in ('tiles', 'gathered') else kind)
  return traced


def way(kind: str) -> str:
  return 'gathered' if kind in ('gathered', 'gpu') else 'masked_dense'


def gradient(kind: str, loss, arguments):
  """jax.grad of a loss with auxiliary results, traced with the tiles of the kind."""
  def traced(*args):
    with small(kind):
      return jax.grad(loss, arguments, has_aux=True)(*args)
  return traced


def grouped_in_small_tiles(monkeypatch):
  """Kernels of grouped products are interpreted, with small tiles; both are read while tracing."""
  for module, name, value in ((tpu_call, 'INTERPRET', True), (grouped_tpu, 'ROWS', (16, 8)),
                              (grouped_tpu, 'COUNTED', 16), (gpu_call, 'INTERPRET', True), (grouped_gpu, 'ROWS', 8),
                              (grouped_gpu, 'FEATURES', 16), (grouped_gpu, 'STEP', {2: 8, 4: 8}),
                              (parts, 'COMBINED', 16)):
    monkeypatch.setattr(module, name, value)


def without_races(monkeypatch, fn, *arguments):
  """fn(*arguments) with simulated memories and copies of a TPU, each read and write checked against those that it is
  not ordered with."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
  from jax.experimental.pallas import tpu as pltpu
  params = pltpu.InterpretParams(detect_races=True)
  monkeypatch.setattr(sys.modules[__name__], 'SMALL', (*SMALL, (tpu_call, 'INTERPRET', params)))
  out = jax.block_until_ready(jax.jit(fn)(*arguments))
  assert interpreter.races is not None and not interpreter.races.races_found
  return out


def weights(x, order_BT):
  """A cotangent, different at every place; it travels with the tokens when a row is permuted."""
  B, T = order_BT.shape
  inner = x.size // (B * T)
  place = (jnp.arange(B)[:, None] * T + order_BT)[..., None] * inner + jnp.arange(inner)
  return jnp.cos(place.astype(jnp.float32)).reshape(x.shape)


@functools.cache
def dense(kind: str, causal: bool = True, scale: float | None = None):
  """case.dense -> ((dq, dk, dv), (o, lse))."""
  def run(q, k, v, *places):
    def loss(q, k, v):
      fn = lambda *a, implementation: dense_attention(*a, causal=causal, scale=scale, implementation=implementation)
      o, lse = named(kind, fn)(q, k, v, *places)
      return (o.astype(jnp.float32) * weights(o, places[2])).sum() + lse.sum(), (o, lse)     # lse must add no gradient
    return gradient(kind, loss, (0, 1, 2))(q, k, v)
  return jax.jit(run)


@functools.cache
def sparse(kind: str, topk: int):
  """(case, weight of o, weight of kl) -> (gradients of q, k, v, iq, ik, gate; DSAOutput)."""
  def run(case, of_o, of_kl):
    def loss(*arrays):
      fn = lambda *a, implementation: dsa_attention(*a, topk=topk, implementation=implementation, way=way(kind))
      out = named(kind, fn)(*arrays, *case[6:])
      o, kl = ((x.astype(jnp.float32) * weights(x, case.q_order)).sum() for x in (out.o_BTHK, out.kl_BT))
      return of_o * o + of_kl * kl + out.lse_BTH.sum(), out
    return gradient(kind, loss, range(6))(*case[:6])
  jitted = jax.jit(run)
  return lambda case, of_o=1.0, of_kl=1.0: jitted(case, of_o, of_kl)


@functools.cache
def sparse_values(kind: str, topk: int, want_kl: bool = False):
  """(case, selection or None) -> DSAOutput."""
  def run(case, selection):
    fn = lambda *a, implementation: dsa_attention(*a, topk=topk, selection=selection, want_kl=want_kl,
                                                  implementation=implementation, way=way(kind))
    return named(kind, fn)(*case)
  return jax.jit(run)


@functools.cache
def warmup(kind: str):
  """(case, lse) -> (gradients of q, k, lse, iq, ik, gate; kl)."""
  def run(case, lse):
    def loss(q, k, lse, iq, ik, gate):
      kl = named(kind, indexer_warmup)(q, k, lse, iq, ik, gate, *case[6:])
      return (kl * weights(kl, case.q_order)).sum(), kl
    return gradient(kind, loss, range(6))(case.q, case.k, lse, case.iq, case.ik, case.gate)
  return jax.jit(run)
