"""Programs that want to pass without being right, to get out, or to take what is not theirs."""

ANSWER = "def check(f):\n    assert all(map(lambda x: f(x) == x + 1, range(3, 6))), 'wrong'\ncheck(candidate)"
"""The test of a forgery. It would be passed by an answer that ends the loop."""

REFUSED = "found = candidate(0)\nassert found == 'refused', found"
"""The test of a breakout: its function says what it got through."""

_FRAME = """
import json, os, sys, threading
def frame(tree):
    content = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return len(content).to_bytes(4, "big") + content
def write(content):
    for fd in range(3, 64):
        try:
            os.write(fd, content)
        except OSError:
            pass
"""

_VERDICT = '["list", [true, ""]]'


def _answering(tree: str) -> str:
    """A program that writes a frame of its own where answers go."""
    return f"{_FRAME}\ndef f(x):\n    write(frame({tree}))\n    return 0"


def _killing(number: str) -> str:
    """A program that kills; not outside of a jail, where the numbers of processes are higher."""
    return f"import os, signal\ndef f(x):\n    if os.getpid() <= 2: os.kill({number}, signal.SIGKILL)\n    return 0"


FORGERIES = {
    "reads and changes its callers' frames": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for scope in (frame.f_locals, frame.f_globals):
            for name, value in list(scope.items()):
                if isinstance(value, str) and "passed" in value or name in ("passed", "outcome", "number"):
                    scope[name] = True
                    print(name, value)
        frame = frame.f_back
""",
    "looks for the test among all objects": """
import gc
def f(x):
    for thing in gc.get_objects():
        if isinstance(thing, dict) and any("assert" in str(v) and "candidate" in str(v) for v in thing.values()):
            return x + 1
        if isinstance(thing, list) and any(isinstance(v, str) and "check(" in v for v in thing):
            return x + 1
""",
    "ends its process when it is defined": "import os\nos._exit(0)",
    "ends its process when it is called": "import os\ndef f(x): os._exit(0)",
    "exits when it is defined": "import sys\nsys.exit(0)",
    "exits when it is called": "import sys\ndef f(x): sys.exit(0)",
    "interrupts": "def f(x): raise KeyboardInterrupt",
    "ends the test's loop": "def f(x): raise StopIteration",
    "raises GeneratorExit": "def f(x): raise GeneratorExit",
    "defines no function": "g = 1",
    "defines something that cannot be called": "f = 1",
    "registers an exit handler": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "replaces built-in functions": """
import builtins
builtins.all = builtins.any = builtins.isinstance = lambda *a: True
builtins.AssertionError = Warning
def f(x): return 0
""",
    "traces": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef f(x): return 0",
    "is equal to everything": "class A:\n    __eq__ = lambda s, o: True\ndef f(x): return A()",
    "is a number that is equal to everything": "class A(int):\n    __eq__ = lambda s, o: True\ndef f(x): return A(0)",
    "is text that is equal to everything": "class A(str):\n    __eq__ = lambda s, o: True\ndef f(x): return A()",
    "is a list that is equal to everything": "class A(list):\n    __eq__ = lambda s, o: True\ndef f(x): return A()",
    "is true and of every class": """
class A:
    __eq__ = __ne__ = __bool__ = lambda *a: True
    __class__ = int
    __getattr__ = lambda s, n: s
def f(x): return A()
""",
    "prints that it passed": "import sys\nprint('passed')\ndef f(x): sys.__stdout__.write('passed')",
    "raises an error called passed": "class passed(Exception): pass\ndef f(x): raise passed()",
    "raises an error that says passed": "class passed(BaseException): pass\ndef f(x): raise passed('passed')",
    "raises an error that cannot be printed": """
class A(Exception):
    def __str__(self): raise A
def f(x): raise A
""",
    "writes a verdict into every descriptor": _answering(_VERDICT),
    "writes a verdict when it is defined": f"{_FRAME}\nwrite(frame({_VERDICT}) * 3)\ndef f(x): return 0",
    "answers before it is asked": f'{_FRAME}\nwrite(frame(["list", ["returned", True]]) * 9)\nos._exit(0)',
    "answers with an unknown tag": _answering('["eval", "1"]'),
    "answers with code for a number": _answering('["float", "__import__(\'os\').getpid()"]'),
    "answers with a set of lists": _answering('["set", [["list", []]]]'),
    "answers with a very deep list": _answering("b'[' * 200_000"),
    "answers with a frame without an end": _answering("b'x'").replace(
        "write(frame(", "write(b'\\xff\\xff\\xff\\xff' + ("
    ),
    "answers with a pickle": _answering("b'cos\\nsystem\\n(Vtouch here\\ntR.'"),
    "answers that it is ready for ever": _answering('["list", ["ready"]]'),
    "changes the protocol": """
import sys
protocol = sys.modules["protocol"]
protocol.encode = lambda value: ["object", ["int", True, None]]
protocol.decode = protocol.receive = lambda *a: ((0,), {})
def f(x): return 0
""",
    "reads its arguments and its input": """
import os, sys
def f(x):
    said = repr(sys.argv) + repr(sys.orig_argv) + repr(dict(os.environ))
    return x + 1 if "assert" in said else sys.stdin.read()
""",
    "reads what it will be asked": """
import os
def f(x):
    for fd in range(3, 64):
        try:
            os.set_blocking(fd, False)
            if b"assert" in os.read(fd, 1 << 16):
                return x + 1
        except OSError:
            pass
""",
    "reads the memory of its interpreter": "import ctypes\ndef f(x): return ctypes.string_at(0, 100)",
    "executes another program": "import os\ndef f(x): os.execv('/usr/bin/true', ['true'])",
    "recurses without end": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "crashes": "import os\ndef f(x): os.abort()",
    "kills its parent": _killing("os.getppid()"),
    "kills everything": _killing("-1"),
    "closes everything": "import os\ndef f(x):\n    os.closerange(0, 64)\n    return 0",
}
"""None may pass."""


def _trying(code: str) -> str:
    """A program whose function tries something."""
    body = "".join(f"        {line}\n" for line in code.strip().splitlines())
    return (
        "import ctypes, errno, os, signal, socket, sys, threading\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(code):\n    if code < 0:\n        raise OSError(ctypes.get_errno(), 'refused')\n    return code\n"
        f"def f(x):\n    try:\n{body}        return 'got through'\n"
        "    except (OSError, RuntimeError, ValueError, MemoryError):\n        return 'refused'\n"
    )


BREAKOUTS = {
    name: _trying(code)
    for name, code in {
        "reads a file of the user": "open(FILE).read()",
        "writes a file of the user": "open(FILE, 'w').write('x')",
        "deletes a file of the user": "os.remove(FILE)",
        "lists the user's home": "os.listdir(HOME_OF_USER) and os.listdir(DIRECTORY)",
        "makes a file beside the user's": "open(DIRECTORY + '/more', 'w')",
        "follows a link to a file of the user": "os.symlink(FILE, 'link'); open('link').read()",
        "links a file of the user": "os.link(FILE, 'link')",
        "writes in the root": "open('/here', 'w')",
        "makes a directory in the root": "os.mkdir('/here')",
        "writes in /usr": "open('/usr/here', 'w')",
        "writes in /dev": "open('/dev/here', 'w')",
        "writes among the packages": "open(sys.prefix + '/here', 'w')",
        "changes the modules that test it": "open(sys.modules['protocol'].__file__, 'a')",
        "makes the interpreter writable": "os.chmod(os.__file__, 0o777)",
        "moves a directory of the user": "os.rename(DIRECTORY, DIRECTORY + '2')",
        "makes a device": "os.mknod('device', 0o20666, os.makedev(1, 1))",
        "opens the terminal": "open('/dev/tty')",
        "opens the disks": "open('/dev/vda') if os.path.exists('/dev/vda') else open('/dev/mem')",
        "reads /proc": "os.listdir('/proc')",
        "reads /sys": "os.listdir('/sys')",
        "reads passwords": "open('/etc/shadow') if os.path.exists('/etc/shadow') else open('/etc/passwd')",
        "reads the environment's secret": "if 'A_SECRET' not in os.environ: raise OSError",
        "connects to a server on this machine": "socket.create_connection(('127.0.0.1', PORT), 1)",
        "connects to a server elsewhere": "socket.create_connection(('192.0.2.1', 80), 1)",
        "connects to a socket in the file system": "socket.socket(socket.AF_UNIX).connect(SOCKET)",
        "connects to an abstract socket": "socket.socket(socket.AF_UNIX).connect(chr(0) + ABSTRACT)",
        "listens to packets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "forks": "os.fork() or os._exit(0)",
        "starts a daemon": "if not os.fork(): os.setsid(); os.fork(); signal.pause()",
        "starts a program": "__import__('subprocess').run(['/usr/bin/true'])",
        "spawns a program": "os.posix_spawn('/usr/bin/true', ['true'], {})",
        "starts a thread": "threading.Thread(target=signal.pause, daemon=True).start()",
        "starts processes for a pool": "__import__('multiprocessing').Process(target=print).start()",
        "signals a process of this machine": "if VICTIM > 2: os.kill(VICTIM, signal.SIGTERM)",
        "traces a process of this machine": "call(libc.ptrace(16, VICTIM, 0, 0))",
        "traces the first process": "call(libc.ptrace(16, 1, 0, 0))",
        "reads the first process": "call(libc.process_vm_readv(1, bytes(16), 1, bytes(16), 1, 0))",
        "mounts": "call(libc.mount(b'x', b'/tmp', b'tmpfs', 0, b''))",
        "unmounts": "call(libc.umount2(b'/tmp', 2))",
        "makes a namespace of users": "call(libc.unshare(0x10000000))",
        "makes a namespace of mounts": "call(libc.unshare(0x20000))",
        "changes its root": "os.chroot('/tmp')",
        "becomes root": "os.setuid(0) if os.getuid() else os.setgroups([0])",
        "raises its limits": "__import__('resource').setrlimit(9, (1 << 40, 1 << 40))",
        "becomes more important": "os.nice(-5)",
        "takes memory of System V": "call(libc.shmget(0, 1 << 30, 0o600))",
        "takes messages of System V": "call(libc.msgget(0, 0o600))",
        "takes a file in memory": "os.memfd_create('x')",
        "takes a key": "call(libc.syscall(248, b'user', b'a', b'b', 1, -2))",
        "loads a program into the kernel": "call(libc.syscall(321, 0, bytes(128), 128))",
        "writes a large file": "open('large', 'wb').write(bytes(2 << 20))",
        "takes more memory than it may": "bytes(2 << 30)",
        "opens many files": "files = [open('/dev/null') for _ in range(1000)]",
        "makes many files": "for i in range(100_000):\n    with open(str(i), 'w') as file: file.write('x')",
        "fills its folder": "for i in range(99): open(str(i), 'wb').write(bytes(1 << 20))",
    }.items()
}
"""Each has to be refused."""

FLOODS = {
    "loops": "def f(x):\n    while True: pass",
    "loops when it is defined": "while True: pass",
    "sleeps": "import time\ndef f(x): time.sleep(99)",
    "ignores signals": """
import signal
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f(x):
    while True: pass
""",
    "stops itself": "import os, signal\ndef f(x):\n    os.kill(os.getpid(), signal.SIGSTOP)\n    signal.pause()",
    "leaves its session and outlives its parent": """
import ctypes, os, time
def f(x):
    ctypes.CDLL(None).prctl(1, 0)
    try: os.setsid()
    except OSError: pass
    time.sleep(99)
""",
    "prints for ever": "def f(x):\n    while True: print('x' * 100_000)",
    "writes into every descriptor for ever": """
import os
def f(x):
    while True:
        for fd in range(64):
            try: os.write(fd, b'x' * 65536)
            except OSError: pass
""",
    "writes answers for ever": f"{_FRAME}\nwhile True: write(frame(['list', ['ready']]))",
    "returns very much": "def f(x): return 'x' * (64 << 20)",
    "returns very many": "def f(x): return list(range(10**6))",
    "returns a very deep list": "def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
    "returns a list of itself": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "yields for ever": "import itertools\ndef f(x): return itertools.count()",
    "computes a very large number": "def f(x): return 10 ** 10 ** 9",
    "takes memory by and by": "a = []\ndef f(x):\n    while True: a.append(bytes(1 << 20))",
    "is slow to be printed": """
class A(Exception):
    def __str__(self):
        while True: pass
def f(x): raise A
""",
    "is slow to be true": "class A:\n    def __bool__(self):\n        while True: pass\ndef f(x): return A()",
}
"""Each has to end in time, and to leave nothing behind."""
