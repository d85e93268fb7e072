import numpy as np
import pytest

from moe_jax import errors
from moe_jax.federated import partition, settings


def test_the_published_long_tail():
  # CIFAR-10-LT, imbalance 100: 5000 * 0.01^(c/9), rounded down.
  found = partition.class_sizes(np.full(10, 5000), 100)
  assert found.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
  assert partition.class_sizes(np.array([7, 9, 8]), 1).tolist() == [7, 9, 8]
  with pytest.raises(errors.InputError, match='leaves class 2 without a sample; it may be 8 at mo'):
    partition.class_sizes(np.array([9, 9, 8]), 10)


@pytest.mark.parametrize('size', (9, 49, 98, 103, 107))  # n * (1 / n) is below 1 for all but 9
def test_the_last_class_keeps_a_sample_at_the_largest_imbalance(size):
  assert partition.class_sizes(np.full(10, size), size)[-1] == 1
  with pytest.raises(errors.InputError, match=f'class 9 without a sample; it may be {size} at'):
    partition.class_sizes(np.full(10, size), size + 1)


def test_the_class_that_limits_the_imbalance_is_no_smallest_one():
  # 4 / imbalance^(1/2) and 20 / imbalance are 1 at 16 and 20; the first class keeps all it has.
  with pytest.raises(errors.InputError, match='class 1 without a sample; it may be 16 at most'):
    partition.class_sizes(np.array([2, 4, 20]), 18)
  assert partition.class_sizes(np.array([2, 4, 20]), 16).tolist() == [2, 1, 1]


@pytest.mark.parametrize('alpha', (1e-300, 1e-6, 1e300))
def test_extreme_shares_are_drawn(alpha):
  sizes = np.array([503, 200, 61, 22, 7])
  found = partition.split(sizes, 10, alpha, np.random.default_rng(0))
  assert (found.sum(axis=0) == sizes).all() and (found.sum(axis=1)[:9] == 79).all()


@pytest.mark.parametrize('alpha', (0.0, 1e308, np.inf, np.nan))
def test_shares_that_cannot_be_drawn_are_refused(alpha):
  with pytest.raises(errors.InputError, match='gives no shares .* to 1e6, the shares of the whole'):
    partition.split(np.array([503, 200, 61]), 10, alpha, np.random.default_rng(0))


@pytest.mark.parametrize('alpha', (0.1, 1.0, 1e5))
def test_clients_get_equally_many_and_all_of_it(alpha):
  sizes = np.array([503, 200, 61, 22, 7])
  found = partition.split(sizes, 10, alpha, np.random.default_rng(0))
  assert (found.sum(axis=0) == sizes).all() and (found >= 0).all()
  assert (found.sum(axis=1) == [79] * 9 + [82]).all()
  if alpha == 1e5:  # shares of the whole
    assert (abs(found - sizes / 10) < 2).all()
  if alpha == 0.1:  # nearly all from one class while there is some of it
    assert (found.max(axis=1)[:5] > 70).all()
  with pytest.raises(errors.InputError, match='--clients=794 must be at most 793'):
    partition.split(sizes, 794, alpha, np.random.default_rng(0))


def test_whole_numbers_near_the_shares():
  # 10 * (0.25, 0.58, 0.17) = 2.5, 5.8, 1.7: the largest remainders are the second and the third.
  assert partition._rounded(np.array([0.25, 0.58, 0.17]), 10).tolist() == [2, 6, 2]


def test_every_sample_is_of_one_client_and_has_its_label(images):
  cfg = settings.resolve(settings.Settings(clients=3, imbalance=8, alpha=0.5))
  marked = images._replace(train_x=images.train_x.copy())
  marked.train_x[:, 7, 7, 0], marked.train_x[:, 7, 6, 0] = divmod(np.arange(400), 200)
  found = partition.federate(marked, cfg, seed=5).clients
  marks = found.x[found.real].astype(int)
  numbers = marks[:, 7, 7, 0] * 200 + marks[:, 7, 6, 0]
  assert len(set(numbers.tolist())) == len(numbers) == found.real.sum()
  assert (found.y[found.real] == marked.train_y[numbers]).all()
  sizes = partition.class_sizes(np.full(10, 40), 8)
  assert (np.bincount(found.y[found.real]) == sizes).all()
  assert not found.x[~found.real].any() and not found.y[~found.real].any()
  again, other = (partition.federate(marked, cfg, seed).clients for seed in (5, 6))
  assert (again.x == found.x).all() and (other.x != found.x).any()


def test_only_the_ratio_loss_has_samples_at_the_server(images):
  cfg = settings.resolve(settings.Settings(method='ratio', imbalance=8, server_samples=10))
  plain = settings.resolve(settings.Settings(method='fedavg', imbalance=8))
  found, without = (partition.federate(images, one, 0) for one in (cfg, plain))
  assert found.server_y.tolist() == np.repeat(np.arange(10), 10).tolist()
  assert found.server_x.shape == (100, 8, 8, 1) and len(without.server_y) == 0
  assert (found.clients.x == without.clients.x).all(), 'the method changes the clients'
  many = settings.resolve(settings.Settings(method='ratio', server_samples=41, imbalance=8))
  with pytest.raises(errors.InputError, match='--server_samples=41 must be at most 40'):
    partition.federate(images, many, 0)
