"""The settings of a federated run, and their rules."""

import dataclasses
import math
from typing import Any

from moe_jax import errors
from moe_jax.federated import methods


def _value(default: Any, text: str) -> Any:
  """A field with its meaning, which is the help of the command's flag."""
  return dataclasses.field(default=default, metadata={'help': text})


@dataclasses.dataclass(frozen=True)
class Settings:
  """What decides a run together with its seed; the defaults are the paper's where it has some.

  But for `rounds` and `batch_size`, of which its command has 1000 and 64: they are for digits, of
  which a client of ten has about 31 samples at imbalance 100, fewer than such a batch.
  """

  method: str = _value('redgrape', 'what is added to FedAvg')
  dataset: str = _value('digits', 'images; all but digits are read from --data_dir')
  encoder: str = _value('', 'images to features: mlp, cnn or resnet; that of the data set if empty')
  imbalance: float = _value(100.0, 'samples of the first class by those of the last')
  alpha: float = _value(
    1.0, "of the clients' Dirichlet shares: the smaller, the fewer classes each"
  )
  clients: int = _value(10, 'how many clients the samples are split over')
  clients_per_round: int = _value(0, 'drawn anew each round; 0 for all')
  rounds: int = _value(100, 'rounds of all clients and the server')
  epochs: int = _value(5, "passes over a client's own data per round")
  batch_size: int = _value(32, 'samples of a step')
  learning_rate: float = _value(0.1, 'of the clients; the server takes the plain average')
  momentum: float = _value(0.9, 'of the clients, from zero in each round')
  clip_norm: float = _value(1.0, "largest norm of a step's whole gradient")
  correction: float = _value(0.1, "lambda: RedGrape's correction by the norm of the local gradient")
  threshold: int = _value(0, 'T, samples with which a client balances a class by itself; 0 for 4 '
                          '(digits), 8 (mnist, cifar10) or 2 (cifar100)')  # fmt: skip
  shared_extra_head: bool = _value(True, 'the server averages the second head; else each keeps one')
  focal_gamma: float = _value(2.0, 'exponent of the focal loss')
  server_samples: int = _value(32, 'per class, which the method ratio has at the server')
  ratio_weight: float = _value(0.1, 'of a ratio in the class weights of the method ratio')
  climb_rate: float = _value(0.0, 'of the dual variables; 0 for 2 (mnist) or 0.1')
  climb_tolerance: float = _value(-1.0, 'loss above the mean that is borne; below 0: 0.01 (mnist), '
                                  'else 0.1')  # fmt: skip
  creff_features: int = _value(100, 'features per class that CReFF makes')
  creff_feature_steps: int = _value(100, 'steps per round by which it mends them')
  creff_feature_rate: float = _value(0.1, 'rate of these steps')
  creff_epochs: int = _value(300, 'epochs over them that re-train the head, per round')
  creff_rate: float = _value(0.1, 'rate of the re-training')

  @property
  def data(self) -> methods.Dataset:
    """The traits of the data set."""
    return methods.DATASETS[self.dataset]

  @property
  def rules(self) -> methods.Method:
    """The traits of the method."""
    return methods.METHODS[self.method]


def resolve(settings: Settings) -> Settings:
  """The settings with what the data set decides filled in, checked.

  Raises:
    errors.InputError: a value breaks a rule.
  """
  for field, known in (('method', methods.METHODS), ('dataset', methods.DATASETS)):
    value = getattr(settings, field)
    errors.require(
      value in known,
      f'--{field}={value} must be one of {", ".join(known)}{errors.did_you_mean(value, known)}',
    )
  data = settings.data
  found = dataclasses.replace(
    settings,
    encoder=settings.encoder or data.encoder,
    clients_per_round=settings.clients_per_round or settings.clients,
    threshold=settings.threshold or data.threshold,
    climb_rate=settings.climb_rate or data.climb_rate,
    climb_tolerance=data.climb_tolerance
    if settings.climb_tolerance < 0
    else settings.climb_tolerance,
  )
  _check(found)
  return found


_LEAST = {
  'imbalance': 1, 'clients': 1, 'clients_per_round': 1, 'rounds': 1, 'epochs': 1, 'batch_size': 1,
  'threshold': 1, 'correction': 0, 'momentum': 0, 'focal_gamma': 1, 'ratio_weight': 0,
  'server_samples': 1, 'creff_features': 1, 'creff_feature_steps': 0, 'creff_epochs': 1,
  'climb_rate': 0, 'climb_tolerance': 0,
}  # fmt: skip
_LARGEST_ALPHA = 1e9  # shares are the global ones to four digits long before
_ABOVE_ZERO = ('alpha', 'learning_rate', 'clip_norm', 'creff_feature_rate', 'creff_rate')


def _check(settings: Settings):
  errors.require(
    not settings.alpha > _LARGEST_ALPHA,
    f'--alpha={settings.alpha:g} must be at most {_LARGEST_ALPHA:g}; 1e6 gives every client the '
    'shares of the whole',
  )
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    errors.require(
      not isinstance(value, float) or math.isfinite(value),
      f'--{field.name}={value} must be a finite number; its default is {field.default}',
    )
  for field, least in _LEAST.items():
    value = getattr(settings, field)
    errors.require(value >= least, f'--{field}={value} must be at least {least}')
  for field in _ABOVE_ZERO:
    value = getattr(settings, field)
    errors.require(value > 0, f'--{field}={value} must be above 0')
  errors.require(settings.momentum < 1, f'--momentum={settings.momentum} must be below 1')
  errors.require(
    settings.encoder in methods.ENCODERS,
    f'--encoder={settings.encoder} must be one of {", ".join(methods.ENCODERS)}',
  )
  errors.require(
    settings.clients_per_round <= settings.clients,
    f'--clients_per_round={settings.clients_per_round} must be at most --clients='
    f'{settings.clients}; 0 takes all of them',
  )
