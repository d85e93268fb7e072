"""Package metadata and extras; tool settings are in pyproject.toml."""

import pathlib
import re

import setuptools

REPOSITORY = ''  # address of the public repository; empty while there is none
ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'moe_jax/__init__.py').read_text()).group(1)

setuptools.setup(
  name='moe_jax',
  version=VERSION,
  description="DeepSeek's mixture-of-experts language models in JAX and Flax linen",
  long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  url=REPOSITORY or None,
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['moe_jax*', 'configs*', 'experiments*']),
  package_data={
    'configs': ['tuned/*.json'],
    'moe_jax.analysis.comparison': ['page.css', 'page.js'],
  },
  install_requires=[
    'absl-py>=2.1',
    'etils[epath]>=1.9',
    'flax>=0.12',
    'grain>=0.2.12',
    'jax>=0.10',
    'jinja2>=3.1',  # chat templates of checkpoints
    'matplotlib>=3.9',
    'pillow>=10',
    'ml-dtypes>=0.5',
    'ml-collections>=1.0',
    'numpy>=2.0',
    'optax>=0.2.6',
    'orbax-checkpoint>=0.11.30',
    'tensorboardX>=2.6.2',
    'tokenizers>=0.21',
    'tqdm>=4.66',
  ],
  extras_require={
    'test': [
      'pytest>=8.0',
      'pytest-xdist>=3.6',
      'setuptools>=70.1',  # builds wheels by itself, for their test
      'ruff>=0.15',
      'pyright[nodejs]>=1.1.400',  # with node as a wheel
      'pyarrow>=17.0',
      'safetensors>=0.5',
      'scikit-learn>=1.5',
      'tensorboard>=2.18',
      'tokamax>=0.0.12',
      'qwix>=0.1.8',
      'nbclient>=0.10',
      'ipykernel>=6.29',
      'plotly>=6.0',
    ],
    'compare': ['plotly>=6.0'],  # its plotly.js is drawn with on the pages of experiments.compare
    'browser': ['playwright>=1.50'],  # tests that click such a page, in a Chromium that is at hand
    'cuda': [
      'jax[cuda13]>=0.10',
      'tokamax>=0.0.12',
      # tokamax's newer releases leave out their Triton kernels, silently, without these two.
      "jax-triton; python_version >= '3.12'",
      "triton; python_version >= '3.12'",
    ],
    'tpu': ['jax[tpu]>=0.10'],
    'imbalance': ['scikit-learn>=1.5'],  # its digits, for federated training and graphs
    'quant': ['qwix>=0.1.8'],
    'math': ['math-verify>=0.9'],  # the reward of answers in LaTeX
    'hf': [
      'accelerate>=1.0',  # lm-eval's own model of transformers, for comparisons
      'datasets>=3.0',
      'lm-eval>=0.4.9',
      'pyarrow>=17.0',
      'torch>=2.6',
      'zstandard>=0.22',  # text in .zst files
      'transformers>=5.23',  # before, DeepSeek-V2 under YaRN lacked a factor of its logits
    ],
    'storage': ['fsspec>=2024.12', 'gcsfs>=2024.12', 's3fs>=2024.12'],  # gs:// and s3://
    'storage_test': ['gcp-storage-emulator>=2024.8', 'moto[server]>=5.1'],
    'docs': ['mkdocs-material>=9.5', 'mkdocstrings[python]>=0.26'],
    'colab': ['nbclient>=0.10', 'ipykernel>=6.29'],
  },
)
