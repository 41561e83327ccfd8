"""Which weights a model has: a digest of all of them, read once for each model and again when they have changed."""

import weakref
from collections.abc import Iterator

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

SAMPLES = 64
"""Elements of each parameter that go into ``weights_sample``."""

ALWAYS = 32 << 20
"""Bytes of weights up to which ``weights_digest`` reads them all each time."""

_PIECE = 64 << 20
"""Bytes that are brought to the CPU at a time."""

State = tuple[object, ...]
_known: weakref.WeakKeyDictionary[nn.Module, tuple[State, str]] = weakref.WeakKeyDictionary()


def weights_digest(model: nn.Module) -> str:
    """A digest of every byte of a model's parameters and of the buffers it saves: any other weight is another digest.

    What was read of a model is remembered until a parameter is replaced or changed in place. Above ALWAYS bytes, single
    elements changed behind PyTorch's back, through ``.data``, can go unseen as long as the same model object lives. Of
    weights that are not there (on the meta device) only name, shape and dtype count.
    """
    tensors = list(_tensors(model))
    if sum(x.nbytes for _, x in tensors if not x.is_meta) <= ALWAYS:
        return _whole(tensors)
    state = (weights_sample(model), *((x.data_ptr(), 0 if x.is_inference() else x._version) for _, x in tensors))
    if (known := _known.get(model)) is not None and known[0] == state:
        return known[1]
    found = _whole(tensors)
    _known[model] = state, found
    return found


def weights_sample(model: nn.Module) -> str:
    """A digest of evenly spaced elements of all parameters: tells checkpoints, training steps and adapters apart, fast.

    A change of single elements can go unseen, and so can any change of parameters that are on the meta device or of a
    tensor class of their own (quantized ones): of these only name, shape and dtype count.
    """
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        digest.update(_title(name, parameter))
        if parameter.numel() and not parameter.is_meta and type(parameter) in (nn.Parameter, Tensor):
            at = torch.from_numpy(np.linspace(0, parameter.numel() - 1, SAMPLES).astype(np.int64))
            plain = parameter.detach()
            plain = plain.view(torch.uint8) if plain.dtype.itemsize == 1 else plain  # float8 cannot be picked from
            sample = torch.take(plain, at.to(plain.device))
            digest.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _whole(tensors: list[tuple[str, Tensor]]) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(_title(name, tensor))
        if tensor.numel() and not tensor.is_meta:
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            for start in range(0, flat.numel(), _PIECE):
                digest.update(flat[start : start + _PIECE].cpu().numpy().data)
    return digest.hexdigest()


def _title(name: str, tensor: Tensor) -> bytes:
    return f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers by name, each once; those of a tensor class of its own as what it is made of."""
    saved = model.state_dict(keep_vars=True).keys()
    for name, parameter in model.named_parameters():
        yield from _plain(name, parameter.detach())
    for name, tensor in model.named_buffers():
        if name in saved:
            yield from _plain(name, tensor.detach())


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))
