"""The start of JAX among many processes, once `launch.resolve` has found this one's place.

`initialize` waits for all processes (`rendezvous`) and starts JAX, before any device is used.
The coordinator is process 0, as host:port; the rendezvous and JAX's coordination service use that
one port, the one after the other.
"""

import jax

from moe_jax import trees
from moe_jax.processes import launch, rendezvous, watchdog


def initialize(place: launch.Place, flags: launch.Flags, record: trees.Json) -> watchdog.Watchdog:
  """Waits for all processes, and starts JAX among the processes.

  Args:
    place: from `launch.resolve`.
    flags: for the time-outs.
    record: what must be equal on all processes, as nested dicts that JSON can hold.

  Returns:
    What ends this process when another one dies, and the others when this one fails.

  Raises:
    errors.InputError: a process is missing, there twice, or runs something else.
  """
  number, many = place.process_id, place.num_processes
  present = rendezvous.hold(place.coordinator, many, number, record, flags.start_timeout)
  # It would take the handler of SIGTERM, and from then on nothing could end a process that has not
  # reached the training loop yet. `agreement.StopAgreement` does its work.
  jax.config.update('jax_enable_preemption_service', False)
  ids = place.local_device_ids
  jax.distributed.initialize(
    coordinator_address=place.coordinator,
    num_processes=many,
    process_id=number,
    local_device_ids=None if ids is None else list(ids),
    cluster_detection_method='deactivate',
    initialization_timeout=max(int(flags.start_timeout), 1),
    # Ours names who is silent, so it is to be the first: JAX's may come after half of its time.
    heartbeat_timeout_seconds=3 * flags.heartbeat_timeout,
    shutdown_timeout_seconds=flags.heartbeat_timeout,
  )
  return watchdog.Watchdog(number, *present, flags.heartbeat_timeout)
