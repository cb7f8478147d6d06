"A file is whole or absent, whoever dies"
import os
from pathlib import Path

from sumix_nb.stopping import write_whole


def test_file_and_folder_reach_the_disk_in_order(tmp_path, monkeypatch):
    calls, sync, rename = [], os.fsync, os.replace
    def synced(fd): calls.append("folder" if Path(f"/proc/self/fd/{fd}").is_dir() else "file") or sync(fd)
    monkeypatch.setattr(os, "fsync", lambda fd: synced(fd))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("rename") or rename(*paths))
    write_whole(tmp_path / "run.json", b"{}")
    assert calls == ["file", "rename", "folder"]
