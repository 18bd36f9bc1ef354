"""The file systems of this machine."""

from pathlib import Path

# As /proc/self/mountinfo names them. SQLite's locks and syncs do not hold on them.
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre"}
NETWORK |= {"fuse.sshfs", "fuse.s3fs", "fuse.glusterfs", "fuse.rclone", "fuse.gcsfuse"}
MOUNTS = Path("/proc/self/mountinfo")


def file_system(folder: Path) -> str:
    """The type of a folder's file system, by the table of mounts: the folder may not answer."""
    best, kind = 0, "unknown"
    for line in MOUNTS.read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")
        inside = f"{folder}/".startswith(f"{point.rstrip('/')}/")
        if inside and len(point) >= best:
            best, kind = len(point), after.split()[0]
    return kind
