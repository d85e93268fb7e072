"""What is compared, fixed before the runs."""

from typing import NamedTuple

from moe_jax.watermark import partition

NEW_TOKENS = 110
PROMPT_TOKENS = 32
HOST_TOKENS = 300  # of human text, into which a marked one is pasted
DELTAS = (0.5, 1.0, 2.0, 4.0)
# Rises of the judge's loss, in nats per token, at which kinds are compared.
RISES = (0.02, 0.05, 0.1)
ATTACKED = 2.0  # delta of the texts that are attacked
SUBSTITUTED = (0.05, 0.1, 0.3)


class Arm(NamedTuple):
  """One way to mark the same prompts."""

  kind: str
  delta: float
  message_bits: int = 20
  chunk_bits: int = 10
  tokens_per_bit: float = 5.0

  def scheme(self, key: int) -> partition.Scheme:
    return partition.Scheme(self.kind, key, self.message_bits, self.chunk_bits, self.tokens_per_bit)

  @property
  def name(self) -> str:
    """`balance 2, 20 bits in chunks of 10 at 0.2 bits a token`."""
    return (
      f'{self.kind} {self.delta:g}, {self.message_bits} bits in chunks of {self.chunk_bits} at '
      f'{1 / self.tokens_per_bit:g} bits a token'
    )


SWEEP = tuple(Arm(kind, delta) for delta in DELTAS for kind in partition.KINDS)
RATES = tuple(
  Arm(kind, 2.0, bits, 10, rate) for bits, rate in ((40, 2.5), (10, 10)) for kind in partition.KINDS
)
CHUNKS = tuple(Arm(kind, 1.0, 20, bits) for bits in (5, 20) for kind in partition.KINDS)
ARMS = SWEEP + RATES + CHUNKS
