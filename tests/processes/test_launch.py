"""Where a process finds its place among many, from flags and from what launchers set."""

import http.server
import threading

import pytest

from moe_jax import errors
from moe_jax.processes import launch

Flags = launch.Flags
SRUN = {
  'SLURM_JOB_ID': '70001',
  'SLURM_NTASKS': '4',
  'SLURM_STEP_NUM_TASKS': '4',
  'SLURM_STEP_NUM_NODES': '4',
  'SLURM_STEP_NODELIST': 'gpu[007-010]',
  'SLURM_LAUNCH_NODE_IPADDR': '10.0.0.7',
  'SLURM_PROCID': '2',
  'SLURM_LOCALID': '0',
}
GKE = {'TPU_WORKER_HOSTNAMES': 'w-0.svc,w-1.svc', 'TPU_WORKER_ID': '1'}
GIVEN = Flags(coordinator='10.0.0.1:8482', num_processes=2, process_id=1)


def refused(flags, environ, *parts):
  with pytest.raises(errors.InputError) as e:
    launch.resolve(flags, environ)
  text = str(e.value)
  for part in parts:
    assert part in text, text


def test_without_any_sign_a_process_is_alone():
  assert launch.resolve(Flags(), {}) is None
  assert launch.resolve(Flags('off'), SRUN) is None


def test_explicit_from_flags_and_from_variables():
  want = launch.Place('explicit', '10.0.0.1:8482', 2, 1)
  assert launch.resolve(GIVEN, {}) == want
  environ = {
    'MOE_JAX_COORDINATOR': '10.0.0.1:8482',
    'MOE_JAX_NUM_PROCESSES': '2',
    'MOE_JAX_PROCESS_ID': '1',
  }
  assert launch.resolve(Flags(), environ) == want
  assert launch.resolve(GIVEN, SRUN) == want  # what was said goes before what was found
  flags = Flags(process_id=0)
  assert launch.resolve(flags, environ).process_id == 0


def test_one_process_needs_no_coordination():
  flags = Flags(coordinator='h:1', num_processes=1, process_id=0)
  assert launch.resolve(flags, {}) is None


@pytest.mark.parametrize(
  'flags, environ, parts',
  [
    (Flags(num_processes=2), {}, ('--coordinator is missing', 'HOST:PORT')),
    (Flags(coordinator='h:1', process_id=0), {}, ('--num_processes is missing',)),
    (Flags('explicit'), {}, ('--coordinator is missing',)),
    (Flags(coordinator='h', num_processes=2, process_id=0), {}, ('--coordinator=h must be',)),
    (Flags(coordinator='h:99999', num_processes=2, process_id=0), {}, ('h:99999 must be',)),
    (
      Flags(coordinator='h:1', num_processes=2, process_id=2),
      {},
      ('--process_id=2 must', '0 and 1'),
    ),
    (Flags(coordinator='h:1', num_processes=0, process_id=0), {}, ('--num_processes=0 must',)),
    (Flags('off', coordinator='h:1'), {}, ('--distributed=off contradicts',)),
    (Flags('slurm'), {}, ('SLURM_PROCID', 'srun')),
    (Flags('tpu'), {'GCE_METADATA_IP': '127.0.0.1:1'}, ('TPU_WORKER_HOSTNAMES',)),
    (Flags('mpi'), {}, ('--distributed=mpi must be one of auto',)),
    (Flags(start_timeout=0), {}, ('--start_timeout=0',)),
    (Flags(), {'MOE_JAX_NUM_PROCESSES': 'two'}, ('MOE_JAX_NUM_PROCESSES=two must be',)),
  ],
)
def test_bad_combinations_name_the_flag(flags, environ, parts):
  refused(flags, environ, *parts)


def test_a_task_of_srun():
  place = launch.resolve(Flags(), SRUN)
  assert place == launch.Place('slurm', f'gpu007:{61440 + 70001 % 4096}', 4, 2)
  one = SRUN | {'SLURM_NTASKS': '1', 'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'}
  assert launch.resolve(Flags(), one) is None


def test_an_address_is_taken_over_by_slurm():
  flags = Flags('slurm', coordinator='ib-007:9000')
  assert launch.resolve(flags, SRUN).coordinator == 'ib-007:9000'


def test_a_script_that_forgot_srun_is_told_so():
  script = {'SLURM_NTASKS': '4', 'SLURM_PROCID': '0', 'SLURM_JOB_ID': '1'}
  refused(Flags(), script, 'SLURM_NTASKS=4', 'srun', '--distributed=off')


@pytest.mark.parametrize(
  'nodes, first',
  [
    ('gpu007', 'gpu007'),
    ('gpu007,gpu009', 'gpu007'),
    ('gpu[007-010,020],cpu1', 'gpu007'),
    ('gpu[7,9]', 'gpu7'),
    ('a1,gpu[7-9]', 'a1'),
  ],
)
def test_the_first_host_of_a_node_list(nodes, first):
  place = launch.resolve(Flags(), SRUN | {'SLURM_STEP_NODELIST': nodes})
  assert place.coordinator.partition(':')[0] == first


def test_tasks_that_share_a_node_take_one_gpu_each():
  shared = SRUN | {'SLURM_STEP_NUM_NODES': '2', 'SLURM_LOCALID': '1'}
  eight = {'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5,6,7'}
  assert launch.resolve(Flags(), shared | eight).local_device_ids == (1,)
  bound = shared | {'CUDA_VISIBLE_DEVICES': '1'}  # --gpus-per-task=1: it sees its own only
  assert launch.resolve(Flags(), bound).local_device_ids is None
  assert launch.resolve(Flags(), SRUN | eight).local_device_ids is None  # a node of its own


def test_hosts_of_a_tpu_slice_on_gke():
  assert launch.resolve(Flags(), GKE) == launch.Place('tpu', 'w-0.svc:8482', 2, 1)
  single = {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}
  assert launch.resolve(Flags(), single) is None


def test_hosts_of_several_slices():
  slices = {
    'MEGASCALE_NUM_SLICES': '3',
    'MEGASCALE_SLICE_ID': '2',
    'MEGASCALE_COORDINATOR_ADDRESS': 's0-w-0.svc:8080',
  }
  place = launch.resolve(Flags(), GKE | slices)
  assert place == launch.Place('tpu', 's0-w-0.svc:8482', 6, 5)


@pytest.fixture
def metadata():
  """A server that answers like that of a TPU VM; yields its address and what it knows."""
  known = {}

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      key = self.path.rpartition('/')[2]
      fine = self.headers['Metadata-Flavor'] == 'Google' and key in known
      self.send_response(200 if fine else 404)
      self.end_headers()
      self.wfile.write(known.get(key, '').encode())

    def log_message(self, *unused):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f'127.0.0.1:{server.server_port}', known
  server.shutdown()
  server.server_close()


@pytest.mark.parametrize('endpoints', ['10.1.0.2,10.1.0.3', 'a:0:10.1.0.2,b:1:10.1.0.3'])
def test_a_tpu_vm_asks_its_metadata_server(metadata, endpoints):
  address, known = metadata
  known |= {'worker-network-endpoints': endpoints, 'agent-worker-number': '1'}
  environ = {'GCE_METADATA_IP': address}
  place = launch.resolve(Flags('tpu'), environ)
  assert place == launch.Place('tpu', '10.1.0.2:8482', 2, 1)
  known['tpu-env'] = "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nZONE: 'x'"
  known['tpu-env'] += "\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9'"
  place = launch.resolve(Flags('tpu'), environ)
  assert place == launch.Place('tpu', '10.0.0.9:8482', 4, 3)
