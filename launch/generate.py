"""`keye generate`: a model's answer to a prompt, with images and videos, printed as it is made."""
import argparse
import json
import time
from collections.abc import Sequence

from data_pipelines.errors import InputError
from keye_jax import api


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', required=True, help='Hugging Face folder, run folder, or Llama GGUF file')
  parser.add_argument('--prompt', required=True, help='the question; media come before it in the order image, video')
  parser.add_argument('--image', action='append', default=[], help='path; may be given several times')
  parser.add_argument('--video', action='append', default=[], help='path; may be given several times')
  parser.add_argument('--system', default='', help='system message')
  parser.add_argument('--max-tokens', type=int, default=512)
  parser.add_argument('--temperature', type=float, default=0.0, help='0: greedy')
  parser.add_argument('--top-p', type=float, default=1.0)
  parser.add_argument('--top-k', type=int, default=0, help='0: all')
  parser.add_argument('--stop', action='append', default=[], help='string that ends the answer; several times')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--think', action='store_true', help='opens <think> in the answer')
  parser.add_argument('--attention', choices=('dense', 'sparse'), help='default: what the model was saved with')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help='default: float32 on CPU, else bfloat16')
  parser.add_argument('--json', action='store_true', help='one JSON object at the end instead of streamed text')


def run(args: argparse.Namespace, config_args: Sequence[str]) -> int:
  if config_args:
    raise InputError(f'keye generate takes no {config_args[0]}; what a model looks like is in its folder')
  model, params = api.load_pretrained(args.model, args.dtype, args.attention)
  content = [{'type': kind, kind: path} for kind in ('image', 'video') for path in getattr(args, kind)]
  messages = [{'role': 'user', 'content': [*content, {'type': 'text', 'text': args.prompt}]}]
  if args.system:
    messages.insert(0, {'role': 'system', 'content': args.system})
  started, pieces = time.monotonic(), []
  for piece in api.stream_generate(model, params, messages, max_tokens=args.max_tokens, temperature=args.temperature,
                                   top_p=args.top_p, top_k=args.top_k, stop=args.stop, seed=args.seed,
                                   think=args.think):
    pieces.append(piece)
    if not args.json:
      print(piece, end='', flush=True)
  seconds = time.monotonic() - started
  print(json.dumps({'text': ''.join(pieces), 'seconds': round(seconds, 3)}, ensure_ascii=False) if args.json else '')
  return 0
