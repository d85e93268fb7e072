from experiments.common import train_command


def test_the_command_that_goes_on_is_that_of_every_process():
  for given in (['--process_id=1'], ['--process_id', '1'], ['-process_id=1'], ['-process_id', '1']):
    found = train_command._of_all_processes(['--config=smoke', *given, '--num_processes', '2'])
    assert found == ['--config=smoke', '--num_processes', '2']


def test_the_line_of_an_interrupted_run():
  said = train_command.stopped('SIGTERM', 7, 'python -m experiments.train --config=smoke')
  assert said == (
    'stopped by SIGTERM after step 7, which is saved; resume with: '
    'python -m experiments.train --config=smoke'
  )
  assert 'resume on every process with: ' in train_command.stopped('SIGINT', 7, 'x', 2)
