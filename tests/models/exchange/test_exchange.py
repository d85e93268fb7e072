"""Every exchange against one device that has all experts: values, gradients, and what is lost."""

from moe_jax.models.exchange import choose


def test_auto_takes_what_the_platform_has():
  assert choose('auto') == 'all_to_all'
  assert choose('all_gather') == 'all_gather'
