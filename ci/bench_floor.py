"""The floor of a cold run: what a bare script needs for the same cluster, with no line of the harness in it.

It takes plan.json, seeds and the client's key of a run that went before, and then does only what cannot be left out:
overlays, switches with their VLANs, the same QEMU command lines, K3S_ARGS, `systemctl start`. It checks nothing, keeps
nothing, and everything it waits for it looks at every 10 ms from outside or is told by.
"""

import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

LOOK_EVERY_S = 0.01
GIVE_UP_S = 300
SEED_DONE = b"harness-seed: ok"


def until(what, condition, limit_s=GIVE_UP_S):
    """Looks every 10 ms until the condition gives something."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(LOOK_EVERY_S)
    raise TimeoutError(f"no {what} within {limit_s} s")


class Ssh:
    """Multiplexed OpenSSH to one guest."""

    def __init__(self, folder, name, port, key):
        self.control = f"{folder}/{name}.ctl"
        self.words = [
            "ssh", "-F", "none", "-i", str(key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
            "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR", "-o", "KexAlgorithms=curve25519-sha256",
            "-S", self.control, "-p", str(port), "root@127.0.0.1",
        ]
        self.master = None

    def connect(self, *forward):
        # One connection for the banner and for ssh: each costs the guest an sshd.
        knock = ["-o", "ProxyUseFdpass=yes", "-o", f"ProxyCommand={sys.executable} -B {__file__} %p"]
        self.master = subprocess.Popen(self.words[:-1] + [*knock, "-M", "-N", *forward, self.words[-1]], stdin=subprocess.DEVNULL)
        until("control socket", lambda: os.path.exists(self.control) or self.failed())

    def failed(self):
        if self.master.poll() is not None:
            raise ConnectionError(f"ssh master exited {self.master.returncode}")

    def run(self, command, stdin=b""):
        done = subprocess.run([*self.words, command], input=stdin, stdout=subprocess.PIPE, check=True)
        return done.stdout

    def forward(self, local, remote):
        subprocess.run([*self.words[:-1], "-O", "forward", "-L", f"{local}:{remote}", self.words[-1]], check=True, stdout=subprocess.DEVNULL)

    def close(self):
        if self.master and self.master.poll() is None:
            self.master.kill()
            self.master.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def banner(port, limit_s=GIVE_UP_S):
    """The connection on which the guest's sshd shows its banner. One whose network is not up yet leaves a connection
    unanswered for seconds (libslirp sends the SYN again after 6 s), so that others follow it."""
    end = time.monotonic() + limit_s
    found = None
    opened, next_at = [], 0.0
    try:
        with selectors.DefaultSelector() as ready:
            while time.monotonic() < end:
                if time.monotonic() >= next_at and len(opened) < 16:
                    one = socket.create_connection(("127.0.0.1", port))
                    one.setblocking(False)
                    ready.register(one, selectors.EVENT_READ)
                    opened.append(one)
                    next_at = time.monotonic() + 0.2
                for key, _ in ready.select(LOOK_EVERY_S):
                    with contextlib.suppress(OSError):
                        if key.fileobj.recv(4, socket.MSG_PEEK) == b"SSH-":
                            found = key.fileobj
                            found.setblocking(True)
                            return found
                    ready.unregister(key.fileobj)
                    opened.remove(key.fileobj)
                    key.fileobj.close()
                    next_at = min(next_at, time.monotonic() + LOOK_EVERY_S)
    finally:
        for one in opened:
            if one is not found:
                one.close()
    raise TimeoutError(f"no SSH banner within {limit_s} s")


class Api:
    """The Kubernetes API, with the administrator's certificate."""

    def __init__(self, port, kubeconfig, folder):
        import base64
        self.port = port
        file = Path(folder) / f"admin-{port}.pem"
        text = lambda name: base64.b64decode(re.search(name + r":\s*(\S+)", kubeconfig).group(1))
        file.write_bytes(text("client-certificate-data") + text("client-key-data"))
        self.context = ssl.create_default_context(cadata=text("certificate-authority-data").decode())
        # The certificate's names are the guest's; it is its authority that counts here.
        self.context.check_hostname = False
        self.context.load_cert_chain(file)

    def wait_ready(self, node):
        """By one watch: told, not asked for."""
        end = time.monotonic() + GIVE_UP_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)) as plain:
                with self.context.wrap_socket(plain) as stream:
                    path = f"/api/v1/nodes?watch=1&fieldSelector=metadata.name%3D{node}"
                    stream.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/json\r\n\r\n".encode())
                    stream.settimeout(GIVE_UP_S)
                    for line in stream.makefile("rb"):
                        if is_ready(line):
                            return
            time.sleep(LOOK_EVERY_S)
        raise TimeoutError(f"{node} is not Ready")


