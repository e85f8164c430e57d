import dataclasses
import functools
import subprocess
import sys

import av
import jax
import numpy as np
import pytest

import keye_jax
from data_pipelines import chat, packing, pipeline
from data_pipelines.errors import InputError
from keye_jax import api
from keye_jax.hf import writer
from keye_jax.nn import head, keye
from launch import import_
from tests.hf.models import DATA, FORMATS, MODELS, random_params, tiny_tokenizer
from tests.tolerances import assert_close


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return functools.partial(_folder, tmp_path_factory.mktemp('exports'))


@functools.cache
def _folder(root, model):
  cfg, path = MODELS[model], root / model
  writer.export(str(path), cfg, random_params(cfg, FORMATS[model]), tiny_tokenizer(), FORMATS[model], DATA, 'float32')
  return str(path)


@pytest.fixture(scope='module')
def keye_tiny(folder):
  return keye_jax.load_pretrained(folder('keye_dense'))      # without experts it compiles in half the time


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
  """Two seconds of 56 x 84 pixels at 4 frames a second, brightness rising."""
  path = tmp_path_factory.mktemp('clips') / 'clip.mp4'
  with av.open(path, 'w') as out:
    stream = out.add_stream('libx264', rate=4)
    stream.width, stream.height, stream.pix_fmt = 84, 56, 'yuv420p'
    for i in range(8):
      picture = np.full((56, 84, 3), 30 * i, np.uint8)
      out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
    out.mux(stream.encode())
  return str(path)


def image(seed=0, height=56, width=84):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def by_hand(model, params, example):
  """Logits of a prompt, through the pipeline's own packing and the model's own forward pass."""
  v = model.config.vision
  batch = packing.pack([example], packing.Shape(len(example.token_T), 2, 128, v.merge, v.patch_dim))
  out = jax.jit(keye.apply, static_argnums=0)(model.config, params, batch)
  return head.logits(out.hidden_BTD, out.head_DV)[0]


def prompt(model, messages, images=(), videos=()):
  turns = pipeline.load_media(chat.turns(messages, images, videos), model.data)
  return chat.prompt(turns, model.tokenizer)


def test_loads_what_was_exported(folder):
  for name, cfg in MODELS.items():
    model, params = keye_jax.load_pretrained(folder(name))
    assert (model.config, model.format, model.source) == (cfg, FORMATS[name], folder(name))
    for path, value in writer.flatten(random_params(cfg, FORMATS[name])).items():
      np.testing.assert_array_equal(writer.flatten(params)[path], value, err_msg=path)
  assert model.tokenizer.encode('1.5 seconds') == tiny_tokenizer().encode('1.5 seconds')


def test_dtype_and_attention(folder):
  model, params = keye_jax.load_pretrained(folder('keye'), dtype='bfloat16', attention='dense')
  assert model.config.attention == 'dense' and model.config.dtype == model.config.param_dtype == 'bfloat16'
  assert all(x.dtype == jax.numpy.bfloat16 for x in jax.tree.leaves(params))
  with pytest.raises(InputError, match='no indexer'):
    keye_jax.load_pretrained(folder('qwen3'), attention='sparse')
  with pytest.raises(InputError, match='no such folder'):
    keye_jax.load_pretrained('absent')


def test_a_run_folder_loads_the_same(folder, tmp_path, keye_tiny):
  import_.write(folder('keye_dense'), str(tmp_path / 'run'), 'float32')
  model, params = keye_jax.load_pretrained(tmp_path / 'run')
  assert (model.config, model.format) == (keye_tiny[0].config, 'keye')
  assert dataclasses.replace(model.data, tokenizer='') == dataclasses.replace(keye_tiny[0].data, tokenizer='')
  assert model.tokenizer.encode('the 7 appears') == keye_tiny[0].tokenizer.encode('the 7 appears')
  jax.tree.map(np.testing.assert_array_equal, params, keye_tiny[1])


def test_logits_of_text(keye_tiny):
  model, params = keye_tiny
  tokens_BT = np.random.default_rng(0).integers(0, 250, (2, 20))
  got = keye_jax.logits(model, params, tokens_BT)
  assert got.shape == (2, 20, 320) and got.dtype == np.float32
  assert_close(got[::-1], keye_jax.logits(model, params, tokens_BT[::-1]))         # rows do not see each other
  assert_close(got[:, :12], keye_jax.logits(model, params, tokens_BT[:, :12]))     # causal, whatever the padding


