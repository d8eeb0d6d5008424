#!/usr/bin/env python3
"""ubp: put a jump in a running program. Count calls in a live process.

Copy ubp.py and ubp_x86.py onto any x86-64 Linux and run:

    python3 ubp.py count -p PID libc:malloc

     1  Errors             what can go wrong, and in which words
     2  Linux ABI          constants, structures and libc functions, once each
     3  ELF                where is redis-server:processCommand in this process
     4  Stacks             unwinding by .eh_frame, and the names of frames
     5  Tracee             stop all threads, look, run a syscall in one, let go
     6  Arena              the memory ubp adds to a target, and its journal
     7  Results            histograms, keyed sums, events: values to be merged
     8  Probes             plan -> trampoline -> patch -> read -> restore
     9  Breakpoints        sites that trap: debug registers, int3, guardian
    10  Library            attach, launch, Target, Probe, status, clean
    11  Pictures           tables, bars, flame graphs, files for other tools
    12  Command line       verbs, tables, JSON Lines, the live view

Vocabulary, used for nothing else:

    target  the process          tracee   one of its threads, ptrace-stopped
    tgid    a process            tid      a thread; pid only as the user typed
    vaddr   address in a target  offset   in a file
    site    where a probe sits   window   the bytes that a patch overwrites
    arena   the vmas ubp adds    journal  what was changed, kept in the arena

Safety is argued where it is needed; the rules are in README.md.
"""
import os
import sys


def _refuse_shared_folder():
    """Exit if root runs this from a folder that others can write to.

    Whoever may write there could plant an ast.py that root would run, so
    this comes before every import that looks there. The invoking user of
    sudo counts as root. Source: sys.path[0], Python library reference.
    """
    if os.geteuid() != 0:
        return
    folder = (_own_folder() or (sys.path[0] if sys.path else "")) or "."
    trusted = {0, int(os.environ.get("SUDO_UID", "0"))}
    try:
        info = os.stat(folder)
    except OSError:
        return
    group_ok = info.st_gid in (0, int(os.environ.get("SUDO_GID", "0")))
    if (info.st_mode & 0o002 or (info.st_mode & 0o020 and not group_ok)
            or info.st_uid not in trusted):
        sys.stderr.write(
            "ubp: cannot run as root from %r: others can write to that "
            "folder, so they could plant code in it\nubp: hint: copy ubp.py "
            "and ubp_x86.py to a folder that only root can write to\n"
            % os.path.abspath(folder))
        sys.exit(1)


def _own_folder():
    """Where ubp_x86.py is, if Python does not look there by itself: with -I,
    -P and PYTHONSAFEPATH."""
    is_safe = sys.flags.isolated or getattr(sys.flags, "safe_path", False)
    return os.path.dirname(os.path.realpath(__file__)) if is_safe else ""


if __name__ == "__main__":
    _refuse_shared_folder()
    sys.path += filter(None, [_own_folder()])

import gc                                                       # noqa: E402

if __name__ == "__main__":
    gc.disable()        # until something is counted: a tenth of the start

import _thread                                                  # noqa: E402
import bisect                                                   # noqa: E402
import collections                                              # noqa: E402
import ctypes                                                   # noqa: E402
import errno                                                    # noqa: E402
import functools                                                # noqa: E402
import itertools                                                # noqa: E402
import marshal                                                  # noqa: E402
import mmap                                                     # noqa: E402
import operator                                                 # noqa: E402
import queue                                                    # noqa: E402
import re                                                       # noqa: E402
import select                                                   # noqa: E402
import signal                                                   # noqa: E402
import stat                                                     # noqa: E402
import struct                                                   # noqa: E402
import threading                                                # noqa: E402
import time                                                     # noqa: E402
import warnings                                                 # noqa: E402
from typing import NamedTuple, Optional                         # noqa: E402

import ubp_x86                                                  # noqa: E402
from ubp_x86 import (DecodeError, RefusalError, RelocationError,  # noqa: E402
                     UbpError)

__version__ = "0.1.0"
__all__ = ["attach", "launch", "status", "clean", "Target", "Probe", "Count",
           "Hist", "Trace", "Latency", "Stack", "Call", "Hit", "Histogram",
           "Event", "UbpError", "AttachError", "TraceeGone", "SymbolError",
           "ProbeError", "UbpTimeout", "__version__"]


class _Log:
    """The logger "ubp". Until the host has imported logging nobody listens:
    a short command need not spend a twentieth of its time on the import."""

    def __getattr__(self, level):
        if "logging" not in sys.modules:
            return lambda *words: None
        import logging
        logger = logging.getLogger("ubp")
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
        return getattr(logger, level)


log = _Log()

# ---- 1  Errors ------------------------------------------------------------
#
# Whatever a user or a target can cause is a UbpError that says what, to
# whom, why, and what the user can do. Anything else is a bug in ubp and
# shows its traceback. UbpError, DecodeError, RelocationError and
# RefusalError live in ubp_x86, so that both files share one root.


class AttachError(UbpError):
    """The target cannot be traced: permission, kind, or another tracer."""


class TraceeGone(UbpError):
    """The target ended, or became another program by exec."""


class SymbolError(UbpError):
    """No function, or more than the one that was meant."""


class ProbeError(UbpError):
    """A probe that is malformed, not built yet, or could not be armed."""


class InjectionRefused(ProbeError):
    """A syscall that was to be injected is forbidden to the target."""


class MemoryStays(ProbeError):
    """The text of a target is what it was, but it may not unmap our memory.
    """


class UbpTimeout(UbpError):
    """Not done within the time allowed; the target has been released."""


# ---- 2  Linux ABI ---------------------------------------------------------
#
# Every constant, structure and libc function, once, with its header or man
# page. Invariant: what is called while a target is stopped goes through
# PyDLL, which keeps the GIL: CDLL gives it up at each call, and a host with
# busy Python threads would then take milliseconds to give it back.

libc = ctypes.PyDLL(None, use_errno=True)

PTRACE_POKEDATA   = 5            # <linux/ptrace.h>
PTRACE_PEEKUSER, PTRACE_POKEUSER = 3, 6
PTRACE_CONT       = 7
PTRACE_DETACH     = 17
PTRACE_SYSCALL    = 24
PTRACE_SETOPTIONS = 0x4200
PTRACE_GETEVENTMSG = 0x4201
PTRACE_GETSIGINFO = 0x4202
PTRACE_SETSIGINFO = 0x4203
PTRACE_GETREGSET  = 0x4204
PTRACE_SETREGSET  = 0x4205
PTRACE_SEIZE      = 0x4206
PTRACE_INTERRUPT  = 0x4207
PTRACE_LISTEN     = 0x4208
PTRACE_GETSIGMASK = 0x420a
PTRACE_SETSIGMASK = 0x420b
PTRACE_SECCOMP_GET_FILTER     = 0x420c
PTRACE_GET_RSEQ_CONFIGURATION = 0x420f
PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211
PTRACE_O_TRACESYSGOOD = 0x1
PTRACE_O_TRACEFORK, PTRACE_O_TRACEVFORK, PTRACE_O_TRACECLONE = 2, 4, 8
PTRACE_O_TRACEEXEC    = 0x10
PTRACE_O_SUSPEND_SECCOMP = 1 << 21
PTRACE_EVENT_FORK     = 1
PTRACE_EVENT_EXEC     = 4
PTRACE_EVENT_STOP     = 128
NT_PRSTATUS    = 1               # <linux/elf.h>
NT_X86_XSTATE  = 0x202
WNOHANG        = 1               # <linux/wait.h>
WALL           = 0x40000000      # __WALL
SCHED_FIFO     = 1               # <linux/sched.h>
SCHED_RESET_ON_FORK = 0x40000000
KCMP_VM        = 1               # <linux/kcmp.h>
MFD_CLOEXEC       = 1            # <linux/memfd.h>
MFD_ALLOW_SEALING = 2
MFD_NOEXEC_SEAL   = 8
F_ADD_SEALS    = 1033            # <linux/fcntl.h>
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW = 1, 2, 4
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4      # <asm-generic/mman-common.h>
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 1, 2, 0x10, 0x20
MAP_FIXED_NOREPLACE = 0x100000
MADV_WIPEONFORK = 18
MAP_FAILED = (1 << 64) - 1
CLOCK_REALTIME = 0               # <linux/time.h>
PF_KTHREAD     = 0x00200000      # <linux/sched.h>, field 9 of /proc/PID/stat
CAP_SYS_PTRACE = 19              # <linux/capability.h>
CAP_SYS_ADMIN  = 21
AT_ENTRY       = 9               # <linux/auxvec.h>
AUDIT_ARCH_X86_64 = 0xc000003e   # <linux/audit.h>
PAGE           = mmap.PAGESIZE
SYSCALL_EVENT_SIGNAL = signal.SIGTRAP | 0x80    # ptrace(2), TRACESYSGOOD

# <asm/unistd_64.h>; those that are injected, and those libc may not wrap
SYS_close, SYS_stat, SYS_mmap, SYS_munmap, SYS_madvise = 3, 4, 9, 11, 28
SYS_rt_sigaction, SYS_rt_tgsigqueueinfo = 13, 297
SYS_clone, SYS_gettid, SYS_tgkill = 56, 186, 234
SYS_getdents64, SYS_kcmp, SYS_memfd_create = 217, 312, 319
SYS_perf_event_open = 298
SYS_prctl, SYS_process_vm_readv = 157, 310
SYS_futex, SYS_set_robust_list = 202, 273
FUTEX_WAIT, FUTEX_WAKE, FUTEX_WAITERS = 0, 1, 0x80000000    # <linux/futex.h>
FUTEX_WAIT_BITSET = 9
SYS_clock_gettime = 228
PR_GET_TSC, PR_TSC_ENABLE, PR_SET_PDEATHSIG = 25, 1, 1   # <linux/prctl.h>

PERF_TYPE_SOFTWARE, PERF_TYPE_BREAKPOINT = 1, 5     # <linux/perf_event.h>
PERF_COUNT_SW_DUMMY    = 9
PERF_SAMPLE_IP, PERF_SAMPLE_TID, PERF_SAMPLE_TIME = 1, 2, 4
PERF_SAMPLE_CPU        = 1 << 7
PERF_SAMPLE_REGS_USER  = 1 << 12
PERF_SAMPLE_STACK_USER = 1 << 13
PERF_SAMPLE_IDENTIFIER = 1 << 16
PERF_FLAG_FD_CLOEXEC   = 8
PERF_EVENT_IOC_ENABLE, PERF_EVENT_IOC_DISABLE = 0x2400, 0x2401
PERF_EVENT_IOC_SET_OUTPUT = 0x2405
PERF_EVENT_IOC_ID      = 0x80082407
PERF_RECORD_LOST       = 2
PERF_RECORD_SAMPLE     = 9
HW_BREAKPOINT_W, HW_BREAKPOINT_RW, HW_BREAKPOINT_X = 2, 3, 4
#                          <linux/hw_breakpoint.h>
# Bits of perf_event_attr's flags, in the order of the header.
PERF_DISABLED, PERF_INHERIT = 1 << 0, 1 << 1
PERF_EXCLUDE_KERNEL, PERF_EXCLUDE_HV = 1 << 5, 1 << 6
PERF_WATERMARK, PERF_USE_CLOCKID, PERF_REMOVE_ON_EXEC = (
    1 << 14, 1 << 25, 1 << 36)


class Iovec(ctypes.Structure):
    """struct iovec, <sys/uio.h>."""
    _fields_ = [("iov_base", ctypes.c_void_p),    # vaddr in the tracee
                ("iov_len", ctypes.c_size_t)]     # bytes


class Timespec(ctypes.Structure):
    """struct timespec, <time.h>."""
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


class RseqConfiguration(ctypes.Structure):
    """struct ptrace_rseq_configuration, <linux/ptrace.h>."""
    _fields_ = [("rseq_abi_pointer", ctypes.c_uint64),
                ("rseq_abi_size", ctypes.c_uint32),
                ("signature", ctypes.c_uint32),
                ("flags", ctypes.c_uint32), ("pad", ctypes.c_uint32)]


class SudConfig(ctypes.Structure):
    """struct ptrace_sud_config, <linux/ptrace.h>."""
    _fields_ = [("mode", ctypes.c_uint64), ("selector", ctypes.c_uint64),
                ("offset", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class PerfEventAttr(ctypes.Structure):
    """struct perf_event_attr, <linux/perf_event.h>, up to its VER5."""
    _fields_ = [("type", ctypes.c_uint32), ("size", ctypes.c_uint32),
                ("config", ctypes.c_uint64),
                ("sample_period", ctypes.c_uint64),
                ("sample_type", ctypes.c_uint64),
                ("read_format", ctypes.c_uint64),
                ("flags", ctypes.c_uint64),         # its bit field
                ("wakeup_watermark", ctypes.c_uint32),
                ("bp_type", ctypes.c_uint32),
                ("bp_addr", ctypes.c_uint64), ("bp_len", ctypes.c_uint64),
                ("branch_sample_type", ctypes.c_uint64),
                ("sample_regs_user", ctypes.c_uint64),
                ("sample_stack_user", ctypes.c_uint32),
                ("clockid", ctypes.c_int32),
                ("sample_regs_intr", ctypes.c_uint64),
                ("aux_watermark", ctypes.c_uint32),
                ("sample_max_stack", ctypes.c_uint16),
                ("reserved", ctypes.c_uint16)]


assert ctypes.sizeof(PerfEventAttr) == 112
assert ctypes.sizeof(SudConfig) == 32
assert ctypes.sizeof(Iovec) == 16 and ctypes.sizeof(RseqConfiguration) == 24


def _declare(name, restype, *argtypes):
    """Return libc's function name with its prototype set, or None."""
    function = getattr(libc, name, None)
    if function is not None:
        function.argtypes, function.restype = list(argtypes), restype
    return function


_long, _int, _ptr = ctypes.c_long, ctypes.c_int, ctypes.c_void_p
_ulong, _size = ctypes.c_ulong, ctypes.c_size_t
_ptrace = _declare("ptrace", _long, _long, _int, _ptr, _ptr)
# PTRACE_SEIZE can block, behind an execve that waits for threads we have
# seized already (ptrace(2), BUGS): the GIL is given up for this one.
_ptrace_seize = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace_seize.argtypes, _ptrace_seize.restype = _ptrace.argtypes, _long
# So for a wait without end, of the guardian.
_waitpid_any = ctypes.CDLL(None, use_errno=True).waitpid
_waitpid_any.argtypes, _waitpid_any.restype = [_int, _ptr, _int], _int
_waitpid = _declare("waitpid", _int, _int, _ptr, _int)
_nanosleep = _declare("nanosleep", _int, _ptr, _ptr)
_pwrite = _declare("pwrite", ctypes.c_ssize_t, _int, ctypes.c_char_p, _size,
                   ctypes.c_int64)
_readv = _declare("process_vm_readv", ctypes.c_ssize_t, _int, _ptr, _ulong,
                  _ptr, _ulong, _ulong)
_writev = _declare("process_vm_writev", ctypes.c_ssize_t, _int, _ptr, _ulong,
                   _ptr, _ulong, _ulong)
_sigtimedwait = _declare("sigtimedwait", _int, _ptr, _ptr, _ptr)
_clock_gettime = _declare("clock_gettime", _int, _int, _ptr)
_mmap = _declare("mmap", _ptr, _ptr, _size, _int, _int, _int, ctypes.c_int64)
_munmap = _declare("munmap", _int, _ptr, _size)
_mprotect = _declare("mprotect", _int, _ptr, _size, _int)
_open = _declare("open", _int, ctypes.c_char_p, _int)
_close = _declare("close", _int, _int)
_ioctl = _declare("ioctl", _int, _int, _ulong, _ulong)
_read = _declare("read", ctypes.c_ssize_t, _int, _ptr, _size)
_lseek = _declare("lseek", ctypes.c_int64, _int, ctypes.c_int64, _int)
_syscall = _declare("syscall", _long, _long, _long, _long, _long, _long,
                    _long)
_futex = ctypes.CDLL(None).syscall      # frees the GIL: not in a pause
_futex.argtypes, _futex.restype = [_long] * 7, _long


def _check(result):
    """Return result; raise OSError from errno if it is -1."""
    if result == -1:
        err = ctypes.get_errno()
        raise OSError(err, os.strerror(err))
    return result


def ptrace(request, tid, addr=0, data=0):
    """ptrace(2), for all but the PEEK requests. Raises OSError.

    Call only from the thread that attached. The kernel binds a tracee to
    one tracer *thread*; any other gets ESRCH, as if the tracee had died.
    """
    return _check(_ptrace(request, tid, addr, data))


def wait_nohang(tid, status=None):
    """waitpid(2) for one tid, __WALL|WNOHANG. -> status, or None if none.

    Raises ChildProcessError when tid is neither child nor tracee.
    """
    status = ctypes.c_int() if status is None else status
    if _check(_waitpid(tid, ctypes.addressof(status), WALL | WNOHANG)) == 0:
        return None
    return status.value


def nap(nanoseconds):
    """nanosleep(2) with the GIL kept: only for naps inside a pause."""
    span = Timespec(nanoseconds // 10**9, nanoseconds % 10**9)
    _nanosleep(ctypes.addressof(span), None)


class StopWaiter:
    """Sleeps until a tracee stops, never past a deadline.

    The kernel sends SIGCHLD to the tracer at each stop, and sigtimedwait(2)
    takes it in this thread, without a handler. Where it does not come (the
    host ignores SIGCHLD, or another thread took it), naps do: ever longer
    ones, since a SCHED_FIFO thread that naps for a few microseconds at a
    time never lets a tracee on its own processor get anything done.
    """

    def __init__(self):
        self._set = ctypes.create_string_buffer(128)    # sigset_t
        self._set[(signal.SIGCHLD - 1) // 8] = bytes(
            [1 << (signal.SIGCHLD - 1) % 8])
        self._taken = False         # a SIGCHLD that the host may want
        self.restart()

    def restart(self):
        """A new wait begins."""
        self._rest, self._misses = 20000, 0

    def sleep(self):
        """Until some tracee may have stopped."""
        if self._misses < 2 and _sigtimedwait is not None:
            span = Timespec(0, max(200000, self._rest))
            if _sigtimedwait(ctypes.addressof(self._set), None,
                             ctypes.addressof(span)) == signal.SIGCHLD:
                self._taken = True
                return
            self._misses += 1
        else:
            nap(self._rest)
        self._rest = min(self._rest * 2, 1000000)

    def give_back(self):
        """Send on the SIGCHLD that was taken: a child of the host may have
        ended meanwhile, and signals of one kind are merged."""
        if self._taken:
            self._taken = False
            os.kill(os.getpid(), signal.SIGCHLD)


def syscall(number, *args):
    """syscall(2) with up to five integers. Raises OSError."""
    return _check(_syscall(number, *(args + (0,) * (5 - len(args)))))


def ioctl(fd, request, argument):
    """ioctl(2) with an integer or an address. Raises OSError."""
    return _check(_ioctl(fd, request, argument))


def read_memory(tid, vaddr, size):
    """process_vm_readv(2): size bytes at vaddr. Raises OSError.

    A range that is only partly readable gives EFAULT, never fewer bytes.
    """
    data = read_beginning(tid, vaddr, size)
    if len(data) != size:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    return data


def read_beginning(tid, vaddr, size):
    """process_vm_readv(2): of size bytes at vaddr those before the first that
    cannot be read. Raises OSError if there is none.

    Pages that no map shows may be among them: glibc 2.42 guards the stacks
    of its threads by MADV_GUARD_INSTALL, madvise(2), and they share a vma.
    """
    data = ctypes.create_string_buffer(size)
    local = Iovec(ctypes.addressof(data), size)
    remote = Iovec(vaddr, size)
    n = _check(_readv(tid, ctypes.addressof(local), 1,
                      ctypes.addressof(remote), 1, 0))
    return data.raw if n == size else data.raw[:n]


def write_memory(tid, vaddr, data):
    """process_vm_writev(2): data to writable memory. Raises OSError."""
    buffer = ctypes.create_string_buffer(data, len(data))
    local = Iovec(ctypes.addressof(buffer), len(data))
    remote = Iovec(vaddr, len(data))
    n = _check(_writev(tid, ctypes.addressof(local), 1,
                       ctypes.addressof(remote), 1, 0))
    if n != len(data):
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


def is_same_mm(one, other):
    """kcmp(2): do two processes share one address space? None: unknown."""
    try:
        return syscall(SYS_kcmp, one, other, KCMP_VM, 0, 0) == 0
    except OSError:
        return None


class HeldFile:
    """A file of /proc that is opened early and read during a pause.

    os.open, os.read and os.listdir give up the GIL; these do not.
    """

    def __init__(self, path, flags=os.O_RDONLY):
        self.fd = _check(_open(path.encode(), flags | os.O_CLOEXEC))
        self._buffer = ctypes.create_string_buffer(32768)

    def read(self):
        """The first 32 KiB, read anew. Raises OSError."""
        _check(_lseek(self.fd, 0, os.SEEK_SET))
        n = _check(_read(self.fd, ctypes.addressof(self._buffer), 32768))
        return self._buffer.raw[:n]

    def numbers(self):
        """The names in a folder that are numbers. Raises OSError."""
        _check(_lseek(self.fd, 0, os.SEEK_SET))
        found = []
        while True:
            n = _check(_syscall(SYS_getdents64, self.fd,
                                ctypes.addressof(self._buffer), 32768, 0, 0))
            if n == 0:
                return found
            data, at = self._buffer.raw[:n], 0
            while at < n:           # struct linux_dirent64, getdents(2)
                size = data[at + 16] | data[at + 17] << 8
                name = data[at + 19:data.index(b"\0", at + 19)]
                if name.isdigit():
                    found.append(int(name))
                at += size

    def write(self, vaddr, data):
        """pwrite(2) at vaddr, for /proc/PID/mem. Raises OSError."""
        if _check(_pwrite(self.fd, data, len(data), vaddr)) != len(data):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def close(self):
        if self.fd >= 0:
            _close(self.fd)
            self.fd = -1


class Mapping(NamedTuple):
    """A line of /proc/PID/maps, proc(5)."""
    start: int
    end: int
    perms: str              # "r-xp"
    offset: int
    device: str             # "08:01", in hexadecimal
    inode: int
    path: str               # "" if anonymous; " (deleted)" kept


_MAPS_LINE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) (\S+) (\d+) *(.*)$", re.M)


def read_proc(path):
    """The bytes of a /proc file, or b"" where it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:                # open() would ask five times what kind of file it is
        parts = [os.read(fd, 1 << 16)]
        while parts[-1]:
            parts.append(os.read(fd, 1 << 16))
        return b"".join(parts)
    except OSError:
        return b""
    finally:
        os.close(fd)


def read_maps(tid):
    """The vmas of a process in address order; [] if gone or unreadable."""
    return [Mapping(int(start, 16), int(end, 16), perms.decode(),
                    int(offset, 16), device.decode(), int(inode),
                    re.sub(rb"\\012", b"\n", path).decode(
                        errors="surrogateescape"))
            for start, end, perms, offset, device, inode, path
            in _MAPS_LINE.findall(read_proc("/proc/%d/maps" % tid))]


def read_status(pid):
    """/proc/PID/status as {name: text}; {} if there is no such process.

    pid   a number, or "self"
    """
    text = read_proc("/proc/%s/status" % pid).decode(errors="replace")
    return dict(line.split(":\t", 1) for line in text.splitlines()
                if ":\t" in line)


def read_stat(pid):
    """/proc/PID/stat behind the name: field n of proc(5) is at n - 3."""
    text = read_proc("/proc/%d/stat" % pid)
    return text.rpartition(b") ")[2].decode(errors="replace").split()


def is_zombie(tid):
    """Has a thread ended, and is kept for who waits for it?"""
    return read_stat(tid)[:1] == ["Z"]


def start_time(pid):
    """When a process began, in clock ticks since boot; 0 if it is gone.

    With the pid it names one process for good: pids are reused.
    """
    fields = read_stat(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def thread_ids(tgid):
    """The tids of a process, in the kernel's order; [] if it is gone."""
    try:
        return [int(name) for name in os.listdir("/proc/%d/task" % tgid)]
    except OSError:
        return []


def memory_tid(pid):
    """A tid of a process whose /proc/TID shows its memory, proc(5).

    A leader that has ended while other threads live is a zombie: its maps
    are empty. /proc has those of each thread, though it does not list them.
    """
    if read_stat(pid)[:1] in (["Z"], ["X"]):
        for tid in thread_ids(pid):
            if read_proc("/proc/%d/maps" % tid):
                return tid
    return pid


def is_own_page(pid, vaddr, size=1):
    """Is a page of a process a copy of its own, no longer its file's? Or one
    of those that hold the size bytes at vaddr.

    Text that was written to remains one when it is put back; that of a
    library which is loaded again is none. True if the kernel does not tell.
    Source: Documentation/admin-guide/mm/pagemap.rst, bits 61 to 63.
    """
    try:
        with open("/proc/%d/pagemap" % memory_tid(pid), "rb", 0) as file:
            first, last = vaddr // PAGE, (vaddr + size - 1) // PAGE
            words = os.pread(file.fileno(), 8 * (last - first + 1), 8 * first)
    except OSError:
        return True
    return len(words) != 8 * (last - first + 1) or any(
        word >> 62 != 0 and not word >> 61 & 1
        for word, in struct.iter_unpack("<Q", words))


def comm(pid):
    """The name of a process, as ps prints it; "?" if it is gone."""
    name = read_proc("/proc/%d/comm" % pid).decode(errors="backslashreplace")
    return name.rstrip("\n") or "?"


# ---- 3  ELF ---------------------------------------------------------------
#
# A pattern such as `libc:malloc` must become addresses in one process. The
# files that the process maps say where its functions are, and they are
# hostile: truncated, cyclic, replaced, or grown while we read. So a file is
# read with pread and never mapped (a file cut short under a mapping is a
# SIGBUS), each table is read when first asked for, its size is bounded by
# MAX_TABLE, and a table that lies is left out and noted.
# Invariant: vaddrs inside Elf, SymbolTable and Unwind are those of the file,
# as nm prints them; only Module adds the load bias, in its public methods.

ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")      # Elf64_Ehdr, <elf.h>
PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")          # Elf64_Phdr
SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")        # Elf64_Shdr
assert (ELF_HEADER.size, PROGRAM_HEADER.size, SECTION_HEADER.size) \
    == (64, 56, 64)
SYMBOL_SIZE = 24                                     # Elf64_Sym

ET_EXEC, EM_X86_64 = 2, 62
PT_LOAD, PT_DYNAMIC, PT_NOTE, PT_GNU_EH_FRAME = 1, 2, 4, 0x6474e550
PF_X, PF_W = 1, 2
SHT_SYMTAB, SHT_RELA, SHT_NOBITS, SHT_DYNSYM = 2, 4, 8, 11
SHF_ALLOC, SHF_EXECINSTR = 2, 4
DT_NEEDED, DT_PLTRELSZ, DT_HASH, DT_STRTAB = 1, 2, 4, 5
DT_SYMTAB, DT_RELA = 6, 7
DT_RELASZ, DT_STRSZ, DT_INIT, DT_FINI, DT_SONAME = 8, 10, 12, 13, 14
DT_JMPREL, DT_RELRSZ, DT_RELR, DT_GNU_HASH = 23, 35, 36, 0x6ffffef5
STT_NOTYPE, STT_OBJECT, STT_FUNC, STT_GNU_IFUNC = 0, 1, 2, 10
STT_TLS      = 6
STB_LOCAL = 0
R_X86_64_64, R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT = 1, 6, 7     # psABI 4.4
R_X86_64_RELATIVE, R_X86_64_IRELATIVE = 8, 37
NT_GNU_BUILD_ID = 3
AT_PHDR = 3                                          # <linux/auxvec.h>

MAX_TABLE = 1 << 28      # bytes of one table; a 500 000-symbol one has 2^25
MAX_SYMBOLS = 1 << 22
MAX_HEADERS = 1 << 16    # sections, as e_shnum is 16 bits
MAX_LOADS = 64           # PT_LOAD segments; linkers write four or five
MAX_FRAME_ENTRY = 1 << 16    # bytes of one FDE; the longest in gcc has 20 000
MAX_ALIASES = 1000       # symbols at one address that are looked at
MAX_NAME = 4096          # bytes of a name that are looked at
MAX_LINKS = 40           # symbolic links in a path, as in path_resolution(7)
VADDR_END = 1 << 47      # user addresses end here, psABI 3.3.2


class _Lazy:
    """An attribute computed when first read, then kept."""

    def __init__(self, compute):
        self.compute, self.__doc__ = compute, compute.__doc__

    def __get__(self, owner, cls):
        value = self.compute(owner)
        owner.__dict__[self.compute.__name__] = value
        return value


class _Truncated(Exception):
    """A table ended, or led nowhere, while it was being read."""


class Segment(NamedTuple):
    """A program header; the vaddr is the file's."""
    type: int
    flags: int
    offset: int
    vaddr: int
    size: int               # bytes in the file
    memory_size: int = 0    # and in memory


class Section(NamedTuple):
    """A section header; the vaddr is the file's."""
    name: bytes
    type: int
    flags: int
    vaddr: int
    offset: int
    size: int
    link: int


class FileImage:
    """The bytes of an open file. Owns the descriptor.

    Read by pread(2) and not mapped: an access behind the end of a file that
    was cut short after it was mapped is SIGBUS (mmap(2)), and the host would
    die of it, in the middle of a pause perhaps. Here it is a short read.
    """

    fd = -1

    def __init__(self, fd):
        self.fd = fd
        self.size = os.fstat(fd).st_size

    def read(self, offset, size):
        """Up to size bytes at offset: fewer where the file has no more."""
        size = min(size, self.size - offset)
        if offset < 0 or size <= 0:
            return b""
        try:
            return os.pread(self.fd, size, offset)
        except (OSError, OverflowError):
            return b""

    def close(self):
        """Give the descriptor back; nothing can be read any more."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close


class BytesImage:
    """An ELF file that is already in memory: the vdso, MiniDebugInfo."""

    def __init__(self, data):
        self.data, self.size = data, len(data)

    def read(self, offset, size):
        return self.data[offset:offset + size] if offset >= 0 < size else b""


class MemoryImage:
    """What a process has mapped of a file that can no longer be opened.

    maps   the Mappings of the file; offsets between them read as b""
    """

    def __init__(self, pid, maps):
        self.pid, self.maps = pid, maps
        self.size = max(m.offset + m.end - m.start for m in maps)

    def read(self, offset, size):
        for m in self.maps:
            if m.offset <= offset < m.offset + m.end - m.start:
                vaddr = m.start + offset - m.offset
                return _peek(self.pid, vaddr, min(size, m.end - vaddr))
        return b""


def _peek(pid, vaddr, size, read=read_memory):
    """Memory of a process, or b"" where it cannot be read."""
    if size <= 0 or vaddr < 0 or vaddr + size > VADDR_END:
        return b""
    try:
        return read(pid, vaddr, size)
    except OSError:
        return b""


class Cursor:
    """Reads DWARF's numbers from bytes. Raises _Truncated at the end.

    vaddr  where data[0] is, for pc-relative pointers
    """

    def __init__(self, data, vaddr):
        self.data, self.vaddr, self.at = data, vaddr, 0

    def number(self, size, signed=False):
        """A little-endian integer of size bytes."""
        end = self.at + size
        if end > len(self.data):
            raise _Truncated()
        value = int.from_bytes(self.data[self.at:end], "little",
                               signed=signed)
        self.at = end
        return value

    def uleb(self, signed=False):
        """A LEB128 number of at most 10 bytes. Source: DWARF 4, 7.6."""
        value = shift = 0
        while shift < 70:
            byte = self.number(1)
            value |= (byte & 0x7f) << shift
            shift += 7
            if byte < 0x80:
                if signed and byte & 0x40:
                    value -= 1 << shift
                return value
        raise _Truncated()

    def pointer(self, encoding, function=0):
        """A pointer in a DW_EH_PE encoding. Source: LSB 5.0, 10.5.1.

        An indirect one is returned as the vaddr that holds it.
        """
        here, form = self.vaddr + self.at, encoding & 0x0f
        if form in (0x01, 0x09):
            value = self.uleb(signed=form == 0x09)
        else:
            size = {0: 8, 2: 2, 3: 4, 4: 8, 0xa: 2, 0xb: 4, 0xc: 8}.get(form)
            if size is None:
                raise _Truncated()
            value = self.number(size, signed=form > 8)
        base = {0x00: 0, 0x10: here, 0x40: function}.get(encoding & 0x70)
        if base is None:
            raise _Truncated()
        return (value + base) % (1 << 64) if value else 0


class Elf:
    """One ELF file: headers, tables and bytes, each read when asked for.

    Raises SymbolError if it is no ELF file for x86-64; later finds are noted.
    """

    def __init__(self, image, name):
        self.image, self.name, self.notes = image, name, []
        self.bias = 0                   # what a loader added to its words
        header = image.read(0, ELF_HEADER.size)
        if len(header) < ELF_HEADER.size or header[:4] != b"\x7fELF":
            raise SymbolError("read", name, "not an ELF file")
        (ident, self.type, machine, _, self.entry, self._phoff, self._shoff,
         _, _, self._phentsize, self._phnum, self._shentsize, self._shnum,
         self._shstrndx) = ELF_HEADER.unpack(header)
        if ident[4:6] != b"\2\1" or machine != EM_X86_64:
            raise SymbolError("read", name, "not an ELF file for x86-64")
        self.segments = self._read_segments()
        self.loads = [s for s in self.segments
                      if s.type == PT_LOAD][:MAX_LOADS]

    def note(self, text):
        """Remember, once, what of this file had to be left out."""
        if text not in self.notes:
            self.notes.append(text)

    def table(self, offset, size, what):
        """size bytes at offset, or fewer and a note if that cannot be."""
        data = b"" if size > MAX_TABLE else self.image.read(offset, size)
        if len(data) < size:
            self.note("%s: %s is cut short" % (self.name, what))
        return data

    def _read_segments(self):
        if self._phentsize != PROGRAM_HEADER.size:
            return []
        data = self.image.read(self._phoff, self._phnum * 56)
        rows = PROGRAM_HEADER.iter_unpack(data[:len(data) // 56 * 56])
        return [Segment(kind, flags, offset, vaddr, size, in_memory)
                for kind, flags, offset, vaddr, _, size, in_memory, _ in rows
                if vaddr + size < VADDR_END]

    @_Lazy
    def sections(self):
        """The section headers; [] in memory and in a file without them."""
        if self._shentsize != SECTION_HEADER.size or not self._shoff:
            return []
        n = self._shnum
        if n == 0:                      # more than 16 bits hold: gABI, 4
            first = self.image.read(self._shoff, 64)
            n = SECTION_HEADER.unpack(first)[5] if len(first) == 64 else 0
        data = self.image.read(self._shoff, min(n, MAX_HEADERS) * 64)
        rows = list(SECTION_HEADER.iter_unpack(data[:len(data) // 64 * 64]))
        index = self._shstrndx
        if index == 0xffff and rows:    # SHN_XINDEX
            index = rows[0][6]
        names = b""
        if index < len(rows):
            names = self.image.read(rows[index][4],
                                    min(rows[index][5], 1 << 24))
        return [Section(_c_string(names, name), kind, flags, vaddr, offset,
                        size, link)
                for name, kind, flags, vaddr, offset, size, link, _, _, _
                in rows]

    def section(self, name):
        """The first section of that name that has bytes, or None."""
        for section in self.sections:
            if section.name == name and section.type != SHT_NOBITS:
                return section
        return None

    def section_bytes(self, section):
        """The bytes of a section, or fewer and a note."""
        return self.table(section.offset, section.size,
                          _decode(section.name) or "a section")

    def offset_of(self, vaddr):
        """File offset of a vaddr and the bytes its segment has from there.

        -> (offset, size), or (0, 0) where the file has no byte for it.
        """
        for load in self.loads:
            if load.vaddr <= vaddr < load.vaddr + load.size:
                skip = vaddr - load.vaddr
                return load.offset + skip, load.size - skip
        return 0, 0

    def read_vaddr(self, vaddr, size):
        """Up to size of the file's bytes at a vaddr, within its segment."""
        offset, available = self.offset_of(vaddr)
        return self.image.read(offset, min(size, available, MAX_TABLE))

    @_Lazy
    def code_ranges(self):
        """Executable (low, high): sections, or segments without them."""
        ranges = [(s.vaddr, s.vaddr + s.size) for s in self.sections
                  if s.flags & SHF_EXECINSTR and s.flags & SHF_ALLOC
                  and s.type != SHT_NOBITS and s.size]
        loads = self.code_loads
        ranges = [(low, high) for low, high in ranges
                  if any(a <= low and high <= b for a, b in loads)]
        return sorted(ranges) or loads

    @_Lazy
    def code_loads(self):
        """Executable (low, high) of the segments, sorted."""
        return sorted((s.vaddr, s.vaddr + s.size) for s in self.loads
                      if s.flags & PF_X and s.size)

    def build_id_at(self, read):
        """The NT_GNU_BUILD_ID as hex, "" if none. read: (segment) -> bytes."""
        for segment in self.segments:
            if segment.type == PT_NOTE and segment.size < 1 << 16:
                found = _find_build_id(read(segment))
                if found:
                    return found
        return ""

    @_Lazy
    def build_id(self):
        """The file's build-id in hex, "" if it has none."""
        found = self.build_id_at(
            lambda segment: self.image.read(segment.offset, segment.size))
        section = None if found else self.section(b".note.gnu.build-id")
        if section and section.size < 1 << 16:       # a debug file has these
            found = _find_build_id(self.section_bytes(section))
        return found

    @_Lazy
    def is_go(self):
        """Is Go code in it? Its linker says so in a note, or in the names of
        sections: .gopclntab, .data.rel.ro.gopclntab where it is PIE."""
        return any(section.name.endswith(b".gopclntab")
                   for section in self.sections) or any(
            name == b"Go\0\0" for segment in self.segments
            if segment.type == PT_NOTE and segment.size < 1 << 16
            for name, _, _ in _iter_notes(
                self.image.read(segment.offset, segment.size)))

    @_Lazy
    def dynamic(self):
        """{tag: value} of PT_DYNAMIC, the first of each tag."""
        tags = {}
        for segment in self.segments:
            if segment.type == PT_DYNAMIC:
                data = self.image.read(segment.offset,
                                       min(segment.size, 1 << 16))
                for tag, value in struct.iter_unpack(
                        "<QQ", data[:len(data) // 16 * 16]):
                    if tag == 0:
                        break
                    tags.setdefault(tag, value)
        return tags

    def dynamic_vaddr(self, tag):
        """A pointer of PT_DYNAMIC as the file's vaddr, or 0.

        glibc's loader adds the bias to those in memory, musl's does not.
        """
        value = self.dynamic.get(tag, 0)
        return value - self.bias if value >= self.bias else value

    def dynamic_table(self, pointer_tag, size_tag):
        """The bytes that a pointer and a size of PT_DYNAMIC describe."""
        vaddr = self.dynamic_vaddr(pointer_tag)
        size = self.dynamic.get(size_tag, 0)
        data = self.read_vaddr(vaddr, size) if vaddr else b""
        if len(data) < size:
            self.note("%s: the table of DT_ tag %d is cut short"
                      % (self.name, pointer_tag))
        return data

    @_Lazy
    def needed(self):
        """The names in DT_NEEDED, of files or SONAMEs."""
        strings, names = self.dynamic_table(DT_STRTAB, DT_STRSZ), []
        for segment in self.segments:
            if segment.type == PT_DYNAMIC:
                data = self.image.read(segment.offset,
                                       min(segment.size, 1 << 16))
                names += [_decode(_c_string(strings, value)) for tag, value
                          in struct.iter_unpack("<QQ", data[:len(data) // 16
                                                            * 16])
                          if tag == DT_NEEDED and value < len(strings)]
        return names

    @_Lazy
    def soname(self):
        """DT_SONAME as text, "" if there is none."""
        strings = self.dynamic_table(DT_STRTAB, DT_STRSZ)
        offset = self.dynamic.get(DT_SONAME, 0)
        return _decode(_c_string(strings, offset)) if offset else ""

    @_Lazy
    def dynsym(self):
        """The SymbolTable that the loader uses, through PT_DYNAMIC."""
        vaddr = self.dynamic_vaddr(DT_SYMTAB)
        n = self._n_dynamic_symbols() if vaddr else 0
        return SymbolTable(self.read_vaddr(vaddr, n * SYMBOL_SIZE),
                           self.dynamic_table(DT_STRTAB, DT_STRSZ))

    def _n_dynamic_symbols(self):
        """How many: PT_DYNAMIC does not say, the hash tables imply it."""
        for section in self.sections:
            if (section.type == SHT_DYNSYM
                    and section.vaddr == self.dynamic_vaddr(DT_SYMTAB)):
                return min(section.size // SYMBOL_SIZE, MAX_SYMBOLS)
        vaddr = self.dynamic_vaddr(DT_HASH)
        head = self.read_vaddr(vaddr, 8) if vaddr else b""
        if len(head) == 8:              # nbucket, nchain
            return min(struct.unpack("<II", head)[1], MAX_SYMBOLS)
        vaddr = self.dynamic_vaddr(DT_GNU_HASH)
        return self._n_gnu_hash(vaddr) if vaddr else 0

    def _n_gnu_hash(self, vaddr):
        """Symbols that a DT_GNU_HASH covers: the end of its last chain."""
        head = self.read_vaddr(vaddr, 16)
        if len(head) < 16:
            return 0
        n_buckets, first, n_bloom, _ = struct.unpack("<IIII", head)
        buckets_vaddr = vaddr + 16 + 8 * n_bloom
        buckets = self.read_vaddr(buckets_vaddr,
                                  4 * min(n_buckets, MAX_SYMBOLS))
        last = max(_column(buckets, "I", 0, 1), default=0)
        if last < first:
            return min(first, MAX_SYMBOLS)
        chains = self.read_vaddr(
            buckets_vaddr + 4 * n_buckets + 4 * (last - first),
            4 * MAX_SYMBOLS)
        for n, word in enumerate(_column(chains, "I", 0, 1)):
            if word & 1:                # the lowest bit ends a chain
                return min(last + n + 1, MAX_SYMBOLS)
        return 0

    @_Lazy
    def symtabs(self):
        """The SymbolTables of .symtab sections."""
        tables = []
        for section in self.sections:
            if section.type == SHT_SYMTAB and section.link < len(
                    self.sections):
                strings = self.sections[section.link]
                if section.size > MAX_SYMBOLS * SYMBOL_SIZE:
                    self.note("%s: more than %d symbols"
                              % (self.name, MAX_SYMBOLS))
                    section = section._replace(size=MAX_SYMBOLS * SYMBOL_SIZE)
                tables.append(SymbolTable(self.section_bytes(section),
                                          self.section_bytes(strings)))
                break                   # there is one, gABI 4
        return tables

    @_Lazy
    def relocations(self):
        """[(offsets, infos, addends)]: columns of each RELA table."""
        tables = [self.dynamic_table(DT_RELA, DT_RELASZ),
                  self.dynamic_table(DT_JMPREL, DT_PLTRELSZ)]
        if not self.dynamic:            # static: only IRELATIVE ones are left
            tables = [self.section_bytes(section)
                      for section in self.sections[:64]
                      if section.type == SHT_RELA
                      and section.flags & SHF_ALLOC]
        return [tuple(_column(table, "Q", field, 3) for field in range(3))
                for table in tables]


    @_Lazy
    def resolver_slots(self):
        """{vaddr of an IFUNC's resolver: [vaddrs of slots for its choice]}."""
        slots = {}
        for offsets, infos, addends in self.relocations:
            for offset, info, addend in zip(offsets, infos, addends):
                if info & 0xffffffff == R_X86_64_IRELATIVE:
                    slots.setdefault(addend, []).append(offset)
        return slots

    @_Lazy
    def named_slots(self):
        """{name of a symbol (bytes): [vaddrs of slots bound to it]}."""
        slots, n_symbols = {}, len(self.dynsym.values)
        kinds = (R_X86_64_64, R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT)
        for offsets, infos, _ in self.relocations:
            for offset, info in zip(offsets, infos):
                if info & 0xffffffff in kinds and info >> 32 < n_symbols:
                    slots.setdefault(self.dynsym.name(info >> 32),
                                     []).append(offset)
        return slots


def _column(data, form, field, stride):
    """Every stride-th word of a table, from the field-th, as a sequence."""
    size = struct.calcsize(form) * stride
    if len(data) < size:
        return ()                       # Python 3.6 casts no empty view
    view = memoryview(data)[:len(data) // size * size].cast(form)
    return view[field::stride]


def _c_string(data, offset):
    """The bytes up to the next NUL, at most MAX_NAME."""
    end = data.find(b"\0", offset, offset + MAX_NAME)
    return data[offset:end if end >= 0 else offset + MAX_NAME]


def _decode(name):
    """The text of a name; what is no UTF-8 becomes `\\xNN`."""
    return name.decode("utf-8", "backslashreplace")


def _iter_notes(notes):
    """Yield (name, type, description) of ELF notes. Source: elf(5), "Notes".
    """
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        start = at + 12 + (name_size + 3 & ~3)
        if start + size <= len(notes):
            yield (notes[at + 12:at + 12 + name_size], kind,
                   notes[start:start + size])
        at = start + (size + 3 & ~3)


def _find_build_id(notes):
    """The build-id among ELF notes, as hex, or ""."""
    for name, kind, data in _iter_notes(notes):
        if name == b"GNU\0" and kind == NT_GNU_BUILD_ID and (
                2 <= len(data) <= 64):
            return data.hex()
    return ""


class SymbolTable:
    """A .symtab or .dynsym as columns; names are cut out when needed."""

    def __init__(self, data, strings):
        if strings[-1:] != b"\0":       # each name ends, then
            strings += b"\0"
        self.strings = strings
        self.name_offsets = _column(data, "I", 0, 6)
        self.infos = _column(data, "I", 1, 6)    # type, binding, shndx << 16
        self.values = _column(data, "Q", 1, 3)
        self.sizes = _column(data, "Q", 2, 3)

    def name(self, index):
        """The name as bytes, without a version (`malloc@@GLIBC_2.2.5`)."""
        offset, strings = self.name_offsets[index], self.strings
        end = strings.find(b"\0", offset, offset + MAX_NAME)
        name = strings[offset:end if end >= 0 else offset + MAX_NAME]
        return name.partition(b"@")[0] if b"@" in name else name

    def type(self, index):
        """STT_FUNC and the like."""
        return self.infos[index] & 0xf

    def is_local(self, index):
        return self.infos[index] >> 4 & 0xf == STB_LOCAL

    def in_code(self, ranges):
        """(values, indices) of what is defined in or between the ranges.

        Sorted by value.
        """
        if not ranges:
            return [], []
        low, high = ranges[0][0], ranges[-1][1]
        kinds = (STT_NOTYPE, STT_OBJECT, STT_FUNC, STT_GNU_IFUNC)
        values = list(self.values)
        found = [index for index, (info, value)
                 in enumerate(zip(self.infos, values))
                 if low <= value < high and info & 0xf in kinds
                 and 0 < info >> 16 < 0xff00]        # SHN_LORESERVE
        found.sort(key=values.__getitem__)
        return [values[index] for index in found], found

    def named(self, name):
        """Indices of the symbols of that name, whatever their version.

        A linker lets a name be the tail of another, so each place where
        the text ends a string is a place that st_name may point to.
        """
        places = re.finditer(re.escape(name) + b"(?=[\0@])", self.strings)
        wanted = {match.start() for match, _ in zip(places,
                                                    range(MAX_SYMBOLS))}
        if not wanted:
            return []
        return [index for index, offset in enumerate(self.name_offsets)
                if offset in wanted]


class Fde(NamedTuple):
    """What .eh_frame says of a function, or of a part of one."""
    vaddr: int
    size: int
    lsda: int               # vaddr of its exception table, 0 if none
    is_part: bool = False   # it begins within a frame that is there already


class Cie(NamedTuple):
    """What the FDEs of one compiler have in common, LSB 5.0, 10.6.1.1."""
    encoding: int           # of vaddrs, DW_EH_PE
    lsda_encoding: int      # 0xff: there are none
    is_augmented: bool
    code_unit: int          # what advances count in
    data_unit: int          # what offsets count in
    return_column: int      # the "register" that is the return address
    is_signal: bool         # frames that a signal has pushed
    program: bytes          # CFA instructions for the first row
    vaddr: int              # where the program is


class CallFrame(NamedTuple):
    """The call frame information of a function: see cfa_rows."""
    fde: Fde
    cie: Cie
    program: bytes
    vaddr: int              # where the program is


_FDE = struct.Struct("<IIiiB")  # size, distance of the CIE, start, size of
#                                 the code, of what augments it: as all write
_EH_PE_PCREL_SDATA4 = 0x1b

# DW_CFA_def_cfa, _register, _offset, _expression, _sf, _offset_sf: DWARF 5,
# 6.4.2.2.
_SETS_CFA = tuple(bytes([n]) for n in (0x0c, 0x0d, 0x0e, 0x0f, 0x12, 0x13))


class Unwind:
    """.eh_frame, found through the table of .eh_frame_hdr if there is one.

    Source: LSB 5.0, 10.6 "Exception Frames".
    """

    def __init__(self, elf):
        self.elf, self._cies, self._fdes = elf, {}, {}
        self._block = 0, b""            # what was read last: (vaddr, bytes)
        self._call_sites = {}
        self._budget = MAX_SYMBOLS      # of call sites read, all together

    @_Lazy
    def _index(self):
        """(starts, vaddrs of their FDEs), sorted by start."""
        pairs = []
        try:
            pairs = self._header_table()
        except _Truncated:
            self.elf.note("%s: .eh_frame_hdr is damaged" % self.elf.name)
        pairs = sorted(pairs or self._walk())
        return [start for start, _ in pairs], [fde for _, fde in pairs]

    @property
    def starts(self):
        """Where each Fde begins, sorted."""
        return self._index[0]

    def _header_table(self):
        """[(start, FDE)] of PT_GNU_EH_FRAME; [] without a usable one."""
        for segment in self.elf.segments:
            if segment.type == PT_GNU_EH_FRAME:
                data = self.elf.image.read(segment.offset,
                                           min(segment.size, MAX_TABLE))
                cursor = Cursor(data, segment.vaddr)
                version, frame, count, table = (cursor.number(1)
                                                for _ in range(4))
                if version != 1 or table != 0x3b:    # datarel | sdata4
                    return []
                cursor.pointer(frame)
                n = cursor.pointer(count)
                rows = data[cursor.at:cursor.at + 8 * min(n, MAX_SYMBOLS)]
                base = segment.vaddr
                return [(base + start, base + fde) for start, fde in zip(
                    _column(rows, "i", 0, 2), _column(rows, "i", 1, 2))]
        return []

    def _walk(self):
        """[(start, FDE)] by reading .eh_frame from end to end."""
        section = self.elf.section(b".eh_frame")
        data = self.elf.section_bytes(section) if section else b""
        at, pairs = 0, []
        while at + 12 <= len(data) and len(pairs) < MAX_SYMBOLS:
            size, cie = struct.unpack_from("<II", data, at)
            if size == 0 or size == 0xffffffff:      # the end; 64-bit DWARF
                break
            fde = self._fde(section.vaddr + at) if cie else None
            if fde:
                pairs.append((fde.vaddr, section.vaddr + at))
            at += 4 + size
        return pairs

    def _fde(self, vaddr):
        """_parse(vaddr), remembered: a plan asks for each several times."""
        if vaddr not in self._fdes:
            if len(self._fdes) > 1 << 17:
                self._fdes.clear()
            data = self._read(vaddr, 64)
            self._fdes[vaddr] = (self._usual(data, vaddr)
                                 or self._parse(data, vaddr))
        return self._fdes[vaddr]

    def _read(self, vaddr, size):
        """Up to size bytes of .eh_frame. Neighbours are asked for next, so
        a page is read."""
        start, data = self._block
        if not start <= vaddr <= start + len(data) - size:
            data = self.elf.read_vaddr(vaddr, max(size, PAGE))
            self._block = start, data = vaddr, data
        return data[vaddr - start:vaddr - start + size]

    def _parse(self, data, vaddr):
        """The Fde whose data begin at a vaddr of .eh_frame, or None."""
        parts = self._parts(Cursor(data, vaddr))
        if parts is None:
            return None
        fde, _, behind = parts
        end = 4 + int.from_bytes(data[:4], "little")
        if behind < end <= MAX_FRAME_ENTRY and (
                data[behind:behind + 1] or self._read(vaddr + behind, 1)
                ) in _SETS_CFA:
            return fde._replace(is_part=True)
        return fde

    def _usual(self, data, vaddr):
        """_parse() of what almost every FDE looks like; None: not so."""
        if len(data) <= _FDE.size:
            return None
        size, distance, start, length, behind = _FDE.unpack_from(data)
        cie = self._cies.get(vaddr + 4 - distance)
        if (not _FDE.size < size + 4 <= MAX_FRAME_ENTRY or not distance
                or cie is None or cie.encoding != _EH_PE_PCREL_SDATA4
                or not cie.is_augmented or behind or not start
                or length <= 0):
            return None
        start = (vaddr + 8 + start) % (1 << 64)
        if start + length > VADDR_END:
            return None
        return Fde(start, length, 0,
                   data[_FDE.size:_FDE.size + 1] in _SETS_CFA)

    def _parts(self, cursor):
        """(Fde, Cie, where its program begins) of an FDE, or None."""
        try:
            size, cie_distance = cursor.number(4), cursor.number(4)
            if size == 0xffffffff or cie_distance == 0:
                return None
            cie = self._cie(cursor.vaddr + 4 - cie_distance)
            start = cursor.pointer(cie.encoding)
            size = cursor.pointer(cie.encoding & 0x0f)
            lsda = 0
            behind = cursor.uleb() if cie.is_augmented else 0
            behind += cursor.at
            if behind > cursor.at and cie.lsda_encoding != 0xff:
                lsda = cursor.pointer(cie.lsda_encoding)
        except _Truncated:
            return None
        if not size or start + size > VADDR_END:
            return None
        return Fde(start, size, lsda), cie, behind

    def _entry(self, vaddr):
        """A Cursor on a CIE or FDE, which ends where that does."""
        data = self._read(vaddr, 256)
        size = 4 + int.from_bytes(data[:4], "little")
        if len(data) < size <= MAX_FRAME_ENTRY:
            data = self._read(vaddr, size)
        return Cursor(data[:size], vaddr)

    def _cie(self, vaddr):
        """The Cie at a vaddr of .eh_frame. Raises _Truncated."""
        if vaddr not in self._cies:
            if len(self._cies) > 10000:
                self._cies.clear()
            self._cies[vaddr] = self._parse_cie(vaddr)
        return self._cies[vaddr]

    def _parse_cie(self, vaddr):
        cursor = self._entry(vaddr)
        _, identity, version = (cursor.number(4), cursor.number(4),
                                cursor.number(1))
        text = _c_string(cursor.data, cursor.at)
        cursor.at += len(text) + 1
        if (identity != 0 or version not in (1, 3, 4)
                or text and not text.startswith(b"z")):
            raise _Truncated()          # "eh" went out with gcc 2
        if version == 4:
            cursor.number(2)            # sizes of addresses and segments
        code_unit, data_unit = cursor.uleb(), cursor.uleb(signed=True)
        column = cursor.number(1) if version == 1 else cursor.uleb()
        encoding, lsda, is_augmented = 0, 0xff, text.startswith(b"z")
        behind = cursor.uleb() if is_augmented else 0
        behind += cursor.at
        for letter in text[1:].decode("latin-1"):
            if letter == "R":
                encoding = cursor.number(1)
            elif letter == "L":
                lsda = cursor.number(1)
            elif letter == "P":
                cursor.pointer(cursor.number(1))
            elif letter not in "SBG":
                raise _Truncated()
        return Cie(encoding, lsda, is_augmented, code_unit, data_unit,
                   column, is_augmented and b"S" in text,
                   cursor.data[behind:], vaddr + behind)

    def call_frame(self, vaddr):
        """The CallFrame of the function that holds vaddr, or None."""
        starts, fdes = self._index
        index = bisect.bisect_right(starts, vaddr) - 1
        if index < 0:
            return None
        cursor = self._entry(fdes[index])
        parts = self._parts(cursor)
        if not parts or not 0 <= vaddr - parts[0].vaddr < parts[0].size:
            return None
        fde, cie, behind = parts
        return CallFrame(fde, cie, cursor.data[behind:],
                         fdes[index] + behind)

    def is_part(self, start):
        """Does the Fde at start begin within a frame that is there already?

        Then it is a part that a compiler split off, and nobody calls it: its
        program sets the frame's address before it first advances.
        """
        fde = self.at(start)
        return fde is not None and fde.vaddr == start and fde.is_part

    def at(self, vaddr):
        """The Fde whose range holds vaddr, or None."""
        starts, fdes = self._index
        index = bisect.bisect_right(starts, vaddr) - 1
        fde = self._fde(fdes[index]) if index >= 0 else None
        if fde and fde.vaddr <= vaddr < fde.vaddr + fde.size:
            return fde
        return None

    def all(self):
        """Every Fde that can be read, sorted."""
        return sorted(filter(None, map(self._fde, self._index[1])))

    @_Lazy
    def _guarding(self):
        """(starts, Fdes) of those that have an exception table."""
        fdes = [fde for fde in self.all() if fde.lsda]
        return [fde.vaddr for fde in fdes], fdes

    def guarding(self, low, high, is_one_of_many=False):
        """The Fdes that overlap [low, high) and have an exception table."""
        starts, fdes = self._guarding if is_one_of_many else self._index
        if not starts:
            return []
        first = max(0, bisect.bisect_right(starts, low) - 1)
        last = bisect.bisect_left(starts, high, first)
        if last - first > MAX_HEADERS:
            raise SymbolError("read", self.elf.name, "%d frames overlap "
                              "0x%x" % (last - first, low))
        fdes = fdes[first:last]
        if not is_one_of_many:
            fdes = [fde for fde in map(self._fde, fdes) if fde and fde.lsda]
        return [fde for fde in fdes
                if fde.vaddr < high and low < fde.vaddr + fde.size]

    def landing_pads(self, fde):
        """Where exceptions may land, from the call-site table of its LSDA.
        """
        return {pad for _, _, pad in self.call_sites(fde) if pad}

    def call_sites(self, fde):
        """{(low, high, landing pad or 0)} of what its LSDA says of the code.

        Where the table is damaged, all of the function is one of them.
        Source: gcc, libsupc++/eh_personality.cc, parse_lsda_header.
        """
        if fde.lsda not in self._call_sites:
            if len(self._call_sites) > 1 << 16:
                self._call_sites.clear()
            self._call_sites[fde.lsda] = self._read_call_sites(fde)
        return self._call_sites[fde.lsda]

    def _read_call_sites(self, fde):
        found = set()
        cursor = Cursor(self.elf.read_vaddr(fde.lsda, 64), fde.lsda)
        try:
            base, encoding = fde.vaddr, cursor.number(1)
            if encoding != 0xff:
                base = cursor.pointer(encoding, function=fde.vaddr)
            if cursor.number(1) != 0xff:
                cursor.uleb()           # where the type table ends
            encoding, size = cursor.number(1), cursor.uleb()
            end = cursor.at + size
            cursor.data = self.elf.read_vaddr(fde.lsda, min(end, 1 << 20))
            while cursor.at < end:
                self._budget -= 1
                if self._budget < 0:
                    raise SymbolError("read", self.elf.name, "its exception "
                                      "tables have no end")
                low = fde.vaddr + cursor.pointer(encoding)
                high = low + cursor.pointer(encoding)
                pad = cursor.pointer(encoding)
                cursor.uleb()           # action
                found.add((low, high, base + pad if pad else 0))
        except _Truncated:
            self.elf.note("%s: an exception table is cut short"
                          % self.elf.name)
            found.add((fde.vaddr, fde.vaddr + fde.size, 0))
        return found


_FEW = 500                      # questions; for more, tables pay


class Functions:
    """What of a file is a function, and where each begins and ends.

    Symbols of all tables, and FDEs where no symbol is. vaddrs: the file's.
    """

    def __init__(self, elf, tables, unwind):
        self.elf, self.unwind = elf, unwind
        self.ranges, self._n_asked = elf.code_ranges, 0
        self._lows = [low for low, _ in self.ranges]
        self._sizes = {}                # what size() has found
        self.columns = []               # (table, indices, values), by value
        for table in tables:
            values, order = table.in_code(self.ranges)
            self.columns.append((table, order, values))

    def _code_at(self, vaddr):
        """The (low, high) of the code that holds vaddr, or None."""
        at = bisect.bisect_right(self._lows, vaddr) - 1
        if at >= 0 and vaddr < self.ranges[at][1]:
            return self.ranges[at]
        return None

    def is_function(self, table, index):
        """Is it a function? Of untyped symbols those with their own FDE."""
        kind = table.infos[index] & 0xf
        if kind != STT_NOTYPE:
            return kind in (STT_FUNC, STT_GNU_IFUNC)
        starts, value = self.unwind.starts, table.values[index]
        at = bisect.bisect_left(starts, value)
        return (at < len(starts) and starts[at] == value
                and table.name(index) != b"")

    def aliases(self, start):
        """[(table, index)] of the functions that begin at a vaddr."""
        if "_symbol_extents" in self.__dict__ and (
                start not in self._symbol_starts):
            return []
        found = []
        for table, order, values in self.columns:
            first = bisect.bisect_left(values, start)
            last = bisect.bisect_right(values, start, first)
            if first < last:
                found += [(table, index) for index
                          in order[first:min(last, first + MAX_ALIASES)]
                          if self.is_function(table, index)]
        return found

    def size(self, start, aliases=None):
        """Bytes of the function at start: by symbol, FDE, or next mark."""
        if aliases:
            return self._size(start, aliases)
        if start not in self._sizes:
            if len(self._sizes) > 1 << 17:
                self._sizes.clear()
            self._sizes[start] = self._size(start)
        return self._sizes[start]

    def _size(self, start, aliases=None):
        if "_extents" in self.__dict__ and not aliases:
            starts, ends, _ = self._extents
            at = bisect.bisect_left(starts, start)
            if at < len(starts) and starts[at] == start:
                return ends[at] - start
        code = self._code_at(start)
        if not code:
            return 0
        size = max((table.sizes[index] for table, index
                    in aliases or self.aliases(start)), default=0)
        if size:
            return min(size, code[1] - start)
        fde = self.unwind.at(start)
        if fde:
            return min(fde.vaddr + fde.size, code[1]) - start
        return self.next_mark(start + 1) - start

    @property
    def is_for_many(self):
        """Are so many functions asked for, as of a pattern, that tables of
        all pay?"""
        return self._n_asked > _FEW

    def expect_many(self):
        """Be that at once: what bounds those have that a damaged symbol
        table gives two must not hang on how many were asked for before."""
        self._n_asked = max(self._n_asked, _FEW + 1)

    @property
    def marks(self):
        """Sorted lists of where symbols and FDEs begin; one, if it pays."""
        if self.is_for_many:
            return self._all_marks
        return [c[2] for c in self.columns] + [self.unwind.starts]

    @_Lazy
    def _all_marks(self):
        return [sorted(set(self.unwind.starts).union(
            *[c[2] for c in self.columns]))]

    def next_mark(self, vaddr):
        """The next symbol, FDE or end of code, at or behind a vaddr."""
        code = self._code_at(vaddr)
        mark = code[1] if code else vaddr
        for values in self.marks:
            at = bisect.bisect_left(values, vaddr)
            if at < len(values) and values[at] < mark:
                mark = values[at]
        return mark

    def start_of(self, vaddr):
        """Where the function that holds vaddr begins, or None.

        The innermost symbol wins. Symbols may nest (assembly), so a few
        before the last are tried as well.
        """
        self._n_asked += 1
        if self.is_for_many:
            starts, ends, reaches = self._extents
            at = bisect.bisect_right(starts, vaddr) - 1
            while at >= 0 and vaddr < reaches[at]:
                if vaddr < ends[at]:
                    return starts[at]
                at -= 1
        else:
            start = self._start_near(vaddr)
            if start is not None:
                return start
        fde = self.unwind.at(vaddr)
        if fde and self._code_at(fde.vaddr):
            return fde.vaddr
        return None

    def last_start(self, vaddr):
        """Where the function begins that ends before vaddr, without any
        symbol, FDE or end of code between. None if there is no such one."""
        code, marks = self._code_at(vaddr), []
        for values in self.marks:
            at = bisect.bisect_right(values, vaddr)
            marks += values[max(0, at - 1):at]
        start = self.start_of(max(marks, default=0)) if code else None
        return start if start is not None and code[0] <= start else None

    def _start_near(self, vaddr):
        for depth in (1, 32):
            starts = set()
            for table, order, values in self.columns:
                at = bisect.bisect_right(values, vaddr)
                starts.update(table.values[index]
                              for index in order[max(0, at - depth):at]
                              if self.is_function(table, index))
            for start in sorted(starts, reverse=True):
                if vaddr < start + self.size(start):
                    return start
        return None

    @_Lazy
    def _extents(self):
        """_sorted() of all symbols and of the _lone_fdes."""
        starts, ends, _ = self._symbol_extents
        alone = self._lone_fdes
        return self._sorted(
            starts + [fde.vaddr for fde in alone],
            ends + [min(fde.vaddr + fde.size, self._code_at(
                fde.vaddr)[1]) for fde in alone])

    @_Lazy
    def _symbol_extents(self):
        sizes = {}
        for table, order, _ in self.columns:
            for index in order:
                if self.is_function(table, index):
                    start = table.values[index]
                    sizes[start] = max(sizes.get(start, 0),
                                       table.sizes[index])
        starts, ends = sorted(sizes), []
        for start in starts:
            code = self._code_at(start)
            ends.append(start + self.size(start, ()) if not sizes[start]
                        else min(start + sizes[start], code[1]) if code
                        else start)
        return self._sorted(starts, ends)

    @_Lazy
    def _symbol_starts(self):
        return frozenset(self._symbol_extents[0])

    @_Lazy
    def _lone_fdes(self):
        """The Fdes that begin in no symbol's function."""
        starts, ends, reaches = self._symbol_extents
        found = []
        for fde in self.unwind.all():
            at = bisect.bisect_right(starts, fde.vaddr) - 1
            if (at < 0 or fde.vaddr >= reaches[at]) and self._code_at(
                    fde.vaddr):
                found.append(fde)
        return found

    @staticmethod
    def _sorted(starts, ends):
        """(starts, ends, the furthest end up to each), by start."""
        pairs = sorted(zip(starts, ends))
        ends = [end for _, end in pairs]
        return ([start for start, _ in pairs], ends,
                list(itertools.accumulate(ends, max)))

    def named(self, name):
        """Starts of the functions of exactly that name (bytes)."""
        return {table.values[index] for table, order, _ in self.columns
                for index in table.named(name)
                if self._code_at(table.values[index])
                and table.infos[index] >> 16
                and self.is_function(table, index)}

    def matching(self, is_match):
        """Starts of the functions one of whose names is_match(bytes)."""
        starts = set()
        for table, order, values in self.columns:
            infos, name = table.infos, table.name
            found = [at for at, index in enumerate(order)
                     if infos[index] & 0xf != STT_OBJECT
                     and is_match(name(index))]
            starts.update(values[at] for at in found
                          if self.is_function(table, order[at])
                          and self._code_at(values[at]))
        return starts

    def nameless(self):
        """Starts of FDEs that no function symbol covers: no PLT, no part
        of another function (where frames do not begin)."""
        plt = [(s.vaddr, s.vaddr + s.size) for s in self.elf.sections
               if s.name.startswith(b".plt")][:8]
        return [fde.vaddr for fde in self._lone_fdes
                if not fde.is_part
                and not any(low <= fde.vaddr < high for low, high in plt)
                and not self.aliases(fde.vaddr)]

    def entries(self, low, high):
        """Symbols, FDEs and landing pads in [low, high)."""
        entries = []
        for values in self.marks:
            entries += _between(values, low, high)
        for fde in self.guarding(low, high):
            entries += [pad for pad in self.unwind.landing_pads(fde)
                        if low <= pad < high]
        return entries

    def guarding(self, low, high):
        """The Fdes in [low, high) that have an exception table."""
        return self.unwind.guarding(low, high, self.is_for_many)


def code_pointers(elf):
    """The vaddrs of code that relocations name: what may be jumped to from
    data. Sorted."""
    low, high = elf.code_loads[0][0], elf.code_loads[-1][1]
    found = {elf.entry, elf.dynamic_vaddr(DT_INIT),
             elf.dynamic_vaddr(DT_FINI)}
    for _, infos, addends in elf.relocations:
        found.update(addend for info, addend in zip(infos, addends)
                     if low <= addend < high
                     and info in (R_X86_64_RELATIVE, R_X86_64_IRELATIVE))
        symbols = elf.dynsym.values
        found.update(symbols[info >> 32] + addend & (1 << 64) - 1
                     for info, addend in zip(infos, addends)
                     if info & 0xffffffff == R_X86_64_64
                     and info >> 32 < len(symbols))
    found.update(_relr_words(elf))
    return sorted(vaddr for vaddr in found if low <= vaddr < high)


def code_words(elf):
    """The vaddrs of code that aligned words of data could mean, in a file
    that is not relocated; [] in others. Sorted."""
    if elf.type != ET_EXEC or sum(s.size for s in elf.loads) >= MAX_TABLE:
        return []
    low, high, found = elf.code_loads[0][0], elf.code_loads[-1][1], set()
    # The highest byte in which two of them differ, and the one above it in
    # which they do not, rule most words out.
    place = max(0, (low ^ high - 1).bit_length() - 1) // 8
    tables = [bytes(low >> shift & 255 <= byte <= high - 1 >> shift & 255
                    for byte in range(256))
              for shift in (8 * place, 8 * place + 8)]
    for load in elf.loads:
        data = elf.read_vaddr(load.vaddr, load.size)
        words = _column(data, "Q", 0, 1)
        one, other = [int.from_bytes(
            data[place + n:8 * len(words):8].translate(table), "little")
            for n, table in enumerate(tables)]
        may_be = (one & other).to_bytes(len(words), "little")
        found.update([word for word in [
            words[match.start()] for match in re.finditer(b"\1", may_be)]
            if low <= word < high])
    return sorted(found)


def _relr_words(elf):
    """The words that DT_RELR relocates, as vaddrs of the file.

    An even entry is an address, an odd one a bitmap of the next 63 words.
    Source: gABI, "Relative Relocation Table".
    """
    entries = _column(elf.dynamic_table(DT_RELR, DT_RELRSZ), "Q", 0, 1)
    if len(entries) > 1 << 20:
        elf.note("%s: DT_RELR is too long" % elf.name)
    words, where = [], 0
    for entry in entries[:1 << 20]:
        if entry & 1 == 0:
            data, places = elf.read_vaddr(entry, 8), [0]
            where = entry + 8
        else:
            data = elf.read_vaddr(where, 63 * 8)
            places = [bit for bit in range(63) if entry >> bit + 1 & 1]
            where += 63 * 8
        column = _column(data, "Q", 0, 1)
        words += [column[place] for place in places if place < len(column)]
    return [word - elf.bias if word >= elf.bias else word for word in words]


BUILTIN_TYPES = {        # Itanium C++ ABI, 5.1.5.2
    "v": "void", "w": "wchar_t", "b": "bool", "c": "char",
    "a": "signed char", "h": "unsigned char", "s": "short",
    "t": "unsigned short", "i": "int", "j": "unsigned int", "l": "long",
    "m": "unsigned long", "x": "long long", "y": "unsigned long long",
    "n": "__int128", "o": "unsigned __int128", "f": "float", "d": "double",
    "e": "long double", "g": "__float128", "z": "...",
    "Dn": "decltype(nullptr)", "Di": "char32_t", "Ds": "char16_t",
    "Du": "char8_t", "Da": "auto", "Dc": "decltype(auto)"}
OPERATORS = {            # 5.1.3.1
    "nw": " new", "na": " new[]", "dl": " delete", "da": " delete[]",
    "aw": " co_await", "ps": "+", "ng": "-", "ad": "&", "de": "*",
    "co": "~", "pl": "+", "mi": "-", "ml": "*", "dv": "/", "rm": "%",
    "an": "&", "or": "|", "eo": "^", "aS": "=", "pL": "+=", "mI": "-=",
    "mL": "*=", "dV": "/=", "rM": "%=", "aN": "&=", "oR": "|=",
    "eO": "^=", "ls": "<<", "rs": ">>", "lS": "<<=", "rS": ">>=",
    "eq": "==", "ne": "!=", "lt": "<", "gt": ">", "le": "<=", "ge": ">=",
    "ss": "<=>", "nt": "!", "aa": "&&", "oo": "||", "pp": "++",
    "mm": "--", "cm": ",", "pm": "->*", "pt": "->", "cl": "()",
    "ix": "[]", "qu": "?"}
ABBREVIATIONS = {        # 5.1.10
    "t": "std", "a": "std::allocator", "b": "std::basic_string",
    "s": "std::string", "i": "std::istream", "o": "std::ostream",
    "d": "std::iostream"}
CLASSES = {
    "std::string": "std::basic_string<char, std::char_traits<char>, "
    "std::allocator<char> >",
    "std::istream": "std::basic_istream<char, std::char_traits<char> >",
    "std::ostream": "std::basic_ostream<char, std::char_traits<char> >",
    "std::iostream": "std::basic_iostream<char, std::char_traits<char> >"}
LITERAL_SUFFIXES = {"int": "", "unsigned int": "u", "long": "l",
                    "unsigned long": "ul", "long long": "ll",
                    "unsigned long long": "ull"}


class _Unsure(Exception):
    """A mangled name with something that the demangler does not know."""


class _Pack(str):
    """The text of a template parameter pack of none or several."""


class _Demangler:
    """Recursive descent over an Itanium mangled name, as 5.1 writes it.

    Types are text; a NUL in one marks where a declarator goes, so that a
    pointer to `int (\\0)(char)` is `int (*\\0)(char)`. A name is hostile:
    steps and the length of any text are bounded, else _Unsure.
    """

    def __init__(self, text):
        self.text, self.at, self.n_steps = text, 2, 0
        self.subs, self.args = [], []
        self.is_special = False         # the last name returns no type

    def eat(self, prefix):
        found = self.text.startswith(prefix, self.at)
        self.at += len(prefix) * found
        return found

    def peek(self, size=1):
        return self.text[self.at:self.at + size]

    def match(self, pattern):
        """Eat what a regular expression matches. Raises _Unsure."""
        match = re.compile(pattern).match(self.text, self.at)
        if not match:
            raise _Unsure()
        self.at = match.end()
        return match.group(1)

    def add(self, text):
        """Make text a candidate for substitution; return it."""
        self.n_steps += 1
        if self.n_steps > 2000 or len(text) > MAX_NAME:
            raise _Unsure()
        self.subs.append(text)
        return text

    def encoding(self):
        """A function. -> (name, name with parameters)."""
        name, qualifiers, has_return = self.name(False)
        return name, name + self.parameters(has_return) + qualifiers

    def parameters(self, has_return):
        """The parameters of an encoding, "" if it is no function's."""
        if self.peek() in ("", "E", "."):
            return ""
        if has_return:
            self.type()
        types = []
        while self.peek() not in ("", "E", ".", "Q"):
            types.append(_plain(self.type()))
        types = [] if types == ["void"] else types
        return "(%s)" % ", ".join(text for text in types if text)

    def name(self, is_type):
        """-> (name, " const" and the like, is a return type encoded)."""
        if self.eat("Z"):
            return self.local_name(), "", False
        if self.peek() == "N":
            return self.nested_name(is_type)
        if self.peek() == "S" and self.peek(2) != "St":
            name = self.substitution()
        else:
            prefix = "std::" if self.eat("St") else ""
            name = prefix + self.unqualified(prefix)
            if self.peek() == "I":
                self.add(name)
        is_template = self.peek() == "I"
        if is_template:
            name += self.template_args(is_type)
        return name, "", is_template

    def local_name(self):
        outer = self.encoding()[1]
        if not self.eat("E"):
            raise _Unsure()
        if self.eat("s"):
            inner = "string literal"
        else:
            if self.eat("d"):
                self.match(r"(\d*)_")
            inner = self.name(True)[0]
            self.match(r"(?:_\d|__\d+_)?()")
        return outer + "::" + inner

    def nested_name(self, is_type):
        self.at += 1
        letters = self.match("([rVK]*[RO]?)")
        name, last, added, is_special = "", "", False, False
        while not self.eat("E"):
            last, added = self.peek(), True
            if self.eat("St"):
                name, added = "std", False
            elif last == "S":
                name, added = self.substitution(), False
                if self.peek() in ("C", "D"):        # its constructor
                    name = CLASSES.get(name, name)
            elif last == "T":
                name = self.template_param()
            elif last == "I":
                name += self.template_args(is_type)
            elif not self.eat("M"):
                part = self.unqualified(name)
                is_special = self.is_special
                name = name + "::" + part if name else part
            if added:
                self.add(name)
            self.n_steps += 1
        if added:
            self.subs.pop()
        return (name, _qualifiers(letters),
                last == "I" and not is_special)

    def unqualified(self, scope):
        """A source name, operator, constructor, lambda; its ABI tags."""
        self.eat("L")                   # internal linkage
        two = self.peek(2)
        self.is_special = two[:1] in ("C", "D") or two == "cv"
        if two[:1].isdigit():
            name = self.source_name()
        elif re.match("C[1-5]|D[0-5]", two):
            self.at += 2
            name = "~" * (two[0] == "D") + _class_name(scope)
        elif two in OPERATORS:
            self.at += 2
            name = "operator" + OPERATORS[two]
        elif self.eat("cv"):
            name = "operator " + _plain(self.type())
        elif self.eat("li"):
            name = 'operator"" ' + self.source_name()
        elif self.eat("Ul"):
            types = []
            while not self.eat("E"):
                types.append(_plain(self.type()))
            types = [] if types == ["void"] else types
            name = "{lambda(%s)#%d}" % (", ".join(types), self.ordinal())
        elif self.eat("Ut"):
            name = "{unnamed type#%d}" % self.ordinal()
        else:
            raise _Unsure()
        while self.eat("B"):
            name += "[abi:%s]" % self.source_name()
        return name

    def ordinal(self):
        digits = self.match(r"(\d{0,6})_")
        return int(digits) + 2 if digits else 1

    def source_name(self):
        size = int(self.match(r"(\d{1,4})"))
        name = self.peek(size)
        if len(name) < size or size == 0:
            raise _Unsure()
        self.at += size
        if name.startswith("_GLOBAL__N"):
            return "(anonymous namespace)"
        return name

    def substitution(self):
        letter = self.match("S([abiosdt]|[0-9A-Z]{0,4}_)")
        if letter in ABBREVIATIONS:
            return ABBREVIATIONS[letter]
        index = int(letter[:-1], 36) + 1 if letter != "_" else 0
        if index >= len(self.subs):
            raise _Unsure()
        return self.subs[index]

    def template_param(self):
        is_expanded = self.text.startswith("Dp", self.at - 2)
        digits = self.match(r"T(\d{0,4})_")
        index = int(digits) + 1 if digits else 0
        if index >= len(self.args):
            raise _Unsure()
        if isinstance(self.args[index], _Pack) and not is_expanded:
            raise _Unsure()             # each member would need a copy
        return self.args[index]

    def template_args(self, is_type):
        self.at += 1
        args = self.arguments()
        if not is_type:
            self.args = args
        text = ", ".join(_plain(arg) for arg in args if arg)
        return "<%s%s>" % (text, " " * text.endswith(">"))

    def arguments(self):
        """Template arguments up to an E; a pack is one of them."""
        args = []
        while not self.eat("E"):
            if self.eat("L"):
                args.append(self.literal())
            elif self.eat("J"):
                members = [_plain(arg) for arg in self.arguments()]
                args.append(members[0] if len(members) == 1
                            else _Pack(", ".join(members)))
            else:
                args.append(self.type())
        return args

    def literal(self):
        if self.eat("_Z"):
            text = self.encoding()[1]
            if not self.eat("E"):
                raise _Unsure()
            return text
        kind = _plain(self.type())
        value = self.match(r"(n?\d+)E").replace("n", "-")
        if kind == "bool" and value in "01":
            return "true" if value == "1" else "false"
        if kind in LITERAL_SUFFIXES:
            return value + LITERAL_SUFFIXES[kind]
        return "(%s)%s" % (kind, value)

    def type(self):
        """A type; all but builtin ones become candidates."""
        one, two = self.peek(), self.peek(2)
        for code in (two, one):
            if code in BUILTIN_TYPES:
                self.at += len(code)
                return BUILTIN_TYPES[code]
        if one in "rVK" and one:
            letters = self.match("([rVK]+)")
            return self.add(_declare_in(self.type(), _qualifiers(letters)))
        if one in "PRO" and one:
            self.at += 1
            return self.add(_point(self.type(), {"P": "*", "R": "&",
                                                 "O": "&&"}[one]))
        if one == "T":
            return self.template_use(self.add(self.template_param()))
        if one == "S" and two != "St":
            return self.template_use(self.substitution())
        if self.eat("Dp"):
            return self.add(self.type())
        if one in ("F", "A", "M"):
            return self.add(self.compound(one))
        if one in ("N", "Z", "S") or one.isdigit():
            return self.add(self.name(True)[0])
        raise _Unsure()

    def template_use(self, name):
        """A candidate that may be a template, followed by arguments."""
        if self.peek() != "I":
            return name
        return self.add(name + self.template_args(True))

    def compound(self, letter):
        """A function, an array, or a pointer to a member."""
        self.at += 1
        if letter == "A":
            size = self.match(r"(\d*)_")
            return _declare_in(self.type(), " (\0) [%s]" % size)
        if letter == "M":
            scope = self.type()
            return _point(self.type(), " %s::*" % scope).replace("( ", "(")
        self.eat("Y")
        result, types = self.type(), []
        while not self.eat("E"):
            types.append(_plain(self.type()))
        types = [] if types == ["void"] else types
        return _declare_in(result, " (\0)(%s)" % ", ".join(types))


def _qualifiers(letters):
    """` const &` for `KR`."""
    return "".join(text for letter, text in (
        ("K", " const"), ("V", " volatile"), ("r", " restrict"),
        ("R", " &"), ("O", " &&")) if letter in letters)


def _plain(text):
    """A type without the mark for its declarator."""
    return text.replace("(\0) ", "").replace("(\0)", "").replace("\0", "")


def _declare_in(text, declarator):
    """Put a declarator where the mark is, or at the end."""
    return (text.replace("\0", declarator.strip(" "), 1) if "\0" in text
            else text + declarator)


def _point(text, symbol):
    """A pointer or reference to a type; references collapse."""
    if symbol[0] == "&" and text[-1:] == "&":
        return text[:-1] if symbol == "&" and text[-2:] == "&&" else text
    if "\0" in text:
        return text.replace("\0", symbol + "\0", 1)
    return text + symbol


def _class_name(scope):
    """`B` of `a::B<int>`."""
    depth, end = 0, len(scope)
    if scope.endswith(">"):
        for end in range(len(scope) - 1, 0, -1):
            depth += {">": 1, "<": -1}.get(scope[end], 0)
            if depth == 0:
                break
    name = scope[:end].rpartition("::")[2].partition("[abi:")[0]
    if not name:
        raise _Unsure()
    return name


# Rust: RFC 2603 for names that begin with _R; before, names were those of
# C++ whose last part is a hash, and whose parts are escaped.

RUST_TYPES = {
    "a": "i8", "b": "bool", "c": "char", "d": "f64", "e": "str", "f": "f32",
    "h": "u8", "i": "isize", "j": "usize", "l": "i32", "m": "u32",
    "n": "i128", "o": "u128", "p": "_", "s": "i16", "t": "u16", "u": "()",
    "v": "...", "x": "i64", "y": "u64", "z": "!"}
_BASE_62 = ("0123456789abcdefghijklmnopqrstuvwxyz"
            "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_RUST_HASH = re.compile(r"_ZN(.+)17h[0-9a-f]{16}E(?:\.llvm\.\d+)?\Z")
_RUST_ESCAPES = {"SP": "@", "BP": "*", "RF": "&", "LT": "<", "GT": ">",
                 "LP": "(", "RP": ")", "C": ","}


class _RustDemangler:
    """Recursive descent over a Rust name of version 0.

    Like a C++ name it is hostile: steps and text are bounded, else _Unsure.
    """

    def __init__(self, text):
        self.text, self.at = text, 2
        self.n_steps, self.n_chars, self.n_bound = 0, 0, 0

    eat, peek, match = _Demangler.eat, _Demangler.peek, _Demangler.match

    def step(self):
        self.n_steps += 1
        if self.n_steps > 2000:
            raise _Unsure()

    def made(self, text):
        """The text of a part, if all of them are not too much."""
        self.n_chars += len(text)
        if self.n_chars > 16 * MAX_NAME:
            raise _Unsure()
        return text

    def number(self):
        """A number of base 62, up to its underscore."""
        value, digits = 0, self.match(r"([0-9a-zA-Z]{0,20})_")
        for digit in digits:
            value = 62 * value + _BASE_62.index(digit)
        return value + bool(digits)

    def optional(self, tag):
        """A number behind a tag, plus one; 0 where the tag is not."""
        return 1 + self.number() if self.eat(tag) else 0

    def identifier(self):
        """-> (name, disambiguator)"""
        n = self.optional("s")
        is_punycode = self.eat("u")
        size = int(self.match(r"(0|[1-9]\d{0,5})"))
        self.eat("_")
        name = self.peek(size)
        if len(name) != size:
            raise _Unsure()
        self.at += size
        if is_punycode:
            head, _, tail = name.rpartition("_")
            try:
                name = (head + "-" * bool(head) + tail).encode(
                    "ascii").decode("punycode")
            except (UnicodeError, OverflowError):
                raise _Unsure()
        return name, n

    def back(self, function, *args):
        """What function() reads at an earlier place."""
        target, here = self.number() + 2, self.at
        if target >= self.at - 2:
            raise _Unsure()
        self.at = target
        text = function(*args)
        self.at = here
        return text

    def path(self, is_value):
        """A path; is_value: its arguments are written behind `::`."""
        self.step()
        kind = self.peek()
        self.at += 1
        if kind == "C":
            return self.identifier()[0]
        if kind in ("M", "X"):
            self.optional("s")
            self.path(False)
        if kind in ("M", "X", "Y"):
            text = self.type()
            if kind != "M":
                text += " as " + self.path(False)
            return self.made("<%s>" % text)
        if kind == "N":
            space = self.match("([a-zA-Z])")
            outer = self.path(is_value)
            name, n = self.identifier()
            if space.islower():
                return self.made("%s::%s" % (outer, name) if name else outer)
            space = {"C": "closure", "S": "shim"}.get(space, space)
            return self.made("%s::{%s%s#%d}" % (
                outer, space, ":" * bool(name) + name, n))
        if kind == "I":
            outer = self.path(is_value)
            args = []
            while not self.eat("E"):
                args.append(self.argument())
            return self.made("%s%s<%s>" % (outer, "::" * is_value,
                                           ", ".join(args)))
        if kind == "B":
            return self.back(self.path, is_value)
        raise _Unsure()

    def argument(self):
        if self.eat("L"):
            return self.lifetime(self.number())
        return self.constant() if self.eat("K") else self.type()

    def lifetime(self, index):
        """The name of a bound one, counted from the innermost; 0: none."""
        if index > self.n_bound:
            raise _Unsure()
        return self.name_of(self.n_bound - index) if index else "'_"

    def type(self):
        self.step()
        kind = self.peek()
        self.at += 1
        if kind in RUST_TYPES:
            return RUST_TYPES[kind]
        if kind == "A":
            return self.made("[%s; %s]" % (self.type(), self.constant()))
        if kind == "S":
            return self.made("[%s]" % self.type())
        if kind == "T":
            types = []
            while not self.eat("E"):
                types.append(self.type())
            return self.made("(%s)" % (", ".join(types)
                                       + "," * (len(types) == 1)))
        if kind in ("R", "Q"):
            index = self.number() if self.eat("L") else 0
            return self.made("&%s%s%s" % (
                self.lifetime(index) + " " if index else "",
                "mut " * (kind == "Q"), self.type()))
        if kind in ("P", "O"):
            return self.made("*%s %s" % ("const" if kind == "P" else "mut",
                                         self.type()))
        if kind == "F":
            return self.bound(self.signature)
        if kind == "D":
            text = "dyn " + self.bound(self.traits)
            index = self.number() if self.match("(L)") else 0
            return self.made(text + (" + " + self.lifetime(index)
                                     if index else ""))
        if kind == "B":
            return self.back(self.type)
        self.at -= 1
        return self.path(False)

    def bound(self, function):
        """What function() reads, with lifetimes that begin there."""
        n = self.optional("G")
        if n > 100:
            raise _Unsure()
        names = [self.name_of(self.n_bound + each) for each in range(n)]
        self.n_bound += n
        text = function()
        self.n_bound -= n
        return self.made("for<%s> " % ", ".join(names) + text
                         if names else text)

    @staticmethod
    def name_of(depth):
        return "'" + (chr(97 + depth) if depth < 26 else "_%d" % depth)

    def signature(self):
        text = "unsafe " * self.eat("U")
        if self.eat("K"):
            text += 'extern "%s" ' % (
                "C" if self.eat("C") else
                self.identifier()[0].replace("_", "-"))
        types = []
        while not self.eat("E"):
            types.append(self.type())
        text += "fn(%s)" % ", ".join(types)
        result = self.type()
        return self.made(text + (" -> " + result if result != "()" else ""))

    def traits(self):
        found = []
        while not self.eat("E"):
            text, own = self.path(False), []
            while self.eat("p"):
                name = self.identifier()[0]
                own.append("%s = %s" % (name, self.type()))
            if own and text.endswith(">"):
                text = text[:-1] + ", " + ", ".join(own) + ">"
            elif own:
                text += "<%s>" % ", ".join(own)
            found.append(text)
        return self.made(" + ".join(found))

    def constant(self):
        self.step()
        if self.eat("p"):
            return "_"
        if self.eat("B"):
            return self.back(self.constant)
        kind = self.match("([a-z])")
        sign = "-" * self.eat("n")
        digits = self.match("([0-9a-f]*)_")
        value = int(digits or "0", 16)
        if kind == "b" and value < 2:
            return ("false", "true")[value]
        if kind == "c" and value < 0x110000:
            return repr(chr(value))
        if kind not in "ahijlmnostxy":
            raise _Unsure()
        return "%s%d" % (sign, value)


def _demangle_rust(name):
    """The name of a Rust function of version 0, or None if unsure."""
    body = re.match(r"(_R[A-Z]\w*)(?:\.llvm\.\d+)?(.*)\Z", name)
    if not body or len(name) >= MAX_NAME:
        return None
    demangler = _RustDemangler(body.group(1))
    try:
        text = demangler.path(True)
        if demangler.peek():
            demangler.path(False)       # the crate that it was made for
    except (_Unsure, RecursionError):
        return None
    return None if demangler.peek() else text + body.group(2)


def _unescape_rust(parts):
    """The name in the parts of a C++ name with a hash of Rust, or None."""
    found, at = [], 0
    while at < len(parts):
        size = re.compile(r"[1-9]\d{0,3}").match(parts, at)
        if not size or size.end() + int(size.group()) > len(parts):
            return None
        at = size.end() + int(size.group())
        part = parts[size.end():at]
        part = re.sub(r"\$(?:u([0-9a-f]{2,4})|([A-Z]{1,2}))\$", lambda match:
                      chr(int(match.group(1), 16)) if match.group(1) else
                      _RUST_ESCAPES.get(match.group(2), match.group(0)),
                      part[1:] if part.startswith("_$") else part)
        found.append(part.replace("..", "::"))
    return "::".join(found)


def demangle(name):
    """(name, name with parameters) of a C++ or Rust function, or None if
    unsure.

    name   text such as `_ZN1a1fEi`, which gives ("a::f", "a::f(int)");
           if only the parameters are not understood: ("a::f", "a::f").
           A clause of what it requires (Q) comes last, and is left out
    """
    if name.startswith("_R"):
        found = _demangle_rust(name)
        return found and (found, found)
    if not name.startswith("_Z") or len(name) >= MAX_NAME:
        return None
    match = _RUST_HASH.match(name)
    found = match and _unescape_rust(match.group(1))
    if found:
        return found, found
    body, dot, suffix = name.partition(".")
    demangler = _Demangler(body)
    try:
        short, qualifiers, has_return = demangler.name(False)
    except (_Unsure, RecursionError):
        return None
    try:
        full = short + demangler.parameters(has_return) + qualifiers
    except (_Unsure, RecursionError):
        full = short
    is_read = demangler.at == len(body) or demangler.peek() == "Q"
    if full != short and not is_read:
        return None
    return short + dot + suffix, full + dot + suffix


def short_name(name):
    """What people call a function: demangled, without parameters."""
    found = demangle(name)
    return found[0] if found else name


MANGLED = "_Z", "_R"                # what mangled names begin with
_MANGLED = tuple(each.encode() for each in MANGLED)
# Words of demangled text that the mangled name abbreviates, so that it need
# not contain them.
_ABBREVIATED = frozenset(re.findall(
    r"\w+", "operator std basic_string basic_istream basic_ostream "
    "basic_iostream allocator char_traits anonymous namespace lambda unnamed "
    "type const volatile new delete clone as dyn mut fn extern unsafe closure "
    "shim " + " ".join(list(BUILTIN_TYPES.values()) + list(
        ABBREVIATIONS.values()) + list(RUST_TYPES.values()))))


def is_pattern(text):
    """Has a probe's name wildcards?"""
    return "*" in text or "?" in text


def _glob(pattern):
    """A compiled pattern with * and ?, in time linear in the name.

    Each piece is found once, at its first place behind the one before: a
    look-ahead never backtracks, so `a*a*a*b` cannot explode.
    """
    pieces = [re.escape(piece).replace(r"\?", ".")
              for piece in re.sub(r"\*+", "*", pattern).split("*")]
    if len(pieces) == 1:
        return re.compile(pieces[0] + r"\Z", re.S)
    middle = "".join("(?=(.*?%s))\\%d" % (piece, n)
                     for n, piece in enumerate(pieces[1:-1], 1))
    return re.compile("%s%s.*%s\\Z" % (pieces[0], middle, pieces[-1]), re.S)


def _squeeze(text):
    """Demangled text as it is compared: spacing does not count."""
    return text.replace(" ", "")


def demangled_match(text, columns):
    """A predicate on names (bytes): is that its demangled form?

    None if no name can be. The longest word of the text that a mangled
    name spells out, with its length before it, sifts before the work.
    """
    if text.startswith(MANGLED):
        return None
    words = [word for word in re.findall(r"[A-Za-z_]\w*", text)
             if word not in _ABBREVIATED]
    mark = b""
    if words:
        word = max(words, key=len).encode("utf-8", "surrogateescape")
        # Where Rust has `<` in a name, parts have no length of their own.
        mark = word if "<" in text else b"%d%s" % (len(word), word)
    if not any(mark in table.strings for table, _, _ in columns):
        return None
    wanted = _squeeze(text)

    def is_match(name):
        found = None
        if name.startswith(_MANGLED) and mark in name:
            found = demangle(_decode(name))
        return found is not None and wanted in (_squeeze(found[0]),
                                                _squeeze(found[1]))
    return is_match


def name_matcher(pattern):
    """A predicate on names (bytes) for a pattern with * and ?.

    The longest word that a mangled name spells out sifts before the work.
    The `.cold` part of a function is no function: only a pattern that says
    `.cold` means it.
    """
    regex, wants_cold = _glob(pattern), ".cold" in pattern
    words = [word for word in re.findall(r"\w+", pattern)
             if not any(word in text for text in _ABBREVIATED)]
    mark = max(words, key=len, default="").encode("utf-8", "surrogateescape")

    def is_match(name):
        if mark not in name or b".cold" in name and not wants_cold:
            return False
        text = _decode(name)
        if regex.match(text):
            return True
        if not name.startswith(_MANGLED):
            return False
        return any(regex.match(form) for form in demangle(text) or ())
    return is_match


def _open_regular(fd):
    """Open for reading what an O_PATH descriptor names. Raises OSError.

    O_PATH never blocks and has no effect on a device or a FIFO; only a
    regular file is opened for real.
    """
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return os.open("/proc/self/fd/%d" % fd,
                   os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def open_beneath(root, path):
    """Open a regular file as a process whose root is root would find it.

    Absolute links and `..` stay beneath root, even if someone moves things
    meanwhile. -> descriptor. Raises OSError.
    """
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    stack = [os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
    todo, n_links = path.split("/")[::-1], 0
    try:
        while todo:
            name = todo.pop()
            if name == ".." and len(stack) > 1:
                os.close(stack.pop())
            if name in ("", ".", ".."):
                continue
            stack.append(os.open(name, flags, dir_fd=stack[-1]))
            if stat.S_ISLNK(os.fstat(stack[-1]).st_mode):
                n_links += 1
                if n_links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                link = os.readlink("", dir_fd=stack[-1])
                os.close(stack.pop())
                while link.startswith("/") and len(stack) > 1:
                    os.close(stack.pop())
                todo += link.split("/")[::-1]
        return _open_regular(stack[-1])
    finally:
        for fd in stack:
            os.close(fd)


def _open_link(path):
    """Open the regular file that a link of /proc names. Raises OSError."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return _open_regular(fd)
    finally:
        os.close(fd)


def _file_elves(pid, maps):
    """Try the ways to the file of some Mappings: (Elf, is surely that file).

    The links of map_files lead to the very inode, deleted or not, but need
    privilege; a path may by now lead to another file.
    """
    path = maps[0].path
    bare = path[:-len(DELETED)] if path.endswith(DELETED) else path
    ways = [(_open_link, "/proc/%d/map_files/%x-%x"
             % (pid, maps[0].start, maps[0].end), None)]
    ways += [(open_beneath, "/proc/%d/root" % pid, name)
             for name in sorted({path, bare}, reverse=True)]
    ways += [(_open_link, "/proc/%d/exe" % pid, None),
             (open_beneath, "/", bare)]
    major, _, minor = maps[0].device.partition(":")
    identity = (int(major, 16), int(minor, 16), maps[0].inode)
    for way, first, second in ways:
        try:
            fd = way(first) if second is None else way(first, second)
        except (OSError, ValueError):   # ValueError: a NUL in a link
            continue
        image, info = FileImage(fd), os.fstat(fd)
        is_same = "map_files" in first or identity == (
            os.major(info.st_dev), os.minor(info.st_dev), info.st_ino)
        try:
            yield Elf(image, os.path.basename(bare)), is_same
        except SymbolError:
            continue


def _is_mapped(elf, pid, maps, is_same):
    """Is this file what these Mappings hold? Headers and build-id decide.

    Overlay file systems report other device and inode numbers in maps than
    fstat does, and a file may have been overwritten in place. Without a
    build-id, another inode has to be equal in all of the first mapping.
    """
    first = min(maps, key=lambda m: m.offset)
    if first.offset:
        return is_same
    size = min(elf._phoff + 56 * len(elf.segments), PAGE)
    memory = _peek(pid, first.start, size)
    if not memory:
        return is_same
    if memory != elf.image.read(0, size):
        return False
    in_memory = elf.build_id_at(lambda segment: _peek(
        pid, first.start + segment.offset, min(
            segment.size, first.end - first.start - segment.offset)))
    if in_memory or is_same:
        return not in_memory or in_memory == elf.build_id
    size = min(first.end - first.start, 1 << 20)
    data = elf.image.read(0, size)
    return _peek(pid, first.start, size)[:len(data)] == data


def _open_elf(pid, maps):
    """(Elf, has a file) for the Mappings of one file; (None, False)."""
    name = os.path.basename(maps[0].path)
    try:
        if maps[0].path == VDSO:
            size = min(maps[0].end - maps[0].start, 1 << 20)
            image = BytesImage(_peek(pid, maps[0].start, size))
            return Elf(image, name), False
        for elf, is_same in _file_elves(pid, maps):
            if _is_mapped(elf, pid, maps, is_same):
                return elf, True
        elf = Elf(MemoryImage(pid, maps), name)
        elf.note("%s: its file cannot be opened, so only its exported "
                 "functions are known by name" % name)
        return elf, False
    except SymbolError:
        return None, False


PART_SUFFIX = (                 # what gcc and clang append to names
    rb"(?:\.(?:cold|part|isra|constprop|lto_priv|llvm)(?:\.\d+)?)+")
DELETED = " (deleted)"       # appended by d_path(), fs/d_path.c
VDSO = "[vdso]"


class Symbol(NamedTuple):
    """A function: one address, all its names."""
    vaddr: int              # in the process
    size: int
    name: str               # the most usual of its names, demangled
    names: tuple            # all, as the symbol tables have them
    module: "Module"
    kind: str               # "func", "ifunc", "fde" (no symbol, name is 0x…)
    ifunc_of: str           # the IFUNC that chose it here and named it, or ""


class Module:
    """An ELF file as mapped in one process.

    path, name      as the target sees it; name is the last part
    bias            what was added to the file's vaddrs
    low, high       the addresses that its segments take
    text            [(vaddr, size, file offset)] of executable mappings
    has_file        False: the file could not be opened; its bytes and its
                    exported symbols are read from the process's memory
    shared_text     an executable mapping is shared or of huge pages: a
                    write there would reach the file or other processes
    naming          what makes text of addresses in its process, if anybody
                    wants that: Target._namer
    """

    naming = None

    def __init__(self, pid, elf, bias, maps, has_file):
        path = maps[0].path
        self.pid, self.elf, self.bias, self.has_file = pid, elf, bias, has_file
        self.deleted = path.endswith(DELETED)
        self.path = _printable(path[:-len(DELETED)] if self.deleted else path)
        self.name = os.path.basename(self.path)
        self.is_exe = False
        self.mapped, self._stamp = _text_maps(maps), _stamp_of(elf)
        if isinstance(elf.image, MemoryImage):
            elf.bias = bias
        spans = [(bias + s.vaddr, bias + s.vaddr + s.size) for s in elf.loads]
        self.low = min(low for low, _ in spans)
        self.high = max(high for _, high in spans)
        self.text, self.shared_text = [], False
        for m in maps:
            self._add_text(m)

    def _add_text(self, m):
        """Add what a Mapping holds of the executable segments."""
        for load in self.elf.loads:
            if load.flags & PF_X and "x" in m.perms:
                start = self.bias + load.vaddr
                low = max(m.start, start)
                high = min(m.end, start + load.size)
                offset = low - start + load.offset
                if low < high and m.start - m.offset == low - offset:
                    self.text.append((low, high - low, offset))
                    self.shared_text |= ("s" in m.perms
                                         or _is_huge(m, self.elf.image))

    def is_unchanged(self):
        """Is its file what it was when it was opened?"""
        return _stamp_of(self.elf) == self._stamp

    def is_mapped_from(self, path):
        """Is that path of a Mapping this module's?"""
        return self.path == _printable(path[:-len(DELETED)] if path.endswith(
            DELETED) else path)

    def close(self):
        """Give the file's descriptor back."""
        if isinstance(self.elf.image, FileImage):
            self.elf.image.close()

    def __repr__(self):
        return "<Module %s at 0x%x>" % (self.name, self.low)

    @property
    def soname(self):
        return self.elf.soname

    @property
    def build_id(self):
        return self.elf.build_id

    @property
    def notes(self):
        """What had to be left out of this file's tables, and why."""
        return list(self.elf.notes)

    @_Lazy
    def unwind(self):
        """What .eh_frame says, with the file's vaddrs."""
        return Unwind(self.elf)

    @_Lazy
    def _functions(self):
        tables = self.elf.symtabs or debug_tables(self.pid, self)
        return Functions(self.elf, tables + [self.elf.dynsym], self.unwind)

    @_Lazy
    def _pointers(self):
        return code_pointers(self.elf) if self.elf.code_loads else []

    @_Lazy
    def _words(self):
        return code_words(self.elf) if self.elf.code_loads else []

    def functions(self):
        """Each function once, also those that only .eh_frame knows."""
        table = self._functions
        for start in sorted(table.matching(lambda name: True)
                            | set(table.nameless())):
            yield self.symbol(start)

    def symbol(self, start):
        """The Symbol of the function that begins at the file's vaddr."""
        aliases = self._functions.aliases(start)
        names, kind = {}, "func"
        for table, index in aliases:
            name = table.name(index)
            rank = (table.is_local(index), len(name) - len(name.lstrip(b"_")),
                    len(name), name)
            names[name] = min(rank, names.get(name, rank))
            if table.type(index) == STT_GNU_IFUNC:
                kind = "ifunc"
        order = sorted(names, key=names.get)
        if not order:
            kind, order = "fde", [b"0x%x" % start]
        texts = tuple(_decode(name) for name in order)
        size = self._functions.size(start, aliases)
        return Symbol(start + self.bias, size, short_name(texts[0]),
                      texts, self, kind, "")

    def named(self, text):
        """The Symbols of exactly that name, mangled or not."""
        table = self._functions
        starts = table.named(text.encode("utf-8", "surrogateescape"))
        match = demangled_match(text, table.columns)
        if match and ("operator" in text or not is_pattern(text)):
            starts |= table.matching(match)
        return [self.symbol(start) for start in sorted(starts)]

    def objects(self, text):
        """{(the file's vaddr, size)} of the variables of exactly that name.

        Mangled or not. vaddr is None for one that each thread has.
        """
        name, found = text.encode("utf-8", "surrogateescape"), set()
        for table in [c[0] for c in self._functions.columns]:
            indices = table.named(name)
            if "::" in text:
                indices += [index for index, info in enumerate(table.infos)
                            if info & 0xf == STT_OBJECT
                            and _decode(table.name(index)) == text]
            for index in indices:
                kind, section = table.type(index), table.infos[index] >> 16
                if not 0 < section < 0xff00:            # SHN_LORESERVE
                    continue
                if kind in (STT_OBJECT, STT_NOTYPE, STT_TLS):
                    found.add((None if kind == STT_TLS
                               else table.values[index], table.sizes[index]))
        return found

    def names(self):
        """Every name of a function, with repetitions (bytes)."""
        for table, order, _ in self._functions.columns:
            for index in order:
                if table.type(index) in (STT_FUNC, STT_GNU_IFUNC):
                    yield table.name(index)

    def parts(self, text):
        """Names of parts that a compiler split from a function (bytes)."""
        name = re.escape(text.encode("utf-8", "surrogateescape"))
        regex = re.compile(name + PART_SUFFIX + b"(?=\0)")
        return sorted({match.group()
                       for table, _, _ in self._functions.columns
                       for match in regex.finditer(table.strings)
                       if table.strings[match.start() - 1] == 0})

    def matching(self, pattern):
        """Sorted vaddrs, the file's, of functions that a pattern matches."""
        table = self._functions
        starts = table.matching(name_matcher(pattern))
        regex = _glob(pattern)
        starts.update(start for start in table.nameless()
                      if regex.match("0x%x" % start))
        return sorted(starts)

    def function_at(self, vaddr):
        """The Symbol of the function that holds a vaddr, or None."""
        start = self._functions.start_of(vaddr - self.bias)
        return None if start is None else self.symbol(start)

    def bounds(self, vaddr):
        """(start, size, end of padding) of the function round a vaddr.

        Also of the one that a vaddr in padding is behind. None if nothing
        tells. The padding ends where the next symbol, FDE or section
        begins; whether it is padding, its bytes must show.
        """
        table, bias = self._functions, self.bias
        start = table.start_of(vaddr - bias)
        if start is None:
            start = table.last_start(vaddr - bias)
        if start is None:
            return None
        size = table.size(start)
        return start + bias, size, bias + table.next_mark(
            start + max(size, 1))

    def fde(self, vaddr):
        """The Fde that holds a vaddr, with vaddrs of the process, or None."""
        fde = self._functions.unwind.at(vaddr - self.bias)
        return fde and Fde(fde.vaddr + self.bias, fde.size,
                           fde.lsda and fde.lsda + self.bias)

    def guarded(self, low, high):
        """((low, high), …) of the code in [low, high) where a fault may
        become an exception that the function, or its caller, catches."""
        functions, bias = self._functions, self.bias
        fdes, found = functions.guarding(low - bias, high - bias), set()
        if not fdes:
            return ()
        for fde in fdes:
            found.update((first + bias, last + bias) for first, last, _
                         in functions.unwind.call_sites(fde))
        return tuple(sorted(found))

    def entries_in(self, low, high):
        """Sorted vaddrs in [low, high) that control may come to from afar:
        symbols, landing pads, and what relocations point to."""
        low, high = low - self.bias, high - self.bias
        entries = self._functions.entries(low, high) + _between(
            self._pointers, low, high)
        return [entry + self.bias for entry in sorted(set(entries))
                ] if entries else entries

    def words_in(self, low, high):
        """Sorted vaddrs in [low, high) that words of data may point to, in
        a program that has no relocations to tell."""
        return [word + self.bias for word in _between(
            self._words, low - self.bias, high - self.bias)]

    def expect_many(self):
        """Have tables made, as so many functions will be asked for."""
        self._functions.expect_many()

    @_Lazy
    def _places(self):
        """All that entries_in and words_in could tell, but landing pads."""
        return sorted({*self._pointers, *self._words,
                       *itertools.chain(*self._functions.marks)})

    def inside(self, start, size, end):
        """(entries, guarded, words) of a function: what entries_in and
        words_in tell of all behind its first byte, up to end, and guarded
        of itself. Tuples."""
        functions, low, high = (self._functions, start - self.bias,
                                end - self.bias)
        if functions.is_for_many and not (
                _between(self._places, low + 1, high)
                or functions.guarding(low, high)):
            return (), (), ()           # as of most
        return (tuple(self.entries_in(start + 1, end)),
                self.guarded(start, start + size),
                tuple(self.words_in(start + 1, end)))

    def read_file(self, vaddr, size):
        """The file's bytes at a vaddr of the process; fewer at the end of
        its segment. Without a file (has_file) it is memory that is read."""
        return self.elf.read_vaddr(vaddr - self.bias, size)

    def text_code(self):
        """[(vaddr, bytes)] of the executable segments, from the file.

        Raises SymbolError if that is more than MAX_TABLE.
        """
        if sum(size for _, size, _ in self.text) > MAX_TABLE:
            raise SymbolError("read", self.name, "it has more than %d MiB "
                              "of code" % (MAX_TABLE >> 20))
        return [(vaddr, self.elf.image.read(offset, size))
                for vaddr, size, offset in self.text]


def _between(values, low, high):
    """Those of sorted values that are in [low, high)."""
    first = bisect.bisect_left(values, low)
    if first == len(values) or values[first] >= high:
        return []                   # as of most functions
    return values[first:bisect.bisect_left(values, high, first)]


def _printable(path):
    """A path of read_maps as text that any stream can encode."""
    return path.encode("utf-8", "surrogateescape").decode(
        "utf-8", "backslashreplace")


def _is_huge(m, image):
    """Do huge pages of hugetlbfs hold this mapping of a file?"""
    if (m.start | m.end | m.offset) % (1 << 21):
        return False
    return (isinstance(image, FileImage)
            and os.fstatvfs(image.fd).f_bsize >= 1 << 21)


def _text_maps(maps):
    return tuple(m for m in maps if "x" in m.perms)


def _stamp_of(elf):
    """What changes when the file of an Elf is written to."""
    if not isinstance(elf.image, FileImage) or elf.image.fd < 0:
        return None
    info = os.fstat(elf.image.fd)
    return info.st_size, info.st_mtime_ns


def _mapped_files(pid):
    """{file: its Mappings} of a process, and the vdso's."""
    files = collections.OrderedDict()
    for m in read_maps(pid):
        if m.path.startswith("/") or m.path == VDSO:
            files.setdefault((m.device, m.inode, m.path), []).append(m)
    return files


def modules(pid, before=()):
    """The Modules of a process: the program first, then by address.

    before   Modules from an earlier look; those whose text is mapped as it
             was then are taken over
    What is mapped executable but is no ELF file (a JIT's cache, ubp's own
    arena) is left out. Raises SymbolError if there is nothing to read.
    """
    pid = memory_tid(pid)
    files = _mapped_files(pid)
    for _ in range(20):             # an exec begins with an empty stack
        if files or not read_maps(pid):
            break
        time.sleep(0.005)
        files = _mapped_files(pid)
    if not files:
        raise SymbolError("read the modules of", "pid %d" % pid,
                          "/proc/%d/maps shows none" % pid,
                          "it ended, is a kernel thread, or needs sudo")
    found, known = [], {}
    for module in before:
        if module.is_unchanged():
            known.setdefault(module.mapped, []).append(module)
    for maps in files.values():
        text = _text_maps(maps)
        if text:
            found += known.get(text) or _modules_of(pid, maps)
    auxv = _auxv(pid)
    # Program headers may be in no segment (ld -N): then the entry tells.
    tells = next((vaddr for vaddr in map(auxv.get, (AT_PHDR, AT_ENTRY))
                  if vaddr and any(module.low <= vaddr < module.high
                                   for module in found)), 0)
    for module in found:
        module.is_exe = module.low <= tells < module.high
    return sorted(found, key=lambda m: (not m.is_exe, m.low))


def _modules_of(pid, maps):
    """The Modules of one file, which may be mapped more than once."""
    elf, has_file = _open_elf(pid, maps)
    if elf is None:
        return []
    biases = {m.start - m.offset - load.vaddr + load.offset
              for m in maps if "x" in m.perms
              for load in elf.loads if load.flags & PF_X
              and load.offset & -PAGE <= m.offset < load.offset + load.size}
    found = [Module(pid, elf, bias, maps, has_file) for bias in sorted(biases)
             if bias >= 0 and bias % PAGE == 0]
    return [module for module in found if module.text]


_C_LIBRARY = ("libc.", "ld-", "libpthread", "libc-", "[")


def has_c_library(all_modules):
    """Is it no static program?"""
    return any(name.startswith(("libc.so", "libc.musl", "ld-musl"))
               for name in (module.soname or module.name
                            for module in all_modules))


def imports(all_modules, *names):
    """Do modules other than the C library's call functions of these names?
    A static program has what it calls in itself, if that was not stripped.
    """
    wanted = re.compile(b"\0(?:%s)\0" % b"|".join(
        name.encode() for name in names))
    tables = [module.elf.dynsym for module in all_modules
              if not (module.soname or module.name).startswith(_C_LIBRARY)]
    if not has_c_library(all_modules):
        tables += [table for module in all_modules if module.is_exe
                   for table in module.elf.symtabs]
    return any(wanted.search(bytes(table.strings)) for table in tables)


def swaps_contexts(all_modules):
    """May a program leave a handler for another stack, by ucontext's
    functions? man 3 makecontext"""
    return imports(all_modules, "swapcontext", "setcontext")


def _auxv(pid):
    """{type: value} of the auxiliary vector. Source: getauxval(3)."""
    data = read_proc("/proc/%d/auxv" % pid)
    return dict(struct.iter_unpack("<QQ", data[:len(data) // 16 * 16]))


def debug_tables(pid, module):
    """Symbol tables for a file that has no .symtab.

    In gdb's order: a file named by build-id or by .gnu_debuglink, beneath
    the target's root, then beneath ours; else MiniDebugInfo.
    """
    if not module.has_file:
        return []
    elf, folder = module.elf, os.path.dirname(module.path)
    names = []
    if elf.build_id:
        names.append(("/usr/lib/debug/.build-id/%s/%s.debug"
                      % (elf.build_id[:2], elf.build_id[2:]), None))
    link, crc = _debuglink(elf)
    if link:
        names += [(folder + "/" + link, crc),
                  (folder + "/.debug/" + link, crc),
                  ("/usr/lib/debug" + folder + "/" + link, crc)]
    for root in ("/proc/%d/root" % pid, "/"):
        for name, crc in names:
            debug = _open_debug(root, name)
            if debug and _belongs(debug, elf, crc):
                return debug.symtabs
    data = _mini_debug(elf)
    try:
        return Elf(BytesImage(data), elf.name).symtabs if data else []
    except SymbolError:
        elf.note("%s: .gnu_debugdata is damaged" % elf.name)
        return []


def _open_debug(root, name):
    """The Elf of a debug file, or None if there is no such ELF file."""
    try:
        image = FileImage(open_beneath(root, name))
        return Elf(image, os.path.basename(name))
    except (OSError, ValueError, SymbolError):
        return None


def _belongs(debug, elf, crc):
    """Is this the debug file of elf? By build-id, else by its CRC-32."""
    if debug.build_id or elf.build_id:
        return debug.build_id == elf.build_id
    import binascii
    size, at, value = debug.image.size, 0, 0
    if size > 4 * MAX_TABLE:
        return False                    # a checksum that takes seconds
    while at < size:
        chunk = debug.image.read(at, 1 << 20)
        if not chunk:
            return False
        value, at = binascii.crc32(chunk, value), at + len(chunk)
    return value & 0xffffffff == crc


def _debuglink(elf):
    """(file name, CRC-32) of .gnu_debuglink, ("", None) without one."""
    section = elf.section(b".gnu_debuglink")
    data = elf.section_bytes(section) if section else b""
    name = _c_string(data, 0)
    at = len(name) + 4 & ~3             # a NUL, then padded to 4
    if not name or b"/" in name or at + 4 > len(data):
        return "", None
    return os.fsdecode(name), struct.unpack_from("<I", data, at)[0]


def _mini_debug(elf):
    """The ELF file in .gnu_debugdata (xz), or b""."""
    section = elf.section(b".gnu_debugdata")
    if not section:
        return b""
    try:
        import lzma
    except ImportError:
        elf.note("%s: its MiniDebugInfo needs Python's lzma module"
                 % elf.name)
        return b""
    try:
        unpack = lzma.LZMADecompressor(memlimit=MAX_TABLE)
        return unpack.decompress(elf.section_bytes(section), MAX_TABLE)
    except (lzma.LZMAError, EOFError, MemoryError):
        elf.note("%s: .gnu_debugdata is damaged" % elf.name)
        return b""


class Site(NamedTuple):
    """An instruction to be probed."""
    vaddr: int
    function: Optional[Symbol]      # None: no symbol or FDE covers it
    offset: int                     # from the function's start
    names: tuple                    # the function's, the usual one first
    module: Module
    is_return: bool = False         # its function's exits are meant


class Spec(NamedTuple):
    """A probe as the user wrote it, taken apart."""
    text: str
    module: str             # "" for every module
    function: str           # "" if vaddr is given
    offset: int             # bytes behind the function's start
    is_return: bool
    vaddr: Optional[int]    # nm's address in module, else of the process
    watch: tuple = ()       # of memory: (bytes or 0, "w" or "rw")


_NOT_BUILT = (              # (pattern, what it is)
    (re.compile(r"usdt:"), "a static probe (usdt:)"),
    (re.compile(r".*[^:]:[0-9]+$"), "a source line (FILE:LINE)"))
_ADDRESS = re.compile(r"0[xX][0-9a-fA-F]{1,16}$")
_OFFSET = re.compile(r"(.+)\+(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,19})$", re.S)
_MODULE = re.compile(r"(?<!:):(?!:)")
_MEMORY = re.compile(r"mem:(.*?)(?:/([0-9]{1,9}))?(?::(w|rw))?$", re.S)

_MEMORY_SUFFIX = re.compile(r"/[0-9]+:[^:/]*$")


def _malformed(text, column, why):
    return ProbeError("parse the probe", _quote(text),
                      "column %d: %s" % (column + 1, why),
                      "[MODULE:]FUNCTION[+OFFSET] or [MODULE:]0xADDRESS; "
                      "* and ? match names")


def _quote(text):
    return '"%s"' % text if len(text) <= 200 else '"%s..."' % text[:200]


def parse_probe(text):
    """Take a probe apart, from both ends. -> Spec. Raises ProbeError.

    The grammar is README's "Probes".
    """
    probe = text.strip()
    if not probe:
        raise _malformed(text, 0, "it is empty")
    if len(probe) > MAX_NAME or "\0" in probe:
        raise _malformed(text, 0, "it is too long, or has a NUL")
    if probe.startswith("mem:"):
        return _parse_memory(probe)
    for pattern, what in _NOT_BUILT:
        if pattern.match(probe):
            raise ProbeError("use the probe", _quote(probe),
                             "%s is planned but not built yet" % what,
                             "probe a function's entry: [MODULE:]FUNCTION")
    if probe.endswith("%return"):
        return _parse_return(probe)
    colon = _MODULE.search(probe)
    module = probe[:colon.start()] if colon else ""
    function = probe[colon.end():] if colon else probe
    column = colon.end() if colon else 0
    if colon and not module:
        raise _malformed(probe, 0, "no module before the colon")
    if not function:
        raise _malformed(probe, column, "no function behind the colon")
    if _ADDRESS.match(function):
        return Spec(probe, module, "", 0, False, int(function, 16))
    tail = _OFFSET.match(function)
    if tail and _ADDRESS.match(tail.group(1)):
        raise _malformed(probe, column + tail.end(1),
                         "an address takes no offset")
    if function[0].isdigit():
        raise _malformed(probe, column, "a number: an address begins with "
                         "0x, and no function with a digit")
    if tail and not tail.group(1).endswith("operator"):
        return Spec(probe, module, tail.group(1), int(tail.group(2), 0),
                    False, None)
    return Spec(probe, module, function, 0, False, None)


def _parse_return(probe):
    """FUNCTION%return -> Spec"""
    spec = parse_probe(probe[:-len("%return")])
    if spec.offset or spec.is_return or spec.watch:
        raise _malformed(probe, len(probe) - len("%return"),
                         "%return belongs to a whole function")
    return spec._replace(text=probe, is_return=True)


def _parse_memory(probe):
    """mem:[MODULE:]SYMBOL[+OFFSET]|0xADDRESS[/BYTES][:w|rw] -> Spec"""
    form = "mem:0xADDRESS|SYMBOL[/BYTES][:w|rw]"
    place, size, access = _MEMORY.match(probe).groups()
    if not place:
        raise ProbeError("parse the probe", _quote(probe),
                         "column 5: no address and no symbol", form)
    if _MEMORY_SUFFIX.search(place):
        raise ProbeError("parse the probe", _quote(probe), "column %d: %s is "
                         "neither :w (writes) nor :rw (reads, too)" % (
                             5 + place.rindex(":"),
                             place[place.rindex(":"):]), form)
    spec = parse_probe(place) if not place.startswith("mem:") else None
    if spec is None or is_pattern(spec.function) or spec.is_return:
        raise ProbeError("parse the probe", _quote(probe), "column 5: one "
                         "address or one symbol is watched", form)
    if size is not None and int(size) not in (1, 2, 4, 8):
        raise ProbeError("parse the probe", _quote(probe), "%s bytes: a "
                         "debug register watches 1, 2, 4 or 8" % size, form)
    return spec._replace(text=probe, watch=(int(size or 0), access or "w"))


def is_module_named(module, text):
    """Does the MODULE part of a probe mean this module?

    A text with a / is a path. Else the file name and the SONAME count,
    each also up to `.so`; `exe` is the program.
    """
    if text == "exe" and module.is_exe:
        return True
    if "/" in text:
        return bool(_glob(text).match(module.path)) or _is_same_file(
            module, text)
    names = {module.name, module.soname, module.name.strip("[]")}
    names |= {name.partition(".so")[0] for name in names}
    names.discard("")
    return text in names or any(_glob(text).match(name) for name in names)


def _is_same_file(module, path):
    """Does a path lead, in the target, to the file of a module?"""
    if not module.has_file:
        return False
    try:
        image = FileImage(open_beneath("/proc/%d/root" % module.pid, path))
        return os.path.samestat(os.fstat(image.fd),
                                os.fstat(module.elf.image.fd))
    except (OSError, ValueError):
        return False


def find(modules, spec, read_memory=None, notes=None, max_sites=None):
    """The Sites that a Spec means, in the order of the modules.

    read_memory   (vaddr, size) -> bytes of the process; by default its own
    notes         a list that gets what the user should know besides
    Raises SymbolError if nothing matches, or more than max_sites.
    """
    notes = [] if notes is None else notes
    chosen = [module for module in modules
              if not spec.module or is_module_named(module, spec.module)]
    if not chosen:
        raise SymbolError("find", _quote(spec.text), "no module %s is mapped"
                          % (_quote(spec.module) if spec.module
                             else "of x86-64"), _closest(
                              spec.module, (m.name for m in modules)))
    if spec.watch:
        return [_memory_site(modules, chosen, spec)]
    if spec.vaddr is not None:
        return [_address_site(chosen, spec)]
    symbols = _matching_symbols(chosen, spec, max_sites)
    if not is_pattern(spec.function):
        notes += _parts(symbols, spec)
    read = read_memory or _memory_reader(chosen[0].pid)
    sites, unresolved = {}, []
    for symbol in symbols:
        found = [symbol]
        if symbol.kind == "ifunc":
            found = _implementations(modules, symbol, read)
            unresolved += [] if found else [symbol]
        for function in found:
            _add_site(sites, function, symbol, spec)
    if unresolved:
        text = _unresolved(unresolved)
        if not sites:
            raise SymbolError("find", _quote(spec.text), text, "it is "
                              "resolved when it is first called")
        notes.append(text)
    return list(sites.values())


def _matching_symbols(chosen, spec, max_sites):
    """The Symbols of a name, or of a pattern that is no name."""
    symbols = [symbol for module in chosen
               for symbol in module.named(spec.function)]
    if symbols or not is_pattern(spec.function):
        found = symbols
    else:
        starts = [(module, module.matching(spec.function))
                  for module in chosen]
        n = sum(len(some) for _, some in starts)
        if max_sites is not None and n > max_sites:
            raise SymbolError("find", _quote(spec.text), "%d functions match,"
                              " more than %d" % (n, max_sites),
                              "narrow the pattern, or raise --max-sites")
        found = [module.symbol(start) for module, some in starts
                 for start in some]
    if not found:
        raise _no_function(chosen, spec)
    return found


def _memory_reader(pid):
    return lambda vaddr, size: _peek(pid, vaddr, size)


def _add_site(sites, function, symbol, spec):
    """Add a Site to {vaddr: Site}; the same place keeps all its names."""
    _check_offset(function, spec.offset, spec.text)
    vaddr = function.vaddr + spec.offset
    names = (symbol.name,) + function.names
    if spec.function in symbol.names:
        names = (spec.function,) + names
    if vaddr in sites:
        names = sites[vaddr].names + names
    names = tuple(collections.OrderedDict.fromkeys(names))
    sites[vaddr] = Site(vaddr, function, spec.offset, names, function.module,
                        spec.is_return)


def _check_offset(function, offset, text):
    """Raise SymbolError unless an instruction begins there.

    Bytes that cannot be decoded decide nothing here: the plan refuses them.
    """
    if offset == 0 or function is None:
        return
    if offset >= function.size:
        raise SymbolError("find", _quote(text), "%s has only %d bytes"
                          % (function.name, function.size))
    code = function.module.read_file(function.vaddr, function.size)
    at = 0
    while at < offset:
        try:
            size = ubp_x86.decode(code[at:at + 15], function.vaddr + at).size
        except DecodeError:
            return
        if at + size > offset:
            raise SymbolError(
                "find", _quote(text), "offset 0x%x of %s is inside an "
                "instruction" % (offset, function.name),
                "instructions begin at %s+0x%x and +0x%x"
                % (function.name, at, at + size))
        at += size


def _address_site(chosen, spec):
    """The Site of MODULE:0xA, or of 0xA in the process."""
    if spec.module:
        chosen = [module for module in chosen if module.text]
        if len(chosen) > 1:
            raise SymbolError("find", _quote(spec.text),
                              "an address needs one module, and these match: "
                              + ", ".join(m.name for m in chosen[:5]))
        vaddr = chosen[0].bias + spec.vaddr
    else:
        vaddr = spec.vaddr
    for module in chosen:
        if any(low <= vaddr < low + size for low, size, _ in module.text):
            function = module.function_at(vaddr)
            offset = vaddr - function.vaddr if function else 0
            _check_offset(function, offset, spec.text)
            names = ("0x%x" % (vaddr - module.bias),)
            if function:
                names = tuple(collections.OrderedDict.fromkeys(
                    (function.name,) + function.names))
            if spec.is_return and (offset or not function):
                raise SymbolError("find", _quote(spec.text), "0x%x is not "
                                  "where a function begins" % vaddr)
            return Site(vaddr, function, offset, names, module,
                        spec.is_return)
    raise SymbolError("find", _quote(spec.text),
                      "no module has code at 0x%x" % vaddr,
                      "MODULE:0xA takes the address that nm prints")


class Memory(NamedTuple):
    """What stands for the module where memory belongs to no file."""
    name: str
    build_id: str = ""
    soname: str = ""
    bias: int = 0


def is_watch(site):
    """Is it memory that is watched, and no instruction?"""
    return site.function is not None and site.function.kind in ("w", "rw")


def _memory_site(all_modules, chosen, spec):
    """The Site of mem:…; its function is the range that is watched."""
    size, access = spec.watch
    if spec.vaddr is None:
        module, vaddr, natural = _object(chosen, spec)
        vaddr += spec.offset
        if not size and (spec.offset or natural not in (1, 2, 4, 8)):
            raise SymbolError("watch", _quote(spec.text), "%s has %d bytes; "
                              "a debug register watches 1, 2, 4 or 8"
                              % (spec.function, natural),
                              "say which: mem:%s/8" % spec.function)
        size = size or natural
    else:
        vaddr = spec.vaddr + (chosen[0].bias if spec.module else 0)
        module = next((m for m in all_modules if m.low <= vaddr < m.high),
                      None) or _memory_at(all_modules[0].pid, vaddr)
        size = size or next(n for n in (8, 4, 2, 1) if vaddr % n == 0)
    if not 0 < vaddr <= VADDR_END - size or vaddr % size:
        raise SymbolError("watch", _quote(spec.text), "%d bytes at 0x%x: a "
                          "debug register watches an aligned range of user "
                          "memory" % (size, vaddr),
                          "mem:0x%x/%d is one with its first byte" % (
                              vaddr & -size, size))
    name = "mem:%s%s/%d:%s" % (
        spec.function or "0x%x" % (vaddr - module.bias),
        "+0x%x" % spec.offset if spec.offset else "", size, access)
    return Site(vaddr, Symbol(vaddr, size, name, (name,), module, access, ""),
                0, (name,), module)


def _memory_at(pid, vaddr):
    """The Memory that stands for the vma at vaddr."""
    for m in read_maps(memory_tid(pid)):
        if m.start <= vaddr < m.end:
            return Memory(_printable(os.path.basename(m.path)) or "[anon]")
    raise SymbolError("watch", "0x%x" % vaddr, "nothing is mapped there")


def _object(chosen, spec):
    """(module, vaddr, size) of the one variable that a Spec names.

    A variable of the program hides the libraries' of that name, as it does
    for the linker; other variables of one name are told apart by address.
    """
    found = [(module, vaddr, size) for module in chosen
             for vaddr, size in module.objects(spec.function)]
    found = [item for item in found if item[0].is_exe] or found
    places = {module.bias + vaddr for module, vaddr, _ in found
              if vaddr is not None}
    if not found:
        why = "no variable of that name has an address"
    elif not places:
        why = "it is thread-local: each thread has its own"
    elif len(places) > 1:
        why = "%d variables have that name: at %s" % (len(places), ", ".join(
            "%s:0x%x" % (module.name, vaddr) for module, vaddr, _
            in found[:5] if vaddr is not None))
    else:
        module, vaddr, size = next(item for item in found
                                   if item[1] is not None)
        return module, module.bias + vaddr, size
    raise SymbolError("watch", _quote(spec.text), why,
                      "name its module, or its address: mem:MODULE:0xADDRESS")


def _parts(symbols, spec):
    """Notes on what the compiler made of a function besides itself."""
    notes = []
    for module in collections.OrderedDict((s.module, 0) for s in symbols):
        for name in module.parts(spec.function):
            notes.append("%s:%s is a separate part, not probed by this name"
                         % (module.name, _decode(name)))
    return notes[:10]


def _unresolved(symbols):
    names = ", ".join(symbol.name for symbol in symbols[:5])
    if len(symbols) > 5:
        names += " and %d more" % (len(symbols) - 5)
    return "%s: IFUNC not resolved yet in this process" % names


def _implementations(modules, symbol, read):
    """The Symbols that an IFUNC stands for in this process.

    Whoever calls it keeps the choice in a slot: the defining module's are
    IRELATIVE relocations that name the resolver, others name the symbol.
    A slot that leads out of the defining module's code is not bound yet;
    the vdso is where some of libc's lead.
    """
    owner = symbol.module
    resolver = symbol.vaddr - owner.bias
    slots = [owner.bias + slot
             for slot in owner.elf.resolver_slots.get(resolver, ())]
    targets = _slot_targets(modules, owner, slots, read)
    if not targets:
        slots = [module.bias + slot for module in modules
                 for name in symbol.names
                 for slot in module.elf.named_slots.get(name.encode(), ())]
        targets = _slot_targets(modules, owner, slots, read)
    return [_implementation(module, vaddr, symbol)
            for module, vaddr in targets]


def _slot_targets(modules, owner, slots, read):
    """Sorted [(module, vaddr)] that slots of memory lead to."""
    targets = set()
    for slot in slots[:MAX_ALIASES]:
        data = read(slot, 8)
        vaddr = int.from_bytes(data, "little")
        for module in modules:
            if module is owner or module.name == VDSO:
                targets.update((module, vaddr) for low, size, _ in module.text
                               if low <= vaddr < low + size)
    return sorted(targets, key=lambda target: target[1])


def _implementation(module, vaddr, ifunc):
    """The Symbol of what an IFUNC leads to."""
    symbol = module.function_at(vaddr)
    if symbol is None or symbol.vaddr != vaddr:
        return Symbol(vaddr, 0, ifunc.name, ifunc.names, module, "func",
                      ifunc.name)
    names = ifunc.names
    if symbol.kind != "fde":
        names += tuple(name for name in symbol.names if name not in names)
    return symbol._replace(name=ifunc.name, names=names, kind="func",
                           ifunc_of=ifunc.name)


def _no_function(chosen, spec):
    """The SymbolError for a name that nothing has."""
    where = ("module %s" % chosen[0].name if len(chosen) == 1
             else "%d modules" % len(chosen))
    if os.path.exists(spec.text):
        return SymbolError("find", _quote(spec.text), "no function of that "
                           "name, but a file here", "did the shell expand "
                           "*? quote the probe: '*Command'")
    names = (_decode(name) for module in chosen for name in module.names())
    hints = ["the only suffix is %return" if "%" in spec.function else
             _closest(spec.function, names)]
    hints += [note for module in chosen for note in module.notes]
    return SymbolError("find", _quote(spec.text),
                       "no such function in " + where,
                       "; ".join([hint for hint in hints if hint][:4]))


def _closest(wanted, names):
    """A hint with the three names closest to what was wanted, or ""."""
    import difflib
    import heapq
    letters = set(wanted.lower())

    def distance(name):
        return (len(letters.symmetric_difference(name.lower()))
                + abs(len(name) - len(wanted)))
    near = heapq.nsmallest(500, set(names), key=distance)
    best = difflib.get_close_matches(wanted, near, 3, 0.5)
    return "did you mean %s?" % ", ".join(best) if best else ""
# ---- 4  Stacks ------------------------------------------------------------
#
# From a copy of a thread's registers and of its stack's top to the functions
# that are on it. The one idea: what a C++ exception finds, .eh_frame tells
# us too. For each range of code it has a row: how to compute the CFA (the
# canonical frame address: rsp as it was before the call) and where, seen from
# there, the caller's registers and the return address are. Rows come from
# small programs, and a step of a walk is a row made ready, kept by address.
#
#     higher  | caller's frame        |
#             +-----------------------+ <- CFA, the caller's rsp
#             | return address        |    CFA-8
#             | saved registers, data |
#     rsp  -> +-----------------------+ <- where the copy begins
#
# Invariant: the target wrote all of it, so every loop has a bound, memory is
# what the copy holds, and a walk ends where something is unknown, saying why.
# No return address is guessed: it follows from CFI or from the frame pointer
# of code that is seen to keep one.
# Sources: DWARF 5, 6.4 and 2.5; LSB 5.0, 10.6; psABI, 3.6 and 3.7.

_U64, _U64_MAX = struct.Struct("<Q"), (1 << 64) - 1
RBP, RSP, RA = 6, 7, 16             # DWARF register numbers, psABI 3.6.2
N_REGISTERS = 17                    # rax ... r15 and the return address
_CALLER_SAVED = (0, 1, 2, 4, 5, 8, 9, 10, 11)    # psABI figure 3.4
MAX_STATES = 256        # remembered rows; compilers nest two
MAX_EXPRESSION = 1000   # operations of an expression, loops included
MAX_EXPRESSION_STACK = 64
MAX_STEPS = 1 << 16     # ready steps that are kept
MAX_PERF_MAP = 1 << 25  # bytes of a JIT's map that are read
MAX_JIT = 1 << 19       # functions of one that are kept
_LOOK_AGAIN_S = 1.0     # before maps are read again for an unknown address

# How a walk ended.
END = "end"                         # the outermost frame
DEPTH = "depth"                     # as many frames as were wanted
TRUNCATED = "truncated"             # what is needed lies outside the copy
NO_UNWIND_INFO = "no unwind info"
UNKNOWN_CODE = "unknown code"       # a return address that is in no code
UNKNOWN_REGISTER = "unknown register"
DAMAGED = "damaged unwind info"     # or a stack that contradicts it

# Operands: r register, u number, f number * data_unit, s the same signed,
# b block, 1 2 4 8 an advance in so many bytes, a address. DWARF 5, 7.24.
CFA_OPCODES = """
00 nop                  0b restore_state            16 val_expression r b
01 set_location a       0c define r u               1d advance 8
02 advance 1            0d define_register r        2e args_size u
03 advance 2            0e define_offset u          2f offset_negative r f
04 advance 4            0f define_expression b
05 offset r f           10 expression r b
06 restore r            11 offset r s
07 undefined r          12 define r s
08 same_value r         13 define_offset s
09 register r r         14 val_offset r f
0a remember_state       15 val_offset r s
"""
# DWARF 5, 7.7.1. Operands: 1 2 4 8 bytes, + signed, u and s LEB128.
EXPRESSION_OPCODES = """
06 deref       0e const 8    17 rot      20 not      28 bra 2+   90 value u
08 const 1     0f const 8+   19 abs      21 or       29 eq       92 value u s
09 const 1+    10 const u    1a and      22 plus     2a ge       94 deref 1
0a const 2     11 const s    1b div      23 plus u   2b gt       96 nop
0b const 2+    12 dup        1c minus    24 shl      2c le
0c const 4     13 drop       1d mod      25 shr      2d lt
0d const 4+    14 over       1e mul      26 shra     2e ne
15 pick 1      16 swap       1f neg      27 xor      2f skip 2+
"""                     # and literals 30-4f, registers 50-6f, based 70-8f


def _opcode_table(text):
    """{opcode: (name, operands)} of a table with several columns."""
    cells = (cell.split() for cell in re.split(r" {2,}|\n", text) if cell)
    return {int(cell[0], 16): (cell[1], tuple(cell[2:])) for cell in cells}


_CFA = _opcode_table(CFA_OPCODES)
_EXPRESSION = _opcode_table(EXPRESSION_OPCODES)
assert (len(_CFA), len(_EXPRESSION)) == (26, 44)


class _Ended(Exception):
    """A walk goes no further. Its one argument is one of the reasons."""


class CfaRow(NamedTuple):
    """What holds from a vaddr on.

    cfa     (register, offset), or (None, expression)
    rules   {register: (kind, value)}: "offset" from the CFA of where it is
            saved, "val_offset" from the CFA to its value, "register",
            "expression", "val_expression", or "undefined". Not listed:
            the register has kept its value.
    """
    vaddr: int
    cfa: tuple
    rules: dict


class _CfaMachine:
    """Runs the program of a CallFrame; one method for each instruction."""

    def __init__(self, frame):
        self.frame, self.cie = frame, frame.cie
        self.vaddr = frame.fde.vaddr
        self.cfa, self.rules, self.initial, self.states = None, {}, {}, []

    def rows(self):
        """Yield the CfaRows. Raises _Truncated where it makes no sense."""
        for _ in self._run(self.cie.program, self.cie.vaddr):
            raise _Truncated()          # an advance before there is a row
        self.initial = dict(self.rules)
        for row in self._run(self.frame.program, self.frame.vaddr):
            yield row
        yield self._row()

    def _row(self):
        if self.cfa is None:
            raise _Truncated()
        return CfaRow(self.vaddr, self.cfa, dict(self.rules))

    def _run(self, program, vaddr):
        """Execute a program; yield a row before the vaddr changes."""
        cursor = Cursor(program, vaddr)
        while cursor.at < len(program):
            opcode = program[cursor.at]
            cursor.at += 1
            high, low = opcode & 0xc0, opcode & 0x3f
            if high == 0x40:
                name, operands = "advance", [low]
            elif high == 0x80:
                name, operands = "offset", [low, self._operand(cursor, "f")]
            elif high == 0xc0:
                name, operands = "restore", [low]
            else:
                if low not in _CFA:
                    raise _Truncated()
                name, forms = _CFA[low]
                operands = [self._operand(cursor, form) for form in forms]
            if name in ("advance", "set_location"):
                to = (operands[0] if name == "set_location" else
                      self.vaddr + operands[0] * self.cie.code_unit)
                if to != self.vaddr:
                    yield self._row()
                if not self.vaddr <= to < VADDR_END:
                    raise _Truncated()
                self.vaddr = to
            else:
                getattr(self, name)(*operands)

    def _operand(self, cursor, form):
        """Read one operand, by its letter in CFA_OPCODES."""
        if form in "ru":
            return cursor.uleb()
        if form in "fs":
            return cursor.uleb(signed=form == "s") * self.cie.data_unit
        if form == "a":
            return cursor.pointer(self.cie.encoding)
        if form == "b":
            size = cursor.uleb()
            block = cursor.data[cursor.at:cursor.at + size]
            if len(block) < size:
                raise _Truncated()
            cursor.at += size
            return block
        return cursor.number(int(form))

    def _set(self, register, *rule):
        if register < N_REGISTERS:      # others (vector ones) are not needed
            self.rules[register] = rule

    def nop(self):
        pass

    def args_size(self, size):
        pass

    def remember_state(self):
        if len(self.states) >= MAX_STATES:
            raise _Truncated()
        self.states.append((self.cfa, dict(self.rules)))

    def restore_state(self):
        if not self.states:
            raise _Truncated()
        self.cfa, self.rules = self.states.pop()

    def define(self, register, offset):
        self.cfa = register, offset

    def define_register(self, register):
        if self.cfa is None or self.cfa[0] is None:
            raise _Truncated()
        self.cfa = register, self.cfa[1]

    def define_offset(self, offset):
        if self.cfa is None or self.cfa[0] is None:
            raise _Truncated()
        self.cfa = self.cfa[0], offset

    def define_expression(self, block):
        self.cfa = None, block

    def offset(self, register, offset):
        self._set(register, "offset", offset)

    def offset_negative(self, register, offset):
        self._set(register, "offset", -offset)

    def val_offset(self, register, offset):
        self._set(register, "val_offset", offset)

    def register(self, register, other):
        self._set(register, "register", other)

    def expression(self, register, block):
        self._set(register, "expression", block)

    def val_expression(self, register, block):
        self._set(register, "val_expression", block)

    def undefined(self, register):
        self._set(register, "undefined", 0)

    def same_value(self, register):
        self.rules.pop(register, None)

    def restore(self, register):
        self.rules.pop(register, None)
        if register in self.initial:
            self.rules[register] = self.initial[register]


def cfa_rows(frame):
    """Yield the CfaRows of a CallFrame, in order.

    Raises SymbolError where its program cannot be understood.
    """
    try:
        for row in _CfaMachine(frame).rows():
            yield row
    except _Truncated:
        raise SymbolError("unwind from", "0x%x" % frame.fde.vaddr,
                          "its call frame information is damaged")


def row_at(frame, vaddr):
    """The CfaRow of a CallFrame that holds at a vaddr, the file's."""
    found = None
    for row in cfa_rows(frame):
        if row.vaddr > vaddr:
            break
        found = row
    return found


def _signed(value):
    return value - (1 << 64) if value >> 63 else value


_BINARY = {
    "and": lambda a, b: a & b, "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b, "plus": lambda a, b: a + b,
    "minus": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "mod": lambda a, b: a % b, "div": lambda a, b: _divide(a, b),
    "shl": lambda a, b: a << b if b < 64 else 0,
    "shr": lambda a, b: a >> b if b < 64 else 0,
    "shra": lambda a, b: _signed(a) >> min(b, 63),
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "ge": lambda a, b: _signed(a) >= _signed(b),
    "gt": lambda a, b: _signed(a) > _signed(b),
    "le": lambda a, b: _signed(a) <= _signed(b),
    "lt": lambda a, b: _signed(a) < _signed(b)}


def _divide(a, b):
    """Signed division that truncates, as C's."""
    a, b = _signed(a), _signed(b)
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


class _StackMachine:
    """Evaluates the DWARF expressions of CFI.

    read        (vaddr, size) -> int
    registers   values by number, None where unknown
    """

    def __init__(self, registers, read):
        self.registers, self.read = registers, read
        self.stack = []

    def evaluate(self, block, *stack):
        """The value on top at the end. Raises _Ended."""
        self.stack, cursor = list(stack), Cursor(block, 0)
        try:
            for _ in range(MAX_EXPRESSION):
                if cursor.at == len(block):
                    return self.stack[-1]
                self._step(cursor, cursor.number(1))
                if len(self.stack) > MAX_EXPRESSION_STACK:
                    break
        except (_Truncated, IndexError, ZeroDivisionError):
            pass                        # IndexError: the stack was empty
        raise _Ended(DAMAGED)

    def _step(self, cursor, opcode):
        push = self.stack.append
        if 0x30 <= opcode < 0x50:
            return push(opcode - 0x30)
        if 0x50 <= opcode < 0x70:
            return push(self._register(opcode - 0x50))
        if 0x70 <= opcode < 0x90:
            return push(self.based(opcode - 0x70, cursor.uleb(signed=True)))
        if opcode not in _EXPRESSION:
            raise _Truncated()
        name, forms = _EXPRESSION[opcode]
        operands = [cursor.uleb(form == "s") if form in "us" else
                    cursor.number(int(form[0]), len(form) == 2)
                    for form in forms]
        if name in _BINARY:
            b = operands[0] if operands else self.stack.pop()
            push(int(_BINARY[name](self.stack.pop(), b)) & _U64_MAX)
        elif name in ("skip", "bra"):
            if name == "skip" or self.stack.pop():
                cursor.at += operands[0]
            if not 0 <= cursor.at <= len(cursor.data):
                raise _Truncated()
        else:
            getattr(self, "_" + name)(*operands)

    def based(self, number, offset):
        """A register and an offset. Raises _Ended."""
        return self._register(number) + offset & _U64_MAX

    def _register(self, number):
        value = (self.registers[number] if number < N_REGISTERS else None)
        if value is None:
            raise _Ended(UNKNOWN_REGISTER)
        return value

    def _const(self, value):
        self.stack.append(value & _U64_MAX)

    def _value(self, number, offset=0):
        self.stack.append(self.based(number, offset))

    def _deref(self, size=8):
        if size not in (1, 2, 4, 8):
            raise _Truncated()
        self.stack.append(self.read(self.stack.pop(), size))

    def _nop(self):
        pass

    def _dup(self):
        self.stack.append(self.stack[-1])

    def _drop(self):
        self.stack.pop()

    def _over(self):
        self.stack.append(self.stack[-2])

    def _pick(self, n):
        self.stack.append(self.stack[-1 - n])

    def _swap(self):
        self.stack[-2:] = self.stack[-1], self.stack[-2]

    def _rot(self):
        self.stack[-3:] = (self.stack[-1], self.stack[-3], self.stack[-2])

    def _abs(self):
        self.stack.append(abs(_signed(self.stack.pop())) & _U64_MAX)

    def _neg(self):
        self.stack.append(-self.stack.pop() & _U64_MAX)

    def _not(self):
        self.stack.append(~self.stack.pop() & _U64_MAX)


class CodeMap:
    """Which code of one process lies where, read again where it grows.

    modules   a list of Module; kept up to date in .modules
    """

    def __init__(self, pid, modules):
        self.pid, self.birth = pid, start_time(pid)
        self.generation = 0             # changes with what is mapped
        self._looked = None             # when the maps were read
        self._starts, self._mappings = [], []
        self._set_modules(modules)

    def _set_modules(self, modules):
        self.modules = list(modules)
        rows = sorted((vaddr, vaddr + size, index)
                      for index, module in enumerate(self.modules)
                      for vaddr, size, _ in module.text)
        self._lows = [low for low, _, _ in rows]
        self._rows = rows
        self.generation += 1

    def at(self, vaddr):
        """The Module, or executable Mapping of none, that holds a vaddr.

        None if there is no code.
        """
        found = self._known(vaddr)
        if found is None and self._may_look():
            self.refresh()
            found = self._known(vaddr)
        return found

    def _known(self, vaddr):
        index = bisect.bisect_right(self._lows, vaddr) - 1
        if index >= 0 and vaddr < self._rows[index][1]:
            return self.modules[self._rows[index][2]]
        index = bisect.bisect_right(self._starts, vaddr) - 1
        if index >= 0 and vaddr < self._mappings[index].end:
            return self._mappings[index]
        return None

    def _may_look(self):
        now = time.monotonic()
        if self._looked is not None and now < self._looked + _LOOK_AGAIN_S:
            return False
        self._looked = now
        return True

    def refresh(self):
        """Read the maps again, and the modules if there are other ones."""
        if self.birth == 0 or start_time(self.pid) != self.birth:
            return                      # it is gone: what is known remains
        code = [m for m in read_maps(memory_tid(self.pid)) if "x" in m.perms]
        if any(m.path.startswith("/") and m not in self._mappings
               and not self._is_of_module(m) for m in code):
            try:
                self._merge(modules(self.pid))
            except SymbolError:
                return
        mappings = [m for m in code if not self._is_of_module(m)]
        if mappings != self._mappings:
            self._mappings = mappings
            self._starts = [m.start for m in mappings]
            self.generation += 1

    def _is_of_module(self, m):
        """Is this Mapping text of a module, by address and name?"""
        index = bisect.bisect_left(self._lows, m.end) - 1
        if index < 0 or self._rows[index][1] <= m.start:
            return False
        return self.modules[self._rows[index][2]].is_mapped_from(m.path)

    def _merge(self, found):
        """Take over what is new; what was known keeps what it has read."""
        known = {(m.path, m.low, m.high, m.build_id): m for m in self.modules}
        merged = []
        for module in found:
            old = known.get((module.path, module.low, module.high,
                             module.build_id))
            if old:
                module.close()
            merged.append(old or module)
        if merged != self.modules:
            self._set_modules(merged)

    def code_at(self, vaddr, size):
        """size bytes of code before a vaddr, or fewer: from the file, or,
        where a JIT has written them, from memory."""
        owner = self.at(vaddr - 1)
        if isinstance(owner, Module):
            return owner.read_file(vaddr - size, size)
        if owner is None or start_time(self.pid) != self.birth:
            return b""
        low = max(owner.start, vaddr - size)
        return _peek(self.pid, low, vaddr - low)


class Walk(NamedTuple):
    """What is on a stack.

    addresses     the pc, then a return address for each caller
    interrupted   indices of those where no call was: the first, and frames
                  that a signal has interrupted
    why           how it ended: END, TRUNCATED ...
    """
    addresses: tuple
    interrupted: tuple
    why: str


class _Position:
    """Where a walk is: a frame's registers, and the copied stack."""
    __slots__ = ("registers", "low", "stack", "pc", "is_return")

    def __init__(self, pc, registers, low, stack):
        self.registers = [None] * N_REGISTERS
        for number, value in registers.items():
            if 0 <= number < N_REGISTERS:
                self.registers[number] = value & _U64_MAX
        if self.registers[RSP] is None:
            self.registers[RSP] = low
        self.low, self.stack = low, stack
        self.pc, self.is_return = pc, False

    def read(self, vaddr, size=8):
        """A number of the copy. Raises _Ended outside of it."""
        at = vaddr - self.low
        if at < 0 or at + size > len(self.stack):
            raise _Ended(TRUNCATED)
        return int.from_bytes(self.stack[at:at + size], "little")

    def forget(self, registers):
        """These have no known value in the caller."""
        for register in registers:
            self.registers[register] = None


class _SavedRegisters:
    """A step by a row as almost all are: the CFA is a register and an
    offset, and what is saved lies at fixed offsets from it."""

    def __init__(self, row, column):
        self.register, self.offset = row.cfa
        self.return_offset = row.rules[column][1]
        self.saved = [(register, rule[1]) for register, rule
                      in row.rules.items() if register != column]

    @staticmethod
    def is_fit(row, column):
        return (row.cfa[0] is not None and row.cfa[0] < N_REGISTERS
                and column in row.rules and RSP not in row.rules
                and all(kind == "offset" for kind, _ in row.rules.values()))

    def take(self, position):
        """Turn a position into its caller's; the caller's address."""
        registers = position.registers
        base = registers[self.register]
        if base is None:
            raise _Ended(UNKNOWN_REGISTER)
        cfa, low, stack = base + self.offset, position.low, position.stack
        sp, size = registers[RSP], len(stack) - 8
        if cfa <= sp or cfa + self.return_offset < sp:
            raise _Ended(DAMAGED)
        for register, offset in self.saved:
            at = cfa + offset - low
            if at > size:
                raise _Ended(TRUNCATED)
            if cfa + offset >= sp and at >= 0:
                registers[register] = _U64.unpack_from(stack, at)[0]
            elif position.is_return:
                raise _Ended(DAMAGED)
            # else an epilogue has popped it already: the register has it
        at = cfa + self.return_offset - low
        if not 0 <= at <= size:
            raise _Ended(TRUNCATED)
        registers[RSP] = cfa
        return _U64.unpack_from(stack, at)[0]


def _simplified(kind, value):
    """A rule with an expression of just DW_OP_breg made "based".

    Such are all rules of a signal frame: 17 of them.
    """
    if kind == "expression" and value and 0x70 <= value[0] < 0x90:
        cursor = Cursor(value[1:], 0)
        try:
            offset = cursor.uleb(signed=True)
        except _Truncated:
            return kind, value
        if cursor.at == len(cursor.data):
            return "based", (value[0] - 0x70, offset)
    return kind, value


class _AnyRow:
    """A step by a row of any kind."""

    def __init__(self, row, column, is_signal):
        self.row, self.column, self.is_signal = row, column, is_signal
        self.rules = [(register,) + _simplified(*rule)
                      for register, rule in row.rules.items()]

    def take(self, position):
        if self.row.rules.get(self.column, (None,))[0] == "undefined":
            raise _Ended(END)           # as in _start and clone
        position.registers[RA] = position.pc
        before = list(position.registers)
        machine = _StackMachine(before, position.read)
        register, value = self.row.cfa
        if register is None:
            cfa = machine.evaluate(value)
        else:
            cfa = machine.based(register, value)
        if cfa <= before[RSP] and RSP not in self.row.rules:
            raise _Ended(DAMAGED)
        if self.column not in self.row.rules:
            raise _Ended(NO_UNWIND_INFO)
        after = position.registers
        after[RSP] = cfa
        for register, kind, value in self.rules:
            after[register] = self._value(position, machine, cfa,
                                          before[register], kind, value)
        if after[RSP] is None or after[self.column] is None:
            raise _Ended(UNKNOWN_REGISTER)
        return after[self.column]

    @staticmethod
    def _value(position, machine, cfa, before, kind, value):
        """The caller's value of a register, None if there is none."""
        if kind == "based":
            return position.read(machine.based(*value))
        if kind == "undefined":
            return None
        if kind == "register":
            return (machine.registers[value] if value < N_REGISTERS
                    else None)
        if kind == "val_offset":
            return cfa + value & _U64_MAX
        if kind == "val_expression":
            return machine.evaluate(value, cfa)
        if kind == "expression":
            return position.read(machine.evaluate(value, cfa))
        slot = cfa + value & _U64_MAX
        if slot < machine.registers[RSP] and not position.is_return:
            return before               # popped already
        return position.read(slot)


class _TopOfStack:
    """A step where the return address is on top: at an entry, at a ret."""

    def take(self, position):
        sp = position.registers[RSP]
        position.registers[RSP] = sp + 8
        return position.read(sp)


class _FramePointer:
    """A step by rbp, in code that keeps a frame pointer but has no CFI.

    The address found must be behind a call, and rbp must rise.
    """

    def __init__(self, code):
        self.code = code

    def take(self, position):
        registers = position.registers
        frame = registers[RBP]
        if frame is None:
            raise _Ended(UNKNOWN_REGISTER)
        if frame == 0:                  # the outermost frame's, psABI 3.4.1
            raise _Ended(END)
        if frame % 8 or frame < registers[RSP]:
            raise _Ended(NO_UNWIND_INFO)
        caller, vaddr = position.read(frame), position.read(frame + 8)
        if caller and caller <= frame:
            raise _Ended(NO_UNWIND_INFO)
        if vaddr and not ubp_x86.ends_in_call(self.code.code_at(vaddr, 8)):
            raise _Ended(NO_UNWIND_INFO)
        position.forget(range(N_REGISTERS))     # what it saved, who knows
        registers[RBP], registers[RSP] = caller, frame + 16
        return vaddr


class _SignalFrame:
    """A step out of a signal handler whose restorer has no CFI (musl's)."""
    is_signal = True

    def take(self, position):
        low = position.registers[RSP]
        position.read(low + ubp_x86.SIGNAL_CONTEXT, 8)
        size = ubp_x86.SIGNAL_CONTEXT + ubp_x86.SIGNAL_CONTEXT_SIZE
        position.read(low + size - 8)
        at = low - position.low
        found = ubp_x86.interrupted_registers(position.stack[at:at + size])
        for register, value in found.items():
            position.registers[register] = value
        return found[RA]


class _Stop:
    """No step: the walk ends here."""

    def __init__(self, why):
        self.why = why

    def take(self, position):
        raise _Ended(self.why)


class Unwinder:
    """Walks the stacks of one process.

    modules   a list of Module, or a CodeMap to be shared
    """

    def __init__(self, pid, modules):
        self.code = (modules if isinstance(modules, CodeMap)
                     else CodeMap(pid, modules))
        self._generation, self._steps = self.code.generation, {}

    def walk(self, pc, registers, stack_vaddr, stack, max_depth=64):
        """The callers of an instruction. -> Walk; raises nothing.

        pc            vaddr of an instruction: what is about to run
        registers     {DWARF register number: value} there, as far as known:
                      rbx 3, rbp 6, rsp 7, r12-r15 12-15 are what is needed
        stack_vaddr   rsp, where the copy begins
        stack         bytes copied from there upwards
        """
        position = _Position(pc, registers, stack_vaddr, stack)
        addresses, interrupted = [pc], [0]
        try:
            while len(addresses) < max_depth:
                pc = self._up(position)
                if pc == 0:
                    raise _Ended(END)
                if not position.is_return:
                    interrupted.append(len(addresses))
                addresses.append(pc)
            why = DEPTH
        except _Ended as ended:
            why = ended.args[0]
        return Walk(tuple(addresses), tuple(interrupted), why)

    def _up(self, position):
        """Go to the caller; its address. Raises _Ended."""
        if self._generation != self.code.generation:
            self._generation, self._steps = self.code.generation, {}
        step = self._step(position.pc, position.is_return)
        pc = step.take(position)
        is_return = not getattr(step, "is_signal", False)
        if is_return:
            position.forget(_CALLER_SAVED)
        if pc and (pc, is_return) not in self._steps and self.code.at(
                pc - is_return) is None:
            raise _Ended(UNKNOWN_CODE)
        position.pc, position.is_return = pc, is_return
        return pc

    def _step(self, pc, is_return):
        """The step from an address, kept for the next time."""
        step = self._steps.get((pc, is_return))
        if step is None:
            module = self.code.at(pc - is_return)
            if module is None:          # for now: not to be kept
                raise _Ended(UNKNOWN_CODE)
            if len(self._steps) >= MAX_STEPS:
                self._steps.clear()
            step = self._find(module, pc, is_return)
            self._steps[pc, is_return] = step
        return step

    def _find(self, module, pc, is_return):
        """Make the step from an address ready.

        A return address may be the first byte behind its function, where
        the call was to one that does not return: so its row is that of the
        byte before. A signal does not return to an address behind a call.
        """
        if not isinstance(module, Module):
            # By convention; which a prologue has not yet followed.
            return (_FramePointer(self.code) if is_return
                    else _Stop(NO_UNWIND_INFO))
        vaddr = pc - is_return - module.bias
        frame = module.unwind.call_frame(vaddr)
        if (frame is None or is_return and vaddr + 1 == frame.fde.vaddr
                + frame.fde.size) and module.read_file(
                    pc, 9).startswith(ubp_x86.RESTORERS):
            return _SignalFrame()
        if frame is None:
            return self._without_cfi(module, pc, is_return)
        return _step_by(frame, vaddr)

    def _without_cfi(self, module, pc, is_return):
        """A step that the code of the function itself proves."""
        bounds = module.bounds(pc - is_return)
        if bounds is None:
            return _Stop(NO_UNWIND_INFO)
        start = bounds[0]
        code = module.read_file(start, min(pc - start + 512, 1 << 20))
        place = ubp_x86.return_place(code, pc - start, is_return)
        if place == "top":
            return _TopOfStack()
        if place == "frame":
            return _FramePointer(self.code)
        return _Stop(NO_UNWIND_INFO)


def _step_by(frame, vaddr):
    """The step that CFI describes for a vaddr, the file's."""
    column, is_signal = frame.cie.return_column, frame.cie.is_signal
    try:
        row = row_at(frame, vaddr)
    except SymbolError:
        return _Stop(DAMAGED)
    if row is None or column >= N_REGISTERS:
        return _Stop(DAMAGED)
    if not is_signal and _SavedRegisters.is_fit(row, column):
        return _SavedRegisters(row, column)
    return _AnyRow(row, column, is_signal)


def has_frame_pointers(module):
    """Was most of a module's code compiled to keep rbp as frame pointer?

    From the CFI of a sample of functions that move rsp: in code with frame
    pointers the CFA follows from rbp, saved next to the return address.
    None if no function tells.
    """
    starts = module.unwind.starts
    n_frames = n_pointers = 0
    for start in starts[::len(starts) // 200 + 1]:
        frame = module.unwind.call_frame(start)
        if frame is None or frame.cie.is_signal:
            continue
        try:
            rows = list(cfa_rows(frame))
        except SymbolError:
            continue
        if any(row.cfa != rows[0].cfa and row.cfa[0] is not None
               for row in rows):
            n_frames += 1
            n_pointers += any(row.cfa == (RBP, 16) and row.rules.get(RBP)
                              == ("offset", -16) for row in rows)
    return n_pointers * 2 > n_frames if n_frames else None


class Frame(NamedTuple):
    """The name of a code address."""
    module: str             # file name; "[jit]"; "" if in no file
    function: str           # "" if unknown
    offset: int             # in the function, module or address space

    @property
    def text(self):
        """The function, else `module+0xOFFSET`, else `0xADDRESS`."""
        return self.function or (
            "%s+0x%x" % (self.module, self.offset) if self.module
            else "0x%x" % self.offset)


class PerfMap:
    """The functions that a JIT names in /tmp/perf-PID.map.

    Lines of `START SIZE NAME`, hexadecimal, appended as code is written; of
    overlapping ones the last counts. Anyone may write to /tmp, so the file
    must be a regular one of the target's user, or of root.
    Source: Linux, tools/perf/Documentation/jit-interface.txt.
    """

    def __init__(self, pid):
        self.pid, self.identity, self.size = pid, None, 0
        self.entries = {}               # start -> (end, number, name)
        self._starts, self._n_lines = None, 0

    def refresh(self):
        """Read what was added. -> whether anything changed."""
        try:
            image, info = self._open()
        except (OSError, ValueError):
            return False
        identity = info.st_dev, info.st_ino
        size = min(info.st_size, MAX_PERF_MAP)
        if identity != self.identity or size < self.size:
            self.entries, self.size, self._n_lines = {}, 0, 0
            self.identity, self._starts = identity, None
        data = image.read(self.size, size - self.size)
        image.close()
        data = data[:data.rfind(b"\n") + 1]
        self.size += len(data)
        for line in data.splitlines():
            self._add(line)
        return bool(data)

    def _open(self):
        """(FileImage, its stat). Raises OSError."""
        status = read_status(self.pid)
        inner = status.get("NSpid", "").split()[-1:] or [str(self.pid)]
        image = FileImage(open_beneath("/proc/%d/root" % self.pid,
                                       "tmp/perf-%d.map" % int(inner[0])))
        info = os.fstat(image.fd)
        owners = {0} | set(map(int, status.get("Uid", "").split()))
        if info.st_uid not in owners:
            image.close()
            raise PermissionError(errno.EPERM, "another user's perf map")
        return image, info

    def _add(self, line):
        words = line.split(None, 2)
        try:
            start, size = int(words[0], 16), int(words[1], 16)
            name = words[2].strip()[:MAX_NAME]
        except (IndexError, ValueError):
            return
        if 0 < size and 0 <= start and start + size <= VADDR_END:
            if start not in self.entries:
                if len(self.entries) >= MAX_JIT:
                    return
                self._starts = None
            self._n_lines += 1
            self.entries[start] = start + size, self._n_lines, name

    def at(self, vaddr):
        """(start, name) of the newest function that holds a vaddr."""
        if self._starts is None:
            self._starts = sorted(self.entries)
        index = bisect.bisect_right(self._starts, vaddr)
        near = [(self.entries[start], start) for start
                in self._starts[max(0, index - 64):index]]
        held = [(number, start, name) for (end, number, name), start in near
                if vaddr < end]
        if not held:
            return None
        _, start, name = max(held)
        return start, _decode(name)


class Symbols:
    """Names for the code addresses of one process.

    modules   a list of Module, or the CodeMap of an Unwinder
    """

    def __init__(self, pid, modules):
        self.code = (modules if isinstance(modules, CodeMap)
                     else CodeMap(pid, modules))
        self.jit = PerfMap(pid)
        self._generation, self._frames = self.code.generation, {}
        self._looked = None

    def name(self, vaddr, is_return=True):
        """The Frame of an address; of a return address, that of its call."""
        if self._generation != self.code.generation:
            self._generation, self._frames = self.code.generation, {}
        frame = self._frames.get((vaddr, is_return))
        if frame is None:
            owner = self.code.at(vaddr - is_return)
            if not isinstance(owner, Module):
                return self._generated(vaddr, is_return, owner)
            if len(self._frames) >= MAX_STEPS:
                self._frames.clear()
            frame = self._in_module(owner, vaddr, is_return)
            self._frames[vaddr, is_return] = frame
        return frame

    def frames(self, walk):
        """The Frames of a Walk, the innermost first."""
        return tuple(self.name(vaddr, index not in walk.interrupted)
                     for index, vaddr in enumerate(walk.addresses))

    @staticmethod
    def _in_module(module, vaddr, is_return):
        if module.read_file(vaddr, 9).startswith(ubp_x86.RESTORERS):
            return Frame(module.name, "[signal]", 0)
        function = module.function_at(vaddr - is_return)
        if function is None:
            return Frame(module.name, "", vaddr - module.bias)
        return Frame(module.name, function.name, vaddr - function.vaddr)

    def _generated(self, vaddr, is_return, mapping):
        """The Frame of code that no file holds."""
        now = time.monotonic()
        found = self.jit.at(vaddr - is_return)
        if self._looked is None or now > self._looked + _LOOK_AGAIN_S:
            self._looked = now          # new code may have replaced it
            if self.jit.refresh():
                found = self.jit.at(vaddr - is_return)
        if found:
            return Frame("[jit]", found[1], vaddr - found[0])
        if mapping is not None and mapping.path:
            return Frame(os.path.basename(_printable(mapping.path)), "",
                         vaddr - mapping.start)
        return Frame("", "", vaddr)


# ---- 5  Tracee ------------------------------------------------------------
#
# Stop every thread of an address space, look at it, change it, let go, and
# leave no trace of having been there. The one idea: every state in which a
# tracer may be killed is one that the kernel, alone, resumes correctly.
# Invariant: whoever enters a pause leaves it, within a deadline, with every
# thread released or, if it would not stop, watched until it does.
#
#     seize        attach to all threads; they keep running
#     interrupt    stop them; new ones are looked for until there are none
#     action       what the caller wants, all threads stopped
#     release      busy threads first

RUNNING, INTERRUPTED, STOPPED, FINISHING, ABANDONED = "RISFA"
_ATTEMPT_S = 0.03           # to wait for stops in the first attempt; on a
#                             machine that is overloaded, later ones take more
_ATTEMPT_PER_THREAD_S = 0.001
_REFUSAL_S = 0.5            # after which a refusal to attach is believed
_TRANSFER_WAIT_S = 0.1      # to wait for a transfer to end by itself
_VFORK_WAIT_S = 0.3         # to wait, when it is let go, for a vfork to end
_INJECTION_S = 2.0          # to wait for an injected syscall to return
_STACK_LIMIT = 16 << 20     # bytes of one stack searched for signal frames
_SMALL_STACK_LIMIT = 256 << 10      # of one whose bounds are unknown
_MOST_PARKED = 64 << 20     # bytes searched for those of swapped contexts
_MOST_RESERVED = 4 << 30    # of the vmas that these are looked for in
_CLD_KILLED = 2             # <asm-generic/siginfo.h>; os has it since 3.9
_ALL_SIGNALS = b"\xff" * 8
STEP_ASIDE = signal.SIGWINCH    # to a guardian; who does not know ignores it
_MOST_KNOWN = 256           # mappings whose Gadgets are known
_FRAME_MARK = b"ubp: frame end\r\n"     # 16 bytes, above each signal frame
# Injected syscalls that come to nothing if they are not run, of a dead ubp.
_INJECTED = (SYS_mmap, SYS_munmap, SYS_madvise, SYS_memfd_create, SYS_close)


class Again(Exception):
    """An action asks for its pause to be repeated a little later.

    is_starved   a thread was not given a processor to stop on: the next
                 attempt should last longer
    refusal      the AttachError to raise if it does not pass
    """
    is_starved, refusal = False, None


class Thread:
    """What the tracer knows of one thread it has seized."""
    __slots__ = ("tid", "tgid", "state", "regs", "group_stop", "in_rest",
                 "polls", "is_wanted", "is_complete", "is_last",
                 "below", "in_vfork")

    def __init__(self, tid, tgid):
        self.tid, self.tgid = tid, tgid
        self.state = RUNNING
        self.regs = b""
        self.group_stop = False     # was stopped by a signal before us
        self.in_rest = False        # FINISHING: inside the re-issued syscall
        self.is_wanted = False      # asked to stop, and not let go since
        self.is_complete = False    # FINISHING: nothing is left to be done
        self.is_last = False        # FINISHING: cut it short, we are leaving
        self.below = None           # FINISHING: (vaddr, bytes) under a frame
        self.in_vfork = False       # INTERRUPTED: stops when its child, which
        #                             is stopped, lets it; regs are of /proc
        self.polls = 0


class Gadgets(NamedTuple):
    """Code of the target that an injection runs; 0 or () where it has none."""
    syscall_ret: int
    pop_rax: int
    restorers: tuple


def _find(code, form, start):
    """The vaddr of form in code that begins at start, or 0."""
    at = code.find(form)
    return start + at if at >= 0 else 0


class Tracer:
    """ptrace of one address space. All methods run in one thread.

    tgid   the process;  pause_us  of the longest pause so far
    """

    options = PTRACE_O_TRACESYSGOOD     # of PTRACE_SEIZE
    may_suspend = False     # seccomp filters, for what they would forbid
    may_ask = False         # another ubp's guardian to step aside
    known_gadgets = {}      # {what is mapped of a file: [(bytes, place)]}

    def __init__(self, tgid):
        self.tgid = self._vm_tid = tgid
        self.birth = start_time(tgid)
        self.threads = {}           # tid -> Thread
        self.siblings = ()          # other processes of the same mm
        self._last_pid, self._seen_pids = b"", set()
        self._saw_ended = False
        self._dead = set()          # tids that are still to be reaped
        self.pause_us = 0.0
        self.pauses = {}            # {purpose: microseconds of the longest}
        self.waiter = StopWaiter()
        self.maps = []
        self._has_fresh_maps = False        # read after all had stopped
        self.others = []            # Tracers of children, with late threads
        self._to_stop = []          # tids on their way back to a group stop
        self.scratch = 0            # end of [stack] pages that ubp touched
        self.held = False           # launched, and kept at its entry point
        self._tasks = {}            # tgid -> HeldFiles of task and stat
        self.is_past = False        # it was seen to become another program
        self._memory = None
        self._asked = 0.0           # when a guardian was asked to step aside
        self._status = ctypes.c_int()
        self._regs = ctypes.create_string_buffer(ubp_x86.REGS_SIZE)
        self._iov = Iovec(ctypes.addressof(self._regs), ubp_x86.REGS_SIZE)
        self._loadavg = None
        self._text = None           # Gadgets, found in _text_maps
        self._text_maps = []
        self.starts_raw_threads = False     # by clone itself, not pthreads
        self.swaps_contexts = False         # maybe within a handler

    # -- looking ------------------------------------------------------------

    def is_same_process(self):
        """Is the pid still the process that was attached?"""
        return self.birth != 0 and start_time(self.tgid) == self.birth

    def read(self, vaddr, size):
        """Memory of the target. Raises OSError."""
        try:
            return read_memory(self._vm_tid, vaddr, size)
        except ProcessLookupError:
            return read_memory(self.vm_tid(), vaddr, size)

    def read_text(self, vaddr, size):
        """Memory of the target, even if it forbade itself to read it: a
        page that is PROT_NONE for a while keeps our bytes. Raises OSError.
        """
        try:
            return self.read(vaddr, size)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
        fd = os.open("/proc/%d/mem" % self.vm_tid(), os.O_RDONLY)
        try:
            data = os.pread(fd, size, vaddr)
        finally:
            os.close(fd)
        if len(data) != size:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return data

    def vm_tid(self):
        """A tid whose memory can be reached: the leader may be a zombie."""
        self._vm_tid = next((tid for tid, thread in self.threads.items()
                             if thread.state == STOPPED
                             and thread.tgid == self.tgid), 0)
        self._vm_tid = self._vm_tid or memory_tid(self.tgid)
        return self._vm_tid

    def get_regs(self, tid):
        """PTRACE_GETREGSET, NT_PRSTATUS. -> regset"""
        self._iov.iov_len = ubp_x86.REGS_SIZE
        ptrace(PTRACE_GETREGSET, tid, NT_PRSTATUS,
               ctypes.addressof(self._iov))
        if self._iov.iov_len != ubp_x86.REGS_SIZE:
            return ubp_x86.REGS_32BIT   # it runs 32-bit code just now
        return self._regs.raw

    def set_regs(self, tid, regs):
        """PTRACE_SETREGSET, NT_PRSTATUS."""
        self._regs.raw = regs
        self._iov.iov_len = ubp_x86.REGS_SIZE
        ptrace(PTRACE_SETREGSET, tid, NT_PRSTATUS,
               ctypes.addressof(self._iov))

    def find_gadgets(self):
        """Where the target has the code that injections need. -> Gadgets

        No text is written: all is found in what is mapped, but not in
        memory that a JIT compiler may write to. Looked for anew when other
        text is mapped: a library may bring a restorer of its own.
        """
        text = [mapping for mapping in self.maps if "x" in mapping.perms
                and (mapping.inode or mapping.path == "[vdso]")
                and not mapping.path.startswith("/memfd:ubp")]
        if self._text is None or (text != self._text_maps and self.maps):
            syscall_ret = pop_rax = 0
            restorers, self._text_maps = [], text
            for mapping in text:
                found = self._gadgets_in(mapping)
                syscall_ret = syscall_ret or found.syscall_ret
                pop_rax = pop_rax or found.pop_rax
                restorers += found.restorers
            self._text = Gadgets(syscall_ret, pop_rax, tuple(restorers))
        return self._text

    def _gadgets_in(self, mapping):
        """The Gadgets of a Mapping. Where others have been found in the same
        part of the file, in another process, it is only read whether they
        are there: to look at all of the C library takes 10 ms."""
        start, key = mapping.start, mapping[2:] + (
            mapping.end - mapping.start,)
        found = self.known_gadgets.get(key)
        if found is None or not mapping.inode or not self._are_at(
                start, found):
            code = self._read_text(mapping)
            found = [(form, each.start()) for form in ubp_x86.RESTORERS
                     for each in re.finditer(re.escape(form), code)]
            found += [(form, code.find(form)) for form in (
                ubp_x86.SYSCALL_RET, ubp_x86.POP_RAX_RET)]
            if len(self.known_gadgets) >= _MOST_KNOWN:
                self.known_gadgets.clear()
            # Not what one process alone has, nor what could not be read as
            # it ended: another would have no signal frame of its found.
            if code and not is_own_page(self.vm_tid(), start, len(code)):
                self.known_gadgets[key] = found
        places = [start + at if at >= 0 else 0 for _, at in found]
        return Gadgets(places[-2], places[-1], tuple(places[:-2]))

    def _are_at(self, start, found):
        """Are these bytes at these places?"""
        try:
            return all(self.read(start + at, len(form)) == form
                       for form, at in found if at >= 0)
        except OSError:
            return False

    def forget_gadgets(self):
        """Look for them anew: what is mapped, or is there, has changed."""
        self._text = None
        self.known_gadgets.clear()

    def _read_text(self, mapping):
        try:
            return self.read(mapping.start, mapping.end - mapping.start)
        except OSError:
            return b""              # unmapped meanwhile, or it has ended

    # -- stopping -----------------------------------------------------------

    def pause(self, action, timeout, purpose):
        """Call action() with every thread stopped. -> what it returns

        Repeats the attempt when threads do not stop in time, or the action
        raises Again. Raises UbpTimeout, with all released; TraceeGone.
        """
        limit = time.monotonic() + timeout
        wait, patience = 0.001, 1
        self._last_pid, self._seen_pids = b"", set()    # pids are reused
        while True:
            try:
                return self._one_pause(action, limit, purpose, patience)
            except Again as again:
                starved = again.is_starved
                if again.refusal and (time.monotonic() - limit + timeout
                                      > _REFUSAL_S):
                    raise again.refusal
                if time.monotonic() + wait > limit:
                    raise UbpTimeout(
                        "stop", self.name(), str(again) or "busy",
                        "try again; or look for a thread in state D or in "
                        "vfork: ps -L -o tid,stat,wchan -p %d" % self.tgid)
            except (FileNotFoundError, ProcessLookupError):
                if not self._is_killed():
                    raise
                raise TraceeGone("trace", self.name(),
                                 "it was killed in that instant")
            self.finish_late()
            self.run(wait)
            wait = min(wait * 2, 0.05)
            patience = min(patience * 2, 32) if starved else 1

    def run(self, seconds):
        """Let the target run for a while."""
        time.sleep(seconds)

    def _is_killed(self):
        """Has it no memory any more? SIGKILL ends what is stopped, too, but
        takes a moment."""
        limit = time.monotonic() + 1
        while self.is_same_process() and read_maps(memory_tid(self.tgid)):
            if time.monotonic() > limit:
                return False
            time.sleep(0.001)
        return True

    def name(self):
        """pid 4242 (redis-server)"""
        return "pid %d (%s)" % (self.tgid, comm(self.tgid))

    def _one_pause(self, action, limit, purpose, patience):
        try:
            self._prepare(limit)
            before = _raise_priority()
            time.sleep(0)           # a full share of the GIL lies ahead
            begin = time.monotonic()
            attempt = begin + patience * (
                _ATTEMPT_S + _ATTEMPT_PER_THREAD_S * len(self.threads))
            try:
                self._interrupt_all(attempt)
                self._undo_injections()
                return action()
            finally:
                self._release()
                took = (time.monotonic() - begin) * 1e6
                _restore_priority(before)
                self.waiter.give_back()
                self._await_group_stop()
                self.pause_us = max(self.pause_us, took)
                self.pauses[purpose] = max(took, self.pauses.get(purpose, 0))
                log.debug("stopped pid %d for %d us to %s", self.tgid, took,
                          purpose)
        finally:
            self._release()
            if (self.tgid not in self.threads and not self.is_past
                    and is_traced_by_us(self.tgid)
                    and not is_zombie(self.tgid)):
                # An exec of another thread took over the leader's tid.
                self.threads[self.tgid] = Thread(self.tgid, self.tgid)
                self._interrupt(self.threads[self.tgid])

    def _prepare(self, limit):
        """All that can be done while the target still runs."""
        if not self.is_same_process():
            raise TraceeGone("trace", "pid %d" % self.tgid,
                             "the process has ended")
        self.finish_late()
        if any(thread.state == ABANDONED for thread in self.threads.values()):
            raise Again("an injected syscall has not returned yet")
        self.maps = read_maps(self.vm_tid())
        self._has_fresh_maps = False
        if not self.maps:           # a zombie: it shares no memory either
            raise TraceeGone("trace", "pid %d" % self.tgid,
                             "the process has ended")
        if self._loadavg is None:
            self._loadavg = HeldFile("/proc/loadavg")
        self._find_siblings()
        # Those of siblings anew: there may be thousands, and pids return.
        self._close_tasks([tgid for tgid in self._tasks if tgid != self.tgid])
        self._open_tasks()
        self.find_gadgets()
        tids = [(tgid, tid) for tgid in (self.tgid,) + self.siblings
                for tid in thread_ids(tgid)]
        self._await_transfers(tids, limit)
        # Last: a thread that is seized stops at any signal, until we look.
        self._seize_new()

    def _open_tasks(self):
        """Open what lists the threads, of processes where it is not yet."""
        for tgid in (self.tgid,) + self.siblings:
            try:
                if tgid not in self._tasks:
                    self._open_tasks_of(tgid)
            except (FileNotFoundError, ProcessLookupError):
                if tgid == self.tgid:
                    raise TraceeGone("trace", "pid %d" % tgid,
                                     "the process has ended")
                # A vforked child, that has ended.
                self.siblings = tuple(n for n in self.siblings if n != tgid)

    def _open_tasks_of(self, tgid):
        tasks = HeldFile("/proc/%d/task" % tgid)
        try:
            self._tasks[tgid] = tasks, HeldFile("/proc/%d/stat" % tgid)
        except OSError:
            tasks.close()
            raise

    def _close_tasks(self, tgids):
        for tgid in tgids:
            for file in self._tasks.pop(tgid):
                file.close()

    def _seize_new(self):
        """Seize every thread that is not seized yet.

        Notes in _saw_ended if the pass cannot be the last: a thread that
        has ended may have started another, and one that is just ending
        hides those behind it from the list; then the numbers differ.
        """
        if self.is_past:
            raise TraceeGone("trace", "pid %d" % self.tgid,
                             "it is another program now")
        for tgid in (self.tgid,) + self.siblings:
            try:
                tids = self._tasks[tgid][0].numbers()
                stat = self._tasks[tgid][1].read().rpartition(b") ")[2]
                count = int(stat.split()[17])       # num_threads, proc(5)
            except OSError as error:
                if error.errno in (errno.ESRCH, errno.ENOENT):
                    continue        # a process that has ended
                raise Again("its threads cannot be listed: %s"
                            % error.strerror)
            except IndexError:
                raise Again("its threads cannot be counted")
            self._saw_ended |= count != len(tids)
            for tid in tids:
                if (tid not in self.threads and not self._seize(tid, tgid)
                        and tid != tgid):   # a zombie leader stays listed
                    self._saw_ended = True
        if not self.threads:
            raise TraceeGone("trace", "pid %d" % self.tgid,
                             "the process has ended")

    def _seize(self, tid, tgid):
        try:
            _check(_ptrace_seize(PTRACE_SEIZE, tid, 0, self.options))
        except OSError as error:
            fields = read_stat(tid)
            if error.errno == errno.ESRCH or fields[:1] in (
                    [], ["Z"], ["X"]):
                return False        # ended; a zombie leader has other threads
            if is_traced_by_us(tid):    # exec gave it a tid of the old ones
                self.threads[tid] = Thread(tid, tgid)
                return True
            # In the midst of an exec, or of the death of another tracer,
            # this passes; or this process still finishes a transfer of it.
            again = Again("thread %d cannot be traced now" % tid)
            tracer = tracer_of(tid)
            if self.may_ask and is_guardian(tracer):
                self._ask_aside(tracer)
            elif tracer != os.getpid():
                again.refusal = _refusal_to_attach(tid, "PTRACE_SEIZE", error)
            raise again
        self.threads[tid] = Thread(tid, tgid)
        return True

    def _ask_aside(self, guardian):
        """Ask a guardian to let us in for a moment: see Guard.step_aside."""
        now = time.monotonic()
        if now - self._asked > 0.5:
            self._asked = now
            try:
                os.kill(guardian, STEP_ASIDE)
            except OSError as error:
                log.debug("cannot ask the guardian: %s", error)

    def _await_transfers(self, tids, limit):
        """Wait a little until no thread is in a transfer or a vfork.

        An interrupt would cut a large write or a MSG_WAITALL recv short: one
        that lasts is repaired after the stop. A vforking thread does not
        stop before its child execs: see _is_in_vfork().
        """
        soon = min(limit, time.monotonic() + _TRANSFER_WAIT_S)
        rest = 0.001
        while True:
            self.finish_late()
            if time.monotonic() > soon or not any(
                    _is_blocking(tgid, tid) for tgid, tid in tids
                    if tid not in self.threads):
                return
            time.sleep(rest)
            rest = min(rest * 1.5, 0.05)

    def _interrupt_all(self, deadline):
        """Stop every thread, until a pass lists no new one. Raises Again."""
        fresh, again = list(self.threads.values()), True
        while fresh or again:
            for thread in fresh:
                if thread.state != STOPPED:
                    self._interrupt(thread)
            self._collect(deadline)
            self._saw_ended = False
            self._seize_new()
            fresh = [thread for thread in self.threads.values()
                     if thread.state == RUNNING]
            again = self._saw_ended
            if time.monotonic() > deadline:
                raise Again("its threads come and go")
            if not fresh and not again and self._find_siblings():
                self._open_tasks()
                again = True
        own = self.vm_tid()
        for thread in list(self.threads.values()):
            # A vforked child may have become another program before it
            # stopped: what we know of our memory is wrong of its own.
            if thread.tgid != self.tgid and not _shares_mm(own, thread.tid):
                self._let_go(thread)

    def _undo_injections(self):
        """Put back threads that are still to run what a killed ubp injected.

        A thread that got no processor since, or is stopped, would else map
        or unmap memory, or close a descriptor, after we have cleaned up: by
        then the place, or the number, may be somebody else's.
        """
        for thread in self.threads.values():
            if thread.state != STOPPED or not ubp_x86.may_run_a_syscall(
                    thread.regs, _INJECTED):
                continue
            tid = thread.tid
            memory = _injected_frame(
                tid, ubp_x86.program_counter(thread.regs),
                ubp_x86.stack_pointer(thread.regs))
            if memory:
                thread.regs, mask = ubp_x86.regs_before_injection(
                    thread.regs, memory)
                self.set_regs(tid, thread.regs)
                mask = ctypes.create_string_buffer(mask, 8)
                ptrace(PTRACE_SETSIGMASK, tid, 8, ctypes.addressof(mask))
                log.debug("thread %d was to run a dead ubp's syscall", tid)

    def _interrupt(self, thread):
        try:
            ptrace(PTRACE_INTERRUPT, thread.tid)
        except OSError:
            self.lose(thread.tid)
            return
        if thread.state == RUNNING:
            thread.state, thread.in_vfork = INTERRUPTED, False
        thread.polls, thread.is_wanted = 0, True

    def _find_siblings(self):
        """Look for processes of the same address space among the new ones.

        -> were there any? The last pid of /proc/loadavg tells cheaply
        whether a process was created since the last look.
        """
        found, tid = [], self.vm_tid()
        self.siblings = tuple(pid for pid in self.siblings
                              if _shares_mm(tid, pid))
        last = self._loadavg.read().split()[-1]
        while last != self._last_pid:
            self._last_pid = last
            pids = set(_process_ids())
            found += [pid for pid in pids - self._seen_pids
                      if pid != self.tgid and pid not in self.siblings
                      and _shares_mm(tid, pid)]
            self._seen_pids = pids
            last = self._loadavg.read().split()[-1]
        self.siblings += tuple(found)
        return bool(found)

    def _collect(self, deadline):
        """Wait until each interrupted thread has stopped, or is in vfork and
        will. Raises Again.

        One after the other: to look at all of them at each stop would take
        time that grows with their square.
        """
        waiter = self.waiter
        for thread in [thread for thread in self.threads.values()
                       if thread.state in (INTERRUPTED, FINISHING)]:
            waiter.restart()
            while not (self._has_stopped(thread)
                       or self._is_in_vfork(thread)):
                if time.monotonic() > deadline:
                    again = Again("thread %d does not stop (%s)" % (
                        thread.tid,
                        read_proc("/proc/%d/wchan" % thread.tid).decode(
                            errors="replace") or "?"))
                    again.is_starved = read_stat(thread.tid)[:1] == ["R"]
                    raise again
                waiter.sleep()

    def _has_stopped(self, thread):
        """Look at one thread. -> True if it needs no more waiting"""
        thread.polls += 1
        status = self.status_of(thread.tid, thread.polls % 8 == 0)
        if (status is None and thread.polls % 32 == 0
                and is_zombie(thread.tid)):
            # A leader that ended before the others: it never stops again,
            # and nobody is told of its end before theirs.
            self.lose(thread.tid)
            return True
        return status is not None and self._take_status(thread, status)

    def _is_in_vfork(self, thread):
        """Is a thread that was told to stop in vfork? It needs no wait.

        It stops before it runs another instruction, and not before its
        child, which shares its memory, has ended or become another program.
        Waited for, several that vfork all the time would not be seen out of
        it together; nor would one whose child we have stopped.
        """
        if thread.state == INTERRUPTED and thread.is_wanted and (
                thread.in_vfork or thread.polls % 4 == 2):
            regs, child = _look_into_vfork(thread)
            thread.in_vfork = bool(child)
            if child:
                thread.regs = regs
                # A look that came between its number and its life missed it.
                if child not in self.siblings and child != self.tgid:
                    self.siblings += (child,)
                    self._open_tasks()
        return thread.in_vfork

    def status_of(self, tid, is_thorough):
        """A thread's wait status; 0: it has ended; None: nothing happened.

        is_thorough   look too for a stop that the host's waitpid(-1) took
        """
        try:
            status = wait_nohang(tid, self._status)
        except ChildProcessError:       # its end was reaped by the host
            return 0
        if status is None and is_thorough:
            status = self.stop_seen_by_others(tid)
        return status

    def stop_seen_by_others(self, tid):
        """The stop that a waitpid(-1) of the host took from us, or None.

        If the thread stopped only just now, its status is still to be
        reaped: left there, it would be taken for the next stop.
        """
        info = ctypes.create_string_buffer(128)
        try:
            ptrace(PTRACE_GETSIGINFO, tid, 0, ctypes.addressof(info))
            signo, _, code = struct.unpack_from("<iii", info)
        except OSError as error:
            if error.errno != errno.EINVAL:     # EINVAL: group stop
                return None
            signo, code = 0, PTRACE_EVENT_STOP << 8 | signal.SIGSTOP
        event = code >> 8 if code > 0 else 0
        if event or code == SYSCALL_EVENT_SIGNAL:
            signo = code & 0xff
        seen = event << 16 | signo << 8 | 0x7f
        reaped = wait_nohang(tid)
        return seen if reaped is None else reaped

    def _take_status(self, thread, status):
        if status & 0xff != 0x7f:               # exited or killed
            self.lose(thread.tid)
            return True
        event, signo = status >> 16, status >> 8 & 0xff
        if thread.state == FINISHING:
            return self._step_transfer(thread, event, signo)
        if event != PTRACE_EVENT_STOP:
            # A signal arrived first: the target gets it. Any stop uses up
            # the interrupt (kernel/signal.c, ptrace_stop): ask again. If it
            # is one that is ignored, no EINTR must come of it.
            if not event:
                self._repaired(thread)
            self._ask_again(thread)
            self._resume(thread.tid, PTRACE_CONT, signo if not event else 0)
            return False
        thread.group_stop = signo != signal.SIGTRAP
        try:
            thread.regs = self._repaired(thread)
        except OSError:
            self.lose(thread.tid)
            return True
        thread.state = STOPPED
        return True

    def _resume(self, tid, request, signo=0):
        try:
            ptrace(request, tid, 0, signo)
        except OSError:
            self.lose(tid)

    def _repaired(self, thread):
        """The registers of a stopped thread, rid of what our stop did."""
        regs = self.get_regs(thread.tid)
        cured = ubp_x86.without_spurious_eintr(
            regs, lambda vaddr, size: read_memory(thread.tid, vaddr, size))
        if cured is not None:
            self.set_regs(thread.tid, cured)
        return cured or regs

    # -- transfers that our stop cut short ----------------------------------

    def _rest(self, thread):
        try:
            return ubp_x86.rest_of_transfer(
                thread.regs,
                lambda vaddr, size: read_memory(thread.tid, vaddr, size))
        except OSError:
            return None

    def _framed(self, thread, rest):
        """Make a re-issue survive our death. -> its regset, or None

        It runs with a signal frame below, as an injected syscall does.
        """
        found, xstate = self._text, ubp_x86.usable_xstate(
            _get_xstate(thread.tid))
        try:
            top = xstate and self.own_stack(
                thread, ubp_x86.frame_size(xstate))
        except Again:               # its stack is not to be seen just now
            return None
        if (not top or not found.restorers
                or seccomp_mode(thread.tid) != "0"
                or self.read(found.syscall_ret, 3) != ubp_x86.SYSCALL_RET
                or not self.read(found.restorers[0], 9).startswith(
                    ubp_x86.RESTORERS)):
            return None
        mask = ctypes.create_string_buffer(8)
        ptrace(PTRACE_GETSIGMASK, thread.tid, 8, ctypes.addressof(mask))
        vaddr, image, regs = ubp_x86.reissued_transfer(
            thread.regs, rest, found.syscall_ret,
            (xstate, mask.raw, found.restorers[0], top))
        thread.below = vaddr, read_memory(thread.tid, vaddr, len(image))
        write_memory(thread.tid, vaddr, image)
        return regs

    def _put_back(self, thread):
        """A transfer's registers as they are to be, and what lay below."""
        self.set_regs(thread.tid, thread.regs)
        if thread.below is not None:
            below, thread.below = thread.below, None
            write_memory(thread.tid, *below)

    def _step_transfer(self, thread, event, signo):
        """A thread that re-issues the rest of its transfer has stopped.

        -> True if it needs no more waiting. A signal with its handler, or a
        group stop, ends the transfer: the program gets the count so far.
        """
        is_syscall = not event and signo == SYSCALL_EVENT_SIGNAL
        try:
            if is_syscall and thread.in_rest:               # its exit
                after = self.get_regs(thread.tid)
                thread.regs = ubp_x86.finished_transfer(thread.regs, after)
                thread.is_complete = ubp_x86.has_ended(after)
            elif event and signo != signal.SIGTRAP:
                thread.is_complete = thread.group_stop = True
            elif event and thread.is_wanted:
                # It has not begun. Asked again it would stop here again, for
                # ever where we are the first to get a processor.
                pass
            elif event or is_syscall:   # its entry, or our old interrupt
                thread.in_rest = is_syscall
                self._resume(thread.tid, PTRACE_SYSCALL)
                if thread.is_wanted:    # this stop has used up the interrupt
                    self._resume(thread.tid, PTRACE_INTERRUPT)
                return False
            self._put_back(thread)
        except OSError:
            self.lose(thread.tid)
            return True
        if event or is_syscall:
            thread.state = STOPPED
            return True
        # If no handler runs, it stops again with that count, and goes on.
        thread.state = INTERRUPTED
        self._resume(thread.tid, PTRACE_CONT, signo)
        self._ask_again(thread)
        return False

    def _ask_again(self, thread):
        """A stop has used up its interrupt, or it has none."""
        self._resume(thread.tid, PTRACE_INTERRUPT)
        thread.is_wanted = True

    def finish_late(self):
        """Let go of late threads and of transfers. -> are any left?

        Called by the worker between operations, as long as it says so: a
        thread that did not stop in time would otherwise stop later and stay.
        """
        for other in list(self.others):
            if not other.finish_late():
                other.close()
                self.others.remove(other)
        for tid in list(self._dead):
            self.lose(tid)
        for thread in list(self.threads.values()):
            if (thread.state == INTERRUPTED and thread.polls % 64 == 63):
                self._interrupt(thread)     # exec gave its tid to another
            if (thread.state in (INTERRUPTED, FINISHING)
                    and self._has_stopped(thread)
                    and thread.tid in self.threads):
                self._let_go(thread)
            elif thread.state == ABANDONED:
                self._drop_abandoned(thread)
        return bool(self.others) or any(
            thread.state in (INTERRUPTED, FINISHING, ABANDONED)
            for thread in self.threads.values())

    def _drop_abandoned(self, thread):
        """Let go of a thread whose injected syscall took too long."""
        status = self.status_of(thread.tid, True)
        if status is None:
            return
        signo = status >> 8 & 0xff
        is_signal = status >> 16 == 0 and signo != SYSCALL_EVENT_SIGNAL
        self.threads.pop(thread.tid, None)
        if status & 0xff == 0x7f:
            self._resume(thread.tid, PTRACE_DETACH, is_signal * signo)

    def end_transfers(self, must_leave):
        """Before the tracer's thread ends: wait for transfers to end.

        must_leave() -> is there no more time? Then they are cut short, with
        a short but true count: left to themselves they would return the
        count of their last part only. Late threads need no wait: the kernel
        forgets an interrupt when the tracer's thread ends.
        """
        rest = 0.0005
        while self.finish_late() and any(
                thread.state == FINISHING for each in [self] + self.others
                for thread in each.threads.values()):
            if must_leave():
                for each in [self] + self.others:
                    each.cut_transfers()
            time.sleep(rest)
            rest = min(rest * 1.1, 0.02)

    def cut_transfers(self):
        """Interrupt what re-issues the rest of a transfer, for good."""
        for thread in list(self.threads.values()):
            if thread.state == FINISHING and not thread.is_last:
                thread.is_last = True
                self._interrupt(thread)

    # -- releasing ----------------------------------------------------------

    def _release(self):
        """Detach from all that stopped. Busy threads go first."""
        if self.held:
            return
        stopped = [thread for thread in self.threads.values()
                   if thread.state in (STOPPED, RUNNING)]
        for thread in [t for t in stopped if t.state == RUNNING]:
            self._interrupt(thread)     # seized only: DETACH needs a stop
        stopped = [t for t in stopped if t.state == STOPPED]
        stopped.sort(key=_is_idle)
        for thread in stopped:
            self._let_go(thread)
        self._close_memory()

    def let_go_held(self):
        """Let a launched program go on from its entry point."""
        self.held = False
        self._release()

    def _await_group_stop(self):
        """Wait until threads that a signal had stopped are so again.

        On their way from our stop to that one they show as running.
        """
        limit = time.monotonic() + 0.2
        for tid in self._to_stop:
            while (read_stat(tid)[:1] == ["R"]
                   and time.monotonic() < limit):
                time.sleep(0.0005)
        self._to_stop = []

    def _let_go(self, thread):
        rest = None
        if not thread.is_complete and not thread.is_last:
            rest = self._rest(thread)
        if rest is not None:
            try:
                self.set_regs(thread.tid, self._framed(thread, rest) or rest)
                ptrace(PTRACE_SYSCALL, thread.tid)
            except OSError:
                self.lose(thread.tid)
                return
            thread.state, thread.in_rest = FINISHING, False
            thread.is_wanted = False
            return
        self._free(thread)

    def _free(self, thread):
        """Detach from a stopped thread."""
        self.threads.pop(thread.tid, None)
        if thread.group_stop:
            self._to_stop.append(thread.tid)
        try:
            ptrace(PTRACE_DETACH, thread.tid)
        except OSError:
            self.lose(thread.tid)       # it ended before its release

    def lose(self, tid):
        """Forget a thread that ended, and reap it if it was ours.

        A traced zombie that nobody waits for keeps its process from ending.
        A leader can be reaped only when its other threads have ended.
        """
        self.threads.pop(tid, None)
        self._dead.discard(tid)
        try:
            if wait_nohang(tid) is None and tid in thread_ids(self.tgid):
                self._dead.add(tid)
        except ChildProcessError:
            log.debug("thread %d has ended", tid)

    def reap_dead(self):
        """Reap threads that died traced; called by any thread of the host.

        An execve waits until they are, and a PTRACE_SEIZE for the execve.
        Stops are left to the worker, and a launched program to its parent.
        """
        for tid in thread_ids(self.tgid):
            if tid != self.tgid:
                try:
                    # waitid reports stops of tracees unasked: look first.
                    found = os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG
                                      | os.WNOWAIT | WALL)
                    if found and found.si_code in (
                            os.CLD_EXITED, _CLD_KILLED, os.CLD_DUMPED):
                        os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG
                                  | WALL)
                except OSError:
                    continue        # alive, or reaped

    def close(self):
        """Close the files that are kept open between pauses."""
        self._close_memory()
        self._close_tasks(list(self._tasks))
        if self._loadavg is not None:
            self._loadavg.close()
            self._loadavg = None

    # -- writing, with all stopped ------------------------------------------

    def write_text(self, vaddr, data, parts=()):
        """Write to memory whatever its protection; within one page.

        parts   ((vaddr, bytes), …) of data that matter, eight bytes at most

        /proc/PID/mem is opened after the stop: opened before, it would be
        the memory of a program that exec has replaced. Where the kernel
        forbids it (proc_mem.force_override), PTRACE_POKEDATA writes.
        """
        tid = self.vm_tid()
        try:
            if self._memory is None:
                self._memory = HeldFile("/proc/%d/mem" % tid, os.O_RDWR)
            self._memory.write(vaddr, data)
        except OSError:
            for vaddr, data in parts or ((vaddr, data),):
                poke(tid, vaddr, data)

    def _close_memory(self):
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def signal_frames(self, thread):
        """The saved program counters of handlers that a thread is in.

        -> [(vaddr of the word, its value)]. A frame on another stack leads
        on to the stack that it interrupted. Raises Again if the thread's
        own stack cannot be read: what is on it is unknown. What a frame
        leads on to may be no stack: any bytes may look like a frame.
        """
        words = [struct.pack("<Q", vaddr) for vaddr in self._text.restorers]
        found, seen = [], set()
        pending = [ubp_x86.stack_pointer(thread.regs)]
        while pending and len(seen) < 64:
            low = pending.pop()
            if any(a <= low < b for a, b in seen):
                continue
            high, memory = self._stack_from(thread, low)
            if memory is None:
                if not seen and not self._is_empty_stack(thread, low):
                    raise Again("the stack of thread %d cannot be read"
                                % thread.tid)
                continue
            seen.add((low, high))
            for vaddr, value, rsp in ubp_x86.frames_on_stack(
                    memory, low, words):
                found.append((vaddr, value))
                pending.append(rsp)
        return found

    @staticmethod
    def _is_empty_stack(thread, low):
        """Does a stack end here, as of a thread that has just been made?"""
        return not low % PAGE and bool(_peek(thread.tid, low - 8, 8))

    def parked_frames(self, tid):
        """Those of handlers that were left for another context, by
        swapcontext(3): as user threads are that a signal preempts.

        tid   of any stopped thread;   -> as signal_frames
        No thread tells of their stacks, so all that the program can write
        to is searched, the smallest vma first, up to a limit. What is no
        stack any more may still look like one.
        """
        words = [struct.pack("<Q", vaddr) for vaddr in self._text.restorers]
        found, n_left, n_reserved = [], _MOST_PARKED, _MOST_RESERVED
        for mapping in sorted(
                read_maps(tid), key=lambda each: each.end - each.start):
            n_reserved -= mapping.end - mapping.start
            if n_reserved < 0 or n_left <= 0:
                log.debug("not all of pid %d was searched for contexts",
                          self.tgid)
                break
            if (not mapping.perms.startswith("rw")
                    or mapping.path.startswith(("/memfd:ubp", "/dev/"))):
                continue
            for low, high in _touched_ranges(tid, mapping):
                n_left -= high - low
                for vaddr, memory in _readable_parts(tid, low, high):
                    found += [(at, rip) for at, rip, _ in
                              ubp_x86.frames_on_stack(memory, vaddr, words)]
        return found

    def _stack_from(self, thread, low):
        """The stack that low is on, from there up. -> (its end, bytes)

        (0, None) where there is none. The maps may be older than the stack.
        """
        mapping = self._mapping(low)
        if mapping is None and not self._has_fresh_maps:
            self.maps = read_maps(self.vm_tid()) or self.maps
            self._has_fresh_maps = True
            mapping = self._mapping(low)
        if mapping is None:
            return 0, None
        high = self._stack_end(thread, mapping, low)
        try:
            memory = read_beginning(thread.tid, low, high - low)
        except OSError:
            return 0, None
        return low + len(memory), memory

    def _mapping(self, vaddr):
        starts = self.maps
        low, high = 0, len(starts)
        while low < high:
            middle = (low + high) // 2
            if starts[middle].end <= vaddr:
                low = middle + 1
            else:
                high = middle
        if low < len(starts) and starts[low].start <= vaddr:
            return starts[low]
        return None

    def own_stack(self, thread, size):
        """The end of size free bytes on a thread's own stack, or 0.

        Below its red zone, where the stack's bounds are known: the main
        thread's [stack], or a pthread stack with its guard pages and its
        control block; and in no signal handler, which may run on a small
        stack inside of it.
        """
        top = ubp_x86.own_stack_top(thread.regs)
        mapping = self._mapping(top)
        if (mapping is None or top - size < mapping.start
                or self.signal_frames(thread)):
            return 0
        if mapping.path == "[stack]" and thread.tid == self.tgid:
            return top
        guard = self._mapping(mapping.start - 1)
        block = ubp_x86.thread_pointer(thread.regs)
        is_guarded = guard is not None and guard.perms.startswith("---")
        if (top < block < mapping.end
                and self._is_one_stack(thread.tid, top, block)
                and (is_guarded or _has_guard(thread.tid, mapping,
                                              top - size))):
            return top
        return 0

    @staticmethod
    def _is_one_stack(tid, low, high):
        """Is there no guard between, which no map shows?"""
        size = min(high - low, _STACK_LIMIT)
        try:
            return len(read_beginning(tid, low, size)) == high - low
        except OSError:
            return False

    def _stack_end(self, thread, mapping, low):
        """A pthread stack ends at its control block, others at the vma.

        Small stacks of coroutines may share one vma of any size.
        """
        block = ubp_x86.thread_pointer(thread.regs)
        if low < block < mapping.end and block - low <= _STACK_LIMIT:
            return block
        limit = (_STACK_LIMIT if mapping.path == "[stack]"
                 or thread.state != STOPPED     # in vfork: no block is known
                 else _SMALL_STACK_LIMIT)
        return min(mapping.end, low + limit)


def poke(tid, vaddr, data):
    """PTRACE_POKEDATA: write data in whole words, inside its page.

    Eight bytes or less are one word, so no kill can leave half of them.
    """
    while data:
        size = min(8, len(data))
        start = min(vaddr, (vaddr | PAGE - 1) + 1 - 8)
        word = bytearray(read_memory(tid, start, 8))
        word[vaddr - start:vaddr - start + size] = data[:size]
        ptrace(PTRACE_POKEDATA, tid, start,
               struct.unpack("<Q", word[:8])[0])
        vaddr, data = vaddr + size, data[size:]


def _syscall_of(tgid, tid):
    """What a thread sleeps in. -> (number, [6 arguments], rsp, rip), or None

    proc(5), /proc/PID/syscall.
    """
    words = read_proc("/proc/%d/task/%d/syscall" % (tgid, tid)).split()
    if len(words) != 9:             # it runs, or has ended
        return None
    args = [int(word, 16) for word in words[1:]]
    return int(words[0]), args[:6], args[6], args[7]


def _is_blocking(tgid, tid):
    """Does a thread sleep in a transfer or a vfork?"""
    found = _syscall_of(tgid, tid)
    return bool(found) and (
        ubp_x86.is_transfer(*found[:2])
        or _has_vforked(tid, *found[:2]))


def _has_vforked(tid, number, args):
    """Is a thread that sleeps in a syscall waiting for a child of vfork?"""
    return (ubp_x86.is_clone(number) and read_stat(tid)[:1] == ["D"]
            and ubp_x86.is_vfork(number, args, lambda vaddr, size: _peek(
                tid, vaddr, size)))


def _look_into_vfork(thread):
    """What /proc tells of a thread that waits for a child of vfork in its
    memory. -> (regset, pid of that child), or (b"", 0)

    Without a child, the thread may still be about to make it.
    """
    tid = thread.tid
    found = _syscall_of(thread.tgid, tid)
    if found is not None and _has_vforked(tid, *found[:2]):
        children = read_proc("/proc/%d/task/%d/children" % (thread.tgid, tid))
        for pid in map(int, children.split()[::-1]):
            if _shares_mm(tid, pid):
                return ubp_x86.regs_in_syscall(found[0], *found[2:]), pid
    return b"", 0


def _is_idle(thread):
    return ubp_x86.is_in_syscall(thread.regs)


def _process_ids():
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def _shares_mm(tid, pid):
    """Do two processes share an address space, by clone(2) CLONE_VM?

    kcmp decides. Without it equal maps must do, and only those with equal
    segment addresses in /proc/PID/stat are compared: proc(5) 26 to 28.
    """
    same = is_same_mm(tid, pid)
    if same is None and read_stat(tid)[23:26] == read_stat(pid)[23:26]:
        maps = read_proc("/proc/%d/maps" % tid)
        same = bool(maps) and maps == read_proc("/proc/%d/maps" % pid)
    return bool(same)


def _raise_priority():
    """Let this thread preempt those it releases. -> what to restore."""
    try:
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        os.sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK,
                              os.sched_param(1))
        return before
    except (OSError, AttributeError):
        return None


def _restore_priority(before):
    if before is not None:
        try:
            os.sched_setscheduler(0, before[0] & ~SCHED_RESET_ON_FORK,
                                  before[1])
        except OSError as error:
            log.debug("cannot leave SCHED_FIFO: %s", error)


class Injection:
    """Run syscalls in one stopped thread, so that it survives our death.

    Before its registers change, a signal frame is written below its stack
    that makes rt_sigreturn put everything back. While we live, the exact
    registers are put back instead. Raises ProbeError where no thread has
    memory that is provably free for the frame.
    """

    def __init__(self, tracer, text=b""):
        self.tracer = tracer
        self.text_vaddr = 0         # where `text` lies meanwhile
        self._text = text
        self._signals = []          # SIGSTOPs that came in between
        self._seccomp_mode = None   # of the chosen thread, once asked
        self._is_blocked = False    # a SIGSYS came instead of the syscall
        self._is_suspended = False  # its filters are, while it is traced
        self._mask = ctypes.create_string_buffer(8)
        self._all_blocked = ctypes.create_string_buffer(_ALL_SIGNALS, 8)
        if not self._finds_code():      # a patch may cover it by now
            self.tracer.forget_gadgets()
            if not self._finds_code():
                raise Again("the code for injections has changed")
        self._choose()

    def _finds_code(self):
        """Are the gadgets to use still what they were?"""
        found, read = self.tracer.find_gadgets(), self.tracer.read
        self._gadget, self._pop_rax = found.syscall_ret, 0
        self._restorer = found.restorers[0] if found.restorers else 0
        if not self._restorer:
            self._restorer, self._pop_rax = self._gadget, found.pop_rax
        if not self._gadget or not (found.restorers or self._pop_rax):
            raise ProbeError(
                "inject a syscall into", self.tracer.name(),
                "the program has no `syscall; ret`, or nothing that could "
                "return from a signal")
        try:
            return read(self._gadget, 3) == ubp_x86.SYSCALL_RET and (
                read(self._pop_rax, 2) == ubp_x86.POP_RAX_RET
                if self._pop_rax else
                read(self._restorer, 9).startswith(ubp_x86.RESTORERS))
        except OSError:
            return False

    def _choose(self):
        why = "no thread is stopped"
        threads = [t for t in self.tracer.threads.values()
                   if t.state == STOPPED and self._may_run(t)]
        threads.sort(key=lambda t: ubp_x86.injection_rank(t.regs))
        for thread in threads:
            try:
                why = self._unfit(thread) or self._prepare(thread)
                if not why:
                    self._thread = thread
                    return
            except OSError as error:
                why = "thread %d: %s" % (thread.tid, error.strerror)
        raise Again("no thread can run a syscall now: " + why)

    def _may_run(self, thread):
        return thread.tgid == self.tracer.tgid

    def _unfit(self, thread):
        """Why a thread cannot run syscalls, or ""."""
        if ubp_x86.is_32bit(thread.regs):
            return "thread %d runs 32-bit code" % thread.tid
        if ubp_x86.usable_xstate(_get_xstate(thread.tid)) is None:
            return "thread %d uses AMX tiles" % thread.tid
        if self._is_dispatched(thread.tid):
            return ("the syscalls of thread %d are blocked (Syscall User "
                    "Dispatch)" % thread.tid)
        if _in_rseq_section(thread):
            return "thread %d is in an rseq section" % thread.tid
        return ""

    def _prepare(self, thread):
        """Write a thread's signal frame. -> why there is no room, or "".

        Below `top`: the mark that tells a later ubp whose these bytes were,
        `text`, and the frame.
        """
        xstate = ubp_x86.usable_xstate(_get_xstate(thread.tid))
        text = self._text.ljust(len(self._text) + 15 & -16, b"\0")
        text += _FRAME_MARK
        top = self._place(thread, ubp_x86.frame_size(xstate) + len(text))
        if not top:
            return ("thread %d runs on a stack whose bounds are unknown"
                    % thread.tid)
        ptrace(PTRACE_GETSIGMASK, thread.tid, 8,
               ctypes.addressof(self._mask))
        self.text_vaddr = top - len(text)
        self._frame, image = ubp_x86.signal_frame(
            thread.regs, xstate, self._mask.raw, self._restorer,
            self.text_vaddr, self._pop_rax)
        image += bytes(self.text_vaddr - self._frame - len(image)) + text
        self._below = read_memory(thread.tid, self._frame, len(image))
        write_memory(thread.tid, self._frame, image)
        return ""

    def _is_dispatched(self, tid):
        """Would Syscall User Dispatch turn our syscalls into SIGSYS?

        Source: Documentation/admin-guide/syscall-user-dispatch.rst.
        """
        config = SudConfig()
        try:
            ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid,
                   ctypes.sizeof(config), ctypes.addressof(config))
        except OSError:
            return False            # before Linux 6.4: seen at the SIGSYS
        return bool(config.mode and config.selector and
                    read_memory(tid, config.selector, 1) != b"\0")

    @property
    def tid(self):
        """The thread that runs the syscalls."""
        return self._thread.tid

    def _place(self, thread, size):
        """The end of provably free memory, size bytes of it, or 0.

        On the thread's own stack; else pages at the low end of [stack] that
        were never touched.
        """
        top = self.tracer.own_stack(thread, size)
        for mapping in self.tracer.maps if not top else ():
            if mapping.path == "[stack]":
                return self._low_end(thread.tid, mapping, size)
        return top

    def _low_end(self, tid, mapping, size):
        """The end of free pages at the low end of [stack], or 0.

        Never touched; or by ubp alone: zero ever since, as the arena's
        header remembers, or with the frame of a ubp that was killed.
        """
        span = -(-size // PAGE) * PAGE
        scratch = self.tracer.scratch
        if (mapping.start <= scratch - span
                and scratch < self._main_stack_pointer(mapping)
                and not any(read_memory(tid, scratch - span, span))):
            return scratch
        pages = _touched_pages(tid, mapping)
        free = pages.find(bytes(span // PAGE + 1))
        if free >= 0:
            self.tracer.scratch = mapping.start + free * PAGE + span
            return self.tracer.scratch
        for top in range(mapping.start + span,
                         mapping.start + len(pages) * PAGE, PAGE):
            if (read_memory(tid, top - 16, 16) == _FRAME_MARK
                    and not self._is_used(top - span, top)):
                return top
        return 0

    def _main_stack_pointer(self, mapping):
        """Where the main thread is on [stack]; its end if it is elsewhere."""
        thread = self.tracer.threads.get(self.tracer.tgid)
        if thread is None or thread.state != STOPPED:
            return mapping.start
        top = ubp_x86.own_stack_top(thread.regs)
        return top if mapping.start <= top < mapping.end else mapping.end

    def _is_used(self, low, high):
        """Is a thread still on its way out of a dead ubp's frame?"""
        return any(low <= ubp_x86.stack_pointer(thread.regs) < high
                   for thread in self.tracer.threads.values()
                   if thread.state == STOPPED)

    def call(self, number, *args):
        """Run one syscall. -> its result, negative for an error."""
        tid = self._thread.tid
        self.check(number, *args)
        self.tracer.set_regs(tid, ubp_x86.syscall_regs(
            self._thread.regs, self._gadget, self._frame, number, args))
        ptrace(PTRACE_SETSIGMASK, tid, 8, ctypes.addressof(self._all_blocked))
        self._until_syscall_stop(tid)           # entry
        self._until_syscall_stop(tid)           # exit
        return ubp_x86.syscall_result(self.tracer.get_regs(tid))

    def check(self, number, *args):
        """Refuse what the thread's seccomp filters would not allow.

        If the user said so, and with privilege, they are suspended instead:
        then a kill of ubp between here and the thread's release leaves a
        syscall to the filter, which may kill the target.
        """
        try:
            if not self._is_suspended:
                self.check_filters(number, *args)
        except ProbeError:
            if not self.tracer.may_suspend:
                raise
            try:
                ptrace(PTRACE_SETOPTIONS, self._thread.tid, 0,
                       self.tracer.options | PTRACE_O_SUSPEND_SECCOMP)
            except OSError as error:
                raise ProbeError(
                    "suspend the seccomp filters of", self.tracer.name(),
                    "PTRACE_O_SUSPEND_SECCOMP: " + error.strerror,
                    "it takes CAP_SYS_ADMIN, and no filter of our own")
            self._is_suspended = True

    def check_filters(self, number, *args):
        """The same of a syscall that nobody may suspend them for."""
        tid = self._thread.tid
        if self._seccomp_mode is None:      # a filter may be new
            self._seccomp_mode = seccomp_mode(tid)
        mode = self._seccomp_mode
        if mode == "0":
            return
        for nr, values in ((number, args), (ubp_x86.NR_RT_SIGRETURN, ())):
            if mode != "2" or not _filters_allow(tid, nr, self._gadget + 2,
                                                 values):
                raise InjectionRefused(
                    "inject a syscall into", self.tracer.name(),
                    "its seccomp filter forbids syscall %d, or cannot be "
                    "read (that takes CAP_SYS_ADMIN)" % nr,
                    "--suspend-seccomp (as root) suspends the filter while "
                    "ubp maps its memory, some 0.3 ms at both ends; a kill "
                    "-9 of ubp in that time can kill the target")

    def _until_syscall_stop(self, tid):
        while True:
            ptrace(PTRACE_SYSCALL, tid)
            status = self._wait(tid)
            if status >> 8 == SYSCALL_EVENT_SIGNAL:
                return
            if status >> 8 == signal.SIGSYS:
                self._is_blocked = True
                raise ProbeError(
                    "inject a syscall into", self.tracer.name(),
                    "it blocks syscalls (seccomp or Syscall User Dispatch)")
            if status >> 16 == 0:
                self._signals.append(status >> 8 & 0xff)

    def _wait(self, tid):
        limit = time.monotonic() + _INJECTION_S
        polls, waiter = 0, self.tracer.waiter
        waiter.restart()
        while True:
            polls += 1
            status = self.tracer.status_of(tid, polls % 8 == 0)
            if status is not None:
                if status & 0xff != 0x7f:
                    self.tracer.lose(tid)
                    raise TraceeGone("trace", "pid %d" % self.tracer.tgid,
                                     "it ended while ubp ran a syscall in it")
                return status
            if time.monotonic() > limit:
                # Frozen, or asleep for long: it restores itself when it
                # comes back, and is let go then.
                self._thread.state = ABANDONED
                raise UbpTimeout("run a syscall in", self.tracer.name(),
                                 "it did not return in %g s" % _INJECTION_S)
            waiter.sleep()

    def finish(self):
        """Put the thread back: mask, registers, then the stack's bytes.

        A syscall that was interrupted is restarted by the kernel only on
        its way through signal delivery, so such a thread is brought to an
        event stop first.
        """
        tid, regs = self._thread.tid, self._thread.regs
        if (tid not in self.tracer.threads
                or self._thread.state == ABANDONED):
            return
        if self._is_suspended:
            ptrace(PTRACE_SETOPTIONS, tid, 0, self.tracer.options)
        ptrace(PTRACE_SETSIGMASK, tid, 8, ctypes.addressof(self._mask))
        if not self._is_blocked and (ubp_x86.is_in_syscall(regs)
                                     or self._thread.group_stop):
            while True:
                ptrace(PTRACE_INTERRUPT, tid)
                ptrace(PTRACE_CONT, tid)
                status = self._wait(tid)
                if status >> 16 == PTRACE_EVENT_STOP:
                    break
                if status >> 16 == 0:
                    self._signals.append(status >> 8 & 0xff)
        self.tracer.set_regs(tid, regs)
        write_memory(tid, self._frame, self._below)
        for signo in self._signals:     # put off, not lost
            syscall(SYS_tgkill, self._thread.tgid, tid, signo)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        try:
            self.finish()
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise
            self.tracer.lose(self._thread.tid)


_SCRATCH = 8192                 # bytes: a signal frame of any size


class Mending(Injection):
    """One in memory that ubp has put there for it: a handler may be on a
    stack whose bounds nobody knows. One at a time in a process. The one
    thread that is stopped may be a child of vfork."""

    def _may_run(self, thread):
        return True

    def _place(self, thread, size):
        return (self.tracer.ward.scratch if size <= _SCRATCH else 0
                ) or super()._place(thread, size)


def _injected_frame(tid, rip, rsp):
    """The head of a signal frame on which a syscall is to be run, or b""."""
    try:
        memory = read_memory(tid, rsp, ubp_x86.FRAME_HEAD)
        code = read_memory(tid, rip, len(ubp_x86.SYSCALL_RET))
    except OSError:
        return b""                  # it has no stack, so no frame of ours
    return memory if ubp_x86.is_injected(code, memory) else b""


def _get_xstate(tid):
    """PTRACE_GETREGSET, NT_X86_XSTATE. -> the whole image"""
    buffer = ctypes.create_string_buffer(16384)
    iov = Iovec(ctypes.addressof(buffer), 16384)
    ptrace(PTRACE_GETREGSET, tid, NT_X86_XSTATE, ctypes.addressof(iov))
    return buffer.raw[:iov.iov_len]


def rseq_configuration(tid):
    """vaddr of a stopped thread's struct rseq; 0: none, None: unknown."""
    config = RseqConfiguration()
    try:
        ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, ctypes.sizeof(config),
               ctypes.addressof(config))
    except OSError:
        return None                 # before Linux 5.13
    return config.rseq_abi_pointer


def _in_rseq_section(thread):
    """May the thread be inside a restartable sequence?

    rseq_cs, at offset 8, is cleared by the kernel as soon as it sees the
    thread elsewhere; a sequence would then run on without its abort.
    """
    pointer = rseq_configuration(thread.tid)
    if not pointer or ubp_x86.is_in_syscall(thread.regs):
        return False
    return read_memory(thread.tid, pointer + 8, 8) != bytes(8)


def _has_guard(tid, mapping, vaddr):
    """Is there a guard in a vma, below vaddr, that no map shows?

    Source: Documentation/admin-guide/mm/pagemap.rst, bit 58 (Linux 6.15).
    """
    low = max(mapping.start, (vaddr - _STACK_LIMIT) & -PAGE)
    part = mapping._replace(start=low, end=vaddr & -PAGE)
    try:
        entries = _page_entries(tid, part, _STACK_LIMIT // PAGE)
    except OSError:
        return False
    return any(entry >> 58 & 1 for entry in entries)


def _readable_parts(tid, low, high):
    """Yield (vaddr, bytes) of what can be read of a range of whole pages."""
    while low < high:
        try:
            memory = read_beginning(tid, low, high - low)
        except OSError:
            memory = b""
        if memory:
            yield low, memory
        low += len(memory) + PAGE


def _touched_ranges(tid, mapping):
    """[(low, high)] of a vma's memory that was ever touched."""
    pages = _touched_pages(tid, mapping, (mapping.end - mapping.start) // PAGE)
    return [(mapping.start + each.start() * PAGE,
             mapping.start + each.end() * PAGE)
            for each in re.finditer(b"[^\0]+", pages)]


def _touched_pages(tid, mapping, most=512):
    """Which of the first pages of a vma were ever touched? -> a byte each

    Source: Documentation/admin-guide/mm/pagemap.rst, bits 63 and 62.
    """
    return bytes(entry >> 62 for entry in _page_entries(tid, mapping, most))


def _page_entries(tid, mapping, most):
    """What pagemap says of the first pages of a vma. -> (int, ...)"""
    n_pages = min(most, (mapping.end - mapping.start) // PAGE)
    held = HeldFile("/proc/%d/pagemap" % tid)
    try:
        _check(_lseek(held.fd, mapping.start // PAGE * 8, os.SEEK_SET))
        buffer = ctypes.create_string_buffer(8 * n_pages)
        n = _check(_read(held.fd, ctypes.addressof(buffer), 8 * n_pages))
    finally:
        held.close()
    return struct.unpack_from("<%dQ" % (n // 8), buffer)


def seccomp_mode(tid):
    """0 none, 1 strict, 2 filter: proc(5), as a text."""
    found = None
    try:
        held = HeldFile("/proc/%d/status" % tid)
        try:
            found = re.search(rb"^Seccomp:\s*(\d)", held.read(), re.M)
        finally:
            held.close()
    except OSError:
        log.debug("thread %d has ended", tid)
    return found.group(1).decode() if found else "0"


def _filters_allow(tid, number, ip, args):
    """Would every seccomp filter of a stopped thread let a syscall pass?"""
    data = struct.pack("<iIQ6Q", number, AUDIT_ARCH_X86_64, ip,
                       *(arg & (1 << 64) - 1
                         for arg in (tuple(args) + (0,) * 6)[:6]))
    for index in range(1 << 10):
        try:
            n = ptrace(PTRACE_SECCOMP_GET_FILTER, tid, index)
        except OSError as error:
            return error.errno == errno.ENOENT and index > 0
        program = ctypes.create_string_buffer(8 * n)
        try:
            ptrace(PTRACE_SECCOMP_GET_FILTER, tid, index,
                   ctypes.addressof(program))
        except OSError:
            return False
        verdict = run_filter(list(struct.iter_unpack("<HBBI", program.raw)),
                             data)
        # SECCOMP_RET_ALLOW and SECCOMP_RET_LOG, <linux/seccomp.h>
        if verdict >> 16 not in (0x7fff, 0x7ffc):
            return False
    return False


def run_filter(program, data):
    """Interpret a classic BPF program over struct seccomp_data. -> u32

    program   [(code, jt, jf, k)];  returns 0 (kill) for anything unknown.
    Source: <linux/bpf_common.h>, kernel/seccomp.c seccomp_check_filter.
    """
    a = x = at = 0
    memory = [0] * 16
    for _ in range(len(program)):
        if not at < len(program):
            return 0
        code, jt, jf, k = program[at]
        at += 1
        kind = code & 7
        if kind == 6:                                   # BPF_RET
            return a if code & 0x18 == 0x10 else k
        if kind in (0, 1):                              # BPF_LD, BPF_LDX
            mode = code & 0xe0
            value = (struct.unpack_from("<I", data, k)[0]
                     if mode == 0x20 and k <= 60 else
                     memory[k & 15] if mode == 0x60 else
                     64 if mode == 0x80 else k)
            a, x = (value, x) if kind == 0 else (a, value)
        elif kind in (2, 3):                            # BPF_ST, BPF_STX
            memory[k & 15] = a if kind == 2 else x
        elif kind == 7:                                 # BPF_MISC
            a, x = (x, x) if code & 0x80 else (a, a)
        elif kind == 5:                                 # BPF_JMP
            operand = x if code & 8 else k
            at += k if code & 0xf0 == 0 else (
                jt if _filter_test(code & 0xf0, a, operand) else jf)
        else:                                           # BPF_ALU
            a = _filter_alu(code & 0xf0, a, x if code & 8 else k)
    return 0


def _filter_test(operation, a, operand):
    return (a == operand if operation == 0x10 else
            a > operand if operation == 0x20 else
            a >= operand if operation == 0x30 else a & operand != 0)


def _filter_alu(operation, a, operand):
    results = {0x00: a + operand, 0x10: a - operand, 0x20: a * operand,
               0x30: a // operand if operand else 0, 0x40: a | operand,
               0x50: a & operand, 0x60: a << (operand & 31),
               0x70: a >> (operand & 31), 0x80: -a, 0xa0: a ^ operand}
    return results.get(operation, 0) & 0xffffffff


# ---- who may trace whom ---------------------------------------------------

def tracer_of(tid):
    """The process that traces a thread, 0 for none.

    TracerPid in /proc/TID/status names its thread, proc(5) notwithstanding.
    """
    tracer = int(read_status(tid).get("TracerPid", "0"))
    return int(read_status(tracer).get("Tgid", tracer)) if tracer else 0


_GUARD_CODE = ("import sys; sys.path.insert(0, sys.argv[1]); import ubp; "
               "ubp.guard(*map(int, sys.argv[2:]))")


def is_guardian(pid):
    """Is this the guardian of a ubp's int3s? See Guardian."""
    words = read_proc("/proc/%d/cmdline" % pid).split(b"\0")
    return pid > 0 and _GUARD_CODE.encode() in words


def is_traced_by_us(tid):
    """Is a thread traced by this very thread? ptrace has no other owner."""
    return read_status(tid).get("TracerPid") == str(syscall(SYS_gettid))


def _refusal_to_attach(pid, request, error):
    """An AttachError that says what stands in the way. -> the exception"""
    status, tracer = read_status(pid), tracer_of(pid)
    why, hint = "%s" % error.strerror, ""
    scope = read_proc("/proc/sys/kernel/yama/ptrace_scope").strip()
    uids = status.get("Uid", "").split()
    mine = int(read_status("self").get("CapEff", "0"), 16)
    if tracer and is_guardian(tracer):
        why = "traced by pid %d, the guardian of a ubp's int3s" % tracer
        hint = "ubp clean -p %d takes them out if they were left; --all in " \
            "any case" % pid
    elif tracer:
        why = "traced by pid %d (%s)" % (tracer, comm(tracer))
        hint = "detach %s from %d, or choose another process" % (
            comm(tracer), pid)
    elif scope == b"3":
        why = "ptrace_scope is 3: nobody may attach"
        hint = "boot with another kernel.yama.ptrace_scope"
    elif mine >> CAP_SYS_PTRACE & 1:
        why = "%s, though we have CAP_SYS_PTRACE: a security module, or " \
            "another user namespace" % error.strerror
    elif uids and any(uid != str(os.geteuid()) for uid in uids[:3]):
        other = next(uid for uid in uids if uid != str(os.geteuid()))
        why = "it belongs to uid %s, we are uid %d" % (other, os.geteuid())
        hint = "sudo, or run ubp as that user"
    elif scope in (b"1", b"2"):
        why = "ptrace_scope is %s and %d is not our child" % (
            scope.decode(), pid)
        hint = "sudo, or start it with: ubp … -- COMMAND"
    else:
        why = "it is not dumpable, or has capabilities that we lack"
        hint = "sudo"
    code = errno.errorcode.get(error.errno, "")
    return AttachError("attach to", "pid %d (%s)" % (pid, comm(pid)),
                       "%s: %s: %s" % (request, code, why), hint)


# That must be free: before something is begun; once the files of all modules
# are open; and to take it out again.
_LEAST_DESCRIPTORS, _LEAST_TO_ARM, _LEAST_TO_REMOVE = 16, 8, 4


def n_descriptors_left():
    """How many files this process may still open."""
    try:
        n_open = len(os.listdir("/proc/self/fd"))
    except OSError:                 # EMFILE
        return 0
    return os.sysconf("SC_OPEN_MAX") - n_open


def check_descriptors(what, pid, least=_LEAST_DESCRIPTORS):
    """Raise UbpError where too few files may be opened to look and to act.

    Whose files in /proc cannot be opened would be taken for gone, and
    probes would stay in it.
    """
    n_left = n_descriptors_left()
    if n_left < least:
        raise AttachError(what, "pid %d" % pid, "only %d more files may be "
                          "opened, %d are needed" % (
                              max(n_left, 0), least),
                          "close some, or ulimit -n 1024")


def check_target(pid):
    """Refuse what cannot be traced, before anything is touched.

    Raises AttachError, naming the reason and what the user can do.
    """
    check_descriptors("attach to", pid)
    whom = "pid %d (%s)" % (pid, comm(pid))

    def refuse(why, hint=""):
        raise AttachError("attach to", whom, why, hint)

    if os.uname().machine != "x86_64":
        refuse("this machine is %s, not x86-64" % os.uname().machine)
    status = read_status(pid) if 0 < pid < 1 << 31 else {}
    if not status:
        raise AttachError("attach to", "pid %d" % pid, "no such process")
    tgid = int(status["Tgid"])
    if tgid != pid:
        refuse("it is a thread of pid %d" % tgid, "-p %d" % tgid)
    if pid == os.getpid():
        refuse("that is ubp itself")
    if int((read_stat(pid)[6:7] or ["0"])[0]) & PF_KTHREAD:
        refuse("it is a kernel thread; it has no user memory")
    tids = thread_ids(pid)
    if status["State"][0] in "ZX" and len(tids) < 2:
        refuse("it is a zombie: it has ended, its parent (pid %s) has not "
               "waited for it" % status["PPid"])
    if tracer_of(pid) not in (0, os.getpid()):
        raise _refusal_to_attach(pid, "PTRACE_SEIZE", OSError(
            errno.EPERM, os.strerror(errno.EPERM)))
    if "shstk" in status.get("x86_Thread_features", ""):
        refuse("it runs with a shadow stack, which an injected syscall "
               "would break", "start it without GLIBC_TUNABLES "
               "glibc.cpu.x86_shstk")
    _check_access(pid, tids)


_FOREIGN = "it is a 32-bit or foreign program; ubp knows x86-64 only"


def _check_access(pid, tids):
    """May we trace it, and is it a 64-bit program? Raises AttachError."""
    for tid in [pid] + tids:        # the leader may be a zombie
        try:
            os.close(os.open("/proc/%d/mem" % tid, os.O_RDWR))
            with open("/proc/%d/exe" % tid, "rb") as file:
                head = file.read(20)
            break
        except OSError as error:
            failure = error
    else:
        if failure.errno in (errno.ENOENT, errno.ESRCH):
            raise AttachError("attach to", "pid %d" % pid, "no such process")
        raise _refusal_to_attach(pid, "open of /proc/%d/mem" % pid, failure)
    if head[:5] == b"\x7fELF\x01" or head[18:20] not in (b"\x3e\0", b""):
        raise AttachError(
            "attach to", "pid %d (%s)" % (pid, comm(pid)), _FOREIGN)


# ---- 6  Arena -------------------------------------------------------------
#
# The memory that ubp adds to a target, and the journal in it. The one idea:
# whatever is needed to undo a change lies in the target itself, so that any
# later ubp can undo it. Invariant: a site's record is complete before its
# first byte changes, and records are only ever added; whether one holds is
# decided by comparing the text with it. All that is read back from a target
# is hostile: bounded and validated before use.
#
#     code r-x   +0      header                     HEADER, 256 bytes
#                +256    vaddr of shard 0           8
#                +4096   records                    max_records of 640
#                        trampolines                to the page's end
#     data rw-   +0      shards, one per processor  1 << shift bytes each
#                        slots of calls, if wanted  at the end: see ubp_x86
#     private    +0      the target's pid           8, zero in a forked child
#                +8      the pid of such a child    8, when it was asked for
#          rw-p          frames                     wiped by fork, too
#
# A shard holds blocks: one for what a probe computes, at one offset in each
# shard. A count is a word. The private pages are there if a probe needs them.
#
#     record     +0      site slot trampoline       3 x 8
#                +24     size patches copies index  2 1 1 4
#                +32     patches: vaddr size old new    2 x 32
#                +96     copies: offset size moved moved_size    27 x 8
#                +312    build-id, window's size    20, 1
#                +333    kind of block, is it gone  1 1
#                +336    module NUL function NUL    298, UTF-8
#                +634    of a table: words of an entry, words before its
#                        payload, log2 of entries, site's index   2 1 1 2

MAGIC = b"ubp\x7fARNA"
VERSION = 5
HEADER = struct.Struct("<8sIIQQQQIIQQIIQQIIIIIIQQ")
_RECORD_HEAD = struct.Struct("<QQQHBBI")
_PATCH = struct.Struct("<QB7x8s8s")
_COPY = struct.Struct("<BBHHH")
_TABLE = struct.Struct("<HBBH")
_LITERAL_AT, _RECORDS_AT, _RECORD_SIZE = 256, 4096, 640
_COPIES_AT, _MOST_COPIES = 96, ubp_x86.MAX_LOOPED       # in a record
_BUILD_ID_AT = _COPIES_AT + _MOST_COPIES * _COPY.size
_NAMES_AT = _BUILD_ID_AT + 24
_MAX_RECORDS = 1 << 16
_MAX_SHARDS = 8192          # CONFIG_NR_CPUS has no higher limit
_MAX_SIZE = 1 << 32
_MAX_DATA = 512 << 20       # of an arena; what needs more is refused
_MAX_PRIVATE = 64 << 20
FLAG_LEFT = 1               # detached on purpose: no tracer is to be awaited
_TASK_SIZE = 1 << 47
_TRAMPOLINE_ROOM = 128      # bytes kept per site when an arena is sized
_BRK_ROOM = 1 << 30         # kept free above brk where that is possible
_STACK_ROOM = 256 << 20     # kept free below [stack]
_MEMFD_PATH = "/memfd:ubp (deleted)"
_ANONYMOUS = -1 << 16       # stands for a descriptor; no errno
# What a record's block is; "count" is a word, the others begin with a head.
# Where none is left but for older trampolines it is "none"; "lent", where the
# window is only there for the slot of another; "own", of a SignalCount.
KINDS = ("count", "filtered", "sum", "hist", "signed hist", "table", "ring",
         "none", "lent", "own")


class Header(NamedTuple):
    """The first bytes of an arena, in the order of HEADER."""
    magic: bytes
    version: int
    record_size: int
    base: int               # vaddr of the code mapping
    size: int               # code and data, bytes; private pages follow
    code_size: int
    nonce: int
    owner_pid: int
    owner_uid: int
    owner_birth: int
    owner_namespace: int    # inode of the owner's pid namespace
    target: int             # tgid that was armed; children have others
    flags: int
    target_birth: int
    time_ns: int            # CLOCK_REALTIME
    n_records: int
    max_records: int
    trampolines_at: int
    shard_mask: int
    shard_shift: int
    is_anonymous: int
    scratch: int            # end of the [stack] pages that ubp touched, or 0
    private_size: int       # bytes behind base + size that fork wipes


assert HEADER.size <= _LITERAL_AT and len(Header._fields) == 23


class Record(NamedTuple):
    """What was done at one site, and how to undo it."""
    site: int
    slot: int
    trampoline: int         # vaddr
    size: int               # of the trampoline
    index: int              # of its block's first word in a shard
    window_size: int
    patches: tuple          # ((vaddr, old, new), …) in the order of arming
    copies: tuple           # of ubp_x86.Copy
    build_id: str
    module: str
    function: str
    kind: str = "count"     # of KINDS: what the block is
    is_gone: bool = False   # it computes no more; others at the site may
    table: tuple = (0, 0, 0, 0)     # as _TABLE has it

    def pack(self):
        """640 bytes for the journal."""
        patches = b"".join(
            _PATCH.pack(vaddr, len(new), old.ljust(8, b"\0"),
                        new.ljust(8, b"\0"))
            for vaddr, old, new in self.patches)
        copies = b"".join(_COPY.pack(*copy) for copy in self.copies)
        names = _clipped(self.module, 100) + _clipped(self.function, 188)
        return (_RECORD_HEAD.pack(
                    self.site, self.slot, self.trampoline, self.size,
                    len(self.patches), len(self.copies), self.index)
                + patches.ljust(64, b"\0")
                + copies.ljust(_COPY.size * _MOST_COPIES, b"\0")
                + bytes.fromhex(self.build_id)[:20].ljust(20, b"\0")
                + bytes([self.window_size, KINDS.index(self.kind),
                         self.is_gone, 0])
                + names.ljust(_RECORD_SIZE - _NAMES_AT - _TABLE.size, b"\0")
                + _TABLE.pack(*self.table))


def _clipped(text, size):
    data = text.encode(errors="backslashreplace")[:size]
    return data.decode(errors="ignore").encode() + b"\0"


def unpack_record(data, header):
    """A Record from hostile bytes, or None if it does not make sense."""
    (site, slot, trampoline, size, n_patches, n_copies,
     index) = _RECORD_HEAD.unpack_from(data)
    code_end = header.base + header.code_size
    window_size, kind, is_gone = data[_BUILD_ID_AT + 20:_NAMES_AT - 1]
    if (not 1 <= n_patches <= 2 or not 1 <= n_copies <= _MOST_COPIES
            or not header.base <= trampoline <= trampoline + size <= code_end
            or not window_size or 8 * index + 8 > 1 << header.shard_shift
            or kind >= len(KINDS)):
        return None
    patches = []
    for n in range(n_patches):
        vaddr, length, old, new = _PATCH.unpack_from(data, 32 + 32 * n)
        if (not 1 <= length <= 8 or vaddr + length > _TASK_SIZE
                or vaddr % PAGE + length > PAGE
                or header.base - length < vaddr < header.base + header.size
                + header.private_size):
            return None
        patches.append((vaddr, old[:length], new[:length]))
    is_trap = n_patches == 1 and patches[0][2] == ubp_x86.BREAKPOINT
    window = collections.namedtuple("Jump", "site slot is_trap")(
        site, slot, is_trap)
    try:
        jumps = ubp_x86.window_patches(window, trampoline)
    except RelocationError:
        return None
    if jumps != tuple((vaddr, new) for vaddr, _, new in patches):
        return None
    copies = tuple(ubp_x86.Copy(*_COPY.unpack_from(
        data, _COPIES_AT + _COPY.size * n)) for n in range(n_copies))
    build_id = data[_BUILD_ID_AT:_BUILD_ID_AT + 20]
    names = data[_NAMES_AT:].split(b"\0")
    return Record(site, slot, trampoline, size, index, window_size,
                  tuple(patches), copies,
                  build_id.hex() if any(build_id) else "",
                  *(name.decode(errors="backslashreplace")
                    for name in names[:2]),
                  kind=KINDS[kind], is_gone=bool(is_gone),
                  table=_TABLE.unpack_from(data, _RECORD_SIZE - _TABLE.size))


def unpack_header(data):
    """A Header from hostile bytes, or None if it does not make sense."""
    if len(data) < HEADER.size:
        return None
    header = Header(*HEADER.unpack_from(data))
    if (header.magic != MAGIC or header.version != VERSION
            or header.record_size != _RECORD_SIZE
            or header.base % PAGE or header.size % PAGE
            or header.code_size % PAGE
            or not 0 < header.code_size < header.size <= _MAX_SIZE
            or header.private_size % PAGE
            or header.private_size > _MAX_PRIVATE
            or header.base + header.size + header.private_size > _TASK_SIZE
            or header.n_records > header.max_records
            or header.max_records > _MAX_RECORDS
            or header.shard_mask & header.shard_mask + 1
            or header.shard_mask >= _MAX_SHARDS
            or _RECORDS_AT + _RECORD_SIZE * header.max_records
            > header.code_size
            or not 3 <= header.shard_shift <= 28
            or (header.shard_mask + 1) << header.shard_shift
            > header.size - header.code_size):
        return None
    return header


class ArenaView(NamedTuple):
    """An arena as found in some process: mappings, header, valid records."""
    pid: int
    ranges: tuple           # ((start, end), …) of its vmas
    inode: int              # of the memfd; 0 for anonymous memory
    header: Optional[Header]        # None: mapped, but never written
    records: tuple
    n_bad: int              # records that failed validation
    slack: tuple = ()       # ((start, end), …) of slack that it is in


def find_arenas(pid, maps=None):
    """The arenas mapped in a process, from its maps alone. -> [ArenaView]

    A memfd names itself; others are known by their magic.
    """
    groups, found = {}, []
    memory = memory_tid(pid)
    maps = read_maps(memory) if maps is None else maps
    for mapping in maps:
        if mapping.path == _MEMFD_PATH and pid != os.getpid():
            groups.setdefault(mapping.inode, []).append(mapping)
        elif (not mapping.inode and not mapping.path.startswith("[")
              and mapping.perms == "r-xp"):
            groups.setdefault(("anonymous", mapping.start),
                              []).append(mapping)
    for key, mappings in groups.items():
        inode = key if isinstance(key, int) else 0
        view = _view(memory, inode, mappings, maps)._replace(pid=pid)
        if view.header is not None or inode:
            found.append(view)
    return found + [view for mapping in maps if mapping.perms == "r-xp"
                    and mapping.inode
                    for view in _slack_views(pid, memory, mapping)]


def _view(pid, inode, mappings, maps):
    """The ArenaView of some mappings; a record must be about text."""
    start = mappings[0].start
    ranges = _joined((m.start, m.end) for m in mappings)
    try:
        header = unpack_header(read_memory(pid, start, PAGE))
        if header is None or header.base != start:
            return ArenaView(pid, ranges, inode, None, (), 0)
        if inode and sum(end - low for low, end in ranges) != header.size:
            return ArenaView(pid, ranges, inode, None, (), 0)
        if not inode:
            ranges = ((start, start + header.size),)
            if not _is_private_arena(header, mappings[0], maps):
                return ArenaView(pid, ranges, inode, None, (), 0)
        ranges = _with_private_pages(ranges, header, maps)
        data = read_memory(pid, start + _RECORDS_AT,
                           _RECORD_SIZE * header.n_records)
    except OSError:
        return ArenaView(pid, ranges, inode, None, (), 0)
    pieces = [data[at:at + _RECORD_SIZE]
              for at in range(0, len(data), _RECORD_SIZE)]
    records = [unpack_record(piece, header) for piece in pieces
               if any(piece)]       # a void one is zero
    text = [m for m in maps if "x" in m.perms and "w" not in m.perms
            and m.path != _MEMFD_PATH]
    starts = [mapping.start for mapping in text]
    valid = tuple(record for record in records if record is not None
                  and all(_is_in(text, starts, vaddr)
                          for vaddr, _, _ in record.patches))
    return ArenaView(pid, ranges, inode, header, valid,
                     len(records) - len(valid))


def _is_private_arena(header, code, maps):
    """Are these an anonymous code mapping and data right behind it?"""
    at, end = code.end, header.base + header.size
    for mapping in maps:
        if (mapping.start <= at < mapping.end and not mapping.inode
                and not mapping.path and mapping.perms == "rw-p"):
            at = mapping.end        # it may have merged with a neighbour
    return code.end == header.base + header.code_size and at >= end


def _with_private_pages(ranges, header, maps):
    """The ranges of an arena, and of its private pages if they are there.

    They have no name, but a place, and differ from what malloc may map
    there in that fork wipes them: so they merge with no neighbour.
    """
    start = header.base + header.size
    end = start + header.private_size
    if any(m.start == start < m.end == end and m.perms == "rw-p"
           and not m.inode and not m.path for m in maps):
        return _joined(ranges + ((start, end),))
    return ranges


def _joined(ranges):
    """Neighbouring ranges as one: one munmap then takes out both."""
    joined = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return tuple(joined)


def _is_in(mappings, starts, vaddr):
    at = bisect.bisect_right(starts, vaddr) - 1
    return at >= 0 and vaddr < mappings[at].end


def place_arena(maps, low, high, size):
    """Where an arena for code in [low, high) may be mapped. -> vaddr, or 0

    Below the code, nearest first, so that brk and mmap are not in its way;
    else above, as far from brk as reach allows. Never right below [stack].
    Bodies of one trampoline have data in several arenas: as far as there
    is room, these lie within reach of each other, too.
    """
    floor = max(65536, int(read_proc("/proc/sys/vm/mmap_min_addr") or 0))
    reach_low, reach_high = ubp_x86.reach(low, high)
    near = max(floor, reach_low, high - (1 << 30))
    together = near, min(reach_high, ubp_x86.reach(near, near)[1])
    return (_place_within(maps, low, high, size, floor, together)
            or _place_within(maps, low, high, size, floor,
                             (reach_low, reach_high)))


def _place_within(maps, low, high, size, floor, limits):
    """place_arena, in [limits[0], limits[1])."""
    reach_low, reach_high = limits
    below, above = [], []
    previous, brk = floor, 0
    for mapping in list(maps) + [Mapping(_TASK_SIZE - PAGE, _TASK_SIZE, "",
                                         0, "", 0, "")]:
        start, end = previous, mapping.start
        if mapping.path == "[stack]":
            end -= min(_STACK_ROOM, (end - start) // 2)
        start, end = max(start, reach_low), min(end, reach_high)
        if end - start >= size + 2 * PAGE:
            last = (end - size - PAGE) & ~(PAGE - 1)
            if mapping.start <= low:
                below.append((last, previous == brk
                              and last - brk < _BRK_ROOM))
            else:
                above.append((last, previous == brk
                              and last - brk < _BRK_ROOM))
        previous = max(previous, mapping.end)
        if mapping.path == "[heap]" or mapping.end == high:
            brk = mapping.end
    choices = below[::-1] + above
    choices.sort(key=lambda choice: choice[1])
    return choices[0][0] if choices else 0


def n_possible_cpus():
    """Processors the kernel may ever use; their numbers are below it."""
    text = read_proc("/sys/devices/system/cpu/possible").decode()
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return max(numbers) + 1 if numbers else os.cpu_count() or 1


def find_arena_range(maps, vaddr):
    """The (start, end) of the memfd mapping of ubp round a vaddr, or None."""
    return next(((m.start, m.end) for m in maps
                 if m.start <= vaddr < m.end and m.path == _MEMFD_PATH), None)


class ArenaLayout(NamedTuple):
    """How much memory an arena has, and for what. Bytes, whole pages."""
    size: int               # code and data
    code_size: int
    max_records: int
    shard_shift: int
    private_size: int
    calls_size: int = 0     # at the end of the data

    @property
    def total(self):
        """The size of its range of vaddrs."""
        return self.size + self.private_size


def pack_header(tracer, base, layout, shards, nonce, flags, n_records,
                is_anonymous):
    """The header of an arena that this process makes in a target."""
    return HEADER.pack(
        MAGIC, VERSION, _RECORD_SIZE, base, layout.size, layout.code_size,
        nonce, os.getpid(), os.getuid(), start_time(os.getpid()),
        _pid_namespace(), tracer.tgid, flags, tracer.birth,
        int(time.time() * 1e9), n_records, layout.max_records,
        _RECORDS_AT + _RECORD_SIZE * layout.max_records, shards.mask,
        shards.shift, is_anonymous, tracer.scratch, layout.private_size)


class Arena:
    """Memory in the target for the probes near one group of modules.

    memory   a shared mapping of our own, or None for anonymous memory,
             which is written through /proc/PID/mem
    slack    ((start, end), …) if it is in memory that was there anyway
    """

    slack = ()

    def __init__(self, tracer, base, layout, shards, memory, inode):
        self.tracer, self.base, self.shards = tracer, base, shards
        self.layout = layout
        self.size, self.code_size = layout.size, layout.code_size
        self.memory, self.inode = memory, inode
        self.next = base + _RECORDS_AT + _RECORD_SIZE * layout.max_records
        self.records = []
        self._used = 0              # bytes of a shard that are blocks
        self._private_used = 16     # and of the private pages: _fill_private
        self._calls_used = 0        # and of the slots of calls
        self._last = {}             # {(offset, size): sums when last read}
        self.nonce = int.from_bytes(os.urandom(8), "little")
        self._flags = 0
        self._kept = self._kept_last = self._kept_private = None
        self._is_lost = False       # by exec
        self.ring_owner = None      # for hits that wait
        self._write_header()
        self.store(_LITERAL_AT, struct.pack("<Q", base + self.code_size))

    @property
    def range(self):
        """(start, end) in the target, private pages included."""
        return self.base, self.base + self.layout.total

    @property
    def private(self):
        """The vaddr of the private pages, or 0 if it has none."""
        return self.base + self.size if self.layout.private_size else 0

    def _write_header(self):
        """The magic last: without it, an arena is one that was not finished.
        """
        header = pack_header(
            self.tracer, self.base, self.layout, self.shards, self.nonce,
            self._flags, len(self.records), self.memory is None)
        self.store(len(MAGIC), header[len(MAGIC):])
        self.store(0, MAGIC)

    def store(self, offset, data):
        """Write into the arena; the target may be running."""
        if self.memory is not None:
            self.memory[offset:offset + len(data)] = data
            return
        held = HeldFile("/proc/%d/mem" % self.tracer.vm_tid(), os.O_RDWR)
        try:
            held.write(self.base + offset, data)
        finally:
            held.close()

    def store_word(self, cpu, offset, value):
        """Write a word of a block of one processor, if it is there still."""
        if self._kept is None:
            self.store(self.shard_at(cpu) + offset, struct.pack("<Q", value))

    def has_room(self, low, high, need):
        """Can code in [low, high) jump here, and is there room for more?

        need   Need of what is to be added
        """
        first, last = ubp_x86.reach(low, high)
        return (first <= self.base and self.range[1] <= last
                and len(self.records) + need.n_records
                <= self.layout.max_records
                and self.next + need.code <= self.base + self.code_size
                and _aligned(self._used, need.block) + need.block
                <= 1 << self.shards.shift
                and self._calls_used + need.calls <= self.layout.calls_size
                and (not need.private or self.private and _aligned(
                    self._private_used, need.private) + need.private
                    <= self.layout.private_size))

    def allocate(self, size, initial=b""):
        """A block: size bytes at one offset in every shard. -> offset

        initial   what it begins with; the rest is zero
        """
        offset = _aligned(self._used, size)
        self._used = offset + size
        if initial.strip(b"\0"):
            for cpu in range(self.shards.mask + 1):
                self.store(self.shard_at(cpu) + offset, initial)
        return offset

    def allocate_private(self, size):
        """Bytes of the private pages, all zero. -> vaddr"""
        at = _aligned(self._private_used, size)
        self._private_used = at + size
        return self.private + at

    def allocate_calls(self):
        """Slots of calls, if there is room. -> offset in the arena"""
        used, size = self._calls_used, self.layout.calls_size
        if used + ubp_x86.CALLS_SIZE > size:
            raise ProbeError("call a function for", self.tracer.name(),
                             "its memory has no slots for it")
        self._calls_used = used + _pages(ubp_x86.CALLS_SIZE)
        return self.size - size + used

    def shard_at(self, cpu):
        """The offset of a processor's shard in the arena."""
        return self.code_size + (cpu << self.shards.shift)

    def add(self, window, old, names, block, make, size=0):
        """Write a trampoline and its record for a window. -> Record

        old     {vaddr: bytes} that were there before any probe
        names   (build-id, module, function)
        block   (kind, offset, table) of the data that the record is about
        make    makes a ubp_x86.Trampoline for a vaddr; its size is the same
                for each of them
        size    of it, if that is known
        Nothing refers to it yet. Raises RelocationError if an operand is
        out of reach from here.
        """
        first = ubp_x86.line_start(self.next, size)
        made = make(first)
        start = ubp_x86.line_start(first, len(made.code))
        if start != first:
            made = make(start)
        if start + len(made.code) > self.base + self.code_size:
            raise RelocationError("its arena is full", window.site,
                                  "out of reach")
        self.next = start + len(made.code)
        self.store(start - self.base, made.code)
        record = Record(
            window.site, window.slot, start, len(made.code), block[1] // 8,
            window.size,
            tuple((vaddr, old[vaddr][:len(new)], new) for vaddr, new
                  in ubp_x86.window_patches(window, start)),
            made.copies, names[0], names[1], names[2], block[0],
            table=block[2])
        self.records.append(record)
        self._write_record(len(self.records) - 1)
        return record

    def _write_record(self, n):
        record = self.records[n]
        self.store(_RECORDS_AT + _RECORD_SIZE * n, record.pack() if record
                   else bytes(_RECORD_SIZE))

    def mark_gone(self, record):
        """Say that a record's probe was taken out, though others stay."""
        n = self.records.index(record)
        self.records[n] = record._replace(is_gone=True)
        self._write_record(n)

    def void(self, record):
        """Take back the record of a site that was never patched."""
        n = self.records.index(record)
        self.records[n] = None
        self._write_record(n)

    def commit(self):
        """Publish the records that were added: the journal is complete."""
        self._write_header()

    def mark_left(self):
        """Say in the header that no tracer will come back."""
        self._flags |= FLAG_LEFT
        self._write_header()

    def sums(self, offset, n):
        """n words of a block, each summed over the processors. -> [int]"""
        return [sum(column) for column in zip(*self.rows(offset, n))]

    def rows(self, offset, n):
        """n words of a block of each processor. -> [(int, …)]

        Of anonymous memory in a process that is gone, as last read.
        """
        try:
            rows = [self.words(cpu, offset, n)
                    for cpu in range(self.shards.mask + 1)]
        except OSError:
            return self._last.get(offset) or [(0,) * n]
        if self.memory is None:
            self._last[offset] = rows
        return rows

    def words(self, cpu, offset, n):
        """n words of a block of one processor. -> (int, …)"""
        return struct.unpack("<%dQ" % n, self.load(cpu, offset, 8 * n))

    def load(self, cpu, offset, size):
        """Bytes of a block of one processor; the target may write them."""
        kept, memory = self._kept, self.memory
        if kept is not None:
            return kept[cpu][offset:offset + size]
        at = self.shard_at(cpu) + offset
        if memory is None:
            if self._is_lost:
                raise ProcessLookupError
            return read_memory(self.tracer.vm_tid(), self.base + at, size)
        try:
            return memory[at:at + size]
        except ValueError:          # closed meanwhile, by another thread
            return self._kept[cpu][offset:offset + size]

    def load_private(self, vaddr, size):
        """Bytes of the private pages; as kept, when they are gone."""
        if self._kept_private is None:
            try:
                return read_memory(self.tracer.vm_tid(), vaddr, size)
            except OSError:
                return b""
        at = vaddr - self.private
        return self._kept_private[at:at + size]

    def keep_private(self):
        """Copy the private pages, to be read when they are gone."""
        if self.private:
            self._kept_private = self.load_private(
                self.private, self._private_used)

    def keep(self):
        """Copy all blocks, to be read when the memory is gone."""
        self.keep_private()
        try:
            kept = [self.load(cpu, 0, self._used)
                    for cpu in range(self.shards.mask + 1)]
        except OSError:             # the process is: as last read, then
            kept = None
        self._kept_last = kept

    def lose(self):
        """Its process is another program now: look there no more."""
        self._kept_private = self._kept_private or b""
        self._is_lost = True

    def n_fitting(self, items, need_of, span_of):
        """How many of the first of items there is room for.

        need_of, span_of   the Need, and the [low, high) of code, of items
        """
        n = len(items)
        while n and not self.has_room(*span_of(items[:n]),
                                      need_of(items[:n])):
            n //= 2
        return n

    def own_rings(self):
        """The vaddr of the word that tells waiting hits of our death."""
        if self.memory is None:
            raise ProbeError("wait for the reader in", self.tracer.name(),
                             "its memory is not shared with ubp",
                             "overflow=drop")
        if self.ring_owner is None or self.ring_owner.is_closed:
            self.ring_owner = RingOwner(self)
        return self.ring_owner.vaddr

    def close(self):
        """Give up our own mapping; what was kept can still be read."""
        if self.ring_owner is not None:
            self.ring_owner.close()
            self.ring_owner = None
        if self.memory is not None:
            self.keep()
            self._kept = self._kept_last
            memory, self.memory = self.memory, None
            for _ in range(100):
                try:
                    memory.close()
                    break
                except BufferError:     # a reader wakes who waits just now;
                    time.sleep(0.0005)  # else it goes with its last user
        else:
            self._kept = self._kept_last


def _pid_namespace():
    return _namespace_of(os.getpid())


def _namespace_of(pid):
    try:
        return os.stat("/proc/%d/ns/pid" % pid).st_ino
    except OSError:
        return 0


class Need(NamedTuple):
    """What probing takes of an arena."""
    n_records: int
    code: int               # bytes of trampolines, and what aligns them
    block: int              # bytes in every shard
    private: int            # bytes of the private pages; 0: none are needed
    calls: int = 0          # bytes of the slots of calls

    def __add__(self, other):
        return Need(*[one + two for one, two in zip(self, other)])


def _aligned(offset, size):
    """Where a block of size bytes may begin: none shares a line in part."""
    line = ubp_x86.CACHE_LINE if size > 8 else 8
    return (offset + line - 1) & -line


def _pages(size):
    return (size + PAGE - 1) & -PAGE


def _layout(need, n_shards, whom):
    """-> ArenaLayout for a Need. Raises ProbeError.

    With room for more: who probes one function will probe another.
    """
    n = max(64, 1 << (need.n_records - 1).bit_length())
    code = _pages(_RECORDS_AT + n * (_RECORD_SIZE + _TRAMPOLINE_ROOM)
                  + need.code)
    shift = (8 * n + need.block - 1).bit_length()
    data = _pages(n_shards << shift)
    private = need.private and _pages(need.private + 64)
    if data > _MAX_DATA or private > _MAX_PRIVATE:
        raise ProbeError(
            "add memory to", whom, "its probes need %d MiB for %d "
            "processors, and ubp adds %d MiB at most" % (
                max(data, private) >> 20, n_shards, _MAX_DATA >> 20),
            "fewer sites, or a smaller ring")
    calls = _pages(need.calls)
    return ArenaLayout(code + data + calls, code, n, shift, private, calls)


def make_arena(tracer, low, high, need, timeout, kind="auto"):
    """Add an arena near code in [low, high) to the target. -> Arena

    need   the Need of what it is made for
    kind   "memfd", "anon", or "auto": memfd, else anonymous memory
    One full stop, in which one thread runs the injected syscalls. Raises
    ProbeError where there is no room or no memory.
    """
    n_shards = 1 << (n_possible_cpus() - 1).bit_length()
    layout = _layout(need, n_shards, tracer.name())
    base = place_arena(read_maps(tracer.vm_tid()), low, high, layout.total)
    held = []           # our descriptors, of attempts that failed as well

    def action():
        nonlocal base
        if not base:
            raise ProbeError(
                "place an arena in", tracer.name(),
                "no %d free KiB within 2 GiB of 0x%x" % (
                    layout.total >> 10, low))
        source, offset = cpu_source(tracer)
        shards = ubp_x86.Shards(source, offset, n_shards - 1,
                                layout.shard_shift, base + _LITERAL_AT)
        fd = _inject_arena(tracer, base, layout, shards, kind, held)
        if fd == -errno.EEXIST:     # taken since the maps were read
            base = place_arena(read_maps(tracer.vm_tid()), low, high,
                               layout.total)
            raise Again("the place for its arena is taken")
        if fd < 0 and fd != _ANONYMOUS:
            raise ProbeError("map memory into", tracer.name(),
                             os.strerror(-fd))
        return shards, fd

    try:
        shards, fd = tracer.pause(action, timeout, "map the arena")
        return _fill(tracer, base, layout, shards, fd, timeout)
    finally:
        for fd in held:
            os.close(fd)


def _fill(tracer, base, layout, shards, fd, timeout):
    """Give an arena that is mapped its memory. -> Arena"""
    try:
        if fd < 0:
            arena = Arena(tracer, base, layout, shards, None, 0)
        else:
            arena = _adopt(tracer, base, layout, shards, fd)
        _fill_private(arena)
        return arena
    except OSError as error:
        unmap(tracer, [(base, base + layout.total)], timeout)
        raise ProbeError("allocate memory for", tracer.name(),
                         error.strerror)


def _inject_arena(tracer, base, layout, shards, kind, held):
    """Map an arena at base. -> our descriptor, _ANONYMOUS, or -errno

    held   a list of descriptors to be closed whatever comes; gets ours
    """
    fd = -1
    with Injection(tracer, b"ubp\0") as injection:
        if _may_have_memfd(injection, base, layout, kind):
            fd = _map_memfd(injection, base, layout, pack_header(
                tracer, base, layout, shards, 0, 0, 0, False), held)
        if fd < 0 and fd != -errno.EEXIST and kind != "memfd":
            fd = _map_twice(injection, base, layout, MAP_PRIVATE
                            | MAP_ANONYMOUS, -1) or _ANONYMOUS
        if fd == _ANONYMOUS:        # nothing else would tell what it is
            tracer.write_text(base, pack_header(
                tracer, base, layout, shards, 0, 0, 0, True))
    return fd


def _fill_private(arena):
    """Touch the private pages; the first word is the target's own pid. The
    second a forked child fills in itself: ubp_x86, pid in an expression.
    """
    size, tid = arena.layout.private_size, arena.tracer.vm_tid()
    if size:
        name = read_status(arena.tracer.tgid).get("NSpid", "").split()
        pid = int(name[-1]) if name else arena.tracer.tgid
        for at in range(0, size, 1 << 20):
            write_memory(tid, arena.private + at, bytes(
                min(1 << 20, size - at)))
        write_memory(tid, arena.private, struct.pack("<Q", pid))


def _adopt(tracer, base, layout, shards, fd):
    """Allocate, seal and map the memfd on our side. Raises OSError.

    Allocated and touched here: a first touch by the target could be the
    one that its memory cgroup kills it for.
    """
    os.posix_fallocate(fd, 0, layout.size)
    libc.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
    memory = mmap.mmap(fd, layout.size, mmap.MAP_SHARED,
                       mmap.PROT_READ | mmap.PROT_WRITE)
    return Arena(tracer, base, layout, shards, memory, os.fstat(fd).st_ino)


def _may_have_memfd(injection, base, layout, kind):
    """Do its seccomp filters allow all that is injected until the end?

    Asked before the first call. False: anonymous memory must do. Raises
    ProbeError if that is forbidden too.
    """
    size, flags = layout.size, MAP_FIXED_NOREPLACE
    injection.check(SYS_munmap, base, layout.total)
    if layout.private_size:
        injection.check(SYS_mmap, base + size, layout.private_size,
                        PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS
                        | flags, -1, 0)
        injection.check(SYS_madvise, base + size, layout.private_size,
                        MADV_WIPEONFORK)
    try:
        if kind == "anon":
            raise ProbeError("use a memfd in", "the target", "not asked for")
        injection.check(SYS_memfd_create, injection.text_vaddr, MFD_CLOEXEC
                        | MFD_ALLOW_SEALING)
        injection.check(SYS_close, 3)
        sharing, fd, is_memfd = MAP_SHARED, 3, True
    except ProbeError:
        if kind == "memfd":
            raise
        sharing, fd, is_memfd = MAP_PRIVATE | MAP_ANONYMOUS, -1, False
    injection.check(SYS_mmap, base, size, PROT_READ | PROT_EXEC,
                    sharing | flags, fd, 0)
    injection.check(SYS_mmap, base, size, PROT_READ | PROT_WRITE,
                    sharing | MAP_FIXED, fd, 0)
    return is_memfd


def _map_memfd(injection, base, layout, header, held):
    """memfd_create, mmap code, mmap data, close. -> our fd, or -errno

    All in one stop, so no thread of the target sees the descriptor, or
    gets another number for its own. The header is there before the private
    pages, which have no name: only it tells what they are, if we die.
    """
    size = layout.size
    remote = injection.call(SYS_memfd_create, injection.text_vaddr,
                            MFD_CLOEXEC | MFD_ALLOW_SEALING)
    if remote == -errno.EACCES:                 # sysctl vm.memfd_noexec
        remote = injection.call(SYS_memfd_create, injection.text_vaddr,
                                MFD_CLOEXEC | MFD_NOEXEC_SEAL)
    if remote < 0:
        return remote
    path = "/proc/%d/fd/%d" % (injection.tid, remote)
    fd = own = _open(path.encode(), os.O_RDWR | os.O_CLOEXEC)
    held += [own] * (own >= 0)
    if own < 0:
        fd = -ctypes.get_errno()
    elif libc.ftruncate(own, ctypes.c_long(size)) != 0:
        fd = -ctypes.get_errno()
    else:
        libc.pwrite(own, header, ctypes.c_size_t(len(header)),
                    ctypes.c_long(0))
        fd = _map_twice(injection, base, layout, MAP_SHARED, remote) or own
    if own < 0 or _file_id(b"/proc/self/fd/%d" % own) == _file_id(
            path.encode()):
        injection.call(SYS_close, remote)
    return fd


def _map_twice(injection, base, layout, flags, fd):
    """Inject mmap of all as code, and of a part as data. -> 0, or -errno"""
    size, code_size = layout.size, layout.code_size
    result = _map(injection, base, size, PROT_READ | PROT_EXEC,
                  flags | MAP_FIXED_NOREPLACE, fd, 0)
    if result == 0:
        result = _map(injection, base + code_size, size - code_size,
                      PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd,
                      0 if flags & MAP_ANONYMOUS else code_size)
        if result == 0 and layout.private_size:
            result = _map_private(injection, base + size,
                                  layout.private_size)
        if result < 0:
            injection.call(SYS_munmap, base, size)
    return result


def _map_private(injection, vaddr, size):
    """Inject an anonymous mmap that fork wipes. -> 0, or -errno"""
    result = _map(injection, vaddr, size, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0)
    if result == 0:
        result = injection.call(SYS_madvise, vaddr, size, MADV_WIPEONFORK)
        if result < 0:
            injection.call(SYS_munmap, vaddr, size)
    return result


def _map(injection, base, size, prot, flags, fd, offset):
    """An injected mmap at exactly base. -> 0, or -errno"""
    result = injection.call(SYS_mmap, base, size, prot, flags, fd, offset)
    if result == base:
        return 0
    if result >= 0:                 # a kernel without MAP_FIXED_NOREPLACE
        injection.call(SYS_munmap, result, size)
        return -errno.EEXIST
    return result


def _file_id(path):
    """(device, inode) of a path, without giving up the GIL; else None."""
    name = ctypes.create_string_buffer(path)
    info = ctypes.create_string_buffer(256)
    if _syscall(SYS_stat, ctypes.addressof(name), ctypes.addressof(info),
                0, 0, 0) != 0:
        return None
    return info.raw[:16]            # st_dev, st_ino: <asm/stat.h>


def cpu_source(tracer):
    """How a body learns its processor. -> (source, offset of rseq.cpu_id)

    rseq only where every thread reports the same place from its fs base,
    and no module starts threads by clone itself: such a thread may have no
    memory there. Called with all threads stopped.
    """
    offsets = set()
    for thread in tracer.threads.values():
        pointer = (rseq_configuration(thread.tid)
                   if thread.state == STOPPED else None)
        offsets.add(pointer and pointer + 4
                    - ubp_x86.thread_pointer(thread.regs))
    offset = offsets.pop() if len(offsets) == 1 else None
    if offset and abs(offset) < 1 << 30 and not tracer.starts_raw_threads:
        return ubp_x86.CPU_FROM_RSEQ, offset
    flags = read_proc("/proc/cpuinfo")
    if re.search(rb"^flags\b.*\brdpid\b", flags, re.M):
        return ubp_x86.CPU_FROM_RDPID, 0
    return ubp_x86.CPU_FROM_LSL, 0


# Where the C libraries keep a thread's tid: pthread_t, <nptl/descr.h> of
# glibc, <pthread_impl.h> of musl 1.2 and of 1.1.
_TID_OFFSETS = (0x2d0, 0x30, 0x38)


def tid_source(tracer):
    """The offset of a thread's tid from its fs base, or None.

    Only what every thread agrees on, and no module starts threads by clone
    itself. Called with all threads stopped.
    """
    offsets = set(_TID_OFFSETS)
    is_own = _namespace_of(tracer.tgid) == _pid_namespace()
    for thread in tracer.threads.values():
        if thread.state != STOPPED or thread.tgid != tracer.tgid:
            continue
        name = thread.tid if is_own else int(
            read_status(thread.tid).get("NSpid", "0").split()[-1])
        base = ubp_x86.thread_pointer(thread.regs)
        for offset in list(offsets):
            try:
                data = read_memory(thread.tid, base + offset, 4)
            except OSError:
                data = b""
            if int.from_bytes(data, "little") != name:
                offsets.discard(offset)
    if len(offsets) != 1 or tracer.starts_raw_threads:
        return None
    return offsets.pop()


def check_tsc(tracer, injection):
    """Refuse a target that may not read the time stamp counter.

    prctl(2), PR_GET_TSC; it is inherited, so one thread speaks for all.
    """
    if injection.call(SYS_prctl, PR_GET_TSC, injection.text_vaddr) < 0:
        return
    if read_memory(injection.tid, injection.text_vaddr,
                   1)[0] != PR_TSC_ENABLE:
        raise ProbeError("take the time in", tracer.name(), "it made the "
                         "time stamp counter fault (prctl PR_SET_TSC)",
                         "count and hist need no clock")


def unmap(tracer, ranges, timeout):
    """munmap ranges in the target, by injection, if they are arenas."""
    def action():
        maps = read_maps(tracer.vm_tid())
        with Injection(tracer) as injection:
            for start, end in ranges:
                if find_arena_range(maps, start):
                    injection.call(SYS_munmap, start, end - start)
    tracer.pause(action, timeout, "unmap")


# -- the slack arena ----------------------------------------------------------
#
# Where no syscall may be injected, nothing can be mapped. But the kernel maps
# whole pages, and a module seldom fills its last ones: the code goes behind
# the end of its text, one shard of data behind the end of its data, or of the
# program's. Both are private to the process, writable to a tracer, and zero
# again afterwards.
#
#     text  r-x   end of the segment
#                 trampolines, upwards
#                 records, downwards             28 and 4 for each copy
#                 header                         SLACK, 88 bytes
#           page's end
#     data  rw-   end of the segment, and its bss
#                 the shard
#           page's end
#
#     record     -1      copies                     1
#                -28     site slot trampoline       3 x 4, from the header
#                        size index window's size   2 2 1
#                        kind of block, flags       1 1
#                        the bytes that were there  8: slot, site
#                before  copies: offset size moved moved_size   1 1 2 2 each

SLACK_MAGIC = b"ubp\x7fSLCK"
SLACK = struct.Struct("<8sHHIQQQQQQQQI4x")
_SLACK_RECORD = struct.Struct("<iiiHHBBB8sB")
_SLACK_COPY = struct.Struct("<BBHH")
_IS_SYSCALL = 0x80              # a flag of a copy's size
_SLACK_LITERAL = 72             # of the vaddr of the shard, in SLACK
_SLACK_LOOKS, _SLACK_LOOK_S = 6, 0.02   # does anybody use it?
_GONE, _VOID, _TRAP = 1, 2, 4           # flags of a record
_LEAST_SLACK = 100              # bytes; few sites take less
_START_BRK = 44                 # of proc(5)'s fields, from the third on


class SlackHeader(NamedTuple):
    """The last bytes of a slack arena's page, in the order of SLACK."""
    magic: bytes
    version: int
    flags: int
    n_records: int
    low: int                # where the slack of the text begins
    nonce: int
    owner_pid: int
    owner_birth: int
    owner_namespace: int    # inode of the owner's pid namespace
    target: int
    time_ns: int            # CLOCK_REALTIME
    data: int               # vaddr of the shard
    data_size: int
    base: int = 0           # of this header; not in it

    # As status() and restore() ask a Header.
    shard_mask, shard_shift, scratch = 0, 12, 0

    @property
    def code_size(self):
        """From here to the shard: data may lie before the code, too."""
        return self.data - self.base


assert SLACK.size == 88


def unpack_slack(data, base):
    """A SlackHeader from hostile bytes, or None if it is none."""
    if data[:len(SLACK_MAGIC)] != SLACK_MAGIC or len(data) < SLACK.size:
        return None
    header = SlackHeader(*SLACK.unpack_from(data), base=base)
    page = base & -PAGE
    if (header.version != VERSION or base + SLACK.size != page + PAGE
            or not page <= header.low < base
            or header.data_size > PAGE or header.data % 8
            or header.data // PAGE != (header.data + header.data_size - 1)
            // PAGE or header.n_records > PAGE // _SLACK_RECORD.size):
        return None
    return header


def _pack_slack_record(record, base, flags):
    """The bytes of a Record; its window has no more than 8 to put back."""
    old = b"".join(old for _, old, _ in record.patches)
    flags |= _GONE * record.is_gone | _TRAP * (
        record.patches[-1][2] == ubp_x86.BREAKPOINT)
    return b"".join(_SLACK_COPY.pack(
        copy.offset, copy.size | _IS_SYSCALL * bool(copy.back), copy.moved,
        copy.moved_size) for copy in record.copies) + _SLACK_RECORD.pack(
        record.site - base, record.slot and record.slot - base,
        record.trampoline - base, record.size, record.index,
        record.window_size, KINDS.index(record.kind), flags, old,
        len(record.copies))


def _unpack_slack_record(data, end, header):
    """(Record or None, flags, start) of one that ends at data[end - 1]."""
    at = end - _SLACK_RECORD.size
    if at < 0:
        return None, 0, 0
    (site, slot, trampoline, size, index, window_size, kind, flags, old,
     n) = _SLACK_RECORD.unpack_from(data, at)
    base, start = header.base, at - _SLACK_COPY.size * n
    site, trampoline = base + site, base + trampoline
    slot = slot and base + slot
    if (start < 0 or not 1 <= n <= _MOST_COPIES or kind >= len(KINDS)
            or not header.low <= trampoline <= trampoline + size <= base
            or not 0 < site < _TASK_SIZE or not 0 <= slot < _TASK_SIZE
            or not window_size or 8 * index + 8 > header.data_size):
        return None, flags, start
    window = collections.namedtuple("Jump", "site slot is_trap")(
        site, slot, flags & _TRAP)
    try:
        jumps = ubp_x86.window_patches(window, trampoline)
    except RelocationError:
        return None, flags, start
    patches, used = [], 0
    for vaddr, new in jumps:
        patches.append((vaddr, old[used:used + len(new)], new))
        used += len(new)
    copies = tuple(ubp_x86.Copy(
        offset, size & ~_IS_SYSCALL, moved, moved_size,
        (size & ~_IS_SYSCALL) * bool(size & _IS_SYSCALL))
        for offset, size, moved, moved_size in _SLACK_COPY.iter_unpack(
            data[start:at]))
    return Record(site, slot, trampoline, size, index, window_size,
                  tuple(patches), copies, "", "", "", KINDS[kind],
                  bool(flags & _GONE)), flags, start


def _slack_views(pid, memory, mapping):
    """The ArenaView of the slack arena at the end of some text, if any."""
    base = mapping.end - SLACK.size
    header = unpack_slack(_peek(memory, base, SLACK.size), base)
    if header is None:
        return []
    data = _peek(memory, header.low, base - header.low)
    records, end, n_bad = [], len(data), 0
    for _ in range(header.n_records if data else 0):
        record, flags, end = _unpack_slack_record(data, end, header)
        if record is None or record.kind == "table":
            n_bad += 1
        elif not flags & _VOID:
            records.append(record)
    low, high = mapping.start, mapping.end
    good = [record for record in records if all(
        low <= vaddr < header.low for vaddr, _, _ in record.patches)]
    try:
        every = modules(pid)
    except SymbolError:
        return []
    try:
        module = next((m for m in every if m.low <= low < m.high), None)
        maps = read_maps(memory)
        if module is None or text_slack(module, maps) != (header.low, high):
            return []
        data = header.data, header.data + header.data_size
        if not any(start <= data[0] and data[1] <= end for start, end
                   in data_slacks(pid, every, every, maps)):
            return []
        named = tuple(_named_record(record, module) for record in good)
    finally:
        for each in every:
            each.close()
    return [ArenaView(pid, ((header.low, high),), 0, header, named,
                      n_bad + len(records) - len(good),
                      ((header.low, high), data))]


def _named_record(record, module):
    """A Record with the names that there was no room for."""
    symbol = module.function_at(record.site)
    name = "0x%x" % record.site
    if symbol is not None:
        name = symbol.name + ("+0x%x" % (record.site - symbol.vaddr)
                              if record.site > symbol.vaddr else "")
    return record._replace(build_id=module.build_id, module=module.name,
                           function=name)


def text_slack(module, maps):
    """[low, high) of the last page of a module's text that is behind it.

    None where there is none: the page must be private, and of its file.
    """
    loads = [load for load in module.elf.loads if load.flags & PF_X]
    if not loads or not module.has_file or module.shared_text:
        return None
    low = module.bias + loads[-1].vaddr + loads[-1].size
    high = low + PAGE - 1 & -PAGE
    for m in maps:
        if m.start < low and m.end == high and m.perms == "r-xp" and m.inode:
            return (low, high) if low < high else None
    return None


def data_slacks(pid, wanted, every, maps):
    """[(low, high)] of the pages with the last data of modules, behind it.

    None under musl, whose malloc takes all of it, nor of the loader, whose
    own takes that; and not where brk begins in that page.
    """
    names = [module.soname or module.name for module in every]
    if (any("musl" in name for name in names)
            or not any(name.startswith("libc.so") for name in names)):
        return []
    fields = read_stat(pid)
    brk = int(fields[_START_BRK]) if len(fields) > _START_BRK else 0
    found = []
    for module in wanted:
        loads = [load for load in module.elf.loads if load.flags & PF_W]
        if not loads or (module.soname or module.name).startswith("ld-"):
            continue
        end = module.bias + loads[-1].vaddr + loads[-1].memory_size
        low, high = end + 15 & -16, end + PAGE - 1 & -PAGE
        if low + 8 <= high and not end <= brk < high and any(
                m.start <= low - 1 and high <= m.end and m.perms == "rw-p"
                for m in maps):
            found.append((low, high))
    return found


class SlackArena(Arena):
    """An Arena in the slack of a module's text, and of some data.

    low, high   of the text;   data   (low, high) of the shard
    """

    memory, inode, ring_owner = None, 0, None

    def __init__(self, tracer, text, data):
        self.tracer, (self._low, self._high) = tracer, text
        self.base = self._high - SLACK.size
        self.size = self.code_size = self.base - self._low
        self.layout = ArenaLayout(0, 0, 0, 12, 0)
        self.shards = ubp_x86.Shards(ubp_x86.CPU_NONE, data[0], 0, 12,
                                     self.base + _SLACK_LITERAL)
        self.slack, self.next = (text, data), self._low
        self.records, self._void, self._end = [], set(), self.base
        self._places = []           # (start, size) of each record
        self._used, self._flags, self._last = 0, 0, {}
        self._kept = self._kept_last = self._kept_private = None
        self._is_lost = False
        self.nonce = int.from_bytes(os.urandom(8), "little")
        self._write_header()

    @property
    def range(self):
        return self._low, self._high

    private = 0

    @property
    def n_free(self):
        """Bytes between the trampolines and the records."""
        return self._end - self.next

    def _write_header(self):
        self.store(0, SLACK.pack(
            SLACK_MAGIC, VERSION, self._flags, len(self.records), self._low,
            self.nonce, os.getpid(), start_time(os.getpid()),
            _pid_namespace(), self.tracer.tgid, int(time.time() * 1e9),
            self.slack[1][0], self.slack[1][1] - self.slack[1][0]))

    def shard_at(self, cpu):
        return self.slack[1][0] - self.base

    def n_fitting(self, items, need_of, span_of):
        """As many as fit, of those whose text this is behind."""
        at, end, used, n = self.next, self._end, self._used, 0
        for item in items:
            low, high = span_of([item])
            need, is_here = need_of([item]), self._serves(item)
            parts, spec = item.all_parts, getattr(item, "spec", None)
            if spec == _PLAIN_COUNT and len(parts) == 1:
                window = item.window
                need = Need(1, len(ubp_x86.count_trampoline(
                    window, window.site & -PAGE, 0, self.shards._replace(
                        rseq_offset=window.site)).code), 8, need.private)
            at += need.code
            end -= sum(_SLACK_RECORD.size + _SLACK_COPY.size
                       * len(part.window.insns) for part in parts)
            used = _aligned(used, need.block) + need.block
            if (not is_here or at > end or need.private or need.calls
                    or used > self.slack[1][1] - self.slack[1][0]):
                break
            n += 1
        return n

    def _serves(self, item):
        """Is an item's text the one that ends here? Then it is there as
        long as its trampolines."""
        module = item.site.module
        return module.low <= self._low < module.high

    def add(self, window, old, names, block, make, size=0):
        made = make(self.next)
        record = Record(
            window.site, window.slot, self.next, len(made.code),
            block[1] // 8, window.size,
            tuple((vaddr, old[vaddr][:len(new)], new) for vaddr, new
                  in ubp_x86.window_patches(window, self.next)),
            made.copies, names[0], names[1], names[2], block[0])
        taken = len(_pack_slack_record(record, self.base, 0))
        if self.next + len(made.code) > self._end - taken:
            raise RelocationError("its arena is full", window.site,
                                  "out of reach")
        self.store(self.next - self.base, made.code)
        self.next += len(made.code)
        self._end -= taken
        self._places.append(self._end)
        self.records.append(record)
        self._write_record(len(self.records) - 1)
        return record

    def _write_record(self, n):
        record, flags = self.records[n], 0
        if record is None:
            at = self._places[n]
            end = self._places[n - 1] if n else self.base
            data = bytearray(read_memory(self.tracer.vm_tid(), at, end - at))
            data[-10] |= _VOID
            self.store(at - self.base, bytes(data))
            return
        self.store(self._places[n] - self.base,
                   _pack_slack_record(record, self.base, flags))

    def store(self, offset, data):
        try:
            super().store(offset, data)
        except OSError:             # proc_mem.force_override: if traced only
            self.tracer.pause(lambda: self.tracer.write_text(
                self.base + offset, data), 5, "write")


def make_slack_arena(tracer, item):
    """An arena in the slack of the module that a plan's site is in.

    -> SlackArena. Raises ProbeError, which says what it lacks.
    """
    module = item.site.module

    def refuse(why):
        raise ProbeError("probe %s in the slack of" % site_name(item.site),
                         tracer.name(), why)
    maps = read_maps(tracer.vm_tid())
    text = text_slack(module, maps)
    if text is None or text[1] - text[0] < SLACK.size + 64:
        refuse("%s has no unused bytes behind its text" % module.name)
    every = modules(tracer.tgid)
    try:
        places = data_slacks(tracer.tgid, [
            m for m in every if m.is_exe or m.low == module.low], every, maps)
    finally:
        for each in every:
            each.close()
    first, last = ubp_x86.reach(module.low, module.high)
    places = [(low, high) for low, high in places
              if first <= low and high <= last]
    tid = tracer.vm_tid()
    for _ in range(_SLACK_LOOKS):
        if not _is_zero(tid, *text):
            refuse("the bytes behind the text of %s are in use" % module.name)
        places = [place for place in places if _is_zero(tid, *place)]
        time.sleep(_SLACK_LOOK_S)
    if not places:
        refuse("no bytes behind the data of %s or of the program are unused"
               % module.name)
    return SlackArena(tracer, text, max(
        places, key=lambda place: place[1] - place[0]))


def _is_zero(tid, low, high):
    return _peek(tid, low, high - low) == bytes(high - low)


def processes_with_nonce(base, nonce):
    """The pids of processes that have a private arena, by fork. -> [pid]"""
    found = []
    for pid in _process_ids():
        data = _peek(pid, base, HEADER.size) or _peek(pid, base, SLACK.size)
        header = unpack_slack(data, base) or unpack_header(data)
        if header is not None and header.nonce == nonce:
            found.append(pid)
    return found


# -- patching and restoring, with all threads stopped -----------------------

class Patches:
    """What a pause writes, worked out before it begins.

    changes   ((vaddr, old, new), …) in the order of writing; a later one
              may be about bytes that an earlier one has written
    writes    the same, joined: one write per page, in that order
    parts     the changes of each write, for PTRACE_POKEDATA
    """

    def __init__(self, tracer, changes):
        self.tracer = tracer
        self.writes, self.parts = [], []
        for page, group in _by_page(changes).items():
            low = min(vaddr for vaddr, _, _ in group)
            high = max(vaddr + len(new) for vaddr, _, new in group)
            old = tracer.read_text(low, high - low)
            new = bytearray(old)
            for vaddr, before, after in group:
                if new[vaddr - low:vaddr - low + len(before)] != before:
                    raise Again("text at 0x%x changes" % vaddr)
                new[vaddr - low:vaddr - low + len(after)] = after
            self.writes.append((low, old, bytes(new)))
            self.parts.append([(vaddr, after) for vaddr, _, after in group])

    def verify(self):
        """Is the text still what was read? Raises Again."""
        for vaddr, old, _ in self.writes:
            if self.tracer.read_text(vaddr, len(old)) != old:
                raise Again("text at 0x%x changes" % vaddr)

    def are_written(self):
        """Is all of the text as write() has left it?"""
        return all(_text_at(self.tracer, vaddr, len(new)) == new
                   for vaddr, _, new in self.writes)

    def write(self):
        """One write per page; rolled back if one of them fails."""
        done = []
        try:
            for (vaddr, old, new), parts in zip(self.writes, self.parts):
                self.tracer.write_text(vaddr, new, parts)
                done.append((vaddr, old))
        except OSError:
            for vaddr, old in reversed(done):
                self.tracer.write_text(vaddr, old)
            raise


def _by_page(changes):
    """{page: [(vaddr, old, new)]} in the order given."""
    pages = collections.OrderedDict()
    for change in changes:
        pages.setdefault(change[0] // PAGE, []).append(change)
    return pages


def moves_in(records):
    """Where a thread inside a window goes. -> ({rip: rip}, {rip: rip})

    The second is for a thread just behind a displaced syscall that the
    kernel will restart: it goes behind the copy of that syscall.
    """
    inside, behind = {}, {}
    for record in records:
        # Behind the jump, too: a branch there may lead back into it.
        for copy in record.copies:
            if copy.offset:
                inside[record.site + copy.offset] = (
                    record.trampoline + copy.moved)
            if copy.back:
                behind[record.site + copy.offset + copy.back] = (
                    record.trampoline + copy.moved + copy.back)
    return inside, behind


def moves_out(records):
    """Where a thread inside a trampoline goes. -> {rip: rip}"""
    outside = {}
    for record in records:
        for copy in record.copies:
            for within in (0, copy.back):
                outside[record.trampoline + copy.moved + within] = (
                    record.site + copy.offset + within)
        last = record.copies[-1]
        outside[record.trampoline + last.moved + last.moved_size] = (
            record.site + record.window_size)
        outside[record.trampoline] = record.site
    return outside


class WaysBack:
    """Out of the middle of trampolines, by what ubp_x86 reads in them.

    records     of sites whose text is back
    """

    def __init__(self, tracer, records):
        self.tracer, self.known = tracer, {}
        self.records = sorted(records, key=lambda each: each.trampoline)
        self.starts = [each.trampoline for each in self.records]

    def __call__(self, rip):
        """What undoes the trampoline around rip. -> Undo, or None"""
        at = bisect.bisect_right(self.starts, rip) - 1
        if at < 0 or rip >= self.starts[at] + self.records[at].size:
            return None
        if at not in self.known:
            self.known[at] = self._read(self.records[at])
        return self.known[at].get(rip)

    def _read(self, record):
        try:
            code = self.tracer.read(record.trampoline, record.size)
            text = self.tracer.read(record.site, record.window_size)
        except OSError:
            return {}
        return ubp_x86.ways_back(ubp_x86.Trampoline(
            record.trampoline, code, record.copies), text, record.site)


def moves_over(tracer, before, record):
    """From older trampolines into a new one that has their instructions.

    before   Records of the same window, or of others that it took in
    -> {rip: rip}
    """
    over, there = {}, {record.site + copy.offset: copy
                       for copy in record.copies}
    for old in before:
        for place, one in enumerate(old.copies):
            two = there[old.site + one.offset]
            goal = record.trampoline + two.moved
            if place == 0:          # behind what comes before it
                goal += two.moved_size - one.moved_size
            for within in (0, one.back):
                over[old.trampoline + one.moved + within] = goal + within
        end, last = old.site + old.window_size, record.copies[-1]
        back = old.copies[-1]
        over[old.trampoline + back.moved + back.moved_size] = (
            record.trampoline + (there[end].moved if end in there
                                 else last.moved + last.moved_size))
        over[old.trampoline] = record.trampoline + (
            there[old.site].moved if old.site != record.site else 0)
        vaddr, _, jump = old.patches[0]
        if (old.slot and old.slot != record.slot    # or another has it now
                and _text_at(tracer, vaddr, len(jump)) == jump):
            over[old.slot] = over[old.trampoline]
    return over


def move_threads(tracer, inside, behind, undo=lambda rip: None):
    """Move every program counter, saved ones too, out of the way.

    inside  {rip: rip}, where nothing else has to change
    behind  the same, for threads whose syscall the kernel will restart
    undo    (rip) -> ubp_x86.Undo or None: where other registers change, too
    -> [every program counter, as it is now]. First all is looked at, and
    only then the first is moved: what refuses leaves them where they are.
    """
    left, moves, frames = [], [], []
    for thread in tracer.threads.values():
        is_stopped = thread.state == STOPPED
        if not (is_stopped or thread.in_vfork):     # refuse, never guess
            raise Again("thread %d is not stopped" % thread.tid)
        rip = ubp_x86.program_counter(thread.regs)
        goal = inside.get(rip)
        if ubp_x86.will_restart(thread.regs):
            goal = behind.get(rip, goal)
        back = _way_back(thread, undo, rip) if goal is None else None
        if not is_stopped and (goal, back) != (None, None):
            raise Again("thread %d is in vfork there" % thread.tid)
        if goal is not None:
            moves.append((thread, ubp_x86.with_program_counter(
                thread.regs, goal)))
        elif back is not None:
            moves.append((thread, ubp_x86.undone(
                thread.regs, back, _stack_reader(thread))))
            goal = back.vaddr
        left.append(rip if goal is None else goal)
        for vaddr, rip in tracer.signal_frames(thread):
            goal = inside.get(rip)
            back = _way_back(thread, undo, rip) if goal is None else None
            if goal is not None:
                frames.append((thread.tid, vaddr, struct.pack("<Q", goal)))
            elif back is not None:
                frames.append(_undone_frame(thread, vaddr, back))
                goal = back.vaddr
            left.append(rip if goal is None else goal)
    if tracer.swaps_contexts and left:
        left += _move_parked(tracer, thread, inside, undo, frames)
    for thread, regs in moves:
        thread.regs = regs
        tracer.set_regs(thread.tid, thread.regs)
    for tid, vaddr, data in frames:
        write_memory(tid, vaddr, data)
    return left


def _move_parked(tracer, thread, inside, undo, frames):
    """Move what no thread is in, too. -> [every such program counter]

    thread   any that is stopped;   frames   what is to be written, added to
    """
    left, known = [], {vaddr for _, vaddr, _ in frames}
    for vaddr, rip in tracer.parked_frames(thread.tid):
        if vaddr in known or vaddr - ubp_x86.SIGNAL_CONTEXT_RIP in known:
            continue
        goal, back = inside.get(rip), undo(rip)
        if goal is not None:
            frames.append((thread.tid, vaddr, struct.pack("<Q", goal)))
        elif back is not None:
            try:
                frames.append(_undone_frame(thread, vaddr, back))
            except Again:
                continue                # its stack is gone: it was left
            goal = back.vaddr
        left.append(rip if goal is None else goal)
    return left


def _way_back(thread, undo, rip):
    """The Undo of a thread at rip, or None: it is to be waited for, too, if
    it is about to have an answer, unless somebody has stopped it."""
    back = undo(rip)
    if back is not None and back.is_asking and not thread.group_stop:
        return None
    return back


def _stack_reader(thread):
    """read(vaddr, size) of a thread's memory. Raises Again."""
    def read(vaddr, size):
        try:
            return read_memory(thread.tid, vaddr, size)
        except OSError:
            raise Again("the stack of thread %d cannot be read" % thread.tid)
    return read


def _undone_frame(thread, vaddr, undo):
    """What to write to a signal frame whose rip is at vaddr. -> (tid, vaddr,
    bytes)"""
    read = _stack_reader(thread)
    start = vaddr - ubp_x86.SIGNAL_CONTEXT_RIP
    return thread.tid, start, ubp_x86.undone_context(
        read(start, ubp_x86.SIGNAL_CONTEXT_SIZE), undo, read)


def check_arena(tracer, base, nonce):
    """Is this still the program that the arena was mapped into?

    With all threads stopped, before anything is written: exec may have put
    another program in its place. Raises TraceeGone.
    """
    header = None
    try:
        header = (unpack_slack(tracer.read(base, SLACK.size), base)
                  or unpack_header(tracer.read(base, HEADER.size)))
    except OSError:
        pass
    if header is None or header.nonce != nonce:
        raise TraceeGone("write to", tracer.name(),
                         "its arena is gone: another ubp (clean --all) or it "
                         "itself unmapped it, or it became another program "
                         "(exec)")
    tracer.scratch = tracer.scratch or header.scratch


def _is_mapped_still(tracer, arena):
    try:
        check_arena(tracer, arena.base, arena.nonce)
        return True
    except TraceeGone:
        return False


def lent_slots(records):
    """Which windows have their slot in bytes that another's jump leads past.

    -> {(site of that one, site)}: it is armed before, and restored behind.
    """
    records, found = list(records), set()
    slots = sorted({(record.slot, record.site) for record in records
                    if record.slot})
    for lender in records if slots else ():
        first = lender.site + ubp_x86.JUMP_SIZE
        last = lender.site + lender.window_size - ubp_x86.JUMP_SIZE
        for slot, site in slots[bisect.bisect_left(slots, (first, 0)):]:
            if slot > last:
                break
            found.add((lender.site, site))
    return found


class Change(NamedTuple):
    """One window that is to lead to the trampoline of a record."""
    record: Record
    before: tuple           # records of its earlier trampolines, and of
    #                         those of windows whose place it takes
    past: tuple = ()        # of others, gone, that a thread may be in still

    def is_in_force(self, tracer):
        """Does the text of a process lead to one of the earlier ones?"""
        return any(all(_text_at(tracer, vaddr, len(new)) == new
                       for vaddr, _, new in record.patches)
                   for record in self.before)

    def lost_ranges(self):
        """Earlier trampolines that come back to what is overwritten, or to
        where a branch leads there: those of other windows."""
        window = self.record.site, self.record.window_size
        return [(old.trampoline, old.trampoline + old.size)
                for old in self.before + self.past
                if (old.site, old.window_size) != window]

    def patches(self, tracer):
        """((vaddr, what is there, what will be), …), or None.

        None if the text is neither the file's nor leads to one of the
        earlier trampolines. Jumps of other windows whose place it takes
        are taken out, also where this one's does not overwrite them: their
        bytes, and their slots, are free from now on.
        """
        if any((record.site, record.slot) != (self.record.site,
                                              self.record.slot)
               for record in self.before):
            return self._patches_over(tracer)
        own = [record for record in self.before[::-1]
               if record.site == self.record.site
               and record.slot == self.record.slot]
        for record in own + [None]:
            there = {vaddr: new for vaddr, _, new in record.patches} \
                if record else {}
            patches = [(vaddr, there.get(vaddr, old), new)
                       for vaddr, old, new in self.record.patches]
            if all(_text_at(tracer, vaddr, len(old)) == old
                   for vaddr, old, _ in patches):
                return patches
        return self._patches_over(tracer)

    def _patches_over(self, tracer):
        """patches(), where other windows are to be taken out first."""
        undo, sites = [], set()
        for record in self.before[::-1]:
            if (record.site, record.slot) not in sites and all(
                    _text_at(tracer, vaddr, len(new)) == new
                    for vaddr, _, new in record.patches):
                sites.add((record.site, record.slot))
                undo += [(vaddr, new, old)
                         for vaddr, old, new in record.patches[::-1]]
        for vaddr, old, _ in self.record.patches:
            text = _text_at(tracer, vaddr, len(old))
            if text is None or _overlaid(vaddr, text, undo) != old:
                return None
        return undo + list(self.record.patches)


def _overlaid(vaddr, text, changes):
    """Bytes at vaddr as they are after [(vaddr, old, new)]."""
    text = bytearray(text)
    for start, _, new in changes:
        for at, byte in enumerate(new, start - vaddr):
            if 0 <= at < len(text):
                text[at] = byte
    return bytes(text)


class _Arming:
    """The steps of arm: what is decided outside the pause, and in it."""

    def __init__(self, tracer, changes):
        self.tracer, self.changes = tracer, changes
        self.refused, self.patches = [], None
        self.inside, self.behind, self.lost = {}, {}, []    # for threads

    def survey(self):
        """Compare the text with what was planned; plan moves and writes.

        Of a window whose bodies are in several arenas the last change has
        them all, and it alone is made.
        """
        last = {change.record.site: change for change in self.changes}
        found = collections.OrderedDict(
            (change.record.site, change.patches(self.tracer))
            for change in self.changes if last[change.record.site] is change)
        for lender, site in lent_slots(change.record
                                       for change in last.values()):
            if None in (found[lender], found[site]):
                found[lender] = found[site] = None      # both, or none
            found.move_to_end(site)
        self.refused = [change for change in self.changes
                        if found[change.record.site] is None]
        good = [last[site] for site, patches in found.items()
                if patches is not None]
        self.inside, self.behind = moves_in([each.record for each in good])
        self.lost = []
        for change in good:
            if change.before:
                self.inside.update(moves_over(self.tracer, change.before,
                                              change.record))
            self.lost += change.lost_ranges()
        self.patches = Patches(self.tracer, [
            patch for patches in found.values() for patch in patches or ()])

    def write(self):
        """Move the threads, then write. Raises Again.

        Threads are moved before a byte changes: a kill in between leaves
        them in trampolines that lead back to untouched text.
        """
        if self.patches is None:
            self.survey()
        try:
            self.patches.verify()
        except (Again, OSError):
            self.patches = None
            raise Again("its text changes")
        rips = move_threads(self.tracer, self.inside, self.behind)
        if self.lost and any(low <= rip < high for rip in rips
                             for low, high in self.lost):
            raise Again("a thread is inside a trampoline")
        self.patches.write()


def arm(tracer, arenas, changes, timeout):
    """Make windows lead to new trampolines, all in one pause.

    arenas   that the trampolines are in;   changes   [Change]
    -> the changes that were not made, as the text had changed
    """
    steps = _Arming(tracer, changes)

    def action():
        for arena in arenas:
            check_arena(tracer, arena.base, arena.nonce)
        steps.write()

    try:
        steps.survey()
    except (Again, OSError):
        steps.patches = None        # it is surveyed again in the pause
    tracer.pause(action, timeout, "patch")
    return steps.refused


class Installed(NamedTuple):
    """An arena, and what of it a restore is to take out."""
    base: int
    nonce: int
    inode: int              # 0: anonymous memory, in one process only
    ranges: tuple           # ((start, end), …) to be unmapped; () : it stays
    records: tuple          # whose sites are to be put back
    slack: tuple = ()       # ((start, end), …) to be zero instead


class Restored(NamedTuple):
    """What a restore found and did, in one process."""
    n_restored: int         # sites put back
    pages: tuple            # vaddrs of the pages written
    foreign: tuple          # records whose text is neither old nor new
    unmapped: bool
    was_gone: bool          # the program had unmapped the arenas itself


def _modules_or_none(tracer):
    try:
        return modules(tracer.tgid)
    except SymbolError:
        return []                   # it has ended


class _Restoring:
    """The steps of restore: what is decided outside the pause, and in it."""

    def __init__(self, tracer, records):
        self.tracer, self.records = tracer, records
        self.patches, self.is_done, self.modules = None, False, None
        self.maps = []
        self.n_sites, self.foreign = 0, []
        self.n_before = 0           # of them, put back by an earlier survey
        self.restored = []          # records of sites with their old bytes
        self.outside, self.ways_back = {}, None     # for threads inside
        self.on_way = {}            # {slot: site}: for those in between

    def survey(self):
        """Compare the text with the journal, and plan the writes.

        Of the records of one site at most one is in force. A site that
        none of them explains may lie beneath the patch of another, that
        took its place. Else it is foreign, unless it leads into the arena
        of another ubp, which found the file's bytes there.
        """
        changes, self.foreign, self.n_sites = {}, [], self.n_before
        unexplained, self.on_way = [], {}
        sites = collections.OrderedDict()
        if self.modules is None:
            self.modules = _modules_or_none(self.tracer)
            self.tracer.swaps_contexts = swaps_contexts(self.modules)
        self.maps = read_maps(self.tracer.vm_tid())
        for record in self.records:
            sites.setdefault(record.site, []).append(record)
        lent = lent_slots(self.records)
        for lender, _ in lent:
            sites.move_to_end(lender)
        for site, records in sites.items():
            for record in reversed(records):
                armed = self._in_force(record)
                if armed is not None:
                    changes[site] = armed
                    if armed and record.slot:
                        self.on_way[record.slot] = site
                    break
            else:
                unexplained.append(records)
        ranges = [(vaddr, vaddr + len(text)) for armed in changes.values()
                  for vaddr, text, _ in armed]
        for records in unexplained:
            if self._is_beneath(records, ranges):
                changes[records[-1].site] = []
            elif not (self._is_replaced(records[-1])
                      or self._is_of_another_ubp(records[-1])):
                self.foreign.append(records[-1])
        for lender, site in lent:       # to a slot that stays: it stays, too
            if changes.get(lender) and any(site == record.site
                                           for record in self.foreign):
                del changes[lender]
                self.foreign.append(sites[lender][-1])
        self.n_sites += sum(
            bool(armed) and any(record.kind not in ("lent", "own")
                                for record in sites[site])
            for site, armed in changes.items())
        self.restored = [record for site in changes for record in sites[site]]
        self.patches = Patches(self.tracer, [
            change for site in sites for change in changes.get(site, ())])
        self.outside = moves_out(self.restored)
        self.ways_back = WaysBack(self.tracer, self.restored)

    def _is_replaced(self, record):
        """Has a library taken a site's place where it has no code, or other
        code, as in its file? One may go, and another come, before we look.
        Nor is a page code that nobody has written to, of a library that is
        being mapped, or memory that is nobody's text, as the heap.
        """
        def is_of_other(module, vaddr, old, text):
            end = module.high + -module.high % PAGE
            return (module.low <= vaddr < end and module.has_file
                    and (not any(low <= vaddr < low + size
                                 for low, size, _ in module.text)
                         or old != module.read_file(vaddr, len(old)) == text))

        def is_no_text(vaddr, text):
            mapping = self._mapping(vaddr)
            return (text is not None and mapping is not None
                    and (not is_own_page(self.tracer.tgid, vaddr)
                         or not mapping.inode and "x" not in mapping.perms))

        texts = [(vaddr, old, _text_at(self.tracer, vaddr, len(old)))
                 for vaddr, old, _ in record.patches]
        return all(is_no_text(vaddr, text)
                   or any(is_of_other(module, vaddr, old, text)
                          for module in self.modules)
                   for vaddr, old, text in texts)

    def _is_beneath(self, records, ranges):
        """Is what differs at a site the patch of another, in ranges?"""
        for vaddr, old, _ in records[-1].patches:
            text = _text_at(self.tracer, vaddr, len(old)) or b""
            if len(text) < len(old) or any(
                    text[at] != old[at] and not any(
                        low <= vaddr + at < high for low, high in ranges)
                    for at in range(len(old))):
                return False
        return True

    def _in_force(self, record):
        """What undoes a record: [(vaddr, new, old)], the reverse of arming.

        [] where the text is what it was, or nothing is mapped any more;
        None if the text is neither.
        """
        undo = []
        for vaddr, old, new in reversed(record.patches):
            text = _text_at(self.tracer, vaddr, len(new))
            if text == new:
                if not (self._is_of_file(vaddr, old)
                        and self._is_still_text(record, vaddr, new)):
                    return None     # forged, or other memory by now
                undo.append((vaddr, new, old))
            elif (text is not None and text[1:] == new[1:] != old[1:]
                    and text[:1] in (old[:1], ubp_x86.BREAKPOINT)
                    and self._is_of_file(vaddr, old)):
                # A uprobe was set on our jump, and may be gone again: the
                # kernel owns the first byte, and puts the file's back.
                undo.append((vaddr + 1, new[1:], old[1:]))
            elif text is None:
                if self._is_mapped(vaddr):
                    raise Again("text at 0x%x cannot be read" % vaddr)
            elif text != old:
                return None
        return undo

    def _mapping(self, vaddr):
        return next((m for m in self.maps if m.start <= vaddr < m.end), None)

    def _is_mapped(self, vaddr):
        return self._mapping(vaddr) is not None

    def _is_still_text(self, record, vaddr, new):
        """Is a byte that looks like our int3 still in the text it was put
        in? A jump to our arena is no accident, but memory that was mapped
        where a library had been may hold any byte.
        """
        mapping = self._mapping(vaddr)
        if mapping is None or len(new) > 2:
            return mapping is not None
        if mapping.inode or mapping.path == VDSO:
            path = mapping.path
            if path.endswith(DELETED):
                path = path[:-len(DELETED)]
            return os.path.basename(_printable(path)) == record.module
        # Text that was copied to other pages, huge ones: with what follows?
        behind = _text_at(self.tracer, vaddr + len(new), 8)
        return behind is not None and any(
            module.low <= vaddr < module.high and module.has_file
            and module.read_file(vaddr + len(new), 8) == behind
            for module in self.modules)

    def _is_of_file(self, vaddr, old):
        """Are these the bytes of the file? They were when it was armed.

        A file that cannot be read any more does not speak against them.
        """
        for module in self.modules:
            if module.low <= vaddr < module.high and module.has_file:
                data = module.read_file(vaddr, len(old))
                return data == old or len(data) < len(old)
        return True

    def _is_of_another_ubp(self, record):
        vaddr, own = record.site, find_arena_range(self.tracer.maps,
                                                   record.trampoline)
        for _ in range(2):          # a two-byte jump leads to another
            vaddr = ubp_x86.jump_target(
                _text_at(self.tracer, vaddr, 5) or b"", vaddr)
            found = vaddr and find_arena_range(self.tracer.maps, vaddr)
            if found:
                return found != own
            if not vaddr:
                break
        return False

    def finds_own(self):
        """Does text lead to our arenas, or has it just been put back? Not
        in another program, after exec."""
        if self.patches is None:
            self.survey()
        return self.n_sites > 0

    def close(self):
        """Give the files' descriptors back."""
        for module in self.modules or ():
            module.close()

    def write(self):
        """Put the text back, if it is still as surveyed. Raises Again."""
        if self.patches is None:
            self.survey()
        if self.is_done:
            # Since the last pause somebody may have led text here again,
            # to what is about to be unmapped.
            if self.patches.are_written():
                return
            self.n_before, self.is_done = self.n_sites, False
            self.survey()
        try:
            self.patches.verify()
        except (Again, OSError):
            self.patches = None
            raise Again("its text changes")
        if self.on_way:             # before their slots' bytes change
            move_threads(self.tracer, self.on_way, {})
        self.patches.write()
        self.is_done = True


def restore(tracer, arenas, timeout, last_look=lambda: None):
    """Put text back, and unmap arenas once no thread is in any of them.

    arenas     [Installed]: trampolines of one may use data of another
    last_look  called when nothing counts any more, before the unmapping
    Text that is neither what was there nor what ubp wrote is somebody
    else's: it is reported, never overwritten, and keeps its trampolines
    mapped. -> Restored
    """
    steps = _Restoring(tracer, [record for arena in arenas
                                for record in arena.records])

    def action():
        there = [arena for arena in arenas
                 if _is_mapped_still(tracer, arena)]
        if not there and not steps.finds_own():
            check_arena(tracer, arenas[0].base, arenas[0].nonce)
        ranges = [each for arena in there for each in arena.ranges]
        mapped = [each for arena in there if not arena.slack
                  for each in arena.ranges]
        steps.write()
        # Only to text that is back: at a foreign site a thread stays.
        rips = move_threads(tracer, steps.outside, {}, steps.ways_back)
        if not ranges or steps.foreign:
            return False
        if any(low <= rip < high for rip in rips for low, high in ranges):
            raise Again("a thread is inside a trampoline")
        last_look()
        if mapped:
            with Injection(tracer) as injection:
                for low, high in mapped:
                    injection.call(SYS_munmap, low, high - low)
        for arena in there:
            # Its data first: the header, which tells of them, last.
            for low, high in arena.slack[::-1] if arena.ranges else ():
                tracer.write_text(low, bytes(high - low))
        return True

    try:
        steps.survey()
        if steps.foreign:           # or libraries come and go meanwhile
            steps.close()
            steps.modules = steps.patches = None
    except (Again, OSError):
        steps.patches = None        # it is surveyed again in the pause
    tracer.may_ask = True
    try:
        unmapped = tracer.pause(action, timeout, "restore")
    except InjectionRefused as error:
        raise _memory_stays(tracer) if steps.is_done else error
    finally:
        tracer.may_ask = False
        steps.close()
    pages = tuple(sorted({vaddr & -PAGE for vaddr, _, _
                          in steps.patches.writes}))
    was_gone = not any(_is_mapped_still(tracer, arena) for arena in arenas)
    return Restored(steps.n_sites, pages, tuple(steps.foreign), unmapped,
                    was_gone and not unmapped)


def _memory_stays(tracer):
    return MemoryStays(
        "unmap ubp's memory in", tracer.name(), "its probes are out and its "
        "text is what it was, but its seccomp filter, newer than they were, "
        "forbids munmap, or cannot be read (that takes CAP_SYS_ADMIN)",
        "nothing runs there, and it goes when the program ends; or, as root: "
        "clean -p %d --suspend-seccomp" % tracer.tgid)


def _text_at(tracer, vaddr, size):
    """Bytes of the target, or None where nothing is mapped any more."""
    try:
        return tracer.read_text(vaddr, size)
    except OSError:
        return None


# ---- 7  Results -----------------------------------------------------------
#
# What probes have computed, as immutable values. The one idea: results of
# processors, processes and hosts add up, so each kind has one sum.
# Invariant: what memory of the target says is validated, and what fails
# is counted, never shown.

class Histogram(NamedTuple):
    """How values are distributed: immutable, exact to a sixteenth.

    buckets   ((low, high, n), …), high inclusive, none empty, ascending
    min, max  None where nothing was recorded; of an interval (a - b) as
              near as the buckets tell
    Histograms of processors, processes and hosts add up. A bucket is an
    eighth of its power of two wide; values below 16 have one each.
    """
    count: int = 0
    sum: int = 0
    min: Optional[int] = None
    max: Optional[int] = None
    buckets: tuple = ()

    @classmethod
    def from_buckets(cls, buckets, sum, min, max):
        """A Histogram from [[low, high, n], …], as its JSON has them.

        Raises ValueError for what is no histogram: a bucket of a negative
        number, buckets that overlap or do not ascend.
        """
        kept, last = [], None
        for low, high, n in buckets:
            if not low <= high or n < 0 or last is not None and low <= last:
                raise ValueError("no bucket: %r" % ([low, high, n],))
            last = high
            if n:
                kept.append((low, high, n))
        if not kept:
            return cls()
        first, last = kept[0], kept[-1]
        return cls(_total(kept), sum, _clamped(min, *first[:2]),
                   _clamped(max, *last[:2]), tuple(kept))

    def __add__(self, other):
        """Both together."""
        if not isinstance(other, Histogram):
            return NotImplemented
        bounds = [(one.min, one.max) for one in (self, other) if one.count]
        if not bounds:
            return Histogram()
        return Histogram(
            self.count + other.count, self.sum + other.sum,
            min(low for low, _ in bounds), max(high for _, high in bounds),
            _joined_buckets(self.buckets + other.buckets))

    __radd__ = __add__

    def __sub__(self, earlier):
        """What was recorded since an earlier reading of the same probe."""
        if not isinstance(earlier, Histogram):
            return NotImplemented
        buckets = _joined_buckets(self.buckets + tuple(
            (low, high, -n) for low, high, n in earlier.buckets))
        if not buckets:
            return Histogram()
        return Histogram(
            _total(buckets), self.sum - earlier.sum,
            max(self.min, buckets[0][0]), min(self.max, buckets[-1][1]),
            buckets)

    @property
    def mean(self):
        """The arithmetic mean, exact; None where nothing was recorded."""
        return self.sum / self.count if self.count else None

    def percentile(self, p):
        """The value that p percent do not exceed, to a sixteenth of itself.

        By nearest rank: 0 gives min, 100 gives max. None where nothing was
        recorded. Raises ValueError unless 0 <= p <= 100.
        """
        if not 0 <= p <= 100:
            raise ValueError("no percentile: %r" % (p,))
        if not self.count or p == 0:
            return self.min
        if p == 100:
            return self.max
        left = self.count * p / 100
        for low, high, n in self.buckets:
            left -= n
            if left <= 0:
                break
        low, high = max(low, self.min), min(high, self.max)
        return low + (high - low) // 2


def _total(buckets):
    return sum(n for _, _, n in buckets)


def _clamped(value, low, high):
    """The value, or the nearest that the bucket it belongs to allows."""
    return low if value is None or value < low else min(value, high)


def _joined_buckets(buckets):
    """Buckets of equal bounds as one; those that come to nothing go."""
    found = {}
    for low, high, n in buckets:
        found[low, high] = found.get((low, high), 0) + n
    return tuple(sorted((low, high, n) for (low, high), n in found.items()
                        if n > 0))


def histogram_of_counts(counts, low, high, total, is_signed):
    """A Histogram from what a body left in shared memory, added up.

    counts   of the buckets: of values >= 0, then, if is_signed, of others
    The target may be writing: what contradicts the buckets is not believed.
    """
    n = ubp_x86.N_BUCKETS
    buckets = [ubp_x86.bucket_range(index) + (count,)
               for index, count in enumerate(counts[:n]) if count]
    if is_signed:
        below = []
        for index, count in enumerate(counts[n:2 * n]):
            if count:
                first, last = ubp_x86.bucket_range(index)
                below.append((max(-last, -1 << 63), -first, count))
        buckets = below[::-1] + buckets
    if not buckets:
        return Histogram()
    least = sum(first * n for first, _, n in buckets)
    most = sum(last * n for _, last, n in buckets)
    if not least <= total <= most:      # half of a sum was read too early
        total += ((least + most) // 2 - total + (1 << 63)) >> 64 << 64
    return Histogram(_total(buckets), _clamped(total, least, most),
                     _clamped(low, *buckets[0][:2]),
                     _clamped(high, *buckets[-1][:2]), tuple(buckets))


class Sum(int):
    """A sum of values; .count says of how many."""

    def __new__(cls, value, count):
        self = super().__new__(cls, value)
        self.count = count
        return self

    def __add__(self, other):
        return Sum(int(self) + int(other),
                   self.count + getattr(other, "count", 0))

    __radd__ = __add__

    def __sub__(self, other):
        return Sum(int(self) - int(other),
                   self.count - getattr(other, "count", 0))


class Reading(NamedTuple):
    """What a block of shared memory says, validated.

    hits = recorded + faults + dropped; the next are of frames, at exits
    """
    value: object           # int, Sum, Histogram, or a dict by key
    recorded: int = 0
    faults: int = 0         # hits whose values could not be had
    dropped: int = 0        # hits for which there was no room
    unmatched: int = 0      # exits of frames that were running when armed
    abandoned: int = 0      # frames that were never left
    crowded: int = 0        # entries that found no room
    skipped: int = 0        # entries whose condition was false
    unfinished: int = 0     # frames that are still running
    invalid: int = 0        # entries that contradict themselves

    @property
    def hits(self):
        """How often the sites were passed with a true condition."""
        return self.recorded + self.faults + self.dropped

    @property
    def entries(self):
        """Frames entered with a true condition, where exits need them."""
        return self.hits + self.crowded + self.abandoned + self.unfinished

    def __add__(self, other):
        value = (other.value if self.value is None
                 else added(self.value, other.value))
        return Reading(value, *(a + b for a, b in zip(self[1:], other[1:])))


def _signed_128(low, high):
    value = (high << 64 | low) & (1 << 128) - 1
    return value - (1 << 128) if value >> 127 else value


_MOST_HITS = 1 << 56            # of one processor: years of hits each ns


def _believed(rows, first, last, invalid):
    """Rows whose counts, words first to last, can be; others become 0.

    invalid   a list that gets a 1 for each of those
    """
    if all(max(row[first:last]) < _MOST_HITS for row in rows):
        return rows
    made = []
    for row in rows:
        row = list(row)
        for n in range(first, min(last, len(row))):
            if row[n] >= _MOST_HITS:
                row[n] = 0
                invalid.append(1)
        made.append(row)
    return made


def payload_value(kind, is_unsigned, rows, invalid):
    """(value, recorded) of a payload: the words of each processor.

    invalid   a list that gets a 1 for each count that cannot be
    """
    first = ubp_x86.HIST_BUCKETS // 8 if kind == "hist" else 0
    rows = _believed(rows, first, len(rows[0]) if first else 1, invalid)
    if kind == "count":
        total = sum(row[0] for row in rows)
        return total, total
    if kind == "sum":
        count = sum(row[0] for row in rows)
        return Sum(sum(_signed_128(*row[1:3]) for row in rows), count), count
    bias, words = 0 if is_unsigned else 1 << 63, 1 << 64
    at = ubp_x86.HIST_BUCKETS // 8
    counts = [sum(column) for column in zip(*(row[at:] for row in rows))]
    # Zero is "none yet" of both, so the greatest is the one that counts.
    low = ~max(row[2] for row in rows) % words ^ bias
    high = max(row[3] for row in rows) ^ bias
    if not is_unsigned:
        low, high = ((value ^ bias) - bias for value in (low, high))
    made = histogram_of_counts(
        counts, low, high,
        sum(_signed_128(*row[:2]) for row in rows), not is_unsigned)
    return made, made.count


def block_reading(layout, rows):
    """The Reading of a count, sum or hist. rows: each processor's words."""
    invalid = []
    if layout.kind == "word":
        total = sum(row[0] for row in _believed(rows, 0, 1, invalid))
        return Reading(total, total, invalid=len(invalid))
    head, start = _head(rows, invalid), layout.start // 8
    size = _payload_words(layout)
    value, recorded = payload_value(
        layout.kind, layout.is_unsigned,
        [row[start:start + size] for row in rows], invalid)
    return Reading(value, recorded, *head, invalid=len(invalid))


def _payload_words(layout):
    """Words of the payload of a layout, without what aligns it."""
    kind = layout.payload or layout.kind
    return {"count": 1, "sum": ubp_x86.SUM_SIZE // 8}.get(
        kind, ubp_x86.HIST_BUCKETS // 8 + ubp_x86.N_BUCKETS
        * (1 if layout.is_unsigned else 2))


def _head(rows, invalid):
    """What the first words say: faults, dropped, and those of frames."""
    return [sum(column) for column in zip(*(
        row[:6] for row in _believed(rows, 0, 6, invalid)))]


def table_reading(layout, keys, rows):
    """The Reading of a table: {key: value}, key a tuple.

    keys   the Expressions, for what is unsigned or text
    A key may be in it twice, and in each processor's: values are added.
    """
    found, invalid, recorded = {}, [], 0
    n_words = _payload_words(layout)
    is_one_int = len(layout.fields) == 1 and layout.fields[0][0] == "int"
    size, start = layout.entry_size // 8, layout.start // 8
    at = layout.payload_offset // 8
    for row in rows:
        states = row[start:start + size * layout.n_entries:size]
        for n, state in enumerate(states):
            if state < ubp_x86.STATE_READY:
                continue            # free, or being written
            entry = row[start + n * size:start + (n + 1) * size]
            if state != ubp_x86.table_tag(entry[1:at], is_one_int):
                invalid.append(1)
                continue
            value, count = payload_value(
                layout.payload, layout.is_unsigned,
                [entry[at:at + n_words]], invalid)
            key = _entry_key(layout, keys, entry)
            found[key] = found[key] + value if key in found else value
            recorded += count
    head = _head(rows, invalid)
    return Reading(found, recorded, *head, invalid=len(invalid))


def _entry_key(layout, keys, entry):
    """The key of a table's entry: a tuple of int and bytes."""
    parts = []
    for n, (kind, offset, size) in enumerate(layout.fields):
        words = entry[offset // 8:offset // 8 + (size + 7) // 8]
        key = keys[n] if n < len(keys) else None
        if kind == "stack":         # zeros behind the last
            parts.append(tuple(word for word in words if word))
        elif kind == "int":
            parts.append(words[0] if key.is_unsigned or words[0] < 1 << 63
                         else words[0] - (1 << 64))
        else:
            parts.append(struct.pack("<%dQ" % len(words), *words)
                         .rstrip(b"\0"))
    return tuple(parts)


class Clock:
    """Turns time stamp counters into CLOCK_REALTIME, and is checked.

    Two readings of both clocks, some time apart, tell the rate; each later
    one is compared with what was foretold. Raises ProbeError where the
    counter does not run at one rate in all processors and states.
    """

    _LEAST_NS = 20 * 10**6          # between the first two readings
    _MOST_WRONG_NS = 10**6          # then CLOCK_REALTIME was set

    def __init__(self, flags=None):
        if flags is None:
            text = read_proc("/proc/cpuinfo").decode(errors="replace")
            flags = re.findall(r"^flags\s*:(.*)$", text, re.M)
        for flag in "constant_tsc", "nonstop_tsc":
            if not flags or any(flag not in each.split() for each in flags):
                raise ProbeError(
                    "take the time in", "the target", "the time stamp "
                    "counter of this machine is no clock (no %s in "
                    "/proc/cpuinfo)" % flag, "count and hist need no clock")
        self._read_tsc = _tsc_reader()
        self._first = self._last = self.read()
        self.n_steps = 0            # how often CLOCK_REALTIME was set
        self._rate = None           # ns per tick

    def read(self):
        """(tsc, CLOCK_REALTIME in ns) of one instant, to half a us."""
        best = None
        for _ in range(9):
            before = self._read_tsc()
            now = _realtime_ns()
            after = self._read_tsc()
            if best is None or after - before < best[0]:
                best = after - before, (before + after) // 2, now
        return best[1:]

    def check(self):
        """Read both clocks again, and note where they have parted."""
        wait = self._LEAST_NS - (_realtime_ns() - self._first[1])
        if self._rate is None and wait > 0:
            time.sleep(min(wait, self._LEAST_NS) / 1e9)
        now = self.read()
        if self._rate is not None and abs(
                self.ns(now[0]) - now[1]) > self._MOST_WRONG_NS:
            self.n_steps += 1       # keep the rate, begin again from here
            self._first = now[0] - 10**9, now[1] - int(10**9 * self._rate)
        self._last = now
        ticks = now[0] - self._first[0]
        if ticks <= 0:
            raise ProbeError("take the time in", "the target", "the time "
                             "stamp counter of this machine runs backwards")
        self._rate = (now[1] - self._first[1]) / ticks

    def ns(self, tsc):
        """CLOCK_REALTIME of a time stamp counter."""
        return self._last[1] + int((tsc - self._last[0]) * self._rate)

    @property
    def anchor(self):
        """(tsc, its CLOCK_REALTIME, ns per tick)"""
        return self._last + (self._rate,)

    @property
    def scale(self):
        """(mult, base): ns = base + (tsc * mult >> 32), for bodies."""
        mult = int(self._rate * (1 << 32))
        return mult, self._last[1] - (self._last[0] * mult >> 32)


def _realtime_ns():
    now = Timespec()
    _clock_gettime(CLOCK_REALTIME, ctypes.addressof(now))
    return now.tv_sec * 10**9 + now.tv_nsec


_functions, _overheads = {}, []


def _function_of(code, restype, *argtypes, free=False):
    """Machine code as a function; mapped once.

    free   does it give up the GIL?
    """
    if code not in _functions:
        vaddr = _map_code(PAGE, lambda vaddr: code)
        form = ctypes.CFUNCTYPE if free else ctypes.PYFUNCTYPE
        _functions[code] = form(restype, *argtypes)(vaddr)
    return _functions[code]


def _tsc_reader():
    """A function that reads the time stamp counter of this processor."""
    return _function_of(ubp_x86.READ_TSC, ctypes.c_uint64)


def _map_code(size, make, n_code=PAGE):
    """Map code that make(vaddr) returns, and data behind it. -> vaddr

    No page is writable and executable at once. Raises ProbeError.
    """
    vaddr = _mmap(None, size, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if vaddr in (None, MAP_FAILED):
        raise ProbeError("map memory into", "this process",
                         os.strerror(ctypes.get_errno()))
    code = make(vaddr)
    ctypes.memmove(vaddr, code, len(code))
    if _mprotect(vaddr, n_code, PROT_READ | PROT_EXEC) != 0:
        raise ProbeError("map code into", "this process", os.strerror(
                             ctypes.get_errno()) + ": clocks and handlers "
                         "need it", "a security module forbids execmem")
    return vaddr


def latency_overhead(clock):
    """What Latency measures of a function that does nothing, in ns.

    The very bodies of entry and exit, run here: their median is what each
    time that a probe tells includes. Measured once.
    """
    if not _overheads:
        leave, entry = make_specs(Latency())
        leave, entry = (spec._replace(n_frames=16) for spec in (leave, entry))
        layout = ubp_x86.block_layout(leave)
        n_code, at = 2 * PAGE, 2 * PAGE + ubp_x86.frames_layout(entry)[1]
        size = _pages(at + 64 + layout.size)
        literal = n_code - 8        # holds where the only shard is

        def make(vaddr):
            place = ubp_x86.Place(
                ubp_x86.Shards(ubp_x86.CPU_FROM_LSL, 0, 0, 6,
                               vaddr + literal), at % 64,
                frames=vaddr + n_code, tsc=clock.scale)
            return ubp_x86.empty_function(
                vaddr, entry, leave, place).ljust(literal, b"\x90") \
                + struct.pack("<Q", vaddr + at - at % 64)
        vaddr = _map_code(size, make, n_code)
        function = ctypes.PYFUNCTYPE(None)(vaddr)
        for _ in range(2000):
            function()
        words = struct.unpack("<%dQ" % (layout.size // 8), ctypes.string_at(
            vaddr + at, layout.size))
        _overheads.append(block_reading(layout, [words]).value.percentile(50))
        _munmap(vaddr, size)
    return _overheads[0]


_MOST_UNFINISHED_S = 0.2        # a record that is being written for longer


class TraceRing:
    """One processor's records of a trace probe, for one reader.

    Never waits: a record that is being written is set aside, and looked
    at again. What the target says is checked: a record counts only if its
    sequence was right before and after it was copied.
    """

    def __init__(self, block, cpu):
        self.block = block
        self.arena, self.cpu, self.layout = block.arena, cpu, block.layout
        self.policy = block.spec.policy
        self._at = block.offset + self.layout.start
        self._slots = self._at + ubp_x86.RING_SLOTS
        self._head = block.offset
        self._next = 0              # the ticket to look at first
        self._aside = {}            # tickets given out and not complete
        self.n_read = self.n_lost = self.n_invalid = 0
        self.n_bad = 0              # records that contradicted themselves

    def _word(self, offset):
        return struct.unpack("<Q", self.arena.load(self.cpu, offset, 8))[0]

    def reading(self):
        """The Reading of this processor's hits, those not read too."""
        try:
            faults = self._word(self._head + ubp_x86.HEAD_FAULTS)
            full = self._word(self._at + ubp_x86.RING_FULL)
            given = self._word(self._at + ubp_x86.RING_RESERVED)
        except OSError:
            faults, full, given = 0, 0, self._next
        unread = max(0, given - self._next)
        lost = self.n_lost + self.n_bad + max(
            0, unread - self.layout.n_entries)
        recorded = max(0, given - lost)
        return Reading(recorded, recorded, faults, full + lost,
                       invalid=self.n_invalid + self.n_bad)

    def read(self, is_last=False):
        """The records that are complete. -> [bytes of one or more]

        is_last   nobody writes any more: what is not complete is lost
        """
        n, found = self.layout.n_entries, []
        try:
            reserved = self._word(self._at + ubp_x86.RING_RESERVED)
            self._look_aside(found, is_last)
            if not self._next <= reserved < self._next + (1 << 40):
                self.n_invalid += 1     # begin again where it says
                self._next = reserved
                self._aside.clear()
            oldest = max(self._next, reserved - n)
            self.n_lost += oldest - self._next
            for first, last in _unwrapped(oldest, reserved, n):
                self._read_slots(first, last, found)
            self._next = reserved
            self._look_aside(found, is_last)
            if self.policy != "overwrite":
                self.arena.store_word(
                    self.cpu, self._at + ubp_x86.RING_CONSUMED,
                    self._consumed(reserved))
            owner = self.arena.ring_owner
            if owner is not None and found:
                owner.wake()
        except OSError:
            pass                    # of anonymous memory that is gone
        return found

    def _consumed(self, reserved):
        """The ticket up to which slots may be used again.

        Who would rather wait than lose a record waits for one that is
        being written, too, but not for one that may never be.
        """
        if self.policy == "block" and self._aside:
            young = time.monotonic() - _MOST_UNFINISHED_S
            return min((ticket for ticket, since in self._aside.items()
                        if since > young), default=reserved)
        return reserved

    def _read_slots(self, first, last, found):
        """Copy the slots of tickets that lie behind each other."""
        size = self.layout.entry_size
        at = self._slots + first % self.layout.n_entries * size
        before, data, after = [
            self.arena.load(self.cpu, at, (last - first) * size)
            for _ in range(3)]
        before, after = [memoryview(each).cast("Q")[::size // 8]
                         for each in (before, after)]
        before = before.tolist()
        if (before == list(range(2 * first + 2, 2 * last + 2, 2))
                and after.tolist() == before):
            found.append(data)
            self.n_read += last - first
            return
        words = (1 << 64) - 1
        for n, ticket in enumerate(range(first, last)):
            if before[n] == after[n] == 2 * ticket + 2 & words:
                found.append(data[n * size:(n + 1) * size])
                self.n_read += 1
            else:
                self._aside[first + n] = time.monotonic()

    def _look_aside(self, found, is_last):
        """Take the records that have become complete; give up others."""
        for ticket in list(self._aside):
            size = self.layout.entry_size
            at = self._slots + ticket % self.layout.n_entries * size
            data = self.arena.load(self.cpu, at, size)
            before = int.from_bytes(data[:8], "little")
            data = self.arena.load(self.cpu, at, size)
            after = self._word(at)
            if before == after == 2 * ticket + 2:
                found.append(data)
                self.n_read += 1
            elif is_last or after > 2 * ticket + 2:
                self.n_lost += 1
            else:
                continue
            del self._aside[ticket]


class FutexOwner:
    """The thread whose death the kernel tells to hits that wait for us.

    Its tid is in a futex of the arena, which is on its robust list: when
    it ends, in whatever way, FUTEX_OWNER_DIED is set and a waiter woken.
    So it is with each word on the list that holds its tid then; the first
    is marked before the others are. The list lies in our memory, so the
    target cannot lengthen it. Source: robust-futex-ABI.rst of the kernel's
    Documentation/locking; all entries have one distance to their words.

    at       the offset of the first word in the arena
    n, each  how many words there are, and how far apart
    """

    def __init__(self, arena, at, n=1, each=8):
        self.arena, self.at = arena, at
        self.vaddr = arena.base + at
        self.tid, self._is_over = 0, threading.Event()
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(ready, n, each), daemon=True,
            name="ubp-owner-%d" % arena.tracer.tgid)
        self._thread.start()
        ready.wait()

    def _run(self, ready, n, each):
        word = ctypes.c_uint32.from_buffer(self.arena.memory, self.at)
        nodes, head = (ctypes.c_uint64 * (n * each // 8))(), (
            ctypes.c_uint64 * 3)()
        first = ctypes.addressof(nodes)
        for at in range(n):
            nodes[at * each // 8] = first + (at + 1) * each
        nodes[(n - 1) * each // 8] = ctypes.addressof(head)
        head[0] = first
        head[1] = (ctypes.addressof(word) - first) & (1 << 64) - 1
        try:
            syscall(SYS_set_robust_list, ctypes.addressof(head),
                    ctypes.sizeof(head), 0, 0, 0)
            self.tid = word.value = syscall(SYS_gettid)
        except OSError as error:
            log.warning("no hit waits for us: %s", error)
        ready.set()
        self._is_over.wait()
        word.value, head[0] = 0, ctypes.addressof(head)
        self._wake(word)

    @staticmethod
    def _wake(word):
        _futex(SYS_futex, ctypes.addressof(word), FUTEX_WAKE, 1 << 30, 0, 0,
               0)

    @property
    def is_closed(self):
        """Has it ended?"""
        return self._is_over.is_set()

    def close(self):
        """Nobody waits from now on. May be repeated."""
        self._is_over.set()
        self._thread.join()


class RingOwner(FutexOwner):
    """The owner of the word at which hits wait for room in a ring."""

    def __init__(self, arena):
        super().__init__(arena, arena.shard_at(0) + arena.allocate(64))

    def wake(self):
        """There is room again: let those who wait try."""
        memory = self.arena.memory
        if memory is None or self.is_closed:
            return
        try:
            word = ctypes.c_uint32.from_buffer(memory, self.at)
        except ValueError:          # closed meanwhile, by another thread
            return
        if word.value & FUTEX_WAITERS and self.tid:
            word.value = self.tid
            self._wake(word)


def _unwrapped(first, last, n):
    """Tickets first to last, in at most two runs of slots."""
    if first < last:
        wrap = min(last, (first // n + 1) * n)
        yield first, wrap
        if wrap < last:
            yield wrap, last


def added(one, other):
    """Two results of one kind as one: ints, Histograms, or dicts of them."""
    if not isinstance(one, dict):
        return one + other
    both = dict(one)
    for key, value in other.items():
        both[key] = both[key] + value if key in both else value
    return both


class Event(NamedTuple):
    """One hit, as Trace recorded it."""
    time_ns: int            # CLOCK_REALTIME
    tid: int                # 0: not known
    cpu: int
    pid: int                # of the process that made the hit; 0: unknown
    site: "Site"
    kind: str               # "entry", "exit" or "hit" (neither)
    values: tuple           # int, bytes, or None for a fault
    stack: tuple            # of frames, innermost first; or ()
    probe: Optional["Probe"]    # the one that recorded it


# ---- 8  Probes ------------------------------------------------------------
#
# From a pattern to armed sites. The one idea: a plan is a value, made while
# the target runs and without touching it, that can be printed, tested, and
# only then applied. Invariant: what cannot be planned is refused with the
# instruction and the rule that forbids it, and the others go on.

# As measured on one machine: the README's tables.
_COSTS = {"jump": "less than 20 ns", "int3": "a stop by the guardian, some "
          "75 us", "hw": "a trap in the kernel, some 10 us", "hw-ptrace":
          "a stop by the guardian, some 100 us"}


class SitePlan(NamedTuple):
    """What would be done at one site."""
    site: "Site"
    strategy: str           # "jump", or "" if refused
    window: Optional[ubp_x86.Window]
    trampoline_size: int
    rule: str               # the refusal, as a key for summaries
    why: str                # the refusal, in a line
    old: tuple              # ((vaddr, bytes), …) that a patch would replace
    spec: Optional[ubp_x86.Spec] = None     # what would be done there
    index: int = 0          # of the site among its probe's
    at: int = 0             # the displaced instruction that it is done
    #                         before, if that is not the window's first
    dead: tuple = (0, False)        # registers and flags nobody needs there
    is_taken: bool = False  # done only where that jcc is taken
    can_stack: bool = True  # may a body use more than the red zone?
    parts: tuple = ()       # of a return: the SitePlans of entry and exits;
    #                         and those of windows that lend a slot

    @property
    def cost(self):
        """What a hit costs the thread that makes it, in words."""
        costs = [_COSTS[self.strategy]] if self.strategy else ["refused"]
        if self.strategy and self.spec and self.spec.action == "call":
            costs.append("20 to 40 us and the function's own time, in which "
                         "the thread waits, at most %g s; one hit after "
                         "another" % (self.spec.timeout_ns / 1e9))
        return " + ".join(costs)

    @property
    def all_parts(self):
        """The SitePlans that are armed for it, together."""
        return self.parts or (self,)

    def lacks_ret(self, part):
        """Is a part an exit that does not know yet what will be returned?"""
        return bool(part.spec and part.spec.is_exit and self.spec
                    and ubp_x86.uses_ret(self.spec)
                    and not ubp_x86.uses_ret(part.spec))


class Action:
    """What a probe computes at each hit. A value: it can be used again."""

    def __repr__(self):
        return "%s(%s)" % (type(self).__name__, ", ".join(
            "%s=%r" % item for item in sorted(vars(self).items())
            if item[1] not in (None, (), False)))


class Count(Action):
    """Action: count the hits, or add up the values of an expression.

    by    expressions, "caller, tid" say: one count for each of their values
    sum   an expression: its sum instead of the number of hits
    """

    def __init__(self, by=None, sum=None):
        self.by, self.sum = by, sum


class Hist(Action):
    """Action: the distribution of an expression's values.

    by    expressions: a Histogram for each of their values
    """

    def __init__(self, expr, by=None):
        self.expr, self.by = expr, by


OVERFLOWS = ("drop", "overwrite", "block")


class Trace(Action):
    """Action: a record of each hit, with the values of expressions.

    stack     also the call stack
    ring      bytes of a processor's ring; None: as many as are good
    overflow  what a hit does that finds it full: "drop" itself, "overwrite"
              the oldest, or "block" up to 100 ms for the reader
    """

    def __init__(self, *exprs, stack=False, ring=None, overflow="drop"):
        if overflow not in OVERFLOWS:
            raise ProbeError("trace with", "overflow=%r" % (overflow,),
                             "it is one of %s" % ", ".join(OVERFLOWS))
        self.exprs, self.stack = exprs, stack
        self.ring, self.overflow = ring, overflow


class Latency(Action):
    """Action: nanoseconds from a function's entry to its exit.

    by    expressions: a Histogram for each of their values
    """

    def __init__(self, by=None):
        self.by = by


class Stack(Action):
    """Action: count the hits by call stack.

    depth   frames at most;   sum  an expression to add up instead
    unwind  "fp" by frame pointers, "cfi" from a copy of the stack's top;
            None: "fp" where all code on the stack has frame pointers
    """

    def __init__(self, depth=64, sum=None, unwind=None):
        if unwind not in (None, "fp", "cfi"):
            raise ProbeError("unwind by", repr(unwind), "it is fp or cfi")
        if type(depth) is not int or not 1 <= depth <= 64:
            raise ProbeError("walk", "%r frames" % (depth,),
                             "it is a number from 1 to 64")
        self.depth, self.sum, self.unwind = depth, sum, unwind


class Call(Action):
    """Action: call a Python function here at each hit; the thread waits.

    function  called with a Hit, which it may change; what it returns is
              ignored. If it raises, the probe is taken out: see Probe.error
    timeout   seconds after which a thread that waits goes on all the same
    """

    def __init__(self, function, timeout=1.0):
        if not callable(function):
            raise ProbeError("call", repr(function), "it is no function")
        if not _LEAST_TIMEOUT_S <= timeout <= _MOST_TIMEOUT_S:
            raise ProbeError("wait", "%r seconds" % (timeout,),
                             "it is a number from %g to %d" % (
                                 _LEAST_TIMEOUT_S, _MOST_TIMEOUT_S))
        self.function, self.timeout = function, timeout


class HookCall(Call):
    """A Call at the loader's debug hook: it makes no syscall but futex, and
    has slots and a thread of its own, so that no user's function is waited
    for."""


class SignalCount(Count):
    """At the syscalls by which a program says what is to become of SIGTRAP,
    where there are int3s: the guardian learns of it there."""


_OWN = HookCall, SignalCount    # actions of probes that no user has set
_LEAST_TIMEOUT_S, _MOST_TIMEOUT_S = 0.001, 60
_TABLE_BYTES, _RING_BYTES = 1 << 20, 256 << 10      # of one processor
_STACK_BYTES, _STACK_RING_BYTES = 8 << 10, 12 << 20     # of stacks copied
_ALL_SHARDS_BYTES = 64 << 20    # and of all together, unless asked for
_PLAIN_COUNT = ubp_x86.Spec("count")
_LEND = ubp_x86.Spec("lend")    # nothing: its window is there for a slot
_DUMMY_SHARDS = ubp_x86.Shards(ubp_x86.CPU_FROM_RSEQ, 0, 1, 6, 0)


def _expressions(texts, is_exit):
    """(Expression, …) of a text "a, b", of several texts, or of None."""
    if texts is None:
        return ()
    texts = [texts] if isinstance(texts, str) else texts
    return tuple(each for text in texts
                 for each in ubp_x86.parse_expressions(text, is_exit))


def _one_expression(text, is_exit):
    return (ubp_x86.parse_expression(text, is_exit),) if text else ()


def make_spec(action, when=None, is_exit=False):
    """What an action does at one kind of site. -> ubp_x86.Spec

    is_exit  at an exit, where ret and elapsed are known
    Raises ExpressionError, and ProbeError for what is no action.
    """
    by = _expressions(getattr(action, "by", None), is_exit)
    rest = dict(when=(_one_expression(when, is_exit) or (None,))[0],
                keys=by, is_exit=is_exit)
    if isinstance(action, SignalCount):
        spec = ubp_x86.Spec("count", is_quiet=True)
    elif isinstance(action, Count):
        values = _one_expression(action.sum, is_exit)
        spec = ubp_x86.Spec("sum" if values else "count", values=values,
                            **rest)
    elif isinstance(action, Hist):
        spec = ubp_x86.Spec("hist", values=_one_expression(
            action.expr, is_exit), **rest)
    elif isinstance(action, Trace):
        values = tuple(each for text in action.exprs
                       for each in _expressions(text, is_exit))
        spec = ubp_x86.Spec("trace", values=values, policy=action.overflow,
                            stack_size=_STACK_BYTES * bool(action.stack),
                            **rest)
    elif isinstance(action, Stack):
        values = _one_expression(action.sum, is_exit)
        if action.unwind == "fp":
            spec = ubp_x86.Spec("stack", values=values, depth=action.depth,
                                **rest)
        else:                       # unwound here, from copies
            spec = ubp_x86.Spec("trace", values=values,
                                stack_size=_STACK_BYTES, **rest)
    elif isinstance(action, Latency):
        spec = ubp_x86.Spec("hist", values=_one_expression(
            "u64(elapsed)", True), **rest)
    elif isinstance(action, Call):
        spec = ubp_x86.Spec("call", timeout_ns=int(action.timeout * 1e9),
                            is_quiet=isinstance(action, HookCall), **rest)
    else:
        raise ProbeError("probe with", repr(action),
                         "that action is not built yet")
    ubp_x86.block_layout(spec)          # it says what is too much
    return _fitted(spec, 1 << (n_possible_cpus() - 1).bit_length(),
                   getattr(action, "ring", None))


def make_specs(action, when=None, is_return=False):
    """(what a probe does, what the function's entries do for it or None).

    A condition on a latency holds at the entry, unless it is one on what
    only the exit knows.
    """
    if not (is_return or isinstance(action, Latency)):
        return make_spec(action, when), None
    at_entry = None
    if isinstance(action, Latency) and when:
        try:
            at_entry = ubp_x86.parse_expression(when)
            when = None
        except ubp_x86.ExpressionError:
            pass                    # then it must be one at the exit
    spec = make_spec(action, when, True)
    entry = ubp_x86.entry_spec(spec)
    return spec, entry and entry._replace(when=at_entry)


def _fitted(spec, n_shards, ring):
    """A spec whose table or ring is as large as is good for so many
    processors; a ring of so many bytes in each, if that was asked for."""
    layout = ubp_x86.block_layout(spec)
    if layout.kind == "ring":
        size = ring or min(_STACK_RING_BYTES if spec.stack_size else
                           _RING_BYTES, _ALL_SHARDS_BYTES // n_shards)
        n = max(2, size // layout.entry_size)
        if n > 1 << 24:
            raise ProbeError("make", "a ring of %d bytes" % size,
                             "it has more than %d records" % (1 << 24))
        return spec._replace(n_slots=1 << n.bit_length() - 1)
    if layout.kind != "table":
        return spec
    most = min(_TABLE_BYTES, _ALL_SHARDS_BYTES // n_shards)
    n_entries = 4096
    while n_entries > 64 and ubp_x86.block_layout(
            spec._replace(n_entries=n_entries)).size > most:
        n_entries //= 2
    return spec._replace(n_entries=n_entries)


def assemble(window, vaddr, parts):
    """The trampoline of [(Spec, Place)] at a window. -> Trampoline"""
    parts = [part for part in parts if part[0] != _LEND]
    if _is_count(parts):
        (_, place), = parts
        return ubp_x86.count_trampoline(window, vaddr, place.block // 8,
                                        place.shards)
    return ubp_x86.trampoline(window, vaddr, parts)


def _is_count(parts):
    """Is this [(Spec, Place)] of one body that only counts?"""
    return (len(parts) == 1 and parts[0][0] == _PLAIN_COUNT
            and not parts[0][1].at)


def _size_of(window, vaddr, parts):
    """The size of assemble() of that."""
    if _is_count(parts):            # most plans are of these
        return ubp_x86.count_size(window, vaddr, parts[0][1].shards)
    return len(assemble(window, vaddr, parts).code)


_ALL_OFFERS = ubp_x86.Place(_DUMMY_SHARDS, 0, tid_offset=_TID_OFFSETS[0],
                            tsc=(1 << 32, 0))


@functools.lru_cache(maxsize=64)        # sites on one page share it
def _dummy_place(vaddr, offers=None, **others):
    """A Place like any near vaddr: what is made for it has its size.

    offers   a Place with what the target offers; None: everything
    others   more of its fields
    """
    return (offers or _ALL_OFFERS)._replace(
        shards=_DUMMY_SHARDS._replace(base=vaddr), private=vaddr,
        frames=vaddr, tracer=vaddr, calls=vaddr, **others)


_FAULT_SIGNALS = ((signal.SIGSEGV, ubp_x86.FAULTS_OF_MEMORY),
                  (signal.SIGBUS, ubp_x86.FAULTS_OF_MEMORY),
                  (signal.SIGFPE, ubp_x86.FAULTS_OF_NUMBERS))
# Code that its own libc identifies by its address: pthread_cancel(3).
_CANCELLATION = ("__syscall_cancel_arch", "__syscall_cp_asm", "__cp_begin",
                 "__syscall_cp_internal")


_MOST_REMEMBERED = 1000         # functions planned at a time
_MOST_BEFORE_SITE = 16          # bytes in front of a site to be displaced
_MOST_MOVABLE = 64              # windows that are asked for their slots,
_NEAR = 256                     # which are within so many bytes of a site


class Planner:
    """Plans sites in one process. Reads memory and files; stops nothing.

    n_sites   about how many: for many, tables pay
    """

    def __init__(self, pid, read, n_sites=1):
        self.pid, self.read, self._is_for_many = pid, read, n_sites > 8
        # module -> ByteRanges
        self.taken = collections.defaultdict(ubp_x86.ByteRanges)
        self.offers = None          # Place: what the target offers to bodies
        self.windows = {}           # vaddr of each displaced insn, and of
        #                             those that one keeps: Window
        # {Window.site: (module, Window, vaddrs, turn)}; see settle()
        self._kept, self._turn = {}, 0
        self._slots = {}            # {Window.slot: Window}, none lent
        self._stuck = set()         # Window.sites; no other slot is free
        self._undo = []             # [(Window.site, [what it replaced])]
        self._through = 0           # what the next window must hold, too
        self._named = 0             # mask of registers that probes read
        self._spec = None           # the last one whose are among them
        self.patches = {}           # {window.site: Patch} that are armed
        self._borrowers = []        # those whose window has a lender
        # () -> the Sites that have a debug register; vaddrs that will have
        self.watched, self._to_watch = tuple, set()
        self.foreseen = {}          # {vaddr: what foresee() found there}
        self._scans = {}
        # module -> (sorted starts of functions, {start: Function})
        self._known = collections.defaultdict(lambda: ([], {}))
        self._texts, self._forbidden = {}, {}
        self._pages = {}            # vaddr -> the page of memory, for a while
        status = read_status(pid)
        caught = int(status.get("SigCgt", "0"), 16)
        self._catches = sum({mask for signo, mask in _FAULT_SIGNALS
                             if caught >> signo - 1 & 1})
        self._seccomp = status.get("Seccomp", "0") != "0"
        self._uprobes = uprobes()

    def plan(self, site, spec=_PLAIN_COUNT, index=0, entry=None,
             strategies=("jump",)):
        """-> SitePlan; never raises for what the target's code is like.

        entry       what is done at the entry for exits that do spec, or None
        strategies  to be tried in this order, "jump" and "int3"; entry and
                    exits of one function may differ
        """
        if is_watch(site):
            return SitePlan(site, "", None, 0, "memory", "memory takes no "
                            "jump; --strategy hw watches it", ())
        try:
            if spec.is_exit:
                return self._plan_return(site, spec, index, entry,
                                         strategies)
            return self._plan_either(strategies, site, spec, index)
        except (RefusalError, RelocationError) as refusal:
            return SitePlan(site, "", None, 0, refusal.rule, refusal.why, ())
        except UbpError as error:
            return SitePlan(site, "", None, 0, "unreadable", error.why, ())

    def _plan_one(self, site, spec, index, leave=None, is_trap=False):
        """The SitePlan of one instruction. Raises UbpError.

        leave   the ubp_x86.Exit that it is, if it is one
        A window that is planned or armed there already is shared. What a
        spec names no body planned from now on may change, even where the
        program needs it no more: a later site would see what it left.
        """
        if spec is not self._spec:
            self._named |= ubp_x86.input_registers(spec)
            self._spec = spec
        window, absorbed = self.windows.get(site.vaddr), None
        if window is not None and is_trap and (
                site.vaddr not in self._kept[window.site][2]):
            window = None           # it stays where it is
        if window is None:
            window, absorbed = ((self._trap_window(site), []) if is_trap
                                else self._window(site))
        elif window.is_trap != is_trap:
            raise RefusalError("overlap", "%s of ubp is there" % (
                "an int3" if window.is_trap else "a jump"), site.vaddr)
        plan = self._fitted(
            site, "int3" if is_trap else "jump", window, spec, index,
            leave is not None and leave.is_conditional,
            not site.module.elf.is_go)              # they have little stack
        lent = window.lender and self._plan_lender(plan)
        if absorbed is not None:
            self._put(site.module, window, site.vaddr, absorbed)
        if not lent:
            return plan
        if lent.window.site not in self._kept:
            self._put(site.module, lent.window, None, [])
        return plan._replace(
            parts=(plan, lent), trampoline_size=plan.trampoline_size
            + lent.trampoline_size)

    def _plan_lender(self, plan):
        """The SitePlan of the window that a plan's slot is in. It is that
        one's alone: no other site may have it, or take it into its own."""
        module, lender = plan.site.module, plan.window.lender
        function = module.function_at(lender.site)
        site = Site(lender.site, function, lender.site - (
            function.vaddr if function else lender.site), (), module)
        return self._fitted(site, "jump", lender, _LEND, plan.index)

    def _fitted(self, site, strategy, window, spec, index, is_taken=False,
                can_stack=True):
        """The SitePlan of a window: with place, size and old bytes."""
        at, dead, parts = 0, (0, False), []
        if window.kept:
            _refuse_changed_inputs(window, site.vaddr, spec)
        if is_taken or site.vaddr > window.site:
            at = site.vaddr
            registers, flags = ubp_x86.liveness(self.scan(
                site.module).analysis(self.function(site.module, at)), at)
            dead = registers & ~self._named, flags
        vaddr = (window.site & -PAGE) - PAGE
        if self.patches:
            parts = [body.part_in(window) for patch in patches_in(
                self.patches, window) for body in patch.bodies]
        place = _dummy_place(vaddr, self.offers, at=at, dead=dead,
                             is_taken=is_taken, can_stack=can_stack)
        size = _size_of(window, vaddr, parts + [(spec, place)])
        return SitePlan(site, strategy, window, size, "", "",
                        self._text_before(site.module, window), spec, index,
                        at, dead, is_taken, can_stack)

    def settle(self, plans):
        """Plans as they are when all are made: a later one may have taken
        the window of an earlier one into its own, or its slot, for which it
        got another. -> [SitePlan]"""
        settled = [self._settled(plan) for plan in plans]
        self._pages = {}
        self._turn += 1             # from now on they stay as they are
        return settled

    def _settled(self, plan):
        if plan.parts:
            parts = tuple(map(self._settled, plan.parts))
            for part in parts:
                if not part.strategy:
                    return part._replace(site=plan.site)
            return plan._replace(
                parts=parts, window=parts[0].window, old=parts[0].old,
                trampoline_size=sum(part.trampoline_size for part in parts))
        window = self.windows.get(plan.site.vaddr)
        if (plan.strategy != "jump" or plan.spec == _LEND
                or window == plan.window):
            return plan
        try:
            return self._fitted(plan.site, plan.strategy, window, plan.spec,
                                plan.index, plan.is_taken, plan.can_stack)
        except UbpError as error:
            return SitePlan(plan.site, "", None, 0, getattr(
                error, "rule", "unreadable"), error.why, ())

    def _put(self, module, window, vaddr, absorbed):
        """Keep a new window, for the site at vaddr; absorbed: those that it
        takes the place of. None: it is for no site, it lends a slot."""
        before = tuple([self._drop(other.site) for other in absorbed])
        vaddrs = {vaddr, *[insn.vaddr for insn in window.insns]
                  } if vaddr is not None else set()
        for _, _, others, _ in before:
            vaddrs.update(others)
        self._add(module, window, vaddrs, self._turn)
        self._undo.append((window.site, before))

    def _add(self, module, window, vaddrs, turn=-1):
        taken = self.taken[module]
        for low, high in window.ranges:
            taken.add(low, high)
        self._kept[window.site] = module, window, tuple(vaddrs), turn
        if window.slot and not window.lender:
            self._slots[window.slot] = window
        self.windows.update(dict.fromkeys(vaddrs, window))
        for insn in window.kept:    # nobody arrives between it and the jump
            self.windows.setdefault(insn.vaddr, window)

    def _drop(self, vaddr):
        """Give back a window's bytes. -> what _add() would keep again"""
        module, window, vaddrs, turn = self._kept.pop(vaddr)
        self._slots.pop(window.slot, None)
        self._stuck.clear()
        for low, high in window.ranges:
            self.taken[module].remove(low, high)
        for each in vaddrs + tuple(insn.vaddr for insn in window.kept):
            if self.windows.get(each) is window:
                del self.windows[each]
        return module, window, vaddrs, turn

    def _go_back(self, n):
        """Undo all but the first n of what _put() did."""
        while len(self._undo) > n:
            vaddr, before = self._undo.pop()
            self._drop(vaddr)
            for each in before:
                self._add(*each)

    def _trap_window(self, site):
        """The Window of an int3: any instruction that runs elsewhere too."""
        module = site.module
        if module.shared_text:
            raise RefusalError("shared text", "its text is mapped shared or "
                               "from huge pages", site.vaddr)
        return ubp_x86.plan_trap(
            site.vaddr, self.function(module, site.vaddr), self.scan(module),
            self._cancellation(module), self._seccomp,
            self.taken[module])

    def _plan_either(self, strategies, *what):
        """_plan_one by the first strategy that does not refuse."""
        first = None
        for strategy in strategies:
            try:
                return self._plan_one(*what, is_trap=strategy == "int3")
            except (RefusalError, RelocationError) as refusal:
                first = first or refusal
        raise first

    def exits(self, site, entry):
        """The ubp_x86.Exits of the function that a site begins.

        entry   what is done at the entry for them, or None
        Raises RefusalError where they are not known, or not its own.
        """
        module, function = site.module, self.function(site.module, site.vaddr)
        if module.elf.is_go:
            raise RefusalError("Go", "a goroutine's stack moves, so an exit "
                               "does not know its entry", site.vaddr)
        if function is None or function.vaddr != site.vaddr:
            raise RefusalError("unknown bounds", "nothing tells where its "
                               "function begins and ends", site.vaddr)
        own = {symbol + part for symbol in site.names for part in (".cold",)}

        def is_part(vaddr):
            other = module.function_at(vaddr)
            return other is not None and any(
                name.split(".cold")[0] + ".cold" in own
                for name in other.names if ".cold" in name)
        leaves = ubp_x86.find_exits(function, self.scan(module), is_part)
        if entry is None and any(leave.is_shared for leave in leaves):
            raise RefusalError("exit", "it shares an exit with other "
                               "functions, at 0x%x" % leaves[-1].vaddr,
                               site.vaddr)
        return leaves

    def _plan_return(self, site, spec, index, entry, strategies):
        """The SitePlan of all exits of a function, and of its entry."""
        leaves = self.exits(site, entry)
        todo = [(site, entry, None)] * (entry is not None) + [
            (site._replace(vaddr=leave.vaddr, offset=leave.vaddr
                           - site.vaddr), spec if leave.is_ret
             else ubp_x86.without_ret(spec), leave) for leave in leaves]
        parts = [part for plan in self._plan_parts(todo, index, strategies)
                 for part in plan.all_parts]
        return parts[0]._replace(
            site=site, parts=tuple(parts), spec=spec,
            trampoline_size=sum(part.trampoline_size for part in parts))

    def _plan_parts(self, todo, index, strategies):
        """The SitePlans of [(Site, Spec, Exit or None)], in that order.

        Each window takes bytes that another may need: if they are in each
        other's way, the last is tried first, then one window for the exit
        that was refused and what is before it. Raises UbpError.
        """
        n_before, first, through = len(self._undo), None, {}
        for turn in range(3):
            parts = {}
            try:
                for there, spec, leave in todo[::-1] if turn == 1 else todo:
                    self._through = through.get(there.vaddr, 0)
                    parts[there.vaddr, leave is None] = self._plan_either(
                        strategies, there, spec, index, leave)
                return [parts[there.vaddr, leave is None]
                        for there, _, leave in todo]
            except (RefusalError, RelocationError) as refusal:
                self._go_back(n_before)
                if leave is not None:
                    refusal = RefusalError("exit", "its exit at +0x%x: %s" % (
                        there.offset, refusal.why), there.vaddr)
                if first is None:
                    first = refusal
                    before = [each.vaddr for each, _, _ in todo
                              if 0 < there.vaddr - each.vaddr < 16]
                    through = {max(before): there.vaddr} if before else {}
            finally:
                self._through = 0
        raise first

    def close(self):
        """Let go of the modules' code now, not when garbage is collected.

        A scan asks its planner for functions: each keeps the other.
        """
        self._scans.clear()

    def lose(self, module):
        """Let go of what is known of a module: it is gone."""
        for known in (self._scans, self._texts, self._known,
                      self._forbidden):
            known.pop(module, None)

    def forget(self):
        """Let go of what is known of functions: it can be found again.

        Python's collector else looks at all of it, again and again, while
        many sites are armed.
        """
        for scan in self._scans.values():
            scan.forget()

    def keep_only(self, patches):
        """Give back the bytes of every window but those of {…: Patch}."""
        self.taken.clear()
        self.windows, self._kept = {}, {}
        self._slots, self._stuck = {}, set()
        self.patches, self._undo, self._pages = patches, [], {}
        self._borrowers = [patch for patch in patches.values()
                           if patch.window.lender]
        self._to_watch = set()
        for patch in patches.values():
            self._add(patch.site.module, patch.window, set() if patch.lends
                      else {insn.vaddr for insn in patch.window.insns}.union(
                          body.part_plan.site.vaddr for body in patch.bodies))

    def _window(self, site):
        """(a new Window, [those of ubp that it takes the place of])"""
        module = site.module
        if module.shared_text:
            raise RefusalError("shared text", "its text is mapped shared or "
                               "from huge pages", site.vaddr)
        window = self._foreseen(module, site.vaddr)
        if window is not None:
            return window, []
        function = self.function(module, site.vaddr)
        if function is None:
            raise RefusalError("unknown bounds", "no symbol and no unwind "
                               "entry tells where its function ends",
                               site.vaddr)
        window, absorbed = self._plan_window(function, site)
        _refuse_signal_return(function, window)
        if window.lender:
            _refuse_signal_return(self.function(
                module, window.lender.site), window.lender)
        for insn in window.kept if module.has_file else ():
            if self.read(insn.vaddr, insn.size) != insn.code:
                raise RefusalError("changed text", "the text at 0x%x differs "
                                   "from its file" % insn.vaddr, insn.vaddr)
        return self._without_named(window), absorbed

    def _without_named(self, window):
        """A Window whose dead registers are none that a probe reads."""
        return window._replace(
            dead_regs=window.dead_regs & ~self._named
        ) if window.dead_regs & self._named else window

    def foresee(self, module, vaddr):
        """(the Window at a vaddr if there were no other windows, what bytes
        it would be another for if they were taken), or None."""
        function = self.function(module, vaddr)
        if function is None or module.shared_text:
            return None
        taken = _Asked()
        try:
            window = self._jump_window(function, module, vaddr, taken)
            _refuse_signal_return(function, window)
        except UbpError:
            return None
        return None if window.kept else (window, tuple(taken.asked))

    def _foreseen(self, module, vaddr):
        """The Window of foresee(), if it was asked and that holds."""
        window, asked = self.foreseen.get(vaddr, (None, ()))
        taken = self.taken[module]
        if window is None or self._through or any(
                [taken.overlap(low, high) for low, high in asked]):
            return None
        try:
            self._refuse_watched(window)
        except RefusalError:
            return None
        return self._without_named(window)

    def _jump_window(self, function, module, vaddr, taken, through=0,
                     may_borrow=False):
        """ubp_x86.plan_window() of this process."""
        return ubp_x86.plan_window(
            function, vaddr, self.scan(module),
            forbidden=self._cancellation(module), seccomp=self._seccomp,
            catches=self._catches, taken=taken, through=through,
            is_go=module.elf.is_go, may_borrow=may_borrow)

    def _plan_window(self, function, site):
        """(the Window at a site, [windows that it takes the place of]).

        Else it is one that begins before the site: control comes to an
        instruction within a window only through those in front of it, so
        the body at the site runs before its own copy. What overlaps other
        windows of ubp becomes one window for all their sites.
        """
        module = site.module
        starts, refusal = [site.vaddr], None
        taken = self.taken[module]

        def plan(vaddr, through=0, may_borrow=False):
            window = self._jump_window(function, module, vaddr, taken,
                                       through, may_borrow)
            self._refuse_watched(window)
            return window
        for vaddr in starts:
            try:
                return plan(vaddr, self._through if vaddr == site.vaddr
                            else site.vaddr), []
            except RefusalError as why:
                if refusal is None:
                    refusal = why
                    starts += _starts_before(
                        self.scan(module).analysis(function), site.vaddr)
        for vaddr in starts:
            found = self._shared_window(plan, site.vaddr, vaddr, taken)
            if found is not None:
                return found
        window = self._window_after_moves(plan, module, site.vaddr)
        if window is not None:
            return window, []
        try:
            if site.vaddr == function.vaddr:    # the price is another's
                return plan(site.vaddr, self._through, may_borrow=True), []
        except RefusalError:
            pass
        raise refusal

    def _window_after_moves(self, plan, module, vaddr):
        """The Window of plan(vaddr) once others have moved to other slots,
        or None. The fewest move: one to a slot that is free, and each of
        the rest to where the one before it was.

        Padding is scarce, and who is planned first takes what is nearest.
        """
        wanted = self._window_in_their_slots(plan, module, vaddr)
        queue, wants = [wanted] * (wanted is not None), {}
        n_before = len(self._undo)
        for window in queue:
            for holder in self._movable(module, *ubp_x86.slot_range(
                    window.site)):
                if holder.site in wants:
                    continue
                if len(wants) == _MOST_MOVABLE:
                    return None
                wants[holder.site] = window
                queue.append(holder)
                while holder is not wanted and self._move(module, holder):
                    holder = wants[holder.site]
                try:
                    if holder is wanted:
                        return plan(vaddr, self._through)
                except RefusalError:
                    pass
                self._go_back(n_before)
        self._stuck.update(wants)
        return None

    def _window_in_their_slots(self, plan, module, vaddr):
        """The Window of plan(vaddr) if all others near it gave their slots,
        or None."""
        movable = self._movable(module, vaddr - _NEAR, vaddr + _NEAR)
        taken = self.taken[module]
        for each in movable:
            taken.remove(each.slot, each.slot + ubp_x86.JUMP_SIZE)
        try:
            return plan(vaddr, self._through) if movable else None
        except RefusalError:
            return None
        finally:
            for each in movable:
                taken.add(each.slot, each.slot + ubp_x86.JUMP_SIZE)

    def _movable(self, module, low, high):
        """The Windows of this turn with slots in [low, high), by slots: no
        patch has one yet, and it is not known that none is free for it."""
        found = []
        for slot in range(low, high - ubp_x86.JUMP_SIZE + 1):
            window = self._slots.get(slot)
            if window is None or window.site in self._stuck:
                continue
            owner, _, _, turn = self._kept[window.site]
            if (owner is module and turn == self._turn
                    and not patches_in(self.patches, window)):
                found.append(window)
        return found

    def _move(self, module, window):
        """Give a Window another slot. -> was there one?"""
        moved = window._replace(slot=ubp_x86.other_slot(
            self.function(module, window.site), window, self.scan(module),
            forbidden=self._cancellation(module), taken=self.taken[module]))
        if not moved.slot:
            return False
        try:
            self._text_before(module, moved)
        except UbpError:
            return False
        self._put(module, moved, window.site, [window])
        return True

    def watch(self, vaddrs):
        """These will have debug registers. RefusalError for one that is
        displaced: its instruction runs elsewhere, and would not be seen."""
        lenders = {insn.vaddr: window.lender
                   for _, window, *_ in self._kept.values() if window.lender
                   for insn in window.lender.insns}
        for vaddr in vaddrs:
            window = self.windows.get(vaddr) or lenders.get(vaddr)
            if (window is not None and not window.is_trap
                    and any(insn.vaddr == vaddr for insn in window.insns[1:])):
                raise RefusalError("overlap", "a jump of ubp at 0x%x has the "
                                   "instruction run elsewhere" % window.site,
                                   vaddr)
        self._to_watch.update(vaddrs)

    def _refuse_watched(self, window):
        """Refuse to displace what a debug register of ours waits for."""
        there = self._to_watch.union([site.vaddr for site in self.watched()])
        if not there:
            return
        for insn in window.insns[1:] + (
                window.lender.insns if window.lender else ()):
            if insn.vaddr in there:
                raise RefusalError("overlap", "a debug register of ubp waits "
                                   "for 0x%x" % insn.vaddr, window.site)

    def _shared_window(self, plan, site, vaddr, taken):
        """(a Window from vaddr on, [those of ubp in its way]), or None.

        It displaces all that they do, and the instruction at site.
        """
        absorbed, through = [], site if vaddr != site else self._through
        other = self.windows.get(vaddr)
        if other is not None and (other.site != vaddr or other.is_trap):
            return None             # it begins within another
        try:
            for place in range(vaddr, site + _MOST_BEFORE_SITE):
                other = self.windows.get(place)
                if (other is None or other.site != place or other.is_trap
                        or other.lender):
                    continue
                absorbed.append(other)
                for low, high in other.ranges:
                    taken.remove(low, high)
                through = max(through, other.last)
                try:
                    window = plan(vaddr, through)
                except RefusalError:
                    continue
                kept = max([each.kept for each in absorbed], key=len)
                return window._replace(kept=kept), absorbed
            return None
        finally:
            for other in absorbed:
                for low, high in other.ranges:
                    taken.add(low, high)

    def function(self, module, vaddr):
        """The ubp_x86.Function round a vaddr, or None."""
        starts, known = self._known[module]
        function = known.get(vaddr)
        if function is None and starts:
            function = known[starts[bisect.bisect_right(starts, vaddr) - 1]]
        if function is not None:
            low, size, _, entries = function[:4]
            if 0 <= vaddr - low < size and not (
                    entries and entries[0] <= vaddr):
                return function     # another may begin at its entries: which
        #                             was asked for first must not tell
        bounds = module.bounds(vaddr)
        if bounds is None:
            return None
        start, size, end = bounds
        if start in known:
            return known[start]         # vaddr is in its padding
        end = min(max(end, start + size), start + size + PAGE)
        code = _cut(self.text_of(module), start, end - start)
        if len(code) < size:
            return None
        function = ubp_x86.Function(
            start, size, code, *module.inside(start, size, end))
        bisect.insort(starts, start)
        known[start] = function
        return function

    def text_of(self, module):
        """[(vaddr, bytes)] of a module's text, from the file, read once."""
        if module not in self._texts:
            self._texts[module] = module.text_code()
        return self._texts[module]

    def peek_text(self, module):
        """The same, not kept. [] where it is too much."""
        try:
            return self._texts.get(module) or module.text_code()
        except SymbolError:
            return []

    def syscall_number(self, module, vaddr, known):
        """As ubp_x86.syscall_number(); known where it is set in front, which
        holds if nothing tells of the function."""
        function = self.function(module, vaddr)
        if function is None or vaddr >= function.vaddr + function.size:
            return known
        try:
            number = ubp_x86.syscall_number(
                self.scan(module).analysis(function), vaddr)
        except RefusalError:
            return known
        return known if number is not None and (
            known != ubp_x86.ANY_SYSCALL) else number

    def scan(self, module):
        """The BranchScan of a module, made once."""
        if module not in self._scans:
            text, pages = self.text_of(module), {}

            def page_at(vaddr):
                # One that cannot be read is remembered too: most constants
                # in code that could name a table name nothing.
                if vaddr not in pages:
                    try:
                        pages[vaddr] = self.read(vaddr, PAGE)
                    except UbpError:
                        pages[vaddr] = b""
                return pages[vaddr]

            def read(vaddr, size):
                # Text from the file, free of patches; data from memory,
                # where the loader has relocated it.
                data = _cut(text, vaddr, size)
                if not data:
                    data = [page_at(page) for page in range(
                        vaddr & -PAGE, vaddr + size, PAGE)]
                    data = all(data) and b"".join(data)[vaddr % PAGE:][:size]
                return data if data and len(data) == size else None
            self._scans[module] = ubp_x86.BranchScan(
                text, lambda vaddr: self.function(module, vaddr), read,
                module.elf.type == ET_EXEC, self._is_for_many)
            _share_tables(self._scans[module])
        return self._scans[module]

    def _cancellation(self, module):
        if module not in self._forbidden:
            found = []
            if (module.is_exe or "libc" in module.name
                    or "musl" in module.name):
                for name in _CANCELLATION:
                    found += [(f.vaddr, f.vaddr + max(f.size, 16),
                               "cancellation point")
                              for f in module.named(name)]
            self._forbidden[module] = tuple(found)
        return self._forbidden[module]

    def _memory(self, vaddr, size):
        """The target's memory. Sites that are planned together look at the
        same pages: each is read once, until settle() or keep_only()."""
        first, data = vaddr & -PAGE, b""
        if first + PAGE >= vaddr + size and first in self._pages:
            return self._pages[first][vaddr - first:vaddr - first + size]
        for page in range(first, vaddr + size, PAGE):
            if page not in self._pages:
                self._pages[page] = self.read(page, PAGE)
            data += self._pages[page]
        return data[vaddr - first:vaddr - first + size]

    def _text_before(self, module, window):
        """((vaddr, bytes), …) to be patched, without patches of ubp's own.

        RefusalError if they differ from the file's: another tool, or
        another ubp, has been there.
        """
        text, old = self.text_of(module), []
        undo = [(vaddr, b"", data) for patch in patches_in(
            self.patches, window) + self._borrowers
            for vaddr, data in patch.old.items()] if self.patches else ()
        ranges = window.ranges
        if window.lender:
            ranges += (window.slot, window.slot + ubp_x86.JUMP_SIZE),
        for low, high in ranges:
            n_patched = 2 if window.slot and low == window.site else 5
            memory = self._memory(low, max(high - low, n_patched))
            if undo:
                memory = _overlaid(low, memory, undo)
            old.append((low, memory[:n_patched]))
            memory = memory[:high - low]
            if module.has_file and _cut(text, low, high - low) != memory:
                raise RefusalError(
                    "changed text", "the text at 0x%x differs from its file: "
                    "%s" % (low, _who_changed(self.pid, memory)), low)
            if self._uprobes and _is_under_uprobe(module, low, high,
                                                  self._uprobes):
                raise RefusalError("uprobe", "a kernel uprobe is set there",
                                   low)
        return tuple(reversed(old))     # a slot's jump is written first


class _Asked:
    """Stands for ByteRanges of which nothing is taken; notes what is asked.
    """

    def __init__(self):
        self.asked = []

    def overlap(self, low, high):
        """Nothing does."""
        self.asked.append((low, high))


_CHUNK = 64                     # sites that are foreseen at a time
_LEAST_TO_FORESEE, _MOST_CHILDREN, _CHILD_NICE = 1000, 3, 10
_OWN_EIGHTHS = 0, 3, 1, 0       # of the chunks, with so many children
_FORESIGHT_ROOM = 8 * PAGE      # of a chunk; pages not written to cost nothing
# A child takes some 75 MB for 10 000 sites; much more must be left for it.
_CHILD_ROOM, _CHILD_ROOM_OF_SITE = 512 << 20, 32 << 10
_SEAL = struct.Struct("<II")    # of what is there: size, with this, and CRC-32


def _sealed(data):
    """data behind what tells whether all of it is there."""
    import binascii
    return _SEAL.pack(_SEAL.size + len(data), binascii.crc32(data)) + data


def memory_left():
    """How many bytes this process could still take: what the machine has,
    and what no limit of a memory cgroup that it is in forbids. (proc(5),
    cgroups(7); Documentation/admin-guide/cgroup-v2.rst, memory.max)
    """
    found = re.search(rb"^MemAvailable:\s*(\d+)", read_proc("/proc/meminfo"),
                      re.M)
    left = [int(found.group(1)) << 10 if found else 0]
    for line in os.fsdecode(read_proc("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        folder = "/sys/fs/cgroup" + "/memory" * bool(controllers)
        if "memory" not in (controllers or "memory").split(","):
            continue
        parts = path.strip("/").split("/")
        for n in range(len(parts) + 1):
            at = "/".join([folder] + parts[:n])
            for limit, usage in (("memory.max", "memory.current"),
                                 ("memory.high", "memory.current"),
                                 ("memory.limit_in_bytes",
                                  "memory.usage_in_bytes")):
                most, used = (read_proc(at + "/" + name).strip()
                              for name in (limit, usage))
                if most.isdigit() and used.isdigit():
                    left.append(int(most) - int(used))
    return max(0, min(left))


def _may_fork():
    """Has this process one thread, and is a child of it one like others? It
    may be the first of a new PID namespace, and end it (pid_namespaces(7)).
    """
    ours, childrens = (os.readlink("/proc/self/ns/" + name)
                       for name in ("pid", "pid_for_children"))
    return len(os.listdir("/proc/self/task")) == 1 and ours == childrens


class Foresight:
    """Fills Planner.foreseen for many sites, with the help of children.

    A context manager round the planning of sites, in their order. What is
    planned at one depends on the others only in that their bytes are taken.
    So forked children foresee windows as if nothing were, a chunk of sites
    at a time, and the planner goes from site to site as ever, but finds most
    windows made. It begins with sites that nobody looks at, as for each it
    has a quarter of the work left. It never waits: while the next chunk is
    not there, it foresees the last one that is not, itself. So a child that
    is slow, stuck or dead, or may not read the target, which is no child of
    it (ptrace_scope 1), costs its help and nothing else. Nobody looks at
    exits: most of their work is to find them, and is done where they are
    planned.

    There are children where sites are many, more than one CPU is usable,
    memory is plenty (the target may be in our cgroup, and must not be ended
    for it), and this process has one thread: a fork copies the locks of
    others. They
    write numbers only to memory that all share, [how many chunks are left]
    and then the chunks, each behind its checksum. The host knows nothing of
    them: clone(2) without a signal sends no SIGCHLD and is not waited for by
    wait(2). All their signals are blocked, and they end with us.
    """

    def __init__(self, planner, sites):
        self._planner, self._sites = planner, sites
        self._first, self._end = 0, -(-len(sites) // _CHUNK)
        self._children, self._text, self._map = [], [], None

    def __enter__(self):
        if (sum(not site.is_return for site in self._sites)
                < _LEAST_TO_FORESEE):
            return self
        try:
            for module in {site.module for site in self._sites}:
                module.expect_many()    # as it would after some
            n = min(len(os.sched_getaffinity(0)) - 1, _MOST_CHILDREN)
            if n > 0 and _may_fork():
                self._start(min(n, memory_left() // max(
                    _CHILD_ROOM, len(self._sites) * _CHILD_ROOM_OF_SITE)))
        except (UbpError, OSError) as error:
            log.debug("no children that help to plan: %s", error)
            self.__exit__()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        self._planner.foreseen = {}
        while self._children:
            pid = self._children.pop()
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:      # the host waits with __WALL
                continue
            while _waitpid(pid, None, WALL) < 0 and (
                    ctypes.get_errno() == errno.EINTR):
                pass
        if self._map is not None:
            self._map.close()
            self._map = None

    def _start(self, n):
        """Start n children. What they all need is made before."""
        if not n:
            return
        for module in {site.module for site in self._sites}:
            text = self._planner.text_of(module)
            if text:
                self._planner.scan(module).far(0, 0)    # it makes its tables
            self._text += text
        self._first = self._end * _OWN_EIGHTHS[n] // 8
        self._map = mmap.mmap(-1, PAGE + self._end * _FORESIGHT_ROOM)
        self._map[:8] = struct.pack("<Q", self._end)
        us, mask = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            _block_signals()
            for k in range(n):
                pid = syscall(SYS_clone)
                if not pid:
                    try:
                        self._help(us, self._first + k, n)
                    finally:
                        os._exit(0)
                self._children.append(pid)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _help(self, parent, first, step):
        """In a child: foresee every step-th chunk."""
        syscall(SYS_prctl, PR_SET_PDEATHSIG, signal.SIGKILL)
        os.nice(_CHILD_NICE)            # what the host has to do comes first
        gc.disable()
        self._planner.read(self._sites[0].vaddr, 1)     # or raise
        for chunk in range(first, self._end, step):
            end, = struct.unpack_from("<Q", self._map)
            if chunk >= end or os.getppid() != parent:
                break
            found = [(vaddr, asked, w.site, w.size, len(w.insns), w.slot,
                      w.dead_regs, w.flags_dead, w.is_loop)
                     for vaddr, (w, asked) in self._foresee(chunk)]
            data = _sealed(marshal.dumps(found))[:_FORESIGHT_ROOM]
            at = PAGE + chunk * _FORESIGHT_ROOM
            self._map[at:at + len(data)] = data

    def _foresee(self, chunk):
        """Yield (vaddr, Planner.foresee()) of the sites in a chunk."""
        for site in self._sites[chunk * _CHUNK:(chunk + 1) * _CHUNK]:
            found = None if site.is_return else self._planner.foresee(
                site.module, site.vaddr)
            if found is not None:
                yield site.vaddr, found

    def reach(self, n):
        """The n-th site is planned next: have what is foreseen of it."""
        if self._map is None or n % _CHUNK or n // _CHUNK < self._first:
            return
        while n // _CHUNK < self._end and not self._take(n // _CHUNK):
            self._end -= 1
            self._map[:8] = struct.pack("<Q", self._end)
            if not self._take(self._end):
                self._planner.foreseen.update(self._foresee(self._end))

    def _take(self, chunk):
        """Have what a child has foreseen in a chunk, if it has. -> bool"""
        at = PAGE + chunk * _FORESIGHT_ROOM
        size, _ = _SEAL.unpack_from(self._map, at)
        data = self._map[at:at + min(size, _FORESIGHT_ROOM)]
        if size <= _SEAL.size or data != _sealed(data[_SEAL.size:]):
            return False
        for vaddr, asked, site, n_bytes, n, *rest in marshal.loads(
                data[_SEAL.size:]):
            insns, at = [], site
            for _ in range(n):
                insns.append(ubp_x86.decode(_cut(self._text, at, 15), at))
                at += insns[-1].size
            self._planner.foreseen[vaddr] = ubp_x86.Window(
                site, n_bytes, tuple(insns), *rest), asked
        return True


_tables = {}                    # {text of a module: [uses, its tables]}
_USES, _MOST_TABLES, _MOST_TEXT = 3, 16, 16 << 20


def _share_tables(scan):
    """Where the same text is planned in one process after another, from the
    third on have the branches in it found once for all."""
    if scan.is_absolute or sum(len(code) for _, code
                               in scan.segments) > _MOST_TEXT:
        return                      # its tables hold addresses; or too much
    if scan.text not in _tables and len(_tables) >= _MOST_TABLES:
        _tables.clear()
    entry = _tables.setdefault(scan.text, [0, None])
    entry[0] += 1
    if entry[0] >= _USES:
        entry[1] = entry[1] or scan.make_tables()
        scan.take_tables(entry[1])


def patches_in(patches, window):
    """The Patches of {Window.site: Patch} that begin within a window."""
    return [patches[insn.vaddr] for insn in window.insns
            if insn.vaddr in patches]


def _starts_before(analysis, vaddr):
    """The vaddrs of the instructions in front of one, nearest first."""
    found, end = [], vaddr
    while analysis.at(end) and vaddr - end < _MOST_BEFORE_SITE:
        before = analysis.before(end)
        if before is None or before.vaddr + before.size != end:
            break
        end = before.vaddr
        found.append(end)
    return found


def _refuse_changed_inputs(window, site, spec):
    """Refuse a body behind instructions that change what it reads; and one
    that may do something else instead of them."""
    if site >= window.site:
        return
    registers, is_written = ubp_x86.kept_changes(window, site)
    if (registers & ubp_x86.input_registers(spec) or spec.action == "call"
            or is_written and any(
                each.reads_memory for each in (spec.when,) + spec.keys
                + spec.values if each)):
        raise RefusalError(
            "kept", "%s has to stay, and changes what the probe reads"
            % " ".join(insn.code.hex() for insn in window.kept), site)


def _cut(text, vaddr, size):
    """Up to size bytes at vaddr of [(vaddr, bytes)]; b"" if none has it."""
    for low, data in text:
        if low <= vaddr < low + len(data):
            return data[vaddr - low:vaddr - low + size]
    return b""


def _refuse_signal_return(function, window):
    """Debuggers, unwinders and ubp know a signal frame by these bytes."""
    for form in ubp_x86.RESTORERS:
        at = function.code.find(form)
        vaddr = function.vaddr + at
        if at >= 0 and any(low < vaddr + len(form) and vaddr < high
                           for low, high in window.ranges):
            raise RefusalError("signal return", "0x%x returns from signal "
                               "handlers, and is known by its bytes" % vaddr,
                               vaddr)


def _who_changed(pid, memory):
    if ubp_x86.is_jump(memory):
        headers = [view.header for view in find_arenas(pid) if view.header]
        alive = {header.owner_pid for header in headers
                 if _owner_is_alive(header)}
        if alive:
            return "probed by ubp (pid %s)" % ", ".join(map(str, alive))
        if headers:
            return ("the jump of a ubp that has ended (pid %d); ubp clean "
                    "-p %d takes it out" % (headers[0].owner_pid, pid))
        return "a jump that another tool wrote"
    if memory[:1] == ubp_x86.BREAKPOINT:
        return "a breakpoint or a uprobe"
    return "bytes %s" % memory.hex()


def uprobes():
    """[(path, offset)] of the kernel's uprobes; [] without privilege."""
    text = b""
    for folder in ("/sys/kernel/tracing", "/sys/kernel/debug/tracing"):
        text = text or read_proc(folder + "/uprobe_events")
    return [(path.decode(errors="surrogateescape"), int(offset, 16))
            for path, offset in re.findall(
                rb"^[pr]\S* (/\S+):(0x[0-9a-f]+)", text, re.M)]


def _is_under_uprobe(module, low, high, found):
    """Is one of the uprobes that were found in [low, high) of a module?"""
    return any(path == module.path
               and low <= offset - start + vaddr < high
               and start <= offset < start + size
               for path, offset in found
               for vaddr, size, start in module.text)


def sites_under_uprobes(probe):
    """The sites on whose jump the kernel has put a uprobe. -> [Site]

    A hit there runs the file's first instruction, and goes on in the middle
    of the jump: the probe is to be taken out at once.
    """
    found = uprobes()
    sites = [(site, ubp_x86.JUMP_SIZE) for site in probe.sites]
    return [site for site, size in sites + probe._lent
            if found and site.module and _is_under_uprobe(
                site.module, site.vaddr, site.vaddr + size, found)]


# DWARF numbers of ubp_x86.STACK_REGISTERS: System V ABI, figure 3.36.
_STACK_REGISTERS = (RSP, RBP, 3, 12, 13, 14, 15)
_STACK_HEAD = struct.Struct("<Q%dQ" % len(_STACK_REGISTERS))
assert len(_STACK_REGISTERS) == len(ubp_x86.STACK_REGISTERS)


class Names:
    """What stacks of one process are unwound and named with."""

    def __init__(self, pid):
        self.unwinder = Unwinder(pid, modules(pid))
        self.symbols = Symbols(pid, self.unwinder.code)


_new_event = functools.partial(tuple.__new__, Event)


class Columns(NamedTuple):
    """Records of numbers, a list for each of their fields."""
    times: list             # CLOCK_REALTIME in ns
    tids: list
    cpus: list
    pids: list
    indexes: list           # of the sites
    values: list            # of lists


class RecordForm:
    """How the records of a trace probe become Events."""

    def __init__(self, probe, block):
        self.probe, self.sites = probe, dict(
            (index, site) for site, index in block.sites)
        self.values = block.spec.values
        self.kinds = dict((index, "exit" if block.spec.is_exit else
                           "hit" if site.offset else "entry")
                          for site, index in block.sites)
        self.fields = block.layout.fields
        form = "<QQIIII"
        form += "".join("Q" if each.is_unsigned or each.kind != "int"
                        else "q" for each in self.values)
        self.inline = [n for n, each in enumerate(self.values)
                       if each.kind != "int"]
        for n in self.inline:
            form += "%ds" % (self.fields[n][2] + 7 & -8)
        size = struct.calcsize(form)
        form += "%ds" % (block.layout.entry_size - size)
        self.records = struct.Struct(form)
        self.n_values, self.n_invalid = len(self.values), 0
        self.stack_size = block.spec.stack_size
        self.depth = getattr(probe.action, "depth", 64)

    def walk(self, data, site, names):
        """The Walk of a record's copy of the stack, or None if it lies."""
        size, *registers = _STACK_HEAD.unpack_from(data)
        if size > self.stack_size:
            return None
        registers = dict(zip(_STACK_REGISTERS, registers))
        at = _STACK_HEAD.size
        return names.unwinder.walk(
            site.vaddr, registers, registers[RSP], data[at:at + size],
            self.depth)

    def stacks(self, data, names):
        """Yield (Site, the addresses of a stack, its value) of records."""
        for record in self.records.iter_unpack(data):
            site, faults = self.sites.get(record[4]), record[5]
            walk = site and self.walk(record[-1], site, names)
            if walk is None or faults >> self.n_values:
                self.n_invalid += 1
            else:
                yield site, walk, None if faults else (
                    record[6] if self.n_values else 1)

    def events(self, data, clock, tscs, pid_of, names, make=None):
        """Events of records, in their order; what lies is left out.

        tscs    (lowest, highest) that a record can have
        pid_of  (tid, cpu) -> the process that made a record
        make    of (this, Columns) something else, each (time_ns, …)
        """
        tsc0, ns0, rate = clock.anchor
        lowest, highest = tscs
        if not self.inline and not self.stack_size:
            columns = self._columns(data, clock, tscs, pid_of)
            if columns is not None:
                return (make(self, columns) if make is not None else
                        self._events(columns))
        new, last, found = tuple.__new__, 6 + self.n_values, []
        probe, sites, inline = self.probe._shown, self.sites, self.inline
        kinds, has_stack = self.kinds, self.stack_size > 0
        for record in self.records.iter_unpack(data):
            _, tsc, tid, cpu, index, faults = record[:6]
            site, values = sites.get(index), record[6:last]
            if site is None or not lowest <= tsc <= highest:
                self.n_invalid += 1
                continue
            if inline or faults:
                values = self._values(values, record[last:], faults)
                if values is None:
                    self.n_invalid += 1
                    continue
            stack = ()
            if has_stack:
                stack = self.walk(record[-1], site, names)
                if stack is None:
                    self.n_invalid += 1
                    continue
                stack = names.symbols.frames(stack)
            found.append(new(Event, (
                ns0 + int((tsc - tsc0) * rate), tid, cpu & ~ubp_x86.FORKED,
                pid_of(tid, cpu), site, kinds[index], values, stack, probe)))
        return found

    def _columns(self, data, clock, tscs, pid_of):
        """Columns of records that have numbers only and all make sense.

        None if there are others. Column by column, without a loop here: a
        million a second is a goal.
        """
        words = memoryview(data).cast("Q")
        halves, step = memoryview(data).cast("I"), self.records.size // 8
        times = words[1::step].tolist()
        indexes = halves[6::2 * step].tolist()
        if (halves[7::2 * step].tobytes().strip(b"\0")
                or min(times) < tscs[0] or max(times) > tscs[1]
                or not self.sites.keys() >= set(indexes)):
            return None
        tsc0, ns0, rate = clock.anchor
        tids = halves[4::2 * step].tolist()
        cpus = halves[5::2 * step].tolist()
        if max(cpus) < ubp_x86.FORKED:
            pids = [pid_of(0, 0)] * len(cpus)
        else:
            pids = list(map(pid_of, tids, cpus))
            cpus = [cpu & ~ubp_x86.FORKED for cpu in cpus]
        return Columns(
            [ns0 + int((tsc - tsc0) * rate) for tsc in times], tids,
            cpus, pids, indexes,
            [memoryview(data).cast(
                "Q" if each.is_unsigned else "q")[4 + n::step].tolist()
             for n, each in enumerate(self.values)])

    def _events(self, columns):
        """Events of Columns."""
        times, tids, cpus, pids, indexes, values = columns
        return list(map(_new_event, zip(
            times, tids, cpus, pids,
            map(self.sites.__getitem__, indexes),
            map(self.kinds.__getitem__, indexes),
            zip(*values) if values else itertools.repeat(()),
            itertools.repeat(()), itertools.repeat(self.probe._shown))))

    def _values(self, values, texts, faults):
        """The values with their texts; None if they contradict themselves.
        """
        values = list(values)
        for n, text in zip(self.inline, texts):
            size = values[n]
            if size > self.fields[n][2]:
                return None
            values[n] = text[:size]
        for n in range(self.n_values):
            if faults >> n & 1:
                values[n] = None
        return None if faults >> self.n_values else tuple(values)


class EventReader:
    """Merges the rings of all trace probes of a target, in time order.

    What is younger than the moment a look began is held back until the
    next: an older record may still be on its way.
    """

    def __init__(self, target):
        self._target, self._lock = target, threading.Lock()
        self._forms, self._held, self._pids = {}, [], {0: 0}
        self._names = None

    def poll(self, probes, clock, is_last=False, make=None):
        """The next Events of Trace probes. -> [Event]

        is_last   nothing is recorded any more: hold nothing back
        make      makes others of RecordForm and Columns, where it can
        """
        with self._lock:
            start, found = clock.read(), self._held
            raw = self.records(probes, is_last)
            clock.check()
            latest = clock.anchor[0]
            for ring, form, data in raw:
                before = form.n_invalid
                found += form.events(
                    data, clock, (form.probe._armed_tsc, latest),
                    self._pid_of, self.names, make)
                ring.n_bad += form.n_invalid - before
            found.sort(key=_time_of)
            n = len(found)
            if not is_last:
                n = bisect.bisect_left(found, (start[1] - 10**6,))
            self._held = found[n:]
            return found[:n]

    def keep(self, probes, clock):
        """Take what is there before the program goes that it is about."""
        in_rings = [p for p in probes if p._rings]
        traces = [p for p in in_rings if not p._is_of_stacks]
        if clock is not None:
            self.collect([p for p in in_rings if p._is_of_stacks], True)
        if traces and clock is not None:
            self._held = self.poll(traces, clock, True)
        for probe in probes:
            for part in probe._parts:
                part.settle(self.names)
            if probe._is_of_stacks and self.names is not None:
                probe._settle_stacks()
        self._names = None

    def records(self, probes, is_last=False):
        """What is complete, as it is. -> [(TraceRing, RecordForm, bytes)]
        """
        return [(ring, self._form(probe, ring), data)
                for probe in probes for ring in probe._rings
                for data in ring.read(is_last or probe._is_removed)]

    def collect(self, probes, is_last=False):
        """Add up the stacks that Stack probes have copied since."""
        with self._lock:
            for ring, form, data in self.records(probes, is_last):
                before = form.n_invalid
                for site, walk, value in form.stacks(data, self.names):
                    form.probe._add_stack(site, walk, value)
                ring.n_bad += form.n_invalid - before

    @property
    def names(self):
        """The Names of the target, made when first asked for."""
        if self._names is None:
            try:
                self._names = Names(self._target.pid)
            except UbpError:        # it has ended
                return None
        return self._names

    def _form(self, probe, ring):
        form = self._forms.get(ring.block)
        if form is None:
            form = self._forms[ring.block] = RecordForm(probe, ring.block)
        return form

    def _pid_of(self, tid, cpu):
        """The process that made a record: the target, or what it forked.

        The first thread of a child has its pid for a tid, and is told so
        when the child has ended before anybody asked.
        """
        if cpu < ubp_x86.FORKED:
            return self._target.pid
        found = self._pids.get(tid)
        if found is None:
            found = 0               # not known
            if _namespace_of(self._target.pid) == _pid_namespace():
                tgid = read_status(tid).get("Tgid", "")
                found = int(tgid) if tgid.isdigit() else tid
            self._pids[tid] = found
        return found


_time_of = operator.itemgetter(0)


class Block(NamedTuple):
    """Data of a probe in an arena, of one site or of several."""
    arena: Arena
    offset: int             # in every shard
    spec: ubp_x86.Spec
    sites: tuple            # (Site, its index): each one's data lie behind
    #                         the last's; a table is shared by all of them
    frames: tuple = ()      # (vaddr, bytes, bytes of a frame) of its table
    is_indexed: bool = False    # a table's first key is the site's index

    @property
    def layout(self):
        """The ubp_x86.Layout of the data."""
        return ubp_x86.block_layout(self.spec)


def _readings(block):
    """Yield (Site, Reading) of a block."""
    layout, arena, sites = block.layout, block.arena, block.sites
    if layout.kind == "word":
        # All in one go: there may be thousands.
        words = arena.sums(block.offset, len(sites))
        for (site, _), word in zip(sites, words):
            yield site, Reading(word, word)
    elif layout.kind == "table":
        yield from _table_readings(block)
    elif layout.kind == "ring":
        pass                        # its TraceRings know: Probe.readings
    else:
        for n, (site, _) in enumerate(sites):
            yield site, block_reading(layout, arena.rows(
                block.offset + n * layout.size, layout.size // 8))


def _table_readings(block):
    """Yield (Site, Reading) of a table: the first key is the site's index.

    What is not of one site alone is told of the first.
    """
    layout, keys = block.layout, block.spec.keys
    whole = table_reading(layout, keys, block.arena.rows(
        block.offset, layout.size // 8))
    if len(block.sites) == 1 and not block.is_indexed:
        yield block.sites[0][0], whole._replace(value={
            key[0] if len(key) == 1 else key: value
            for key, value in whole.value.items()})
        return
    tables = {index: {} for _, index in block.sites}
    for key, value in whole.value.items():
        rest = key[1] if len(key) == 2 else key[1:]
        tables.get(key[0], {})[rest] = value
    for n, (site, index) in enumerate(block.sites):
        value = tables[index]
        recorded = sum(_recorded(each) for each in value.values())
        reading = Reading(value, recorded)
        yield site, reading if n else whole._replace(
            value=value, recorded=recorded)


def _n_frames(block):
    """How many frames have been entered and not left."""
    vaddr, size, each = block.frames
    data = block.arena.load_private(vaddr, size)
    return sum(any(word) for word in struct.iter_unpack(
        "<Q%dx" % (each - 8), data[:len(data) // each * each]))


def _recorded(value):
    return value if type(value) is int else value.count


class Body:
    """What one probe does at one site, and where its data is."""

    def __init__(self, probe, plan, part_plan, arena, place):
        self.probe, self.plan = probe, plan
        self.part_plan = part_plan  # of its own window; plan is the whole's
        self.arena, self.place = arena, place
        self.record = None          # that tells of its data

    @property
    def part(self):
        """(Spec, Place), as trampolines are made of."""
        return self.part_plan.spec, self.place

    @property
    def lends(self):
        """Is it there only for the slot in its window?"""
        return self.part_plan.spec == _LEND

    def part_in(self, window):
        """Its part in a window that may be another than it was made for:
        what came first in that comes before the same instruction here."""
        own, place = self.part_plan.window, self.place
        if own.site != window.site and not place.at:
            place = place._replace(at=own.site, dead=(own.dead_regs,
                                                      own.flags_dead))
        return self.part_plan.spec, place

    def moved(self, window):
        """The same Body, as it is in a window that took in its own."""
        _, place = self.part_in(window)
        other = Body(self.probe, self.plan, self.part_plan._replace(
            window=window, at=place.at, dead=place.dead), self.arena, place)
        other.record = self.record
        return other


class Patch:
    """What a window leads to: the bodies of one probe or of several.

    absorbs   Patches of other windows whose place it takes
    """

    def __init__(self, plan, absorbs=()):
        self.site, self.window = plan.site, plan.window
        self.absorbs = absorbs
        self.old = dict(plan.old)
        self.bodies = ()            # in the order of arming
        self.all_parts = (self,)    # as a plan has them
        self.records = []           # (Arena, Record) of every trampoline
        for other in absorbs:
            self.bodies += tuple(body.moved(self.window)
                                 for body in other.bodies)
            self.records += other.records

    @property
    def lends(self):
        """Is it there only for a slot in its window?"""
        return any(body.lends for body in self.bodies)


def _place_in_file(site):
    """What names a Site in whatever process its file is mapped."""
    module = site.module
    return (module.path, module.build_id, site.vaddr - module.low,
            site.is_return)


def _add_reading(found, site, reading):
    """Add to {…: (Site, Reading)}; a function of one file is one Site."""
    key = _place_in_file(site)
    if key in found:
        first, before = found[key]
        found[key] = first, before + reading
    else:
        found[key] = site, reading


class Probe:
    """One probe: its sites, and what they computed.

    sites     [Site] that are, or were, armed;   refused   [SitePlan]
    error     what the function of its Call raised, or None
    """

    def __init__(self, target, where, action, spec):
        self._target, self.where, self.action = target, where, action
        self.sites, self.refused = [], []
        self._lent = []             # [(Site, bytes)]: they hold slots of it
        self._remedy = ""           # for what was refused, if there is one
        self._spec, self._blocks, self._rings = spec, [], []
        self._armed_tsc = 0         # no record of a Trace is older
        self._stacks = {}           # {Site: {Walk: n or sum}}, from copies
        self._told = {}             # {Site: {(Frame, …): n or sum}}, before
        self._n_faults = 0          # stacks whose value could not be had
        self._parts = []            # what holds the sites that take no jump
        self._is_removed = False
        self._is_open = False       # may a library come that it means, too?
        self.error = None           # what its Call's function raised
        # What it is in children of the target that became other programs:
        # (its twins there, {…: (Site, Reading)} of those that have ended)
        self._kin, self._shown = ((), {}), self     # a twin shows as this

    def __repr__(self):
        return "<Probe %s: %d sites>" % (self.where, len(self.sites))

    def _refuse(self, plan, rule, why):
        self.refused.append(plan._replace(
            strategy="", window=None, trampoline_size=0, rule=rule, why=why))

    def readings(self):
        """{Site: Reading}, cumulative; also after removal and exit.

        What children of the target did after an exec, where that is
        followed, is told of the Site in the first program that had it.
        """
        if self._target._follower is None:
            return self._own_readings()
        twins, past = self._kin
        found = collections.OrderedDict()
        for site, reading in past.values():
            _add_reading(found, site, reading)
        for probe in (self,) + twins:
            for site, reading in probe._own_readings().items():
                _add_reading(found, site, self._with_names(site, reading))
        return collections.OrderedDict(found.values())

    def _with_names(self, site, reading):
        """A Reading, its keys named as of the program that it is of."""
        naming = site.module.naming
        if naming is None or not isinstance(reading.value, dict) or (
                self._is_of_stacks):
            return reading
        value = {}
        for key, each in reading.value.items():
            key = naming.key(self, key)
            value[key] = value[key] + each if key in value else each
        return reading._replace(value=value)

    def _add_refused(self, plans):
        """Tell of what was refused in a child, each function of a file once.
        """
        known = {_place_in_file(plan.site) for plan in self.refused}
        for plan in plans:
            if _place_in_file(plan.site) not in known:
                known.add(_place_in_file(plan.site))
                self.refused.append(plan)

    def _inherit(self, twin):
        """A process has ended: keep what a twin of this has computed."""
        twins, past = self._kin
        past = collections.OrderedDict(past)
        for site, reading in twin._own_readings().items():
            _add_reading(past, site, self._with_names(site, reading))
        self._kin = tuple(each for each in twins if each is not twin), past

    def _own_readings(self):
        """{Site: Reading} of the target alone."""
        # Without the lock: in a forked child it may be held for ever.
        found = collections.OrderedDict()
        for block in list(self._blocks):
            for site, reading in _readings(block):
                found[site] = found[site] + reading if site in found \
                    else reading
        if self._rings and self.sites:
            # Sites share their rings: all of it is told of the first.
            found.update((site, Reading(0)) for site in self.sites)
            found[self.sites[0]] = sum((ring.reading() for ring
                                        in self._rings), Reading(0))
            if self._is_of_stacks:
                self._tell_stacks(found)
        elif self._is_of_stacks:
            for site, reading in found.items():
                found[site] = self._named(site, reading)
        for part in self._parts:
            for site, reading in part.readings().items():
                found[site] = found[site] + reading if site in found \
                    else reading
            for site in part.tallies if self._is_of_stacks else ():
                found[site] = found[site]._replace(
                    value=self._named_stacks(site))
        for block in self._blocks if found else ():
            if block.frames:        # a table for all of the block's sites
                first = block.sites[0][0]
                found[first] = found[first]._replace(
                    unfinished=_n_frames(block))
        return found

    def reading(self):
        """The Reading of all sites together."""
        total = Reading(self._nothing())
        for reading in self.readings().values():
            total += reading
        return total

    @property
    def _is_of_stacks(self):
        return isinstance(self.action, Stack)

    def _add_stack(self, site, walk, value):
        """Count a stack that was copied, or a fault."""
        if value is None:
            self._n_faults += 1
            return
        found = self._stacks.setdefault(site, {})
        if self.action.sum:
            value = Sum(value, 1)
        found[walk] = found[walk] + value if walk in found else value

    def _tell_stacks(self, found):
        """Put the stacks that were copied into {Site: Reading}."""
        self._target._collect()
        for site in self.sites:
            found[site] = found[site]._replace(
                value=self._named_stacks(site))
        reading = sum((ring.reading() for ring in self._rings), Reading(0))
        found[self.sites[0]] = found[self.sites[0]]._replace(
            recorded=reading.recorded - self._n_faults,
            faults=reading.faults + self._n_faults)

    def _settle_stacks(self):
        """Name the stacks so far: the program that they are of is going."""
        self._told = {site: self._named_stacks(site)
                      for site in {*self._stacks, *self._told}}
        self._stacks = {}

    def _named_stacks(self, site):
        """{(Frame, …): n or sum} of the stacks that were copied at a site."""
        names = self._target._reader.names
        stacks = dict(self._told.get(site, {}))
        for walk, value in list(self._stacks.get(site, {}).items()):
            frames = names.symbols.frames(walk)
            stacks[frames] = stacks[frames] + value \
                if frames in stacks else value
        return stacks

    def _named(self, site, reading):
        """A Reading whose keys are addresses, with Frames instead."""
        names, stacks = self._target._reader.names, {}
        for key, value in reading.value.items():
            frames = (names.symbols.name(site.vaddr, False),) + tuple(
                names.symbols.name(vaddr) for vaddr in key)
            stacks[frames] = stacks[frames] + value if frames in stacks \
                else value
        return reading._replace(value=stacks)

    def _nothing(self):
        """What read() returns before anything was armed."""
        if self._spec.keys or self._is_of_stacks:
            return {}
        return {"hist": Histogram(), "sum": Sum(0, 0)}.get(
            self._spec.action, 0)

    def counts(self):
        """{Site: hits}, cumulative; also after removal and exit."""
        return collections.OrderedDict(
            (site, reading.hits) for site, reading
            in self.readings().items())

    def read(self):
        """What was computed since arming, over all sites and CPUs.

        Count: an int; with sum, a Sum. Hist: a Histogram. With by: a dict
        of these. Call: how many hits were answered. A snapshot; also after
        removal and the target's exit.
        """
        return self.reading().value

    def by_site(self):
        """{Site: what read() returns}, each site for itself."""
        return collections.OrderedDict(
            (site, reading.value) for site, reading
            in self.readings().items())

    @property
    def hits(self):
        """How often the sites were passed: recorded + dropped."""
        return sum(self.counts().values())

    @property
    def dropped(self):
        """Hits that were not recorded: no room, or a fault in a value."""
        reading = self.reading()
        return reading.dropped + reading.faults + reading.crowded

    def strategies(self):
        """{strategy: number of sites} of those that are armed, in order."""
        trapped = {body.plan.site.vaddr for patch
                   in self._target._installer.patches.values()
                   if patch.window.is_trap for body in patch.bodies
                   if body.probe is self}
        by_part = collections.Counter()
        for part in self._parts:
            by_part[part.name] += len(part.sites)
        n_hw = sum(by_part.values())
        found = collections.OrderedDict([
            ("jump", len(self.sites) - n_hw - len(trapped)),
            ("int3", len(trapped))] + sorted(by_part.items()))
        return collections.OrderedDict(
            (name, n) for name, n in found.items() if n)

    @property
    def overhead_ns(self):
        """What each time that Latency tells includes of the measurement
        itself, in nanoseconds; 0 for other actions."""
        clock = self._target._installer.clock
        if not isinstance(self.action, Latency) or clock is None:
            return 0
        return latency_overhead(clock)

    def remove(self, timeout=5):
        """Take it out of the target. May be repeated. Raises UbpTimeout."""
        if not self._is_removed:
            self._target._remove([self], timeout)


# -- handlers: functions of this process that hits wait for -------------------
#
# A body of a Call claims a slot of shared memory, puts its registers there,
# wakes us by a futex, and waits at the slot's own word. No ptrace, and no
# descriptor. One thread for each target runs the functions, one hit after
# another. What stands in a slot is hostile like all that a target says.

_CALL = struct.Struct("<6I2Q%dq" % (len(ubp_x86.REGISTERS)
                                    + ubp_x86.N_CALL_ARGS))
_CALL_REGISTERS = struct.Struct("<%dq" % len(ubp_x86.REGISTERS))
_ASKED = struct.Struct("<%dQ" % (ubp_x86.N_CALLS // 64))
_HALF, _WORD = struct.Struct("<I"), struct.Struct("<Q")
assert _CALL.size == ubp_x86.CALL_ARGS + 8 * ubp_x86.N_CALL_ARGS
_SYSCALLS_OF_CALLS = (              # that bodies make, as a filter sees them
    (SYS_futex, 0, FUTEX_WAIT_BITSET, 0, 0, 0, 0xffffffff),
    (SYS_futex, 0, FUTEX_WAKE, 1, 0, 0, 0),
    (SYS_gettid,), (SYS_clock_gettime, time.CLOCK_MONOTONIC, 0))
_RECLAIM_S = 10                     # an answer that nobody fetched for longer
_RECLAIM_SOON_S = 0.1               # the same where slots are scarce
_LOOK_AT_SLOTS_S = 0.05
# A thread looks so often at its word before it sleeps, with a pause of 20
# to 45 ns in between: an idle processor takes longer to wake up than a short
# function to answer. We look so often for its next hit. Measured: 18 us a hit
# instead of 40. A thread that slept so many times in a row, as where both
# share a processor or the function is slow, sleeps at once for many hits.
_N_SPINS, _N_LOOKS = 1500, 300
_MOST_ASLEEP, _SPIN_AGAIN = 16, 1040
_LAST_HANDLER_S = 0.25              # for one that runs while it is removed
_MOST_STACK = 32 << 10              # bytes that stack() looks at


class Hit:
    """One hit, as the function of a Call sees it. Its thread waits.

    Numbers are signed and have 64 bits, as in expressions. Registers by name
    (rdi, r10, …, eflags), arg0 to arg5 and ret can be set; they are what the
    thread goes on with when the function returns. ret is the return value at
    an exit, and what skip() returns at an entry. At an exit the arguments
    are those at the entry, and cannot be set.

    probe, site   as in an Event;   kind   "entry", "exit" or "hit" (neither)
    tid           of the thread, as its own process sees it
    """

    __slots__ = ("probe", "site", "kind", "tid", "_vaddr", "_calls", "_n",
                 "_answer", "_outcome", "_flags", "_caller", "_registers",
                 "_args", "_is_jump", "_is_changed", "_is_answered")

    def __init__(self, calls, n, values, known):
        (_, self._answer, _, self.tid, _, _, self._flags,
         self._caller) = values[:8]
        (self.probe, self.site, self.kind, self._vaddr,
         self._is_jump) = known
        self._calls, self._n, self._outcome = calls, n, 0
        self._registers = list(values[8:8 + len(ubp_x86.REGISTERS)])
        self._args = values[8 + len(ubp_x86.REGISTERS):]
        self._is_changed = self._is_answered = False

    def __repr__(self):
        return "<Hit of %s by thread %d>" % (site_name(self.site), self.tid)

    @property
    def pid(self):
        """The process."""
        return self._calls.arena.tracer.tgid

    @property
    def rip(self):
        """The address of the instruction that is about to run."""
        return self._vaddr

    def _set(self, index, value):
        """A register gets another value."""
        self._must_wait()
        if not -1 << 63 <= value < 1 << 64:
            raise ProbeError("set a register to", repr(value),
                             "it has more than 64 bits")
        self._registers[index] = (value & (1 << 64) - 1 ^ 1 << 63) - (1 << 63)
        self._is_changed = True

    def _must_wait(self):
        """Raise UbpTimeout if the thread has gone on."""
        if not self._calls.is_waiting(self):
            raise UbpTimeout("change", "a hit of %s" % site_name(self.site),
                             "its thread has gone on: it waits %g s at most"
                             % self.probe.action.timeout)

    @property
    def eflags(self):
        """The arithmetic flags: CF, PF, AF, ZF, SF, OF, as in rflags."""
        return ubp_x86.eflags_of(self._flags)

    @eflags.setter
    def eflags(self, value):
        self._must_wait()
        self._flags, self._is_changed = ubp_x86.flags_word(value), True

    @property
    def ret(self):
        """At an exit the return value, which may be set."""
        self._check_ret()
        return self._registers[_RET]

    @ret.setter
    def ret(self, value):
        self._check_ret()
        self._set(_RET, value)

    def _check_ret(self):
        if self._is_jump:
            raise ProbeError(
                "tell what", "%s returns" % site_name(self.site), "its exit "
                "at 0x%x is a jump to another function, which has not run yet"
                % self.rip, "probe that function's %return")

    def arg(self, n):
        """The n-th integer or pointer argument, from 0."""
        if not 0 <= n < ubp_x86.MAX_ARGS:
            raise ProbeError("tell", "argument %r" % (n,), "it is a number "
                             "from 0 to %d" % (ubp_x86.MAX_ARGS - 1))
        if self.kind == "exit":
            if n >= ubp_x86.N_CALL_ARGS:
                raise ProbeError("tell", "argument %d" % n, "of those at the "
                                 "entry %d are kept" % ubp_x86.N_CALL_ARGS)
            return self._args[n]
        if n < len(_ARG_INDEXES):
            return self._registers[_ARG_INDEXES[n]]
        at = self._registers[_SP] + 8 * (1 + n - len(_ARG_INDEXES))
        return int.from_bytes(self.read(at, 8), "little", signed=True)

    def _set_arg(self, n, value):
        if self.kind == "exit":
            raise ProbeError("set", "argument %d" % n,
                             "the function has used it already")
        self._set(_ARG_INDEXES[n], value)

    @property
    def caller(self):
        """The address that the function returns to."""
        if self.kind == "hit":
            return (self._walk(2).addresses + (0,))[1]
        return self._caller

    def read(self, addr, n):
        """n bytes of the process's memory. Raises TraceeGone, ProbeError."""
        return self._memory("read", read_memory, addr, n, n)

    def write(self, addr, data):
        """Write bytes to the process's memory, where it may write itself."""
        self._must_wait()
        self._calls.check_program()
        self._memory("write", write_memory, addr, data, len(data))

    def _memory(self, what, function, addr, argument, n):
        """Read or write; the leader may be a zombie, then another's tid."""
        addr &= (1 << 64) - 1
        try:
            try:
                return function(self.pid, addr, argument)
            except ProcessLookupError:
                return function(memory_tid(self.pid), addr, argument)
        except OSError as error:
            kind = TraceeGone if error.errno == errno.ESRCH else ProbeError
            raise kind("%s %d bytes at 0x%x of" % (what, n, addr),
                       "pid %d" % self.pid, error.strerror)

    def str(self, addr, n=1024):
        """The text at addr up to its NUL, at most n bytes of it."""
        data, addr = b"", addr & (1 << 64) - 1
        while len(data) < n and b"\0" not in data:
            step = min(n - len(data), PAGE - (addr + len(data)) % PAGE)
            try:
                data += self.read(addr + len(data), step)
            except ProbeError:
                if not data:
                    raise
                break
        return data.split(b"\0")[0].decode(errors="surrogateescape")

    def stack(self, depth=64):
        """The call stack, innermost first. -> (Frame, …)"""
        return self._calls.names().symbols.frames(self._walk(depth))

    def _walk(self, depth):
        data = b""
        low = self._registers[_SP] & (1 << 64) - 1
        while len(data) < _MOST_STACK:
            at = low + len(data)
            try:
                data += self.read(at, PAGE - at % PAGE)
            except ProbeError:
                break
        registers = {number: self._registers[index] & (1 << 64) - 1
                     for number, index in zip(_STACK_REGISTERS,
                                              _STACK_INDEXES)}
        return self._calls.names().unwinder.walk(self.rip, registers, low,
                                                 data, depth)

    def skip(self, value=None):
        """Return from the function at once, without running any of it.

        value   what it returns; None: what ret is. At its entry only
        """
        if self.kind != "entry":
            raise ProbeError("skip", site_name(self.site), "it is running "
                             "already: that is for an entry", "hit.ret = "
                             "VALUE at %return")
        if value is not None:
            self._set(_RET, value)
        self._must_wait()
        self._outcome |= ubp_x86.CALL_SKIP


_SP, _RET = map(ubp_x86.REGISTERS.index, (ubp_x86.SP_NAME,
                                          ubp_x86.RET_NAME))
_ARG_INDEXES = tuple(map(ubp_x86.REGISTERS.index, ubp_x86.ARG_NAMES))
_STACK_INDEXES = tuple(map(ubp_x86.REGISTERS.index,
                           ubp_x86.STACK_REGISTERS))


def _name_registers():
    """Give Hit a property for each register and argument."""
    for index, name in enumerate(ubp_x86.REGISTERS):
        setattr(Hit, name, property(
            lambda self, index=index: self._registers[index],
            None if index == _SP else
            lambda self, value, index=index: self._set(index, value)))
    for n in range(ubp_x86.MAX_ARGS):
        setattr(Hit, "arg%d" % n, property(
            lambda self, n=n: self.arg(n),
            None if n >= len(_ARG_INDEXES) else
            lambda self, value, n=n: self._set_arg(n, value)))


_name_registers()


class Calls:
    """The thread that runs the functions of a target's Call probes.

    arena   has the slots that hits of all arenas use
    """

    def __init__(self, arena, note):
        if arena.memory is None:
            raise ProbeError("call a function for", arena.tracer.name(),
                             "its memory is not shared with ubp: it, or its "
                             "seccomp filter, allows no memfd")
        self.arena, self.note = arena, note
        self._offset = arena.allocate_calls()
        self.vaddr = arena.base + self._offset
        self._known = []            # by number: (Probe, Site, kind, rip, …)
        self._lock = threading.Lock()
        self._thread = self._owner = self._buffer = None
        self._current = self._life = None       # its thread's; None: closed
        self._gone = set()          # probes that are being taken out
        self._fetched = {}          # {slot: (its answer, when it was given)}
        self._names = None
        number = ctypes.c_uint64, ctypes.c_uint64
        self._exchange = _function_of(ubp_x86.EXCHANGE, number[0], *number)
        self._look = _function_of(ubp_x86.LOOK, None, *number, free=True)
        self._n_asleep = 0          # answers in a row to threads that slept
        self._compare = _function_of(
            ubp_x86.COMPARE_EXCHANGE, ctypes.c_uint32, number[0],
            ctypes.c_uint32, ctypes.c_uint32)

    def add(self, probe, site, plan):
        """A number for a site, which its body puts into slots."""
        if self._life is None:
            self._open()
        spec = plan.spec
        kind = ("exit" if spec.is_exit else
                "hit" if spec.is_inside else "entry")
        is_jump = spec.is_exit and not any(
            insn.vaddr == plan.site.vaddr and insn.flow == ubp_x86.RET
            for insn in plan.window.insns)
        self._known.append((probe, site, kind, plan.site.vaddr, is_jump))
        return len(self._known) - 1

    def _open(self):
        """Slots that nobody will give back are free; hits may wait."""
        self._buffer = (ctypes.c_char * ubp_x86.CALLS_SIZE).from_buffer(
            self.arena.memory, self._offset)
        self._at = ctypes.addressof(self._buffer)
        for n in range(ubp_x86.N_CALLS):
            word = self._word(n)
            if word == 0:
                _HALF.pack_into(self._buffer, ubp_x86.CALL_SIZE * (1 + n),
                                ubp_x86.CALL_FREE)
            self._recycle(n, word)
        self._life, self._fetched, self._n_asleep = object(), {}, 0
        _HALF.pack_into(self._buffer, ubp_x86.CALLS_SPINS, _N_SPINS)
        self._owner = FutexOwner(self.arena, self._offset,
                                 1 + ubp_x86.N_CALLS, ubp_x86.CALL_SIZE)
        if not self._owner.tid:
            self._owner.close()
            self._life = self._buffer = None
            raise ProbeError("call a function for", self.arena.tracer.name(),
                             "set_robust_list is forbidden here, so nobody "
                             "would wake the threads that wait if ubp died")
        self._asked = self._owner.tid | FUTEX_WAITERS
        self._thread = threading.Thread(
            target=self._run, args=(self._life,), daemon=True,
            name="ubp-calls-%d" % self.arena.tracer.tgid)
        self._thread.start()

    def _word(self, n):
        return _HALF.unpack_from(self._buffer, ubp_x86.CALL_SIZE * (1 + n))[0]

    def _swap(self, n, old, new):
        """Change a slot's word if it is what it was. -> was it?"""
        return self._compare(self._at + ubp_x86.CALL_SIZE * (1 + n), old,
                             new) == old

    # -- the thread ---------------------------------------------------------

    def _run(self, life):
        looked = time.monotonic()
        while self._life is life:
            if not self._take(life):
                self._sleep(life)
            elif not self._n_asleep:        # the next may come at once
                self._look(self._at + ubp_x86.CALLS_ASKED, _N_LOOKS)
            if self._fetched and time.monotonic() - looked > _LOOK_AT_SLOTS_S:
                looked = time.monotonic()
                self._reclaim(looked - _RECLAIM_S)
                if len(self._fetched) > ubp_x86.N_CALLS // 2:
                    self._reclaim(looked - _RECLAIM_SOON_S)
        with self._lock:
            if self._life is None:
                self._buffer = None

    def _take(self, life):
        """Handle what was asked. -> was there anything?"""
        words = _ASKED.unpack_from(self._buffer, ubp_x86.CALLS_ASKED)
        if not any(words):
            return False
        for index, word in enumerate(words):
            if word:
                word = self._exchange(
                    self._at + ubp_x86.CALLS_ASKED + 8 * index, 0)
            while word and self._life is life:
                low = word & -word
                word ^= low
                self._handle(64 * index + low.bit_length() - 1)
        return True

    def _sleep(self, life):
        """Until a hit wakes us."""
        idle = self._at + ubp_x86.CALLS_IDLE
        self._exchange(idle, 1)
        if not any(_ASKED.unpack_from(self._buffer, ubp_x86.CALLS_ASKED)) \
                and self._life is life:
            span = Timespec(0, 10**8)   # with answers to look after
            _futex(SYS_futex, idle, FUTEX_WAIT, 1,
                   ctypes.addressof(span) if self._fetched else 0, 0, 0)
        self._exchange(idle, 0)

    def _handle(self, n):
        """Run the function for the hit in a slot, and answer."""
        values = _CALL.unpack_from(self._buffer, ubp_x86.CALL_SIZE * (1 + n))
        if values[0] != self._asked:
            self._recycle(n, values[0])
            return
        number = values[2]
        known = self._known[number if number < len(self._known) else 0]
        hit, probe = Hit(self, n, values, known), known[0]
        if (number >= len(self._known) or probe in self._gone
                or probe.error is not None):
            self._reply(hit, ubp_x86.CALL_DROP)
            return
        self._current = hit
        try:
            probe.action.function(hit)
            self._reply(hit, hit._outcome)
        except BaseException as error:      # the function's: to be told
            is_late = isinstance(error, TraceeGone) or isinstance(
                error, UbpTimeout) and not self.is_waiting(hit)
            self._reply(hit, ubp_x86.CALL_FAULT)
            if is_late:
                log.warning("a function was late: %s", error)
            else:
                self._report(probe, error)
        finally:
            if self._current is hit:
                self._current = None

    def _reply(self, hit, outcome):
        """Let the thread of a hit go on."""
        n, at = hit._n, ubp_x86.CALL_SIZE * (1 + hit._n)
        with self._lock:
            if hit._is_answered or self._buffer is None:
                return
            hit._is_answered = True
            if hit._is_changed and outcome in (0, ubp_x86.CALL_SKIP):
                _CALL_REGISTERS.pack_into(
                    self._buffer, at + ubp_x86.CALL_REGISTERS,
                    *hit._registers)
            _HALF.pack_into(self._buffer, at + ubp_x86.CALL_OUTCOME, outcome)
            _WORD.pack_into(self._buffer, at + ubp_x86.CALL_FLAGS, hit._flags)
            answer = (hit._answer & ubp_x86.CALL_NUMBER
                      | ubp_x86.CALL_ANSWERED)
            if self._swap(n, self._asked, answer):
                sleeps, = _HALF.unpack_from(self._buffer,
                                            at + ubp_x86.CALL_SLEEPS)
                if sleeps:
                    _syscall(SYS_futex, self._at + at, FUTEX_WAKE, 1, 0, 0)
                self._learn(sleeps)
                self._fetched[n] = answer, time.monotonic()
            else:
                self._recycle(n, self._word(n))

    def _learn(self, slept):
        """Is it worth while that threads spin before they sleep?"""
        n = self._n_asleep = self._n_asleep + 1 if slept else 0
        if n in (_MOST_ASLEEP, _SPIN_AGAIN):
            _HALF.pack_into(self._buffer, ubp_x86.CALLS_SPINS,
                            _N_SPINS if n == _SPIN_AGAIN else 0)
            self._n_asleep = n % _SPIN_AGAIN

    def _recycle(self, n, word):
        """Free a slot whose thread would not wait any longer."""
        if word & ~ubp_x86.CALL_NUMBER == ubp_x86.CALL_GAVE_UP:
            self._swap(n, word, word & ubp_x86.CALL_NUMBER
                       | ubp_x86.CALL_FREE)
            _HALF.pack_into(self._buffer, ubp_x86.CALLS_LATE, 0)

    def _reclaim(self, before):
        """Free slots whose answer nobody will fetch: the thread has ended,
        or left by a longjmp. If it comes after all, it finds another word.
        """
        for n, (answer, when) in list(self._fetched.items()):
            if self._word(n) != answer:
                del self._fetched[n]
            elif when < before:
                self._swap(n, answer, answer & ubp_x86.CALL_NUMBER
                           | ubp_x86.CALL_FREE)
                del self._fetched[n]

    def _report(self, probe, error):
        """Tell what a function raised, and take its probe out."""
        import logging
        import traceback
        probe.error = error
        text = "".join(traceback.format_exception(
            type(error), error, error.__traceback__.tb_next)).rstrip()
        logging.getLogger("ubp")    # whoever listens: the import is there
        log.error("the function of %r raised; the probe is taken out\n%s",
                  probe, text)
        self.note("the function for %s raised, and its probe was taken out\n"
                  "%s" % (_where_text(probe.where), text))
        try:
            probe.remove()
        except UbpError as failure:
            self.note("the probe %s is still in, and does nothing: %s" % (
                _where_text(probe.where), failure))

    def names(self):
        """The Names of the target, made when first asked for."""
        if self._names is None:
            self._names = Names(self.arena.tracer.tgid)
        return self._names

    # -- for others ---------------------------------------------------------

    def is_waiting(self, hit):
        """Does the thread of a hit still wait for the answer?"""
        with self._lock:
            return (not hit._is_answered and self._buffer is not None
                    and self._word(hit._n) == self._asked)

    def check_program(self):
        """Is our arena still there? Raises TraceeGone."""
        arena, header = self.arena, None
        try:
            header = unpack_header(read_memory(
                memory_tid(arena.tracer.tgid), arena.base, HEADER.size))
        except OSError:
            pass
        if header is None or header.nonce != arena.nonce:
            raise TraceeGone("write to", arena.tracer.name(), "it has ended, "
                             "or became another program (exec)")

    def let_own_go(self):
        """If a function of ours asks for a removal, its hit goes on first.
        """
        hit = self._current
        if hit is not None and threading.current_thread() is self._thread:
            self._reply(hit, hit._outcome)
            self._current = None

    def is_wanted(self, hit):
        """Does a hit still wait, and is its probe to stay?"""
        return hit.probe not in self._gone and self.is_waiting(hit)

    def release(self, gone, has_others):
        """Let every hit of some probes go on; if there are no others, none
        waits from now on. May be repeated."""
        self._gone |= gone
        if self._life is None:
            return
        if not has_others:
            self._owner.close()
        limit = time.monotonic() + _LAST_HANDLER_S
        hit = self._current
        while (hit is not None and hit.probe in gone and hit is self._current
               and time.monotonic() < limit):
            time.sleep(0.001)
        for n in range(ubp_x86.N_CALLS):
            values = _CALL.unpack_from(self._buffer,
                                       ubp_x86.CALL_SIZE * (1 + n))
            known = self._known[min(values[2], len(self._known) - 1)]
            if values[0] == self._asked and (known[0] in gone
                                             or not has_others):
                hit = self._current
                if hit is None or hit._n != n:
                    hit = Hit(self, n, values, known)
                self._reply(hit, ubp_x86.CALL_DROP)
        if not has_others:
            self._life = None
            self._exchange(self._at + ubp_x86.CALLS_IDLE, 0)
            _syscall(SYS_futex, self._at + ubp_x86.CALLS_IDLE, FUTEX_WAKE, 1,
                     0, 0)
            self._thread.join(_LAST_HANDLER_S)


# -- what is in a target -----------------------------------------------------

class SlackFull(ProbeError):
    """The slack of a module has no room for a site."""

    is_for_all = True           # or for any other of the module


def _without_slack(probe, plans, error):
    """Refuse the first of plans, or all of its module. -> the others"""
    module, rest = plans[0].site.module, []
    for n, plan in enumerate(plans):
        if n == 0 or error.is_for_all and plan.site.module is module:
            probe._refuse(plan, "slack", error.why)
            probe._remedy = error.hint
        else:
            rest.append(plan)
    return rest


class Installer:
    """What is in one target: arenas, patches, and which probe uses them.

    Its methods run in the worker. A trampoline may use data of several
    arenas, so those are unmapped together.
    """

    def __init__(self, tracer, kind, note):
        self.tracer, self.kind, self.note = tracer, kind, note
        self.arenas = []
        self.patches = {}           # {window.site: Patch}
        self.asleep = collections.OrderedDict()     # {Module that was
        #                             unloaded: its Patches}, should it return
        self._links = set()         # (Arena, other that its code refers to)
        self._gone = {}     # {site >> 8: [(Arena, Record)]}, taken out; no
        #                     window is longer than that
        self.clock = None
        self.offers = ubp_x86.Place(_DUMMY_SHARDS, 0)
        self._looked = set()        # what was asked of the target already
        self.calls = None           # Calls, when there are any
        self.hook_calls = None      # those of the loader's debug hook
        self._scratch = None, 0     # (Arena, end of _SCRATCH bytes there)
        self._forbidden = None      # InjectionRefused, of the first arena

    def look(self, spec, limit):
        """Find out what the target offers to a spec, before it is planned.

        What was not asked before is asked in a pause of its own. Raises
        ProbeError where a body could not do what it must.
        """
        wants = wanted_by(spec) - self._looked
        if "tsc" in wants:
            self.clock = self.clock or Clock()
            self.clock.check()
            self.offers = self.offers._replace(tsc=self.clock.scale)
        if not wants:
            return

        def action():
            offset = tid_source(self.tracer) if "tid" in wants else None
            if wants & {"tsc", "memory", "futex", "call"}:
                with Injection(self.tracer, bytes(8)) as injection:
                    if "tsc" in wants:
                        check_tsc(self.tracer, injection)
                    if "memory" in wants:
                        injection.check_filters(SYS_process_vm_readv, 0, 0,
                                                1, 0, 1)
                    if "futex" in wants:
                        injection.check_filters(SYS_futex, 0, 0, 0, 0, 0, 0)
                    for syscall_made in (_SYSCALLS_OF_CALLS
                                         if "call" in wants else ()):
                        injection.check_filters(*syscall_made)
            return offset
        offset = self.tracer.pause(action, max(
            0.1, limit - time.monotonic()), "look")
        if "tid" in wants:
            self.offers = self.offers._replace(tid_offset=offset)
        self._looked |= wants

    def install(self, probe, plans, limit, hook=()):
        """Arm the plans of a probe, in one pause: all, or nothing.

        hook   (Probe, SitePlan) of the loader's debug hook, to be armed in
               that pause, if it can be
        """
        probe._armed_tsc = self.clock.read()[0] if self.clock else 0
        try:
            steps = self._steps_of_hook(hook, plans, limit) if hook else []
            for group in _by_reach(plans):
                while group:
                    try:
                        arena, part = self._room_for(group, self._need_of,
                                                     limit)
                    except SlackFull as error:
                        group = _without_slack(probe, group, error)
                        continue
                    group = group[len(part):]
                    steps += self._write(probe, arena, part)
            self._arm(steps, limit)
        except BaseException:
            self.take_out([probe] + list(hook[:1]), limit)
            raise

    def _steps_of_hook(self, hook, plans, limit):
        """What _write() makes for the loader's debug hook; [] if that cannot
        be armed. Plans that are near it find room in the same arena."""
        probe, plan = hook
        group = next(group for group in _by_reach([plan] + plans)
                     if plan in group)
        others = [each for each in group if each is not plan]
        try:
            arena = next((arena for arena in self.arenas if arena.n_fitting(
                [plan], self._need_of, self._span)), None)
            if arena is None:
                need = self._need_of([plan])
                arena = self._new_arena(group, need + self._need_of(others)
                                        if others else need, limit)
            return self._write(probe, arena, [plan])
        except InjectionRefused as error:
            if self.kind != "auto":
                raise
            self._forbidden = error
        except ProbeError as error:
            log.debug("the loader's debug hook is not used: %s", error)
        self._release_calls({probe}, set())
        return []

    def may_share(self):
        """May memory be mapped that the target and we share?"""
        return (self.kind in ("auto", "memfd") and not self._forbidden
                and all(arena.memory is not None for arena in self.arenas))

    def _calls_of(self, probe):
        return (self.hook_calls if isinstance(probe.action, HookCall)
                else self.calls)

    def _need_of(self, plans):
        """need_of(), with slots of calls if there are none yet."""
        need, spec = need_of(plans), plans[0].spec
        if spec.is_quiet and spec.action == "count":
            return need._replace(private=_SCRATCH)
        if spec.action != "call" or (self.hook_calls if spec.is_quiet
                                     else self.calls) is not None:
            return need
        return need._replace(calls=_pages(ubp_x86.CALLS_SIZE))

    def _open_calls(self, probe, arena):
        """Have somebody who answers the hits of a probe."""
        if self._calls_of(probe) is None:
            calls = Calls(arena, self.note)
            if isinstance(probe.action, HookCall):
                self.hook_calls = calls
            else:
                self.calls = calls

    def _release_calls(self, gone, staying):
        """Let hits of probes that are going go on."""
        for calls in (self.calls, self.hook_calls):
            if calls is not None:
                calls.release(gone, any(
                    isinstance(probe.action, Call)
                    and self._calls_of(probe) is calls for probe in staying))

    def _room_for(self, plans, need_of, limit):
        """An arena for the first of plans that are near each other.

        need_of   the Need of such plans
        -> (Arena, those of plans that it has room for); it is made if
        there is none.
        """
        for arena in self.arenas:
            n = arena.n_fitting(plans, need_of, self._span)
            if n:
                return arena, plans[:n]
        try:
            if self._forbidden or self.kind == "slack":
                return self._slack_for(plans, need_of)
            return self._new_arena(plans, need_of(plans), limit), plans
        except InjectionRefused as error:
            if self.kind != "auto":
                raise
            self._forbidden = error
            return self._slack_for(plans, need_of)

    def _new_arena(self, plans, need, limit):
        """An Arena that code of plans reaches, for a Need."""
        arena = make_arena(self.tracer, *self._span(plans), need, max(
            0.1, limit - time.monotonic()), self.kind)
        self.arenas.append(arena)
        if arena.memory is None:
            self.note("its memory is private: calls in processes that it "
                      "forks from now on are not counted, nor, if it ends, "
                      "those since it was last read")
        return arena

    def _slack_for(self, plans, need_of):
        """_room_for, where nothing may be injected. Raises SlackFull."""
        why = "its module's slack has no room for more"
        own = [arena for arena in self.arenas if isinstance(arena, SlackArena)
               and arena._serves(plans[0])]
        if not own:
            try:
                arena = make_slack_arena(self.tracer, plans[0])
                self.arenas.append(arena)
            except ProbeError as error:
                why = error.why
            else:
                n = arena.n_fitting(plans, need_of, self._span)
                self.note("no syscall may be injected into it: its probes "
                          "are in unused bytes behind the text and the data "
                          "of %s; calls in processes that it forks are not "
                          "counted" % plans[0].site.module.name)
                if n:
                    return arena, plans[:n]
                why = "what it does needs more than its module's slack"
        error = SlackFull("probe", site_name(plans[0].site), (
            "%s, and %s" % (self._forbidden.why, why) if self._forbidden
            else why), getattr(self._forbidden, "hint", ""))
        error.is_for_all = all(arena.n_free < _LEAST_SLACK for arena in own)
        raise error

    def _span(self, plans):
        """[low, high) of what code of plans refers to: their windows, and
        the data of bodies that share these."""
        parts = [part for plan in plans for part in plan.all_parts]
        windows = {part.window.site for part in parts}
        shared = {body.arena.range for part in parts
                  for patch in patches_in(self.patches, part.window)
                  for body in patch.bodies}
        return (min(windows.union(low for low, _ in shared)),
                max({vaddr + PAGE for vaddr in windows}.union(
                    high for _, high in shared)))

    def _write(self, probe, arena, plans):
        """Data, trampolines and records of plans. -> [(Patch, Change)]"""
        layout, spec = ubp_x86.block_layout(plans[0].spec), plans[0].spec
        if spec.action == "call":
            self._open_calls(probe, arena)
        if isinstance(probe.action, SignalCount) and not self.scratch():
            self._scratch = arena, arena.allocate_private(_SCRATCH) + _SCRATCH
        is_shared = layout.kind in ("table", "ring")
        offset = arena.allocate(
            layout.size * (1 if is_shared else len(plans)))
        frames, each = frames_size(plans)
        block = Block(arena, offset, spec, tuple(
            (plan.site, plan.index) for plan in plans),
            (arena.allocate_private(frames), frames, each) if frames else (),
            len(spec.keys) > len(probe._spec.keys))
        probe._blocks.append(block)
        if layout.kind == "ring":
            probe._rings += [TraceRing(block, cpu)
                             for cpu in range(arena.shards.mask + 1)]
        new = collections.OrderedDict()     # {window.site: [Body]}
        for n, plan in enumerate(plans):
            at = offset + (0 if is_shared else n * layout.size)
            for part in plan.all_parts:
                new.setdefault(part.window.site, []).append(Body(
                    probe, plan, part, arena,
                    self._place(arena, at, part, block, probe, plan)))
        steps = []
        for vaddr, bodies in new.items():
            first = bodies[0]
            own = [body for body in bodies if not body.lends]
            patch, plan = self.patches.get(vaddr), first.part_plan
            if patch is None or patch.window != plan.window:
                patch = Patch(plan, patches_in(self.patches, plan.window))
            try:
                change = self._compose(
                    patch, patch.bodies + tuple(bodies), arena,
                    _OWNED if isinstance(probe.action, SignalCount)
                    else journal_block(
                        layout, own[0].place.block, own[0].plan.index
                        if block.is_indexed else _ANY_INDEX)
                    if own else _LENT)
            except RelocationError as error:
                raise ProbeError("probe", site_name(first.plan.site),
                                 error.why)
            for body in bodies:
                body.record = change.record
            steps.append((patch, change))
        return steps

    def _place(self, arena, offset, plan, block, probe, whole):
        """Where a body's data is, and what the target offers."""
        spec, waits, calls, index = plan.spec, 0, 0, plan.index
        if spec.action == "trace" and spec.policy == "block":
            waits = arena.own_rings()
        if spec.action == "call":
            owner = self._calls_of(probe)
            calls, index = owner.vaddr, owner.add(probe, whole.site, plan)
        return self.offers._replace(
            shards=arena.shards, block=offset, site_index=index,
            private=arena.private, tracer=waits, calls=calls,
            frames=block.frames[0] if block.frames else 0, at=plan.at,
            dead=plan.dead, is_taken=plan.is_taken,
            can_stack=plan.can_stack)

    def _compose(self, patch, bodies, arena, block):
        """Write a trampoline of bodies for a patch into an arena. -> Change

        From here on its record may be in force.
        """
        site = patch.site
        record = arena.add(
            patch.window, patch.old, (site.module.build_id, site.module.name,
                                      site_name(site)), block,
            lambda vaddr: assemble(patch.window, vaddr,
                                   [body.part for body in bodies]),
            bodies[0].part_plan.trampoline_size if len(bodies) == 1 else 0)
        self._links.update((arena, body.arena) for body in bodies)
        self._links.update((arena, self._calls_of(body.probe).arena)
                           for body in bodies
                           if body.part[0].action == "call")
        before = tuple(old for _, old in patch.records)
        change = Change(record, before, self._past(patch.window, before))
        patch.records.append((arena, record))
        patch.bodies = bodies
        for other in patch.absorbs:
            self.patches.pop(other.window.site, None)
        self.patches[patch.window.site] = patch
        return change

    def _past(self, window, before):
        """The Records, but for those before, of windows that had bytes of
        one: from their trampolines a thread might come into its middle.
        Where no branch is displaced, only removal may leave one there."""
        known = {record.trampoline for record in before}
        records = itertools.chain.from_iterable(
            arena.records for arena in self.arenas
        ) if window.has_inner else [
            record for place in range((window.site >> 8) - 1,
                                      (window.site + window.size >> 8) + 1)
            for arena, record in self._gone.get(place, ())
            if arena in self.arenas]
        return tuple(
            record for record in records
            if record and record.trampoline not in known
            and record.site < window.site + window.size
            and window.site < record.site + record.window_size)

    def _arm(self, steps, limit):
        """Patch, after the journal; what has changed meanwhile is refused.
        """
        arenas = {patch.records[-1][0] for patch, _ in steps}
        for arena in arenas:
            arena.commit()
        jumps = [change for patch, change in steps
                 if not patch.window.is_trap]       # others: the guardian
        refused = arm(self.tracer, arenas, jumps,
                      max(0.1, limit - time.monotonic())) if jumps else ()
        lost = set()                # (probe, plan) whose text had changed
        for patch, change in steps:
            if change in refused:
                arena, record = patch.records.pop()
                arena.void(record)
                lost.update((body.probe, body.plan) for body in patch.bodies
                            if body.record is record)
                patch.bodies = tuple(body for body in patch.bodies
                                     if body.record is not record)
                if patch.absorbs or not patch.bodies:
                    del self.patches[patch.window.site]
                for other in patch.absorbs:     # they stay as they were
                    self.patches[other.window.site] = other
            patch.absorbs = ()
        for probe, plan in sorted(lost, key=lambda item: item[1].index):
            probe._refuse(plan, "changed text", "its text changed meanwhile")
            if plan.site.is_return:     # some exits are armed: no times
                raise ProbeError("probe", site_name(plan.site),
                                 "the text of an exit changed meanwhile")
        probes = {body.probe for patch, _ in steps for body in patch.bodies}
        # A library that comes back where it was has new sites there.
        known = {(probe, site.vaddr, site.module) for probe in probes
                 for site in probe.sites}
        for patch, change in steps:
            for body in patch.bodies:
                key = (body.probe, body.plan.site.vaddr,
                       body.plan.site.module)
                if body.record is change.record and body.lends:
                    body.probe._lent.append((body.part_plan.site,
                                             patch.window.size))
                elif body.record is change.record and key not in known:
                    known.add(key)
                    body.probe.sites.append(body.plan.site)

    def wake(self, modules, limit):
        """Patch libraries that are back where they were. -> how many sites

        Each leads to the trampoline that it led to before, if its text is
        what it was then.
        """
        patches = [patch for module in modules
                   for patch in self.asleep.pop(module, ())]
        changes = {Change(patch.records[-1][1], ()): patch
                   for patch in patches if not patch.window.is_trap}
        refused = arm(self.tracer, {patch.records[-1][0] for patch in patches},
                      list(changes), max(0.1, limit - time.monotonic())
                      ) if changes else ()
        lost = [changes[change] for change in refused]
        self.patches.update((patch.window.site, patch) for patch in patches
                            if patch not in lost)
        return sum(not patch.lends for patch in patches if patch not in lost)

    def scratch(self):
        """The end of memory for the frames of the guardian's injections, or
        0: then they are where every Injection has them."""
        arena, vaddr = self._scratch
        return vaddr if arena in self.arenas else 0

    def traps(self):
        """What a guardian has to do: Guard.do_arm's argument."""
        found = {}
        for patch in self.patches.values():
            if patch.window.is_trap and patch.records:
                arena, record = patch.records[-1]
                found.setdefault(arena, []).append(tuple(record))
        return [(arena.base, arena.nonce, arena.inode, records)
                for arena, records in found.items()]

    # -- taking out ---------------------------------------------------------

    def take_out(self, probes, limit):
        """Restore every process, or leave what others need. -> Removal"""
        gone = set(probes)
        for module, patches in self.asleep.items():
            self.asleep[module] = [
                patch for patch in patches
                if gone.isdisjoint(body.probe for body in patch.bodies)]
        staying = {body.probe for patch in self.patches.values()
                   for body in patch.bodies} - gone
        for arena in self.arenas:
            if arena.ring_owner is not None and not any(
                    probe._rings for probe in staying):
                arena.ring_owner.close()        # who waits goes on
        self._release_calls(gone, staying)
        patches = [patch for patch in self.patches.values()
                   if any(body.probe in gone for body in patch.bodies)]
        self._recompose([patch for patch in patches
                         if any(body.probe not in gone
                                for body in patch.bodies)], gone, limit)
        done = [patch for patch in patches
                if all(body.probe in gone for body in patch.bodies)]
        records = [pair for patch in done for pair in patch.records]
        unused = self._unused(done)
        installed = [Installed(
            arena.base, arena.nonce, arena.inode,
            (arena.range,) if arena in unused else (),
            tuple(each for each in arena.records if each)
            if arena in unused else
            tuple(record for each, record in records if each is arena),
            arena.slack) for arena in self.arenas]
        total = _restore_everywhere(
            self.tracer, installed, limit, lambda: _keep(unused)) \
            if done or unused else Removal(0, 0, 0, 0, (), ())
        for patch in done:
            self.patches.pop(patch.window.site, None)
        for arena, record in records:
            if arena not in unused:
                self._gone.setdefault(record.site >> 8, []).append(
                    (arena, record))
        for arena in unused:
            if not _is_mapped_still(self.tracer, arena):
                self.arenas.remove(arena)
                if self.calls is not None and self.calls.arena is arena:
                    self.calls = None
                if (self.hook_calls is not None
                        and self.hook_calls.arena is arena):
                    self.hook_calls = None
                arena.close()
        return total

    def _recompose(self, patches, gone, limit):
        """Give patches a trampoline without the bodies of probes."""
        steps, before = [], {}
        for patch in patches:
            before[patch] = patch.bodies
            rest = tuple(body for body in patch.bodies
                         if body.probe not in gone)
            arena, _ = self._room_for([patch], _need_of_code, limit)
            steps.append((patch, self._compose(
                patch, rest, arena, _LENT if patch.lends else _NO_BLOCK)))
        for arena in {patch.records[-1][0] for patch, _ in steps}:
            arena.commit()
        jumps = [change for patch, change in steps
                 if not patch.window.is_trap]
        try:
            refused = arm(self.tracer, self.arenas, jumps, max(
                0.1, limit - time.monotonic())) if jumps else ()
        except BaseException:
            for patch, bodies in before.items():
                patch.bodies = bodies       # the old trampoline is in force
            raise
        for patch, change in steps:
            patch.absorbs = ()
            if change in refused:
                self.note("%s was changed by another tool" % site_name(
                    patch.site))
            # An entry and an exit of one window share its record.
            for arena, record in {body.record.trampoline: (
                    body.arena, body.record) for body in before[patch]
                    if body.probe in gone}.values():
                arena.mark_gone(record)
        self._recompose_in_children(jumps, limit)

    def _recompose_in_children(self, changes, limit):
        """The same in what has inherited the trampolines before.

        One that cannot follow, as it lacks a later arena or may not be
        traced, keeps their predecessors, which stay as they are.
        """
        inodes = {arena.inode for arena in self.arenas if changes} - {0}
        for pid in {pid for inode in inodes for pid in processes_with(inode)
                    } - {self.tracer.tgid}:
            child = Tracer(pid)
            child.swaps_contexts = self.tracer.swaps_contexts
            try:
                arm(child, self.arenas, [change for change in changes
                                         if change.is_in_force(child)],
                    max(0.1, limit - time.monotonic()))
            except UbpError as error:
                self.note("its child %d keeps the probe: %s" % (pid, error))
            self.tracer.others.append(child)
            self.tracer.pause_us = max(self.tracer.pause_us, child.pause_us)

    def _unused(self, done):
        """The arenas that no probe and no code needs, without patches."""
        kept = [patch for patch in self.patches.values()
                if patch not in done]
        kept += [patch for patches in self.asleep.values()
                 for patch in patches]
        used = {body.arena for patch in kept for body in patch.bodies}
        used |= {arena for patch in kept for arena, _ in patch.records}
        while True:
            more = {other for arena, other in self._links if arena in used}
            if more <= used:
                break
            used |= more
        return [arena for arena in self.arenas if arena not in used]


_NO_BLOCK = "none", 0, (0, 0, 0, 0)
_LENT, _OWNED = [(kind,) + _NO_BLOCK[1:] for kind in ("lent", "own")]
_ANY_INDEX = 0xffff             # a table of one site has no index in its keys


def journal_block(layout, offset, index):
    """(kind, offset, table) of a block, as a record has it."""
    kind = {"word": "count", "count": "filtered", "hist":
            "hist" if layout.is_unsigned else "signed hist"}.get(
                layout.kind, layout.kind)
    table = (0, 0, 0, 0)
    if kind == "table":
        table = (layout.entry_size // 8, layout.payload_offset // 8,
                 layout.n_entries.bit_length() - 1, min(index, _ANY_INDEX))
    return kind, offset, table


def need_of(plans):
    """The Need of plans of one probe."""
    layout = ubp_x86.block_layout(plans[0].spec)
    n = 1 if layout.kind in ("table", "ring") else len(plans)
    parts = [part for plan in plans for part in plan.all_parts]
    return Need(len(parts),
                sum(part.trampoline_size + 2 * ubp_x86.CACHE_LINE
                    for part in parts),
                n * layout.size + 2 * ubp_x86.CACHE_LINE,
                max(frames_size(plans)[0], 8 * any(
                    needs_private(part.spec) for part in parts)))


def frames_size(plans):
    """(bytes of the table of frames, and of each) for plans, or (0, 0)."""
    return max((ubp_x86.frames_layout(part.spec)[::-1] for plan in plans
                for part in plan.all_parts if part.spec.action == "enter"),
               default=(0, 0))


def _need_of_code(patches):
    """The Need of trampolines no longer than those in force."""
    return Need(len(patches), sum(patch.records[-1][1].size
                                  + 2 * ubp_x86.CACHE_LINE
                                  for patch in patches), 0, 0)


def names_of(spec):
    """The inputs that the expressions of a spec read. -> set"""
    found = {"memory"} if spec.stack_size or spec.depth else set()
    for each in (spec.when,) + spec.keys + spec.values:
        if each is not None:
            found |= each.names | ({"memory"} if each.reads_memory else set())
    return found


def wanted_by(spec):
    """What a body needs that not every target offers. -> set"""
    names = names_of(spec)
    wants = names & {"tid", "memory"}
    if "pid" in names:
        wants |= {"tid"}            # tells forked children apart
    if spec.action == "trace":
        wants |= {"tid", "tsc"}
        wants |= {"futex"} if spec.policy == "block" else set()
    if spec.action == "call":
        wants |= {"call"}
    if names & {"nsecs", "elapsed"} or (spec.action == "enter"
                                        and spec.is_timed):
        wants |= {"tsc"}
    return wants


def needs_private(spec):
    """Does a body have to know whether it runs in a forked child?"""
    return bool(names_of(spec) & {"pid", "memory"}
                or spec.action in ("trace", "call"))


def _keep(arenas):
    """Look a last time at memory that is about to go.

    The target is stopped: what is shared with us stays ours to read later.
    """
    for arena in arenas:
        if arena.memory is None:
            arena.keep()
        else:
            arena.keep_private()


# ---- 9  Breakpoints -------------------------------------------------------
#
# Sites that trap. The one idea: what a jump's body computes inside the
# target, the tracer computes here from the registers of each hit, so every
# strategy gives the same results. Invariant: hits = recorded + dropped is
# counted by the kernel, not by whoever reads the records.

STRATEGIES = ("jump", "int3", "hw", "hw-ptrace")
HARDWARE = ("hw", "hw-ptrace")  # of them: those that write no text
N_DEBUG_REGISTERS = 4           # DR0 to DR3, SDM 18.2.1
_OPEN_ATTEMPTS = 8              # before a target that starts threads all the
#                                 time is stopped while they are equipped


def strategies_of(text):
    """"jump,hw" -> ("jump", "hw"): to be tried at each site, in order."""
    names = tuple(text.split(","))
    for name in names:
        if name not in STRATEGIES:
            raise ProbeError("use the strategy", _quote(name), "no strategy: "
                             "there are " + ", ".join(STRATEGIES),
                             "jump is the fast one, and the default")
    if len(set(names)) < len(names):
        raise ProbeError("use the strategies", _quote(text),
                         "one of them is named twice")
    return names


def perf_event_open(attr, tid, cpu):
    """perf_event_open(2). -> descriptor. Raises OSError."""
    attr.size = ctypes.sizeof(attr)
    return syscall(SYS_perf_event_open, ctypes.addressof(attr), tid, cpu, -1,
                   PERF_FLAG_FD_CLOEXEC)


def _breakpoint_attr(site):
    """The perf_event_attr that counts how often a site is hit."""
    attr = PerfEventAttr(type=PERF_TYPE_BREAKPOINT, bp_addr=site.vaddr)
    attr.flags = PERF_EXCLUDE_HV | PERF_INHERIT | PERF_REMOVE_ON_EXEC
    if is_watch(site):
        attr.bp_len = site.function.size
        attr.bp_type = (HW_BREAKPOINT_W if site.function.kind == "w"
                        else HW_BREAKPOINT_RW)
    else:
        attr.bp_type, attr.bp_len = HW_BREAKPOINT_X, ctypes.sizeof(_long)
        attr.flags |= PERF_EXCLUDE_KERNEL
    return attr


_has_debug_registers = []       # of this machine, once it is known


def check_debug_registers():
    """Raise ProbeError unless a breakpoint works on our own memory.

    Some virtual machines take the debug registers and never trap.
    """
    if not _has_debug_registers:
        word = ctypes.c_uint64()
        attr = PerfEventAttr(
            type=PERF_TYPE_BREAKPOINT, bp_addr=ctypes.addressof(word),
            bp_len=8, bp_type=HW_BREAKPOINT_W,
            flags=PERF_EXCLUDE_HV | PERF_EXCLUDE_KERNEL)
        try:
            fd = perf_event_open(attr, 0, -1)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise _perf_refusal(error, "our own memory")
            return              # taken, so others found that they work
        try:
            for n in range(3):
                word.value = n
            n_hits = int.from_bytes(os.read(fd, 8), "little")
        finally:
            os.close(fd)
        _has_debug_registers.append(n_hits == 3)
    if not _has_debug_registers[0]:
        raise ProbeError("use", "hardware breakpoints", "this machine takes "
                         "them, but a test on ubp's own memory did not trap",
                         "a virtual machine without debug registers? use "
                         "--strategy jump")


def _perf_refusal(error, whom):
    """The ProbeError for what perf_event_open(2) would not do."""
    name = errno.errorcode.get(error.errno, str(error.errno))
    why, hint = "perf_event_open: " + name, ""
    level = read_proc("/proc/sys/kernel/perf_event_paranoid").decode().strip()
    if error.errno in (errno.EACCES, errno.EPERM):
        why += ": kernel.perf_event_paranoid is %s" % (level or "unknown")
        hint = "sudo; a container needs --cap-add PERFMON and a seccomp " \
               "profile that allows perf_event_open"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        why += ": a descriptor is needed for each thread and site"
        hint = "ulimit -n 100000"
    elif error.errno in (errno.ENOSYS, errno.ENOENT, errno.ENODEV,
                         errno.EOPNOTSUPP):
        why += ": this kernel or machine has no hardware breakpoints"
        hint = "--strategy jump"
    return ProbeError("set a breakpoint at", whom, why, hint)


def _all_threads(tgid):
    """The tids of a process, as a set that misses none.

    A folder of /proc that is read while threads end can be cut short, so
    the names must be as many as the kernel says; proc(5), num_threads.
    """
    for _ in range(20):
        tids, fields = set(thread_ids(tgid)), read_stat(tgid)
        if len(fields) < 18 or len(tids) >= int(fields[17]):
            break
    return tids


class Trap(NamedTuple):
    """What a strategy that traps knows of one hit."""
    time: int               # ns, CLOCK_MONOTONIC
    tid: int
    pid: int
    cpu: int
    vaddr: int              # where it ran; of a watch, just behind the access
    regs: bytes             # a regset, or b"" where the kernel had none
    stack: bytes            # a copy of what is at rsp and above


class Tally:
    """What a Spec computes at one site, from the Traps of it.

    The same as the body that a jump leads to: ubp_x86.evaluate has the one
    meaning of an expression, and each hit is recorded, a fault, or dropped.
    """

    def __init__(self, site, spec):
        self.site, self.spec = site, spec
        self.n_seen = self.n_recorded = self.n_faults = self.n_skipped = 0
        self.found = {}             # key: what was computed for it
        self.used = [each for each in (spec.when,) + spec.keys + spec.values
                     if each is not None]
        self.names = frozenset().union(*(each.names for each in self.used))

    def add(self, hit, read, more=()):
        """Count a Trap. -> its values if a Trace is to keep it, or None

        read    read(vaddr, size) -> bytes of the process; raises OSError
        more    {name: value} of what else is known: old, new
        """
        self.n_seen += 1
        spec, values = self.spec, self._inputs(hit, read,
                                               self.names.difference(more))
        if values is not None:
            values.update(more)
            if not self.names <= set(values):
                values = None
        if values is None:
            self.n_faults += 1
            return None
        if spec.when is not None:
            is_wanted = ubp_x86.evaluate(spec.when, values, read)
            if not is_wanted:
                self.n_skipped += is_wanted is not None
                self.n_faults += is_wanted is None
                return None
        key = tuple(ubp_x86.evaluate(e, values, read) for e in spec.keys)
        got = tuple(ubp_x86.evaluate(e, values, read) for e in spec.values)
        if spec.action == "trace":
            self.n_recorded += 1
            return got
        if None in key or None in got:
            self.n_faults += 1
            return None
        self.n_recorded += 1
        self._record(key, got)
        return None

    def _inputs(self, hit, read, names):
        """{name: value} of what expressions use, or None: a fault."""
        values = {"tid": hit.tid, "pid": hit.pid, "cpu": hit.cpu,
                  "nsecs": hit.time, "caller": hit.vaddr}
        if not hit.regs:
            return values if names <= set(values) else None
        values.update(ubp_x86.register_inputs(hit.regs, names))
        for name, vaddr in ubp_x86.stack_inputs(hit.regs, names).items():
            if name == "caller" and is_watch(self.site):
                continue
            try:
                values[name] = int.from_bytes(read(vaddr, 8), "little")
            except OSError:
                return None
        return values

    def _record(self, key, got):
        if self.spec.action == "hist":
            found = self.found.setdefault(key, [0, got[0], got[0], {}])
            found[0] += got[0]
            found[1] = min(found[1], got[0])
            found[2] = max(found[2], got[0])
            index = ubp_x86.bucket_index(abs(got[0])), got[0] < 0
            found[3][index] = found[3].get(index, 0) + 1
        elif self.spec.action == "sum":
            found = self.found.setdefault(key, [0, 0])
            found[0] += got[0]
            found[1] += 1
        else:
            self.found[key] = self.found.get(key, 0) + 1

    def _value(self, found):
        """int, Sum or Histogram of what _record keeps."""
        if self.spec.action == "sum":
            return Sum(*found)
        if self.spec.action != "hist":
            return found
        buckets = []
        for (index, is_negative), n in found[3].items():
            low, high = ubp_x86.bucket_range(index)
            buckets.append((-high, -low, n) if is_negative
                           else (low, high, n))
        return Histogram.from_buckets(sorted(buckets), *found[:3])

    def reading(self, n_dropped):
        """-> Reading"""
        if self.spec.keys:
            value = {key[0] if len(key) == 1 else key: self._value(found)
                     for key, found in self.found.items()}
        elif self.found:
            value = self._value(self.found[()])
        else:
            value = {"hist": Histogram(), "sum": Sum(0, 0)}.get(
                self.spec.action, 0)
        if self.spec.action == "trace":
            value = self.n_recorded
        return Reading(value, self.n_recorded, self.n_faults, n_dropped)


_MAX_FRAMES = 1 << 16           # of a site, entered and not left


class FrameTally(Tally):
    """A Tally of a function's exits, which may need what its entry knew.

    A frame is named by its thread and rsp, which at an exit is what it was
    at the entry, as in the frames of a jump.
    """

    def __init__(self, site, spec, entry):
        super().__init__(site, spec)
        self.entry = entry          # the Spec of its entry, or None
        self.frames = collections.OrderedDict()     # {(tid, rsp): (ns, {})}
        self.n_unmatched = self.n_abandoned = self.n_crowded = 0

    def enter(self, hit, read):
        """A Trap at the function's entry."""
        key = hit.tid, hit.regs and ubp_x86.stack_pointer(hit.regs)
        if self.frames.pop(key, None):
            self.n_abandoned += 1
        names = set(self.entry.kept) | (
            self.entry.when.names if self.entry.when else set())
        values = self._inputs(hit, read, names)
        if values is None:
            self.n_faults += 1
            return
        if self.entry.when is not None:
            is_wanted = ubp_x86.evaluate(self.entry.when, values, read)
            if not is_wanted:
                self.n_skipped += is_wanted is not None
                self.n_faults += is_wanted is None
                self.frames[key] = ()       # its exit is not wanted either
                return
        if len(self.frames) >= _MAX_FRAMES and self.frames.popitem(False)[1]:
            self.n_crowded += 1
        self.frames[key] = hit.time, {name: values[name]
                                      for name in self.entry.kept}

    def add(self, hit, read, more=()):
        values = dict(more)
        if self.entry is not None:
            frame = self.frames.pop((hit.tid, hit.regs and
                                     ubp_x86.stack_pointer(hit.regs)), None)
            if not frame:
                self.n_seen += 1
                self.n_unmatched += frame is None
                return None
            values.update(frame[1], elapsed=hit.time - frame[0])
        if hit.regs:
            values["ret"] = ubp_x86.register_inputs(hit.regs, ("rax",))["rax"]
        return super().add(hit, read, values)

    def reading(self, n_dropped):
        return super().reading(n_dropped)._replace(
            unmatched=self.n_unmatched, abandoned=self.n_abandoned,
            crowded=self.n_crowded, skipped=self.n_skipped,
            unfinished=sum(map(bool, list(self.frames.values()))))


_SAMPLE = struct.Struct("<QQIIQI4xQ")   # perf_event_open(2), in its order
_SAMPLE_TYPE = (PERF_SAMPLE_IDENTIFIER | PERF_SAMPLE_IP | PERF_SAMPLE_TID
                | PERF_SAMPLE_TIME | PERF_SAMPLE_CPU | PERF_SAMPLE_REGS_USER)
_DATA_HEAD, _DATA_TAIL = 1024 // 8, 1032 // 8   # perf_event_mmap_page, words
_RING_PAGES = (512, 128, 32, 8)     # tried in turn; without privilege all
#                                     rings may take 516 KiB per processor
_STACK_PAGES = (4096, 2048)     # where samples have 8 KiB of stack each
_READ_EACH_MS = 25
_MAX_KEPT = 1 << 17             # events that wait for events()
_MAX_STACK_SAMPLE = 32768       # bytes; a sample has 64 KiB at most


class Ring:
    """A ring that the kernel writes the samples of one processor to.

        page 0      data_head: bytes written;  data_tail: bytes we have read
        page 1 …    the records: type, misc, size (4 + 2 + 2), data

    Its owner is an event of our own that never happens, so that it outlives
    every thread of the target. Raises OSError.
    """

    def __init__(self, cpu, is_prompt=False, has_stacks=False):
        attr = PerfEventAttr(
            type=PERF_TYPE_SOFTWARE, config=PERF_COUNT_SW_DUMMY,
            flags=PERF_EXCLUDE_KERNEL | PERF_EXCLUDE_HV | PERF_USE_CLOCKID
            | PERF_WATERMARK, clockid=time.CLOCK_MONOTONIC)
        for n_pages in _STACK_PAGES * has_stacks + _RING_PAGES:
            self.size = n_pages * PAGE
            attr.wakeup_watermark = 1 if is_prompt else self.size // 4
            self.fd = perf_event_open(attr, 0, cpu)
            try:
                self._map = mmap.mmap(self.fd, PAGE + self.size)
                break
            except OSError:             # EPERM: perf_event_mlock_kb
                os.close(self.fd)
                if n_pages == _RING_PAGES[-1]:
                    raise
        self._words = memoryview(self._map).cast("Q")

    def take(self):
        """Every complete record since the last call. -> [(type, bytes)]"""
        # Aligned words of 64 bits: one load each. x86 keeps their order.
        tail, head = self._words[_DATA_TAIL], self._words[_DATA_HEAD]
        at, end = tail % self.size, tail % self.size + head - tail
        data = self._map[PAGE + at:PAGE + min(end, self.size)]
        if end > self.size:
            data += self._map[PAGE:PAGE + end - self.size]
        self._words[_DATA_TAIL] = head
        records, at = [], 0
        while at + 8 <= len(data):
            kind, _, size = struct.unpack_from("<IHH", data, at)
            if size < 8:
                break
            records.append((kind, data[at + 8:at + size]))
            at += size
        return records

    def close(self):
        """Unmap it."""
        self._words.release()
        self._map.close()
        os.close(self.fd)


def _unpack_sample(data):
    """(id, Trap) of a PERF_RECORD_SAMPLE's data."""
    event, vaddr, pid, tid, when, cpu, abi = _SAMPLE.unpack_from(data)
    at, regs, stack = _SAMPLE.size, b"", b""
    if abi:
        regs = ubp_x86.regs_of_sample(data[at:at + ubp_x86.PERF_REGS_SIZE])
        at += ubp_x86.PERF_REGS_SIZE
        if vaddr >> 63:                 # the kernel's: who called it
            vaddr = ubp_x86.program_counter(regs)
    if len(data) >= at + 8:             # size, bytes, and how many are real
        size, = struct.unpack_from("<Q", data, at)
        if size:
            real, = struct.unpack_from("<Q", data, at + 8 + size)
            stack = data[at + 8:at + 8 + min(size, real)]
    return event, Trap(when, tid, pid, cpu, vaddr, regs, stack)


def online_cpus():
    """The processors that are on, by number."""
    text = read_proc("/sys/devices/system/cpu/online").decode() or "0"
    return [cpu for part in text.strip().split(",")
            for cpu in range(int(part.split("-")[0]),
                             int(part.split("-")[-1]) + 1)]


class HardwarePart:
    """The sites of one probe that are in debug registers.

    Nothing is written to the target and none of its threads is stopped:
    the kernel counts. It has them follow to threads and processes that are
    started later, and takes them out when our descriptors close, in
    whatever way we end. Where more than a count is wanted, it also writes a
    sample of each hit to a ring; what found no room there is known from
    the count. What a sample does not hold (memory other than the top of the
    stack) is read a moment after the hit.

    notes   what the user should know
    """

    name = "hw"

    def __init__(self, plans, spec, tracer, insn_before=lambda vaddr: None,
                 entry=None, on_stack=None):
        self.sites = [plan.site for plan in plans]
        self.notes, self.tracer = [], tracer
        # {Site of a register: (Site that it is for, is it its entry)}
        self.registers = collections.OrderedDict(
            (part.site, (plan.site, entry is not None and n == 0))
            for plan in plans for n, part in enumerate(plan.all_parts))
        self.tallies = collections.OrderedDict(
            (site, FrameTally(site, spec, entry) if spec.is_exit
             else Tally(site, spec)) for site in self.sites)
        self._insn_before = insn_before     # vaddr -> Insn that ends there
        self._on_stack = on_stack   # told of each hit, if stacks are counted
        self._has_frames, self._held = entry is not None, []
        self._wants_values = any(tally.names & set(ubp_x86.WATCH_NAMES)
                                 for tally in self.tallies.values())
        self._last = {}             # {(Site, pid): its value, if it is known}
        self._is_sampled = bool(spec.keys or spec.when or entry
                                or spec.action != "count")
        self._stack_size = _stack_bytes(self.tallies.values())
        self._rings = {}            # processor: Ring
        self._events = {}           # descriptor: Site
        self._ids = {}              # the kernel's number of an event: Site
        self._kept = []             # (Trap, Site, values) for events()
        self._lost = {site: 0 for site in self.sites}
        self._n_entries = dict.fromkeys(self.sites, 0)
        self._is_removed, self._lock = False, threading.Lock()
        self._is_last = False       # nothing is recorded any more
        self._owner, self._reader = os.getpid(), None
        self._depth, self.names = 64, lambda: None

    # -- putting in ---------------------------------------------------------

    def arm(self, in_pause):
        """Equip every thread. Raises ProbeError, TraceeGone.

        in_pause   calls a function while every thread is stopped: only for
                   a target that starts threads faster than they are listed
        Raises OSError, ENOSPC, where there is no register left.
        """
        check_debug_registers()
        tgid = self.tracer.tgid
        try:
            if self._is_sampled:
                for cpu in online_cpus():
                    self._rings[cpu] = Ring(cpu, self._wants_values,
                                            self._stack_size > 1024)
            for _ in range(_OPEN_ATTEMPTS):
                tids = _all_threads(tgid)
                self._open(tids)
                if _all_threads(tgid) <= tids:
                    break
                # Started by a thread that was equipped, it inherited the
                # breakpoints; by one that was not, it did not: once more.
                self._close_events()
            else:
                in_pause(lambda: self._open(_all_threads(tgid)))
            if not self._events:
                raise TraceeGone("probe", self.tracer.name(),
                                 "it has no threads left")
        except BaseException as error:
            self._close()
            if isinstance(error, OSError) and error.errno != errno.ENOSPC:
                raise _perf_refusal(error, "%s of %s" % (
                    site_name(self.sites[0]), self.tracer.name()))
            raise
        for site in self.sites if self._wants_values else ():
            self._last[site, tgid] = self._settled(site, tgid, 0)
        if self._is_sampled:
            self._reader = threading.Thread(
                target=self._keep_reading, daemon=True,
                name="ubp-hw-%d" % tgid)
            self._reader.start()

    def _open(self, tids):
        for site in self.registers:
            attr = _breakpoint_attr(site)
            if self._is_sampled:
                attr.flags |= PERF_DISABLED | PERF_USE_CLOCKID
                attr.clockid, attr.sample_period = time.CLOCK_MONOTONIC, 1
                attr.sample_type = _SAMPLE_TYPE
                attr.sample_regs_user = ubp_x86.PERF_REGS
                if self._stack_size:
                    attr.sample_type |= PERF_SAMPLE_STACK_USER
                    attr.sample_stack_user = self._stack_size
            for tid in tids:
                # A ring has one writer at a time, so events that may be
                # inherited write to the ring of their processor.
                for cpu in self._rings or (-1,):
                    self._open_one(attr, tid, cpu, site)

    def _open_one(self, attr, tid, cpu, site):
        """perf_event_open, with less where the kernel allows less."""
        while True:
            try:
                fd = perf_event_open(attr, tid, cpu)
                break
            except OSError as error:
                if error.errno == errno.ESRCH:
                    return          # it has ended
                if (error.errno in (errno.EACCES, errno.EPERM)
                        and not attr.flags & PERF_EXCLUDE_KERNEL):
                    attr.flags |= PERF_EXCLUDE_KERNEL
                    self._note("what the kernel writes there for a syscall "
                               "is not seen: that needs privilege")
                elif (error.errno == errno.EINVAL
                        and attr.flags & PERF_REMOVE_ON_EXEC):
                    attr.flags &= ~PERF_REMOVE_ON_EXEC
                    self._note("this kernel (before 5.13) keeps breakpoints "
                               "through exec: do not count on what children "
                               "that exec add")
                else:
                    raise
        self._events[fd] = site
        if self._is_sampled:
            number = ctypes.c_uint64()
            ioctl(fd, PERF_EVENT_IOC_SET_OUTPUT, self._rings[cpu].fd)
            ioctl(fd, PERF_EVENT_IOC_ID, ctypes.addressof(number))
            self._ids[number.value] = site
            ioctl(fd, PERF_EVENT_IOC_ENABLE, 0)

    def _note(self, text):
        if text not in self.notes:
            self.notes.append(text)

    # -- reading ------------------------------------------------------------

    def readings(self):
        """{Site: Reading}, over all threads and the children of them."""
        if self._owner == os.getpid():      # else the lock may be held
            with self._lock:
                if not self._is_removed:
                    self._read()
        return collections.OrderedDict(
            (site, tally.reading(self._lost[site]))
            for site, tally in self.tallies.items())

    def _read(self):
        """What was counted first: it may not exceed what was sampled."""
        counts = dict.fromkeys(self.sites, 0)
        entries = dict(counts)
        for fd, register in self._events.items():
            site, is_entry = self.registers[register]
            (entries if is_entry else counts)[site] += int.from_bytes(
                os.read(fd, 8), "little")
        self._drain()
        for site, n in entries.items() if self._has_frames else ():
            # An exit without its entry, if that found no room.
            self.tallies[site].n_crowded = max(
                self.tallies[site].n_crowded, n - self._n_entries[site])
        for site, n in counts.items():
            tally = self.tallies[site]
            if self._is_sampled:
                self._lost[site] = max(self._lost[site], n - tally.n_seen)
            else:
                tally.n_recorded = n
                tally.found = {(): n}

    def _take_hits(self):
        """[(time, n, Trap, Site of its register)] since, in their order.

        The rings are read one after the other: where an exit must come
        behind its entry, what is younger than this look waits.
        """
        began = int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1e9)
        hits, self._held = self._held, []
        for ring in self._rings.values():
            for kind, data in ring.take():
                if kind == PERF_RECORD_SAMPLE:
                    number, hit = _unpack_sample(data)
                    if number in self._ids:
                        hits.append((hit.time, len(hits), hit,
                                     self._ids[number]))
                elif kind == PERF_RECORD_LOST:
                    for tally in self.tallies.values():
                        if self._has_frames:    # whose exit may be lost
                            tally.n_abandoned += len(tally.frames)
                            tally.frames.clear()
        hits.sort(key=operator.itemgetter(0, 1))
        if self._has_frames and not self._is_last:
            at = bisect.bisect_right(hits, (began, len(hits)))
            hits, self._held = hits[:at], hits[at:]
        return hits

    def _drain(self):
        """Compute what the samples in the rings stand for, in their order."""
        hits = self._take_hits()
        last = {(site, hit.pid): n for _, n, hit, site in hits}
        n_seen = collections.Counter(
            self.registers[site][0] for _, _, _, site in hits)
        for site in n_seen:
            n_seen[site] += self.tallies[site].n_seen
        for _, n, hit, register in hits:
            site, is_entry = self.registers[register]
            tally, more = self.tallies[site], ()
            if is_entry:
                self._n_entries[site] += 1
                tally.enter(hit, _reader_of(hit))
                continue
            if self._wants_values:
                more = self._values_of(site, hit, n_seen[site] if last[
                    site, hit.pid] == n else 0)
            if tally.spec.action == "trace" and len(self._kept) >= _MAX_KEPT:
                continue                # lost: seen by the kernel only
            values = tally.add(hit, _reader_of(hit), more)
            if values is not None and self._on_stack is not None:
                self._add_stack(tally, hit, values)
            elif values is not None:
                self._kept.append((hit, site, values))

    def _add_stack(self, tally, hit, values):
        """Count the stack of a hit."""
        walk = None if None in values else self._walk(hit)
        if walk is None:
            tally.n_recorded -= 1
            tally.n_faults += 1
        else:
            self._on_stack(tally.site, walk, values[0] if values else 1)

    def _values_of(self, site, hit, n_seen):
        """{"old": …, "new": …} of a watched range, what is known for sure.

        n_seen   of the last hit of a process so far: how many of the site
                 were found up to now; else 0
        What a mov stored its registers tell. Else memory does, if nobody
        wrote to it since: only of the last hit.
        """
        key = site, hit.pid
        more = {"old": self._last.get(key)}
        insn = self._insn_before(hit.vaddr) if hit.regs else None
        stored = insn and ubp_x86.stored_value(insn, hit.regs)
        if stored == (site.vaddr, stored and stored[1]) and len(
                stored[1]) == site.function.size:
            more["new"] = int.from_bytes(stored[1], "little")
        elif n_seen:
            more["new"] = self._settled(site, hit.pid, n_seen)
        self._last[key] = more.get("new")
        return {name: value for name, value in more.items()
                if value is not None}

    def _settled(self, site, pid, n_seen):
        """The value of a watched range, if it had so many hits and no more.
        """
        try:
            data = read_memory(pid, site.vaddr, site.function.size)
        except OSError:
            return None
        n = sum(int.from_bytes(os.read(fd, 8), "little")
                for fd, each in self._events.items() if each == site)
        if n - self._lost[site] != n_seen:
            return None
        return int.from_bytes(data, "little")

    def _keep_reading(self):
        """In a thread: before the rings are full."""
        poll = select.poll()
        for ring in self._rings.values():
            poll.register(ring.fd, select.POLLIN)
        while not self._is_removed:
            poll.poll(_READ_EACH_MS)
            with self._lock:
                if not self._is_removed:
                    self._drain()

    def take_events(self, probe, until):
        """The Events up to a time, in order; each is given once.

        until   CLOCK_MONOTONIC, ns: what is later may still be incomplete
        """
        with self._lock:
            if not self._is_removed:
                self._drain()
            self._kept.sort(key=lambda kept: kept[0].time)
            n = sum(kept[0].time <= until for kept in self._kept)
            taken, self._kept = self._kept[:n], self._kept[n:]
        since = int((time.time() - time.clock_gettime(
            time.CLOCK_MONOTONIC)) * 1e9)
        has_stacks = any(tally.spec.stack_size
                         for tally in self.tallies.values())
        names = probe._target._reader.names if taken and has_stacks else None
        return [Event(hit.time + since, hit.tid, hit.cpu, hit.pid, site,
                      "exit" if site.is_return else
                      "hit" if site.offset or is_watch(site) else "entry",
                      values, self._frames(hit, names) if names else (),
                      probe._shown) for hit, site, values in taken]

    def _frames(self, hit, names):
        """The stack of a hit, from the copy of it in the sample."""
        if isinstance(hit.stack, tuple):
            return hit.stack        # settled
        return names.symbols.frames(self._walk(hit, names)) \
            if hit.regs else ()

    def settle(self, names):
        """Name the stacks of what waits for events(): the program goes."""
        with self._lock:
            self._kept = [(hit._replace(stack=self._frames(hit, names)), site,
                           values) for hit, site, values in self._kept] \
                if names and self._stack_size > 128 else self._kept

    def _walk(self, hit, names=None):
        """The Walk of a hit's stack; None if there is no copy of it."""
        names = names or self.names()
        if not hit.regs or names is None:
            return None
        known = ubp_x86.register_inputs(hit.regs, ubp_x86.STACK_REGISTERS)
        registers = {number: known[name] for name, number in zip(
            ubp_x86.STACK_REGISTERS, _STACK_REGISTERS)}
        return names.unwinder.walk(
            ubp_x86.program_counter(hit.regs), registers,
            registers[RSP], hit.stack, self._depth)

    # -- taking out ---------------------------------------------------------

    def remove(self):
        """Take the breakpoints out; what they counted is kept."""
        with self._lock:
            if self._is_removed:
                return
            self._disable(self._events)
            self._is_last = True
            self._read()
            self._is_removed = True
        if self._reader is not None:
            self._reader.join()         # it polls what is closed now
        self._close()

    def drop(self, site):
        """Take one site out: the library that it was in is gone."""
        with self._lock:
            if self._is_removed or site not in self.sites:
                return
            fds = [fd for fd, each in self._events.items()
                   if self.registers[each][0] == site]
            self._disable(fds)
            self._read()
            for fd in fds:
                os.close(fd)
                del self._events[fd]
            self.sites.remove(site)

    def _disable(self, fds):
        for fd in fds:
            ioctl(fd, PERF_EVENT_IOC_DISABLE, 0)

    @property
    def taken(self):
        """The Sites of the registers that are in use."""
        return [register for register, (site, _) in self.registers.items()
                if site in self.sites]

    def _close_events(self):
        for fd in self._events:
            os.close(fd)
        self._events, self._ids = {}, {}

    def _close(self):
        self._close_events()
        for ring in self._rings.values():
            ring.close()
        self._rings = {}


class PtracePart(HardwarePart):
    """The same, with debug registers that ptrace sets: by name only.

    The guardian stops at each hit, and tells of it. What it sets is still
    there when it is killed, and then the next hit kills the target.
    """

    name = "hw-ptrace"

    def __init__(self, *args, fetch, **options):
        super().__init__(*args, **options)
        self._fetch, self.fed = fetch, collections.deque()
        self._n_counted = dict.fromkeys(self.registers, 0)
        self._after = {}            # {(time, tid): bytes, just after a hit}

    def watches(self):
        """{what Guard.do_arm is asked for: Site of the register}"""
        size = self._stack_size if self._is_sampled else -1
        return {(register.vaddr,) + (
            (register.function.kind, register.function.size)
            if is_watch(register) else ("x", 1)) + (size,): register
            for register in self.taken}

    def arm(self, in_pause):
        """Begin to read: it is the guardian that arms."""
        for site in self.sites if self._wants_values else ():
            try:
                data = read_memory(self.tracer.vm_tid(), site.vaddr,
                                   site.function.size)
                self._last[site, self.tracer.tgid] = int.from_bytes(
                    data, "little")
            except OSError:
                continue
        self._reader = threading.Thread(target=self._keep_reading,
                                        daemon=True, name="ubp-hw-%d"
                                        % self.tracer.tgid)
        self._reader.start()

    def feed(self, hits, counts):
        """Take from what the guardian tells what is of these registers."""
        wanted = self.watches()
        for watch, n in counts.items():
            if watch in wanted:
                self._n_counted[wanted[watch]] += n
        for watch, data, hit in hits:
            if watch in wanted:
                self.fed.append((Trap(*hit), wanted[watch], data))

    def _take_hits(self):
        self._fetch()
        hits = []
        while self.fed:
            hit, register, data = self.fed.popleft()
            self._after[hit.time, hit.tid] = data
            hits.append((hit.time, len(hits), hit, register))
        return hits

    def _values_of(self, site, hit, n_seen):
        data = self._after.pop((hit.time, hit.tid), b"")
        key = site, hit.pid
        more = {"old": self._last.get(key)}
        if data:
            more["new"] = int.from_bytes(data, "little")
        self._last[key] = more.get("new")
        return {name: value for name, value in more.items()
                if value is not None}

    def _read(self):
        self._drain()
        self._after.clear()
        n_seen = {site: tally.n_seen for site, tally in self.tallies.items()}
        counts = dict.fromkeys(self.tallies, 0)
        for register, n in self._n_counted.items():
            site, is_entry = self.registers[register]
            if not is_entry:
                counts[site] += n
        for site, tally in self.tallies.items():
            if self._is_sampled:
                self._lost[site] = max(0, counts[site] - n_seen[site])
            else:
                tally.n_recorded = counts[site]
                tally.found = {(): counts[site]}


def _stack_bytes(tallies):
    """How much of the stack's top a sample must hold for expressions."""
    for tally in tallies:
        if tally.spec.stack_size:
            return min(tally.spec.stack_size + 7 & ~7, _MAX_STACK_SAMPLE)
    if any(ubp_x86.stack_inputs(ubp_x86.REGS_32BIT, tally.names)
           or any(e.reads_memory for e in tally.used) for tally in tallies):
        return 128
    return 0


def _reader_of(hit):
    """read(vaddr, size) as it was at a hit where the sample tells, else as
    it is by now."""
    low = ubp_x86.stack_pointer(hit.regs) if hit.regs else 0

    def read(vaddr, size):
        at = vaddr - low
        if 0 <= at <= at + size <= len(hit.stack):
            return hit.stack[at:at + size]
        try:
            return read_memory(hit.pid, vaddr, size)
        except ProcessLookupError:
            return read_memory(hit.tid, vaddr, size)
    return read


def no_register_left(where, taken, wanted, error=None):
    """The ProbeError for a breakpoint more than there are registers.

    taken    the sites of this ubp that have one;   wanted   those that lack
    error    what the kernel said, if it was asked
    """
    names = [site_name(site) for site in list(taken) + list(wanted)]
    if error is None:
        why = "hw: a thread has %d debug registers, and %s" % (
            N_DEBUG_REGISTERS, "all are taken: by " if len(taken) ==
            N_DEBUG_REGISTERS else "%d are wanted: the first %d by " % (
                len(names), N_DEBUG_REGISTERS))
        why += ", ".join(names[:N_DEBUG_REGISTERS])
    else:
        why = "perf_event_open: %s: of %d debug registers ubp has %d%s" % (
            errno.errorcode.get(error.errno, error), N_DEBUG_REGISTERS,
            len(taken), ", others the rest: a debugger, perf, or an "
            "hw-ptrace that was there (threads keep those until they end)")
    return ProbeError("probe", _where_text(where), why, "remove one, or use "
                      "--strategy jump, which has no such limit")


def _where_text(where):
    """What a user asked to be probed, in a line."""
    return where if isinstance(where, str) else ", ".join(where)


# -- int3: the guardian -------------------------------------------------------
#
# A thread that meets an int3 stops, and only its tracer can send it on: to
# the trampoline of the site, the one that a jump would have led to. So a hit
# is one stop, no byte is put back for it, and any number of threads may be
# there at once. If nobody traces, the int3 kills. So one small process per
# target, the guardian, traces it. It is told what to do through a socket,
# and when that closes (the front end ended, was killed, became another
# program), it puts the text back first, and then lets go.
#
#     front end                       guardian
#     trampolines, journal            -
#     "arm" records          ------>  seizes all threads, writes int3
#     results (shared memory)         rip = trampoline, at each hit
#     "rest"                 ------>  writes the text back, lets go
#     takes the arenas out            -
#
# At an int3 that meets SIGTRAP blocked the kernel unblocks it and drops its
# handler, and tells nobody what there was (force_sig_info). So the guardian
# knows beforehand, and puts that back. What can change it, and where it is
# seen before the next instruction of the program:
#
#     rt_sigprocmask, rt_sigaction    int3s of our own at these syscalls of
#                                     the C library (SignalCount); a thread
#                                     that may block SIGTRAP goes on from
#                                     syscall to syscall, until it does not
#     a handler begins                an interrupt stops it there, if that
#                                     may block SIGTRAP, or its thread does
#     a handler ends                  its rt_sigreturn is a syscall
#     clone, fork                     the new one's first stop
#
# The handler is the process's: while one thread is without it, no other may
# get a SIGTRAP, or ask for it. Those that could lose it are held meanwhile.

_SI_KERNEL = 0x80               # si_code of an int3, <asm-generic/siginfo.h>
_TRAP_HWBKPT = 4                # and of a debug register
_MAX_WATCH_BYTES = 32 << 20     # of hits that wait for the front end
_TRAP_BIT = 1 << signal.SIGTRAP - 1
_SIGACTION_SIZE = 32            # struct kernel_sigaction, <asm/signal.h>:
#                                 handler, flags, restorer, mask, 8 each
_IGNORE = struct.pack("<Q", signal.SIG_IGN)     # the first of these
_SA_RESETHAND, _SI_TKILL = 0x80000000, -6   # <asm-generic/siginfo.h>
# Who blocks all of these has blocked everything: SIGTRAP too, which the
# kernel unblocks when it must deliver that of an int3 (force_sig_info).
_FULL_MASK = sum(1 << signo - 1 for signo in (
    signal.SIGQUIT, signal.SIGILL, signal.SIGABRT, signal.SIGSYS))
_OWN_SIGNALS = 3 << 32 - 1      # the C library's own: 32 and 33
_PIN_EACH = 64                  # hits, after which the guardian follows its
#                                 tracee to another processor
_TERMINATE, _ASIDE = ("terminate",), ("aside",)     # what a SIGTERM and a
#                                 STEP_ASIDE ask of a guardian
_ACTION_EACH_S = 0.1            # looks at what programs do about SIGTRAP,
_MASKS_EACH = 50                # and at whether so many threads block it
_IGNORES_SIGTRAP = 3            # exit status of a guardian
_MOST_ASKS = 500                # a second, for signals' masks and actions,
#                                 where none of them is about SIGTRAP
_HOLD_S, _STARVED_S = 0.05, 1   # for one that is interrupted to stop; for
#                                 one that gets no processor
_ASKS = {ubp_x86.RT_SIGPROCMASK: 8, ubp_x86.RT_SIGACTION: _SIGACTION_SIZE}
_STOPPING = {signal.SIGKILL, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN,
             signal.SIGTTOU, signal.SIGCONT}
_ASIDE_S = 0.1                  # in which who asked comes
_LAST_RESORT_S = 3600           # for putting the text back when orphaned
_MOST_WAITING = 4               # programs that wait for the front end at
#                                 their entry points; others, in their execs,
_QUEUE_S = 30                   # for so long, while it serves any
_MOST_UNTOLD = 1000             # execs that the front end has not read of


_SYNCHRONOUS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL,
                signal.SIGTRAP}     # what an instruction itself raises
_SI_ADDR = 16                   # siginfo_t.si_addr, <asm-generic/siginfo.h>


class TrapSite:
    """An int3 that the guardian answers for: at a site, or in the copy of
    what only the tracer can do, insn then.

    copy     [low, high) of what runs instead of a syscall instruction
    most     hits a second; who has more is taken out
    is_own   it is there only to tell of SIGTRAP
    """
    __slots__ = ("goal", "size", "insn", "copy", "most", "is_own", "n_hits",
                 "n_before", "since")

    def __init__(self, goal, size, insn=None, copy=(), most=float("inf"),
                 is_own=False):
        self.goal, self.size, self.insn = goal, size, insn
        self.copy, self.most, self.is_own = copy, most, is_own
        self.n_hits = self.n_before = 0     # in all; at the start of
        self.since = time.monotonic()       # this second, which is that


class Keeper(Tracer):
    """A Tracer whose threads stay traced and run on between its pauses.

    sites   {vaddr: TrapSite}, shared by a target and the processes that it
            forks
    """

    options = (PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEFORK
               | PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE
               | PTRACE_O_TRACEEXEC)

    def __init__(self, tgid, ward):
        super().__init__(tgid)
        self.ward, self.sites = ward, ward.sites
        self.is_leaving, self.is_new = False, False
        self.blocked = set()        # tids that block SIGTRAP
        self.wary = set()           # that will, or may, from a syscall on
        self.spared = set()         # that block all but SIGTRAP, or will
        self.asked = {}             # {tid that is to ask for the action of
        #                             SIGTRAP, or set it: (the copy of its
        #                             syscall, action or None)}
        self.masking = {}           # {signal: does its handler block SIGTRAP?
        #                             what is not in it, may}
        self.entering = {}          # {tid: signal} that is to stop where the
        #                             handler of that begins
        self.queued = {}            # {tid: siginfo of its pending SIGTRAP, if
        #                             it is to be told as another}
        self.backlog = collections.deque()  # (Thread, status), stopped
        self._n_looked = 0          # threads whose masks were looked at,
        self._in_vain = set()       # and masks of no more than one syscall
        self.equipped = {}          # {tid: watches in its debug registers}
        self.action = b""           # of SIGTRAP, if there is a handler
        self.theirs = {}            # {tid: the same} of children of vfork
        self.is_ignored = False     # SIGTRAP, as soon as the int3s are out
        self._info = ctypes.create_string_buffer(128)
        self._mask = ctypes.create_string_buffer(8)

    # -- one stop -----------------------------------------------------------

    def trap(self, tid):
        """A SIGTRAP has stopped a thread. -> what it goes on with, or None

        None: it is not of an int3 of ours, and the program's own.
        """
        regs = self.get_regs(tid)
        site = self.sites.get(ubp_x86.program_counter(regs) - 1)
        if site is None and tid not in self.equipped:
            return None
        ptrace(PTRACE_GETSIGINFO, tid, 0, ctypes.addressof(self._info))
        is_own = self._is_of_kernel(tid)
        is_watch_hit = self._note_watch(tid, regs)
        if site is None and not is_watch_hit:
            return None
        ptrace(PTRACE_GETSIGMASK, tid, 8, ctypes.addressof(self._mask))
        mask = int.from_bytes(self._mask.raw, "little")
        was_reset = self._was_reset(tid)
        was_blocked = (self._blocked_it(tid, mask)
                       or was_reset and len(self.threads) == 1)
        if not (is_own or was_blocked or is_watch_hit) and site.size == 1:
            return None         # it is at site + 1, and a SIGTRAP was sent
        if was_blocked:
            self._mask.raw = (mask | _TRAP_BIT).to_bytes(8, "little")
            ptrace(PTRACE_SETSIGMASK, tid, 8, ctypes.addressof(self._mask))
        if is_watch_hit:
            self.ward.n_hits += 1
        elif site.insn is not None:
            self._emulate(tid, regs, site)
        else:
            ptrace(PTRACE_POKEUSER, tid, ubp_x86.PROGRAM_COUNTER_OFFSET,
                   site.goal)
            site.n_hits += 1
            self.ward.n_hits += 1
            if site.copy and self._note_ask(tid, regs, site):
                was_reset = self._was_reset(tid)
            if site.n_hits - site.n_before > site.most:
                self.ward.note_rate(regs, site)
        if was_reset:
            self._mend(tid, b"" if is_own else self._info.raw)
            return 0
        # Of signals of one number that wait only the first is kept: this
        # one was blocked, and is queued again.
        return 0 if is_own else signal.SIGTRAP

    def _is_of_kernel(self, tid):
        """Is the SIGTRAP in _info that of an int3, or of a register of ours?
        A program may queue itself one that says so, but with more in it."""
        code, = struct.unpack_from("<i", self._info, 8)
        return (code == _SI_KERNEL and not any(self._info[4:8])
                and not any(self._info[12:32])
                or code == _TRAP_HWBKPT and tid in self.equipped)

    def _blocked_it(self, tid, mask):
        """Did a thread block SIGTRAP? The kernel has taken it from mask.

        Who blocks everything did, but who has said otherwise. The C library
        blocks more, for a moment, than it lets a program block.
        """
        return tid in self.blocked or mask & _FULL_MASK == _FULL_MASK and (
            tid not in self.spared or mask & _OWN_SIGNALS == _OWN_SIGNALS)

    def _action_of(self, tid):
        """What is to be done about SIGTRAP. A child of vfork has actions of
        its own, at first the same ones."""
        return (self.action if self.threads[tid].tgid == self.tgid
                else self.theirs.setdefault(tid, self.action))

    def _was_reset(self, tid):
        """Has an int3 taken the program's handler of SIGTRAP from it?"""
        action = self._action_of(tid)
        return bool(action) and not self._is_said(
            tid, rb"SigIgn" if action[:8] == _IGNORE else rb"SigCgt")

    def _note_ask(self, tid, regs, site):
        """A thread is about to say what is to become of signals, perhaps.

        It goes on from syscall to syscall until its mask is what it asks
        for. -> is it about the action of SIGTRAP? Then no other changes
        that meanwhile.
        """
        number, (first, vaddr, _) = ubp_x86.asked(regs)
        if number not in _ASKS and site.is_own:
            site.most = _MOST_ASKS      # it is for any syscall
        if number not in _ASKS or not (vaddr or first == signal.SIGTRAP):
            return False
        try:
            data = vaddr and read_memory(tid, vaddr, _ASKS[number])
        except OSError:
            return False            # so it will not succeed
        if number == ubp_x86.RT_SIGPROCMASK:
            mask = int.from_bytes(data or b"", "little")
            if mask & (_FULL_MASK | _TRAP_BIT) == _FULL_MASK:
                self.spared.add(tid)
            if mask & _TRAP_BIT and mask & _FULL_MASK != _FULL_MASK:
                self._need(site)
            if (mask & _TRAP_BIT and first != signal.SIG_UNBLOCK
                    and tid not in self.blocked):
                self.wary.add(tid)
            return False
        is_own = self.threads[tid].tgid == self.tgid
        if vaddr and is_own:
            self.masking.pop(first, None)   # learned again, from its start
        if first != signal.SIGTRAP:
            return False
        self._need(site)
        if not is_own:
            if vaddr:
                self.theirs[tid] = data if any(data[:8]) else b""
            return False
        if vaddr and data[:8] == _IGNORE:
            # They would end it that SIGTRAP is ignored: it runs into this
            # one until all are out.
            ptrace(PTRACE_POKEUSER, tid, ubp_x86.PROGRAM_COUNTER_OFFSET,
                   ubp_x86.program_counter(regs) - 1)
            self.is_ignored = True
        else:
            self._hold((self.blocked | self.wary) - {tid})
            self.asked[tid] = site.copy, data or None
        return True

    @staticmethod
    def _need(site):
        """A site has told of SIGTRAP: it stays, as long as no other syscalls
        come that way, too many before the next such."""
        site.most, site.n_before = float("inf"), site.n_hits
        site.since = time.monotonic()

    def _note_syscall(self, tid):
        """A thread that is watched has begun, or ended, a syscall."""
        self._look_at_mask(tid)
        if tid in self.asked:
            (low, high), action = self.asked[tid]
            regs = self.get_regs(tid)
            result = ubp_x86.syscall_result(regs)
            if low < ubp_x86.program_counter(regs) <= high and (
                    result != -errno.ENOSYS):
                del self.asked[tid]
                if not result and action:
                    is_default = not int.from_bytes(action[:8], "little")
                    self.action = b"" if is_default else action

    def _await_asked(self, tid):
        """A thread asks for the action of SIGTRAP, or sets it: wait until it
        has. Those that could change it are held, and looked at after it."""
        while tid in self.asked:
            status = self._next_stop(tid)
            if status is None:
                return
            if status >> 8 != SYSCALL_EVENT_SIGNAL:
                self.backlog.append((self.threads[tid], status))
                return
            self._note_syscall(tid)
            self._go(tid)

    def _note_watch(self, tid, regs):
        """Has a debug register of ours stopped a thread?"""
        if tid not in self.equipped:
            return False
        status = ptrace(PTRACE_PEEKUSER, tid, ubp_x86.DEBUG_STATUS)
        ptrace(PTRACE_POKEUSER, tid, ubp_x86.DEBUG_STATUS, 0)
        hits = [watch for n, watch in enumerate(self.ward.watches)
                if status >> n & 1]
        for watch in hits:
            self.ward.note_hit(self, tid, regs, watch)
        return bool(hits)

    def _equip(self, tid, watches):
        """Give a stopped thread debug registers, or take them from it."""
        try:
            # Cleared first: the kernel checks each word as it is written.
            ptrace(PTRACE_POKEUSER, tid, ubp_x86.DEBUG_CONTROL, 0)
            for n, watch in enumerate(watches):
                ptrace(PTRACE_POKEUSER, tid, ubp_x86.DEBUG_OFFSET + 8 * n,
                       watch[0])
            ptrace(PTRACE_POKEUSER, tid, ubp_x86.DEBUG_CONTROL,
                   ubp_x86.debug_control([each[:3] for each in watches]))
            self.equipped[tid] = watches
            if not watches:
                del self.equipped[tid]
        except OSError as error:
            if error.errno != errno.ESRCH:
                self.ward.lacking = error

    def _emulate(self, tid, regs, site):
        """Do what an instruction does that no copy of it could. Where it
        would fault, it runs, behind its int3, to do that itself."""
        try:
            regs, vaddr, data = ubp_x86.emulate(
                site.insn, regs, lambda *what: read_memory(tid, *what))
            write_memory(tid, vaddr, data)
            self.set_regs(tid, regs)
        except OSError:
            ptrace(PTRACE_POKEUSER, tid, ubp_x86.PROGRAM_COUNTER_OFFSET,
                   site.goal)

    def _bring_home(self, tid, signo):
        """A copy has raised a signal that tells where: at the original.

        The program's handler may look at it, and go on from there.
        """
        if signo not in _SYNCHRONOUS:
            return
        regs = self.get_regs(tid)
        home = self.ward.home_of(regs)
        ptrace(PTRACE_GETSIGINFO, tid, 0, ctypes.addressof(self._info))
        if home is None or struct.unpack_from("<i", self._info, 8)[0] <= 0:
            return                  # it was sent: kill(2)
        where, = struct.unpack_from("<Q", self._info, _SI_ADDR)
        if where == ubp_x86.program_counter(regs):
            struct.pack_into("<Q", self._info, _SI_ADDR,
                             ubp_x86.program_counter(home))
            ptrace(PTRACE_SETSIGINFO, tid, 0, ctypes.addressof(self._info))
        self.set_regs(tid, home)

    def _is_said(self, tid, what):
        """Is SIGTRAP among the process's SigCgt, or its SigIgn? proc(5)"""
        mask = re.search(rb"^%b:\s*([0-9a-f]+)" % what,
                         read_proc("/proc/%d/status" % tid), re.M)
        return mask is None or int(mask.group(1), 16) & _TRAP_BIT

    def _mend(self, tid, siginfo):
        """An int3 met SIGTRAP blocked: the kernel has taken its handler.

        siginfo   of a SIGTRAP that was pending, to be so again
        """
        thread = self.threads[tid]
        state, thread.state = thread.state, STOPPED
        thread.regs = self.get_regs(tid)
        others = [t for t in self.threads.values()
                  if t.state == STOPPED and t is not thread]
        for other in others:            # it is this one that injects
            other.state = INTERRUPTED
        try:
            if not self.maps:           # it was forked, and never paused
                self.maps = read_maps(self.vm_tid())
            action = self._action_of(tid)
            with Mending(self, action + siginfo) as injection:
                injection.call(SYS_rt_sigaction, signal.SIGTRAP,
                               injection.text_vaddr, 0, 8)
                if siginfo and injection.call(
                        SYS_rt_tgsigqueueinfo, thread.tgid, tid,
                        signal.SIGTRAP,
                        injection.text_vaddr + len(action)):
                    # One that kill or tgkill has sent, in a thread: EPERM.
                    injection.call(SYS_tgkill, thread.tgid, tid,
                                   signal.SIGTRAP)
                    self.queued.setdefault(tid, siginfo)
        except (Again, UbpError) as error:
            log.warning("pid %d has lost its handler of SIGTRAP: %s",
                        self.tgid, error)
        finally:
            thread.state = state
            for other in others:
                other.state = STOPPED

    def _deliver(self, thread):
        """Have a thread run the program's handler of SIGTRAP.

        Until it is there, no other may run into an int3 with SIGTRAP
        blocked: the kernel would find no handler, and end the program.
        """
        tid = thread.tid
        ptrace(PTRACE_GETSIGINFO, tid, 0, ctypes.addressof(self._info))
        info, put_off = self._info.raw, self.queued.pop(tid, None)
        if put_off and struct.unpack_from("<i", info, 8)[0] == _SI_TKILL:
            info = put_off
        self._hold((self.blocked | self.wary) - {tid})
        if self._was_reset(tid):
            self._mend(tid, info)
            self._resume(tid, PTRACE_CONT)
            status = self._next_stop(tid)
            if status is None or status >> 8 != signal.SIGTRAP:
                self.backlog += [(thread, status)] if status is not None \
                    else []
                return
            self.queued.pop(tid, None)
        self._info.raw = info
        ptrace(PTRACE_SETSIGINFO, tid, 0, ctypes.addressof(self._info))
        self.masking[signal.SIGTRAP] = True     # stop it there
        if int.from_bytes(self.action[8:16], "little") & _SA_RESETHAND:
            self.action = b""
        self._go(tid, signal.SIGTRAP)
        status = self._next_stop(tid)
        if status is not None:
            self.backlog.append((thread, status))

    def _is_handled(self, tid):
        """Is the SIGTRAP that has stopped a thread for the program's handler?

        An int3 of its own ends it while it blocks SIGTRAP: that is past.
        """
        if not self.action or self.threads[tid].tgid != self.tgid:
            return False
        ptrace(PTRACE_GETSIGINFO, tid, 0, ctypes.addressof(self._info))
        ptrace(PTRACE_GETSIGMASK, tid, 8, ctypes.addressof(self._mask))
        was_sent = struct.unpack_from("<i", self._info, 8)[0] <= 0
        return was_sent or not self._blocked_it(tid, int.from_bytes(
            self._mask.raw, "little"))

    def _hold(self, tids):
        """Stop threads, but those that are already; what has stopped them
        is looked at later."""
        for thread in [t for t in self.threads.values() if t.tid in tids
                       and t.state in (RUNNING, INTERRUPTED)
                       and not self._is_held(t)]:
            self._resume(thread.tid, PTRACE_INTERRUPT)
            status = self._next_stop(thread.tid)
            if status is not None:
                self.backlog.append((thread, status))

    def _is_held(self, thread):
        """Has it stopped, and is that still to be looked at?"""
        return any(thread is other for other, _ in self.backlog)

    def _next_stop(self, tid):
        """The wait status of a thread that is about to stop, or None."""
        begin, polls, took = time.monotonic(), 0, 0.0
        self.waiter.restart()
        while took < _HOLD_S or (took < _STARVED_S
                                 and read_stat(tid)[:1] == ["R"]):
            polls += 1
            status = self.status_of(tid, polls % 8 == 0)
            if status is not None:
                return status
            self.waiter.sleep()
            took = time.monotonic() - begin
        return self.status_of(tid, True)

    def learn_action(self, timeout):
        """What the program does about SIGTRAP: to be kept as it is."""
        status = read_status(self.vm_tid())
        if int(status.get("SigIgn", "0"), 16) & _TRAP_BIT:
            raise ProbeError("set an int3 in", self.name(), "it ignores "
                             "SIGTRAP, and the kernel would end that at the "
                             "first int3", "--strategy jump or hw")
        if not int(status.get("SigCgt", "0"), 16) & _TRAP_BIT:
            return

        def action():
            with Injection(self, bytes(_SIGACTION_SIZE)) as injection:
                result = injection.call(SYS_rt_sigaction, signal.SIGTRAP, 0,
                                        injection.text_vaddr, 8)
                if result:
                    raise ProbeError("ask for the handler of SIGTRAP in",
                                     self.name(), os.strerror(-result))
                return read_memory(injection.tid, injection.text_vaddr,
                                   _SIGACTION_SIZE)
        self.action = self.pause(action, timeout, "ask for a handler")

    def _go(self, tid, signo=0, may_mask=True):
        """Let a thread run; one that blocks SIGTRAP, or is about to, from
        syscall to syscall: only there, and where a handler begins, that
        can change.

        may_mask   the handler of signo may have, or lack, SIGTRAP blocked
        """
        is_watched = self.sites and (tid in self.blocked or tid in self.wary
                                     or tid in self.asked)
        if (signo and self.sites and may_mask and signo not in _STOPPING
                and (tid in self.blocked or self.masking.get(signo, True))):
            self.entering[tid] = signo      # it stops where that begins
            self._resume(tid, PTRACE_INTERRUPT)
        self._resume(tid, PTRACE_SYSCALL if is_watched else PTRACE_CONT,
                     signo)

    def _look_at_mask(self, tid):
        """Does a thread block SIGTRAP? Not to be asked after an int3."""
        try:
            ptrace(PTRACE_GETSIGMASK, tid, 8, ctypes.addressof(self._mask))
        except OSError:
            return
        mask = int.from_bytes(self._mask.raw, "little")
        if mask & _TRAP_BIT:
            self.blocked.add(tid)
            self.wary.discard(tid)
            self.spared.discard(tid)
        else:
            self.blocked.discard(tid)
            if mask & _FULL_MASK == _FULL_MASK:
                self.spared.add(tid)

    def _look_at_handler(self, tid):
        """A thread has stopped, perhaps where a signal's handler begins."""
        was_blocked, signo = tid in self.blocked, self.entering.pop(tid, 0)
        if was_blocked:             # when the handler ends it may be again
            self.wary.add(tid)
        self._look_at_mask(tid)
        if signo and not was_blocked:
            self.masking[signo] = tid in self.blocked

    def _look_at_frames(self, thread):
        """Is a thread in a handler that returns to where SIGTRAP is blocked?
        It is to be seen there."""
        tid = thread.tid
        self.wary.discard(tid)      # an attempt may have failed since
        try:
            frames = self.signal_frames(thread)
        except (Again, OSError, UbpError):
            return                  # its stack cannot be read
        for vaddr, _ in frames:
            mask = int.from_bytes(_peek(
                tid, vaddr + ubp_x86.SIGNAL_MASK_PAST_RIP, 8), "little")
            if mask & _TRAP_BIT and tid not in self.blocked:
                self.wary.add(tid)

    def look_at_masks(self, most):
        """Has a thread begun to block SIGTRAP? It is to go on from syscall
        to syscall then. Some threads each time. Raises UbpError.

        One that blocks everything is told by that: see trap().
        """
        tids = sorted(tid for tid, thread in list(self.threads.items())
                      if thread.state == RUNNING and tid not in self.blocked)
        first = self._n_looked % max(1, len(tids))
        self._n_looked += most
        found = set()
        for tid in tids[first:first + most]:
            mask = re.search(rb"^SigBlk:\s*([0-9a-f]+)", read_proc(
                "/proc/%d/status" % tid), re.M)
            mask = int(mask.group(1), 16) if mask else 0
            if mask & _TRAP_BIT and mask & _FULL_MASK != _FULL_MASK:
                found.add((tid, mask))
        if found - self._in_vain:
            self.pause(lambda: None, 1, "look at")
            self._in_vain |= {(tid, mask) for tid, mask in found
                              if tid not in self.blocked}

    def step(self, thread, status):
        """A thread has stopped, or ended, outside of a pause."""
        self.backlog.append((thread, status))
        self._step_all()

    def _step_all(self):
        while self.backlog:         # it is in there meanwhile: _is_held()
            held = self.backlog[0]
            try:
                self._step(*held)
            finally:
                if self.backlog and self.backlog[0] is held:
                    self.backlog.popleft()

    def _step(self, thread, status):
        tid, event, signo = thread.tid, status >> 16, status >> 8 & 0xff
        if thread.state != RUNNING:
            if self._take_status(thread, status) and tid in self.threads:
                self._let_go(thread)
        elif status & 0xff != 0x7f:
            self.lose(tid)
        elif event == PTRACE_EVENT_STOP:
            self._note_stop(thread, signo)
        elif event:
            self.note_event(thread, event)
            if tid in self.threads:
                self._go(tid)
        elif signo == SYSCALL_EVENT_SIGNAL:
            self._note_syscall(tid)
            self._go(tid)
        else:
            try:
                answer = self.trap(tid) if signo == signal.SIGTRAP else None
                may_mask = answer is None
                if may_mask:
                    self._bring_home(tid, signo)
                    if ubp_x86.has_own_mask(self._repaired(thread)):
                        self.masking.pop(signo, None)
                    answer = signo
                    if signo == signal.SIGTRAP and self._is_handled(tid):
                        self._deliver(thread)
                        return
            except OSError:
                self.lose(tid)
                return
            self._go(tid, answer, may_mask)
            self._await_asked(tid)

    def _note_stop(self, thread, signo):
        """An interrupt, or a group stop, has stopped a thread."""
        try:
            if self._has_trapped(thread.tid):
                self._go(thread.tid)
                return
            thread.group_stop = signo != signal.SIGTRAP
            self._look_at_handler(thread.tid)
            if not thread.group_stop:
                self._repaired(thread)
        except OSError:
            self.lose(thread.tid)
            return
        self._free(thread)

    def note_event(self, thread, event):
        """A thread or process was created, or became another program."""
        message = ctypes.c_ulong()
        try:
            ptrace(PTRACE_GETEVENTMSG, thread.tid, 0,
                   ctypes.addressof(message))
        except OSError:
            self.lose(thread.tid)
            return
        if event == PTRACE_EVENT_EXEC:
            self._note_exec(thread)
            return
        new = message.value
        if new in self.ward.guard.early:
            # It has run since, and may have become another program.
            self.ward.guard.early.discard(new)
            self.ward.guard.move(new, self.ward)
            return
        status = read_status(new)
        tgid = int(status.get("Tgid", new))
        if tgid == thread.tgid or event != PTRACE_EVENT_FORK and is_same_mm(
                thread.tid, new) is not False:
            self.threads.setdefault(new, Thread(new, tgid))
        else:
            child = self.ward.adopt(new, self)
            child.wary |= {new} if thread.tid in self.wary else set()

    def _note_exec(self, thread):
        """Its text is gone, and our int3s with it: let go, or follow.

        One that vforked before had the text of its parent until now.
        """
        for other in [t for t in self.threads.values()
                      if t.tgid == thread.tgid]:
            self.theirs.pop(other.tid, None)
            self.threads.pop(other.tid, None)
        if self.ward.follows:
            self.ward.guard.meet(thread.tgid)
        else:
            self._resume(thread.tid, PTRACE_DETACH)
        if thread.tgid == self.tgid:
            self.is_past = True
            self.ward.forget(self)

    # -- in a pause ---------------------------------------------------------

    def _take_status(self, thread, status):
        tid, event, signo = thread.tid, status >> 16, status >> 8 & 0xff
        if status & 0xff != 0x7f or thread.state == FINISHING:
            return super()._take_status(thread, status)
        answer = None
        try:
            if not event and signo == signal.SIGTRAP:
                answer = self.trap(tid)
                if answer is None:
                    self._bring_home(tid, signo)
                    if self._is_handled(tid):
                        self._repaired(thread)
                        self._deliver(thread)
                        if not self._is_held(thread):
                            self._ask_again(thread)
                        return False
            elif not event and signo == SYSCALL_EVENT_SIGNAL:
                self._note_syscall(tid)
                answer = 0
            elif event == PTRACE_EVENT_STOP and self._has_trapped(tid):
                # Asked again before it goes on it would stop here again,
                # and never for that SIGTRAP, which is its next stop.
                thread.is_wanted = False
                self._go(tid)
                return False
            elif not event:
                self._bring_home(tid, signo)
            elif event != PTRACE_EVENT_STOP:
                self.note_event(thread, event)
                if tid not in self.threads:
                    return True
                answer = 0
        except OSError:
            self.lose(tid)
            return True
        if answer is None:
            done = super()._take_status(thread, status)
            if done and thread.state == STOPPED:
                self._look_at_handler(tid)
            return done
        self._ask_again(thread)
        self._go(tid, answer)
        return False

    def _has_stopped(self, thread):
        """What _hold() has taken is to be looked at, too."""
        for held in self.backlog:
            if held[0] is thread:
                self.backlog.remove(held)
                return self._take_status(*held)
        return super()._has_stopped(thread)

    def _has_trapped(self, tid):
        """Has it run an int3 of ours, whose SIGTRAP is still to come?

        A stop that was asked for is reported before any signal is. One that
        is blocked is none of ours.
        """
        if (ubp_x86.program_counter(self.get_regs(tid)) - 1
                not in self.sites and not (tid in self.equipped and ptrace(
                    PTRACE_PEEKUSER, tid, ubp_x86.DEBUG_STATUS) & 15)):
            return False
        status = read_status(tid)
        pending, blocked = (int(status.get(name, "0"), 16) & _TRAP_BIT
                            for name in ("SigPnd", "SigBlk"))
        return bool(pending and not blocked)

    def _release(self):
        stopped = sorted([t for t in self.threads.values()
                          if t.state == STOPPED], key=_is_idle)
        for thread in stopped if self.is_new else ():
            self._look_at_frames(thread)
        for thread in stopped:
            self._let_go(thread)
        self._step_all()
        self._close_memory()

    def _free(self, thread):
        """Let it run, traced; for good only when the text is back."""
        watches = () if self.is_leaving else self.ward.watches
        if self.equipped.get(thread.tid, ()) != watches:
            self._equip(thread.tid, watches)
        if self.is_leaving:
            super()._free(thread)
            return
        thread.state, thread.is_wanted = RUNNING, False
        thread.is_complete = thread.is_last = False
        if thread.group_stop:
            self._resume(thread.tid, PTRACE_LISTEN)
        else:
            self._go(thread.tid)

    def lose(self, tid):
        self.blocked.discard(tid)
        self.wary.discard(tid)
        self.spared.discard(tid)
        self.asked.pop(tid, None)
        self.theirs.pop(tid, None)
        self.queued.pop(tid, None)
        self.entering.pop(tid, None)
        self.equipped.pop(tid, None)
        super().lose(tid)

    def _await_transfers(self, tids, limit):
        """Wait a little until none of our threads is in a transfer."""
        super()._await_transfers(tids, limit)
        soon = min(limit, time.monotonic() + _TRANSFER_WAIT_S)
        while time.monotonic() < soon and any(
                t.state == RUNNING and _is_blocking(t.tgid, t.tid)
                for t in list(self.threads.values())):
            self.run(0.002)

    def run(self, seconds):
        """Go on with stops for a while. Takes those of this process only."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            for thread in list(self.threads.values()):
                try:
                    status = wait_nohang(thread.tid)
                except ChildProcessError:
                    status = 0          # it has ended, and was reaped
                if status is not None:
                    self.step(thread, status)
            time.sleep(0.0002)

    def leave(self, timeout):
        """Let go of every thread. The text is back.

        One whose transfer our stop cut short is let go when the rest of it
        is done, or, late, with a count that is short but true; one in vfork
        when its child lets it, which may take any time.
        """
        self.is_leaving = True
        limit = time.monotonic() + timeout
        soon = min(limit, time.monotonic() + _VFORK_WAIT_S)
        try:
            self.pause(lambda: None, timeout, "let go")
        except TraceeGone:
            log.debug("pid %d has ended", self.tgid)
        self._run_until(lambda: not self.threads, soon)
        self._run_until(self._has_left, limit)
        self.cut_transfers()
        self._run_until(self._has_left, time.monotonic() + 1)
        if self.threads:
            self.ward.guard.late.append(self)
        self.close()

    def _has_left(self):
        """Is it let go, but for threads in vfork? What they have in debug
        registers they may not keep."""
        return all(t.state == INTERRUPTED and t.in_vfork
                   and t.tid not in self.equipped
                   for t in self.threads.values())

    def _run_until(self, is_done, limit):
        while not is_done() and time.monotonic() < limit:
            self.run(0.005)


def clear_debug_registers(tracer):
    """Take what a killed guardian has left in them. All are stopped.

    -> of how many threads. Raises Again.
    """
    tids = [tid for tid, thread in tracer.threads.items()
            if thread.state == STOPPED and ptrace(
                PTRACE_PEEKUSER, tid, ubp_x86.DEBUG_CONTROL)]
    if tids and any(t.state != STOPPED for t in tracer.threads.values()):
        raise Again("a thread with debug registers is in vfork")
    for tid in tids:
        ptrace(PTRACE_POKEUSER, tid, ubp_x86.DEBUG_CONTROL, 0)
    return len(tids)


def n_free_registers(tid, vaddr):
    """How many debug registers a thread has left, asked of the kernel.

    vaddr   of anything that is mapped. 0 where perf is forbidden.
    """
    fds = []
    try:
        for _ in range(N_DEBUG_REGISTERS):
            fds.append(perf_event_open(PerfEventAttr(
                type=PERF_TYPE_BREAKPOINT, bp_addr=vaddr & -8, bp_len=8,
                bp_type=HW_BREAKPOINT_W, flags=PERF_EXCLUDE_KERNEL
                | PERF_EXCLUDE_HV | PERF_DISABLED), tid, -1))
    except OSError:
        log.debug("%d of them", len(fds))
    for fd in fds:
        os.close(fd)
    return len(fds)


_CLOCK_BOOTTIME = 7             # <linux/time.h>; time has it since 3.7


def _ticks():
    """Now, as start_time() tells it."""
    return int(time.clock_gettime(_CLOCK_BOOTTIME)
               * os.sysconf("SC_CLK_TCK"))


def _children_since(tgid, ticks):
    """The children of a process that began at ticks, or later. -> [pid]"""
    return [int(word) for tid in thread_ids(tgid) for word in read_proc(
        "/proc/%d/task/%d/children" % (tgid, tid)).split()
        if start_time(int(word)) >= ticks]


class Ward:
    """One program that the guardian answers for, and what it has forked.

    keepers   [Keeper], of each process that runs the program
    is_past   the process with that number runs another one by now; this
              ward is of those that it had forked before
    """

    def __init__(self, guard, tgid):
        self.guard, self.tgid, self.is_past = guard, tgid, False
        self.birth = start_time(tgid)
        self.sites, self.arenas, self.keepers = {}, [], []
        self.scratch = 0            # the end of _SCRATCH bytes for frames
        self._own = frozenset()     # sites that tell of SIGTRAP
        self.n_hits = self.n_pinned = 0
        self.max_rate, self.too_hot, self.cooled = float("inf"), [], []
        self._copies, self._copy_starts = [], []    # (vaddr, size, Insn)
        self._armed = ()            # what do_arm was asked last
        self.follows = False        # do the programs it becomes concern us?
        self._rested = None         # of whom do_rest let go, and when
        self.watches, self.lacking = (), None   # debug registers: do_arm
        self.watched, self.n_watched, self._watch_bytes = [], {}, 0

    def has_ended(self):
        """Is its process not there any more?"""
        return (start_time(self.tgid) != self.birth
                or not read_maps(memory_tid(self.tgid)))

    # -- at stops -----------------------------------------------------------

    def note_rate(self, regs, site):
        """A site had more hits than a second may have: since when?"""
        now, vaddr = time.monotonic(), ubp_x86.program_counter(regs) - 1
        if now - site.since >= 1:
            site.n_before, site.since = site.n_hits, now
        elif vaddr not in self.too_hot:
            self.too_hot.append(vaddr)

    def cool(self):
        """Take out the sites that are hit too often, and what is there for
        their sake when they were the last."""
        while self.too_hot:
            vaddr = self.too_hot.pop()
            found = [arena._replace(records=(record,))
                     for arena in self.arenas for record in arena.records
                     if record.site == vaddr]
            try:
                for keeper in list(self.keepers) if found else ():
                    restore(keeper, found, 2)
            except UbpError as error:       # the next hit asks again
                log.debug("0x%x stays: %s", vaddr, error)
                continue
            if self.sites.pop(vaddr, None) is not None:
                self.cooled.append(vaddr)
            if not any(record.site in self.sites and record.site not in
                       self._own for arena in self.arenas
                       for record in arena.records):
                self.too_hot += [v for v in self._own if v in self.sites]

    @property
    def is_ignored(self):
        """Is there a process that waits for its int3s to go?"""
        return any(keeper.is_ignored for keeper in self.keepers)

    def _let_child_go(self, keeper):
        """It ignores SIGTRAP: take the int3s out of it alone."""
        try:
            restore(keeper, self.arenas, 1)
            keeper.leave(1)
        except UbpError as error:           # the next look tries again
            log.debug("%s", error)
            return
        self.forget(keeper)
        self.guard.tell("note", self.tgid, "its child %d ignores SIGTRAP: "
                        "what that calls is not counted" % keeper.tgid)

    def look_at_actions(self):
        """Has a process changed what it does about SIGTRAP, since? -> does
        the program ignore it now?

        A handler that is new must be known before an int3 meets SIGTRAP
        blocked. Who ignores it would find the default in its place: a child
        alone is let go.
        """
        for keeper in list(self.keepers) if self.sites else ():
            status = read_status(keeper.vm_tid())
            ignores, catches = (int(status.get(name, "0"), 16) & _TRAP_BIT
                                for name in ("SigIgn", "SigCgt"))
            try:
                if (ignores or keeper.is_ignored) and (
                        keeper.tgid != self.tgid):
                    self._let_child_go(keeper)
                elif ignores or keeper.is_ignored:
                    return True
                elif catches and not keeper.action:
                    keeper.learn_action(1)
                else:
                    keeper.look_at_masks(_MASKS_EACH)
            except UbpError as error:       # the next look asks again
                log.debug("%s", error)
        return False

    def adopt(self, tgid, parent=None):
        """A process was forked: its text is a copy, int3s included.

        parent   the Keeper of who forked it, if that is known
        """
        for keeper in self.keepers:
            if keeper.tgid == tgid:
                return keeper
        keeper = Keeper(tgid, self)
        parent = parent or next(iter(self.keepers), keeper)
        keeper.action, keeper.masking = parent.action, dict(parent.masking)
        keeper.threads[tgid] = Thread(tgid, tgid)
        self.keepers.append(keeper)
        return keeper

    def forget(self, keeper):
        """It became another program, or has ended."""
        if keeper in self.keepers:
            self.keepers.remove(keeper)
            keeper.close()

    def keeper_of(self, tgid):
        """The Keeper of a process, or of one that shares its memory."""
        return next((keeper for keeper in self.keepers
                     if keeper.tgid == tgid or any(
                         thread.tgid == tgid
                         for thread in keeper.threads.values())), None)

    def note_hit(self, keeper, tid, regs, watch):
        """Keep what is known of a hit of a debug register, while the thread
        is stopped."""
        self.n_watched[watch] = self.n_watched.get(watch, 0) + 1
        vaddr, kind, size, stack_size = watch
        if stack_size < 0 or self._watch_bytes > _MAX_WATCH_BYTES:
            return
        now = int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1e9)
        stack = _peek(tid, ubp_x86.stack_pointer(regs), stack_size,
                      read_beginning)           # it may end before
        data = _peek(tid, vaddr, size) if kind != "x" else b""
        fields = read_stat(tid)
        self.watched.append((watch, data, (
            now, tid, keeper.threads[tid].tgid
            if tid in keeper.threads else keeper.tgid,
            int(fields[36]) if len(fields) > 36 else 0,
            ubp_x86.program_counter(regs), bytes(regs), stack)))
        self._watch_bytes += 512 + len(stack)

    # -- requests -----------------------------------------------------------

    def do_arm(self, arenas, timeout, max_rate, follows=False, watches=(),
               scratch=0, own=()):
        """Write int3 to the sites of records. -> ([refused], stopped, us)

        arenas     [(base, nonce, inode, [record as a tuple])]
        max_rate   hits a second; who has more is taken out
        follows    tell of what it, and what it forks, becomes by exec
        watches    [(vaddr, "x" or "w" or "rw", size, bytes of the stack that
                   a hit is to hold, or -1 for the number of hits alone)]:
                   debug registers of every thread
        scratch    the end of memory for frames of injections, or 0
        own        the sites that tell of SIGTRAP: max_rate is not for them
        """
        self.max_rate, self.follows = max_rate, follows
        self.watches, self.lacking = tuple(watches), None
        self._armed = (arenas, timeout, max_rate, follows, watches, scratch,
                       own)
        self.scratch, self._own = scratch, frozenset(own)
        self.arenas = [Installed(base, nonce, inode, (), tuple(
            Record(*record) for record in records))
            for base, nonce, inode, records in arenas]
        changes = [Change(record, ()) for arena in self.arenas
                   for record in arena.records]
        keeper = self.guard.keeper(self.tgid, self)
        keeper.is_new = True
        self.keepers = [keeper]
        try:
            self._learn_sites(keeper)
            if arenas or watches:
                keeper.learn_action(timeout)
            # The request may have waited, and others have cleaned up since.
            refused = arm(keeper, self.arenas, changes, timeout)
            keeper.is_new = False
            if self.lacking:
                raise ProbeError(
                    "set debug registers in", keeper.name(), "PTRACE_POKEUSER"
                    ": " + errno.errorcode.get(self.lacking.errno, "?"),
                    "others hold them")
        except BaseException:
            keeper.leave(timeout)
            self.keepers = []
            raise
        for change in refused:
            self.sites.pop(change.record.site, None)
        self.take_up()
        return [change.record.site for change in refused], keeper.pause_us

    def _learn_sites(self, keeper):
        """What to do at each site, and where each copy belongs."""
        self.sites.clear()
        copies = []
        for record in [r for arena in self.arenas for r in arena.records]:
            (_, old, _), copy = record.patches[-1], record.copies[0]
            try:
                insn = ubp_x86.decode(old + keeper.read(
                    record.site + len(old), record.window_size - len(old)),
                    record.site)
            except (OSError, DecodeError):
                continue            # it is gone; that is found, too
            at = record.trampoline + copy.moved
            self.sites[record.site] = TrapSite(
                record.trampoline, insn.size, copy=(
                    at, at + copy.moved_size)
                if insn.flow == ubp_x86.SYSCALL else (),
                most=_MOST_ASKS if record.site in self._own
                else self.max_rate, is_own=record.site in self._own)
            if ubp_x86.needs_emulation(insn):
                self.sites[at] = TrapSite(at + 1, insn.size, insn)
            copies.append((at, copy.moved_size, insn))
        self._copies = sorted(copies, key=operator.itemgetter(0))
        self._copy_starts = [at for at, _, _ in self._copies]

    def home_of(self, regs):
        """The regset of a thread that a copy has stopped, at the original;
        None if it is in no copy."""
        place = bisect.bisect_right(self._copy_starts,
                                    ubp_x86.program_counter(regs)) - 1
        if place < 0:
            return None
        at, size, insn = self._copies[place]
        return ubp_x86.home_of(insn, at, size, regs)

    def do_rest(self, timeout):
        """Put all text back, and let go. -> (stopped, us; processes)"""
        limit, pause_us, n = time.monotonic() + timeout, 0.0, 0
        when, tgids = _ticks(), []
        while self.keepers:
            keeper = self.keepers[0]
            try:
                # A process that it forks meanwhile comes behind it.
                if self.arenas:
                    restore(keeper, self.arenas,
                            max(0.5, limit - time.monotonic()))
            except TraceeGone as error:
                log.debug("%s", error)
            keeper.leave(max(0.5, limit - time.monotonic()))
            pause_us, n = max(pause_us, keeper.pause_us), n + 1
            tgids.append(keeper.tgid)
            self.forget(keeper)
        self.sites.clear()
        if self.follows and tgids:
            self._rested = when, [(tgid, start_time(tgid)) for tgid in tgids]
        return pause_us, n

    def take_up(self):
        """Follow again whom do_rest has let go, and what they have forked
        since; no int3 is written to these."""
        rested, self._rested = self._rested, None
        if rested is None or not self.follows:
            return
        when, todo = rested
        seen = {keeper.tgid for keeper in self.keepers}
        while todo:
            tgid, birth = todo.pop()
            if start_time(tgid) != birth or not birth:
                continue
            if tgid not in seen:
                seen.add(tgid)
                self._seize_again(tgid)
            todo += [(child, start_time(child))
                     for child in _children_since(tgid, when)
                     if child not in seen and not tracer_of(child)]

    def _seize_again(self, tgid):
        """Trace a process that was, or would have been, traced before."""
        if self.keepers and (program_identity(tgid)
                             != program_identity(self.keepers[0].tgid)):
            self.guard.tell("exec", tgid, None, time.monotonic())
            return                  # it has become another meanwhile
        keeper = self.guard.keeper(tgid, self)
        keeper.action = self.keepers[0].action if self.keepers else b""
        try:
            arm(keeper, [], [], 1)
            self.keepers.append(keeper)
        except UbpError as error:
            log.debug("not followed any further: %s", error)
            keeper.close()

    def do_watched(self):
        """What debug registers have hit since. -> ([…], {watch: hits})"""
        found = self.watched, self.n_watched
        self.watched, self.n_watched, self._watch_bytes = [], {}, 0
        return found

    def do_cooled(self):
        """The sites that were taken out since this was last asked."""
        cooled, self.cooled = self.cooled, []
        return cooled

    def rearm(self):
        """Write once more what do_arm has written before."""
        if self._armed:
            self.do_arm(*self._armed)


class Guard:
    """The guardian's side: ptrace in the main thread, requests by another.

    Requests are tuples (name, tgid, arguments…); each is answered by ("ok",
    result) or ("error", class, text, hint). One process for a target and all
    that comes of it: an interpreter for each would take longer to start
    than many a command runs. What becomes another program goes this way:

        guardian                          front end
        stop of its exec, in a queue      -
        leads it to a waiting_stub,
        lets go, tells         ------>    puts its jumps in
        traces it again        <------    "arm"
        has it enter           <------    "release"

    If the guardian dies, the kernel lets go whoever is stopped, and the stub
    of who waits there ends by itself. If the front end does, the guardian
    sends all on; if it has served nobody for _STUB_WAIT_S, whoever waits.
    """

    def __init__(self, channel, tgid, news):
        self.channel, self.tgid, self.news = channel, tgid, news
        self.host, self._cpu = os.getppid(), 0
        self.wards = [Ward(self, tgid)]
        self.requests, self.is_over = queue.Queue(), False
        self.outbox = queue.Queue()     # what to tell
        self.is_left = False        # on purpose: the front end has gone
        self._next_look, self.exit_status = 0.0, 0
        self._is_slow = False       # was the last look, at what is ignored
        self.stopped = collections.deque()  # (tgid, since) in their execs
        self.waiting = {}           # {tgid: (its stub or 0, since)}
        self.served = 0.0           # when the front end has last done one
        self.early = set()          # tids that stopped before their creators
        self.late = []              # Keepers that have left, but for threads
        #                             in vfork
        self._status = ctypes.c_int()

    @property
    def keepers(self):
        """All of them."""
        return [keeper for ward in self.wards for keeper in ward.keepers]

    def main(self):
        """Until the front end says so, or has gone. -> its exit status"""
        for signo in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT,
                      signal.SIGTSTP, signal.SIGPIPE):
            signal.signal(signo, signal.SIG_IGN)
        signal.signal(signal.SIGURG, lambda *_: None)
        # By a thread: this one may hold the queue's lock when it comes.
        signal.signal(signal.SIGTERM, lambda *_: _thread.start_new_thread(
            self.requests.put, ((_TERMINATE, None),)))
        signal.signal(STEP_ASIDE, lambda *_: _thread.start_new_thread(
            self.requests.put, ((_ASIDE, None),)))
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, _ACTION_EACH_S, _ACTION_EACH_S)
        threading.Thread(target=self._receive, daemon=True,
                         args=(threading.get_ident(),)).start()
        threading.Thread(target=self._tell_all, daemon=True).start()
        while not self.is_over:
            self._lead()
            is_idle = not (self.keepers or self.late)
            if not is_idle:
                self._take_stop()
            elif self.is_left:
                break               # all have ended, or are other programs
            for ward in self.wards:
                ward.cool()
            self._look_at_actions()
            if self.is_over:
                break
            self._bury()
            try:
                request, taken = self.requests.get(
                    is_idle, _ACTION_EACH_S if self.stopped
                    or len(self.wards) > 1 else None)
            except queue.Empty:
                continue
            if taken is not None:
                taken.set()
            self._answer(request)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)   # it ends well
        # The interpreter's end takes the handler away before the timer.
        signal.setitimer(signal.ITIMER_REAL, 0)
        return self.exit_status

    def _look_at_actions(self):
        """Let go of programs that ignore SIGTRAP by now."""
        now = time.monotonic()
        if now < self._next_look and (self._is_slow or not any(
                ward.is_ignored for ward in self.wards)):
            return
        try:
            self._take_out_ignored()
        except UbpError as error:           # the next look tries again
            log.debug("%s", error)
        # One that cannot be stopped must not keep all others waiting.
        took = time.monotonic() - now
        self._is_slow = took > _ACTION_EACH_S and any(
            ward.is_ignored for ward in self.wards)
        self._next_look = now + (10 * took if self._is_slow
                                 else _ACTION_EACH_S)

    def _take_out_ignored(self):
        for ward in list(self.wards):
            if ward.look_at_actions():
                if ward.tgid == self.tgid:
                    self.exit_status = _IGNORES_SIGTRAP
                    self._abandoned()
                    return
                self.tell("note", ward.tgid, "it ignores SIGTRAP now: its "
                          "int3s are out")
                ward.do_rest(_STUB_WAIT_S)

    def _receive(self, main_thread):
        """In a thread: requests, which interrupt the wait for stops."""
        request = True
        while request:
            request = self.channel.receive()
            taken = threading.Event()
            self.requests.put((request, taken))
            while not taken.wait(0.002):
                signal.pthread_kill(main_thread, signal.SIGURG)

    def _answer(self, request):
        if not request and self.is_left:
            return
        if request == _ASIDE:
            self.step_aside()
            return
        if not request or request == _TERMINATE:
            self._abandoned()
            if not request:
                self._take_out_arenas()
            return
        try:
            answer = "ok", self._do(*request)
        except UbpError as error:
            answer = ("error", type(error).__name__, str(error), error.hint)
        try:
            self.channel.send(answer)
        except OSError:
            log.debug("the front end has gone")

    def _do(self, name, tgid, *arguments):
        """A request about one program: for its Ward, if not for all."""
        own = getattr(self, "do_" + name, None)
        return own(tgid, *arguments) if own is not None else getattr(
            self.ward(tgid), "do_" + name)(*arguments)

    def ward(self, tgid):
        """The Ward of the program that a process runs."""
        for ward in self.wards:
            if ward.tgid == tgid and not ward.is_past:
                return ward
        self.wards.append(Ward(self, tgid))
        return self.wards[-1]

    def keeper(self, tgid, ward):
        """A new Keeper; what an earlier one still traces is its, and what
        that has in debug registers."""
        keeper = Keeper(tgid, ward)
        for late in [each for each in self.late if each.tgid == tgid]:
            keeper.equipped.update(late.equipped)
            self.late.remove(late)
        return keeper

    def tell(self, *what):
        """Say to the front end what it did not ask for. Does not wait."""
        if what[0] == "end" or self.outbox.qsize() < _MOST_UNTOLD:
            self.outbox.put(what)

    def _tell_all(self):
        """In a thread: one that stands still reads nothing."""
        try:
            while True:
                self.news.send(self.outbox.get())
        except OSError:
            log.debug("the front end has gone")

    # -- stops --------------------------------------------------------------

    def _take_stop(self):
        """Wait for a stop, and send the thread on."""
        tid = _waitpid_any(-1, ctypes.addressof(self._status), WALL)
        if tid < 0:
            if ctypes.get_errno() == errno.ECHILD:
                self.late = []
                for ward in self.wards:
                    ward.keepers = []
            return
        status = self._status.value
        for keeper in self.keepers + self.late:
            thread = keeper.threads.get(tid)
            if thread is not None:
                ward = keeper.ward
                keeper.step(thread, status)
                if not keeper.threads:
                    ward.forget(keeper)
                    self.late = [k for k in self.late if k is not keeper]
                if ward.n_hits - ward.n_pinned >= _PIN_EACH:
                    self._follow(ward, tid)
                return
        self._take_unknown(tid, status)

    def _take_unknown(self, tid, status):
        """The first stop of a thread, before its creator's event."""
        fields = read_status(tid)
        tgid = int(fields.get("Tgid", 0))
        if not tgid:
            return
        self.early.add(tid)
        keeper = next(filter(None, (
            ward.keeper_of(tgid) for ward in self.wards)), None)
        if keeper is None:
            parent = int(fields.get("PPid", 0))
            keeper = next(filter(None, (
                ward.keeper_of(parent) for ward in self.wards)), None)
            if keeper is None:
                keeper = self.ward(self.tgid).adopt(tgid)
            elif is_same_mm(parent, tid) is False:
                keeper = keeper.ward.adopt(tgid, keeper)
        keeper.step(keeper.threads.setdefault(tid, Thread(tid, tgid)), status)

    def move(self, tgid, ward):
        """A process that was adopted early is a fork of this Ward's program:
        its parent, as the kernel calls it, need not be its creator."""
        for keeper in self.keepers:
            if keeper.tgid == tgid and keeper.ward is not ward and (
                    keeper.ward.tgid != tgid):
                keeper.ward.keepers.remove(keeper)
                keeper.ward, keeper.sites = ward, ward.sites
                ward.keepers.append(keeper)

    def _follow(self, ward, tid):
        """Run where the thread that was just stopped runs: a switch to it
        is then no message to another processor, at five times the cost."""
        ward.n_pinned = ward.n_hits
        fields = read_stat(tid)
        if len(fields) > 36 and int(fields[36]) != self._cpu:
            self._cpu = int(fields[36])
            try:
                os.sched_setaffinity(0, {self._cpu})
            except OSError:
                log.debug("cannot run on processor %d", self._cpu)

    def _bury(self):
        """Forget the programs that no process runs any more."""
        for ward in [ward for ward in self.wards if not ward.keepers]:
            if ward.is_past:
                self.wards.remove(ward)
            elif ward.tgid != self.tgid and ward.has_ended():
                self.wards.remove(ward)
                self.tell("end", ward.tgid)

    # -- programs that follow -----------------------------------------------

    def meet(self, tgid):
        """A process is another program, in the stop of its exec."""
        for ward in self.wards:
            ward.is_past |= ward.tgid == tgid
        self.stopped.append((tgid, time.monotonic()))

    def _lead(self):
        """Lead programs to their entry points, as many as the front end
        can serve before they go on by themselves; the others stay stopped.
        """
        now = time.monotonic()
        for tgid, (_, since) in list(self.waiting.items()):
            if now - since > 2 * _STUB_WAIT_S:
                del self.waiting[tgid]
        while self.stopped:
            tgid, since = self.stopped[0]
            is_late = (now - max(since, self.served) > _STUB_WAIT_S
                       or now - since > _QUEUE_S)
            if len(self.waiting) >= _MOST_WAITING and not is_late:
                return
            self.stopped.popleft()
            held = None
            try:
                held = None if is_late else hold_at_entry(tgid)
            except (Again, OSError, UbpError) as error:
                log.debug("pid %d is not held: %s", tgid, error)
            self.waiting[tgid] = held[0] if held else 0, time.monotonic()
            self._detach(tgid)
            self.tell("exec", tgid, held, time.monotonic())

    def _detach(self, tgid):
        try:
            ptrace(PTRACE_DETACH, tgid)
        except OSError as error:
            log.debug("pid %d has ended: %s", tgid, error)

    def do_release(self, tgid, timeout):
        """Have a program that waits for that enter."""
        self.served = time.monotonic()
        stub, _ = self.waiting.pop(tgid, (0, 0))
        if stub:
            keepers = [k for k in self.ward(tgid).keepers if k.tgid == tgid]
            tracer = keepers[0] if keepers else Tracer(tgid)
            release_at_entry(tracer, stub, timeout)
            tracer.close()          # there may be thousands of them

    def do_unfollow(self, _, timeout):
        """What becomes another program from now on is let go."""
        limit = time.monotonic() + timeout
        for ward in self.wards:
            ward.follows = False
        while self.stopped:
            self._detach(self.stopped.popleft()[0])
        for tgid in list(self.waiting):
            try:
                self.do_release(tgid, max(0.5, limit - time.monotonic()))
            except UbpError as error:       # it goes on by itself
                log.debug("%s", error)
        self.tell("over")

    # -- requests -----------------------------------------------------------

    def step_aside(self):
        """Let another ubp take its jumps out of the target, then go on.

        Int3s are not written again to what the target has forked. If it
        cannot go on, it ends, and the front end notices.
        """
        wards = [ward for ward in self.wards if ward.keepers]
        try:
            for ward in wards:
                ward.do_rest(5)
            limit = time.monotonic() + 5
            self._await_late(limit)
            time.sleep(_ASIDE_S)
            while wards and time.monotonic() < limit and (
                    tracer_of(self.tgid) not in (0, os.getpid())):
                time.sleep(0.002)
            for ward in wards:
                ward.rearm()
        except UbpError as error:
            log.debug("pid %d: %s", self.tgid, error)
            self.is_over = not self.keepers

    def do_rest(self, tgid, timeout):
        """Let go of a program, also of what it had forked as another.

        -> (stopped, us; processes; are threads in vfork still traced?)
        """
        done = [ward.do_rest(timeout) for ward in list(self.wards)
                if ward.tgid == tgid]
        return (max([us for us, _ in done] + [0.0]), sum(n for _, n in done),
                bool(self.late))

    def do_arm(self, tgid, *arguments):
        """Guard a program; take up what it had forked as another, too."""
        done = self.ward(tgid).do_arm(*arguments)
        for ward in self.wards:
            if ward.tgid == tgid and ward.is_past:
                ward.take_up()
        return done

    def do_drop(self, tgid, timeout):
        """Let go of a program for good."""
        self.do_rest(tgid, timeout)
        self.wards = [ward for ward in self.wards if ward.tgid != tgid]

    def do_stay(self, tgid):
        """Go on without the front end, until the targets end or a SIGTERM.
        """
        self.do_unfollow(tgid, 5)
        self.is_left = True

    def do_quit(self, tgid, timeout):
        """Put the text back, let go, and end."""
        done = self.do_rest(tgid, timeout)
        while self.keepers:
            for ward in list(self.wards):
                ward.do_rest(timeout)
        # What is in debug registers would outlive us, and end the target.
        self.is_left = any(keeper.equipped for keeper in self.late)
        self.is_over = not self.is_left
        return done

    def _abandoned(self):
        """The front end has gone: take everything out, however long."""
        self.is_over = True
        limit = time.monotonic() + _LAST_RESORT_S
        self.do_unfollow(0, 5)
        while self.keepers and time.monotonic() < limit:
            try:
                for ward in list(self.wards):
                    ward.do_rest(5)
            except UbpError as error:
                log.debug("%s", error)
                for keeper in self.keepers:
                    keeper.run(0.05)
        self._await_late(limit, lambda keeper: keeper.equipped)

    def _await_late(self, limit, is_awaited=lambda keeper: True):
        """Let go of the threads in vfork that come meanwhile."""
        while any(map(is_awaited, self.late)) and time.monotonic() < limit:
            for keeper in list(self.late):
                keeper.run(0.005)
                if not keeper.threads:
                    self.late.remove(keeper)

    def _take_out_arenas(self):
        """What the front end has left, if nobody else is there too."""
        # clean() would wait for who traces the target. Whoever asks us to go
        # meanwhile does the rest.
        limit = time.monotonic() + _LAST_RESORT_S
        while self.requests.empty() and self.late and (
                time.monotonic() < limit):
            self._await_late(time.monotonic() + _ACTION_EACH_S)
        if self.late:
            return
        for tgid in {ward.tgid for ward in self.wards}:
            owners = [view.header.owner_pid for view in find_arenas(tgid)
                      if view.header is not None]
            if owners and set(owners) == {self.host}:
                clean(tgid, all=True)


class Channel:
    """One end of a socket pair: each message a size and a pickled value.

    Both ends are ubp, and nobody else has the descriptors.
    """

    def __init__(self, sock):
        self.sock = sock

    def send(self, value):
        """Raises OSError."""
        import pickle
        data = pickle.dumps(value, 3)
        self.sock.sendall(struct.pack("<I", len(data)) + data)

    def _exactly(self, size):
        data = b""
        while len(data) < size:
            part = self.sock.recv(min(size - len(data), 1 << 16))
            if not part:
                return b""
            data += part
        return data

    def receive(self):
        """The next message, or None when the other end is closed."""
        import pickle
        try:
            head = self._exactly(4)
            data = head and self._exactly(struct.unpack("<I", head)[0])
        except OSError:
            return None
        return pickle.loads(data) if data else None


def guard(fd, news_fd, tgid):
    """The guardian's main function; see Guardian."""
    import socket
    gc.disable()
    sys.exit(Guard(Channel(socket.socket(fileno=fd)), tgid, Channel(
        socket.socket(fileno=news_fd))).main())


class GuardianGone(ProbeError):
    """The guardian of a target does not answer any more."""


class Guardian:
    """The front end's side: starts the guardian of a target, and asks it.

    news   Channel of what it tells by itself: Guard.tell
    """

    def __init__(self, tracer, shared=None):
        """shared   the Guardian of the target that this is a child of"""
        self.tracer, self.is_armed = tracer, False
        self.is_shared = shared is not None
        if self.is_shared:
            self.process, self._lock = shared.process, shared._lock
            self.channel, self.news = shared.channel, shared.news
            return
        import socket
        self._lock = threading.Lock()
        ours, theirs = zip(socket.socketpair(), socket.socketpair())
        try:
            self._start([sock.fileno() for sock in theirs])
        except (OSError, TypeError) as error:
            for sock in ours:
                sock.close()
            raise ProbeError("start a guardian for", tracer.name(),
                             str(error), "int3 needs a process of its own")
        finally:
            for sock in theirs:
                sock.close()
        self.channel, self.news = map(Channel, ours)

    def _start(self, fds):
        import subprocess
        folder = os.path.dirname(os.path.abspath(__file__))
        # A session of its own: the Ctrl-C that ends us is not for it.
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _GUARD_CODE, folder]
            + ["%d" % n for n in fds + [self.tracer.tgid]],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, cwd="/", pass_fds=fds,
            start_new_session=True)

    def call(self, *request, **options):
        """Send a request about the target. -> its result

        Raises what it raised there.
        """
        with self._lock:
            try:
                self.channel.sock.settimeout(options.get("timeout", 5) + 30)
                self.channel.send((request[0], self.tracer.tgid)
                                  + request[1:])
                answer = self.channel.receive()
            except OSError:
                answer = None
        if answer is None:
            # A late answer would be taken for the next. Closed, it makes
            # the guardian, if it is still there, put the text back.
            self.channel.sock.close()
            raise GuardianGone("ask the guardian of", self.tracer.name(),
                               "pid %d does not answer" % self.process.pid)
        if answer[0] == "ok":
            return answer[1]
        error = UbpError.__new__(_GUARD_ERRORS.get(answer[1], ProbeError))
        Exception.__init__(error, answer[2])
        error.hint = answer[3]
        raise error

    def stay(self):
        """Leave it alone with its int3s: it ends with the target, or by a
        SIGTERM, of clean()."""
        if self.is_shared:
            return                  # that is for the one who started it
        self.call("stay")
        self.channel.sock.close()
        # Our child, while we live: it must not stay as a zombie.
        threading.Thread(target=self.process.wait, daemon=True,
                         name="ubp: a guardian that was left").start()

    def has_ended(self):
        """Was it killed?"""
        return self.process.poll() is not None

    def read_news(self, seconds):
        """What it tells, or None: nothing within so many seconds."""
        poll = select.poll()
        try:
            poll.register(self.news.sock.fileno(), select.POLLIN)
            if poll.poll(1e3 * seconds):
                return self.news.receive()
        except (OSError, ValueError) as error:
            log.debug("no news: %s", error)     # it was closed
        return None

    def close(self, timeout=5):
        """Have the text put back, and the guardian, if it is for this
        target alone, end."""
        if self.is_shared:
            self.call("drop", timeout, timeout=timeout)
            return
        try:
            self.call("quit", timeout, timeout=timeout)
        except GuardianGone as error:
            log.debug("%s", error)
        finally:
            self.channel.sock.close()
            self.news.sock.close()
            try:
                self.process.wait(5)
            except Exception as error:      # stopped, or reaped by the host
                log.debug("the guardian: %s", error)


def guardian_of(pid):
    """The pid of the guardian that traces a process, or 0."""
    tracer = next(filter(None, map(tracer_of, [pid] + thread_ids(pid))), 0)
    return tracer if is_guardian(tracer) else 0


def end_guardian(pid, guardian, timeout):
    """Have a guardian put the text back, and wait until it has let go.

    Raises AttachError, UbpTimeout.
    """
    try:
        os.kill(guardian, signal.SIGTERM)
    except ProcessLookupError:
        pass
    except OSError as error:
        raise AttachError("end", "the guardian of pid %d, pid %d"
                          % (pid, guardian), error.strerror, "sudo")
    limit = time.monotonic() + timeout
    while guardian_of(pid) == guardian:
        if time.monotonic() > limit:
            raise UbpTimeout("end", "the guardian of pid %d, pid %d"
                             % (pid, guardian), "it does not let go")
        time.sleep(0.002)


_GUARD_ERRORS = {each.__name__: each for each in (
    AttachError, TraceeGone, ProbeError, UbpTimeout)}


# -- libraries that come and go -----------------------------------------------
#
# The loader keeps a list of them for debuggers, and calls an empty function
# when it has begun and when it has ended a change: the debug hook. A call of
# ours sits there, so that the thread that has loaded a library waits until
# what patterns mean in it is armed, before its constructors run. It waits
# for a second at most, as in every Call; and the list is looked at every now
# and then in any case, as there is not always a hook that takes a probe.

DT_DEBUG = 21
DT_TEXTREL, DT_FLAGS, DF_TEXTREL = 22, 30, 4
_R_DEBUG = struct.Struct("<i4xQQi4x8xQ")    # version, map, brk, state, next;
_R_DEBUG_OLD = 40                   # <link.h>: next from version 2 on
_LINK_MAP = struct.Struct("<QQQQQ")     # addr, name, ld, next, prev
_MAX_LIBRARIES, _MAX_NAMESPACES = 10000, 64
_LOOK_EACH_S = 0.05
_SHORT_LIST = 40            # libraries; a longer list is not read whole each
_LOOK_WHOLE = 10            # time, but each so many times
_MOST_TOLD = 20             # notes on children
_MOST_OPENED = 64           # files, while one more child is probed
_RATE_EACH = 4              # looks, from one look at rates to the next
_LOOKS_AT_OTHERS = 20       # that find an exec of which no guardian tells
_HOOK_PATIENCE_S = 0.25     # for whoever else works on the target
_RELOCATED_S = 0.2          # behind the hook a library is surely relocated
_MOST_ASLEEP_MODULES = 32   # that were unloaded, and may come back
_HOOK_INSNS = 8             # at most, of a function that does nothing


class LinkMap:
    """Tells cheaply when a process has loaded or unloaded a library.

    The loader keeps a list of them for debuggers, one for each namespace
    (dlmopen); reading its end takes two system calls, and nothing of the
    target's. Where there is none (a static program), the mappings are
    compared, more rarely.
    """

    def __init__(self, pid, read, all_modules):
        self.pid, self._read = pid, read
        self._head = self._last = 0
        for module in all_modules:
            if module.is_exe:
                self._head = self._find(module)
        self._n = 0
        self.note()

    def _find(self, module):
        """The vaddr of the loader's struct r_debug, or 0."""
        for segment in module.elf.segments:
            if segment.type == PT_DYNAMIC and segment.size < 1 << 16:
                data = self._try(module.bias + segment.vaddr,
                                 segment.size // 16 * 16)
                for tag, value in struct.iter_unpack("<QQ", data):
                    if tag == DT_DEBUG:
                        return value
        return 0

    def _try(self, vaddr, size):
        try:
            return self._read(vaddr, size)
        except (OSError, UbpError):
            return b""

    def _debug(self, vaddr):
        """The fields of a struct r_debug, or None."""
        data = self._try(vaddr, _R_DEBUG.size) or self._try(vaddr,
                                                            _R_DEBUG_OLD)
        if len(data) < _R_DEBUG_OLD:
            return None
        fields = _R_DEBUG.unpack(data.ljust(_R_DEBUG.size, b"\0"))
        return fields if fields[0] >= 2 else fields[:4] + (0,)

    @property
    def hook(self):
        """The vaddr of the function that the loader calls, or 0."""
        fields = self._debug(self._head) if self._head else None
        return fields[2] if fields else 0

    def state(self):
        """What the lists hold; None while the loader changes one."""
        if not self._head:
            return self.text()
        found, at, seen = [], self._head, set()
        while at and at not in seen and len(seen) < _MAX_NAMESPACES:
            fields = self._debug(at)
            if fields is None or fields[3]:
                return None
            nodes = self._nodes(fields[1])
            if nodes is None:
                return None
            if not seen and nodes:
                self._last = nodes[-1][0]
            found += nodes
            seen.add(at)
            at = fields[4]
        return found

    def _nodes(self, node):
        """[(vaddr, bias, name's vaddr)] of a list, or None."""
        found = []
        while node and len(found) < _MAX_LIBRARIES:
            data = self._try(node, _LINK_MAP.size)
            if len(data) < _LINK_MAP.size:
                return None
            bias, name, _, after, _ = _LINK_MAP.unpack(data)
            found.append((node, bias, name))
            node = after
        return found

    def text(self):
        """The executable mappings of files, but ours."""
        return [m for m in read_maps(memory_tid(self.pid))
                if "x" in m.perms and m.inode and m.path != _MEMFD_PATH]

    def note(self):
        """What is there now has been seen."""
        self._seen, self._seen_text = self.state(), self.text()

    def has_changed(self):
        """Has it, since that was noted? A cheap look, now and then whole."""
        self._n += 1
        if self._n % _LOOK_WHOLE and (
                not self._head or len(self._seen or ()) > _SHORT_LIST
                and _LINK_MAP.unpack(self._try(self._last, _LINK_MAP.size)
                                     or bytes(_LINK_MAP.size))[3] == 0):
            return False
        state = self.state()
        return state is not None and state != self._seen

    def differs(self, state):
        """Does a state(), or what is mapped, differ from what was noted? An
        old loader has no list of its namespaces."""
        return state != self._seen or self.text() != self._seen_text


def can_come_later(spec, all_modules):
    """Could a Spec name something in a library that is loaded later?

    Not if all that it names now stays: the program, what that needs, and
    what these need.
    """
    if spec.vaddr is not None or spec.watch:
        return False
    if not spec.module or is_pattern(spec.module):
        return True
    named = [module for module in all_modules
             if is_module_named(module, spec.module)]
    return spec.module != "exe" and not (
        named and set(named) <= _steady_modules(all_modules))


def _steady_modules(all_modules):
    """The Modules that stay as long as the program runs."""
    by_name = {}
    for module in all_modules:
        for name in {module.name, module.soname} - {""}:
            by_name.setdefault(name, module)
    found, pending = set(), [m for m in all_modules if m.is_exe]
    while pending:
        module = pending.pop()
        if module not in found:
            found.add(module)
            pending += [by_name[name] for name in module.elf.needed
                        if name in by_name]
    return found


def hook_site(planner, all_modules, vaddr):
    """The Site of the loader's debug hook, or None: the vaddr comes from
    the target, and whatever is no empty function of its is no hook."""
    module = next((module for module in all_modules
                   for low, size, _ in module.text
                   if low <= vaddr < low + size), None)
    function = planner.function(module, vaddr) if module else None
    symbol = module.function_at(vaddr) if function else None
    if not symbol or not function.vaddr == symbol.vaddr == vaddr:
        return None
    at = 0
    for _ in range(_HOOK_INSNS):
        try:
            insn = ubp_x86.decode(function.code[at:at + 15], vaddr + at)
        except DecodeError:
            return None
        at += insn.size
        if insn.flow == ubp_x86.RET:
            name = "%s (the loader's debug hook)" % symbol.name
            return Site(vaddr, symbol._replace(name=name), 0, (name,),
                        module)
        if insn.flow != ubp_x86.NEXT:
            break
    return None


# The functions of a C library by which programs say it; others block all
# signals for a moment, or put back the mask that there was: where a program
# has a C library in it, these.
_SIGNAL_FUNCTIONS = {
    ubp_x86.RT_SIGPROCMASK: {
        "pthread_sigmask", "__pthread_sigmask", "sigprocmask",
        "__sigprocmask", "setcontext", "swapcontext", "__setcontext",
        "__swapcontext", "__sigsetjmp_tail"},
    ubp_x86.RT_SIGACTION: {"__libc_sigaction", "sigaction", "__sigaction"}}
_QUIET_FUNCTIONS = {
    "pthread_create", "start_thread", "pthread_kill_implementation",
    "spawnix", "spawni_child", "block_all_sigs", "block_app_sigs",
    "restore_sigs"}
_TELLS = (ubp_x86.RT_SIGPROCMASK, ubp_x86.RT_SIGACTION, ubp_x86.ANY_SYSCALL)
_MOST_SIGNAL_TEXT = 16 << 20    # bytes of modules, in which they are sought,
_MOST_ANY_TEXT = 4 << 20        # and in one, whatever sets their numbers
_IS_LIBC = re.compile(r"lib(c|pthread)[-.]|ld-musl")


def signal_sites(planner, among):
    """The Sites of the syscalls by which Modules set signals' masks and
    actions: in a C library those that programs call, and its syscall().
    Other libraries are looked through until that is too much."""
    found, left = [], _MOST_SIGNAL_TEXT
    for module in sorted(among, key=lambda module: not module.is_exe):
        size = sum(size for _, size, _ in module.text)
        is_libc = _IS_LIBC.match(module.name) or (
            module.is_exe and not module.elf.needed)
        if (size > left and not is_libc
                or module.name.startswith("ld-linux")):
            continue
        left -= size
        text = planner.peek_text(module)
        if _IS_LIBC.match(module.name):
            found += _signal_sites_of_libc(planner, module, text)
        else:
            found += [
                (site, number) for site, number in _signal_sites_in(
                    module, text, size <= _MOST_ANY_TEXT)
                if not site.function or _QUIET_FUNCTIONS.isdisjoint(
                    re.sub(r"^_+|\..*", "", name)
                    for name in site.function.names)]
    return [site for site, number in found if planner.syscall_number(
        site.module, site.vaddr, number) in _TELLS]


def _signal_sites_of_libc(planner, module, text):
    """Where no function is known by its name, all of them; musl's
    siglongjmp goes by a nameless one. -> [(Site, number)]"""
    is_musl = re.match(r"libc\.so$|libc\.musl|ld-musl",
                       module.soname or module.name)
    sites, found = collections.defaultdict(list), []
    for site, number in _signal_sites_in(module, text):
        sites[number].append((site, number))
    for number, each in sites.items():
        named = [(site, number) for site, _ in each
                 if is_musl and not site.function or site.function and not
                 _SIGNAL_FUNCTIONS[number].isdisjoint(site.function.names)]
        found += named or each
    for function in {planner.function(module, symbol.vaddr)
                     for symbol in module.named("syscall")} - {None}:
        found += [each for each in _signal_sites_in(
            module, [(function.vaddr, function.code)], True)
            if each[1] == ubp_x86.ANY_SYSCALL]
    return found


def _signal_sites_in(module, text, takes_any=False):
    """[(Site, number)] of the syscalls in [(vaddr, code)] of a Module."""
    return [(_signal_site(module, vaddr, module.function_at(vaddr)), number)
            for low, code in text for vaddr, number
            in ubp_x86.signal_syscalls(code, low, takes_any)]


def _signal_site(module, vaddr, symbol):
    name = "%s (ubp's own: SIGTRAP)" % (
        symbol.name if symbol else "0x%x" % vaddr)
    return Site(vaddr, symbol and symbol._replace(name=name),
                vaddr - symbol.vaddr if symbol else 0, (name,), module)


def is_relocated(module, read):
    """Has the loader relocated a module by now? Before glibc 2.41 it calls
    its hook when it has not. read: (vaddr, size) -> bytes."""
    for offsets, infos, addends in module.elf.relocations:
        if len(infos) and infos[0] == R_X86_64_RELATIVE:
            word = read(module.bias + offsets[0], 8)
            return int.from_bytes(word, "little") == (
                module.bias + addends[0] & (1 << 64) - 1)
    return not any(len(infos) for _, infos, _ in module.elf.relocations)


def changes_its_text(module):
    """Will the loader relocate its text?"""
    tags = module.elf.dynamic
    return DT_TEXTREL in tags or bool(tags.get(DT_FLAGS, 0) & DF_TEXTREL)


class LibraryWatcher:
    """A thread that has a target look again when libraries come or go, and
    at rates where they are limited."""

    def __init__(self, target, link_map):
        self._target, self.link_map = target, link_map
        self._is_over, self._n_other = threading.Event(), 0
        self._n, self._thread = 0, None
        if target._parent is None:      # else it is the Follower that looks
            self._thread = threading.Thread(
                target=self._run, daemon=True,
                name="ubp-libraries-%d" % target.pid)
            self._thread.start()

    def _run(self):
        while not self._is_over.wait(_LOOK_EACH_S):
            self.look()

    def look(self):
        """Look at all that may have changed; at some of it more rarely."""
        self._n += 1
        if not self._target._has_become():
            self._n_other = 0
            self._look(self._n)
            return
        # A guardian tells in the instant of an exec, if it was there.
        self._n_other += 1
        if not self._target._follows or self._n_other > _LOOKS_AT_OTHERS:
            self._locked(self._target._meet_exec)

    def _look(self, n):
        """The n-th look, where the program is the same."""
        guardian = self._target._guardian
        if guardian is not None and guardian.has_ended():
            self._locked(self._target._rescue)
        if n % _RATE_EACH == 0:
            self._locked(self._target._check_rates,
                         _RATE_EACH * _LOOK_EACH_S)
        if (self._target._hook is not None
                and seccomp_mode(self._target.pid) != "0"):
            self._locked(self._target._hush_hook)
        if self.link_map.has_changed() or (
                n % _LOOK_WHOLE == 0 and self._target._stale_modules()):
            self._locked(self._target._look_for_libraries)
        elif self._target._is_time_to_look_again():
            self._locked(self._target._look_again)
        elif n % _LOOK_WHOLE == 0:
            self._locked(self._target._look_at_text)
            self._target._look_at_children()

    def _locked(self, function, *args):
        """Call it, unless we are to end: who stops us holds the lock."""
        while not self._target._lock.acquire(timeout=0.01):
            if self._is_over.is_set():
                return
        try:
            function(*args)
        except UbpError as error:
            self._target._note("while it was watched: %s" % error)
        finally:
            self._target._lock.release()

    def stop(self):
        """End the thread. The caller holds the target's lock."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()


class Follower:
    """Has what the children of a target become probed as it is itself.

    One thread does what the guardian tells, one thing after the other: an
    exec, of the target, too, and the end of a child with all it has forked.
    Invariant: whoever waits at its entry point is sent on, whatever fails.

    children   {pid: Target}, of those that are there
    """

    def __init__(self, target):
        self.target, self.children = target, {}
        self.lock = threading.RLock()
        self.n_programs = self.n_probed = 0     # that children have become
        self.missed = collections.Counter()     # {what else to say: of these}
        self._ended = set()         # inodes of arenas of children that ended
        self._n_told = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(
            target=self._run, daemon=True, name="ubp-follow-%d" % target.pid)
        self._thread.start()

    def _run(self):
        try:
            self._listen()
        except BaseException:       # our mistake: nobody is to wait for us
            if self.target._guardian is not None:
                self.target._guardian.call("unfollow", 5, timeout=5)
            raise

    def _listen(self):
        next_look = 0.0
        while True:
            guardian = self.target._guardian
            news = guardian and guardian.read_news(_LOOK_EACH_S)
            if news:
                getattr(self, "_take_" + news[0])(guardian, *news[1:])
            elif self._is_over.is_set():
                return
            elif guardian is None or guardian.has_ended():
                self._is_over.wait(_LOOK_EACH_S)
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + _LOOK_EACH_S
                self._look()

    # -- what the guardian tells --------------------------------------------

    def _take_exec(self, guardian, pid, held, when):
        """A process has become another program.

        held   (stub, entry): it waits in a waiting_stub; else None
        """
        if self._is_over.is_set():
            return                  # the guardian sends it on
        mine = Guardian(Tracer(pid), guardian)
        try:
            if pid == self.target.pid:
                self._meet_own(held, when)
            else:
                with self.lock:
                    self._meet(pid, held, when)
        except (OSError, UbpError) as error:
            self._miss("not probed: " + getattr(error, "why", str(error)))
            log.debug("pid %d is not probed: %s", pid, error)
            self._drop(pid)
        finally:
            try:
                mine.call("release", 5, timeout=5)
            except UbpError as error:   # it has ended, or enters by itself
                log.debug("%s", error)

    def _drop(self, pid):
        """A child could not be probed: take out what is in it."""
        with self.lock:
            child = self.children.get(pid)
            try:
                if child is not None and child.alive:
                    child.close()
            except UbpError as error:
                self._note("%s: %s" % (child._tracer.name(), error))
            if child is not None:
                self._ended.update(child._bury(self.children))

    def _meet_own(self, held, when):
        """The target has. Who closes it holds its lock, and waits for us."""
        while not self.target._lock.acquire(timeout=0.01):
            if self._is_over.is_set():
                return
        try:
            self.target._meet_exec(held, when)
        finally:
            self.target._lock.release()

    def _meet(self, pid, held, when):
        child = self.children.get(pid)
        self.n_programs += 1
        why = _unfit_to_follow(pid) or (
            "" if child is not None or n_descriptors_left() >= _MOST_OPENED
            else "too many are there for the limit of open files (ulimit -n)")
        if why and child is not None:
            self._take_end(None, pid)
        if why:
            self._miss("not probed: " + why)
            return
        if child is not None:
            child._meet_exec(held, when)
        else:
            child = self.children[pid] = Target(pid, parent=self.target)
            with child._lock:
                child._enter(held)
        is_probed = any(map(_n_armed, child._probes))
        self.n_probed += is_probed
        if is_probed and not held:
            self._miss("late: what they called before is not counted")
        if _has_lost_privilege(pid):
            self._miss("without the privilege of a setuid file, as an "
                       "unprivileged ubp traces it")
        if not child._follows:
            self._miss("traces others: what it starts is left alone")
        self._tell(child)

    def _miss(self, what):
        if len(self.missed) < _MOST_TOLD or what in self.missed:
            self.missed[what] += 1

    def _take_end(self, _, pid):
        """No process runs any more what a child had become."""
        with self.lock:
            child = self.children.get(pid)
            if child is not None:
                self._ended.update(child._bury(self.children))
                self._tell(child)

    def _take_note(self, _, pid, text):
        self._note("pid %d (%s): %s" % (pid, comm(pid), text))

    def _take_over(self, _):
        """It tells nothing more."""

    def _tell(self, child):
        """Pass on what the user should know of a child."""
        for note in child.notes:
            self._note("%s: %s" % (child._tracer.name(), note))
        child.notes = []

    def _note(self, text):
        if self._n_told < _MOST_TOLD:
            self._n_told += 1
            self.target._note(text)

    def _look(self):
        """What the LibraryWatcher of a target does, for all children."""
        for child in list(self.children.values()):
            if self._is_over.is_set():
                return
            if child._watcher is not None:
                child._watcher.look()
                self._tell(child)

    # -- what the target asks -----------------------------------------------

    def add(self, probe, timeout):
        """Put a probe that is new into the children that are there."""
        with self.lock:
            for child in list(self.children.values()):
                try:
                    with child._lock:
                        child._add(probe, timeout)
                except UbpError as error:
                    log.debug("%s", error)

    def remove(self, probes, timeout):
        """Take probes out of the children. -> Removal"""
        total = Removal(0, 0, 0, 0, (), ())
        with self.lock:
            for child in self.children.values():
                before, child.removal = child.removal, total
                twins = [twin for probe in probes for twin in
                         probe._kin[0] if twin._target is child]
                child._remove(twins, timeout)
                total, child.removal = child.removal, before
        return total

    def stop(self):
        """Have the guardian follow no more, and the thread end."""
        if self._is_over.is_set():
            return
        self._is_over.set()
        guardian = self.target._guardian
        try:
            if guardian is not None:
                with self.lock:     # not while a child is being probed
                    guardian.call("unfollow", 5, timeout=5)
        except UbpError as error:
            log.debug("%s", error)
        self._thread.join()
        self._note_words()

    def close(self, timeout):
        """Take the probes out of all children. -> Removal"""
        total = Removal(0, 0, 0, 0, (), ())
        for child in list(self.children.values()):
            child.close(timeout)
            total += child.removal
            self._ended.update(child._bury(self.children))
        # Who escaped the guardian, as by CLONE_UNTRACED, has them still.
        for pid in processes_with(*self._ended) if self._ended else ():
            total += clean(pid, timeout=timeout)    # they are marked as left
        self._ended.clear()
        return total

    def _note_words(self):
        """Say what became of the children, in a line."""
        text = "its children became %s, %d of them with probes" % (
            plural(self.n_programs, "other program"), self.n_probed)
        for why, n in self.missed.most_common(3):
            text += "; %d %s" % (n, why)
        if self.n_programs:
            self.target._note(text)


# ---- 10  Library ----------------------------------------------------------
#
# What a host program sees. ptrace belongs to a thread, public objects to
# none: each target has one worker thread that makes every ptrace call, so a
# KeyboardInterrupt in the caller never lands inside a pause. Invariant: the
# host keeps its signal handlers, its settings and its output; nothing here
# prints, exits, or runs from the garbage collector or in a forked child.

_LAST_WAIT_S = 10.0     # for transfers, when the interpreter ends
_MARGIN_S = 30          # behind the time-out of a job of the worker
_YOUNG_NS = 2 * 10**6   # that an event of another process may come late


class Worker:
    """The thread that owns the tracees of one Target."""

    def __init__(self, tracer):
        self.tracer = tracer
        self._jobs = queue.Queue()
        self._thread, self._must_leave, self._tid = None, False, 0
        self._has_transfers = False     # that the end of the thread awaits
        self._lock = threading.Lock()

    def call(self, function, timeout):
        """Run function() in the worker. -> its result, or its exception

        function keeps to the timeout (seconds) itself. Behind it _MARGIN_S
        are granted: to a job of another thread that comes before it, and to
        the steps that may not be left half done. While the worker computes,
        as for a hundred thousand sites, that time does not begin. Then it
        is a bug of ours.
        """
        job = _Job(function)
        with self._lock:
            # In steps that a KeyboardInterrupt may part from each other.
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, daemon=True,
                    name="ubp-%d" % self.tracer.tgid)
            if self._thread.ident is None:
                self._thread.start()
            self._jobs.put(job)
        limit, spent = 0, None
        while not job.done.wait(0.2):
            self.tracer.reap_dead()
            before, spent = spent, self._spent()
            if spent != before:
                limit = time.monotonic() + timeout + _MARGIN_S
            elif time.monotonic() > limit:
                raise UbpTimeout("work on", self.tracer.name(),
                                 "the ptrace thread is stuck")
        if job.error is not None:
            raise job.error
        return job.result

    def _spent(self):
        """The time that the thread has computed, in no matter what unit."""
        data = read_proc("/proc/self/task/%d/stat" % self._tid)
        return data.rpartition(b")")[2].split()[11:13]      # proc(5)

    def stop(self):
        """End the thread, when transfers in progress have ended."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is None or thread.ident is None:
                return
            self._has_transfers = False
            self._jobs.put(None)
        # Without a transfer it only waits for a processor.
        thread.join(0.2)
        limit = time.monotonic() + 5
        while (thread.is_alive() and not self._has_transfers
               and time.monotonic() < limit):
            thread.join(0.01)
        if thread.is_alive():
            threading.Thread(target=self._linger, args=(thread,),
                             name="ubp-linger").start()

    def let_late_go(self):
        """Let go of threads in vfork, which have not stopped yet: by the
        thread's end. Another tracer is to come now, not when they have."""
        if any(thread.in_vfork and thread.state == INTERRUPTED
               for thread in list(self.tracer.threads.values())):
            self.stop()

    def _linger(self, thread):
        """Keep the interpreter from ending in the middle of a transfer.

        No daemon: threading waits for it at exit, and then it counts down.
        """
        limit = float("inf")
        while thread.is_alive():
            if not threading.main_thread().is_alive():
                limit = min(limit, time.monotonic() + _LAST_WAIT_S)
            self._must_leave = time.monotonic() > limit
            thread.join(0.05)

    def _run(self):
        self._tid = syscall(SYS_gettid)
        _block_signals()
        try:                        # of this thread only, setpriority(2)
            os.setpriority(os.PRIO_PROCESS, 0, -20)
        except OSError:
            log.debug("no privilege to run at a high priority")
        jobs, late = self._jobs, False
        while True:
            try:
                job = jobs.get(timeout=0.0005 if late else None)
                if job is None:
                    break
                job.run()
                job = None
            except queue.Empty:
                pass
            try:
                late = self.tracer.finish_late()
            except (OSError, UbpError) as error:
                log.warning("pid %d: %s", self.tracer.tgid, error)
        self.tracer.end_transfers(self._must_leave_transfers)
        self.tracer.close()

    def _must_leave_transfers(self):
        self._has_transfers = True
        return self._must_leave


class _Job:
    """A function on its way to the worker, and what became of it."""

    def __init__(self, function):
        self.function, self.result, self.error = function, None, None
        self.done = threading.Event()

    def run(self):
        try:
            self.result = self.function()
        except BaseException as error:      # the caller's to handle
            self.error = error
        self.done.set()


def _block_signals():
    """Block every signal in this thread: none may interrupt a pause."""
    signal.pthread_sigmask(signal.SIG_BLOCK, set(range(1, signal.NSIG))
                           - {32, 33, 34})      # the C library's own


class Removal(NamedTuple):
    """What taking probes out did, over all processes."""
    n_sites: int            # put back
    n_pages: int            # written
    n_equal: int            # of them equal to their files
    n_arenas: int           # unmapped
    pids: tuple             # of the processes
    notes: tuple            # what was left, and why

    def __add__(self, other):
        return Removal(*[a + b for a, b in zip(self[:4], other[:4])],
                       pids=tuple(sorted({*self.pids, *other.pids})),
                       notes=self.notes + other.notes)


class Target:
    """A process under observation; from attach() or launch()."""

    def __init__(self, pid, process=None, follows=False, parent=None):
        self.pid, self.comm = pid, comm(pid)
        self._parent = parent       # Target that this has become a child of
        self._follower = None       # of what children become: Follower
        self.notes = []
        self.removal = Removal(0, 0, 0, 0, (), ())
        self._process = process     # _Child, if we launched it
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._probes = []
        self._traced, self._reader = [], EventReader(self)
        self._begin(Tracer(pid))
        self._is_closed, self._guardian = False, None
        self._watcher = None        # of libraries that come and go
        self._hook = None           # Probe at the loader's debug hook
        self._uses_hook = True      # False: the probes are to be left
        self._early = []            # [(Module, when)] not yet relocated
        self._n_looked = 0          # sites whose text was looked at again
        self._gone_modules = []
        # The programs that it, and what it forks, become by exec.
        self._follows = follows or parent is not None
        self._identity = b""        # of the program that it is
        self._is_other = False      # than the one that was attached to
        self._is_kept = False       # launched, at its entry point, by SIGSTOP
        self._max_rate = float("inf")       # of hits by int3 or hw
        self._fetching = threading.Lock()
        self._rates = {}            # {(HardwarePart, Site): hits before}
        # (pid, its modules) -> what names addresses in that program, with
        # methods key(Probe, key) and learn(Event); for its children, too
        self._namer = None
        self._merging = threading.Lock()    # of what comes next
        self._ended_events = []     # of children that are not there any more
        self._young_events = []     # that another process may have before
        self._began, self._has_told = _ticks(), False
        self._worst_pause_us = 0.0  # of children that are not there any more

    def _begin(self, tracer):
        """What is known of one program; an exec makes all of it void."""
        self._tracer, self._worker = tracer, Worker(tracer)
        self._installer = Installer(
            tracer, os.environ.get("UBP_ARENA", "auto"), self._note)
        self._modules, self._planner, self._insns = None, None, {}
        self._signals = None        # Probe at what tells of SIGTRAP

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __del__(self):
        if not getattr(self, "_is_closed", True) and (
                self._installer.arenas or self._probes):
            warnings.warn("%r was not closed; its probes stay in place"
                          % self, ResourceWarning)

    def __repr__(self):
        return "<Target pid %d (%s)>" % (self.pid, self.comm)

    # -- looking ------------------------------------------------------------

    @property
    def probes(self):
        """The probes in place, in the order of arming."""
        return list(self._probes)

    @property
    def pause_us(self):
        """The longest pause so far, microseconds: from the first interrupt
        to the release of the last thread. No thread stood still for longer,
        children included that inherited the probes."""
        return max([self._tracer.pause_us, self._worst_pause_us] + [
            child.pause_us for child in self._children()])

    def _children(self):
        """The Targets that its children are, those that are there."""
        return list(self._follower.children.values()) if (
            self._follower is not None) else []

    @property
    def alive(self):
        """Is the process still there, and the same program?"""
        if self._process is not None:
            return self._process.poll() is None
        fields = read_stat(self.pid)
        return (self._tracer.is_same_process()
                and (fields[0] not in "ZX" or len(thread_ids(self.pid)) > 1))

    @property
    def returncode(self):
        """As subprocess has it, of a launched program; else None."""
        return self._process.poll() if self._process else None

    def wait(self, timeout=None):
        """Wait for the target's exit. -> did it exit within timeout (s)"""
        self._check_process("wait for")
        self.run()
        limit = None if timeout is None else time.monotonic() + timeout
        while self.alive:
            if limit is not None and time.monotonic() >= limit:
                return False
            time.sleep(0.01)
        return True

    def find(self, pattern):
        """The sites that a probe names. -> [Site]. Raises SymbolError."""
        self._check_process("search")
        notes = []
        sites = find(self._get_modules(), parse_probe(pattern), self._read,
                     notes)
        for note in notes:
            self._note(note)
        return sites

    def plan(self, pattern, strategy="jump", action=None, when=None,
             progress=None):
        """What would be done at each site, with the probes that are in.

        -> [SitePlan]. Stops nothing.
        action, when   as in probe(); None: a count
        progress       called with the number of sites done, and of all
        """
        strategies, sites = strategies_of(strategy), self._sites(pattern)
        planner = Planner(self.pid, self._read, len(sites))
        with self._lock:
            planner.keep_only(dict(self._installer.patches))
            watched = self._watched()
        planner.watched = lambda: watched
        action = self._chosen(Count() if action is None else action,
                              strategies)
        specs = {is_return: make_specs(action, when, is_return)
                 for is_return in {site.is_return for site in sites}}

        inside = {is_return: spec._replace(is_inside=True)
                  for is_return, (spec, _) in specs.items()}

        def look(n, site):
            spec, entry = specs[site.is_return]
            return _plan_site(planner, site, strategies, inside[
                site.is_return] if site.offset else spec, n, entry)
        try:
            return planner.settle(_by_address(planner, sites, strategies,
                                              look, progress))
        finally:
            planner.close()

    def _read(self, vaddr, size):
        try:
            return self._tracer.read(vaddr, size)
        except OSError as error:
            raise TraceeGone(
                "read 0x%x of" % vaddr, "pid %d (%s)" % (self.pid, self.comm),
                "nothing that can be read is mapped there: a library that "
                "was closed?" if error.errno == errno.EFAULT
                else error.strerror)

    def _get_modules(self, anew=False):
        if self._modules is None or anew:
            self._identity = program_identity(self.pid)
            self._modules = modules(self.pid)
        return self._modules

    def _sites(self, where):
        """The sites of one or more patterns, each once."""
        sites = collections.OrderedDict()
        for pattern in _patterns(where):
            try:
                found = self.find(pattern)
            except SymbolError as error:
                if not self._follows:
                    raise
                self._note("%s: not yet" % error)
                continue
            for site in found:
                sites.setdefault((site.vaddr, site.is_return), site)
        return list(sites.values())

    # -- probing ------------------------------------------------------------

    def probe(self, where, action, when=None, strategy="jump", timeout=5,
              max_sites=10000, max_rate=None):
        """Arm a probe. -> Probe

        where    a pattern, or a list of them;   action   Count()
        max_rate  hits a second at which an int3 or a debug register of any
                  probe of this target is taken out: see Probe.refused
        A pattern that arms some sites and not others is no error: see
        Probe.refused. Raises ProbeError if none could be armed,
        SymbolError, TraceeGone, UbpTimeout.
        """
        self._check_open("probe")
        check_descriptors("probe", self.pid, _LEAST_DESCRIPTORS - 4)
        strategies = strategies_of(strategy)
        with self._lock:
            if self._is_other or not self._follows and self._has_become():
                raise TraceeGone("probe", self._tracer.name(), "it became "
                                 "another program (exec)", "attach again, or "
                                 "with follow_exec")
            sites = self._sites(where)
            exits = {parse_probe(pattern).is_return
                     for pattern in _patterns(where)}
            if len(exits) > 1:
                raise ProbeError("probe", _where_text(where), "entries and "
                                 "exits in one probe", "use two probes")
            spec, entry = make_specs(self._chosen(action, strategies), when,
                                     True in exits)
            _check_hardware(action, spec, sites, strategies, where)
            if len(sites) > max_sites:
                raise ProbeError(
                    "probe", str(where), "it matches %d functions, more "
                    "than %d" % (len(sites), max_sites), "--max-sites N")
            probe = Probe(self, where, action, spec)
            probe._entry, probe._strategies = entry, strategies
            self._max_rate = min(self._max_rate, max_rate or self._max_rate)
            self._traced += [probe] * (spec.action == "trace")
            if self._planner is None:
                self._planner = Planner(self.pid, self._read, len(sites))
                self._planner.patches = self._installer.patches
                self._planner.watched = self._watched
            self._look([each for each in (spec, entry) if each], strategies,
                       timeout)
            plans = self._plan_all(sites, spec, entry, strategies)
            probe._is_open = self._may_grow(where)
            try:
                self._arm_plans(probe, plans, timeout, (probe,))
            except BaseException:
                self._give_up(probe, timeout)
                raise
            if self._follows and self._guardian is None:
                self._with_ptrace(lambda: None, timeout)
            if self._planner is not None:
                self._planner.keep_only(self._installer.patches)
            if not (probe.sites or self._follows):
                raise _none_armed(where, probe.refused, probe._remedy)
            self._look_after(probe)
            if self._follower is not None:
                self._follower.add(probe, timeout)
            return probe

    def _look_after(self, probe):
        """A probe is armed: begin what goes on until it is taken out."""
        if probe not in self._probes:
            self._probes.append(probe)
        if probe._is_of_stacks or getattr(probe.action, "stack", False):
            self._reader.names      # while it lives
        if probe._is_of_stacks and probe._rings:
            threading.Thread(target=self._keep_collecting, daemon=True,
                             name="ubp-stacks-%d" % self.pid).start()
        if self._watcher is None:
            self._watcher = LibraryWatcher(self, LinkMap(
                self.pid, self._read, self._get_modules()))
            if set(self._watcher.link_map.text()) - {
                    m for module in self._modules for m in module.mapped}:
                self._look_for_libraries()  # loaded since they were listed
        if self._follows and self._parent is None and self._follower is None:
            self._follower = Follower(self)

    def _give_up(self, probe, timeout):
        """Some of a probe could not be armed: its debug registers go, too."""
        was_traced = any(isinstance(part, PtracePart)
                         for part in probe._parts)
        for part in probe._parts:
            part.remove()
        probe._parts = []
        if probe in self._probes:
            self._probes.remove(probe)
        if was_traced:
            self._with_ptrace(lambda: None, timeout)

    def _arm_plans(self, probe, plans, timeout, new=()):
        """Arm what was planned; new: probes to take out if that fails."""
        plans = self._planner.settle(plans)
        if len(plans) > _MOST_REMEMBERED:
            self._planner.forget()
        probe.refused += [plan for plan in plans if not plan.strategy]
        for name in HARDWARE:
            self._arm_hardware(probe, [plan for plan in plans
                                       if plan.strategy == name], timeout)
        good = [plan for plan in plans if plan.strategy in ("jump", "int3")]
        if good:
            check_descriptors("probe", self.pid, _LEAST_TO_ARM)
            signals = self._plan_signals(good, self._get_modules())
            hook = self._plan_hook(probe, good)
            self._with_ptrace(
                lambda: self._arm(probe, good, timeout, hook, signals),
                timeout, new + tuple(hook[:1]) + tuple(signals[:1]))
            if hook and hook[0].sites:
                self._hook = hook[0]
            self._warn_of_jumps(good)

    def _warn_of_jumps(self, plans):
        """Note whose exits do not know `ret`, though it is asked for."""
        names = [site_name(plan.site) for plan in plans
                 if any(map(plan.lacks_ret, plan.all_parts))]
        if names:
            self._note("%s%s may end in a jump to another function, which "
                       "has not returned yet: there ret is a fault, and what "
                       "needs it is dropped" % (
                           names[0], " and %d more" % (len(names) - 1)
                           if len(names) > 1 else ""))

    # -- what a program does about SIGTRAP ------------------------------------

    def _plan_signals(self, plans, among):
        """(Probe, [SitePlan]) of the syscalls in Modules by which it tells,
        if there are to be int3s; what has a patch of ubp already is not
        planned again."""
        if not (self._installer.may_share() and any(
                part.window.is_trap for plan in plans
                for part in plan.all_parts)):
            return ()
        spec, _ = make_specs(SignalCount())
        probe = self._signals
        if probe is None:
            probe = Probe(self, "SIGTRAP", SignalCount(), spec)
            probe._entry, probe._strategies = None, ("int3",)
        known, good = {
            body.plan.site.vaddr
            for patch in self._installer.patches.values()
            for body in patch.bodies if body.probe is probe}, []
        for site in signal_sites(self._planner, among):
            if site.vaddr not in known:
                plan = self._plan(site, spec, 0, 1, None, ("int3",))
                if plan.strategy:
                    good.append(plan)
                else:
                    self._note("what it does about SIGTRAP at %s is seen up "
                               "to 0.1 s late: %s" % (site_name(site),
                                                      plan.why))
        return (probe, good) if good else ()

    def _arm_signals(self, signals, limit):
        """In the worker: put them in; without them it is seen late."""
        try:
            self._installer.install(*signals, limit=limit)
            self._signals = signals[0]
        except ProbeError as error:
            self._note("what it does about SIGTRAP is seen up to 0.1 s late: "
                       "%s" % error)

    def _extend_signals(self, fresh, timeout):
        """The same in libraries that are new: a C library, at its start."""
        if not self._installer.traps() or self._planner is None:
            return
        plans = [body.part_plan for patch in self._installer.patches.values()
                 for body in patch.bodies if patch.window.is_trap]
        signals = self._plan_signals(plans, fresh)
        if signals:
            self._with_ptrace(lambda: self._arm_signals(
                signals, time.monotonic() + timeout), timeout, signals[:1])
            self._planner.keep_only(self._installer.patches)

    def _idle_signals(self, probes):
        """[their Probe] if there is no int3 but of some probes, else []."""
        own, going = self._signals, set(probes)
        return [] if own is None or any(
            patch.window.is_trap and body.probe not in going
            and not isinstance(body.probe.action, _OWN)
            for patch in self._installer.patches.values()
            for body in patch.bodies) else [own]

    # -- the loader's debug hook ---------------------------------------------

    def _plan_hook(self, probe, plans):
        """(Probe, SitePlan) of the hook, if it is wanted and takes one. Not
        where a filter could forbid what its body does."""
        strategies = [name for name in probe._strategies
                      if name not in HARDWARE]
        if (self._hook is not None or not self._uses_hook
                or not probe._is_open or not self._installer.may_share()
                or any(seccomp_mode(tid) != "0"
                       for tid in thread_ids(self.pid))):
            return ()
        every = self._get_modules()
        vaddr = LinkMap(self.pid, self._read, every).hook
        site = vaddr and hook_site(self._planner, every, vaddr)
        if not site or any(part.window.site <= vaddr < part.window.site
                           + part.window.size for plan in plans
                           for part in plan.all_parts):
            return ()               # or one change would undo the other
        action = HookCall(self._meet_hook)
        spec, _ = make_specs(action)
        hook = Probe(self, site.names[0], action, spec)
        hook._entry, hook._strategies = None, strategies
        plan = self._plan(site, spec, 0, 1, None, strategies)
        if not plan.strategy:
            log.debug("the loader's debug hook takes no probe: %s", plan.why)
            return ()
        return hook, plan

    def _may_grow(self, where):
        """May a library be loaded later that patterns mean, too?"""
        return any(can_come_later(parse_probe(pattern), self._get_modules())
                   for pattern in _patterns(where))

    def _meet_hook(self, hit):
        """A thread is in the loader's debug hook, and waits for us."""
        watcher, limit = self._watcher, time.monotonic() + _HOOK_PATIENCE_S
        state = watcher.link_map.state() if watcher else []
        if state is None or self._is_others_tracee():
            return                  # it has only begun; or it is looked at
        #                             when the debugger has gone
        while not self._lock.acquire(timeout=0.01):
            if time.monotonic() > limit or not hit._calls.is_wanted(hit):
                return              # it is looked at soon, all the same
        try:
            watcher = self._watcher
            if watcher is not None and watcher.link_map.differs(state):
                self._look_for_libraries(is_early=True)
        except UbpError as error:
            self._note("while it loaded a library: %s" % error)
        finally:
            self._lock.release()

    def _idle_hook(self, probes):
        """[the hook's Probe] if nobody wants it but some probes, else []."""
        hook = self._hook
        return [] if hook is None or any(
            probe._is_open for probe in self._probes
            if probe not in probes) else [hook]

    def _hush_hook(self):
        """It has a filter now, which could forbid what the hook's body does:
        from now on that passes by, and makes no syscall."""
        with self._lock:
            if self._hook is not None and self._installer.hook_calls:
                self._installer.hook_calls.release({self._hook}, False)

    def _take_hook_out(self, timeout=5):
        """The other probes are left: nobody will answer the loader."""
        hook, own = [self._hook], [
            body for patch in self._installer.patches.values()
            for body in patch.bodies if body.probe is self._hook]
        self._with_ptrace(lambda: self._take_out(hook, timeout), timeout)
        for body in own:
            if body.arena in self._installer.arenas:
                body.arena.mark_gone(body.record)

    def _users_patches(self):
        """The Patches in place, without those that are only ubp's own."""
        return [patch for patch in list(self._installer.patches.values())
                if any(not isinstance(body.probe.action, _OWN)
                       for body in patch.bodies)]

    def _is_others_tracee(self):
        """Does somebody else trace it? Then we cannot."""
        tracer, guardian = tracer_of(self.pid), self._guardian
        return bool(tracer) and not (
            guardian is not None and guardian.process.pid == tracer)

    def _is_time_to_look_again(self):
        return (bool(self._early)
                and time.monotonic() - self._early[0][1] > _RELOCATED_S
                and not self._is_others_tracee())

    def _look_again(self, timeout=5):
        """Plan once more what was not armed in libraries whose loader had
        not relocated them when they were looked at, or that could not be
        stopped then."""
        with self._lock:
            early, self._early = self._early, []
            again = {module for module, _ in early} & set(
                self._modules or ())
            if self._watcher is None or not again or self._is_other:
                return
            for probe in self._probes:
                probe.refused = [plan for plan in probe.refused
                                 if plan.site.module not in again]
            self._extend_all(sorted(again, key=lambda m: m.low), timeout,
                             True)

    def _check_rates(self, seconds):
        """Take out what was hit too often in the last so many seconds."""
        most = self._max_rate
        if most == float("inf"):
            return
        with self._lock:
            self._take_cooled()
            for probe in self._probes:
                for part in probe._parts:
                    for site, reading in part.readings().items():
                        before = self._rates.get((part, site))
                        self._rates[part, site] = reading.hits
                        if (before is not None and site in part.sites
                                and reading.hits - before > most * seconds):
                            part.drop(site)
                            if isinstance(part, PtracePart):
                                self._with_ptrace(lambda: None, 5)
                            self._too_often(probe, SitePlan(
                                site, part.name, None, 0, "", "", ()))

    def _take_cooled(self):
        """Learn which int3s the guardian has taken out."""
        guardian = self._guardian
        if guardian is not None and guardian.is_armed and (
                self._max_rate < float("inf") or self._signals is not None):
            for vaddr in guardian.call("cooled"):
                patch = self._installer.patches.pop(vaddr, None)
                for body in patch.bodies if patch else ():
                    self._too_often(body.probe, body.plan)

    def _too_often(self, probe, plan):
        """Say that a site was taken out, and why."""
        if isinstance(probe.action, _OWN):
            if probe is self._signals and not self._idle_signals([]):
                self._note("what it does about SIGTRAP at %s is seen up to "
                           "0.1 s late: it is called too often for an int3"
                           % site_name(plan.site))
            return
        why = "it was hit more than %d times a second" % self._max_rate
        probe._refuse(plan, "max-rate", why)
        self._note("%s was taken out: %s" % (site_name(plan.site), why))

    def _look_for_libraries(self, timeout=5, is_early=False):
        """Give probes the sites they mean in libraries that are new; forget
        those that went with libraries that are gone.

        is_early   the loader may not have relocated the new ones
        """
        with self._lock:
            if (self._watcher is None or self._is_closed
                    or not self._probes or not self.alive
                    or self._is_other or self._has_become()):
                return
            self._watcher.link_map.note()
            before, asleep = self._modules or [], self._installer.asleep
            self._modules = modules(self.pid, before + list(asleep))
            lost = self._stale_modules() | set(before) - set(self._modules)
            for module in before:
                if module in lost:
                    self._forget(module)
            there = set(before) - lost
            fresh = [m for m in self._modules if m not in there]
            if is_early:
                early = [m for m in fresh if not is_relocated(m, self._read)]
                self._early += [(m, time.monotonic()) for m in early]
                fresh = [m for m in fresh
                         if m not in early or not changes_its_text(m)]
            self._extend_all(fresh, timeout)
            while len(asleep) > _MOST_ASLEEP_MODULES:
                self._retire(asleep.popitem(last=False)[0])

    def _extend_all(self, fresh, timeout, is_again=False):
        """Arm what all probes mean in libraries, or do it later."""
        asleep = self._installer.asleep
        try:
            self._wake([m for m in fresh if m in asleep], timeout)
            for probe in self._probes if fresh else ():
                self._extend(probe, fresh, timeout, is_again)
            if fresh:
                self._extend_signals(fresh, timeout)
        except (AttachError, UbpTimeout):
            self._early += [(m, time.monotonic()) for m in fresh]
            raise
        finally:
            for module in fresh:
                asleep.pop(module, None)

    def _wake(self, back, timeout):
        """Libraries are back where they were: so are their probes."""
        if not back:
            return
        n = self._with_ptrace(lambda: self._installer.wake(
            back, time.monotonic() + timeout), timeout)
        if self._planner is not None:
            self._planner.keep_only(self._installer.patches)
        if n:
            self._note("%s was loaded at %s: %s again" % (
                ", ".join(sorted({module.name for module in back})),
                time.strftime("%H:%M:%S"), plural(n, "site")))

    def _retire(self, module):
        """Give back what a library that is gone holds; results name it."""
        for name in ("build_id", "soname"):     # read while it can be
            getattr(module, name)
        module.close()
        if self._planner is not None:
            self._planner.lose(module)

    def _stale_modules(self):
        """The Modules that were unloaded, and loaded again where they were,
        without their patches."""
        if self._guardian is not None and not self._guardian.is_armed:
            return set()            # its int3s are out for a moment
        seen, stale = set(), set()
        for patch in self._users_patches():
            module = patch.site.module
            if patch.records and module not in seen:
                seen.add(module)
                vaddr, old, new = patch.records[-1][1].patches[-1]
                text = _text_at(self._tracer, vaddr, len(new))
                if (text == old != new
                        and not is_own_page(self.pid, vaddr)):
                    stale.add(module)
        return stale

    def _look_at_text(self, most=64):
        """Note what the program, or another tool, has done to our text or
        memory. Some sites each time: it is to cost next to nothing.
        """
        if self._guardian is not None and not self._guardian.is_armed:
            return
        patches = [patch for patch in self._users_patches()
                   if patch.records]
        first = self._n_looked % max(1, len(patches))
        self._n_looked += most
        for patch in patches[first:first + most]:
            _, old, new = patch.records[-1][1].patches[-1]
            text = self.text_of(patch)
            if text not in (None, old, new) and not self._has_become():
                self._note("the code of %s was changed by the program or "
                           "by another tool: its hits may not be counted "
                           "any more" % site_name(patch.site))
            elif (text == old != new and not patch.window.is_trap
                  and is_own_page(self.pid, patch.site.vaddr)):
                # A guardian that steps aside puts its int3s back itself.
                self._note("another ubp (clean --all), or the program, has "
                           "taken its probes out: what it does since is not "
                           "counted")
        for arena in self._installer.arenas:
            if not (_is_mapped_still(self._tracer, arena)
                    or self._has_become() or not self.alive) and any(
                        self.text_of(patch) == patch.records[-1][1]
                        .patches[-1][2] for patch in patches
                        if patch.records[-1][0] is arena):
                self._note("it has unmapped ubp's memory at 0x%x: a hit of "
                           "what led there ends it" % arena.base)

    def text_of(self, patch):
        """What is now where the last bytes of a patch are, or None."""
        vaddr, _, new = patch.records[-1][1].patches[-1]
        return _text_at(self._tracer, vaddr, len(new))

    def _look_at_children(self):
        """Say once that a child became another program, if one is seen."""
        if (self._follows or self._has_told or self._parent is not None
                or self._follower is not None):
            return
        for pid in _children_since(self.pid, self._began):
            now = program_identity(pid)
            if now and self._identity and now != self._identity:
                self._has_told = True
                self._note("its child %d (%s) became another program (exec), "
                           "which is not probed: --follow-exec does that"
                           % (pid, comm(pid)))
                return

    def _forget(self, module):
        """A library is gone, with the windows in it: nothing is written."""
        patches = self._installer.patches
        gone = [vaddr for vaddr, patch in patches.items()
                if patch.site.module is module]
        asleep = self._installer.asleep[module] = [
            patches.pop(vaddr) for vaddr in gone]
        gone = [patch for patch in asleep if not patch.lends]
        for probe in self._probes:
            for part in probe._parts:
                lost = [site for site in part.sites if site.module is module]
                gone += lost
                for site in lost:
                    part.drop(site)
        if self._planner is not None:
            self._planner.keep_only(patches)
        if gone:
            self._note("%s was unloaded at %s: %d of its sites are gone" % (
                module.name, time.strftime("%H:%M:%S"), len(gone)))

    # -- another program ----------------------------------------------------

    def _has_become(self):
        """Is it another program by now, by exec?"""
        now = self._identity and program_identity(self.pid)
        # If it is still the process: a pid is reused by any other program.
        return (bool(now) and now != self._identity
                and self._tracer.is_same_process())

    def _meet_exec(self, held=None, when=None, timeout=5):
        """It became another program, and what was in the old one is gone.

        held   (stub, entry): the guardian has led it to a waiting_stub
        when   it was let go, time.monotonic()
        """
        with self._lock:
            if self._is_closed or not self._has_become():
                return
            when = time.monotonic() if when is None else when
            if self._guardian is not None:
                try:                # let go of what it had forked before
                    self._guardian.call("rest", timeout, timeout=timeout)
                except UbpError as error:
                    log.debug("%s", error)
                self._guardian.is_armed = False
            n_gone = sum(map(_n_armed, self._probes))
            self._drop_program(timeout)
            text = "it became %s (exec) at %s: %d sites are gone" % (
                self.comm, time.strftime("%H:%M:%S"), n_gone)
            n_before = [len(probe.refused) for probe in self._probes]
            why = self._follows and _unfit_to_follow(self.pid)
            if why:
                self._follows = False
                text += "; it is not followed any further: " + why
            if self._follows:
                self._follow(held, timeout)
                text += ", %d armed %s" % (
                    sum(map(_n_armed, self._probes)),
                    "before its entry point" if held else "%.0f ms later: "
                    "what it called until then is not counted" % (
                        1e3 * (time.monotonic() - when)))
                refused = [plan for probe, n in zip(self._probes, n_before)
                           for plan in probe.refused[n:]]
                if refused:
                    text += "; %d refused, the first: %s" % (
                        len(refused), refused[0].why)
            else:
                self._is_other = True
            self._note(text)

    def _drop_program(self, timeout):
        """Keep what was computed; forget the rest of the old program."""
        clock = self._installer.clock
        for probe in self._probes:
            for part in probe._parts:
                for site in list(part.sites):
                    part.drop(site)
                part.remove()
        self._reader.keep(self._traced, clock)
        for arena in self._installer.arenas:
            arena.lose()
        # Nothing is written to where the arenas were: it finds them gone.
        # Children that had inherited them are restored.
        gone = self._probes + [own for own in (self._hook, self._signals)
                               if own is not None]
        self._worker.call(lambda: self._installer.take_out(
            gone, time.monotonic() + timeout), timeout)
        self._hook, self._early = None, []
        self._worker.stop()
        self._gone_modules += self._modules or ()
        self._gone_modules += self._installer.asleep
        if self._planner is not None:
            self._planner.close()
        self.comm, pause_us = comm(self.pid), self._tracer.pause_us
        tracer = Tracer(self.pid)
        tracer.may_suspend, tracer.pause_us = (self._tracer.may_suspend,
                                               pause_us)
        tracer.birth = self._tracer.birth       # exec changes it not
        self._begin(tracer)
        self._installer.clock = clock
        self._identity = program_identity(self.pid)

    def _follow(self, held, timeout):
        """Arm what the probes mean in the program that it became.

        held   (stub, entry): the guardian has led it to a waiting_stub, and
               sends it on when this is done
        """
        limit = time.monotonic() + timeout
        while held and time.monotonic() < limit and self.alive and not (
                _is_waiting(self.pid, held[0])):
            time.sleep(0.0002)
        every = self._get_modules(True)
        self._name_modules(every)
        self._planner = Planner(self.pid, self._read)
        self._planner.patches = self._installer.patches
        self._planner.watched = self._watched
        for probe in self._probes:
            self._put_in(probe, every, timeout)
            if self._parent is not None:
                probe._shown._add_refused(probe.refused)
        link_map = LinkMap(self.pid, self._read, every)
        if self._watcher is None:
            self._watcher = LibraryWatcher(self, link_map)
        self._watcher.link_map = link_map
        if self._parent is not None and _is_tracer(every) and not (
                self._installer.traps() or self._traced_parts()):
            self._follows = False       # its children are its own
        elif self._guardian is None or not self._guardian.is_armed:
            self._with_ptrace(lambda: None, timeout)

    def _name_modules(self, every):
        """Have what these modules' sites tell named as of this program."""
        namer = (self._parent or self)._namer
        naming = namer and namer(self.pid, every)
        for module in every:
            module.naming = naming

    def _put_in(self, probe, every, timeout):
        """Arm what a probe means in modules of a program that is new."""
        probe._is_open = self._may_grow(probe.where)
        try:
            sites = self._sites_in(probe, every, True)
            if sites:
                self._look([each for each in (probe._spec, probe._entry)
                            if each], probe._strategies, timeout)
                self._arm_sites(probe, sites, timeout)
        except (ProbeError, SymbolError) as error:
            self._note(str(error))

    # -- a child of the target ----------------------------------------------

    def _enter(self, held, timeout=5):
        """Probe a child as its parent is, now that it is another program."""
        parent = self._parent
        self._max_rate, self._tracer.may_suspend = (
            parent._max_rate, parent._tracer.may_suspend)
        self._installer.clock = parent._installer.clock
        for probe in list(parent._probes):
            self._twin(probe)
        self._follow(held, timeout)
        for twin in list(self._probes):
            self._look_after(twin)

    def _twin(self, probe):
        """A Probe here that does what one of the parent's does. -> it"""
        twin = Probe(self, probe.where, probe.action, probe._spec)
        twin._entry, twin._strategies = probe._entry, probe._strategies
        twin._shown = probe
        probe._kin = probe._kin[0] + (twin,), probe._kin[1]
        self._probes.append(twin)
        self._traced += [twin] * (probe._spec.action == "trace")
        return twin

    def _add(self, probe, timeout):
        """A probe that the parent has got since."""
        twin = self._twin(probe)
        self._put_in(twin, self._get_modules(), timeout)
        self._look_after(twin)

    def _bury(self, children):
        """It has ended, and all that it forked: keep what they counted.

        children   {pid: Target} that it is to be taken from
        -> the inodes of its arenas
        """
        with self._lock:
            parent, arenas = self._parent, self._installer.arenas
            clock, hook = self._installer.clock, self._hook
            if hook is not None:
                self._installer.hook_calls.release({hook}, False)
                self._hook = None
            probes = list({id(each): each for each
                           in self._probes + self._traced}.values())
            for part in [part for each in probes for part in each._parts]:
                part.remove()
            self._reader.keep(self._traced, clock)
            with parent._merging:
                events = self._read_events(True)
                for event in events:        # its files are closed then
                    if event.site.module.naming is not None:
                        event.site.module.naming.learn(event)
                parent._ended_events += events
                children.pop(self.pid, None)
            parent._worst_pause_us = max(parent._worst_pause_us,
                                         self._tracer.pause_us)
            for arena in arenas:
                if arena.memory is not None:
                    arena.mark_left()
                arena.lose()
            inodes = {arena.inode for arena in arenas} - {0}
            for probe in probes:
                probe._is_removed = True
                probe._shown._inherit(probe)
            for arena in arenas:
                arena.close()
            arenas.clear()
            self._installer.patches.clear()
            self._probes, self._traced, self._is_closed = [], [], True
            self._let_go()
            return inodes

    def _extend(self, probe, fresh, timeout, is_again=False):
        """Arm what a probe's patterns mean in libraries that are new.

        is_again   they were looked at before
        """
        sites = self._sites_in(probe, fresh, False)
        if not sites:
            return
        if self._planner is None:
            self._planner = Planner(self.pid, self._read)
            self._planner.patches = self._installer.patches
            self._planner.watched = self._watched
            self._planner.offers = self._installer.offers
        n_before = len(probe.sites)
        self._arm_sites(probe, sites, timeout)
        n = len(probe.sites) - n_before
        if n or not is_again:
            self._note("%s was loaded at %s: %s more" % (
                ", ".join(sorted({site.module.name for site in sites})),
                time.strftime("%H:%M:%S"), plural(n, "site")))

    def _sites_in(self, probe, fresh, is_other):
        """What a probe's patterns mean in new modules. -> [Site]

        is_other   they are of another program: memory is watched there, too
        """
        sites = collections.OrderedDict()
        new = set(fresh)
        known = [plan.site for plan in probe.refused]
        known += [body.plan.site for patch in self._users_patches()
                  for body in patch.bodies if body.probe is probe]
        known += [site for part in probe._parts for site in part.sites]
        known = {(site.vaddr, site.is_return) for site in known
                 if site.module in new}
        for spec in map(parse_probe, _patterns(probe.where)):
            if spec.vaddr is None and (is_other or not spec.watch):
                try:
                    found = find(fresh, spec, self._read)
                except SymbolError as error:
                    log.debug("%s", error)
                    continue
                sites.update(((site.vaddr, site.is_return), site)
                             for site in found if (
                                 site.vaddr, site.is_return) not in known)
        return list(sites.values())

    def _arm_sites(self, probe, sites, timeout):
        """Arm a probe at more sites."""
        first = len(probe.sites) + len(probe.refused)
        plans = [self._plan(site, probe._spec, first + n, 2, probe._entry,
                            probe._strategies)
                 for n, site in enumerate(sites)]
        self._arm_plans(probe, plans, timeout)
        self._planner.keep_only(self._installer.patches)

    def _arm_hardware(self, probe, plans, timeout):
        """Debug registers for plans: for all of them, or none."""
        if not plans:
            return
        taken = self._watched()
        sites = [part.site for plan in plans for part in plan.all_parts]
        if len(taken + sites) > N_DEBUG_REGISTERS:
            raise no_register_left(probe.where, taken, sites)

        def in_pause(action):
            self._worker.call(lambda: self._tracer.pause(
                action, timeout, "arm"), timeout)
        is_traced = plans[0].strategy == PtracePart.name
        part = functools.partial(
            PtracePart, fetch=self._fetch) if is_traced else HardwarePart
        part = part(
            plans, probe._spec, self._tracer, self._insn_before, probe._entry,
            probe._add_stack if probe._is_of_stacks else None)
        if probe._is_of_stacks:
            part._depth = probe.action.depth
            part.names = lambda: self._reader.names
        try:
            part.arm(in_pause)
        except OSError as error:
            raise no_register_left(probe.where, taken, sites, error)
        probe._parts.append(part)
        if is_traced:
            self._arm_watches(probe, part, timeout)
        probe.sites += [site for site in part.sites
                        if site not in probe.sites]
        for note in part.notes:
            self._note(note)

    def _watched(self):
        """The Sites of all debug registers that our probes have."""
        return [site for probe in self._probes for part in probe._parts
                for site in part.taken]

    def _arm_watches(self, probe, part, timeout):
        """Have the guardian set the debug registers of a new part, too."""
        if probe not in self._probes:
            self._probes.append(probe)
        try:
            self._with_ptrace(lambda: None, timeout)
        except BaseException:
            probe._parts.remove(part)
            part.remove()
            raise
        self._note("its debug registers are set by ptrace: the guardian (pid "
                   "%d) traces it, and if that is killed by kill -9, too, "
                   "they stay, and the next hit kills it"
                   % self._guardian.process.pid)

    def _traced_parts(self):
        return [part for probe in self._probes for part in probe._parts
                if isinstance(part, PtracePart)]

    def _fetch(self):
        """Hand what the guardian tells of debug registers to the parts."""
        with self._fetching:
            guardian = self._guardian
            try:
                if guardian is not None:
                    found = guardian.call("watched")
                    for part in self._traced_parts():
                        part.feed(*found)
            except (ProbeError, OSError) as error:
                log.debug("%s", error)

    def _insn_before(self, vaddr):
        """The Insn that ends at vaddr, or None where nothing tells."""
        if vaddr not in self._insns:
            self._insns[vaddr] = None
            for module in self._modules or ():
                if module.low < vaddr <= module.high:
                    self._insns[vaddr] = _last_insn(module, vaddr)
        return self._insns[vaddr]

    def _with_ptrace(self, function, timeout, new=()):
        """Call function() in the worker, with no guardian tracing. -> result

        Then the guardian writes the int3s that are wanted from now on; if
        it cannot, the new probes are taken out.
        """
        guardian, n, began = self._guardian, 0, time.monotonic()
        if guardian is not None and guardian.is_armed:
            n = self._rest(timeout) * bool(self._installer.traps())
        result = self._worker.call(function, timeout)
        try:
            self._arm_traps(timeout)
        except BaseException:
            self._worker.call(lambda: self._take_out(new, timeout), timeout)
            raise
        if n and self._guardian is not None:
            self._note("its int3 probes were out for %.0f ms while others "
                       "came or went%s" % (
                           1e3 * (time.monotonic() - began),
                           ", and stay out of what it had forked"
                           if n > 1 else ""))
        return result

    def _rest(self, timeout):
        """Have the guardian let go. -> of how many processes it did"""
        guardian = self._guardian
        try:
            pause_us, n, is_late = guardian.call("rest", timeout,
                                                 timeout=timeout)
        except GuardianGone:
            self._worker.call(lambda: self._put_back(timeout), timeout)
            return 1
        guardian.is_armed = False
        if is_late and not (self._follows or guardian.is_shared):
            self._guardian = None   # what is in vfork it lets go as it ends
            guardian.close(timeout)
        self._tracer.pause_us = max(self._tracer.pause_us, pause_us)
        return n

    def _put_back(self, timeout):
        """In the worker: the guardian was killed. Take its int3s out before
        a thread runs into one."""
        guardian, self._guardian = self._guardian, None
        self._note("the guardian of its int3s (pid %d) was killed: the next "
                   "hit could have killed it" % guardian.process.pid)
        found = [Installed(base, nonce, inode, (), tuple(
            Record(*record) for record in records))
            for base, nonce, inode, records in self._installer.traps()]
        if found:
            restore(self._tracer, found, timeout)
        if self._traced_parts():
            self._tracer.pause(lambda: clear_debug_registers(self._tracer),
                               timeout, "clear")

    def _rescue(self, timeout=5):
        """If the guardian was killed: once more, with another one."""
        with self._lock:
            guardian = self._guardian
            if guardian is None or not guardian.has_ended():
                return
            if self._parent is not None and (
                    self._parent._guardian is None
                    or self._parent._guardian.has_ended()):
                return              # it is for that to start another
            words = {0: "its guardian was terminated", _IGNORES_SIGTRAP:
                     "the program ignores SIGTRAP now"}.get(
                         guardian.process.returncode)
            if words is not None:
                self._guardian = None
                patches = self._installer.patches
                for vaddr in [v for v, p in patches.items()
                              if p.window.is_trap]:
                    for body in patches.pop(vaddr).bodies:
                        body.probe._refuse(body.plan, "guardian",
                                           words)
                self._note(words + ": its int3s are out")
            elif guardian.is_armed:
                self._worker.call(lambda: self._put_back(timeout), timeout)
                self._arm_traps(timeout)

    def _arm_traps(self, timeout):
        """Have the guardian do what is to be done; it comes and goes."""
        traps, watches = self._installer.traps(), [
            watch for part in self._traced_parts() for watch
            in part.watches()]
        if not (traps or watches or self._follows):
            guardian, self._guardian = self._guardian, None
            if guardian is not None:
                guardian.close(timeout)
            return
        if self._guardian is None:
            self._guardian = Guardian(
                self._tracer, self._parent and self._parent._guardian)
        if self._tracer.held:
            self._worker.call(self._hand_over, timeout)
        self._worker.let_late_go()
        refused, pause_us = self._guardian.call(
            "arm", traps, timeout, self._max_rate, self._follows,
            sorted(set(watches)), self._installer.scratch(), sorted(
                vaddr for vaddr, patch in self._installer.patches.items()
                if patch.window.is_trap and all(
                    isinstance(body.probe.action, SignalCount)
                    for body in patch.bodies)), timeout=timeout)
        self._guardian.is_armed = True
        self._tracer.pause_us = max(self._tracer.pause_us, pause_us)
        for vaddr in refused:
            self._note("0x%x: its text changed meanwhile: no int3" % vaddr)

    def _hand_over(self):
        """In the worker: keep a launched program at its entry point by a
        SIGSTOP, not by ptrace. The next thing that it runs into is that.
        """
        syscall(SYS_tgkill, self.pid, self.pid, signal.SIGSTOP)
        self._is_kept = True
        self._tracer.let_go_held()
        limit = time.monotonic() + 1
        while (read_stat(self.pid)[:1] not in (["T"], [])
               and time.monotonic() < limit):
            time.sleep(0.0005)

    def _look(self, specs, strategies, timeout):
        """Ask the target for what bodies of the specs would need of it."""
        installer = self._installer
        if not set(strategies) <= set(HARDWARE) and any(map(wanted_by, specs)):
            self._tracer.starts_raw_threads = _starts_raw_threads(
                self._get_modules())
            for spec in specs:
                self._with_ptrace(lambda: installer.look(
                    spec, time.monotonic() + timeout), timeout)
        if not installer.offers.direct:
            installer.offers = installer.offers._replace(
                direct=_steady_data(self._get_modules()))
        self._planner.offers = installer.offers

    def _plan_all(self, sites, spec, entry, strategies):
        """The SitePlans of a probe's sites."""
        return _by_address(
            self._planner, sites, strategies, lambda n, site: self._plan(
                site, spec, n, len(sites), entry, strategies))

    def _plan(self, site, spec, index, n_sites, entry, strategies):
        """The SitePlan of one of a probe's sites.

        In a table that sites share, the first key is the site's index.
        """
        spec = spec._replace(is_inside=bool(site.offset))
        if n_sites > 1 and ubp_x86.block_layout(spec).kind == "table":
            number = ubp_x86.parse_expression("%d" % index)
            spec = spec._replace(keys=(number,) + spec.keys)
        return _plan_site(self._planner, site, strategies, spec, index, entry)

    def _arm(self, probe, plans, timeout, hook=(), signals=()):
        """In the worker: all of it, or, if that fails, nothing."""
        self._tracer.starts_raw_threads = _starts_raw_threads(
            self._get_modules())
        self._tracer.swaps_contexts = swaps_contexts(self._get_modules())
        self._installer.install(probe, plans, time.monotonic() + timeout,
                                hook)
        if signals:
            self._arm_signals(signals, time.monotonic() + timeout)
        self._warn_of_seccomp()

    # -- events -------------------------------------------------------------

    def events(self, timeout=None):
        """Iterate the Events of all Trace probes, in time order.

        Ends when none came for timeout seconds, when the target has ended,
        or no Trace probe is left; None: only then. 0: what is there now.
        """
        waited = time.monotonic()
        while True:
            is_last = not self.alive or all(
                probe._is_removed or probe._is_of_stacks
                for probe in self._traced)
            found = self.read_events(is_last)
            yield from found
            if found:
                waited = time.monotonic()
            elif is_last or timeout is not None and (
                    time.monotonic() - waited >= timeout):
                return
            else:
                time.sleep(0.005)

    def read_events(self, is_last=False):
        """The Events that are there now, in time order. -> [Event]

        is_last   also the youngest, which an older one may yet follow
        """
        return self._read_events(is_last)

    def _read_events(self, is_last, make=None):
        """read_events(), some made by make: see RecordForm.events."""
        probes, clock, began = (self._traces(), self._installer.clock,
                                time.time())
        in_rings = [probe for probe in probes if probe._rings]
        found = []
        if in_rings and clock is not None:
            found = self._reader.poll(in_rings, clock, is_last, make)
        now = int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1e9)
        for probe in probes:
            for part in probe._parts:
                found += part.take_events(
                    probe, 1 << 62 if is_last else now - 10**6)
        if self._follower is not None:
            return self._merged_events(found, began, is_last, make)
        return sorted(found, key=_time_of) if probes != in_rings else found

    def _merged_events(self, found, began, is_last, make):
        """What the target and its children have recorded, in time order.

        began   time.time() when the first of them was looked at; what is
                younger waits for the next look
        """
        with self._merging:
            for child in self._children():
                found += child._read_events(is_last, make)
            found += self._ended_events + self._young_events
            found.sort(key=_time_of)
            n = len(found) if is_last else bisect.bisect_left(
                found, (1e9 * began - _YOUNG_NS,))
            self._ended_events, self._young_events = [], found[n:]
            return found[:n]

    def _traces(self):
        """The Trace probes, those taken out too."""
        return [probe for probe in self._traced
                if (probe._rings or probe._parts)
                and not probe._is_of_stacks]

    def _collect(self):
        """Take what Stack probes have copied out of their rings."""
        probes = [probe for probe in self._traced
                  if probe._rings and probe._is_of_stacks]
        if probes and self._owner == os.getpid():
            self._reader.collect(probes)

    def _keep_collecting(self):
        """A thread's: a ring holds few copies, so look again and again."""
        while any(probe._is_of_stacks and not probe._is_removed
                  for probe in self._traced) and self.alive:
            self._collect()
            time.sleep(0.004)

    def _chosen(self, action, strategies):
        """The action, with the way to unwind stacks if that was left open:
        by frame pointers only where all code has them."""
        if not isinstance(action, Stack) or action.unwind:
            return action
        is_fp = not (self._follows or set(strategies) & set(HARDWARE)) and all(
            has_frame_pointers(module) is not False
            for module in self._get_modules()
            if module.text and module.name != VDSO)
        return Stack(action.depth, action.sum, "fp" if is_fp else "cfi")

    def _warn_of_seccomp(self):
        if (read_status(self.pid).get("Seccomp", "0") != "0"
                and not all(arena.slack for arena in self._installer.arenas)):
            self._note("it has a seccomp filter, which was found to allow "
                       "what ubp injects; removal injects munmap")

    def _note(self, text):
        if text not in self.notes:
            self.notes.append(text)

    # -- taking out ---------------------------------------------------------

    def _remove(self, probes, timeout):
        """Take out probes that are still in; [] takes out what has none."""
        self._check_process("remove a probe from")
        check_descriptors("take probes out of", self.pid, _LEAST_TO_REMOVE)
        for calls in (self._installer.calls, self._installer.hook_calls):
            if calls is not None:
                calls.let_own_go()
        with self._lock:
            try:
                self._take_cooled()
            except GuardianGone as error:       # it is asked again, below
                log.debug("%s", error)
            probes = (probes + self._idle_hook(probes)
                      + self._idle_signals(probes))
            traps, others = self._sites_only_of(probes)
            removal = self._with_ptrace(
                lambda: self._take_out(probes, timeout), timeout)
            self.removal += removal
            if traps and self.alive and not self._has_become():
                # Those the guardian has put back.
                pages = {v & -PAGE for v in traps} - {
                    v & -PAGE for v in others}
                pages = _pages_of_text(self.pid, pages)
                self.removal += Removal(
                    len(traps), len(pages), _n_equal(self._tracer, pages),
                    0, (self.pid,), ())
            if self._follower is not None:
                self.removal += self._follower.remove(probes, timeout)
            if self._is_closed:
                self._worker.stop()

    def _sites_only_of(self, probes):
        """What has a patch for no other probe. -> ([int3s], [jumps])"""
        gone, found = set(probes), ([], [])
        for patch in self._installer.patches.values():
            if patch.records and all(
                    body.probe in gone for body in patch.bodies) and any(
                        not isinstance(body.probe.action, SignalCount)
                        for body in patch.bodies):
                found[not patch.window.is_trap].append(patch.window.site)
        return found

    def _take_out(self, probes, timeout):
        """In the worker: restore every process, then forget the probes."""
        for probe in probes:
            for part in probe._parts:
                part.remove()
        total = self._installer.take_out(probes, time.monotonic() + timeout)
        for probe in probes:
            probe._is_removed = True
            if probe in self._probes:
                self._probes.remove(probe)
            if probe is self._hook:
                self._hook = None
            if probe is self._signals:
                self._signals = None
        if self._planner is not None:
            self._planner.keep_only(self._installer.patches)
        return total

    def run(self):
        """Let a launched program go on from its entry point."""
        if self._tracer.held:
            self._check_process("start")
            self._worker.call(self._tracer.let_go_held, 5)
        elif self._is_kept:
            self._is_kept = False
            os.kill(self.pid, signal.SIGCONT)

    def detach(self):
        """Leave the probes in place and let go. May be repeated.

        read() goes on reading; status() and clean() find them too. Where
        there are int3s their guardian stays and traces the target, until
        that ends or clean() comes: a kill -9 of it makes the next hit kill
        the target. Raises ProbeError if a debug register is used.
        """
        self._check_process("detach from")
        if any(isinstance(probe.action, Call) for probe in self._probes):
            raise ProbeError("detach from", "pid %d (%s)" % (
                self.pid, self.comm), "the function of a Call runs in this "
                "process", "remove() those probes first")
        if self._follower is not None:
            self._follower.stop()
        for child in self._children():
            child.detach()
        self._stop_following()
        if any(probe._parts for probe in self._probes):
            raise ProbeError("detach from", "pid %d (%s)" % (
                self.pid, self.comm), "debug registers end with the process "
                "that set them", "remove() those probes first")
        with self._lock:
            if not self._is_closed:
                if self._hook is not None:
                    self._take_hook_out()
                for arena in self._installer.arenas:
                    arena.mark_left()
                guardian, self._guardian = self._guardian, None
                if guardian is not None:
                    guardian.stay()
                self._is_closed = True
                self.run()
                self._let_go()

    def close(self, timeout=5):
        """Take out this target's probes and let go. May be repeated.

        Raises UbpTimeout if they could not be taken out in time; then it
        may be called again.
        """
        if self._is_closed or self._owner != os.getpid():
            return
        with self._lock:
            try:
                if self._follower is not None:
                    self._follower.stop()
                    self.removal += self._follower.close(timeout)
                self._stop_following()
                if self._installer.arenas or self._probes:
                    self._remove(list(self._probes), timeout)
                self._is_closed = not self._installer.arenas
            finally:
                self.run()
                self._let_go()

    def _remains(self):
        """What is left in it after a close() that failed, in words."""
        n = sum(self.text_of(patch) == patch.records[-1][1].patches[-1][2]
                for patch in self._users_patches() if patch.records)
        return ("keeps its probes at %s" % plural(n, "site") if n else
                "is rid of its probes, but ubp's memory is still mapped")

    def _stop_following(self):
        """Let an exec end the probes; a guardian for int3s goes on."""
        if self._follows:
            with self._lock:
                self._follows = False
                if self._guardian and not self._installer.traps():
                    self._with_ptrace(lambda: None, 5)

    def _let_go(self):
        """Give back the thread and the descriptors; they can come again."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.stop()
        guardian = self._guardian
        if guardian is not None and not guardian.is_armed:
            self._guardian = None       # what it was to do was refused
            guardian.close()
        self._worker.stop()
        for module in (list(self._modules or ()) + self._gone_modules
                       + list(self._installer.asleep)):
            module.close()
        if self._planner is not None:
            self._planner.close()
        self._modules = self._planner = None

    def _check_process(self, what):
        if self._owner != os.getpid():
            raise ProbeError(what, "pid %d (%s)" % (self.pid, self.comm),
                             "this is a forked child of the process that "
                             "attached")

    def _check_open(self, what):
        self._check_process(what)
        if self._is_closed:
            raise ProbeError(what, "pid %d (%s)" % (self.pid, self.comm),
                             "the target is closed")


def _plan_site(planner, site, strategies, spec=_PLAIN_COUNT, index=0,
               entry=None):
    """The SitePlan of the first strategy that does not refuse a site."""
    refused = None
    in_text = [name for name in strategies if name not in HARDWARE]
    for name in strategies:
        if name in HARDWARE:
            plan = _plan_hardware(planner, site, spec, entry, name)
        elif not in_text:
            continue
        else:
            plan, in_text = planner.plan(site, spec, index, entry,
                                         in_text), ()
        if plan.strategy:
            return plan
        refused = refused or plan
    return refused


def _check_hardware(action, spec, sites, strategies, where):
    """Refuse walks that hw cannot do, and old and new without a watch."""
    if (isinstance(action, Stack) and set(strategies) & set(HARDWARE)
            and action.unwind == "fp"):
        raise ProbeError("walk stacks of", _where_text(where), "by hw they "
                         "are unwound from copies", "--unwind cfi")
    used = frozenset().union(*(each.names for each in (spec.when,)
                               + spec.keys + spec.values if each))
    if used & set(ubp_x86.WATCH_NAMES) and not all(map(is_watch, sites)):
        raise ProbeError("probe", _where_text(where), "old and new are the "
                         "values of memory that is watched: mem:SYMBOL",
                         "--strategy hw")


def _last_insn(module, vaddr):
    """The Insn of a function that ends at vaddr, or None."""
    bounds = module.bounds(vaddr - 1)
    if bounds is None or vaddr - bounds[0] > 1 << 20:
        return None
    code, at = module.read_file(bounds[0], vaddr - bounds[0]), 0
    try:
        while at < len(code):
            insn = ubp_x86.decode(code[at:at + 15], bounds[0] + at)
            at += insn.size
    except DecodeError:
        return None
    return insn if at and at == vaddr - bounds[0] else None


def _plan_hardware(planner, site, spec, entry, name):
    """The SitePlan of a debug register, or of those of all exits."""
    def refused(rule, why):
        return SitePlan(site, "", None, 0, rule, why, ())

    plan = SitePlan(site, name, None, 0, "", "", (), spec)
    if spec.action == "call":
        return refused("hw", "a function cannot be waited for at a debug "
                       "register: there is no trampoline to do it in")
    try:
        if not spec.is_exit:
            planner.watch([site.vaddr])
            return plan
        leaves = planner.exits(site, entry)
    except RefusalError as refusal:
        return refused(refusal.rule, refusal.why)
    for leave in leaves:
        if leave.is_conditional:
            return refused("hw", "a debug register does not tell whether the "
                           "tail jump at 0x%x is taken" % leave.vaddr)
        if ubp_x86.uses_ret(spec) and not leave.is_ret:
            return refused("hw", "its exit at 0x%x is a jump to another "
                           "function: what that returns is not known there"
                           % leave.vaddr)
    n = len(leaves) + (entry is not None)
    if n > N_DEBUG_REGISTERS:
        return refused("hw", "%s%s would take %d debug registers of %d" % (
            plural(len(leaves), "exit"), " and its entry" if entry else "",
            n, N_DEBUG_REGISTERS))
    vaddrs = [site.vaddr] * (entry is not None) + [
        leave.vaddr for leave in leaves]
    try:
        planner.watch(vaddrs)
    except RefusalError as refusal:
        return refused(refusal.rule, refusal.why)
    return plan._replace(parts=tuple(plan._replace(site=site._replace(
        vaddr=vaddr, offset=vaddr - site.vaddr)) for vaddr in vaddrs))


def _patterns(where):
    """The patterns that a user asked to be probed. -> [text]"""
    return [where] if isinstance(where, str) else list(where)


def _unfit_to_follow(pid):
    """Why what a target has become cannot be probed, or ""."""
    try:
        check_target(pid)
    except AttachError as error:
        return error.why
    return ""


def _has_lost_privilege(pid):
    """Is its file setuid or setgid, and has that had no effect?

    execve(2): it has none while somebody without CAP_SYS_PTRACE traces it.
    """
    try:
        info = os.stat("/proc/%d/exe" % pid)
    except OSError:
        return False
    status = read_status(pid)
    for bit, name, owner in ((stat.S_ISUID, "Uid", info.st_uid),
                             (stat.S_ISGID, "Gid", info.st_gid)):
        ids = status.get(name, "").split()
        if info.st_mode & bit and len(ids) > 1 and int(ids[1]) != owner:
            return True
    return False


def _is_tracer(all_modules):
    """Does a program trace others? It imports ptrace: gdb, strace."""
    return any(b"\0ptrace\0" in bytes(module.elf.dynsym.strings)
               for module in all_modules if module.is_exe)


def _n_armed(probe):
    """How many sites of a probe are in place."""
    patches = probe._target._installer.patches.values()
    return len({body.plan.site for patch in patches for body in patch.bodies
                if body.probe is probe}) + sum(
                    len(part.sites) for part in probe._parts)


def program_identity(pid):
    """What tells a program from what it becomes by exec; b"": not known.

    Its auxiliary vector: where the kernel has put the program, the loader,
    the vdso and 16 random bytes, proc(5) and getauxval(3).
    """
    return read_proc("/proc/%d/auxv" % pid)


def _by_address(planner, sites, strategies, plan, progress=None):
    """[plan(n, site)] in the order of sites, but made in that of addresses:
    a site can share the window of one before it."""
    made = {}
    order = sorted(range(len(sites)), key=lambda n: sites[n].vaddr)
    with Foresight(planner, [sites[n] for n in order] if "jump" in strategies
                   else ()) as foresight:
        for n in order:
            foresight.reach(len(made))
            made[n] = plan(n, sites[n])
            if progress is not None:
                progress(len(made), len(sites))
    return [made[n] for n in range(len(sites))]


def _none_armed(where, refused, remedy=""):
    where = _where_text(where)
    why = refused[0].why if refused else "no site"
    if len(refused) > 1:
        why = "%d sites, all refused; the first: %s" % (len(refused), why)
    return ProbeError("probe", where, why,
                      remedy or "plan shows every reason")


def site_name(site):
    """function, or function+0xOFFSET."""
    name = site.function.name if site.function else "0x%x" % site.vaddr
    return name + ("+0x%x" % site.offset if site.offset else "")


def _by_reach(plans):
    """Plans in groups that one arena can serve: a module, or neighbours."""
    groups = []
    for plan in sorted(plans, key=lambda plan: plan.window.site):
        site = plan.window.site
        if groups and site - groups[-1][0].window.site < 1 << 29:
            groups[-1].append(plan)
        else:
            groups.append([plan])
    return groups


def _steady_data(all_modules):
    """[low, high) of data that is there as long as the process.

    The program's own writable segments: no library that may be unloaded.
    """
    return tuple((module.bias + load.vaddr, module.bias + load.vaddr
                  + load.size) for module in all_modules if module.is_exe
                 for load in module.elf.loads if load.flags & PF_W)


def _starts_raw_threads(all_modules):
    """May threads exist without the C library's thread block?

    A static or Go program, or a module that imports clone.
    """
    return not has_c_library(all_modules) or imports(all_modules, "clone")


def _restore_everywhere(tracer, arenas, limit, last_look=lambda: None):
    """Restore a process and all that inherited arenas of it. -> Removal

    arenas   [Installed]. Children are found by the inodes of their memfds,
    or in private memory by what is in it, to a fixpoint: one may fork while
    another is restored. What stands in the way in the process itself is
    raised when its children are done.
    """
    total, seen, failed = Removal(0, 0, 0, 0, (), ()), set(), None
    pending, inodes = {tracer.tgid: arenas}, {a.inode for a in arenas}
    while pending:
        for pid, there in pending.items():
            seen.add(pid)
            each = tracer if pid == tracer.tgid else Tracer(pid)
            each.may_suspend = tracer.may_suspend
            try:
                part = _restore_one(each, there, limit, last_look)
            except UbpError as error:
                part = Removal(0, 0, 0, 0, (pid,), (str(error) if isinstance(
                    error, MemoryStays) else "pid %d keeps its probes: %s"
                    % (pid, error),))
                failed = error if each is tracer else failed
            total += part
            if each is not tracer:
                tracer.others.append(each)
                tracer.pause_us = max(tracer.pause_us, each.pause_us)
        pending = {}
        for inode in inodes - {0}:
            for pid in processes_with(inode):
                if pid not in seen:
                    pending.setdefault(pid, []).extend(
                        a for a in arenas if a.inode == inode)
        for arena in arenas:
            for pid in (processes_with_nonce(arena.base, arena.nonce)
                        if not arena.inode else ()):
                if pid not in seen:
                    pending.setdefault(pid, []).append(arena)
    if failed is not None:
        raise failed                # may be repeated when it is free again
    return total


def _restore_one(tracer, arenas, limit, last_look):
    """-> Removal of one process; what stands in the way is a note."""
    timeout = max(0.5, limit - time.monotonic())
    try:
        done = restore(tracer, arenas, timeout, last_look)
    except TraceeGone as error:
        has_ended = (not tracer.is_same_process()
                     or is_zombie(tracer.tgid))
        return Removal(0, 0, 0, 0, (), () if has_ended else (str(error),))
    notes = ["%s:%s of pid %d was changed by another tool; its bytes and "
             "its trampoline are left as they are" % (
                 record.module, record.function, tracer.tgid)
             for record in done.foreign]
    if done.was_gone:
        notes.append("pid %d has unmapped ubp's memory itself: what it "
                     "counted since is lost" % tracer.tgid)
    n_arenas = sum(bool(a.ranges) for a in arenas) if done.unmapped else 0
    return Removal(done.n_restored, len(done.pages),
                   _n_equal(tracer, done.pages), n_arenas,
                   (tracer.tgid,), tuple(notes))


def _pages_of_text(pid, pages):
    """Those of them that are text still: a library may have gone."""
    maps = read_maps(memory_tid(pid))
    return {page for page in pages if any(
        m.start <= page < m.end and "x" in m.perms for m in maps)}


def _n_equal(tracer, pages):
    """How many pages of text equal their files."""
    equal = {}
    try:
        for module in modules(tracer.tgid) if pages else ():
            for low, size, _ in module.text:    # lld begins it in a page
                for page in pages:
                    start, end = max(page, low), min(page + PAGE, low + size)
                    if start < end:
                        equal[page] = equal.get(page, True) and (
                            module.read_file(start, end - start)
                            == tracer.read(start, end - start))
            module.close()
    except (UbpError, OSError) as error:
        log.debug("cannot compare %s with its files: %s", pages, error)
    return sum(equal.values())


def processes_with(*inodes):
    """The pids of processes that map one of these memfds of ubp. -> [pid]"""
    needles, found = [b" %d " % inode for inode in inodes if inode], []
    for pid in _process_ids() if needles else ():
        # All processes are asked: most have no need of memory_tid().
        text = (read_proc("/proc/%d/maps" % pid)
                or read_proc("/proc/%d/maps" % memory_tid(pid)))
        if any(needle in text for needle in needles) and any(
                m.inode in inodes and m.path == _MEMFD_PATH
                and "x" in m.perms for m in read_maps(memory_tid(pid))):
            found.append(pid)
    return found


# -- launching --------------------------------------------------------------

_JOB_STOPS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


class _Child:
    """A program that we started, held by a pipe until it is traced."""

    def __init__(self, argv):
        self.argv = argv
        self.path = _find_program(argv[0])
        self._status = None
        self.stopped_by = 0         # the signal, until somebody has seen it
        go_read, self._go = os.pipe()
        self._error, error_write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _become(self.path, argv, (go_read, error_write),
                    (self._go, self._error))
        os.close(go_read)
        os.close(error_write)

    def give_up(self):
        """Let it end instead."""
        os.close(self._go)
        os.close(self._error)
        limit = time.monotonic() + 1
        while self.poll() is None and time.monotonic() < limit:
            time.sleep(0.001)

    def go(self):
        """Let it exec. It stops there if it is traced for that."""
        os.write(self._go, b"g")
        os.close(self._go)

    def exec_error(self):
        """Why exec failed, an errno; 0 if it did not. After go()."""
        data = os.read(self._error, 4)
        os.close(self._error)
        return struct.unpack("<i", data)[0] if len(data) == 4 else 0

    def poll(self):
        """Its return code, as subprocess has it; None while it runs."""
        if self._status is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                if not read_stat(self.pid):
                    self._status = 0        # reaped by the host
                return self._status
            if pid and (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
                self.note_end(status)
            elif (pid and not status >> 16 and os.WSTOPSIG(status)
                    in _JOB_STOPS and tracer_of(pid) != os.getpid()):
                self.stopped_by = os.WSTOPSIG(status)
        return self._status

    def note_end(self, status):
        """Keep the wait status of its end, whoever has reaped it."""
        self._status = (-os.WTERMSIG(status) if os.WIFSIGNALED(status)
                        else os.WEXITSTATUS(status))


def _become(path, argv, fds, others):
    """In the forked child: wait for the tracer, then exec. Never returns.

    others   the tracer's ends of the pipes: while we have them, too, its
             death is not the end of what we read
    """
    go_read, error_write = fds
    try:
        for fd in others:
            os.close(fd)
        if os.read(go_read, 1) == b"g":
            for signo in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(signo, signal.SIG_DFL)    # Python ignores them
            os.execv(path, argv)
    except OSError as error:
        os.write(error_write, struct.pack("<i", error.errno))
    finally:
        os._exit(127)


def _cannot_run(name, code, why="", hint=""):
    """An AttachError with its errno, for a program that cannot be run."""
    error = AttachError("run", name, why or os.strerror(code), hint)
    error.errno = code
    return error


def _find_program(name):
    """Where execvp(3) would find it. Raises AttachError."""
    folders = [""] if "/" in name else os.get_exec_path() if name else []
    code, why = errno.ENOENT, "not found"
    for path in [os.path.join(folder, name) for folder in folders]:
        if not os.path.isfile(path) or not os.access(path, os.X_OK):
            if os.path.lexists(path):
                code, why = errno.EACCES, "it is not executable"
            continue
        mode = os.stat(path).st_mode
        if mode & (stat.S_ISUID | stat.S_ISGID) and os.geteuid():
            raise _cannot_run(name, errno.EPERM, "it is setuid, and would "
                              "run without its privilege when traced", "sudo")
        return path
    raise _cannot_run(name, code, why)


class Launch:
    """Bring a launched program to its entry point. Runs in the worker.

    The loader is left to do its work: its own way to the program, AT_ENTRY
    on the stack, is led over a stub that makes one harmless syscall, where
    it is stopped. No byte of text changes, and if we die it just goes on.
    """

    def __init__(self, tracer, child=None):
        self.tracer, self.child = tracer, child
        self.tid, self.limit = tracer.tgid, time.monotonic() + 1

    def run(self, timeout):
        """-> 0, or the errno of a failed exec."""
        self.limit = time.monotonic() + timeout
        tid = self.tid
        try:
            ptrace(PTRACE_SEIZE, tid, 0,
                   PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXEC)
        except OSError as error:        # by an strace -f of ours, say
            refusal = _refusal_to_attach(tid, "PTRACE_SEIZE", error)
            self.child.give_up()
            raise refusal
        self.child.go()
        if not self._until(lambda s: s >> 16 == PTRACE_EVENT_EXEC,
                           PTRACE_CONT, start=False):
            return self.child.exec_error()
        self.child.exec_error()
        self.tracer.birth = start_time(tid)
        thread, auxv, entry = self.look()
        if ubp_x86.is_32bit(thread.regs):
            os.kill(tid, signal.SIGKILL)    # none of it has run
            raise AttachError("start", comm(tid), _FOREIGN)
        self.tracer.held = True
        if entry != ubp_x86.program_counter(thread.regs):
            self._through_loader(thread, auxv, entry)
        return 0

    def look(self):
        """In the stop of its exec. -> (Thread, auxv, vaddr of its entry)"""
        thread = Thread(self.tid, self.tid)
        self.tracer.threads = {self.tid: thread}
        self._event_stop(thread)
        self.tracer.maps = read_maps(self.tid)
        auxv = read_proc("/proc/%d/auxv" % self.tid)
        pairs = auxv[:len(auxv) // 16 * 16]     # a 32-bit program has others
        return thread, auxv, dict(struct.iter_unpack("<QQ", pairs)).get(
            AT_ENTRY, 0)

    def entry_word(self, thread, auxv):
        """The vaddr of AT_ENTRY's value on the stack, or 0."""
        low = ubp_x86.stack_pointer(thread.regs)
        end = next((m.end for m in self.tracer.maps
                    if m.start <= low < m.end), low)
        at = self.tracer.read(low, end - low).find(auxv)
        place = struct.pack("<Q", AT_ENTRY)
        field = next((n for n in range(0, len(auxv), 16)
                      if auxv[n:n + 8] == place), -1)
        return 0 if at < 0 or field < 0 else low + at + field + 8

    def map_stub(self):
        """A page of the program for code. -> its vaddr, or -errno"""
        with Injection(self.tracer) as injection:
            return injection.call(
                SYS_mmap, 0, PAGE, PROT_READ | PROT_EXEC,
                MAP_PRIVATE | MAP_ANONYMOUS, -1 & 0xffffffffffffffff, 0)

    def _ended(self):
        """The error for a program that ended before its entry point."""
        code = self.child.poll()
        error = AttachError("run", self.child.argv[0], "it ended before its "
                            "entry point (%s)" % (
                                "exit status %d" % code if code >= 0
                                else "signal %d" % -code))
        error.returncode = code
        return error

    def _until(self, is_wanted, request, start=True, interrupt=False):
        """Resume until a stop is wanted. -> True; False: it ended"""
        signo = 0
        while True:
            if interrupt:
                ptrace(PTRACE_INTERRUPT, self.tid)
            if start:
                ptrace(request, self.tid, 0, signo)
            start, signo, status = True, 0, None
            while status is None:
                status = wait_nohang(self.tid)
                if status is None and time.monotonic() > self.limit:
                    raise UbpTimeout("start", self.tracer.name(),
                                     "it did not reach its entry point")
                if status is None:
                    time.sleep(0.00005)
            if status & 0xff != 0x7f:
                if self.child is not None:
                    self.child.note_end(status)
                return False
            if is_wanted(status):
                return True
            if status >> 16 == 0 and status >> 8 & 0xff not in (
                    SYSCALL_EVENT_SIGNAL, signal.SIGTRAP):
                signo = status >> 8 & 0xff

    def _event_stop(self, thread):
        """From any stop to one in which registers may be changed."""
        self._until(lambda s: s >> 16 == PTRACE_EVENT_STOP, PTRACE_CONT,
                    interrupt=True)
        thread.regs = self.tracer.get_regs(self.tid)
        thread.state = STOPPED

    def _through_loader(self, thread, auxv, entry):
        """Run the loader; stop where it would enter the program."""
        word = self.entry_word(thread, auxv)
        stub = self.map_stub() if word else 0
        if stub <= 0:
            return                  # probes find what is mapped by now
        self.tracer.write_text(stub, ubp_x86.entry_stub(entry))
        write_memory(self.tid, word, struct.pack("<Q", stub))
        if not self._until(self._is_in(stub), PTRACE_SYSCALL):
            self.tracer.held = False
            self.tracer.threads.clear()
            raise self._ended()
        write_memory(self.tid, word, struct.pack("<Q", entry))
        self._event_stop(thread)
        thread.regs = ubp_x86.at_entry(thread.regs, entry)
        self.tracer.set_regs(self.tid, thread.regs)
        self.tracer.maps = read_maps(self.tid)
        with Injection(self.tracer) as injection:
            injection.call(SYS_munmap, stub, PAGE)

    def _is_in(self, stub):
        def is_wanted(status):
            return (status >> 8 == SYSCALL_EVENT_SIGNAL
                    and stub <= ubp_x86.program_counter(
                        self.tracer.get_regs(self.tid)) < stub + PAGE)
        return is_wanted


# Who has to hold a program that a target becomes by exec is the guardian;
# who arms it is the front end. So it is led to a stub, as a launched one
# is, but waits there untraced, for a limited time.

_REGISTER_SAMPLE = 64           # threads that clean asks for their registers
_STUB_WAIT_S = 5                # for a front end that does not come


def hold_at_entry(tgid):
    """Lead a program to a waiting_stub. -> (its vaddr, the entry), or None

    In the stop of its exec; what traces it detaches next.
    """
    tracer = Tracer(tgid)
    launch_ = Launch(tracer)
    thread, auxv, entry = launch_.look()
    if ubp_x86.is_32bit(thread.regs) or not entry:
        return None                 # what the front end refuses
    word = 0
    if entry != ubp_x86.program_counter(thread.regs):
        word = launch_.entry_word(thread, auxv)
        if not word:
            return None
    stub = launch_.map_stub()
    if stub < 0:
        return None
    tracer.write_text(stub, ubp_x86.waiting_stub(entry, word, _STUB_WAIT_S))
    if word:
        write_memory(tgid, word, struct.pack("<Q", stub))
    else:
        tracer.set_regs(tgid, ubp_x86.at_entry(thread.regs, stub))
    tracer.close()
    return stub, entry


def _is_waiting(pid, stub):
    """Does a program sleep in its waiting_stub?"""
    words = read_proc("/proc/%d/syscall" % pid).split()
    return len(words) == 9 and stub <= int(words[8], 16) < stub + PAGE


def release_at_entry(tracer, stub, timeout):
    """Have the program in a waiting_stub enter, and unmap that."""
    def action():
        code = tracer.read(stub, 256)
        entry = ubp_x86.waiting_stub_entry(code)
        if entry is None:
            return                  # it is not there any more
        inside = [thread for thread in tracer.threads.values() if 0 <= (
            ubp_x86.program_counter(thread.regs) - stub) < PAGE]
        for thread in inside:
            if not ubp_x86.has_begun_waiting(thread.regs, stub):
                raise Again("it is on its way to its entry")
            thread.regs = ubp_x86.at_entry(thread.regs, entry)
            tracer.set_regs(thread.tid, thread.regs)
        # The loader has read the stub's address long before it jumps there.
        word = ubp_x86.waiting_stub_word(code)
        if not inside and word and tracer.read(
                word, 8) == struct.pack("<Q", stub):
            raise Again("its loader is not done yet")
        with Injection(tracer) as injection:
            injection.call(SYS_munmap, stub, PAGE)
    tracer.pause(action, timeout, "enter")


def waiting_stubs(pid):
    """The vaddrs of waiting_stubs that nobody has unmapped. -> [vaddr]"""
    return [m.start for m in read_maps(memory_tid(pid))
            if m.perms == "r-xp" and not m.inode and not m.path
            and m.end - m.start == PAGE and ubp_x86.waiting_stub_entry(
                _peek(pid, m.start, 256) or b"") is not None]


# -- the functions ----------------------------------------------------------

def attach(pid, timeout=5, suspend_seccomp=False, follow_exec=False):
    """Observe a running process. -> Target

    pid   of a process that we may ptrace; nothing is stopped or changed
    follow_exec   arm the patterns of probes in the programs that it, or a
          child of it, becomes by exec, too, before their entry points; one
          that names nothing yet is no error. Results and events of all are
          those of the probe: by="pid" and Event.pid tell them apart. A
          guardian traces them meanwhile, so a setuid program runs without
          its privilege, unless we may trace any
    suspend_seccomp   where a seccomp filter forbids what arming injects,
          suspend it meanwhile (as root): a kill -9 of this process in that
          third of a millisecond may then kill the target
    Raises AttachError, which says what stands in the way.
    """
    check_target(pid)
    target = Target(pid, follows=follow_exec)
    target._tracer.may_suspend = suspend_seccomp
    return target


def launch(argv, timeout=5, follow_exec=False):
    """Start a program and hold it at its entry point. -> Target

    argv   [program, arguments…], found as execvp(3) does
    follow_exec   as attach() has it
    Its libraries are loaded, none of its own code has run. Target.run(),
    wait(), detach() or close() let it go. Raises AttachError.
    """
    check_descriptors("start a program from", os.getpid())
    child = _Child(list(argv))
    target = Target(child.pid, child, follow_exec)
    target.comm = os.path.basename(child.path)
    launcher = Launch(target._tracer, child)
    try:
        failed = target._worker.call(lambda: launcher.run(timeout), timeout)
        if failed:
            raise _cannot_run(argv[0], failed)
    except UbpError:
        target.close()
        target.wait(1)              # reaped, if it was not to run
        raise
    target._tracer.forget_gadgets()     # the loader has mapped more since
    return target


class SiteStatus(NamedTuple):
    """One site of an arena, as status() finds it."""
    name: str
    module: str
    build_id: str
    vaddr: int
    state: str              # "armed", "removed", "changed by another tool"
    calls: Optional[int]    # hits; None: known of several sites together


class ArenaStatus(NamedTuple):
    """One arena, as status() finds it."""
    pid: int
    comm: str
    owner_pid: int
    owner_alive: bool
    left: bool              # detached on purpose
    time_ns: int            # when it was made, CLOCK_REALTIME
    children: tuple         # other pids that share it
    sites: list
    n_bad: int              # journal records that failed validation
    guardian: int = 0       # the pid of who answers for its int3s
    lenders: tuple = ()     # "module:function" of text that is changed, too,
    #                         as the slot of a site's jump is in it
    n_own: int = 0          # int3s that no user has set: SignalCount


def status(pid=None):
    """The arenas of one process, or of all. -> [ArenaStatus]

    Read from the targets alone; nothing is stopped or changed. Raises
    AttachError for a pid whose memory may not be read.
    """
    if pid is not None and not read_maps(memory_tid(pid)):
        check_target(pid)           # it says why
    views, found = [], []
    for each in [pid] if pid is not None else sorted(_process_ids()):
        views += find_arenas(each)
    sharing = {}
    for view in views:
        if view.inode:
            sharing.setdefault(view.inode, []).append(view.pid)
    for view in views:
        header = view.header
        if header is None:
            found.append(ArenaStatus(view.pid, comm(view.pid), 0, False,
                                     False, 0, (), [], 0))
            continue
        if (pid is None and header.target != view.pid
                and header.target in sharing.get(view.inode, ())):
            continue                # listed with the process it was made for
        pids = (sharing[view.inode] if pid is None and view.inode
                else processes_with(view.inode))
        siblings = [other for other in views if other.pid == view.pid]
        traps = {record.site for record in _traps_in(view)}
        found.append(ArenaStatus(
            view.pid, comm(view.pid), header.owner_pid,
            _owner_is_alive(header), bool(header.flags & FLAG_LEFT),
            header.time_ns, tuple(p for p in pids if p != view.pid),
            _site_status(view, siblings), view.n_bad,
            guardian_of(view.pid) if traps else 0,
            tuple("%s:%s" % (record.module, record.function)
                  for record in view.records if record.kind == "lent"
                  and _state(view.pid, record, [record]) == "armed"),
            len(traps - {record.site for other in siblings
                         for record in _listed(other)})))
    return _without_own(found)


def _without_own(found):
    """ArenaStatuses, less those of nothing but int3s that no user has set:
    the first one of that ubp in that process tells of these."""
    kept = collections.OrderedDict()
    for arena in sorted(found, key=lambda arena: not arena.sites):
        key = arena.pid, arena.owner_pid
        if not arena.sites and arena.n_own and key in kept:
            first = kept[key][0]
            kept[key][0] = first._replace(n_own=first.n_own + arena.n_own)
        else:
            kept.setdefault(key, []).append(arena)
    return sorted(itertools.chain.from_iterable(kept.values()),
                  key=lambda arena: arena.pid)


def _traps_in(view):
    """The records of an arena whose int3 is in force now."""
    return [record for record in view.records
            if record.patches[-1][2] == ubp_x86.BREAKPOINT
            and _state(view.pid, record, [record]) == "armed"]


def _owner_is_alive(header):
    """Does the ubp that made the arena still run? Unknown counts as yes."""
    if header.owner_namespace != _pid_namespace():
        return True
    return start_time(header.owner_pid) == header.owner_birth


def _listed(view):
    """The records of an arena that are of what a user has asked for."""
    return [record for record in view.records
            if not record.is_gone
            and record.kind not in ("none", "lent", "own")]


def _site_status(view, siblings):
    """[SiteStatus] of an arena, with its counters.

    siblings   all views of the process: another arena's code may be in
               force at a site, with what this one's record is about
    """
    records, others = _listed(view), {}
    for sibling in siblings:
        for record in sibling.records:
            for at in range(min(record.window_size, ubp_x86.JUMP_SIZE)):
                others.setdefault(record.site + at, []).append(record)
    return [SiteStatus(record.function, record.module, record.build_id,
                       record.site, _state(view.pid, record,
                                           others[record.site]), n)
            for record, n in zip(records, _hits(view, records))]


def _hits(view, records):
    """[hits of each record, over the processors]; None: not known alone."""
    rings = collections.Counter(record.index for record in records
                                if record.kind == "ring")
    counts = [record.index for record in records if record.kind == "count"]
    words = dict(zip(counts, _words_at(view, counts)))
    return [words[record.index] if record.kind == "count"
            else None if rings[record.index] > 1
            else _hits_in_block(view, record) for record in records]


_HEAD_WORDS = ubp_x86.HEAD_SIZE // 8
_HIT_WORDS = (ubp_x86.HEAD_FAULTS // 8, ubp_x86.HEAD_DROPPED // 8)


def _hits_in_block(view, record):
    """The hits that a block tells of. It is hostile: read in bounds."""
    header, total = view.header, 0
    first = _HEAD_WORDS
    n_words = {"filtered": 1, "sum": 1, "ring": 2, "table": (
        record.table[0] * ((1 << min(record.table[2], 20))
                           + ubp_x86.N_PROBED - 1))}.get(
            record.kind, ubp_x86.HIST_BUCKETS // 8 + ubp_x86.N_BUCKETS
            * (2 if record.kind == "signed hist" else 1))
    room = (1 << header.shard_shift) // 8 - record.index
    for cpu in range(header.shard_mask + 1):
        try:
            data = read_memory(
                memory_tid(view.pid), header.base + header.code_size
                + (cpu << header.shard_shift) + 8 * record.index,
                8 * max(0, min(first + n_words, room)))
        except OSError:
            continue
        words = struct.unpack("<%dQ" % (len(data) // 8), data)
        total += sum(words[n] for n in _HIT_WORDS if n < len(words)
                     and record.kind != "ring")
        payload = words[first:]
        if record.kind in ("hist", "signed hist"):
            payload = payload[ubp_x86.HIST_BUCKETS // 8:]
        elif record.kind == "table":
            payload = _table_counts(payload, record)
        total += sum(payload)
    return total


def _table_counts(words, record):
    """Yield the counts of the entries of one site in a table."""
    size, at, _, index = record.table
    states = words[0::size] if size > max(at, 1) else ()
    for n, state in enumerate(states):
        entry = words[n * size:(n + 1) * size]
        if (state >= ubp_x86.STATE_READY and len(entry) == size and (
                entry[1] == index or index == _ANY_INDEX)):
            yield (entry[at] if size < ubp_x86.N_BUCKETS
                   else sum(entry[at + ubp_x86.HIST_BUCKETS // 8:]))


def _words_at(view, indexes):
    """[the sum over the processors of the word at each index]"""
    header, top = view.header, max(indexes or [-1]) + 1
    totals = [0] * top
    try:
        for cpu in range(header.shard_mask + 1 if top else 0):
            data = read_memory(memory_tid(view.pid),
                               header.base + header.code_size
                               + (cpu << header.shard_shift), 8 * top)
            totals = [a + b for a, b in zip(
                totals, struct.unpack("<%dQ" % top, data))]
    except OSError:
        pass
    return [totals[index] for index in indexes]


def _state(pid, record, others):
    """armed, removed, or what else

    others   the records of the site, and of windows that took its in
    """
    vaddr, old, new = record.patches[-1]
    tid = memory_tid(pid)
    try:
        now = read_memory(tid, vaddr, len(new))
        if any(read_memory(tid, where, len(jump)) == jump
               for where, _, jump in {other.patches[-1]
                                      for other in others}):
            return "armed"
    except OSError:
        return "unmapped"
    return "removed" if now == old else "changed by another tool"


def clean(pid, all=False, timeout=5, suspend_seccomp=False):
    """Take out what is left in a process: orphaned, or left on purpose.

    all   also the probes of a ubp that still runs
    -> Removal. Children that inherited an arena are restored too. May
    be repeated. Raises AttachError, UbpTimeout.
    """
    traps = _end_left_guardian(pid, all, timeout)
    check_target(pid)
    tracer = Tracer(pid)
    tracer.may_suspend = suspend_seccomp
    worker = Worker(tracer)
    try:
        total = worker.call(lambda: _clean(tracer, all, timeout), timeout)
    finally:
        worker.stop()
    pages = {record.site & -PAGE for record in traps}
    return total + Removal(len(traps), len(pages), _n_equal(tracer, pages),
                           0, (pid,) if traps else (), ())


def _end_left_guardian(pid, take_all, timeout):
    """Have int3s taken out that were left, or are orphaned. -> [Record]"""
    guardian = guardian_of(pid)
    views = [view for view in find_arenas(pid) if view.header is not None
             ] if guardian else []
    if not views or not take_all and any(
            _owner_is_alive(view.header)
            and not view.header.flags & FLAG_LEFT for view in views):
        return []
    asked = {record.site for view in views for record in _listed(view)}
    traps = [record for view in views for record in _traps_in(view)
             if record.site in asked]
    end_guardian(pid, guardian, timeout)
    return traps


def _clean(tracer, take_all, timeout):
    limit = time.monotonic() + timeout
    total = Removal(0, 0, 0, 0, (), ())
    if _is_in_injection(tracer.tgid):       # each pause undoes that first
        tracer.pause(lambda: None, max(0.5, limit - time.monotonic()),
                     "unmap")
    owners = collections.OrderedDict()      # whose arenas go together
    for view in find_arenas(tracer.tgid):
        header = view.header
        if header is None and _is_unfinished(tracer, view.ranges[0][0]):
            _unmap_unfinished(tracer, view, limit)
            total += Removal(0, 0, 0, 1, (tracer.tgid,), ())
        elif header is None:
            total += Removal(0, 0, 0, 0, (), (
                "pid %d maps a memfd that is named ubp, but holds no arena "
                "of this version; it is left alone" % tracer.tgid,))
        elif (_owner_is_alive(header) and not header.flags & FLAG_LEFT
              and not take_all):
            total += Removal(0, 0, 0, 0, (), (
                "pid %d is being probed by ubp (pid %d); --all takes its "
                "probes out too" % (tracer.tgid, header.owner_pid),))
        else:
            owners.setdefault(header.owner_pid, []).append(Installed(
                header.base, header.nonce, view.inode, view.ranges,
                view.records, view.slack))
    for arenas in owners.values():
        total += _restore_everywhere(tracer, arenas, limit)
    n_cleared = _clear_left_registers(tracer, limit)
    if n_cleared:
        total += Removal(0, 0, 0, 0, (tracer.tgid,), (
            "debug registers that a killed guardian had left in %s of pid %d "
            "are clear" % (plural(n_cleared, "thread"), tracer.tgid),))
    for stub in waiting_stubs(tracer.tgid):
        release_at_entry(tracer, stub, max(0.5, limit - time.monotonic()))
        total += Removal(0, 0, 0, 1, (tracer.tgid,), ())
    n_closed = _close_descriptors(tracer, limit)
    if n_closed:
        total += Removal(0, 0, 0, n_closed, (tracer.tgid,), ())
    return total


def _is_in_injection(pid):
    """Is a stopped thread still to run what a dead ubp injected?

    Of threads that run, the kernel tells nothing; but they get on.
    """
    for tid in thread_ids(pid):
        words = read_proc("/proc/%d/task/%d/syscall" % (pid, tid)).split()
        if len(words) != 3:         # proc(5): else "-1", rsp, rip
            continue
        rsp, rip = [int(word, 16) for word in words[1:]]
        if _injected_frame(tid, rip, rsp):
            return True
    return False


def _clear_left_registers(tracer, limit):
    """Clear debug registers that ptrace set, if nobody traces any more.

    -> of how many threads; none is stopped if the kernel says it has all
    """
    maps = read_maps(tracer.vm_tid())
    if not maps or tracer_of(tracer.tgid) or all(
            n_free_registers(tid, maps[0].start) == N_DEBUG_REGISTERS
            for tid in thread_ids(tracer.tgid)[:_REGISTER_SAMPLE]):
        return 0
    return tracer.pause(lambda: clear_debug_registers(tracer), max(
        0.5, limit - time.monotonic()), "clear")


def _is_unfinished(tracer, vaddr):
    """Did the maker of this arena die before it wrote the magic?"""
    return _text_at(tracer, vaddr, len(MAGIC)) in (None, bytes(len(MAGIC)))


def _unmap_unfinished(tracer, view, limit):
    """Unmap an arena whose maker died before it wrote the header."""
    def action():
        now = [v for v in find_arenas(tracer.tgid) if v.inode == view.inode]
        if not now or not _is_unfinished(tracer, now[0].ranges[0][0]):
            return
        with Injection(tracer) as injection:
            for low, high in now[0].ranges:
                injection.call(SYS_munmap, low, high - low)
    tracer.pause(action, max(0.5, limit - time.monotonic()), "unmap")


def _descriptors(pid):
    """Descriptors of ubp's memfds that a dead tracer left. -> [number]"""
    found = []
    try:
        pid = memory_tid(pid)
        names = os.listdir("/proc/%d/fd" % pid)
    except OSError:
        return found
    for name in names:
        try:
            path = "/proc/%d/fd/%s" % (pid, name)
            if os.readlink(path) == _MEMFD_PATH and _holds_arena(path):
                found.append(int(name))
        except OSError:
            continue
    return found


def _holds_arena(path):
    """Is this memfd empty, unfinished, or an arena?"""
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    return not any(head[:len(MAGIC)]) or unpack_header(head) is not None


def _close_descriptors(tracer, limit):
    """Close what a ubp that died in the midst of an injection left."""
    if not _descriptors(tracer.tgid):
        return 0

    def action():
        numbers = _descriptors(tracer.tgid)
        with Injection(tracer) as injection:
            for number in numbers:
                injection.call(SYS_close, number)
        return len(numbers)
    return tracer.pause(action, max(0.5, limit - time.monotonic()), "unmap")


# ---- 11  Pictures ---------------------------------------------------------
#
# Results as text, pictures and files for other tools. Invariant: pure; a
# picture is a function of results, and of the width and the characters
# that may be used. All names come from a target that may be hostile: they
# are escaped here, at the last moment, for the place they are put in.
#
#     row     a Row: what one probed function computed, for one key
#     hit     a TraceHit: one record of a trace
#     stack   a tuple of frames "MODULE:FUNCTION", the outermost first
#     glyphs  the characters that pictures may be made of

class Glyphs(NamedTuple):
    """The characters that pictures are made of."""
    dots: str           # where text was left out
    bar: str            # a cell of a bar, from least filled to full
    branch: tuple       # in front of a child; of the last one; below both


UNICODE = Glyphs("…", "▏▎▍▌▋▊▉█", ("├─ ", "└─ ", "│  ", "   "))
ASCII = Glyphs("...", "#", ("|- ", "`- ", "|  ", "   "))


def escape(text):
    r"""Return text fit for any terminal: what cannot be printed as \xNN.

    Names, paths and errors come from a target that may be hostile; an escape
    sequence in one of them would be obeyed by the reader's terminal.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape_char(ord(char))
                   for char in text)


def _escape_char(code):
    """Return a code point as an escape; an undecodable byte as that byte."""
    if 0xdc80 <= code <= 0xdcff:       # PEP 383: what surrogateescape made
        code -= 0xdc00
    return ("\\x%02x" if code < 0x100 else
            "\\u%04x" if code < 0x10000 else "\\U%08x") % code


def elide(text, size, dots="..."):
    """Return text in at most size characters, its middle given up."""
    if len(text) <= size:
        return text
    if size <= len(dots) + 1:
        return text[:max(size, 0)]
    n_head = (size - len(dots) + 1) // 2
    return text[:n_head] + dots + text[len(text) - (size - len(dots)
                                                    - n_head):]


def plural(n, noun):
    """Return "1 site", "2 sites"."""
    return "%d %s%s" % (n, noun, "" if n == 1 else "s")


def json_text(value):
    r"""Return text of a target for JSON: undecodable bytes as \xNN."""
    return "".join(_escape_char(ord(char)) if "\ud800" <= char <= "\udfff"
                   else char for char in value)


def json_value(value):
    """Return a part of a key, or a traced value, for JSON."""
    return json_text(value) if isinstance(value, str) else value


def to_json(value):
    """Return a value as JSON text."""
    import json                 # not for every start of ubp
    return json.dumps(value)


class Where(NamedTuple):
    """The function that a result is about, and the process it is of."""
    host: str
    pid: int
    module: str
    build_id: str
    function: str
    address: int        # None: results of several processes, added up

    def label(self):
        """Return "libc.so.6:malloc+0x4", escaped."""
        return escape("%s:%s" % (self.module, self.function))


class Row(NamedTuple):
    """What one probed function computed, for one key."""
    where: Where
    key: tuple          # of text and ints; a stack: its frames
    now: object         # in the interval: an int, a Sum, a Histogram
    total: object       # the same since it was armed


class TraceHit(NamedTuple):
    """One record of a trace, from this process or another host."""
    time_ns: int        # CLOCK_REALTIME
    where: Where
    tid: int
    cpu: int
    kind: str           # "entry", "exit" or "hit"
    values: tuple       # of (expression, int | text | None for a fault)
    stack: tuple        # of frames, the outermost first; () without


def weight(value):
    """Return the number by which results are put in order."""
    return value.count if isinstance(value, Histogram) else int(value)


# -- numbers with units -----------------------------------------------------

_TIMES = ((10 ** 9, "s"), (10 ** 6, "ms"), (1000, "us"))


def quantity(value, unit=""):
    """Return an int with its unit, three digits of it at least.

    unit   "ns", of which there are us, ms and s too; "" for plain numbers
    """
    if unit != "ns":
        return "%d" % value
    for size, name in _TIMES:
        if abs(value) >= size:
            scaled = value / size
            n_digits = 2 if abs(scaled) < 9.995 else 1 if abs(
                scaled) < 99.95 else 0
            return "%.*f %s" % (n_digits, scaled, name)
    return "%d ns" % value


def bound(value, unit=""):
    """Return a bucket's bound: a power of two as 4Ki, a time as 4.10 us."""
    if unit == "ns":
        return quantity(value, unit)
    for shift, name in ((60, "Ei"), (50, "Pi"), (40, "Ti"), (30, "Gi"),
                        (20, "Mi"), (10, "Ki")):
        scaled = value / (1 << shift)
        if abs(scaled) >= 1 and scaled * 8 == int(scaled * 8):
            return "%g%s" % (scaled, name)
    return "%d" % value


def is_time(expression):
    """Is the value of this expression a number of nanoseconds?"""
    return expression.strip() == "elapsed"


def value_text(expression, value):
    """Return "arg0=24", "elapsed=1.20 us", 'str(arg1)="x"' for a value."""
    if value is None:
        text = "<fault>"
    elif not isinstance(value, str):
        text = quantity(value, "ns" if is_time(expression) else "")
    elif re.match(r"(hex|sym)\(|caller\Z", expression):
        text = escape(value)
    else:
        text = '"%s"' % escape(value).replace('"', '\\"')
    return "%s=%s" % (escape(expression), text)


# -- tables -----------------------------------------------------------------

def bar(part, whole, width, glyphs):
    """Return part/whole of a bar of so many columns; never empty if part."""
    n = len(glyphs.bar)
    cells = int(part * width * n / whole + 0.5) if whole and width > 0 else 0
    cells = min(max(cells, 1 if part and width > 0 else 0), max(width, 0) * n)
    return glyphs.bar[-1] * (cells // n) + (
        glyphs.bar[cells % n - 1] if cells % n else "")


class TableHead(NamedTuple):
    """What the columns of a table are called."""
    value: str = "calls"        # "sum" where values were added up
    keys: tuple = ()            # the expressions of --by


def table_lines(rows, seconds, is_final, size=None, n_top=None, glyphs=ASCII,
                head=TableHead()):
    """Return the lines of a table of calls or sums, the largest first.

    rows      Rows; `now` was counted in so many seconds
    is_final  the first column is `total`, not `now`
    size      (columns, rows) that the lines must fit, or None
    """
    columns, n_lines = size or (0, 0)
    rows = sorted(rows, key=lambda row: (
        -row.total, row.where.label(), row.where.pid or 0, repr(row.key)))
    whole = sum(abs(row.total if is_final else row.now) for row in rows) or 1
    extra = _extra_columns(rows)
    cells = [_table_cells(row, seconds, is_final, whole, extra)
             for row in rows]
    n_shown = min(n_top or len(cells), len(cells))
    if not n_top and len(cells) > 20:  # a pattern's many that were not called
        n_shown = max(20, sum(row.total != 0 for row in rows))
    if n_lines:
        n_shown = min(n_shown, max(n_lines - 3, 1))
    title = [head.value, head.value + "/s", "share"] + extra + [
        escape(key) for key in head.keys] + ["function"]
    if seconds <= 0:
        del title[1]
    n_numbers = len(title) - 1 - len(head.keys)
    lines = layout([title] + cells[:n_shown], columns, glyphs.dots,
                   n_numbers)
    if n_shown < len(cells):
        hidden = sum(row.total if is_final else row.now
                     for row in rows[n_shown:])
        words = "%s not shown, with %s" % (
            plural(len(cells) - n_shown, "key" if head.keys else "function"),
            "a sum of %d" % hidden if head.value == "sum"
            else plural(hidden, "call"))
        lines.append(words[:columns or None])
    return lines


def _extra_columns(rows):
    """Return which of host and pid tell rows of a table apart."""
    return (["host"] * (len({row.where.host for row in rows}) > 1)
            + ["pid"] * (len({row.where.pid for row in rows}) > 1))


def _table_cells(row, seconds, is_final, whole, extra):
    value = row.total if is_final else row.now
    rate = row.now / max(seconds, 1e-3)
    return (["%d" % value]
            + ["%.*f" % (abs(rate) < 100, rate)] * (seconds > 0)
            + ["%.1f%%" % (100.0 * value / whole)]
            + [escape(str(getattr(row.where, name))) for name in extra]
            + [key_text(part) for part in row.key] + [row.where.label()])


def key_text(part):
    """Return one part of a key as a cell of a table, never empty."""
    if part is None:
        return "<fault>"
    return escape(str(part)) if part != "" else '""'


def layout(cells, columns, dots, n_numbers=None):
    """Return rows of cells as lines: numbers right-aligned, a name last.

    n_numbers   columns of numbers; between them and the name are keys
    Where columns leave no room for names, numbers give way, the last first.
    """
    n_numbers = len(cells[0]) - 1 if n_numbers is None else n_numbers
    while columns and columns < 14 * len(cells[0]) and n_numbers > 1:
        cells = [row[:n_numbers - 1] + row[n_numbers:] for row in cells]
        n_numbers -= 1
    leasts = (10, 9, 6, 5) + (0,) * len(cells[0])
    widths = [max([len(row[i]) for row in cells] + [least])
              for i, least in zip(range(len(cells[0]) - 1), leasts)]
    key_room = (columns - sum(widths[:n_numbers])) // 2 if columns else 40
    lines = []
    for row in cells:
        text = "".join(cell.rjust(width) + "  "
                       for cell, width in zip(row[:n_numbers], widths))
        for cell, width in zip(row[n_numbers:-1], widths[n_numbers:]):
            width = min(width, max(key_room, 6))
            text += elide(cell, width, dots).ljust(width) + "  "
        name = row[-1]
        if columns:
            name = elide(name, columns - len(text), dots)
        lines.append((text + name)[:columns or None].rstrip())
    return lines


# -- histograms -------------------------------------------------------------

def _octave(low, high):
    """Return which power of two a bucket is in: 0, ±1, ±2, …; see below."""
    return low.bit_length() if low >= 0 else -(-high).bit_length()


def _octave_bounds(n):
    """Return the (low, high) of an octave: 0; 1; 2 to 3; 4 to 7; …"""
    if n < 0:
        low, high = _octave_bounds(-n)
        return -high, -low
    return (1 << n >> 1, (1 << n) - 1)


def histogram_rows(histogram):
    """Return ((low, high, n) | None, …), a row for each power of two.

    Where all values are in two of them, a row for each bucket of those that
    are recorded. None stands for a long run of rows that are empty.
    """
    octaves = {}
    for low, high, n in histogram.buckets:
        each = _octave(low, high)
        octaves[each] = octaves.get(each, 0) + n
    if not octaves:
        return []
    present = sorted(octaves)
    if present[0] >= 4 and present[-1] - present[0] < 2:
        return _fine_rows(histogram.buckets)
    rows = []
    for each, after in zip(present, present[1:] + [None]):
        rows.append(_octave_bounds(each) + (octaves[each],))
        if after is not None and after - each > 4:
            rows.append(None)
        elif after is not None:
            rows += [_octave_bounds(n) + (0,)
                     for n in range(each + 1, after)]
    return rows


def _fine_rows(buckets):
    """Return rows from the first bucket to the last, the empty ones too."""
    step = buckets[-1][1] - buckets[-1][0] + 1
    counts = collections.Counter()
    for low, _, n in buckets:
        counts[low // step] += n
    return [(each * step, (each + 1) * step - 1, counts[each])
            for each in range(min(counts), max(counts) + 1)]


def histogram_lines(histogram, unit="", columns=79, glyphs=ASCII):
    """Return a Histogram as lines: a row of bars each, then percentiles."""
    rows = histogram_rows(histogram)
    bounds = [None if row is None else (
        bound(row[0], unit), bound(row[1] + 1, unit)) for row in rows]
    widths = [max([len(each[i]) for each in bounds if each] + [1])
              for i in range(2)]
    most = max([row[2] for row in rows if row] + [1])
    n_digits = max(len("%d" % most), 5)
    lines = []
    for row, each in zip(rows, bounds):
        if row is None:
            lines.append(("  " + glyphs.dots)[:columns])
            continue
        if row[0] == row[1] and unit != "ns":
            label = "[%s]" % each[0].rjust(widths[0])
        else:
            label = "[%s, %s)" % (each[0].rjust(widths[0]),
                                  each[1].rjust(widths[1]))
        text = "  %-*s %*d %5.1f%%  " % (
            sum(widths) + 4, label, n_digits, row[2],
            100.0 * row[2] / histogram.count)
        text += bar(row[2], most, columns - len(text), glyphs)
        lines.append(text.rstrip()[:columns])
    return lines + [("  " + line)[:columns] for line in percentile_lines(
        histogram, unit, max(columns - 2, 1))]


def percentile_lines(histogram, unit="", columns=77):
    """Return the lines that tell min, percentiles and max."""
    if not histogram.count:
        return ["nothing recorded"[:columns]]
    parts = [("min", histogram.min)] + [
        ("p%g" % p, histogram.percentile(p))
        for p in (50, 90, 99, 99.9)] + [("max", histogram.max)]
    lines = [""]
    for name, value in parts:
        part = "%s %s" % (name, quantity(value, unit))
        if lines[-1] and len(lines[-1]) + 2 + len(part) > columns:
            lines.append("")
        lines[-1] += ("  " if lines[-1] else "") + part
    return [line[:columns] for line in lines]


def histogram_title(row, expression, keys=(), extra=(), columns=0,
                    dots="..."):
    """Return "libc.so.6:malloc, caller main: arg0, 12 hits, mean 24.0"."""
    histogram, unit = row.total, "ns" if is_time(expression) else ""
    parts = [row.where.label()]
    parts += ["%s %s" % (name, escape(str(getattr(row.where, name))))
              for name in extra]
    parts += ["%s %s" % (escape(name), key_text(part))
              for name, part in zip(keys, row.key)]
    text = "%s: %s, %s" % (", ".join(parts), escape(expression),
                           plural(histogram.count, "hit"))
    if histogram.count:
        mean = histogram.mean
        text += ", mean %s" % (quantity(mean, unit) if unit
                               else "%.*f" % (abs(mean) < 1e6, mean))
    return elide(text, columns, dots) if columns else text


def histograms_lines(rows, expression, keys=(), size=None, n_top=None,
                     glyphs=ASCII):
    """Return the lines of histograms, the one of most hits first.

    size   (columns, rows) that the lines must fit: the histograms that do
           not fit are named by their titles, then by their number
    """
    columns, n_lines = size or (79, 0)
    rows = sorted(rows, key=lambda row: (
        -row.total.count, row.where.label(), repr(row.key)))
    extra, lines = _extra_columns(rows), []
    unit = "ns" if is_time(expression) else ""
    recorded = [row for row in rows if row.total.count] or rows[:1]
    shown = recorded[:n_top]
    n_shown = 0
    for row in shown:
        block = [histogram_title(row, expression, keys, extra, columns,
                                 glyphs.dots)]
        block += histogram_lines(row.total, unit, columns, glyphs) + [""]
        if n_lines and lines and len(lines) + len(block) + 2 > n_lines:
            break
        lines += block
        n_shown += 1
    if lines and not lines[-1]:
        del lines[-1]
    if n_lines:
        del lines[max(n_lines - 2, 1):]
    if n_shown < len(rows):
        n_hits = sum(row.total.count for row in rows) - sum(
            row.total.count for row in shown[:n_shown])
        lines.append(("%s not shown, with %s" % (
            plural(len(rows) - n_shown, "key" if keys else "function"),
            plural(n_hits, "hit")))[:columns])
    return lines


# -- stacks -----------------------------------------------------------------

class Node:
    """A frame of a tree of stacks, and all that was called from there."""

    __slots__ = ("frame", "total", "own", "children")

    def __init__(self, frame=""):
        self.frame, self.total, self.own = frame, 0, 0
        self.children = {}             # {frame: Node}

    def ordered(self):
        """Return the children, the largest first."""
        return sorted(self.children.values(),
                      key=lambda node: (-node.total, node.frame))


def stack_tree(stacks):
    """Return the root Node of {stack: n}, the outermost frames below it."""
    root = Node()
    for stack, n in stacks.items():
        node = root
        node.total += n
        for frame in stack:
            child = node.children.get(frame)
            if child is None:
                child = node.children[frame] = Node(frame)
            child.total += n
            node = child
        node.own += n
    return root


def frame_function(frame):
    """Return the function of a frame "MODULE:FUNCTION"."""
    return frame.partition(":")[2] or frame


def tree_lines(stacks, size=None, n_top=None, glyphs=ASCII, least=0.005):
    """Return the lines of a text tree of {stack: n}, the largest first.

    least   branches below this share of the whole are added up in a line
    n_top   the largest stacks only, so many
    """
    columns, n_lines = size or (0, 0)
    whole = sum(stacks.values()) or 1
    order = sorted(stacks, key=lambda stack: (-stacks[stack], stack))
    root = stack_tree({stack: stacks[stack] for stack in order[:n_top]})
    most = n_lines - 2 if n_lines else 10 ** 6
    most -= bool(n_lines) and len(order) > (n_top or len(order))
    width = max(len("%d" % root.total), 5)
    lines, n_left = [], 0
    # (node, what is in front of it, what is in front of its children)
    todo = [(node, "", "") for node in reversed(root.ordered())]
    while todo:
        node, front, below = todo.pop()
        if abs(node.total) < least * whole or len(lines) >= most:
            n_left += 1
            continue
        text = "%6.1f%%  %*d  %s" % (100.0 * node.total / whole, width,
                                     node.total, front)
        name = escape(node.frame)
        lines.append((text + (elide(name, columns - len(text), glyphs.dots)
                              if columns else name))[:columns or None])
        todo += _branches(node, below, glyphs, least * whole)
    if n_left:
        lines.append(("%s not shown" % plural(n_left, "smaller branch")
                      .replace("branchs", "branches"))[:columns or None])
    if n_top and len(order) > n_top:
        lines.append(("%s not shown, with %d" % (
            plural(len(order) - n_top, "smaller stack"),
            whole - root.total))[:columns or None])
    return lines


def _branches(node, below, glyphs, least):
    """Return a node's children as tree_lines() wants them, last first.

    A chain of only children, the usual stack, goes straight down.
    """
    children = node.ordered()
    if len(children) == 1 and abs(node.own) < max(least, 1):
        return [(children[0], below, below)]
    branch, last, line, space = glyphs.branch
    found = [(child, below + branch, below + line) for child in children]
    if found:
        found[-1] = (children[-1], below + last, below + space)
    return found[::-1]


def folded_lines(stacks):
    """Return {stack: n} as folded lines, "main;parse;malloc 12".

    Functions of equal names are one to whoever reads these. What a name may
    not contain here is replaced: a semicolon by a colon, a line's end by an
    escape.
    """
    found = {}
    for stack, n in stacks.items():
        text = ";".join(escape(frame_function(frame)).replace(";", ":")
                        for frame in stack) or "[no stack]"
        found[text] = found.get(text, 0) + n
    return ["%s %d" % item for item in sorted(found.items())]


# -- flame graphs -----------------------------------------------------------

FLAME_FRAMES = 20000    # that a browser draws without making anybody wait
FLAME_ROW = 17          # pixels
FLAME_HEAD = 64         # pixels above the frames
_FLAME_COLUMNS = 165    # characters in a frame of full width, without script

_FLAME_STYLE = """
svg { background: #fff; font: 12px monospace; }
text { fill: #111; pointer-events: none; white-space: pre; }
#title { font-size: 15px; font-weight: bold; }
.f rect { stroke: #fff; stroke-width: .6; }
.f { cursor: pointer; outline: none; }
.f:hover rect, .f:focus rect { stroke: #000; stroke-width: 1.4; }
.f.above rect { opacity: .45; }
.f.match rect { fill: #b0f; }
.f.match text { fill: #fff; }
#tools { text-align: right; }
input, button { font: 12px monospace; }
@media (prefers-color-scheme: dark) {
  svg { background: #16181c; } .f rect { stroke: #16181c; }
  #title, #info, #found { fill: #ddd; }
  .f:hover rect, .f:focus rect { stroke: #fff; }
}
"""

_FLAME_SCRIPT = r"""
"use strict";
(function () {
  const svg = document.documentElement, find = id =>
    document.getElementById(id);
  const frames = Array.from(document.querySelectorAll(".f"), g => {
    const lines = g.querySelector("title").textContent.split("\n");
    const box = g.querySelector("rect"), text = g.querySelector("text");
    return {g, box, text, name: lines[0], about: lines.join(", "),
            key: (lines[1] + ":" + lines[0]).toLowerCase(),
            x: +g.dataset.x, w: +g.dataset.w, d: +g.dataset.d};
  });
  const of = new Map(frames.map(f => [f.g, f])), root = frames[0];
  const input = find("search"), info = find("info"), found = find("found");
  const help = info.textContent;
  let zoomed = root, width = 7.2, timer = 0;

  function fit(f, pixels) {
    const n = Math.floor((pixels - 6) / width);
    f.text.textContent = n < 3 ? "" : f.name.length <= n ? f.name :
      f.name.slice(0, n - 1) + "\u2026";
  }
  function draw() {
    const page = svg.getBoundingClientRect().width || 1200, z = zoomed;
    for (const f of frames) {
      const above = f.d < z.d && f.x <= z.x && f.x + f.w >= z.x + z.w;
      const below = f.d >= z.d && f.x >= z.x && f.x + f.w <= z.x + z.w;
      const x = above ? 0 : (f.x - z.x) / z.w, w = above ? 1 : f.w / z.w;
      const shown = above || below && w * page >= 0.3;
      f.g.style.display = shown ? "" : "none";
      f.g.classList.toggle("above", above);
      if (!shown) continue;
      f.box.setAttribute("x", 100 * x + "%");
      f.box.setAttribute("width", 100 * w + "%");
      f.text.setAttribute("x", 100 * x + "%");
      fit(f, w * page);
    }
    find("reset").disabled = z === root;
  }
  function zoom(f) { zoomed = f; draw(); focus(f); }
  function focus(f) {
    for (const g of document.querySelectorAll(".f[tabindex='0']"))
      g.setAttribute("tabindex", "-1");
    f.g.setAttribute("tabindex", "0");
    f.g.focus({preventScroll: false});
    info.textContent = f.about;
  }
  function search() {
    const word = input.value.trim();
    let test = () => false, sum = 0, end = -1;
    if (word) {
      try {
        const re = new RegExp(word, "i");
        test = f => re.test(f.key);
      } catch (e) {
        test = f => f.key.includes(word.toLowerCase());
      }
    }
    for (const f of frames) {         // parents come before their children
      const is = f !== root && test(f);
      f.g.classList.toggle("match", is);
      if (is && f.x >= end) { sum += f.w; end = f.x + f.w; }
    }
    found.textContent = word ?
      "matched " + (100 * sum / root.w).toFixed(2) + " %" : "";
  }
  function step(f, key) {
    const near = frames.filter(g => g.g.style.display !== "none" &&
      g.d === f.d + ({ArrowUp: 1, ArrowDown: -1}[key] || 0));
    if (key === "ArrowUp")
      return near.filter(g => g.x >= f.x && g.x + g.w <= f.x + f.w)
        .sort((a, b) => b.w - a.w)[0];
    if (key === "ArrowDown")
      return near.find(g => g.x <= f.x && g.x + g.w >= f.x + f.w);
    return near[near.indexOf(f) + (key === "ArrowRight" ? 1 : -1)];
  }
  svg.addEventListener("click", e => {
    const g = e.target.closest(".f");
    if (g) zoom(of.get(g));
  });
  svg.addEventListener("mouseover", e => {
    const g = e.target.closest(".f");
    info.textContent = g ? of.get(g).about : help;
  });
  window.addEventListener("keydown", e => {
    if (e.target === input) {
      if (e.key === "Escape") { input.value = ""; search(); zoom(zoomed); }
      return;
    }
    const f = of.get(document.activeElement) || zoomed;
    if (e.key === "/") input.focus();
    else if (e.key === "Escape") zoom(root);
    else if (e.key.startsWith("Arrow")) {
      const next = step(f, e.key);
      if (next) focus(next);
    } else if ((e.key === "Enter" || e.key === " ") &&
               of.has(document.activeElement)) zoom(f);
    else return;
    e.preventDefault();
  });
  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(search, 80);
  });
  find("reset").addEventListener("click", () => zoom(root));
  window.addEventListener("resize", draw);
  const probe = root.text.textContent;
  root.text.textContent = "0".repeat(40);
  width = root.text.getComputedTextLength() / 40 || width;
  root.text.textContent = probe;
  find("tools").style.display = "";
  draw();
})();
"""


def _xml(text):
    """Return text as XML wants it, in an element or an attribute."""
    return (escape(text).replace("&", "&amp;").replace("<", "&lt;")
            .replace(">", "&gt;").replace('"', "&quot;"))


def _flame_colour(frame):
    """Return a frame's colour: a hue per module, a shade per function."""
    module, _, function = frame.partition(":")
    numbers = []
    for text in module, function:
        number = 7
        for char in text:
            number = (number * 33 + ord(char)) & 0xffffffff
        numbers.append(number)
    return "hsl(%d,%d%%,%d%%)" % (numbers[0] * 47 % 360,
                                  66 + numbers[1] % 20,
                                  64 + numbers[1] // 32 % 14)


def _flame_nodes(root):
    """Return [(node, x, depth)] of the frames to draw, parents first.

    The largest; one that is too many takes what is above it along.
    """
    sizes, todo = [], [root]
    while todo:
        node = todo.pop()
        sizes.append(node.total)
        todo += node.children.values()
    least = (sorted(sizes, reverse=True)[FLAME_FRAMES]
             if len(sizes) > FLAME_FRAMES else 0)
    found, todo = [], [(root, 0, 0)]
    while todo:
        node, x, depth = todo.pop()
        found.append((node, x, depth))
        children = sorted(node.children.values(), key=lambda n: n.frame)
        places = []
        for child in children:
            if child.total > least:
                places.append((child, x, depth + 1))
            x += max(child.total, 0)
        todo += places[::-1]
    return found, len(sizes) - len(found)


def flame_graph(stacks, title, unit="hits"):
    """Return {stack: n} as an SVG that a browser shows and lets one explore.

    unit   what n counts
    One file: no script, font or picture from elsewhere. Without scripts it
    is a picture whose frames still tell their names and numbers.
    """
    root = stack_tree({stack: n for stack, n in stacks.items() if n > 0})
    root.frame = ":all"
    nodes, n_hidden = _flame_nodes(root)
    depth = max(depth for _, _, depth in nodes) + 1
    # Numbers in a script are exact up to 2 ** 53.
    scale = max(1, root.total >> 52)
    whole = max(root.total, 1)
    height = FLAME_HEAD + depth * FLAME_ROW + 10
    text = ('<?xml version="1.0" encoding="UTF-8" standalone="no"?>\n'
            '<svg xmlns="http://www.w3.org/2000/svg" width="100%%" '
            'height="%d" role="application" aria-label="flame graph">\n'
            '<style><![CDATA[%s]]></style>\n' % (height, _FLAME_STYLE))
    text += ('<text id="title" x="10" y="22">%s</text>\n'
             '<text id="info" x="10" y="42">%s, %s%s; click or Enter zooms, '
             'Esc resets, arrows move, / searches</text>\n'
             '<text id="found" x="100%%" y="58" dx="-10" text-anchor="end">'
             '</text>\n' % (_xml(title), plural(len(stacks), "stack"),
                            "%d %s" % (root.total, _xml(unit)),
                            ", %s too small to draw" % plural(
                                n_hidden, "frame") if n_hidden else ""))
    text += ('<foreignObject id="tools" x="100%" y="6" width="320" '
             'height="28" transform="translate(-330 0)" '
             'style="display:none"><div xmlns="http://www.w3.org/1999/xhtml" '
             'style="text-align:right"><input id="search" type="search" '
             'placeholder="search (regex)" aria-label="search"/> '
             '<button id="reset" type="button" disabled="disabled">reset zoom'
             '</button></div></foreignObject>\n')
    parts = [text]
    for node, x, level in nodes:
        parts.append(_flame_frame(node, x, level, whole, scale,
                                  height - 10 - (level + 1) * FLAME_ROW,
                                  unit))
    parts.append("<script><![CDATA[%s]]></script>\n</svg>\n" % _FLAME_SCRIPT)
    return "".join(parts)


def _flame_frame(node, x, level, whole, scale, y, unit):
    """Return one frame: a box, its name, and what it tells when asked."""
    module, _, name = node.frame.partition(":")
    name = escape(name)
    about = "%s\n%s\n%d %s, %.2f %%" % (
        name, escape(module), node.total, escape(unit),
        100.0 * node.total / whole)
    share = node.total / whole
    n = int(share * _FLAME_COLUMNS)
    return ('<g class="f" role="button" tabindex="%d" data-x="%d" '
            'data-w="%d" data-d="%d"><title>%s</title>'
            '<rect x="%.5f%%" y="%d" width="%.5f%%" height="%d" fill="%s"/>'
            '<text x="%.5f%%" dx="3" y="%d">%s</text></g>\n' % (
                0 if level == 0 else -1, x // scale, node.total // scale,
                level, "\n".join(_xml(line) for line in about.split("\n")),
                100.0 * x / whole, y, 100 * share, FLAME_ROW - 1,
                _flame_colour(node.frame), 100.0 * x / whole, y + 12,
                _xml(elide(name, n, "…")) if n > 2 else ""))


# -- traces -----------------------------------------------------------------

def clock(time_ns):
    """Return a time as "12:34:56.123456", local."""
    return "%s.%06d" % (time.strftime("%H:%M:%S", time.localtime(
        time_ns // 10 ** 9)), time_ns % 10 ** 9 // 1000)


def hit_words(hit, skip=()):
    """Return a TraceHit's values, "arg0=24 str(arg1)="x""."""
    return " ".join(value_text(name, value) for name, value in hit.values
                    if name not in skip)


def hit_label(hit):
    """Return "libc.so.6:fsync%return" for a TraceHit."""
    return hit.where.label() + ("%return" if hit.kind == "exit" else "")


def hit_lines(hit, host="", has_pid=False):
    """Return the lines of a TraceHit: time, tid, function, values; its stack.

    host, has_pid   where several are traced: which it is from
    """
    thread = "%d/%d" % (hit.where.pid, hit.tid) if has_pid else "%d" % hit.tid
    text = "%s  %s%7s  %s" % (
        clock(hit.time_ns), escape(host) + "  " if host else "", thread,
        hit_label(hit))
    words = hit_words(hit)
    lines = [text + ("  " + words if words else "")]
    lines += ["    " + escape(frame) for frame in hit.stack[::-1]]
    return lines


class CallTree:
    """Entries and exits of functions as lines, nested by indentation.

    A call without calls in it is one line; so an entry waits for what comes
    next in its thread, or for flush(). Exits alone (of slow calls, say) are
    nested by the time that they took: a thread's calls wait until one is
    known to be the outermost, which flush(now) decides.
    """

    MAX_DEPTH = 300         # of calls that are nested, to be shown
    QUIET_NS = 10 ** 9      # without exits of a thread: it was the outermost

    def __init__(self, has_pid=False, is_exits_only=False):
        self.has_pid, self.is_exits_only = has_pid, is_exits_only
        self.open = {}          # {tid: [entry Hits that have no exit yet]}
        self.held = {}          # {tid: the last entry, not printed yet}
        self.done = {}          # {tid: [[exit TraceHit, its calls]]}

    def feed(self, hit):
        """Return the lines that a TraceHit, in time order, makes certain."""
        key = hit.where.host, hit.where.pid, hit.tid
        if self.is_exits_only:
            return self._feed_exit(key, hit)
        entries = self.open.setdefault(key, [])
        if hit.kind != "exit":
            lines = self._release(key)
            if len(entries) >= self.MAX_DEPTH:
                del entries[:]          # never left: longjmp, a dead thread
            self.held[key] = hit
            entries.append(hit)
            return lines
        depth = next((n for n in range(len(entries) - 1, -1, -1)
                      if entries[n].where.label() == hit.where.label()), None)
        if depth is None:       # entered before the trace began
            return self._release(key) + [self._line(
                hit, "} " + hit.where.label(), 0)]
        entry, elapsed = entries[depth], hit.time_ns - entries[depth].time_ns
        if self.held.get(key) is entry:
            del self.held[key]
            del entries[depth:]
            return [self._line(entry, self._call(entry, hit), depth, elapsed)]
        lines = self._release(key)
        del entries[depth:]     # what longjmp or an exception left, too
        return lines + [self._line(
            hit, "} %s" % self._exit_words(hit), depth, elapsed)]

    def flush(self, now_ns=None):
        """Return what waited: all of it, or what is certain at now_ns."""
        lines = [line for key in list(self.held)
                 for line in self._release(key)]
        for key, calls in list(self.done.items()):
            if calls and (now_ns is None or calls[-1][0].time_ns
                          + self.QUIET_NS < now_ns):
                del self.done[key]
                for call in calls:
                    lines += self._nested(call, 0)
        return lines

    def _release(self, key):
        """Return the line of the entry that waited in this thread."""
        hit = self.held.pop(key, None)
        if hit is None:
            return []
        return [self._line(hit, self._call(hit) + " {",
                           len(self.open[key]) - 1)]

    def _feed_exit(self, key, hit):
        """Put the calls that happened within this one below it."""
        calls = self.done.setdefault(key, [])
        began = self._began(hit)
        n = len(calls)
        while n and self._began(calls[n - 1][0]) >= began:
            n -= 1
        calls[n:] = [[hit, calls[n:]]]
        return []

    @staticmethod
    def _began(hit):
        return hit.time_ns - (dict(hit.values).get("elapsed") or 0)

    def _nested(self, call, depth):
        hit, calls = call
        elapsed = hit.time_ns - self._began(hit)
        lines = [self._line(hit._replace(time_ns=self._began(hit)),
                            self._call(hit, hit), depth, elapsed)]
        for each in calls:
            lines += self._nested(each, depth + 1)
        return lines

    def _line(self, hit, text, depth, elapsed=None):
        thread = ("%d/%d" % (hit.where.pid, hit.tid) if self.has_pid
                  else "%d" % hit.tid)
        return "%s  %7s  %9s  %s%s" % (
            clock(hit.time_ns), thread,
            "" if elapsed is None else quantity(elapsed, "ns"),
            "  " * depth, text)

    @staticmethod
    def _call(entry, leave=None):
        """Return "libc.so.6:malloc(arg0=24)", and " ret=5" when it left."""
        arguments = [value_text(name, value) for name, value in entry.values
                     if name not in ("elapsed", "ret")]
        text = "%s(%s)" % (entry.where.label(), ", ".join(arguments))
        words = hit_words(leave, ("elapsed",) + tuple(
            name for name, _ in entry.values if name != "ret")
        ) if leave else ""
        return text + (" " + words if words else "")

    @staticmethod
    def _exit_words(hit):
        words = hit_words(hit, ("elapsed",))
        return hit.where.label() + (" " + words if words else "")


class ChromeTrace:
    """Hits as objects of a Chrome trace.

    ph B and E for entries and exits, X for an exit that knows its duration,
    i for what is neither; ts and dur are microseconds, since the first hit:
    CLOCK_REALTIME in a double would lose the nanoseconds. Source: Trace
    Event Format, by the authors of Catapult.
    """

    def __init__(self):
        self.base = None
        self.pids = {}          # a pid of each process, as hosts are unknown
        self.began = set()      # (process, tid, function) that were entered

    def feed(self, hit):
        """Yield the objects of one TraceHit; hits come in order of time."""
        self.base = hit.time_ns if self.base is None else self.base
        process = hit.where.host, hit.where.pid
        if process not in self.pids:
            taken = self.pids.values()
            self.pids[process] = (hit.where.pid if hit.where.pid not in taken
                                  else max(taken) + 1)
            yield {"ph": "M", "name": "process_name", "tid": 0,
                   "pid": self.pids[process],
                   "args": {"name": "%s pid %d" % process}}
        values = {name: json_value(value) for name, value in hit.values}
        elapsed = values.pop("elapsed", None)
        event = {"name": hit.where.label(), "cat": escape(hit.where.module),
                 "ph": "i", "ts": (hit.time_ns - self.base) / 1000,
                 "pid": self.pids[process], "tid": hit.tid, "args": values}
        if hit.stack:
            values["stack"] = [json_text(frame) for frame in hit.stack]
        call = process + (hit.tid, hit.where.label())
        if hit.kind == "entry":
            event["ph"] = "B"
            self.began.add(call)
        elif hit.kind == "exit" and call in self.began:
            event["ph"] = "E"
        elif hit.kind == "exit" and isinstance(elapsed, int):
            event.update(ph="X", dur=elapsed / 1000,
                         ts=(hit.time_ns - elapsed - self.base) / 1000)
        else:
            event["s"] = "t"
        yield event


# -- OpenMetrics ------------------------------------------------------------

def metric_labels(*pairs):
    """Return {a="1",b="2"} of (name, value); values escaped as they must."""
    return "{%s}" % ",".join('%s="%s"' % (
        name, escape(str(value)).replace("\\", "\\\\").replace('"', '\\"'))
        for name, value in pairs if value is not None)


def _row_labels(row, keys):
    """Return the labels of a Row as pairs; --by's expressions are key0…"""
    where = row.where
    pairs = [("host", where.host), ("pid", where.pid),
             ("module", where.module), ("build_id", where.build_id or None),
             ("function", where.function)]
    for n, part in enumerate(row.key):
        pairs += [("by%d" % n, keys[n] if n < len(keys) else ""),
                  ("key%d" % n, "<fault>" if part is None else part)]
    return pairs


def _metric_head(name, kind, text, unit=""):
    lines = ["# TYPE %s %s" % (name, kind)]
    if unit:
        lines.append("# UNIT %s %s" % (name, unit))
    return lines + ["# HELP %s %s" % (name, text)]


def metric_histogram(name, labels, histogram, is_ns):
    """Return the samples of one Histogram: cumulative, le at 2 ** k - 1.

    Where values were negative there is no _sum, and so no _count: it would
    not only grow.
    """
    counts = {}
    for low, high, n in histogram.buckets:
        last = _octave_bounds(_octave(low, high))[1]
        counts[last] = counts.get(last, 0) + n
    lines, total = [], 0
    for last in sorted(counts):
        total += counts[last]
        lines.append("%s_bucket%s %d" % (name, metric_labels(
            *labels + [("le", repr(last / 1e9 if is_ns else float(last)))]),
            total))
    lines.append("%s_bucket%s %d" % (
        name, metric_labels(*labels + [("le", "+Inf")]), histogram.count))
    if not histogram.count or histogram.min >= 0:
        lines.append("%s_sum%s %s" % (
            name, metric_labels(*labels), repr(histogram.sum / 1e9)
            if is_ns else "%d" % histogram.sum))
        lines.append("%s_count%s %d" % (name, metric_labels(*labels),
                                        histogram.count))
    return lines


class Loss(NamedTuple):
    """What one process lost, for the last line and for metrics."""
    host: str
    pid: int
    hits: int
    dropped: int
    refused: int


def open_metrics(parts, losses):
    """Return results as OpenMetrics text, for a textfile collector.

    parts    [(kind, rows, expression, keys)]; kind "count", "sum", "hist"
             or "latency";   losses  a Loss for each process
    Times are in seconds, the base unit that OpenMetrics asks for. Source:
    OpenMetrics 1.0, "Overall Structure", "Histogram", "Counter".
    """
    families = collections.OrderedDict()
    for n, (kind, rows, expression, keys) in enumerate(parts):
        is_ns = kind == "latency" or is_time(expression)
        name, head = _metric_family(kind, is_ns)
        lines = families.setdefault(name, head)
        for row in rows:
            labels = _row_labels(row, keys)
            if len(parts) > 1:
                labels.append(("group", n))
            if kind in ("sum", "hist"):
                labels.append(("expression", expression))
            if kind in ("count", "sum"):
                lines.append("%s%s%s %d" % (
                    name, "_total" * (kind == "count"),
                    metric_labels(*labels), row.total))
            else:
                lines += metric_histogram(name, labels, row.total, is_ns)
    lines = [line for family in families.values() for line in family]
    for name, kind, text, field in (
            ("ubp_hits", "counter", "How often probed places were passed.",
             "hits"),
            ("ubp_dropped", "counter", "Hits that were not recorded.",
             "dropped"),
            ("ubp_refused_sites", "gauge", "Places that could not be probed.",
             "refused")):
        lines += _metric_head(name, kind, text)
        lines += ["%s%s%s %d" % (
            name, "_total" * (kind == "counter"), metric_labels(
                ("host", loss.host), ("pid", loss.pid)),
            getattr(loss, field)) for loss in losses]
    return "\n".join(lines + ["# EOF", ""])


def _metric_family(kind, is_ns):
    """Return (name, [the lines in front of its samples])."""
    if kind == "count":
        return "ubp_calls", _metric_head(
            "ubp_calls", "counter",
            "Calls of a function since it was probed.")
    if kind == "sum":                   # may fall: values may be negative
        return "ubp_sum", _metric_head(
            "ubp_sum", "gauge",
            "Sum of an expression over calls since they were probed.")
    name = ("ubp_latency_seconds" if kind == "latency" else
            "ubp_value_seconds" if is_ns else "ubp_value")
    return name, _metric_head(
        name, "histogram", "Time from entry to exit of a function."
        if kind == "latency" else "Values of an expression at the calls of "
        "a function.", "seconds" if is_ns else "")


# ---- 12  Command line -----------------------------------------------------
#
# A person, or a pipe, at one end and a running program at the other. The one
# idea: data and talk are bytes written straight to a descriptor that was
# polled first, so no buffer holds a result back, a reader that goes away is
# seen at once, and a terminal that stands still cannot keep probes in place.
# The invariant: whatever ends a command (Ctrl-C, a closed pipe, a full disk,
# the target's exit), the probes are taken out before the last word is said.
#
#     options   what argparse made of the words before `--`
#     out       an Output: where data goes        say()   talk, to stderr
#     signals   a Signals: what asks for the end  row     one function's calls

import argparse                                                 # noqa: E402
import contextlib                                               # noqa: E402
import fcntl                                                    # noqa: E402

VERBS = """
count    count calls, or add up values, as a live table on a terminal
hist     show how the values of an expression are distributed
latency  show how long calls take, from entry to exit
stack    count call stacks: a tree, folded lines, a flame graph
trace    print a line for each hit, with values
show     add up the JSON Lines of any number of hosts
list     list the functions that probes name: address, size, module
plan     show how each function would be probed, or why not; change nothing
status   show the probes that are in place, whose, and their counts
clean    take out probes that were left, or whose owner died
"""

HELP = """\
usage: ubp VERB -p PID[,PID...] [OPTION...] PROBE... [+ [OPTION...] PROBE...]
       ubp VERB [OPTION...] PROBE... -- COMMAND [ARGUMENT...]

Measure running programs, by a jump in each probed function.

verbs (`ubp VERB --help` tells their options, and has examples):
%s
probes:
  [MODULE:]FUNCTION[+OFFSET]   * and ? are wild; MODULE is a file name (libc),
                               a path, or exe: the program itself
  [MODULE:]FUNCTION%%return     each exit of it: ret, elapsed, arg0 at entry
  [MODULE:]0xADDRESS           the address that nm prints; without MODULE: the
                               address in the running process
expressions, Python's within 64 bits:
  arg0 arg1 ... ret elapsed caller tid pid cpu nsecs rdi ...; us ms sec KiB MiB
  u8(x) ... s64(x) casts: a C int needs s32(ret); u32[arg0+8] loads;
  str(address) buf(address, size); hex(x) sym(x) for printing

five commands worth copying:
  python3 ubp.py count -p PID 'libc:malloc' 'exe:*Command'
  python3 ubp.py hist -p PID libc:malloc -e arg0
  python3 ubp.py trace -p PID 'libc:open*' -e 'str(arg0)' --hits 10
  python3 ubp.py latency -p "$(pgrep -d, -x nginx)" libssl:SSL_read
  python3 ubp.py clean -p PID
"""


class Misuse(UbpError):
    """The command line makes no sense. Exit status 2."""

    def __init__(self, why, hint="ubp --help"):
        super().__init__("use", "ubp so", why, hint)
        self.args = (why,)


class HelpWanted(UbpError):
    """--help or --version: no error, but text to print."""

    def __init__(self, text):
        super().__init__("parse", "on", "help was asked for")
        self.text = text


def say(text, hint=""):
    """Talk to the user: a line to stderr, or a hint, or both.

    A stderr that is closed or full must not stop a removal: then silence.
    """
    lines = "ubp: %s\n" % escape(text) if text else ""
    if hint:
        lines += "ubp: hint: %s\n" % escape(hint)
    encoding = getattr(sys.stderr, "encoding", None) or "ascii"
    try:
        os.write(2, lines.encode(encoding, "backslashreplace"))
    except OSError:
        return


def report(error):
    """Say what went wrong, and what the user can do."""
    say(str(error), error.hint)
    if isinstance(error, ubp_x86.ExpressionError):
        start = max(error.column - 50, 0)
        say("  " + error.text[start:start + 72])
        say("  " + " " * len(escape(error.text[start:error.column])) + "^")


def report_all(errors, is_success):
    """Report errors; raise the last one if nothing has succeeded."""
    for error in errors[:-1]:
        report(error)
    if errors and not is_success:
        raise errors[-1]
    for error in errors[-1:]:
        report(error)


def describe(pid, name=None):
    """Return "pid 4242 (redis-server)"."""
    return "pid %d (%s)" % (pid, name or comm(pid))


# Terminals whose fonts are not known to have blocks and branches, terminfo(5).
ASCII_TERMS = ("", "dumb", "unknown", "linux", "vt100", "vt102", "vt220")
# The reader's end of a pipe, socket or terminal is gone.
READER_GONE = (errno.EPIPE, errno.ECONNRESET)
POLL_GONE = select.POLLERR | select.POLLHUP | select.POLLNVAL


class Output:
    """Where data goes: a descriptor, with no buffer behind it.

    write() returns when the bytes are out, or when the reader is gone. While
    the reader stands still it returns at a signal that asks for the end (if
    two have, at once) and at `deadline`; what is unwritten then stays in
    `pending` for the next write. Raises UbpError if the disk is full.
    """

    def __init__(self, fd, name, encoding, signals):
        self.fd, self.name, self.encoding = fd, name, encoding
        self.signals = signals
        self.pending = bytearray()
        self.is_gone = False           # the reader went away
        self.deadline = float("inf")   # of time.monotonic()
        try:
            is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        except OSError as error:
            raise UbpError("write to", name, error_words(error))
        self.is_terminal = os.isatty(fd)
        # After POLLOUT a pipe takes PIPE_BUF without blocking, pipe(7), and
        # a terminal some: one that Ctrl-S stopped must not hold us.
        self.chunk_size = (1 << 20 if is_file else
                           512 if self.is_terminal else select.PIPE_BUF)

    def glyphs(self):
        """Return the Glyphs that this output's encoding and TERM allow."""
        if self.is_terminal and os.environ.get("TERM", "") in ASCII_TERMS:
            return ASCII
        try:
            "".join((UNICODE.dots, UNICODE.bar) + UNICODE.branch).encode(
                self.encoding)
            return UNICODE
        except UnicodeEncodeError:
            return ASCII

    def has_reader(self):
        """Is somebody still there to read? False for a broken pipe."""
        if not self.is_gone:
            poller = select.poll()
            poller.register(self.fd, 0)
            self.is_gone = any(event & POLL_GONE
                               for _, event in poller.poll(0))
        return not self.is_gone

    def write(self, text):
        """Write text, all of it unless the reader is gone or stands still."""
        self.pending += text.encode(self.encoding, "backslashreplace")
        n_signals = len(self.signals.seen)
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        while self.pending and not self.is_gone:
            if poller.poll(50):
                self._write_some()
            elif (n_signals < len(self.signals.seen) or n_signals > 1
                  or time.monotonic() >= self.deadline):
                break

    def is_ready(self):
        """Would a write go out at once?"""
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        return not self.pending and bool(poller.poll(0))

    def _write_some(self):
        """One write(2) of what is pending, its errors sorted out."""
        try:
            size = os.write(self.fd, self.pending[:self.chunk_size])
            del self.pending[:size]
        except BlockingIOError:
            time.sleep(0.01)           # poll(2) said otherwise: do not spin
        except OSError as error:
            self.pending.clear()
            self.is_gone = True
            if error.errno not in READER_GONE and not (
                    error.errno == errno.EIO and self.is_terminal):
                raise UbpError("write to", self.name, error_words(error))

    def screen(self):
        """Return (columns, rows) of the terminal as it is now."""
        try:
            columns, rows = os.get_terminal_size(self.fd)
        except OSError:
            columns, rows = 0, 0
        return columns or 80, rows or 24

    def has_live_view(self):
        """Can lines be redrawn in place here?"""
        return (self.is_terminal
                and os.environ.get("TERM", "dumb") not in ("", "dumb"))


def error_words(error):
    """Return "ENOSPC: No space left on device" for an OSError."""
    return "%s: %s" % (errno.errorcode.get(error.errno, error.errno),
                       error.strerror)


class WholeFile(Output):
    """A file that others only ever see whole: replaced, never written to."""

    def __init__(self, path, signals):
        self.path = os.path.abspath(path)
        folder = os.path.dirname(self.path)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UbpError("write to", path, "ENOENT: no such folder"
                           if not os.path.isdir(folder) else
                           "EACCES: its folder cannot be written to")
        super().__init__(os.open(folder, os.O_RDONLY | os.O_DIRECTORY
                                 | os.O_CLOEXEC), path, "utf-8", signals)

    def replace(self, text):
        """Put text in place of what the file holds. Raises UbpError."""
        folder, name = os.path.split(self.path)
        # A collector reads *.prom: the temporary name must not end so.
        path = os.path.join(folder, ".%s.%d.tmp" % (name, os.getpid()))
        try:
            if os.path.lexists(path):       # of a process of that pid, once
                os.unlink(path)
            # "x": where others can write, too, no link of theirs is followed
            with open(path, "x", encoding="utf-8",
                      errors="backslashreplace") as file:
                file.write(text)
            os.rename(path, self.path)
        except OSError as error:
            if os.path.lexists(path):
                os.unlink(path)
            raise UbpError("write to", self.name, error_words(error))


def open_stdout(signals):
    """Return the Output that is descriptor 1. Raises UbpError: closed."""
    if fcntl.fcntl(1, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise UbpError("write to", "stdout", "EBADF: it is closed")
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return Output(1, "stdout", encoding, signals)


def open_output(path, signals):
    """Return the Output for -o PATH, emptied; stdout where there is none."""
    if not path:
        return open_stdout(signals)
    if path.endswith(WHOLE_FORMATS):
        return WholeFile(path, signals)
    try:                               # O_NONBLOCK: a FIFO without a reader
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                     | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise UbpError("write to", path, error_words(error))
    return Output(fd, path, "utf-8", signals)


class Signals:
    """The signals that ask for the end, as events. A context manager.

    seen   signal numbers in order of arrival
    busy   what is being done that no signal interrupts, for the impatient
    Handlers only note: what they interrupt may be a patch half written.
    """

    ENDS = collections.OrderedDict([
        (signal.SIGINT, "interrupt"), (signal.SIGTERM, "terminate"),
        (signal.SIGHUP, "hangup"), (signal.SIGQUIT, "quit")])
    # These a terminal sends to a COMMAND, too; those are the COMMAND's own.
    OF_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
    OF_COMMAND = (signal.SIGUSR1, signal.SIGUSR2)
    # These only end a wait early: a resized window, a return from Ctrl-Z,
    # the end of a COMMAND.
    WAKES = (signal.SIGWINCH, signal.SIGCONT, signal.SIGCHLD)
    # A stop of ubp in the middle of a pause would stop the target with it;
    # and SIGCHLD is what the ptrace thread waits for then.
    HELD = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCHLD)

    def __init__(self):
        self.seen, self.busy, self.handlers = [], "", {}

    def __enter__(self):
        self.read_fd, self.write_fd = os.pipe()
        for fd in self.read_fd, self.write_fd:
            os.set_blocking(fd, False)
        self.old_wakeup_fd = signal.set_wakeup_fd(self.write_fd)
        for signum in tuple(self.ENDS) + self.WAKES:
            # What the caller ignores stays ignored: nohup, jobs of a script.
            if signal.getsignal(signum) not in (signal.SIG_IGN, None) or (
                    signum in self.WAKES):
                self.handlers[signum] = signal.signal(signum, self._note)
        return self

    def take_for_command(self):
        """From now on note what is to be passed on, too."""
        for signum in self.OF_COMMAND:
            if signal.getsignal(signum) == signal.SIG_DFL:
                self.handlers[signum] = signal.signal(signum, self._note)

    def __exit__(self, *error):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self.old_wakeup_fd)
        os.close(self.read_fd)
        os.close(self.write_fd)

    def _note(self, signum, frame):
        """The handler: note it, and answer who asks twice."""
        if signum in self.ENDS or signum in self.OF_COMMAND:
            self.seen.append(signum)
            if self.busy and signum in self.ENDS:
                say("still %s; nothing more is needed" % self.busy)

    def reason(self):
        """Return why to end, in JSON's words, or ""."""
        return self.ENDS[self.seen[0]] if self.seen else ""

    def wait(self, seconds, out=None):
        """Sleep until a signal, a reader gone, or so many seconds."""
        poller = select.poll()
        poller.register(self.read_fd, select.POLLIN)
        if out and not out.is_gone:
            poller.register(out.fd, 0)
        for fd, _ in poller.poll(max(0, int(seconds * 1000 + 0.999))):
            if fd == self.read_fd:
                try:
                    os.read(self.read_fd, 4096)
                except BlockingIOError:
                    continue

    @contextlib.contextmanager
    def uninterrupted(self, busy):
        """While this runs Ctrl-Z waits, and Ctrl-C says what is going on."""
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.HELD)
        old_busy, self.busy = self.busy, busy
        try:
            yield
        finally:
            self.busy = old_busy
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


# -- options ----------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing and exiting."""

    def error(self, message):
        raise Misuse(message, "%s --help" % self.prog)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help in 78 columns: to ask the terminal, argparse imports shutil and
    its compressors, at the first option that a parser is told."""

    def __init__(self, prog, **settings):
        super().__init__(prog, width=78, **settings)


class HelpAction(argparse.Action):
    """--help, told to main() by an exception so that one place prints."""

    def __call__(self, parser, namespace, values, option_string=None):
        raise HelpWanted(parser.format_help())


def parse_seconds(text):
    """Return "500ms", "2s", "1m" or plain seconds as a number of seconds."""
    match = re.match(r"(\d+(?:\.\d*)?|\.\d+)(ms|s|m|h|)\Z", text)
    if not match:
        raise argparse.ArgumentTypeError(
            "%r is no time: say 10, 10s, 500ms, 2m" % text)
    unit = {"ms": 0.001, "m": 60, "h": 3600}.get(match.group(2), 1)
    seconds = float(match.group(1)) * unit
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError("%r is out of range" % text)
    return seconds


def parse_number(text):
    """Return a number of 1 or more."""
    if not re.match(r"0*[1-9]\d{0,8}\Z", text, re.ASCII):
        raise argparse.ArgumentTypeError("%r is no number from 1 on" % text)
    return int(text)


def parse_pids(text):
    """Return the pids in what pgrep prints: commas or white space between."""
    words = [word for word in re.split(r"[,\s]+", text) if word]
    for word in words:
        if not re.match(r"0*[1-9]\d{0,9}\Z", word, re.ASCII):
            raise argparse.ArgumentTypeError("%r is no pid" % word)
    if not words:
        raise argparse.ArgumentTypeError(
            "no pid in %r; did pgrep find nothing?" % text)
    return [int(word) for word in words]


def parse_strategy(text):
    """Return the strategies to try in order, as they are written."""
    try:
        strategies_of(text)
    except ProbeError as error:
        raise argparse.ArgumentTypeError(str(error))
    return text


def parse_output(text):
    """Return the path of -o if its suffix names a format."""
    suffix = os.path.splitext(text)[1]
    if suffix not in FORMATS:
        raise argparse.ArgumentTypeError(
            "%r: the suffix chooses the format: %s" % (
                text, ", ".join(FORMATS)))
    return text


FORMATS = collections.OrderedDict([
    # suffix: the verbs that have something to say in it
    (".txt", "count hist latency stack trace show"),
    (".jsonl", "count hist latency stack trace show"),
    (".prom", "count hist latency"),
    (".svg", "stack trace show"),
    (".folded", "stack trace show"),
    (".json", "trace"),
])
WHOLE_FORMATS = (".prom", ".svg", ".folded")    # replaced, never appended to
PROBING = "count hist latency stack trace"      # the verbs that put probes in
OPTIONS = collections.OrderedDict([
    # name: (verbs, arguments of add_argument)
    ("-p", (PROBING + " list plan status clean", dict(
        dest="pids", metavar="PID[,PID...]", type=parse_pids,
        action="append",
        help="the processes; may be repeated; takes what pgrep prints"))),
    ("-e", ("hist trace plan", dict(
        dest="exprs", metavar="EXPR[,EXPR]", action="append",
        help="what to measure or to print: arg0, 'str(arg1)', ret, elapsed"
        ))),
    ("--if", (PROBING + " plan", dict(
        dest="when", metavar="EXPR", help="only hits for which it is true"))),
    ("--by", ("count hist latency plan show", dict(
        metavar="EXPR[,EXPR]", help="one result for each of its values: tid, "
        "caller, 'str(arg0)'; of show: host"))),
    ("--sum", ("count stack", dict(
        metavar="EXPR", help="add up its values instead of counting"))),
    ("--stack", ("trace", dict(
        action="store_true", help="print the call stack of each hit"))),
    ("--tree", ("trace", dict(
        action="store_true",
        help="entry and exit of functions, nested, with durations"))),
    ("--unwind", ("stack trace", dict(
        metavar="HOW", choices=("cfi", "fp"),
        help="cfi: by .eh_frame, from a copy of the stack; fp: by frame "
             "pointers; by default what the modules allow"))),
    ("--depth", ("stack", dict(
        metavar="N", type=parse_number, default=64,
        help="frames of a stack at most (default 64)"))),
    ("--hits", (PROBING, dict(
        metavar="N", type=parse_number, help="end after N hits"))),
    ("--until", ("trace", dict(
        metavar="EXPR", help="flight recorder: keep the last hits, print "
        "them at the first hit for which EXPR is true, or at Ctrl-C"))),
    ("--duration", (PROBING, dict(
        metavar="TIME", type=parse_seconds,
        help="end after this time: 10 (seconds), 500ms, 2m"))),
    ("--interval", ("count hist latency", dict(
        metavar="TIME", type=parse_seconds,
        help="redraw, or print, or rewrite FILE.prom, this often"))),
    ("--top", ("count hist latency stack show", dict(
        metavar="N", type=parse_number,
        help="show the N largest only"))),
    ("--json", (PROBING + " status show", dict(
        action="store_true", help="print JSON Lines"))),
    ("-o", (PROBING + " show", dict(
        dest="output", metavar="FILE", type=parse_output,
        help="write to FILE, whose suffix chooses the format: %s"
             % " ".join(FORMATS)))),
    ("--leave", ("count", dict(
        action="store_true",
        help="leave the probes in place and exit; status reads them"))),
    ("--dry-run", (PROBING + " clean", dict(
        action="store_true", help="only print what would be done"))),
    ("--max-sites", (PROBING, dict(
        metavar="N", type=parse_number, default=10000,
        help="refuse probes that name more functions (default 10000)"))),
    ("--suspend-seccomp", (PROBING + " clean", dict(
        action="store_true",
        help="where a seccomp filter forbids what arming injects, suspend it "
             "meanwhile (root); a kill -9 of ubp just then may kill it"))),
    ("--follow-exec", (PROBING, dict(
        action="store_true",
        help="probe the programs that it and its children become by exec, "
             "too, before their entry points: --by pid tells them apart; a "
             "guardian traces them meanwhile"))),
    ("--max-rate", (PROBING, dict(
        metavar="N", type=parse_number,
        help="take out an int3 or debug register that is hit more than N "
             "times a second"))),
    ("--strategy", (PROBING + " plan", dict(
        metavar="LIST", type=parse_strategy, default="jump",
        help="how to probe, tried in order: jump (the default); int3 (any "
             "instruction, a stop per hit); hw (debug registers, four per "
             "thread); hw-ptrace (the same, traced)"))),
    ("--all", ("clean", dict(
        action="store_true",
        help="take out also what a running ubp of others put in"))),
])
# Said once for each group of probes; a lone + begins another group.
_EXPRESSION_OPTIONS = ("-e", "--if", "--by", "--sum", "--until")
USAGE = {
    "list": "list -p PID[,PID...] PROBE...",
    "plan": "plan -p PID[,PID...] [OPTION...] PROBE...",
    "status": "status [-p PID[,PID...]] [--json]",
    "clean": "clean -p PID[,PID...] [--all] [--dry-run]",
    "show": "show [--by host] [OPTION...] FILE.jsonl...|-",
}
for _verb in PROBING.split():
    USAGE[_verb] = (
        "%s -p PID[,PID...] [OPTION...] PROBE... [+ [OPTION...] PROBE...]\n"
        "       ubp %s [OPTION...] PROBE... -- COMMAND [ARG...]"
        % (_verb, _verb))
EXAMPLES = {
    "count": """
ubp count -p PID 'libc:str*' --interval 1
ubp count -p PID 'libssl:*' --by caller
ubp count -p PID libc:write --by arg0 --sum arg2
ubp count -p PID mem:counter/8:w --strategy hw --by caller
""",
    "hist": """
ubp hist -p PID libc:read%return --if 'arg0 == 5' -e 's64(ret)'
ubp hist -p PID 'exe:*Command%return' -e 's32(ret)'
ubp hist -p PID libc:malloc -e arg0 --by tid
""",
    "latency": """
ubp latency -p PID libc:pthread_mutex_lock
ubp latency -p PID exe:processCommand --interval 1 -o redis.prom
""",
    "stack": """
ubp stack -p PID libc:malloc --sum arg0 -o malloc.svg
ubp stack -p PID libssl:SSL_write%return --if 's32(ret) <= 0'
""",
    "trace": """
ubp trace -p PID libc:fsync%return -e 'arg0, elapsed' --if 'elapsed > 500*us'
ubp trace -p PID libc:open64 -e 'str(arg0), hex(arg1)' --stack --hits 5
ubp trace -p PID libssl:SSL_read%return -e 'buf(arg1, s32(ret))'
ubp trace -p PID --tree 'exe:*Command' exe:call --if 'elapsed > 1*ms'
ubp trace -p PID --json libc:malloc%return -e 'arg0, hex(ret)' + \\
          libc:free -e 'hex(arg0)'
ubp trace -p PID libc:abort --stack --hits 1
ubp trace -p PID 'exe:*Command%return' -e elapsed --until 'elapsed > 10*ms'
""",
    "show": """
ubp show web*.jsonl
cat *.jsonl | ubp show - --by host --json
ubp show stacks*.jsonl -o all.svg
""",
}


class Group(NamedTuple):
    """Probes that share what is said of them on the command line."""
    probes: tuple = ()
    exprs: tuple = ()       # texts of -e, one expression each
    when: str = ""
    keys: tuple = ()        # texts of --by
    sum: str = ""
    stack: bool = False
    unwind: Optional[str] = None
    depth: int = 64
    until: str = ""


def verb_parser(verb):
    """Return the argparse parser of one verb's options."""
    summary = dict(line.split(None, 1) for line in VERBS.split("\n") if line)
    # Probes are whatever argparse leaves over: its own positionals may not
    # stand between options before Python 3.7.
    examples = EXAMPLES.get(verb, "")
    parser = Parser(prog="ubp " + verb, usage="ubp " + USAGE[verb],
                    description=summary[verb].capitalize() + ".",
                    allow_abbrev=False, add_help=False,
                    epilog=examples and "examples:" + examples.replace(
                        "\n", "\n  ").rstrip(),
                    formatter_class=HelpFormatter)
    parser.color = False               # Python 3.14 would colour --help
    parser.add_argument("-h", "--help", nargs=0, action=HelpAction,
                        help="show this help")
    for name, (verbs, arguments) in OPTIONS.items():
        if verb in verbs.split():
            parser.add_argument(name, **arguments)
    return parser


def split_words(words, verb):
    """Return words as every argparse from 3.6 on splits them.

    -p4242 becomes -p 4242; and an expression is tied to its option, as one
    like `-arg0` would be taken for another option.
    """
    result, words = [], list(words)
    while words:
        word = words.pop(0)
        if re.match(r"-([peo][^-=]|e-)", word):
            words.insert(0, word[2:])
            word = word[:2]
        if (word in _EXPRESSION_OPTIONS and words
                and verb in OPTIONS[word][0].split()):
            word += "=" + words.pop(0)
        result.append(word)
    return result


def split_groups(words):
    """Return words cut at each lone +."""
    groups = [[]]
    for word in words:
        if word == "+":
            groups.append([])
        else:
            groups[-1].append(word)
    return groups


VERB_LIST = "count, hist, latency, stack, trace, show, list, plan, status " \
            "or clean"


def parse_options(argv):
    """Return the options that argv stands for; options.groups: [Group].

    argv   the words behind the program's name
    Raises Misuse, ExpressionError, or HelpWanted with the text to print.
    """
    words, command = list(argv), None
    if "--" in words:
        cut = words.index("--")
        words, command = words[:cut], words[cut + 1:]
    if not words:
        raise Misuse("a verb is missing: " + VERB_LIST)
    verb = words.pop(0)
    if verb in ("-h", "--help", "help"):
        raise HelpWanted(HELP % VERBS.strip("\n").replace("\n", "\n  ")
                         .join(["  ", "\n"]))
    if verb in ("-V", "--version"):
        raise HelpWanted("ubp %s\n" % __version__)
    if verb not in USAGE:
        raise Misuse("%r is no verb: say %s" % (verb, VERB_LIST))
    parts = []
    for words in split_groups(split_words(words, verb)):
        options, rest = verb_parser(verb).parse_known_args(words)
        for word in rest:
            check_rest(word, verb)
        options.probes = rest
        parts.append(options)
    options = merged_options(parts)
    options.verb, options.command = verb, command
    complete_options(options)
    options.groups = [parse_group(verb, part, options) for part in parts]
    return options


def merged_options(parts):
    """Return the options of all groups as one; the last word counts."""
    defaults = default_options()
    merged = argparse.Namespace(**defaults)
    for part in parts:
        for name, value in vars(part).items():
            if name in ("pids", "probes"):
                setattr(merged, name, (getattr(merged, name, None) or [])
                        + (value or []))
            elif value != defaults.get(name):
                setattr(merged, name, value)
    return merged


def default_options():
    """Return {name: value} of all options as they are when none is given."""
    return {arguments.get("dest", name.strip("-").replace("-", "_")):
            arguments.get("default", False if arguments.get("action")
                          == "store_true" else None)
            for name, (_, arguments) in OPTIONS.items()}


def check_rest(word, verb):
    """Raise Misuse unless a word that argparse left over may be a probe."""
    name = word.split("=")[0]
    if word.startswith("-") and word != "-":
        elsewhere = OPTIONS.get(name, ("",))[0].split()
        raise Misuse("%s has no option %s" % (verb, name) + (
            "; it belongs to %s" % ", ".join(elsewhere) if elsewhere else ""),
            "ubp %s --help" % verb)


def complete_options(options):
    """Check what options say together, and fill in what they leave out."""
    verb, hint = options.verb, "ubp %s --help" % options.verb
    pids = [pid for pids in getattr(options, "pids", None) or ()
            for pid in pids]
    options.pids = list(collections.OrderedDict.fromkeys(pids))
    if options.command is not None:
        check_command_options(options, hint)
    elif not options.pids and verb not in ("status", "show"):
        raise Misuse("%s needs -p PID" % verb + (
            " or -- COMMAND" if verb in PROBING.split() else ""), hint)
    if verb in ("status", "clean"):
        if options.probes:
            raise Misuse("%s takes no probe: %r" % (verb, options.probes[0]),
                         hint)
    elif verb == "show":
        if not options.probes:
            raise Misuse("no file: say what to show, for example *.jsonl, or "
                         "- for standard input", hint)
    elif not options.probes:
        raise Misuse("no probe: say what to %s, for example 'libc:malloc'"
                     % verb, hint)
    lost = sorted(set(strategies_of(getattr(options, "strategy", "jump")))
                  & set(HARDWARE))
    if getattr(options, "leave", False) and lost:
        raise Misuse("--leave cannot leave %s: debug registers end with the "
                     "process that set them" % lost[0], "--strategy jump, or "
                     "jump,int3")
    suffix = os.path.splitext(getattr(options, "output", None) or "")[1]
    if suffix and verb not in FORMATS[suffix].split():
        raise Misuse("%s has no %s to write; -o FILE.%s belongs to %s" % (
            verb, suffix, suffix[1:], FORMATS[suffix].replace(" ", ", ")),
            hint)


def check_command_options(options, hint):
    """Check what cannot be said together with a COMMAND."""
    if options.verb not in PROBING.split():
        raise Misuse("%s takes no COMMAND" % options.verb if options.verb in
                     ("status", "show") else "%s takes -p PID, no COMMAND"
                     % options.verb, hint)
    if not options.command:
        raise Misuse("no COMMAND behind --", hint)
    if options.pids:
        raise Misuse("-p and a COMMAND exclude each other", hint)
    if getattr(options, "leave", False):
        raise Misuse("--leave needs -p: a COMMAND's end ends its probes")
    if getattr(options, "interval", None) and not options.output:
        raise Misuse("--interval with a COMMAND needs -o FILE: stdout is "
                     "the command's until it ends", hint)


def parse_group(verb, part, options):
    """Return the Group of one part of the command line, checked."""
    hint = "ubp %s --help" % verb
    get = lambda name: getattr(part, name, None) or ""    # noqa: E731
    if verb in ("status", "clean", "show", "list"):
        if verb == "show" and get("by") not in ("", "host"):
            raise Misuse("show adds up, or is by host: %r" % part.by, hint)
        check_probes(part.probes if verb == "list" else (), verb, hint)
        return Group(tuple(part.probes))
    if not part.probes:
        raise Misuse("no probe beside the +", hint)
    check_group(verb, options, part, hint)
    check_probes(part.probes, verb, hint)
    exits = {verb == "latency" or probe.endswith("%return")
             for probe in part.probes}
    if getattr(part, "tree", False) or getattr(options, "tree", False):
        exits = {True}
    texts = {}
    for name in "exprs", "by":
        text = get(name) if name == "by" else ", ".join(get(name))
        texts[name] = split_expressions(text, exits) if text else ()
    for name in "when", "sum", "until":
        for is_exit in exits if get(name) else ():
            check_is_number(ubp_x86.parse_expression(get(name), is_exit))
    if verb == "hist" and len(texts["exprs"]) != 1:
        raise Misuse("hist needs one expression: -e arg0, say, or -e elapsed",
                     hint)
    if verb == "hist":
        check_is_number(ubp_x86.parse_expression(texts["exprs"][0], True))
    return Group(tuple(part.probes), texts["exprs"], get("when"),
                 texts["by"], get("sum"), bool(get("stack")),
                 get("unwind") or None, get("depth") or 64, get("until"))


def check_is_number(expression):
    """Raise ExpressionError for text where a number is needed."""
    if expression.kind != "int":
        raise ubp_x86.ExpressionError(expression.text, 0, "a number is "
                                      "needed here, and this is text")


def check_probes(probes, verb, hint):
    """Raise Misuse for a probe that cannot be read."""
    for probe in probes:
        try:
            parse_probe(probe)         # a typing error is told before a start
        except UbpError as error:
            raise Misuse(str(error), error.hint or hint)


def check_group(verb, options, part, hint):
    """Raise Misuse for what a group's options say together."""
    returns = [probe for probe in part.probes if probe.endswith("%return")]
    if returns and (verb == "latency" or getattr(options, "tree", False)):
        raise Misuse("%s probes entry and exit itself: %s without %%return"
                     % ("--tree" if verb == "trace" else verb, returns[0]),
                     hint)
    suffix = os.path.splitext(getattr(options, "output", None) or "")[1]
    if (verb == "trace" and suffix in (".svg", ".folded")
            and not part.stack):
        raise Misuse("-o FILE%s needs --stack" % suffix, hint)
    if getattr(part, "unwind", None) and verb == "trace" and not part.stack:
        raise Misuse("--unwind needs --stack", hint)


def split_expressions(text, exits):
    """Return the expressions of "a, b", each checked. -> (text, …)"""
    found = ()
    for is_exit in exits:
        found = ubp_x86.parse_expressions(text, is_exit)
    return tuple(each.text.strip() for each in found)


# -- tables and JSON --------------------------------------------------------

def site_label(site):
    """Return "libc.so.6:malloc+0x4" for a site, escaped."""
    return escape("%s:%s" % (site.module.name, site_name(site)))


HOST = os.uname().nodename


def place(pid, site, is_exit=False, is_function=False):
    """Return the Where of a Site in one process of this host.

    is_exit      it is one exit of its function, and stands for all of them
    is_function  it stands for the function, whichever instruction it is
    """
    name, vaddr = site_name(site), site.vaddr
    if (is_exit or is_function) and site.function:
        name, vaddr = site.function.name, vaddr - site.offset
        name += "" if is_function else "%return"
    return Where(HOST, pid, site.module.name, site.module.build_id, name,
                 vaddr)


def json_line(kind, pid, where=None, **fields):
    """Return one JSON object as a line. Fields are added, never renamed."""
    record = collections.OrderedDict([
        ("v", 1), ("kind", kind), ("time_ns", int(time.time() * 1e9)),
        ("host", HOST), ("pid", pid), ("module", None),
        ("build_id", None), ("function", None)])
    if where is not None:
        record["host"] = where.host
        record["module"] = json_text(where.module)
        record["build_id"] = where.build_id
        record["function"] = json_text(where.function)
        if where.address is not None:
            record["address"] = "0x%x" % where.address
    record.update(fields)
    return to_json(record) + "\n"


class Live:
    """A block of lines at the foot of a terminal, redrawn in place.

    One write a frame, each line cleared to its end behind its text, so
    nothing flickers; the cursor rests in the first column below the block.
    """

    def __init__(self, out):
        self.out, self.screen = out, None  # (columns, rows) at the last frame
        self.sizes = []                    # the length of each line on it

    def _up(self):
        """Return what takes the cursor back to the block's first line."""
        columns, _ = self.out.screen()
        # A window made narrower has wrapped the lines that were there.
        n_rows = sum(max(1, -(-size // columns)) for size in self.sizes)
        return "\r" + ("\x1b[%dA" % n_rows if n_rows else "")

    def draw(self, lines):
        """Put lines in place of those of the last frame."""
        if self.is_in_background() or not self.out.is_ready():
            return
        # Without autowrap a line that is too wide after all (wide characters)
        # cannot push the block out of shape.
        self.out.write("\x1b[?7l" + self._up() + "".join(
            line + "\x1b[K\n" for line in lines) + "\x1b[J\x1b[?7h")
        self.sizes = [len(line) for line in lines]
        self.screen = self.out.screen()

    def is_outdated(self):
        """Was the window resized since the last frame?"""
        return self.screen is not None and self.screen != self.out.screen()

    def erase(self):
        """Take the block off the screen, so that plain text may follow."""
        if (self.sizes and self.out.is_ready()
                and not self.is_in_background()):
            self.out.write(self._up() + "\x1b[J")
            self.sizes = []

    def is_in_background(self):
        """Is the terminal somebody else's at the moment (Ctrl-Z, bg)?"""
        try:
            return os.tcgetpgrp(self.out.fd) != os.getpgrp()
        except OSError:                # not our controlling terminal
            return False


# -- verbs ------------------------------------------------------------------

def open_targets(options):
    """Attach to each pid, or launch the COMMAND, held. -> Targets.

    A pid that cannot be attached to is reported; raises UbpError if that
    is true of all.
    """
    if options.command:
        return [launch(options.command, follow_exec=options.follow_exec)]
    targets, errors = [], []
    for pid in options.pids:
        try:
            targets.append(attach(
                pid, suspend_seccomp=getattr(options, "suspend_seccomp",
                                             False),
                follow_exec=getattr(options, "follow_exec", False)))
        except UbpError as error:
            errors.append(error)
    report_all(errors, bool(targets))
    return targets


def kill_command(target):
    """End a COMMAND that is held and must not run. Its probes failed."""
    if target.alive:
        os.kill(target.pid, signal.SIGKILL)
    say("the command was not run")


class NoSuchFunction(SymbolError):
    """A probe that is the name of a file: the shell expanded a pattern."""

    def __init__(self, probe):
        super().__init__("find", probe, "no such function",
                         "the shell expands * outside of quotes")
        self.args = ("no function \"%s\"; did the shell expand *? "
                     "quote the probe: '*Command'" % probe,)


@contextlib.contextmanager
def expansion_told(probes):
    """If there is no such function, say so when it is a file's name."""
    try:
        yield
    except SymbolError as error:
        for probe in probes:
            if (":" not in probe and probe in error.whom
                    and os.path.lexists(probe)):
                raise NoSuchFunction(probe)
        raise


def each_target(options, visit):
    """Call visit(target) for each target. -> exit status: 0 if one worked.

    The error of one process is told, and does not keep others from theirs.
    """
    status_code = 1
    for target in open_targets(options):
        with target:
            try:
                visit(target)
                status_code = 0
            except UbpError as error:
                report(error)
            for note in target.notes:
                say(note)
            if options.command:
                kill_command(target)
    return status_code


def verb_list(options, signals):
    """List the functions that the probes name."""
    out = open_stdout(signals)

    def visit(target):
        sites = {}
        with expansion_told(options.probes):
            for probe in options.probes:
                for site in target.find(probe):
                    sites.setdefault(site.vaddr, site)
        lines = [list_line(sites[vaddr]) for vaddr in sorted(sites)]
        if len(options.pids) > 1:
            lines.insert(0, escape(describe(target.pid, target.comm)))
        if out.is_terminal:
            columns, _ = out.screen()
            lines = [elide(line, columns, out.glyphs().dots)
                     for line in lines]
        out.write("".join(line + "\n" for line in lines))

    return each_target(options, visit)


def list_line(site):
    """Return "0xADDRESS  SIZE  MODULE:NAME = ALIAS, ALIAS" for a site."""
    aliases = escape(", ".join(site.names[1:]))
    return "0x%012x %7d  %s%s" % (
        site.vaddr, site.function.size if site.function else 0,
        site_label(site),
        " = " + aliases if aliases else "")


def verb_plan(options, signals):
    """Show how each site would be probed. The target is not stopped."""
    out = open_stdout(signals)

    def visit(target):
        name = describe(target.pid, target.comm)
        with Progress("planning %s" % name) as progress, \
                expansion_told(options.probes):
            plans = sorted(target.plan(options.probes, options.strategy,
                                       progress=progress.tell),
                           key=lambda plan: plan.site.vaddr)
        if options.verb != "plan" and len(plans) > options.max_sites:
            raise ProbeError("probe", name, "%s match, and --max-sites is %d"
                             % (plural(len(plans), "function"),
                                options.max_sites))
        if len(options.pids) > 1:
            out.write(escape(name) + "\n")
        for plan in plans:
            for part in plan.parts or (plan,):
                out.write(plan_text(part))
        out.write(plan_summary(plans))
        for text in reading_expressions(options.groups):
            out.write("%s reads memory by a pointer: a system call, about "
                      "%s a hit here; a bad pointer is a counted fault\n"
                      % (escape(text), quantity(pointer_read_ns(), "ns")))

    return each_target(options, visit)


def reading_expressions(groups):
    """Return the texts of the expressions that follow pointers, each once.
    """
    texts = [text for group in groups for text in group.exprs + group.keys
             + tuple(filter(None, (group.when, group.sum, group.until)))]
    return [text for text in collections.OrderedDict.fromkeys(texts)
            if ubp_x86.parse_expression(text, True).reads_memory]


def pointer_read_ns():
    """Return what a copy of 64 bytes by process_vm_readv(2) takes here.

    It is what a body does at each hit, without Python's part: that is what
    the same call takes that the kernel refuses at once, for its flags.
    """
    buffer, pid = ctypes.create_string_buffer(64), os.getpid()
    piece = Iovec(ctypes.addressof(buffer), 64)
    at, times = ctypes.addressof(piece), []
    for flags in 0, 1:
        began = time.perf_counter()
        for _ in range(2000):
            _readv(pid, at, 1, at, 1, flags)
        times.append((time.perf_counter() - began) / 2000)
    return max(int((times[0] - times[1]) * 1e9), 1)


def plan_text(plan):
    """Return the two lines that tell one site's plan."""
    head = "0x%012x  %s\n" % (plan.site.vaddr, site_label(plan.site))
    window = plan.window
    if not plan.strategy:
        return head + "    refused, %s: %s\n" % (escape(plan.rule),
                                                 escape(plan.why))
    if plan.strategy in HARDWARE:
        return head + "    %s: %s of each thread\n" % (
            plan.strategy, "a debug register" if len(plan.all_parts) == 1 else
            "%d debug registers" % len(plan.all_parts))
    if plan.strategy == "int3":
        return head + ("    int3 at %s, moved to a trampoline of %s; a stop "
                       "per hit; killed with its guardian by kill -9, ubp "
                       "leaves it deadly\n" % (
                           window.insns[0].code.hex(),
                           plural(plan.trampoline_size, "byte")))
    behind = window.site - plan.site.vaddr
    slot = getattr(window, "slot", 0)
    return head + "    %s%s over %s: %s (%s)%s; trampoline %s\n" % (
        plan.strategy, " at +%d" % behind if behind else "",
        plural(window.size, "byte"),
        " ".join(insn.code.hex() for insn in window.insns),
        "+".join("%d" % insn.size for insn in window.insns),
        ", by way of 0x%x" % slot if slot else
        ", for the slot in it" if plan.spec == _LEND else "",
        plural(plan.trampoline_size, "byte"))


def plan_summary(plans):
    """Return "9 sites: 8 jump, 1 refused (too short: 1)" as a line."""
    others = "".join("%d %s, " % (n, name) for name, n in sorted(
        collections.Counter(plan.strategy for plan in plans).items())
        if name not in ("", "jump"))
    refused = collections.Counter(plan.rule for plan in plans
                                  if not plan.strategy)
    n_refused = sum(refused.values())
    rules = ", ".join("%s: %d" % (escape(rule), n)
                      for rule, n in refused.most_common())
    return "%s: %d jump, %s%d refused%s\n" % (
        plural(len(plans), "site"),
        sum(plan.strategy == "jump" for plan in plans), others, n_refused,
        " (%s)" % rules if rules else "")


class Progress:
    """A line on a terminal's stderr while something takes its time.

    A context manager. A bar from the first second on, drawn by tell(), four
    times a second, and taken away at the end. Not by a thread: beside one
    Foresight does not fork.
    """

    def __init__(self, text):
        self.text, self.began, self.drawn = escape(text), time.monotonic(), 0
        self.is_seen = os.isatty(2) and os.environ.get("TERM",
                                                       "dumb") != "dumb"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.drawn:
            os.write(2, b"\r\x1b[K")

    def tell(self, n, n_all):
        """So many are done, of all."""
        seconds = time.monotonic() - self.began
        if not self.is_seen or seconds < max(1, self.drawn + 0.25):
            return
        self.drawn, share = seconds, n / n_all
        line = "ubp: [%-20s] %3d %%, %d s: %s" % (
            "#" * int(20 * share), int(100 * share), seconds, self.text)
        try:
            width = os.get_terminal_size(2).columns or 80
        except OSError:
            width = 80
        line = "\r\x1b[K" + line[:max(width - 1, 20)]
        os.write(2, line.encode("ascii", "backslashreplace"))


def strategies_told(probes):
    """Return "3 sites by jump, 1 site by hw"; a site of two probes is one."""
    found = collections.OrderedDict()
    for probe in probes:
        for name, n in probe.strategies().items():
            found[name] = found.get(name, 0) + n
    n_all = len({site.vaddr for probe in probes for site in probe.sites})
    if len(found) == 1:
        found = {name: n_all for name in found}
    return ", ".join("%s by %s" % (plural(n, "site"), name)
                     for name, n in found.items()) or "no site yet"


def pages_equal(removal):
    """Return what a Removal, or a CleanResult, says of the text."""
    if removal.n_equal != removal.n_pages:
        has_others = any(find_arenas(pid) for pid in removal.pids)
        return "%d of %s equal their files%s" % (
            removal.n_equal, plural(removal.n_pages, "page"),
            " (there are probes of another ubp)" if has_others else "")
    if not removal.n_pages:
        return "no page was written"
    if removal.n_pages == 1:
        return "1 page equals its file"
    return "%d pages equal their files" % removal.n_pages


def verb_status(options, signals):
    """Show the probes that are in place, whose, and their counts."""
    out = open_stdout(signals)
    arenas = []
    for pid in options.pids or [None]:
        if pid and not read_stat(pid):
            raise AttachError("look at", "pid %d" % pid, "no such process")
        found = status(pid)
        arenas += found
        if not found:
            say("%s: no probes of ubp are in it" % describe(pid) if pid
                else "no process that may be looked at has probes of ubp")
    for arena in arenas:
        out.write(status_json(arena) if options.json else status_text(arena))
    if options.json:
        hits = sum(site.calls or 0 for arena in arenas for site in arena.sites)
        pids = [arena.pid for arena in arenas]
        out.write(json_line("end", pids[0] if len(pids) == 1 else None,
                            reason="status", hits=hits, recorded=hits,
                            dropped=0, refused=0, pause_us=0))
    elif any(arena.sites for arena in arenas):
        say("no uprobe and no breakpoint of gdb may be set on these functions "
            "while probes are in them", "clean -p PID takes them out")
    return 0


def status_text(arena):
    """Return one arena's state as lines."""
    if not arena.owner_pid:
        return "pid %d (%s): memory of a ubp that died before it used it\n" \
            % (arena.pid, escape(arena.comm))
    when = time.strftime("%Y-%m-%d %H:%M:%S",
                         time.localtime(arena.time_ns / 1e9))
    owner = "pid %d" % arena.owner_pid
    lines = ["pid %d (%s): %s, %s by %s%s, %s" % (
        arena.pid, escape(arena.comm), plural(len(arena.sites), "site"),
        "left" if arena.left else "put there", owner,
        "" if arena.owner_alive else " (gone)", when)]
    if arena.children:
        lines.append("  also in %s forked since: %s" % (
            "a child" if len(arena.children) == 1 else "children",
            ", ".join("%d" % pid for pid in arena.children)))
    if arena.guardian:
        lines.append("  its int3s are kept by pid %d: if that is killed by "
                     "kill -9, the next hit kills pid %d"
                     % (arena.guardian, arena.pid))
    if arena.lenders:
        lines.append("  two-byte jumps lead through the text of %s" % escape(
            ", ".join(arena.lenders)))
    if arena.n_own:
        lines.append("  %s of ubp's own: there it learns what pid %d does "
                     "about SIGTRAP" % (plural(arena.n_own, "int3"),
                                        arena.pid))
    if arena.n_bad:
        lines.append("  %s of its journal cannot be read"
                     % plural(arena.n_bad, "record"))
    if arena.sites:
        lines.append("       calls  state     function")
    for site in sorted(arena.sites, key=lambda site: -(site.calls or 0)):
        lines.append("  %10s  %-8s  %s" % (
            "-" if site.calls is None else site.calls, escape(site.state),
            escape("%s:%s" % (site.module, site.name))))
    return "".join(line + "\n" for line in lines)


def status_json(arena):
    """Return one arena's sites as JSON Lines."""
    return "".join(
        json_line("count", arena.pid, module=json_text(site.module),
                  build_id=site.build_id, function=json_text(site.name),
                  address="0x%x" % site.vaddr, calls=site.calls,
                  total=site.calls, state=site.state,
                  owner_pid=arena.owner_pid,
                  owner_alive=bool(arena.owner_alive), left=bool(arena.left),
                  guardian_pid=arena.guardian)
        for site in arena.sites)


def verb_clean(options, signals):
    """Take out probes that were left, or whose owner died."""
    if options.dry_run:
        options.json = False
        return verb_status(options, signals)
    status_code = 0
    for pid in options.pids:
        name = describe(pid)
        try:
            with signals.uninterrupted("cleaning %s" % name):
                result = clean(pid, all=options.all,
                               suspend_seccomp=options.suspend_seccomp)
        except UbpError as error:
            report(error)
            status_code = 1
            continue
        for note in result.notes:
            say(note)
        if not result.n_arenas and not result.n_sites:
            if not result.notes:
                say("%s: no probes of ubp are in it" % name)
        else:
            say("%s: removed %s, %s%s" % (
                name, plural(result.n_sites, "site"), pages_equal(result),
                "; also in %s" % ", ".join(
                    "%d" % other for other in result.pids if other != pid)
                if len(result.pids) > 1 else ""))
    return status_code


def children_of(pid):
    """Return the pids of a process's running children of the same program.

    pgrep -P and -x look at the same: the parent's pid, and the name. Each
    thread's file "children" needs CONFIG_PROC_CHILDREN, proc(5).
    """
    name, found = comm(pid), []
    if os.path.exists("/proc/%d/task/%d/children" % (pid, pid)):
        entries = [int(word) for tid in thread_ids(pid) for word in
                   read_proc("/proc/%d/task/%d/children" % (pid, tid)).split()]
    else:
        entries = _process_ids()
    for entry in sorted(entries):
        fields = read_stat(entry)
        if (len(fields) > 1 and fields[1] == "%d" % pid
                and fields[0] not in "ZX" and comm(entry) == name):
            found.append(entry)
    return found


# -- views ------------------------------------------------------------------

class View:
    """What a verb computes, and how its results are shown: one for each.

    Its results are [(Group, [Row])], whether they come from probes or from
    JSON Lines; groups that are told alike share a table.
    """

    kind = "count"                     # of its JSON objects

    def actions(self, group):
        """Return [(probes, Action, condition)] for a Group."""
        return [(group.probes, Count(", ".join(group.keys) or None,
                                     group.sum or None), group.when)]

    def likeness(self, group):
        """Return what groups must have in common to be shown as one."""
        return group._replace(probes=(), when="", until="")

    def lines(self, group, rows, seconds, is_final, size, n_top, glyphs):
        """Return the lines of a group's rows."""
        head = TableHead("sum" if group.sum else "calls", group.keys)
        return table_lines(rows, seconds, is_final, size, n_top, glyphs, head)

    def fields(self, group, row):
        """Return JSON's own fields of a row."""
        now, total = row.now, row.total
        found = collections.OrderedDict([
            ("calls", now.count if group.sum else now),
            ("total", total.count if group.sum else total)])
        if group.sum:
            found.update(expression=group.sum, sum=int(total))
        return found

    def json(self, group, row):
        """Return a row as a line of JSON."""
        fields = self.fields(group, row)
        if group.keys:
            fields["key"] = [json_value(part) for part in row.key]
            fields["by"] = list(group.keys)
        return json_line(self.kind, row.where.pid, row.where, **fields)

    def document(self, suffix, results, losses, title):
        """Return the text of a file that is written as a whole."""
        return open_metrics([
            ("sum" if group.sum else self.kind, rows, self.expression(group),
             group.keys) for group, rows in results], losses)

    def expression(self, group):
        """Return what is measured, as the user knows it."""
        return group.sum


class HistView(View):
    """Distributions: bars, percentiles, buckets."""

    kind = "hist"

    def actions(self, group):
        """Return [(probes, Action, condition)] for a Group."""
        return [(group.probes, Hist(group.exprs[0],
                                    ", ".join(group.keys) or None),
                 group.when)]

    def expression(self, group):
        """Return what is measured, as the user knows it."""
        return group.exprs[0]

    def lines(self, group, rows, seconds, is_final, size, n_top, glyphs):
        """Return the lines of a group's histograms."""
        if not is_final:
            rows = [row._replace(total=row.now) for row in rows
                    if row.now.count]
        return histograms_lines(rows, self.expression(group), group.keys,
                                size, n_top, glyphs)

    def fields(self, group, row):
        """Return JSON's own fields of a row; the buckets since arming."""
        total = row.total
        return collections.OrderedDict([
            ("calls", row.now.count), ("total", total.count),
            ("expression", self.expression(group)), ("count", total.count),
            ("sum", total.sum), ("min", total.min), ("max", total.max),
            ("buckets", [list(bucket) for bucket in total.buckets])])


class LatencyView(HistView):
    """Distributions of the time from entry to exit."""

    kind = "latency"

    def actions(self, group):
        """Return [(probes, Action, condition)] for a Group."""
        return [(group.probes, Latency(", ".join(group.keys) or None),
                 group.when)]

    def expression(self, group):
        """Return what is measured, as the user knows it."""
        return "elapsed"


class StackView(View):
    """Call stacks: a tree, folded lines, a flame graph."""

    kind = "stack"

    def actions(self, group):
        """Return [(probes, Action, condition)] for a Group."""
        return [(group.probes, Stack(group.depth, group.sum or None,
                                     group.unwind), group.when)]

    def lines(self, group, rows, seconds, is_final, size, n_top, glyphs):
        """Return the lines of a tree of all stacks."""
        return tree_lines(self.stacks(rows), size, n_top, glyphs)

    @staticmethod
    def stacks(rows):
        """Return {stack: n} of rows."""
        found = {}
        for row in rows:
            stack = row.key or (row.where.label(),)
            found[stack] = found.get(stack, 0) + int(row.total)
        return found

    def json(self, group, row):
        """Return a row as a line of JSON."""
        return json_line(self.kind, row.where.pid, row.where,
                         stack=[json_text(frame) for frame in row.key],
                         **self.fields(group, row))

    def document(self, suffix, results, losses, title):
        """Return folded lines, or a flame graph, of all groups."""
        stacks, sums = {}, set()
        for group, rows in results:
            sums.add(group.sum)
            for stack, n in self.stacks(rows).items():
                stacks[stack] = stacks.get(stack, 0) + n
        return stacks_document(suffix, stacks, title,
                               ", ".join(sorted(sums - {""})) or "hits")


class TraceView(View):
    """A line for each hit. Its results are Hits, not rows."""

    kind = "trace"

    def __init__(self, is_tree=False, is_recorder=False):
        self.is_tree, self.is_recorder = is_tree, is_recorder

    def actions(self, group):
        """Return [(probes, Action, condition)] for a Group.

        A tree probes entries with what they know and exits with the rest;
        where only the exit can tell, the exits alone.
        """
        how = {"overflow": "overwrite"} if self.is_recorder else {}
        if group.stack:
            how.update(stack=True)
        if not self.is_tree:
            return [(group.probes, Trace(*group.exprs, **how), group.when)]
        exits = tuple(probe + "%return" for probe in group.probes)
        if self.is_exits_only(group):
            exprs = group.exprs + ("elapsed",) * (
                "elapsed" not in group.exprs)
            return [(exits, Trace(*exprs, **how), group.when)]
        early = tuple(each for each in group.exprs if not needs_exit(each))
        late = tuple(each for each in group.exprs if each not in early)
        # The exits first: a function that cannot be left is not entered.
        return [(exits, Trace(*late, **how), group.when),
                (group.probes, Trace(*early, **how), group.when)]

    @staticmethod
    def is_exits_only(group):
        """Does the condition need what only an exit knows?"""
        return bool(group.when) and needs_exit(group.when)


def needs_exit(text):
    """Does an expression use what only an exit knows?"""
    return bool(ubp_x86.parse_expression(text, True).names
                & set(ubp_x86.EXIT_NAMES))


def stacks_document(suffix, stacks, title, unit):
    """Return {stack: n} as a file of this suffix."""
    if suffix == ".folded":
        return "".join(line + "\n" for line in folded_lines(stacks))
    return flame_graph(stacks, title, unit)


def view_of(options):
    """Return the View of a verb."""
    if options.verb == "trace":
        return TraceView(options.tree, any(group.until
                                           for group in options.groups))
    return {"hist": HistView, "latency": LatencyView,
            "stack": StackView}.get(options.verb, View)()


def is_address(expression):
    """Is its value an address of code, that has a name?"""
    return (expression.form == "sym"
            or expression.tree == ("name", False, "caller")
            and not expression.form)


class Naming:
    """Values and addresses of one target as text, or as they are."""

    def __init__(self, pid):
        self.pid, self.symbols = pid, None

    def open(self, expressions, every=None):
        """Open the files of all modules, if these expressions want names.

        While the process is there: names are asked for after its exit too.
        every   its modules, if they are open already
        """
        if self.symbols is None and any(is_address(each)
                                        for each in expressions):
            self.symbols = Symbols(self.pid, every or modules(self.pid))

    def learn(self, event):
        """Look up the names in an Event, which may be asked for later."""
        for value, expression in zip(event.values, event.probe._spec.values):
            self.value(value, expression)

    def key(self, probe, key):
        """Return a key of a probe, its addresses as text."""
        expressions = probe._spec.keys
        parts = key if len(expressions) > 1 else (key,)
        parts = tuple(self.value(part, each) if is_address(each) else part
                      for part, each in zip(parts, expressions))
        return parts if len(expressions) > 1 else parts[0]

    def address(self, vaddr, is_return=False):
        """Return "MODULE:FUNCTION+0xOFFSET" for a code address."""
        return self.frame(self.symbols.name(vaddr, is_return), True)

    @staticmethod
    def frame(frame, has_offset=False):
        """Return "MODULE:FUNCTION" of a Frame."""
        text = "%s:%s" % (frame.module or "[unknown]", frame.function
                          or "0x%x" % frame.offset)
        return text + ("+0x%x" % frame.offset if has_offset and frame.offset
                       and frame.function else "")

    def stack(self, frames):
        """Return Frames, the innermost first, as a stack of text."""
        return tuple(self.frame(frame) for frame in reversed(frames))

    def converter(self, expression, is_json):
        """Return what makes text of a value, or None: str()."""
        is_ns = is_time(expression.text) and not is_json
        if expression.kind == "int" and not expression.form and not (
                is_ns or is_address(expression)):
            return None
        name = expression.text.strip()
        if expression.form == "hex":
            form = '"0x%x"' if is_json else "0x%x"
            return lambda value: form % (value & 0xffffffffffffffff)
        if is_ns:
            return lambda value: quantity(value, "ns")

        def convert(value):
            value = self.value(value, expression)
            return (to_json(json_value(value)) if is_json
                    else value_text(name, value)[len(escape(name)) + 1:])
        return convert

    def value(self, value, expression):
        """Return a value as an int, text, or None for a fault."""
        if isinstance(value, bytes):
            return value.decode("utf-8", "surrogateescape")
        if value is None:
            return None
        if is_address(expression) and not isinstance(value, str):
            return self.address(value & (1 << 64) - 1,
                                expression.form != "sym")
        if expression.form == "hex":
            return "0x%x" % (value & (1 << 64) - 1)
        return value


def hit_json(hit):
    """Return a TraceHit as a line of JSON."""
    record = collections.OrderedDict([
        ("time_ns", hit.time_ns), ("tid", hit.tid), ("cpu", hit.cpu),
        ("event", hit.kind), ("values", collections.OrderedDict(
            (name, json_value(value)) for name, value in hit.values))])
    if hit.stack:
        record["stack"] = [json_text(frame) for frame in hit.stack]
    return json_line("trace", hit.where.pid, hit.where, **record)


# -- probing ----------------------------------------------------------------

class Armed(NamedTuple):
    """One probe of one target, and what of the command line it is for."""
    group: Group
    probe: object           # the library's Probe
    is_exit: bool           # at the exits of functions
    is_trigger: bool        # counts what --until waits for
    keys: tuple             # Expressions of --by
    values: tuple           # Expressions that a Trace records


class Watched:
    """One process that is being probed."""

    def __init__(self, target):
        self.target, self.armed = target, []
        self.naming = Naming(target.pid)
        self.named = ()             # the expressions whose values it names
        self.pid, self.name = target.pid, describe(target.pid, target.comm)
        self.is_running, self.n_notes = True, 0
        self.began_ns = 0           # a tree has no exit from before

    @property
    def probes(self):
        """The probes whose results are shown."""
        return [armed.probe for armed in self.armed if not armed.is_trigger]

    @property
    def hits(self):
        """How often probed places were passed."""
        return sum(probe.hits for probe in self.probes)

    @property
    def dropped(self):
        """Hits that were not recorded."""
        return sum(probe.dropped for probe in self.probes)

    @property
    def refused(self):
        """The SitePlans of the places that were refused, each once."""
        found = collections.OrderedDict(
            (plan.site.vaddr, plan) for probe in self.probes
            for plan in probe.refused)
        return list(found.values())

    def open_names(self, expressions):
        """Have values of these be named: in this program, and in others that
        it, or a child of it, becomes."""
        self.named += expressions
        self.naming.open(expressions)
        if self.naming.symbols is not None:
            def namer(pid, every):
                naming = Naming(pid)
                naming.open(self.named, every)
                return naming
            self.target._namer = namer
            for module in self.target._get_modules():
                module.naming = self.naming

    def frames_told(self):
        """Return what is known of calls that were not seen from end to end.
        """
        readings = [armed.probe.reading() for armed in self.armed
                    if armed.is_exit and not armed.is_trigger]
        counts = [(sum(reading.unfinished + reading.abandoned
                       for reading in readings), "unfinished"),
                  (sum(reading.unmatched for reading in readings),
                   "running already when armed")]
        return "".join("; %s %s" % (plural(n, "call"), what)
                       for n, what in counts if n)

    def loss(self):
        """Return this process's Loss."""
        return Loss(HOST, self.pid, self.hits, self.dropped,
                    len(self.refused))

    def totals(self):
        """Yield (Armed, Where, key, total) of all results."""
        for armed in self.armed:
            if armed.is_trigger or isinstance(armed.probe.action, Trace):
                continue
            is_function = isinstance(armed.probe.action, Latency)
            by_site = armed.probe.by_site
            for site, value in by_site().items():
                where = place(self.pid, site, armed.is_exit, is_function)
                if not isinstance(value, dict):
                    yield armed, where, (), value
                    continue
                for key, total in value.items():
                    yield armed, where, self._key(armed, key), total

    def _key(self, armed, key):
        """Return a key of the library's as text and ints."""
        if isinstance(armed.probe.action, Stack):
            return self.naming.stack(key)
        parts = key if len(armed.keys) > 1 else (key,)
        return tuple(self.naming.value(part, expression)
                     for part, expression in zip(parts, armed.keys))

    def hit(self, event):
        """Return the library's Event as a TraceHit."""
        armed = next(each for each in self.armed
                     if each.probe is event.probe)
        naming = event.site.module.naming or self.naming
        values = tuple(
            (expression.text.strip(), naming.value(value, expression))
            for expression, value in zip(armed.values, event.values))
        where = place(event.pid or self.pid, event.site, False,
                      armed.is_exit)
        return TraceHit(event.time_ns, where, event.tid, event.cpu,
                   "exit" if armed.is_exit else event.kind, values,
                   self.naming.stack(event.stack))


def starts_of(probe):
    """Return probes of the entries of the functions whose exits are probed.
    """
    return ["0x%x" % vaddr for vaddr in sorted({
        site.vaddr - site.offset for site in probe.sites})]


class HitLines:
    """A line, or more with stacks, for each hit. Also the other sinks' form.

    head, tail   text around all of it
    """
    head = tail = ""

    def __init__(self, hosts=(), has_pid=False):
        self.has_host, self.has_pid = len(set(hosts)) > 1, has_pid

    def feed(self, hit):
        """Return the text of one TraceHit, as far as it is certain."""
        return "".join(line + "\n" for line in hit_lines(
            hit, hit.where.host if self.has_host else "", self.has_pid))

    def flush(self, now_ns=None):
        """Return the text that waited: all, or what is certain at now_ns."""
        return ""


class HitTree(HitLines):
    """Calls nested by indentation."""

    def __init__(self, has_pid, is_exits_only):
        self.tree = CallTree(has_pid, is_exits_only)

    def feed(self, hit):
        """Return the lines that a TraceHit makes certain."""
        return "".join(line + "\n" for line in self.tree.feed(hit))

    def flush(self, now_ns=None):
        """Return the lines that waited."""
        return "".join(line + "\n" for line in self.tree.flush(now_ns))


class HitJson(HitLines):
    """JSON Lines."""

    def feed(self, hit):
        """Return one object."""
        return hit_json(hit)


class HitChrome(HitLines):
    """A Chrome trace, which Perfetto opens."""

    tail = "\n]}\n"

    def __init__(self):
        self.trace, self.head = ChromeTrace(), (
            '{"displayTimeUnit": "ns", "traceEvents": [')
        self.separator = "\n"

    def feed(self, hit):
        """Return the objects of one TraceHit."""
        text = ""
        for event in self.trace.feed(hit):
            text += self.separator + to_json(event)
            self.separator = ",\n"
        return text


class HitStacks(HitLines):
    """Counts the stacks of hits, for a file that is written at the end."""

    def __init__(self):
        self.stacks = {}

    def feed(self, hit):
        """Count one TraceHit."""
        stack = hit.stack or (hit.where.label(),)
        self.stacks[stack] = self.stacks.get(stack, 0) + 1
        return ""


class EventLines:
    """Events as lines of text or JSON, from a template for each site.

    What a TraceHit becomes, ten times as fast: a trace may have hundreds of
    thousands of events a second. What has numbers only becomes lines column
    by column, the rest one by one; what no template fits goes the long way.
    """

    def __init__(self, sink, watched, is_json, has_pid):
        self.sink, self.watched, self.is_json = sink, watched, is_json
        self.has_pid = has_pid
        self.makers = {}        # {(id of Probe, id of Site): (…)}
        self.second, self.clock = None, ""

    def text(self, events):
        """Return the lines of Events and of what of_columns() returned."""
        return "".join([event[1] if type(event) is tuple
                        else self._line(event) for event in events])

    def of_columns(self, form, columns):
        """Return (time_ns, line) of each record that Columns tell of."""
        times, tids, cpus, pids, indexes, values = columns
        makers = {index: self._maker(Event(
            0, 0, 0, 0, form.sites[index], form.kinds[index], (), (),
            form.probe._shown)) for index in set(indexes)}
        _, converters, *_ = makers[indexes[0]]
        if converters:
            values = [column if convert is None else map(convert, column)
                      for convert, column in zip(converters, values)]
        templates = {index: made[0] for index, made in makers.items()}
        if None in templates.values():
            return form._events(columns)
        rows = zip(*self._head(times, tids, cpus, pids) + tuple(values))
        return list(zip(times, [templates[index] % row for index, row
                                in zip(indexes, rows)]))

    def _head(self, times, tids, cpus, pids):
        """Return the columns of what stands in front of a line's values."""
        if self.is_json:
            return times, pids, tids, cpus
        threads = list(zip(pids, tids)) if self.has_pid else tids
        names = {thread: self._thread(thread) for thread in set(threads)}
        first, last = min(times) // 10 ** 9, max(times) // 10 ** 9
        if first == last:               # numbers below 2^30 are cheaper
            base, clocks = first * 10 ** 9, itertools.repeat(
                self._clock(first))
            micros = [(time_ns - base) // 1000 for time_ns in times]
        else:
            seconds = [time_ns // 10 ** 9 for time_ns in times]
            each = {second: self._clock(second) for second in set(seconds)}
            clocks = map(each.__getitem__, seconds)
            micros = [time_ns // 1000 % 10 ** 6 for time_ns in times]
        return clocks, micros, map(names.__getitem__, threads)

    def _clock(self, second):
        """Return "12:34:56." for a second of CLOCK_REALTIME."""
        if second != self.second:
            self.second, self.clock = second, clock(second * 10 ** 9)[:-6]
        return self.clock

    def _thread(self, thread):
        """Return what a line has for a tid, or for (pid, tid)."""
        return "%7s" % ("%d/%d" % thread if self.has_pid else thread)

    def _line(self, event):
        """Return the line of one Event."""
        time_ns, tid, cpu, pid, site, _, values, stack, probe = event
        template, converters, watched, *_ = self.makers.get(
            (id(probe), id(site))) or self._maker(event)
        if template is None or stack or None in values:
            return self.sink.feed(watched.hit(event))
        if converters:
            values = tuple([value if convert is None else convert(value)
                            for convert, value in zip(converters, values)])
        if self.is_json:
            return template % ((time_ns, pid, tid, cpu) + values)
        return template % ((
            self._clock(time_ns // 10 ** 9), time_ns // 1000 % 10 ** 6,
            self._thread((pid, tid) if self.has_pid else tid)) + values)

    def _maker(self, event):
        """Return (template, converters, Watched, …) of a site, kept."""
        watched = next(each for each in self.watched
                       if any(armed.probe is event.probe
                              for armed in each.armed))
        armed = next(armed for armed in watched.armed
                     if armed.probe is event.probe)
        hit = watched.hit(event._replace(stack=(), values=()))
        naming = event.site.module.naming or watched.naming
        converters = [naming.converter(expression, self.is_json)
                      for expression in armed.values]
        names = [expression.text.strip() for expression in armed.values]
        if self.is_json:        # an object has each name once
            template = (self._json_template(hit, names)
                        if len(set(names)) == len(names) else None)
        else:
            words = [escape(name).replace("%", "%%") + "=%s"
                     for name in names]
            template = "%s%06d  %s  " + "  ".join(
                [hit_label(hit).replace("%", "%%")]
                + [" ".join(words)] * bool(words)) + "\n"
        made = (template, converters if any(converters) else None, watched,
                event.site, event.probe)    # kept, as their ids are keys
        self.makers[id(event.probe), id(event.site)] = made
        return made

    @staticmethod
    def _json_template(hit, names):
        """Return the template of a line of JSON, its numbers left open."""
        mark = 9 * 10 ** 17
        text = hit_json(hit._replace(
            time_ns=mark, tid=mark + 2, cpu=mark + 3, where=hit.where._replace(
                pid=mark + 1), values=tuple(
                    (name, mark + 4 + n) for n, name in enumerate(names))))
        text = text.replace("%", "%%")
        for n in range(4 + len(names)):
            text = text.replace("%d" % (mark + n), "%s", 1)
        return text


_REMOVAL_S = 60     # to go on trying; the user is told, and may look why
_TRACE_POLL_S = 0.03


def has_pids(options):
    """Do lines of a trace tell the process?"""
    return len(options.pids) > 1 or options.follow_exec


class Session:
    """One command that probes. Its methods in the order of their calls.

    out       where results go; screen: the terminal for the live view
    printed   {…: total} at the last interval that was printed
    drawn     the same for the last frame of the live view
    reason    why it ended, in JSON's words
    """

    def __init__(self, options, signals):
        self.options, self.signals = options, signals
        self.view = view_of(options)
        self.is_trace = isinstance(self.view, TraceView)
        self.suffix = os.path.splitext(options.output or "")[1]
        self.out = open_output(options.output, signals)
        self.is_json = options.json or self.suffix == ".jsonl"
        self.live = None
        if not (options.command or options.leave or self.is_trace
                or (options.json and not options.output)):
            screen = self.out if not options.output else open_stdout(signals)
            self.live = Live(screen) if screen.has_live_view() else None
        self.sink = self._sink() if self.is_trace else None
        self.targets, self.watched = [], []
        self.lines = EventLines(self.sink, self.watched, isinstance(
            self.sink, HitJson), has_pids(options))
        self.printed, self.drawn, self.n_printed = {}, {}, 0
        self.reason, self.last_words, self.errors = "", [], []
        self.unremoved = []         # targets whose removal failed
        self.has_started = self.has_hinted = self.is_removed = False
        self.began = time.monotonic()
        self._next_uprobes = 0.0    # when to look for them

    def _sink(self):
        """Return what makes text of Hits."""
        options, has_pid = self.options, has_pids(self.options)
        if self.suffix == ".json":
            return HitChrome()
        if self.suffix in WHOLE_FORMATS:
            return HitStacks()
        if self.is_json:
            return HitJson()
        if options.tree:
            return HitTree(has_pid, all(
                self.view.is_exits_only(group) for group in options.groups))
        return HitLines((), has_pid)

    def talk(self, text, hint=""):
        """say(), with the live view out of the way."""
        if self.live:
            self.live.erase()
        say(text, hint)

    def arm(self):
        """Put the probes in. Raises UbpError if none could be."""
        self._warn()
        self.targets, errors = open_targets(self.options), []
        for target in self.targets:
            if self.signals.seen:
                break
            # What is to be left needs nobody who answers the loader.
            target._uses_hook = not self.options.leave
            try:
                self._arm_one(target)
            except UbpError as error:
                errors.append(error)
        report_all(errors, bool(self.watched))
        gc.enable()
        self.began = self.drawn_at = self.printed_at = time.monotonic()
        if self.is_trace and not self.is_recorder:
            self.out.write(self.sink.head)
        if self.options.command:
            self.targets[0].run()
            self.has_started = True
            self.signals.take_for_command()

    def _warn(self):
        """Say what the user probably did not mean."""
        told = set()
        for group in self.options.groups:
            for text in group.exprs + group.keys + tuple(filter(None, (
                    group.when, group.sum, group.until))):
                for warning in ubp_x86.parse_expression(text, True).warnings:
                    if warning not in told:
                        told.add(warning)
                        say("%s: %s" % (text, warning))

    @property
    def is_recorder(self):
        """Are hits kept until something happens?"""
        return self.is_trace and self.view.is_recorder

    def _arm_one(self, target):
        """Put the probes into one target, and say what was done."""
        options, name = self.options, describe(target.pid, target.comm)
        watched = Watched(target)
        with self.signals.uninterrupted("arming %s" % name), expansion_told(
                options.probes):
            for group in options.groups:
                for probes, action, when in self.view.actions(group):
                    if len(watched.armed) and options.tree and not (
                            probes[0].endswith("%return")):
                        probes = starts_of(watched.armed[-1].probe)
                    self._arm_group(watched, group, probes, action, when)
                if group.until:
                    self._arm_group(watched, group, group.probes, Count(),
                                    group.until)
            if options.tree and not all(map(self.view.is_exits_only,
                                            options.groups)):
                watched.began_ns = _realtime_ns()
            self.watched.append(watched)
        n_refused = len(watched.refused)
        say("%s: %s%s; stopped %.2f ms; %s" % (
            name, strategies_told(watched.probes),
            ", %d refused (plan shows why)" % n_refused if n_refused else "",
            target.pause_us / 1e3,
            "left in place" if options.leave else
            "its end removes" if options.command else
            "Ctrl-C removes"))
        overhead_ns = max([getattr(probe, "overhead_ns", 0)
                           for probe in watched.probes] + [0])
        if overhead_ns:
            say("each time includes about %d ns of measuring" % overhead_ns)
        for note in target.notes:
            say(note)
        watched.n_notes = len(target.notes)
        if target._guardian is not None and options.follow_exec and (
                not options.leave):
            say("followed through exec by pid %d, which traces it"
                % target._guardian.process.pid)
        if target._installer.traps():
            say("the int3s are kept by pid %d: killed %sby kill -9, the next "
                "hit kills %s" % (
                    target._guardian.process.pid,
                    "" if options.leave else "together with ubp ", name))
        if not options.command:
            self._hint_children(target.pid)

    def _arm_group(self, watched, group, probes, action, when):
        """Put the probes of a group in: those of entries, those of exits."""
        for is_return in False, True:
            where = [probe for probe in probes
                     if probe.endswith("%return") == is_return]
            if not where:
                continue
            is_exit = is_return or isinstance(action, Latency)
            probe = watched.target.probe(
                where, action, when=when or None,
                strategy=self.options.strategy,
                max_sites=self.options.max_sites,
                max_rate=self.options.max_rate)
            keys, values = (tuple(
                ubp_x86.parse_expression(text, is_exit) for text in texts)
                for texts in (group.keys, getattr(action, "exprs", ())))
            watched.open_names(keys + values)
            watched.armed.append(Armed(
                group, probe, is_exit,
                self.is_trace and not isinstance(action, Trace),
                keys, values))

    def _hint_children(self, pid):
        """Children that run already are not probed: say so."""
        others = [child for child in children_of(pid)
                  if child not in self.options.pids]
        if others:
            say("", "%d has %s of the same program that %s not probed: "
                "-p \"$(pgrep -d, -x %s)\"" % (
                    pid, "1 running child" if len(others) == 1 else
                    "%d running children" % len(others),
                    "is" if len(others) == 1 else "are", comm(pid)))

    def leave(self):
        """Print what was armed and go: `status` reads it, `clean` removes."""
        left, self.watched = self.watched, []
        for watched in left:
            with self.signals.uninterrupted("leaving %s" % watched.name):
                watched.target.detach()
        for watched in left:
            say("", "status -p %d reads them, clean -p %d takes them out"
                % (watched.pid, watched.pid))
            for probe in watched.probes:
                for site in probe.sites:
                    self.out.write("%d  0x%x  %s\n" % (
                        watched.pid, site.vaddr, site_label(site)))

    def watch(self):
        """Show what is computed until something asks for the end."""
        interval = self.options.interval or (1 if self.live else 1e12)
        next_tick = self.began + interval
        last_tick = self.began + (self.options.duration or 1e12)
        self.out.deadline = last_tick
        patience = _TRACE_POLL_S if self.is_trace else 0.1
        while not self.reason:
            now = time.monotonic()
            if now >= next_tick:
                self._draw()
                self._print_interval()
                next_tick += interval * (1 + (now - next_tick) // interval)
            elif self.live and self.live.is_outdated():
                self._draw()
            self.signals.wait(min(patience, next_tick - now, last_tick - now),
                              None if self.options.command else self.out)
            if self.is_trace and not self.is_recorder:
                self._print_hits()
            self._look()
        self.out.deadline = float("inf")

    def _look(self):
        """Set the reason to end if there is one by now."""
        for watched in self.watched:
            for note in watched.target.notes[watched.n_notes:]:
                self.talk("%s: %s" % (watched.name, note))
            watched.n_notes = len(watched.target.notes)
            if watched.is_running and not watched.target.alive:
                watched.is_running = False
                if len(self.watched) > 1:
                    self.talk("%s exited" % watched.name)
        elapsed = time.monotonic() - self.began
        if self.options.command:
            self._pass_on_signals()     # one that comes now is for later
        if self.signals.seen and not self.options.command:
            self.reason = self.signals.reason()
        elif self._is_under_uprobe():
            self.reason = "uprobe"
        elif self._is_enough():
            self.reason = "hits"
        elif self.is_recorder and self._is_triggered():
            self.reason = "until"
        elif not any(watched.is_running for watched in self.watched):
            self.reason = "exit"
        elif not self.options.command and all(
                watched.target._is_other for watched in self.watched):
            self.reason = "exec"
        elif not self.options.command and not self.out.has_reader():
            self.reason = "reader gone"
        elif elapsed >= (self.options.duration or 1e12):
            self.reason = "duration"
        elif elapsed >= 5 and not self.has_hinted:
            self.has_hinted = True
            if os.isatty(2):
                self._hint_no_hit()

    def _is_under_uprobe(self):
        """Has somebody set a kernel uprobe on top of a jump of ours?"""
        now = time.monotonic()
        if now < self._next_uprobes:
            return False
        self._next_uprobes = now + 0.25
        sites = [site for watched in self.watched for probe in watched.probes
                 for site in sites_under_uprobes(probe)]
        for site in sites[:1]:
            self.errors.append(ProbeError(
                "keep the probe at", site_label(site), "a kernel uprobe was "
                "set on top of it, which would jump into its middle"))
        return bool(sites)

    def _is_enough(self):
        """Have the --hits been made?"""
        if not self.options.hits:
            return False
        n = (self.n_printed if self.is_trace and not self.is_recorder else
             sum(watched.hits for watched in self.watched))
        return n >= self.options.hits

    def _is_triggered(self):
        """Was there a hit for which --until is true?"""
        return any(armed.probe.hits for watched in self.watched
                   for armed in watched.armed if armed.is_trigger)

    def _pass_on_signals(self):
        """A COMMAND gets ubp's TERM and HUP; Ctrl-C it got itself. If it
        stops itself, ubp does: the shell knows of ubp only."""
        target = self.targets[0]
        while self.signals.seen:
            signum = self.signals.seen.pop(0)
            # Only `alive` reaps it, so its pid is its own until then.
            if signum not in self.signals.OF_TERMINAL and target.alive:
                os.kill(target.pid, signum)
        child = target._process
        if child.stopped_by:
            signum, child.stopped_by = child.stopped_by, 0
            os.kill(os.getpid(), signum)
            for _ in range(10):     # who let ubp go on may mean ubp alone
                if not target.alive or read_stat(target.pid)[:1] not in (
                        ["T"], ["t"]):
                    return          # the guardian stops it for moments
                time.sleep(0.002)
            os.kill(target.pid, signal.SIGCONT)

    def _results(self, before):
        """Return [(Group, [Row])], `now` counted from before; update it."""
        tables = collections.OrderedDict()
        for group in self.options.groups:
            tables[self.view.likeness(group)] = collections.OrderedDict()
        for watched in self.watched:
            for armed, where, key, total in watched.totals():
                table = tables[self.view.likeness(armed.group)]
                table[where, key] = (table[where, key] + total
                                     if (where, key) in table else total)
        results = []
        for group, table in tables.items():
            rows = []
            for (where, key), total in table.items():
                old = before.get((group, where, key))
                rows.append(Row(where, key, total if old is None
                                else total - old, total))
                before[group, where, key] = total
            results.append((self._titled(group), rows))
        return results

    def _titled(self, group):
        """Return a likeness with the probes of all groups that are like."""
        return group._replace(probes=tuple(
            probe for each in self.options.groups
            if self.view.likeness(each) == group for probe in each.probes))

    def _lines(self, results, seconds, is_final, size=None, glyphs=ASCII):
        """Return the lines of all results, one block a group."""
        lines, is_one = [], len(results) == 1
        if size and not is_one:
            size = size[0], max(size[1] // len(results) - 2, 0)
        for group, rows in results:
            if not is_one:
                title = ("" if not lines else "\n") + escape(" ".join(
                    group.probes) + (", if " + group.when
                                     if group.when else ""))
                lines += [part[:size[0] if size else None]
                          for part in title.split("\n")]
            lines += self.view.lines(group, rows, seconds, is_final, size,
                                     self.options.top, glyphs)
        return lines

    def _draw(self):
        """Draw a frame of the live view."""
        if self.live:
            now = time.monotonic()
            seconds, self.drawn_at = now - self.drawn_at, now
            self.live.draw(self._lines(
                self._results(self.drawn), seconds, True,
                self.live.out.screen(), self.live.out.glyphs()))

    def _print_interval(self):
        """Print an interval's results, where intervals were asked for."""
        if not self.options.interval or (self.live and not
                                         self.options.output):
            return
        now = time.monotonic()
        seconds, self.printed_at = now - self.printed_at, now
        results = self._results(self.printed)
        if self.suffix in WHOLE_FORMATS:
            self._replace(results)
        elif self.is_json:
            self._print_json(results, True)
        else:
            self._print_lines(
                ["%s, %.1f s" % (time.strftime("%H:%M:%S"), seconds)]
                + self._lines(results, seconds, False) + [""])

    def _print_lines(self, lines):
        self.out.write("".join(line + "\n" for line in lines))

    def _print_json(self, results, is_interval=False):
        """Print one object per row, the largest first."""
        for group, rows in results:
            if is_interval:
                rows = [row for row in rows if weight(row.now)]
            rows = sorted(rows, key=lambda row: -weight(row.total))
            self.out.write("".join(self.view.json(group, row)
                                   for row in rows[:self.options.top]))

    def _replace(self, results):
        """Write the file that is always whole."""
        title = "ubp %s %s of %s" % (
            self.options.verb, " ".join(self.options.probes),
            ", ".join(watched.name for watched in self.watched))
        losses = [watched.loss() for watched in self.watched]
        hits = sum(loss.hits for loss in losses)
        dropped = sum(loss.dropped for loss in losses)
        if dropped:                    # a picture tells what it lacks, too
            title += "; %d of %s recorded" % (hits - dropped,
                                              plural(hits, "hit"))
        if self.is_trace:
            self.out.replace(stacks_document(self.suffix, self.sink.stacks,
                                             title, "hits"))
        else:
            self.out.replace(self.view.document(self.suffix, results, losses,
                                                title))

    def _print_hits(self, is_last=False):
        """Print what was traced since the last look."""
        events, has_lines = [], type(self.sink) in (HitLines, HitJson)
        for watched in self.watched:
            made = watched.target._read_events(
                is_last, self.lines.of_columns if has_lines else None)
            events += ([event for event in made
                        if event[0] >= watched.began_ns]
                       if watched.began_ns else made)
        if len(self.watched) > 1:
            events.sort(key=_time_of)
        if self.options.hits:
            del events[max(self.options.hits - self.n_printed, 0):]
        self.n_printed += len(events)
        if has_lines:
            text = self.lines.text(events)
        else:
            of = {id(armed.probe): watched for watched in self.watched
                  for armed in watched.armed}
            text = "".join([self.sink.feed(of[id(event.probe)].hit(event))
                            for event in events])
        self.out.write(text + self.sink.flush(int(time.time() * 1e9)))

    def _hint_no_hit(self):
        """Say which functions were not called yet, and who shares a name."""
        sites = [(watched, site, n) for watched in self.watched
                 for probe in watched.probes
                 for site, n in probe.counts().items()]
        silent = [(watched, site) for watched, site, n in sites if not n]
        if len(silent) < len(sites) and len(sites) > 4:
            return                     # a pattern's usual stragglers
        if len(silent) > 4:
            self.talk("no hit yet at any of %d sites" % len(silent))
            return
        for watched, site in silent:
            name = site_name(site)
            try:
                others = {each.module.name
                          for each in watched.target.find(name)}
            except UbpError:
                others = set()
            others.discard(site.module.name)
            self.talk("no hit yet at %s" % site_label(site) + (
                ". Also named %s: %s" % (name, ", ".join(sorted(others)))
                if others else ""))

    def remove(self):
        """Take the probes out of every target. May be repeated."""
        if self.is_removed:
            return
        self.is_removed = True
        if self.options.command and self.targets and not self.has_started:
            kill_command(self.targets[0])
        self.elapsed = time.monotonic() - self.began
        for target in self.targets:
            name = describe(target.pid, target.comm)
            with self.signals.uninterrupted("removing the probes from %s"
                                            % name):
                try:
                    target.close(_REMOVAL_S)
                except UbpError as error:
                    self.errors.append(error)
                    self.unremoved.append(target)
        for watched in self.watched:
            self.last_words += ["%s: %s" % (watched.name, note) for note
                                in watched.target.notes[watched.n_notes:]]
        for target in self.targets:
            self.last_words += target.removal.notes
        if self.live:
            self.live.erase()
        self.last_words += [self._words(watched) for watched in self.watched]

    def _words(self, watched):
        """Return the last line about one process."""
        what = ("%s exited" % watched.name if not watched.is_running else
                "%s %s" % (watched.name, watched.target._remains())
                if watched.target in self.unremoved else
                "%sremoved, %s" % (
                    watched.name + ": " if len(self.watched) > 1 else "",
                    pages_equal(watched.target.removal)))
        hits, dropped = watched.hits, watched.dropped
        return "%s; hits %d = recorded %d + dropped %d%s" % (
            what, hits, hits - dropped, dropped, watched.frames_told())

    def wait_for_command(self):
        """Wait until the COMMAND ends. -> its exit status, as a shell's."""
        target = self.targets[0]
        while not target.wait(0.1):
            self._pass_on_signals()
        code = target.returncode
        return code if code >= 0 else 128 - code

    def print_result(self):
        """Print the table, or what JSON has to say at the end."""
        if self.is_trace:
            self._print_last_hits()
        elif self.suffix in WHOLE_FORMATS:
            self._replace(self._results({}))
        elif self.is_json:
            self._print_json(self._results(self.printed))
        elif self.watched:
            self._print_lines(self._lines(
                self._results({}), self.elapsed, True,
                self.out.is_terminal and (self.out.screen()[0], 0) or None,
                self.out.glyphs()))
        if self.is_json and self.suffix not in (".json",) + WHOLE_FORMATS:
            for watched in self.watched:
                self._print_end(watched)
        if self.out.pending and not self.out.is_gone:
            say("the reader stood still: %s of results were not written"
                % plural(len(self.out.pending), "byte"))

    def _print_last_hits(self):
        """Print what is left in the rings, and what waited for more."""
        if self.is_recorder:
            self.out.write(self.sink.head)
        self._print_hits(True)
        self.out.write(self.sink.flush() + self.sink.tail)
        if self.suffix in WHOLE_FORMATS:
            self._replace(None)

    def say_last_words(self):
        """Say how it ended, for each process."""
        for words in self.last_words:
            say(words)
        for error in self.errors:      # a target kept its probes: clean
            report(error)

    def _print_end(self, watched):
        """Print JSON for what was refused, and the last object."""
        for plan in watched.refused:
            self.out.write(json_line("refused", watched.pid,
                                     place(watched.pid, plan.site),
                                     rule=json_text(plan.rule),
                                     why=json_text(plan.why)))
        hits, dropped = watched.hits, watched.dropped
        self.out.write(json_line(
            "end", watched.pid, reason=self.reason, hits=hits,
            recorded=hits - dropped, dropped=dropped,
            refused=len(watched.refused),
            pause_us=round(watched.target.pause_us, 1)))


def verb_probe(options, signals):
    """Probe until something asks for the end. -> exit status."""
    if options.dry_run:
        return verb_plan(options, signals)
    session = Session(options, signals)
    status_code = 0
    try:
        session.arm()
        if options.leave:
            session.leave()
            return 0
        session.watch()
        session.remove()
        if options.command:
            status_code = session.wait_for_command()
        session.print_result()
    finally:
        session.remove()               # after an error; else it is done
        session.say_last_words()
    if session.errors:
        return 125 if options.command else 1
    return status_code


# -- show -------------------------------------------------------------------

MAX_LINE = 1 << 24      # bytes of a line of JSON; what is longer is no line


class Run:
    """What one ubp wrote about one process, until its end line."""

    def __init__(self, host, pid):
        self.host, self.pid = host, pid
        self.last, self.end = {}, None      # {identity: value}
        self.n_refused = 0


class Merged:
    """Results of any number of hosts, from their JSON Lines, added up.

    runs      [Run], in order of their first lines
    n_bad     lines that are not what ubp writes
    Values are cumulative, so the last line of each counts; one that is less
    than before it was begins another run of the same process.
    """

    def __init__(self, is_by_host):
        self.is_by_host, self.runs, self.current = is_by_host, [], {}
        self.n_bad, self.n_strange = 0, 0

    def feed(self, source, record):
        """Take one object in. -> a TraceHit, if it is one. Raises nothing."""
        try:
            if record["v"] != 1:
                raise ValueError("of another version")
            kind = record["kind"]
            run = self._run(source, record)
            if kind == "trace":
                return self._hit(record)
            if kind in ("count", "hist", "latency", "stack"):
                self._take(run, source, kind, record)
            elif kind == "refused":
                run.n_refused += 1
            elif kind == "end":
                run.end = tuple(_number(record[name]) for name in (
                    "hits", "recorded", "dropped", "refused"))
            else:
                self.n_strange += 1     # of a later ubp
        except (KeyError, TypeError, ValueError, AttributeError):
            self.n_bad += 1
        return None

    def _run(self, source, record):
        """Return the Run that a record belongs to."""
        key = source, _text(record["host"]), _number(record["pid"] or 0)
        run = self.current.get(key)
        if run is None or run.end:
            run = self.current[key] = Run(key[1], key[2])
            self.runs.append(run)
        return run

    def _where(self, record):
        """Return the Where that results are added up by."""
        return Where(record["host"] if self.is_by_host else "", None,
                     _text(record["module"] or "?"),
                     _text(record["build_id"] or ""),
                     _text(record["function"] or "?"), None)

    def _hit(self, record):
        """Return the TraceHit that a record is."""
        where = self._where(record)._replace(host=record["host"],
                                             pid=_number(record["pid"] or 0))
        values = tuple((_text(name), value if value is None
                        or isinstance(value, str) else _number(value))
                       for name, value in record["values"].items())
        stack = tuple(_text(frame) for frame in record.get("stack", ()))
        return TraceHit(_number(record["time_ns"]), where,
                   _number(record["tid"]), _number(record["cpu"]),
                   _text(record["event"]), values, stack)

    def _take(self, run, source, kind, record):
        """Keep what a record says of one function and key."""
        group, key, value = _result(kind, record)
        where = self._where(record)
        identity = kind, group, where, record.get("address"), key
        before = run.last.get(identity)
        if before is not None and weight(value) < weight(before) and not (
                isinstance(value, Sum)):
            other = Run(run.host, run.pid)
            other.last, run.last = run.last, {}
            self.runs.append(other)         # it was never ended
        run.last[identity] = value

    def results(self):
        """Return {kind: [(Group, [Row])]}, added up."""
        tables = collections.OrderedDict()
        for run in self.runs:
            for identity, value in run.last.items():
                kind, group, where, _, key = identity
                table = tables.setdefault((kind, group),
                                          collections.OrderedDict())
                # A file is known by its build-id; without one, by its name.
                same = (where._replace(module="") if where.build_id
                        else where), key
                if same in table:
                    value = table[same].total + value
                    where = table[same].where
                table[same] = Row(where, key, value, value)
        found = collections.OrderedDict()
        for (kind, group), table in tables.items():
            found.setdefault(kind, []).append(
                (group, _told_apart(list(table.values()))))
        return found

    def losses(self):
        """Return (hits, recorded, dropped, refused, Runs without an end)."""
        ends = [run.end for run in self.runs if run.end]
        unended = [run for run in self.runs if not run.end]
        sums = [sum(column) for column in zip(*ends)] or [0, 0, 0, 0]
        sums[3] += sum(run.n_refused for run in unended)
        return tuple(sums) + (unended,)

    def last_line(self):
        """Return the line that hides no loss."""
        hits, recorded, dropped, refused, unended = self.losses()
        hosts = {run.host for run in self.runs}
        text = "%s, %s; hits %d = recorded %d + dropped %d; refused %d" % (
            plural(len(hosts), "host"), plural(len(
                {(run.host, run.pid) for run in self.runs}), "process")
            .replace("processs", "processes"), hits, recorded, dropped,
            refused)
        if unended:
            names = list(collections.OrderedDict.fromkeys(
                "%s pid %d" % (run.host, run.pid) for run in unended))
            text += "; no end line from %s%s: its loss is not known" % (
                ", ".join(names[:5]),
                " and %d more" % (len(names) - 5) if len(names) > 5 else "")
        if self.n_bad:
            text += "; %s no JSON of ubp" % (
                "1 line is" if self.n_bad == 1 else "%d lines are"
                % self.n_bad)
        if self.n_strange:
            text += "; %s of a kind not known here" % plural(self.n_strange,
                                                             "line")
        return escape(text)


def _number(value):
    """Return an int of JSON. Raises TypeError."""
    if type(value) is not int:
        raise TypeError("no number: %r" % (value,))
    return value


def _text(value):
    """Return a string of JSON. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError("no text: %r" % (value,))
    return value


def _result(kind, record):
    """Return (Group, key, value) of a record: what is told alike."""
    keys = tuple(_text(each) for each in record.get("by", ()))
    key = tuple(part if part is None or isinstance(part, str)
                else _number(part) for part in record.get("key", ()))
    if len(key) != len(keys):
        raise ValueError("as many keys as expressions")
    expression = _text(record.get("expression", ""))
    if kind in ("hist", "latency"):
        buckets = [tuple(_number(each) for each in bucket)
                   for bucket in record["buckets"]]
        value = Histogram.from_buckets(
            buckets, *(record[name] if not buckets else _number(record[name])
                       for name in ("sum", "min", "max")))
        return Group(exprs=(expression,), keys=keys), key, value
    value = _number(record["total"])
    if "sum" in record:
        value = Sum(_number(record["sum"]), value)
    if kind == "stack":
        key = tuple(_text(frame) for frame in record["stack"])
    return Group(keys=keys, sum=expression), key, value


def _told_apart(rows):
    """Return rows; modules of one name but other build-ids say which."""
    builds = {}
    for row in rows:
        builds.setdefault((row.where.module, row.where.function),
                          set()).add(row.where.build_id)
    return [row._replace(where=row.where._replace(module="%s[%s]" % (
        row.where.module, row.where.build_id[:8])))
        if len(builds[row.where.module, row.where.function]) > 1
        and row.where.build_id else row for row in rows]


def read_records(source, file, merged):
    """Yield (time_ns, source, object) of each line of a binary file."""
    import json                 # not for every start of ubp
    while True:
        line = file.readline(MAX_LINE)
        if not line:
            return
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8", "replace"))
            yield _number(record["time_ns"]), source, record
        except (ValueError, KeyError, TypeError, RecursionError):
            merged.n_bad += 1


def open_records(paths, errors):
    """Open FILE… for show, - being stdin. -> [(path, file)]"""
    files = []
    for path in paths:
        try:
            files.append((path, os.fdopen(os.dup(0), "rb") if path == "-"
                          else open(path, "rb")))
        except OSError as error:
            errors.append(UbpError("read", path, error_words(error)))
    return files


def verb_show(options, signals):
    """Add up JSON Lines of any number of hosts, and show them."""
    import heapq                # not for every start of ubp
    out, errors = open_output(options.output, signals), []
    suffix = os.path.splitext(options.output or "")[1]
    is_json = options.json or suffix == ".jsonl"
    merged = Merged(options.by == "host")
    files = open_records(options.probes, errors)
    report_all(errors, bool(files))
    sink = (HitStacks() if suffix in WHOLE_FORMATS else
            HitJson() if is_json else HitLines("ab", True))
    try:
        for _, source, record in heapq.merge(*(
                read_records(n, file, merged)
                for n, (_, file) in enumerate(files)),
                key=lambda each: each[0]):
            hit = merged.feed(source, record)
            if hit is not None:
                out.write(sink.feed(hit))
                if out.is_gone:
                    return 0
    except OSError as error:
        raise UbpError("read", "a file", error_words(error))
    finally:
        for _, file in files:
            file.close()
    if not merged.runs:
        raise UbpError("show", ", ".join(options.probes), "no line of it is "
                       "JSON of ubp", "make it with --json, or -o FILE.jsonl")
    show_merged(options, out, merged, suffix, sink)
    return 1 if errors else 0


def show_merged(options, out, merged, suffix, sink):
    """Print all that was added up; the last line tells what was lost."""
    results = merged.results()
    if suffix in WHOLE_FORMATS:
        stacks = dict(sink.stacks)
        for _, rows in results.get("stack", ()):
            for stack, n in StackView.stacks(rows).items():
                stacks[stack] = stacks.get(stack, 0) + n
        if not stacks:
            raise UbpError("write", options.output, "there are no stacks in "
                           + ", ".join(options.probes))
        units = {group.sum for group, _ in results.get("stack", ())} - {""}
        out.replace(stacks_document(suffix, stacks, merged.last_line(),
                                    ", ".join(sorted(units)) or "hits"))
        say(merged.last_line())
        return
    views = {"hist": HistView(), "latency": LatencyView(),
             "stack": StackView(), "count": View()}
    if options.json or suffix == ".jsonl":
        for kind, tables in results.items():
            out.write("".join(views[kind].json(group, row)
                              for group, rows in tables for row in rows))
        hits, recorded, dropped, refused, unended = merged.losses()
        out.write(json_line(
            "end", None, reason="show", hits=hits, recorded=recorded,
            dropped=dropped, refused=refused, pause_us=0,
            unended=["%s pid %d" % (run.host, run.pid) for run in unended],
            bad_lines=merged.n_bad))
        return
    size = (out.screen()[0], 0) if out.is_terminal else None
    for kind, tables in results.items():
        for group, rows in tables:
            lines = views[kind].lines(group, rows, 0, True, size,
                                      options.top, out.glyphs())
            out.write("".join(line + "\n" for line in lines + [""]))
    out.write(merged.last_line() + "\n")


# -- main -------------------------------------------------------------------

# Their end must be in order.
WRITING_VERBS = PROBING.split() + ["clean", "show"]


def reserve_standard_fds():
    """Put /dev/null on descriptors 0 to 2 that are closed.

    A file opened later would get the number, and be written to as stdout.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)


# Of a COMMAND that cannot be run: env(1); which it is, execve(2) tells.
EXIT_OF_ERRNO = {errno.ENOENT: 127, errno.EACCES: 126, errno.ENOEXEC: 126}


def exit_status(error, argv):
    """Return the exit status that an error means."""
    if "--" in argv:
        code = getattr(error, "returncode", None)   # it ended by itself
        if code is not None:
            return code if code >= 0 else 128 - code
        return EXIT_OF_ERRNO.get(getattr(error, "errno", None), 125)
    return 2 if isinstance(error, (Misuse, ubp_x86.ExpressionError)) else 1


def main(argv=None):
    """Run the command line. -> exit status, as env(1) and perf(1) have it.

    argv   the words behind the program's name; by default sys.argv's
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    signals = Signals()
    reserve_standard_fds()
    try:
        try:
            options = parse_options(argv)
        except HelpWanted as wanted:
            open_stdout(signals).write(wanted.text)
            return 0
        verb = {"list": verb_list, "plan": verb_plan, "show": verb_show,
                "status": verb_status, "clean": verb_clean}.get(
                    options.verb, verb_probe)
        if options.verb not in WRITING_VERBS:
            return verb(options, signals)
        with signals:
            return verb(options, signals)
    except UbpError as error:
        report(error)
        return exit_status(error, argv)
    except KeyboardInterrupt:
        say("interrupted; nothing was changed")
        return 1


def run():
    """The `ubp` command."""
    status = main()
    for signum in Signals.ENDS:        # too late to interrupt anything
        signal.signal(signum, signal.SIG_IGN)
    sys.exit(status)


if __name__ == "__main__":
    run()
