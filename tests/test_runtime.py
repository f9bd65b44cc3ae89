"""Settings and memory that all shards of a process share."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fishermask.tensors.runtime import plain_attention, return_memory


def settings():
    cuda = torch.backends.cuda
    fused = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
    return torch.backends.mha.get_fastpath_enabled(), *fused


def test_attention_stays_plain_until_the_last_thread_leaves():
    before = settings()
    assert any(before)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        first.submit(plain_attention.__enter__).result()
        second.submit(plain_attention.__enter__).result()
        assert not any(settings())
        first.submit(plain_attention.__exit__).result()
        assert not any(settings())
        second.submit(plain_attention.__exit__).result()
    assert settings() == before
    with plain_attention:
        assert not any(settings())
    assert settings() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_between_live_tensors_is_returned():
    def resident():
        return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024

    tensors = [torch.ones(16_000) for _ in range(3_000)]  # 64 kB each, below the size that malloc maps separately
    live_tensors = tensors[::2]
    full = resident()
    del tensors
    return_memory()
    assert resident() < full - 60  # 94 MB were freed
    assert all(bool((tensor == 1).all()) for tensor in live_tensors)
