#!/usr/bin/env python3
"""A real TLS 1.2 handshake by the `openssl` program, which then hands its socket to kTLS: ktls_openssl.py JOB

JOB is JSON, or `-` to read it from the first line of stdin. The last line printed is the result.

    connect: [host, port]       s_client; "send": n sends n bytes of the stream, or "recv": n receives n bytes
    listen: port                s_server; answers one request (GET /data) with "send" bytes; by sendfile with "sendfile"
    family: "4", "6" or "mapped" (give host as ::ffff:a.b.c.d)
    cipher: OpenSSL's name, such as ECDHE-RSA-AES128-GCM-SHA256
    seed: names the byte stream that is sent; timeout: seconds for the whole run (default 120)

`seconds` of a receiver runs from the first byte to the last, that of a sender from the first to the connection's end.
Whether kTLS was used, and whose, shows `tls_stat`: its delta has TlsTxDevice or TlsTxSw, TlsRxDevice or TlsRxSw.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time

from ktls_common import explain, say, sha256, stream, tls_stat, tls_stat_report


def client(job, result):
    """s_client between two pipes."""
    host, port = job["connect"]
    argv = ["openssl", "s_client", "-4" if job.get("family", "4") == "4" else "-6", "-connect", f"[{host}]:{port}"]
    argv += ["-ktls", "-tls1_2", "-cipher", job["cipher"], "-quiet", "-nocommands"]
    # A receiver stays until the peer closes, a sender ends with its input.
    argv += ["-ign_eof" if job.get("recv") else "-no_ign_eof"]
    outgoing = stream(job.get("seed", ""), job.get("send", 0))
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile() as errors:
        program = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=errors)
        killer = threading.Timer(job.get("timeout", 120), program.kill)
        killer.start()
        incoming, began, ended = bytearray(), time.monotonic(), None
        try:
            if outgoing:
                program.stdin.write(outgoing)
                program.stdin.close()
            while piece := program.stdout.read1(1 << 20):
                if not incoming and job.get("recv"):
                    began = time.monotonic()
                incoming += piece
                ended = time.monotonic()
            status = program.wait()
        finally:
            program.kill()
            program.wait()
            killer.cancel()
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    result["seconds"] = ((ended if job.get("recv") else None) or time.monotonic()) - began
    result.update(sent=len(outgoing), sha256_sent=sha256(outgoing))
    result.update(received=len(incoming), sha256_received=sha256(incoming))
    result["ok"] = status == 0 and len(incoming) == job.get("recv", 0)
    if not result["ok"]:
        result["error"] = {"errno": None, "message": f"openssl ended with {status}: {said.strip()[-1000:]}"}


def server(job, result):
    """s_server -WWW for one connection; the peer asks for /data and reads until the end."""
    outgoing = stream(job.get("seed", ""), job["send"])
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/data", "wb") as file:
            file.write(outgoing)
        certificate = ["-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=tlsnic", "-days", "2"]
        run = {"cwd": folder, "stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *certificate]
        subprocess.run(request, stdout=subprocess.DEVNULL, check=True, **run)
        argv = ["openssl", "s_server", "-accept", str(job["listen"]), "-4" if job.get("family", "4") == "4" else "-6"]
        argv += ["-ktls", "-tls1_2", "-cipher", job["cipher"], "-cert", "cert.pem", "-key", "key.pem"]
        argv += ["-WWW", "-naccept", "1", *(["-sendfile"] if job.get("sendfile") else [])]
        program = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, **run)
        killer = threading.Timer(job.get("timeout", 120), program.kill)
        killer.start()
        try:
            said = []
            for line in program.stdout:
                said.append(line)
                if line.startswith("ACCEPT"):
                    began = time.monotonic()
                    say({"event": "listening", "port": job["listen"]})
            status = program.wait()
        finally:
            program.kill()
            program.wait()
            killer.cancel()
    result.update(ok=status == 0, seconds=time.monotonic() - began, sent=len(outgoing), sha256_sent=sha256(outgoing))
    result.update(received=0, sha256_received=sha256(b""))
    if status:
        result["error"] = {"errno": None, "message": f"openssl ended with {status}: {''.join(said).strip()[-1000:]}"}


def main():
    text = sys.argv[1] if len(sys.argv) == 2 else "-"
    result = {"ok": False}
    before = tls_stat()
    try:
        job = json.loads(sys.stdin.readline() if text == "-" else text)
        (client if "connect" in job else server)(job, result)
    except Exception as error:  # noqa: BLE001 - whatever it is, the result line tells it
        result["error"] = explain(error)
    result["tls_stat"] = tls_stat_report(before)
    say(result)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
