"""Does a picture find its caption? N pictures, C different captions, W width."""
from collections import Counter
from collections.abc import Sequence

import numpy as np

from keye_jax.evals.scores import Score, share


def image_to_text(image_NW: np.ndarray, text_NW: np.ndarray, captions_N: Sequence[str]) -> dict[str, Score]:
  """Share of pictures whose own caption is the most similar of all different ones, beside what needs no look at them.

  Pictures with equal captions share one candidate. 'retrieval': the share; 'chance': one candidate in C, picked
  blindly; 'majority': the most frequent caption for every picture. Raises ValueError without a pair.
  """
  if not len(captions_N) == len(image_NW) == len(text_NW) or not len(captions_N):
    raise ValueError(f'{len(image_NW)} pictures, {len(text_NW)} texts and {len(captions_N)} captions')
  first = {caption: i for i, caption in reversed(list(enumerate(captions_N)))}
  names_C = sorted(first)
  found_N = (np.asarray(image_NW) @ np.asarray(text_NW)[[first[name] for name in names_C]].T).argmax(1)
  n, chance = len(captions_N), 1 / len(names_C)
  return {'retrieval': share([names_C[c] == caption for c, caption in zip(found_N, captions_N)]),
          'chance': Score(chance, chance, chance, n),
          'majority': share([caption == Counter(captions_N).most_common(1)[0][0] for caption in captions_N])}
