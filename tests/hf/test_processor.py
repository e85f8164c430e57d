import json

import pytest

from configs import keye_vl_2_30b_a3b
from data_pipelines.errors import InputError
from keye_jax.config import DataConfig, RunConfig, freeze
from keye_jax.hf import processor
from tests.hf.models import KEYE


def test_published_limits():
  """Numbers of the serving code: pixels of 28 x 28 a token, 2880 frames and 184,320 tokens a video at most."""
  data = freeze(RunConfig, keye_vl_2_30b_a3b.get_config()).data
  files = processor.to_hf(keye_vl_2_30b_a3b.model().vision, data)
  image, video = files['preprocessor_config.json'], files['video_preprocessor_config.json']
  assert (image['min_pixels'], image['max_pixels']) == (3136, 16_056_320)
  assert (video['min_pixels'], video['max_pixels']) == (50_176, 200_704)
  assert (video['fps'], video['min_frames'], video['max_frames']) == (2.0, 2, 2880)
  assert video['total_pixels'] == 184_320 * 784
  assert image['image_mean'] == image['image_std'] == [0.5] * 3
  both = files['processor_config.json']
  assert both['image_processor'].items() <= image.items() and both['video_processor'].items() <= video.items()


def test_absent_files_leave_the_published_values(tmp_path):
  vision, data = processor.read(str(tmp_path), KEYE.vision)
  assert (vision, data) == (KEYE.vision, DataConfig())


@pytest.mark.parametrize('key', ['image_mean', 'image_std'])
def test_channels_that_differ_are_refused(tmp_path, key):
  path = tmp_path / 'preprocessor_config.json'
  path.write_text(json.dumps({key: [0.48, 0.45, 0.41]}))
  with pytest.raises(InputError, match=key) as e:
    processor.read(str(tmp_path), KEYE.vision)
  assert str(path) in str(e.value)