def is_ready(line):
    """Whether a line of a watch shows a node that is Ready."""
    if not line.startswith(b"{"):
        return False
    conditions = json.loads(line).get("object", {}).get("status", {}).get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


class Switch:
    """A vde_switch and its VLANs."""

    def __init__(self, plan):
        ports = max(port["port"] for port in plan["ports"]) + 1
        self.plan = plan
        self.process = subprocess.Popen(
            ["vde_switch", "-f", "/dev/null", "-n", str(ports), "-s", plan["socket_dir"], "-M", plan["mgmt_socket"]],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def set_up(self):
        until("switch", lambda: os.path.exists(self.plan["mgmt_socket"]))
        with socket.socket(socket.AF_UNIX) as mgmt:
            until("switch", lambda: mgmt.connect_ex(self.plan["mgmt_socket"]) == 0)
            self.read(mgmt)
            vlans = {vlan for port in self.plan["ports"] for vlan in [*port["tagged_vlans"], port["native_vlan"]] if vlan}
            for vlan in sorted(vlans):
                self.tell(mgmt, f"vlan/create {vlan}")
            for port in self.plan["ports"]:
                number, native = port["port"], port["native_vlan"]
                self.tell(mgmt, f"port/create {number}")
                self.tell(mgmt, f"port/setvlan {number} {4095 if native is None else native}")
                for vlan in port["tagged_vlans"]:
                    self.tell(mgmt, f"vlan/addport {vlan} {number}")

    def tell(self, mgmt, command):
        mgmt.sendall(command.encode() + b"\n")
        answer = self.read(mgmt)
        if b"1000 Success" not in answer:
            raise RuntimeError(f"{command}: {answer!r}")

    @staticmethod
    def read(mgmt):
        answer = b""
        while not answer.endswith(b"vde$ "):
            part = mgmt.recv(4096)
            if not part:
                raise ConnectionError(f"the switch closed its management socket: {answer!r}")
            answer += part
        return answer


class Template:
    """What the floor takes of a run that went before."""

    def __init__(self, plan, folder):
        self.plan, self.folder = plan, Path(folder)


ELECTION = re.compile(r'"ts":"([^"]+)".*"msg":"(serving peer traffic|[0-9a-f]+ is starting a new election)')


def election_wait(journal):
    """Seconds for which a new etcd does nothing but wait until it elects itself. etcd draws them by lot (raft's election
    timeout, for k3s 0.5 to 5 s): whoever starts it has no part in them. What else a guest does meanwhile costs less the longer
    they are: the comparison is good to some tenths of a second."""
    moments = {}
    for line in journal.splitlines():
        if found := ELECTION.search(line):
            moments.setdefault("election" if "election" in found[2] else "serving", datetime.fromisoformat(found[1].replace("Z", "+00:00")))
    if len(moments) < 2:
        raise RuntimeError(f"the journal of the first server does not show etcd's first election, only {list(moments)}")
    return max(0.0, (moments["election"] - moments["serving"]).total_seconds())


def run(template, work):
    """One cold run. Returns seconds until the last node was Ready, until everything was gone, and etcd's own of them."""
    work = Path(work)
    shutil.rmtree(work, ignore_errors=True)
    began = time.monotonic()
    (work / "s").mkdir(parents=True)
    # The run's folders become this one: sockets, disks and console logs alike.
    plan, ports = json.loads(relocated(json.dumps(template.plan), work)), {}
    processes, sessions = [], {}
    try:
        switches = [Switch(switch) for switch in plan["switches"]]
        processes += [switch.process for switch in switches]
        disks = []
        for node in plan["nodes"]:
            os.link(template.folder / f"{node['name']}.seed", work / f"{node['name']}.seed")
            base = Path(node["vm"]["kernel"]).with_name("root.raw")
            disks.append(subprocess.Popen(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(work / f"{node['name']}.qcow2")]))
        for switch in switches:
            switch.set_up()
        for link in plan["links"]:
            ends = [next(s["socket_dir"] for s in plan["switches"] if s["name"] == end["switch"]) + f"[{end['port']}]" for end in (link["a"], link["b"])]
            processes.append(subprocess.Popen(["vde_plug", *(f"vde://{end}" for end in ends)], stdout=subprocess.DEVNULL))
        for disk in disks:
            if disk.wait() != 0:
                raise RuntimeError("qemu-img failed")
        for node in plan["nodes"]:
            port = ports[node["name"]] = free_port()
            argv = [word.replace("hostfwd=tcp:127.0.0.1:0-", f"hostfwd=tcp:127.0.0.1:{port}-") for word in node["argv"]]
            processes.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
        reach_all(plan, ports, sessions, work, template.folder / "client_key")
        form(plan, sessions, work)
        formed = time.monotonic() - began
        first = plan["nodes"][0]
        waited = election_wait(sessions[first["name"]].run(f"journalctl -u {first['k3s_unit']} -o cat --no-pager").decode())
        ending = time.monotonic()
    finally:
        for session in sessions.values():
            session.close()
        for process in reversed(processes):
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()
        shutil.rmtree(work, ignore_errors=True)
    return formed, formed + time.monotonic() - ending, waited


