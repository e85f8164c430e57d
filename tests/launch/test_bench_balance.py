"""`keye bench balance`: the mix, the arithmetic of a row and a step, and what a record says."""
import argparse
import dataclasses

import numpy as np
import pytest

from configs import pretrain
from data_pipelines import packing
from keye_jax.nn import counts
from launch import bench_balance, stage3_mix
from launch.bench_balance import Setting
from launch.stage3_mix import Row

CONFIG = pretrain.full('3')


def test_samples_are_what_the_pipeline_would_make():
  """Ten minutes: 1,200 frames, half of 180K tokens, 77 a frame at most; 6 x 11 of 28 pixels are nearest to 16:9."""
  clip = stage3_mix.clip(600.0, False, CONFIG.data)
  assert clip.frames == [(4 * 66, 1200)] and clip.tokens > 1200 * (66 + 4)
  assert stage3_mix.picture(1754, 1240, CONFIG.data) == 4 * 63 * 44
  names, share = stage3_mix.mixture('3')
  assert share[names.index('short')] == pytest.approx(0.5) and share.sum() == pytest.approx(1)


def test_rows_are_packed_and_the_same_again():
  shape = packing.Shape(262144, 9, 81920)
  take = lambda: [row for row, _ in zip(stage3_mix.rows(np.random.default_rng([0, 0]), CONFIG.data, shape), range(6))]
  rows = take()
  assert all(sum(r.samples) <= 262144 and 4 * r.frames.sum() <= 9 * 81920 and r.samples for r in rows)
  assert all(np.bincount(r.places, 4 * r.frames, 9).max() <= 81920 for r in rows)
  assert [r.samples for r in rows] == [r.samples for r in take()]


def test_cost_of_a_row():
  """Two samples see less than one of their length; padding has its share of everything linear."""
  one, two = (counts.row_flops(CONFIG.model, 8192, s) for s in ((8192,), (4096, 4096)))
  model = CONFIG.model
  scores = 2 * model.text.layers * model.text.indexer.heads * model.text.indexer.head_dim
  seen = lambda n: (2048 * 2049 / 2 + (n - 2048) * 2048) / n
  attention = 4 * model.text.layers * model.text.heads * model.text.head_dim
  assert one - two == pytest.approx(8192 * (scores * 2048 + attention * (seen(8192) - seen(4096))))
  assert counts.row_flops(model, 8192, ()) > 0.4 * one


def test_tower_by_hand():
  """Two ranks of two devices, all frames on the first, three quarters and a quarter; over its devices half each, over
  all four a quarter. Too many for the room: all stay where they lie."""
  none, place_F = np.zeros(0, np.int64), np.repeat([0, 1], [48, 16])
  rows = [Row((), np.full(64, 100), place_F), Row((), none, none)]
  tight = dataclasses.replace(CONFIG.model, vision_balance=0.2)
  of = lambda model, frames: bench_balance.tower(model, rows, 2, 6400, frames)
  packed, inside, even, full = (of(*case) for case in ((CONFIG.model, ''), (CONFIG.model, 'rank'),
                                                       (CONFIG.model, 'all'), (tight, 'all')))
  whole = even.work_D.sum()
  assert even.fits and even.work_D == pytest.approx([whole / 4] * 4) and even.moved == 3600
  assert inside.work_D == pytest.approx([whole / 2, whole / 2, 0, 0]) and (inside.compiled_D > 0).all()
  assert packed.work_D == pytest.approx([0.75 * whole, whole / 4, 0, 0])
  assert not full.fits and full.moved == 0 and (full.work_D == packed.work_D).all()


def test_a_step_and_its_record():
  found = bench_balance.simulate(CONFIG, Setting(2, 2), 0, 1)
  assert found['seen']['rows'] == 4 and found == bench_balance.simulate(CONFIG, Setting(2, 2), 0, 1)
  s = {arm: kinds['work'] for arm, kinds in found['seconds'].items()}
  assert s['both']['step_s'] <= s['none']['step_s'] and 0 <= s['both']['idle'] < 1
  assert s['vision']['language_s'] == s['none']['language_s'] and s['vision']['vision_s'] <= s['none']['vision_s']
  assert s['rows']['language_s'] <= s['none']['language_s']
  args = argparse.Namespace(seed=0, batches=1)
  for arm, seconds in (('slow', 2.0), ('fast', 1.0)):
    for kind in ('work', 'compiled'):
      found['seconds']['none'][kind]['step_s'], found['seconds']['both'][kind]['step_s'] = 2.2, seconds
    out = bench_balance.record(found, args)
    assert out['verdict'] == {'slow': 'not shown', 'fast': 'shown'}[arm]
    assert out['gains']['both']['work'] == pytest.approx(
        2.2 / (seconds + found['exchange']['step_s'] + found['rows']['step_s']) - 1)
    assert 'both' in bench_balance.table(out)


def test_traffic_by_hand():
  """Two ranks of two devices: half of all goes over each axis."""
  patches, embeddings = 100 * (4 * 588 + 68), 100 * 2048 * 2
  sent = bench_balance.traffic(CONFIG.model, Setting(2, 4, devices=2), 100)
  assert (sent['patch_bytes'], sent['embedding_bytes']) == (patches, embeddings)
  assert sent['sent_bytes'] == 2 * patches + 3 * embeddings
  assert sent['step_s'] == pytest.approx(4 * sent['sent_bytes'] / 200e9)
  rows = bench_balance.row_traffic(CONFIG.model, Setting(2, 4, devices=2), 100, 64, 3.0)
  assert rows['row_bytes'] == 100 * (588 + 20) + 32 * 36 and rows['sent_bytes'] == 1.5 * rows['row_bytes']
