"""Two nodes with a rank each, on one machine: a server, and a process without a server that finds it by its address."""

from __future__ import annotations

from engines import PROMPTS, loaded, naive
from servers import TOKENS, Server, free_port

WEIGHTS = [[0.5, -0.3], [2.0, 1.0]]


def test_two_nodes_give_the_tokens_of_one(models, tmp_path):
    arms = [f"kind:{models / 'small'}", f"terse:{models / 'lora1'}"]
    shared = ["--tensor-parallel-size", "2", "--distributed-executor-backend", "mp", "--nnodes", "2"]
    shared += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]

    def node(rank: int, *more: str) -> Server:
        environment = {"VLLM_CPU_OMP_THREADS_BIND": str(rank), "VLLM_HOST_IP": "127.0.0.1"}
        options = [*shared, "--node-rank", str(rank), *more]
        return Server(models / "base", arms, tmp_path / f"{rank}.log", *options, environment=environment)

    with node(1, "--headless") as other, node(0) as server:
        server.wait()
        found = [server.tokens(PROMPTS[1], vllm_xargs={"arm_weights": each}) for each in WEIGHTS]
        assert "curl" in server.log.read_text()
        assert "curl" not in other.log.read_text()
    members = [loaded(models, name) for name in ("base", "small", "lora1")]
    assert found == [naive(members, PROMPTS[1], each, TOKENS) for each in WEIGHTS]
    assert found[0] != found[1]
