"""What each method adds to FedAvg, and the data sets with their published settings."""

from typing import NamedTuple


class Method(NamedTuple):
  """What a method adds to FedAvg."""

  what: str
  loss: str = 'cross_entropy'  # one of losses.LOSSES
  extra_head: bool = False  # a second classifier whose logits are added in training only
  real: bool = False  # the main head is corrected by the client's own balanced samples
  prototypes: bool = False  # and by the other clients' mean gradients of each class
  server: str = ''  # what the server does besides the average: '', 'ratio', 'climb' or 'creff'

  @property
  def corrects(self) -> bool:
    """Whether the main head is corrected after each step."""
    return self.real or self.prototypes


METHODS = {
  'fedavg': Method('average of the clients weighted by samples (arXiv 1602.05629)'),
  'focal': Method('focal loss at the clients (arXiv 1708.02002)', loss='focal'),
  'ratio': Method(
    'loss by class weights that the server finds on samples of its own (arXiv 2008.06217)',
    loss='ratio',
    server='ratio',
  ),
  'climb': Method(
    'clients of a high loss count more, by dual variables (Shen et al., ICLR 2022)', server='climb'
  ),
  'creff': Method(
    'head re-trained on features made from class gradients (arXiv 2204.13399)', server='creff'
  ),
  'redgrape': Method(
    'second head, correction by real samples and class prototypes (arXiv 2301.10394)',
    extra_head=True,
    real=True,
    prototypes=True,
  ),
  'no_prototypes': Method('RedGrape by real samples alone', extra_head=True, real=True),
  'no_real': Method(
    'RedGrape by prototypes alone (T = infinity)', extra_head=True, prototypes=True
  ),
  'no_extra_head': Method('RedGrape without the second head', real=True, prototypes=True),
  'head_only': Method('the second head without a correction (lambda = 0)', extra_head=True),
}


class Dataset(NamedTuple):
  """A data set and what the paper sets by it."""

  classes: int
  shape: tuple[int, int, int]  # height, width, channels
  peak: int  # largest value of a pixel
  encoder: str  # one of encoders.ENCODERS
  threshold: int  # samples of a class that make a client balance it by itself (T)
  climb_rate: float
  climb_tolerance: float
  test_is_drawn: bool = False  # by the seed, since none was published


# The paper has no digits: they stand with half of its threshold, since a client has tens of them.
DATASETS = {
  'digits': Dataset(10, (8, 8, 1), 16, 'mlp', 4, 0.1, 0.1, test_is_drawn=True),
  'mnist': Dataset(10, (28, 28, 1), 255, 'cnn', 8, 2.0, 0.01),
  'cifar10': Dataset(10, (32, 32, 3), 255, 'resnet', 8, 0.1, 0.1),
  'cifar100': Dataset(100, (32, 32, 3), 255, 'resnet', 2, 0.1, 0.1),
}
ENCODERS = ('mlp', 'cnn', 'resnet')
