"""Plays systemd for one Type=notify service: keeps its descriptors, restarts it, and tells on standard output what it does.

    manager.py FOLDER COMMAND [ARGUMENT ...]

Restart=always, KillMode=mixed without the last kill, NotifyAccess=main, FileDescriptorStoreMax=64. FOLDER gets the notification
socket; words in a file `arguments` there are added to the command at each start. SIGHUP restarts (SIGTERM first), SIGUSR1 kills
with SIGKILL, SIGTERM stops and ends this program. Each line said is one JSON object."""
import ctypes, json, os, selectors, signal, socket, struct, sys, time

FOLDER, COMMAND = sys.argv[1], sys.argv[2:]
STORE_MAX = 64
RESTART_SECONDS = 0.1
STOP_SECONDS = 45
PR_SET_PDEATHSIG = 1


def say(event, **more):
    # In one piece: the service writes to the same pipe.
    os.write(1, (json.dumps({"systemd": event, **more}) + "\n").encode())


class Unit:
    def __init__(self):
        self.path = os.path.join(FOLDER, "notify.sock")
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.notify.bind(self.path)
        self.notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.store = []  # (name, descriptor), in order of arrival
        self.main = None
        self.watch = None
        self.start_at = 0.0
        self.kill_at = None
        self.ending = False
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.notify, selectors.EVENT_READ, self.told)
        self.signals, wake = socket.socketpair()
        wake.setblocking(False)
        self.signals.setblocking(False)
        signal.set_wakeup_fd(wake.fileno())
        self.wake = wake
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        self.selector.register(self.signals, selectors.EVENT_READ, self.signalled)

    def start(self):
        self.start_at = None
        extra = os.path.join(FOLDER, "arguments")
        words = COMMAND + (open(extra).read().split() if os.path.exists(extra) else [])
        pid = os.fork()
        if pid == 0:
            self.become(words)
        self.set_main(pid)
        say("started", pid=pid, given=len(self.store))

    def become(self, words):
        """The child: its descriptors are the store's from 3 on, as LISTEN_FDS says."""
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            # Out of the way of the numbers that are given.
            copies = [os.dup2(fd, 200 + at) for at, (_, fd) in enumerate(self.store)]
            for at, copy in enumerate(copies):
                os.dup2(copy, 3 + at)
            os.closerange(3 + len(copies), 1024)
            env = {**os.environ, "NOTIFY_SOCKET": self.path, "FDSTORE": str(STORE_MAX)}
            if copies:
                names = ":".join(name for name, _ in self.store)
                env.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(copies)), LISTEN_FDNAMES=names)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.execvpe(words[0], words, env)
        finally:
            os._exit(203)

    def set_main(self, pid):
        if self.watch is not None:
            self.selector.unregister(self.watch)
            os.close(self.watch)
        self.main, self.watch = pid, os.pidfd_open(pid)
        self.selector.register(self.watch, selectors.EVENT_READ, self.ended)

    def ended(self):
        self.selector.unregister(self.watch)
        os.close(self.watch)
        pid, self.main, self.watch, self.kill_at = self.main, None, None, None
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except ChildProcessError:
            status = None  # a process that took over is another's child
        self.drain_notifications()
        say("ended", pid=pid, status=status, kept=len(self.store))
        if self.ending:
            raise SystemExit
        self.start_at = time.monotonic() + (0 if self.restarting else RESTART_SECONDS)
        self.restarting = False

    restarting = False

    def signalled(self):
        for number in self.signals.recv(64):
            if self.main is None:
                continue
            if number == signal.SIGUSR1:
                os.kill(self.main, signal.SIGKILL)
            elif number in (signal.SIGHUP, signal.SIGTERM):
                self.restarting, self.ending = number == signal.SIGHUP, number == signal.SIGTERM
                self.kill_at = time.monotonic() + STOP_SECONDS
                os.kill(self.main, signal.SIGTERM)

    def drain_notifications(self):
        self.notify.setblocking(False)
        try:
            while True:
                self.told()
        except BlockingIOError:
            pass
        self.notify.setblocking(True)

    def told(self):
        space = socket.CMSG_SPACE(64 * 4) + socket.CMSG_SPACE(12)
        data, ancillary, _, _ = self.notify.recvmsg(65536, space, socket.MSG_CMSG_CLOEXEC)
        descriptors, sender = [], None
        for level, kind, value in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors += struct.unpack(f"{len(value) // 4}i", value)
            elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                sender = struct.unpack("iII", value)[0]
        fields = dict(line.split("=", 1) for line in data.decode().splitlines() if "=" in line)
        # The last words of a process that has ended are its own as well.
        if self.main is not None and sender != self.main:
            say("ignored", sender=sender, fields=fields)
            fields = {}
        self.obey(fields, descriptors)

    def obey(self, fields, descriptors):
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTORE") == "1":
            for descriptor in descriptors:
                known = any(os.path.sameopenfile(descriptor, kept) for _, kept in self.store)
                if known or len(self.store) >= STORE_MAX:
                    os.close(descriptor)
                else:
                    self.store.append((name, descriptor))
            say("stored", name=name, kept=len(self.store))
            return
        if fields.get("FDSTOREREMOVE") == "1":
            for _, descriptor in [entry for entry in self.store if entry[0] == name]:
                os.close(descriptor)
            self.store = [entry for entry in self.store if entry[0] != name]
            say("removed", name=name, kept=len(self.store))
        for descriptor in descriptors:
            os.close(descriptor)  # BARRIER=1 is answered by this
        if "MAINPID" in fields:
            self.set_main(int(fields["MAINPID"]))
            say("main", pid=self.main)
        if fields.get("READY") == "1":
            say("ready", pid=self.main)

    def run(self):
        while True:
            now = time.monotonic()
            if self.start_at is not None and now >= self.start_at:
                self.start()
            if self.kill_at is not None and now >= self.kill_at and self.main is not None:
                say("killed", pid=self.main)
                os.kill(self.main, signal.SIGKILL)
                self.kill_at = None
            for key, _ in self.selector.select(0.02 if self.start_at or self.kill_at else 1):
                key.data()


Unit().run()
