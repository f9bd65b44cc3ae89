"""Settings of the whole process, which shards of one process change together."""

import torch

from fishermask.tensors.kernels import plain_attention


def settings():
    cuda = torch.backends.cuda
    fused = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
    return torch.backends.mha.get_fastpath_enabled(), *fused


def test_attention_stays_plain_until_the_last_of_several_is_done():
    before = settings()
    assert any(before)
    plain_attention.__enter__()  # one thread ...
    plain_attention.__enter__()  # ... and another,
    assert not any(settings())
    plain_attention.__exit__()  # of which the first leaves first
    assert not any(settings())
    plain_attention.__exit__()
    assert settings() == before
    with plain_attention:
        assert not any(settings())
    assert settings() == before
