"""What a launch costs, and how many a token makes: only a GPU has them."""

import pytest
import torch

from trapetum.bench import launches
from trapetum.bench.recording import Recorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_an_empty_launch_takes_about_a_microsecond():
    recorder = Recorder("cuda", "smoke")
    alone, pdl = (launches.add_launch_time(recorder, pdl) for pdl in (False, True))
    assert 0.2 < alone.value < 10 and 0.2 < pdl.value <= 1.1 * alone.value
    assert (alone.config["chain"], pdl.config["chain"]) == ("alone", "pdl")


def test_kernels_are_counted_inside_a_graph_too():
    x = torch.zeros(1024, device="cuda")

    def three(count):
        for _ in range(count):
            for _ in range(3):
                x.add_(1)

    graph = torch.cuda.CUDAGraph()
    three(1)
    with torch.cuda.graph(graph):
        three(1)
    counted = launches.kernels_a_token(three, 4, 8)
    replayed = launches.kernels_a_token(lambda count: [graph.replay() for _ in range(count)], 4, 8)
    assert counted == 3 and replayed == 3
    assert launches.kernels_a_token(lambda count: None, 4, 8) == 0
