"""Debian packages, taken from wherever this machine's own apt takes them: no mirror is written down here."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from testbed.errors import SetupError
from testbed.stages import BUILD, command

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# Extracted packages expect these links; only base-files or its maintainer script would make them, too late.
MERGED_USR = 'for d in bin sbin lib lib64; do mkdir -p "$1/usr/$d"; ln -s "usr/$d" "$1/$d"; done'
# Neither proxy passwords nor mirrors belong into an image.
FORGET_HOST = 'rm -rf "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d'


def _output(argv: Sequence[str]) -> str:
    try:
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"cannot ask {argv[0]}: is this a Debian system?") from error


def host_codename() -> str:
    """This system's Debian suite, e.g. "bookworm"."""
    fields = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return fields.get("VERSION_CODENAME", "").strip('"')


def pick_mirror(index_targets: str, suite: str) -> str:
    """The mirror among lines of `URI RELEASE COMPONENT`: the first that has this suite's main component."""
    for line in index_targets.splitlines():
        uri, _, rest = line.partition(" ")
        if rest.split() == [suite, "main"]:
            return uri
    raise SetupError(f"apt's sources name no Debian mirror for {suite or 'this system'}")


def sources(suites: Sequence[str], index_targets: str, codename: str) -> list[str]:
    """The sources of these suites, as lines of sources.list, from the mirrors this host uses for its own suites.

    Security updates have a mirror of their own. A host whose apt is not told of one gets the suites without them.
    """
    lines = []
    for suite in suites:
        try:
            own = f"{codename}-security" if suite.endswith("-security") else codename
            lines.append(f"deb {pick_mirror(index_targets, own)} {suite} main")
        except SetupError:
            if not suite.endswith("-security"):
                raise
    return lines


def _index_targets() -> str:
    form = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    return _output(["apt-get", "indextargets", "--no-release-info", "--format", form, "Created-By: Packages"])


def _apt_options() -> list[str]:
    """How this host's apt reaches its mirror (proxies, certificates), as options for mmdebstrap's apt."""
    lines = _output(["apt-config", "dump", "Acquire::http", "Acquire::https"]).splitlines()
    return [f"--aptopt={line}" for line in lines if line.startswith(("Acquire::http::", "Acquire::https::"))]


def _mmdebstrap(
    target: str, suites: Sequence[str], packages: Sequence[str], hooks: Sequence[str], options: Sequence[str]
) -> list[str]:
    return [
        "mmdebstrap",
        '--aptopt=Apt::Install-Recommends "false"',
        *_apt_options(),
        *options,
        *[f"--customize-hook={hook}" for hook in (*hooks, FORGET_HOST)],
        f"--include={','.join(packages)}",
        suites[0],
        target,
        *sources(suites, _index_targets(), host_codename()),
    ]


def package_names(suites: Sequence[str], start: str, log: Path) -> list[str]:
    """Names that begin with `start` of all packages that these suites have now. Raises SetupError."""
    with tempfile.TemporaryDirectory(prefix="apt-") as folder:
        lines = sources(suites, _index_targets(), host_codename())
        listed = Path(folder) / "sources.list"
        listed.write_text("".join(line.replace("deb ", f"deb [signed-by={KEYRING}] ", 1) + "\n" for line in lines))
        own = {"Dir::State": folder, "Dir::State::status": os.devnull, "Dir::Cache": folder,
               "Dir::Etc::SourceList": listed, "Dir::Etc::SourceParts": "-", "Acquire::Languages": "none",
               "APT::Sandbox::User": ""}  # fmt: skip
        options = [f"--option={key}={value}" for key, value in own.items()]
        # without it apt is content with no index at all, and the packages seem to be gone
        command(["apt-get", *options, "update", "--error-on=any"], log)
        return _output(["apt-cache", *options, "pkgnames", start]).split()


def extract(target: Path, suites: Sequence[str], packages: Sequence[str], log: Path) -> None:
    """Unpack packages and what they depend on into a folder, running none of their scripts; needs no privilege."""
    log.unlink(missing_ok=True)
    options = ["--variant=extract", "--mode=chrootless", "--format=directory", f"--setup-hook={MERGED_USR}"]
    options.append("--skip=check/chrootless")  # it warns of package scripts that run as root, and none are run
    command(_mmdebstrap(str(target), suites, packages, [], options), log)


def install_to_squashfs(image: Path, suite: str, packages: Sequence[str], hooks: Sequence[str], log: Path) -> None:
    """A proper installation of `packages` and the essential system as a squashfs image, as root or in a namespace."""
    log.unlink(missing_ok=True)
    root = os.geteuid() == 0
    options = ["--variant=apt", f"--mode={'root' if root else 'unshare'}", "--format=tar"]
    options += [f'--dpkgopt=path-exclude="/usr/share/{name}/*"' for name in ("doc", "man", "locale", "info")]
    argv = _mmdebstrap("-", [suite], packages, hooks, options)
    pack = ["sqfstar", "-comp", "lz4", "-no-progress", "-quiet", str(image)]
    environment = dict(os.environ)
    if root:  # mmdebstrap's own leftovers, should it be killed, then lie where the next run sweeps
        scratch = BUILD / ".tmp-mmdebstrap"
        scratch.mkdir(exist_ok=True)
        environment["TMPDIR"] = str(scratch)
    script = 'set -o pipefail; n=$1; shift; "${@:1:n}" | "${@:n+1}"'
    command(["bash", "-c", script, "bash", str(len(argv)), *argv, *pack], log, env=environment)
