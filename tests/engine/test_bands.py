"""The autoencoder in bands: the result of the whole picture, in less than half of the memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.autoencoder import BAND_AREA, Autoencoder
from engine.config import KONTEXT_DEV, AutoencoderConfig
from tests.engine.tiny import shake, worst

TINY = AutoencoderConfig(block_channels=(8, 16, 16, 24), res_blocks=1, groups=4)
WHOLE = 2**40


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    torch.manual_seed(3)
    module = Autoencoder(TINY)
    shake(module, seed=4)
    return module.to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("rows", [1, 2, 5, 12])
@pytest.mark.parametrize(("height", "width"), [(13, 7), (12, 16), (5, 1)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_bands_make_what_the_whole_picture_makes(
    autoencoder: Autoencoder,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    bound: float,
    height: int,
    width: int,
    rows: int,
) -> None:
    """Within rounding: in float64 next to nothing is left."""
    autoencoder.to(dtype)
    random = torch.Generator().manual_seed(height + width)
    latents = torch.randn(2, TINY.latent_channels, height, width, dtype=dtype, generator=random)
    image = torch.rand(2, 3, TINY.factor * height, TINY.factor * width, dtype=dtype, generator=random) * 2 - 1
    image[..., image.shape[2] // 3 :, :] *= 0.1  # bands of different statistics
    wanted = autoencoder.decode(latents), *autoencoder.moments(image)
    monkeypatch.setattr(autoencoder, "band_area", rows * width * TINY.factor**2)
    found = autoencoder.decode(latents), *autoencoder.moments(image)
    for banded, whole in zip(found, wanted, strict=True):
        assert worst(banded, whole) < bound * whole.abs().max()


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Most bytes of tensors that were alive at once, of those made under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.most: int = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return made

    def _gone(self, size: int) -> None:
        self.now -= size


def peak(work: Callable[[], object]) -> int:
    counted = PeakBytes()
    with counted, torch.no_grad():
        work()
    return counted.most


def test_bands_take_less_than_half_of_the_memory() -> None:
    """Bytes a pixel, counted over FLUX.1's own sizes on the meta device, where nothing is computed."""
    side = 1024
    with torch.device("meta"):
        module = Autoencoder(KONTEXT_DEV.autoencoder)
        latents, image = torch.empty(1, 16, side // 8, side // 8), torch.empty(1, 3, side, side)
    for half in (module.encoder, module.decoder):
        half.mid.register_module(
            "attn_1", nn.Identity()
        )  # whole either way, and there without the fused kernel of cpu and cuda
    for work in (partial(module.decode, latents), partial(module.encode, image)):
        module.band_area = WHOLE
        assert peak(work) > 2500 * side**2
        module.band_area = BAND_AREA
        assert peak(work) < 1400 * side**2