def relocated(text, work):
    plan = json.loads(text)
    disk = Path(plan["nodes"][0]["vm"]["disks"][0]["path"]).parent
    sockets = Path(plan["nodes"][0]["vm"]["qmp_socket"]).parent
    for node in plan["nodes"]:
        console = Path(node["vm"]["console_log"]).parent
        text = text.replace(str(console) + "/console.log", f"{work}/{node['name']}.console")
    return text.replace(str(disk) + "/", f"{work}/").replace(str(sockets) + "/", f"{work}/s/")


def reach_all(plan, ports, sessions, work, key):
    """Every guest's sshd, all at once."""
    troubles = []

    def reach(node):
        try:
            name = node["name"]
            console = Path(node["vm"]["console_log"])
            until("seed", lambda: console.exists() and SEED_DONE in console.read_bytes())
            session = Ssh(work, name, ports[name], key)
            sessions[name] = session
            session.connect()
        except Exception as trouble:
            troubles.append(trouble)

    threads = [threading.Thread(target=reach, args=[node]) for node in plan["nodes"]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if troubles:
        raise troubles[0]


def form(plan, sessions, work):
    """The first server, then each joiner: configured, started, awaited."""
    token = api = None
    for node in plan["nodes"]:
        session = sessions[node["name"]]
        words = iter(node["k3s_args"])
        args = [word for word in words if word != "--token" or not next(words)]
        env = f'K3S_ARGS="{" ".join(args)}"\n' + (f'K3S_TOKEN="{token}"\n' if token else "")
        role = node["role"]
        # Type=notify: this returns when k3s says that it is up.
        session.run(f"umask 077; cat > /etc/default/k3s-{role}; systemctl start {node['k3s_unit']}", env.encode())
        if api is None:
            said = session.run("cat /var/lib/rancher/k3s/server/token /etc/rancher/k3s/k3s.yaml").decode()
            token, kubeconfig = said.split("\n", 1)
            port = free_port()
            session.forward(port, "127.0.0.1:6443")
            api = Api(port, kubeconfig, work)
        api.wait_ready(node["name"])


if __name__ == "__main__":
    # ssh's ProxyCommand with ProxyUseFdpass (ssh_config(5)): finds the guest and hands the connection over.
    with banner(int(sys.argv[1])) as connection, socket.socket(fileno=1) as ssh:
        socket.send_fds(ssh, [b"\0"], [connection.fileno()])
