"""Real servers for tests and benchmarks: started as our own children.

Each server lives in a temporary directory, listens on a unix socket or on a
free loopback port, runs in the foreground and is ended by its own pid. A
server whose program is missing says so in `missing()`, with the remedy.

    redis     redis-server, loaded by redis-benchmark
    nginx     one master and its workers, loaded by wrk
    postgres  a postmaster and its backends, loaded by pgbench
    python    a CPython that calls what it is told on its standard input
"""
import glob
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

START_SECONDS = 20        # a server that is not up by then is broken
STOP_SECONDS = 10         # then it is killed
LOAD_SECONDS = 60         # no load that we start may take longer


def end_by_eof(process):
    """Close its stdin, which ends it; kill it if that does not."""
    process.stdin.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


class ServerError(Exception):
    """A server did not start, stop or answer as it should."""


def which(program):
    """Return the path of program, looking in the sbin directories too."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin"
    return shutil.which(program, path=path)


def lacking(package, *programs):
    """Return "" if all programs are there, else what to install."""
    absent = [name for name in programs if not which(name)]
    if not absent:
        return ""
    return "no %s here: apt-get install %s" % (", ".join(absent), package)


def free_port():
    """Return a loopback TCP port that nobody listens on at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def until(is_ready, what, seconds=START_SECONDS):
    """Call is_ready until it returns a true value; return that value."""
    deadline = time.monotonic() + seconds
    while True:
        value = is_ready()
        if value:
            return value
        if time.monotonic() > deadline:
            raise ServerError("%s: not within %d s" % (what, seconds))
        time.sleep(0.02)


def run(argv, timeout=LOAD_SECONDS, **options):
    """Run a load generator; return its stdout. ServerError if it fails."""
    done = subprocess.run(argv, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=timeout,
                          universal_newlines=True, **options)
    if done.returncode:
        raise ServerError("%s: exit status %d: %s"
                          % (argv[0], done.returncode, done.stdout[-2000:]))
    return done.stdout


class Server:
    """A child process with a directory of its own; a context manager."""

    name = ""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="ubp-%s-" % self.name)
        self.log_path = os.path.join(self.folder, "log")
        self.process = None

    @classmethod
    def missing(cls):
        """Return "" or the reason why this server cannot run here."""
        return ""

    def argv(self):
        raise NotImplementedError

    def is_up(self):
        raise NotImplementedError

    def options(self):
        """Return further arguments for Popen."""
        return {}

    @property
    def pid(self):
        return self.process.pid

    def log(self):
        with open(self.log_path, errors="replace") as file:
            return file.read()

    def start(self):
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                self.argv(), stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, cwd=self.folder, **self.options())
        until(self._is_up_or_dead, self.name + " starts")
        return self

    def _is_up_or_dead(self):
        if self.process.poll() is not None:
            raise ServerError("%s: exit status %d: %s" % (
                self.name, self.process.returncode, self.log()[-2000:]))
        return self.is_up()

    def stop(self):
        """End the child by its pid, politely first; remove the folder."""
        process = self.process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_):
        self.stop()


# ---- redis -----------------------------------------------------------------

