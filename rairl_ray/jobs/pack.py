"""What a job takes along: the checkout's tracked files and the files that its arguments name, as one small zip.

Never in it: what git ignores, what no verb reads (`NOT_NEEDED`), and whatever is named like a secret.
"""

from __future__ import annotations

import fnmatch
import subprocess
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from rairl_ray.errors import UserError

LIMIT_BYTES = 100 * 2**20
"""Of all packed files together, before compression. The package goes through the cluster's head node."""
NOT_NEEDED = frozenset({"benchmarks", "cluster", "data", "docs", "mlruns", "runs", "tests", "venv"})
"""Top-level folders that no verb reads, beside hidden ones; a file in them goes along only when named."""
SECRET_NAMES = (
    ".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keytab", "*.kdbx",
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", "_netrc", ".pypirc", ".npmrc", ".htpasswd",
    ".git-credentials", "credentials", "credentials.*", "*_credentials.json", "kubeconfig", "*.kubeconfig",
    "token", "*_token", "*-token", "*.token", "token.txt", "token.json", "*_token.txt", "*_token.json",
    "secret", "secrets", "secret.*", "secrets.*", "*.secret", "*.secrets",
)  # fmt: skip
"""Names, small letters, that are taken for a secret; code (*.py) never is."""
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)
"""The same files always make the same zip, so that Ray uploads it once."""


class PackError(UserError):
    """Files that cannot or must not be sent."""


@dataclass(frozen=True)
class Pack:
    """The files of a job."""

    files: Mapping[str, Path]
    """Path in the working directory, with `/` -> file on this machine."""
    left_out: tuple[str, ...] = ()
    """Tracked files that are named like a secret."""
    unknown: tuple[str, ...] = ()
    """Files that git neither tracks nor ignores: they stay here."""
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    def describe(self) -> list[str]:
        """What is sent and what is not, a line each."""
        folders: dict[str, int] = {}
        for name in self.files:
            top = name.split("/")[0] + "/" if "/" in name else name
            folders[top] = folders.get(top, 0) + 1
        what = ", ".join(f"{top} ({count})" if top[-1] == "/" else top for top, count in folders.items())
        lines = [f"packed: {len(self.files)} files, {size_text(self.bytes)}: {what}"]
        if self.left_out:
            lines.append(f"not packed, named like a secret: {_some(self.left_out)}")
        if self.unknown:
            lines.append(f"not packed, unknown to git (`git add` what the job needs): {_some(self.unknown)}")
        return lines


def make_pack(root: Path, named: Mapping[str, Path]) -> Pack:
    """The tracked files of the checkout and the named ones, checked.

    Args:
        root: the checkout, with launch.py in it.
        named: path in the working directory -> file that an argument names, tracked or not.

    Raises:
        PackError: no git checkout; a named file that looks like a secret; more than LIMIT_BYTES.
    """
    files: dict[str, Path] = {}
    left_out = []
    for name in _git(root, "--cached"):
        path = root / name
        if not _needed(name) or not path.is_file() or not _inside(path, root):
            continue
        if looks_secret(name):
            left_out.append(name)
        else:
            files[name] = path
    for name, path in named.items():
        if looks_secret(name):
            raise PackError(
                f"{path}: is named like a secret and is never sent; give its value by name (--secret NAME)"
            )
        files[name] = path
    unknown = [name for name in _git(root, "--others", "--exclude-standard") if _needed(name)]
    pack = Pack(
        files=dict(sorted(files.items())),
        left_out=tuple(left_out),
        unknown=tuple(name for name in unknown if name not in files and not looks_secret(name)),
        sizes={name: path.stat().st_size for name, path in files.items()},
    )
    if pack.bytes > LIMIT_BYTES:
        largest = sorted(pack.sizes.items(), key=lambda item: -item[1])[:3]
        said = ", ".join(f"{name} ({size_text(size)})" for name, size in largest)
        raise PackError(
            f"the working directory takes {size_text(pack.bytes)}, more than {size_text(LIMIT_BYTES)}; the "
            "largest: "
            f"{said}; put them on a disk that the nodes share and name them by their absolute path"
        )
    return pack


def write_zip(pack: Pack, target: Path) -> None:
    """Write the package; equal content gives equal bytes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in pack.files.items():
            info = zipfile.ZipInfo(name, _FIRST_DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, path.read_bytes())


def looks_secret(name: str) -> bool:
    """Whether a file's name, or a folder's above it, says that a secret is inside."""
    parts = [part.lower() for part in PurePosixPath(name).parts]
    if not parts or parts[-1].endswith(".py"):
        parts = parts[:-1]
    return any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in SECRET_NAMES)


def size_text(size: int) -> str:
    """Bytes for people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _git(root: Path, *options: str) -> list[str]:
    """Paths below root that `git ls-files` names."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", *options], capture_output=True, check=False
        )
    except FileNotFoundError:
        raise PackError("git is not installed; install it, or name the code with --working-dir") from None
    if answer.returncode:
        raise PackError(
            f"{root}: is no git checkout, so nobody knows which files belong to it; run submit from a "
            "checkout, "
            "or name the code with --working-dir"
        )
    return [name for name in answer.stdout.decode(errors="surrogateescape").split("\0") if name]


def _needed(name: str) -> bool:
    return name.split("/")[0] not in NOT_NEEDED and not name.startswith(".") and not name.endswith(".md")


def _inside(path: Path, root: Path) -> bool:
    """Whether a link leads out of the checkout."""
    return path.resolve().is_relative_to(root.resolve())


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
