"""`alaya-tiers export` and `import`: one context as one file, which says what it is and can be checked.

The file is a safetensors file, written and read segment by segment:

    NNNNNN.tokens          I64 [n]                    token ids of segment N
    NNNNNN.LLLL.keys       [kv_heads, n, k_dim]       keys of layer L
    NNNNNN.LLLL.values     [kv_heads, n, v_dim]       values
    __metadata__           format; identity and model as the store has them; digests: BLAKE2b-256 of the bytes of each
                           segment, in the order above; seal: the same of all that is said here
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import torch
import typer
from safetensors import SafetensorError, safe_open

from alaya_tiers.config import Settings, format_bytes
from alaya_tiers.contexts import Contexts
from alaya_tiers.engine import Engine
from alaya_tiers.errors import InputError
from alaya_tiers.identity import Identity, Tokens, model_digest
from alaya_tiers.manifest import Manifest, identity_from
from alaya_tiers.parts import Chunk, Say
from alaya_tiers.seams import SystemDisk
from alaya_tiers.snapshot import Snapshot
from alaya_tiers.tools.fsck import progress
from alaya_tiers.tools.stored import Directory

FORMAT = "alaya-context-1"
KEEP_EVERY = 1 << 16
"""Tokens that an import that is cut off has to do again, at most."""
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
Name = Annotated[str, typer.Argument(help="A context: its id, or the first characters of it, as ls shows them.")]


def export(
    path: Directory, context: Name, out: Annotated[Path, typer.Argument(help="The file to write.", dir_okay=False)]
) -> None:
    """Writes one context, with its token ids and what computed it, to a file for `import`.

    The store is not changed, and may be in use. The file counts when the command is done, not before: until then it is
    OUT.partial. Needs no more memory than a segment takes.
    """
    with reading(path, context) as (contexts, name):
        with progress("writing") as say:
            nbytes = written(contexts, name, out, say)
        tokens = contexts.manifest.contexts[name].tokens
    print(f"{tokens:,} tokens of context {name[:12]} in {out}, {format_bytes(nbytes)}.")


def import_(
    path: Annotated[Path, typer.Argument(help="A store; made if there is none.", file_okay=False)],
    file: Annotated[Path, typer.Argument(help="What export wrote.", exists=True, dir_okay=False)],
    tenant: Annotated[
        str, typer.Option(envvar="ALAYA_TIERS_TENANT", help="Whose it will be.", show_default=False)
    ] = "",
    keep_every: Annotated[
        int, typer.Option(min=0, help="Tokens after which what is there is kept if it is cut off; 0: all or nothing.")
    ] = KEEP_EVERY,
) -> None:
    """Stores a context that `export` wrote. Sessions of the same model and weights find it then.

    Each segment is compared with its digest before it is stored. Whoever made the file says what is in it: import files
    of people you trust to have computed it. An import that was cut off goes on where it was when it is run again; what
    it had kept until then is listed by `ls` as a context of its own.
    """
    with opened(file) as (source, identity, model, digests):
        settings = Settings(block_tokens=identity.block_tokens, segment_tokens=identity.segment_tokens)
        engine = Engine(settings, str(path), model)
        try:
            contexts = Contexts(engine)
            tokens = np.concatenate([source.get_tensor(f"{n:06d}.tokens").numpy() for n in range(len(digests))])
            with progress("storing") as say:
                name = contexts.load(tokens, chunks(source, digests, file), identity, tenant, say, keep_every)
        except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise _bad(file, error) from error
        finally:
            engine.close()
    print(f"{tokens.size:,} tokens stored as context {name[:12]}.")


def named(manifest: Manifest, text: str) -> str:
    """The id of a context that begins like this. Raises InputError where none or several do."""
    found = [name for name in manifest.contexts if name.startswith(text)]
    if len(found) != 1 or not text:
        many = f"{len(found)} contexts begin" if found else "no context begins"
        raise InputError(f"{many} with {text!r}: ls lists them")
    return found[0]


@contextmanager
def reading(path: Path, text: str) -> Iterator[tuple[Contexts, str]]:
    """The contexts of a store beside whoever writes it, and the id of one. Raises StoreError, InputError."""
    snapshot = Snapshot(path, None, SystemDisk())
    try:
        name = named(snapshot.manifest, text)
        identity = snapshot.manifest.identities[snapshot.manifest.root(name)]
        settings = Settings(block_tokens=identity.block_tokens, segment_tokens=identity.segment_tokens)
        engine = Engine(settings, None, snapshot.model)
        try:
            yield Contexts(engine, snapshot), name
        finally:
            engine.close()
    finally:
        snapshot.close()


def written(contexts: Contexts, name: str, out: Path, say: Say) -> int:
    """Write a context; bytes of the file. Raises StoreError, OSError; there is no file then."""
    manifest, partial = contexts.manifest, out.with_name(f"{out.name}.partial")
    names = manifest.chain(name)
    tensors, identity = {}, manifest.identities[manifest.root(name)]
    for n, segment in enumerate(names):
        record, size = contexts.shelf.record(segment), manifest.segments[segment].tokens
        tensors[f"{n:06d}.tokens"] = ("I64", [size], 8 * size)
        for number, layer in sorted(record.layers.items()):
            for kind, dim in (("keys", layer.k_dim), ("values", layer.v_dim)):
                shape = [layer.kv_heads, size, dim]
                nbytes = layer.kv_heads * size * dim * layer.shape.geometry.dtype.itemsize
                tensors[f"{n:06d}.{number:04d}.{kind}"] = (CODES[layer.dtype], shape, nbytes)
    said = {
        "format": FORMAT,
        "identity": json.dumps(asdict(identity), sort_keys=True),
        "model": json.dumps(contexts.shelf.model, sort_keys=True),
        "numbers": json.dumps(sorted(contexts.shelf.record(names[0]).layers)),
    }
    digests = ["0" * 64] * len(names)
    try:
        with open(partial, "wb") as file:
            file.write(_header(tensors, said, digests))
            for n, (tokens, chunk) in enumerate(contexts.read(name)):
                digests[n] = _segment(file, tokens, chunk)
                say(n + 1, len(names))
            nbytes = file.tell()
            file.seek(0)
            file.write(_header(tensors, said, digests))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return nbytes


@contextmanager
def opened(file: Path) -> Iterator[tuple[Any, Identity, dict[str, Any] | None, list[str]]]:
    """A file, who computed what is in it, and the digests of its segments. Raises InputError."""
    try:
        with safe_open(file, "pt") as source:
            said = source.metadata() or {}
            if said.get("format") != FORMAT:
                raise InputError(f"{file} was not written by alaya-tiers export, or by a newer version of it")
            identity, model, digests = _said(said)
            yield source, identity, model, digests
    except (SafetensorError, ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        if isinstance(error, InputError) or not _reading(error):
            raise
        raise _bad(file, error) from error


def chunks(source: Any, digests: list[str], file: Path) -> Iterator[Chunk]:
    """Keys and values of each segment, compared with its digest. Raises InputError."""
    numbers = json.loads(source.metadata()["numbers"])
    for n, wanted in enumerate(digests):
        parts = [source.get_tensor(f"{n:06d}.tokens")]
        for number in numbers:
            parts += [source.get_tensor(f"{n:06d}.{int(number):04d}.{kind}") for kind in ("keys", "values")]
        digest = hashlib.blake2b(digest_size=32)
        for part in parts:
            digest.update(_bytes(part))
        if digest.hexdigest() != wanted:
            raise InputError(f"{file} is damaged: segment {n} has another digest than it says; export it again")
        yield [(k[None], v[None]) for k, v in zip(parts[1::2], parts[2::2], strict=True)]


def _segment(file: BinaryIO, tokens: Tokens, chunk: Chunk) -> str:
    """Write a segment; its digest."""
    digest = hashlib.blake2b(digest_size=32)
    for part in (torch.from_numpy(tokens), *(x[0] for pair in chunk for x in pair)):
        raw = _bytes(part)
        digest.update(raw)
        file.write(raw)
    return digest.hexdigest()


def _bytes(x: torch.Tensor) -> memoryview:
    return x.contiguous().view(torch.uint8).numpy().data.cast("B") if x.numel() else memoryview(b"")


def _header(tensors: dict[str, tuple[str, list[int], int]], said: dict[str, str], digests: list[str]) -> bytes:
    """What stands before the tensors; as long for any digests."""
    said = said | {"digests": json.dumps(digests)}
    header: dict[str, Any] = {"__metadata__": said | {"seal": _seal(said)}}
    at = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _seal(said: dict[str, str]) -> str:
    """The digest of what a file says of itself."""
    text = json.dumps({name: value for name, value in said.items() if name != "seal"}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _said(said: dict[str, str]) -> tuple[Identity, dict[str, Any] | None, list[str]]:
    identity = identity_from(json.loads(said["identity"]))
    model, digests = json.loads(said["model"]), json.loads(said["digests"])
    if said.get("seal") != _seal(said):
        raise ValueError("what it says of itself is damaged")
    if not isinstance(model, dict | None) or model_digest(model) != identity.model:
        raise ValueError("it is of another model than it says")
    if not isinstance(digests, list) or not digests:
        raise ValueError("it has no segments")
    return identity, model, digests


def _reading(error: Exception) -> bool:
    """Whether an error is about the file, rather than what was done with it."""
    return not isinstance(error, OSError) or error.filename is None


def _bad(file: Path, error: Exception) -> InputError:
    return error if isinstance(error, InputError) else InputError(f"{file} is no context file: {error}")
