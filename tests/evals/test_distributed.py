"""Two processes under torch.distributed give, on each, the numbers of one."""

import json
import socket
import subprocess
import sys

import torch

from hubsae import evals
from hubsae.core.config import SAEConfig
from hubsae.hub.sae import HubSAE

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from hubsae import evals
from hubsae.core.config import SAEConfig
from hubsae.hub.sae import HubSAE
torch.set_num_threads(1)
rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
sae = HubSAE.random(SAEConfig(architecture="batch_topk", d_in=16, d_sae=64, k=4))
x = torch.randn(13_000, 16, generator=torch.Generator().manual_seed(7))
result = evals.reconstruction({"a": sae}, x, position=torch.arange(13_000) % 50, batch_size=700 + rank)
json.dump([result.rows(), result.decile_rows()], open(f"{out}/{rank}.json", "w"))
dist.destroy_process_group()
"""


def test_two_ranks_equal_one_process_bit_for_bit(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [sys.executable, "-c", SCRIPT]
    ranks = [subprocess.Popen([*arguments, str(r), str(port), str(tmp_path)]) for r in range(2)]
    assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sae = HubSAE.random(SAEConfig(architecture="batch_topk", d_in=16, d_sae=64, k=4))
        x = torch.randn(13_000, 16, generator=torch.Generator().manual_seed(7))
        one = evals.reconstruction({"a": sae}, x, position=torch.arange(13_000) % 50)
    finally:
        torch.set_num_threads(threads)
    expected = json.loads(json.dumps([one.rows(), one.decile_rows()]))
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected
