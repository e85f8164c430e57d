"""Generation equals picking from full forward passes, for every branch of every row."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.nn import decoder, head, keye
from keye_jax.nn.attention import Table
from keye_jax.rollout import paged, sampler
from keye_jax.rollout.pages import Pool
from tests.nn import batches
from tests.steps.test_mesh import mesh
from tests.tolerances import assert_close

CONFIG = dataclasses.replace(batches.CONFIG, attention='sparse')
STOP = (7,)
NOISY = sampler.Sampling(temperature=1.0, top_k=8, top_p=0.9)


@pytest.fixture(scope='module')
def params():
  p = keye.init(CONFIG, jax.random.key(3))
  return p | {'head': p['head'] * 4}       # decided enough for greedy choices not to hang on the last bit


def prompts():
  rng = np.random.default_rng(5)
  samples = [batches.sample(rng, 2, (2, 4), 3, (2, 4)), batches.sample(rng, 1, (2, 4), 2, (5,))]
  last = np.full((2, 2), -1)
  for b, s in enumerate(samples):
    branch = np.asarray(s['branch'])
    for q in range(branch.max()):
      last[b, q] = np.flatnonzero(branch == q + 1)[-1]
  return samples, last


def greedy_by_full_passes(params, s, branch, new):
  """Appends one token at a time to a row that holds this branch alone."""
  keep = [i for i, x in enumerate(s['branch']) if x in (0, branch)]
  s = {k: [v[i] for i in keep] if k in ('token', 'position', 'branch', 'vision') else v for k, v in s.items()}
  out = []
  for _ in range(new):
    logits = head.logits(*batches.forward(CONFIG, params, batches.pack([[s]], 32, 2, 8))[:2])
    token = int(jnp.argmax(logits[0, len(s['token']) - 1]))
    out.append(token)
    if token in STOP:
      break
    for k, v in dict(token=token, position=tuple(np.add(s['position'][-1], 1)), branch=branch, vision=-1).items():
      s[k].append(v)
  return out


def test_greedy_branches(params):
  samples, last = prompts()
  got = sampler.generate(CONFIG, params, batches.pack([[s] for s in samples], 24, 2, 8), last, 5, STOP)
  for b, s in enumerate(samples):
    for q in range(2):
      n = int(got.length_BQ[b, q])
      expected = greedy_by_full_passes(params, s, q + 1, 5) if last[b, q] >= 0 else []
      assert got.token_BQN[b, q, :n].tolist() == expected
      assert not got.token_BQN[b, q, n:].any()


@pytest.mark.slow
def test_stream_is_generate(params):
  samples, last = prompts()
  batch = batches.pack([[s] for s in samples], 24, 2, 8)
  whole = sampler.generate(CONFIG, params, batch, last, 5, STOP, NOISY, seed=4)
  steps = list(sampler.stream(CONFIG, params, batch, last, 5, STOP, NOISY, seed=4))
  np.testing.assert_array_equal(np.stack([t * a for t, a in steps], -1), whole.token_BQN[..., :len(steps)])
  again = sampler.generate(CONFIG, params, batch, last, 5, STOP, NOISY, seed=4)
  np.testing.assert_array_equal(again.token_BQN, whole.token_BQN)
  other = sampler.generate(CONFIG, params, batch, last, 5, STOP, NOISY, seed=5)
  assert (other.token_BQN != whole.token_BQN).any()


class TestPaged:
  """Caches in pages of four slots: prompts end inside a page, answers fill one and need another."""

  def generate(self, params, sampling, config=CONFIG, seed=4, **how):
    samples, last = prompts()
    batch = batches.pack([[s] for s in samples], 24, 2, 8)
    pool = Pool(4)
    fronts = paged.fronts(config, params, sampler.decode_params(params), batch, last, 5, STOP, sampling, seed,
                          pool=pool, **how)
    return (sampler.generate(config, params, batch, last, 5, STOP, sampling, seed),
            sampler.collect(fronts, last.shape, 5), pool)

  def equal(self, got, want):
    np.testing.assert_array_equal(got.token_BQN, want.token_BQN)
    np.testing.assert_array_equal(got.length_BQ, want.length_BQ)
    assert_close(got.logp_BQN, want.logp_BQN, what='log-probabilities')

  @pytest.mark.slow
  @pytest.mark.parametrize('sampling', [sampler.GREEDY, NOISY])
  def test_draws_the_tokens_of_contiguous_caches(self, params, sampling):
    want, got, pool = self.generate(params, sampling)
    self.equal(got, want)
    assert want.length_BQ.max() == 5
    assert pool.total * pool.size < 2 * (24 + 2 * 5)             # slots of the contiguous caches

  @pytest.mark.slow
  def test_index_keys_of_eight_bits(self, params):
    """Where everything is selected, how index keys are kept changes nothing."""
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(
        CONFIG.text, indexer=dataclasses.replace(CONFIG.text.indexer, topk=64)))
    want, got, _ = self.generate(params, sampler.GREEDY, config, eight=True)
    self.equal(got, want)

  def test_is_one_argument(self, params):
    samples, last = prompts()
    batch = batches.pack([[s] for s in samples], 24, 2, 8)
    run = lambda fn, **how: fn(CONFIG, params, batch, last, 5, STOP, **how)
    whole = run(sampler.generate, caches='paged')
    self.equal(whole, run(sampler.generate))
    steps = list(run(sampler.stream, caches='paged'))
    np.testing.assert_array_equal(np.stack([t * a for t, a in steps], -1), whole.token_BQN[..., :len(steps)])

  def test_what_pages_cannot_do_is_named(self, params):
    dense, cache = dataclasses.replace(CONFIG, attention='dense'), decoder.PagedCache(None, Table(None, None))
    with pytest.raises(ValueError, match="need attention='sparse', this model has 'dense'"):
      jax.eval_shape(lambda batch: keye.apply(dense, params, batch, cache), keye.smallest_batch(dense))
    with mesh(1, 1, 1), pytest.raises(ValueError, match='caches in pages live on one device'):
      next(paged.fronts(CONFIG, params, params, None, None, 1, STOP, sampler.GREEDY, 0))


def test_draw_keeps_what_it_should():
  logits = jnp.log(jnp.asarray([[[.5, .3, .15, .05]]]))
  for sampling, allowed in ((sampler.Sampling(1., top_k=2), {0, 1}), (sampler.Sampling(1., top_p=.6), {0, 1}),
                            (sampler.Sampling(1., top_p=.1), {0}), (sampler.Sampling(0.), {0})):
    draw = jax.jit(jax.vmap(lambda k: sampler.draw('decode', logits, sampling, k)[0][0, 0]))
    assert set(np.asarray(draw(jax.random.split(jax.random.key(0), 200))).tolist()) == allowed


def many_prompts():
  """Eight rows, as many as the mesh has devices, of one branch or two."""
  rng, last = np.random.default_rng(6), np.full((8, 2), -1)
  samples = [batches.sample(rng, 1 + b % 2, (2, 4), 3, ((2, 4), (5,))[b % 2]) for b in range(8)]
  for b, s in enumerate(samples):
    for q in range(max(s['branch'])):
      last[b, q] = np.flatnonzero(np.asarray(s['branch']) == q + 1)[-1]
  return jax.tree.map(np.asarray, batches.pack([[s] for s in samples], 24, 2, 8)), last


@pytest.mark.slow
def test_a_mesh_of_eight_generates_what_one_device_does(params):
  batch, last = many_prompts()
  start = jax.tree.map(np.asarray, params)
  noisy = sampler.Sampling(temperature=1.0, top_k=8)
  alone = [sampler.generate(CONFIG, params, batch, last, 4, STOP, sampling, seed=2)
           for sampling in (sampler.GREEDY, noisy)]
  config = dataclasses.replace(CONFIG, layout='decode', experts_transport='ring')
  with mesh(2, 1, 4):
    placed = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding.spec), start, keye.param_shapes(config))
    for sampling, expected in zip((sampler.GREEDY, noisy), alone):
      got = sampler.generate(config, placed, batch, last, 4, STOP, sampling, seed=2)
      np.testing.assert_array_equal(got.token_BQN, expected.token_BQN)
      np.testing.assert_array_equal(got.length_BQ, expected.length_BQ)
      assert_close(got.logp_BQN, expected.logp_BQN, what='log-probabilities')
    steps = list(sampler.stream(config, placed, batch, last, 4, STOP))
  np.testing.assert_array_equal(np.stack([t * a for t, a in steps], -1), alone[0].token_BQN[..., :len(steps)])
