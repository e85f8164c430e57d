"""The other side of `keye bench model --peer transformers`: the same model and work in transformers on torch.

Runs as a script in a process and, if asked, an interpreter of its own. Reads one JSON task a line,
{"task": "prefill" | "train" | "decode", "tokens": n, "new": m}, runs it once and answers {"seconds": s}; a first line
names the versions. The shape of the model comes as JSON in the only argument.
"""
import json
import sys
import time

CLIP_NORM = 1.0          # of OptimizerConfig and of transformers' TrainingArguments


def main() -> None:
  shape, threads = json.loads(sys.argv[1]), int(sys.argv[2])
  import torch
  import transformers
  torch.set_num_threads(threads)
  torch.manual_seed(0)
  transformers.logging.set_verbosity_error()
  model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shape)).float()
  optimizer = None
  answer({'torch': torch.__version__, 'transformers': transformers.__version__,
          'experts': str(getattr(model.config, '_experts_implementation', ''))})
  for line in sys.stdin:
    task = json.loads(line)
    token = torch.randint(0, shape['vocab_size'], (1, task['tokens']))
    if task['task'] == 'train' and optimizer is None:
      optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    run = {'prefill': lambda: prefill(torch, model, token), 'train': lambda: train(torch, model, optimizer, token),
           'decode': lambda: decode(torch, model, token, task['new'])}[task['task']]
    answer({'seconds': run()})


def prefill(torch, model, token) -> float:
  model.eval()
  with torch.inference_mode():
    start = time.perf_counter()
    model(token, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - start


def train(torch, model, optimizer, token) -> float:
  """What our step does: forward, backward, clipping by the gradient's norm (the default of transformers' Trainer, 1% of
  its step), AdamW."""
  model.train()
  start = time.perf_counter()
  model(token, labels=token, use_cache=False).loss.backward()
  torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
  optimizer.step()
  optimizer.zero_grad()
  return time.perf_counter() - start


def decode(torch, model, token, new: int) -> float:
  """Greedy steps after the prompt; reading the prompt is not timed."""
  model.eval()
  with torch.inference_mode():
    out = model(token, use_cache=True, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(new):
      newest = out.logits[:, -1:].argmax(-1)
      out = model(newest, past_key_values=out.past_key_values, use_cache=True)
    return time.perf_counter() - start


def answer(record: dict) -> None:
  print(json.dumps(record), flush=True)


if __name__ == '__main__':
  main()
