"""Programs that want to pass without solving anything, or to do harm: name -> (source, kind).

Every one defines f(x), which the tests want to be x + 1000003. The kind is what a sandbox with a
second of CPU time says of it: 'ran' is a program that returns something else.
"""

PROGRAMS = {
  'fork bomb': ('import os\ndef f(x):\n  while True: os.fork()', 'error'),
  'fork bomb that does not mind': (
    'import os\ndef f(x):\n  while True:\n    try: os.fork()\n    except OSError: pass',
    'time',
  ),
  'thread bomb': (
    'import threading, time\ndef f(x):\n  while True: threading.Thread(target=time.sleep, '
    'args=(9,)).start()',
    'error',
  ),
  'endless printing': ("def f(x):\n  while True: print('x' * 9999)", 'time'),
  'endless results': (
    "import os\ndef f(x):\n  while True: os.write(3, b'x' * 65536)",
    'error',
  ),
  'an endless string': ("def f(x): return 'x' * 2000000", 'error'),
  'a large list': ('def f(x): return [0] * 10**12', 'memory'),
  'a growing list': ('def f(x):\n  a = []\n  while True: a.append(bytearray(2**20))', 'memory'),
  'sleep': ('import time\ndef f(x): time.sleep(1000)', 'time'),
  'sleep at import': ('import time\ntime.sleep(1000)\ndef f(x): return x', 'time'),
  'a loop': ('def f(x):\n  while True: pass', 'time'),
  'a loop that ignores signals': (
    'import signal\nfor s in (signal.SIGXCPU, signal.SIGTERM, signal.SIGINT):\n'
    '  signal.signal(s, signal.SIG_IGN)\ndef f(x):\n  while True: pass',
    'time',
  ),
  'a power that never ends': ('def f(x): return 7 ** (10 ** 10)', 'time'),
  'a pattern that never ends': (
    "import re\ndef f(x): return bool(re.fullmatch('(a+)+b', 'a' * 99))",
    'time',
  ),
  'raises its limits': (
    'import resource\ndef f(x):\n  for k in (resource.RLIMIT_CPU, resource.RLIMIT_NPROC):\n'
    '    resource.setrlimit(k, (10**6, 10**6))',
    'error',
  ),
  'reads a file': ("def f(x): return open('/etc/passwd').read()", 'error'),
  'reads what another process has open': (
    "import os\ndef f(x): return os.listdir('/proc/self/fd')",
    'error',
  ),
  'writes to Python': (
    "import json\ndef f(x): open(json.__file__, 'a').write('x')",
    'error',
  ),
  'removes files': (
    'import shutil\ndef f(x):\n  shutil.rmtree("/usr")\n  return x',
    'error',
  ),
  'fills the disk': (
    "def f(x):\n  for i in range(99): open(str(i), 'wb').write(bytes(2**19))",
    'error',
  ),
  'writes a huge file': ("def f(x): open('a', 'wb').truncate(2**40)", 'error'),
  'opens everything': ('import os\ndef f(x):\n  while True: os.dup(0)', 'error'),
  'connects out': (
    "import socket\ndef f(x): socket.create_connection(('10.0.0.1', 80), 1)",
    'error',
  ),
  'connects to this machine': (
    "import socket\ndef f(x): socket.create_connection(('127.0.0.1', 22), 1)",
    'error',
  ),
  'runs a shell': (
    'import os, subprocess\ndef f(x): return subprocess.run(["/bin/sh", "-c", "id"])',
    'error',
  ),
  'kills its parent': (
    'import os, signal\ndef f(x):\n  os.kill(os.getppid(), signal.SIGKILL)\n  return 0',
    'error',
  ),
  'kills everybody': (
    'import os, signal\ndef f(x):\n  for i in range(1, 70000):\n    try: os.kill(i, 9)\n'
    '    except OSError: pass\n  os.kill(-1, 9)',
    'error',
  ),
  'kills its group': ('import os\ndef f(x): os.killpg(0, 9)', 'error'),
  'crashes': ('import ctypes\ndef f(x): ctypes.string_at(0)', 'error'),
  'makes namespaces': (
    'import ctypes, os\ndef f(x):\n  c = ctypes.CDLL(None, use_errno=True)\n'
    '  if c.unshare(0x10000000) and c.mount(b"t", b"/", b"tmpfs", 0, b"") and '
    'c.chroot(b"/box") and c.setuid(0): raise OSError',
    'error',
  ),
  'exits with 0': ('import os\ndef f(x): os._exit(0)', 'error'),
  'exits with 0 at import': ('import sys\nsys.exit(0)', 'error'),
  'prints the answer': ("def f(x):\n  print(x + 1000003)\n  print('PASSED')", 'ran'),
  'says that all has passed': (
    'import os\ndef f(x):\n  os.write(3, b\'{"passed": true}\\n\')\n  os._exit(0)',
    'error',
  ),
  'writes more results than asked for': (
    'import os\ndef f(x):\n  os.write(3, b\'{"value": 1}\\n\' * 9)\n  return 1',
    'error',
  ),
  'writes a result that no parser survives': (
    "import os\ndef f(x):\n  os.write(3, b'[' * 200000 + b'\\n')\n  os._exit(0)",
    'error',
  ),
  'writes a number that no parser survives': (
    "import os\ndef f(x):\n  os.write(3, b'{\"value\": ' + b'9' * 200000 + b'}\\n')\n  os._exit(0)",
    'error',
  ),
  'closes everything': ('import os\ndef f(x):\n  os.closerange(0, 32)\n  return x', 'error'),
  'is equal to everything': (
    'class A(int):\n  def __eq__(self, other): return True\n  def __hash__(self): return 0\n'
    'def f(x): return A(7)',
    'ran',
  ),
  'replaces what compares': (
    'import builtins, json, operator, math\nbuiltins.all = lambda *a: True\n'
    'builtins.any = lambda *a: True\noperator.eq = lambda *a: True\n'
    "math.isclose = lambda *a, **k: True\ndef f(x): return 'anything'",
    'ran',
  ),
  'replaces what writes': (
    'import json\njson.dumps = lambda *a, **k: \'{"passed": 1}\'\ndef f(x): return 1',
    'error',
  ),
  'replaces what calls it': (
    'import sys\nframe = sys._getframe()\nwhile frame:\n'
    "  if 'job' in frame.f_locals: frame.f_locals['job']['calls'] = []\n  frame = frame.f_back\n"
    'def f(x): return 1',
    'error',
  ),
  'looks for the answer': (
    'import gc, sys\ndef f(x):\n  seen = [o for o in gc.get_objects()]\n'
    '  frame = sys._getframe()\n  while frame:\n    seen += frame.f_locals.values()\n'
    '    frame = frame.f_back\n  return max([abs(o) for o in seen if type(o) is int] + '
    '[abs(y) for o in seen if type(o) in (list, tuple) for y in o if type(y) is int])',
    'ran',
  ),
  'an exception that cannot be shown': (
    'class E(Exception):\n  def __str__(self): raise E\ndef f(x): raise E',
    'error',
  ),
  'a syntax error': ('def f(x) return', 'error'),
  'another function': ('def g(x): return x + 1000003', 'missing'),
  'a function that is none': ('f = 3', 'missing'),
  'passes and never ends': (
    'import atexit, time\natexit.register(time.sleep, 1000)\ndef f(x): return x + 1000003',
    'time',
  ),
}
