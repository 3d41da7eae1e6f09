"""On which kind of file system a file is. SQLite needs locks and shared memory that network file systems do not have."""

from __future__ import annotations

from pathlib import Path

import psutil

# As the operating system names them. Those that other things than a network use too, such as 9p, are not here.
NETWORK_FILE_SYSTEMS = {
    "afpfs", "afs", "beegfs", "ceph", "cephfs", "cifs", "fhgfs", "fuse.beegfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.cephfs",
    "fuse.gcsfuse", "fuse.glusterfs", "fuse.goofys", "fuse.juicefs", "fuse.mount-s3", "fuse.rclone", "fuse.s3fs",
    "fuse.sshfs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "webdav",
    "wekafs",
}  # fmt: skip


def network_file_system(path: Path) -> str:
    """Return the kind of network file system that a file is on, or would be on; empty for a local disk.

    Args:
        path: the file. It need not exist. Links are followed.
    """
    whole = path.resolve()
    # Of two on the same folder, the later one hides the other.
    kinds = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    nearest = next((folder for folder in (whole, *whole.parents) if folder in kinds), None)
    kind = "" if nearest is None else kinds[nearest].lower()
    return kind if kind in NETWORK_FILE_SYSTEMS else ""