def test_logits_of_images_and_videos(keye_tiny, clip):
  model, params = keye_tiny
  messages = [{'role': 'user', 'content': '<image>and<video>and<image>: when?'}]
  images, videos = [image(0), image(1, 84, 56)], [clip]
  example = prompt(model, messages, images, videos)
  tokens_T = api.encode(model, messages, images, videos)
  np.testing.assert_array_equal(tokens_T, example.token_T)
  got = keye_jax.logits(model, params, tokens_T[None], images, videos)
  assert_close(got[0], by_hand(model, params, example))
  # a list of parts says the same, and what is seen matters
  parts = [{'type': 'image', 'image': images[0]}, {'type': 'text', 'text': 'and'}, {'type': 'video', 'video': clip},
           {'type': 'text', 'text': 'and'}, {'type': 'image', 'image': images[1]}, {'type': 'text', 'text': ': when?'}]
  np.testing.assert_array_equal(api.encode(model, [{'role': 'user', 'content': parts}]), tokens_T)
  other = keye_jax.logits(model, params, tokens_T[None], [image(5), images[1]], videos)
  assert np.abs(other - got).max() > 0.01


def test_rows_take_media_in_order(keye_tiny):
  model, params = keye_tiny
  ask, images = [{'role': 'user', 'content': '<image>?'}], [image(0), image(1)]
  tokens_BT = np.stack([api.encode(model, ask, images[:1])] * 2)
  got, swapped = (keye_jax.logits(model, params, tokens_BT, x) for x in (images, images[::-1]))
  assert_close(got[::-1], swapped)
  assert np.abs(got[0] - got[1]).max() > 0.01


@pytest.mark.parametrize('change,images,message', [
    (lambda t: t, [], 'row 0, token 4: a image placeholder, but no image is left'),
    (lambda t: t, [image(), image()], '1 image grid(s) have no run of placeholder'),
    (lambda t: np.delete(t, 6), [image()], 'row 0, token 4: the image there is 2 x 3 tokens and needs a run of 6'),
    (lambda t: t + 1000, [image()], 'outside 0..319'),
    (lambda t: t.astype(float), [image()], 'must be integers')])
def test_placeholders_must_match_the_media(keye_tiny, change, images, message):
  model, params = keye_tiny
  tokens_T = api.encode(model, [{'role': 'user', 'content': '<image>?'}], [image()])
  with pytest.raises(InputError) as e:
    keye_jax.logits(model, params, change(tokens_T)[None], images)
  assert message in str(e.value), str(e.value)


def greedy(model, params, messages, n, images=(), videos=()):
  """Argmax of a full forward pass for every token."""
  tokens = list(api.encode(model, messages, images, videos))
  start = len(tokens)
  for _ in range(n):
    padded = np.array([tokens + [0] * (start + n - len(tokens))])
    tokens.append(int(np.asarray(keye_jax.logits(model, params, padded, images, videos))[0, len(tokens) - 1].argmax()))
  return tokens[start:]


def test_greedy_answer_is_the_argmax(keye_tiny, clip):
  model, params = keye_tiny
  messages = [{'role': 'user', 'content': '<video>when?'}]
  ids = greedy(model, params, messages, 6, videos=[clip])
  stops = model.tokenizer.stop_ids
  if any(i in stops for i in ids):
    ids = ids[:next(n for n, i in enumerate(ids) if i in stops)]
  pieces = list(api.stream_generate(model, params, messages, videos=[clip], max_tokens=6))
  assert ''.join(pieces) == model.tokenizer.decode(ids) and len(pieces) > 1
  assert keye_jax.generate(model, params, messages, videos=[clip], max_tokens=6) == ''.join(pieces)


def test_sampling_is_seeded(keye_tiny):
  model, params = keye_tiny
  ask = functools.partial(keye_jax.generate, model, params, [{'role': 'user', 'content': 'when?'}], max_tokens=6,
                          temperature=1.5, top_k=50, top_p=0.95)
  first = ask(seed=1)
  assert first == ask(seed=1) and len({ask(seed=s) for s in range(4)}) > 1
  stopped = ask(seed=1, stop=[first[3]])
  assert stopped == first[:first.index(first[3])]