class Redis(Server):
    """redis-server on a unix socket, without persistence."""

    name = "redis"

    @classmethod
    def missing(cls):
        return lacking("redis-server", "redis-server", "redis-benchmark")

    @property
    def socket_path(self):
        return os.path.join(self.folder, "s")

    def argv(self):
        return [which("redis-server"), "--port", "0", "--save", "",
                "--unixsocket", self.socket_path, "--dir", self.folder,
                "--appendonly", "no", "--daemonize", "no"]

    def is_up(self):
        try:
            return "redis_version" in self.info("server")
        except OSError:
            return False

    def info(self, section):
        """Return a section of INFO as {key: text}; it costs one command."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(START_SECONDS)
            sock.connect(self.socket_path)
            file = sock.makefile("rwb")
            file.write(b"INFO %s\r\n" % section.encode())
            file.flush()
            size = int(file.readline()[1:])
            text = file.read(size).decode()
        return dict(line.split(":", 1) for line in text.splitlines()
                    if ":" in line)

    def calls(self):
        """Return {command: calls} of INFO commandstats."""
        return {key[len("cmdstat_"):]:
                int(re.search(r"calls=(\d+)", value).group(1))
                for key, value in self.info("commandstats").items()}

    def load(self, requests, clients=20, tests="set,get", *options):
        """Send `requests` of each test; return {test: requests/s}."""
        text = run([which("redis-benchmark"), "-s", self.socket_path, "-q",
                    "-n", str(requests), "-c", str(clients), "-t", tests,
                    "--csv", "--precision", "3"] + list(options))
        rates = re.findall(r'^"(\w+)","([0-9.]+)"', text, re.M)
        if not rates or "rror" in text:
            raise ServerError("redis-benchmark: " + text[-2000:])
        return {test: float(rate) for test, rate in rates}


# ---- nginx -----------------------------------------------------------------

NGINX_CONF = """
daemon off;
%(user)s
worker_processes %(workers)d;
pid %(folder)s/pid;
error_log %(folder)s/error.log warn;
events { worker_connections 512; }
http {
    access_log off;
    sendfile off;
    keepalive_requests 1000000;
    client_body_temp_path %(folder)s/body;
    proxy_temp_path %(folder)s/proxy;
    fastcgi_temp_path %(folder)s/fastcgi;
    uwsgi_temp_path %(folder)s/uwsgi;
    scgi_temp_path %(folder)s/scgi;
    server {
        listen 127.0.0.1:%(port)d;
        location / { return 200 "hello\\n"; }
        location = /status { stub_status; }
    }
}
"""


class Nginx(Server):
    """nginx with a master and two workers on a loopback port."""

    name = "nginx"
    workers = 2

    def __init__(self):
        Server.__init__(self)
        self.port = free_port()

    @classmethod
    def missing(cls):
        return (lacking("nginx", "nginx") or lacking("wrk", "wrk"))

    def argv(self):
        path = os.path.join(self.folder, "nginx.conf")
        with open(path, "w") as file:
            file.write(NGINX_CONF % {
                "folder": self.folder, "port": self.port,
                "workers": self.workers,
                "user": "user root;" if os.getuid() == 0 else ""})
        return [which("nginx"), "-p", self.folder, "-c", path,
                "-e", os.path.join(self.folder, "error.log")]

    def is_up(self):
        try:
            self.status()
        except OSError:
            return False
        return len(self.worker_pids()) == self.workers

    def worker_pids(self):
        path = "/proc/%d/task/%d/children" % (self.pid, self.pid)
        with open(path) as file:
            return [int(word) for word in file.read().split()]

    def status(self):
        """Return (active connections, requests); it costs one request."""
        with socket.create_connection(("127.0.0.1", self.port),
                                      START_SECONDS) as sock:
            sock.sendall(b"GET /status HTTP/1.0\r\n\r\n")
            text = b""
            while True:
                data = sock.recv(65536)
                if not data:
                    break
                text += data
        found = re.search(rb"Active connections: (\d+)[^0-9]*"
                          rb"\n \d+ \d+ (\d+) ", text)
        return tuple(int(number) for number in found.groups())

    def requests(self):
        """Return the requests so far, once ours is the only connection.

        When wrk goes it leaves requests behind that are still served.
        """
        def alone():
            active, requests = self.status()
            return requests if active == 1 else 0
        return until(alone, "nginx is idle")

    def load(self, seconds=1, connections=16):
        """Run wrk; return (requests, [its lines about errors])."""
        text = run([which("wrk"), "-t2", "-c%d" % connections,
                    "-d%ds" % seconds, "--timeout", "30s",
                    "http://127.0.0.1:%d/" % self.port])
        requests = int(re.search(r"(\d+) requests in", text).group(1))
        return requests, re.findall(r"Socket errors:.*|Non-2xx.*", text)


# ---- PostgreSQL ------------------------------------------------------------

class Postgres(Server):
    """A postmaster on a unix socket; every statement goes to its log.

    It refuses to run as root: then the user postgres (or nobody) is used.
    """

    name = "postgres"
    database = "postgres"

    @staticmethod
    def program(name):
        """Return the path of a PostgreSQL server or client program."""
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin/" + name))
        return found[-1] if found else which(name)

    @classmethod
    def missing(cls):
        for name in "postgres", "initdb", "pgbench", "psql":
            if not cls.program(name):
                return ("no %s here: apt-get install postgresql "
                        "postgresql-contrib" % name)
        if os.getuid() == 0 and not cls.account():
            return "no user postgres or nobody: adduser --system postgres"
        return ""

    @staticmethod
    def account():
        """Return the passwd entry of the user that the server runs as."""
        if os.getuid():
            return pwd.getpwuid(os.getuid())
        for name in "postgres", "nobody":
            try:
                return pwd.getpwnam(name)
            except KeyError:
                pass
        return None

    def options(self):
        account = self.account()
        if os.getuid():
            return {}

        def become():
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
        return {"preexec_fn": become}

    def __init__(self):
        Server.__init__(self)
        account = self.account()
        if os.getuid() == 0:
            os.chown(self.folder, account.pw_uid, account.pw_gid)

    @property
    def data(self):
        return os.path.join(self.folder, "data")

    def argv(self):
        self.tool("initdb", "-D", self.data, "-A", "trust", "-N",
                  "-U", "postgres", "--locale=C", "-E", "UTF8", host=False)
        return [self.program("postgres"), "-D", self.data,
                "-k", self.folder, "-c", "listen_addresses=",
                "-c", "fsync=off", "-c", "autovacuum=off",
                "-c", "shared_buffers=16MB", "-c", "log_statement=all",
                "-c", "max_parallel_workers_per_gather=0"]

    def tool(self, name, *args, **options):
        """Run a client or initdb as the server's user; return its stdout."""
        host = options.pop("host", True)
        argv = [self.program(name)] + list(args)
        if host:
            argv[1:1] = ["-h", self.folder, "-U", "postgres"]
        return run(argv, cwd=self.folder, **self.options())

    def is_up(self):
        try:
            self.query("select 1")
        except ServerError:
            return False
        return True

    def query(self, statement):
        """Return the answer of one statement; costs a backend."""
        return self.tool("psql", "-X", "-A", "-t", "-c", statement,
                         self.database).strip()

    def session(self):
        """Return a connection that stays, as a context manager."""
        return Session(self)

    def statements(self):
        """Return how many statements the server's log shows so far."""
        return len(re.findall(r"LOG:  statement: ", self.log()))

    def transactions(self):
        """Return pg_stat_database.xact_commit; costs a statement."""
        return int(self.query("select xact_commit from pg_stat_database "
                              "where datname = current_database()"))

    def stop(self):
        """SIGINT: PostgreSQL's fast shutdown, which ends the backends."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(2)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                pass
        Server.stop(self)

    def fill(self, scale=1):
        self.tool("pgbench", "-i", "-q", "-s", str(scale), self.database)

    def load(self, transactions, clients=4, *options):
        """Run pgbench; return (transactions processed, failed)."""
        text = self.tool("pgbench", "-n", "-c", str(clients), "-j", "2",
                         "-t", str(transactions), *options
                         + (self.database,))
        done = int(re.search(r"actually processed: (\d+)", text).group(1))
        failed = re.search(r"failed transactions: (\d+)", text)
        return done, int(failed.group(1)) if failed else 0


class Session:
    """A psql that is fed one statement at a time; `pid` of its backend."""

    def __init__(self, server):
        self.process = subprocess.Popen(
            [server.program("psql"), "-X", "-A", "-t", "-q",
             "-h", server.folder, "-U", "postgres", server.database],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            universal_newlines=True, bufsize=1, cwd=server.folder,
            **server.options())
        self.pid = int(self.query("select pg_backend_pid()"))

    def query(self, statement):
        """Return the one line that a statement answers."""
        self.process.stdin.write(statement + ";\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        end_by_eof(self.process)


# ---- CPython ---------------------------------------------------------------

PYTHON_CODE = """
import os, sys, threading
stop = False
done = [0, 0]
def busy(i):
    while not stop:
        done[i] += sum(divmod(n, 7)[1] for n in range(1000)) == 2997
threads = [threading.Thread(target=busy, args=(i,)) for i in (0, 1)]
for thread in threads:
    thread.start()
print("up", flush=True)
for line in iter(sys.stdin.readline, ""):
    text, n = line.rsplit(None, 1)
    call = eval("lambda: " + text)
    for _ in range(int(n)):
        call()
    print(n, done[0] > 0 and done[1] > 0, flush=True)
stop = True
for thread in threads:
    thread.join()
"""


class Python(Server):
    """A CPython with two busy threads that calls what it is told."""

    name = "python"

    def argv(self):
        return [sys.executable, "-S", "-c", PYTHON_CODE]

    def start(self):
        self.process = subprocess.Popen(
            self.argv(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            universal_newlines=True, cwd=self.folder)
        if self.process.stdout.readline() != "up\n":
            raise ServerError("python did not start")
        return self

    def call(self, expression, times):
        """Have it evaluate expression `times` times; True if all is well."""
        self.process.stdin.write("%s %d\n" % (expression, times))
        self.process.stdin.flush()
        return self.process.stdout.readline() == "%d True\n" % times

    def stop(self):
        if self.process is not None:
            end_by_eof(self.process)
        Server.stop(self)
