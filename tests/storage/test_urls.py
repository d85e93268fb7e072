import pathlib

import pytest

from moe_jax import errors
from moe_jax.storage import urls


def test_an_address_is_read_as_a_shell_and_pathlib_leave_it():
  for text, want in (
    ('gs://bucket/a/b.txt', ('gs', 'bucket', 'a/b.txt')),
    (pathlib.Path('gs://bucket/a'), ('gs', 'bucket', 'a')),
    ('S3://my.bucket-1', ('s3', 'my.bucket-1', '')),
    ('s3://bucket/a/', ('s3', 'bucket', 'a')),
    ('gs://bucket/a/*.jsonl', ('gs', 'bucket', 'a/*.jsonl')),
  ):
    assert urls.is_remote(text)
    assert urls.parse(text) == want
  assert str(urls.parse('gs://b1/a').below('c')) == 'gs://b1/a/c'
  assert urls.parse('gs://b1').below('c').path == 'b1/c'


def test_what_is_no_object_storage_is_left_alone():
  for text in ('a/gs:/b', 'hdfs://host/a', 'file:///a', 'c:/gs', '', 'gs'):
    assert not urls.is_remote(text)


@pytest.mark.parametrize(
  'text', ['gs://', 'gs://-a/b', 'gs://bucket/a/../../b', 's3://bucket/a//b', 's3://bucket/a\0']
)
def test_an_address_without_a_copy_here_is_refused_by_name(text):
  with pytest.raises(errors.InputError, match='--from=.*(correct|rename)'):
    urls.parse(text, '--from')