def test_bad_requests(keye_tiny, folder, tmp_path):
  model, params = keye_tiny
  ask = functools.partial(keye_jax.generate, model, params)
  user = [{'role': 'user', 'content': 'when?'}]
  for kwargs in (dict(temperature=-1), dict(top_p=0), dict(top_k=-1), dict(max_tokens=0), dict(stop=[''])):
    with pytest.raises(InputError, match='sampling needs'):
      ask(user, **kwargs)
  with pytest.raises(InputError, match="exceed the model's context of 512"):
    ask(user, max_tokens=510)
  with pytest.raises(InputError, match='unknown role'):
    ask([{'role': 'robot', 'content': 'x'}])
  with pytest.raises(InputError, match='absent.mp4'):
    ask([{'role': 'user', 'content': '<video>?'}], videos=[str(tmp_path / 'absent.mp4')])
  text_model, text_params = keye_jax.load_pretrained(folder('qwen3'))
  with pytest.raises(InputError, match='no vision encoder'):
    keye_jax.generate(text_model, text_params, [{'role': 'user', 'content': '<image>?'}], [image()])
  with pytest.raises(InputError, match="caches='paged' needs a model with attention='sparse'"):
    keye_jax.generate(text_model, text_params, user, caches='paged')


def test_text_arrives_in_whole_characters():
  words = tiny_tokenizer()
  ids = words.encode('é😀 ok')
  assert len(ids) > 5      # bytes
  assert ''.join(api._text(words, iter([*ids, words.stop_ids[0], *words.encode('more')]))) == 'é😀 ok'
  assert all('\ufffd' not in piece for piece in api._text(words, iter(ids)))
  assert ''.join(api._text(words, iter(ids[:3]))) == 'é\ufffd'      # cut off inside a character


@pytest.mark.parametrize('pieces,stop,expected', [
    (['ab', 'cd'], (), ['ab', 'cd']), (['ab', 'cST', 'OPd'], ('STOP',), ['ab', 'c']),
    (['abSTO', 'x'], ('STOP',), ['ab', 'STOx']), (['STOPx'], ('STOP',), []), (['a\n', '\nb'], ('\n\n',), ['a']),
    (['xab'], ('b', 'a'), ['x']), (['abS'], ('STOP',), ['ab', 'S'])])
def test_stop_strings(pieces, stop, expected):
  assert list(api._until(iter(pieces), stop)) == expected


def test_buckets():
  sizes = sorted({api.bucket(n) for n in range(1, 2000)})
  assert sizes == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
  assert all(n <= api.bucket(n) <= max(32, 1.5 * n) for n in range(1, 2000))


def test_import_has_no_side_effects():
  code = ('import keye_jax, keye_jax.api\n'
          'from jax._src import xla_bridge\n'
          'assert not xla_bridge.backends_are_initialized()\n')      # no device is touched
  subprocess.run([sys.executable, '-c', code], check=True, timeout=120)


@pytest.mark.slow
def test_on_a_mesh(folder):
  """Sharded parameters, each device reading its own block, give the logits of one device. In a child process: the mesh
  is set for a whole process."""
  code = ('import sys, numpy as np, keye_jax\n'
          'import tests.conftest\n'
          'from keye_jax import sharding\n'
          'from keye_jax.config import MeshConfig\n'
          'from tests.tolerances import assert_close\n'
          'tokens = np.arange(40).reshape(2, 20) + 3\n'
          'expected = np.asarray(keye_jax.logits(*keye_jax.load_pretrained(sys.argv[1]), tokens))\n'
          'sharding.use_mesh(MeshConfig(data=2, context=2, expert=2))\n'
          'model, params = keye_jax.load_pretrained(sys.argv[1])\n'
          'assert params["layers"]["mlp"]["down"].sharding.spec\n'
          'assert_close(np.asarray(keye_jax.logits(model, params, tokens)), expected)\n')
  subprocess.run([sys.executable, '-c', code, folder('qwen3_moe')], check=True, timeout=300)
